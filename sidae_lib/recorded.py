"""What a notebook shows: the records of one scale, computed where they are missing, or the best on record."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import lru_cache
from typing import Any

import pandas as pd

from . import claims, data, experiments, paths, runs, store
from .config import EvalConfig, Record, SidaeError, typed

BEST = "recorded"  # beside the names of scales: the largest of them on record, for each set of images
SCALES = ("paper", "laptop", "quick")  # in the order they are looked for; quick alone where nothing larger is
EPOCH = 25  # from which on an unfinished run of the paper's protocol is shown


def fetch(figure: str, scale: str = BEST, datasets: Sequence[str] = (), seeds: Sequence[int] = (), *,
          device: str = "auto", minutes: float = 0.0, **more: Any) -> tuple[list[Record], list[Record]]:  # fmt: skip
    """The records that a figure shows: (of runs, of evaluations), each with the name of its `scale`, and whether
    it is the reader's `own`, beside published ones.

    scale: of one of `experiments.SCALES` what is missing is computed. At `recorded` nothing is: each set of
    images has the largest scale that is on record, as far as every method of it has come.
    minutes: after so many it stops at a checkpoint and raises train.Stopped; 0 is no limit.
    more: what else the figure's function in `experiments` takes. Raises SidaeError where nothing is recorded.
    """
    if scale == BEST:
        return best(figure, datasets, seeds, **more)
    if scale not in experiments.SCALES:
        raise SidaeError(f"Unknown scale {scale!r}; choose from {BEST}, {', '.join(experiments.SCALES)}.")
    runs.fetch_all(_needs(figure, scale, datasets, seeds, **more), device=device, minutes=minutes or None)
    while store.missing(wanted := _needs(figure, scale, datasets, seeds, **more)):  # fine-tuning asks for the w
        runs.fetch_all(wanted, device=device, minutes=minutes or None)  # that the sweep, now recorded, chooses
    return _parted(wanted, scale)


def _needs(figure: str, scale: str, datasets: Sequence[str], seeds: Sequence[int], **more: Any) -> list[store.Config]:
    trained, evals = experiments.figure(figure)(scale, datasets, seeds, **more)
    return [*trained, *evals]


def _parted(configs: Iterable[store.Config], scale: str) -> tuple[list[Record], list[Record]]:
    found = [r for c in configs if (r := store.find(c))]
    mine = {store.id_of(r) for r in store.own(found)}
    mine = set() if len(mine) == len(found) else mine  # nothing is published that they could stand beside
    found = [r | {"scale": scale, "own": store.id_of(r) in mine} for r in found]
    return [r for r in found if "run_key" not in r], [r for r in found if "run_key" in r]


def best(figure: str, datasets: Sequence[str] = (), seeds: Sequence[int] = (), **more: Any
         ) -> tuple[list[Record], list[Record]]:  # fmt: skip
    """As `fetch` at `recorded`."""
    trained, evals, taken = list[Record](), list[Record](), set[tuple]()
    for scale, panel, _, kept in _shown(figure, datasets, seeds, **more):
        if panel not in taken:
            taken.add(panel)
            for whole, part in zip((trained, evals), _parted(kept, scale)):
                whole += part
    if not taken:
        raise SidaeError(f"Nothing of {figure} is on record here; choose a scale of {', '.join(experiments.SCALES)}.")
    return trained, evals


def _shown(figure: str, datasets: Sequence[str] = (), seeds: Sequence[int] = (), **more: Any
           ) -> Iterator[tuple[str, tuple, list[store.Config], list[store.Config]]]:  # fmt: skip
    """(scale, panel, what the figure needs there, what of it is shown) of all that has records enough, the
    largest first."""
    places = str(paths.runs()), str(paths.records())
    sets, drawn = tuple(typed("datasets", datasets, list)), tuple(typed("seeds", seeds, list))
    given = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in more.items())
    larger = False
    for scale in SCALES:
        if scale == "quick" and larger:
            break
        for panel, configs in _panels(figure, scale, sets, drawn, given, places):
            if kept := _reached(configs):
                larger = True
                yield scale, panel, configs, kept


@lru_cache(maxsize=64)
def _panels(figure: str, scale: str, datasets: tuple, seeds: tuple, more: tuple, places: tuple
            ) -> list[tuple[tuple, list[store.Config]]]:  # fmt: skip
    """What a figure needs at a scale, by (set trained on, set evaluated on); nothing for sets that are not known.
    places: of the records, since what a figure asks for may depend on them."""
    wanted: list[store.Config] = []
    with suppress(SidaeError), warnings.catch_warnings(action="ignore"), data.as_published():
        wanted = _needs(figure, scale, datasets, seeds, **dict(more))
    panels = defaultdict[tuple, list[store.Config]](list)
    place: dict[store.Config, tuple] = {}
    for c in reversed(wanted):  # a run belongs to the first panel that evaluates it
        if isinstance(c, EvalConfig):
            place[c] = place[c.run] = c.run.data, c.data or c.run.data
    for c in wanted:
        panels[place.get(c, (store.run_of(c).data,) * 2)].append(c)
    return list(panels.items())


def _reached(configs: Sequence[store.Config]) -> list[store.Config]:
    """Those on record, up to the epoch that every method has reached with a seed, and of the seeds that have;
    none where that is before EPOCH and before the end, or where a method is missing."""
    method = {c: _alike(c) for c in configs}
    evaluated = {c.run for c in configs if isinstance(c, EvalConfig)}  # an unfinished run has no record of its own
    asked = _ends(c for c in configs if c not in evaluated)
    reach: dict[tuple, dict[int, int]] = {m: {} for m in asked}  # -> seed -> last epoch
    found = [c for c in configs if store.there(c)]
    for c in (c for c in found if c not in evaluated):
        seen, seed = reach[method[c]], store.run_of(c).seed
        seen[seed] = max(seen.get(seed, 0), _epoch(c))
    if not all(reach.values()):
        return []
    ends = {m: max(seen.values()) for m, seen in reach.items()}
    end = min((end for m, end in ends.items() if end < asked[m]), default=None)
    if end is not None and end < EPOCH:
        return []

    def shown(c: store.Config) -> bool:
        if c in evaluated:
            return True
        m = method[c]
        last = asked[m] if end is None else min(end, asked[m])
        return reach[m][store.run_of(c).seed] >= last >= _epoch(c)

    return [c for c in found if shown(c)]


def _epoch(config: store.Config) -> int:
    return config.epoch if isinstance(config, EvalConfig) else config.epochs


def _ends(configs: Iterable[store.Config]) -> dict[tuple, int]:
    """What configs of several seeds have in common -> the last epoch of it."""
    return {_alike(c): _epoch(c) for c in sorted(configs, key=_epoch)}


def _alike(config: store.Config) -> tuple:
    """What a config has in common with the same of another seed and epoch."""
    names = (f.name for f in fields(config) if f.name not in ("run", "seed", "epoch", "label_seed"))
    return *(getattr(config, name) for name in names), *(_alike(config.run) if isinstance(config, EvalConfig) else ())


def claimed(figure: str, scale: str = BEST, evals: Sequence[Record] = ()) -> pd.DataFrame:
    """The scoreboard of a figure's claims: at a scale of the records `evals`, at `recorded` of all there are."""
    return claims.scoreboard({figure: every(figure) if scale == BEST else evals}, scale)


def every(figure: str) -> list[Record]:
    """The evaluations of a figure on record at every scale at which each of its methods has a finished run, the
    largest first. `claims.scoreboard` chooses among the scales."""
    out: list[Record] = []
    for scale, _, configs, kept in _shown(figure):
        asked, there = ([c for c in some if isinstance(c, EvalConfig)] for some in (configs, kept))
        if _ends(asked) == _ends(there):
            out += _parted(asked, scale)[1]
    return out


def evaluations(scale: str) -> dict[str, list[Record]]:
    """Figure -> the evaluation records of a scale that are there; at `recorded` of `every` one."""
    if scale != BEST:
        return {name: store.recorded(evals) for name, evals in experiments.evaluations(scale).items()}
    return {name: found for name in experiments.evaluations("smoke") if (found := every(name))}
