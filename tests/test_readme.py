"""The README, and the book's front page and Running it, say what the records and the code say."""

import re

import pandas as pd
import pytest
from replay import page

from sidae_lib import claims, differences, experiments, frames, methods, paths, recorded, scales, store

TEXT = (paths.ROOT / "README.md").read_text()
RUNNING = (paths.ROOT / "book" / "running.md").read_text()
IMAGES = "CIFAR-10 (JPEG copy)"


@pytest.fixture(scope="module", autouse=True)
def published_alone(tmp_path_factory):
    """No run of whoever tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDAE_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


def rows(table: str) -> list[list[str]]:
    """Cells of a table in Markdown, without its head."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")][2:]


def test_its_tables_are_those_of_the_records():
    assert page("readme").readme(TEXT) == TEXT, "run `python book/readme.py`"
    assert TEXT.count("\n") <= 110


def test_its_results_are_the_means_of_the_published_records():
    """By another way than the command: straight from the JSON."""
    table = TEXT.partition("<!-- results -->\n")[2].partition("\n<!--")[0]
    head = [c.strip() for c in table.splitlines()[0].strip("|").split("|")]
    cells = [(row[0], row[1], name, cell, row[-1]) for row in rows(table) for name, cell in zip(head[2:-1], row[2:-1])]
    assert len(cells) == 5 * 6
    names = {v: k for k, v in methods.NAMES.items()}
    published = list(store.every("evaluation", store.published()))
    for display, share, method, cell, says in cells:
        share, mean, (n, scale) = share.split()[0], cell.split()[0], says.split(", ")
        n = cell.partition("n = ")[2] or n  # a cell of another n than the row's says so
        accuracies = [
            r["accuracy"] for r in published
            if r["data"]["display"] == display and r["config"].get("labels", 1.0) == float(share) / 100
            and r["config"]["run"]["method"] == names[method] and r["kind"] in ("linear", "classifier")
            and r["epoch"] == r["config"]["run"].get("epochs", 200) and r["config"].get("score_on", "test") == "test"
            and (method != "Supervised" or r["config"]["run"].get("augment") == "none")
            and not {"w", "target", "split", "pairs"} & r["config"]["run"].keys() and "data" not in r["config"]
            and r["config"]["run"].get("width", 64) == {"laptop": 16, "paper": 64}[scale]
            and r["config"]["run"].get("seed", 0) < {"laptop": 3, "paper": 5}[scale]  # more belong to other figures
        ]  # fmt: skip
        assert len(accuracies) == int(n) and round(sum(accuracies) / len(accuracies), 2) == float(mean)


SAYS = {  # a sentence of the README -> true exactly if it holds
    "SidAE and the autoencoder end clearly above the untrained network in every row. SimSiam does so only on CIFAR-10.":
        "all(low(m, 'untrained', case) > 0 for m in ('sidae', 'dae') for case in mean) and "
        "all((low('simsiam', 'untrained', case) > 0) == (case[0] == IMAGES) for case in mean)",
    "On CIFAR-10, at the paper's scale, SidAE has the highest mean, as in the paper. Its lead over SimSiam is smaller than the "
    "paper's, and two seeds are too few to decide it.":
        "all(first(mean[IMAGES, share]) and first(paper[share]) and 0 < lead(mean[IMAGES, share]) < lead(paper[share]) "
        "for share in (1.0, 0.01)) and scale[IMAGES] == 'paper' and seeds == 2 < claims.SEEDS",
    "At laptop scale it is undecided whether SidAE beats its two parts, SimSiam and the autoencoder.":
        "verdict['SidAE beats SimSiam and the autoencoder'] == 'undecided'",
    "With many labels (10 % or 100 %) the supervised network is better than all three methods on every set.":
        "{case[1] for case in mean} == {0.01, 0.1, 1.0} and "
        "all(mean[case]['supervised'] > max(mean[case][m] for m in scales.SSL) for case in mean if case[1] > 0.01) and "
        "verdict['with many labels frozen features do not beat the supervised network'].startswith('supported')",
    "With 1 % of the labels each of the three methods, judged alone, beats the supervised network on CIFAR-10 after 25 epochs, "
    "as the paper says. On MNIST and Fashion-MNIST SidAE does not. There the paper says that it is better, with few and many "
    "labels.":
        "early['scale'].tolist() == ['paper'] * 3 and early['n'].min() >= 3 and {*early['verdict']} == {'supported'} and "
        "all((mean[c]['sidae'] > mean[c]['supervised']) == (c[0] == IMAGES) for c in mean if c[1] == 0.01) and "
        "verdict['on MNIST and Fashion-MNIST SidAE beats the supervised network'] == 'contradicted'",
    "CIFAR-10 (a JPEG copy) at the paper's own scale, the other sets at *laptop* scale.":
        "scale == {IMAGES: 'paper', 'MNIST': 'laptop', 'Fashion-MNIST': 'laptop'}",
    "There the network is a quarter as wide and sees a tenth of the images, in far fewer steps.":
        "{4 * r.width for r in laptop} == {64} and {10 * r.pool for r in laptop} == {50_000, 60_000} and "
        "all(5 * r.epochs * r.pool / r.batch < 200 * 50_000 / 512 for r in laptop)",
}  # fmt: skip


@pytest.fixture(scope="module")
def known() -> dict:
    """What the sentences speak of: the last checkpoints of the main figure, the paper's numbers, the verdicts."""
    frame = frames.evaluations(recorded.best("accuracy_vs_epochs")[1])
    probed = frame["kind"].isin(["linear", "classifier"]) & ((frame["method"] != "supervised") | (frame["augment"] == "none"))
    last = frame[(frame["epoch"] == frame["of"]) & probed]
    case = {case: part for case, part in last.groupby(["display", "labels"])}
    published = claims.table(source="Table 1", protocol=claims.PROBE, pretrain_data="cifar10", data="cifar10")
    board = claims.scoreboard(recorded.evaluations("laptop"), "laptop")
    lead = lambda means: means["sidae"] - means["simsiam"]  # noqa: E731
    return globals() | {
        "mean": {c: part.groupby("method")["accuracy"].mean() for c, part in case.items()},
        "low": lambda one, other, c: differences.difference(case[c], {"method": one}, {"method": other}).interval()[1],
        "paper": {share: part.set_index("method")["value"] for share, part in published.groupby("labels")},
        "lead": lead, "first": lambda means: means["sidae"] == means[list(scales.SSL)].max(),
        "scale": last.groupby("display")["scale"].first().to_dict(),
        "seeds": last[(last["display"] == IMAGES) & (last["method"] == "sidae")]["seed"].nunique(),
        "verdict": claims.claims(board).set_index("statement")["verdict"],
        "early": recorded.claimed("accuracy_vs_epochs").query(
            "statement.str.contains('first checkpoint already') and case.str.startswith('CIFAR-10')"),
        "laptop": [r for r in experiments.accuracy_vs_epochs("laptop")[0] if r.method in scales.SSL],
    }  # fmt: skip


@pytest.mark.parametrize("sentence", SAYS)
def test_what_it_says_is_so(known, sentence):
    assert sentence in " ".join(TEXT.split()) and eval(SAYS[sentence], known)


def test_minutes_are_the_batch_runs():
    """Of all scales in the book; of quick in the README too, and they are ten at most, as is said."""
    files = list(paths.figures("").glob("*/timings.csv"))
    made = page("running").made("recorded")["minutes"]
    for t in pd.concat(map(pd.read_csv, files)).itertuples():
        assert f"(chapters/{t.notebook}.ipynb) | {t.seconds / 60:.1f} |" in made and t.hardware in made
    quick = pd.read_csv(paths.figures("quick") / "timings.csv")
    for t in quick.itertuples():
        assert re.search(rf"\(notebooks/{t.notebook}\.ipynb\) \|.*\| {t.seconds / 60:.1f} \|", TEXT)
    assert quick["seconds"].sum() <= 600 and len(quick) == len(list(paths.ROOT.glob("notebooks/*.ipynb")))


def test_scales_are_those_of_the_code():
    said = {row[0].strip("`"): row[1:] for row in rows(page("running").made("recorded")["scales"])}
    assert said["quick"] == ["MNIST (5,000 digits)", "ResNet-18, width 16", "all 4,000", "12", "4"]
    for name, (*_, epochs, seeds) in said.items():
        asked = experiments.accuracy_vs_epochs(name)[0]
        assert {*epochs.split(" / ")} == {str(r.epochs) for r in asked if r.method == "sidae"}
        assert int(seeds) == len({r.seed for r in asked})


@pytest.mark.parametrize("text", [TEXT, RUNNING], ids=["README", "running"])
def test_links_images_and_keys_are_there(text):
    for link in re.findall(r"\]\(([^)h][^)]*)\)", text):
        file, _, part = link.partition("#")
        folder = paths.ROOT / ("book" * (text is RUNNING))
        there = (folder / file.replace("chapters/", "../notebooks/")).resolve()
        assert there.exists(), link
        assert not part or part in [re.sub(r"\W+", "-", h.lower()) for h in re.findall("^#+ (.*)", there.read_text(), re.M)]
    for key in re.findall(r"verify (\w+)", text):
        assert key in {r["key"] for r in store.every("run", store.published())}


def test_the_front_page_says_who_is_first(known):
    made = page("index").made("recorded")
    said = rows(made["answer"])
    assert {(row[0], row[-1]) for row in said} == {*known["scale"].items()} and len(said) == len(known["mean"])
    for display, share, *cells, n, scale in said:
        means = known["mean"][display, float(share.split()[0]) / 100][list(scales.SSL)]
        assert [c.strip("*") for c in cells] == [f"{m:.1f}" for m in means]
        assert [c[0] == "*" for c in cells] == [m == means.max() for m in means]
        assert int(n) == 2 + (scale == "laptop")
    leads = {s: [k for k, means in known["mean"].items() if known["scale"][k[0]] == s and known["first"](means)] for s in
             ("paper", "laptop")}  # fmt: skip
    assert (f"in {len(leads['paper'])} of 2 cases at paper scale and in {len(leads['laptop'])} of 4 cases at laptop" in
            made["answer"] and "autoencoder is **undecided**" in made["answer"])  # fmt: skip
    assert "H100" in made["made_with"] and "](../figures/recorded/accuracy_vs_epochs.png)" in made["main_figure"]


def test_the_front_page_of_a_run(monkeypatch, tmp_path):
    """Its own figure, numbers and weaknesses; where it recorded nothing, the best on record."""
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "accuracy_vs_epochs.png").touch()
    monkeypatch.setenv("SIDAE_FIGURES", str(tmp_path))
    made = page("index").made("quick")
    assert f"{tmp_path.name}/quick/accuracy_vs_epochs.png" in made["main_figure"]
    found = recorded.evaluations("quick")["accuracy_vs_epochs"]
    assert {row[0] for row in rows(made["answer"])} == {"MNIST (5,000 digits)"}
    assert f"- {frames.found(found)}." in made["answer"] and "lies below the untrained network" in made["answer"]
    monkeypatch.setattr(index := page("index"), "evaluations", lambda scale: {})
    assert index.made("quick")["answer"] == index.made("recorded")["answer"]


def test_the_example_runs(own_store):
    """The block under "Change something", at smoke scale."""
    [code] = [c for c in re.findall(r"```python\n(.*?)```", RUNNING, re.S) if "SLURM" not in c]
    exec(compile(code.replace('"quick"', '"smoke"'), "running.md", "exec"), {})
