"""docs/measurements.md is run as it is written: its Python, its commands, and Debian's programs where they are."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from markdown_it import MarkdownIt

from espmedsam_edge.cli import main

pytest.importorskip("highdicom", reason="needs highdicom (extra dicom)")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "measurements.md"


def blocks() -> Iterator[tuple[str, str]]:
    """Language and text of each block of code."""
    for token in MarkdownIt("commonmark").parse(PAGE.read_text()):
        if token.type == "fence":
            yield token.info, token.content


def run(line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "espmedsam-edge":
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code in (0, None), line
    elif program == "python":
        subprocess.run([sys.executable, *arguments], check=True)
    elif shutil.which(program) is not None:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if line.startswith(("Error", "E:"))] == []


def test_the_page_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = []
    for kind, text in blocks():
        kinds.append(kind)
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        else:
            for line in text.splitlines():
                run(line)
    assert sorted(kinds) == ["python", "python", "sh", "sh", "sh"]
    for name in ("nuclei-overlay.png", "counts.csv", "sonogram-seg.dcm", "sonogram-sr.dcm", "curve.mkv"):
        assert Path(name).stat().st_size > 0
    labels = cv2.imread("labels/nuclei.png", cv2.IMREAD_UNCHANGED)
    assert labels is not None
    with Path("nuclei.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(np.unique(labels)) - 1 > 20
    assert {row["unit"] for row in rows} == {"um"}
    line = json.loads(Path("sonogram.jsonl").read_text())
    assert line["objects"] == len(line["instances"])
    assert all("mm" in one for one in line["instances"])
    with Path("curve.csv").open(newline="") as stream:
        assert len({row["frame"] for row in csv.DictReader(stream)}) > 8
