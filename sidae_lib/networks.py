"""Backbones, heads and the decoder, and the weights they are saved to."""

import json
import math
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from .config import RunConfig, SidaeError


class ResNet(nn.Module):
    """ResNet-18 (arXiv:1512.03385), parameter names as torchvision's, so that width 64 with the ImageNet
    stem loads into `torchvision.models.resnet18(strict=False)`; narrower ones scale every stage.

    (B, C, S, S) -> (B, 8 width), the mean over the last map. At S = 32 that map is 1x1 with the ImageNet stem and 4x4
    with the CIFAR stem (3x3 stride 1, no pooling).
    """

    def __init__(self, *, stem: str = "imagenet", width: int = 64, channels: int = 3) -> None:
        super().__init__()
        cifar = stem == "cifar"
        self.conv1 = nn.Conv2d(channels, width, 3 if cifar else 7, 1 if cifar else 2, 1 if cifar else 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2, self.layer3, self.layer4 = (self._stage(k * width, 2 * k * width) for k in (1, 2, 4))
        self.out_features = 8 * width
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(c_in: int, c_out: int) -> nn.Sequential:
        down = nn.Sequential(conv1x1(c_in, c_out, 2), nn.BatchNorm2d(c_out))
        return nn.Sequential(BasicBlock(c_in, c_out, 2, down), BasicBlock(c_out, c_out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


class SmallCNN(nn.Sequential):
    """The student report's network, its Table 1: five 2x2 convolutions, 181,248 parameters on 1 x 28 x 28 and 181,504
    on 3 x 32 x 32. (B, C, S, S) -> (B, 32) for S in {28, 32}, each value in (0, 1) unless sigmoid is left out."""

    def __init__(self, *, size: int = 32, channels: int = 3, sigmoid: bool = True) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 2, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for c in (32, 64, 128):
            layers += [nn.Conv2d(c, 2 * c, 2, 2, 1, bias=False), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(256, 8, 2, bias=False), nn.Sigmoid() if sigmoid else nn.Identity(), nn.Flatten())
        for _ in range(4):
            size = size // 2 + 1
        self.out_features = 8 * (size - 1) ** 2


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
            layers += [nn.ConvTranspose2d(a, b, 3, 2, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        layers.append(nn.ConvTranspose2d(widths[-1], channels, 3, 2, 1, 1))
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


def predictor(dim: int, hidden: int) -> nn.Sequential:
    """SimSiam's two-layer prediction MLP h, a bottleneck: (B, dim) -> (B, dim)."""
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
    )


def backbone(config: RunConfig) -> nn.Module:
    """The backbone a config names, with `out_features`."""
    if config.backbone == "small_cnn":
        return SmallCNN(size=config.size, channels=config.channels, sigmoid=config.embed == "sigmoid")
    return ResNet(stem=config.stem, width=config.width, channels=config.channels)


def load(path: str | Path) -> nn.Module:
    """A saved backbone in eval mode, from a `backbone-eNNN.safetensors` of the store; nothing is unpickled.

    The module carries `config` (RunConfig), `mean` and `std` (per channel, of pixels in [0, 1]: feed it
    (pixels - mean) / std) and `classifier`, the supervised method's (weight, bias) or None.
    Raises SidaeError when the file is missing, damaged or not one of ours.
    """
    try:
        with safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {})["sidae"])
            weights = {k: f.get_tensor(k) for k in f.keys()}
        config = RunConfig.from_dict(meta["config"])
        net = backbone(config)
        fc = [weights.pop(k) for k in ("fc.weight", "fc.bias") if k in weights]
        net.load_state_dict(weights)
        net.config, net.mean, net.std = config, meta["mean"], meta["std"]
    except FileNotFoundError:
        raise SidaeError(f"There is no file {path}; a backbone is named backbone-eNNN.safetensors.") from None
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OSError) as e:
        raise SidaeError(f"{path} is not a backbone of this project ({type(e).__name__}); nothing was loaded.") from e
    net.classifier = tuple(fc) or None
    return net.eval()


@torch.no_grad()
def z_std(total: Tensor, square: Tensor, n: int | Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of a normalised projection: 1/sqrt(D) healthy, 0 collapsed.

    total, square: (D,) sums of z/|z| and of its square over n samples (float64). Source: SimSiam Fig. 2.
    """
    return (square / n - (total / n).square()).clamp(min=0).sqrt().mean()
