"""Nothing lost: processes that are killed, full disks, damaged files, strangers' files, numbers that are none.

Processes, signals, disks and files are real; killing.py says where a process dies. Short forms run with the other tests,
the full counts with --all.
"""

import fcntl
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sidae_lib import data, experiments, methods, networks, paths, runs, store, train
from sidae_lib.config import EvalConfig, RunConfig, SidaeError

CPU = torch.device("cpu")
slow = pytest.mark.slow


def scenarios(folder: Path, *wanted: list) -> dict:
    """killing.py's scenarios, in processes of their own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, Path(__file__).with_name("killing.py"), folder, json.dumps(wanted)],
                          cwd=paths.ROOT, env=env, capture_output=True, text=True, timeout=400)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def short(session) -> dict:
    """The short forms, all at once and once a session: importing the library takes longer than any of them."""
    with open(session / "short.json", "a+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        if not (done := f.read()):
            done = json.dumps(scenarios(session / "short", ["killed", SHORT], ["asked_by_many", 3, 2], ["owner_dies", 3],
                                        ["signalled"], ["disk_full", 5, False]))  # fmt: skip
            f.write(done)
    return json.loads(done)


def quiet(_: str) -> None:
    pass


# --- killed ---------------------------------------------------------------------------------------------------------

SHORT = [["sidae", [["step", 3], ["checkpoint", "write"], ["checkpoint", "rename"], ["backbone", "sync"],
                    ["record", "open"], ["record", "renamed"], ["eval", "write"]]]]  # fmt: skip
PLACES = ["open", "write", "sync", "rename", "renamed"]
LONG = [[method, [["step", 1 + k % 3], ["step", 2], ["checkpoint", PLACES[k]], ["step", 1], ["checkpoint", PLACES[k - 2]],
                  ["backbone", PLACES[k]], ["step", 2], ["record", a], ["record", b], ["eval", PLACES[k]]]]
        for k, (method, a, b) in enumerate([("sidae", "open", "write"), ("simsiam", "sync", "rename"),
                                            ("dae", "open", "renamed"), ("supervised", "write", "renamed"),
                                            ("sidae", "sync", "rename")])]  # fmt: skip


OTHERS = [m for m in methods.METHODS if m not in ("untrained", "sidae", "simsiam", "dae", "supervised", "composed")]


def assert_nothing_lost(killed: list[dict]) -> None:
    hits = []
    for run in killed:
        hits += [" ".join(map(str, point)) for *point, code in run["hits"]]
        assert all(code == -signal.SIGKILL for *_, code in run["hits"]), run["hits"]
        assert run["code"] == 0 and run["same"], run["method"]
        assert not [f for f in run["files"] if f.startswith((".", "checkpoint"))], "left over"
        saved = last = 0
        for line in run["log"]:
            word, _, n = line.partition(" ")
            if word == "step":  # a checkpoint that was killed just after its renaming is whole, and not noted
                assert int(n) in (saved + 1, last + 1), "a start goes on from the last whole checkpoint"
                saved, last = int(n) - 1, int(n)
            saved = int(n) if word == "checkpoint" else saved
    print(f"{len(hits)} kills:", *sorted(hits), sep="\n  ")


def test_killed_anywhere_and_started_again(short):
    """SIGKILL in steps and inside the writes of all four kinds of file, with a checkpoint after every step: at the end
    records and weights are, to the bit, those of a run that was left alone in another process and store, and no start
    repeats more than the step it was killed in."""
    assert_nothing_lost(short["killed"])


@slow
def test_killed_fifty_times(tmp_path):
    assert sum(len(points) for _, points in LONG) == 50
    for file in ("checkpoint", "record"):
        assert sum(f == file for _, points in LONG for f, _ in points) == 10
    assert_nothing_lost(scenarios(tmp_path, ["killed", LONG])["killed"])


@slow
@pytest.mark.skipif(not OTHERS, reason="no method with a queue, a centre or a momentum network yet")
def test_state_of_every_method_survives(tmp_path):
    """Queues, centres, momentum networks: every other method is killed in a step, the rest in a checkpoint's write."""
    plan = [[m, [["checkpoint", "write"] if n % 2 else ["step", 3]]] for n, m in enumerate(OTHERS)]
    assert_nothing_lost(scenarios(tmp_path, ["killed", plan])["killed"])


def assert_each_once(done: dict) -> None:
    assert set(done["codes"]) == {0} and done["same"] and done["trained"] == done["keys"]


def test_many_processes_one_training(short):
    assert_each_once(short["asked_by_many"])


@slow
def test_eight_processes_ask_for_six_runs(tmp_path):
    assert_each_once(scenarios(tmp_path, ["asked_by_many", 8, 6])["asked_by_many"])


def test_the_owner_of_a_lock_is_killed(short):
    done = short["owner_dies"]
    assert sorted(done["codes"]) == [-signal.SIGKILL, 0, 0] and done["same"] and len(done["trained"]) == 1
    assert done["seconds"] < 10


def test_signals_end_with_a_sentence(short):
    """SIGINT and SIGTERM to the command line; it goes on with the next step."""
    assert len(short["signalled"]) == 5
    for s in short["signalled"]:
        sentence, left = {"load": ("Stopped; what was recorded is kept", 8), "step": ("stands at step 3 of 8, saved in", 5),
                          "last step": ("stands at step 8 of 8, saved in", 0)}[s["at"]]  # fmt: skip
        assert sentence in s["out"] and "goes on from there" in s["out"] and s["out"].count("\n") <= 2, s
        assert s["codes"] == [130, 0] and "Traceback" not in s["said"] and s["again"] == left and s["same"], s


@slow
def test_the_stop_button_of_a_notebook(own_store):
    """SIGINT to the kernel while a cell trains: the cell ends with the sentence, and run again it goes on."""
    from jupyter_client.manager import start_new_kernel

    env = os.environ | {"CXX": "none", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(paths.ROOT)}  # eager: no minute of compiling
    manager, client = start_new_kernel(kernel_name="python3", env=env)
    try:
        def cell(code: str, stop: bool = False) -> dict:
            sent = client.execute(code, user_expressions={"steps": "steps"}, stop_on_error=False)  # or the next is aborted
            if stop:
                while not (own_store / "in step 20").exists():
                    time.sleep(0.1)
                manager.interrupt_kernel()
            while (reply := client.get_shell_msg(timeout=300))["parent_header"]["msg_id"] != sent:
                pass
            return reply["content"]

        setup = cell("from pathlib import Path\nfrom sidae_lib import experiments, runs, train\n"
                     "config = experiments.run('simsiam', 'digits', 'smoke', epochs=50)\n"
                     "steps, advance = [0], train.Run.advance\n"
                     "def count(run, *a):\n    steps.append(run.step)\n"
                     f"    if run.step == 20: Path({str(own_store / 'in step 20')!r}).touch()\n    advance(run, *a)\n"
                     "train.Run.advance = count")
        assert setup["status"] == "ok", setup
        train_it = "record, = runs.fetch_all([config], device='cpu')"
        stopped = cell(train_it, stop=True)
        assert stopped["ename"] == "Stopped" and "Stopped by SIGINT" in stopped["evalue"], stopped
        at = int(re.search(r"stands at step (\d+) of 200", stopped["evalue"])[1])
        assert at > 20 and cell("steps.clear()")["status"] == "ok"
        assert cell(train_it)["status"] == "ok"
        went_on = cell(f"assert steps[0] == {at} and len(steps) == 200 - {at}")
        assert went_on["status"] == "ok", went_on
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# --- no room --------------------------------------------------------------------------------------------------------


def assert_every_write_can_fail(outcomes: list[dict]) -> None:
    *failed, last = outcomes
    assert last["code"] == 0 and len(failed) > 2
    for o in failed:
        assert o["code"] == 3 and "nothing changed" in o["said"] and "free space or choose another folder" in o["said"], o
    assert all(o["again"] == 0 and o["same"] for o in outcomes)
    print(*(o["said"] for o in failed), sep="\n")


def test_a_write_that_finds_no_room(short):
    """At any write of the store: one sentence, all that was there is there, and it goes on when there is room."""
    assert_every_write_can_fail(short["disk_full"])


@slow
def test_every_write_finds_no_room(tmp_path):
    assert_every_write_can_fail(scenarios(tmp_path, ["disk_full", 1, False])["disk_full"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB. Mounting one takes a privilege."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@slow
def test_a_full_disk(small_disk):
    assert_every_write_can_fail(scenarios(small_disk, ["disk_full", 2, True])["disk_full"])


def test_a_store_that_is_read_only_can_be_read(own_store, small_disk, monkeypatch):
    monkeypatch.setenv("SIDAE_RUNS", str(small_disk))
    config = experiments.run("simsiam", "digits", "smoke", epochs=1)
    first = runs.fetch_all([config], device="cpu", log=quiet)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert runs.fetch_all([config], device="cpu", log=quiet) == first == list(store.every("run"))
    with pytest.raises(SidaeError, match="cannot be written.*SIDAE_RUNS"):
        runs.fetch_all([EvalConfig(run=config, kind="knn")], device="cpu", log=quiet)


# --- damaged --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list]:
    """A store of two runs: one finished, with an evaluation, and one stopped at a checkpoint; and their configs."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as m:
        for name in ("runs", "records"):
            m.setenv(f"SIDAE_{name.upper()}", str(folder / name))
        run, other = (experiments.run("simsiam", "digits", "smoke", s) for s in (0, 1))
        configs = [run, EvalConfig(run=run, kind="knn", k=5)]
        runs.fetch_all([*configs, other, EvalConfig(run=other, kind="knn", k=5)], device="cpu", log=quiet)
        for r in (run, other):
            with pytest.raises(train.Stopped):
                train.pretrain(r, data.by_fingerprint(r.data), folder / f"stopped-{r.seed}", device=CPU, deadline=0)
    return folder, configs


def bare(record: dict) -> dict:
    epochs = [{k: v for k, v in e.items() if k not in ("seconds", "images_per_second")} for e in record.get("epochs", ())]
    return {k: v for k, v in record.items() if k not in ("seconds", "provenance", "check")} | {"epochs": epochs}


DAMAGES = {"truncated": lambda good, other: good[: len(good) // 2], "emptied": lambda good, other: b"",
           "bit-flipped": lambda good, other: good[:-99] + bytes([good[-99] ^ 4]) + good[-98:],
           "another run's": lambda good, other: other}  # fmt: skip


FILES = ["record", "eval", "backbone", "checkpoint"]


@pytest.mark.parametrize("file, damage", [pytest.param(f, d, marks=() if (n + k) % 4 == 2 else slow)
                                          for n, f in enumerate(FILES) for k, d in enumerate(DAMAGES)])  # fmt: skip
def test_damaged_files_are_named_set_aside_and_computed_again(made, own_store, file, damage):
    before, [run, evaluation] = made
    shutil.copytree(before / "runs", paths.runs())
    folder, other = paths.runs() / run.key(), paths.runs() / run.replace(seed=1).key()
    good = [store.find(run), store.find(evaluation)]
    if file == "checkpoint":  # of a run that is not finished
        for n, f in enumerate((folder, other)):
            shutil.rmtree(f)
            shutil.copytree(before / f"stopped-{n}", f)
    name = {"record": "record.json", "eval": f"eval-{evaluation.key()}.json", "backbone": "backbone-e002.safetensors",
            "checkpoint": "checkpoint.safetensors"}[file]  # fmt: skip
    path, alike = folder / name, next(other.glob("eval-*")) if file == "eval" else other / name
    path.write_bytes(bad := DAMAGES[damage](path.read_bytes(), alike.read_bytes()))
    if file in ("record", "eval"):
        with pytest.raises(SidaeError, match="The record .* is damaged; move it away"):  # reading moves nothing
            store.find(run if file == "record" else evaluation)
        assert path.exists()
    said: list[str] = []
    more = EvalConfig(run=run, kind="knn", k=7)  # asks for weights
    again = runs.fetch_all([run, evaluation, more], device="cpu", log=said.append)
    assert any(str(path) in line and f"{name}.aside-1" in line for line in said), said
    assert (folder / f"{name}.aside-1").read_bytes() == bad
    assert [bare(r) for r in again[:2]] == [bare(r) for r in good]
    assert runs.fetch_all([run, evaluation, more], device="cpu", log=said.append) == again


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=slow)])
def test_no_flipped_bit_of_a_record_changes_what_is_read(every, made, tmp_path):
    """At every byte: it is noticed, or it says what it said (a bit in the name of the checksum itself)."""
    source = made[0] / "runs" / made[1][0].key() / "record.json"
    good, record = source.read_bytes(), json.loads(source.read_text())
    path = tmp_path / record["key"] / "record.json"
    path.parent.mkdir()
    noticed = 0
    for n in range(0, len(good), every):
        path.write_bytes(good[:n] + bytes([good[n] ^ 1 << n % 8]) + good[n + 1:])
        try:
            read = store.read(path)
            assert {k: v for k, v in record.items() if k != "check"}.items() <= read.items()
        except SidaeError:
            noticed += 1
    assert noticed > 0.95 * len(good) / every


def test_a_cache_half_written_by_a_killed_process_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDAE_DATA", str(tmp_path))
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "own.npz", train_images=images, train_labels=np.arange(4))
    dead, live = (tmp_path / ".cache" / f"tmp-{n}" for n in ("dead", "live"))
    for folder in (dead, live):
        (folder / "set").mkdir(parents=True)
    os.utime(dead, (0, 0))
    data.load("own")
    assert not dead.exists() and live.exists()


# --- from strangers -------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def npz(**arrays) -> bytes:
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def archive(**members: bytes) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return buffer.getvalue()


IMAGES = {"train_images": np.zeros((4, 8, 8), np.uint8), "train_labels": np.arange(4)}


def test_a_pickle_in_any_disguise_is_refused_and_never_run(made, tmp_path):
    canary = tmp_path / "run"
    bomb = pickle.dumps(Bomb(canary))
    torch.save(Bomb(canary), saved := io.BytesIO())
    objects = np.array([Bomb(canary)], object)
    np.save(npy := io.BytesIO(), objects, allow_pickle=True)
    disguises = [bomb, saved.getvalue(), npy.getvalue(), npz(**IMAGES | {"train_images": objects}),
                 npz(**IMAGES, classes=objects), archive(**{"train_images.npy": bomb}),
                 archive(**{"archive/data.pkl": bomb, "train_images.npy": npy.getvalue()})]  # fmt: skip
    run = made[1][0]
    (tmp_path / run.key()).mkdir()
    (tmp_path / "set" / "train" / "a").mkdir(parents=True)
    fresh = train.Run(run, data.by_fingerprint(run.data), CPU)
    for n, content in enumerate(disguises):
        for path, read in ((tmp_path / f"{n}.safetensors", networks.load),
                           (tmp_path / f"{n}.npz", lambda p: data.load(f"npz:{p}")),
                           (tmp_path / f"checkpoint-{n}.safetensors", fresh.restore),
                           (tmp_path / run.key() / "record.json", store.read),
                           (tmp_path / "set" / "train" / "a" / "1.png", lambda p: data.load(f"folder:{tmp_path / 'set'}"))):
            path.write_bytes(content)
            with pytest.raises(SidaeError) as e:
                read(path)
            assert "\n" not in str(e.value)
    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists()  # the bomb is live


@pytest.mark.parametrize("name", ["../../outside.npy", "/tmp/outside.npy", "a/../../outside.npy"])
def test_an_archive_member_that_points_outside(name, tmp_path):
    (tmp_path / "a.npz").write_bytes(archive(**{name: b"x", "train_images.npy": b""}))
    with pytest.raises(SidaeError, match="points outside .*; take it only from who made it"):
        data.load(f"npz:{tmp_path / 'a.npz'}")


def header(shape: tuple) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def peak() -> int:
    """Bytes of memory this process has used at most since it was last asked, where Linux tells; else 0."""
    if not (reset := Path("/proc/self/clear_refs")).exists():
        return 0
    used = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    reset.write_text("5")
    return 1024 * used


def test_what_is_too_large_is_refused_before_it_is_in_memory(made, tmp_path):
    run = made[1][0]
    record = tmp_path / run.key() / "record.json"
    for folder in (record.parent, tmp_path / "set" / "train" / "a"):
        folder.mkdir(parents=True)
    with open(record, "wb") as f:
        f.write(b'{"key": "')
        f.truncate(10**8)
    (tmp_path / "set" / "train" / "a" / "1.png").write_bytes(png(50_000, 50_000))
    (tmp_path / "claims.npz").write_bytes(archive(**{"train_images.npy": header((10**7, 1000, 1000, 3)) + bytes(1000)}))
    (tmp_path / "header.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    meta = {"config": run.to_dict() | {"backbone": "resnet18", "width": 10**5}, "epoch": 1, "mean": [0] * 3, "std": [1] * 3}
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "width.safetensors", {"sidae": json.dumps(meta)})
    peak()
    before = peak()
    for read, path in ((store.read, record), (data.load, f"folder:{tmp_path / 'set'}"),
                       (data.load, f"npz:{tmp_path / 'claims.npz'}"), (networks.load, tmp_path / "header.safetensors"),
                       (networks.load, tmp_path / "width.safetensors")):
        with pytest.raises(SidaeError) as e:
            read(path)
        assert "\n" not in str(e.value)
    assert peak() < before + 2**26


def test_a_zip_bomb(tmp_path, monkeypatch):
    """A member of more than half of the memory; the machine is said to be small, so that the file can be."""
    sysconf = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 2**11 if name == "SC_PHYS_PAGES" else sysconf(name))
    (tmp_path / "bomb.npz").write_bytes(archive(**{"train_images.npy": header((2**23,)) + bytes(2**23)}))
    assert (tmp_path / "bomb.npz").stat().st_size < 10**5
    with pytest.raises(SidaeError, match="train_images.npy .8,388,.* more than half of this machine's memory"):
        data.load(f"npz:{tmp_path / 'bomb.npz'}")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "9" * 5000])
def test_a_record_with_a_number_that_is_none(made, tmp_path, number):
    source = made[0] / "runs" / made[1][0].key() / "record.json"
    record = json.loads(source.read_text())
    del record["check"]  # as a stranger might write it
    path = tmp_path / record["key"] / "record.json"
    path.parent.mkdir()
    path.write_text(json.dumps(record | {"seconds": "@"}).replace('"@"', number))
    with pytest.raises(SidaeError, match="is damaged"):
        store.read(path)


def fuzz(cases: int, strategy, check) -> None:
    @settings(max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(case):
        try:
            check(case)
        except SidaeError as e:
            assert str(e) and "\n" not in str(e)

    run()


LEAVES = (st.none() | st.booleans() | st.integers() | st.sampled_from([2**63, 10**400, -10**4000, 1e300]) | st.floats()
          | st.text(max_size=9))  # fmt: skip
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=9), v, max_size=3),
                      max_leaves=6)  # fmt: skip


@st.composite
def spoilt(draw, good: bytes) -> bytes:
    """A file with up to four pieces replaced, removed or doubled; or any bytes at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 4))):
        a = draw(st.integers(0, len(good)))
        b = min(len(good), a + draw(st.integers(0, 40)))
        good = good[:a] + draw(st.binary(max_size=8) | st.just(good[a:b] * 2)) + good[b:]
    return good


@pytest.mark.parametrize("cases", [50, pytest.param(4000, marks=slow)])
def test_fuzzed_records(cases, made, tmp_path):
    sources = [next((made[0] / "runs" / made[1][0].key()).glob(name)) for name in ("record.json", "eval-*.json")]
    records = [json.loads(s.read_text()) for s in sources]

    def check(case) -> None:
        n, content = case
        path = tmp_path / records[n]["run_key" if n else "key"] / sources[n].name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        assert store.read(path)["config"] == records[n]["config"]  # else it has another key

    fuzz(cases, st.integers(0, 1).flatmap(lambda n: st.tuples(st.just(n), spoilt(sources[n].read_bytes()) | st.dictionaries(
        st.sampled_from(list(records[n])), VALUES).map(lambda d: records[n] | d))), check)  # fmt: skip


@pytest.mark.parametrize("cases", [50, pytest.param(4000, marks=slow)])
def test_fuzzed_configs(cases):
    fields = {c: st.dictionaries(st.sampled_from(list(c.__dataclass_fields__)) | st.text(max_size=5), VALUES, max_size=4)
              for c in (RunConfig, EvalConfig)}  # fmt: skip
    run = {"method": "sidae", "data": "0"}
    cases_of = (st.tuples(st.just(RunConfig), fields[RunConfig].map(lambda d: run | d) | VALUES)
                | st.tuples(st.just(EvalConfig), fields[EvalConfig].map(lambda d: {"run": run} | d) | VALUES))  # fmt: skip

    def check(case) -> None:
        c = case[0].from_dict(case[1])
        assert case[0].from_dict(json.loads(json.dumps(c.to_dict()))).key() == c.key()

    fuzz(cases, cases_of, check)


@pytest.mark.parametrize("cases", [50, pytest.param(2500, marks=slow)])
def test_fuzzed_npz(cases, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDAE_DATA", str(tmp_path))
    monkeypatch.setattr(data, "_store", lambda images, folder: None)  # thousands of caches of a few images
    shapes = [(2, 8, 8), (2, 8, 8, 3), (0, 8, 8), (2, 8, 0), (2, 1, 9), (2, 8, 8, 2), (2,), ()]
    arrays = st.sampled_from([*(np.zeros(s, np.uint8) for s in shapes), np.zeros((2, 8, 8), np.float32), np.array([0, 1]),
                              np.array([[0], [2**40]]), np.array([-1, 0]), np.array([0.5, 1.5]), np.array("a"),
                              np.array([["a", "b"]]), np.zeros(2, [("a", "u1")]), np.zeros(2, "M8[s]")])  # fmt: skip
    names = [f"{s}_{a}" for s in ("train", "test", "val", "unlabeled") for a in ("images", "labels")] + ["classes"]
    good = npz(**IMAGES, classes=np.array(list("abcd")))

    def check(content: bytes) -> None:
        path = tmp_path / "case.npz"
        path.write_bytes(content)
        data._load.cache_clear()  # two cases may have one size and one time
        loaded = data.load(f"npz:{path}")
        assert all(s.images.dtype == torch.uint8 and s.images.shape[1:] == (3, 32, 32) for s in loaded.splits.values())

    fuzz(cases, spoilt(good) | st.dictionaries(st.sampled_from(names), arrays).map(lambda d: npz(**d)), check)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, value, sentence", [
    (4, float("nan"), r"Weight \S+ is not finite at epoch 1, step 4 of simsiam \w+; there is no checkpoint yet"),
    (5, float("inf"), r"loss is not finite at epoch 2, step 6 of simsiam \w+; there is no checkpoint yet"),
])  # fmt: skip
def test_a_weight_that_is_not_finite_stops_the_run_with_its_place(step, value, sentence, own_store, monkeypatch):
    run = experiments.run("simsiam", "digits", "smoke")
    at, plain = iter(range(1, 100)), torch.optim.SGD.step

    def spoil(self):
        plain(self)
        if next(at) == step:
            self.param_groups[0]["params"][0].data[0].fill_(value)

    monkeypatch.setattr(torch.optim.SGD, "step", spoil)
    with pytest.raises(SidaeError, match=sentence):
        runs.fetch_all([run], device="cpu", log=quiet)
    assert store.find(run) is None and not store.backbone(run).exists()
