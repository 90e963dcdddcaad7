"""Records to tidy tables, which figures draw and notebooks print. Accuracies are in percent."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from . import data, differences, evaluate, methods
from .config import EvalConfig, RunConfig, SidaeError
from .methods.metric import undone

Records = Sequence[dict[str, Any]]
PROBES = {"linear": "SGD probe", "logistic": "logistic regression", "knn": "kNN", "finetune": "fine-tuned"}
OF_ONE_RUN = ("seed", "accuracy", "run_key", "hardware", "error", "right", "repeats", "own")  # of no mean
PLAIN = "standardised, mean"  # the paper's target of the reconstruction


def hardware(provenance: Mapping[str, Any]) -> str:
    """The machine of a record, for tables and stamps."""
    return f"{provenance['device']}, {provenance['threads']} thread{'s' * (provenance['threads'] > 1)}"


def distinct(names: Iterable[str]) -> str:
    """What rows made into one were computed on: every machine once."""
    return "; ".join(sorted(set(names)))


def evaluations(records: Records) -> pd.DataFrame:
    """One row per evaluation, of a report one per metric: what was trained, what was measured, on what.

    name: the method's, as figures show it.  level: it is no point of a curve, as of the untrained network.
    scale, own: of records that `recorded.fetch` gave.
    error: the standard error that the choice of the test images gives, in points (binomial; of mined pairs
    from their own interval).  right: which images were right in how many of the `repeats`, if known.
    Raises SidaeError where there are no records.
    """
    if not records:
        raise SidaeError("No evaluation on record fits what you chose; choose other seeds, image sets or protocols, or a "
                         "scale that computes them.")
    rows, runs = [], {}  # a run is evaluated many times, and its config takes long to check
    for r in records:
        if r["run_key"] not in runs:
            runs[r["run_key"]] = RunConfig.from_dict(r["config"]["run"])
        run, report = runs[r["run_key"]], r["kind"] == "report"
        ask = EvalConfig.create(**r["config"] | {"run": run})
        pairs = f" + {run.pair_count} {run.pairs}" if run.pairs != "none" else ""
        fitted = f", {ask.fit_epochs} epochs" if ask.fit_epochs in (30, 60) else ""  # SePP-ID's
        row = {
            "data": r["data"]["name"], "display": r["data"]["display"], "pretrain": data.display(run.data),
            "pretrain_name": data.KNOWN.get(run.data, (run.data,))[0], "method": run.method + pairs,
            "input": ask.augment, "varied": "; ".join(f"{k}: {v}" for k, v in methods.varied(run).items()),
            "w": run.w, "augment": run.augment, "target": f"{run.target}, {run.recon}", "seed": run.seed,
            "epoch": r["epoch"], "of": run.epochs, "scored": ask.score_on, "kind": r["kind"] + fitted,
            "C": ask.C, "labels": ask.labels, "n_train": r["n_train"], "accuracy": np.nan,
            "hardware": hardware(r["provenance"]), "run_key": r["run_key"], "error": np.nan,
            "scale": r.get("scale", ""), "name": variant(run.method, run.w, run.augment) + pairs,
            "level": r["kind"] == "classifier" or not run.epochs, "own": r.get("own", False),
            "right": r.get("right", ""), "repeats": ask.repeats,
        }
        measured = [("accuracy", r["accuracy"], r["n_test"])]
        if report:
            row |= {"metric": "", "channels": run.channels, "undone": undone(run)}
            row["right"] = ""  # its test images are in an order of their own
            row["method"] = run.method if ask.features == "backbone" else ask.features
            classes = [name.split(" - ")[0] for name in r["classes"]]  # MNIST calls one "8 - eight"
            measured += [("top3", r["top3"], r["n_test"]), ("knn", r["knn"], r["n_test"]),
                         *zip(classes, r["per_class"], evaluate.confusion(r).sum(1).tolist())]
        for metric, value, n in measured:
            value = np.nan if value is None else value
            row |= {"accuracy": value, "error": (value * (100 - value) / max(n, 1)) ** 0.5}
            if r["kind"] == "pairs":
                row["error"] = float(np.ptp(r["pairs"]["interval"])) / 2 / 1.96
            rows.append(row | ({"metric": metric} if report else {}))
    return pd.DataFrame(rows)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, n, and the standard error sd / sqrt(n) with n - 1 (empty for one seed)."""
    by = [c for c in frame.columns if c not in OF_ONE_RUN]
    means = {"mean": ("accuracy", "mean"), "se": ("accuracy", "sem"), "n": ("accuracy", "count")}
    out = frame.groupby(by, sort=False, as_index=False).agg(**means, hardware=("hardware", distinct))
    return out.round({"mean": 4, "se": 4})


def found(records: Records) -> str:
    """What an experiment found, in a sentence: SidAE beside the untrained network by the paper's probe, scarce
    labels, last epoch. Empty where a record of either is missing."""
    frame = evaluations(records) if records else pd.DataFrame()
    if frame.empty:
        return ""
    probed = frame[(frame["kind"] == "linear") & (frame["epoch"] == frame["of"]) & (frame["scored"] == "test")]
    first = probed[probed["data"] == probed["data"].iloc[0]] if len(probed) else probed
    by = summary(first[first["labels"] == first["labels"].min()]).groupby("method").first()
    if not {"sidae", "untrained"} <= {*by.index}:
        return ""
    said = [f"{methods.NAMES[m] if m == 'sidae' else m} {by['mean'][m]:.1f} %" for m in ("sidae", "untrained")]
    n, row = by["n"]["sidae"], by.loc["sidae"]
    return (f"{', '.join(said)} of {row['display']} with {percent(row['labels'])} of the labels, "
            f"{n} seed{'s' * int(n > 1)}")


def below(records: Records, runs: Records) -> list[str]:
    """Which methods lie below the untrained network after the last epoch, in sentences that say by which probe
    and what speaks for which cause: the scale of the features, or collapse.  runs: their records."""
    frame, out = evaluations(records) if records else pd.DataFrame(), []
    gauges: dict[tuple[str, str], list[float]] = {}
    for r in runs:
        if r.get("epochs") and "z_std" in r["epochs"][-1]:
            share = r["epochs"][-1]["z_std"] * RunConfig.from_dict(r["config"]).dim ** 0.5
            gauges.setdefault((r["data"]["display"], r["config"]["method"]), []).append(share)
    ends = summary(frame[(frame["epoch"] == frame["of"]) & (frame["scored"] == "test")]) if len(frame) else frame
    for (display, labels), part in ends.groupby(["display", "labels"], sort=False) if len(ends) else ():
        wide = part[(part["w"] == 0.5) & (part["pretrain"] == display)].pivot_table("mean", "method", "kind")
        probed = [k for k in PROBES if k in wide and "untrained" in wide[k].dropna()]
        for m in (m for m in wide.index if m in methods.MARKERS):
            low = [k for k in probed if wide[k][m] < wide[k]["untrained"]]
            if not low:
                continue
            said = (f"{methods.NAMES[m]} lies below the untrained network on {display} with {percent(labels)} of the "
                    f"labels, by {', '.join(PROBES[k] for k in low)}.")
            if "linear" in low and "logistic" in probed and "logistic" not in low:
                said += (" By logistic regression, which standardises the features, it does not: they are small, and "
                         "the SGD probe has one fixed learning rate.")
            if share := gauges.get((display, m)):
                said += f" Spread of its projections, z_std: {np.mean(share):.2f} of the healthy value (0: collapsed)."
            out.append(said)
    return out


def variant(method: str, w: float = 0.5, augment: str = "none", target: str = PLAIN) -> str:
    """A method's name, with its w and target where they are not the paper's; supervised says if augmented."""
    words = [methods.NAMES.get(method, method), "augmented" * (method == "supervised" and augment != "none"),
             f"w = {w:g}" * (method == "sidae" and w != 0.5), target * (target != PLAIN)]
    return ", ".join(filter(None, words))


def probes(table: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint of a `summary` by all probes, a row per `variant`, set and share of labels."""
    last = table[table["epoch"] == table["of"]]
    names = [variant(*row) for row in last[["method", "w", "augment", "target"]].to_numpy()]
    by = ["display", "labels", "method"]
    return last.assign(method=names).pivot_table("mean", by, "kind", sort=False).round(1)


def gains(cases: Mapping[str, Records]) -> pd.DataFrame:
    """What each change of `experiments.hypotheses` does: a row per change, share of labels and method that the
    change concerns, with the accuracy minus that without it, paired by seed; half: `Difference.bar`."""
    if not cases.get("none"):
        return pd.DataFrame()
    rows, plain = [], evaluations(cases["none"])
    unchanged = {*plain["run_key"]}
    for change, records in cases.items():
        other = [r for r in records if r["run_key"] not in unchanged]
        for (share, method), part in evaluations(other).groupby(["labels", "method"], sort=False) if other else ():
            gain = differences.between(part, differences.where(plain, {"labels": share, "method": method}))
            if len(gain):
                rows.append({"display": part["display"].iloc[0], "labels": share, "change": change, "method": method,
                             "gain": gain.mean, "half": gain.bar(), "n": len(gain),
                             "hardware": distinct(part["hardware"])})
    return pd.DataFrame(rows).round(2)


def order(cases: Mapping[str, Records]) -> pd.DataFrame:
    """Mean accuracies per change of `experiments.hypotheses` and share of labels, and SidAE minus the better
    of the others, paired by seed, with its 95 % interval; of changes that every method has. half: `Difference.bar`."""
    rows, every = [], {r["config"]["run"]["method"] for each in cases.values() for r in each}
    for change, records in cases.items():
        for share, part in evaluations(records).groupby("labels", sort=False) if records else ():
            if {*part["method"]} != every:
                continue
            wide = part.pivot_table("accuracy", "seed", "method").dropna()
            better = wide.drop(columns="sidae").max(axis=1)
            lead = differences.Difference(wide["sidae"] - better, 2**0.5 * part["error"].mean())
            interval = dict(zip(("lead", "low", "high"), lead.interval()))
            rows.append({"display": part["display"].iloc[0], "labels": share, "change": change, **wide.mean(),
                         "n": len(lead), **interval, "half": lead.bar(), "SidAE leads": lead.verdict(),
                         "hardware": distinct(part["hardware"])})
    return pd.DataFrame(rows).round(2)


def by_validation(table: pd.DataFrame, option: str, by: Sequence[str] = ("labels",)) -> pd.DataFrame:
    """What a choice by the validation split gives on test, from `summary`, a row per group: the value of the
    column `option` that is best on validation, its means and its rank on test, and what is best there."""
    rows = []
    for key, part in table.groupby(list(by), sort=False):
        val, test = (part[part["scored"] == on].set_index(option) for on in ("val", "test"))
        chosen, best = val["mean"].idxmax(), test["mean"].idxmax()
        own = test.loc[chosen]
        rank = f"{(test['mean'] > own['mean']).sum() + 1} of {len(test)}"
        rows.append({**dict(zip(by, key)), "chosen": chosen, "validation": val["mean"][chosen],
                     "test": own["mean"], "se": own["se"], "n": own["n"], "rank": rank, "best": best,
                     "best_test": test["mean"][best]})
    return pd.DataFrame(rows)


def mean_se(mean: float, se: float) -> str:
    """64.75 (0.27); no standard error is a dash, no mean is empty."""
    return "" if np.isnan(mean) else f"{mean:.2f} ({'-' if np.isnan(se) else f'{se:.2f}'})"


def percent(share: float) -> str:
    """0.1 is "10 %"."""
    return f"{100 * share:g} %"


def told(d: differences.Difference) -> str:
    """In words: "+2.50 points (95 % interval +1.20 to +3.80, n = 3): above", "below" or "not told apart"; of fewer
    than three seeds "not judged"."""
    mean, low, high = d.interval()
    span = f"95 % interval {low:+.2f} to {high:+.2f}" if len(d) > 1 else "no interval from one seed"
    otherwise = "not told apart" if len(d) >= differences.SEEDS else "not judged, too few seeds"
    said = {"supported": "above", "contradicted": "below"}.get(d.verdict(), otherwise)
    return f"{mean:+.2f} points ({span}, n = {len(d)}): {said}"


def _with_pairs(records: Records) -> pd.DataFrame:
    """`evaluations` with kind and count of the pairs in training as columns of their own."""
    frame = evaluations(records)
    method, count, pairs = zip(*frame["method"].str.findall(r"^(\w+)(?: \+ (\d+) (\w+))?$").str[0])
    return frame.assign(method=method, pairs=[p or "none" for p in pairs], count=[int(n or 0) for n in count])


def pair_gains(records: Records, base: str = "none") -> pd.DataFrame:
    """Accuracy less that with the pairs `base` and else the same, in points: mean over n seeds, and its 95 %
    interval low to high over seeds, paired, and test images (infinite for one seed)."""
    frame, rows = _with_pairs(records), []
    by = ["display", "method", "kind", "labels", "of", "epoch", "pairs", "count"]
    for key, part in frame[frame["pairs"] != base].groupby(by, sort=False):
        same = differences.where(frame, dict(zip(by[:-2], key)) | {"pairs": base})
        if len(less := differences.between(part, same)):
            rows.append((*key, *less.interval(), len(less), distinct(part["hardware"])))
    return pd.DataFrame(rows, columns=[*by, "gain", "low", "high", "n", "hardware"])


def pair_table(pairs: Records, rivals: Records) -> pd.DataFrame:
    """How many pairs are right: of a list by the number of pairs taken, of MoCo v2's by epoch, and of what
    NNCLR and FNC found while they trained, by run records. Several seeds are one point, the mean with a 95 %
    interval; one seed has the interval of its list."""
    rows: list[dict[str, Any]] = []
    for r in (r for r in pairs if r["n_train"] == pairs[0]["n_train"]):
        c, part = EvalConfig.from_dict(r["config"]), r["pairs"]
        method, bare, viewed = c.run.method, c.epoch == 0, c.augment != "none"
        name = methods.NAMES[method] + ", untrained" * bare + ", augmented" * viewed
        shown = {"series": name + (f", {r['data']['display']}" if c.data else ""),
                 "colour": methods.COLOURS["untrained" if bare else method],
                 "line": ":" if viewed else "-." if c.data else "--" if bare else "-",
                 "panel": "pairs per image", "hardware": hardware(r["provenance"])}
        for p in part["curve"] if c.epoch in (0, c.run.epochs) else ():
            span = dict(zip(("low", "high"), p["interval"]))
            rows.append(shown | span | {"x": p["unordered"] / r["n_train"], "accuracy": p["accuracy"]})
        if method == "moco_v2" and not viewed and not c.data:
            span = dict(zip(("low", "high"), part["interval"]))
            shown |= {"panel": "epoch", "series": "mined by MoCo v2", "line": "-", **span}
            rows.append(shown | {"x": c.epoch, "colour": methods.COLOURS[method], "accuracy": r["accuracy"]})
    for r in rivals:
        name = r["config"]["method"]
        for e in r["epochs"]:
            share = e["nn_accuracy"] if name == "nnclr" else e["fn_right"] / (e["fn_found"] or np.nan)
            rows.append({"panel": "epoch", "series": f"{methods.NAMES[name]}, while training", "line": "--",
                         "x": e["epoch"], "accuracy": 100 * share, "colour": methods.COLOURS[name],
                         "hardware": hardware(r["provenance"])})
    points, by = [], ["panel", "series", "colour", "line", "x"]
    for key, own in pd.DataFrame(rows).groupby(by):
        alone = own[["accuracy", "low", "high"]].iloc[0]
        spread = alone if len(own) == 1 else differences.interval(own["accuracy"])
        points.append((*key, *spread, len(own), distinct(own["hardware"])))
    return pd.DataFrame(points, columns=[*by, "accuracy", "low", "high", "n", "hardware"])


def balance(records: Records) -> pd.DataFrame:
    """From run records of SidAE: both terms and the norms of their gradients at z, at the first and the last
    epoch that has them, mean over seeds; `share`: the siamese part of what w lets through."""
    rows = []
    for r in records:
        run, looks = RunConfig.from_dict(r["config"]), [h for h in r["epochs"] if "grad_si" in h]
        for when, h in zip(("first", "last"), looks[:1] + looks[-1:]):
            si, dae = run.w * h["grad_si"], (1 - run.w) * h["grad_dae"]
            terms = {k: h[k] for k in ("l_si", "l_dae", "grad_si", "grad_dae")}
            of = {"target": f"{run.target}, {run.recon}", "w": run.w, "when": when}
            rows.append(of | terms | {"share": si / (si + dae)})
    return pd.DataFrame(rows).groupby(["target", "w", "when"], sort=False).mean().round(4)


def points(records: Records) -> pd.DataFrame:
    """One row per point of the maps in `tsne` evaluation records, with each map's scores."""
    parts = []
    for r in records:
        run = RunConfig.from_dict(r["config"]["run"])
        for name in ("tsne", "pca"):
            (x, y), trust = np.array(r[name]["xy"]).round(3).T, r[name]["trustworthiness"]
            parts.append(pd.DataFrame({
                "method": run.method, "map": name, "x": x, "y": y, "label": r["labels"], "index": r["points"],
                "knn": r["accuracy"], "k": r["config"].get("k", 200),
                "trustworthiness": np.nan if trust is None else trust, "seed": run.seed,
                "data": r["data"]["name"], "n": 1, "hardware": hardware(r["provenance"]),
                "class": [r["classes"][label] for label in r["labels"]]}))
    return pd.concat(parts, ignore_index=True)


def untrained(table: pd.DataFrame) -> dict[str, float]:
    """Method -> mean accuracy in a `summary` of the untrained network that it starts from."""
    rows = table[table["method"] == "untrained"].set_index("varied")["mean"]
    return {m: rows.get(f"encode: {c.own['encode']}" if "extract" in c.own else "", np.nan)
            for m, c in methods.METHODS.items()}


def side_by_side(records: Records, costs: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Every method by its own choices: accuracies, that of its `untrained` network by logistic regression,
    z_std (1 / sqrt(D) is healthy, 0 collapsed), its `train.cost`, and seconds of training per 1,000 images.

    Seconds of two machines do not compare: these are of `timed_on`, which trained most of the runs, or empty.
    records: of runs and of evaluations.
    """
    table = summary(evaluations([r for r in records if "kind" in r]))
    bare = untrained(table[table["kind"] == "logistic"])
    table = table[(table["varied"] == "") & ~table["method"].isin(["composed", "untrained"])]
    by = ["method", "n", "hardware", "display"]
    wide = table.pivot_table("mean", by, "kind", sort=False).reset_index()
    runs = [r for r in records if r.get("epochs") and not methods.varied(RunConfig.from_dict(r["config"]))]
    took = pd.DataFrame([{
        "method": r["config"]["method"], "images": r["images"], "z_std": r["epochs"][-1]["z_std"],
        "seconds": 1000 * r["seconds"] / r["images"], "on": hardware(r["provenance"])} for r in runs])
    most = took["on"].value_counts().index[0]
    took["seconds"] = took["seconds"].where(took.pop("on") == most)
    wide = wide.merge(took.groupby("method").mean(), "left", "method").join(pd.DataFrame(costs).T, "method")
    timed = np.where(wide["seconds"].notna(), most, "not timed there")
    return wide.assign(untrained=wide["method"].map(bare), timed_on=timed)


def findings(record: dict[str, Any]) -> list[str]:
    """What a run record says about its training, what it means and what to change, the gravest first.

    Raises SidaeError where nothing was trained, or by a version that kept too little to tell.
    """
    if not (start := record.get("untrained")):
        raise SidaeError("This record holds nothing to diagnose: nothing was trained, or by an older "
                         "version; run it anew.")
    config, paper = RunConfig.from_dict(record["config"]), RunConfig(method="sidae", data="")
    cls, first, last = methods.METHODS[config.method], record["epochs"][0], record["epochs"][-1]
    z, rank, spread = last["z_std"], last["rank"], f"of first {first['rank']:.1f}"
    healthy = config.dim**-0.5 if "dim" in cls.reads else first["z_std"]
    collapsed = not cls.labels and (z < 0.8 * healthy or rank < 0.35 * first["rank"])
    lr = config.lr / (0.05 * config.batch / 256)  # by SimSiam's rule (arXiv:2011.10566, Sec. 3)
    high, flat = lr > 8, first["z_std"] < 0.3 * healthy
    knn, was = (np.nan if look.get("knn") is None else look["knn"] for look in (last, start))
    error = 3 * 100 * (was * (100 - was) / 1e4 / min(256, record["images"] / config.epochs)) ** 0.5
    longer = f", after {record['steps']} steps: train longer" if record["steps"] < 5000 else ""
    found = [text for holds, text in (
        (start["feature_rank"] < 1,
         "The images are all alike to the untrained network: look at the data, nothing can be learned from "
         "them."),
        (collapsed, "Collapse: the projections gather in ever fewer directions, effective rank "
         f"{rank:.1f} {spread}, z_std {z:.3f} of a healthy {healthy:.3f}."),
        (collapsed and high, f"lr {config.lr:g} is {lr:.0f} times the usual 0.05 batch / 256: lower it."),
        (collapsed and not high and flat,
         "They never spread: BatchNorm is missing in the projector or does not see the whole batch."),
        (collapsed and not high and not flat,
         "If the method predicts one view from the other, check that the target's gradient is stopped."),
        (knn < was - error, f"Neighbours became worse, {knn:.0f} % of the same class against {was:.0f} % "
         "untrained: what is learned is not the class. Check that no augmentation hides it, then lr."),
        (was - error <= knn < was + error, "Neighbours are no better than the untrained network's, "
         f"{knn:.0f} and {was:.0f} % of the same class{longer}."),
    ) if holds]
    if not found:
        seen = f", and {knn:.0f} % of the neighbours are of the same class, {was:.0f} % untrained"
        found = ["Healthy: the projections keep their spread" + seen * (not np.isnan(knn - was)) + "."]
    small = [f"{name} {getattr(config, name)} for {getattr(paper, name)}"
             for name in ("width", "epochs", "batch", "pool")
             if not cls.labels and getattr(config, name) != getattr(paper, name)]
    published = f"Published accuracies are not to be expected with {', '.join(small)} (pool 0: all)."
    return [*found, published] if small else found
