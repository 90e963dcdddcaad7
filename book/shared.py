"""What several pages are made of: a table in Markdown, and the words of a page that stand in a CSV beside it."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def words(page: str) -> list[dict[str, str]]:
    """The rows of a page's CSV.  page: the file of its module."""
    with open(Path(page).with_suffix(".csv"), newline="") as f:
        return list(csv.DictReader(f))
