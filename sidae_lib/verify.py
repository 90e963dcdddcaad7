"""One recorded run trained again: are its numbers those that the record holds, but for what devices differ by?

A device, its number of threads, torch's version and the order in which a convolution sums change the last bits; training
multiplies them. How far that goes was measured on nine published runs of seven methods, repeated on another processor of the
same name. Over the first epoch no mean moved by more than 0.6 % of the largest that the run has; later by up to 12 %, and by
58 % in one SimSiam of four epochs, whose loss only begins to fall: with one thread and with two it ends as far apart on one
machine. Accuracies moved by up to 2.1 standard errors, those of that SimSiam by 6.2. What lies further off is another
experiment, or a record that was altered.
"""

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from . import methods, paths, runs, train
from .config import EvalConfig, RunConfig, SidaeError

FIRST, TERMS = 0.02, 0.75  # of a mean over the first epoch, and over others, as shares of the largest that the run has
ERRORS = 4.0  # of an accuracy, in standard errors; up to twice as much, as far as the means have moved
# Of an epoch's line: times, and what is looked at once, on few images or on one step, which says little about a run.
LOOKS = re.compile(r"epoch|seconds|images_per_second|collapsed|lr|rank|feature_rank|knn|grad_.*")


def recorded(key: str) -> tuple[RunConfig, list[runs.Record]]:
    """A run by its key, or the beginning of it: its record, then those of its evaluations on the run's own images. Raises
    SidaeError where no one run is meant, or the run cannot be trained again."""
    roots = (paths.records(), paths.runs())  # of two records of one key the local one counts, as for `runs.find`
    found = {p.parent.name: p for root in roots for p in root.glob("*/record.json") if p.parent.name.startswith(key)}
    if len(found) != 1:
        of = {p.parent.name for root in roots for p in root.glob("*/eval-*.json") if p.name.startswith(f"eval-{key}")}
        meant = f" It begins keys of evaluations, of the run {' and '.join(sorted(of)[:3])}." if of and not found else ""
        many = f"{len(found)} recorded runs have keys that begin" if found else "No recorded run has a key that begins"
        raise SidaeError(f"{many} with {key!r}; give the whole key, 16 hex digits, of one in {roots[0]} or {roots[1]}.{meant}")
    [(name, path)] = found.items()
    record = runs.read(path)
    config = RunConfig.from_dict(record["config"])
    methods.check(config)
    if not record["steps"]:
        raise SidaeError(f"{config.method} {name} is not trained, so there is nothing to train again; choose another run.")
    files = {p.name: p for root in roots for p in sorted((root / name).glob("eval-*.json"))}
    return config, [record, *(r for r in map(runs.read, files.values()) if "data" not in r["config"])]


@contextmanager
def _elsewhere(threads: int) -> Iterator[None]:
    """Within, the store is an empty folder that is removed afterwards, and nothing is published."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="sidae-verify-") as folder:
        os.environ |= {f"SIDAE_{name.upper()}": str(Path(folder) / name) for name in ("runs", "records")}
        os.environ.setdefault("SIDAE_THREADS", str(threads))
        for name in ("SIDAE_BUNDLE", "SIDAE_SCHEDULER"):  # a worker would look into a store of its own
            os.environ.pop(name, None)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= before


def compare(before: Sequence[runs.Record], now: Sequence[runs.Record]) -> tuple[pd.DataFrame, bool]:
    """One row per term of the loss (its worst epoch) and per evaluation: recorded, now, the difference, what is allowed; and
    whether the last weights are the same to the bit. before, now: the run's record, then its evaluations, in one order.

    Where they are, the machine is the same for all that matters, and so must the numbers be: nothing is allowed. Else:
    - a mean over an epoch may differ by TERMS of the largest that the run has of it now, and over the first by FIRST of that.
    - an accuracy may differ by ERRORS standard errors of a difference of two, each of n_test images; by twice as much where a
      mean has moved by all that it may, and in between in proportion.
    """
    (old, *tests), (new, *again) = before, now
    last = train.backbone_name(RunConfig.from_dict(old["config"]).epochs)
    weights = [dict(runs._weights(records)).get(last) for records in (before, now)]
    same, used, rows = weights[0] == weights[1] is not None, 0.0, []
    a, b = (pd.DataFrame(r["epochs"]).set_index("epoch") for r in (old, new))
    for term in [t for t in a.columns.intersection(b.columns) if not LOOKS.fullmatch(t)]:
        gap = (a[term] - b[term]).abs().fillna(math.inf)  # of an epoch that only one of them has
        allowed = pd.Series(0.0 if same else TERMS * b[term].abs().max(), gap.index)
        allowed[1] *= FIRST / TERMS
        share = gap / allowed.clip(lower=1e-300)
        worst, used = share.idxmax(), max(used, min(share.max(), 1.0))
        rows.append({"what": f"{term}, epoch {worst}", "recorded": a[term].get(worst), "now": b[term].get(worst),
                     "difference": gap[worst], "allowed": allowed[worst]})  # fmt: skip
    for one, other in zip(tests, again, strict=True):
        made = [[r["provenance"][k] for k in ("device", "torch", "threads")] for r in (one, other)]
        p = min(max((one["accuracy"] + other["accuracy"]) / 200, 1 / one["n_test"]), 1 - 1 / one["n_test"])
        error = 100 * math.sqrt(2 * p * (1 - p) / one["n_test"])
        rows.append({"what": f"{one['kind']} {one['key']}, epoch {one['epoch']}, {one['n_train']:,} labels",
                     "recorded": one["accuracy"], "now": other["accuracy"],
                     "difference": abs(one["accuracy"] - other["accuracy"]),
                     "allowed": 0.0 if same and made[0] == made[1] else ERRORS * (1 + used) * error})  # fmt: skip
    return pd.DataFrame(rows).set_index("what"), same


def verify(key: str, *, device: str = "auto", log: Callable[[str], None] = print) -> bool:
    """Trains a recorded run again, evaluates it as recorded, and says whether the numbers agree; `compare` says what is
    allowed. The store and the published records are neither read for it nor written: it works in a folder that goes. A run on
    mined pairs has its encoder trained first. It has as many threads as the recorded one, unless SIDAE_THREADS is set.

    Raises SidaeError as `recorded` and `runs.fetch_all` do, and Stopped when it is interrupted.
    """
    config, before = recorded(key)
    evals = [EvalConfig.from_dict(r["config"]) for r in before[1:]]
    for run in (config, *runs.dependencies(config)):  # a missing set is said before anything is trained
        runs._load(run.data, run)
    made = before[0]["provenance"]
    log(f"{config.method} {config.key()}: {config.epochs} epochs and {len(evals)} evaluations; it took "
        f"{sum(r['seconds'] for r in before) / 60:.1f} minutes on {made['device']}.")  # fmt: skip
    try:
        with _elsewhere(min(made["threads"], os.cpu_count() or 1)):
            now = runs.fetch_all([config, *evals], device=device, log=log)
    except (KeyboardInterrupt, train.Stopped):
        raise train.Stopped("Stopped by a signal: nothing of this verification is kept.") from None
    table, same = compare(before, now)
    log(table.to_string(float_format="{:.7g}".format))
    there, here = (f"{p['device']}, {p['threads']} threads, torch {p['torch']}" for p in (made, now[0]["provenance"]))
    outside = table.index[table["difference"] > table["allowed"]]  # a gap of an epoch that is not there is infinite
    if len(outside):
        log(f"The run {config.key()} is not repeated: {len(outside)} of {len(table)} numbers differ by more than is allowed "
            f"({'; '.join(outside)}). Recorded on {there}; here {here}.")  # fmt: skip
    elif same:
        log(f"The run {config.key()} is repeated to the bit, and its {len(table)} numbers with it ({here}).")
    else:
        log(f"The run {config.key()} is repeated: its {len(table)} numbers lie within what devices differ by. Recorded on "
            f"{there}; here {here}.")  # fmt: skip
    return not len(outside)
