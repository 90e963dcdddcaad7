"""`python -m benchmarks [--only pretrain,floor]`: where the time goes, ours beside what users would pick instead."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch

from sidae_lib import augment, differences, evaluate, experiments, paths, train
from sidae_lib.config import EvalConfig, RunConfig, SidaeError
from sidae_lib.data import Images

from . import contenders as c
from .timing import Bench, Contender, Row, fresh, hardware, measure, summed_up

Rows = Iterable[Row]


def paper(bench: Bench, method: str, batch: int) -> tuple[RunConfig, Images]:
    if bench.quick:
        return experiments.run(method, "digits", "smoke", batch=16, augment="simsiam_cifar"), c.load("digits")
    return experiments.run(method, "cifar10", "paper", batch=batch, precision="fp32"), c.load("cifar10")


def compare(bench: Bench, config: RunConfig, images: Images, rivals: dict[str, Callable], name: str = "") -> list[Row]:
    """The step alone and the pipeline in every mode and in bf16, its own mode also with torch's layers, then the rivals;
    with a name also two processes. On a GPU float32 is eager alone, since no run there takes it, the rivals are in bf16 too,
    and all layers are torch's. Nothing when the time is up."""
    if time.monotonic() > bench.deadline:
        return []
    own, cuda = train.Run(config, images, bench.device).mode, bench.device.type == "cuda"
    out, limits, ours = [], {}, None
    every = (("fp32", ("eager",)), ("bf16", ("eager", "step", "views graph"))) if cuda else (
        ("fp32", (own,) if bench.quick else ("eager", "views", "step")), ("bf16", (own,)))  # fmt: skip
    if cuda:
        config = config.replace(precision="bf16")
    for precision, modes in every:
        run = config.replace(precision=precision)
        info = {"data": images.name, "method": run.method, "batch": run.batch, "precision": precision}
        for mode in modes:
            whole = "step" if mode == "step" else "eager"  # the step alone has no views to compile
            if (precision, whole) not in limits:
                build = partial(c.alone, bench, run, images, whole == "step")
                limits[precision, whole] = Contender("step alone", build, info=info | {"mode": whole})
                out.append(limits[precision, whole])
            label, build = "pipeline" + ", own mode" * (mode == own), partial(c.pipeline, bench, run, images, mode)
            out.append(Contender(label, build, of=limits[precision, whole], info=info | {"mode": mode}))
            ours = out[-1] if ours is None and mode == own else ours
            if mode == own and not cuda:
                out.append(Contender("torch's own layers", partial(c.torchs, build), of=out[-1], info=out[-1].info))
    for what, build in rivals.items():
        out.append(Contender(what, partial(build, bench, config, images), of=ours, info=ours.info | {"mode": "eager"},
                             needs="lightly" * (build is c.lightly_example)))  # fmt: skip
    with fresh() as one, fresh() as other:
        def both() -> float:
            jobs = [process.submit(c.single, bench, config, name, own) for process in (one, other)]
            return sum(job.result() for job in jobs)

        if name and not cuda:
            warmed = lambda: (both(), both)[1]  # noqa: E731
            out.append(Contender("two processes of one thread", warmed, of=ours, info=ours.info))
        return measure(bench, out)


def pretrain(bench: Bench) -> Rows:
    rivals = {"lightly's example": c.lightly_example, "torchvision on PIL": c.plain}
    for batch in bench.batches:
        yield from compare(bench, *paper(bench, "simsiam", batch), rivals)


def sidae(bench: Bench) -> Rows:
    for batch in bench.batches:
        for method in ("sidae", "dae"):
            yield from compare(bench, *paper(bench, method, batch), {"torchvision on PIL": c.plain})


def narrow(bench: Bench) -> Rows:
    cases = [("smoke", "digits")] if bench.quick else [("laptop", "cifar10"), ("quick", "digits"), ("quick", "photos")]
    for scale, name in cases:
        rows = compare(bench, experiments.run("sidae", name, scale), c.load(name), {}, name)
        yield from ({"scale": scale} | row for row in rows)


def augmentation(bench: Bench) -> Rows:
    config, images = paper(bench, "simsiam", 512)

    def views(what: str, build: Callable, *args: bool, of: Contender | None = None, needs: str = "") -> Contender:
        return Contender(what, partial(build, bench, images, config.batch, *args), "views/s", of, needs)

    ours = [views("ours", c.ours, False)] + ([] if bench.quick else [views("ours, compiled", c.ours, True)])
    return measure(bench, [*ours, views("torchvision v2, PIL, one worker", c.torchvision, True, of=ours[-1]),
                           views("torchvision v2, tensors, one worker", c.torchvision, False, of=ours[-1]),
                           views("kornia", c.kornia, of=ours[-1], needs="kornia")])  # fmt: skip


def probe(bench: Bench) -> Rows:
    """A pipeline of no ops has another name than `none`, so `evaluate` runs the backbone in every epoch for it."""
    augment.VIEWS["bare"] = augment.Views((), ())
    config, images = paper(bench, "simsiam", 512)
    images = c.cut(images, 256 if bench.quick else 1_000 if bench.device.type == "cpu" else 50_000)
    with tempfile.TemporaryDirectory() as folder:
        train.Run(config, images, bench.device).save_backbone(Path(folder), 0)

        def contender(what: str, pipeline: str, of: Contender | None = None) -> Contender:
            ask = EvalConfig(run=config, epoch=0, augment=pipeline)
            info = {"n_train": len(images.split("train").labels)}

            def repeat() -> float:
                began = time.perf_counter()
                record = evaluate.evaluate(ask, images, Path(folder) / "backbone-e000.safetensors", device=bench.device)
                info["accuracy"] = record["accuracy"]
                return time.perf_counter() - began

            return Contender(what, lambda: repeat, "seconds", of, info=info)

        cached = contender("cached features", "none")
        rows = measure(bench, [cached, contender("backbone in every epoch", "bare", cached)])
    one, other = (row["accuracy"] for row in rows)
    assert abs(one - other) <= 0.5, f"accuracies {one} and {other} are more than rounding apart"
    return rows


def evaluations(bench: Bench) -> Rows:
    """All of one checkpoint of Figure 4's, in a run's own order, so that the first computes the features; then their sum."""
    scale, name = ("smoke", "digits") if bench.quick else ("paper", "cifar10")
    every = [e for e in experiments.accuracy_vs_epochs(scale, [name], [0])[1] if e.run.method == "simsiam"]
    asked = [e for e in every if e.epoch == every[0].epoch]
    images = c.cut(c.load(name), 256 if bench.quick else 5_000 if bench.device.type == "cpu" else 50_000)
    spent: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / train.backbone_name(asked[0].epoch)
        train.Run(asked[0].run, images, bench.device).save_backbone(Path(folder), asked[0].epoch)

        def contender(ask: EvalConfig) -> Contender:
            def repeat() -> float:
                if ask is asked[0]:
                    spent.clear()
                    weights.touch()  # a new checkpoint, as far as what is kept for the next evaluation goes
                began = time.perf_counter()
                evaluate.evaluate(ask, images, weights, device=bench.device)
                spent.append(time.perf_counter() - began)
                return spent[-1]

            what, n = f"{ask.kind}, {100 * ask.labels:g} % of labels", len(evaluate.labelled(ask, images)[0])
            return Contender(what, lambda: (repeat(), repeat)[1], "seconds", info={"n_train": n})

        return measure(bench, [*map(contender, asked), Contender("all of them", lambda: lambda: sum(spent), "seconds")])


def growth(bench: Bench) -> Rows:
    def point(what: str, at: int, function: Callable, *args) -> Contender:
        info = {"at": at}

        def repeat() -> float:
            with fresh() as process:
                row = process.submit(function, *args).result()
            info.update({k: max(v, info.get(k, 0)) for k, v in row.items() if k != "seconds"})
            return row["seconds"]

        return Contender(what, lambda: repeat, "seconds", info=info)

    def training(what: str, at: int, n: int, seconds: float = 1e6, scale: str = "laptop", **changes: int) -> Contender:
        run = experiments.run("sidae", "cifar10", scale, **changes)
        return point(what, at, c.train_once, run, n, bench.device, seconds)

    n, once = 256 if bench.quick else 2_000, {"pool": 0, "epochs": 1}
    points = [training("images", k, k, **once) for k in ((n,) if bench.quick else (1_000, 5_000, 20_000, 50_000))]
    points += [training("epochs", k, n, **once | {"epochs": k}) for k in ((1,) if bench.quick else (1, 2, 4))]
    points += [training("batch", k, n, **once, batch=k) for k in ((64,) if bench.quick else (64, 128, 256, 512))]
    if not bench.quick:  # on a CPU it is stopped: the memory is the same
        seconds = 60 if bench.device.type == "cpu" else 1e6
        points.append(training("SidAE at paper scale, images", 50_000, 50_000, seconds, "paper"))
    with tempfile.TemporaryDirectory() as stores:
        for k in (10,) if bench.quick else (10, 100, 1_000, 10_000):
            with fresh() as process:
                process.submit(c.fill_store, f"{stores}/{k}", k).result()
            points.append(point("records", k, c.read_store, f"{stores}/{k}", k))
        return measure(bench, points)


def mining(bench: Bench) -> Rows:
    """`seconds_million`: what a million images would take, from this rate of pairs (exact) or of images (index)."""
    for n in (500,) if bench.quick else (5_000, 50_000) + (1_000_000,) * (bench.device.type == "cuda"):
        for neighbours in (0, 10, 50) if find_spec("hnswlib") and n <= 50_000 else (0,):
            with fresh() as process:
                row = process.submit(c.mine_once, n, neighbours, bench.device).result()
            power = 1 if neighbours else 2
            row = {"what": f"HNSW, {neighbours} neighbours" if neighbours else "exact", "unit": "seconds", "at": n,
                         "median": row.pop("seconds"), "n": 1, **row}  # fmt: skip
            yield row | {"seconds_million": row["median"] * (1e6 / n) ** power}


def precision(bench: Bench) -> Rows:
    """What bfloat16 does to the accuracy: the same seeds trained in both, paired; n is the number of seeds."""
    scale, length = ("smoke", {}) if bench.quick else ("quick", {"epochs": 30})
    images, accuracy = c.load("digits"), {"fp32": [], "bf16": []}
    for seed in range(bench.repeats):
        for kind, found in accuracy.items():
            run = experiments.run("sidae", "digits", scale, seed, precision=kind, **length)
            with tempfile.TemporaryDirectory() as folder:
                train.pretrain(run, images, Path(folder), device=bench.device)
                ask, weights = EvalConfig(run=run, labels=0.1), Path(folder) / train.backbone_name(run.epochs)
                found.append(evaluate.evaluate(ask, images, weights, device=bench.device)["accuracy"])
    for kind, found in accuracy.items():
        yield {"scale": scale} | summed_up(kind, "% accuracy", found)
    mean, low, high = differences.interval([b - a for a, b in zip(*accuracy.values())])
    yield {"scale": scale, "what": "bf16 less fp32, mean", "unit": "points", "median": mean, "n": bench.repeats, "low": low,
           "high": high}  # fmt: skip


def floor(bench: Bench) -> Rows:
    cuda = bench.device.type == "cuda"
    sizes = (64, 128) if bench.quick else (512, 1024, 2048, 4096) + (8192, 16384) * cuda
    out = [Contender("matrix product", partial(c.product, bench, n, p), "GFLOP/s", info={"size": n, "precision": p})
           for p in ("fp32", "bf16") for n in sizes]  # fmt: skip
    cases = [paper(bench, m, 256) for m in ("simsiam", "sidae", "dae")]
    cases += [] if bench.quick else [(experiments.run("sidae", "cifar10", "laptop"), c.load("cifar10"))]
    for config, images in cases:
        kinds = [(False, "fp32"), (True, "bf16")] if cuda else [(False, "fp32"), (True, "fp32"), (False, "bf16")]
        for compiled, precision in kinds[:1] if bench.quick else kinds:
            run = config.replace(precision=precision)
            info = {"method": run.method, "width": run.width, "batch": run.batch, "precision": run.precision,
                    "mode": "step" if compiled else "eager", "gflop_per_image": c.arithmetic(run) / run.batch / 1e9}
            out.append(Contender("step alone", partial(c.alone, bench, run, images, compiled), info=info))
    rows = measure(bench, out)
    for row in rows:
        if gflop := row.get("gflop_per_image"):
            best = max(r["median"] for r in rows if "size" in r and r["precision"] == row["precision"])
            row |= {"floor": best / gflop, "share": row["median"] * gflop / best}
    return rows


SECTIONS: dict[str, Callable[[Bench], Rows]] = {
    "pretrain": pretrain, "sidae": sidae, "narrow": narrow, "augment": augmentation, "probe": probe,
    "evaluations": evaluations, "growth": growth, "pairs": mining, "floor": floor, "precision": precision}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no section or round after so long")
    parser.add_argument("--batches", type=int, nargs="+", default=Bench.batches, help="batch sizes of pretrain and sidae")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results, or its subfolder cuda or quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the image sets (SIDAE_DATA)")
    args = parser.parse_args(argv)
    chosen = args.only.split(",")
    try:
        if args.data is not None:
            paths.use_data(args.data)
        if unknown := [name for name in chosen if name not in SECTIONS]:
            raise SidaeError(f"Unknown section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}.")
        if args.repeats < 1:
            raise SidaeError(f"--repeats must be at least 1, got {args.repeats}.")
        deadline = time.monotonic() + 60 * args.minutes
        bench = Bench(train.device_of(args.device), args.repeats, deadline, args.quick,
                      batches=(16,) if args.quick else tuple(args.batches))  # fmt: skip
        cuda = "cuda" * (bench.device.type == "cuda")
        out = args.out or Path(__file__).parent / "results" / ("quick" if args.quick else cuda)
        where = hardware(bench)
        print(*(f"{k}: {v}" for k, v in where.items()), sep=", ")
        for name in chosen:
            if time.monotonic() > deadline:
                print(f"{name} is left out: the time is up.")
                continue
            rows: list[Row] = []
            for row in SECTIONS[name](bench):  # written as they come: what is measured is not lost with the rest
                rows.append(row)
                train.write(out / f"{name}.csv", pd.DataFrame(rows).assign(**where).to_csv(index=False).encode())
            table = pd.DataFrame(rows).to_string(index=False, na_rep="", float_format="{:.4g}".format)
            print(f"\n{name}\n{table}", flush=True)
    except SidaeError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
