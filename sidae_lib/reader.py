"""A place with image files or arrays as people have them -> splits of images, and words on how it was read.

Pillow decodes pictures, pandas reads tables, numpy arrays, pyarrow Parquet. What is left out is said.
Nothing is written or unpickled, and no link that leaves the folder is followed.
"""

import io
import json
import os
import re
import stat
import unicodedata
import zipfile
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np

from . import arrays, pictures, tables
from .config import SidaeError
from .layout import LABELS, File, Reading, count, one_sentence, role_among, some
from .pictures import Raw

KINDS = {"npz": ".npz", "npy": ".npy", "zip": ".zip", "parquet": ".parquet", "folder": ""}  # place -> suffix
SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\ufffd", "@eadir", "#recycle",
          "$recycle.bin", "__pycache__", "system volume information", "lost+found"}
OF_SYSTEM = "files of the system"
LINK = "links that lead nowhere or out of the folder"
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)  # Python can unpack
GIB = 2**30


Folders = set[tuple[str, ...]]


def look(kind: str, path: Path) -> tuple[list[File], Folders, list[str]]:
    """The files in a place, the parts of all its folders, and what is read on the disk. Opens no file."""
    if kind == "folder":
        with one_sentence(f"{path} could not be read", "check that this account may read it"):
            return _walked(path)
    paths = sorted(path.parent.glob("*.npy")) if kind == "npy" else [path]
    return [File((p.name,), partial(open, p, "rb")) for p in paths], set(), [str(p) for p in paths]


def read(kind: str, reading: Reading) -> list[Raw]:
    """The splits of a place. Raises SidaeError where there is not one clear way to read it."""
    if kind == "zip":
        reading.files, reading.folders = _zipped(reading.path)
    # a copy, since the same files may be read again
    reading.files = [replace(f) for f in sorted(reading.files, key=lambda f: f.parts)]
    reading.folders = {f for f in reading.folders if not _hidden(f)}
    ways = {"npz": arrays.read, "npy": arrays.read, "parquet": _parquet}
    return ways.get(kind, _tree)(reading.files, reading)


def with_test(raws: list[Raw], reading: Reading) -> list[Raw]:
    """The same; without a test split a fifth of each class of the training split becomes one, at least one
    image of every class of two, drawn with seed 0."""
    splits = {raw.split: raw for raw in raws}
    train = splits.get("train")
    if train is None or train.labels is None or "test" in splits:
        return raws
    test, rng = np.zeros(len(train.labels), bool), np.random.default_rng(0)
    for c in np.unique(train.labels):
        rows = rng.permutation(np.flatnonzero(train.labels == c))
        test[rows[: max(round(len(rows) / 5), int(len(rows) > 1))]] = True
    if not test.any():
        reading.notes.append("There is no test split, and no class has two images to make one.")
        return raws
    became = f"{test.sum()} of {len(test)} images, a fifth of each class, became one"
    reading.notes.append(f"There is no test split: {became}.")
    return [train.take(~test, "train"), train.take(test, "test"), *(r for r in raws if r.split != "train")]


# --- trees of files ----------------------------------------


def _spelled(name: str) -> str:
    """Composed, as Windows and Linux write letters, and without what cannot be printed."""
    composed = unicodedata.normalize("NFC", name)
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in composed)


def _hidden(parts: tuple[str, ...]) -> bool:
    """Whether it is of the system, and a file browser does not show it as the person's."""
    return any(p[0] == "." or p.casefold() in SYSTEM for p in parts)


def _walked(root: Path) -> tuple[list[File], Folders, list[str]]:
    """As `look`. Links are followed to what lies within `root`, unless in a circle."""
    files, folders, paths, home = [], set(), [], os.path.realpath(root)

    def walk(folder: str, parts: tuple[str, ...], above: tuple[str, ...]) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            inner, link, why = (*parts, _spelled(entry.name)), entry.is_symlink(), ""
            real = os.path.realpath(entry.path) if link else os.path.join(above[-1], entry.name)
            lost = link and not (os.path.commonpath((home, real)) == home and os.path.exists(real))
            is_folder = not lost and entry.is_dir()
            if lost:
                why = LINK
            elif not os.access(real, os.R_OK | os.X_OK if is_folder else os.R_OK):
                why = "which this account may not read"
            elif not is_folder and not entry.is_file():
                why = "not plain files"
            if why or not is_folder:
                why = OF_SYSTEM if _hidden(inner) else why
                files.append(File(inner, partial(open, entry.path, "rb"), why=why))
                paths.extend([] if why else [entry.path])
            elif real not in above:
                folders.add(inner)
                walk(entry.path, inner, (*above, real))

    walk(str(root), (), (home,))
    return files, folders, paths


def _zipped(path: Path) -> tuple[list[File], Folders]:
    """The files and folders of a zip, which are read where they are."""
    with one_sentence(f"{path} could not be read", "it must be a whole zip file"):
        archive = zipfile.ZipFile(path)  # open as long as one of its files is wanted
    infos = archive.infolist()
    arrays.inside(archive.namelist(), path)
    sizes = [(f"{path} holds {i.filename}, which unpacks", i.file_size, i.compress_size) for i in infos]
    sizes.append((f"{path} unpacks", sum(i.file_size for i in infos), path.stat().st_size))
    for what, size, packed in sizes:
        if size > max(GIB, 100 * packed):
            what += f" to over a hundred times its size, {size:,} bytes"
            raise SidaeError(f"{what}; take it only from who made it.")
    files, folders = {}, set()
    for info in infos:
        if info.flag_bits & 1 or info.compress_type not in PACKED:
            how = "locked with a password" if info.flag_bits & 1 else "packed in a way Python cannot read"
            raise SidaeError(f"{path} is {how}; unpack it and give the folder.")
        name = info.filename
        if not info.flag_bits & 0x800:
            with suppress(UnicodeError):
                name = name.encode("cp437").decode()  # as macOS writes it, without saying so
        parts = tuple(p for p in re.split(r"[/\\]", _spelled(name)) if p not in ("", "."))
        is_folder = name.endswith(("/", "\\"))
        folders |= {parts[:i] for i in range(1, len(parts) + is_folder)}
        if parts and not is_folder:  # of one name the last counts
            why = OF_SYSTEM if _hidden(parts) else ""
            why = LINK if stat.S_ISLNK(info.external_attr >> 16) else why
            files[parts] = File(parts, lambda info=info: io.BytesIO(archive.read(info)), why=why)
    return list(files.values()), folders


def _tree(files: list[File], reading: Reading) -> list[Raw]:
    """The splits of a tree of files: its pictures, else its Parquet tables, else its arrays."""
    files = [f for f in files if not f.why]
    pictures.look(files, reading)
    images = [f for f in files if not f.why]
    sheets = [f for f in files if f.suffix in (".csv", ".tsv")]
    held = [f for f in files if f.suffix == ".parquet"] or [f for f in files if f.suffix in (".npz", ".npy")]
    unclear, used = None, []
    try:
        used = tables.sort_out(images, sheets, reading) if images else []
    except SidaeError as e:
        unclear = e
    rows = [f for f in images if f.split and not f.why and not unclear]
    if held and len({f.label for f in rows}) < 2 and not any(f.role for f in rows):
        reading.notes.clear()
        for f in files:
            f.why = "" if f in held else "beside the tables or arrays"  # a preview, a README
        return (_parquet if held[0].suffix == ".parquet" else arrays.read)(held, reading)
    for f in sheets:
        f.why = "" if unclear or f in used else "not used as labels"
    if unclear:
        left = [sentence for sentence in reading.left() if OF_SYSTEM not in sentence]
        raise SidaeError(" ".join([str(unclear), *left]))
    if not rows:
        kinds = Counter(f.why for f in files if f.why).most_common(3)
        what = "; ".join(f"{count(n)} ({why})" for why, n in kinds) or "no files"
        raise SidaeError(f"{reading.path} has no usable split: it holds {what}. It needs images in "
                         "train/<class>/ and test/<class>/, in <class>/, or in unlabeled/.")
    for f in files:
        if f.why and f not in images:
            f.split = f.role or ""
    return pictures.splits(rows, reading, numbers=bool(used))


# --- Parquet ----------------------------------------


def _parquet(files: list[File], reading: Reading) -> list[Raw]:
    """Tables as Hugging Face writes them: an image is {bytes, path} or bytes, the schema names classes."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise SidaeError(f"{reading.path} holds Parquet, and pyarrow, which reads it, is not installed: "
                         "pip install pyarrow.") from None
    one = Lock()  # two threads at once in a ParquetFile end the process

    @lru_cache(maxsize=2)  # a group is read once for all of its images, which come in order
    def group(table: Any, column: str, g: int) -> list[Any]:
        return table.read_row_group(g, columns=[column]).column(0).to_pylist()

    def content(table: Any, column: str, g: int, i: int) -> BinaryIO:
        with one:
            cell = group(table, column, g)[i]
        return io.BytesIO((cell.get("bytes") if isinstance(cell, dict) else cell) or b"")

    rows: list[File] = []
    names: list[str] = []
    for file in files:
        what = f"{reading.path}: {file.name}"
        with one_sentence(f"{what} could not be read", "it must be a whole Parquet file"):
            table = parquet.ParquetFile(file.open())
            image, label, own = _columns(table.schema_arrow, what)
            if label and label.casefold() not in LABELS:
                reading.notes.append(f"The classes of {file.name} are those of its column {label}.")
            names, split = names or own, role_among(file.stem) or file.role or "train"
            for g in range(table.num_row_groups):
                known = table.read_row_group(g, columns=[label]).column(0).to_pylist() if label else []
                for i in range(table.metadata.row_group(g).num_rows):
                    row = (*file.parts, f"{g}-{i}"), partial(content, table, image, g, i), split
                    rows.append(File(*row, _text(known[i], own) if label else None))
    reading.files = reading.files + rows
    held = some(f.name for f in files)
    if not rows:
        raise SidaeError(f"{reading.path} has no usable split: {held} has no lines.")
    pictures.look(rows, reading)
    unlabeled = all(f.label is None for f in rows)
    for f in rows:
        if "not an image" in f.why:
            f.why = pictures.DAMAGED
        if unlabeled or f.split == "unlabeled":
            f.split, f.label = "unlabeled", None
        elif f.label is None:
            f.why = f.why or "without a label"
    rows = [f for f in rows if not f.why]
    if not rows:
        raise SidaeError(f"{reading.path} has no usable split: no image of {held} can be read.")
    return pictures.splits(rows, reading, names, numbers=True)


def _columns(schema: Any, what: str) -> tuple[str, str, list[str]]:
    """The column of images, that of labels or "", and the names of the classes in order."""
    from pyarrow import types

    images, others = [], []
    for f in schema:
        is_struct = types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0
        is_bytes = is_struct or types.is_binary(f.type) or types.is_large_binary(f.type)
        (images if is_bytes else others).append(f.name)
    known = [c for c in others if c.casefold() in LABELS]
    labels = known or [c for c in others if "label" in c.casefold()] or others
    if len(images) != 1 or len(labels) > 1:
        raise SidaeError(f"{what} needs one column of images, with the bytes of their files, and one of "
                         f"labels, called label; it has the columns {some(schema.names)}.")
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    label = "".join(labels)
    return images[0], label, about.get(label, {}).get("names", [])


def _text(label: Any, names: list[str]) -> str | None:
    """A label as the name of its class, or None where none is known."""
    if isinstance(label, float) and label.is_integer():  # pandas writes whole numbers so where one is missing
        label = int(label)
    if isinstance(label, int) and names:
        return names[label] if 0 <= label < len(names) else None
    return None if label is None or label != label else str(label)
