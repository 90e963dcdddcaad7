"""SidAEFeatures among scikit-learn's own: its estimator checks, pipelines, clones, pickles that are safetensors."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sidae_lib import data, networks
from sidae_lib.config import RunConfig, SidaeError
from sidae_lib.estimator import SidAEFeatures

SMALL = {"width": "small", "epochs": 1, "batch": 64, "random_state": 0}
DIGITS = load_digits()
DIGITS.images, DIGITS.data, DIGITS.target = DIGITS.images[:400], DIGITS.data[:400], DIGITS.target[:400]
EXCEPTIONS: dict[str, str] = {}


@parametrize_with_checks([SidAEFeatures(width="small", epochs=1, random_state=0)], expected_failed_checks=lambda _: EXCEPTIONS)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def fitted() -> SidAEFeatures:
    return SidAEFeatures(**SMALL).fit(DIGITS.images)


@pytest.mark.parametrize("images", [DIGITS.images[:50], np.random.default_rng(0).integers(0, 17, (9, 40, 24))])
def test_features_are_the_saved_backbones(fitted, images, tmp_path):
    """By hand: rescale to bytes, resize whatever size it is, normalise, and the weights as `networks.load` reads them."""
    (path := tmp_path / "b.safetensors").write_bytes(fitted.weights_)
    net = networks.load(path)
    x = torch.from_numpy(np.float32(images / 16 * 255))[:, None]
    x = torch.nn.functional.interpolate(x, size=(32, 32), mode="bilinear", antialias=True).round().expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (net.mean, net.std))
    with torch.no_grad():
        slow = net((x - mean) / std)
    assert np.allclose(fitted.transform(images), slow, atol=1e-5)
    assert net.config == RunConfig.from_dict(fitted.record_["config"]) and net.config.epochs == 1


def test_one_image_in_every_form_has_the_same_features(fitted):
    rows = SidAEFeatures(**SMALL).fit(DIGITS.data).transform(DIGITS.data[:20])
    channel = SidAEFeatures(**SMALL).fit(DIGITS.images[..., None]).transform(DIGITS.images[:20, ..., None])
    colour = np.repeat(DIGITS.images[..., None], 3, 3)
    same = fitted.transform(DIGITS.images[:20])
    assert np.array_equal(same, rows) and np.array_equal(same, channel)
    assert np.array_equal(same, SidAEFeatures(**SMALL).fit(colour).transform(colour[:20]))


def test_bytes_are_taken_as_they_are(fitted):
    x = np.random.default_rng(0).integers(0, 200, (4, 32, 32, 3), dtype=np.uint8)
    estimator = SidAEFeatures(**SMALL | {"batch": 4}).fit(x)
    assert np.array_equal(estimator._images(x).permute(0, 2, 3, 1), x)


def test_a_seed_is_a_result_and_labels_are_none(fitted):
    again = SidAEFeatures(**SMALL).fit(DIGITS.images, DIGITS.target)
    assert again.weights_ == fitted.weights_
    assert SidAEFeatures(**SMALL | {"random_state": 1}).fit(DIGITS.images).weights_ != fitted.weights_


@pytest.mark.parametrize("form", [np.int64, np.uint8, np.random.RandomState, np.random.seed])
def test_every_form_of_one_random_state_is_one_result(form, fitted):
    """`np.random.seed` returns None, which stands for NumPy's own generator."""
    assert SidAEFeatures(**SMALL | {"random_state": form(0)}).fit(DIGITS.images).weights_ == fitted.weights_


def test_pixels_a_little_out_of_the_fitted_range_are_clipped(fitted):
    x = DIGITS.images[:5]
    assert np.array_equal(fitted.transform(np.where(x == 16, 20, x)), fitted.transform(x))
    assert np.array_equal(fitted.transform(np.where(x == 0, -3, x)), fitted.transform(x))


U8 = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
U8[0] = 0  # a blank image; it passes alone too


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.uint16, np.float32])
@pytest.mark.parametrize("x", [DIGITS.images[:12], U8], ids=["0 to 16", "bytes"])
def test_the_type_of_the_same_pixels_makes_no_difference(x, kind):
    estimator = SidAEFeatures(**SMALL | {"batch": 12}).fit(x)
    features = estimator.transform(x)
    assert features.std(0).max() > 0 and np.array_equal(features, estimator.transform(x.astype(kind)))
    for n in range(len(x)):
        assert np.allclose(estimator.transform(x[n : n + 1].astype(kind)), features[n : n + 1], atol=1e-5)


@pytest.mark.parametrize(("x", "other"), [
    (U8, U8 / 255), (U8, np.float32(U8 / 127.5 - 1)), (U8, (U8 - 127.0) / 74), (U8, (U8 > 127) * 1.0),
    (U8, U8.astype(int) * 257), (U8 / 255, U8), (U8 / 255.0, U8 * 1.0), (U8 * 257.0, U8), (U8 > 127, U8),
    (DIGITS.images[:12], DIGITS.images[:12] / 16),
    (DIGITS.images[:12], DIGITS.images[:12] * 100), (DIGITS.images[:12] / 16, DIGITS.images[:12]),
])  # fmt: skip
def test_pixels_on_another_scale_are_one_sentence(x, other):
    estimator = SidAEFeatures(**SMALL | {"batch": 12}).fit(x)
    with pytest.raises(ValueError, match=r"^X lies in \S+ to \S+, but SidAEFeatures was fitted on \S+ to \S+; give .*\.$"):
        estimator.transform(other)


def test_pickled_weights_are_safetensors(fitted):
    again = pickle.loads(dumped := pickle.dumps(fitted))
    assert np.array_equal(again.transform(DIGITS.images[:9]), fitted.transform(DIGITS.images[:9]))
    names = networks.backbone(RunConfig.from_dict(fitted.record_["config"])).state_dict().keys()
    assert {k for k in load(fitted.weights_) if not k.startswith("projector.")} == names
    assert fitted.weights_ in dumped
    named = []

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            named.append(f"{module}.{name}")
            return super().find_class(module, name)

    Reader(io.BytesIO(dumped)).load()
    assert named == ["sidae_lib.estimator.SidAEFeatures"]  # no tensor, no module of torch


def test_in_a_pipeline_and_a_search():
    model = make_pipeline(SidAEFeatures(**SMALL), StandardScaler(), LogisticRegression(max_iter=500))
    x, y = DIGITS.images[:300], DIGITS.target[:300]
    search = GridSearchCV(model, {"sidaefeatures__method": ["sidae", "dae"]}, cv=2, error_score="raise").fit(x, y)
    assert search.best_score_ > 0.3  # chance is 0.1
    assert search.best_estimator_[:-1].transform(x).shape == (300, 32)


def test_clone_and_parameters(fitted):
    bare = clone(fitted)
    assert bare.get_params() == fitted.get_params() == SidAEFeatures(**SMALL).get_params()
    assert bare.set_params(w=0.3).w == 0.3
    with pytest.raises(NotFittedError):
        bare.transform(DIGITS.images)
    assert list(fitted.get_feature_names_out()[:2]) == ["sidaefeatures0", "sidaefeatures1"]


@pytest.mark.parametrize("width, features", [("small", 32), (4, 32), (16, 128)])
def test_width(width, features):
    assert SidAEFeatures(**SMALL | {"width": width}).fit_transform(DIGITS.images[:80]).shape == (80, features)


@pytest.mark.parametrize(("change", "shape", "word"), [
    ({}, (9, 8, 8, 2), r"not \(9, 8, 8, 2\)"), ({}, (9, 8, 8, 3, 1), "X must be"), ({}, (9, 3, 8, 1), "N x C x H x W;"),
    ({}, (1, 8, 8), "minimum of 2"),
    ({"method": "simclear"}, (9, 8, 8), "Unknown method"), ({"w": 2.0}, (9, 8, 8), "w must lie in"),
    ({"augment": "nothing"}, (9, 8, 8), "Unknown augmentation"),
])  # fmt: skip
def test_bad_input_is_a_sentence(change, shape, word):
    with pytest.raises((ValueError, SidaeError), match=word):
        SidAEFeatures(**SMALL | change).fit(np.random.default_rng(0).random(shape))


COLOUR = np.random.default_rng(1).integers(0, 256, (12, 10, 9, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def coloured() -> SidAEFeatures:
    return SidAEFeatures(**SMALL | {"batch": 12}).fit(COLOUR)


@pytest.mark.parametrize("form", [
    lambda x: np.moveaxis(x, 3, 1), lambda x: torch.from_numpy(x).permute(0, 3, 1, 2), lambda x: torch.from_numpy(x).bfloat16(),
    lambda x: [*torch.from_numpy(x)], lambda x: [*map(Image.fromarray, x)], lambda x: pd.Series([*x]), lambda x: x.tolist(),
], ids=["channels first", "a tensor", "bfloat16", "tensors", "PIL", "a series", "numbers"])  # fmt: skip
def test_the_same_pixels_in_another_form(coloured, form):
    """Channels first or last, of any library: the same weights where one fits on it, the same features where one does not."""
    assert np.array_equal(coloured.transform(form(COLOUR)), coloured.transform(COLOUR))
    if torch.is_tensor(form(COLOUR)) and form(COLOUR).dtype == torch.uint8:
        assert SidAEFeatures(**SMALL | {"batch": 12}).fit(form(COLOUR)).weights_ == coloured.weights_


def test_a_palette_is_looked_up(coloured):
    four = [Image.fromarray(x).quantize(4) for x in COLOUR]
    assert np.array_equal(coloured.transform(four), coloured.transform(np.stack([x.convert("RGB") for x in four])))


def test_grey_and_colour_may_follow_one_another(coloured, fitted):
    grey = COLOUR[..., :1]
    assert np.array_equal(coloured.transform(grey), coloured.transform(grey.repeat(3, 3)))
    x = DIGITS.images[:9]
    assert np.array_equal(fitted.transform(x[:, None]), fitted.transform(x))
    assert np.array_equal(fitted.transform(x[..., None].repeat(3, 3)), fitted.transform(x))


ONE = COLOUR[0]
WRONG = {
    "both readings": (COLOUR[:, :3, :3], "X has images of shape 12 x 3 x 3 x 3, which can be"),
    "of one line": (COLOUR[:, :1], "X has images of shape 12 x 1 x 9 x 3, which can be"),
    "one image": (ONE, r"X is \(10, 9, 3\), .* one image with channels as \(1, 10, 9, 3\)\."),
    "one grey image": (ONE[..., 0], r"X is \(10, 9\), not images, .* give images, one alone as N = 1\."),
    "rows": (COLOUR.reshape(12, -1), r"X is \(12, 270\), not images, .* fitted on images of "),
    "ragged": ([ONE, ONE[1:]], r"X holds images of different shapes, \(9, 9, 3\) and \(10, 9, 3\) among them; bring"),
    "grey among colour": ([ONE, ONE[..., 0]], r"X holds images of different shapes, \(10, 9\) and \(10, 9, 3\) among them"),
    "numbers": ([[[1, 2], [3]], [[1], [2]]], "X holds images of different shapes; bring them all to one shape first"),
    "four channels": (COLOUR[:, :, :4, [0, 1, 2, 2]], r"X must be \(N, H, W\), .*, not \(12, 10, 4, 4\)"),
    "nothing": ([], "X is empty"), "no image": (COLOUR[:0], "0 sample"), "no pixel": (COLOUR[:, :0], "a pixel at least"),
    "no number": (np.full(COLOUR.shape, np.nan), "X holds pixels that are NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_are_no_images_is_one_sentence(name, fitted, coloured):
    """It speaks of images and their shapes, whether one fitted on grey ones or on colour."""
    x, word = WRONG[name]
    for estimator in (fitted, coloured):
        with pytest.raises(ValueError, match=word) as e:
            estimator.transform(x)
        assert "feature" not in str(e.value) and "\n" not in str(e.value)


def test_rows_and_images_are_told_apart(coloured):
    rows = SidAEFeatures(**SMALL | {"batch": 12}).fit(U8.reshape(12, 64))
    assert rows.n_features_in_ == 64 and not hasattr(coloured, "n_features_in_")
    with pytest.raises(ValueError, match=r"X is \(12, 8, 8\), not rows, and SidAEFeatures was fitted on rows; give those"):
        rows.transform(U8)
    with pytest.raises(ValueError, match=r"X is \(12, 8, 8\), .* give grey images as \(12, 8, 8, 1\)"):  # or one of 12 channels
        coloured.transform(U8)


def test_without_torch_being_asked_for():
    """Importing the package alone stays light: the estimator is imported by its own name."""
    code = "import sys, sidae_lib; assert 'sklearn' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_embedded_digits_are_scikit_learns(fitted):
    """The same images as the set `digits` at 32 x 32, up to rounding of the resize."""
    mine = fitted._images(DIGITS.images[:10]).int()
    whole = torch.cat([data.load("digits").split(s).images for s in ("train", "test")]).int()
    assert all((whole - image).abs().amax((1, 2, 3)).min() <= 1 for image in mine)
