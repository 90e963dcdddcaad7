"""The papers' numbers and claims as data, and what our records say to each.

`published.csv` holds every number with its source, `claims.csv` every claim in words, with the figure whose evaluations it
reads; a claim's function below, or its `sides` ("better > worse"), say which differences decide it. `scoreboard` puts both
beside our evaluations.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .evaluate import how_often_right

KINDS = {"frozen, linear SGD 50 epochs": "linear"}  # protocol -> the kind of evaluation that repeats it
SEEDS = 3  # below this many nothing is decided
TABLE = "datasets_table"  # the figure whose evaluations stand beside the published numbers


def table(**by: str | float) -> pd.DataFrame:
    """Rows of published.csv, filtered by column. labels: share in (0, 1]; value and se in percent."""
    return where(pd.read_csv(Path(__file__).with_name("published.csv")), by)


def where(frame: pd.DataFrame, by: Mapping[str, Any]) -> pd.DataFrame:
    """The rows whose columns have these values."""
    for column, value in by.items():
        frame = frame[frame[column] == value]
    return frame


# --- differences ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Difference:
    """A difference of accuracies in points.

    seeds: one value per seed.  images: the standard error that the choice of the test images gives to their mean, 0 where
    it is left out.  Both together make the interval, Student's t of the seeds and the normal's of the images, added in
    squares; `low` and `high` are the limits between which a claim holds.
    """

    seeds: pd.Series
    images: float = 0.0

    def __len__(self) -> int:
        return len(self.seeds)

    def __sub__(self, other: "Difference") -> "Difference":
        """By seed, the images' errors added as if each side had test images of its own."""
        return Difference((self.seeds - other.seeds).dropna(), float(np.hypot(self.images, other.images)))

    @property
    def mean(self) -> float:
        return float(self.seeds.mean())

    def half(self, alpha: float = 0.05, n: int = 0) -> float:
        """Half of the two-sided interval of level 1 - alpha; infinite for one seed. n: as if there were so many seeds."""
        if len(self) < 2:
            return np.inf
        from scipy import stats  # a second to import, for every process of the command line

        n = n or len(self)
        spread = float(self.seeds.std(ddof=1)) / n**0.5
        return float(np.hypot(stats.t.isf(alpha / 2, n - 1) * spread, stats.norm.isf(alpha / 2) * self.images))

    def interval(self, level: float = 0.95) -> tuple[float, float, float]:
        """Mean, and the two-sided interval around it."""
        half = self.half(1 - level)
        return self.mean, self.mean - half, self.mean + half

    def verdict(self, low: float = 0.0, high: float = np.inf) -> str:
        """supported, contradicted or undecided: where the 95 % interval lies; undecided below three seeds."""
        if len(self) < SEEDS:
            return f"undecided (n = {len(self)})"
        _, a, b = self.interval()
        return "supported" if low <= a and b <= high else "contradicted" if b < low or a > high else "undecided"

    def _room(self, low: float, high: float) -> float:
        """How far the mean lies from the nearest limit."""
        return min(abs(self.mean - low), abs(self.mean - high))

    def p(self, low: float = 0.0, high: float = np.inf) -> float:
        """The least alpha at which the interval decides; of a verdict, supported or contradicted, it is the p-value."""
        from scipy import optimize

        room = self._room(low, high)
        if not room or self.half(1 - 1e-12) > room:
            return 1.0
        return float(optimize.brentq(lambda a: self.half(a) - room, 1e-15, 1 - 1e-12)) if self.half(1e-15) > room else 0.0

    def would_decide(self, low: float = 0.0, high: float = np.inf) -> str:
        """Where the mean is as claimed and the interval too wide: how many seeds of this spread would decide it."""
        if not low < self.mean < high or self.verdict(low, high) == "supported" or len(self) < 2:
            return ""
        from scipy import stats

        room, most = self._room(low, high), 1000
        if stats.norm.isf(0.025) * self.images >= room:
            return "more test images"
        if self.half(n=most) > room:
            return f"more than {most:,} seeds"
        return f"{next(n for n in range(SEEDS, most + 1) if self.half(n=n) <= room)} seeds"


def interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean, and the two-sided Student interval over seeds; infinite for fewer than two values."""
    return Difference(pd.Series(differences, dtype=float)).interval(level)


def _mean(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by seed, and its standard error by the sampling of test images; several rows are classes of one run."""
    if rows.duplicated(["seed", *["metric"] * ("metric" in rows)]).any() or (
            rows.groupby("seed")["run_key"].nunique() > 1).any():
        raise ValueError("One side of a difference holds two results of one seed; their mean would be of neither.")
    rows = rows.assign(square=rows["error"] ** 2)
    out = rows.groupby("seed").agg(accuracy=("accuracy", "mean"), square=("square", "sum"), k=("accuracy", "count"))
    return out.assign(error=out["square"] ** 0.5 / out["k"])


def between(better: pd.DataFrame, worse: pd.DataFrame) -> Difference:
    """Accuracy of one side less the other's, for every seed that has both. The test images enter paired, image by image,
    where it is recorded which were right, else as two binomial samples.

    better, worse: rows of `figures.evaluations`, of each seed those of one run; several are its classes, of which the mean
    counts. Raises ValueError for two results of a seed.
    """
    a, b = _mean(better), _mean(worse)
    seeds = (a["accuracy"] - b["accuracy"]).dropna()
    rows = [side[side["seed"].isin(seeds.index)].sort_values("seed") for side in (better, worse)]
    if len(seeds) and all(len(side) == len(seeds) and side["right"].all() for side in rows):  # one row a seed, images known
        one, other = (np.stack([how_often_right({"right": r.right}) / r.repeats for r in side.itertuples()]) for side in rows)
        if one.shape == other.shape and {*rows[0]["display"]} == {*rows[1]["display"]}:
            return Difference(seeds, float(100 * (one - other).mean(0).std(ddof=1) / one.shape[1] ** 0.5))
    return Difference(seeds, float(np.hypot(a.loc[seeds.index, "error"].mean(), b.loc[seeds.index, "error"].mean())))


def difference(frame: pd.DataFrame, one: Mapping[str, Any], other: Mapping[str, Any]) -> Difference:
    """`between` the rows of `figures.evaluations` that each filters by column."""
    return between(where(frame, one), where(frame, other))


def sides(frame: pd.DataFrame, query: str) -> Difference:
    """"better > worse", two queries of the evaluations: the least of one side's runs less the greatest of the other's, by
    seed; of one run the mean of the rows asked for, which are its classes. Of no seed where a side has no rows."""
    asked, ends = [frame.query(q) for q in query.split(" > ")], []
    if not all(map(len, asked)):
        return Difference(pd.Series(dtype=float))
    for rows, pick in zip(asked, ("idxmin", "idxmax")):
        means = pd.concat([_mean(part) for _, part in rows.groupby("run_key")]).reset_index()
        ends.append(means.loc[means.groupby("seed")["accuracy"].agg(pick)].set_index("seed"))
    better, worse = ends
    seeds = (better["accuracy"] - worse["accuracy"]).dropna()
    return Difference(seeds, float(np.hypot(*(end.loc[seeds.index, "error"].mean() for end in ends))))


# --- the scoreboard ------------------------------------------------------------------------------------------------

Cases = Iterator[tuple[str, Difference]]  # name of a case, positive as claimed
CLAIMS: dict[str, Callable[[pd.DataFrame], Cases]] = {}


def claim(name: str) -> Callable:
    """Registers a function of the evaluations (figures.evaluations) as the test of the claim `name` in claims.csv."""
    def register(function: Callable[[pd.DataFrame], Cases]) -> Callable:
        CLAIMS[name] = function
        return function

    return register


BOARD = ["paper", "source", "statement", "claim verdict", "case", "n", "ours", "se", "published", "published_se", "difference",
         "low", "high", "z", "p", "verdict", "after Holm", "would decide"]  # fmt: skip


def scoreboard(frames: Mapping[str, pd.DataFrame], scale: str) -> pd.DataFrame:
    """Every published number that the evaluations speak to, and every claim that they decide or leave open, a row each.

    frames: figure -> `figures.evaluations` of the records that it asks for at one scale. A claim reads its own figure's and
    no others; unfinished runs are left out. A number has ours, n, se, published, difference and, where the two are
    comparable, z = difference / sqrt(se^2 + published_se^2); beside its verdict stands whether a copy of the data, such as
    re-compressed images, gave it. A claim has a row per case: the mean difference over seeds in points, positive as claimed,
    its 95 % interval, p and the verdict of this case alone; its verdict after Holm's correction over the cases of the claim
    (family-wise 5 %); and, where the sign is right and the interval wide, what would decide it.
    """
    frames = {figure: frame[finished(frame)] for figure, frame in frames.items() if len(frame)}
    claimed = pd.read_csv(Path(__file__).with_name("claims.csv"), keep_default_na=False)
    claimed = claimed[claimed["figure"].isin(frames)]
    rows = [row for _, same in claimed.groupby("claim", sort=False) for row in _judged(list(same.itertuples()), frames)]
    numbers = _values(frames[TABLE], scale) if TABLE in frames else pd.DataFrame()
    board = pd.concat([numbers, pd.DataFrame(rows)]).reindex(columns=BOARD).replace([np.inf, -np.inf], np.nan)
    return board.round(dict.fromkeys(BOARD, 2) | {"p": 4}).reset_index(drop=True)


def finished(frame: pd.DataFrame) -> pd.Series:
    """Which rows are of runs that are evaluated at their last epoch: no claim is decided on the way."""
    return frame.groupby("run_key")["epoch"].transform("max") >= frame["of"]


def claims(board: pd.DataFrame) -> pd.DataFrame:
    """A row per claim of a `scoreboard`: its verdict as a whole, how many cases, of these how many were tested (three seeds),
    how many of those each verdict has when every case is judged alone, and how many would be decided by chance."""
    rows = []
    for (paper, source, statement), cases in board[board["published"].isna()].groupby(BOARD[:3], sort=False):
        tested = cases[cases["n"] >= SEEDS]
        count = tested["verdict"].value_counts()
        rows.append({"paper": paper, "source": source, "statement": statement, "verdict": cases["claim verdict"].iloc[0],
                     "cases": len(cases), "tested": len(tested), **{v: count.get(v, 0) for v in VERDICTS},
                     "by chance": round(0.05 * len(tested), 2)})  # fmt: skip
    return pd.DataFrame(rows, columns=["paper", "source", "statement", "verdict", "cases", "tested", *VERDICTS, "by chance"])


VERDICTS = ("supported", "contradicted", "undecided")


def holm(p: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects, so that one is wrongly rejected with probability alpha at most."""
    out, order = [False] * len(p), np.argsort(p, kind="stable")
    for k, i in enumerate(order):
        if p[i] > alpha / (len(p) - k):
            break
        out[i] = True
    return out


def _cases(c: Any, frame: pd.DataFrame) -> Cases:
    """What a row of claims.csv compares; `both_needed` looks for its w on validation images, all others read test images."""
    asked = frame if c.name == "both_needed" else frame[frame["scored"] == "test"]
    return CLAIMS[c.name](asked) if c.name in CLAIMS else _scenarios(asked, c.sides, c.case)


def _judged(rows: Sequence[Any], frames: Mapping[str, pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """The cases of a claim, the rows of claims.csv with its words, each judged alone and all together."""
    c, cases = rows[0], [(name, d) for row in rows for name, d in _cases(row, frames[row.figure]) if len(d)]
    limits = (-c.margin, c.margin) if c.margin > 0 else (0.0, np.inf)
    tested = [k for k, (_, d) in enumerate(cases) if len(d) >= SEEDS]
    kept = dict(zip(tested, holm([cases[k][1].p(*limits) for k in tested])))
    after = [d.verdict(*limits) if kept.get(k) else "undecided" for k, (_, d) in enumerate(cases)]
    yes, no = (after.count(v) for v in VERDICTS[:2])
    whole = ("undecided (fewer than three seeds)" if not tested else "undecided" if not yes + no else
             f"mixed: {yes} for, {no} against, of {len(tested)}" if yes and no else
             "supported" * bool(yes) + "contradicted" * bool(no)
             + f" in {yes + no} of {len(tested)} cases" * (yes + no < len(tested)))  # fmt: skip
    for k, (case, d) in enumerate(cases):
        mean, low, high = d.interval()
        yield {"paper": c.paper, "source": c.source, "statement": c.claim, "claim verdict": whole, "case": case, "n": len(d),
               "difference": mean, "low": low, "high": high, "p": d.p(*limits) if k in kept else np.nan,
               "verdict": d.verdict(*limits), "after Holm": after[k] if k in kept else d.verdict(*limits),
               "would decide": d.would_decide(*limits)}  # fmt: skip


def _values(frame: pd.DataFrame, scale: str) -> pd.DataFrame:
    last = _last(_plain(frame[frame["scored"] == "test"]))
    by = ["method", "pretrain_name", "data", "display", "labels", "kind"]
    ours = last.groupby(by, sort=False)["accuracy"].agg(ours="mean", se="sem", n="count").reset_index()
    paper = table().assign(kind=lambda t: t["protocol"].map(KINDS)).rename(columns={"value": "published", "se": "published_se"})
    on = ["method", "pretrain_data", "data", "labels", "kind"]
    out = ours.rename(columns={"pretrain_name": "pretrain_data"}).merge(paper, on=on)
    out["difference"] = out["ours"] - out["published"]
    out["z"] = out["difference"] / np.hypot(out["se"], out["published_se"].fillna(0))
    out["verdict"] = [_comparable(r, scale) for r in out.itertuples()]
    out["z"] = [np.nan if v.startswith("not") else z for z, v in zip(out["z"], out["verdict"])]
    out["statement"] = out["method"]
    out["case"] = [_name(r.display, r.labels, *([f"from {r.pretrain_data}"] if r.pretrain_data != r.data else []))
                   for r in out.itertuples()]
    return out


def _comparable(row: Any, scale: str) -> str:
    """The verdict on a number, or why there is none."""
    if isinstance(row.note, str) and row.note.startswith("suspect"):
        return "not comparable: suspect cell"
    if scale != "paper":
        return f"not comparable: {scale} scale"
    verdict = "undecided" if not abs(row.z) < np.inf else "agrees" if abs(row.z) <= 2 else "above" if row.z > 0 else "below"
    return verdict + ", data copy" * ("copy" in row.display)


def _scenarios(frame: pd.DataFrame, query: str, case: str) -> Cases:
    """The student report's, with none of its confounds undone."""
    if "undone" in frame:
        frame = frame[frame["undone"] == ""]
        shown = dict.fromkeys(name for q in query.split(" > ") for name in frame.query(q)["display"])
        yield ", ".join([*shown, *[case] * bool(case)]), sides(frame, query)


# --- SidAE ---------------------------------------------------------------------------------------------------------

SSL = ("sidae", "simsiam", "dae")


def _probed(frame: pd.DataFrame, kind: str = "linear") -> Iterator[tuple[str, float, pd.DataFrame]]:
    """(set, share of labels, its rows by this probe, w = 0.5, and the supervised network's), pre-trained on the same set."""
    own = _plain(frame[(frame["pretrain"] == frame["display"]) & frame["kind"].isin([kind, "classifier"])])
    own = own[(own["augment"] != "none") | ~own["method"].isin(SSL)]
    own = own[(own["method"] != "supervised") | (own["augment"] == "none")]
    for (display, labels), part in own.groupby(["display", "labels"], sort=False):
        yield display, labels, part


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Without the runs of the sweep that are other methods by w or by the scale of the targets."""
    return frame[(frame["w"] == 0.5) & (frame["target"] == "standardised, mean")]


def _last(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["epoch"] == frame["of"]]


def _name(display: str, labels: float, *what: str) -> str:
    return ", ".join([display, f"{100 * labels:g} %", *what])


@claim("rises")
def _rises(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame):
        for m in SSL:
            own = part[part["method"] == m]
            if own["epoch"].nunique() > 1:
                first, last = own["epoch"].min(), own["of"].max()
                yield _name(display, labels, m), difference(own, {"epoch": last}, {"epoch": first})


@claim("early")
def _early(frame: pd.DataFrame) -> Cases:
    found = list(_probed(frame))  # of their shares: semantic pairs are looked for among others
    for display, labels, part in found:
        if labels == min(share for _, share, _ in found):
            for m in SSL:
                first = {"method": m, "epoch": part[part["method"] == m]["epoch"].min()}
                yield _name(display, labels, m), difference(part, first, {"method": "supervised"})


@claim("supervised_full")
def _supervised_full(frame: pd.DataFrame) -> Cases:
    found = list(_probed(frame))  # of their shares: semantic pairs are looked for among others
    for display, labels, part in found:
        if labels == max(share for _, share, _ in found):
            for m in SSL:
                yield _name(display, labels, m), difference(_last(part), {"method": "supervised"}, {"method": m})


@claim("beats_parts")
def _beats_parts(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame):
        for m in SSL[1:]:
            yield _name(display, labels, f"against {m}"), difference(_last(part), {"method": "sidae"}, {"method": m})


@claim("stable_seeds")
def _stable_seeds(frame: pd.DataFrame) -> Cases:
    """Distances from the method's own mean over seeds, a Levene test by pairs. The test images are taken as given: what they
    do to all seeds alike cancels."""
    for display, labels, part in _probed(frame):
        own = {m: p.set_index("seed")["accuracy"] for m, p in _last(part).groupby("method")}
        if all(len(own.get(m, ())) > 1 for m in SSL[:2]):
            gap = {m: (own[m] - own[m].mean()).abs() for m in SSL[:2]}
            yield _name(display, labels), Difference((gap["simsiam"] - gap["sidae"]).dropna())


@claim("stable_epochs")
def _stable_epochs(frame: pd.DataFrame) -> Cases:
    """Standard deviation over the checkpoints of the second half of pre-training, seed by seed; test images as given."""
    for display, labels, part in _probed(frame):
        late = part[part["epoch"] >= part["of"] / 2]
        spread = {m: p.groupby("seed")["accuracy"].std() for m, p in late.groupby("method") if m in SSL[:2]}
        if len(spread) == 2:
            yield _name(display, labels), Difference((spread["simsiam"] - spread["sidae"]).dropna())


@claim("ae_beats_simsiam")
def _ae_beats_simsiam(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame):
        if "MNIST" in display or display == "digits":
            yield _name(display, labels), difference(_last(part), {"method": "dae"}, {"method": "simsiam"})


@claim("beats_supervised_mnist")
def _beats_supervised_mnist(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame):
        if "MNIST" in display or display == "digits":
            yield _name(display, labels), difference(_last(part), {"method": "sidae"}, {"method": "supervised"})


@claim("finetuned_beat_supervised")
def _finetuned(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame, "finetune"):
        for m in SSL:
            yield _name(display, labels, m), difference(_last(part), {"method": m}, {"method": "supervised"})


@claim("finetuned_sidae_best")
def _finetuned_best(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame, "finetune"):
        for m in SSL[1:]:
            yield _name(display, labels, f"against {m}"), difference(_last(part), {"method": "sidae"}, {"method": m})


def _transferred(frame: pd.DataFrame) -> Iterator[tuple[str, str, float, pd.DataFrame]]:
    """Like `_probed`, pre-trained on STL-10 or on what stands for it; the supervised rows are the target's own."""
    frame = _plain(frame)
    moved = frame[(frame["kind"] == "linear") & frame["method"].isin(SSL)]
    moved = moved[(moved["pretrain"] != moved["display"]) | (moved["pretrain"] == "STL-10")]
    for (pretrain, display, labels), part in moved.groupby(["pretrain", "display", "labels"], sort=False):
        same = frame[(frame["display"] == display) & (frame["labels"] == labels) & (frame["pretrain"] == display)]
        own = same[(same["kind"] == "classifier") & (same["augment"] == "none") | (same["kind"] == "linear")]
        yield pretrain, display, labels, pd.concat([part, own.assign(method=own["method"] + "_own")])


@claim("transfer_beats_supervised")
def _transfer_beats(frame: pd.DataFrame) -> Cases:
    for pretrain, display, labels, part in _transferred(frame):
        for m in SSL[:2] if pretrain == display else ():
            own = difference(_last(part), {"method": m}, {"method": "supervised_own"})
            yield _name(f"{pretrain} to {display}", labels, m), own


@claim("transfer_supervised")
def _transfer_supervised(frame: pd.DataFrame) -> Cases:
    found = list(_transferred(frame))
    for pretrain, display, labels, part in found:
        for m in SSL if pretrain != display and labels == max(share for _, _, share, _ in found) else ():
            own = difference(_last(part), {"method": "supervised_own"}, {"method": m})
            yield _name(f"{pretrain} to {display}", labels, m), own


@claim("transfer_close")
def _transfer_close(frame: pd.DataFrame) -> Cases:
    for pretrain, display, labels, part in _transferred(frame):
        yield _name(f"{pretrain} to {display}", labels), difference(_last(part), {"method": "sidae"}, {"method": "sidae_own"})


def _sweep(frame: pd.DataFrame) -> Iterator[tuple[str, float, pd.DataFrame]]:
    """(set, share of labels, rows) where more than one w inside (0, 1) was run, with the seeds that have every w; the ends
    are the autoencoder, w = 0, and SimSiam, w = 1."""
    own = _last(frame[(frame["kind"] == "linear") & (frame["pretrain"] == frame["display"])
                      & frame["method"].isin(SSL) & (frame["target"] == "standardised, mean")])
    w = own["w"].where(own["method"] == "sidae", (own["method"] == "simsiam").astype(float))
    for (display, labels), part in own.assign(w=w).groupby(["display", "labels"], sort=False):
        part = part[part.groupby("seed")["w"].transform("nunique") == part["w"].nunique()]
        if {0.0, 1.0} <= set(part["w"]) and part["w"].nunique() > 3:
            yield display, labels, part


@claim("both_needed")
def _both_needed(frame: pd.DataFrame) -> Cases:
    """The w inside (0, 1) that is best on validation images, scored on test images, against each end."""
    val = {(display, labels): part for display, labels, part in _sweep(frame[frame["scored"] == "val"])}
    for display, labels, part in _sweep(frame[frame["scored"] == "test"]):
        if (chosen := val.get((display, labels))) is not None:
            best = chosen[chosen["w"].between(0, 1, "neither")].groupby("w")["accuracy"].mean().idxmax()
            for end, name in ((0.0, "the autoencoder"), (1.0, "SimSiam")):
                yield _name(display, labels, f"w = {best:g} against {name}"), difference(part, {"w": best}, {"w": end})


@claim("siamese_matters_more")
def _siamese_matters_more(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame):
        yield _name(display, labels), difference(_last(part), {"method": "simsiam"}, {"method": "dae"})


@claim("w_alike")
def _w_alike(frame: pd.DataFrame) -> Cases:
    """What an end of w costs against 0.5, with scarce less with many labels."""
    swept = {(display, labels): part for display, labels, part in _sweep(frame)}
    shares = sorted({labels for _, labels in swept})
    for display in dict.fromkeys(d for d, _ in swept):
        if len(shares) == 2 and all((display, share) in swept for share in shares):
            for end in (0.0, 1.0):
                few, many = (difference(swept[display, share], {"w": end}, {"w": 0.5}) for share in shares)
                yield f"{display}, w = {end:g} against 0.5", few - many


@claim("loses_more")
def _loses_more(frame: pd.DataFrame) -> Cases:
    """What the supervised network loses from many to scarce labels, less what a pre-trained one loses."""
    for display, part in _last(frame).groupby("display", sort=False):
        rows = pd.concat([part[:0], *(p for _, _, p in _probed(part))])
        if len(shares := sorted(set(rows["labels"]))) == 2:
            loss = {m: difference(rows, {"method": m, "labels": shares[1]}, {"method": m, "labels": shares[0]})
                    for m in ("supervised", *SSL)}
            for m in SSL:
                yield f"{display}, {m}", loss["supervised"] - loss[m]


# --- five axes -----------------------------------------------------------------------------------------------------


def choices(frame: pd.DataFrame, method: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """(axis, rows) of a method: its own choice (`own`), and the choices that depart from it on this axis alone."""
    rows = frame[frame["method"].isin([method, *["composed"] * (method == "yadim")]) & ~frame["varied"].str.contains(";")]
    rows = rows[(rows["method"] == method) | (rows["varied"] != "")]
    axes, names = (rows["varied"].str.split(": ").str[k].fillna("") for k in (0, 1))
    for axis in dict.fromkeys(axes[axes != ""]):
        yield axis, rows.assign(choice=names, own=axes == "")[axes.isin([axis, ""])]


@claim("yadim_robust")
def _yadim_robust(frame: pd.DataFrame) -> Cases:
    """Best less worst choice of an axis, seed by seed: another method's less YADIM's."""
    for (display, labels), part in frame[frame["kind"] == "logistic"].groupby(["display", "labels"], sort=False):
        wide = {(m, axis): rows.pivot_table(index="seed", columns="choice", values="accuracy").dropna()
                for m in ("yadim", "amdim", "cpc_v2") for axis, rows in choices(part, m)}
        spread = {k: v.max(axis=1) - v.min(axis=1) for k, v in wide.items()}
        for (m, axis), other in spread.items():
            if m != "yadim" and ("yadim", axis) in spread:
                error = 2 * float((part["error"] ** 2).mean() ** 0.5)  # of four accuracies, as if of four sets of test images
                yield (_name(display, labels, f"{axis}, against {m}"),
                       Difference((other - spread["yadim", axis]).dropna(), error))


@claim("special_cases")
def _special_cases(frame: pd.DataFrame) -> Cases:
    """A method's accuracy less that of the one made of its five choices."""
    made = {"simclr": "extract: vector", "amdim": "augment: amdim; encode: amdim", "yadim": "^$"}
    for (display, labels), part in frame[frame["kind"] == "logistic"].groupby(["display", "labels"], sort=False):
        for m, varied in made.items():
            same = part[(part["method"] == "composed") & part["varied"].str.contains(varied)]
            own = part[(part["method"] == m) & (part["varied"] == "")]
            yield _name(display, labels, m), difference(pd.concat([own, same]), {"method": m}, {"method": "composed"})


# --- SePP-ID: by logistic regression, which does not depend on the scale of features ------------------------------


def _pairs(frame: pd.DataFrame, kind: str) -> Iterator[tuple[str, pd.DataFrame, dict, dict]]:
    """(set and method, its rows, what names those with these pairs, and those without any)."""
    own = _plain(frame[(frame["kind"] == "logistic") & (frame["pretrain"] == frame["display"])])
    for (display, labels, method), part in own.groupby(["display", "labels", own["method"].str.split(" ").str[0]], sort=False):
        if mined := [m for m in part["method"].unique() if m.endswith(f" {kind}")]:
            yield _name(display, labels, method), part, {"method": mined[0]}, {"method": method}


@claim("pairs_beat_none")
def _pairs_beat_none(frame: pd.DataFrame) -> Cases:
    for case, part, mined, none in _pairs(frame, "mined"):
        for epoch in sorted(part["epoch"].unique()):
            yield f"{case}, epoch {epoch}", difference(part, mined | {"epoch": epoch}, none | {"epoch": epoch})


@claim("half_the_epochs")
def _half_the_epochs(frame: pd.DataFrame) -> Cases:
    for case, part, mined, none in _pairs(frame, "mined"):
        if half := max((e for e in part["epoch"] if 2 * e <= part["of"].max()), default=0):
            yield f"{case}, epoch {half}", difference(part, mined | {"epoch": half}, none | {"epoch": part["of"].max()})


@claim("random_add_nothing")
def _random_add_nothing(frame: pd.DataFrame) -> Cases:
    for case, part, random, none in _pairs(frame, "random"):
        yield case, difference(_last(part), random, none)


@claim("originals_and_training")
def _originals_and_training(frame: pd.DataFrame) -> Cases:
    own = frame[(frame["kind"] == "pairs") & (frame["method"] == "moco_v2") & (frame["pretrain"] == frame["display"])]
    for (display, views), part in own[own["input"] != "none"].groupby(["display", "input"], sort=False):
        plain, K = _last(own)[_last(own)["input"] == "none"], part["n_train"]
        both = pd.concat([part[part["epoch"] == 0], plain[plain["n_train"].isin(K)]])
        yield display, difference(both, {"input": "none"}, {"input": views})
