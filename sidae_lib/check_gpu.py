"""`python -m sidae_lib check-gpu`: is one CUDA graph of a step right on this GPU, and what does a step take at
paper size, in every mode, alone and beside others? Processes share a GPU by MPS, or they take turns."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from . import data, experiments, methods, paths, train
from .config import RunConfig, SidaeError
from .data import Images, Split

METHODS = ("sidae", "simsiam", "dae")  # of the first, second and third process
GROUPS = (("eager", "views", "views graph"), ("step", "step graph"))  # of modes; each compiles once
TOY = (("eager", "eager graph"),)  # a CPU compiles for minutes
STEPS = 19_400  # of a run of 200 epochs on CIFAR-10
NEAR = 1e-4  # relative

Pools = Sequence[ProcessPoolExecutor]  # a process each, for one of the methods
Found = list[tuple[int, float]]  # steps and seconds of each process
_held: dict[bool, tuple[train.Run, tuple]] = {}  # True: the whole step compiles


def config_of(method: str, device: torch.device, **changes: Any) -> RunConfig:
    """A run of STEPS steps: CIFAR-10 at paper scale, or on a CPU digits at smoke scale."""
    toy = device.type == "cpu"
    where = ("digits", "smoke") if toy else ("cifar10", "paper")
    return experiments.run(method, *where, epochs=4850 if toy else 200, **changes)


def _run(method: str, device: torch.device, **changes: Any) -> train.Run:
    images = load("digits" if device.type == "cpu" else "cifar10")
    return train.Run(config_of(method, device, **changes), images, device)


def noise(n: int) -> Images:
    """n random training images of CIFAR-10's shape, and a fifth as many for the test."""
    splits = {name: Split(torch.randint(256, (m, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (m,)))
              for name, m in (("train", n), ("test", n // 5))}
    return Images("noise", "noise", "", tuple("0123456789"), (0.5,) * 3, (0.29,) * 3, splits)


@lru_cache
def load(name: str) -> Images:
    """The set called `name`, or where it is not on this machine `noise`, which changes no speed."""
    try:
        return data.load(name)
    except SidaeError:
        return noise(50_000)


def meeting(few: int, wide: int, kernel: int, stride: int, padding: int) -> int:
    """Along one side: how many taps meet a pixel of the wide map, over all places of a convolution."""
    return sum(0 <= n * stride - padding + tap < wide for n in range(few) for tap in range(kernel))


def _forward(x: Any, w: Any, _bias: Any, stride: Any, padding: Any, _dilation: Any, transposed: bool, *_: Any,
             out_shape: Any) -> int:  # fmt: skip
    few, wide = (x, out_shape) if transposed else (out_shape, x)
    return 2 * x[0] * w[0] * w[1] * math.prod(map(meeting, few[2:], wide[2:], w[2:], stride, padding))


def _backward(grad: Any, x: Any, *more: Any, out_shape: Any) -> int:
    wanted = sum(more[-1][:2])  # the gradients of x and of the weight
    return wanted * _forward(x, *more, out_shape=grad)


def arithmetic(config: RunConfig) -> int:
    """Floating-point operations of one step, forward and backward, two per multiply-add: of convolutions and matrix
    products, nearly all of them. What a convolution does on padding alone does not count. Tensors without content
    are counted, in no time."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with torch.device("meta"):
        method = methods.build(config)
        v1, v2, x = (torch.empty(config.batch, config.channels, config.size, config.size) for _ in range(3))
        stat = torch.empty(config.channels, 1, 1)
    own = {torch.ops.aten.convolution: _forward, torch.ops.aten.convolution_backward: _backward}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        method.loss((v1, v2), {"x1": x, "x2": x, "mean": stat, "std": stat})["loss"].backward()
    return counter.get_total_flops()


def best_rate(device: torch.device, seconds: float) -> float:
    """Floating-point operations a second of the product of two bf16 matrices, the best within a time."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b})
    return 2 * n**3 / min(timer.blocked_autorange(min_run_time=seconds).times)


def stand(method: str, mode: str, device: torch.device) -> str:
    """Keeps a run in this process and brings it into a mode, compiled and captured. Returns its mode then."""
    whole = mode.startswith("step")
    if whole not in _held:
        run = _run(method, device)
        _held[whole] = run, (run.draw(0), run.draw(1))
    _held[whole][0].set_mode(mode)
    go(mode, 10)
    return _held[whole][0].mode


def go(mode: str, steps: int = 0, seconds: float = 0.0) -> tuple[int, float]:
    """Takes steps of the run in a mode, so many or for so long. Returns how many, and in what time."""
    run, epochs = _held[mode.startswith("step")]
    synchronize = torch.cuda.synchronize if run.device.type == "cuda" else lambda device: None
    synchronize(run.device)
    began, done = time.perf_counter(), 0
    while done < steps or time.perf_counter() - began < seconds:
        run.step = done % len(run.bounds)  # always the first epoch's rates: the time may be longer than a run
        run.advance(epochs[done // len(run.bounds) % 2], *run.bounds[run.step])
        done += 1
        if done % 20 == 0:
            synchronize(run.device)
    synchronize(run.device)
    return done, time.perf_counter() - began


def apart(method: str, mode: str, device: torch.device) -> tuple[str, float, float]:
    """The mode that a run in a mode's graph has after 20 steps in float32, how far its weights lie from those of
    single launches, and two runs of single launches from each other, relative to how far they have moved.

    From now on this process has kernels that order their sums: by others two runs of single launches soon lie a
    quarter of the way apart, since the first steps amplify the last bit. So compiled views are compared with
    compiled views.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    ends, drawn = [], None
    for name in (mode, mode, f"{mode} graph"):
        run = _run(method, device, precision="fp32")
        run.set_mode(name)
        torch.backends.cudnn.benchmark = False  # a graph's mode has set it
        start, drawn = _weights(run), drawn or run.draw(0)
        for n in range(20):
            run.advance(drawn, *run.bounds[n % len(run.bounds)])
        ends.append(_weights(run))
    one, other, graph = ends
    moved = (one - start).norm()
    return run.mode, ((graph - one).norm() / moved).item(), ((other - one).norm() / moved).item()


def _weights(run: train.Run) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.method.parameters()])


def _got(what: str, job: Future) -> Any:
    """What a job returns; None, and a line, where it fails."""
    try:
        return job.result()
    except BrokenExecutor:  # no job of that process can follow
        raise
    except Exception as e:  # whatever a compiler or a driver raises
        print(f"{what} is left out: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}")
        return None


def _compared(pool: ProcessPoolExecutor, device: torch.device) -> list[str]:
    """The graphs that could not be captured or whose weights do not agree with those of single launches."""
    wrong, kinds = [], ("eager",) if device.type == "cpu" else ("eager", "views")
    jobs = {(m, kind): pool.submit(apart, m, kind, device) for m in METHODS for kind in kinds}
    for (method, kind), job in jobs.items():
        what = f"{methods.NAMES[method]}, {kind} graph"
        mode, far, again = _got(what, job) or ("", math.nan, math.nan)
        if mode:
            print(f"{what}, 20 steps in float32: {far:.1e} of the way moved from single launches; two of "
                  f"these differ by {again:.1e}.")  # fmt: skip
        if mode != f"{kind} graph" or not far <= NEAR:
            wrong.append(what)
    return wrong


def _compile(pools: Pools, group: Sequence[str], device: torch.device) -> list[Future]:
    """Compiles a group of modes in every process at once."""
    return [pool.submit(stand, method, group[-2], device) for pool, method in zip(pools, METHODS)]


def _together(pools: Pools, mode: str, seconds: float, device: torch.device) -> Found:
    """Times processes that run at once. The last of them enters the mode now, the others stand in it already.
    Empty, and a line, where the mode fails."""
    what = f"{mode}, {len(pools)} process{'es' * (len(pools) > 1)}"
    ran = _got(what, pools[-1].submit(stand, METHODS[len(pools) - 1], mode, device))
    if ran and ran != mode:
        print(f"{what} is left out: it could not be captured and ran as {ran}.")
    jobs = [pool.submit(go, mode, 0, seconds) for pool in pools] if ran == mode else []
    found = [_got(what, job) for job in jobs]
    return found if all(found) else []


def _timed(pools: Pools, groups: Sequence[Sequence[str]], seconds: float, device: torch.device
           ) -> Iterator[tuple[str, Found]]:  # fmt: skip
    """Times every mode alone, then a group's graph in two and three processes if it is the fastest yet."""
    fastest = 0.0
    for group in groups:
        wait(_compile(pools, group, device))
        for mode in group:
            if found := _together(pools[:1], mode, seconds, device):
                yield mode, found
        rate = found[0][0] / found[0][1] if found else 0.0  # the graph's
        for n in range(2, len(pools) + 1) if rate > fastest else ():
            if not (found := _together(pools[:n], group[-1], seconds, device)):
                break
            yield group[-1], found
        fastest = max(fastest, rate)


def _row(mode: str, found: Found, limit: float, device: torch.device, made: dict[str, Any]) -> dict[str, Any]:
    """A row of the table. limit: operations a second that the device is capable of.  made: the provenance."""
    rates = {method: steps / seconds for method, (steps, seconds) in zip(METHODS, found)}
    configs, rate = {m: config_of(m, device) for m in rates}, sum(rates.values())
    return {"what": "side by side" if len(found) > 1 else "step", "method": " + ".join(rates), "mode": mode,
            "processes": len(found), "ms_per_step": 1000 / rate,
            "images_per_second": sum(rates[m] * configs[m].batch for m in rates),
            "share": sum(rates[m] * arithmetic(configs[m]) for m in rates) / limit,
            "seconds_per_run": STEPS / rate, "runs_per_quarter": 900 * rate / STEPS,
            "steps": sum(steps for steps, _ in found), "hardware": made["device"],
            **{name: made[name] for name in ("cores", "torch", "threads")}}  # fmt: skip


def check(name: str, seconds: float, out: Path | None = None) -> int:
    """Compares, then times for `seconds` in all, compiling on top; prints both, and writes the times to `out`.
    Returns 0, or 1 where a graph could not be captured or its weights do not agree. Raises SidaeError for a device
    that is not there and where a process dies."""
    device, rows = train.device_of(name), []
    made, groups = train.provenance(device), GROUPS
    if device.type == "cpu":
        made["threads"], groups = 1, TOY  # several processes share its cores
        print("A rehearsal at toy size, since the device is a CPU: it shows that all runs, and measures nothing.")
    elif load("cifar10").name == "noise":
        print(f"cifar10 is not in {paths.data()}: random images stand in for it, which changes no speed.")
    each = seconds / (1 + sum(len(g) + 2 for g in groups))
    start = get_context("spawn"), torch.set_num_threads, (made["threads"],)
    *pools, compares = (ProcessPoolExecutor(1, *start) for _ in range(len(METHODS) + 1))
    try:
        _compile(pools, groups[0], device)  # meanwhile
        wrong = _compared(compares, device)
        limit = _got("the arithmetic limit", pools[0].submit(best_rate, device, each)) or math.nan
        print("The arithmetic limit, the best rate of a product of bf16 matrices, is "
              f"{limit / 1e12:,.1f} TFLOP/s.")
        print("mode         processes  ms a step  images/s  share of limit  seconds a run  runs in 15 min")
        for mode, found in _timed(pools, groups, each, device):
            rows.append(_row(mode, found, limit, device, made))
            print("{mode:12s} {processes:9d} {ms_per_step:10.2f} {images_per_second:9,.0f} {share:15.1%} "
                  "{seconds_per_run:14.0f} {runs_per_quarter:15.1f}".format(**rows[-1]))  # fmt: skip
            if out:
                train.write(out, pd.DataFrame(rows).to_csv(index=False).encode())
    except BrokenExecutor as e:
        raise SidaeError("A process of the check died; free memory, also on the GPU, and try again.") from e
    finally:
        for pool in (*pools, compares):
            pool.shutdown(cancel_futures=True)
    if wrong:
        print(f"A graph must be captured and lie within {NEAR:g} of single launches; not: {'; '.join(wrong)}.")
    return int(bool(wrong))
