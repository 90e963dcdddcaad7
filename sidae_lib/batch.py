"""Runs the notebooks one after the other through papermill, once `./run_all.sh` has made the environment.

It leaves `executed/<scale>/NAME.ipynb`, the figures and the book. Only it needs the notebooks extra.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import pandas as pd
import papermill
from filelock import FileLock
from ipykernel.kernelspec import write_kernel_spec

from . import paths
from .config import SidaeError, typed

NEXT = {"smoke": "./run_all.sh", "quick": "./run_all.sh --only 10 -p images YOUR_FOLDER -p budget 20",
        "laptop": "./run_all.sh lab", "paper": "./run_all.sh lab", "recorded": "./run_all.sh lab"}
CELL_SECONDS = {"smoke": 300, "quick": 1800}  # a cell beyond it hangs; the other scales may take hours


def _select(only: str | None) -> list[Path]:
    """The notebooks to run, in order. Raises SidaeError where there is none, or none of a name in `only`."""
    notebooks = sorted((paths.ROOT / "notebooks").glob("*.ipynb"))
    if not notebooks:
        raise SidaeError(f"There is no notebook in {paths.ROOT / 'notebooks'}; run from a checkout.")
    if only is None:
        return notebooks
    wanted = {part.strip() for part in only.split(",")}
    names = {nb: {nb.stem, *nb.stem.split("_", 1)} for nb in notebooks}  # 01_w_sweep is also 01 and w_sweep
    if unknown := wanted.difference(*names.values()):
        raise SidaeError(f"--only {','.join(sorted(unknown))} matches no notebook; there are "
                         f"{', '.join(nb.stem for nb in notebooks)}.")
    return [nb for nb in notebooks if names[nb] & wanted]


def _placed(value: Any) -> Any:
    """A file or folder, also as `folder:PATH`, by its whole path: a kernel works elsewhere than the caller.
    What names a data set stays, even where something of that name lies here."""
    if isinstance(value, list):
        return [_placed(v) for v in value]
    parts = re.fullmatch(r"((?:[A-Za-z]+:(?!//))*)(.+)", value, re.DOTALL) if isinstance(value, str) else None
    if not parts:
        return value
    kind, place = parts.groups()
    if not kind:
        from . import data  # torch: late, so that a mistyped call is refused at once

        if not os.path.exists(os.path.expanduser(place)) or data.is_name(place):
            return value
    return f"{kind}{paths.absolute(place)}"


def _value(name: str, text: str, parameter: dict[str, str]) -> Any:
    """A Python literal of the type that the notebook declares. A path is the caller's, unless the notebook's
    help offers a choice, as in `auto | cpu | cuda`. Raises SidaeError for another type."""
    try:  # in any case: "false", as a word, would count as true
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (SyntaxError, ValueError):  # a bare word is a string
        value = text
    kind = {k.__name__: k for k in (str, int, float, bool, list)}.get(parameter["inferred_type_name"])
    if kind is str and not isinstance(value, str):  # a folder may be called 2024
        value = text
    value = typed(name, value, kind) if kind else value
    return value if "|" in parameter["help"] else _placed(value)


def _parameters(args: argparse.Namespace, notebooks: list[Path]) -> dict[Path, dict[str, Any]]:
    """What to inject into each notebook. Raises SidaeError on a name it does not declare: papermill warns."""
    common: dict[str, Any] = {"scale": args.scale, "device": args.device}
    if args.seeds is not None:
        common["seeds"] = list(range(args.seeds))
    elif args.scale != "smoke":
        common["seeds"] = []  # the scale's own
    if args.minutes is not None:
        common["minutes"] = args.minutes
    declared = {nb: papermill.inspect_notebook(nb) for nb in notebooks}
    known = set().union(*declared.values())
    if unknown := sorted({name for name, _ in args.p} - known):
        raise SidaeError(f"Unknown notebook parameter {', '.join(unknown)}; "
                         f"known: {', '.join(sorted(known))}.")
    for nb, own in declared.items():
        if missing := sorted(common.keys() - own.keys()):
            raise SidaeError(f"{nb.name} declares no parameter {', '.join(missing)}; "
                             f"known: {', '.join(sorted(own))}.")
    return {nb: common | {name: _value(name, text, own[name]) for name, text in args.p if name in own}
            for nb, own in declared.items()}  # fmt: skip


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise SidaeError(f"Cannot write to {folder} ({e.strerror}); free it or choose another folder.") from e
    return folder


def _environment(args: argparse.Namespace) -> None:
    """Says through the environment, which the kernels inherit, where data and records are."""
    if args.download:
        os.environ["SIDAE_DOWNLOAD"] = "1"
    if args.scheduler:
        os.environ["SIDAE_SCHEDULER"] = args.scheduler
    if args.fresh:
        store = paths.runs() / time.strftime("fresh-%Y%m%d-%H%M%S")
        os.environ["SIDAE_RUNS"] = str(_writable(store))
        if args.scale != "quick" or args.seeds:  # else the seeds beside one's own are the published ones
            os.environ["SIDAE_RECORDS"] = str(_writable(store.with_name(f"{store.name}-no-records")))
    os.environ["SIDAE_STATIC"] = "1"  # a page has no kernel that could answer a slider
    os.environ.pop("MPLBACKEND", None)  # so that ipykernel shows figures in the notebook


def _jobs(args: argparse.Namespace) -> int:
    """In how many processes to train. One process of several threads leaves half of a narrow network's cores idle,
    one per core trains half as much again (benchmarks/README.md); at most four, since each takes a GiB."""
    if os.environ.get("SIDAE_SCHEDULER"):
        return 1
    if args.jobs or args.scale not in ("quick", "laptop"):
        return args.jobs or 1
    import joblib
    import torch

    return 1 if args.device != "cpu" and torch.cuda.is_available() else min(joblib.cpu_count(), 4)


def _execute(notebook: Path, out: Path, parameters: dict[str, Any], cell_seconds: float | None) -> str:
    """Runs one notebook into `out`. Returns "" or, in one line, why it failed."""
    failure = ""
    try:
        papermill.execute_notebook(notebook, out, parameters, kernel_name="python3", cwd=notebook.parent,
                                   progress_bar=False, execution_timeout=cell_seconds)
    except papermill.PapermillExecutionError as e:
        failure = "" if e.ename == "Stopped" and "Time is up" in e.evalue else f"{e.ename}: {e.evalue}"
    except Exception as e:  # a dead kernel, a cell beyond its time: the next notebook may still do
        traceback.print_exc()
        failure = f"{type(e).__name__}: {e}"
    return failure.strip().partition("\n")[0]


# --- notebooks, and what they ask for ------------------------------------------------------------------------


def _serve(pipe: connection.Connection) -> None:
    """The life of the process that runs notebooks: of each it sends why it failed, or ""."""
    from . import processes

    with suppress(EOFError, OSError, KeyboardInterrupt):  # the caller is gone, or was stopped with this process
        while True:
            notebook, out, parameters, limit = pipe.recv()
            with (out / f"{notebook.stem}.log").open("w") as log, processes.output_to(log):
                failure = _execute(notebook, out / notebook.name, parameters, limit)
            pipe.send(failure)


class _Notebooks:
    """Runs notebooks one after the other in a process of their own, and says how each ended."""

    def __init__(self, args: argparse.Namespace, parameters: dict[Path, dict[str, Any]], out: Path) -> None:
        self.args, self.parameters, self.out = args, parameters, out
        self.began = self.last = time.monotonic()
        self.process: Any = None
        self.running: Path | None = None
        self.left = list(parameters)
        self.clock: list[dict[str, Any]] = []
        self.line = 0.0  # when progress was last said

    def start(self, nb: Path) -> None:
        given = self.parameters[nb]
        if self.args.minutes is not None:  # what is left of them, and a moment to say that none is
            given["minutes"] = max(self.args.minutes - (time.monotonic() - self.began) / 60, 0.01)
        if not self.process:
            context = get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,))
            self.process.start()
            theirs.close()
        self.left.remove(nb)
        self.running = nb
        self.pipe.send((nb, self.out, given, self.args.cell_seconds or CELL_SECONDS.get(self.args.scale)))

    def finish(self, wait: float | None = None) -> None:
        """Says how the running notebook ended, if it has within `wait` seconds (None: without end)."""
        if self.running is None or not self.pipe.poll(wait):
            return
        try:
            failure = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            failure, self.process = f"its process ended with code {self.process.exitcode}", None
        nb, self.running, now = self.running, None, time.monotonic()
        seconds, self.last = round(now - self.last, 1), now
        self.clock.append({"notebook": nb.stem, "seconds": seconds, "failed": bool(failure)})
        self.say(f"{nb.stem:28s} {seconds:7.1f} s  {'FAILED  ' + failure if failure else 'ok'}", True)

    def say(self, line: str, lasting: bool = False) -> None:
        """A line that stays, or one of progress: a terminal shows the last alone, a file one a half minute."""
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if lasting else "", flush=True)
        elif lasting or time.monotonic() - self.line > 30:
            self.line = self.line if lasting else time.monotonic()
            print(line, flush=True)

    def close(self) -> None:
        if self.process:
            self.pipe.close()
            self.process.join(10)
            self.process.kill()


def _asked(args: argparse.Namespace, parameters: dict[Path, dict[str, Any]]) -> dict[Path, list[Any]]:
    """What each notebook will ask for, as far as its parameters tell; it computes whatever else it asks for."""
    from . import experiments

    out: dict[Path, list[Any]] = {}
    for nb, given in parameters.items():
        name, plain = nb.stem.partition("_")[2], {"scale", "device", "minutes", "seeds", "datasets"}
        if name not in experiments.FIGURES or given.keys() - plain or args.scale not in experiments.SCALES:
            continue
        images = papermill.inspect_notebook(nb).get("images")  # of one's own: a set's name, until it is changed
        datasets = [ast.literal_eval(images["default"])] if images else given.get("datasets", ())
        with suppress(SidaeError), warnings.catch_warnings(action="ignore"):  # the notebook says what is wrong
            builds = [experiments.FIGURES[name]]
            if name == "datasets_table" and args.scale != "paper":  # where the notebook stops after few epochs
                builds.append(experiments.open_choices)
            out[nb] = [c for build in builds for part in build(args.scale, datasets, given.get("seeds", ())) for c in part]
    return out


def _train(notebooks: _Notebooks, jobs: int) -> None:
    """Trains in so many processes what the notebooks ask for, in their order and each once. A notebook begins
    when all that it asks for is over. Raises train.Stopped when a signal came."""
    from . import processes, runs, tasks, train

    args, seen, of, todo = notebooks.args, set[Any](), dict[int, Path](), []
    deadline = None if args.minutes is None else notebooks.began + 60 * args.minutes
    for nb, configs in _asked(args, notebooks.parameters).items():
        new = [c for c in dict.fromkeys(configs) if c not in seen]
        seen.update(new)
        for job in tasks.plan(new, device=args.device, deadline=deadline, log=notebooks.say):
            todo.append(job)
            of[id(job)] = nb
    if not todo:
        return
    known, left = runs.rates(args.device), Counter(of.values())
    weights = {id(job): sum((runs.seconds_each([job.run, *job.evals], known) or {}).values()) or 1.0 for job in todo}
    total, done, began = sum(weights.values()), 0.0, time.monotonic()
    stopped: SidaeError | None = None
    log = (notebooks.out / "workers.log").open("w")
    outcomes = processes.outcomes(todo, jobs, lambda line: print(line, file=log, flush=True), log)
    with log, closing(outcomes):
        for number, (job, error, _) in enumerate(outcomes, 1):
            left[of[id(job)]] -= 1
            done += weights[id(job)]
            if isinstance(error, train.Stopped):
                stopped = stopped or error
            notebooks.finish(0)
            ready = [nb for nb in notebooks.left if not left[nb]]
            if ready and not notebooks.running and not stopped:
                notebooks.start(ready[0])
            now = time.monotonic() - began
            pace = (now * jobs + total / 5) / (done + total / 5)  # first the records', then more and more this one's
            after = (total - done) / jobs * pace
            then = next((nb.stem for nb in notebooks.left if left[nb]), "the last notebooks")
            notebooks.say(f"  {number} of {len(todo)} runs done, next {then}, about {after / 60:.1f} min left")
    if stopped and "Stopped by" in str(stopped):
        raise stopped


def run(args: argparse.Namespace) -> int:
    """Runs what the arguments of `__main__` ask for. Returns 0, or 1 where a notebook failed. Raises
    SidaeError before anything runs."""
    parameters = _parameters(args, _select(args.only))
    out = _writable(paths.ROOT / "executed" / args.scale)
    _writable(paths.figures(args.scale))
    _environment(args)
    with ExitStack() as stack:
        jupyter = stack.enter_context(tempfile.TemporaryDirectory())
        write_kernel_spec(Path(jupyter) / "kernels" / "python3")  # the user's may be another interpreter
        os.environ["JUPYTER_PATH"] = jupyter
        notebooks = stack.enter_context(closing(_Notebooks(args, parameters, out)))
        if (jobs := _jobs(args)) > 1:
            _train(notebooks, jobs)
        notebooks.finish()
        for nb in list(notebooks.left):
            notebooks.start(nb)
            notebooks.finish()
    clock, took = notebooks.clock, time.monotonic() - notebooks.began
    failed = [done["notebook"] for done in clock if done["failed"]]
    print(f"{len(clock) - len(failed)} of {len(clock)} notebooks ran in {took:.0f} s; they are in {out}")
    if failed:
        print(f"Failed: {', '.join(failed)}; see the chapter and the .log of each")
    from . import claims, frames, recorded, train

    if args.fresh:  # only a run that computed everything says how long everything takes
        timings(args.scale, clock)
    found = recorded.evaluations(args.scale)
    board = claims.scoreboard(found, args.scale)
    train.write(paths.figures(args.scale) / "scoreboard.csv", board.to_csv(index=False).encode())
    page, fault = book(args.scale)
    if fault:
        print(fault)
    said = frames.found(found.get("accuracy_vs_epochs", ()))
    words = [f"The book: {page}."] * page.exists(), [f"Found: {said}."] * bool(said), [f"Next: {NEXT[args.scale]}"]
    print(*sum(words, []))
    return int(bool(failed))


def timings(scale: str, clock: Sequence[dict[str, Any]]) -> None:
    """figures/<scale>/timings.csv: how long each notebook of a batch run took from nothing, and on what. Of
    others what an earlier run said stays."""
    from . import frames, train

    made, path = train.provenance(train.device_of("auto")), paths.figures(scale) / "timings.csv"
    table = pd.DataFrame(clock).assign(hardware=f"{frames.hardware(made)}, torch {made['torch']}")
    if path.exists():
        table = pd.concat([table, pd.read_csv(path)]).drop_duplicates("notebook").sort_values("notebook")
    train.write(path, table.to_csv(index=False).encode())


def book(scale: str) -> tuple[Path, str]:
    """Builds the book of the committed notebooks, and of those that a run at `scale` executed since; executes
    nothing. Returns its first page, and what Sphinx found wrong, or ""."""
    source = paths.ROOT / "book"
    page = source / "_build" / "html" / "index.html"
    if not (source / "conf.py").exists():
        return page, ""
    log = _writable(source / "_build") / "make.log"
    command = [sys.executable, "-P", "-m", "sphinx", "-W", "--keep-going", "-q", str(source), str(page.parent)]
    with FileLock(log.with_suffix(".lock")), log.open("w") as said:  # two runs build one after the other
        code = subprocess.run(command, stdout=said, stderr=said, env=os.environ | {"SIDAE_BOOK": scale}).returncode
    return page, f"The book has a fault; {log} says which." * bool(code)
