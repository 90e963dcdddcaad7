"""A grid of runs on a Dask cluster: processes of this machine or many machines, with a shared file system or without.

A run and its evaluations are one task, queued behind the runs it depends on. A worker computes it in its own store and
sends back the records; weights travel where they are asked for or another run starts from them. The cluster extra is
needed (`pip install "sidae-lib[cluster]"`).
"""

import ctypes
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from . import __version__, data, runs, threads, train
from .config import RunConfig, SidaeError, digest

os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")  # read on import, inherited; what failed the caller says

try:
    from dask import config
    from dask.system import CPU_COUNT
    from distributed import Client, Nanny, Reschedule, Scheduler, SpecCluster, WorkerPlugin, as_completed, get_worker
except ImportError as e:
    raise SidaeError('A cluster needs the extra of that name: pip install "sidae-lib[cluster]".') from e


@dataclass
class Result:
    """What a task sends back; of one that failed or was stopped, what it had finished."""

    records: list[tuple[runs.Config, runs.Record]] = field(default_factory=list)
    error: SidaeError | None = None
    files: tuple[RunConfig, dict[str, str]] | None = None  # an unfinished run's backbones, whose evaluations are here
    weights: dict[tuple[RunConfig, int], bytes] = field(default_factory=dict)  # by run and epoch
    said: list[str] = field(default_factory=list)

    def keep(self, log: Callable) -> None:
        """Into this machine's store, what it does not have; where the store is shared that is nothing."""
        if self.files and runs.found(self.files[0], log) is None:
            with runs._locked(self.files[0]):
                runs.one_trajectory(*self.files, log)
        for config, record in self.records:
            mine = runs.found(config, log)
            if mine is None or self.weights and mine != record:  # weights are those of their own record
                with runs._locked(config):
                    runs.keep(config, record)
        for (run, epoch), content in self.weights.items():
            path = runs.backbone(run, epoch)
            if not path.exists() or path.read_bytes() != content:
                train.write(path, content)


_GPUS: queue.SimpleQueue = queue.SimpleQueue()  # those of this process that no run uses
for _n in range(torch.cuda.device_count()):
    _GPUS.put(_n)


# glibc keeps the memory of tensors that are gone, in one arena, whatever their size: a nanny has it given back, to be mapped
# and cleared anew for the next tensor. Environment variables and malloc.h's numbers; the latter come late for some arenas.
_MALLOC = {"MALLOC_ARENA_MAX": (-8, 1), "MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, 2**30)}


@contextmanager
def _slot(device: str) -> Iterator[torch.device]:
    """One GPU of this process to itself, or the CPU; with the torch threads that its share of the cores allows.

    A nanny starts its worker with one thread, and the number of threads changes speed and bits: it is set and looked at.
    """
    with suppress(AttributeError, TypeError):  # another C library; TypeError: Windows
        for name, value in _MALLOC.values():  # of a worker that `local` did not start
            ctypes.CDLL(None).mallopt(name, value)
    number = threads.asked() or max(1, CPU_COUNT // get_worker().state.nthreads)
    torch.set_num_threads(number)
    if torch.get_num_threads() != number:
        raise SidaeError(f"This worker was to run with {number} threads and has {torch.get_num_threads()}.")
    where = train.device_of(device)
    if where.type == "cpu":
        yield where
        return
    n = _GPUS.get()
    try:
        torch.cuda.set_device(n)  # of this thread
        yield where
    finally:
        _GPUS.put(n)


def work(version: str, job: runs.Job, given: list[Result], device: str, until: float | None, sent: set[int],
         sources: dict[str, str]) -> Result:  # fmt: skip
    """One job, on a worker. given: what the jobs it depends on sent.  until: Unix time.  sent: epochs whose weights go
    back.  sources: where the caller found its image sets."""
    if version != __version__:  # it joined late: it leaves, and another does the job
        print(f"This worker has sidae-lib {__version__}, the grid {version}; install the same.", file=sys.stderr, flush=True)
        worker = get_worker()
        worker.loop.add_callback(worker.close, reason="other version of sidae-lib")
        raise Reschedule
    train._Stop.signal = None  # of an earlier call
    data.remember(sources)
    out = Result()
    for result in given:
        if result.error:
            raise result.error
        result.keep(out.said.append)
    with _slot(device) as where:
        deadline = None if until is None else time.monotonic() + until - time.time()
        try:
            job.compute(where, deadline, out.said.append)
        except SidaeError as e:
            if not isinstance(e, train.Stopped):  # which machine lacks the images, or computes what is not finite
                e.args = (f"{str(e).removesuffix('.')} (on the worker {get_worker().address}).",)
            out.error = e
    out.records, out.files = job.records, (job.run, job.files) if job.files else None
    out.weights = {(job.run, e): path.read_bytes() for e in sent if (path := runs.backbone(job.run, e)).exists()}
    return out


class _Interruptible(WorkerPlugin):
    """Ctrl-C reaches every process of a terminal: the run of a worker stops at a checkpoint, the worker when it is told."""

    def setup(self, worker: Any) -> None:
        signal.signal(signal.SIGINT, lambda number, frame: setattr(train._Stop, "signal", number))


def _running(dask_worker: Any) -> int:
    return dask_worker.state.executing_count


def _connect(client: "Client | str") -> "Client":
    """A client with workers of this version."""
    def version() -> str:  # travels by value, so that a worker without the package can answer too
        try:
            import sidae_lib

            return sidae_lib.__version__
        except ImportError:
            return "none"

    try:
        client = Client(client, set_as_default=False) if isinstance(client, str) else client
    except (OSError, ValueError, TypeError) as e:  # TypeError: TLS without a certificate
        raise SidaeError(f"No scheduler answers at {client}; start one with `dask scheduler`, or use --jobs.") from e
    wrong = {a: v for a, v in client.run(version).items() if v != __version__}
    if wrong:
        named = ", ".join(f"{a} has {v}" for a, v in list(wrong.items())[:3])
        raise SidaeError(f"{len(wrong)} workers have another sidae-lib than {__version__} ({named}); install the same.")
    return client


def outcomes(jobs: list[runs.Job], client: "Client | str", *, device: str, deadline: float | None, weights: bool,
             log: Callable) -> Generator[runs.Outcome, None, None]:  # fmt: skip
    """Runs the jobs on the cluster; each is yielded when it is done and its records are kept, with its error if it failed
    and how many are running then.

    Raises SidaeError when the scheduler is not there or is lost.
    """
    address, client, own = client, _connect(client), isinstance(client, str)
    until = None if deadline is None else time.time() + deadline - time.monotonic()
    started_from = {run for job in jobs for run in runs.dependencies(job.run)}
    futures: dict[RunConfig, Any] = {}
    try:
        gpus = any(w["resources"].get("GPU") for w in client.scheduler_info(n_workers=-1)["workers"].values())
        for job in jobs:
            sent = {job.run.epochs} if weights or job.run in started_from else set()
            sent |= job.epochs if job.run in started_from else set()  # mined pairs may start from an earlier one
            name = digest([job.run.key(), job.until, *sorted(e.key() for e in job.evals), *sorted(sent)])
            futures[job.run] = client.submit(
                work, __version__, job, [futures[r] for r in runs.dependencies(job.run)], device, until, sent,
                data.sources(), key=("sidae", name), resources={"GPU": 1} if gpus and device != "cpu" else None)
        log(f"{len(jobs)} runs on {len(client.nthreads())} workers at {client.scheduler.address}")
        of = {f.key: job for f, job in zip(futures.values(), jobs)}
        for future in as_completed(futures.values(), loop=client.loop):
            if future.status == "cancelled":
                raise ConnectionError
            error = future.exception()
            if error is None:
                result = future.result()
                error = result.error
                result.weights = result.weights if weights else {}  # else they were for other runs
                for line in result.said:
                    log(line)
                try:
                    result.keep(log)
                except SidaeError as e:  # what this machine cannot file; the other runs go on
                    error = error or e
            yield of[future.key], error, sum(client.run(_running, on_error="ignore").values())
    except (ConnectionError, OSError) as e:
        raise SidaeError(f"The scheduler at {address} was lost; what had finished is kept, the same call does the rest.") from e
    finally:
        if own:
            client.close()


@contextmanager
def local(jobs: int, device: str = "auto") -> Iterator[str]:
    """A scheduler and `jobs` worker processes of this machine, on the loopback address alone; yields the address.

    The processes share the GPUs in turn, or divide the cores among them.
    """
    if jobs < 1:
        raise SidaeError(f"There must be at least one job, not {jobs}.")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    here = {"host": "127.0.0.1", "dashboard": False}

    def worker(n: int) -> dict:
        env = {"SIDAE_THREADS": max(1, CPU_COUNT // jobs), "TQDM_DISABLE": 1, "SIDAE_SCHEDULER": ""}
        more = {"env": env | {"CUDA_VISIBLE_DEVICES": names[n % gpus]}, "resources": {"GPU": 1}} if gpus else {"env": env}
        return {"cls": Nanny, "options": {**here, "nthreads": 1, "memory_limit": 0, "plugins": [_Interruptible()], **more}}

    scheduler = {"cls": Scheduler, "options": here | {"dashboard_address": "127.0.0.1:0"}}  # 8787 may be another grid's
    keep = {f"distributed.nanny.pre-spawn-environ.{name}": value for name, (_, value) in _MALLOC.items()}
    with config.set(keep), SpecCluster({n: worker(n) for n in range(jobs)}, scheduler) as cluster:
        yield cluster.scheduler_address
