"""Executes notebooks in place as they are committed: `python notebooks/execute.py 01 10`, or all without a number.

Scale `recorded`, an empty store beside the published records, no data, no progress bars and no times of day; what a cell
printed in pieces becomes one output, and what only a running notebook can show, a widget, is left out.
Links to the code get the line where it stands now; with --links nothing else happens.
"""

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor
from PIL import Image

from sidae_lib import figures

HERE = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def line(file: str, symbol: str) -> int:
    """Where a function or class, or a method of a class, begins; its module may be named before it. Raises ValueError
    where there is none."""
    number, lines = 0, (HERE.parent / file).read_text().splitlines()
    names = symbol.removeprefix(f"{Path(file).stem}.").split(".")
    for name in names:
        begins = (n for n, text in enumerate(lines, 1) if n > number and re.match(rf"\s*(def|class) {name}\b", text))
        number = next(begins, 0)
        if not number:
            raise ValueError(f"{file} has no {symbol}; mend the link.")
    return number


def linked(text: str) -> str:
    """Links to the code, [`SidAE.loss`](../sidae_lib/methods/sidae.py#L1), with the line where it stands now."""
    return re.sub(r"(\[`([\w.]+)`\]\(\.\./([\w/]+\.py))#L\d+", lambda m: f"{m[1]}#L{line(m[3], m[2])}", text)


def smaller(png: bytes) -> bytes:
    """A chart in few colours; a photograph, which would lose by it, in 256 that are mixed dot by dot."""
    if len(png := figures.small(png)) > 80_000:
        few = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
        few.save(out := io.BytesIO(), "PNG", optimize=True)
        png = min(png, out.getvalue(), key=len)
    return png


def tidy(nb: nbformat.NotebookNode) -> None:
    """What differs from run to run goes, charts get small; what one cell printed in pieces becomes one output."""
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        joined: list[nbformat.NotebookNode] = []
        for out in cell.get("outputs", []):
            if WIDGET in out.get("data", {}):
                continue
            if "image/png" in (data := out.get("data", {})):
                data["image/png"] = base64.b64encode(smaller(base64.b64decode(data["image/png"]))).decode() + "\n"
            if joined and out.output_type == "stream" == joined[-1].output_type and out.name == joined[-1].name:
                joined[-1].text += out.text
            else:
                joined.append(out)
        if cell.cell_type == "code":
            cell.outputs = joined


def main(wanted: list[str]) -> None:
    relink = "--links" in wanted  # after a change of the library: nothing is executed
    wanted = [name for name in wanted if name != "--links"]
    for path in sorted(HERE.glob("*.ipynb")):
        if wanted and not {path.stem, *path.stem.split("_", 1)} & {*wanted}:
            continue
        nb = nbformat.read(path, as_version=4)
        for cell in nb.cells:
            cell.source = linked(cell.source) if cell.cell_type == "markdown" else cell.source
        if relink:
            nbformat.write(nb, path)
            continue
        with tempfile.TemporaryDirectory() as empty:
            os.environ |= {f"SIDAE_{n}": f"{empty}/{n.lower()}" for n in ("RUNS", "DATA")}
            os.environ |= {"TQDM_DISABLE": "1", "SIDAE_STATIC": "1", "PYTHONPATH": str(HERE.parent)}
            os.environ.pop("MPLBACKEND", None)  # so that ipykernel shows figures in the notebook
            ExecutePreprocessor(timeout=600).preprocess(nb, {"metadata": {"path": str(HERE)}})
        tidy(nb)
        nbformat.write(nb, path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
