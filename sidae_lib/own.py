"""Images of the reader's own: what they are, how to train on them, and what came out, in words (notebook 10)."""

import hashlib
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from . import data, paths, train
from .config import RunConfig, SidaeError, typed
from .data import Images, subset

STEPS = {"smoke": 8, "quick": 220, "laptop": 2500, "paper": 19_500}  # optimiser steps of a run without a time budget
SHARES = (0.01, 0.05, 0.1, 1.0)  # of the training labels, for the learning curve
PRETRAINED = {"sidae": "SidAE", "simsiam": "SimSiam", "dae": "the autoencoder"}


def prepare(place: str, size: int = 32) -> tuple[str, list[str]]:
    """A folder or an npz as people have them -> (a name for `data.load`, what was done, in sentences).

    place: a folder (also `folder:PATH`) of class folders, or of train/, test/ and unlabeled/ with class folders in the
    first two; an npz (also `npz:PATH`) with MedMNIST's keys; or a name, which passes. In a folder sizes and modes may
    differ and files may be broken: images become RGB of `size` pixels, what cannot be read is left out and said. Where
    there is no test split, a fifth of each class becomes one (seed 0). Raises SidaeError where too little is left.
    """
    path = Path(typed("images", place, str).removeprefix("folder:").removeprefix("npz:")).expanduser()
    notes: list[str] = []
    if path.is_dir():
        arrays = _decode(path, size, notes)
    elif path.suffix == ".npz" and path.is_file():
        with data._reading(f"{path} could not be read", "it must be a whole npz file of plain arrays"):
            with np.load(path, allow_pickle=False) as z:
                if {"test_images", "val_images"} & {*z} or not {"train_images", "train_labels"} <= {*z}:
                    return f"npz:{path}", []
                arrays = dict(z)
    else:
        return place, []
    if "test_images" not in arrays:
        test = _fifth(arrays["train_labels"].ravel())
        arrays |= {f"{s}_{a}": arrays[f"train_{a}"][rows] for a in ("images", "labels")
                   for s, rows in (("test", test), ("train", ~test))}  # fmt: skip
        notes.append(f"There is no test split: {test.sum()} of {len(test)} images, a fifth of each class, became one.")
    np.savez(content := io.BytesIO(), **arrays)
    named = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    train.write(out := paths.runs() / "own" / named / f"{path.resolve().stem}.npz", content.getvalue())
    return f"npz:{out}", notes


def _decode(root: Path, size: int, notes: list[str]) -> dict[str, np.ndarray]:
    """The arrays of an npz with MedMNIST's keys, from image files."""
    def folders(place: Path) -> list[Path]:
        return sorted(d for d in place.iterdir() if d.is_dir() and d.name[0] != ".")

    splits = {s: root / s for s in data.SPLITS if (root / s).is_dir()} or {"train": root}
    classes = [d.name for d in folders(splits.get("train", root))]
    arrays, broken = {"classes": np.array(classes)}, []
    for split, place in splits.items():
        images, labels = [], []
        for folder in [place] if split == "unlabeled" else folders(place):
            if split == "test" and folder.name not in classes:
                raise SidaeError(f"{folder} is a class that train/ does not have; rename or remove it.")
            for f in sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS and f.name[0] != "."):
                try:
                    with Image.open(f) as im:
                        pixels = torch.from_numpy(np.array(im.convert(data.MODES[im.mode]).convert("RGB")))
                    images.append(data._fit(pixels.permute(2, 0, 1)[None], size, 3, True)[0].permute(1, 2, 0).numpy())
                    labels.append(0 if split == "unlabeled" else classes.index(folder.name))
                except Exception:  # whatever a decoder raises on a damaged file; the file is named
                    broken.append(f.name)
        if images:
            arrays[f"{split}_images"] = np.stack(images)
            if split != "unlabeled":
                arrays[f"{split}_labels"] = np.array(labels)
    if broken:
        notes.append(f"{len(broken)} files could not be read and were left out: {', '.join(broken[:5])}"
                     f"{', ...' if len(broken) > 5 else ''}.")  # fmt: skip
    if len(set(arrays.get("train_labels", np.empty(0)).tolist())) < 2:
        raise SidaeError(f"{root} has readable images of fewer than two classes; sort them into train/<class>/ and "
                         "test/<class>/, or into <class>/.")  # fmt: skip
    return arrays


def _fifth(labels: np.ndarray) -> np.ndarray:
    """Mask of the images that become the test split: a fifth of each class, at least one of every class of two."""
    test, rng = np.zeros(len(labels), bool), np.random.default_rng(0)
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        test[rows[: max(round(len(rows) / 5), int(len(rows) > 1))]] = True
    return test


def look(images: Images) -> tuple[pd.DataFrame, list[str]]:
    """One row per split (images, classes that occur, images of the rarest and the commonest class, exact copies of
    training images), and what of it weakens a conclusion, in sentences. Raises SidaeError without labels."""
    rows, warnings = [], []
    own = {x.tobytes() for x in images.split("train").images.numpy()}
    for name, split in images.splits.items():
        count = torch.bincount(split.labels) if split.labels is not None and name != "unlabeled" else torch.zeros(1)
        copies = sum(x.tobytes() in own for x in split.images.numpy()) if name != "train" else len(split.images) - len(own)
        rows.append({"split": name, "images": len(split.images), "classes": int((count > 0).sum()),
                     "rarest": int(count[count > 0].min()) if count.any() else 0, "commonest": int(count.max()),
                     "copies": copies})  # fmt: skip
    table = pd.DataFrame(rows).set_index("split")
    for name in ("train", "test"):
        if images.split(name).labels is None:
            raise SidaeError(f"The {name} split of {images.display} has no labels, so no verdict can be reached on it.")
    test = table.loc["test"]
    if test.copies:
        warnings.append(f"{test.copies} of {test.images} test images are also training images: accuracies are too high.")
    if table.commonest["train"] > 10 * table.rarest["train"]:
        warnings.append(f"The classes are unbalanced, {table.rarest['train']} to {table.commonest['train']} images: always "
                        f"guessing the commonest scores {100 * test.commonest / test.images:.0f} %.")  # fmt: skip
    if test.images < 400:
        warnings.append(f"{test.images} test images: a difference below {196 * math.sqrt(0.5 / test.images):.0f} points "
                        "cannot be told from chance.")  # fmt: skip
    return table, warnings


def hidden(images: Images, labels: int = 0) -> pd.DataFrame:
    """Which augmentations hide the class: a method that learns to ignore what they change cannot see it any more.

    The error of the nearest neighbour on pixels, leave one out, among at most 2,000 of the labelled images: as they are;
    of each mirrored image among the others as they are; with a distance that sees neither colour nor brightness. `hides`
    is true where the odds of an error at least double and the images that turned wrong outnumber those that turned right
    by three standard deviations and by a twentieth of all.
    """
    split = images.split("train")
    rows = subset(len(split.labels), count=typed("labels", labels, int))[torch.randperm(labels or len(split.labels),
                                                                  generator=torch.Generator().manual_seed(0))[:2000]]
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
    """fields: of every pre-training RunConfig.  counts: of labels on the learning curve, the reader's own among them.
    steps: of each run.  reasons: why, in sentences."""

    fields: dict[str, Any]
    counts: tuple[int, ...]
    steps: int
    reasons: list[str]


def plan(images: Images, network: RunConfig, steps: int, *, labels: int = 0, minutes: float = 0.0, seeds: Sequence[int] = (0,),
         device: str = "auto") -> Plan:  # fmt: skip
    """Batch, epochs and augmentation for these images, with reasons.

    network: any pre-training run on them at the wanted size; its batch is the largest.  steps: of each run, unless
    `minutes` (for everything) are given: then a few steps are timed.  labels: how many the reader has, 0 = all.
    """
    labels, minutes, seeds = typed("labels", labels, int), typed("budget", minutes, float), typed("seeds", seeds, list)
    split, x = images.split("train"), images.split("train").images
    n, share, every = len(x), "train", len(split.labels)
    if "unlabeled" in images.splits and len(images.split("unlabeled").images) > n:
        n, share = len(images.split("unlabeled").images), "unlabeled"
    labels = labels or every
    counts = tuple(sorted(c for c in {labels, *(round(f * every) for f in SHARES)} if c and all(
        len(split.labels[subset(every, count=c, seed=s)].unique()) > 1 for s in seeds)))
    if labels not in counts:
        raise SidaeError(f"{labels} labels of {images.display} are all of one class; at least two classes are needed.")
    batch = min(network.batch, 2 ** max(3, int(math.log2(max(n, 8) / 4))))
    reasons = [f"Pre-training on the {n} images of the {share} split, batch {batch}: "
               + ("the scale's own." if batch == network.batch else "small, so that an epoch has several steps.")]  # fmt: skip
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
        steps = max(1, int(0.6 * 60 * minutes / (second * len(seeds) * (3 + 0.6 * len(counts)))))  # the rest: evaluation
        steps = min(steps, max(200 * (n // batch), 2500))
        reasons.append(f"{steps} steps a run: one takes {1000 * second:.0f} ms here, and {minutes:g} minutes must do for "
                       f"three methods and {len(counts)} supervised networks, {len(seeds)} times each.")  # fmt: skip
    epochs = max(1, math.ceil(steps / (n // batch)))
    pool = batch * steps if steps < n // batch else 0
    reasons.append(f"{epochs} epoch{'s' * (epochs > 1)} of {pool or n} images." + (
        " Fewer than 300 steps: enough to see that it works, not to learn much." if steps < 300 else ""))
    return Plan(fields | {"epochs": epochs, "pool": pool}, counts, steps, reasons)


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
    wide = own.pivot(index="seed", columns="method", values="accuracy")
    if len(wide) < 2:
        raise SidaeError("A verdict needs at least two seeds, since one has no spread; ask for more.")
    mean = wide.mean()

    def gap(a: str, b: str) -> tuple[float, float, float]:
        from .published import Difference  # needs scipy, slow to import

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
