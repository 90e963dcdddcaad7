"""What each figure needs: scale in, configs out. A figure's function here has the name of its notebook and its files."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import data, methods
from .config import EvalConfig, RunConfig, SidaeError


@dataclass(frozen=True)
class Scale:
    """How large an experiment is; the fields of `run` that a method does not read are left out for it."""

    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    labels: tuple[float, float]  # many, scarce: shares of the training labels
    epochs: dict[str, int]  # per data set
    points: int  # checkpoints that are evaluated, evenly spaced
    run: dict[str, Any]
    pool: dict[str, int] = field(default_factory=dict)  # pre-training images, 0 = all
    neighbours: tuple[int, int] = (200, 20)  # kNN's k with many and with scarce labels
    supervised_epochs: int = 50


_SMALL = {"backbone": "small_cnn", "dim": 64, "hidden": 64, "pred_hidden": 16, "decoder": 64}
_NARROW = {"width": 16, "dim": 256, "hidden": 256, "pred_hidden": 64, "decoder": 128}
SCALES: dict[str, Scale] = {
    # tests and notebook validation: seconds
    "smoke": Scale(("digits", "photos"), (0,), (0.2, 0.1), {"digits": 2, "photos": 2}, 2, {**_SMALL, "batch": 64},
                   {"digits": 256, "photos": 256}, (20, 5), 2),
    # everything works, no download: minutes
    "quick": Scale(("digits", "photos"), (0,), (1.0, 0.1), {"digits": 30, "photos": 8}, 4, {**_NARROW, "batch": 128},
                   {}, (20, 5)),
    # trends on real images without a GPU: hours. 65 x 39 and 55 x 46 steps, at least 2,500
    "laptop": Scale(("mnist", "fashion_mnist", "cifar10"), (0, 1, 2), (0.1, 0.01),
                    {"mnist": 55, "fashion_mnist": 55, "cifar10": 65}, 5, {**_NARROW, "batch": 128},
                    {"mnist": 6000, "fashion_mnist": 6000, "cifar10": 5000}),
    # the paper's protocol, all of it
    "paper": Scale(("mnist", "fashion_mnist", "cifar10"), (0, 1, 2, 3, 4), (1.0, 0.01),
                   {"mnist": 200, "fashion_mnist": 200, "cifar10": 200}, 8, {"precision": "bf16"}),
}  # fmt: skip
GREY = ("mnist", "fashion_mnist", "digits")
PROBES = ("linear", "logistic", "knn")


def scale_of(name: str) -> Scale:
    if name not in SCALES:
        raise SidaeError(f"Unknown scale {name!r}; choose from {', '.join(SCALES)}.")
    return SCALES[name]


def run(method: str, dataset: str, scale: str, seed: int = 0, **changes) -> RunConfig:
    """One pre-training run of a method on a named set at a scale; `changes` are RunConfig fields."""
    s = scale_of(scale)
    if method not in methods.METHODS:
        raise SidaeError(f"Unknown method {method!r}; choose from {', '.join(methods.METHODS)}.")
    fields = {k: v for k, v in s.run.items() if k not in methods.SHARED or k in methods.METHODS[method].reads}
    known = data.identify(dataset, download=bool(os.environ.get("SIDAE_DOWNLOAD")))
    fields |= {"method": method, "data": known, "seed": seed}
    if method == "untrained":
        fields |= {"epochs": 0, "augment": "none"}
        fields.pop("precision", None)
    elif method == "supervised":  # the downstream recipe, from scratch
        fields |= {"epochs": s.supervised_epochs, "lr": 0.05, "batch": 256, "weight_decay": 0.0, "schedule": "constant",
                   "augment": "none"}  # fmt: skip
    else:
        if dataset not in s.epochs:
            raise SidaeError(f"Scale {scale} has no length for {dataset!r}; its sets are {', '.join(s.epochs)}.")
        fields |= {"epochs": s.epochs[dataset], "pool": s.pool.get(dataset, 0),
                   "augment": "simsiam_grey" if dataset in GREY else "simsiam_cifar"}  # fmt: skip
    return RunConfig.create(**fields | changes)


def checkpoints(run: RunConfig, points: int) -> list[int]:
    """Evenly spaced epochs, the last among them."""
    return sorted({max(1, round(run.epochs * (k + 1) / points)) for k in range(points)}) if run.epochs else [0]


def accuracy_vs_epochs(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()
                       ) -> tuple[list[RunConfig], list[EvalConfig]]:  # fmt: skip
    """Figures 3 and 5: accuracy after more and more pre-training, many and scarce labels, three methods, and the
    supervised and the untrained network as lines."""
    s = scale_of(scale)
    runs, evals = [], []
    for dataset in datasets or s.datasets:
        for seed in seeds or s.seeds:
            for method in ("sidae", "simsiam", "dae", "untrained"):
                r = run(method, dataset, scale, seed)
                runs.append(r)
                evals += [EvalConfig(run=r, kind=kind, epoch=epoch, labels=labels, **({"k": k} if kind == "knn" else {}))
                          for epoch in checkpoints(r, s.points) for labels, k in zip(s.labels, s.neighbours)
                          for kind in PROBES]
            for labels in s.labels:
                r = run("supervised", dataset, scale, seed, labels=labels)
                runs.append(r)
                evals.append(EvalConfig(run=r, kind="classifier", labels=labels))
    return runs, evals


def sidae_step_by_step(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()
                       ) -> tuple[list[RunConfig], list[EvalConfig]]:  # fmt: skip
    """Figures 1 and 2 and the walk through the loss: one short run."""
    return [run("sidae", (datasets or scale_of(scale).datasets)[0], scale, (seeds or (0,))[0])], []


FIGURES: dict[str, Callable] = {f.__name__: f for f in (sidae_step_by_step, accuracy_vs_epochs)}


def figure(name: str) -> Callable:
    if name not in FIGURES:
        raise SidaeError(f"Unknown figure {name!r}; choose from {', '.join(FIGURES)}.")
    return FIGURES[name]
