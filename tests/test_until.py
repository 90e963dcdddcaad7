"""A curve as far as it has come: evaluations as training passes their checkpoints, runs that stop at an epoch and go on."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from killing import bare
from test_claims import judged, row, scored

from sidae_lib import __main__, claims, data, evaluate, experiments, frames, paths, runs, store, tasks, train
from sidae_lib.config import EvalConfig, SidaeError

CPU = torch.device("cpu")


def wanted(method: str = "sidae", epochs: int = 4, at: tuple[int, ...] = (1, 2, 4)) -> list:
    more = {"label_count": 250} if method == "supervised" else {}
    run = experiments.run(method, "digits", "smoke", epochs=epochs, **more)  # 4 steps an epoch
    return [run, *(EvalConfig(run=run, kind="knn", k=5, epoch=e) for e in at)]


def fetch(configs, said=None, **more):
    return runs.fetch_all(configs, device="cpu", log=(said if said is not None else []).append, **more)


def there(configs) -> list[int]:
    """The epochs whose evaluations are recorded."""
    return [c.epoch for c in configs if isinstance(c, EvalConfig) and store.find(c)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list:
    """The records of `wanted()` by a run that nothing interrupts."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("SIDAE_RUNS", str(tmp_path_factory.mktemp("whole")))
        return bare(fetch(wanted()))


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """The epoch of every evaluation that is computed."""
    epochs, plain = [], evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda c, *a, **k: (epochs.append(c.epoch), plain(c, *a, **k))[1])
    return epochs


# --- training to an epoch -------------------------------------------------------------------------------------------


def test_until_an_epoch_and_on_equals_an_uninterrupted_run(own_store, whole, counted):
    configs = wanted()
    for until, left, passed in ((1, 3, [1]), (3, 2, [1, 2])):
        with pytest.raises(train.Stopped, match=f"Trained to epoch {until}: {left} of 4 records are left"):
            fetch(configs, until=until)
        assert there(configs) == passed == counted and store.find(configs[0]) is None
        with pytest.raises(train.Stopped):  # asked again it has nothing to do
            fetch(configs, until=until)
        assert counted == passed
    assert bare(fetch(configs)) == whole and counted == [1, 2, 4]
    assert not (store.folder(configs[0]) / "checkpoint.safetensors").exists()


def test_what_trains_with_labels_and_what_does_not_train_run_whole(own_store):
    some = [*wanted("supervised", 2, (2,)), *wanted("untrained", 0, (0,)), *wanted("simsiam", 2, (1, 2))]
    with pytest.raises(train.Stopped, match="2 of 7 records are left"):
        fetch(some, until=1)
    assert [c for c in some if not store.find(c)] == [some[4], some[6]]
    assert len(fetch(some, until=2)) == 7


def test_encoders_run_whole(own_store):
    runs_, evals = experiments.semantic_pairs("smoke", ["digits"])
    jobs = {j.run: j for j in tasks.plan([*runs_, *evals], until=1, log=lambda _: None)}
    encoders = {r.encoder for r in jobs if r.encoder}
    assert encoders and all(j.until == (None if r in encoders or r.epochs <= 1 else 1) for r, j in jobs.items())
    assert all(e.epoch <= 1 for r, j in jobs.items() if j.until for e in j.evals)


def test_evaluations_that_ask_for_no_more_are_all_there_is_to_do(own_store):
    """As notebook 03 asks for what the paper leaves open: the run itself stays unfinished, and nothing is left."""
    few = wanted("simsiam", 2, (1,))[1:]
    assert len(fetch(few, until=1)) == len(few) == 1 and store.checkpoint(few[0].run).exists()
    assert store.find(few[0].run) is None and not store.missing(few)


def test_until_is_an_epoch(own_store):
    with pytest.raises(SidaeError, match="at least 1, not 0"):
        fetch(wanted(), until=0)


def test_the_command_says_what_is_left_and_ends_well(own_store, cli):
    """Each record of the calls is in the bundle too, as it was made."""
    call = ["run", "accuracy_vs_epochs", "--scale", "smoke", "--datasets", "digits", "--kinds", "knn", "--methods", "dae",
            "--device", "cpu", "--bundle", str(own_store / "records.jsonl")]  # fmt: skip
    done = cli(*call, "--until", "1")
    assert done.returncode == 0 and "has come to epoch 1 of 2" in done.stdout
    assert "Trained to epoch 1: 3 of 5 records are left" in done.stdout
    assert "1 runs and 4 evaluations are recorded" in cli(*call).stdout
    made = [json.loads(line)["key"] for line in (own_store / "records.jsonl").read_text().splitlines()]
    assert len(made) == 5 and sorted(made) == sorted(r["key"] for r in store.every())


def test_order_seed_finishes_a_seed_of_all_sets_before_the_next(own_store, capsys):
    call = ["run", "accuracy_vs_epochs", "--scale", "smoke", "--seeds", "2", "--kinds", "knn", "--methods", "untrained",
            "--device", "cpu"]  # fmt: skip
    seed = {c.key(): c.seed for c in experiments.accuracy_vs_epochs("smoke", seeds=(0, 1))[0]}
    for order, expected in (("seed", [0, 0, 1, 1]), ("figure", [0, 1, 0, 1])):
        os.environ["SIDAE_RUNS"] = str(own_store / order)  # the fixture puts it back
        assert __main__.main([*call, "--order", order]) == 0
        trained = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("trained")]
        assert [seed[key] for key in trained] == expected


# --- evaluated in passing -------------------------------------------------------------------------------------------


def test_a_record_is_written_as_training_passes_its_checkpoint(own_store, monkeypatch):
    configs, seen = wanted(), []
    look = lambda config, history: seen.append((len(history), there(configs)))  # noqa: E731
    monkeypatch.setattr(train, "LISTENERS", [look])
    fetch(configs)
    assert seen == [(1, []), (2, [1]), (3, [1, 2]), (4, [1, 2])]


@pytest.fixture
def interrupted():
    """SIGINT as Python has it; a package that another test imports makes it an exit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("ends", ["signal", "deadline"])
def test_an_evaluation_that_is_cut_off_is_all_that_is_lost(ends, own_store, whole, monkeypatch, interrupted):
    """Ctrl-C does not wait for it; where the time is up meanwhile it is finished and no other begun."""
    configs, plain, late, clock = wanted(), evaluate.evaluate, [0.0], time.monotonic

    def cut(config, *args, **more):
        if config.epoch == 2:
            late[0] = 1e6
            if ends == "signal":
                os.kill(os.getpid(), signal.SIGINT)
        return plain(config, *args, **more)

    with monkeypatch.context() as m:
        m.setattr(evaluate, "evaluate", cut)
        m.setattr(time, "monotonic", lambda: clock() + late[0])
        with pytest.raises(KeyboardInterrupt if ends == "signal" else train.Stopped):
            fetch(configs, minutes=100)
    assert there(configs) == [1] + [2] * (ends == "deadline")
    stands = train.Run(configs[0], data.by_fingerprint(configs[0].data), CPU)
    stands.restore(store.folder(configs[0]) / "checkpoint.safetensors")
    assert stands.step == 8 + (ends == "deadline")  # of 16: the loop looks at the clock after its next step
    assert bare(fetch(configs)) == whole


def test_an_evaluation_that_fails_does_not_stop_the_training(own_store):
    configs = wanted("simsiam", 2, (1, 2))
    bad = EvalConfig(run=configs[0], kind="classifier", epoch=1)
    with pytest.raises(SidaeError, match="1 of 1 runs failed, .*supervised run's own classifier"):
        fetch([*configs, bad])
    assert all(map(store.find, configs)) and store.find(bad) is None


# --- one trajectory -------------------------------------------------------------------------------------------------


def stopped(configs, until: int) -> list:
    with pytest.raises(train.Stopped):
        fetch(configs, until=until)
    return configs


def test_a_run_whose_checkpoint_is_lost_comes_the_same_way_again(own_store, whole, counted):
    configs = stopped(wanted(), 2)
    (store.folder(configs[0]) / "checkpoint.safetensors").unlink()
    said = []
    assert bare(fetch(configs, said)) == whole and counted == [1, 2, 4]
    assert not any("aside" in line for line in said)


def test_evaluations_of_a_lost_trajectory_are_set_aside_and_made_anew(own_store, whole, counted):
    """As where another machine had made them: other weights from epoch 1 on, equal ones before."""
    configs = stopped(wanted(at=(0, 1, 2, 4)), 3)
    (store.folder(configs[0]) / "checkpoint.safetensors").unlink()
    for config in configs[2:4]:  # epochs 1 and 2
        record = store.find(config) | {"backbone": "f" * 64, "accuracy": 1.0}
        store.keep(config, record)
    said = []
    again = bare(fetch([c for c in configs if c != configs[3]], said))  # epoch 2 is not asked for, and goes all the same
    assert again[0]["epochs"] == whole[0]["epochs"] and again[2:] == [whole[1], whole[3]]
    assert counted == [0, 1, 2, 1, 4] and store.find(configs[3]) is None
    [line] = [line for line in said if "aside" in line]
    assert line.startswith(f"2 evaluations of sidae {configs[0].key()} lie aside") and line.endswith("from epoch 1 on.")
    assert len(list(store.folder(configs[0]).glob("eval-*.aside-1"))) == 2


def test_an_unfinished_run_is_not_begun_again_for_an_epoch_that_it_did_not_keep(own_store, whole):
    configs = wanted()
    stopped([configs[0], configs[1]], 3)  # keeps epoch 1, stands at 3
    before = (store.folder(configs[0]) / "checkpoint.safetensors").read_bytes()
    with pytest.raises(SidaeError, match=r"stands at epoch 3 of 4 and did not keep epoch 2 on its way \(kept: 1\).*ask for"):
        fetch(configs)
    assert (store.folder(configs[0]) / "checkpoint.safetensors").read_bytes() == before
    at_three = EvalConfig(run=configs[0], kind="knn", k=5, epoch=3)  # where the checkpoint stands it can still be had
    stopped([configs[0], at_three], 3)
    assert store.find(at_three)["epoch"] == 3 and store.backbone(configs[0], 3).exists()
    fetch(configs[:1])
    assert bare(fetch(configs))[1:] == whole[1:]  # finished, it is trained again for epoch 2


def test_a_finished_run_forgets_what_was_begun_for_other_epochs(own_store):
    configs = wanted("simsiam", 4, (1, 2))
    run = fetch(configs[:1])
    assert fetch(configs[:2], until=1)[0] == run[0]  # trained again for epoch 1, as far as that
    checkpoint = store.folder(configs[0]) / "checkpoint.safetensors"
    assert checkpoint.exists()
    other = EvalConfig(run=configs[0], kind="knn", k=5, epoch=0)  # which that did not keep
    assert bare(fetch([other, configs[2]])[1]) == bare(store.find(configs[2])) and not checkpoint.exists()


def test_a_run_of_the_papers_length_keeps_every_25th_epoch(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "none")  # nothing to compile with
    config = experiments.run("simsiam", "digits", "smoke", epochs=200, pool=64)  # a step an epoch
    assert train.always_kept(config) == {0, 25, 50, 75, 100, 125, 150, 175, 200}
    assert train.always_kept(config.replace(epochs=65)) == {65}
    assert train.always_kept(experiments.run("supervised", "digits", "smoke", epochs=200)) == {200}
    passed = []
    done = train.pretrain(config, data.by_fingerprint(config.data), tmp_path, device=CPU, until=50,
                          passed=lambda epoch, files: passed.append((epoch, len(files))))  # fmt: skip
    assert done is None and passed == [(0, 1), (25, 2), (50, 3)]
    assert sorted(p.name for p in tmp_path.glob("backbone-*")) == [f"backbone-e{e:03d}.safetensors" for e in (0, 25, 50)]


# --- priority -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to one processor here")
def test_a_process_beside_a_nice_one_keeps_nine_tenths_of_its_speed(own_store):
    """Two sessions on one processor, both spinning: shares of its time, whatever else the machine does. The whole session
    is nice, where that can be said."""
    spin = ("import os, sys, time\nif sys.argv[1] == 'nice':\n    from sidae_lib import __main__\n    __main__._nice()\n"
            "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\ngroup = '/proc/self/autogroup'\n"
            "print(os.nice(0), open(group).read().strip() if os.access(group, os.W_OK) else 'nice 19', flush=True)\n"
            "sys.stdin.readline()\nend, begun = time.monotonic() + 3, time.process_time()\n"
            "while time.monotonic() < end: pass\nprint(time.process_time() - begun, flush=True)\n"
            "os._exit(0)")  # or it takes its time, being nice
    both = [subprocess.Popen([sys.executable, "-c", spin, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             cwd=paths.ROOT, start_new_session=True) for name in ("nice", "plain")]  # fmt: skip
    first = both[0].stdout.readline()
    assert first.startswith("19 ") and first.endswith("nice 19\n") and both[1].stdout.readline()
    for p in both:
        p.stdin.write("\n")
        p.stdin.flush()
    nice, plain = (float(p.communicate()[0]) for p in both)
    assert plain > 0.9 * (plain + nice)


def test_nice_is_for_the_whole_session(own_store, monkeypatch):
    called = []
    monkeypatch.setattr(os, "nice", called.append)
    monkeypatch.setattr(__main__, "Path", lambda name: called.append(name) or own_store / "autogroup")
    assert __main__.main(["run", "sidae_step_by_step", "--scale", "smoke", "--device", "cpu", "--nice"]) == 0
    assert called[:2] == [19, "/proc/self/autogroup"] and (own_store / "autogroup").read_text() == "19"


# --- drawn and judged -----------------------------------------------------------------------------------------------


def curve(method: str, reached: dict[int, int], **changes) -> list[dict]:
    """Rows of `frames.evaluations`: seed -> the epoch that it has come to, by 25."""
    return [row(method, seed, 40.0 + epoch / 25 + seed, epoch=epoch, hardware="x", **changes)
            for seed, last in reached.items() for epoch in range(25, last + 1, 25)]  # fmt: skip


def table(rows: list[dict]) -> pd.DataFrame:
    return frames.summary(pd.DataFrame(rows))


def test_of_an_unfinished_run_claims_see_the_first_checkpoint_alone():
    """Its last one is not the end of training, and half a curve has another spread over epochs."""
    other = [row("supervised", s, 10.0 + s) for s in range(3)]
    unfinished = [r for m in ("sidae", "simsiam", "dae") for r in curve(m, dict.fromkeys(range(3), 150))] + other
    early = judged(unfinished, "with scarce labels the first checkpoint")
    assert early["difference"].tolist() == [31, 31, 31] and early["verdict"].tolist() == ["supported"] * 3
    assert {*scored(unfinished)["statement"]} == {*early["statement"]}, "no other claim is about the first checkpoint"
    mined = curve("moco_v2 + 9 mined", dict.fromkeys(range(3), 150), kind="logistic")
    none = [r | {"accuracy": 30.0 + r["seed"]} for r in curve("moco_v2", dict.fromkeys(range(3), 150), kind="logistic")]
    assert [case.split(", ")[-1] for case in judged(mined + none, "semantic pairs beat none").index] == ["epoch 25"]
    two = curve("sidae", {0: 200, 1: 200, 2: 150}) + other
    assert judged(two, "with scarce labels the first")["n"].tolist() == [3]
    assert judged(two, "accuracy rises")["n"].tolist() == [2]


def test_records_of_an_unfinished_run_are_drawn(own_store):
    configs, evals = experiments.accuracy_vs_epochs("smoke", ["digits"])
    asked = [c for c in [*configs, *evals] if store.run_of(c).method in ("dae", "untrained")]
    stopped(asked, 1)
    found = store.recorded([c for c in asked if isinstance(c, EvalConfig)])
    drawn = frames.summary(frames.evaluations(found))
    assert set(drawn.loc[drawn["method"] == "dae", "epoch"]) == {1} and set(drawn["n"]) == {1}
    board = claims.scoreboard({"accuracy_vs_epochs": found, "datasets_table": found}, "smoke")
    assert "dae" not in set(board["statement"]) and json.dumps(found)
