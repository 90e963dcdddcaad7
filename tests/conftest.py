import os
from pathlib import Path

import pytest

import sidae_lib  # noqa: F401  (before torch: it says how OpenMP threads wait)

os.environ["MPLBACKEND"] = "agg"  # before any test imports matplotlib, and for every process a test starts


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own that holds an empty store, no published records and its figures."""
    for name in ("runs", "records", "figures"):
        monkeypatch.setenv(f"SIDAE_{name.upper()}", str(tmp_path / name))
    return tmp_path
