"""One run with its evaluations as a job: what is missing, in which order, and how it is computed."""

import time
import traceback
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field

from . import data, evaluate, methods, store, threads, train
from .config import EvalConfig, RunConfig, SidaeError


def load(fingerprint: str, run: RunConfig) -> data.Images:
    """The image set of this fingerprint, as the run sees it."""
    return data.by_fingerprint(fingerprint, size=run.size, channels=run.channels, resize=run.resize)


def dependencies(config: store.Config) -> list[RunConfig]:
    """The runs whose weights a config starts from."""
    if isinstance(config, EvalConfig):
        return [config.run]
    return [config.encoder] if config.encoder else []


def as_one(sentence: str, failed: dict[str, Exception], kind: type[SidaeError] = SidaeError) -> SidaeError:
    """One error that names all that failed. An error that is not ours keeps its traceback as a note."""
    lines, notes = [sentence] * bool(sentence), list[str]()
    for name, e in failed.items():
        if isinstance(e, SidaeError):
            lines.append(f"{name}: {e}")
            notes += getattr(e, "__notes__", [])
        else:
            lines.append(f"{name}: {type(e).__name__}: {e}")
            notes.append("".join(traceback.format_exception(e)))
    error = kind((" " if len(failed) < 2 else "\n").join(lines))
    for note in notes:
        error.add_note(note)
    return error


@dataclass
class Job:
    """One run and the evaluations that are to be made of it.

    device: auto, cpu or cuda.  deadline: of `time.monotonic`.  epochs: those whose backbones are needed.
    until: an epoch to stop at before the end.  records: what is done, as it is kept.  files: the sha256 of
    each backbone that an unfinished run has kept.
    """

    run: RunConfig
    device: str = "auto"
    deadline: float | None = None
    epochs: set[int] = field(default_factory=set)
    evals: list[EvalConfig] = field(default_factory=list)
    until: int | None = None
    records: list[tuple[store.Config, store.Record]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def compute(self, log: Callable) -> SidaeError | None:
        """Trains the run if it or a needed backbone is missing, and evaluates each checkpoint in passing.

        A record is kept at once. An evaluation that fails does not stop the training. Returns train.Stopped,
        or one error that names all that failed, or None.
        """
        failed: dict[str, Exception] = {}
        left = sorted(self.evals, key=lambda c: (c.epoch, c.data))

        def passed(epoch: int, files: dict[str, str]) -> None:
            if before is None:
                self.files = dict(files)
                store.one_trajectory(self.run, files, log)
            while left and left[0].epoch <= epoch:
                record = store.find(left[0], log)
                if record is None and self.late():
                    raise train.Stopped("Time is up.")
                config = left.pop(0)
                try:
                    self.records.append((config, record or self._evaluate(config)))
                except Exception as e:
                    failed[f"{config.kind} {config.key()}"] = e

        try:
            with store.locked(self.run), threads.fitted():
                before = record = store.find(self.run, log)
                if before is None or self._lost(before, log):
                    record = self._train(before, passed, log)
                if record:
                    self.records.append((self.run, record))
                    store.checkpoint(self.run).unlink(missing_ok=True)
                    passed(self.run.epochs, record.get("files", {}))
        except train.Stopped as e:
            return e
        except Exception as e:
            if isinstance(e, SidaeError) and not failed:
                return e
            failed["training"] = e
        return as_one("", failed) if failed else None

    def _lost(self, record: store.Record, log: Callable) -> list[int]:
        """The epochs whose backbones are needed and are not there or not sound."""
        return [e for e in self.epochs if not store.sound(store.backbone(self.run, e), record, log)]

    def _evaluate(self, config: EvalConfig) -> store.Record:
        images, weights = load(config.data or self.run.data, self.run), store.backbone(self.run, config.epoch)
        record = evaluate.evaluate(config, images, weights, device=train.device_of(self.device))
        return store.keep(config, record)

    def _train(self, before: store.Record | None, passed: train.Passed, log: Callable) -> store.Record | None:
        """The run's record, kept; None if it stopped at `until`."""
        run, began = self.run, time.monotonic()
        images = load(run.data, run)
        also = {c.epoch for c in (*self.evals, *store.evaluated(run, log))}
        while True:
            try:
                record = train.pretrain(run, images, store.folder(run), device=train.device_of(self.device),
                                        checkpoints=self.epochs, also=also, deadline=self.deadline,
                                        until=self.until, passed=passed)  # fmt: skip
                break
            except train.Damaged as e:
                store.set_aside(e, log)
            except train.NotKept:
                if before is None:
                    raise
                store.checkpoint(run).unlink()  # a finished run is trained again from the start
        seconds = time.monotonic() - began
        if record is None:
            log(f"{run.method} {run.key()} has come to epoch {self.until} of {run.epochs}, {seconds:.0f} s")
            return None
        record["files"] = (before or {}).get("files", {}) | record["files"]
        log(f"trained {run.method} {run.key()} in {seconds:.0f} s")
        return store.keep(run, record)


def plan(configs: Sequence[store.Config], *, device: str = "auto", deadline: float | None = None,
         weights: bool = False, until: int | None = None, log: Callable = print) -> list[Job]:  # fmt: skip
    """What is missing: one job per run, in the order asked for, after the runs that it depends on.

    weights: the last backbones are needed too.  until: as for `runs.fetch_all`.
    """
    jobs: dict[RunConfig, Job] = {}
    asked: dict[RunConfig, list[store.Config]] = {}
    for config in dict.fromkeys(configs):
        asked.setdefault(store.run_of(config), []).append(config)

    def add(config: store.Config) -> None:
        for run in dependencies(config):
            add(run)
            epoch = config.epoch if isinstance(config, EvalConfig) else config.encoder_epoch
            jobs[run].epochs.add(run.epochs if epoch < 0 else epoch)
        if isinstance(config, RunConfig):
            jobs.setdefault(config, Job(config, device, deadline))

    for run, wanted in asked.items():
        for config in wanted:
            if store.find(config, log) is None:
                add(config)
        if weights:
            add(run)
            jobs[run].epochs.add(run.epochs)
    encoders = {run for job in jobs.values() for run in dependencies(job.run)}
    for run, job in jobs.items():
        job.evals = [c for c in asked.get(run, []) if isinstance(c, EvalConfig)]
        if store.find(run):  # else all evaluations are looked at: the run may come to other weights
            job.evals = [c for c in job.evals if not store.find(c)]
        whole = methods.check(run).labels or run in encoders
        if until is not None and run.epochs > until and not whole:
            job.until = until
            job.epochs = {e for e in job.epochs if e <= until}
            job.evals = [c for c in job.evals if c.epoch <= until]
    return list(jobs.values())


# Of a job that is over: its error if it failed, and how many others are running.
Outcomes = Generator[tuple[Job, SidaeError | None, int], None, None]


def lacking(job: Job, broken: Collection[RunConfig]) -> SidaeError | None:
    """Why a job cannot start: it depends on one of these runs."""
    for run in dependencies(job.run):
        if run in broken:
            return SidaeError(f"{job.run.method} {job.run.key()} needs the run {run.key()}, which failed.")
    return None


def here(jobs: list[Job], log: Callable) -> Outcomes:
    """Computes one job after the other in this process, until one is stopped."""
    broken: set[RunConfig] = set()
    for job in jobs:
        error = lacking(job, broken) or job.compute(log)
        if error:
            broken.add(job.run)
        yield job, error, 0
        if isinstance(error, train.Stopped):
            return
