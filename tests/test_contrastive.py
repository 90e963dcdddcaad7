"""SimCLR, MoCo v2, NNCLR and FNC: closed forms, the queue, a cold temperature. Step by step: test_three_steps."""

import math

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from test_siamese import B, D, build, inputs
from torch import nn

from sidae_lib.config import SidaeError
from sidae_lib.methods.contrastive import Queue


def unit(z):
    return F.normalize(z, dim=1)


def fixed(method, **changes):
    """A method whose networks hand on what they are given: views that are projections."""
    m = build(method, **changes)
    m.backbone = m.projector = nn.Identity()
    if hasattr(m, "predictor"):
        m.predictor = nn.Identity()
    for copied in {"keys", "teacher"} & {name for name, _ in m.named_children()}:
        getattr(m, copied)[0] = getattr(m, copied)[1] = nn.Identity()
    return m


def test_simclr_of_equal_projections_is_log_2B_minus_1():
    m, (_, batch) = fixed("simclr"), inputs()
    assert m.loss(torch.ones(2, B, D), batch)["loss"].item() == approx(math.log(2 * B - 1))
    batch["i"][:] = batch["j"][:] = 7
    assert m.loss(torch.ones(2, B, D), batch)["loss"].item() == approx(0, abs=1e-6)  # one image has no negatives


def test_queue_is_first_in_first_out():
    q = Queue(6, 3)
    assert torch.allclose(q.z.norm(dim=1), torch.ones(6)) and (q.id == -1).all() and (q.label == -1).all()
    noise = q.z.clone()
    z = torch.arange(1.0, 25.0).view(8, 3)
    q.push(z[:4], torch.arange(4), torch.arange(4) % 2)
    assert torch.equal(q.z, torch.cat([unit(z[:4]), noise[:2]])) and q.id.tolist() == [0, 1, 2, 3, -1, -1]
    q.push(z[4:], torch.arange(4, 8))
    assert torch.equal(q.z, unit(torch.cat([z[4:], z[:2]])))
    assert q.id.tolist() == [4, 5, 6, 7, 0, 1] and q.label.tolist() == [-1, -1, -1, -1, 0, 1]
    q.push(z, torch.arange(8))
    assert torch.equal(q.z, unit(z[:6]))  # more than it holds


def test_batch_and_splits():
    for splits in (3, 8):
        with pytest.raises(SidaeError, match=f"multiple of splits, at least twice it: 8 and {splits} are not"):
            build("moco_v2", splits=splits)


def test_nnclr_finds_the_neighbours_that_are_there():
    """First noise; then the queue holds these very projections, and each finds itself; then others of its class."""
    m, (views, batch) = build("nnclr"), inputs()
    first = m.loss(views, batch)
    assert (first["nn_same"].item(), first["nn_accuracy"].item()) == (0, 0)
    m.after_step(**m.ahead(1, 10))
    second = m.loss(views, batch)
    assert (second["nn_same"].item(), second["nn_accuracy"].item()) == (1, 1)
    assert m.queue.id[:B].tolist() == batch["i"].tolist() and m.queue.label[:B].tolist() == batch["labels"].tolist()
    assert torch.equal(m.queue.z[:B], unit(first["z"]))
    m.queue.id += 100
    m.queue.label[:2] += 1
    third = m.loss(views, batch)
    assert (third["nn_same"].item(), third["nn_accuracy"].item()) == (0, approx(6 / B))
    del batch["labels"]
    assert m.loss(views, batch).keys() == {"loss", "z", "nn_same"}  # an unlabelled split


def test_fnc_that_finds_nothing_is_simclr():
    (views, batch), simclr = inputs(), build("simclr")
    for changes in ({"threshold": 1.1}, {"threshold": 1.1, "cancel": "eliminate"}):
        m = build("fnc", support=0, **changes)
        out = m.loss(views, batch)
        assert out["loss"].item() == simclr.loss(views, batch)["loss"].item() and out["fn_found"] == 0


@pytest.mark.parametrize("method", ["simclr", "moco_v2", "nnclr", "fnc", "dino"])
def test_a_tau_of_0_005(method):
    """Scores up to 200, of which bfloat16 has no digits: under autocast it is to the bit the loss of float32."""
    m, (_, batch) = fixed(method, tau=0.005), inputs()
    views = tuple(torch.randn(2, B, D, generator=torch.Generator().manual_seed(1)).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = m.loss(views, batch)["loss"]
    assert rounded.isfinite() and torch.equal(rounded, m.loss([v.float() for v in views], batch)["loss"])
