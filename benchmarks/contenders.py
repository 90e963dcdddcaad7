"""What is compared: our step and pipeline, and what users would pick instead, each as a warmed-up repeat."""

import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.models import resnet18
from torchvision.transforms import v2

from sidae_lib import augment, check_gpu, experiments, frames, methods, pairs, paths, small_maps, store, train
from sidae_lib.check_gpu import arithmetic, noise  # noqa: F401  (of `floor` too)
from sidae_lib.config import EvalConfig, RunConfig
from sidae_lib.data import Images, Split
from sidae_lib.step import compiled as fast

from .timing import Bench, Repeat, Row, peak


def embeddings(n: int, device: torch.device, dim: int = 256) -> Tensor:
    """n embeddings in groups of about 25 around random directions, as images of a kind lie: a few near, most far."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(max(2, n // 25), dim, generator=g)
    z = torch.randn(n, dim, generator=g) * torch.empty(n, 1).uniform_(0.2, 1.5, generator=g)
    return z.add_(centres[torch.randint(len(centres), (n,), generator=g)]).to(device)


def approximate(z: Tensor, neighbours: int, low: float) -> Tensor:
    """Codes i n + j, i < j, of the pairs of cosine >= low that an HNSW index (arXiv:1603.09320) finds when each of the n
    rows asks for its nearest `neighbours`; for `pairs.mine` it would take the place of comparing all with all."""
    import hnswlib

    e, n = nn.functional.normalize(z, dim=1).cpu(), len(z)
    index = hnswlib.Index("ip", z.shape[1])
    index.init_index(n, M=16, ef_construction=200, random_seed=0)
    index.set_num_threads(torch.get_num_threads())
    index.add_items(e.numpy())
    index.set_ef(2 * neighbours)
    j, distance = (torch.from_numpy(t) for t in index.knn_query(e.numpy(), min(neighbours + 1, n)))
    i, j = torch.arange(n)[:, None].expand(j.shape), j.long()
    return (i.minimum(j) * n + i.maximum(j))[(i != j) & (1 - distance >= low)].unique()


def mine_once(n: int, neighbours: int, device: torch.device) -> Row:
    """All pairs in the band of the n RATIO highest cosines, exact (neighbours 0) or by an index, with its recall."""
    z = embeddings(n, device)
    exact, low, row = None, 0.0, {}
    if neighbours:
        exact = pairs.mine(z, k=n, low=-1.0, high=1.0, count=round(pairs.RATIO * n))
        low = exact.score.min().item()
    held, began = int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]), time.perf_counter()
    if exact is None:
        found = pairs.mine(z, k=n, low=-1.0, high=1.0, count=round(pairs.RATIO * n))
        row = {"pairs": len(found.i), "above_mib": 1024 * peak(device)["host_gib"] - held / 1024}
    else:
        found = approximate(z, neighbours, low)
        row = {"pairs": len(found), "recall": torch.isin((exact.i * n + exact.j).cpu(), found).double().mean().item()}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    return row | {"seconds": seconds} | ({} if neighbours else {"pairs_per_second": n * (n - 1) / 2 / seconds})


@lru_cache
def load(name: str) -> Images:
    images = check_gpu.load(name)
    if images.name == "noise":
        print(f"{name} is not in {paths.data()}: random images of CIFAR-10's shape stand in for it.")
    return images


def cut(images: Images, n: int) -> Images:
    """n training and n / 5 test images, evenly spaced: sets come sorted by class."""
    def spaced(s: Split, m: int) -> Split:
        k = max(1, len(s.images) // m)
        return Split(s.images[::k][:m], s.labels[::k][:m])

    return replace(images, splits={name: spaced(images.split(name), m) for name, m in (("train", n), ("test", n // 5))})


def learner(run: train.Run, compiled: bool = False) -> Callable[[Tensor, Tensor, Tensor], None]:
    """(view 1, view 2, clean images) -> one step of the run's method and optimiser, and nothing else."""
    def loss(v1: Tensor, v2: Tensor, x: Tensor) -> Tensor:
        batch = {"x1": x, "x2": x, "mean": run.mean, "std": run.std}
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
            return run.method.loss((v1, v2), batch)["loss"]

    loss = fast(loss) if compiled else loss

    def learn(*tensors: Tensor) -> None:
        v1, v2, x = (t.to(run.device, non_blocking=True) for t in tensors)
        out = loss(*(v.contiguous(memory_format=torch.channels_last) for v in (v1, v2)), x)
        run.optimizer.zero_grad()
        out.backward()
        run.optimizer.step()

    return learn


def alone(bench: Bench, config: RunConfig, images: Images, compiled: bool = False) -> Repeat:
    """The step on one fixed batch of two different views."""
    run = train.Run(config, images, bench.device)
    shape = (config.batch, config.channels, config.size, config.size)
    v1, v2, x = (torch.randn(shape, device=bench.device) for _ in range(3))
    v1, v2 = (v.contiguous(memory_format=torch.channels_last) for v in (v1, v2))
    return bench.rate(partial(learner(run, compiled), v1, v2, x), config.batch)


def pipeline_step(run: train.Run, drawn: Any) -> None:
    """One turn of train's own loop, less the progress bar and the checkpoints."""
    run.step %= run.steps  # a benchmark may outlast the schedule
    run.advance(drawn, *run.bounds[run.step % len(run.bounds)])
    if run.step % (1 if run.device.type == "cpu" else 50) == 0:
        run.check_finite()


def pipeline(bench: Bench, config: RunConfig, images: Images, mode: str) -> Repeat:
    """Gather, augmentation and step; the drawing of an epoch's parameters counts by the step's share of the epoch."""
    run, epochs = train.Run(config, images, bench.device), count()
    run.set_mode(mode)
    bench.warm(partial(pipeline_step, run, run.draw(0)))

    def repeat() -> float:
        bench.synchronize()
        began = time.perf_counter()
        drawn = run.draw(next(epochs))
        bench.synchronize()
        drawing = (time.perf_counter() - began) / len(run.bounds)
        return config.batch / (bench.time(partial(pipeline_step, run, drawn)) + drawing)

    return repeat


@contextmanager
def torchs_layers():
    """Within it convolutions on small maps are torch's own, not the products of `small_maps`."""
    rule, small_maps.multiplied = small_maps.multiplied, lambda *_: False
    try:
        yield
    finally:
        small_maps.multiplied = rule


def torchs(build: Callable[[], Repeat]) -> Repeat:
    """The same contender with torch's own layers."""
    with torchs_layers():
        return torchs_layers()(build())


@lru_cache
def _single(bench: Bench, config: RunConfig, name: str, mode: str) -> Repeat:
    torch.set_num_threads(1)
    return pipeline(bench, config, load(name), mode)


def single(*args: Any) -> float:
    """One repeat of the pipeline on one thread, in a process that keeps it for the next."""
    return _single(*args)()


def train_once(config: RunConfig, n: int, device: torch.device, seconds: float) -> Row:
    """The real `pretrain` on n images, stopped after so many seconds: time and peak memory of this process."""
    images, began = noise(n), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, suppress(train.Stopped):
        train.pretrain(config, images, Path(folder), device=device, deadline=time.monotonic() + seconds)
    return {"seconds": time.perf_counter() - began} | peak(device)


def fill_store(folder: str, n: int) -> None:
    """n evaluations of n / 10 runs, written as the store writes them."""
    os.environ["SIDAE_RUNS"] = folder
    base, born = experiments.run("sidae", "digits", "smoke"), train.provenance(torch.device("cpu"))
    for k in range(n):
        c = EvalConfig(run=base.replace(seed=k // 10), label_seed=k % 10)
        store.keep(c, {"config": c.to_dict(), "key": c.key(), "run_key": c.run.key(), "epoch": c.epoch, "kind": c.kind,
                       "data": {"name": "digits", "display": "digits"}, "accuracy": 90.0, "per_class": [90.0] * 10,
                       "confusion": [[100] * 10] * 10, "classes": list("0123456789"), "n_train": 1437, "n_test": 360,
                       "seconds": 1.0, "provenance": born})  # fmt: skip


def read_store(folder: str, n: int) -> Row:
    """n records to a table: time and peak memory of this process."""
    os.environ |= {"SIDAE_RUNS": folder, "SIDAE_RECORDS": f"{folder}/none"}
    began = time.perf_counter()
    table = frames.evaluations(list(store.every("evaluation")))
    seconds = time.perf_counter() - began
    assert len(table) == n
    return {"seconds": seconds} | peak(torch.device("cpu"))


class Pictures(Dataset):
    """uint8 images as torchvision's sets give them: (transform of a PIL image, label)."""

    def __init__(self, images: Images, transform: Callable | None = None) -> None:
        self.arrays, self.transform = images.split("train").images.permute(0, 2, 3, 1).numpy(), transform

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, k: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.arrays[k])), 0


def fed(bench: Bench, learn: Callable, pictures: Dataset, batch: int, **options: Any) -> Repeat:
    """A pass over a DataLoader with a worker per core. The clock starts when the first batch has been learned and the
    workers are ahead, which is in the loader's favour; when the pass is over the workers are idle."""
    number = 1 if bench.quick else 8 if bench.device.type == "cpu" else 10 * bench.cores
    sampler = RandomSampler(pictures, num_samples=(1 + number) * batch)
    loader = DataLoader(pictures, batch, sampler=sampler, drop_last=True, num_workers=bench.cores,
                        persistent_workers=True, multiprocessing_context="fork",
                        pin_memory=bench.device.type == "cuda", **options)  # fmt: skip

    def repeat() -> float:
        batches = iter(loader)
        learn(next(batches))
        bench.synchronize()
        began = time.perf_counter()
        for b in batches:
            learn(b)
        bench.synchronize()
        return number * batch / (time.perf_counter() - began)

    repeat()  # starts the workers
    return repeat


def lightly_example(bench: Bench, config: RunConfig, images: Images) -> Repeat:
    """lightly's documented SimSiam (its examples/pytorch/simsiam.py) with the config's widths and batch."""
    from lightly.data import LightlyDataset
    from lightly.data.multi_view_collate import MultiViewCollate
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
    from lightly.transforms import SimSiamTransform

    backbone = nn.Sequential(*list(resnet18().children())[:-1], nn.Flatten())
    project = nn.Sequential(backbone, SimSiamProjectionHead(512, config.hidden, config.dim)).to(bench.device)
    predict = SimSiamPredictionHead(config.dim, config.pred_hidden, config.dim).to(bench.device)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD([*project.parameters(), *predict.parameters()], lr=0.06)

    def learn(batch: Any) -> None:
        z0, z1 = (project(x.to(bench.device)) for x in batch[0])
        loss = 0.5 * (criterion(z0.detach(), predict(z1)) + criterion(z1.detach(), predict(z0)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    pictures = LightlyDataset.from_torch_dataset(Pictures(images), transform=SimSiamTransform(input_size=32))
    return fed(bench, learn, pictures, config.batch, collate_fn=MultiViewCollate())


def recipe(images: Images) -> tuple[Callable, Callable]:
    """torchvision's transforms for a view, and for the clean image."""
    end = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(images.mean, images.std))
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    return v2.Compose([jitter, v2.RandomResizedCrop(32, (0.2, 1.0)), v2.RandomGrayscale(0.2),
                       v2.RandomHorizontalFlip(), *end]), v2.Compose(end)  # fmt: skip


def plain(bench: Bench, config: RunConfig, images: Images) -> Repeat:
    """torchvision's transforms on PIL images in a DataLoader, feeding our step."""
    learn, (view, clean) = learner(train.Run(config, images, bench.device)), recipe(images)
    decodes = "decoder" in methods.METHODS[config.method].reads  # nobody else looks at the clean image
    each = (view, view, clean) if decodes else (view, view)
    pictures = Pictures(images, lambda image: [t(image) for t in each])
    return fed(bench, lambda b: learn(*b[0][:2], b[0][-1]), pictures, config.batch)


def ours(bench: Bench, images: Images, batch: int, compiled: bool) -> Repeat:
    """Both views of a batch, their parameters drawn and applied."""
    views, x = augment.VIEWS["simsiam_cifar"], images.split("train").images[:batch].to(bench.device)
    stats = [torch.tensor(s, device=bench.device) for s in (images.mean, images.std)]
    apply = partial(augment.apply, views.first)
    apply = fast(apply) if compiled else apply

    def step() -> None:
        for params in views.draw(batch, 32, torch.default_generator):
            apply(x, {k: v.to(bench.device) for k, v in params.items()}, *stats)

    return bench.rate(step, 2 * batch)


def torchvision(bench: Bench, images: Images, batch: int, pil: bool) -> Repeat:
    """One image after the other: what one worker of a DataLoader does."""
    x, view = images.split("train").images[:batch], recipe(images)[0]
    x = [Image.fromarray(a) for a in x.permute(0, 2, 3, 1).numpy()] if pil else list(x)
    return bench.rate(lambda: [view(image) for image in x], batch)


def kornia(bench: Bench, images: Images, batch: int) -> Repeat:
    """The same ops, batched; its colour jitter has one order of the four for a whole batch."""
    import kornia.augmentation as K

    x = images.split("train").images[:batch].to(bench.device)
    ops = (K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomResizedCrop((32, 32), scale=(0.2, 1.0)),
           K.RandomGrayscale(p=0.2), K.RandomHorizontalFlip(p=0.5),
           K.Normalize(torch.tensor(images.mean), torch.tensor(images.std)))  # fmt: skip
    view = nn.Sequential(*ops).to(bench.device)  # same_on_batch is False by default
    return bench.rate(lambda: view(x / 255), batch)


def product(bench: Bench, n: int, precision: str) -> Repeat:
    """The product of two n x n matrices in GFLOP/s; on a GPU fp32 means TF32, which convolutions take there."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, out = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(3))

    def step() -> None:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.mm(a, b, out=out)
        torch.backends.cuda.matmul.allow_tf32 = False

    return bench.rate(step, 2 * n**3 / 1e9)
