"""Backbones, heads and the decoder, and the weights they are saved to."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from itertools import pairwise, product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from .config import RunConfig, SidaeError


def multiplied(few: int, wide: int, kernel: int, dtype: torch.dtype, device: str) -> bool:
    """Whether a convolution from a (wide, wide) map to a (few, few) one, or a transposed one back, is a matrix product here, or
    the gradient of its weight is (`Halving`).

    On a CPU alone, where few is at most 2 and the matrix has no more entries than the kernel has taps, or the kernel is 1x1:
    there a kernel mostly meets padding. In bfloat16 also where few is at most 4 and half of wide, since torch is slow there.
    """
    halves = dtype == torch.bfloat16 and few <= 4 and wide == 2 * few
    return device == "cpu" and (halves or few <= 2 and (wide <= kernel or kernel == 1))


def laid(weight: Tensor, few: int, wide: int, stride: int, padding: int) -> Tensor:
    """The matrix of a convolution from a (wide, wide) map of b channels to a (few, few) one of a: weight (a, b, k, k) ->
    (few few a, wide wide b), the kernel laid over the wide map once a place of the other. Of a transposed one the transpose."""
    spare = wide - weight.shape[-1]
    before = [n * stride - padding for n in range(few)]  # negative padding cuts off the taps beside the map
    maps = (F.pad(weight, (left, spare - left, top, spare - top)) for top, left in product(before, repeat=2))
    return torch.cat([m.permute(0, 2, 3, 1) for m in maps]).flatten(1)


def precision(x: Tensor) -> torch.dtype:
    """What a convolution of x computes in on a CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def through(x: Tensor, matrix: Tensor, bias: Tensor | None, side: int) -> Tensor:
    """x (B, b, s, s) and a `laid` matrix -> (B, a, side, side), channels_last, as x should be: then it is not copied."""
    y = F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix, None if bias is None else bias.repeat(side**2))
    return y.view(len(x), side, side, len(matrix) // side**2).permute(0, 3, 1, 2)


class Halving(torch.autograd.Function):
    """torch's convolution of x by weight (a, b, k, k), or its transposed one where the output padding `spare` is given. The
    gradient of the weight is a product of the small map (B, a, few, few) with the patches of the wide one that its places see:
    in bfloat16 on small maps torch's own takes up to three times as long."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, spare: int | None = None
                ) -> Tensor:  # type: ignore[override]  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.how = stride, padding, spare
        how = weight, bias, stride, padding
        return F.conv2d(x, *how) if spare is None else F.conv_transpose2d(x, *how, spare)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, weight), (s, p, spare), k = ctx.saved_tensors, ctx.how, ctx.saved_tensors[1].shape[-1]
        if spare is None:
            few, wide = g, x
            dx = F.conv_transpose2d(g, weight, None, s, p, x.shape[-1] - (g.shape[-1] - 1) * s + 2 * p - k)
        else:
            few, wide, dx = x, g, F.conv2d(g, weight, None, s, p)
        patches = F.pad(wide.permute(0, 2, 3, 1), (0, 0, p, p, p, p)).unfold(1, k, s).unfold(2, k, s)  # (B, few, few, b, k, k)
        dw = few.permute(1, 0, 2, 3).flatten(1) @ patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, k * k * wide.shape[1])
        return (dx, dw.view(len(dw), k, k, -1).permute(0, 3, 1, 2), g.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None,
                None, None, None)  # fmt: skip


class Conv(nn.Conv2d):
    """nn.Conv2d of a square kernel and one group, as a matrix product where `multiplied` says so."""

    def forward(self, x: Tensor) -> Tensor:
        (k, _), (s, _), (p, _), (wide, across) = self.kernel_size, self.stride, self.padding, x.shape[2:]  # type: ignore[misc]
        few, dtype = (wide + 2 * p - k) // s + 1, precision(x)
        if wide != across or not multiplied(few, wide, k, dtype, x.device.type):
            return super().forward(x)
        if k == 1 and not p:  # every place of the map by itself; taken from channels_last, so that the gradient is it too
            return F.linear(x.permute(0, 2, 3, 1)[:, ::s, ::s], self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        weight = self.weight.to(dtype)  # before it is laid
        if wide > k:
            return Halving.apply(x.to(dtype), weight, self.bias, s, p)
        return through(x, laid(weight, few, wide, s, p), self.bias, few)


class ResNet(nn.Module):
    """ResNet-18 (arXiv:1512.03385), parameter names as torchvision's, so that width 64 with the ImageNet
    stem loads into `torchvision.models.resnet18(strict=False)`; narrower ones scale every stage. ResNet-34: other blocks.

    (B, C, S, S) -> (B, 8 width), the mean over the last map. At S = 32 that map is 1x1 with the ImageNet stem and 4x4
    with the CIFAR stem (3x3 stride 1, no pooling). zero_init: the weight of every block's last BatchNorm starts at 0, so that
    a block starts as its shortcut (torchvision's zero_init_residual; arXiv:1706.02677, Sec. 5.1).
    """

    def __init__(self, *, stem: str = "imagenet", width: int = 64, channels: int = 3, blocks: tuple[int, ...] = (2, 2, 2, 2),
                 norm: Callable[[int], nn.Module] = nn.BatchNorm2d, zero_init: bool = False) -> None:  # fmt: skip
        super().__init__()
        cifar = stem == "cifar"
        self.conv1 = nn.Conv2d(channels, width, 3 if cifar else 7, 1 if cifar else 2, 1 if cifar else 3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(*(BasicBlock(width, width, norm_layer=norm) for _ in range(blocks[0])))
        self.layer2, self.layer3, self.layer4 = (
            self._stage(k * width, 2 * k * width, n, norm) for k, n in zip((1, 2, 4), blocks[1:]))
        self.out_features, self.widths = 8 * width, (8 * width, 4 * width, 2 * width)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                m.__class__ = Conv  # BasicBlock builds nn.Conv2d; another's weights would be drawn anew
            elif zero_init and isinstance(m, BasicBlock):
                nn.init.zeros_(m.bn2.weight)

    @staticmethod
    def _stage(c_in: int, c_out: int, n: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
        down = nn.Sequential(conv1x1(c_in, c_out, 2), norm(c_out))
        more = (BasicBlock(c_out, c_out, norm_layer=norm) for _ in range(n - 1))
        return nn.Sequential(BasicBlock(c_in, c_out, 2, down, norm_layer=norm), *more)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The maps behind the last three stages, (B, widths[k], s, s), the last first."""
        early = self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x))))))
        middle = self.layer3(early)
        return [self.layer4(middle), middle, early]

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)[0].mean((2, 3))


class SmallCNN(nn.Sequential):
    """The student report's network, its Table 1: five 2x2 convolutions, 181,248 parameters on 1 x 28 x 28 and 181,504
    on 3 x 32 x 32. (B, C, S, S) -> (B, 32) for S in {28, 32}, each value in (0, 1) unless sigmoid is left out."""

    def __init__(self, *, size: int = 32, channels: int = 3, sigmoid: bool = True) -> None:
        rectify = partial(nn.LeakyReLU, 0.2, inplace=True)  # which waits for memory: a tenth of the time of large batches
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 2, 2, 1, bias=False), rectify()]
        for c in (32, 64, 128):
            layers += [nn.Conv2d(c, 2 * c, 2, 2, 1, bias=False), nn.BatchNorm2d(2 * c), rectify()]
        super().__init__(*layers, nn.Conv2d(256, 8, 2, bias=False), nn.Sigmoid() if sigmoid else nn.Identity(), nn.Flatten())
        for _ in range(4):
            size = size // 2 + 1
        self.out_features = 8 * (size - 1) ** 2


class AMDIMUnit(nn.Module):
    """AMDIM's residual unit (arXiv:1906.00910): a k x k convolution without padding, ReLU, a 1x1 convolution that starts
    at 0, beside average pooling with channels of zeros appended; no ReLU after the sum."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, kernel, stride, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 1, bias=False)
        nn.init.zeros_(self.conv2.weight)
        self.more = c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        beside = F.avg_pool2d(x, self.conv1.kernel_size, self.conv1.stride)
        return self.conv2(self.conv1(x).relu()) + F.pad(beside, (0, 0, 0, 0, 0, self.more))


class AMDIMEncoder(nn.Module):
    """AMDIM's encoder for 32 pixels (arXiv:1906.00910 and its code): no padding and, but for the end, no BatchNorm, so
    that a place of a map sees its own pixels alone. (B, C, 32, 32) -> (B, 8 width). depth: units a block, all but the
    first 1x1. The code's own sizes: width 128, 1,024 outputs, depth 3; on CIFAR-10 it ran 320, 1,280 and 10."""

    def __init__(self, *, width: int = 128, channels: int = 3, depth: int = 3) -> None:
        super().__init__()
        w = width

        def block(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
            return [AMDIMUnit(c_in, c_out, kernel, stride), *(AMDIMUnit(c_out, c_out) for _ in range(depth - 1))]

        self.to7 = nn.Sequential(nn.Conv2d(channels, w, 3), nn.ReLU(inplace=True), AMDIMUnit(w, w),  # 30
                                 *block(w, 2 * w, 4, 2), *block(2 * w, 4 * w, 2, 2))  # 14, 7  # fmt: skip
        self.to5 = nn.Sequential(*block(4 * w, 4 * w, 3))
        self.to1 = nn.Sequential(*block(4 * w, 4 * w, 3), AMDIMUnit(4 * w, 8 * w, 3), nn.BatchNorm2d(8 * w))  # 3, 1
        self.out_features, self.widths = 8 * w, (8 * w, 4 * w, 4 * w)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The maps of 1x1, 5x5 and 7x7, (B, widths[k], s, s)."""
        seven = self.to7(x)
        five = self.to5(seven)
        return [self.to1(five), five, seven]

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)[0].flatten(1)


class Embedding(nn.Module):
    """AMDIM's way to compare maps of different widths, (B, c_in, s, s) -> (B, c_out, s, s): two 1x1 convolutions, the second
    0 at first, beside one that is near the identity at first, then BatchNorm."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 1, bias=False), nn.Conv2d(c_out, c_out, 1, bias=False)
        self.beside, self.bn = nn.Conv2d(c_in, c_out, 1), nn.BatchNorm2d(c_out)
        nn.init.zeros_(self.conv2.weight)
        with torch.no_grad():
            near = torch.eye(c_out, c_in)[..., None, None]
            self.beside.weight.uniform_(-0.01, 0.01).mul_(1 - near).add_(near)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv2(self.conv1(x).relu()) + self.beside(x))


class Patches(nn.Module):
    """CPC v2's eyes (arXiv:1905.09272): overlapping patches of 8 x 8 pixels, 4 apart, each through `net` alone. Its one map
    is their grid, G x G with G = S / 4 - 1. (B, C, S, S) -> (B, net.out_features), the mean over the grid."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.out_features, self.widths = net, net.out_features, (net.out_features,)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The grid alone: (B, net.out_features, G, G)."""
        p = x.unfold(2, 8, 4).unfold(3, 8, 4).permute(0, 2, 3, 1, 4, 5)  # (B, G, G, C, 8, 8)
        v = self.net(p.flatten(0, 2).contiguous(memory_format=torch.channels_last))
        return [v.view(*p.shape[:3], -1).permute(0, 3, 1, 2)]

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)[0].mean((2, 3))


class Context(nn.Module):
    """CPC v2's masked context network, (B, c, G, G) -> (B, c, G, G): residual blocks in which a row sees itself and the row
    above, never one below.

    The 1x3 convolution is padded with zeros left and right, so that every place meets its own neighbours, and above the
    first row lie ones. bolts, by an author of arXiv:2009.00104, pads the 2x1 convolution left and right instead: its 1x3
    output is two columns narrower, and at both edges the 2x1 adds a column that is its bias alone. The ones are bolts' too;
    the pseudocode of arXiv:1905.09272 says nothing of that row.
    """

    def __init__(self, c: int, hidden: int, blocks: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.Conv2d(c, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)),
            nn.ConstantPad2d((0, 0, 1, 0), 1.0), nn.Conv2d(hidden, hidden, (2, 1)), nn.ReLU(inplace=True),
            nn.Conv2d(hidden, c, 1)) for _ in range(blocks))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.relu()


class Doubling(nn.ConvTranspose2d):
    """The transposed convolution of kernel 3 and stride 2 that doubles a map, (B, c_in, s, s) -> (B, c_out, 2 s, 2 s).

    As a convolution it does not compile on a GPU where the map is 1x1: cuDNN lays out the gradient of the weight in another
    way than the compiler expects (pytorch/pytorch#171622). There it is `product`, on a CPU what `multiplied` says,
    elsewhere torch's own, bit for bit.
    """

    def __init__(self, c_in: int, c_out: int, bias: bool = False) -> None:
        super().__init__(c_in, c_out, 3, 2, 1, 1, bias=bias)

    def product(self, x: Tensor) -> Tensor:
        """The same for a map of 1x1 without bias: four of the nine taps reach it."""
        x = x.flatten(1) @ self.weight[:, :, 1:, 1:].permute(0, 2, 3, 1).flatten(1)
        return x.view(len(x), 2, 2, -1).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if x.device.type != "cpu" and x.shape[2:] == (1, 1) and self.bias is None:
            return self.product(x)
        (few, across), dtype = x.shape[2:], precision(x)
        if few != across or not multiplied(few, 2 * few, 3, dtype, x.device.type):
            return super().forward(x)
        weight = self.weight.to(dtype)
        if few > 1:
            return Halving.apply(x.to(dtype), weight, self.bias, 2, 1, 1)
        return through(x, laid(weight, few, 2 * few, 2, 1).t(), self.bias, 2 * few)


class Decoder(nn.Module):
    """g of SidAE Sec. 3.2: one fully connected layer, then five transposed convolutions that mirror the encoder.

    (B, D) -> (B, C, S, S), S a multiple of 32. Output padding 1, padding 1 and stride 2 give 2 in + k - 3, so exact
    doubling forces k = 3. Widths mirror ResNet-18 at 32 pixels (the paper gives none); the last layer is linear unless
    `output` says sigmoid or tanh.
    """

    def __init__(self, dim: int, *, width: int = 512, channels: int = 3, size: int = 32, output: str = "linear"):
        super().__init__()
        if size % 32 or width < 8:
            raise SidaeError(f"The decoder doubles its map five times and divides its channels by 8: size must be a "
                             f"multiple of 32 and decoder at least 8, not {size} and {width}.")  # fmt: skip
        self.start = (width, size // 32, size // 32)
        self.fc = nn.Linear(dim, math.prod(self.start))
        widths = [width, width // 2, width // 4, width // 8, width // 8]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [Doubling(a, b), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        layers.append(Doubling(widths[-1], channels, bias=True))
        layers.append({"linear": nn.Identity, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}[output]())
        self.up = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.up(self.fc(z).view(len(z), *self.start))


def projector(features: int, hidden: int, dim: int, affine: bool = False) -> nn.Sequential:
    """SimSiam's three-layer projection MLP (arXiv:2011.10566): (B, features) -> (B, dim), no ReLU after the last."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, dim, bias=False), nn.BatchNorm1d(dim, affine=affine),
    )  # fmt: skip


def predictor(dim: int, hidden: int, out: int = 0) -> nn.Sequential:
    """SimSiam's two-layer prediction MLP h, a bottleneck: (B, dim) -> (B, dim), or (B, out) as BYOL's projector."""
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out or dim)
    )


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm that, while training, normalises `splits` interleaved parts of the batch apart, as if each were on a GPU
    of its own (MoCo's CIFAR demo); the running statistics move by the parts' mean. The parts are equally large."""

    def __init__(self, channels: int, splits: int) -> None:
        super().__init__(channels)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        (N, C, H, W), s = x.shape, self.splits
        mean, var, weight, bias = (v.repeat(s) for v in (self.running_mean, self.running_var, self.weight, self.bias))
        y = F.batch_norm(x.reshape(N // s, s * C, H, W), mean, var, weight, bias, True, self.momentum, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(mean.view(s, C).mean(0))
            self.running_var.copy_(var.view(s, C).mean(0))
        return y.view(N, C, H, W)


def split_batchnorm(net: nn.Module, splits: int) -> None:
    """Replaces every BatchNorm2d of a network that is not trained yet; names and values of the weights stay."""
    for name, child in net.named_children():
        if isinstance(child, nn.BatchNorm2d):
            split = SplitBatchNorm(child.num_features, splits)
            split.load_state_dict(child.state_dict())  # `zero_init`
            setattr(net, name, split)
        else:
            split_batchnorm(child, splits)


def backbone(config: RunConfig) -> nn.Module:
    """The backbone a config names, with `out_features`."""
    c = config
    if c.backbone == "small_cnn":
        if c.size < 2:
            raise SidaeError(f"small_cnn fits images of 2 pixels or more, not {c.size}; set a larger size.")
        return SmallCNN(size=c.size, channels=c.channels, sigmoid=c.embed == "sigmoid")
    if c.backbone == "amdim":
        if c.size != 32:
            raise SidaeError(f"AMDIM's encoder pads nothing and fits images of 32 pixels alone, not {c.size}; set size to 32.")
        return AMDIMEncoder(width=c.width, channels=c.channels, depth=c.depth)
    blocks = (3, 4, 6, 3) if c.backbone.endswith("34") else (2, 2, 2, 2)
    if c.backbone.startswith("patches"):  # 16 channels a group, or all
        group = 16 if c.norm == "group" else 2**30
        return Patches(ResNet(stem="cifar", width=c.width, channels=c.channels, blocks=blocks,
                              norm=lambda n: nn.GroupNorm(max(1, n // group), n)))  # fmt: skip
    return ResNet(stem=c.stem, width=c.width, channels=c.channels, blocks=blocks, zero_init=c.zero_init)


def load(path: str | Path) -> nn.Module:
    """A saved backbone in eval mode, from a `backbone-eNNN.safetensors` of the store; nothing is unpickled.

    The module carries `config` (RunConfig), `mean` and `std` (per channel, of pixels in [0, 1]: feed it
    (pixels - mean) / std), `classifier`, the supervised method's (weight, bias) or None, and `head`, the projector's
    state dict (empty where there is none).
    Raises SidaeError when the file is missing, damaged or not one of ours.
    """
    try:
        with safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {})["sidae"])
            weights = {k: f.get_tensor(k) for k in f.keys()}
        config = RunConfig.from_dict(meta["config"])
        with torch.device("meta"):  # so that memory is bounded by the file, whatever width it claims
            net = backbone(config)
        fc = [weights.pop(k) for k in ("fc.weight", "fc.bias") if k in weights]
        head = {k.removeprefix("projector."): weights.pop(k) for k in list(weights) if k.startswith("projector.")}
        net.load_state_dict(weights, assign=True)
        net.config, net.mean, net.std = config, meta["mean"], meta["std"]
    except FileNotFoundError:
        raise SidaeError(f"There is no file {path}; a backbone is named backbone-eNNN.safetensors.") from None
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OSError) as e:
        raise SidaeError(f"{path} is not a backbone of this project ({type(e).__name__}); nothing was loaded.") from e
    net.classifier, net.head = tuple(fc) or None, head
    return net.float().eval()


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; a GPU's comes while this thread goes on, out of memory that is not used again before it is there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def wide(*features: Tensor) -> list[Tensor]:
    """Features in one type: float64 where some are that, else float32. Halves and integers have too few digits."""
    kind = reduce(torch.promote_types, (x.dtype for x in features), torch.float32)
    return [x.to(kind) for x in features]


@contextmanager
def full_float32() -> Iterator[None]:
    """Within, neither a GPU's convolutions nor its matrix products take TF32."""
    if not torch.cuda.is_initialized():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@full_float32()
def features(net: Callable[[Tensor], Tensor], images: Tensor, *, stats: tuple, device: torch.device, batch: int | None = None
             ) -> Tensor:  # fmt: skip
    """uint8 (N, C, S, S) -> (N, F) float32 on the device, the network in the mode it is in; stats: (mean, std).
    batch: images at a time, 250 on a CPU and 1,000 elsewhere unless given."""
    mean, std = (torch.tensor(s, device=device).view(-1, 1, 1) for s in stats)
    chunks = (sent(c, device) for c in images.split(batch or (250 if device.type == "cpu" else 1000)))
    return torch.cat([net(((c / 255 - mean) / std).contiguous(memory_format=torch.channels_last)) for c in chunks])


@torch.no_grad()
def z_std(total: Tensor, square: Tensor, n: int | Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of a normalised projection: 1/sqrt(D) healthy, 0 collapsed.

    total, square: (D,) sums of z/|z| and of its square over n samples (float64). Source: SimSiam Fig. 2.
    """
    return (square / n - (total / n).square()).clamp(min=0).sqrt().mean()


@torch.no_grad()
def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the shares of variance along the principal axes of x (B, D): 1 = a line, min(B - 1, D) = all
    directions alike, 0 = a single point. Source: Roy & Vetterli, EUSIPCO 2007, with eigenvalues for singular values."""
    x = x.double()
    centred = x - x.mean(0)
    if centred.square().sum() <= 1e-10 * x.square().sum():  # rounding
        return centred.new_zeros(())
    share = torch.linalg.eigvalsh(centred @ centred.T if len(x) < x.shape[1] else centred.T @ centred).clamp(min=0)
    return torch.special.entr(share / share.sum()).sum().exp()
