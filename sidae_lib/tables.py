"""Split and class of each picture of a set: from its folders if they are clear, else from a table of labels.

pandas reads a table. What it holds is seen from its values first, then from the names of its columns: one
names pictures, one the labels (or several hold a single 1), and one may name the split.
"""

import io
import os.path
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import SidaeError
from .layout import LABELS, File, Reading, by_folders, count, one_sentence, role_among, role_of, some

if TYPE_CHECKING:
    import pandas as pd

FILES = ["file", "filename", "file_name", "files", "path", "filepath", "file_path", "image", "image_name",
         "image_path", "img", "image_id", "id", "name"]  # columns that name pictures, the surest first
Claims = dict[File, tuple[str, str | None, str]]  # picture -> split, label, and the line that says so
MISSING = ["", "NA", "N/A", "NaN", "nan"]  # as pandas and R write it; a class may be called None


class Named(NamedTuple):
    """A table that names pictures. text: how each line names one. found: those that it may mean. labels,
    splits: of each line, or None. known: the labels are plainly meant so. first: number of the first line."""

    file: File
    text: list[str]
    found: list[list[File]]
    labels: Any  # a pandas Series, or None
    known: bool
    splits: list[str] | None
    first: int


def sort_out(pictures: list[File], tables: list[File], reading: Reading) -> list[File]:
    """Sets split and label of each picture, or why it is left out. Returns the tables that named the classes.

    Class folders count. Where they name no two classes, or could be read in two ways, a table of labels does.
    Raises SidaeError where neither is clear.
    """
    names = {(*p.parts[:-1], p.stem) for p in pictures}
    for p in pictures:
        base = re.sub(r"[_-](mask|seg|segmentation)([_-]?\d+)?$", "", p.stem)
        if base != p.stem and (*p.parts[:-1], base) in names:
            p.why = "a mask beside its image"
    pictures = [p for p in pictures if not p.why]
    tables = [t for t in tables if "submission" not in t.stem]  # a form for predictions, filled with anything
    unclear = None
    try:
        by_folders(pictures, reading)
    except SidaeError as e:
        unclear = e
    classes = {p.label.casefold(): [p] for p in pictures if p.label}
    clear, by_name = not unclear and len(classes) > 1, _by_name(pictures if tables else [])
    named: list[Named] = []
    claims: list[tuple[Named, Claims]] = []
    for t in tables:
        # a labels.csv may also name the folders: patients and their diagnosis
        for names in (by_name, classes) if clear and t.stem == "labels" else (by_name,):
            try:
                if n := _named(t, names, len(pictures if names is by_name else classes)):
                    named.append(n)
                    claims += [(n, _claims([n])[0])] if clear and n.known else []
            except SidaeError:
                if not clear or t.stem == "labels":
                    raise  # other tables beside clear folders may be about anything
    used = [n for n in named if n.known] or [n for n in named if unclear and n.labels is not None]
    if used and not clear:
        reading.notes.clear()  # what the folders said
        _label(pictures, used, reading)
        return [n.file for n in used]
    if unclear and tables:
        seen = some(n.file.name for n in named)
        absent = f"few of its images are named in {tables[0].name}, {pictures[0].name} for one is not"
        raise SidaeError(f"{unclear} Besides, {f'{seen} has no column called label' if seen else absent}.")
    if unclear:
        raise unclear
    for n, claimed in claims:  # they must be the class folders, if by other names
        labels = [(p.label, label) for p, (_, label, _) in claimed.items() if p.label and label]
        pairs = {(own.casefold(), other.casefold()) for own, other in labels}
        ours, theirs = sorted({own for own, _ in pairs}), sorted({other for _, other in pairs})
        if not len(ours) == len(theirs) == len(pairs):
            raise SidaeError(f"{reading.path} can be read in two ways: the folders are the classes "
                             f"({some(ours)}), or {n.file.name} names them ({some(theirs)}). Remove the one "
                             "that is wrong.")
    return []


def _by_name(pictures: list[File]) -> dict[str, list[File]]:
    """Every name of a picture in small letters: with and without suffix and any of its folders."""
    out = defaultdict(list)
    for p in pictures:
        path = p.name.casefold()
        for name in {path, path.removesuffix(p.suffix)}:
            parts = name.split("/")
            for i in range(len(parts)):
                out["/".join(parts[i:])].append(p)
    return out


def _table(file: File, header: int | None = 0) -> "pd.DataFrame":
    """All as words."""
    import pandas as pd  # slow to import

    with one_sentence(f"{file.name} could not be read", "it must be a table with a line for each image"):
        with file.open() as f:
            raw = f.read()
        try:
            text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("cp1252")  # as Excel saves it
        text = unicodedata.normalize("NFC", text)
        separator = max(",;\t", key=text.strip().partition("\n")[0].count)
        table = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, header=header, index_col=False,
                            skipinitialspace=True, keep_default_na=False, na_values=MISSING)
        return table.rename(columns=lambda name: str(name).strip().casefold())


def _named(file: File, by_name: Mapping[str, list[File]], most: int) -> Named | None:
    """The table, if most of its lines name a picture, or most of the pictures are in its lines."""
    table, first = _table(file), 2
    if any(re.split(r"[/\\]", c)[-1] in by_name for c in table):  # it has no line of names
        table, first = _table(file, header=None), 1
    keys = {c: _keys(table[c], by_name) for c in table if c not in LABELS and not c.startswith("unnamed")}

    def enough(c: str) -> bool:
        return 2 * len({*keys[c]} & by_name.keys()) >= max(1, min(len(table), most))

    def rank(c: str) -> tuple[int, bool, int]:
        """Names of files come before a column called file, and that before numbers: lines have them too."""
        pictured = 2 * sum(bool(re.search(r"\.[a-z]\w{1,4}$", key)) for key in keys[c]) > len(table)
        return 2 if pictured else c in FILES, enough(c), -[*FILES, c].index(c)

    column = max(keys, key=rank, default="")
    if not keys or not enough(column):
        return None
    rest, splits = table.drop(columns=column), None
    if first == 1:
        rest = rest.rename(columns={c: "label" for c in rest.columns[:1]})
    for c in {"split", "subset", "set", "partition"} & {*rest}:
        roles = rest[c].map(role_of, na_action="ignore")
        if roles.notna().all():
            splits, rest = roles.tolist(), rest.drop(columns=c)
        elif roles.notna().any() or c == "split":
            odd = rest[c][roles.isna()].fillna("nothing").iloc[0]
            raise SidaeError(f"{file.name} has {odd} in its column {c}, which is no split; write train, "
                             "test, val or unlabeled.")
    labels = _labels(rest, file)
    known = labels is not None and (file.stem == "labels" or labels.name in (None, *LABELS))
    found = [by_name.get(key, []) for key in keys[column]]
    return Named(file, table[column].fillna("").tolist(), found, labels, known, splits, first)


def _keys(column: "pd.Series", by_name: Mapping[str, list[File]]) -> list[str]:
    """Names of pictures in small letters, without folders that all begin with, where they match only so."""
    keys = column.fillna("").str.strip().str.replace("\\", "/").str.removeprefix("./").str.casefold().tolist()
    shared = os.path.commonprefix([key.split("/")[:-1] for key in keys if key] or [[]])
    # a split stays: what a table says of test/1.png does not hold for train/1.png
    most = len([*takewhile(lambda folder: not role_of(folder), shared)])
    ways = [["/".join(key.split("/")[n:]) for key in keys] for n in range(most + 1)]
    return max(ways, key=lambda way: len({*way} & by_name.keys()))


def _labels(table: "pd.DataFrame", file: File) -> "pd.Series | None":
    """The column of labels, or of each line the name of the column that holds its 1, or None."""
    known = [c for c in table if c in LABELS]
    if len(known) > 1:
        raise SidaeError(f"{file.name} has several columns of labels ({some(known)}); keep one.")
    if known or len(table.columns) == 1:
        labels = table[(known or list(table))[0]].str.strip()
        if labels.dropna().str.fullmatch(r"-?\d+\.0").all():  # how pandas writes numbers where one is missing
            labels = labels.str.removesuffix(".0")
        return labels.mask(labels == "")
    import pandas as pd

    numbers = table.apply(pd.to_numeric, errors="coerce")
    hot = numbers.loc[:, numbers.isin((0, 1)).all()]
    if len(hot.columns) > 1 and (hot.sum(axis=1) <= 1).all():
        return hot.idxmax(axis=1).where(hot.sum(axis=1) == 1)
    if len(hot.columns) == len(table.columns) > 1:
        raise SidaeError(f"{file.name} has lines with several 1s; an image can have one class.")
    return None


def _claims(tables: list[Named]) -> tuple[Claims, list[str]]:
    """What the lines say, and the names of images that are not there. Raises SidaeError where unclear."""
    claims: Claims = {}
    absent = []
    for t in tables:
        role = role_among(t.file.stem) or t.file.role
        for i, label in enumerate(t.labels if t.labels is not None else ()):
            line, found = f"line {i + t.first:,} of {t.file.name}", t.found[i]
            if len(found) > 1:  # 1.jpg may be in train/ and in test/, each with a table of its own
                beside = [p for p in found if p.parts[:len(t.file.parts) - 1] == t.file.parts[:-1]]
                found = [p for p in found if role and p.role == role] or beside or found
            if len(found) > 1:
                both = some(p.name for p in found)
                raise SidaeError(f"L{line[1:]} names {t.text[i]}, which can be {both}; write its whole path.")
            if not found:
                absent.append(t.text[i] or line)
                continue
            split = t.splits[i] if t.splits else found[0].role or role or "train"
            if split != "unlabeled" and label != label:  # NaN, which is not itself: there is none
                continue
            claim = split, None if split == "unlabeled" else label, line
            before = claims.setdefault(found[0], claim)
            if before[:2] != claim[:2]:
                said = f"{found[0].name} is {before[1]} in {before[0]} by {before[2]}"
                raise SidaeError(f"{said}, and {label} in {split} by {line}; keep one.")
    return claims, absent


def _label(pictures: list[File], tables: list[Named], reading: Reading) -> None:
    """Split and label of each picture as these tables say."""
    claims, absent = _claims(tables)
    names = some(t.file.name for t in tables)
    if not claims:
        raise SidaeError(f"No image has a label in {names}; fill its column of labels.")
    for p in pictures:
        p.split, p.label, line = claims.get(p, (p.role or "", None, ""))
        if p.role == "unlabeled":
            p.split, p.label = "unlabeled", None
        p.why = "" if line or p.role == "unlabeled" else "without a label"
    columns = some(t.file.name if t.known else f"the column {t.labels.name} of {t.file.name}" for t in tables)
    reading.notes.append(f"The classes are those that {columns} name{'s' * (len(tables) == 1)}.")
    if absent:
        verb = f"name{'s' * (len(absent) == 1)}"
        reading.notes.append(f"{count(len(absent), 'line')} of {names} {verb} no image ({some(absent)}).")
