"""Images of the reader's own: sets from every corner reach a verdict, and what they hide is said."""

import io
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pytest import approx
from scipy import stats

from sidae_lib import augment, data, experiments, frames, methods, networks, own, runs, store
from sidae_lib.config import EvalConfig, SidaeError
from sidae_lib.data import Split


@pytest.fixture(autouse=True)
def place(own_store, monkeypatch):
    monkeypatch.setenv("SIDAE_DATA", str(own_store / "data"))
    monkeypatch.setattr(data, "_names", {})
    return own_store


def noise(rng, *shape):
    return rng.normal(0, 25, shape)


def pixels(x) -> np.ndarray:
    return np.clip(x, 0, 255).astype(np.uint8)


def patterns(rng, y, size, channels):
    """Images of classes that differ by a coarse symmetric pattern: (N, size, size, channels)."""
    classes = int(y.max()) + 1
    half = rng.uniform(20, 235, (classes, 4, 2, 1)) + rng.uniform(-20, 20, (classes, 4, 2, channels)) * (channels > 1)
    coarse = np.concatenate([half, half[:, :, ::-1]], 2)[y]
    return pixels(coarse.repeat(-(-size // 4), 1).repeat(-(-size // 4), 2)[:, :size, :size] + noise(rng, len(y), size, size, 1))


def npz(place, x, y, test=0.25, **more) -> str:
    """The first part test, the rest train."""
    k = round(test * len(y))
    parts = {"train_images": x[k:], "train_labels": y[k:], "test_images": x[:k], "test_labels": y[:k]}
    np.savez(place / "set.npz", **{n: a for n, a in parts.items() if len(a)}, **more)
    return f"npz:{place / 'set.npz'}"


def folder(place, x, y, split="") -> str:
    for i, (image, c) in enumerate(zip(x, y)):
        (target := place / "set" / split / f"class {c}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(target / f"{len(image)}-{i}.{'jpg' if i % 2 else 'png'}")
    return str(place / "set")


def tiny(place, rng):
    y = np.arange(40) % 2
    return npz(place, patterns(rng, y, 8, 1)[..., 0], y)


def many_classes(place, rng):
    y = np.arange(3000) % 200
    return npz(place, patterns(rng, y, 32, 3), y)


def many_images(place, rng):
    y = rng.integers(0, 10, 20_000)
    x = patterns(rng, y, 32, 3)
    return npz(place, x[:6000], y[:6000], unlabeled_images=x[6000:])


def large_photos(place, rng):
    y = np.arange(60) % 3
    return folder(place, patterns(rng, y, 512, 3), y)


def unbalanced(place, rng):
    y = (np.arange(800) % 25 == 0).astype(int)
    return npz(place, patterns(rng, y, 28, 1)[..., 0], y)


def broken(place, rng):
    """Sizes and modes differ, one file is text, one is cut off, one is empty."""
    y = np.arange(90) % 3
    for size, rows in ((24, slice(0, 30)), (40, slice(30, 60)), (33, slice(60, 90))):
        folder(place, patterns(rng, y, size, 3 if size != 40 else 1)[rows], y[rows] + 0, split="train")
    files = sorted((place / "set").rglob("*.png"))
    files[0].write_text("no image"), files[1].write_bytes(b""), files[2].write_bytes(files[2].read_bytes()[:200])
    return f"folder:{place / 'set'}"


def random_labels(place, rng):
    y = np.arange(600) % 4
    x = patterns(rng, y, 32, 3)
    return npz(place, x, rng.permutation(y))


def colour_is_the_class(place, rng):
    y = np.arange(400) % 3
    hue = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])[y][:, None, None]
    return npz(place, pixels(hue + noise(rng, 400, 32, 32, 1)), y)


def brightness_is_the_class(place, rng):
    y = np.arange(400) % 2
    return npz(place, pixels((70 + 110 * y)[:, None, None] + noise(rng, 400, 16, 16)), y)


def side_is_the_class(place, rng):
    y = np.arange(400) % 2
    x = noise(rng, 400, 32, 32, 3) + 60
    x[y == 0, :, :8] += 120
    x[y == 1, :, -8:] += 120
    return npz(place, pixels(x), y)


def copies(place, rng):
    y = np.arange(200) % 4
    x = patterns(rng, y, 32, 3)
    x[:10], y[:10] = x[100:110], y[100:110]
    return npz(place, x, y)


def unlabeled(place, rng):
    y = np.arange(300) % 5
    x = patterns(rng, y, 28, 1)[..., 0]
    return npz(place, x[:100], y[:100, None], unlabeled_images=x[100:])


def all_alike(place, rng):
    return npz(place, np.full((120, 32, 32, 3), 90, np.uint8), np.arange(120) % 2)


def single_images(place, rng):
    """Twenty classes of twelve images, and five of one image; no test split."""
    y = np.r_[np.arange(240) % 20, np.arange(20, 25)]
    return npz(place, patterns(rng, y, 48, 3), y, test=0)


EXPECTED = {  # set -> its training and test images, augmentation, a word of what is said of it
    tiny: (30, 10, "simsiam_grey", "cannot be told from chance"),
    many_classes: (2250, 750, "simsiam_cifar", "of 512 images"),
    many_images: (4500, 1500, "simsiam_cifar", "14000 images of the unlabeled split"),
    large_photos: (48, 12, "simsiam_cifar", "There is no test split"),
    unbalanced: (600, 200, "simsiam_grey", "The classes are unbalanced"),
    broken: (70, 17, "simsiam_cifar", "3 files, damaged or unreadable"),
    random_labels: (450, 150, "simsiam_cifar", "cannot be told from chance"),
    colour_is_the_class: (300, 100, "simsiam_cifar_without_colour", "Warning: colour hides the class"),
    brightness_is_the_class: (300, 100, "simsiam_grey_without_colour", "Warning: colour hides the class"),
    side_is_the_class: (300, 100, "simsiam_cifar_without_flip", "Warning: flip hides the class"),
    copies: (150, 50, "simsiam_cifar", "10 of 50 test images are also training images"),
    unlabeled: (75, 25, "simsiam_grey", "200 images of the unlabeled split"),
    all_alike: (90, 30, "simsiam_grey", "are also training images"),
    single_images: (205, 40, "simsiam_cifar", "a fifth of each class, became one"),
}  # fmt: skip
TRAINED = (tiny, many_classes, broken, random_labels, unlabeled, all_alike, single_images)  # the others differ in nothing more


@pytest.mark.parametrize("make", [
    pytest.param(m, marks=pytest.mark.slow) for m in EXPECTED
], ids=lambda m: m.__name__)  # fmt: skip
def test_a_set_reaches_its_verdict(make, place):
    """The way of the notebook, from a folder or npz to what is said of the set and, for some, through training to the words."""
    n_train, n_test, views, word = EXPECTED[make]
    name, notes = own.prepare(make(place, np.random.default_rng(0)))
    images = data.load(name)
    table, warnings = own.look(images)
    assert (table.images["train"], table.images["test"]) == (n_train, n_test)
    network = experiments.run("sidae", name, "smoke", epochs=1, pool=0)
    plan = own.plan(images, network, own.STEPS["smoke"], labels=n_train // 2, seeds=(0, 1))
    assert plan.fields["augment"] == views and word in " ".join([*notes, *warnings, *plan.reasons])
    if make not in TRAINED:
        return
    _, evals = experiments.your_own_images("smoke", [name], (0, 1), plan)
    records = runs.fetch_all(evals, log=lambda _: None)
    words = own.verdict(records, n_train // 2)
    assert len(words) == 3 and f"{n_train // 2} labels (2 seeds, {n_test} test images)" in words[0]
    if make in (random_labels, all_alike):
        assert words[0].startswith("No help of pre-training is shown") and "none that could be shown" in words[2]
    assert {r["n_test"] for r in records} == {n_test} and n_train in {r["n_train"] for r in records}


def test_eight_images_and_more_labels_than_there_are(place):
    """Two classes of four images, and the notebook's own number of labels, come to a verdict and to maps of two points."""
    rng, y = np.random.default_rng(0), np.arange(8) % 2
    name, _ = own.prepare(folder(place, patterns(rng, y, 20, 3), y))
    images, network = data.load(name), experiments.run("sidae", name, "smoke", epochs=1, pool=0)
    plan = own.plan(images, network, 2, labels=144, seeds=(0, 1))
    assert (plan.labels, plan.counts, plan.fields["batch"]) == (6, (6,), 4)
    assert "6 labels instead of 144: there are no more training images with labels." in plan.reasons
    assert own.hidden(images, 144).equals(own.hidden(images)) and own.hidden(images)["images"].tolist() == [6, 6]
    configs, evals = experiments.your_own_images("smoke", [name], (0, 1), plan)
    maps = EvalConfig(run=configs[0], kind="tsne", perplexity=0.5)
    *records, near = runs.fetch_all([*evals, maps], log=lambda _: None)
    assert "6 labels (2 seeds, 2 test images)" in own.verdict(records, plan.labels)[0]
    assert len(near["tsne"]["xy"]) == len(frames.points([near])) / 2 == 2


@pytest.mark.parametrize(("n", "batch"), [(2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (63, 8), (64, 16), (255, 32), (256, 64),
                                          (1437, 64)])  # fmt: skip
def test_a_batch_fits_the_images(n, batch):
    """At most a quarter of the images, but eight where there are so many, and else the most of 2, 4 that there are."""
    digits = data.load("digits", size=8)
    split = Split(digits.split("train").images[:n], torch.arange(n) % 2)
    plan = own.plan(replace(digits, splits={"train": split}), experiments.run("sidae", "digits", "smoke", epochs=1, pool=0), 8)
    assert plan.fields["batch"] == batch and plan.fields["pool"] <= n


# --- the verdict's arithmetic ---------------------------------------------------------------------------------------


def record(method, seed, labels, accuracy, n_test=10_000):
    run = {"method": method} | ({"seed": seed} if seed else {})
    return {"config": {"run": run}, "n_train": labels, "accuracy": accuracy, "n_test": n_test}


def records_of(**curves):
    """method -> {labels: accuracies by seed}."""
    return [record(m, seed, labels, a) for m, curve in curves.items() for labels, by_seed in curve.items()
            for seed, a in enumerate(by_seed)]  # fmt: skip


CURVES = {"sidae": {100: (80, 81, 82)}, "simsiam": {100: (60, 61, 59)}, "dae": {100: (79, 82, 81)},
          "supervised": {10: (20, 20, 20), 100: (70, 71, 72), 1000: (90, 90, 90)},
          "untrained": {10: (30, 30, 30), 100: (60, 60, 61), 1000: (70, 70, 70)}}  # fmt: skip


def test_the_interval_is_students_and_the_test_sets():
    """Paired differences without a spread leave the binomial error of the test images alone; with one, both add up."""
    words = own.verdict(records_of(**CURVES), 100)
    z = stats.norm.isf(0.05 / 6)
    half = 100 * z * math.sqrt((0.81 * 0.19 + 0.71 * 0.29) / 10_000)  # sidae - supervised is 10 for every seed
    assert words[0].startswith("Yes: pre-training helps with 100 labels (3 seeds, 10000 test images). SidAE scores 81.0 %")
    assert f"+10.0 points ({10 - half:+.1f} to {10 + half:+.1f}) against the supervised network" in words[0]
    d = np.array([20, 21, 21])  # sidae - untrained
    p = np.mean([60, 60, 61]) / 100
    half = math.hypot(stats.t.isf(0.05 / 6, 2) * d.std(ddof=1) / math.sqrt(3),
                      100 * z * math.sqrt((0.81 * 0.19 + p * (1 - p)) / 10_000))  # fmt: skip
    assert f"{d.mean():+.1f} points ({d.mean() - half:+.1f} to {d.mean() + half:+.1f}) against the untrained" in words[0]


def test_which_method_and_what_it_is_worth():
    words = own.verdict(records_of(**CURVES), 100)
    assert words[1].startswith("Which method: SidAE has the highest mean, +0.3 points") and "not told apart" in words[1]
    assert "+21.0 points" in words[1] and "SimSiam scores" not in words[0]  # below both baselines
    half = 100 * stats.norm.isf(0.05 / 6) * math.sqrt((0.81 * 0.19 + 0.71 * 0.29) / 10_000)
    between = [100 * 10 ** ((a - 71) / 19) for a in (81 - half, 81 + half)]  # log-linear from (100, 71) to (1000, 90)
    assert words[2].endswith(f"with {between[0]:.0f} to {between[1]:.0f}.")
    high = {**CURVES, "sidae": {100: (95, 95, 95)}}
    assert own.verdict(records_of(**high), 100)[2].endswith("with more than 1000 to more than 1000.")


@pytest.mark.parametrize("change", [
    {"supervised": {100: (85, 86, 87)}},  # above one baseline only
    {"untrained": {100: (85, 86, 87)}},
    {"sidae": {100: (40, 99, 99)}, "dae": {100: (40, 99, 99)}},  # the seeds disagree
])  # fmt: skip
def test_no_help_where_one_interval_holds_zero(change):
    words = own.verdict(records_of(**CURVES | change), 100)
    assert words[0].startswith("No help of pre-training is shown with 100 labels") and "none" in words[2]


def test_a_small_test_set_shows_nothing():
    records = [{**r, "n_test": 40} for r in records_of(**CURVES)]
    assert own.verdict(records, 100)[0].startswith("No help")
    assert own.verdict([{**r, "n_test": 4000} for r in records], 100)[0].startswith("Yes")


def test_random_gains_are_seldom_called_help():
    """Every network guesses among four classes on 150 test images, and its seeds share their luck with them: help in at
    most 5 of 200 such experiments, though over seeds alone most differences would look certain."""
    rng, wrong = np.random.default_rng(0), 0
    draw = lambda: tuple(100 * np.clip(rng.binomial(150, 0.25) + rng.normal(0, 1, 3), 0, 150) / 150)  # noqa: E731
    for _ in range(200):
        records = records_of(**{m: {50: draw()} for m in ("sidae", "simsiam", "dae", "supervised", "untrained")})
        wrong += own.verdict([{**r, "n_test": 150} for r in records], 50)[0].startswith("Yes")
    assert wrong <= 5


def test_one_seed_has_no_verdict():
    with pytest.raises(SidaeError, match="at least two seeds"):
        own.verdict([r for r in records_of(**CURVES) if not r["config"]["run"].get("seed")], 100)


# --- the model card -------------------------------------------------------------------------------------------------


def test_a_card_stands_beside_the_backbone_and_its_lines_load_it(place, monkeypatch):
    """Real runs of two seeds: the interval written out here, no path of the reader's, and the lines that it shows, executed."""
    y = np.arange(160) % 4
    images = data.load(name := own.prepare(folder(place, patterns(np.random.default_rng(0), y, 12, 3), y))[0])
    both = [experiments.run("simsiam", name, "smoke", seed, epochs=1, batch=64) for seed in (0, 1)]
    evals = [EvalConfig(run=r, kind="logistic", label_count=n, label_seed=r.seed) for r in both for n in (40, 80)]
    records = runs.fetch_all([*both, *evals], device="cpu", log=lambda _: None)
    records[2]["accuracy"], records[4]["accuracy"] = a = np.array([70.0, 71.5])  # a set as easy as this leaves no interval
    path = own.card(both[0], images, records, 40)
    text, weights = path.read_text(), store.backbone(both[0])
    assert path == weights.with_suffix(".md") and {f.name for f in path.parent.iterdir()} >= {path.name, weights.name}
    half = math.hypot(stats.t.isf(0.025, 1) * a.std(ddof=1) / 2**0.5, 100 * stats.norm.isf(0.025) * math.sqrt(
        0.7075 * 0.2925 / 32))  # fmt: skip
    assert f"70.8 % (95 % interval {70.75 - half:.1f} to {70.75 + half:.1f}, n = 2), 32 test images; of this seed 70.0" in text
    for word in ("# SimSiam on set (own copy)", "SimSiam (arXiv:2011.10566), seed 0", f"fingerprint {images.fingerprint}",
                 "128 images of the train split, 2 steps of 64, epochs: 1, simsiam", "40 labels", "Licence of the code: MIT",
                 f"less mean {list(images.mean)}, over std {list(images.std)}", records[0]["provenance"]["device"]):
        assert word in text, word
    assert str(place) not in text
    monkeypatch.chdir(path.parent)
    exec(text.split("```python\n")[1].split("```")[0], shown := {})
    net, x = networks.load(weights), shown["pixels"]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (images.mean, images.std))
    with torch.no_grad():
        assert torch.allclose(shown["features"], net((x / 255 - mean) / std), atol=1e-5) and x.dtype == torch.uint8
    one = own.card(both[1], images, records[:1] + records[4:], 40).read_text()
    assert "71.5 % (no interval from one seed, n = 1)" in one
    other = records[4] | {"key": "another"}
    for given, labels in ((records, 41), (records[4:], 40), ([*records, other], 40)):
        with pytest.raises(SidaeError, match=f"needs its images, its record and, with {labels} labels, one evaluation by"):
            own.card(both[0], images, given, labels)
    weights.unlink()
    with pytest.raises(SidaeError, match="There is no file"):
        own.card(both[0], images, records, 40)


def test_every_method_of_a_paper_names_it():
    """What a card says: the first number in the class's words, or else in its file's."""
    ours = {"sidae", "dae", "supervised"}
    named = {m: own.paper(m) for m in methods.METHODS}
    assert {m for m, paper in named.items() if not paper} == {"untrained", "pairwise", "triplet"}
    assert {m for m, paper in named.items() if paper == "arXiv:2304.02549"} == ours and named["moco_v2"] == "arXiv:2003.04297"


# --- its parts ------------------------------------------------------------------------------------------------------


def test_mirrored_digits_are_no_digits_any_more():
    table = own.hidden(data.load("digits"))
    assert table["images"].tolist() == [1437, 1437] and table.hides.tolist() == [True, False]
    assert table["error with"]["flip"] > 20 > 5 > table["error without"]["flip"]


@pytest.mark.parametrize(("make", "hides"), [
    (colour_is_the_class, [False, True]), (brightness_is_the_class, [False, True]), (side_is_the_class, [True, False]),
    (copies, [False, False]), (random_labels, [False, False]), (all_alike, [False, False]),
])  # fmt: skip
def test_what_hides_the_class(make, hides, place):
    images = data.load(own.prepare(make(place, np.random.default_rng(0)))[0])
    assert own.hidden(images).hides.tolist() == hides


def test_hidden_is_a_loop():
    images = data.load("digits", size=8, channels=1)
    x, y = images.split("train").images[:, 0].double() / 255, images.split("train").labels
    rows = data.subset(len(y), count=60)
    wrong = {"plain": 0, "flip": 0, "colour": 0}
    for i in rows:
        def nearest(f, i=i):
            return min((j for j in rows if j != i), key=lambda j: f(x[i], x[j]))
        def shape(a):
            return (a - a.mean()) / a.std()
        ways = {"plain": lambda a, b: (a - b).norm(), "colour": lambda a, b: (shape(a) - shape(b)).norm(),
                "flip": lambda a, b: (a.flip(1) - b).norm()}  # fmt: skip
        for name, f in ways.items():
            wrong[name] += int(y[nearest(f)] != y[i])
    table = own.hidden(images, labels=60)
    for name in ("flip", "colour"):
        assert table["error without"][name] == approx(100 * wrong["plain"] / 60, abs=0.1)
        assert table["error with"][name] == approx(100 * wrong[name] / 60, abs=0.1)


def test_views_without_an_augmentation_lack_only_it():
    kinds = lambda name: [op.name for op in augment.VIEWS[name].first]  # noqa: E731
    assert kinds("simsiam_cifar_without_flip") == ["jitter", "crop", "grey"]
    assert kinds("simsiam_cifar_without_colour") == ["crop", "flip"]
    assert kinds("simsiam_grey_without_flip_colour") == ["crop", "blur"]


def test_a_time_budget_sets_the_length():
    images = data.load("digits")
    network = experiments.run("sidae", "digits", "smoke", epochs=1, pool=0)
    short, long = (own.plan(images, network, 8, minutes=m, seeds=(0, 1, 2)) for m in (0.2, 20))
    assert short.steps < long.steps and short.fields["epochs"] <= long.fields["epochs"]
    assert any("one takes" in r and "0.2 minutes" in r for r in short.reasons)
    assert own.plan(images, network, 8, minutes=math.inf, seeds=[]).steps == max(200 * (1437 // 64), 2500)
    for minutes in (-1, math.nan):
        with pytest.raises(SidaeError, match="^budget is minutes, or 0 for the scale's length, not"):
            own.plan(images, network, 8, minutes=minutes)


def test_a_split_is_made_once_and_is_the_same(place):
    name = folder(place, patterns(rng := np.random.default_rng(0), y := np.arange(50) % 5, 20, 3), y)
    first, second = (data.load(own.prepare(name)[0]) for _ in range(2))
    assert first.fingerprint == second.fingerprint and first.classes == tuple(f"class {c}" for c in range(5))
    assert torch.bincount(first.split("test").labels).tolist() == [2] * 5
    del rng


@pytest.mark.parametrize(("make", "word"), [
    (lambda p: str(p / "nowhere"), "There is no data set"),
    (lambda p: folder(p, np.zeros((4, 8, 8, 3), np.uint8), [0] * 4), "has only one class folder"),
    (lambda p: (p / "set.npz").write_bytes(b"PK") and f"npz:{p / 'set.npz'}", "could not be read"),
    (lambda p: npz(p, np.arange(8.0)[:, None, None] * np.ones((8, 8)), np.arange(8) % 2), "no known scale"),
])  # fmt: skip
def test_what_cannot_be_used_is_a_sentence(make, word, place):
    with pytest.raises(SidaeError, match=word):
        data.load(own.prepare(make(place))[0])


def test_more_labels_than_images_are_all_of_them():
    images, network = data.load("digits", size=8), experiments.run("sidae", "digits", "smoke", epochs=1)
    cut, every = (own.plan(images, network, 8, labels=n) for n in (2000, 0))
    assert cut.labels == every.labels == 1437 and cut.counts == every.counts and cut.fields == every.fields
    said = [r for r in cut.reasons if r not in every.reasons]
    assert said == ["1437 labels instead of 2000: there are no more training images with labels."]
    for labels in (-1, 2.5):
        with pytest.raises(SidaeError, match="^Cannot draw -1 of 1437|^labels must be int"):
            own.plan(images, network, 8, labels=labels)


def test_a_verdict_on_a_number_of_labels_without_records():
    with pytest.raises(SidaeError, match="^No record has 999 labels; give one of 10, 100, 1000"):
        own.verdict(records_of(**CURVES), 999)


def test_labels_of_one_class(place):
    y = np.r_[np.zeros(99, int), 1, np.arange(20) % 2]
    images = data.load(own.prepare(npz(place, patterns(np.random.default_rng(0), y, 16, 1)[..., 0], y, test=0.2))[0])
    with pytest.raises(SidaeError, match="all of one class"):
        own.plan(images, experiments.run("sidae", "digits", "smoke", epochs=1), 8, labels=3)


def test_needed_labels_between_the_points():
    curve = pd.Series({10: 20.0, 100: 40.0, 1000: 30.0})  # a fall counts as standing still
    assert own._needed(curve, 30) == f"{10 ** 1.5:.0f}" and own._needed(curve, 10) == "10"
    assert own._needed(curve, 41) == "more than 1000"


# --- what is seen before training -----------------------------------------------------------------------------------


def photographs(rng, n):
    """Rich scenes in colour, (n, 32, 32, 3): noise at every scale."""
    x = sum(F.interpolate(torch.from_numpy(rng.normal(0, 20, (n, 3, 32 >> k, 32 >> k))), size=32, mode="bilinear")
            for k in range(5))  # fmt: skip
    return pixels((128 + x).permute(0, 2, 3, 1).numpy())


def saved_again(x):
    """As another program would have it: a JPEG, and brighter."""
    out = []
    for image in np.minimum(x.astype(int) + 12, 255).astype(np.uint8):
        Image.fromarray(image).save(content := io.BytesIO(), "JPEG", quality=75)
        out.append(np.asarray(Image.open(content)))
    return np.stack(out)


def filmed(rng, x):
    """The next frame: a pixel down, a pixel to the left, other noise of the sensor."""
    return pixels(np.roll(x, (1, -1), (1, 2)) + noise(rng, *x.shape) / 10)


def test_near_copies_are_told_and_exact_ones_apart(place):
    rng = np.random.default_rng(0)
    x, y = photographs(rng, 300), np.arange(300) % 3
    x[:30], x[30:60], x[60:70] = saved_again(x[100:130]), filmed(rng, x[130:160]), x[200:210]
    table, warnings = own.look(data.load(npz(place, x, y, test=1 / 3)))
    assert (table.copies["test"], table.near["test"], table.near["train"]) == (10, 60, "-")
    assert warnings[0] == "10 of 100 test images are also training images: accuracies are too high."
    assert warnings[1].startswith("60 of 100 test images are nearly the same as a training image") and len(warnings) == 3


def test_images_of_their_own_are_no_near_copies(place):
    """Strangers, and a few copies too little to matter, give no warning; digits are too plain to be judged."""
    x, y = photographs(np.random.default_rng(0), 1600), np.arange(1600) % 3
    x[:4] = saved_again(x[800:804])
    table, warnings = own.look(data.load(npz(place, x, y, test=0.25)))
    assert table.near["test"] == 4 and not warnings
    assert own.look(data.load("digits"))[0].near["test"] == "-"


def test_of_many_pairs_some_are_compared(place, monkeypatch):
    monkeypatch.setattr(own, "PAIRS", 75 * 20)
    images = data.load(npz(place, photographs(np.random.default_rng(0), 100), np.arange(100) % 2))
    assert "Near copies were looked for among 20 of the 25 test images." in own.look(images)[1]


def test_what_was_left_out_has_a_column_a_reason():
    images = replace(data.load("digits"), left=(("train", "damaged", 3), ("test", "damaged", 1), ("", "not an image", 2)))
    table, _ = own.look(images)
    assert table.damaged.to_dict() == {"train": 3, "test": 1, "-": 0}
    assert table["not an image"].to_dict() == {"train": 0, "test": 0, "-": 2} and table.images["-"] == "-"


@pytest.mark.parametrize(("splits", "why"), [
    (lambda s: {"unlabeled": data.Split(s["train"].images)}, "no train split with labels"),
    (lambda s: {"train": s["train"]}, "no test split with labels"),
    (lambda s: s | {"test": data.Split(s["test"].images)}, "no test split with labels"),
    (lambda s: s | {"train": data.Split(s["train"].images, torch.zeros_like(s["train"].labels))}, "of one class"),
])  # fmt: skip
def test_without_a_verdict_there_is_a_table(splits, why):
    images = data.load("digits")
    images = replace(images, splits=splits(images.splits))
    with pytest.raises(SidaeError, match=f"{why}, so no verdict"):
        own.look(images)
    table, warnings = own.look(images, verdict=False)
    assert [*table.index] == [*images.splits] and why in warnings[0]


def test_check_says_what_the_notebook_says(cli, place):
    name = folder(place, patterns(rng := np.random.default_rng(0), y := np.arange(60) % 3, 24, 3), y)
    before = {f: f.stat().st_mtime_ns for f in place.joinpath("set").rglob("*")}
    said = cli("check", name, "--sheet", str(place / "sheet.png"))
    images = data.load(own.prepare(name)[0])
    table, warnings = own.look(images)
    assert (said.returncode, said.stderr) == (0, "") and table.to_string() in said.stdout
    assert all(w in said.stdout for w in warnings) and "became one" in said.stdout
    with Image.open(place / "sheet.png") as sheet:
        assert sheet.format == "PNG"
    assert before == {f: f.stat().st_mtime_ns for f in place.joinpath("set").rglob("*")}
    del rng


@pytest.mark.parametrize(("args", "word"), [
    (lambda p: (str(p / "nowhere"),), "There is no data set"),
    (lambda p: ("digits", "--size", "0"), "size"),
    (lambda p: ("digits", "--sheet", str(p / "no folder" / "sheet.png")), "could not be written"),
    (lambda p: ("digits", "--sheet", str(p)), "could not be written"),
    (lambda p: (str((p / "a.npz").write_bytes(b"PK") and p / "a.npz"),), "could not be read"),
    (lambda p: (npz(p, np.zeros((8, 9, 9), np.uint8), np.zeros(8, int)),), "cannot be trained on"),
])  # fmt: skip
def test_check_refuses_in_a_sentence(cli, args, word, place):
    said = cli("check", *args(place))
    assert said.returncode == 2 and word in said.stderr and said.stderr.count("\n") == 1


def test_check_of_unlabeled_images_alone(cli, place):
    np.savez(place / "set.npz", unlabeled_images=photographs(np.random.default_rng(0), 20))
    said = cli("check", f"npz:{place / 'set.npz'}", "--sheet", str(place / "sheet.png"))
    assert said.returncode == 0 and "only pre-training is possible" in said.stdout and (place / "sheet.png").exists()
