"""The files of a set, and which split and class each picture has by the names of its folders.

Names count as people write them: Training, TEST, val or train_images in any case are splits, and class
folders may lie deeper. A set that can be read in two ways is refused, with both ways named.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from .config import SidaeError

ROLES = {  # the name of a folder, table or array in any case -> the split that it is
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "evaluation", "dev"), "val"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabeled"),
}
PICTURES = {"images", "image", "imgs", "img", "photos", "pictures", "pics", "data", "dataset"}  # no class
FILLING = PICTURES | {"set"}  # words beside the name of a split: train_images, test set
MASKS = {"mask", "masks", "annotation", "annotations", "ground_truth", "groundtruth", "gt", "labels"}
LABELS = "label labels class classes category target species breed diagnosis dx y".split()
ADVICE = "name the class of each image in a labels.csv (columns file and label)"


@contextmanager
def one_sentence(what: str, advice: str) -> Iterator[None]:
    """Whatever a parser raises on damaged input becomes one sentence."""
    try:
        yield
    except SidaeError:
        raise
    except Exception as e:
        raise SidaeError(f"{what} ({type(e).__name__}: {' '.join(str(e).split())}); {advice}.") from e


def count(n: int, noun: str = "file") -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def some(names: Iterable[str], most: int = 5) -> str:
    """The first of them, for a sentence."""
    names = list(names)
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def _words(name: str) -> list[str]:
    return re.split(r"[\W\d_]+", name.casefold())


@lru_cache(maxsize=10_000)  # a folder's name comes with each of its files
def role_of(name: str, besides: frozenset[str] = frozenset()) -> str | None:
    """The split that a name such as Training, test1 or train_images says. besides: more words to ignore."""
    return ROLES.get("".join(w for w in _words(name) if w not in FILLING | besides))


def role_among(words: str) -> str | None:
    """The split that a name such as train-00000-of-00001 or x_test says."""
    return next(filter(None, map(role_of, re.split(r"[_\-. ]+", words))), None)


@dataclass(eq=False)
class File:
    """One file of a set, wherever it lies. parts: its path within the set. why: it is left out."""

    parts: tuple[str, ...]
    open: Callable[[], BinaryIO]
    split: str = ""
    label: str | None = None
    why: str = ""
    mode: str = ""  # of a picture, as the rest: L or RGB
    size: tuple[int, int] = (0, 0)  # width and height, the right way up
    deep: tuple | None = None  # of more than eight bits: least, greatest, `pictures.bulk`, whether 16 bits
    jpeg: bool = False
    animated: bool = False
    see_through: bool = False

    def __post_init__(self) -> None:
        self.name = "/".join(self.parts)
        last = PurePosixPath(self.parts[-1])
        self.stem, self.suffix = last.stem.casefold(), last.suffix.lower()
        # the split that its outermost folder with the name of one says
        self.role = next(filter(None, map(role_of, self.parts[:-1])), None)


class Reading:
    """A place while it is read, and what is said of that. size, antialias: of images that are resized.
    folders: the parts of all folders. at_size: pixels are known at this size, not at the images' own."""

    def __init__(self, path: Path, size: int, antialias: bool) -> None:
        self.path, self.size, self.antialias, self.at_size = path, size, antialias, False
        self.files: list[File] = []
        self.folders: set[tuple[str, ...]] = set()
        self.notes: list[str] = []

    def validation(self, splits: Collection[str]) -> bool:
        """Whether the validation split of these stands for a test split that is missing."""
        if "val" in splits and "test" in splits:
            self.notes.append("The validation split stays out of training, since there is a test split.")
        elif "val" in splits:
            self.notes.append("There is no test split, so the validation split stands for it.")
        return "val" in splits and "test" not in splits

    def left(self) -> list[str]:
        """A sentence for each reason why files are left out."""
        reasons = defaultdict(list)
        for f in self.files:
            reasons[f.why].append(f.name)
        reasons.pop("", None)
        return [f"Left out: {count(len(names))}, {why} ({some(names)})." for why, names in reasons.items()]

    def sentences(self) -> tuple[str, ...]:
        seen = sum(f.see_through and not f.why for f in self.files)
        white = [f"{count(seen)} had transparent parts, which are white here."] if seen else []
        return (*self.notes, *white, *self.left())


# --- by folders ----------------------------------------

Paths = dict[File, tuple[str, ...]]  # picture -> its folders, without wrappers and the split


def _level(paths: Iterable[tuple[str, ...]], at: int) -> list[str]:
    """The names of the folders at this depth."""
    return sorted({path[at] for path in paths if len(path) > at})


def by_folders(pictures: list[File], reading: Reading) -> None:
    """Sets split and label of each picture, or why it is left out. Raises SidaeError if that is unclear."""
    paths = [p.parts[:-1] for p in pictures]
    for depth in range(max(map(len, paths))):
        _no_masks(_level(paths, depth), reading)
    above: tuple[str, ...] = ()  # folders that only hold the set
    tops = _level(paths, 0)
    while len(tops) == 1 and not role_of(tops[0]) and _level(paths, len(above) + 1):
        above += (tops[0],)
        tops = _level(paths, len(above))
    at = len(above)
    roles = _roles(tops)
    inner = {top: _level([p[at:] for p in paths if p[at:at + 1] == (top,)], 1) for top in tops}
    class_first = bool(tops) and not any(roles.values()) and all(any(map(role_of, i)) for i in inner.values())
    if class_first:  # cat/train/1.png
        roles = {name: role_of(name) for names in inner.values() for name in names}
    # train is a class, not a split, where the other folders are classes and it holds images as they do
    elif {*roles.values()} == {"train", None} and all(len(inner[t]) < 2 for t, r in roles.items() if r):
        roles = {}
    for role, n in Counter(filter(None, roles.values())).items():
        if n > 1 and not class_first:
            both = some(top for top in tops if roles[top] == role)
            raise SidaeError(f"{reading.path} holds {both}, which all are names of the {role} split; keep "
                             "one, or rename what is a class.")
    groups, level = defaultdict[str | None, Paths](dict), at + class_first
    for p in pictures:
        role = roles.get(p.parts[level]) if len(p.parts) > level + 1 else None
        groups[role][p] = p.parts[at:level] + p.parts[level + bool(role):-1]
    others = groups.pop(None, {})
    taught: set[str] = set()
    if "train" in groups or class_first or groups and not any(others.values()):
        for p in others:
            p.why = "beside the splits"
    elif others:
        try:
            taught = _classed("train", others, above, reading, least=2)
        except SidaeError as e:
            hint = f" {some(filter(role_of, tops))} is taken for a split; rename it if it is a class."
            raise SidaeError(f"{e}{hint if groups else ''}") from None
    for role in sorted(groups, key=lambda role: role != "train"):
        where = above if class_first else next(iter(groups[role])).parts[:at + 1]
        taught |= _classed(role, groups[role], where, reading, taught)


def _roles(tops: list[str]) -> dict[str, str | None]:
    """The split of each folder; also of cars_train and cars_test, which share all other words."""
    shared = frozenset(set.intersection(*({*_words(t)} for t in tops)) - ROLES.keys() if tops else ())
    loosely = {top: role_of(top, shared) for top in tops}
    return loosely if {"train"} < {*loosely.values()} - {None} else {top: role_of(top) for top in tops}


def _no_masks(names: list[str], reading: Reading) -> None:
    """Raises SidaeError for folders such as images and masks, or train and train_masks."""
    plain = {"".join(w for w in _words(n) if w not in ROLES): n for n in names}
    if (masks := MASKS & plain.keys()) and any(n in PICTURES or not n for n in plain):
        raise SidaeError(f"{reading.path} holds {plain[min(masks)]} beside images, which is no class; give "
                         f"the images alone, sorted into class folders, or {ADVICE}.")


def _classed(split: str, paths: Paths, above: tuple[str, ...], reading: Reading, taught: Collection[str] = (),
             least: int = 1) -> set[str]:
    """Labels the pictures of a split by the first folders below `above` that differ; returns the classes in
    small letters. taught: those of the training split. Raises SidaeError for fewer than `least`."""
    levels = [_level(paths.values(), i) for i in range(2 + max(map(len, paths.values())))]
    telling = [n for n in levels[0] if role_of(n) != split and n.casefold() not in PICTURES - {*taught}]
    untold = split in ("test", "val") and taught and not telling and not levels[1]
    for p in paths:
        p.split = split
        p.why = f"in {above[-1]}, which is taken for a split and has no class folders" if untold else ""
    if split == "unlabeled" or untold:
        return set()
    known = [{*taught} & {n.casefold() for n in names} for names in levels]
    at = next((i for i, names in enumerate(levels) if len(names) > 1 or known[i]), 0)
    inner = [folders for folders in paths.values() if len(folders) > at]
    above += inner[0][:at] if inner else ()
    where, outer, second = reading.path.joinpath(*above), levels[at], levels[at + 1]
    if len(outer) < least or not outer:
        held = f"only one class folder ({outer[0]})" if outer else "no class folders"
        raise SidaeError(f"{where} has {held}; sort its images into {where.name}/<class>/, or {ADVICE}.")
    pairs = {folders[at:at + 2] for folders in inner}
    if all(len(names) == 2 for names in pairs) and len(pairs) > len(outer):
        raise SidaeError(f"{where} can be read in two ways: {count(len(outer), 'outer folder')} are the "
                         f"classes ({some(outer)}), or {count(len(second), 'inner one')} ({some(second)}). "
                         f"Keep one level of folders, or {ADVICE}.")
    for p, folders in paths.items():
        if len(folders) > at:
            p.label = folders[at]
        else:
            p.why = "beside the class folders"
    empty = {f[-1] for f in reading.folders if f[:-1] == above and not role_of(f[-1])} - {*outer}
    if empty:
        reading.notes.append(f"Class folders without an image are left out: {some(sorted(empty))}.")
    return {name.casefold() for name in outer}
