"""Every method through the real loop, beside a reference typed here: the same views, losses in plain torch, the optimiser with
its momentum and its schedule by hand, and what a method moves after a step, so that a count that is off by one shows."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pytest import approx
from torch import nn

from sidae_lib import data, methods, train
from sidae_lib.config import RunConfig, epoch_seed
from tests.test_maps import slow_maps_loss

B, D, H, K, P = 8, 16, 24, 12, 10
SMALL = {"backbone": "small_cnn", "dim": D, "hidden": H, "pred_hidden": K, "prototypes": P, "decoder": 16, "queue": 16,
         "splits": 2, "ema": 0.9, "tau": 0.2, "top": 3, "threshold": 0.3}


def run_of(method, **changes):
    """Two epochs of two steps, of four where there is a queue, which the second epoch meets full."""
    reads = methods.METHODS[method].reads
    fields = {k: v for k, v in SMALL.items() if k not in methods.SHARED or k in reads}
    fields |= {"augment": methods.METHODS[method].axes.augment, "pool": 4 * B if "queue" in reads else 2 * B, "batch": B,
               "epochs": 2, "lr": 0.02, "weight_decay": 0.01}
    if method == "supervised":
        fields |= {"pool": 0, "label_count": 2 * B, "augment": "simsiam_grey"}
    config = RunConfig.create(**{"method": method, "data": data.identify("digits"), **fields, **changes})
    return train.Run(config, data.by_fingerprint(config.data), torch.device("cpu"))


# --- networks, named as ours so that the weights can be loaded ------------------------------------------------------


def cnn():
    """The small network, (B, 3, 32, 32) -> (B, 32)."""
    layers = [nn.Conv2d(3, 32, 2, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for c in (32, 64, 128):
        layers += [nn.Conv2d(c, 2 * c, 2, 2, 1, bias=False), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(256, 8, 2, bias=False), nn.Sigmoid(), nn.Flatten())


def mlp(*widths, act=nn.ReLU):
    """Linear without bias, BatchNorm and a rectifier, and so on up to a last linear layer without bias."""
    layers = [x for a, b in zip(widths, widths[1:-1]) for x in (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), act())]
    return [*layers, nn.Linear(*widths[-2:], bias=False)]


def siamese_projector(features=32):
    return nn.Sequential(*mlp(features, H, H, D), nn.BatchNorm1d(D, affine=False))


def two_layers(a, b, c):
    """With a bias at the end."""
    return nn.Sequential(*mlp(a, b, c)[:-1], nn.Linear(b, c))


def unit(z):
    return F.normalize(z, dim=1)


class Reference(nn.Module):
    """A method's networks; `loss` of the views and the batch, and what else it records; what happens `after` step n of N."""

    recorded: dict[str, float] = {}

    def __init__(self, m, c):
        super().__init__()
        self.c, self.backbone = c, cnn()
        if c.backbone == "resnet18":
            self.backbone = torchvision.models.resnet18()
            self.backbone.fc = nn.Identity()
        self.build(m)
        self.load_state_dict(m.state_dict())  # strict: no module more, none less

    def build(self, m):
        self.projector = siamese_projector(m.backbone.out_features)

    def z(self, v):
        return self.projector(self.backbone(v))

    def after(self, n, N):
        pass

    def stopped(self, n, N):
        """Weights that get no gradient at step n."""
        return []


def follow(target, parts, m):
    for t, p in zip(target.parameters(), [p for part in parts for p in part.parameters()], strict=True):
        t.copy_(m * t + (1 - m) * p)


# --- the methods ----------------------------------------------------------------------------------------------------


class Doubling(nn.Module):
    """The decoder's names: fc, then up."""

    def __init__(self):
        super().__init__()
        up = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}
        self.fc = nn.Linear(D, 16)
        layers = [x for a, b in ((16, 8), (8, 4), (4, 2), (2, 2)) for x in (
            nn.ConvTranspose2d(a, b, bias=False, **up), nn.BatchNorm2d(b), nn.ReLU())]
        self.up = nn.Sequential(*layers, nn.ConvTranspose2d(2, 3, **up))

    def forward(self, z):
        return self.up(self.fc(z)[:, :, None, None])


class SidAE(Reference):
    w = 0.3

    def build(self, m):
        super().build(m)
        if self.w > 0:
            self.predictor = two_layers(D, K, D)
        if self.w < 1:
            self.decoder = Doubling()

    def loss(self, views, batch):
        z1, z2 = map(self.z, views)
        loss = 0
        if self.w > 0:
            p1, p2 = self.predictor(z1), self.predictor(z2)
            loss -= self.w * ((unit(p1) * unit(z2).detach()).sum(1).mean() + (unit(p2) * unit(z1).detach()).sum(1).mean()) / 2
        if self.w < 1:
            errors = [(self.decoder(z) - batch["x1"]).square().mean() for z in (z1, z2)]
            loss += (1 - self.w) * sum(errors) / 2
        return loss


class SimSiam(SidAE):
    w = 1


class DAE(SidAE):
    w = 0


class Supervised(Reference):
    def build(self, m):
        self.fc = nn.Linear(32, 10)

    def loss(self, views, batch):
        return -self.fc(self.backbone(views[0])).log_softmax(1)[torch.arange(B), batch["labels"]].mean()


class SimCLR(Reference):
    """And FNC, which finds false negatives; view by view, by the images that they show."""

    def loss(self, views, batch):
        i, j, labels, V = batch["i"].tolist(), batch["j"].tolist(), batch["labels"].tolist(), len(views)
        z, image = unit(torch.cat([self.z(v) for v in views])), i + j + i * (V - 2)
        cos, everything, rows, found_by = (z @ z.T).tolist(), range(V * B), [], []
        for a in everything:
            row = [n for n in everything if n % B == a % B]
            found = []
            if self.c.method == "fnc":
                score = {n: max(cos[s][n] for s in row if image[s] != image[n]) for n in everything
                         if n not in row and any(image[s] != image[n] for s in row)}
                found = [n for n in sorted(score, key=score.get)[-3:] if score[n] > 0.3 and image[n] != image[a]]
            own = [n for n in row if n != a]
            kept = [n for n in everything if n in own or image[n] != image[a]]
            if self.c.cancel == "attract":
                own += found
            else:
                kept = [n for n in kept if n not in found]
            log_p = (z[kept] @ z[a] / 0.2).log_softmax(0)
            rows.append(-log_p[[kept.index(n) for n in own]].mean())
            found_by.append(found)
        if self.c.method == "fnc":
            alike = [{n for n in everything if n % B != a and image[n] != image[a] and labels[n % B] == labels[a]}
                     for a in range(B)]
            self.recorded = {"fn_found": sum(map(len, found_by[:B])) / B, "fn_all": sum(map(len, alike)) / B,
                             "fn_right": sum(len(alike[a].intersection(found_by[a])) for a in range(B)) / B}
        return torch.stack(rows).mean()


class Queued(Reference):
    """Embeddings, ids and labels of earlier batches, the newest first; named as ours."""

    def build(self, m):
        self.queue = copy.deepcopy(m.queue)

    def enqueue(self):
        for name, new in zip(("z", "id", "label"), self.entering, strict=True):
            old = getattr(self.queue, name)
            old.copy_(torch.cat([new, old])[:16])


class NNCLR(Queued):
    def build(self, m):
        super().build(m)
        self.projector, self.predictor = siamese_projector(), two_layers(D, K, D)

    def loss(self, views, batch):
        z1, z2 = map(self.z, views)
        rows, i, j, labels = [], batch["i"], batch["j"], batch["labels"]
        for z, p, own, other in ((z1, unit(self.predictor(z2)), i, j), (z2, unit(self.predictor(z1)), j, i)):
            nearest = [max(range(16), key=lambda k: (unit(z)[a] @ self.queue.z[k]).item()) for a in range(B)]  # noqa: B023
            for a in range(B):
                kept = [n for n in range(B) if n == a or own[a] != other[n]]
                rows.append(-(p[kept] @ self.queue.z[nearest[a]].clone() / 0.2).log_softmax(0)[kept.index(a)])
            if z is z1:
                self.recorded = {"nn_same": (self.queue.id[nearest] == i).float().mean().item(),
                                 "nn_accuracy": (self.queue.label[nearest] == labels).float().mean().item()}
        self.entering = unit(z1).detach(), i, labels
        return torch.stack(rows).mean()

    def after(self, n, N):
        self.enqueue()


class MoCo(Queued):
    """A split of the batch is a forward pass of its own, as on a GPU of its own. A view of another image is a negative."""

    def build(self, m):
        super().build(m)
        self.projector = nn.Sequential(nn.Linear(32, H), nn.ReLU(), nn.Linear(H, D))
        self.keys = nn.Sequential(cnn(), copy.deepcopy(self.projector)).requires_grad_(False)

    @staticmethod
    def split(net, v, group):
        out = torch.empty(B, D)
        for g in (0, 1):
            out[group == g] = unit(net(v[group == g]))
        return out

    def loss(self, views, batch):
        n, loss, entering, (i, j) = torch.arange(B), 0, [], (batch["i"], batch["j"])
        for a, b, own, other in [(*views, i, j), (*views[::-1], j, i)][: 1 + self.c.symmetric]:
            q, k = self.split(self.z, a, n % 2), self.split(self.keys, b, n // 2 % 2)
            for row in range(B):
                negatives = self.queue.z[self.queue.id != own[row]].clone()
                loss = loss - (torch.cat([k[row : row + 1], negatives]) @ q[row] / 0.2).log_softmax(0)[0] / B
            entering.append((k, other, torch.full((B,), -1)))
        self.entering = [torch.cat(part) for part in zip(*entering)]
        return loss

    def after(self, n, N):
        self.enqueue()
        follow(self.keys, (self.backbone, self.projector), 0.9)


class BYOL(Reference):
    def build(self, m):
        self.projector, self.predictor = two_layers(32, H, D), two_layers(D, K, D)
        self.target = nn.Sequential(cnn(), two_layers(32, H, D)).requires_grad_(False)

    def loss(self, views, batch):
        z1, z2 = map(self.z, views)
        t1, t2 = map(self.target, views)
        return sum((unit(self.predictor(z)) - unit(t)).square().sum(1).mean() for z, t in ((z1, t2), (z2, t1)))

    def after(self, n, N):
        follow(self.target, (self.backbone, self.projector), 1 - 0.1 * (math.cos(math.pi * n / N) + 1) / 2)


class VICReg(Reference):
    def build(self, m):
        self.projector = nn.Sequential(*mlp(32, H, H, D))

    def loss(self, views, batch):
        zs = [self.z(v) for v in views]
        s, v, c = (zs[0] - zs[1]).square().mean(), 0, 0
        for z in zs:
            v = v + (1 - (z.var(0) + 1e-4).sqrt()).clamp(min=0).mean() / 2
            cov = torch.cov(z.T)
            c = c + sum(cov[i, j] ** 2 for i in range(D) for j in range(D) if i != j) / D
        self.recorded = {"invariance": s.item(), "variance": v.item(), "covariance": c.item()}
        return 25 * s + 25 * v + c


class BarlowTwins(VICReg):
    def loss(self, views, batch):
        z1, z2 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in map(self.z, views))
        c = z1.T @ z2 / B
        return sum((1 - c[i, i]) ** 2 if i == j else 0.0051 * c[i, j] ** 2 for i in range(D) for j in range(D))


class DINO(Reference):
    def build(self, m):
        self.projector = nn.Sequential(*mlp(32, H, H, D, act=nn.GELU))
        self.prototypes = nn.Linear(D, P, bias=False)
        self.teacher = copy.deepcopy(nn.Sequential(self.backbone, self.projector, self.prototypes)).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(P))
        self.register_buffer("frozen", torch.tensor(True))

    def loss(self, views, batch):
        s = [unit(self.z(v)) @ unit(self.prototypes.weight).T for v in views]
        self.t = [unit(self.teacher[:2](v)) @ unit(self.teacher[2].weight).T for v in views]
        p = [((t - self.centre) / 0.04).softmax(1) for t in self.t]
        self.recorded = {"teacher_entropy": sum(-(x * x.log()).sum(1).mean() for x in p).item() / 2}
        return -sum((p[b] * (s[a] / 0.2).log_softmax(1)).sum(1).mean() for a, b in ((0, 1), (1, 0))) / 2

    def stopped(self, n, N):
        return [self.prototypes.weight] if n < N / 2 else []  # the first of two epochs

    def after(self, n, N):
        self.centre.copy_(0.9 * self.centre + 0.1 * torch.cat(self.t).mean(0))
        self.frozen.fill_(n + 1 < N / 2)
        parts = (self.backbone, self.projector, self.prototypes)
        follow(self.teacher, parts, 1 - 0.1 * (math.cos(math.pi * n / N) + 1) / 2)


class Maps(Reference):
    """AMDIM and YADIM: encoder and heads are copies, the loss is a loop over places, which are drawn anew for each step."""

    def build(self, m):
        self.backbone, self.heads = copy.deepcopy(m.backbone), copy.deepcopy(m.heads)
        self.pairs = [(0, 1), (0, 2), (1, 1)] if self.c.method == "amdim" else [(0, 0)]
        self.register_buffer("place", torch.zeros(len(self.pairs), 2, B))
        self.register_buffer("map", torch.zeros(len(self.pairs)))

    def loss(self, views, batch):
        value, squares = slow_maps_loss(self, views, self.pairs)
        return value + 0.05 * squares

    def after(self, n, N):
        g = torch.Generator().manual_seed(epoch_seed(0, (n + 1) / N))
        self.place.copy_(torch.rand(len(self.pairs), 2, B, generator=g))
        self.map.copy_(torch.rand(len(self.pairs), generator=g))


class CPC(Reference):
    """The encoder is a copy. The context: a 1x3 convolution with zeros at both sides, then a 2x1 one with ones above."""

    def build(self, m):
        self.backbone, self.context = copy.deepcopy(m.backbone), copy.deepcopy(m.context)
        self.target, self.predict = copy.deepcopy(m.target), copy.deepcopy(m.predict)

    def loss(self, views, batch):
        grid, = self.backbone.maps(views[0])  # (B, c, 7, 7)
        x = grid
        for block in self.context.blocks:
            h = F.conv2d(x, block[0].weight, block[0].bias).relu()
            h = F.conv2d(F.pad(h, (1, 1, 0, 0)), block[2].weight, block[2].bias)
            h = torch.cat([torch.ones_like(h[:, :, :1]), h], 2)
            h = F.conv2d(h, block[4].weight, block[4].bias).relu()
            x = x + F.conv2d(h, block[6].weight, block[6].bias)
        targets, loss = self.target(grid).permute(0, 2, 3, 1).reshape(B * 49, -1), 0
        for row in map(int, (self.c.extract or "2,3,4,5,6").split(",")):
            p = self.predict[str(row)](x.relu())[:, :, : 7 - row].permute(0, 2, 3, 1).reshape(B * (7 - row) * 7, -1)
            right = torch.tensor([49 * b + 7 * (r + row) + k for b in range(B) for r in range(7 - row) for k in range(7)])
            loss = loss + F.cross_entropy(0.1 * p @ targets.T, right)
        return loss


CASES = {
    "sidae": (SidAE, {"w": 0.3}), "simsiam": (SimSiam, {}), "dae": (DAE, {}), "supervised": (Supervised, {}),
    "simclr": (SimCLR, {}), "moco_v2": (MoCo, {}), "moco_v2, symmetric": (MoCo, {"symmetric": True}),
    "moco_v2, pairs": (MoCo, {"symmetric": True, "pairs": "oracle", "pair_share": 1.0, "pair_count": 24}),
    "nnclr": (NNCLR, {"lr": 0.001}), "fnc": (SimCLR, {}), "byol": (BYOL, {}), "vicreg": (VICReg, {"lr": 0.01}),
    "barlow_twins": (BarlowTwins, {"lr": 0.001}),
    "dino": (DINO, {}), "cpc_v2": (CPC, {"backbone": "patches18", "width": 4, "hidden": 16, "dim": 8}),
    "amdim": (Maps, {"backbone": "amdim", "width": 4, "lr": 0.001}),
    "yadim": (Maps, {"backbone": "resnet18", "stem": "cifar", "width": 4, "optimizer": "adam", "lr": 1e-3, "momentum": 0.8}),
}
PAIRS = {"pairs": "oracle", "pair_share": 1.0, "pair_count": 8}
MORE = {
    # at a larger rate rounding grows a hundredfold each step on maps of one pixel
    "sidae, resnet18": (SidAE, {"backbone": "resnet18", "w": 0.3, "lr": 0.0002}), "simclr, pairs": (SimCLR, PAIRS),
    "fnc, pairs": (SimCLR, PAIRS | {"support": 2}),
    "fnc, eliminate": (SimCLR, {"support": 0, "cancel": "eliminate"}),
    "nnclr, pairs": (NNCLR, PAIRS | {"lr": 0.001, "pair_count": 24}),
    "cpc_v2, rows": (CPC, CASES["cpc_v2"][1] | {"extract": "2,3,3,6"}),
}


def test_every_method_is_here():
    elsewhere = {"composed", "pairwise", "triplet"}  # twins of these in test_maps; the report's loop in test_metric
    assert {name.split(",")[0] for name in CASES} == methods.METHODS.keys() - elsewhere - {"untrained"}


@pytest.mark.parametrize("name", {**CASES, **MORE})
def test_three_steps_and_more_beside_a_reference(name):
    reference, changes = {**CASES, **MORE}[name]
    run = run_of(name.split(",")[0], **changes)
    c, N, n, seen = run.config, run.steps, 0, {}
    ref = reference(run.method, c).train()
    start = {k: v.clone() for k, v in ref.state_dict().items()}
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in ref.parameters() if p.requires_grad}
    for epoch in range(c.epochs):
        drawn = run.draw(epoch)
        for a, b in run.bounds:
            loss = ref.loss(*run.see(*run.samples(drawn, slice(a, b))))
            ref.zero_grad()
            loss.backward()
            rate = c.lr * (1 + math.cos(math.pi * n / N)) / 2
            with torch.no_grad():
                for p in ref.stopped(n, N):
                    p.grad.zero_()
                for p, (m, v) in moments.items():
                    g = p.grad + 0.01 * p
                    if c.optimizer == "sgd":
                        p -= rate * m.mul_(0.9).add_(g)
                    else:
                        m.mul_(0.8).add_(0.2 * g)
                        v.mul_(0.999).add_(0.001 * g * g)
                        p -= rate * (m / (1 - 0.8 ** (n + 1))) / ((v / (1 - 0.999 ** (n + 1))).sqrt() + 1e-8)
                ref.after(n, N)
            run.advance(drawn, a, b)
            n += 1
            for k, v in {"loss": loss.item(), **ref.recorded}.items():
                assert run.sums[k].item() / B - seen.get(k, 0) == approx(v, rel=1e-3), (n, k)
                seen[k] = run.sums[k].item() / B
            assert_alike(run.method.state_dict(), ref.state_dict(), start, f"step {n}")
    assert n == N >= 4


def assert_alike(ours, theirs, start, where):
    """Every tensor but the running statistics of split batches, up to rounding: a hundredth of how far it has moved."""
    assert ours.keys() == theirs.keys()
    for k, v in theirs.items():
        if "keys.0.0.weight" in theirs and k.split(".")[-1].startswith(("running", "num_batches")):
            continue
        if v.is_floating_point():
            assert (ours[k] - v).norm() < 0.01 * (v - start[k]).norm() + 1e-6 * (1 + v.norm()), (where, k)
        else:
            assert torch.equal(ours[k], v), (where, k)
