"""The paper's methods: SidAE and the two that it joins.

The paper is "Self-Supervised Siamese Autoencoders" (arXiv:2304.02549).
"""

import torch
from torch import Tensor

from .. import losses, networks
from ..config import RunConfig
from .base import Axes, Batch, Look, Method, Views

NETWORK = ("dim", "hidden", "proj_affine")
SIAMESE = ("pred_hidden", "predictor_lr")
DECODER = ("decoder", "target", "recon", "recon_target", "output")
# What the equations of these methods share.
L_SI = r"\tfrac12 D(p_1, \mathrm{sg}(z_2)) + \tfrac12 D(p_2, \mathrm{sg}(z_1))"
L_DAE = r"\tfrac12 \mathrm{MSE}(\hat x_1, x) + \tfrac12 \mathrm{MSE}(\hat x_2, x)"
COSINE = r"D(p, z) &= -\frac{\langle p, z \rangle}{\|p\| \, \|z\|}"


class SidAE(Method, name="sidae"):
    """SidAE, the Siamese denoising autoencoder (arXiv:2304.02549, Sec. 3.2), joins two losses by a weight w.
    SimSiam's loss L_si (eq. 1) compares the predictor's output p for one view with the projection z of the
    other. The autoencoder's L_dae compares what the decoder makes of each z with the undisturbed image x.
    The stop-gradient sg prevents collapse. So does the decoder: it cannot make every image from the same z.
    At w = 1 this is SimSiam and runs no decoder. At w = 0 it is the autoencoder and runs no predictor."""

    look = Look("SidAE", "#D55E00", "o")
    axes = Axes(augment="simsiam_cifar", encode="backbone + 3-layer projector; predictor and decoder on top",
                extract="last vector per view", compare="cosine_similarity; mse_loss",
                loss="sidae of neg_cosine with stop-gradient and recon_mse, no negatives")
    equation = rf"""L &= w \, L_{{si}} + (1 - w) \, L_{{dae}} \\ L_{{si}} &= {L_SI} \\
        L_{{dae}} &= {L_DAE} \\ {COSINE}"""
    reads = ("w", *NETWORK, *SIAMESE, *DECODER)
    fixed_w: float | None = None  # a class of its own may set it; else it is the config's

    def __init__(self, c: RunConfig, classes: int = 0) -> None:
        super().__init__(c)
        w = c.w if self.fixed_w is None else self.fixed_w
        self.register_buffer("w", torch.tensor(w), persistent=False)  # as a tensor a grid of w compiles once
        self.projector = networks.projector(self.backbone.out_features, c.hidden, c.dim, c.proj_affine)
        self.predictor = networks.predictor(c.dim, c.pred_hidden) if w > 0 else None
        images = {"channels": c.channels, "size": c.size, "output": c.output}
        self.decoder = networks.Decoder(c.dim, width=c.decoder, **images) if w < 1 else None

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        z1, z2 = map(self.embed, views)  # f: encoder and projector, Fig. 2                            (B, D)
        out = {"z": z1.detach(), **self.terms(z1, z2, views, batch)}
        if len(out) == 3:
            out["loss"] = losses.sidae(out["l_si"], out["l_dae"], self.w)
        else:
            out["loss"] = out["l_si"] if self.decoder is None else out["l_dae"]
        return out

    def terms(self, z1: Tensor, z2: Tensor, views: Views, batch: Batch) -> dict[str, Tensor]:
        out = {}
        if self.predictor is not None:
            p1, p2 = self.predictor(z1), self.predictor(z2)  # h                                       (B, D)
            out["l_si"] = (losses.neg_cosine(p1, z2) + losses.neg_cosine(p2, z1)) / 2  # eq. 1
        if self.decoder is not None:
            t1, t2 = self.targets(views, batch)  # the undisturbed image, Sec. 3.1               (B, C, S, S)
            x1, x2 = self.decoder(z1), self.decoder(z2)  # g; its gradient reaches the backbone  (B, C, S, S)
            recon = self.config.recon
            out["l_dae"] = (losses.recon_mse(x1, t1, recon) + losses.recon_mse(x2, t2, recon)) / 2
        return out

    def targets(self, views: Views, batch: Batch) -> Views:
        t = (batch["x1"], batch["x2"]) if self.config.recon_target == "clean" else views
        if self.config.target == "standardised":
            return t
        return tuple(x * batch["std"] + batch["mean"] for x in t)

    def gauges(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        """What w really balances: the norm of each term's gradient at (z1, z2), before w."""
        if self.predictor is None or self.decoder is None:
            return {}
        z1, z2 = (self.embed(v).detach().requires_grad_() for v in views)
        terms = self.terms(z1, z2, views, batch)
        grads = {k: torch.autograd.grad(term, (z1, z2)) for k, term in terms.items()}
        return {k.replace("l_", "grad_"): torch.cat(g).norm() for k, g in grads.items()}


class SimSiam(SidAE, name="simsiam"):
    """SimSiam (arXiv:2011.10566) is SidAE at w = 1: each view of an image predicts the other one.
    The predictor's output p for one view is compared with the projection z of the other. The stop-gradient
    sg on z prevents collapse. It needs no negatives, no momentum network and no decoder.

    Deviations: the learning rate is not scaled with the batch size; the predictor's learning rate follows the
    cosine schedule too, unless `predictor_lr` is "constant"; the last BatchNorm of a residual block does not
    start at 0, unless `zero_init` is set."""

    look = Look("SimSiam", "#0072B2", "s")
    axes = Axes(augment="simsiam_cifar", encode="backbone + 3-layer projector, predictor on one side",
                extract="last vector per view", compare="cosine_similarity",
                loss="neg_cosine with stop-gradient, no negatives")
    equation = rf"L &= {L_SI} \\ {COSINE}"
    reads = (*NETWORK, *SIAMESE)
    fixed_w = 1.0


class DenoisingAutoencoder(SidAE, name="dae"):
    """The paper's denoising autoencoder (arXiv:2304.02549, Sec. 4.1) is SidAE at w = 0.
    Its decoder makes an image from the z of each disturbed view, and this is compared with the undisturbed
    image x. That alone prevents collapse: the decoder cannot make every image from the same z."""

    look = Look("Autoencoder", "#009E73", "^")
    axes = Axes(augment="simsiam_cifar", encode="backbone + 3-layer projector, decoder on top",
                extract="last vector per view", compare="mse_loss", loss="recon_mse, no negatives")
    equation = f"L = {L_DAE}"
    reads = (*NETWORK, *DECODER)
    fixed_w = 0.0
