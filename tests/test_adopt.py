"""Records that another machine made are filed once, whole, and only where they belong."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from killing import fork, kill_at_write

from sidae_lib import __main__, adoption, experiments, paths, runs, store
from sidae_lib.config import EvalConfig, SidaeError, digest

RUN = experiments.run("sidae", "digits", "smoke")
CONFIGS = [RUN, *(EvalConfig(run=RUN, kind="knn", labels=0.2, k=5, epoch=e) for e in (-1, 1, 0))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store with a run and its evaluations at epochs 2, 1 and 0, and the bundle that was written beside it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as m:
        for name in ("runs", "records", "bundle"):
            m.setenv(f"SIDAE_{name.upper()}", str(folder / name))
        runs.fetch_all(CONFIGS, device="cpu", log=lambda line: None)
    return folder


@pytest.fixture
def made(trained, own_store):
    """The configs, with what is `trained` as this test's own store, and its bundle."""
    shutil.copytree(trained / "runs", paths.runs())
    return CONFIGS, Path(shutil.copy(trained / "bundle", own_store / "bundle.jsonl"))


def test_a_bundle_holds_what_the_store_holds(made):
    configs, bundle = made
    lines = [json.loads(line) for line in bundle.read_text().splitlines()]
    assert [r["key"] for r in lines] == [configs[n].key() for n in (3, 2, 0, 1)]  # as each was finished
    for config in configs:
        assert store.find(config) in lines


@pytest.mark.parametrize("way", ["bundle", "store"])
def test_adopted_records_are_found_without_the_store(made, way):
    configs, bundle = made
    before, said = [store.find(c) for c in configs], []
    new = adoption.adopt(bundle if way == "bundle" else paths.runs(), log=said.append)
    assert sorted(new) == sorted(c.key() for c in configs) and "4 of 4 records are new" in said[0]
    shutil.rmtree(paths.runs())
    assert [store.find(c) for c in configs] == before
    assert adoption.adopt(bundle, log=said.append) == [] and "0 of 4" in said[-1] and "4 there already" in said[-1]


def test_a_bundle_or_published_files_that_came_packed_are_adopted(made, monkeypatch):
    configs, bundle = made
    before, lines = [store.find(c) for c in configs], bundle.read_bytes().splitlines(keepends=True)
    shutil.rmtree(paths.runs())
    packed = bundle.with_name("packed")
    packed.mkdir()
    for name, half in (("x.y.jsonl.gz", lines[:2]), ("x.y-2.jsonl.gz", lines[2:])):
        (packed / name).write_bytes(adoption.packed(b"".join(half)))
    for n, place in enumerate((packed, packed / "x.y.jsonl.gz")):
        monkeypatch.setenv("SIDAE_RECORDS", str(bundle.with_name(f"records-{n}")))
        assert len(adoption.adopt(place, log=lambda _: None)) == 4
        assert [store.find(c) for c in configs] == before


@pytest.mark.parametrize("place", ["open", "write", "sync", "rename", "renamed"])
@pytest.mark.parametrize("file", ["digits-2.jsonl.gz", "digits.jsonl.gz"])
def test_a_process_that_dies_while_it_packs_loses_nothing(made, monkeypatch, file, place):
    """The plain files go when all is written. What was read before is read after, and the next call ends the work."""
    bundle, record = made[1], store.find(RUN)
    others = [record | {"config": c.to_dict(), "key": c.key()} for c in (RUN.replace(seed=s) for s in range(1, 9))]
    paths.records().mkdir()
    plain = paths.records() / "digits.jsonl"
    plain.write_text("".join(store.as_line(r) + "\n" for r in others))
    monkeypatch.setattr(adoption, "FILE_BYTES", plain.stat().st_size * 2 // 3)

    def published() -> dict:
        return {ids: store.read(line) for ids, line in store.published().items()}

    def attempt() -> None:
        kill_at_write(file, place)
        adoption.adopt(bundle, log=lambda _: None)

    before = published()
    assert fork(attempt) == -signal.SIGKILL and published() == before and len(before) == 8
    assert len(adoption.adopt(bundle, log=lambda _: None)) == 4
    assert (after := published()) == after | before and len(after) == 12
    assert {"digits-2.jsonl.gz", "digits.jsonl.gz"} <= {p.name for p in paths.records().iterdir()} and not plain.exists()


def test_a_line_cut_short_is_left_out_and_said(made):
    configs, bundle = made
    bundle.write_text(bundle.read_text()[:-20])
    said = []
    assert len(adoption.adopt(bundle, log=said.append)) == 3
    assert said[0].startswith("Line 4 of") and "no whole record" in said[0]


def test_what_is_no_record_is_left_out_and_said(made):
    """JSON of another kind, and a file that is no text at all."""
    _, bundle = made
    bundle.write_bytes(b"[]\n3\n{}\nnull\n\x89PNG\xff\n" + bundle.read_bytes())
    said = []
    assert len(adoption.adopt(bundle, log=said.append)) == 4
    assert [line.split(" of ")[0] for line in said[:-1]] == [f"Line {n}" for n in range(1, 6)]


@pytest.mark.parametrize("change", [{"accuracy": 99.0}, {"config": {}}, {"key": "0" * 16}])
def test_a_changed_record_is_left_out(made, change):
    _, bundle = made
    lines = bundle.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | change)
    bundle.write_text("\n".join(lines))
    assert len(adoption.adopt(bundle, log=lambda line: None)) == 3


@pytest.fixture
def offer(made):
    """Adopts these records of a run, `run` and evaluations by epoch, the trained weights those of a machine; returns what is
    said, and afterwards `filed` what is filed by the machine that made it."""
    configs, bundle = made
    records = {"run": store.find(configs[0]), **{r["epoch"]: r for r in map(store.find, configs[1:])}}

    def by(record: dict, machine: str) -> dict:
        name = lambda sha: sha if machine == "a" else digest([sha, machine])  # noqa: E731
        out = {k: v for k, v in record.items() if k != "check"}
        if "backbone" in out:
            return out | {"backbone": name(out["backbone"]) if out["epoch"] else out["backbone"]}
        return out | {"files": {k: v if "e000" in k else name(v) for k, v in out["files"].items()}}

    def adopt(*what, machine="a") -> str:
        said: list[str] = []
        bundle.write_text("".join(json.dumps(by(records[w], machine)) + "\n" for w in what))
        adoption.adopt(bundle, log=said.append)
        return " ".join(said)

    def filed() -> dict:
        found = [{k: v for k, v in r.items() if k != "check"} for r in store.every("", store.published())]
        return {w: next((m for m in "abc" if by(records[w], m) in found), None) for w in records
                if any(r["key"] == records[w]["key"] for r in found)}  # fmt: skip

    adopt.filed = filed
    return adopt


def test_evaluations_of_other_weights_than_the_filed_run_are_left_out(offer):
    """Two machines made one run as far: what is filed first stays, and the other's evaluations are of another trajectory."""
    offer("run")
    assert "0 of 3" in (said := offer(1, 2, "run", machine="b")) and "3 not known to be of the trajectory" in said
    assert offer.filed() == {"run": "a"}
    assert "1 of 1" in offer(0, machine="b")  # untrained weights are the same


def test_a_growing_run_is_adopted_time_and_again(offer):
    """Without its record while it is unfinished, which joins in the end."""
    for what in ((0,), (0, 1), (1, 2), ("run",)):
        assert "1 of " in offer(*what)
    assert offer.filed() == dict.fromkeys(["run", 0, 1, 2], "a")


def test_a_later_epoch_alone_tells_no_trajectory(offer):
    offer(0, 1)
    assert "0 of 1" in offer(2) and "0 of 2" in offer(0, 2)  # both trajectories begin with the same weights
    assert offer.filed() == {0: "a", 1: "a"}


def test_evaluations_that_name_two_weights_of_one_epoch_are_left_out(made):
    """Without the run's record nobody knows which are of the training that will finish."""
    _, bundle = made
    one = json.loads(bundle.read_text().splitlines()[1])
    config = EvalConfig.from_dict(one["config"]).replace(k=7)
    other = one | {"config": config.to_dict(), "key": config.key(), "backbone": "f" * 64}
    bundle.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "check"}) + "\n" for r in (one, other)))
    assert adoption.adopt(bundle, log=lambda line: None) == []


@pytest.mark.parametrize(("first", "then", "stays"), [
    ((0, 1), (1, 2), "b"), ((0, 1), ("run", 1), "b"), ((0, 1, 2), ("run",), "b"),  # got further, or to the end
    ((0, 1), (1,), "a"), ((0, 1, 2), (0, 1), "a"), (("run", 1), (0, 1, 2), "a"), (("run",), ("run", 1), "a"),
])  # fmt: skip
def test_of_two_machines_the_one_that_got_further_stays_whole(offer, first, then, stays):
    offer(*first)
    said = offer(*then, machine="b")
    kept = dict.fromkeys(then if stays == "b" else (*first, *(w for w in then if w == 0)), stays)
    assert {w: m for w, m in offer.filed().items() if w != 0} == {w: m for w, m in kept.items() if w != 0}
    assert (0 in offer.filed()) == (0 in kept)
    assert (f"take the place of the {len(first)} that were filed" in said) == (stays == "b")


def test_the_command_refuses_a_rehearsal_of_the_open_choices(own_store, capsys):
    """CONTRIBUTING's is of digits, though scale smoke takes its last set, photos."""
    [asked, *_] = experiments.hypotheses("smoke", "digits")["twice the rate"]
    runs.fetch_all([asked], device="cpu", log=lambda _: None)
    assert __main__.main(["adopt", str(paths.runs())]) == 0
    assert "; 2 of smoke scale." in capsys.readouterr().out and not store.published()


def test_the_command_refuses_smoke_scale_and_names_stale_figures(made, capsys):
    configs, bundle = made
    assert __main__.main(["adopt", str(bundle)]) == 0
    assert "of smoke scale" in capsys.readouterr().out and not store.published()
    with pytest.raises(SidaeError, match="There is no store or bundle"):
        adoption.adopt(bundle.with_name("nothing"))


def test_what_paper_scale_decides_was_said_before():
    """Every claim that is said to be decided is one of the board's."""
    import pandas as pd

    said = pd.read_csv(paths.ROOT / "sidae_lib" / "paper_scale.csv")
    stated = pd.read_csv(paths.ROOT / "sidae_lib" / "claims.csv")
    assert set(said["claim"]) <= set(stated["name"])


def test_a_bundle_goes_on_in_another_file_before_it_is_too_large(made, own_store, monkeypatch):
    """Its files are adopted together: of an unfinished run a later epoch alone could not say that it belongs."""
    by_epoch = CONFIGS[3:0:-1]
    records = [store.find(c) for c in by_epoch]
    lines = [store.as_line(r).encode() for r in records]
    monkeypatch.setenv("SIDAE_BUNDLE", str(own_store / "records.jsonl"))
    monkeypatch.setattr(store, "RECORD_BYTES", len(lines[0]) + len(lines[1]) + 2)
    for config, record in zip(by_epoch, records):
        store.keep(config, record)
    assert (own_store / "records.jsonl").read_bytes() == lines[0] + b"\n" + lines[1] + b"\n"
    assert (own_store / "records-2.jsonl").read_bytes() == lines[2] + b"\n"
    assert len(adoption.adopt(own_store / "records.jsonl", log=lambda _: None)) == 3
    assert adoption.adopt(own_store / "records-2.jsonl", log=lambda _: None) == []  # there already
    (own_store / "records-2.jsonl").rename(other := own_store / "a.jsonl.gz")  # it is plain text whatever its name
    assert store.content(other) == lines[2] + b"\n" and adoption.adopt(other, log=lambda _: None) == []


def test_processes_that_write_at_once_break_no_line_and_fill_no_file_over(tmp_path, monkeypatch):
    """While one looks whether there is room, and writes, the others wait."""
    monkeypatch.setattr(store, "RECORD_BYTES", 2**14)
    bundle, pids = tmp_path / "records.jsonl", []
    with store.alone(tmp_path / ".records.jsonl.lock", ""):
        for p in range(4):
            if pid := os.fork():
                pids.append(pid)
                continue
            for n in range(100):
                store._append(bundle, b"%d" % p * (100 * n + 1) + b"\n")
            os._exit(0)
        time.sleep(0.3)
        assert not bundle.exists()
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    files = list(tmp_path.glob("*.jsonl"))
    lines = sorted("".join(f.read_text() for f in files).splitlines())
    assert lines == sorted(f"{p}" * (100 * n + 1) for p in range(4) for n in range(100))
    assert 2 <= len(files) and max(f.stat().st_size for f in files) <= store.RECORD_BYTES
