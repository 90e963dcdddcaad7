"""Methods by name. To add one: write a `Method` with a `name` in a file of this folder. In the book a file is
a group of methods: the first sentence of its docstring is the heading, the rest is the introduction.

Deviations of all from the official codes: SGD instead of LARS and AdamW; crops bilinear (official: bicubic);
no blur at 32 pixels; the last BatchNorm of a residual block does not start at 0, unless `zero_init` is set.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from .. import augment
from ..config import RunConfig, SidaeError
from .base import METHODS, Axes, Method

FIRST = ("sidae", "supervised", "contrastive", "siamese", "maps", "metric")  # then files that are added
for file in (*FIRST, *(m.name for m in pkgutil.iter_modules(__path__))):
    importlib.import_module(f"{__name__}.{file}")

NAMES = {m: cls.look.name for m, cls in METHODS.items()}  # in figures and tables
COLOURS = {m: cls.look.colour for m, cls in METHODS.items()}  # Okabe & Ito's, then Tol's and Brewer's dark
MARKERS = {m: cls.look.marker for m, cls in METHODS.items() if cls.look.marker}
SHARED = {f for cls in METHODS.values() for f in cls.reads}  # fields that some methods read and others do not


def read(method: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the fields that the method reads."""
    return {k: v for k, v in fields.items() if k not in SHARED or k in METHODS[method].reads}


def check(config: RunConfig) -> type[Method]:
    """The class a config names, after every name in it was looked up. Raises SidaeError with one sentence."""
    if config.method not in METHODS:
        raise SidaeError(f"Unknown method {config.method!r}; choose from {', '.join(METHODS)}.")
    c, name, cls = config, config.method, METHODS[config.method]
    augment.check(c.augment)
    needs = {"beta2": c.optimizer == "adam", "depth": c.backbone == "amdim",
             "norm": c.backbone.startswith("patches"), "zero_init": c.backbone.startswith("resnet")}
    unread = SHARED - {*cls.reads} | {f for f, there in needs.items() if not there}
    for f in dataclasses.fields(c):
        if f.name in unread and getattr(c, f.name) != f.default:
            raise SidaeError(f"{name} does not read {f.name}; leave it at its default, {f.default!r}.")
    one_view = c.augment == "cpc_patches"
    if c.pairs != "none" and (cls.labels or not c.epochs or one_view):
        raise SidaeError(f"{name} is not trained on pairs; leave pairs at its default, 'none'.")
    if c.encoder:
        check(c.encoder)
    if c.epochs and cls.loss is Method.loss:
        raise SidaeError(f"{name} has nothing to train; set epochs to 0.")
    cls.validate(c)
    now = c.replace()
    if (c.method_recipe, c.augment_recipe) != (now.method_recipe, now.augment_recipe):
        raise SidaeError(f"This run belongs to an older recipe of {name} or {c.augment}; its record can be "
                         "read, but this version cannot repeat it.")
    return cls


def build(config: RunConfig, classes: int = 0) -> Method:
    """The method of a config with freshly drawn weights. classes: the number of labels, for supervised."""
    return check(config)(config, classes)


def compose(*, augment: str, encode: str, extract: str, compare: str, loss: str, **fields: Any) -> dict:
    """RunConfig fields of a method made of five parts: `experiments.run(dataset=..., scale=..., **fields)`.
    encode: a backbone.  extract: "vector" or comparisons of maps such as "01,11".  compare: dot or cosine.
    loss: nce or info_nce.  fields: others of RunConfig. Raises SidaeError where parts do not fit."""
    fields |= {"method": "composed", "augment": augment, "backbone": encode, "extract": extract,
               "compare": compare, "loss": loss}
    check(RunConfig.create(data="", **fields))
    return fields


def varied(config: RunConfig) -> dict[str, str]:
    """Axis -> choice, where a run of AMDIM, CPC or YADIM departs from its method, a composed one from YADIM,
    an untrained one from the networks of the scales."""
    made = {**vars(config), "encode": config.backbone}
    if config.norm == "layer":
        made["encode"] += " (layer)"
    if config.stem == "cifar" and config.backbone.startswith("resnet"):
        made["encode"] += " (cifar)"
    own = METHODS[config.method].own
    return {axis: made[axis] for axis, choice in own.items() if made[axis] not in ("", *choice.split("|"))}


def five_axes() -> dict[str, Axes]:
    """Method name -> its five choices (arXiv:2009.00104); a composed method's are its config's."""
    return {name: cls.axes for name, cls in METHODS.items() if name != "composed"}
