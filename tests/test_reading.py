"""The notebooks, read without running: rendered as a batch run renders them, nothing is broken and nothing is unnamed."""

import base64
import importlib.util
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from sidae_lib import batch

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


class Page(HTMLParser):
    """What a reader meets: images, links, anchors, headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images, self.links, self.anchors, self.headings, self.language = [], [], set(), [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.anchors |= {a[k] for k in ("id", "name") if k in a}
        if tag == "img":
            self.images.append(a)
        elif tag == "a" and "href" in a:
            self.links.append(a["href"])
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        elif tag == "html":
            self.language = a.get("lang")


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    return {p: Page(batch.render(nbformat.read(p, as_version=4))) for p in NOTEBOOKS}


def is_whole_png(data: bytes) -> bool:
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND" and min(struct.unpack(">II", data[16:24])) > 0


@each
def test_every_image_is_there_and_has_its_text(path, pages):
    figures = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])
               if "image/png" in o.get("data", {})]  # fmt: skip
    assert len(pages[path].images) >= len(figures) > 0
    for image in pages[path].images:
        kind, _, data = image["src"].partition("base64,")
        assert kind == "data:image/png;" and is_whole_png(base64.b64decode(data)), image["src"][:80]
        assert len(image["alt"]) > 20 and "No description" not in image["alt"], image["alt"]


@each
def test_no_link_is_broken(path, pages):
    for link in pages[path].links:
        if link.startswith("#"):
            assert link[1:] in pages[path].anchors, link
        elif not link.startswith("https://"):
            assert (path.parent / link.partition("#")[0]).exists(), link
    named = re.findall(r"`(\d\d_\w+)`", "".join(c.source for c in nbformat.read(path, as_version=4).cells))
    assert {*named} <= {p.stem for p in NOTEBOOKS}, "a notebook that is not there"


@each
def test_headings_of_the_page_are_an_outline(path, pages):
    levels = pages[path].headings
    assert levels[0] == 1 and levels.count(1) == 1 and pages[path].language == "en"
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:]))


def test_a_link_to_the_code_gets_its_line(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("def loss(): ...\n\n\nclass SidAE:\n    def loss(self): ...\n")
    monkeypatch.setattr(execute, "HERE", tmp_path / "notebooks")
    made = execute.linked("See [`SidAE.loss`](../a.py#L1), [`loss`](../a.py#L9) and [a page](https://x.org#L7).")
    assert made == "See [`SidAE.loss`](../a.py#L5), [`loss`](../a.py#L1) and [a page](https://x.org#L7)."
    with pytest.raises(ValueError, match="a.py has no SidAE.forward; mend the link."):
        execute.linked("[`SidAE.forward`](../a.py#L1)")


def test_tidy_joins_prints_and_drops_times():
    out = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell("x", metadata={"execution": {"started": "now"}, "alt": "a"}, outputs=[
        out("stream", text="a\n"), out("stream", text="b\n"), out("stream", name="stderr", text="c"),
        out("display_data", data={}), out("display_data", data={execute.WIDGET: {}}), out("stream", text="d")])  # fmt: skip
    execute.tidy(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell("m")]))
    assert [o.get("text") for o in cell.outputs] == ["a\nb\n", "c", None, "d"] and cell.metadata == {"alt": "a"}
