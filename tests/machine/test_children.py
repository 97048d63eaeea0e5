"""Children run this package's modules and Python's, whatever lies in the folder that the command is run in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from espmedsam_edge.doctor import probe
from espmedsam_edge.machine import children
from espmedsam_edge.runtime.inductor import worker


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pictures, in which whoever packed it has put modules; the command is run in it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for module in ("importlib", "json", "re", "tempfile", "cv2", "types", "warnings"):
        (folder / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{module} ')")
    monkeypatch.chdir(folder)
    return tmp_path / "ran"


def test_no_child_runs_what_lies_in_the_folder(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greeting.py").write_text("import json\ndef main():\n    print(json.dumps('hello'))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    python = tmp_path / "python"  # without site-packages, which may have imported importlib already
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with children.start_child("greeting", "the greeting", subprocess.DEVNULL) as child:
        assert child.stdout is not None
        said = child.stdout.read()
    assert (said, child.returncode, planted.exists()) == (b'"hello"\n', 0, False)


def test_doctor_asks_without_what_lies_in_the_folder(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import re, tempfile, types; say(version=str(hasattr(re, 'compile')))"
    monkeypatch.setitem(probe.SCRIPTS, "thing", (("json",), script))
    assert probe.ask("thing") == probe.Answer(True, {"version": "True"})
    assert not planted.exists()


def test_what_torch_starts_leaves_the_folder_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PYTHONSAFEPATH"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    worker._keep_private(tmp_path)
    assert os.environ["PYTHONSAFEPATH"] == "1"
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == tmp_path
