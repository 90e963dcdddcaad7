"""What makes two runs the same: flat frozen configs, and the key that names each.

A key is the first 16 hex digits of sha256 over canonical JSON that omits every field at its default, so a record stays
found when the project grows: a default never changes, and a new field's default is the old behaviour.
Where the paper leaves a choice open the comment says "open"; the default then is this project's reading.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints


class SidaeError(Exception):
    """Base class of every error this project raises on purpose: one sentence that says what to do."""


def epoch_seed(seed: int, epoch: int | float) -> int:
    """Seed of the generator that draws an epoch's order and augmentation: a hash, since torch's CPU generator keeps only
    the low 32 bits, so that `seed << 32` would be no seed at all."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4], "big")


LISTS: dict[str, type] = {"datasets": str, "seeds": int, "protocols": str}  # parameters that are lists, and of what


def typed(name: str, value: Any, kind: type) -> Any:
    """The value of a parameter of a notebook, of the command line or of a function: where a list is declared a single one is
    a list of one. Raises SidaeError, which names the parameter, for another type."""
    if kind is list:
        values = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
        return [typed(name, v, LISTS[name]) for v in values] if name in LISTS else [*values]
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


# Raised when the mathematics of a method or of a pipeline changes; a name that is not listed stands at 1.
METHOD_RECIPES: dict[str, int] = {"byol": 2, "dino": 2}  # 2: the momentum's cosine is no longer a step ahead
AUGMENT_RECIPES: dict[str, int] = {}
# What a method compares when `extract` is left empty; naming it anyway is the same run.
EXTRACTS = {"amdim": "01,02,11", "yadim": "00", "cpc_v2": "2,3,4,5,6"}


def digest(value: Any) -> str:
    """sha256, 64 hex digits, of the canonical JSON of a value. Raises ValueError when it holds NaN or infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache  # a grid of the paper a hundred times over makes half a million configs
def _hints(cls: type) -> dict[str, tuple[Any, tuple]]:
    """Each field's type and, of a choice, what there is to choose from."""
    return {name: (kind, get_args(kind)) for name, kind in get_type_hints(cls).items()}


class _Config:
    """Strict construction, canonical JSON and the key, shared by the configs below."""

    def __post_init__(self) -> None:
        for name, (kind, choices) in _hints(type(self)).items():
            value = getattr(self, name)
            if kind is int and type(value) is int:
                self._require(abs(value) < 2**63, f"{name} must lie below 2^63.")
            if kind is float and type(value) in (int, float):
                self._require(abs(value) < 1e300, f"{name} must be a finite number, not {value}.")
                object.__setattr__(self, name, value := value + 0.0)  # 1 and 1.0 are one run, 0.0 and -0.0 too
            if NoneType in choices:
                self._require(isinstance(value, choices), f"{name} must be a {choices[0].__name__} or None, not {value!r}.")
            elif choices:
                self._require(value in choices, f"Unknown {name} {value!r}; choose from {', '.join(choices)}.")
            else:
                self._require(type(value) is kind, f"{name} must be {kind.__name__}, not {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their default, as JSON types: what the key is taken over."""
        out = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, _Config):
                value = value.to_dict()
            if value != f.default:
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
        kinds = {k: next(iter(choices), kind) for k, (kind, choices) in _hints(cls).items()}  # of `X | None` it is X
        return cls.create(**{k: v if v is None else getattr(kinds.get(k), "from_dict", lambda v: v)(v) for k, v in d.items()})

    def replace(self, /, **changes):
        """A copy with some fields changed. Raises SidaeError on an unknown field."""
        return type(self).create(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | changes)

    @classmethod
    def create(cls, /, **fields):
        """The constructor, with an unknown or missing field as a SidaeError."""
        names = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(repr(k) for k in fields if k not in names):
            raise SidaeError(f"Unknown {cls.__name__} field {', '.join(unknown)}; known: {', '.join(names)}.")
        needed = (f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING)
        if missing := [n for n in needed if n not in fields]:
            raise SidaeError(f"A {cls.__name__} needs the field {', '.join(missing)}.")
        return cls(**fields)

    def _require(self, ok: bool, sentence: str) -> None:
        if not ok:
            raise SidaeError(sentence)

    def _ranges(self, positive: tuple[str, ...], not_negative: tuple[str, ...]) -> None:
        """The rules for the names given, and for the fields that both configs have."""
        for name, value in vars(self).items():
            if name == "lr" or name in positive:
                self._require(value > 0, f"{name} must be positive, got {value}.")
            if name in ("weight_decay", "label_count", *not_negative):
                self._require(value >= 0, f"{name} must not be negative, got {value}.")
            if name.endswith("seed"):
                self._require(0 <= value < 2**32, f"{name} must lie in 0 to 2^32 - 1, got {value}.")
        self._require(0 < self.labels <= 1, f"labels is a fraction in (0, 1], not {self.labels}.")
        self._require(self.labels == 1 or not self.label_count, "labels and label_count exclude each other; give one.")
        self._require(self.batch >= 2, f"batch must be at least 2 (BatchNorm needs two samples), got {self.batch}.")
        self._require(0 <= self.momentum < 1, f"momentum must lie in [0, 1), got {self.momentum}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Config):
    """Everything that changes the result of one pre-training run (section numbers: arXiv:2304.02549).

    Device, paths, threads and compilation are left out: they change bits at most, never the experiment.
    """

    method: str  # a name in methods.METHODS
    data: str  # fingerprint of the decoded arrays (data.identify), never a name or a path
    seed: int = 0  # weights, order and augmentation
    # training images
    split: Literal["train", "unlabeled"] = "train"  # unlabeled: STL-10's 100,000
    pool: int = 0  # how many of the split's images to train on, drawn by pool_seed; 0 = all
    pool_seed: int = 0
    channels: int = 3  # open: grey sets are replicated to 3 channels, one architecture for all sets
    size: int = 32  # pixels (Sec. 4.1)
    resize: Literal["antialias", "bilinear"] = "antialias"  # open: of the whole image, before any augmentation
    labels: float = 1.0  # supervised only: share of the training labels
    label_count: int = 0  # supervised only: number of labels instead of a share; 0 = use `labels`
    label_seed: int = 0  # one subset for all runs and methods (Sec. 4.1)
    augment: str = "simsiam_cifar"  # a name in augment.VIEWS; open there: blur kernel 9, sigma U(0.1, 2)
    # semantic pairs of two images, trained on beside every image's own two views (SePP-ID, TMLR 04/2024, Algorithm 1)
    pairs: Literal["none", "mined", "random", "wrong", "oracle"] = "none"  # random: images again; the last two by label
    encoder: "RunConfig | None" = None  # mined: the run whose embeddings are compared; it is trained first
    encoder_epoch: int = -1  # its checkpoint; -1 = the last, 0 = untrained
    pair_share: float = 0.1  # K: share of the training images among which pairs are sought
    pair_seed: int = 0  # draws the K images and the controls
    pair_low: float = 0.97  # mined: least and largest cosine; they belong to one encoder
    pair_high: float = 0.99
    pair_count: int = 0  # how many pairs, the highest cosines first; 0 = all between the thresholds
    pair_weight: float = 1.0  # lambda of eq. 2, in (0, 1]: how often a pair is drawn, an image being drawn once
    redraw: bool = True  # False: an image's views are drawn once and met again in every epoch
    stats: Literal["data", "half"] = "data"  # normalisation by the set's mean and std, or (x - 0.5) / 0.5
    # network
    backbone: Literal["resnet18", "resnet34", "small_cnn", "amdim", "patches18", "patches34"] = "resnet18"
    stem: Literal["imagenet", "cifar"] = "imagenet"  # open: 7x7 stride 2 and max-pool, the accuracy points to it
    width: int = 64  # channels of the first stage
    depth: int = 3  # units a block of AMDIM's encoder (10 in its CIFAR-10 run)
    zero_init: bool = False  # open: ResNet-18 and -34 alone: the last BatchNorm of every residual block starts at 0
    norm: Literal["group", "layer"] = "group"  # of a patch encoder: BatchNorm would tell one patch of the others
    dim: int = 2048  # D, the projector's output ("set to [4]")
    hidden: int = 2048  # open: the projector's hidden width
    proj_affine: bool = False  # open: scale and shift in the projector's last BatchNorm
    pred_hidden: int = 512  # the predictor's bottleneck
    decoder: int = 512  # open: channels at 1x1, then a mirror of ResNet-18
    # SidAE and the autoencoder
    w: float = 0.5  # open: the loss weight, L = w L_si + (1 - w) L_dae
    target: Literal["standardised", "unit"] = "standardised"  # open: scale of the reconstruction target; unit: [0, 1]
    recon: Literal["mean", "sum"] = "mean"  # open: squared error as a mean over elements; sum: over an image's elements
    recon_target: Literal["clean", "view"] = "clean"  # open: the undisturbed image for both views; view: each its own
    output: Literal["linear", "sigmoid", "tanh"] = "linear"  # open: the decoder's last activation
    # siamese and contrastive methods; each method's own values at CIFAR scale: experiments.RECIPES
    tau: float = 0.1  # temperature of the similarities; DINO: the student's
    ema: float = 0.99  # m of the momentum network; BYOL and DINO raise it to 1 by a cosine
    queue: int = 4096  # embeddings of earlier batches
    symmetric: bool = False  # MoCo: either view asks, the sum of both directions
    splits: int = 8  # MoCo: parts of the batch that BatchNorm sees apart
    leave_out: Literal["same", "none", "partners"] = "same"  # what besides the anchor's own views is no negative, by id
    prototypes: int = 2048  # DINO: size of the last layer
    support: int = 1  # FNC: views beside the two, that find false negatives, and are anchors and positives too
    top: int = 10  # FNC: at most so many false negatives (views) an image
    threshold: float = 0.7  # FNC: their least cosine
    cancel: Literal["attract", "eliminate"] = "attract"  # FNC: they become positives, or leave the sum
    # feature maps compared across views, and methods made of five parts (methods/maps.py)
    extract: str = ""  # comparisons "01,02,11" of maps, "vector", CPC's rows below "2,3,4"; "" = the method's own
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
    schedule: Literal["cosine", "constant", "steps"] = "cosine"  # decay to 0, per step; steps: AMDIM's two drops
    warmup: float = 0.0  # share of the steps in which the rate rises linearly
    predictor_lr: Literal["schedule", "constant"] = "schedule"  # open: the predictor follows the schedule
    batch: int = 512
    epochs: int = 200
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; set by the scale and never by the device
    # which mathematics; 0 asks for the current ones and is resolved at once
    method_recipe: int = 0
    augment_recipe: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, current in (("method_recipe", METHOD_RECIPES.get(self.method, 1)),
                              ("augment_recipe", AUGMENT_RECIPES.get(self.augment, 1))):  # fmt: skip
            object.__setattr__(self, name, getattr(self, name) or current)
        if self.extract == EXTRACTS.get(self.method):
            object.__setattr__(self, "extract", "")
        self._ranges(positive=("size", "width", "dim", "hidden", "pred_hidden", "decoder", "tau", "queue", "splits",
                               "prototypes", "top", "depth", "clip"),
                     not_negative=("epochs", "pool", "support", "pair_count", "per_class", "margin", "method_recipe",
                                   "augment_recipe"))  # fmt: skip
        self._check_pairs()
        self._require(0 <= self.w <= 1, f"w must lie in [0, 1] (0 = autoencoder, 1 = SimSiam), got {self.w}.")
        self._require(0 <= self.ema <= 1, f"ema must lie in [0, 1], got {self.ema}.")
        self._require(self.channels in (1, 3), f"channels must be 1 or 3, got {self.channels}.")
        self._require(0 <= self.warmup < 1, f"warmup is a share of the steps in [0, 1), got {self.warmup}.")
        self._require(0 <= self.beta2 < 1, f"beta2 must lie in [0, 1), got {self.beta2}.")

    def _check_pairs(self) -> None:
        e, mined, none = self.encoder, self.pairs == "mined", self.pairs == "none"
        if e and self.encoder_epoch == e.epochs:
            object.__setattr__(self, "encoder_epoch", -1)  # one run, one key
        for f in dataclasses.fields(self):
            unread = none or not mined and f.name in ("encoder", "encoder_epoch", "pair_low", "pair_high")
            self._require(not (unread and f.name.startswith(("encoder", "pair_"))) or getattr(self, f.name) == f.default,
                          f"pairs {self.pairs!r} does not read {f.name}; leave it at its default, {f.default!r}.")  # fmt: skip
        for ok, sentence in (
            (not mined or e, "Mined pairs need an encoder, the RunConfig of the run that finds them."),
            (none or mined or self.pair_count, f"pairs {self.pairs!r} needs a pair_count above 0."),
            (not none or self.leave_out != "partners", "leave_out 'partners' needs pairs."),
            (0 < self.pair_share <= 1, f"pair_share must lie in (0, 1], got {self.pair_share}."),
            (0 < self.pair_weight <= 1, f"pair_weight must lie in (0, 1], got {self.pair_weight}; 0 is pairs 'none'."),
            (-1 <= self.pair_low < self.pair_high <= 1, "pair_low and pair_high must be cosines, the lower one first."),
            (not e or (e.size, e.channels) == (self.size, self.channels), "encoder must see images of the run's shape."),
            (-1 <= self.encoder_epoch <= (e.epochs if e else 0), "encoder_epoch must lie in 0 to the encoder's epochs."),
        ):
            self._require(bool(ok), sentence)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if not (k.endswith("_recipe") and v == 1)}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "RunConfig":
        first = {"method_recipe": 1, "augment_recipe": 1}  # a recipe that a record does not name is the first
        return super().from_dict(first | d if isinstance(d, dict) else d)

    def replace(self, /, **changes) -> "RunConfig":
        return super().replace(**{"method_recipe": 0, "augment_recipe": 0} | changes)


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
    repeats: int = 1  # linear: probes of so many seeds on the same features, since where its constant rate ends is chance
    score_on: Literal["test", "val", "part"] = "test"  # val: 20 % of the chosen labels are held out and scored instead
    # part, report only: fitted on 80 % of the test images, scored on the rest, as the student report did
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
    stats: Literal["run", "data"] = "run"  # open: whose pixel statistics normalise, the pre-training set's or data's
    k: int = 200  # knn: neighbours
    tau: float = 0.1  # knn: weight exp(cosine / tau)
    C: float = 1.0  # logistic: inverse strength of the L2 penalty
    features: Literal["backbone", "pixels", "pca"] = "backbone"  # report: what is classified; pca: 32 components
    points: int = 1000  # tsne: test images on the map at most, drawn by label_seed
    perplexity: float = 30.0  # tsne
    pair_recipe: int = 1  # pairs: 2 names a list made anew because the first had lost a pair of equal images to rounding

    def __post_init__(self) -> None:
        super().__post_init__()
        run = self.run  # one evaluation, one key: what is the run's own is written in one way
        for name, asked, own in (("epoch", -1, run.epochs), ("seed", -1, run.seed), ("data", run.data, "")):
            if getattr(self, name) == asked:
                object.__setattr__(self, name, own)
        self._ranges(positive=("fit_epochs", "k", "tau", "C", "points", "perplexity", "repeats"),
                     not_negative=("backbone_lr",))  # fmt: skip
        cached = (self.kind, self.augment, self.bn) == ("linear", "none", "eval")
        self._require(self.repeats == 1 or cached and self.repeats < 256, f"repeats is for kind linear on cached features, at "
                      f"most 255, not {self.repeats} of kind {self.kind}.")  # fmt: skip
        self._require(1 <= self.pair_recipe <= 1 + (self.kind == "pairs"),
                      f"pair_recipe is 1, or 2 of kind pairs, not {self.pair_recipe} of kind {self.kind}.")  # fmt: skip
        self._require(0 <= self.epoch <= run.epochs,
                      f"epoch must lie in 0 to {run.epochs}, the length of its run, got {self.epoch}.")  # fmt: skip
        self._require(-1 <= self.fold <= 9, f"fold must lie in 0 to 9, or be -1 for all, got {self.fold}.")
