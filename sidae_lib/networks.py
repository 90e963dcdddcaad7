"""Backbones, heads and the decoder; a saved backbone, its features, and two gauges of them."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from .config import RunConfig, SidaeError
from .small_maps import Conv, Doubling

# --- backbones: (B, C, S, S) -> (B, out_features); `maps` gives the last maps, of `widths` channels ---


class ResNet(nn.Module):
    """ResNet-18 (arXiv:1512.03385), of other `blocks` ResNet-34; the output is the mean over the last map.

    Names and initial weights are torchvision's: width 64 with the ImageNet stem loads into its resnet18 (with
    strict=False); other widths scale every stage. At S = 32 the last map is 1x1, or 4x4 with the CIFAR stem
    (3x3, stride 1, no pooling). zero_init: a block starts as its shortcut (arXiv:1706.02677, Sec. 5.1).
    """

    def __init__(self, *, stem: str = "imagenet", width: int = 64, channels: int = 3,
                 blocks: tuple[int, ...] = (2, 2, 2, 2), norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
                 zero_init: bool = False) -> None:
        super().__init__()
        w, cifar = width, stem == "cifar"
        kernel, stride, padding = (3, 1, 1) if cifar else (7, 2, 3)
        self.conv1 = nn.Conv2d(channels, w, kernel, stride, padding, bias=False)
        self.bn1 = norm(w)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)

        def stage(c_in: int, c_out: int, n: int) -> nn.Sequential:
            stride = 1 if c_in == c_out else 2
            down = None if c_in == c_out else nn.Sequential(conv1x1(c_in, c_out, 2), norm(c_out))
            first = BasicBlock(c_in, c_out, stride, down, norm_layer=norm)
            return nn.Sequential(first, *(BasicBlock(c_out, c_out, norm_layer=norm) for _ in range(n - 1)))

        self.layer1, self.layer2 = stage(w, w, blocks[0]), stage(w, 2 * w, blocks[1])
        self.layer3, self.layer4 = stage(2 * w, 4 * w, blocks[2]), stage(4 * w, 8 * w, blocks[3])
        self.out_features, self.widths = 8 * w, (8 * w, 4 * w, 2 * w)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                m.__class__ = Conv  # BasicBlock builds nn.Conv2d; building anew would draw its weights anew
            elif zero_init and isinstance(m, BasicBlock):
                nn.init.zeros_(m.bn2.weight)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The maps of the last three stages, (B, widths[k], s, s), the last first."""
        early = self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x))))))
        middle = self.layer3(early)
        return [self.layer4(middle), middle, early]

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)[0].mean((2, 3))


class SmallCNN(nn.Sequential):
    """The student report's network, its Table 1: five 2x2 convolutions, 181,248 parameters on 1 x 28 x 28. 32
    features at S = 28 and 32, each in (0, 1) unless the sigmoid is left out."""

    def __init__(self, *, size: int = 32, channels: int = 3, sigmoid: bool = True) -> None:
        rectify = partial(nn.LeakyReLU, 0.2, inplace=True)  # in place: a tenth of the time of large batches
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 2, 2, 1, bias=False), rectify()]
        for c in (32, 64, 128):
            layers += [nn.Conv2d(c, 2 * c, 2, 2, 1, bias=False), nn.BatchNorm2d(2 * c), rectify()]
        last = nn.Sigmoid() if sigmoid else nn.Identity()
        super().__init__(*layers, nn.Conv2d(256, 8, 2, bias=False), last, nn.Flatten())
        for _ in range(4):
            size = size // 2 + 1
        self.out_features = 8 * (size - 1) ** 2


class AMDIMUnit(nn.Module):
    """AMDIM's residual unit: a k x k convolution without padding, ReLU, a 1x1 convolution that starts at 0,
    beside average pooling with channels of zeros appended; no ReLU after the sum."""

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
    """AMDIM's encoder for 32 pixels (arXiv:1906.00910 and its code). No padding, and BatchNorm at the end
    alone, so that a place of a map sees its own pixels alone. depth: units a block, all but the first 1x1.
    The code has width 128 and depth 3; on CIFAR-10 it ran 320 and 10."""

    def __init__(self, *, width: int = 128, channels: int = 3, depth: int = 3) -> None:
        super().__init__()
        w, unit = width, AMDIMUnit

        def block(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
            return [unit(c_in, c_out, kernel, stride), *(unit(c_out, c_out) for _ in range(depth - 1))]

        start = [nn.Conv2d(channels, w, 3), nn.ReLU(inplace=True), unit(w, w)]  # 30x30
        self.to7 = nn.Sequential(*start, *block(w, 2 * w, 4, 2), *block(2 * w, 4 * w, 2, 2))  # 14x14, 7x7
        self.to5 = nn.Sequential(*block(4 * w, 4 * w, 3))
        last = *block(4 * w, 4 * w, 3), unit(4 * w, 8 * w, 3)  # 3x3, 1x1
        self.to1 = nn.Sequential(*last, nn.BatchNorm2d(8 * w))
        self.out_features, self.widths = 8 * w, (8 * w, 4 * w, 4 * w)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The maps of 1x1, 5x5 and 7x7 places, (B, widths[k], s, s)."""
        seven = self.to7(x)
        five = self.to5(seven)
        return [self.to1(five), five, seven]

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)[0].flatten(1)


class Patches(nn.Module):
    """CPC v2's view of an image (arXiv:1905.09272): patches of 8 x 8 pixels, 4 apart, each through `net`
    alone. They make one map of G x G places, G = S / 4 - 1; the output is its mean."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.out_features, self.widths = net, net.out_features, (net.out_features,)

    def maps(self, x: Tensor) -> list[Tensor]:
        """One map, (B, out_features, G, G)."""
        p = x.unfold(2, 8, 4).unfold(3, 8, 4).permute(0, 2, 3, 1, 4, 5)  # (B, G, G, C, 8, 8)
        v = self.net(p.flatten(0, 2).contiguous(memory_format=torch.channels_last))  # (B G G, F)
        return [v.view(*p.shape[:3], -1).permute(0, 3, 1, 2)]

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)[0].mean((2, 3))


def backbone(config: RunConfig) -> nn.Module:
    """The backbone a config names."""
    c = config
    if c.backbone == "small_cnn":
        if c.size < 2:
            raise SidaeError(f"small_cnn fits images of 2 pixels or more, not {c.size}; set a larger size.")
        return SmallCNN(size=c.size, channels=c.channels, sigmoid=c.embed == "sigmoid")
    if c.backbone == "amdim":
        if c.size != 32:
            raise SidaeError("AMDIM's encoder pads nothing and fits images of 32 pixels alone, "
                             f"not {c.size}; set size to 32.")
        return AMDIMEncoder(width=c.width, channels=c.channels, depth=c.depth)
    blocks = (3, 4, 6, 3) if c.backbone.endswith("34") else (2, 2, 2, 2)
    resnet = partial(ResNet, width=c.width, channels=c.channels, blocks=blocks)
    if c.backbone.startswith("patches"):
        group = 16 if c.norm == "group" else 2**30  # channels a group: 16, or all
        return Patches(resnet(stem="cifar", norm=lambda n: nn.GroupNorm(max(1, n // group), n)))
    return resnet(stem=c.stem, zero_init=c.zero_init)


# --- heads ---


def projector(features: int, hidden: int, dim: int, affine: bool = False) -> nn.Sequential:
    """SimSiam's three-layer projection MLP (arXiv:2011.10566), (B, features) -> (B, dim). No last ReLU."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, dim, bias=False), nn.BatchNorm1d(dim, affine=affine),
    )


def predictor(dim: int, hidden: int, out: int = 0) -> nn.Sequential:
    """SimSiam's two-layer MLP h, a bottleneck, (B, dim) -> (B, dim); or (B, out), as BYOL's projector."""
    first = nn.Linear(dim, hidden, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out or dim))


class Decoder(nn.Module):
    """g of SidAE Sec. 3.2, (B, D) -> (B, C, S, S): a fully connected layer, then five transposed convolutions
    that mirror the encoder. The paper gives no widths, these are ResNet-18's; and stride 2, padding 1, output
    padding 1, which give 2 in + k - 3 places, so exact doubling needs k = 3."""

    def __init__(self, dim: int, *, width: int = 512, channels: int = 3, size: int = 32,
                 output: str = "linear") -> None:
        super().__init__()
        if size % 32 or width < 8:
            raise SidaeError("The decoder doubles its map five times and divides its channels by 8: "
                             f"size must be a multiple of 32 and decoder at least 8, not {size} and {width}.")
        self.start = (width, size // 32, size // 32)
        self.fc = nn.Linear(dim, math.prod(self.start))
        layers: list[nn.Module] = []
        for a, b in pairwise([width, width // 2, width // 4, width // 8, width // 8]):
            layers += [Doubling(a, b), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        last = {"linear": nn.Identity, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}[output]()
        self.up = nn.Sequential(*layers, Doubling(width // 8, channels, bias=True), last)

    def forward(self, z: Tensor) -> Tensor:
        return self.up(self.fc(z).view(len(z), *self.start))


# --- saved backbones, their features and gauges ---


def load(path: str | Path) -> nn.Module:
    """A saved backbone in eval mode, from a `backbone-eNNN.safetensors` of the store; nothing is unpickled.
    The module carries `config`, `mean` and `std` (per channel, of pixels in [0, 1]: feed it (pixels - mean) /
    std), `classifier`, the supervised method's (weight, bias) or None, and `head`, the projector's state dict
    or {}. Raises SidaeError for a file that is missing, damaged or none of ours."""
    try:
        with safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {})["sidae"])
            weights = {k: f.get_tensor(k) for k in f.keys()}
        config = RunConfig.from_dict(meta["config"])
        with torch.device("meta"):  # so that memory is bounded by the file, whatever width it claims
            net = backbone(config)
        fc = tuple(weights.pop(k) for k in ("fc.weight", "fc.bias") if k in weights)
        head = {k: weights.pop(k) for k in [*weights] if k.startswith("projector.")}
        net.load_state_dict(weights, assign=True)
        net.config, net.mean, net.std = config, meta["mean"], meta["std"]
    except FileNotFoundError:
        raise SidaeError(f"There is no file {path}; a backbone is named backbone-eNNN.safetensors.") from None
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OSError) as e:
        raise SidaeError(f"{path} is not a backbone of this project ({type(e).__name__}); "
                         "nothing was loaded.") from e
    net.classifier, net.head = fc or None, {k.removeprefix("projector."): v for k, v in head.items()}
    return net.float().eval()


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. To a GPU it is copied from pinned memory while this thread goes on."""
    if device.type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def wide(*features: Tensor) -> list[Tensor]:
    """Features in one type, float64 where one of them is, else float32: fewer digits are too few."""
    kind = reduce(torch.promote_types, (x.dtype for x in features), torch.float32)
    return [x.to(kind) for x in features]


@contextmanager
def full_float32() -> Iterator[None]:
    """Within, neither a GPU's convolutions nor its matrix products take TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@full_float32()
def features(net: Callable[[Tensor], Tensor], images: Tensor, *, stats: tuple, device: torch.device,
             batch: int | None = None) -> Tensor:
    """uint8 (N, C, S, S) -> (N, F) float32 on the device, the network in the mode it is in. stats: (mean,
    std). batch: images at a time, unless given 250 on a CPU and 1,000 elsewhere."""
    mean, std = (torch.tensor(s, device=device).view(-1, 1, 1) for s in stats)
    batch = batch or (250 if device.type == "cpu" else 1000)
    views = ((sent(pixels, device) / 255 - mean) / std for pixels in images.split(batch))
    return torch.cat([net(v.contiguous(memory_format=torch.channels_last)) for v in views])


@torch.no_grad()
def z_std(total: Tensor, square: Tensor, n: int | Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of `z/|z|`, SimSiam's Fig. 2: 1/sqrt(D) = healthy, 0 =
    collapsed. total, square: (D,) float64 sums of `z/|z|` and of its square over n samples."""
    return (square / n - (total / n).square()).clamp(min=0).sqrt().mean()


@torch.no_grad()
def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the shares of variance along the principal axes of x (B, D): 0 = a point,
    1 = a line, min(B - 1, D) = all directions alike. Roy & Vetterli, EUSIPCO 2007, of eigenvalues."""
    x = x.double()
    centred = x - x.mean(0)
    if centred.square().sum() <= 1e-10 * x.square().sum():  # rounding
        return centred.new_zeros(())
    gram = centred @ centred.T if len(x) < x.shape[1] else centred.T @ centred
    share = torch.linalg.eigvalsh(gram).clamp(min=0)
    return torch.special.entr(share / share.sum()).sum().exp()
