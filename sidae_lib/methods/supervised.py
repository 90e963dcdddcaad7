"""The paper's yardsticks: the supervised network, and the untrained one."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import RunConfig
from .base import Axes, Method


class Supervised(Method):
    """A network trained from scratch with labels (arXiv:2304.02549 Sec. 4.1). Recipe: open in the paper, here the
    downstream one (lr 0.05, batch 256, 50 epochs), with and without augmentation."""

    axes = Axes(augment="none", encode="backbone + fully connected layer", extract="class scores of the first view",
                compare="none", loss="cross_entropy with labels")  # fmt: skip
    reads = ("labels", "label_count", "label_seed")
    labels = True

    def __init__(self, config: RunConfig, classes: int = 0) -> None:
        super().__init__(config)
        self.fc = nn.Linear(self.backbone.out_features, classes)

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        h = self.backbone(views[0])  # (B, F)
        return {"loss": F.cross_entropy(self.fc(h), batch["labels"]), "z": h.detach()}


class Untrained(Method):
    """A network as initialised: a method that does not beat it has learned nothing. It is never stepped."""

    axes = Axes(augment="none", encode="backbone", extract="pooled vector", compare="none", loss="none")
    own = {"encode": "resnet18|small_cnn"}
