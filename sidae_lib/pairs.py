"""Semantic positive pairs: images of one kind, found by a pre-trained encoder before the training that uses them.

SePP-ID (Alkhalefi, Leontidis, Zhong; TMLR 04/2024), Algorithm 1: embed K random original images, projection head
included, and pair those whose cosine lies between two thresholds. Every method with two views trains on them as it is:
view 1 comes from image i, view 2 from image j.
"""

import hashlib
import math
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import methods, networks, paths
from .config import RunConfig, SidaeError
from .data import Images, subset

TILE = 2048  # rows and columns that are compared at once: 16 MiB of cosines
MARGIN = 1e-4  # a hundred times what float32 takes off a cosine: what is nearer to a bound is left to float64
RATIO = 0.14  # pairs per image compared where thresholds are calibrated: SePP-ID's 18,109 among 128,000


class Pairs(NamedTuple):
    """i, j: (P,) int64 indices of two images.  score: (P,) float32 cosine, falling; NaN where none was taken."""

    i: Tensor
    j: Tensor
    score: Tensor


def _best(n: int, pairs: tuple[Tensor, ...], count: int | None = None) -> Pairs:
    """Highest score first, equal ones by i, then j: an order that does not depend on how they were found."""
    i, j, score = pairs
    by_index = (i * n + j).argsort()
    order = by_index[(-score[by_index]).argsort(stable=True)][:count]
    return Pairs(i[order], j[order], score[order])


def _band(z: Tensor, low: float, high: float, count: int | None) -> Pairs:
    """All i < j with cosine in [low, high], or the `count` highest of them; scores in float64, cut to [-1, 1], since that of
    equal vectors may be rounded to 1 + 2e-16."""
    norm = torch.linalg.vector_norm(z, dim=1, dtype=torch.float64)
    if not (norm.isfinite() & (norm > 0)).all():
        raise SidaeError("Some embeddings are zero or not finite, so they have no cosine; look at the encoder's record.")
    e, n, floor = z / norm.float()[:, None], len(z), low
    found = Pairs(*torch.empty(2, 0, dtype=torch.int64, device=z.device), norm[:0])  # type: ignore[call-arg]
    for a, b in combinations_with_replacement(range(0, n, TILE), 2):
        s = e[a : a + TILE] @ e[b : b + TILE].T
        if a == b:
            s.masked_fill_(torch.ones_like(s, dtype=torch.bool).tril(), -math.inf)  # each pair once, none with itself
        near = s >= floor - MARGIN
        v = s[near]
        if count and len(v) > count and len(sure := v[v <= high - MARGIN]) > count:
            near &= s >= sure.topk(count).values[-1] - MARGIN  # what lies lower cannot be among the count highest
        i, j = (near & (s <= high + MARGIN)).nonzero(as_tuple=True)
        if len(i):
            i, j = i + a, j + b
            score = torch.cat([(z[p].double() * z[q].double()).sum(1) / (norm[p] * norm[q])
                               for p, q in zip(i.split(2**13), j.split(2**13))]).clamp(-1, 1)  # fmt: skip
            ok = (score >= low) & (score <= high)
            found = Pairs(*(torch.cat([old, new[ok]]) for old, new in zip(found, (i, j, score))))
        if count and len(found.i) > count:
            found = _best(n, found, count)
            floor = found.score[-1].item()
    return found


@torch.no_grad()
def mine(z: Tensor, *, k: int, low: float, high: float, count: int | None = None, ordered: bool = False,
         max_per_anchor: int | None = None, seed: int = 0) -> Pairs:  # fmt: skip
    """The pairs among k random rows of z whose cosine lies in [low, high] (SePP-ID, Algorithm 1).

    z: (N, D) float32 embeddings of original images, not normalised, on any device; the result's indices are its rows.
    count: only the so many highest, so that `low` is calibrated and the least score is the threshold found.
    ordered: (i, j) and (j, i), as Algorithm 1 lists them; else each pair once, i < j.  max_per_anchor: at most so many
    partners j of each i, the nearest (not ordered: of either end), taken before `count`.
    Cosines are computed in float32, tile by tile, and those that may lie within once more in float64: memory is O(tile +
    result), and the result that of all cosines at once in float64. Raises SidaeError on zero or non-finite rows.
    """
    if not 2 <= k <= len(z) or not low < high or any(v is not None and v < 1 for v in (count, max_per_anchor)):
        raise SidaeError(f"Pairs are mined among 2 to {len(z)} images between two rising thresholds, with count and "
                         f"max_per_anchor above 0; got k {k}, [{low}, {high}], {count}, {max_per_anchor}.")  # fmt: skip
    (z,), chosen = networks.wide(z), subset(len(z), count=k, seed=seed).to(z.device)
    z, wanted, precision = z if k == len(z) else z[chosen], count, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 and bfloat16 would move a cosine by ten times MARGIN
    try:
        while True:
            half = _band(z, low, high, wanted)
            found = _best(k, (torch.cat([half.i, half.j]), torch.cat([half.j, half.i]), half.score.repeat(2)))
            if max_per_anchor:
                anchor, order = found.i.sort(stable=True)
                rank = torch.arange(len(order), device=z.device) - torch.searchsorted(anchor, anchor)  # within an anchor
                found = Pairs(*(t[order[rank < max_per_anchor].sort().values] for t in found))
            if not ordered:
                once = (found.i < found.j) & torch.isin(found.i * k + found.j, found.j * k + found.i)
                found = Pairs(*(t[once] for t in found))
            if wanted is None or len(half.i) < wanted or len(found.i) >= count:
                return Pairs(chosen[found.i[:count]], chosen[found.j[:count]], found.score[:count].float())
            wanted *= 2  # max_per_anchor took some, so that the next ones are needed too
    finally:
        torch.set_float32_matmul_precision(precision)


def control(kind: str, labels: Tensor, count: int, seed: int = 0) -> Pairs:
    """As many pairs without an encoder: `random` are images again, (i, i), their Table 9; `oracle` and `wrong` are two
    different images with the same and with different labels. labels: int64 (N,). Raises SidaeError if there are fewer."""
    n, generator = len(labels), torch.Generator().manual_seed(seed)
    alike = sum(c * (c - 1) // 2 for c in labels.bincount().tolist())
    there = {"random": n, "oracle": alike, "wrong": n * (n - 1) // 2 - alike}[kind]
    if count > there:
        raise SidaeError(f"There are only {there} {kind} pairs among {n} images, {count} are asked for.")
    code = torch.arange(n * (kind == "random")) * (n + 1)
    while len(code) < count:
        i, j = torch.randint(n, (2, 4 * count), generator=generator)
        ok = (i < j) & ((labels[i] == labels[j]) == (kind == "oracle"))
        code = torch.cat([code, (i * n + j)[ok]]).unique()
    code = code[torch.randperm(len(code), generator=generator)[:count]]
    return Pairs(code // n, code % n, torch.full((count,), torch.nan))


@torch.no_grad()
def embed(weights: Path, images: Tensor, device: torch.device) -> Tensor:
    """uint8 (N, C, S, S) -> (N, D) float32 on the device: backbone and projection head of a saved run, in evaluation mode,
    on images as they are."""
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are replaced
        net = networks.load(weights)
        method = methods.build(net.config, 1)
    method.backbone = net
    if hasattr(method, "projector"):
        method.projector.load_state_dict(net.head)
    method.eval().to(device, memory_format=torch.channels_last)
    return networks.features(method.embed, images, stats=(net.mean, net.std), device=device)


def find(config: RunConfig, images: Images, rows: Tensor, device: torch.device) -> Pairs:
    """The pairs that a run's config asks for, as indices into its split, among a share of the training images `rows`.
    The encoder's weights are those of the store (`runs.fetch_all` trains it first)."""
    split = images.split(config.split)
    rows = rows[subset(len(rows), fraction=config.pair_share, seed=config.pair_seed)]
    if config.pairs == "mined":
        e, epoch = config.encoder, config.encoder_epoch
        z = embed(paths.backbone(e.key(), e.epochs if epoch < 0 else epoch), split.images[rows], device)
        found = mine(z, k=len(z), low=config.pair_low, high=config.pair_high, count=config.pair_count or None)
        if len(found.i) < max(1, config.pair_count):
            raise SidaeError(f"Only {len(found.i)} pairs of the {len(z)} images have a cosine in [{config.pair_low}, "
                             f"{config.pair_high}] by {e.method} {e.key()}; widen the thresholds or lower pair_count.")
    elif split.labels is None and config.pairs != "random":
        raise SidaeError(f"{config.pairs} pairs need labels, and the {config.split} split of {images.name} has none.")
    else:
        labels = torch.zeros(len(rows), dtype=torch.int64) if split.labels is None else split.labels[rows]
        found = control(config.pairs, labels, config.pair_count, config.pair_seed)
    return Pairs(rows[found.i.cpu()], rows[found.j.cpu()], found.score.cpu())


def report(pairs: Pairs, labels: Tensor | None = None) -> dict[str, Any]:
    """A list of pairs in numbers: its hash; ordered, unordered: how many there are with both directions and with one;
    images: distinct ones; low, high: extreme cosines. With labels (int64, one per image): the pair accuracy in percent
    with its 95 % interval, and for each class the number of its pairs and their accuracy (of none: None), a pair counting
    for both ends. The interval is Wilson's at the effective number of pairs, since those that share an anchor i are not
    independent (Kish's design effect, from the variance between anchors)."""
    if not len(pairs.i):
        return {"ordered": 0, "unordered": 0, "images": 0}
    i, j = torch.stack([torch.cat([pairs.i, pairs.j]), torch.cat([pairs.j, pairs.i])]).cpu()
    n, size = int(i.max()) + 1, len(pairs.i)
    out = {
        "hash": hashlib.sha256(torch.stack([i, j]).numpy().tobytes()).hexdigest()[:16], "images": len(i.unique()),
        "ordered": len((i * n + j).unique()), "unordered": len((i.minimum(j) * n + i.maximum(j)).unique()),
    }  # fmt: skip
    if not pairs.score.isnan().any():
        out |= {"low": round(pairs.score.min().item(), 6), "high": round(pairs.score.max().item(), 6)}
    if labels is not None:
        right = (labels[i] == labels[j]).double()
        p, (anchors, of) = right.mean().item(), i[:size].unique(return_inverse=True)
        excess = torch.zeros(len(anchors)).double().index_add_(0, of, right[:size] - p)
        variance = excess.square().sum().item() * len(anchors) / max(1, len(anchors) - 1)  # (size * error of p)^2
        a = 1.959964**2 / size * max(1.0, variance / (size * p * (1 - p)) if 0 < p < 1 else 1.0)
        centre, half = (p + a / 2) / (1 + a), math.sqrt(a * p * (1 - p) + a * a / 4) / (1 + a)
        number, good = (labels[i].bincount(w, minlength=int(labels.max()) + 1) for w in (None, right))
        out |= {"accuracy": round(100 * p, 4), "interval": [round(100 * v, 4) for v in (centre - half, centre + half)],
                "class_pairs": number.tolist(),
                "class_accuracy": [round(100 * g / k, 4) if k else None for g, k in zip(good.tolist(), number.tolist())]}
    return out
