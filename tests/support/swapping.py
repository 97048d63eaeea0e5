"""A file that another process replaces the moment it is opened, so that a second look finds another one."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


def swap_when_opened(monkeypatch: pytest.MonkeyPatch, path: Path, contents: Sequence[bytes]) -> list[Path]:
    """Put the first content at ``path``; after each opening the next one in turn. What it returns grows by each."""
    opened: list[Path] = []

    def then_swap(open_: Callable[..., Any]) -> Callable[..., Any]:
        def swapping(file: Any, *arguments: Any, **more: Any) -> Any:
            result = open_(file, *arguments, **more)
            if not isinstance(file, int) and os.fspath(file) == str(path):
                opened.append(path)
                other = path.with_name("other")
                other.write_bytes(contents[len(opened) % len(contents)])
                other.replace(path)
            return result

        return swapping

    path.write_bytes(contents[0])
    for module in (os, io, builtins):
        monkeypatch.setattr(module, "open", then_swap(module.open))
    return opened
