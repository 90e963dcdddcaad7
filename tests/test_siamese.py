"""BYOL, VICReg, Barlow Twins and DINO; and what holds for every method of the two files. Step by step: test_three_steps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch import nn

from sidae_lib import data, experiments, figures, methods, train
from sidae_lib.config import RunConfig, SidaeError
from sidae_lib.methods.base import follow, momentum_copy, raised

B, D, P = 8, 16, 10
SMALL = {"backbone": "small_cnn", "batch": B, "dim": D, "hidden": 24, "pred_hidden": 12, "prototypes": P, "queue": 16,
         "splits": 2, "epochs": 4}  # fmt: skip
NEW = ("simclr", "moco_v2", "nnclr", "fnc", "byol", "vicreg", "barlow_twins", "dino")


def build(method, seed=0, **changes):
    torch.manual_seed(seed)
    fields = {k: v for k, v in SMALL.items() if k not in methods.SHARED or k in methods.METHODS[method].reads}
    return methods.build(RunConfig.create(**{"method": method, "data": "0", **fields, **changes}))


def inputs(step=0):
    g = torch.Generator().manual_seed(step)
    batch = {"i": torch.arange(B), "j": torch.arange(B), "labels": torch.arange(B) % 3}
    return tuple(torch.randn(B, 3, 32, 32, generator=g) for _ in range(2)), batch


def step(m, views, batch, n=2, steps=4, lr=0.1):
    """One plain SGD step of a method, the n-th of `steps`, as the training loop takes it."""
    m.zero_grad()
    out = m.loss(views, batch)
    out["loss"].backward()
    with torch.no_grad():
        for p in m.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    m.after_step(**m.ahead(n, steps))
    return {k: v.detach() for k, v in out.items()}


# --- momentum -------------------------------------------------------------------------------------------------------


def test_momentum_weights():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    target = momentum_copy(net)
    assert torch.equal(target(torch.eye(3)), net(torch.eye(3))) and not any(p.requires_grad for p in target.parameters())
    with torch.no_grad():
        for p in net.parameters():
            p += torch.rand_like(p)
    net[1].running_mean += 1
    before = copy.deepcopy(target.state_dict())
    follow(target, 0.9, net)
    for p, q, k in zip(target.parameters(), net.parameters(), dict(target.named_parameters()), strict=True):
        assert torch.allclose(p, 0.9 * before[k] + 0.1 * q, atol=1e-7) and not torch.equal(p, before[k])
    assert torch.equal(target[0][1].running_mean, before["0.1.running_mean"])  # not averaged
    assert [raised(0.96, n, 2) for n in (1, 2)] == approx([0.96, 0.98]) and 0.999 < raised(0.96, 100, 100) < 1


# --- BYOL -----------------------------------------------------------------------------------------------------------


def test_byol_in_closed_form():
    m, (_, batch) = build("byol"), inputs()
    m.backbone = m.projector = m.target = nn.Identity()
    e = torch.eye(B, D)
    for predictor, value in ((nn.Identity(), 0), (lambda z: -z, 8), (lambda z: z.roll(1, 1), 4)):
        m.predictor = predictor if isinstance(predictor, nn.Module) else _Wrap(predictor)
        assert m.loss((2 * e, 3 * e), batch)["loss"].item() == approx(value, abs=1e-6)


class _Wrap(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.forward = f


@pytest.mark.parametrize(("method", "copy_of"), [("byol", "target"), ("dino", "teacher")])
def test_no_gradient_reaches_the_momentum_network(method, copy_of):
    m, (views, batch) = build(method), inputs()
    m.loss(views, batch)["loss"].backward()
    theirs = {n for n, p in m.named_parameters() if n.startswith(copy_of)}
    assert theirs and {n for n, p in m.named_parameters() if p.grad is None} == theirs
    grouped = {id(p) for g in m.param_groups(0.1) for p in g["params"]}
    assert grouped == {id(p) for n, p in m.named_parameters() if n not in theirs}


# --- VICReg and Barlow Twins: the losses are tested in test_losses.py --------------------------------------------------


def test_vicreg_weighs_its_terms():
    m, (views, batch) = build("vicreg"), inputs()
    out = m.loss(views, batch)
    assert out["loss"].item() == approx(sum(k * out[t].item() for k, t in
                                            ((25, "invariance"), (25, "variance"), (1, "covariance"))), rel=1e-6)
    assert out["invariance"].item() == approx(sum((a - b) ** 2 for a, b in zip(
        *(m.projector(m.backbone(v)).flatten().tolist() for v in views), strict=True)) / (B * D), rel=1e-4)


@pytest.mark.parametrize("method", ["vicreg", "barlow_twins", "byol"])
def test_both_views_get_a_gradient_and_the_last_layer_is_linear(method):
    m, (views, batch) = build(method), inputs()
    views = tuple(v.requires_grad_() for v in views)
    m.loss(views, batch)["loss"].backward()
    assert all((v.grad.flatten(1).norm(dim=1) > 0).all() for v in views)
    assert isinstance(m.projector[-1], nn.Linear)


# --- DINO -----------------------------------------------------------------------------------------------------------


def test_weight_decay_does_not_turn_the_frozen_prototypes():
    m, (views, batch) = build("dino"), inputs()
    optimizer = torch.optim.SGD(m.param_groups(0.1), momentum=0.9)
    start = F.normalize(m.prototypes.weight.detach(), dim=1)
    for n in range(1, 5):
        optimizer.zero_grad()
        m.loss(views, batch)["loss"].backward()
        optimizer.step()
        assert torch.allclose(F.normalize(m.prototypes.weight, dim=1), start, atol=1e-6) == (n < 4)
        m.after_step(**m.ahead(n, 12))  # the first of four epochs ends with step 3


def test_dino_of_a_uniform_teacher_is_log_P():
    m, (views, batch) = build("dino"), inputs()
    for w in (m.prototypes.weight, m.teacher[2].weight):
        nn.init.ones_(w)  # every prototype is the same
    out = m.loss(views, batch)
    assert out["loss"].item() == approx(math.log(P), rel=1e-5) == out["teacher_entropy"].item()
    m.centre[:-1] = 100.0  # one class for all
    out = m.loss(views, batch)
    assert out["teacher_entropy"].item() == approx(0, abs=1e-6) and out["loss"].item() == approx(math.log(P), rel=1e-5)


# --- all eight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NEW)
def test_state_round_trip(method):
    """What a checkpoint holds is all: another method that loads it goes the same way on."""
    m, other = build(method), build(method, seed=1)
    for n in (0, 1):
        step(m, *inputs(n), n + 1)
    other.load_state_dict(m.state_dict())
    for n in (2, 3):
        ours, theirs = (step(x, *inputs(n), n + 1) for x in (m, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    for k, v in m.state_dict().items():
        assert torch.equal(v, other.state_dict()[k]), k


@pytest.mark.parametrize("method", NEW)
def test_z_is_the_first_views_projection(method):
    m, (views, batch) = build(method), inputs()
    z = m.loss(views, batch)["z"]
    assert z.shape == (B, D) and not z.requires_grad
    assert torch.allclose(z, m.projector(m.backbone(views[0])), atol=1e-6)


@pytest.mark.parametrize("method", NEW)
def test_finite_where_every_image_is_the_same(method):
    m, (views, batch) = build(method), inputs()
    for v in (tuple(0 * v for v in views), tuple(1e4 * v for v in views)):
        out = step(m, v, batch)
        assert all(t.isfinite().all() for t in (*out.values(), *m.state_dict().values()))


@pytest.mark.parametrize("method", ["moco_v2", *(pytest.param(m, marks=pytest.mark.slow) for m in NEW if m != "moco_v2")])
def test_one_graph_holds_the_loss(method):
    """No break in what `step` mode compiles, and what is staged inside reaches `after_step` outside."""
    m, plain, (views, batch) = build(method), build(method), inputs()
    compiled = torch.compile(m.loss, fullgraph=True, backend="eager")
    for n in range(2):
        out, expected = compiled(views, batch), plain.loss(views, batch)
        assert all(torch.equal(v, expected[k]) for k, v in out.items())
        for x in (m, plain):
            x.after_step(**x.ahead(n + 1, 4))
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in m.state_dict().items())


@pytest.mark.parametrize("method", NEW)
def test_smoke_scale_trains(method, tmp_path):
    config = experiments.run(method, "digits", "smoke")
    record = train.pretrain(config, data.by_fingerprint(config.data), tmp_path, device=torch.device("cpu"))
    lines = record["epochs"]
    assert record["steps"] == 8 and all(math.isfinite(v) for line in lines for v in line.values())
    assert all(0.05 / 8 < line["z_std"] <= 1 / 8 for line in lines)  # 1 / sqrt(D) is 1 / 8; MoCo has no BatchNorm there


def test_momentum_and_queue_stay_out_of_the_saved_backbone(tmp_path):
    from sidae_lib import networks

    config = experiments.run("moco_v2", "digits", "smoke", epochs=1)
    train.pretrain(config, data.by_fingerprint(config.data), tmp_path, device=torch.device("cpu"))
    assert isinstance(networks.load(tmp_path / "backbone-e001.safetensors"), networks.SmallCNN)


@pytest.mark.parametrize("method", ["moco_v2", "nnclr"])
def test_queue_fits_batch_and_pool(method):
    images = data.load("digits")
    run = experiments.run(method, "digits", "smoke")
    for changes in ({"queue": 96}, {"queue": 192}, {"queue": 256}):
        with pytest.raises(SidaeError, match=f"multiple of batch .64. and at most half of the 256 .* got {changes['queue']}"):
            train.Run(run.replace(**changes), images, torch.device("cpu"))
    assert len(train.Run(run, images, torch.device("cpu")).pairs) == 256


SIZES = {"mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000, "digits": 1437, "photos": 5700}


@pytest.mark.parametrize("scale", experiments.SCALES)
def test_every_scale_has_a_config_that_fits(scale, monkeypatch):
    s = experiments.SCALES[scale]
    monkeypatch.setattr(experiments.data, "identify", lambda name, download=False: "0")
    for method in NEW:
        for dataset in s.datasets:
            c = experiments.run(method, dataset, scale)
            assert methods.check(c) and c.augment == methods.METHODS[method].axes.augment
            assert c.queue % c.batch == 0 and ("queue" not in methods.METHODS[method].reads or
                                               2 * c.queue <= (c.pool or SIZES[dataset]))  # fmt: skip
            assert c.batch % c.splits == 0 and (method != "moco_v2" or c.batch // c.splits >= 32)
            assert c.dim == 64 if scale == "smoke" else c.dim >= 128
    c = experiments.run("moco_v2", s.datasets[0], scale)
    assert c.lr == approx(0.06 * c.batch / 512) and c.dim == {"smoke": 64}.get(scale, 128)


def test_every_method_has_its_own_colour_and_marker():
    own = set(methods.METHODS) - {"supervised", "untrained"}
    assert own <= figures.COLOURS.keys() and own <= figures.NAMES.keys() and own <= figures.MARKERS.keys()
    for table in (figures.COLOURS, figures.NAMES, figures.MARKERS):
        assert len(set(table.values())) == len(table)
