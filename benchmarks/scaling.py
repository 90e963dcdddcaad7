"""What a second local worker gains: `python -m benchmarks.scaling [RUNS [ROUNDS]]`, on a machine that does nothing else.

The same grid of short runs on one worker and on two, one thread each, in turns, after a run that warms each worker up; and
what the grid adds to a run: wall time less the runs' own seconds, on one worker. Written to results/scaling.csv.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import distributed
import pandas as pd
import torch

from sidae_lib import experiments, runs, train

from .timing import Bench, hardware, summed_up


def quiet(_: str) -> None:
    pass


def measured(workers: int, n: int) -> tuple[float, float]:
    """(wall seconds of n runs, seconds of training in them)."""
    configs = [experiments.run("simsiam", "digits", "smoke", s, epochs=20) for s in range(n + 2)]
    with tempfile.TemporaryDirectory() as store:
        os.environ["SIDAE_RUNS"], os.environ["SIDAE_RECORDS"] = store, f"{store}/none"
        os.environ["SIDAE_THREADS"] = "1"
        cluster = distributed.LocalCluster(workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None)
        with cluster:
            address = cluster.scheduler_address
            runs.fetch_all(configs[n:], client=address, device="cpu", log=quiet)
            began = time.perf_counter()
            records = runs.fetch_all(configs[:n], client=address, device="cpu", log=quiet)
            return time.perf_counter() - began, sum(r["seconds"] for r in records)


def main(n: int = 16, rounds: int = 3) -> None:
    one, two = zip(*((measured(1, n), measured(2, n)) for _ in range(rounds)))
    rows = [summed_up("runs on one worker", "seconds", [w for w, _ in one]),
            summed_up("runs on two workers", "seconds", [w for w, _ in two]),
            summed_up("two workers over one", "times", [a / b for (a, _), (b, _) in zip(one, two)]),
            summed_up("added to a run by the grid", "seconds", [(w - own) / n for w, own in one])]
    table = pd.DataFrame(rows).assign(at=n, **hardware(Bench(torch.device("cpu"))) | {"threads": 1})
    train.write(Path(__file__).parent / "results" / "scaling.csv", table.to_csv(index=False).encode())
    print(table.to_string(index=False))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
