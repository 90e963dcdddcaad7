"""What every method is: a module with a loss, and five named choices (arXiv:2009.00104)."""

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import networks
from ..config import RunConfig

METHODS: dict[str, type["Method"]] = {}  # by name, each as its class is defined
Views = tuple[Tensor, ...]  # two (B, C, S, S), normalised, and FNC's support after them
Batch = dict[str, Tensor]  # the clean images x1, x2 (B, C, S, S), normalised, their numbers i, j, labels (B,)


@dataclass(frozen=True)
class Axes:
    """The five axes of Falcon & Cho: what is done, in this order, to turn an image into a loss.
    augment is a name in augment.VIEWS. compare and loss name the functions of `losses` and
    torch.nn.functional that the method's loss() calls, all of `losses` among them; or "none"."""

    augment: str
    encode: str
    extract: str
    compare: str
    loss: str


@dataclass(frozen=True)
class Look:
    """How figures show a method. marker: matplotlib's; a baseline has none, it is a line."""

    name: str
    colour: str
    marker: str = ""


class Method(nn.Module):
    """A backbone and what a subclass adds. `class SimCLR(Method, name="simclr")` enters METHODS.
    The book shows a subclass by its docstring and its equation."""

    look: ClassVar[Look]
    axes: ClassVar[Axes]
    equation: ClassVar[str] = ""  # the loss, its paper's symbols in rows of TeX's aligned; source: docstring
    own: ClassVar[dict[str, str]] = {}  # axis -> its choice, where a run may choose otherwise; a|b: either
    reads: ClassVar[tuple[str, ...]] = ()  # fields of RunConfig that not all methods read
    labels: ClassVar[bool] = False  # whether the loss looks at labels

    def __init_subclass__(cls, name: str = "") -> None:
        if name:
            METHODS[name] = cls

    def __init__(self, c: RunConfig, classes: int = 0) -> None:
        super().__init__()
        self.config = c
        self.backbone = networks.backbone(c)

    @classmethod
    def validate(cls, c: RunConfig) -> None:
        """Raises SidaeError, before anything is computed, where the config's fields do not fit together."""

    @classmethod
    def pairs(cls, c: RunConfig, i: Tensor, labels: Tensor | None) -> Tensor:
        """(P, 2) index pairs to train on, of images i; labels: all (N,). A third column is the batch's xn."""
        return i[:, None].repeat(1, 2)

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        """Scalars with the key `loss`, and `z` (B, D), the projection whose spread is watched. The batch has
        mean and std (C, 1, 1) too, and xn if `pairs` names one. What `after_step` needs is staged."""
        raise NotImplementedError

    def gauges(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        """Further scalars for the record, taken now and then on one batch."""
        return {}

    def ahead(self, step: int, steps: int) -> dict[str, float | Tensor]:
        """What `after_step` takes after step 1, 2, ... of `steps`: numbers and CPU tensors of one shape."""
        return {}

    def after_step(self, **ahead: Any) -> None:
        """Fills queues, moves momentum weights and centres. On a GPU a step is one launch: there a number of
        `ahead` is a tensor on the device, and no tensor may be asked for its value."""

    def features(self, x: Tensor) -> Tensor:
        """(B, C, S, S) normalised -> (B, F): what probes see."""
        return self.backbone(x)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, S, S) normalised -> (B, D), the projection z: what losses compare and pairs are mined on."""
        h = self.backbone(x)
        return self.projector(h) if hasattr(self, "projector") else h

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups; `fixed` marks those whose rate stays constant."""
        c = self.config
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, p in self.named_parameters():
            if p.requires_grad:  # a momentum network's do not
                fixed = c.predictor_lr == "constant" and name.startswith("predictor.")
                groups.setdefault((c.decay_bias or p.ndim > 1, fixed), []).append(p)
        return [{"params": ps, "lr": lr, "weight_decay": c.weight_decay * decay, "fixed": fixed}
                for (decay, fixed), ps in groups.items()]


class MomentumCopy(nn.Sequential):
    """Copies of parts, in a row, that no gradient reaches: a key, target or teacher network."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*copy.deepcopy(parts))
        self.requires_grad_(False)
        self.parts = parts  # as a tuple they are no submodules

    def follow(self, m: float | Tensor) -> None:
        """t <- m t + (1 - m) p over the parameters; BatchNorm's running statistics stay the copy's own, as in
        the official code of MoCo and DINO. m as a tensor: float64, since 1 - m becomes small."""
        own = list(self.parameters())
        theirs = [p.detach() for part in self.parts for p in part.parameters()]
        if isinstance(m, Tensor):  # torch's own would ask for its value
            way = torch._foreach_sub(theirs, own)
            torch._foreach_mul_(way, (1 - m).to(own[0].dtype))
            torch._foreach_add_(own, way)
        else:
            get_ema_multi_avg_fn(m)(own, theirs, None)


def raised(m: float, step: int, steps: int) -> float:
    """BYOL's momentum after step 1, 2, ... of `steps`: m, raised by a cosine that would reach 1 a step after
    the last (arXiv:2006.07733, Sec. 3.3, with k = step - 1, as in the official code of BYOL and DINO)."""
    return 1 - (1 - m) * (math.cos(math.pi * (step - 1) / steps) + 1) / 2
