"""Image sets as uint8 tensors of one size, named by their content.

A set is found by name (embedded, in torchvision's own files, or SIDAE_DATA/<name>.npz) or by place (a folder, zip, npz, npy
or Parquet file, which `reader` reads), decoded and resized once and memory-mapped from SIDAE_DATA/.cache afterwards, a folder
that may be deleted at any time. Results refer to a set by the fingerprint of its decoded arrays, never by name or path.
Nothing is unpickled but CIFAR-10's own batches, by torchvision, after it has checked their md5 sums.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from tqdm.auto import tqdm

from . import paths, reader
from .config import SidaeError
from .reader import SPLITS, Raw, Told, reading

TORCHVISION = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10,
               "stl10": datasets.STL10}
KNOWN = {  # fingerprint -> (name, display)
    "42d24bb1f8bd4149": ("digits", "digits"),
    "3e3584b7ff00fc32": ("photos", "photos"),
    "4c3c3722cb5ddee1": ("mnist", "MNIST"),
    "108bcf2de452d970": ("fashion_mnist", "Fashion-MNIST"),
    "131428effbc89b28": ("cifar10", "CIFAR-10 (JPEG copy)"),
    "a194b1f1e8fabeba": ("tinyimagenet32", "Tiny ImageNet 32 (50k)"),
}
TRAINING = {"mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000, "tinyimagenet32": 50_000}  # images of a known set
BLOCK = 2**24  # bytes of pixels that are resized or counted at once
SUFFIX = rf"({'|'.join(s for s in reader.KINDS.values() if s)})$".replace(".", r"\.")
DEFAULT = (reader.LEAST, 3, "antialias")  # at which a set of images of many sizes, or of large ones, has its fingerprint
CACHE_FORMAT = 3  # raised when a cache would hold something else for the same files

_names: dict[str, str] = {}  # fingerprint -> name, of the sets this process has seen


@dataclass(frozen=True)
class Split:
    images: Tensor  # uint8 (N, C, S, S), on the CPU, memory-mapped where it came from a cache
    labels: Tensor | None = None  # int64 (N,)
    folds: Tensor | None = None  # STL-10's train only: int64 (10, 1000), its predefined folds


@dataclass(frozen=True)
class Images:
    """One set at one size. mean, std: per channel of the training split (else the unlabeled, else the test split) for
    pixels in [0, 1], rounded so that they are the same on every machine. notes: how the files were read, in sentences; left:
    (split, reason, number) of the files left out."""

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


def load(name: str, *, size: int = 32, channels: int = 3, resize: str = "antialias", download: bool = False) -> Images:
    """The set called `name`: digits, photos, mnist, fashion_mnist, cifar10, stl10, the stem of an npz in SIDAE_DATA, or a
    place: folder:PATH, npz:PATH, npy:PATH, zip:PATH, parquet:PATH, or the path alone. split:PLACE is the same with a test
    split: where there is none, a fifth of each class of the training split becomes one (seed 0).

    The shorter side is resized to `size` bilinearly (resize: antialias, or bilinear without), then the centre is cut.
    channels 3: grey is replicated; 1: colour becomes luminance. Raises SidaeError if the set is missing or damaged.
    """
    if size < 1 or channels not in (1, 3) or resize not in ("antialias", "bilinear"):
        raise SidaeError(f"Sets load at a size >= 1, with 1 or 3 channels, resize antialias or bilinear; "
                         f"got {size}, {channels}, {resize!r}.")
    source = _find(name, download)
    if source is None:
        raise _missing(name)
    images = _load(source, size, channels, resize)
    _names[images.fingerprint] = images.name
    return replace(images, display=display(images.fingerprint))


def identify(name: str, *, download: bool = False) -> str:
    """Fingerprint of the set called `name`. For a known one that is not on this machine: the known fingerprint, of
    several the one that published records use, so that figures replay without data. Raises as `load` does."""
    known = [f for f, (n, _) in KNOWN.items() if n == name]
    if known and _find(name, download) is None:
        folder = paths.records()
        recorded = _recorded(folder, folder.stat().st_mtime_ns) if folder.is_dir() else ()
        return next((f for f in known if f in recorded), known[0])
    return load(name, download=download).fingerprint


@lru_cache(maxsize=1)  # every figure asks for every set
def _recorded(folder: Path, changed: int) -> set[str]:
    """Fingerprints of the sets that the runs recorded in a folder, last changed then, were trained on."""
    return {json.loads(r.read_text())["config"]["data"] for r in folder.glob("*/record.json")}


def by_fingerprint(fingerprint: str, **load_kwargs) -> Images:
    """The set with this content: one this process has seen, an embedded one or any in SIDAE_DATA; arguments as `load`.
    Raises SidaeError if there is none."""
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
        raise _missing(expected)
    raise SidaeError(f"No set with the content {display(fingerprint)} is in {paths.data()}: put it there, or set "
                     f"SIDAE_DATA to the folder that holds it.")


def sources() -> dict[str, str]:
    """fingerprint -> name of the sets this process has seen, for another to `remember`."""
    return dict(_names)


def remember(sources: dict[str, str]) -> None:
    """Takes over another process's `sources`; what this process has seen itself stays."""
    _names.update(sources | _names)


def display(fingerprint: str) -> str:
    """The name a figure shows for the set with this content."""
    name = _names.get(fingerprint)
    own = fingerprint if name is None else f"{re.sub(SUFFIX, '', Path(_parted(name)[1]).name)} (own copy)"
    return KNOWN.get(fingerprint, ("", own))[1]


def subset(n: int, *, fraction: float = 1.0, count: int = 0, seed: int = 0) -> Tensor:
    """Sorted int64 indices of `count` (unless 0) or round(fraction * n) out of n images, drawn uniformly without
    replacement and not stratified (arXiv:2304.02549, Sec. 4.1): a function of n, the number and the seed alone."""
    if not 0 < fraction <= 1:
        raise SidaeError(f"The share of images must lie in (0, 1], got {fraction}.")
    if not 0 <= count <= n:
        raise SidaeError(f"Cannot draw {count} of {n} images; choose a number from 1 to {n}.")
    number = count or round(fraction * n)
    if number == 0:
        raise SidaeError(f"A share of {fraction} of {n} images leaves none; take a larger one.")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:number].sort().values


# --- where a set is -------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    name: str
    kind: str  # of a place, or the name
    path: Path
    read: Callable[["_Source", int, bool, Told], Iterable[Raw]]
    stamps: tuple[tuple[str, int, int], ...] = ()  # path, size, time of every file


def _stamped(name: str, kind: str, path: Path, read: Callable, files: list[Path]) -> _Source:
    return _Source(name, kind, path, read, tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


def is_name(name: str) -> bool:
    """Whether it is the name of a set that is known or in the data folder, which is no path then."""
    known = {"", *EMBEDDED, *TORCHVISION, *(known for known, _ in KNOWN.values())}
    return name in known or (paths.data() / f"{name}.npz").is_file()


def place(name: str) -> str:
    """What a person gives, in full: the path of a folder or file becomes `kind:PATH`, absolute, since a notebook and a worker
    have other working directories; a set's name passes."""
    kind, path = _parted(name)
    there = paths.absolute(path)
    if not kind and (is_name(name) or not there.exists()):
        return name
    if kind in ("", "split"):
        suffix = there.suffix.lower()
        inner = "folder" if there.is_dir() else next((k for k, s in reader.KINDS.items() if s and s == suffix), "")
        if not inner and there.is_file():
            raise SidaeError(f"{there} is no set of images: give a folder, or a file that ends in "
                             f"{', '.join(filter(None, reader.KINDS.values()))}; unpack other archives, and give the folder of "
                             "an image or of a table.")  # fmt: skip
        kind = f"{kind}:{inner}".strip(":")
    return f"{kind}:{there}" if kind else name


def _parted(name: str) -> tuple[str, str]:
    """The kind of a place and its path, or no kind and the name."""
    found = re.match(rf"((?:split:)?(?:{'|'.join(reader.KINDS)})|split):", name)
    return (found[1], name[found.end():]) if found else ("", name)


def _find(name: str, download: bool = False) -> _Source | None:
    name = place(name)
    kind, path = _parted(name)
    if kind:
        there, inner = Path(path), kind.removeprefix("split:")
        if inner in reader.KINDS and (there.is_dir() if inner == "folder" else there.is_file()):
            return _stamped(name, kind, there, _read_place, reader.files(inner, there))
        return None
    if name in EMBEDDED:
        return _Source(name, name, Path(name), EMBEDDED[name])
    npz = paths.data() / f"{name}.npz"
    if name in TORCHVISION:
        files = _torchvision_files(name)
        if download and not npz.is_file() and not all(f.is_file() for f in files):
            with reading(f"{name} could not be downloaded to {paths.data()}", "check the network and the disk"):
                TORCHVISION[name](paths.data(), download=True)
        if all(f.is_file() for f in files):
            return _stamped(name, name, paths.data(), _read_torchvision, files)
    return _stamped(name, "npz", npz, _read_place, [npz]) if npz.is_file() else None


def _missing(name: str) -> SidaeError:
    kind, path = _parted(place(name))
    if kind:
        return SidaeError(f"There is no {kind.rpartition(':')[2]} {path}; check the path.")
    if name in TORCHVISION:
        absent = next(f for f in _torchvision_files(name) if not f.is_file())
        return SidaeError(f"{name} is not on this machine ({absent} is missing): add --download to fetch it, or set "
                          f"SIDAE_DATA to a folder that has it.")
    return SidaeError(f"There is no data set {name!r}: choose from {', '.join((*EMBEDDED, *TORCHVISION))}, give the path of "
                      f"a folder, zip, npz, npy or Parquet file, or put {name}.npz into {paths.data()}.")


def _torchvision_files(name: str) -> list[Path]:
    cls = TORCHVISION[name]
    if issubclass(cls, datasets.MNIST):
        return [paths.data() / cls.__name__ / "raw" / Path(url).stem for url, _ in cls.resources]
    extra = (cls.folds_list_file, cls.class_names_file) if name == "stl10" else (cls.meta["filename"],)
    return [paths.data() / cls.base_folder / f for f in (*(f for f, _ in cls.train_list + cls.test_list), *extra)]


# --- decoding -------------------------------------------------------------------------------------------------------


def _read_place(source: _Source, size: int, antialias: bool, told: Told) -> list[Raw]:
    test, _, kind = source.kind.rpartition(":")
    raws = [_checked(raw, source.path) for raw in reader.read(kind, source.path, size, antialias, told)]
    return reader.with_test(raws, told) if test else raws


def _digits(*_) -> Iterator[Raw]:
    """scikit-learn's 1,797 digits, 8 x 8, values 0 to 16; stratified 80/20 split, seed 0."""
    from sklearn.datasets import load_digits  # seconds to import
    from sklearn.model_selection import train_test_split

    d = load_digits()
    images = np.rint(d.images * 255 / 16).astype(np.uint8)
    parts = train_test_split(np.arange(len(images)), test_size=0.2, stratify=d.target, random_state=0)
    for split, part in zip(("train", "test"), map(np.sort, parts), strict=True):
        yield Raw(split, images[part], d.target[part], tuple(map(str, d.target_names)))


def _photos(*_) -> Iterator[Raw]:
    """32 x 32 patches at stride 8 of scikit-learn's two sample photographs; the label is the photograph. The left 75 %
    of the width are train, the right 20 % test: overlapping patches never lie in both."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images()
    for split, low, high in (("train", 0.0, 0.75), ("test", 0.8, 1.0)):
        cuts = []
        for im in photos.images:  # (H, W, C)
            im = im[:, round(low * im.shape[1]):round(high * im.shape[1])]
            cut = np.lib.stride_tricks.sliding_window_view(im, (32, 32), axis=(0, 1))[::8, ::8]
            cuts.append(cut.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # (rows, columns, C, H, W) -> (N, H, W, C)
        yield Raw(split, np.concatenate(cuts), np.arange(len(cuts)).repeat(len(cuts[0])),
                   tuple(Path(f).stem for f in photos.filenames))


EMBEDDED = {"digits": _digits, "photos": _photos}


def _read_torchvision(source: _Source, *_) -> Iterator[Raw]:
    cls = TORCHVISION[source.name]
    if issubclass(cls, datasets.MNIST):  # older versions' processed/*.pt would be unpickled in place of raw/
        cls = type(cls.__name__, (cls,), {"_check_legacy_exist": lambda self: False})
    with reading(f"{source.name} in {source.path} could not be read",
                  f"delete {Path(source.stamps[0][0]).parent} and fetch it again with --download"):
        if source.name != "stl10":
            for split in ("train", "test"):
                d = cls(source.path, train=split == "train")
                yield Raw(split, np.asarray(d.data), np.asarray(d.targets), tuple(d.classes))
            return
        folds = np.loadtxt(source.path / cls.base_folder / cls.folds_list_file, np.int64, ndmin=2)
        for split in SPLITS:
            d = cls(source.path, split=split)
            yield Raw(split, d.data.transpose(0, 2, 3, 1), None if split == "unlabeled" else d.labels,
                       tuple(d.classes), folds if split == "train" else None)


def _checked(raw: Raw, where: Path) -> Raw:
    """The same with images (N, H, W, C), C = 1 or 3, and labels int64 (N,); SidaeError on anything else."""
    what, images, labels = f"{where}: the {raw.split} split", raw.images, raw.labels
    if len(images.shape) == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[3] not in (1, 3):
        raise SidaeError(f"{what} must hold uint8 images of shape (N, H, W) or (N, H, W, 1 or 3), not {images.dtype} "
                         f"of {images.shape}; convert them to 8-bit grey or RGB.")
    if 0 in images.shape:
        raise SidaeError(f"{what} holds no images that can be read; add some or leave it out.")
    n = images.shape[0]
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape not in ((n,), (n, 1)):
            raise SidaeError(f"{what} has {n} images but labels of shape {labels.shape}; every image needs one label.")
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= 100_000:
            raise SidaeError(f"{what} must have labels that are integers from 0 to 99,999; number the classes from 0.")
        labels = labels.reshape(n).astype(np.int64)
    if raw.folds is not None and (raw.folds.ndim != 2 or raw.folds.min() < 0 or raw.folds.max() >= n):
        raise SidaeError(f"{what} has folds that are not lines of indices below {n}; fetch the set again.")
    return raw._replace(images=images, labels=labels)


def _classes(names: tuple[str, ...], splits: dict[str, Split], where: Path) -> tuple[tuple[str, ...], dict[str, Split]]:
    """The class names, or numbers where there are none, and the splits; an unlabeled split's labels count only if it stands
    alone. A number that has neither an image in any split nor a name is no class: those above it move down, and each class
    keeps its own number as its name. What grows with the number of classes, or its square, then does so with those there are.
    """
    used = {s: 1 + int(p.labels.max()) for s, p in splits.items() if p.labels is not None}
    needed = max((n for s, n in used.items() if s != "unlabeled"), default=0)
    if names and needed > len(names):
        raise SidaeError(f"{where} has the label {needed - 1} but only {len(names)} class names; name every class.")
    if not needed and used.get("unlabeled", 0) > len(names):
        names, needed = (), used["unlabeled"]
    if names or not used:
        return names, splits
    numbers = torch.cat([p.labels for p in splits.values() if p.labels is not None]).unique()
    splits = {s: p if p.labels is None else replace(p, labels=torch.searchsorted(numbers, p.labels)) for s, p in splits.items()}
    return tuple(str(n) for n in numbers.tolist() if n < needed), splits


def _statistics(x: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 (N, C, S, S), from exact counts of the 256 values."""
    counts = sum(np.stack([np.bincount(channel.ravel(), minlength=256) for channel in block.swapaxes(0, 1)])
                 for block in np.array_split(x, x.nbytes // BLOCK + 1))
    share, value = counts / counts.sum(1, keepdims=True), np.arange(256) / 255  # (C, 256), (256,)
    mean = share @ value
    std = np.sqrt((share * (value - mean[:, None]) ** 2).sum(1))
    std[std < 5e-5] = 1  # a constant channel, which is centred but not scaled
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def _decode(source: _Source, size: int, channels: int, resize: str) -> Images:
    digest, splits, names, told, antialias = hashlib.sha256(), {}, (), Told(), resize == "antialias"
    for raw in source.read(source, size, antialias, told):  # of large ones a split at a time
        while True:  # again without those that turned out to be damaged
            raw, so_far = _checked(raw, source.path), digest.copy()
            out = _resized(raw, size, channels, antialias, so_far)
            if not (damaged := getattr(raw.images, "damaged", ())):
                break
            told.left[raw.split, reader.DAMAGED] += [raw.images.pictures[i].file.name for i in sorted(damaged)]
            raw = raw.take(~np.isin(np.arange(len(out)), list(damaged)), raw.split)
        digest = so_far
        if out.max() < 64:
            told.notes.append(f"The {raw.split} split is dark: its brightest pixel is {out.max()} of 255.")
        splits[raw.split] = Split(*(None if a is None else torch.from_numpy(a) for a in (out, raw.labels, raw.folds)))
        names = raw.classes
    basis = next(splits[s].images for s in ("train", "unlabeled", "test") if s in splits)
    classes, splits = _classes(names, splits, source.path)
    if not names and classes != tuple(map(str, range(len(classes)))):
        told.notes.append(f"Not every number is the label of an image: the {len(classes)} classes are {reader.some(classes)}.")
    fingerprint = digest.hexdigest()[:16]
    if told.at_size and (size, channels, resize) != DEFAULT:
        fingerprint = _load(source, *DEFAULT).fingerprint  # one set has one name at every size
    return Images(source.name, "", fingerprint, classes, *_statistics(basis.numpy()), splits, told.sentences(),
                  tuple((s, why, len(files)) for (s, why), files in told.left.items() if files))  # fmt: skip


def _resized(raw: Raw, size: int, channels: int, antialias: bool, digest: "hashlib._Hash") -> np.ndarray:
    """uint8 (N, channels, size, size); the digest takes in the split as it is given, block by block."""
    n, h, w, c = raw.images.shape
    digest.update(f"{raw.split} uint8 {n} {c} {h} {w} {raw.labels is not None} ".encode())
    whole = raw.images.transpose(0, 3, 1, 2) if isinstance(raw.images, np.ndarray) else None
    if whole is not None and whole.flags.c_contiguous and whole.shape[1:] == (channels, size, size):
        digest.update(out := whole)  # as `reader` resized it
    else:
        out, step = np.empty((n, channels, size, size), np.uint8), max(reader.cores(), BLOCK // (h * w * c))
        for i in tqdm(range(0, n, step), desc=raw.split, delay=2, leave=False, disable=n * h * w * c < 2**28 or None):
            block = np.ascontiguousarray(raw.images[i:i + step].transpose(0, 3, 1, 2))
            digest.update(block)
            out[i:i + step] = reader.fit(torch.from_numpy(block), size, channels, antialias)
    digest.update(b"" if raw.labels is None else raw.labels.astype("<i8"))
    return out


# --- cache ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _load(source: _Source, size: int, channels: int, resize: str) -> Images:
    if source.name in EMBEDDED:
        return _decode(source, size, channels, resize)
    cache, asked = paths.data() / ".cache", (CACHE_FORMAT, source.kind, size, channels, resize)
    seen = cache / f"{_short(repr((asked, source.name, source.stamps)))}.key"  # files that have not changed are not read again
    with suppress(OSError):
        pointer = seen.read_text(errors="replace")
        if re.fullmatch("[0-9a-f]{16}", pointer) and (cached := _open(source.name, cache / pointer)):
            return cached
    folder = cache / _short(repr((asked, _content(source))))
    images = _open(source.name, folder)
    if images is None:
        images = _decode(source, size, channels, resize)
        _store(images, folder)
    with suppress(OSError):
        seen.write_text(folder.name)
    return _open(source.name, folder) or images


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(source: _Source) -> list[tuple[str, str]]:
    """Path within the place and digest of every file: the same for a set that was moved or copied."""
    def digest(path: str) -> str:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    files = [f for f, _, _ in source.stamps]
    whole = (".npz", ".zip")  # the name of other files may be that of a split
    names = [os.path.relpath(f, source.path) if source.path.is_dir() else Path(f).name * (Path(f).suffix not in whole)
             for f in files]  # fmt: skip
    return list(zip(names, reader.ahead(digest, files, f"{source.path.name}: reading")))


def _open(name: str, folder: Path) -> Images | None:
    """The cached set, memory-mapped, or None where the folder does not hold a whole one."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {s: Split(**{a: torch.from_numpy(np.load(folder / f"{s}-{a}.npy", mmap_mode="c")) for a in arrays})
                  for s, arrays in meta["splits"].items()}
        left = tuple((s, why, n) for s, why, n in meta["left"])
        return Images(name, "", meta["fingerprint"], *(tuple(meta[k]) for k in ("classes", "mean", "std")), splits,  # type: ignore[call-arg]
                      tuple(meta["notes"]), left)  # fmt: skip
    except Exception:  # whatever damage does
        return None


def _store(images: Images, folder: Path) -> None:
    """Whole or not at all; a folder that cannot be written only costs the next process its time."""
    arrays = {s: {a: t.numpy() for a, t in vars(p).items() if t is not None} for s, p in images.splits.items()}
    meta = {k: getattr(images, k) for k in ("fingerprint", "classes", "mean", "std", "notes", "left")}
    with suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.glob("tmp-*"):  # of a process that was killed: writing one takes seconds, not an hour
            if time.time() - old.stat().st_mtime > 3600:
                shutil.rmtree(old)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder.parent) as tmp:
            new = Path(tmp) / "set"
            new.mkdir()
            for s, part in arrays.items():
                for a, array in part.items():
                    np.save(new / f"{s}-{a}.npy", array)
            (new / "meta.json").write_text(json.dumps(meta | {"splits": {s: list(p) for s, p in arrays.items()}}))
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one: `_open` has refused it
            new.rename(folder)
