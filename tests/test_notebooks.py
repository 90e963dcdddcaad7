"""The notebooks as they are committed: parameters, outline, outputs; and that validation notices a changed default."""

import ast
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import papermill
import pytest
import torch
import torch.nn.functional as F
from nbval.plugin import find_comment_markers

from sidae_lib import experiments, figures, losses, methods, store

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def checked(cell: nbformat.NotebookNode) -> bool:
    return ("check", True) in list(find_comment_markers(cell.source))


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(o.text if o.output_type == "stream" else o.data.get("text/plain", "") for o in cell.outputs)


def test_every_figure_has_one_notebook():
    assert [p.stem.split("_", 1)[1] for p in NOTEBOOKS] == list(experiments.FIGURES)


@each
def test_parameters_are_typed_literals_at_smoke_scale(path):
    first = code(path)[0]
    assert first.metadata["tags"] == ["parameters"]
    declared = papermill.inspect_notebook(path)
    assert {"scale", "seeds", "device", "minutes"} <= set(declared)
    for line, assignment in zip(first.source.splitlines(), ast.parse(first.source).body, strict=True):
        parameter = declared.pop(assignment.target.id)
        value = ast.literal_eval(assignment.value)
        assert type(value).__name__ == assignment.annotation.id == parameter["inferred_type_name"], line
        assert parameter["help"], f"no help: {line}"
        assert assignment.target.id != "scale" or value == "smoke"
    assert not declared


@each
def test_cells_are_short(path):
    for cell in code(path):
        lines = cell.source.splitlines()
        assert len(lines) <= 15 and max(map(len, lines)) <= 88, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 5, cell.source


@each
def test_headings_are_an_outline(path):
    text = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.M)]
    assert text.startswith("# ") and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


@each
def test_it_is_committed_as_one_run_from_the_top(path):
    cells = code(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert "execution" not in cell.metadata, "times of day"
        for out in cell.outputs:
            assert out.output_type != "error" and out.get("name") != "stderr", cell.source
            assert "application/vnd.jupyter.widget-view+json" not in out.get("data", {}), "a stale progress bar"
            assert "image/png" not in out.get("data", {}) or cell.metadata.get("alt"), f"no alt text: {cell.source}"
        text = printed(cell)
        assert not re.search(r"(?<![\w.<])(/[\w.-]+){2,}|\b[A-Z]:\\", text), f"a path of one machine: {text}"
        assert not re.search(r"\b\d\d:\d\d:\d\d\b|\b0x[0-9a-f]{6,}", text), f"a time or an address: {text}"


@each
def test_validation_compares_the_run_keys_and_no_accuracy(path):
    """nbval compares only cells with the marker, never images, and passes over a cell that was not executed."""
    compared = [c for c in code(path) if checked(c)]
    assert compared and all("NBVAL" not in c.source for c in code(path) if c not in compared)
    assert all(o.output_type == "stream" for c in compared for o in c.outputs)
    text = "".join(map(printed, compared))
    runs, _ = experiments.FIGURES[path.stem.split("_", 1)[1]]("smoke")
    assert runs and all(r.key() in text for r in runs)
    text = re.sub(r"\nloss +default\n", "\n", text)  # the field of a config, in notebook 00
    assert "accuracy" not in text and "loss" not in text


def validate(folder: Path, notebooks: list[Path], edit: tuple[str, str, str] | None) -> str:
    """nbval on a copy of library and notebooks, down to the cell that prints the keys, after one edit of the library: what
    it said."""
    shutil.copytree(ROOT / "sidae_lib", folder / "sidae_lib", ignore=shutil.ignore_patterns("__pycache__"))
    if edit:
        module, old, new = edit
        source = (folder / "sidae_lib" / module).read_text()
        assert source.count(old) == 1
        (folder / "sidae_lib" / module).write_text(source.replace(old, new))
    (folder / "notebooks").mkdir()
    for notebook in notebooks:
        nb = nbformat.read(notebook, as_version=4)
        nb.cells = nb.cells[: 1 + next(i for i, c in enumerate(nb.cells) if c.cell_type == "code" and checked(c))]
        nbformat.write(nb, folder / "notebooks" / notebook.name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env",
               "--nbval-cell-timeout=300", "--rootdir=.", "notebooks"]
    return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True,
                          text=True, timeout=300).stdout


@pytest.mark.slow
@pytest.mark.parametrize("notebooks, edit", [
    ([0, 1], None),
    ([0, 1], ("scales.py", '"pred_hidden": 16', '"pred_hidden": 17')),
    ([0], ("config.py", "lr: float = 0.03 ", "lr: float = 0.04 ")),  # not in the key, by design: the whole config is shown
])
def test_validation_fails_on_a_changed_default_alone(tmp_path, notebooks, edit):
    said = validate(tmp_path, [NOTEBOOKS[n] for n in notebooks], edit)
    assert ("Cell outputs differ" in said) == (f"{len(notebooks)} failed" in said) == bool(edit) and " passed" in said, said


@pytest.mark.slow
def test_two_kernels_train_each_run_once_and_more_seeds_reach_the_figure(own_store):
    """Through papermill, as a batch run does it: two readers at once, then one who reads what they have recorded."""
    notebook = ROOT / "notebooks" / "01_accuracy_vs_epochs.ipynb"

    def execute(name: str, seeds: list[int]) -> str:
        parameters = {"datasets": ["digits"], "seeds": seeds, "device": "cpu"}
        out = papermill.execute_notebook(notebook, own_store / f"{name}.ipynb", parameters, kernel_name="python3",
                                         cwd=own_store, progress_bar=False)  # fmt: skip
        return "".join(printed(c) for c in out.cells if "outputs" in c)

    def table() -> pd.DataFrame:
        return pd.read_csv(own_store / "figures" / "smoke" / "accuracy_vs_epochs.csv")

    with ThreadPoolExecutor() as pool:
        both = "\n".join(pool.map(execute, ("one", "other"), ([0], [0])))
    trained = re.findall(r"trained \w+ (\w{16}) in", both)
    assert sorted(trained) == sorted(r["key"] for r in store.every("run"))
    assert both.count("records are computed now") == 2
    one = table()
    assert "54 records are computed now, 54 are read" in execute("more", [0, 1])
    two = table()
    assert set(one["n"]) == {1} and one["se"].isna().all()
    assert set(two["n"]) == {2} and two["se"].notna().all() and len(two) == len(one)
    assert not one["mean"].equals(two["mean"])


@each
def test_every_parameter_is_read(path):
    """And what chooses runs reaches the figure's function, as it is: at smoke scale a default would look the same."""
    first, *rest = code(path)
    declared = {line.target.id for line in ast.parse(first.source).body}
    nodes = [node for cell in rest for node in ast.walk(ast.parse(cell.source))]
    assert declared <= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    function = f"experiments.{path.stem.split('_', 1)[1]}"
    call = next(n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == function)
    assert ast.unparse(call.args[0]) == "scale"
    assert {"datasets", "seeds", "protocols"} & declared <= {n.id for n in ast.walk(call) if isinstance(n, ast.Name)}


def cell(number: int, holds: str, **scope) -> dict:
    """The names that a notebook's cell leaves behind when it is run by itself, among these."""
    exec(next(c.source for c in code(NOTEBOOKS[number]) if holds in c.source), scope)
    return scope


def test_the_walk_stops_the_gradient_where_the_library_does():
    """Notebook 00 compares values, which are the same without."""
    p1, p2, z1, z2 = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    typed = cell(0, "def distance", F=F, p1=p1, p2=p2, z1=z1, z2=z2)["l_si"]
    library = (losses.neg_cosine(p1, z2) + losses.neg_cosine(p2, z1)) / 2
    for one, other in zip(*(torch.autograd.grad(v, (p1, p2, z1, z2), allow_unused=True) for v in (typed, library))):
        assert one is other is None or torch.allclose(one, other)


def test_the_reports_chart_shows_our_means():
    """Notebook 07's marks and lines, where numbers, errors and the report's own numbers are told apart."""
    shown = cell(7, "def dots", figures=figures, methods=methods, VIEWS={"none": "none", "report_simclr": "SimCLR's"})
    own = pd.DataFrame({"augment": ["report_simclr", "none"], "mean": [60.0, 50.0], "se": [1.0, 2.0], "published": [70, 80]})
    ax = plt.figure().subplots()
    shown["dots"](ax, own, "o", "", 0.1)
    shown["line"](ax, own, "", "--", 0.0)
    marks, level = ax.lines
    assert marks.get_xydata().tolist() == [[1.1, 60], [0.1, 50]] and level.get_ydata()[0] == 60
    assert [bar.tolist() for bar in ax.containers[0][2][0].get_segments()] == [[[1.1, 59], [1.1, 61]], [[0.1, 48], [0.1, 52]]]


def test_what_a_histogram_draws_adds_up_to_its_pairs():
    """Notebook 07, of the published numbers: the heights of the bars that are drawn, read back from their outline."""
    hist = pd.read_csv(ROOT / "figures" / "laptop" / "pairwise_vs_triplet_pairs.csv")
    steps = cell(7, "def steps", COLOURS=methods.COLOURS)["steps"]
    for _, rows in hist.groupby("panel"):
        ax = plt.figure().subplots()
        steps(ax, rows)
        plt.close(ax.figure)
        (panel,) = {tuple(sorted(set(rows["classes"])))}
        assert tuple(sorted(patch.get_label() for patch in ax.patches)) == panel == ("different class", "same class")
        for patch in ax.patches:
            own = rows[rows["classes"] == patch.get_label()]
            heights = [patch.get_path().vertices[patch.get_path().vertices[:, 0] == x, 1].max() for x in own["to"]]
            values, edges, _ = patch.get_data()
            assert sum(values) == pytest.approx(1) and edges.tolist() == [own["from"].iloc[0], *own["to"]]
            assert heights[-1] == pytest.approx(own["share"].iloc[-1])  # the last bar reaches the last edge
    last = hist[hist["panel"].str.contains("MNIST\npairwise: cosine", regex=False)].groupby("classes")["share"].last()
    assert last.round(2).to_dict() == {"different class": 0.69, "same class": 0.79}
