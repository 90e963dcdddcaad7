"""The benchmark runs, takes turns, and counts the arithmetic of a step as one does by hand."""

import io
import os
import subprocess
import sys
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sidae_lib import check_gpu, data, experiments, small_maps, store, train
from sidae_lib.config import EvalConfig

ROOT = Path(__file__).resolve().parents[1]
D, HIDDEN, PRED = 64, 64, 16  # heads of the smoke scale


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import __main__, contenders, jpeg, timing

    return SimpleNamespace(main=__main__.main, contenders=contenders, timing=timing, jpeg=jpeg)


def test_command(benchmarks, tmp_path, capsys):
    arguments = "--quick --only floor,augment --repeats 1 --device cpu --out".split()
    assert benchmarks.main([*arguments, str(tmp_path)]) == 0
    said = capsys.readouterr().out
    tables = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in ("floor", "augment")}
    assert sorted(p.stem for p in tmp_path.iterdir()) == sorted(tables)
    for name, table in tables.items():
        assert name in said
        assert {"what", "unit", "median", "spread", "n", "hardware", "cores", "torch", "threads"} <= set(table)
        assert (table["median"] > 0).all() and (table["n"] == 1).all() and (table["spread"] == 0).all()
        assert set(table["torch"]) == {torch.__version__} and set(table["threads"]) == {1}

    views = tables["augment"].set_index("what")
    assert ("kornia" in views.index) == (find_spec("kornia") is not None)
    assert ("kornia is left out: kornia is not installed" in said) == (find_spec("kornia") is None)
    rivals = views.drop("ours")
    assert (rivals["ratio"] * views["median"]["ours"]).tolist() == pytest.approx(rivals["median"].tolist())

    floor = tables["floor"]
    best = floor.loc[(floor["unit"] == "GFLOP/s") & (floor["precision"] == "fp32"), "median"].max()
    steps = floor[floor["what"] == "step alone"]
    assert list(steps["method"]) == ["simsiam", "sidae", "dae"]
    assert (steps["floor"] * steps["gflop_per_image"]).tolist() == pytest.approx([best] * 3)
    assert (steps["share"] * steps["floor"]).tolist() == pytest.approx(steps["median"].tolist())


def rms(a, b) -> float:
    return float(np.sqrt(np.square(np.float32(a) - b).mean()))


def saved(x: np.ndarray, quality: int) -> np.ndarray:
    Image.fromarray(x).save(file := io.BytesIO(), "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def test_a_second_jpeg_costs_as_much_as_the_first(benchmarks):
    """Since its blocks are others; on the same blocks it would change little."""
    first, again, same, coarse = [], [], [], []
    for x in data.load("photos").split("test").images[::20].permute(0, 2, 3, 1).numpy():
        once = saved(x, 75)
        first.append(rms(once, x))
        again.append(rms(benchmarks.jpeg.again(once, 75), once))
        same.append(rms(saved(once, 75), once))
        coarse.append(rms(benchmarks.jpeg.again(once, 25), once))
    assert 0.8 < np.mean(again) / np.mean(first) < 1.25 and np.mean(same) < np.mean(again) / 2
    assert 1.5 < np.mean(coarse) / np.mean(again) < 2.5  # twice as much, as notebook 03 says


def test_a_set_saved_as_jpeg_again_keeps_its_order_and_its_labels(benchmarks, tmp_path):
    def command(*arguments):
        return subprocess.run([sys.executable, "-m", "benchmarks.jpeg", *arguments], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "SIDAE_DATA": str(tmp_path / "sets")})  # fmt: skip

    for arguments, sentence in ((["photos", "0"], "usage: python -m benchmarks.jpeg NAME QUALITY"),
                                (["photo", "75"], "There is no data set 'photo'")):  # fmt: skip
        failed = command(*arguments)
        assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith(sentence)
        assert not [*tmp_path.rglob("*.npz")]
    assert "test: 1,300 images, pixels change by " in command("photos", "75").stdout
    before = data.load("photos")
    with np.load(tmp_path / "sets" / "photos_jpeg75.npz") as z:
        assert {*z} == {"train_images", "train_labels", "test_images", "test_labels", "classes"}
        assert (*z["classes"],) == before.classes
        for split, part in before.splits.items():
            assert (z[f"{split}_labels"] == part.labels.numpy()).all()
            x, new = part.images.permute(0, 2, 3, 1).numpy(), z[f"{split}_images"]
            assert new.shape == x.shape and (new[-1] == benchmarks.jpeg.again(x[-1], 75)).all()


@pytest.mark.parametrize("arguments, sentence", [
    (["--only", "floor,speed"], "Unknown section speed; choose from pretrain, "),
    (["--repeats", "0"], "--repeats must be at least 1, got 0."),
])  # fmt: skip
def test_bad_arguments(arguments, sentence, benchmarks, tmp_path, capsys):
    assert benchmarks.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_contenders_take_turns(benchmarks):
    timing, turns = benchmarks.timing, []
    values = {"A": iter([2.0, 4.0, 9.0]), "B": iter([4.0, 12.0, 9.0])}

    def contender(name, **more):
        def repeat():
            turns.append(name)
            return next(values[name])

        return timing.Contender(name, lambda: repeat, **more)

    a = contender("A")
    absent = contender("C", needs="a_package_that_nobody_has")
    rows = timing.measure(timing.Bench(torch.device("cpu"), repeats=3), [a, absent, contender("B", of=a)])
    assert turns == list("ABABAB")
    assert [(r["what"], r["median"], r["spread"], r["n"]) for r in rows] == [("A", 4.0, 7.0, 3), ("B", 9.0, 8.0, 3)]
    assert rows[1]["ratio"] == 2.0 and rows[1]["of"] == "A"  # the median of 2, 3 and 1, and not 9 / 4

    values = {"A": iter([2.0, 4.0])}
    late = timing.measure(timing.Bench(torch.device("cpu"), repeats=3, deadline=0.0), [contender("A")])
    assert late[0]["n"] == 1


def convolution(c_in, c_out, meeting):
    """Multiply-adds of one image; meeting: products of a tap and a pixel along one side, padding left out."""
    return c_in * c_out * meeting**2


def test_arithmetic_is_the_sum_over_layers(benchmarks):
    # small_cnn at 32 pixels: 2x2 convolutions of stride 2 meet each pixel once, the last, of stride 1, two places twice
    first, *others = (convolution(*s) for s in ((3, 32, 32), (32, 64, 17), (64, 128, 9), (128, 256, 5), (256, 8, 4)))
    project = 32 * HIDDEN + HIDDEN**2 + HIDDEN * D
    predict = 2 * D * PRED
    doubled = ((64, 32, 1), (32, 16, 2), (16, 8, 4), (8, 8, 8), (8, 3, 16))  # 3 taps a place, the first of the first beside it
    decode = D * 64 + sum(convolution(a, b, 3 * side - 1) for a, b, side in doubled)
    heads = {"simsiam": predict, "dae": decode, "sidae": predict + decode}
    for method, head in heads.items():
        config = experiments.run(method, "digits", "smoke", batch=4)
        macs = 3 * (first + sum(others) + project + head) - first  # nobody wants the gradient of the image
        assert benchmarks.contenders.arithmetic(config) == 2 * 4 * 2 * macs  # views, images, multiply and add
        assert benchmarks.contenders.arithmetic(config.replace(batch=8)) == 2 * benchmarks.contenders.arithmetic(config)


def test_arithmetic_of_the_papers_network(benchmarks):
    config = experiments.run("simsiam", "cifar10", "paper", batch=256)
    stages = 0
    for k, (c, side) in enumerate(((64, 8), (128, 4), (256, 2), (512, 1))):
        stages += (4 if k == 0 else 3) * convolution(c, c, 3 * side - 2)
        stages += 0 if k == 0 else convolution(c // 2, c, 3 * side - 1) + convolution(c // 2, c, side)
    first = convolution(3, 64, 7 * 16 - 3 - 1 - 2)  # the first two places lose 3 and 1 of 7 taps, the last 2
    heads = 512 * 2048 + 2 * 2048**2 + 2 * 2048 * 512
    assert benchmarks.contenders.arithmetic(config) == 2 * 256 * 2 * (3 * (first + stages + heads) - first)


def test_torchs_layers_are_a_switch(benchmarks):
    """Behind it the paper's network runs torch's convolutions, bit for bit; the rule comes back, also after an error."""
    rule, c = small_maps.multiplied, benchmarks.contenders
    conv, x = small_maps.Conv(8, 8, 3, 1, 1, bias=False), torch.randn(64, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    asked = []

    def build():
        asked.append(small_maps.multiplied(1, 1, 3, x.dtype, "cpu"))
        return lambda: asked.append(small_maps.multiplied(1, 1, 3, x.dtype, "cpu")) or conv(x)

    repeat = c.torchs(build)
    for _ in range(2):
        assert torch.equal(repeat(), torch.nn.functional.conv2d(x, conv.weight, None, 1, 1))
        assert small_maps.multiplied is rule
    assert asked == [False] * 3
    with pytest.raises(ZeroDivisionError):
        c.torchs(lambda: 1 / 0)
    assert small_maps.multiplied is rule and rule(1, 1, 3, x.dtype, "cpu")


def test_the_pages_results_are_the_committed_tables(benchmarks):
    """`python -m benchmarks.report` would change nothing, and its numbers are those of the CSVs."""
    from benchmarks import report

    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert report.report() in text, "run `python -m benchmarks.report`"
    narrow = pd.read_csv(ROOT / "benchmarks" / "results" / "narrow.csv").query("scale == 'laptop' and precision == 'fp32'")
    rate = narrow.set_index("what")["median"]["pipeline, own mode"]
    assert f"| laptop's network, whole pipeline, images/s | 1,000 | {rate:,.0f} |" in text


def test_a_table_of_times_is_of_one_machine(benchmarks, tmp_path):
    """A CSV that two machines wrote into makes two tables, and a target is compared with the rows of one."""
    from benchmarks import report

    where = {"cores": 2, "threads": 2, "torch": "x"}
    rows = [{"what": what, "at": 50_000, "median": s, "hardware": h, **where}
            for h, s, kinds in (("B", 1.0, ["exact"]), ("A", 30.0, ["exact", "index"])) for what in kinds]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)
    text = report.report(tmp_path)
    assert text.count("### `pairs` (A, 2 cores, 2 threads, torch x)") == text.count("### `pairs` (B, 2 cores,") == 1
    assert "| all pairs among 50,000 images, s | at most 60 | 30 |" in text


def test_hours_of_the_whole_paper(benchmarks):
    """One run of SidAE on CIFAR-10 is 200 x 50,000 images; five seeds of it and eighteen more configurations are counted."""
    from benchmarks import report

    alone = report.paper_hours({"simsiam": 1e4})
    sets = 5 * 200 * (50_000 + 60_000 + 60_000) + 5 * 200 * 50_000  # three sets, and the pool
    assert alone == pytest.approx(sets / 1e4 / 3600)


def test_devices_compares_what_both_stores_have(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import devices

    stores = {"a": ("one", [50.0, 60.0, 70.0]), "b": ("other", [50.25, 59.0, 70.5]), "c": ("one", [0.0])}
    for name, (device, accuracy) in stores.items():
        monkeypatch.setenv("SIDAE_RUNS", str(tmp_path / name))
        for n, value in enumerate(accuracy):  # the third of "b" has another key, which no column of the table shows
            run = experiments.run("untrained", "digits", "smoke", seed=n)
            c = EvalConfig(run=run, label_seed=int((name, n) == ("b", 2)))
            store.keep(c, {
                "config": c.to_dict(), "run_key": c.run.key(), "key": c.key(), "epoch": 0, "kind": "linear", "n_train": 1437,
                "n_test": 360, "data": {"name": "digits", "display": "digits"}, "accuracy": value,
                "provenance": {"device": device, "threads": 1}})  # fmt: skip
    [row] = devices.compare(tmp_path / "a", tmp_path / "b").to_dict("records")
    assert row == {"what": "linear, accuracy", "unit": "points", "median": (0.25 + 1.0) / 2, "largest": 1.0, "n": 2,
                   "hardware": "one, 1 thread, against other, 1 thread"}  # fmt: skip
    assert devices.compare(tmp_path / "a", tmp_path / "c").empty  # the same device twice says nothing


@pytest.mark.slow
def test_check_gpu_runs_at_toy_size(tmp_path, monkeypatch, cli):
    """Every mode of a CPU, then the last in two and in three processes; the same path as on a GPU, without a graph."""
    monkeypatch.setattr(check_gpu, "get_context", lambda _: get_context("fork"))  # or each process imports torch anew
    done = cli("check-gpu", "--seconds", "1", "--device", "cpu", "--out", str(tmp_path / "step.csv"))
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert "rehearsal at toy size" in first and "measures nothing" in first
    assert [s.split(",")[0] for s in lines[:3]] == ["SidAE", "SimSiam", "Autoencoder"]
    assert all("0.0e+00 of the way moved" in s for s in lines[:3])  # one thread of a CPU orders its sums
    table = pd.read_csv(tmp_path / "step.csv")
    assert list(table["mode"]) == ["eager", *["eager graph"] * 3]
    assert list(table["processes"]) == [1, 1, 2, 3] and table["method"].iloc[-1] == "sidae + simsiam + dae"
    assert [s[:12].strip() for s in lines[-4:]] == list(table["mode"])
    assert (table["ms_per_step"] * table["images_per_second"] / 1000).round(3).eq(64).all()  # the batch
    assert (table["seconds_per_run"] * table["runs_per_quarter"]).round(3).eq(900).all() and (table["share"] > 0).all()
    assert {*pd.read_csv(ROOT / "benchmarks" / "results" / "cuda" / "step.csv")} < {*table}


@pytest.mark.slow
def test_a_graph_that_does_another_step_is_found(monkeypatch):
    """A graph that moves each weight by a thousandth of its size once more lies apart; two runs of single launches do not."""
    advance, cpu = train.Run.advance, torch.device("cpu")

    def wrong(run, *batch):
        advance(run, *batch)
        if run.mode.endswith("graph"):
            torch._foreach_mul_([p.data for p in run.method.parameters()], 1.001)

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # which `apart` sets, to be taken back
    monkeypatch.setattr(train.Run, "advance", wrong)
    try:
        mode, far, again = check_gpu.apart("sidae", "eager", cpu)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = False, True
    assert mode == "eager graph" and far > check_gpu.NEAR and again == 0
