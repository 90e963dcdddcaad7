"""SimCLR, MoCo v2, NNCLR and FNC against loops typed here, and their queues. Step by step: test_three_steps."""

import copy
import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from test_three_steps import run_of
from torch import nn

from sidae_lib import methods
from sidae_lib.config import RunConfig, SidaeError
from sidae_lib.methods.contrastive import Queue

B, D = 8, 16
SMALL = {"backbone": "small_cnn", "batch": B, "dim": D, "hidden": 24, "pred_hidden": 12, "queue": 16, "splits": 2,
         "tau": 0.2, "top": 3, "threshold": 0.3}  # fmt: skip


def build(method, seed=0, **changes):
    torch.manual_seed(seed)
    fields = {k: v for k, v in SMALL.items() if k not in methods.SHARED or k in methods.METHODS[method].reads}
    return methods.build(RunConfig.create(**{"method": method, "data": "0", **fields, **changes}))


def inputs(step=0, n=2, pairs=False):
    """n views, and their batch; pairs: rows 0 and 1 hold the same image, and view 2 of rows 0 and 2 is another one."""
    g = torch.Generator().manual_seed(step)
    i = torch.arange(B) + 100 * step
    i[1] = i[0] if pairs else i[1]
    j = i.clone()
    if pairs:
        j[0], j[2] = i[5], i[0]
    batch = {"i": i, "j": j, "labels": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])}
    return tuple(torch.randn(B, 3, 32, 32, generator=g) for _ in range(n)), batch


def step(m, views, batch, lr=0.1):
    """One plain SGD step of a method, as the training loop takes it."""
    m.zero_grad()
    out = m.loss(views, batch)
    out["loss"].backward()
    with torch.no_grad():
        for p in m.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    m.after_step(**m.ahead(1, 2))
    return {k: v.detach() for k, v in out.items()}


def unit(z):
    return F.normalize(z, dim=1)


def nce(scores, own, left_out=()):
    """-log of the share of exp(score) that lies on each of `own`, their mean; over all columns but those left out."""
    total = sum(math.exp(s) for n, s in enumerate(scores) if n not in left_out)
    return sum(-math.log(math.exp(scores[n]) / total) for n in own) / len(own)


def fixed(m, *z):
    """The method with these projections, whatever the views show."""
    m.backbone, m.projector = nn.Identity(), nn.Identity()
    return tuple(v.clone().requires_grad_() for v in z)


# --- SimCLR ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave_out", ["same", "none"])
@pytest.mark.parametrize("pairs", [False, True])
def test_simclr_is_a_double_loop(leave_out, pairs):
    m, (views, batch) = build("simclr", leave_out=leave_out), inputs(pairs=pairs)
    z = unit(torch.cat([m.projector(m.backbone(v)) for v in views])).double()
    image = [*batch["i"].tolist(), *batch["j"].tolist()]
    rows = []
    for a in range(2 * B):
        twin = (a + B) % (2 * B)
        out = {a} | {n for n in range(2 * B) if leave_out == "same" and image[n] == image[a] and n != twin}
        rows.append(nce([(z[a] @ z[n]).item() / 0.2 for n in range(2 * B)], [twin], out))
    loss = m.loss(views, batch)["loss"].item()
    assert loss == approx(sum(rows) / (2 * B), rel=1e-5)
    same = build("simclr").loss(views, batch)["loss"].item()
    assert (loss == same) == (leave_out == "same" or not pairs)  # ids matter where an image is there twice


def test_simclr_of_equal_projections_is_log_2B_minus_1():
    m, (_, batch) = build("simclr"), inputs()
    views = fixed(m, *torch.ones(2, B, D))
    assert m.loss(views, batch)["loss"].item() == approx(math.log(2 * B - 1))
    batch["i"][:] = 7
    batch["j"][:] = 7
    assert m.loss(views, batch)["loss"].item() == approx(0, abs=1e-6)  # one image alone has no negatives


def test_simclr_pulls_on_both_views_alike():
    m, (_, batch) = build("simclr"), inputs()
    z1, z2 = fixed(m, *torch.randn(2, B, D, generator=torch.Generator().manual_seed(1)))
    one, two = m.loss((z1, z2), batch)["loss"], m.loss((z2, z1), batch)["loss"]
    g1, g2 = torch.autograd.grad(one, (z1, z2))
    assert one.item() == approx(two.item(), rel=1e-6) and (g1.norm(dim=1) > 0).all() and (g2.norm(dim=1) > 0).all()


# --- the queue ------------------------------------------------------------------------------------------------------


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


# --- MoCo v2 --------------------------------------------------------------------------------------------------------


def test_moco_of_an_orthonormal_queue():
    m, e = build("moco_v2", dim=32), math.exp(1 / 0.2)
    m.queue.z.copy_(torch.eye(32)[16:])
    q = torch.eye(32)[:B]
    assert m.contrast(3 * q, 5 * q, torch.arange(B)).item() == approx(-math.log(e / (e + 16)), rel=1e-5)
    m.queue.id[:4] = 2  # earlier views of image 2: no negatives of it, and of every other image
    rows = [-math.log(e / (e + (12 if n == 2 else 16))) for n in range(B)]
    assert m.contrast(q, q, torch.arange(B)).item() == approx(sum(rows) / B, rel=1e-5)
    m = build("moco_v2", dim=32, leave_out="none")
    m.queue.z.copy_(torch.eye(32)[16:])
    m.queue.id[:4] = 2
    assert m.contrast(q, q, torch.arange(B)).item() == approx(-math.log(e / (e + 16)), rel=1e-5)


def test_moco_normalises_queries_and_keys_in_other_splits():
    """Whose BatchNorm statistics a sample touches: change one image and see which outputs move."""
    m, (v, _), group = build("moco_v2", splits=2), inputs()[0], torch.arange(B)
    w = v.clone()
    w[5] += 1
    moved = [(f(w) - f(v)).abs().amax(1) > 0 for f in (lambda x: m.projector(m.backbone(x)), m.key)]
    assert torch.equal(moved[0], group % 2 == 1) and torch.equal(moved[1], group // 2 % 2 == 5 // 2 % 2)
    m.eval()
    assert torch.allclose(m.key(v), m.keys(v), atol=1e-6)  # back in order


def test_no_gradient_reaches_the_keys():
    m, (views, batch) = build("moco_v2", symmetric=True), inputs()
    before = copy.deepcopy(m.keys.state_dict())
    views = tuple(v.requires_grad_() for v in views)
    m.loss(views, batch)["loss"].backward()
    assert all(p.grad is None for p in m.keys.parameters())
    named = {id(p) for n, p in m.named_parameters() if not n.startswith("keys.")}
    assert {id(p) for g in m.param_groups(0.1) for p in g["params"]} == named
    m = build("moco_v2")
    v2 = views[1].detach().requires_grad_()
    m.loss((views[0], v2), batch)["loss"].backward()
    assert v2.grad is None  # the key's view
    assert all(torch.equal(before[k], v) for k, v in m.keys.state_dict().items() if "running" not in k)


def test_batch_and_splits():
    for splits in (3, 8):
        with pytest.raises(SidaeError, match=f"multiple of splits, at least twice it: 8 and {splits} are not"):
            build("moco_v2", splits=splits)


# --- NNCLR ----------------------------------------------------------------------------------------------------------


def test_nnclr_is_a_loop_and_only_predictions_get_a_gradient():
    m, (views, batch) = build("nnclr"), inputs(pairs=True)
    noise = m.queue.z.clone()
    z1, z2 = (m.projector(m.backbone(v)) for v in views)
    rows, images = [], (batch["i"].tolist(), batch["j"].tolist())
    for z, p, (own, other) in ((z1, m.predictor(z2), images), (z2, m.predictor(z1), images[::-1])):
        for a in range(B):
            nearest = max(noise, key=lambda q: (F.normalize(z[a], dim=0) @ q).item())  # noqa: B023
            scores = torch.stack([nearest @ F.normalize(p[n], dim=0) / 0.2 for n in range(B)])
            kept = [n for n in range(B) if n == a or own[a] != other[n]]
            rows.append(-scores[kept].log_softmax(0)[kept.index(a)])
    slow = torch.stack(rows).mean()
    loss = m.loss(views, batch)["loss"]
    assert loss.item() == approx(slow.item(), rel=1e-5) and torch.equal(m.queue.z, noise)
    parameters = list(m.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(v, parameters) for v in (loss, slow)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)  # z reaches the loss through p alone


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


# --- FNC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancel", ["attract", "eliminate"])
@pytest.mark.parametrize("support", [0, 2])
def test_fnc_is_a_loop(cancel, support):
    V = 2 + support
    m, (views, batch) = build("fnc", cancel=cancel, support=support), inputs(n=V, pairs=True)
    z = unit(torch.cat([m.projector(m.backbone(v)) for v in views])).double()
    row, image = list(range(B)) * V, (*batch["i"].tolist(), *batch["j"].tolist(), *batch["i"].tolist() * support)
    cos = (z @ z.T).tolist()
    losses, found_by = [], []
    for a in range(V * B):
        siblings = [n for n in range(V * B) if row[n] == row[a]]
        candidates = {n: max(cos[s][n] for s in siblings if image[s] != image[n]) for n in range(V * B)
                      if n not in siblings and any(image[s] != image[n] for s in siblings)}
        found = [n for n in sorted(candidates, key=candidates.get)[-3:] if candidates[n] > 0.3]
        found = [n for n in found if image[n] != image[a]]
        found_by.append(found)
        own = [n for n in siblings if n != a]
        out = {a} | {n for n in range(V * B) if image[n] == image[a] and n not in own}
        attract = cancel == "attract"
        losses.append(nce([c / 0.2 for c in cos[a]], own + found if attract else own, out if attract else out | {*found}))
    got = m.loss(views, batch)
    assert got["loss"].item() == approx(sum(losses) / (V * B), rel=1e-5)
    assert got["fn_found"].item() == approx(sum(map(len, found_by[:B])) / B) and got["fn_found"] > 1
    right = [sum(batch["labels"][row[n]] == batch["labels"][a] for n in found_by[a]) for a in range(B)]
    assert got["fn_right"].item() == approx(sum(right) / B)


def test_fnc_that_finds_nothing_is_simclr():
    (views, batch), simclr = inputs(pairs=True), build("simclr")
    for changes in ({"threshold": 1.1}, {"threshold": 1.1, "cancel": "eliminate"}):
        m = build("fnc", support=0, **changes)
        out = m.loss(views, batch)
        assert out["loss"].item() == simclr.loss(views, batch)["loss"].item() and out["fn_found"] == 0


@pytest.mark.parametrize(("top", "found"), [(100, [4, 4, 2]), (2, [2, 2, 2])])
def test_fnc_of_a_perfect_encoder_finds_its_class(top, found):
    """Projections that are the class: precision 1, recall 1 once `top` allows; attraction of all leaves log(how many)."""
    m, (_, batch) = build("fnc", support=0, top=top, tau=0.01), inputs()
    z = torch.eye(D)[batch["labels"]]
    out = m.loss(fixed(m, z, z), batch)
    assert out["fn_found"].item() == approx(sum(found[label] for label in batch["labels"]) / B)
    assert out["fn_right"] == out["fn_found"]
    assert out["fn_all"].item() == approx((6 * 4 + 2 * 2) / B)  # 3, 3 and 2 images a class, two views of each other one
    if top == 100:
        assert out["loss"].item() == approx(sum(math.log(found[label] + 1) for label in batch["labels"]) / B, rel=1e-4)
        m = build("fnc", support=0, top=top, tau=0.01, cancel="eliminate")
        assert m.loss(fixed(m, z, z), batch)["loss"].item() == approx(0, abs=1e-5)  # only the twin is left


# --- all four -------------------------------------------------------------------------------------------------------

FOUR = ("simclr", "moco_v2", "nnclr", "fnc")


@pytest.mark.parametrize("tau", [1e-3, 1e3])
@pytest.mark.parametrize("method", FOUR)
def test_finite_at_extreme_temperatures(method, tau):
    m, (views, batch) = build(method, tau=tau), inputs()
    for v in (views, tuple(0 * v for v in views)):  # and where every image is the same
        out = step(m, v, batch)
        assert all(t.isfinite().all() for t in (*out.values(), *m.state_dict().values()))


# --- a cold temperature, with DINO's --------------------------------------------------------------------------------


def slow_loss(method, m, said, ids, tau):
    """In float64 and in loops, of what the heads said."""
    z, cos = [unit(v) for v in said["projector"]], lambda a, b: (unit(a) @ unit(b.double()).T).tolist()
    if method == "dino":
        s, t = ([(unit(v) @ unit(w.double()).T) for v in said[name]] for name, w in (
            ("projector", m.prototypes.weight), ("teacher.1", m.teacher[2].weight)))  # fmt: skip
        p = [((v - m.centre) / m.TAU_T).softmax(1) for v in t]
        return -sum((p[b] * (s[a] / tau).log_softmax(1)).sum(1).mean().item() for a, b in ((0, 1), (1, 0))) / 2
    rows = []
    if method == "moco_v2":
        for own, far, a in zip(cos(z[0], said["key"][0]), cos(z[0], m.queue.z), range(B)):
            earlier = {1 + n for n in range(len(far)) if m.queue.id[n] == ids[a]}
            rows.append(nce([c / tau for c in (own[a], *far)], [0], earlier))
    elif method == "nnclr":
        for v, p in zip(z, said["predictor"]):  # of view 2, then of view 1
            nearest = m.queue.z[torch.tensor(cos(v, m.queue.z)).argmax(1)]
            rows += [nce([c / tau for c in row], [a]) for a, row in enumerate(cos(nearest.double(), p))]
    else:
        between = cos(torch.cat(z), torch.cat(z))
        for a, row in enumerate(between):
            own, found = [n for n in range(len(row)) if n % B == a % B], []
            if method == "fnc":
                best = {n: max(between[s][n] for s in own) for n in range(len(row)) if n not in own}
                found = [n for n in sorted(best, key=best.get)[-3:] if best[n] > 0.3]
            rows.append(nce([c / tau for c in row], [n for n in (*own, *found) if n != a], {a}))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [*FOUR, "dino"])
def test_a_tau_of_0_005(method, precision):
    """Four real steps, scores up to 200: the loss is that of float64 from the same projections, which bfloat16 may have made,
    up to a float32's last digit of the scores; and nothing that is kept is NaN or infinite."""
    run, values, said = run_of(method, tau=0.005, precision=precision), [], defaultdict(list)
    m, loss, key = run.method, run.method.loss, getattr(run.method, "key", None)
    for name in {"projector", "predictor", "teacher.1"} & {n for n, _ in m.named_modules()}:
        m.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: said[name].append(y.detach().double()))

    def watched(views, batch):
        said.clear()
        out = loss(views, batch)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            values.append((out["loss"].item(), slow_loss(method, m, said, batch["i"], 0.005)))
        return out

    m.loss, m.key = watched, lambda v: said["key"].append((k := key(v)).double()) or k  # in the order of the queries
    for epoch in range(2):
        drawn = run.draw(epoch)
        for a, b in run.bounds[:2]:
            run.advance(drawn, a, b)
            assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    assert all(v.isfinite().all() for v in run.state().values()) and len(values) == 4
    for fast, slow in values:
        assert fast == approx(slow, rel=0, abs=5e-5)
