"""A notebook's cells run in this process, at scale `recorded` or another: what they leave behind, and what they draw."""

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import matplotlib.pyplot as plt
import nbformat
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class Replay(NamedTuple):
    scope: dict[str, Any]  # the variables after the last cell
    figures: dict[str, Figure]  # name under figures/<scale>/ -> as it was saved
    tables: dict[str, str]  # the same name -> its CSV


def page(name: str) -> ModuleType:
    """The module that makes a page of the book, anew. By its path, since its name may be that of a library's module too."""
    spec = importlib.util.spec_from_file_location(f"page_{name}", ROOT / "book" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(ROOT / "book"), *sys.path]):  # for what pages share
        spec.loader.exec_module(module)
    return module


def cells(path: Path, kind: str = "code") -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


@cache
def replay(number: str, **changes: Any) -> Replay:
    """Notebook `01` as a reader runs it, without data and with an empty store, so that all comes from records/.
    changes: of its parameters."""
    from sidae_lib import figures

    (path,) = (p for p in NOTEBOOKS if p.stem.startswith(number))
    scope: dict[str, Any] = {"__name__": "__main__"}
    drawn: dict[str, Figure] = {}
    save = figures.save

    def kept(fig: Figure, name: str, *more: Any) -> None:
        save(fig, name, *more)
        drawn[name] = fig

    with TemporaryDirectory() as folder, mock.patch.object(figures, "save", kept):
        places = {f"SIDAE_{n.upper()}": f"{folder}/{n}" for n in ("runs", "data", "figures")}
        with mock.patch.dict(os.environ, places | {"TQDM_DISABLE": "1", "SIDAE_STATIC": "1"}):
            os.environ.pop("SIDAE_RECORDS", None)
            for cell in cells(path):
                exec(compile(cell.source, f"{path.name} {cell.id}", "exec"), scope)  # noqa: S102
                if cell.metadata.get("tags") == ["parameters"]:
                    scope.update(changes)
                plt.close("all")
        tables = {p.stem: p.read_text() for p in Path(folder).glob("figures/*/*.csv")}
    return Replay(scope, drawn, tables)
