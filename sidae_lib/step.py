"""One optimiser step of any method: samples, views, loss, gradient, weights, and what a method moves after it. On a GPU all of
it is one launch."""

import gc
import math
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import augment, methods
from .augment import Params
from .config import RunConfig, epoch_seed
from .data import Images

_SEEDING, _CAPTURING = threading.Lock(), threading.Lock()
Drawn = tuple[Tensor, *tuple[Params, ...]]  # an epoch: (n, 2 or 3) index pairs in their order, and the parameters of each view


def lr_at(step: int, steps: int, lr: float, schedule: str = "cosine", warmup: float = 0.0) -> float:
    """Learning rate of step 0 to steps - 1: cosine decay from lr towards 0 per step (SidAE Sec. 4.1), or constant, or a
    fifth from 5/6 on and a fifth of that from 14/15 on (AMDIM's epochs 250 and 280 of 300), each times the warm-up."""
    lr *= min(1.0, (step + 1) / (warmup * steps)) if warmup else 1.0
    if schedule == "steps":
        return lr * 0.2 ** ((6 * step >= 5 * steps) + (15 * step >= 14 * steps))
    return lr if schedule == "constant" else 0.5 * lr * (1 + math.cos(math.pi * step / steps))


def batches(n: int, batch: int, keep_last: bool) -> list[tuple[int, int]]:
    """Bounds of the batches of n samples. A kept tail of one joins the batch before: BatchNorm needs two samples."""
    bounds = list(range(0, n + 1, batch))
    if keep_last and bounds[-1] < n:
        bounds = bounds[:-1] + [n] if n - bounds[-1] == 1 and len(bounds) > 1 else bounds + [n]
    return list(zip(bounds, bounds[1:]))


@contextmanager
def seeded(seed: int):
    """torch's global generator, which draws initial weights: seeded, and afterwards as it was. One thread at a time, since
    the threads of a worker share it."""
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def compile_mode(device: torch.device, steps: int) -> str:
    """`eager`, `views` (augmentation compiled) or `step` (forward pass and loss too), each also as `... graph`, one CUDA
    graph for the whole optimiser step: a function of the run's length and the device type, so that a resumed run decides the
    same. Compiling costs seconds for the views and about a minute for the step, which only a long run repays
    (benchmarks/README.md)."""
    if device.type == "cuda":
        return "views graph" if steps >= 1000 else "eager"
    return "views" if steps >= 200 and shutil.which(os.environ.get("CXX", "g++")) else "eager"


def after(mode: str) -> str:
    """The mode that is taken where this one fails: a graph, else the compiled step, else eager."""
    return "step" if mode.endswith(" graph") and mode != "eager graph" else "eager"


def _unlimited() -> None:
    """Lifts torch's limit of eight variants of one function, an error for whole graphs: a worker meets as many pipelines and
    shapes as its grid has. torch keeps it for a context alone, and each task of a worker has its own."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 2**20


def compiled(function: Callable) -> Callable:
    """`torch.compile` for static shapes."""
    _unlimited()
    return torch.compile(function, fullgraph=True, dynamic=False)


@lru_cache
def _view(name: str, n: int, fast: bool) -> Callable[..., Tensor]:
    """uint8 images, their parameters, mean, std -> one normalised view; compiled once for every run of a process."""
    ops = (augment.VIEWS[name].first, augment.VIEWS[name].second)[n]
    apply = lambda images, params, mean, std: augment.apply(ops, images, params, mean, std)  # noqa: E731
    return compiled(apply) if fast and ops else apply


@contextmanager
def _uncollected():
    """One capture at a time, without garbage collection: a graph of an earlier run that is destroyed meanwhile would end it."""
    with _CAPTURING:
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


class Captured:
    """Calls a function without arguments; on a GPU its kernels are captured once and replayed by a single launch.

    The function reads and writes tensors that stay where they are, and asks no value of the device. Its first calls on a GPU
    run as they are, since libraries choose kernels and make workspaces then. Where it cannot be captured one warning says
    why, `failed` is set, and every call runs as it is: nothing is lost. On a CPU it is always called as it is.
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
        elif self.calls <= self.WARM:  # on a stream of its own: what the first calls leave behind may not belong to another
            here = torch.cuda.current_stream()
            self.aside.wait_stream(here)
            with torch.cuda.stream(self.aside):
                self.function()
            here.wait_stream(self.aside)
        elif self.graph is None and not self._capture():
            self.function()
        else:
            self.graph.replay()

    def _capture(self) -> bool:
        """Whether the function's kernels are in a graph now; capturing runs none of them."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:  # thread_local: another thread pins memory meanwhile; the stream is its own, since torch's is of one device
            with _uncollected(), torch.cuda.graph(graph, stream=self.aside, capture_error_mode="thread_local"):
                self.function()
        except RuntimeError as e:
            self.failed, cause = True, e
            torch.cuda.set_stream(here)  # which torch 2.11 does not
            while isinstance(cause.__context__, RuntimeError):  # the first of them says why
                cause = cause.__context__
            warnings.warn(f"No CUDA graph ({str(cause).splitlines()[0]}); the step is taken without one.", stacklevel=2)
            return False
        self.graph = graph
        return True


class Step:
    """A method with its optimiser and its data, on one device, and the step that all of them take together.

    Beside the weights a step reads an epoch as `draw` gives it and two kinds of numbers: its learning rate, and what the
    method knows ahead. They are Python numbers as long as a step is many calls; one launch reads them from tables, at a
    place that the device counts.
    """

    def __init__(self, config: RunConfig, images: Images, device: torch.device, pairs: Tensor, n: int) -> None:
        """pairs: (N, 2 or 3) int64 indices into the split, of which the method's own n come first; an epoch takes n."""
        if config.stats == "half":
            images = replace(images, mean=(0.5,) * config.channels, std=(0.5,) * config.channels)
        self.config, self.data, self.device, self.pairs, self.n = config, images, device, pairs, n
        self.bounds = batches(n, config.batch, keep_last=methods.METHODS[config.method].labels)
        self.steps = len(self.bounds) * config.epochs
        with seeded(config.seed):
            self.method = methods.build(config, len(images.classes))
        self.method.to(device, memory_format=torch.channels_last).train()
        i, j = pairs[n:, :2].to(device).unbind(1)
        self.method.partners = torch.cat([(i << 32) + j, (j << 32) + i]).sort().values
        groups, c = self.method.param_groups(config.lr), config
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, lr=c.lr, momentum=c.momentum, fused=True) if c.optimizer == "sgd" else
            torch.optim.Adam(groups, lr=c.lr, betas=(c.momentum, c.beta2), fused=True,
                             capturable=device.type == "cuda"))  # fmt: skip
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (images.mean, images.std))
        self.w = torch.tensor(config.w, device=device)
        split = images.split(config.split)
        self.images, self.labels = split.images.to(device), None if split.labels is None else split.labels.to(device)
        self.paired = not bool((pairs[:, 0] == pairs[:, 1]).all())
        self.support = config.support if "support" in self.method.reads else 0
        self.step, self.sums = 0, dict[str, Tensor]()
        # of one launch: tensors that stay where they are, and what they hold now
        self.fixed: Drawn | None = None  # an epoch's samples
        self.shown: Drawn | None = None  # which
        self.tables: dict[str, Tensor] = {}  # a row a step: what is known ahead in an epoch
        self.told = -1  # in which
        self.place = 0  # of the batch in it that the counter stands at
        self.set_mode(compile_mode(device, self.steps))

    def set_mode(self, mode: str) -> None:
        """One of the modes that `compile_mode` names."""
        self.mode = mode
        _unlimited()  # the views may have been compiled in another task
        self.view1, self.view2 = (_view(self.config.augment, n, mode.startswith("views")) for n in (0, 1))
        self.compiled = compiled(self.forward) if mode.startswith("step") else self.forward
        if self.device.type == "cuda":  # the first steps try which kernels are the fastest
            torch.backends.cudnn.benchmark = mode.endswith("graph")

    # --- an epoch's samples -----------------------------------------------------------------------------------------

    def draft(self, epoch: int) -> Drawn:
        """The epoch's order of pairs and the parameters of its views, on the CPU: a function of (seed, epoch) alone.

        With P semantic pairs an epoch is N of the N + P pairs, so that steps, rates and images seen are those of the run
        without them: pairs take the place of images, none of which is seen more often for it. A weight below 1 draws
        each semantic pair with that probability, which is SePP-ID's eq. 2 in expectation, for every loss.
        """
        generator = torch.Generator().manual_seed(epoch_seed(self.config.seed, epoch))
        order = torch.randperm(len(self.pairs), generator=generator)
        if self.config.pair_weight < 1:
            order = order[(order < self.n) | (torch.rand(len(order), generator=generator) < self.config.pair_weight)]
        order = order[: self.n]
        drawn, picked = len(order), slice(None)
        if not self.config.redraw:  # parameters belong to a pair, whatever the epoch
            generator, drawn = torch.Generator().manual_seed(epoch_seed(self.config.seed, -2)), len(self.pairs)
            picked = order
        draws = augment.VIEWS[self.config.augment].draw(drawn, self.config.size, generator, self.support)
        return self._pinned(self.pairs[order]), *({k: self._pinned(v[picked]) for k, v in p.items()} for p in draws)

    def _pinned(self, t: Tensor) -> Tensor:
        """In memory from which a GPU fetches it while others work; on a CPU as it is."""
        return t.pin_memory() if self.device.type == "cuda" else t

    def put(self, drafted: Drawn) -> Drawn:
        """A drafted epoch on the run's device; for a graph, where it stays."""
        if not self.mode.endswith(" graph"):
            return drafted[0].to(self.device, non_blocking=True), *(
                {k: v.to(self.device, non_blocking=True) for k, v in p.items()} for p in drafted[1:])  # fmt: skip
        if self.fixed is None:
            room = partial(torch.empty_like, device=self.device)
            self.fixed = room(drafted[0]), *({k: room(v) for k, v in p.items()} for p in drafted[1:])
            self.at, self.batch = torch.tensor(0, device=self.device), torch.arange(self.config.batch, device=self.device)
            self.lr, self.launch = torch.tensor(0.0, device=self.device), Captured(self._next, self.device)
        for own, new in zip(_tensors(self.fixed), _tensors(drafted), strict=True):
            own.copy_(new, non_blocking=True)
        self.shown = drafted
        return self.fixed

    def draw(self, epoch: int) -> Drawn:
        """`draft` on the run's device."""
        return self.put(self.draft(epoch))

    def samples(self, drawn: Drawn, rows: slice | Tensor) -> tuple:
        """These samples of a drawn epoch, as `see` takes them."""
        (i, j, *n), params = drawn[0][rows].unbind(1), tuple({k: v[rows] for k, v in p.items()} for p in drawn[1:])
        xi = self.images[i]
        batch = {"i": i, "j": j} | ({} if self.labels is None else {"labels": self.labels[i]})
        if n:
            batch["xn"] = self.images[n[0]]
        return xi, self.images[j] if self.paired else xi, params, batch

    # --- forward ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def see(self, xi: Tensor, xj: Tensor, params: tuple[Params, ...], batch: dict[str, Tensor]) -> tuple[tuple, dict]:
        """uint8 images and parameters -> the views and the batch, as methods expect them."""
        make = (self.view1, self.view2, *[self.view1] * self.support)
        views = (v(x, p, self.mean, self.std) for v, x, p in zip(make, (xi, xj, *[xi] * self.support), params, strict=True))
        x1 = (xi / 255 - self.mean) / self.std
        x2 = (xj / 255 - self.mean) / self.std if self.paired else x1
        batch = {k: (v / 255 - self.mean) / self.std if k == "xn" else v for k, v in batch.items()}
        batch = {**batch, "x1": x1, "x2": x2, "mean": self.mean, "std": self.std, "w": self.w}
        return tuple(v.contiguous(memory_format=torch.channels_last) for v in views), batch

    def forward(self, *samples: Any) -> tuple[dict, dict]:
        """What `see` takes -> the method's scalars, and the sums that z_std is made of."""
        views, batch = self.see(*samples)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            out = self.method.loss(views, batch)
        zn = F.normalize(out.pop("z").float(), dim=1)
        return out, {"z": zn.sum(0), "zz": zn.square().sum(0), "rows": zn[:256]}

    def _loaded(self, *given: Any) -> tuple[dict, dict]:
        """The compiled forward pass. A cached file that a killed compiler left broken is removed and compiled again; what
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
                warnings.warn(f"Mode {self.mode} cannot be compiled ({why}); the step is taken as it is.", stacklevel=2)
                self.set_mode("eager graph" if self.mode.endswith(" graph") else "eager")

    # --- the step ---------------------------------------------------------------------------------------------------

    def known(self, step: int) -> dict[str, float | Tensor]:
        """The learning rate of step 0, 1, ... and what the method knows ahead of it."""
        c = self.config
        lr = lr_at(step, self.steps, c.lr, c.schedule, c.warmup)
        return {"lr": lr, **self.method.ahead(step + 1, self.steps)}

    def _tell(self, epoch: int) -> None:
        """What is known ahead of each step of an epoch, to the tables that a graph reads."""
        self.told, first = epoch, epoch * len(self.bounds)
        known = [self.known(n) for n in range(first, first + len(self.bounds))]
        for name in known[0]:
            rows = torch.stack([torch.as_tensor(k[name], dtype=torch.double) for k in known])
            table = self.tables.setdefault(name, torch.empty_like(rows, device=self.device))
            table.copy_(self._pinned(rows), non_blocking=True)

    def advance(self, drawn: Drawn, a: int, b: int) -> None:
        """One optimiser step on samples a to b of a drawn epoch."""
        if self.mode.endswith(" graph") and b - a == self.config.batch:
            if drawn is not self.fixed and drawn is not self.shown:
                self.put(drawn)
            if self.told != (epoch := self.step // len(self.bounds)):
                self._tell(epoch)
            if self.place != (place := a // self.config.batch):
                self.at.fill_(place)
            self.place = place + 1
            self.launch()
            if self.launch.failed:
                self.set_mode(after(self.mode))
        else:
            self._take(self.samples(drawn, slice(a, b)), **self.known(self.step))
        self.step += 1

    def _next(self) -> None:
        """The step that the counter stands at: a fixed sequence of kernels on fixed tensors."""
        rows = self.at * self.config.batch + self.batch
        known = {name: table.index_select(0, self.at.view(1))[0] for name, table in self.tables.items()}
        self.lr.copy_(known.pop("lr"))
        self._take(self.samples(self.fixed, rows), self.lr, **known)
        self.at.add_(1)

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
        """The epoch's sums of scalars, times the n samples that they are means of, and of z's moments, in float64."""
        scalars = torch.stack([*out.values(), torch.ones_like(out["loss"])]).double() * n
        new = {**dict(zip((*out, "n"), scalars)), **{k: v.double() for k, v in moments.items()}}
        if self.sums:
            torch._foreach_add_([self.sums[k] for k in new], list(new.values()))
        else:
            self.sums = {k: v.clone() for k, v in new.items()}


def _tensors(drawn: Drawn) -> Iterator[Tensor]:
    yield drawn[0]
    for p in drawn[1:]:
        yield from p.values()
