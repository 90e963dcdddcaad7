"""What each figure needs: scale in, configs out. A figure's function here has the name of its notebook and its files."""

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from . import data, methods, runs
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
    pictured: int = 1000  # points on a map
    weights: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1)  # w of Figure 4
    transfer: tuple[str, ...] = ("photos", "digits", "photos")  # pre-training set, then those that are classified


_SMALL = {"backbone": "small_cnn", "dim": 64, "hidden": 64, "pred_hidden": 16, "decoder": 64}
_NARROW = {"width": 16, "dim": 256, "hidden": 256, "pred_hidden": 64, "decoder": 128}
SCALES: dict[str, Scale] = {
    # tests and notebook validation: seconds
    "smoke": Scale(("digits", "photos"), (0,), (0.2, 0.1), {"digits": 2, "photos": 2}, 2, {**_SMALL, "batch": 64},
                   {"digits": 256, "photos": 256}, (20, 5), 2, 150, (0, 0.5, 1)),
    # everything works, no download: minutes
    "quick": Scale(("digits", "photos"), (0,), (1.0, 0.1), {"digits": 30, "photos": 8}, 4, {**_NARROW, "batch": 128},
                   {}, (20, 5)),
    # trends on real images without a GPU: hours. 65 x 39 and 55 x 46 steps, at least 2,500
    "laptop": Scale(("mnist", "fashion_mnist", "cifar10"), (0, 1, 2), (0.1, 0.01),
                    {"mnist": 55, "fashion_mnist": 55, "cifar10": 65, "tinyimagenet32": 65}, 5, {**_NARROW, "batch": 128},
                    {"mnist": 6000, "fashion_mnist": 6000, "cifar10": 5000, "tinyimagenet32": 5000},
                    transfer=("tinyimagenet32", "cifar10")),
    # the paper's protocol, all of it
    "paper": Scale(("mnist", "fashion_mnist", "cifar10"), (0, 1, 2, 3, 4), (1.0, 0.01),
                   dict.fromkeys(("mnist", "fashion_mnist", "cifar10", "stl10", "tinyimagenet32"), 200), 8,
                   {"precision": "bf16"}, weights=tuple(k / 10 for k in range(11)), transfer=("stl10", "stl10", "cifar10")),
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


Needs = tuple[list[RunConfig], list[EvalConfig]]


def weighted(w: float, dataset: str, scale: str, seed: int = 0, **changes) -> RunConfig:
    """SidAE with the weight w; its ends are the records of the autoencoder and of SimSiam."""
    name = {0: "dae", 1: "simsiam"}.get(w, "sidae")
    return run(name, dataset, scale, seed, **({"w": w} if name == "sidae" else {}), **changes)


def pretrained(dataset: str, scale: str, seed: int, *, on: Sequence[str] = ("",), kinds: Sequence[str] = PROBES,
               points: int = 0, methods: Sequence[str] = ("sidae", "simsiam", "dae", "untrained"), **changes) -> Needs:
    """Runs of `methods` on a set, their checkpoints evaluated on the sets `on` ("": the run's own), with many and with
    scarce labels; points: how many evenly spaced checkpoints, 0 = the scale's own number."""
    s, evals = scale_of(scale), []
    runs = [run(m, dataset, scale, seed, **(changes if m != "untrained" else {})) for m in methods]
    for target in on:
        known = target and data.identify(target)
        for labels, k in zip(s.labels, s.neighbours):
            own = {"knn": {"k": k}, "finetune": {"fit_epochs": s.supervised_epochs}}
            evals += [EvalConfig(run=r, kind=kind, epoch=epoch, data=known, labels=labels, **own.get(kind, {}))
                      for r in runs for epoch in checkpoints(r, points or s.points) for kind in kinds]
    return runs, evals


def supervised(dataset: str, scale: str, seed: int) -> Needs:
    """From scratch on the same labels, without augmentation and with the pre-training's."""
    own = "simsiam_grey" if dataset in GREY else "simsiam_cifar"
    runs = [run("supervised", dataset, scale, seed, labels=labels, augment=augment)
            for labels in scale_of(scale).labels for augment in ("none", own)]
    return runs, [EvalConfig(run=r, kind="classifier", labels=r.labels) for r in runs]


def _joined(*parts: Needs) -> Needs:
    runs, evals = ([c for part in parts for c in part[n]] for n in (0, 1))
    return list(dict.fromkeys(runs)), list(dict.fromkeys(evals))


def sidae_step_by_step(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Figures 1 and 2 and the walk through the loss: one short run."""
    return [run("sidae", (datasets or scale_of(scale).datasets)[0], scale, (seeds or (0,))[0])], []


def accuracy_vs_epochs(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Figures 3 and 5: accuracy after more and more pre-training, many and scarce labels, three methods, and the
    supervised and the untrained network as lines."""
    s = scale_of(scale)
    return _joined(*(part(d, scale, seed) for d in datasets or s.datasets for seed in seeds or s.seeds
                     for part in (pretrained, supervised)))


def w_sweep(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Figure 4: accuracy against w, on test and on the validation split that w is chosen by; with one seed (all at paper
    scale) also for targets in [0, 1], a scale of the reconstruction error that the paper leaves open."""
    s, parts = scale_of(scale), []
    dataset, seeds = (datasets or s.datasets)[-1], seeds or s.seeds
    for seed in seeds:
        runs = [weighted(w, dataset, scale, seed) for w in s.weights]
        other = s.weights if scale == "paper" else s.weights[1:-1]
        scaled = [weighted(w, dataset, scale, seed, target="unit") for w in other
                  if w < 1 and (scale == "paper" or seed == seeds[0])]
        parts.append((runs + scaled, [EvalConfig(run=r, labels=labels, score_on=on) for r in runs + scaled
                                      for labels in s.labels for on in ("test", "val")]))
    return _joined(*parts)


def best_w(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> float | None:
    """The w inside (0, 1) with the best mean accuracy on the validation split of the scarce labels, never on test; None
    while a record of the sweep is missing."""
    scarce, found = scale_of(scale).labels[1], defaultdict(list)
    plain = {"target": "standardised", "recon": "mean"}
    for e in w_sweep(scale, datasets, seeds)[1]:
        if e.score_on == "val" and e.labels == scarce and e.run.method == "sidae" and vars(e.run).items() >= plain.items():
            found[e.run.w].append((runs.find(e) or {}).get("accuracy"))
    if None in sum(found.values(), []):
        return None
    return max(found, key=lambda w: mean(found[w]))


def datasets_table(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Table 1: the last checkpoint by the paper's probe, on every set, and after transfer where the pool is there."""
    parts = [accuracy_vs_epochs(scale, datasets, seeds)]
    try:
        parts += [] if datasets else [stl_transfer(scale, (), seeds)]
    except SidaeError as e:
        warnings.warn(f"The table has no transfer rows. {e}", stacklevel=2)
    evals = [e for _, part in parts for e in part if e.epoch == e.run.epochs and e.kind in ("linear", "classifier")]
    return _joined(([e.run for e in evals], evals))


def fine_tuning(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Figure 6: the backbone moves too, for every length of pre-training (first and last below paper scale), SidAE at
    w = 0.5 and, once the sweep that chooses it is recorded, at the chosen w."""
    s = scale_of(scale)
    dataset = (datasets or s.datasets)[-1]
    chosen = best_w(scale, (dataset,), seeds)
    parts = [w_sweep(scale, (dataset,), seeds)] if chosen is None else []
    for seed in seeds or s.seeds:
        found = [pretrained(dataset, scale, seed, kinds=("finetune",)), supervised(dataset, scale, seed)]
        if chosen not in (None, 0.5):
            found.append(pretrained(dataset, scale, seed, kinds=("finetune",), methods=("sidae",), w=chosen))
        parts += [(r, [e for e in evals if scale == "paper" or e.epoch in (checkpoints(e.run, s.points)[0], e.run.epochs)])
                  for r, evals in found]
    return _joined(*parts)


def stl_transfer(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Figure 7: pre-train on one set (STL-10's unlabeled images; below paper scale the pool `tinyimagenet32`), classify
    others; beside it the supervised networks of those, and the networks that were pre-trained on them."""
    s = scale_of(scale)
    source, *targets = datasets or s.transfer
    split = "unlabeled" if source in ("stl10", "tinyimagenet32") else "train"
    augment = "simsiam_grey" if source in GREY else "simsiam_cifar"
    parts = []
    for seed in seeds or s.seeds:
        parts.append(pretrained(source, scale, seed, on=targets, split=split, augment=augment))
        for target in targets:
            parts.append(supervised(target, scale, seed))
            if target in s.datasets and target != source:
                parts.append(pretrained(target, scale, seed, points=1, kinds=("linear",), methods=("sidae",)))
    return _joined(*parts)


def tsne(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Pictures of five backbones' features, the same test points for all: t-SNE, PCA and nearest neighbours."""
    s = scale_of(scale)
    dataset, seed = (datasets or s.datasets)[-1], (seeds or s.seeds)[0]
    runs = pretrained(dataset, scale, seed, methods=("untrained", "dae", "simsiam", "sidae"))[0]
    runs.append(run("supervised", dataset, scale, seed, labels=s.labels[0]))
    return runs, [EvalConfig(run=r, kind="tsne", labels=s.labels[0], k=s.neighbours[0], points=s.pictured) for r in runs]


LOSSES = {"pairwise": {"lr": 0.05, "epochs": 5}, "triplet": {"lr": 0.15, "epochs": 10}}  # 490 updates each
PROTOCOLS = {"faithful": ({"redraw": False}, {"bn": "train", "score_on": "part"}), "fixed": ({"batch_norm": "joint"}, {})}
CONFOUNDS: dict[str, dict[str, dict[str, Any]]] = {  # one change each, of the losses that are named
    "lr 0.05": {"triplet": {"lr": 0.05}}, "lr 0.15": {"pairwise": {"lr": 0.15}}, "margin 0.2": {"triplet": {"margin": 0.2}},
    "margin 0.5": {"pairwise": {"cos_margin": 0.5}}, "cosine distance": {"triplet": {"distance": "cosine"}},
    **{name: dict.fromkeys(LOSSES, change) for name, change in (
        ("no sigmoid", {"embed": "linear"}), ("label-free negatives", {"negatives": "any"}),
        ("anchors augmented", {"augment": "report_simclr_anchors"}))}}  # fmt: skip


def pairwise_vs_triplet(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = (), protocols: Sequence[str] = ()
                        ) -> Needs:  # fmt: skip
    """The student report's twelve scenarios and four controls: as its code ran them (one seed, with t-SNE maps), and by a
    fixed protocol with every seed, where its confounds are undone one at a time."""
    s, smoke, real = scale_of(scale), scale == "smoke", scale in ("laptop", "paper")
    sgd = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "per_class": 5000 if real else 20 if smoke else 500,
           "batch": 1024 if real else 64 if smoke else 128}  # fmt: skip
    runs, evals, short = [], [], {"epochs": 2} if smoke else {}
    for protocol in protocols or PROTOCOLS:
        change, how = PROTOCOLS[protocol]
        how = how | ({"labels": 0.1} if smoke else {})
        for dataset in datasets or (("mnist", "cifar10") if real else s.datasets):
            size = {"channels": 1, "size": 28} if dataset in GREY else {}
            base = {"data": data.identify(dataset), "backbone": "small_cnn", "stats": "half", "augment": "none", **size}
            for seed in (seeds or s.seeds)[: 1 if protocol == "faithful" else None]:
                six = [RunConfig(method=m, seed=seed, **{**base, **sgd, **own, **change, **short, "augment": augment})
                       for augment in ("none", "report_fer", "report_simclr") for m, own in LOSSES.items()]
                if protocol == "faithful":  # maps, of the last by other perplexities too
                    evals += [EvalConfig(run=r, kind="tsne", perplexity=p, bn="train", labels=0.1, points=1000 if real else 60)
                              for r in six for p in ((20, 3, 10, 15, 25, 35, 50) if r is six[-1] else (20,))]
                elif not smoke or dataset in GREY:
                    six += [r.replace(**c[r.method]) for c in CONFOUNDS.values() for r in six[-2:] if r.method in c]
                untrained = RunConfig(method="untrained", seed=seed, epochs=0, **base)
                supervised = RunConfig(method="supervised", seed=seed, **base, **{  # the downstream recipe, with momentum
                    "batch": 256, "lr": 0.05, "weight_decay": 0.0, "schedule": "constant", "epochs": 10, **short})  # fmt: skip
                runs += [*six, untrained, supervised]
                evals += [EvalConfig(run=r, kind="report", **how) for r in (*six, untrained, supervised)]
                evals += [EvalConfig(run=untrained, kind="report", features=f, **how) for f in ("pixels", "pca")]
    return list(dict.fromkeys(runs)), evals


FIGURES: dict[str, Callable[..., Needs]] = {f.__name__: f for f in (
    sidae_step_by_step, accuracy_vs_epochs, w_sweep, datasets_table, fine_tuning, stl_transfer, tsne, pairwise_vs_triplet)}


def figure(name: str) -> Callable[..., Needs]:
    if name not in FIGURES:
        raise SidaeError(f"Unknown figure {name!r}; choose from {', '.join(FIGURES)}.")
    return FIGURES[name]


def evaluations(scale: str) -> list[EvalConfig]:
    """All evaluations of all figures at a scale, as far as their image sets are there or known."""
    found: dict[EvalConfig, None] = {}
    for build in FIGURES.values():
        with suppress(SidaeError), warnings.catch_warnings(action="ignore"):
            found |= dict.fromkeys(build(scale)[1])
    return list(found)
