"""What scoreboard.md shows: claims with their verdicts and cases, and published numbers beside ours."""

import os
import re
from collections.abc import Iterable
from functools import cache
from html import escape
from pathlib import Path

import pandas as pd

from sidae_lib import claims, data, frames, methods, paths, recorded
from sidae_lib.config import Record

MARKS = {"supported": "▲", "supported in part": "△", "mixed": "◆", "undecided": "○",
         "contradicted in part": "▽", "contradicted": "▼"}  # told apart without colours  # fmt: skip
WROTE = ("Before the first long run at the paper's own scale we wrote down which claims it will decide, by which "
         "probe, epoch, number of seeds and interval: [paper_scale.csv](../sidae_lib/paper_scale.csv). The intervals "
         "have become wider since then, because they now allow for the choice of the test images too.")  # fmt: skip


@cache  # the front page asks for both too
def evaluations(scale: str) -> dict[str, list[Record]]:
    return recorded.evaluations(scale)


@cache
def boards(scale: str) -> list[pd.DataFrame]:
    """The scoreboard of the records that decide; and, for the book of the records, what paper scale has
    besides. That decides no claim yet."""
    out = [claims.scoreboard(evaluations(scale), scale)]
    if scale == recorded.BEST:
        with data.as_published():
            paper = claims.scoreboard(recorded.evaluations("paper"), "paper")
        case = ["statement", "case", "scale"]
        rest = paper.merge(out[0][case], "left", case, indicator="known")
        rest = rest[rest.pop("known") == "left_only"]
        claimed = rest["published"].isna()
        rest.loc[claimed, "claim verdict"], rest.loc[claimed, "after Holm"] = claims.FEW, "undecided"
        out.append(rest)
    return out


def joined(words: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(words))


def named(case: str) -> str:
    """A case with its methods as figures name them."""
    return kept(re.sub(r"\w+", lambda found: methods.NAMES.get(found[0], found[0]), case))


def kept(text: str) -> str:
    """As HTML, in which no line ends between a number and its % or its "Sec."."""
    return re.sub(r"(?<=\.) (?=\d)| (?=%)", "&nbsp;", escape(text))


# --- tables -------------------------------------------------------------------------------------------------------


def cell(text: str, key: object = None) -> str:
    """key: what the column is sorted by, where it is not the text."""
    return f'<td data-sort="{key}">{text}</td>' if key is not None else f"<td>{text}</td>"


def marked(verdict: str, said: str = "") -> str:
    word, _ = claims.parted(verdict)
    mark = f'<span class="verdict {word.split()[0]}" aria-hidden="true">{MARKS[word]}</span>'
    return cell(f"{mark} {escape(said or verdict)}", list(MARKS).index(word))


def table(heads: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return body and f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def number(value: float, form: str = "+.2f") -> str:
    return "" if pd.isna(value) else format(value, form)


def cases(rows: pd.DataFrame) -> str:
    """The table behind a claim."""
    mixed = rows["scale"].nunique() > 1
    heads = ["case", *["scale"] * mixed, "n", "difference (95 % interval)", "p", "alone", "after Holm", "would decide"]
    shown = []
    for r in rows.to_dict("records"):
        about = f" ({number(r['low'])} to {number(r['high'])})" if pd.notna(r["low"]) else ""
        shown.append("".join([
            cell(named(r["case"])), *[cell(r["scale"])] * mixed, cell(r["n"]),
            cell(f"{number(r['difference'])}{about}", r["difference"]), cell(number(r["p"], ".4f")),
            marked(r["verdict"]), marked(r["after Holm"]),
            cell(r["would decide"], re.sub(r"\D", "", r["would decide"])),
        ]))  # fmt: skip
    return table(heads, shown)


def claim(c: dict, rows: pd.DataFrame) -> str:
    """The row of one claim, from `claims.claims`, with its cases folded."""
    alone = ", ".join(f"{c[verdict]} {verdict}" for verdict in claims.VERDICTS)
    chance = f"Chance alone would decide about {c['by chance']:g} of {c['tested']}."
    open_yet = c["verdict"] == claims.FEW
    about = "" if open_yet else f"If each tested case stood alone: {alone}. {chance}"
    scale, n = joined(rows["scale"]), " or ".join(map(str, sorted(rows["n"].unique())))
    verdict = f"{scale} scale, n = {n}: too few seeds yet" if open_yet else c["verdict"]
    fold = (f"<details><summary>{escape(c['statement'])}</summary>"
            f'<div class="cases"><div>{about}{cases(rows)}</div></div></details>')  # fmt: skip
    paper = kept(f"{c['paper']}, {c['source']}")
    return "".join([cell(fold, escape(c["statement"])), cell(paper), cell(scale),
                    marked(c["verdict"], verdict), cell(c["cases"])])  # fmt: skip


def claimed(boards: list[pd.DataFrame]) -> str:
    """All claims. Those of the records that decide come first."""
    rows = []
    for board in boards:
        by = board[board["published"].isna()].groupby(claims.BOARD[:3])
        rows += [claim(c, by.get_group(tuple(c[name] for name in claims.BOARD[:3])))
                 for c in claims.claims(board).to_dict("records")]  # fmt: skip
    return f'<div class="board">{table(["claim", "paper", "scale", "verdict", "cases"], rows)}</div>'


def numbers(board: pd.DataFrame) -> str:
    """The published numbers and ours."""
    rows = []
    for r in board.to_dict("records"):
        beside = re.sub(r"^not comparable: (.* scale$)?", "", r["verdict"])
        rows.append("".join([
            cell(named(r["case"])), cell(methods.NAMES[r["statement"]]),
            cell(frames.mean_se(r["published"], r["published_se"]), r["published"]),
            cell(frames.mean_se(r["ours"], r["se"]), r["ours"]), cell(r["n"]),
            cell(number(r["difference"]), r["difference"]), cell(r["scale"]), cell(beside),
        ]))  # fmt: skip
    heads = ["set, labels", "method", "published (se)", "ours (se)", "n", "difference", "scale", "ours is"]
    return f'<div class="board">{table(heads, rows)}</div>'


# --- words --------------------------------------------------------------------------------------------------------


def reading(boards: list[pd.DataFrame]) -> str:
    """How many claims have which verdict, in sentences."""
    found = claims.claims(boards[0])
    if found.empty:
        return "No claim has a record at this scale yet."
    verdicts = found["verdict"].map(lambda v: claims.parted(v)[0]).value_counts()
    counted = [f"- {MARKS[word]} **{word}**: {verdicts[word]}" for word in MARKS if word in verdicts]
    few, tested = (found["tested"] == 0).sum(), found["tested"].sum()
    decided = found["supported"].sum() + found["contradicted"].sum()
    said = [f"Our records say something about {len(found)} claims:", "", *counted, "",
            f"All claims together have {tested} tested cases. If each case stood alone, {decided} of these would be decided. "
            f"If all differences were only chance, about {found['by chance'].sum():.0f} would be."]  # fmt: skip
    if few:
        said.append(f"Of the undecided claims, {few} {'has' if few == 1 else 'have'} fewer than three seeds.")
    if len(boards) > 1 and len(more := claims.claims(boards[1])):
        said.append(f"The paper's own scale has records for {len(more)} claims that it does not decide yet, since it has too "
                    "few seeds. These stand at the end of the table.")  # fmt: skip
    return "\n".join(said)


def files(scale: str) -> str:
    path = paths.figures(scale) / "scoreboard.csv"
    link = os.path.relpath(path, Path(__file__).parent)
    return f"All cases and numbers are in one table too: [scoreboard.csv]({link})." if path.exists() else ""


def made(scale: str) -> dict[str, str]:
    found = boards(scale)
    rows = pd.concat([board[board["published"].notna()] for board in found])
    return {"board_reading": reading(found), "board_claims": claimed(found), "board_numbers": numbers(rows),
            "board_files": files(scale), "board_before": WROTE}  # fmt: skip
