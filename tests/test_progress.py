"""Long work shows itself: one line in a terminal, none in a log file, one output in a notebook."""

import io
import re
import sys

import nbformat
import pytest
from nbconvert.preprocessors import ExecutePreprocessor

from sidae_lib import experiments, runs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch):
    for name in ("TQDM_DISABLE", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("screen", [io.StringIO(), Terminal()], ids=["log file", "terminal"])
def test_a_terminal_has_one_line_with_the_time_left_and_a_log_file_none(screen, own_store, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", screen)
    runs.fetch_all([experiments.run("simsiam", "digits", "smoke", epochs=3, pool=1437)], device="cpu")
    assert re.fullmatch(r"trained simsiam \w{16} in \d+ s\n", capsys.readouterr().out)
    shown = screen.getvalue()
    if not screen.isatty():
        assert shown == ""
        return
    assert shown.count("\n") == 0 and shown.count("\r") >= 2  # drawn over itself, and wiped in the end
    assert re.search(r"simsiam \w{6}:.*\d+/66 \[\d\d:\d\d<\d\d:\d\d.*loss=.*z_std=.*images_s=", shown)


@pytest.mark.slow
def test_live_curves_do_not_grow_the_notebook(own_store):
    """Drawn after every epoch, of 2 or of 9: in the end one empty output, and what was printed."""
    draw = ("with diagrams.live(seconds=0):\n    train.LISTENERS.append(count)\n"
            "    runs.fetch_all([experiments.run('simsiam', 'digits', 'smoke', epochs={epochs}, pool=1437)])\n"
            "    train.LISTENERS.remove(count)")  # fmt: skip
    cells = ["from sidae_lib import diagrams, experiments, runs, train\ndrawn = []\n"
             "count = lambda config, history: drawn.append(len(history))",
             draw.format(epochs=2), draw.format(epochs=9), "print(drawn)"]  # fmt: skip
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    ExecutePreprocessor(timeout=120).preprocess(nb, {"metadata": {"path": str(own_store)}})
    assert nb.cells[3].outputs[0].text == f"{[1, 2, *range(1, 10)]}\n"
    for cell in nb.cells[1:3]:
        widgets = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
        others = [o for o in cell.outputs if o not in widgets and o.output_type != "stream"]
        assert [o.output_type for o in others] == ["display_data"] and "image/png" not in others[0].data
    assert abs(len(str(nb.cells[1].outputs)) - len(str(nb.cells[2].outputs))) < 2000
