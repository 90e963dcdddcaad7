"""SidAE, and the two methods it joins: "Self-Supervised Siamese Autoencoders" (arXiv:2304.02549) on one screen."""

import torch
from torch import Tensor, nn

from .. import losses, networks
from ..config import RunConfig
from .base import Axes, Method

_NETWORK = ("dim", "hidden", "proj_affine")
_SIAMESE = ("pred_hidden", "predictor_lr")
_DECODER = ("decoder", "target", "recon", "recon_target", "output")


class SidAE(Method):
    """Siamese denoising autoencoder, Sec. 3.2: L = w L_si + (1 - w) L_dae.

    w = 1 is SimSiam and runs no decoder, w = 0 the denoising autoencoder and runs no predictor.
    """

    axes = Axes(augment="simsiam_cifar", encode="backbone + 3-layer projector; predictor and decoder on top",
                extract="last vector per view", compare="cosine_similarity; mse_loss",
                loss="sidae of neg_cosine with stop-gradient and recon_mse, no negatives")  # fmt: skip
    reads = ("w", *_NETWORK, *_SIAMESE, *_DECODER)
    fixed_w: float | None = None

    def __init__(self, config: RunConfig, classes: int = 0) -> None:
        super().__init__(config)
        c = config
        self.w = c.w if self.fixed_w is None else self.fixed_w
        self.projector = networks.projector(self.backbone.out_features, c.hidden, c.dim, c.proj_affine)
        self.predictor = networks.predictor(c.dim, c.pred_hidden) if self.w > 0 else None
        self.decoder: nn.Module | None = None
        if self.w < 1:
            self.decoder = networks.Decoder(c.dim, width=c.decoder, channels=c.channels, size=c.size, output=c.output)

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        z1, z2 = (self.projector(self.backbone(v)) for v in views)  # f: encoder with projector, Fig. 2    (B, D)
        out = {"z": z1.detach(), **self.terms(z1, z2, views, batch)}
        if len(out) == 3:
            out["loss"] = losses.sidae(out["l_si"], out["l_dae"], batch.get("w", self.w))
        else:
            out["loss"] = out["l_si"] if self.decoder is None else out["l_dae"]
        return out

    def terms(self, z1: Tensor, z2: Tensor, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        if self.predictor is not None:
            p1, p2 = self.predictor(z1), self.predictor(z2)  # h                                           (B, D)
            out["l_si"] = (losses.neg_cosine(p1, z2) + losses.neg_cosine(p2, z1)) / 2  # eq. 1
        if self.decoder is not None:
            t1, t2 = self.targets(views, batch)  # the undisturbed image, Sec. 3.1
            e1, e2 = (losses.recon_mse(self.decoder(z), t, self.config.recon) for z, t in ((z1, t1), (z2, t2)))  # g
            out["l_dae"] = (e1 + e2) / 2  # no stop-gradient: the decoder's gradient reaches the backbone
        return out

    def gauges(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What w really balances: the norm of each term's gradient at (z1, z2), before w."""
        if self.predictor is None or self.decoder is None:
            return {}
        z = [self.projector(self.backbone(v)).detach().requires_grad_() for v in views]
        return {k.replace("l_", "grad_"): torch.cat(torch.autograd.grad(term, z)).norm()
                for k, term in self.terms(*z, views, batch).items()}  # type: ignore[call-arg]

    def targets(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        t = (batch["x1"], batch["x2"]) if self.config.recon_target == "clean" else views
        return t if self.config.target == "standardised" else tuple(x * batch["std"] + batch["mean"] for x in t)


class SimSiam(SidAE):
    """SimSiam (arXiv:2011.10566): SidAE at w = 1. Deviations: a literal lr, cosine on the predictor too, residual blocks that
    do not start at 0 unless `zero_init`."""

    axes = Axes(augment="simsiam_cifar", encode="backbone + 3-layer projector, predictor on one side",
                extract="last vector per view", compare="cosine_similarity",
                loss="neg_cosine with stop-gradient, no negatives")  # fmt: skip
    reads = (*_NETWORK, *_SIAMESE)
    fixed_w = 1.0


class DenoisingAutoencoder(SidAE):
    """The paper's autoencoder: SidAE at w = 0, two noisy views, each reconstructed to the clean image (Sec. 4.1)."""

    axes = Axes(augment="simsiam_cifar", encode="backbone + 3-layer projector, decoder on top",
                extract="last vector per view", compare="mse_loss", loss="recon_mse, no negatives")  # fmt: skip
    reads = (*_NETWORK, *_DECODER)
    fixed_w = 0.0
