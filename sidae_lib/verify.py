"""One recorded run trained again: are its numbers the recorded ones, but for what devices differ by?

A device, its number of threads, torch's version and the order in which a convolution sums change the last
bits, and training multiplies them. How far was measured on nine published runs of seven methods, repeated on
another processor of the same name. Over the first epoch no mean moved by more than 0.6 % of the largest that
the run has. Later means moved by up to 12 %, and by 58 % in one SimSiam of four epochs, whose loss only
begins to fall: on one machine it ends as far apart with one thread and with two. Accuracies moved by up to
2.1 standard errors, those of that SimSiam by 6.2. What lies further off is another experiment, or a record
that was altered.
"""

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pandas as pd

from . import adoption, methods, paths, runs, store, tasks, train
from .config import EvalConfig, RunConfig, SidaeError

FIRST, TERMS = 0.02, 0.75  # of a mean over the first epoch, and over others, as shares of the run's largest
ERRORS = 4.0  # of an accuracy, in standard errors; up to twice as much, as far as the means have moved
# What is not compared: times, and looks at few images or at one step, which say little about a run.
LOOKS = re.compile(r"epoch|seconds|images_per_second|collapsed|lr|rank|feature_rank|knn|grad_.*")


def recorded(key: str) -> tuple[RunConfig, list[store.Record]]:
    """A run by its key, or the beginning of it: its record, then its evaluations on the run's own images.
    Raises SidaeError where not exactly one run is meant, or the run cannot be trained again."""
    places = store.published() | store.local()
    found = [run for run, one in places if run == one and run.startswith(key)]
    if len(found) != 1:
        of = sorted({run for run, one in places if run != one and one.startswith(key)})
        meant = f" It begins keys of evaluations, of the run {' and '.join(of[:3])}." if of and not found else ""
        raise SidaeError(f"{len(found) or 'No'} recorded runs have keys that begin with {key!r}; give the whole key, "
                         f"16 hex digits, of one in {paths.records()} or {paths.runs()}.{meant}")  # fmt: skip
    [name] = found
    if (record := store.read(places[name, name])) is None:
        raise SidaeError(f"The record of the run {name} is damaged; restore it.")
    config = RunConfig.from_dict(record["config"])
    methods.check(config)
    if not record["steps"]:
        raise SidaeError(f"{config.method} {name} is not trained, so there is nothing to train again; choose "
                         "another run.")  # fmt: skip
    evaluations = store.every("evaluation", {ids: place for ids, place in places.items() if ids[0] == name})
    return config, [record, *(r for r in evaluations if "data" not in r["config"])]


@contextmanager
def _elsewhere(threads: int) -> Iterator[None]:
    """Within, the store is an empty folder that is removed afterwards, and nothing is published."""
    from unittest.mock import patch

    with tempfile.TemporaryDirectory(prefix="sidae-verify-") as folder, patch.dict(os.environ):
        os.environ |= {"SIDAE_RUNS": f"{folder}/runs", "SIDAE_RECORDS": f"{folder}/records"}
        os.environ.setdefault("SIDAE_THREADS", str(threads))
        for name in ("SIDAE_BUNDLE", "SIDAE_SCHEDULER"):  # a worker would look into a store of its own
            os.environ.pop(name, None)
        yield


def compare(before: Sequence[store.Record], now: Sequence[store.Record]) -> tuple[pd.DataFrame, bool]:
    """One row per term of the loss (its worst epoch) and per evaluation: recorded, now, the difference, what
    is allowed; and whether the last weights are the same to the bit. before, now: the run's record, then its
    evaluations.

    With the same weights the machine is the same for all that matters, and no difference is allowed. Else:

    - a mean over an epoch may differ by TERMS of the largest that the run has now, and over the first by
      FIRST of it.
    - an accuracy may differ by ERRORS standard errors of a difference of two, each of n_test images. It may
      differ by twice as much where a mean has moved by all that it may, and in between in proportion.
    """
    (old, *tests), (new, *again) = before, now
    last = RunConfig.from_dict(old["config"]).epochs
    weights = [dict(adoption.weights(records)).get(last) for records in (before, now)]
    same, moved, rows = weights[0] == weights[1] is not None, 0.0, []
    a, b = (pd.DataFrame(r["epochs"]).set_index("epoch") for r in (old, new))
    for term in [t for t in a.columns.intersection(b.columns) if not LOOKS.fullmatch(t)]:
        gap = (a[term] - b[term]).abs().fillna(math.inf)  # of an epoch that only one of them has
        allowed = pd.Series(0.0 if same else TERMS * b[term].abs().max(), gap.index)
        allowed[1] *= FIRST / TERMS
        share = gap / allowed.clip(lower=1e-300)
        worst, moved = share.idxmax(), max(moved, min(share.max(), 1.0))
        what = f"{term}, epoch {worst}"
        rows.append([what, a[term].get(worst), b[term].get(worst), gap[worst], allowed[worst]])
    for one, other in zip(tests, again, strict=True):
        n, accuracies = one["n_test"], (one["accuracy"], other["accuracy"])
        p = min(max(sum(accuracies) / 200, 1 / n), 1 - 1 / n)
        allowed = ERRORS * (1 + moved) * 100 * math.sqrt(2 * p * (1 - p) / n)
        made = [[r["provenance"][k] for k in ("device", "torch", "threads")] for r in (one, other)]
        if same and made[0] == made[1]:
            allowed = 0.0
        what = f"{one['kind']} {one['key']}, epoch {one['epoch']}, {one['n_train']:,} labels"
        rows.append([what, *accuracies, abs(accuracies[0] - accuracies[1]), allowed])
    columns = ["what", "recorded", "now", "difference", "allowed"]
    return pd.DataFrame(rows, columns=columns).set_index("what"), same


def verify(key: str, *, device: str = "auto", log: Callable[[str], None] = print) -> bool:
    """Trains a recorded run again, evaluates it as recorded, and says whether the numbers agree.

    It works in a folder that is removed, and neither reads nor writes the store and the published records
    meanwhile. A run on mined pairs has its encoder trained first. There are as many threads as recorded,
    unless SIDAE_THREADS is set. Raises SidaeError as `recorded` and `runs.fetch_all` do, and Stopped when it
    is interrupted.
    """
    config, before = recorded(key)
    evals = [EvalConfig.from_dict(r["config"]) for r in before[1:]]
    for run in (config, *tasks.dependencies(config)):  # a missing set is said before anything is trained
        tasks.load(run.data, run)
    made = before[0]["provenance"]
    minutes = sum(r["seconds"] for r in before) / 60
    log(f"{config.method} {config.key()}: {config.epochs} epochs and {len(evals)} evaluations; it took "
        f"{minutes:.1f} minutes on {made['device']}.")  # fmt: skip
    try:
        with _elsewhere(min(made["threads"], os.cpu_count() or 1)):
            now = runs.fetch_all([config, *evals], device=device, log=log)
    except (KeyboardInterrupt, train.Stopped):
        raise train.Stopped("Stopped by a signal: nothing of this verification is kept.") from None
    table, same = compare(before, now)
    log(table.to_string(float_format="{:.7g}".format))
    there, here = (f"{p['device']}, {p['threads']} threads, torch {p['torch']}"
                   for p in (made, now[0]["provenance"]))  # fmt: skip
    outside = table.index[table["difference"] > table["allowed"]]  # infinite for an epoch that is not there
    if len(outside):
        verdict = f"not repeated: {len(outside)} of {len(table)} numbers differ by more than is allowed"
        verdict += f" ({'; '.join(outside)})"
    elif same:
        verdict = f"repeated to the bit, and its {len(table)} numbers with it"
    else:
        verdict = f"repeated: its {len(table)} numbers lie within what devices differ by"
    log(f"The run {config.key()} is {verdict}. Recorded on {there}; here {here}.")
    return not len(outside)
