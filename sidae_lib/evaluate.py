"""What a backbone is worth: one record per evaluation, of one of several kinds."""

import base64
import copy
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import augment, networks, pairs, portrait, probes, threads
from .config import EvalConfig, Record, SidaeError, epoch_seed
from .data import Images, subset
from .networks import features
from .train import provenance, several_classes, sha256, strip

DENSE = 200  # up to so many classes a record holds its confusion matrix as rows, else the entries that are not zero
PAIRS_CURVE = (0.01, 0.02, 0.05, 0.14, 0.5, 1, 2, 4)  # pairs per image


# --- a checkpoint, opened once ----------------------------------------------------------------------------------------


class Frozen:
    """What the evaluations of one checkpoint share: its backbone on the device, and the features it has made of late."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        self.path, self.net, self.device = weights, networks.load(weights), device
        self.net.to(device, memory_format=torch.channels_last)
        self.before = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.sha256 = sha256(weights.read_bytes())
        self.made: dict[tuple, tuple[Tensor, Tensor]] = {}  # pixels and their features; who holds pixels keeps their id

    def features(self, pixels: Tensor, rows: Tensor, stats: tuple) -> Tensor:
        """`networks.features` of pixels[rows].

        Off a CPU, features of some rows are taken from those of all rows where these are there. On a CPU the last bits
        depend on which images make up a batch, and a record must stay what it is.
        """
        whole = torch.equal(rows, torch.arange(len(pixels)))
        source = (id(pixels), pixels._version, str(stats))
        key = (*source, b"" if whole else rows.numpy().tobytes())
        if key not in self.made:
            if self.device.type != "cpu" and (*source, b"") in self.made:
                return self.made[*source, b""][1][rows]
            for old in list(self.made)[:-3]:  # the test images, and the training images of a few shares of labels, stay
                self.made.pop(old, None)
            x = pixels if whole else pixels[rows]
            self.made[key] = pixels, features(self.net, x, stats=stats, device=self.device)
        return self.made[key][1]

    def check(self) -> None:
        """Raises SidaeError if the backbone changed, its BatchNorm statistics included (SimSiam's sanity check)."""
        for name, value in self.net.state_dict().items():
            if not torch.equal(value, self.before[name]):
                _recent.clear()
                raise SidaeError(f"The evaluation changed the frozen backbone's {name}; its result was thrown away.")


_recent: dict[tuple, Frozen] = {}  # the checkpoint evaluated last, by its file and when that was written


def frozen(weights: Path, device: torch.device) -> Frozen:
    """A checkpoint, opened once for all its evaluations, and anew when its file is another."""
    stat = weights.stat() if weights.exists() else None  # `networks.load` says that it is missing
    key = weights, device, stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _recent:
        _recent.clear()  # first, since two need not fit into the device's memory
        _recent[key] = Frozen(weights, device)
    return _recent[key]


# --- what is fitted on and what is scored -----------------------------------------------------------------------------


def check(config: EvalConfig) -> None:
    """Raises SidaeError for an unknown kind or augmentation."""
    if config.kind not in KINDS:
        raise SidaeError(f"Unknown kind {config.kind!r}; choose from {', '.join(KINDS)}.")
    augment.check(config.augment)
    if config.score_on == "part" and config.kind != "report":
        raise SidaeError("score_on part belongs to kind report; choose that, or score_on test or val.")


def labelled(config: EvalConfig, images: Images) -> tuple[Tensor, Tensor]:
    """(training indices, indices to score): the label subset, and the test split or 20 % of the subset held out."""
    train, validation = images.split("train"), config.score_on == "val"
    for name in ("train",) if validation else ("train", "test"):
        if images.split(name).labels is None:
            raise SidaeError(f"The {name} split of {images.display} has no labels, so nothing can be classified on it.")
    if config.fold >= 0 and train.folds is None:
        raise SidaeError(f"{images.display} has no predefined folds; leave fold at -1.")
    chosen = torch.arange(len(train.labels)) if config.fold < 0 else train.folds[config.fold]
    chosen = chosen[subset(len(chosen), fraction=config.labels, count=config.label_count, seed=config.label_seed)]
    what = f"{len(chosen)} labels chosen of {images.display}"
    if validation:
        held = torch.zeros(len(chosen), dtype=torch.bool)
        held[subset(len(chosen), count=max(1, round(0.2 * len(chosen))), seed=config.label_seed + 1)] = True
        several_classes(train.labels[chosen[~held]], f"{what}, less {int(held.sum())} that are held out,")
        return chosen[~held], chosen[held]
    test = images.split("test").labels
    if config.score_on == "part":
        several_classes(test, f"{len(test)} test labels of {images.display}")
    several_classes(train.labels[chosen], what)
    return chosen, torch.arange(len(test))


class Task:
    """One evaluation at work: images x[rows] with labels y to fit on, and x_test[scored] with y_test to score."""

    def __init__(self, config: EvalConfig, images: Images, shared: Frozen) -> None:
        self.config, self.images, self.shared, self.device = config, images, shared, shared.device
        fitted, scored = images.split("train"), images.split("train" if config.score_on == "val" else "test")
        self.rows, self.scored = labelled(config, images)
        self.x, self.y = fitted.images, fitted.labels[self.rows].to(self.device)
        self.x_test, self.y_test = scored.images, scored.labels[self.scored].to(self.device)
        self.classes = len(images.classes)
        net = shared.net
        self.stats = (net.mean, net.std) if config.stats == "run" else (images.mean, images.std)

    def features(self) -> Tensor:
        """(N, F) of the images to fit on."""
        return self._embed(self.x, self.rows)

    def test_features(self) -> Tensor:
        """(M, F) of the images to score."""
        return self._embed(self.x_test, self.scored)

    def _embed(self, pixels: Tensor, rows: Tensor) -> Tensor:
        if self.config.features != "backbone":
            return pixels[rows].flatten(1) / 255
        if self.config.bn == "eval":
            return self.shared.features(pixels, rows, self.stats)
        net = copy.deepcopy(self.shared.net).train()
        for batch in (1024, 1025):  # BatchNorm sees 1,024 images at a time, as in the student report's code
            with suppress(ValueError):  # a last one alone, on a map of one place, has no spread: it joins the others
                return features(net, pixels[rows], stats=self.stats, device=self.device, batch=batch)
        raise SidaeError(f"bn train needs more than {len(rows)} image of {self.images.display}: on a map of one place "
                         "BatchNorm has no spread of one; choose bn eval.")  # fmt: skip


# --- the kinds: each gives predicted classes, (N,) or (repeats, N), and what else its record holds ----------------------


def _linear(task: Task) -> tuple[Tensor, Record]:
    c = task.config
    if (c.augment, c.bn) != ("none", "eval"):
        return _through_network(task)
    found = probes.repeated(c, task.features(), task.y, task.classes)
    z = task.test_features()
    return torch.stack([F.linear(z, *probe).argmax(1) for probe in found]), {}


def _through_network(task: Task) -> tuple[Tensor, Record]:
    c, net = task.config, task.shared.net
    if c.kind == "finetune" or c.bn == "train":
        net = copy.deepcopy(net)  # it changes
    model = probes.through_network(c, net, task.x[task.rows], task.y, task.classes, task.stats)
    return features(model, task.x_test[task.scored], stats=task.stats, device=task.device).argmax(1), {}


def _logistic(task: Task) -> tuple[Tensor, Record]:
    predicted = probes.logistic(task.features(), task.y, task.test_features(), task.config.C)
    return predicted, {"solver": "L-BFGS, whitened"}


def _knn(task: Task) -> tuple[Tensor, Record]:
    c = task.config
    scores = probes.knn(task.test_features(), task.features(), task.y, task.classes, k=c.k, tau=c.tau)
    return scores.argmax(1), {}


def _classifier(task: Task) -> tuple[Tensor, Record]:
    own = task.shared.net.classifier
    if own is None or task.config.data:
        raise SidaeError("kind classifier scores a supervised run's own classifier, on that run's own data set.")
    return F.linear(task.test_features(), *(t.to(task.device) for t in own)).argmax(1), {}


def _tsne(task: Task) -> tuple[Tensor, Record]:
    """kNN, and `portrait.picture` with 36 small images: each query beside its neighbours as one `train.strip`."""
    predicted, _ = _knn(task)
    out = portrait.picture(task.config, task.test_features(), task.features())
    near = out["neighbours"]  # places among the chosen labels
    out["thumbnails"] = [strip(torch.cat([task.x_test[task.scored[[query]]], task.x[task.rows[row]]]) / 255)
                         for query, row in zip(out["points"], near)]  # fmt: skip
    out["near_labels"] = task.y[torch.tensor(near)].tolist()
    out["neighbours"] = task.rows[torch.tensor(near)].tolist()
    out["labels"] = task.y_test[out["points"]].tolist()
    return predicted, out


def _pairs(task: Task) -> tuple[Tensor, Record]:
    """Mines pairs among the labelled images. The classes of one end are the truth, those of the other the prediction.

    It takes `pairs.RATIO` pairs per image, those of highest cosine. `curve`: the same for other numbers of pairs.
    `literal`: SePP-ID's own thresholds. With an augmentation, its first view is embedded instead of the image as it is.
    """
    c, x, y = task.config, task.x[task.rows], task.y.cpu()
    n = len(x)
    if c.augment != "none":
        generator = torch.Generator().manual_seed(epoch_seed(c.seed, 0))
        view = augment.VIEWS[c.augment]
        draws, _ = view.draw(n, x.shape[-1], generator)
        x = (255 * augment.apply(view.first, x, draws, torch.zeros(1), torch.ones(1))).round().byte()
    z = pairs.embed(task.shared.path, x, task.device)
    ranked = pairs.mine(z, k=n, low=-1.0, high=1.0, count=4 * n)
    literal = pairs.mine(z, k=n, low=0.97, high=0.99, count=4 * n)

    def best(per_image: float) -> pairs.Pairs:
        return pairs.Pairs(*(t[: max(1, round(per_image * n))] for t in ranked))

    found = best(pairs.RATIO)
    out = pairs.report(found, y)
    out["curve"] = [pairs.report(best(r), y) for r in PAIRS_CURVE]
    out["literal"] = pairs.report(literal, y)
    i, j, score = found
    first = zip(task.rows[i[:1000].cpu()].tolist(), task.rows[j[:1000].cpu()].tolist(), score[:1000].tolist())
    out["list"] = [[a, b, round(s, 6)] for a, b, s in first]
    out["pictures"] = pair_pictures(out["list"], task.x, task.images.split("train").labels)
    task.y_test = task.y[torch.cat([i, j])]
    return task.y[torch.cat([j, i])], {"pairs": out}


def pair_pictures(pairs: Sequence[Sequence[float]], images: Tensor, labels: Tensor) -> list[Record]:
    """Of a list of [i, j, cosine] the first eight pairs of one class and the first eight of two: their place in the list,
    whether they are right, and both images as one `train.strip`.  images: uint8 (N, C, S, S) that i and j count in."""
    ends = torch.tensor([pair[:2] for pair in pairs], dtype=torch.int64)
    right = labels.cpu()[ends[:, 0]] == labels.cpu()[ends[:, 1]]
    taken = sorted(k for same in (True, False) for k in (right == same).nonzero()[:8, 0].tolist())
    return [{"at": k, "right": bool(right[k]), "images": strip(images[ends[k]].cpu() / 255)} for k in taken]


def _report(task: Task) -> tuple[Tensor, Record]:
    c = task.config
    order = torch.randperm(len(task.y_test), generator=torch.Generator().manual_seed(c.seed))
    task.scored, task.y_test = task.scored[order], task.y_test[order.to(task.device)]  # BatchNorm may look at batches
    z = task.test_features()
    x = z if c.score_on == "part" else task.features()
    predicted, task.y_test, task.y, out = portrait.student_report(c, x, task.y, z, task.y_test)
    return predicted, out


KINDS: dict[str, Callable[[Task], tuple[Tensor, Record]]] = {
    "linear": _linear, "logistic": _logistic, "knn": _knn, "finetune": _through_network, "classifier": _classifier,
    "tsne": _tsne, "pairs": _pairs, "report": _report}  # fmt: skip


# --- records ------------------------------------------------------------------------------------------------------------


def how_often_right(record: Record) -> np.ndarray:
    """(N,) for a record's test images, in their order: in how many of its repeats each was classified rightly."""
    return np.frombuffer(zlib.decompress(base64.b64decode(record["right"])), np.uint8)


def confusion(record: Record) -> np.ndarray:
    """(C, C) int64 counts of a record's test images, true classes as rows.

    A record of more than DENSE classes holds the entries that are not zero, as [true, predicted, count].
    """
    C, held = len(record["classes"]), np.array(record["confusion"], np.int64)
    if held.shape == (C, C):
        return held
    out = np.zeros((C, C), np.int64)
    out[held[:, 0], held[:, 1]] = held[:, 2]
    return out


def evaluate(config: EvalConfig, images: Images, weights: Path, *, device: torch.device) -> Record:
    """The record of one evaluation.

    weights: the run's backbone at config.epoch.  images: the set that config.data names, at the run's size.
    accuracy: percent, the mean over the repeats; `each` lists them.  per_class: percent, None for a class that was not scored.
    confusion: counts of all repeats, true classes as rows; `confusion` reads it.  right: at the last epoch, how often each
    test image was right; `how_often_right` reads it.  cut: sizes that were cut to the number of images. Of kind `pairs`,
    accuracy is that of the pairs, and rows are the classes of one end.
    """
    check(config)
    if device.type == "cpu":  # a GPU's compiled views would be compiled anew for another number
        threads.fit()
    if config.kind == "pairs" and "train" not in images.splits:  # a pool: its labels, where it has any, serve for this alone
        images = replace(images, splits=dict.fromkeys(("train", "test"), images.split("unlabeled")))
    began = time.perf_counter()
    task = Task(config, images, frozen(weights, device))
    predicted, extra = KINDS[config.kind](task)
    task.shared.check()
    predicted = predicted.view(-1, len(task.y_test))
    right = predicted == task.y_test  # (repeats, N)
    if config.repeats > 1:
        extra["each"] = [round(v, 4) for v in (100 * right.double().mean(1)).tolist()]
    if config.epoch == config.run.epochs and config.score_on == "test" and config.kind not in ("pairs", "tsne"):
        times = right.sum(0).byte().cpu().numpy().tobytes()
        extra["right"] = base64.b64encode(zlib.compress(times, 9)).decode()
    return {
        "config": config.to_dict(), "key": config.key(), "run_key": config.run.key(), "epoch": config.epoch,
        "kind": config.kind, "data": {"name": images.name, "display": images.display},
        "backbone": task.shared.sha256, "accuracy": round(100 * right.double().mean().item(), 4),
        **_counts(task.y_test, predicted, task.classes),
        "classes": list(images.classes), "n_train": len(task.y), "n_test": len(task.y_test),
        "seconds": round(time.perf_counter() - began, 3), "provenance": provenance(device), **extra,
    }  # fmt: skip


def _counts(y: Tensor, predicted: Tensor, classes: int) -> Record:
    """Accuracy per class and the confusion matrix; never a dense one of very many classes."""
    from scipy.sparse import coo_array

    cells, times = (t.cpu().numpy() for t in (y * classes + predicted).unique(return_counts=True))
    matrix = coo_array((times, np.divmod(cells, classes)), shape=(classes, classes))
    counted = zip(matrix.diagonal().tolist(), matrix.sum(1).tolist())
    held = matrix.toarray() if classes <= DENSE else np.stack([*matrix.coords, times], 1)
    return {"per_class": [round(100 * good / n, 4) if n else None for good, n in counted], "confusion": held.tolist()}
