"""The faults of `mutants.py`, with which the tests are tried, cannot rot: each can be made, the tests it names are there."""

import ast
import json
import re
from pathlib import Path

import mutants
import pytest
from mutants import MUTANTS, ROOT, Mutant

AREAS = set("losses methods augment training resume store checkpoints readers evaluation claims grid notebooks".split())


def there(test: str) -> bool:
    path, _, function = test.partition("::")
    return (ROOT / path).is_file() and (not function or f"def {function.partition('[')[0]}(" in (ROOT / path).read_text())


def test_there_are_thirty_nine_and_every_area_is_among_them():
    assert len(MUTANTS) == len({m.name for m in MUTANTS}) == 39
    assert {m.name.split(".")[0] for m in MUTANTS} == AREAS
    assert all(map(there, re.findall(r"=(\S+)", mutants.WHOLE)))


@pytest.mark.parametrize("m", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_can_be_made_and_its_tests_are_there(m):
    assert not mutants.wrong(m) and m.new != m.old
    text = (ROOT / m.file).read_text().replace(m.old, m.new)
    {".py": ast.parse, ".ipynb": json.loads}.get(Path(m.file).suffix, str)(text)  # it does not merely crash
    assert all(map(there, m.tests.split())), m.tests
    assert m.tests.startswith("tests/") or m.tests == m.file


def test_what_cannot_be_tried_is_a_sentence(monkeypatch, capsys):
    assert mutants.main(["no.such"]) == 2 and capsys.readouterr().err == "There is no mutant no.such; --help lists them.\n"
    monkeypatch.setattr(mutants, "MUTANTS", [Mutant("a.b", "sidae_lib/losses.py", "Tensor", "", "tests/test_losses.py")])
    assert mutants.main([]) == 2
    assert re.fullmatch(r"a.b: its old text stands \d+ times in .*losses.py, not once; .*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_what_is_killed_what_lives_and_what_takes_too_long(monkeypatch, capsys):
    file, old = "sidae_lib/losses.py", "return scale * (a.float() @ b.float().mT)"
    test = "tests/test_losses.py::test_dot_and_soft_clip"
    before = (ROOT / file).read_bytes()
    monkeypatch.setattr(mutants, "MUTANTS", [Mutant("a.fault", file, old, "return a @ b.mT", test),
                                             Mutant("a.no_fault", file, old, "return (a @ b.mT) * scale", test)])
    assert mutants.main(["--own"]) == 1
    said = dict(re.findall(r"^(\S+) +\d+ s  (.*)$", capsys.readouterr().out, re.M))
    assert said == {"a.fault": f"killed by {test}", "a.no_fault": "survives its own tests"}
    monkeypatch.setitem(mutants.SECONDS, "own", 1)
    assert mutants.main(["--own", "a.no_fault"]) == 0 and "killed by the limit of 1 s" in capsys.readouterr().out
    assert (ROOT / file).read_bytes() == before
