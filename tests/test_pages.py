"""The book's pages on deviations and on data: every choice and every set has its row, and what is said is true."""

import gzip
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from replay import page

import sidae_lib
from sidae_lib import augment, data, experiments, methods, paths, places, scales
from sidae_lib.config import EvalConfig, RunConfig

ROOT = Path(sidae_lib.__file__).parents[1]
CONFIGS = {"RunConfig": RunConfig, "EvalConfig": EvalConfig}


@pytest.fixture(scope="module")
def deviations():
    return page("deviations")


@pytest.fixture(scope="module")
def said(deviations):
    return deviations.made("recorded")


@pytest.fixture(scope="module")
def sets():
    return page("data")


@pytest.fixture(scope="module")
def published():
    """Every published line, by nothing but gzip and json."""
    return [json.loads(line) for file in sorted(paths.records().glob("*.jsonl.gz")) for line in gzip.open(file)]


def cards(text: str) -> dict[str, str]:
    return dict(part.split("\n", 1) for part in text.split("### ")[1:])


# --- deviations -------------------------------------------------------------------------------------------


def test_every_open_choice_has_one_row_and_no_other_has_one(deviations):
    source = (ROOT / "sidae_lib" / "config.py").read_text()
    of = {}
    for part in re.split(r"^(?=class )", source, flags=re.MULTILINE):
        name = re.match(r"class (\w+)|", part)[1]
        fields = [line.split(":")[0].strip() for line in part.splitlines() if re.match(r"    \w+: ", line)
                  and re.search(r"\bopen\b", line.partition("#")[2])]  # fmt: skip
        of |= {name: fields} if name in CONFIGS else {}
    rows = [(r["owner"], r["field"]) for r in deviations.rows() if r["owner"]]
    assert sorted(rows) == sorted((name, field) for name, fields in of.items() for field in fields)
    assert len(of["RunConfig"]) > 15 and len(of["EvalConfig"]) > 8
    assert {r["field"] for r in deviations.rows() if not r["owner"]} == {*deviations.BESIDE}


def test_what_we_do_is_the_default_of_now(deviations, said, monkeypatch):
    text = cards("".join(said.values()))
    for r in deviations.rows():
        if r["owner"]:
            assert f"- **We use:** `{r['field']} = {getattr(CONFIGS[r['owner']], r['field'])}`" in text[r["title"]]
    lr = next(r for r in deviations.rows() if r["field"] == "lr")
    assert f"at quick scale `{scales.SCALES['quick'].run['lr']}`" in deviations.ours(lr)
    monkeypatch.setattr(RunConfig.__dataclass_fields__["lr"], "default", 0.7)
    assert "`lr = 0.7`" in deviations.ours(lr)


def test_an_effect_is_the_mean_over_seeds(said, published):
    """w = 0.25 instead of 0.5, CIFAR-10 at laptop scale, scarce labels, and SidAE's lead without the change."""
    base = {m: scales.run(m, "cifar10", "laptop").to_dict() for m in scales.SSL}
    of = {}
    for r in published:
        c, run = r["config"], r["config"].get("run", {})
        plain = {k: v for k, v in run.items() if k not in ("w", "seed")} == base.get(run.get("method"))
        if plain and r.get("kind") == "linear" and r["epoch"] == 65 and c.get("labels") == 0.01:
            if "score_on" not in c and not c.get("data"):
                of.setdefault((run["method"], run.get("w", 0.5)), {})[run.get("seed", 0)] = r["accuracy"]
    seeds = sorted(of["sidae", 0.25])
    gain = np.mean([of["sidae", 0.25][s] - of["sidae", 0.5][s] for s in seeds])
    lead = np.mean([of["sidae", 0.5][s] - max(of[m, 0.5][s] for m in ("simsiam", "dae")) for s in seeds])
    [row] = [row for row in said["deviations_table"].split("border-top")
             if "<code>w = 0.25</code>, 1 % of labels" in row and "CIFAR-10 (JPEG copy), laptop" in row]  # fmt: skip
    assert f"SidAE {gain:+.2f} (" in row and f"lead before {lead:+.2f} (" in row and f"n = {len(seeds)}, 10,000 test" in row
    assert len(seeds) == 3
    [card] = re.findall(r"`w = 0.25` at laptop .*", cards(said["deviations_sidae"])["The weight of the two losses"])
    assert f"to {gain:+.2f} points in 2 cases (" in card  # the larger


def test_what_no_record_says_is_not_measured(deviations, said, published):
    """And what runs say that differ in one field alone is."""
    text = cards("".join(said.values()))
    groups: dict[tuple, set] = {}
    for r in published:
        c = r["config"]
        if "run_key" not in r and c["method"] == "sidae":
            for field in (row["field"] for row in deviations.rows() if row["owner"] == "RunConfig"):
                rest = json.dumps({k: v for k, v in c.items() if k not in (field, "seed")}, sort_keys=True)
                groups.setdefault((field, rest), set()).add(c.get(field, getattr(RunConfig, field)))
    varied = {field for (field, _), values in groups.items() if len(values) > 1}
    assert varied >= {"w", "target", "lr", "zero_init"}
    for r in deviations.rows():
        if r["owner"] == "RunConfig":
            assert (r["field"] in varied) == ("not measured." not in text[r["title"]]), r["field"]
    assert said["deviations_table"].count("<svg") == len(deviations.every_effect()) > 10


def test_what_the_page_says_of_results_is_true(deviations, said, published):
    signs = {d.verdict() for frame in deviations.checkpoints().values() for d in deviations.augmented(frame)}
    assert {"supported", "contradicted"} <= signs  # augmentation helps in some cases and hurts in others
    losses: dict[str, list[tuple]] = {}
    for r in published:
        raw = r["config"].get("stats") == "none"  # whose standardised pixels are those from 0 to 1
        if r["config"].get("method") == "sidae" and "run_key" not in r and r["config"].get("w", 0.5) == 0.5 and not raw:
            last = r["epochs"][-1]
            losses.setdefault(r["config"].get("target", "standardised"), []).append((-last["l_si"], last["l_dae"]))
    assert all(1 / 4 < si / dae < 4 for si, dae in losses["standardised"])  # of about the same size
    assert all(si > 4 * dae for si, dae in losses["unit"])  # many times smaller
    assert deviations.effects("epochs") and not deviations.effects("recon")
    assert "by 3,072, the values of an image" in said["deviations_read"]
    assert f"<code>{deviations.every_effect()[0].field} = " in said["deviations_table"]


def test_what_the_page_says_of_the_code_is_true():
    assert RunConfig.decoder == methods.build(RunConfig(method="sidae", data="")).backbone.out_features
    transposed = [torch.nn.ConvTranspose2d(1, 1, k, 2, 1, 1)(torch.zeros(1, 1, 4, 4)).shape[-1] for k in range(1, 8)]
    assert transposed.count(8) == 1  # given padding and stride, one kernel size doubles
    assert RunConfig.batch / 256 == 2 and math.ceil(0.01 * 50_000 / EvalConfig.batch) == 2
    blur = next(op for op in augment.VIEWS["simsiam_grey"].first if op.name == "blur")
    assert blur.kernel // 2 == 2 * blur.sigma[1]


def test_every_stated_deviation_of_a_method_is_shown(said):
    shown = said["deviations_methods"]
    stating = [name for name, cls in methods.METHODS.items() if "Deviations" in (cls.__dict__.get("__doc__") or "")]
    assert len(stating) > 5 and all(f"- **{methods.NAMES[name]}:** " in shown for name in stating)
    assert shown.count("\n- **") == len(stating)
    for name in stating:
        words = " ".join(methods.METHODS[name].__doc__.partition("Deviations")[2].split())
        assert words.partition(": ")[2][1:][-30:] in shown


# --- data -------------------------------------------------------------------------------------------------


def test_every_named_set_has_one_row_and_its_fingerprint(sets):
    known = dict((name, f) for f, (name, _) in places.KNOWN.items())
    rows = [r["name"] for r in sets.rows()]
    assert sorted(rows) == sorted({*known, *places.EMBEDDED, *places.TORCHVISION})
    for name, row in zip(rows, sets.rows()):
        found = re.findall(r"fingerprint `(\w+)`", sets.card(row))
        assert found == ([known[name]] if name in known else [])
    assert not re.search(r"/work|shared", (ROOT / "book" / "data.csv").read_text())


def test_the_sizes_of_sets_are_those_of_the_images(sets, published):
    scored, classes = {}, {}
    for r in published:
        if "run_key" in r and r["kind"] == "linear" and "score_on" not in r["config"]:
            scored[r["data"]["name"]], classes[r["data"]["name"]] = r["n_test"], len(r["classes"])
    for row in sets.rows():
        name = row["name"]
        sizes = {s: int(row[s]) for s in ("train", "test", "unlabeled") if row[s] != "0"}
        if name in places.EMBEDDED:
            images = data.load(name)
            assert sizes == {s: len(split.images) for s, split in images.splits.items()}
            assert int(row["classes"]) == len(images.classes)
        if name in places.TRAINING:
            assert places.TRAINING[name] == sizes.get("train", sizes.get("unlabeled"))
        if name in scored:
            assert sizes["test"] == scored[name] and int(row["classes"]) == classes[name]
    assert len(scored) >= 4


def test_records_are_counted_as_their_files_hold_them(sets, published):
    table = sets.table()
    trained = Counter(r["data"]["display"] for r in published if "run_key" not in r)
    scored = Counter(r["data"]["display"] for r in published if "run_key" in r)
    for shown, n in trained.items():
        [line] = [line for line in table.splitlines() if line.startswith(f"| {shown} |")]
        assert line.startswith(f"| {shown} | {n:,}<br>") and line.endswith(f" | {scored[shown]:,} |")
        assert sum(map(int, re.findall(r": (\d+)\b", line.split("|")[2]))) == n
    assert "| STL-10 | 0 | 0 |" in table
    with data.as_published():
        run = experiments.run("sidae", "cifar10", "laptop")
    assert sets.scales_of()[run.key()] == "laptop"
