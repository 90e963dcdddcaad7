"""The store's files: found by their keys, whole or not there, named where they are damaged."""

import fcntl
import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from sidae_lib import adoption, data, evaluate, experiments, frames, paths, runs, store, train
from sidae_lib.config import EvalConfig, RunConfig, SidaeError, digest

RUN = experiments.run("simsiam", "digits", "smoke", epochs=1)
KNN = EvalConfig(run=RUN, kind="knn", k=5)


def quiet(_: str) -> None:
    pass


def made(config: store.Config, **more) -> store.Record:
    """A record as short as it can be."""
    out = {"config": config.to_dict(), "key": config.key()}
    if isinstance(config, EvalConfig):
        out |= {"run_key": config.run.key(), "epoch": config.epoch, "kind": config.kind, "accuracy": 50.0}
    return out | {"seconds": 1.5} | more


def publish(*configs: store.Config) -> list[store.Record]:
    adoption.publish([made(c) for c in configs])
    return [store.find(c) for c in configs]


def file() -> Path:
    return data.records_file(RUN.data)


def unpacked(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


def unpack() -> None:
    """Makes the published files plain, as they were."""
    for path in paths.records().iterdir():
        path.with_suffix("").write_text(unpacked(path))
        path.unlink()


# --- published records: a few files of lines ------------------------------------------------------------------------


def test_published_records_are_found_and_never_written(own_store):
    record = store.keep(RUN, made(RUN, steps=4, files={}))
    adoption.publish([record])
    store.file_of(RUN).unlink()
    before = file().read_bytes()
    assert store.find(RUN) == record and list(store.every("run")) == [record] == list(store.every())
    runs.fetch_all([KNN], device="cpu", log=quiet)  # trains it for its weights
    assert file().read_bytes() == before and store.find(RUN)["seconds"] != 1.5  # the local record counts
    assert [r["key"] for r in store.every("evaluation")] == [KNN.key()]


def test_a_line_holds_a_record_and_its_checksum_sorted_by_run_kind_epoch_and_key(own_store):
    asked = [RUN, KNN, *(EvalConfig(run=RUN, kind=k, epoch=e) for k in ("linear", "knn") for e in (1, 0))]
    asked += [RUN.replace(seed=s) for s in range(5)]
    publish(*asked)
    records = [json.loads(line) for line in unpacked(file()).splitlines()]
    place = [(r.get("run_key", r["key"]), r.get("kind", ""), r.get("epoch", 0), r["key"]) for r in records]
    assert place == sorted(place) and {r["key"] for r in records} == {c.key() for c in asked}
    for r in records:
        check = r.pop("check")
        assert check == digest(r) and r in [made(c) for c in asked]


def test_a_new_record_only_adds_lines_and_a_full_file_goes_on_in_another(own_store, monkeypatch):
    many = [RUN.replace(seed=s) for s in range(40)]
    size = len(store.as_line(made(RUN))) + 1
    monkeypatch.setattr(adoption, "FILE_BYTES", 30 * size)
    publish(*many[:20])
    assert [p.name for p in paths.records().iterdir()] == ["digits.jsonl.gz"]
    before = unpacked(file()).splitlines()
    publish(*many[:21])
    [new] = set(after := unpacked(file()).splitlines()) - set(before)
    assert [line for line in after if line != new] == before
    assert [r["key"] for r in publish(*many)] == [c.key() for c in many]
    files = sorted(paths.records().iterdir())
    assert [p.name for p in files] == ["digits-2.jsonl.gz", "digits.jsonl.gz"]
    assert all(len(unpacked(p)) <= adoption.FILE_BYTES < 40 * size for p in files)
    sides = [{json.loads(line)["key"][0] for line in unpacked(p).splitlines()} for p in files]
    assert max(sides[1]) < min(sides[0])  # the key alone says where
    publish(*many[:3])
    assert [p.name for p in paths.records().iterdir()] == ["digits.jsonl.gz"]


def test_a_set_has_a_file_of_its_name(own_store):
    other = RunConfig(method="simsiam", data="0123456789abcdef")
    transfer = EvalConfig(run=RUN, kind="knn", data=other.data)  # belongs to its run's set
    publish(RUN.replace(data="131428effbc89b28"), other, RUN, transfer)
    assert {p.name: unpacked(p).count("\n") for p in paths.records().iterdir()} == {
        "cifar-10-jpeg-copy.jsonl.gz": 1, "0123456789abcdef.jsonl.gz": 1, "digits.jsonl.gz": 2}  # fmt: skip


@pytest.mark.parametrize("damage", [
    lambda line: line[: len(line) // 2], lambda line: line.replace("50.0", "51.0"), lambda line: line.replace(":50.0", ":NaN"),
    lambda line: "<<<<<<< ours", lambda line: line.replace('"key":"', '"key":"0', 1), lambda line: '{"a":' * 10**5,
], ids=["truncated", "changed", "NaN", "conflict", "another key", "too deep"])  # fmt: skip
def test_a_damaged_line_is_named_and_the_rest_is_used(own_store, damage):
    others = [RUN, EvalConfig(run=RUN, kind="linear")]
    publish(*others, KNN)
    lines = unpacked(file()).splitlines()
    [n] = [n for n, line in enumerate(lines) if KNN.key() in line]
    lines[n] = damage(lines[n])
    file().write_bytes(adoption.packed(("\n".join(lines) + "\n").encode()))
    named = f"Line {n + 1} of {file()} is no whole record"
    with pytest.warns(UserWarning, match=named):
        assert store.find(KNN) is None
    assert store.recorded(others) == [store.read(store.published()[RUN.key(), c.key()]) for c in others]
    with pytest.warns(UserWarning, match=named):
        assert len(list(store.every())) == 2
    before = file().read_bytes()
    store.keep(KNN, made(KNN))
    refusal = f"Lines of {file()} are damaged; .* Nothing is filed"  # the line would be lost
    with pytest.raises(SidaeError, match=refusal), pytest.warns(match=named):
        adoption.adopt(paths.runs(), log=quiet)
    assert file().read_bytes() == before


def test_a_file_that_changed_is_read_again_and_its_lines_may_be_anyones(own_store, monkeypatch):
    publish(RUN)
    monkeypatch.setattr(store, "lines", None)  # the index is kept
    assert store.find(RUN) and not store.find(KNN)
    monkeypatch.undo()
    monkeypatch.setenv("SIDAE_RECORDS", str(own_store / "records"))
    with gzip.open(file(), "at") as f:
        f.write(json.dumps(made(KNN), indent=None) + "\n\n")  # in another order, with spaces and without a checksum
    assert store.find(KNN) == made(KNN)


def test_a_published_file_is_its_lines_packed_and_its_bytes_are_those_of_any_machine(own_store):
    asked = [RUN, KNN, *(RUN.replace(seed=s) for s in range(1, 50))]
    publish(*asked)
    assert sorted(unpacked(file()).splitlines(keepends=True)) == sorted(store.as_line(made(c)) + "\n" for c in asked)
    first = file().read_bytes()
    assert first[:10] == bytes.fromhex("1f8b 0800 00000000 02ff")  # no name, no time, level 9, no system
    publish(*reversed(asked))
    assert file().read_bytes() == first
    file().write_bytes(other := gzip.compress(gzip.decompress(first), 1))  # as another zlib may pack it
    publish(*asked)
    assert file().read_bytes() == other != first
    publish(*asked[1:])
    publish(*asked)
    assert file().read_bytes() == first


def test_plain_files_are_read_and_adopt_packs_them(own_store, monkeypatch):
    """Beside the packed file of the same set they add nothing twice, and of two lines with one key the packed one counts."""
    monkeypatch.setattr(adoption, "FILE_BYTES", 20 * len(store.as_line(made(RUN))))
    many = [RUN.replace(seed=s) for s in range(30)]
    publish(*many)
    packed = {p: p.read_bytes() for p in paths.records().iterdir()}
    before = dict(store.published())
    unpack()
    assert len(packed) == 2 and all(path.with_suffix("").exists() and not path.exists() for path in packed)
    assert [line._replace(file=f"{line.file}.gz") for line in store.published().values()] == [*before.values()]
    adoption.adopt(paths.runs().parent, log=quiet)  # where nothing is new
    assert {p: p.read_bytes() for p in packed} == packed and {p.name for p in paths.records().iterdir()} - {".lock"} == {
        p.name for p in packed}  # fmt: skip
    changed = made(many[0], seconds=2.5)
    file().with_suffix("").write_text(store.as_line(changed) + "\n" + store.as_line(made(KNN)) + "\n")
    assert store.published().keys() == {*before, store.id_of(made(KNN))} and store.find(many[0])["seconds"] == 1.5


@pytest.mark.parametrize("damage", [
    lambda b: b[:-9], lambda b: b[: len(b) // 2], lambda b: b[:5], lambda b: b"", lambda b: b"<<<<<<< ours\n",
    lambda b: b[:10] + b"\xff" + b[11:], lambda b: b[:-6] + bytes([b[-6] ^ 8]) + b[-5:],
], ids=["no end", "cut", "cut in its head", "empty", "conflict", "no such block", "another sum"])  # fmt: skip
def test_a_damaged_gzip_file_is_named_and_nothing_is_filed_beside_it_or_from_it(own_store, damage):
    other = RUN.replace(data="131428effbc89b28")
    publish(RUN, KNN, other)
    whole = file().read_bytes()
    file().write_bytes(cut := damage(whole))
    named = f"{file()} is no whole gzip file, so none of its records is read; restore it"
    with pytest.warns(UserWarning, match=named):
        assert store.find(RUN) is None
    with pytest.warns(UserWarning, match=named):
        assert [r["key"] for r in store.every()] == [other.key()]
    store.keep(KNN, made(KNN))
    with pytest.raises(SidaeError, match=f"Lines of {file()} are damaged; .* Nothing is filed"), pytest.warns(match=named):
        adoption.adopt(paths.runs(), log=quiet)
    with pytest.raises(train.Damaged, match=named):
        adoption.publish([made(RUN)])
    assert file().read_bytes() == cut
    paths.records().rename(source := own_store / "copied")
    for place in (source, source / file().name):
        with pytest.raises(SidaeError, match=f"{source / file().name} is no whole gzip file"):
            adoption.adopt(place, log=quiet)
    assert not paths.records().exists()


def test_a_tree_of_records_as_they_were_is_to_be_adopted(own_store, monkeypatch):
    store.keep(RUN, made(RUN))
    paths.runs().rename(paths.records())
    with pytest.warns(UserWarning, match=f"no longer read: .* `python -m sidae_lib adopt {paths.records()}`"):
        assert store.find(RUN) is None
    adoption.adopt(paths.records(), log=quiet)
    assert store.find(RUN)["key"] == RUN.key()


# --- the local store ------------------------------------------------------------------------------------------------


def test_what_could_not_be_read_is_not_written(own_store):
    """Three thousand classes as rows, a NaN, an integer beyond any count: refused while the store is as it was."""
    record, path = store.keep(RUN, made(RUN)), store.file_of(RUN)
    before = path.read_bytes()
    for wrong in ([[0] * 3000] * 3000, float("nan"), 10**19):
        with pytest.raises(SidaeError, match=f"record of {RUN.key()} cannot be filed.*at most 16.*Nothing is written"):
            store.keep(RUN, record | {"confusion": wrong})
        assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_three_thousand_classes_are_recorded_once(own_store, monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.integers(256, size=(3000, 4, 4), dtype=np.uint8), np.arange(3000)
    monkeypatch.setenv("SIDAE_DATA", str(own_store))
    np.savez(own_store / "many.npz", train_images=x, train_labels=y, test_images=255 - x[:200], test_labels=y[:200])
    run = RunConfig(method="untrained", data=data.identify("many"), augment="none", backbone="small_cnn", epochs=0)
    e = EvalConfig(run=run, kind="knn", k=1)
    said: list[str] = []
    [record] = runs.fetch_all([e], device="cpu", log=said.append)
    assert len(record["per_class"]) == 3000 and sum(n for *_, n in record["confusion"]) == record["n_test"] == 200
    assert store.file_of(e).stat().st_size < 300_000
    made = dict.fromkeys(store.folder(e).iterdir())
    assert runs.fetch_all([e], device="cpu", log=said.append) == [record] and not any("aside" in line for line in said)
    assert dict.fromkeys(store.folder(e).iterdir()) == made
    matrix = evaluate.confusion(record)
    assert matrix.sum(1).tolist() == [1] * 200 + [0] * 2800 and 100 * matrix.trace() / 200 == pytest.approx(record["accuracy"])


@pytest.mark.parametrize("damage", [
    lambda b: b[:40], lambda b: b"", lambda b: b"[1]", lambda b: b.replace(b'"seconds":', b'"seconds":NaN,"x":'),
    lambda b: b"\x80\x04\x95", lambda b: b.replace(b'"check":', b'"x":1' + b"0" * 400 + b',"unchecked":'),
], ids=["truncated", "empty", "a list", "NaN", "pickle", "too long an integer"])  # fmt: skip
def test_damaged_record_is_named(own_store, damage):
    store.keep(RUN, made(RUN))
    path = store.file_of(RUN)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(train.Damaged, match="record .* is damaged; move it away"):
        store.find(RUN)


def test_a_record_filed_under_another_key_is_refused(own_store):
    for config in (RUN, KNN):
        store.keep(config, made(config))
    other, others = RUN.replace(seed=1), KNN.replace(run=RUN.replace(seed=1))
    store.folder(RUN).rename(store.folder(other))
    (store.folder(other) / store.file_of(KNN).name).rename(store.file_of(others))
    for config in (other, others):
        with pytest.raises(train.Damaged):
            store.find(config)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_store_that_cannot_be_written(own_store):
    paths.runs().mkdir()
    paths.runs().chmod(0o500)
    with pytest.raises(SidaeError, match="cannot be written"):
        runs.fetch_all([RUN], device="cpu", log=quiet)


def test_store_in_place_of_a_file(own_store):
    paths.runs().write_text("")
    with pytest.raises(SidaeError, match="cannot be written.*SIDAE_RUNS"):
        runs.fetch_all([RUN], device="cpu", log=quiet)


def test_ten_thousand_records_to_a_table(own_store):
    """At most 2 s on a quiet machine; the bound here leaves room for a busy one."""
    more = {"data": {"name": "x", "display": "X"}, "per_class": [50.0] * 10, "n_train": 1, "n_test": 1,
            "confusion": [[1] * 10] * 10, "provenance": {"device": "cpu", "threads": 2}}  # fmt: skip
    for seed in range(100):
        run = RunConfig(method="sidae", data="x", seed=seed)
        store.folder(run).mkdir(parents=True)
        for n in range(100):
            e = EvalConfig(run=run, label_seed=n)
            store.file_of(e).write_text(json.dumps(made(e, **more)))
    began = time.perf_counter()
    assert len(frames.evaluations(list(store.every("evaluation")))) == 10_000
    assert time.perf_counter() - began < 10


def test_who_works_on_a_run_shares_it_with_nobody(own_store):
    lock = store.folder(RUN) / "lock"
    with store.locked(RUN), open(lock) as f, pytest.raises(BlockingIOError):
        fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with open(lock) as f:
        fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)  # it was given back
