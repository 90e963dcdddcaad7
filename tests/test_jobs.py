"""A grid in processes of this machine, as `--jobs` computes it: real processes, killed and signalled."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import joblib
import pytest
import torch
from killing import bare, quiet

from sidae_lib import data, experiments, paths, processes, runs, store, train
from sidae_lib.config import EvalConfig, SidaeError

slow = pytest.mark.slow


def run(seed: int = 0, **changes):
    return experiments.run("simsiam", "digits", "smoke", seed, **{"epochs": 1} | changes)


def knn(config, epoch: int = -1) -> EvalConfig:
    return EvalConfig(run=config, kind="knn", k=5, epoch=epoch)


def wait(ready, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def stands_at(config) -> int:
    """The step of a run's checkpoint, which is whole."""
    stands = train.Run(config, data.load("digits"), torch.device("cpu"))
    stands.restore(store.folder(config) / "checkpoint.safetensors")
    return stands.step


def on_pairs_of(encoder, **changes):
    return run(pairs="mined", encoder=encoder, pair_share=0.5, pair_low=-1.0, pair_high=0.9999, **changes)


ENCODER, BAD, BEYOND, DOOMED, KILLED = run(1), run(lr=1e30), run(hidden=2**40), run(2), run(3, epochs=20)
PAIRED, FRUITLESS = on_pairs_of(ENCODER), on_pairs_of(BAD)
GOOD = [ENCODER, PAIRED, knn(PAIRED), KILLED, knn(KILLED, 1), knn(KILLED), run(4), knn(run(4))]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """What came of all of these, asked for at once. The processes of DOOMED are killed as they are given it, that
    of KILLED once, as its first checkpoint is evaluated."""
    begun, said, begin = [], [], processes._Process.begin

    def watched(self, job) -> None:
        begin(self, job)
        begun.append(job.run)
        if job.run == DOOMED:
            self.process.kill()
        if job.run == KILLED and begun.count(KILLED) == 1:
            kill = self.process.kill
            threading.Thread(target=lambda: (wait(lambda: store.find(knn(KILLED, 1))), kill())).start()

    with pytest.MonkeyPatch.context() as m:
        for name in ("runs", "records"):
            m.setenv(f"SIDAE_{name.upper()}", str(tmp_path_factory.mktemp("jobs") / name))
        m.setenv("SIDAE_BUNDLE", str(bundle := tmp_path_factory.mktemp("bundle") / "records.jsonl"))
        m.setenv("SIDAE_THREADS", "7")  # the caller's own is not theirs
        m.setenv("CXX", "none")  # nothing to compile with
        m.setattr(processes._Process, "begin", watched)
        with pytest.raises(SidaeError) as e:
            runs.fetch_all([PAIRED, FRUITLESS, *GOOD, BEYOND, DOOMED], jobs=2, device="cpu", log=said.append)
        yield SimpleNamespace(error=e.value, begun=begun, said=said, bundle=bundle)


def test_each_is_computed_once_and_equals_what_one_process_computes(grid, monkeypatch, tmp_path):
    assert not store.missing(GOOD) and not multiprocessing.active_children()
    records = store.recorded(GOOD)
    assert {r["provenance"]["threads"] for r in records} == {max(1, joblib.cpu_count() // 2)}
    assert sum("trained" in line for line in grid.said) == 4
    bundled = [json.loads(line)["key"] for line in grid.bundle.read_text().splitlines()]
    assert sorted(bundled) == sorted(r["key"] for r in store.every())  # each as it was made
    monkeypatch.setenv("SIDAE_THREADS", str(max(1, joblib.cpu_count() // 2)))
    monkeypatch.setenv("SIDAE_RUNS", str(tmp_path))
    monkeypatch.setenv("CXX", "none")
    assert [bare(r) for r in records] == [bare(r) for r in runs.fetch_all(GOOD, device="cpu", log=quiet)]


def test_what_fails_is_named_and_what_is_not_ours_keeps_its_traceback(grid):
    said = str(grid.error)
    assert said.startswith("4 of 8 runs failed, the rest are kept.")
    assert f"simsiam {BAD.key()}: " in said
    assert f"{FRUITLESS.key()} needs the run {BAD.key()}, which failed." in said
    assert f"simsiam {BEYOND.key()}: training: RuntimeError" in said
    assert [note.splitlines()[-1].split(":")[0] for note in grid.error.__notes__] == ["RuntimeError"]


def test_a_run_starts_in_its_turn_when_what_it_depends_on_is_done(grid):
    """Another goes first meanwhile; what depends on a run that failed never starts."""
    first = list(dict.fromkeys(grid.begun))
    assert first[:2] == [ENCODER, BAD] and FRUITLESS not in first and set(first[2:4]) == {PAIRED, KILLED}
    assert store.find(PAIRED)["pairs"]["hash"]


def test_a_run_whose_process_is_killed_goes_on_in_another_from_its_checkpoint(grid):
    first, second = (s["steps"] for s in store.find(KILLED)["provenance"]["segments"])
    assert grid.begun.count(KILLED) == 2 and 0 < second[0] and second[1] == store.find(KILLED)["steps"]
    assert sum(f"{KILLED.key()} was ended by SIGKILL; another goes on" in line for line in grid.said) == 1


def test_a_run_during_which_its_process_died_three_times_has_failed(grid):
    assert grid.begun.count(DOOMED) == 3
    assert f"simsiam {DOOMED.key()}: its process was ended 3 times, at last by SIGKILL" in str(grid.error)


def test_time_is_up_before_anything_starts(own_store):
    with pytest.raises(train.Stopped, match="Time is up. 2 of 2 records are left"):
        runs.fetch_all([run(), knn(run())], jobs=2, device="cpu", minutes=0, log=quiet)
    assert not paths.runs().exists() or not list(paths.runs().glob("*/*"))
    with pytest.raises(SidaeError, match="at least one job, not 0"):
        runs.fetch_all([run()], jobs=0)


@slow
def test_whatever_ends_the_caller_every_run_stops_at_a_checkpoint(own_store, monkeypatch):
    """Ctrl-C, which reaches all processes of a terminal; the caller killed."""
    code = ("import sys\nfrom sidae_lib import __main__, experiments\nfrom sidae_lib.config import EvalConfig\n"
            "runs = [experiments.run('simsiam', 'digits', 'smoke', n, epochs=5000) for n in range(3)]\n"
            "evals = [EvalConfig(run=r, kind='knn', k=5, epoch=0) for r in runs]\n"
            "experiments.FIGURES['long'] = lambda *a, **k: (runs, evals)\n"
            "sys.exit(__main__.main(['run', 'long', '--jobs', '2', '--device', 'cpu']))")  # fmt: skip
    ways = {"int": (os.killpg, signal.SIGINT), "kill": (os.kill, signal.SIGKILL)}
    env = os.environ | {"PYTHONPATH": str(paths.ROOT), "CXX": "none"}
    callers = {name: subprocess.Popen([sys.executable, "-P", "-c", code], cwd=own_store, start_new_session=True,
                                      text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      env=env | {"SIDAE_RUNS": str(own_store / name)}) for name in ways}  # fmt: skip
    for name, (send, number) in ways.items():
        wait(lambda name=name: len(list((own_store / name).glob("*/eval-*.json"))) == 2)  # epoch 0: training begins
        time.sleep(1)
        send(callers[name].pid, number)
    for name, caller in callers.items():
        said = caller.communicate(timeout=180)[0]  # at whose end no process has its pipe any more
        assert "Traceback" not in said, said
        if name == "int":
            assert caller.returncode == 130 and "Stopped by SIGINT: simsiam" in said, said
            assert "4 of 6 records are left" in said
        monkeypatch.setenv("SIDAE_RUNS", str(own_store / name))
        configs = [run(n, epochs=5000) for n in range(3)]
        stopped = [c for c in configs if (store.folder(c) / "checkpoint.safetensors").exists()]
        assert len(stopped) == 2 and all(0 < stands_at(c) < 5000 * 4 for c in stopped)
