"""People's pictures and arrays, in the formats and states they really have, against slow references."""

import hashlib
import io
import os
import shutil
import struct
import threading
import tracemalloc
import zipfile
import zlib
from functools import partial

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from sidae_lib import data, layout, own, pictures
from sidae_lib.config import SidaeError
from tests.sets import encoded, pixels, write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")  # Pillow's


@pytest.fixture(autouse=True)
def root(tmp_path, no_sets):
    """A folder for sets, with the data folder in it."""
    return tmp_path


def smooth(height, width):
    """A picture that survives JPEG: three ramps, no two corners alike."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.stack([255 * x, 255 * y, 128 * (1 - x) + 60 * y], -1).astype(np.uint8)


def load(place, size=8, **more):
    return data.load(str(place), size=size, **more)


def seen(images, split="train") -> np.ndarray:
    """(N, S, S, C)."""
    return images.split(split).images.permute(0, 2, 3, 1).numpy()


def said(images) -> str:
    return " ".join(images.notes)


# --- more than eight bits -------------------------------------------------------------------------------------------


def share(x, black, white):
    return np.rint(255 * (x - black) / (white - black))


WORDS = np.random.default_rng(0).integers(0, 65536, (2, 8, 8)).astype(np.uint16)
WORDS[0, 0, :2] = 0, 65535
FLOATS = WORDS.astype(np.float32) / 65535


@pytest.mark.parametrize("x, kind, black, white, own_range", [
    (WORDS, "PNG", 0, 65535, False),
    (WORDS, "TIFF", 0, 65535, False),
    (WORDS.astype(">u2"), "TIFF", 0, 65535, False),
    (WORDS // 16, "TIFF", 0, 4095, True),  # a microscope's 12 bits
    (WORDS // 1000 + 7, "PNG", 7, 72, True),
    (WORDS.astype(np.int32), "TIFF", 0, 65535, False),
    (WORDS.astype(np.int32) * 30_000, "TIFF", 0, 65535 * 30_000, True),
    (FLOATS, "TIFF", 0, 1, False),
    (FLOATS * 255, "TIFF", 0, 255, False),
    (FLOATS * 12 - 3, "TIFF", -3, 9, True),
    (FLOATS * 0 + 1000, "TIFF", 1000, 1001, True),
])  # fmt: skip
def test_deep_pictures_share_one_range(root, x, kind, black, white, own_range):
    """Of a bright picture in train and another in test, beside one of eight bits, which stays as it is."""
    plain = pixels(8, 8)
    files = {"train/a/0.tif": encoded(x[0], kind), "test/a/1.tif": encoded(x[1], kind), "train/a/2.png": plain}
    images = load(write(root / "s", files), channels=1)
    want = [share(i.astype(np.float64), black, white) for i in x]
    assert np.array_equal(seen(images)[..., 0], [want[0], plain]) and np.array_equal(seen(images, "test")[0, ..., 0], want[1])
    whose = ", the set's own range," if own_range else ""
    assert images.notes[:1] == (f"Pixels from {black:g} to {white:g}{whose} became 0 to 255.",)[:white != 255]


def test_one_hot_pixel_does_not_make_the_rest_black(root):
    x = pixels(2, 120, 120).astype(np.uint16) * 16
    x[0, 5, 5] = 65535
    images = load(write(root / "s", {f"train/a/{i}.tif": encoded(im, "TIFF") for i, im in enumerate(x)}), 120, channels=1)
    assert images.notes == ("Pixels from 0 to 4080, the set's own range, became 0 to 255; up to 65535, the brightest, became "
                            "white.",)  # fmt: skip
    want = np.minimum(x // 16, 255)
    assert np.abs(seen(images)[..., 0] - want.astype(int)).max() <= 1


def test_what_is_no_number_in_a_float_tiff_is_black(root):
    x = FLOATS.copy()
    x[1, 0, :3] = np.nan, np.inf, -np.inf
    got = seen(load(write(root / "s", {f"train/a/{i}.tif": encoded(x[i], "TIFF") for i in range(2)}), channels=1))[1, ..., 0]
    assert got[0, :3].tolist() == [0, 255, 0] and np.array_equal(got[1:], share(x[1, 1:].astype(np.float64), 0, 1))


def png(width, height, bits, colour, rows: bytes) -> bytes:
    """A PNG of a kind that Pillow does not write."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")
    whole = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def rgb48(x: np.ndarray) -> bytes:
    return png(x.shape[1], x.shape[0], 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in x))


def tiff(x: np.ndarray) -> bytes:
    """A big-endian 16-bit RGB TIFF."""
    tags = [(256, 3, 1, x.shape[1] << 16), (257, 3, 1, x.shape[0] << 16), (258, 3, 3, 8 + 2 + 12 * 9 + 4), (259, 3, 1, 1 << 16),
            (262, 3, 1, 2 << 16), (273, 4, 1, 8 + 2 + 12 * 9 + 4 + 6), (277, 3, 1, 3 << 16), (278, 3, 1, x.shape[0] << 16),
            (279, 4, 1, x.size * 2)]  # fmt: skip
    return (b"MM\0*" + struct.pack(">I", 8) + struct.pack(">H", 9) + b"".join(struct.pack(">HHII", *t) for t in tags)
            + bytes(4) + struct.pack(">3H", 16, 16, 16) + x.astype(">u2").tobytes())  # fmt: skip


def test_sixteen_bits_a_colour(root):
    x = pixels(8, 8, 3)
    deep = x.astype(np.uint16) * 256 + 77
    images = load(write(root / "s", {"train/a/0.png": rgb48(deep), "train/a/1.tif": tiff(deep)}))
    assert np.array_equal(seen(images), [x, x])
    assert "dark" in said(load(write(root / "dark", {"train/a/0.png": rgb48(deep // 16), "b/1.png": rgb48(deep // 16)})))


# --- formats and modes ----------------------------------------------------------------------------------------------


def test_what_a_file_holds_counts_not_its_name(root):
    x = [smooth(8, 8) ^ np.uint8(i) for i in range(13)]
    files = [("00.jfif", "JPEG", {}), ("01.gif", "GIF", {}), ("02.webp", "WEBP", {"lossless": True}), ("03.avif", "AVIF", {}),
             ("04.tif", "TIFF", {}), ("05.JPG", "JPEG", {}), ("06", "PNG", {}), ("07.jpg", "PNG", {}), ("08.bmp", "BMP", {}),
             ("09.jp2", "JPEG2000", {}), ("10.ppm", "PPM", {}), ("11.tga", "TGA", {}),
             ("12.jpg", "JPEG", {"progressive": True})]  # fmt: skip
    place = write(root / "s", {f"train/a/{name}": encoded(im, kind, **save) for im, (name, kind, save) in zip(x, files)})
    images = load(place)
    reference = [np.asarray(Image.open(place / "train" / "a" / name).convert("RGB")) for name, _, _ in files]
    assert np.array_equal(seen(images), reference) and images.notes == () and images.left == ()
    lossless = [i for i, (_, kind, _) in enumerate(files) if kind not in ("JPEG", "GIF", "AVIF")]
    assert np.array_equal(seen(images)[lossless], [x[i] for i in lossless])


@pytest.mark.parametrize("mode, kind", [("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("LA", "TIFF"),
                                        ("PA", "TIFF"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "TIFF"), ("LAB", "TIFF"),
                                        ("RGBX", "TIFF"), ("HSV", "PNG")])  # fmt: skip
def test_modes(root, mode, kind):
    """A picture in colour beside one of the mode, as who opens it sees it."""
    x = smooth(8, 8)
    im = {"PA": lambda: Image.fromarray(x).convert("P").convert("PA"), "HSV": lambda: Image.fromarray(x)}.get(
        mode, lambda: Image.fromarray(x).convert(mode))()  # fmt: skip
    got = seen(load(write(root / "s", {"train/a/0.png": x, "train/a/1": encoded(im, kind)})))[1].astype(int)
    want = np.asarray(im.convert("RGB"))
    assert np.abs(got - want).max() <= (60 if kind == "JPEG" else 1)
    assert np.abs(got - want).mean() < (12 if kind == "JPEG" else 0.1)  # inverted ink would be far off


def test_left_out_by_kind_and_name(root):
    x, jpeg = pixels(32, 32, 3), encoded(pixels(64, 64, 3), "JPEG")
    place = write(root / "s", {
        "a/0.png": x, "b/1.png": x, "a/text.jpg": b"no picture", "a/cut.jpg": jpeg[:300], "b/empty.png": b"",
        "b/phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "b/phone2.HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "a/raw.nef": encoded(x, "TIFF"), "a/notes.txt": b"Dear diary,\nP6 is a plot.\n", "b/README": b"read me",
        "b/huge.png": png(10_001, 10_000, 1, 0, bytes(1252 * 10_000)),
        "b/bomb.png": png(20_001, 10_000, 1, 0, bytes(2502 * 10_000)),
        "b/film.mp4": b"\0\0\0\x18ftypmp42"})  # fmt: skip
    images = load(place)
    assert images.notes == (
        "Left out: 3 files, damaged or unreadable (a/cut.jpg, a/text.jpg, b/empty.png).",
        "Left out: 1 file, .txt: not an image (a/notes.txt).",
        "Left out: 1 file, .nef: develop raw photographs to JPEG or TIFF (a/raw.nef).",
        "Left out: 1 file, a file without a suffix: not an image (b/README).",
        "Left out: 2 files, over 100 megapixels (b/bomb.png, b/huge.png).",
        "Left out: 1 file, .mp4: export frames of a video as images (b/film.mp4).",
        "Left out: 2 files, .heic: install pillow-heif (b/phone.heic, b/phone2.HEIC).")
    assert np.array_equal(seen(images, "train"), seen(load(write(root / "t", {"a/0.png": x, "b/1.png": x}))))
    assert sorted(n for _, _, n in images.left) == [1, 1, 1, 1, 2, 2, 3]
    with pytest.raises(SidaeError, match=r"heic has no usable split.*2 .*\.heic: install pillow-heif.*It needs images in"):
        load(write(root / "heic", {f"a/{i}.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" for i in range(2)}))


def test_of_several_frames_the_first_counts(root):
    """An animated GIF, a stack of TIFF pages, an animated WebP; of a phone's MPO the second picture is no frame."""
    frames = [Image.fromarray(smooth(16, 16) // np.uint8(k)) for k in (1, 2, 4)]
    more = {"save_all": True, "append_images": frames[1:]}
    place = write(root / "s", {"train/a/0.gif": encoded(frames[0], "GIF", **more),
                                      "train/a/1.tif": encoded(frames[0], "TIFF", **more),
                               "train/a/2.webp": encoded(frames[0], "WEBP", lossless=True, **more),
                               "b/3.jpg": encoded(frames[0], "MPO", **more)})  # fmt: skip
    images = load(place, 16)
    assert np.abs(seen(images).astype(int) - smooth(16, 16)).mean() < 6
    names = "train/a/0.gif, train/a/1.tif, train/a/2.webp"
    assert images.notes == (f"3 files with several frames, of which the first counts ({names}).",)


# --- transparency ---------------------------------------------------------------------------------------------------


def test_transparent_parts_are_white(root):
    x = smooth(16, 16)
    alpha = np.tile(np.array([0, 80, 200, 255], np.uint8), (16, 4))
    grey = np.asarray(Image.fromarray(x).convert("L"))
    palette = Image.fromarray(x).quantize(4, dither=Image.Dither.NONE)
    index, colours = np.asarray(palette), np.array(palette.getpalette()).reshape(-1, 3)[:4]
    keyed = x.copy()
    keyed[:4] = 9, 9, 9
    files = {"rgba.png": encoded(np.dstack([x, alpha])), "la.png": encoded(np.dstack([grey, alpha])),
             "palette.png": encoded(palette, transparency=bytes([0, 80, 200, 255])),
             "keyed.png": encoded(keyed, transparency=(9, 9, 9)),
             "rgba.webp": encoded(np.dstack([x, alpha]), "WEBP", lossless=True, exact=True)}  # fmt: skip
    over = {"rgba.png": (x, alpha), "la.png": (np.dstack([grey] * 3), alpha), "rgba.webp": (x, alpha),
            "palette.png": (colours[index], np.array([0, 80, 200, 255])[index]),
            "keyed.png": (keyed, np.where((keyed == 9).all(-1), 0, 255))}  # fmt: skip
    images = load(write(root / "s", {f"train/a/{n}": f for n, f in files.items()}), 16)
    for got, name in zip(seen(images), sorted(files)):
        colour, a = over[name]
        want = np.rint(255 - a[..., None] / 255 * (255.0 - colour))
        assert np.abs(got - want).max() <= 1 and np.array_equal(got[(a == 0) | (a == 255)], want[(a == 0) | (a == 255)]), name
    assert images.notes == ("5 files had transparent parts, which are white here.",)


def test_what_is_opaque_is_as_if_without_alpha(root):
    x, grey = pixels(4, 16, 16, 3), pixels(16, 16)
    full = np.full((16, 16), 255, np.uint8)
    plain = load(write(root / "plain", {f"train/a/{i}.png": im for i, im in enumerate([*x, grey])}), 16)
    alpha = load(write(root / "alpha", {f"train/a/{i}.png": np.dstack([im, full]) for i, im in enumerate([*x, grey])}), 16)
    assert alpha.fingerprint == plain.fingerprint and alpha.notes == () and np.array_equal(seen(alpha), seen(plain))


# --- as people see them ---------------------------------------------------------------------------------------------

SHOWN = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
         5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
         8: lambda x: np.rot90(x)}  # EXIF's orientation -> as it is shown


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def exif_last(content: bytes) -> bytes:
    """The same PNG with its EXIF behind the pixels, where some programs write it."""
    at = content.index(b"eXIf") - 4
    end = at + 12 + struct.unpack(">I", content[at:at + 4])[0]
    return content[:at] + content[end:-12] + content[at:end] + content[-12:]


def test_exif_that_is_none_does_no_harm(root):
    x = pixels(9, 8, 3)
    for k, junk in enumerate((b"Exif\0\0garbage", b"x", b"Exif\0\0II*\0\xff\xff\xff\xff")):
        kinds = {"PNG": {}, "WEBP": {"lossless": True}}
        files = {f"train/a/{kind}": encoded(x, kind, exif=junk, **save) for kind, save in kinds.items()}
        images = load(write(root / f"{k}", files | {"train/a/last": encoded(x, "JPEG", exif=junk)}))
        assert images.notes == () and np.array_equal(seen(images)[:2], [x[:8]] * 2)


@pytest.mark.parametrize("orientation", SHOWN)
def test_pictures_are_the_right_way_up(root, orientation):
    x, exif = smooth(48, 32), turned(orientation)
    files = {"0.png": encoded(x, exif=exif), "1.png": exif_last(encoded(x, exif=exif)), "2.tif": encoded(x, "TIFF", exif=exif),
             "3.webp": encoded(x, "WEBP", lossless=True, exif=exif), "4.jpg": encoded(x, "JPEG", quality=95, exif=exif),
             "5.avif": encoded(x, "AVIF", exif=exif)}  # fmt: skip
    images = load(write(root / "s", {f"train/a/{n}": f for n, f in files.items()}), 32)
    shown = SHOWN[orientation](x)
    want = shown[8:40] if len(shown) == 48 else shown[:, 8:40]
    assert images.notes == () and np.array_equal(seen(images)[:4], [want] * 4)
    assert np.abs(seen(images)[4:].astype(int) - want).max() < 12


def test_a_photograph_is_decoded_smaller_but_four_times_as_large_as_wanted(root):
    x = smooth(1100, 1300)
    upright = np.rot90(x, -1)
    files = {"cmyk": encoded(Image.fromarray(x).convert("CMYK"), "JPEG", exif=turned(6)),
             "jpeg": encoded(x, "JPEG", exif=turned(6)), "png": encoded(x, compress_level=1, exif=turned(6)),
             "standing": encoded(upright, "JPEG")}  # fmt: skip
    place = write(root / "s", {f"train/a/{n}": f for n, f in files.items()})
    want = torch.tensor(upright.copy()).permute(2, 0, 1)
    for size in (32, 96):
        images = data.load(str(place), size=size)
        got = images.split("train").images.int()
        fitted = TF.center_crop(TF.resize(want, [size]), [size])
        assert images.notes == () and (got[1:] - fitted).abs().max() <= 5 and (got[0] - fitted).abs().float().mean() < 12
    heads = [layout.File((f,), partial((place / "train" / "a" / f).open, "rb")) for f in files]
    pictures.look(heads, layout.Reading(root, 32, True))
    for head in heads:
        assert head.size == (1100, 1300)
        for size in (32, 96, 137, 138, 224):
            height, width, _ = pictures.decoded(head, "RGB", size, (0, 255)).shape
            assert height > width and (width == 1100 if 8 * size > 1100 else 4 * size <= width <= 550)
    with Image.open(place / "train" / "a" / "standing") as im:
        im.draft(None, (550, 550))  # what a JPEG's decoder itself can do
        assert np.array_equal(pictures.decoded(head, "RGB", 96, (0, 255)), np.asarray(im))


def test_what_is_small_or_narrow_is_decoded_whole(root):
    for width, height in ((999, 1000), (5000, 255)):
        assert pictures.shrinks((width, height), 32) == 1
    assert pictures.shrinks((1000, 1000), 32) > 1


# --- arrays ---------------------------------------------------------------------------------------------------------

X, Y = pixels(6, 8, 8, 3), np.array([0, 1, 2, 0, 1, 2])
X[0, 0, 0] = 0, 255, 128
RGBA = np.concatenate([X, np.full((6, 8, 8, 1), 255, np.uint8)], -1)
GREY = X[..., 0]


@pytest.mark.parametrize("arrays, words", [
    ({"x_train": X, "y_train": Y}, ""),
    ({"X_train": X, "Y_train": Y}, ""),
    ({"images": X, "labels": Y}, ""),
    ({"data": X, "target": Y, "ids": Y}, "Arrays with other names are not read: ids."),
    ({"arr_0": X, "arr_1": Y}, ""),
    ({"train_images": X.transpose(0, 3, 1, 2), "train_labels": Y}, "Images came as N x C x H x W, 6 x 3 x 8 x 8."),
    ({"x": X / 255, "y": Y}, "Pixels from 0 to 1 became 0 to 255."),
    ({"x": (X / 255).astype(np.float32), "y": Y}, "Pixels from 0 to 1 became 0 to 255."),
    ({"x": X / 127.5 - 1, "y": Y}, "Pixels from -1 to 1 became 0 to 255."),
    ({"x": X.astype(np.float32), "y": Y}, ""),
    ({"x": X.astype(np.int64), "y": Y}, ""),
    ({"x": X.astype(np.uint16), "y": Y}, ""),
    ({"x": X.astype(np.uint16) * 257, "y": Y}, "Pixels from 0 to 65535 became 0 to 255."),
    ({"x": X.astype(np.uint16) * 16, "y": Y}, "Pixels from 0 to 4080, the set's own range, became 0 to 255."),
    ({"x": RGBA, "y": Y}, ""),
    ({"x": RGBA.transpose(0, 3, 1, 2) / 255, "y": Y}, "Images came as N x C x H x W, 6 x 4 x 8 x 8."),
    ({"x": X, "y": np.array(list("abc"))[Y]}, ""),
    ({"x": X, "y": np.array([b"a", b"b", "c\u00e9".encode()])[Y]}, ""),
    ({"x": X, "y": np.array(["2", "9", "10"])[Y]}, ""),
    ({"x": X, "y": np.eye(3)[Y]}, "The labels of the train split are rows with a single 1."),
    ({"x": X, "y": np.eye(3, dtype=bool)[Y]}, "The labels of the train split are rows with a single 1."),
    ({"x": X, "y": Y[:, None]}, ""),
    ({"x": X, "y": Y.astype(np.float64)}, ""),
    ({"x": X, "y": Y + 1}, "Not every number is the label of an image: the 3 classes are 1, 2, 3."),
    ({"x": X, "y": Y * 7}, "Not every number is the label of an image: the 3 classes are 0, 7, 14."),
    ({"x": X, "y": Y + 1, "classes": list("abc")}, "Labels run from 1 to 3: the first class name is that of label 1."),
])  # fmt: skip
def test_arrays_of_every_kind_are_the_same_set(root, arrays, words):
    np.savez(root / "s.npz", **arrays)
    images = load(root / "s.npz")
    assert np.array_equal(seen(images), X) and images.split("train").labels.tolist() == Y.tolist()
    assert words in images.notes if words else images.notes == ()
    if words.startswith("Not every"):
        assert images.classes == tuple(map(str, sorted({*arrays["y"].tolist()})))
    elif arrays.get("y", Y).dtype.kind in "US":
        assert images.classes in (("a", "b", "c"), ("a", "b", "c\u00e9"), ("2", "9", "10"))


def test_grey_and_two_valued_arrays(root):
    masks = GREY > 127
    np.savez(root / "s.npz", x_train=masks, y_train=Y > 0, x_test=masks[:, None], y_test=(Y > 0)[:, None])
    images = load(root / "s.npz", channels=1)
    assert np.array_equal(seen(images)[..., 0], 255 * masks) and np.array_equal(seen(images, "test")[..., 0], 255 * masks)
    assert images.split("train").labels.tolist() == [0, 1, 1, 0, 1, 1] == images.split("test").labels.tolist()
    assert images.classes == ("0", "1")


def test_transparent_arrays_are_on_white(root):
    alpha = pixels(6, 8, 8, 1, seed=1)
    np.savez(root / "s.npz", x=np.concatenate([X, alpha], -1), y=Y)
    images = load(root / "s.npz")
    assert np.array_equal(seen(images), np.rint(255 - alpha / 255 * (255.0 - X)))
    assert images.notes == ("The train split has transparent parts, which are white here.",)


def test_one_range_for_all_splits(root):
    np.savez(root / "s.npz", x_train=X / 255, y_train=Y, x_test=X / 510, y_test=Y)
    assert np.array_equal(seen(load(root / "s.npz"), "test"), np.rint(255 * (X / 510)))


def test_arrays_in_files_of_their_own(root):
    """A folder of x_train.npy and the like; one of train.npz and test.npz; pictures whose labels lie beside them."""
    for name, a in (("x_train", X), ("y_train", Y), ("x_test", X[:3]), ("y_test", Y[:3])):
        (root / "npy").mkdir(exist_ok=True)
        np.save(root / "npy" / f"{name}.npy", a)
    (root / "npz").mkdir()
    np.savez(root / "npz" / "train.npz", x=X, y=Y)
    np.savez(root / "npz" / "test.npz", x=X[:3], y=Y[:3])
    (root / "beside").mkdir()
    for name, a in (("cells", X), ("labels", Y), ("other", Y)):
        np.save(root / "beside" / f"{name}.npy", a)
    for place in (root / "npy", root / "npy" / "x_train.npy", root / "npz"):
        images = load(place)
        assert np.array_equal(seen(images), X) and images.split("test").labels.tolist() == [0, 1, 2] and images.notes == ()
    images = load(root / "beside" / "cells.npy")
    assert np.array_equal(seen(images), X) and images.split("train").labels.tolist() == Y.tolist()
    (root / "alone").mkdir()
    np.save(root / "alone" / "cells.npy", X)
    for place in (root / "alone", root / "alone" / "cells.npy"):
        assert np.array_equal(seen(load(place), "unlabeled"), X)


@pytest.mark.parametrize("arrays, sentence", [
    ({"x": X / 255 * 7, "y": Y}, r"pixels from 0 to 7, which is no known scale: they must be numbers from 0 to 1, -1 to 1"),
    ({"x": (X / 255 - 0.45) / 0.22, "y": Y}, r"pixels from -2.0\d+ to 2.5.*; undo a standardisation \(times the deviation"),
    ({"x": np.where(X > 3, X / 255, np.nan), "y": Y}, r"pixels from nan to nan, .* must be numbers"),
    ({"x": pixels(6, 3, 3, 3), "y": Y}, r"shape 6 x 3 x 3 x 3, which can be N x H x W x C or N x C x H x W; store them at"),
    ({"x": X[..., :2], "y": Y}, r"shape \(N, H, W\) or \(N, H, W, 1 or 3\), not uint8 of \(6, 8, 8, 2\)"),
    ({"x": X.reshape(6, -1) / 255, "y": Y}, r"not float64 of \(6, 192\)"),
    ({"x": np.float32(3), "y": Y}, r"not float32 of \(\)"),
    ({"x": pixels(2, 3, 8, 3)}, r"shape 2 x 3 x 8 x 3, which can be"),
    ({"x": X, "y": np.array([[0, 1, 1]] * 6)}, r"6 images but labels of shape \(6, 3\)"),
    ({"x": X, "y": Y[:5]}, r"6 images but labels of shape \(5,\)"),
    ({"x": X, "y": Y / 2}, "integers from 0 to 99,999"),
    ({"x": X, "y": np.where(Y > 0, Y, np.nan)}, "integers from 0 to 99,999"),
    ({"x_train": X, "y_train": np.array(list("abcabc")), "x_test": X, "y_test": Y}, "words as labels of one split and numbers"),
    ({"x": X, "images": X, "y": Y}, "holds the images twice; keep one"),
    ({"x_train": X, "train_images": X, "y": Y}, "holds the train images twice; keep one"),
])  # fmt: skip
@pytest.mark.parametrize("split", ["", "split:"])
def test_what_no_array_says_is_refused(root, arrays, sentence, split):
    np.savez(root / "s.npz", **arrays)
    with pytest.raises(SidaeError, match=sentence) as e:
        load(f"{split}{root / 's.npz'}")
    assert str(e.value).count(". ") == 0  # one sentence


@pytest.mark.parametrize("content", [b"", b"words", np.array([{}])], ids=["empty", "text", "objects"])
def test_a_damaged_npy_is_one_sentence(root, content):
    with (root / "cells.npy").open("wb") as f:
        f.write(content) if isinstance(content, bytes) else np.save(f, content)
    with pytest.raises(SidaeError, match="cells.npy could not be read .*; it must be a whole npz or npy file of plain arrays"):
        load(root / "cells.npy")


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_fingerprints_are_those_they_always_were(root):
    """Literal values, as records of every version hold them."""
    x, g = pixels(6, 12, 10, 3), pixels(6, 12, 10)
    names = ["train/ant/0.png", "train/ant/deep/1.png", "train/ant/deep/er/2.bmp", "train/bee/3.png", "test/bee/4.png",
             "unlabeled/a/5.tif"]  # fmt: skip
    kinds = {"png": "PNG", "bmp": "BMP", "tif": "TIFF"}
    palette = [Image.fromarray(i % 4).convert("P") for i in g]
    for p in palette:
        p.putpalette(pixels(4, 3).ravel().tolist())
    for name, shown in (("grey", g), ("rgb", x), ("palette", palette)):
        write(root / name, {n: encoded(p, kinds[n[-3:]]) for n, p in zip(names, shown)})
    write(root / "flat", {f"train/{'Bee' if i % 2 else 'ant'}/{'img' if i < 3 else 'IMG'}_{i}.png": p for i, p in enumerate(x)})
    np.savez(root / "set.npz", train_images=x, train_labels=Y[:, None] + 1, val_images=g, val_labels=[2] * 6)
    pinned = {root / "grey": "a854e3575180b35c", root / "rgb": "4f5fa0bef83824a8", root / "palette": "4ca60b3b9af3fd6d",
              root / "flat": "7b8290129b45c1dc", root / "set.npz": "7e45ebdb145b9faa"}
    for place, fingerprint in pinned.items():
        for arguments in ({}, {"size": 28, "channels": 1}):
            assert load(place, **arguments).fingerprint == fingerprint, place


@pytest.mark.parametrize("grey", [False, True])
def test_pictures_of_many_sizes_are_named_by_their_pixels_at_32(root, grey):
    """A slow reference; one name at every size, number of channels and way of resizing, by which the set is found."""
    shapes = [(40, 50), (64, 33), (20, 24)]
    x = [pixels(*s, *() if grey else (3,), seed=i) for i, s in enumerate(shapes)]
    place = write(root / "s", {"train/a/0.png": x[0], "train/b/1.png": x[1], "test/b/2.png": x[2]})
    digest, small = hashlib.sha256(), []
    for im in x:
        t = torch.tensor(im.reshape(*im.shape[:2], -1)).permute(2, 0, 1)
        small.append(TF.center_crop(TF.resize(t, [32]), [32]))
    for split, rows, labels in (("train", small[:2], [0, 1]), ("test", small[2:], [1])):
        digest.update(f"{split} uint8 {len(rows)} {1 if grey else 3} 32 32 True ".encode())
        digest.update(torch.stack(rows).numpy().tobytes())
        digest.update(np.array(labels, "<i8").tobytes())
    want = digest.hexdigest()[:16]
    for arguments in ({}, {"size": 28, "channels": 1}, {"size": 96}, {"resize": "bilinear"}, {"channels": 1}):
        images = data.load(str(place), **arguments)
        assert images.fingerprint == want
        assert images.notes[0].startswith("Sizes differ, 24 x 20 to 50 x 40: the shorter side became ")
    assert torch.equal(data.load(str(place)).split("train").images, torch.stack(small[:2]).expand(-1, 3, -1, -1))
    assert data.by_fingerprint(want, size=28, channels=1).split("train").images.shape == (2, 1, 28, 28)
    if grey:
        assert torch.equal(data.load(str(place), channels=1).split("test").images, torch.stack(small[2:]))


def test_a_photograph_has_one_name_at_every_size(root):
    x = smooth(1100, 1000)
    place = write(root / "s", {"train/a/0.jpg": encoded(x, "JPEG"), "train/b/1.jpg": encoded(x[::-1], "JPEG")})
    names = {data.load(str(place), size=s, channels=c).fingerprint for s, c in ((32, 3), (28, 1), (8, 3), (224, 3))}
    assert len(names) == 1 and len(data.by_fingerprint(*names, size=28, channels=1).split("train").images) == 2


@pytest.mark.parametrize("mixed", [False, True])
def test_one_content_has_one_fingerprint(root, mixed):
    """Read twice, moved, copied, zipped, touched, and with names in another case."""
    files = {f"{s}/{c}/{i}.png": pixels(10 + mixed * i, 10, 3, seed=i) for s in ("train", "test") for c in ("ant", "bee")
             for i in range(3)}  # fmt: skip
    place = write(root / "s", files)
    first = load(f"split:{place}").fingerprint
    shutil.copytree(place, root / "copied")
    write(root / "other", {n.upper(): im for n, im in files.items()})
    with zipfile.ZipFile(root / "s.zip", "w") as z:
        for name in files:
            z.write(place / name, f"birds/{name}")
    os.utime(place / "train" / "ant" / "0.png", ns=(1, 1))
    data._load.cache_clear()
    for name in ("s", "copied", "other", "s.zip", "moved"):
        if name == "moved":
            place.rename(root / "moved")
        assert load(f"split:{root / name}").fingerprint == first
        shutil.rmtree(root / "data" / ".cache", ignore_errors=True)


# --- cache ----------------------------------------------------------------------------------------------------------


def cached(root):
    """The file of the one set in the cache; links to it lie beside."""
    file, = (p for p in (root / "data" / ".cache").iterdir() if not p.is_symlink())
    return file


def marked(root) -> None:
    """Writes 77 as the last pixel, where only who reads the cache will see it."""
    with cached(root).open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(bytes([77]))
    data._load.cache_clear()


def test_a_set_is_decoded_once_wherever_it_lies(root):
    x = pixels(4, 8, 8, 3)
    x[..., -1, -1, -1] = 5
    place = write(root / "s", {f"{'ab'[i % 2]}/{i}.png": im for i, im in enumerate(x)})
    load(place)
    marked(root)
    shutil.copytree(place, root / "copied", copy_function=shutil.copyfile)  # with new times
    os.utime(place / "a" / "0.png", ns=(1, 1))
    for name in ("s", "copied", "moved"):
        if name == "moved":
            place.rename(root / "moved")
        for _ in range(2):  # by the content, then by the files' times
            assert seen(load(root / name))[-1, -1, -1, -1] == 77
            data._load.cache_clear()
    write(root / "moved", {"b/3.png": x[0]})
    assert seen(load(root / "moved"))[-1, -1, -1, -1] == 5
    (root / "moved" / "b" / "3.png").rename(root / "moved" / "a" / "3.png")  # the same files, another class
    assert load(root / "moved").split("train").labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("place", [b"words", "nothing", "evil"])
def test_a_damaged_link_is_passed_over(root, place):
    folder = write(root / "s", {f"{c}/{c}.png": np.full((8, 8, 3), 99, np.uint8) for c in "ab"})
    load(folder)
    marked(root)
    link, = (p for p in (root / "data" / ".cache").iterdir() if p.is_symlink())
    link.unlink()
    link.write_bytes(place) if isinstance(place, bytes) else link.symlink_to(place)
    assert seen(load(folder))[-1, -1, -1, -1] == 77 and link.resolve() == cached(root)


def test_two_threads_load_one_set_at_a_time(root):
    place = write(root / "s", {f"{'ab'[i % 2]}/{i}.png": pixels(8 + i % 3, 8, 3, seed=i) for i in range(12)})
    found, start = [], threading.Barrier(2)

    def one():
        start.wait()
        found.append(load(place))

    pool = [threading.Thread(target=one) for _ in range(2)]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    assert np.array_equal(*map(seen, found)) and found[0].fingerprint == found[1].fingerprint == load(place).fingerprint
    assert not list((root / "data" / ".cache").glob("tmp-*"))


def test_nothing_can_be_written(root):
    (root / "data" / ".cache").write_text("a file in the folder's place stops root too")
    place = write(root / "s", {"train/a/0.png": pixels(8, 8, 3), "b/1.png": pixels(9, 8, 3)})
    assert load(place).fingerprint == load(place, size=16).fingerprint


# --- many large photographs -----------------------------------------------------------------------------------------


def test_many_photographs_need_little_memory_and_have_one_order(root, monkeypatch):
    """50 links to four photographs of three megapixels, one of them on its side: 9 MB each if decoded whole."""
    x = smooth(1500, 2000)
    for i in range(4):
        write(root / "src", {f"{i}.jpg": encoded(x ^ np.uint8(i), "JPEG", **({"exif": turned(6)} if i == 3 else {}))})
    for i in range(50):
        (root / "s" / f"class {i % 5}").mkdir(parents=True, exist_ok=True)
        os.link(root / "src" / f"{i % 4}.jpg", root / "s" / f"class {i % 5}" / f"{i:02d}.jpg")
    tracemalloc.start()
    first = load(root / "s", 32)
    peak = tracemalloc.get_traced_memory()[1]  # of numpy's arrays, not of Pillow's pictures
    tracemalloc.stop()
    assert peak < 9e6
    order = [i for c in range(5) for i in range(c, 50, 5)]
    one = [seen(first)[order.index(k)] for k in range(4)]
    assert all(np.array_equal(im, one[i % 4]) for im, i in zip(seen(first), order))
    for cores in (1, 2):
        shutil.rmtree(root / "data" / ".cache")
        data._load.cache_clear()
        monkeypatch.setattr(joblib, "cpu_count", lambda cores=cores: cores)
        assert load(root / "s", 32).fingerprint == first.fingerprint


def test_ahead_keeps_within_its_memory(monkeypatch):
    """In order; what has begun and is not handed on never costs more than MEMORY, unless it is a single one."""
    monkeypatch.setattr(pictures, "MEMORY", 10)
    held, most, lock = [0], [0], threading.Lock()

    def work(cost):
        with lock:
            held[0] += cost
            most[0] = max(most[0], held[0])
        return cost

    costs = [1, 4, 4, 11, 2, 2, 2, 2, 2, 2, 10, 3]
    for cost in pictures.ahead(work, costs, cost=int):
        with lock:
            held[0] -= cost
    assert most[0] <= 11
    assert list(pictures.ahead(work, costs, cost=int)) == costs


# --- damaged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place, mixed, test", [("train/b/03.jpg", False, True), ("train/b/03.jpg", True, False),
                                                ("test/a/00.jpg", False, True), ("test/a/00.jpg", True, True)])  # fmt: skip
def test_what_turns_out_damaged_is_left_out_by_name(root, place, mixed, test):
    """The others are right, each with its own label, and the set is that without the damaged file."""
    noise = {i: pixels(40 + mixed * i % 3, 40, 3) // 8 + np.uint8(5 * i) for i in range(10)}
    files = {f"{s}/{c}/{i:02d}.jpg": encoded(noise[i] + np.uint8(130 * (c == "b")), "JPEG", quality=100)
             for s in ("train", "test")[:1 + test] for c in "ab" for i in range(10)}  # fmt: skip
    cut = files[place][:-300]
    assert Image.open(io.BytesIO(cut)).size == (40, 40)  # its beginning is whole
    whole = {n: f for n, f in files.items() if n != place}
    damaged = load(f"split:{write(root / 's', files | {place: cut})}")
    want = load(f"split:{write(root / 't', whole)}")
    split = place.partition("/")[0]
    assert f"Left out: 1 file, damaged or unreadable ({place})." in damaged.notes
    assert sum(len(s.images) for s in damaged.splits.values()) == len(files) - 1
    for s in damaged.splits.values():
        assert ((s.images[:, 0, 4, 4] >= 105) == s.labels.bool()).all()
    if test:
        assert damaged.fingerprint == want.fingerprint and damaged.left == ((split, "damaged or unreadable", 1),)


def test_nothing_but_damage_is_one_sentence(root):
    cut = encoded(pixels(40, 40, 3), "JPEG")[:-300]
    for k, size in enumerate((40, 41)):
        files = {f"{c}/{i}.jpg": cut for c in "ab" for i in range(2)} | {"b/9.jpg": encoded(pixels(size, 40, 3), "JPEG")[:-300]}
        with pytest.raises(SidaeError, match="the train split holds no images that can be read; add"):
            load(write(root / f"s{k}", files))


# --- what a laboratory, a hospital and a phone bring ----------------------------------------------------------------


def test_a_panorama_and_a_strip_beside_a_photograph(root):
    wide, photo = smooth(300, 5000), smooth(1200, 900)
    images = load(write(root / "s", {"a/0.jpg": encoded(wide, "JPEG"), "b/1.jpg": encoded(photo, "JPEG"),
                                     "b/2.png": smooth(2, 900)}), 32)  # fmt: skip
    for got, x in zip(seen(images), (wide, photo)):
        want = TF.center_crop(TF.resize(torch.tensor(x).permute(2, 0, 1), [32]), [32])
        assert np.abs(got - want.permute(1, 2, 0).numpy().astype(int)).max() <= 5


def test_own_images_as_a_phone_and_a_microscope_give_them(root):
    """The way of the notebook, from a messy folder to the split: nothing is silent."""
    stack = [Image.fromarray(w // 16) for w in WORDS]
    files = {f"{c}/{i}.jpg": encoded(smooth(60, 80), "JPEG", exif=turned(6)) for c in ("cell", "other") for i in range(4)}
    files |= {"cell/stack.tif": encoded(stack[0], "TIFF", save_all=True, append_images=stack[1:]),
              "other/mask.png": encoded(Image.fromarray(GREY[0] > 99))}  # fmt: skip
    name, notes = own.prepare(str(write(root / "s", files)))
    assert notes == (
        "Sizes differ, 8 x 8 to 60 x 80: the shorter side became 32 pixels, then the centre was cut.",
        "1 file with several frames, of which the first counts (cell/stack.tif).",
        f"Pixels from 0 to {WORDS[0].max() // 16}, the set's own range, became 0 to 255.",
        "There is no test split: 2 of 10 images, a fifth of each class, became one.")
    assert len(data.load(name).split("test").images) == 2
