"""The look-up of advisories: what it makes of pip-audit's report, and that it passes where none can be had."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", Path(__file__).parents[2] / "tools" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SKIPPED = {"name": "a", "skip_reason": "not found"}
CLEAN = {"name": "b", "version": "1", "vulns": []}
BAD = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        (None, 0, "cannot be reached"),
        ([SKIPPED, SKIPPED], 0, "cannot be reached"),
        ([CLEAN], 0, "0 advisories for 1 packages."),
        ([SKIPPED, CLEAN], 0, "1 are not known"),
        ([CLEAN, BAD], 1, "c 2: PYSEC-1, mended in 3"),
    ],
)
def test_advisories_fail_and_silence_passes(
    audit: ModuleType, packages: list[dict[str, Any]] | None, code: int, words: str
) -> None:
    text, found = audit.verdict(packages)
    assert found == code
    assert words in text


def test_an_advisory_that_is_accepted_passes(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(audit.ACCEPTED, "PYSEC-1", "a reason")
    assert audit.verdict([BAD])[1] == 0


def test_no_answer_is_no_report(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **named: object) -> Any:
        raise subprocess.TimeoutExpired("pip-audit", 1)

    monkeypatch.setattr(audit.subprocess, "run", fails)
    assert audit.report() is None
    monkeypatch.setattr(audit.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "no network"))
    assert audit.report() is None
