"""What a contributor reads and what a checker says: types and style are clean, citations hold."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sidae_lib

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)})  # fmt: skip


def test_ruff_is_clean():
    done = run(sys.executable, "-m", "ruff", "check", "--no-cache", ".")
    assert done.returncode == 0, done.stdout


def test_types_are_clean(tmp_path):
    done = run(sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "sidae_lib")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_types_are_checked(tmp_path):
    """A wrong argument in a function without annotations is found: the configuration is not a blank cheque."""
    (tmp_path / "bad.py").write_text("from sidae_lib.losses import info_nce\n\ndef f():\n    return info_nce(1)\n")
    done = run(sys.executable, "-m", "mypy", "--config-file", str(ROOT / "mypy.ini"), "--cache-dir", str(tmp_path / "c"),
               "bad.py", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1 and "Missing positional argument" in done.stdout


def test_every_public_function_says_what_it_does():
    """A function or class without a docstring is private, tiny, or named by its method's paper."""
    bare = []
    for path in (ROOT / "sidae_lib").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_" and not ast.get_docstring(node):
                if node.end_lineno - node.lineno > 4:
                    bare.append(f"{path.name}: {node.name}")
    assert bare == []


def test_the_files_that_contributing_names_are_there():
    named = re.findall(r"`((?:sidae_lib|tests|notebooks)/[\w/.]+\.\w+|\w+\.(?:py|csv|lock|sh))`", CONTRIBUTING)
    assert len(named) > 8
    for name in named:
        assert list(ROOT.glob(name)) or list(ROOT.glob(f"*/{name}")) or list(ROOT.glob(f"*/*/{name}")), name


def test_citation_agrees_with_the_package_and_the_readme():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["version"] == sidae_lib.__version__ and cff["license"] == "MIT"
    paper, readme = cff["preferred-citation"], (ROOT / "README.md").read_text()
    assert paper["title"] in readme and all(a["family-names"] in readme for a in paper["authors"])
    assert f"## {sidae_lib.__version__}" in (ROOT / "CHANGELOG.md").read_text()
