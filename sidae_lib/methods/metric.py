"""Pairwise and triplet learning with negatives of another class: the student report "Contrastive learning" (R. Hammer,
M. Pavlinec, N. Zarbock, A. Zeilmann; Goethe University Frankfurt, 2021)."""

from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..config import RunConfig, epoch_seed
from .base import Axes, Method

LOSSES = {"pairwise": {"lr": 0.05, "epochs": 5}, "triplet": {"lr": 0.15, "epochs": 10}}  # 490 updates each
CONFOUNDS: dict[str, dict[str, dict[str, Any]]] = {  # one change each, of the losses that are named
    "lr 0.05": {"triplet": {"lr": 0.05}}, "lr 0.15": {"pairwise": {"lr": 0.15}}, "margin 0.2": {"triplet": {"margin": 0.2}},
    "margin 0.5": {"pairwise": {"cos_margin": 0.5}}, "cosine distance": {"triplet": {"distance": "cosine"}},
    **{name: dict.fromkeys(LOSSES, change) for name, change in (
        ("no sigmoid", {"embed": "linear"}), ("label-free negatives", {"negatives": "any"}),
        ("anchors augmented", {"augment": "report_simclr_anchors"}))}}  # fmt: skip


def undone(config: RunConfig) -> str:
    """The confound of the report that a run undoes, or nothing."""
    return "".join(n for n, c in CONFOUNDS.items() if config.method in c and c[config.method].items() <= vars(config).items())


def negatives(config: RunConfig, i: Tensor, labels: Tensor) -> Tensor:
    """For each image of i one to push away, drawn once per seed: of another class, none twice for one class while they
    last (Sec. 5.2); or, as one would without labels, any other image of the split, of labels (N,)."""
    g = torch.Generator().manual_seed(epoch_seed(config.seed, -1))
    if config.negatives == "any":
        return (i + torch.randint(1, len(labels), (len(i),), generator=g)) % len(labels)
    out = torch.empty_like(i)
    for c in labels[i].unique():
        own, other = (labels[i] == c).nonzero()[:, 0], (labels != c).nonzero()[:, 0]
        out[own] = other[torch.randperm(len(other), generator=g)][torch.arange(len(own)) % len(other)]
    return out


class Pairwise(Method):
    """Cosine embedding loss (Sec. 3.4.2) on pairs: an image and its view, or an image and a clean one to push away."""

    axes = Axes(augment="report_simclr", encode="backbone", extract="last vector per image", compare="cosine_embedding",
                loss="cosine_embedding, labelled negatives")  # fmt: skip
    reads: tuple[str, ...] = ("per_class", "negatives", "batch_norm", "embed", "cos_margin")
    labels = True

    @classmethod
    def pairs(cls, config: RunConfig, i: Tensor, labels: Tensor) -> Tensor:
        n = negatives(config, i, labels)
        return torch.stack([i, i, n], 1) if cls is Triplet else torch.cat([torch.stack([i, j], 1) for j in (i, n)])

    def embed(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """BatchNorm sees each input alone, as in the report's code, or all of them at once."""
        if self.config.batch_norm == "each":
            return tuple(self.backbone(x) for x in inputs)
        return self.backbone(torch.cat(inputs)).chunk(len(inputs))

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        same = batch["i"] == batch["j"]
        a, b = self.embed(views[0], torch.where(same[:, None, None, None], views[1], batch["x2"]))  # (B, D)
        return {"loss": losses.cosine_embedding(a, b, same, self.config.cos_margin), "z": a.detach()}


class Triplet(Pairwise):
    """Triplet margin loss (Sec. 3.4.3): an image, its view, and a clean image to push away."""

    axes = Axes(augment="report_simclr", encode="backbone", extract="last vector per image", compare="triplet, Euclidean",
                loss="triplet, labelled negatives")  # fmt: skip
    reads = (*Pairwise.reads[:-1], "margin", "distance")

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        a, p, n = self.embed(*views, batch["xn"])  # (B, D)
        return {"loss": losses.triplet(a, p, n, self.config.margin, self.config.distance), "z": a.detach()}
