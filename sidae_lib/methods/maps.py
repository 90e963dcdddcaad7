"""Methods that compare places of feature maps, and the method made of any five choices (arXiv:2009.00104)."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import augment, losses, networks
from ..config import EXTRACTS, RunConfig, SidaeError, epoch_seed
from .base import Axes, Method

BLOCK = 2**24  # scores at once, 64 MiB a tensor of them; a block holds about five such tensors


def comparisons(text: str) -> list[tuple[int, tuple[int, ...]]]:
    """"01,02,11" -> [(0, (1,)), (0, (2,)), (1, (1,))]: map of the anchors, maps of the candidates; 0 is the last map, and
    "r" any of the three, drawn anew for every step. Raises SidaeError for any other text."""
    pairs = text.split(",")
    if not re.fullmatch(r"[012][012r](,[012][012r])*", text) or len(set(pairs)) < len(pairs):
        raise SidaeError(f'extract {text!r} is not a list of comparisons; write map pairs such as "01,02,11" with 0, 1 and '
                         '2 for the last three maps and r for any of them, each pair once.')  # fmt: skip
    return [(int(a), (0, 1, 2) if b == "r" else (int(b),)) for a, b in pairs]


def by_blocks(score: Callable[[Tensor, int], Tensor], rows: Tensor, columns: int) -> Tensor:
    """What `score` makes of (rows, index of the first), a mean over rows, by blocks of at most BLOCK scores, at least a
    row. Scores of more than one block are computed again on the way back, so that only one block's are ever alive."""
    size = max(1, BLOCK // columns)
    if size >= len(rows):
        return score(rows, 0)
    again = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
    parts = [len(r) * again(r, k * size) for k, r in enumerate(rows.split(size))]
    return torch.stack(parts).sum(0) / len(rows)


class Composed(Method):
    """Any crossing of the five axes, each a field of the config: augment, backbone, extract, compare, loss.

    extract "vector": the projections of both views, each against all the others, SimCLR's way. A list of `comparisons`:
    one random place per image of a map of one view against all places of a map of the other, both ways.
    compare: cosine / tau; or dot / sqrt(D), clipped softly, with 0.05 times the mean squared score added to the loss.
    """

    axes = Axes(augment="yadim", encode="any backbone", extract='"vector" or comparisons of maps', compare="dot or cosine",
                loss="nce or info_nce")  # fmt: skip
    reads = ("extract", "compare", "loss", "clip", "tau", "dim", "hidden")
    own = {"augment": "yadim", "encode": "resnet18 (cifar)", "extract": "00", "compare": "dot", "loss": "nce"}

    @classmethod
    def validate(cls, config: RunConfig) -> None:
        if cls is Composed and not (config.extract and config.compare and config.loss):
            raise SidaeError("A composed method names its extract, compare and loss; give all three, as `compose` does.")
        if not augment.VIEWS[config.augment].second:
            raise SidaeError(f"augment {config.augment!r} leaves the second view as it is, and two views are compared here; "
                             "choose a pipeline that changes both.")  # fmt: skip
        extract = config.extract or EXTRACTS[config.method]
        if cls is Composed and extract == "vector":
            return
        with torch.device("meta"):
            there = len(getattr(networks.backbone(config), "widths", ()))
        if (last := max(max(a, *b) for a, b in comparisons(extract))) >= there:
            raise SidaeError(f"extract {extract!r} asks for map {last}, and backbone {config.backbone} gives {there} maps, "
                             "counted from 0; compare others or choose another backbone.")  # fmt: skip

    def __init__(self, config: RunConfig, classes: int = 0) -> None:
        super().__init__(config)
        self.extract = config.extract or EXTRACTS[config.method]
        self.compare, self.criterion = config.compare or "dot", config.loss or "nce"
        if self.extract == "vector":
            self.projector = networks.projector(self.backbone.out_features, config.hidden, config.dim)
            return
        self.pairs = comparisons(self.extract)
        widths, crossed = self.backbone.widths, any({a} != set(b) for a, b in self.pairs)
        self.heads = nn.ModuleDict()
        for k in sorted({k for a, b in self.pairs for k in (a, *b)}):  # without a BatchNorm the scores explode
            normal = nn.Identity() if config.backbone == "amdim" and k == 0 else nn.BatchNorm2d(widths[k])
            self.heads[str(k)] = networks.Embedding(widths[k], widths[0]) if crossed and k else normal
        self.register_buffer("place", torch.empty(len(self.pairs), 2, config.batch))
        self.register_buffer("map", torch.empty(len(self.pairs)))
        self.after_step(**self.ahead(0, 1))

    def ahead(self, step: int, steps: int) -> dict[str, float | Tensor]:
        """Where the next step's anchors lie: a function of (seed, step)."""
        if self.extract == "vector":
            return {}
        generator = Generator().manual_seed(epoch_seed(self.config.seed, step / steps))
        return {k: torch.rand(getattr(self, k).shape, generator=generator) for k in ("place", "map")}

    def after_step(self, **ahead: Tensor) -> None:
        for k, v in ahead.items():
            getattr(self, k).copy_(v, non_blocking=True)

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        B = len(views[0])
        if self.extract == "vector":
            z = torch.cat([self.projector(self.backbone(v)) for v in views])  # (2B, D)
            value, square = self.contrast(z, z, B, same=True)
        else:
            maps = [{k: head(m[int(k)]) for k, head in self.heads.items()} for m in map(self.backbone.maps, views)]
            terms = []
            for n, (a, candidates) in enumerate(self.pairs):
                anchors = [self.anchor(maps[v][str(a)], self.place[n, v, :B]) for v in (0, 1)]  # (B, D)
                flat = [[m[str(b)].permute(2, 3, 0, 1).flatten(0, 2) for m in maps] for b in candidates]  # (L B, D)
                each = [(self.contrast(anchors[0], c2, B) + self.contrast(anchors[1], c1, B)) / 2 for c1, c2 in flat]
                terms.append(torch.stack(each).index_select(0, (self.map[n : n + 1] * len(each)).long())[0])
                z = anchors[0] if n == 0 else z
            value, square = torch.stack(terms).sum(0)
        out = {"loss": value, "z": z[:B].detach()}
        return out if self.compare == "cosine" else out | {"loss": value + 0.05 * square, "l_nce": value, "square": square}

    @staticmethod
    def anchor(m: Tensor, place: Tensor) -> Tensor:
        """One place of every image's map: m (B, D, s, s), place (B,) in [0, 1) -> (B, D)."""
        at = (place * m[0, 0].numel()).long()
        return m.flatten(2).gather(2, at[:, None, None].expand(-1, m.shape[1], 1))[..., 0]

    def contrast(self, anchors: Tensor, candidates: Tensor, B: int, same: bool = False) -> Tensor:
        """(2,): the loss, and the mean squared score. anchors (N, D), candidates (M, D), row n and column m of the images
        n % B and m % B; same: they are the same vectors, and none is compared with itself."""
        m = torch.arange(len(candidates), device=anchors.device)

        def score(rows: Tensor, first: int) -> Tensor:
            n = torch.arange(first, first + len(rows), device=m.device)[:, None]
            itself = n == m if same else torch.zeros_like(n == m)
            with torch.autocast(rows.device.type, enabled=False):
                if self.compare == "cosine":
                    s = losses.cosine(rows, candidates) / self.config.tau
                    square = s.new_zeros(())
                else:
                    s = losses.dot(rows.float(), candidates.float(), rows.shape[1] ** -0.5)
                    square, s = s.square().mean(), losses.soft_clip(s, self.config.clip)
                return torch.stack([getattr(losses, self.criterion)(s, (n % B == m % B) & ~itself, itself), square])

        return by_blocks(score, anchors, len(candidates))


class AMDIM(Composed):
    """AMDIM (arXiv:1906.00910): the map of 1x1 finds the places of the maps of 5x5 and 7x7 in the other view, a place of
    5x5 those of 5x5; on another backbone its last three maps stand in for these."""

    axes = Axes(augment="amdim", encode="AMDIM's encoder + embeddings", extract=EXTRACTS["amdim"],
                compare="dot + soft_clip", loss="nce; places of other images as negatives")  # fmt: skip
    reads = ("extract", "clip")
    own = Composed.own | {"augment": "amdim", "encode": "amdim", "extract": EXTRACTS["amdim"]}


class YADIM(AMDIM):
    """YADIM-like (arXiv:2009.00104, whose body and code could not be had): an encoder-agnostic DIM, as abstract and library
    make likely. Own flips, any backbone that has maps; places of the last map find places of the last map."""

    axes = Axes(augment="yadim", encode="any backbone with maps + BatchNorm of each map", extract=EXTRACTS["yadim"],
                compare="dot + soft_clip", loss="nce; places of other images as negatives")  # fmt: skip
    own = Composed.own


class CPC(Method):
    """CPC v2 (arXiv:1905.09272): the context of the rows above predicts the patches `extract` rows below, among all
    patches of the batch, those of the same image too. A sum over the rows of mean cross-entropies.

    A row named n times counts n times: the authors' library, in bolts, counts "2,3,3,4,4,4,5,5,5,5,6,6,6,6,6" on a 7x7
    grid. One prediction head per row, as in the paper (there: one for all). No augmentation per patch. The context network's
    padding is not bolts' (`networks.Context`).
    """

    axes = Axes(augment="cpc_patches", encode="patch encoder + masked context", extract=EXTRACTS["cpc_v2"],
                compare="dot", loss="cross_entropy; every other patch of the batch as negative")  # fmt: skip
    reads = ("extract", "hidden", "dim")
    own = {"augment": "cpc_patches", "encode": "patches18", "extract": EXTRACTS["cpc_v2"]}

    @classmethod
    def validate(cls, config: RunConfig) -> None:
        if not config.backbone.startswith("patches"):
            raise SidaeError(f"cpc_v2 predicts patches, and backbone {config.backbone} cuts none; choose patches18 or "
                             "patches34.")  # fmt: skip
        extract, last = config.extract or EXTRACTS["cpc_v2"], config.size // 4 - 2
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", extract) or max(map(int, extract.split(","))) > last:
            raise SidaeError(f"extract {extract!r} is not a list of rows below; write numbers from 1 to {last} such as 2,3.")

    def __init__(self, config: RunConfig, classes: int = 0) -> None:
        super().__init__(config)
        width = self.backbone.out_features
        self.rows = Counter((config.extract or EXTRACTS["cpc_v2"]).split(","))
        self.context = networks.Context(width, config.hidden)
        self.target = nn.Conv2d(width, config.dim, 1)
        self.predict = nn.ModuleDict({row: nn.Conv2d(width, config.dim, 1) for row in self.rows})

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        grid, = self.backbone.maps(views[0])  # (B, F, G, G)
        context, targets = self.context(grid), self.target(grid).permute(0, 2, 3, 1)  # (B, G, G, D)
        number = torch.arange(targets[..., 0].numel(), device=grid.device).view(targets.shape[:3])
        z, targets, value = targets.detach().mean((1, 2)), targets.flatten(0, 2), 0
        for row, times in self.rows.items():
            r = int(row)
            predicted = self.predict[row](context[:, :, :-r]).permute(0, 2, 3, 1).flatten(0, 2)  # (B (G - r) G, D)
            right = number[:, r:].flatten()

            def score(p: Tensor, first: int, right: Tensor = right) -> Tensor:
                with torch.autocast(p.device.type, enabled=False):
                    return F.cross_entropy(losses.dot(p.float(), targets.float(), 0.1), right[first : first + len(p)])

            value = value + times * by_blocks(score, predicted, len(targets))
        return {"loss": value, "z": z - z.mean(0)}  # what all targets share moves every score of a row alike
