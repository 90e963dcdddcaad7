"""The style of the charts, which the notebooks draw: colours, panels and their stamps, saving, tables."""

import io
import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import methods, paths, train

if TYPE_CHECKING:  # slow to import: late, in the functions that need it
    from IPython.display import HTML, Markdown
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
         "axes.titleweight": "bold", "figure.labelsize": 8, "legend.frameon": False, "legend.fontsize": 7,
         "image.interpolation": "nearest", "svg.hashsalt": "sidae", "svg.fonttype": "none", "savefig.dpi": 144,
         "figure.dpi": 110, "font.sans-serif": ["DejaVu Sans"]}  # matplotlib's own
DASHES = {"untrained": (1, 1.5), "supervised": (4, 2)}  # as seaborn takes them; the others are solid


def style() -> None:
    """The look of all charts, for what is drawn from here on."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)


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
        legend(fig)


def legend(fig: "Figure") -> None:
    """Every label once, above all panels, in as few lines as the width allows."""
    named: dict[str, Any] = {}
    for ax in [ax for panel in fig.axes for ax in (panel, *panel.child_axes) if not ax.get_legend()]:
        for handle, label in zip(*ax.get_legend_handles_labels()):  # type: ignore[attr-defined]
            named.setdefault(label, handle)
    for lines in range(1, len(named) + 1):
        columns = -(-len(named) // lines)
        above = fig.legend(named.values(), named, loc="outside upper center", ncols=columns, fontsize=7)
        if above.get_window_extent().width < fig.bbox.width or columns == 1:
            break
        above.remove()
    for dots in (h for one in fig.legends for h in one.legend_handles if hasattr(h, "set_sizes")):
        dots.set_sizes([20])  # a map's are too small to tell their colours


def panels(table: pd.DataFrame, by: str = "panel", columns: int = 3, size: tuple[float, float] = (2.6, 2.2),
           sharey: bool = False, stamped: bool = True, **axes: Any) -> Iterator[tuple["Axes", pd.DataFrame]]:
    """(axes, rows) of each value of the column `by`, to draw into. Its name is the panel's title, with `stamp`
    below it. In the end each label of all panels stands once in a legend above them.

    size: a panel's width and height in inches.  axes: what `Axes.set` takes, for each panel.
    """
    import matplotlib.pyplot as plt

    groups = list(table.groupby(by, sort=False, observed=True))
    lines, columns = -(-len(groups) // columns), min(columns, len(groups))
    fig = plt.figure(figsize=(size[0] * columns, size[1] * lines + 0.4), layout="constrained")
    grid = fig.subplots(lines, columns, squeeze=False, sharey=sharey).flatten()
    for k, (ax, (name, rows)) in enumerate(zip(grid, groups)):
        said = textwrap.wrap(stamp(rows), int(size[0] * 20)) if stamped else []
        ax.set_title(textwrap.fill(str(name), int(size[0] * 15)), pad=4 + 8 * len(said))
        above = 1 + 0.044 / size[1]  # the same distance in inches, however high the panel is
        ax.text(0.5, above, "\n".join(said), transform=ax.transAxes, ha="center", va="bottom", fontsize=6, color=INK)
        yield ax, rows
        if ax.get_legend():
            ax.get_legend().remove()
        ax.set(**axes if k % columns == 0 else {**axes, "ylabel": ""})
    for ax in grid[len(groups) :]:
        ax.axis("off")
    legend(fig)


def _from_to(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(high) if low == high else f"{low} to {high}"


def stamp(rows: pd.DataFrame) -> str:
    """What a panel's numbers are made of: "laptop scale, n = 3 (untrained 5), Intel Xeon, 2 threads".

    n: seeds of each `name`, or the column `n` where rows are means, from the fewest to the most.
    """
    if "own" in rows and not rows["own"].all():
        rows = rows[~rows["own"]]  # the reader's run stands on top of them
    said = [f"{scale} scale" for scale in dict.fromkeys(rows.get("scale", [])) if scale]
    names = rows["name"] if "name" in rows else pd.Series("", rows.index)
    many = rows.groupby(names, sort=False)
    if "n" in rows or "seed" in rows:
        n = many["n"].unique().map(_from_to) if "n" in rows else many["seed"].nunique()
        usual = Counter(n).most_common(1)[0][0]  # of several the first
        others = [f"{name} {k}" for name, k in n.items() if k != usual]
        said.append(f"n = {usual}" + f" ({', '.join(others)})" * bool(others))
    return ", ".join([*said, *sorted({h for one in rows.get("hardware", []) for h in one.split("; ")})])


def look(rows: pd.DataFrame, by: str = "name") -> dict[str, Any]:
    """What seaborn takes to give every `name` of `frames.evaluations` its method's colour, marker and line."""
    first = rows.drop_duplicates(by).set_index(by)
    of = {name: str(method).split(" + ")[0] for name, method in first["method"].items()}
    return {"hue": by, "style": by, "hue_order": list(of), "style_order": list(of),
            "palette": {name: methods.COLOURS.get(m, INK) for name, m in of.items()},
            "markers": {name: methods.MARKERS.get(m, "o") for name, m in of.items()},
            "dashes": {name: DASHES.get(m, "") for name, m in of.items()}}


def line(method: str, augment: str = "none") -> dict[str, Any]:
    """What matplotlib takes to draw a level: of the untrained network, or of a supervised one."""
    dashes = {"untrained": ":", "supervised": "--" if augment == "none" else "-."}
    return {"color": methods.COLOURS.get(method, INK), "ls": dashes.get(method, "-"), "lw": 1.2}


def point(method: str) -> dict[str, Any]:
    """What matplotlib takes to draw a method's marker without a line."""
    return {"color": methods.COLOURS[method], "marker": methods.MARKERS.get(method, "o"), "ls": "", "lw": 0.8}


def place(ax: "Axes", x: float) -> "Axes":
    """Where a point at x is drawn: the panel, or, from the end of its curves on, a strip beside it whose one tick x is."""
    if x < ax.dataLim.x1:
        return ax
    if not ax.child_axes:
        strip = ax.inset_axes((1.05, 0, 0.1, 1), sharey=ax)
        strip.set(xticks=[x], xlim=(x - 1, x + 1))
        strip.tick_params(left=False, labelleft=False)
        strip.spines["left"].set_visible(False)
    return ax.child_axes[0]  # type: ignore[return-value]


def save(fig: "Figure", name: str, scale: str, table: pd.DataFrame) -> None:
    """figures/<scale>/<name>.{svg,png,csv}; the table holds the numbers that are drawn. No SVG of pixels."""
    from matplotlib import rc_context

    png, svg, file = io.BytesIO(), io.BytesIO(), paths.figures(scale) / name
    with rc_context(STYLE):  # how many ticks there are depends on the size of their labels
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
        for ax in fig.axes:  # the layout differs in its last bit from call to call, and SVG's ids with it
            ax.set_position([round(v, 6) for v in ax.get_position(original=True).bounds])
        fig.savefig(png, format="png")
        fig.savefig(svg, format="svg", metadata={"Date": None})
    numbers = table.drop(columns="right", errors="ignore").to_csv(index=False, float_format="%.6g")
    train.write(file.with_suffix(".csv"), numbers.encode())
    train.write(file.with_suffix(".png"), small(png.getvalue()))
    pixels = [c for ax in fig.axes for c in ax.collections if c.get_rasterized()]
    pixels += [i for ax in fig.axes for i in ax.images if np.ndim(i.get_array()) == 3]
    if not pixels:  # a map's or a photograph's would be no sharper
        text = re.sub(rb"(\.\d\d)\d+", rb"\1", svg.getvalue())  # 1/7200 inch is enough
        train.write(file.with_suffix(".svg"), re.sub(rb" ?\n(?:([LCQz]) ?| +(?=<))", rb"\1", text))


def small(png: bytes) -> bytes:
    """A chart in 256 colours, a third of the size; a picture that loses by it stays as it is."""
    from PIL import Image

    full, out = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    few = full.quantize(256, dither=Image.Dither.NONE)
    if np.abs(np.asarray(full, float) - np.asarray(few.convert("RGB"), float)).mean() > 0.5:
        return png
    few.save(out, "PNG", optimize=True)
    return out.getvalue()


def table(rows: pd.DataFrame, caption: str = "", bold: Sequence[str] | pd.DataFrame = (), digits: int = 1
          ) -> "HTML":  # fmt: skip
    """A table as a reader wants it: no index of numbers, nothing where there is no value, a fixed id.

    bold: columns whose greatest value is bold, or a mask of the same shape (True: bold).  digits: of fractions.
    """
    from IPython.display import HTML

    shown = rows.style.format(precision=digits, na_rep="", thousands=",")
    shown = shown.set_uuid(sha256(caption.encode()).hexdigest()[:8]).set_caption(caption)
    if isinstance(rows.index, pd.RangeIndex):
        shown = shown.hide(axis="index")
    if isinstance(bold, pd.DataFrame):
        shown = shown.apply(lambda _: bold.map(lambda on: "font-weight: bold" * bool(on)), axis=None)
    elif len(bold):
        shown = shown.highlight_max(subset=list(bold), props="font-weight: bold")
    return HTML(shown.to_html())


def say(*lines: str) -> "Markdown":
    """Sentences with numbers of this run, as a list."""
    from IPython.display import Markdown

    return Markdown("\n".join(line if line.startswith("- ") else f"- {line}" for line in lines))


def touch(**choices: Any) -> Callable[[Callable], Callable]:
    """`ipywidgets.interact` of the function below it, for someone who can touch; where nobody can (SIDAE_STATIC),
    what the first choices show."""
    from ipywidgets import interact

    if os.environ.get("SIDAE_STATIC"):
        first = {name: of.value if hasattr(of, "value") else of[0] for name, of in choices.items()}
        return lambda draw: draw(**{name: v[1] if isinstance(v, tuple) else v for name, v in first.items()})

    return interact(**choices)
