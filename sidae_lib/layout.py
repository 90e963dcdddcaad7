"""Which split and which class every picture of a set belongs to: from the names of its folders, or from a table of labels.

Folders count as people write them: Training, TEST, val or train_images in any case are splits, and what holds them or the
class folders may lie deeper. A set that can be read in two ways is refused, with both ways named.
"""

import io
import os.path
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from .config import SidaeError

if TYPE_CHECKING:
    import pandas as pd

ROLES = {  # the name of a folder, table or array in any case -> the split that it is
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "evaluation", "dev"), "val"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabeled"),
}  # fmt: skip
PICTURES = {"images", "image", "imgs", "img", "photos", "pictures", "pics", "data", "dataset"}  # names that tell no class
FILLING = PICTURES | {"set"}  # words beside the name of a split: train_images, test set
MASKS = {"mask", "masks", "annotation", "annotations", "ground_truth", "groundtruth", "gt", "labels"}
SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\ufffd", "@eadir", "#recycle", "$recycle.bin",
          "__pycache__", "system volume information", "lost+found"}  # fmt: skip
FILES = ("file", "filename", "file_name", "files", "path", "filepath", "file_path", "image", "image_name", "image_path", "img",
         "image_id", "id", "name")  # of columns that name pictures, the surest first
LABELS = ("label", "labels", "class", "classes", "category", "target", "species", "breed", "diagnosis", "dx", "y")  # of columns


class Told:
    """What is said of a reading. notes: sentences; left: (split, reason) -> names of files left out; see_through: pictures
    with transparent parts; at_size: the pixels are known at the size asked for alone, not at the images' own."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.left: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self.see_through: set[str] = set()
        self.at_size = False

    def validation(self, splits: Collection[str]) -> bool:
        """Whether the validation split of these stands for the test split, for want of one; said where there is a validation
        split."""
        stands = "val" in splits and "test" not in splits
        if stands:
            self.notes.append("There is no test split, so the validation split stands for it.")
        elif "val" in splits:
            self.notes.append("The validation split stays out of training, since there is a test split.")
        return stands

    def take(self, other: "Told") -> None:
        self.notes += other.notes
        for key, names in other.left.items():
            self.left[key] += names

    def sentences(self) -> tuple[str, ...]:
        reasons: defaultdict[str, list[str]] = defaultdict(list)
        for (_, reason), names in self.left.items():
            reasons[reason] += names
        seen = [f"{count(self.see_through)} had transparent parts, which are white here."] * bool(self.see_through)
        left = [f"Left out: {count(names)}, {why} ({some(names)})." for why, names in reasons.items() if names]
        return (*self.notes, *seen, *left)


class File(NamedTuple):
    """One file of a set, wherever it is. parts: of its path within the set."""

    parts: tuple[str, ...]
    open: Callable[[], BinaryIO]

    @property
    def name(self) -> str:
        return "/".join(self.parts)

    @property
    def stem(self) -> str:
        return PurePosixPath(self.parts[-1]).stem.casefold()

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.parts[-1]).suffix.lower()

    @property
    def role(self) -> str | None:
        """The split that the outermost folder of its path with the name of one says."""
        return next((r for r in map(role_of, self.parts[:-1]) if r), None)


class Picture(NamedTuple):
    """A file with a readable header. mode: L or RGB; size: (width, height) the right way up; deep: more than eight bits."""

    file: File
    mode: str
    size: tuple[int, int]
    deep: bool
    jpeg: bool
    animated: bool


Row = tuple[str, str | None, Picture]  # split, class, picture


@contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Whatever a parser raises on damaged input becomes one sentence."""
    try:
        yield
    except SidaeError:
        raise
    except Exception as e:
        raise SidaeError(f"{what} ({type(e).__name__}: {' '.join(str(e).split())}); {advice}.") from e


def count(names: Sequence | set, noun: str = "file") -> str:
    """How many, for a sentence."""
    return f"{len(names):,} {noun}{'s' * (len(names) != 1)}"


def some(names: Iterable[str], most: int = 5) -> str:
    """The first of them, for a sentence."""
    names = list(names)
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def _words(name: str) -> list[str]:
    return re.split(r"[\W\d_]+", name.casefold())


@lru_cache(maxsize=10_000)  # a folder's name comes with each of its files
def role_of(name: str) -> str | None:
    """Of a name such as Training, test1 or train_images."""
    return ROLES.get("".join(w for w in _words(name) if w not in FILLING))


def role_among(words: str) -> str | None:
    """Of a name such as train-00000-of-00001 or x_test."""
    return next((r for r in map(role_of, re.split(r"[_\-. ]+", words)) if r), None)


def is_hidden(parts: Iterable[str]) -> bool:
    """Whether it is a file or folder of the system, which a file browser does not show as the person's."""
    return any(p[0] == "." or p.casefold() in SYSTEM for p in parts)


def sorted_out(pictures: list[Picture], folders: set[tuple[str, ...]], tables: list[File], path: Path, told: Told
               ) -> tuple[list[Row], list[File]]:  # fmt: skip
    """Split and class of each picture that has them, and the tables that they are from. Class folders count; where they name no
    two classes, or could be read in two ways, a table of labels does. Raises SidaeError where neither is clear."""
    tables = [t for t in tables if "submission" not in t.stem]  # a form for predictions, filled with anything
    names = {(*p.file.parts[:-1], p.file.stem) for p in pictures}
    masks, images = [], []
    for p in pictures:
        base = re.sub(r"[_-](mask|seg|segmentation)([_-]?\d+)?$", "", p.file.stem)
        (masks if base != p.file.stem and (*p.file.parts[:-1], base) in names else images).append(p)
    told.left["", "a mask beside its image"] += [p.file.name for p in masks]
    pictures = images
    mine, rows, unclear, by_name = Told(), [], None, _by_name(pictures if tables else [])
    try:
        rows = _by_folders(pictures, folders, path, mine)
    except SidaeError as e:
        unclear = e
    if len({c.casefold() for _, c, _ in rows if c}) < 2:
        named = [n for t in tables if (n := _named(t, by_name, len(pictures)))]
        if used := [n for n in named if n.known] or [n for n in named if unclear and n.labels is not None]:
            return _by_tables(pictures, used, told), [n.file for n in used]
        if unclear and tables:
            seen = [n.file.name for n in named]
            why = f"{some(seen)} has no column called label" if seen else (
                f"few of its images are named in {tables[0].name}, {pictures[0].file.name} for one is not")
            unclear = SidaeError(f"{unclear} Besides, {why}.")
    for t in tables if rows else ():
        if t.stem == "labels" and (merged := _of_folders(t, rows)):
            ours = some(sorted({c for _, c, _ in rows if c}))
            raise SidaeError(f"{path} can be read in two ways: the folders are the classes ({ours}), or what {t.name} says of "
                             f"them ({some(merged)}). Write a line for each image into {t.name} (columns file and label), or "
                             "remove it.")  # fmt: skip
        try:
            other = _named(t, by_name, len(pictures))
            claims = _by_tables(pictures, [other], Told()) if other and other.known else []
        except SidaeError:
            if t.stem == "labels":
                raise
            continue  # what is beside clear folders may be anything
        label = {p.file.parts: str(c).casefold() for _, c, p in claims}
        pairs = {(c.casefold(), label[p.file.parts]) for _, c, p in rows if c and p.file.parts in label}
        ours, theirs = ({pair[i] for pair in pairs} for i in (0, 1))
        if not len(ours) == len(theirs) == len(pairs):
            raise SidaeError(f"{path} can be read in two ways: the folders are the classes ({some(sorted(ours))}), or {t.name} "
                             f"names them ({some(sorted(theirs))}). Remove the one that is wrong.")
    if unclear:
        raise unclear
    told.take(mine)
    return rows, []


# --- by folders -----------------------------------------------------------------------------------------------------

ADVICE = "name the class of each image in a labels.csv (columns file and label)"


def _inner(pictures: Iterable[Picture], at: int) -> list[str]:
    """The names of the folders `at` of their paths, without those pictures that lie higher, in order."""
    return sorted({p.file.parts[at] for p in pictures if len(p.file.parts) > at + 1})


def _by_folders(pictures: list[Picture], folders: set[tuple[str, ...]], path: Path, told: Told) -> list[Row]:
    at = 0  # of the first folders that are not a wrapper
    while len(tops := _inner(pictures, at)) == 1 and not role_of(tops[0]) and _inner(pictures, at + 1):
        at += 1
    below: dict[str, list[Picture]] = {top: [] for top in tops}
    loose: list[Picture] = []
    for p in pictures:
        (below[p.file.parts[at]] if len(p.file.parts) > at + 1 else loose).append(p)
    roles, inner = _roles(tops), {top: _inner(below[top], at + 1) for top in tops}
    _no_masks(path.joinpath(*pictures[0].file.parts[:at]), tops)
    if below and not any(roles.values()) and all(any(map(role_of, names)) for names in inner.values()):  # cat/train/1.png
        if len(second := _inner((p for p in pictures if p.file.role), at + 2)) > 1:
            raise _two_ways(path, tops, second)
        told.left["", "beside the splits"] += [p.file.name for p in pictures if not p.file.role]
        return [(p.file.role, None if p.file.role == "unlabeled" else p.file.parts[at], p) for p in pictures if p.file.role]
    # a class may be called train: it stands among buses, and holds images or one folder of them, as they do
    telling = any(role and (role != "train" or len(inner[top]) > 1) for top, role in roles.items())
    if not telling and not (roles and all(roles.values())):
        return _classed("train", pictures, folders, at, path, told, least=2)
    for role, n in Counter(filter(None, roles.values())).items():
        if n > 1:
            both = some(top for top, r in roles.items() if r == role)
            raise SidaeError(f"{path} holds {both}, which all are names of the {role} split; keep one, or rename "
                             "what is a class.")  # fmt: skip
    rows: list[Row] = []
    others = [p for top, role in roles.items() if not role for p in below[top]]
    if others and "train" not in roles.values():
        try:
            rows += _classed("train", others, folders, at, path, told, least=2)  # class folders beside test/ or unlabeled/
        except SidaeError as e:
            raise SidaeError(f"{e} {some(filter(role_of, tops))} is taken for a split; rename it if it is a class.") from e
        others = []
    told.left["", "beside the splits"] += [p.file.name for p in (*loose, *others)]
    for top, role in sorted(roles.items(), key=lambda pair: pair[1] != "train"):
        taught = {c.casefold() for _, c, _ in rows if c}
        named = [name for name in inner[top] if role_of(name) != role and name.casefold() not in PICTURES - taught]
        if role == "unlabeled":
            rows += [(role, None, p) for p in below[top]]
        elif role in ("test", "val") and taught and not named and not _inner(below[top], at + 2):
            why = f"in {top}, which is taken for a split and has no class folders"
            told.left[role, why] += [p.file.name for p in below[top]]
        elif role:
            levels = [_inner(below[top], i) for i in range(at + 1, max(len(p.file.parts) for p in below[top]))]
            start = next((i for i, names in enumerate(levels) if len(names) > 1 or taught & {n.casefold() for n in names}), 0)
            rows += _classed(role, below[top], folders, at + 1 + start, path, told)
    return rows


def _roles(tops: Sequence[str]) -> dict[str, str | None]:
    """Of each folder the split; also of cars_train and cars_test, which share all other words."""
    words = {top: _words(top) for top in tops}
    loosely = {top: next(filter(None, map(ROLES.get, words[top])), None) for top in tops}
    others = {tuple(w for w in words[top] if w not in ROLES) for top, role in loosely.items() if role}
    exactly = {top: role_of(top) for top in tops}
    return loosely if not any(exactly.values()) and len(others) == 1 and {"train"} < {*loosely.values()} - {None} else exactly


def _no_masks(where: Path, names: Sequence[str]) -> None:
    """Raises SidaeError for folders such as images and masks, or train and train_masks."""
    plain = {"".join(w for w in _words(n) if w not in ROLES): n for n in names}
    if (masks := MASKS & plain.keys()) and any(n in PICTURES or not n for n in plain):
        raise SidaeError(f"{where} holds {plain[min(masks)]} beside images, which is no class; give the images alone, sorted "
                         f"into class folders, or {ADVICE}.")  # fmt: skip


def _two_ways(where: Path, outer: Sequence[str], second: Sequence[str]) -> SidaeError:
    return SidaeError(f"{where} can be read in two ways: {count(outer, 'outer folder')} are the classes ({some(outer)}), or "
                      f"{count(second, 'inner one')} ({some(second)}). Keep one level of folders, or {ADVICE}.")


def _classed(split: str, pictures: list[Picture], folders: set[tuple[str, ...]], at: int, path: Path, told: Told, least: int = 1
             ) -> list[Row]:  # fmt: skip
    """The pictures, whose class is the folder `at` of their path; SidaeError for fewer than `least` classes."""
    where = path.joinpath(*pictures[0].file.parts[:at])
    outer, second = _inner(pictures, at), _inner(pictures, at + 1)
    inner = [p for p in pictures if len(p.file.parts) > at + 1]
    if len(outer) < least or not outer:
        held = f"only one class folder ({outer[0]})" if outer else "no class folders"
        raise SidaeError(f"{where} has {held}; sort its images into {where.name}/<class>/, or {ADVICE}.")
    _no_masks(where, outer)
    if all(len(p.file.parts) > at + 2 for p in inner) and len({p.file.parts[at:at + 2] for p in inner}) > len(outer):
        raise _two_ways(where, outer, second)
    told.left[split, "beside the class folders"] += [p.file.name for p in pictures if len(p.file.parts) <= at + 1]
    prefix = inner[0].file.parts[:at]
    beside = {f[at] for f in folders if len(f) == at + 1 and f[:at] == prefix and not is_hidden(f) and not role_of(f[at])}
    if empty := sorted(beside - {*outer}):
        told.notes.append(f"Class folders without an image are left out: {some(empty)}.")
    return [(split, p.file.parts[at], p) for p in inner]


# --- by tables ------------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    """A table that names pictures. found: of each line those that it may mean; text: how it names them; labels: if it has
    them, known: by their column's name or its own; splits: if it has them; first: number of its first line."""

    file: File
    found: list[list[Picture]]
    text: list[str]
    labels: Any  # a pandas Series or None
    known: bool
    splits: list[str] | None
    first: int


def _by_name(pictures: list[Picture]) -> dict[str, list[Picture]]:
    """Every name of a picture in small letters: with and without suffix, and with as many of its folders as one likes."""
    out: defaultdict[str, list[Picture]] = defaultdict(list)
    for p in pictures:
        path = p.file.name.casefold()
        for name in {path, path.removesuffix(p.file.suffix)}:
            parts = name.split("/")
            for i in range(len(parts)):
                out["/".join(parts[i:])].append(p)
    return out


def _named(file: File, by_name: dict[str, list[Picture]], most: int) -> Named | None:
    """The table, if most of its lines name pictures, or most of the pictures are in its lines."""
    table, first = _table(file), 2
    if any(re.split(r"[/\\]", c.casefold().strip())[-1] in by_name for c in table):  # it has no line of names
        table, first = _table(file, [*map(str, range(len(table.columns)))]), 1
    keys = {c: _keys(table[c], by_name, most) for c in table
            if c.casefold().strip() not in LABELS and not c.startswith("Unnamed")}  # fmt: skip
    known = {c: FILES.index(name) for c in keys if (name := c.casefold().strip()) in FILES}
    pictured = {c for c, k in keys.items() if 2 * sum(bool(re.search(r"\.[a-z]\w{1,4}$", x)) for x in k) > len(k)}
    likely = pictured or {*known} or {*keys}  # a column of numbers is none beside one of file names
    sure = lambda c: (_enough(keys[c], by_name, most), -known.get(c, 99))  # noqa: E731
    column = max((c for c in keys if c in likely), key=sure, default=None)
    if column is None or not _enough(keys[column], by_name, most):
        return None
    splits, rest = None, table.drop(columns=column)
    if first == 1:
        rest = rest.rename(columns={c: "label" for c in rest.columns[:1]})
    for c in rest:
        if c.casefold().strip() in ("split", "subset", "set", "partition"):
            roles = rest[c].map(role_of, na_action="ignore")
            if roles.notna().all():
                splits, rest = roles.tolist(), rest.drop(columns=c)
            elif roles.notna().any() or c.casefold().strip() == "split":
                odd = rest[c][roles.isna()].iloc[0]
                raise SidaeError(f"{file.name} has {'nothing' if odd != odd else odd} in its column {c}, which is no split; "
                                 "write train, test, val or unlabeled.")  # fmt: skip
    labels, found = _labels(rest, file), [by_name.get(k, []) for k in keys[column]]
    known = labels is not None and (file.stem == "labels" or labels.name is None or labels.name.casefold().strip() in LABELS)
    return Named(file, found, table[column].fillna("").tolist(), labels, known, splits, first)


def _keys(column: "pd.Series", by_name: dict, most: int) -> list[str]:
    """Names of pictures in small letters, without the folders that all of them begin with where they match only so."""
    keys = column.fillna("").str.strip().str.replace("\\", "/").str.removeprefix("./").str.casefold().tolist()
    shared = os.path.commonprefix([k.split("/")[:-1] for k in keys if k] or [[]])
    for n in range(len(shared) + 1):
        short = ["/".join(k.split("/")[n:]) for k in keys]
        if _enough(short, by_name, most):
            return short
        if n < len(shared) and role_of(shared[n]):  # what it says of test/1.png does not hold for train/1.png
            break
    return keys


def _enough(keys: list[str], by_name: dict, most: int) -> bool:
    return 2 * len({*keys} & by_name.keys()) >= max(1, min(len(keys), most))


def _by_tables(pictures: list[Picture], tables: list[Named], told: Told) -> list[Row]:
    """In the order of the pictures, whatever that of the lines is."""
    rows: dict[tuple[str, ...], Row] = {}
    said: dict[tuple[str, ...], str] = {}
    absent = []
    for t in tables:
        role = role_among(t.file.stem) or t.file.role
        for i, (found, label) in enumerate(zip(t.found, t.labels if t.labels is not None else ())):
            line = f"line {i + t.first:,} of {t.file.name}"
            if len(found) > 1:  # 1.jpg may stand in train/ and in test/, each with a table of its own
                beside = [p for p in found if p.file.parts[:len(t.file.parts) - 1] == t.file.parts[:-1]]
                found = [p for p in found if role and p.file.role == role] or beside or found
            if len(found) > 1:
                raise SidaeError(f"L{line[1:]} names {t.text[i]}, which can be {some(p.file.name for p in found)}; write its "
                                 "whole path.")  # fmt: skip
            if not found:
                absent.append(t.text[i] or line)
                continue
            p = found[0]
            split = t.splits[i] if t.splits else p.file.role or role or "train"
            if split == "unlabeled" or label == label:  # no label is NaN, which is not itself
                row = split, None if split == "unlabeled" else str(label), p
                if (before := rows.setdefault(p.file.parts, row)) != row:
                    raise SidaeError(f"{p.file.name} is {before[1]} in {before[0]} by {said[p.file.parts]}, and {row[1]} in "
                                     f"{row[0]} by {line}; keep one.")  # fmt: skip
                said[p.file.parts] = line
    names = some(t.file.name for t in tables)
    if not rows:
        raise SidaeError(f"No image has a label in {names}; fill its column of labels.")
    columns = some(t.file.name if t.known else f"the column {t.labels.name} of {t.file.name}" for t in tables)
    told.notes.append(f"The classes are those that {columns} name{'s' * (len(tables) == 1)}.")
    if absent:
        told.notes.append(f"{count(absent, 'line')} of {names} name{'s' * (len(absent) == 1)} no image ({some(absent)}).")
    for p in pictures:
        if p.file.role == "unlabeled":
            rows[p.file.parts] = ("unlabeled", None, p)
        elif p.file.parts not in rows:
            told.left[p.file.role or "", "without a label"].append(p.file.name)
    return [rows[p.file.parts] for p in pictures if p.file.parts in rows]


def _table(file: File, names: list[str] | None = None) -> "pd.DataFrame":
    """All as words. What pandas and R write for nothing is missing; a class may be called None."""
    import pandas as pd  # slow to import

    with reading(f"{file.name} could not be read", "it must be a table with a line for each image"):
        with file.open() as f:
            raw = f.read()
        try:
            text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("cp1252")  # as Excel saves it
        text = unicodedata.normalize("NFC", text)
        separator = max(",;\t", key=text.strip().partition("\n")[0].count)
        return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, names=names, index_col=False, skipinitialspace=True,
                           keep_default_na=False, na_values=["", "NA", "N/A", "NaN", "nan"]).rename(columns=str)  # fmt: skip


def _of_folders(file: File, rows: list[Row]) -> list[str]:
    """The labels that a table gives to class folders, where some share one: patients and their diagnosis, for instance."""
    table, tops = _table(file), {c.casefold() for _, c, _ in rows if c}
    for c in table:
        keys = table[c].fillna("").str.strip().str.casefold()
        if 2 * len({*keys} & tops) > len(tops) and (labels := _labels(table.drop(columns=c), file)) is not None:
            of = dict(zip(keys, labels))
            return sorted({*map(str, of.values())}) if len({of[k] for k in {*keys} & tops}) < len({*keys} & tops) else []
    return []


def _labels(table: "pd.DataFrame", file: File) -> "pd.Series | None":
    """The column of labels, or of each line the name of the column that holds its 1; None if the table has neither."""
    known = [c for c in table if c.casefold().strip() in LABELS]
    if len(known) == 1 or len(table.columns) == 1:
        labels = table[(known or list(table))[0]].str.strip()
        if labels.dropna().str.fullmatch(r"-?\d+\.0").all():  # pandas writes whole numbers so where one is missing
            labels = labels.str.removesuffix(".0")
        return labels.mask(labels == "")
    if known:
        raise SidaeError(f"{file.name} has several columns of labels ({some(known)}); keep one.")
    import pandas as pd

    numbers = table.apply(pd.to_numeric, errors="coerce")
    hot = numbers.loc[:, numbers.isin((0, 1)).all()]
    if len(hot.columns) > 1 and (hot.sum(axis=1) <= 1).all():
        return hot.idxmax(axis=1).where(hot.sum(axis=1) == 1)
    if len(hot.columns) == len(table.columns) > 1:
        raise SidaeError(f"{file.name} has lines with several 1s; an image can have one class.")
    return None
