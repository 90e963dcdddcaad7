"""What the page Running it computes: the scales as the code has them, and the minutes that batch runs measured."""

import re
from pathlib import Path

import pandas as pd
from shared import table

from sidae_lib import paths, places
from sidae_lib.config import RunConfig
from sidae_lib.scales import SCALES

HERE = Path(__file__).parent


def chapters() -> list[str]:
    """Names of the notebooks in the book's order."""
    return re.findall(r"^chapters/(\w+)$", (HERE / "index.md").read_text(), re.M)


def scales() -> str:
    names, usual, rows = dict(places.KNOWN.values()), vars(RunConfig(method="sidae", data="")), []
    for name, s in SCALES.items():
        run = usual | s.run
        wide = f"ResNet-18, width {run['width']}"
        network = {"resnet18": wide, "small_cnn": "a small CNN"}[run["backbone"]]
        images = [f"{n:,}" if (n := s.pool.get(d, 0)) else f"all {places.TRAINING[d]:,}" for d in s.datasets]
        epochs = [str(s.epochs[d]) for d in s.datasets]
        each = [" / ".join(dict.fromkeys(values)) for values in (images, epochs)]
        rows.append([f"`{name}`", ", ".join(names[d] for d in s.datasets), network, *each, str(len(s.seeds))])
    return table(["scale", "image sets", "network", "images without labels", "epochs", "seeds"], rows)


def minutes() -> str:
    """A table for every scale and machine that has run all from nothing (`--fresh`)."""
    files = sorted(paths.figures("").glob("*/timings.csv"))
    clock = pd.concat([pd.read_csv(f).assign(scale=f.parent.name) for f in files]).set_index("notebook")
    out = []
    for (scale, hardware), part in clock.groupby(["scale", "hardware"], sort=False):
        rows = [[f"[](chapters/{name}.ipynb)", f"{part['seconds'][name] / 60:.1f}"]
                for name in chapters() if name in part.index]  # fmt: skip
        rows.append(["all", f"{part['seconds'].sum() / 60:.1f}"])
        out.append(f"Scale `{scale}` on {hardware}:\n\n{table(['notebook', 'minutes'], rows)}")
    return "\n\n".join(out)


def made(scale: str) -> dict[str, str]:
    return {"scales": scales(), "minutes": minutes()}
