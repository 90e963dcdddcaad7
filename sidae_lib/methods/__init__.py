"""Methods by name. To add one: write a `Method` in one file and name it here."""

import dataclasses

from .. import augment
from ..config import RunConfig, SidaeError
from .base import Axes, Method
from .metric import Pairwise, Triplet
from .sidae import DenoisingAutoencoder, SidAE, SimSiam
from .supervised import Supervised, Untrained

METHODS: dict[str, type[Method]] = {
    "sidae": SidAE,
    "simsiam": SimSiam,
    "dae": DenoisingAutoencoder,
    "supervised": Supervised,
    "untrained": Untrained,
    "pairwise": Pairwise,
    "triplet": Triplet,
}
SHARED = {f for m in METHODS.values() for f in m.reads}  # fields that some methods read and others do not


def check(config: RunConfig) -> type[Method]:
    """The class a config names, after every name in it was looked up. Raises SidaeError with one sentence."""
    if config.method not in METHODS:
        raise SidaeError(f"Unknown method {config.method!r}; choose from {', '.join(METHODS)}.")
    cls = METHODS[config.method]
    augment.check(config.augment)
    for f in dataclasses.fields(config):
        if f.name in SHARED and f.name not in cls.reads and getattr(config, f.name) != f.default:
            raise SidaeError(f"{config.method} does not read {f.name}; leave it at its default, {f.default!r}.")
    if config.epochs and cls.loss is Method.loss:
        raise SidaeError(f"{config.method} has nothing to train; set epochs to 0.")
    current = config.replace()
    if (config.method_recipe, config.augment_recipe) != (current.method_recipe, current.augment_recipe):
        raise SidaeError(f"This run belongs to an older recipe of {config.method} or {config.augment}; its record can "
                         "be read, but this version cannot repeat it.")  # fmt: skip
    return cls


def build(config: RunConfig, classes: int = 0) -> Method:
    """The method of a config with freshly drawn weights; `classes` is the number of labels (supervised only)."""
    return check(config)(config, classes)


def five_axes() -> dict[str, Axes]:
    """Method name -> its five choices (arXiv:2009.00104), read from the classes."""
    return {name: cls.axes for name, cls in METHODS.items()}


__all__ = ["METHODS", "Axes", "Method", "build", "check", "five_axes"]
