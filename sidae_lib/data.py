"""Image sets as uint8 tensors of one size, named by their content.

A set is found by name or place (`places`), decoded once, and memory-mapped from SIDAE_DATA/.cache from then
on. That folder may be deleted. Results refer to a set by the fingerprint of its decoded arrays, not by name.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from . import paths, pictures, places, reader
from .config import SidaeError
from .layout import Reading, some
from .pictures import SPLITS, Raw
from .places import EMBEDDED, KNOWN, TORCHVISION, TRAINING, is_name, place  # noqa: F401
from .places import find as _find

BLOCK = 2**26  # bytes of pixels that are resized at once
DEFAULT = (pictures.LEAST, 3, "antialias")  # for the fingerprint of images of many sizes, or of large ones
CACHE_FORMAT = 4  # raised when a cache would hold something else for the same files

_published = False  # whether `as_published` is open
_names: dict[str, str] = {}  # fingerprint -> name, of the sets this process has seen


@dataclass(frozen=True)
class Split:
    images: Tensor  # uint8 (N, C, S, S), on the CPU, memory-mapped where it came from a cache
    labels: Tensor | None = None  # int64 (N,)
    folds: Tensor | None = None  # STL-10's train only: int64 (10, 1000), its predefined folds


@dataclass(frozen=True)
class Images:
    """One set at one size. mean, std: per channel, of the training split (else the unlabeled, else the test
    split), for pixels in [0, 1]; rounded, so that they are the same on every machine. notes: sentences on how
    the files were read. left: (split, reason, number) of the files left out."""

    name: str
    display: str
    fingerprint: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: dict[str, Split]
    notes: tuple[str, ...] = ()
    left: tuple[tuple[str, str, int], ...] = ()

    def split(self, name: str) -> Split:
        """Raises SidaeError if the set has no such split."""
        if name not in self.splits:
            raise SidaeError(f"{self.display} has no split {name!r}; it has {', '.join(self.splits)}.")
        return self.splits[name]


def load(name: str, *, size: int = 32, channels: int = 3, resize: str = "antialias", download: bool = False
         ) -> Images:
    """The set called `name`: digits, photos, mnist5k, mnist, fashion_mnist, cifar10, stl10, the stem of an npz in
    SIDAE_DATA, or a place: folder:PATH, npz:PATH, npy:PATH, zip:PATH, parquet:PATH, or the path alone.
    split:PLACE is the same; if it has no test split, a fifth of each class of the training split becomes one.

    The shorter side is resized to `size` bilinearly (with or without antialias), then the centre is cut.
    channels 3: grey is replicated; 1: colour becomes luminance. Raises SidaeError if it cannot be read."""
    if size < 1 or channels not in (1, 3) or resize not in ("antialias", "bilinear"):
        raise SidaeError("Sets load at a size >= 1, with 1 or 3 channels, resize antialias or bilinear, not "
                         f"at {size}, {channels}, {resize!r}.")
    source = _find(name, download)
    if source is None:
        raise places.missing(name)
    images = _load(source, size, channels, resize)
    _names[images.fingerprint] = images.name
    return replace(images, display=display(images.fingerprint))


def identify(name: str, *, download: bool = False) -> str:
    """Fingerprint of the set called `name`. For a known one that is not on this machine: the known one, of
    several that which published records use, so that figures replay without data. Raises as `load` does."""
    known = [f for f, (n, _) in KNOWN.items() if n == name]
    if known and (_published or _find(name, download) is None):
        there = (f for f in known if records_file(f).exists() or records_file(f).with_suffix("").exists())
        return next(there, known[0])
    return load(name, download=download).fingerprint


@contextmanager
def as_published() -> Iterator[None]:
    """While this is open `identify` gives the sets of the published records, whatever lies on this machine."""
    global _published
    before, _published = _published, True
    try:
        yield
    finally:
        _published = before


def records_file(fingerprint: str) -> Path:
    """The first file of published records of the runs on a set, which has the set's name."""
    shown = KNOWN.get(fingerprint, ("", fingerprint))[1]
    return paths.records() / f"{re.sub('[^a-z0-9]+', '-', shown.lower()).strip('-')}.jsonl.gz"


def by_fingerprint(fingerprint: str, **load_kwargs) -> Images:
    """The set with this content: one that this process has seen, an embedded one or any in SIDAE_DATA.
    Arguments as `load`. Raises SidaeError if there is none."""
    expected = _names.get(fingerprint) or KNOWN.get(fingerprint, ("",))[0]
    there = sorted(p.stem for p in paths.data().glob("*.npz"))
    for name in dict.fromkeys((expected, *EMBEDDED, *TORCHVISION, *there)):
        try:
            if _find(name) and (images := load(name, **load_kwargs)).fingerprint == fingerprint:
                return images
        except SidaeError:
            if name == expected:  # a damaged set of another name is not this caller's trouble
                raise
    if expected and _find(expected) is None:
        raise places.missing(expected)
    raise SidaeError(f"No set with the content {display(fingerprint)} is in {paths.data()}: put it there, or "
                     "set SIDAE_DATA to the folder that holds it.")


def sources() -> dict[str, str]:
    """fingerprint -> name of the sets this process has seen, for another to `remember`."""
    return dict(_names)


def remember(sources: dict[str, str]) -> None:
    """Takes over another process's `sources`; what this process has seen itself stays."""
    _names.update(sources | _names)


def display(fingerprint: str) -> str:
    """The name a figure shows for the set with this content."""
    own = Path(places.parted(_names.get(fingerprint, ""))[2])
    name = own.stem if own.suffix in reader.KINDS.values() else own.name
    return KNOWN.get(fingerprint, ("", f"{name} (own copy)" if name else fingerprint))[1]


def subset(n: int, *, fraction: float = 1.0, count: int = 0, seed: int = 0) -> Tensor:
    """Sorted int64 indices of `count` (unless 0) or round(fraction * n) out of n images, drawn uniformly,
    without replacement, not stratified (arXiv:2304.02549, Sec. 4.1). They follow from n, number and seed."""
    if not 0 < fraction <= 1:
        raise SidaeError(f"The share of images must lie in (0, 1], got {fraction}.")
    if not 0 <= count <= n:
        raise SidaeError(f"Cannot draw {count} of {n} images; choose a number from 1 to {n}.")
    number = count or round(fraction * n)
    if number == 0:
        raise SidaeError(f"A share of {fraction} of {n} images leaves none; take a larger one.")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:number].sort().values


# --- decoding ----------------------------------------


def _decode(source: places.Source, size: int, channels: int, resize: str) -> Images:
    reading = Reading(source.path, size, resize == "antialias")
    digest, splits, names = hashlib.sha256(), {}, ()
    for raw in places.read(source, reading):
        before, whole = digest, np.zeros(1, bool)
        while not whole.all():  # else again, without those that turned out to be damaged
            digest = before.copy()
            out = _resized(raw, channels, digest, reading)
            whole = np.array([not f.why for f in getattr(raw.images, "files", ())], bool)
            raw = raw if whole.all() else raw.take(whole, raw.split)
        if out.max() < 64:
            reading.notes.append(f"The {raw.split} split is dark: its brightest pixel is {out.max()} of 255.")
        arrays = out, raw.labels, raw.folds
        splits[raw.split] = Split(*(None if a is None else torch.from_numpy(a) for a in arrays))
        names = raw.classes
    basis = next(splits[s].images for s in ("train", "unlabeled", "test") if s in splits)
    classes, splits = _classes(names, splits, source.path)
    if not names and classes != tuple(map(str, range(len(classes)))):
        reading.notes.append(f"Not every number is the label of an image: the {len(classes)} classes are "
                             f"{some(classes)}.")
    fingerprint = digest.hexdigest()[:16]
    if reading.at_size and (size, channels, resize) != DEFAULT:
        fingerprint = _load(source, *DEFAULT).fingerprint  # one set has one name at every size
    left = Counter((f.split, f.why) for f in reading.files if f.why)
    return Images(source.name, "", fingerprint, classes, *statistics(basis), splits, reading.sentences(),
                  tuple((split, why, n) for (split, why), n in left.items()))


def _resized(raw: Raw, channels: int, digest: "hashlib._Hash", reading: Reading) -> np.ndarray:
    """uint8 (N, channels, size, size); the digest takes in the split as it is given, block by block."""
    (n, h, w, c), size = raw.images.shape, reading.size
    if 0 in (n, h, w):
        raise SidaeError(f"{reading.path}: the {raw.split} split holds no images that can be read; add some.")
    digest.update(f"{raw.split} uint8 {n} {c} {h} {w} {raw.labels is not None} ".encode())
    out = np.empty((n, channels, size, size), np.uint8)
    step = max(1, min(1024, BLOCK // (h * w * c)))
    small = n * h * w * c < BLOCK << 2  # it takes no time, so that a notebook needs no bar
    for i in tqdm(range(0, n, step), raw.split, delay=2, leave=False, disable=small or None):
        block = np.ascontiguousarray(raw.images[i:i + step].transpose(0, 3, 1, 2))
        digest.update(block)
        out[i:i + step] = pictures.fit(torch.from_numpy(block), size, channels, reading.antialias)
    digest.update(b"" if raw.labels is None else raw.labels.astype("<i8"))
    return out


def _classes(names: tuple[str, ...], splits: dict[str, Split], where: Path
             ) -> tuple[tuple[str, ...], dict[str, Split]]:
    """The class names, and the splits with labels that count them. Without names each number that an image
    has is a class, and its name. Labels of an unlabeled split count only if it stands alone."""
    used = {s: 1 + int(p.labels.max()) for s, p in splits.items() if p.labels is not None}
    needed = max((n for s, n in used.items() if s != "unlabeled"), default=0)
    if names and needed > len(names):
        raise SidaeError(f"{where} has the label {needed - 1} but only {len(names)} class names; name all.")
    if not needed and used.get("unlabeled", 0) > len(names):
        names, needed = (), used["unlabeled"]
    if names or not used:
        return names, splits
    numbers = torch.cat([p.labels for p in splits.values() if p.labels is not None]).unique()
    for s, p in splits.items():
        if p.labels is not None:
            splits[s] = replace(p, labels=torch.searchsorted(numbers, p.labels))
    return tuple(str(n) for n in numbers.tolist() if n < needed), splits


def statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 (N, C, S, S), from exact counts of the 256 values."""
    counts = np.stack([torch.bincount(channel.flatten(), minlength=256).numpy() for channel in x.unbind(1)])
    share, value = counts / counts.sum(1, keepdims=True), np.arange(256) / 255  # (C, 256), (256,)
    mean = share @ value
    std = np.sqrt((share * (value - mean[:, None]) ** 2).sum(1))
    std[std < 5e-5] = 1  # a constant channel, which is centred but not scaled
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


# --- cache ----------------------------------------


@lru_cache(maxsize=8)
def _load(source: places.Source, size: int, channels: int, resize: str) -> Images:
    if source.kind == "embedded":
        images = _decode(source, size, channels, resize)
        if KNOWN.get(images.fingerprint, ("",))[0] != source.name:
            raise SidaeError(f"{source.name} is not the set of that name: the package that it is read from holds "
                             "other images; install the versions of requirements.lock.")
        return images
    asked = (CACHE_FORMAT, source.kind, source.split, size, channels, resize)
    link = _cached(asked, source.name, source.stamps)  # files that have not changed are not read again
    if images := _open(source.name, link):
        return images
    file = _cached(asked, _content(source))
    images = _open(source.name, file)
    if images is None:
        images = _decode(source, size, channels, resize)
        _store(images, file)
    with suppress(OSError):
        link.unlink(missing_ok=True)
        link.symlink_to(file.name)
    return _open(source.name, file) or images


def _cached(*identity: object) -> Path:
    return paths.data() / ".cache" / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.safetensors"


def _content(source: places.Source) -> list[tuple[str, str]]:
    """Path within the place and digest of every file: the same for a set that was moved or copied."""
    def digest(path: str) -> str:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    files = [f for f, _, _ in source.stamps]
    names = [os.path.relpath(f, source.path if source.path.is_dir() else source.path.parent) for f in files]
    if source.kind in ("npz", "zip"):
        names = [""]  # the name of another file may be that of a split
    return list(zip(names, pictures.ahead(digest, files, f"{source.path.name}: reading")))


def _open(name: str, file: Path) -> Images | None:
    """The cached set, memory-mapped, or None where the file is not whole."""
    try:
        with safe_open(file, "pt") as f:
            meta, arrays = json.loads(f.metadata()["images"]), {key: f.get_tensor(key) for key in f.keys()}
        splits = {s: Split(*(arrays.get(f"{s}-{a}") for a in ("images", "labels", "folds"))) for s in SPLITS
                  if f"{s}-images" in arrays}
        meta = {k: v if k == "fingerprint" else tuple(v) for k, v in meta.items()}
        return Images(name, "", splits=splits, **meta | {"left": tuple(map(tuple, meta["left"]))})
    except Exception:  # whatever damage does
        return None


def _store(images: Images, file: Path) -> None:
    """Whole or not at all; a folder that cannot be written only costs the next process its time."""
    arrays = {f"{s}-{a}": t for s, split in images.splits.items() for a, t in vars(split).items()}
    arrays = {key: t for key, t in arrays.items() if t is not None}
    meta = {k: getattr(images, k) for k in ("fingerprint", "classes", "mean", "std", "notes", "left")}
    with suppress(OSError, SafetensorError):
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob("tmp-*"):  # of a process that was killed: writing takes seconds
            if time.time() - old.stat().st_mtime > 3600:
                shutil.rmtree(old)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=file.parent) as tmp:
            new = Path(tmp) / "set"
            save_file(arrays, new, {"images": json.dumps(meta)})
            new.chmod(0o644)  # others may use the data folder too
            new.replace(file)
