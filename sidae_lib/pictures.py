"""Image files of every format that Pillow opens -> uint8 pixels as a person sees them in a file browser.

That is the right way up, on white where transparent, eight bits where there are more.
"""

import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as TF
from tqdm.auto import tqdm

from .config import SidaeError
from .layout import File, Reading, count, some

SPLITS = ("train", "test", "unlabeled")  # in the fingerprint's order
MODES = {**dict.fromkeys(("1", "L", "LA", "La"), "L"),
         **dict.fromkeys("P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV".split(), "RGB")}
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # grey of more than eight bits
ADVICE = {  # what to do with files that Pillow cannot open, or opens as a small preview -> their suffixes
    "develop raw photographs to JPEG or TIFF": ".nef .nrw .cr2 .cr3 .arw .dng .orf .rw2 .raf .pef .srw",
    "cut whole slides into tiles": ".svs .ndpi .mrxs .scn .vsi",
    "export as TIFF or PNG": ".czi .lif .nd2 .oib .dcm .nii",
    "export frames of a video as images": ".mp4 .mov .avi .mkv .webm .mpg",
    "export as PNG": ".pdf .svg .eps .ps .ai .wmf",
    "unpack it": ".zip .tar .gz .tgz .rar .7z .xz .bz2",
}
ADVICE = {suffix: advice for advice, suffixes in ADVICE.items() for suffix in suffixes.split()}
PACKAGES = dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif") | {".jxl": "pillow-jxl-plugin"}
NOT_OPENED = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")  # Pillow starts a program, or has no decoder
DAMAGED = "damaged or unreadable"
PIXELS = 100_000_000  # of one picture; above is a mistake or a decompression bomb
LARGE = 1_000_000  # pixels from which a picture is reduced while it is decoded
LEAST = 32  # a set has its fingerprint at this size where its pictures are of many sizes or large
MEMORY = 400 * 2**20  # bytes of pictures that are decoded at once

Image.MAX_IMAGE_PIXELS = PIXELS
warnings.filterwarnings("ignore", module="PIL")  # of every odd tag; what matters is said in `Reading`
T = TypeVar("T")
R = TypeVar("R")


def ahead(f: Callable[[T], R], items: Sequence[T], what: str = "", cost: Callable[[T], int] = lambda _: 0
          ) -> Iterator[R]:
    """f of each item in order, computed ahead by threads on all cores as far as costs in bytes fit MEMORY."""
    import joblib  # slow to import

    begun, held, most = deque[tuple[Future[R], int]](), 0, joblib.cpu_count()
    bar = tqdm(items, what, unit="file", delay=2, leave=False, disable=not what or len(items) < 100 or None)
    with ThreadPoolExecutor(most) as pool:
        for item in bar:
            while begun and (len(begun) >= 4 * most or held + cost(item) > MEMORY):
                future, freed = begun.popleft()
                yield future.result()
                held -= freed
            begun.append((pool.submit(f, item), cost(item)))
            held += cost(item)
        for future, _ in begun:
            yield future.result()


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """The formats that Pillow decodes, also with the packages that are installed for it."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401
    return [f for f in Image.OPEN if f not in NOT_OPENED]


def look(files: Iterable[File], reading: Reading) -> None:
    """Reads the beginning of each file: what kind of picture it is, or why it is left out."""
    files = [f for f in files if not f.why]
    for file, why in zip(files, ahead(_look, files, f"{reading.path.name}: looking")):
        file.why = why


def _look(file: File) -> str:
    kind = file.suffix or "a file without a suffix"
    if file.suffix in ADVICE:
        return f"{kind}: {ADVICE[file.suffix]}"
    try:
        with file.open() as f, Image.open(f, formats=_formats()) as im:
            width, height = im.size
            if width * height > PIXELS:
                raise Image.DecompressionBombError
            if im.mode not in MODES and im.mode not in DEEP:
                return f"pixels of mode {im.mode}"
            with suppress(SyntaxError):  # EXIF that is none
                # a PNG's may follow its pixels; of a large one they are not decoded just for that
                exif = im.getexif() if width * height < LARGE else Image.Image.getexif(im)
                if im.format != "TIFF" and exif.get(0x0112) in (5, 6, 7, 8):  # Pillow turns TIFF itself
                    width, height = height, width
            file.mode, file.size = MODES.get(im.mode, "L"), (width, height)
            file.jpeg = im.format in ("JPEG", "MPO")
            file.animated = im.format != "MPO" and getattr(im, "is_animated", False)
            if im.mode in DEEP:
                x = np.asarray(im)
                x = x[np.isfinite(x)]
                file.deep = float(x.min()), float(x.max()), bulk(x), x.dtype.itemsize == 2
            return ""
    except UnidentifiedImageError:
        if file.suffix in PACKAGES:
            return f"{kind}: install {PACKAGES[file.suffix]}"
        return DAMAGED if file.suffix in Image.registered_extensions() else f"{kind}: not an image"
    except Image.DecompressionBombError:
        return f"over {PIXELS // 10**6} megapixels"
    except Exception:  # whatever a decoder raises
        return DAMAGED


def fit(x: Tensor, size: int, channels: int, antialias: bool) -> Tensor:
    """uint8 (N, C, H, W) -> uint8 (N, channels, size, size): the shorter side resized, the centre cut."""
    if channels == 1 and x.shape[1] == 3:
        x = TF.rgb_to_grayscale(x)
    x = TF.center_crop(TF.resize(x, [size], antialias=antialias), [size])
    return x.expand(-1, channels, -1, -1)


def shrinks(size: tuple[int, int], least: int) -> int:
    """How many times smaller a large picture can become and still be four times as large as it is wanted."""
    return min(size) // (4 * least) if size[0] * size[1] >= LARGE else 1


def decoded(p: File, mode: str, least: int, scale: tuple[float, float]) -> np.ndarray | None:
    """uint8 (H, W, 1 or 3) as a person sees it, or None if it is damaged. least: the size that is wanted of a
    large picture; 0: its own. scale: black and white of deep ones."""
    smaller = bool(least) and shrinks(p.size, least) > 1
    try:
        with p.open() as f, Image.open(f, formats=_formats()) as im:
            if smaller:
                im.draft(None, (4 * least, 4 * least))  # a JPEG can be decoded at an eighth
            im.load()
            with suppress(SyntaxError):  # of EXIF that is none
                ImageOps.exif_transpose(im, in_place=True)
            seen: Image.Image = im
            if p.deep:
                seen = Image.fromarray(scaled(np.asarray(im), *scale))
            elif im.has_transparency_data:
                seen, p.see_through = on_white(im)
            seen = seen if seen.mode == mode else seen.convert(mode)
            if smaller:
                seen = seen.reduce(max(1, min(seen.size) // (4 * least)))
            return np.asarray(seen).reshape(seen.height, seen.width, len(mode))
    except MemoryError:
        raise
    except Exception:  # whatever a decoder raises; the caller names the file
        return None


def on_white(im: Image.Image) -> tuple[Image.Image, bool]:
    """The picture in RGB, and whether any of it was transparent."""
    over, seen = im.convert("RGBA"), Image.new("RGB", im.size, "white")
    seen.paste(over, mask=over)
    return seen, over.getextrema()[3][0] < 255


# --- more than eight bits ----------------------------------------


def scaled(x: np.ndarray, black: float, white: float) -> np.ndarray:
    """uint8: black becomes 0, white 255; what is no number is black."""
    out = np.empty(x.shape, np.uint8)
    for i in range(len(x)):
        share = (x[i].astype(np.float64) - black) / (white - black)
        out[i] = np.rint(255 * np.nan_to_num(share).clip(0, 1))
    return out


def bulk(x: np.ndarray) -> float:
    """All but a ten-thousandth of the pixels lie below it, so that a single hot one does not count."""
    return float(np.quantile(x, 0.9999, method="higher"))


Range = tuple[float, float]


def black_and_white(low: float, high: float, most: float, ranges: Sequence[Range], reading: Reading) -> Range:
    """What becomes black and white: the first of these ranges that holds all values, or their own range where
    their `bulk`, which is at most `most`, uses less than a quarter of that."""
    own = low, most if most > low else low + 1
    black, white = next(((b, w) for b, w in ranges if b <= low and high <= w), own)
    if most <= black + (white - black) / 4:
        black, white = own
    if (black, white) != (0, 255):
        whose = "" if (black, white) in ranges else ", the set's own range,"
        brighter = f"; up to {high:g}, the brightest, became white" if white < high else ""
        reading.notes.append(f"Pixels from {black:g} to {white:g}{whose} became 0 to 255{brighter}.")
    return black, white


def _scale(pictures: list[File], reading: Reading) -> tuple[float, float]:
    """Black and white of the pictures of more than eight bits, one range for all of them."""
    deep = [p.deep for p in pictures if p.deep]
    if not deep:
        return 0.0, 255.0
    low, high, most, words = zip(*deep)
    ranges = [(0, 65535)] if all(words) else [(0, 1), (0, 255), (0, 65535)]
    return black_and_white(min(low), max(high), max(most), ranges, reading)


# --- pictures as splits ----------------------------------------


class Raw(NamedTuple):
    """One split as it was read. images: an array or `Pictures`, (N, H, W) or (N, H, W, C)."""

    split: str
    images: Any
    labels: np.ndarray | None
    classes: tuple[str, ...]
    folds: np.ndarray | None = None

    def take(self, rows: np.ndarray, split: str) -> "Raw":
        """The rows of a mask, as this split."""
        labels = None if self.labels is None else self.labels[rows]
        return self._replace(split=split, images=self.images[rows], labels=labels)


def _cost(p: File) -> int:
    """Bytes that decoding takes, about."""
    return p.size[0] * p.size[1] * (3 if p.jpeg else 20 if p.deep else 8)


class Pictures:
    """uint8 (N, H, W, C) of pictures, decoded when they are sliced, so that they are never all in memory. The
    file of a damaged one says so. size: they are resized to it; 0: all have one size. scale: as `decoded`."""

    dtype = np.dtype(np.uint8)

    def __init__(self, files: list[File], mode: str, size: int, antialias: bool, scale: tuple[float, float]):
        self.files, self.about = files, (mode, size, antialias, scale)
        width, height = (size, size) if size or not files else files[0].size
        self.shape = (len(files), height, width, len(mode))

    def __getitem__(self, part: "slice | np.ndarray") -> "np.ndarray | Pictures":
        """The pixels of a slice, or the `Pictures` of a mask."""
        if isinstance(part, np.ndarray):
            return Pictures([f for f, kept in zip(self.files, part) if kept], *self.about)
        files, (mode, size, antialias, scale) = self.files[part], self.about
        out = np.zeros((len(files), *self.shape[1:]), np.uint8)
        for i, pixels in enumerate(ahead(lambda p: decoded(p, mode, size, scale), files, cost=_cost)):
            if pixels is not None and size:  # not in those threads: torch starts more for each that calls it
                x = torch.tensor(pixels).permute(2, 0, 1)[None]
                pixels = fit(x, size, len(mode), antialias)[0].permute(1, 2, 0).numpy()
            if pixels is None or pixels.shape != self.shape[1:]:
                files[i].why = DAMAGED
            else:
                out[i] = pixels
        return out


def splits(files: list[File], reading: Reading, names: Sequence[str] = (), numbers: bool = False
           ) -> list[Raw]:
    """The splits of pictures whose split and class are known. names: of the classes in order, if known.
    numbers: classes that are whole numbers stand in their order."""
    stands = reading.validation({f.split for f in files})
    for f in files:
        if f.split == "val" and stands:
            f.split = "test"
        elif f.split == "val":
            f.why = "validation beside a test split"
    files = [f for f in files if not f.why]
    test, train = ([f for f in files if f.split == split] for split in ("test", "train"))
    written = [{f.label for f in part if f.label is not None} for part in (test, train)]
    same = all(len({*map(str.casefold, labels)}) == len(labels) for labels in written)  # A and a may be two
    fold = str.casefold if same else str
    of_train = {*map(fold, written[1])}
    for f in test if of_train else ():
        if fold(f.label) not in of_train:
            raise SidaeError(f"{reading.path}: {f.label} is a class that train/ does not have ({f.name}); "
                             "rename or remove it.")
    known = {fold(c): c for c in (*written[0], *written[1])}  # as the training split writes it
    classes = tuple(names) if known.keys() <= {*map(fold, names)} else ordered(known.values(), numbers)
    number = {fold(c): i for i, c in enumerate(classes)}
    sizes = {f.size for f in files}
    reading.at_size = len(sizes) > 1 or any(shrinks(s, LEAST) > 1 for s in sizes)
    if len(sizes) > 1:
        least, most = (f"{w} x {h}" for w, h in (min(sizes), max(sizes)))
        became = f"the shorter side became {reading.size} pixels, then the centre was cut"
        reading.notes.append(f"Sizes differ, {least} to {most}: {became}.")
    if moving := [f.name for f in files if f.animated]:
        what = f"{count(len(moving))} with several frames, of which the first counts"
        reading.notes.append(f"{what} ({some(moving)}).")
    mode = "RGB" if any(f.mode == "RGB" for f in files) else "L"
    how = mode, reading.size if reading.at_size else 0, reading.antialias, _scale(files, reading)
    out = []
    for split in SPLITS:
        labelled = [(number.get(fold(f.label or ""), 0), f) for f in files if f.split == split]
        labelled.sort(key=lambda pair: pair[0])  # class by class, in each as they came
        labels = None if split == "unlabeled" else np.array([c for c, _ in labelled])
        out += [Raw(split, Pictures([f for _, f in labelled], *how), labels, classes)] if labelled else []
    return out


def ordered(names: Iterable[str], numbers: bool = True) -> tuple[str, ...]:
    """Class names in their order: by value where `numbers` may be and all of them are whole numbers."""
    names = list(names)
    numbers = numbers and all(re.fullmatch(r"-?\d+", c) for c in names)
    return tuple(sorted(names, key=lambda c: (int(c) if numbers else 0, c)))
