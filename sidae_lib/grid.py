"""Jobs on a Dask cluster of many machines, with a shared file system or without.

Each job is a task, queued behind those it depends on. A worker computes it in its own store and sends the
records back; weights travel where they are asked for or another run starts from them. This module alone needs
the cluster extra.
"""

import ctypes
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from . import __version__, data, store, tasks, threads, train
from .config import RunConfig, SidaeError, digest

os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")  # read on import; the caller says what failed

try:
    from dask.system import CPU_COUNT
    from distributed import Client, Reschedule, as_completed, get_worker
except ImportError as e:
    raise SidaeError('A cluster needs the extra of that name: pip install "sidae-lib[cluster]".') from e


@dataclass
class Result:
    """What a worker sends back of a job, also of one that failed or was stopped.

    weights: files of backbones, by epoch.
    """

    job: tasks.Job
    error: SidaeError | None = None
    weights: dict[int, bytes] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def keep(self, log: Callable) -> None:
        """Puts into this machine's store what it lacks; a shared store lacks nothing."""
        run = self.job.run
        if self.job.files and store.find(run, log) is None:
            with store.locked(run):
                store.one_trajectory(run, self.job.files, log)
        for config, record in self.job.records:
            mine = store.find(config, log)
            if mine is None or self.weights and mine != record:  # weights belong to their own record
                with store.locked(run):
                    store.keep(config, record)
        for epoch, content in self.weights.items():
            train.write(store.backbone(run, epoch), content)


# --- on a worker ----------------------------------------------------------------------------

_GPUS: queue.SimpleQueue = queue.SimpleQueue()  # those of this process that no run uses
for _n in range(torch.cuda.device_count()):
    _GPUS.put(_n)

# glibc gives the memory of a large tensor back at once, and a nanny asks it to do so for all of them; the next
# one faults at every page. Keep it, in one arena. Variables, and malloc.h's numbers for mallopt.
_MALLOC = {"MALLOC_ARENA_MAX": (-8, 1), "MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, 2**30)}


@contextmanager
def _slot(device: str) -> Iterator[None]:
    """One GPU of this process to itself, or the CPU; with the threads that its share of the cores allows."""
    with suppress(AttributeError, TypeError):  # another C library; TypeError: Windows
        for number, value in _MALLOC.values():
            ctypes.CDLL(None).mallopt(number, value)
    torch.set_num_threads(threads.asked() or max(1, CPU_COUNT // get_worker().state.nthreads))
    if train.device_of(device).type == "cpu":
        yield
        return
    gpu = _GPUS.get()
    try:
        torch.cuda.set_device(gpu)  # of this thread
        yield
    finally:
        _GPUS.put(gpu)


def work(version: str, job: tasks.Job, until: float | None, given: list[Result], sent: set[int],
         sources: dict[str, str]) -> Result:  # fmt: skip
    """Computes one job on a worker.

    until: its deadline as Unix time.  given: what the jobs it depends on sent.  sent: epochs whose weights go
    back.  sources: where the caller found its image sets.
    """
    worker = get_worker()
    if version != __version__:  # it joined late: it leaves, and another does the job
        print(f"This worker has sidae-lib {__version__}, the grid {version}; install the same.",
              file=sys.stderr, flush=True)  # fmt: skip
        worker.loop.add_callback(worker.close, reason="other version of sidae-lib")
        raise Reschedule
    train._Stop.signal = None  # of an earlier call
    data.remember(sources)
    out = Result(job)
    for result in given:
        if result.error:
            raise result.error
        result.keep(out.said.append)
    job.deadline = None if until is None else time.monotonic() + until - time.time()  # by this clock
    with _slot(job.device):
        out.error = job.compute(out.said.append)
    if out.error and not isinstance(out.error, train.Stopped):  # which machine lacks images or memory
        out.error.args = (f"{str(out.error).removesuffix('.')} (on the worker {worker.address}).",)
    paths = {epoch: store.backbone(job.run, epoch) for epoch in sent}
    out.weights = {epoch: path.read_bytes() for epoch, path in paths.items() if path.exists()}
    return out


# --- in the caller ----------------------------------------------------------------------------


def _connect(client: Client | str) -> Client:
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
        raise SidaeError(f"No scheduler answers at {client}; start one with `dask scheduler`, or use "
                         "--jobs.") from e  # fmt: skip
    wrong = [f"{a} has {v}" for a, v in client.run(version).items() if v != __version__]
    if wrong:
        raise SidaeError(f"{len(wrong)} workers have another sidae-lib than {__version__} "
                         f"({', '.join(wrong[:3])}); install the same.")  # fmt: skip
    return client


def _submitted(jobs: list[tasks.Job], client: Client, weights: bool) -> dict[RunConfig, Any]:
    """A future for each job."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    gpus = jobs[0].device != "cpu" and any(w["resources"].get("GPU") for w in workers)
    started_from = {run for job in jobs for run in tasks.dependencies(job.run)}
    futures: dict[RunConfig, Any] = {}
    for job in jobs:
        sent = {job.run.epochs} if weights else set()
        if job.run in started_from:
            sent |= {job.run.epochs, *job.epochs}  # mined pairs may start from an earlier epoch
        given = [futures[run] for run in tasks.dependencies(job.run)]
        until = None if job.deadline is None else time.time() + job.deadline - time.monotonic()
        name = digest([job.run.key(), job.until, *sorted(e.key() for e in job.evals), *sorted(sent)])
        futures[job.run] = client.submit(work, __version__, job, until, given, sent, data.sources(),
                                         key=("sidae", name),
                                         resources={"GPU": 1} if gpus else None)  # fmt: skip
    return futures


def outcomes(jobs: list[tasks.Job], client: Client | str, weights: bool, log: Callable) -> tasks.Outcomes:
    """Computes the jobs on the cluster; yields each that is over, when its records are kept here.

    weights: the last backbones come back too. Raises SidaeError when there is no scheduler or it is lost.
    """
    address, client, own = client, _connect(client), isinstance(client, str)
    try:
        futures = _submitted(jobs, client, weights)
        log(f"{len(jobs)} runs on {len(client.nthreads())} workers at {client.scheduler.address}")
        of = {future.key: job for future, job in zip(futures.values(), jobs)}
        for future in as_completed(futures.values(), loop=client.loop):
            if future.status == "cancelled":
                raise ConnectionError
            error = future.exception()
            if error is None:
                result = future.result()
                error = result.error
                if not weights:  # they were for other runs
                    result.weights = {}
                for line in result.said:
                    log(line)
                try:
                    result.keep(log)
                except SidaeError as e:  # this machine cannot keep it; the other runs go on
                    error = error or e
            running = client.run(lambda dask_worker: dask_worker.state.executing_count, on_error="ignore")
            yield of[future.key], error, sum(running.values())
    except (ConnectionError, OSError) as e:
        raise SidaeError(f"The scheduler at {address} was lost; what had finished is kept, the same call "
                         "does the rest.") from e  # fmt: skip
    finally:
        if own:
            client.close()
