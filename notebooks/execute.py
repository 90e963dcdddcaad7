"""Executes notebooks in place as they are committed: `python notebooks/execute.py 01 10`, or all without a number.

Smoke scale, an empty store beside the published records, no progress bars and no times of day, neighbouring prints joined;
beside a notebook's figure stands the same one from figures/ at the larger scales that there are.
"""

import base64
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

from sidae_lib import figures

HERE = Path(__file__).resolve().parent
TAG = "larger-scale"


def larger(stem: str) -> str:
    """Markdown that shows the figure of this name at the larger scales of figures/, the paper's first, or nothing."""
    shown = []
    for scale in ("paper", "laptop"):
        if (HERE.parent / "figures" / scale / f"{stem}.png").exists():
            alt = f"{stem.replace('_', ' ')}, the same figure at {scale} scale"
            shown.append(f"The same figure at {scale} scale:\n\n![{alt}](../figures/{scale}/{stem}.png)")
    return "\n\n".join(shown)


def beside(nb: nbformat.NotebookNode, stem: str) -> None:
    """Puts `larger` after the cell that saves the figure, in place of an earlier one."""
    nb.cells = [c for c in nb.cells if TAG not in c.metadata.get("tags", [])]
    saved = [i for i, c in enumerate(nb.cells) if c.cell_type == "code" and f'"{stem}", scale' in c.source]
    if saved and (text := larger(stem)):
        cell = nbformat.v4.new_markdown_cell(text, metadata={"tags": [TAG]}, id=TAG)
        nb.cells.insert(saved[0] + 1, cell)


def tidy(nb: nbformat.NotebookNode) -> None:
    """What differs from run to run goes, charts get small; what one cell printed in pieces becomes one output."""
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        joined: list[nbformat.NotebookNode] = []
        for out in cell.get("outputs", []):
            if "image/png" in (data := out.get("data", {})):
                data["image/png"] = base64.b64encode(figures.small(base64.b64decode(data["image/png"]))).decode() + "\n"
            if joined and out.output_type == "stream" == joined[-1].output_type and out.name == joined[-1].name:
                joined[-1].text += out.text
            else:
                joined.append(out)
        if cell.cell_type == "code":
            cell.outputs = joined


def main(wanted: list[str]) -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        if wanted and not {path.stem, *path.stem.split("_", 1)} & {*wanted}:
            continue
        nb = nbformat.read(path, as_version=4)
        beside(nb, path.stem.split("_", 1)[1])
        with tempfile.TemporaryDirectory() as empty:
            os.environ |= {f"SIDAE_{n}": f"{empty}/{n.lower()}" for n in ("RUNS", "FIGURES", "DATA")}
            os.environ |= {"TQDM_DISABLE": "1", "PYTHONPATH": str(HERE.parent)}
            os.environ.pop("MPLBACKEND", None)  # so that ipykernel shows figures in the notebook
            ExecutePreprocessor(timeout=600).preprocess(nb, {"metadata": {"path": str(HERE)}})
        tidy(nb)
        nbformat.write(nb, path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
