"""One optimiser step of any method, from samples to weights; on a GPU all of it is one launch."""

import gc
import math
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from . import augment, methods
from .augment import Params
from .config import RunConfig, epoch_seed
from .data import Images

_SEEDING, _CAPTURING = threading.Lock(), threading.Lock()
# An epoch: (n, 2 or 3) index pairs in their order, and the parameters of each view.
Drawn = tuple[Tensor, *tuple[Params, ...]]


def lr_at(step: int, steps: int, lr: float, schedule: str = "cosine", warmup: float = 0.0) -> float:
    """Learning rate of step 0 to steps - 1, with a linear warm-up.

    cosine: from lr towards 0 (Sec. 4.1).  steps: a fifth from 5/6 on, of that a fifth from 14/15 on (AMDIM).
    """
    lr *= min(1.0, (step + 1) / (warmup * steps)) if warmup else 1.0
    if schedule == "steps":
        return lr * 0.2 ** ((6 * step >= 5 * steps) + (15 * step >= 14 * steps))
    return lr if schedule == "constant" else 0.5 * lr * (1 + math.cos(math.pi * step / steps))


def batches(n: int, batch: int, keep_last: bool) -> list[tuple[int, int]]:
    """Bounds of the batches of n samples. A kept tail of one joins the last batch: BatchNorm needs two."""
    bounds = list(range(0, n + 1, batch))
    if keep_last and bounds[-1] < n:
        if n - bounds[-1] == 1 and len(bounds) > 1:
            bounds.pop()
        bounds.append(n)
    return list(zip(bounds, bounds[1:]))


@contextmanager
def seeded(seed: int):
    """Seeds torch's global generator, which draws initial weights and which the threads of a worker share."""
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def compile_mode(device: torch.device, steps: int) -> str:
    """`eager`, `views` (augmentation compiled) or `step` (forward pass and loss too). `... graph`: the whole
    optimiser step is one CUDA graph as well.

    It depends on length and device type alone, so that a resumed run decides the same. Compiling takes
    seconds for the views and about a minute for the step: a long run repays it (benchmarks/README.md).
    """
    if device.type == "cuda":
        return "views graph" if steps >= 1000 else "eager"
    return "views" if steps >= 200 and shutil.which(os.environ.get("CXX", "g++")) else "eager"


def after(mode: str) -> str:
    """The mode that is taken where this one fails: a graph, else the compiled step, else eager."""
    return "step" if mode.endswith(" graph") and mode != "eager graph" else "eager"


def _unlimited() -> None:
    """Lifts torch's limit of eight variants of a function: a grid has more. It holds for one context,
    and each task of a worker has its own."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 2**20


def compiled(function: Callable) -> Callable:
    """`torch.compile` for static shapes."""
    _unlimited()
    return torch.compile(function, fullgraph=True, dynamic=False)


@lru_cache
def _view(name: str, n: int, fast: bool) -> Callable[..., Tensor]:
    """(images, parameters, mean, std) -> one view as `augment.apply` makes it; compiled once for all runs."""
    ops = (augment.VIEWS[name].first, augment.VIEWS[name].second)[n]
    apply = lambda images, params, mean, std: augment.apply(ops, images, params, mean, std)  # noqa: E731
    return compiled(apply) if fast and ops else apply


class Captured:
    """Calls a function without arguments; on a GPU its kernels are captured once and replayed by one launch.

    The function reads and writes tensors that stay where they are, and asks no value of the device. Its first
    calls on a GPU run as they are, since libraries choose kernels and make workspaces then. Where it cannot
    be captured, one warning says why, `failed` is set, and it runs as it is. So it always does on a CPU.
    """

    WARM = 3

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self.function, self.calls, self.failed = function, 0, False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.aside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self) -> None:
        self.calls += 1
        if self.aside is None or self.failed:
            self.function()
        elif self.calls <= self.WARM:
            here = torch.cuda.current_stream()
            self.aside.wait_stream(here)
            with torch.cuda.stream(self.aside):  # as in the capture
                self.function()
            here.wait_stream(self.aside)
        elif self.graph is None and not self._capture():
            self.function()
        else:
            self.graph.replay()

    def _capture(self) -> bool:
        """Whether the function's kernels are in a graph now; capturing runs none of them."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        with _CAPTURING:
            gc.collect()
            gc.disable()  # a graph of an earlier run that is destroyed meanwhile would end the capture
            try:  # thread_local: another thread pins memory meanwhile; torch's own stream is of one device
                with torch.cuda.graph(graph, stream=self.aside, capture_error_mode="thread_local"):
                    self.function()
                self.graph = graph
            except RuntimeError as e:
                self.failed, cause = True, e
                torch.cuda.set_stream(here)  # which torch 2.11 does not
                while isinstance(cause.__context__, RuntimeError):  # the first of them says why
                    cause = cause.__context__
                why = str(cause).splitlines()[0]
                warnings.warn(f"No CUDA graph ({why}); the step is taken without one.", stacklevel=3)
            finally:
                gc.enable()
        return not self.failed


class Step:
    """A method with its optimiser and its data, on one device, and the step that all of them take together.

    A step reads samples from an epoch that `draw` made, its learning rate, and what its method knows ahead:
    Python numbers, or for a CUDA graph tensors that stay where they are and are filled before the launch.
    """

    def __init__(self, config: RunConfig, images: Images, device: torch.device, pairs: Tensor, n: int):
        """pairs: (N, 2 or 3) int64 indices into the split, the method's own n first; an epoch takes n."""
        if config.stats != "data":
            mean, std = {"half": (0.5, 0.5), "none": (0.0, 1.0)}[config.stats]
            images = replace(images, mean=(mean,) * config.channels, std=(std,) * config.channels)
        self.config, self.data, self.device, self.pairs, self.n = config, images, device, pairs, n
        self.bounds = batches(n, config.batch, keep_last=methods.METHODS[config.method].labels)
        self.steps = len(self.bounds) * config.epochs
        with seeded(config.seed):
            self.method = methods.build(config, len(images.classes))
        self.method.to(device, memory_format=torch.channels_last).train()
        i, j = pairs[n:, :2].to(device).unbind(1)
        self.method.partners = torch.cat([(i << 32) + j, (j << 32) + i]).sort().values
        groups, c = self.method.param_groups(config.lr), config
        self.optimizer: torch.optim.Optimizer
        if c.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, lr=c.lr, momentum=c.momentum, fused=True)
        else:
            self.optimizer = torch.optim.Adam(groups, lr=c.lr, betas=(c.momentum, c.beta2), fused=True,
                                              capturable=device.type == "cuda")  # fmt: skip
        self.mean = torch.tensor(images.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(images.std, device=device).view(-1, 1, 1)
        split = images.split(config.split)
        self.images = split.images.to(device)
        self.labels = None if split.labels is None else split.labels.to(device)
        self.paired = not bool((pairs[:, 0] == pairs[:, 1]).all())
        self.support = config.support if "support" in self.method.reads else 0
        self.step, self.sums = 0, dict[str, Tensor]()
        # of a graph, whose tensors stay where they are:
        self.fixed: Drawn | None = None  # an epoch's samples
        self.set_mode(compile_mode(device, self.steps))

    def set_mode(self, mode: str) -> None:
        """One of the modes that `compile_mode` names."""
        self.mode = mode
        _unlimited()  # the views may have been compiled in another task
        first, second = (_view(self.config.augment, n, mode.startswith("views")) for n in (0, 1))
        self.views = first, second, *[first] * self.support
        self.compiled = compiled(self.forward) if mode.startswith("step") else self.forward
        if self.device.type == "cuda":  # the first steps try which kernels are the fastest
            torch.backends.cudnn.benchmark = mode.endswith("graph")

    # --- an epoch's samples

    def draft(self, epoch: int) -> Drawn:
        """The epoch's order of pairs and the parameters of its views, on the CPU, from (seed, epoch) alone.

        With P semantic pairs an epoch is N of the N + P pairs, so that it has the steps and rates of a run
        without them. A weight below 1 draws each semantic pair with that probability: SePP-ID's eq. 2 in
        expectation, for every loss.
        """
        c, generator = self.config, torch.Generator().manual_seed(epoch_seed(self.config.seed, epoch))
        order = torch.randperm(len(self.pairs), generator=generator)
        if c.pair_weight < 1:
            order = order[(order < self.n) | (torch.rand(len(order), generator=generator) < c.pair_weight)]
        order = order[: self.n]
        drawn, picked = len(order), slice(None)
        if not c.redraw:  # parameters belong to a pair, whatever the epoch
            drawn, picked = len(self.pairs), order
            generator.manual_seed(epoch_seed(c.seed, -2))
        params = augment.VIEWS[c.augment].draw(drawn, c.size, generator, self.support)
        return tree_map(self._pinned, (self.pairs[order], *tree_map(lambda t: t[picked], params)))

    def _pinned(self, t: Tensor) -> Tensor:
        """In memory from which a GPU fetches it while others work; on a CPU as it is."""
        return t.pin_memory() if self.device.type == "cuda" else t

    def put(self, drafted: Drawn) -> Drawn:
        """A drafted epoch on the run's device; for a graph, in the tensors that it reads."""
        if not self.mode.endswith(" graph"):
            return tree_map(lambda t: t.to(self.device, non_blocking=True), drafted)
        if self.fixed is None:
            self.fixed = tree_map(lambda t: torch.empty_like(t, device=self.device), drafted)
            self.at, self.launch = torch.tensor(0, device=self.device), Captured(self._next, self.device)
            self.batch = torch.arange(self.config.batch, device=self.device)
            self.held = {name: torch.as_tensor(value, dtype=torch.float if name == "lr" else torch.double)
                         .to(self.device) for name, value in self.known(0).items()}  # fmt: skip
        tree_map(lambda own, new: own.copy_(new, non_blocking=True), self.fixed, drafted)
        return self.fixed

    def draw(self, epoch: int) -> Drawn:
        """`draft` on the run's device."""
        return self.put(self.draft(epoch))

    def samples(self, drawn: Drawn, rows: slice | Tensor) -> tuple:
        """These samples of a drawn epoch, as `see` takes them."""
        chosen, *params = tree_map(lambda t: t[rows], drawn)
        i, j, *negative = chosen.unbind(1)
        xi = self.images[i]
        batch = {"i": i, "j": j} | ({} if self.labels is None else {"labels": self.labels[i]})
        if negative:
            batch["xn"] = self.images[negative[0]]
        return xi, self.images[j] if self.paired else xi, tuple(params), batch

    # --- forward

    def clean(self, images: Tensor) -> Tensor:
        """uint8 images, normalised."""
        return (images / 255 - self.mean) / self.std

    @torch.no_grad()
    def see(self, xi: Tensor, xj: Tensor, params: tuple, batch: dict[str, Tensor]) -> tuple[tuple, dict]:
        """uint8 images and parameters -> the views and the batch, as methods expect them."""
        sources = (xi, xj, *[xi] * self.support)
        views = [v(x, p, self.mean, self.std) for v, x, p in zip(self.views, sources, params, strict=True)]
        x1 = self.clean(xi)
        x2 = self.clean(xj) if self.paired else x1
        batch = batch | {"x1": x1, "x2": x2, "mean": self.mean, "std": self.std}
        if "xn" in batch:
            batch["xn"] = self.clean(batch["xn"])
        return tuple(v.contiguous(memory_format=torch.channels_last) for v in views), batch

    def forward(self, *samples: Any) -> tuple[dict, dict]:
        """What `see` takes -> the method's scalars, and the sums that z_std is made of."""
        views, batch = self.see(*samples)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            out = self.method.loss(views, batch)
        zn = F.normalize(out.pop("z").float(), dim=1)
        return out, {"z": zn.sum(0), "zz": zn.square().sum(0), "rows": zn[:256]}

    def _loaded(self, *given: Any) -> tuple[dict, dict]:
        """The compiled forward pass. A cached file that a killed compiler left broken is made again. What
        cannot be compiled is run as it is."""
        while True:
            try:
                return self.compiled(*given)
            except torch._dynamo.exc.TorchDynamoException as e:
                cause = getattr(e, "inner_exception", e)
                if (broken := getattr(cause, "path", None)) and Path(broken).exists():
                    Path(broken).unlink()
                    continue
                if self.mode.startswith("eager"):
                    raise
                why = f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"
                warnings.warn(f"Mode {self.mode} cannot be compiled ({why}); the step is taken as it is.",
                              stacklevel=2)  # fmt: skip
                self.set_mode("eager graph" if self.mode.endswith(" graph") else "eager")

    # --- the step

    def known(self, step: int) -> dict[str, float | Tensor]:
        """The learning rate of step 0, 1, ... and what the method knows ahead of it."""
        c = self.config
        lr = lr_at(step, self.steps, c.lr, c.schedule, c.warmup)
        return {"lr": lr, **self.method.ahead(step + 1, self.steps)}

    def advance(self, drawn: Drawn, a: int, b: int) -> None:
        """One optimiser step on samples a to b of a drawn epoch."""
        if self.mode.endswith(" graph") and b - a == self.config.batch:
            if drawn is not self.fixed:
                self.put(drawn)
            self.at.fill_(a // self.config.batch)
            for name, value in self.known(self.step).items():  # no copy waits for the device
                if isinstance(value, Tensor):
                    self.held[name].copy_(self._pinned(value.double()), non_blocking=True)
                else:
                    self.held[name].fill_(value)
            self.launch()
            if self.launch.failed:
                self.set_mode(after(self.mode))
        else:
            self._take(self.samples(drawn, slice(a, b)), **self.known(self.step))
        self.step += 1

    def _next(self) -> None:
        """The step at the place `at` of its epoch: a fixed sequence of kernels on fixed tensors."""
        rows = self.at * self.config.batch + self.batch
        self._take(self.samples(self.fixed, rows), **self.held)

    def _take(self, samples: tuple, lr: float | Tensor, **known: float | Tensor) -> None:
        """Loss, gradient, optimiser, the epoch's sums, what the method moves: asks no value of the device."""
        out, moments = self._loaded(*samples)
        self.rows = moments.pop("rows")
        self.optimizer.zero_grad()
        out["loss"].backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr if group["fixed"] else lr
        self.optimizer.step()
        with torch.no_grad():
            self._add({k: v.detach() for k, v in out.items()}, moments, len(samples[0]))
            self.method.after_step(**known)

    def _add(self, out: dict[str, Tensor], moments: dict[str, Tensor], n: int) -> None:
        """To the epoch's sums: scalars, times the n samples that they are means of, and z's moments."""
        scalars = torch.stack([*out.values(), torch.ones_like(out["loss"])]).double() * n
        new = dict(zip((*out, "n"), scalars)) | {k: v.double() for k, v in moments.items()}
        if self.sums:
            torch._foreach_add_([self.sums[k] for k in new], list(new.values()))
        else:
            self.sums = {k: v.clone() for k, v in new.items()}
