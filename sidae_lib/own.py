"""Images of the reader's own: what they are, how to train on them, and what came out, in words (notebook 10)."""

import hashlib
import inspect
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import copies, data, frames, methods, networks, store, train
from .config import RunConfig, SidaeError, typed
from .data import Images, subset
from .differences import Difference

# optimiser steps of a run without a time budget
STEPS = {"smoke": 8, "quick": 40, "recorded": 2500, "laptop": 2500, "paper": 19_500}
SHARES = (0.01, 0.05, 0.1, 1.0)  # of the training labels, for the learning curve
PAIRS = 600_000_000  # of a test and a training image, compared at most to find near copies
PRETRAINED = {"sidae": "SidAE", "simsiam": "SimSiam", "dae": "the autoencoder"}


def prepare(place: str, size: int = 32) -> tuple[str, tuple[str, ...]]:
    """Images as people have them -> (a name for `data.load`, how they were read, in sentences).

    place: a folder, zip, npz, npy or Parquet file, by its path; or the name of a set, which passes. Where there is no test
    split, a fifth of each class becomes one (seed 0). Raises SidaeError where there is no clear way to read it.
    """
    name = data.place(typed("images", place, str))
    if ":" in name and not name.startswith("split:"):
        name = f"split:{name}"
    beside = name == place and Path(place).is_dir()
    notes = data.load(name, size=size).notes
    return name, (*notes, f"{place} is the set of that name; for the folder write ./{place}.") if beside else notes


COLUMNS = ("images", "classes", "rarest", "commonest", "copies", "near")


def look(images: Images, verdict: bool = True) -> tuple[pd.DataFrame, list[str]]:
    """One row per split, and sentences on what weakens a conclusion.

    Columns: images; classes that occur; images of the rarest and the commonest class; exact copies of training images;
    test images that are nearly a training image ("-": not judged); files left out, by reason. The row "-" counts files of no
    split. Raises SidaeError where no verdict can be reached; without `verdict`, the first sentence says so instead.
    """
    splits = images.splits
    train_digests = {_digest(x) for x in splits["train"].images} if "train" in splits else set()
    reasons = dict.fromkeys(reason for _, reason, _ in images.left)
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([*splits, *(split for split, _, _ in images.left)]):
        row = _counts(name, splits[name], train_digests) if name in splits else dict.fromkeys(COLUMNS, "-")
        left = {reason: sum(n for split, why, n in images.left if (split, why) == (name, reason)) for reason in reasons}
        rows[name or "-"] = row | left
    compared = 0
    if {"train", "test"} <= {*splits}:
        bank, x = splits["train"].images, splits["test"].images
        some = subset(len(x), count=min(len(x), max(1, PAIRS // len(bank))))
        compared = len(some)
        near = copies.near(x[some], bank)
        if near is not None:
            rows["test"]["near"] = sum(_digest(i) not in train_digests for i in x[some[near]])
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("split")
    unusable = _unusable(images, table)
    if unusable and verdict:
        raise SidaeError(unusable)
    return table, [unusable] * bool(unusable) + _weaknesses(table, compared, labelled=_unlabelled(images) is None)


def _counts(name: str, split: data.Split, train_digests: set[bytes]) -> dict[str, Any]:
    """A split's row of `look`, before anything was compared."""
    x, labels = split.images, None if name == "unlabeled" else split.labels
    count = torch.zeros(1, dtype=torch.int64) if labels is None else torch.bincount(labels)
    twice = len(x) - len(train_digests) if name == "train" else sum(_digest(i) in train_digests for i in x)
    rarest = int(count[count > 0].min()) if count.any() else 0
    numbers = (len(x), int((count > 0).sum()), rarest, int(count.max()), twice, "-")
    return dict(zip(COLUMNS, numbers, strict=True))


def _unlabelled(images: Images) -> str | None:
    """The split that is missing, or has no labels, though a verdict needs it."""
    return next((s for s in ("train", "test") if s not in images.splits or images.splits[s].labels is None), None)


def _unusable(images: Images, table: pd.DataFrame) -> str:
    """Why no verdict can be reached on a set; empty where one can."""
    lacking = _unlabelled(images)
    if not lacking and table.classes["train"] > 1:
        return ""
    why = f"{images.display} has no {lacking} split with labels"
    if not lacking:
        why = f"All training images of {images.display} are of one class"
    only = ": only pre-training is possible" if "unlabeled" in images.splits else ""
    return f"{why}, so no verdict can be reached on it{only}."


def _weaknesses(table: pd.DataFrame, compared: int, labelled: bool) -> list[str]:
    """What of a set makes an accuracy too high or a difference too uncertain. compared: test images that were compared with
    the training images, 0 where there is none of either."""
    if not compared:
        return []
    test, out = table.loc["test"], []
    if test.copies:
        out.append(f"{test.copies} of {test.images} test images are also training images: accuracies are too high.")
    if test.near != "-" and test.near > compared / 20:  # fewer move an accuracy by less than other things do
        out.append(f"{test.near} of {compared} test images are nearly the same as a training image, as neighbouring "
                   "frames of a video are: accuracies are too high. Put each video, patient or burst into one split.")
    if compared < test.images:
        out.append(f"Near copies were looked for among {compared} of the {test.images} test images.")
    if not labelled:
        return out
    rarest, commonest = table.rarest["train"], table.commonest["train"]
    if commonest > 10 * rarest:
        out.append(f"The classes are unbalanced, {rarest} to {commonest} images: always guessing the commonest scores "
                   f"{100 * test.commonest / test.images:.0f} %.")  # fmt: skip
    if test.images < 400:
        half = 196 * math.sqrt(0.5 / test.images)
        told = "too few to tell a difference from chance."
        if half < 50:
            told = f"a difference below {half:.0f} points cannot be told from chance."
        out.append(f"{test.images} test images: {told}")
    return out


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy(), digest_size=16).digest()


def hidden(images: Images, labels: int = 0) -> pd.DataFrame:
    """Which augmentations hide the class: a method that learns to ignore what they change cannot see it any more.

    The error of the nearest neighbour on pixels, leave one out, among at most 2,000 of the labelled images: as they are;
    of each mirrored image among the others as they are; with a distance that sees neither colour nor brightness. `hides`
    is true where the odds of an error at least double and the images that turned wrong outnumber those that turned right
    by three standard deviations and by a twentieth of all.
    """
    split = images.split("train")
    labels = min(typed("labels", labels, int) or len(split.labels), len(split.labels))
    few = torch.randperm(labels, generator=torch.Generator().manual_seed(0))[:2000]
    rows = subset(len(split.labels), count=labels)[few]
    x, y = split.images[rows] / 255, split.labels[rows]
    grey = x.mean(1).flatten(1)
    shape = (grey - grey.mean(1, keepdim=True)) / grey.std(1, keepdim=True).clamp(min=1e-3)
    plain = torch.cdist(x.flatten(1), x.flatten(1))
    ways = {"flip": torch.cdist(x.flip(3).flatten(1), x.flatten(1)), "colour": torch.cdist(shape, shape)}

    def wrong(distance: Tensor) -> Tensor:
        return y[distance.fill_diagonal_(math.inf).argmin(1)] != y

    out, before = [], wrong(plain.clone())
    for name, distance in ways.items():
        after = wrong(distance)
        lost, gained = int((after & ~before).sum()), int((before & ~after).sum())
        odds = [(w.sum().item() + 0.5) / ((~w).sum().item() + 0.5) for w in (before, after)]
        out.append({"augmentation": name, "images": len(y), "error without": 100 * before.double().mean().item(),
                    "error with": 100 * after.double().mean().item(),
                    "hides": lost - gained > max(3 * math.sqrt(lost + gained), len(y) / 20) and odds[1] > 2 * odds[0]})
    return pd.DataFrame(out).set_index("augmentation").round(1)


class Plan(NamedTuple):
    """fields: of every pre-training RunConfig.  counts: of labels on the learning curve, the reader's own, `labels`, among
    them.  steps: of each run.  reasons: why, in sentences."""

    fields: dict[str, Any]
    counts: tuple[int, ...]
    steps: int
    reasons: list[str]
    labels: int


def plan(images: Images, network: RunConfig, steps: int, *, labels: int = 0, minutes: float = 0.0, seeds: Sequence[int] = (0,),
         device: str = "auto") -> Plan:  # fmt: skip
    """Batch, epochs and augmentation for these images, with reasons.

    network: any pre-training run on them at the wanted size; its batch is the largest.  steps: of each run, unless
    `minutes` (for everything) are given: then a few steps are timed.  labels: how many the reader has, 0 = all, cut to as
    many as there are.
    """
    labels, minutes = typed("labels", labels, int), typed("budget", minutes, float)
    seeds = typed("seeds", seeds, list) or [0, 1, 2]  # as in `experiments.your_own_images`
    if not minutes >= 0:
        raise SidaeError(f"budget is minutes, or 0 for the scale's length, not {minutes}.")
    split, x = images.split("train"), images.split("train").images
    n, share, every = len(x), "train", len(split.labels)
    if "unlabeled" in images.splits and len(images.split("unlabeled").images) > n:
        n, share = len(images.split("unlabeled").images), "unlabeled"
    wanted, labels = labels, min(labels or every, every)
    counts = tuple(sorted(c for c in {labels, *(round(f * every) for f in SHARES)} if c and all(
        len(split.labels[subset(every, count=c, seed=s)].unique()) > 1 for s in seeds)))
    if labels not in counts:
        raise SidaeError(f"{labels} labels of {images.display} are all of one class; at least two classes are needed.")
    batch = min(network.batch, 2 ** max(min(3, int(math.log2(n))), int(math.log2(max(n, 8) / 4))))
    if batch == network.batch:
        why = "the scale's own"
    elif n >= 2 * batch:
        why = "small, so that an epoch has several steps"
    else:
        why = "small, as the images are few"
    reasons = [f"Pre-training on the {n} images of the {share} split, batch {batch}: {why}."]
    if wanted > labels:
        reasons.append(f"{labels} labels instead of {wanted}: there are no more training images with labels.")
    grey = bool((x == x[:, :1]).all())
    table = hidden(images, labels)
    bad = [name for name in table.index if table.hides[name]]
    augment = ("simsiam_grey" if grey else "simsiam_cifar") + (f"_without_{'_'.join(bad)}" if bad else "")
    reasons.append(f"Augmentation {augment}: the images are {'grey' if grey else 'in colour'}"
                   + ("" if bad else ", and neither mirroring nor colour jitter hides the class") + ".")  # fmt: skip
    reasons += [f"Warning: {name} hides the class: the nearest neighbour's error rises from {r['error without']} to "
                f"{r['error with']} % with it, so it is left out." for name, r in table.loc[bad].iterrows()]
    fields = {"split": share, "batch": batch, "augment": augment}
    if minutes:
        second = _step(network.replace(pool=min(n, 8 * batch), epochs=1, **fields), images, device)
        fit = 0.6 * 60 * minutes / (second * len(seeds) * (3 + 0.6 * len(counts)))  # the rest: evaluation
        steps = max(1, int(min(fit, max(200 * (n // batch), 2500))))
        reasons.append(f"{steps} steps a run: one takes {1000 * second:.0f} ms here, and {minutes:g} minutes must do for "
                       f"three methods and {len(counts)} supervised networks, {len(seeds)} times each.")  # fmt: skip
    epochs = max(1, math.ceil(steps / (n // batch)))
    pool = batch * steps if steps < n // batch else 0
    reasons.append(f"{epochs} epoch{'s' * (epochs > 1)} of {pool or n} images." + (
        " Fewer than 300 steps: enough to see that it works, not to learn much." if steps < 300 else ""))
    return Plan(fields | {"epochs": epochs, "pool": pool}, counts, steps, reasons, labels)


def _step(config: RunConfig, images: Images, device: str) -> float:
    """Seconds of an optimiser step, the median of a few."""
    run, times = train.Run(config, images, train.device_of(device)), []
    drawn = run.draw(0)
    for a, b in run.bounds:
        began = time.perf_counter()
        run.advance(drawn, a, b)
        run.sums["loss"].item()  # waits for a GPU
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def verdict(records: Sequence[dict[str, Any]], labels: int) -> list[str]:
    """What evaluations by logistic regression and of supervised networks say, in words: does pre-training help with
    `labels` labels, which method, how many labels it is worth.

    Intervals hold for the three methods together (95 %, Bonferroni): Student's t of the differences paired by seed, and
    the sampling of the test images, added in squares. Help is an interval above 0 against both the supervised and the
    untrained network. Raises SidaeError for fewer than two seeds.
    """
    frame = pd.DataFrame([{"method": c["run"]["method"], "seed": c["run"].get("seed", 0), "labels": r["n_train"],
                           "accuracy": r["accuracy"], "n": r["n_test"]} for r in records for c in (r["config"],)])
    tests, own = int(frame["n"].min()), frame[frame["labels"] == labels]
    if own.empty:
        raise SidaeError(f"No record has {labels} labels; give one of {', '.join(map(str, sorted(set(frame['labels']))))}.")
    wide = own.pivot(index="seed", columns="method", values="accuracy")
    if len(wide) < 2:
        raise SidaeError("A verdict needs at least two seeds, since one has no spread; ask for more.")
    mean = wide.mean()

    def gap(a: str, b: str) -> tuple[float, float, float]:
        sampling = 100 * math.sqrt(sum(p * (1 - p) for p in (mean[a] / 100, mean[b] / 100)) / tests)
        d = Difference(wide[a] - wide[b], sampling)
        half = d.half(0.05 / len(PRETRAINED))
        return d.mean, d.mean - half, d.mean + half

    def said(a: str, b: str) -> str:
        return "{:+.1f} points ({:+.1f} to {:+.1f})".format(*gap(a, b))

    floors = {"supervised": "the supervised network", "untrained": "the untrained network"}
    best, *rest = mean[list(PRETRAINED)].sort_values(ascending=False).index
    helps = [m for m in PRETRAINED if all(gap(m, f)[1] > 0 for f in floors)]
    out = [("Yes: pre-training helps" if helps else "No help of pre-training is shown")
           + f" with {labels} labels ({len(wide)} seeds, {tests} test images)."]  # fmt: skip
    for m in helps or [best]:
        name = PRETRAINED[m][0].upper() + PRETRAINED[m][1:]
        out[0] += f" {name} scores {mean[m]:.1f} %, " + ", ".join(f"{said(m, f)} against {floors[f]}" for f in floors) + "."
    told = all(gap(best, m)[1] > 0 for m in rest)
    out.append(f"Which method: {PRETRAINED[best]} has the highest mean, "
               + ", ".join(f"{said(best, m)} against {PRETRAINED[m]}" for m in rest)
               + ("." if told else "; where the interval holds 0 the two are not told apart."))  # fmt: skip
    if not helps:
        return [*out, "How many labels it is worth: none that could be shown."]
    curve = frame[frame["method"].isin(floors)].groupby(["labels", "method"])["accuracy"].mean().unstack().max(axis=1)
    top = max(helps, key=lambda m: mean[m])
    _, low, high = gap(top, mean[list(floors)].idxmax())
    return [*out, f"How many labels it is worth: with {labels} labels {PRETRAINED[top]} does as well as the better "
                  f"baseline with {_needed(curve, curve[labels] + low)} to {_needed(curve, curve[labels] + high)}."]


def _needed(curve: pd.Series, accuracy: float) -> str:
    """Labels with which a learning curve reaches an accuracy, between its points linear in log labels."""
    reached = curve.sort_index().cummax()
    if accuracy > reached.iloc[-1]:
        return f"more than {reached.index[-1]}"
    return f"{math.exp(np.interp(accuracy, reached, np.log(reached.index))):.0f}"


def card(run: RunConfig, images: Images, records: Sequence[dict[str, Any]], labels: int) -> Path:
    """A model card in Markdown beside a run's backbone: what it is, of which images, how good it is with `labels` labels, and
    the lines that load it.

    records: among them this method's evaluations by logistic regression, one a seed. Their interval is Student's t over the
    seeds and the sampling of the test images, added in squares. Raises SidaeError where there is none, or no backbone.
    """

    def of(config: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k != "seed"}

    net, name, made = networks.load(path := store.backbone(run)), methods.NAMES[run.method], store.find(run)
    tried = {r["key"]: r for r in records if r.get("kind") == "logistic" and r["n_train"] == labels
             and r["epoch"] == run.epochs and of(r["config"]["run"]) == of(run.to_dict())}.values()  # fmt: skip
    scores = pd.Series({r["config"]["run"].get("seed", 0): r["accuracy"] for r in tried}, dtype=float)
    if made is None or images.fingerprint != run.data or run.seed not in scores or len(scores) < len(tried):
        raise SidaeError(f"A card of {name} {run.key()} needs its images, its record and, with {labels} labels, one evaluation "
                         "by logistic regression a seed, its own among them; fetch these first.")  # fmt: skip
    tests, mean = min(r["n_test"] for r in tried), scores.mean()
    _, low, high = Difference(scores, math.sqrt(mean * (100 - mean) / tests)).interval()
    span = f"95 % interval {max(low, 0):.1f} to {min(high, 100):.1f}" if len(scores) > 1 else "no interval from one seed"
    where, p = [r["provenance"] for r in (made, *tried)], made["provenance"]
    n = run.label_count or run.pool or round(run.labels * len(images.split(run.split).images))
    shape = f"{run.channels}, {run.size}, {run.size}"
    text = f"""# {name} on {images.display}

- Method: {name}{f" ({of_paper})" if (of_paper := paper(run.method)) else ""}, seed {run.seed}, run {run.key()}
- Images: {images.display}, fingerprint {run.data}
- Pre-training: {n} images of the {run.split} split, {made["steps"]} steps of {run.batch}, epochs: {run.epochs}, {run.augment}
- Network: {run.backbone}, width {run.width}, {net.out_features} features
- Input: (N, {shape}), pixels in 0 to 1 less mean {net.mean}, over std {net.std}
- Accuracy: {mean:.1f} % ({span}, n = {len(scores)}), {tests} test images; of this seed {scores[run.seed]:.1f} %
- Judged by: logistic regression on the frozen features, {labels} labels; the interval is of seeds and test images
- Computed on: {frames.distinct(map(frames.hardware, where))}; {made["seconds"]:.0f} s of training
- Versions: sidae_lib {p["package"]}, commit {p["commit"]}, torch {p["torch"]}
- Licence of the code: MIT

In the folder of this card:

```python
import torch
from sidae_lib import networks

net = networks.load("{path.name}")
pixels = torch.randint(0, 256, (4, {shape}), dtype=torch.uint8)  # your images
features = networks.features(net, pixels, stats=(net.mean, net.std), device=torch.device("cpu"))  # (4, {net.out_features})
```
"""
    train.write(out := path.with_suffix(".md"), text.encode())
    return out


def paper(method: str) -> str:
    """The number of a method's paper, as its class or else its file names it first; empty where there is none."""
    cls = methods.METHODS[method]
    found = re.search(r"arXiv:[\d.]+\d", f"{cls.__doc__} {inspect.getmodule(cls).__doc__}")
    return found[0] if found else ""
