"""What a second local worker gains: `python -m benchmarks.scaling [RUNS]`, on a machine that does nothing else.

The same grid of short runs on one worker and on two, one thread each, after a run that warms each worker up; and what the
grid adds to a run: wall time less the runs' own seconds, on one worker.
"""

import os
import sys
import tempfile
import time

from sidae_lib import experiments, grid, runs


def quiet(_: str) -> None:
    pass


def measured(workers: int, n: int) -> tuple[float, float, float]:
    """(seconds until the workers are warm, wall seconds of n runs, seconds of training in them)."""
    configs = [experiments.run("simsiam", "digits", "smoke", s, epochs=20) for s in range(n + 2)]
    with tempfile.TemporaryDirectory() as store:
        os.environ["SIDAE_RUNS"], os.environ["SIDAE_RECORDS"] = store, store
        grid.CPU_COUNT = workers  # one thread each
        began = time.perf_counter()
        with grid.local(workers, "cpu") as address:
            runs.fetch_all(configs[n:], client=address, device="cpu", log=quiet)
            warm = time.perf_counter()
            records = runs.fetch_all(configs[:n], client=address, device="cpu", log=quiet)
            return warm - began, time.perf_counter() - warm, sum(r["seconds"] for r in records)


if __name__ == "__main__":
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    (up1, wall1, own1), (up2, wall2, own2) = (measured(w, n) for w in (1, 2))
    print(f"{n} runs on 1 worker {wall1:.1f} s, on 2 workers {wall2:.1f} s: {wall1 / wall2:.2f} times as fast")
    print(f"overhead per run {(wall1 - own1) / n:.2f} s on 1 worker; training {own1 / n:.2f} s, of two {own2 / n:.2f} s")
    print(f"until the workers were warm: {up1:.1f} s, {up2:.1f} s")
