"""The command line, without Jupyter: `python -m sidae_lib run FIGURE --scale S`, `list`, `check PLACE` ..."""

# Each command imports what it needs: torch takes seconds, and help and refusals should take none.
import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from . import paths
from .config import EvalConfig, RunConfig, SidaeError, above_zero

SCALES = ("smoke", "quick", "laptop", "paper")
SHOWN = (*SCALES, "recorded")  # by notebooks
OPTIONS: dict[str, dict[str, Any]] = {  # of several commands
    "--data": {"metavar": "DIR", "help": "folder of the image sets (default: data, or $SIDAE_DATA)"},
    "--device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "where to compute"},
    "--seeds": {"type": int, "metavar": "N", "help": "seeds 0 to N-1 instead of the scale's own"},
    "--minutes": {"type": float, "metavar": "N", "help": "stop at a checkpoint after N minutes in all; the "
                  "next call goes on from there"},
    "--jobs": {"type": int, "metavar": "N", "help": "train in N processes of this machine, one per GPU or sharing "
               "the cores (default: 1; notebooks at scales quick and laptop, without a GPU: one per core, at most 4)"},
    "--scheduler": {"metavar": "ADDRESS", "help": "train on the workers of this Dask scheduler, tcp://... or "
                    "tls://..."},
}  # fmt: skip
RUN_ALL = """./run_all.sh [smoke|quick|laptop|paper|recorded] [OPTIONS]
           run the notebooks into executed/<scale> and figures/<scale>;
           the default is quick, ten minutes without a download;
           recorded trains nothing: the best on record, in seconds
       ./run_all.sh book [SCALE]
           build the book from the notebooks, and from what a run at SCALE
           has executed; nothing is run
       ./run_all.sh test [--all] [PYTEST ARGUMENTS]
           run the tests and validate the notebooks, one process a core, or only what the arguments name, in
           one process; --all adds the slow tests
       ./run_all.sh lab [JUPYTER ARGUMENTS]
           open JupyterLab on notebooks/"""
ENVIRONMENT = """\
The environment is made in .venv, once, by python3 (3.11 or newer, with venv), and again when the lock or
pyproject.toml changes. A .venv that run_all.sh did not make is left as it is. An active environment that has the
package and its extras is used as it is."""


class _Parser(argparse.ArgumentParser):
    """Refuses a call in one sentence, and an option that is not written out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise SidaeError(f"{message}; --help lists what is known.")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m sidae_lib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(call: Callable, name: str, says: str, *options: str, **settings: Any) -> Callable:
        settings = {"description": f"{says[0].upper()}{says[1:]}."} | settings
        made = commands.add_parser(name, help=says, **settings)
        made.set_defaults(call=call)
        for option in options:
            made.add_argument(option, **OPTIONS[option])
        return made.add_argument

    _run_options(command(_run, "run", "compute and record what a figure needs", *OPTIONS))
    add = command(_list, "list", "show the figures, what is recorded and what is missing")
    add("--scale", choices=SCALES, help="only this one")
    add = command(_verify, "verify", "train one recorded run again and say whether its numbers are those "
                  "recorded, but for what devices differ by", "--data", "--device")
    add("key", metavar="KEY", help="of a run in runs/ or records/, or a beginning that no other has")
    add = command(_check, "check", "say how images of your own are read and what weakens a conclusion from "
                  "them", "--data")
    add("place", metavar="PLACE", help="a folder, zip, npz, npy or parquet file, or the name of a set")
    add("--size", type=int, default=32, metavar="N", help="pixels of a side that the networks will see")
    add("--sheet", type=Path, metavar="FILE", help="also write some images of each class to this PNG")
    add = command(_check_gpu, "check-gpu", "compare a step's CUDA graph with single launches here, and time each "
                  "mode at paper size, alone and beside others. Processes share a GPU by MPS (start it with "
                  "nvidia-cuda-mps-control -d) or take turns. A CPU rehearses it at toy size", "--device")
    add("--seconds", type=float, default=60.0, metavar="N", help="of all timings together; compiling on top")
    add("--out", type=Path, metavar="FILE", help="also write the times to this CSV")
    add = command(_adopt, "adopt", "file finished records of a store or a bundle under records/")
    add("sources", nargs="+", type=Path, metavar="STORE|FILE")
    command(_book, "book", "build the book, as ./run_all.sh does; executes nothing", prog="./run_all.sh book")(
        "scale", nargs="?", choices=SHOWN, default="recorded", metavar="SCALE", help="whose run the chapters show, "
        f"where there is one: {', '.join(SHOWN)}")
    _notebooks_options(command(_notebooks, "notebooks", "run the notebooks, as ./run_all.sh does", *OPTIONS,
                               prog="./run_all.sh", usage=RUN_ALL, description="Options of the first form:",
                               epilog=ENVIRONMENT, formatter_class=argparse.RawDescriptionHelpFormatter))
    return parser


def _run_options(add: Callable) -> None:
    figures = [p.stem.partition("_")[2] for p in sorted((paths.ROOT / "notebooks").glob("*.ipynb"))]
    add("figure", metavar="FIGURE", help=f"{', '.join(figures)}; sections of 03: open_choices, jpeg_again")
    add("--scale", choices=SCALES, default="quick", help="default: quick")
    add("--datasets", nargs="+", metavar="NAME", help="only these image sets")
    add("--methods", nargs="+", metavar="NAME", help="only runs of these methods")
    add("--kinds", nargs="+", metavar="KIND", help="only evaluations of these kinds, such as linear or knn")
    add("--bundle", type=Path, metavar="FILE", help="also append every record made in this call to FILE; "
        "what would make it larger than 16 MiB goes to FILE-2, FILE-3 ... (before the suffix)")
    add("--until", type=int, metavar="EPOCH", help="train runs without labels to this epoch, evaluate what "
        "they have passed, and say what is left; a later call goes on")
    add("--order", choices=("figure", "seed"), default="figure", help="seed: all of seed 0 before seed 1")
    add("--nice", action="store_true", help="leave the processor to others, as long as this terminal lives")
    add("--plan", type=float, metavar="HOURS", help="only say what is missing, its time, how many machines")
    add("--rate", type=float, metavar="N", help="with --plan: images per second where no run tells")


def _notebooks_options(add: Callable) -> None:
    add("scale", nargs="?", choices=SHOWN, default="quick", metavar="SCALE",
        help=f"{', '.join(SCALES)}, or recorded: the best on record, nothing is trained")
    add("--only", metavar="01,03", help="only these notebooks, by number or name")
    add("--download", action="store_true", help="allow data sets to be downloaded")
    add("--fresh", action="store_true", help="compute everything again in an empty store under runs/ (quick: your "
        "own seed), and note the time; deletes nothing")
    add("--cell-seconds", type=float, metavar="N", help="a notebook fails when one of its cells takes longer "
        "(default: smoke 300, quick 1800)")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set any other parameter "
        "of the notebooks; a path is taken from here, not from notebooks/")
    add("--look", action="store_true", help=argparse.SUPPRESS)  # for run_all.sh: is the call a good one?


def _only(what: str, asked: Collection[str] | None, known: Collection[str]) -> Collection[str]:
    """The names that were asked for, by default all. Raises SidaeError for one that is not known."""
    for name in asked or ():
        if name not in known:
            raise SidaeError(f"Unknown {what} {name!r}; choose from {', '.join(known)}.")
    return asked or known


def _run(args: argparse.Namespace) -> None:
    from . import evaluate, experiments, methods, runs, store

    build = experiments.figure(args.figure)
    kinds = _only("kind", args.kinds, evaluate.KINDS)
    chosen = _only("method", args.methods, methods.METHODS)
    configs, evals = build(args.scale, datasets=args.datasets or (), seeds=range(args.seeds or 0))
    configs = [c for c in configs if c.method in chosen]
    evals = [e for e in evals if e.kind in kinds and e.run.method in chosen]
    asked = [*configs, *evals]
    if args.plan:
        return _plan(asked, args)
    if args.bundle:
        os.environ["SIDAE_BUNDLE"] = str(args.bundle.resolve())  # the processes of --jobs inherit it
    if args.nice:
        _nice()
    if args.order == "seed":
        asked.sort(key=lambda c: store.run_of(c).seed)
    runs.fetch_all(asked, device=args.device, minutes=args.minutes, until=args.until, jobs=args.jobs or 1,
                   client=args.scheduler)  # fmt: skip
    print(f"{args.figure} at scale {args.scale}: "
          f"{len(configs)} runs and {len(evals)} evaluations are recorded.")
    if tested := [e for e in evals if e.score_on != "val"]:  # a score on validation images decides
        from . import frames

        print(frames.probes(frames.summary(frames.evaluations([store.find(e) for e in tested]))).to_string())


def _nice() -> None:
    """The lowest priority, for this process and those that it starts. Where Linux shares processors by session,
    `nice` alone does nothing against another session, so the session gets it too."""
    os.nice(19)
    with suppress(OSError):  # no such file, or no right to write it
        Path("/proc/self/autogroup").write_text("19")


def _stands(configs: Sequence, rates: dict[tuple, float], rate: float | None = None, device: str = "auto"
            ) -> tuple[str, list[float] | None]:  # fmt: skip
    """How many of these are recorded, what is left and about how long that takes, in words; and the seconds of
    each run that is left, None where no time is known."""
    from . import runs, store

    configs, left = list(dict.fromkeys(configs)), store.missing(configs)
    if not left:
        return f"all {len(configs):,} recorded", []
    each = list((runs.seconds_each(left, rates, rate) or {}).values())
    training = sum(isinstance(c, RunConfig) and c.epochs > 0 for c in left)
    evaluations = sum(isinstance(c, EvalConfig) for c in left)
    if not any(each):
        time = f"no time known on a {'GPU' if runs.on_gpu(device) else 'CPU'}"
    elif sum(each) < 5400:
        time = f"about {sum(each) / 60:.1f} minutes"
    else:
        time = f"about {sum(each) / 3600:,.1f} hours"
    return (f"{len(configs) - len(left):,} of {len(configs):,} recorded; {training:,} runs to train and "
            f"{evaluations:,} evaluations to make; {time}"), each if any(each) else None


def _plan(configs: Sequence, args: argparse.Namespace) -> None:
    """Says what would be computed, how long that takes and how many machines it needs; computes nothing."""
    from . import runs

    stands, each = _stands(configs, runs.rates(args.device), args.rate, args.device)
    print(stands)
    if each:
        machines = runs.machines(each, 3600 * args.plan)
        print(f"The longest run takes {max(each) / 3600:.2f} hours; {machines} machines finish within "
              f"{args.plan:g} hours.")  # fmt: skip
    elif each is None:
        print("--rate N says how many images a machine trains per second.")


def _list(args: argparse.Namespace) -> None:
    from . import experiments, runs

    rates = runs.rates()
    for scale in [args.scale] if args.scale else SCALES:
        print(f"{scale}:")
        total: list = []
        for name, build in (experiments.FIGURES | experiments.PARTS).items():
            try:
                with warnings.catch_warnings(action="ignore"):  # a set is missing; its own figure says so
                    wanted = [c for part in build(scale) for c in part]
                print(f"  {name:24s} {_stands(wanted, rates)[0]}")
                total += wanted
            except SidaeError as e:
                print(f"  {name:24s} {e}")
        print(f"  {'all, each once':24s} {_stands(total, rates)[0]}")


def _adopt(args: argparse.Namespace) -> None:
    from . import adoption, experiments

    def wanted(scale: str) -> dict[str, list[str]]:
        needs = experiments.needs(scale)
        return {name: [c.key() for part in parts for c in part] for name, parts in needs.items()}

    smoke = {key for keys in wanted("smoke").values() for key in keys}
    for name in experiments.scale_of("smoke").datasets:  # a rehearsal may ask for any of them
        smoke |= {c.key() for part in experiments.open_choices("smoke", name) for c in part}
    new = {key for source in args.sources for key in adoption.adopt(source, smoke)}
    for scale in SCALES[1:] if new else ():
        for name, keys in wanted(scale).items():
            if found := sum(key in new for key in keys):
                print(f"{name} at scale {scale}: {found} new records; draw its figures anew "
                      f"(./run_all.sh {scale} --only NOTEBOOK) and run `python book/readme.py`.")


def _check(args: argparse.Namespace) -> None:
    from . import data, own

    name, notes = own.prepare(args.place, args.size)
    images = data.load(name, size=args.size)
    table, warned = own.look(images, verdict=False)
    print(images.display, *notes, table.to_string(), *warned, sep="\n")
    if args.sheet:
        import io

        from . import diagrams

        with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
            diagrams.sheet(images).savefig(content := io.BytesIO(), format="png", dpi=200)
        try:
            args.sheet.write_bytes(content.getvalue())
        except OSError as e:
            raise SidaeError(f"The sheet could not be written to {args.sheet} ({e.strerror}); choose another --sheet.") from e
    several = "train" in table.index and table.loc["train", "classes"] > 1
    if not several and "unlabeled" not in images.splits:
        raise SidaeError(f"{images.display} cannot be trained on: it needs training images of at least two "
                         "classes, or an unlabeled split.")


def _verify(args: argparse.Namespace) -> int:
    from . import verify

    return int(not verify.verify(args.key, device=args.device))


def _check_gpu(args: argparse.Namespace) -> int:
    from . import check_gpu

    return check_gpu.check(args.device, args.seconds, args.out)


def _batch() -> Any:
    try:
        from . import batch
    except ImportError as e:
        raise SidaeError('Notebooks need the extra of that name: pip install "sidae-lib[notebooks]".') from e
    return batch


def _notebooks(args: argparse.Namespace) -> int:
    return 0 if args.look else _batch().run(args)


def _book(args: argparse.Namespace) -> int:
    page, fault = _batch().book(args.scale)
    if not page.exists():
        raise SidaeError(fault or f"There is no book in {paths.ROOT}; run from a checkout.")
    print(fault, f"The book: {page}", sep="\n" * bool(fault))
    return int(bool(fault))


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments say. Returns 0, 1 where a check failed, 2 for a refusal, 130 when stopped."""
    try:
        args = _parser().parse_args(argv)
        given = vars(args)
        above_zero(**{name: given[name] for name in given if type(given[name]) in (int, float)})
        if given.get("data") is not None:
            paths.use_data(args.data)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # where nothing trains
        return args.call(args) or 0
    except KeyboardInterrupt:
        print("Stopped; what was recorded is kept, and the same call goes on from there.")
        return 130
    except SidaeError as e:
        notes = getattr(e, "__notes__", ())  # the traceback of what is not ours
        train = sys.modules.get("sidae_lib.train")  # without it nothing was trained, so nothing was stopped
        if train and isinstance(e, train.Stopped):
            print(e, *notes, sep="\n")
            return 130 if "Stopped by" in str(e) else 0  # a signal; or what --minutes or --until asked for
        print(f"error: {e}", *notes, sep="\n", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
