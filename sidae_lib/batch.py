"""Runs the notebooks one after the other through papermill: what `./run_all.sh` does once the environment stands.

`python -m sidae_lib.batch --scale quick` leaves `executed/<scale>/NAME.ipynb` and `.html` and the figures. This module
alone needs the notebooks extra. Exit code 0: all ran; 1: one failed; 2: nothing was run, and a sentence says why.
"""

import argparse
import ast
import copy
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import nbformat
import papermill
from ipykernel.kernelspec import write_kernel_spec
from jinja2 import DictLoader
from nbconvert import HTMLExporter

from . import paths
from .config import SidaeError, above_zero, typed

SCALES = ("smoke", "quick", "laptop", "paper")
CELL_SECONDS = {"smoke": 300, "quick": 1800}  # a cell beyond it hangs; the other scales may take hours


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SidaeError(f"{message[0].upper()}{message[1:]}; ./run_all.sh --help lists what is known.")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m sidae_lib.batch", description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="quick")
    parser.add_argument("--only", metavar="01,03", help="numbers or names of the notebooks to run")
    parser.add_argument("--data", metavar="DIR", help="folder of the image sets")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 instead of the scale's own")
    parser.add_argument("--minutes", type=float, metavar="N", help="stop at a checkpoint after N minutes in all")
    parser.add_argument("--jobs", type=int, metavar="N", help="train in N processes of this machine")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="train on the workers of this Dask scheduler")
    parser.add_argument("--download", action="store_true", help="allow data sets to be downloaded")
    parser.add_argument("--fresh", action="store_true", help="ignore what is recorded; deletes nothing")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="any other parameter of a notebook")
    parser.add_argument("--cell-seconds", type=float, metavar="N", help="a notebook whose cell takes longer fails")
    args = parser.parse_args(argv)
    above_zero(seeds=args.seeds, minutes=args.minutes, cell_seconds=args.cell_seconds, jobs=args.jobs)
    if args.data is not None:
        paths.use_data(args.data)
    return args


def _select(only: str | None) -> list[Path]:
    """The notebooks to run, in order. Raises SidaeError where there is none, or a part of `only` matches none."""
    notebooks = sorted((paths.ROOT / "notebooks").glob("*.ipynb"))
    if not notebooks:
        raise SidaeError(f"There is no notebook in {paths.ROOT / 'notebooks'}; run from a checkout of the project.")
    if only is None:
        return notebooks
    wanted = {part.strip() for part in only.split(",")}
    names = {nb: {nb.stem, *nb.stem.split("_", 1)} for nb in notebooks}  # 01_w_sweep is also 01 and w_sweep
    if unknown := wanted - set().union(*names.values()):
        raise SidaeError(f"--only {','.join(sorted(unknown))} matches no notebook; there are "
                         f"{', '.join(nb.stem for nb in notebooks)}.")
    return [nb for nb in notebooks if names[nb] & wanted]


def _placed(value: Any) -> Any:
    """What names a file or a folder, as `folder:PATH` too, is named from the root: a kernel works in another folder than the
    caller. The name of a data set stays one, whatever lies beside it."""
    if isinstance(value, list):
        return [_placed(v) for v in value]
    if not isinstance(value, str) or not (parts := re.fullmatch(r"((?:[A-Za-z]+:(?!//))*)(.+)", value, re.DOTALL)):
        return value
    kind, place = parts.groups(default="")
    if not kind and (not os.path.exists(os.path.expanduser(place)) or _named(place)):
        return value
    return f"{kind}{paths.absolute(place)}"


def _named(place: str) -> bool:
    from . import data  # needs torch

    return data.is_name(place)


def _value(name: str, text: str, parameter: dict[str, str]) -> Any:
    """A Python literal of the type that the notebook declares; true and false in any case, since the word "false" would
    count as true. A path is the caller's; no word is one of which the notebook says that it is a choice, as in
    `auto | cpu | cuda`. Raises SidaeError for another type."""
    try:
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (SyntaxError, ValueError):  # a bare word is a string
        value = text
    kind = {k.__name__: k for k in (str, int, float, bool, list)}.get(parameter["inferred_type_name"])
    if kind is str and not isinstance(value, str):  # a folder may be called 2024
        value = text
    value = typed(name, value, kind) if kind else value
    return value if "|" in parameter["help"] else _placed(value)


def _parameters(args: argparse.Namespace, notebooks: list[Path]) -> dict[Path, dict[str, Any]]:
    """What to inject into each notebook. Raises SidaeError on a name it does not declare: papermill only warns."""
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
        raise SidaeError(f"Unknown notebook parameter {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    for nb in notebooks:
        if missing := sorted(set(common) - set(declared[nb])):
            raise SidaeError(f"{nb.name} declares no parameter {', '.join(missing)}; known: "
                             f"{', '.join(sorted(declared[nb])) or 'none'}.")
    return {nb: common | {k: _value(k, text, own[k]) for k, text in args.p if k in own}
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
        os.environ["SIDAE_RECORDS"] = str(_writable(store.with_name(f"{store.name}-no-records")))
    for name in ("SIDAE_DATA", "SIDAE_RUNS", "SIDAE_RECORDS", "SIDAE_FIGURES", "SIDAE_BUNDLE"):
        if os.environ.get(name):  # a kernel works in another folder than the caller
            os.environ[name] = str(paths.absolute(os.environ[name]))
    os.environ.pop("MPLBACKEND", None)  # so that ipykernel shows figures in the notebook


def _jobs(args: argparse.Namespace) -> int:
    """In how many processes to train. One process of several threads leaves a narrow network's cores half idle, one per
    core trains half as much again (benchmarks/README.md); at most four, since each takes a GiB."""
    if args.jobs or args.scale not in ("quick", "laptop") or os.environ.get("SIDAE_SCHEDULER"):
        return args.jobs or 1
    import torch  # late, so that a mistyped call is refused at once

    if find_spec("distributed") is None or args.device != "cpu" and torch.cuda.is_available():
        return 1
    from .grid import CPU_COUNT

    return min(CPU_COUNT, 4)


@contextmanager
def _silence(log: Path) -> Iterator[None]:
    """Sends stdout and stderr to a file, those of a kernel started meanwhile too."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("w") as file:
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
    try:
        yield
    finally:
        sys.stdout.flush()
        for fd, old in zip((1, 2), saved, strict=True):
            os.dup2(old, fd)
            os.close(old)


def render(nb: nbformat.NotebookNode) -> str:
    """A notebook as one HTML page that holds all its images; a figure's alt text is its cell's metadata `alt`, which the
    exporter's own template leaves out."""
    template = """{% extends "index.html.j2" %}{% block data_png scoped %}{% set alt = cell.metadata.alt or "" %}
    {{- super() | replace("<img ", '<img alt="' ~ (alt | escape_html) ~ '" ', 1) }}{% endblock %}"""
    exporter = HTMLExporter(extra_loaders=[DictLoader({"alt.html.j2": template})], template_file="alt.html.j2",
                            embed_images=True)  # fmt: skip
    nb = copy.deepcopy(nb)  # the exporter embeds only what lies below its path: the checkout, not the notebooks' folder
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(!\[[^\]]*\]\()\.\./", r"\1", cell.source)
    return exporter.from_notebook_node(nb, {"metadata": {"path": str(paths.ROOT)}})[0]


def _execute(notebook: Path, out: Path, parameters: dict[str, Any], cell_seconds: float | None) -> str:
    """Runs one notebook into `out` and its HTML beside it. Returns "" or, in one line, why it failed."""
    failure = ""
    try:
        papermill.execute_notebook(notebook, out, parameters, kernel_name="python3", cwd=notebook.parent,
                                   progress_bar=False, execution_timeout=cell_seconds)
    except papermill.PapermillExecutionError as e:
        failure = "" if e.ename == "Stopped" and "Time is up" in e.evalue else f"{e.ename}: {e.evalue}"
    except Exception as e:  # a dead kernel, a cell beyond its time: the next notebook may still do
        traceback.print_exc()
        failure = f"{type(e).__name__}: {e}"
    out.with_suffix(".html").write_text(render(nbformat.read(out, as_version=4)), encoding="utf-8")
    return failure.strip().partition("\n")[0]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code."""
    args = _arguments(argv)
    notebooks = _select(args.only)
    parameters = _parameters(args, notebooks)
    out = _writable(paths.ROOT / "executed" / args.scale)
    _writable(paths.figures(args.scale))
    _environment(args)
    start, failed, clock = time.monotonic(), [], []
    with ExitStack() as stack:
        jupyter = stack.enter_context(tempfile.TemporaryDirectory())  # a "python3" of the user's may be another interpreter
        if (jobs := _jobs(args)) > 1:
            from . import grid  # needs the cluster extra

            with _silence(out / "workers.log"):
                os.environ["SIDAE_SCHEDULER"] = stack.enter_context(grid.local(jobs, args.device))
        write_kernel_spec(Path(jupyter) / "kernels" / "python3")
        os.environ["JUPYTER_PATH"] = jupyter
        for nb in notebooks:
            begin = time.monotonic()
            if args.minutes is not None:  # what is left of them, and a moment to say that none is
                parameters[nb]["minutes"] = max(args.minutes - (begin - start) / 60, 0.01)
            print(f"{nb.stem:28s} ", end="", flush=True)
            with _silence(out / f"{nb.stem}.log"):
                failure = _execute(nb, out / nb.name, parameters[nb], args.cell_seconds or CELL_SECONDS.get(args.scale))
            clock.append({"notebook": nb.stem, "seconds": round(time.monotonic() - begin, 1), "failed": bool(failure)})
            print(f"{clock[-1]['seconds']:7.1f} s  {'FAILED  ' + failure if failure else 'ok'}", flush=True)
            if failure:
                failed.append(nb.stem)
    print(f"{len(notebooks) - len(failed)} of {len(notebooks)} notebooks ran in {time.monotonic() - start:.0f} s; "
          f"they are in {out}")
    if failed:
        print(f"Failed: {', '.join(failed)}; see the .html and the .log of each")
    from . import experiments, figures, runs  # torch and matplotlib: late, so that a mistyped call is refused at once

    if args.fresh:  # only a run that computed everything says how long everything takes
        figures.timings(args.scale, clock)
    found = {name: runs.recorded(evals) for name, evals in experiments.evaluations(args.scale).items()}
    page = figures.index(args.scale, found, sorted(out.glob("*.html")))
    print(f"Figures: {page}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SidaeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # what was trained so far is in the store
        sys.exit(130)
