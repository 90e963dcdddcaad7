"""Siamese methods without negatives, beside SimSiam in `sidae.py`: what keeps each from collapse is in its loss."""

import torch
from torch import Tensor, nn

from .. import losses, networks
from ..config import RunConfig
from .base import Axes, Method, follow, momentum_copy, raised


class BYOL(Method):
    """BYOL (arXiv:2006.07733, eq. 2): each view's prediction meets the other's target projection, 2 - 2 cos, both summed.

    The target is a momentum copy of encoder and projector, in training mode; its momentum rises from `ema` to 1.
    Deviations: SGD for LARS, no blur at 32 pixels (the asymmetry left is solarisation of view 2), bilinear crops (official,
    at ImageNet: bicubic). Projector and predictor have a bias in their last layer and none before BatchNorm, lightly's form;
    the official code has it the other way round.
    """

    axes = Axes(augment="byol", encode="backbone + 2-layer projector, predictor on one side; momentum copy as target",
                extract="last vector per view", compare="cosine_similarity",
                loss="neg_cosine to the target, no negatives")  # fmt: skip
    reads = ("dim", "hidden", "pred_hidden", "ema")

    def __init__(self, config: RunConfig, classes: int = 0) -> None:
        super().__init__(config)
        c = config
        self.projector = networks.predictor(self.backbone.out_features, c.hidden, c.dim)
        self.predictor = networks.predictor(c.dim, c.pred_hidden)
        self.target = momentum_copy(self.backbone, self.projector)

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        z1, z2 = (self.projector(self.backbone(v)) for v in views)  # (B, D)
        with torch.no_grad():
            t1, t2 = (self.target(v) for v in views)
        loss = 4 + 2 * (losses.neg_cosine(self.predictor(z1), t2) + losses.neg_cosine(self.predictor(z2), t1))
        return {"loss": loss, "z": z1.detach()}

    def ahead(self, step: int, steps: int) -> dict[str, float | Tensor]:
        return {"m": raised(self.config.ema, step, steps)}

    def after_step(self, m: float | Tensor) -> None:
        follow(self.target, m, self.backbone, self.projector)


class VICReg(Method):
    """VICReg (arXiv:2105.04906): 25 invariance + 25 variance + covariance. Deviations: SGD for LARS, no blur at 32 pixels,
    bilinear crops (official, at ImageNet: bicubic), residual blocks that do not start at 0 unless `zero_init`."""

    axes = Axes(augment="byol", encode="backbone + 3-layer expander", extract="last vector per view",
                compare="mse_loss", loss="vicreg: invariance, variance, covariance; no negatives")  # fmt: skip
    reads = ("dim", "hidden")

    def __init__(self, config: RunConfig, classes: int = 0) -> None:
        super().__init__(config)
        self.projector = networks.projector(self.backbone.out_features, config.hidden, config.dim)[:-1]  # ends linear

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        z1, z2 = (self.projector(self.backbone(v)) for v in views)  # (B, D)
        s, v, c = losses.vicreg(z1, z2)
        return {"loss": 25 * s + 25 * v + c, "invariance": s, "variance": v, "covariance": c, "z": z1.detach()}


class BarlowTwins(VICReg):
    """Barlow Twins (arXiv:2103.03230), lambda = 0.0051, on the same expander. Deviations: VICReg's."""

    axes = Axes(augment="byol", encode="backbone + 3-layer projector", extract="last vector per view",
                compare="batch_norm, correlation of dimensions",
                loss="barlow_twins, distance to the identity, no negatives")  # fmt: skip

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        z1, z2 = (self.projector(self.backbone(v)) for v in views)  # (B, D)
        return {"loss": losses.barlow_twins(z1, z2), "z": z1.detach()}


class DINO(Method):
    """DINO without multi-crop (arXiv:2104.14294): the student predicts the centred, sharpened teacher of the other view.

    The teacher is a momentum copy, its momentum rises from `ema` to 1; its temperature is 0.04, the centre's momentum
    0.9. During the first epoch the prototypes get no gradient (weight decay alone keeps their directions). Records
    `teacher_entropy`: log P is one way to collapse, 0 the other. The head has the official code's three layers with its
    option for BatchNorm (lightly's for CIFAR has two). Deviations: no bias in the head, SGD for AdamW, no clipping, no blur
    at 32 pixels, bilinear crops (official, at ImageNet: bicubic).
    """

    axes = Axes(augment="dino", encode="backbone + 3-layer projector + prototypes; momentum copy as teacher",
                extract="scores of the last vector per view", compare="cosine with each prototype",
                loss="dino, cross-entropy with the centred teacher, no negatives")  # fmt: skip
    reads = ("dim", "hidden", "tau", "ema", "prototypes")
    TAU_T = 0.04

    def __init__(self, config: RunConfig, classes: int = 0) -> None:
        super().__init__(config)
        self.projector = networks.projector(self.backbone.out_features, config.hidden, config.dim)[:-1]
        self.projector[2], self.projector[5] = nn.GELU(), nn.GELU()
        self.prototypes = nn.Linear(config.dim, config.prototypes, bias=False)  # P directions, compared by cosine
        self.teacher = momentum_copy(self.backbone, self.projector, self.prototypes)
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.register_buffer("frozen", torch.tensor(True))

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        z1, z2 = (self.projector(self.backbone(v)) for v in views)  # (B, D)
        weight = torch.where(self.frozen, self.prototypes.weight.detach(), self.prototypes.weight)
        s1, s2 = (losses.cosine(z, weight) for z in (z1, z2))  # (B, P)
        with torch.no_grad():
            t1, t2 = (losses.cosine(self.teacher[:2](v), self.teacher[2].weight) for v in views)
            self.staged = t = torch.cat([t1, t2])
            entropy = losses.dino(t - self.centre, t, self.centre, self.TAU_T, self.TAU_T)  # with itself
        loss = sum(losses.dino(s, t, self.centre, self.config.tau, self.TAU_T) for s, t in ((s1, t2), (s2, t1))) / 2
        return {"loss": loss, "z": z1.detach(), "teacher_entropy": entropy}

    def ahead(self, step: int, steps: int) -> dict[str, float | Tensor]:
        return {"m": raised(self.config.ema, step, steps), "frozen": step / steps < 1 / self.config.epochs}

    def after_step(self, m: float | Tensor, frozen: float | Tensor) -> None:
        self.centre.lerp_(self.staged.mean(0), 0.1)
        self.frozen.fill_(frozen)
        follow(self.teacher, m, self.backbone, self.projector, self.prototypes)
