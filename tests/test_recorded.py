"""Scale `recorded`: for each set of images the largest scale on record, as far as every method of it has come."""

import warnings
from collections import Counter
from itertools import groupby

import pytest
from test_experiments import recorded as fake

from sidae_lib import data, experiments, paths, recorded, store
from sidae_lib.config import SidaeError


def keep(evals, value=50.0):
    """Files evaluations as published records."""
    paths.records().mkdir(exist_ok=True)
    with (paths.records() / f"cifar-{len([*paths.records().iterdir()])}.jsonl").open("w") as f:
        f.writelines(store.as_line(fake(e, value) | {"key": e.key()}) + "\n" for e in evals)


@pytest.fixture
def asked(own_store):
    """Scale -> the evaluations of CIFAR-10 in `accuracy_vs_epochs`, in a store that holds nothing."""
    with data.as_published():
        return {s: experiments.accuracy_vs_epochs(s, ["cifar10"])[1] for s in ("paper", "laptop", "quick") if s != "quick"}


def shown() -> Counter:
    return Counter((r["scale"], r["config"]["run"]["method"], r["epoch"])
                   for r in recorded.best("accuracy_vs_epochs", ["cifar10"])[1])  # fmt: skip


def scales() -> list[str]:
    """Of the records that claims choose from, in their order."""
    return [k for k, _ in groupby(r["scale"] for r in recorded.every("accuracy_vs_epochs"))]


def seeds(evals, *wanted, until=200):
    return [e for e in evals if e.run.seed in wanted and e.epoch <= until or e.kind == "classifier" and e.run.seed == 0]


def test_nothing_on_record_is_a_sentence(own_store):
    with pytest.raises(SidaeError, match="Nothing of accuracy_vs_epochs is on record here; choose a scale of smoke"):
        recorded.fetch("accuracy_vs_epochs")


def test_one_set_is_a_list_of_one_and_a_wrong_scale_a_sentence(monkeypatch):
    monkeypatch.setenv("SIDAE_RECORDS", str(paths.ROOT / "records"))
    one, same = (recorded.fetch("accuracy_vs_epochs", datasets=d, seeds=s)[1] for d, s in (("mnist", 0), (["mnist"], [0])))
    assert one == same and {r["data"]["name"] for r in one} == {"mnist"}
    with pytest.raises(SidaeError, match="Unknown scale 'best'; choose from recorded, smoke, quick, laptop, paper."):
        recorded.fetch("tsne", "best")
    with pytest.raises(SidaeError, match="seeds must be int or a list of them, not '1'."):
        recorded.fetch("tsne", seeds="1")


def test_a_panel_is_of_the_paper_once_every_method_has_come_to_epoch_25(asked):
    keep(seeds(asked["laptop"], 0, 1, 2))
    assert {s for s, *_ in shown()} == {"laptop"}
    one = [e for e in seeds(asked["paper"], 0) if e.epoch in (0, 25) or e.kind == "classifier"]
    keep(e for e in one if e.run.method != "simsiam")
    assert {s for s, *_ in shown()} == {"laptop"}, "a method is missing"
    keep(e for e in one if e.run.method == "simsiam")
    assert {s for s, *_ in shown()} == {"paper"}
    assert scales() == ["laptop"], "no claim is judged where a method has no finished run"
    keep(e for e in seeds(asked["paper"], 0) if e.epoch == 200)
    assert scales() == ["paper", "laptop"]


def test_curves_end_where_all_methods_are_and_hold_the_seeds_that_came_so_far(asked):
    keep(seeds(asked["paper"], 0))
    keep(e for e in seeds(asked["paper"], 1) if e.run.method != "dae" or e.epoch <= 100)
    keep(e for e in seeds(asked["paper"], 2) if e.epoch <= 25 and e.kind != "classifier")
    found = shown()
    per = 6  # three probes, two shares of labels
    assert found["paper", "sidae", 200] == found["paper", "sidae", 25] == 2 * per
    assert found["paper", "dae", 200] == found["paper", "dae", 25] == per, "one n along a curve"
    assert found["paper", "untrained", 0] == 3 * per
    every = Counter((r["config"]["run"]["method"], r["epoch"]) for r in recorded.every("accuracy_vs_epochs"))
    assert every["sidae", 25] == 3 * per and every["sidae", 200] == 2 * per, "claims get the first checkpoint of all seeds"


def test_an_unfinished_method_cuts_all(asked):
    keep(seeds(asked["paper"], 0, until=75))
    keep(e for e in seeds(asked["paper"], 0) if e.run.method == "dae")
    assert max(epoch for _, m, epoch in shown() if m == "dae") == 75


def test_a_published_set_is_found_whatever_lies_in_the_data_folder(tmp_path, monkeypatch):
    """Someone with the original CIFAR-10 sees the figures of the records, which are of a copy."""
    import numpy as np

    rng = np.random.default_rng(0)
    np.savez(tmp_path / "cifar10.npz",
             **{f"{s}_images": rng.integers(0, 256, (40, 32, 32, 3), np.uint8) for s in ("train", "test")},
             **{f"{s}_labels": np.arange(40) % 10 for s in ("train", "test")})  # fmt: skip
    published = {e.run.data for e in experiments.tsne("laptop")[1]}
    monkeypatch.setenv("SIDAE_DATA", str(tmp_path))
    data._load.cache_clear()
    assert {e.run.data for e in experiments.tsne("laptop")[1]} != published
    found = {r["config"]["run"]["data"] for r in recorded.fetch("tsne")[1]}
    assert found == published


def test_the_records_of_the_project_show_every_figure_without_data(own_store, monkeypatch):
    monkeypatch.setenv("SIDAE_RECORDS", str(paths.ROOT / "records"))
    monkeypatch.setenv("SIDAE_DATA", str(own_store / "none"))
    scales = {}
    with warnings.catch_warnings(action="error"):
        for name in experiments.FIGURES:
            if name != "your_own_images":  # whose plan looks at its images
                runs_, evals = recorded.fetch(name)
                scales[name] = {r["scale"] for r in [*runs_, *evals]}
    assert scales["accuracy_vs_epochs"] == {"paper", "laptop"} and scales["w_sweep"] == {"laptop"}
    assert not any("quick" in found or "smoke" in found for found in scales.values())


def test_a_scale_computes_what_is_missing_and_marks_ones_own_run(own_store):
    runs_, evals = recorded.fetch("tsne", "smoke", ["digits"])
    assert {r["scale"] for r in [*runs_, *evals]} == {"smoke"} and not any(r["own"] for r in evals)
    published = own_store / "records"
    published.mkdir()
    (published / "digits.jsonl").write_text("\n".join(map(store.as_line, (
        {k: v for k, v in r.items() if k not in ("scale", "own")} for r in evals[1:]))))  # fmt: skip
    again = recorded.fetch("tsne", "smoke", ["digits"])[1]
    assert [r["own"] for r in again] == [True] + [False] * (len(again) - 1)
