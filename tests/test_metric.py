"""Pairwise and triplet learning: the losses, the lists of pairs, the student report's loop, and its measurements."""

import ast
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from sklearn.linear_model import LogisticRegression
from torchvision.transforms.v2 import functional as TF

from sidae_lib import augment, claims, data, evaluate, experiments, methods, networks, portrait, train
from sidae_lib.config import EvalConfig, RunConfig, SidaeError, epoch_seed
from sidae_lib.losses import cosine_embedding, triplet
from sidae_lib.methods import metric
from sidae_lib.methods.metric import negatives
from sidae_lib.step import batches

CPU = torch.device("cpu")
LOSSES = ("pairwise", "triplet")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(method="triplet", **changes):
    return RunConfig.create(**{
        "method": method, "data": data.identify("digits"), "backbone": "small_cnn", "channels": 1, "size": 28,
        "augment": "report_simclr", "stats": "half", "per_class": 9, "batch": 32, "epochs": 2, "lr": 0.1, "momentum": 0.0,
        "weight_decay": 0.0, "schedule": "constant", "redraw": False, **changes})


def digits(c):
    return data.by_fingerprint(c.data, size=c.size, channels=c.channels)


def test_cosine_embedding_closed_form():
    e, yes, no = torch.eye(4, 8), torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    assert cosine_embedding(e, 3 * e, yes).item() == approx(0) and cosine_embedding(e, -e, yes).item() == approx(2)
    assert cosine_embedding(e, e.roll(1, 0), yes).item() == approx(1)
    assert cosine_embedding(e, e, no).item() == approx(1) and cosine_embedding(e, e, no, 0.3).item() == approx(0.7)
    assert cosine_embedding(e, -e, no).item() == cosine_embedding(e, e.roll(1, 0), no, 0.3).item() == 0
    half = torch.tensor([True, True, False, False])
    assert cosine_embedding(e, e, half).item() == approx(0.5)  # a mean over all pairs


def test_triplet_closed_form():
    a, far = torch.zeros(3, 4), torch.full((3, 4), 2.0)  # 4 apart
    assert triplet(a, a, far).item() == triplet(a, a, far, 3.9).item() == 0
    assert triplet(a, a, far, 5).item() == approx(1, abs=1e-4) and triplet(a, far, a).item() == approx(5, abs=1e-4)
    assert triplet(far, far, far, 0.3).item() == approx(0.3, abs=1e-5)
    e = torch.eye(3, 4)
    assert triplet(e, 2 * e, e.roll(1, 0), 1, "cosine").item() == approx(0, abs=1e-6)
    assert triplet(e, e.roll(1, 0), 2 * e, 1, "cosine").item() == approx(2)


@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_losses_are_loops(margin):
    a, b, n = (noise(6, 5, seed=s).tolist() for s in range(3))
    same = [True, False, True, False, False, True]

    def cosine(u, v):
        return sum(x * y for x, y in zip(u, v)) / math.hypot(*u) / math.hypot(*v)

    slow = [1 - cosine(u, v) if s else max(0, cosine(u, v) - margin) for u, v, s in zip(a, b, same)]
    got = cosine_embedding(torch.tensor(a), torch.tensor(b), torch.tensor(same), margin)
    assert got.item() == approx(sum(slow) / 6, rel=1e-5)
    for name, d in (("euclidean", math.dist), ("cosine", lambda u, v: 1 - cosine(u, v))):
        slow = [max(0, margin + d(u, p) - d(u, m)) for u, p, m in zip(a, b, n)]
        got = triplet(*map(torch.tensor, (a, b, n)), margin, name)
        assert got.item() == approx(sum(slow) / 6, rel=1e-4) and got > 0


def test_triplet_by_cosine_is_the_pairwise_loss_twice():
    """With values in (0, 1), as behind a sigmoid, no cosine is negative: what tells the two losses apart is the distance."""
    a, p, n = (noise(64, 32, seed=s).sigmoid() for s in range(3))
    same = torch.arange(128) < 64
    both = cosine_embedding(torch.cat([a, a]), torch.cat([p, n]), same)
    assert triplet(a, p, n, 1.0, "cosine").item() == approx(2 * both.item(), rel=1e-5)
    assert triplet(a, p, n, 0.2, "cosine").item() != approx(2 * both.item(), rel=1e-2)


def test_negatives_are_of_another_class_and_spread():
    labels = torch.arange(10).repeat(30)
    i = torch.arange(250)
    n = negatives(config(), i, labels)
    assert (labels[i] != labels[n]).all() and len(set(n.tolist())) > 100
    for c in range(10):
        own = n[labels[i] == c]
        assert len(own.unique()) == len(own) and len(labels[own].unique()) >= 8  # none twice, all other classes
    assert torch.equal(n, negatives(config(lr=1), i, labels)) and not torch.equal(n, negatives(config(seed=1), i, labels))
    two = torch.tensor([0] * 10 + [1] * 3)
    few = negatives(config(), torch.arange(13), two)  # fewer others than anchors: taken in turn
    assert (two[few] != two).all() and few[:10].bincount(minlength=13)[10:].min() >= 3


def test_label_free_negatives_are_false_as_often_as_chance():
    labels = torch.arange(10).repeat(3000)
    i = torch.arange(30_000)
    n = negatives(config(negatives="any"), i, labels)
    assert (n != i).all() and 0 <= n.min() and n.max() < 30_000
    assert (labels[n] == labels).float().mean().item() == approx(2999 / 29_999, abs=0.006)  # 3.5 standard errors


@pytest.mark.parametrize("method", LOSSES)
def test_the_lists_are_the_reports(method):
    c = config(method, per_class=5)
    pairs, labels = train.training_pairs(c, digits(c), CPU)[0], digits(c).split("train").labels
    first = torch.cat([torch.tensor([k for k, y in enumerate(labels.tolist()) if y == d][:5]) for d in range(10)])
    n = negatives(c, first, labels)
    if method == "triplet":
        assert torch.equal(pairs, torch.stack([first, first, n], 1))
    else:
        assert torch.equal(pairs[:50], torch.stack([first, first], 1)) and torch.equal(pairs[50:], torch.stack([first, n], 1))
    assert len(train.training_pairs(c.replace(per_class=0), digits(c), CPU)[0]) == 1437 * (1 if method == "triplet" else 2)


def test_490_updates_of_each_loss():
    rows = {"pairwise": 100_000, "triplet": 50_000}
    for method, own in metric.LOSSES.items():
        assert methods.METHODS[method].labels  # the last, partial batch is kept
        assert len(batches(rows[method], 1024, True)) * own["epochs"] == 490


def reference(c):
    """The report's code: positives made once, pairs or triples as tensors, a call per input; SGD with momentum and a cosine
    rate, which the report has not, so that a step too many or too few shows."""
    images = digits(c).split("train")
    pairs = train.training_pairs(c, digits(c), CPU)[0]
    torch.manual_seed(c.seed)
    net = methods.build(c).backbone.to(memory_format=torch.channels_last).train()
    initial = {k: v.clone() for k, v in net.named_parameters()}
    _, draws = augment.VIEWS[c.augment].draw(len(pairs), c.size, torch.Generator().manual_seed(epoch_seed(c.seed, -2)))
    half = torch.tensor([0.5])
    positive = augment.apply(augment.VIEWS[c.augment].second, images.images[pairs[:, 0]], draws, half, half)
    clean = images.images / 127.5 - 1
    anchor, other = clean[pairs[:, 0]], clean[pairs[:, -1]]
    same, losses = pairs[:, 0] == pairs[:, 1], []
    velocity, steps = [torch.zeros_like(p) for p in net.parameters()], c.epochs * -(-len(pairs) // c.batch)
    for epoch in range(c.epochs):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(epoch_seed(c.seed, epoch)))
        for rows in order.split(c.batch):
            if c.method == "triplet":
                loss = torch.nn.TripletMarginLoss(c.margin)(net(anchor[rows]), net(positive[rows]), net(other[rows]))
            else:
                second = torch.stack([positive[r] if same[r] else other[r] for r in rows])
                y = torch.tensor([1 if same[r] else -1 for r in rows])
                loss = torch.nn.CosineEmbeddingLoss(c.cos_margin)(net(anchor[rows]), net(second), y)
            net.zero_grad()
            loss.backward()
            rate = c.lr * (1 + math.cos(math.pi * len(losses) / steps)) / 2
            losses.append(loss.item() * len(rows))
            with torch.no_grad():
                for p, v in zip(net.parameters(), velocity):
                    p -= rate * v.mul_(c.momentum).add_(p.grad)
    return net, initial, [sum(part) / len(pairs) for part in np.array_split(losses, c.epochs)]


@pytest.mark.parametrize("method", LOSSES)
def test_the_loop_is_the_reports(method, tmp_path):
    c = config(method, lr=0.1, momentum=0.9, schedule="cosine")
    assert len(train.training_pairs(c, digits(c), CPU)[0]) % c.batch  # a partial batch is there, and kept
    net, initial, losses = reference(c)
    record = train.pretrain(c, digits(c), tmp_path, device=CPU)
    assert [e["loss"] for e in record["epochs"]] == approx(losses, rel=1e-4)
    trained = networks.load(tmp_path / "backbone-e002.safetensors")
    assert (trained.mean, trained.std) == ([0.5], [0.5])
    for (name, p), q in zip(net.named_parameters(), trained.parameters()):
        assert (q - p).norm() < 0.02 * (p - initial[name]).norm(), name
    for (name, p), q in zip(net.named_buffers(), trained.buffers()):  # BatchNorm of each call, in order
        assert torch.allclose(q.float(), p.float(), rtol=1e-3, atol=1e-5), name


def test_redraw(tmp_path):
    """Once: a pair's parameters are those of every epoch; else they are new."""
    for redraw in (True, False):
        run = train.Run(config(redraw=redraw), digits(config()), CPU)
        found = []
        for epoch in range(2):
            pairs, _, second = run.draw(epoch)
            found.append({tuple(p): float(s) for p, s in zip(pairs.tolist(), second["blur"])})
        assert found[0].keys() == found[1].keys() and list(found[0]) != list(found[1])
        equal = [found[0][k] == found[1][k] for k in found[0]]
        assert not any(equal) if redraw else all(equal)


@pytest.mark.parametrize("method", LOSSES)
def test_batch_norm_sees_each_input_alone_or_all(method):
    views, xn = (noise(8, 1, 28, 28), noise(8, 1, 28, 28, seed=1)), noise(8, 1, 28, 28, seed=2)
    seen = {}
    for how in ("each", "joint"):
        torch.manual_seed(0)
        m = methods.build(config(method, batch_norm=how))
        inputs = []
        m.backbone.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(len(args[0])))
        batch = {"i": torch.arange(8), "j": torch.arange(8) % 6, "x2": xn, "xn": xn}
        out = m.loss(views, batch)
        count = 2 if method == "pairwise" else 3
        assert inputs == ([8] * count if how == "each" else [8 * count])
        seen[how] = out["loss"].item()
        assert out["z"].shape == (8, 32) and not out["z"].requires_grad
    assert seen["each"] != seen["joint"]


@pytest.mark.slow
@pytest.mark.parametrize("method, mode", [("pairwise", "views"), ("triplet", "step")])  # a minute for each pair more
def test_compiled_modes_equal_eager(method, mode):
    losses = {}
    for m in ("eager", mode):
        run = train.Run(config(method), digits(config()), CPU)
        run.set_mode(m)
        drawn = run.draw(0)
        for a, b in run.bounds:
            run.advance(drawn, a, b)
        losses[m] = run.sums["loss"].item()
    assert losses[mode] == approx(losses["eager"], rel=1e-4)


def test_linear_embedding_is_the_logit():
    x = noise(4, 1, 28, 28)
    torch.manual_seed(0)
    squashed = networks.backbone(config()).eval()
    plain = networks.backbone(config(embed="linear")).eval()
    plain.load_state_dict(squashed.state_dict())
    assert torch.allclose(plain(x).sigmoid(), squashed(x), atol=1e-6) and plain(x).min() < 0


@pytest.mark.parametrize("channels, size", [(1, 28), (3, 32)])
def test_report_simclr_is_torchvisions_list_in_order(channels, size):
    views, n = augment.VIEWS["report_simclr"], 60
    x = torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    anchor, params = views.draw(n, size, torch.Generator().manual_seed(0))
    assert anchor == {} and views.first == ()
    g = torch.Generator().manual_seed(0)
    views.second[0].draw(n, size, g), views.second[1].draw(n, size, g)
    factors, order = augment.ColorJitter(0.8, 0.8, 0.8, 0.2).sample(n, g)
    ops = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    out = []
    for k in range(n):
        image = TF.resized_crop(x[k] / 255, *params["crop"][k].tolist(), [size, size], antialias=True)
        image = TF.horizontal_flip(image) if params["flip"][k] else image
        for o in order[k].tolist():
            image = ops[o](image, factors[k, o].item())
        image = TF.rgb_to_grayscale(image, channels) if params["grey"][k] else image
        out.append(TF.gaussian_blur(image, [3, 3], [params["blur"][k].item()] * 2))
    got = augment.apply(views.second, x, params, torch.zeros(channels), torch.ones(channels))
    assert torch.allclose(got, torch.stack(out), atol=1e-4, rtol=0)
    many = views.draw(5000, size, torch.Generator().manual_seed(2))[1]
    assert many["blur"].min() >= 0.1 and many["blur"].max() <= 2  # always blurred
    area = (many["crop"][:, 2] * many["crop"][:, 3]).float() / size**2
    assert 0.06 < area.min() < 0.11 and area.max() > 0.97


def test_only_the_positive_is_augmented_unless_the_anchor_is_asked_for():
    for name in ("none", "report_fer", "report_simclr"):
        assert augment.VIEWS[name].first == ()
    assert augment.VIEWS["report_fer"].second == augment.VIEWS["fer"].first
    assert augment.VIEWS["report_simclr_anchors"].first == augment.VIEWS["report_simclr"].second


def features_of(n=300, seed=0):
    y = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed))
    return noise(4, 6, seed=9)[y] + noise(n, 6, seed=seed), y


def measure(**how):
    (x, y), (test, y_test) = features_of(), features_of(seed=1)
    c = EvalConfig(run=config(), kind="report", **how)
    return portrait.student_report(c, x, y, test, y_test), (x, y, test, y_test)


def slow_knn(bank, y, x):
    """30 nearest by Euclidean distance, one vote each, ties to the smaller label."""
    out = []
    for row in x:
        near = sorted(range(len(bank)), key=lambda k: math.dist(bank[k], row))[:30]
        votes = [sum(int(y[k]) == c for k in near) for c in range(4)]
        out.append(votes.index(max(votes)))
    return np.array(out)


def test_fixed_fits_on_train_and_scores_the_whole_test_split():
    (predicted, truth, fitted, out), (x, y, test, y_test) = measure()
    assert torch.equal(truth, y_test) and torch.equal(fitted, y)
    mean, std = x.mean(0), x.std(0, correction=0)
    model = LogisticRegression(max_iter=1000).fit((x - mean) / std, y)
    assert (predicted.numpy() == model.predict((test - mean) / std)).mean() > 0.99
    scores = model.predict_proba((test - mean) / std)
    top3 = np.mean([sum(s > row[t] for s in row) < 3 for row, t in zip(scores, y_test)])
    assert out["top3"] == approx(100 * top3, abs=0.4)
    assert out["knn"] == approx(100 * np.mean(slow_knn(x.numpy(), y, test.numpy()) == y_test.numpy()), abs=0.4)


def test_part_fits_on_four_fifths_of_the_test_split_as_they_are():
    (predicted, truth, fitted, out), (_, _, test, y_test) = measure(score_on="part", seed=3)
    assert len(truth) == 60 and len(fitted) == 240
    assert torch.equal(torch.cat([truth, fitted]).bincount(), y_test.bincount())  # a partition
    again, other = (measure(score_on="part", seed=s)[0][1] for s in (3, 4))
    assert torch.equal(again, truth) and not torch.equal(other, truth)
    assert len(measure(score_on="part", seed=2**32 - 1)[0][1]) == 60  # whose next, of top-3's own split, is 0
    small = EvalConfig(run=config(), kind="report", score_on="part", seed=3)
    shrunk = portrait.student_report(small, test[:0], y_test[:0], test / 1000, y_test)  # not standardised: the penalty bites
    assert (shrunk[0] == truth).float().mean() < (predicted == truth).float().mean() and shrunk[3]["knn"] == out["knn"]


def test_histograms_are_counts_over_all_pairs():
    (*_, out), (_, _, test, y_test) = measure()
    same = different = 0
    for i in range(300):
        for j in range(i + 1, 300):
            same, different = same + bool(y_test[i] == y_test[j]), different + bool(y_test[i] != y_test[j])
    for name in ("cosine", "distance"):
        h = out[name]
        assert len(h["edges"]) == 41 and (sum(h["same"]), sum(h["different"])) == (same, different)
    middle = {k: [(a + b) / 2 for a, b in zip(out[k]["edges"], out[k]["edges"][1:])] for k in ("cosine", "distance")}
    pairs = [(i, j) for i in range(300) for j in range(i + 1, 300) if y_test[i] == y_test[j]]
    exact = {"cosine": np.mean([F.cosine_similarity(test[i], test[j], dim=0).item() for i, j in pairs[:2000]]),
             "distance": np.mean([math.dist(test[i], test[j]) for i, j in pairs[:2000]])}
    for k, value in exact.items():
        assert np.average(middle[k], weights=out[k]["same"]) == approx(value, abs=0.15)


def test_radial_tells_rays_from_spheres():
    _, y = features_of()
    direction = F.normalize(noise(4, 6, seed=9), dim=1)[y]
    rays = direction * (1 + torch.rand(300, 1, generator=torch.Generator().manual_seed(0)))
    c = EvalConfig(run=config(), kind="report")
    assert portrait.student_report(c, rays, y, rays, y)[3]["radial"] == approx(1, abs=1e-4)
    ball = 20 * direction + noise(300, 6)
    assert portrait.student_report(c, ball, y, ball, y)[3]["radial"] == approx(1 / 6, abs=0.04)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    c, folder = config(), tmp_path_factory.mktemp("run")
    train.pretrain(c, digits(c), folder, device=CPU)
    return folder / "backbone-e002.safetensors"


def test_train_mode_looks_at_test_batches_and_leaves_the_backbone(weights, monkeypatch):
    c = EvalConfig(run=config(), kind="report", score_on="part", bn="train")
    images, seen, report = digits(config()), [], portrait.student_report
    monkeypatch.setattr(portrait, "student_report", lambda *args: seen.append(args) or report(*args))
    record = evaluate.evaluate(c, images, weights, device=CPU)
    _, _, _, z, y = seen[0]
    order = torch.randperm(360, generator=torch.Generator().manual_seed(0))
    x = images.split("test").images[order] / 127.5 - 1
    net = networks.load(weights).train()
    with torch.no_grad():
        assert torch.allclose(z, net(x), atol=1e-5) and torch.equal(y, images.split("test").labels[order])
        assert not torch.allclose(z, net.eval()(x), atol=1e-3)  # by its running statistics it would be another
    assert record["n_test"] == 72 and record["n_train"] == 288 and np.sum(record["confusion"]) == 72
    assert {"top3", "knn", "cosine", "distance", "radial"} <= record.keys()
    assert evaluate.evaluate(c, images, weights, device=CPU)["accuracy"] == record["accuracy"]


@pytest.mark.parametrize("kind", ["pixels", "pca"])
def test_controls_see_pixels_alone(kind, weights):
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    images = digits(config())
    record = evaluate.evaluate(EvalConfig(run=config(), kind="report", features=kind), images, weights, device=CPU)
    (x, y), (t, y_test) = ((s.images.flatten(1).numpy() / 255, s.labels) for s in map(images.split, ("train", "test")))
    if kind == "pca":
        pca = PCA(32, random_state=0).fit(x)
        x, t = pca.transform(x), pca.transform(t)
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(x), y)
    assert record["accuracy"] == approx(100 * model.score(scaler.transform(t), y_test), abs=0.6)


def test_part_is_the_reports_alone():
    with pytest.raises(SidaeError, match="score_on part belongs to kind report"):
        evaluate.check(EvalConfig(run=config(), kind="knn", score_on="part"))


PAPER = claims.table(source="Figure 14")


def test_every_published_row_has_its_faithful_run():
    configs, evals = experiments.pairwise_vs_triplet("laptop", protocols=("faithful",))
    twelve = [c for c in configs if c.method in LOSSES]
    assert len(twelve) == 12 and len({c.seed for c in configs}) == 1
    display = {data.identify(n): n for n in ("mnist", "cifar10")}
    ours = {(display[c.data], c.method, c.augment, c.epochs) for c in twelve}
    assert ours == {(r.data, r.method, r.protocol.removeprefix("faithful, "), r.epochs) for r in PAPER.itertuples()}
    for c in twelve:
        assert (c.batch, c.per_class, c.stats, c.redraw, c.batch_norm) == (1024, 5000, "half", False, "each")
        assert (c.momentum, c.weight_decay, c.schedule) == (0, 0, "constant")
        assert (c.lr, c.margin, c.cos_margin) == (0.15 if c.method == "triplet" else 0.05, 1, 0)
        assert (c.channels, c.size) == ((1, 28) if display[c.data] == "mnist" else (3, 32))
    for e in evals:
        assert e.bn == "train" and (e.kind != "report" or e.score_on == "part")


def test_fixed_undoes_one_confound_at_a_time():
    parts = experiments.pairwise_vs_triplet("laptop", protocols=("fixed",)), experiments.report_confounds("laptop")
    configs, evals = ([c for part in parts for c in part[k]] for k in (0, 1))
    assert {c.seed for c in configs} == {0, 1, 2} and all(e.bn == "eval" and e.score_on == "test" for e in evals)
    base = {c.method: c for c in reversed(configs) if c.augment == "report_simclr" and c.seed == 0}  # the first of each
    for name, change in metric.CONFOUNDS.items():
        for method, fields in change.items():
            assert len(fields) == 1 and base[method].replace(**fields) in configs, name
    assert not any(metric.undone(c) for c in parts[0][0])
    assert {metric.undone(c) for c in parts[1][0]} == {"", *metric.CONFOUNDS}
    assert [c for c in parts[1][0] if not metric.undone(c)] == [c for c in parts[0][0] if c.augment == "report_simclr"]
    with pytest.raises(SidaeError, match="Unknown protocol 'fix'; choose from faithful, fixed"):
        experiments.pairwise_vs_triplet("laptop", protocols=("fix",))


def test_the_reports_own_table_supports_its_claims():
    """The claims, as they are written down, hold for the published numbers; a query that is wrong would not."""
    frame = PAPER.assign(channels=PAPER["data"].map({"mnist": 1, "cifar10": 3}),
                         augment=PAPER["protocol"].str.removeprefix("faithful, "), undone="")  # fmt: skip
    stated = pd.read_csv(Path(claims.__file__).with_name("claims.csv")).query("figure == 'pairwise_vs_triplet'")
    sides = [[frame.query(row.rows).query(q)["value"] for q in row.sides.split(" > ")] for row in stated.itertuples()]
    assert all(better.min() > worse.max() for better, worse in sides if len(better))
    assert [len(better) + len(worse) for better, worse in sides] == [2] * 6 + [3] * 3 + [2, 12, 0, 0]  # the last: of classes
    classes = [set(ast.literal_eval(q.split(" in ")[1]))
               for row in stated[-2:].itertuples() for q in row.sides.split(" > ")]  # fmt: skip
    assert classes[0] | classes[1] == set("airplane automobile bird cat deer dog frog horse ship truck".split())
    assert classes[2] | classes[3] == set("0123456789") and classes[3] == {"8"}
