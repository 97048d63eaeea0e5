"""The reference of the commands is what the program says."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType


def test_the_reference_is_not_stale(load_script: Callable[[str], ModuleType]) -> None:
    commands = load_script("tools/commands.py")
    assert commands.PAGE.read_text() == commands.page(), "write it anew: python tools/commands.py"
