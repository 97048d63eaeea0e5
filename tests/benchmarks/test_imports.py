"""Every benchmark still finds what it imports, whatever moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_its_imports_are_there(
    script: str, load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision", reason="needs torch and torchvision (extra train)")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as Python does for a script: some use each other
    load_script(script)
