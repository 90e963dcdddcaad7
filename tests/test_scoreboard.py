"""The book's scoreboard says what `claims` says, its tables can be sorted, and the library's pages hold every module."""

import os
import re
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from replay import page as made_by
from test_book import browser, browser_needed  # noqa: F401

from sidae_lib import claims, differences, methods, paths, recorded

BOOK = paths.ROOT / "book"
scoreboard = made_by("scoreboard")
ABOUT = ["paper", "source", "statement"]
NAMED = {name + end: shown + end for name, shown in methods.NAMES.items() for end in ("", ",")}
MARKED = {"supported": "▲", "mixed": "◆", "undecided": "○", "contradicted": "▼"}


def cells(row) -> list[str]:
    return [cell.get_text(" ", strip=True).replace("\xa0", " ") for cell in row.find_all("td", recursive=False)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of the published records alone: the boards, and the tables of the page."""
    empty = {f"SIDAE_{name}": str(tmp_path_factory.mktemp(name)) for name in ("RUNS", "DATA")}
    with mock.patch.dict(os.environ, empty):
        boards = scoreboard.boards("recorded")
        paper = claims.scoreboard(recorded.evaluations("paper"), "paper")
    rows = BeautifulSoup(scoreboard.claimed(boards), "html.parser").div.table.tbody.find_all("tr", recursive=False)
    return SimpleNamespace(boards=boards, paper=paper, rows=rows, cases=[b[b["published"].isna()] for b in boards])


def test_the_file_is_the_board_of_now(page):
    file = paths.ROOT / "figures" / "recorded" / "scoreboard.csv"
    assert file.read_text() == page.boards[0].to_csv(index=False), "run `./run_all.sh recorded`"


def test_its_rows_are_the_claims_with_their_verdicts(page):
    said = [c for board in page.boards for c in claims.claims(board).to_dict("records")]
    assert len(page.rows) == len(said) > 0 and differences.SEEDS == 3  # the page's words say three
    for c, row in zip(said, page.rows):
        _, paper, scale, verdict, count = cells(row)
        assert row.summary.text == c["statement"] and paper == f"{c['paper']}, {c['source']}" and count == str(c["cases"])
        mark, words = verdict.split(" ", 1)
        word = re.match(r"\w+", c["verdict"])[0]
        assert mark == ({"supported": "△", "contradicted": "▽"} if " in " in c["verdict"] else MARKED)[word]
        if c["verdict"] == claims.FEW:
            n = sorted({int(cells(case)[-6]) for case in row.details.tbody.find_all("tr")})
            assert words == f"{scale} scale, n = {' or '.join(map(str, n))}: too few seeds yet" and min(n) < 3
        else:
            assert words == c["verdict"] and f"{c['contradicted']} contradicted" in row.details.text


def test_each_case_of_the_board_is_in_the_fold_of_its_claim(page):
    expected = [part for cases in page.cases for _, part in cases.groupby(ABOUT, sort=False)]
    for part, row in zip(expected, page.rows, strict=True):
        shown = [cells(case) for case in row.details.tbody.find_all("tr")]
        for c, (case, *_, n, points, p, alone, holm, decide) in zip(part.to_dict("records"), shown, strict=True):
            assert case == " ".join(NAMED.get(word, word) for word in c["case"].split())
            assert n == str(c["n"]) and float(points.split(" (")[0]) == c["difference"] and decide == c["would decide"]
            assert pd.isna(c["low"]) or points.endswith(f"({c['low']:+.2f} to {c['high']:+.2f})")
            assert p == ("" if pd.isna(c["p"]) else f"{c['p']:.4f}")
            for verdict, key in ((alone, "verdict"), (holm, "after Holm")):
                assert verdict == f"{MARKED[c[key].split()[0]]} {c[key]}"


def test_the_reading_counts_the_verdicts(page):
    found = claims.claims(page.boards[0])["verdict"]
    counted = Counter(re.match(r"\w+", v)[0] + " in part" * (" in " in v) for v in found)
    shown = re.findall(r"\*\*(.*)\*\*: (\d+)", words := scoreboard.reading(page.boards))
    assert {word: int(n) for word, n in shown} == counted and f"{len(found)} claims" in words
    tested = page.cases[0].query("n >= 3")
    assert f"{len(tested)} tested cases" in words and f"{(tested['verdict'] != 'undecided').sum()} of these" in words


def test_what_paper_scale_has_of_too_few_seeds_is_shown_once(page):
    decides, besides = page.boards
    same = ["statement", "case", "n", "ours", "difference"]
    shown = [tuple(r) for board in page.boards for r in board[same].astype(str).to_numpy()]
    assert len(shown) == len(set(shown)) and {tuple(r) for r in page.paper[same].astype(str).to_numpy()} <= {*shown}
    least = besides[besides["published"].isna()].groupby("statement")["n"].min()
    assert {*besides["scale"]} <= {"paper"} and (least < 3).all()
    report = decides["paper"].str.contains("student report")
    assert {*decides.loc[report, "scale"]} == {"paper"} and "laptop" in {*decides.loc[~report, "scale"]}


def test_where_nothing_is_recorded_it_says_so(own_store):
    made = scoreboard.made("smoke")
    assert made["board_reading"] == "No claim has a record at this scale yet." and made["board_files"] == ""
    assert "<table" not in made["board_claims"] + made["board_numbers"]


# --- the head of a column --------------------------------------------------------------------------------------------------

TABLE = """<table class="sortable"><thead><tr><th>name</th><th>points</th></tr></thead><tbody>
<tr><td><details><summary>b</summary><table><tbody><tr><td>inside</td></tr></tbody></table></details></td><td>10</td></tr>
<tr><td data-sort="c">C</td><td>-9.5</td></tr><tr><td>d</td><td></td></tr>
<tr><td data-sort="a">a</td><td data-sort="9">so 9</td></tr>
</tbody></table>"""


@browser_needed
def test_a_click_or_a_key_on_the_head_of_a_column_sorts(tmp_path, browser):  # noqa: F811
    script, wrong = (BOOK / "_static" / "sort.js").as_uri(), []
    for name, body in {"table": TABLE, "plain": "<p>no table</p>"}.items():
        (tmp_path / f"{name}.html").write_text(f'<!doctype html><script src="{script}"></script>{body}')
    page = browser.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto((tmp_path / "plain.html").as_uri())
    page.goto((tmp_path / "table.html").as_uri())
    rows = "body > table > tbody > tr"
    names = lambda: page.eval_on_selector_all(rows, "all => all.map(r => r.innerText[0])")  # noqa: E731
    name, points = page.get_by_role("button", name="name"), page.get_by_role("button", name="points")
    points.click()
    assert names() == ["C", "a", "b", "d"] and page.locator("th[aria-sort=ascending]").inner_text() == "points"
    points.press("Enter")
    assert names() == ["b", "a", "C", "d"] and page.locator("th[aria-sort=descending]").inner_text() == "points"
    name.press("Enter")
    assert names() == ["a", "b", "C", "d"] and page.locator("th[aria-sort]").count() == 1
    name.click()
    assert names() == ["d", "C", "b", "a"] and page.locator("tr:has(> td > details) details td").text_content() == "inside"
    page.close()
    assert not wrong


def test_every_module_is_on_one_page_of_the_library():
    parts = [*BOOK.glob("api/*.md")]
    listed = (BOOK / "api.md").read_text()
    shown = re.findall(r"automodule:: ([\w.]+)", "".join([listed, *(f.read_text() for f in parts)]))
    files = [f.relative_to(paths.ROOT).with_suffix("") for f in (paths.ROOT / "sidae_lib").rglob("*.py")]
    modules = [".".join(f.parts).removesuffix(".__init__") for f in files if f.name != "__main__"]
    assert sorted(shown) == sorted(modules)
    assert sorted(f.stem for f in parts) == sorted(re.findall(r"^api/(\w+)$", listed, re.M))
