"""Pre-training as a scikit-learn transformer: images in, features of the backbone out."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

from . import arrays, data, evaluate, methods, networks, pictures, train
from .config import RunConfig, SidaeError
from .data import Images, Split


def _pixels(x: Any) -> Any:
    """A tensor, wherever it is, or an image of PIL as NumPy reads it; whatever else as it is."""
    if isinstance(x, torch.Tensor):
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy(force=True)
    return np.asarray(x.convert(pictures.MODES.get(x.mode, x.mode))) if isinstance(x, Image.Image) else x


def _array(X: Any) -> Any:
    """X as scikit-learn reads it: `_pixels`, and of a list of images one array. Raises ValueError where their shapes differ."""
    X = _pixels(X)
    if isinstance(X, (list, tuple)) or getattr(X, "dtype", None) == np.dtype(object) and X.ndim == 1:
        if not (images := [_pixels(x) for x in X]):
            raise ValueError("X is empty; give images or rows.")
        try:
            return np.asarray(images)
        except ValueError:
            shapes = sorted({x.shape for x in images if hasattr(x, "shape")})
            among = f", {shapes[0]} and {shapes[-1]} among them" if shapes[1:] else ""
            raise ValueError(f"X holds images of different shapes{among}; bring them all to one shape first.") from None
    return X if hasattr(X, "shape") else np.asarray(X)


def _channels_last(X: np.ndarray) -> np.ndarray:
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W) with their channels last. Raises ValueError for what is none of these,
    could be two, or holds a pixel that is no number."""
    channels = X.ndim < 4 or {1, 3} & {X.shape[1], X.shape[3]}
    if X.ndim > 4 or not channels or not X.size:
        raise ValueError("X must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3 and a pixel at least, or (N, F), "
                         f"not {X.shape}.")  # fmt: skip
    try:
        X = arrays.channels_last(X, "X", (1, 3))
    except SidaeError as e:
        raise ValueError(f"{e} Grey images may also be N x H x W.") from None
    if not np.isfinite(X).all():
        raise ValueError("X holds pixels that are NaN or infinite; replace them first.")
    return np.ascontiguousarray(X)


class SidAEFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features learned without labels, for any scikit-learn pipeline.

    X: (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3, an array, a tensor, or a list of images, PIL's too; or
    (N, F), where a row of S * S values is an image of S x S pixels and any other an image of one line (as
    `load_digits().data`). Of uint8 0 to 255, of other numbers their range in `fit` becomes black to white, whatever type
    `transform` is given; what lies outside is clipped, and what is plainly on another scale (0 to 1 after 0 to 255) refused.
    Images are resized to 32 x 32, so `transform` takes other sizes than `fit`, and grey becomes three equal channels.
    `transform` returns (N, F) float32.

    method: sidae, simsiam or dae.  w: SidAE's loss weight.  epochs, batch: of pre-training; the batch is cut to N.
    width: channels of ResNet-18's first stage, F = 8 width; "small" is the 181,000-parameter network, F = 32.
    augment: a name in `augment.VIEWS`, "auto" chooses by the channels.  random_state: as everywhere in scikit-learn.
    """

    def __init__(self, method: str = "sidae", *, w: float = 0.5, epochs: int = 20, batch: int = 128, lr: float = 0.03,
                 width: int | str = 16, augment: str = "auto", device: str = "auto", random_state: Any = None):
        self.method, self.w, self.epochs, self.batch, self.lr = method, w, epochs, batch, lr
        self.width, self.augment, self.device, self.random_state = width, augment, device, random_state

    def fit(self, X: Any, y: Any = None) -> "SidAEFeatures":
        """Pre-trains on X; y is ignored."""
        X = self._validated(X, reset=True)
        self.low_, self.high_ = (0.0, 255.0) if X.dtype == np.uint8 else (float(X.min()), float(X.max()))
        self.dtype_, self.whole_ = X.dtype.name, not (X % 1).any()
        x = self._images(X)
        small = self.width == "small"
        dim, heads = (64, (16, 64)) if small else (16 * int(self.width), (4 * int(self.width), 8 * int(self.width)))
        fields: dict[str, Any] = {"dim": dim, "hidden": dim, "pred_hidden": heads[0], "decoder": heads[1], "w": self.w}
        reads = methods.METHODS[self.method].reads if self.method in methods.METHODS else fields
        seed = check_random_state(self.random_state).randint(2**31)  # equal for 0, np.int64(0) and RandomState(0)
        grey = bool((x == x[:, :1]).all())
        config = RunConfig(
            method=self.method, data=hashlib.sha256(x.numpy()).hexdigest()[:16], seed=int(seed), epochs=self.epochs,
            batch=min(self.batch, len(x)), lr=self.lr, backbone="small_cnn" if small else "resnet18",
            width=64 if small else int(self.width), **{k: v for k, v in fields.items() if k in reads},
            augment=("simsiam_grey" if grey else "simsiam_cifar") if self.augment == "auto" else self.augment)
        images = Images("array", "array", config.data, (), *data.statistics(x), {"train": Split(x)})
        with tempfile.TemporaryDirectory() as folder:
            self.record_ = train.pretrain(config, images, Path(folder), device=train.device_of(self.device))
            self.weights_ = (Path(folder) / train.backbone_name(self.epochs)).read_bytes()
        self._n_features_out = 32 if small else 8 * int(self.width)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """(N, F) features of the frozen backbone. Raises NotFittedError before `fit`, ValueError for pixels on another scale
        than those of `fit`."""
        check_is_fitted(self)
        x = self._images(self._on_scale(self._validated(X, reset=False)))
        with tempfile.TemporaryDirectory() as folder:  # the weights stay a safetensors file, also in a pickle
            (path := Path(folder) / "backbone.safetensors").write_bytes(self.weights_)
            net = networks.load(path)
        where = train.device_of(self.device)
        return evaluate.features(net.to(where), x, stats=(net.mean, net.std), device=where).cpu().numpy()

    def _validated(self, X: Any, reset: bool) -> np.ndarray:
        """Rows (N, F), by scikit-learn's rules; or images (N, H, W) or (N, H, W, C)."""
        X, name = _array(X), type(self).__name__
        rows = len(X.shape) < 3
        if not reset and rows != (not self.shape_):
            asked = f"images of {self.shape_}; give images, one alone as N = 1" if rows else "rows; give those"
            raise ValueError(f"X is {X.shape}, not {'images' if rows else 'rows'}, and {name} was fitted on {asked}.")
        X = validate_data(self, X, reset=reset, allow_nd=True, dtype="numeric", ensure_min_samples=2 if reset else 1,
                          ensure_all_finite=rows)  # fmt: skip
        if not rows:
            X = _channels_last(X)
            known = X.shape[1:] if reset else self.shape_
            if X.ndim == 3 and X.shape[1:] != known and (len(known) == 3 or X.shape[2] in (1, 3)):
                raise ValueError(f"X is {X.shape}, and {name} was fitted on images of {known}; give grey images as "
                                 f"{(*X.shape, 1)}, and one image with channels as {(1, *X.shape)}.")  # fmt: skip
        if reset:
            self.shape_: tuple[int, ...] = () if rows else X.shape[1:]
            if not rows:
                del self.n_features_in_  # scikit-learn took the second axis for it
        return X

    def _on_scale(self, X: np.ndarray) -> np.ndarray:
        """X, unless most of it would be clipped or, whole numbers having become fractions or another type, all be black. What
        `fit` has seen passes, in whatever parts."""
        low, high, span = float(X.min()), float(X.max()), self.high_ - self.low_
        other = X.dtype.name != self.dtype_ or bool((X % 1).any())
        faint = self.whole_ and other and 0 < max(abs(low), abs(high)) <= self.high_ / 16
        if low < self.low_ - span or high > self.high_ + span or faint:
            raise ValueError(f"X lies in {low:g} to {high:g}, but {type(self).__name__} was fitted on {self.low_:g} to "
                             f"{self.high_:g}; give pixels on the scale of those that it was fitted on.")
        return X

    def _images(self, X: np.ndarray) -> torch.Tensor:
        """Whatever X is -> uint8 (N, 3, 32, 32)."""
        if X.ndim == 2:
            side = round(X.shape[1] ** 0.5)
            X = X.reshape(len(X), side, side) if side**2 == X.shape[1] else X[:, None]
        X = X[..., None] if X.ndim == 3 else X
        if (self.low_, self.high_) != (0, 255):
            X = (X.astype(np.float64) - self.low_) / max(self.high_ - self.low_, 1e-300) * 255
        x = torch.from_numpy(np.clip(X, 0, 255).astype(np.float32)).permute(0, 3, 1, 2)
        x = F.interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
        return x.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = []
        return tags
