"""The notebooks as they are committed: parameters, outline, length, outputs, links; and that validation notices a changed
number. What their texts say is read in test_lecture.py."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
import torch.nn.functional as F
from replay import NOTEBOOKS, ROOT, cells, replay

from sidae_lib import adoption, experiments, losses, paths, store
from sidae_lib.config import SidaeError

spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
ORDER = "00 01 02 03 04 05 06 07 11 08 12 09 10".split()  # as a reader goes through them


def name(path: Path) -> str:
    return path.stem.split("_", 1)[1]


def text(path: Path) -> str:
    return "\n\n".join(c.source for c in cells(path, "markdown"))


def shown(cell: nbformat.NotebookNode) -> str:
    """All that a reader sees of a cell's output as text."""
    return "\n".join(o.text if o.output_type == "stream" else "\n".join(
        v for k, v in o.data.items() if k in ("text/html", "text/markdown") or k == "text/plain" and len(o.data) == 1)
        for o in cell.outputs)  # fmt: skip


def test_every_figure_has_one_notebook():
    assert [name(p) for p in NOTEBOOKS] == list(experiments.FIGURES)
    assert sorted(ORDER) == [p.stem[:2] for p in NOTEBOOKS]


@each
def test_parameters_are_typed_literals_at_the_best_on_record(path):
    first = cells(path)[0]
    assert first.metadata["tags"] == ["parameters"]
    declared = papermill.inspect_notebook(path)
    assert {"scale", "seeds", "device", "minutes"} <= set(declared)
    for line, assignment in zip(first.source.splitlines(), ast.parse(first.source).body, strict=True):
        parameter = declared.pop(assignment.target.id)
        value = ast.literal_eval(assignment.value)
        assert type(value).__name__ == assignment.annotation.id == parameter["inferred_type_name"], line
        assert parameter["help"], f"no help: {line}"
        assert assignment.target.id != "scale" or value == "recorded"
    assert not declared


@each
def test_cells_are_short(path):
    for cell in cells(path):
        lines = cell.source.splitlines()
        assert len(lines) <= 15 and max(map(len, lines)) <= 88, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 5, cell.source


@each
def test_it_reads_like_a_lecture(path):
    """A question, one equation, figures, a verdict, what differs, something to try, an end; and not too long."""
    said = text(path)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", said, re.M)]
    assert re.match(r"# .*\?\n", said) and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    words = len(re.sub(r"\]\([^)]*\)", "]", said).split())
    assert words <= (1200 if path.stem[:2] == "00" else 700), words
    assert len(re.findall(r"\$\$.+?\$\$", said, re.S)) == 1
    parts = dict(re.findall(r"^## (.*)\n(.*(?:\n(?!## ).*)*)", said, re.M))
    assert {"The verdict", "Try it", "Conclusion"} <= parts.keys()
    differs = next(body for title, body in parts.items() if title.startswith("Where this differs"))
    assert 1 <= differs.count("\n- ") <= 3 and "**References.**" in parts["Conclusion"]
    (verdict,) = (c for c in cells(path) if c.metadata.get("tags") == ["verdict"])
    assert 0 < len(shown(verdict).split()) <= 120
    place = ORDER.index(path.stem[:2])
    links = re.findall(r"\]\((\d\d)_\w+\.ipynb\)", said.splitlines()[-1])
    assert links == [n for k in (place - 1, place + 1) if 0 <= k < len(ORDER) for n in [ORDER[k]]]


@each
def test_links_to_the_code_lead_to_its_line(path):
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)", text(path))
    assert links, "no link to the code"
    for symbol, file, line in links:
        source = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {symbol.split('.')[-1]}\b", source), (
            f"{symbol} is not at {file}#L{line}; run `python notebooks/execute.py --links`")


@each
def test_it_is_committed_as_one_run_from_the_top(path):
    code = cells(path)
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert "execution" not in cell.metadata, "times of day"
        for out in cell.outputs:
            assert out.output_type != "error" and out.get("name") != "stderr", cell.source
            assert "application/vnd.jupyter.widget-view+json" not in out.get("data", {}), "a widget without its kernel"
            assert "image/png" not in out.get("data", {}) or cell.metadata.get("alt"), f"no alt text: {cell.source}"
        said = shown(cell)
        assert not re.search(r"(?<![\w.<])(/[\w.-]+){2,}|\b[A-Z]:\\", re.sub(r"<[^>]*>", "", said)), f"a path: {said}"
        assert not re.search(r"\b\d\d:\d\d:\d\d\b|\b0x[0-9a-f]{6,}", said), f"a time or an address: {said}"
        assert not re.search(r"\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{16}\b", said), f"the hash of a key: {said}"
        assert not re.search(r"\b(nan|NaN|None, None|trained \w+ in)\b", said), f"a row without a value, or a log: {said}"


@each
def test_validation_compares_all_but_what_is_trained_inline_or_is_a_widget(path):
    for cell in cells(path):
        if "NBVAL" in cell.source:
            assert cell.source.startswith("# NBVAL_IGNORE_OUTPUT\n")
            assert path.stem[:2] in ("00", "09", "10") or "@figures.touch" in cell.source


@each
def test_every_figure_is_saved_and_every_saved_one_stands_in_a_notebook(path):
    folder = ROOT / "figures" / "recorded"
    of = {p: {n for c in cells(p) for n in re.findall(r'figures\.save\([^"]*f?"(\w+)', c.source)} for p in NOTEBOOKS}
    assert of[path]
    for stem in of[path]:
        there = {p.suffix for p in folder.glob(f"{stem}*")}
        assert {".png", ".csv"} <= there, stem
    known = set.union(*of.values())
    assert all(any(file.stem.startswith(stem) for stem in known) for file in folder.glob("*.csv")
               if file.stem not in ("scoreboard", "timings"))  # fmt: skip


@each
def test_every_parameter_is_read(path):
    """And what chooses runs reaches the figure's function, as it is: at one scale a default would look the same."""
    first, *rest = cells(path)
    declared = {line.target.id for line in ast.parse(first.source).body}
    nodes = [node for cell in rest for node in ast.walk(ast.parse(cell.source))]
    assert declared <= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    call = next(n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "recorded.fetch"
                and ast.literal_eval(n.args[0]) == name(path))  # fmt: skip
    assert ast.unparse(call.args[1]) in ("scale", "length")
    read = {n.id for n in ast.walk(call) if isinstance(n, ast.Name)}
    assert {"datasets", "seeds", "protocols", "device", "minutes"} & declared <= read


def validate(folder: Path, edit: bool) -> str:
    """nbval on a copy of notebook 05 with the published records, one accuracy of which may have changed: what it said."""
    (folder / "notebooks").mkdir()
    shutil.copytree(ROOT / "records", folder / "records")
    shutil.copy(next(p for p in NOTEBOOKS if p.stem.startswith("05")), folder / "notebooks")
    shutil.copy(ROOT / "conftest.py", folder)
    if edit:
        asked = experiments.stl_transfer("laptop")[1]
        e = next(e for e in asked if e.kind == "linear" and e.run.method == "sidae" and e.epoch == e.run.epochs)
        file = Path(store.published()[e.run.key(), e.key()].file)
        lines = store.content(file).decode().split("\n")
        k = next(k for k, line in enumerate(lines) if line.startswith(f'{{"key":"{e.key()}"'))
        record = json.loads(lines[k])
        lines[k] = store.as_line(record | {"accuracy": record["accuracy"] + 1})
        (folder / "records" / file.name).write_bytes(adoption.packed("\n".join(lines).encode()))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", "notebooks"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SIDAE_RECORDS": str(folder / "records")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.slow
@pytest.mark.parametrize("edit", [False, True])
def test_validation_fails_on_a_changed_number_alone(tmp_path, edit):
    said = validate(tmp_path, edit)
    assert ("Cell outputs differ" in said) == (" failed" in said) == edit and " passed" in said, said


@pytest.mark.slow
def test_more_seeds_reach_the_figure_and_are_trained_once(own_store):
    """Through papermill, as a batch run does it."""
    import pandas as pd

    notebook = next(p for p in NOTEBOOKS if p.stem.startswith("01"))

    def execute(seeds: list[int]) -> pd.DataFrame:
        papermill.execute_notebook(notebook, own_store / "out.ipynb", {
            "scale": "smoke", "datasets": ["digits"], "seeds": seeds, "device": "cpu"}, kernel_name="python3",
            cwd=own_store, progress_bar=False)  # fmt: skip
        return pd.read_csv(paths.figures("smoke") / "accuracy_vs_epochs.csv")

    one = execute([0])
    before = {r["key"]: r["provenance"]["start"] for r in store.every("run")}
    two = execute([0, 1])
    after = {r["key"]: r["provenance"]["start"] for r in store.every("run")}
    assert before.items() <= after.items() and len(after) == 2 * len(before)
    assert set(one["n"]) == {1} and one["se"].isna().all()
    assert set(two["n"]) == {2} and two["se"].notna().all() and len(two) == len(one)
    assert not one["mean"].equals(two["mean"])


def choices():
    """(notebook, one parameter changed) for those that train nothing of their own."""
    for path in NOTEBOOKS:
        declared = {a.target.id for a in ast.parse(cells(path)[0].source).body}
        for k, v in {"seeds": [1], "datasets": ["cifar10"], "protocols": ["fixed"], "probe": "knn"}.items():
            if k in declared and name(path) not in ("sidae_step_by_step", "your_own_images"):
                yield pytest.param(path.stem[:2], {k: v}, id=f"{path.stem}-{k}")


@pytest.mark.slow
@pytest.mark.parametrize("number, change", [*choices()])
def test_another_choice_is_drawn_from_the_records_or_gets_a_sentence(number, change):
    try:
        assert replay.__wrapped__(number, **change).figures
    except SidaeError as error:
        assert "on record" in str(error)


def test_the_walk_stops_the_gradient_where_the_library_does():
    """Notebook 00 compares values, which are the same without."""
    p1, p2, z1, z2 = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    scope = {"F": F, "p1": p1, "p2": p2, "z1": z1, "z2": z2}
    exec(next(c.source for c in cells(NOTEBOOKS[0]) if "def distance" in c.source), scope)
    library = (losses.neg_cosine(p1, z2) + losses.neg_cosine(p2, z1)) / 2
    for one, other in zip(*(torch.autograd.grad(v, (p1, p2, z1, z2), allow_unused=True) for v in (scope["l_si"], library))):
        assert one is other is None or torch.allclose(one, other)


# --- notebooks/execute.py -----------------------------------------------------------------------------------------------


def test_a_link_to_the_code_gets_its_line(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("def loss(): ...\n\n\nclass SidAE:\n    def loss(self): ...\n")
    monkeypatch.setattr(execute, "HERE", tmp_path / "notebooks")
    made = execute.linked("See [`SidAE.loss`](../a.py#L1), [`loss`](../a.py#L9) and [a page](https://x.org#L7).")
    assert made == "See [`SidAE.loss`](../a.py#L5), [`loss`](../a.py#L1) and [a page](https://x.org#L7)."
    with pytest.raises(ValueError, match="a.py has no SidAE.forward; mend the link."):
        execute.linked("[`SidAE.forward`](../a.py#L1)")


def test_tidy_joins_prints_and_drops_times():
    out = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell("x", metadata={"execution": {"started": "now"}, "alt": "a"}, outputs=[
        out("stream", text="a\n"), out("stream", text="b\n"), out("stream", name="stderr", text="c"),
        out("display_data", data={}), out("display_data", data={execute.WIDGET: {}}), out("stream", text="d")])  # fmt: skip
    execute.tidy(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell("m")]))
    assert [o.get("text") for o in cell.outputs] == ["a\nb\n", "c", None, "d"] and cell.metadata == {"alt": "a"}
