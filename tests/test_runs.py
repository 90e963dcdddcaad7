"""The store: computed once, found again, shared by processes, never half-written."""

import fcntl
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sidae_lib import data, evaluate, experiments, figures, paths, runs, train
from sidae_lib.config import EvalConfig, RunConfig, SidaeError


@pytest.fixture
def config(store):
    return experiments.run("simsiam", "digits", "smoke", epochs=1)


def quiet(_: str) -> None:
    pass


def test_computed_once_and_read_again(config, monkeypatch):
    evals = [EvalConfig(run=config, kind=k, labels=0.1) for k in ("linear", "knn")]
    first = runs.fetch_all([config, *evals], device="cpu", log=quiet)
    assert [r["key"] for r in first] == [config.key(), *(e.key() for e in evals)]
    monkeypatch.setattr(train, "pretrain", None)  # nothing may be computed any more
    monkeypatch.setattr(evaluate, "evaluate", None)
    assert runs.fetch_all([*reversed(evals), config], device="cpu", log=quiet) == [first[2], first[1], first[0]]
    assert runs.missing([config, *evals]) == []


def test_an_evaluation_added_later_leaves_the_run_alone(config):
    run = runs.fetch_all([config], device="cpu", log=quiet)[0]
    before = (runs.folder(config) / "record.json").read_bytes()
    runs.fetch_all([EvalConfig(run=config, kind="knn")], device="cpu", log=quiet)
    assert (runs.folder(config) / "record.json").read_bytes() == before
    assert run["epochs"][0]["epoch"] == 1 and "weights" not in json.dumps(run)


def test_an_epoch_that_was_not_kept_is_trained_again(config):
    longer = config.replace(epochs=2)
    runs.fetch_all([longer], device="cpu", log=quiet)
    assert not runs.backbone(longer, 1).exists()
    [record] = runs.fetch_all([EvalConfig(run=longer, kind="knn", epoch=1)], device="cpu", log=quiet)
    assert record["epoch"] == 1 and runs.backbone(longer, 1).exists()


def test_published_records_are_found_and_never_written(config, monkeypatch):
    record = runs.fetch_all([config], device="cpu", log=quiet)[0]
    published = paths.records() / config.key()
    published.parent.mkdir(exist_ok=True)
    runs.folder(config).rename(published)
    before = {p: p.read_bytes() for p in published.iterdir()}
    assert runs.find(config) == record and list(runs.every("record")) == [record]
    runs.fetch_all([config, EvalConfig(run=config, kind="knn")], device="cpu", log=quiet)
    assert {p: p.read_bytes() for p in published.iterdir()} == before


def test_what_could_not_be_read_is_not_written(config):
    """Three thousand classes as rows, a NaN, an integer beyond any count: refused while the store is as it was."""
    [record] = runs.fetch_all([config], device="cpu", log=quiet)
    path = runs.folder(config) / "record.json"
    before = path.read_bytes()
    for wrong in ([[0] * 3000] * 3000, float("nan"), 10**19):
        with pytest.raises(SidaeError, match=f"record of {config.key()} cannot be filed.*at most 16.*Nothing is written"):
            runs.keep(config, record | {"confusion": wrong})
        assert path.read_bytes() == before and [p.name for p in path.parent.glob("*.json")] == ["record.json"]


def test_three_thousand_classes_are_recorded_once(store, monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.integers(256, size=(3000, 4, 4), dtype=np.uint8), np.arange(3000)
    monkeypatch.setenv("SIDAE_DATA", str(store))
    np.savez(store / "many.npz", train_images=x, train_labels=y, test_images=255 - x[:200], test_labels=y[:200])
    run = RunConfig(method="untrained", data=data.identify("many"), augment="none", backbone="small_cnn", epochs=0)
    e = EvalConfig(run=run, kind="knn", k=1)
    said: list[str] = []
    [record] = runs.fetch_all([e], device="cpu", log=said.append)
    assert len(record["per_class"]) == 3000 and sum(n for *_, n in record["confusion"]) == record["n_test"] == 200
    assert (runs.folder(e) / f"eval-{e.key()}.json").stat().st_size < 300_000
    made = dict.fromkeys(runs.folder(e).iterdir())
    assert runs.fetch_all([e], device="cpu", log=said.append) == [record] and not any("aside" in line for line in said)
    assert dict.fromkeys(runs.folder(e).iterdir()) == made
    matrix = evaluate.confusion(record)
    assert matrix.sum(1).tolist() == [1] * 200 + [0] * 2800 and 100 * matrix.trace() / 200 == pytest.approx(record["accuracy"])


def test_one_that_fails_does_not_stop_the_others(config):
    bad = config.replace(lr=1e30)
    with pytest.raises(SidaeError, match=f"1 of 2 runs failed, the rest are kept. simsiam {bad.key()}: .*not finite"):
        runs.fetch_all([bad, config], device="cpu", log=quiet)
    assert runs.find(config) and not runs.find(bad)


def test_whatever_fails_is_named_and_the_rest_is_kept(config, monkeypatch):
    """A network beyond any memory and a matrix that has no inverse fail inside of other libraries, in their way."""
    monkeypatch.setattr(evaluate, "logistic", lambda *_: np.linalg.inv(np.zeros((1, 1))))
    bad, few = config.replace(hidden=2**40), EvalConfig(run=config, kind="logistic")
    good = [config, EvalConfig(run=config, kind="knn"), config.replace(seed=1)]
    with pytest.raises(SidaeError, match=f"(?s)2 of 3 runs failed, the rest are kept.*simsiam {bad.key()}: .*RuntimeError: "
                                         f".*simsiam {config.key()}: logistic {few.key()}: LinAlgError: Singular") as e:
        runs.fetch_all([bad, few, *good], device="cpu", log=quiet)
    assert runs.missing([bad, few, *good]) == [bad, few]
    assert isinstance(e.value.__cause__, SidaeError)
    assert [note.splitlines()[-1].split(":")[0] for note in e.value.__notes__] == ["RuntimeError", "numpy.linalg.LinAlgError"]
    assert all("Traceback" in note and ", line " in note for note in e.value.__notes__)


def test_the_command_line_shows_where_it_failed(store, cli, monkeypatch):
    """The sentence first, then the traceback of what is not ours."""
    monkeypatch.setattr(train, "LISTENERS", [lambda config, history: history["loss"]])
    done = cli("run", "sidae_step_by_step", "--scale", "smoke", "--device", "cpu")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and lines[0].startswith("error: 1 of ") and ": training: TypeError: list indices" in lines[0]
    assert lines[1].startswith("Traceback") and lines[-1].startswith("TypeError: list indices")


def test_a_listener_that_stops_the_process_stops_it(config, monkeypatch):
    """What is no error but the wish to end is never put off until the rest is done."""
    def leave(config, history):
        raise SystemExit(3)

    monkeypatch.setattr(train, "LISTENERS", [leave])
    with pytest.raises(SystemExit):
        runs.fetch_all([config, config.replace(seed=1)], device="cpu", log=quiet)
    assert len(runs.missing([config, config.replace(seed=1)])) == 2


@pytest.mark.parametrize("wrong, sentence", [
    ({"method": "simsam"}, "Unknown method 'simsam'; choose from"),
    ({"augment": "blurr"}, "Unknown augmentation 'blurr'; choose from"),
    ({"w": 0.3}, "simsiam does not read w"),
    ({"data": "0123456789abcdef"}, "0123456789abcdef"),
])  # fmt: skip
def test_unknown_names_are_refused(config, wrong, sentence):
    with pytest.raises(SidaeError, match=sentence):
        runs.fetch_all([RunConfig.from_dict(config.to_dict() | wrong)], device="cpu", log=quiet)
    assert not list(paths.runs().glob("*/record.json"))


def test_unknown_kind_before_any_training(config):
    with pytest.raises(SidaeError, match="Unknown kind 'svm'; choose from linear"):
        runs.fetch_all([EvalConfig(run=config, kind="svm")], device="cpu", log=quiet)
    assert not paths.runs().exists()


@pytest.mark.parametrize("damage", [
    lambda b: b[:40], lambda b: b"", lambda b: b"[1]", lambda b: b.replace(b'"loss":', b'"loss":NaN,"x":'),
    lambda b: b"\x80\x04\x95", lambda b: b.replace(b'"check":', b'"x":1' + b"0" * 400 + b',"unchecked":'),
], ids=["truncated", "empty", "a list", "NaN", "pickle", "too long an integer"])  # fmt: skip
def test_damaged_record_is_named(config, damage):
    runs.fetch_all([config], device="cpu", log=quiet)
    path = runs.folder(config) / "record.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SidaeError, match="record .* is damaged; move it away"):
        runs.find(config)


def test_a_record_filed_under_another_key_is_refused(config):
    runs.fetch_all([config], device="cpu", log=quiet)
    other = config.replace(seed=1)
    runs.folder(config).rename(runs.folder(other))
    with pytest.raises(SidaeError, match="damaged"):
        runs.find(other)


def test_time_is_up(config):
    with pytest.raises(train.Stopped, match="1 of 1 records are left"):
        runs.fetch_all([config], device="cpu", minutes=1e-9, log=quiet)
    assert (runs.folder(config) / "checkpoint.safetensors").exists()
    runs.fetch_all([config], device="cpu", minutes=10, log=quiet)
    assert not (runs.folder(config) / "checkpoint.safetensors").exists()


def _fetch(config: dict) -> str:
    log: list[str] = []
    runs.fetch_all([RunConfig.from_dict(config)], device="cpu", log=log.append)
    return " ".join(log)


@pytest.mark.slow
def test_two_processes_train_it_once(config):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        logs = pool.map(_fetch, [config.to_dict()] * 2, chunksize=1)
    assert sum("trained" in line for line in logs) == 1


def test_command_line(store, cli):
    """Runs without Jupyter, says what is recorded; with --kinds only those evaluations, which nothing computes again."""
    some = cli("run", "accuracy_vs_epochs", "--scale", "smoke", "--datasets", "digits", "--kinds", "linear", "classifier")
    assert some.returncode == 0, some.stderr
    assert "8 runs and 18 evaluations are recorded" in some.stdout and "trained simsiam" in some.stdout
    kinds = [r["kind"] for r in runs.every("eval-*", (paths.runs(),))]
    assert sorted(kinds) == 4 * ["classifier"] + 14 * ["linear"]
    before = {p: p.stat().st_mtime_ns for p in paths.runs().glob("*/*.json")}
    command = ("run", "accuracy_vs_epochs", "--scale", "smoke", "--datasets", "digits", "--device", "cpu")
    first = subprocess.run([sys.executable, "-m", "sidae_lib", *command], capture_output=True, text=True, cwd=paths.ROOT)
    assert first.returncode == 0, first.stderr
    assert "8 runs and 46 evaluations are recorded" in first.stdout and "trained simsiam" not in first.stdout
    kept = {p: p.stat().st_mtime_ns for p in paths.runs().glob("*/*.json")}
    assert len(kept) == 8 + 46 and kept.items() >= before.items()
    again = cli(*command)
    assert again.returncode == 0 and "trained simsiam" not in again.stdout
    assert {p: p.stat().st_mtime_ns for p in paths.runs().glob("*/*.json")} == kept
    listed = cli("list", "--scale", "smoke").stdout.splitlines()
    assert listed[0] == "smoke:" and listed[1].split(maxsplit=1) == ["sidae_step_by_step", "all 1 recorded"]
    assert re.fullmatch(r"  all, each once +5\d of ([\d,]+) recorded; \d+ runs to train and [\d,]+ evaluations to make; .*",
                        listed[-1])
    table = figures.summary(figures.evaluations(list(runs.every("eval-*"))))
    assert len(table) == 46 and set(table["n"]) == {1} and table["se"].isna().all()


@pytest.mark.parametrize("args, sentence", [
    (("run", "figure_9"), "Unknown figure 'figure_9'; choose from sidae_step_by_step"),
    (("run", "accuracy_vs_epochs", "--scale", "huge"), "Unknown scale 'huge'; choose from smoke"),
    (("run", "accuracy_vs_epochs", "--scale", "smoke", "--datasets", "imagenet"), "no data set 'imagenet'"),
    (("run", "accuracy_vs_epochs", "--scale", "smoke", "--device", "tpu"), "Unknown device 'tpu'"),
    (("run", "accuracy_vs_epochs", "--scale", "laptop", "--datasets", "digits"), "no length for 'digits'"),
    (("run", "accuracy_vs_epochs", "--scale", "laptop", "--data", "/nonexistent"), "--data /nonexistent is not a folder"),
])  # fmt: skip
def test_command_line_refuses(store, cli, args, sentence):
    done = cli(*args)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
    assert not paths.runs().exists()


def test_command_line_minutes(store, cli):
    done = cli("run", "accuracy_vs_epochs", "--scale", "smoke", "--minutes", "1e-9", "--device", "cpu")
    assert done.returncode == 0 and "Time is up" in done.stdout and "records are left" in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_store_that_cannot_be_written(config):
    paths.runs().mkdir()
    paths.runs().chmod(0o500)
    with pytest.raises(SidaeError, match="cannot be written"):
        runs.fetch_all([config], device="cpu", log=quiet)


def test_store_in_place_of_a_file(config):
    paths.runs().write_text("")
    with pytest.raises(SidaeError, match="cannot be written.*SIDAE_RUNS"):
        runs.fetch_all([config], device="cpu", log=quiet)


def test_summary_is_mean_and_standard_error():
    import pandas as pd

    frame = pd.DataFrame({"method": "sidae", "seed": range(4), "accuracy": [1.0, 2.0, 3.0, 6.0], "run_key": list("abcd"),
                          "hardware": "a processor"})
    row = figures.summary(frame).iloc[0]
    assert (row["mean"], row["n"]) == (3.0, 4)
    assert row["se"] == pytest.approx((14 / 3) ** 0.5 / 2, abs=1e-4)  # sd with n - 1, over sqrt(n)


def test_ten_thousand_records_to_a_table(store):
    """Issue: a store with 10,000 records to a table in 2 s on a quiet machine; the bound here leaves room for a busy one."""
    run = RunConfig(method="sidae", data="x")
    for seed in range(100):
        config = run.replace(seed=seed)
        folder = paths.runs() / config.key()
        folder.mkdir(parents=True)
        for n in range(100):
            e = EvalConfig(run=config, label_seed=n)
            record = {"config": e.to_dict(), "key": e.key(), "run_key": config.key(), "epoch": 200, "kind": "linear",
                      "data": {"name": "x", "display": "X"}, "accuracy": 50.0, "per_class": [50.0] * 10, "n_train": 1,
                      "n_test": 1, "confusion": [[1] * 10] * 10, "provenance": {"device": "cpu", "threads": 2}}  # fmt: skip
            (folder / f"eval-{e.key()}.json").write_text(json.dumps(record))
    began = time.perf_counter()
    assert len(figures.evaluations(list(runs.every("eval-*")))) == 10_000
    assert time.perf_counter() - began < 10


def test_time_left_is_estimated_from_recorded_rates(config):
    longer = config.replace(epochs=3)
    assert runs.seconds_each([longer]) is None  # nothing like it is recorded
    [record] = runs.fetch_all([config], device="cpu", log=quiet)
    expected = {longer: pytest.approx(3 * 256 * record["seconds"] / record["images"], rel=1e-6)}
    assert runs.seconds_each([longer]) == runs.seconds_each([longer], known=runs.rates()) == expected
    assert runs.seconds_each([]) == {}


def test_a_gpus_seconds_are_no_cpus(config, cli):
    """What a GPU and an AMD processor with a Radeon inside have recorded tells each kind its own; of none nothing is said."""
    evaluation = EvalConfig(run=config, kind="knn", labels=0.1)
    made = runs.fetch_all([config, evaluation], device="cpu", log=quiet)
    seconds = {}
    for n, name in enumerate(("NVIDIA H100 80GB HBM3", "AMD Instinct MI300X", "AMD Ryzen 7 5800H with Radeon Graphics"), 1):
        for c, r in zip((config, evaluation), made):
            c = c.replace(seed=n) if c is config else c.replace(run=config.replace(seed=n))
            (folder := paths.records() / runs._run(c).key()).mkdir(parents=True, exist_ok=True)
            own = r | {"config": c.to_dict(), "key": c.key(), "seconds": 256.0 * 10**n, "provenance": {"device": name}}
            (folder / runs._name(c)).write_text(json.dumps({k: v for k, v in own.items() if k != "check"}))
    shutil.rmtree(paths.runs())
    wanted = [config, EvalConfig(run=config, kind="knn", labels=0.1)]
    for device, each in (("cpu", 1000), ("cuda", 55)):
        assert runs.seconds_each(wanted, known=runs.rates(device)) == {config: pytest.approx(2 * 256 * each)}
        seconds[device] = runs.rates(device)
    assert runs.rates() == seconds[train.device_of("auto").type]
    shutil.rmtree(paths.records() / config.replace(seed=3).key())  # the only CPU's
    assert runs.seconds_each(wanted, known=runs.rates("cpu")) is None and runs.rates("cuda") == seconds["cuda"]
    plan = ("run", "accuracy_vs_epochs", "--scale", "smoke", "--plan", "1", "--device")
    assert "No such run is recorded on a CPU, so its time is unknown" in cli(*plan, "cpu").stdout
    if not torch.cuda.is_available():
        assert cli("list", "--scale", "smoke").stdout.splitlines()[-1].endswith("; no time known on a CPU")


def test_who_works_on_a_run_shares_it_with_nobody(config):
    with runs._locked(config), open(runs.folder(config) / "lock") as f, pytest.raises(BlockingIOError):
        fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with open(runs.folder(config) / "lock") as f:
        fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)  # it was given back
