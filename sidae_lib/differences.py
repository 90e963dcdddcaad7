"""Differences of accuracies over seeds: their intervals, verdicts, and Holm's correction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .evaluate import how_often_right

SEEDS = 3  # below this many nothing is decided


def where(frame: pd.DataFrame, by: Mapping[str, Any]) -> pd.DataFrame:
    """The rows whose columns have these values."""
    for column, value in by.items():
        frame = frame[frame[column] == value]
    return frame


@dataclass(frozen=True, eq=False)
class Difference:
    """A difference of accuracies in points.

    seeds: one value per seed.  images: the standard error of their mean that comes from the choice of the
    test images, 0 to leave it out.  The interval holds both: Student's t of the seeds and the normal's of the
    images, added in squares.  `low` and `high` are the limits between which a claim holds.
    """

    seeds: pd.Series
    images: float = 0.0

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def mean(self) -> float:
        return float(self.seeds.mean())

    def half(self, alpha: float = 0.05, n: Any = 0) -> Any:
        """Half of the two-sided interval of level 1 - alpha; infinite for one seed.

        n: as if there were so many seeds of this spread; an array gives an array.
        """
        if len(self) < 2:
            return np.inf
        from scipy import stats  # a second to import, for every process of the command line

        n = np.where(n, n, len(self))
        spread = self.seeds.std(ddof=1) / n**0.5
        return np.hypot(stats.t.isf(alpha / 2, n - 1) * spread, stats.norm.isf(alpha / 2) * self.images)

    def bar(self) -> float:
        """Half of the 95 % interval, to be drawn; of one seed only what the choice of the test images gives."""
        return float(self.half()) if len(self) > 1 else 1.96 * self.images

    def interval(self) -> tuple[float, float, float]:
        """Mean, and the two-sided 95 % interval around it."""
        half = float(self.half())
        return self.mean, self.mean - half, self.mean + half

    def verdict(self, low: float = 0.0, high: float = np.inf) -> str:
        """supported, contradicted or undecided, by the 95 % interval; undecided below three seeds."""
        if len(self) < SEEDS:
            return f"undecided (n = {len(self)})"
        _, a, b = self.interval()
        if low <= a and b <= high:
            return "supported"
        return "contradicted" if b < low or a > high else "undecided"

    def _room(self, low: float, high: float) -> float:
        """How far the mean lies from the nearest limit."""
        return min(abs(self.mean - low), abs(self.mean - high))

    def p(self, low: float = 0.0, high: float = np.inf) -> float:
        """The p-value of a verdict: the least alpha at which the interval decides."""
        from scipy import optimize

        room = self._room(low, high)
        if not room or self.half(1 - 1e-12) > room:
            return 1.0
        if self.half(1e-15) <= room:
            return 0.0
        return float(optimize.brentq(lambda alpha: self.half(alpha) - room, 1e-15, 1 - 1e-12))

    def would_decide(self, low: float = 0.0, high: float = np.inf) -> str:
        """How many seeds of this spread would decide, if the mean is as claimed but the interval too wide."""
        if not low < self.mean < high or self.verdict(low, high) == "supported" or len(self) < 2:
            return ""
        from scipy import stats

        room = self._room(low, high)
        if stats.norm.isf(0.025) * self.images >= room:
            return "more test images"
        counts = np.arange(SEEDS, 1001)
        enough = counts[self.half(n=counts) <= room]
        return f"{enough[0]} seeds" if len(enough) else f"more than {counts[-1]:,} seeds"


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the two-sided 95 % Student interval over seeds; infinite for fewer than two values."""
    return Difference(pd.Series(differences, dtype=float)).interval()


def by_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by seed, and its standard error from the choice of the test images.

    Several rows of one seed are classes of one run, of which the mean counts. Raises ValueError for two
    results.
    """
    twice = rows.duplicated([c for c in ("seed", "metric") if c in rows]).any()
    if twice or (rows.groupby("seed")["run_key"].nunique() > 1).any():
        raise ValueError("One side of a difference holds two results of one seed; their mean would be of "
                         "neither.")  # fmt: skip
    seeds = rows.assign(variance=rows["error"] ** 2).groupby("seed")
    error = seeds["variance"].sum() ** 0.5 / seeds["accuracy"].count()
    return pd.DataFrame({"accuracy": seeds["accuracy"].mean(), "error": error})


def between(better: pd.DataFrame, worse: pd.DataFrame) -> Difference:
    """Accuracy of one side less the other's, for every seed that has both.

    better, worse: rows of `frames.evaluations`, one run a seed; if it has several rows, they are classes, of
    which the mean counts. The test images enter paired, image by image, where it is recorded which were
    right, else as two binomial samples. Raises ValueError for two results of a seed.
    """
    a, b = by_seed(better), by_seed(worse)
    seeds = (a["accuracy"] - b["accuracy"]).dropna()
    sides = [side[side["seed"].isin(seeds.index)].sort_values("seed") for side in (better, worse)]
    if len(seeds) and all(len(side) == len(seeds) and side["right"].all() for side in sides):
        one, other = (np.stack([how_often_right({"right": r.right}) / r.repeats for r in side.itertuples()])
                      for side in sides)  # fmt: skip
        if one.shape == other.shape and {*sides[0]["display"]} == {*sides[1]["display"]}:
            change = (one - other).mean(0)  # by image
            return Difference(seeds, float(100 * change.std(ddof=1) / len(change) ** 0.5))
    return Difference(seeds, float(np.hypot(*(side.loc[seeds.index, "error"].mean() for side in (a, b)))))


def difference(frame: pd.DataFrame, one: Mapping[str, Any], other: Mapping[str, Any]) -> Difference:
    """`between` the rows of `frames.evaluations` that each filters by column."""
    return between(where(frame, one), where(frame, other))


def holm(p: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects: one is wrongly rejected with probability at most
    alpha."""
    out, order = [False] * len(p), np.argsort(p, kind="stable")
    for k, i in enumerate(order):
        if p[i] > alpha / (len(p) - k):
            break
        out[i] = True
    return out
