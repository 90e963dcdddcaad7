"""Losses: closed-form values, scale and permutation laws, gradient routing, a slow loop, and extreme inputs."""

import math

import pytest
import torch
from pytest import approx

from sidae_lib.losses import barlow_twins, dino, info_nce, neg_cosine, recon_mse, sidae, vicreg
from sidae_lib.losses import cosine as cosines


def noise(*shape, seed=0, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


# --- neg_cosine: SimSiam eq. 1 --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("batch", [1, 4096])
def test_neg_cosine_is_finite(scale, batch):
    p, z = (scale * noise(batch, 4)).requires_grad_(), scale * noise(batch, 4, seed=1)
    loss = neg_cosine(p, z)
    loss.backward()
    assert -1 <= loss.item() <= 1 and p.grad.isfinite().all()
    zero = torch.zeros(2, 4, requires_grad=True)
    neg_cosine(zero, z[:1].expand(2, 4)).backward()
    assert zero.grad.isfinite().all()


# --- recon_mse: the denoising autoencoder ---------------------------------------------------------------------------


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
              for p, q in zip(x_hat, x, strict=True)]  # fmt: skip
    assert recon_mse(x_hat, x, "sum").item() == approx(sum(images) / 2, rel=1e-5)
    assert recon_mse(x_hat, x).item() == approx(sum(images) / 2 / 48, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_recon_mse_is_finite(scale):
    for batch in (1, 512):
        x_hat = (scale * noise(batch, 1, 8, 8)).requires_grad_()
        loss = recon_mse(x_hat, torch.zeros(batch, 1, 8, 8), "sum")
        loss.backward()
        assert loss.isfinite() and loss > 0 and x_hat.grad.isfinite().all()


# --- the SidAE combination ------------------------------------------------------------------------------------------


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


def test_sidae_is_a_loop_over_w_and_finite():
    for w in [k / 10 for k in range(11)]:
        for l_si, l_dae in ((-1.0, 0.0), (1.0, 3e6), (-1e-30, 1e30)):
            loss = sidae(torch.tensor(l_si), torch.tensor(l_dae), w)
            assert loss.isfinite() and loss.item() == approx(w * l_si + (1 - w) * l_dae, rel=1e-6)


# --- info_nce -------------------------------------------------------------------------------------------------------


def pairs(B):
    """SimCLR's masks over 2B rows: the other view of the same image, and the row itself."""
    same = torch.eye(2 * B, dtype=torch.bool)
    return same.roll(B, 0), same


def cosine(z):
    z = torch.nn.functional.normalize(z, dim=1)
    return z @ z.T


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
    sim = cosine(z) / 0.1
    loss = info_nce(sim, positives, drop).item()
    assert loss > 0
    assert info_nce(sim + noise(12, 1, seed=1), positives, drop).item() == approx(loss, rel=1e-5)  # shift of a row
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert info_nce(sim[order], positives[order], drop[order]).item() == approx(loss, rel=1e-5)
    assert info_nce(sim[:, order], positives[:, order], drop[:, order]).item() == approx(loss, rel=1e-5)
    assert info_nce(cosine(5 * z) / 0.1, positives, drop).item() == approx(loss, rel=1e-5)
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


@pytest.mark.parametrize("B", [1, 4, 256])
def test_info_nce_is_finite_at_a_low_temperature(B):
    z, (positives, drop) = noise(2 * B, 16, grad=True), pairs(B)
    loss = info_nce(cosine(z) / 0.008, positives, drop)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()
    opposite = info_nce(-(cosine(z.detach()) / 0.008), positives, drop)
    assert opposite.isfinite() and opposite >= 0


# --- cosine ---------------------------------------------------------------------------------------------------------


def test_cosine_is_a_loop_in_float32():
    a, b = noise(5, 8), noise(4, 8, seed=1)
    got = cosines(3 * a, b / 7)
    for i in range(5):
        for j in range(4):
            assert got[i, j].item() == approx((a[i] @ b[j] / (a[i].norm() * b[j].norm())).item(), abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosines(3 * a, b / 7), got)


# --- VICReg ---------------------------------------------------------------------------------------------------------


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
               for b in range(4)]  # fmt: skip
        v += sum(max(0, 1 - math.sqrt(cov[d][d] + 1e-4)) for d in range(4)) / 4 / 2
        c += sum(cov[a][b] ** 2 for a in range(4) for b in range(4) if a != b) / 4
    s = sum((a - b) ** 2 for a, b in zip(z1.flatten().tolist(), z2.flatten().tolist(), strict=True)) / 24
    assert [t.item() for t in vicreg(z1, z2)] == approx([s, v, c], rel=1e-5)
    assert [t.item() for t in vicreg(z2.flip(0), z1.flip(0))] == approx([s, v, c], rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_vicreg_gradient_reaches_both_views_and_is_finite(scale):
    z1, z2 = (scale * noise(8, 4)).requires_grad_(), (scale * noise(8, 4, seed=1)).requires_grad_()
    terms = vicreg(z1, z2)
    (25 * terms[0] + 25 * terms[1] + terms[2]).backward()
    assert all(t.isfinite() and t >= 0 for t in terms) and z1.grad.isfinite().all() and z2.grad.isfinite().all()
    assert scale == 0 or ((z1.grad.abs().sum() > 0) and (z2.grad.abs().sum() > 0))


# --- Barlow Twins ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_barlow_twins_gradient_reaches_both_views_and_is_finite(scale):
    z1, z2 = (scale * noise(8, 4)).requires_grad_(), (scale * noise(8, 4, seed=1)).requires_grad_()
    loss = barlow_twins(z1, z2)
    loss.backward()
    assert loss.isfinite() and loss >= 0 and z1.grad.isfinite().all() and z2.grad.isfinite().all()
    assert scale == 0 or ((z1.grad.abs().sum() > 0) and (z2.grad.abs().sum() > 0))


# --- DINO -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("tau", [1e-4, 1e4])
def test_dino_is_finite_at_extreme_temperatures(tau):
    s, t = noise(8, 50, grad=True), noise(8, 50, seed=1)
    for tau_t in (1e-4, 1e4):
        s.grad = None
        loss = dino(s, t, torch.zeros(50), tau, tau_t)
        loss.backward()
        assert loss.isfinite() and loss >= 0 and s.grad.isfinite().all()
