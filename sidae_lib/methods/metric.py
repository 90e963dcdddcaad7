"""Around the paper: pairwise and triplet learning.

Both push images of another class away, as in the student report "Contrastive learning" (R. Hammer, M. Pavlinec,
N. Zarbock, A. Zeilmann; Goethe University Frankfurt, 2021).
"""

from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..config import RunConfig, epoch_seed
from .base import Axes, Batch, Look, Method, Views

LOSSES = {"pairwise": {"lr": 0.05, "epochs": 5}, "triplet": {"lr": 0.15, "epochs": 10}}  # 490 updates each
CONFOUNDS: dict[str, dict[str, dict[str, Any]]] = {  # one change each, of the losses that are named
    "lr 0.05": {"triplet": {"lr": 0.05}},
    "lr 0.15": {"pairwise": {"lr": 0.15}},
    "margin 0.2": {"triplet": {"margin": 0.2}},
    "margin 0.5": {"pairwise": {"cos_margin": 0.5}},
    "cosine distance": {"triplet": {"distance": "cosine"}},
    "no sigmoid": dict.fromkeys(LOSSES, {"embed": "linear"}),
    "label-free negatives": dict.fromkeys(LOSSES, {"negatives": "any"}),
    "anchors augmented": dict.fromkeys(LOSSES, {"augment": "report_simclr_anchors"}),
}


def undone(config: RunConfig) -> str:
    """The confound of the report that a run undoes, or nothing."""
    own = {name: c[config.method] for name, c in CONFOUNDS.items() if config.method in c}
    return "".join(name for name, change in own.items() if change.items() <= vars(config).items())


def negatives(c: RunConfig, i: Tensor, labels: Tensor) -> Tensor:
    """One image to push away for each of i, drawn once per seed from the split with labels (N,): of another
    class, none twice for one class while they last (Sec. 5.2); or, as one would without labels, any other."""
    g = torch.Generator().manual_seed(epoch_seed(c.seed, -1))
    if c.negatives == "any":
        return (i + torch.randint(1, len(labels), (len(i),), generator=g)) % len(labels)
    out = torch.empty_like(i)
    for label in labels[i].unique():
        own, other = (labels[i] == label).nonzero()[:, 0], (labels != label).nonzero()[:, 0]
        out[own] = other[torch.randperm(len(other), generator=g)][torch.arange(len(own)) % len(other)]
    return out


class Pairwise(Method, name="pairwise"):
    """Pairwise learning uses the cosine embedding loss (student report, Sec. 3.4.2).
    A pair is an image and its view, with y = 1, or an image and a clean one of another class, with y = -1.
    x_1 and x_2 are here the two vectors that the network makes of a pair; they are compared by their cosine.
    The second kind of pair prevents collapse. It needs labels."""

    look = Look("Pairwise", "#B8860B", "1")
    axes = Axes(augment="report_simclr", encode="backbone", extract="last vector per image",
                compare="cosine_embedding", loss="cosine_embedding, labelled negatives")
    equation = r"""L = \begin{cases} 1 - \cos(x_1, x_2), & y = 1 \\
        \max(0, \cos(x_1, x_2) - \text{margin}), & y = -1 \end{cases}"""
    reads: tuple[str, ...] = ("per_class", "negatives", "batch_norm", "embed", "cos_margin")
    labels = True

    @classmethod
    def pairs(cls, c: RunConfig, i: Tensor, labels: Tensor) -> Tensor:
        n = negatives(c, i, labels)
        return torch.cat([torch.stack([i, i], 1), torch.stack([i, n], 1)])

    def vectors(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """(B, D) each. BatchNorm sees each input alone, as in the report's code, or all of them at once."""
        if self.config.batch_norm == "each":
            return tuple(map(self.backbone, inputs))
        return self.backbone(torch.cat(inputs)).chunk(len(inputs))

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        same = batch["i"] == batch["j"]
        second = torch.where(same[:, None, None, None], views[1], batch["x2"])
        a, b = self.vectors(views[0], second)  # (B, D)
        return {"loss": losses.cosine_embedding(a, b, same, self.config.cos_margin), "z": a.detach()}


class Triplet(Pairwise, name="triplet"):
    """Triplet learning uses the triplet margin loss (student report, Sec. 3.4.3).
    An image X has a view X^+ and a clean image X^- of another class. D is the distance of the vectors that the
    network makes of two images. X should be nearer to X^+ than to X^-, by a margin m. Without X^-, all images
    could collapse to one vector. It needs labels."""

    look = Look("Triplet", "#4477AA", "2")
    axes = Axes(augment="report_simclr", encode="backbone", extract="last vector per image",
                compare="triplet, Euclidean", loss="triplet, labelled negatives")
    equation = r"L = \max(0, m + D(X_i, X_i^+) - D(X_i, X_i^-))"
    reads = (*Pairwise.reads[:-1], "margin", "distance")

    @classmethod
    def pairs(cls, c: RunConfig, i: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([i, i, negatives(c, i, labels)], 1)

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        a, p, n = self.vectors(*views, batch["xn"])  # (B, D)
        return {"loss": losses.triplet(a, p, n, self.config.margin, self.config.distance), "z": a.detach()}
