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
