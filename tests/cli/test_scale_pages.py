"""docs/scale.md and docs/dicom-network.md, followed word by word as far as that goes here; Ray: tests/batch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
from markdown_it import MarkdownIt
from seg_sources import save_dicom
from toy_bundles import save_toy_bundle

PAGES = Path(__file__).parents[2] / "docs"
SHARDS = 3  # instead of the pages' 32


_BEFORE = ("pip install", "espmedsam-edge weights")  # done already: the program is there, and a toy of a bundle


def blocks(page: str, language: str) -> list[str]:
    """The page's blocks of code, without what is done already."""
    tokens = MarkdownIt("commonmark").parse((PAGES / page).read_text())
    found = [token.content for token in tokens if token.type == "fence" and token.info == language]
    return ["\n".join(line for line in text.splitlines() if not line.startswith(_BEFORE)) for text in found]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A reader's folder: the program on the path, a bundle and studies."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in (("espmedsam-edge", "-m espmedsam_edge"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    save_toy_bundle(tmp_path / "colonoscopy.bundle", ("histopathology",))
    generator = np.random.default_rng(4)
    os.mkdir("studies")
    for number in range(7):
        assert cv2.imwrite(f"studies/p{number}.png", generator.integers(0, 256, (48, 64, 3), np.uint8))
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}


def run(text: str, environment: dict[str, str]) -> None:
    done = subprocess.run(["bash", "-e"], input=text, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_going_on_and_shares(environment: dict[str, str]) -> None:
    once, parallel, slurm, joined = (text.replace("32", str(SHARDS)) for text in blocks("scale.md", "bash")[:4])
    run(once, environment)
    whole, masks = Path("areas.csv").read_text().splitlines(), sorted(path.name for path in Path("masks").iterdir())
    assert (len(whole), len(masks)) == (8, 7)
    shutil.rmtree("masks")
    shutil.rmtree("masks.journal")
    for number in range(1, SHARDS + 1):
        run(slurm, {**environment, "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": str(SHARDS)})
    if shutil.which("parallel") is not None:
        run(parallel, environment)  # finds all done
    run(joined, environment)
    assert sorted(path.name for path in Path("masks").iterdir()) == masks
    assert sorted(Path("areas.csv").read_text().splitlines()) == sorted(whole)


@pytest.fixture
def listener(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The page's first block, running."""
    command = blocks("dicom-network.md", "bash")[0]
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command.strip()}"], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while line := process.stderr.readline():
        if line.startswith("Listening on"):
            break
    yield process
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.skipif(find_spec("pynetdicom") is None, reason="needs the extra dicom-network")
def test_the_dicom_network(environment: dict[str, str], listener: subprocess.Popen[str]) -> None:
    for number in range(2):
        save_dicom(Path(f"study/{number}.dcm"))
    senders = 0
    for line in blocks("dicom-network.md", "bash")[1].strip().splitlines():
        if shutil.which(line.split()[0], path=environment["PATH"]) is not None:
            run(line, environment)
            senders += "storescu" in line
    assert senders >= 1
    assert listener.stderr is not None
    for _ in range(2):
        assert listener.stderr.readline().endswith(": segmented and delivered.\n")
    assert len(list(Path("dicom-segmentations").glob("*.dcm"))) == 2
    listener.send_signal(signal.SIGTERM)
    assert listener.wait(30) == 0
    assert not any(Path("dicom-queue/waiting").iterdir())
