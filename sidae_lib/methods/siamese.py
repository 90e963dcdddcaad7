"""Around the paper: Siamese methods without negatives.

Each prevents collapse in its own way. SimSiam is one of them too; it stands above, in `sidae.py`.
"""

import torch
from torch import Tensor, nn

from .. import losses, networks
from ..config import RunConfig
from .base import Axes, Batch, Look, Method, MomentumCopy, Views, raised


class BYOL(Method, name="byol"):
    """BYOL (arXiv:2006.07733, eq. 2): one view predicts what a momentum copy makes of the other.
    The prediction q(z) is compared with this target z' by their cosine. The loss is the sum of both
    directions, the second one with a tilde. The predictor q and the slow target, which no gradient reaches,
    prevent collapse. The target network is a copy of encoder and projector, in training mode. Its weights xi
    follow the network's weights theta, with a momentum that rises from `ema` to 1.

    Deviations: the augmentations of the two views differ by solarisation alone; projector and predictor have a
    bias in their last layer and none before BatchNorm, as in the library lightly (the official code has it the
    other way round)."""

    look = Look("BYOL", "#CC79A7", "P")
    axes = Axes(augment="byol",
                encode="backbone + 2-layer projector, predictor on one side; momentum copy as target",
                extract="last vector per view", compare="cosine_similarity",
                loss="neg_cosine to the target, no negatives")
    equation = r"""L &= L_{\theta,\xi} + \tilde L_{\theta,\xi} \\ L_{\theta,\xi} &= 2 - 2 \,
        \frac{\langle q_\theta(z_\theta), z'_\xi \rangle}{\|q_\theta(z_\theta)\| \, \|z'_\xi\|}"""
    reads = ("dim", "hidden", "pred_hidden", "ema")

    def __init__(self, c: RunConfig, classes: int = 0) -> None:
        super().__init__(c)
        self.projector = networks.predictor(self.backbone.out_features, c.hidden, c.dim)
        self.predictor = networks.predictor(c.dim, c.pred_hidden)
        self.target = MomentumCopy(self.backbone, self.projector)

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        z1, z2 = map(self.embed, views)  # (B, D)
        with torch.no_grad():
            t1, t2 = map(self.target, views)  # (B, D)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return {"loss": 4 + 2 * (losses.neg_cosine(p1, t2) + losses.neg_cosine(p2, t1)), "z": z1.detach()}

    def ahead(self, step: int, steps: int) -> dict[str, float | Tensor]:
        return {"m": raised(self.config.ema, step, steps)}

    def after_step(self, m: float | Tensor) -> None:
        self.target.follow(m)


class VICReg(Method, name="vicreg"):
    """VICReg (arXiv:2105.04906, eq. 1 to 6) adds three terms: 25 invariance + 25 variance + covariance.
    Z and Z' hold the projections of the two views: n images z_i as rows, d dimensions z^j as columns.
    The invariance s compares the two views by their squared difference. The variance v prevents collapse: in
    every dimension the standard deviation over the batch should reach 1. The covariance c, from the
    covariance matrix C, keeps dimensions from repeating each other. As in the official code, s is the mean
    over all elements, and v is the mean over both views."""

    look = Look("VICReg", "#882255", "X")
    axes = Axes(augment="byol", encode="backbone + 3-layer expander", extract="last vector per view",
                compare="mse_loss", loss="vicreg: invariance, variance, covariance; no negatives")
    equation = r"""\ell &= 25 \, s + \tfrac{25}{2} [v(Z) + v(Z')] + c(Z) + c(Z') \\
        s &= \tfrac{1}{nd} \sum_i \|z_i - z'_i\|^2 \\
        v(Z) &= \tfrac1d \sum_j \max \big( 0, 1 - \sqrt{\mathrm{Var}(z^j) + 10^{-4}} \big) \\
        c(Z) &= \tfrac1d \sum_{i \ne j} [C(Z)]_{i,j}^2"""
    reads = ("dim", "hidden")

    def __init__(self, c: RunConfig, classes: int = 0) -> None:
        super().__init__(c)
        self.projector = networks.projector(self.backbone.out_features, c.hidden, c.dim)[:-1]  # ends linear

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        z1, z2 = map(self.embed, views)  # (B, D)
        s, v, c = losses.vicreg(z1, z2)
        terms = {"invariance": s, "variance": v, "covariance": c}
        return {"loss": 25 * s + 25 * v + c, **terms, "z": z1.detach()}


class DINO(Method, name="dino"):
    """DINO without multi-crop (arXiv:2104.14294, eq. 2): a student predicts what a teacher says of the other
    view. Both give a score g to each of many prototypes, which are learned directions. A softmax makes these
    scores probabilities P, and the cross-entropy H compares the student's, P_s, with the teacher's, P_t. The
    teacher is a momentum copy of the student; its momentum rises from `ema` to 1. Two things prevent collapse:
    the centre c, a running mean of the teacher's scores, and its low temperature. In the first epoch the
    prototypes get no gradient; weight decay only shortens them. It records `teacher_entropy`. Two values show
    a collapse: 0, and the logarithm of the number of prototypes.

    Deviations: the head, of three layers with BatchNorm, has no bias; gradients are not clipped."""

    look = Look("DINO", "#999933", "p")
    axes = Axes(augment="dino", encode="backbone + 3-layer projector + prototypes; momentum copy as teacher",
                extract="scores of the last vector per view", compare="cosine with each prototype",
                loss="dino, cross-entropy with the centred teacher, no negatives")
    equation = r"""L &= \tfrac12 H(P_t(x_1), P_s(x_2)) + \tfrac12 H(P_t(x_2), P_s(x_1)) \\
        P_t &= \mathrm{softmax}((g_{\theta_t} - c) / \tau_t) \\
        P_s &= \mathrm{softmax}(g_{\theta_s} / \tau_s), \quad H(a, b) = -a \log b"""
    reads = ("dim", "hidden", "tau", "ema", "prototypes")
    TAU_T = 0.04

    def __init__(self, c: RunConfig, classes: int = 0) -> None:
        super().__init__(c)
        self.projector = networks.projector(self.backbone.out_features, c.hidden, c.dim)[:-1]
        self.projector[2], self.projector[5] = nn.GELU(), nn.GELU()
        self.prototypes = nn.Linear(c.dim, c.prototypes, bias=False)  # P directions, compared by cosine
        self.teacher = MomentumCopy(self.backbone, self.projector, self.prototypes)
        self.register_buffer("centre", torch.zeros(c.prototypes))
        self.register_buffer("frozen", torch.tensor(True))

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        z1, z2 = map(self.embed, views)  # (B, D)
        w, tau, tau_t = self.prototypes.weight, self.config.tau, self.TAU_T
        w = torch.where(self.frozen, w.detach(), w)
        s1, s2 = (losses.cosine(z, w) for z in (z1, z2))  # (B, P)
        with torch.no_grad():
            backbone, projector, last = self.teacher
            t1, t2 = (losses.cosine(projector(backbone(v)), last.weight) for v in views)  # (B, P)
            self.staged = t = torch.cat([t1, t2])
            entropy = losses.dino(t - self.centre, t, self.centre, tau_t, tau_t)  # with itself
        loss = losses.dino(s1, t2, self.centre, tau, tau_t) + losses.dino(s2, t1, self.centre, tau, tau_t)
        return {"loss": loss / 2, "z": z1.detach(), "teacher_entropy": entropy}

    def ahead(self, step: int, steps: int) -> dict[str, float | Tensor]:
        return {"m": raised(self.config.ema, step, steps), "frozen": step / steps < 1 / self.config.epochs}

    def after_step(self, m: float | Tensor, frozen: float | Tensor) -> None:
        self.centre.lerp_(self.staged.mean(0), 0.1)
        self.frozen.fill_(frozen)
        self.teacher.follow(m)


class BarlowTwins(VICReg, name="barlow_twins"):
    """Barlow Twins (arXiv:2103.03230, eq. 1) correlates the dimensions of the two views' projections.
    C_ij is the correlation, over the images b of a batch, of dimension i of view A with dimension j of view B;
    each z is centred first. C is compared with the identity matrix. Ones on its diagonal make the views agree
    and every dimension vary. Zeros elsewhere keep dimensions from repeating each other. Together they prevent
    collapse. Here lambda = 0.0051, and the projector is VICReg's expander."""

    look = Look("Barlow Twins", "#44AA99", "h")
    axes = Axes(augment="byol", encode="backbone + 3-layer projector", extract="last vector per view",
                compare="batch_norm, correlation of dimensions",
                loss="barlow_twins, distance to the identity, no negatives")
    equation = r"""L &= \sum_i (1 - C_{ii})^2 + \lambda \sum_i \sum_{j \ne i} C_{ij}^2 \\ C_{ij} &=
        \frac{\sum_b z^A_{b,i} \, z^B_{b,j}}{\sqrt{\sum_b (z^A_{b,i})^2} \sqrt{\sum_b (z^B_{b,j})^2}}"""

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        z1, z2 = map(self.embed, views)  # (B, D)
        return {"loss": losses.barlow_twins(z1, z2), "z": z1.detach()}
