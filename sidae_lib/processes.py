"""A grid of runs in processes of this machine, which share one store, the image sets in memory and the compiled kernels.

A signal to the caller, or to everything in its terminal, stops every run once and at a checkpoint: the processes block
SIGINT and SIGTERM, and the caller hands on the one that it got.
"""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import suppress
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, cast

import joblib
import torch
from tqdm.auto import tqdm

from . import data, runs, train
from .config import RunConfig, SidaeError

DEATHS = 3  # of processes, after which their job counts as failed
HANDED = {signal.SIGINT: signal.SIGUSR1, signal.SIGTERM: signal.SIGUSR2}  # the caller's signal -> a process's


# --- in a process -----------------------------------------------------------------------------------------------------

_working = threading.Lock()


def _told(number: int, frame: Any) -> None:
    """What the signal that is handed on would do: a loop stops after the step, all else of a job at once."""
    asked = next(s for s, handed in HANDED.items() if handed == number)
    train._Stop.signal = asked
    if callable(handler := signal.getsignal(asked)):
        handler(asked, frame)


def _orphaned() -> None:
    """A process whose caller is gone stops at a checkpoint and ends."""
    parent_process().join()  # type: ignore[union-attr]
    os.kill(os.getpid(), signal.SIGUSR2)
    with _working:
        os._exit(1)


def _work(job: runs.Job, until: float | None, device: str, log: Callable) -> SidaeError | None:
    """One job; its error if it failed or was stopped."""
    deadline = None if until is None else time.monotonic() + until - time.time()
    try:
        for number in HANDED:
            signal.signal(number, signal.default_int_handler)
        if train._Stop.signal:  # which came before this job
            raise KeyboardInterrupt
        job.compute(train.device_of(device), deadline, log)
    except SidaeError as e:
        return e
    except KeyboardInterrupt:
        return _stopped(train._Stop.signal)
    finally:
        for number in HANDED:
            signal.signal(number, signal.SIG_IGN)
        torch.cuda.empty_cache()  # the GPU's memory is for all its processes
    return None


def _serve(pipe: connection.Connection, env: dict[str, str], device: str, sources: dict[str, str]) -> None:
    """A process's life: a job is received, what it has to say is sent, then its error or None."""
    os.environ.update(env)  # before torch looks for a GPU or compiles
    data.remember(sources)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, which is left behind by a kill
    for asked, handed in HANDED.items():
        signal.signal(asked, signal.SIG_IGN)
        signal.signal(handed, _told)
    threading.Thread(target=_orphaned, daemon=True).start()

    def say(line: str) -> None:
        with suppress(OSError):  # nobody listens any more; the run is kept all the same
            pipe.send(line)

    with suppress(EOFError, OSError):
        while True:
            job, until = pipe.recv()
            with _working:
                error = _work(job, until, device, say)
            pipe.send(error)


# --- in the caller ----------------------------------------------------------------------------------------------------


def _stopped(number: int | None) -> train.Stopped:
    return train.Stopped(f"Stopped by {signal.Signals(number).name}." if number else "Time is up.")


class _Process:
    """The caller's side of a process, which is spawned for its first job and anew after it died."""

    job: runs.Job | None = None
    process: BaseProcess | None = None

    def __init__(self, env: dict[str, str], device: str) -> None:
        self.env, self.device = env, device

    def start(self) -> None:
        context = get_context("spawn")  # a CUDA context does not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.env, self.device, data.sources()))
        resource_tracker.ensure_running()  # to start it with the process would lift the block (Python 3.11)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDED)  # the process inherits it, each of its threads too
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def begin(self, job: runs.Job, until: float | None) -> None:
        if not self.process:
            self.start()
        self.job = job
        with suppress(OSError):  # it died while it was idle, which `outcomes` sees next
            self.pipe.send((job, until))

    def hand_on(self, number: int) -> None:
        if self.process and self.process.pid:
            os.kill(self.process.pid, HANDED[number])

    def lost(self) -> str:
        """By what it was ended, once it is gone."""
        process = cast(BaseProcess, self.process)
        process.join()
        code, self.process = process.exitcode or 0, None
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def outcomes(jobs: list[runs.Job], processes: int, *, device: str, deadline: float | None, log: Callable
             ) -> Generator[runs.Outcome, None, None]:  # fmt: skip
    """Runs the jobs in so many processes, which take the GPUs in turn or else divide the cores; each is yielded when it is
    done, with its error if it failed and how many are running then.

    A job starts in its turn as soon as a process is free and what it depends on is done. One whose process died goes on in
    another, up to `DEATHS` times. After the deadline (of `time.monotonic`) or a signal nothing starts.
    """
    threads = str(max(1, joblib.cpu_count() // processes))
    env = {"SIDAE_THREADS": threads, "TQDM_DISABLE": "1",
           "TORCHINDUCTOR_COMPILE_THREADS": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", threads)}  # fmt: skip
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    pool = [_Process(env | ({"CUDA_VISIBLE_DEVICES": names[n % gpus]} if gpus else {}), device)
            for n in range(min(processes, len(jobs)))]  # fmt: skip
    until = None if deadline is None else time.time() + deadline - time.monotonic()
    waiting, broken, deaths = list(jobs), set[RunConfig](), Counter[RunConfig]()
    told = stopped = False

    def running() -> list[_Process]:
        return [p for p in pool if p.job]

    log(f"{len(jobs)} runs in {len(pool)} processes")
    with train._Stop().armed() as stop:
        try:
            while waiting or running():
                if stop.signal and not told:
                    told = True
                    for p in running():
                        p.hand_on(stop.signal)
                over = stopped or stop.signal or deadline is not None and time.monotonic() > deadline
                unfinished = {job.run for job in waiting} | {p.job.run for p in pool if p.job}
                for job in list(waiting):
                    free = next((p for p in pool if not p.job), None)
                    if error := runs.lacking(job, broken):
                        waiting.remove(job)
                        broken.add(job.run)
                        yield job, error, len(running())
                    elif free and not over and unfinished.isdisjoint(runs.dependencies(job.run)):
                        waiting.remove(job)
                        free.begin(job, until)
                busy = {p.pipe: p for p in running()}
                if over and not busy:
                    break
                for pipe in connection.wait(busy, 0.2):  # then the clock and the signals are looked at
                    p = busy[pipe]  # type: ignore[index]
                    by = ""
                    try:
                        said = p.pipe.recv()
                    except (EOFError, OSError):
                        said, by = None, p.lost()
                    if isinstance(said, str):
                        log(said)
                        continue
                    job, p.job = cast(runs.Job, p.job), None
                    if by and stop.signal:
                        said = _stopped(stop.signal)
                    elif by and deaths[job.run] < DEATHS - 1:
                        deaths[job.run] += 1
                        log(f"The process of {job.run.method} {job.run.key()} was ended by {by}; another goes on with the run.")
                        waiting.insert(0, job)
                        continue
                    elif by:
                        said = SidaeError(f"its process was ended {DEATHS} times, at last by {by}; if the memory is full, ask "
                                          "for fewer jobs.")  # fmt: skip
                    if isinstance(said, train.Stopped):
                        stopped = True
                    elif said:
                        broken.add(job.run)
                    yield job, said, len(running())
            if waiting and not stopped:
                yield waiting[0], _stopped(stop.signal), 0
        finally:
            for p in pool:
                if p.process:  # it is idle; or there is an error here, or a second signal, which waits for nothing
                    p.process.kill()
                    p.lost()
