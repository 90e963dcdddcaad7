"""Pre-training: one loop for every method, which can stop at any step and go on as if it had not."""

import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import __version__, methods, pairs, paths, threads
from .checkpoint import Damaged, Run, several_classes, strip, training_pairs, unstrip  # noqa: F401
from .config import RunConfig, SidaeError
from .data import Images
from .paths import backbone_name, sha256, write  # noqa: F401

CHECKPOINT_SECONDS = 60.0
LISTENERS: list[Callable[[RunConfig, list[dict[str, Any]]], None]] = []  # called after every epoch
Passed = Callable[[int, dict[str, str]], None]  # takes an epoch, and name -> sha256 of the backbones so far


class Stopped(SidaeError):
    """A run that was asked to stop, by a signal or a deadline, and left a checkpoint to go on from."""


class NotKept(SidaeError):
    """A backbone is asked for that an unfinished run did not keep on its way."""


def device_of(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device that is there. Raises SidaeError otherwise."""
    if name not in ("auto", "cpu", "cuda"):
        raise SidaeError(f"Unknown device {name!r}; choose from auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise SidaeError("There is no CUDA device here; choose device cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _processor() -> str:
    """The processor's name where Linux tells it, else its kind."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
    return platform.machine()


@cache
def _commit() -> str | None:
    """The commit of the code when this process began; None outside of a checkout and without git."""
    with suppress(OSError):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=paths.ROOT, capture_output=True, text=True)
        return git.stdout.strip() or None
    return None


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and with what a record was made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"package": __version__, "commit": _commit(), "torch": str(torch.__version__), "device": name,
            "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "start": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip


@contextmanager
def _handling(handlers: dict[int, Any]):
    """Within, signals go to these handlers. Yields those that were there before."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop:
    """Turns SIGINT and SIGTERM into a request that the loop honours after the step; a second acts at once."""

    before: dict[int, Any] = {}
    signal: int | None = None  # of the class: a request to every run of the process, by a grid's worker

    def __call__(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, self.before[number])

    @contextmanager
    def armed(self):
        main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
        with _handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM), self) if main else {}) as self.before:
            yield self

    def paused(self):
        """Within, signals do what they did before: right after a checkpoint there is nothing to save."""
        return _handling(self.before)


def always_kept(config: RunConfig) -> set[int]:
    """Epochs whose backbone is always kept: the last; in a run of the paper's length without labels also
    every 25th from 0, since such a run is not begun again for one of them."""
    long = config.epochs >= 200 and not methods.METHODS[config.method].labels
    return {config.epochs, *(range(0, config.epochs, 25) if long else ())}


def cost(config: RunConfig, images: Images) -> dict[str, float]:
    """What one step of a run takes: `parameters` trained; `mib` kept for the way back, without weights;
    `gflop` per image, of convolutions and matrix products, forward and backward, views too."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    run, kept = Run(config, images, torch.device("cpu")), dict[int, int]()
    run.set_mode("eager")
    weights = {p.untyped_storage().data_ptr() for p in run.method.parameters()}

    def keep(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        if s.data_ptr() not in weights:
            kept[s.data_ptr()] = s.nbytes()
        return t

    a, b = run.bounds[0]
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out, _ = run.forward(*run.samples(run.draw(0), slice(a, b)))
        out["loss"].backward()
    return {"parameters": sum(p.numel() for p in run.method.parameters() if p.requires_grad),
            "mib": round(sum(kept.values()) / 2**20, 1),
            "gflop": round(counter.get_total_flops() / 1e9 / (b - a), 5)}  # fmt: skip


def goes_on(segments: list[dict[str, Any]], device: torch.device, name: str) -> bool:
    """Whether a device takes over a run that these segments made. A GPU begins anew unless they are its own
    kind's: another's hours are its minutes, and its records are then of one machine."""
    return device.type != "cuda" or all(s["device"] == name for s in segments)


def pretrain(config: RunConfig, images: Images, folder: Path, *, device: torch.device,
             checkpoints: Iterable[int] = (), also: Iterable[int] = (), deadline: float | None = None,
             until: int | None = None, passed: Passed = lambda epoch, files: None
             ) -> dict[str, Any] | None:  # fmt: skip
    """Trains one run, or goes on with it, and returns its record; weights go to `folder`.

    checkpoints: epochs (0 to config.epochs) whose backbone is kept, beside those that `always_kept` names.
    also: more of them, as far as they are still to come.
    deadline: `time.monotonic()` after which the run stops at a checkpoint.
    until: an epoch at whose end it stops at a checkpoint and returns None.
    passed: called where the run begins or goes on, and at every kept epoch before the last, once it is saved.
    Raises Stopped on a signal or the deadline, NotKept where the run is past one of `checkpoints` and did not
    keep it, Damaged for a checkpoint that is not whole, SidaeError when loss or weights are not finite.
    """
    run, born, path = Run(config, images, device), provenance(device), folder / "checkpoint.safetensors"
    keep = {*(asked := sorted(checkpoints)), *also, *always_kept(config)}
    untrained = run.monitor() if run.steps else {}
    if path.exists():
        run.restore(path)
        if not goes_on(run.segments, device, born["device"]):
            run = Run(config, images, device)
    at = run.epoch
    if run.step == at * len(run.bounds) and at in keep and not run.kept(folder, at):
        run.save_backbone(folder, at)
    if lost := [e for e in asked if e <= at and not run.kept(folder, e)]:
        own = ", ".join(str(e) for e in range(at + 1) if run.kept(folder, e)) or "none"
        raise NotKept(f"{run.name} stands at epoch {at} of {config.epochs} and did not keep epoch "
                      f"{', '.join(map(str, lost))} on its way (kept: {own}). An unfinished run is not begun "
                      "again for it: ask for an epoch that is kept, or let the run finish first.")
    of_segment = ("commit", "torch", "device", "threads", "start")
    run.segments.append({k: born[k] for k in of_segment} | {"steps": [run.step] * 2})
    if run.step < run.steps:
        passed(at, run.files)
    if run.steps:
        with _Stop().armed() as stop:
            _loop(run, path, keep, stop, deadline, until, passed)
    if run.step < run.steps:
        return None
    data, per_epoch = {"name": images.name, "display": images.display}, sum(b - a for a, b in run.bounds)
    record = {
        "config": config.to_dict(), "key": config.key(), "data": data, "untrained": untrained,
        "epochs": run.history, "steps": run.steps, "images": per_epoch * config.epochs,
        "seconds": round(run.seconds, 3), "mode": run.mode, "files": dict(sorted(run.files.items())),
        "provenance": born | {"segments": run.meta()["segments"]},
    }  # fmt: skip
    split = images.split(config.split)
    if run.pictures:
        record["pictures"] = {"clean": strip(split.images[run.monitored[:8].cpu()] / 255)} | run.pictures
    if run.extra is not None:
        record["pairs"] = pairs.report(run.extra, split.labels)
    return record


def _loop(run: Run, path: Path, keep: set[int], stop: _Stop, deadline: float | None = None,
          until: int | None = None, passed: Passed = lambda epoch, files: None) -> None:  # fmt: skip
    config, cuda, per_epoch = run.config, run.device.type == "cuda", len(run.bounds)
    end, saved = config.epochs if until is None else min(until, config.epochs), time.monotonic()
    bar = tqdm(total=run.steps, initial=run.step, unit="step", desc=f"{config.method} {config.key()[:6]}",
               leave=False, disable="TQDM_DISABLE" in os.environ or None, mininterval=0.5)  # fmt: skip
    ahead = ThreadPoolExecutor(1)  # a GPU need not wait for the next draft; a CPU has no core for it
    coming: Future | None = None
    for epoch in range(run.epoch, end):
        drawn = run.put(coming.result() if coming else run.draft(epoch))
        coming = ahead.submit(run.draft, epoch + 1) if cuda and epoch + 1 < end else None
        for a, b in run.bounds[run.step % per_epoch :]:
            if run.mode == "eager":  # what is compiled is compiled for a number of threads
                threads.fit()
            began = time.perf_counter()
            run.advance(drawn, a, b)
            ended = run.step % per_epoch == 0
            if ended or not cuda:  # a GPU is not waited for on the way
                run.check_finite()
            run.seconds += time.perf_counter() - began
            bar.update()
            if ended:
                looked = (epoch + 1) % max(1, config.epochs // 10) == 0
                run.end_epoch(run.gauges(drawn, a, b) if looked else {})
                for listener in LISTENERS:
                    listener(config, run.history)
                line, timed = run.history[-1], [h for h in run.history if "images_per_second" in h]
                bar.set_postfix(loss=f"{line['loss']:.3f}", z_std=f"{line['z_std']:.3f}",
                                images_s=f"{timed[-1]['images_per_second']:.0f}")  # fmt: skip
                if epoch + 1 in keep:
                    run.save_backbone(path.parent, epoch + 1)
            late = deadline is not None and time.monotonic() > deadline
            pause = ended and run.step < run.steps and epoch + 1 in keep | {end}
            told = stop.signal  # looked at once: a signal after this look waits for the next step
            if told or late or pause or time.monotonic() - saved > CHECKPOINT_SECONDS:
                run.check_finite()
                run.save(path)
                saved = time.monotonic()
            if told or late and run.step < run.steps:
                bar.close()
                why = "Time is up" if late else f"Stopped by {signal.Signals(told).name}"
                raise Stopped(f"{why}: {run.name} stands at step {run.step} of {run.steps}, saved in {path}; "
                              "the same call goes on from there.")  # fmt: skip
            if pause:
                with stop.paused():
                    passed(epoch + 1, run.files)
    bar.close()
