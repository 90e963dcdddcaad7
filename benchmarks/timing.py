"""Side by side: contenders take turns, so that whatever else the machine does slows all of them."""

import gc
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

Repeat = Callable[[], float]
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What every section is measured with."""

    device: torch.device
    repeats: int = 5
    deadline: float = float("inf")  # time.monotonic() after which no further round begins
    quick: bool = False  # tiny sizes: shows that everything runs, measures nothing
    cores: int = len(os.sched_getaffinity(0))
    batches: tuple[int, ...] = (256, 512)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, step: Callable[[], Any]) -> float:
        """Mean seconds of `step`, called at least three times and for three seconds (once if quick)."""
        self.synchronize()
        steps, began = 0, time.perf_counter()
        while steps < 1 or not self.quick and (steps < 3 or time.perf_counter() - began < 3):
            step()
            steps += 1
        self.synchronize()
        return (time.perf_counter() - began) / steps

    def warm(self, step: Callable[[], Any]) -> None:
        for _ in range(1 if self.quick else 3):  # compiles, and settles the allocator
            step()

    def rate(self, step: Callable[[], Any], items: float) -> Repeat:
        """A warmed-up repeat that returns items per second; `step` handles `items` of them."""
        self.warm(step)
        return lambda: items / self.time(step)


@dataclass(eq=False)
class Contender:
    """build: makes and warms up the repeat, whose every call returns one value in `unit`.

    of: the contender by whose value of the same round this one's is divided.   needs: the package that `build` imports.
    info: further columns; the repeat may add to it.
    """

    what: str
    build: Callable[[], Repeat]
    unit: str = "images/s"
    of: "Contender | None" = None
    needs: str = ""
    info: Row = field(default_factory=dict)


def summed_up(what: str, unit: str, values: Sequence[float]) -> Row:
    """The median of n values and their spread, largest less smallest."""
    return {"what": what, "unit": unit, "median": median(values), "spread": max(values) - min(values), "n": len(values)}


def measure(bench: Bench, contenders: Sequence[Contender]) -> list[Row]:
    """One row per contender: median, spread (largest less smallest) and number of its values, and the median of the
    ratios to `of`. Rounds of A B C ... until bench.repeats or the deadline, one at least."""
    torch.compiler.reset()  # the group before had other shapes
    gc.collect()
    cuda, ready, values, held, taken = bench.device.type == "cuda", {}, {}, {}, {}
    allocated = torch.cuda.memory_allocated if cuda else int
    for c in contenders:
        if c.needs and find_spec(c.needs) is None:
            print(f"{c.what} is left out: {c.needs} is not installed (pip install .[bench]).")
            continue
        before, values[c], taken[c] = allocated(), [], 0
        ready[c] = c.build()
        held[c] = allocated() - before
    for _ in range(bench.repeats):
        for c, repeat in ready.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats(bench.device)
            before = allocated()
            values[c].append(repeat())
            taken[c] = max(taken[c], torch.cuda.max_memory_allocated(bench.device) - before if cuda else 0)
        if time.monotonic() > bench.deadline:
            break
    rows = []
    for c, v in values.items():
        rows.append(summed_up(c.what, c.unit, v))
        if c.of in values:
            ratio = median(a / b for a, b in zip(v, values[c.of], strict=True))
            rows[-1] |= {"ratio": ratio, "of": c.of.what}
        rows[-1] |= ({"device_gib": (held[c] + taken[c]) / 2**30} if cuda else {}) | c.info
    return rows


def fresh() -> ProcessPoolExecutor:
    """One new process."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def peak(device: torch.device) -> Row:
    """Peak memory of this process in GiB. Host: the kernel's VmHWM, since `ru_maxrss` starts at the parent's."""
    kib = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    cuda = {"device_gib": torch.cuda.max_memory_reserved(device) / 2**30} if device.type == "cuda" else {}
    return {"host_gib": kib / 2**20} | cuda


def hardware(bench: Bench) -> Row:
    """The columns that say where a row comes from."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [platform.machine()]
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else names[0]
    return {"hardware": name, "cores": bench.cores, "torch": torch.__version__, "threads": torch.get_num_threads()}
