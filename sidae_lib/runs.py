"""The store: each run and each evaluation is computed once, kept as JSON, and found again by its key."""

import fcntl
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import data, evaluate, methods, paths, train
from .config import EvalConfig, RunConfig, SidaeError

Config = RunConfig | EvalConfig
Record = dict[str, Any]


def _name(config: Config) -> str:
    return "record.json" if isinstance(config, RunConfig) else f"eval-{config.key()}.json"


def _run(config: Config) -> RunConfig:
    return config if isinstance(config, RunConfig) else config.run


def folder(config: Config) -> Path:
    """Where the local store keeps a run, its evaluations and its weights."""
    return paths.runs() / _run(config).key()


def backbone(run: RunConfig, epoch: int | None = None) -> Path:
    """The weights of a run's backbone at an epoch (default: the last)."""
    return folder(run) / f"backbone-e{run.epochs if epoch is None else epoch:03d}.safetensors"


def read(path: Path) -> Record:
    """One record file. Raises SidaeError when it is not JSON, or not a record of the key it is filed under."""
    try:
        record = json.loads(path.read_text(), parse_constant=lambda c: (_ for _ in ()).throw(ValueError(c)))
        named = path.name.removeprefix("eval-").removesuffix(".json") if path.name != "record.json" else path.parent.name
        if record["key"] != named or not isinstance(record["config"], dict):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise SidaeError(f"The record {path} is damaged; move it away and it is computed again.") from e
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
def _locked(path: Path):
    """One process at a time; the kernel frees the lock when its owner dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        f = open(path, "w")
    except OSError as e:
        raise SidaeError(f"The store {path.parent} cannot be written ({e.strerror}); set SIDAE_RUNS to one that can.") from e
    with f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _keep(config: Config, record: Record) -> Record:
    train.write(folder(config) / _name(config), json.dumps(record, allow_nan=False, indent=1).encode())
    return record


def _load(fingerprint: str, run: RunConfig) -> data.Images:
    return data.by_fingerprint(fingerprint, size=run.size, channels=run.channels, resize=run.resize)


def fetch_run(run: RunConfig, epochs: set[int], device: torch.device, deadline: float | None, log: Callable) -> Record:
    """The record of a run whose backbones at `epochs` are there, trained if need be."""
    def whole() -> Record | None:
        return find(run) if all(backbone(run, e).exists() for e in epochs) else None

    if record := whole():
        return record
    with _locked(folder(run) / "lock"):
        if record := whole():  # another process trained it while this one waited
            return record
        began = time.monotonic()
        record = train.pretrain(run, _load(run.data, run), folder(run), device=device, checkpoints=epochs, deadline=deadline)
        _keep(run, record)
        (folder(run) / "checkpoint.safetensors").unlink(missing_ok=True)
        log(f"trained {run.method} {run.key()} in {time.monotonic() - began:.0f} s")
        return record


def fetch_eval(config: EvalConfig, device: torch.device) -> Record:
    """The record of an evaluation whose backbone is there."""
    with _locked(folder(config) / "lock"):
        if record := find(config):
            return record
        images = _load(config.data or config.run.data, config.run)
        return _keep(config, evaluate.evaluate(config, images, backbone(config.run, config.epoch), device=device))


def recorded(configs: Sequence[Config]) -> list[Record]:
    """The records that are there, each once."""
    return [r for c in dict.fromkeys(configs) if (r := find(c)) is not None]


def missing(configs: Sequence[Config]) -> list[Config]:
    """Those without a record."""
    return [c for c in dict.fromkeys(configs) if find(c) is None]


def fetch_all(configs: Sequence[Config], *, device: str = "auto", minutes: float | None = None,
              log: Callable[[str], None] = print) -> list[Record]:  # fmt: skip
    """The records of runs and evaluations, in the order asked for: what is recorded is read, the rest is computed once.

    minutes: after so long it stops at a checkpoint and raises train.Stopped, which says what is left. When some fail
    the rest are finished and kept, then one SidaeError names the failed.
    """
    for config in configs:  # every name is looked up before the first hour is spent
        methods.check(_run(config))
        if isinstance(config, EvalConfig):
            evaluate.check(config)
    where = train.device_of(device)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    wanted: dict[RunConfig, list[Config]] = defaultdict(list)
    for config in missing(configs):
        wanted[_run(config)].append(config)
    failed: dict[str, SidaeError] = {}
    for n, (run, parts) in enumerate(wanted.items()):
        evals = [c for c in parts if isinstance(c, EvalConfig)]
        try:
            fetch_run(run, {c.epoch for c in evals}, where, deadline, log)
            for config in sorted(evals, key=lambda c: (c.epoch, c.data)):
                if deadline is not None and time.monotonic() > deadline:
                    raise train.Stopped("Time is up.")
                fetch_eval(config, where)
        except train.Stopped as e:
            raise train.Stopped(f"{e} {len(missing(configs))} of {len(set(configs))} records are left.") from None
        except SidaeError as e:
            failed[f"{run.method} {run.key()}"] = e
        if len(wanted) > 1:
            log(f"{n + 1} of {len(wanted)} runs done")
    if failed:
        first = next(iter(failed.values()))
        raise SidaeError(f"{len(failed)} of {len(wanted)} runs failed ({', '.join(failed)}), the rest are kept. First: {first}")
    return [find(c) for c in configs]


def seconds_left(configs: Sequence[Config]) -> float | None:
    """Estimated training seconds of the runs without a record, from the rates of recorded ones; None without a rate."""
    def shape(c: RunConfig) -> tuple:
        return c.method in ("dae", "sidae"), c.backbone, c.stem, c.width, c.size, c.channels, c.batch

    rates: dict[tuple, list[float]] = defaultdict(list)
    for r in every("record"):
        if r["images"]:
            rates[shape(RunConfig.from_dict(r["config"]))].append(r["images"] / r["seconds"])
    total = 0.0
    for run in {_run(c) for c in missing(configs)}:
        if run.epochs:
            if not (known := rates.get(shape(run))):
                return None
            n = len(train.training_pairs(run, _load(run.data, run)))
            total += n * run.epochs / (sum(known) / len(known))
    return total
