"""The store: computed once, found again, shared by processes, never half-written."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from sidae_lib import evaluate, experiments, frames, paths, probes, runs, store, tasks, train
from sidae_lib.config import EvalConfig, RunConfig, SidaeError


@pytest.fixture
def config(own_store):
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
    assert store.missing([config, *evals]) == []


def test_an_evaluation_added_later_leaves_the_run_alone(config):
    run = runs.fetch_all([config], device="cpu", log=quiet)[0]
    before = (store.folder(config) / "record.json").read_bytes()
    runs.fetch_all([EvalConfig(run=config, kind="knn")], device="cpu", log=quiet)
    assert (store.folder(config) / "record.json").read_bytes() == before
    assert run["epochs"][0]["epoch"] == 1 and "weights" not in json.dumps(run)


def test_an_epoch_that_was_not_kept_is_trained_again(config):
    longer = config.replace(epochs=2)
    runs.fetch_all([longer], device="cpu", log=quiet)
    assert not store.backbone(longer, 1).exists()
    [record] = runs.fetch_all([EvalConfig(run=longer, kind="knn", epoch=1)], device="cpu", log=quiet)
    assert record["epoch"] == 1 and store.backbone(longer, 1).exists()


def test_one_that_fails_does_not_stop_the_others(config):
    bad = config.replace(lr=1e30)
    with pytest.raises(SidaeError, match=f"1 of 2 runs failed, the rest are kept. simsiam {bad.key()}: .*not finite"):
        runs.fetch_all([bad, config], device="cpu", log=quiet)
    assert store.find(config) and not store.find(bad)


def test_whatever_fails_is_named_and_the_rest_is_kept(config, monkeypatch):
    """A network beyond any memory and a matrix that has no inverse fail inside of other libraries, in their way."""
    monkeypatch.setattr(probes, "logistic", lambda *_: np.linalg.inv(np.zeros((1, 1))))
    bad, few = config.replace(hidden=2**40), EvalConfig(run=config, kind="logistic")
    good = [config, EvalConfig(run=config, kind="knn"), config.replace(seed=1)]
    with pytest.raises(SidaeError, match=f"(?s)2 of 3 runs failed, the rest are kept.*simsiam {bad.key()}: .*RuntimeError: "
                                         f".*simsiam {config.key()}: logistic {few.key()}: LinAlgError: Singular") as e:
        runs.fetch_all([bad, few, *good], device="cpu", log=quiet)
    assert store.missing([bad, few, *good]) == [bad, few]
    assert isinstance(e.value.__cause__, SidaeError)
    assert [note.splitlines()[-1].split(":")[0] for note in e.value.__notes__] == ["RuntimeError", "numpy.linalg.LinAlgError"]
    assert all("Traceback" in note and ", line " in note for note in e.value.__notes__)


def test_the_command_line_shows_where_it_failed(own_store, cli, monkeypatch):
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
    assert len(store.missing([config, config.replace(seed=1)])) == 2


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


def test_time_is_up(config):
    with pytest.raises(train.Stopped, match="1 of 1 records are left"):
        runs.fetch_all([config], device="cpu", minutes=1e-9, log=quiet)
    assert (store.folder(config) / "checkpoint.safetensors").exists()
    runs.fetch_all([config], device="cpu", minutes=10, log=quiet)
    assert not (store.folder(config) / "checkpoint.safetensors").exists()


def test_command_line(own_store, cli):
    """Runs without Jupyter, says what is recorded; with --kinds only those evaluations, which nothing computes again."""
    some = cli("run", "accuracy_vs_epochs", "--scale", "smoke", "--datasets", "digits", "--kinds", "linear", "classifier")
    assert some.returncode == 0, some.stderr
    assert "8 runs and 18 evaluations are recorded" in some.stdout and "trained simsiam" in some.stdout
    kinds = [r["kind"] for r in store.every("evaluation", store.local())]
    assert sorted(kinds) == 4 * ["classifier"] + 14 * ["linear"]
    before = {p: p.stat().st_mtime_ns for p in paths.runs().glob("*/*.json")}
    command = ("run", "accuracy_vs_epochs", "--scale", "smoke", "--datasets", "digits", "--device", "cpu")
    first = cli(*command)
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
    table = frames.summary(frames.evaluations(list(store.every("evaluation"))))
    assert len(table) == 46 and set(table["n"]) == {1} and table["se"].isna().all()


@pytest.mark.parametrize("args, sentence", [
    (("run", "figure_9"), "Unknown figure 'figure_9'; choose from sidae_step_by_step"),
    (("run", "accuracy_vs_epochs", "--scale", "huge"), "--scale: invalid choice: 'huge' (choose from 'smoke'"),
    (("run", "accuracy_vs_epochs", "--scale", "smoke", "--datasets", "imagenet"), "no data set 'imagenet'"),
    (("run", "accuracy_vs_epochs", "--scale", "smoke", "--device", "tpu"), "--device: invalid choice: 'tpu'"),
    (("run", "accuracy_vs_epochs", "--scale", "laptop", "--datasets", "digits"), "no length for 'digits'"),
    (("run", "accuracy_vs_epochs", "--scale", "laptop", "--data", "/nonexistent"), "--data /nonexistent is not a folder"),
])  # fmt: skip
def test_command_line_refuses(own_store, cli, args, sentence):
    done = cli(*args)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
    assert not paths.runs().exists()


def test_command_line_minutes(own_store, cli):
    done = cli("run", "accuracy_vs_epochs", "--scale", "smoke", "--minutes", "1e-9", "--device", "cpu")
    assert done.returncode == 0 and "Time is up" in done.stdout and "records are left" in done.stdout


def test_summary_is_mean_and_standard_error():
    import pandas as pd

    frame = pd.DataFrame({"method": "sidae", "seed": range(4), "accuracy": [1.0, 2.0, 3.0, 6.0], "run_key": list("abcd"),
                          "hardware": "a processor"})
    row = frames.summary(frame).iloc[0]
    assert (row["mean"], row["n"]) == (3.0, 4)
    assert row["se"] == pytest.approx((14 / 3) ** 0.5 / 2, abs=1e-4)  # sd with n - 1, over sqrt(n)


def test_dependencies_come_first(own_store, monkeypatch):
    """A run's own dependencies and an evaluation's; the backbones that are needed of each."""
    encoder, second, third = (experiments.run("simsiam", "digits", "smoke", s, epochs=e) for s, e in ((0, 4), (1, 1), (2, 1)))
    monkeypatch.setattr(tasks, "dependencies", lambda c: [c.run] if isinstance(c, EvalConfig) else
                        {second: [encoder], third: [second]}.get(c, []))  # fmt: skip
    asked = [EvalConfig(run=third, kind="knn"), EvalConfig(run=encoder, kind="knn", epoch=2), second]
    jobs = tasks.plan(asked, log=quiet)
    assert [(j.run, j.epochs, len(j.evals)) for j in jobs] == [(encoder, {2, 4}, 1), (second, {1}, 0), (third, {1}, 1)]


def test_what_a_recorded_run_is_still_asked_for_is_not_last(config):
    second = config.replace(seed=1)
    knn = {c: EvalConfig(run=c, kind="knn") for c in (config, second)}
    runs.fetch_all([config], device="cpu", log=quiet)
    jobs = tasks.plan([config, second, *knn.values()], log=quiet)
    assert [(j.run, j.evals) for j in jobs] == [(c, [knn[c]]) for c in (config, second)]


def test_machines_is_the_smallest_number_that_first_fit_finds():
    assert runs.machines([3, 3, 3, 3], 6) == 2 and runs.machines([3, 3, 3, 3], 5.9) == 4
    assert runs.machines([5, 4, 1, 2], 6) == 2 and runs.machines([], 1) == 0
    with pytest.raises(SidaeError, match="One run alone takes 2.00 hours"):
        runs.machines([1, 7200], 3600)


def test_a_plan_of_the_paper_ten_times_over(own_store, cli):
    """Hours and machines by the rate given; nothing is computed."""
    once, often = (cli("run", "accuracy_vs_epochs", "--scale", "paper", "--seeds", str(n), "--plan", "24", "--rate", "8000")
                   for n in (5, 50))
    pattern = (r"([\d,]+) runs to train and ([\d,]+) evaluations to make; about ([\d,.]+) hours\n"
               r"The longest run takes ([\d.]+) hours; (\d+) machines")
    found = [re.search(pattern, p.stdout) for p in (once, often)]
    assert all(found), once.stdout + once.stderr + often.stderr
    a, b = ([float(v.replace(",", "")) for v in f.groups()] for f in found)
    assert [y / x for x, y in zip(a[:3], b[:3])] == pytest.approx([10, 10, 10], rel=0.01) and b[4] >= 9 * a[4] / 2
    assert not paths.runs().exists()


def test_time_left_is_estimated_from_recorded_rates(config):
    longer, other = config.replace(epochs=3), config.replace(batch=32)
    knn = EvalConfig(run=longer, kind="knn")
    assert runs.seconds_each([longer], runs.rates()) is None  # nothing like it is recorded
    [record, probe] = runs.fetch_all([config, EvalConfig(run=config, kind="knn")], device="cpu", log=quiet)
    each = pytest.approx(3 * 256 * record["seconds"] / record["images"] + probe["seconds"], rel=1e-6)
    assert runs.seconds_each([longer, knn], known := runs.rates()) == {longer: each}
    assert runs.seconds_each([other], known) is None and runs.seconds_each([other], known, 128)[other] == 2  # 256 images
    assert runs.seconds_each([], known) == {}


def test_a_gpus_seconds_are_no_cpus(config, cli):
    """What a GPU and an AMD processor with a Radeon inside have recorded tells each kind its own; of none nothing is said."""
    evaluation = EvalConfig(run=config, kind="knn", labels=0.1)
    made = runs.fetch_all([config, evaluation], device="cpu", log=quiet)
    seconds = {}
    shutil.rmtree(paths.runs())
    for n, name in enumerate(("NVIDIA H100 80GB HBM3", "AMD Instinct MI300X", "AMD Ryzen 7 5800H with Radeon Graphics"), 1):
        for c, r in zip((config, evaluation), made):
            c = c.replace(seed=n) if c is config else c.replace(run=config.replace(seed=n))
            own = {"run_key": c.run.key()} if "run_key" in r else {}
            store.keep(c, r | own | {"config": c.to_dict(), "key": c.key(), "seconds": 256.0 * 10**n,
                                     "provenance": {"device": name}})  # fmt: skip
    wanted = [config, EvalConfig(run=config, kind="knn", labels=0.1)]
    for device, each in (("cpu", 1000), ("cuda", 55)):
        assert runs.seconds_each(wanted, runs.rates(device)) == {config: pytest.approx(2 * 256 * each)}
        seconds[device] = runs.rates(device)
    assert runs.rates() == seconds[train.device_of("auto").type]
    shutil.rmtree(store.folder(config.replace(seed=3)))  # the only CPU's
    assert runs.seconds_each(wanted, runs.rates("cpu")) is None and runs.rates("cuda") == seconds["cuda"]
    plan = ("run", "accuracy_vs_epochs", "--scale", "smoke", "--plan", "1", "--device")
    assert "; no time known on a CPU\n--rate N says" in cli(*plan, "cpu").stdout
    if not torch.cuda.is_available():
        assert cli("list", "--scale", "smoke").stdout.splitlines()[-1].endswith("; no time known on a CPU")
