"""Losses as pure functions of tensors: no state, no networks. Imports torch alone.

They are scalars, means over the batch. Scores are float32 under autocast too: bfloat16 would round a cosine
over tau = 0.1 by up to 0.03.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def neg_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Negative cosine similarity D(p, z) in [-1, 1], SimSiam eq. 1 (arXiv:2011.10566); -1 = the views agree.
    p: (B, D) predictor output, receives the gradient.  z: (B, D) projection, constant (stop-gradient)."""
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


def recon_mse(x_hat: Tensor, x: Tensor, reduction: str = "mean") -> Tensor:
    """Squared reconstruction error of the denoising autoencoder, SidAE Sec. 3.2 (arXiv:2304.02549).
    x_hat, x: (B, C, S, S) decoder output and target; the mean of a standardised target gives about 1.
    reduction: over an image's elements, "mean" or "sum" (the paper does not say)."""
    mse = F.mse_loss(x_hat, x)
    return mse if reduction == "mean" else mse * x[0].numel()


def sidae(l_si: Tensor, l_dae: Tensor, w: Tensor | float) -> Tensor:
    """SidAE's L = w L_si + (1 - w) L_dae, w in [0, 1] (Sec. 3.2, which gives no weights: our reading)."""
    return w * l_si + (1 - w) * l_dae


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a (N, D) with every row of b (M, D): (N, M); the gradient flows to both."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T


def dot(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """(N, M) scores scale <a_i, b_j> of a (N, D) and b (M, D)."""
    with torch.autocast(a.device.type, enabled=False):
        return scale * (a.float() @ b.float().mT)


def soft_clip(s: Tensor, c: float) -> Tensor:
    """c tanh(s / c): scores within (-c, c), the identity near 0 (arXiv:1906.00910, Sec. 3.4)."""
    return c * torch.tanh(s / c)


def info_nce(sim: Tensor, positives: Tensor, drop: Tensor | None = None) -> Tensor:
    """Mean over rows of -log softmax at the positives (arXiv:1807.03748), their mean as SupCon's L_out.
    sim: (N, M) similarity / temperature.  positives: (N, M) bool, at least one per row.  drop: (N, M) bool,
    left out of the sum. Where all views are equal and a row has one positive it is log(M - dropped)."""
    if drop is not None:
        sim = sim.masked_fill(drop, float("-inf"))
    log_p = sim - sim.logsumexp(dim=1, keepdim=True)
    return -(torch.where(positives, log_p, 0.0).sum(1) / positives.sum(1)).mean()


def nce(sim: Tensor, positives: Tensor, drop: Tensor | None = None) -> Tensor:
    """`info_nce` in which a positive stands against negatives alone, AMDIM's loss (arXiv:1906.00910, eq. 4).
    A row needs a negative. Where all scores are equal it is log(1 + negatives of a row)."""
    no_negative = positives if drop is None else positives | drop
    negatives = sim.masked_fill(no_negative, float("-inf")).logsumexp(1, keepdim=True)
    each = F.softplus(negatives - sim)  # -log(e^s / (e^s + sum over negatives))
    return (torch.where(positives, each, 0.0).sum(1) / positives.sum(1)).mean()


def vicreg(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance s, variance v, covariance c of VICReg (arXiv:2105.04906, eq. 1 to 5); z1, z2: (B, D), B > 1.
    s: mean squared difference.  v: hinge 1 - std (eps 1e-4), the mean over both views as in the official code
    (the paper's pseudocode: the sum).  c: squared covariances off the diagonal / D, summed over both."""
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = z1.float(), z2.float()
        v, c = z1.new_zeros(()), z1.new_zeros(())
        for z in (z1, z2):
            v = v + F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
            z = z - z.mean(0)
            cov = z.T @ z / (len(z) - 1)  # (D, D), symmetric: twice its upper half
            c = c + 2 * cov.triu(1).square().sum() / z.shape[1]
        return F.mse_loss(z1, z2), v, c


def barlow_twins(z1: Tensor, z2: Tensor, weight: float = 0.0051) -> Tensor:
    """Barlow Twins: sum_i (1 - C_ii)^2 + weight sum_{i != j} C_ij^2 >= 0 (arXiv:2103.03230, eq. 1).
    C (D, D): correlation over the batch of the dimensions of z1 and z2 (B, D), B > 1."""
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (F.batch_norm(z.float(), None, None, training=True) for z in (z1, z2))
        c = z1.T @ z2 / len(z1)
    return (1 - c.diagonal()).square().sum() + weight * c.square().fill_diagonal_(0).sum()


def dino(s: Tensor, t: Tensor, centre: Tensor, tau: float, tau_t: float) -> Tensor:
    """Cross-entropy of softmax((t - centre) / tau_t) and softmax(s / tau), DINO eq. 2 (arXiv:2104.14294).
    s: (B, P) the student's scores, get the gradient.  t: (B, P) the teacher's, constant.  centre: (P,)."""
    p = F.softmax((t.detach() - centre) / tau_t, dim=1)
    return -(p * F.log_softmax(s / tau, dim=1)).sum(1).mean()


def cosine_embedding(a: Tensor, b: Tensor, same: Tensor, margin: float = 0.0) -> Tensor:
    """torch's cosine embedding loss of pairs a, b (B, D), the student report's Sec. 3.4.2: 1 - cos(a, b)
    where `same` (B,), max(0, cos(a, b) - margin) elsewhere."""
    return F.cosine_embedding_loss(a, b, 2.0 * same - 1, margin)


def triplet(a: Tensor, p: Tensor, n: Tensor, margin: float = 1.0, distance: str = "euclidean") -> Tensor:
    """torch's triplet margin loss max(0, margin + d(a, p) - d(a, n)) of anchors, positives, negatives (B, D),
    the student report's Sec. 3.4.3. distance: euclidean, or cosine, 1 - cos; so, with margin 1 and no
    negative cosine, it is twice `cosine_embedding` of the two pairs."""
    d = F.pairwise_distance if distance == "euclidean" else lambda u, v: 1 - F.cosine_similarity(u, v)
    return F.triplet_margin_with_distance_loss(a, p, n, distance_function=d, margin=margin)
