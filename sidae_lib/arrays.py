"""Arrays as people save them, npz or npy with the usual names, numbers and orders of axes -> splits."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from .config import SidaeError
from .layout import LABELS, File, Reading, one_sentence, role_among, some
from .pictures import SPLITS, Raw, black_and_white, bulk, on_white, ordered, scaled

WORDS = {"images": {"images", "image", "imgs", "img", "x", "data", "pixels", "arr_0"},
         "labels": {*LABELS, "arr_1"}}
CLASSES = ("classes", "class_names", "label_names", "names")
Arrays = dict[str, np.ndarray]  # split -> array


def read(files: list[File], reading: Reading) -> list[Raw]:
    """The splits of arrays with MedMNIST's keys or the like: train_images, x_test, labels ..."""
    found, keys = _loaded(files, reading)
    images, labels = ({s: a for (s, kind), a in found.items() if kind == k} for k in WORDS)
    unnamed, stands = "train" if "" in labels else "unlabeled", reading.validation(images)
    renamed = {"": unnamed, "val": "test"} if stands else {"": unnamed}
    images, labels = ({renamed.get(s, s): a for s, a in part.items()} for part in (images, labels))
    if not {*SPLITS} & {*images}:
        raise SidaeError(f"{reading.path} has no usable split: it needs the arrays train_images, test_images "
                         f"or unlabeled_images with their labels, and holds {some(keys) or 'none'}.")
    images = {s: images[s] for s in SPLITS if s in images}
    for s, x in images.items():
        images[s] = channels_last(x, f"{reading.path}: the {s} split")
        if images[s] is not x:
            reading.notes.append(f"Images came as N x C x H x W, {' x '.join(map(str, x.shape))}.")
    named = tuple(np.asarray(found.get(("", "classes"), [])).astype(str).ravel().tolist())
    images = _bytes(images, reading)
    labels, classes = _numbers({s: y for s, y in labels.items() if s in images}, named, reading)
    return [Raw(s, x, labels.get(s), classes) for s, x in images.items()]


def inside(names: Iterable[str], path: Path) -> None:
    """Raises SidaeError if a member of an archive points out of it."""
    for name in names:
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match("[A-Za-z]:", name):
            why = f"{path} has a member that points outside ({name})"
            raise SidaeError(f"{why}; take it only from who made it.")


def _loaded(files: list[File], reading: Reading) -> tuple[dict[tuple[str, str], np.ndarray], list[str]]:
    """(split or "", images or labels or classes) -> array, and the names of all arrays."""
    found: dict[tuple[str, str], np.ndarray] = {}
    keys, path, memory = [], reading.path, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    advice = "it must be a whole npz or npy file of plain arrays, none of objects"
    for file in files:
        with one_sentence(f"{path} could not be read", advice), file.open() as f:
            arrays = np.load(f, allow_pickle=False)
            if file.suffix == ".npy":
                arrays = {file.stem: arrays}
            else:
                inside(arrays.zip.namelist(), path)
                for m in arrays.zip.infolist():
                    if m.file_size > memory / 2:
                        raise SidaeError(f"{path} holds {m.filename} ({m.file_size:,} bytes), more than half "
                                         "of this machine's memory; make it smaller.")
            for name in arrays:
                split, kind = _meant(name)
                if not kind and file.suffix == ".npy" and (file.name == path.name or len(files) == 1):
                    kind = "images"
                if kind in WORDS and len(files) > 1:  # train.npz and test.npz
                    split = split or role_among(file.stem) or file.role or ""
                if (split, kind) in found:
                    raise SidaeError(f"{path} holds the {f'{split} {kind}'.strip()} twice; keep one.")
                if kind:
                    found[split, kind] = np.asarray(arrays[name])
                keys.append(name)
    unknown = [name for name in keys if not _meant(name)[1]]
    if unknown and files[0].suffix == ".npz":
        reading.notes.append(f"Arrays with other names are not read: {some(unknown)}.")
    return found, keys


def _meant(name: str) -> tuple[str, str]:
    """(split, images or labels or classes) that an array of this name holds, "" for what it does not say."""
    words = {name.casefold(), *re.split(r"[_\-. ]+", name.casefold())}
    if name.casefold() in CLASSES:
        return "", "classes"
    kind = next((kind for kind, known in WORDS.items() if known & words), "")
    return role_among(name) or "" if kind else "", kind


def channels_last(x: np.ndarray, what: str, channels: tuple[int, ...] = (1, 3, 4)) -> np.ndarray:
    """Images (N, C, H, W) as (N, H, W, C), others as they are. Raises SidaeError where both orders fit."""
    first, last = (x.ndim == 4 and x.shape[axis] in channels for axis in (1, -1))
    if first and last:
        shape = " x ".join(map(str, x.shape))
        raise SidaeError(f"{what} has images of shape {shape}, which can be N x H x W x C or N x C x H x W; "
                         "store them at another size.")
    return np.moveaxis(x, 1, 3) if first else x


def _bytes(images: Arrays, reading: Reading) -> Arrays:
    """uint8 of 1 or 3 channels: other types by the range of all splits, transparent ones on white."""
    deep = {s: x for s, x in images.items() if x.dtype.kind in "buif" and x.dtype != "u1"}
    deep = {s: x for s, x in deep.items() if x.size and x.ndim > 2}
    if deep:
        low, high = float(min(x.min() for x in deep.values())), float(max(x.max() for x in deep.values()))
        if not (-1 <= low and (high <= 1 or 255 / 4 < high < np.inf)):  # nor where one is NaN
            undo = "; undo a standardisation (times the deviation, plus the mean)" if low < 0 else ""
            raise SidaeError(f"{reading.path} has pixels from {low:g} to {high:g}, which is no known scale: "
                             f"they must be numbers from 0 to 1, -1 to 1 or 0 to 255{undo}.")
        most = max(bulk(image) for x in deep.values() for image in x) if high > 255 else high
        scale = black_and_white(low, high, most, [(0, 1), (-1, 1), (0, 255), (0, 65535)], reading)
        images = images | {s: scaled(x, *scale) for s, x in deep.items()}
    for split, x in images.items():
        if x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 4 and x.size:
            seen = [on_white(Image.fromarray(image)) for image in x]
            images[split] = np.stack([np.asarray(im) for im, _ in seen])
            if any(transparent for _, transparent in seen):
                reading.notes.append(f"The {split} split has transparent parts, which are white here.")
    return images


def _numbers(labels: Arrays, names: tuple[str, ...], reading: Reading) -> tuple[Arrays, tuple[str, ...]]:
    """Labels as numbers from 0, and the class names: of words, of rows with a single 1, of whole floats."""
    for split, y in labels.items():
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if y.ndim == 2 and y.dtype.kind in "buif" and np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all():
            y = y.argmax(1)
            reading.notes.append(f"The labels of the {split} split are rows with a single 1.")
        whole = y.dtype.kind == "f" and y.size and np.isfinite(y).all() and not (y % 1).any()
        if y.dtype.kind == "b" or whole:
            y = y.astype(np.int64)
        labels[split] = np.char.decode(y, "utf-8", "backslashreplace") if y.dtype.kind == "S" else y
    words = {c for y in labels.values() if y.dtype.kind == "U" for c in y.ravel().tolist()}
    if words and any(y.dtype.kind != "U" for y in labels.values()):
        raise SidaeError(f"{reading.path} has words as labels of one split and numbers of another; give one "
                         "kind.")
    if words:
        names = names if words <= {*names} else ordered(words)
        number = np.vectorize({c: i for i, c in enumerate(names)}.get, otypes=[np.int64])
        return {s: number(y) for s, y in labels.items()}, names
    plain = [y for y in labels.values() if y.size and y.dtype.kind in "iu"]
    if names and plain and min(y.min() for y in plain) == 1 and max(y.max() for y in plain) == len(names):
        reading.notes.append(f"Labels run from 1 to {len(names)}: the first class name is that of label 1.")
        labels = {s: y - 1 for s, y in labels.items()}
    return labels, names
