"""What keeps the house small: short modules, short functions, rooms that one can look over."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "espmedsam_edge"
MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
MOST_LINES, MOST_OF_A_FUNCTION, MOST_MODULES = 400, 80, 18


def functions(source: str, *, command: bool) -> Iterator[tuple[str, int]]:
    """Name and lines of every function; of a command's its options, which are its parameters, do not count."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            begin = node.body[0].lineno if command else node.lineno
            yield node.name, (node.end_lineno or begin) - begin + 1


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (*MODULES, *TOOLS)}
    assert len(lengths) > 200  # they were found
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_function_is_longer_than_80_lines() -> None:
    longest = {}
    for path in MODULES:
        for name, lines in functions(path.read_text(), command=path.parent.name == "cli"):
            longest[f"{path.relative_to(PACKAGE)}: {name}"] = lines
    assert {name: lines for name, lines in longest.items() if lines > MOST_OF_A_FUNCTION} == {}


def test_a_function_is_measured_from_its_first_line_to_its_last() -> None:
    source = (
        "def short(a,\n          b):\n    return a\nclass C:\n    async def m(self):\n        x = 1\n        return x\n"
    )
    assert dict(functions(source, command=False)) == {"short": 3, "m": 3}
    assert dict(functions(source, command=True)) == {"short": 1, "m": 2}


def test_no_room_has_more_than_18_modules() -> None:
    rooms = Counter(str(path.parent.relative_to(PACKAGE)) for path in MODULES)
    assert {room: modules for room, modules in rooms.items() if modules > MOST_MODULES} == {}
