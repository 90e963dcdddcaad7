"""The library's shape: imports are a line without circles, and every piece is small enough to read in one go."""

import ast

import pytest

from sidae_lib import paths

LIBRARY = paths.ROOT / "sidae_lib"
ORDER = """config paths losses threads layout pictures arrays tables reader small_maps networks augment
    methods places data pairs step checkpoint train probes portrait evaluate store adoption tasks processes
    grid runs differences frames claims figures diagrams scales copies own experiments recorded verify
    estimator check_gpu batch __main__""".split()  # as they may import
FILES = sorted(LIBRARY.rglob("*.py"))


def room(path) -> str:
    """The module a file belongs to; the methods are one."""
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return parts[0] if parts[0] != "__init__" else ""


def imported(path) -> set[str]:
    """The modules of the library that a file imports, wherever in the file."""
    inside, out = len(path.relative_to(LIBRARY).parts), set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == inside:
            out |= {node.module.split(".")[0]} if node.module else {name.name for name in node.names}
    return out & {*ORDER}


def test_every_module_has_its_place():
    assert {room(path) for path in FILES} - {""} == {*ORDER} and len({*ORDER}) == len(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(LIBRARY)))
def test_a_module_imports_only_those_before_it(path):
    """Late imports too: else there would be a circle that a start in another order meets."""
    own = room(path)
    before = {*ORDER} if not own else {*ORDER[: ORDER.index(own)]}
    assert imported(path) - {own} <= before


def test_a_function_has_sixty_lines_and_a_file_four_hundred():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (path.name, node.name)


def test_tests_are_at_most_eighteen_lines_for_ten_of_the_library():
    tests, library = (sum(p.read_text().count("\n") for p in files) for files in (LIBRARY.parent.glob("tests/*.py"), FILES))
    assert tests <= 1.8 * library
