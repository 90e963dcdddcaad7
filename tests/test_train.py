"""The training loop: the same bits however often it is stopped, and a stop that says where."""

import base64
import io
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from test_three_steps import CASES, run_of

from sidae_lib import augment, data, experiments, methods, networks, train
from sidae_lib.config import SidaeError, epoch_seed
from sidae_lib.step import batches, lr_at, seeded

CPU = torch.device("cpu")


@pytest.fixture
def config():
    return experiments.run("sidae", "digits", "smoke")  # 2 epochs of 4 steps


def pretrain(config, folder: Path, **more):
    return train.pretrain(config, data.by_fingerprint(config.data), folder, device=CPU, **more)


def weights(folder: Path, epoch: int) -> dict:
    return load_file(folder / f"backbone-e{epoch:03d}.safetensors")


def bare(record: dict) -> dict:
    """A record without what may differ between two runs of the same thing: time, and provenance."""
    epochs = [{k: v for k, v in e.items() if k not in ("seconds", "images_per_second")} for e in record["epochs"]]
    return {k: v for k, v in record.items() if k not in ("seconds", "provenance")} | {"epochs": epochs}


def test_lr_at_is_the_cosine():
    assert lr_at(0, 100, 0.03) == 0.03
    assert lr_at(50, 100, 0.03) == pytest.approx(0.015)
    assert lr_at(25, 100, 0.03) == pytest.approx(0.03 * (1 + math.sqrt(0.5)) / 2)
    assert 0 < lr_at(99, 100, 0.03) < 1e-4
    assert lr_at(99, 100, 0.03, "constant") == 0.03


@pytest.mark.parametrize("n, batch, keep, sizes", [
    (10, 4, False, [4, 4]), (10, 4, True, [4, 4, 2]), (9, 4, True, [4, 5]), (8, 4, True, [4, 4]), (3, 4, True, [3]),
    (3, 4, False, []), (1, 4, True, [1]), (500, 256, True, [256, 244]),
])  # fmt: skip
def test_batches(n, batch, keep, sizes):
    bounds = batches(n, batch, keep)
    assert [b - a for a, b in bounds] == sizes
    assert [a for a, _ in bounds] == [sum(sizes[:k]) for k in range(len(sizes))]


def test_the_loop_is_plain_sgd(config, tmp_path):
    """Two epochs equal a loop typed here: order and parameters from (seed, epoch), loss, momentum, decay, cosine."""
    config = config.replace(weight_decay=0.1)  # large enough to be missed
    record = pretrain(config, tmp_path)
    images = data.by_fingerprint(config.data)
    torch.manual_seed(config.seed)
    model = methods.build(config).to(memory_format=torch.channels_last).train()  # the same kernels, so the same bits
    pool = data.subset(1437, count=256, seed=0)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (images.mean, images.std))
    initial = {k: v.clone() for k, v in model.backbone.named_parameters()}
    buffers, step, losses = {}, 0, []
    for epoch in range(2):
        g = torch.Generator().manual_seed(epoch_seed(config.seed, epoch))
        order = pool[torch.randperm(256, generator=g)]
        views = augment.VIEWS[config.augment]
        draws = views.draw(256, 32, g)
        for k in range(4):
            rows = slice(64 * k, 64 * k + 64)
            x = images.split("train").images[order[rows]]
            v1, v2 = (augment.apply(ops, x, {n: v[rows] for n, v in p.items()}, mean, std)
                      .contiguous(memory_format=torch.channels_last)
                      for ops, p in zip((views.first, views.second), draws))
            clean = (x / 255 - mean) / std
            out = model.loss((v1, v2), {"x1": clean, "x2": clean, "mean": mean, "std": std})
            model.zero_grad()
            out["loss"].backward()
            losses.append(out["loss"].item())
            lr = 0.5 * config.lr * (1 + math.cos(math.pi * step / 8))
            with torch.no_grad():
                for name, p in model.named_parameters():
                    d = p.grad + config.weight_decay * p
                    buffers[name] = d if name not in buffers else config.momentum * buffers[name] + d
                    p -= lr * buffers[name]
            step += 1
    assert [e["loss"] for e in record["epochs"]] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-3)
    trained = weights(tmp_path, 2)  # rounding grows from step to step, so it is the way travelled that is compared
    for name, p in model.backbone.named_parameters():
        assert (trained[name] - p).norm() < 0.01 * (p - initial[name]).norm(), name


def test_z_std_is_taken_over_the_epoch(config, tmp_path):
    """Equal to the spread of all the epoch's normalised projections at once."""
    seen = []
    run = train.Run(config, data.by_fingerprint(config.data), CPU)
    loss = run.method.loss
    run.method.loss = lambda v, b: seen.append(out := loss(v, b)) or dict(out)
    train._loop(run, tmp_path / "checkpoint.safetensors", {2}, train._Stop(), None)
    z = F.normalize(torch.cat([o["z"] for o in seen[:4]]).double(), dim=1)
    assert run.history[0]["z_std"] == pytest.approx(z.std(0, correction=0).mean().item(), rel=1e-4)


def test_gauges_leave_no_trace(config, tmp_path, monkeypatch):
    looked = pretrain(config, tmp_path / "looked")
    assert all(e["grad_si"] > 0 and e["grad_dae"] > 0 for e in looked["epochs"])
    monkeypatch.setattr(methods.METHODS["sidae"], "gauges", methods.Method.gauges)
    blind = pretrain(config, tmp_path / "blind")
    assert "grad_si" not in blind["epochs"][0]
    one, other = (weights(tmp_path / name, 2) for name in ("looked", "blind"))
    assert all(torch.equal(v, other[k]) for k, v in one.items()) and any("running_mean" in k for k in one)


@pytest.mark.parametrize("at, number", [(1, signal.SIGINT), (4, signal.SIGTERM), (7, signal.SIGINT)])
def test_a_stopped_run_equals_one_that_was_not(at, number, config, tmp_path, monkeypatch):
    """By a signal in the middle of an epoch, at its end and before the last step: tensors and record bit for bit."""
    whole = pretrain(config, tmp_path / "whole", checkpoints=[1])
    advance = train.Run.advance
    monkeypatch.setattr(train.Run, "advance", lambda run, *a: (
        advance(run, *a), run.step == at and os.kill(os.getpid(), number)))  # fmt: skip
    with pytest.raises(train.Stopped, match=f"Stopped by {number.name}: .* stands at step {at} of 8.*goes on"):
        pretrain(config, tmp_path / "parts", checkpoints=[1])
    monkeypatch.undo()
    assert not list((tmp_path / "parts").glob(".*.tmp"))
    parts = pretrain(config, tmp_path / "parts", checkpoints=[1])
    assert bare(parts) == bare(whole)
    for epoch in (1, 2):
        a, b = weights(tmp_path / "whole", epoch), weights(tmp_path / "parts", epoch)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.filterwarnings("ignore:.*collapsed at epoch")
@pytest.mark.parametrize("method", ["sidae", "simsiam", "dae", "supervised", "simclr", "moco_v2", "nnclr", "fnc", "byol",
                                    "vicreg", "barlow_twins", "dino"])  # fmt: skip
def test_a_run_that_stops_after_every_step(method, tmp_path):
    """What a method keeps between steps comes back each time (queue, centre, momentum network): all bit for bit."""
    images = {"label_count": 24} if method == "supervised" else {"pool": 24}  # 2 epochs of 3 steps
    config = run_of(method, **CASES[method][1], **images, **({"queue": 8} if method in ("moco_v2", "nnclr") else {})).config
    whole = pretrain(config, tmp_path / "whole", checkpoints=[1])
    for step in range(1, 6):
        with pytest.raises(train.Stopped, match=f"step {step} of 6"):
            pretrain(config, tmp_path / "parts", checkpoints=[1], deadline=0)
    parts = pretrain(config, tmp_path / "parts", checkpoints=[1], deadline=0)
    assert bare(parts) == bare(whole)  # the files' sha256 among the rest
    assert [s["steps"] for s in parts["provenance"]["segments"]] == [[n, n + 1] for n in range(6)]


@pytest.mark.parametrize("target", ["standardised", "unit"])
def test_pictures_are_what_the_decoder_makes_of_eight_clean_images(config, tmp_path, target):
    """At every checkpoint that is kept a strip of 8 images, equal to decoder(projector(backbone)) written out here."""
    images = data.by_fingerprint(config.data)
    run = train.Run(config.replace(target=target), images, CPU)
    train._loop(run, tmp_path / "checkpoint.safetensors", {1, 2}, train._Stop(), None)
    assert list(run.pictures) == ["1", "2"] and run.pictures["1"] != run.pictures["2"]
    i = run.pairs[data.subset(256, count=256, seed=0)[:8], 0]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (images.mean, images.std))
    x = (images.split("train").images[i] / 255 - mean) / std
    net = run.method.eval()
    with torch.no_grad():
        y = net.decoder(net.projector(net.backbone(x)))
    y = y * std + mean if target == "standardised" else y  # a unit target is the pixels themselves
    pixels = Image.open(io.BytesIO(base64.b64decode(run.pictures["2"])))
    assert (pixels.format, pixels.size) == ("PNG", (256, 32))
    kept = torch.cat([torch.from_numpy(np.array(pixels))[:, 32 * k : 32 * k + 32].permute(2, 0, 1)[None] for k in range(8)])
    assert (kept.int() - 255 * y.clamp(0, 1)).abs().max() < 0.51
    assert torch.equal(train.unstrip(run.pictures["2"]), kept)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (6, 3, 8, 8), (5, 1, 28, 28)])
def test_a_strip_holds_its_images(shape):
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(train.unstrip(train.strip(pixels / 255)), pixels)


def test_pictures_and_segments_of_a_run_that_was_stopped_once(config, tmp_path):
    """The clean images and every checkpoint's, as without the stop; two segments whose steps join."""
    images = data.by_fingerprint(config.data)
    whole = pretrain(config, tmp_path / "whole", checkpoints=[0, 1])
    with pytest.raises(train.Stopped):
        pretrain(config, tmp_path / "parts", checkpoints=[0, 1], deadline=time.monotonic())
    parts = pretrain(config, tmp_path / "parts", checkpoints=[0, 1])
    assert list(parts["pictures"]) == ["clean", "0", "1", "2"] and parts["pictures"] == whole["pictures"]
    pool = data.subset(1437, count=256, seed=0)[data.subset(256, count=256, seed=0)[:8]]
    assert torch.equal(train.unstrip(parts["pictures"]["clean"]), images.split("train").images[pool])
    one, two = ([s["steps"] for s in r["provenance"]["segments"]] for r in (whole, parts))
    assert one == [[0, 8]] and two == [[0, 1], [1, 8]]
    for segment in parts["provenance"]["segments"]:
        assert {k: segment[k] for k in ("commit", "torch", "device", "threads")} == {
            k: parts["provenance"][k] for k in ("commit", "torch", "device", "threads")}
    assert "pictures" not in pretrain(experiments.run("simsiam", "digits", "smoke"), tmp_path / "other")  # no decoder


def test_a_deadline_stops_at_a_checkpoint(config, tmp_path):
    with pytest.raises(train.Stopped, match="Time is up.*step 1 of 8"):
        pretrain(config, tmp_path, deadline=time.monotonic())
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert len(pretrain(config, tmp_path)["epochs"]) == 2


def test_a_signal_between_saving_and_stopping_waits_for_the_next_step(config, tmp_path):
    """No step is called saved that is not: of two looks at a signal in one step the second would find it."""
    class Late:
        looks = 0

        @property
        def signal(self):
            self.looks += 1
            return signal.SIGTERM if self.looks > 1 else 0

    run, path = train.Run(config, data.by_fingerprint(config.data), torch.device("cpu")), tmp_path / "checkpoint.safetensors"
    with pytest.raises(train.Stopped, match="Stopped by SIGTERM: .* stands at step 2 of"):
        train._loop(run, path, set(), Late(), None)
    assert path.exists()


def test_not_finite_stops_with_its_place(config, tmp_path):
    with pytest.raises(SidaeError, match=r"not finite at epoch 1, step \d of sidae .*no checkpoint yet"):
        pretrain(config.replace(lr=1e30), tmp_path)


def test_features_that_are_not_finite_are_a_sentence(config):
    """Weights may be finite and what they make of an image not: a batch of two images did that to SimCLR."""
    run = train.Run(config, data.by_fingerprint(config.data), torch.device("cpu"))
    with torch.no_grad():
        for p in run.method.backbone.parameters():
            p.fill_(1e30)
    with pytest.raises(SidaeError, match=rf"^The features of sidae {config.key()} are not finite at step 0\."):
        run.monitor()


def test_collapse_is_warned_of_once_and_recorded(tmp_path, monkeypatch):
    """Without the predictor and the stop-gradient the best answer is a constant; its spread tells."""
    config = experiments.run("simsiam", "digits", "smoke")
    monkeypatch.setattr(networks, "z_std", lambda total, square, n: torch.tensor(1e-4))
    with pytest.warns(UserWarning, match="collapsed at epoch 1: z_std 0.0001, healthy is 0.12") as caught:
        record = pretrain(config, tmp_path)
    assert len([w for w in caught if "collapsed" in str(w.message)]) == 1
    assert [e["collapsed"] for e in record["epochs"]] == [True, True]


def test_checkpoint_of_another_config(config, tmp_path):
    with pytest.raises(train.Stopped):
        pretrain(config, tmp_path, deadline=time.monotonic())
    with pytest.raises(SidaeError, match="another config"):
        pretrain(config.replace(seed=1), tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x80\x04\x95" + b])
def test_damaged_checkpoint(config, tmp_path, damage):
    with pytest.raises(train.Stopped):
        pretrain(config, tmp_path, deadline=time.monotonic())
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SidaeError, match="damaged"):
        pretrain(config, tmp_path)


def test_batch_larger_than_the_set(config, tmp_path):
    with pytest.raises(SidaeError, match="batch is 512 but only 256 images"):
        pretrain(config.replace(batch=512), tmp_path)


def test_device_that_is_not_there():
    with pytest.raises(SidaeError, match="Unknown device 'tpu'"):
        train.device_of("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(SidaeError, match="no CUDA device"):
            train.device_of("cuda")


def test_write_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    train.write(path, b"old")
    with pytest.raises(TypeError):
        train.write(path, None)  # fails inside the write
    assert path.read_bytes() == b"old"
    with pytest.raises(SidaeError, match="could not be written"):
        train.write(path / "below-a-file.json", b"x")


def test_saved_backbone_names_its_run(config, tmp_path):
    pretrain(config, tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "backbone-e002.safetensors", "pt") as f:
        meta = json.loads(f.metadata()["sidae"])
    images = data.by_fingerprint(config.data)
    assert meta == {"config": config.to_dict(), "epoch": 2, "mean": list(images.mean), "std": list(images.std)}
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")


def test_seed_and_epoch_both_change_what_is_drawn(config):
    """torch's CPU generator keeps 32 bits of its seed: a seed in the upper half alone would change nothing."""
    images = data.by_fingerprint(config.data)
    drawn = [train.Run(config.replace(seed=s), images, CPU).draw(e) for s, e in ((0, 0), (1, 0), (0, 1))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(drawn[a][0], drawn[b][0])
        assert not torch.equal(drawn[a][1]["crop"], drawn[b][1]["crop"])
    assert not torch.equal(drawn[0][1]["crop"], drawn[0][2]["crop"])  # nor do the two views share theirs


def test_a_gpu_begins_a_run_at_its_first_epoch():
    """Unless its own kind made what there is; a CPU goes on with anybody's."""
    cpu, gpu = [{"device": "AMD EPYC"}], [{"device": "NVIDIA H100"}]
    cuda = torch.device("cuda")
    assert not train.goes_on(cpu, cuda, "NVIDIA H100") and not train.goes_on(gpu + cpu, cuda, "NVIDIA H100")
    assert train.goes_on(gpu, cuda, "NVIDIA H100") and train.goes_on(gpu, CPU, "AMD EPYC") and train.goes_on([], cuda, "any")


def test_what_gets_its_name_is_on_the_disk_whole(tmp_path, monkeypatch):
    """Where the power fails the old file is there or the new one: all of it is synced before it is renamed."""
    done, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(("sync", os.fstat(fd).st_size)) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("rename", a.stat().st_size)) or rename(a, b))
    train.write(tmp_path / "a.json", b"new")
    assert done == [("sync", 3), ("rename", 3)] and (tmp_path / "a.json").read_bytes() == b"new"


def test_threads_draw_their_weights_one_after_the_other():
    """They share torch's generator: what one draws under its seed does not depend on who begins meanwhile."""
    def begin():
        with seeded(2):
            begun.set()

    with seeded(1):
        alone = torch.rand(3)
    begun, other = threading.Event(), threading.Thread(target=begin)
    with seeded(1):
        other.start()
        assert not begun.wait(0.2) and torch.equal(torch.rand(3), alone)
    other.join()
    assert begun.is_set()
