"""Pre-training: one loop for every method, that can stop at any step and go on as if it had not."""

import base64
import hashlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from . import __version__, methods, networks, pairs, paths, threads
from .config import RunConfig, SidaeError
from .data import Images, subset
from .step import Drawn, Step

CHECKPOINT_SECONDS = 60.0
LISTENERS: list[Callable[[RunConfig, list[dict[str, Any]]], None]] = []  # called after every epoch with the history so far


class Stopped(SidaeError):
    """A run that was asked to stop, by a signal or a deadline, and left a checkpoint to go on from."""


class NotKept(SidaeError):
    """A backbone is asked for that an unfinished run did not keep on its way."""


class Damaged(SidaeError):
    """A file of the store that is not what was written under its name; `path` says which."""

    def __init__(self, sentence: str, path: Path = Path()) -> None:
        super().__init__(sentence)
        self.path = path


def device_of(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device that is there. Raises SidaeError otherwise."""
    if name not in ("auto", "cpu", "cuda"):
        raise SidaeError(f"Unknown device {name!r}; choose from auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise SidaeError("There is no CUDA device here; choose device cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def several_classes(labels: Tensor, which: str) -> None:
    """Raises SidaeError unless there are two classes at least: fitted on one, everything is that one."""
    if len(labels.unique()) < 2:
        raise SidaeError(f"The {which} are all of one class; at least two classes are needed.")


def training_pairs(config: RunConfig, images: Images, device: torch.device) -> tuple[Tensor, pairs.Pairs | None]:
    """(N + P, 2) int64 index pairs (i, j) into the split: view 1 comes from image i, view 2 from image j; or triples. First
    the method's own N, (i, i) for most, then the P semantic pairs, which are returned apart too (None where there are
    none)."""
    split = images.split(config.split)
    n = len(split.images)
    if methods.check(config).labels:
        if split.labels is None:
            raise SidaeError(f"{config.method} needs labels, and the {config.split} split of {images.name} has none.")
        i = subset(n, fraction=config.labels, count=config.label_count, seed=config.label_seed)
        several_classes(split.labels[i], f"{len(i)} labels chosen of {images.display}")
        if config.per_class:
            i = torch.cat([(split.labels == c).nonzero()[: config.per_class, 0] for c in split.labels.unique()])
    else:
        i = subset(n, count=config.pool, seed=config.pool_seed) if config.pool else torch.arange(n)
    if len(i) < config.batch and not methods.METHODS[config.method].labels and config.epochs:
        raise SidaeError(f"batch is {config.batch} but only {len(i)} images are there to train on; take a smaller one.")
    reads = methods.METHODS[config.method].reads
    if "queue" in reads and config.epochs and (config.queue % config.batch or 2 * config.queue > len(i)):
        raise SidaeError(f"queue must be a multiple of batch ({config.batch}) and at most half of the {len(i)} images, or it "
                         f"holds earlier views of the batch's own, got {config.queue}.")  # fmt: skip
    own = methods.METHODS[config.method].pairs(config, i, split.labels)
    if config.pairs == "none":
        return own, None
    extra = pairs.find(config, images, i, device)
    return torch.cat([own, torch.stack([extra.i, extra.j], 1)]), extra


def _processor() -> str:
    """The processor's name where Linux tells it, else its kind."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def _commit() -> str | None:
    """Of the code that this process was started with, as far as git knows; None where there is none, or none may be run."""
    with suppress(OSError):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=paths.ROOT, capture_output=True, text=True)
        return git.stdout.strip() or None
    return None


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and with what a record was made. The commit is None outside of a checkout, and where there is no git."""
    cuda = device.type == "cuda"
    return {
        "package": __version__, "commit": _commit(), "torch": str(torch.__version__),
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


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def packed(tensors: dict[str, Tensor], meta: dict[str, Any]) -> bytes:
    """safetensors wants plain contiguous tensors, so channels_last is undone here and restored by `copy_` on load."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    return save(plain, {"sidae": json.dumps(meta)})


class _Stop:
    """Turns SIGINT and SIGTERM into a request that the loop honours after the step; a second one is not held back."""

    before: dict[int, Any] = {}
    signal: int | None = None  # of the class: a request to every run of the process, which a grid's worker makes

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

    @contextmanager
    def paused(self):
        """Signals do what they did before: right after a checkpoint there is nothing to save."""
        for s, handler in self.before.items():
            signal.signal(s, handler)
        try:
            yield
        finally:
            for s in self.before:
                signal.signal(s, self)


def backbone_name(epoch: int) -> str:
    return f"backbone-e{epoch:03d}.safetensors"


def always_kept(config: RunConfig) -> set[int]:
    """Epochs whose backbone is kept whatever is asked for: the last; of the paper's length, without labels, also 0 and every
    25th, since such a run is not begun again for one of them."""
    long = config.epochs >= 200 and not methods.METHODS[config.method].labels
    return {config.epochs, *(range(0, config.epochs, 25) if long else ())}


class Run(Step):
    """One run in memory: what its steps read and write, and what is written of it."""

    def __init__(self, config: RunConfig, images: Images, device: torch.device) -> None:
        pairs, self.extra = training_pairs(config, images, device)
        super().__init__(config, images, device, pairs, len(pairs) - (0 if self.extra is None else len(self.extra.i)))
        self.history, self.seconds = list[dict[str, Any]](), 0.0
        self.files: dict[str, str] = {}  # name -> sha256 of each backbone kept so far
        self.pictures: dict[str, str] = {}  # epoch -> what the decoder makes of eight images, as `strip` writes it
        self.segments: list[dict[str, Any]] = []  # which machine made which steps
        few = subset(len(pairs), count=min(256, len(pairs)), seed=0)
        self.monitored = pairs[few, 0].to(device)  # the images that `monitor` looks at

    def _clean(self, rows: Tensor) -> Tensor:
        """Images as they are, normalised, as the network takes them."""
        return ((self.images[rows] / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def monitor(self) -> dict[str, float]:
        """Of at most 256 training images as they are: the effective rank of their features, and where they have labels
        `knn`, percent whose nearest neighbour by cosine is of their class. It is looked at, never trained on."""
        x = self._clean(self.monitored)
        self.method.eval()
        h = self.method.features(x).float()
        self.method.train()
        if not h.isfinite().all():
            raise SidaeError(f"The features of {self.config.method} {self.config.key()} are not finite at step {self.step}. "
                             "Lower lr, enlarge batch or check the data.")  # fmt: skip
        out = {"feature_rank": networks.effective_rank(h).item()}
        if self.labels is not None:
            h, y = F.normalize(h, dim=1), self.labels[self.monitored]
            out["knn"] = 100 * (y[(h @ h.T).fill_diagonal_(-2).argmax(1)] == y).double().mean().item()
        return out

    def gauges(self, drawn: Drawn, a: int, b: int) -> dict[str, float]:
        """The method's gauges on these samples; BatchNorm's statistics, which the look would move, are put back."""
        before = {k: v.clone() for k, v in self.method.named_buffers()}
        out = {k: v.item() for k, v in self.method.gauges(*self.see(*self.samples(drawn, slice(a, b)))).items()}
        for k, v in self.method.named_buffers():
            v.copy_(before[k])
        return out

    @torch.no_grad()
    def strip(self) -> str:
        """What the decoder makes of the first eight monitored images, side by side: a PNG in base64; empty without one."""
        if getattr(self.method, "decoder", None) is None:
            return ""
        x = self._clean(self.monitored[:8])
        self.method.eval()
        y = self.method.decoder(self.method.embed(x)).float()
        self.method.train()
        return strip(y * self.std + self.mean if self.config.target == "standardised" else y)

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
        if self.segments:
            self.segments[-1]["steps"][1] = self.step
        return {"config": self.config.to_dict(), "key": self.config.key(), "step": self.step, "mode": self.mode,
                "history": self.history, "seconds": self.seconds, "files": self.files, "pictures": self.pictures,
                "segments": self.segments}  # fmt: skip

    def save(self, path: Path) -> None:
        """A checkpoint, sealed: its metadata hold the sha256 of the same file without that seal."""
        tensors, meta = self.state(), self.meta()
        write(path, packed(tensors, meta | {"seal": sha256(packed(tensors, meta))}))

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises Damaged when it is not whole or belongs to another config."""
        try:
            with safe_open(path, "pt") as f:
                meta = json.loads((f.metadata() or {})["sidae"])
                if meta["key"] != self.config.key():
                    raise Damaged(f"{path} is the checkpoint of another config ({meta['key']}, not {self.config.key()}); "
                                  "without it the run starts anew.", path)  # fmt: skip
                tensors = {k: f.get_tensor(k) for k in f.keys()}
            if meta.pop("seal") != sha256(packed(tensors, meta)):
                raise ValueError
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
            self.history, self.seconds, self.files = list(meta["history"]), float(meta["seconds"]), dict(meta["files"])
            self.pictures, self.segments = dict(meta.get("pictures", {})), list(meta.get("segments", []))  # since 0.2
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OSError, IndexError) as e:
            sentence = f"The checkpoint {path} is damaged ({type(e).__name__}); without it the run starts anew."
            raise Damaged(sentence, path) from e

    def kept(self, folder: Path, epoch: int) -> bool:
        """Whether the backbone of an epoch is there, whole, and this run's own."""
        path = folder / backbone_name(epoch)
        return path.exists() and sha256(path.read_bytes()) == self.files.get(path.name)

    def save_backbone(self, folder: Path, epoch: int) -> None:
        tensors = dict(self.method.backbone.state_dict())
        for name in ("fc", "projector"):  # the supervised network's own classifier; the head that pairs are mined with
            if hasattr(self.method, name):
                tensors |= {f"{name}.{k}": v for k, v in getattr(self.method, name).state_dict().items()}
        meta = {"config": self.config.to_dict(), "epoch": epoch, "mean": self.data.mean, "std": self.data.std}
        content = packed(tensors, meta)
        write(folder / backbone_name(epoch), content)
        self.files[backbone_name(epoch)] = sha256(content)
        if picture := self.strip():
            self.pictures[str(epoch)] = picture


def strip(images: Tensor) -> str:
    """Images (N, C, S, S) in [0, 1] side by side, as a PNG in base64."""
    pixels = (255 * images.clamp(0, 1)).round().byte().cpu()
    rows = pixels.permute(2, 0, 3, 1).flatten(1, 2).numpy()  # (S, N S, C)
    file = io.BytesIO()
    Image.fromarray(rows if rows.shape[2] == 3 else rows[..., 0]).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def unstrip(text: str) -> Tensor:
    """What `strip` was given, as pixels: (N, C, S, S) uint8."""
    rows = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(text)))))  # (S, N S) or (S, N S, C)
    S, C = len(rows), rows.shape[2] if rows.ndim == 3 else 1
    return rows.reshape(S, -1, S, C).permute(1, 3, 0, 2)


def cost(config: RunConfig, images: Images) -> dict[str, float]:
    """What one step of a run takes: `parameters` trained, `mib` that it keeps for its way back, weights left out, and `gflop`
    per image, the multiplications and additions of its convolutions and matrix products, forward and backward, views too."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    run, kept = Run(config, images, torch.device("cpu")), {}
    run.set_mode("eager")
    weights = [p for p in run.method.parameters() if p.requires_grad]
    own = {p.untyped_storage().data_ptr() for p in run.method.parameters()}

    def keep(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        kept.update({} if s.data_ptr() in own else {s.data_ptr(): s.nbytes()})
        return t

    batch = slice(*run.bounds[0])
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out, _ = run.forward(*run.samples(run.draw(0), batch))
        out["loss"].backward()
    return {"parameters": sum(p.numel() for p in weights), "mib": round(sum(kept.values()) / 2**20, 1),
            "gflop": round(counter.get_total_flops() / 1e9 / (batch.stop - batch.start), 5)}


def goes_on(segments: list[dict[str, Any]], device: torch.device, name: str) -> bool:
    """Whether a device takes over a run that these segments made. A GPU begins at epoch 0 unless they are its own kind's:
    another's hours are its minutes, and its records are then of one machine."""
    return device.type != "cuda" or all(s["device"] == name for s in segments)


Passed = Callable[[int, dict[str, str]], None]  # an epoch, and the sha256 of each backbone kept up to it, by file name


def pretrain(config: RunConfig, images: Images, folder: Path, *, device: torch.device, checkpoints: Iterable[int] = (),
             also: Iterable[int] = (), deadline: float | None = None, until: int | None = None,
             passed: Passed = lambda epoch, files: None) -> dict[str, Any] | None:  # fmt: skip
    """Train one run, or go on with it, and return its record (design: "Run record"); weights go to `folder`.

    checkpoints: epochs (0 to config.epochs) whose backbone is kept, beside those that `always_kept` names.  also: others,
    as far as they are still to come.  deadline: `time.monotonic()` after which the run stops at a checkpoint.  until: an
    epoch at whose end it stops at a checkpoint and returns None.  passed: is called where the run begins or goes on, and at
    every kept epoch before the last when its checkpoint is saved.

    Raises Stopped on a signal or the deadline, NotKept for a checkpoint that is past one of `checkpoints` without having
    kept it, Damaged for one that cannot be gone on from, SidaeError when loss or weights are not finite.
    """
    run = Run(config, images, device)
    born = provenance(device)
    path = folder / "checkpoint.safetensors"
    asked = sorted(checkpoints)
    keep = {*asked, *also, *always_kept(config)}
    untrained = run.monitor() if run.steps else {}
    if path.exists():
        run.restore(path)
        if not goes_on(run.segments, device, born["device"]):
            run = Run(config, images, device)
    per_epoch = max(1, len(run.bounds))
    at = run.step // per_epoch
    if run.step == at * per_epoch and at in keep and not run.kept(folder, at):
        run.save_backbone(folder, at)
    if lost := [e for e in asked if e <= at and not run.kept(folder, e)]:
        own = ", ".join(str(e) for e in range(at + 1) if run.kept(folder, e)) or "none"
        raise NotKept(f"{config.method} {config.key()} stands at epoch {at} of {config.epochs} and did not keep epoch "
                      f"{', '.join(map(str, lost))} on its way (kept: {own}). An unfinished run is not begun again for it: "
                      "ask for an epoch that is kept, or let the run finish first.")  # fmt: skip
    run.segments.append({k: born[k] for k in ("commit", "torch", "device", "threads", "start")} | {"steps": [run.step] * 2})
    if run.step < run.steps:
        passed(at, run.files)
    if run.steps:
        with _Stop().armed() as stop:
            _loop(run, path, keep, stop, deadline, until, passed)
    if run.step < run.steps:
        return None
    more: dict[str, Any] = {}
    if run.pictures:
        few = images.split(config.split).images[run.monitored[:8].cpu()]
        more["pictures"] = {"clean": strip(few / 255)} | run.pictures
    if run.extra is not None:
        more["pairs"] = pairs.report(run.extra, images.split(config.split).labels)
    return {
        "config": config.to_dict(), "key": config.key(), "data": {"name": images.name, "display": images.display},
        "untrained": untrained, "epochs": run.history,
        "steps": run.steps, "images": sum(b - a for a, b in run.bounds) * config.epochs,
        "seconds": round(run.seconds, 3), "mode": run.mode, "files": dict(sorted(run.files.items())),
        "provenance": born | {"segments": run.meta()["segments"]}, **more,
    }  # fmt: skip


def _loop(run: Run, path: Path, keep: set[int], stop: _Stop, deadline: float | None, until: int | None = None,
          passed: Passed = lambda epoch, files: None) -> None:  # fmt: skip
    config, device, per_epoch = run.config, run.device, len(run.bounds)
    end = config.epochs if until is None else min(until, config.epochs)
    saved, checkpointed = time.monotonic(), run.step
    bar = tqdm(total=run.steps, initial=run.step, unit="step", desc=f"{config.method} {config.key()[:6]}", leave=False,
               disable="TQDM_DISABLE" in os.environ or None, mininterval=0.5)  # fmt: skip

    def checkpoint() -> None:
        nonlocal saved, checkpointed
        run.save(path)
        saved, checkpointed = time.monotonic(), run.step

    ahead = ThreadPoolExecutor(1)  # a GPU need not wait for the next epoch's draft; on a CPU it would take a core from it
    coming: Future | None = None
    for epoch in range(run.step // per_epoch, end):
        drawn = run.put(coming.result() if coming else run.draft(epoch))
        coming = ahead.submit(run.draft, epoch + 1) if device.type == "cuda" and epoch + 1 < end else None
        for a, b in run.bounds[run.step % per_epoch :]:
            if run.mode == "eager":  # what is compiled is compiled for a number of threads
                threads.fit()
            began = time.perf_counter()
            run.advance(drawn, a, b)
            if device.type == "cpu" or run.step % per_epoch == 0:  # a look: a GPU is not waited for on the way
                _finite(run, checkpointed)
            run.seconds += time.perf_counter() - began
            bar.update()
            if run.step % per_epoch == 0:
                gauges = run.gauges(drawn, a, b) if (epoch + 1) % max(1, config.epochs // 10) == 0 else {}
                _end_epoch(run, path.parent, keep, bar, gauges)
            late = deadline is not None and time.monotonic() > deadline
            pause = run.step == (epoch + 1) * per_epoch < run.steps and epoch + 1 in keep | {end}
            told = stop.signal  # looked at once: a signal that comes after this look finds nothing saved, and waits a step
            if told or late or pause or time.monotonic() - saved > CHECKPOINT_SECONDS:
                _finite(run, checkpointed)
                checkpoint()
            if told or late and run.step < run.steps:
                bar.close()
                why = "Time is up" if late else f"Stopped by {signal.Signals(told).name}"
                raise Stopped(f"{why}: {config.method} {config.key()} stands at step {run.step} of {run.steps}, saved in "
                              f"{path}; the same call goes on from there.")  # fmt: skip
            if pause:
                with stop.paused():
                    passed(epoch + 1, run.files)
    bar.close()


def _finite(run: Run, checkpointed: int) -> None:
    """A sum that is not finite tells of any step since it was last looked at; the weights are looked at per epoch."""
    per_epoch = len(run.bounds)
    at = f"epoch {(run.step - 1) // per_epoch + 1}, step {run.step}"
    last = f"the last good checkpoint is step {checkpointed}" if checkpointed else "there is no checkpoint yet"
    if bad := _infinite(run.sums):
        raise SidaeError(f"{'loss' if 'loss' in bad else bad[0]} is not finite at {at} of {run.config.method} "
                         f"{run.config.key()}; {last}. Lower lr or check the data.")  # fmt: skip
    if run.step % per_epoch == 0 and (bad := _infinite(dict(run.method.named_parameters()))):
        raise SidaeError(f"Weight {bad[0]} is not finite at {at} of {run.config.method} {run.config.key()}; {last}.")


def _infinite(named: dict[str, Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinity, by one look at the device."""
    finite = torch.stack([v.isfinite().all() for v in named.values()]).tolist()
    return [name for name, ok in zip(named, finite) if not ok]


def _end_epoch(run: Run, folder: Path, keep: set[int], bar: tqdm, gauges: dict[str, float]) -> None:
    """Turn the sums and gauges into the epoch's line of the record. Seconds and images per second are those since the last
    line that has them."""
    epoch, sums = run.step // len(run.bounds), dict(run.sums)
    n, total, square = (sums.pop(k) for k in ("n", "z", "zz"))
    spread = networks.z_std(total, square, n).item()
    line = {"epoch": epoch} | {k: (v / n).item() for k, v in sums.items()} | {"z_std": spread} | gauges
    ends, past = epoch in (1, run.config.epochs), [h for h in run.history if "seconds" in h]
    seconds = run.seconds - sum(h["seconds"] for h in past)
    rate = n.item() * (epoch - (past[-1]["epoch"] if past else 0)) / seconds
    if ends or epoch % math.ceil(run.config.epochs / 5) == 0:  # a few times, to cost nothing
        line |= {"rank": networks.effective_rank(run.rows).item()} | run.monitor()
    if run.config.epochs < 100 or ends or epoch % 5 == 0:  # of a long run every fifth time, for room
        # as the norms: of the last step
        line["lr"] = float(next(g["lr"] for g in run.optimizer.param_groups if not g["fixed"]))
        for name, part in run.method.named_children():
            if grads := [p.grad for p in part.parameters() if p.grad is not None]:
                line[f"grad_{name}"] = torch.nn.utils.get_total_norm(grads).item()
        line |= {"seconds": round(seconds, 4), "images_per_second": round(rate, 1)}
    if spread < 0.1 / math.sqrt(len(total)) and not run.method.labels:
        line["collapsed"] = True
        if not any(h.get("collapsed") for h in run.history):
            warnings.warn(f"{run.config.method} {run.config.key()} collapsed at epoch {epoch}: z_std {spread:.2g}, healthy is "
                          f"{1 / math.sqrt(len(total)):.2g}. Check stop-gradient, BatchNorm and lr.", stacklevel=2)  # fmt: skip
    # seven significant digits: those of a float32
    run.history.append({k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in line.items()})
    for v in run.sums.values():
        v.zero_()  # where they are: a graph writes to them
    for listener in LISTENERS:
        listener(run.config, run.history)
    bar.set_postfix(loss=f"{line['loss']:.3f}", z_std=f"{spread:.3f}", images_s=f"{rate:.0f}")
    if epoch in keep:
        run.save_backbone(folder, epoch)
