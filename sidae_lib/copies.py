"""Near copies: test images that are a training image saved again, resized, brighter or moved by a pixel or two."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import pictures

ALIKE = 0.9  # pairs are at least so alike
TURNS = 125  # and judged from so many turns of the luminance; both numbers were chosen on real sets


def near(test: Tensor, train: Tensor) -> Tensor | None:
    """Indices of the test images (N, C, S, S) that are nearly a training image.

    None where too few images are rich enough to judge: two plain shapes on plain ground, as digits are, look alike by chance.
    This is a perceptual hash, which shrinks an image and compares neighbouring cells (N. Krawetz, "Kind of Like That", The
    Hacker Factor Blog, 2013). It keeps the differences themselves, since noise turns the signs of small ones. Cells of 7 x 7
    find the three likeliest training images; cells of 14 x 14, moved by up to two pixels, judge these.
    """
    near, rich = [], []
    bank = torch.cat([_hash(_grey(b), 4)[0] for b in train.split(4096)])
    for block in test.split(max(1, min(4096, 2**24 // len(train)))):  # 64 MiB of products
        x = _grey(block)
        likely = (_hash(x, 4)[0] @ bank.T).topk(min(3, len(train))).indices  # (n, 3)
        found = _grey(train[likely.flatten()])
        same = torch.einsum("mnd,nkd->mnk", _hash(x, 2, range(-2, 3)), _hash(found, 2)[0].unflatten(0, likely.shape))
        alike, which = same.amax(0).max(1)
        best = found.unflatten(0, likely.shape)[torch.arange(len(x)), which]
        rich.append(torch.maximum(_turns(x), _turns(best)) > TURNS)
        near.append((alike > ALIKE) & rich[-1])
    return torch.cat(near).nonzero()[:, 0] if torch.cat(rich).double().mean() > 0.5 else None


def _grey(x: Tensor) -> Tensor:
    """uint8 (N, C, S, S) -> luminance (N, 1, 32, 32)."""
    return pictures.fit(x, 32, 1, True)[:, :1].float()


def _hash(x: Tensor, cell: int, moves: Iterable[int] = (0,)) -> Tensor:
    """Differences between neighbouring cells of a window 28 pixels wide, at length 1, for each move of the window down and
    to the right: (moves * moves, N, D)."""
    means = F.avg_pool2d(x, cell, 1)
    cut = [means[:, 0, 2 + dy : 28 + dy : cell, 2 + dx : 28 + dx : cell] for dy in moves for dx in moves]
    return torch.stack([F.normalize(torch.cat([c.diff(dim=d).flatten(1) for d in (1, 2)], 1)) for c in cut])


def _turns(x: Tensor) -> Tensor:
    """(N,) how often the luminance turns from rising to falling or back, by more than 4 each, along rows and columns."""
    x = F.avg_pool2d(x, 2, 1)  # means of 2 x 2 pixels, so that noise does not count for shapes
    steps = [x.diff(dim=d).transpose(d, 3) for d in (2, 3)]
    signs = [torch.where(s.abs() > 4, s.sign(), 0) for s in steps]
    return sum((s[..., 1:] * s[..., :-1] < 0).sum((1, 2, 3)) for s in signs)
