"""How large an experiment is: the scales, each method's recipe, and a run and its evaluations at a scale."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import data, methods
from .config import EvalConfig, RunConfig, SidaeError, typed
from .methods import metric


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large an experiment is; a method leaves out the fields of `run` that it does not read."""

    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    labels: tuple[float, float]  # many, scarce: shares of the training labels
    epochs: dict[str, int]  # per data set
    points: int  # checkpoints that are evaluated, evenly spaced
    run: dict[str, Any]
    pool: dict[str, int] = field(default_factory=dict)  # pre-training images; all of a set that is not named
    neighbours: tuple[int, int] = (200, 20)  # kNN's k with many and with scarce labels
    supervised_epochs: int = 50
    pictured: int = 1000  # points on a map
    weights: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1)  # w of Figure 4
    transfer: tuple[str, ...] = ("photos", "digits", "photos")  # pre-training set, then the sets to classify
    repeats: int = 1  # classifier seeds of an SGD probe
    others: int = 5  # how many seeds the figures of other papers take, at most
    grey: int = 3  # channels of grey images; the papers' networks see three equal ones


_SMALL = {"backbone": "small_cnn", "dim": 64, "hidden": 64, "pred_hidden": 16, "decoder": 64, "splits": 2,
          "queue": 128, "prototypes": 64, "batch": 64}  # fmt: skip
_NARROW = {"width": 16, "dim": 256, "hidden": 256, "pred_hidden": 64, "decoder": 128, "splits": 4,
           "queue": 512, "prototypes": 512, "batch": 128}  # fmt: skip
_REAL = ("mnist", "fashion_mnist", "cifar10")
SCALES: dict[str, Scale] = {
    "smoke": Scale(  # tests and notebook validation: seconds
        datasets=("digits", "photos"), seeds=(0,), labels=(0.2, 0.1), points=2, run=_SMALL,
        epochs={"digits": 2, "photos": 2}, pool={"digits": 256, "photos": 256}, neighbours=(20, 5),
        supervised_epochs=2, pictured=150, weights=(0, 0.5, 1)),
    # What a visitor sees after ten minutes, no download: 744 steps. Seeds 0 to 2 are published, and 3 is the
    # visitor's own. The rate was chosen on validation images (`experiments.rates`).
    "quick": Scale(
        datasets=("mnist5k",), seeds=(3, 0, 1, 2), labels=(0.1, 0.01), points=4,
        run={**_NARROW, "decoder": 64, "batch": 64, "lr": 0.1, "queue": 256, "splits": 2}, grey=1, others=1,
        repeats=5,
        epochs={"mnist5k": 12, "digits": 33, "photos": 9}, neighbours=(20, 5), supervised_epochs=30,
        transfer=("mnist5k", "digits")),
    "laptop": Scale(  # trends on real images without a GPU: hours; 65 x 39 and 55 x 46 steps, at least 2,500
        datasets=_REAL, seeds=(0, 1, 2), labels=(0.1, 0.01), points=5, run={**_NARROW, "queue": 1024},
        epochs={"mnist": 55, "fashion_mnist": 55, "cifar10": 65, "tinyimagenet32": 65},
        pool={"mnist": 6000, "fashion_mnist": 6000, "cifar10": 5000, "tinyimagenet32": 5000},
        transfer=("tinyimagenet32", "cifar10")),
    "paper": Scale(  # the paper's protocol, all of it
        datasets=_REAL, seeds=(0, 1, 2, 3, 4), labels=(1.0, 0.01), points=8, run={"precision": "bf16"},
        epochs=dict.fromkeys((*_REAL, "stl10", "tinyimagenet32"), 200), repeats=5,
        weights=tuple(k / 10 for k in range(11)), transfer=("stl10", "stl10", "cifar10")),
}  # fmt: skip

# Adam as in AMDIM's and bolts' code, its rate whatever the batch; the warm-up there is 500 steps of 75,000
_ADAM = {"optimizer": "adam", "momentum": 0.8, "weight_decay": 1e-5}
_DIM = {**_ADAM, "lr": 2e-4, "schedule": "steps", "warmup": 0.05}
_YADIM = {**_DIM, "backbone": "resnet18", "stem": "cifar", "clip": 10.0}
# What sets a method apart from the defaults on CIFAR-10; lr is for batch 512. MoCo's values are the MoCo
# demo's, the other heads and rates (0.06 at batch 128) are lightly's CIFAR-10 benchmark's. Smaller scales cap
# the heads at their `hidden`. VICReg's rate is divided by the 25 of its loss: without LARS and warm-up
# D = 2048 diverges within ten steps even at 0.03.
RECIPES: dict[str, dict[str, Any]] = {
    "simclr": {"dim": 128, "hidden": 512, "tau": 0.5, "lr": 0.24},
    "moco_v2": {"dim": 128, "hidden": 512, "lr": 0.06},
    "nnclr": {"dim": 256, "pred_hidden": 4096, "tau": 0.2, "lr": 0.24},
    "fnc": {"dim": 128, "hidden": 512, "tau": 0.2, "lr": 0.24},
    "byol": {"dim": 256, "hidden": 1024, "pred_hidden": 1024, "lr": 0.24},
    "vicreg": {"lr": 0.01},
    "dino": {"dim": 256, "lr": 0.24},
    "barlow_twins": {"lr": 0.24},
    "amdim": {**_DIM, "backbone": "amdim"},
    "yadim": _YADIM,
    "composed": _YADIM,
    "cpc_v2": {**_ADAM, "lr": 1e-4, "schedule": "constant", "backbone": "patches18", "batch": 64, "dim": 64,
               "hidden": 256},
}  # fmt: skip
VARIED: dict[str, list[dict[str, Any]]] = {  # the other choices on the five axes, one changed at a time
    "yadim": [{"backbone": "resnet34"}, {"backbone": "amdim"}, {"extract": "00,11"}, {"extract": "01,02,11"},
              {"extract": "0r"}, {"augment": "amdim"}, {"augment": "simclr"}],
    "amdim": [{"backbone": "resnet18", "stem": "cifar"}, {"backbone": "resnet34", "stem": "cifar"},
              {"extract": "00"}, {"extract": "00,11"}, {"extract": "0r"}],
    "cpc_v2": [{"backbone": "patches34"}, {"norm": "layer"}, {"extract": "1,2,3,4,5,6"}, {"extract": "2"},
               {"extract": "2,3,3,4,4,4,5,5,5,5,6,6,6,6,6"}],
}  # fmt: skip
MADE = {  # method -> what else a composed one names, to be the same
    "simclr": {"extract": "vector", "compare": "cosine", "loss": "info_nce"},
    "amdim": {"extract": "01,02,11", "compare": "dot", "loss": "nce"},
    "yadim": {"extract": "00", "compare": "dot", "loss": "nce"},
}
# The supervised network is trained from scratch as the paper trains its classifiers.
DOWNSTREAM = {"lr": 0.05, "batch": 256, "weight_decay": 0.0, "schedule": "constant", "augment": "none"}
GREY = ("mnist", "fashion_mnist", "mnist5k", "digits")
PROBES = ("linear", "logistic", "knn")
SSL = ("sidae", "simsiam", "dae")
Needs = tuple[list[RunConfig], list[EvalConfig]]


def scale_of(name: str) -> Scale:
    if typed("scale", name, str) not in SCALES:
        raise SidaeError(f"Unknown scale {name!r}; choose from {', '.join(SCALES)}.")
    return SCALES[name]


def views(dataset: str) -> str:
    """SimSiam's augmentation for a set: grey images have no colour to change."""
    return "simsiam_grey" if dataset in GREY else "simsiam_cifar"


def run(method: str, dataset: str, scale: str, seed: int = 0, **changes) -> RunConfig:
    """One pre-training run of a method on a named set at a scale; `changes` are RunConfig fields."""
    s = scale_of(scale)
    if method not in methods.METHODS:
        raise SidaeError(f"Unknown method {method!r}; choose from {', '.join(methods.METHODS)}.")
    cls, recipe = methods.METHODS[method], RECIPES.get(method, {})
    fields = methods.read(method, s.run)
    known = data.identify(typed("dataset", dataset, str), download=bool(os.environ.get("SIDAE_DOWNLOAD")))
    fields |= {"method": method, "data": known, "seed": seed, "channels": s.grey if dataset in GREY else 3}
    if method == "untrained":
        fields |= {"epochs": 0, "augment": "none"}
        fields.pop("precision", None)
    elif method == "supervised":
        fields |= {"epochs": s.supervised_epochs, **DOWNSTREAM}
    elif dataset not in s.epochs and "epochs" not in changes:
        raise SidaeError(f"Scale {scale} has no length for {dataset!r}; its sets are {', '.join(s.epochs)}.")
    else:
        own = cls.axes.augment
        fields |= {"epochs": s.epochs.get(dataset), "pool": s.pool.get(dataset, 0),
                   "augment": views(dataset) if own == "simsiam_cifar" else own, **recipe}  # fmt: skip
        for head in {"dim", "hidden", "pred_hidden"} & recipe.keys():
            fields[head] = min(recipe[head], s.run.get("hidden", math.inf))
        if "lr" in recipe and "optimizer" not in recipe:  # SGD's rate is in proportion to the batch
            fields["lr"] = recipe["lr"] * s.run.get("batch", 512) / 512
        if "backbone" in recipe and s.run.get("backbone") == "small_cnn":  # which has no maps to compare
            fields["width"] = 4
    return RunConfig.create(**fields | changes)


def weighted(w: float, dataset: str, scale: str, seed: int = 0, **changes) -> RunConfig:
    """SidAE with the weight w; its ends are the records of the autoencoder and of SimSiam."""
    if w in (0, 1):
        return run("simsiam" if w else "dae", dataset, scale, seed, **changes)
    return run("sidae", dataset, scale, seed, w=w, **changes)


def checkpoints(run: RunConfig, points: int) -> list[int]:
    """Evenly spaced epochs, the last among them."""
    if not run.epochs:
        return [0]
    return sorted({max(1, round(run.epochs * (k + 1) / points)) for k in range(points)})


def evaluation(run: RunConfig, kind: str, scale: str, labels: float, **changes) -> EvalConfig:
    """An evaluation as a scale has it; labels: one of the scale's two shares."""
    s = scale_of(scale)
    k = s.neighbours[s.labels.index(labels)]
    own = {"knn": {"k": k}, "finetune": {"fit_epochs": s.supervised_epochs}, "linear": {"repeats": s.repeats}}
    return EvalConfig(run=run, kind=kind, labels=labels, **own.get(kind, {}) | changes)


def pretrained(dataset: str, scale: str, seed: int, *, on: Sequence[str] = ("",), points: int = 0,
               kinds: Sequence[str] = PROBES, methods: Sequence[str] = (*SSL, "untrained"), **changes
               ) -> Needs:  # fmt: skip
    """Runs of `methods` on a set, and their checkpoints evaluated with many and with scarce labels.

    on: the sets to classify, "" is the run's own.  points: how many checkpoints, 0 is the scale's own number.
    """
    s = scale_of(scale)
    bare = {k: v for k, v in changes.items() if k == "split"}  # a pool may have no other
    runs = [run(m, dataset, scale, seed, **(bare if m == "untrained" else changes)) for m in methods]
    evals = [evaluation(r, kind, scale, labels, epoch=epoch, data=known)
             for known in [target and data.identify(target) for target in on] for labels in s.labels
             for r in runs for epoch in checkpoints(r, points or s.points) for kind in kinds]  # fmt: skip
    return runs, evals


def supervised(dataset: str, scale: str, seed: int) -> Needs:
    """From scratch on the same labels, without augmentation and with the pre-training's."""
    runs = [run("supervised", dataset, scale, seed, labels=labels, augment=augment)
            for labels in scale_of(scale).labels for augment in ("none", views(dataset))]  # fmt: skip
    return runs, [EvalConfig(run=r, kind="classifier", labels=r.labels) for r in runs]


def scenarios(scale: str, dataset: str, seed: int, change: dict[str, Any]) -> list[RunConfig]:
    """The report's six runs on a set, then the untrained and the supervised network."""
    per_class, batch = {"smoke": (20, 64), "quick": (40, 128)}.get(scale, (5000, 1024))
    base = {"data": data.identify(dataset), "seed": seed, "backbone": "small_cnn", "stats": "half"}
    if dataset in GREY:
        base |= {"channels": 1, "size": 28}
    short = {"epochs": 2} if scale == "smoke" else {}
    sgd = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "per_class": per_class,
           "batch": batch}  # fmt: skip
    downstream = {**base, **DOWNSTREAM, "epochs": 10, **short}
    six = [RunConfig(method=m, augment=augment, **{**base, **sgd, **loss, **change, **short})
           for augment in ("none", "report_fer", "report_simclr")
           for m, loss in metric.LOSSES.items()]  # fmt: skip
    return [*six, RunConfig(method="untrained", epochs=0, augment="none", **base),
            RunConfig(method="supervised", **downstream)]  # fmt: skip


def changed(run: RunConfig, fields: Mapping[str, Any]) -> RunConfig:
    """The run with other values of those fields that its method reads."""
    return run.replace(**methods.read(run.method, fields))


def hypotheses(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()
               ) -> dict[str, list[EvalConfig]]:  # fmt: skip
    """What the paper leaves open, tried another way, one change at a time, the likeliest first: change ->
    evaluations with it, on the validation split, never on test.

    At scale laptop of three methods after the last epoch; the first changes, which were there before any result,
    have every seed, the others one. At scale paper of SidAE and SimSiam at the first checkpoint, of the last seed:
    published runs of the first seeds were made elsewhere, and evaluations of one run must be of one training. At
    smoke a few, at quick none. The weight w is `w_sweep`."""
    s, datasets, seeds = scale_of(scale), typed("datasets", datasets, list), typed("seeds", seeds, list)
    if scale == "quick":
        return {}
    paper, seeds = scale == "paper", seeds or s.seeds
    dataset = (datasets or s.datasets)[-1]
    base = run("sidae", dataset, scale)
    first: dict[str, dict[str, Any]] = {
        "none": {},
        "targets in [0, 1]": {"target": "unit"},
        "twice the rate": {"lr": 2 * base.lr},  # at batch 512 this is lr * batch / 256, as SimSiam's code has it
    }
    if not paper:
        first["twice the steps"] = {"epochs": 2 * base.epochs}
    if base.backbone.startswith("resnet"):  # SimSiam's code starts so, and SidAE's encoder is SimSiam's
        first["residual blocks start at 0"] = {"zero_init": True}
    # recon "sum" is not among them: at this rate its loss is not finite after a few steps (tests/test_experiments.py)
    others: dict[str, dict[str, Any]] = {} if scale == "smoke" else {
        "each view restored": {"recon_target": "view"},
        "no decay of biases": {"decay_bias": False},
        "narrow projector": {"hidden": 8 * base.width},  # as wide as the encoder's output, as in SimSiam's code
        "affine projector": {"proj_affine": True},
        "decoder half as wide": {"decoder": base.decoder // 2},
        **({"no blur": {"augment": "simsiam_grey_without_blur"}} if dataset in GREY else
           {"blur, as on MNIST": {"augment": "simsiam_cifar_with_blur"}}),
        "raw pixels, targets too": {"stats": "none"},
        "predictor's rate constant": {"predictor_lr": "constant"},
        "CIFAR stem": {"stem": "cifar"},
    }  # fmt: skip
    out = {}
    for change, fields in (first | others).items():
        few = seeds[-1:] if paper else seeds[:1] if change in others else seeds
        each = [changed(run(m, dataset, scale, seed), fields) for seed in few for m in SSL[:2 if paper else 3]]
        out[change] = [evaluation(r, "linear", scale, labels, score_on="val",
                                  epoch=checkpoints(r, s.points)[0] if paper else -1)
                       for labels in s.labels for r in each]  # fmt: skip
    return out


def rates(scale: str) -> dict[float, list[EvalConfig]]:
    """How scale quick's learning rate was chosen: rate -> evaluations of three methods with it, a fifth of the
    training images held out, by the paper's probe and never on test. At other scales nothing."""
    if scale != "quick":
        return {}
    dataset = scale_of(scale).datasets[0]
    return {lr: [EvalConfig(run=run(m, dataset, scale, lr=lr), score_on="val", repeats=5) for m in SSL]
            for lr in (0.03, 0.1, 0.2, 0.4)}  # fmt: skip
