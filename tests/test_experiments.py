"""What the figures ask for, and the figures themselves drawn again from nothing but their CSV."""

import numpy as np
import pytest

from sidae_lib import data, diagrams, experiments, frames, methods, own, runs, scales, store, tasks
from sidae_lib.config import EvalConfig, RunConfig, SidaeError
from tests.test_data import write_stl

RECIPE_1 = ("094fe7b56ed1ddd9", "54eb9413e71a7d90", "62888f3fba65269c", "717e75a0238bd7c3", "9b88f5264c42e5f0",
            "fa33f0f7624d003a")  # records/: four of five_axes, two of semantic_pairs  # fmt: skip


def recorded(e: EvalConfig, accuracy: float) -> dict:
    """An evaluation's record, as far as figures read it."""
    name, display = data.KNOWN[e.data or e.run.data]
    return {"config": e.to_dict(), "data": {"name": name, "display": display}, "epoch": e.epoch, "kind": e.kind,
            "n_train": 500, "n_test": 10_000, "accuracy": accuracy, "run_key": e.run.key(),
            "provenance": {"device": "x", "threads": 1}}  # fmt: skip


def test_the_ends_of_the_sweep_are_the_autoencoder_and_simsiam():
    runs_, evals = experiments.w_sweep("laptop", (), (0, 1))
    plain = [r for r in runs_ if r.target == "standardised"]
    assert [(r.method, r.w) for r in plain if r.seed == 0] == [("dae", 0.5), ("sidae", 0.25), ("sidae", 0.5), ("sidae", 0.75),
                                                               ("simsiam", 0.5)]  # fmt: skip
    assert set(plain) <= set(experiments.accuracy_vs_epochs("laptop", (), (0, 1))[0]) | {r for r in plain if r.w != 0.5}
    assert {r.seed for r in runs_ if r.target == "unit"} == {0}
    assert all(e.epoch == e.run.epochs for e in evals)


def test_table_1_trains_nothing_of_its_own():
    table, evals = experiments.datasets_table("laptop")
    others = {r for build in (experiments.accuracy_vs_epochs, experiments.stl_transfer) for r in build("laptop")[0]}
    assert set(table) <= others and {e.kind for e in evals} == {"linear", "classifier"}
    assert all(e.epoch == e.run.epochs and e.score_on == "test" for e in evals)


@pytest.mark.parametrize("scale", ["smoke", "quick", "laptop", "paper"])
def test_the_open_choices_are_asked_for_apart(scale):
    """By `run` and by the book's counts, and never by a figure of a paper: they would hold back its panel."""
    trained, asked = experiments.open_choices(scale)
    assert (scale == "quick") == (not asked) and {"open_choices", "jpeg_again"} <= {*experiments.needs(scale)}
    assert {*trained} == ({e.run for e in asked} if scale != "paper" else set())  # which needs no run's end
    assert not {"open_choices", "jpeg_again"} & {*experiments.evaluations(scale)}


CHANGES = {"targets in [0, 1]": {"target"}, "twice the rate": {"lr"}, "twice the steps": {"epochs"},
           "residual blocks start at 0": {"zero_init"}, "each view restored": {"recon_target"},
           "no decay of biases": {"decay_bias"}, "narrow projector": {"hidden"}, "affine projector": {"proj_affine"},
           "decoder half as wide": {"decoder"}, "blur, as on MNIST": {"augment"}, "raw pixels, targets too": {"stats"},
           "predictor's rate constant": {"predictor_lr"}, "CIFAR stem": {"stem"}}  # fmt: skip


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_a_hypothesis_is_one_change_and_never_looks_at_test(scale):
    cases = experiments.hypotheses(scale)
    base = {(e.run.method, e.run.seed, e.labels): e.run.to_dict() for e in cases.pop("none")}
    assert list(cases) == [change for change in CHANGES if scale == "laptop" or change != "twice the steps"]
    for change, evals in cases.items():
        for e in evals:
            a, b = e.run.to_dict(), base[e.run.method, e.run.seed, e.labels]
            read = {f for f in CHANGES[change] if f in methods.METHODS[e.run.method].reads or f not in methods.SHARED}
            assert {k for k in a | b if a.get(k) != b.get(k)} == read
        tried = {e.run.seed for e in evals}
        assert tried == ({4} if scale == "paper" else {0} if list(CHANGES).index(change) > 3 else {0, 1, 2})
        assert len(evals) == 2 * len(tried) * (2 if scale == "paper" else 3)  # shares of labels, methods
        assert {(e.score_on, e.labels) for e in evals} == {("val", labels) for labels in experiments.scale_of(scale).labels}
        assert all(e.epoch == (25 if scale == "paper" else e.run.epochs) for e in evals)


def test_a_choice_at_paper_scale_trains_to_its_first_checkpoint_alone():
    jobs = tasks.plan([c for part in experiments.open_choices("paper") for c in part], until=25)
    assert {(job.until, *job.epochs) for job in jobs} == {(25, 25)} and len(jobs) == 23  # two methods, less what each reads not
    known = {r["key"] for r in store.every("run", store.published())}
    assert not {job.run.key() for job in jobs} & known  # evaluations of another training would not be filed


def test_the_hypotheses_of_other_scales_and_sets():
    assert experiments.hypotheses("quick") == {}
    assert list(experiments.hypotheses("smoke")) == ["none", *list(CHANGES)[:3]]  # its network has no residual block
    [e, *_] = experiments.hypotheses("laptop", "mnist")["no blur"]
    assert e.run.augment == "simsiam_grey_without_blur"


def test_a_summed_error_cannot_be_trained_at_this_rate(own_store):
    """Why `hypotheses` leaves `recon` "sum" out."""
    run = experiments.run("sidae", "photos", "laptop", epochs=1, pool=1280).replace(recon="sum")
    with pytest.raises(SidaeError, match="loss is not finite at epoch 1"):
        runs.fetch_all([run], log=lambda _: None)


def test_the_lead_is_against_the_better_of_the_two():
    """By seed: 50 - max(40, 45) = 5 and 60 - max(70, 30) = -10; with scarce labels 1 less everywhere but for SidAE."""
    evals = experiments.hypotheses("laptop", ["cifar10"], [0, 1])["none"]
    values = iter((50.0, 40.0, 45.0, 60.0, 70.0, 30.0, 50.0, 39.0, 44.0, 60.0, 69.0, 29.0))
    records = [recorded(e, next(values)) for e in evals]
    row, scarce = frames.order({"none": records}).to_dict("records")
    assert (row["labels"], scarce["labels"], scarce["lead"]) == (0.1, 0.01, -1.5)
    assert (row["sidae"], row["simsiam"], row["dae"], row["n"], row["lead"]) == (55, 55, 37.5, 2, -2.5)
    assert row["SidAE leads"] == "undecided (n = 2)" and row["low"] < -90
    assert set(frames.order({"none": records, "not run yet": []})["change"]) == {"none"}


def test_a_gain_is_paired_by_seed_and_leaves_out_whom_a_change_does_not_concern():
    """Without a change 50 and 60; with it the second seed alone, 63: +3, not 63 - 55. Half of its interval is the chance of
    two independent samples of 10,000 images. SimSiam has no target, so it is not named."""
    cases = {c: [e for e in each if e.run.method != "dae"]
             for c, each in experiments.hypotheses("laptop", ["cifar10"], [0, 1]).items()}  # fmt: skip
    value = {"sidae": (50.0, 60.0), "simsiam": (40.0, 41.0)}
    none = [recorded(e, value[e.run.method][e.run.seed] - 10 * (e.labels < 0.1)) for e in cases["none"]]
    unit = [recorded(e, 63.0) for e in cases["targets in [0, 1]"] if e.run.seed == 1]
    row, scarce = frames.gains({"none": none, "targets in [0, 1]": unit, "not run yet": []}).to_dict("records")
    half = 1.96 * ((63 * 37 + 60 * 40) / 10_000) ** 0.5
    assert (row["method"], row["gain"], row["n"], row["half"]) == ("sidae", 3.0, 1, round(half, 2))
    assert (row["labels"], scarce["labels"], scarce["method"], scarce["gain"]) == (0.1, 0.01, "sidae", 13.0)
    assert frames.gains({"none": []}).empty and frames.gains({}).empty
    assert frames.gains({"none": none[:1], "targets in [0, 1]": unit}).empty  # nothing to pair with


def test_a_lead_needs_every_method():
    evals = experiments.hypotheses("laptop", ["cifar10"], [0])
    records = {c: [recorded(e, 50.0) for e in each] for c, each in evals.items()}
    records["CIFAR stem"] = [r for r in records["CIFAR stem"] if r["config"]["run"]["method"] != "dae"]
    changes = {*frames.order(records)["change"]}
    assert "CIFAR stem" not in changes and "raw pixels, targets too" in changes


def test_what_was_found_is_said_in_a_sentence(own_store):
    """The mean of the seeds with scarce labels, after the last epoch, by the SGD probe; nothing while either is missing."""
    evals = experiments.accuracy_vs_epochs("smoke", ["digits"], [0, 1])[1]
    high = {"sidae": 60.0, "untrained": 40.0}
    records = [recorded(e, high.get(e.run.method, 99.0) + 2 * e.run.seed if (e.kind, e.epoch, e.labels) ==
                        ("linear", e.run.epochs, 0.1) else 5.0) for e in evals]  # fmt: skip
    assert frames.found(records) == "SidAE 61.0 %, untrained 41.0 % of digits with 10 % of the labels, 2 seeds"
    assert frames.found([]) == frames.found([r for r in records if r["config"]["run"]["method"] != "sidae"]) == ""


def test_what_lies_below_the_untrained_network_is_said_with_its_cause(own_store):
    """SimSiam by the SGD probe and not by logistic regression; the autoencoder by every probe, its projections collapsed;
    SidAE by kNN alone, which no learning rate explains."""
    evals = experiments.accuracy_vs_epochs("smoke", ["digits"], [0])[1]
    low = {("simsiam", "linear"), ("sidae", "knn"), *(("dae", kind) for kind in ("linear", "logistic", "knn"))}
    records = [recorded(e, 30.0 if (e.run.method, e.kind) in low else 40.0 if e.run.method == "untrained" else 50.0)
               for e in evals]  # fmt: skip
    runs_ = [{"data": {"display": "digits"}, "config": r.to_dict(), "epochs": [{"z_std": z * r.dim**-0.5}]}
             for r, z in ((e.run, {"dae": 0.1}.get(e.run.method, 0.9)) for e in evals) if r.epochs]  # fmt: skip
    few, many = ([s for s in frames.below(records, runs_) if f"{n} % of the labels" in s] for n in (10, 20))
    assert len(few) == len(many) == 3
    dae, sidae, simsiam = sorted(few)
    assert sidae.endswith("of the labels, by kNN. Spread of its projections, z_std: 0.90 of the healthy value (0: collapsed).")
    assert dae == ("Autoencoder lies below the untrained network on digits with 10 % of the labels, by SGD probe, logistic "
                   "regression, kNN. Spread of its projections, z_std: 0.10 of the healthy value (0: collapsed).")  # fmt: skip
    assert "by SGD probe. By logistic regression, which standardises the features, it does not" in simsiam
    assert frames.below([], []) == []


def test_records_of_an_older_recipe_are_read_and_enter_no_figure():
    """The laptop runs of BYOL and DINO whose momentum ran a step ahead: found by their configs, asked for by no figure, not
    made again; today's run of the same fields is asked for instead."""
    theirs = ("five_axes", "semantic_pairs", "pairs_found")
    needs = [need for s in experiments.SCALES for need in experiments.needs(s, theirs).values()]
    asked = {c.key() for need in needs for part in need for c in part}
    found = [store.read(line) for (run, _), line in store.published().items() if run in RECIPE_1]
    assert len(found) == 6 + 14
    for record in found:
        one = (EvalConfig if "run" in record["config"] else RunConfig).from_dict(record["config"])
        r = one.run if isinstance(one, EvalConfig) else one
        assert r.key() in RECIPE_1 and r.method_recipe == 1 and store.find(one) == record
        assert one.key() not in asked and r.key() not in asked and r.replace().key() in asked
        with pytest.raises(SidaeError, match=f"older recipe of {r.method}"):
            runs.fetch_all([one])


def test_fine_tuning_takes_the_chosen_w_once_it_is_known(own_store, monkeypatch):
    before = experiments.fine_tuning("laptop", ["mnist"])
    assert set(experiments.w_sweep("laptop", ["mnist"])[1]) <= set(before[1])
    monkeypatch.setattr(experiments, "best_w", lambda *_: 0.75)
    evals = experiments.fine_tuning("laptop", ["mnist"], [0])[1]
    assert {e.run.w for e in evals if e.kind == "finetune" and e.run.method == "sidae"} == {0.5, 0.75}
    tuned = [e for e in evals if e.kind == "finetune" and e.run.method == "simsiam" and e.labels == 0.1]
    assert [e.epoch for e in tuned] == [experiments.checkpoints(tuned[0].run, 5)[0], tuned[0].run.epochs]


def test_stl10_in_its_own_format_is_pre_trained_on_and_classified(own_store, tmp_path, monkeypatch):
    """The paper's path to Figure 7, on files as STL-10 ships them: unlabeled images in, labels of the train split only."""
    monkeypatch.setenv("SIDAE_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    write_stl(tmp_path / "data", monkeypatch)
    smoke = experiments.SCALES["smoke"]
    monkeypatch.setitem(experiments.SCALES, "smoke", scales.Scale(**{
        **vars(smoke), "epochs": {"stl10": 1}, "pool": {}, "labels": (1.0, 0.5), "transfer": ("stl10", "stl10", "digits"),
        "run": smoke.run | {"batch": 8}, "datasets": ("stl10",)}))  # fmt: skip
    configs, evals = experiments.stl_transfer("smoke")
    assert {r.split for r in configs if r.method in ("sidae", "simsiam", "dae")} == {"unlabeled"}
    chosen = [e for e in evals if e.kind == "linear" and e.run.method == "sidae" and e.labels == 1.0]
    record, stl, digits = runs.fetch_all([chosen[0].run, *chosen], log=lambda _: None)
    assert record["steps"] == 1 and record["images"] == 8  # of nine unlabeled images, one batch
    assert (stl["data"]["name"], stl["n_train"], stl["n_test"]) == ("stl10", 20, 6)
    assert (digits["data"]["name"], digits["n_train"]) == ("digits", 1437)


def test_a_pool_without_a_training_split_serves_the_untrained_network_too(own_store, monkeypatch):
    monkeypatch.setenv("SIDAE_DATA", str(own_store / "data"))
    (own_store / "data").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)
    np.savez(own_store / "data" / "pool.npz", unlabeled_images=images)
    runs_, evals = scales.pretrained("pool", "smoke", 0, on=("digits",), split="unlabeled", methods=("untrained",))
    assert [r.split for r in runs_] == ["unlabeled"]
    assert runs.fetch_all(evals[:1], log=lambda _: None)[0]["data"]["name"] == "digits"


def test_neighbours_are_drawn_from_the_record_or_from_the_data(trained, monkeypatch):
    """The same pixels, frames and words either way; a record of today needs no data, one of before needs them."""
    configs, evals = experiments.tsne("smoke", ["digits"])
    (record,) = runs.fetch_all([e for e in evals if e.run.method == "untrained"], log=lambda _: None)
    images = data.load("digits")
    older = {k: v for k, v in record.items() if k not in ("thumbnails", "near_labels")}
    figs = [diagrams.neighbours(older)]
    monkeypatch.setattr(data, "by_fingerprint", None)  # not at hand
    figs.append(diagrams.neighbours(record))
    for fig in figs:
        (ax,) = fig.axes
        shown, x, y = ax.images[0].get_array(), ax.get_xticks(), ax.get_yticks()
        frames_ = {(p.get_x() + 16.5, p.get_y() + 16.5): p.get_linestyle() for p in ax.patches}
        for row, (query, near) in enumerate(zip(record["points"], record["neighbours"])):
            for column, image in enumerate([images.split("test").images[query], *images.split("train").images[near]]):
                top, left = int(y[row]) - 16, int(x[column]) - 16
                drawn = shown[top : top + 32, left : left + 32] * 255
                assert np.abs(drawn - image.permute(1, 2, 0).numpy()).max() < 0.01
            same = images.split("train").labels[near] == images.split("test").labels[query]
            assert [frames_[x[k], y[row]] for k in range(1, 6)] == ["-" if right else "--" for right in same]
        hits = [(images.split("train").labels[n] == images.split("test").labels[q]).float().mean().item()
                for q, n in zip(record["points"], record["neighbours"])]  # fmt: skip
        assert f"{100 * sum(hits) / 6:.0f} % of the neighbours" in fig.get_suptitle() and "digits" in fig.get_suptitle()


def test_a_figure_shows_few_of_a_sets_images():
    """At most 200 in all: of each network's record six queries with five neighbours each."""
    for scale in ("laptop", "paper"):
        assert 36 * len(experiments.tsne(scale)[1]) <= 200


def test_a_figure_that_nobody_knows_is_named():
    with pytest.raises(SidaeError, match="Unknown figure 'typo'; choose from .*, open_choices, jpeg_again"):
        experiments.needs("smoke", ["typo"])


@pytest.mark.parametrize("name", experiments.FIGURES)
def test_a_single_value_is_a_list_of_one(name):
    build = experiments.FIGURES[name]
    lists = build("smoke", ["digits"], [1])
    assert build("smoke", "digits", 1) == build("smoke", datasets=("digits",), seeds=np.arange(1, 2)) == lists
    assert {r.seed for r in lists[0]} == {1}


@pytest.mark.parametrize("door", [*experiments.FIGURES.values(), *experiments.PARTS.values(), experiments.best_w,
                                  experiments.hypotheses],
                         ids=lambda door: door.__name__)  # fmt: skip
def test_every_door_names_the_parameter_of_a_wrong_type(door):
    for given, sentence in (({"datasets": 3}, "datasets must be str or a list of them, not 3."),
                            ({"datasets": ["digits", None]}, "datasets must be str or a list of them, not None."),
                            ({"seeds": "1"}, "seeds must be int or a list of them, not '1'."),
                            ({"seeds": [0, True]}, "seeds must be int or a list of them, not True."),
                            ({"seeds": 0.0}, "seeds must be int or a list of them, not 0.0."),
                            ({"scale": ["smoke"]}, "scale must be str, not ['smoke'].")):  # fmt: skip
        with pytest.raises(SidaeError) as e:
            door(**{"scale": "smoke"} | given)
        assert str(e.value) == sentence


def test_the_other_doors_name_it_too():
    images = data.load("digits")
    network = experiments.run("sidae", "digits", "smoke", epochs=1, pool=0)
    for call, sentence in ((lambda: own.plan(images, network, 8, seeds="1"), "seeds must be int or a list of them, not '1'."),
                           (lambda: own.plan(images, network, 8, labels="all"), "labels must be int, not 'all'."),
                           (lambda: own.plan(images, network, 8, minutes="5"), "budget must be float, not '5'."),
                           (lambda: own.hidden(images, 0.1), "labels must be int, not 0.1."),
                           (lambda: own.prepare(3), "images must be str, not 3."),
                           (lambda: experiments.run("sidae", ["digits"], "smoke"), "dataset must be str, not ['digits']."),
                           (lambda: experiments.pairwise_vs_triplet("smoke", protocols=7),
                            "protocols must be str or a list of them, not 7."),
                           (lambda: runs.fetch_all([], minutes="9"), "minutes must be float, not '9'."),
                           (lambda: runs.fetch_all([], until="9"), "until must be int, not '9'.")):  # fmt: skip
        with pytest.raises(SidaeError) as e:
            call()
        assert str(e.value) == sentence
    assert own.plan(images, network, 8, seeds=1).counts == own.plan(images, network, 8, seeds=[1]).counts
