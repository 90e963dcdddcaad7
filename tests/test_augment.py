"""Every op against torchvision's function for one image, and the drawn parameters against torchvision's own draws.

The ops are compared as floats, which is stricter than 2/255 after the uint8 round trip.
"""

import itertools

import pytest
import torch
from scipy import stats
from torch import Generator
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandomResizedCrop as TVRandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from sidae_lib import augment
from sidae_lib.augment import (
    FLIP,
    GREYSCALE,
    SOLARIZE,
    VIEWS,
    ColorJitter,
    GaussianBlur,
    PadRotateScale,
    RandomResizedCrop,
)
from sidae_lib.config import SidaeError

N = 1_000  # parameter sets, sample k on image k % 256
DRAWS = 10_000
EXACT = 2e-5  # float32 through some thirty operations
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])


def seeded(seed=0):
    return Generator().manual_seed(seed)


def pictures(n=N, channels=3, size=32):
    """(n, channels, size, size) uint8: 256 images in turn; noise, and the cases where colour formulas branch."""
    x = torch.randint(0, 256, (256, channels, size, size), generator=seeded(1), dtype=torch.uint8)
    x[0], x[1], x[2] = 0, 255, 128
    x[3] = x[3, :1]  # grey
    x[4:8] = x[4:8] // 128 * 255  # saturated colours, ties between channels
    x[8:16] = x[8:16] // 16 + 200  # bright and pale: factors above 1 clip
    x[16:64] = torch.arange(size, dtype=torch.uint8) * (255 // size)  # smooth, with a direction
    return x[torch.arange(n) % 256]


def colours(n=N, **kwargs):
    return pictures(n, **kwargs) / 255


def per_image(function, x, *params):
    return torch.stack([function(image, *(p[k].tolist() for p in params)) for k, image in enumerate(x)])


def tv_crop(image, box):
    return TF.resized_crop(image, *box, list(image.shape[-2:]), antialias=True)


def tv_jitter(image, factors, order):
    ops = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for k in order:
        image = ops[k](image, factors[k])
    return image


def tv_grey(image, on):
    return TF.rgb_to_grayscale(image, 3) if on else image


def tv_flip(image, on):
    return TF.horizontal_flip(image) if on else image


def tv_solarize(image, on):
    return TF.solarize(image, 0.5) if on else image


def tv_blur(image, kernel, sigma):
    return TF.gaussian_blur(image, [kernel, kernel], [sigma, sigma]) if sigma else image


def tv_pad_rotate_scale(image, angle):
    size = image.shape[-1]
    image = TF.pad(TF.resize(image, [2 * size, 2 * size], antialias=True), 18)
    image = TF.center_crop(TF.rotate(image, angle, InterpolationMode.NEAREST), int(2.25 * size))
    return TF.resize(image, [size, size], antialias=True)


# --- ops -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [28, 32, 33])
def test_crop_equals_torchvision(size):
    crop, x = augment.RandomResizedCrop(scale=(0.01, 1.0), ratio=(1 / 3, 3.0)), colours(size=size)
    box = crop.draw(N, size, seeded())["crop"]
    last = size - 1
    box[:6] = torch.tensor([[0, 0, size, size], [0, 0, 1, 1], [last, last, 1, 1], [3, 0, 1, size], [0, last, size, 1],
                            [1, 1, last, last]])
    box = box.repeat_interleave(2, 0)[:N]  # two pictures for each extreme
    assert torch.allclose(crop(x, {"crop": box}), per_image(tv_crop, x, box), atol=EXACT, rtol=0)


@pytest.mark.parametrize("op, reference", [(FLIP, tv_flip), (GREYSCALE, tv_grey), (SOLARIZE, tv_solarize)])
def test_flip_greyscale_and_solarize_equal_torchvision(op, reference):
    x, params = colours(), op.draw(N, 32, seeded())
    expected = per_image(reference, x, params[op.name])
    assert torch.allclose(op(x, params), expected, atol=1e-6, rtol=0)
    assert not torch.equal(expected, x)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_equals_torchvision_in_every_order(channels):
    jitter, x = ColorJitter(1.0, 1.0, 1.0, 0.5, p=1.0), colours(channels=channels)
    factors, _ = jitter.sample(N, seeded())
    order = torch.tensor(list(itertools.permutations(range(4)))).repeat(42, 1)[:N]
    extremes = torch.tensor(list(itertools.product((0.0, 2.0), (0.0, 2.0), (0.0, 2.0), (-0.5, 0.0, 0.5))))
    factors[-len(extremes):] = extremes
    got = jitter(x, jitter.plan(factors, order))
    assert torch.allclose(got, per_image(tv_jitter, x, factors, order), atol=EXACT, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_of_some_ops_equals_torchvision(channels):
    x = colours(channels=channels)
    for jitter in (ColorJitter(saturation=0.0, hue=0.0), ColorJitter(contrast=0.0), ColorJitter(0.0, 0.0, 0.0, 0.3)):
        factors, order = jitter.sample(N, seeded())
        got = jitter(x, jitter.plan(factors, order))
        assert torch.allclose(got, per_image(tv_jitter, x, factors, order), atol=EXACT, rtol=0)


@pytest.mark.parametrize("kernel, size", [(3, 32), (9, 28), (9, 32), (15, 8)])
def test_blur_equals_torchvision(kernel, size):
    blur, x = GaussianBlur(kernel), colours(size=size)
    sigma = blur.draw(N, size, seeded())["blur"]
    sigma[:4] = torch.tensor([0.0, 0.1, 2.0, 50.0])
    sigma = sigma.roll(5)  # the extremes on pictures with structure
    expected = per_image(lambda image, s: tv_blur(image, kernel, s), x, sigma)
    assert torch.allclose(blur(x, {"blur": sigma}), expected, atol=EXACT, rtol=0)
    assert torch.equal(blur(x, {"blur": torch.zeros(N)}), x)


@pytest.mark.parametrize("channels, size", [(1, 28), (3, 32)])
def test_pad_rotate_scale_equals_torchvision(channels, size):
    op, x = PadRotateScale(), colours(channels=channels, size=size)
    angle = op.draw(N, size, seeded())["rotate"]
    angle[:3] = torch.tensor([0.0, -15.0, 15.0])
    angle = angle.roll(5)
    off = (op(x, {"rotate": angle}) - per_image(tv_pad_rotate_scale, x, angle)).abs() > EXACT
    # a source point within rounding of halfway between two pixels may go to either one
    assert off.float().mean() < 1e-3


# --- parameters ------------------------------------------------------------------------------------------------------

def ks(sample, other):
    """p-value of a Kolmogorov-Smirnov test against a sample, or against U(low, high)."""
    if isinstance(other, tuple):
        return stats.kstest(sample.numpy(), "uniform", (other[0], other[1] - other[0])).pvalue
    return stats.ks_2samp(sample.numpy(), other.numpy()).pvalue


def share_is(on, p):
    return stats.binomtest(int(on.sum()), len(on), p).pvalue > 1e-3


# of the last two most tries do not fit, and none does: what is left is torchvision's central crop
@pytest.mark.parametrize("crop, scale, ratio", [
    (VIEWS["simsiam_cifar"].first[1], (0.2, 1.0), (3 / 4, 4 / 3)),
    *((augment.RandomResizedCrop(scale, ratio), scale, ratio)
      for scale, ratio in [((0.3, 0.8), (1 / 2, 6 / 5)), ((0.9, 1.3), (3 / 4, 4 / 3)), ((1.2, 2.0), (3 / 4, 4 / 3))])])
def test_crop_boxes_follow_torchvision(crop, scale, ratio):
    box = crop.draw(DRAWS, 32, seeded())["crop"].double()
    torch.manual_seed(0)
    image = torch.empty(1, 32, 32)
    theirs = torch.tensor([TVRandomResizedCrop.get_params(image, scale, ratio) for _ in range(DRAWS)]).double()
    for measure in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1],
                    lambda b: 32 - b[:, 0] - b[:, 2], lambda b: b[:, 0] - b[:, 1]):
        assert ks(measure(box), measure(theirs)) > 1e-3
    assert (box[:, :2] >= 0).all() and (box[:, :2] + box[:, 2:] <= 32).all() and (box[:, 2:] >= 1).all()


def test_jitter_factors_and_order():
    factors, order = ColorJitter(0.4, 0.3, 1.5, 0.1).sample(DRAWS, seeded())
    on = (factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(1)
    assert share_is(on, 0.8)
    for column, bounds in enumerate([(0.6, 1.4), (0.7, 1.3), (0.0, 2.5), (-0.1, 0.1)]):
        assert ks(factors[on, column], bounds) > 1e-3
    assert factors[on].double().T.corrcoef().fill_diagonal_(0).abs().max() < 0.05  # one draw per factor, not one in all
    _, counts = order.unique(dim=0, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_blur_and_angle_parameters():
    sigma = GaussianBlur().draw(DRAWS, 32, seeded())["blur"]
    assert share_is(sigma > 0, 0.5) and ks(sigma[sigma > 0], (0.1, 2.0)) > 1e-3
    assert ks(PadRotateScale().draw(DRAWS, 32, seeded())["rotate"], (-15.0, 15.0)) > 1e-3


def test_flip_and_greyscale_probabilities():
    assert share_is(FLIP.draw(DRAWS, 32, seeded())["flip"], 0.5)
    assert share_is(GREYSCALE.draw(DRAWS, 32, seeded())["grey"], 0.2)
    assert share_is(SOLARIZE.draw(DRAWS, 32, seeded())["solarize"], 0.2)


# --- pipelines -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", VIEWS)
def test_draw_is_a_function_of_the_generator(name):
    first, again, other = (VIEWS[name].draw(64, 32, seeded(s)) for s in (3, 3, 4))
    for view in (0, 1):
        for k, v in first[view].items():
            assert torch.equal(v, again[view][k]) and not torch.equal(v, other[view][k])
            assert len(v) == 64 and v.dtype in (torch.float32, torch.int64)
            assert len(v.unique(dim=0)) > 1  # two samples of a batch differ
            if k in first[1 - view]:  # the two views differ, but for what the pipeline says they share
                assert torch.equal(first[0][k], first[1][k]) == (k in VIEWS[name].shared)


def test_support_views_come_after_and_change_nothing_before():
    """FNC's more views: like the first in kind, each with parameters of its own."""
    for name in ("simclr", "byol"):
        two, four = VIEWS[name].draw(64, 32, seeded()), VIEWS[name].draw(64, 32, seeded(), support=2)
        assert len(two) == 2 and len(four) == 4
        assert all(torch.equal(v, four[n][k]) for n in (0, 1) for k, v in two[n].items())
        assert four[2].keys() == four[3].keys() == two[0].keys()
        for a, b in itertools.combinations((0, 2, 3), 2):
            assert not any(torch.equal(v, four[b][k]) for k, v in four[a].items())


@pytest.mark.parametrize("name, channels", [("simsiam_cifar", 1), ("simsiam_cifar", 3), ("simsiam_grey", 1),
                                            ("simsiam_grey", 3), ("fer", 3), ("byol", 3)])
def test_every_sample_has_its_own_view_wherever_the_batch_is_cut(name, channels):
    images = pictures(200, channels=channels)[100:101].expand(8, -1, -1, -1)
    params, _ = VIEWS[name].draw(8, 32, seeded())
    mean, std = MEAN[:channels], STD[:channels]
    v = augment.apply(VIEWS[name].first, images, params, mean, std)
    assert v.shape == images.shape and v.dtype == torch.float32 and v.is_contiguous()
    assert len(v.unique(dim=0)) >= 7  # rotations below 0.8 degrees move no pixel
    part = augment.apply(VIEWS[name].first, images[2:5], {k: p[2:5] for k, p in params.items()}, mean, std)
    assert torch.allclose(part, v[2:5], atol=1e-5)


def test_none_only_normalises():
    images = pictures(16)
    assert VIEWS["none"].draw(16, 32, seeded()) == ({}, {})
    v = augment.apply(VIEWS["none"].first, images, {}, MEAN, STD)
    for c in range(3):
        assert torch.allclose(v[:, c], (images[:, c] / 255 - MEAN[c]) / STD[c], atol=1e-6)


@pytest.mark.parametrize("view", [0, 1])
def test_simsiam_cifar_is_the_papers_list_in_order(view):
    """ColorJitter, RandomResizedCrop, RandomGrayscale, RandomHorizontalFlip (arXiv:2304.02549, Sec. 4.1)."""
    x, views = pictures(), VIEWS["simsiam_cifar"]
    params = views.draw(N, 32, seeded())[view]
    generator = seeded()
    if view:
        for op in views.first:  # view 1 draws first
            op.draw(N, 32, generator)
    factors, order = ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8).sample(N, generator)
    v = per_image(tv_jitter, x / 255, factors, order)
    v = per_image(tv_crop, v, params["crop"])
    v = per_image(tv_flip, per_image(tv_grey, v, params["grey"]), params["flip"])
    got = augment.apply((views.first, views.second)[view], x, params, MEAN, STD)
    assert torch.allclose(got * STD.view(3, 1, 1) + MEAN.view(3, 1, 1), v, atol=EXACT, rtol=0)


def test_simsiam_grey_is_the_same_with_blur():
    """On three equal channels saturation, hue and greyscale change nothing: the luma weights sum to 0.9999."""
    x, views = pictures()[:, :1].expand(-1, 3, -1, -1), VIEWS["simsiam_grey"]
    params, _ = views.draw(N, 32, seeded())
    factors, order = ColorJitter(0.4, 0.4, 0.0, 0.0, p=0.8).sample(N, seeded())
    factors[:, 2] = torch.linspace(0.6, 1.4, N)
    factors[:, 3] = torch.linspace(-0.1, 0.1, N)
    order = torch.cat([order, torch.tensor([[2, 3]]).expand(N, -1)], 1)
    v = per_image(tv_crop, per_image(tv_jitter, x / 255, factors, order), params["crop"])
    v = per_image(tv_flip, v, params["flip"])
    v = per_image(lambda image, sigma: tv_blur(image, 9, sigma), v, params["blur"])
    got = augment.apply(views.first, x, params, MEAN, STD)
    assert torch.allclose(got * STD.view(3, 1, 1) + MEAN.view(3, 1, 1), v, atol=1 / 255, rtol=0)


def pipeline(name, view):
    """What torchvision makes of the parameters drawn, step by step; and ours."""
    views, x = VIEWS[name], pictures()
    params = views.draw(N, 32, seeded())
    generator = seeded()
    for op in (*views.first, *views.second)[: len(views.first) * view]:
        op.draw(N, 32, generator)
    (views.first, views.second)[view][0].draw(N, 32, generator)  # crop and flip come before the jitter
    FLIP.draw(N, 32, generator)
    got = augment.apply((views.first, views.second)[view], x, params[view], MEAN, STD)
    return x / 255, params[view], generator, got * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)


@pytest.mark.parametrize("name, view, saturation, low", [
    ("simclr", 0, 0.4, 0.08), ("simclr", 1, 0.4, 0.08), ("byol", 0, 0.2, 0.08), ("byol", 1, 0.2, 0.08), ("dino", 0, 0.2, 0.14),
    ("dino", 1, 0.2, 0.14)])
def test_contrastive_pipelines_are_the_papers_lists_in_order(name, view, saturation, low):
    """Crop, flip, jitter, grey; on view 2 of BYOL and DINO solarisation too."""
    v, p, generator, got = pipeline(name, view)
    factors, order = ColorJitter(0.4, 0.4, saturation, 0.1, p=0.8).sample(N, generator)
    v = per_image(tv_flip, per_image(tv_crop, v, p["crop"]), p["flip"])
    v = per_image(tv_grey, per_image(tv_jitter, v, factors, order), p["grey"])
    if name != "simclr" and view:
        edge = (v - 0.5).abs() < EXACT  # within rounding of the threshold a pixel may go either way
        v, got = per_image(tv_solarize, v, p["solarize"]).masked_fill(edge, 0), got.masked_fill(edge, 0)
    assert torch.allclose(got, v, atol=EXACT, rtol=0)
    area = (p["crop"][:, 2] * p["crop"][:, 3]).min().item() / 32**2
    assert low * 0.8 < area < low * 1.3
    assert (VIEWS[name].first[0], "blur" in p) == (RandomResizedCrop((low, 1.0)), False)


@pytest.mark.parametrize("name", ["simsiam_cifar", *(pytest.param(n, marks=pytest.mark.slow)
                                                     for n in ("simsiam_grey", "simclr", "fer"))])
def test_compiled_equals_eager(name):
    images, (params, _) = pictures(64), VIEWS[name].draw(64, 32, seeded())
    eager = augment.apply(VIEWS[name].first, images, params, MEAN, STD)
    compiled = torch.compile(augment.apply, fullgraph=True)(VIEWS[name].first, images, params, MEAN, STD)
    assert ((compiled - eager).abs() > 1e-4).float().mean() <= (1e-3 if name == "fer" else 0)  # as above


def test_autocast_changes_no_pixel():
    images, (params, _) = pictures(64), VIEWS["simsiam_grey"].draw(64, 32, seeded())
    plain = augment.apply(VIEWS["simsiam_grey"].first, images, params, MEAN, STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment.apply(VIEWS["simsiam_grey"].first, images, params, MEAN, STD), plain)


def test_unknown_name():
    with pytest.raises(SidaeError, match="^Images of 4 pixels cannot be shifted by 4; "):
        augment.VIEWS["yadim"].draw(3, 4, torch.Generator())
    with pytest.raises(SidaeError, match="'simsiam'.*simsiam_cifar, simsiam_grey, .*fer, .*none"):
        augment.check("simsiam")
    for name in VIEWS:
        augment.check(name)
