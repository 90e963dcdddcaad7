"""Real processes that die where a test says: the library is imported once, every attempt is a fork of this process.

    python tests/killing.py FOLDER '[["scenario", arguments ...], ...]'

prints what the scenarios return, as JSON by name. The library knows nothing of it: open, fsync, replace and the
optimiser's step are wrapped here.
"""

import json
import os
import resource
import shutil
import signal
import sys
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from sidae_lib import __main__, checkpoint, data, experiments, paths, runs, store, train
from sidae_lib.config import EvalConfig, SidaeError


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(n: int) -> None:
    """In the n-th step from here, after the optimiser has moved the weights."""
    left = iter(range(n - 1, -1, -1))
    for kind in (torch.optim.SGD, torch.optim.Adam):
        kind.step = lambda self, step=kind.step: (step(self), next(left) or die())[0]


def kill_at_write(file: str, place: str) -> None:
    """In the next write of a file of this kind: just opened, half written, not synced, not renamed, just renamed."""
    real_open, fsync, replace = open, os.fsync, os.replace
    current = ""

    class Half:
        def __init__(self, f):
            self.f = f

        def __enter__(self):
            return self

        def __exit__(self, *e):
            self.f.close()

        def write(self, content):
            self.f.write(content[: len(content) // 2])
            self.f.flush()
            die()

    def opened(path, mode="r"):
        nonlocal current
        current = Path(path).name
        f = real_open(path, mode)
        if mode == "wb" and current.startswith(f".{file}"):
            if place == "open":
                die()
            if place == "write":
                return Half(f)
        return f

    def renamed(a, b):
        if place == "rename" and Path(b).name.startswith(file):
            die()
        replace(a, b)
        if place == "renamed" and Path(b).name.startswith(file):
            die()

    paths.open = opened
    os.fsync = lambda fd: die() if place == "sync" and current.startswith(f".{file}") else fsync(fd)
    os.replace = renamed


def fork(attempt, said: bool = False):
    """Runs `attempt` in a child; its exit code, or minus the signal that ended it; with `said`, what it had to say too."""
    out, into = os.pipe()
    if pid := os.fork():
        os.close(into)
        with open(out) as f:
            text = f.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return (code, text) if said else code
    code = 0
    try:
        attempt()
    except SidaeError as e:
        os.write(into, f"{type(e).__name__}: {e}".encode())
        code = 3
    except BaseException:
        traceback.print_exc()
        code = 4
    os._exit(code)


def steps_into(path: Path) -> None:
    """Notes every step that is taken, and every checkpoint that is whole."""
    advance, save = train.Run.advance, train.Run.save

    def note(line: str) -> None:
        with open(path, "a") as f:
            f.write(line + "\n")

    train.Run.advance = lambda self, *a: (advance(self, *a), note(f"step {self.step}"))[0]
    train.Run.save = lambda self, p: (save(self, p), note(f"checkpoint {self.step}"))[0]


def wanted(method: str, seed: int) -> list:
    """A run of two epochs, 4 steps each, with an evaluation of both; of methods with more state one epoch alone."""
    if method not in ("sidae", "simsiam", "dae", "supervised"):
        return [experiments.run(method, "digits", "smoke", seed, epochs=1)]
    more = {"label_count": 250, "batch": 64, "epochs": 2} if method == "supervised" else {}
    run = experiments.run(method, "digits", "smoke", seed, **more)
    return [run, *(EvalConfig(run=run, kind="knn", epoch=e, k=5) for e in (1, 2))]


def bare(value):
    """A record without time and provenance, the weights' checksums kept."""
    if isinstance(value, dict):
        left = ("seconds", "images_per_second", "provenance", "check")
        return {k: bare(v) for k, v in value.items() if k not in left}
    return [bare(v) for v in value] if isinstance(value, list) else value


def quiet(_: str) -> None:
    pass


def fetch(configs) -> None:
    runs.fetch_all(configs, device="cpu", log=quiet)


def whole(configs: list) -> list:
    """The records of a run that nothing interrupted, made in another store."""
    own_store = os.environ["SIDAE_RUNS"]
    os.environ["SIDAE_RUNS"] = own_store + "-whole"
    assert (done := fork(lambda: fetch(configs), said=True)) == (0, ""), done
    records = [store.find(c) for c in configs]
    os.environ["SIDAE_RUNS"] = own_store
    return records


def killed(plan: list) -> list:
    """For each [method, [[file, place] or ["step", n], ...]]: one start for each kill, and one that is left to finish."""
    train.CHECKPOINT_SECONDS = 0.0  # after every step
    out = []
    for seed, (method, points) in enumerate(plan):
        configs, log = wanted(method, seed), paths.runs().parent / f"{seed}.log"
        expected, hits = whole(configs), []

        def attempt(file="", place="", configs=configs, log=log):
            steps_into(log)
            kill_at_step(place) if file == "step" else kill_at_write(file, place)
            fetch(configs)

        for point in points:
            log.open("a").write("start\n")
            hits.append([*point, fork(lambda point=point: attempt(*point))])
        log.open("a").write("start\n")
        code = fork(lambda: attempt("none", "none"))
        out.append({"method": method, "code": code, "hits": hits, "log": log.read_text().split("\n"),
                    "same": bare(expected) == bare([store.find(c) for c in configs]),
                    "files": sorted(p.name for p in store.folder(configs[0]).iterdir())})
    return out


def asked_by_many(processes: int, n: int) -> dict:
    """Many processes ask for the same runs at once, every other one in the opposite order."""
    configs = [c for k in range(n) for c in wanted("simsiam", k)]
    return crowd(processes, configs) | {"keys": sorted(c.key() for c in configs if not isinstance(c, EvalConfig))}


def owner_dies(processes: int) -> dict:
    """As before, and whoever trains first is killed in the middle; `seconds` until another writes what comes next."""
    first, save = paths.runs().parent / "first", train.Run.save_backbone

    def dying(self, *a):
        save(self, *a)
        try:
            first.touch(exist_ok=False)
        except FileExistsError:
            (first.parent / "next").touch()
        else:
            die()

    train.Run.save_backbone = dying
    out = crowd(processes, wanted("simsiam", 0))
    train.Run.save_backbone = save
    return out | {"seconds": (first.parent / "next").stat().st_mtime - first.stat().st_mtime}


def crowd(processes: int, configs: list) -> dict:
    folder, pids = paths.runs().parent, []
    for p in range(processes):
        if pid := os.fork():
            pids.append(pid)
            continue
        said: list[str] = []
        records = runs.fetch_all(configs[:: -1 if p % 2 else 1], device="cpu", log=said.append)
        (folder / f"{p}.json").write_text(json.dumps({"said": said, "records": sorted(records, key=lambda r: r["key"])}))
        os._exit(0)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    got = [json.loads(f.read_text()) for f in folder.glob("*.json")]
    return {"codes": codes, "same": all(g["records"] == got[0]["records"] for g in got),
            "trained": sorted(line.split()[2] for g in got for line in g["said"] if line.startswith("trained"))}


def disk_full(every: int, small: bool) -> list:
    """The n-th write of a run and its evaluations finds room for half of what it writes (a limit on the size of a file),
    or, where the store lies on a small disk, none at all; then there is room again."""
    train.CHECKPOINT_SECONDS = 0.0
    configs, write, base = wanted("simsiam", 0), train.write, paths.runs()
    expected, ballast, out = whole(configs), base.parent / "ballast", []
    shutil.rmtree(f"{base}-whole")

    def attempt(n: int) -> None:
        left = iter(range(n, -2, -1))

        def limited(path, content):
            if next(left):
                return write(path, content)
            there = {p: p.read_bytes() for p in base.glob("*/*") if p.name != "lock"}
            if small:
                fill(ballast)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, resource.RLIM_INFINITY))
            try:
                write(path, content)
            except SidaeError as e:
                intact = {p: p.read_bytes() for p in base.glob("*/*") if p.name != "lock"} == there
                raise SidaeError(f"{'nothing changed' if intact else 'CHANGED'}; {e}") from None

        train.write = checkpoint.write = limited
        fetch(configs)

    for n in range(0, 100, every):
        code, said = fork(lambda n=n: attempt(n), said=True)
        ballast.unlink(missing_ok=True)
        again = fork(lambda: fetch(configs))
        same = bare(expected) == bare([store.find(c) for c in configs])
        out.append({"code": code, "said": said, "again": again, "same": same})
        shutil.rmtree(base)
        if code == 0:  # there are not so many writes
            return out
    raise RuntimeError("no end of writes")


def fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as f:
        for size in (2**16, 2**10, 1):
            with suppress(OSError):
                while True:
                    f.write(bytes(size))


def signalled() -> list:
    """The command line gets a signal while it reads data, in the middle and in the last step, and is called again."""
    base, [config, *_], out = paths.runs(), wanted("sidae", 0), []
    expected = whole([config])

    def call(folder: Path, at: str, number: int) -> None:
        for fd, name in ((1, "out"), (2, "said")):
            os.dup2(os.open(folder / f"{name}-{at}", os.O_WRONLY | os.O_CREAT), fd)
        steps_into(folder / f"steps-{at}")
        if at == "load":
            load = data.by_fingerprint
            data.by_fingerprint = lambda *a, **k: (os.kill(os.getpid(), number), load(*a, **k))[1]
        elif at != "again":
            step, left = torch.optim.SGD.step, iter(range({"step": 2, "last step": 7}[at], -1, -1))
            torch.optim.SGD.step = lambda self: (step(self), next(left) or os.kill(os.getpid(), number))[0]
        code = __main__.main(["run", "sidae_step_by_step", "--scale", "smoke", "--device", "cpu"])
        sys.stdout.flush()
        os._exit(code)

    for at, number in (("load", signal.SIGINT), ("load", signal.SIGTERM), ("step", signal.SIGINT), ("step", signal.SIGTERM),
                       ("last step", signal.SIGINT)):  # fmt: skip
        folder = base.parent / f"{at}-{number}"
        folder.mkdir()
        os.environ["SIDAE_RUNS"] = str(folder / "runs")
        codes = [fork(partial(call, folder, a, number)) for a in (at, "again")]
        steps = folder / "steps-again"
        out.append({"at": at, "codes": codes, "out": (folder / f"out-{at}").read_text(),
                    "said": (folder / f"said-{at}").read_text(), "same": bare(expected) == bare([store.find(config)]),
                    "again": steps.read_text().count("step") if steps.exists() else 0})
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out = Path(sys.argv[1]), {}
    os.environ |= {"SIDAE_RECORDS": str(folder / "none"), "SIDAE_RUNS": str(folder / "first")}
    fetch(wanted("simsiam", 99))  # what is imported and loaded late is so before the first fork
    shutil.rmtree(folder / "first")
    for n, (name, *arguments) in enumerate(json.loads(sys.argv[2])):
        (folder / str(n)).mkdir()
        os.environ["SIDAE_RUNS"] = str(folder / str(n) / "runs")
        out[name] = globals()[name](*arguments)
    print(json.dumps(out))
