"""The Python in the documentation is of the package as it is: what it imports exists, and takes what it is given."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt  # rich's

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])


def blocks(text: str) -> Iterator[str]:
    """The blocks of a page's code that import this package."""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type in ("fence", "code_block") and re.search(r"^(from|import) espmedsam_edge", token.content, re.M):
            yield token.content


def wrong(source: str) -> list[str]:
    """What a block takes from the package that is not there: names, attributes of them, and arguments by name."""
    tree = ast.parse(source)
    names: dict[str, Any] = {}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "espmedsam_edge":
            module = import_module(node.module or "")
            for alias in node.names:
                if hasattr(module, alias.name):
                    names[alias.asname or alias.name] = getattr(module, alias.name)
                else:
                    found.append(f"{node.module}.{alias.name}")

    def resolve(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := resolve(node.value)) is not None:
            if not hasattr(owner, node.attr):
                found.append(ast.unparse(node))
            return getattr(owner, node.attr, None)
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := resolve(node.func)) is not None:
            known = inspect.signature(called).parameters
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
                found += [f"{ast.unparse(node.func)}({word.arg})" for word in node.keywords if word.arg not in known]
    return found


def test_pages_name_extras_that_there_are() -> None:
    extras = set(re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    named = {
        (page.name, extra)
        for page in PAGES
        for words in re.findall(r"(?:espmedsam-edge|\.)\[([a-z,-]+)\]'", page.read_text())
        for extra in words.split(",")
    }
    assert len({extra for _, extra in named}) > 10
    assert {(page, extra) for page, extra in named if extra not in extras} == set()


def test_what_is_not_there_is_found() -> None:
    page = """
```python
from espmedsam_edge import Segmenter, nothing
from espmedsam_edge.bundle import Bundle as B

B.open("a", how=1)
B.close_all()
with Segmenter.load("b", backend="onnxruntime") as segmenter:
    print("text", sep="")
```
"""
    (block,) = blocks(page)
    assert wrong(block) == ["espmedsam_edge.nothing", "B.open(how)", "B.close_all"]


def documented() -> list[Any]:
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page.read_text()))
    ]


@pytest.mark.parametrize("block", documented())
def test_python_in_the_documentation_is_of_this_package(block: str) -> None:
    assert wrong(block) == []
