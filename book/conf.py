"""The book: Sphinx's configuration. `./run_all.sh book [SCALE]` builds book/_build/html from it, executing nothing."""

import ast
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCALE = os.environ.get("SIDAE_BOOK", "recorded")  # whose run the chapters show, where there is one
sys.path[:0] = [str(ROOT), str(HERE)]

project = "SidAE, reproduced"
author = "the authors of the companion"
copyright = "the authors of the companion; the papers are their authors'"
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

# Nothing is executed, and a page asks no network for anything: mathematics comes from a file of the book.
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
[mathjax] = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations
mathjax_path = "tex-svg.js"
html_static_path = ["_static", f"{mathjax}/static/mathjax/tex-svg.js"]

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath", "substitution"]
myst_heading_anchors = 3
default_role = "code"  # a docstring's single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

html_theme = "sphinx_book_theme"
html_title = project
html_css_files = ["book.css"]
html_js_files = ["sort.js"]
html_show_sourcelink = False
html_show_search_summary = False  # a page that is opened as a file may not read the others
html_theme_options = {"home_page_in_toc": True, "show_toc_level": 2, "use_fullscreen_button": False}


# --- chapters: the notebooks, or of a run those that it executed --------------------------------------------------


def place(file: Path, line: int) -> str:
    """The object of the library that holds a line, as an anchor of its page of code: "#SidAE.loss"; "" outside."""
    names: list[str] = []
    nodes = ast.parse(file.read_text()).body
    while node := next((n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))
                        and n.lineno <= line <= n.end_lineno), None):  # fmt: skip
        names.append(node.name)
        nodes = node.body if isinstance(node, ast.ClassDef) else []
    return "#" + ".".join(names) if names and names[-1][0] != "_" else ""


def linked(text: str) -> str:
    """Markdown whose links to lines of the library lead to the book's pages of code."""
    def to(found: re.Match) -> str:
        words, file, line = found.groups()
        module = file.removesuffix(".py").removesuffix("/__init__")
        words = re.sub(r"`([^`]*)`", r"<code>\1</code>", words)
        return f'<a href="../_modules/{module}.html{place(ROOT / file, int(line))}">{words}</a>'

    return re.sub(r"\[([^\]]*)\]\(\.\./(sidae_lib/[\w/]+\.py)#L(\d+)\)", to, text)


def chapter(committed: Path) -> nbformat.NotebookNode:
    """A notebook as the book shows it."""
    executed = ROOT / "executed" / SCALE / committed.name
    nb = nbformat.read(executed if executed.exists() else committed, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source)
        elif alt := cell.metadata.get("alt"):
            cell.metadata["mystnb"] = {"image": {"alt": alt}}
    if SCALE != "recorded":
        said = f"Your run at scale {SCALE}." if executed.exists() else f"Not run at scale {SCALE} here: the best on record."
        nb.cells.insert(1, nbformat.v4.new_markdown_cell(f":::{{note}}\n{said}\n:::", id="which-run"))
    return nb


def write(file: Path, text: str) -> None:
    """Where it is new: what did not change is not read again."""
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
for file in set((HERE / "chapters").glob("*.ipynb")) - {HERE / "chapters" / nb.name for nb in notebooks}:
    file.unlink()
for notebook in notebooks:
    write(HERE / "chapters" / notebook.name, nbformat.writes(chapter(notebook)) + "\n")

# --- what pages say by what the code and the records know: {{ name }} in a page of MyST ---------------------------

myst_substitutions = {"scale": SCALE}
for file in sorted(HERE.glob("*.py")):
    if file.name != "conf.py":
        myst_substitutions |= importlib.import_module(file.stem).made(SCALE)
