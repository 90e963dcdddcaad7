"""The book as it is built from the committed notebooks: nothing is broken, and a browser that reaches no host can read it."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest
from filelock import FileLock
from test_browser import CHROMIUM, FLAGS

from sidae_lib import batch, paths

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
browser_needed = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")


class Page(HTMLParser):
    """What a reader meets: images, links, anchors, headings, and what is loaded for the page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.images, self.links, self.anchors, self.headings, self.loaded, self.language = [], [], set(), [], [], None
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.anchors |= {a[k] for k in ("id", "name") if k in a}
        if tag == "img":
            self.images.append(a)
        elif tag == "a" and "href" in a:
            self.links.append(a["href"])
        elif tag == "article":  # what stands before is for print alone
            self.headings = []
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        elif tag == "html":
            self.language = a.get("lang")
        if tag in ("script", "img", "iframe", "source") or tag == "link" and a.get("rel") != "canonical":
            self.loaded += [a[k] for k in ("src", "href") if k in a]


@pytest.fixture(scope="module")
def html(session) -> Path:
    """Built once, by all that is said in conf.py; a warning is an error."""
    out = session / "book"
    with FileLock(session / "book.lock"):
        if not (out / "index.html").exists():
            env = {k: v for k, v in os.environ.items() if not k.startswith("SIDAE_")}
            command = [sys.executable, "-P", "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(session / "doctrees")]
            command += [str(ROOT / "book"), str(out)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pages(html) -> dict[str, Page]:
    return {str(f.relative_to(html)): Page(f) for f in sorted(html.rglob("*.html")) if "_static" not in f.parts}


@each
def test_every_figure_of_a_notebook_is_in_its_chapter_and_has_its_text(path, pages):
    figures = [c.metadata["alt"] for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])
               if "image/png" in o.get("data", {})]  # fmt: skip
    assert [image["alt"] for image in pages[f"chapters/{path.stem}.html"].images] == figures != []
    named = re.findall(r"`(\d\d_\w+)`", "".join(c.source for c in nbformat.read(path, as_version=4).cells))
    assert {*named} <= {p.stem for p in NOTEBOOKS}, "a notebook that is not there"


def test_every_image_has_its_text_and_every_page_an_outline(pages):
    for name, page in pages.items():
        assert all(len(alt := image.get("alt", "")) > 20 and not alt.endswith(".png") for image in page.images), name
        assert page.headings.count(1) == 1 and page.language == "en", name
        assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:])) or name.startswith("_modules"), name


def test_no_link_is_broken_and_nothing_comes_from_elsewhere(html, pages):
    for name, page in pages.items():
        for link in page.loaded:
            assert not urlsplit(link).scheme or link.startswith("data:"), (name, link)
        for link in page.links:
            if urlsplit(link).scheme:
                continue
            file, _, anchor = unquote(urljoin(f"/{name}", link)).lstrip("/").partition("#")
            assert (html / file).exists(), (name, link)
            assert not anchor or file not in pages or anchor in pages[file].anchors, (name, link)


def test_a_link_to_the_library_leads_to_its_code(pages):
    links = [link for link in pages["chapters/00_sidae_step_by_step.html"].links if "_modules" in link]
    assert "../_modules/sidae_lib/methods/sidae.html#SidAE.loss" in links


# --- a reader at the browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND"])
        yield browser
        browser.close()


@pytest.fixture
def reader(browser):
    """A page, and what went wrong on it."""
    page, wrong = browser.new_page(viewport={"width": 1280, "height": 900}), []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url))
    yield page, wrong
    page.close()


@browser_needed
def test_every_page_opens_from_a_file_wide_and_narrow_light_and_dark(html, pages, reader):
    page, wrong = reader
    for name in pages:
        if name.startswith("_modules/") and name != "_modules/sidae_lib/methods/sidae.html":
            continue
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto((html / name).as_uri())
        page.evaluate("window.MathJax && MathJax.startup && MathJax.startup.promise")
        assert page.eval_on_selector_all("mjx-merror, [data-mjx-error]", "all => all.length") == 0, name
        page.eval_on_selector_all("img", "all => all.forEach(i => i.loading = 'eager')")
        page.wait_for_function("[...document.images].every(i => i.complete)")
        assert all(page.eval_on_selector_all("img", "all => all.map(i => i.naturalWidth > 0)")), name
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            for theme in ("light", "dark"):
                page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
                page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{name} scrolls sideways: {wide} of {width} pixels, {theme}"
        assert not wrong, (name, wrong)


@browser_needed
def test_the_search_finds_the_chapter(html, reader):
    page, wrong = reader
    page.goto((html / "search.html").as_uri() + "?q=stop-gradient")
    page.wait_for_selector("ul.search li")
    page.wait_for_function("document.querySelector('.search-summary').textContent.includes('found')")
    found = page.eval_on_selector_all("ul.search li > a", "all => all.map(a => a.getAttribute('href'))")
    assert any("chapters/00_sidae_step_by_step" in link for link in found), found
    assert not wrong, wrong


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A book of one page in a project of its own."""
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "conf.py").write_text("import os\nrst_epilog = '.. |scale| replace:: ' + os.environ['SIDAE_BOOK']\n")
    (tmp_path / "book" / "index.rst").write_text("Book\n====\n\nAt |scale|.\n")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return tmp_path


def test_the_command_builds_it_and_says_where(small, cli):
    done = cli("book", "laptop")
    page = small / "book" / "_build" / "html" / "index.html"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"The book: {page}\n", "")
    assert "At laptop." in page.read_text()


def test_a_fault_is_said_and_the_rest_is_built(small, cli):
    (small / "book" / "index.rst").write_text("Book\n====\n\n:doc:`nowhere`\n")
    done = cli("book")
    log = small / "book" / "_build" / "make.log"
    assert done.returncode == 1 and done.stdout.startswith(f"The book has a fault; {log} says which.\nThe book: ")
    assert "nowhere" in log.read_text() and batch.book("quick")[0].exists()
    shutil.rmtree(small / "book")
    done = cli("book")
    assert (done.returncode, done.stderr) == (2, f"error: There is no book in {small}; run from a checkout.\n")
