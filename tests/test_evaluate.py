"""Evaluations against slow loops typed here, on a tiny set and a backbone that the library trained and saved."""

import copy
import hashlib
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_step import Waits
from torch import nn
from torch._subclasses import FakeTensorMode

from sidae_lib import data, differences, evaluate, experiments, frames, networks, pairs, portrait, probes, train
from sidae_lib.config import EvalConfig, RunConfig, SidaeError, epoch_seed
from sidae_lib.data import Images, Split, subset
from sidae_lib.step import batches

CPU = torch.device("cpu")
COLOURS = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
RUN = RunConfig(method="simsiam", data="colours", backbone="small_cnn", size=8, dim=16, hidden=16, pred_hidden=4,
                batch=20, epochs=3, augment="none")  # fmt: skip
SUPERVISED = RunConfig(method="supervised", data="colours", backbone="small_cnn", size=8, batch=20, epochs=3,
                       augment="none")  # fmt: skip


def images_of(n, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=g)
    noise = torch.randint(-40, 41, (n, 3, 8, 8), generator=g) + torch.randint(-60, 61, (n, 3, 1, 1), generator=g)
    return Split((COLOURS[labels][..., None, None] + noise).clamp(0, 255).to(torch.uint8), labels)


@pytest.fixture(scope="module")
def images() -> Images:
    splits = {"train": images_of(97, 0), "test": images_of(50, 1)}
    x = splits["train"].images / 255
    stats = (tuple(f(x, (0, 2, 3)).tolist()) for f in (torch.mean, torch.std))
    return Images("colours", "Colours", "colours", ("red", "green", "blue"), *stats, splits)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> dict[RunConfig, Path]:
    out = {}
    for run in (RUN, SUPERVISED):
        folder = tmp_path_factory.mktemp("run")
        train.pretrain(run, images, folder, device=CPU)
        out[run] = folder / "backbone-e003.safetensors"
    return out


@pytest.fixture(scope="module")
def weights(trained) -> Path:
    return trained[RUN]


def config(**changes):
    return EvalConfig(**{"run": RUN, "fit_epochs": 4, "batch": 16, **changes})


def measure(images, weights, **changes):
    return evaluate.evaluate(config(**changes), images, weights, device=CPU)


def embedded(net, x, mean, std):
    """Features image by image."""
    mean, std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    with torch.no_grad():
        return torch.cat([net.eval()(((one / 255 - mean) / std)[None]) for one in x])


def batches_of(c, n, epoch):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch_seed(c.seed, epoch)))
    parts = list(order.split(c.batch))
    if len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def first_layer(c, width):
    torch.manual_seed(c.seed)
    return nn.Linear(width, 3)


def slow_probe(c, x, y):
    """Softmax regression by SGD with momentum, its gradient by hand."""
    fc = first_layer(c, x.shape[1])
    parameters, step = [fc.weight.detach().clone(), fc.bias.detach().clone()], 0
    velocity = [torch.zeros_like(p) for p in parameters]
    steps = c.fit_epochs * len(batches_of(c, len(y), 0))
    for epoch in range(c.fit_epochs):
        for rows in batches_of(c, len(y), epoch):
            error = (x[rows] @ parameters[0].T + parameters[1]).softmax(1) - F.one_hot(y[rows], 3)
            gradient = [error.T @ x[rows] / len(rows), error.mean(0)]
            lr = c.lr if c.schedule == "constant" else c.lr * (1 + math.cos(math.pi * step / steps)) / 2
            for p, v, g in zip(parameters, velocity, gradient, strict=True):
                v.mul_(c.momentum).add_(g + c.weight_decay * p)
                p.sub_(lr * v)
            step += 1
    return parameters


def counted(predicted, y):
    confusion = [[0] * 3 for _ in range(3)]
    for p, t in zip(predicted.tolist(), y.tolist(), strict=True):
        confusion[t][p] += 1
    return confusion


# --- linear probe ---------------------------------------------------------------------------------------------------


RECIPES = [{}, {"schedule": "cosine", "weight_decay": 0.01, "momentum": 0.5, "batch": 32, "seed": 3},
           {"stats": "data"}, {"labels": 0.4, "label_seed": 2, "lr": 0.5}]  # fmt: skip


@pytest.mark.parametrize("changes", RECIPES, ids=str)
def test_linear_probe_is_a_slow_loop(changes, images, weights):
    images = replace(images, mean=(0.3, 0.4, 0.5), std=(0.1, 0.2, 0.3))  # not the run's
    c, net = config(**changes), networks.load(weights)
    stats = (images.mean, images.std) if c.stats == "data" else (net.mean, net.std)
    x, y, test = images.split("train").images, images.split("train").labels, images.split("test")
    rows = subset(97, fraction=c.labels, seed=c.label_seed)
    weight, bias = slow_probe(c, embedded(net, x[rows], *stats), y[rows])
    predicted = (embedded(net, test.images, *stats) @ weight.T + bias).argmax(1)
    record = measure(images, weights, **changes)
    assert record["confusion"] == counted(predicted, test.labels)
    fc = probes.fit(c, y[rows], 3, net.out_features, lambda r, _: embedded(net, x[rows][r], *stats))
    assert torch.allclose(fc.weight, weight, atol=1e-5) and torch.allclose(fc.bias, bias, atol=1e-5)


def test_uncached_features_give_the_same_probe(images, weights):
    c, net, train_set, test = config(), networks.load(weights), images.split("train"), images.split("test")
    stats = net.mean, net.std
    x = embedded(net, train_set.images, *stats)
    cached = probes.fit(c, train_set.labels, 3, net.out_features, lambda rows, _: x[rows])
    uncached = probes.through_network(c, net, train_set.images, train_set.labels, 3, stats)
    assert torch.allclose(uncached[1].weight, cached.weight, atol=1e-5)
    assert torch.allclose(uncached[1].bias, cached.bias, atol=1e-5)
    predicted = evaluate.features(uncached, test.images, stats=stats, device=CPU).argmax(1)
    assert counted(predicted, test.labels) == measure(images, weights)["confusion"]


def test_features_are_those_of_a_loop_whatever_the_batch(images, weights):
    net, x = networks.load(weights), images.split("test").images
    for batch in (1, 7, 1000):
        out = evaluate.features(net, x, stats=(net.mean, net.std), device=CPU, batch=batch)
        assert torch.allclose(out, embedded(net, x, net.mean, net.std), atol=1e-6) and not out.requires_grad


@pytest.mark.parametrize(("n", "keep_last", "sizes"), [
    (500, True, [256, 244]), (500, False, [256]), (512, True, [256, 256]), (257, True, [257]), (513, True, [256, 257]),
    (100, True, [100]), (100, False, [100]), (600, False, [256, 256]),
])  # fmt: skip
def test_number_of_steps(n, keep_last, sizes):
    """500 images at batch 256, 50 epochs: 100 steps with the last batch and 50 without."""
    seen, x, y = [], torch.zeros(n, 2), torch.arange(n) % 3

    def embed(rows, draws):
        seen.append(rows)
        return x[rows]

    probes.fit(EvalConfig(run=RUN, keep_last=keep_last), y, 3, 2, embed)
    assert [len(rows) for rows in seen] == sizes * 50
    first = torch.cat(seen[: len(sizes)])
    assert len(set(first.tolist())) == len(first) == sum(sizes)  # an image once an epoch at most
    assert not torch.equal(first, torch.cat(seen[len(sizes) : 2 * len(sizes)]))


def test_every_seed_and_epoch_has_an_order_of_its_own():
    def order(seed, epoch):
        return tuple(torch.randperm(20, generator=torch.Generator().manual_seed(epoch_seed(seed, epoch))).tolist())

    places = [(s, e) for s in (0, 1, 2, 2**32 - 1) for e in range(50)]
    assert len({order(*p) for p in places}) == len(places) and order(1, 2) == order(1, 2)

    def first_batch(seed):
        rows, y = [], torch.arange(40) % 3
        probes.fit(config(seed=seed, fit_epochs=1), y, 3, 1, lambda r, _: rows.append(r) or torch.zeros(len(r), 1))
        return rows[0].tolist()

    assert first_batch(0) == first_batch(0) != first_batch(1)


def test_a_tail_of_one_joins_the_batch_before():
    assert batches(9, 4, True) == [(0, 4), (4, 9)] and batches(9, 4, False) == [(0, 4), (4, 8)]
    assert batches(10, 4, True) == [(0, 4), (4, 8), (8, 10)] and batches(1, 4, True) == [(0, 1)]


# --- kNN and logistic regression ------------------------------------------------------------------------------------


def slow_knn(x, bank, labels, k, tau):
    out = torch.zeros(len(x), 3)
    for i, q in enumerate(x):
        cosines = sorted(((torch.dot(q, b) / q.norm() / b.norm()).item(), c.item())
                         for b, c in zip(bank, labels, strict=True))[::-1]  # fmt: skip
        for cosine, c in cosines[:k]:
            out[i, c] += math.exp((cosine - cosines[0][0]) / tau)
    return out / out.sum(1, keepdim=True)


def test_knn_of_hand_placed_points():
    degrees = torch.tensor([0.0, 20.0, 24.0, 180.0, 176.0]).deg2rad()
    bank = torch.stack([degrees.cos(), degrees.sin()], 1) * torch.tensor([1.0, 9.0, 0.1, 3.0, 2.0])[:, None]
    labels, x = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([[5.0, 0.0], [-0.01, 0.0], [0.0, 1.0]])

    def vote(k, tau):
        return probes.knn(x, bank, labels, 3, k=k, tau=tau).argmax(1).tolist()

    assert vote(1, 0.1) == [0, 2, 1]  # the nearest alone; lengths do not count
    assert vote(3, 10) == [1, 2, 1]  # a majority
    assert vote(3, 0.01) == vote(99, 0.0005) == [0, 2, 1]  # a low temperature: the nearest again
    scores = probes.knn(x, bank, labels, 3, k=99, tau=0.0005)
    assert scores.isfinite().all() and (scores.max(1).values >= 1).all()


@pytest.mark.parametrize(("k", "tau"), [(1, 0.1), (7, 0.1), (30, 0.5), (500, 0.05)])
def test_knn_is_a_loop(k, tau):
    g = torch.Generator().manual_seed(0)
    x, bank = torch.randn(20, 5, generator=g), torch.randn(30, 5, generator=g)
    labels = torch.randint(0, 3, (30,), generator=g)
    scores = probes.knn(x, bank, labels, 3, k=k, tau=tau)
    assert torch.allclose(scores / scores.sum(1, keepdim=True), slow_knn(x, bank, labels, k, tau), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_features_of_any_type_are_taken(dtype):
    """Float64 counts as it is; what has fewer digits counts as the same numbers in float32, also beside another type."""
    g = torch.Generator().manual_seed(0)
    x, bank = ((3 * torch.randn(n, 5, generator=g)).to(dtype) for n in (20, 30))
    labels, wide = torch.arange(30) % 3, torch.float64 if dtype == torch.float64 else torch.float32
    scores = probes.knn(x, bank, labels, 3, k=7, tau=0.5)
    assert scores.dtype == wide and torch.equal(scores, probes.knn(x.to(wide), bank.to(wide), labels, 3, k=7, tau=0.5))
    assert torch.allclose(scores.float() / scores.float().sum(1, keepdim=True),
                          slow_knn(x.to(wide), bank.to(wide), labels, 7, 0.5), atol=1e-5)
    assert probes.knn(x, bank.double(), labels, 3, k=7, tau=0.5).dtype == torch.float64
    assert torch.equal(probes.logistic(bank, labels, x), probes.logistic(bank.to(wide), labels, x.to(wide)))
    c = config(kind="tsne", perplexity=5.0)
    assert portrait.picture(c, x, bank) == portrait.picture(c, x.to(wide), bank.to(wide))
    found = [pairs.mine(b, k=30, low=-1, high=1, count=9) for b in (bank, bank.to(wide))]
    assert all(torch.equal(own, same) for own, same in zip(*found))


def test_knn_and_logistic_records(images, weights):
    net, train_set, test = networks.load(weights), images.split("train"), images.split("test")
    x, x_test = (embedded(net, s.images, net.mean, net.std) for s in (train_set, test))
    records = []
    for k, tau in ((5, 10), (60, 10), (60, 1e-3)):
        predicted = slow_knn(x_test, x, train_set.labels, k, tau).argmax(1)
        records.append(measure(images, weights, kind="knn", k=k, tau=tau)["confusion"])
        assert records[-1] == counted(predicted, test.labels)
    for C in (1e-3, 1.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
        predicted = model.fit(x.numpy(), train_set.labels.numpy()).predict(x_test.numpy())
        records.append(measure(images, weights, kind="logistic", C=C)["confusion"])
        assert records[-1] == counted(predicted, test.labels)
    assert all(a != b for a, b in pairwise(records))  # k, tau and C are used


# --- fine-tuning and the supervised classifier ----------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"backbone_lr": 0.02, "lr": 0.1, "schedule": "cosine"}], ids=str)
def test_fine_tuning_is_a_plain_loop(changes, images, weights):
    c, train_set = config(kind="finetune", fit_epochs=2, **changes), images.split("train")
    net, y = networks.load(weights), train_set.labels
    stats, mine = (net.mean, net.std), copy.deepcopy(net).train()
    fc = first_layer(c, net.out_features)
    optimizer = torch.optim.SGD([{"params": fc.parameters()}, {"params": mine.parameters(), "lr": c.backbone_lr}],
                                lr=c.lr, momentum=c.momentum)  # fmt: skip
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, c.fit_epochs * len(batches_of(c, len(y), 0)))
    mean, std = (torch.tensor(s)[:, None, None] for s in stats)
    for epoch in range(c.fit_epochs):
        for rows in batches_of(c, len(y), epoch):
            optimizer.zero_grad()
            F.cross_entropy(fc(mine((train_set.images[rows] / 255 - mean) / std)), y[rows]).backward()
            optimizer.step()
            if c.schedule == "cosine":
                decay.step()
    tuned = probes.through_network(c, net, train_set.images, y, 3, stats)
    for (k, a), b in zip(tuned.state_dict().items(), nn.Sequential(mine, fc).state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), k
    assert not tuned.training


@pytest.mark.parametrize("changes", [{"kind": "finetune"}, {"bn": "train"}, {"augment": "simsiam_cifar"}, {}], ids=str)
def test_the_backbone_stays_what_it_was(changes, images, weights, monkeypatch):
    loaded, load, before = [], networks.load, weights.read_bytes()
    monkeypatch.setattr(evaluate, "_recent", {})
    monkeypatch.setattr(networks, "load", lambda path: loaded.append(load(path)) or loaded[-1])
    record = measure(images, weights, **changes)
    assert record["n_train"] == 97 and weights.read_bytes() == before
    for k, v in load(weights).state_dict().items():
        assert torch.equal(loaded[0].state_dict()[k], v), k


def test_a_changed_backbone_is_caught(images, weights, monkeypatch):
    monkeypatch.setattr(evaluate, "_recent", {})
    load = networks.load
    monkeypatch.setattr(networks, "load", lambda path: load(path).train())  # BatchNorm moves: the mistake it guards
    with pytest.raises(SidaeError, match="^The evaluation changed the frozen backbone's .*\\.$"):
        measure(images, weights, kind="knn")
    monkeypatch.setattr(networks, "load", load)
    assert measure(images, weights, kind="knn")["n_test"] == 50  # the changed one is gone


def test_fine_tuning_moves_weights_a_frozen_probe_none_and_bn_train_the_statistics(images, weights):
    def moved(**changes):
        net, split = networks.load(weights), images.split("train")
        model = probes.through_network(config(**changes), net, split.images, split.labels, 3, (net.mean, net.std))
        old = networks.load(weights).state_dict()
        return {k.split(".")[-1] for k, v in model[0].state_dict().items() if not torch.equal(v, old[k])}

    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert moved() == moved(augment="simsiam_cifar") == set()
    assert moved(bn="train") == moved(kind="finetune", backbone_lr=0) == statistics
    assert moved(kind="finetune") == statistics | {"weight", "bias"}


def test_augmented_probe_draws_anew_each_epoch(images, weights):
    plain, augmented = measure(images, weights, lr=0.5), measure(images, weights, lr=0.5, augment="simsiam_cifar")
    assert augmented["confusion"] != plain["confusion"]
    again = measure(images, weights, lr=0.5, augment="simsiam_cifar")
    assert again["confusion"] == augmented["confusion"]
    seen = []
    split = images.split("train")
    probes.fit(config(augment="simsiam_cifar", fit_epochs=2, batch=97), split.labels, 3, 1,
                  lambda rows, draws: seen.append(draws["crop"]) or torch.zeros(len(rows), 1))  # fmt: skip
    assert len(seen) == 2 and not torch.equal(*seen)


def test_classifier_scores_the_runs_own_layer(images, trained):
    net, test = networks.load(trained[SUPERVISED]), images.split("test")
    weight, bias = net.classifier
    predicted = (embedded(net, test.images, net.mean, net.std) @ weight.T + bias).argmax(1)
    record = measure(images, trained[SUPERVISED], run=SUPERVISED, kind="classifier")
    assert record["confusion"] == counted(predicted, test.labels)
    for weights, changes in ((trained[RUN], {}), (trained[SUPERVISED], {"run": SUPERVISED, "data": "another"})):
        with pytest.raises(SidaeError, match="^kind classifier scores a supervised run's own classifier, .*\\.$"):
            measure(images, weights, kind="classifier", **changes)


# --- which images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "n"), [({}, 97), ({"labels": 0.5}, 48), ({"label_count": 30}, 30)])
def test_validation_holds_out_a_fifth_of_the_chosen_labels(changes, n, images):
    chosen, scored = evaluate.labelled(config(**changes), images)
    assert len(chosen) == n and torch.equal(scored, torch.arange(50))
    fit, held = evaluate.labelled(config(score_on="val", **changes), images)
    assert len(held) == round(0.2 * n) and sorted([*fit.tolist(), *held.tolist()]) == chosen.tolist()


def test_no_probe_is_fitted_on_one_class(images, weights):
    """Of three labels of two classes a fifth, rounded to one, is held out: what is left may be of one class."""
    labels, refused = images.split("train").labels, 0
    for seed in range(30):
        c = config(kind="logistic", label_count=3, label_seed=seed, score_on="val")
        chosen = subset(97, count=3, seed=seed)
        fit = chosen[[n not in subset(3, count=1, seed=seed + 1) for n in range(3)]]
        if len(labels[fit].unique()) == 2:
            assert torch.equal(evaluate.labelled(c, images)[0], fit)
            continue
        refused += len(labels[chosen].unique()) > 1
        with pytest.raises(SidaeError, match="^The 3 labels chosen of Colours, less 1 that are held out, are all of one class"):
            measure(images, weights, **{k: v for k, v in c.to_dict().items() if k != "run"})
    assert refused > 2
    with pytest.raises(SidaeError, match="^The 2 labels chosen of Colours, less 1"):
        evaluate.labelled(config(label_count=2, score_on="val"), images)
    lone, run = torch.zeros(50).long(), SUPERVISED.replace(label_count=1)
    with pytest.raises(SidaeError, match="^The 1 labels chosen of Colours are all of one class; "):
        train.training_pairs(run, images, CPU)
    lone[subset(50, count=1)] = 1  # one image of another class: it is fitted on, or not
    test = replace(images, splits=images.splits | {"test": replace(images.split("test"), labels=lone)})
    with pytest.raises(SidaeError, match="^The 40 test labels that score_on part fits on are all of one class; "):
        for seed in range(20):
            measure(test, weights, kind="report", score_on="part", seed=seed)


def test_validation_never_looks_at_the_test_split(images, weights):
    kinds = ("linear", "knn", "logistic", "finetune")
    honest = [measure(images, weights, kind=k, score_on="val") for k in kinds]
    garbage = replace(images, splits=images.splits | {"test": replace(images_of(50, 9), labels=torch.zeros(50).long())})
    for other in (garbage, replace(images, splits={"train": images.split("train")})):
        for k, record in zip(kinds, honest, strict=True):
            again = measure(other, weights, kind=k, score_on="val")
            assert again["confusion"] == record["confusion"] and again["n_test"] == 19 and again["n_train"] == 78


def test_label_subsets_do_not_depend_on_the_run(images):
    other = RunConfig(method="dae", data="colours", seed=5)
    a, b = (evaluate.labelled(EvalConfig(run=r, labels=0.3), images)[0] for r in (RUN, other))
    assert torch.equal(a, b) and torch.equal(a, subset(97, fraction=0.3))
    assert not torch.equal(a, evaluate.labelled(EvalConfig(run=RUN, labels=0.3, label_seed=1), images)[0])


def test_folds(images):
    split, folds = images.split("train"), torch.arange(90).view(10, 9)
    stl = replace(images, splits=images.splits | {"train": replace(split, folds=folds)})
    assert torch.equal(evaluate.labelled(config(fold=3), stl)[0], folds[3])
    assert len(evaluate.labelled(config(), stl)[0]) == 97
    assert set(evaluate.labelled(config(fold=3, label_count=5), stl)[0].tolist()) < set(folds[3].tolist())
    with pytest.raises(SidaeError, match="no predefined folds"):
        evaluate.labelled(config(fold=3), images)


# --- pictures ---------------------------------------------------------------------------------------------------------


def slow_trustworthiness(high, low, k):
    """Venna & Kaski 2001, eq. 1, point by point."""
    n, penalty = len(high), 0
    for i in range(n):
        ranks = {j: r for r, j in enumerate(np.argsort([np.linalg.norm(high[i] - high[j]) for j in range(n)]).tolist())}
        near = [j for j in np.argsort([np.linalg.norm(low[i] - low[j]) for j in range(n)]).tolist() if j != i][:k]
        penalty += sum(max(0, ranks[j] - k) for j in near)
    return 1 - 2 / (n * k * (2 * n - 3 * k - 1)) * penalty


def test_a_picture_holds_what_it_takes_to_draw_it_again(images, weights):
    record = measure(images, weights, kind="tsne", points=30, perplexity=5.0, k=5)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    test, train = images.split("test"), images.split("train")
    points = record["points"]
    assert len(points) == len(set(points)) == 30 and record["labels"] == test.labels[points].tolist()
    net = networks.load(weights)
    z, bank = (embedded(net, s.images, net.mean, net.std) for s in (test, train))
    for name in ("tsne", "pca"):
        xy = np.array(record[name]["xy"])
        assert xy.shape == (30, 2) and abs(xy).max() == 1
        assert record[name]["trustworthiness"] == approx(slow_trustworthiness(z[points].numpy(), xy, 5), abs=0.02)
    for query, near in zip(points, record["neighbours"]):
        cosine = [F.cosine_similarity(z[query], b, dim=0).item() for b in bank]
        assert [cosine[j] for j in near] == approx(sorted(cosine, reverse=True)[:5], abs=1e-5)
    assert record["accuracy"] == measure(images, weights, kind="knn", k=5)["accuracy"]


def test_every_network_shows_the_same_points(images, weights):
    one, other = (measure(images, weights, kind="tsne", points=20, perplexity=5.0, seed=s)["points"] for s in (0, 1))
    assert one == other


@pytest.mark.parametrize("n", [1, 2, 3, 10, 30, 31])
def test_a_map_of_few_points(n):
    """Perplexity and the neighbours of trustworthiness are cut to fit, and the record says to what; where they fit nothing
    changes."""
    g = torch.Generator().manual_seed(n)
    x, bank, k = torch.randn(n, 6, generator=g), torch.randn(4, 6, generator=g), min(5, (n - 1) // 2)
    found = portrait.picture(config(kind="tsne"), x, bank)
    assert json.loads(json.dumps(found, allow_nan=False)) == found and len(found["tsne"]["xy"]) == n
    perplexity = 30.0 if n == 31 else round((n - 1) / 3, 4)
    assert found.get("cut", {}) == ({"perplexity": perplexity} if n < 31 else {}) | ({"trustworthiness": k} if k < 5 else {})
    if n > 1:
        z = x[found["points"]].numpy()
        xy = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(z)
        assert found["tsne"]["xy"] == (xy / np.abs(xy).max()).round(3).tolist()
        assert found["tsne"]["trustworthiness"] == (approx(slow_trustworthiness(z, xy, k), abs=1e-4) if k else None)


def test_a_map_of_equal_images_is_one_place(images, weights):
    """scikit-learn's t-SNE ends the process on them."""
    test = images.split("test")
    equal = replace(images, splits=images.splits | {"test": replace(test, images=test.images[:1].repeat(50, 1, 1, 1))})
    record = measure(equal, weights, kind="tsne", k=5)
    assert json.loads(json.dumps(record, allow_nan=False)) == record and "cut" not in record
    assert all(record[name] == {"xy": [[0.0, 0.0]] * 50, "trustworthiness": None} for name in ("tsne", "pca"))
    assert frames.points([record])["trustworthiness"].isna().all()


# --- the report of few images -----------------------------------------------------------------------------------------


def test_a_report_of_few_labels_is_of_as_many_neighbours_and_components(images, weights):
    record = measure(images, weights, kind="report", features="pca", label_count=20)
    rows, (train_set, test) = subset(97, count=20), map(images.split, ("train", "test"))
    x, x_test = (s.images.flatten(1).numpy() / np.float32(255) for s in (train_set, test))
    model = make_pipeline(PCA(20, random_state=0), KNeighborsClassifier(20)).fit(x[rows], train_set.labels[rows])
    assert record["knn"] == approx(100 * model.score(x_test, test.labels), abs=1e-4)
    assert record["cut"] == {"components": 20, "neighbours": 20}
    assert measure(images, weights, kind="report", label_count=20)["cut"] == {"neighbours": 20}
    assert "cut" not in measure(images, weights, kind="report", features="pca", label_count=32)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_report_on_few_test_images(n, images, weights):
    """Of classes of one image each there is no spread to share out; a part of one image is none."""
    test = images.split("test")
    few = torch.tensor([int((test.labels == c).nonzero()[0]) for c in range(n)])
    images = replace(images, splits=images.splits | {"test": Split(test.images[few], test.labels[few])})
    record = measure(images, weights, kind="report")
    assert json.loads(json.dumps(record, allow_nan=False)) == record and record["radial"] is None
    with pytest.raises(SidaeError, match="test labels .* are all of one class" if n < 3 else "^$"):
        measure(images, weights, kind="report", score_on="part")
        raise SidaeError("")


def test_a_report_on_nearly_equal_features():
    """Of cosines that float32 hardly tells apart a histogram is made all the same, of every pair."""
    y = torch.arange(40) % 3
    z = torch.ones(40, 4)
    z[::2, 0] += 3e-4
    *_, out = portrait.student_report(config(kind="report"), torch.eye(4)[y], y, z, y)
    assert sum(out["cosine"]["same"]) + sum(out["cosine"]["different"]) == 40 * 39 / 2


@pytest.mark.parametrize(("backbone", "parts"), [("resnet18", [1025]), ("small_cnn", [1024, 1])])
def test_in_train_mode_an_image_is_left_alone_only_where_batchnorm_can_take_it(backbone, parts, images, tmp_path):
    """The last of 1,025 images joins those before where a map has one place: there one image has no spread. Where there is
    but one image, one sentence says so."""
    run = RUN.replace(method="untrained", epochs=0, backbone=backbone, dim=2048, hidden=2048, pred_hidden=512,
                      width=4 if backbone == "resnet18" else 64)  # fmt: skip
    train.Run(run, images, CPU).save_backbone(tmp_path, 0)
    test = images.split("test")
    many = replace(images, splits=images.splits | {"test": Split(*(t.repeat(21, *[1] * (t.ndim - 1))[:1025] for t in (
        test.images, test.labels)))})  # fmt: skip
    c = EvalConfig(run=run, kind="knn", bn="train", k=5)
    record = evaluate.evaluate(c, many, tmp_path / "backbone-e000.safetensors", device=CPU)
    net = networks.load(tmp_path / "backbone-e000.safetensors")

    def embed(x, parts):
        mean, std = (torch.tensor(s)[:, None, None] for s in (net.mean, net.std))
        with torch.no_grad():
            return torch.cat([copy.deepcopy(net).train()((part / 255 - mean) / std) for part in x.split(parts)])

    z, bank = embed(many.split("test").images, parts), embed(images.split("train").images, [97])
    predicted = probes.knn(z, bank, images.split("train").labels, 3, k=5, tau=0.1).argmax(1)
    assert record["confusion"] == counted(predicted, many.split("test").labels)
    alone = replace(images, splits=images.splits | {"test": Split(test.images[:1], test.labels[:1])})
    with pytest.raises(SidaeError, match="^bn train needs more than 1 image of Colours" if backbone == "resnet18" else "^$"):
        evaluate.evaluate(c, alone, tmp_path / "backbone-e000.safetensors", device=CPU)
        raise SidaeError("")


# --- records and errors ---------------------------------------------------------------------------------------------


def test_record(images, weights):
    c = config(labels=0.5)
    record = evaluate.evaluate(c, images, weights, device=CPU)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["key"] == c.key() and record["run_key"] == RUN.key() and EvalConfig.from_dict(record["config"]) == c
    confusion, labels = np.array(record["confusion"]), images.split("test").labels
    assert confusion.sum(1).tolist() == labels.bincount().tolist()  # rows are the true classes
    assert record["accuracy"] == approx(100 * confusion.trace() / 50, abs=1e-4)
    assert record["per_class"] == approx((100 * confusion.diagonal() / confusion.sum(1)).tolist(), abs=1e-4)
    assert (record["n_train"], record["n_test"], record["epoch"], record["kind"]) == (48, 50, 3, "linear")
    assert record["classes"] == ["red", "green", "blue"] and record["data"]["display"] == "Colours"


def test_the_matrix_is_read_however_it_is_held(images, weights):
    """Rows, as of every set of few classes and of any in older records; or the entries that are not zero."""
    rows = measure(images, weights, kind="knn", k=20)
    assert evaluate.confusion(rows).tolist() == rows["confusion"] and len(rows["confusion"]) == 3 < 100 < evaluate.DENSE
    many, n = {"classes": list(map(str, range(300)))}, torch.randint(3, (300, 300), generator=torch.manual_seed(0))
    entries = [[i, j, int(n[i, j])] for i in range(300) for j in range(300) if n[i, j]]
    for held in (n.tolist(), entries):
        assert evaluate.confusion(many | {"confusion": held}).tolist() == n.tolist()


def test_colours_are_told_apart(images, weights):
    for kind in ("linear", "knn", "logistic", "finetune"):
        assert measure(images, weights, kind=kind, fit_epochs=50, lr=0.5, k=5)["accuracy"] > 90, kind


@pytest.mark.parametrize("kind", ["knn", "report"])
def test_a_class_that_the_test_split_lacks_has_no_accuracy(kind, images, weights):
    """Nothing of nothing is not 0 %: null in the record, a gap in the table, and left out of a mean over classes."""
    test = images.split("test")
    two = Split(test.images[test.labels < 2], test.labels[test.labels < 2])
    record = measure(replace(images, splits=images.splits | {"test": two}), weights, kind=kind)
    assert record["confusion"][2] == [0, 0, 0] and record["per_class"][2] is None and None not in record["per_class"][:2]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    if kind == "report":
        frame = frames.evaluations([record])
        assert frame["accuracy"].dtype == float and frame["accuracy"][frame["metric"] == "blue"].isna().all()
        classes = frames.summary(frame).set_index("metric").loc[["red", "green", "blue"], ["mean", "n"]]
        assert classes["n"].tolist() == [1, 1, 0] and classes["mean"].tolist()[:2] == record["per_class"][:2]
        whole = frame["metric"] == "accuracy"
        mean = differences.between(frame[frame["metric"].isin(["red", "green", "blue"])], frame[whole])
        assert mean.seeds.tolist() == approx([sum(record["per_class"][:2]) / 2 - record["accuracy"]])


def unlabelled(images, name):
    return replace(images, splits=images.splits | {name: replace(images.split(name), labels=None)})


def one_class(images):
    return replace(images, splits=images.splits | {"train": replace(images.split("train"), labels=torch.ones(97).long())})


BAD = {
    "kind": ({"kind": "svm"}, lambda i: i, "Unknown kind 'svm'; choose from linear, logistic, knn"),
    "augment": ({"augment": "fog"}, lambda i: i, "Unknown augmentation 'fog'"),
    "no image": ({"labels": 0.005}, lambda i: i, "leaves none"),
    "too many": ({"label_count": 98}, lambda i: i, "Cannot draw 98 of 97"),
    "one image": ({"label_count": 1}, lambda i: i, "all of one class"),
    "one class": ({}, one_class, "The 97 labels chosen of Colours are all of one class"),
    "no train labels": ({}, lambda i: unlabelled(i, "train"), "The train split of Colours has no labels"),
    "no test labels": ({}, lambda i: unlabelled(i, "test"), "The test split of Colours has no labels"),
    "no test split": ({}, lambda i: replace(i, splits={"train": i.split("train")}), "no split 'test'"),
}


@pytest.mark.parametrize("kind", ["linear", "logistic", "knn", "finetune"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, kind, images, weights):
    changes, change, text = BAD[name]
    with pytest.raises(SidaeError) as error:
        measure(change(images), weights, **{"kind": kind, **changes})
    message = str(error.value)
    assert text in message and "\n" not in message and message.endswith(".")


@pytest.fixture
def seen(monkeypatch) -> list:
    """Numbers of images whose features are computed, and paths of the weights that are read, from an empty cache on."""
    seen, features, load = [], evaluate.features, networks.load
    monkeypatch.setattr(evaluate, "_recent", {})
    monkeypatch.setattr(evaluate, "features", lambda net, x, **more: seen.append(len(x)) or features(net, x, **more))
    monkeypatch.setattr(networks, "load", lambda path: seen.append(path) or load(path))
    return seen


def test_features_are_computed_once_per_checkpoint_and_set(images, weights, trained, seen):
    """Three probes meet two sets of pixels; other labels, other weights or other pixels are computed for themselves."""
    for kind in ("linear", "logistic", "knn"):
        measure(images, weights, kind=kind)
    assert seen == [weights, 97, 50]
    measure(images, weights, kind="knn", labels=0.5)
    assert seen[3:] == [48]
    measure(images, trained[SUPERVISED], kind="knn")
    assert seen[4] == trained[SUPERVISED] and sorted(seen[5:]) == [50, 97]
    darker = Images(**{**vars(images), "splits": images.splits | {"test": Split(images.splits["test"].images // 2,
                                                                                images.splits["test"].labels)}})
    for same in (darker, images, darker):
        measure(same, trained[SUPERVISED], kind="knn")
    assert seen[7:] == [50]
    darker.splits["test"].images.mul_(2)  # in place
    measure(darker, trained[SUPERVISED], kind="knn")
    assert seen[8:] == [50]


def test_weights_that_are_written_anew_are_read_anew(images, tmp_path, seen):
    """A file of the same name and size, written in place or put in its place, gives the record of its own weights."""
    contents, path = [], tmp_path / "backbone-e003.safetensors"
    for seed in (1, 2):
        train.Run(RUN.replace(seed=seed), images, CPU).save_backbone(tmp_path, 3)
        contents.append(path.read_bytes())
    (old, new), records = contents, []
    assert len(old) == len(new) and old != new
    for content in (old, new, old):
        path.write_bytes(content)
        records.append(measure(images, path, kind="knn"))
        assert records[-1]["backbone"] == hashlib.sha256(content).hexdigest()
    assert records[0]["confusion"] == records[2]["confusion"] != records[1]["confusion"]
    other = tmp_path / "other"
    other.write_bytes(new)
    other.replace(path)
    assert measure(images, path, kind="knn")["backbone"] == hashlib.sha256(new).hexdigest()
    assert seen.count(path) == 4 and [n for n in seen if n != path] == [50, 97] * 4
    path.unlink()
    with pytest.raises(SidaeError, match="^There is no file"):
        measure(images, path, kind="knn")


def test_off_a_cpu_a_subset_takes_its_features_from_those_of_all(images, weights, seen):
    """And is computed alone where those are not there; the copies held are few."""
    shared, x, stats = evaluate.Frozen(weights, CPU), images.split("train").images, ([0.5] * 3, [0.2] * 3)
    every, some = torch.arange(97), torch.tensor([3, 5, 40])
    shared.device = torch.device("meta")
    shared.net.to("meta")
    assert shared.features(x, some, stats).shape == (3, shared.net.out_features) and seen[1:] == [3]
    whole = torch.arange(97.0 * 32).view(97, 32)
    shared.features(x, every, stats)
    [key] = [k for k in shared.made if k[3] == b""]
    shared.made[key] = x, whole
    assert seen[1:] == [3, 97] and torch.equal(shared.features(x, some.flip(0), stats), whole[[40, 5, 3]]) and seen[3:] == []
    for n in range(9):
        shared.features(images.split("test").images, torch.tensor([n]), stats)
    assert len(shared.made) == 4


def test_features_are_full_float32(images, weights, monkeypatch):
    """On a GPU neither convolutions nor products take TF32 within; afterwards they are as they were."""
    cudnn, found = torch.backends.cudnn, []

    def net(x):
        found.append((cudnn.allow_tf32, cudnn.benchmark, torch.get_float32_matmul_precision()))
        return x.flatten(1)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    torch.set_float32_matmul_precision("high")
    try:
        before = cudnn.allow_tf32
        evaluate.features(net, images.split("test").images, stats=((0.0,), (1.0,)), device=CPU)
        assert found == [(False, False, "highest")]
        assert (cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (before, "high")
    finally:
        torch.set_float32_matmul_precision("highest")


# --- probes side by side, repeats, and what a record says of every image --------------------------------------------


def mixture(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, 16) and labels of five classes that overlap."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 5, (n,), generator=g)
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(9))[y] + 0.7 * torch.randn(n, 16, generator=g), y


@pytest.mark.parametrize(("n", "changes"), [
    (300, {}), (300, {"schedule": "cosine"}), (300, {"keep_last": False}), (257, {"weight_decay": 0.01, "momentum": 0.5}),
    (40, {"lr": 0.2}),
])  # fmt: skip
def test_probes_side_by_side_are_probes_one_by_one(n, changes):
    """Of several seeds, with a short last batch, one of one more, one alone: the weights of each within 1e-5, and its
    predictions."""
    (x, y), (test, _) = mixture(n, 0), mixture(2000, 1)
    config = EvalConfig(run=RUN, fit_epochs=5, batch=64, repeats=3, seed=4, **changes)
    alone = probes.repeated(config, x, y, 5)
    together = probes.side_by_side(config, x, y, 5, [4, 1004, 2004])
    for (weight, bias), (own, own_bias) in zip(together, alone, strict=True):
        torch.testing.assert_close(weight, own.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(bias, own_bias.detach(), atol=1e-5, rtol=1e-5)
        same = (test @ weight.T + bias).argmax(1) == (test @ own.T + own_bias).argmax(1)
        assert same.double().mean() >= 0.999
    assert not torch.allclose(together[0][0], together[1][0], atol=1e-2)  # other seeds, other probes


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_an_epoch_of_probes_asks_the_device_for_nothing(device, monkeypatch):
    """`meta` has no values to ask for; a GPU that is made believe meets no tensor of the CPU."""
    found, launches = [], []

    class Watched(probes.Captured):
        def __init__(self, function, _):
            super().__init__(function, CPU)

        def __call__(self):
            with Waits(device) as waits:
                super().__call__()
            found.extend(waits.found)
            launches.append(self)

    monkeypatch.setattr(probes, "Captured", Watched)
    monkeypatch.setattr(probes, "CAPTURE_FROM", 0)
    monkeypatch.setattr(networks, "sent", lambda x, device: x.to(device))
    config = EvalConfig(run=RUN, fit_epochs=2, batch=64, repeats=2, weight_decay=0.1, schedule="cosine")
    with FakeTensorMode() if device == "cuda" else nullcontext():
        found_ = probes.side_by_side(config, *(t.to(device) for t in mixture(300, 0)), 5, [0, 1000])
    assert found == [] and len(launches) == 2 and len(set(launches)) == 1
    assert all(t.device.type == device for probe in found_ for t in probe)


def test_repeats_are_probes_of_other_seeds(images, weights):
    """The accuracy is the mean of the list, the first of it is the single probe, the last what its own seed gives alone."""
    single = measure(images, weights, fit_epochs=2)
    record = measure(images, weights, fit_epochs=2, repeats=3)
    assert record["each"][0] == single["accuracy"] and len(record["each"]) == 3 and "each" not in single
    assert record["each"][2] == measure(images, weights, fit_epochs=2, seed=2000)["accuracy"]
    assert record["accuracy"] == pytest.approx(sum(record["each"]) / 3, abs=1e-3)
    assert sum(map(sum, record["confusion"])) == 3 * record["n_test"]
    with pytest.raises(SidaeError, match="repeats is for kind linear on cached features, at most 255, not 2 of knn"):
        EvalConfig(run=RUN, kind="knn", repeats=2)


def test_a_record_says_of_every_image_how_often_it_was_right(images, weights):
    record = measure(images, weights, fit_epochs=2, repeats=3)
    right = evaluate.how_often_right(record)
    assert len(right) == record["n_test"] and right.max() <= 3
    assert 100 * right.mean() / 3 == pytest.approx(record["accuracy"], abs=1e-3)
    labels = images.split("test").labels
    for c, row in enumerate(record["confusion"]):
        assert right[(labels == c).numpy()].sum() == row[c]
    assert len(record["right"]) <= 5000
    assert "right" not in measure(images, weights, fit_epochs=2, score_on="val")  # it is no test image


def test_a_record_names_its_backbone(images, weights):
    assert measure(images, weights, kind="knn")["backbone"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_logistic_regression_is_scikit_learns():
    """Same predictions on 99.9 % of test images, on three real feature sets (pixels, components, an untrained network), of
    two classes too, with constant features, strong and weak penalty. At its default tolerance scikit-learn stops short of
    the optimum, so here it goes on, in float64."""
    digits, photos = data.load("digits"), data.load("photos")
    net = networks.backbone(experiments.run("untrained", "photos", "quick")).eval()
    for images, features in ((digits, "pixels"), (digits, "components"), (photos, "pixels"), (photos, "network")):
        y, both = images.split("train").labels[::4], (images.split("train").images[::4], images.split("test").images)
        x, x_test = (pixels[:, :, ::4, ::4].flatten(1).float() for pixels in both)
        if features == "components":
            pca = PCA(20, random_state=0).fit(x.numpy())
            x, x_test = (torch.from_numpy(pca.transform(v.numpy())) for v in (x, x_test))
        if features == "network":
            x, x_test = (networks.features(net, pixels, stats=(images.mean, images.std), device=torch.device("cpu"))
                         for pixels in both)  # fmt: skip
        for C in (0.01, 1.0) if features == "pixels" else (1.0,):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-6, max_iter=10_000))
            model.fit(x.double().numpy(), y.numpy())
            theirs = torch.from_numpy(model.predict(x_test.double().numpy()))
            ours = probes.logistic(x, y, x_test, C)
            assert (ours == theirs).double().mean() >= 0.999, (images.name, features, C)
