"""Records to tables, tables to figures: every chart is drawn from the CSV that is saved beside it."""

import base64
import html
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from . import data, methods, paths, published
from .config import RunConfig
from .train import device_of, provenance, write

# Okabe & Ito's colours, one per method in every figure; baselines are grey lines
COLOURS = {"sidae": "#D55E00", "simsiam": "#0072B2", "dae": "#009E73", "supervised": "#000000", "untrained": "#7F7F7F",
           "pairwise": "#56B4E9", "triplet": "#CC79A7"}
NAMES = {"sidae": "SidAE", "simsiam": "SimSiam", "dae": "Autoencoder", "supervised": "Supervised",
         "untrained": "Untrained", "pairwise": "Pairwise", "triplet": "Triplet"}
PROBES = {"linear": "SGD probe", "logistic": "logistic regression", "knn": "kNN", "finetune": "fine-tuned"}
PARTS = {"backbone": "#E69F00", "projector": "#F0E442", "predictor": "#0072B2", "decoder": "#009E73"}
MARKERS = {"sidae": "o", "simsiam": "s", "dae": "^"}
OFFSETS = {"sidae": -0.15, "simsiam": 0.0, "dae": 0.15}  # of a method's marker from its row
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 8,
         "legend.frameon": False, "svg.hashsalt": "sidae", "savefig.dpi": 200}


def hardware(p: dict[str, Any]) -> str:
    """What a provenance says of the machine, for tables and stamps."""
    return f"{p['device']}, {p['threads']} thread{'s' * (p['threads'] > 1)}"


def evaluations(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per evaluation record: what was trained, what was measured, accuracy in percent, and on what hardware."""
    rows = []
    for r in records:
        run, ask = RunConfig.from_dict(r["config"]["run"]), r["config"]
        rows.append({
            "data": r["data"]["name"], "display": r["data"]["display"], "pretrain": data.display(run.data),
            "pretrain_name": data.KNOWN.get(run.data, (run.data,))[0],
            "method": run.method, "w": run.w, "augment": run.augment, "target": f"{run.target}, {run.recon}",
            "seed": run.seed, "epoch": r["epoch"], "of": run.epochs, "kind": r["kind"], "scored": ask.get("score_on", "test"),
            "labels": ask.get("labels", 1.0), "n_train": r["n_train"], "accuracy": r["accuracy"],
            "hardware": hardware(r["provenance"]), "run_key": r["run_key"],
        })
    return pd.DataFrame(rows)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, n, and the standard error sd / sqrt(n) with n - 1 (empty for one seed)."""
    by = [c for c in frame.columns if c not in ("seed", "accuracy", "run_key", "hardware")]
    out = frame.groupby(by, sort=False).agg(
        mean=("accuracy", "mean"), se=("accuracy", "sem"), n=("accuracy", "count"),
        hardware=("hardware", lambda names: "; ".join(sorted(set(names)))))
    return out.reset_index().round({"mean": 4, "se": 4})


def variant(method: str, w: float, augment: str = "none") -> str:
    """The name a legend shows: SidAE with its w unless that is 0.5, the supervised network with its augmentation."""
    name = NAMES[method]
    if method == "supervised" and augment != "none":
        name += ", augmented"
    return f"{name}, w = {w:g}" if method == "sidae" and w != 0.5 else name


def beside_published(table: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint by the SGD probe, with the paper's Table 1 where it has the same set and share of labels."""
    last = table[(table["epoch"] == table["of"]) & table["kind"].isin(["linear", "classifier"])]
    paper = published.table(source="Table 1", protocol="frozen, linear SGD 50 epochs")
    paper = paper[paper.pretrain_data == paper.data][["data", "method", "labels", "value", "se"]]
    paper = paper.rename(columns={"value": "published", "se": "published_se"})
    out = last.merge(paper, on=["data", "method", "labels"], how="left")
    out["ours"], out["paper"] = (
        [mean_se(*pair) for pair in out[list(names)].to_numpy()] for names in (("mean", "se"), ("published", "published_se")))
    return out.assign(**{"ours / paper": ["" if np.isnan(r) else f"{r:.2f}" for r in out["mean"] / out["published"]]})


def mean_se(mean: float, se: float) -> str:
    """64.75 (0.27); no standard error is a dash, no mean is empty."""
    return "" if np.isnan(mean) else f"{mean:.2f} ({'-' if np.isnan(se) else f'{se:.2f}'})"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def gain(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy less the untrained network's by the same probe and share of labels, first and last checkpoint, in points."""
    by = ["display", "labels", "kind", "seed"]
    floor = frame[frame["method"] == "untrained"].set_index(by)["accuracy"].rename("floor")
    own = frame[frame["method"].isin(MARKERS)].join(floor, on=by, how="inner")
    own = own.assign(gain=own["accuracy"] - own["floor"])
    first = own.groupby(["display", "method"])["epoch"].transform("min")
    ends = own[(own["epoch"] == first) | (own["epoch"] == own["of"])]
    return ends.pivot_table(index=["display", "labels", "method", "epoch"], columns="kind", values="gain", sort=False).round(1)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure that pyplot makes, so that a notebook can show it, and forgets, so that it is not shown twice."""
    fig = plt.figure(figsize=(width, height), dpi=110, layout="constrained")
    plt.close(fig)
    with plt.rc_context(STYLE):  # after pyplot has chosen its backend, whose settings this would undo
        yield fig


def save(fig: Figure, name: str, scale: str, table: pd.DataFrame) -> Figure:
    """figures/<scale>/<name>.{svg,png,csv}, stamped with the scale unless it is the paper's; returns the figure."""
    n = sorted(set(table["n"])) if "n" in table else []
    stamp = f"{scale} scale" + ("" if scale == "paper" else ", not the paper's protocol")
    if n:
        stamp += f"; n = {n[0]} seed{'s' * (n[0] > 1)}" if len(n) == 1 else f"; n = {n[0]} to {n[-1]} seeds"
    lines = [stamp, *(sorted(set(table["hardware"])) if "hardware" in table else [])]
    fig.text(0.995, 0.003, "\n".join(lines), ha="right", va="bottom", fontsize=6,
             color="#7F0000" if scale != "paper" else "#444444")
    below = 0.12 * len(lines) / fig.get_figheight()  # room for these lines
    fig.get_layout_engine().set(rect=(0, below, 1, 1 - below))
    folder = paths.figures(scale)
    write(folder / f"{name}.csv", table.to_csv(index=False).encode())
    for suffix, metadata in (("svg", {"Date": None}), ("png", None)):
        with plt.rc_context(STYLE):
            fig.savefig(content := io.BytesIO(), format=suffix, metadata=metadata)
        write(folder / f"{name}.{suffix}", content.getvalue())
    return fig


def accuracy_vs_epochs(table: pd.DataFrame, kind: str = "linear") -> Figure:
    """Figures 3, 5, 6 and 7 from `summary`: one column per set, one row per share of labels, standard-error bands,
    supervised and untrained as lines; by the paper's own probe also its end points, hollow, at the right edge."""
    sets, shares = list(dict.fromkeys(table["data"])), sorted(set(table["labels"]), reverse=True)
    end = beside_published(table) if kind == "linear" else table[:0].assign(published=0.0, published_se=0.0)
    with _figure(2.6 * len(sets) + 0.6, 2.1 * len(shares) + 0.7) as fig:
        axes = fig.subplots(len(shares), len(sets), squeeze=False)
        for (row, column), ax in np.ndenumerate(axes):
            part = table[(table["data"] == sets[column]) & (table["labels"] == shares[row])]
            for line in part[(part["of"] == 0) & (part["kind"] == kind) | (part["kind"] == "classifier")].itertuples():
                style = ":" if line.method == "untrained" else "--" if line.augment == "none" else "-."
                ax.axhline(line.mean, ls=style, color=COLOURS[line.method], lw=1,
                           label=variant(line.method, line.w, line.augment))
                if line.n > 1:
                    ax.axhspan(line.mean - line.se, line.mean + line.se, color=COLOURS[line.method], alpha=0.12, lw=0)
            curves = part[(part["of"] > 0) & (part["kind"] == kind)].groupby(["method", "w"], sort=False)
            for (method, w), line in curves:
                line, marker, colour = line.sort_values("epoch"), MARKERS[method], COLOURS[method]
                style = {"ls": "--", "mfc": "white"} if w != 0.5 else {}
                ax.plot(line["epoch"], line["mean"], marker=marker, ms=3, lw=1.2, color=colour, label=variant(method, w),
                        **style)
                ax.fill_between(line["epoch"], line["mean"] - line["se"], line["mean"] + line["se"], color=colour,
                                alpha=0.2, lw=0)
                own = end[(end["data"] == sets[column]) & (end["labels"] == shares[row]) & (end["method"] == method)]
                own = own[own["w"] == w].dropna(subset="published")
                ax.errorbar(own["of"] * 1.06, own["published"], own["published_se"], fmt=marker, ms=4, mfc="none",
                            color=colour, lw=0.8, label="Published (hollow)" if len(own) else None)
            ax.set_title(f"{part['display'].iloc[0]}, {percent(shares[row])} of labels", wrap=True)
            ax.set_xlabel("pre-training epochs")
            ax.xaxis.get_major_locator().set_params(integer=True)
            if column == 0:
                ax.set_ylabel(f"test accuracy (%), {PROBES[kind]}")
        _legend(fig, axes.flat, 2 * len(sets))
    return fig


def _legend(fig: Figure, axes: Iterable[plt.Axes], columns: int) -> None:
    """One legend above all panels, every name once."""
    handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
    fig.legend(handles=handles.values(), loc="outside upper center", ncols=columns, fontsize=7)


def w_sweep(table: pd.DataFrame) -> Figure:
    """Figure 4 from `summary`: test accuracy against w, left with many and scarce labels (filled: test, hollow: the
    validation split that w is chosen by), right, scarce labels, for two scales of the reconstruction target."""
    shares = sorted(set(table["labels"]), reverse=True)
    plain = table["target"] == "standardised, mean"
    table = table.assign(w=table["w"].where(table["method"] == "sidae", (table["method"] == "simsiam").astype(float)))
    with _figure(5.8, 2.7) as fig:
        left, right = fig.subplots(1, 2, sharey=True)
        for share, colour in zip(shares, (COLOURS["sidae"], COLOURS["simsiam"])):
            for scored, style in (("test", {"ls": "-", "marker": "o"}), ("val", {"ls": ":", "marker": "o", "mfc": "white"})):
                line = table[plain & (table["labels"] == share) & (table["scored"] == scored)].sort_values("w")
                left.errorbar(line["w"], line["mean"], line["se"], ms=3, lw=1, color=colour, capsize=2, **style,
                              label=f"{percent(share)} of labels, {'test' if scored == 'test' else 'validation'}")
        scarce = table[(table["labels"] == shares[-1]) & (table["scored"] == "test")]
        ends = scarce[scarce["w"] == 1]
        targets = scarce.groupby("target", sort=False)
        for (target, part), colour, marker in zip(targets, ("#D55E00", "#009E73"), "o^"):
            line = pd.concat([part, ends]).drop_duplicates(["w"]).sort_values("w")
            right.plot(line["w"], line["mean"], color=colour, marker=marker, ms=3, lw=1, label=target)
        left.set(title=f"{table['display'].iloc[0]}", ylabel="accuracy (%), SGD probe")
        right.set_title(f"scale of the target, {percent(shares[-1])} of labels")
        right.legend(fontsize=6, title="pixels, reduction", title_fontsize=6)
        left.legend(fontsize=6)
        for ax in (left, right):
            ax.set_xlabel("w  (0: autoencoder, 1: SimSiam)")
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
        ax.invert_yaxis()
        ax.set_xlabel("test accuracy (%), SGD probe on the frozen backbone")
        _legend(fig, [ax], 3)
    return fig


def points(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per point of the maps in `tsne` evaluation records, with each map's scores."""
    parts = []
    for r in records:
        run = RunConfig.from_dict(r["config"]["run"])
        for name in ("tsne", "pca"):
            x, y = np.array(r[name]["xy"]).T
            parts.append(pd.DataFrame({"method": run.method, "w": run.w, "map": name, "x": x, "y": y, "label": r["labels"],
                                       "index": r["points"], "knn": r["accuracy"], "k": r["config"].get("k", 200),
                                       "trustworthiness": r[name]["trustworthiness"], "seed": run.seed,
                                       "display": r["data"]["display"], "n": 1, "hardware": hardware(r["provenance"])}))
            parts[-1]["class"] = [r["classes"][label] for label in r["labels"]]
    return pd.concat(parts, ignore_index=True)


def tsne(table: pd.DataFrame) -> Figure:
    """From `points`: a column per network, t-SNE above and PCA below, the same test images everywhere; below each map what
    can be trusted: kNN accuracy of the features, and the map's trustworthiness."""
    methods_, classes = list(dict.fromkeys(table["method"])), table.groupby("label")["class"].first()
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, 20))[[0, 2, 4, 6, 8, 10, 12, 14, 16, 18, *range(1, 20, 2)]]
    with _figure(1.55 * len(methods_) + 0.2, 3.9) as fig:
        axes = fig.subplots(2, len(methods_), squeeze=False)
        for (row, column), ax in np.ndenumerate(axes):
            part = table[(table["method"] == methods_[column]) & (table["map"] == ("tsne", "pca")[row])]
            for label, name in classes.items():
                own = part[part["label"] == label]
                ax.scatter(own["x"], own["y"], s=2, lw=0, color=colours[label % 20], label=name)
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(f"kNN {part['knn'].iloc[0]:.1f} %\ntrustworthiness {part['trustworthiness'].iloc[0]:.2f}", fontsize=6)
            if row == 0:
                ax.set_title(NAMES[methods_[column]])
            if column == 0:
                ax.set_ylabel(("t-SNE", "PCA")[row])
        if len(classes) <= 20:
            _legend(fig, axes.flat[:1], 6)
            for handle in fig.legends[0].legend_handles:
                handle.set_sizes([20])
    return fig


def neighbours(record: dict[str, Any], images: data.Images) -> Figure:
    """From a `tsne` evaluation record: queries of the test split (left) and their nearest training images by cosine of
    the features; a frame in the class's favour is solid, a wrong one dashed."""
    test, train = images.split("test"), images.split("train")
    near = record["neighbours"]
    with _figure(0.62 * (1 + len(near[0])) + 0.3, 0.66 * len(near) + 0.35) as fig:
        axes = fig.subplots(len(near), 1 + len(near[0]), squeeze=False)
        for row, (query, others) in enumerate(zip(record["points"], near)):
            shown = [test.images[query], *train.images[others]]
            same = [None, *(train.labels[others] == test.labels[query]).tolist()]
            for ax, x, right in zip(axes[row], shown, same):
                ax.imshow(x.permute(1, 2, 0), interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set(visible=right is not None, color="#0072B2" if right else "#D55E00", lw=1.6,
                                 ls="-" if right else "--")
        axes[0, 0].set_title("query", fontsize=6)
        method = RunConfig.from_dict(record["config"]["run"]).method
        hits = np.mean([train.labels[j].item() == test.labels[q].item() for q, o in zip(record["points"], near) for j in o])
        fig.suptitle(f"{NAMES[method]}: {100 * hits:.0f} % of the neighbours of the query's class", fontsize=7)
    return fig


def layers(config: RunConfig) -> pd.DataFrame:
    """The paper's Figure 2 as a table: every layer of encoder, projector, predictor and decoder with its output shape,
    in the order in which one forward pass meets them."""
    method, rows = methods.build(config).eval(), []

    def hook(name: str):
        def note(module: torch.nn.Module, _: Any, out: torch.Tensor) -> None:
            part, _, layer = name.partition(".")
            count = sum(p.numel() for p in module.parameters())
            rows.append((part, f"{layer} {type(module).__name__}", " x ".join(map(str, out.shape[1:])), count))
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
                  f"f{i}": (x, 2.1, encoder, "#FBE3D6"),
                  f"z{i}": (x, 3.2, f"$z_{i}$\n{z}", "#FFF7BC")}
        arrows += [(f"x{i}", f"f{i}"), (f"f{i}", f"z{i}")]
        if "decoder" in part.index:
            side = -1.5 if i == 1 else 3.5
            boxes |= {f"g{i}": (side, 3.2, f"decoder $g$\n{part['size']['decoder']:,} par.", "#D5F0E6"),
                      f"r{i}": (side, 4.2, f"$\\hat{{x}}_{i}$\n{part.output['decoder']}", "#F0F0F0"),
                      f"e{i}": (side, 5.2, f"MSE($\\hat{{x}}_{i}$, $x$)", "white")}
            arrows += [(f"z{i}", f"g{i}"), (f"g{i}", f"r{i}"), (f"r{i}", f"e{i}")]
    boxes |= {"h": (0, 4.2, f"predictor $h$\n{part['size']['predictor']:,} par.", "#D6E6F5"),
              "p1": (0, 5.2, f"$p_1$\n{part.output['predictor']}", "#FFF7BC"),
              "D": (1, 6.1, r"$D(p_1, \mathrm{sg}(z_2))$", "white")}
    arrows += [("z1", "h"), ("h", "p1"), ("p1", "D")]
    drawn = {k: ax.text(x, y, text, ha="center", va="center", fontsize=6.5,
                        bbox={"boxstyle": "round,pad=0.35", "fc": colour, "ec": "#333333", "lw": 0.7})
             for k, (x, y, text, colour) in boxes.items()}
    for a, b in [*arrows, ("z2", "D")]:
        style = {"ls": "--", "color": "#B00000"} if (a, b) == ("z2", "D") else {}
        patches = {"patchA": drawn[a].get_bbox_patch(), "patchB": drawn[b].get_bbox_patch()}
        ax.annotate("", boxes[b][:2], boxes[a][:2], arrowprops={"arrowstyle": "->", "lw": 0.8, **patches, **style})
    ax.text(1.65, 4.9, "stop-gradient", color="#B00000", fontsize=6.5)
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


def grid(rows: Sequence[torch.Tensor], labels: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> Figure:
    """Rows of normalised images (B, C, S, S), pixels brought back to [0, 1]."""
    m, s = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    with _figure(0.75 * len(rows[0]) + 0.9, 0.8 * len(rows)) as fig:
        axes = fig.subplots(len(rows), len(rows[0]), squeeze=False)
        for (r, c), ax in np.ndenumerate(axes):
            x = (rows[r][c].detach().cpu() * s + m).clamp(0, 1).permute(1, 2, 0)
            ax.imshow(x if x.shape[2] == 3 else x[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if c == 0:
                ax.set_ylabel(labels[r], rotation=0, ha="right", va="center")
    return fig


def probes(table: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint by the three probes side by side: SGD at a fixed rate favours features of large scale."""
    last = table[table["epoch"] == table["of"]]
    return last.pivot_table(index=["display", "labels", "method"], columns="kind", values="mean", sort=False).round(1)


def panels(table: pd.DataFrame, draw: Callable[[plt.Axes, pd.DataFrame], Any], columns: int = 3, size: float = 2.1) -> Figure:
    """One panel per value of the column `panel`, its rows drawn by draw(ax, rows); the first panel's legend stands for all."""
    groups = list(table.groupby("panel", sort=False))
    with _figure(size * columns, size * -(-len(groups) // columns) + 0.4) as fig:
        axes = fig.subplots(-(-len(groups) // columns), columns, squeeze=False).flatten()
        for ax, (name, rows) in zip(axes, groups):
            ax.set_title(name)
            draw(ax, rows)
        for ax in axes[len(groups) :]:
            ax.axis("off")
        _legend(fig, axes[:1], 5)
    return fig


def scoreboard(records: Sequence[dict[str, Any]], scale: str, save: bool = False) -> pd.DataFrame:
    """`published.scoreboard` of these evaluation records, with `save` as figures/<scale>/scoreboard.{csv,html} too."""
    board = published.scoreboard(evaluations(records), scale)
    if save:
        write(paths.figures(scale) / "scoreboard.csv", board.to_csv(index=False).encode())
        page = PAGE.format(title=f"Scoreboard, {scale} scale", body=_scroll(board))
        write(paths.figures(scale) / "scoreboard.html", page.encode())
    return board


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }} img {{ max-width: 100% }}
figure {{ margin: 0 0 2rem }} .scroll {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: 0.85rem }}
td, th {{ padding: 0.2rem 0.6rem; border-bottom: 1px solid #ccc; text-align: left }}</style></head><body>
<h1>{title}</h1>{body}</body></html>"""


def _scroll(table: pd.DataFrame) -> str:
    return f'<div class="scroll">{table.dropna(axis=1, how="all").to_html(index=False, na_rep="", border=0)}</div>'


def index(scale: str, records: Sequence[dict[str, Any]] = (), notebooks: Sequence[Path] = ()) -> Path:
    """figures/<scale>/index.html: all figures, inlined, the scoreboard of these evaluation records, links to the executed
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
    if records:
        body.append(f"<h2>Scoreboard</h2>{_scroll(scoreboard(records, scale, save=True))}")
    p = provenance(device_of("auto"))
    seen = {hardware(r["provenance"]) + f", torch {r['provenance']['torch']}" for r in records}
    body.append(f"<h2>Made with</h2><p>Page: sidae_lib {p['package']}, torch {p['torch']}. Records: "
                f"{html.escape('; '.join(sorted(seen)) or 'none')}.</p>")
    write(folder / "index.html", PAGE.format(title=f"SidAE figures, {html.escape(scale)} scale", body="\n".join(body)).encode())
    return folder / "index.html"


def timings(scale: str, clock: Sequence[dict[str, Any]]) -> None:
    """figures/<scale>/timings.csv: how long each notebook of a batch run took from nothing, and on what."""
    p = provenance(device_of("auto"))
    table = pd.DataFrame(clock).assign(hardware=f"{hardware(p)}, torch {p['torch']}")
    write(paths.figures(scale) / "timings.csv", table.to_csv(index=False).encode())
