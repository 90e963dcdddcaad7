"""`python -m benchmarks.gpu`: what a step at paper scale takes on this GPU, in every mode, alone and beside others."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from sidae_lib import experiments, train
from sidae_lib.config import RunConfig

from . import contenders
from .timing import Bench, fresh, hardware

_held: dict[str, train.Run] = {}  # of this process, by method


def _config(method: str, toy: bool, **changes) -> RunConfig:
    where = ("digits", "smoke") if toy else ("cifar10", "paper")
    return experiments.run(method, *where, epochs=4850 if toy else 200, **changes)  # 19,400 steps either way


def stand(method: str, mode: str, device: str, toy: bool) -> None:
    """Builds a run, warms it up and keeps it in this process."""
    config = _config(method, toy)
    run = _held[method] = train.Run(config, contenders.load("digits" if toy else "cifar10"), train.device_of(device))
    run.set_mode(mode)
    go(method, 10)


def go(method: str, steps: int = 0, seconds: float = 0.0) -> tuple[int, float, str]:
    """Steps of the kept run, so many or for so long: how many, in what time, in which mode."""
    run, bench = _held[method], Bench(_held[method].device)
    drawn = run.draw(0)
    bench.synchronize()
    began, done = time.perf_counter(), 0
    while done < steps or time.perf_counter() - began < seconds:
        run.step = done % len(run.bounds)
        run.advance(drawn, *run.bounds[run.step])
        done += 1
        if done % 20 == 0:
            bench.synchronize()
    bench.synchronize()
    return done, time.perf_counter() - began, run.mode


def apart(method: str, device: str, toy: bool) -> tuple[float, float]:
    """After 20 steps in float32: how far a graph's weights lie from those of single launches, and those of single launches
    from each other, relative to how far they have moved: a GPU does not order its sums."""
    images, ends = contenders.load("digits" if toy else "cifar10"), []
    for mode in ("eager", "eager", "eager graph"):
        run = train.Run(_config(method, toy, precision="fp32"), images, train.device_of(device))
        run.set_mode(mode)
        start = torch.cat([p.detach().flatten().clone() for p in run.method.parameters()])
        drawn = run.draw(0)
        for n in range(20):
            run.advance(drawn, *run.bounds[n % len(run.bounds)])
        ends.append(torch.cat([p.detach().flatten() for p in run.method.parameters()]))
    moved = (ends[0] - start).norm()
    return ((ends[2] - ends[0]).norm() / moved).item(), ((ends[1] - ends[0]).norm() / moved).item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--toy", action="store_true", help="smoke scale: shows that it runs, measures nothing")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--modes", nargs="+", default=["eager", "views", "views graph"], help="of one process; then the last"
                        " of them in more processes")  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=["sidae", "simsiam", "dae"])
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cuda" / "step.csv")
    args = parser.parse_args(argv)
    where, rows = hardware(Bench(train.device_of(args.device))), []
    batch = _config("sidae", args.toy).batch

    def add(what: str, method: str, found: list[tuple[int, float, str]], mode: str) -> None:
        rate = sum(done / seconds for done, seconds, _ in found)
        rows.append({"what": what, "method": method, "mode": mode, "processes": len(found), "ms_per_step": 1000 / rate,
                     "images_per_second": rate * batch, "seconds_per_run": 19_400 / rate,
                     "steps": sum(done for done, *_ in found)})  # fmt: skip
        print(f"{what}: {method}, {mode}, {len(found)} processes: {1000 / rate:.2f} ms a step, {rate * batch:,.0f} images/s, "
              f"a run of 19,400 steps in {19_400 / rate:.0f} s", flush=True)  # fmt: skip
        train.write(args.out, pd.DataFrame(rows).assign(**where).to_csv(index=False).encode())

    pools = [fresh() for _ in range(args.processes)]
    try:
        first, graph = pools[0], args.modes[-1]
        for mode in args.modes:
            first.submit(stand, args.methods[0], mode, args.device, args.toy).result()
            found = first.submit(go, args.methods[0], 0, args.seconds).result()
            add("step", args.methods[0], [found], found[2])
        far, again = first.submit(apart, args.methods[0], args.device, args.toy).result()
        print(f"20 steps in float32: a graph lies {far:.1e} of the way moved from single launches, these {again:.1e} from "
              "each other", flush=True)  # fmt: skip
        each = [args.methods[n % len(args.methods)] for n in range(args.processes)]
        for job in [p.submit(stand, m, graph, args.device, args.toy) for p, m in zip(pools, each)]:
            job.result()
        for n in range(1, args.processes + 1):
            found = [j.result() for j in [p.submit(go, m, 0, args.seconds) for p, m in zip(pools[:n], each)]]
            add("side by side", " + ".join(each[:n]), found, found[0][2])
    finally:
        for pool in pools:
            pool.shutdown()


if __name__ == "__main__":
    main()
