"""What another device changes: `python -m benchmarks.devices STORE OTHER`, of two stores that computed the same keys.

Absolute differences of the same evaluation, in points of accuracy, by kind and metric. Written to results/devices.csv.
"""

import sys
from pathlib import Path

import pandas as pd

from sidae_lib import figures, runs, train

from .timing import Row


def evaluations(store: Path) -> pd.DataFrame:
    frame = figures.evaluations(list(runs.every("eval-*", (store,))))
    return frame.assign(metric=frame.get("metric", "accuracy")).fillna({"metric": "accuracy"})


def compare(one: Path, other: Path) -> pd.DataFrame:
    """One row per kind, metric and pair of devices: n evaluations in both stores, median and largest difference."""
    frames = [evaluations(store) for store in (one, other)]
    same = frames[0].columns.intersection(frames[1].columns).drop(["accuracy", "hardware"])
    both = frames[0].merge(frames[1], on=[*same], suffixes=("", " other"))
    both = both[both["metric"].isin(["accuracy", "top3", "knn"]) & (both["hardware"] != both["hardware other"])]
    rows: list[Row] = []
    for (kind, metric, a, b), part in both.groupby(["kind", "metric", "hardware", "hardware other"], sort=False):
        d = (part["accuracy"] - part["accuracy other"]).abs()
        rows.append({"what": f"{kind}, {metric}", "unit": "points", "median": d.median(), "largest": d.max(), "n": len(d),
                     "hardware": f"{a}, against {b}"})  # fmt: skip
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table = compare(*map(Path, sys.argv[1:]))
    train.write(Path(__file__).parent / "results" / "devices.csv", table.to_csv(index=False).encode())
    print(table.to_string(index=False))
