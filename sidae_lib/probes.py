"""Classifiers that say what features are worth: the paper's SGD probe, fine-tuning, kNN and logistic regression."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import augment, networks
from .config import EvalConfig, epoch_seed
from .step import Captured, batches, lr_at, seeded

CAPTURE_FROM = 1000  # steps of a probe. Capturing an epoch takes as long as some hundred steps
Probe = tuple[Tensor, Tensor]  # weight (C, F) and bias (C,)


def fit(config: EvalConfig, y: Tensor, classes: int, width: int, embed: Callable[[Tensor, dict[str, Tensor]], Tensor],
        backbone: Iterable[nn.Parameter] = (), seed: int | None = None) -> nn.Linear:  # fmt: skip
    """SGD on the cross-entropy of one fully connected layer, the paper's downstream training (arXiv:2304.02549, Sec. 4.1).

    y: (N,) labels.  embed: turns indices into y, and their augmentation parameters, into features (B, width).
    backbone: parameters that move too, where they want a gradient.  seed: of the layer and the order (default: the config's).
    """
    seed = config.seed if seed is None else seed
    with seeded(seed):
        fc = nn.Linear(width, classes).to(y.device)
    rates = ((fc.parameters(), config.lr), (backbone, config.backbone_lr))
    groups = [{"params": list(parameters), "lr": lr, "base": lr} for parameters, lr in rates]
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
    bounds = batches(len(y), config.batch, config.keep_last) or [(0, len(y))]
    step, steps = 0, config.fit_epochs * len(bounds)
    for epoch in range(config.fit_epochs):
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(len(y), generator=generator).to(y.device)
        draws, _ = augment.VIEWS[config.augment].draw(len(y), config.run.size, generator)
        draws = {name: drawn.to(y.device) for name, drawn in draws.items()}
        for a, b in bounds:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, steps, group["base"], config.schedule)
            scores = fc(embed(order[a:b], {name: drawn[a:b] for name, drawn in draws.items()}))
            optimizer.zero_grad()
            F.cross_entropy(scores, y[order[a:b]]).backward()
            optimizer.step()
            step += 1
    return fc


def repeated(config: EvalConfig, x: Tensor, y: Tensor, classes: int) -> list[Probe]:
    """`config.repeats` probes that differ in their seed alone, on features x (N, F) with labels y (N,).

    On a CPU they are fitted one after the other. On a GPU a step of one probe is all waiting, so there they are fitted
    side by side.
    """
    seeds = [config.seed + 1000 * r for r in range(config.repeats)]
    if x.device.type == "cuda":
        return side_by_side(config, x, y, classes, seeds)
    fits = [fit(config, y, classes, x.shape[1], lambda rows, _: x[rows], seed=seed) for seed in seeds]
    return [(fc.weight, fc.bias) for fc in fits]


@networks.full_float32()
def side_by_side(config: EvalConfig, x: Tensor, y: Tensor, classes: int, seeds: list[int]) -> list[Probe]:
    """What `fit` gives for each seed on features x (N, F): R classifiers are one product a step, and an epoch is one launch.

    The gradient of softmax cross-entropy is written by hand. The bias is the weight of a feature that is 1.
    """
    (N, width), R, device = x.shape, len(seeds), x.device
    x = F.pad(x, (0, 4 - width % 4))  # room for the 1, and zeros that keep rows aligned; their weights stay zero
    x[:, width] = 1
    W = torch.zeros(R, classes, x.shape[1])
    for w, seed in zip(W, seeds):
        with seeded(seed):
            fc = nn.Linear(width, classes)
        w[:, :width], w[:, width] = fc.weight.detach(), fc.bias.detach()
    W = W.to(device)
    velocity, minus_one = torch.zeros_like(W), -torch.ones(1, 1, 1, device=device)
    bounds = batches(N, config.batch, config.keep_last) or [(0, N)]
    steps = config.fit_epochs * len(bounds)
    rates = torch.tensor([lr_at(n, steps, config.lr, config.schedule) for n in range(steps)])
    rates = rates.view(-1, len(bounds)).to(device)
    order = torch.zeros(N, R, dtype=torch.long, device=device)  # of the epoch, as is lr
    lr = rates[0].clone()

    def epoch() -> None:
        truth = y[order]  # (N, R)
        for n, (a, b) in enumerate(bounds):
            z = x.index_select(0, order[a:b].view(-1)).view(b - a, R, -1).transpose(0, 1)  # (R, B, F)
            error = torch.bmm(z, W.mT).softmax(2)  # (R, B, C)
            error.scatter_add_(2, truth[a:b].T[..., None], minus_one.expand(R, b - a, 1))
            velocity.baddbmm_(error.mT, z, beta=config.momentum, alpha=1 / (b - a))
            if config.weight_decay:
                velocity.add_(W, alpha=config.weight_decay)
            W.addcmul_(velocity, lr[n], value=-1)

    launch = Captured(epoch, device) if steps >= CAPTURE_FROM else epoch
    for n in range(config.fit_epochs):  # the next orders are drawn and sent while the device works on an epoch
        generators = (torch.Generator().manual_seed(epoch_seed(seed, n)) for seed in seeds)
        orders = torch.stack([torch.randperm(N, generator=g) for g in generators])
        order.copy_(networks.sent(orders, device).T)
        lr.copy_(rates[n])
        launch()
    return [(w[:, :width], w[:, width]) for w in W]


def through_network(config: EvalConfig, net: nn.Module, images: Tensor, y: Tensor, classes: int, stats: tuple) -> nn.Sequential:
    """Backbone and classifier after `fit` on images (N, C, S, S): fine-tuned, or the backbone frozen where its features cannot
    be kept (augmented input, BatchNorm in train mode)."""
    tuned = config.kind == "finetune"
    net.requires_grad_(tuned).train(tuned or config.bn == "train")
    mean, std = (torch.tensor(s, device=y.device).view(-1, 1, 1) for s in stats)
    images, ops = images.to(y.device), augment.VIEWS[config.augment].first

    def embed(rows: Tensor, draws: dict[str, Tensor]) -> Tensor:
        view = augment.apply(ops, images[rows], draws, mean, std)
        return net(view.contiguous(memory_format=torch.channels_last))

    fc = fit(config, y, classes, net.out_features, embed, net.parameters())
    return nn.Sequential(net, fc).eval()


@networks.full_float32()
def knn(x: Tensor, bank: Tensor, labels: Tensor, classes: int, *, k: int, tau: float) -> Tensor:
    """Weighted kNN scores (N, classes): the k nearest by cosine vote with exp(cosine / tau) (arXiv:1805.01978).

    x: (N, F).  bank: (M, F) with labels (M,). Neither needs to be normalised; k is cut to M. The nearest one's vote is 1, so
    that no tau overflows. Scores are float64 where features are, else float32.
    """
    x, bank = networks.wide(x, bank)
    bank, out = F.normalize(bank, dim=1), []
    rows_at_once = 1000 if x.device.type == "cpu" else 2**27 // len(bank) + 1  # half a GiB of cosines
    for rows in F.normalize(x, dim=1).split(rows_at_once):
        cosine, index = (rows @ bank.T).topk(min(k, len(bank)), dim=1)  # (n, k)
        votes = torch.zeros(len(rows), classes, dtype=x.dtype, device=x.device)
        out.append(votes.scatter_add_(1, labels[index], ((cosine - cosine[:, :1]) / tau).exp()))
    return torch.cat(out)


@networks.full_float32()
def logistic(x: Tensor, y: Tensor, test: Tensor, C: float = 1.0) -> Tensor:
    """Classes (M,) that multinomial logistic regression on standardised features gives `test` (M, F).

    x: (N, F) with labels y (N,). It minimises the mean cross-entropy + `|W|^2 / (2 C N)`, with free intercepts, by L-BFGS, as
    scikit-learn's LogisticRegression does (which has one weight vector where there are two classes). Its variables V make the
    curvature at W = 0 the identity. Without that, correlated features take hundreds of steps, and scikit-learn stops short of
    the optimum.
    """
    from scipy.optimize import minimize

    x, test = networks.wide(x, test)
    seen, y = y.unique(return_inverse=True)
    N, width, K = *x.shape, len(seen)
    std, mean = torch.std_mean(x.double(), 0, correction=0)
    varies = std > 10 * torch.finfo(x.dtype).eps * mean.abs()
    std = torch.where(varies, std, 1.0)
    x, test = (((v - mean) / std).to(x.dtype) for v in (x, test))
    penalty, rows = 1 / ((C if K > 2 else C / 2) * N), torch.arange(N, device=x.device)
    covariance = (x.mT @ x).double() / N
    curvature, Q = (v.to(x.device) for v in torch.linalg.eigh(covariance.cpu()))  # too small for a GPU
    scale = (curvature.clamp(min=0) / K + penalty).rsqrt()  # W = Q scale V
    x, test = ((v @ (Q * scale).to(v.dtype)) for v in (x, test))
    penalties = penalty * scale.square()[:, None]

    def scores(features: Tensor, V: Tensor) -> Tensor:
        return (features @ V[:-1].to(features.dtype)).double() + V[-1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        V = torch.from_numpy(flat).view(width + 1, K).to(x.device)
        log_p = torch.log_softmax(scores(x, V), 1)
        value = (penalties * V[:-1].square()).sum() / 2 - log_p[rows, y].mean()
        error = log_p.exp()
        error[rows, y] -= 1
        slope = (x.mT @ (error / N).to(x.dtype)).double() + penalties * V[:-1]
        gradient = torch.cat([slope, error.mean(0, keepdim=True)])
        both = torch.cat([value.view(1), gradient.flatten()]).cpu().numpy()  # one look at the device
        return both[0], both[1:]

    options = {"maxiter": 1000, "maxls": 50, "gtol": 1e-6, "ftol": 1e-10}
    found = minimize(loss, np.zeros((width + 1) * K), jac=True, method="L-BFGS-B", options=options)
    return seen[scores(test, torch.from_numpy(found.x).view(width + 1, K).to(x.device)).argmax(1)]
