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


@dataclass(frozen=True)
class Axes:
    """The five axes of Falcon & Cho: what is done, in this order, to turn an image into a loss.

    augment: a name in augment.VIEWS.  compare, loss: functions of `losses` or torch.nn.functional that the method's loss()
    calls, all it calls of `losses`, in words that are no other functions' names; or "none".
    """

    augment: str
    encode: str
    extract: str
    compare: str
    loss: str


class Method(nn.Module):
    """Base of all methods: a backbone, and what a subclass adds.

    axes: the five choices.  reads: RunConfig fields that only some methods read; setting any other is an error, so that
    two keys never name the same run.  labels: whether the loss looks at labels.
    """

    axes: ClassVar[Axes]
    own: ClassVar[dict[str, str]] = {}  # axis -> what it chooses, where a run may choose otherwise; a|b: either
    reads: ClassVar[tuple[str, ...]] = ()
    labels: ClassVar[bool] = False

    def __init__(self, config: RunConfig, classes: int = 0) -> None:
        super().__init__()
        self.config = config
        self.backbone = networks.backbone(config)

    @classmethod
    def validate(cls, config: RunConfig) -> None:
        """Raises SidaeError, before anything is computed, where the config's fields do not fit together."""

    @classmethod
    def pairs(cls, config: RunConfig, i: Tensor, labels: Tensor | None) -> Tensor:
        """(P, 2) index pairs from the images i to train on; or (P, 3), whose third is in the batch as xn. labels: all (N,)."""
        return i[:, None].repeat(1, 2)

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars with the key `loss`; and, not recorded as such, `z` (B, D), the projection whose spread is watched.

        views: two (B, C, S, S), normalised, and FNC's support after them.  batch: x1, x2 (B, C, S, S) clean and normalised
        images i and j, labels, i, j (B,), xn if `pairs` names one, and mean, std (C, 1, 1). Pure, but for what it stages
        for `after_step`.
        """
        raise NotImplementedError

    def gauges(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Further scalars for the record, taken now and then on one batch; arguments as in `loss`."""
        return {}

    def ahead(self, step: int, steps: int) -> dict[str, float | Tensor]:
        """What `after_step` takes after step 1, 2, ... of `steps`, known before it: numbers and CPU tensors of one shape."""
        return {}

    def after_step(self, **ahead: Any) -> None:
        """Fill queues, move momentum weights and centres from what `loss` staged. A GPU's step is one launch: there a number
        of `ahead` is a tensor on the device, and none may be asked for its value."""

    def features(self, x: Tensor) -> Tensor:
        """(B, C, S, S) normalised -> (B, F): what probes see."""
        return self.backbone(x)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, S, S) normalised -> (B, D), the projection head included: what semantic pairs are mined on."""
        h = self.backbone(x)
        return self.projector(h) if hasattr(self, "projector") else h

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups; `fixed` marks those whose rate stays constant."""
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue  # a momentum network's
            decay = self.config.decay_bias or p.ndim > 1
            fixed = self.config.predictor_lr == "constant" and name.startswith("predictor.")
            groups.setdefault((decay, fixed), []).append(p)
        wd = self.config.weight_decay
        return [{"params": ps, "lr": lr, "weight_decay": wd * decay, "fixed": fixed}
                for (decay, fixed), ps in groups.items()]


def momentum_copy(*parts: nn.Module) -> nn.Module:
    """The parts in a row, with weights of their own that no gradient reaches: a key, target or teacher network."""
    return copy.deepcopy(nn.Sequential(*parts)).requires_grad_(False)


def follow(target: nn.Module, m: float | Tensor, *parts: nn.Module) -> None:
    """t <- m t + (1 - m) p over the parameters; BatchNorm's running statistics stay the target's own, as in the
    official code of MoCo and DINO. m: in float64 where it is a tensor, since 1 - m becomes small."""
    own, theirs = list(target.parameters()), [p.detach() for part in parts for p in part.parameters()]
    if isinstance(m, Tensor):  # which torch's own would ask for its value
        way = torch._foreach_sub(theirs, own)
        torch._foreach_mul_(way, (1 - m).to(own[0].dtype))
        torch._foreach_add_(own, way)
    else:
        get_ema_multi_avg_fn(m)(own, theirs, None)


def raised(m: float, step: int, steps: int) -> float:
    """BYOL's momentum after step 1, 2, ... of `steps`: m after the first, raised to 1 by a cosine that its last step does
    not quite reach (arXiv:2006.07733, Sec. 3.3, k = step - 1; the official code of BYOL and DINO counts so too)."""
    return 1 - (1 - m) * (math.cos(math.pi * (step - 1) / steps) + 1) / 2
