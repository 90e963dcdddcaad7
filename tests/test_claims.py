"""Claims and the scoreboard, on evaluations whose truth is known because they are written here."""

import base64
import dataclasses
import re
import typing
import zlib
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sidae_lib import claims, differences, experiments, frames, methods, paths, store
from sidae_lib.config import EvalConfig, SidaeError

ROW = {"data": "cifar10", "display": "CIFAR-10", "pretrain": "CIFAR-10", "pretrain_name": "cifar10", "w": 0.5,
       "augment": "simsiam_cifar", "target": "standardised, mean", "scored": "test", "kind": "linear", "n_train": 500,
       "input": "none", "varied": "", "error": 0.0, "right": "", "repeats": 1, "scale": ""}  # of `frames.evaluations`
CSV = Path(claims.__file__).with_name("claims.csv")
FIGURES = pd.read_csv(CSV)["figure"].unique()


def row(method, seed, accuracy, epoch=200, labels=0.01, **changes):
    base = {"untrained": {"augment": "none", "of": 0}, "supervised": {"augment": "none", "kind": "classifier"}}
    out = ROW | {"of": 200} | base.get(method, {}) | {"method": method, "seed": seed, "accuracy": accuracy, "epoch": epoch,
                                                      "labels": labels} | changes  # fmt: skip
    run = ("method", "seed", "w", "augment", "target", "pretrain", "varied", "of")
    return {"run_key": " ".join(str(out[k]) for k in run)} | out


def scored(rows, scale="paper"):
    """The board of rows that every figure asks for; records are rows already."""
    with mock.patch.object(frames, "evaluations", pd.DataFrame):
        return claims.scoreboard(dict.fromkeys([*FIGURES, claims.TABLE], rows), scale)


def judged(rows, statement):
    board = scored(rows)
    return board[board["statement"].str.startswith(statement)].set_index("case")


def of_seeds(*values, images=0.0):
    return differences.Difference(pd.Series(values, dtype=float), images)


def test_interval_is_students():
    d = np.array([1.0, 2.5, 0.5, 3.0])
    mean, low, high = differences.interval(d)
    reference = stats.t.interval(0.95, 3, loc=d.mean(), scale=stats.sem(d))
    assert mean == pytest.approx(1.75) and (low, high) == pytest.approx(reference)
    assert differences.interval([4.0]) == (4.0, -np.inf, np.inf)


def test_an_interval_holds_seeds_and_test_images():
    """Added in squares; seeds that agree to the last digit leave the normal interval of the test images."""
    assert of_seeds(2, 2, 2, images=0.5).interval() == pytest.approx((2, 2 - 1.959964 * 0.5, 2 + 1.959964 * 0.5))
    both, seeds = of_seeds(1, 2, 3, images=0.5), of_seeds(1, 2, 3)
    assert both.half() ** 2 == pytest.approx(seeds.half() ** 2 + (1.959964 * 0.5) ** 2)


@pytest.mark.parametrize("values, expected", [
    ([1.0, 1.1, 0.9], "supported"), ([-1.0, -1.1, -0.9], "contradicted"), ([1.0, -1.1, 0.4], "undecided"),
    ([5.0, 5.0], "undecided (n = 2)"),  # no spread and no verdict: two seeds say nothing about spread
])
def test_verdict(values, expected):
    assert of_seeds(*values).verdict() == expected


def test_a_margin_is_an_equivalence_test():
    """Close means that the whole interval lies within the margin; a wide interval around 0 is undecided."""
    assert of_seeds(0.1, -0.2, 0.0).verdict(-2, 2) == "supported"
    assert of_seeds(3.0, 3.1, 2.9).verdict(-2, 2) == "contradicted"
    assert of_seeds(5.0, -5.0, 0.0).verdict(-2, 2) == "undecided"


def test_p_is_scipys_and_decides_with_the_interval():
    d = of_seeds(0.4, 1.1, 0.2, 0.9)
    assert d.p() == pytest.approx(stats.ttest_1samp(d.seeds, 0).pvalue)
    assert of_seeds(1, 1, 1, images=0.5).p() == pytest.approx(2 * stats.norm.sf(2))
    margin = of_seeds(0.3, -0.1, 0.2)  # within 1: the greater of the two one-sided tests at twice its p
    assert margin.p(-1, 1) == pytest.approx(stats.ttest_1samp(margin.seeds, 1).pvalue)
    assert of_seeds(0, 0, 0).p() == 1 and of_seeds(1, 1, 1).p() == 0
    for d in (of_seeds(0.4, 1.1, 0.2), of_seeds(0.4, 0.5, 0.2, images=0.1)):
        assert (d.p() <= 0.05) == (d.verdict() != "undecided")


def test_how_many_seeds_would_decide():
    d = of_seeds(1.0, -0.5, 2.0)  # mean 0.83, sd 1.26
    assert d.verdict() == "undecided" and d.would_decide() == "12 seeds"
    sd = d.seeds.std()
    assert stats.t.isf(0.025, 11) * sd / 12**0.5 < d.mean < stats.t.isf(0.025, 10) * sd / 11**0.5
    assert of_seeds(1.0, -0.5, 2.0, images=1).would_decide() == "more test images"
    assert of_seeds(10, -10, 0.1).would_decide() == "more than 1,000 seeds"
    assert not of_seeds(-1.0, 0.5, -2.0).would_decide() and not of_seeds(1, 1.1, 0.9).would_decide()


def test_holm_is_the_step_down_procedure():
    """Holm 1979: the smallest p against alpha / 4, the next against alpha / 3, and nothing after the first that fails."""
    assert differences.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert differences.holm([0.04]) == [True] and differences.holm([]) == [] and not any(differences.holm([0.02, 0.03, 0.04]))


def test_test_images_enter_paired_where_it_is_known_which_were_right():
    """Two networks that differ on 30 of 1,000 images: the paired error is that of the 30, a binomial one far greater."""
    rng = np.random.default_rng(0)
    base = (rng.random(1000) < 0.6).astype(np.uint8)
    other = base.copy()
    other[:30] = 0
    pack = lambda v: base64.b64encode(zlib.compress((5 * v).tobytes())).decode()  # noqa: E731
    rows = [row(m, s, 100 * v.mean(), error=1.5, right=pack(v), repeats=5) for s in range(3)
            for m, v in (("sidae", base), ("dae", other))]
    d = differences.difference(pd.DataFrame(rows), {"method": "sidae"}, {"method": "dae"})
    change = 1.0 * base - other
    assert d.mean == pytest.approx(100 * change.mean()) and d.images == pytest.approx(100 * change.std(ddof=1) / 1000**0.5)
    rows[0]["right"] = ""  # one that is not known: both as binomial samples
    d = differences.difference(pd.DataFrame(rows), {"method": "sidae"}, {"method": "dae"})
    assert d.images == pytest.approx(1.5 * 2**0.5)


def test_one_side_is_never_the_mean_of_two_results():
    rows = [row("sidae", 0, 50.0), row("sidae", 0, 60.0, of=4, epoch=4), row("dae", 0, 40.0)]
    with pytest.raises(ValueError, match="two results of one seed"):
        differences.difference(pd.DataFrame(rows), {"method": "sidae"}, {"method": "dae"})
    rows[1] = rows[0] | {"kind": "knn", "accuracy": 60.0}  # nor of two evaluations of one run
    with pytest.raises(ValueError, match="two results of one seed"):
        differences.difference(pd.DataFrame(rows), {"method": "sidae"}, {"method": "dae"})


def test_a_claim_as_a_whole_is_judged_by_holm_over_its_cases():
    """Three cases of which one is decided alone, with p between alpha / 3 and alpha: by Holm none is."""
    gaps = {"CIFAR-10": (1.0, 2.0, 1.5), "MNIST": (1.0, -1.0, 0.5), "Fashion-MNIST": (1.0, -1.0, -0.5)}
    rows = [row(m, s, 50.0 + k * g[s], display=d, pretrain=d) for d, g in gaps.items() for s in range(3)
            for k, m in enumerate(("simsiam", "sidae"))]  # fmt: skip
    board = judged(rows, "SidAE beats SimSiam")
    assert board["verdict"].tolist().count("supported") == 1 and 0.05 / 3 < board["p"].min() < 0.05
    assert set(board["claim verdict"]) == {"undecided"} == set(board["after Holm"])
    whole = claims.claims(scored(rows)).set_index("statement").loc["SidAE beats SimSiam and the autoencoder"]
    assert (whole["cases"], whole["supported"], whole["by chance"]) == (3, 1, 0.15)
    sure = [r | {"accuracy": 50.0 + 9 * (r["method"] == "sidae") + 0.1 * r["seed"] ** 2 * (r["method"] == "sidae")}
            if r["display"] == "CIFAR-10" else r for r in rows]  # fmt: skip
    assert set(judged(sure, "SidAE beats SimSiam")["claim verdict"]) == {"supported in 1 of 3 cases"}


def test_verdicts_in_words():
    said = {"a": "mixed: 1 for, 3 against, of 9", "b (w = 0.5)": "undecided", "c": "supported in 2 of 9 cases",
            "d": "supported"}
    rows = [{"statement": k, "claim verdict": v, "paper": "", "source": "", "n": 3, "verdict": ""} for k, v in said.items()]
    assert claims.verdict(pd.DataFrame(rows).assign(published=None)).splitlines() == [
        "- **Supported**: d.", "- **Supported in part**: c (2 of 9).", "- **Undecided**: b.",
        "- **Mixed**: a (1 for, 3 against)."]  # fmt: skip


def test_differences_are_paired_by_seed():
    """Seeds that vary by tens and methods that differ by one: a paired interval sees it, an unpaired one could not."""
    rows = [row(m, s, a + d) for m, d in (("sidae", 1.0), ("simsiam", 0.0)) for s, a in enumerate((10, 50, 90.5))]
    rows += [row("simsiam", 7, 99.0)]  # a seed that the other lacks
    board = judged(rows, "SidAE beats SimSiam")
    assert board["verdict"].tolist() == ["supported"] and board["n"].tolist() == [3]
    assert board.index.tolist() == ["CIFAR-10, 1 %, against simsiam"] and board["difference"].tolist() == [1.0]


def at(scale, seeds, better=60.0, **changes):
    """SidAE ahead of SimSiam at the end, or behind, for so many seeds at a scale."""
    return [row(m, s, value + s, scale=scale, **changes) for s in range(seeds)
            for m, value in (("sidae", better), ("simsiam", 50.0), ("dae", 50.0))]  # fmt: skip


def test_the_scale_with_the_most_cases_of_three_seeds_decides_of_equals_the_largest():
    """For each set of images. A method that is not there yet, or not with three seeds, leaves the claim with laptop scale."""
    beats = lambda *rows: judged(sum(rows, []), "SidAE beats SimSiam")  # noqa: E731
    mnist = {"data": "mnist", "display": "MNIST", "pretrain": "MNIST", "pretrain_name": "mnist"}
    found = beats(at("paper", 3), at("paper", 2, **mnist), at("laptop", 3, 40.0), at("laptop", 3, 40.0, **mnist))
    assert found[["scale", "verdict"]].to_numpy().tolist() == [["paper", "supported"]] * 2 + [["laptop", "contradicted"]] * 2
    assert beats(at("paper", 1), at("laptop", 2))["scale"].tolist() == ["paper"] * 2
    for lacks in ({("dae", 0)}, {("dae", s) for s in range(3)}):
        partial = [r for r in at("paper", 3) if (r["method"], r["seed"]) not in lacks]
        assert beats(partial, at("laptop", 3, 40.0))["scale"].tolist() == ["laptop"] * 2
        assert {*beats(partial, at("laptop", 2))["scale"]} == {"paper"}


def test_of_a_claim_in_several_rows_and_of_a_pair_of_sets_one_scale_decides():
    made = {"simclr": "extract: vector; compare: cosine; loss: info_nce", "amdim": "augment: amdim; encode: amdim", "yadim": ""}
    there = {"paper": {"A": ["amdim", "yadim"], "B": ["yadim"]}, "laptop": dict.fromkeys("AB", ["simclr", "amdim"])}
    rows = [r | {"kind": "logistic", "display": display, "pretrain": display} for scale, sets in there.items()
            for display, methods in sets.items() for m in methods for s in range(3)
            for r in (row(m, s, 50.0, scale=scale), row("composed", s, 50.0, scale=scale, varied=made[m]))]
    special = judged(rows, "the methods are special cases")
    assert special.groupby(special.index.str[0])["scale"].agg(list).to_dict() == {"A": ["paper"] * 2, "B": ["laptop"] * 2}
    moved = [r | {"pretrain": "STL-10" if own else "CIFAR-10"} for scale, n in (("paper", 2), ("laptop", 3))
             for r in at(scale, n) if r["method"] == "sidae" for own in (0, 1)]
    assert judged(moved, "SidAE pre-trained on another set")["scale"].tolist() == ["laptop"]


def test_many_and_scarce_labels_are_those_of_the_scale():
    """Of the paper's scale many is 100 %, of laptop scale 10 %; both have 1 %."""
    rows = [row(m, s, value, labels=labels, scale=scale, display=display, pretrain=display)
            for scale, display, many in (("paper", "CIFAR-10", 1.0), ("laptop", "MNIST", 0.1)) for s in range(3)
            for labels in (many, 0.01) for m, value in (("sidae", 60 + labels), ("supervised", 50 + 90 * labels))]  # fmt: skip
    full = judged(rows, "with many labels frozen features")
    assert full.index.tolist() == ["CIFAR-10, 100 %, sidae", "MNIST, 10 %, sidae"]
    assert len(judged(rows, "the supervised network loses more")) == 2


def test_numbers_are_those_of_the_largest_scale_with_three_seeds():
    for paper, scale in ((3, "paper"), (2, "laptop")):
        board = scored([r for r in at("paper", paper) + at("laptop", 3) if r["method"] != "dae"])
        assert {*board.loc[board["published"].notna(), "scale"]} == {scale}


def test_every_claim_has_its_words_its_measure_and_its_figure():
    stated = pd.read_csv(CSV, keep_default_na=False)
    assert set(stated["measure"]) == set(claims.MEASURES) and stated["name"].is_unique and stated["claim"].all()
    assert {claims.TABLE, *stated["figure"]} <= set(experiments.FIGURES)


def test_every_number_and_claim_has_a_source_that_can_be_looked_up():
    place = r"(abstract|(Table|Tables|Fig\.|Figure|Sec\.) \d|.+, page .+)"
    stated = pd.read_csv(CSV)
    for source in (*claims.table()["source"], *stated["source"]):
        assert re.match(place, source), source
    assert not re.match(place, "recalled") and not re.match(place, "text") and not re.match(place, "aggregator page")


def test_a_claim_with_sides_takes_the_least_of_the_better_and_the_greatest_of_the_worse():
    """By seed, among the scenarios alone: not where a confound is undone, nor by another metric."""
    report = {"kind": "report", "display": "MNIST", "data": "mnist", "metric": "accuracy", "channels": 1, "undone": ""}
    rows = [row("triplet", s, a + s, augment=v, **report) for s in range(3)
            for v, a in (("none", 90.0), ("report_fer", 91.0), ("report_simclr", 93.5))]
    rows += [row("triplet", s, 99.0, augment="none", **report | change) for s in range(3)
             for change in ({"undone": "lr 0.05"}, {"metric": "knn"})]  # fmt: skip
    board = judged(rows, "SimCLR's augmentation is the best for triplet")
    assert board.index.tolist() == ["MNIST, grey images"] and board["difference"].tolist() == [2.5]
    assert board["n"].tolist() == [3]
    assert board["verdict"].tolist() == ["supported"]
    assert judged(rows, "triplet beats pairwise").empty and judged([row("sidae", 0, 50.0)], "triplet").empty


def grid(**accuracies):
    """Three seeds of every method's accuracy, a hair apart."""
    return [row(m.rstrip("_"), s, a + 0.1 * s * k) for k, (m, a) in enumerate(accuracies.items()) for s in range(3)]


def test_the_supervised_network_loses_more():
    few = grid(sidae=50.0, supervised=30.0)
    many = [r | {"labels": 1.0, "accuracy": r["accuracy"] + (10 if r["method"] == "sidae" else 40)} for r in few]
    board = judged(few + many, "the supervised network loses more")
    assert board.loc["CIFAR-10, sidae", "difference"] == pytest.approx(30) and board["verdict"].tolist() == ["supported"]


def test_rising_takes_the_first_and_the_last_checkpoint():
    rows = [row("sidae", s, a + s, epoch=e) for s in range(3) for e, a in ((25, 40.0), (100, 99.0), (200, 45.0 + s / 10))]
    assert judged(rows, "accuracy rises")["difference"].tolist() == [5.1]


def test_spread_over_seeds_and_over_epochs():
    rows = [row("sidae", s, 50.0 + 0.1 * s, epoch=e) for s in range(3) for e in (100, 200)]
    rows += [row("simsiam", s, 50.0 + 10 * s * (e == 200), epoch=e) for s in range(3) for e in (100, 200)]
    seeds, epochs = judged(rows, "SidAE varies less over seeds"), judged(rows, "SidAE varies less over epochs")
    assert seeds["difference"].tolist() == [pytest.approx((10 + 0 + 10) / 3 - 0.2 / 3, abs=0.01)]
    assert epochs["difference"].tolist() == [pytest.approx((0 + 10 + 20) / 2**0.5 / 3, abs=0.01)]


def test_both_parts_are_needed_only_if_the_inside_beats_both_ends():
    rows = grid(dae=40.0, simsiam=60.0)
    rows += [row("sidae", s, a + 0.05 * s, w=w) for w, a in ((0.25, 58.0), (0.5, 50.0), (0.75, 55.0)) for s in range(3)]
    rows += [r | {"scored": "val", "accuracy": 70.0 if r["w"] == 0.75 else 50.0} for r in rows]  # which chooses, not test
    board = judged(rows, "a weight between the ends")
    assert board.loc["CIFAR-10, 1 %, w = 0.75 against the autoencoder", "verdict"] == "supported"
    assert board.loc["CIFAR-10, 1 %, w = 0.75 against SimSiam", "verdict"] == "contradicted"


def test_a_value_meets_its_published_cell():
    """Table 1, CIFAR-10, 1 %: 51.67 (0.28)."""
    rows = [row("sidae", s, a) for s, a in enumerate((51.0, 52.0, 53.0))]
    value = scored(rows).iloc[0]
    assert (value["ours"], value["n"], value["published"], value["published_se"]) == (52.0, 3, 51.67, 0.28)
    assert value["z"] == pytest.approx((52 - 51.67) / np.hypot(1 / 3**0.5, 0.28), abs=0.01) and value["verdict"] == "agrees"
    rows = [r | {"accuracy": r["accuracy"] - 20} for r in rows]
    assert scored(rows).iloc[0]["verdict"] == "below"
    few = scored(rows[:2]).iloc[0]
    assert few["verdict"] == "undecided (n = 2)" and few["z"] < -10  # two seeds decide nothing


def test_a_figures_end_points_are_those_of_the_same_pre_training_set():
    """Table 1, CIFAR-10, 100 %: 64.75 pre-trained on CIFAR-10, 66.20 on STL-10, nothing on another set."""
    sets = (("cifar10", "CIFAR-10"), ("stl10", "STL-10"), ("tinyimagenet32", "Tiny ImageNet 32"))
    rows = [row("sidae", 0, 50.0, labels=1.0, pretrain_name=n, pretrain=d, hardware="x", run_key=n) for n, d in sets]
    table = frames.summary(pd.DataFrame(rows))
    assert claims.beside_published(table).set_index("pretrain_name")["published"].to_dict() == pytest.approx(
        {"cifar10": 64.75, "stl10": 66.2, "tinyimagenet32": np.nan}, nan_ok=True)


def test_another_scale_is_not_comparable_and_gets_no_z():
    rows = [row("sidae", s, 52.0 + s) for s in range(3)]
    value = scored(rows, "laptop").iloc[0]
    assert value["verdict"] == "not comparable: laptop scale" and np.isnan(value["z"]) and value["difference"] == 1.33


@pytest.mark.parametrize("accuracy, says", [(72.0, "above"), (51.0, "agrees"), (32.0, "below")])
def test_a_copy_of_the_data_has_difference_and_z_and_says_so(accuracy, says):
    rows = [[row("sidae", s, accuracy + s, display="CIFAR-10" + copy, pretrain="CIFAR-10" + copy) for s in range(3)]
            for copy in ("", " (JPEG copy)")]  # fmt: skip
    value, copy = (scored(r).iloc[0] for r in rows)
    assert value["verdict"] == says and copy["verdict"] == f"{says}, data copy"
    assert (copy["difference"], copy["z"]) == (value["difference"], value["z"]) and np.isfinite(copy["z"])


def test_the_suspect_cells_are_no_targets():
    stl = {"labels": 1.0, "pretrain": "STL-10", "pretrain_name": "stl10"}
    rows = [row(m, s, 57.0 + s, **stl) for m in ("dae", "simsiam") for s in range(3)]
    board = scored(rows)
    values = board[board["source"] == "Table 1"].dropna(subset="published")
    assert values["verdict"].tolist() == ["not comparable: suspect cell"] * 2


def test_validation_scores_do_not_enter():
    rows = [row("sidae", s, 52.0) for s in range(3)] + [row("sidae", s, 99.0, scored="val") for s in range(3)]
    assert scored(rows).iloc[0]["ours"] == 52.0


def test_another_scale_of_the_targets_is_another_method():
    """The sweep's runs with targets in [0, 1] or another w stand in the same table and are no claim's business."""
    rows = [row(m, s, a + d) for m, d in (("sidae", 1.0), ("simsiam", 0.0)) for s, a in enumerate((10, 50, 90.5))]
    rows += [row("sidae", s, a - 1.0, pretrain="STL-10", pretrain_name="stl10") for s, a in enumerate((10, 50, 90.5))]
    swept = [row("sidae", 0, a, epoch, **{k: v}) for k, v in (("target", "unit, mean"), ("w", 0.25))
             for epoch, a in ((200, 99.0), (25, 1.0))]  # fmt: skip
    for statement in ("SidAE beats SimSiam", "SidAE varies less over seeds", "accuracy rises", "SidAE pre-trained on another"):
        board = judged(rows, statement)
        assert len(board) or statement == "accuracy rises"
        pd.testing.assert_frame_equal(judged(rows + swept, statement), board)


def test_best_w_is_chosen_on_validation_and_never_on_test(own_store):
    _, evals = experiments.w_sweep("quick", ["digits"], [0, 1])
    assert experiments.best_w("quick", ["digits"], [0, 1]) is None
    for e in evals:
        good = {0.25: 60.0, 0.5: 70.0, 0.75: 65.0}.get(e.run.w, 50.0) if e.score_on == "val" else 100 * e.run.w
        if e.labels == 1.0 or e.run.target == "unit":
            good = 100.0 - good  # neither the other share of labels nor the other target decides
        store.keep(e, {"config": e.to_dict(), "key": e.key(), "run_key": e.run.key(), "accuracy": good})
    assert experiments.best_w("quick", ["digits"], [0, 1]) == 0.5


def test_balance_weighs_the_gradients():
    config = experiments.run("sidae", "digits", "smoke", w=0.2).to_dict()
    line = {"l_si": -0.5, "l_dae": 0.4, "grad_si": 3.0, "grad_dae": 1.0}
    records = [{"config": config, "epochs": [line | {"grad_si": 9.0}, {}, line]}]
    table = frames.balance(records)
    assert table.xs("last", level="when")["share"].tolist() == [pytest.approx(0.2 * 3 / (0.2 * 3 + 0.8), abs=1e-4)]
    assert table.xs("first", level="when")["share"].tolist() == [pytest.approx(1.8 / 2.6, abs=1e-4)]


def paired(gains, pairs="mined", **changes):
    """SidAE without pairs at 50, and with them at 50 plus a gain for each seed."""
    both = (("sidae", 0), (f"sidae + 700 {pairs}", 1))
    return [row(m, s, 50.0 + k * g, kind="logistic", **changes) for s, g in enumerate(gains) for m, k in both]


def test_pairs_against_none_by_epoch():
    rows = paired((-1, -1.1, -0.9), epoch=100) + paired((2, 2.5, 1.5), epoch=200)
    rows += [row("sidae", s, 99.0, kind="logistic", w=0.9) for s in range(3)]  # another weight is another method
    board = judged(rows, "semantic pairs beat none")
    assert board["verdict"].tolist() == ["contradicted", "supported"]  # at 100 epochs, at 200
    assert board["difference"].tolist() == [-1, 2]
    half = judged(rows, "half of the epochs")  # 49, 48.9 and 49.1 with pairs at 100 against 50 at 200
    assert half["difference"].tolist() == [-1] and half["verdict"].tolist() == ["contradicted"]


@pytest.mark.parametrize("gains, expected", [((0.1, -0.1, 0.0), "supported"), ((2, 2.1, 1.9), "contradicted"),
                                             ((3, -3, 0), "undecided")])
def test_random_images_add_nothing(gains, expected):
    assert judged(paired(gains, "random"), "as many random")["verdict"].tolist() == [expected]


def test_originals_and_training():
    rows = [row("moco_v2", s, a, kind="pairs", epoch=e, input=i) for s in range(3) for a, e, i in (
        (90.0 + s, 200, "none"), (20.0, 0, "simclr"), (95.0, 0, "none"), (10.0, 200, "simclr"))]
    board = judged(rows, "a trained encoder on original")
    assert board["difference"].tolist() == [71] and board["verdict"].tolist() == ["supported"]


def another(config, field):
    """The config with another legal value of this field, or None: what another figure, or a user, may have run."""
    value, options = getattr(config, field.name), typing.get_args(typing.get_type_hints(type(config))[field.name])
    tries = ([not value] if isinstance(value, bool) else [value + 1, 2 * value] if isinstance(value, int)
             else [value / 2, value + 0.25] if isinstance(value, float) else [o for o in options if o != value])  # fmt: skip
    for v in tries:
        with suppress(SidaeError):
            other = config.replace(**{field.name: v})
            methods.check(other.run if isinstance(other, EvalConfig) else other)
            if other.key() != config.key():
                return other
    return None


def decoys(e):
    """Evaluations that differ from this one by one field of the run or of the evaluation, seeds apart."""
    runs_ = [another(e.run, f) for f in dataclasses.fields(e.run) if f.name not in ("seed", "method", "data")]
    own = [another(e, f) for f in dataclasses.fields(e) if f.name not in ("run", "data", "epoch")]
    kinds = [e.replace(kind=kind, repeats=1) for kind in ("linear", "logistic", "knn", "finetune")]
    return [EvalConfig(run=r, kind=e.kind, labels=e.labels) for r in runs_ if r] + [d for d in own if d] + kinds


def test_no_claim_is_moved_by_a_run_that_its_figure_did_not_ask_for(own_store, monkeypatch):
    """A store with a decoy of 99 % for every field in which another figure's runs may differ."""
    monkeypatch.setenv("SIDAE_RECORDS", str(paths.ROOT / "records"))
    asked = {name: experiments.FIGURES[name]("laptop")[1] for name in ("accuracy_vs_epochs", "semantic_pairs")}
    board = lambda: claims.scoreboard({n: store.recorded(evals) for n, evals in asked.items()}, "laptop")  # noqa: E731
    before, put = board(), []
    for evals, kind in ((asked["accuracy_vs_epochs"], "linear"), (asked["semantic_pairs"], "logistic")):
        e = next(e for e in evals if e.run.method == "sidae" and e.epoch == e.run.epochs and e.kind == kind)
        for d in set(decoys(e)) - {c for own in asked.values() for c in own}:
            record = store.find(e) | {"config": d.to_dict(), "key": d.key(), "run_key": d.run.key(), "accuracy": 99.0}
            store.folder(d).mkdir(exist_ok=True, parents=True)
            put.append(store.keep(d, record | {"epoch": d.epoch, "kind": d.kind}))
    assert len(put) > 60 and {"pool", "width", "epochs", "target", "lr"} <= {
        k for r in put for k, v in r["config"]["run"].items() if v != e.run.to_dict().get(k)}
    pd.testing.assert_frame_equal(board(), before)
    mixed = [r for r in put if r["config"]["run"].get("pool") != e.run.pool]
    with pytest.raises(ValueError, match="two results of one seed"):  # were they read, it would not stay so
        claims.scoreboard({"accuracy_vs_epochs": store.recorded(asked["accuracy_vs_epochs"]) + mixed}, "laptop")


@pytest.mark.parametrize("kind", ["linear", "logistic", "knn"])
def test_ten_minutes_convince(kind, monkeypatch):
    """The published seeds of scale quick: with scarce labels the interval of SidAE lies above the untrained network's, by every
    probe. The SGD probe is the mean of five classifier seeds."""
    monkeypatch.setattr(store, "local", dict)  # what else lies in this checkout's store
    evals = experiments.accuracy_vs_epochs("quick", ["mnist5k"], [0, 1, 2])[1]
    records = [store.find(e) for e in evals]
    assert None not in records and experiments.SCALES["quick"].seeds == (3, 0, 1, 2)
    frame = frames.evaluations(records)
    ends = frame[(frame["epoch"] == frame["of"]) & (frame["labels"] == 0.01) & (frame["kind"] == kind)]
    assert set(ends["repeats"]) == {5 if kind == "linear" else 1}
    sidae, untrained = (differences.interval(ends["accuracy"][ends["method"] == m]) for m in ("sidae", "untrained"))
    assert sidae[1] > untrained[2], (sidae, untrained)


def test_the_rate_of_scale_quick_is_the_best_on_validation():
    found = {lr: store.recorded(evals) for lr, evals in experiments.rates("quick").items()}
    assert all(r["config"]["score_on"] == "val" for records in found.values() for r in records)
    best = max(found, key=lambda lr: next(r["accuracy"] for r in found[lr] if r["config"]["run"]["method"] == "sidae"))
    assert best == experiments.SCALES["quick"].run["lr"] and experiments.rates("laptop") == {}
