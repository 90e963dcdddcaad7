"""SidAEFeatures among scikit-learn's own: its estimator checks, pipelines, clones, pickles that are safetensors."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
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


def test_features_are_the_saved_backbones(fitted, tmp_path):
    """By hand: rescale to bytes, resize, normalise, and the weights as `networks.load` reads them."""
    (path := tmp_path / "b.safetensors").write_bytes(fitted.weights_)
    net = networks.load(path)
    x = torch.from_numpy(np.float32(DIGITS.images[:50] / 16 * 255))[:, None]
    x = torch.nn.functional.interpolate(x, size=(32, 32), mode="bilinear").round().expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (net.mean, net.std))
    with torch.no_grad():
        slow = net((x - mean) / std)
    assert np.allclose(fitted.transform(DIGITS.images[:50]), slow, atol=1e-5)
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
    ({}, (9, 8, 8, 2), r"not \(9, 8, 8, 2\)"), ({}, (9, 8, 8, 3, 1), "X must be"), ({}, (1, 8, 8), "minimum of 2"),
    ({"method": "simclear"}, (9, 8, 8), "Unknown method"), ({"w": 2.0}, (9, 8, 8), "w must lie in"),
    ({"augment": "nothing"}, (9, 8, 8), "Unknown augmentation"),
])  # fmt: skip
def test_bad_input_is_a_sentence(change, shape, word):
    with pytest.raises((ValueError, SidaeError), match=word):
        SidAEFeatures(**SMALL | change).fit(np.random.default_rng(0).random(shape))


def test_other_images_than_fitted(fitted):
    with pytest.raises(ValueError, match="fitted with"):
        fitted.transform(np.zeros((3, 8, 9)))


def test_without_torch_being_asked_for():
    """Importing the package alone stays light: the estimator is imported by its own name."""
    code = "import sys, sidae_lib; assert 'sklearn' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_embedded_digits_are_scikit_learns(fitted):
    """The same images as the set `digits` at 32 x 32, up to rounding of the resize."""
    mine = fitted._images(DIGITS.images[:10]).int()
    whole = torch.cat([data.load("digits").split(s).images for s in ("train", "test")]).int()
    assert all((whole - image).abs().amax((1, 2, 3)).min() <= 1 for image in mine)
