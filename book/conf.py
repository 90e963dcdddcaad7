"""The book: Sphinx's configuration. `./run_all.sh book [SCALE]` builds book/_build/html from it, executing nothing."""

import importlib
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCALE = os.environ.get("SIDAE_BOOK", "recorded")  # whose run the chapters show, where there is one
sys.path[:0] = [str(ROOT), str(HERE)]

project = "SidAE, reproduced"
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

# Nothing is executed, and a page asks no network for anything: mathematics comes from a file of the book.
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_ipywidgets_js = {}
[mathjax] = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations
mathjax_path = "tex-svg.js"
html_static_path = ["_static", f"{mathjax}/static/mathjax/tex-svg.js"]

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath", "substitution"]
myst_heading_anchors = 3
default_role = "code"  # a docstring's single backticks
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_inherit_docstrings = False  # torch's say what any module is
add_module_names = False  # a page says which module it shows
toc_object_entries = False  # a thousand names in every page's contents take ten seconds
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"

html_theme = "sphinx_book_theme"
html_title = project
html_css_files = ["book.css"]
html_js_files = ["sort.js"]
html_domain_indices = False  # the list of modules is the pages of the library
html_show_copyright = False
html_show_sourcelink = False
html_show_search_summary = False  # a page that is opened as a file may not read the others
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {"home_page_in_toc": True, "show_toc_level": 2, "use_fullscreen_button": False,
                      "navbar_persistent": [],  # the sidebar has the search
                      "footer_content_items": ["extra-footer"],
                      "extra_footer": "Code: MIT licence. Papers and image sets keep their own."}  # fmt: skip


# --- chapters: the notebooks, or of a run those that it executed --------------------------------------------------


def linked(text: str) -> str:
    """Markdown whose links to objects of the library, as notebooks/execute.py keeps them, lead to the book's pages of code."""
    def to(found: re.Match) -> str:
        name, module = found.groups()
        anchor = name.removeprefix(f"{module.rpartition('/')[2]}.")  # `pairs.mine` is the function of that module
        return f'<a href="../_modules/{module}.html#{anchor}"><code>{name}</code></a>'

    return re.sub(r"\[`([\w.]+)`\]\(\.\./(sidae_lib/[\w/]+?)(?:/__init__)?\.py#L\d+\)", to, text)


def joined(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Cells for reading: code that shows nothing joins the code after it, and all but parameters is folded."""
    out: list[nbformat.NotebookNode] = []
    for cell in cells:
        before = out[-1] if out else None
        if cell.cell_type == "code" and not {"parameters", "injected-parameters"} & {*cell.metadata.get("tags", ())}:
            cell.source = cell.source.removeprefix("# NBVAL_IGNORE_OUTPUT\n")
            if before and before.metadata.get("tags") == ["hide-input"] and not before.outputs:
                cell.source = f"{out.pop().source}\n\n{cell.source}"
            cell.metadata["tags"] = ["hide-input"]
        out.append(cell)
    return out


def shown(committed: Path) -> Path:
    """A notebook, or what the run at SCALE made of it: as long as the notebook is not newer."""
    executed = ROOT / "executed" / SCALE / committed.name
    return executed if executed.exists() and executed.stat().st_mtime > committed.stat().st_mtime else committed


def chapter(committed: Path) -> nbformat.NotebookNode:
    """A notebook as the book shows it."""
    nb = nbformat.read(source := shown(committed), as_version=4)
    nb.cells = joined(nb.cells)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source)
        elif alt := cell.metadata.get("alt"):
            cell.metadata["mystnb"] = {"image": {"alt": alt}}
    if SCALE != "recorded":
        said = (f"This is your run at scale {SCALE}." if source != committed else
                f"This chapter was not run at scale {SCALE}. It shows the best results on record.")  # fmt: skip
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
for page in sorted(HERE.glob("*.md")):
    if page.with_suffix(".py").exists():
        myst_substitutions |= importlib.import_module(page.stem).made(SCALE)


def setup(app: Sphinx) -> None:
    """What the button for downloads gives is the notebook itself, not the form in which it is read here."""
    def finish(app: Sphinx, failure: Exception | None) -> None:
        for notebook in notebooks if not failure else ():
            shutil.copy(shown(notebook), app.outdir / "_sources" / "chapters" / notebook.name)

    app.connect("build-finished", finish)
