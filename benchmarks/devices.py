"""What another device changes: `python -m benchmarks.devices STORE OTHER`, of two stores that computed the same keys.

Absolute differences of the same evaluation, in points of accuracy, by kind and metric. Written to results/devices.csv.
"""

import sys
from pathlib import Path

import pandas as pd

from sidae_lib import frames, store, train

from .timing import Row


def compare(one: Path, other: Path) -> pd.DataFrame:
    """One row per kind, metric and pair of devices: n evaluations in both stores, median and largest difference."""
    stores = [{r["key"]: r for r in store.every("evaluation", store.local(folder))} for folder in (one, other)]
    same = [key for key in stores[0] if key in stores[1]]
    both, others = (frames.evaluations([own[key] for key in same]) for own in stores)  # row by row the same
    if both.empty:
        return both
    both = both.assign(difference=(both["accuracy"] - others["accuracy"]).abs(), other=others["hardware"],
                       metric=both["metric"].fillna("accuracy") if "metric" in both else "accuracy")  # fmt: skip
    both = both[both["metric"].isin(["accuracy", "top3", "knn"]) & (both["hardware"] != both["other"])]
    rows: list[Row] = []
    for (kind, metric, a, b), part in both.groupby(["kind", "metric", "hardware", "other"], sort=False):
        d = part["difference"]
        rows.append({"what": f"{kind}, {metric}", "unit": "points", "median": d.median(), "largest": d.max(), "n": len(d),
                     "hardware": f"{a}, against {b}"})  # fmt: skip
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table = compare(*map(Path, sys.argv[1:]))
    train.write(Path(__file__).parent / "results" / "devices.csv", table.to_csv(index=False).encode())
    print(table.to_string(index=False))
