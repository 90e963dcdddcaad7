"""Absolute paths, since a notebook, papermill and nbval share no working directory; files written whole."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from .config import SidaeError

_above = Path(__file__).resolve().parents[1]
ROOT = _above if (_above / "notebooks").is_dir() else Path.cwd()  # a checkout, or an installed copy


def absolute(place: str | Path) -> Path:
    """The path as it is meant here, for a process in another folder. An unknown user's `~` stays as it is."""
    return Path(os.path.realpath(os.path.expanduser(place)))


def _folder(name: str) -> Path:
    value = os.environ.get(f"SIDAE_{name.upper()}")
    return absolute(value) if value else ROOT / name


def data() -> Path:
    """Folder of the image sets (`SIDAE_DATA`, default `data/`)."""
    return _folder("data")


def use_data(folder: str | Path) -> None:
    """Makes this the folder of the image sets, here and in child processes. SidaeError if it is none."""
    if not os.path.isdir(there := absolute(folder)):
        raise SidaeError(f"--data {folder} is not a folder; name the one that holds the image sets.")
    os.environ["SIDAE_DATA"] = str(there)


def runs() -> Path:
    """The local store (`SIDAE_RUNS`, default `runs/`)."""
    return _folder("runs")


def backbone(key: str, epoch: int) -> Path:
    """The weights that the run with this key left in the local store."""
    return runs() / key / backbone_name(epoch)


def backbone_name(epoch: int) -> str:
    return f"backbone-e{epoch:03d}.safetensors"


def records() -> Path:
    """Published records, read-only for the store (`SIDAE_RECORDS`, default `records/`)."""
    return _folder("records")


def figures(scale: str) -> Path:
    """Folder of a scale's figures (`SIDAE_FIGURES`, default `figures/`)."""
    return _folder("figures") / scale


def write(path: Path, content: bytes) -> None:
    """Whole or not at all: to a temporary name, synced, renamed. Raises SidaeError when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with suppress(OSError):
            temporary.unlink()
        why = f"{path} could not be written ({e.strerror}); free space or choose another folder."
        raise SidaeError(why) from e


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
