"""What makes two runs the same: flat frozen configs, and the key that names each.

A key is the first 16 hex digits of sha256 over canonical JSON that omits every field at its default. So a
record stays found when the project grows: a default never changes, and a new field's default is the old
behaviour. "open" in a comment: the paper leaves this choice open, and the default is our reading.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_type_hints

LISTS: dict[str, type] = {"datasets": str, "seeds": int, "protocols": str}  # list -> type of its values
# The current recipe of a method or a pipeline, raised when its mathematics changes; 1 where none is listed.
METHOD_RECIPES: dict[str, int] = {"byol": 2, "dino": 2}  # 2: the momentum's cosine is no longer a step ahead
AUGMENT_RECIPES: dict[str, int] = {}
# What a method compares when `extract` is empty. Naming it anyway gives the same run.
EXTRACTS = {"amdim": "01,02,11", "yadim": "00", "cpc_v2": "2,3,4,5,6"}
# Field -> the values it may have, and the same in words.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {name: (ok, words) for names, ok, words in (
    ("size width depth dim hidden pred_hidden decoder tau queue splits prototypes top clip lr fit_epochs k C "
     "points perplexity repeats", lambda v: v > 0, "be positive"),
    ("epochs pool label_count weight_decay support pair_count per_class margin backbone_lr method_recipe "
     "augment_recipe", lambda v: v >= 0, "not be negative"),
    ("seed pool_seed label_seed pair_seed", lambda v: 0 <= v < 2**32, "lie in 0 to 2^32 - 1"),
    ("w", lambda v: 0 <= v <= 1, "lie in [0, 1] (0 = autoencoder, 1 = SimSiam)"),
    ("ema", lambda v: 0 <= v <= 1, "lie in [0, 1]"),
    ("momentum beta2 warmup", lambda v: 0 <= v < 1, "lie in [0, 1)"),
    ("labels pair_share", lambda v: 0 < v <= 1, "lie in (0, 1], as a share"),
    ("pair_weight", lambda v: 0 < v <= 1, "lie in (0, 1] (without pairs: pairs 'none')"),
    ("batch", lambda v: v >= 2, "be at least 2 (BatchNorm needs two samples)"),
    ("channels", lambda v: v in (1, 3), "be 1 or 3"),
    ("fold", lambda v: -1 <= v <= 9, "lie in 0 to 9, or be -1 for all"),
) for name in names.split()}  # fmt: skip


Record = dict[str, Any]  # of a run or of an evaluation, as it is kept in JSON


class SidaeError(Exception):
    """Base class of every error this project raises on purpose: one sentence that says what to do."""


def epoch_seed(seed: int, epoch: int | float) -> int:
    """Seed of the generator that draws an epoch's order and augmentation. A hash, since torch's CPU generator
    keeps only the low 32 bits: `seed << 32` would be no seed at all."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4], "big")


def typed(name: str, value: Any, kind: type) -> Any:
    """A parameter's value as its declared type; where a list is declared, a single value becomes one.
    Raises SidaeError, which names the parameter, for another type."""
    if kind is list:
        single = isinstance(value, str) or not isinstance(value, Iterable)
        values = [value] if single else [*value]
        return [typed(name, v, LISTS[name]) for v in values] if name in LISTS else values
    known = {int: Integral, float: Real}.get(kind, kind)  # NumPy's numbers too
    if not isinstance(value, known) or isinstance(value, bool) != (kind is bool):
        which = f"{kind.__name__} or a list of them" if name in LISTS else kind.__name__
        raise SidaeError(f"{name} must be {which}, not {value!r}.")
    return kind(value)


def above_zero(**options: float | None) -> None:
    """Raises SidaeError for an option of the command line that was given and is not above 0."""
    for name, value in options.items():
        if value is not None and not value > 0:
            raise SidaeError(f"--{name.replace('_', '-')} must be above 0, not {value:g}.")


def digest(value: Any) -> str:
    """sha256 (64 hex digits) of the canonical JSON of a value. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _need(ok: Any, sentence: str) -> None:
    if not ok:
        raise SidaeError(sentence)


@lru_cache  # a large grid makes half a million configs
def _hints(cls: type) -> dict[str, tuple[Any, tuple]]:
    """Each field's type and, of a choice, what there is to choose from."""
    kinds = get_type_hints(cls)
    return {f.name: (kinds[f.name], get_args(kinds[f.name])) for f in dataclasses.fields(cls)}


class _Config:
    """Strict construction, canonical JSON and the key, shared by the configs below."""

    FIRST: ClassVar[dict[str, int]] = {}  # recipes that a record does not name are the first

    def __post_init__(self) -> None:
        for name, (kind, choices) in _hints(type(self)).items():
            value = getattr(self, name)
            if kind is int and type(value) is int:
                _need(abs(value) < 2**63, f"{name} must lie below 2^63.")
            if kind is float and type(value) in (int, float):
                _need(abs(value) < 1e300, f"{name} must be a finite number, not {value}.")
                value += 0.0  # 1 and 1.0 are one run, 0.0 and -0.0 too
                self._set(name, value)
            if NoneType in choices:
                _need(isinstance(value, choices), f"{name} must be a RunConfig or None, not {value!r}.")
            elif choices:
                _need(value in choices, f"Unknown {name} {value!r}; choose from {', '.join(choices)}.")
            else:
                _need(type(value) is kind, f"{name} must be {kind.__name__}, not {value!r}.")

    def _set(self, name: str, value: Any) -> None:
        """One way to write what is the same run, so that it has one key."""
        object.__setattr__(self, name, value)

    def _check_ranges(self) -> None:
        for name, value in vars(self).items():
            if name in RANGES:
                ok, words = RANGES[name]
                _need(ok(value), f"{name} must {words}, got {value}.")
        if self.labels != 1 and self.label_count:
            raise SidaeError("labels and label_count exclude each other; give one.")

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their default, as JSON types: what the key is taken over."""
        out = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, _Config):
                value = value.to_dict()
            first = f.name.endswith("_recipe") and value == 1  # a first recipe is not written
            if value != f.default and not first:
                out[f.name] = value
        return out

    def key(self) -> str:
        """16 hex digits that name this config."""
        return self._key

    @cached_property
    def _key(self) -> str:
        return digest(self.to_dict())[:16]

    @classmethod
    def from_dict(cls, d: dict[str, Any]):
        """Inverse of `to_dict`. Raises SidaeError on an unknown field or a wrong type."""
        if not isinstance(d, dict) or not all(isinstance(k, str) for k in d):
            raise SidaeError(f"A {cls.__name__} is a JSON object, not {type(d).__name__}.")
        runs = {k: RunConfig.from_dict(v) for k, v in d.items() if k in ("run", "encoder") and v is not None}
        return cls.create(**cls.FIRST | d | runs)

    def replace(self, /, **changes):
        """A copy of today's recipes with some fields changed. Raises SidaeError on an unknown field."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in self.FIRST]
        return self.create(**{name: getattr(self, name) for name in names} | changes)

    @classmethod
    def create(cls, /, **fields):
        """The constructor, with an unknown or missing field as a SidaeError."""
        known = {f.name: f.default for f in dataclasses.fields(cls)}
        if unknown := sorted(repr(name) for name in fields.keys() - known):
            raise SidaeError(f"Unknown {cls.__name__} field {', '.join(unknown)}; known: {', '.join(known)}.")
        missing = [n for n, default in known.items() if default is dataclasses.MISSING and n not in fields]
        _need(not missing, f"A {cls.__name__} needs the field {', '.join(missing)}.")
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Config):
    """Everything that changes the result of one pre-training run (section numbers: arXiv:2304.02549).

    Device, paths, threads and compilation are left out: they change bits at most, never the experiment.
    """

    FIRST = {"method_recipe": 1, "augment_recipe": 1}

    method: str  # a name in methods.METHODS
    data: str  # fingerprint of the decoded arrays (data.identify), never a name or a path
    seed: int = 0  # weights, order and augmentation
    # training images
    split: Literal["train", "unlabeled"] = "train"  # unlabeled: STL-10's 100,000
    pool: int = 0  # how many of the split's images to train on, drawn by pool_seed; 0 = all
    pool_seed: int = 0
    channels: int = 3  # open: grey sets are replicated to 3 channels, one architecture for all sets
    size: int = 32  # pixels (Sec. 4.1)
    resize: Literal["antialias", "bilinear"] = "antialias"  # open; of the whole image, before augmentation
    labels: float = 1.0  # supervised only: share of the training labels
    label_count: int = 0  # supervised only: number of labels instead of a share; 0 = use `labels`
    label_seed: int = 0  # one subset for all runs and methods (Sec. 4.1)
    augment: str = "simsiam_cifar"  # a name in augment.VIEWS; open there: blur kernel 9, sigma U(0.1, 2)
    # semantic pairs of two images, beside every image's own two views (SePP-ID, TMLR 04/2024, Algorithm 1);
    # random: images again; wrong and oracle: by label
    pairs: Literal["none", "mined", "random", "wrong", "oracle"] = "none"
    encoder: "RunConfig | None" = None  # mined: the run whose embeddings are compared; it is trained first
    encoder_epoch: int = -1  # its checkpoint; -1 = the last, 0 = untrained
    pair_share: float = 0.1  # K: share of the training images among which pairs are sought
    pair_seed: int = 0  # draws the K images and the controls
    pair_low: float = 0.97  # mined: least and largest cosine; they belong to one encoder
    pair_high: float = 0.99
    pair_count: int = 0  # how many pairs, the highest cosines first; 0 = all between the thresholds
    pair_weight: float = 1.0  # lambda of eq. 2: how often a pair is drawn, relative to an image
    redraw: bool = True  # False: an image's views are drawn once and used in every epoch
    stats: Literal["data", "half", "none"] = "data"  # open: (x - mean) / std of the set, (x - 0.5) / 0.5, or x
    # network
    backbone: Literal["resnet18", "resnet34", "small_cnn", "amdim", "patches18", "patches34"] = "resnet18"
    stem: Literal["imagenet", "cifar"] = "imagenet"  # open: 7x7 stride 2 and max-pool fit the accuracy
    width: int = 64  # channels of the first stage
    depth: int = 3  # units a block of AMDIM's encoder (10 in its CIFAR-10 run)
    zero_init: bool = False  # open; ResNets: the last BatchNorm of every residual block starts at 0
    norm: Literal["group", "layer"] = "group"  # of a patch encoder: BatchNorm would mix patches
    dim: int = 2048  # D, the projector's output ("set to [4]")
    hidden: int = 2048  # open: the projector's hidden width
    proj_affine: bool = False  # open: scale and shift in the projector's last BatchNorm
    pred_hidden: int = 512  # the predictor's bottleneck
    decoder: int = 512  # open: channels at 1x1, then a mirror of ResNet-18
    # SidAE and the autoencoder
    w: float = 0.5  # open: the loss weight, L = w L_si + (1 - w) L_dae
    target: Literal["standardised", "unit"] = "standardised"  # open: scale of the target; unit: [0, 1]
    recon: Literal["mean", "sum"] = "mean"  # open: squared error's mean, or its sum, over an image's elements
    recon_target: Literal["clean", "view"] = "clean"  # open: what both views become; view: itself
    output: Literal["linear", "sigmoid", "tanh"] = "linear"  # open: the decoder's last activation
    # siamese and contrastive methods; each method's own values at CIFAR scale: scales.RECIPES
    tau: float = 0.1  # temperature of the similarities; DINO: the student's
    ema: float = 0.99  # m of the momentum network; BYOL and DINO raise it to 1 by a cosine
    queue: int = 4096  # embeddings of earlier batches
    symmetric: bool = False  # MoCo: either view asks, the sum of both directions
    splits: int = 8  # MoCo: parts of the batch that BatchNorm sees apart
    leave_out: Literal["same", "none", "partners"] = "same"  # which other images are no negatives, by id
    prototypes: int = 2048  # DINO: size of the last layer
    support: int = 1  # FNC: further views, which find false negatives and are anchors and positives too
    top: int = 10  # FNC: at most so many false negatives (views) an image
    threshold: float = 0.7  # FNC: their least cosine
    cancel: Literal["attract", "eliminate"] = "attract"  # FNC: they become positives, or leave the sum
    # feature maps compared across views, and methods made of five parts (methods/maps.py)
    extract: str = ""  # comparisons of maps "01,02,11"; "vector"; CPC's rows below "2,3,4"; "" = the method's
    compare: Literal["", "dot", "cosine"] = ""
    loss: Literal["", "nce", "info_nce"] = ""
    clip: float = 20.0  # bound c of the scores, c tanh(s / c)
    # pairwise and triplet: the student report's choices (sidae_lib/methods/metric.py)
    per_class: int = 0  # only the first so many images of every class; 0 = all
    negatives: Literal["class", "any"] = "class"  # of another class, by label; any: some other image
    batch_norm: Literal["each", "joint"] = "each"  # one network call per input; joint: one call for all
    embed: Literal["sigmoid", "linear"] = "sigmoid"  # small_cnn's last activation
    cos_margin: float = 0.0  # pairwise
    margin: float = 1.0  # triplet
    distance: Literal["euclidean", "cosine"] = "euclidean"  # triplet
    # optimisation
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.03  # open: literal, not scaled by batch / 256
    momentum: float = 0.9  # Adam: beta 1
    beta2: float = 0.999  # Adam alone
    weight_decay: float = 5e-4
    decay_bias: bool = True  # open: weight decay on biases and BatchNorm too (plain SGD)
    schedule: Literal["cosine", "constant", "steps"] = "cosine"  # to 0, per step; steps: AMDIM's two drops
    warmup: float = 0.0  # share of the steps in which the rate rises linearly
    predictor_lr: Literal["schedule", "constant"] = "schedule"  # open: the predictor follows the schedule
    batch: int = 512
    epochs: int = 200
    precision: Literal["fp32", "bf16"] = "fp32"  # open; bf16: autocast, set by the scale and never by the device
    # which mathematics; 0 asks for the current recipe and is resolved at once
    method_recipe: int = 0
    augment_recipe: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("method_recipe", self.method_recipe or METHOD_RECIPES.get(self.method, 1))
        self._set("augment_recipe", self.augment_recipe or AUGMENT_RECIPES.get(self.augment, 1))
        if self.extract == EXTRACTS.get(self.method):
            self._set("extract", "")
        if self.encoder and self.encoder_epoch == self.encoder.epochs:
            self._set("encoder_epoch", -1)
        self._check_ranges()
        self._check_pairs()

    def _check_pairs(self) -> None:
        e, kind, low, high = self.encoder, self.pairs, self.pair_low, self.pair_high
        of_mined = {"encoder", "encoder_epoch", "pair_low", "pair_high"}
        of_all = {"pair_share", "pair_seed", "pair_count", "pair_weight"}
        unread = {"mined": set(), "none": of_mined | of_all}.get(kind, of_mined)
        for f in dataclasses.fields(self):
            if f.name in unread:
                _need(getattr(self, f.name) == f.default,
                      f"pairs {kind!r} does not read {f.name}; leave it at its default, {f.default!r}.")
        for ok, sentence in (
            (e or kind != "mined", "Mined pairs need an encoder, the RunConfig of the run that finds them."),
            (self.pair_count or kind in ("none", "mined"), f"pairs {kind!r} needs a pair_count above 0."),
            (self.leave_out != "partners" or kind != "none", "leave_out 'partners' needs pairs."),
            (-1 <= low < high <= 1, "pair_low and pair_high must be cosines, the lower one first."),
            (not e or (e.size, e.channels) == (self.size, self.channels),
             "encoder must see images of the run's shape."),
            (-1 <= self.encoder_epoch <= (e.epochs if e else 0),
             "encoder_epoch must lie in 0 to the encoder's epochs."),
        ):
            _need(ok, sentence)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(_Config):
    """One evaluation of one checkpoint of one run, a record of its own."""

    run: RunConfig
    kind: str = "linear"  # a name in evaluate.KINDS
    epoch: int = -1  # checkpoint; -1 = the last (open: never the best on test)
    data: str = ""  # fingerprint of the set to classify; "" = the run's own
    labels: float = 1.0  # share of the training labels, drawn uniformly (Sec. 4.1)
    label_count: int = 0  # number of labels instead of a share; 0 = use `labels`
    label_seed: int = 0
    seed: int = -1  # classifier's initialisation and order; -1 = the run's
    repeats: int = 1  # open; linear: probes of so many seeds on the same features; one probe's end is chance
    # val: 20 % of the chosen labels are held out and scored instead; part (report only): fitted on 80 % of
    # the test images and scored on the rest, as the student report did
    score_on: Literal["test", "val", "part"] = "test"
    fold: int = -1  # open: STL-10's full 5,000 training images; 0 to 9 = one predefined fold
    # classifier: Sec. 4.1
    fit_epochs: int = 50
    lr: float = 0.05
    backbone_lr: float = 0.05  # open: fine-tuning moves the backbone at the classifier's rate
    momentum: float = 0.9
    weight_decay: float = 0.0  # open
    schedule: Literal["constant", "cosine"] = "constant"  # open
    batch: int = 256
    keep_last: bool = True  # open: a short last batch is used; dropping it would halve training at 1 %
    augment: str = "none"  # open: resize and normalise only, so that features can be cached
    bn: Literal["eval", "train"] = "eval"  # open: BatchNorm of a frozen backbone keeps its running statistics
    stats: Literal["run", "data"] = "run"  # open: whose pixel statistics normalise: the pre-training set's
    k: int = 200  # knn: neighbours
    tau: float = 0.1  # knn: weight exp(cosine / tau)
    C: float = 1.0  # logistic: inverse strength of the L2 penalty
    features: Literal["backbone", "pixels", "pca"] = "backbone"  # report: what is classified; pca: 32
    points: int = 1000  # tsne: test images on the map at most, drawn by label_seed
    perplexity: float = 30.0  # tsne
    pair_recipe: int = 1  # pairs: 2 where the list was made anew; the first lost equal images to rounding

    def __post_init__(self) -> None:
        super().__post_init__()
        run, kind = self.run, self.kind
        for name, asked, own in (("epoch", -1, run.epochs), ("seed", -1, run.seed), ("data", run.data, "")):
            if getattr(self, name) == asked:  # one evaluation, one key
                self._set(name, own)
        self._check_ranges()
        cached = (kind, self.augment, self.bn) == ("linear", "none", "eval")
        _need(self.repeats == 1 or cached and self.repeats < 256,
              f"repeats is for kind linear on cached features, at most 255, not {self.repeats} of {kind}.")
        _need(self.pair_recipe == 1 or self.pair_recipe == 2 and kind == "pairs",
              f"pair_recipe is 1, or 2 of kind pairs, not {self.pair_recipe} of kind {kind}.")
        _need(0 <= self.epoch <= run.epochs,
              f"epoch must lie in 0 to {run.epochs}, the length of its run, got {self.epoch}.")
