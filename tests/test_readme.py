"""The README says what the records say."""

import re

import pandas as pd

from sidae_lib import methods, paths, store
from sidae_lib.__main__ import readme

TEXT = (paths.ROOT / "README.md").read_text()


def test_its_tables_are_those_of_the_records():
    assert readme(TEXT) == TEXT, "run `python -m sidae_lib readme`"


def test_its_results_are_the_means_of_the_published_records():
    """By another way than the command: straight from the JSON."""
    head, _, *rows = [[c.strip() for c in line.strip("|").split("|")]
                      for line in TEXT.partition("<!-- results -->\n")[2].partition("\n<!--")[0].splitlines()]
    cells = [(row[0], row[1], name, cell, row[-1]) for row in rows for name, cell in zip(head[2:-1], row[2:-1]) if cell]
    assert len(cells) >= 30
    names = {v: k for k, v in methods.NAMES.items()} | {"Supervised, augmented": "supervised"}
    published = list(store.every("evaluation", store.published()))
    for display, share, method, cell, says in cells:
        share, mean, (n, scale) = share.split()[0], cell.split()[0], says.split(", ")[:2]
        n = cell.partition("n = ")[2] or n  # a cell of another n than the row's says so
        accuracies = [
            r["accuracy"] for r in published
            if r["data"]["display"] == display and r["config"].get("labels", 1.0) == float(share) / 100
            and r["config"]["run"]["method"] == names[method] and r["kind"] in ("linear", "classifier")
            and r["epoch"] == r["config"]["run"].get("epochs", 200) and r["config"].get("score_on", "test") == "test"
            and (method[:4] != "Supe" or (r["config"]["run"].get("augment") != "none") == ("augmented" in method))
            and not {"w", "target", "split", "pairs"} & r["config"]["run"].keys() and "data" not in r["config"]
            and r["config"]["run"].get("width", 64) == {"quick": 16, "laptop": 16, "paper": 64}[scale]
            and r["config"]["run"].get("seed", 0) < {"quick": 3, "laptop": 3, "paper": 5}[scale]  # more belong to other figures
        ]  # fmt: skip
        assert len(accuracies) == int(n) and round(sum(accuracies) / len(accuracies), 2) == float(mean)


def test_its_minutes_are_the_batch_runs():
    for path in paths.figures("").glob("*/timings.csv"):
        for t in pd.read_csv(path).itertuples():
            assert f"| {t.notebook} | {path.parent.name} | {t.seconds / 60:.1f} |" in TEXT


def test_its_links_and_images_are_there():
    for link in re.findall(r"\]\(([^)h][^)]*)\)", TEXT):
        assert (paths.ROOT / link).exists(), link


def test_its_example_runs(own_store):
    """The block under "Change something", at smoke scale."""
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1].replace('"quick"', '"smoke"')
    exec(compile(code, "README", "exec"), {})
