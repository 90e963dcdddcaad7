"""Tables to figures: every chart is drawn from the CSV that is saved beside it."""

import io
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from . import claims, frames, methods, paths, train
from .config import RunConfig

if TYPE_CHECKING:  # slow to import: late, in the functions that need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is no method has a colour of no method, and dark to light, so that it is told apart without its hue
SHARES = ("#4400CC", "#DE37FF")  # of the labels: many, scarce
PARTS = {"backbone": "#850000", "projector": "#FFC4C4", "predictor": "#EF0000", "decoder": "#FF7272"}
CLASSES = ("#3F90DA", "#FFA90E", "#BD1F01", "#94A4A2", "#832DB6", "#A96B59", "#E76300", "#B9AC70", "#717581",
           "#92DADD", "#1F486D", "#805407", "#5E0F00", "#4A5251", "#41165B", "#54352C", "#733100", "#5C5638",
           "#383A40", "#496D6E")
INK = "#444444"  # zero lines, frames and what stands for all methods alike
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 8,
         "figure.labelsize": 8, "legend.frameon": False, "svg.hashsalt": "sidae", "savefig.dpi": 200}


@contextmanager
def figure(width: float, height: float) -> Iterator["Figure"]:
    """A figure to draw into, in inches. In the end one legend above holds the labels of axes that have none.

    pyplot makes it, so that a notebook can show it, and forgets it, so that it is not shown twice.
    """
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=(width, height), dpi=110, layout="constrained")
    plt.close(fig)
    with plt.rc_context(STYLE):  # after pyplot has chosen its backend, whose settings this would undo
        yield fig
        _legend(fig)


def _legend(fig: "Figure") -> None:
    """Every label once, above all panels, in as few lines as the width allows."""
    named: dict[str, Any] = {}
    for ax in [ax for panel in fig.axes for ax in (panel, *panel.child_axes) if not ax.get_legend()]:
        for handle, label in zip(*ax.get_legend_handles_labels()):  # type: ignore[attr-defined]
            named.setdefault(label, handle)
    for lines in range(1, len(named) + 1):
        columns = -(-len(named) // lines)
        legend = fig.legend(named.values(), named, loc="outside upper center", ncols=columns, fontsize=7)
        if legend.get_window_extent().width < fig.bbox.width or columns == 1:
            break
        legend.remove()
    for dots in (h for legend in fig.legends for h in legend.legend_handles if hasattr(h, "set_sizes")):
        dots.set_sizes([20])  # a map's are too small to tell their colours


def panels(table: pd.DataFrame, draw: Callable[["Axes", pd.DataFrame], Any], columns: int = 3,
           size: float = 2.1, wide: float = 1.0, sharey: bool = False, **axes: Any) -> "Figure":
    """One panel per value of the column `panel`, its title, whose rows draw(ax, rows) draws.

    size: a panel's height in inches.  wide: its width by its height.  axes: what `Axes.set` takes, for each.
    """
    groups = list(table.groupby("panel", sort=False, observed=True))
    lines = -(-len(groups) // columns)
    with figure(size * wide * columns, size * lines + 0.4) as fig:
        grid = fig.subplots(lines, columns, squeeze=False, sharey=sharey).flatten()
        for k, (name, rows) in enumerate(groups):
            grid[k].set_title(name, wrap=True)
            draw(grid[k], rows)
            grid[k].set(**axes if k % columns == 0 else {**axes, "ylabel": ""})
        for ax in grid[len(groups) :]:
            ax.axis("off")
    return fig


def save(fig: "Figure", name: str, scale: str, table: pd.DataFrame) -> "Figure":
    """figures/<scale>/<name>.{svg,png,csv}, stamped with scale, n and hardware; returns the figure."""
    from matplotlib import rc_context

    stamp = f"{scale} scale" + ("" if scale == "paper" else ", not the paper's protocol")
    if n := sorted(set(table.get("n", []))):
        stamp += f"; n = {n[0]}" + f" to {n[-1]}" * (len(n) > 1) + " seed" + "s" * (n[-1] > 1)
    lines = [stamp, *sorted({h for one in table.get("hardware", []) for h in one.split("; ")})]
    colour = INK if scale == "paper" else "#7F0000"
    fig.text(0.995, 0.003, "\n".join(lines), ha="right", va="bottom", fontsize=6, color=colour)
    below = 0.12 * len(lines) / fig.get_figheight()  # room for these lines
    fig.get_layout_engine().set(rect=(0, below, 1, 1 - below))  # type: ignore[call-arg]
    png, svg, file = io.BytesIO(), io.BytesIO(), paths.figures(scale) / name
    with rc_context(STYLE):  # how many ticks there are depends on the size of their labels
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
        for ax in fig.axes:  # the layout differs in its last bit from call to call, and SVG's ids with it
            ax.set_position([round(v, 6) for v in ax.get_position(original=True).bounds])
        fig.savefig(png, format="png")
        fig.savefig(svg, format="svg", metadata={"Date": None})
    train.write(file.with_suffix(".csv"), table.to_csv(index=False).encode())
    train.write(file.with_suffix(".png"), small(png.getvalue()))
    if not any(c.get_rasterized() for ax in fig.axes for c in ax.collections):  # a map's has the same pixels
        train.write(file.with_suffix(".svg"), svg.getvalue())
    return fig


def small(png: bytes) -> bytes:
    """A chart in 256 colours, a third of the size; a picture that loses by it stays as it is."""
    from PIL import Image

    full, out = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    few = full.quantize(256, dither=Image.Dither.NONE)
    if np.abs(np.asarray(full, float) - np.asarray(few.convert("RGB"), float)).mean() > 0.5:
        return png
    few.save(out, "PNG", optimize=True)
    return out.getvalue()


LOOK = ["series", "colour", "marker", "line", "hollow"]  # of a curve; without a line: points with error bars


def looks(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns of LOOK by method, w and augmentation."""
    def look(method: str, w: float = 0.5, augment: str = "none") -> tuple:
        line = {"untrained": ":", "supervised": "--" if augment == "none" else "-."}.get(method, "-")
        name, marker = frames.variant(method, w, augment), methods.MARKERS.get(method, "")
        return name, methods.COLOURS[method], marker, line if w == 0.5 else "--", w != 0.5

    found = [look(*row) for row in table.filter(["method", "w", "augment"]).itertuples(index=False)]
    return table.assign(**pd.DataFrame(found, table.index, LOOK))


def curves(table: pd.DataFrame, x: str, columns: int = 3, size: float = 2.3, **axes: Any) -> "Figure":
    """`mean` over the column x, per `panel` and LOOK, with bands of standard errors, or from `low` to `high`.

    Points of different n are never joined: means over fewer seeds are small marks beside the curve. Points
    beyond the panel's curves stand in a strip of their own, whose one tick they are. Rows with `own` are thin
    lines on top.
    """
    table = table if "own" in table else table.assign(own=False)
    if "low" not in table:
        table = table.assign(low=table["mean"] - table["se"], high=table["mean"] + table["se"])

    def draw(ax: "Axes", rows: pd.DataFrame) -> None:
        last, strips = rows.loc[rows["line"] != "", x].max(), cast(list[Any], ax.child_axes)
        for (series, colour, marker, line, hollow, mine), own in rows.groupby([*LOOK, "own"], sort=False):
            if mine:
                ax.plot(own[x], own["mean"], color=colour, lw=0.7, ls=(0, (4, 1)), label=series, zorder=3)
                continue
            own, most, end = own.sort_values(x), own["n"].max(), own[x].max()
            look = {"color": colour, "marker": marker, "mfc": "white" if hollow else colour, "ls": line}
            if line:
                own, fewer = own[own["n"] == most], own[own["n"] < most]
                ax.plot(own[x], own["mean"], ms=3, lw=1.2, label=series, **look)
                ax.fill_between(own[x], own["low"], own["high"], color=colour, alpha=0.2, lw=0)
                if len(fewer):
                    look |= {"ls": "", "marker": marker or "o", "label": "fewer seeds (small)"}
                    ax.plot(fewer[x], fewer["mean"], ms=2, alpha=0.5, **look)
                continue
            if end > last and not strips:
                strip = ax.inset_axes((1.05, 0, 0.1, 1), sharey=ax)
                strip.set(xticks=[end], xlim=(end - 1, end + 1))
                strip.tick_params(left=False, labelleft=False)
                strip.spines["left"].set_visible(False)
            place = strips[0] if end > last else ax
            bars = [own["mean"] - own["low"], own["high"] - own["mean"]]
            place.errorbar(own[x], own["mean"], bars, ms=4, lw=0.8, label=series, **look)

    return panels(table, draw, columns, size, **axes)


def accuracy_vs_epochs(table: pd.DataFrame, kind: str = "linear") -> "Figure":
    """Figures 3, 5, 6 and 7 from `summary`: a column per set, a row per share of labels. The paper's ends
    are hollow, and a title says how far the curves of unfinished runs have come. Rows of `frames.apart` that
    are the reader's own are thin lines on top of the others."""
    parts, table = [], table.sort_values("labels", ascending=False, kind="stable")
    mine = table["own"] if "own" in table else pd.Series(False, table.index)
    table, mine = table[~mine].drop(columns="own", errors="ignore"), table[mine & (table["of"] > 0)]
    for _, rows in table.groupby(["labels", "data"], sort=False):
        first, own = rows.iloc[0], rows["kind"] == kind
        trained = rows[own & (rows["of"] > 0)]
        flat = rows[own & (rows["of"] == 0) | (rows["kind"] == "classifier")]
        ends = (0, 1) if trained.empty else (trained["epoch"].min(), trained["of"].max())
        paper = claims.beside_published(trained).dropna(subset="published")
        paper = paper.drop(columns=["epoch", "mean", "se"]).rename(
            columns={"published_epochs": "epoch", "published": "mean", "published_se": "se"})
        pools = [f"{pool} to" for pool in trained["pretrain"].unique() if pool != first.display]
        title = [*pools, f"{first.display}, {frames.percent(first.labels)} of labels"]
        title += [line for line in frames.reach(trained).split("; ") if line]
        shown = [looks(part) for part in (*(flat.assign(epoch=epoch) for epoch in ends), trained)]
        shown.append(looks(paper).assign(series="Published (hollow)", line="", hollow=True))
        thin = mine[(mine["labels"] == first.labels) & (mine["data"] == first.data) & (mine["kind"] == kind)]
        if len(thin):
            shown.append(looks(thin).assign(series="your own run (thin)", line="-"))
        shown = [part.assign(own=n > 3) for n, part in enumerate(shown)]
        parts.append(pd.concat(shown).assign(panel="\n".join(title)))
    sets = table["data"].nunique()
    fig = curves(pd.concat(parts), "epoch", sets if sets > 1 else len(parts), wide=1.2,
                 xlabel="pre-training epochs", ylabel=f"test accuracy (%), {frames.PROBES[kind]}")
    for ax in fig.axes:
        ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    return fig


def w_sweep(table: pd.DataFrame) -> "Figure":
    """Figure 4 from `summary`: accuracy against w, left with many and scarce labels, validation hollow, right
    with scarce labels for two scales of the target. A colour is a share of the labels, a marker a target."""
    shares, simsiam = sorted(set(table["labels"]), reverse=True), table["method"] == "simsiam"
    table = table.assign(w=table["w"].where(table["method"] == "sidae", simsiam.astype(float)), marker="o",
                         hollow=table["scored"] == "val")
    table["colour"] = table["labels"].map(dict(zip(shares, SHARES)))
    table["line"] = table["hollow"].map({True: ":", False: "-"})
    scored = table["scored"].replace("val", "validation")
    series = table["labels"].map(frames.percent) + " of labels, " + scored
    left = table.assign(panel=table["display"], series=series)[table["target"] == frames.PLAIN]
    right = table[~table["hollow"] & (table["labels"] == shares[-1])]
    right = right.assign(panel=f"scale of the target, {frames.percent(shares[-1])} of labels")
    parts, ends = [left], right[right["w"] == 1]  # SimSiam has no target
    for (target, part), marker, line in zip(right.groupby("target", sort=False), "o^", ("-", "--")):
        part = pd.concat([part, ends]).drop_duplicates("w")
        parts.append(part.assign(series=f"target {target}", marker=marker, line=line))
    return curves(pd.concat(parts), "w", 2, 2.6, wide=1.2, sharey=True, ylabel="accuracy (%), SGD probe",
                  xlabel="w  (0: autoencoder, 1: SimSiam)")


def your_own_images(table: pd.DataFrame) -> "Figure":
    """The learning curve of notebook 10 from `summary`: accuracy against the number of labels."""
    table = table.sort_values("method", key=lambda names: names.map(list(methods.NAMES).index))
    table = looks(table.assign(panel=table["display"] + ": how far the labels reach"))
    fig = curves(table, "n_train", 1, 2.6, wide=1.7, xscale="log",
                 xlabel="labels", ylabel="test accuracy (%)")
    ticks = sorted(set(table["n_train"]))
    fig.axes[0].set_xticks(ticks, [f"{n:,}" for n in ticks])
    fig.axes[0].minorticks_off()
    return fig


def pair_accuracy(table: pd.DataFrame) -> "Figure":
    """From `pair_table`: how many pairs are right, by the number taken and by the encoder's epoch."""
    many = table.groupby(["panel", "series"])["x"].transform("size") >= 20
    table = table.rename(columns={"accuracy": "mean"}).assign(marker=np.where(many, "", "o"), hollow=False)
    table = table.sort_values("panel", ascending=False, kind="stable")
    titles = {"pairs per image": "More pairs, lower threshold", "epoch": "Longer training"}
    table["panel"] = table["panel"].map(titles)
    fig = curves(table, "x", 2, 3.4, sharey=True, ylim=(0, 102), ylabel="pairs of one class (%)")
    fig.axes[0].set(xscale="log", xlabel="pairs per image")
    fig.axes[1].set_xlabel("encoder's epoch")
    return fig


def accuracy_vs_cost(table: pd.DataFrame) -> "Figure":
    """`side_by_side` as a picture: accuracy against the arithmetic of training (seconds are a machine's)."""
    bare, ends = table["untrained"], table[["untrained", "logistic"]]
    table = looks(table.assign(mean=table["logistic"], low=ends.min(axis=1), high=ends.max(axis=1)))
    floor = looks(table.assign(method="untrained", mean=bare, low=bare, high=bare)).assign(marker="_")
    table = pd.concat([floor, table.replace({"marker": {"": "o"}})])
    table = table.assign(line="", panel="Equal images seen, " + table["display"])
    fig = curves(table, "gflop", 1, 3.6, wide=1.7, ylabel=f"test accuracy (%), {frames.PROBES['logistic']}",
                 xlabel="arithmetic of training, forward and backward (GFLOP per image)", xscale="log")
    fig.axes[0].xaxis.get_major_locator().set_params(subs=(1, 2, 5))  # type: ignore[call-arg]
    fig.axes[0].xaxis.set(major_formatter="{x:g}", minor_formatter="")
    return fig


def semantic_pairs(table: pd.DataFrame) -> "Figure":
    """From `pair_gains`, the last epoch: what each kind of pairs adds, one panel per probe."""
    one = ["display", "method", "kind", "labels", "pairs"]
    table = table[table["epoch"] == table["of"]].drop_duplicates(one)
    kinds, names = ["wrong", "random", "mined", "oracle"], list(table["method"].unique())
    aside = 0.7 * ((table["method"].map(names.index) + 0.5) / len(names) - 0.5)
    panel = table["display"] + ", " + table["kind"].map(frames.PROBES)
    table = looks(table.assign(panel=panel, mean=table["gain"], x=table["pairs"].map(kinds.index) + aside))
    table = table.assign(line="").replace(np.inf, np.nan)  # of one seed there is no interval
    fig = curves(table, "x", panel.nunique(), 2.5, sharey=True, xlim=(-0.5, 3.5), xlabel="pairs",
                 ylabel="gain over no pairs (points),\nbars: 95 % interval")
    for ax in fig.axes:
        ax.axhline(0, color=INK, lw=0.8)
        ax.set_xticks(range(4), kinds)
    return fig


def diagnose(record: dict[str, Any]) -> "Figure":
    """One run's training: loss terms, spread and rank of the projection, gradients, learning rate and
    nearest neighbours beside the untrained network's; below, the `findings`."""
    import seaborn as sns

    sentences, config = frames.findings(record), RunConfig.from_dict(record["config"])
    colour = methods.COLOURS[config.method]
    titles = {"l": "loss and its terms", "z": "spread of the projection, z_std",
              "rank": "effective rank of the projection", "grad": "gradient norm at the epoch's end",
              "lr": "learning rate", "knn": "nearest neighbour of the same class (%)"}
    table = pd.DataFrame(record["epochs"]).melt("epoch", var_name="name").dropna()
    panel = table["name"].replace("loss", "l").str.split("_").str[0].map(titles)
    table["name"] = table["name"].str.removeprefix("grad_")
    table["panel"] = pd.Categorical(panel, titles.values())
    levels = {titles["knn"]: ("untrained", record["untrained"].get("knn"))}
    if not methods.METHODS[config.method].labels:
        levels[titles["z"]] = "healthy", config.dim**-0.5

    def draw(ax: "Axes", rows: pd.DataFrame) -> None:
        palette = {name: PARTS.get(name, colour) for name in rows["name"]}
        by = {"x": "epoch", "y": "value", "hue": "name", "style": "name"}
        sns.lineplot(rows, **by, palette=palette, estimator=None, ax=ax)
        label, y = levels.get(ax.get_title(), ("", None))
        if y is not None:
            ax.axhline(y, ls=":", color=methods.COLOURS["untrained"], lw=1, label=label)
        ax.set(ylabel="", yscale="log" if ax.get_title() == titles["grad"] else "linear")
        ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
        if ax.get_title() in (titles["z"], titles["rank"]):
            ax.set_ylim(0)  # where collapse is
        ax.legend(fontsize=6)

    fig = panels(table.sort_values("panel", kind="stable"), draw, 3, 2, wide=1.2)
    fig.supxlabel(textwrap.fill(" ".join(sentences), 130), fontsize=7, ha="left", x=0.01)
    return fig


def datasets_table(table: pd.DataFrame) -> "Figure":
    """Table 1 as a chart from `beside_published`: a line per set and share of labels, published hollow."""
    table = table[(table["method"] != "supervised") | (table["augment"] == "none")]
    rows = table.groupby(["pretrain", "display", "labels"], sort=False)
    names = [("" if pool == display else f"{pool}\nto ") + f"{display}, {frames.percent(labels)}"
             for pool, display, labels in table.loc[rows.head(1).index, list(rows.keys)].to_numpy()]
    with figure(5.4, 0.42 * len(names) + 1.2) as fig:
        ax = fig.subplots()
        for method, own in table.assign(row=rows.ngroup()).groupby("method", sort=False):
            at = own["row"] + {"sidae": -0.15, "dae": 0.15}.get(method, 0.0)
            look = {"fmt": methods.MARKERS.get(method, "|"), "color": methods.COLOURS[method]}
            look |= {"ms": 4, "lw": 0.8}
            ax.errorbar(own["mean"], at, xerr=own["se"], label=methods.NAMES[method], **look)
            published = "Published (hollow)" if own["published"].notna().any() else None
            ax.errorbar(own["published"], at, xerr=own["published_se"], mfc="none", label=published, **look)
        ax.set_yticks(range(len(names)), names)
        ax.set(ylim=(len(names) - 0.6, -0.4), xlabel="test accuracy (%), SGD probe on the frozen backbone")
    return fig


def tsne(table: pd.DataFrame) -> "Figure":
    """From `points`: a column per network, t-SNE above PCA; below a map what can be trusted of it."""
    def draw(ax: "Axes", rows: pd.DataFrame) -> None:
        for (label, name), own in rows.groupby(["label", "class"]):
            name = name if table["label"].nunique() <= 20 else None
            ax.scatter(own["x"], own["y"], s=2, lw=0, color=CLASSES[label % 20], label=name, rasterized=True)
        knn, trust = rows[["knn", "trustworthiness"]].iloc[0]
        trusted = "-" if np.isnan(trust) else f"{trust:.2f}"
        ax.set_xlabel(f"kNN {knn:.1f} %\ntrustworthiness {trusted}", fontsize=6)

    panel = table["method"].map(methods.NAMES) + table["map"].map({"tsne": ", t-SNE", "pca": ", PCA"})
    table = table.assign(panel=panel).sort_values("map", ascending=False, kind="stable")
    return panels(table, draw, table["method"].nunique(), 1.75, wide=0.9, xticks=[], yticks=[])


def five_axes(table: pd.DataFrame) -> "Figure":
    """AMDIM, CPC and YADIM from `summary`, a row per method and axis: every choice's accuracy, own
    filled, few seeds small, over the spread that the paper's claim is about; a tick is the untrained one."""
    table = table.fillna({"varied": ""})
    rows = [(m, axis, part) for m in ("yadim", "amdim", "cpc_v2") for axis, part in claims.choices(table, m)]
    with figure(7.2, 0.5 * len(rows) + 0.9) as fig:
        ax, bare = fig.subplots(), frames.untrained(table)
        small = {"ha": "center", "fontsize": 5.5, "bbox": {"fc": "white", "ec": "none", "pad": 0.4}}
        for y, (m, axis, part) in enumerate(rows):
            most, look = part["n"].max(), {"color": methods.COLOURS[m], "marker": methods.MARKERS[m]}
            ends = part["mean"][part["n"] == most].agg(["min", "max"])
            ax.plot(ends, (y, y), color=look["color"], lw=6, alpha=0.15, solid_capstyle="butt")
            ax.plot(bare[m], y, "|", ms=16, color=methods.COLOURS["untrained"], label="Untrained encoder")
            for p, lift in zip(part.sort_values("mean").itertuples(), cycle((4, -10, 10, -16))):
                face, name = "white", p.choice if len(p.choice) < 18 else "as bolts counts"
                if p.own:
                    face, name = look["color"], methods.METHODS[m].own[axis]
                ax.errorbar(p.mean, y, xerr=p.se, ms=5 if p.n == most else 2, mfc=face, **look)
                ax.annotate(name, (p.mean, y), (0, lift), textcoords="offset points", **small)
        ax.set_yticks(range(len(rows)), [f"{methods.NAMES[m]}: {axis}" for m, axis, _ in rows])
        first = table.iloc[0]
        ax.set(title=f"One choice changed at a time, {first.display}", ylim=(len(rows) - 0.25, -0.6),
               xlabel=f"test accuracy (%), {frames.PROBES[first.kind]}")
        ax.margins(x=0.08)
    return fig
