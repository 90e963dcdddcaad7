"""Pictures of networks, of images and of a run in training."""

import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from . import data, figures, frames, methods, train
from .config import RunConfig

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def layers(config: RunConfig) -> pd.DataFrame:
    """The paper's Figure 2 as a table: every layer of all four parts with its output
    shape, in the order of one forward pass."""
    method, rows = methods.build(config).eval(), []

    def note(name: str, module: torch.nn.Module, out: torch.Tensor) -> None:
        part, _, layer = name.partition(".")
        kind = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))  # not ours
        shape = " x ".join(map(str, out.shape[1:]))
        rows.append({"part": part, "layer": f"{layer} {kind.__name__}", "output": shape,
                     "parameters": sum(p.numel() for p in module.parameters())})

    for name, module in method.named_modules():
        if name and not list(module.children()):
            module.register_forward_hook(lambda module, _, out, name=name: note(name, module, out))
    with torch.no_grad():
        z = method.projector(method.backbone(torch.zeros(2, config.channels, config.size, config.size)))
        for head in filter(None, (method.predictor, method.decoder)):
            head(z)
    return pd.DataFrame(rows)


def _flow(ax: "Axes", config: RunConfig, title: str) -> None:
    """One architecture as boxes and arrows; every size is read from the modules."""
    part = layers(config).groupby("part").agg(output=("output", "last"), size=("parameters", "sum"))
    image, grey, colour = f"{config.channels} x {config.size} x {config.size}", "#F0F0F0", figures.PARTS
    size = {name: f"{n:,} par." for name, n in part["size"].items()}
    size["encoder"] = f"{config.backbone} + projector\n{part['size'][['backbone', 'projector']].sum():,} par."

    def arrow(start: Any, end: Any, **style: Any) -> None:
        ends = {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
        look = {"arrowstyle": "->", "lw": 0.8, **ends, **style}
        ax.annotate("", end.get_position(), start.get_position(), arrowprops=look)

    def box(x: float, y: float, text: str, fill: str = "white", *after: Any) -> Any:
        shape = {"boxstyle": "round,pad=0.35", "fc": fill, "ec": "#333333", "lw": 0.7}
        drawn = ax.text(x, y, text, ha="center", va="center", fontsize=6.5, bbox=shape)
        for start in after:
            arrow(start, drawn)
        return drawn

    x, z = box(1, 0, f"image $x$\n{image}", grey), {}
    for i, at, side in ((1, 0, -1.5), (2, 2, 3.5)):
        view = box(at, 1, f"view $x_{i} = a_{i}(x)$\n{image}", grey, x)
        encoder = box(at, 2.1, f"encoder $f$\n{size['encoder']}", colour["backbone"] + "30", view)
        z[i] = box(at, 3.2, f"$z_{i}$\n{part.output['projector']}", "white", encoder)
        if "decoder" in size:
            decoder = box(side, 3.2, f"decoder $g$\n{size['decoder']}", colour["decoder"] + "AA", z[i])
            made = box(side, 4.2, f"$\\hat{{x}}_{i}$\n{part.output['decoder']}", grey, decoder)
            box(side, 5.2, f"MSE($\\hat{{x}}_{i}$, $x$)", "white", made)
    predictor = box(0, 4.2, f"predictor $h$\n{size['predictor']}", colour["predictor"] + "30", z[1])
    p1 = box(0, 5.2, f"$p_1$\n{part.output['predictor']}", "white", predictor)
    arrow(z[2], box(1, 6.1, r"$D(p_1, \mathrm{sg}(z_2))$", "white", p1), ls="--", color=figures.INK)
    ax.text(1.65, 4.9, "stop-gradient", color=figures.INK, fontsize=6.5)
    ax.set(xlim=(-2.1, 4.1) if "decoder" in size else (-0.7, 2.7), ylim=(-0.5, 6.4), title=title)
    ax.axis("off")


def architecture(config: RunConfig) -> "Figure":
    """The paper's Figure 1 from the code's own modules: SimSiam left, SidAE right (one side of the loss)."""
    same = ("backbone", "stem", "width", "dim", "hidden", "pred_hidden", "channels", "size")
    simsiam = RunConfig(method="simsiam", data="", **{k: getattr(config, k) for k in same})
    with figures.figure(7.6, 4) as fig:
        left, right = fig.subplots(1, 2, width_ratios=(3.4, 6.2))
        _flow(left, simsiam, "SimSiam")
        _flow(right, simsiam.replace(method="sidae", decoder=config.decoder), "SidAE")
    return fig


def structure(table: pd.DataFrame) -> "Figure":
    """The paper's Figure 2 drawn from `layers`: channels and map of every weight layer on the way through."""
    names = {"Conv2d": "conv", "MaxPool2d": "pool", "Linear": "linear", "ConvTranspose2d": "transposed"}
    table = table.assign(kind=table["layer"].str.split().str[-1].map(names))
    table = table[~table["layer"].str.contains("downsample")].dropna(subset="kind")  # without the shortcuts
    shapes = table["output"].str.split(" x ", expand=True).astype(float)  # channels, and the map's sides
    with figures.figure(7.2, 3) as fig:
        ax, x = fig.subplots(), np.arange(len(table))
        for name, colour in figures.PARTS.items():
            own = (table["part"] == name).to_numpy()
            ax.bar(x[own], shapes[0][own], color=colour, label=name)
        for k, (channels, side) in enumerate(shapes[[0, 1]].fillna(0).itertuples(index=False)):
            ax.text(k, channels * 1.08, f"{side:g}²" if side else "1", ha="center", fontsize=6)
        ax.set_yscale("log", base=2)
        ax.set_xticks(x, table["kind"], rotation=90, fontsize=6)
        ax.set(ylabel="channels", title="Output of every weight layer; above each bar the size of its map")
    return fig


def pictures(rows: Sequence[torch.Tensor], labels: Sequence[str], titles: Sequence[str] = ()) -> "Figure":
    """Rows of images (B, C, S, S) in [0, 1], each with its label on the left, a title above each column."""
    from torchvision.utils import make_grid

    size, columns = rows[0].shape[-1], max(map(len, rows))
    step = size + (gap := max(2, size // 12))
    white = torch.ones(columns, *rows[0].shape[1:])
    full = torch.cat([torch.cat([row.detach().cpu().clamp(0, 1), white[len(row) :]]) for row in rows])
    canvas = make_grid(full, nrow=columns, padding=gap, pad_value=1.0)
    middle = [gap + step * k + size / 2 for k in range(max(columns, len(rows)))]
    with figures.figure(0.7 * columns + 1.2, 0.7 * len(rows) + 0.4) as fig:
        ax = fig.subplots()
        ax.imshow(canvas.permute(1, 2, 0), interpolation="nearest")
        ax.set_yticks(middle[: len(rows)], labels)
        ax.set_xticks(middle[: len(titles)], titles)
        ax.tick_params(length=0, labeltop=True, labelbottom=False)
        ax.spines[:].set_visible(False)
    return fig


def grid(rows: Sequence[torch.Tensor], labels: Sequence[str], mean: Sequence[float], std: Sequence[float],
         titles: Sequence[str] = ()) -> "Figure":
    """`pictures` of normalised images, pixels brought back to [0, 1]."""
    m, s = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    return pictures([x.detach().cpu() * s + m for x in rows], labels, titles)


def sheet(images: data.Images) -> "Figure":
    """A contact sheet, to see whether a set was read as it was meant: eight images of each of the first ten
    classes, of the training split if there is one, beside the class's name and count."""
    where = "train" if "train" in images.splits else next(iter(images.splits))
    split, gen, rows, names = images.splits[where], torch.Generator().manual_seed(0), [], []
    labels = split.labels if where != "unlabeled" else None
    classes = [-1] if labels is None else labels.unique().tolist()
    for c in classes[:10]:
        own = torch.arange(len(split.images)) if labels is None else (labels == c).nonzero()[:, 0]
        rows.append(split.images[own[torch.randperm(len(own), generator=gen)[:8]]] / 255)
        name = "no label" if labels is None else " ".join(images.classes[c].split())
        names.append(f"{name if len(name) < 25 else f'{name[:11]}...{name[-10:]}'}\n{len(own):,}")
    more = f", the first 10 of {len(classes)} classes" if len(classes) > 10 else ""
    fig = pictures(rows, [name.replace("$", r"\$") for name in names])
    fig.axes[0].set_title(f"{images.display}, {where} split{more}", parse_math=False, fontsize=8)
    return fig


def neighbours(record: dict[str, Any]) -> "Figure":
    """From a `tsne` evaluation record: queries of the test split (left) and their nearest training images
    by the features' cosine, in a solid frame where the class is right, else in a dashed one.

    Records before 0.2 hold no thumbnails: then the image set is needed, or SidaeError is raised.
    """
    from matplotlib.patches import Rectangle

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
    numbers = [str(k + 1) for k in range(len(near[0]))]
    fig = pictures([s / 255 for s in shown], [""] * len(shown), ["query", *numbers])
    (ax,), size = fig.axes, run.size
    for (row, column), good in np.ndenumerate(right):
        x, y = ax.get_xticks()[column + 1] - size / 2 - 0.5, ax.get_yticks()[row] - size / 2 - 0.5
        look = {"color": figures.INK, "lw": 1.6, "ls": "-" if good else "--"}
        ax.add_patch(Rectangle((x, y), size, size, fill=False, **look))
    share = f"{100 * right.mean():.0f} % of the neighbours of the query's class"
    fig.suptitle(f"{methods.NAMES[run.method]}: {share}\nimages: {record['data']['display']}", fontsize=7)
    return fig


@contextmanager
def live(seconds: float = 5.0) -> Iterator[None]:
    """While this is open in a notebook, loss and z_std of the run in training stand below the cell, drawn
    anew every few seconds, and away at the end. Elsewhere, and with TQDM_DISABLE, nothing happens."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel") or "TQDM_DISABLE" in os.environ:
        yield
        return
    from IPython.display import display

    shown, drawn = display({"text/plain": ""}, raw=True, display_id=True), time.monotonic()

    def draw(config: RunConfig, history: list[dict[str, Any]]) -> None:
        nonlocal drawn
        if time.monotonic() - drawn > seconds:
            rows = pd.DataFrame(history).melt("epoch", ["loss", "z_std"], "panel")
            with figures.figure(3.6, 2.2) as fig:
                for ax, (name, own) in zip(fig.subplots(1, 2), rows.groupby("panel")):
                    ax.plot(own["epoch"], own["value"], color=methods.COLOURS.get(config.method))
                    ax.set(title=name, xlabel="epoch")
                fig.suptitle(f"{methods.NAMES[config.method]}, seed {config.seed}")
            shown.update(fig)
            drawn = time.monotonic()

    train.LISTENERS.append(draw)
    try:
        yield
    finally:
        train.LISTENERS.remove(draw)
        shown.update({"text/plain": ""}, raw=True)


def diagnose(record: dict[str, Any]) -> "Figure":
    """One run's training: loss terms, spread and rank of the projection, gradients, learning rate and
    nearest neighbours beside the untrained network's; below, the `frames.findings`."""
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

    table = table.sort_values("panel", kind="stable")
    with figures.figure(7.2, 4.4) as fig:
        for ax, (title, rows) in zip(fig.subplots(2, 3).flat, table.groupby("panel", sort=False, observed=True)):
            palette = {name: figures.PARTS.get(name, colour) for name in rows["name"]}
            by = {"x": "epoch", "y": "value", "hue": "name", "style": "name"}
            sns.lineplot(rows, **by, palette=palette, estimator=None, ax=ax)
            label, y = levels.get(title, ("", None))
            if y is not None:
                ax.axhline(y, ls=":", color=methods.COLOURS["untrained"], lw=1, label=label)
            ax.set(title=title, ylabel="", yscale="log" if title == titles["grad"] else "linear")
            ax.xaxis.get_major_locator().set_params(integer=True)
            if title in (titles["z"], titles["rank"]):
                ax.set_ylim(0)  # where collapse is
            ax.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the data
        fig.supxlabel(textwrap.fill(" ".join(sentences), 130), fontsize=7, ha="left", x=0.01)
    return fig
