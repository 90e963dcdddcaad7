"""The store: each run and each evaluation is computed once, kept as JSON, and found again by its key."""

import fcntl
import json
import os
import re
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch

from . import data, evaluate, methods, paths, threads, train
from .config import EvalConfig, RunConfig, SidaeError, digest, typed

Config = RunConfig | EvalConfig
Record = dict[str, Any]
GPU = re.compile("NVIDIA|Tesla|GeForce|Quadro|TITAN|AMD (Radeon|Instinct)")  # what names of CUDA devices begin with
RECORD_BYTES = 2**24  # of one file of records: a run of 200 epochs takes 60 thousand
# An integer of 19 digits or more: JSON, but neither an index nor a count, and too long for a float column.
LONG = re.compile(r"[\[,:]\s*-?\d{19}")


def _name(config: Config) -> str:
    return "record.json" if isinstance(config, RunConfig) else f"eval-{config.key()}.json"


def _run(config: Config) -> RunConfig:
    return config if isinstance(config, RunConfig) else config.run


def folder(config: Config) -> Path:
    """Where the local store keeps a run, its evaluations and its weights."""
    return paths.runs() / _run(config).key()


def _checkpoint(run: RunConfig) -> Path:
    return folder(run) / "checkpoint.safetensors"


def backbone(run: RunConfig, epoch: int | None = None) -> Path:
    """The weights of a run's backbone at an epoch (default: the last)."""
    return folder(run) / train.backbone_name(run.epochs if epoch is None else epoch)


UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what `_parsed` raises


def _parsed(text: str) -> Record:
    """The record that a text is; one of UNREADABLE where it is none, or not what was written."""
    if len(text) > RECORD_BYTES or LONG.search(text):
        raise ValueError
    record = json.loads(text)
    check = digest({k: v for k, v in record.items() if k != "check"})  # raises for NaN and infinity too
    if digest(record["config"])[:16] != record["key"] or record.get("check", check) != check:
        raise ValueError
    return record


def read(path: Path) -> Record:
    """One record file. Raises train.Damaged when it is not JSON of finite numbers, not a record of the key it is filed
    under, not of the config that has this key, or not what was written (records since 0.1 hold a checksum)."""
    try:
        if path.stat().st_size > RECORD_BYTES:
            raise ValueError
        record = _parsed(path.read_text())
        named = path.name.removeprefix("eval-").removesuffix(".json") if path.name != "record.json" else path.parent.name
        if record["key"] != named:
            raise ValueError
    except (OSError, *UNREADABLE) as e:
        raise train.Damaged(f"The record {path} is damaged; move it away and it is computed again.", path) from e
    return record


def find(config: Config) -> Record | None:
    """The record of a config, from the local store or else the published records, or None."""
    for root in (paths.runs(), paths.records()):
        path = root / _run(config).key() / _name(config)
        if path.exists():
            return read(path)
    return None


def every(kind: str = "*", roots: Sequence[Path] = ()) -> Iterator[Record]:
    """All records of the local store and the published ones, each key once; kind: `record`, `eval-*` or both."""
    seen = set()
    for root in roots or (paths.runs(), paths.records()):
        for path in sorted(root.glob(f"*/{kind}.json")):
            if (name := (path.parent.name, path.name)) not in seen:
                seen.add(name)
                yield read(path)


@contextmanager
def _locked(config: Config):
    """One process at a time works on a run; the kernel frees the lock when its owner dies."""
    try:
        folder(config).mkdir(parents=True, exist_ok=True)
        f = open(folder(config) / "lock", "w")
    except OSError as e:
        raise SidaeError(f"The store {paths.runs()} cannot be written ({e.strerror}); set SIDAE_RUNS to one that can.") from e
    with f:
        fcntl.flock(f, fcntl.LOCK_EX)
        for dead in folder(config).glob(".*.tmp"):  # only the lock's owner writes here: its owner was killed
            dead.unlink(missing_ok=True)
        yield


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()


def keep(config: Config, record: Record) -> Record:
    """Files a record, with its checksum; the caller holds the lock. Raises SidaeError for one that `read` would refuse."""
    record = {k: v for k, v in record.items() if k != "check"}
    try:
        record["check"] = digest(record)
        _parsed((line := _line(record)).decode())
    except UNREADABLE as e:
        size = len(json.dumps(record)) / 2**20
        raise SidaeError(f"The record of {config.key()} cannot be filed: it has {size:.1f} MiB, of at most "
                         f"{RECORD_BYTES >> 20}, or holds a number that is none. Nothing is written.") from e  # fmt: skip
    train.write(folder(config) / _name(config), line)
    if bundle := os.environ.get("SIDAE_BUNDLE"):
        _append(Path(bundle), line + b"\n")
    return record


def _parts(bundle: Path) -> Iterator[Path]:
    """The files of a bundle, without end: records.jsonl, records-2.jsonl, records-3.jsonl ..."""
    yield bundle
    for n in count(2):
        yield bundle.with_stem(f"{bundle.stem}-{n}")


def _append(bundle: Path, line: bytes) -> None:
    """A line, in one write, to the first file of a bundle that has room for it; several processes may share them."""
    for part in _parts(bundle):
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            if not size or size + len(line) <= RECORD_BYTES:
                os.write(file, line)
                return
        finally:
            os.close(file)


def _offered(source: Path, log: Callable) -> Iterator[Record]:
    """The records of a store, or of a bundle with all its files, a line each. What is damaged (the last line of a stopped
    machine) is said."""
    if source.is_dir():
        yield from every("*", (source,))
        return
    for part in takewhile(Path.exists, _parts(source)):
        for n, text in enumerate(part.read_text(errors="replace").splitlines(), 1):
            try:
                yield _parsed(text)
            except UNREADABLE:
                log(f"Line {n} of {part} is no whole record; it is left out.")


def _weights(records: Iterable[Record]) -> set[tuple[str, str]]:
    """(file name, sha256) of every backbone that records of one run name: the trajectory they belong to."""
    out: set[tuple[str, str]] = set()
    for r in records:
        out |= {(train.backbone_name(r["epoch"]), r["backbone"])} if "backbone" in r else set(r.get("files", {}).items())
    return out


def _differ(weights: set[tuple[str, str]]) -> bool:
    """Whether two backbones are named for one epoch."""
    return len(dict(weights)) < len(weights)


def _reach(records: Sequence[Record]) -> tuple[bool, str]:
    """How far a run has come by its records: finished or not, then the last backbone that they name."""
    return any("run_key" not in r for r in records), max(dict(_weights(records)), default="")


def _fitting(offer: list[Record], filed: list[Record]) -> tuple[list[Record], bool]:
    """Of the records that are offered of one run those that are known to be of the filed ones' trajectory. True: they are
    of another, which came further, and take the place of all that is filed."""
    if own := [r for r in offer if "run_key" not in r]:
        offer = [r for r in offer if _weights([r]) <= _weights(own)]
    a, b = _weights(filed), _weights(offer)
    if _differ(b):
        return [], False
    if _differ(a | b) and _reach(offer) > _reach(filed):
        return offer, True
    old, new = ({w for w in weights if w[0] != train.backbone_name(0)} for weights in (a, b))  # epoch 0 is no training yet
    same = not _differ(a | b) and bool(old & new or not old or not new)
    finished = own or _reach(filed)[0]  # evaluations before 0.2 name no weights: their run's record must stand for them
    return [r for r in offer if (same or w <= a if (w := _weights([r])) else same and finished)], False


def adopt(source: Path, refused: Collection[str] = (), log: Callable = print) -> list[str]:
    """Files the finished records of a store or a bundle under the published ones; returns the keys that are new there.

    All records of a run belong to one trajectory, which the sha256 of its backbones name. Evaluations may come before their
    run's record, and later ones join them where they agree on an epoch that was trained. Of two trajectories the one that
    came further stays, whole, and of two that came as far the one that is filed. Left out, and said: what is there already,
    keys in `refused`, and what is not known to belong. Raises SidaeError when the source is missing.
    """
    if not source.exists():
        raise SidaeError(f"There is no store or bundle {source}; give the folder of a store or a file that --bundle wrote.")
    offered: dict[str, dict[str, Record]] = defaultdict(dict)
    for r in _offered(source, log):
        offered[r.get("run_key", r["key"])][r["key"]] = r
    new, left = [], defaultdict(int)
    for run, by_key in sorted(offered.items()):
        offer = [r for key, r in by_key.items() if key not in refused and run not in refused]
        left["of smoke scale"] += len(by_key) - len(offer)
        filed = {p: read(p) for p in sorted((paths.records() / run).glob("*.json"))}
        fitting, instead = _fitting(offer, list(filed.values()))
        left["not known to be of the trajectory that is filed"] += len(offer) - len(fitting)
        if instead:
            log(f"Two machines made the run {run}: the one that is offered got further, so its {len(fitting)} records take the "
                f"place of the {len(filed)} that were filed.")
        for record in fitting:
            path = paths.records() / run / (f"eval-{record['key']}.json" if "run_key" in record else "record.json")
            if path in filed and not instead:
                left["there already"] += 1
            else:
                train.write(path, _line(record))
                new.append(record["key"])
                filed.pop(path, None)
        for path in filed if instead else ():
            path.unlink()
    log(f"{len(new)} of {sum(map(len, offered.values()))} records are new in {paths.records()}" +
        "".join(f"; {n} {why}" for why, n in left.items() if n) + ".")
    return new


def _aside(path: Path) -> str:
    """The name under which nothing reads the file any more; nothing is deleted."""
    to = next(p for n in count(1) if not (p := path.with_name(f"{path.name}.aside-{n}")).exists())
    path.rename(to)
    return to.name


def set_aside(damaged: train.Damaged, log: Callable) -> None:
    """Renames a damaged or foreign file of the local store."""
    if not damaged.path.is_relative_to(paths.runs()):
        raise damaged
    try:
        name = _aside(damaged.path)
    except FileNotFoundError:  # another process was faster
        return
    except OSError:
        raise damaged from None
    log(f"{damaged} It lies aside as {name} now.")


def found(config: Config, log: Callable) -> Record | None:
    """As `find`, after a damaged record of the local store was set aside."""
    while True:
        try:
            return find(config)
        except train.Damaged as e:
            set_aside(e, log)


def _sound(path: Path, record: Record, log: Callable) -> bool:
    """Whether weights are there and are those that the record names; others are set aside."""
    if path.exists() and "files" in record and train.sha256(path.read_bytes()) != record["files"].get(path.name):
        set_aside(train.Damaged(f"The weights {path} are not those of their record; they are trained again.", path), log)
    return path.exists()


def _load(fingerprint: str, run: RunConfig) -> data.Images:
    return data.by_fingerprint(fingerprint, size=run.size, channels=run.channels, resize=run.resize)


def _evaluated(run: RunConfig, log: Callable) -> dict[EvalConfig, Record]:
    """The evaluations of a run that the local store holds."""
    out = {}
    for path in sorted(folder(run).glob("eval-*.json")):
        try:
            record = read(path)
        except train.Damaged as e:
            set_aside(e, log)
        else:
            out[EvalConfig.from_dict(record["config"])] = record
    return out


def one_trajectory(run: RunConfig, files: dict[str, str], log: Callable) -> None:
    """Sets a run's evaluations aside from the first epoch on whose backbone is not the one in `files` (name -> sha256): its
    checkpoint was lost, it began again, and it came another way. Evaluations from before 0.2 name no backbone."""
    there = _evaluated(run, log)
    of = {c: files.get(train.backbone_name(c.epoch)) for c in there}
    other = [c.epoch for c, r in there.items() if of[c] and r.get("backbone", of[c]) != of[c]]
    old = [c for c in there if other and c.epoch >= min(other)]
    for config in old:
        _aside(folder(run) / _name(config))
    if old:
        log(f"{len(old)} evaluations of {run.method} {run.key()} lie aside: they are of weights that it had before it began "
            f"again, from epoch {min(other)} on.")  # fmt: skip


def recorded(configs: Sequence[Config]) -> list[Record]:
    """The records that are there, each once."""
    return [r for c in dict.fromkeys(configs) if (r := find(c)) is not None]


def missing(configs: Sequence[Config]) -> list[Config]:
    """Those without a record."""
    return [c for c in dict.fromkeys(configs) if find(c) is None]


def dependencies(config: Config) -> list[RunConfig]:
    """The runs whose weights a config starts from: an evaluation its run's, a run on mined pairs its encoder's."""
    return [config.run] if isinstance(config, EvalConfig) else [config.encoder] if config.encoder else []


def _as_one(sentence: str, failed: dict[str, Exception], kind: type[SidaeError] = SidaeError) -> SidaeError:
    """One error that names all that failed. What is not ours keeps its traceback as a note, which travels from a worker too."""
    named = [f"{name}: {e}" if isinstance(e, SidaeError) else f"{name}: {type(e).__name__}: {e}" for name, e in failed.items()]
    error = kind(("\n" if len(named) > 1 else " ").join([sentence] * bool(sentence) + named))
    for e in failed.values():
        for note in getattr(e, "__notes__", ()) if isinstance(e, SidaeError) else ("".join(traceback.format_exception(e)),):
            error.add_note(note)
    return error


@dataclass
class Job:
    """One run and what is made of it: the backbones that are needed, by epoch, and the evaluations that are missing; of a
    run that is not finished those that are recorded too, since they hold for one trajectory alone.

    until: an epoch to stop at before the end.  records: what is done, as it is filed.  files: sha256 of the backbones that
    an unfinished run has kept.
    """

    run: RunConfig
    epochs: set[int] = field(default_factory=set)
    evals: list[EvalConfig] = field(default_factory=list)
    until: int | None = None
    records: list[tuple[Config, Record]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def compute(self, device: torch.device, deadline: float | None, log: Callable) -> None:
        """Trains the run, where it is not there with the backbones that are needed, and evaluates each checkpoint as it is
        passed; a record is filed at once. An evaluation that fails does not stop the training. Raises Stopped, or else one
        SidaeError of all that failed, whatever it was."""
        failed: dict[str, Exception] = {}
        try:
            self._compute(device, deadline, log, failed)
        except train.Stopped:
            raise
        except Exception as e:
            if isinstance(e, SidaeError) and not failed:
                raise
            failed["training"] = e
        if failed:
            raise _as_one("", failed)

    def _compute(self, device: torch.device, deadline: float | None, log: Callable, failed: dict[str, Exception]) -> None:
        left = sorted(self.evals, key=lambda c: (c.epoch, c.data))
        with _locked(self.run), threads.fitted():
            before = record = found(self.run, log)

            def passed(epoch: int, files: dict[str, str]) -> None:
                if before is None:
                    self.files = dict(files)
                    one_trajectory(self.run, files, log)
                while left and left[0].epoch <= epoch:
                    config = left[0]
                    own = found(config, log)
                    if own is None and deadline is not None and time.monotonic() > deadline:
                        raise train.Stopped("Time is up.")
                    try:
                        if own is None:
                            images = _load(config.data or config.run.data, config.run)
                            made = evaluate.evaluate(config, images, backbone(self.run, config.epoch), device=device)
                            own = keep(config, made)
                        self.records.append((config, own))
                    except Exception as e:
                        failed[f"{config.kind} {config.key()}"] = e
                    left.pop(0)

            if before is None or not all([_sound(backbone(self.run, e), before, log) for e in self.epochs]):
                record = self._train(before, passed, device, deadline, log)
            if record:
                self.records.append((self.run, record))
                _checkpoint(self.run).unlink(missing_ok=True)
                passed(self.run.epochs, record.get("files", {}))

    def _train(self, before: Record | None, passed: train.Passed, device: torch.device, deadline: float | None,
               log: Callable) -> Record | None:  # fmt: skip
        """The run's record, filed; None when it stands at `until`."""
        run, began = self.run, time.monotonic()
        images = _load(run.data, run)
        also = {c.epoch for c in (*self.evals, *_evaluated(run, log))}
        while True:
            try:
                record = train.pretrain(run, images, folder(run), device=device, checkpoints=self.epochs, also=also,
                                        deadline=deadline, until=self.until, passed=passed)  # fmt: skip
                break
            except train.Damaged as e:
                set_aside(e, log)
            except train.NotKept:
                if before is None:
                    raise
                _checkpoint(run).unlink()  # a finished run is trained again for its weights, whatever was begun for others
        seconds = time.monotonic() - began
        if record is None:
            log(f"{run.method} {run.key()} has come to epoch {self.until} of {run.epochs}, {seconds:.0f} s")
            return None
        record["files"] = (before or {}).get("files", {}) | record["files"]
        log(f"trained {run.method} {run.key()} in {seconds:.0f} s")
        return keep(run, record)


def plan(configs: Sequence[Config], *, weights: bool = False, until: int | None = None, log: Callable = print) -> list[Job]:
    """What is missing, one job per run, after those of the runs it depends on; weights: the last backbones too; until: a run
    without labels, from which no other starts, goes to this epoch alone, and later ones are not asked for."""
    jobs: dict[RunConfig, Job] = {}

    def add(config: Config) -> None:
        for run in dependencies(config):
            add(run)
            epoch = config.epoch if isinstance(config, EvalConfig) else config.encoder_epoch
            jobs[run].epochs.add(run.epochs if epoch < 0 else epoch)
        if isinstance(config, EvalConfig):
            jobs[config.run].evals.append(config)
        else:
            jobs.setdefault(config, Job(config))

    place, asked = {run: n for n, run in enumerate(dict.fromkeys(map(_run, configs)))}, dict.fromkeys(configs)
    for config in sorted(asked, key=lambda c: place[_run(c)]):  # a recorded run's evaluations are not last
        if found(config, log) is None:
            add(config)
        if weights:
            add(_run(config))
            jobs[_run(config)].epochs.add(_run(config).epochs)
    encoders, of = {run for job in jobs.values() for run in dependencies(job.run)}, defaultdict(list)
    for config in asked:
        if isinstance(config, EvalConfig):
            of[config.run].append(config)
    for job in jobs.values():
        if find(job.run) is None:
            job.evals = of[job.run]
        if until is not None and job.run.epochs > until and not methods.check(job.run).labels and job.run not in encoders:
            job.until, job.epochs = until, {e for e in job.epochs if e <= until}
            job.evals = [e for e in job.evals if e.epoch <= until]
    return list(jobs.values())


Outcome = tuple[Job, Exception | None, int]  # its error if it failed; how many are running elsewhere meanwhile


def lacking(job: Job, broken: Collection[RunConfig]) -> SidaeError | None:
    """Why a job cannot start: it depends on one of these runs."""
    needed = [r.key() for r in dependencies(job.run) if r in broken]
    return SidaeError(f"{job.run.method} {job.run.key()} needs the run {needed[0]}, which failed.") if needed else None


def _here(jobs: list[Job], device: torch.device, deadline: float | None, log: Callable) -> Generator[Outcome, None, None]:
    """One job after the other, in this process; the first that is stopped is the last."""
    broken: set[RunConfig] = set()
    for job in jobs:
        error: SidaeError | None = None  # `compute` raises no other
        try:
            if error := lacking(job, broken):
                raise error
            job.compute(device, deadline, log)
        except SidaeError as e:
            error = e
            broken.add(job.run)
        yield job, error, 0
        if isinstance(error, train.Stopped):
            return


def fetch_all(configs: Sequence[Config], *, device: str = "auto", minutes: float | None = None, until: int | None = None,
              jobs: int = 1, client: Any = None, weights: bool = False, log: Callable[[str], None] = print
              ) -> list[Record]:  # fmt: skip
    """The records of runs and evaluations, in the order asked for: what is recorded is read, the rest is computed once.

    jobs: in how many processes of this machine to compute, started in the order asked for; a script that asks for several
    guards its call with `if __name__ == "__main__"`, as each process imports it.  client: a Dask client or a scheduler's
    address (default: SIDAE_SCHEDULER), whose workers compute; with weights, the last backbones come back too.  minutes:
    after so long it stops at a checkpoint and raises train.Stopped, which says what is left.  until: runs without labels
    stop at a checkpoint after so many epochs, evaluated as far as they have come (encoders of others run whole), then
    train.Stopped says what is left; a later call goes on bit for bit.

    An evaluation is recorded as training passes its checkpoint.  A damaged file of the store is set aside and computed
    again.  When some fail, with whatever exception, the rest are finished and kept; then one SidaeError names each that failed
    and says why.
    """
    minutes = None if minutes is None else typed("minutes", minutes, float)
    if until is not None and typed("until", until, int) < 1:
        raise SidaeError(f"until is an epoch to train to, at least 1, not {until}.")
    if typed("jobs", jobs, int) < 1:
        raise SidaeError(f"There must be at least one job, not {jobs}.")
    for config in configs:  # every name is looked up before the first hour is spent
        methods.check(_run(config))
        if isinstance(config, EvalConfig):
            evaluate.check(config)
    client = None if jobs > 1 else client or os.environ.get("SIDAE_SCHEDULER")
    here = train.device_of("cpu" if client else device)  # a worker chooses its own
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    planned = plan(configs, weights=weights, until=until, log=log)
    if jobs > 1 and planned:
        from . import processes

        outcomes = processes.outcomes(planned, jobs, device=device, deadline=deadline, log=log)
    elif client and planned:
        from . import grid

        outcomes = grid.outcomes(planned, client, device=device, deadline=deadline, weights=weights, log=log)
    else:
        outcomes = _here(planned, here, deadline, log)
    failed: dict[str, Exception] = {}
    stopped, began = None, time.monotonic()
    with closing(outcomes):  # whatever is raised here, nothing computes on elsewhere
        for n, (job, error, running) in enumerate(outcomes, 1):
            if isinstance(error, train.Stopped):
                stopped = error
            elif error:
                failed[f"{job.run.method} {job.run.key()}"] = error
            if len(planned) > 1:
                left = (time.monotonic() - began) / n * (len(planned) - n)
                now = f"{running} running, " if client or jobs > 1 else ""
                log(f"{n} of {len(planned)} runs done, {now}{len(failed)} failed, about {left / 60:.1f} min left")
    if stopped:
        sentence = f"{stopped} {len(missing(configs))} of {len(set(configs))} records are left."
        raise _as_one(sentence + f" {len(failed)} runs failed." * bool(failed), failed, train.Stopped)
    if failed:
        sentence = f"{len(failed)} of {len(planned)} runs failed, the rest are kept."
        raise _as_one(sentence, failed) from next(iter(failed.values()))
    if until is not None and (left := len(missing(configs))):
        raise train.Stopped(f"Trained to epoch {until}: {left} of {len(set(configs))} records are left; the same call with a "
                            "later epoch, or none, goes on from there.")  # fmt: skip
    return [find(c) for c in configs]


def _shape(c: RunConfig) -> tuple:
    """What an image's time depends on."""
    return c.method in ("dae", "sidae"), c.backbone, c.stem, c.width, c.size, c.channels, c.batch


def on_gpu(device: str) -> bool:
    """Whether times for `device` (cpu, cuda, or auto, the kind that is here) are a GPU's: one may plan for one that is not."""
    return device == "cuda" or train.device_of(device).type == "cuda"


def rates(device: str = "auto") -> dict[tuple, float]:
    """Mean seconds of what is recorded on devices of one kind, CPUs or GPUs, since a GPU's hours are a CPU's weeks: of an image
    by the run's shape, of an evaluation by its kind, labels and shape.  device: as for `on_gpu`."""
    gpu, seen = on_gpu(device), defaultdict(list)
    for r in every("*"):
        if bool(GPU.match(r["provenance"]["device"])) != gpu:
            continue
        if "run_key" in r:
            c = EvalConfig.from_dict(r["config"])
            seen[c.kind, c.labels, c.label_count, _shape(c.run)].append(r["seconds"])
        elif r["images"]:
            seen[_shape(RunConfig.from_dict(r["config"]))].append(r["seconds"] / r["images"])
    return {k: sum(v) / len(v) for k, v in seen.items()}


def seconds_each(configs: Sequence[Config], rate: float | None = None, known: dict[tuple, float] | None = None
                 ) -> dict[RunConfig, float] | None:  # fmt: skip
    """Estimated seconds of each run with its evaluations, all computed anew, from those of recorded ones alike, on a device of
    the kind that is here.

    rate: images per second for runs that no record is like; None without a rate for some run. An evaluation of a kind
    that is not recorded counts as nothing.  known: `rates`, where they have been read already or are another device's.
    """
    mean = rates() if known is None else known
    out: dict[RunConfig, float] = dict.fromkeys(map(_run, configs), 0.0)
    for c in configs:
        if isinstance(c, EvalConfig):
            out[c.run] += mean.get((c.kind, c.labels, c.label_count, _shape(c.run)), 0.0)
        elif c.epochs:
            if _shape(c) not in mean and not rate:
                return None
            there = data.TRAINING.get(data.KNOWN.get(c.data, ("",))[0]) if c.split == "train" else None
            n = c.label_count or c.labels * (c.pool or there or len(_load(c.data, c).split(c.split).images))
            out[c] += n * c.epochs * mean.get(_shape(c), 1 / (rate or 1))
    return out


def machines(seconds: Sequence[float], deadline: float) -> int:
    """How many machines finish runs of these lengths by the deadline, each run on one machine (first fit, longest first).
    Raises SidaeError when the longest alone takes longer."""
    left: list[float] = []
    for s in sorted(seconds, reverse=True):
        if s > deadline:
            raise SidaeError(f"One run alone takes {s / 3600:.2f} hours; no number of machines makes the deadline.")
        n = next((n for n, room in enumerate(left) if room >= s), len(left))
        left[n:n + 1] = [left[n] - s if n < len(left) else deadline - s]
    return len(left)
