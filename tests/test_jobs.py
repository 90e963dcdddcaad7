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
from test_grid import bare, wait

from sidae_lib import data, experiments, paths, processes, runs, train
from sidae_lib.config import EvalConfig, SidaeError

slow = pytest.mark.slow


def run(seed: int = 0, **changes):
    return experiments.run("simsiam", "digits", "smoke", seed, **{"epochs": 1} | changes)


def knn(config, epoch: int = -1) -> EvalConfig:
    return EvalConfig(run=config, kind="knn", k=5, epoch=epoch)


def on_pairs_of(encoder, **changes):
    return run(pairs="mined", encoder=encoder, pair_share=0.5, pair_low=-1.0, pair_high=0.9999, **changes)


ENCODER, BAD, BEYOND, DOOMED, KILLED = run(1), run(lr=1e30), run(hidden=2**40), run(2), run(3, epochs=20)
PAIRED, FRUITLESS = on_pairs_of(ENCODER), on_pairs_of(BAD)
GOOD = [ENCODER, PAIRED, knn(PAIRED), KILLED, knn(KILLED, 1), knn(KILLED), run(4), knn(run(4))]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """What came of all of these, asked for at once. The processes of DOOMED are killed as they are given it, that of KILLED
    once, as its first checkpoint is evaluated."""
    begun, said, begin = [], [], processes._Process.begin

    def watched(self, job, until) -> None:
        begin(self, job, until)
        begun.append(job.run)
        if job.run == DOOMED:
            self.process.kill()
        if job.run == KILLED and begun.count(KILLED) == 1:
            kill = self.process.kill
            threading.Thread(target=lambda: (wait(lambda: runs.find(knn(KILLED, 1))), kill())).start()

    with pytest.MonkeyPatch.context() as m:
        for name in ("runs", "records"):
            m.setenv(f"SIDAE_{name.upper()}", str(tmp_path_factory.mktemp("jobs") / name))
        m.setenv("SIDAE_THREADS", "7")  # the caller's own is not theirs
        m.setenv("CXX", "none")  # nothing to compile with
        m.setattr(processes._Process, "begin", watched)
        with pytest.raises(SidaeError) as e:
            runs.fetch_all([PAIRED, FRUITLESS, *GOOD, BEYOND, DOOMED], jobs=2, device="cpu", log=said.append)
        yield SimpleNamespace(error=e.value, begun=begun, said=said)


def test_each_is_computed_once_and_equals_what_one_process_computes(grid, monkeypatch, tmp_path):
    assert not runs.missing(GOOD) and not multiprocessing.active_children()
    records = runs.recorded(GOOD)
    assert {r["provenance"]["threads"] for r in records} == {max(1, joblib.cpu_count() // 2)}
    assert sum("trained" in line for line in grid.said) == 4
    monkeypatch.setenv("SIDAE_THREADS", str(max(1, joblib.cpu_count() // 2)))
    monkeypatch.setenv("SIDAE_RUNS", str(tmp_path))
    monkeypatch.setenv("CXX", "none")
    assert [bare(r) for r in records] == [bare(r) for r in runs.fetch_all(GOOD, device="cpu", log=lambda _: None)]


def test_what_fails_is_named_and_what_is_not_ours_keeps_its_traceback(grid):
    said = str(grid.error)
    assert said.startswith("4 of 8 runs failed, the rest are kept.")
    assert f"simsiam {BAD.key()}: " in said and f"{FRUITLESS.key()} needs the run {BAD.key()}, which failed." in said
    assert f"simsiam {BEYOND.key()}: training: RuntimeError" in said
    assert [note.splitlines()[-1].split(":")[0] for note in grid.error.__notes__] == ["RuntimeError"]


def test_a_run_starts_in_its_turn_when_what_it_depends_on_is_done(grid):
    """Another goes first meanwhile; what depends on a run that failed never starts."""
    first = list(dict.fromkeys(grid.begun))
    assert first[:2] == [ENCODER, BAD] and FRUITLESS not in first and set(first[2:4]) == {PAIRED, KILLED}
    assert runs.find(PAIRED)["pairs"]["hash"]


def test_a_run_whose_process_is_killed_goes_on_in_another_from_its_checkpoint(grid):
    first, second = (s["steps"] for s in runs.find(KILLED)["provenance"]["segments"])
    assert grid.begun.count(KILLED) == 2 and 0 < second[0] and second[1] == runs.find(KILLED)["steps"]
    assert sum(f"{KILLED.key()} was ended by SIGKILL; another goes on" in line for line in grid.said) == 1


def test_a_run_during_which_its_process_died_three_times_has_failed(grid):
    assert grid.begun.count(DOOMED) == 3
    assert f"simsiam {DOOMED.key()}: its process was ended 3 times, at last by SIGKILL" in str(grid.error)


def test_time_is_up_before_anything_starts(store):
    with pytest.raises(train.Stopped, match="Time is up. 2 of 2 records are left"):
        runs.fetch_all([run(), knn(run())], jobs=2, device="cpu", minutes=0, log=lambda _: None)
    assert not paths.runs().exists() or not list(paths.runs().glob("*/*"))
    with pytest.raises(SidaeError, match="at least one job, not 0"):
        runs.fetch_all([run()], jobs=0)


@slow
def test_the_command_finishes_a_seed_of_all_methods_before_the_next(store, cli):
    """Each record of the call is in the bundle too, as it was made."""
    done = cli("run", "accuracy_vs_epochs", "--scale", "smoke", "--datasets", "digits", "--methods", "dae", "untrained",
               "simsiam", "--kinds", "knn", "--seeds", "2", "--order", "seed", "--jobs", "2", "--device", "cpu",
               "--bundle", str(store / "records.jsonl"))  # fmt: skip
    assert done.returncode == 0 and "6 runs in 2 processes" in done.stdout, done.stderr
    made = [json.loads(line) for line in (store / "records.jsonl").read_text().splitlines()]
    assert sorted(r["key"] for r in made) == sorted(r["key"] for r in runs.every())
    starts = [sorted(r["provenance"]["start"] for r in made if r["config"].get("seed", 0) == s and "run_key" not in r)
              for s in (0, 1)]  # fmt: skip
    assert len(starts[0]) == len(starts[1]) == 3 and starts[0][-2] <= starts[1][0]  # the last may be handed out at once


@slow
def test_whatever_ends_the_caller_every_run_stops_at_a_checkpoint(store):
    """Ctrl-C, which reaches all processes of a terminal; the caller killed."""
    code = ("import sys\nfrom sidae_lib import __main__, experiments\nfrom sidae_lib.config import EvalConfig\n"
            "configs = [experiments.run('simsiam', 'digits', 'smoke', n, epochs=5000) for n in range(3)]\n"
            "experiments.FIGURES['long'] = lambda *a, **k: (configs, [EvalConfig(run=c, kind='knn', k=5, epoch=0)\n"
            "                                                         for c in configs])\n"
            "sys.exit(__main__.main(['run', 'long', '--jobs', '2', '--device', 'cpu']))")  # fmt: skip
    ways = {"int": (os.killpg, signal.SIGINT), "kill": (os.kill, signal.SIGKILL)}
    env = os.environ | {"PYTHONPATH": str(paths.ROOT), "CXX": "none"}
    callers = {name: subprocess.Popen([sys.executable, "-P", "-c", code], cwd=store, start_new_session=True, text=True,
                                      env=env | {"SIDAE_RUNS": str(store / name)}, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT) for name in ways}  # fmt: skip
    for name, (send, number) in ways.items():
        wait(lambda name=name: len(list((store / name).glob("*/eval-*.json"))) == 2, 120)  # of epoch 0: training begins
        time.sleep(1)
        send(callers[name].pid, number)
    for name, (_, number) in ways.items():
        said = callers[name].communicate(timeout=120)[0]  # at whose end no process has its pipe any more
        assert "Traceback" not in said, said
        if name != "kill":
            assert callers[name].returncode == 130 and f"Stopped by {signal.Signals(number).name}: simsiam" in said, said
            assert "4 of 6 records are left" in said
        for file in sorted((store / name).glob("*/checkpoint.safetensors")):
            config = next(c for n in range(3) if (c := run(n, epochs=5000)).key() == file.parent.name)
            stands = train.Run(config, data.load("digits"), torch.device("cpu"))
            stands.restore(file)
            assert 0 < stands.step < stands.steps
        assert len(list((store / name).glob("*/checkpoint.safetensors"))) == 2
