"""Semantic pairs: the dense answer whatever the tiles, calibrated counts, honest intervals, and training on them."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pytest import approx
from safetensors.torch import load_file
from scipy import stats

from sidae_lib import data, experiments, methods, networks, pairs, runs, store, train
from sidae_lib.config import EvalConfig, SidaeError

CPU = torch.device("cpu")


def clustered(n=500, dim=24, seed=0, spread=0.25):
    """Points around a few directions, of any length, some of them twice: cosines near 1, and exact ties."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(12, dim, generator=g)[torch.randint(12, (n,), generator=g)] + spread * torch.randn(n, dim, generator=g)
    z[n // 2 : n // 2 + 20] = z[:20]
    return z * (0.1 + 9 * torch.rand(n, 1, generator=g)).round(decimals=3)


def dense(z, low, high):
    """{(i, j): cosine} for i < j from all cosines at once, in float64."""
    z = F.normalize(z.double(), dim=1)
    s = z @ z.T
    return {(i, j): s[i, j].item() for i, j in ((s >= low) & (s <= high)).triu(1).nonzero().tolist()}


def listed(found):
    return list(zip(found.i.tolist(), found.j.tolist()))


# --- mine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [17, 128, 2048])
@pytest.mark.parametrize("low, high", [(0.9, 0.99), (0.97, 0.99), (-1, 1), (0.95, 0.9501)])
def test_equals_the_dense_answer_whatever_the_tiles(tile, low, high, monkeypatch):
    z = clustered(300)
    truth = dense(z, low, high)
    monkeypatch.setattr(pairs, "TILE", tile)
    found = pairs.mine(z, k=len(z), low=low, high=high)
    assert truth and set(listed(found)) == truth.keys() and len(found.i) == len(truth)
    assert found.score.tolist() == approx([truth[p] for p in listed(found)], abs=1e-6)
    assert found.score.diff().max() <= 0 and found.i.dtype == torch.int64


def test_a_cosine_on_the_bound_is_judged_in_float64():
    """Vectors at 0.97 from the first but for one part in 10^8, which float32 products cannot tell apart."""
    angles = torch.tensor([math.acos(0.97 + d) for d in (-3e-8, -1e-8, 1e-8, 3e-8, 1e-5, -1e-5)], dtype=torch.float64)
    z = torch.stack([angles.cos(), angles.sin()], 1)
    z = torch.cat([torch.tensor([[1.0, 0.0]], dtype=torch.float64), z]).float().repeat(1, 50)
    truth = {p for p in dense(z, 0.97, 0.999) if 0 in p}
    assert 0 < len(truth) < 6
    assert {p for p in listed(pairs.mine(z, k=7, low=0.97, high=0.999)) if 0 in p} == truth


@pytest.mark.parametrize("tile", [30, 2048])
@pytest.mark.parametrize("count", [1, 37, 1000])
@pytest.mark.parametrize("spread", [0.25, 1e-5])  # with the second all of a cluster lie within the margin
def test_count_is_the_so_many_highest_below_the_upper_bound(tile, count, spread, monkeypatch):
    z = clustered(300, spread=spread)
    monkeypatch.setattr(pairs, "TILE", tile)
    high = 0.995 if spread > 0.1 else 1 - 1e-9
    truth = sorted(dense(z, -1, high).values(), reverse=True)
    found = pairs.mine(z, k=len(z), low=-1, high=high, count=count)
    assert len(found.i) == count and found.score.double().tolist() == approx(truth[:count], abs=1e-7)
    monkeypatch.setattr(pairs, "TILE", 100)
    assert listed(pairs.mine(z, k=len(z), low=-1, high=high, count=count)) == listed(found)  # ties too
    few = pairs.mine(z, k=len(z), low=0.9, high=high, count=10**6)
    assert set(listed(few)) == dense(z, 0.9, high).keys()


@pytest.mark.parametrize("tile", [37, 100, 2048])
@pytest.mark.parametrize("sign", [1, -1])
def test_equal_and_opposite_images_lie_within_every_bound_of_a_cosine(tile, sign, monkeypatch):
    """Rounded, the cosine of a vector with itself is 1.0000000000000002 for a third of them."""
    half = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    z, twins = torch.cat([half, sign * half]), {(i, i + 100) for i in range(100)}
    norm = torch.linalg.vector_norm(half, dim=1, dtype=torch.float64)
    assert ((half.double().square().sum(1) / norm**2) > 1).any()
    monkeypatch.setattr(pairs, "TILE", tile)
    for low, high in ((-1, 1), (-2, 2), (-3, 1)):
        found = pairs.mine(z, k=200, low=low, high=high)
        assert len(found.i) == 200 * 199 // 2 and (found.i < found.j).all() and found.score.abs().max() == 1
    if sign > 0:
        for low, high, count in ((-1, 1, None), (-1, 1, 100), (1 - 1e-9, 1, None)):
            found = pairs.mine(z, k=200, low=low, high=high, count=count)
            assert set(listed(found)[:100]) == twins and (found.score[:100] == 1).all()
    else:
        assert set(listed(pairs.mine(z, k=200, low=-1, high=-1 + 1e-9))) == twins


def test_the_one_recorded_list_that_had_lost_a_pair_is_asked_for_anew():
    """MoCo v2 of seed 2 before training: the views of images 4511 and 48661 are equal, and its first list has no such pair."""
    asked = [e for e in experiments.pairs_found("laptop")[1] if e.kind == "pairs"]
    (anew,) = (e for e in asked if e.pair_recipe == 2)
    old = anew.replace(pair_recipe=1)
    assert old not in asked and (anew.run.seed, anew.epoch, anew.augment) == (2, 0, "simclr")
    assert [4511, 48661] not in [p[:2] for p in store.find(old)["pairs"]["list"]]  # the old record stays readable


def test_ordered_lists_both_directions():
    z = clustered(200)
    once, both = (pairs.mine(z, k=200, low=0.9, high=0.99, ordered=o) for o in (False, True))
    assert set(listed(both)) == set(listed(once)) | {(j, i) for i, j in listed(once)} and len(both.i) == 2 * len(once.i)
    assert len(pairs.mine(z, k=200, low=0.9, high=0.99, ordered=True, count=5).i) == 5


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("count", [None, 40])
def test_at_most_so_many_partners(ordered, most, count):
    """Against a loop over images: the nearest partners of each; not ordered, a pair must be among those of both ends."""
    z = clustered(150)
    truth, best = dense(z, 0.8, 0.99), {}
    for i in range(150):
        partners = sorted((p for p in truth if i in p), key=lambda p: (-round(truth[p], 12), sum(p) - i))
        best[i] = {sum(p) - i for p in partners[:most]}
    wanted = {(i, j) for i in range(150) for j in best[i] if ordered or (i < j and i in best[j])}
    found = listed(pairs.mine(z, k=150, low=0.8, high=0.99, ordered=ordered, max_per_anchor=most, count=count))
    score = sorted((truth[min(p), max(p)] for p in wanted), reverse=True)[:count]
    assert len(wanted) > 20 and set(found) <= wanted and len(set(found)) == len(found) == len(score)
    assert [truth[min(p), max(p)] for p in found] == approx(score, abs=1e-12)


def test_k_images_are_drawn_by_seed_and_named_by_their_row():
    z = clustered(400)
    a, again, b = (pairs.mine(z, k=100, low=0.9, high=0.99, seed=s) for s in (0, 0, 1))
    assert listed(a) == listed(again) != listed(b)
    truth = dense(z, 0.9, 0.99)
    for found, seed in ((a, 0), (b, 1)):
        rows = set(data.subset(400, count=100, seed=seed).tolist())
        assert set(listed(found)) == {p for p in truth if set(p) <= rows}


def test_a_lowered_matmul_precision_is_put_aside_and_back():
    torch.set_float32_matmul_precision("medium")
    try:
        z = clustered(100)
        assert set(listed(pairs.mine(z, k=100, low=0.9, high=0.99))) == dense(z, 0.9, 0.99).keys()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("bad, sentence", [
    ({"k": 1}, "2 to 20 images"), ({"k": 21}, "2 to 20"), ({"low": 0.99}, "rising"), ({"count": 0}, "above 0"),
    ({"max_per_anchor": 0}, "above 0"),
])  # fmt: skip
def test_bad_arguments(bad, sentence):
    with pytest.raises(SidaeError, match=sentence):
        pairs.mine(clustered(60)[:20], **{"k": 20, "low": 0.9, "high": 0.99} | bad)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_an_embedding_without_a_direction_is_refused(value):
    z = clustered(60)
    z[7] = value
    with pytest.raises(SidaeError, match="zero or not finite"):
        pairs.mine(z, k=60, low=0.9, high=0.99)


# --- controls -------------------------------------------------------------------------------------------------------


def test_controls_are_what_their_names_say():
    labels = torch.arange(60) % 7
    for kind in ("oracle", "wrong", "random"):
        found = pairs.control(kind, labels, 50, seed=3)
        assert len(found.i) == len(set(listed(found))) == 50 and found.score.isnan().all()
        same = labels[found.i] == labels[found.j]
        assert (found.i == found.j).all() if kind == "random" else (found.i < found.j).all()
        assert same.all() if kind != "wrong" else not same.any()
        assert listed(found) == listed(pairs.control(kind, labels, 50, seed=3)) != listed(pairs.control(kind, labels, 50))


@pytest.mark.parametrize("kind, there", [("oracle", 6 + 1), ("wrong", 8), ("random", 6)])
def test_every_pair_there_is_and_not_one_more(kind, there):
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    assert len(set(listed(pairs.control(kind, labels, there)))) == there
    with pytest.raises(SidaeError, match=f"only {there} {kind} pairs among 6 images, {there + 1} are asked for"):
        pairs.control(kind, labels, there + 1)


def test_oracle_pairs_are_drawn_evenly():
    """Each of the 9,045 pairs about as often as any other, whichever class it belongs to."""
    labels = torch.arange(300) % 5
    drawn = torch.cat([torch.stack(pairs.control("oracle", labels, 800, seed=s)[:2]) for s in range(20)], 1)
    ends = drawn.flatten().bincount(minlength=300)
    assert stats.chisquare(ends.numpy()).pvalue > 1e-3
    assert stats.chisquare(labels[drawn[0]].bincount().numpy()).pvalue > 1e-3


# --- report ---------------------------------------------------------------------------------------------------------


def made(*ij):
    i, j = torch.tensor(ij).T
    return pairs.Pairs(i, j, torch.linspace(0.98, 0.9, len(i)))


def test_report_counts():
    out = pairs.report(made((0, 1), (1, 0), (0, 2), (3, 4)))
    assert (out["unordered"], out["ordered"], out["images"]) == (3, 6, 5)
    assert (out["low"], out["high"]) == (approx(0.9), approx(0.98)) and "accuracy" not in out
    assert out["hash"] != pairs.report(made((0, 1), (1, 0), (0, 2), (4, 3)))["hash"]


def test_accuracy_per_class_counts_both_ends():
    labels = torch.tensor([0, 0, 0, 1, 1, 3])
    out = pairs.report(made((0, 1), (1, 2), (2, 3), (3, 4), (4, 5)), labels)
    assert out["accuracy"] == 60 and out["class_pairs"] == [5, 4, 0, 1]
    assert out["class_accuracy"] == [80, 50, None, 0]  # of no pair there is no accuracy
    json.dumps(out, allow_nan=False)


def test_interval_is_wilsons_where_no_pair_shares_an_anchor():
    n, right = 200, 150
    labels = torch.cat([torch.zeros(n, dtype=torch.int64), (torch.arange(n) >= right).long()])
    found = made(*((i, n + i) for i in range(n)))
    low, high = stats.binomtest(right, n).proportion_ci(method="wilson")
    # the variance between single pairs is the binomial one times n / (n - 1)
    assert pairs.report(found, labels)["interval"] == approx([100 * low, 100 * high], abs=0.05)


def test_pairs_of_one_anchor_count_once():
    """40 anchors, each with 5 partners that are all right or all wrong, tell as much as 40 pairs."""
    labels = torch.cat([torch.zeros(40, dtype=torch.int64), (torch.arange(200) // 5 >= 30).long()])
    found = made(*((n // 5, 40 + n) for n in range(200)))
    low, high = stats.binomtest(30, 40).proportion_ci(method="wilson")
    assert pairs.report(found, labels)["interval"] == approx([100 * low, 100 * high], abs=0.5)


def test_interval_at_the_ends_lies_in_range():
    labels = torch.zeros(20, dtype=torch.int64)
    low, high = pairs.report(made(*((i, i + 10) for i in range(10))), labels)["interval"]
    assert 60 < low < 80 and high == 100


# --- embeddings -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(own_store):
    return experiments.run("simsiam", "digits", "smoke", epochs=1)


def trained(config, **more):
    return runs.fetch_all([config], device="cpu", log=lambda _: None, **more)[0]


def test_embeddings_are_the_projections_of_images_as_they_are(config):
    trained(config)
    images = data.by_fingerprint(config.data)
    x = images.split("train").images[:300]
    state = load_file(store.backbone(config))
    model = methods.build(config).eval()
    model.backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("projector.")})
    model.projector.load_state_dict({k.removeprefix("projector."): v for k, v in state.items() if k.startswith("projector.")})
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (images.mean, images.std))
    with torch.no_grad():
        slow = torch.cat([model.projector(model.backbone((one[None] / 255 - mean) / std)) for one in x[:20]])
    random = torch.get_rng_state()
    z = pairs.embed(store.backbone(config), x, CPU)
    assert z.shape == (300, config.dim) and torch.allclose(z[:20], slow, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), random)


def test_an_untrained_network_is_embedded_by_its_backbone(own_store):
    config = experiments.run("untrained", "digits", "smoke")
    trained(config)
    x = data.by_fingerprint(config.data).split("train").images[:20]
    assert pairs.embed(store.backbone(config), x, CPU).shape == (20, 32)


def test_a_backbone_file_with_its_head_still_loads_into_torchvision(own_store):
    config = experiments.run("simsiam", "digits", "smoke", epochs=0, width=64, backbone="resnet18")
    trained(config)
    theirs = torchvision.models.resnet18()
    missing, unexpected = theirs.load_state_dict(load_file(store.backbone(config)), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and all(k.startswith("projector.") for k in unexpected)
    ours = networks.load(store.backbone(config))
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours(x), theirs.eval()(x), atol=1e-5)  # sums are taken in another order
    assert not any("projector" in k for k in ours.state_dict())


# --- training on them -----------------------------------------------------------------------------------------------


def recipe(config, **changes):
    return config.replace(**{"pairs": "mined", "encoder": config, "pair_share": 0.5, "pair_low": -1.0, "pair_high": 0.9999,
                             "pair_count": 30, "seed": 1, **changes})  # fmt: skip


def test_the_encoder_is_trained_first_and_the_record_tells_what_it_found(config):
    mined = recipe(config)
    record = trained(mined)
    assert store.find(config)["key"] == config.key()  # nobody asked for it
    images = data.by_fingerprint(config.data)
    rows = data.subset(1437, count=256, seed=0)
    rows = rows[data.subset(256, fraction=0.5, seed=0)]  # half of the pool
    z = pairs.embed(store.backbone(config), images.split("train").images[rows], CPU)
    best = sorted(dense(z, -1, 0.9999).items(), key=lambda p: -p[1])[:30]
    extra = train.training_pairs(mined, images, CPU)[1]
    assert set(listed(extra)) == {(rows[i].item(), rows[j].item()) for (i, j), _ in best}
    assert record["pairs"]["hash"] == pairs.report(extra)["hash"] and record["pairs"]["unordered"] == 30
    labels = images.split("train").labels
    assert record["pairs"]["accuracy"] == approx(100 * (labels[extra.i] == labels[extra.j]).double().mean().item(), abs=1e-3)
    assert "pairs" not in store.find(config)


def test_an_epoch_of_the_encoder(config):
    """Epoch 0 is the untrained network: other embeddings, other pairs."""
    hashes = {trained(recipe(config, encoder_epoch=e, pair_high=1.0))["pairs"]["hash"] for e in (0, 1)}
    assert len(hashes) == 2 and store.backbone(config, 0).exists()


@pytest.mark.parametrize("kind", ["random", "wrong", "oracle"])
def test_controls_need_no_encoder(config, kind):
    c = config.replace(pairs=kind, pair_count=30, pair_share=1.0)
    record = trained(c)
    accuracy = {"random": 100, "wrong": 0, "oracle": 100}[kind]
    assert record["pairs"]["accuracy"] == accuracy and record["pairs"]["unordered"] == 30
    pool = set(data.subset(1437, count=256, seed=0).tolist())
    extra = train.training_pairs(c, data.by_fingerprint(c.data), CPU)[1]
    assert {*extra.i.tolist(), *extra.j.tolist()} <= pool


def test_steps_and_images_are_those_of_the_run_without_pairs(config):
    plain, paired = trained(config), trained(config.replace(pairs="oracle", pair_count=100, pair_share=1.0))
    for what in ("steps", "images"):
        assert plain[what] == paired[what]


def test_images_and_pairs_are_drawn_evenly_and_lambda_thins_the_pairs(config):
    """Over 400 epochs an image's own pair comes as often as any other's, and a semantic pair lambda times as often."""
    images = data.by_fingerprint(config.data)
    for weight in (1.0, 0.3):
        c = config.replace(pairs="oracle", pair_count=80, pair_share=1.0, pair_weight=weight)
        run = train.Run(c, images, CPU)
        code = run.pairs[:, 0] * 2000 + run.pairs[:, 1]
        seen = torch.zeros(len(code))
        for epoch in range(400):
            order = run.draw(epoch)[0]
            assert len(order) == 256 == len(order.unique(dim=0))
            seen += torch.isin(code, order[:, 0] * 2000 + order[:, 1])
        own, extra = seen[:256].mean(), seen[256:].mean()
        assert (256 * own + 80 * extra).item() == approx(256 * 400)
        assert (extra / own).item() == approx(weight, rel=0.05)


def test_view_2_and_its_target_come_from_image_j(own_store):
    """SidAE's second target is image j."""
    config = experiments.run("sidae", "digits", "smoke", pairs="wrong", pair_count=200, pair_share=1.0, augment="none")
    run = train.Run(config, data.by_fingerprint(config.data), CPU)
    seen = []
    loss = run.method.loss
    run.method.loss = lambda v, b: seen.append((v, b)) or loss(v, b)
    run.advance(run.draw(0), 0, 64)
    (v1, v2), batch = seen[0]
    assert 5 < (batch["i"] != batch["j"]).sum() < 64
    for v, x, index in ((v1, "x1", "i"), (v2, "x2", "j")):
        clean = (run.images[batch[index]] / 255 - run.mean) / run.std
        assert torch.allclose(v, clean) and torch.allclose(batch[x], clean)


def test_too_few_pairs_say_so(config):
    with pytest.raises(SidaeError, match=r"Only \d+ pairs of the 128 images have a cosine in \[0.9, 0.90001\] by simsiam"):
        trained(recipe(config, pair_low=0.9, pair_high=0.90001, pair_count=0, encoder_epoch=0))


@pytest.mark.parametrize("method", ["supervised", "untrained", "cpc_v2"])
def test_methods_that_are_not_trained_on_pairs(own_store, method):
    with pytest.raises(SidaeError, match=f"{method} is not trained on pairs"):
        trained(experiments.run(method, "digits", "smoke", pairs="oracle", pair_count=10))


@pytest.mark.parametrize("method", [m for m, cls in methods.METHODS.items()
                                    if not cls.labels and m not in ("untrained", "cpc_v2", "composed")])
def test_every_method_trains_on_pairs_and_can_find_them(own_store, method):
    config = experiments.run(method, "digits", "smoke", epochs=1)
    record = trained(recipe(config, pair_high=1.0))
    assert record["pairs"]["unordered"] == 30 and math.isfinite(record["epochs"][0]["loss"])


@pytest.mark.parametrize("leave_out", ["none", "same", "partners"])
def test_which_images_are_no_negatives(own_store, leave_out):
    """The loss of SimCLR and MoCo against a loop: per row, log of the sum over all that is left, its own partner too."""
    torch.manual_seed(0)
    images, i, j = data.by_fingerprint(experiments.run("simclr", "digits", "smoke").data), [3, 5, 3, 9], [3, 5, 7, 3]
    batch = {"i": torch.tensor(i), "j": torch.tensor(j)}
    views = tuple(torch.randn(4, 3, 32, 32) for _ in range(2))
    known = {(3, 7), (9, 3), (5, 11)}

    def kin(a, b):
        return leave_out != "none" and a == b or leave_out == "partners" and ((a, b) in known or (b, a) in known)

    def build(method, **more):
        c = experiments.run(method, "digits", "smoke", pairs="oracle", pair_count=3, leave_out=leave_out, **more)
        model = train.Run(c, images, CPU).method
        a, b = torch.tensor(sorted(known)).T
        model.partners = torch.cat([(a << 32) + b, (b << 32) + a]).sort().values
        return model, c.tau

    model, tau = build("simclr")
    z = F.normalize(torch.cat([model.projector(model.backbone(v)) for v in views]), dim=1)
    s, ids, slow = (z @ z.T / tau).tolist(), i + j, 0.0
    for r in range(8):
        twin = (r + 4) % 8
        left = [s[r][c] for c in range(8) if c == twin or c != r and not kin(ids[r], ids[c])]
        slow += (math.log(sum(map(math.exp, left))) - s[r][twin]) / 8
    assert model.loss(views, batch)["loss"].item() == approx(slow, rel=1e-4)

    model, tau = build("moco_v2", queue=64)
    model.queue.id[:6] = torch.tensor([3, 7, 5, 11, 9, -1])
    q, slow = F.normalize(model.projector(model.backbone(views[0])), dim=1), 0.0
    k = F.normalize(model.key(views[1]), dim=1)
    for r in range(4):
        own = (q[r] @ k[r] / tau).item()
        left = [own] + [(q[r] @ model.queue.z[c] / tau).item() for c in range(64) if not kin(i[r], model.queue.id[c].item())]
        slow += (math.log(sum(map(math.exp, left))) - own) / 4
    assert model.loss(views, batch)["loss"].item() == approx(slow, rel=1e-3)


def test_the_loop_tells_the_method_its_partners(config):
    c = experiments.run("moco_v2", "digits", "smoke", pairs="oracle", pair_count=20, pair_share=1.0, leave_out="partners")
    run = train.Run(c, data.by_fingerprint(c.data), CPU)
    (i, j), n = run.pairs[run.n :].T, 256
    found = run.method.kin(run.pairs[:n, 0], run.pairs[:n, 0])
    both = {*zip(i.tolist(), j.tolist()), *zip(j.tolist(), i.tolist())}
    rows = run.pairs[:n, 0].tolist()
    assert {(rows[a], rows[b]) for a, b in found.nonzero().tolist()} == both | {(a, a) for a in rows}


# --- pair accuracy as an evaluation ---------------------------------------------------------------------------------


def test_pair_accuracy_is_a_record(config):
    e = EvalConfig(run=config, kind="pairs", labels=0.1)
    record = runs.fetch_all([e], device="cpu", log=lambda _: None)[0]
    images = data.by_fingerprint(config.data).split("train")
    rows = data.subset(1437, count=144, seed=0)
    z = pairs.embed(store.backbone(config), images.images[rows], CPU)
    best = sorted(dense(z, -1, 1).items(), key=lambda p: -p[1])[:20]  # 14 % of 144
    listed_ = {(a, b) for a, b, _ in record["pairs"]["list"]}
    assert listed_ == {(rows[i].item(), rows[j].item()) for (i, j), _ in best}
    right = [int(images.labels[a] == images.labels[b]) for a, b in listed_]
    assert record["accuracy"] == approx(100 * sum(right) / 20) == record["pairs"]["accuracy"] and record["n_train"] == 144
    confusion = torch.tensor(record["confusion"])
    assert torch.equal(confusion, confusion.T) and confusion.sum() == 40 and confusion.trace() == 2 * sum(right)
    curve = record["pairs"]["curve"]
    assert [c["unordered"] for c in curve] == [1, 3, 7, 20, 72, 144, 288, 576] and curve[3]["hash"] == record["pairs"]["hash"]
    literal = len(dense(z, 0.97, 0.99))
    assert record["pairs"]["literal"]["unordered"] == min(576, literal)


def test_pairs_of_augmented_images_are_others(config):
    asked = [EvalConfig(run=config, kind="pairs", labels=0.1, augment=a) for a in ("none", "simsiam_grey")]
    one, other = runs.fetch_all(asked, device="cpu", log=lambda _: None)
    assert one["pairs"]["hash"] != other["pairs"]["hash"]
