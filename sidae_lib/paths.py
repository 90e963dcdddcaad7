"""Absolute paths: a notebook, papermill and nbval do not share a working directory."""

import os
from pathlib import Path

from .config import SidaeError

_above = Path(__file__).resolve().parents[1]
ROOT = _above if (_above / "notebooks").is_dir() else Path.cwd()  # a checkout, or where an installed copy is used


def absolute(place: str | Path) -> Path:
    """As it is meant here, for a process that works in another folder. A `~` of nobody stays what it is."""
    return Path(os.path.realpath(os.path.expanduser(place)))


def _folder(variable: str, default: str) -> Path:
    value = os.environ.get(variable)
    return absolute(value) if value else ROOT / default


def data() -> Path:
    """Folder of the image sets (`SIDAE_DATA`, default `data/`)."""
    return _folder("SIDAE_DATA", "data")


def use_data(folder: str | Path) -> None:
    """Makes `folder` that of the image sets, for this process and those that it starts. Raises SidaeError if it is none."""
    if not os.path.isdir(there := absolute(folder)):
        raise SidaeError(f"--data {folder} is not a folder; name the one that holds the image sets.")
    os.environ["SIDAE_DATA"] = str(there)


def runs() -> Path:
    """The local store (`SIDAE_RUNS`, default `runs/`)."""
    return _folder("SIDAE_RUNS", "runs")


def backbone(key: str, epoch: int) -> Path:
    """The weights that the run with this key left in the local store."""
    return runs() / key / f"backbone-e{epoch:03d}.safetensors"


def records() -> Path:
    """Published records, read-only for the store (`SIDAE_RECORDS`, default `records/`)."""
    return _folder("SIDAE_RECORDS", "records")


def figures(scale: str) -> Path:
    """Folder of a scale's figures (`SIDAE_FIGURES`, default `figures/`)."""
    return _folder("SIDAE_FIGURES", "figures") / scale
