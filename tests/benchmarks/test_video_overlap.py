"""benchmarks/video_overlap.py: each stage does its work alone, and the ratio is of the slowest one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.runtime.backends.backend import Choice
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sources.files import VideoFile

STYLE = OverlayStyle((255, 200, 0))


@pytest.fixture
def overlap(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/video_overlap.py")


class Resting:
    """A backend whose network takes its time and no core, as one on a GPU."""

    name, device = "resting", "nowhere"

    def __init__(self, graph: Any, seconds: float) -> None:
        self.graph, self._seconds, self.runs = graph, seconds, 0

    def run(self, image: Any) -> Any:
        self.runs += 1
        time.sleep(self._seconds)
        return np.ones(self.graph.output_shape, np.float32)

    def close(self) -> None:
        pass


@pytest.fixture
def resting(toy_bundle: Bundle) -> Iterator[Segmenter]:
    with Segmenter(toy_bundle, Choice(Resting(toy_bundle.manifest.graphs[0], 0.05)), 0.5, STYLE) as segmenter:
        yield segmenter


def frames() -> list[Any]:
    rng = np.random.default_rng(4)
    return [rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(2)]


def test_the_whole_of_a_run_takes_as_long_as_its_slowest_stage(overlap: ModuleType, resting: Segmenter) -> None:
    found = overlap.measure(resting, frames(), count=12, rounds=1, style=STYLE)
    assert found["slowest"] == "segment"
    assert found["ms_a_frame"]["segment"] >= 50
    assert 0.5 < found["of_slowest"] <= 1.2  # of 50 ms; a busy machine adds to either
    backend = resting.choice.backend
    assert isinstance(backend, Resting)
    assert backend.runs == 1 + 12 + 2 + 12  # to warm up, alone, for results to write, and from file to file


def test_every_stage_has_all_frames(overlap: ModuleType, resting: Segmenter, tmp_path: Path) -> None:
    clip, out = tmp_path / "clip.mp4", tmp_path / "overlay.mp4"
    overlap.write_clip(clip, frames(), 7)
    for write in (
        lambda: overlap.writing(resting, frames(), 7, STYLE, out),
        lambda: overlap.whole(resting, clip, out),
    ):
        assert write() > 0
        with VideoFile(out) as source:
            assert sum(1 for _ in source) == 7
        out.unlink()
    assert overlap.reading(clip) > 0


def test_the_ratio_is_of_the_slowest(overlap: ModuleType) -> None:
    found = overlap.judged({"decode": 0.004, "segment": 0.002, "encode": 0.0095, "whole": 0.01})
    assert (found["slowest"], found["of_slowest"], found["target"]) == ("encode", 0.95, 0.95)
    assert found["ms_a_frame"] == {"decode": 4.0, "segment": 2.0, "encode": 9.5, "whole": 10.0}


def test_without_a_bundle_the_shipped_weights_are_measured(
    overlap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_bundle: Bundle
) -> None:
    monkeypatch.setattr(overlap, "SIZE", (48, 64))
    monkeypatch.setattr(overlap, "shipped_bundle", lambda modality: toy_bundle)
    file = tmp_path / "video.json"
    monkeypatch.setattr(sys, "argv", ["x", "--frames", "4", "--rounds", "1", "--json", str(file)])
    overlap.main()
    assert '"kind": "video-overlap"' in file.read_text()
