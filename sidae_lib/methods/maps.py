"""Around the paper: methods that compare places of feature maps.

A map has a vector for each place. The last of these methods is made of any five choices (arXiv:2009.00104).
"""

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
from .base import METHODS, Axes, Batch, Look, Method, Views

BLOCK = 2**24  # scores at once, 64 MiB a tensor of them; a block holds about five such tensors
NCE = r"""\mathbb E \Big[ -\log \frac{e^{\phi(f_a, f_b)}}{e^{\phi(f_a, f_b)}
    + \sum_{\tilde f_b \in N} e^{\phi(f_a, \tilde f_b)}} \Big] + 0.05 \, \overline{s^2}"""
SCORE = r"\phi &= c \tanh \tfrac{s}{c}, \quad s(f_a, f_b) = \tfrac{1}{\sqrt d} \, f_a^\top f_b"


def by_blocks(score: Callable[..., Tensor], columns: int, *rows: Tensor) -> Tensor:
    """`score` of tensors with N rows, a mean over rows, by blocks of at most BLOCK scores, at least a row.
    Those of several blocks are computed again on the way back, so that only one block's are ever kept."""
    size = max(1, BLOCK // columns)
    if size >= len(rows[0]):
        return score(*rows)
    again = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)  # draws nothing
    parts = [len(block[0]) * again(*block) for block in zip(*(r.split(size) for r in rows))]
    return torch.stack(parts).sum(0) / len(rows[0])


class Context(nn.Module):
    """CPC v2's masked context network, (B, c, G, G) -> (B, c, G, G): a row sees itself and rows above alone.
    Ones lie above the first row as in bolts, by an author of arXiv:2009.00104 (the paper does not say). Here
    the 1x3 convolution is padded; bolts pads the 2x1 at the sides, which adds columns that are its bias."""

    def __init__(self, c: int, hidden: int, blocks: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.Conv2d(c, hidden, 1), nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)), nn.ConstantPad2d((0, 0, 1, 0), 1.0),
            nn.Conv2d(hidden, hidden, (2, 1)), nn.ReLU(inplace=True), nn.Conv2d(hidden, c, 1),
        ) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.relu()


class CPC(Method, name="cpc_v2"):
    """CPC v2 (arXiv:1905.09272): the upper part of an image predicts the patches below.
    The context c in row i and column j sees row i and those above. It predicts z, the vector of the patch k
    rows below, for each k that `extract` names. The prediction is compared with the z_l of every patch l of
    the batch. All but the right one are negatives, which prevent collapse. It needs an encoder of patches.

    Cross-entropies are averaged for each k and then summed. A k that is named n times counts n times. (The
    library bolts, on a 7x7 grid, names "2,3,3,4,4,4,5,5,5,5,6,6,6,6,6"; its k share one prediction head W.)

    Deviations: no augmentation per patch."""

    look = Look("CPC v2", "#6B4C9A", "H")
    axes = Axes(augment="cpc_patches", encode="patch encoder + masked context", extract=EXTRACTS["cpc_v2"],
                compare="dot", loss="cross_entropy; every other patch of the batch as negative")
    equation = r"""L &= \sum_k \mathbb E_{i,j} \Big[ -\log \frac{\exp(\hat z_{i+k,j}^\top z_{i+k,j} / 10)}
        {\sum_l \exp(\hat z_{i+k,j}^\top z_l / 10)} \Big] \\ \hat z_{i+k,j} &= W_k \, c_{i,j}"""
    reads = ("extract", "hidden", "dim")
    own = {"augment": "cpc_patches", "encode": "patches18", "extract": EXTRACTS["cpc_v2"]}

    @classmethod
    def validate(cls, c: RunConfig) -> None:
        if not c.backbone.startswith("patches"):
            raise SidaeError(f"cpc_v2 predicts patches, and backbone {c.backbone} cuts none; "
                             "choose patches18 or patches34.")
        extract, last = c.extract or EXTRACTS["cpc_v2"], c.size // 4 - 2
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", extract) or max(map(int, extract.split(","))) > last:
            raise SidaeError(f"extract {extract!r} is not a list of rows below; "
                             f"write numbers from 1 to {last} such as 2,3.")

    def __init__(self, c: RunConfig, classes: int = 0) -> None:
        super().__init__(c)
        width = self.backbone.out_features
        self.rows = Counter((c.extract or EXTRACTS["cpc_v2"]).split(","))
        self.context = Context(width, c.hidden)
        self.target = nn.Conv2d(width, c.dim, 1)
        self.predict = nn.ModuleDict({row: nn.Conv2d(width, c.dim, 1) for row in self.rows})

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        grid, = self.backbone.maps(views[0])  # (B, F, G, G)
        context = self.context(grid)  # (B, F, G, G)
        targets = self.target(grid).permute(0, 2, 3, 1)  # (B, G, G, D)
        number = torch.arange(targets[..., 0].numel(), device=grid.device).view(targets.shape[:3])
        z, targets = targets.detach().mean((1, 2)), targets.flatten(0, 2)  # (B, D), (B G G, D)

        def score(predicted: Tensor, right: Tensor) -> Tensor:
            return F.cross_entropy(losses.dot(predicted, targets, 0.1), right)

        loss = 0
        for row, times in self.rows.items():
            predicted = self.predict[row](context[:, :, : -int(row)])  # (B, D, G - row, G)
            predicted, right = predicted.permute(0, 2, 3, 1).flatten(0, 2), number[:, int(row) :].flatten()
            loss = loss + times * by_blocks(score, len(targets), predicted, right)
        return {"loss": loss, "z": z - z.mean(0)}  # what all targets share moves every score of a row alike


class Embedding(nn.Module):
    """AMDIM's way to compare maps of different widths, (B, c_in, s, s) -> (B, c_out, s, s): two 1x1
    convolutions that start at 0, beside one that starts near the identity, then BatchNorm."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 1, bias=False)
        self.beside = nn.Conv2d(c_in, c_out, 1)
        self.bn = nn.BatchNorm2d(c_out)
        nn.init.zeros_(self.conv2.weight)
        with torch.no_grad():
            near = torch.eye(c_out, c_in)[..., None, None]
            self.beside.weight.uniform_(-0.01, 0.01).mul_(1 - near).add_(near)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv2(self.conv1(x).relu()) + self.beside(x))


def comparisons(text: str) -> list[tuple[int, tuple[int, ...]]]:
    """"01,0r" -> [(0, (1,)), (0, (0, 1, 2))]: map of the anchors, maps of the candidates. 0 is the last map;
    "r" is any of the three, drawn for every step. Raises SidaeError for another text."""
    pairs = text.split(",")
    if not re.fullmatch(r"[012][012r](,[012][012r])*", text) or len(set(pairs)) < len(pairs):
        raise SidaeError(f'extract {text!r} is not a list of comparisons; write map pairs such as "01,02,11" '
                         "with 0, 1 and 2 for the last three maps and r for any of them, each pair once.")
    return [(int(a), (0, 1, 2) if b == "r" else (int(b),)) for a, b in pairs]


class Composed(Method):
    """A composed method is made of any five choices on the axes of Falcon and Cho (arXiv:2009.00104).
    Each is a field of the config: `augment`, `backbone`, `extract`, `compare`, `loss`. Vectors u and v of two
    views, of D numbers each, get a score s. It is s+ if they are of the same image, else s-. The other images
    are the negatives, which prevent collapse.

    `extract` is "vector": the projections of both views, each against all others, as in SimCLR. Or it lists
    comparisons of maps, such as "01,11": one random place per image of one view's map against all places of
    the other view's map, both ways. `compare` is "cosine", divided by tau. Or it is "dot", divided by the
    root of D and clipped softly at c (the field `clip`); then 0.05 times the mean square of the scores before
    clipping joins the loss. In "nce" a positive stands against the negatives alone, in "info_nce" against the
    other positives too."""

    look = Look("Composed", "#225555", "4")
    axes = Axes(augment="yadim", encode="any backbone", extract='"vector" or comparisons of maps',
                compare="dot or cosine", loss="nce or info_nce")
    equation = r"""L_{\text{nce}} &= \mathbb E \Big[ -\log \frac{e^{s_+}}{e^{s_+} + \sum_- e^{s_-}} \Big] \\
        L_{\text{info-nce}} &= \mathbb E \Big[ -\log \frac{e^{s_+}}{\sum_+ e^{s_+} + \sum_- e^{s_-}} \Big] \\
        s &= \cos(u, v) / \tau \quad \text{or} \quad c \tanh \frac{\langle u, v \rangle}{c \sqrt D}"""
    reads: tuple[str, ...] = ("extract", "compare", "loss", "clip", "tau", "dim", "hidden")
    own = {"augment": "yadim", "encode": "resnet18 (cifar)", "extract": "00", "compare": "dot", "loss": "nce"}

    @classmethod
    def validate(cls, c: RunConfig) -> None:
        if c.method == "composed" and not (c.extract and c.compare and c.loss):
            raise SidaeError("A composed method names its extract, compare and loss; "
                             "give all three, as `compose` does.")
        if not augment.VIEWS[c.augment].second:
            raise SidaeError(f"augment {c.augment!r} leaves the second view as it is, and two views are "
                             "compared here; choose a pipeline that changes both.")
        extract = c.extract or EXTRACTS[c.method]
        if c.method == "composed" and extract == "vector":
            return
        with torch.device("meta"):
            there = len(getattr(networks.backbone(c), "widths", ()))
        if (last := max(max(a, *b) for a, b in comparisons(extract))) >= there:
            raise SidaeError(f"extract {extract!r} asks for map {last}, and backbone {c.backbone} gives "
                             f"{there} maps, counted from 0; compare others or choose another backbone.")

    def __init__(self, c: RunConfig, classes: int = 0) -> None:
        super().__init__(c)
        extract = c.extract or EXTRACTS[c.method]
        self.compare, self.criterion = c.compare or "dot", getattr(losses, c.loss or "nce")
        if extract == "vector":
            self.comparisons = []
            self.projector = networks.projector(self.backbone.out_features, c.hidden, c.dim)
            return
        self.comparisons = comparisons(extract)
        widths, crossed = self.backbone.widths, any({a} != {*b} for a, b in self.comparisons)
        self.heads = nn.ModuleDict()
        for k in sorted({k for a, b in self.comparisons for k in (a, *b)}):
            head = Embedding(widths[k], widths[0]) if crossed and k else nn.BatchNorm2d(widths[k])
            normal = c.backbone == "amdim" and k == 0  # ends on a BatchNorm; without one the scores explode
            self.heads[str(k)] = nn.Identity() if normal else head
        self.register_buffer("place", torch.empty(len(self.comparisons), 2, c.batch))
        self.register_buffer("map", torch.empty(len(self.comparisons)))
        self.after_step(**self.ahead(0, 1))

    def ahead(self, step: int, steps: int) -> dict[str, float | Tensor]:
        """Where the next step's anchors lie, and which map "r" is: a function of (seed, step)."""
        g = Generator().manual_seed(epoch_seed(self.config.seed, step / steps))
        drawn = ("place", "map") if self.comparisons else ()
        return {k: torch.rand(getattr(self, k).shape, generator=g) for k in drawn}

    def after_step(self, **ahead: Tensor) -> None:
        for k, v in ahead.items():
            getattr(self, k).copy_(v, non_blocking=True)

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        B = len(views[0])
        if not self.comparisons:
            z = torch.cat([self.embed(v) for v in views])  # (2B, D)
            loss, square = self.contrast(z, z, B, same=True)
        else:
            terms, maps = [], [{int(k): head(m[int(k)]) for k, head in self.heads.items()}
                               for m in map(self.backbone.maps, views)]
            for n, (a, candidates) in enumerate(self.comparisons):
                a1, a2 = (self.anchor(m[a], place[:B]) for m, place in zip(maps, self.place[n]))  # (B, D)
                z = a1 if n == 0 else z
                each = []
                for b in candidates:
                    c1, c2 = (m[b].permute(2, 3, 0, 1).flatten(0, 2) for m in maps)  # (L B, D)
                    each.append((self.contrast(a1, c2, B) + self.contrast(a2, c1, B)) / 2)
                drawn = (self.map[n : n + 1] * len(each)).long()
                terms.append(torch.stack(each).index_select(0, drawn)[0])
            loss, square = torch.stack(terms).sum(0)
        out = {"loss": loss, "z": z[:B].detach()}
        if self.compare == "dot":
            out |= {"loss": loss + 0.05 * square, "l_nce": loss, "square": square}
        return out

    @staticmethod
    def anchor(m: Tensor, place: Tensor) -> Tensor:
        """One place of every image's map: m (B, D, s, s), place (B,) in [0, 1) -> (B, D)."""
        at = (place * m[0, 0].numel()).long()
        return m.flatten(2).gather(2, at[:, None, None].expand(-1, m.shape[1], 1))[..., 0]

    def contrast(self, anchors: Tensor, candidates: Tensor, B: int, same: bool = False) -> Tensor:
        """(2,): the loss, and the mean squared score. anchors (N, D) of the images n % B, candidates (M, D)
        of m % B; same: they are the same vectors, and none is compared with itself."""
        n, m = (torch.arange(len(x), device=x.device) for x in (anchors, candidates))

        def score(rows: Tensor, n: Tensor) -> Tensor:
            itself = (n[:, None] == m) & same
            if self.compare == "cosine":
                s = losses.cosine(rows, candidates) / self.config.tau
                square = s.new_zeros(())
            else:
                s = losses.dot(rows, candidates, rows.shape[1] ** -0.5)
                square, s = s.square().mean(), losses.soft_clip(s, self.config.clip)
            return torch.stack([self.criterion(s, (n[:, None] % B == m % B) & ~itself, itself), square])

        return by_blocks(score, len(candidates), anchors, n)


class AMDIM(Composed, name="amdim"):
    """AMDIM (arXiv:1906.00910, eq. 4): a place of one view's map has to find places of the other view's maps.
    Its encoder's last three maps have 1x1, 5x5 and 7x7 places. The map of 1x1 has to find the places of the
    5x5 and of the 7x7 map; a place of the 5x5 map has to find those of the 5x5 map, always both ways. f_a and
    f_b are the vectors of two places, of d numbers each. Their score s is a dot product; phi is s clipped
    softly at c. The mean square of all s joins the loss. Places of other images are the negatives N, which
    prevent collapse. It needs a backbone with maps. If this is not AMDIM's own, its last three maps are used."""

    look = Look("AMDIM", "#AA4466", "d")
    axes = Axes(augment="amdim", encode="AMDIM's encoder + embeddings", extract=EXTRACTS["amdim"],
                compare="dot + soft_clip", loss="nce; places of other images as negatives")
    equation = rf"L &= L_{{1,5}} + L_{{1,7}} + L_{{5,5}} \\ L_{{a,b}} &= {NCE} \\ {SCORE}"
    reads = ("extract", "clip")
    own = Composed.own | {"augment": "amdim", "encode": "amdim", "extract": EXTRACTS["amdim"]}


class YADIM(Composed, name="yadim"):
    """YADIM-like (arXiv:2009.00104): AMDIM's loss for any encoder. This is our guess: the paper's abstract and its
    authors' library make it likely. A place of one view's last map has to find the places of the other view's
    last map, both ways, by AMDIM's scores. Each view is mirrored or not on its own. Places of other images are
    the negatives N, which prevent collapse. It needs a backbone with maps.

    Deviations: not known, since we could get neither the paper's full text nor YADIM's code."""

    look = Look("YADIM-like", "#117733", "*")
    axes = Axes(augment="yadim", encode="any backbone with maps + BatchNorm of each map",
                extract=EXTRACTS["yadim"], compare="dot + soft_clip",
                loss="nce; places of other images as negatives")
    equation = rf"L &= {NCE} \\ {SCORE}"
    reads = AMDIM.reads


METHODS["composed"] = Composed  # behind its special cases
