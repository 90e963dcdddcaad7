"""Pages of HTML: all figures of a scale, and the scoreboard."""

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from . import claims, frames, paths, store
from .config import EvalConfig
from .train import device_of, provenance, write

Found = Mapping[str, Sequence[dict[str, Any]]]  # figure -> the evaluation records that it asks for
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{0}</title>
<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width"><style>
body {{ font: 16px/1.5 sans-serif; margin: 1rem }}
img {{ max-width: 100% }} div {{ overflow-x: auto }} td, th {{ padding: 0 0.6rem; text-align: left }}</style>
<h1>{0}</h1>{1}</html>"""


def _verdicts(board: pd.DataFrame) -> str:
    """A scoreboard as HTML: the published numbers, every claim's verdict, and the cases behind it."""
    holm = ("<p>The verdict of a claim is by Holm's correction over its cases: 5 % for all of them together. "
            "Tested are cases of at least three seeds. By chance 5 % of these would be decided if there were "
            "no difference. An interval holds the seeds and the choice of the test images.</p>")
    cases, body = board["published"].isna(), []
    cited = ["paper", "source", "claim verdict"]
    for title, table in (("<h2>Published numbers</h2>", board[~cases]),
                         (f"<h2>Claims</h2>{holm}", claims.claims(board)),
                         ("<h2>Cases</h2>", board[cases].drop(columns=cited))):
        shown = table.dropna(axis=1, how="all").to_html(index=False, na_rep="", border=0)
        body.append(f"{title}<div>{shown}</div>")
    return "".join(body)


def index(scale: str, records: Found, notebooks: Sequence[Path] = ()) -> Path:
    """figures/<scale>/index.html: all figures, the scoreboard (also a page and a table of its own), links to
    the executed notebooks (their HTML), and on what all was made."""
    folder, p = paths.figures(scale), provenance(device_of("auto"))
    below = "Each panel names its scale." if scale == "recorded" else "Below the paper's scale: trends at most."
    body = ["The paper's protocol." if scale == "paper" else below]
    body += [f'<li><a href="{os.path.relpath(nb, folder)}">{escape(nb.stem)}</a>' for nb in notebooks]
    first = records.get("accuracy_vs_epochs", ())
    trained = store.recorded([EvalConfig.from_dict(r["config"]).run for r in first])
    body += [f"<p>{escape(sentence)}</p>" for sentence in frames.below(first, trained)]
    for png in sorted(folder.glob("*.png")):
        image, title = base64.b64encode(png.read_bytes()).decode(), escape(png.stem.replace("_", " "))
        body.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{image}"><br>'
                    f'<a href="{png.stem}.csv">the plotted numbers</a>')
    if any(records.values()):
        board = claims.scoreboard(records, scale)
        body.append(_verdicts(board))
        write(folder / "scoreboard.csv", board.to_csv(index=False).encode())
        write(folder / "scoreboard.html", PAGE.format(f"Scoreboard, {scale} scale", body[-1]).encode())
    made = {f"{frames.hardware(r['provenance'])}, torch {r['provenance']['torch']}"
            for found in records.values() for r in found}
    body.append(f"<h2>Made with</h2>Page: sidae_lib {p['package']}, torch {p['torch']}. Records: "
                f"{escape('; '.join(sorted(made)) or 'none')}.")
    write(folder / "index.html", PAGE.format(f"SidAE figures, {scale} scale", "\n".join(body)).encode())
    return folder / "index.html"


def timings(scale: str, clock: Sequence[dict[str, Any]]) -> None:
    """figures/<scale>/timings.csv: how long each notebook of a batch run took from nothing, and on what. Of
    others what an earlier run said stays."""
    p, path = provenance(device_of("auto")), paths.figures(scale) / "timings.csv"
    table = pd.DataFrame(clock).assign(hardware=f"{frames.hardware(p)}, torch {p['torch']}")
    if path.exists():
        table = pd.concat([table, pd.read_csv(path)]).drop_duplicates("notebook").sort_values("notebook")
    write(path, table.to_csv(index=False).encode())
