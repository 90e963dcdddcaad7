"""A checkpoint that was committed once is gone on with by later code: `python tests/test_fixture.py` makes it anew.

Only a change that is meant to change results makes it anew, and says so in CHANGELOG.md.
"""

import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidae_lib import data, experiments, train

FOLDER = Path(__file__).with_name("fixtures") / "stopped"
END = train.backbone_name(2)


def config():
    """SidAE on the digits, every part as narrow as it can be: 2 epochs of 4 steps."""
    return experiments.run("sidae", "digits", "smoke", backbone="resnet18", width=2, dim=8, hidden=8, pred_hidden=4, decoder=8)


def machine() -> dict[str, str]:
    """What bits depend on: torch, the processor's name and generation, and which of its instructions torch takes."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.split(":", 1) for line in info if ":" in line)
    known = {k.strip(): v.strip() for k, v in fields.items()}
    return {"torch": str(torch.__version__), "instructions": torch.backends.cpu.get_cpu_capability(),
            "processor": " ".join(known.get(k, "") for k in ("model name", "cpu family", "model", "stepping"))}  # fmt: skip


@contextmanager
def one_thread():
    """Sums are split by threads, so their number would change bits too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pretrain(folder: Path, **more):
    c = config()
    with one_thread():
        return train.pretrain(c, data.by_fingerprint(c.data), folder, device=torch.device("cpu"), **more)


def make() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        pretrain(FOLDER, deadline=time.monotonic())
    except train.Stopped as stopped:
        print(stopped)
    shutil.copy(FOLDER / "checkpoint.safetensors", FOLDER / "stopped.safetensors")
    record = pretrain(FOLDER)
    (FOLDER / "stopped.safetensors").rename(FOLDER / "checkpoint.safetensors")
    end = {"key": record["key"], "loss": [e["loss"] for e in record["epochs"]], "sha256": record["files"][END], **machine()}
    (FOLDER / "end.json").write_text(json.dumps(end, indent=1) + "\n")


def test_it_is_small_and_whole():
    """The end lies beside it, under its hash; a run that was stopped in its middle."""
    end = json.loads((FOLDER / "end.json").read_text())
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 300_000
    assert end["key"] == config().key() and end["sha256"] == train.sha256((FOLDER / END).read_bytes())
    run = train.Run(config(), data.by_fingerprint(config().data), torch.device("cpu"))
    run.restore(FOLDER / "checkpoint.safetensors")
    assert 0 < run.step < run.steps


def test_later_code_ends_where_it_ended(tmp_path):
    """To 1e-5 everywhere, whatever the processor; to the bit with this torch on this kind of processor."""
    end = json.loads((FOLDER / "end.json").read_text())
    shutil.copy(FOLDER / "checkpoint.safetensors", tmp_path)
    record = pretrain(tmp_path)
    ours, theirs = load_file(tmp_path / END), load_file(FOLDER / END)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert [e["loss"] for e in record["epochs"]] == pytest.approx(end["loss"], rel=1e-5)
    if machine().items() <= end.items():
        assert record["files"][END] == end["sha256"]


if __name__ == "__main__":
    make()
