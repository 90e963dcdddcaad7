"""The page of all figures as a reader meets it, in a real browser."""

import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from sidae_lib import experiments, figures, paths, runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture
def page_file(trained) -> Path:
    _, evals = experiments.accuracy_vs_epochs("smoke", ["digits"])
    records = runs.fetch_all(evals, log=lambda _: None)
    table = figures.summary(figures.evaluations(records))
    figures.save(figures.accuracy_vs_epochs(table), "accuracy_vs_epochs", "smoke", table)
    notebook = trained / "executed" / "01_accuracy_vs_epochs.html"
    notebook.parent.mkdir()
    notebook.write_text("<html><title>01</title></html>")
    return figures.index("smoke", {"accuracy_vs_epochs": records}, [notebook])


def test_the_page_names_what_it_shows(page_file):
    text = page_file.read_text()
    assert "Below the paper's scale" in text and "<h2>Claims</h2>" in text and "undecided (n = 1)" in text
    assert "<details><summary><b>undecided (fewer than three seeds)</b>" in text
    for link in re.findall(r'href="([^"d][^"]*)"', text):
        assert (page_file.parent / link).exists(), link
    assert {p.suffix for p in page_file.parent.glob("scoreboard.*")} == {".csv", ".html"}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("name", ["index.html", "scoreboard.html", "laptop"])
def test_a_browser_shows_it_without_an_error_on_a_phone(page_file, name, tmp_path, monkeypatch):
    from playwright.sync_api import sync_playwright

    file = page_file.with_name(name)
    if name == "laptop":  # all committed figures
        shutil.copytree(paths.ROOT / "figures" / "laptop", tmp_path / "laptop")
        monkeypatch.setenv("SIDAE_FIGURES", str(tmp_path))
        file = figures.index("laptop", {})
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 390, "height": 844})
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(request.url))
        page.goto(file.as_uri())
        images = page.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.alt])")
        wide = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        browser.close()
    assert not said
    assert all(width > 0 and alt for width, alt in images) and (images or name == "scoreboard.html")
    assert wide[0] <= wide[1], "the page scrolls sideways"


def test_timings_of_notebooks_that_were_not_run_stay(store):
    clock = [{"notebook": f"0{n}_x", "seconds": float(n), "failed": False} for n in (1, 2)]
    figures.timings("smoke", clock)
    figures.timings("smoke", [clock[0] | {"seconds": 9.0}])
    table = pd.read_csv(paths.figures("smoke") / "timings.csv")
    assert table.set_index("notebook")["seconds"].to_dict() == {"01_x": 9.0, "02_x": 2.0}


def test_the_table_of_probes_averages_seeds_alone():
    """Runs that differ in w, target or augmentation have rows of their own."""
    columns = ["method", "w", "augment", "target", "kind", "mean"]
    rows = [("sidae", 0.5, "a", "standardised, mean", "linear", 10), ("sidae", 0.25, "a", "standardised, mean", "linear", 20),
            ("sidae", 0.5, "a", "unit, mean", "linear", 30), ("untrained", 0.5, "none", "standardised, mean", "linear", 5),
            ("supervised", 0.5, "none", "standardised, mean", "classifier", 40),
            ("supervised", 0.5, "a", "standardised, mean", "classifier", 60)]  # fmt: skip
    table = figures.probes(pd.DataFrame(rows, columns=columns).assign(display="digits", labels=1.0, epoch=2, of=2))
    own = {method: value for (_, _, method), value in table["linear"].fillna(table["classifier"]).items()}
    assert own == {"sidae": 10, "sidae, w = 0.25": 20, "sidae, unit, mean": 30, "untrained": 5, "supervised": 40,
                   "supervised, augmented": 60}


def test_a_legend_of_many_long_names_stays_within_the_figure():
    def draw(ax, rows):
        for k in range(6):
            ax.plot([0, 1], [k, k], label=f"a name of some length, {k}")

    fig = figures.panels(pd.DataFrame({"panel": ["a", "b"]}), draw, columns=2, size=3)
    fig.draw_without_rendering()
    box = fig.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= fig.bbox.width


def test_several_seeds_of_an_encoder_are_one_point_of_its_pairs_accuracy():
    """Of the published records: the mean of five lists, and Student's 95 % interval with four degrees of freedom."""
    lists = [r for r in runs.every("eval-*", (paths.records(),)) if r["kind"] == "pairs" and r["n_train"] == 5000
             and r["config"]["run"]["method"] == "moco_v2" and r["data"]["name"] == "cifar10"]  # fmt: skip
    table = figures.pair_table(lists, [])
    assert not table.duplicated(["panel", "series", "x"]).any()
    last = [r["accuracy"] for r in lists if r["epoch"] == 65 and r["config"].get("augment", "none") == "none"]
    (point,) = table.query("panel == 'epoch' and x == 65").itertuples()
    half = 2.7764451 * np.std(last, ddof=1) / 5**0.5
    assert len(last) == point.n == 5 and point.accuracy == pytest.approx(np.mean(last))
    assert (point.low, point.high) == pytest.approx((np.mean(last) - half, np.mean(last) + half))
    (alone,) = table.query("panel == 'epoch' and x == 13").itertuples()
    (of_list,) = [r["pairs"]["interval"] for r in lists if r["epoch"] == 13]
    assert alone.n == 1 and [alone.low, alone.high] == of_list


def test_a_saved_chart_holds_its_axis_labels(tmp_path, monkeypatch):
    """Ticks are made when a chart is drawn: laid out with ticks of another font size, this label left the page."""
    monkeypatch.setenv("SIDAE_FIGURES", str(tmp_path))
    table = pd.read_csv(paths.ROOT / "figures" / "laptop" / "semantic_pairs.csv")
    fig = figures.save(figures.semantic_pairs(table), "semantic_pairs", "laptop", table)
    with plt.rc_context(figures.STYLE):
        assert fig.axes[0].get_tightbbox().x0 >= 0
