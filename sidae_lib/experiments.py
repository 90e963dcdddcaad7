"""What each figure needs: scale in, configs out. A figure's function has the name of its notebook."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial, wraps
from itertools import product
from statistics import mean
from typing import Any

from . import data, methods, own, pairs, scales, store
from .config import EvalConfig, RunConfig, SidaeError, typed
from .methods import metric
from .scales import (  # noqa: F401
    MADE,
    PROBES,
    SCALES,
    SSL,
    VARIED,
    Needs,
    checkpoints,
    evaluation,
    hypotheses,
    rates,
    run,
    scale_of,
    weighted,
)  # fmt: skip

Asked = Iterator[RunConfig | EvalConfig]
FIGURES: dict[str, Callable[..., Needs]] = {}  # with a notebook, in the order of the notebooks
PARTS: dict[str, Callable[..., Needs]] = {}  # asked for apart: sections of the notebook of datasets_table


def _figure(build: Callable[..., Asked], into: dict[str, Callable[..., Needs]] = FIGURES) -> Callable[..., Needs]:
    """A figure as people ask for it: one set is a list of one. Returns runs and evaluations, each once; of a run
    that is evaluated before its end, the evaluations alone."""

    @wraps(build)
    def needs(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = (), *more, **named) -> Needs:
        lists = typed("datasets", datasets, list), typed("seeds", seeds, list)
        asked = list(dict.fromkeys(build(scale, *lists, *more, **named)))
        ends = [c for c in asked if isinstance(c, RunConfig) or c.epoch == c.run.epochs]
        runs = dict.fromkeys(map(store.run_of, ends))
        return list(runs), [c for c in asked if isinstance(c, EvalConfig)]

    into[build.__name__] = needs
    return needs


@_figure
def sidae_step_by_step(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """Figures 1 and 2 and the walk through the loss: one short run."""
    yield run("sidae", (datasets or scale_of(scale).datasets)[0], scale, (seeds or (0,))[0])


@_figure
def accuracy_vs_epochs(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """Figures 3 and 5: accuracy after more and more pre-training, many and scarce labels, three methods; the
    supervised and the untrained network as lines."""
    s = scale_of(scale)
    for dataset, seed in product(datasets or s.datasets, seeds or s.seeds):
        yield from scales.pretrained(dataset, scale, seed)[1]
        yield from scales.supervised(dataset, scale, seed)[1]


@_figure
def w_sweep(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """Figure 4: accuracy against w, on test and on the validation split that w is chosen by; with one seed
    (all at paper scale) also for targets in [0, 1], a scale of the reconstruction error that the paper leaves
    open."""
    s, paper = scale_of(scale), scale == "paper"
    dataset = (datasets or s.datasets)[-1]
    known = s.seeds[1:] if scale == "quick" else s.seeds  # the published ones: the visitor's minutes are few
    for n, seed in enumerate(seeds or known):
        runs = [weighted(w, dataset, scale, seed) for w in s.weights]
        if paper or n == 0:
            others = [w for w in s.weights if w < 1 and (w > 0 or paper) and scale != "quick"]
            runs += [weighted(w, dataset, scale, seed, target="unit") for w in others]
        for r, labels, split in product(runs, s.labels, ("test", "val")):
            yield evaluation(r, "linear", scale, labels, score_on=split)


def best_w(scale: str, datasets: Sequence[str] = (), seeds: Sequence[int] = ()) -> float | None:
    """The w inside (0, 1) with the best mean accuracy on the validation split of the scarce labels, never on
    test; None while a record of the sweep is missing."""
    found: dict[float, list[float]] = {}
    for e in w_sweep(scale, datasets, seeds)[1]:
        plain = (e.run.method, e.run.target, e.run.recon) == ("sidae", "standardised", "mean")
        if plain and e.score_on == "val" and e.labels == scale_of(scale).labels[1]:
            if (record := store.find(e)) is None:
                return None
            found.setdefault(e.run.w, []).append(record["accuracy"])
    return max(found, key=lambda w: mean(found[w]))


@_figure
def datasets_table(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """Table 1: the last checkpoint by the paper's probe, on every set, and after transfer where the pool is
    there."""
    evals = accuracy_vs_epochs(scale, datasets, seeds)[1]
    try:
        evals += [] if datasets else stl_transfer(scale, (), seeds)[1]
    except SidaeError as e:
        warnings.warn(f"The table has no transfer rows. {e}", stacklevel=3)
    yield from (e for e in evals if e.epoch == e.run.epochs and e.kind in ("linear", "classifier"))


@partial(_figure, into=PARTS)
def open_choices(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """Notebook 03's section on what the paper leaves open: what `hypotheses` asks for."""
    for each in hypotheses(scale, datasets, seeds).values():
        yield from each


@partial(_figure, into=PARTS)
def jpeg_again(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """Notebook 03's section on the JPEG copy: the supervised network on CIFAR-10, and on the same images saved as
    JPEG once more (`benchmarks/jpeg.py`). At scales laptop and paper."""
    s, named = scale_of(scale), datasets or ("cifar10", "cifar10_jpeg75", "cifar10_jpeg25")
    for dataset, seed in product(named if scale in ("laptop", "paper") else (), seeds or s.seeds):
        yield from scales.supervised(dataset, scale, seed)[1]


@_figure
def fine_tuning(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """Figure 6: the backbone moves too, for every length of pre-training (first and last below paper scale),
    SidAE at w = 0.5 and, once the sweep that chooses it is recorded, at the chosen w; and that sweep."""
    s = scale_of(scale)
    dataset = (datasets or s.datasets)[-1]
    yield from w_sweep(scale, [dataset], seeds)[1]  # recorded or not: a figure's needs do not depend on it
    chosen = None if scale == "quick" else best_w(scale, [dataset], seeds)  # no time for a second w
    for seed in seeds or s.seeds:
        tune = partial(scales.pretrained, dataset, scale, seed, kinds=("finetune",))
        tuned = tune()[1] + scales.supervised(dataset, scale, seed)[1]
        if chosen not in (None, 0.5):
            tuned += tune(methods=("sidae",), w=chosen)[1]
        for e in tuned:
            if scale == "paper" or e.epoch in (checkpoints(e.run, s.points)[0], e.run.epochs):
                yield e


@_figure
def stl_transfer(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """Figure 7: pre-train on one set (STL-10's unlabeled images, `tinyimagenet32`), classify others; beside
    it the networks that were trained on those, supervised and pre-trained."""
    s = scale_of(scale)
    source, *targets = datasets or s.transfer
    split = "unlabeled" if source in ("stl10", "tinyimagenet32") else "train"
    for seed in seeds or s.seeds:
        views = {"split": split, "augment": scales.views(source)}
        for asked in scales.pretrained(source, scale, seed, on=targets, **views):
            yield from asked
        for target in targets:
            yield from scales.supervised(target, scale, seed)[1]
            if target in s.datasets and target != source:
                itself = {"points": 1, "kinds": ("linear",), "methods": ("sidae",)}
                yield from scales.pretrained(target, scale, seed, **itself)[1]


@_figure
def tsne(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """Pictures of five backbones' features at the same test points: t-SNE, PCA and nearest neighbours."""
    s = scale_of(scale)
    usual = [5] if scale == "laptop" else s.seeds  # whose neighbours are of six classes: seed 0's are six airplanes
    at = (datasets or s.datasets)[-1], scale, (seeds or usual)[0]
    runs = [run(m, *at) for m in ("untrained", "dae", "simsiam", "sidae")]
    for r in [*runs, run("supervised", *at, labels=s.labels[0])]:
        yield EvalConfig(run=r, kind="tsne", labels=s.labels[0], k=s.neighbours[0], points=s.pictured)


PROTOCOLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of training, of evaluation
    "faithful": ({"redraw": False}, {"bn": "train", "score_on": "part"}),
    "fixed": ({"batch_norm": "joint"}, {}),
}


@_figure
def pairwise_vs_triplet(scale: str, datasets: list[str], seeds: list[int], protocols: Sequence[str] = ()
                        ) -> Asked:  # fmt: skip
    """The student report's twelve scenarios, four controls: as its code ran them (one seed, with maps), and
    by a fixed protocol with every seed."""
    protocols = typed("protocols", protocols, list) or list(PROTOCOLS)
    if unknown := {*protocols} - {*PROTOCOLS}:
        raise SidaeError(f"Unknown protocol {min(unknown)!r}; choose from {', '.join(PROTOCOLS)}.")
    for protocol, dataset, n, seed in _reported(scale, datasets, seeds, protocols):
        if n > 0 and protocol == "faithful":
            continue
        change, how = PROTOCOLS[protocol]
        how = how | _few(scale)
        *six, untrained, _ = runs = scales.scenarios(scale, dataset, seed, change)
        if protocol == "faithful":
            others = (3, 50) if scale == "quick" else (3, 10, 15, 25, 35, 50)
            maps = [(r, 20) for r in six] + [(six[-1], perplexity) for perplexity in others]
            for r, perplexity in maps:
                yield EvalConfig(run=r, kind="tsne", perplexity=perplexity, bn="train", labels=0.1,
                                 points=60 if _few(scale) else 1000)  # fmt: skip
        yield from (EvalConfig(run=r, kind="report", **how) for r in runs)
        if n == 0:  # no seed changes what pixels say
            for features in ("pixels", "pca"):
                yield EvalConfig(run=untrained, kind="report", features=features, **how)


def _few(scale: str) -> dict[str, float]:
    """The labels of the report's evaluations on sets that are not its own."""
    return {"labels": 0.1} if scale in ("smoke", "quick") else {}


def _reported(scale: str, datasets: list[str], seeds: list[int], protocols: Sequence[str]) -> Iterator[tuple]:
    """(protocol, set, number of the seed, seed) of the student report's runs."""
    s = scale_of(scale)
    datasets = datasets or list(s.datasets if _few(scale) else ("mnist", "cifar10"))
    for protocol, dataset, (n, seed) in product(protocols, datasets, enumerate(seeds or s.seeds[:s.others])):
        yield protocol, dataset, n, seed


# Of semantic_pairs: images compared; what share of the pool they are (paper: a tenth of CIFAR-10); methods
# that meet mined pairs alone; other shares of the pool to train with; shares of all images to count among.
_PAIRED = ("simclr", "simsiam", "vicreg", "dino")
_MINING = {
    "smoke": (256, 1.0, (), (0.5,), (0.5,)),
    "quick": (600, 1.0, (), (0.5,), (0.1, 0.25)),
    "laptop": (5000, 1.0, _PAIRED, (0.25, 0.5), (0.05, 0.25, 0.5, 1.0)),
    "paper": (5000, 0.1, _PAIRED, (0.05, 0.25, 0.5, 1.0), (0.05, 0.25, 0.5, 1.0)),
}


def _paired(scale: str, dataset: str, method: str, seed: int, kind: str = "none", share: float = 0.0
            ) -> RunConfig:  # fmt: skip
    """A run of semantic_pairs. Pairs are mined by MoCo v2 of the same seed, the nearest whatever their
    cosine."""
    images, usual, *_ = _MINING[scale]
    share = share or usual
    changes: dict[str, Any] = {"pool": images, "epochs": 6} if scale == "quick" else {}
    if kind != "none":
        count = round(pairs.RATIO * images * share / usual)
        changes |= {"pairs": kind, "pair_share": share, "pair_count": count}
    if kind == "mined":
        changes |= {"encoder": _paired(scale, dataset, "moco_v2", seed), "pair_low": -1.0, "pair_high": 1.0}
    return run(method, dataset, scale, seed, **changes)


@_figure
def semantic_pairs(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """SePP-ID's tables at this scale: training with none, with oracle pairs, with mined ones and with two
    more controls; fine-tuning and transfer."""
    for dataset, each in _mined_on(scale, datasets, seeds):
        yield from _trained_with_pairs(scale, dataset, each)


def _mined_on(scale: str, datasets: list[str], seeds: list[int]) -> Iterator[tuple[str, list[int]]]:
    """(set, seeds) of the runs with pairs."""
    s = scale_of(scale)
    for dataset in datasets or ("cifar10" if "cifar10" in s.datasets else s.datasets[0],):
        yield dataset, seeds or list(range(5) if scale == "laptop" else s.seeds)[:s.others]


def _trained_with_pairs(scale: str, dataset: str, seeds: list[int]) -> Iterator[EvalConfig]:
    """Accuracies. At laptop scale three seeds are enough for all but oracle pairs: those are the most that
    pairs can give, and they show no gain with five."""
    s, main = scale_of(scale), ("moco_v2", "sidae")
    _, _, paired, shares, _ = _MINING[scale]
    few = seeds[:3] if scale == "laptop" else seeds
    asked = [*product(("none", "oracle"), seeds, main), *product(("mined", "random", "wrong"), few, main),
             *((kind, seeds[0], m) for m in paired for kind in ("none", "mined"))]  # fmt: skip
    runs = [_paired(scale, dataset, m, seed, kind) for kind, seed, m in asked]
    fewer = [_paired(scale, dataset, "moco_v2", seeds[0], "mined", share) for share in shares]
    other = data.identify({"digits": "photos", "mnist5k": "digits"}.get(dataset, "fashion_mnist"))
    for r in runs + fewer:
        for epoch in checkpoints(r, s.points if r.method in main else 1):
            yield EvalConfig(run=r, kind="logistic", labels=s.labels[0], epoch=epoch)
        yield from (evaluation(r, kind, scale, s.labels[0]) for kind in ("linear", "knn"))
        if r in fewer or r.method not in main or r.pairs not in ("none", "mined") or r.seed not in few:
            continue
        for labels, epochs in ((0.1, 30), (0.01, 60)):  # Table 4
            epochs = 2 if scale == "smoke" else epochs
            yield EvalConfig(run=r, kind="finetune", labels=labels, fit_epochs=epochs)
        for C, split in product((0.01, 0.1), ("val", "test")):  # Table 5: transfer, C by validation
            yield EvalConfig(run=r, kind="logistic", data=other, labels=0.1, C=C, score_on=split)


def _counted_pairs(scale: str, dataset: str, seeds: list[int]) -> Iterator[EvalConfig]:
    """How many of the pairs that an encoder finds are right."""
    images, _, _, _, among = _MINING[scale]
    moco = _paired(scale, dataset, "moco_v2", seeds[0])
    asked = [(_paired(scale, dataset, m, seeds[0]), {}) for m in ("sidae", "simsiam", "simclr")]  # Table 1
    for seed, epoch, augment in product(seeds, (0, -1), ("none", moco.augment)):  # Figure 2
        again = 2 if (seed, epoch, augment) == (2, 0, moco.augment) else 1
        change = {"epoch": epoch, "augment": augment, "pair_recipe": again}
        asked.append((_paired(scale, dataset, "moco_v2", seed), change))
    asked += [(moco, {"epoch": epoch}) for epoch in checkpoints(moco, scale_of(scale).points)]
    asked += [(moco, {"labels": share}) for share in among]
    if dataset == "cifar10":
        asked.append((moco, {"data": data.identify("tinyimagenet32"), "labels": 0.1}))
    usual = round(images / data.TRAINING.get(dataset, 50_000), 4)
    yield from (EvalConfig(run=r, kind="pairs", **{"labels": usual} | change) for r, change in asked)


@_figure
def five_axes(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """Every method on one set at equal images seen; AMDIM, CPC and YADIM with one choice changed at a time
    (at laptop scale encoder and extraction alone); SimCLR, AMDIM and YADIM once more, made of five choices.
    Two seeds below paper scale."""
    s = scale_of(scale)
    dataset = (datasets or [d for d in ("cifar10", *s.datasets) if d in s.datasets])[0]
    for seed in seeds or (s.seeds if scale == "paper" else s.seeds[: min(2, s.others)]):
        own = {m: _equally_long(m, dataset, scale, seed) for m in methods.METHODS if m != "composed"}
        runs = list(own.values())
        for m, changes in VARIED.items():
            network = {k: getattr(own[m], k) for k in ("backbone", "stem", "width")}
            runs.append(own["untrained"].replace(**network))
            kept = changes[::3] if scale == "smoke" else changes
            runs += [own[m].replace(**c) for c in kept if scale != "laptop" or "augment" not in c]
        if scale != "laptop":
            made = {m: own[m].replace(method="composed", **five) for m, five in MADE.items()}
            other = {"compare": "cosine"}, {"loss": "info_nce"}
            runs += [*made.values(), *(made["yadim"].replace(**c) for c in other)]
        for r in runs:
            for kind in ("logistic",) if methods.varied(r) else ("logistic", "knn"):
                yield evaluation(r, kind, scale, s.labels[0])


def _equally_long(method: str, dataset: str, scale: str, seed: int) -> RunConfig:
    """A method's run of five_axes."""
    s, reads = scale_of(scale), methods.METHODS[method].reads
    lengths = {"laptop": {"epochs": 4}, "quick": {"epochs": 1, "pool": 256}, "smoke": {"epochs": 1, "pool": 128}}
    length = lengths.get(scale, {})
    changes = {} if method == "untrained" else dict(length)
    if method == "supervised":
        changes["labels"] = s.labels[0]
    if "per_class" in reads:  # sets of ten classes; a pairwise image is seen in two pairs
        seen = length.get("pool") or s.pool.get(dataset) or data.TRAINING.get(dataset, 1437)
        changes["per_class"] = seen // {"pairwise": 20, "triplet": 10}[method]
    if "pool" in length and "queue" in reads:
        changes["queue"] = length["pool"] // 2  # it holds at most half of the pool
    return run(method, dataset, scale, seed, **changes)


@_figure
def your_own_images(scale: str, datasets: list[str], seeds: list[int], plan: own.Plan | None = None) -> Asked:
    """Notebook 10: three methods, the untrained network and, for each number of labels, a supervised one of
    as many steps. A seed draws the labels too, so that intervals hold for their choice."""
    name, seeds = (datasets or scale_of(scale).datasets)[0], seeds or [0, 1, 2]
    images = data.load(name)
    network = run("sidae", name, scale, epochs=1, pool=0, channels=3)
    plan = plan or own.plan(images, network, own.STEPS[scale], seeds=seeds)
    every = len(images.split("train").images)
    for seed in seeds:
        drawn = [{"label_count": count % every, "label_seed": seed} for count in plan.counts]
        for method in (*SSL, "untrained"):
            fields = {} if method == "untrained" else plan.fields
            r = run(method, name, scale, seed, channels=3, **fields)
            yield from (EvalConfig(run=r, kind="logistic", C=0.1, **labels) for labels in drawn)
        for count, labels in zip(plan.counts, drawn):
            epochs = min(200, max(1, round(plan.steps / math.ceil(count / scales.DOWNSTREAM["batch"]))))
            r = run("supervised", name, scale, seed, epochs=epochs, channels=3, **labels)
            yield EvalConfig(run=r, kind="classifier", **labels)


@_figure
def report_confounds(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """The report's confounds undone one by one, with SimCLR's augmentation and by the fixed protocol; and the
    runs with nothing undone."""
    for _, dataset, _, seed in _reported(scale, datasets, seeds, ("fixed",)):
        last = scales.scenarios(scale, dataset, seed, PROTOCOLS["fixed"][0])[4:6]
        undone = [r.replace(**change[r.method]) for change in metric.CONFOUNDS.values() for r in last
                  if r.method in change and (scale != "smoke" or dataset in scales.GREY)]  # fmt: skip
        yield from (EvalConfig(run=r, kind="report", **_few(scale)) for r in [*last, *undone])


@_figure
def pairs_found(scale: str, datasets: list[str], seeds: list[int]) -> Asked:
    """How many pairs are right, by encoder, epoch, share of the images, with augmentation and without
    training; NNCLR and FNC, which look for theirs while they train."""
    for dataset, each in _mined_on(scale, datasets, seeds):
        yield from (_paired(scale, dataset, m, each[0]) for m in ("simsiam", "simclr", "nnclr", "fnc"))
        yield from _counted_pairs(scale, dataset, each)


def figure(name: str) -> Callable[..., Needs]:
    known = FIGURES | PARTS
    if name not in known:
        raise SidaeError(f"Unknown figure {name!r}; choose from {', '.join(known)}.")
    return known[name]


def needs(scale: str, names: Iterable[str] = ()) -> dict[str, Needs]:
    """Figure -> what it needs at a scale, of those whose image sets are there or known."""
    out = {}
    for name, build in {name: figure(name) for name in names or FIGURES | PARTS}.items():
        with suppress(SidaeError), warnings.catch_warnings(action="ignore"):
            out[name] = build(scale)
    return out


def evaluations(scale: str) -> dict[str, list[EvalConfig]]:
    """Figure -> its evaluations at a scale, of those whose image sets are there or known."""
    papers = [name for name in FIGURES if name != "your_own_images"]  # which is no paper's
    return {name: evals for name, (_, evals) in needs(scale, papers).items()}
