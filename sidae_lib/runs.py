"""The records of runs and evaluations, each computed once; and how long what is missing takes."""

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from . import data, evaluate, methods, store, tasks, train
from .config import EvalConfig, RunConfig, SidaeError, typed

GPU = re.compile("NVIDIA|Tesla|GeForce|Quadro|TITAN|AMD (Radeon|Instinct)")  # names of CUDA devices begin so


def fetch_all(configs: Sequence[store.Config], *, device: str = "auto", minutes: float | None = None,
              until: int | None = None, jobs: int = 1, client: Any = None, weights: bool = False,
              log: Callable[[str], None] = print) -> list[store.Record]:  # fmt: skip
    """The records of runs and evaluations, in the order asked for: each is read, or else computed, once.

    minutes: after so long it stops at a checkpoint and raises train.Stopped, which says what is left.
    until: the same for runs without labels, after so many epochs (encoders of others run whole); a later call
    goes on bit for bit.
    jobs: in how many processes of this machine to compute; a script that asks for several guards its call
    with `if __name__ == "__main__"`, as each process imports it.
    client: a Dask client or a scheduler's address (default: SIDAE_SCHEDULER), whose workers compute.
    weights: the last backbones are wanted too.

    An evaluation is recorded as training passes its checkpoint. A damaged file of the store is set aside and
    computed again. When some fail, with whatever exception, the rest are finished and kept; then one
    SidaeError names each that failed and says why.
    """
    minutes = None if minutes is None else typed("minutes", minutes, float)
    if until is not None and typed("until", until, int) < 1:
        raise SidaeError(f"until is an epoch to train to, at least 1, not {until}.")
    if typed("jobs", jobs, int) < 1:
        raise SidaeError(f"There must be at least one job, not {jobs}.")
    for config in configs:  # every name is looked up before the first hour is spent
        methods.check(store.run_of(config))
        if isinstance(config, EvalConfig):
            evaluate.check(config)
    client = None if jobs > 1 else client or os.environ.get("SIDAE_SCHEDULER")
    if not client:
        train.device_of(device)  # raises for one that is not here; a worker chooses its own
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    planned = tasks.plan(configs, device=device, deadline=deadline, weights=weights, until=until, log=log)
    if jobs > 1 and planned:
        from . import processes

        outcomes = processes.outcomes(planned, jobs, log)
    elif client and planned:
        from . import grid  # needs the cluster extra

        outcomes = grid.outcomes(planned, client, weights, log)
    else:
        outcomes = tasks.here(planned, log)
    _finish(outcomes, configs, len(planned), log)
    if until is not None and (left := store.missing(configs)):
        raise train.Stopped(f"Trained to epoch {until}: {len(left)} of {len(set(configs))} records are left; "
                            "the same call with a later epoch, or none, goes on from there.")  # fmt: skip
    return [store.find(c) for c in configs]


def _finish(outcomes: tasks.Outcomes, configs: Sequence[store.Config], n: int, log: Callable) -> None:
    """Waits for n jobs. Raises train.Stopped if one was stopped, else one SidaeError of those that failed."""
    failed: dict[str, Exception] = {}
    stopped, began = None, time.monotonic()
    with closing(outcomes):  # whatever is raised here, nothing computes on elsewhere
        for done, (job, error, running) in enumerate(outcomes, 1):
            if isinstance(error, train.Stopped):
                stopped = stopped or error  # the first says where a run stands
            elif error:
                failed[f"{job.run.method} {job.run.key()}"] = error
            if n > 1:
                now = f"{running} running, " if running else ""
                left = (time.monotonic() - began) / done * (n - done) / 60
                log(f"{done} of {n} runs done, {now}{len(failed)} failed, about {left:.1f} min left")
    if stopped:
        sentence = f"{stopped} {len(store.missing(configs))} of {len(set(configs))} records are left."
        raise tasks.as_one(sentence + f" {len(failed)} runs failed." * bool(failed), failed, train.Stopped)
    if failed:
        sentence = f"{len(failed)} of {n} runs failed, the rest are kept."
        raise tasks.as_one(sentence, failed) from next(iter(failed.values()))


# --- how long it takes ----------------------------------------------------------------------------


def _alike(config: store.Config) -> tuple:
    """What the seconds of an image of a run, or of an evaluation, depend on."""
    c = store.run_of(config)
    shape = (c.method in ("dae", "sidae"), c.backbone, c.stem, c.width, c.size, c.channels, c.batch)
    if isinstance(config, EvalConfig):
        return config.kind, config.labels, config.label_count, *shape
    return shape


def on_gpu(device: str) -> bool:
    """Whether times for `device` are a GPU's: auto means what is here, cuda need not be here."""
    return device == "cuda" or train.device_of(device).type == "cuda"


def rates(device: str = "auto") -> dict[tuple, float]:
    """Mean seconds recorded on CPUs or on GPUs: of an image of runs alike, and of evaluations alike."""
    gpu, seen = on_gpu(device), defaultdict(list)
    for record in store.every():
        images = record.get("images", 1)
        if images and bool(GPU.match(record["provenance"]["device"])) == gpu:
            config = (EvalConfig if "run_key" in record else RunConfig).from_dict(record["config"])
            seen[_alike(config)].append(record["seconds"] / images)
    return {alike: sum(seconds) / len(seconds) for alike, seconds in seen.items()}


def seconds_each(configs: Sequence[store.Config], known: dict[tuple, float], rate: float | None = None
                 ) -> dict[RunConfig, float] | None:  # fmt: skip
    """Estimated seconds of each run with its evaluations, all made anew; None if one run's are unknown.

    known: `rates`.  rate: images per second of runs that no record is like. An evaluation that no record is
    like counts as nothing.
    """
    out: dict[RunConfig, float] = dict.fromkeys(map(store.run_of, configs), 0.0)
    for c in configs:
        each = known.get(_alike(c))
        if isinstance(c, EvalConfig):
            out[c.run] += each or 0.0
        elif c.epochs:
            if each is None and not rate:
                return None
            known_set = data.TRAINING.get(data.KNOWN.get(c.data, ("",))[0]) if c.split == "train" else None
            pool = c.pool or known_set or len(tasks.load(c.data, c).split(c.split).images)
            n = c.epochs * (c.label_count or c.labels * pool)
            out[c] += n / rate if each is None else n * each  # type: ignore[operator]
    return out


def machines(seconds: Sequence[float], deadline: float) -> int:
    """How many machines finish runs of these lengths by the deadline, by first fit, longest first.

    Raises SidaeError when the longest alone takes longer.
    """
    left: list[float] = []
    for s in sorted(seconds, reverse=True):
        if s > deadline:
            raise SidaeError(f"One run alone takes {s / 3600:.2f} hours; no number of machines makes the "
                             "deadline.")  # fmt: skip
        fits = [n for n, room in enumerate(left) if room >= s]
        if fits:
            left[fits[0]] -= s
        else:
            left.append(deadline - s)
    return len(left)
