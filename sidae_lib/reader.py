"""Image files and arrays as people have them -> splits of uint8 images, and words on how they were read.

What a person sees in a file browser is what is trained on: pictures the right way up, on white where they are transparent,
in the classes that folders or a table of labels name. Whatever is left out is said. Pillow decodes pictures, pandas reads
tables, numpy arrays, pyarrow Parquet. Nothing is written or unpickled, and no link that leaves the folder is followed.
"""

import io
import json
import os
import re
import stat
import unicodedata
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as TF
from tqdm.auto import tqdm

from .config import SidaeError
from .layout import LABELS, File, Picture, Row, Told, count, is_hidden, reading, role_among, some, sorted_out

SPLITS = ("train", "test", "unlabeled")  # in the fingerprint's order
KINDS = {"npz": ".npz", "npy": ".npy", "zip": ".zip", "parquet": ".parquet", "folder": ""}  # of places, and their suffix
MODES = {**dict.fromkeys(("1", "L", "LA", "La"), "L"),
         **dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"), "RGB")}  # fmt: skip
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # grey of more than eight bits
ADVICE = {  # suffix -> what to do with files of a kind that Pillow cannot open, or opens as a small preview alone
    **dict.fromkeys((".nef", ".nrw", ".cr2", ".cr3", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"),
                    "develop raw photographs to JPEG or TIFF"),
    **dict.fromkeys((".svs", ".ndpi", ".mrxs", ".scn", ".vsi"), "cut whole slides into tiles"),
    **dict.fromkeys((".czi", ".lif", ".nd2", ".oib", ".dcm", ".nii"), "export as TIFF or PNG"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg"), "export frames of a video as images"),
    **dict.fromkeys((".pdf", ".svg", ".eps", ".ps", ".ai", ".wmf"), "export as PNG"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".rar", ".7z", ".xz", ".bz2"), "unpack it"),
}  # fmt: skip
PACKAGES = {**dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"), ".jxl": "pillow-jxl-plugin"}  # with which Pillow can
NOT_OPENED = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")  # Pillow starts a program for them, or has no decoder
DAMAGED = "damaged or unreadable"
PIXELS = 100_000_000  # of one picture; above is a mistake or a decompression bomb
GIB = 2**30
LARGE = 1_000_000  # pixels from which a picture is reduced while it is decoded
LEAST = 32  # a set has its fingerprint at this size where its pictures are of many sizes or large
MEMORY = 400 * 2**20  # bytes of pictures that are decoded at once

Image.MAX_IMAGE_PIXELS = PIXELS
warnings.filterwarnings("ignore", module="PIL")  # of every odd tag; what matters is said in `Told`
T = TypeVar("T")
R = TypeVar("R")


class Raw(NamedTuple):
    """One split as it was read. images: an array or `Files`, (N, H, W) or (N, H, W, C)."""

    split: str
    images: Any  # an array or `Files`
    labels: np.ndarray | None
    classes: tuple[str, ...]
    folds: np.ndarray | None = None

    def take(self, rows: np.ndarray, split: str) -> "Raw":
        """The rows of a mask, as this split."""
        labels = None if self.labels is None else np.asarray(self.labels)[rows]
        return self._replace(split=split, images=self.images[rows], labels=labels)


def files(kind: str, path: Path) -> list[Path]:
    """Every file that a place of this kind is read from."""
    if kind == "folder":
        return [p for p, parts in _walked(path, Told())[0] if not is_hidden(parts)]
    return sorted(p for p in path.parent.glob("*.npy") if p.is_file()) if kind == "npy" else [path]


def read(kind: str, path: Path, size: int, antialias: bool, told: Told) -> list[Raw]:
    """The splits of a folder, zip, npz, npy or parquet; images of differing sizes are resized to `size`. Raises SidaeError
    where there is not one clear way to read them."""
    given = File((path.name,), partial(path.open, "rb"))
    if kind == "npz":
        return _arrays([given], path, told)
    if kind == "npy":
        return _arrays([File((p.name,), partial(p.open, "rb")) for p in files(kind, path)], path, told)
    if kind == "parquet":
        return _parquet([given], path, size, antialias, told)
    if kind == "zip":
        found, folders = _zipped(path, told)
    else:
        walked, folders = _walked(path, told)
        found = [File(parts, partial(p.open, "rb")) for p, parts in walked]
    return _tree(found, folders, path, size, antialias, told)


def with_test(raws: list[Raw], told: Told) -> list[Raw]:
    """The same; where there is no test split, a fifth of each class of the training split becomes one, at least one image of
    every class of two, drawn with seed 0."""
    train = next((r for r in raws if r.split == "train"), None)
    if train is None or train.labels is None or any(r.split == "test" for r in raws):
        return raws
    labels = np.asarray(train.labels).reshape(len(train.labels))
    test, rng = np.zeros(len(labels), bool), np.random.default_rng(0)
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        test[rows[: max(round(len(rows) / 5), int(len(rows) > 1))]] = True
    if not test.any():
        told.notes.append("There is no test split, and no class has two images to make one.")
        return raws
    told.notes.append(f"There is no test split: {test.sum()} of {len(test)} images, a fifth of each class, became one.")
    return [train.take(~test, "train"), train.take(test, "test"), *(r for r in raws if r.split != "train")]


# --- trees of files -------------------------------------------------------------------------------------------------


def _spelled(name: str) -> str:
    """Composed, as Windows and Linux write letters, and without what cannot be printed."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in unicodedata.normalize("NFC", name))


LINK = "links that lead nowhere or out of the folder"


def _walked(root: Path, told: Told) -> tuple[list[tuple[Path, tuple[str, ...]]], set[tuple[str, ...]]]:
    """(file, its parts), and the parts of every folder. Links are followed to what lies within `root`, unless in a circle."""
    found, folders, home = [], set(), os.path.realpath(root)

    def walk(folder: str | Path, parts: tuple[str, ...], above: tuple[str, ...]) -> None:
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            inner, why = (*parts, _spelled(entry.name)), ""
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if entry.is_symlink() and not (os.path.commonpath((home, real)) == home and os.path.exists(real)):
                why = LINK
            elif not os.access(real, os.R_OK | os.X_OK if entry.is_dir() else os.R_OK):
                why = "which this account may not read"
            elif entry.is_dir():
                if real not in above:
                    folders.add(inner)
                    walk(entry.path, inner, (*above, real))
            elif entry.is_file():
                found.append((Path(entry.path), inner))
            else:
                why = "not plain files"
            if why:
                told.left["", why].append("/".join(inner))

    with reading(f"{root} could not be read", "check that this account may read it"):
        walk(root, (), (home,))
    return found, folders


def _zipped(path: Path, told: Told) -> tuple[list[File], set[tuple[str, ...]]]:
    """The files and folders of a zip, which are read where they are."""
    with reading(f"{path} could not be read", "it must be a whole zip file"):
        archive = zipfile.ZipFile(path)  # open as long as one of its files is wanted
    found, folders, infos = {}, set(), archive.infolist()
    sizes = [(f"{path} holds {i.filename}, which unpacks", i.file_size, i.compress_size) for i in infos]
    for what, size, packed in (*sizes, (f"{path} unpacks", sum(i.file_size for i in infos), path.stat().st_size)):
        if size > GIB and size > 100 * packed:
            raise SidaeError(f"{what} to over a hundred times its size, {size:,} bytes; take it only from who made it.")
    for info in infos:
        name = info.filename
        if not info.flag_bits & 0x800:
            with suppress(UnicodeError):
                name = name.encode("cp437").decode()  # as macOS writes it, without saying so
        parts = tuple(p for p in re.split(r"[/\\]", _spelled(name)) if p not in ("", "."))
        if name.startswith(("/", "\\")) or ".." in parts or re.match("[A-Za-z]:", name):
            raise SidaeError(f"{path} has a member that points outside ({name}); take it only from who made it.")
        if info.flag_bits & 1:
            raise SidaeError(f"{path} is locked with a password; unpack it and give the folder.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            raise SidaeError(f"{path} is packed in a way that Python cannot read; unpack it and give the folder.")
        folders |= {parts[:i] for i in range(1, len(parts))}
        if name.endswith(("/", "\\")):
            folders.add(parts)
        elif stat.S_ISLNK(info.external_attr >> 16):
            told.left["", LINK].append("/".join(parts))
        elif parts:
            found[parts] = File(parts, lambda info=info: io.BytesIO(archive.read(info)))  # of one name the last counts
    return list(found.values()), folders


def _tree(found: list[File], folders: set[tuple[str, ...]], path: Path, size: int, antialias: bool, told: Told) -> list[Raw]:
    """The splits of a tree of files: its pictures, else its Parquet tables, else its arrays."""
    told.left["", "files of the system"] += [f.name for f in found if is_hidden(f.parts)]
    found = sorted((f for f in found if not is_hidden(f.parts)), key=lambda f: f.parts)
    heads = _headers(found, path.name)
    pictures = [h for h in heads if isinstance(h, Picture)]
    others = [(f, h) for f, h in zip(found, heads) if isinstance(h, str)]
    tables = [f for f, _ in others if f.suffix in (".csv", ".tsv")]
    parquets, arrays = ([f for f in found if f.suffix in kinds] for kinds in ((".parquet",), (".npz", ".npy")))
    held, mine, unclear = parquets or arrays, Told(), None
    rows: list[Row] = []
    try:
        rows, used = sorted_out(pictures, folders, tables, path, mine) if pictures else ([], [])
    except SidaeError as e:
        unclear = e
    if held and len({c for _, c, _ in rows}) < 2 and not any(p.file.role for _, _, p in rows):
        told.left["", "beside the tables or arrays"] += [f.name for f in found if f not in held]  # a preview, a README
        return _parquet(held, path, size, antialias, told) if parquets else _arrays(held, path, told)
    if unclear:
        told.take(mine)
        for f, why in others:
            told.left["", why] += [f.name] * (f not in tables)
        told.left.pop(("", "files of the system"))
        raise SidaeError(" ".join([str(unclear), *(t for t in told.sentences() if t.startswith("Left out"))]))
    if not rows:
        kinds = {why: [f for f, w in others if w == why] for why, _ in Counter(why for _, why in others).most_common(3)}
        what = "; ".join(f"{count(files)} ({why})" for why, files in kinds.items()) or "no files"
        raise SidaeError(f"{path} has no usable split: it holds {what}. It needs images in train/<class>/ and test/<class>/, "
                         "in <class>/, or in unlabeled/.")  # fmt: skip
    told.take(mine)
    for f, why in others:
        if f not in used:
            told.left[f.role or "", "not used as labels" if f in tables else why].append(f.name)
    return _raws(rows, path, size, antialias, told, numbers=bool(used))


# --- Parquet --------------------------------------------------------------------------------------------------------


def _parquet(tables: list[File], path: Path, size: int, antialias: bool, told: Told) -> list[Raw]:
    """Tables as Hugging Face writes them: image = {bytes, path} or bytes, label = a number of a class named in the schema."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise SidaeError(f"{path} holds Parquet, and pyarrow, which reads it, is not installed: pip install pyarrow.") from None
    one = Lock()  # two threads at once in a ParquetFile end the process
    todo: list[tuple[str, str | None, File]] = []  # split, class, image
    names: list[str] = []
    for file in tables:
        with reading(f"{path}: {file.name} could not be read", "it must be a whole Parquet file"):
            table = parquet.ParquetFile(file.open())
            schema = table.schema_arrow
            images = [f.name for f in schema if pyarrow.types.is_binary(f.type) or pyarrow.types.is_large_binary(f.type)
                      or pyarrow.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]  # fmt: skip
            others = [f.name for f in schema if f.name not in images]
            labels = [c for c in others if c.casefold() in LABELS] or [c for c in others if "label" in c.casefold()] or others
            if len(images) != 1 or len(labels) > 1:
                raise SidaeError(f"{path}: {file.name} needs one column of images, with the bytes of their files, and one of "
                                 f"labels, called label; it has the columns {some(schema.names)}.")  # fmt: skip
            if labels and labels[0].casefold() not in LABELS:
                told.notes.append(f"The classes of {file.name} are those of its column {labels[0]}.")
            about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
            own = next((about[c]["names"] for c in labels if "names" in about.get(c, {})), [])
            names = names or own
            role = role_among(file.stem) or file.role or "train"

            @lru_cache(maxsize=2)  # a group is read once for all of its images, which come in order
            def group(g: int, table: Any = table, column: str = images[0]) -> list[Any]:
                return table.read_row_group(g, columns=[column]).column(0).to_pylist()

            def content(g: int, i: int, group: Callable[[int], list[Any]] = group) -> BinaryIO:
                with one:
                    cell = group(g)[i]
                return io.BytesIO((cell.get("bytes") if isinstance(cell, dict) else cell) or b"")

            for g in range(table.num_row_groups):
                n = table.metadata.row_group(g).num_rows
                known = table.read_row_group(g, columns=labels).column(0).to_pylist() if labels else [None] * n
                for i, label in enumerate(known):
                    if isinstance(label, float):  # whole numbers, of which one is missing
                        label = int(label) if label.is_integer() else None if label != label else label
                    if isinstance(label, int) and own:
                        label = own[label] if 0 <= label < len(own) else None  # -1: none is known
                    text = None if label is None else str(label)
                    todo.append((role, text, File((*file.parts, f"{g}-{i}"), partial(content, g, i))))
    if not todo:
        raise SidaeError(f"{path} has no usable split: {some(f.name for f in tables)} has no lines.")
    unlabeled = all(text is None for _, text, _ in todo)
    heads = _headers([f for _, _, f in todo], path.name)
    rows: list[Row] = []
    for (role, text, file), head in zip(todo, heads):
        if isinstance(head, str):
            told.left[role, DAMAGED if "not an image" in head else head].append(file.name)
        elif unlabeled or role == "unlabeled":
            rows.append(("unlabeled", None, head))
        elif text is None:
            told.left[role, "without a label"].append(file.name)
        else:
            rows.append((role, text, head))
    if not rows:
        raise SidaeError(f"{path} has no usable split: no image of {some(f.name for f in tables)} can be read.")
    return _raws(rows, path, size, antialias, told, names, numbers=True)


# --- pictures -------------------------------------------------------------------------------------------------------


def _formats() -> list[str]:
    """The formats that Pillow decodes, also with the packages that are installed for it."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401
    return [f for f in Image.OPEN if f not in NOT_OPENED]


def cores() -> int:
    """Those that this process may use."""
    from joblib import cpu_count  # late: it takes long to import

    return cpu_count()


def ahead(f: Callable[[T], R], items: Sequence[T], what: str = "", cost: Callable[[T], int] = lambda _: 0) -> Iterator[R]:
    """f of each item, in order, computed ahead by threads on all cores, as far as the items' costs in bytes fit MEMORY."""
    most = cores()
    with (ThreadPoolExecutor(most) as pool,
          tqdm(total=len(items), desc=what, unit="file", delay=2, leave=False,
               disable=not what or len(items) < 100 or None) as bar):  # fmt: skip
        waiting, begun, held = deque(items), deque[tuple[Future[R], int]](), 0
        try:
            while waiting or begun:
                if waiting and (not begun or len(begun) < 4 * most and held + cost(waiting[0]) <= MEMORY):
                    begun.append((pool.submit(f, waiting[0]), cost(waiting.popleft())))
                    held += begun[-1][1]
                else:
                    future, freed = begun.popleft()
                    yield future.result()
                    held -= freed
                    bar.update()
        finally:
            for future, _ in begun:
                future.cancel()


def _headers(files: list[File], what: str) -> list[Picture | str]:
    """Of each file what its beginning says, or why it is no picture."""
    formats = _formats()

    def header(file: File) -> Picture | str:
        kind = file.suffix or "a file without a suffix"
        if file.suffix in ADVICE:
            return f"{kind}: {ADVICE[file.suffix]}"
        try:
            with file.open() as f, Image.open(f, formats=formats) as im:
                width, height = im.size
                if width * height > PIXELS:
                    return f"over {PIXELS // 10**6} megapixels"
                if im.mode not in MODES and im.mode not in DEEP:
                    return f"pixels of mode {im.mode}"
                with suppress(SyntaxError):  # EXIF that is none; a PNG's may stand behind its pixels, of which large ones wait
                    exif = im.getexif() if width * height < LARGE else Image.Image.getexif(im)
                    if im.format != "TIFF" and exif.get(0x0112) in (5, 6, 7, 8):  # Pillow turns TIFF itself
                        width, height = height, width
                return Picture(file, MODES.get(im.mode, "L"), (width, height), im.mode in DEEP,
                               im.format in ("JPEG", "MPO"), im.format != "MPO" and getattr(im, "is_animated", False))
        except UnidentifiedImageError:
            if file.suffix in PACKAGES:
                return f"{kind}: install {PACKAGES[file.suffix]}"
            return DAMAGED if file.suffix in Image.registered_extensions() else f"{kind}: not an image"
        except Image.DecompressionBombError:
            return f"over {PIXELS // 10**6} megapixels"
        except Exception:  # whatever a decoder raises
            return DAMAGED

    return list(ahead(header, files, f"{what}: looking"))


def fit(x: Tensor, size: int, channels: int, antialias: bool) -> Tensor:
    """uint8 (N, C, H, W) -> uint8 (N, channels, size, size): the shorter side resized, the centre cut."""
    if channels == 1 and x.shape[1] == 3:
        x = TF.rgb_to_grayscale(x)
    x = TF.center_crop(TF.resize(x, [size], antialias=antialias), [size])
    return x.expand(-1, channels, -1, -1)


class Files:
    """uint8 (N, H, W, C) of pictures of one size that decode when sliced, so that large ones never stand in memory all at
    once. damaged: the rows that turned out not to decode; they are 0."""

    dtype = np.dtype(np.uint8)

    def __init__(self, pictures: list[Picture], mode: str, decode: Callable[[Picture], np.ndarray | None]):
        self.pictures, self.mode, self.decode, self.damaged = pictures, mode, decode, set[int]()
        width, height = pictures[0].size if pictures else (0, 0)
        self.shape = (len(pictures), height, width, len(mode))

    def __getitem__(self, part: "slice | np.ndarray") -> "np.ndarray | Files":
        """The pixels of a slice, or the `Files` of a mask."""
        if isinstance(part, np.ndarray):
            return Files([p for p, kept in zip(self.pictures, part) if kept], self.mode, self.decode)
        rows = range(len(self.pictures))[part]
        out = np.zeros((len(rows), *self.shape[1:]), np.uint8)
        for i, pixels in enumerate(ahead(self.decode, self.pictures[part])):
            if pixels is None or pixels.shape != self.shape[1:]:
                self.damaged.add(rows[i])
            else:
                out[i] = pixels
        return out


def _times(size: tuple[int, int], least: int) -> int:
    """How many times smaller a large picture can become and still be four times as large as it is wanted."""
    return min(size) // (4 * least) if size[0] * size[1] >= LARGE else 1


def _pixels(p: Picture, mode: str, least: int, scale: tuple[float, float], told: Told, formats: list[str]) -> np.ndarray | None:
    """uint8 (H, W, 1 or 3) as a person sees it, or None where it is damaged. least: the size that is wanted of a large one; 0:
    its own."""
    times = _times(p.size, least) if least else 1
    try:
        with p.file.open() as f, Image.open(f, formats=formats) as im:
            if times > 1:
                im.draft(None, (4 * least, 4 * least))  # type: ignore[arg-type]  # a JPEG can be decoded at an eighth
            im.load()
            with suppress(SyntaxError):  # of EXIF that is none
                ImageOps.exif_transpose(im, in_place=True)
            seen: Image.Image = im
            if p.deep:
                seen = Image.fromarray(_scaled(np.asarray(im), *scale))
            elif im.has_transparency_data:
                over, seen = im.convert("RGBA"), Image.new("RGB", im.size, "white")
                seen.paste(over, mask=over)
                if over.getextrema()[3][0] < 255:  # type: ignore[index,operator]
                    told.see_through.add(p.file.name)
            seen = seen if seen.mode == mode else seen.convert(mode)
            if times > 1 and (rest := min(seen.size) // (4 * least)) > 1:
                seen = seen.reduce(rest)
            return np.asarray(seen).reshape(seen.height, seen.width, len(mode))
    except MemoryError:
        raise
    except Exception:  # whatever a decoder raises; the caller names the file
        return None


def _scaled(x: np.ndarray, black: float, white: float) -> np.ndarray:
    """uint8: black becomes 0, white 255; what is no number is black."""
    out = np.empty(x.shape, np.uint8)
    for i in range(len(x)):
        share = (x[i].astype(np.float64) - black) / (white - black)
        out[i] = np.rint(255 * np.nan_to_num(share).clip(0, 1))
    return out


def _range(low: float, high: float, bulk: float, ranges: Sequence[tuple[float, float]], told: Told) -> tuple[float, float]:
    """What becomes black and white: the first of these ranges that holds the values, or their own, up to `bulk`, where they use
    less than a quarter of it, which is said. bulk: all but a ten-thousandth of an image's pixels lie below it, so that a single
    hot one does not count."""
    own = low, bulk if bulk > low else low + 1
    black, white = next(((b, w) for b, w in ranges if b <= low and high <= w), own)
    if bulk <= black + (white - black) / 4:
        black, white = own
    if (black, white) != (0, 255):
        whose = "" if (black, white) in ranges else ", the set's own range,"
        brighter = f"; up to {high:g}, the brightest, became white" if white < high else ""
        told.notes.append(f"Pixels from {black:g} to {white:g}{whose} became 0 to 255{brighter}.")
    return black, white


def _raws(rows: list[Row], path: Path, size: int, antialias: bool, told: Told, names: Sequence[str] = (), numbers: bool = False
          ) -> list[Raw]:  # fmt: skip
    """The splits of pictures whose split and class are known. names: of the classes in order, if that is known; numbers:
    classes that are whole numbers stand in their order."""
    if told.validation({s for s, _, _ in rows}):
        rows = [("test" if s == "val" else s, c, p) for s, c, p in rows]
    told.left["val", "validation beside a test split"] += [p.file.name for s, _, p in rows if s == "val"]
    rows = [r for r in rows if r[0] != "val"]
    written = [{c for s, c, _ in rows if c is not None and s == split} for split in ("test", "train")]
    same = all(len({*map(str.casefold, split)}) == len(split) for split in written)  # a set of letters has A and a
    fold: Callable[[Any], str] = (lambda c: str(c).casefold()) if same else str
    known = {fold(c): c for c in (*written[0], *written[1], *names)}  # as the training split writes it
    of_train = {*map(fold, written[1])}
    if of_train and (other := next((r for r in rows if r[0] == "test" and fold(r[1]) not in of_train), None)):
        raise SidaeError(f"{path}: {other[1]} is a class that train/ does not have ({other[2].file.name}); rename or remove "
                         "it.")  # fmt: skip
    classes = tuple(names) or _ordered(known.values(), numbers)
    number = {fold(c): i for i, c in enumerate(classes)}
    pictures = [p for _, _, p in rows]
    sizes, formats = {p.size for p in pictures}, _formats()
    told.at_size = len(sizes) > 1 or any(_times(s, LEAST) > 1 for s in sizes)
    if len(sizes) > 1:
        told.notes.append("Sizes differ, {} to {}: the shorter side became {} pixels, then the centre was cut.".format(
            *(f"{w} x {h}" for w, h in (min(sizes), max(sizes))), size))  # fmt: skip
    if moving := [p.file.name for p in pictures if p.animated]:
        told.notes.append(f"{count(moving)} with several frames, of which the first counts ({some(moving)}).")
    mode = "RGB" if any(p.mode == "RGB" for p in pictures) else "L"
    least, scale = size if told.at_size else 0, _deep(pictures, formats, told)
    decode = partial(_pixels, mode=mode, least=least, scale=scale, told=told, formats=formats)
    out = []
    for split in SPLITS:
        chosen = [(number.get(fold(c), 0), p) for s, c, p in rows if s == split]
        chosen.sort(key=lambda pair: pair[0])  # class by class, in each as they came
        if not chosen:
            continue
        labels = None if split == "unlabeled" else np.array([c for c, _ in chosen])
        raw = Raw(split, Files([p for _, p in chosen], mode, decode), labels, classes)
        out.append(_resized(raw, size, antialias, told, path.name) if told.at_size else raw)
    return out


def _ordered(names: Iterable[str], numbers: bool) -> tuple[str, ...]:
    """Class names in their order: by value where `numbers` may be and all of them are whole numbers."""
    names = list(names)
    numbers = numbers and all(re.fullmatch(r"-?\d+", c) for c in names)
    return tuple(sorted(names, key=lambda c: (int(c) if numbers else 0, c)))


def _deep(pictures: list[Picture], formats: list[str], told: Told) -> tuple[float, float]:
    """What is black and what is white for the pictures of more than eight bits, one range for all of them."""
    def extremes(p: Picture) -> tuple[float, float, float, bool]:
        try:
            with p.file.open() as f, Image.open(f, formats=formats) as im:
                x = np.asarray(im)
                x = x[np.isfinite(x)]
                return float(x.min()), float(x.max()), _bulk(x), x.dtype.itemsize == 2
        except Exception:  # damaged, which decoding will say
            return np.nan, np.nan, np.nan, True

    found = [e for e in ahead(extremes, [p for p in pictures if p.deep], "range of pixels", _cost) if e[0] == e[0]]
    if not found:
        return 0.0, 255.0
    low, high, bulk = min(e[0] for e in found), max(e[1] for e in found), max(e[2] for e in found)
    words = all(e[3] for e in found)  # of 16 bits
    return _range(low, high, bulk, [(0, 65535)] if words else [(0, 1), (0, 255), (0, 65535)], told)


def _bulk(x: np.ndarray) -> float:
    return float(np.quantile(x, 0.9999, method="higher"))


def _resized(raw: Raw, size: int, antialias: bool, told: Told, what: str) -> Raw:
    """The same as an array at `size`, without the damaged ones."""
    files = cast(Files, raw.images)
    out, kept = np.empty((len(files.pictures), len(files.mode), size, size), np.uint8), np.ones(len(files.pictures), bool)
    n = 0
    for i, pixels in enumerate(ahead(files.decode, files.pictures, f"{what}: {raw.split}", _cost)):
        if pixels is None:
            kept[i] = False
            told.left[raw.split, DAMAGED].append(files.pictures[i].file.name)
        else:  # by this thread: torch starts threads of its own for each that calls it
            out[n] = fit(torch.tensor(pixels).permute(2, 0, 1)[None], size, len(files.mode), antialias)[0].numpy()
            n += 1
    return raw._replace(images=out[:n].transpose(0, 2, 3, 1), labels=None if raw.labels is None else raw.labels[kept])


def _cost(p: Picture) -> int:
    """Bytes that decoding takes, about."""
    return p.size[0] * p.size[1] * (3 if p.jpeg else 20 if p.deep else 8)


# --- arrays ---------------------------------------------------------------------------------------------------------

NAMES = ("classes", "class_names", "label_names", "names")
IMAGES = ("images", "image", "imgs", "img", "x", "data", "pixels")


def _key(name: str) -> tuple[str, str] | None:
    """(split or "", images or labels or classes) that an array of this name holds."""
    name = name.casefold()
    words = re.split(r"[_\-. ]+", name)
    if name in NAMES:
        return "", "classes"
    kind = next((kind for kind, known in (("images", IMAGES), ("labels", LABELS)) if {*known} & {*words}), None)
    kind = kind or {"arr_0": "images", "arr_1": "labels"}.get(name)
    return (role_among(name) or "", kind) if kind else None


def _arrays(found: list[File], path: Path, told: Told) -> list[Raw]:
    """The splits of arrays with MedMNIST's keys or the like: train_images, x_test, labels ..."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    arrays: dict[tuple[str, str], np.ndarray] = {}
    keys: list[str] = []
    unknown: list[str] = []

    def take(file: File, name: str, array: Callable[[], np.ndarray]) -> None:
        keys.append(name)
        split, kind = _key(name) or (("", "images") if file.suffix == ".npy" and (file.name == path.name or len(found) == 1)
                                     else ("", ""))  # fmt: skip
        if kind in ("images", "labels") and len(found) > 1:
            split = split or role_among(file.stem) or file.role or ""  # train.npz and test.npz
        if (split, kind) in arrays:
            raise SidaeError(f"{path} holds the {f'{split} {kind}'.strip()} twice; keep one.")
        if kind:
            arrays[split, kind] = np.asarray(array())
        elif file.suffix == ".npz":
            unknown.append(name)

    for file in found:
        with reading(f"{path} could not be read", "it must be a whole npz or npy file of plain arrays, none of objects"):
            if file.suffix == ".npy":
                take(file, file.stem, lambda: np.load(file.open(), allow_pickle=False))  # noqa: B023
                continue
            with np.load(file.open(), allow_pickle=False) as z:
                if bombs := [f"{i.filename} ({i.file_size:,} bytes)" for i in z.zip.infolist() if i.file_size > memory / 2]:
                    raise SidaeError(f"{path} holds {bombs[0]}, more than half of this machine's memory; make it smaller.")
                if outside := [n for n in z.zip.namelist() if n.startswith(("/", "\\")) or ".." in n]:
                    raise SidaeError(f"{path} has a member that points outside ({outside[0]}); take it only from who made it.")
                for name in z.files:
                    take(file, name, lambda: z[name])  # noqa: B023
    if unknown:
        told.notes.append(f"Arrays with other names are not read: {some(unknown)}.")
    if (images := arrays.pop(("", "images"), None)) is not None:  # without a split's name
        labels = arrays.pop(("", "labels"), None)
        split = "unlabeled" if labels is None else "train"
        arrays |= {(split, "images"): images} | ({(split, "labels"): labels} if labels is not None else {})
    if told.validation({s for s, kind in arrays if kind == "images"}):
        arrays |= {("test", kind): arrays["val", kind] for kind in ("images", "labels") if ("val", kind) in arrays}
    splits = [s for s in SPLITS if (s, "images") in arrays]
    if not splits:
        raise SidaeError(f"{path} has no usable split: it needs the arrays train_images, test_images or unlabeled_images with "
                         f"their labels, and holds {some(keys) or 'none'}.")  # fmt: skip
    named = tuple(np.asarray(arrays.get(("", "classes"), [])).astype(str).ravel().tolist())
    x = _bytes({s: _shaped(arrays[s, "images"], f"{path}: the {s} split", told) for s in splits}, path, told)
    y, names = _numbers({s: arrays[s, "labels"] for s in splits if (s, "labels") in arrays}, named, path, told)
    return [Raw(s, x[s], y.get(s), names) for s in splits]


def _shaped(x: np.ndarray, what: str, told: Told) -> np.ndarray:
    """(N, H, W) or (N, H, W, C): channels that come first go last."""
    if x.ndim != 4:
        return x
    first, last = x.shape[1] in (1, 3, 4), x.shape[3] in (1, 3, 4)
    if first and x.shape[1] == x.shape[3] > 1:
        raise SidaeError(f"{what} has images of shape {' x '.join(map(str, x.shape))}, which can be N x H x W x C or "
                         "N x C x H x W; store them at another size.")  # fmt: skip
    if first and not last:
        told.notes.append(f"Images came as N x C x H x W, {' x '.join(map(str, x.shape))}.")
        return np.moveaxis(x, 1, 3)
    return x


def _bytes(held: dict[str, np.ndarray], path: Path, told: Told) -> dict[str, np.ndarray]:
    """uint8 of 1 or 3 channels: other types by the range of all splits together, transparent ones on white."""
    deep = {s: x for s, x in held.items() if x.dtype != np.uint8 and x.dtype.kind in "buif" and x.size and x.ndim in (3, 4)}
    if deep:
        low, high = float(min(x.min() for x in deep.values())), float(max(x.max() for x in deep.values()))
        if not (-1 <= low and (high <= 1 or 255 / 4 < high < np.inf)):  # nor where one is NaN
            undo = "; undo a standardisation (times the deviation, plus the mean)" if low < 0 else ""
            raise SidaeError(f"{path} has pixels from {low:g} to {high:g}, which is no known scale: they must be numbers from "
                             f"0 to 1, -1 to 1 or 0 to 255{undo}.")  # fmt: skip
        bulk = max(_bulk(image) for x in deep.values() for image in x) if high > 255 else high
        scale = _range(low, high, bulk, [(0, 1), (-1, 1), (0, 255), (0, 65535)], told)
        held = held | {s: _scaled(x, *scale) for s, x in deep.items()}
    return {s: _on_white(x, s, told) if x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 4 else x for s, x in held.items()}


def _on_white(x: np.ndarray, split: str, told: Told) -> np.ndarray:
    if (x[..., 3] < 255).any():
        told.notes.append(f"The {split} split has transparent parts, which are white here.")
    out = np.empty((*x.shape[:3], 3), np.uint8)
    for image, over in zip(out, x):
        image[:] = np.rint(255 - over[..., 3:] / 255 * (255.0 - over[..., :3]))
    return out


def _numbers(held: dict[str, np.ndarray], names: tuple[str, ...], path: Path, told: Told
             ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:  # fmt: skip
    """Labels as numbers from 0, and the class names: of words, of rows with a single 1, and of floats that are whole."""
    out = {}
    for split, y in held.items():
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim == 2 and y.dtype.kind in "buif" and np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all():
            y = y.argmax(1)
            told.notes.append(f"The labels of the {split} split are rows with a single 1.")
        if y.dtype.kind == "b" or y.dtype.kind == "f" and y.size and np.isfinite(y).all() and not (y % 1).any():
            y = y.astype(np.int64)
        out[split] = np.char.decode(y, "utf-8", "backslashreplace") if y.dtype.kind == "S" else y
    if any(y.dtype.kind == "U" for y in out.values()):
        if any(y.dtype.kind != "U" for y in out.values()):
            raise SidaeError(f"{path} has words as labels of one split and numbers of another; give one kind.")
        found = {c for y in out.values() for c in y.ravel().tolist()}
        names = names if found <= {*names} else _ordered(found, numbers=True)
        number = {c: i for i, c in enumerate(names)}
        return {s: np.array([number[c] for c in y.ravel().tolist()]).reshape(y.shape) for s, y in out.items()}, names
    plain = [y for y in out.values() if y.size and y.dtype.kind in "iu"]
    if names and plain and min(y.min() for y in plain) == 1 and max(y.max() for y in plain) == len(names):
        told.notes.append(f"Labels run from 1 to {len(names)}: the first class name is that of label 1.")
        out = {s: y - 1 for s, y in out.items()}
    return out, names
