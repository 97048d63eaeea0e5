"""The reference of the commands is what the program says, and commands in the documentation are of this program."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt  # rich's

from espmedsam_edge.cli import COMMANDS, build_app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
PROGRAM = "espmedsam-edge"


def test_the_reference_is_not_stale(load_script: Callable[[str], ModuleType]) -> None:
    commands = load_script("tools/commands.py")
    assert commands.PAGE.read_text() == commands.page(), "write it anew: python tools/commands.py"


def calls(page: str) -> Iterator[str]:
    """The program's calls in a page: lines of blocks, continued ones joined, and code in its text that has options."""
    for token in MarkdownIt("commonmark").parse(page):
        if token.type in ("fence", "code_block"):
            for line in token.content.replace("\\\n", " ").splitlines():
                found = re.search(rf"(?:^|[\s/]){PROGRAM} ([^#|;&]+)", line)
                if found and re.match(r"[\s$]*(\w+=\S+ |sudo |/\S*)*" + PROGRAM, line):
                    yield found[1].strip()
        for inner in token.children or []:
            if inner.type == "code_inline" and (found := re.match(rf"{PROGRAM} ([^#|;&]+)$", inner.content)):
                yield found[1].strip()


def refusal(call: str) -> str:
    """Why the program would not take a call's words; empty if it would."""
    words = [word for word in call.replace("'", "").split() if word not in ("-v", "-q", "--verbose", "--quiet")]
    if words[0].startswith("-") or words[0] == "COMMAND":
        return ""
    if words[0] not in COMMANDS:
        return f"no command {words[0]}"
    command: Any = typer.main.get_command(build_app(words[0])).commands[words[0]]  # type: ignore[attr-defined]
    words = words[1:]
    while hasattr(command, "commands") and words:
        if words[0] not in command.commands:
            return f"no command {words[0]} of {command.name}"
        command, words = command.commands[words[0]], words[1:]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    unknown = [word for word in words if re.match("--?[a-z]", word) and word.partition("=")[0] not in known]
    return f"no option {unknown[0]}" if unknown else ""


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ("infer a.png --masks m", ""),
        ("infer a.png --mask m", "no option --mask"),
        ("infre a.png", "no command infre"),
        ("train segments x", "no command segments of train"),
        ("-v engines clean --older", "no option --older"),
        ("--version", ""),
    ],
)
def test_what_the_program_would_not_take_is_found(call: str, why: str) -> None:
    assert refusal(call) == why


def test_calls_are_found_in_blocks_and_text() -> None:
    page = f"```\nA=1 {PROGRAM} infer a \\\n  --out b  # c\ncat a | {PROGRAM} no\n```\n\n`{PROGRAM} x`, {PROGRAM} y"
    assert list(calls(page)) == ["infer a    --out b", "x"]


def documented() -> list[Any]:
    return [
        pytest.param(call, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, call in enumerate(calls(page.read_text()))
    ]


@pytest.mark.parametrize("call", documented())
def test_commands_in_the_documentation_are_of_this_program(call: str) -> None:
    assert refusal(call) == ""
