"""Diagnosis: what a record keeps for it equals its definition, and runs made to fail on purpose are told apart."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch import nn

from sidae_lib import data, diagrams, experiments, frames, losses, networks, train
from sidae_lib.config import SidaeError
from sidae_lib.step import lr_at

CPU = torch.device("cpu")


def trained(config, folder, images=None):
    images = images or data.by_fingerprint(config.data, size=config.size, channels=config.channels)
    return train.pretrain(config, images, folder, device=CPU)


def simsiam(**changes):
    return experiments.run("simsiam", "digits", "smoke", **{"epochs": 25, **changes})


def no_stop_gradient(monkeypatch):
    monkeypatch.setattr(losses, "neg_cosine", lambda p, z: -F.cosine_similarity(p, z, dim=1).mean())
    return simsiam(lr=0.09), None


def no_batchnorm(monkeypatch):
    for name in ("projector", "predictor"):
        whole = getattr(networks, name)
        monkeypatch.setattr(networks, name, lambda *a, f=whole: nn.Sequential(*(m for m in f(*a) if not isinstance(
            m, nn.BatchNorm1d))))  # fmt: skip
    return simsiam(epochs=10), None


def lr_too_high(monkeypatch):
    return simsiam(lr=10.0, epochs=15), None


def all_alike(monkeypatch):
    images = data.load("digits")
    split = images.splits["train"]
    grey = replace(split, images=torch.full_like(split.images, 90))
    return simsiam(epochs=4), replace(images, std=(1.0,) * 3, splits={**images.splits, "train": grey})


def nothing(monkeypatch):
    return simsiam(epochs=4), None


@pytest.mark.parametrize(("break_it", "says", "not_says"), [
    pytest.param(no_stop_gradient, ["Collapse", "target's gradient is stopped", "Neighbours became worse"],
                 ["lower it", "BatchNorm"],
                 marks=pytest.mark.slow),
    (no_batchnorm, ["Collapse", "BatchNorm is missing"], ["stopped", "lower it"]),
    pytest.param(lr_too_high, ["Collapse", "lr 10 is 800 times the usual", "Neighbours became worse"],
                 ["stopped", "BatchNorm"], marks=pytest.mark.slow),
    (all_alike, ["The images are all alike"], ["Collapse", "Healthy"]),
    (nothing, ["no better than the untrained network's", "after 16 steps: train longer"], ["Collapse", "Healthy", "alike"]),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*collapsed")
def test_a_run_made_to_fail_is_told(break_it, says, not_says, tmp_path, monkeypatch):
    config, images = break_it(monkeypatch)
    text = " ".join(frames.findings(trained(config, tmp_path, images)))
    assert all(s in text for s in says) and not any(s in text for s in not_says), text
    assert "not to be expected with epochs" in text and "batch 64 for 512" in text


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sidae", "simsiam"])
def test_a_longer_run_is_not_called_collapsed(method, tmp_path):
    record = trained(experiments.run(method, "photos", "smoke", epochs=12, pool=1024), tmp_path)
    text = " ".join(frames.findings(record))
    assert "Collapse" not in text and "alike" not in text, text


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_effective_rank_closed_form():
    rank = lambda x: networks.effective_rank(torch.as_tensor(x)).item()  # noqa: E731
    axes = torch.cat([torch.eye(8), -torch.eye(8)])
    assert rank(axes) == approx(8) and rank(3 * axes + 100) == approx(8)  # eight directions alike, wherever they lie
    assert rank(axes[:, :3] @ torch.tensor([[1.0, 2, 3, 4]]).expand(3, 4)) == approx(1)  # a line
    assert rank(torch.ones(9, 5)) == 0 and rank(torch.full((9, 5), 0.1)) == 0  # a point
    weights = torch.tensor([0.5, 0.25, 0.25])  # shares of variance: entropy 1.5 log 2
    assert rank(torch.cat([torch.eye(3), -torch.eye(3)]) * weights.sqrt()) == approx(2**1.5)


def test_effective_rank_is_of_the_covariance():
    g = torch.Generator().manual_seed(0)
    for shape in ((40, 7), (7, 40)):  # the larger side does not matter
        x = torch.randn(shape, generator=g) * torch.linspace(0.1, 2, shape[1])
        share = torch.linalg.eigvalsh(torch.cov(x.T.double())).clamp(min=0)
        share = share[share > 1e-9] / share.sum()
        assert networks.effective_rank(x).item() == approx(math.exp(-(share * share.log()).sum()), rel=1e-5)


def test_monitoring_is_a_loop_and_changes_nothing():
    run = train.Run(simsiam(), data.load("digits"), CPU)
    before = {k: v.clone() for k, v in run.method.state_dict().items()}
    seen = run.monitor()
    assert run.method.training and all(torch.equal(v, before[k]) for k, v in run.method.state_dict().items())
    rows = data.subset(256, count=256, seed=0)
    i = run.pairs[rows, 0]
    x, y = run.data.split("train").images[i] / 255, run.data.split("train").labels[i]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (run.data.mean, run.data.std))
    with torch.no_grad():
        h = run.method.backbone.eval()((x - mean) / std)
    right = 0
    for a in range(256):
        cosines = F.cosine_similarity(h[a], h, dim=1)
        right += int(y[max((b for b in range(256) if b != a), key=cosines.__getitem__)] == y[a])
    assert seen["knn"] == approx(100 * right / 256, abs=0.5)  # a tie at most
    assert seen["feature_rank"] == approx(networks.effective_rank(h).item(), rel=1e-3)


def test_a_record_keeps_the_last_step_of_an_epoch(tmp_path):
    config = simsiam(epochs=2, warmup=0.75)  # both epochs end on another rate than the cosine's
    record = trained(config, tmp_path)
    run, seen = train.Run(config, data.load("digits"), CPU), []
    run.method.projector.register_forward_hook(lambda module, _, z: seen.append(z.detach()))
    assert record["untrained"] == run.monitor()
    for epoch, line in enumerate(record["epochs"]):
        drawn = run.draw(epoch)
        for a, b in run.bounds:
            run.advance(drawn, a, b)
        grads = [p.grad for p in run.method.predictor.parameters()]
        assert line["grad_predictor"] == approx(math.sqrt(sum(g.square().sum().item() for g in grads)), rel=1e-4)
        assert line["lr"] == float(f"{lr_at(run.step - 1, 8, config.lr, warmup=0.75):.7g}")
        assert line["rank"] == approx(networks.effective_rank(run.rows).item(), rel=1e-4)
        assert torch.allclose(run.rows, F.normalize(seen[-2], dim=1))  # of the first view
        assert line["knn"] == float(f"{run.monitor()['knn']:.7g}")


def test_few_looks_however_long(tmp_path):
    record = trained(simsiam(epochs=25, pool=64), tmp_path)
    assert [e["epoch"] for e in record["epochs"] if "knn" in e] == [1, 5, 10, 15, 20, 25]


def test_a_long_run_keeps_the_rest_of_a_line_every_fifth_time(tmp_path):
    """Loss, its terms and z_std stay per epoch; the seconds add up, and the rate is of the epochs since the line before."""
    config = experiments.run("sidae", "digits", "smoke", epochs=102, pool=64, dim=8, hidden=8, pred_hidden=4, decoder=8)
    record = trained(config, tmp_path)
    epochs, rest = record["epochs"], ("lr", "grad_backbone", "grad_decoder", "seconds", "images_per_second")
    assert all({"epoch", "loss", "l_si", "l_dae", "z_std"} <= e.keys() for e in epochs) and len(epochs) == 102
    for name in rest:
        assert [e["epoch"] for e in epochs if name in e] == [1, *range(5, 101, 5), 102]
    assert [e["epoch"] for e in epochs if "grad_si" in e] == list(range(10, 101, 10))
    assert [e["epoch"] for e in epochs if "knn" in e] == [1, 21, 42, 63, 84, 102]
    assert sum(e.get("seconds", 0) for e in epochs) == approx(record["seconds"], abs=0.01)
    assert epochs[9]["images_per_second"] == approx(5 * 64 / epochs[9]["seconds"], rel=0.02)
    assert len(diagrams.diagnose(record).axes[4].lines[0].get_xdata()) == 22


def test_a_set_without_labels_has_no_neighbours_to_count(tmp_path):
    images = data.load("digits")
    split = replace(images.splits["train"], labels=None)
    record = trained(simsiam(epochs=2), tmp_path, replace(images, splits={"train": split}))
    assert "knn" not in record["untrained"] and not any("knn" in e for e in record["epochs"])
    assert frames.findings(record) and len(diagrams.diagnose(record).axes[5].lines) == 0


def test_the_figure_shows_what_the_record_holds(tmp_path):
    record = trained(experiments.run("sidae", "digits", "smoke"), tmp_path)
    axes = diagrams.diagnose(record).axes
    for title, column in (("spread", "z_std"), ("effective rank", "rank"), ("learning rate", "lr"), ("nearest", "knn")):
        (ax,) = (a for a in axes if a.get_title().startswith(title))
        assert ax.lines[0].get_ydata().tolist() == [e[column] for e in record["epochs"] if column in e]
    (ax,) = (a for a in axes if a.get_title().startswith("loss"))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["l_si", "l_dae", "loss"]
    (ax,) = (a for a in axes if a.get_title().startswith("nearest"))
    assert ax.lines[-1].get_ydata()[0] == record["untrained"]["knn"]


def test_an_older_record_or_an_untrained_one_is_a_sentence(tmp_path):
    record = trained(experiments.run("untrained", "digits", "smoke"), tmp_path)
    for r in (record, {k: v for k, v in record.items() if k != "untrained"}):
        with pytest.raises(SidaeError, match="nothing to diagnose"):
            diagrams.diagnose(r)
