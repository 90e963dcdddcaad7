"""The store: runs and evaluations kept as JSON, and found again by their key.

The local store (SIDAE_RUNS) has a folder for each run, with its record, its evaluations and its weights.
Published records (SIDAE_RECORDS) are a few gzip files with one record a line, which `adoption` writes. Plain
files of lines are read too.
"""

import gzip
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from . import paths, train
from .config import EvalConfig, Record, RunConfig, SidaeError, digest

Config = RunConfig | EvalConfig
Id = tuple[str, str]  # the key of the run, then that of the record, which is the same for the run's own record
ENDS = (".jsonl", ".jsonl.gz")  # of the names of files with a record a line
RECORD_BYTES = 2**24  # of a record, or of a file of a bundle; a run of 200 epochs has 60 thousand
# An integer of 19 digits or more is JSON, but neither an index nor a count, and too long for a float column.
LONG = re.compile(r"[\[,:]\s*-?\d{19}")
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what `parsed` raises
HEAD = re.compile(r'\{"key":"([0-9a-f]{16})",(?:"run_key":"([0-9a-f]{16})",)?')  # how a published line begins


class Line(NamedTuple):
    """A published record, as it stands in its file. Number 0: the file cannot be unpacked, and `text` says so."""
    file: str
    number: int
    text: str


def run_of(config: Config) -> RunConfig:
    """The run itself, or the run that is evaluated."""
    return config if isinstance(config, RunConfig) else config.run


def folder(config: Config) -> Path:
    """Where the local store keeps a run, its evaluations and its weights."""
    return paths.runs() / run_of(config).key()


def file_of(config: Config) -> Path:
    """Where the local store keeps the record of a config."""
    return folder(config) / ("record.json" if isinstance(config, RunConfig) else f"eval-{config.key()}.json")


def _filed(path: Path) -> Id:
    run = path.parent.name
    return run, run if path.name == "record.json" else path.stem.removeprefix("eval-")


def checkpoint(run: RunConfig) -> Path:
    """Where the local store keeps what an unfinished run goes on from."""
    return folder(run) / "checkpoint.safetensors"


def backbone(run: RunConfig, epoch: int | None = None) -> Path:
    """The weights of a run's backbone at an epoch (default: the last)."""
    return paths.backbone(run.key(), run.epochs if epoch is None else epoch)


def id_of(record: Record) -> Id:
    """The key of a record's run, and its own."""
    return record.get("run_key", record["key"]), record["key"]


def as_line(record: Record) -> str:
    """A record as JSON: its keys first, its checksum last. Raises ValueError for NaN and infinity."""
    content = {k: v for k, v in record.items() if k != "check"}
    keys = {k: record[k] for k in ("key", "run_key") if k in record}
    return json.dumps(keys | content | {"check": digest(content)}, separators=(",", ":"))


def parsed(text: str) -> Record:
    """The record that a text is. Raises one of UNREADABLE where it is none, or not what was written."""
    if len(text) > RECORD_BYTES or LONG.search(text):
        raise ValueError
    record = json.loads(text)
    check = digest({k: v for k, v in record.items() if k != "check"})  # raises for NaN and infinity too
    if digest(record["config"])[:16] != record["key"] or record.get("check", check) != check:
        raise ValueError
    return record


def read(place: Path | Line, log: Callable | None = None) -> Record | None:
    """The record in a file or a line.

    It is damaged where it is not JSON of finite numbers, where its key is not that of its config or its file,
    or where it is not what was written (records since 0.1 hold a checksum). A damaged line is named and gives
    None. A damaged file raises train.Damaged; with a log it is set aside instead and gives None.
    """
    try:
        if isinstance(place, Line):
            return parsed(place.text)
        if place.stat().st_size > RECORD_BYTES:
            raise ValueError
        record = parsed(place.read_text())
        if id_of(record) != _filed(place):
            raise ValueError
        return record
    except (OSError, *UNREADABLE) as e:
        if isinstance(place, Line):
            line = f"Line {place.number} of {place.file} is no whole record; it is left out."
            (log or warnings.warn)(line if place.number else place.text)
            return None
        sentence = f"The record {place} is damaged; move it away and it is computed again."
        damaged = train.Damaged(sentence, place)
        if log is None:
            raise damaged from e
        set_aside(damaged, log)
        return None


def local(store: Path | None = None) -> dict[Id, Path | Line]:
    """The files of a store's records (default: of the local store)."""
    return {_filed(path): path for path in sorted((store or paths.runs()).glob("*/*.json"))}


def line_files(of: Path) -> list[os.DirEntry[str]]:
    """A folder's files of lines. Gzip files come last, for of two lines with one key the later counts."""
    entries = os.scandir(of) if os.path.isdir(of) else ()
    return sorted((e for e in entries if e.name.endswith(ENDS)), key=lambda e: (e.name.endswith(".gz"), e.name))


def published() -> dict[Id, Path | Line]:
    """The lines of the published records. A file is read again when its size or its time has changed."""
    records = paths.records()
    return _index(str(records), *((e.path, e.stat().st_size, e.stat().st_mtime_ns) for e in line_files(records)))


@lru_cache(maxsize=2)
def _index(records: str, *files: tuple[str, int, int]) -> dict[Id, Path | Line]:
    """Lines by the keys that they begin with: a record is parsed when it is asked for."""
    if not files and any(Path(records).glob("*/record.json")):
        warnings.warn(f"{records} holds folders of records, which are no longer read: file them as lines, by "
                      f"`python -m sidae_lib adopt {records}`.", stacklevel=3)  # fmt: skip
    out: dict[Id, Path | Line] = {}
    for line in _lines_or_damage(files):
        if head := HEAD.match(line.text):
            key, run = head.groups()
            out[run or key, key] = line
        else:  # another order, or damage, which is said now; the line is kept, for `adoption` must drop none
            record = read(line)
            out[id_of(record) if record else (line.file, str(line.number))] = line
    return out


def _lines_or_damage(files: Iterable[tuple[str, int, int]]) -> Iterator[Line]:
    """Lines. A file that cannot be unpacked gives one that says so, for `adoption` must not file beside it."""
    for file, *_ in files:
        try:
            yield from lines([Path(file)])
        except train.Damaged as e:
            yield Line(file, 0, str(e))


def lines(files: Iterable[Path]) -> Iterator[Line]:
    """The lines of files that hold a record a line. Raises train.Damaged for a gzip file that is not whole."""
    for file in files:
        for number, text in enumerate(content(file).decode(errors="replace").split("\n"), 1):
            if text.strip():  # a line end of Windows leaves a \r
                yield Line(str(file), number, text)


def content(file: Path) -> bytes:
    """What a file of lines holds, unpacked. Raises train.Damaged for a gzip file that is not whole."""
    held = file.read_bytes()
    if file.suffix != ".gz" or held.startswith(b"{"):  # a bundle is plain text, whatever its name
        return held
    try:
        if not held:  # which gzip takes for a file of nothing
            raise EOFError
        return gzip.decompress(held)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        sentence = f"{file} is no whole gzip file, so none of its records is read; restore it or copy it again."
        raise train.Damaged(sentence, file) from e


def every(kind: str = "", where: Mapping[Id, Path | Line] | None = None) -> Iterator[Record]:
    """The records of a kind, `run` or `evaluation`, or of both; where: `local()`, `published()` or both."""
    if where is None:
        where = published() | local()  # of two with one key the local one counts
    for (run, key), place in where.items():
        if kind in ("", "run" if key == run else "evaluation") and (record := read(place)):
            yield record


def find(config: Config, log: Callable | None = None) -> Record | None:
    """The record of a config, from the local store or else a published one, or None.  log: as for `read`."""
    file, ids = file_of(config), (run_of(config).key(), config.key())
    if file.exists() and (record := read(file, log)):
        return record
    return read(line) if (line := published().get(ids)) else None


def there(config: Config) -> bool:
    """Whether there is a record, which may be damaged: much faster than `find`."""
    return (run_of(config).key(), config.key()) in published() or file_of(config).exists()


def recorded(configs: Sequence[Config]) -> list[Record]:
    """The records that are there, each once."""
    return [r for c in dict.fromkeys(configs) if (r := find(c)) is not None]


def own(records: Sequence[Record]) -> list[Record]:
    """Those that were computed here and are not published."""
    there = published()
    return [r for r in records if id_of(r) not in there]


def missing(configs: Sequence[Config]) -> list[Config]:
    """Those without a record."""
    return [c for c in dict.fromkeys(configs) if find(c) is None]


@contextmanager
def alone(lock: Path, otherwise: str) -> Iterator[None]:
    """One process at a time is inside; the kernel frees the lock when its owner dies. Raises SidaeError where
    nothing can be written; `otherwise` says what to do then."""
    with ExitStack() as held:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(lock))
        except OSError as e:
            raise SidaeError(f"{lock.parent} cannot be written ({e.strerror}); {otherwise}.") from e
        yield


@contextmanager
def locked(config: Config) -> Iterator[None]:
    """One process at a time works on a run."""
    with alone(folder(config) / "lock", "set SIDAE_RUNS to a store that can"):
        for dead in folder(config).glob(".*.tmp"):  # only the lock's owner writes here: its writer was killed
            dead.unlink(missing_ok=True)
        yield


def keep(config: Config, record: Record) -> Record:
    """Files a record with its checksum, under the caller's lock. Raises SidaeError for what `read` would refuse."""
    try:
        kept = parsed(line := as_line(record))
    except UNREADABLE as e:
        size = f"{len(json.dumps(record)) / 2**20:.1f} MiB, of at most {RECORD_BYTES >> 20}"
        raise SidaeError(f"The record of {config.key()} cannot be filed: it has {size}, or holds a number that "
                         "is none. Nothing is written.") from e  # fmt: skip
    train.write(file_of(config), line.encode())
    if bundle := os.environ.get("SIDAE_BUNDLE"):
        _append(Path(bundle), line.encode() + b"\n")
    return kept


def parts(file: Path) -> Iterator[Path]:
    """The files that one goes on in, without end: records.jsonl, records-2.jsonl, records-3.jsonl ..."""
    yield file
    stem = Path(file.name.removesuffix(".gz")).stem
    for n in count(2):
        yield file.with_name(f"{stem}-{n}{file.name.removeprefix(stem)}")


def _append(bundle: Path, line: bytes) -> None:
    """To the first file of a bundle that has room; several processes may share them."""
    with alone(bundle.with_name(f".{bundle.name}.lock"), "choose another --bundle"):
        for part in parts(bundle):
            size = part.stat().st_size if part.exists() else 0
            if not size or size + len(line) <= RECORD_BYTES:
                with open(part, "ab", buffering=0) as f:
                    f.write(line)  # in one write, so that no process is stopped between two
                return


def _aside(path: Path) -> str:
    """Gives a file a name under which nothing reads it any more. Nothing is deleted."""
    to = next(p for n in count(1) if not (p := path.with_name(f"{path.name}.aside-{n}")).exists())
    path.rename(to)
    return to.name


def set_aside(damaged: train.Damaged, log: Callable) -> None:
    """Renames a damaged or foreign file of the local store."""
    try:
        name = _aside(damaged.path)
    except FileNotFoundError:  # another process was faster
        return
    except OSError:
        raise damaged from None
    log(f"{damaged} It lies aside as {name} now.")


def sound(path: Path, record: Record, log: Callable) -> bool:
    """Whether weights are there and are those that the record names; others are set aside."""
    if not path.exists():
        return False
    if "files" in record and train.sha256(path.read_bytes()) != record["files"].get(path.name):
        sentence = f"The weights {path} are not those of their record; they are trained again."
        set_aside(train.Damaged(sentence, path), log)
    return path.exists()


def evaluated(run: RunConfig, log: Callable) -> dict[EvalConfig, Record]:
    """The evaluations of a run that the local store holds."""
    found = [read(path, log) for path in sorted(folder(run).glob("eval-*.json"))]
    return {EvalConfig.from_dict(r["config"]): r for r in found if r}


def one_trajectory(run: RunConfig, files: dict[str, str], log: Callable) -> None:
    """Sets aside a run's evaluations of weights that it no longer has.  files: name -> sha256 of those it has.

    A run whose checkpoint is lost begins again, and its weights may become others. All evaluations go from
    the first epoch on at which one of them names another backbone. Evaluations from before 0.2 name none.
    """
    there, others = evaluated(run, log), []
    for config, record in there.items():
        now = files.get(train.backbone_name(config.epoch))
        if now and record.get("backbone", now) != now:
            others.append(config.epoch)
    if others:
        old = [config for config in there if config.epoch >= min(others)]
        for config in old:
            _aside(file_of(config))
        log(f"{len(old)} evaluations of {run.method} {run.key()} lie aside: they are of weights that it had "
            f"before it began again, from epoch {min(others)} on.")  # fmt: skip
