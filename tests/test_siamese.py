"""What holds for every contrastive and siamese method, and their momentum. Step by step: test_three_steps."""

import copy

import pytest
import torch
from pytest import approx
from torch import nn

from sidae_lib import data, experiments, methods, train
from sidae_lib.config import RunConfig, SidaeError
from sidae_lib.methods.base import MomentumCopy, raised

B, D, P = 8, 16, 10
SMALL = {"backbone": "small_cnn", "batch": B, "dim": D, "hidden": 24, "pred_hidden": 12, "prototypes": P, "queue": 16,
         "splits": 2, "top": 3, "threshold": 0.3, "epochs": 4}
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


def test_momentum_weights():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    target = MomentumCopy(net)
    assert torch.equal(target(torch.eye(3)), net(torch.eye(3))) and not any(p.requires_grad for p in target.parameters())
    with torch.no_grad():
        for p in net.parameters():
            p += torch.rand_like(p)
    net[1].running_mean += 1
    before = copy.deepcopy(target.state_dict())
    target.follow(0.9)
    for p, q, k in zip(target.parameters(), net.parameters(), dict(target.named_parameters()), strict=True):
        assert torch.allclose(p, 0.9 * before[k] + 0.1 * q, atol=1e-7) and not torch.equal(p, before[k])
    assert torch.equal(target[0][1].running_mean, before["0.1.running_mean"])  # not averaged
    assert [raised(0.96, n, 2) for n in (1, 2)] == approx([0.96, 0.98]) and 0.999 < raised(0.96, 100, 100) < 1


@pytest.mark.parametrize(("method", "copy_of"), [("moco_v2", "keys"), ("byol", "target"), ("dino", "teacher")])
def test_no_gradient_reaches_the_momentum_network(method, copy_of):
    m, (views, batch) = build(method), inputs()
    m.loss(views, batch)["loss"].backward()
    theirs = {n for n, p in m.named_parameters() if n.startswith(copy_of)}
    assert theirs and {n for n, p in m.named_parameters() if p.grad is None} == theirs
    grouped = {id(p) for g in m.param_groups(0.1) for p in g["params"]}
    assert grouped == {id(p) for n, p in m.named_parameters() if n not in theirs}


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
@pytest.mark.parametrize("tau", [1e-3, 1e3])
def test_finite_at_extremes(method, tau):
    """Every image the same, values and temperatures out of range."""
    reads = methods.METHODS[method].reads
    m, (views, batch) = build(method, **({"tau": tau} if "tau" in reads else {})), inputs()
    for scale in (0, 1, 1e4):
        out = step(m, tuple(scale * v for v in views), batch)
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


@pytest.mark.parametrize("method", ["moco_v2", "nnclr"])
def test_queue_fits_batch_and_pool(method):
    images = data.load("digits")
    run = experiments.run(method, "digits", "smoke")
    for changes in ({"queue": 96}, {"queue": 192}, {"queue": 256}):
        with pytest.raises(SidaeError, match=f"multiple of batch .64. and at most half of the 256 .* got {changes['queue']}"):
            train.Run(run.replace(**changes), images, torch.device("cpu"))
    assert len(train.Run(run, images, torch.device("cpu")).pairs) == 256


SIZES = {"mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000, "mnist5k": 4000, "digits": 1437, "photos": 5700}


@pytest.mark.parametrize("scale", experiments.SCALES)
def test_every_scale_has_a_config_that_fits(scale, monkeypatch):
    s = experiments.SCALES[scale]
    monkeypatch.setattr(experiments.data, "identify", lambda name, download=False: "0")
    for method in NEW:
        for dataset in s.datasets:
            c = experiments.run(method, dataset, scale)
            assert methods.check(c) and c.augment == methods.METHODS[method].axes.augment
            assert c.queue % c.batch == 0 and ("queue" not in methods.METHODS[method].reads or
                                               2 * c.queue <= (c.pool or SIZES[dataset]))
            assert c.batch % c.splits == 0 and (method != "moco_v2" or c.batch // c.splits >= 32)
            assert c.dim == 64 if scale == "smoke" else c.dim >= 128
    c = experiments.run("moco_v2", s.datasets[0], scale)
    assert c.lr == approx(0.06 * c.batch / 512) and c.dim == {"smoke": 64}.get(scale, 128)


def test_every_method_has_its_own_colour_and_marker():
    own = set(methods.METHODS) - {"supervised", "untrained"}
    assert own <= methods.COLOURS.keys() and own <= methods.NAMES.keys() and own <= methods.MARKERS.keys()
    for table in (methods.COLOURS, methods.NAMES, methods.MARKERS):
        assert len(set(table.values())) == len(table)
