"""Methods with negatives, all by `losses.info_nce`: they differ in what is compared with what.

A batch's row r holds view 1 of image i[r] and view 2 of image j[r], the same image unless (i, j) is a semantic pair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses, networks
from ..config import RunConfig, SidaeError
from .base import Axes, Method, follow, momentum_copy


class Contrastive(Method):
    """What the methods below share: which images are no negatives of which."""

    partners: Tensor  # codes a 2^32 + b of all pairs of images (a, b) that are trained on, sorted, set by the loop

    def kin(self, a: Tensor, b: Tensor) -> Tensor:
        """(N, M) bool: which of the images b (M,) are no negatives of the images a (N,), both by id; `leave_out`."""
        same = a[:, None] == b
        if self.config.leave_out == "partners" and len(self.partners):
            code = (a[:, None] << 32) + b
            at = torch.searchsorted(self.partners, code).clamp(max=len(self.partners) - 1)
            return same | (self.partners[at] == code)  # torch.isin would wait for the device
        return torch.zeros_like(same) if self.config.leave_out == "none" else same


class Queue(nn.Module):
    """The newest K embeddings, normalised, newest first, with their images' ids and labels; noise (id -1) to begin with."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("z", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("id", torch.full((size,), -1))
        self.register_buffer("label", torch.full((size,), -1))

    def push(self, z: Tensor, ids: Tensor, labels: Tensor | None = None) -> None:
        """z (n, D), ids and labels (n,) come in, the oldest n go out."""
        labels = torch.full_like(ids, -1) if labels is None else labels
        for own, new in ((self.z, F.normalize(z.float(), dim=1)), (self.id, ids), (self.label, labels)):
            own.copy_(torch.cat([new, own])[: len(own)])


class SimCLR(Contrastive):
    """SimCLR (arXiv:2002.05709), its released three-layer head with BatchNorm: each of 2B views has its twin to find.

    Mean over the 2B rows; the official code adds the two views' means, twice this. Deviations: SGD for LARS, BatchNorm
    of each view apart, residual blocks that do not start at 0 unless `zero_init`, bilinear crops (official: bicubic).
    """

    axes = Axes(augment="simclr", encode="backbone + 3-layer projector", extract="last vector per view",
                compare="cosine / tau", loss="info_nce, other images of the batch as negatives")  # fmt: skip
    reads = ("dim", "hidden", "proj_affine", "tau", "leave_out")

    def __init__(self, config: RunConfig, classes: int = 0) -> None:
        super().__init__(config)
        c = config
        self.projector = networks.projector(self.backbone.out_features, c.hidden, c.dim, c.proj_affine)

    def rows(self, views: tuple[Tensor, ...], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of N = V B views: projections (N, D); (N, N) bool, the other views of the same row of the batch; and those that
        are no negatives, the view itself among them."""
        z = torch.cat([self.projector(self.backbone(v)) for v in views])
        image = torch.cat([batch["i"], batch["j"], *[batch["i"]] * (len(views) - 2)])
        row = torch.arange(len(views[0]), device=z.device).repeat(len(views))
        me = torch.eye(len(z), dtype=torch.bool, device=z.device)
        own = (row[:, None] == row) & ~me
        return z, own, me | self.kin(image, image) & ~own

    def loss(self, views: tuple[Tensor, ...], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        z, own, drop = self.rows(views, batch)
        return {"loss": losses.info_nce(losses.cosine(z, z) / self.config.tau, own, drop), "z": z[: len(views[0])].detach()}


class MoCo(Contrastive):
    """MoCo v2 (arXiv:2003.04297) as in the official CIFAR demo: a query finds its key among a queue of earlier keys.

    The head has no BatchNorm, the backbone's sees `splits` parts of the batch apart, and keys meet others there than
    queries do (shuffle-BN), by a fixed shuffle, since an epoch's order is random already. `symmetric` adds the other
    direction, twice the gradient, and enqueues both keys. Deviations: v2's two-layer head, where the demo has one layer;
    `leave_out` = "same" leaves an anchor's earlier views in the queue out, "none" is the official code.
    """

    axes = Axes(augment="simclr", encode="backbone + 2-layer MLP; momentum copy for keys", extract="last vector per view",
                compare="cosine / tau", loss="info_nce, a queue of earlier keys as negatives")  # fmt: skip
    reads = ("dim", "hidden", "tau", "ema", "queue", "symmetric", "splits", "leave_out")

    def __init__(self, config: RunConfig, classes: int = 0) -> None:
        super().__init__(config)
        c = config
        if c.batch % c.splits or c.batch < 2 * c.splits:
            raise SidaeError(f"batch must be a multiple of splits, at least twice it: {c.batch} and {c.splits} are not.")
        networks.split_batchnorm(self.backbone, c.splits)
        self.projector = nn.Sequential(nn.Linear(self.backbone.out_features, c.hidden), nn.ReLU(inplace=True),
                                       nn.Linear(c.hidden, c.dim))  # fmt: skip
        self.keys = momentum_copy(self.backbone, self.projector)
        self.queue = Queue(c.queue, c.dim)

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        (v1, v2), (i, j) = views, (batch["i"], batch["j"])
        q, k = self.projector(self.backbone(v1)), self.key(v2)  # (B, D)
        out = {"loss": self.contrast(q, k, i), "z": q.detach()}
        if self.config.symmetric:
            q2, k1 = self.projector(self.backbone(v2)), self.key(v1)
            out["loss"] = out["loss"] + self.contrast(q2, k1, j)
            k, j = torch.cat([k, k1]), torch.cat([j, i])
        self.staged = k, j
        return out

    @torch.no_grad()
    def key(self, v: Tensor) -> Tensor:
        parts = v.unflatten(0, (-1, self.config.splits)).transpose(0, 1)  # (splits, B / splits, C, S, S)
        return self.keys(parts.flatten(0, 1)).unflatten(0, parts.shape[:2]).transpose(0, 1).flatten(0, 1)

    def contrast(self, q: Tensor, k: Tensor, image: Tensor) -> Tensor:
        sim = torch.cat([F.cosine_similarity(q.float(), k.float())[:, None], losses.cosine(q, self.queue.z)], 1)
        key = (torch.arange(sim.shape[1], device=sim.device) == 0).expand_as(sim)
        return losses.info_nce(sim / self.config.tau, key, F.pad(self.kin(image, self.queue.id), (1, 0)))

    def after_step(self) -> None:
        """The queue takes this step's keys after they were compared; the keys' network moves before the next ones."""
        self.queue.push(*self.staged)
        follow(self.keys, self.config.ema, self.backbone, self.projector)


class NNCLR(Contrastive):
    """NNCLR (arXiv:2104.14548, eq. 2 to 4): the positive is the nearest neighbour of z in a queue of earlier projections,
    found in view 1 and looked for among the predictions of view 2, and the other way round (mean of both).

    Records of view 1's neighbours: `nn_accuracy`, the share with the anchor's label (noise counts as wrong), and
    `nn_same`, the share that is an earlier view of the anchor's own image. As in solo-learn view 1 enters the queue.
    """

    axes = Axes(augment="simclr", encode="backbone + 3-layer projector, predictor on one side",
                extract="last vector per view, replaced by its nearest neighbour on one side", compare="cosine / tau",
                loss="info_nce, other images of the batch as negatives")  # fmt: skip
    reads = ("dim", "hidden", "proj_affine", "pred_hidden", "tau", "queue", "leave_out")

    def __init__(self, config: RunConfig, classes: int = 0) -> None:
        super().__init__(config)
        c = config
        self.projector = networks.projector(self.backbone.out_features, c.hidden, c.dim, c.proj_affine)
        self.predictor = networks.predictor(c.dim, c.pred_hidden)
        self.queue = Queue(c.queue, c.dim)

    def loss(self, views: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        i, j, labels = batch["i"], batch["j"], batch.get("labels")
        z1, z2 = (self.projector(self.backbone(v)) for v in views)  # (B, D)
        n1, n2 = (losses.cosine(z.detach(), self.queue.z).argmax(1) for z in (z1, z2))  # (B,) places in the queue
        loss = (self.contrast(n1, self.predictor(z2), i, j) + self.contrast(n2, self.predictor(z1), j, i)) / 2
        out = {"loss": loss, "z": z1.detach(), "nn_same": (self.queue.id[n1] == i).float().mean()}
        if labels is not None:
            out["nn_accuracy"] = (self.queue.label[n1] == labels).float().mean()
        self.staged = z1.detach(), i, labels
        return out

    def contrast(self, nearest: Tensor, p: Tensor, a: Tensor, b: Tensor) -> Tensor:
        own = torch.eye(len(p), dtype=torch.bool, device=p.device)
        return losses.info_nce(losses.cosine(self.queue.z[nearest], p) / self.config.tau, own, self.kin(a, b) & ~own)

    def after_step(self) -> None:
        self.queue.push(*self.staged)


class FNC(SimCLR):
    """False negative cancellation (arXiv:2011.11765) on SimCLR with `support` more views of image i.

    An image's false negatives are the views of other images whose cosine with any of its views (their maximum) is among
    the `top` and above `threshold`. `attract` makes them positives, as the official code, whose views are all anchors,
    positives and support; `eliminate` leaves them out of the sum. Mean over all rows; the official code has twice this.
    Deviations: SimCLR's, no RandAugment, no memory of momentum embeddings.
    Records, an image: `fn_found`, `fn_right` with its label, `fn_all` that there are; with ordinary pairs (i, i)
    precision = fn_right / fn_found, recall = fn_right / fn_all.
    """

    axes = Axes(augment="simclr", encode="backbone + 3-layer projector", extract="last vector of two views and the support",
                compare="cosine / tau", loss="info_nce, other images of the batch but the found ones as negatives")  # fmt: skip
    reads = (*SimCLR.reads, "support", "top", "threshold", "cancel")

    def loss(self, views: tuple[Tensor, ...], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        z, own, drop = self.rows(views, batch)
        sim, B = losses.cosine(z, z), len(views[0])
        found = self.false_negatives(sim.detach(), own | drop, B)  # (N, N)
        out = {"z": z[:B].detach(), "fn_found": found[:B].sum(1).float().mean()}
        if "labels" in batch:
            alike = (batch["labels"][:, None] == batch["labels"]).repeat(1, len(views)) & ~(own | drop)[:B]  # (B, N)
            out["fn_right"], out["fn_all"] = ((m & alike).sum(1).float().mean() for m in (found[:B], alike))
        positives, drop = (own | found, drop) if self.config.cancel == "attract" else (own, drop | found)
        return out | {"loss": losses.info_nce(sim / self.config.tau, positives, drop)}

    def false_negatives(self, sim: Tensor, no: Tensor, B: int) -> Tensor:
        """(N, N) cosines of V B views -> (N, N) bool, the same for every view of an image; `no`: never found."""
        score = sim.masked_fill(no, -2).view(-1, B, len(sim)).amax(0)  # (B, N) the best of an image's views
        best = score.topk(min(self.config.top, len(sim)), dim=1).indices
        found = torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True) & (score > self.config.threshold)
        return found.repeat(len(sim) // B, 1) & ~no
