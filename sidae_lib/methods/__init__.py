"""Methods by name. To add one: write a `Method` in one file and name it here."""

import dataclasses
from typing import Any

from .. import augment
from ..config import RunConfig, SidaeError
from .base import Axes, Method
from .contrastive import FNC, NNCLR, MoCo, SimCLR
from .maps import AMDIM, CPC, YADIM, Composed
from .metric import Pairwise, Triplet
from .siamese import BYOL, DINO, BarlowTwins, VICReg
from .sidae import DenoisingAutoencoder, SidAE, SimSiam
from .supervised import Supervised, Untrained

METHODS: dict[str, type[Method]] = {
    "sidae": SidAE,
    "simsiam": SimSiam,
    "dae": DenoisingAutoencoder,
    "supervised": Supervised,
    "untrained": Untrained,
    "simclr": SimCLR,
    "moco_v2": MoCo,
    "nnclr": NNCLR,
    "fnc": FNC,
    "byol": BYOL,
    "vicreg": VICReg,
    "dino": DINO,
    "barlow_twins": BarlowTwins,
    "cpc_v2": CPC,
    "amdim": AMDIM,
    "yadim": YADIM,
    "composed": Composed,
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
    idle = {f for f, read in (("beta2", config.optimizer == "adam"), ("depth", config.backbone == "amdim"),
                              ("norm", config.backbone.startswith("patches")),
                              ("zero_init", config.backbone.startswith("resnet"))) if not read}  # fmt: skip
    for f in dataclasses.fields(config):
        if f.name in (SHARED - {*cls.reads}) | idle and getattr(config, f.name) != f.default:
            raise SidaeError(f"{config.method} does not read {f.name}; leave it at its default, {f.default!r}.")
    if config.pairs != "none" and (cls.labels or not config.epochs or config.augment == "cpc_patches"):  # that is one view
        raise SidaeError(f"{config.method} is not trained on pairs; leave pairs at its default, 'none'.")
    if config.encoder:
        check(config.encoder)
    if config.epochs and cls.loss is Method.loss:
        raise SidaeError(f"{config.method} has nothing to train; set epochs to 0.")
    cls.validate(config)
    current = config.replace()
    if (config.method_recipe, config.augment_recipe) != (current.method_recipe, current.augment_recipe):
        raise SidaeError(f"This run belongs to an older recipe of {config.method} or {config.augment}; its record can "
                         "be read, but this version cannot repeat it.")  # fmt: skip
    return cls


def build(config: RunConfig, classes: int = 0) -> Method:
    """The method of a config with freshly drawn weights; `classes` is the number of labels (supervised only)."""
    return check(config)(config, classes)


def compose(*, augment: str, encode: str, extract: str, compare: str, loss: str, **fields: Any) -> dict[str, Any]:
    """The RunConfig fields of a method made of five parts, whose key names them all. encode: a backbone; extract:
    "vector" or comparisons of maps such as "01,11"; compare: dot or cosine; loss: nce or info_nce; `fields` are others of
    RunConfig. `experiments.run(dataset=..., scale=..., **compose(...))` trains it. Raises SidaeError where parts do not fit.
    """
    fields |= {"method": "composed", "augment": augment, "backbone": encode, "extract": extract, "compare": compare,
               "loss": loss}  # fmt: skip
    check(RunConfig.create(data="", **fields))
    return fields


def varied(config: RunConfig) -> dict[str, str]:
    """Axis -> choice, where a run of AMDIM, CPC or YADIM departs from its method, a composed one from YADIM, an untrained
    one from the networks of the scales."""
    c, own = config, METHODS[config.method].own
    made = {"augment": c.augment, "extract": c.extract, "compare": c.compare, "loss": c.loss,
            "encode": c.backbone + " (layer)" * (c.norm == "layer")
            + " (cifar)" * (c.stem == "cifar" and c.backbone.startswith("resnet"))}  # fmt: skip
    return {axis: made[axis] for axis, choice in own.items() if made[axis] not in ("", *choice.split("|"))}


def five_axes() -> dict[str, Axes]:
    """Method name -> its five choices (arXiv:2009.00104), read from the classes; a composed method's are its config's."""
    return {name: cls.axes for name, cls in METHODS.items() if cls is not Composed}
