"""Losses: closed-form values, scale and permutation laws, gradient routing, a slow loop, and extreme inputs."""

import math

import pytest
import torch
from pytest import approx

from sidae_lib import losses
from sidae_lib.losses import barlow_twins, dino, info_nce, neg_cosine, recon_mse, sidae, vicreg
from sidae_lib.losses import cosine as cosines


def noise(*shape, seed=0, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def test_neg_cosine_closed_form():
    e = torch.eye(5, 8)
    assert neg_cosine(e, e).item() == approx(-1)
    assert neg_cosine(e, -e).item() == approx(1)
    assert neg_cosine(e, e.roll(1, 0)).item() == approx(0)
    two = neg_cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert two.shape == () and two.item() == approx(-(1 + math.sqrt(0.5)) / 2)  # a mean over the batch


def test_neg_cosine_laws():
    p, z, order = noise(6, 8), noise(6, 8, seed=1), torch.tensor([3, 0, 5, 1, 4, 2])
    scales = torch.tensor([3.0, 0.1, 7.0, 1.0, 2.0, 0.5])[:, None]
    assert neg_cosine(scales * p, z / scales).item() == approx(neg_cosine(p, z).item(), abs=1e-6)
    assert neg_cosine(p[order], z[order]).item() == approx(neg_cosine(p, z).item(), abs=1e-6)
    assert neg_cosine(p[order], z).item() != approx(neg_cosine(p, z).item(), abs=1e-3)


def test_neg_cosine_gradient_reaches_p_alone():
    p, z = noise(5, 8, grad=True), noise(5, 8, seed=1, grad=True)
    neg_cosine(p, z).backward()
    assert p.grad.abs().sum() > 0 and z.grad is None
    assert (p * p.grad).sum(1).abs().max() < 1e-6  # the length of p is free
    towards = ((-p.grad) * (z / z.norm(dim=1, keepdim=True))).sum(1)
    assert (towards > 0).all()  # a step down turns p to z


def test_neg_cosine_is_a_loop():
    p, z = noise(5, 8), noise(5, 8, seed=1)
    slow = 0.0
    for i in range(5):
        dot = sum(p[i, d].item() * z[i, d].item() for d in range(8))
        slow -= dot / math.sqrt(sum(v**2 for v in p[i].tolist()) * sum(v**2 for v in z[i].tolist())) / 5
    assert neg_cosine(p, z).item() == approx(slow, abs=1e-6)


def test_recon_mse_closed_form():
    x = noise(4, 3, 8, 8)
    assert recon_mse(x, x).item() == 0
    assert recon_mse(x + 2, x).item() == approx(4, rel=1e-5)
    assert recon_mse(x + 2, x, "sum").item() == approx(4 * 3 * 8 * 8, rel=1e-5)  # over an image, not over the batch
    standardised = (x - x.mean()) / x.std(correction=0)
    assert recon_mse(torch.zeros_like(x), standardised).item() == approx(1, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_recon_mse_laws(reduction):
    x_hat, x = noise(4, 3, 8, 8), noise(4, 3, 8, 8, seed=1)
    loss = recon_mse(x_hat, x, reduction).item()
    assert recon_mse(3 * x_hat, 3 * x, reduction).item() == approx(9 * loss, rel=1e-5)
    assert recon_mse(x, x_hat, reduction).item() == approx(loss, rel=1e-5)
    assert recon_mse(x_hat.flip(0), x.flip(0), reduction).item() == approx(loss, rel=1e-5)
    assert recon_mse(x_hat.repeat(2, 1, 1, 1), x.repeat(2, 1, 1, 1), reduction).item() == approx(loss, rel=1e-5)


@pytest.mark.parametrize(("reduction", "share"), [("mean", 4 * 3 * 8 * 8), ("sum", 4)])
def test_recon_mse_gradient(reduction, share):
    x_hat, x = noise(4, 3, 8, 8, grad=True), noise(4, 3, 8, 8, seed=1)
    recon_mse(x_hat, x, reduction).backward()
    assert torch.allclose(x_hat.grad, 2 * (x_hat - x).detach() / share, rtol=1e-5) and x.grad is None


def test_recon_mse_is_a_loop():
    x_hat, x = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    images = [sum((a - b) ** 2 for a, b in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True))
              for p, q in zip(x_hat, x, strict=True)]
    assert recon_mse(x_hat, x, "sum").item() == approx(sum(images) / 2, rel=1e-5)
    assert recon_mse(x_hat, x).item() == approx(sum(images) / 2 / 48, rel=1e-5)


@pytest.mark.parametrize(("w", "value"), [(1.0, -0.8), (0.0, 0.6), (0.5, -0.1), (0.25, 0.25)])
def test_sidae_closed_form(w, value):
    assert sidae(torch.tensor(-0.8), torch.tensor(0.6), w).item() == approx(value)
    assert sidae(torch.tensor(-0.8), torch.tensor(0.6), torch.tensor(w)).item() == approx(value)


def test_sidae_laws():
    a, b = torch.tensor(-0.3), torch.tensor(1.7)
    assert sidae(a, a, 0.3).item() == approx(-0.3)  # a convex combination
    assert sidae(a, b, 0.3).item() == approx(sidae(b, a, 0.7).item())
    assert sidae(5 * a, 5 * b, 0.3).item() == approx(5 * sidae(a, b, 0.3).item())


def test_sidae_gradient_is_the_weights():
    a, b = torch.tensor(-0.3, requires_grad=True), torch.tensor(1.7, requires_grad=True)
    sidae(a, b, 0.3).backward()
    assert a.grad.item() == approx(0.3) and b.grad.item() == approx(0.7)


def pairs(B):
    """SimCLR's masks over 2B rows: the other view of the same image, and the row itself."""
    same = torch.eye(2 * B, dtype=torch.bool)
    return same.roll(B, 0), same


@pytest.mark.parametrize("B", [1, 3, 64])
@pytest.mark.parametrize("tau", [0.008, 0.1, 1.0])
def test_info_nce_of_equal_views_is_log_2B_minus_1(B, tau):
    positives, drop = pairs(B)
    assert info_nce(torch.ones(2 * B, 2 * B) / tau, positives, drop).item() == approx(math.log(2 * B - 1), abs=1e-5)
    assert info_nce(torch.ones(2 * B, 2 * B) / tau, positives).item() == approx(math.log(2 * B), abs=1e-5)


def test_info_nce_of_an_orthonormal_queue():
    K, tau = 7, 0.2
    q, queue = torch.eye(4, 16), torch.eye(16)[4 : 4 + K]  # MoCo: q = k, both orthogonal to the queue
    sim = torch.cat([torch.ones(4, 1), q @ queue.T], 1) / tau
    positives = torch.zeros(4, 1 + K, dtype=torch.bool)
    positives[:, 0] = True
    e = math.exp(1 / tau)
    assert info_nce(sim, positives).item() == approx(-math.log(e / (e + K)), rel=1e-5)


def test_info_nce_of_zero_scores():
    """AMDIM: one row per (anchor, location), the own image's other L - 1 locations dropped."""
    B, L = 4, 9
    image = torch.arange(B).repeat_interleave(L)
    positives = torch.eye(B * L, dtype=torch.bool)
    drop = (image[:, None] == image) & ~positives
    loss = info_nce(torch.zeros(B * L, B * L), positives, drop)
    assert loss.item() == approx(math.log(1 + (B - 1) * L), rel=1e-6)


def test_info_nce_laws():
    z, (positives, drop) = noise(12, 8), pairs(6)
    sim = cosines(z, z) / 0.1
    loss = info_nce(sim, positives, drop).item()
    assert loss > 0
    assert info_nce(sim + noise(12, 1, seed=1), positives, drop).item() == approx(loss, rel=1e-5)  # shift of a row
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert info_nce(sim[order], positives[order], drop[order]).item() == approx(loss, rel=1e-5)
    assert info_nce(sim[:, order], positives[:, order], drop[:, order]).item() == approx(loss, rel=1e-5)
    assert info_nce(cosines(5 * z, 5 * z) / 0.1, positives, drop).item() == approx(loss, rel=1e-5)
    all_but_positive = ~positives
    assert info_nce(sim, positives, all_but_positive).item() == approx(0, abs=1e-6)


def test_info_nce_gradient_pulls_positives_and_pushes_the_rest():
    sim, (positives, drop) = noise(12, 12, grad=True), pairs(6)
    info_nce(sim, positives, drop).backward()
    assert (sim.grad[positives] < 0).all() and (sim.grad[drop] == 0).all()
    assert (sim.grad[~positives & ~drop] > 0).all()
    assert torch.allclose(sim.grad.sum(1), torch.zeros(12), atol=1e-6)  # softmax: a row's gradient sums to 0


def test_info_nce_is_a_loop():
    sim, (positives, drop) = noise(12, 12), pairs(6)
    positives = positives | positives.roll(2, 0)  # several per row, but none dropped
    positives[3] = positives[3] & (torch.arange(12) == 9)  # and not equally many
    drop = drop & ~positives
    slow = 0.0
    for i in range(12):
        kept = [math.exp(sim[i, j].item()) for j in range(12) if not drop[i, j]]
        own = [j for j in range(12) if positives[i, j]]
        slow -= sum(math.log(math.exp(sim[i, j].item()) / sum(kept)) for j in own) / len(own) / 12
    assert info_nce(sim, positives, drop).item() == approx(slow, rel=1e-5)


def test_cosine_is_a_loop_in_float32():
    a, b = noise(5, 8), noise(4, 8, seed=1)
    got = cosines(3 * a, b / 7)
    for i in range(5):
        for j in range(4):
            assert got[i, j].item() == approx((a[i] @ b[j] / (a[i].norm() * b[j].norm())).item(), abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosines(3 * a, b / 7), got)


def white(B, D):
    """(B, D): every column of mean 0, variance 1 (with B - 1), and no two correlated."""
    z = noise(B, D, seed=5).double()
    q, _ = torch.linalg.qr(z - z.mean(0))
    return (q * math.sqrt(B - 1)).float()


def test_vicreg_closed_form():
    z = white(32, 8)
    assert [t.item() for t in vicreg(z, z)] == approx([0, 0, 0], abs=1e-6)
    s, v, c = vicreg(z, z + 2)  # the spread does not see where the cloud is
    assert (s.item(), v.item(), c.item()) == (approx(4, rel=1e-5), approx(0, abs=1e-6), approx(0, abs=1e-6))
    s, v, c = vicreg(torch.ones(32, 8), torch.ones(32, 8))  # collapse: the official value, not twice it
    assert (s.item(), v.item(), c.item()) == (0, approx(1 - 0.01, rel=1e-5), 0)
    s, v, c = vicreg(z, torch.ones(32, 8))
    assert v.item() == approx(0.99 / 2, rel=1e-4) and c.item() == approx(0, abs=1e-6)
    equal = z[:, :1].expand(-1, 8)  # all covariances 1: D (D - 1) / D in each view
    assert vicreg(equal, equal)[2].item() == approx(2 * 7, rel=1e-5)


def test_vicreg_is_a_loop():
    z1, z2 = noise(6, 4).double(), (0.3 * noise(6, 4, seed=1)).double()
    v = c = 0.0
    for z in (z1, z2):
        mean = [sum(z[:, d].tolist()) / 6 for d in range(4)]
        cov = [[sum((z[n, a].item() - mean[a]) * (z[n, b].item() - mean[b]) for n in range(6)) / 5 for a in range(4)]
               for b in range(4)]
        v += sum(max(0, 1 - math.sqrt(cov[d][d] + 1e-4)) for d in range(4)) / 4 / 2
        c += sum(cov[a][b] ** 2 for a in range(4) for b in range(4) if a != b) / 4
    s = sum((a - b) ** 2 for a, b in zip(z1.flatten().tolist(), z2.flatten().tolist(), strict=True)) / 24
    assert [t.item() for t in vicreg(z1, z2)] == approx([s, v, c], rel=1e-5)
    assert [t.item() for t in vicreg(z2.flip(0), z1.flip(0))] == approx([s, v, c], rel=1e-5)


def test_barlow_twins_closed_form():
    z = white(32, 8)
    assert barlow_twins(z, z).item() == approx(0, abs=1e-4)
    assert barlow_twins(z, -z).item() == approx(4 * 8, rel=1e-4)
    assert barlow_twins(z, z.roll(1, 1)).item() == approx(8 + 0.0051 * 8, rel=1e-4)
    equal = z[:, :1].expand(-1, 8)
    assert barlow_twins(equal, equal).item() == approx(0.0051 * 8 * 7, rel=1e-3)
    scale, shift = torch.rand(8) + 0.5, noise(8, seed=2)
    assert barlow_twins(scale * z + shift, z).item() == approx(0, abs=1e-4)  # each dimension is standardised


def test_barlow_twins_is_a_loop():
    z1, z2 = noise(6, 4), noise(6, 4, seed=1)
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    slow = 0.0
    for i in range(4):
        for j in range(4):
            c = sum((a[n, i] * b[n, j]).item() for n in range(6)) / 6
            slow += (1 - c) ** 2 if i == j else 0.0051 * c**2
    assert barlow_twins(z1, z2).item() == approx(slow, rel=1e-4)


def test_dino_closed_form():
    uniform, P = torch.zeros(4, 10), 10
    assert dino(uniform, uniform, torch.zeros(P), 0.1, 0.04).item() == approx(math.log(P))
    one_hot = 50 * torch.eye(4, 10)
    assert dino(one_hot, one_hot, torch.zeros(P), 0.1, 0.04).item() == approx(0, abs=1e-6)
    assert dino(one_hot, one_hot.roll(1, 1), torch.zeros(P), 10, 0.04).item() == approx(  # s / tau is 5 at the wrong one
        math.log(math.exp(5) + 9), rel=1e-5)
    assert dino(one_hot, uniform + 3, torch.zeros(P), 50, 0.04).item() == approx(  # s / tau is one-hot
        math.log(math.e + 9) - 1 / P, rel=1e-5)
    favourite = torch.eye(10)[3].expand(4, 10)
    assert dino(uniform, favourite, favourite[0], 0.1, 0.04).item() == approx(math.log(P))
    s = noise(4, 10, seed=1)
    centred = dino(s, favourite, favourite[0], 0.1, 0.04).item()  # what all images share is taken out
    assert centred == approx(dino(s, uniform, torch.zeros(P), 0.1, 0.04).item(), rel=1e-6)


def test_dino_is_a_loop_and_its_gradient_reaches_the_student_alone():
    s, t, centre = noise(3, 5, grad=True), noise(3, 5, seed=1, grad=True), noise(5, seed=2)
    slow = 0.0
    for n in range(3):
        e = [math.exp((t[n, k] - centre[k]).item() / 0.5) for k in range(5)]
        f = [math.exp(s[n, k].item() / 0.3) for k in range(5)]
        slow -= sum(e[k] / sum(e) * math.log(f[k] / sum(f)) for k in range(5)) / 3
    loss = dino(s, t, centre, 0.3, 0.5)
    loss.backward()
    assert loss.item() == approx(slow, rel=1e-5) and s.grad.abs().sum() > 0 and t.grad is None


def test_dot_and_soft_clip():
    a, b = noise(3, 16), noise(5, 16, seed=1)
    s = losses.dot(a, b, 0.25)
    assert s.shape == (3, 5) and s[1, 2].item() == approx(sum((a[1] * b[2]).tolist()) / 4, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.dot(a, b, 0.25), s)
    x = torch.tensor([0.0, 1e-3, 5.0, -1e9, 1e9])
    assert losses.soft_clip(x, 20.0).tolist() == approx([0, 1e-3, 20 * math.tanh(0.25), -20, 20])


SIX = torch.arange(6)
EXTREME = {  # of a and b (6, 4) at a scale
    "neg_cosine": lambda a, b, _: neg_cosine(a, b),
    "recon_mse": lambda a, b, _: recon_mse(a[:, :, None, None], b[:, :, None, None], "sum"),
    "sidae": lambda a, b, _: sidae(neg_cosine(a, b), recon_mse(a, b), 0.5) + 1,
    "info_nce": lambda a, b, _: info_nce(cosines(a, b) / 0.008, *pairs(3)),
    "nce": lambda a, b, _: losses.nce(losses.dot(a, b, 1.0), SIX[:, None] // 2 == SIX // 2),
    "vicreg": lambda a, b, _: sum(vicreg(a, b)),
    "barlow_twins": lambda a, b, _: barlow_twins(a, b),
    "dino, hot": lambda a, b, _: dino(a, b, torch.zeros(4), 1e4, 1e-4),
    "dino, cold": lambda a, b, _: dino(a, b, torch.zeros(4), 1e-4, 1e4),
    "cosine_embedding": lambda a, b, _: losses.cosine_embedding(a, b, SIX < 3, -0.9),
    "triplet": lambda a, b, scale: losses.triplet(a, b, b.flip(0), 10 * scale or 1),
}


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0, 1e6])
@pytest.mark.parametrize("name", EXTREME)
def test_losses_and_gradients_are_finite(name, scale):
    a, b = (scale * noise(6, 4)).requires_grad_(), scale * noise(6, 4, seed=1)
    loss = EXTREME[name](a, b, scale)
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all()
    assert name == "neg_cosine" or loss >= 0
