"""What a notebook shows: the records of one scale, computed where they are missing, or the best on record."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pandas as pd

from . import claims, data, experiments, runs, store
from .config import EvalConfig, Record, RunConfig, SidaeError

BEST = "recorded"  # beside the names of scales: the largest of them on record, for each set of images
SCALES = ("paper", "laptop", "quick")  # in the order they are looked for; quick alone where nothing larger is
EPOCH = 25  # from which on an unfinished run of the paper's protocol is shown


def fetch(figure: str, scale: str = BEST, datasets: Sequence[str] = (), seeds: Sequence[int] = (), *,
          device: str = "auto", minutes: float = 0.0, **more: Any) -> tuple[list[Record], list[Record]]:  # fmt: skip
    """The records that a figure shows: (of runs, of evaluations), each with the name of its `scale`.

    scale: of one of `experiments.SCALES` what is missing is computed. At `recorded` nothing is: each set of
    images has the largest scale that is on record, as far as every method of it has come.
    minutes: after so many it stops at a checkpoint and raises train.Stopped; 0 is no limit.
    more: what else the figure's function in `experiments` takes. Raises SidaeError where nothing is recorded.
    """
    if scale == BEST:
        return best(figure, datasets, seeds, **more)
    asked: list[store.Config] = []
    while store.missing(wanted := _needs(figure, scale, datasets, seeds, **more)) or not asked:
        if asked == wanted:
            break
        asked = wanted  # what else there is to ask for may depend on it, as fine-tuning on the w that is chosen
        runs.fetch_all(wanted, device=device, minutes=minutes or None)
    return _parted(wanted, scale)


def _needs(figure: str, scale: str, datasets: Sequence[str], seeds: Sequence[int], **more: Any) -> list[store.Config]:
    trained, evals = experiments.figure(figure)(scale, datasets, seeds, **more)
    return [*trained, *evals]


def _parted(configs: Iterable[store.Config], scale: str) -> tuple[list[Record], list[Record]]:
    found = [r | {"scale": scale} for c in configs if (r := store.find(c))]
    return [r for r in found if "run_key" not in r], [r for r in found if "run_key" in r]


def best(figure: str, datasets: Sequence[str] = (), seeds: Sequence[int] = (), *, least: int = 1, **more: Any
         ) -> tuple[list[Record], list[Record]]:  # fmt: skip
    """As `fetch` at `recorded`.  least: so many seeds of each method must have come that far."""
    trained, evals, taken = list[Record](), list[Record](), set[tuple]()
    with data.as_published():
        for scale in SCALES:
            if scale == "quick" and taken:
                break
            for panel, configs in _panels(figure, scale, datasets, seeds, more):
                if panel not in taken and (kept := _reached(configs, least)):
                    taken.add(panel)
                    for whole, part in zip((trained, evals), _parted(kept, scale)):
                        whole += part
    if not taken and least == 1:
        raise SidaeError(f"Nothing of {figure} is on record here; choose a scale of {', '.join(experiments.SCALES)}.")
    return trained, evals


def _panels(figure: str, scale: str, datasets: Sequence[str], seeds: Sequence[int], more: dict[str, Any]
            ) -> Iterator[tuple[tuple, list[store.Config]]]:  # fmt: skip
    """What a figure needs at a scale, by (set trained on, set evaluated on)."""
    panels, evaluated = defaultdict[tuple, list[store.Config]](list), dict[RunConfig, tuple]()
    with suppress(SidaeError), warnings.catch_warnings(action="ignore"):  # a set that nothing is known of
        wanted = _needs(figure, scale, datasets, seeds, **more)
        for c in reversed(wanted):  # evaluations first: they say where their run belongs
            if isinstance(c, EvalConfig):
                evaluated[c.run] = (c.run.data, c.data or c.run.data)
            panels[(c.run.data, c.data or c.run.data) if isinstance(c, EvalConfig) else
                   evaluated.get(c, (c.data, c.data))].append(c)  # fmt: skip
    yield from ((panel, configs[::-1]) for panel, configs in reversed(panels.items()))


def _reached(configs: Sequence[store.Config], least: int) -> list[store.Config]:
    """Those on record, up to the epoch that every method has reached with at least so many seeds, and of the
    seeds that have; none where that is before EPOCH and before the end, or where anything is missing."""
    reach: dict[store.Config, dict[int, int]] = {_alike(c): {} for c in configs}  # -> seed -> last epoch
    asked = {_alike(c): _epoch(c) for c in sorted(configs, key=_epoch)}
    found = [c for c in configs if store.find(c)]
    for c in found:
        seen, seed = reach[_alike(c)], store.run_of(c).seed
        seen[seed] = max(seen.get(seed, 0), _epoch(c))
    if any(len(seen) < least for seen in reach.values()):
        return []
    ends = {c: sorted(seen.values(), reverse=True)[least - 1] for c, seen in reach.items()}
    end = min((end for c, end in ends.items() if end < asked[c]), default=None)
    if end is not None and end < EPOCH:
        return []

    def shown(c: store.Config) -> bool:
        last = asked[_alike(c)] if end is None else min(end, asked[_alike(c)])
        return reach[_alike(c)][store.run_of(c).seed] >= last >= _epoch(c)

    return [c for c in found if shown(c)]


def _epoch(config: store.Config) -> int:
    return config.epoch if isinstance(config, EvalConfig) else config.epochs


def _alike(config: store.Config) -> store.Config:
    """The same of another seed and epoch."""
    run = store.run_of(config).replace(seed=0)
    return EvalConfig.create(**config.to_dict() | {"run": run, "epoch": run.epochs, "seed": 0, "label_seed": 0}) if isinstance(
        config, EvalConfig) else run  # fmt: skip


def claimed(figure: str, scale: str = BEST, evals: Sequence[Record] = (), **more: Any) -> pd.DataFrame:
    """The scoreboard of a figure's claims.

    At `recorded` those of the largest scale at which every method has at least three seeds, for each set of
    images; of the others the best there is. At another scale of the records `evals`.
    """
    if scale != BEST:
        return claims.scoreboard({figure: evals}, scale)
    three, any_n = (best(figure, least=n, **more)[1] for n in (claims.SEEDS, 1))
    there = {_set(r) for r in three}
    return claims.scoreboard({figure: three + [r for r in any_n if _set(r) not in there]}, scale)


def _set(record: Record) -> tuple[str, str]:
    return record["config"]["run"]["data"], record["data"]["name"]
