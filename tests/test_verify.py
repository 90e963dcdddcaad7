"""`verify KEY`: a recorded run is trained again; what was altered is found, what a device differs by is not held against it.

`python tests/test_verify.py` makes the small record anew that lies beside the tests.
"""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from sidae_lib import adoption, data, experiments, paths, runs, store, train, verify
from sidae_lib.config import EvalConfig, RunConfig, SidaeError, digest

FIXTURE = Path(__file__).with_name("fixtures") / "recorded"
SMALLEST = "3e918c4a384d758a"  # of the published records, the one that a CPU repeats the fastest


def wanted() -> list[store.Config]:
    """SidAE on the digits, which come with scikit-learn, and two evaluations on the way and at the end."""
    run = experiments.run("sidae", "digits", "smoke", epochs=3)
    return [run, EvalConfig(run=run, kind="knn", k=5), EvalConfig(run=run, kind="logistic", epoch=1, labels=0.5)]


def quiet(_: str) -> None:
    pass


@pytest.fixture
def again(own_store, monkeypatch, tmp_path, cli):
    """`verify` of what is published, with a look that nothing was written but what it says."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))

    def call(*args: str):
        before = {p: p.read_bytes() for folder in (paths.records(), paths.runs()) for p in folder.rglob("*") if p.is_file()}
        done, environment = cli("verify", *args, "--device", "cpu"), dict(os.environ)
        assert before == {p: p.read_bytes() for folder in (paths.records(), paths.runs()) for p in folder.rglob("*")
                          if p.is_file()}  # fmt: skip
        assert not list((tmp_path / "tmp").iterdir()) and environment == dict(os.environ)
        return done

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The records of what is wanted, made once by this machine."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("SIDAE_RUNS", str(folder))
        m.setenv("SIDAE_RECORDS", os.devnull)
        runs.fetch_all(wanted(), device="cpu", log=quiet)
    return folder


@pytest.fixture
def published(own_store, made) -> list[store.Record]:
    adoption.publish(store.every(where=store.local(made)))
    return [store.find(c) for c in wanted()]


def alter(record: store.Record, **changes) -> None:
    """Publishes a record anew, with a checksum that fits."""
    others = [r for r in store.every() if r["key"] != record["key"]]
    adoption.publish([*others, record | changes])


def test_a_run_of_this_machine_is_repeated_to_the_bit(published, again):
    run, knn, logistic = published
    done = again(run["key"][:7])
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith(
        f"The run {run['key']} is repeated to the bit, and its 6 numbers with it. Recorded on "), done.stdout + done.stderr
    for term in ("loss", "l_si", "l_dae", "z_std"):
        assert f"\n{term}, epoch " in done.stdout
    for r in (knn, logistic):
        assert f"\n{r['kind']} {r['key']}, epoch {r['epoch']}, " in done.stdout and f"{r['accuracy']:.7g}" in done.stdout


def test_what_was_altered_is_found(published, again):
    """By the last digit, where the weights show that it is the same machine."""
    run, knn, _ = published
    epochs = json.loads(json.dumps(run["epochs"]))
    epochs[1]["loss"] *= 1 + 1e-6
    alter(run, epochs=epochs)
    alter(knn, accuracy=knn["accuracy"] + 0.1)
    done = again(run["key"])
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith(
        f"The run {run['key']} is not repeated: 2 of 6 numbers differ by more than is allowed (loss, epoch 2; knn {knn['key']}")


def test_another_machine_is_allowed_its_bits_and_no_more(published):
    """As if made elsewhere: other weights, and numbers moved within and beyond what is allowed."""
    def moved(epoch: int, term: str, by: float, points: float = 0.0) -> list[str]:
        there = json.loads(json.dumps(published))
        there[0]["files"] = {name: "0" * 64 for name in there[0]["files"]}
        for r in there[1:]:
            r["backbone"] = "0" * 64
        there[0]["epochs"][epoch][term] += by * max(abs(e[term]) for e in there[0]["epochs"])
        there[1]["accuracy"] += points
        table, same = verify.compare(there, published)
        assert not same and len(table) == 6 and (table["allowed"] > 0).all()
        return [what.split(",")[0].split()[0] for what in table.index[table["difference"] > table["allowed"]]]

    for term in ("loss", "l_si", "l_dae", "z_std"):
        for epoch, allowed in enumerate((verify.FIRST, verify.TERMS, verify.TERMS)):
            assert moved(epoch, term, 0.9 * allowed) == [] and moved(epoch, term, -1.2 * allowed) == [term]
    p, n = published[1]["accuracy"] / 100, published[1]["n_test"]
    error = 100 * (2 * p * (1 - p) / n) ** 0.5  # of a difference of two shares of n
    assert moved(0, "loss", 0.0, -0.8 * verify.ERRORS * error) == []
    assert moved(0, "loss", 0.0, -2 * verify.ERRORS * error) == ["knn"]
    assert moved(2, "loss", 0.9 * verify.TERMS, -1.5 * verify.ERRORS * error) == []  # where the means have moved too
    assert moved(0, "loss", float("nan")) == ["loss"]


@pytest.mark.parametrize("change, sentence", [
    ({"epochs": 0, "method": "untrained", "augment": "none"}, "is not trained, so there is nothing to train again"),
    ({"method": "byol", "method_recipe": 1}, "older recipe of byol"),
    ({"data": "0123456789abcdef"}, "No set with the content"),
])  # fmt: skip
def test_a_run_that_cannot_be_repeated(own_store, again, change, sentence, monkeypatch):
    monkeypatch.setenv("SIDAE_DATA", str(own_store))  # no sets but those of packages
    config = RunConfig(**{"method": "simsiam", "data": data.identify("digits")} | change)
    key = digest(config.to_dict())[:16]
    alter({"config": config.to_dict(), "key": key, "steps": config.epochs, "seconds": 1.0,
           "provenance": {"device": "x", "threads": 1}})  # fmt: skip
    done = again(key)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_key_must_name_one_run(own_store, again):
    for name in ("ab00/record.json", "ab00/eval-cd00.json"):
        (paths.runs() / name).parent.mkdir(parents=True, exist_ok=True)
        (paths.runs() / name).write_text("{}")
    paths.records().mkdir()
    (paths.records() / "any.jsonl").write_text(f'{{"key":"{"ab11" * 4}",')
    for key, sentence in (("ab", "2 recorded runs have keys that begin with 'ab'"), ("*", "No recorded runs have keys"),
                          ("", "2 recorded runs"), ("../runs/ab00", "No recorded runs have keys that begin with"),
                          ("cd", "It begins keys of evaluations, of the run ab00."), ("ab0", "damaged"),
                          ("ab1", "damaged")):  # fmt: skip
        done = again(key)
        assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_what_is_interrupted_leaves_nothing(published, again, monkeypatch):
    """A real signal in the middle of training."""
    monkeypatch.setattr(train, "LISTENERS", [lambda config, history: os.kill(os.getpid(), signal.SIGINT)])
    done = again(published[0]["key"])
    assert done.returncode == 130 and done.stdout.splitlines()[-1].endswith("nothing of this verification is kept.")


def test_a_run_on_mined_pairs_has_its_encoder_trained_too(own_store, again):
    encoder = experiments.run("simsiam", "digits", "smoke", epochs=1)
    run = encoder.replace(seed=1, pairs="mined", encoder=encoder, pair_share=1.0, pair_low=-1.0, pair_high=1.0, pair_count=30)
    runs.fetch_all([run], device="cpu", log=quiet)
    done = again(run.key())
    assert done.returncode == 0 and f"trained simsiam {encoder.key()}" in done.stdout and "to the bit" in done.stdout


def test_the_small_record_beside_the_tests(own_store, again):
    """Made once, on one machine, and repeated here, whatever this one is."""
    shutil.copytree(FIXTURE, paths.records())
    done = again(wanted()[0].key())
    assert done.returncode == 0 and "is repeated" in done.stdout.splitlines()[-1], done.stdout + done.stderr


@pytest.mark.slow
def test_the_smallest_published_record(again, monkeypatch):
    monkeypatch.delenv("SIDAE_RECORDS")
    try:
        data.load("cifar10")
    except SidaeError:
        pytest.skip("no CIFAR-10 here")
    done = again(SMALLEST)
    assert done.returncode == 0 and "is repeated" in done.stdout.splitlines()[-1], done.stdout + done.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"SIDAE_RUNS": folder, "SIDAE_RECORDS": str(FIXTURE), "SIDAE_THREADS": "1"}
        adoption.publish(runs.fetch_all(wanted(), device="cpu"))
