"""Convolutions on small maps as matrix products, on CPUs up to three times as fast, equal up to rounding.

To understand a network read `Conv` as nn.Conv2d, `Doubling` as nn.ConvTranspose2d. A convolution leads from a
map of (wide, wide) places to one of (few, few), a transposed one back; its weight is (a, b, k, k) with a
channels on the side of few, b on that of wide.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multiplied(few: int, wide: int, kernel: int, dtype: torch.dtype, device: str) -> bool:
    """Whether a product is faster: on a CPU, where few is at most 2 and the kernel 1x1 or no smaller than the
    map, so that most taps meet padding; in bfloat16, where torch is slow, from 8 to 4 and from 4 to 2 too."""
    halves = dtype == torch.bfloat16 and few <= 4 and wide == 2 * few
    return device == "cpu" and (halves or few <= 2 and (wide <= kernel or kernel == 1))


def laid(weight: Tensor, few: int, wide: int, stride: int, padding: int) -> Tensor:
    """The matrix (few few a, wide wide b) of a convolution: for each place of the small map the kernel, laid
    over what it sees of the wide map. A transposed convolution multiplies by the transpose."""
    spare = wide - weight.shape[-1]
    starts = [n * stride - padding for n in range(few)]  # negative padding cuts off the taps beside the map
    maps = (F.pad(weight, (left, spare - left, top, spare - top)) for top, left in product(starts, repeat=2))
    return torch.cat([m.permute(0, 2, 3, 1) for m in maps]).flatten(1)


def through(x: Tensor, matrix: Tensor, bias: Tensor | None, side: int) -> Tensor:
    """x (B, b, s, s) times a `laid` matrix -> (B, a, side, side); channels_last, so nothing is copied."""
    y = F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix, None if bias is None else bias.repeat(side**2))
    return y.view(len(x), side, side, len(matrix) // side**2).permute(0, 3, 1, 2)


class FastGradient(torch.autograd.Function):
    """torch's convolution, or its transposed one where an output padding `spare` is given. The weight's
    gradient is the small map times what its places see of the wide one: up to three times as fast."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, spare):  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.how = stride, padding, spare
        if spare is None:
            return F.conv2d(x, weight, bias, stride, padding)
        return F.conv_transpose2d(x, weight, bias, stride, padding, spare)

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        (x, weight), (s, p, spare) = ctx.saved_tensors, ctx.how
        k = weight.shape[-1]
        if spare is None:
            few, wide = g, x
            beyond = x.shape[-1] - (g.shape[-1] - 1) * s + 2 * p - k  # rows of x that no place sees
            dx = F.conv_transpose2d(g, weight, None, s, p, beyond)
        else:
            few, wide = x, g
            dx = F.conv2d(g, weight, None, s, p)
        padded = F.pad(wide.permute(0, 2, 3, 1), (0, 0, p, p, p, p))
        patches = padded.unfold(1, k, s).unfold(2, k, s).permute(0, 1, 2, 4, 5, 3)  # (B, few, few, k, k, b)
        dw = few.permute(1, 0, 2, 3).flatten(1) @ patches.reshape(-1, k * k * wide.shape[1])  # (a, k k b)
        dw = dw.view(len(dw), k, k, -1).permute(0, 3, 1, 2)
        return dx, dw, g.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None, None, None


def computed(layer: "Conv | Doubling", x: Tensor, few: int, wide: int, spare: int | None) -> Tensor | None:
    """A layer's output where a product is faster, else nothing. spare: output padding of a transposed one."""
    k, s, p = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if x.shape[2] != x.shape[3] or not multiplied(few, wide, k, dtype, x.device.type):
        return None
    if k == 1 and not p:  # each place by itself; from channels_last, so that the gradient is that too
        places = x.permute(0, 2, 3, 1)[:, ::s, ::s]
        return F.linear(places, layer.weight.flatten(1), layer.bias).permute(0, 3, 1, 2)
    weight = layer.weight.to(dtype)
    if wide > k:
        return FastGradient.apply(x.to(dtype), weight, layer.bias, s, p, spare)
    matrix = laid(weight, few, wide, s, p)
    return through(x, matrix, layer.bias, few) if spare is None else through(x, matrix.t(), layer.bias, wide)


class Conv(nn.Conv2d):
    """nn.Conv2d of a square kernel and one group."""

    def forward(self, x: Tensor) -> Tensor:
        few = (x.shape[2] + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
        y = computed(self, x, few, x.shape[2], None)
        return super().forward(x) if y is None else y


class Doubling(nn.ConvTranspose2d):
    """nn.ConvTranspose2d of kernel 3 and stride 2, which doubles a map: (B, a, s, s) -> (B, b, 2 s, 2 s)."""

    def __init__(self, c_in: int, c_out: int, bias: bool = False) -> None:
        super().__init__(c_in, c_out, 3, 2, 1, 1, bias=bias)

    def product(self, x: Tensor) -> Tensor:
        """The same of a 1x1 map, without bias, for a GPU. torch's own does not compile there: cuDNN lays out
        the weight's gradient in another way than the compiler expects (pytorch/pytorch#171622)."""
        taps = self.weight[:, :, 1:, 1:].permute(0, 2, 3, 1).flatten(1)  # four of nine meet the map
        return (x.flatten(1) @ taps).view(len(x), 2, 2, -1).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        few = x.shape[2]
        if x.device.type != "cpu" and x.shape[2:] == (1, 1) and self.bias is None:
            return self.product(x)
        y = computed(self, x, few, 2 * few, 1)
        return super().forward(x) if y is None else y
