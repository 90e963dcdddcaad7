"""Losses as pure functions of tensors: no state, no networks. Imports torch alone."""

import torch
import torch.nn.functional as F
from torch import Tensor


def neg_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Negative cosine similarity D(p, z), SimSiam eq. 1 (arXiv:2011.10566).

    p: (B, D) predictor output, receives the gradient.  z: (B, D) projection, held constant here (stop-gradient).
    Inputs need not be normalised. Returns a scalar in [-1, 1], the mean over the batch; -1 = the views agree.
    """
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


def recon_mse(x_hat: Tensor, x: Tensor, reduction: str = "mean") -> Tensor:
    """Squared reconstruction error of the denoising autoencoder, SidAE Sec. 3.2 (arXiv:2304.02549).

    x_hat: (B, C, S, S) decoder output, receives the gradient.  x: (B, C, S, S) target on the same scale.
    reduction: "mean" over all elements, or "sum" over an image's elements and mean over the batch (the paper does not
    say). Returns a scalar >= 0; on standardised targets a constant prediction of the mean gives about 1.
    """
    mse = F.mse_loss(x_hat, x)
    return mse if reduction == "mean" else mse * x[0].numel()


def sidae(l_si: Tensor, l_dae: Tensor, w: Tensor | float) -> Tensor:
    """SidAE's combination L = w L_si + (1 - w) L_dae (arXiv:2304.02549, Sec. 3.2; the weights are our reading).

    l_si: scalar in [-1, 1].  l_dae: scalar >= 0.  w: in [0, 1]; 1 = SimSiam, 0 = denoising autoencoder.
    """
    return w * l_si + (1 - w) * l_dae


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a (N, D) with every row of b (M, D): (N, M) in [-1, 1]; the gradient flows to both.

    In float32 also under autocast: bfloat16 would round a score of 1 / tau = 10 by up to 0.03.
    """
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T


def cosine_embedding(a: Tensor, b: Tensor, same: Tensor, margin: float = 0.0) -> Tensor:
    """Cosine embedding loss (torch's; the student report's Sec. 3.4.2): the mean over pairs of 1 - cos(a, b) where `same`
    (B,), of max(0, cos(a, b) - margin) elsewhere. a, b: (B, D), need not be normalised. Returns a scalar >= 0."""
    return F.cosine_embedding_loss(a, b, 2.0 * same - 1, margin)


def triplet(a: Tensor, p: Tensor, n: Tensor, margin: float = 1.0, distance: str = "euclidean") -> Tensor:
    """Triplet margin loss (torch's; the student report's Sec. 3.4.3): the mean of max(0, margin + d(a, p) - d(a, n)) over
    anchors, positives, negatives (B, D). distance: euclidean, or cosine, 1 - cos in [0, 2]; with cosine, margin 1 and no
    negative cosine it is twice `cosine_embedding` of the two pairs. Returns a scalar >= 0."""
    d = F.pairwise_distance if distance == "euclidean" else lambda u, v: 1 - F.cosine_similarity(u, v)
    return F.triplet_margin_with_distance_loss(a, p, n, distance_function=d, margin=margin)


def info_nce(sim: Tensor, positives: Tensor, drop: Tensor | None = None) -> Tensor:
    """Mean over rows of -log softmax at the positives (arXiv:1807.03748; averaged over positives as SupCon L_out).

    sim: (N, M) similarity / temperature.  positives: (N, M) bool, at least one per row.  drop: (N, M) bool, left out of
    the sum (self-pairs, suspected false negatives). Returns a scalar >= 0; with all views equal and one positive per
    row it is log(M - dropped).
    """
    if drop is not None:
        sim = sim.masked_fill(drop, float("-inf"))
    log_p = sim - sim.logsumexp(dim=1, keepdim=True)
    return -(torch.where(positives, log_p, 0.0).sum(1) / positives.sum(1)).mean()


def vicreg(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance s, variance v and covariance c of VICReg (arXiv:2105.04906, eq. 1 to 5); the loss is 25 s + 25 v + c.

    z1, z2: (B, D), not normalised, B > 1; the gradient flows to both. Each scalar is >= 0: s the mean squared
    difference, v the mean over both views of the hinge 1 - std (eps 1e-4), c the sum over both views of the squared
    covariances off the diagonal, over D. As the official code; the paper's pseudocode adds the views in v too, twice it.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = z1.float(), z2.float()
        v, c = z1.new_zeros(()), z1.new_zeros(())
        for z in (z1, z2):
            v = v + F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
            z = z - z.mean(0)
            c = c + 2 * (z.T @ z / (len(z) - 1)).triu(1).square().sum() / z.shape[1]  # symmetric: twice its upper half
        return F.mse_loss(z1, z2), v, c


def barlow_twins(z1: Tensor, z2: Tensor, weight: float = 0.0051) -> Tensor:
    """Barlow Twins: sum_i (1 - C_ii)^2 + weight sum_{i != j} C_ij^2 (arXiv:2103.03230, eq. 1).

    C (D, D) is the correlation of the views' dimensions over the batch. z1, z2: (B, D), B > 1, standardised here; the
    gradient flows to both. Returns a scalar >= 0; 0 = equal views whose dimensions are uncorrelated.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (F.batch_norm(z.float(), None, None, training=True) for z in (z1, z2))
        c = z1.T @ z2 / len(z1)
    return (1 - c.diagonal()).square().sum() + weight * c.square().fill_diagonal_(0).sum()


def dino(s: Tensor, t: Tensor, centre: Tensor, tau: float, tau_t: float) -> Tensor:
    """Cross-entropy of softmax((t - centre) / tau_t) and softmax(s / tau) (arXiv:2104.14294, eq. 2 and Algorithm 1).

    s: (B, P) the student's scores, receives the gradient.  t: (B, P) the teacher's, held constant here.  centre: (P,).
    Returns a scalar >= 0, the mean over the batch; log P when either is uniform and the other too.
    """
    p = F.softmax((t.detach() - centre) / tau_t, dim=1)
    return -(p * F.log_softmax(s / tau, dim=1)).sum(1).mean()


def nce(sim: Tensor, positives: Tensor, drop: Tensor | None = None) -> Tensor:
    """Like `info_nce`, but each positive stands against the negatives alone, not against its fellows: AMDIM's loss
    (arXiv:1906.00910, eq. 4) where every place of the other view is a positive.

    Shapes as there; a row needs a negative. Returns a scalar >= 0; all scores equal -> log(1 + negatives of a row).
    """
    apart = positives if drop is None else positives | drop
    negatives = sim.masked_fill(apart, float("-inf")).logsumexp(1, keepdim=True)
    each = F.softplus(negatives - sim)  # -log(e^s / (e^s + sum over negatives))
    return (torch.where(positives, each, 0.0).sum(1) / positives.sum(1)).mean()


def dot(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """(N, M) scores scale <a_i, b_j> of a (N, D) and b (M, D)."""
    return scale * (a @ b.mT)


def soft_clip(s: Tensor, c: float) -> Tensor:
    """c tanh(s / c): scores within (-c, c), the identity near 0 (arXiv:1906.00910, Sec. 3.4)."""
    return c * torch.tanh(s / c)
