"""The paper's yardsticks: a supervised network and an untrained one."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import RunConfig
from .base import Axes, Batch, Look, Method, Views


class Supervised(Method, name="supervised"):
    """The supervised network (arXiv:2304.02549, Sec. 4.1) is trained from scratch with labels.
    The scores s of an image, one for each class c, are compared with its label y. The paper does not say how
    it is trained. We take the recipe of the paper's downstream tests (lr 0.05, batch 256, 50 epochs), with
    and without augmentation."""

    look = Look("Supervised", "#000000")
    axes = Axes(augment="none", encode="backbone + fully connected layer",
                extract="class scores of the first view", compare="none", loss="cross_entropy with labels")
    equation = r"L = -\log \frac{\exp(s_y)}{\sum_c \exp(s_c)}"
    reads = ("labels", "label_count", "label_seed")
    labels = True

    def __init__(self, c: RunConfig, classes: int = 0) -> None:
        super().__init__(c)
        self.fc = nn.Linear(self.backbone.out_features, classes)

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        h = self.backbone(views[0])  # (B, F)
        return {"loss": F.cross_entropy(self.fc(h), batch["labels"]), "z": h.detach()}


class Untrained(Method, name="untrained"):
    """The untrained network is a backbone with its first, random weights. Nothing is compared or trained.
    A method that does not beat it has learned nothing."""

    look = Look("Untrained", "#7F7F7F")
    axes = Axes(augment="none", encode="backbone", extract="pooled vector", compare="none", loss="none")
    own = {"encode": "resnet18|small_cnn"}
