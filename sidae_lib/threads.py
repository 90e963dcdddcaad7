"""How many torch threads compute: as many as there are cores that nothing else uses.

The threads of one process wait for one another after every operation. Where other work uses one of their
cores, the thread there is late each time, and all together are slower than one thread alone.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .config import SidaeError

STAT = Path("/proc/stat")  # Linux; elsewhere nothing is known of others, and torch's own number stays
SECONDS = 1.0  # between looks; the kernel counts in hundredths


class Look(NamedTuple):
    """Seconds of the clock, and core seconds that other work has used so far."""

    clock: float
    others: float


def look() -> Look | None:
    """Now, or None where the machine does not tell. Nice work does not count: it leaves its core to ours."""
    try:
        user, _, system = (int(v) / os.sysconf("SC_CLK_TCK") for v in STAT.read_text().split(maxsplit=4)[1:4])
    except (OSError, ValueError):
        return None
    own = os.times()
    ours = own.system + own.children_system
    if os.nice(0) <= 0:
        ours += own.user + own.children_user
    return Look(time.monotonic(), user + system - ours)


def free(before: Look, after: Look, cores: int) -> int:
    """The whole cores that others left, at least one."""
    return max(1, round(cores - (after.others - before.others) / (after.clock - before.clock)))


def asked() -> int | None:
    """SIDAE_THREADS, or None where it is not set. Raises SidaeError if it is no number of threads."""
    text = os.environ.get("SIDAE_THREADS") or None
    if text and not (text.isdecimal() and int(text)):
        raise SidaeError(f"SIDAE_THREADS must be a number of threads, 1 or more, not {text!r}.")
    return int(text) if text else None


_last = look()  # at import: what happens until the first run shows how busy the machine is
_free: int | None = None  # cores, as last seen
_here = threading.local()  # most: torch's own number of threads, in each Python thread within `fitted`


@contextmanager
def fitted() -> Iterator[None]:
    """Within, torch takes SIDAE_THREADS threads, or where that is not set those that `fit` finds."""
    import torch  # late: the first look comes before it

    before, fixed = torch.get_num_threads(), asked()
    try:
        if fixed:
            torch.set_num_threads(fixed)
        else:
            _here.most = before
            fit()
        yield
    finally:
        _here.most = None
        torch.set_num_threads(before)


def fit() -> None:
    """Within `fitted`: as many threads as cores are free, at most torch's own number; seen once a second."""
    import torch

    global _last, _free
    most = getattr(_here, "most", None)
    if most in (None, 1) or _last is None:
        return
    if time.monotonic() - _last.clock >= SECONDS and (now := look()):
        _last, _free = now, free(_last, now, os.cpu_count() or 1)
    if _free and torch.get_num_threads() != (n := min(most, _free)):
        torch.set_num_threads(n)
