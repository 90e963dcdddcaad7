"""Records to tables, tables to figures: every chart is drawn from the CSV that is saved beside it."""

import base64
import html
import io
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from PIL import Image

from . import data, evaluate, methods, paths, published, train
from .config import EvalConfig, RunConfig, SidaeError
from .methods.metric import undone
from .train import device_of, provenance, write

# Okabe & Ito's colours, then Tol's and Brewer's dark ones, one per method in every figure; baselines are grey lines
COLOURS = {"sidae": "#D55E00", "simsiam": "#0072B2", "dae": "#009E73", "supervised": "#000000", "untrained": "#7F7F7F",
           "simclr": "#56B4E9", "moco_v2": "#E69F00", "nnclr": "#332288", "fnc": "#8C510A", "byol": "#CC79A7",
           "vicreg": "#882255", "dino": "#999933", "barlow_twins": "#44AA99", "amdim": "#AA4466", "cpc_v2": "#6B4C9A",
           "yadim": "#117733", "composed": "#225555", "pairwise": "#B8860B", "triplet": "#4477AA"}
NAMES = {"sidae": "SidAE", "simsiam": "SimSiam", "dae": "Autoencoder", "supervised": "Supervised",
         "untrained": "Untrained", "simclr": "SimCLR", "moco_v2": "MoCo v2", "nnclr": "NNCLR", "fnc": "FNC", "byol": "BYOL",
         "vicreg": "VICReg", "dino": "DINO", "barlow_twins": "Barlow Twins", "amdim": "AMDIM", "cpc_v2": "CPC v2",
         "yadim": "YADIM-like", "composed": "Composed", "pairwise": "Pairwise", "triplet": "Triplet"}
PROBES = {"linear": "SGD probe", "logistic": "logistic regression", "knn": "kNN", "finetune": "fine-tuned"}
# What is no method has a colour of no method, and dark to light, so that it is told apart without its hue
SHARES = ("#4400CC", "#DE37FF")  # of the labels: many, scarce
PARTS = {"backbone": "#850000", "projector": "#FFC4C4", "predictor": "#EF0000", "decoder": "#FF7272"}
CLASSES = ("#3F90DA", "#FFA90E", "#BD1F01", "#94A4A2", "#832DB6", "#A96B59", "#E76300", "#B9AC70", "#717581", "#92DADD",
           "#1F486D", "#805407", "#5E0F00", "#4A5251", "#41165B", "#54352C", "#733100", "#5C5638", "#383A40", "#496D6E")
INK = "#444444"  # zero lines, frames and what stands for all methods alike
MARKERS = {"sidae": "o", "simsiam": "s", "dae": "^", "simclr": "D", "moco_v2": "v", "nnclr": "<", "fnc": ">", "byol": "P",
           "vicreg": "X", "dino": "p", "barlow_twins": "h", "amdim": "d", "cpc_v2": "H", "yadim": "*", "composed": "4",
           "pairwise": "1", "triplet": "2"}
OFFSETS = {"sidae": -0.15, "simsiam": 0.0, "dae": 0.15}  # of a method's marker from its row
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 8,
         "legend.frameon": False, "svg.hashsalt": "sidae", "savefig.dpi": 200}


SAMPLING = ("error", "right", "repeats")  # columns of `evaluations` about one run's test images, which no mean over seeds has


def hardware(p: dict[str, Any]) -> str:
    """What a provenance says of the machine, for tables and stamps."""
    return f"{p['device']}, {p['threads']} thread{'s' * (p['threads'] > 1)}"


def evaluations(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per evaluation record (of kind report: per metric): what was trained, what was measured, accuracy in percent,
    on what hardware, and for `published.difference` the standard error that the choice of the test images gives, in points
    (binomial; of mined pairs, from their own interval), and which images were right in how many of the repeats, if known."""
    rows, runs = [], {}  # a run is evaluated many times, and its config is checked with care
    for r in records:
        ask = r["config"]
        if (key := r["run_key"]) not in runs:
            runs[key] = RunConfig.from_dict(ask["run"])
        run = runs[key]
        rows.append({
            "data": r["data"]["name"], "display": r["data"]["display"], "pretrain": data.display(run.data),
            "pretrain_name": data.KNOWN.get(run.data, (run.data,))[0],
            "method": run.method + (f" + {run.pair_count} {run.pairs}" if run.pairs != "none" else ""),
            "input": ask.get("augment", "none"), "varied": "; ".join(f"{k}: {v}" for k, v in methods.varied(run).items()),
            "w": run.w, "augment": run.augment, "target": f"{run.target}, {run.recon}",
            "seed": run.seed, "epoch": r["epoch"], "of": run.epochs, "scored": ask.get("score_on", "test"),
            "kind": r["kind"] + (f", {n} epochs" if (n := ask.get("fit_epochs", 50)) in (30, 60) else ""),  # SePP-ID's
            "C": ask.get("C", 1.0),
            "labels": ask.get("labels", 1.0), "n_train": r["n_train"], "accuracy": r["accuracy"],
            "hardware": hardware(r["provenance"]), "run_key": r["run_key"], "error": _sampling(r["accuracy"], r["n_test"]),
            "right": r.get("right", "") if r["kind"] != "report" else "",  # a report's images are in an order of their own
            "repeats": ask.get("repeats", 1),
        })
        if r["kind"] == "pairs":
            low, high = r["pairs"]["interval"]
            rows[-1]["error"] = (high - low) / 2 / 1.96
        if r["kind"] == "report":  # and a row for each of its other metrics; a class's accuracy has the class's name
            features = ask.get("features", "backbone")
            rows[-1] |= {"metric": "accuracy", "channels": run.channels, "undone": undone(run),
                         "method": run.method if features == "backbone" else features}  # fmt: skip
            classes = (name.split(" - ")[0] for name in r["classes"])  # MNIST calls one "8 - eight"
            images = evaluate.confusion(r).sum(1).tolist()
            others = [("top3", r["top3"], r["n_test"]), ("knn", r["knn"], r["n_test"]), *zip(classes, r["per_class"], images)]
            for name, value, n in others:
                value = np.nan if value is None else value
                rows.append(rows[-1] | {"metric": name, "accuracy": value, "error": _sampling(value, n)})
    return pd.DataFrame(rows)


def _sampling(accuracy: float, n: int) -> float:
    """The binomial standard error of an accuracy in percent on n images."""
    return (accuracy * (100 - accuracy) / max(n, 1)) ** 0.5


def distinct(names: Iterable[str]) -> str:
    """What rows made into one were computed on: every machine once."""
    return "; ".join(sorted(set(names)))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, n, and the standard error sd / sqrt(n) with n - 1 (empty for one seed)."""
    by = [c for c in frame.columns if c not in ("seed", "accuracy", "run_key", "hardware", *SAMPLING)]
    out = frame.groupby(by, sort=False).agg(
        mean=("accuracy", "mean"), se=("accuracy", "sem"), n=("accuracy", "count"),
        hardware=("hardware", distinct))
    return out.reset_index().round({"mean": 4, "se": 4})


def variant(method: str, w: float, augment: str = "none") -> str:
    """The name a legend shows: SidAE with its w unless that is 0.5, the supervised network with its augmentation."""
    return NAMES[method] + _suffix(method, w, augment)


def _suffix(method: str, w: float, augment: str) -> str:
    return ", augmented" if method == "supervised" and augment != "none" else (
        f", w = {w:g}" if method == "sidae" and w != 0.5 else "")


def beside_published(table: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint by the SGD probe, with the paper's Table 1 where it has the same sets, of pre-training too, and
    share of labels."""
    last = table[(table["epoch"] == table["of"]) & table["kind"].isin(["linear", "classifier"])]
    paper = published.table(source="Table 1", protocol="frozen, linear SGD 50 epochs")
    paper = paper[["pretrain_data", "data", "method", "labels", "value", "se", "epochs"]].rename(columns={
        "pretrain_data": "pretrain_name", "value": "published", "se": "published_se", "epochs": "published_epochs"})
    out = last.merge(paper, on=["pretrain_name", "data", "method", "labels"], how="left")
    out["ours"], out["paper"] = (
        [mean_se(*pair) for pair in out[list(names)].to_numpy()] for names in (("mean", "se"), ("published", "published_se")))
    return out.assign(**{"ours / paper": ["" if np.isnan(r) else f"{r:.2f}" for r in out["mean"] / out["published"]]})


def mean_se(mean: float, se: float) -> str:
    """64.75 (0.27); no standard error is a dash, no mean is empty."""
    return "" if np.isnan(mean) else f"{mean:.2f} ({'-' if np.isnan(se) else f'{se:.2f}'})"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def _points(d: published.Difference) -> str:
    mean, low, high = d.interval()
    span = f"95 % interval {low:+.2f} to {high:+.2f}" if len(d) > 1 else "no interval from one seed"
    return f"{mean:+.2f} points ({span}, n = {len(d)})"


def told(d: published.Difference) -> str:
    """A difference in words: "+2.50 points (95 % interval +1.20 to +3.80, n = 3): above", "below" or "not told apart"."""
    return f"{_points(d)}: " + {"supported": "above", "contradicted": "below"}.get(d.verdict(), "not told apart")


def gain(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy less the untrained network's by the same probe and share of labels, first and last checkpoint, in points."""
    by = ["display", "labels", "kind", "seed"]
    floor = frame[frame["method"] == "untrained"].set_index(by)["accuracy"].rename("floor")
    own = frame[frame["method"].isin(MARKERS)].join(floor, on=by, how="inner")
    own = own.assign(gain=own["accuracy"] - own["floor"])
    first = own.groupby(["display", "method"])["epoch"].transform("min")
    ends = own[(own["epoch"] == first) | (own["epoch"] == own["of"])]
    return ends.pivot_table(index=["display", "labels", "method", "epoch"], columns="kind", values="gain", sort=False).round(1)


def order(cases: dict[str, Sequence[dict[str, Any]]]) -> pd.DataFrame:
    """A row per change (`experiments.hypotheses`, its records) and share of labels: mean accuracies in percent, and SidAE
    less the better of SimSiam and autoencoder, paired by seed, with its 95 % interval."""
    rows = []
    for change, records in cases.items():
        for share, part in evaluations(records).groupby("labels", sort=False) if records else ():  # of none: not run yet
            wide = part.pivot_table(index="seed", columns="method", values="accuracy").dropna()
            lead = published.Difference(wide["sidae"] - wide[["simsiam", "dae"]].max(axis=1), 2**0.5 * part["error"].mean())
            mean, low, high = lead.interval()
            rows.append({"display": part["display"].iloc[0], "labels": share, "change": change, **wide.mean(), "n": len(lead),
                         "lead": mean, "low": low, "high": high, "SidAE leads": lead.verdict(),
                         "hardware": distinct(part["hardware"])})  # fmt: skip
    return pd.DataFrame(rows).round(2)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure that pyplot makes, so that a notebook can show it, and forgets, so that it is not shown twice."""
    fig = plt.figure(figsize=(width, height), dpi=110, layout="constrained")
    plt.close(fig)
    with plt.rc_context(STYLE):  # after pyplot has chosen its backend, whose settings this would undo
        yield fig


def save(fig: Figure, name: str, scale: str, table: pd.DataFrame) -> Figure:
    """figures/<scale>/<name>.{svg,png,csv}, stamped with the scale unless it is the paper's; returns the figure. A figure
    whose marks are rasterized, as a map of points is, has no svg: it would hold the same pixels."""
    n = sorted(set(table["n"])) if "n" in table else []
    stamp = f"{scale} scale" + ("" if scale == "paper" else ", not the paper's protocol")
    if n:
        stamp += f"; n = {n[0]} seed{'s' * (n[0] > 1)}" if len(n) == 1 else f"; n = {n[0]} to {n[-1]} seeds"
    lines = [stamp, *(sorted({h for one in table["hardware"] for h in one.split("; ")}) if "hardware" in table else [])]
    fig.text(0.995, 0.003, "\n".join(lines), ha="right", va="bottom", fontsize=6,
             color="#7F0000" if scale != "paper" else "#444444")
    below = 0.12 * len(lines) / fig.get_figheight()  # room for these lines
    fig.get_layout_engine().set(rect=(0, below, 1, 1 - below))  # type: ignore[call-arg]
    with plt.rc_context(STYLE):  # how many ticks there are depends on the size of their labels
        fig.draw_without_rendering()
    fig.set_layout_engine("none")
    for ax in fig.axes:  # the layout's solver differs in the last bit from call to call, and SVG's ids with it
        ax.set_position([round(v, 6) for v in ax.get_position(original=True).bounds])  # type: ignore[arg-type]
    folder = paths.figures(scale)
    write(folder / f"{name}.csv", table.to_csv(index=False).encode())
    pixels = any(c.get_rasterized() for ax in fig.axes for c in ax.collections)
    for suffix, metadata in (("png", None),) if pixels else (("svg", {"Date": None}), ("png", None)):
        with plt.rc_context(STYLE):
            fig.savefig(content := io.BytesIO(), format=suffix, metadata=metadata)
        write(folder / f"{name}.{suffix}", small(content.getvalue()) if suffix == "png" else content.getvalue())
    return fig


def small(png: bytes) -> bytes:
    """A chart in 256 colours, a third of the size; a picture that loses by it stays as it is."""
    full = Image.open(io.BytesIO(png)).convert("RGB")
    few = full.quantize(256, dither=Image.Dither.NONE)
    if np.abs(np.asarray(full, float) - np.asarray(few.convert("RGB"), float)).mean() > 0.5:
        return png
    few.save(out := io.BytesIO(), "PNG", optimize=True)
    return min(png, out.getvalue(), key=len)


def joined(line: pd.DataFrame) -> pd.Series:
    """Which points of a curve from `summary` are joined: those of the most seeds. Means over fewer are another curve's."""
    return line["n"] == line["n"].max()


def _curve(ax: plt.Axes, line: pd.DataFrame, x: str, y: str = "mean", *, bars: bool = False, **look: Any) -> None:
    """One curve with the band, or bars, of its standard errors, or from `low` to `high` where the rows have them. Points of
    different n are never joined: means over fewer seeds than the most are small marks beside the curve."""
    line = line.sort_values(x)
    line, fewer = line[joined(line)], line[~joined(line)]
    if bars:
        ax.errorbar(line[x], line[y], line["se"], ms=3, lw=1, capsize=2, **look)
    else:
        ax.plot(line[x], line[y], ms=3, lw=1.2, **look)
        low, high = (line["low"], line["high"]) if "low" in line else (line[y] - line["se"], line[y] + line["se"])
        ax.fill_between(line[x], low, high, color=look["color"], alpha=0.2, lw=0)
    if len(fewer):
        marker = look.get("marker") or "o"
        ax.plot(fewer[x], fewer[y], marker, ms=2, color=look["color"], alpha=0.5, label="fewer seeds (small)")


def _beyond(ax: plt.Axes, epochs: float) -> plt.Axes:
    """Where a value of a longer run than the panel's stands: a strip right of it, whose one tick is that run's length."""
    if ax.child_axes:
        return ax.child_axes[0]
    strip = ax.inset_axes((1.05, 0, 0.1, 1), sharey=ax)
    strip.set(xticks=[epochs], xlim=(epochs - 1, epochs + 1))
    strip.tick_params(left=False, labelleft=False)
    strip.spines["left"].set_visible(False)
    return strip


def by_validation(table: pd.DataFrame, option: str, by: Sequence[str] = ("labels",)) -> pd.DataFrame:
    """What a choice by the validation split gives on test, from `summary`: a row per group with the value of the column
    `option` of the highest mean on validation, that mean, its mean and standard error on test over n seeds, its rank there
    among the candidates, and the one that is best on test. Accuracies in percent."""
    rows = []
    for key, part in table.groupby(list(by), sort=False):
        val, test = (part[part["scored"] == on].set_index(option) for on in ("val", "test"))
        chosen, best = val["mean"].idxmax(), test["mean"].idxmax()
        own = test.loc[chosen]
        rows.append({**dict(zip(by, key)), "chosen": chosen, "validation": val["mean"][chosen], "test": own["mean"],
                     "se": own["se"], "n": own["n"], "rank": f"{(test['mean'] > own['mean']).sum() + 1} of {len(test)}",
                     "best": best, "best_test": test["mean"][best]})  # fmt: skip
    return pd.DataFrame(rows)


def reach(table: pd.DataFrame) -> str:
    """How far the curves of a `summary` have come that end before their runs do: "to epoch 75 of 200, n = 2", with the
    methods' names where they differ; empty where all have come to their end."""
    said: dict[str, list[str]] = {}
    curves = table[table["of"] > 0].groupby(["method", "w"], sort=False)
    for (method, w), line in curves:
        far = line[joined(line)].sort_values("epoch").iloc[-1]
        words = "" if far["epoch"] == far["of"] else f"to epoch {far['epoch']} of {far['of']}, n = {far['n']}"
        said.setdefault(words, []).append(variant(method, w))
    if len(said) == 1:
        return next(iter(said))
    return "; ".join(f"{', '.join(names)} {words}" for words, names in said.items() if words)


def accuracy_vs_epochs(table: pd.DataFrame, kind: str = "linear") -> Figure:
    """Figures 3, 5, 6 and 7 from `summary`: one column per set, one row per share of labels (of one set alone side by side),
    standard-error bands, supervised and untrained as lines; by the paper's own probe also its end points, hollow, at their
    own epoch: in a strip of its own where that is beyond the panel's. Curves of unfinished runs go as far as they have come,
    which the title says; means over fewer seeds are dots beside the line."""
    sets, shares = list(dict.fromkeys(table["data"])), sorted(set(table["labels"]), reverse=True)
    end = beside_published(table) if kind == "linear" else table[:0].assign(published=0.0)
    high, wide = (len(shares), len(sets)) if len(sets) > 1 else (1, len(shares))
    with _figure(2.6 * wide + 0.6, 2.1 * high + 0.7) as fig:
        axes = fig.subplots(high, wide, squeeze=False).reshape(len(shares), len(sets))
        for (row, column), ax in np.ndenumerate(axes):
            part = table[(table["data"] == sets[column]) & (table["labels"] == shares[row])]
            for line in part[(part["of"] == 0) & (part["kind"] == kind) | (part["kind"] == "classifier")].itertuples():
                style = ":" if line.method == "untrained" else "--" if line.augment == "none" else "-."
                ax.axhline(line.mean, ls=style, color=COLOURS[line.method], lw=1,
                           label=variant(line.method, line.w, line.augment))
                if line.n > 1:
                    ax.axhspan(line.mean - line.se, line.mean + line.se, color=COLOURS[line.method], alpha=0.12, lw=0)
            trained = part[(part["of"] > 0) & (part["kind"] == kind)]
            for (method, w), line in trained.groupby(["method", "w"], sort=False):
                look, style = {"marker": MARKERS[method], "color": COLOURS[method]}, {"ls": "--", "mfc": "white"}
                _curve(ax, line, "epoch", label=variant(method, w), **look, **(style if w != 0.5 else {}))
                own = end[(end["data"] == sets[column]) & (end["labels"] == shares[row]) & (end["method"] == method)]
                for p in own[own["w"] == w].dropna(subset="published").itertuples():
                    at = ax if p.published_epochs <= trained["of"].max() else _beyond(ax, p.published_epochs)
                    at.errorbar(p.published_epochs, p.published, p.published_se, ms=4, mfc="none", lw=0.8, **look, ls="",
                                label="Published (hollow)")
            shown = part["display"].iloc[0]
            source = trained["pretrain"]
            name = shown if set(source) <= {shown} else f"{source.iloc[0]} to\n{shown}"
            title = [f"{name}, {percent(shares[row])} of labels", *filter(None, reach(trained).split("; "))]
            ax.set_title("\n".join(title), wrap=True)
            ax.set_xlabel("pre-training epochs")
            ax.xaxis.get_major_locator().set_params(integer=True)
            if column == 0:
                ax.set_ylabel(f"test accuracy (%), {PROBES[kind]}")
        _legend(fig, [*axes.flat, *(strip for ax in axes.flat for strip in ax.child_axes)], 2 * wide)
    return fig


def _legend(fig: Figure, axes: Iterable[plt.Axes], columns: int) -> None:
    """One legend above all panels, every name once, in as many columns as fit."""
    handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
    columns = len(handles) if len(handles) == columns + 1 else columns  # a second line for one name alone looks odd
    for n in range(columns, 0, -1):
        legend = fig.legend(handles=handles.values(), loc="outside upper center", ncols=n, fontsize=7)
        if n == 1 or legend.get_window_extent().width < fig.bbox.width:
            break
        legend.remove()
    for dots in (h for h in legend.legend_handles if isinstance(h, PathCollection)):  # of a map, too small to tell colours
        dots.set_sizes([20])


def w_sweep(table: pd.DataFrame) -> Figure:
    """Figure 4 from `summary`: test accuracy against w, left with many and scarce labels (filled: test, hollow: the
    validation split that w is chosen by), right, scarce labels, for two scales of the reconstruction target. A colour is a
    share of the labels, a marker on the right a target."""
    shares = sorted(set(table["labels"]), reverse=True)
    plain = table["target"] == "standardised, mean"
    table = table.assign(w=table["w"].where(table["method"] == "sidae", (table["method"] == "simsiam").astype(float)))
    with _figure(6.4, 2.9) as fig:
        left, right = fig.subplots(1, 2, sharey=True)
        for share, colour in zip(shares, SHARES):
            for scored, style in (("test", {"ls": "-", "marker": "o"}), ("val", {"ls": ":", "marker": "o", "mfc": "white"})):
                line = table[plain & (table["labels"] == share) & (table["scored"] == scored)]
                _curve(left, line, "w", bars=True, color=colour, **style,
                       label=f"{percent(share)} of labels, {'test' if scored == 'test' else 'validation'}")
        scarce = table[(table["labels"] == shares[-1]) & (table["scored"] == "test")]
        ends = scarce[scarce["w"] == 1]
        for (target, part), look in zip(scarce.groupby("target", sort=False), ("o-", "^--")):
            line = pd.concat([part, ends]).drop_duplicates(["w"])
            _curve(right, line, "w", bars=True, marker=look[0], ls=look[1:], color=SHARES[len(shares) - 1], label=target)
        left.set(title=f"{table['display'].iloc[0]}", ylabel="accuracy (%), SGD probe")
        right.set_title(f"scale of the target, {percent(shares[-1])} of labels")
        right.legend(fontsize=6, title="pixels, reduction", title_fontsize=6)
        for ax in (left, right):
            ax.set_xlabel("w  (0: autoencoder, 1: SimSiam)")
        _legend(fig, [left], 4)
    return fig


def balance(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """From run records of SidAE: both terms and the norms of their gradients at z, at the first and the last epoch that
    has them, mean over seeds; `share`: the siamese part of what w lets through."""
    rows = []
    for r in records:
        run, looks = RunConfig.from_dict(r["config"]), [h for h in r["epochs"] if "grad_si" in h]
        for when, h in zip(("first", "last"), (looks[0], looks[-1])) if looks else ():
            si, dae = run.w * h["grad_si"], (1 - run.w) * h["grad_dae"]
            terms = {k: h[k] for k in ("l_si", "l_dae", "grad_si", "grad_dae")}
            rows.append({"target": f"{run.target}, {run.recon}", "w": run.w, "when": when, **terms, "share": si / (si + dae)})
    return pd.DataFrame(rows).groupby(["target", "w", "when"], sort=False).mean().round(4)


def datasets_table(table: pd.DataFrame) -> Figure:
    """Table 1 as a chart from `beside_published`: a line per set and share of labels, ours filled, published hollow."""
    table = table[(table["method"] != "supervised") | (table["augment"] == "none")]
    rows = list(dict.fromkeys(zip(table["pretrain"], table["display"], table["labels"])))
    with _figure(5.4, 0.42 * len(rows) + 1.2) as fig:
        ax = fig.subplots()
        for y, (pretrain, display, labels) in enumerate(rows):
            part = table[(table["pretrain"] == pretrain) & (table["display"] == display) & (table["labels"] == labels)]
            for line in part.itertuples():
                at, marker = y + OFFSETS.get(line.method, 0), MARKERS.get(line.method, "|")
                ax.errorbar(line.mean, at, xerr=line.se, fmt=marker, ms=4, color=COLOURS[line.method], lw=0.8,
                            label=NAMES[line.method])
                ax.errorbar(line.published, at, xerr=line.published_se, fmt=marker, ms=4, mfc="none", lw=0.8,
                            color=COLOURS[line.method], label=None if np.isnan(line.published) else "Published (hollow)")
        names = [f"{d}, {percent(share)}" if p == d else f"{p}\nto {d}, {percent(share)}" for p, d, share in rows]
        ax.set_yticks(range(len(rows)), names)
        ax.set_ylim(len(rows) - 0.6, -0.4)
        ax.set_xlabel("test accuracy (%), SGD probe on the frozen backbone")
        _legend(fig, [ax], 3)
    return fig


def points(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per point of the maps in `tsne` evaluation records, with each map's scores."""
    parts = []
    for r in records:
        run = RunConfig.from_dict(r["config"]["run"])
        for name in ("tsne", "pca"):
            (x, y), trust = np.array(r[name]["xy"]).round(3).T, r[name]["trustworthiness"]
            parts.append(pd.DataFrame({"method": run.method, "map": name, "x": x, "y": y, "label": r["labels"],
                                       "index": r["points"], "knn": r["accuracy"], "k": r["config"].get("k", 200),
                                       "trustworthiness": np.nan if trust is None else trust, "seed": run.seed,
                                       "data": r["data"]["name"], "n": 1, "hardware": hardware(r["provenance"])}))
            parts[-1]["class"] = [r["classes"][label] for label in r["labels"]]
    return pd.concat(parts, ignore_index=True)


def tsne(table: pd.DataFrame) -> Figure:
    """From `points`: a column per network, t-SNE above and PCA below, the same test images everywhere; below each map what
    can be trusted: kNN accuracy of the features, and the map's trustworthiness."""
    methods_, classes = list(dict.fromkeys(table["method"])), table.groupby("label")["class"].first()
    with _figure(1.55 * len(methods_) + 0.2, 3.9) as fig:
        axes = fig.subplots(2, len(methods_), squeeze=False)
        for (row, column), ax in np.ndenumerate(axes):
            part = table[(table["method"] == methods_[column]) & (table["map"] == ("tsne", "pca")[row])]
            for label, name in classes.items():
                own = part[part["label"] == label]
                ax.scatter(own["x"], own["y"], s=2, lw=0, color=CLASSES[label % 20], label=name, rasterized=True)
            ax.set(xticks=[], yticks=[])
            trust = part["trustworthiness"].iloc[0]
            ax.set_xlabel(f"kNN {part['knn'].iloc[0]:.1f} %\ntrustworthiness " + ("-" if np.isnan(trust) else f"{trust:.2f}"),
                          fontsize=6)
            if row == 0:
                ax.set_title(NAMES[methods_[column]])
            if column == 0:
                ax.set_ylabel(("t-SNE", "PCA")[row])
        if len(classes) <= 20:
            _legend(fig, axes.flat[:1], 6)
    return fig


def neighbours(record: dict[str, Any]) -> Figure:
    """From a `tsne` evaluation record: queries of the test split (left) and their nearest training images by cosine of
    the features; a frame in the class's favour is solid, a wrong one dashed. Records before 0.2 hold no thumbnails, so the
    image set is looked for; raises SidaeError where it is not there."""
    run, near = RunConfig.from_dict(record["config"]["run"]), record["neighbours"]
    if "thumbnails" in record:
        shown, found = [train.unstrip(s) for s in record["thumbnails"]], np.array(record["near_labels"])
    else:
        name = record["config"].get("data") or run.data
        images = data.by_fingerprint(name, size=run.size, channels=run.channels, resize=run.resize)
        test, bank = images.split("test"), images.split("train")
        shown = [torch.cat([test.images[[q]], bank.images[row]]) for q, row in zip(record["points"], near)]
        found = bank.labels[torch.tensor(near)].numpy()
    right = found == np.array(record["labels"])[: len(near), None]  # (queries, neighbours)
    with _figure(0.62 * (1 + len(near[0])) + 0.3, 0.66 * len(near) + 0.35) as fig:
        axes = fig.subplots(len(near), 1 + len(near[0]), squeeze=False)
        for (row, column), ax in np.ndenumerate(axes):
            ax.imshow(shown[row][column].permute(1, 2, 0), interpolation="nearest")
            good = column and right[row, column - 1]
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(visible=column > 0, color=INK, lw=1.6, ls="-" if good else "--")
        axes[0, 0].set_title("query", fontsize=6)
        fig.suptitle(f"{NAMES[run.method]}: {100 * right.mean():.0f} % of the neighbours of the query's class\n"
                     f"images: {record['data']['display']}", fontsize=7)
    return fig


def five_axes(table: pd.DataFrame) -> Figure:
    """AMDIM, CPC and YADIM from `summary`, a row per method and axis: every choice with its accuracy, the method's own
    filled, one of fewer seeds small; under them the spread of the others, which the paper's claim is about; a tick for the
    untrained network of the own encoder."""
    table = table.fillna({"varied": ""})
    rows = [(m, axis, part) for m in ("yadim", "amdim", "cpc_v2") for axis, part in published.choices(table, m)]
    with _figure(7.2, 0.5 * len(rows) + 0.9) as fig:
        ax, bare = fig.subplots(), _untrained(table)
        for y, (m, axis, part) in enumerate(rows):
            own = methods.METHODS[m].own
            ends = part["mean"][joined(part)].agg(["min", "max"])
            ax.plot(ends, (y, y), color=COLOURS[m], lw=6, alpha=0.15, solid_capstyle="butt")
            ax.plot(bare[m], y, "|", ms=16, color=COLOURS["untrained"], label="Untrained encoder" if y == 0 else None)
            for k, p in enumerate(part.sort_values("mean").itertuples()):
                ax.errorbar(p.mean, y, xerr=p.se, color=COLOURS[m], marker=MARKERS[m], ms=5 if p.n == part["n"].max() else 2,
                            mfc=None if p.own else "white")
                name = own[axis] if p.own else p.choice if len(p.choice) < 18 else "as bolts counts"
                ax.annotate(name, (p.mean, y), (0, (4, -10, 10, -16)[k % 4]), textcoords="offset points", ha="center",
                            fontsize=5.5, bbox={"fc": "white", "ec": "none", "pad": 0.4})
        ax.set_yticks(range(len(rows)), [f"{NAMES[m]}: {axis}" for m, axis, _ in rows])
        ax.set(xlabel=f"test accuracy (%), {PROBES[table['kind'].iloc[0]]}", ylim=(len(rows) - 0.25, -0.6),
               title=f"One choice changed at a time, {table['display'].iloc[0]}")
        ax.margins(x=0.08)
        fig.legend(loc="outside upper right")
    return fig


def _untrained(table: pd.DataFrame) -> dict[str, float]:
    """Method -> mean accuracy of the untrained network that it starts from."""
    rows = table[table["method"] == "untrained"].set_index("varied")["mean"]
    return {m: rows.get(f"encode: {c.own['encode']}" if "extract" in c.own else "", np.nan) for m, c in methods.METHODS.items()}


def side_by_side(records: Sequence[dict[str, Any]], costs: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Every method by its own choices: accuracy, kNN, logistic regression on its `untrained` network, `seconds` of training
    per 1,000 images on the one machine that trained most of the runs, `timed_on`, since seconds of two machines do not
    compare (empty for a method that it did not train), the collapse gauge z_std (1 / sqrt(D) is healthy, 0 collapsed) and
    `train.cost`, which no machine changes.

    records: of runs and of evaluations; costs: by method."""
    table = summary(evaluations([r for r in records if "kind" in r]))
    bare = _untrained(table[table["kind"] == "logistic"])
    table = table[(table["varied"] == "") & ~table["method"].isin(["composed", "untrained"])]
    wide = table.pivot_table(index=["method", "n", "hardware", "display"], columns="kind", values="mean", sort=False)
    trained = [r for r in records if r.get("epochs") and not methods.varied(RunConfig.from_dict(r["config"]))]
    where = [hardware(r["provenance"]) for r in trained]
    most = max(where, key=where.count)
    took = pd.DataFrame([{"method": r["config"]["method"], "images": r["images"], "z_std": r["epochs"][-1]["z_std"],
                          "seconds": 1000 * r["seconds"] / r["images"] if there == most else np.nan}
                         for r, there in zip(trained, where)]).groupby("method").mean()  # fmt: skip
    wide = wide.reset_index().merge(took, "left", "method").join(pd.DataFrame(costs).T, "method")
    return wide.assign(untrained=wide["method"].map(bare), timed_on=np.where(wide["seconds"].notna(), most, "not timed there"))


def accuracy_vs_cost(table: pd.DataFrame) -> Figure:
    """`side_by_side` as a picture: logistic regression against the arithmetic of training, over a line from untrained.
    Seconds would be of the machine too, and names of machines do not say enough of it to set two times on one axis."""
    with _figure(6.4, 3.6) as fig:
        ax = fig.subplots()
        for r in table.itertuples():
            ax.vlines(r.gflop, r.untrained, r.logistic, color=COLOURS[r.method], lw=0.8)
            ax.plot(r.gflop, r.untrained, "_", color=COLOURS["untrained"], label="Untrained")
            ax.plot(r.gflop, r.logistic, MARKERS.get(r.method, "o"), ls="", color=COLOURS[r.method], label=NAMES[r.method])
        ax.set(xscale="log", xlabel="arithmetic of training, forward and backward (GFLOP per image)",
               ylabel=f"test accuracy (%), {PROBES['logistic']}",
               title=f"Equal images seen, {table['display'].iloc[0]}")
        ax.xaxis.set(major_locator=plt.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        handles = {h.get_label(): h for h in ax.get_legend_handles_labels()[0]}
        fig.legend(handles=handles.values(), loc="outside right center", fontsize=7)
    return fig


def your_own_images(table: pd.DataFrame) -> Figure:
    """The learning curve of notebook 10 from `summary`: accuracy against the number of labels, standard-error bands."""
    with _figure(4.4, 2.9) as fig:
        ax = fig.subplots()
        for method, name in {m: n for m, n in NAMES.items() if m in set(table["method"])}.items():
            _curve(ax, table[table["method"] == method], "n_train", ls={"supervised": "--", "untrained": ":"}.get(method, "-"),
                   marker=MARKERS.get(method), color=COLOURS[method], label=name)
        ax.set_xscale("log")
        ticks = sorted(set(table["n_train"]))
        ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
        ax.minorticks_off()
        ax.set(xlabel="labels", ylabel="test accuracy (%)", title=f"{table['display'].iloc[0]}: how far the labels reach")
        fig.legend(loc="outside upper center", ncols=5, fontsize=7)
    return fig


def findings(record: dict[str, Any]) -> list[str]:
    """What a run record says about its training, in sentences: what it means and what to change, the gravest first.

    Raises SidaeError where nothing was trained, or by a version that kept too little to tell.
    """
    epochs, start = record["epochs"], record.get("untrained")
    if not start:
        raise SidaeError("This record holds nothing to diagnose: nothing was trained, or by an older version; run it anew.")
    config, first, last = RunConfig.from_dict(record["config"]), epochs[0], epochs[-1]
    cls, out = methods.METHODS[config.method], []
    healthy = config.dim**-0.5 if "dim" in cls.reads else first["z_std"]
    usual = 0.05 * config.batch / 256  # SimSiam's rule (arXiv:2011.10566, Sec. 3)
    if start["feature_rank"] < 1:
        out.append("The images are all alike to the untrained network: look at the data, nothing can be learned from them.")
    if not cls.labels and (last["z_std"] < 0.8 * healthy or last["rank"] < 0.35 * first["rank"]):
        out.append(f"Collapse: the projections gather in ever fewer directions, effective rank {last['rank']:.1f} of first "
                   f"{first['rank']:.1f}, z_std {last['z_std']:.3f} of a healthy {healthy:.3f}.")  # fmt: skip
        if config.lr > 8 * usual:
            out.append(f"lr {config.lr:g} is {config.lr / usual:.0f} times the usual 0.05 batch / 256: lower it.")
        elif first["z_std"] < 0.3 * healthy:
            out.append("They never spread: BatchNorm is missing in the projector or does not see the whole batch.")
        else:
            out.append("If the method predicts one view from the other, check that the target's gradient is stopped.")
    knn, was = last.get("knn"), start.get("knn")
    if knn is not None and was is not None:
        error = 100 * (was * (100 - was) / 1e4 / min(256, record["images"] / config.epochs)) ** 0.5
        if knn < was - 3 * error:
            out.append(f"Neighbours became worse, {knn:.0f} % of the same class against {was:.0f} % untrained: what is "
                       "learned is not the class. Check that no augmentation hides it, then lr.")  # fmt: skip
        elif knn < was + 3 * error:
            out.append(f"Neighbours are no better than the untrained network's, {knn:.0f} and {was:.0f} % of the same class"
                       + (f", after {record['steps']} steps: train longer." if record["steps"] < 5000 else "."))
    if not out:
        out.append("Healthy: the projections keep their spread" + (
            f", and {knn:.0f} % of the neighbours are of the same class, {was:.0f} % untrained." if knn is not None else "."))
    paper = RunConfig(method="sidae", data="")
    small = [f"{n} {getattr(config, n)} for {getattr(paper, n)}" for n in ("width", "epochs", "batch", "pool")
             if not cls.labels and getattr(config, n) != getattr(paper, n)]  # fmt: skip
    return [*out, f"Published accuracies are not to be expected with {', '.join(small)} (pool 0: all)."] if small else out


def diagnose(record: dict[str, Any]) -> Figure:
    """One run's training: loss terms, spread and effective rank of the projection, gradients, learning rate and the
    nearest neighbours beside the untrained network's; below, the `findings`."""
    sentences, config, start = findings(record), RunConfig.from_dict(record["config"]), record["untrained"]
    epochs = pd.DataFrame(record["epochs"]).set_index("epoch")
    terms = [c for c in epochs if c == "loss" or c.startswith("l_")]
    gradients = [c for c in epochs if c.startswith("grad_")]
    dim = config.dim if not methods.METHODS[config.method].labels else None
    with _figure(7.2, 4.4) as fig:
        axes = fig.subplots(2, 3).ravel()
        for ax, names, title in zip(axes, (terms, ["z_std"], ["rank"], gradients, ["lr"], ["knn"]), (
                "loss and its terms", "spread of the projection, z_std", "effective rank of the projection",
                "gradient norm at the epoch's end", "learning rate", "nearest neighbour of the same class (%)")):  # fmt: skip
            for k, name in enumerate(n for n in names if n in epochs):
                line, shown = epochs[name].dropna(), name.removeprefix("grad_")
                ax.plot(line.index, line, marker=".", ms=3, lw=1, color=PARTS.get(shown, COLOURS[config.method]),
                        ls=("-", "--", ":", "-.")[k % 4], label=shown)
            ax.set_title(title)
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
        for ax, y, text in ((axes[1], dim and dim**-0.5, "healthy"), (axes[5], start.get("knn"), "untrained")):
            if y:
                ax.axhline(y, ls=":", color=COLOURS["untrained"], lw=1, label=text)
        axes[1].set_ylim(0)
        axes[2].set_ylim(0)
        axes[3].set_yscale("log")
        for ax in fig.axes:
            if len(ax.lines) > 1:
                ax.legend(fontsize=6)
        fig.supxlabel(textwrap.fill(" ".join(sentences), 130), fontsize=7, ha="left", x=0.01)
    return fig


@contextmanager
def live(seconds: float = 5.0) -> Iterator[None]:
    """While this is open in a notebook, the loss and z_std of the run in training stand below the cell: one output, drawn
    anew at most every few seconds and taken away at the end. Elsewhere, and where TQDM_DISABLE is set, nothing happens."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel") or "TQDM_DISABLE" in os.environ:
        yield
        return
    from IPython.display import display

    shown, drawn = display({"text/plain": ""}, raw=True, display_id=True), time.monotonic()

    def draw(config: RunConfig, history: list[dict[str, Any]]) -> None:
        nonlocal drawn
        if time.monotonic() - drawn > seconds:
            with _figure(5, 1.8) as fig:
                for ax, name in zip(fig.subplots(1, 2), ("loss", "z_std")):
                    ax.plot([h["epoch"] for h in history], [h[name] for h in history], color=COLOURS.get(config.method))
                    ax.set(xlabel="epoch", title=f"{config.method} {config.key()[:6]}, seed {config.seed}: {name}")
            shown.update(fig)
            drawn = time.monotonic()

    train.LISTENERS.append(draw)
    try:
        yield
    finally:
        train.LISTENERS.remove(draw)
        shown.update({"text/plain": ""}, raw=True)


BY_PAIRS = ["display", "method", "kind", "labels", "of", "epoch", "pairs", "count"]


def _gains(records: Sequence[dict[str, Any]], base: str) -> Iterator[tuple[tuple, published.Difference, str]]:
    """(BY_PAIRS, accuracy less that with the pairs `base` of the same method, seed, evaluation and epoch, hardware)."""
    frame = evaluations(records)
    runs = [RunConfig.from_dict(r["config"]["run"]) for r in records]
    frame["method"], frame["pairs"], frame["count"] = zip(*((c.method, c.pairs, c.pair_count) for c in runs))
    for key, part in frame[frame["pairs"] != base].groupby(BY_PAIRS, sort=False):
        gain = published.between(part, published.where(frame, {**dict(zip(BY_PAIRS[:-2], key)), "pairs": base}))
        if len(gain):
            yield key, gain, distinct(part["hardware"])


def pair_gains(records: Sequence[dict[str, Any]], base: str = "none") -> pd.DataFrame:
    """What pairs add: accuracy less that with the pairs `base` of the same method, seed, evaluation and epoch, in points:
    mean over n seeds, and its 95 % interval low to high over seeds, paired, and test images (infinite for one seed)."""
    rows = [(*key, *gain.interval(), len(gain), made_on) for key, gain, made_on in _gains(records, base)]
    return pd.DataFrame(rows, columns=[*BY_PAIRS, "gain", "low", "high", "n", "hardware"])


def pair_answer(records: Sequence[dict[str, Any]], method: str = "sidae", kind: str = "logistic") -> str:
    """Do semantic pairs help, by how much, and is it the semantics or the extra data? Read from evaluation records."""
    def over(base: str) -> dict[str, published.Difference]:
        found: dict[str, published.Difference] = {}
        for key, gain, _ in _gains(records, base):
            at = dict(zip(BY_PAIRS, key))
            if (at["method"], at["kind"], at["epoch"]) == (method, kind, at["of"]):
                found.setdefault(at["pairs"], gain)
        return found

    none, semantics = over("none"), over("random")["mined"]
    words = {"supported": "help", "contradicted": "harm"}
    mined, oracle = (words.get(none[pairs].verdict(), "are not told apart from none") for pairs in ("mined", "oracle"))
    return (f"{NAMES[method]}, {PROBES[kind]}: mined pairs {mined}, {_points(none['mined'])}. Pairs chosen by label {oracle}, "
            f"{_points(none['oracle'])}. As many random images: {_points(none['random'])}; wrong pairs: "
            f"{_points(none['wrong'])}. That it is the semantics, mined less random, is {semantics.verdict().split()[0]}: "
            f"{_points(semantics)}.")  # fmt: skip


def semantic_pairs(table: pd.DataFrame) -> Figure:
    """From `pair_gains`, the last epoch: what each kind of pairs adds, one panel per probe, with 95 % intervals."""
    table = table[table["epoch"] == table["of"]].drop_duplicates(["display", "method", "kind", "labels", "pairs"])
    kinds, order = ["wrong", "random", "mined", "oracle"], list(dict.fromkeys(table["method"]))
    with _figure(2.3 * table["kind"].nunique() + 0.4, 2.8) as fig:
        axes = fig.subplots(1, table["kind"].nunique(), squeeze=False, sharey=True)[0]
        for ax, (kind, part) in zip(axes, table.groupby("kind", sort=False)):
            for n, method in enumerate(order):
                own = part[part["method"] == method]
                x = own["pairs"].map(kinds.index) + 0.7 * ((n + 0.5) / len(order) - 0.5)
                half = (own["high"] - own["gain"]).replace(np.inf, np.nan)
                ax.errorbar(x, own["gain"], half, fmt=MARKERS[method], ms=4, lw=1, color=COLOURS[method],
                            label=NAMES[method])  # fmt: skip
            ax.axhline(0, color=INK, lw=0.8)
            ax.set_xticks(range(4), kinds)
            ax.set(title=f"{part['display'].iloc[0]}, {PROBES[kind]}", xlim=(-0.5, 3.5), xlabel="pairs")
        axes[0].set_ylabel("gain over no pairs (points),\nbars: 95 % interval")
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(order))
    return fig


def pair_table(pairs: Sequence[dict[str, Any]], rivals: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The points of `pair_accuracy`: accuracies of evaluations of kind pairs, and of the neighbours that NNCLR and the
    false negatives that FNC found while they trained, from their run records. Several seeds are one point: their mean, with
    the 95 % interval over them; of one seed it is the list's own."""
    rows: list[dict[str, Any]] = []
    for r in pairs:
        c, shown = EvalConfig.from_dict(r["config"]), {"hardware": hardware(r["provenance"])}
        name = NAMES[c.run.method] + ", untrained" * (c.epoch == 0) + ", augmented" * (c.augment != "none")
        shown["series"] = name + (f", {r['data']['display']}" if c.data else "")
        shown["colour"] = COLOURS["untrained"] if c.epoch == 0 else COLOURS[c.run.method]
        shown["line"] = ":" if c.augment != "none" else "-." if c.data else "--" if c.epoch == 0 else "-"
        for p in r["pairs"]["curve"] if r["n_train"] == pairs[0]["n_train"] and c.epoch in (0, c.run.epochs) else ():
            rows.append(shown | {"panel": "pairs per image", "x": p["unordered"] / r["n_train"], "accuracy": p["accuracy"],
                                 "low": p["interval"][0], "high": p["interval"][1]})  # fmt: skip
        if r["n_train"] == pairs[0]["n_train"] and (c.augment, c.run.method, c.data) == ("none", "moco_v2", ""):
            rows.append(shown | {"panel": "epoch", "series": "mined by MoCo v2", "x": c.epoch, "accuracy": r["accuracy"],
                                 "low": r["pairs"]["interval"][0], "high": r["pairs"]["interval"][1],
                                 "colour": COLOURS["moco_v2"], "line": "-"})  # fmt: skip
    for r in rivals:
        name = r["config"]["method"]
        for e in r["epochs"]:
            share = e["nn_accuracy"] if name == "nnclr" else e["fn_right"] / (e["fn_found"] or np.nan)
            rows.append({"panel": "epoch", "series": f"{NAMES[name]}, while training", "x": e["epoch"], "accuracy": 100 * share,
                         "colour": COLOURS[name], "line": "--", "hardware": hardware(r["provenance"])})  # fmt: skip
    points, by = [], ["panel", "series", "colour", "line", "x"]
    for key, own in pd.DataFrame(rows).groupby(by):
        mean, *span = published.interval(own["accuracy"]) if len(own) > 1 else own[["accuracy", "low", "high"]].iloc[0]
        points.append((*key, mean, *span, len(own), distinct(own["hardware"])))
    return pd.DataFrame(points, columns=[*by, "accuracy", "low", "high", "n", "hardware"])


def pair_accuracy(table: pd.DataFrame) -> Figure:
    """From `pair_table`: how many pairs are right, by the number of pairs that are taken and by the encoder's epoch."""
    with _figure(6.6, 3.8) as fig:
        for ax, panel in zip(fig.subplots(1, 2, sharey=True), ("pairs per image", "epoch")):
            for (series, colour, line), own in table[table["panel"] == panel].groupby(["series", "colour", "line"], sort=False):
                _curve(ax, own, "x", "accuracy", ls=line, marker="o" if len(own) < 20 else "", color=colour, label=series)
            ax.set(xlabel=panel, xscale="log" if panel == "pairs per image" else "linear", ylim=(0, 102))
            ax.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        fig.axes[0].set(ylabel="pairs of one class (%)", title="More pairs, lower threshold")
        fig.axes[1].set(title="Longer training")
        fig.axes[1].xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    return fig


def layers(config: RunConfig) -> pd.DataFrame:
    """The paper's Figure 2 as a table: every layer of encoder, projector, predictor and decoder with its output shape,
    in the order in which one forward pass meets them."""
    method, rows = methods.build(config).eval(), []

    def hook(name: str):
        def note(module: torch.nn.Module, _: Any, out: torch.Tensor) -> None:
            part, _, layer = name.partition(".")
            count = sum(p.numel() for p in module.parameters())
            kind = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))  # ours add no mathematics
            rows.append((part, f"{layer} {kind.__name__}", " x ".join(map(str, out.shape[1:])), count))
        return note

    for name, module in method.named_modules():
        if name and not list(module.children()):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        z = method.projector(method.backbone(torch.zeros(2, config.channels, config.size, config.size)))
        for head in filter(None, (method.predictor, method.decoder)):
            head(z)
    return pd.DataFrame(rows, columns=["part", "layer", "output", "parameters"])


def _flow(ax: plt.Axes, config: RunConfig, title: str) -> None:
    """One architecture as boxes and arrows; every size is read from the modules."""
    part = layers(config).groupby("part", sort=False).agg(output=("output", "last"), size=("parameters", "sum"))
    image, z = " x ".join(map(str, (config.channels, config.size, config.size))), part.output["projector"]
    encoder = f"encoder $f$\n{config.backbone} + projector\n{part['size'][['backbone', 'projector']].sum():,} par."
    boxes = {"x": (1, 0, f"image $x$\n{image}", "#F0F0F0")}  # name -> x, y, text, colour
    arrows = [("x", "x1"), ("x", "x2")]
    for i, x in ((1, 0), (2, 2)):
        boxes |= {f"x{i}": (x, 1, f"view $x_{i} = a_{i}(x)$\n{image}", "#F0F0F0"),
                  f"f{i}": (x, 2.1, encoder, PARTS["backbone"] + "30"),
                  f"z{i}": (x, 3.2, f"$z_{i}$\n{z}", "white")}
        arrows += [(f"x{i}", f"f{i}"), (f"f{i}", f"z{i}")]
        if "decoder" in part.index:
            side = -1.5 if i == 1 else 3.5
            boxes |= {f"g{i}": (side, 3.2, f"decoder $g$\n{part['size']['decoder']:,} par.", PARTS["decoder"] + "AA"),
                      f"r{i}": (side, 4.2, f"$\\hat{{x}}_{i}$\n{part.output['decoder']}", "#F0F0F0"),
                      f"e{i}": (side, 5.2, f"MSE($\\hat{{x}}_{i}$, $x$)", "white")}
            arrows += [(f"z{i}", f"g{i}"), (f"g{i}", f"r{i}"), (f"r{i}", f"e{i}")]
    boxes |= {"h": (0, 4.2, f"predictor $h$\n{part['size']['predictor']:,} par.", PARTS["predictor"] + "30"),
              "p1": (0, 5.2, f"$p_1$\n{part.output['predictor']}", "white"),
              "D": (1, 6.1, r"$D(p_1, \mathrm{sg}(z_2))$", "white")}
    arrows += [("z1", "h"), ("h", "p1"), ("p1", "D")]
    drawn = {k: ax.text(x, y, text, ha="center", va="center", fontsize=6.5,
                        bbox={"boxstyle": "round,pad=0.35", "fc": colour, "ec": "#333333", "lw": 0.7})
             for k, (x, y, text, colour) in boxes.items()}
    for a, b in [*arrows, ("z2", "D")]:
        style = {"ls": "--", "color": INK} if (a, b) == ("z2", "D") else {}
        patches = {"patchA": drawn[a].get_bbox_patch(), "patchB": drawn[b].get_bbox_patch()}
        ax.annotate("", boxes[b][:2], boxes[a][:2], arrowprops={"arrowstyle": "->", "lw": 0.8, **patches, **style})
    ax.text(1.65, 4.9, "stop-gradient", color=INK, fontsize=6.5)
    left, right = (-2.1, 4.1) if "decoder" in part.index else (-0.7, 2.7)
    ax.set(xlim=(left, right), ylim=(-0.5, 6.4), title=title)
    ax.axis("off")


def architecture(config: RunConfig) -> Figure:
    """The paper's Figure 1 from the code's own modules: SimSiam left, SidAE right (one side of the loss, as there)."""
    same = ("backbone", "stem", "width", "dim", "hidden", "pred_hidden", "channels", "size")
    simsiam = RunConfig(method="simsiam", data="", **{k: getattr(config, k) for k in same})
    with _figure(7.6, 4) as fig:
        left, right = fig.subplots(1, 2, width_ratios=(3.4, 6.2))
        _flow(left, simsiam, "SimSiam")
        _flow(right, simsiam.replace(method="sidae", decoder=config.decoder), "SidAE")
    return fig


def structure(table: pd.DataFrame) -> Figure:
    """The paper's Figure 2 drawn from `layers`: channels and map of every weight layer on the way through."""
    kinds = {"Conv2d": "conv", "MaxPool2d": "pool", "Linear": "linear", "ConvTranspose2d": "transposed"}
    kind = table["layer"].str.split().str[-1].map(kinds)
    path = kind.notna() & ~table["layer"].str.contains("downsample")  # not the shortcuts beside the way
    shapes = [tuple(map(int, s.split(" x "))) for s in table["output"][path]]
    part, x = table["part"][path].to_numpy(), np.arange(len(shapes))
    with _figure(7.2, 3) as fig:
        ax = fig.subplots()
        for name, colour in PARTS.items():
            own = x[part == name]
            ax.bar(own, [shapes[k][0] for k in own], color=colour, label=name)
        for k, s in enumerate(shapes):
            ax.text(k, s[0] * 1.08, f"{s[1]}²" if len(s) == 3 else "1", ha="center", fontsize=6)
        ax.set_yscale("log", base=2)
        ax.set_xticks(x, kind[path], rotation=90, fontsize=6)
        ax.set(ylabel="channels", title="Output of every weight layer; above each bar the size of its map")
        fig.legend(ncols=4, loc="outside upper center")
    return fig


def grid(rows: Sequence[torch.Tensor], labels: Sequence[str], mean: Sequence[float], std: Sequence[float],
         titles: Sequence[str] = ()) -> Figure:  # fmt: skip
    """Rows of normalised images (B, C, S, S), pixels brought back to [0, 1]; a title stands above its column."""
    m, s = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    with _figure(0.75 * len(rows[0]) + 0.9, 0.8 * len(rows)) as fig:
        axes = fig.subplots(len(rows), len(rows[0]), squeeze=False)
        for (r, c), ax in np.ndenumerate(axes):
            x = (rows[r][c].detach().cpu() * s + m).clamp(0, 1).permute(1, 2, 0)
            ax.imshow(x if x.shape[2] == 3 else x[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if c == 0:
                ax.set_ylabel(labels[r], rotation=0, ha="right", va="center")
            if r == 0 and titles:
                ax.set_title(titles[c], fontsize="small")
    return fig


def sheet(images: data.Images) -> Figure:
    """A contact sheet, to see whether a set was read as it was meant: eight images of each of the first ten classes, drawn
    from the training split, else from the split that there is, with the class's name and count beside them."""
    where = "train" if "train" in images.splits else next(iter(images.splits))
    x, labels = images.splits[where].images, images.splits[where].labels if where != "unlabeled" else None
    classes = labels.unique().tolist() if labels is not None else [None]
    ticks, size, gen = [], x.shape[-1], torch.Generator().manual_seed(0)
    step = size + max(1, size // 16)
    canvas = np.full((step * min(len(classes), 10), step * 8, 3), 255, np.uint8)
    for row, c in enumerate(classes[:10]):
        of = (labels == c).nonzero()[:, 0] if labels is not None else torch.arange(len(x))
        for column, i in enumerate(of[torch.randperm(len(of), generator=gen)[:8]].tolist()):
            canvas[row * step :, column * step :][:size, :size] = x[i].permute(1, 2, 0).numpy()
        name = "no label" if c is None else " ".join(images.classes[c].split())
        ticks.append(f"{name if len(name) < 25 else f'{name[:11]}...{name[-10:]}'}\n{len(of):,}")
    more = f", the first 10 of {len(classes)} classes" if len(classes) > 10 else ""
    with _figure(6.4, 0.56 * len(ticks) + 0.4) as fig:
        ax = fig.subplots()
        ax.imshow(canvas, interpolation="nearest")
        ax.set_yticks(step * np.arange(len(ticks)) + size / 2, ticks, fontsize=7, parse_math=False)
        ax.set(xticks=[], anchor="E")
        ax.set_title(f"{images.display}, {where} split{more}", parse_math=False)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    return fig


def probes(table: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint by the three probes side by side: SGD at a fixed rate favours features of large scale. What was
    trained differently has a row of its own: another w or target, the supervised network with augmentation."""
    last = table[table["epoch"] == table["of"]]
    names = [r.method + _suffix(r.method, r.w, r.augment) for r in last.itertuples()]
    names = [n + f", {t}" * (t != "standardised, mean") for n, t in zip(names, last["target"])]
    last = last.assign(method=names)
    return last.pivot_table(index=["display", "labels", "method"], columns="kind", values="mean", sort=False).round(1)


def panels(table: pd.DataFrame, draw: Callable[[plt.Axes, pd.DataFrame], Any], columns: int = 3, size: float = 2.1) -> Figure:
    """One panel per value of the column `panel`, its rows drawn by draw(ax, rows); the first panel's legend stands for all."""
    groups = list(table.groupby("panel", sort=False))
    with _figure(size * columns, size * -(-len(groups) // columns) + 0.4) as fig:
        axes = fig.subplots(-(-len(groups) // columns), columns, squeeze=False).flatten()
        for ax, (name, rows) in zip(axes, groups):
            ax.set_title(name, wrap=True)
            draw(ax, rows)
        for ax in axes[len(groups) :]:
            ax.axis("off")
        _legend(fig, axes[:1], 5)
    return fig


def scoreboard(records: Mapping[str, Sequence[dict[str, Any]]], scale: str, save: bool = False) -> pd.DataFrame:
    """`published.scoreboard` of figure -> the evaluation records that it asks for, with `save` as
    figures/<scale>/scoreboard.{csv,html} too."""
    board = published.scoreboard({figure: evaluations(found) for figure, found in records.items() if found}, scale)
    if save:
        write(paths.figures(scale) / "scoreboard.csv", board.to_csv(index=False).encode())
        page = PAGE.format(title=f"Scoreboard, {scale} scale", body=_verdicts(board))
        write(paths.figures(scale) / "scoreboard.html", page.encode())
    return board


def _verdicts(board: pd.DataFrame) -> str:
    """A scoreboard as HTML: the published numbers, and every claim's verdict, its cases on demand."""
    numbers, claims = board[board["published"].notna()], published.claims(board)
    body = [f"<h2>Published numbers</h2>{_scroll(numbers)}"] if len(numbers) else []
    body.append("<h2>Claims</h2><p>The verdict of a claim is by Holm's correction over its cases: 5 % for all of them "
                "together. Tested are cases of at least three seeds. By chance 5 % of them would be decided if there were no "
                "difference. An interval holds the seeds and the choice of the test images.</p>")
    for c in claims.itertuples():
        cases = board[(board["statement"] == c.statement) & board["published"].isna()]
        said = ", ".join(f"{getattr(c, v)} {v}" for v in published.VERDICTS if getattr(c, v))
        alone = f"; each alone: {said}, by chance {c[-1]:g}" if c.tested else ""
        body.append(f"<details><summary><b>{c.verdict}</b>: {html.escape(c.statement)} <small>({html.escape(c.paper)}, "
                    f"{html.escape(c.source)}; {c.cases} case{'s' * (c.cases > 1)}{alone})</small></summary>"
                    f"{_scroll(cases.drop(columns=['paper', 'source', 'statement', 'claim verdict']))}</details>")
    return "\n".join(body)


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }} img {{ max-width: 100% }}
figure {{ margin: 0 0 2rem }} .scroll {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: 0.85rem }}
td, th {{ padding: 0.2rem 0.6rem; border-bottom: 1px solid #ccc; text-align: left }} summary {{ cursor: pointer }}
details {{ border-bottom: 1px solid #ccc; padding: 0.3rem 0 }}</style></head><body>
<h1>{title}</h1>{body}</body></html>"""


def _scroll(table: pd.DataFrame) -> str:
    return f'<div class="scroll">{table.dropna(axis=1, how="all").to_html(index=False, na_rep="", border=0)}</div>'


def index(scale: str, records: Mapping[str, Sequence[dict[str, Any]]], notebooks: Sequence[Path] = ()) -> Path:
    """figures/<scale>/index.html: all figures, inlined, the scoreboard of figure -> evaluation records, links to the executed
    notebooks (their HTML), and on what it was made."""
    folder, body = paths.figures(scale), []
    intro = "The paper's protocol." if scale == "paper" else "Below the paper's scale: trends at most."
    links = [f'<li><a href="{os.path.relpath(nb, folder)}">{html.escape(nb.stem)}</a></li>' for nb in notebooks]
    body.append(f"<p>{intro}</p>" + (f"<h2>Notebooks</h2><ul>{''.join(links)}</ul>" if links else ""))
    for png in sorted(folder.glob("*.png")):
        image = base64.b64encode(png.read_bytes()).decode()
        title = html.escape(png.stem.replace("_", " "))
        body.append(f'<h2>{title}</h2><figure><img alt="{title}" src="data:image/png;base64,{image}"><figcaption>'
                    f'<a href="{png.stem}.csv">the plotted numbers</a></figcaption></figure>')
    if any(records.values()):
        body.append(_verdicts(scoreboard(records, scale, save=True)))
    p = provenance(device_of("auto"))
    seen = {hardware(r["provenance"]) + f", torch {r['provenance']['torch']}" for found in records.values() for r in found}
    body.append(f"<h2>Made with</h2><p>Page: sidae_lib {p['package']}, torch {p['torch']}. Records: "
                f"{html.escape('; '.join(sorted(seen)) or 'none')}.</p>")
    write(folder / "index.html", PAGE.format(title=f"SidAE figures, {html.escape(scale)} scale", body="\n".join(body)).encode())
    return folder / "index.html"


def timings(scale: str, clock: Sequence[dict[str, Any]]) -> None:
    """figures/<scale>/timings.csv: how long each notebook of a batch run took from nothing, and on what. Those of notebooks
    that were not run stay."""
    p, path = provenance(device_of("auto")), paths.figures(scale) / "timings.csv"
    table = pd.DataFrame(clock).assign(hardware=f"{hardware(p)}, torch {p['torch']}")
    if path.exists():
        old = pd.read_csv(path)
        table = pd.concat([old[~old["notebook"].isin(table["notebook"])], table]).sort_values("notebook")
    write(path, table.to_csv(index=False).encode())
