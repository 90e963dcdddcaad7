"""Networks: parameter counts of the papers, shapes, torchvision's own resnet18, and what a file on disk may do."""

import itertools
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pytest import approx
from safetensors.torch import save_file
from torch import nn

from sidae_lib import methods, networks, small_maps
from sidae_lib.config import RunConfig, SidaeError
from sidae_lib.methods.contrastive import SplitBatchNorm
from sidae_lib.networks import Decoder, ResNet, SmallCNN, predictor, projector, z_std
from sidae_lib.small_maps import Conv, Doubling


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def count(net):
    return sum(p.numel() for p in net.parameters())


def map_of(net, layer, x):
    shapes = []
    layer.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape[1:])))
    net.eval()(x)
    return shapes[0]


def test_resnet18_has_torchvisions_parameters():
    with torch.device("meta"):
        assert count(ResNet()) == 11_176_512 == count(torchvision.models.resnet18()) - 513 * 1000
        assert count(ResNet(stem="cifar")) == 11_176_512 - 64 * 3 * (7 * 7 - 3 * 3)
        assert count(ResNet(channels=1)) == 11_176_512 - 64 * 2 * 7 * 7


@pytest.mark.parametrize("width", [4, 16])
def test_narrow_widths_scale_every_stage(width):
    with torch.device("meta"):
        narrow, wide = ResNet(width=width).state_dict(), ResNet().state_dict()
    assert narrow.keys() == wide.keys()
    for k, v in narrow.items():
        scaled = [n if k == "conv1.weight" and d or d > 1 else n * width // 64 for d, n in enumerate(wide[k].shape)]
        assert list(v.shape) == scaled, k
    net = ResNet(width=width)
    assert net(noise(2, 3, 32, 32)).shape == (2, net.out_features) == (2, 8 * width)


def test_last_map_is_1x1_with_the_imagenet_stem_and_4x4_with_the_cifar_stem():
    for stem, side in (("imagenet", 1), ("cifar", 4)):
        net = ResNet(stem=stem, width=8)
        assert map_of(net, net.layer4, noise(1, 3, 32, 32)) == (64, side, side)


@pytest.mark.parametrize(("channels", "size", "parameters"), [(1, 28, 181_248), (3, 32, 181_504)])
def test_small_cnn_is_the_reports_table_1(channels, size, parameters):
    net = SmallCNN(size=size, channels=channels)
    assert count(net) == parameters and net.out_features == 32
    out = net(noise(2, channels, size, size))
    assert out.shape == (2, 32) and ((out > 0) & (out < 1)).all()
    sides = [map_of(net, m, noise(1, channels, size, size))[1] for m in net if isinstance(m, nn.Conv2d)]
    assert sides == [size // 2 + 1, {28: 8, 32: 9}[size], 5, 3, 2]


@pytest.mark.parametrize("size", [8, 16, 31, 64])
def test_small_cnn_knows_its_width_at_any_size(size):
    net = SmallCNN(size=size)
    assert net(noise(2, 3, size, size)).shape == (2, net.out_features)


def test_decoder_counts_and_doubling():
    net = Decoder(2048)
    assert count(net.fc) == 1_049_088
    up = [m for m in net.up if isinstance(m, nn.ConvTranspose2d)]
    assert sum(m.weight.numel() for m in up) == 1_586_880
    assert [(m.in_channels, m.out_channels) for m in up] == [(512, 256), (256, 128), (128, 64), (64, 64), (64, 3)]
    assert [m.bias is not None for m in up] == [False] * 4 + [True]  # BatchNorm after the first four
    assert [map_of(net, m, noise(1, 2048))[1] for m in up] == [2, 4, 8, 16, 32]
    assert Decoder(8, width=8, channels=1, size=64)(noise(2, 8)).shape == (2, 1, 64, 64)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_doubling_is_the_transposed_convolution(side):
    net = Doubling(6, 5).double().to(memory_format=torch.channels_last)
    x = noise(4, 6, side, side).double().requires_grad_()
    slow = torch.zeros(4, 5, 2 * side, 2 * side, dtype=torch.double)
    for i, j, k, n in itertools.product(range(side), range(side), range(3), range(3)):  # tap (k, n) of place (i, j)
        if 0 <= (row := 2 * i - 1 + k) < 2 * side and 0 <= (column := 2 * j - 1 + n) < 2 * side:
            slow[:, :, row, column] += x[:, :, i, j] @ net.weight[:, :, k, n]
    weights = noise(4, 5, 2 * side, 2 * side).double()
    expected = torch.autograd.grad((slow * weights).sum(), [x, net.weight])
    for out in (net(x), net.product(x)) if side == 1 else (net(x),):
        assert torch.allclose(out, slow, atol=1e-12) and out.is_contiguous(memory_format=torch.channels_last)
        for ours, theirs in zip(torch.autograd.grad((out * weights).sum(), [x, net.weight]), expected):
            assert torch.allclose(ours, theirs, atol=1e-12)


def test_decoder_output():
    z = 50 * noise(64, 8)
    linear, sigmoid, tanh = (Decoder(8, width=16, output=o) for o in ("linear", "sigmoid", "tanh"))
    sigmoid.load_state_dict(linear.state_dict()), tanh.load_state_dict(linear.state_dict())
    x = linear(z)
    assert torch.equal(sigmoid(z), x.sigmoid()) and torch.equal(tanh(z), x.tanh()) and x.min() < -0.5


@pytest.mark.parametrize(("size", "width"), [(28, 512), (16, 512), (32, 7)])
def test_decoder_that_cannot_reach_the_size(size, width):
    with pytest.raises(SidaeError, match=f"^The decoder .* multiple of 32 .* {size} and {width}\\.$"):
        Decoder(64, size=size, width=width)


def test_small_cnn_needs_two_pixels():
    config = RunConfig(method="supervised", data="", backbone="small_cnn", size=1)
    with pytest.raises(SidaeError, match="^small_cnn fits images of 2 pixels or more, not 1; "):
        networks.backbone(config)
    assert networks.backbone(config.replace(size=2))(torch.zeros(2, 3, 2, 2)).shape == (2, 8)


def test_projector_and_predictor():
    F, H, D, K = 512, 2048, 1024, 256
    with torch.device("meta"):
        assert count(projector(F, H, D)) == F * H + H * H + H * D + 4 * H  # no bias, no scale in the last BatchNorm
        assert count(projector(F, H, D, affine=True)) == count(projector(F, H, D)) + 2 * D
        assert count(predictor(D, K)) == D * K + 2 * K + K * D + D
    z = projector(16, 32, 64)(noise(128, 16))
    assert z.mean(0).abs().max() < 1e-5 and (z.std(0, correction=0) - 1).abs().max() < 1e-2  # no ReLU after the last
    p = predictor(64, 8)(z)
    assert p.shape == (128, 64) and torch.linalg.matrix_rank(p - p.mean(0), tol=1e-3) <= 8  # a bottleneck


def test_weights_load_into_torchvision():
    ours, theirs = ResNet(), torchvision.models.resnet18()
    ours(noise(8, 3, 32, 32))  # moves the running statistics
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    theirs.fc = nn.Identity()
    ours.eval(), theirs.eval()
    x = noise(4, 3, 32, 32)
    for size in (32, 64):
        x = noise(4, 3, size, size)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)  # sums are taken in another order


def same(ours, theirs, x, g):
    """Both functions and every gradient of theirs, to rounding in float64; returns our gradient of the weight."""
    tensors = [[x, *m.parameters()] for m in (ours, theirs)]
    (a, *da), (b, *db) = ([y := m(x), *torch.autograd.grad(y, t, g)] for m, t in zip((ours, theirs), tensors))
    assert a.shape == b.shape and all((p - q).abs().max() <= 1e-12 for p, q in zip((a, *da), (b, *db), strict=True))
    return a, da[1]


@pytest.fixture
def everywhere(monkeypatch):
    """Products on every map, not only where they pay."""
    monkeypatch.setattr(small_maps, "multiplied", lambda *_: True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_convolution_as_a_product_is_torchs_own(size, kernel, stride, bias, everywhere):
    theirs = nn.Conv2d(7, 9, kernel, stride, kernel // 2, bias=bias).double()
    ours = Conv(7, 9, kernel, stride, kernel // 2, bias=bias).double()
    ours.load_state_dict(theirs.state_dict())
    few = (size - 1) // stride + 1
    for layout in (torch.contiguous_format, torch.channels_last):
        x = noise(5, 7, size, size).double().contiguous(memory_format=layout).requires_grad_()
        y, grad = same(ours, theirs, x, noise(5, 9, few, few, seed=1).double())
        assert y.is_contiguous(memory_format=torch.channels_last if size <= kernel or kernel == 1 else layout)
    places = range(0, stride * few, stride)  # of the kernel's centre
    met = [any(0 <= n + t - kernel // 2 < size for n in places) for t in range(kernel)]
    for (i, row), (j, column) in itertools.product(enumerate(met), repeat=2):
        assert bool((grad[:, :, i, j] != 0).all() if row and column else (grad[:, :, i, j] == 0).all()) is True


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_doubling_as_a_product_is_torchs_own(size, bias, everywhere):
    theirs = nn.ConvTranspose2d(7, 9, 3, 2, 1, 1, bias=bias).double()
    ours = Doubling(7, 9, bias).double()
    ours.load_state_dict(theirs.state_dict())
    x, g = noise(5, 7, size, size).double().requires_grad_(), noise(5, 9, 2 * size, 2 * size, seed=1).double()
    grad = same(ours, theirs, x, g)[1]
    assert (grad[:, :, 0] == 0).all() == (grad[..., 0] == 0).all() == (size == 1)  # taps that end above and beside the map
    assert (grad[:, :, 1:, 1:] != 0).all()


def test_where_convolutions_are_products():
    """A function of map, kernel, precision and device type, which a resumed run asks again: on a CPU alone, few at most 2, in
    bfloat16 also from 8 to 4."""
    bf16, asked = torch.bfloat16, list(itertools.product(range(1, 9), (1, 3, 7)))
    assert not any(small_maps.multiplied(few, 2 * few, k, t, d) for few, k in asked for t in (torch.float32, bf16)
                   for d in ("cuda", "meta", "mps"))
    assert all(small_maps.multiplied(few, 2 * few, k, bf16, "cpu") == (few <= 4) for few, k in asked)
    for (few, wide), t in itertools.product(((1, 1), (2, 2), (1, 2), (2, 3)), (torch.float32, bf16)):
        assert small_maps.multiplied(few, wide, 3, t, "cpu") and few**2 * wide**2 <= 9 * few**2  # no more entries than taps
    assert not small_maps.multiplied(2, 4, 3, torch.float32, "cpu") and small_maps.multiplied(2, 4, 1, torch.float32, "cpu")
    assert not small_maps.multiplied(4, 8, 1, torch.float32, "cpu")
    assert not any(small_maps.multiplied(few, few, 3, t, "cpu") for few in (3, 4, 8) for t in (torch.float32, bf16))


HALVING = [lambda: Conv(24, 40, 1, 2, bias=False), lambda: Conv(24, 40, 3, 2, 1, bias=False),
           lambda: Conv(24, 40, 3, 2, 1), lambda: Doubling(24, 40), lambda: Doubling(24, 40, True)]


@pytest.mark.parametrize(("make", "size", "compiled"), [
    *((make, size, False) for make in HALVING for size in (2, 4, 8)),
    pytest.param(HALVING[1], 4, True, marks=pytest.mark.slow)])
def test_in_bfloat16_small_maps_round_as_torchs_own(make, size, compiled, monkeypatch):
    """Outputs and gradients of both lie equally far from float32's, and none leaves channels_last, which would be a copy; the
    weight's gradient is that of both views."""
    channels_last = {"memory_format": torch.channels_last}
    layer = make().to(**channels_last)
    views = [noise(64, 24, size, size, seed=n).contiguous(**channels_last).requires_grad_() for n in (0, 1)]
    few = 2 * size if isinstance(layer, Doubling) else size // 2
    g = noise(64, 40, few, few, seed=2).contiguous(**channels_last)

    def out(bf16, own):
        with monkeypatch.context() as m, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if not own:
                m.setattr(small_maps, "multiplied", lambda *_: False)
            run = torch.compile(layer.forward, fullgraph=True, dynamic=False) if own and compiled else layer
            ys = [run(x) for x in views]
        return [*ys, *torch.autograd.grad(ys, [*views, *layer.parameters()], [g.to(y.dtype) for y in ys])]

    for exact, theirs, ours in zip(out(False, False), out(True, False), out(True, True), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        error, bound = (ours - exact).norm() / exact.norm(), (theirs - exact).norm() / exact.norm()
        assert error <= 1.1 * bound and bound < 0.01
        assert ours.ndim < 4 or ours.is_contiguous(**channels_last)


@pytest.mark.parametrize(("bf16", "products"), [(False, 10), (True, 15)])
def test_the_papers_networks_on_small_maps(bf16, products, monkeypatch):
    """The last two stages and the decoder's first layers, in bfloat16 from 8 to 4 too, which compute in it as torch's own."""
    seen, rule = [], small_maps.multiplied
    monkeypatch.setattr(small_maps, "multiplied", lambda *asked: seen.append(rule(*asked)) or seen[-1])
    net = nn.Sequential(ResNet(width=8), nn.Linear(64, 16), Decoder(16, width=64)).to(memory_format=torch.channels_last)
    types = []
    for m in net.modules():
        if isinstance(m, (Conv, Doubling)):
            m.register_forward_hook(lambda m, args, out: types.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        net(noise(4, 3, 32, 32))
    assert sum(seen) == products and len(seen) == 25 and set(types) == {torch.bfloat16 if bf16 else torch.float32}


def test_maps_that_are_not_square_are_torchs_own():
    x, ours = noise(2, 3, 1, 2), Conv(3, 5, 3, 1, 1)
    assert torch.equal(ours(x), F.conv2d(x, ours.weight, ours.bias, 1, 1))
    ours = Doubling(3, 5)
    assert torch.equal(ours(x), F.conv_transpose2d(x, ours.weight, None, 2, 1, 1))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("zero_init", [False, True])
def test_initial_weights_are_those_of_torchvision_bit_for_bit(zero_init):
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=0, zero_init_residual=zero_init).state_dict()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    ours = ResNet(zero_init=zero_init)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(type(m) is Conv for m in ours.modules() if isinstance(m, nn.Conv2d))
    assert [k for k in theirs if "fc" not in k] == list(ours.state_dict())
    assert all(torch.equal(v, theirs[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_zero_init_is_one_weight_a_block_and_another_start_of_the_same_network(name):
    configs = [RunConfig(method="moco_v2", data="0", backbone=name, width=4, zero_init=z) for z in (False, True)]
    plain, zero = (torch.manual_seed(0) and networks.backbone(c) for c in configs)
    moved = [k for k, v in plain.state_dict().items() if not torch.equal(v, zero.state_dict()[k])]
    assert moved == [f"layer{n}.{k}.bn2.weight" for n in range(1, 5) for k in range(len(zero.get_submodule(f"layer{n}")))]
    assert not any(zero.get_parameter(k).any() for k in moved)
    x = noise(2, 4, 8, 8).relu()
    assert torch.equal(zero.layer1(x), x) and not torch.equal(plain.layer1(x), x)  # a block is its shortcut
    method = methods.build(configs[1])  # whose BatchNorm sees parts of the batch apart, and is a layer of its own
    assert not any(method.backbone.get_parameter(k).any() or method.keys[0].get_parameter(k).any() for k in moved)


CONFIGS = [
    RunConfig(method="sidae", data="0", width=8, dim=16, hidden=16, pred_hidden=4, decoder=8),
    RunConfig(method="simsiam", data="0", backbone="small_cnn", size=28, channels=1),
    RunConfig(method="sidae", data="0", width=8, stem="cifar"),
]


def saved(path: Path, config: RunConfig, net: nn.Module, **extra) -> Path:
    meta = {"config": config.to_dict(), "epoch": 3, "mean": [0.5] * config.channels, "std": [0.2] * config.channels}
    save_file(net.state_dict() | extra, path, {"sidae": json.dumps(meta)})
    return path


@pytest.mark.parametrize("config", CONFIGS, ids=["imagenet", "small_cnn", "cifar"])
def test_load_gives_back_the_backbone(config, tmp_path):
    net, x = networks.backbone(config), noise(4, config.channels, config.size, config.size)
    net(x)
    again = networks.load(saved(tmp_path / "backbone-e003.safetensors", config, net))
    assert not again.training and again.config == config and again.classifier is None
    assert again.mean == [0.5] * config.channels and again.std == [0.2] * config.channels
    assert torch.equal(again(x), net.eval()(x)) and again.state_dict().keys() == net.state_dict().keys()


def test_load_keeps_the_classifier_apart(tmp_path):
    fc, net = nn.Linear(64, 10), networks.backbone(CONFIGS[0])
    extra = {f"fc.{k}": v for k, v in fc.state_dict().items()}
    again = networks.load(str(saved(tmp_path / "x.safetensors", CONFIGS[0], net, **extra)))
    assert all(torch.equal(a, b) for a, b in zip(again.classifier, (fc.weight, fc.bias), strict=True))
    assert again.state_dict().keys() == net.state_dict().keys()


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def written(weights: dict, metadata: dict):
    """A safetensors file; metadata as JSON, unless it is text."""
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    return lambda path, bomb: save_file(weights, path, text)


META = {"config": CONFIGS[0].to_dict(), "mean": [0.5], "std": [0.2]}
WEIGHTS = networks.backbone(CONFIGS[0]).state_dict()
DAMAGED = {
    "pickle": lambda path, bomb: path.write_bytes(pickle.dumps({"state_dict": Bomb(bomb)})),
    "torch.save": lambda path, bomb: torch.save({"state_dict": Bomb(bomb)}, path),
    "truncated": lambda path, bomb: (written(WEIGHTS, {"sidae": META})(path, bomb), os.truncate(path, 5000)),
    "empty": lambda path, bomb: path.touch(),
    "directory": lambda path, bomb: path.mkdir(),
    "plain safetensors": written(WEIGHTS, {}),
    "metadata is no JSON": written(WEIGHTS, {"sidae": "{"}),
    "metadata is a list": written(WEIGHTS, {"sidae": [1]}),
    "no statistics": written(WEIGHTS, {"sidae": {"config": META["config"]}}),
    "unknown field": written(WEIGHTS, {"sidae": META | {"config": {"method": "x", "data": "", "y": 1}}}),
    "a weight is missing": written({k: v for k, v in WEIGHTS.items() if k != "bn1.bias"}, {"sidae": META}),
    "other widths": written(ResNet(width=4).state_dict(), {"sidae": META}),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_is_no_backbone_is_one_sentence_and_nothing_is_unpickled(kind, tmp_path):
    path, bomb = tmp_path / "backbone-e003.safetensors", tmp_path / "exploded"
    DAMAGED[kind](path, bomb)
    with pytest.raises(SidaeError) as error:
        networks.load(path)
    assert "\n" not in str(error.value) and str(error.value).endswith(".") and not bomb.exists()


def test_the_bomb_is_live(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SidaeError, match=r"^There is no file .*backbone-e007\.safetensors; .*\.$"):
        networks.load(tmp_path / "backbone-e007.safetensors")


def spread(z):
    zn = nn.functional.normalize(z.double(), dim=1)
    return z_std(zn.sum(0), zn.square().sum(0), len(z)).item()


def test_z_std():
    for D in (8, 64, 512):
        assert spread(noise(20_000, D)) == approx(D**-0.5, rel=0.02)  # isotropic: healthy
    assert spread(noise(1, 32).expand(500, 32)) == approx(0, abs=1e-6)  # one point: collapsed
    line = noise(1, 32)
    assert spread(noise(500, 1) @ line) == approx((line.abs().mean() / line.norm()).item(), rel=1e-2)  # plus and minus
    z = noise(300, 16) * torch.arange(1, 17) + 3
    assert spread(z) == approx(nn.functional.normalize(z.double(), dim=1).std(0, correction=0).mean().item(), rel=1e-9)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_split_batchnorm_is_batchnorm_on_every_split(splits):
    ours, x = nn.BatchNorm2d(3), 2 + 3 * noise(8, 3, 5, 4)
    ours.__class__, ours.splits = SplitBatchNorm, splits
    with torch.no_grad():
        ours.weight.copy_(noise(3, seed=1))
        ours.bias.copy_(noise(3, seed=2))
    apart = [nn.BatchNorm2d(3) for _ in range(splits)]
    for bn in apart:
        bn.load_state_dict(ours.state_dict())
    y, expected = ours(x), torch.empty_like(x)
    for n, bn in enumerate(apart):
        expected[n::splits] = bn(x[n::splits])
    assert torch.allclose(y, expected, atol=1e-5)
    for k in ("running_mean", "running_var"):
        mean = torch.stack([getattr(bn, k) for bn in apart]).mean(0)
        assert torch.allclose(getattr(ours, k), mean, atol=1e-6)
    g1 = torch.autograd.grad((y * x).sum(), (ours.weight, ours.bias))
    g2 = torch.autograd.grad((expected * x).sum(), [p for bn in apart for p in bn.parameters()])
    assert torch.allclose(g1[0], sum(g2[::2]), atol=1e-4) and torch.allclose(g1[1], sum(g2[1::2]), atol=1e-4)
    plain = nn.BatchNorm2d(3).eval()
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(x), plain(x))  # probes see no splits


@pytest.mark.parametrize("backbone", ["resnet18", "small_cnn"])
def test_split_batchnorm_keeps_every_name(backbone):
    fields = {"data": "0", "backbone": backbone, "width": 8}
    plain, net = (torch.manual_seed(0) and methods.build(RunConfig(method=m, **fields)).backbone
                  for m in ("simclr", "moco_v2"))
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in plain.state_dict().items())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(isinstance(m, SplitBatchNorm) and m.splits == 8 for m in norms)
    x = noise(32, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert torch.allclose(net(x), net.to(memory_format=torch.channels_last)(x), atol=1e-2)  # groups of four: noisy
