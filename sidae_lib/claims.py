"""The papers' numbers and claims as data, and what our records say to each.

`published.csv` holds every number with its source. `claims.csv` holds every claim in words, with the figure
whose evaluations it reads, and how:

- rows: which evaluations count: a query of the columns of `frames.evaluations` and `_read`
- sides: "better > worse": which of them should have the higher accuracy, and which the lower
- case: the name of a comparison. The claim is tested for each value of the columns in braces: {display} is
  the same on both sides, {worse.method} is of one side. Both sides have the same share of labels.
- measure: what is compared where it is not accuracy: a function below
- margin: how far apart the sides may be where the claim is that they are alike
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import pandas as pd

from . import frames
from .differences import SEEDS, Difference, between, by_seed, difference, holm, where

PROBE = "frozen, linear SGD 50 epochs"  # the protocol of Table 1, which kind linear repeats
TABLE = "datasets_table"  # the figure whose evaluations stand beside the published numbers
NAMES = {"value": "published", "se": "published_se", "pretrain_data": "pretrain_name"}  # beside ours
VERDICTS = ("supported", "contradicted", "undecided")
FEW = "undecided (fewer than three seeds)"  # of a claim
BOARD = ["paper", "source", "statement", "claim verdict", "case", "n", "ours", "se", "published",
         "published_se", "difference", "low", "high", "z", "p", "verdict", "after Holm",
         "would decide", "scale"]  # fmt: skip


def table(**by: str | float) -> pd.DataFrame:
    """Rows of published.csv, filtered by column. labels: share in (0, 1]; value and se in percent."""
    return where(pd.read_csv(Path(__file__).with_name("published.csv")), by)


def beside_published(summary: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint by the SGD probe, from `frames.summary`, with the number of Table 1 for the same
    pre-training set, set and share of labels."""
    last = summary[(summary["epoch"] == summary["of"]) & summary["kind"].isin(["linear", "classifier"])]
    by = ["pretrain_name", "data", "method", "labels"]
    paper = table(source="Table 1", protocol=PROBE).rename(columns=NAMES | {"epochs": "published_epochs"})
    out = last.merge(paper[[*by, "published", "published_se", "published_epochs"]], on=by, how="left")
    out["ours"] = [frames.mean_se(*pair) for pair in zip(out["mean"], out["se"])]
    out["paper"] = [frames.mean_se(*pair) for pair in zip(out["published"], out["published_se"])]
    ratio = out["mean"] / out["published"]
    return out.assign(**{"ours / paper": ratio.map("{:.2f}".format).where(ratio.notna(), "")})


# --- the scoreboard -----------------------------------------------------------------------------------------


def scoreboard(records: Mapping[str, Sequence[dict[str, Any]]], scale: str) -> pd.DataFrame:
    """Every published number that our evaluations speak to, and every claim that they decide or leave open.

    records: figure -> the evaluation records that it asks for. They may be of several scales, the largest
    first; those that name no `scale` are of this one. For each claim and set of images one scale is judged:
    the one with the most cases of three seeds, of equals the largest. (For transfer: for each pair of sets.)
    A claim reads the records of its figure alone, and an unfinished run only at its first checkpoint.

    A number has ours, n, se, published, difference and, where they can be compared, z = difference /
    sqrt(se^2 + published_se^2); its verdict says whether a copy of the data, such as re-compressed images,
    gave it. A claim has a row per case: the mean difference over seeds in points, positive as claimed, its
    95 % interval, p and the verdict of this case alone; its verdict after Holm's correction over the cases of
    the claim (family-wise 5 %); and what would decide it.
    """
    read = {figure: _scales(frames.evaluations(found), scale) for figure, found in records.items() if found}
    claimed = pd.read_csv(Path(__file__).with_name("claims.csv"), keep_default_na=False)
    claimed = claimed[claimed["figure"].isin(read)]
    rows = []
    for _, claim in claimed.groupby("claim", sort=False):
        rows += _judged(list(claim.itertuples()), read)
    numbers = _numbers(read[TABLE]) if TABLE in read else pd.DataFrame()
    out = pd.concat([numbers, pd.DataFrame(rows)]).reindex(columns=BOARD).replace([np.inf, -np.inf], np.nan)
    return out.round(dict.fromkeys(BOARD, 2) | {"p": 4}).reset_index(drop=True)


def claims(board: pd.DataFrame) -> pd.DataFrame:
    """A row per claim of a `scoreboard`: its verdict as a whole, its cases, those of three seeds (tested),
    how many of these have each verdict when judged alone, and how many chance would decide."""
    rows = []
    for about, cases in board[board["published"].isna()].groupby(BOARD[:3], sort=False):
        tested = cases[cases["n"] >= SEEDS]
        alone = [(tested["verdict"] == verdict).sum() for verdict in VERDICTS]
        whole = cases["claim verdict"].iloc[0]
        rows.append((*about, whole, len(cases), len(tested), *alone, round(0.05 * len(tested), 2)))
    return pd.DataFrame(rows, columns=[*BOARD[:3], "verdict", "cases", "tested", *VERDICTS, "by chance"])


def verdict(board: pd.DataFrame) -> str:
    """What became of the claims of a `scoreboard`, as a list in Markdown, with the number of decided cases where
    not all are. Cases below three seeds do not count."""
    said: dict[str, list[str]] = {}
    for c in claims(board).to_dict("records"):
        what, of = parted(c["verdict"])
        said.setdefault(what, []).append(re.sub(r" \([^)]*\)$", "", c["statement"]) + f" ({of})" * bool(of))
    order = (word + part for word in (*VERDICTS, "mixed") for part in ("", " in part"))
    return "\n".join(f"- **{what.capitalize()}**: {'; '.join(said[what])}." for what in order if what in said)


def parted(verdict: str) -> tuple[str, str]:
    """The kind of a claim's or a case's verdict, and in how many cases: "supported in 2 of 9 cases" is "supported
    in part", "2 of 9"; "mixed: 1 for, 3 against, of 9" is "mixed", "1 for, 3 against"; of others the second is empty."""
    if verdict.startswith("mixed: "):
        return "mixed", verdict.removeprefix("mixed: ").partition(", of ")[0]
    what, _, of = re.sub(r"\(.*", "", verdict).strip().partition(" in ")
    return f"{what} in part" if of else what, of.removesuffix(" cases")


def _scales(frame: pd.DataFrame, scale: str) -> dict[str, pd.DataFrame]:
    """Scale -> what claims read of it; rows that name no scale are of `scale`."""
    named = frame.assign(scale=frame["scale"].replace("", scale))
    return {name: _read(part) for name, part in named.groupby("scale", sort=False)}


def _deciding(cases: Sequence[tuple[str, Any, int]]) -> np.ndarray:
    """Which of the cases (scale, image sets, n) are at the scale that decides for these sets: the one with the most cases
    of three seeds, of equals the first."""
    tested: dict[Any, dict[str, int]] = {}  # -> by scale, in how many cases
    for scale, sets, n in cases:
        by_scale = tested.setdefault(sets, {})
        by_scale[scale] = by_scale.get(scale, 0) + (n >= SEEDS)
    return np.array([scale == max(tested[sets], key=tested[sets].__getitem__) for scale, sets, _ in cases], dtype=bool)


def _judged(rows: Sequence[Any], read: Mapping[str, Mapping[str, pd.DataFrame]]) -> Iterator[dict[str, Any]]:
    """The cases of a claim, the rows of claims.csv with its words, each judged alone and all together."""
    c = rows[0]
    found = [(scale, *case) for scale, part in read[c.figure].items() for row in rows for case in compared(row, part)]
    deciding = _deciding([(scale, sets, len(d)) for scale, sets, _, d in found])
    cases = [(scale, case, d) for (scale, _, case, d), counts in zip(found, deciding) if counts]
    limits = (-c.margin, c.margin) if c.margin > 0 else (0.0, np.inf)
    tested = [k for k, (*_, d) in enumerate(cases) if len(d) >= SEEDS]
    p = [cases[k][2].p(*limits) for k in tested]
    alone = [d.verdict(*limits) for *_, d in cases]
    corrected = {k: alone[k] if rejected else "undecided" for k, rejected in zip(tested, holm(p))}
    whole = _as_one(list(corrected.values()))
    for k, (scale, case, d) in enumerate(cases):
        mean, low, high = d.interval()
        yield {"paper": c.paper, "source": c.source, "statement": c.claim, "claim verdict": whole,
               "case": case, "n": len(d), "difference": mean, "low": low, "high": high,
               "p": dict(zip(tested, p)).get(k, np.nan), "verdict": alone[k],
               "after Holm": corrected.get(k, alone[k]), "would decide": d.would_decide(*limits),
               "scale": scale}  # fmt: skip


def _as_one(verdicts: Sequence[str]) -> str:
    """The verdict of a claim, from those of its tested cases after Holm's correction."""
    yes, no = (verdicts.count(v) for v in VERDICTS[:2])
    if not verdicts:
        return FEW
    if yes and no:
        return f"mixed: {yes} for, {no} against, of {len(verdicts)}"
    if not yes and not no:
        return "undecided"
    verdict = "supported" if yes else "contradicted"
    return verdict if yes + no == len(verdicts) else f"{verdict} in {yes + no} of {len(verdicts)} cases"


def compared(claim: Any, frame: pd.DataFrame) -> Iterator[tuple[frozenset[str], str, Difference]]:
    """(image sets, case, difference) of each comparison that a row of claims.csv asks for, positive as claimed."""
    rows = MEASURES[claim.measure](frame)
    if claim.rows:
        rows = rows.query(claim.rows)
    if rows.empty:
        return
    better, worse = (rows.query(side, engine="python") for side in claim.sides.split(" > "))
    named = [field for _, field, _, _ in Formatter().parse(claim.case) if field]
    shared = ["labels", *(field for field in named if "." not in field)]
    of_better, of_worse = ([f.removeprefix(side) for f in named if f.startswith(side)]
                           for side in ("better.", "worse."))  # fmt: skip
    for key, one in better.groupby(shared + of_better, sort=False):
        for other_key, other in worse.groupby(shared + of_worse, sort=False):
            if key[: len(shared)] == other_key[: len(shared)]:
                first, d = one.iloc[0], between(_extreme(one, "idxmin"), _extreme(other, "idxmax"))
                if len(d):
                    second = other.iloc[0]
                    sets = frozenset(side[k] for side in (first, second) for k in ("pretrain", "display") if k in side)
                    yield sets, claim.case.format(**first, better=first, worse=second), d


def _extreme(rows: pd.DataFrame, pick: str) -> pd.DataFrame:
    """Of several methods or augmentations the rows, by seed, with the least or the greatest accuracy."""
    groups = rows.groupby(["method", "augment"])
    if groups.ngroups == 1:
        return rows
    chosen = getattr(pd.DataFrame({key: by_seed(part)["accuracy"] for key, part in groups}), pick)(axis=1)
    return rows[[chosen[r.seed] == (r.method, r.augment) for r in rows.itertuples()]]


def _numbers(read: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Our means beside the published numbers of the same probe."""
    by = ["method", "pretrain_name", "data", "display", "labels", "scale"]
    last = pd.concat([_plain(part).query("last and kind == 'linear'") for part in read.values()])
    ours = last.groupby(by, sort=False)["accuracy"].agg(ours="mean", se="sem", n="count").reset_index()
    paper = table(protocol=PROBE).rename(columns=NAMES)
    out = ours.merge(paper, on=["method", "pretrain_name", "data", "labels"])
    out = out[_deciding([(r.scale, (r.pretrain_name, r.display), r.n) for r in out.itertuples()])]
    out["difference"] = out["ours"] - out["published"]
    out["z"] = out["difference"] / np.hypot(out["se"], out["published_se"].fillna(0))
    out["verdict"] = [_beside(r) for r in out.itertuples()]
    out["z"] = [np.nan if v.startswith("not") else z for z, v in zip(out["z"], out["verdict"])]
    out["statement"] = out["method"]
    out["case"] = [f"{r.display}, {frames.percent(r.labels)}"
                   + f", from {r.pretrain_name}" * (r.pretrain_name != r.data) for r in out.itertuples()]
    return out


def _beside(row: Any) -> str:
    """The verdict on a number, or why there is none."""
    if isinstance(row.note, str) and row.note.startswith("suspect"):
        return "not comparable: suspect cell"
    if row.scale != "paper":
        return f"not comparable: {row.scale} scale"
    verdict = "above" if row.z > 0 else "below"
    if row.n < SEEDS or not abs(row.z) < np.inf:
        verdict = f"undecided (n = {row.n})"
    elif abs(row.z) <= 2:
        verdict = "agrees"
    return verdict + ", data copy" * ("copy" in row.display)


# --- what is compared ---------------------------------------------------------------------------------------

SERIES = ["display", "pretrain", "labels", "kind", "scored", "method", "pairs", "w", "target", "augment"]


def _read(frame: pd.DataFrame) -> pd.DataFrame:
    """`frames.evaluations` of finished runs and of the first checkpoint of others, with the columns that
    claims.csv speaks of beside theirs:

    share: of the labels, in words; many, scarce: it is the largest, the least.  own: pre-trained on the set
    that is classified.  probe: by the SGD probe, or the supervised network itself.  pretrained: by one of the
    paper's three methods.  last, first: the checkpoint of the last epoch, the first one.  half: the last
    checkpoint in the first half of training.  method: without its pairs; pairs: none, mined, random, ...
    """
    lacking = {"metric": None, "channels": None, "undone": None}
    frame = frame.assign(**{c: value for c, value in lacking.items() if c not in frame})
    names = frame["method"].str.extract(r"^(\w+)(?: \+ \d+ (\w+))?$")
    labels, epoch, of = frame["labels"], frame["epoch"], frame["of"]
    frame = frame.assign(method=names[0], pairs=names[1].fillna("none"), list=frame["method"],
                         share=labels.map(frames.percent), many=labels == labels.max(),
                         scarce=labels == labels.min(), own=frame["pretrain"] == frame["display"],
                         last=epoch == of, probe=frame["kind"].isin(["linear", "classifier"]),
                         pretrained=names[0].isin(["sidae", "simsiam", "dae"]))  # fmt: skip
    series = frame.assign(until_half=epoch.where(2 * epoch <= of)).groupby(SERIES, sort=False)
    frame["first"] = epoch == series["epoch"].transform("min")
    finished = frame.groupby("run_key")["epoch"].transform("max") >= of
    frame["half"] = (epoch == series["until_half"].transform("max")) & (epoch > 0)
    frame = frame[finished | frame["first"]]
    lists = frame.groupby(["display", "pretrain", "labels", "method", "pairs"])["list"]
    return frame[frame["list"] == lists.transform("first")]  # pairs of other numbers of images are no claim's


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracies on test images, without the sweep's other methods by w or by the scale of the targets, and
    without the supervised network that sees augmented images."""
    return frame.query("scored == 'test' and w == 0.5 and target == 'standardised, mean' and "
                       "(method != 'supervised' or augment == 'none')")  # fmt: skip


def _distance(frame: pd.DataFrame) -> pd.DataFrame:
    """From the method's own mean over seeds: compared by pairs, a Levene test. The test images are taken as
    given: what they do to all seeds alike cancels."""
    last = _plain(frame).query("last")
    seeds = last.groupby(SERIES)["accuracy"]
    apart = (last["accuracy"] - seeds.transform("mean")).abs()
    return last.assign(accuracy=apart, error=0.0, right="")[seeds.transform("count") > 1]


def _late_spread(frame: pd.DataFrame) -> pd.DataFrame:
    """Standard deviation over the second half of the checkpoints, by seed; test images taken as given."""
    late = _plain(frame).query("epoch >= of / 2")
    spread = late.groupby([*SERIES, "seed"])["accuracy"].transform("std")
    return late.assign(accuracy=spread, error=0.0, right="").query("last")


def _sweep(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a sweep of more than one w inside (0, 1), of the seeds that have every w. Its ends, w = 0
    and w = 1, are the autoencoder and SimSiam."""
    own = frame.query("own and last and kind == 'linear' and pretrained and target == 'standardised, mean'")
    own = own.assign(w=own["method"].map({"dae": 0.0, "simsiam": 1.0}).fillna(own["w"]),
                     end=own["method"].map({"dae": "the autoencoder", "simsiam": "SimSiam"}))  # fmt: skip
    by = ["scored", "display", "labels"]
    tried = own.groupby(by)["w"].transform("nunique")
    return own[(tried > 3) & (own.groupby([*by, "seed"])["w"].transform("nunique") == tried)]


def _chosen_w(frame: pd.DataFrame) -> pd.DataFrame:
    """SidAE at the w inside (0, 1) that is best on validation images, and both ends, all on test images."""
    swept, by = _sweep(frame), ["display", "labels"]
    inside = swept.query("scored == 'val' and 0 < w < 1")
    means = inside.groupby([*by, "w"], as_index=False)["accuracy"].mean()
    best = means.sort_values("accuracy", ascending=False, kind="stable").drop_duplicates(by)
    tested = swept.query("scored == 'test'").merge(best[[*by, "w"]].rename(columns={"w": "best"}), on=by)
    tested = tested.assign(chosen=tested["w"] == tested["best"])
    tested = tested.sort_values("labels", ascending=False, kind="stable")
    return tested[tested["chosen"] | tested["end"].notna()]


def _rows(d: Difference, **columns: Any) -> pd.DataFrame:
    """A difference as rows that can be compared again; no share of labels is theirs."""
    same = {"labels": 0.0, "error": d.images, "right": "", "run_key": "", "method": "", "augment": ""}
    return pd.DataFrame({"seed": d.seeds.index, "accuracy": d.seeds.array}).assign(**same | columns)


def _differences(frame: pd.DataFrame, by: list[str], one: dict, other: dict) -> pd.DataFrame:
    """The `difference` of each group as rows."""
    groups = frame.groupby(by, sort=False)
    rows = [_rows(difference(part, one, other), **dict(zip(by, key))) for key, part in groups]
    return pd.concat([pd.DataFrame(), *rows])


def _end_costs(frame: pd.DataFrame) -> pd.DataFrame:
    """What an end of w costs against w = 0.5, with scarce and with many labels."""
    swept = _sweep(frame).query("scored == 'test' and many != scarce")
    ends = [_differences(swept, ["display", "scarce"], {"w": w}, {"w": 0.5}).assign(w=w) for w in (0.0, 1.0)]
    return pd.concat(ends)


def _lost(frame: pd.DataFrame) -> pd.DataFrame:
    """What a method loses from many to scarce labels."""
    last = _plain(frame).query("own and probe and last and many != scarce")
    return _differences(last, ["display", "method"], {"many": True}, {"scarce": True})


def choices(frame: pd.DataFrame, method: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """(axis, rows) of a method: its own choice (`own`), and those that depart from it on this axis alone."""
    named = [method, "composed"] if method == "yadim" else [method]
    rows = frame[frame["method"].isin(named) & ~frame["varied"].str.contains(";")]
    rows = rows[(rows["method"] == method) | (rows["varied"] != "")]
    parts = rows["varied"].str.extract("^(?P<axis>[^:]*):? ?(?P<choice>.*)$")
    axes, names = parts["axis"], parts["choice"]
    for axis in dict.fromkeys(axes[axes != ""]):
        yield axis, rows.assign(choice=names, own=axes == "")[axes.isin([axis, ""])]


def _choice_spread(frame: pd.DataFrame) -> pd.DataFrame:
    """Best less worst choice of an axis of AMDIM, CPC and YADIM, by seed."""
    found = [pd.DataFrame()]
    for (display, share), part in frame.query("last and kind == 'logistic'").groupby(["display", "share"], sort=False):
        images = (2 * (part["error"] ** 2).mean()) ** 0.5  # of two accuracies, each on test images of its own
        for method in ("yadim", "amdim", "cpc_v2"):
            for axis, rows in choices(part, method):
                wide = rows.pivot_table(index="seed", columns="choice", values="accuracy").dropna()
                spread = Difference(wide.max(axis=1) - wide.min(axis=1), images)
                found.append(_rows(spread, display=display, share=share, axis=axis, method=method))
    return pd.concat(found)


MEASURES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "": _plain,
    "distance from the mean over seeds": _distance,
    "spread over late epochs": _late_spread,
    "w chosen on validation images": _chosen_w,
    "cost of an end of w": _end_costs,
    "lost with scarce labels": _lost,
    "spread over choices": _choice_spread,
}
