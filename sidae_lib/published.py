"""The papers' numbers and claims as data, and what our records say to each.

`published.csv` holds every number with its source, `claims.csv` every claim in words; a claim's function below, or its
`sides` ("better > worse"), say which differences over seeds decide it. `scoreboard` puts both beside our evaluations.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

KINDS = {"frozen, linear SGD 50 epochs": "linear"}  # protocol -> the kind of evaluation that repeats it
Cases = Iterator[tuple[str, Sequence[float]]]  # name of a case, one difference per seed, positive as claimed
CLAIMS: dict[str, Callable[[pd.DataFrame], Cases]] = {}


def table(**where: str | float) -> pd.DataFrame:
    """Rows of published.csv, filtered by column. labels: share in (0, 1]; value and se in percent."""
    rows = pd.read_csv(Path(__file__).with_name("published.csv"))
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


def interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean, and the two-sided Student interval around it; infinite for fewer than two values."""
    d = np.asarray(differences, float)
    if len(d) < 2:
        return d.mean(), -np.inf, np.inf
    half = stats.t.ppf(0.5 + level / 2, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return d.mean(), d.mean() - half, d.mean() + half


def verdict(differences: Sequence[float], low: float = 0.0, high: float = np.inf) -> str:
    """supported, contradicted or undecided: where the 95 % interval lies against [low, high]; undecided below n = 3."""
    _, a, b = interval(differences)
    if len(differences) < 3:
        return f"undecided (n = {len(differences)})"
    return "supported" if low <= a and b <= high else "contradicted" if b < low or a > high else "undecided"


def claim(name: str) -> Callable:
    """Registers a function of the evaluations (figures.evaluations) as the test of the claim `name` in claims.csv."""
    def register(function: Callable[[pd.DataFrame], Cases]) -> Callable:
        CLAIMS[name] = function
        return function

    return register


def paired(frame: pd.DataFrame, one: dict, other: dict) -> pd.Series:
    """accuracy(one) - accuracy(other) by seed, for every seed that has both; `one` and `other` filter by column."""
    series = []
    for where in (one, other):
        rows = frame
        for column, value in where.items():
            rows = rows[rows[column] == value]
        series.append(rows.groupby("seed")["accuracy"].mean())
    return (series[0] - series[1]).dropna()


BOARD = ["paper", "source", "statement", "case", "n", "ours", "se", "published", "published_se", "difference", "low", "high",
         "z", "verdict"]  # fmt: skip


def scoreboard(frame: pd.DataFrame, scale: str) -> pd.DataFrame:
    """Every published number that the evaluations speak to, and every claim that they decide or leave open, a row each.

    frame: `figures.evaluations` of one scale's records; unfinished runs are left out. A number has ours, n, se, published,
    difference and, where the two are comparable, z = difference / sqrt(se^2 + published_se^2); beside its verdict stands
    whether a copy of the data, such as re-compressed images, gave it. A claim has a row per case: the mean difference over
    seeds in points, positive as claimed, its 95 % interval and the verdict.
    """
    frame = frame[(frame["scored"] == "test") & finished(frame)]
    rows = pd.concat([_values(frame, scale), pd.DataFrame(list(_claims(frame)))])
    return rows.reindex(columns=BOARD).replace([np.inf, -np.inf], np.nan).round(dict.fromkeys(BOARD, 2)).reset_index(drop=True)


def finished(frame: pd.DataFrame) -> pd.Series:
    """Which rows are of runs that are evaluated at their last epoch: no claim is decided on the way."""
    return frame.groupby("run_key")["epoch"].transform("max") >= frame["of"]


def _values(frame: pd.DataFrame, scale: str) -> pd.DataFrame:
    last = _last(_plain(frame))
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


def _claims(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for c in pd.read_csv(Path(__file__).with_name("claims.csv")).itertuples():
        for case, differences in CLAIMS[c.name](frame) if c.name in CLAIMS else _scenarios(frame, c.sides):
            if len(differences):
                mean, low, high = interval(differences)
                limits = (-c.margin, c.margin) if c.margin > 0 else (0.0, np.inf)
                yield {"paper": c.paper, "source": c.source, "statement": c.claim, "case": case, "n": len(differences),
                       "difference": mean, "low": low, "high": high, "verdict": verdict(differences, *limits)}


def sides(frame: pd.DataFrame, query: str) -> pd.Series:
    """"better > worse", two queries of the evaluations: the least of one side's runs less the greatest of the other's, by
    seed; of one run the mean of the rows asked for, which are its classes."""
    keys = ["seed", "data", "method", "augment"]
    better, worse = (frame.query(q).groupby(keys)["accuracy"].mean().groupby("seed") for q in query.split(" > "))
    return (better.min() - worse.max()).dropna()


def _scenarios(frame: pd.DataFrame, query: str) -> Cases:
    """The student report's, with none of its confounds undone."""
    if "undone" in frame:
        frame = frame[frame["undone"] == ""]
        shown = dict.fromkeys(name for q in query.split(" > ") for name in frame.query(q)["display"])
        yield ", ".join(shown), sides(frame, query)


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
                yield _name(display, labels, m), paired(own, {"epoch": last}, {"epoch": first})


@claim("early")
def _early(frame: pd.DataFrame) -> Cases:
    found = list(_probed(frame))  # of their shares: semantic pairs are looked for among others
    for display, labels, part in found:
        if labels == min(share for _, share, _ in found):
            for m in SSL:
                first = {"method": m, "epoch": part[part["method"] == m]["epoch"].min()}
                yield _name(display, labels, m), paired(part, first, {"method": "supervised"})


@claim("supervised_full")
def _supervised_full(frame: pd.DataFrame) -> Cases:
    found = list(_probed(frame))  # of their shares: semantic pairs are looked for among others
    for display, labels, part in found:
        if labels == max(share for _, share, _ in found):
            for m in SSL:
                yield _name(display, labels, m), paired(_last(part), {"method": "supervised"}, {"method": m})


@claim("beats_parts")
def _beats_parts(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame):
        for m in SSL[1:]:
            yield _name(display, labels, f"against {m}"), paired(_last(part), {"method": "sidae"}, {"method": m})


@claim("stable_seeds")
def _stable_seeds(frame: pd.DataFrame) -> Cases:
    """Distances from the method's own mean over seeds, a Levene test by pairs."""
    for display, labels, part in _probed(frame):
        own = {m: p.set_index("seed")["accuracy"] for m, p in _last(part).groupby("method")}
        if all(len(own.get(m, ())) > 1 for m in SSL[:2]):
            gap = {m: (own[m] - own[m].mean()).abs() for m in SSL[:2]}
            yield _name(display, labels), (gap["simsiam"] - gap["sidae"]).dropna()


@claim("stable_epochs")
def _stable_epochs(frame: pd.DataFrame) -> Cases:
    """Standard deviation over the checkpoints of the second half of pre-training, seed by seed."""
    for display, labels, part in _probed(frame):
        late = part[part["epoch"] >= part["of"] / 2]
        spread = {m: p.groupby("seed")["accuracy"].std() for m, p in late.groupby("method") if m in SSL[:2]}
        if len(spread) == 2:
            yield _name(display, labels), (spread["simsiam"] - spread["sidae"]).dropna()


@claim("ae_beats_simsiam")
def _ae_beats_simsiam(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame):
        if "MNIST" in display or display == "digits":
            yield _name(display, labels), paired(_last(part), {"method": "dae"}, {"method": "simsiam"})


@claim("beats_supervised_mnist")
def _beats_supervised_mnist(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame):
        if "MNIST" in display or display == "digits":
            yield _name(display, labels), paired(_last(part), {"method": "sidae"}, {"method": "supervised"})


@claim("finetuned_beat_supervised")
def _finetuned(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame, "finetune"):
        for m in SSL:
            yield _name(display, labels, m), paired(_last(part), {"method": m}, {"method": "supervised"})


@claim("finetuned_sidae_best")
def _finetuned_best(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame, "finetune"):
        for m in SSL[1:]:
            yield _name(display, labels, f"against {m}"), paired(_last(part), {"method": "sidae"}, {"method": m})


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
        for m in SSL[:2]:
            yield _name(f"{pretrain} to {display}", labels, m), paired(_last(part), {"method": m}, {"method": "supervised_own"})


@claim("transfer_close")
def _transfer_close(frame: pd.DataFrame) -> Cases:
    for pretrain, display, labels, part in _transferred(frame):
        yield _name(f"{pretrain} to {display}", labels), paired(_last(part), {"method": "sidae"}, {"method": "sidae_own"})


def _sweep(frame: pd.DataFrame) -> Iterator[tuple[str, float, pd.DataFrame]]:
    """Accuracy by (seed, w) where more than one w inside (0, 1) was run, the ends from the autoencoder and SimSiam."""
    own = _last(frame[(frame["kind"] == "linear") & (frame["pretrain"] == frame["display"])
                      & frame["method"].isin(SSL) & (frame["target"] == "standardised, mean")])
    w = own["w"].where(own["method"] == "sidae", (own["method"] == "simsiam").astype(float))
    for (display, labels), part in own.assign(w=w).groupby(["display", "labels"], sort=False):
        grid = part.pivot_table(index="seed", columns="w", values="accuracy").dropna()
        if {0.0, 1.0} <= set(grid) and len(grid.columns) > 3:
            yield display, labels, grid


@claim("both_needed")
def _both_needed(frame: pd.DataFrame) -> Cases:
    """The best mean inside (0, 1) against each end: optimistic for the inside, whose best is picked by the same numbers."""
    for display, labels, grid in _sweep(frame):
        best = grid.drop(columns=[0.0, 1.0]).mean().idxmax()
        for end, name in ((0.0, "the autoencoder"), (1.0, "SimSiam")):
            yield _name(display, labels, f"w = {best:g} against {name}"), grid[best] - grid[end]


@claim("siamese_matters_more")
def _siamese_matters_more(frame: pd.DataFrame) -> Cases:
    for display, labels, part in _probed(frame):
        yield _name(display, labels), paired(_last(part), {"method": "simsiam"}, {"method": "dae"})


@claim("w_alike")
def _w_alike(frame: pd.DataFrame) -> Cases:
    """What an end of w costs against 0.5, with scarce less with many labels."""
    grids = {(display, labels): grid for display, labels, grid in _sweep(frame)}
    shares = sorted({labels for _, labels in grids})
    for display in dict.fromkeys(d for d, _ in grids):
        if len(shares) == 2 and all((display, share) in grids for share in shares):
            few, many = (grids[display, share] for share in shares)
            for end in (0.0, 1.0):
                yield f"{display}, w = {end:g} against 0.5", ((few[end] - few[0.5]) - (many[end] - many[0.5])).dropna()


@claim("loses_more")
def _loses_more(frame: pd.DataFrame) -> Cases:
    """What the supervised network loses from many to scarce labels, less what a pre-trained one loses."""
    for display, part in _last(frame).groupby("display", sort=False):
        rows = pd.concat([part[:0], *(p for _, _, p in _probed(part))])
        if len(shares := sorted(set(rows["labels"]))) == 2:
            loss = {m: paired(rows, {"method": m, "labels": shares[1]}, {"method": m, "labels": shares[0]})
                    for m in ("supervised", *SSL)}
            for m in SSL:
                yield f"{display}, {m}", (loss["supervised"] - loss[m]).dropna()


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
                yield _name(display, labels, f"{axis}, against {m}"), (other - spread["yadim", axis]).dropna()


@claim("special_cases")
def _special_cases(frame: pd.DataFrame) -> Cases:
    """A method's accuracy less that of the one made of its five choices."""
    made = {"simclr": "extract: vector", "amdim": "augment: amdim; encode: amdim", "yadim": "^$"}
    for (display, labels), part in frame[frame["kind"] == "logistic"].groupby(["display", "labels"], sort=False):
        for m, varied in made.items():
            same = part[(part["method"] == "composed") & part["varied"].str.contains(varied)]
            own = part[(part["method"] == m) & (part["varied"] == "")]
            yield _name(display, labels, m), paired(pd.concat([own, same]), {"method": m}, {"method": "composed"})


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
            yield f"{case}, epoch {epoch}", paired(part, mined | {"epoch": epoch}, none | {"epoch": epoch})


@claim("half_the_epochs")
def _half_the_epochs(frame: pd.DataFrame) -> Cases:
    for case, part, mined, none in _pairs(frame, "mined"):
        if half := max((e for e in part["epoch"] if 2 * e <= part["of"].max()), default=0):
            yield f"{case}, epoch {half}", paired(part, mined | {"epoch": half}, none | {"epoch": part["of"].max()})


@claim("random_add_nothing")
def _random_add_nothing(frame: pd.DataFrame) -> Cases:
    for case, part, random, none in _pairs(frame, "random"):
        yield case, paired(_last(part), random, none)


@claim("originals_and_training")
def _originals_and_training(frame: pd.DataFrame) -> Cases:
    own = frame[(frame["kind"] == "pairs") & (frame["method"] == "moco_v2") & (frame["pretrain"] == frame["display"])]
    for (display, views), part in own[own["input"] != "none"].groupby(["display", "input"], sort=False):
        plain, K = _last(own)[_last(own)["input"] == "none"], part["n_train"]
        both = pd.concat([part[part["epoch"] == 0], plain[plain["n_train"].isin(K)]])
        yield display, paired(both, {"input": "none"}, {"input": views})
