"""`python -m sidae_lib run FIGURE --scale S`, `list`, `check PLACE`, `verify KEY`: from the command line, with no Jupyter."""

import argparse
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from . import check_gpu, data, evaluate, experiments, figures, methods, own, paths, published, runs, train, verify
from .config import EvalConfig, RunConfig, SidaeError, above_zero


def _run(args: argparse.Namespace) -> None:
    build = experiments.figure(args.figure)
    above_zero(seeds=args.seeds, minutes=args.minutes, jobs=args.jobs, plan=args.plan, rate=args.rate)
    configs, evals = build(args.scale, datasets=args.datasets or (), seeds=range(args.seeds or 0))
    if args.kinds:
        evals = [e for e in evals if e.kind in args.kinds]
    if args.methods:
        configs, evals = [c for c in configs if c.method in args.methods], [e for e in evals if e.run.method in args.methods]
    if args.bundle:
        os.environ["SIDAE_BUNDLE"] = str(args.bundle.resolve())  # inherited by the processes of --jobs
    if args.plan:
        return _plan([*configs, *evals], args.plan, args.rate, args.device)
    if args.nice:
        _nice()
    asked = [*configs, *evals]
    if args.order == "seed":
        asked.sort(key=lambda c: runs._run(c).seed)
    runs.fetch_all(asked, device=args.device, minutes=args.minutes, until=args.until, jobs=args.jobs or 1,
                   client=args.scheduler)  # fmt: skip
    print(f"{args.figure} at scale {args.scale}: {len(configs)} runs and {len(evals)} evaluations are recorded.")
    if tested := [e for e in evals if e.score_on != "val"]:  # what only decides something is no result
        print(figures.probes(figures.summary(figures.evaluations([runs.find(e) for e in tested]))).to_string())


def _nice() -> None:
    """The lowest priority, for this process and those that it starts. Where Linux shares processors out by session, `nice`
    alone does nothing against another session, so the session gets it too."""
    os.nice(19)
    with suppress(OSError):  # no such file, or no right to write it
        Path("/proc/self/autogroup").write_text("19")


def _kind(device: str) -> str:
    """What recorded times are taken from, for `device`."""
    return "a GPU" if runs.on_gpu(device) else "a CPU"


def _plan(configs: list[runs.Config], hours: float, rate: float | None, device: str) -> None:
    """Says what would be computed, how long that takes and how many machines are needed, and computes nothing."""
    left = runs.missing(configs)
    each = runs.seconds_each(left, rate, runs.rates(device))
    training = sum(isinstance(c, RunConfig) for c in left)
    print(f"{training} runs and {len(left) - training} evaluations to compute, {len(configs) - len(left)} recorded.")
    if each is None or left and not any(each.values()):
        print(f"No such run is recorded on {_kind(device)}, so its time is unknown; --rate N says how many images a machine "
              "trains per second.")
        return
    total = sum(each.values()) / 3600
    print(f"About {total:,.1f} hours on one machine, the longest run {max(each.values(), default=0) / 3600:.2f}; "
          f"{runs.machines(list(each.values()), 3600 * hours)} machines finish within {hours:g} hours.")


def _stands(configs: Sequence[runs.Config], rates: dict[tuple, float]) -> str:
    """How many of these are recorded, what is left and about how long that takes."""
    configs, left = list(dict.fromkeys(configs)), runs.missing(configs)
    if not left:
        return f"all {len(configs):,} recorded"
    training = sum(isinstance(c, RunConfig) and c.epochs > 0 for c in left)
    evaluations = sum(isinstance(c, EvalConfig) for c in left)
    each = runs.seconds_each(left, known=rates)
    seconds = sum(each.values()) if each is not None else None
    time = (f"no time known on {_kind('auto')}" if not seconds else f"about {seconds / 60:.1f} minutes" if seconds < 5400 else
            f"about {seconds / 3600:,.1f} hours")  # fmt: skip
    return (f"{len(configs) - len(left):,} of {len(configs):,} recorded; {training:,} runs to train and {evaluations:,} "
            f"evaluations to make; {time}")


def _list(args: argparse.Namespace) -> None:
    rates = runs.rates()
    for scale in [args.scale] if args.scale else experiments.SCALES:
        experiments.scale_of(scale)
        print(f"{scale}:")
        total: list[runs.Config] = []
        for name, build in experiments.FIGURES.items():
            try:
                with warnings.catch_warnings(action="ignore"):  # of a set that is missing; its own figure's line says so
                    wanted = [c for part in build(scale) for c in part]
                print(f"  {name:24s} {_stands(wanted, rates)}")
                total += wanted
            except SidaeError as e:
                print(f"  {name:24s} {e}")
        print(f"  {'all, each once':24s} {_stands(total, rates)}")


def _adopt(args: argparse.Namespace) -> None:
    smoke = {c.key() for needs in experiments.needs("smoke").values() for part in needs for c in part}
    new = {key for source in args.sources for key in runs.adopt(source, smoke)}
    for scale in [s for s in experiments.SCALES if s != "smoke"] if new else []:
        for name, needs in experiments.needs(scale).items():
            if found := sum(c.key() in new for part in needs for c in part):
                print(f"{name} at scale {scale}: {found} new records; draw its figures anew "
                      f"(./run_all.sh {scale} --only NOTEBOOK) and run `python -m sidae_lib readme`.")


def _check(args: argparse.Namespace) -> None:
    above_zero(size=args.size)
    name, notes = own.prepare(args.place, args.size)
    images = data.load(name, size=args.size)
    table, warned = own.look(images, verdict=False)
    print(images.display, *notes, table.to_string(), *warned, sep="\n")
    if args.sheet:
        with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
            figures.sheet(images).savefig(content := io.BytesIO(), format="png", dpi=200)
        try:
            args.sheet.write_bytes(content.getvalue())
        except OSError as e:
            raise SidaeError(f"The sheet could not be written to {args.sheet} ({e.strerror}); choose another --sheet.") from e
    if "unlabeled" not in images.splits and not ("train" in table.index and table.loc["train", "classes"] > 1):
        raise SidaeError(f"{images.display} cannot be trained on: it needs training images of at least two classes, or an "
                         "unlabeled split.")


def _verify(args: argparse.Namespace) -> int:
    return int(not verify.verify(args.key, device=args.device))


def _check_gpu(args: argparse.Namespace) -> int:
    above_zero(seconds=args.seconds)
    return check_gpu.check(args.device, args.seconds, args.out)


def readme(text: str) -> str:
    """The README with its tables made anew, every number read from a record or from the batch run's own clock."""
    recorded = {r["key"]: r for r in runs.every("eval-*", (paths.records(),))}
    names = [figures.variant(m, 0.5, a) for m, a in (("sidae", ""), ("simsiam", ""), ("dae", ""), ("untrained", ""),
                                                     ("supervised", "none"), ("supervised", "augmented"))]  # fmt: skip
    rows = [f"| data | labels | {' | '.join(names)} | n, scale and hardware |", "|---" * (len(names) + 3) + "|"]
    for scale in ("paper", "laptop"):
        if found := [recorded[e.key()] for e in experiments.accuracy_vs_epochs(scale)[1] if e.key() in recorded]:
            table = figures.beside_published(figures.summary(figures.evaluations(found)))
            for (display, less), part in table.groupby(["display", -table["labels"]]):
                n = part["n"].mode().iloc[0]
                cells = {figures.variant(r.method, r.w, r.augment): r.ours + f"<br>*{r.paper}*" * bool(r.paper)
                         + f"<br>n = {r.n}" * bool(r.n != n) for r in part.itertuples()}
                first = [display, f"{figures.percent(-less)} = {part['n_train'].iloc[0]:,}"]
                last = f"{n}, {scale}, {figures.distinct(part['hardware'])}"
                rows.append(f"| {' | '.join([*first, *(cells.get(m, '') for m in names)])} | {last} |")
    board = ["| claim | scale | verdict | cases | supported alone | contradicted alone | undecided alone | by chance |",
             "|---" * 8 + "|"]  # fmt: skip
    same = ["statement", "case", "n", "difference"]  # the student report's runs are of its own size at both scales
    said: set[tuple] = set()
    for scale in ("laptop", "paper"):
        found = {name: [recorded[e.key()] for e in evals if e.key() in recorded]
                 for name, evals in experiments.evaluations(scale).items()}
        cases = figures.scoreboard(found, scale).query("published.isna()")
        judged = list(cases[same].itertuples(index=False, name=None))
        cases = cases.loc[[r not in said for r in judged]]
        said.update(judged)
        for claim, *rest in published.claims(cases).drop(columns=["paper", "source", "tested"]).itertuples(index=False):
            board.append(f"| {' | '.join(map(str, (claim, scale, *rest)))} |")
    clock = ["| notebook | scale | minutes | hardware |", "|---|---|---|---|"]
    for path in sorted(paths.figures("").glob("*/timings.csv")):
        clock += [f"| {t.notebook} | {path.parent.name} | {t.seconds / 60:.1f} | {t.hardware} |"
                  for t in pd.read_csv(path).itertuples()]
    axes = ["| method | augment | encode | extract | compare | loss |", "|---" * 6 + "|"]
    axes += [f"| {' | '.join([figures.NAMES.get(m, m), *vars(a).values()])} |" for m, a in methods.five_axes().items()]
    for name, lines in (("results", rows), ("scoreboard", board), ("minutes", clock), ("axes", axes)):
        head, _, rest = text.partition(f"<!-- {name} -->")
        tail = rest.partition(f"<!-- /{name} -->")[2]
        text = "\n".join([f"{head}<!-- {name} -->", *lines, f"<!-- /{name} -->{tail}"])
    return text


def _readme(args: argparse.Namespace) -> None:
    path = paths.ROOT / "README.md"
    train.write(path, readme(path.read_text()).encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sidae_lib", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="compute and record what a figure needs")
    run.add_argument("figure", help=", ".join(experiments.FIGURES))
    run.add_argument("--scale", default="quick", help=", ".join(experiments.SCALES))
    run.add_argument("--datasets", nargs="+", metavar="NAME", help="only these image sets")
    run.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1")
    run.add_argument("--kinds", nargs="+", metavar="KIND", choices=evaluate.KINDS, help="only evaluations of these kinds: "
                     + ", ".join(evaluate.KINDS))
    run.add_argument("--methods", nargs="+", metavar="NAME", choices=methods.METHODS, help="only runs of these methods")
    run.add_argument("--bundle", type=Path, metavar="FILE", help="also append every record made in this call to FILE; what "
                     "would make it larger than 16 MiB goes to FILE-2, FILE-3 ... (before the suffix)")
    run.add_argument("--device", default="auto", help="auto, cpu or cuda")
    run.add_argument("--minutes", type=float, metavar="N", help="stop at a checkpoint after N minutes and say what is left")
    run.add_argument("--until", type=int, metavar="EPOCH", help="train runs without labels to this epoch, evaluate what they "
                     "have passed, and say what is left; a later call goes on")
    run.add_argument("--order", choices=("figure", "seed"), default="figure", help="seed: all of seed 0 before seed 1")
    run.add_argument("--nice", action="store_true", help="leave the processor to others, for as long as this terminal lives")
    run.add_argument("--data", metavar="DIR", help="folder of the image sets (SIDAE_DATA)")
    run.add_argument("--jobs", type=int, metavar="N", help="N processes, which take the GPUs in turn or divide the "
                     "cores; 1: this process")
    run.add_argument("--scheduler", metavar="ADDRESS", help="workers of this Dask scheduler, tcp://... or tls://...")
    run.add_argument("--plan", type=float, metavar="HOURS", help="only say what is missing, its time, the machines it takes")
    run.add_argument("--rate", type=float, metavar="N", help="with --plan: images per second where no such run is recorded")
    run.set_defaults(call=_run)
    show = commands.add_parser("list", help="figures, what is recorded and what is missing")
    show.add_argument("--scale")
    show.set_defaults(call=_list, data=None)
    check = commands.add_parser("verify", help="train one recorded run again and say whether its numbers are those recorded",
                                description=verify.__doc__)
    check.add_argument("key", metavar="KEY", help="of a run in runs/ or records/, or a beginning that no other has")
    check.add_argument("--device", default="auto", help="auto, cpu or cuda")
    check.add_argument("--data", metavar="DIR", help="folder of the image sets (SIDAE_DATA)")
    check.set_defaults(call=_verify)
    look = commands.add_parser("check", help="say how images of your own are read and what weakens a conclusion from them")
    look.add_argument("place", metavar="PLACE", help="a folder, a zip, an npz, an npy, a parquet file or the name of a set")
    look.add_argument("--size", type=int, default=32, metavar="N", help="pixels of a side that the networks will see")
    look.add_argument("--sheet", type=Path, metavar="FILE", help="also write some images of each class to this PNG")
    look.add_argument("--data", metavar="DIR", help="folder of the image sets (SIDAE_DATA)")
    look.set_defaults(call=_check)
    gpu = commands.add_parser("check-gpu", help="compare a step's graph with single launches here, and time every mode",
                              description=check_gpu.__doc__)  # fmt: skip
    gpu.add_argument("--seconds", type=float, default=60.0, metavar="N", help="of all timings together; compiling on top")
    gpu.add_argument("--device", default="auto", help="auto, cpu or cuda; cpu: a rehearsal at toy size")
    gpu.add_argument("--out", type=Path, metavar="FILE", help="also write the times to this CSV")
    gpu.set_defaults(call=_check_gpu, data=None)
    adopt = commands.add_parser("adopt", help="file finished records of a store or a bundle under records/")
    adopt.add_argument("sources", nargs="+", type=Path, metavar="STORE|FILE")
    adopt.set_defaults(call=_adopt, data=None)
    commands.add_parser("readme", help="write the README's tables anew from the records").set_defaults(call=_readme, data=None)
    args = parser.parse_args(argv)
    try:
        if args.data is not None:
            paths.use_data(args.data)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # while nothing trains there is nothing to save
        return args.call(args) or 0
    except KeyboardInterrupt:
        print("Stopped; what was recorded is kept, and the same call goes on from there.")
        return 130
    except train.Stopped as e:
        print(e, *getattr(e, "__notes__", ()), sep="\n")
        return 130 if "Stopped by" in str(e) else 0  # a signal, and not what --minutes or --until asked for
    except SidaeError as e:
        print(f"error: {e}", *getattr(e, "__notes__", ()), sep="\n", file=sys.stderr)  # of what is not ours, its traceback
        return 2


if __name__ == "__main__":
    sys.exit(main())
