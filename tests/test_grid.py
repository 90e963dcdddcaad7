"""Jobs on a Dask cluster: real schedulers and workers, processes of their own, on the loopback address."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from killing import bare, quiet
from PIL import Image
from test_jobs import knn, run, wait

import sidae_lib
from sidae_lib import __version__, experiments, paths, runs, store, tasks, train
from sidae_lib.config import EvalConfig, SidaeError

dask = pytest.importorskip("dask", reason="no cluster extra")
grid = pytest.importorskip("sidae_lib.grid", reason="no cluster extra", exc_type=SidaeError)
psutil = pytest.importorskip("psutil")  # distributed needs it
slow = pytest.mark.slow
QUICK = {"OMP_NUM_THREADS": "1", "SIDAE_THREADS": "1", "TQDM_DISABLE": "1",
         "CXX": "none",  # nothing to compile with
         "MALLOC_TRIM_THRESHOLD_": "65536",  # as a nanny has it
         "DASK_LOGGING__DISTRIBUTED": "info"}  # the library says critical; tests read that a worker is there


class Cluster:
    """A scheduler and workers without nannies, each a process with a store of its own."""

    def __init__(self, folder: Path, stack: ExitStack, **env: str) -> None:
        self.folder, self.stack = folder, stack
        own = {"PYTHONPATH": str(paths.ROOT), "SIDAE_RECORDS": str(folder / "none")}
        self.env = os.environ | QUICK | own | env
        file = folder / "scheduler.json"
        self.scheduler = self.start("scheduler", "scheduler", "--host", "127.0.0.1", "--port", "0",
                                    "--no-dashboard", "--scheduler-file", str(file))  # fmt: skip
        wait(lambda: file.exists() and file.stat().st_size)
        self.address = json.loads(file.read_text())["address"]

    def start(self, name: str, *args: str, **env: str) -> subprocess.Popen:
        with open(self.folder / f"{name}.log", "w") as log:
            p = subprocess.Popen([sys.executable, "-P", "-m", "dask", *args], env=self.env | env,
                                 cwd=self.folder, stdout=log, stderr=log)  # fmt: skip
        self.stack.callback(lambda: (p.kill(), p.wait()))
        return p

    def worker(self, name: str, *args: str, preload: str = "", **env: str) -> subprocess.Popen:
        file = self.folder / f"{name}.py"
        file.write_text(preload)
        return self.start(name, "worker", self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard",
                          "--host", "127.0.0.1", "--memory-limit", "0", "--preload", str(file), *args,
                          **{"SIDAE_RUNS": str(self.folder / name)} | env)  # fmt: skip

    def registered(self, *names: str) -> None:
        wait(lambda: all("Registered to" in (self.folder / f"{n}.log").read_text() for n in names))

    def records(self, name: str) -> set[str]:
        return {p.parent.name for p in (self.folder / name).glob("*/record.json")}


@pytest.fixture
def cluster(own_store):
    with ExitStack() as stack:
        yield Cluster(own_store, stack)


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Two workers, which share no store with one another or with the caller."""
    with ExitStack() as stack:
        cluster = Cluster(tmp_path_factory.mktemp("apart"), stack)
        cluster.worker("a"), cluster.worker("b")
        cluster.registered("a", "b")
        yield cluster


def fetch(configs: list, client, said: list | None = None, **more) -> list:
    log = quiet if said is None else said.append
    return runs.fetch_all(configs, client=client, device="cpu", log=log, **more)


def alone(configs: list, monkeypatch, folder: Path) -> list:
    """The same records from this process, with the workers' number of threads."""
    with monkeypatch.context() as m:
        for name, value in {"SIDAE_RUNS": str(folder), "SIDAE_THREADS": "1", "CXX": "none"}.items():
            m.setenv(name, value)
        m.delenv("SIDAE_SCHEDULER", raising=False)
        return [bare(r) for r in runs.fetch_all(configs, device="cpu", log=quiet)]


# --- two workers --------------------------------------------------------------------------------------------


def test_each_is_computed_once_and_equals_what_one_process_computes(apart, own_store, monkeypatch):
    """In the order asked for, with the weights of the records; one fails for its config and is named."""
    monkeypatch.setenv("SIDAE_SCHEDULER", apart.address)
    configs, bad, said = [c for s in range(4) for c in (run(s), knn(run(s)))], run(0, lr=1e30), []
    sentence = f"1 of 5 runs failed, the rest are kept. simsiam {bad.key()}: .*not finite"
    with pytest.raises(SidaeError, match=sentence):
        fetch([bad, *configs], None, said, weights=True)
    assert sum("trained" in line for line in said) == 4
    assert any("5 of 5 runs done, 1 failed" in line for line in said)
    records = fetch(configs, None, said)
    assert [r["key"] for r in records] == [c.key() for c in configs]
    assert sum("trained" in line for line in said) == 4
    assert {r["provenance"]["threads"] for r in records} == {1}
    assert [bare(r) for r in records] == alone(configs, monkeypatch, own_store / "alone")
    for c in configs[::2]:
        assert train.sha256(store.backbone(c).read_bytes()) == store.find(c)["files"][store.backbone(c).name]


def test_whatever_fails_on_a_worker_is_named_with_its_traceback(apart, own_store):
    """What the same run has finished comes back, and another run is computed."""
    bad, good = EvalConfig(run=run(11), kind="knn", label_count=1), [run(11), knn(run(11)), run(12)]
    beyond = run(13, hidden=2**40)
    with pytest.raises(SidaeError, match="2 of 3 runs failed") as e:
        fetch([beyond, bad, *good], apart.address)
    assert f"simsiam {beyond.key()}: training: RuntimeError" in str(e.value)
    assert f"knn {bad.key()}: The 1 labels" in str(e.value)
    [note] = e.value.__notes__  # of what is not ours
    assert note.splitlines()[-1].startswith("RuntimeError: ")
    assert store.missing([beyond, bad, *good]) == [beyond, bad]


def test_what_this_machine_cannot_file_does_not_stop_the_others(apart, own_store):
    configs = [run(14), run(15)]
    paths.runs().mkdir()
    (paths.runs() / configs[0].key()).write_text("a file where the run's folder would be")
    sentence = f"1 of 2 runs failed, .*simsiam {configs[0].key()}: .*cannot be written"
    with pytest.raises(SidaeError, match=sentence):
        fetch(configs, apart.address)
    assert store.missing(configs) == configs[:1]


def test_weights_of_a_dependency_travel(apart, own_store, monkeypatch):
    first, rest = run(20), [run(s, epochs=8) for s in range(21, 25)]
    monkeypatch.setattr(tasks, "dependencies", lambda c: [first] if c in rest else [])
    fetch(rest, apart.address)
    for worker in "ab":
        assert first.key() in apart.records(worker) and {c.key() for c in rest} & apart.records(worker)
    [x, y] = ((apart.folder / w / first.key() / "backbone-e001.safetensors").read_bytes() for w in "ab")
    assert x == y and not store.backbone(first).exists()  # nobody asked for it here


def test_until_an_epoch_and_on(apart, own_store, monkeypatch):
    config = run(30, epochs=4)
    configs = [config, *(EvalConfig(run=config, kind="knn", k=5, epoch=e) for e in (1, 2, 4))]
    with pytest.raises(train.Stopped, match="Trained to epoch 3: 2 of 4"):
        fetch(configs, apart.address, until=3)
    assert store.missing(configs) == [configs[0], configs[3]]


def test_what_a_worker_sends_is_of_one_trajectory(own_store):
    """The caller has an evaluation of another machine's weights; what comes replaces it."""
    config = run(0, epochs=4)
    first, second = (EvalConfig(run=config, kind="knn", k=5, epoch=e) for e in (1, 2))
    with pytest.raises(train.Stopped):
        runs.fetch_all([config, first, second], device="cpu", until=2, log=quiet)
    right = store.find(first)
    files = {p.name: train.sha256(p.read_bytes()) for p in store.folder(config).glob("backbone-*")}
    store.keep(first, right | {"backbone": "f" * 64})
    said: list[str] = []
    grid.Result(tasks.Job(config, records=[(first, right)], files=files)).keep(said.append)
    assert store.find(first) == right and len(said) == 1 and store.find(second) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its allocator")
def test_a_worker_keeps_the_memory_of_its_tensors(apart):
    """Memory that is given back with every tensor halves the speed of narrow networks; a page taken anew is
    a fault."""
    def faults(size: int) -> int:
        import resource

        with grid._slot("cpu"):
            torch.ones(size)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(size)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with grid.Client(apart.address, set_as_default=False) as client:
        size = 2**18  # 1 MiB, in pages of 4 KiB
        assert client.submit(faults, size).result() < 20 * size / 1024 / 4


def test_a_relative_place_is_the_callers_on_every_worker(apart, own_store, monkeypatch, tmp_path):
    """In the workers' own folder there is none of this name."""
    for n in range(16):
        (place := tmp_path / "pics" / "train" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 9 * n, np.uint8)).save(place / f"{n}.png")
    monkeypatch.chdir(tmp_path)
    config = experiments.run("simsiam", "folder:pics", "smoke", epochs=1, batch=8)
    [record] = fetch([config], apart.address)
    assert record["data"]["name"] == f"folder:{tmp_path}/pics"


def test_a_worker_that_lacks_the_images(apart, own_store, monkeypatch, tmp_path):
    """The set and the worker are named, and another run is computed."""
    monkeypatch.setenv("SIDAE_DATA", str(tmp_path))  # the workers have another
    images = np.arange(16 * 8 * 8, dtype=np.uint8).reshape(16, 8, 8)
    np.savez(tmp_path / "mine.npz", train_images=images, train_labels=np.arange(16) % 2)
    config = experiments.run("simsiam", "mine", "smoke", epochs=1, batch=8)
    with pytest.raises(SidaeError) as e:
        fetch([config, run(17)], apart.address)
    assert re.fullmatch(f"1 of 2 runs failed, the rest are kept. simsiam {config.key()}: There is no data set "
                        r"'mine': .* \(on the worker tcp://127.0.0.1:\d+\)\.", str(e.value))
    assert store.find(run(17))


def test_time_is_up_on_a_grid(apart, own_store):
    with pytest.raises(train.Stopped, match="Time is up.*2 of 2 records are left"):
        fetch([run(8), run(9)], apart.address, minutes=0)


def test_no_scheduler_is_one_sentence(own_store):
    with (dask.config.set({"distributed.comm.timeouts.connect": "50ms"}),
          pytest.raises(SidaeError, match="No scheduler answers at tcp://127.0.0.1:9; start one")):
        fetch([run(0)], "tcp://127.0.0.1:9")


def test_without_the_extra_it_is_named(own_store, monkeypatch):
    monkeypatch.delitem(sys.modules, "sidae_lib.grid")
    monkeypatch.delattr(sidae_lib, "grid")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SidaeError, match=re.escape('pip install "sidae-lib[cluster]"')):
        fetch([run(0)], "tcp://127.0.0.1:9")


def test_another_version_is_refused(own_store):
    client = SimpleNamespace(run=lambda version: {"tcp://a": version(), "tcp://b": "0.0.9"})
    sentence = f"1 workers have another sidae-lib than {__version__} .tcp://b has 0.0.9"
    with pytest.raises(SidaeError, match=sentence):
        fetch([run(0)], client)


@slow
def test_one_worker_with_two_gpus_takes_two_runs(apart, own_store):
    """Declared as resources; a run has each to itself. The devices are the CPU's here: the counting is tested."""
    worker = apart.worker("gpus", "--nthreads", "4", "--resources", "GPU=2", preload=(
        "import threading, time\nfrom sidae_lib import train\n"
        "used, plain = [], getattr(train, 'plain', train.pretrain)\n"
        "train.plain = plain\n"  # a preload is run twice
        "def pretrain(*a, **k):\n"
        "    used.append(threading.get_ident()); open('most', 'a').write(f'{len(used)}\\n'); time.sleep(1)\n"
        "    try: return plain(*a, **k)\n"
        "    finally: used.remove(threading.get_ident())\n"
        "train.pretrain = pretrain\n"))
    apart.registered("gpus")
    runs.fetch_all([run(s) for s in range(40, 44)], client=apart.address, log=quiet)
    worker.kill()
    assert max(map(int, (apart.folder / "most").read_text().split())) == 2


# --- workers and schedulers that come and go ----------------------------------------------------------------


@contextmanager
def afterwards(action):
    """Runs `action` in a thread meanwhile; what it raises is raised at the end."""
    errors = []

    def call():
        try:
            action()
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=call)
    thread.start()
    yield
    thread.join()
    assert not errors, errors


WATCHED = """if not hasattr(train, "plain"):  # a preload is run twice
    train.plain, train.CHECKPOINT_SECONDS, advance = train.pretrain, 0.0, train.Run.advance

    def counted(self, *args):
        print(self.config.key(), self.step, file=open("steps", "a"))
        advance(self, *args)
        if self.step == 6 and not os.path.exists("died"):
            open("died", "x")
            os.kill(os.getpid(), signal.SIGKILL)

    def pretrain(*args, **more):
        if NAME == "late":
            open("joined", "w")
        for _ in range(1200):  # the others wait, so that something is left for it
            if os.path.exists("joined") or not os.path.exists("died"):
                break
            time.sleep(0.1)
        return train.plain(*args, **more)

    train.Run.advance, train.pretrain = counted, pretrain
"""


@slow
def test_workers_die_and_join(cluster, own_store, monkeypatch):
    """On a shared store. One is killed in the middle of a run, one has another version and leaves, one joins
    late: the grid completes, the killed one's run from its last checkpoint, and each record equals what one
    process computes."""
    names, configs = ("a", "b", "late"), [run(s, epochs=2) for s in range(4)]
    head = "import os, signal, time\nfrom sidae_lib import train\n"
    watched = {n: f"{head}NAME = {n!r}\n{WATCHED}" for n in names}
    shared = {"SIDAE_RUNS": str(paths.runs())}
    first = [cluster.worker(n, preload=watched[n], **shared) for n in "ab"]

    def events() -> None:
        wait(lambda: any(p.poll() == -signal.SIGKILL for p in first))
        old = cluster.worker("old", preload="import sidae_lib\nsidae_lib.__version__ = '0.0.9'\n", **shared)
        assert old.wait(180) is not None
        assert "has sidae-lib 0.0.9, the grid " + __version__ in (own_store / "old.log").read_text()
        cluster.worker("late", preload=watched["late"], **shared)

    with afterwards(events):
        records = fetch(configs, cluster.address, said := [])
    assert any(re.search("of 4 runs done, [1-3] running, 0 failed", line) for line in said), said
    steps = [line.split() for line in (own_store / "steps").read_text().splitlines()]
    taken = {c.key(): [int(n) for key, n in steps if key == c.key()] for c in configs}
    [again] = [n for n in taken.values() if n != [*range(8)]]
    assert again == [*range(6), 5, 6, 7]  # it was killed in the sixth step, before that was saved
    assert (own_store / "joined").exists()
    assert [bare(r) for r in records] == alone(configs, monkeypatch, own_store / "alone")


@slow
def test_the_scheduler_is_lost(cluster, own_store):
    configs, said = [run(s, epochs=5) for s in range(4)], []

    def log(line: str) -> None:
        if "runs done" in line:
            cluster.scheduler.kill()

    cluster.worker("a")
    with (dask.config.set({"distributed.comm.timeouts.connect": "5s"}),
          pytest.raises(SidaeError, match=f"The scheduler at {cluster.address} was lost; what had finished")):
        runs.fetch_all(configs, client=cluster.address, device="cpu", log=log)
    kept = [c for c in configs if store.find(c)]
    assert 1 <= len(kept) < 4
    runs.fetch_all(configs, device="cpu", log=said.append)
    assert sum("trained" in line for line in said) == 4 - len(kept)


# --- TLS and Slurm, as the book says -------------------------------------------------------------------------

TEXT = (paths.ROOT / "book" / "running.md").read_text()
README = TEXT.partition("\n## Several machines")[2]


def block(kind: str, holds: str) -> str:
    [found] = [b for b in re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) if holds in b]
    return found


@pytest.fixture
def certificates(own_store):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    subprocess.run(["bash", "-ec", block("bash", "openssl")], cwd=own_store, check=True, capture_output=True)
    return own_store


@slow
def test_tls(certificates):
    """With the certificate scheduler, worker and client talk; without it nobody is let in."""
    lines = re.findall(r"(DASK_\w+)=(\S+)", block("bash", "DASK_DISTRIBUTED"))
    env = {k: v.replace("$PWD", str(certificates)) for k, v in lines}
    assert len(env) == 9
    with ExitStack() as stack:
        cluster = Cluster(certificates, stack, **env)
        assert cluster.address.startswith("tls://")
        cluster.worker("a")
        with pytest.raises(SidaeError, match="No scheduler answers at tls://"):
            fetch([run(0)], cluster.address)
        with dask.config.set({k[5:].lower().replace("__", "."): v == "True" or v for k, v in env.items()}):
            fetch([run(0)], cluster.address)
        assert cluster.records("a") == {run(0).key()}


@slow
def test_slurm(certificates):
    """The page's script, its job file run by an `sbatch` that is bash."""
    pytest.importorskip("dask_jobqueue")
    script = block("python", "SLURMCluster").replace('"paper"', '"smoke"')
    script = script.replace("accuracy_vs_epochs", "sidae_step_by_step")
    (certificates / "grid.py").write_text(script.replace("jobs=20", "jobs=1"))
    shims = certificates / "shims"
    shims.mkdir()
    (shims / "sbatch").write_text('#!/bin/bash\ncp "$1" job.sh\nsetsid bash job.sh >job.log 2>&1 &\n'
                                  'echo $! >job.pid\necho "Submitted batch job 1"\n')  # fmt: skip
    (shims / "scancel").write_text('#!/bin/bash\nkill -TERM -- -"$(cat job.pid)"\n')
    for shim in shims.iterdir():
        shim.chmod(0o755)
    env = os.environ | QUICK | {"PATH": f"{shims}:{os.environ['PATH']}", "PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run([sys.executable, "grid.py"], cwd=certificates, env=env, capture_output=True, text=True,
                          timeout=200)  # fmt: skip
    log = (certificates / "job.log").read_text() if (certificates / "job.log").exists() else "no job"
    assert done.returncode == 0, done.stderr + log
    job = (certificates / "job.sh").read_text()
    for line in ("-n 1", "--cpus-per-task=8", "--mem=30G", "-t 12:00:00", "--gres=gpu:1"):
        assert f"#SBATCH {line}" in job.splitlines(), job
    assert "--nthreads 1" in job and "--resources GPU=1" in job and "tls://" in job and "--tls-key" in job
    assert len(list(store.every("run"))) == 1
