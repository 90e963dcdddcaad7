"""How finished records of a store or a bundle come under the published ones."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from gzip import GzipFile
from io import BytesIO
from itertools import takewhile
from pathlib import Path

from . import data, paths, store, train
from .config import SidaeError

FILE_BYTES = 5_000_000  # of one file of published records, unpacked


def packed(content: bytes) -> bytes:
    """A gzip file without name and time. Every Python writes this header; that of gzip.compress differs."""
    out = BytesIO()
    with GzipFile("", "wb", 9, out, mtime=0) as f:
        f.write(content)
    return out.getvalue()


def publish(records: Iterable[store.Record]) -> None:
    """Writes all published records anew: a file for each set that runs were trained on, whole or not at all.

    Lines are sorted by run, kind, epoch and key. Where a file would pass FILE_BYTES it is divided, and the
    key of a run alone says in which part its lines are. So a new record adds a line and moves no other,
    except where it adds a part. A file is written where what it holds has changed, for another zlib may pack
    the same into other bytes. Once all are written, other files of lines are removed, plain ones too. Raises
    train.Damaged, and writes nothing, where one of the files is there and not whole.
    """
    def order(r: store.Record) -> tuple:
        return store.id_of(r)[0], r.get("kind", ""), r.get("epoch", 0), r["key"]

    sets: dict[Path, list[tuple[int, bytes]]] = defaultdict(list)
    for r in sorted(records, key=order):
        run = r["config"].get("run", r["config"])
        line = store.as_line(r).encode() + b"\n"
        sets[data.records_file(run["data"])].append((int(store.id_of(r)[0], 16), line))
    files: dict[Path, bytes] = {}
    for file, lines in sets.items():
        for n in range(1, len(lines) + 1):
            parts = [b"".join(line for run, line in lines if run * n >> 64 == part) for part in range(n)]
            if max(map(len, parts)) <= FILE_BYTES:
                break
        files |= zip(store.parts(file), parts)
    changed = {file: held for file, held in files.items() if not file.exists() or store.content(file) != held}
    for file, held in reversed(changed.items()):  # lines move to later parts, so those are written first
        train.write(file, packed(held))
    for file in set(map(Path, store.line_files(paths.records()))) - set(files):
        file.unlink()


def weights(records: Iterable[store.Record]) -> set[tuple[int, str]]:
    """(epoch, sha256) of every backbone that records of one run name."""
    out = set()
    for r in records:
        if "backbone" in r:
            out.add((r["epoch"], r["backbone"]))
        for name, sha in r.get("files", {}).items():
            out.add((int(re.findall(r"\d+", name)[0]), sha))
    return out


def _fitting(offer: list[store.Record], filed: list[store.Record]) -> tuple[list[store.Record], bool]:
    """The offered records of a run that are to be filed, and whether they take the place of those that are.

    Filed records are of one training. Two trainings of one run have other backbones, except at epoch 0.
    """
    if own := [r for r in offer if "run_key" not in r]:  # the run's own record, written at its end, decides
        offer = [r for r in offer if weights([r]) <= weights(own)]
    new, old = dict(weights(offer)), dict(weights(filed))  # epoch -> sha256
    if len(new) < len(weights(offer)):  # two trainings, and nobody knows which of them will be finished
        return [], False
    both = new.keys() & old.keys()
    differ = any(new[epoch] != old[epoch] for epoch in both)
    finished = any("run_key" not in r for r in filed)
    last, last_filed, last_both = (max(epochs, default=0) for epochs in (new, old, both))
    if differ and (bool(own), last) > (finished, last_filed):
        return offer, True
    if differ or last and last_filed and not last_both:  # another training, or perhaps another
        return [r for r in offer if weights([r]) and weights([r]) <= weights(filed)], False
    # Evaluations from before 0.2 name no backbone: they are filed with the record of their run alone.
    return [r for r in offer if weights([r]) or own or finished], False


def adopt(source: Path, refused: Collection[str] = (), log: Callable = print) -> list[str]:
    """Files the records of a store or a bundle under the published ones; returns the keys that are new there.

    All records of a run are of one training. Evaluations may come before their run's record, and later ones
    join them where both name the same backbone of an epoch after 0. Of two trainings the one that got further
    stays, whole; of two that got as far, the one that is filed. Left out, and counted: what is there already,
    keys in `refused`, and what is not known to belong. A source may be gzip files. Published files that are
    plain become gzip files. Raises SidaeError where the source is missing or no whole gzip file, or where a
    published line is damaged.
    """
    if not source.exists():
        raise SidaeError(f"There is no store or bundle {source}; give the folder of a store or a file that "
                         "--bundle wrote.")  # fmt: skip
    offered: dict[str, dict[str, store.Record]] = defaultdict(dict)
    files = map(Path, store.line_files(source)) if source.is_dir() else takewhile(Path.exists, store.parts(source))
    for place in (*store.local(source).values(), *store.lines(files)):
        if r := store.read(place, log if isinstance(place, store.Line) else None):
            offered[store.id_of(r)[0]][r["key"]] = r
    new, left = [], defaultdict(int)
    with store.alone(paths.records() / ".lock", "set SIDAE_RECORDS to a folder that can"):
        lines, filed = store.published(), defaultdict[str, dict[str, store.Record]](dict)
        for r in store.every(where=lines):
            filed[store.id_of(r)[0]][r["key"]] = r
        if damaged := {place.file for ids, place in lines.items() if ids[1] not in filed.get(ids[0], ())}:
            raise SidaeError(f"Lines of {', '.join(sorted(damaged))} are damaged; restore them first. "
                             "Nothing is filed.")  # fmt: skip
        if any(e.name.endswith(".jsonl") for e in store.line_files(paths.records())):
            # As they are, before anything is new: a kill then leaves no two trainings of a run side by side.
            publish(r for records in filed.values() for r in records.values())
            log(f"The files in {paths.records()} were plain and are gzip files now.")
        for run, by_key in sorted(offered.items()):
            offer = [r for key, r in by_key.items() if key not in refused and run not in refused]
            left["of smoke scale"] += len(by_key) - len(offer)
            fitting, instead = _fitting(offer, list(filed[run].values()))
            left["not known to be of the trajectory that is filed"] += len(offer) - len(fitting)
            if instead:
                log(f"Two machines made the run {run}: the one that is offered got further, so its "
                    f"{len(fitting)} records take the place of the {len(filed[run])} that were filed.")  # fmt: skip
                filed[run] = {}
            added = {r["key"]: r for r in fitting if r["key"] not in filed[run]}
            left["there already"] += len(fitting) - len(added)
            filed[run] |= added
            new += added
        if new:
            publish(r for records in filed.values() for r in records.values())
    log(f"{len(new)} of {sum(map(len, offered.values()))} records are new in {paths.records()}" +
        "".join(f"; {n} {why}" for why, n in left.items() if n) + ".")  # fmt: skip
    return new
