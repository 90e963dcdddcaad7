"""`python book/readme.py` writes the README's tables anew, every number from a record or a batch run's own clock."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from running import chapters  # noqa: E402
from shared import table  # noqa: E402

from sidae_lib import claims, experiments, frames, methods, paths, store, train  # noqa: E402

PAPERS = {"2304.02549": "SidAE", "SePP-ID": "SePP-ID", "Hammer": "the student report", "2009.00104": "Falcon & Cho"}


def results() -> list[dict[str, Any]]:
    """The last checkpoints by the paper's probe beside the paper's Table 1: each set at its largest scale."""
    recorded = {r["key"]: r for r in store.every("evaluation", store.published())}
    rows: list[dict[str, Any]] = []
    for scale in ("paper", "laptop"):
        found = [recorded[e.key()] for e in experiments.accuracy_vs_epochs(scale)[1] if e.key() in recorded]
        ours = claims.beside_published(frames.summary(frames.evaluations(found)))
        ours = ours[~ours["display"].isin([row["data"] for row in rows])]
        ours = ours[(ours["method"] != "supervised") | (ours["augment"] == "none")]
        for (display, less), part in ours.groupby(["display", -ours["labels"]]):
            usual, cells = part["n"].mode().iloc[0], dict[str, str]()
            for r in part.itertuples():
                paper, seeds = f"<br>*{r.paper}*" * bool(r.paper), f"<br>n = {r.n}" * int(r.n != usual)
                cells[methods.NAMES[r.method]] = f"{r.ours}{paper}{seeds}"
            rows.append({"data": display, "labels": frames.percent(-less), **cells, "n, scale": f"{usual}, {scale}"})
    return rows


def notebooks() -> list[dict[str, Any]]:
    """In the book's order: what each asks, the figures that it repeats, its minutes at scale quick."""
    clock = pd.read_csv(ROOT / "figures" / "quick" / "timings.csv").set_index("notebook")["seconds"]
    rows = []
    for name in chapters():
        nb = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
        text = "".join(nb["cells"][0]["source"])
        source = next((line for line in text.splitlines() if line.startswith(("Paper: ", "Source: "))), "")
        of = [said for key, said in PAPERS.items() if key in source]
        shown = re.findall(r"(?:Figure|Table)s? \d+(?:(?:, | and | to )\d+)*", source)
        rows.append({"notebook": f"{name[:2]} [{text.splitlines()[0][2:]}](notebooks/{name}.ipynb)",
                     "source": ", ".join([*of, *shown]), "minutes": f"{clock[name] / 60:.1f}"})
    return rows


def readme(text: str) -> str:
    """The README with its tables made anew."""
    for name, rows in {"results": results(), "minutes": notebooks()}.items():
        made = table([*rows[0]], [[*map(str, row.values())] for row in rows])
        before, _, rest = text.partition(f"<!-- {name} -->")
        after = rest.partition(f"<!-- /{name} -->")[2]
        text = f"{before}<!-- {name} -->\n{made}\n<!-- /{name} -->{after}"
    return text


if __name__ == "__main__":
    path = paths.ROOT / "README.md"
    train.write(path, readme(path.read_text()).encode())
