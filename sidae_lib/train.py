"""Pre-training: one loop for every method, that can stop at any step and go on as if it had not."""

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from . import __version__, augment, methods, networks, paths
from .augment import Params
from .config import RunConfig, SidaeError, epoch_seed
from .data import Images, subset

CHECKPOINT_SECONDS = 60.0


class Stopped(SidaeError):
    """A run that was asked to stop, by a signal or a deadline, and left a checkpoint to go on from."""


def device_of(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device that is there. Raises SidaeError otherwise."""
    if name not in ("auto", "cpu", "cuda"):
        raise SidaeError(f"Unknown device {name!r}; choose from auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise SidaeError("There is no CUDA device here; choose device cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def lr_at(step: int, steps: int, lr: float, schedule: str = "cosine") -> float:
    """Learning rate of step 0 to steps - 1: cosine decay from lr towards 0 per step (SidAE Sec. 4.1), or constant."""
    return lr if schedule == "constant" else 0.5 * lr * (1 + math.cos(math.pi * step / steps))


def batches(n: int, batch: int, keep_last: bool) -> list[tuple[int, int]]:
    """Bounds of the batches of n samples. A kept tail of one joins the batch before: BatchNorm needs two samples."""
    bounds = list(range(0, n + 1, batch))
    if keep_last and bounds[-1] < n:
        bounds = bounds[:-1] + [n] if n - bounds[-1] == 1 and len(bounds) > 1 else bounds + [n]
    return list(zip(bounds, bounds[1:]))


def training_pairs(config: RunConfig, images: Images) -> Tensor:
    """(P, 2) int64 index pairs (i, j) into the split: view 1 comes from image i, view 2 from image j; or triples."""
    split = images.split(config.split)
    n = len(split.images)
    if methods.check(config).labels:
        if split.labels is None:
            raise SidaeError(f"{config.method} needs labels, and the {config.split} split of {images.name} has none.")
        i = subset(n, fraction=config.labels, count=config.label_count, seed=config.label_seed)
        if config.per_class:
            i = torch.cat([(split.labels == c).nonzero()[: config.per_class, 0] for c in split.labels.unique()])
    else:
        i = subset(n, count=config.pool, seed=config.pool_seed) if config.pool else torch.arange(n)
    if len(i) < config.batch and not methods.METHODS[config.method].labels and config.epochs:
        raise SidaeError(f"batch is {config.batch} but only {len(i)} images are there to train on; take a smaller one.")
    return methods.METHODS[config.method].pairs(config, i, split.labels)


def _processor() -> str:
    """The processor's name where Linux tells it, else its kind."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and with what a record was made."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=paths.ROOT, capture_output=True, text=True)
    cuda = device.type == "cuda"
    return {
        "package": __version__, "commit": git.stdout.strip() or None, "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "start": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def write(path: Path, content: bytes) -> None:
    """Whole or not at all: to a temporary name, synced, renamed. Raises SidaeError when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with suppress(OSError):
            temporary.unlink()
        raise SidaeError(f"{path} could not be written ({e.strerror}); free space or choose another folder.") from e


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """safetensors wants plain contiguous tensors, so channels_last is undone here and restored by `copy_` on load."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write(path, save(plain, {"sidae": json.dumps(meta)}))


def compile_mode(config: RunConfig, device: torch.device, steps: int) -> str:
    """`eager`, `views` (augmentation compiled) or `step` (forward pass and loss too): a function of the run and the
    device type, so that a resumed run decides the same. Compiling costs seconds for the views and about a minute for
    the step, which only a long run repays (benchmarks/README.md)."""
    if device.type == "cuda":
        return "step" if steps >= 1000 else "eager"
    return "views" if steps >= 200 and shutil.which(os.environ.get("CXX", "g++")) else "eager"


@lru_cache
def _view(name: str, n: int, compiled: bool) -> Callable[..., Tensor]:
    """uint8 images, their parameters, mean, std -> one normalised view; compiled once for every run of a process."""
    ops = (augment.VIEWS[name].first, augment.VIEWS[name].second)[n]
    apply = lambda images, params, mean, std: augment.apply(ops, images, params, mean, std)  # noqa: E731
    return torch.compile(apply, fullgraph=True, dynamic=False) if compiled and ops else apply


class _Stop:
    """Turns SIGINT and SIGTERM into a request that the loop honours after the step; a second one is not held back."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, self.before[number])

    @contextmanager
    def armed(self):
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may set handlers
            return
        self.before = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in self.before.items():
                signal.signal(s, handler)


class Run:
    """One run in memory: the method, its optimiser, the epoch's accumulators and how far it has come."""

    def __init__(self, config: RunConfig, images: Images, device: torch.device) -> None:
        if config.stats == "half":
            images = replace(images, mean=(0.5,) * config.channels, std=(0.5,) * config.channels)
        self.config, self.data, self.device = config, images, device
        self.pairs = training_pairs(config, images)
        keep = methods.METHODS[config.method].labels
        self.bounds = batches(len(self.pairs), config.batch, keep)
        self.steps = len(self.bounds) * config.epochs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.method = methods.build(config, len(images.classes))
        self.method.to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.method.param_groups(config.lr), lr=config.lr, momentum=config.momentum,
                                         fused=True)  # fmt: skip
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (images.mean, images.std))
        self.w = torch.tensor(config.w, device=device)
        split = images.split(config.split)
        self.images, self.labels = split.images.to(device), None if split.labels is None else split.labels.to(device)
        self.paired = not bool((self.pairs[:, 0] == self.pairs[:, 1]).all())
        self.step, self.sums, self.history, self.seconds = 0, {}, [], 0.0
        self.set_mode(compile_mode(config, device, self.steps))

    def set_mode(self, mode: str) -> None:
        self.mode = mode
        self.view1, self.view2 = (_view(self.config.augment, n, mode == "views") for n in (0, 1))
        self.compiled = torch.compile(self.forward, fullgraph=True, dynamic=False) if mode == "step" else self.forward

    @torch.no_grad()
    def see(self, xi: Tensor, xj: Tensor, p1: Params, p2: Params, batch: dict[str, Tensor]) -> tuple[tuple, dict]:
        """uint8 images and parameters -> the two views and the batch, as methods expect them."""
        v1, v2 = self.view1(xi, p1, self.mean, self.std), self.view2(xj, p2, self.mean, self.std)
        x1 = (xi / 255 - self.mean) / self.std
        x2 = (xj / 255 - self.mean) / self.std if self.paired else x1
        batch = {k: (v / 255 - self.mean) / self.std if k == "xn" else v for k, v in batch.items()}
        batch = {**batch, "x1": x1, "x2": x2, "mean": self.mean, "std": self.std, "w": self.w}
        return tuple(v.contiguous(memory_format=torch.channels_last) for v in (v1, v2)), batch

    def forward(self, *samples: Any) -> tuple[dict, dict]:
        """What `see` takes -> the method's scalars, and the sums that z_std is made of."""
        views, batch = self.see(*samples)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            out = self.method.loss(views, batch)
        zn = F.normalize(out.pop("z").float(), dim=1)
        return out, {"z": zn.sum(0), "zz": zn.square().sum(0)}

    def draw(self, epoch: int) -> tuple[Tensor, Params, Params]:
        """The epoch's order of pairs and the parameters of both views: a function of (seed, epoch) on every device."""
        generator = torch.Generator().manual_seed(epoch_seed(self.config.seed, epoch))
        order, picked = torch.randperm(len(self.pairs), generator=generator), slice(None)
        if not self.config.redraw:  # parameters belong to a pair, whatever the epoch
            generator, picked = torch.Generator().manual_seed(epoch_seed(self.config.seed, -2)), order
        draws = augment.VIEWS[self.config.augment].draw(len(order), self.config.size, generator)
        return self.pairs[order].to(self.device), *({k: v[picked].to(self.device) for k, v in p.items()} for p in draws)

    def samples(self, drawn: tuple[Tensor, Params, Params], a: int, b: int) -> tuple:
        """Samples a to b of a drawn epoch, as `see` takes them."""
        (i, j, *n), (p1, p2) = drawn[0][a:b].unbind(1), ({k: v[a:b] for k, v in p.items()} for p in drawn[1:])
        xi = self.images[i]
        batch = {"i": i, "j": j} | ({} if self.labels is None else {"labels": self.labels[i]})
        if n:
            batch["xn"] = self.images[n[0]]
        return xi, self.images[j] if self.paired else xi, p1, p2, batch

    def gauges(self, drawn: tuple[Tensor, Params, Params], a: int, b: int) -> dict[str, float]:
        """The method's gauges on these samples; BatchNorm's statistics, which the look would move, are put back."""
        before = {k: v.clone() for k, v in self.method.named_buffers()}
        out = {k: v.item() for k, v in self.method.gauges(*self.see(*self.samples(drawn, a, b))).items()}
        for k, v in self.method.named_buffers():
            v.copy_(before[k])
        return out

    def advance(self, drawn: tuple[Tensor, Params, Params], a: int, b: int) -> None:
        """One optimiser step on samples a to b of a drawn epoch."""
        out, moments = self.compiled(*self.samples(drawn, a, b))
        self.optimizer.zero_grad()
        out["loss"].backward()
        lr = lr_at(self.step, self.steps, self.config.lr, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr if group["fixed"] else lr
        self.optimizer.step()
        self.step += 1
        self.method.after_step(self.step / self.steps)
        with torch.no_grad():
            for k, v in {**out, **moments, "n": out["loss"].new_tensor(1.0)}.items():
                v = v.detach().double() * (b - a if k in (*out, "n") else 1)
                self.sums[k] = self.sums[k] + v if k in self.sums else v

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the rest of the run depends on."""
        out = {f"method.{k}": v for k, v in self.method.state_dict().items()}
        for g, group in enumerate(self.optimizer.param_groups):
            for n, p in enumerate(group["params"]):
                for k, v in self.optimizer.state.get(p, {}).items():
                    if isinstance(v, Tensor):
                        out[f"optimizer.{g}.{n}.{k}"] = v
        return out | {f"sums.{k}": v for k, v in self.sums.items()}

    def meta(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "key": self.config.key(), "step": self.step, "mode": self.mode,
                "history": self.history, "seconds": self.seconds}  # fmt: skip

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises SidaeError when it is damaged or belongs to another config."""
        try:
            with safe_open(path, "pt") as f:
                meta = json.loads((f.metadata() or {})["sidae"])
                if meta["key"] != self.config.key():
                    raise SidaeError(f"{path} is the checkpoint of another config ({meta['key']}, not {self.config.key()}); "
                                     "move it away and the run starts anew.")  # fmt: skip
                tensors = {k: f.get_tensor(k) for k in f.keys()}
            own = {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")}
            self.method.load_state_dict(own)
            for name, v in tensors.items():
                if name.startswith("optimizer."):
                    _, g, n, k = name.split(".", 3)
                    p = self.optimizer.param_groups[int(g)]["params"][int(n)]
                    self.optimizer.state[p][k] = torch.empty_like(p).copy_(v) if v.shape == p.shape else v.to(p.device)
            self.sums = {k.removeprefix("sums."): v.to(self.device) for k, v in tensors.items() if k.startswith("sums.")}
            self.step = int(meta["step"])
            self.set_mode(str(meta["mode"]))
            self.history, self.seconds = list(meta["history"]), float(meta["seconds"])
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OSError, IndexError) as e:
            raise SidaeError(f"The checkpoint {path} is damaged ({type(e).__name__}); without it the run starts anew.") from e

    def save_backbone(self, folder: Path, epoch: int) -> None:
        tensors = dict(self.method.backbone.state_dict())
        if hasattr(self.method, "fc"):  # the supervised network's own classifier
            tensors |= {f"fc.{k}": v for k, v in self.method.fc.state_dict().items()}
        meta = {"config": self.config.to_dict(), "epoch": epoch, "mean": self.data.mean, "std": self.data.std}
        save_tensors(folder / f"backbone-e{epoch:03d}.safetensors", tensors, meta)


def pretrain(config: RunConfig, images: Images, folder: Path, *, device: torch.device, checkpoints: Iterable[int] = (),
             deadline: float | None = None) -> dict[str, Any]:  # fmt: skip
    """Train one run, or go on with it, and return its record (design: "Run record"); weights go to `folder`.

    checkpoints: epochs (0 to config.epochs) whose backbone is kept; the last always is.  deadline: `time.monotonic()`
    after which the run stops at a checkpoint.  Raises Stopped on a signal or the deadline, SidaeError when loss or
    weights are not finite.
    """
    run = Run(config, images, device)
    born = provenance(device)
    path = folder / "checkpoint.safetensors"
    if path.exists():
        run.restore(path)
    keep = {*checkpoints, config.epochs}
    if 0 in keep and run.step == 0:
        run.save_backbone(folder, 0)
    if run.steps:
        with _Stop().armed() as stop:
            _loop(run, path, keep, stop, deadline)
    return {
        "config": config.to_dict(), "key": config.key(), "data": {"name": images.name, "display": images.display},
        "epochs": run.history, "steps": run.steps, "images": sum(b - a for a, b in run.bounds) * config.epochs,
        "seconds": round(run.seconds, 3), "mode": run.mode, "provenance": born,
    }  # fmt: skip


def _loop(run: Run, path: Path, keep: set[int], stop: _Stop, deadline: float | None) -> None:
    config, device, per_epoch = run.config, run.device, len(run.bounds)
    sync = 1 if device.type == "cpu" else 50  # steps between looks at the loss: on a GPU a look waits for the queue
    saved, checkpointed = time.monotonic(), run.step
    bar = tqdm(total=run.steps, initial=run.step, unit="step", desc=f"{config.method} {config.key()[:6]}", leave=False,
               disable="TQDM_DISABLE" in os.environ or None, mininterval=0.5)  # fmt: skip

    def checkpoint() -> None:
        nonlocal saved, checkpointed
        save_tensors(path, run.state(), run.meta())
        saved, checkpointed = time.monotonic(), run.step

    for epoch in range(run.step // per_epoch, config.epochs):
        drawn = run.draw(epoch)
        for a, b in run.bounds[run.step % per_epoch :]:
            began = time.perf_counter()
            run.advance(drawn, a, b)
            if run.step % sync == 0 or run.step % per_epoch == 0:
                _finite(run, checkpointed)
            run.seconds += time.perf_counter() - began
            bar.update()
            if run.step % per_epoch == 0:
                gauges = run.gauges(drawn, a, b) if (epoch + 1) % max(1, config.epochs // 10) == 0 else {}
                _end_epoch(run, path.parent, keep, bar, gauges)
            late = deadline is not None and time.monotonic() > deadline
            if stop.signal or late or time.monotonic() - saved > CHECKPOINT_SECONDS:
                _finite(run, checkpointed)
                checkpoint()
            if (stop.signal or late) and run.step < run.steps:
                bar.close()
                why = "Time is up" if late else f"Stopped by {signal.Signals(stop.signal).name}"
                raise Stopped(f"{why}: {config.method} {config.key()} stands at step {run.step} of {run.steps}, saved in "
                              f"{path}; the same call goes on from there.")  # fmt: skip
    bar.close()


def _finite(run: Run, checkpointed: int) -> None:
    """A sum that is not finite tells of any step since it was last looked at; the weights are looked at per epoch."""
    per_epoch = len(run.bounds)
    at = f"epoch {(run.step - 1) // per_epoch + 1}, step {run.step}"
    last = f"the last good checkpoint is step {checkpointed}" if checkpointed else "there is no checkpoint yet"
    if bad := [k for k, v in run.sums.items() if not v.isfinite().all()]:
        raise SidaeError(f"{'loss' if 'loss' in bad else bad[0]} is not finite at {at} of {run.config.method} "
                         f"{run.config.key()}; {last}. Lower lr or check the data.")  # fmt: skip
    if run.step % per_epoch == 0:
        for name, p in run.method.named_parameters():
            if not p.isfinite().all():
                raise SidaeError(f"Weight {name} is not finite at {at} of {run.config.method} {run.config.key()}; {last}.")


def _end_epoch(run: Run, folder: Path, keep: set[int], bar: tqdm, gauges: dict[str, float]) -> None:
    """Turn the sums and gauges into the epoch's line of the record."""
    epoch, n = run.step // len(run.bounds), run.sums.pop("n")
    total, square = run.sums.pop("z"), run.sums.pop("zz")
    spread = networks.z_std(total, square, n).item()
    line = {"epoch": epoch} | {k: (v / n).item() for k, v in run.sums.items()} | {"z_std": spread} | gauges
    seconds = run.seconds - sum(h["seconds"] for h in run.history)
    line |= {"seconds": round(seconds, 4), "images_per_second": round(n.item() / seconds, 1)}
    if spread < 0.1 / math.sqrt(len(total)) and not run.method.labels:
        line["collapsed"] = True
        if not any(h.get("collapsed") for h in run.history):
            warnings.warn(f"{run.config.method} {run.config.key()} collapsed at epoch {epoch}: z_std {spread:.2g}, healthy is "
                          f"{1 / math.sqrt(len(total)):.2g}. Check stop-gradient, BatchNorm and lr.", stacklevel=2)  # fmt: skip
    run.history.append(line)
    run.sums = {}
    bar.set_postfix(loss=f"{line['loss']:.3f}", z_std=f"{spread:.3f}", images_s=f"{line['images_per_second']:.0f}")
    if epoch in keep:
        run.save_backbone(folder, epoch)
