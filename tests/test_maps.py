"""AMDIM, CPC v2, YADIM and composed methods: closed forms, slow references, who gets a gradient, and the state."""

import json
import math
import os

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from safetensors.torch import load_file, save_file
from test_claims import ROW, judged

from sidae_lib import augment, claims, data, experiments, frames, losses, methods, networks, train
from sidae_lib.config import RunConfig, SidaeError, epoch_seed
from sidae_lib.methods import maps
from sidae_lib.step import lr_at

ADAM = {"optimizer": "adam", "lr": 1e-3, "momentum": 0.8, "weight_decay": 1e-5}
OWN = {  # narrow, each on the encoder of its paper
    "amdim": {"augment": "amdim", "backbone": "amdim", "width": 4},
    "yadim": {"augment": "yadim", "stem": "cifar", "width": 4},
    "cpc_v2": {"augment": "cpc_patches", "backbone": "patches18", "width": 4, "hidden": 16, "dim": 8},
}
CROSSED = {"augment": "amdim", "encode": "amdim", "extract": "01,02,11", "compare": "dot", "loss": "nce", "width": 4}


def run(method, **changes):
    return RunConfig.create(**{"method": method, "data": "0", "batch": 8, **OWN.get(method, {}), **changes})


def build(method, seed=0, **changes):
    torch.manual_seed(seed)
    return methods.build(run(method, **changes))


def composed(seed=0, **changes):
    fields = methods.compose(**{**CROSSED, **changes})
    return build(fields.pop("method"), seed, **fields)


def views(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, 3, 32, 32, generator=g) for _ in range(2)), {"i": torch.arange(n), "j": torch.arange(n)}


def noise(*shape, seed=0, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def own(B, L):
    """One anchor an image, L places of each of B images: place l of image b in column l B + b."""
    return torch.arange(B)[:, None] == torch.arange(B * L) % B


@pytest.mark.parametrize(("B", "L"), [(2, 1), (8, 25), (200, 25), (200, 49)])
def test_nce_of_equal_scores(B, L):
    assert losses.nce(torch.zeros(B, B * L), own(B, L)).item() == approx(math.log(1 + (B - 1) * L), rel=1e-6)
    assert losses.nce(torch.full((B, B * L), 7.0), own(B, L)).item() == approx(math.log(1 + (B - 1) * L), rel=1e-6)


def test_nce_is_a_loop():
    B, L, s = 5, 3, 3 * noise(5, 15)
    slow = 0.0
    for b in range(B):
        away = sum(math.exp(s[b, m].item()) for m in range(B * L) if m % B != b)
        for place in range(L):
            e = math.exp(s[b, place * B + b].item())
            slow -= math.log(e / (e + away)) / (B * L)
    assert losses.nce(s, own(B, L)).item() == approx(slow, rel=1e-5)


def test_nce_is_info_nce_where_a_row_has_one_positive():
    s, same = noise(12, 12), torch.eye(12, dtype=torch.bool)
    assert losses.nce(s, same).item() == approx(losses.info_nce(s, same).item(), rel=1e-6)
    assert losses.nce(s, same.roll(6, 0), same).item() == approx(losses.info_nce(s, same.roll(6, 0), same).item(), rel=1e-6)
    many = own(6, 2).repeat(2, 1)
    assert losses.nce(s, many).item() < losses.info_nce(s, many).item()  # fellows are no rivals


def test_nce_gradient():
    s, positives = noise(6, 18, grad=True), own(6, 3)
    drop = torch.zeros_like(positives)
    drop[:, 1] = ~positives[:, 1]
    losses.nce(s, positives, drop).backward()
    assert (s.grad[positives] < 0).all() and (s.grad[drop] == 0).all() and (s.grad[~positives & ~drop] > 0).all()
    assert torch.allclose(s.grad.sum(1), torch.zeros(6), atol=1e-6)


def test_amdims_encoder_has_the_papers_maps_and_pads_nothing():
    net = networks.backbone(run("amdim", width=8)).eval()
    x = noise(2, 3, 32, 32).requires_grad_()
    found = net.maps(x)
    assert [tuple(m.shape[1:]) for m in found] == [(64, 1, 1), (32, 5, 5), (32, 7, 7)] and net.widths == (64, 32, 32)
    assert torch.equal(net(x), found[0].flatten(1)) and net.out_features == 64
    for m, pixels in ((found[2][0, :, 0, 0], 8), (found[1][0, :, 0, 0], 16)):  # a place sees its own pixels alone
        seen, = torch.autograd.grad(m.sum(), x, retain_graph=True)
        rows = seen[0].abs().sum((0, 1)).nonzero()
        assert rows.max() == pixels - 1 and not seen[1].any()
    assert {m.padding for m in net.modules() if isinstance(m, torch.nn.Conv2d)} == {(0, 0)}
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules()) == 1


def test_amdims_depth_leaves_the_receptive_field():
    shallow, deep = (networks.AMDIMEncoder(width=4, depth=d) for d in (1, 5))
    assert [m.shape for m in shallow.maps(noise(2, 3, 32, 32))] == [m.shape for m in deep.maps(noise(2, 3, 32, 32))]
    units = [sum(isinstance(m, networks.AMDIMUnit) for m in net.modules()) for net in (shallow, deep)]
    assert units == [6, 6 + 4 * 4]


def test_amdims_unit_starts_as_average_pooling():
    unit, x = networks.AMDIMUnit(3, 5, 4, 2), noise(2, 3, 30, 30)
    y = unit(x)
    assert y.shape == (2, 5, 14, 14) and torch.equal(y[:, :3], F.avg_pool2d(x, 4, 2)) and not y[:, 3:].any()


def test_the_embedding_starts_near_the_identity():
    e, x = maps.Embedding(4, 6), noise(8, 4, 5, 5)
    assert torch.equal(e.conv2.weight, torch.zeros(6, 6, 1, 1))
    w = e.beside.weight[..., 0, 0]
    assert torch.equal(w.diagonal(), torch.ones(4)) and 0 < (w - torch.eye(6, 4)).abs().max() <= 0.01
    assert e(x).shape == (8, 6, 5, 5) and e(x).mean((0, 2, 3)).abs().max() < 1e-5


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("name", ["patches18", "patches34"])
def test_patches_are_cut_and_seen_apart(name, norm):
    net, x = networks.backbone(run("cpc_v2", backbone=name, norm=norm)), noise(2, 3, 32, 32)
    grid, = net.maps(x)  # in training mode: no statistics are shared
    assert grid.shape == (2, 32, 7, 7) and torch.allclose(net(x), grid.mean((2, 3)))
    for r, c in ((0, 0), (2, 5), (6, 6)):
        patch = x[1:, :, 4 * r : 4 * r + 8, 4 * c : 4 * c + 8]
        assert torch.allclose(grid[1, :, r, c], net.net(patch)[0], atol=1e-5)
    assert not any("batchnorm" in type(m).__name__.lower() for m in net.modules())


def test_context_sees_no_row_below():
    net, x = maps.Context(6, 32), noise(1, 6, 7, 7).requires_grad_()
    for row in range(7):  # five blocks, each looks one row up
        seen, = torch.autograd.grad(net(x)[0, :, row].sum(), x)
        assert seen[0].abs().sum((0, 2)).nonzero()[:, 0].tolist() == list(range(max(0, row - 5), row + 1))


def test_resnet34_is_torchvisions():
    import torchvision

    with torch.device("meta"):
        ours = networks.backbone(run("yadim", backbone="resnet34", width=64, stem="imagenet"))
        theirs = torchvision.models.resnet34().state_dict()
    theirs = {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in ours.state_dict().items()} == theirs


@pytest.mark.parametrize("config", [run("amdim"), run("amdim", backbone="resnet34", stem="cifar"), run("cpc_v2")],
                         ids=lambda c: c.backbone)
def test_an_encoder_comes_back_from_its_file(config, tmp_path):
    net = networks.backbone(config).eval()
    meta = json.dumps({"config": config.to_dict(), "mean": [0], "std": [1]})
    save_file(net.state_dict(), tmp_path / "b.safetensors", {"sidae": meta})
    assert torch.equal(networks.load(tmp_path / "b.safetensors")(noise(2, 3, 32, 32)), net(noise(2, 3, 32, 32)))


def slow_maps_loss(m, v, pairs, clip=20.0):
    """Place by place, from the maps as they are compared: the mean over both directions, summed over the comparisons."""
    x, y = ([head(f) for head, f in zip(heads, m.backbone.maps(a))] for a in v
            for heads in [[m.heads[k] if k in m.heads else torch.nn.Identity() for k in "012"]])
    B, value, squares = len(v[0]), 0.0, 0.0
    for n, (a, b) in enumerate(pairs):
        for direction, (left, right) in enumerate(((x, y), (y, x))):
            L = right[b][0, 0].numel()
            cells = left[a].flatten(2)
            for i in range(B):
                anchor = cells[i, :, int(m.place[n, direction, i] * cells.shape[2])]
                s = right[b].flatten(2).transpose(1, 2) @ anchor / len(anchor) ** 0.5  # (B, L)
                squares += s.square().sum() / 2 / (B * B * L)
                s = clip * (s / clip).tanh()
                away = torch.cat([s[k] for k in range(B) if k != i]).exp().sum()
                value -= (s[i].exp() / (s[i].exp() + away)).log().mean() / 2 / B
    return value, squares


@pytest.mark.parametrize(("method", "extract", "pairs"), [
    ("amdim", "", [(0, 1), (0, 2), (1, 1)]), ("amdim", "00", [(0, 0)]), ("yadim", "", [(0, 0)]),
    ("yadim", "00,11,22", [(0, 0), (1, 1), (2, 2)]), ("yadim", "01,02,11", [(0, 1), (0, 2), (1, 1)]), ("yadim", "11", [(1, 1)]),
])
def test_the_loss_is_a_loop_over_places(method, extract, pairs):
    m, (v, batch) = build(method, extract=extract), views()
    out = m.loss(v, batch)
    value, squares = slow_maps_loss(m, v, pairs)
    assert out["l_nce"].item() == approx(value.item(), rel=1e-4) and out["square"].item() == approx(squares.item(), rel=1e-4)
    assert out["loss"].item() == approx((value + 0.05 * squares).item(), rel=1e-4)
    assert not out["z"].requires_grad and len(out["z"]) == 8


def test_r_is_any_of_the_three_maps():
    m, (v, batch) = build("yadim", extract="0r"), views()
    seen = set()
    for u in (0.0, 0.34, 0.67, 0.99):
        m.map.fill_(u)
        k = int(3 * u)
        seen.add(k)
        assert m.loss(v, batch)["l_nce"].item() == approx(slow_maps_loss(m, v, [(0, k)])[0].item(), rel=1e-4)
    assert seen == {0, 1, 2}


def test_places_are_a_function_of_seed_and_step():
    a, b, other = build("yadim"), build("yadim", seed=1), build("yadim", seed=0, **{"batch": 8})
    assert torch.equal(a.place, b.place)  # not of the weights' generator
    first = a.place.clone()
    a.after_step(**a.ahead(1, 4))
    assert not torch.equal(a.place, first) and 0 <= a.place.min() and a.place.max() < 1
    other.load_state_dict(a.state_dict())
    assert torch.equal(other.place, a.place) and torch.equal(other.map, a.map)
    assert a.place.shape == (1, 2, 8) and not torch.equal(a.place[0, 0], a.place[0, 1])
    b.after_step(**b.ahead(1, 4))
    assert torch.equal(a.place, b.place) and epoch_seed(0, 0.25) != epoch_seed(0, 0.5)


def test_every_place_is_an_anchor_sometimes():
    m, u = noise(1000, 2, 4, 4), torch.rand(1000, generator=torch.Generator().manual_seed(0))
    picked = maps.Composed.anchor(m, u)
    where = [(m[b].flatten(1).T == picked[b]).all(1).nonzero().item() for b in range(1000)]
    assert torch.bincount(torch.tensor(where), minlength=16).min() > 30
    assert torch.equal(maps.Composed.anchor(m, torch.full((1000,), 0.9999)), m[:, :, 3, 3])


@pytest.mark.parametrize("method", OWN)
def test_everything_that_is_there_gets_a_gradient(method):
    m, (v, batch) = build(method), views()
    m.loss(v, batch)["loss"].backward()
    dead = [k for k, p in m.named_parameters() if p.grad is None]
    assert not dead
    m = build("yadim", extract="22")  # nothing above the third map is trained
    m.loss(v, batch)["loss"].backward()
    assert {k.split(".")[1] for k, p in m.named_parameters() if p.grad is None} == {"layer3", "layer4"}


@pytest.mark.parametrize("block", [1, 3000])
@pytest.mark.parametrize("method", OWN)
def test_blocks_change_no_loss_and_no_gradient(method, block, monkeypatch):
    (v, batch), results = views(), []
    for size in (2**24, block):
        monkeypatch.setattr(maps, "BLOCK", size)
        m = build(method)
        m.loss(v, batch)["loss"].backward()
        results.append({k: p.grad for k, p in m.named_parameters()})
    for k, g in results[0].items():
        assert torch.allclose(results[1][k], g, rtol=1e-3, atol=1e-5 * max(g.abs().max().item(), 1)), k


def test_blocks_bound_the_scores(monkeypatch):
    """No tensor kept for the way back, nor any score matrix, is larger than a block."""
    monkeypatch.setattr(maps, "BLOCK", 640)
    anchors, candidates, largest, kept = noise(64, 4, grad=True), noise(64 * 16, 4), [], []
    nce = losses.nce
    monkeypatch.setattr(losses, "nce", lambda s, *a: largest.append(s.numel()) or nce(s, *a))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        value = build("yadim", batch=64).contrast(anchors, candidates, 64)
    assert max(largest) <= 64 * 16 and max(kept) <= 64 * 16 * 4  # a row at least; kept: the candidates themselves
    value[0].backward()
    assert len(largest) == 2 * 64  # once forward, once backward


def test_cpc_does_not_see_what_all_targets_share():
    m, (v, batch) = build("cpc_v2"), views()
    before = m.loss(v, batch)
    m.target.bias.data += 3.0
    after = m.loss(v, batch)
    assert after["loss"].item() == approx(before["loss"].item(), rel=1e-4)
    assert torch.allclose(after["z"], before["z"], atol=1e-4) and before["z"].shape == (8, 8)


@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("method", OWN)
def test_losses_are_finite_on_extreme_images(method, scale):
    m, (v, batch) = build(method), views()
    out = m.loss(tuple(scale * x for x in v), batch)
    out["loss"].backward()
    assert out["loss"].isfinite() and all(p.grad.isfinite().all() for p in m.parameters())


def twins(one, other, steps=3):
    """Two methods from one seed, stepped alike by Adam: every loss and every weight bit for bit."""
    assert one.state_dict().keys() == other.state_dict().keys()
    optimizers = [torch.optim.Adam(m.param_groups(1e-3), lr=1e-3, betas=(0.8, 0.999)) for m in (one, other)]
    for step in range(steps):
        v, batch = views(seed=step)
        for m, optimizer in zip((one, other), optimizers):
            optimizer.zero_grad()
            m.last = m.loss(v, batch)["loss"]
            m.last.backward()
            optimizer.step()
            m.after_step(**m.ahead(step + 1, steps))
        assert one.last.item() == other.last.item()
    for (k, a), b in zip(one.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), k


def test_amdim_small_and_yadim_are_their_five_choices():
    twins(build("amdim"), composed())
    twins(build("yadim"), composed(augment="yadim", encode="resnet18", extract="00", stem="cifar"))


def test_simclr_is_its_five_choices():
    """The class of its own, in methods/contrastive.py, against the crossing."""
    more = {"dim": 16, "hidden": 24, "tau": 0.5, "width": 4}
    twins(build("simclr", augment="simclr", **more),
          composed(augment="simclr", encode="resnet18", extract="vector", compare="cosine", loss="info_nce", **more))


def test_every_choice_counts():
    """Each of the five, changed alone, is another run, and the four that the loss sees another loss."""
    v, batch = views()
    base = composed()
    other = {"encode": "resnet18", "extract": "01,11", "compare": "cosine", "loss": "info_nce"}
    values = [composed(**{k: x}).loss(v, batch)["loss"].item() for k, x in other.items()]
    assert len({base.loss(v, batch)["loss"].item(), *values}) == 5
    fields = [methods.compose(**{**CROSSED, k: x}) for k, x in ({"augment": "yadim"} | other).items()]
    assert len({RunConfig(data="0", **f).key() for f in (*fields, methods.compose(**CROSSED))}) == 6


def sentence(call, *parts):
    with pytest.raises(SidaeError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and all(p in text for p in parts), text


@pytest.mark.parametrize(("changes", "parts"), [
    ({"augment": "fog"}, ("'fog'", "amdim")), ({"augment": "none"}, ("'none'", "second view")),
    ({"augment": "cpc_patches"}, ("second view",)), ({"encode": "vgg"}, ("'vgg'", "resnet18", "amdim")),
    ({"encode": "small_cnn"}, ("map 2", "small_cnn gives 0")),
    ({"encode": "patches18", "extract": "00,11"}, ("map 1", "gives 1")),
    ({"extract": "03"}, ("'03'", "01,02,11")), ({"extract": "01, 02"}, ("'01, 02'",)), ({"extract": "00,00"}, ("once",)),
    ({"extract": "r0"}, ("'r0'",)), ({"extract": ""}, ("names its extract",)), ({"compare": "l2"}, ("'l2'", "cosine")),
    ({"loss": "hinge"}, ("'hinge'", "info_nce")), ({"size": 28}, ("32 pixels", "28")), ({"queue_length": 3}, ("queue_length",)),
])
def test_compose_refuses_what_makes_no_sense(changes, parts):
    sentence(lambda: methods.compose(**{**CROSSED, **changes}), *parts)


def test_what_the_papers_methods_refuse():
    sentence(lambda: methods.check(run("cpc_v2", backbone="resnet18")), "cpc_v2", "patches18")
    for rows in ("7", "0", "2;3", "2,", "r"):
        sentence(lambda: methods.check(run("cpc_v2", extract=rows)), repr(rows), "1 to 6")  # noqa: B023
    sentence(lambda: methods.check(run("yadim", extract="vector")), "'vector'")
    sentence(lambda: methods.check(run("yadim", compare="cosine")), "yadim does not read compare")
    sentence(lambda: methods.check(run("amdim", augment="none")), "second view")
    for field, value in (("beta2", 0.9), ("depth", 4), ("norm", "layer")):
        sentence(lambda: methods.check(run("yadim", **{field: value})), f"yadim does not read {field}")  # noqa: B023


def test_naming_a_methods_own_comparison_is_the_same_run():
    for method, own_extract in (("amdim", "01,02,11"), ("yadim", "00"), ("cpc_v2", "2,3,4,5,6")):
        assert run(method, extract=own_extract) == run(method) and run(method).extract == ""
        assert methods.five_axes()[method].extract == own_extract
    assert run("yadim", extract="01,02,11").extract == "01,02,11"


def bare(record):
    epochs = [{k: v for k, v in e.items() if k not in ("seconds", "images_per_second")} for e in record["epochs"]]
    return {k: v for k, v in record.items() if k not in ("seconds", "provenance")} | {"epochs": epochs}


def test_a_stopped_run_equals_one_that_was_not(tmp_path, monkeypatch):
    """Adam's moments, places and map drawn for the next step and the warm-up go on bit for bit. Others: test_lost."""
    config = run("yadim", data=data.identify("digits"), pool=48, batch=16, epochs=2, schedule="steps", warmup=0.4,
                 extract="0r", **ADAM)
    images, cpu = data.by_fingerprint(config.data), torch.device("cpu")
    whole = train.pretrain(config, images, tmp_path / "whole", device=cpu)
    steps, step = iter(range(1, 100)), torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (step(self), next(steps) == 4 and os.kill(os.getpid(), 2))[0])
    with pytest.raises(train.Stopped, match="step 4 of 6"):
        train.pretrain(config, images, tmp_path / "parts", device=cpu)
    parts = train.pretrain(config, images, tmp_path / "parts", device=cpu)
    assert bare(parts) == bare(whole) and json.dumps(whole)
    a, b = (load_file(tmp_path / p / "backbone-e002.safetensors") for p in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_lr_warms_up_and_drops():
    assert [lr_at(s, 300, 1.0, "steps") for s in (0, 249, 250, 279, 280, 299)] == approx([1, 1, 0.2, 0.2, 0.04, 0.04])
    assert [lr_at(s, 100, 2.0, "constant", 0.1) for s in (0, 4, 9, 10, 99)] == approx([0.2, 1, 2, 2, 2])
    assert lr_at(50, 100, 0.03, "cosine", 0.1) == lr_at(50, 100, 0.03)


def test_translate_is_a_reflected_shift():
    x, op = noise(200, 3, 32, 32), augment.Translate(4, 0.8)
    params = op.draw(200, 32, torch.Generator().manual_seed(0))
    shift = params["translate"]
    assert shift.min() == -4 and shift.max() == 4 and 0.7 < (shift != 0).any(1).float().mean() < 0.88
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    slow = torch.stack([p[:, 4 + r : 36 + r, 4 + c : 36 + c] for p, (r, c) in zip(padded, shift.tolist())])
    assert torch.equal(op(x, params), slow)


def test_amdims_views_share_the_flip_and_nothing_else():
    draw = {name: augment.VIEWS[name].draw(500, 32, torch.Generator().manual_seed(0)) for name in ("amdim", "yadim")}
    (a1, a2), (y1, y2) = draw["amdim"], draw["yadim"]
    assert torch.equal(a1["flip"], a2["flip"]) and not torch.equal(y1["flip"], y2["flip"])
    assert all(torch.equal(a1[k], y1[k]) for k in a1) and not torch.equal(a1["translate"], a2["translate"])
    assert augment.VIEWS["cpc_patches"].second == ()


def test_a_run_says_where_it_departs_from_its_method():
    assert methods.varied(run("yadim")) == methods.varied(run("amdim")) == methods.varied(run("cpc_v2")) == {}
    assert methods.varied(run("yadim", backbone="amdim", extract="0r")) == {"encode": "amdim", "extract": "0r"}
    assert methods.varied(run("amdim", backbone="resnet18")) == {"encode": "resnet18"}
    assert methods.varied(run("cpc_v2", norm="layer")) == {"encode": "patches18 (layer)"}
    made = RunConfig(data="0", **methods.compose(**CROSSED | {"augment": "yadim", "encode": "resnet18"}, stem="cifar"))
    assert methods.varied(made) == {"extract": "01,02,11"}
    assert methods.varied(RunConfig(method="sidae", data="0", stem="cifar", augment="fer")) == {}


def test_the_experiment_varies_one_axis_at_a_time():
    """Each axis of each method with the others held, the same number of images for all, every run one that trains."""
    runs, evals = experiments.five_axes("quick")
    assert len({r.key() for r in runs}) == len(runs) and {e.run for e in evals} == set(runs)
    assert {(r.epochs, r.pool) for r in runs if r.method not in ("untrained",)} == {(1, 256)}
    assert {r.method for r in runs} == methods.METHODS.keys()
    found = {}
    for r in runs:
        methods.check(r)
        if r.method in experiments.VARIED and (departs := methods.varied(r)):
            (axis, choice), = departs.items()
            found.setdefault((r.method, axis), set()).add(choice)
    assert {k: len(v) for k, v in found.items()} == {
        ("yadim", "augment"): 2, ("yadim", "encode"): 2, ("yadim", "extract"): 3, ("amdim", "encode"): 2,
        ("amdim", "extract"): 3, ("cpc_v2", "encode"): 2, ("cpc_v2", "extract"): 3}
    made = [methods.varied(r) for r in runs if r.method == "composed"]
    assert len(made) == 5 and made[2:] == [{}, {"compare": "cosine"}, {"loss": "info_nce"}]
    bare = {r.backbone for r in runs if r.method == "untrained"}
    assert bare == {"resnet18", "amdim", "patches18"}  # each compared method has its own starting point beside it


def frame():
    """Two seeds; the spread over encoders is 6 and 4 points for AMDIM and 1 and 3 for YADIM."""
    rows = [("amdim", "", 0, 50.0), ("amdim", "", 1, 52.0), ("amdim", "encode: resnet18", 0, 44.0),
            ("amdim", "encode: resnet18", 1, 48.0), ("amdim", "encode: resnet34", 0, 47.0),
            ("amdim", "encode: resnet34", 1, 50.0), ("amdim", "extract: 00", 0, 10.0), ("yadim", "", 0, 60.0),
            ("yadim", "", 1, 60.0), ("yadim", "encode: amdim", 0, 61.0), ("yadim", "encode: amdim", 1, 57.0),
            ("composed", "loss: info_nce", 0, 55.0), ("composed", "", 0, 60.0), ("composed", "", 1, 60.0),
            ("composed", "augment: amdim; encode: amdim; extract: 01,02,11", 1, 51.5)]
    return pd.DataFrame([{"method": m, "varied": v, "seed": s, "accuracy": a, "kind": "logistic", "display": "digits",
                          "labels": 1.0, "run_key": f"{m} {v} {s}", "error": 0.5, "right": "", "repeats": 1}
                         for m, v, s, a in rows])


def test_choices_are_a_methods_own_and_those_that_differ_on_one_axis():
    found = {axis: rows for axis, rows in claims.choices(frame(), "yadim")}
    assert list(found) == ["encode", "loss"]
    assert found["encode"]["choice"].tolist() == ["", "", "amdim", "amdim"]
    assert found["encode"]["own"].tolist() == [True, True, False, False]
    assert found["loss"]["accuracy"].tolist() == [60.0, 60.0, 55.0]


def test_claims_of_the_framework():
    rows = [ROW | r | {"epoch": 1, "of": 1} for r in frame().to_dict("records")]
    robust, special = (judged(rows, words)[["difference", "n"]].T.to_dict("list")
                       for words in ("YADIM-like", "the methods are special cases"))  # fmt: skip
    assert robust == {"digits, 100 %, encode, against amdim": [3.0, 2]}
    assert special == {"digits, 100 %, amdim": [0.5, 1], "digits, 100 %, yadim": [0.0, 2]}


def test_cost_counts_parameters_and_what_a_step_keeps():
    config = run("yadim", data=data.identify("digits"), pool=64, epochs=1)
    images = data.by_fingerprint(config.data)
    small, large = (train.cost(config.replace(batch=b), images) for b in (16, 32))
    trained = methods.build(config).parameters()
    assert small["parameters"] == large["parameters"] == sum(p.numel() for p in trained)
    assert large["mib"] == approx(2 * small["mib"], rel=0.1) and small["mib"] > 16 * 4 * 32 * 32 * 4 / 2**20  # one map


def test_cost_counts_the_arithmetic_of_a_step():
    """By hand: two a multiply-add, forward once and backward twice, of which the image needs none. Per image, so that the
    batch does not count."""
    config = RunConfig(method="supervised", data=data.identify("digits"), backbone="small_cnn", augment="none", epochs=1)
    images = data.by_fingerprint(config.data)
    method, total, first = train.Run(config, images, torch.device("cpu")).method.eval(), 0, True

    def count(module, x, out):
        nonlocal total, first
        taps = module.weight[0].numel() if isinstance(module, torch.nn.Conv2d) else module.in_features
        total += 2 * taps * out.numel() * (2 if first else 3)
        first = False

    for module in method.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    method.loss([torch.zeros(1, 3, 32, 32)], {"labels": torch.zeros(1, dtype=torch.long)})
    for batch in (32, 64):
        assert train.cost(config.replace(batch=batch), images)["gflop"] == approx(total / 1e9, abs=5e-6)


def test_a_composed_run_trains_is_read_and_is_drawn(own_store):
    """What the notebook's last cells do."""
    from sidae_lib import runs
    from sidae_lib.config import EvalConfig

    five = methods.compose(augment="simclr", encode="resnet18", extract="00,11", compare="cosine", loss="nce", stem="cifar")
    small = {"epochs": 1, "pool": 64, "batch": 32}
    made = experiments.run(dataset="digits", scale="smoke", **five, **small)
    own = {m: experiments.run(m, "digits", "smoke", **small) for m in ("yadim", "simsiam")}
    own["untrained"] = experiments.run("untrained", "digits", "smoke", backbone="resnet18", stem="cifar", width=4)
    wanted = [made, *own.values(), own["yadim"].replace(extract="11")]
    evals = [EvalConfig(run=r, kind=k, labels=0.2) for r in wanted for k in ("logistic", "knn")]
    records = runs.fetch_all([*wanted, *evals], device="cpu", log=lambda _: None)
    table = frames.summary(frames.evaluations(records[len(wanted):]))
    axes = {axis: set(rows["choice"]) for axis, rows in claims.choices(table[table["kind"] == "logistic"], "yadim")}
    assert axes["extract"] == {"", "11"}
    costs = {m: {"parameters": 5, "mib": 1.5, "gflop": g} for m, g in (("yadim", 0.5), ("simsiam", 0.1))}
    side = frames.side_by_side(records, costs)
    slow = records[2] | {"provenance": {"device": "another machine", "threads": 1}, "seconds": 1e6}
    assert list(frames.side_by_side([*records, slow], {})["seconds"]) == list(side["seconds"])
    elsewhere = [slow if r is records[2] else r for r in records]  # SimSiam was trained on another machine alone
    timed = frames.side_by_side(elsewhere, {}).set_index("method")
    assert np.isnan(timed.loc["simsiam", "seconds"]) and timed.loc["simsiam", "timed_on"] == "not timed there"
    assert timed.loc["yadim", "timed_on"] == frames.hardware(records[0]["provenance"])
    assert set(side["method"]) == {"yadim", "simsiam"} and side.set_index("method").loc["yadim", "untrained"] > 0


@pytest.mark.parametrize("scale, seen", [("smoke", 120), ("laptop", 5000)])
def test_labelled_pairs_and_triples_see_as_many_images(scale, seen, monkeypatch):
    """An epoch of pairs, of triples and of images alone is one number of samples, up to what ten classes leave over."""
    runs, _ = experiments.five_axes(scale, ["digits"] if scale == "smoke" else ["cifar10"], [0])
    own = {r.method: r for r in runs if r.method in ("pairwise", "triplet", "simsiam")}
    assert 2 * 10 * own["pairwise"].per_class == 10 * own["triplet"].per_class == seen
    assert own["simsiam"].pool == {"smoke": 128}.get(scale, seen)
    assert len({r.epochs for r in own.values()}) == 1
