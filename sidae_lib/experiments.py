"""What each figure needs: scale in, configs out. A figure's function here has the name of its notebook and its files."""

import inspect
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from statistics import mean
from typing import Any, TypeVar

from . import data, methods, own, pairs, runs
from .config import LISTS, EvalConfig, RunConfig, SidaeError, typed
from .methods import metric


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
    repeats: int = 1  # classifier seeds of an SGD probe


_SMALL = {"backbone": "small_cnn", "dim": 64, "hidden": 64, "pred_hidden": 16, "decoder": 64, "splits": 2,
          "queue": 128, "prototypes": 64}
_NARROW = {"width": 16, "dim": 256, "hidden": 256, "pred_hidden": 64, "decoder": 128, "splits": 4, "queue": 512,
           "prototypes": 512}
SCALES: dict[str, Scale] = {
    # tests and notebook validation: seconds
    "smoke": Scale(("digits", "photos"), (0,), (0.2, 0.1), {"digits": 2, "photos": 2}, 2, {**_SMALL, "batch": 64},
                   {"digits": 256, "photos": 256}, (20, 5), 2, 150, (0, 0.5, 1)),
    # everything works, no download: minutes
    "quick": Scale(("digits", "photos"), (0,), (0.5, 0.1), {"digits": 20, "photos": 8}, 4, {**_NARROW, "batch": 128},
                   {}, (20, 5), 20),
    # trends on real images without a GPU: hours. 65 x 39 and 55 x 46 steps, at least 2,500
    "laptop": Scale(("mnist", "fashion_mnist", "cifar10"), (0, 1, 2), (0.1, 0.01),
                    {"mnist": 55, "fashion_mnist": 55, "cifar10": 65, "tinyimagenet32": 65}, 5,
                    {**_NARROW, "batch": 128, "queue": 1024},
                    {"mnist": 6000, "fashion_mnist": 6000, "cifar10": 5000, "tinyimagenet32": 5000},
                    transfer=("tinyimagenet32", "cifar10")),
    # the paper's protocol, all of it
    "paper": Scale(("mnist", "fashion_mnist", "cifar10"), (0, 1, 2, 3, 4), (1.0, 0.01),
                   dict.fromkeys(("mnist", "fashion_mnist", "cifar10", "stl10", "tinyimagenet32"), 200), 8,
                   {"precision": "bf16"}, weights=tuple(k / 10 for k in range(11)), transfer=("stl10", "stl10", "cifar10"),
                   repeats=5),
}  # fmt: skip
# What sets a method apart from the defaults on CIFAR-10, lr at batch 512: the MoCo demo's for MoCo, else the heads and the
# rate (0.06 at batch 128) of lightly's CIFAR-10 benchmark; smaller scales cap the heads at their `hidden`. VICReg's rate is
# over its loss's 25: without LARS and warm-up D = 2048 diverges within ten steps even at 0.03.
RECIPES: dict[str, dict[str, Any]] = {
    "simclr": {"dim": 128, "hidden": 512, "tau": 0.5, "lr": 0.24},
    "moco_v2": {"dim": 128, "hidden": 512, "lr": 0.06},
    "nnclr": {"dim": 256, "pred_hidden": 4096, "tau": 0.2, "lr": 0.24},
    "fnc": {"dim": 128, "hidden": 512, "tau": 0.2, "lr": 0.24},
    "byol": {"dim": 256, "hidden": 1024, "pred_hidden": 1024, "lr": 0.24},
    "vicreg": {"lr": 0.01},
    "dino": {"dim": 256, "lr": 0.24},
    "barlow_twins": {"lr": 0.24},
}
# Adam as in AMDIM's and bolts' code, its rate whatever the batch; the warm-up there is 500 steps of 75,000
_ADAM = {"optimizer": "adam", "momentum": 0.8, "weight_decay": 1e-5}
_DIM = _ADAM | {"lr": 2e-4, "schedule": "steps", "warmup": 0.05}
RECIPES |= {
    "amdim": _DIM | {"backbone": "amdim"},
    "yadim": (_yadim := _DIM | {"backbone": "resnet18", "stem": "cifar", "clip": 10.0}),
    "composed": _yadim,
    "cpc_v2": _ADAM | {"lr": 1e-4, "schedule": "constant", "backbone": "patches18", "batch": 64, "dim": 64,
                     "hidden": 256},
}
GREY = ("mnist", "fashion_mnist", "digits")
PROBES = ("linear", "logistic", "knn")


def scale_of(name: str) -> Scale:
    if typed("scale", name, str) not in SCALES:
        raise SidaeError(f"Unknown scale {name!r}; choose from {', '.join(SCALES)}.")
    return SCALES[name]


def run(method: str, dataset: str, scale: str, seed: int = 0, **changes) -> RunConfig:
    """One pre-training run of a method on a named set at a scale; `changes` are RunConfig fields."""
    s = scale_of(scale)
    if method not in methods.METHODS:
        raise SidaeError(f"Unknown method {method!r}; choose from {', '.join(methods.METHODS)}.")
    fields = {k: v for k, v in s.run.items() if k not in methods.SHARED or k in methods.METHODS[method].reads}
    known = data.identify(typed("dataset", dataset, str), download=bool(os.environ.get("SIDAE_DOWNLOAD")))
    fields |= {"method": method, "data": known, "seed": seed}
    if method == "untrained":
        fields |= {"epochs": 0, "augment": "none"}
        fields.pop("precision", None)
    elif method == "supervised":  # the downstream recipe, from scratch
        fields |= {"epochs": s.supervised_epochs, "lr": 0.05, "batch": 256, "weight_decay": 0.0, "schedule": "constant",
                   "augment": "none"}  # fmt: skip
    else:
        if dataset not in s.epochs and "epochs" not in changes:
            raise SidaeError(f"Scale {scale} has no length for {dataset!r}; its sets are {', '.join(s.epochs)}.")
        pipeline, recipe = methods.METHODS[method].axes.augment, RECIPES.get(method, {})
        fields |= {"epochs": s.epochs.get(dataset), "pool": s.pool.get(dataset, 0),
                   "augment": "simsiam_grey" if pipeline == "simsiam_cifar" and dataset in GREY else pipeline}  # fmt: skip
        for k, v in recipe.items():
            cap = s.run.get("hidden", v) if k in ("dim", "hidden", "pred_hidden") else v
            fields[k] = v * s.run.get("batch", 512) / 512 if k == "lr" and "optimizer" not in recipe else min(v, cap)
        if "backbone" in recipe and s.run.get("backbone") == "small_cnn":  # which has no maps to compare
            fields["width"] = 4
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
    bare = {k: v for k, v in changes.items() if k == "split"}  # a pool may have no other
    runs = [run(m, dataset, scale, seed, **(changes if m != "untrained" else bare)) for m in methods]
    for target in on:
        known = target and data.identify(target)
        for labels, k in zip(s.labels, s.neighbours):
            own = {"knn": {"k": k}, "finetune": {"fit_epochs": s.supervised_epochs}, "linear": {"repeats": s.repeats}}
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


F = TypeVar("F", bound=Callable)


def _door(build: F) -> F:
    """A function that notebooks and the command line call with what people gave: its lists are read in one way."""
    signature = inspect.signature(build)

    @wraps(build)
    def opened(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.arguments |= {k: typed(k, v, list) for k, v in given.arguments.items() if k in LISTS}
        return build(*given.args, **given.kwargs)

    return opened


@_door
def sidae_step_by_step(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Figures 1 and 2 and the walk through the loss: one short run."""
    return [run("sidae", (datasets or scale_of(scale).datasets)[0], scale, (seeds or (0,))[0])], []


@_door
def accuracy_vs_epochs(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Figures 3 and 5: accuracy after more and more pre-training, many and scarce labels, three methods, and the
    supervised and the untrained network as lines."""
    s = scale_of(scale)
    return _joined(*(part(d, scale, seed) for d in datasets or s.datasets for seed in seeds or s.seeds
                     for part in (pretrained, supervised)))


@_door
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
        parts.append((runs + scaled, [EvalConfig(run=r, labels=labels, score_on=on, repeats=s.repeats)
                                      for r in runs + scaled for labels in s.labels for on in ("test", "val")]))
    return _joined(*parts)


@_door
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


@_door
def hypotheses(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> dict[str, list[EvalConfig]]:
    """Why the order of methods may differ from the paper's: change -> the three methods with this one change, scored on the
    validation split by many and by scarce labels. At scales smoke and laptop, the last where the backbone is a ResNet; w
    is `w_sweep`."""
    s = scale_of(scale)
    if scale not in ("smoke", "laptop"):
        return {}
    own = [run(m, (datasets or s.datasets)[-1], scale, n) for n in seeds or s.seeds for m in ("sidae", "simsiam", "dae")]
    changes: dict[str, Callable[[RunConfig], dict[str, Any]]] = {
        "none": lambda r: {}, "targets in [0, 1]": lambda r: {} if r.method == "simsiam" else {"target": "unit"},
        "twice the rate": lambda r: {"lr": 2 * r.lr}, "twice the steps": lambda r: {"epochs": 2 * r.epochs}}
    if own[0].backbone.startswith("resnet"):  # SimSiam's code starts so, and SidAE's encoder is SimSiam's
        changes["residual blocks start at 0"] = lambda r: {"zero_init": True}
    return {name: [EvalConfig(run=r.replace(**change(r)), labels=n, score_on="val") for n in s.labels for r in own]
            for name, change in changes.items()}


@_door
def datasets_table(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Table 1: the last checkpoint by the paper's probe, on every set, and after transfer where the pool is there; and
    what `hypotheses` asks for."""
    parts = [accuracy_vs_epochs(scale, datasets, seeds)]
    try:
        parts += [] if datasets else [stl_transfer(scale, (), seeds)]
    except SidaeError as e:
        warnings.warn(f"The table has no transfer rows. {e}", stacklevel=3)
    evals = [e for _, part in parts for e in part if e.epoch == e.run.epochs and e.kind in ("linear", "classifier")]
    evals += sum(hypotheses(scale, datasets, seeds).values(), [])
    return _joined(([e.run for e in evals], evals))


@_door
def fine_tuning(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Figure 6: the backbone moves too, for every length of pre-training (first and last below paper scale), SidAE at
    w = 0.5 and, once the sweep that chooses it is recorded, at the chosen w; and that sweep."""
    s = scale_of(scale)
    dataset = (datasets or s.datasets)[-1]
    chosen = best_w(scale, (dataset,), seeds)
    parts = [w_sweep(scale, (dataset,), seeds)]  # recorded or not: what a figure needs does not depend on the store
    for seed in seeds or s.seeds:
        found = [pretrained(dataset, scale, seed, kinds=("finetune",)), supervised(dataset, scale, seed)]
        if chosen not in (None, 0.5):
            found.append(pretrained(dataset, scale, seed, kinds=("finetune",), methods=("sidae",), w=chosen))
        parts += [(r, [e for e in evals if scale == "paper" or e.epoch in (checkpoints(e.run, s.points)[0], e.run.epochs)])
                  for r, evals in found]
    return _joined(*parts)


@_door
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


@_door
def tsne(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Pictures of five backbones' features, the same test points for all: t-SNE, PCA and nearest neighbours."""
    s = scale_of(scale)
    dataset, seed = (datasets or s.datasets)[-1], (seeds or s.seeds)[0]
    runs = pretrained(dataset, scale, seed, methods=("untrained", "dae", "simsiam", "sidae"))[0]
    runs.append(run("supervised", dataset, scale, seed, labels=s.labels[0]))
    return runs, [EvalConfig(run=r, kind="tsne", labels=s.labels[0], k=s.neighbours[0], points=s.pictured) for r in runs]


# of semantic_pairs: images compared, what share of the pool they are (CIFAR-10: a tenth of all, as in the paper), methods
# that meet mined pairs alone, other shares of the pool to train with and of all images to count pairs among
_PAIRED = ("simclr", "simsiam", "vicreg", "dino")
_PAIRS = {"smoke": (256, 1.0, (), (0.5,), (0.5,)), "quick": (1437, 1.0, _PAIRED, (0.5,), (0.1, 0.25, 0.5)),
          "laptop": (5000, 1.0, _PAIRED, (0.25, 0.5), (0.05, 0.25, 0.5, 1.0)),
          "paper": (5000, 0.1, _PAIRED, (0.05, 0.25, 0.5, 1.0), (0.05, 0.25, 0.5, 1.0))}  # fmt: skip


def _paired(scale: str, dataset: str, method: str, seed: int, kind: str = "none", share: float = 0.0) -> RunConfig:
    """A run of semantic_pairs. Pairs are mined by MoCo v2 of the same seed, the nearest ones whatever their cosine."""
    (k, own, *_), changes = _PAIRS[scale], {}
    if kind != "none":
        changes = {"pairs": kind, "pair_share": share or own, "pair_count": round(pairs.RATIO * k * (share or own) / own)}
    if kind == "mined":
        changes |= {"encoder": _paired(scale, dataset, "moco_v2", seed), "pair_low": -1.0, "pair_high": 1.0}
    return run(method, dataset, scale, seed, **changes)


@_door
def semantic_pairs(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """SePP-ID's tables at this scale: training with none, with oracle pairs, with mined ones and with two more controls;
    fine-tuning and transfer; how many pairs are right, by encoder, epoch, share of the images, with augmentation and
    without training; NNCLR and FNC, which look for theirs while they train."""
    s, (k, _, paired, shares, among) = scale_of(scale), _PAIRS[scale]
    several = tuple(seeds) or (tuple(range(5)) if scale == "laptop" else s.seeds)
    fewer = 3 if scale == "laptop" else None  # five seeds of oracle pairs, the most that pairs can give, show no gain there
    runs, evals = [], []
    for dataset in datasets or ("digits" if "digits" in s.datasets else "cifar10",):
        one, seed, main = partial(_paired, scale, dataset), several[0], ("moco_v2", "sidae")
        other = data.identify({"digits": "photos"}.get(dataset, "fashion_mnist"))
        mine = [one(m, n, kind) for kind in ("none", "oracle") for n in several for m in main]
        mine += [one(m, n, kind) for kind in ("mined", "random", "wrong") for n in several[:fewer] for m in main]
        mine += [one(m, seed, kind) for m in paired for kind in ("none", "mined")]
        mine += [one("moco_v2", seed, "mined", share) for share in shares]
        for r in mine:
            points = checkpoints(r, s.points if r.method in main else 1)
            evals += [EvalConfig(run=r, kind="logistic", labels=s.labels[0], epoch=e) for e in points]
            evals += [EvalConfig(run=r, kind="linear", labels=s.labels[0], repeats=s.repeats),
                      EvalConfig(run=r, kind="knn", labels=s.labels[0], k=s.neighbours[0])]  # fmt: skip
            compared = r.method in main and r.pairs in ("none", "mined") and r.seed in several[:fewer]
            if compared and r not in mine[-len(shares) :]:  # Tables 4 and 5: fine-tuning; transfer, C by validation
                evals += [EvalConfig(run=r, kind="finetune", labels=n, fit_epochs=2 if scale == "smoke" else e)
                          for n, e in ((0.1, 30), (0.01, 60))]  # fmt: skip
                evals += [EvalConfig(run=r, kind="logistic", data=other, labels=0.1, C=c, score_on=on)
                          for c in (0.01, 0.1) for on in ("val", "test")]  # fmt: skip
        runs += [*mine, *(one(m, seed) for m in ("simsiam", "simclr", "nnclr", "fnc"))]
        moco, own = one("moco_v2", seed), round(k / (1437 if dataset == "digits" else 50_000), 4)
        asked = [(one(m, seed), {}) for m in ("sidae", "simsiam", "simclr")]  # Table 1; then Figure 2, epochs, K, Tiny ImageNet
        asked += [(one("moco_v2", n), {"epoch": e, "augment": a, "pair_recipe": 1 + ((n, e, a) == (2, 0, moco.augment))})
                  for n in several for e in (0, -1) for a in ("none", moco.augment)]  # fmt: skip
        asked += [(moco, {"epoch": e}) for e in checkpoints(moco, s.points)] + [(moco, {"labels": n}) for n in among]
        asked += [(moco, {"data": data.identify("tinyimagenet32"), "labels": 0.1})] if dataset == "cifar10" else []
        evals += [EvalConfig(run=r, kind="pairs", **{"labels": own} | more) for r, more in asked]
    return list(dict.fromkeys(runs)), list(dict.fromkeys(evals))


VARIED: dict[str, list[dict[str, Any]]] = {  # the other choices on the five axes, one changed at a time
    "yadim": [{"backbone": "resnet34"}, {"backbone": "amdim"}, {"extract": "00,11"}, {"extract": "01,02,11"},
              {"extract": "0r"}, {"augment": "amdim"}, {"augment": "simclr"}],
    "amdim": [{"backbone": "resnet18", "stem": "cifar"}, {"backbone": "resnet34", "stem": "cifar"}, {"extract": "00"},
              {"extract": "00,11"}, {"extract": "0r"}],
    "cpc_v2": [{"backbone": "patches34"}, {"norm": "layer"}, {"extract": "1,2,3,4,5,6"}, {"extract": "2"},
               {"extract": "2,3,3,4,4,4,5,5,5,5,6,6,6,6,6"}],
}  # fmt: skip
MADE = {  # method -> what else a composed one names, to be the same
    "simclr": {"extract": "vector", "compare": "cosine", "loss": "info_nce"},
    "amdim": {"extract": "01,02,11", "compare": "dot", "loss": "nce"},
    "yadim": {"extract": "00", "compare": "dot", "loss": "nce"},
}


@_door
def five_axes(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> Needs:
    """Every method on one set at equal images seen; AMDIM, CPC and YADIM with one choice changed at a time (at laptop scale
    encoder and extraction alone); SimCLR, AMDIM and YADIM once more, made of five choices. Two seeds below paper scale."""
    s, found = scale_of(scale), []
    dataset = (datasets or [d for d in ("cifar10", *s.datasets) if d in s.datasets])[0]
    length = {"paper": {}, "smoke": {"epochs": 1, "pool": 128}, "quick": {"epochs": 1}}.get(scale, {"epochs": 4})
    for seed in seeds or (s.seeds if scale == "paper" else s.seeds[:2]):
        own: dict[str, RunConfig] = {}
        for m in (m for m in methods.METHODS if m != "composed"):
            more = {} if m == "untrained" else dict(length)
            if m == "supervised":
                more["labels"] = s.labels[0]
            if "per_class" in methods.METHODS[m].reads:  # sets of ten classes; a pairwise image is seen in two pairs
                seen = length.get("pool") or s.pool.get(dataset) or data.TRAINING.get(dataset, 1437)
                more["per_class"] = seen // {"pairwise": 20, "triplet": 10}[m]
            if scale == "smoke" and "queue" in methods.METHODS[m].reads:
                more["queue"] = 64  # at most half of the pool
            own[m] = run(m, dataset, scale, seed, **more)
        made = {m: own[m].replace(method="composed", **five) for m, five in MADE.items()}
        found += own.values()
        for m, changes in VARIED.items():
            found.append(own["untrained"].replace(**{k: getattr(own[m], k) for k in ("backbone", "stem", "width")}))
            found += [own[m].replace(**c) for c in changes[:: 3 if scale == "smoke" else 1]
                      if scale != "laptop" or "augment" not in c]  # fmt: skip
        if scale != "laptop":
            found += [*made.values(), made["yadim"].replace(compare="cosine"), made["yadim"].replace(loss="info_nce")]
    return found, [EvalConfig(run=r, kind=kind, labels=s.labels[0], **({"k": s.neighbours[0]} if kind == "knn" else {}))
                   for r in found for kind in ("logistic", "knn")[: 1 if methods.varied(r) else 2]]


@_door
def your_own_images(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = (), plan: own.Plan | None = None
                    ) -> Needs:  # fmt: skip
    """Notebook 10: three methods, the untrained network and, for each number of labels, a supervised one of as many
    steps. A seed draws the labels too, so that intervals over seeds hold for the choice of the labels."""
    name, seeds = (datasets or scale_of(scale).datasets)[0], seeds or (0, 1, 2)
    images = data.load(name)
    plan = plan or own.plan(images, run("sidae", name, scale, epochs=1, pool=0), own.STEPS[scale], seeds=seeds)
    every, runs, evals = len(images.split("train").images), [], []
    for seed in seeds:
        for method in ("sidae", "simsiam", "dae", "untrained"):
            r = run(method, name, scale, seed, **({} if method == "untrained" else plan.fields))
            runs.append(r)
            evals += [EvalConfig(run=r, kind="logistic", C=0.1, label_count=count % every, label_seed=seed)
                      for count in plan.counts]
        for count in plan.counts:
            chosen = {"label_count": count % every, "label_seed": seed}
            epochs = max(1, round(plan.steps / math.ceil(count / 256)))
            r = run("supervised", name, scale, seed, epochs=min(epochs, 200), **chosen)
            runs.append(r)
            evals.append(EvalConfig(run=r, kind="classifier", **chosen))
    return runs, evals


PROTOCOLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of training, of evaluation
    "faithful": ({"redraw": False}, {"bn": "train", "score_on": "part"}), **dict.fromkeys(("fixed", "confounds"), (
        {"batch_norm": "joint"}, {}))}  # fmt: skip


@_door
def pairwise_vs_triplet(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = (), protocols: Sequence[str] = ()
                        ) -> Needs:  # fmt: skip
    """The student report's twelve scenarios and four controls: as its code ran them (one seed, with t-SNE maps), and by a
    fixed protocol with every seed; and, by that protocol, its confounds undone one at a time."""
    s, smoke, real = scale_of(scale), scale == "smoke", scale in ("laptop", "paper")
    sgd = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "per_class": 5000 if real else 20 if smoke else 200,
           "batch": 1024 if real else 64 if smoke else 128}  # fmt: skip
    runs, evals, short = [], [], {"epochs": 2} if smoke else {}
    if unknown := set(protocols) - {*PROTOCOLS}:
        raise SidaeError(f"Unknown protocol {min(unknown)!r}; choose from {', '.join(PROTOCOLS)}.")
    for protocol in protocols or PROTOCOLS:
        change, how = PROTOCOLS[protocol]
        how = how | ({"labels": 0.1} if smoke else {})
        for dataset in datasets or (("mnist", "cifar10") if real else s.datasets):
            size = {"channels": 1, "size": 28} if dataset in GREY else {}
            base = {"data": data.identify(dataset), "backbone": "small_cnn", "stats": "half", "augment": "none", **size}
            for seed in (seeds or s.seeds)[: 1 if protocol == "faithful" else None]:
                six = [RunConfig(method=m, seed=seed, **{**base, **sgd, **own, **change, **short, "augment": augment})
                       for augment in ("none", "report_fer", "report_simclr") for m, own in metric.LOSSES.items()]
                if protocol == "faithful":  # maps, of the last by other perplexities too
                    evals += [EvalConfig(run=r, kind="tsne", perplexity=p, bn="train", labels=0.1, points=1000 if real else 60)
                              for r in six for p in ((20, 3, 10, 15, 25, 35, 50) if r is six[-1] else (20,))]
                untrained = RunConfig(method="untrained", seed=seed, epochs=0, **base)
                supervised = RunConfig(method="supervised", seed=seed, **base, **{  # the downstream recipe, with momentum
                    "batch": 256, "lr": 0.05, "weight_decay": 0.0, "schedule": "constant", "epochs": 10, **short})  # fmt: skip
                controls = [untrained, supervised]
                if protocol == "confounds":
                    both, controls = six[-2:] if not smoke or dataset in GREY else [], []
                    six = [r.replace(**c[r.method]) for c in metric.CONFOUNDS.values() for r in both if r.method in c]
                runs += [*six, *controls]
                evals += [EvalConfig(run=r, kind="report", **how) for r in (*six, *controls)]
                plain = ("pixels", "pca") if controls and seed == (seeds or s.seeds)[0] else ()  # which no seed changes
                evals += [EvalConfig(run=untrained, kind="report", features=f, **how) for f in plain]
    return list(dict.fromkeys(runs)), evals


FIGURES: dict[str, Callable[..., Needs]] = {f.__name__: f for f in (
    sidae_step_by_step, accuracy_vs_epochs, w_sweep, datasets_table, fine_tuning, stl_transfer, tsne, pairwise_vs_triplet,
    semantic_pairs, five_axes, your_own_images)}


def figure(name: str) -> Callable[..., Needs]:
    if name not in FIGURES:
        raise SidaeError(f"Unknown figure {name!r}; choose from {', '.join(FIGURES)}.")
    return FIGURES[name]


def needs(scale: str, names: Iterable[str] = FIGURES) -> dict[str, Needs]:
    """Figure -> what it needs at a scale, of those whose image sets are there or known."""
    out = {}
    for name in names:
        with suppress(SidaeError), warnings.catch_warnings(action="ignore"):
            out[name] = FIGURES[name](scale)
    return out


def evaluations(scale: str) -> dict[str, list[EvalConfig]]:
    """Figure -> its evaluations at a scale, of those whose image sets are there or known."""
    papers = [name for name in FIGURES if name != "your_own_images"]  # whose labels are no shares of a paper's set
    return {name: evals for name, (_, evals) in needs(scale, papers).items()}
