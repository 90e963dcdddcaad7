"""Batched augmentation on the device: every sample has its own parameters, drawn apart from their use.

Given the same parameters each op equals torchvision's function for one image. `draw` makes the parameters of
a whole epoch on the CPU. A call is a fixed sequence of dense tensor operations, without branches on values: a
compiled step or a CUDA graph can hold it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .config import SidaeError

Params = dict[str, Tensor]  # "<op's name>" or "<op's name>.<what>" -> (n, ...), float32 or int64


class Op(Protocol):
    """One augmentation; two ops of the same kind in one pipeline need two names."""

    name: str

    def draw(self, n: int, size: int, generator: Generator) -> Params:
        """Parameters of n samples of size x size pixels."""

    def __call__(self, x: Tensor, params: Params) -> Tensor:
        """x: (B, C, S, S) in [0, 1] -> the same shape and range."""


def _uniform(low: float, high: float, *shape: int, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _grey(channels: Sequence[Tensor]) -> Tensor:
    """Luma of channels [r, g, b] as torchvision computes it; a single channel is its own."""
    if len(channels) == 1:
        return channels[0]
    r, g, b = channels
    return 0.2989 * r + 0.587 * g + 0.114 * b


def _separable(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """rows @ x @ cols^T for every image and channel: x (B, C, S, S), rows and cols (B, S, S)."""
    B, C, S, _ = x.shape
    x = (rows @ x.transpose(1, 2).reshape(B, S, C * S)).view(B, S * C, S)  # a product per image
    return (x @ cols.mT).view(B, S, C, S).transpose(1, 2)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area and aspect ratio, resized to the whole image (bilinear), as torchvision's op.

    scale: range of the share of the area.   ratio: range of width / height. It contains 1: after ten failed
    tries torchvision takes the largest centred box within it, which here is the whole (square) image.
    Parameter: (n, 4) int64 top, left, height, width.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    name: str = "crop"

    def draw(self, n: int, size: int, generator: Generator) -> Params:
        area = size**2 * _uniform(*self.scale, n, 10, generator=generator)
        ratio = _uniform(*map(math.log, self.ratio), n, 10, generator=generator).exp()
        box = torch.stack([area / ratio, area * ratio], 2).sqrt().round()  # (n, 10, 2) height, width
        fits = ((box > 0) & (box <= size)).all(2)
        box = box[torch.arange(n), fits.int().argmax(1)]  # (n, 2) the first that fits
        box = torch.where(fits.any(1, keepdim=True), box, size)
        corner = (torch.rand(n, 2, generator=generator) * (size - box + 1)).floor()
        return {self.name: torch.cat([corner, box], 1).long()}

    def __call__(self, x: Tensor, params: Params) -> Tensor:
        top, left, height, width = params[self.name].unbind(1)
        S = x.shape[-1]
        return _separable(x, self._weights(top, height, S), self._weights(left, width, S))

    @staticmethod
    def _weights(start: Tensor, length: Tensor, size: int) -> Tensor:
        """(B, S, S): weight of source pixel i in output pixel o: of two neighbours, as no box exceeds S."""
        pixel = torch.arange(size, device=start.device)
        start, length = start[:, None], length[:, None]
        source = ((pixel + 0.5) * (length / size) - 0.5).clamp(min=0).minimum(length - 1.0) + start  # (B, S)
        return (1 - (source[:, :, None] - pixel).abs()).clamp(min=0)


@dataclass(frozen=True)
class Sometimes:
    """Changes a sample with probability p. Parameter: (n,) int64, 1 = changed."""

    name: str
    p: float
    change: Callable[[Tensor], Tensor]

    def draw(self, n: int, size: int, generator: Generator) -> Params:
        return {self.name: (torch.rand(n, generator=generator) < self.p).long()}

    def __call__(self, x: Tensor, params: Params) -> Tensor:
        return torch.where(params[self.name].view(-1, 1, 1, 1) == 1, self.change(x), x)


FLIP = Sometimes("flip", 0.5, lambda x: x.flip(3))
GREYSCALE = Sometimes("grey", 0.2, lambda x: _grey(x.unbind(1))[:, None])
SOLARIZE = Sometimes("solarize", 0.2, lambda x: torch.where(x >= 0.5, 1 - x, x))


@dataclass(frozen=True)
class Translate:
    """A shift by up to `pixels` both ways with probability p, reflected at the borders (AMDIM's code).

    Parameter: (n, 2) int64 rows and columns, 0 = not shifted: the pixel that becomes the top left corner.
    """

    pixels: int = 4
    p: float = 0.8
    name: str = "translate"

    def draw(self, n: int, size: int, generator: Generator) -> Params:
        if size <= self.pixels:
            raise SidaeError(f"Images of {size} pixels cannot be shifted by {self.pixels}; "
                             "set a larger size or choose another augmentation.")  # fmt: skip
        shift = torch.randint(-self.pixels, self.pixels + 1, (n, 2), generator=generator)
        return {self.name: shift * (torch.rand(n, 1, generator=generator) < self.p)}

    def __call__(self, x: Tensor, params: Params) -> Tensor:
        last = x.shape[-1] - 1
        source = torch.arange(last + 1, device=x.device) + params[self.name][..., None]  # (B, 2, S)
        rows, cols = (last - (last - source.abs()).abs()).unbind(1)  # reflected
        return x.gather(2, rows[:, None, :, None].expand_as(x)).gather(3, cols[:, None, None].expand_as(x))


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation, hue in random order with probability p, as torchvision's ColorJitter.

    A strength s gives factors U(max(0, 1 - s), 1 + s), hue U(-s, s); an op of strength 0 is left out.
    The first three are one formula, clamp(f x + (1 - f) ref), where ref is 0, the mean of grey, or grey. So
    hue, which costs most, runs once, between the blends before and after it; unused places change nothing.
    Parameters: "blend" (n, places, 3) coefficients of x, grey and grey's mean; "hue" (n,) in turns.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    p: float = 0.8
    name: str = "jitter"

    def draw(self, n: int, size: int, generator: Generator) -> Params:
        return self.plan(*self.sample(n, generator))

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """torchvision's parameters: factors (n, 4), and the order (n, ops) of 0 = brightness to 3 = hue."""
        strength = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue])
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
        low = (neutral - strength).maximum(torch.tensor([0.0, 0.0, 0.0, -0.5]))
        factors = low + (neutral + strength - low) * torch.rand(n, 4, generator=generator)
        used = strength.nonzero()[:, 0]
        order = used[torch.rand(n, len(used), generator=generator).argsort(1)]
        return torch.where(torch.rand(n, 1, generator=generator) < self.p, factors, neutral), order

    def plan(self, factors: Tensor, order: Tensor) -> Params:
        """The op's parameters, from factors and order as `sample` gives them."""
        f = factors.gather(1, order)
        blend = torch.stack([f, (1 - f) * (order == 2), (1 - f) * (order == 1)], 2)  # (n, ops, 3)
        if not self.hue:
            return {f"{self.name}.blend": blend}
        place, at = torch.arange(order.shape[1]), (order == 3).int().argmax(1, keepdim=True)
        identity = torch.tensor([1.0, 0.0, 0.0])
        before = torch.where((place < at)[..., None], blend, identity)[:, :-1]
        after = torch.where((place > at)[..., None], blend, identity)[:, 1:]
        hue = factors[:, 3].contiguous()
        return {f"{self.name}.blend": torch.cat([before, after], 1), f"{self.name}.hue": hue}

    def __call__(self, x: Tensor, params: Params) -> Tensor:
        blend = params[f"{self.name}.blend"][..., None, None].unbind(1)  # places x (B, 3, 1, 1)
        channels = x.unbind(1)  # kept apart: the compiler then holds a whole pixel in registers
        middle = len(blend) // 2 if self.hue else 0
        for coefficients in blend[:middle]:
            channels = self._blend(channels, coefficients)
        if self.hue and len(channels) == 3:
            channels = self._turn_hue(*channels, params[f"{self.name}.hue"][:, None, None])
        for coefficients in blend[middle:]:
            channels = self._blend(channels, coefficients)
        return torch.stack(channels, 1)

    @staticmethod
    def _blend(channels: Sequence[Tensor], coefficients: Tensor) -> list[Tensor]:
        own, of_grey, of_mean = coefficients.unbind(1)  # (B, 1, 1)
        grey = _grey(channels)
        ref = of_grey * grey + of_mean * grey.mean((1, 2), keepdim=True)
        return [(own * c + ref).clamp(0, 1) for c in channels]

    @staticmethod
    def _turn_hue(r: Tensor, g: Tensor, b: Tensor, turns: Tensor) -> list[Tensor]:
        """RGB -> HSV -> RGB as torchvision, without cases: a channel is piecewise linear in the hue."""
        high, low = r.maximum(g).maximum(b), r.minimum(g).minimum(b)
        chroma = high - low
        d = torch.where(chroma == 0, 1.0, chroma)
        sextant = torch.where(high == g, 2 + (b - r) / d, 4 + (r - g) / d)
        sextant = torch.where(high == r, (g - b) / d, sextant)
        out = []
        for offset in (0, 4, 2):
            h = sextant + 6 * turns + offset
            h = h - 6 * (h / 6).floor()
            out.append(low + chroma * ((h - 3).abs() - 1).clamp(0, 1))
        return out


@dataclass(frozen=True)
class GaussianBlur:
    """Gaussian blur with reflected borders and probability p, as torchvision's GaussianBlur.

    kernel: odd width in pixels, at most 2 S - 1.   sigma: range of the standard deviation in pixels.
    Parameter: (n,) float32 sigma, 0 = not blurred.
    """

    kernel: int = 9
    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5
    name: str = "blur"

    def draw(self, n: int, size: int, generator: Generator) -> Params:
        sigma = _uniform(*self.sigma, n, generator=generator)
        return {self.name: torch.where(torch.rand(n, generator=generator) < self.p, sigma, 0.0)}

    def __call__(self, x: Tensor, params: Params) -> Tensor:
        last = x.shape[-1] - 1
        pixel = torch.arange(last + 1, device=x.device)
        tap = torch.arange(-(self.kernel // 2), self.kernel // 2 + 1, device=x.device)
        sigma = params[self.name][:, None].clamp(min=0.01)  # exp(-5000) is 0: the identity
        gauss = torch.exp(-0.5 * (tap / sigma).square())  # (B, K)
        source = last - (last - (pixel[:, None] + tap).abs()).abs()  # (S, K) the pixel under a tap, reflected
        picks = (source[..., None] == pixel).float()  # (S, K, S)
        weights = torch.einsum("bk,oki->boi", gauss / gauss.sum(1, keepdim=True), picks)
        return _separable(x, weights, weights)


@dataclass(frozen=True)
class PadRotateScale:
    """The "FER" augmentation: Resize(2 S), Pad(18), RandomRotation(nearest), CenterCrop(2.25 S), Resize(S).

    Parameter: (n,) float32 angle in degrees, counter-clockwise, U(-degrees, degrees). S is at most 144, where
    the crop is the canvas.
    """

    degrees: float = 15.0
    name: str = "rotate"

    def draw(self, n: int, size: int, generator: Generator) -> Params:
        return {self.name: _uniform(-self.degrees, self.degrees, n, generator=generator)}

    def __call__(self, x: Tensor, params: Params) -> Tensor:
        S = x.shape[-1]
        canvas, crop = 2 * S + 36, int(2.25 * S)
        # Only the crop is sampled. Outside of the enlarged image lies zero, so the padding is never built.
        i = torch.arange(crop, device=x.device) + round((canvas - crop) / 2) + 0.5 - canvas / 2
        angle = params[self.name].double().deg2rad()[:, None, None]
        cos, sin = angle.cos().float(), angle.sin().float()
        column = i[:, None]
        grid = torch.stack([cos * i - sin * column, sin * i + cos * column], 3) / S  # (B, crop, crop, 2) x, y
        x = F.interpolate(x, size=(2 * S, 2 * S), mode="bilinear")
        x = F.grid_sample(x, grid, mode="nearest", align_corners=False)
        return F.interpolate(x, size=(S, S), mode="bilinear", antialias=True)


@dataclass(frozen=True)
class Views:
    """A pipeline of two views: the ops of each, in order; shared: ops whose parameters are the same."""

    first: tuple[Op, ...]
    second: tuple[Op, ...]
    shared: tuple[str, ...] = ()

    def draw(self, n: int, size: int, generator: Generator, support: int = 0) -> tuple[Params, ...]:
        """Parameters of n samples of size x size pixels, for view 1, view 2 and `support` like view 1:
        CPU tensors (n, ...), a function of the generator alone."""
        first, *others = ({k: v for op in ops for k, v in op.draw(n, size, generator).items()}
                          for ops in (self.first, self.second, *[self.first] * support))
        return first, *(p | {k: first[k] for k in self.shared} for p in others)


def apply(ops: tuple[Op, ...], images: Tensor, params: Params, mean: Tensor, std: Tensor) -> Tensor:
    """One normalised view of every image.

    images: (B, C, S, S) uint8, C = 1 or 3.   params: of `Views.draw`, those of the batch, on the same device.
    mean, std: (C,) of pixels in [0, 1]. Returns (B, C, S, S) float32, contiguous: (view - mean) / std.
    """
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 would move pixels by more than 1/255
        x = images / 255
        for op in ops:
            x = op(x, params)
        return ((x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).contiguous()


_CIFAR = (ColorJitter(), RandomResizedCrop(), GREYSCALE, FLIP)
# For grey images, of one channel or of three equal ones: saturation, hue and greyscale change nothing there.
_GREY = (ColorJitter(saturation=0.0, hue=0.0), RandomResizedCrop(), FLIP, GaussianBlur())
# All crops are bilinear; the official code of the contrastive and siamese methods crops bicubic, at ImageNet.
# SimCLR at 32 pixels: strength 0.5, no blur (arXiv:2002.05709, App. B.9), as the CIFAR demo of MoCo
_SIMCLR = (RandomResizedCrop((0.08, 1.0)), FLIP, ColorJitter(), GREYSCALE)
# arXiv:2006.07733, App. B
_BYOL = (RandomResizedCrop((0.08, 1.0)), FLIP, ColorJitter(saturation=0.2), GREYSCALE)
_DINO = (RandomResizedCrop((0.14, 1.0)), *_BYOL[1:])  # the crop of two views (arXiv:2104.14294); else BYOL's
# arXiv:1906.00910, its code for CIFAR
_AMDIM = (FLIP, Translate(), ColorJitter(hue=0.2), replace(GREYSCALE, p=0.25))
_REPORT = (*_SIMCLR[:2], ColorJitter(0.8, 0.8, 0.8, 0.2), GREYSCALE, GaussianBlur(3, p=1.0))
_FER = (PadRotateScale(),)

# The paper's order and probabilities (arXiv:2304.02549, Sec. 4.1), SimSiam's values (arXiv:2011.10566).
VIEWS: dict[str, Views] = {
    "simsiam_cifar": Views(_CIFAR, _CIFAR),
    "simsiam_grey": Views(_GREY, _GREY),
    "simsiam_cifar_with_blur": Views((*_CIFAR, _GREY[-1]), (*_CIFAR, _GREY[-1])),  # two open choices
    "simsiam_grey_without_blur": Views(_GREY[:-1], _GREY[:-1]),
    "simclr": Views(_SIMCLR, _SIMCLR),
    "byol": Views(_BYOL, (*_BYOL, SOLARIZE)),
    "dino": Views(_DINO, (*_DINO, SOLARIZE)),
    "amdim": Views(_AMDIM, _AMDIM, shared=("flip",)),  # one flip for both views
    "yadim": Views(_AMDIM, _AMDIM),  # AMDIM's and, but for its patches, CPC's: every view its own flip
    "cpc_patches": Views(_AMDIM, ()),  # one view, which the encoder cuts into patches
    "fer": Views(_FER, _FER),
    "report_fer": Views((), _FER),  # the student report (Sec. 5.2): a clean anchor, and its positive
    "report_simclr": Views((), _REPORT),
    "report_simclr_anchors": Views(_REPORT, _REPORT),
    "none": Views((), ()),
}
for _name in ("simsiam_cifar", "simsiam_grey"):  # for images whose class an op would hide
    for _without, _ops in {"flip": {"flip"}, "colour": {"jitter", "grey"},
                           "flip_colour": {"flip", "jitter", "grey"}}.items():  # fmt: skip
        _left = tuple(op for op in VIEWS[_name].first if op.name not in _ops)
        VIEWS[f"{_name}_without_{_without}"] = Views(_left, _left)


def check(name: str) -> None:
    """Raises SidaeError if VIEWS has no such pipeline."""
    if name not in VIEWS:
        raise SidaeError(f"Unknown augmentation {name!r}; choose from {', '.join(VIEWS)}.")
