"""Long work shows itself: one line in a terminal, none in a log file, one output in a notebook."""

import os
import pty
import re
import subprocess
import sys
import termios

import nbformat
import pytest
from nbconvert.preprocessors import ExecutePreprocessor

CODE = ("from sidae_lib import experiments, runs\n"
        "run = experiments.run('simsiam', 'digits', 'smoke', epochs={epochs}, pool=1437)\n"
        "runs.fetch_all([run])\n")  # fmt: skip


def environment(store) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("TQDM_DISABLE", "MPLBACKEND")}


@pytest.mark.slow
def test_a_log_file_is_not_flooded(store):
    done = subprocess.run([sys.executable, "-c", CODE.format(epochs=3)], env=environment(store), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert re.fullmatch(r"trained simsiam \w{16} in \d+ s\n", done.stdout)


@pytest.mark.slow
def test_a_terminal_has_one_line_with_the_time_left(store):
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    done = subprocess.Popen([sys.executable, "-c", CODE.format(epochs=3)], env=environment(store) | {"TERM": "xterm"},
                            stdout=subprocess.DEVNULL, stderr=terminal)  # fmt: skip
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(screen, 4096):
            shown += part
    except OSError:  # the other side is closed
        pass
    assert done.wait() == 0
    shown = shown.decode()
    assert shown.count("\n") == 0 and shown.count("\r") >= 2  # drawn over itself, and wiped in the end
    assert re.search(r"simsiam \w{6}:.*\d+/66 \[\d\d:\d\d<\d\d:\d\d", shown)  # so much, and so much left


@pytest.mark.slow
def test_live_curves_do_not_grow_the_notebook(store, monkeypatch):
    """Drawn after every epoch, of 2 or of 9: in the end one empty output, and what was printed."""
    for name in ("TQDM_DISABLE", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    sizes = []
    for epochs in (2, 9):
        cells = ["from sidae_lib import figures, train\ndrawn = []\nfigures_of = figures._figure",
                 "with figures.live(seconds=0):\n    train.LISTENERS.append(lambda c, h: drawn.append(len(h)))\n    "
                 + CODE.format(epochs=epochs).replace("\n", "\n    ") + "train.LISTENERS.pop()", "print(drawn)"]  # fmt: skip
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        ExecutePreprocessor(timeout=120).preprocess(nb, {"metadata": {"path": str(store)}})
        outputs = [o for o in nb.cells[1].outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
        assert nb.cells[2].outputs[0].text == f"{[*range(1, epochs + 1)]}\n"
        assert [o.output_type for o in outputs if o.output_type != "stream"] == ["display_data"]
        assert not any("image/png" in o.get("data", {}) for o in outputs)
        sizes.append(len(nbformat.writes(nb)))
    assert abs(sizes[1] - sizes[0]) < 2000
