"""Image sets in files, as people have them: what the tests of `data` and of its readers build from."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(im, kind="PNG", **save) -> bytes:
    with io.BytesIO() as f:
        (im if isinstance(im, Image.Image) else Image.fromarray(im)).save(f, kind, **save)
        return f.getvalue()


def content(what) -> bytes:
    """A file's: of a number a PNG that is known by its grey, of an array or picture a PNG, of words and bytes themselves."""
    if isinstance(what, int):
        what = np.full((4, 4), what, np.uint8)
    if isinstance(what, str):
        what = what.encode()
    return what if isinstance(what, bytes) else encoded(what)


def write(root: Path, files: dict) -> Path:
    """name -> what its file holds, or nothing for a folder, whose name ends in /."""
    for name, what in files.items():
        (root / name if name.endswith("/") else (root / name).parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            (root / name).write_bytes(content(what))
    return root


def zipped(path: Path, files: dict, name=lambda n: n) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for n, what in files.items():
            z.writestr(name(n), b"" if n.endswith("/") else content(what))
    return path
