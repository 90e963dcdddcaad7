"""As many threads as cores are free: the arithmetic, and real processes that spin on every core."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from test_three_steps import run_of

from sidae_lib import data, experiments, paths, runs, threads, train
from sidae_lib.config import SidaeError
from sidae_lib.threads import Look

LINUX = pytest.mark.skipif(not threads.STAT.exists(), reason="only Linux says what else runs")
SPIN = "import time; t = time.monotonic()\nwhile time.monotonic() - t < 60: pass"


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def spinning():
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(os.cpu_count())]
    yield
    for p in processes:
        p.kill()
        p.wait()


@pytest.mark.parametrize("others, cores, left", [
    (0.0, 2, 2),  # core seconds in ten seconds
    (10.0, 2, 1),  # another has one core
    (13.3, 2, 1),  # two others and we share alike
    (4.0, 2, 2),  # less than half a core is no reason
    (640.0, 64, 1),  # at least one
    (120.0, 64, 52),
])  # fmt: skip
def test_free_is_what_others_left(others, cores, left):
    assert threads.free(Look(100.0, 1000.0), Look(110.0, 1000.0 + others), cores) == left


def test_nice_work_idle_time_and_our_own_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    own = SimpleNamespace(user=0.4, children_user=0.3, system=0.2, children_system=0.1)
    monkeypatch.setattr(os, "times", lambda: own)
    threads.STAT.write_text("cpu  300 7000 200 9000 11 12 13 14 15 16\ncpu0 1 2 3 4\n")
    for nice, ours in ((0, 1.0), (5, 0.3)):  # what we compute while nice is not in the first number
        monkeypatch.setattr(os, "nice", lambda by, nice=nice: nice)
        assert threads.look().others == pytest.approx(500 / os.sysconf("SC_CLK_TCK") - ours)
    threads.STAT.write_text("what another system says")
    assert threads.look() is None
    threads.STAT.unlink()
    assert threads.look() is None


def test_the_first_look_is_taken_before_torch_is_imported():
    """So that what else runs during the seconds of that import is seen, and the first run has its number at once."""
    code = ("import sys, sidae_lib\nfrom sidae_lib import threads\n"
            "assert 'torch' not in sys.modules and (threads._last is None) != threads.STAT.exists()")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, check=True)


@LINUX
def test_a_run_beside_busy_processes_takes_one_thread(own_store, two_threads, spinning, monkeypatch):
    monkeypatch.setattr(threads, "SECONDS", 0.3)
    monkeypatch.setattr(threads, "_free", None)  # put back afterwards, with what the machine was like before
    monkeypatch.setattr(threads, "_last", threads.look())
    time.sleep(1)
    record, = runs.fetch_all([experiments.run("simsiam", "digits", "smoke", epochs=1)], device="cpu", log=lambda _: None)
    assert record["provenance"]["threads"] == 1
    assert torch.get_num_threads() == 2  # afterwards it is as it was


def test_a_quiet_machine_gives_all_and_a_busy_one_takes_them(tmp_path, two_threads, monkeypatch):
    """As the machine says how much was used; seen again once a second, and only within."""
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    ticks, seen = os.sysconf("SC_CLK_TCK"), []

    def others(seconds: float) -> None:  # have used so many of cores since the machine started
        own = os.times()
        threads.STAT.write_text(f"cpu {round((own.user + own.children_user + seconds) * ticks)} 0 "
                                f"{round((own.system + own.children_system) * ticks)} 0\n")  # fmt: skip

    def later(seconds: float) -> None:  # by ten
        others(seconds)
        monkeypatch.setattr(threads, "_last", threads._last._replace(clock=threads._last.clock - 10))
        threads.fit()
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    others(0)
    monkeypatch.setattr(threads, "_last", threads.look())
    monkeypatch.setattr(threads, "_free", None)
    with threads.fitted():
        for total in (0, 20):  # nothing runs, then two processes
            later(total)
    assert torch.get_num_threads() == 2
    with threads.fitted():  # the next run, at once, begins as the last one ended
        seen.append(torch.get_num_threads())
        for total in (40, 40):  # two processes, then nothing
            later(total)
        threads.STAT.write_text("no such numbers, but it is too early to look\n")
        threads.fit()
    assert seen == [2, 1, 1, 1, 2] and torch.get_num_threads() == 2


def test_a_number_that_is_asked_for_stays(two_threads, monkeypatch):
    monkeypatch.setenv("SIDAE_THREADS", "3")
    with pytest.raises(ZeroDivisionError), threads.fitted():
        threads.fit()
        assert torch.get_num_threads() == 3
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("method", ["sidae", "simclr", "byol", "dino"])
def test_one_thread_and_two_make_the_same_record(method, two_threads, tmp_path):
    """They add in another order, so the last digits differ, and these alone: every number of four steps to a thousandth,
    most to 1e-5. NNCLR and FNC, which choose neighbours, may choose others."""
    config, numbers = run_of(method).config, []
    for n in (1, 2):
        torch.set_num_threads(n)
        images = data.by_fingerprint(config.data)
        record = train.pretrain(config, images, tmp_path / str(n), device=torch.device("cpu"))
        assert record["provenance"]["threads"] == n
        numbers.append([{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
                        for line in (record["untrained"], *record["epochs"])])  # fmt: skip
    for one, two in zip(*numbers, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_number_that_is_none_is_one_sentence(monkeypatch, value):
    monkeypatch.setenv("SIDAE_THREADS", value)
    with pytest.raises(SidaeError, match=f"SIDAE_THREADS must be a number of threads, 1 or more, not '{value}'."):
        with threads.fitted():
            pass
