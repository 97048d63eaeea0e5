"""The import rules hold themselves: a wrong arrow or a room that stands in no layer fails the check."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="needs import-linter (extra dev)")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's Python files and the rules, to plant something in."""
    folder = tmp_path_factory.mktemp("house")
    keep = shutil.ignore_patterns("__pycache__", "weights", "*.cu", "*.cuh", "page")
    shutil.copytree(ROOT / "espmedsam_edge", folder / "espmedsam_edge", ignore=keep)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def check(folder: Path) -> tuple[int, str]:
    """``lint-imports`` there: its exit code and what it prints."""
    command = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "500"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("planted", "line", "complaint"),
    [
        ("runtime/sources/planted.py", "from espmedsam_edge.runtime.sinks import sink", "sources is not allowed"),
        ("runtime/video/planted.py", "import espmedsam_edge.runtime.dicom.reading", "video is not allowed"),
        ("imaging/planted.py", "from espmedsam_edge.runtime.latency import Latency", "imaging is not allowed"),
        ("machine/planted.py", "import torch", "machine is not allowed to import torch"),
        ("runtime/attic/__init__.py", "", "runtime.attic"),
        ("attic.py", "", "espmedsam_edge.attic"),
    ],
)
def test_what_breaks_the_plan_fails_the_check(copy: Path, planted: str, line: str, complaint: str) -> None:
    file = copy / "espmedsam_edge" / planted
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"{line}\n")
    try:
        code, told = check(copy)
    finally:
        file.unlink()
        if file.name == "__init__.py":
            shutil.rmtree(file.parent)
    assert code == 1
    assert complaint in told
    assert "0 broken" not in told


def test_the_package_as_it_is_keeps_the_plan(copy: Path) -> None:
    code, told = check(copy)
    assert code == 0, told
