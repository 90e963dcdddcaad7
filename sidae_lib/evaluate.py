"""What a backbone is worth: linear probe, logistic regression, kNN, fine-tuning. One record per evaluation."""

import base64
import copy
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import augment, networks, pairs, threads
from .config import EvalConfig, SidaeError, epoch_seed
from .data import Images, subset
from .networks import features
from .step import Captured, batches, lr_at, seeded
from .train import provenance, several_classes, sha256, strip

DENSE = 200  # classes up to which a record holds its confusion matrix as rows, else its entries that are not zero
MANY = 1000  # steps of a probe from which capturing them, which takes as long as some hundred, is worth it
KINDS = ("linear", "logistic", "knn", "finetune", "classifier", "tsne", "pairs", "report")


class Frozen:
    """What the evaluations of one checkpoint share: its backbone on the device, a copy of what that was, its file's sha256 and
    the features it has made of late."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        self.net, self.device = networks.load(weights), device
        self.net.to(device, memory_format=torch.channels_last)
        self.before = {k: v.clone() for k, v in self.net.state_dict().items()}
        self.sha256 = sha256(weights.read_bytes())
        self.made: dict[tuple, tuple[Tensor, Tensor]] = {}  # pixels, held so that their id stays theirs, and their features

    def features(self, pixels: Tensor, rows: Tensor, stats: tuple) -> Tensor:
        """Of pixels[rows], as `networks.features`. Some rows' are taken from those of all where they are there, but on a CPU:
        there the last bits depend on which images make up a batch, and a record stays what it is."""
        whole = torch.equal(rows, torch.arange(len(pixels)))
        of, some = (id(pixels), pixels._version, str(stats)), b"" if whole else rows.numpy().tobytes()
        if (*of, some) not in self.made:
            if self.device.type != "cpu" and (*of, b"") in self.made:
                return self.made[*of, b""][1][rows]
            for old in list(self.made)[:-3]:  # the test images, and the training images of a few shares of the labels, stay
                self.made.pop(old, None)
            x = pixels if whole else pixels[rows]
            self.made[*of, some] = pixels, features(self.net, x, stats=stats, device=self.device)
        return self.made[*of, some][1]

    def check(self) -> None:
        """Raises SidaeError unless the backbone is what it was, SimSiam's sanity check: values and BatchNorm's statistics."""
        for k, v in self.net.state_dict().items():
            if not torch.equal(v, self.before[k]):
                _recent.clear()
                raise SidaeError(f"The evaluation changed the frozen backbone's {k}; its result was thrown away.")


_recent: dict[tuple, Frozen] = {}  # the checkpoint evaluated last, by its file and when that was written


def frozen(weights: Path, device: torch.device) -> Frozen:
    """A checkpoint, opened once for all its evaluations and anew when its file is another."""
    stat = weights.stat() if weights.exists() else None  # `networks.load` says that it is missing
    key = weights, device, stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    found = _recent.get(key)
    if found is None:
        _recent.clear()  # first: two do not have to fit in the device's memory
        found = _recent[key] = Frozen(weights, device)
    return found


def check(config: EvalConfig) -> None:
    """Raises SidaeError for an unknown kind or augmentation."""
    if config.kind not in KINDS:
        raise SidaeError(f"Unknown kind {config.kind!r}; choose from {', '.join(KINDS)}.")
    augment.check(config.augment)
    if config.score_on == "part" and config.kind != "report":
        raise SidaeError("score_on part belongs to kind report; choose that, or score_on test or val.")


def labelled(config: EvalConfig, images: Images) -> tuple[Tensor, Tensor]:
    """(training indices, indices to score): the label subset, and the test split or 20 % of the subset held out."""
    train = images.split("train")
    for name in ("train",) if config.score_on == "val" else ("train", "test"):
        if images.split(name).labels is None:
            raise SidaeError(f"The {name} split of {images.display} has no labels, so nothing can be classified on it.")
    if config.fold >= 0 and train.folds is None:
        raise SidaeError(f"{images.display} has no predefined folds; leave fold at -1.")
    chosen = torch.arange(len(train.labels)) if config.fold < 0 else train.folds[config.fold]
    chosen = chosen[subset(len(chosen), fraction=config.labels, count=config.label_count, seed=config.label_seed)]
    if config.score_on == "part":
        several_classes(images.split("test").labels, f"{len(images.split('test').labels)} test labels of {images.display}")
    held = torch.zeros(len(chosen), dtype=torch.bool)
    if config.score_on == "val":
        held[subset(len(chosen), count=max(1, round(0.2 * len(chosen))), seed=config.label_seed + 1)] = True
    several_classes(train.labels[chosen[~held]], f"{len(chosen)} labels chosen of {images.display}" + (
        f", less {int(held.sum())} that are held out," * (config.score_on == "val")))
    return chosen[~held], chosen[held] if config.score_on == "val" else torch.arange(len(images.split("test").labels))


def _fit(config: EvalConfig, y: Tensor, classes: int, width: int, embed: Callable[[Tensor, dict[str, Tensor]], Tensor],
         backbone: Iterable[nn.Parameter] = (), seed: int | None = None) -> nn.Linear:  # fmt: skip
    """The paper's downstream training, Sec. 4.1: SGD on the cross-entropy of one fully connected layer on what `embed`
    makes of (indices into y, their augmentation parameters); those of `backbone` that want a gradient move too. seed: of the
    layer and the order, the config's own unless given."""
    seed = config.seed if seed is None else seed
    with seeded(seed):
        fc = nn.Linear(width, classes).to(y.device)
    groups = [{"params": list(p), "lr": lr, "base": lr}
              for p, lr in ((fc.parameters(), config.lr), (backbone, config.backbone_lr))]  # fmt: skip
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
    bounds = batches(len(y), config.batch, config.keep_last) or [(0, len(y))]
    for epoch in range(config.fit_epochs):
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(len(y), generator=generator).to(y.device)
        draws, _ = augment.VIEWS[config.augment].draw(len(y), config.run.size, generator)
        draws = {k: v.to(y.device) for k, v in draws.items()}
        for n, (a, b) in enumerate(bounds):
            for group in optimizer.param_groups:
                step, steps = epoch * len(bounds) + n, config.fit_epochs * len(bounds)
                group["lr"] = lr_at(step, steps, group["base"], config.schedule)
            optimizer.zero_grad()
            F.cross_entropy(fc(embed(order[a:b], {k: v[a:b] for k, v in draws.items()})), y[order[a:b]]).backward()
            optimizer.step()
    return fc


def _probes(config: EvalConfig, bank: Tensor, y: Tensor, classes: int) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of config.repeats probes on features (N, F), of other seeds but else alike: one after the other on a
    CPU; on a GPU, where a step of one is all waiting, side by side and each epoch one launch."""
    seeds = [config.seed + 1000 * r for r in range(config.repeats)]
    if bank.device.type != "cuda":
        fits = [_fit(config, y, classes, bank.shape[1], lambda rows, _: bank[rows], seed=s) for s in seeds]
        return [(fc.weight, fc.bias) for fc in fits]
    return _side_by_side(config, bank, y, classes, seeds)


@networks.full_float32()
def _side_by_side(config: EvalConfig, bank: Tensor, y: Tensor, classes: int, seeds: list[int]) -> list[tuple[Tensor, Tensor]]:
    """As `_fit` on cached features for every seed: R classifiers as one product per step, the gradient of softmax
    cross-entropy by hand, an epoch of steps one launch. The bias is the weight of a feature that is 1."""
    own = []
    for seed in seeds:
        with seeded(seed):
            own.append(nn.Linear(bank.shape[1], classes))
    (N, F_), R, device = bank.shape, len(seeds), bank.device
    x = F.pad(bank, (0, 4 - F_ % 4))  # the 1, and zeros that keep rows aligned; their weights stay zero
    x[:, F_] = 1
    W = torch.zeros(R, classes, x.shape[1])
    W[..., :F_], W[..., F_] = (torch.stack([getattr(fc, k).detach() for fc in own]) for k in ("weight", "bias"))
    W = W.to(device)
    velocity, minus = torch.zeros_like(W), -torch.ones(1, 1, 1, device=device)
    bounds = batches(N, config.batch, config.keep_last) or [(0, N)]
    steps = config.fit_epochs * len(bounds)
    rates = torch.tensor([lr_at(n, steps, config.lr, config.schedule) for n in range(steps)]).view(-1, len(bounds)).to(device)
    order, lr = torch.zeros(N, R, dtype=torch.long, device=device), rates[0].clone()  # of the epoch

    def epoch() -> None:
        truth = y[order]  # (N, R)
        for n, (a, b) in enumerate(bounds):
            z = x.index_select(0, order[a:b].view(-1)).view(b - a, R, -1).transpose(0, 1)  # (R, B, F)
            error = torch.bmm(z, W.mT).softmax(2)  # (R, B, C)
            error.scatter_add_(2, truth[a:b].T[..., None], minus.expand(R, b - a, 1))
            velocity.baddbmm_(error.mT, z, beta=config.momentum, alpha=1 / (b - a))
            if config.weight_decay:
                velocity.add_(W, alpha=config.weight_decay)
            W.addcmul_(velocity, lr[n], value=-1)

    launch = Captured(epoch, device) if steps >= MANY else epoch
    for n in range(config.fit_epochs):  # orders are drawn and sent while the device works on the epoch before
        generators = (torch.Generator().manual_seed(epoch_seed(seed, n)) for seed in seeds)
        order.copy_(networks.sent(torch.stack([torch.randperm(N, generator=g) for g in generators]), device).T)
        lr.copy_(rates[n])
        launch()
    return [(w[:, :F_], w[:, F_]) for w in W]


def _fit_network(config: EvalConfig, net: nn.Module, images: Tensor, y: Tensor, classes: int, stats: tuple
                 ) -> nn.Sequential:  # fmt: skip
    """Fine-tuning; or a frozen backbone where features cannot be cached (augmented input, BatchNorm in train mode)."""
    tuned = config.kind == "finetune"
    net.requires_grad_(tuned).train(tuned or config.bn == "train")
    mean, std = (torch.tensor(s, device=y.device).view(-1, 1, 1) for s in stats)
    images, ops = images.to(y.device), augment.VIEWS[config.augment].first

    def embed(rows: Tensor, draws: dict[str, Tensor]) -> Tensor:
        view = augment.apply(ops, images[rows], draws, mean, std)
        return net(view.contiguous(memory_format=torch.channels_last))

    fc = _fit(config, y, classes, net.out_features, embed, net.parameters())
    return nn.Sequential(net, fc).eval()


@networks.full_float32()
def knn(x: Tensor, bank: Tensor, labels: Tensor, classes: int, *, k: int, tau: float) -> Tensor:
    """Weighted kNN scores (N, classes): the k nearest by cosine vote with exp(cosine / tau) (arXiv:1805.01978).

    x: (N, F).  bank: (M, F) with labels (M,). Neither need be normalised; k is cut to M. Scores are relative to the
    nearest one's vote, which is 1, so that no tau overflows; they are float64 where features are, else float32.
    """
    x, bank = networks.wide(x, bank)
    bank, out = F.normalize(bank, dim=1), []
    most = 1000 if x.device.type == "cpu" else 2**27 // len(bank) + 1  # half a GiB of cosines
    for rows in F.normalize(x, dim=1).split(most):
        cosine, index = (rows @ bank.T).topk(min(k, len(bank)), dim=1)  # (n, k)
        votes = torch.zeros(len(rows), classes, dtype=x.dtype, device=x.device)
        out.append(votes.scatter_add_(1, labels[index], ((cosine - cosine[:, :1]) / tau).exp()))
    return torch.cat(out)


@networks.full_float32()
def logistic(x: Tensor, y: Tensor, test: Tensor, C: float = 1.0) -> Tensor:
    """Classes (M,) that multinomial logistic regression on standardised features gives `test`, on the features' device.

    x: (N, F) with labels y (N,).  test: (M, F).  Minimised is the mean cross-entropy + |W|^2 / (2 C N), intercepts free,
    which is scikit-learn's LogisticRegression; as there L-BFGS, and of two classes one weight vector. Its variables are those
    in which the curvature at W = 0 is the identity: correlated features would take hundreds of steps, and scikit-learn at its
    default tolerance stops short of their optimum.
    """
    from scipy.optimize import minimize

    (x, test), (seen, y) = networks.wide(x, test), y.unique(return_inverse=True)
    N, F_, K = *x.shape, len(seen)
    std, mean = torch.std_mean(x.double(), 0, correction=0)
    std = torch.where(std > 10 * torch.finfo(x.dtype).eps * mean.abs(), std, 1.0)  # a constant feature stays one
    x, test = (((v - mean) / std).to(x.dtype) for v in (x, test))
    penalty, rows = 1 / ((C if K > 2 else C / 2) * N), torch.arange(N, device=x.device)
    curvature, Q = (v.to(x.device) for v in torch.linalg.eigh(((x.mT @ x).double() / N).cpu()))  # too small for a GPU
    scale = (curvature.clamp(min=0) / K + penalty).rsqrt()  # W = Q scale V
    x, test = ((v @ (Q * scale).to(v.dtype)) for v in (x, test))
    penalties = penalty * scale.square()[:, None]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        V = torch.from_numpy(flat).view(F_ + 1, K).to(x.device)
        log_p = torch.log_softmax((x @ V[:-1].to(x.dtype)).double() + V[-1], 1)
        g = log_p.exp()
        g[rows, y] -= 1
        gradient = torch.cat([(x.mT @ (g / N).to(x.dtype)).double() + penalties * V[:-1], g.mean(0, keepdim=True)])
        value = (penalties * V[:-1].square()).sum() / 2 - log_p[rows, y].mean()
        both = torch.cat([value.view(1), gradient.flatten()]).cpu().numpy()  # one look at the device
        return both[0], both[1:]

    found = minimize(loss, np.zeros((F_ + 1) * K), jac=True, method="L-BFGS-B",
                     options={"maxiter": 1000, "maxls": 50, "gtol": 1e-6, "ftol": 1e-10})  # fmt: skip
    V = torch.from_numpy(found.x).view(F_ + 1, K).to(x.device)
    return seen[((test @ V[:-1].to(x.dtype)).double() + V[-1]).argmax(1)]


def _cut(**sizes: tuple[float, float]) -> dict[str, dict[str, float]]:
    """What a record says of sizes (usual, taken) that were cut to the number of images; nothing where none was."""
    cut = {name: taken for name, (usual, taken) in sizes.items() if taken < usual}
    return {"cut": cut} if cut else {}


def picture(config: EvalConfig, x: Tensor, bank: Tensor) -> dict[str, Any]:
    """What a picture of features shows, so that it is drawn again without weights: test points on two maps in [-1, 1], each
    with its trustworthiness (Venna & Kaski 2001: 1 = every neighbour on the map is one in feature space), and the first
    queries with their nearest training images by cosine, as places in the chosen labels.

    x: (N, F) test features, of which config.points are taken, the same for every network.  bank: (M, F).
    t-SNE looks at three times as many neighbours as its perplexity, which is cut to a third of the other points where there
    are no more points than it; trustworthiness, at five, which are cut to below half of the points. `cut` says to what. A map
    of points that are all alike is one place; it has no trustworthiness (None), and one of two points neither.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE, trustworthiness

    taken = subset(len(x), count=min(config.points, len(x)), seed=config.label_seed)
    (x, bank), n = networks.wide(x, bank), len(taken)
    z = x[taken.to(x.device)].cpu().numpy()
    perplexity = config.perplexity if config.perplexity < n else round((n - 1) / 3, 4)
    k, alike = min(5, (n - 1) // 2), not np.square(z - z[0]).any()  # scikit-learn's t-SNE ends the process on equal points
    maps = {"tsne": TSNE(2, perplexity=perplexity, init="pca", random_state=config.seed), "pca": PCA(2)}
    out: dict[str, Any] = {"points": taken.tolist()} | _cut(perplexity=(config.perplexity, perplexity), trustworthiness=(5, k))
    for name, model in maps.items():
        xy = np.zeros((n, 2)) if alike else model.fit_transform(z)
        trust = None if alike or not k else round(float(trustworthiness(z, xy, n_neighbors=k)), 4)
        out[name] = {"xy": (xy / (np.abs(xy).max() or 1)).round(3).tolist(), "trustworthiness": trust}
    near = (F.normalize(x[taken[:6].to(x.device)], dim=1) @ F.normalize(bank, dim=1).T).topk(min(5, len(bank)), dim=1)
    return out | {"neighbours": near.indices.tolist()}


def _pairs(config: EvalConfig, x: Tensor, y: Tensor, weights: Path, device: torch.device) -> tuple[pairs.Pairs, dict]:
    """RATIO pairs per image, those of highest cosine; `curve`: the same for other numbers of pairs; `literal`: SePP-ID's
    own thresholds. With an augmentation its first view is embedded instead of the image as it is."""
    if config.augment != "none":
        generator = torch.Generator().manual_seed(epoch_seed(config.seed, 0))
        draws, _ = augment.VIEWS[config.augment].draw(len(x), x.shape[-1], generator)
        view = augment.apply(augment.VIEWS[config.augment].first, x, draws, torch.zeros(1), torch.ones(1))
        x = (255 * view).round().byte()
    z, y, n = pairs.embed(weights, x, device), y.cpu(), len(x)
    most, own = (pairs.mine(z, k=n, low=low, high=high, count=4 * n) for low, high in ((-1.0, 1.0), (0.97, 0.99)))
    first = lambda ratio: pairs.Pairs(*(t[: max(1, round(ratio * n))] for t in most))  # noqa: E731
    return first(pairs.RATIO), pairs.report(first(pairs.RATIO), y) | {
        "curve": [pairs.report(first(r), y) for r in (0.01, 0.02, 0.05, 0.14, 0.5, 1, 2, 4)], "literal": pairs.report(own, y)}


def _report(config: EvalConfig, x: Tensor, y: Tensor, test: Tensor, y_test: Tensor) -> tuple[Tensor, Tensor, Tensor, dict]:
    """The student report's Sec. 5.5 and 6.1 on features: predicted and true labels of the images scored, labels fitted on, and
    top-3 and kNN accuracy (percent), histograms of cosines and distances, and `radial`, the share of a class's spread along
    its mean (1: vectors that differ in length alone). score_on part: as its code did, 80 % of the test images are fitted on,
    top-3 on a split of its own; else fitted on x and scored on test, logistic regression on standardised features. The 32
    components and the 30 neighbours are cut to the images fitted on, and `cut` says so."""
    from sklearn import decomposition, linear_model, model_selection, neighbors, pipeline, preprocessing

    x, y, test, y_test = (t.cpu().numpy() for t in (x, y, test, y_test))
    part = config.score_on == "part"
    (fit, scored, y_fit, y_scored), again = (
        model_selection.train_test_split(test, y_test, train_size=0.8, random_state=(config.seed + n) % 2**32)
        if part else (x, test, y, y_test) for n in (0, 1))
    for labels in (y_fit, again[2]):
        several_classes(torch.from_numpy(labels), f"{len(labels)} test labels that score_on part fits on")
    components, k = min(32, *fit.shape), min(30, len(fit))
    pca = [decomposition.PCA(components, random_state=0)] * (config.features == "pca")
    logistic = pipeline.make_pipeline(*pca, *([] if part else [preprocessing.StandardScaler()]),
                                      linear_model.LogisticRegression(max_iter=1000)).fit(fit, y_fit)
    predicted = logistic.predict(scored)
    knn = pipeline.make_pipeline(*pca, neighbors.KNeighborsClassifier(k)).fit(fit, y_fit).score(scored, y_scored)
    scores = (logistic.fit(again[0], again[2]) if part else logistic).predict_proba(again[1])
    top3 = (logistic.classes_[scores.argsort(1)[:, -3:]] == again[3][:, None]).any(1).mean()
    z, label, upper = torch.from_numpy(test[:1000]), y_test[:1000], np.triu_indices(len(test[:1000]), 1)
    one_hot = F.one_hot(torch.from_numpy(label)).float()
    means = one_hot @ (one_hot.T @ z / one_hot.sum(0).clamp(min=1)[:, None])  # (n, F) of every image's class
    along, same = ((z - means) * F.normalize(means, dim=1)).sum(1), (label[:, None] == label)[upper]
    out = {name: round(100 * float(share), 4) for name, share in (("top3", top3), ("knn", knn))}
    radial = (along.square().sum() / (z - means).square().sum()).item()
    out["radial"] = None if np.isnan(radial) else radial  # one image of each class, or equal ones: there is no spread
    out |= _cut(components=(32, components if pca else 32), neighbours=(30, k))
    for name, every in (("cosine", F.normalize(z, dim=1) @ F.normalize(z, dim=1).T), ("distance", torch.cdist(z, z))):
        d = every.numpy()[upper]
        try:
            edges = np.histogram_bin_edges(d, 40)
        except ValueError:  # all are nearly the same, and float32 has no 40 numbers between them
            edges = np.histogram_bin_edges(d.astype(float), 40)
        out[name] = {"edges": edges.round(5).tolist(), "same": np.histogram(d[same], edges)[0].tolist(),
                     "different": np.histogram(d[~same], edges)[0].tolist()}
    return *(torch.from_numpy(v) for v in (predicted, y_scored, y_fit)), out


def how_often_right(record: dict[str, Any]) -> np.ndarray:
    """(N,) of a record's test images, in their order: in how many of its repeats each was classified rightly."""
    return np.frombuffer(zlib.decompress(base64.b64decode(record["right"])), np.uint8)


def confusion(record: dict[str, Any]) -> np.ndarray:
    """(C, C) int64 counts of a record's test images, true classes as rows, however the record holds them: as rows, or of more
    than DENSE classes as [true, predicted, count] where the count is not 0."""
    C, held = len(record["classes"]), np.array(record["confusion"], np.int64)
    if held.shape == (C, C):
        return held
    out = np.zeros((C, C), np.int64)
    out[held[:, 0], held[:, 1]] = held[:, 2]
    return out


def evaluate(config: EvalConfig, images: Images, weights: Path, *, device: torch.device) -> dict[str, Any]:
    """The record of one evaluation; accuracy in percent (of a class that was not scored: None), confusion matrix with true
    classes as rows, which `confusion` reads. Kind `pairs` mines among the images whose labels are given, and its accuracy is
    that of the pairs, rows the classes of one end. With repeats the accuracy is their mean, `each` the list, and the matrix
    counts them all. At the last epoch `right` says of every test image how often it was right (bytes, zlib, base64;
    `how_often_right` reads it). Kind `tsne` keeps of every query itself and its neighbours as one `train.strip`, 36 small
    images in all, and the classes of the neighbours. `cut` holds the sizes that were cut to the number of images, where any
    was.

    weights: the run's backbone at config.epoch.  images: the set that config.data names, at the run's size.
    """
    from scipy.sparse import coo_array  # as slow to import as the rest of scipy

    check(config)
    if device.type == "cpu":  # a GPU's compiled views would be compiled anew for another number
        threads.fit()
    if config.kind == "pairs" and "train" not in images.splits:  # a pool: its labels, where it has any, serve for this alone
        images = replace(images, splits=dict.fromkeys(("train", "test"), images.split("unlabeled")))
    began, shared = time.perf_counter(), frozen(weights, device)
    net = shared.net
    stats = (net.mean, net.std) if config.stats == "run" else (images.mean, images.std)
    train, scored = labelled(config, images)
    split = images.split("train" if config.score_on == "val" else "test")
    x, x_test, classes = images.split("train").images, split.images, len(images.classes)  # of which a few may be wanted
    y, y_test = images.split("train").labels[train].to(device), split.labels[scored].to(device)

    def embed(pixels: Tensor, rows: Tensor) -> Tensor:
        """Features of pixels[rows]."""
        if config.features != "backbone":
            return pixels[rows].flatten(1) / 255
        if config.bn == "train":  # BatchNorm sees 1,024 images at a time, as in the student report's code
            for batch in (1024, 1025):
                with suppress(ValueError):  # a last one alone on a map of one place, which has no spread: it joins the others
                    return features(copy.deepcopy(net).train(), pixels[rows], stats=stats, device=device, batch=batch)
            raise SidaeError(f"bn train needs more than {len(rows)} image of {images.display}: on a map of one place BatchNorm "
                             "has no spread of one; choose bn eval.")  # fmt: skip
        return shared.features(pixels, rows, stats)

    extra: dict[str, Any] = {}
    if config.kind == "report":
        order = torch.randperm(len(y_test), generator=torch.Generator().manual_seed(config.seed))
        scored, y_test = scored[order], y_test[order.to(device)]  # BatchNorm may look at batches, so they are mixed
        z = embed(x_test, scored)
        predicted, y_test, y, extra = _report(config, z if config.score_on == "part" else embed(x, train), y, z, y_test)
    elif config.kind == "classifier":
        if net.classifier is None or config.data:
            raise SidaeError("kind classifier scores a supervised run's own classifier, on that run's own data set.")
        predicted = F.linear(embed(x_test, scored), *(t.to(device) for t in net.classifier)).argmax(1)
    elif config.kind == "pairs":
        found, extra["pairs"] = _pairs(config, x[train], y, weights, device)
        extra["pairs"]["list"] = [[int(train[a]), int(train[b]), round(s, 6)]
                                  for a, b, s in zip(*(t[:1000].tolist() for t in found))]
        y_test, predicted = (y[torch.cat(ends)] for ends in (found[:2], found[1::-1]))
    elif config.kind in ("knn", "tsne"):
        predicted = knn(embed(x_test, scored), embed(x, train), y, classes, k=config.k, tau=config.tau).argmax(1)
    elif config.kind == "logistic":
        predicted = logistic(embed(x, train), y, embed(x_test, scored), config.C)
        extra["solver"] = "L-BFGS, whitened"
    elif config.kind == "linear" and (config.augment, config.bn) == ("none", "eval"):
        found = _probes(config, embed(x, train), y, classes)
        z = embed(x_test, scored)
        predicted = torch.stack([F.linear(z, *probe).argmax(1) for probe in found])  # (repeats, N)
    else:
        changes = config.kind == "finetune" or config.bn == "train"  # then it is a copy that changes
        model = _fit_network(config, copy.deepcopy(net) if changes else net, x[train], y, classes, stats)
        predicted = features(model, x_test[scored], stats=stats, device=device).argmax(1)
    if config.kind == "tsne":
        extra = picture(config, embed(x_test, scored), embed(x, train))
        rows, points = extra["neighbours"], extra["points"]
        extra["thumbnails"] = [strip(torch.cat([x_test[scored[[query]]], x[train[row]]]) / 255)
                               for query, row in zip(points, rows)]
        extra["near_labels"] = y[torch.tensor(rows)].tolist()
        extra["neighbours"] = [[int(train[j]) for j in row] for row in rows]
        extra["labels"] = y_test[points].tolist()
    shared.check()

    predicted = predicted.view(-1, len(y_test))
    cells, times = (t.cpu().numpy() for t in (y_test * classes + predicted).unique(return_counts=True))  # of all repeats
    confusion = coo_array((times, np.divmod(cells, classes)), shape=(classes, classes))
    counted = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist())
    right = predicted == y_test  # (repeats, N)
    if config.repeats > 1:
        extra["each"] = [round(v, 4) for v in (100 * right.double().mean(1)).tolist()]
    if config.epoch == config.run.epochs and config.score_on == "test" and config.kind not in ("pairs", "tsne"):
        extra["right"] = base64.b64encode(zlib.compress(right.sum(0).byte().cpu().numpy().tobytes(), 9)).decode()
    return {
        "config": config.to_dict(), "key": config.key(), "run_key": config.run.key(), "epoch": config.epoch,
        "kind": config.kind, "data": {"name": images.name, "display": images.display},
        "backbone": shared.sha256, "accuracy": round(100 * right.double().mean().item(), 4),
        "per_class": [round(100 * good / n, 4) if n else None for good, n in counted], "confusion": (
            confusion.toarray() if classes <= DENSE else np.stack([*confusion.coords, times], 1)).tolist(),
        "classes": list(images.classes), "n_train": len(y), "n_test": len(y_test),
        "seconds": round(time.perf_counter() - began, 3), "provenance": provenance(device), **extra,
    }  # fmt: skip
