"""A grid on a Dask cluster: real schedulers and workers, processes of their own, on the loopback address."""

import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sidae_lib import __version__, data, experiments, paths, runs, train
from sidae_lib.config import EvalConfig, SidaeError

dask = pytest.importorskip("dask", reason="no cluster extra")
grid = pytest.importorskip("sidae_lib.grid", reason="no cluster extra", exc_type=SidaeError)
slow = pytest.mark.slow


def run(seed: int, **changes):
    return experiments.run("simsiam", "digits", "smoke", seed, **{"epochs": 1} | changes)


def knn(config) -> EvalConfig:
    return EvalConfig(run=config, kind="knn", k=5)


def bare(record: dict) -> dict:
    """Without time, place and checksum of the record; the weights' checksums stay."""
    epochs = [{k: v for k, v in e.items() if k not in ("seconds", "images_per_second")} for e in record.get("epochs", ())]
    return {k: v for k, v in record.items() if k not in ("seconds", "provenance", "check")} | {"epochs": epochs}


def _fetch(configs: list) -> list:
    return runs.fetch_all(configs, device="cpu", log=lambda _: None)


def alone(configs: list, monkeypatch, folder: Path) -> list:
    """The same records from one process, new as a worker is, with the workers' number of threads."""
    with monkeypatch.context() as m:
        m.setenv("SIDAE_RUNS", str(folder))
        m.setenv("SIDAE_THREADS", "1")
        m.delenv("SIDAE_SCHEDULER", raising=False)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return [bare(r) for r in pool.apply(_fetch, [configs])]


# --- this machine ---------------------------------------------------------------------------------------------------


def listening() -> set[tuple[str, str]]:
    """(address, pid) of every TCP socket that this process and its children listen on."""
    inodes, out = {}, set()
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if (target := os.readlink(fd)).startswith("socket:["):
                inodes[target[8:-1]] = fd.parts[2]
        except OSError:
            continue
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[n] for n in (1, 3, 9))
            if state == "0A" and inode in inodes:
                out.add((local.split(":")[0], inodes[inode]))
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two workers of this machine, which share a store, and what listened before."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as m:
        for name in ("runs", "records"):
            m.setenv(f"SIDAE_{name.upper()}", str(folder / name))
        m.setenv("SIDAE_THREADS", "7")  # the caller's own is not the workers'
        before = listening() if Path("/proc/net").exists() else set()
        with grid.local(2, "cpu") as address:
            yield address, before


def test_a_grid_on_this_machine(two, monkeypatch, tmp_path):
    """Each once, in the order asked for, equal to what one process computes; one fails for its config and is named."""
    address, before = two
    monkeypatch.setenv("SIDAE_SCHEDULER", address)
    configs, bad, said = [c for s in range(4) for c in (run(s), knn(run(s)))], run(0, lr=1e30), []
    with pytest.raises(SidaeError, match=f"1 of 5 runs failed, the rest are kept. simsiam {bad.key()}: .*not finite"):
        runs.fetch_all([bad, *configs], device="cpu", log=said.append)
    assert sum("trained" in line for line in said) == 4
    assert any("5 of 5 runs done, 0 running, 1 failed" in line for line in said)
    records = runs.fetch_all(configs, device="cpu", log=said.append)
    assert [r["key"] for r in records] == [c.key() for c in configs] and sum("trained" in line for line in said) == 4
    assert {r["provenance"]["threads"] for r in records} == {max(1, grid.CPU_COUNT // 2)}
    if grid.CPU_COUNT // 2 <= 1:
        assert [bare(r) for r in records] == alone(configs, monkeypatch, tmp_path / "alone")


def test_whatever_fails_on_a_worker_is_named_with_its_traceback(two):
    """What the same run has finished comes back, and another run is computed."""
    bad, good = EvalConfig(run=run(11), kind="knn", label_count=1), [run(11), knn(run(11)), run(12)]
    beyond = run(13, hidden=2**40)
    with pytest.raises(SidaeError, match="2 of 3 runs failed") as e:
        runs.fetch_all([beyond, bad, *good], client=two[0], device="cpu", log=lambda _: None)
    assert f"simsiam {beyond.key()}: training: RuntimeError" in str(e.value)
    assert f"knn {bad.key()}: The 1 labels" in str(e.value)
    assert [note.splitlines()[-1].split(":")[0] for note in e.value.__notes__] == ["RuntimeError"]  # of what is not ours
    assert runs.missing([beyond, bad, *good]) == [beyond, bad]


def test_what_this_machine_cannot_file_does_not_stop_the_others(two, monkeypatch, tmp_path):
    monkeypatch.setenv("SIDAE_RUNS", str(tmp_path))  # the workers have another store
    configs = [run(14), run(15), run(16)]
    (tmp_path / configs[0].key()).write_text("a file where the run's folder would be")
    with pytest.raises(SidaeError, match=f"1 of 3 runs failed, .*simsiam {configs[0].key()}: .*cannot be written"):
        runs.fetch_all(configs, client=two[0], device="cpu", log=lambda _: None)
    assert runs.missing(configs) == configs[:1]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux lists its sockets there")
def test_nothing_listens_to_the_outside(two):
    opened = {address for address, pid in listening() - two[1]}
    assert opened == {"0100007F"}  # 127.0.0.1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its allocator")
def test_a_worker_keeps_the_memory_of_its_tensors(two):
    """One that is given back with every tensor halves the speed of narrow networks, and of any network on large batches;
    a page taken anew is a fault."""
    def faults(size: int) -> int:
        import resource

        with grid._slot("cpu"):
            torch.ones(size)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(size)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with grid.Client(two[0], set_as_default=False) as client:
        for size in (2**18, 2**25):  # 1 and 128 MiB, in pages of 4 KiB; the latter glibc never keeps by itself
            assert client.submit(faults, size).result() < 20 * size / 1024 / 4


def test_a_relative_place_is_the_callers_on_every_worker(two, monkeypatch, tmp_path):
    """In the workers' own folder there is none of this name."""
    for n in range(16):
        (place := tmp_path / "pics" / "train" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 9 * n, np.uint8)).save(place / f"{n}.png")
    monkeypatch.chdir(tmp_path)
    config = experiments.run("simsiam", "folder:pics", "smoke", epochs=1, batch=8)
    [record] = runs.fetch_all([config], client=two[0], device="cpu", log=lambda _: None)
    assert record["data"]["name"] == f"folder:{tmp_path}/pics"


def test_a_worker_that_lacks_the_images(two, monkeypatch, tmp_path):
    """The set and the worker are named, and another run is computed."""
    monkeypatch.setenv("SIDAE_DATA", str(tmp_path))  # the workers have another
    images = np.arange(16 * 8 * 8, dtype=np.uint8).reshape(16, 8, 8)
    np.savez(tmp_path / "mine.npz", train_images=images, train_labels=np.arange(16) % 2)
    config = experiments.run("simsiam", "mine", "smoke", epochs=1, batch=8)
    with pytest.raises(SidaeError) as e:
        runs.fetch_all([config, run(17)], client=two[0], device="cpu", log=lambda _: None)
    assert re.fullmatch(f"1 of 2 runs failed, the rest are kept. simsiam {config.key()}: There is no data set 'mine': .* "
                        r"\(on the worker tcp://127.0.0.1:\d+\)\.", str(e.value)) and runs.find(run(17))


def test_time_is_up_on_a_grid(two):
    with pytest.raises(train.Stopped, match="Time is up.*2 of 2 records are left"):
        runs.fetch_all([run(8), run(9)], client=two[0], device="cpu", minutes=0, log=lambda _: None)


def test_no_scheduler_is_one_sentence(store):
    with (dask.config.set({"distributed.comm.timeouts.connect": "50ms"}),
          pytest.raises(SidaeError, match="No scheduler answers at tcp://127.0.0.1:9; start one")):
        runs.fetch_all([run(0)], client="tcp://127.0.0.1:9", log=lambda _: None)
    with pytest.raises(SidaeError, match="at least one job"), grid.local(0):
        pass


@slow
def test_without_the_extra_the_rest_works(store):
    code = ("import sys; sys.modules.update(dict.fromkeys(['distributed', 'dask']))\n"
            "from sidae_lib import __main__\n"
            "asked = ['run', 'sidae_step_by_step', '--scale', 'smoke', '--device', 'cpu']\n"
            "sys.exit(__main__.main([*asked, '--scheduler', 'tcp://127.0.0.1:9']) + __main__.main([*asked, '--jobs', '2']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True)
    assert "1 runs and 0 evaluations are recorded" in done.stdout
    assert done.returncode == 2 and 'pip install "sidae-lib[cluster]"' in done.stderr and done.stderr.count("\n") == 1


def test_dependencies_come_first(store, monkeypatch):
    """A run's own dependencies and an evaluation's; the backbones that are needed of each."""
    encoder, second, third = run(0, epochs=4), run(1), run(2)
    monkeypatch.setattr(runs, "dependencies", lambda c: [c.run] if isinstance(c, EvalConfig) else
                        {second: [encoder], third: [second]}.get(c, []))  # fmt: skip
    jobs = runs.plan([knn(third), EvalConfig(run=encoder, kind="knn", epoch=2), second], log=lambda _: None)
    assert [(j.run, j.epochs, len(j.evals)) for j in jobs] == [(encoder, {2, 4}, 1), (second, {1}, 0), (third, {1}, 1)]


def test_what_a_recorded_run_is_still_asked_for_is_not_last(store):
    first, second = run(0), run(1)
    runs.fetch_all([first], device="cpu", log=lambda _: None)
    jobs = runs.plan([first, second, knn(first), knn(second)], log=lambda _: None)
    assert [(j.run, len(j.evals)) for j in jobs] == [(first, 1), (second, 1)]


# --- the plan -------------------------------------------------------------------------------------------------------


def test_machines_is_the_smallest_number_that_first_fit_finds():
    assert runs.machines([3, 3, 3, 3], 6) == 2 and runs.machines([3, 3, 3, 3], 5.9) == 4
    assert runs.machines([5, 4, 1, 2], 6) == 2 and runs.machines([], 1) == 0
    with pytest.raises(SidaeError, match="One run alone takes 2.00 hours"):
        runs.machines([1, 7200], 3600)


def test_seconds_are_those_of_recorded_runs_alike(store):
    config, other = run(0, epochs=3), run(0, backbone="resnet18", width=16, dim=64, hidden=64, pred_hidden=16)
    [made, probe] = runs.fetch_all([run(1), knn(run(1))], device="cpu", log=lambda _: None)
    each = runs.seconds_each([config, knn(config)])
    assert each == {config: pytest.approx(3 * made["seconds"] + probe["seconds"], rel=1e-6)}
    assert runs.seconds_each([other]) is None and runs.seconds_each([other], rate=128)[other] == 2  # 256 images


def cli(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "sidae_lib", *args], capture_output=True, text=True, cwd=paths.ROOT,
                          env=os.environ | env, timeout=300)  # fmt: skip


@slow
def test_a_plan_of_the_paper_ten_times_over(store, cli):
    """Hours and machines by the rate given; nothing is computed."""
    once, often = (cli("run", "accuracy_vs_epochs", "--scale", "paper", "--seeds", str(n), "--plan", "24", "--rate", "8000")
                   for n in (5, 50))
    pattern = r"^([\d,]+) runs and ([\d,]+) evaluations.*\nAbout ([\d,.]+) hours .* ([\d.]+); (\d+) machines"
    found = [re.search(pattern, p.stdout) for p in (once, often)]
    assert all(found), once.stdout + once.stderr + often.stderr
    a, b = ([float(v.replace(",", "")) for v in f.groups()] for f in found)
    assert [y / x for x, y in zip(a[:3], b[:3])] == pytest.approx([10, 10, 10], rel=0.01) and b[4] >= 9 * a[4] / 2
    assert not paths.runs().exists()


# --- many machines --------------------------------------------------------------------------------------------------

QUICK = {"OMP_NUM_THREADS": "1", "SIDAE_THREADS": "1", "TQDM_DISABLE": "1", "CXX": "none",  # nothing to compile with
         "DASK_LOGGING__DISTRIBUTED": "info"}  # which the library makes critical; tests read that a worker is there


class Cluster:
    """A scheduler and workers without nannies, each a process with a store of its own."""

    def __init__(self, folder: Path, stack: ExitStack, **env: str) -> None:
        self.folder, self.stack, self.env = folder, stack, os.environ | QUICK | {"PYTHONPATH": str(paths.ROOT)} | env
        self.address = self.start_scheduler()

    def start(self, name: str, *args: str, **env: str) -> subprocess.Popen:
        with open(self.folder / f"{name}.log", "w") as log:
            p = subprocess.Popen([sys.executable, "-P", "-m", "dask", *args], env=self.env | env, cwd=self.folder, stdout=log,
                                 stderr=log)  # fmt: skip
        self.stack.callback(lambda: (p.kill(), p.wait()))
        return p

    def start_scheduler(self, *args: str) -> str:
        file = self.folder / "scheduler.json"
        file.unlink(missing_ok=True)
        self.scheduler = self.start("scheduler", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                                    "--scheduler-file", str(file), *args)  # fmt: skip
        wait(lambda: file.exists() and file.stat().st_size)
        return json.loads(file.read_text())["address"]

    def worker(self, name: str, *args: str, preload: str = "", **env: str) -> subprocess.Popen:
        (self.folder / f"{name}.py").write_text(preload)
        return self.start(name, "worker", self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard",
                          "--host", "127.0.0.1", "--memory-limit", "0", "--preload", str(self.folder / f"{name}.py"), *args,
                          **{"SIDAE_RUNS": str(self.folder / name)} | env)  # fmt: skip

    def records(self, name: str) -> list[Path]:
        return list((self.folder / name).glob("*/record.json"))


def wait(ready, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


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


@pytest.fixture
def cluster(store):
    with ExitStack() as stack:
        yield Cluster(store, stack)


@slow
def test_workers_die_and_join(cluster, store, monkeypatch):
    """No shared store. One is killed in the middle of a run, one joins late, one more has another version and leaves: the
    grid completes, each record equal to what one process computes, and the weights come back where asked for."""
    shutil.copytree(paths.ROOT / "sidae_lib", store / "old" / "sidae_lib", ignore=shutil.ignore_patterns("__pycache__"))
    init = store / "old" / "sidae_lib" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{__version__}"', '"0.0.9"'))
    a, _ = cluster.worker("a"), cluster.worker("b")
    configs = [c for s in range(6) for c in (run(s, epochs=30), knn(run(s, epochs=30)))]

    def events() -> None:
        wait(lambda: cluster.records("a") and len(list((store / "a").glob("*/lock"))) > len(cluster.records("a")))
        time.sleep(0.5)
        a.send_signal(signal.SIGKILL)
        old = cluster.worker("old-worker", PYTHONPATH=str(store / "old"))
        cluster.worker("c")
        assert old.wait(60) is not None
        assert "has sidae-lib 0.0.9, the grid " + __version__ in (store / "old-worker.log").read_text()

    said: list[str] = []
    with afterwards(events):
        records = runs.fetch_all(configs, client=cluster.address, device="cpu", weights=True, log=said.append)
    assert a.poll() == -signal.SIGKILL and cluster.records("b") and cluster.records("c") and not cluster.records("old-worker")
    assert [bare(r) for r in records] == alone(configs, monkeypatch, store / "alone")
    for c in configs[::2]:
        assert train.sha256(runs.backbone(c).read_bytes()) == runs.find(c)["files"][runs.backbone(c).name]
    assert re.search("6 of 6 runs done, [01] running, 0 failed", said[-1]), said  # 1: the last is done and not yet put down
    assert any(re.search("of 6 runs done, [12] running", line) for line in said)


@slow
def test_on_a_shared_store_another_worker_goes_on(cluster, store, monkeypatch):
    """The run of a killed worker is gone on with from its last checkpoint, to the bits of an uninterrupted one."""
    monkeypatch.setenv("SIDAE_RUNS", str(store / "shared"))
    counting = ("import os\nfrom sidae_lib import train\ntrain.CHECKPOINT_SECONDS = 0.2\n"
                "advance = getattr(train.Run.advance, 'plain', train.Run.advance)\n"  # this file is loaded twice
                "def counted(self, *args):\n    with open(os.environ['STEPS'], 'a') as f:\n        f.write(f'{self.step}\\n')\n"
                "    advance(self, *args)\ncounted.plain, train.Run.advance = advance, counted\n")  # fmt: skip
    workers = [cluster.worker(w, preload=counting, SIDAE_RUNS=str(store / "shared"), STEPS=str(store / f"{w}.steps"))
               for w in "ab"]  # fmt: skip
    config, steps = run(0, epochs=49), {}  # of 200 steps on views would be compiled where there is a compiler

    def events() -> None:
        wait(lambda: runs.folder(config).joinpath("checkpoint.safetensors").exists())
        victim = next(w for w in "ab" if (store / f"{w}.steps").exists())
        workers["ab".index(victim)].kill()
        steps["killed"] = store / f"{victim}.steps"
        steps["next"] = store / f"{'ba'['ab'.index(victim)]}.steps"

    with afterwards(events):
        records = runs.fetch_all([config], client=cluster.address, device="cpu", log=lambda _: None)
    first, second = (list(map(int, steps[k].read_text().split())) for k in ("killed", "next"))
    assert first[0] == 0 and 0 < second[0] <= first[-1] + 1 and second[-1] == records[0]["steps"] - 1
    assert [bare(r) for r in records] == alone([config], monkeypatch, store / "alone")


@slow
def test_weights_of_a_dependency_travel(cluster, store, monkeypatch):
    first, rest = run(0), [run(s, epochs=20) for s in range(1, 5)]
    monkeypatch.setattr(runs, "dependencies", lambda c: [c.run] if isinstance(c, EvalConfig) else [first] if c in rest else [])
    cluster.worker("a"), cluster.worker("b")
    wait(lambda: all("Registered to" in (store / f"{w}.log").read_text() for w in "ab"))
    runs.fetch_all(rest, client=cluster.address, device="cpu", log=lambda _: None)
    names = [[p.parent.name for p in cluster.records(w)] for w in "ab"]
    assert all(first.key() in n and len(n) > 1 for n in names)  # trained by one, sent to the other
    [x, y] = ((store / w / first.key() / "backbone-e001.safetensors").read_bytes() for w in "ab")
    assert x == y and not runs.backbone(first).exists()  # nobody asked for it here


@slow
def test_the_scheduler_is_lost(cluster, store):
    configs, said = [run(s, epochs=20) for s in range(4)], []

    def log(line: str) -> None:
        said.append(line)
        if "runs done" in line:
            cluster.scheduler.kill()

    worker = cluster.worker("a")
    with pytest.raises(SidaeError, match=f"The scheduler at {cluster.address} was lost; what had finished is kept"):
        runs.fetch_all(configs, client=cluster.address, device="cpu", log=log)
    kept = [c for c in configs if runs.find(c)]
    assert 1 <= len(kept) < 4
    worker.kill()
    cluster.address = cluster.start_scheduler()
    cluster.worker("b")
    runs.fetch_all(configs, client=cluster.address, device="cpu", log=said.append)
    assert len(cluster.records("b")) == 4 - len(kept)


@slow
def test_another_version_is_refused(cluster, store):
    cluster.worker("a", preload="import sidae_lib; sidae_lib.__version__ = '0.0.9'\n")
    wait(lambda: "Registered to" in (store / "a.log").read_text())
    with pytest.raises(SidaeError, match=f"1 workers have another sidae-lib than {__version__} .tcp://.* has 0.0.9"):
        runs.fetch_all([run(0)], client=cluster.address, device="cpu", log=lambda _: None)


@slow
def test_one_worker_with_two_gpus_takes_two_runs(cluster, store):
    """Declared as resources; a run has each to itself. The devices are the CPU's here: it is the counting that is tested."""
    cluster.worker("a", "--nthreads", "4", "--resources", "GPU=2", preload=(
        "import threading, time\nfrom sidae_lib import train\n"
        "used, plain = [], getattr(train, 'plain', train.pretrain)\n"
        "train.plain = plain\n"  # a preload is run twice
        "def pretrain(*a, **k):\n"
        "    used.append(threading.get_ident()); open('most', 'a').write(f'{len(used)}\\n'); time.sleep(1)\n"
        "    try: return plain(*a, **k)\n"
        "    finally: used.remove(threading.get_ident())\n"
        "train.pretrain = pretrain\n"))
    wait(lambda: "Registered to" in (store / "a.log").read_text())
    runs.fetch_all([run(s) for s in range(6)], client=cluster.address, log=lambda _: None)
    assert max(map(int, (store / "most").read_text().split())) == 2


# --- TLS and Slurm, as the README says ------------------------------------------------------------------------------

README = (paths.ROOT / "README.md").read_text().partition("## One machine, several, Slurm")[2].partition("\n## ")[0]


def block(kind: str, holds: str) -> str:
    [found] = [b for b in re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) if holds in b]
    return found


@pytest.fixture
def certificates(store):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    subprocess.run(["bash", "-ec", block("bash", "openssl")], cwd=store, check=True, capture_output=True)
    return store


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
        asked = ("run", "sidae_step_by_step", "--scale", "smoke", "--device", "cpu", "--scheduler", cluster.address)
        stranger = cli(*asked, DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT="5s")
        assert stranger.returncode == 2 and "No scheduler answers at tls://" in stranger.stderr
        done = cli(*asked, **env)
        assert done.returncode == 0 and len(cluster.records("a")) == 1, done.stderr + (certificates / "a.log").read_text()


@slow
def test_slurm(certificates):
    """The README's script, its job file run by an `sbatch` that is bash."""
    pytest.importorskip("dask_jobqueue")
    script = block("python", "SLURMCluster").replace('"paper"', '"smoke"').replace("accuracy_vs_epochs", "sidae_step_by_step")
    (certificates / "grid.py").write_text(script.replace("jobs=20", "jobs=1"))
    shims = certificates / "shims"
    shims.mkdir()
    (shims / "sbatch").write_text('#!/bin/bash\ncp "$1" job.sh\nsetsid bash job.sh >job.log 2>&1 &\n'
                                  'echo $! >job.pid\necho "Submitted batch job 1"\n')  # fmt: skip
    (shims / "scancel").write_text('#!/bin/bash\nkill -TERM -- -"$(cat job.pid)"\n')
    for shim in shims.iterdir():
        shim.chmod(0o755)
    env = os.environ | QUICK | {"PATH": f"{shims}:{os.environ['PATH']}", "PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run([sys.executable, "grid.py"], cwd=certificates, env=env, capture_output=True, text=True, timeout=200)
    log = (certificates / "job.log").read_text() if (certificates / "job.log").exists() else "no job"
    assert done.returncode == 0, done.stderr + log
    job = (certificates / "job.sh").read_text()
    for line in ("-n 1", "--cpus-per-task=8", "--mem=30G", "-t 12:00:00", "--gres=gpu:1"):
        assert f"#SBATCH {line}" in job.splitlines(), job
    assert "--nthreads 1" in job and "--resources GPU=1" in job and "tls://" in job and "--tls-key" in job
    assert len(list(runs.every("record"))) == 1


@slow
def test_ctrl_c_leaves_a_checkpoint_of_every_run(store):
    """In a terminal it reaches the caller and the workers at once; a minute of training would be lost without."""
    code = ("from sidae_lib import experiments, grid, runs\nfrom sidae_lib.config import EvalConfig\n"
            "configs = [EvalConfig(run=experiments.run('simsiam', 'digits', 'smoke', n, epochs=5000), kind='knn', k=5,\n"
            "                      epoch=0) for n in (0, 1)]\n"
            "with grid.local(2, 'cpu') as address:\n    runs.fetch_all(configs, client=address, device='cpu')\n")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], cwd=paths.ROOT, env=os.environ | {"CXX": "none"},
                               start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    configs = [run(n, epochs=5000) for n in (0, 1)]
    wait(lambda: all(runs.backbone(c, 0).exists() for c in configs))  # which are kept as training begins
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode and "KeyboardInterrupt" in said.splitlines()[-1] and said.count("Traceback") == 1, said
    for c in configs:
        trained = train.Run(c, data.load("digits"), torch.device("cpu"))
        trained.restore(runs.folder(c) / "checkpoint.safetensors")
        assert 0 < trained.step < trained.steps
