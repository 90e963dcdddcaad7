"""Around the paper: methods with negatives.

A negative is an output for another image. A view has to find its partner among many negatives, so not all
images can get the same output. All these methods use `losses.info_nce`; they differ in what is compared
with what. In the code, row r of a batch holds view 1 of image `i[r]` and view 2 of image `j[r]`. These are
the same image, except in a semantic pair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses, networks
from ..config import RunConfig, SidaeError
from .base import Axes, Batch, Look, Method, MomentumCopy, Views


class Contrastive(Method):
    """What the methods below share: which images are no negatives of which."""

    partners: Tensor  # codes a 2^32 + b of the pairs (a, b) that are trained on, sorted; set by the loop

    def kin(self, a: Tensor, b: Tensor) -> Tensor:
        """(N, M) bool: which images b (M,) are no negatives of images a (N,), both ids, by `leave_out`."""
        same = a[:, None] == b
        if self.config.leave_out == "none":
            return torch.zeros_like(same)
        if self.config.leave_out == "partners" and len(self.partners):
            code = (a[:, None] << 32) + b
            at = torch.searchsorted(self.partners, code).clamp(max=len(self.partners) - 1)
            return same | (self.partners[at] == code)  # torch.isin would wait for the device
        return same


class Queue(nn.Module):
    """The last K embeddings, normalised, newest first, with their images' ids and labels; noise at first."""

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


class SimCLR(Contrastive, name="simclr"):
    """SimCLR (arXiv:2002.05709, eq. 1): each of the 2 B views of a batch of B images has to find its twin.
    The twin of a view i is the other view j of the same image. The projections z of two views are compared by
    their cosine. The views of the other images are the negatives, which prevent collapse. So large batches
    help. The head has three layers, as in the released code. The loss is the mean over all 2 B views; the
    official code's value is twice as large.

    Deviations: BatchNorm normalises the first and the second views apart, not all of them together."""

    look = Look("SimCLR", "#56B4E9", "D")
    axes = Axes(augment="simclr", encode="backbone + 3-layer projector", extract="last vector per view",
                compare="cosine / tau", loss="info_nce, other images of the batch as negatives")
    equation = r"""\ell_{i,j} = -\log \frac{\exp(\mathrm{sim}(z_i, z_j) / \tau)}
        {\sum_{k \ne i} \exp(\mathrm{sim}(z_i, z_k) / \tau)}"""
    reads = ("dim", "hidden", "proj_affine", "tau", "leave_out")

    def __init__(self, c: RunConfig, classes: int = 0) -> None:
        super().__init__(c)
        self.projector = networks.projector(self.backbone.out_features, c.hidden, c.dim, c.proj_affine)

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        V, B, (i, j) = len(views), len(views[0]), (batch["i"], batch["j"])
        z = torch.cat([self.embed(v) for v in views])  # (V B, D)
        sim = losses.cosine(z, z)
        image, row = torch.cat([i, j, *[i] * (V - 2)]), torch.arange(B, device=z.device).repeat(V)
        itself = torch.eye(V * B, dtype=torch.bool, device=z.device)
        own = (row[:, None] == row) & ~itself  # the other views of the same row
        drop = itself | self.kin(image, image) & ~own
        own, drop, records = self.cancel(sim.detach(), own, drop, batch)
        return {"z": z[:B].detach(), **records, "loss": losses.info_nce(sim / self.config.tau, own, drop)}

    def cancel(self, sim: Tensor, own: Tensor, drop: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict]:
        """Positives and what is no negative, as FNC corrects them, and its records."""
        return own, drop, {}


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm that in training normalises `splits` interleaved parts of the batch, equally large, as on a
    GPU each (MoCo's CIFAR demo); the running statistics move by their mean."""

    splits: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        (N, C, H, W), s = x.shape, self.splits
        state = self.running_mean, self.running_var, self.weight, self.bias
        mean, var, weight, bias = (v.repeat(s) for v in state)
        x = x.reshape(N // s, s * C, H, W)
        y = F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(mean.view(s, C).mean(0))
            self.running_var.copy_(var.view(s, C).mean(0))
        return y.view(N, C, H, W)


class MoCo(Contrastive, name="moco_v2"):
    """MoCo v2 (arXiv:2003.04297), as in the official CIFAR demo: a query has to find its key among K others.
    The network makes the query q from one view. A momentum copy of the network makes its key k+, which is
    k_0 in the sum, from the other view. The copy's weights theta_k follow the network's, theta_q, slowly. A
    queue of K earlier keys holds the negatives, which prevent collapse. So a small batch is enough.

    BatchNorm normalises `splits` parts of a batch apart, and keys are divided otherwise than queries
    (shuffle-BN). The shuffle is fixed, since an epoch's order is random anyway. `symmetric` adds the other
    direction: this doubles the gradient, and both keys enter the queue.

    Deviations: the head has two layers, as in v2 (the demo has one); earlier views of the query's own image
    are left out of its negatives, unless `leave_out` is "none", as in the official code."""

    look = Look("MoCo v2", "#E69F00", "v")
    axes = Axes(augment="simclr", encode="backbone + 2-layer MLP; momentum copy for keys",
                extract="last vector per view", compare="cosine / tau",
                loss="info_nce, a queue of earlier keys as negatives")
    equation = r"""L_q &= -\log \frac{\exp(q \cdot k_+ / \tau)}{\sum_{i=0}^K \exp(q \cdot k_i / \tau)} \\
        \theta_k &\leftarrow m \, \theta_k + (1 - m) \, \theta_q"""
    reads = ("dim", "hidden", "tau", "ema", "queue", "symmetric", "splits", "leave_out")

    def __init__(self, c: RunConfig, classes: int = 0) -> None:
        super().__init__(c)
        if c.batch % c.splits or c.batch < 2 * c.splits:
            raise SidaeError("batch must be a multiple of splits, at least twice it: "
                             f"{c.batch} and {c.splits} are not.")
        for m in self.backbone.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.__class__, m.splits = SplitBatchNorm, c.splits
        first = nn.Linear(self.backbone.out_features, c.hidden)
        self.projector = nn.Sequential(first, nn.ReLU(inplace=True), nn.Linear(c.hidden, c.dim))
        self.keys = MomentumCopy(self.backbone, self.projector)
        self.queue = Queue(c.queue, c.dim)

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        (v1, v2), i, j = views, batch["i"], batch["j"]
        q, k = self.embed(v1), self.key(v2)  # (B, D)
        out = {"loss": self.contrast(q, k, i), "z": q.detach()}
        if self.config.symmetric:
            q2, k1 = self.embed(v2), self.key(v1)
            out["loss"] = out["loss"] + self.contrast(q2, k1, j)
            k, j = torch.cat([k, k1]), torch.cat([j, i])
        self.staged = k, j
        return out

    @torch.no_grad()
    def key(self, v: Tensor) -> Tensor:
        parts = v.unflatten(0, (-1, self.config.splits)).transpose(0, 1)  # (splits, B / splits, C, S, S)
        return self.keys(parts.flatten(0, 1)).unflatten(0, parts.shape[:2]).transpose(0, 1).flatten(0, 1)

    def contrast(self, q: Tensor, k: Tensor, image: Tensor) -> Tensor:
        own = F.cosine_similarity(q.float(), k.float())[:, None]
        sim = torch.cat([own, losses.cosine(q, self.queue.z)], 1)  # (B, 1 + K)
        key = (torch.arange(sim.shape[1], device=sim.device) == 0).expand_as(sim)
        return losses.info_nce(sim / self.config.tau, key, F.pad(self.kin(image, self.queue.id), (1, 0)))

    def after_step(self) -> None:
        """The queue takes this step's keys after they were compared; the keys' network moves before the next.
        """
        self.queue.push(*self.staged)
        self.keys.follow(self.config.ema)


class NNCLR(Contrastive, name="nnclr"):
    """NNCLR (arXiv:2104.14548, eq. 2 to 4): a view is replaced by its nearest neighbour.
    This, NN(z, Q), is looked up in a queue Q of earlier projections of first views. The neighbour has to find p^+, the
    prediction for the other view, among the predictions for all images k of the batch. Those for other images
    are the negatives, which prevent collapse. The loss is the mean of both directions.

    It records two shares of the first views' neighbours: `nn_accuracy`, those with the view's label (the noise
    that fills the queue at first counts as wrong), and `nn_same`, those that are views of the same image."""

    look = Look("NNCLR", "#332288", "<")
    axes = Axes(augment="simclr", encode="backbone + 3-layer projector, predictor on one side",
                extract="last vector per view, replaced by its nearest neighbour on one side",
                compare="cosine / tau", loss="info_nce, other images of the batch as negatives")
    equation = r"""L_i = -\log \frac{\exp(\mathrm{NN}(z_i, Q) \cdot p_i^+ / \tau)}
        {\sum_k \exp(\mathrm{NN}(z_i, Q) \cdot p_k^+ / \tau)}"""
    reads = ("dim", "hidden", "proj_affine", "pred_hidden", "tau", "queue", "leave_out")

    def __init__(self, c: RunConfig, classes: int = 0) -> None:
        super().__init__(c)
        self.projector = networks.projector(self.backbone.out_features, c.hidden, c.dim, c.proj_affine)
        self.predictor = networks.predictor(c.dim, c.pred_hidden)
        self.queue = Queue(c.queue, c.dim)

    def loss(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        i, j, labels = batch["i"], batch["j"], batch.get("labels")
        z1, z2 = map(self.embed, views)  # (B, D)
        p2, p1 = self.predictor(z2), self.predictor(z1)  # in this order for its running statistics
        n1, n2 = (losses.cosine(z.detach(), self.queue.z).argmax(1) for z in (z1, z2))  # (B,) queue's places
        loss = (self.contrast(n1, p2, i, j) + self.contrast(n2, p1, j, i)) / 2
        out = {"loss": loss, "z": z1.detach(), "nn_same": (self.queue.id[n1] == i).float().mean()}
        if labels is not None:
            out["nn_accuracy"] = (self.queue.label[n1] == labels).float().mean()
        self.staged = z1.detach(), i, labels
        return out

    def contrast(self, nearest: Tensor, p: Tensor, a: Tensor, b: Tensor) -> Tensor:
        own = torch.eye(len(p), dtype=torch.bool, device=p.device)
        sim = losses.cosine(self.queue.z[nearest], p)  # (B, B)
        return losses.info_nce(sim / self.config.tau, own, self.kin(a, b) & ~own)

    def after_step(self) -> None:
        self.queue.push(*self.staged)


class FNC(SimCLR, name="fnc"):
    """FNC, false negative cancellation (arXiv:2011.11765), is SimCLR that looks for false negatives.
    These are other images of the same kind. Each image has `support` more views. A view of another image is
    scored by its highest cosine with any view of this image. It counts as found if its score is among the
    `top` highest and above `threshold`. If `cancel` is "attract", what is found becomes positive: P_i holds it
    beside the image's other views. All views are then anchors, positives and support, as in the official code.
    If it is "eliminate", what is found is left out of the sum over k. The other negatives prevent collapse.

    It records, per image, `fn_found`, how many views were found, `fn_right`, how many of these have its label,
    and `fn_all`, how many have its label at all. With ordinary pairs, of an image with itself, the precision
    is `fn_right` / `fn_found`, and the recall is `fn_right` / `fn_all`.

    Deviations: no RandAugment, no memory of momentum embeddings."""

    look = Look("FNC", "#8C510A", ">")
    axes = Axes(augment="simclr", encode="backbone + 3-layer projector",
                extract="last vector of two views and the support", compare="cosine / tau",
                loss="info_nce, other images of the batch but the found ones as negatives")
    equation = r"""L_i = -\frac{1}{|P_i|} \sum_{j \in P_i} \log \frac{\exp(\mathrm{sim}(z_i, z_j) / \tau)}
        {\sum_{k \ne i} \exp(\mathrm{sim}(z_i, z_k) / \tau)}"""
    reads = (*SimCLR.reads, "support", "top", "threshold", "cancel")

    def cancel(self, sim: Tensor, own: Tensor, drop: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict]:
        c, N, B = self.config, len(sim), len(batch["i"])
        never = own | drop
        score = sim.masked_fill(never, -2).view(-1, B, N).amax(0)  # (B, N), the best of an image's views
        best = score.topk(min(c.top, N), dim=1).indices
        found = torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True) & (score > c.threshold)
        found = found.repeat(N // B, 1) & ~never  # (N, N)
        records = {"fn_found": found[:B].sum(1).float().mean()}
        if "labels" in batch:
            alike = (batch["labels"][:, None] == batch["labels"]).repeat(1, N // B) & ~never[:B]  # (B, N)
            records["fn_right"] = (found[:B] & alike).sum(1).float().mean()
            records["fn_all"] = alike.sum(1).float().mean()
        return (own | found, drop, records) if c.cancel == "attract" else (own, drop | found, records)
