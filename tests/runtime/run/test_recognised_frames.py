"""Frames that were recognised: each group is of one modality and goes to its segmenter; order and overlap stay."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest

from espmedsam_edge.runtime.run.controls import Adjustable, RunSettings
from espmedsam_edge.runtime.run.jobs import Job
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmentation import Segmentation, Timings
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame


class Double:
    """A segmenter of one modality that overlaps groups where ``in_flight`` says so."""

    image_size = 32
    frame_backend = None
    frame_options = SimpleNamespace(overlay=None)

    def __init__(self, modality: str, batch: int, in_flight: int) -> None:
        self.modality, self.batch, self.in_flight = modality, batch, in_flight
        self.groups: list[list[int]] = []
        self.under_way: deque[Any] = deque()

    def segment_batch(self, frames: Sequence[Any], threshold: float | None = None) -> list[Segmentation]:
        assert len(frames) >= 1
        self.groups.append([int(frame[0, 0, 0]) for frame in frames])
        return [self._segmented(frame) for frame in frames]

    def start(self, frames: Sequence[Any], threshold: float | None = None) -> Any:
        assert 1 <= len(frames) <= self.batch
        assert len(self.under_way) < self.in_flight
        results = self.segment_batch(frames)
        started = SimpleNamespace()
        started.results = lambda: self.under_way.remove(started) or results
        self.under_way.append(started)
        return started

    def _segmented(self, frame: Any) -> Segmentation:
        mask = np.full(frame.shape[:2], frame[0, 0, 0], np.uint8)
        return Segmentation(mask, self.modality, np.zeros((8, 8), np.float32), 0.5, Timings(0, 0, 0))


class Pictures:
    """Numbered pictures of the modalities given."""

    live = False
    kind: Literal["images", "video"] = "images"
    fps: Fraction | None = None

    def __init__(self, name: str, modalities: Sequence[str | None]) -> None:
        self.name, self.modalities, self.files = name, modalities, [Path(name)]
        self.length: int | None = len(modalities)
        self.failures: list[Failure] = []

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[SourceFrame]:
        for number, modality in enumerate(self.modalities):
            yield SourceFrame(np.full((4, 6, 3), number, np.uint8), self.files[0], number, modality=modality)


class Kept:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.got: list[tuple[str, int, str]] = []

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        assert result.mask[0, 0] == frame.index
        self.got.append((frame.source, frame.index, result.modality))


@pytest.mark.parametrize("seed", range(20))
def test_any_mixture_goes_to_its_segmenters_in_order(seed: int) -> None:
    chosen = random.Random(seed)
    names = ("a", "b", "c")
    doubles = {name: Double(name, chosen.choice([1, 2, 4]), chosen.choice([1, 2, 3])) for name in names}
    sources = [Pictures(f"s{n}", chosen.choices(names, k=chosen.randint(1, 40))) for n in range(3)]
    sink = Kept()
    first = cast(Segmenter, doubles["a"])
    report = run_pipeline(
        first,
        [Job(source, []) for source in sources],
        [sink],
        segmenter_of=lambda name: cast(Segmenter, doubles[name]),
    )
    assert report.failures == []
    expected = [(s.name, number, name) for s in sources for number, name in enumerate(s.modalities)]
    assert sink.got == expected
    for double in doubles.values():
        assert not double.under_way
        assert sum(map(len, double.groups)) == sum(name == double.modality for _, _, name in expected)


def test_a_long_row_of_one_modality_fills_batches() -> None:
    double, other = Double("a", 4, 2), Double("b", 1, 2)
    both = {"a": double, "b": other}
    run_pipeline(
        cast(Segmenter, double),
        [Job(Pictures("s", ["a"] * 16 + ["b"] * 3), [])],
        segmenter_of=lambda name: cast(Segmenter, both[name]),
    )
    assert double.groups == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert other.groups == [[16], [17], [18]]


def test_what_viewers_chose_goes_before_and_frames_without_a_modality_are_the_runs_own() -> None:
    doubles = {name: Double(name, 1, 1) for name in ("a", "b", "c")}
    sink = Kept()

    def run(controls: Adjustable) -> list[str]:
        sink.got.clear()
        run_pipeline(
            cast(Segmenter, doubles["a"]),
            [Job(Pictures("s", ["b", None]), [])],
            [sink],
            controls=controls,
            segmenter_of=lambda name: cast(Segmenter, doubles[name]),
        )
        return [modality for _, _, modality in sink.got]

    assert run(Adjustable()) == ["b", "a"]
    assert run(Adjustable(RunSettings(segmenter=cast(Segmenter, doubles["c"])))) == ["c", "c"]


def test_a_viewers_segmenter_with_a_smaller_batch_gets_groups_in_parts() -> None:
    own, small = Double("a", 4, 2), Double("b", 2, 2)
    sink = Kept()
    controls = Adjustable(RunSettings(segmenter=cast(Segmenter, small)))
    run_pipeline(cast(Segmenter, own), [Job(Pictures("s", [None] * 8), [])], [sink], controls=controls)
    assert [number for _, number, _ in sink.got] == list(range(8))
    assert small.groups == [[0, 1], [2, 3], [4, 5], [6, 7]]
