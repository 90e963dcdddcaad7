"""One run in memory: its state, looks at it, and the files that it leaves."""

import base64
import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from . import methods, networks, pairs
from .config import RunConfig, SidaeError
from .data import Images, subset
from .paths import backbone_name, sha256, write
from .step import Drawn, Step


class Damaged(SidaeError):
    """A file of the store that is not what was written under its name; `path` says which."""

    def __init__(self, sentence: str, path: Path = Path()) -> None:
        super().__init__(sentence)
        self.path = path


def several_classes(labels: Tensor, which: str) -> None:
    """Raises SidaeError unless there are at least two classes: what is fitted on one answers nothing else."""
    if len(labels.unique()) < 2:
        raise SidaeError(f"The {which} are all of one class; at least two classes are needed.")


def training_pairs(config: RunConfig, images: Images, device: torch.device
                   ) -> tuple[Tensor, pairs.Pairs | None]:  # fmt: skip
    """(N + P, 2 or 3) int64 indices (i, j) into the split: view 1 comes from image i, view 2 from image j.
    First the method's own N, (i, i) for most, then the P semantic pairs; these are returned apart too."""
    split, cls = images.split(config.split), methods.check(config)
    n = len(split.images)
    if cls.labels:
        if split.labels is None:
            raise SidaeError(f"{config.method} needs labels, and the {config.split} split of {images.name} "
                             "has none.")  # fmt: skip
        i = subset(n, fraction=config.labels, count=config.label_count, seed=config.label_seed)
        several_classes(split.labels[i], f"{len(i)} labels chosen of {images.display}")
        if config.per_class:
            of_class = [(split.labels == c).nonzero()[:, 0] for c in split.labels.unique()]
            i = torch.cat([rows[: config.per_class] for rows in of_class])
    else:
        i = subset(n, count=config.pool, seed=config.pool_seed) if config.pool else torch.arange(n)
    if config.epochs and not cls.labels and len(i) < config.batch:
        raise SidaeError(f"batch is {config.batch} but only {len(i)} images are there to train on; "
                         "take a smaller one.")  # fmt: skip
    if config.epochs and "queue" in cls.reads and (config.queue % config.batch or 2 * config.queue > len(i)):
        raise SidaeError(f"queue must be a multiple of batch ({config.batch}) and at most half of the "
                         f"{len(i)} images, or it holds earlier views of a batch's own, got {config.queue}.")
    own = cls.pairs(config, i, split.labels)
    if config.pairs == "none":
        return own, None
    extra = pairs.find(config, images, i, device)
    return torch.cat([own, torch.stack([extra.i, extra.j], 1)]), extra


def packed(tensors: dict[str, Tensor], meta: dict[str, Any]) -> bytes:
    """A safetensors file. It holds contiguous tensors alone: `copy_` restores channels_last on load."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    return save(plain, {"sidae": json.dumps(meta)})


def strip(images: Tensor) -> str:
    """Images (N, C, S, S) in [0, 1] side by side, as a PNG in base64."""
    row = torch.cat([*images], 2)  # (C, S, N S)
    file = io.BytesIO()
    to_pil_image((255 * row.clamp(0, 1)).round().byte().cpu()).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def unstrip(text: str) -> Tensor:
    """What `strip` was given, as pixels: (N, C, S, S) uint8."""
    row = pil_to_tensor(Image.open(io.BytesIO(base64.b64decode(text))))
    return torch.stack(row.split(row.shape[1], 2))


class Run(Step):
    """One run in memory: what its steps read and write, and what is written of it."""

    NOTES = ("history", "seconds", "files", "pictures", "segments")  # in a checkpoint, beside the tensors

    def __init__(self, config: RunConfig, images: Images, device: torch.device) -> None:
        pairs, self.extra = training_pairs(config, images, device)
        super().__init__(config, images, device, pairs, len(pairs) - (len(self.extra.i) if self.extra else 0))
        self.history, self.seconds = list[dict[str, Any]](), 0.0
        self.files: dict[str, str] = {}  # name -> sha256 of each backbone kept so far
        self.pictures: dict[str, str] = {}  # epoch -> `strip` of what the decoder makes of eight images
        self.segments: list[dict[str, Any]] = []  # which machine made which steps
        self.saved = 0  # the step of the last checkpoint
        self.name = f"{config.method} {config.key()}"
        few = subset(len(pairs), count=min(256, len(pairs)), seed=0)
        self.monitored = pairs[few, 0].to(device)  # the images that `monitor` looks at

    @property
    def epoch(self) -> int:
        """Whole epochs so far."""
        return self.step // max(1, len(self.bounds))

    @torch.no_grad()
    def _look(self, part: Callable[[Tensor], Tensor], count: int) -> Tensor:
        """What a part of the method, in evaluation mode, makes of the first monitored images as they are."""
        x = self.clean(self.images[self.monitored[:count]]).contiguous(memory_format=torch.channels_last)
        self.method.eval()
        out = part(x).float()
        self.method.train()
        return out

    def monitor(self) -> dict[str, float]:
        """Of at most 256 training images as they are: the effective rank of their features, and with labels
        `knn`, percent whose nearest neighbour by cosine is of their class. Nothing is trained on it."""
        h = self._look(self.method.features, 256)
        if not h.isfinite().all():
            raise SidaeError(f"The features of {self.name} are not finite at step {self.step}. "
                             "Lower lr, enlarge batch or check the data.")  # fmt: skip
        out = {"feature_rank": networks.effective_rank(h).item()}
        if self.labels is not None:
            h, y = F.normalize(h, dim=1), self.labels[self.monitored]
            out["knn"] = 100 * (y[(h @ h.T).fill_diagonal_(-2).argmax(1)] == y).double().mean().item()
        return out

    def gauges(self, drawn: Drawn, a: int, b: int) -> dict[str, float]:
        """The method's gauges on these samples. BatchNorm's statistics are put back afterwards."""
        before = {k: v.clone() for k, v in self.method.named_buffers()}
        values = self.method.gauges(*self.see(*self.samples(drawn, slice(a, b))))
        out = {k: v.item() for k, v in values.items()}
        for k, v in self.method.named_buffers():
            v.copy_(before[k])
        return out

    def check_finite(self) -> None:
        """Raises SidaeError where a sum, of any step of the epoch, or at its end a weight is not finite."""
        named = dict(self.sums)
        if self.step % len(self.bounds) == 0:
            named |= {f"Weight {k}": p for k, p in self.method.named_parameters()}
        finite = torch.stack([v.isfinite().all() for v in named.values()]).tolist()  # one look at the device
        if bad := [name for name, ok in zip(named, finite) if not ok]:
            epoch = (self.step - 1) // len(self.bounds) + 1
            what = "loss" if "loss" in bad else bad[0]
            last = "there is no checkpoint yet"
            if self.saved:
                last = f"the last good checkpoint is step {self.saved}"
            raise SidaeError(f"{what} is not finite at epoch {epoch}, step {self.step} of {self.name}; "
                             f"{last}. Lower lr or check the data.")  # fmt: skip

    def end_epoch(self, gauges: dict[str, float]) -> None:
        """Turns the sums and gauges into the epoch's line of the history."""
        config, epoch, sums = self.config, self.epoch, dict(self.sums)
        n, total, square = (sums.pop(k) for k in ("n", "z", "zz"))
        spread, healthy = networks.z_std(total, square, n).item(), 1 / math.sqrt(len(total))
        line = {"epoch": epoch} | {k: (v / n).item() for k, v in sums.items()} | {"z_std": spread} | gauges
        ends = epoch in (1, config.epochs)
        if ends or epoch % math.ceil(config.epochs / 5) == 0:  # a few times, to cost nothing
            line |= {"rank": networks.effective_rank(self.rows).item()} | self.monitor()
        if config.epochs < 100 or ends or epoch % 5 == 0:  # of a long run every fifth time, for room
            line |= self._pace(n.item())
        if spread < 0.1 * healthy and not self.method.labels:
            line["collapsed"] = True
            if not any(h.get("collapsed") for h in self.history):
                warnings.warn(f"{self.name} collapsed at epoch {epoch}: z_std {spread:.2g}, healthy is "
                              f"{healthy:.2g}. Check stop-gradient, BatchNorm and lr.", stacklevel=2)
        # seven significant digits: those of a float32
        self.history.append({k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in line.items()})
        for v in self.sums.values():
            v.zero_()  # where they are: a graph writes to them

    def _pace(self, n: float) -> dict[str, float]:
        """Rate and gradient norms of the last step; time and speed since the last line that has them."""
        line = {"lr": float(next(g["lr"] for g in self.optimizer.param_groups if not g["fixed"]))}
        for name, part in self.method.named_children():
            if grads := [p.grad for p in part.parameters() if p.grad is not None]:
                line[f"grad_{name}"] = torch.nn.utils.get_total_norm(grads).item()
        past = [h for h in self.history if "seconds" in h]
        seconds = self.seconds - sum(h["seconds"] for h in past)
        epochs = self.epoch - (past[-1]["epoch"] if past else 0)
        return line | {"seconds": round(seconds, 4), "images_per_second": round(n * epochs / seconds, 1)}

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the rest of the run depends on."""
        out = {f"method.{k}": v for k, v in self.method.state_dict().items()}
        for name, p in self._optimized().items():
            moments = self.optimizer.state.get(p, {})
            out |= {f"optimizer.{name}.{k}": v for k, v in moments.items() if isinstance(v, Tensor)}
        return out | {f"sums.{k}": v for k, v in self.sums.items()}

    def _optimized(self) -> dict[str, Tensor]:
        groups = enumerate(self.optimizer.param_groups)
        return {f"{g}.{n}": p for g, group in groups for n, p in enumerate(group["params"])}

    def meta(self) -> dict[str, Any]:
        if self.segments:
            self.segments[-1]["steps"][1] = self.step
        named = {name: getattr(self, name) for name in ("step", "mode", *self.NOTES)}
        return {"config": self.config.to_dict(), "key": self.config.key()} | named

    def save(self, path: Path) -> None:
        """A checkpoint, sealed: its metadata hold the sha256 of the same file without that seal."""
        tensors, meta = self.state(), self.meta()
        write(path, packed(tensors, meta | {"seal": sha256(packed(tensors, meta))}))
        self.saved = self.step

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises Damaged when it is not whole or belongs to another config."""
        try:
            with safe_open(path, "pt") as f:
                meta = json.loads((f.metadata() or {})["sidae"])
                tensors = {k: f.get_tensor(k) for k in f.keys()}
            if meta["key"] != self.config.key():
                raise Damaged(f"{path} is the checkpoint of another config ({meta['key']}, not "
                              f"{self.config.key()}); without it the run starts anew.", path)  # fmt: skip
            if meta.pop("seal") != sha256(packed(tensors, meta)):
                raise ValueError
            own, sums, optimized = {}, {}, self._optimized()
            for name, v in tensors.items():
                part, name = name.split(".", 1)
                if part == "method":
                    own[name] = v
                elif part == "sums":
                    sums[name] = v.to(self.device)
                else:
                    name, k = name.rsplit(".", 1)
                    p = optimized[name]
                    same = v.shape == p.shape
                    self.optimizer.state[p][k] = torch.empty_like(p).copy_(v) if same else v.to(p.device)
            self.method.load_state_dict(own)
            self.sums = sums
            self.step = self.saved = meta["step"]
            self.set_mode(meta["mode"])
            for name in self.NOTES:
                setattr(self, name, meta.get(name, getattr(self, name)))
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OSError, IndexError) as e:
            raise Damaged(f"The checkpoint {path} is damaged ({type(e).__name__}); without it the run starts "
                          "anew.", path) from e  # fmt: skip

    def kept(self, folder: Path, epoch: int) -> bool:
        """Whether the backbone of an epoch is there, whole, and this run's own."""
        path = folder / backbone_name(epoch)
        return path.exists() and sha256(path.read_bytes()) == self.files.get(path.name)

    def save_backbone(self, folder: Path, epoch: int) -> None:
        tensors = dict(self.method.backbone.state_dict())
        for name in ("fc", "projector"):  # the classifier, or the head that pairs are mined with
            if hasattr(self.method, name):
                tensors |= {f"{name}.{k}": v for k, v in getattr(self.method, name).state_dict().items()}
        meta = {"config": self.config.to_dict(), "epoch": epoch, "mean": self.data.mean, "std": self.data.std}
        content = packed(tensors, meta)
        write(folder / backbone_name(epoch), content)
        self.files[backbone_name(epoch)] = sha256(content)
        if getattr(self.method, "decoder", None) is not None:
            y = self._look(lambda x: self.method.decoder(self.method.embed(x)), 8)
            if self.config.target == "standardised":
                y = y * self.std + self.mean
            self.pictures[str(epoch)] = strip(y)
