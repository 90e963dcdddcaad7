"""Jobs in processes of this machine, which share the store, the image sets and the compiled kernels.

A signal to the caller, or to all processes of its terminal, stops every run once and at a checkpoint: the
processes block SIGINT and SIGTERM, and the caller hands on the one that it got.
"""

import _thread
import os
import queue
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import connection, get_context, resource_tracker
from typing import IO, Any

import joblib
import torch
from tqdm.auto import tqdm

from . import data, tasks, train
from .config import RunConfig, SidaeError

DEATHS = 3  # of the processes that a job was given to; then it has failed
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _stopped(number: int | None) -> train.Stopped:
    return train.Stopped(f"Stopped by {signal.Signals(number).name}." if number else "Time is up.")


def _listen(pipe: connection.Connection, jobs: queue.SimpleQueue) -> None:
    """A process's thread: it passes jobs on, until a signal comes from the caller or the caller is gone."""
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            message = signal.SIGTERM
        if message in SIGNALS:
            break
        jobs.put(message)
    train._Stop.signal = message
    _thread.interrupt_main(message)  # as the signal: a loop stops after the step, all else at once
    jobs.put(None)


def _serve(pipe: connection.Connection, env: dict[str, str], sources: dict[str, str]) -> None:
    """The life of a process: it receives jobs; of each it sends what the job logs, then its error or None."""
    os.environ.update(env)  # before torch looks for a GPU or compiles
    data.remember(sources)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which outlives a killed process
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, jobs), daemon=True).start()

    def say(line: str) -> None:
        with suppress(OSError):  # the caller is gone
            pipe.send(("said", line))

    with suppress(OSError, KeyboardInterrupt):
        for job in iter(jobs.get, None):
            try:
                error = job.compute(say)
            except KeyboardInterrupt:
                error = _stopped(train._Stop.signal)
            torch.cuda.empty_cache()  # all processes share the GPU's memory
            pipe.send(("done", error))


@contextmanager
def output_to(log: IO[str]) -> Iterator[None]:
    """Sends stdout and stderr to a file, those of a process started meanwhile too."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    for fd in (1, 2):
        os.dup2(log.fileno(), fd)
    try:
        yield
    finally:
        sys.stdout.flush()
        for fd, old in zip((1, 2), saved, strict=True):
            os.dup2(old, fd)
            os.close(old)


class _Process:
    """The caller's side of a process. It is started for its first job, and again after it died."""

    job: tasks.Job | None = None
    process: Any = None

    def __init__(self, env: dict[str, str], output: IO[str] | None) -> None:
        self.env, self.output = env, output

    def begin(self, job: tasks.Job) -> None:
        if not self.process:
            self._start()
        self.job = job
        self.send(job)

    def _start(self) -> None:
        context = get_context("spawn")  # a CUDA context does not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.env, data.sources()))
        with output_to(self.output) if self.output else nullcontext():
            resource_tracker.ensure_running()  # in Python 3.11, to start it with the process would lift the block
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited by the process and its threads
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def send(self, message: Any) -> None:
        with suppress(OSError):  # it has died, which `receive` finds
            self.pipe.send(message)

    def receive(self) -> tuple[str, Any]:
        """What it sent, or ("died", what ended it)."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code, self.process = self.process.exitcode, None
            return "died", signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _environments(processes: int, device: str) -> list[dict[str, str]]:
    """Those of the processes, which take the GPUs in turn or divide the cores."""
    threads = str(max(1, joblib.cpu_count() // processes))
    env = {"TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}
    env |= {"SIDAE_THREADS": threads, "TQDM_DISABLE": "1"}
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if not gpus:
        return [env] * processes
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    return [env | {"CUDA_VISIBLE_DEVICES": names[n % gpus]} for n in range(processes)]


def outcomes(jobs: list[tasks.Job], processes: int, log: Callable, output: IO[str] | None = None) -> tasks.Outcomes:
    """Computes the jobs in so many processes; yields each that is over.  output: what they print goes there.

    A job starts in its turn, as soon as a process is free and what it depends on is done. One whose process
    died goes on in another, up to `DEATHS` times. After the deadline or a signal no job starts.
    """
    pool = [_Process(env, output) for env in _environments(processes, jobs[0].device)[: len(jobs)]]
    log(f"{len(jobs)} runs in {len(pool)} processes")
    with train._Stop().armed() as stop:
        try:
            yield from _outcomes(list(jobs), pool, stop, log)
        finally:
            for p in pool:
                if p.process:  # it is idle; after an error here or a second signal nothing waits for its job
                    p.process.kill()
                    p.process.join()


def _outcomes(waiting: list[tasks.Job], pool: list[_Process], stop: train._Stop,
              log: Callable) -> tasks.Outcomes:  # fmt: skip
    broken, deaths = set[RunConfig](), Counter[RunConfig]()
    handed = False

    def running() -> list[_Process]:
        return [p for p in pool if p.job]

    while True:
        if not (stop.signal or waiting and waiting[0].late()):
            unfinished = {job.run for job in [*waiting, *(p.job for p in running())]}
            ready = [job for job in waiting if unfinished.isdisjoint(tasks.dependencies(job.run))]
            for p in [p for p in pool if not p.job]:  # two jobs of one run one after the other
                begun = {p.job.run for p in running()}
                if job := next((job for job in ready if job.run not in begun), None):
                    ready.remove(job)
                    waiting[:] = [w for w in waiting if w is not job]
                    p.begin(job)
        busy: dict[Any, _Process] = {p.pipe: p for p in running()}
        if not busy:
            break
        if stop.signal and not handed:
            handed = True
            for p in busy.values():
                p.send(signal.Signals(stop.signal))
        for pipe in connection.wait(busy, 0.2):  # then the clock and the signals are looked at
            p = busy[pipe]
            what, said = p.receive()
            if what == "said":
                log(said)
                continue
            job, p.job = p.job, None
            name = f"{job.run.method} {job.run.key()}"
            if what == "died" and not stop.signal and deaths[job.run] < DEATHS - 1:
                deaths[job.run] += 1
                log(f"The process of {name} was ended by {said}; another goes on with the run.")
                waiting.insert(0, job)
                continue
            if what == "died":
                said = _stopped(stop.signal) if stop.signal else SidaeError(
                    f"its process was ended {DEATHS} times, at last by {said}; if the memory is full, ask "
                    "for fewer jobs.")  # fmt: skip
            if said and not isinstance(said, train.Stopped):
                broken.add(job.run)
            yield job, said, len(running())
            for job in list(waiting):
                if error := tasks.lacking(job, broken):
                    waiting.remove(job)
                    broken.add(job.run)
                    yield job, error, len(running())
    if waiting:
        yield waiting[0], _stopped(stop.signal), 0
