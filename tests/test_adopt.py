"""Records that another machine made are filed once, whole, and only where they belong."""

import json
import shutil

import pytest

from sidae_lib import __main__, experiments, paths, runs
from sidae_lib.config import EvalConfig, SidaeError


@pytest.fixture
def made(store, monkeypatch):
    """A store with a run and two evaluations, and the bundle that was written beside it."""
    bundle = store / "bundle.jsonl"
    monkeypatch.setenv("SIDAE_BUNDLE", str(bundle))
    run = experiments.run("sidae", "digits", "smoke")
    configs = [run, EvalConfig(run=run, kind="knn", labels=0.2, k=5), EvalConfig(run=run, kind="knn", labels=0.2, k=5, epoch=1)]
    runs.fetch_all(configs, device="cpu", log=lambda line: None)
    monkeypatch.delenv("SIDAE_BUNDLE")
    return configs, bundle


def published(config) -> dict:
    return runs.read(paths.records() / runs._run(config).key() / runs._name(config))


def test_a_bundle_holds_what_the_store_holds(made):
    configs, bundle = made
    lines = [json.loads(line) for line in bundle.read_text().splitlines()]
    assert [r["key"] for r in lines] == [configs[2].key(), configs[0].key(), configs[1].key()]  # as each was finished
    for config in configs:
        assert runs.find(config) in lines


@pytest.mark.parametrize("way", ["bundle", "store"])
def test_adopted_records_are_found_without_the_store(made, way):
    configs, bundle = made
    before, said = [runs.find(c) for c in configs], []
    new = runs.adopt(bundle if way == "bundle" else paths.runs(), log=said.append)
    assert sorted(new) == sorted(c.key() for c in configs) and "3 of 3 records are new" in said[0]
    shutil.rmtree(paths.runs())
    assert [runs.find(c) for c in configs] == before
    assert runs.adopt(bundle, log=said.append) == [] and "0 of 3" in said[-1] and "3 there already" in said[-1]


def test_a_line_cut_short_is_left_out_and_said(made):
    configs, bundle = made
    bundle.write_text(bundle.read_text()[:-20])
    said = []
    assert len(runs.adopt(bundle, log=said.append)) == 2
    assert said[0].startswith("Line 3 of") and "no whole record" in said[0]


@pytest.mark.parametrize("change", [{"accuracy": 99.0}, {"config": {}}, {"key": "0" * 16}])
def test_a_changed_record_is_left_out(made, change):
    _, bundle = made
    lines = bundle.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | change)
    bundle.write_text("\n".join(lines))
    assert len(runs.adopt(bundle, log=lambda line: None)) == 2


def test_evaluations_of_other_weights_than_the_filed_run_are_left_out(made):
    """Two machines made one run: what is filed first stays, whole; the other's evaluations are of another trajectory."""
    configs, bundle = made
    lines = sorted((json.loads(line) for line in bundle.read_text().splitlines()), key=lambda r: "run_key" in r)
    for r in lines[1:]:
        r["backbone"] = "f" * 64
        r.pop("check")
    bundle.write_text("\n".join(map(json.dumps, lines)))
    said = []
    assert runs.adopt(bundle, log=said.append) == [configs[0].key()]
    assert "2 of other weights than the recorded run's" in said[-1]
    bundle.write_text("\n".join(map(json.dumps, lines[1:])))
    shutil.rmtree(paths.records())
    assert runs.adopt(bundle, log=said.append) == [] and "2 evaluations of a run that is not recorded" in said[-1]


def test_the_command_refuses_smoke_scale_and_names_stale_figures(made, capsys):
    configs, bundle = made
    assert __main__.main(["adopt", str(bundle)]) == 0
    assert "of smoke scale" in capsys.readouterr().out and not paths.records().exists()
    with pytest.raises(SidaeError, match="There is no store or bundle"):
        runs.adopt(bundle.with_name("nothing"))


def test_what_paper_scale_decides_was_said_before():
    """Every claim that is said to be decided is one of the board's."""
    import pandas as pd

    from sidae_lib import published

    said = pd.read_csv(paths.ROOT / "sidae_lib" / "paper_scale.csv")
    claims = pd.read_csv(paths.ROOT / "sidae_lib" / "claims.csv")
    assert set(said["claim"]) <= set(claims["name"]) and set(said["claim"]) <= set(published.CLAIMS)
