"""Tests and notebooks alike: one thread a process, an empty store where a test wants one, and a last line that says it all."""

import json
import os
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
from joblib import cpu_count

# One test process a core (run_all.sh), so one thread each; for the processes that a test starts too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")  # before matplotlib is imported; run_all.sh lets the notebooks' kernels choose

import sidae_lib  # noqa: E402, F401  (before torch: it says how OpenMP threads wait)

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    """Notebooks are validated by nbval as they are committed: every printed number and table is compared with a fresh replay of
    the published records, in an empty store and without data."""
    if not any(arg.rstrip("/").endswith("notebooks") or ".ipynb" in arg for arg in config.args):
        return
    vars(config.option).update(nbval=True, nbval_current_env=True, nbval_cell_timeout=300)
    if not hasattr(config, "workerinput"):  # a worker of xdist inherits the folders
        folder = TemporaryDirectory(ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ |= {f"SIDAE_{name.upper()}": f"{folder.name}/{name}" for name in ("runs", "data", "figures")}
        os.environ |= {"TQDM_DISABLE": "1", "SIDAE_STATIC": "1"}
        os.environ["MPLBACKEND"] = ""  # ipykernel chooses


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return min(cpu_count(), 4)  # each takes one to two GiB


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--all") or any("::" in arg for arg in config.args)  # who names a test wants it
    slow = [] if wanted else [item for item in items if item.get_closest_marker("slow")]
    config.stash[LEFT_OUT] = len(slow)
    if hasattr(config, "workeroutput"):  # a worker of xdist, whose caller counts no test that is left out
        config.workeroutput["left out"] = len(slow)
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", 0)  # every worker collects every test


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """The last line: what ran, what did not and why, and how to run the first failure alone. run_all.sh's stages add up what
    they found in the file SIDAE_TESTED."""
    result = yield
    if hasattr(session.config, "workeroutput"):
        return result
    stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
    cells = getattr(session.config.option, "nbval", False)
    reasons = [r.longrepr[2].removeprefix("Skipped: ") for r in stats.get("skipped", [])]
    found = {"what": "notebook cells" if cells else "tests", "passed": len(stats.get("passed", [])),
             "failed": [r.nodeid for kind in ("failed", "error") for r in stats.get(kind, [])],
             "skipped": Counter(reasons), "left out": session.config.stash.get(LEFT_OUT, 0)}
    if not (file := os.environ.get("SIDAE_TESTED")):
        print(last_line([found]))
        return result
    with open(file, "a+") as f:
        f.seek(0)
        stages = [*map(json.loads, f), found]
        f.write(json.dumps(found) + "\n")
    Path(f"{file}.line").write_text(last_line(stages) + "\n")  # which run_all.sh shows when its last stage has ended
    return result


def last_line(stages: list[dict]) -> str:
    failed = [nodeid for s in stages for nodeid in s["failed"]]
    skipped = sum((Counter(s["skipped"]) for s in stages), Counter())
    said = [" and ".join(f"{s['passed']:,} {s['what']}" for s in stages) + " passed"]
    if failed:
        first = failed[0].split("::")[0] if ".ipynb" in failed[0] else failed[0]  # a cell needs those before it
        said.append(f"{len(failed)} failed; the first alone: ./run_all.sh test {shlex.quote(first)}")
    if left := sum(s["left out"] for s in stages):
        said.append(f"{left} slow tests left out, --all runs them")
    if skipped:
        said.append(f"{skipped.total()} skipped: " + ", ".join(f"{why} ({n})" for why, n in skipped.items()))
    return "; ".join(said) + "."


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own that holds an empty store, no published records and its figures."""
    for name in ("runs", "records", "figures"):
        monkeypatch.setenv(f"SIDAE_{name.upper()}", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def no_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, no published records, and a process that has seen no image set yet."""
    from sidae_lib import data

    for name in ("data", "records"):
        monkeypatch.setenv(f"SIDAE_{name.upper()}", str(tmp_path / name))
    monkeypatch.setattr(data, "_names", {})
    data._load.cache_clear()
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture
def trained(own_store: Path, session: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `store`, but with the runs that other tests of this session have asked for: for those that only look at them."""
    monkeypatch.setenv("SIDAE_RUNS", str(session / "trained"))
    return own_store


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., CompletedProcess[str]]:
    """`python -m sidae_lib ...` in this process, which has imported all that a new one would spend seconds on."""
    from sidae_lib.__main__ import main

    def call(*args: str) -> CompletedProcess[str]:
        capsys.readouterr()
        with mock.patch.dict(os.environ):  # --data and --bundle are told to child processes through it
            code = main([*args])
        return CompletedProcess(args, code, *capsys.readouterr())

    return call
