"""`python -m sidae_lib check-gpu`: whether one CUDA graph of a step is right on this GPU, and what a step takes at paper size,
in every mode, alone and beside others. Processes share a GPU by MPS (`nvidia-cuda-mps-control -d`); without it they take turns.
On a CPU the same is rehearsed at toy size."""

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from . import data, experiments, figures, methods, paths, train
from .config import RunConfig, SidaeError
from .data import Images, Split

METHODS = ("sidae", "simsiam", "dae")  # of the first, second and third process
GROUPS = (("eager", "views", "views graph"), ("step", "step graph"))  # of modes; a group compiles once and ends in a graph
TOY = (("eager", "eager graph"),)  # a CPU compiles for minutes
STEPS = 19_400  # of a run of 200 epochs on CIFAR-10
NEAR = 1e-4  # relative

_held: dict[bool, tuple[train.Run, tuple]] = {}  # of this process, with two drawn epochs; True: its whole step is compiled


def config_of(method: str, toy: bool, **changes: Any) -> RunConfig:
    """A run of STEPS steps: CIFAR-10 at paper scale, or digits at smoke scale."""
    where = ("digits", "smoke") if toy else ("cifar10", "paper")
    return experiments.run(method, *where, epochs=4850 if toy else 200, **changes)


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
    """Along one side: how many taps meet a pixel of the wide map, all places of a convolution taken together."""
    return sum(0 <= n * stride - padding + tap < wide for n in range(few) for tap in range(kernel))


def _forward(x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *_: Any, out_shape: Any
             ) -> int:  # fmt: skip
    few, wide = (x, out_shape) if transposed else (out_shape, x)
    return 2 * x[0] * w[0] * w[1] * math.prod(map(meeting, few[2:], wide[2:], w[2:], stride, padding))


def _backward(grad: Any, x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *more: Any,
              out_shape: Any) -> int:  # fmt: skip
    wanted = sum(more[-1][:2])  # the gradients of x and of the weight
    return wanted * _forward(x, w, bias, stride, padding, dilation, transposed, out_shape=grad)


def arithmetic(config: RunConfig) -> int:
    """Floating-point operations of one step, forward and backward, two per multiply-add: those of the convolutions and
    matrix products, nearly all of them; a convolution's that meet padding alone are none. Counted on tensors without
    content, so in no time."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with torch.device("meta"):
        method = methods.build(config)
        v1, v2, x = (torch.empty(config.batch, config.channels, config.size, config.size) for _ in range(3))
        stat = torch.empty(config.channels, 1, 1)
    own = {torch.ops.aten.convolution: _forward, torch.ops.aten.convolution_backward: _backward}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        method.loss((v1, v2), {"x1": x, "x2": x, "mean": stat, "std": stat})["loss"].backward()
    return counter.get_total_flops()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_rate(device: torch.device, seconds: float) -> float:
    """Floating-point operations a second of the product of two bf16 matrices, the best of those that fit in a time."""
    n, best, end = 8192 if device.type == "cuda" else 512, 0.0, time.perf_counter() + seconds
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    while not best or time.perf_counter() < end:
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        _synchronize(device)
        best = max(best, 10 * 2 * n**3 / (time.perf_counter() - began))
    return best


def stand(method: str, mode: str, device: torch.device) -> str:
    """Keeps a run in this process and brings it into a mode, compiled and captured; the mode that it then is in."""
    if (whole := mode.startswith("step")) not in _held:
        config = config_of(method, device.type == "cpu")
        run = train.Run(config, load("digits" if device.type == "cpu" else "cifar10"), device)
        _held[whole] = run, (run.draw(0), run.draw(1))
    _held[whole][0].set_mode(mode)
    go(mode, 10)
    return _held[whole][0].mode


def go(mode: str, steps: int = 0, seconds: float = 0.0) -> tuple[int, float]:
    """Steps of the run that stands in a mode, so many or for so long: how many, in what time."""
    run, epochs = _held[mode.startswith("step")]
    _synchronize(run.device)
    began, done = time.perf_counter(), 0
    while done < steps or time.perf_counter() - began < seconds:
        run.step = done % len(run.bounds)  # the schedule's first epoch, again and again: a time may be longer than a run
        run.advance(epochs[done // len(run.bounds) % 2], *run.bounds[run.step])
        done += 1
        if done % 20 == 0:
            _synchronize(run.device)
    _synchronize(run.device)
    return done, time.perf_counter() - began


def apart(method: str, mode: str, device: torch.device) -> tuple[str, float, float]:
    """The mode that a run in a mode's graph is in after 20 steps in float32, how far its weights lie from those of single
    launches, and those of two runs of single launches from each other, relative to how far they have moved.

    The kernels are those that order their sums, of this process from now on: by others two runs of single launches soon lie
    a quarter of the way apart, since the first steps amplify the last bit. For the same reason compiled views are compared
    with compiled views.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    config, ends, drawn = config_of(method, device.type == "cpu", precision="fp32"), [], None
    for name in (mode, mode, f"{mode} graph"):
        run = train.Run(config, load("digits" if device.type == "cpu" else "cifar10"), device)
        run.set_mode(name)
        torch.backends.cudnn.benchmark = False  # a graph's mode has set it
        start, drawn = weights(run), drawn or run.draw(0)
        for n in range(20):
            run.advance(drawn, *run.bounds[n % len(run.bounds)])
        ends.append(weights(run))
    moved = (ends[0] - start).norm()
    return run.mode, ((ends[2] - ends[0]).norm() / moved).item(), ((ends[1] - ends[0]).norm() / moved).item()


def weights(run: train.Run) -> Tensor:
    """All of a run's weights now, one after the other."""
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


def check(name: str, seconds: float, out: Path | None = None) -> int:
    """Compares, then times for `seconds` in all, compiling and capturing on top; prints both, and writes the times to `out`.
    Returns 0, or 1 where a graph could not be captured or its weights do not agree. Raises SidaeError for a device that is
    not there and where a process dies."""
    device = train.device_of(name)
    toy, born = device.type == "cpu", train.provenance(device)
    if toy:
        print("A rehearsal at toy size, since the device is a CPU: it shows that everything runs and measures nothing.")
    elif load("cifar10").name == "noise":
        print(f"cifar10 is not in {paths.data()}: random images of its shape stand in for it, which changes no speed.")
    groups, kinds = (TOY, ("eager",)) if toy else (GROUPS, ("eager", "views"))
    each = seconds / (1 + sum(len(g) + 2 for g in groups))
    configs = {m: config_of(m, toy) for m in METHODS}
    flops = {m: arithmetic(c) / c.batch for m, c in configs.items()}
    rows: list[dict[str, Any]] = []
    wrong, best, fastest = [], math.nan, 0.0
    threads = 1 if toy else born["threads"]  # several processes share a CPU's cores
    pools = [ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) for _ in (*METHODS, "compares")]

    def ready(group: Sequence[str]) -> list[Future]:
        """Compiles a group of modes in every process at once."""
        return [p.submit(stand, m, group[-2], device) for p, m in zip(pools, METHODS)]

    def times(mode: str, n: int) -> float:
        """Adds the row of n processes, a method each, of which the first n - 1 stand in the mode already. Steps a second of
        all together, 0 where the mode fails."""
        what = f"{mode}, {n} process{'es' * (n > 1)}"
        ran = _got(what, pools[n - 1].submit(stand, METHODS[n - 1], mode, device))
        if ran and ran != mode:
            print(f"{what} is left out: it could not be captured and ran as {ran}.")
        jobs = [p.submit(go, mode, 0, each) for p in pools[:n]] if ran == mode else []
        if not jobs or not all(found := [_got(what, j) for j in jobs]):
            return 0.0
        rates = {m: done / s for m, (done, s) in zip(METHODS, found)}
        images, rate = {m: r * configs[m].batch for m, r in rates.items()}, sum(rates.values())
        rows.append({"what": "side by side" if n > 1 else "step", "method": " + ".join(rates), "mode": mode, "processes": n,
                     "ms_per_step": 1000 / rate, "images_per_second": sum(images.values()),
                     "share": sum(flops[m] * i for m, i in images.items()) / best, "seconds_per_run": STEPS / rate,
                     "runs_per_quarter": 900 * rate / STEPS, "steps": sum(done for done, _ in found),
                     "hardware": born["device"], "cores": born["cores"], "torch": born["torch"], "threads": threads})
        print("{mode:12s} {processes:9d} {ms_per_step:10.2f} {images_per_second:9,.0f} {share:15.1%} {seconds_per_run:14.0f} "
              "{runs_per_quarter:15.1f}".format(**rows[-1]))  # fmt: skip
        if out:
            train.write(out, pd.DataFrame(rows).to_csv(index=False).encode())
        return rate

    try:
        compared = {(m, k): pools[-1].submit(apart, m, k, device) for m in METHODS for k in kinds}
        ready(groups[0])  # meanwhile
        for (method, kind), job in compared.items():
            what = f"{figures.NAMES[method]}, {kind} graph"
            ran, far, again = _got(what, job) or ("", math.nan, math.nan)
            if ran != f"{kind} graph" or not far <= NEAR:
                wrong.append(what)
            if ran:
                print(f"{what}, 20 steps in float32: {far:.1e} of the way moved from single launches; two of these differ "
                      f"by {again:.1e}.")  # fmt: skip
        best = _got("the arithmetic limit", pools[0].submit(best_rate, device, each)) or math.nan
        print(f"The arithmetic limit, the best rate of a product of bf16 matrices, is {best / 1e12:,.1f} TFLOP/s.")
        print("mode         processes  ms a step  images/s  share of limit  seconds a run  runs in 15 min")
        for group in groups:
            wait(ready(group))
            rates = [times(mode, 1) for mode in group]
            if rates[-1] > fastest:  # the graph's
                fastest = rates[-1]
                all(times(group[-1], n) for n in range(2, len(METHODS) + 1))
    except BrokenExecutor as e:
        raise SidaeError("A process of the check died; free memory, here and on the GPU, and check again.") from e
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
    if wrong:
        print(f"A graph must be captured and lie within {NEAR:g} of single launches; this one does not: {'; '.join(wrong)}.")
    return int(bool(wrong))
