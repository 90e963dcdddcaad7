"""Figures: what they are drawn from, what they say, how they are saved; and the tables beside them."""

import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from replay import replay

from sidae_lib import batch, diagrams, differences, experiments, figures, frames, methods, paths, store
from sidae_lib.config import SidaeError


def one_line() -> plt.Figure:
    with figures.figure(3, 2) as fig:
        ax = fig.subplots()
        ax.plot([1, 2], [50, 60], label="SidAE")
        ax.set(xlabel="epochs", ylabel="a label of two\nlines that is high")
    return fig


def test_timings_of_notebooks_that_were_not_run_stay(own_store):
    clock = [{"notebook": f"0{n}_x", "seconds": float(n), "failed": False} for n in (1, 2)]
    batch.timings("smoke", clock)
    batch.timings("smoke", [clock[0] | {"seconds": 9.0}])
    table = pd.read_csv(paths.figures("smoke") / "timings.csv")
    assert table.set_index("notebook")["seconds"].to_dict() == {"01_x": 9.0, "02_x": 2.0}


def test_the_table_of_probes_averages_seeds_alone():
    """Runs that differ in w, target or augmentation have rows of their own."""
    columns = ["method", "w", "augment", "target", "kind", "mean"]
    rows = [("sidae", 0.5, "a", "standardised, mean", "linear", 10), ("sidae", 0.25, "a", "standardised, mean", "linear", 20),
            ("sidae", 0.5, "a", "unit, mean", "linear", 30), ("untrained", 0.5, "none", "standardised, mean", "linear", 5),
            ("supervised", 0.5, "none", "standardised, mean", "classifier", 40),
            ("supervised", 0.5, "a", "standardised, mean", "classifier", 60)]  # fmt: skip
    table = frames.probes(pd.DataFrame(rows, columns=columns).assign(display="digits", labels=1.0, epoch=2, of=2))
    own = {method: value for (_, _, method), value in table["linear"].fillna(table["classifier"]).items()}
    assert own == {"SidAE": 10, "SidAE, w = 0.25": 20, "SidAE, unit, mean": 30, "Untrained": 5, "Supervised": 40,
                   "Supervised, augmented": 60}


def test_parameters_that_leave_no_record_get_a_sentence():
    with pytest.raises(SidaeError, match="No evaluation on record fits what you chose; choose other seeds, image sets"):
        frames.evaluations([])


def test_a_legend_of_many_long_names_stays_within_the_figure():
    for ax, _ in figures.panels(pd.DataFrame({"panel": ["a", "b"]}), columns=2, size=(3, 3)):
        for k in range(6):
            ax.plot([0, 1], [k, k], label=f"a name of some length, {k}")
    fig = plt.gcf()
    fig.draw_without_rendering()
    box = fig.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= fig.bbox.width and len(fig.legends[0].get_texts()) == 6


def test_a_panel_per_value_with_what_its_numbers_are_made_of():
    table = pd.DataFrame({"panel": list("aabbcd"), "x": range(6), "scale": "laptop", "name": ["SidAE"] * 5 + ["Untrained"],
                          "seed": [0, 1, 0, 1, 0, 0], "hardware": "X, 1 thread"})  # fmt: skip
    drawn = [(ax.get_title(), list(rows["x"]), ax.texts[0].get_text()) for ax, rows in figures.panels(table)]
    n = {k: f"laptop scale, n = {k}, X, 1 thread" for k in (1, 2)}
    assert drawn == [("a", [0, 1], n[2]), ("b", [2, 3], n[2]), ("c", [4], n[1]), ("d", [5], n[1])]
    axes = plt.gcf().axes
    assert [ax.get_title() for ax in axes] == ["a", "b", "c", "d", "", ""] and not axes[4].axison


@pytest.mark.parametrize("rows, said", [
    ({"scale": ["paper"] * 3, "name": ["SidAE", "SimSiam", "Untrained"], "n": [2, 2, 5]}, "paper scale, n = 2 (Untrained 5)"),
    ({"name": ["SidAE"] * 3, "seed": [0, 1, 3], "own": [False, False, True], "hardware": "X"}, "n = 2, X"),
    ({"scale": ["laptop"] * 2, "n": [3, 1]}, "laptop scale, n = 1 to 3"),
    ({"name": ["SidAE", "Untrained"] * 2, "n": [2, 5, 2, 1]}, "n = 2 (Untrained 1 to 5)"),
    ({"hardware": ["a; b", "b"]}, "a, b"), ({"x": [1]}, ""),
])  # fmt: skip
def test_a_stamp(rows, said):
    assert figures.stamp(pd.DataFrame(rows)) == said


def test_a_table_is_the_same_each_time_and_marks_the_best():
    rows = pd.DataFrame({"method": ["SidAE", "SimSiam"], "accuracy": [61.04, np.nan], "n": [3, 2]})
    once, again = (figures.table(rows, "Table 1", bold=["accuracy"]).data for _ in range(2))
    assert once == again and "nan" not in once and ">61.0<" in once and "<caption>Table 1</caption>" in once
    assert once.count("font-weight: bold") == 1 and "row0_col1" in re.search(r"#\S+ {\s*font-weight", once)[0]
    mask = pd.DataFrame(False, rows.index, rows.columns)
    mask.loc[1, "method"] = True
    assert "row1_col0" in re.search(r"#\S+ {\s*font-weight", figures.table(rows, bold=mask).data)[0]


def test_several_seeds_of_an_encoder_are_one_point_of_its_pairs_accuracy():
    """Of the published records: the mean of five lists, and Student's 95 % interval with four degrees of freedom."""
    lists = [r for r in store.every("evaluation", store.published()) if r["kind"] == "pairs" and r["n_train"] == 5000
             and r["config"]["run"]["method"] == "moco_v2" and r["data"]["name"] == "cifar10"]  # fmt: skip
    table = frames.pair_table(lists, [])
    assert not table.duplicated(["panel", "series", "x"]).any()
    last = [r["accuracy"] for r in lists if r["epoch"] == 65 and r["config"].get("augment", "none") == "none"]
    (point,) = table.query("panel == 'epoch' and x == 65").itertuples()
    half = 2.7764451 * np.std(last, ddof=1) / 5**0.5
    assert len(last) == point.n == 5 and point.accuracy == pytest.approx(np.mean(last))
    assert (point.low, point.high) == pytest.approx((np.mean(last) - half, np.mean(last) + half))
    (alone,) = table.query("panel == 'epoch' and x == 13").itertuples()
    (of_list,) = [r["pairs"]["interval"] for r in lists if r["epoch"] == 13]
    assert alone.n == 1 and [alone.low, alone.high] == of_list


def test_an_epoch_without_false_negatives_is_a_gap():
    """FNC's share of right ones among those found: of none there is no share, and a line at 0 would say all were wrong."""
    rival = next(r for r in store.every("run", store.published()) if r["config"]["method"] == "fnc" and r["epochs"][64:])
    mined = next(r for r in store.every("evaluation", store.published()) if r["kind"] == "pairs")
    none = [e | {"fn_found": 0.0, "fn_right": 0.0} if e["epoch"] == 2 else e for e in rival["epochs"]]
    tables = (frames.pair_table([mined], [rival | {"epochs": e}]) for e in (rival["epochs"], none))
    was, now = (t[t["series"] == "FNC, while training"].set_index("x")["accuracy"] for t in tables)
    assert np.isnan(now[2]) and now.drop(2).equals(was.drop(2)) and was[2] > 0


def test_a_saved_chart_holds_its_axis_labels_and_is_the_same_each_time(tmp_path, monkeypatch):
    """Ticks are made when a chart is drawn: laid out with ticks of another font size, this label left the page."""
    monkeypatch.setenv("SIDAE_FIGURES", str(tmp_path))
    files = []
    for _ in range(3):  # the layout's solver gives one of two answers that differ in the last bit
        fig = one_line()
        figures.save(fig, "line", "laptop", pd.DataFrame({"x": [1, 2], "right": "left out"}))
        with plt.rc_context(figures.STYLE):
            assert fig.axes[0].get_tightbbox().x0 >= 0
        files.append({p.suffix: p.read_bytes() for p in (tmp_path / "laptop").iterdir()})
    assert files[0].keys() == {".svg", ".png", ".csv"} and files[0] == files[1] == files[2]
    assert files[0][".csv"] == b"x\n1\n2\n"


# --- what a notebook's figure may not do, read back from what it drew ----------------------------------------------------


def committed(name: str) -> pd.DataFrame:
    return pd.read_csv(paths.ROOT / "figures" / "recorded" / f"{name}.csv")


@pytest.mark.parametrize("number, name", [("01", "accuracy_vs_epochs"), ("02", "w_sweep"), ("12", "pairs_found"),
                                          ("05", "stl_transfer"), ("04", "fine_tuning")])  # fmt: skip
def test_points_of_different_n_are_never_joined(number, name):
    """Every line of every panel: the points that it joins are means over one number of seeds."""
    drawn, joined = replay(number), 0
    table = pd.read_csv(io.StringIO(drawn.tables[name]))
    table = table.rename(columns={"accuracy": "mean"} if "mean" not in table else {})
    of_value = table.groupby(table["mean"].round(3))["n"].agg(set)
    for line in (line for ax in drawn.figures[name].axes for line in ax.lines):
        values = np.array(line.get_ydata(), float).round(3)
        if line.get_linestyle() != "None" and len({*values}) > 1 and {*values} <= {*of_value.index}:
            assert set.intersection(*of_value[values]), (line.get_label(), values)
            joined += 1
    assert joined


def test_a_published_value_stands_at_its_own_epoch():
    """Table 1, 1 %: beside the curves at epoch 200, whatever the length of ours, on the same axis, none over another."""
    values = {"CIFAR-10": (51.67, 44.06, 40.67), "Fashion-MNIST": (81.62, 77.84, 80.2), "MNIST": (94.65, 79.42, 88.41)}
    seen = 0
    for ax in replay("01").figures["accuracy_vs_epochs"].axes:
        if ", 1 %" not in ax.get_title().replace("\n", " "):
            continue
        (strip,) = ax.child_axes
        hollow = {line.get_ydata()[0]: line.get_xdata()[0] for at in (ax, strip) for line in at.lines
                  if line.get_markerfacecolor() == "white"}  # fmt: skip
        own = next(v for k, v in values.items() if ax.get_title().startswith(k))
        assert {*hollow} == {*own} and {*hollow.values()} == {199.6, 200, 200.4}
        assert strip.get_xticks().tolist() == [200] and strip.get_ylim() == ax.get_ylim()
        seen += 1
    assert seen == 3


def test_a_choice_by_validation_says_what_it_gave_on_test():
    """Typed numbers: the best on validation is last on test for scarce labels, first for many."""
    columns = ["labels", "w", "scored", "mean", "se", "n"]
    rows = [(1.0, 0.25, "val", 60, 1, 3), (1.0, 0.5, "val", 70, 1, 3), (0.1, 0.25, "val", 50, 1, 3),
            (0.1, 0.5, "val", 52, 1, 3), (1.0, 0.25, "test", 61, 2, 3), (1.0, 0.5, "test", 71, 3, 3),
            (0.1, 0.25, "test", 55, 2, 3), (0.1, 0.5, "test", 44, 4, 2)]  # fmt: skip
    says = frames.by_validation(pd.DataFrame(rows, columns=columns), "w")
    many, scarce = says.to_numpy().tolist()
    assert many == [1.0, 0.5, 70, 71, 3, 3, "1 of 2", 0.5, 71] and scarce == [0.1, 0.5, 52, 44, 4, 2, "2 of 2", 0.25, 55]
    assert list(says) == ["labels", "chosen", "validation", "test", "se", "n", "rank", "best", "best_test"]


def test_the_published_sweep_chose_the_w_that_is_last_on_test():
    table = frames.summary(frames.evaluations(store.recorded(experiments.w_sweep("laptop")[1])))
    inside = table[(table["method"] == "sidae") & (table["target"] == "standardised, mean")]
    scarce = frames.by_validation(inside, "w").set_index("labels").loc[0.01]
    assert scarce["chosen"] == experiments.best_w("laptop") == 0.5
    assert (scarce["rank"], scarce["best"], scarce["n"]) == ("3 of 3", 0.25, 3)


def lab(colour: str) -> np.ndarray:
    """CIE L*a*b* of an sRGB colour, D65."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(to_xyz @ linear / [0.9505, 1, 1.089])  # no colour here is so dark that its foot matters
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_what_is_no_method_has_no_methods_colour():
    methods_ = {colour.lower() for colour in methods.COLOURS.values()}
    others = [*figures.SHARES, *figures.PARTS.values(), *figures.CLASSES, figures.INK]
    assert len({c.lower() for c in others}) == len(others) and not methods_ & {c.lower() for c in others}
    for colour in (*figures.SHARES, *figures.PARTS.values()):  # far from every method's
        assert min(np.linalg.norm(lab(colour) - lab(m)) for m in methods_) > 25, colour
    for palette in (figures.SHARES, [*figures.PARTS.values()]):  # and apart in lightness, which every eye sees
        lightness = sorted(lab(c)[0] for c in palette)
        assert min(b - a for a, b in zip(lightness, lightness[1:])) > 15, palette


def test_no_code_of_a_figure_writes_a_methods_colour():
    """They are written once, in COLOURS; whoever needs one asks for the method's."""
    sources = [paths.ROOT / "sidae_lib" / "figures.py", *(paths.ROOT / "notebooks").glob("*.ipynb")]
    for source in sources:
        text = re.sub(r"\nCOLOURS = \{.*?\}\n", "\n", source.read_text(), flags=re.S)
        text = re.sub(r'"image/png": "[^"]*"', "", text)
        found = {c.lower() for c in re.findall(r"#[0-9a-fA-F]{6}\b", text)}
        assert not found & {c.lower() for c in methods.COLOURS.values()}, source.name


@pytest.mark.parametrize("name", ["w_sweep", "structure"])
def test_artists_of_other_meanings_have_no_methods_colour(name):
    """A figure whose marks are shares of the labels, targets or parts of the network."""
    if name == "w_sweep":
        fig = replay("02").figures[name]
    else:
        fig = diagrams.structure(diagrams.layers(experiments.sidae_step_by_step("smoke")[0][0]))
    drawn = {to_hex(line.get_color()) for ax in fig.axes for line in ax.lines}
    drawn |= {to_hex(bar.get_facecolor()) for ax in fig.axes for bar in ax.patches}
    assert len(drawn) > 1 and not drawn & {c.lower() for c in methods.COLOURS.values()}


def test_times_of_different_machines_are_not_compared():
    """The cost's axis is arithmetic; seconds stand in the table, of one machine, which the row names."""
    drawn = replay("09")
    (ax,) = drawn.figures["five_axes_cost"].axes
    assert "GFLOP" in ax.get_xlabel() and "second" not in ax.get_xlabel()
    side = pd.read_csv(io.StringIO(drawn.tables["five_axes_cost"]))
    marks = {round(float(x), 6) for line in ax.lines for x in line.get_xdata()}
    assert {*side["gflop"].round(6)} <= marks


def test_what_pairs_add_holds_the_test_images():
    """Of the published records: by seed the same differences, and an interval that is never narrower than that of seeds."""
    asked = experiments.semantic_pairs("laptop", ["cifar10"])[1]
    own = [e for e in asked if e.kind == "logistic" and not e.data and e.run.method == "sidae" and e.epoch == e.run.epochs]
    records = store.recorded(own)
    gains = frames.pair_gains(records).set_index("pairs")
    by = {(r["config"]["run"].get("pairs", "none"), r["config"]["run"].get("seed", 0)): r["accuracy"] for r in records}
    d = np.array([by["mined", s] - by["none", s] for s in range(3)])
    half = 4.30265 * d.std(ddof=1) / 3**0.5
    mined = gains.loc["mined"]
    assert mined["gain"] == pytest.approx(d.mean()) and mined["n"] == 3
    assert half < mined["high"] - mined["gain"] < np.hypot(half, 1.96 * 100 * (2 * 0.25 / 10_000) ** 0.5)
    assert mined["high"] - mined["gain"] == pytest.approx(mined["gain"] - mined["low"])


@pytest.mark.parametrize("seeds, images, says", [
    ([2.0, 2.1, 1.9], 0.0, "+2.00 points (95 % interval +1.75 to +2.25, n = 3): above"),
    ([2.0, 2.1, 1.9], 2.0, "+2.00 points (95 % interval -1.93 to +5.93, n = 3): not told apart"),
    ([-2.0, -2.1, -1.9], 0.0, "-2.00 points (95 % interval -2.25 to -1.75, n = 3): below"),
    ([9.0], 0.0, "+9.00 points (no interval from one seed, n = 1): not judged, too few seeds"),
])  # fmt: skip
def test_a_difference_in_words(seeds, images, says):
    assert frames.told(differences.Difference(pd.Series(seeds), images)) == says
