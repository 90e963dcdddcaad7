"""What the front page says by the records: the main figure, the answer so far, and on what all was made."""

import os
from pathlib import Path

import pandas as pd
import shared
from scoreboard import boards, evaluations

import sidae_lib
from sidae_lib import claims, frames, paths, recorded, store
from sidae_lib.config import EvalConfig, Record
from sidae_lib.methods import NAMES
from sidae_lib.scales import SSL

HERE = Path(__file__).parent
FIGURE = "accuracy_vs_epochs"
CLAIM = "SidAE beats SimSiam and the autoencoder"


def main_figure(scale: str) -> str:
    """Of the user's run, if it has drawn one."""
    own, best = (folder / f"{FIGURE}.png" for folder in (paths.figures(scale), paths.ROOT / "figures" / "recorded"))
    alt = ("Test accuracy against epochs of pre-training, a panel for each image set and share of labels: SidAE, "
           "SimSiam and the autoencoder, with lines for the untrained and the supervised network")  # fmt: skip
    return f"![{alt}]({os.path.relpath(own if own.exists() else best, HERE)})"


def ends(records: list[Record]) -> pd.DataFrame:
    """The three methods after their last epoch, by the paper's probe: means over seeds."""
    frame = frames.evaluations(records)
    last = frame[(frame["epoch"] == frame["of"]) & (frame["kind"] == "linear") & (frame["scored"] == "test")]
    return frames.summary(last[last["method"].isin(SSL) & (last["w"] == 0.5)])


def accuracies(table: pd.DataFrame) -> str:
    """A row per image set and share of labels, the best in bold."""
    rows = []
    for (display, labels, scale), part in table.groupby(["display", "labels", "scale"], sort=False):
        means, n = part.set_index("method")["mean"], " or ".join(map(str, sorted(part["n"].unique())))
        said = {m: f"{mean:.1f}" for m, mean in means.items()} | {means.idxmax(): f"**{means.max():.1f}**"}
        rows.append([display, frames.percent(labels), *(said.get(m, "") for m in SSL), n, scale])
    return shared.table(["images", "labels", *(NAMES[m] for m in SSL), "n", "scale"], rows)


def answer(records: list[Record], scale: str) -> str:
    """Who is first, and what became of the claim."""
    table = ends(records)
    wide = table.pivot_table("mean", ["display", "scale", "labels"], "method")
    leads = (wide["sidae"] >= wide.max(axis=1)).groupby("scale", sort=False).agg(["sum", "size"])
    first = " and ".join(f"in {k} of {n} cases at {at} scale" for at, k, n in leads.itertuples())
    board = claims.claims(boards(scale)[0]).set_index("statement")
    verdict = board["verdict"].get(CLAIM, "not tested")
    whose = "With your run, " * (scale != recorded.BEST)
    lines = [f"{whose}SidAE has the highest mean {first}. The [claim](scoreboard.md) that {CLAIM} is **{verdict}**. We decide "
             "nothing on fewer than three seeds.", "",
             "The table shows the test accuracy in percent after the last epoch: the mean over n seeds, the highest in bold. A "
             "row is a case. A [scale](running.md#scales) is a size of the experiment: paper scale is the paper's own, laptop "
             "and quick scale are smaller.", "", accuracies(table), ""]
    if scale != recorded.BEST:
        trained = store.recorded([EvalConfig.from_dict(r["config"]).run for r in records])
        found = [f"{said}." for said in [frames.found(records)] if said]
        lines += [f"- {said}" for said in [*found, *frames.below(records, trained)]]
    return "\n".join(lines)


def made_with(records: list[Record]) -> str:
    on = sorted({f"{frames.hardware(r['provenance'])}, torch {r['provenance']['torch']}" for r in records})
    return f"This book is made with sidae_lib {sidae_lib.__version__}. The records come from: {'; '.join(on)}."


def made(scale: str) -> dict[str, str]:
    every = evaluations(scale)
    if scale != recorded.BEST and not every.get(FIGURE):
        return made(recorded.BEST)
    shown = recorded.best(FIGURE)[1] if scale == recorded.BEST else [r | {"scale": scale} for r in every[FIGURE]]
    return {"main_figure": main_figure(scale), "answer": answer(shown, scale),
            "made_with": made_with(sum(every.values(), shown))}  # fmt: skip
