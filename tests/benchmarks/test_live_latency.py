"""How old results are when they are written, as reported: the long version is benchmarks/live_latency.py."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.runtime.backends.backend import Choice
from espmedsam_edge.runtime.run.jobs import Job, Limits
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.background import BackgroundSinks
from espmedsam_edge.runtime.sources.live import LiveSource
from espmedsam_edge.runtime.sources.phantom import PhantomFeed
from espmedsam_edge.runtime.sources.source import SourceFrame

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("live_latency")


@pytest.fixture
def segmenter(toy_bundle: Bundle, benchmark: Any) -> Iterator[Segmenter]:
    """The benchmark's stand-in of 5 ms."""
    stand_in = benchmark.SleepingBackend(toy_bundle.graph(None, None), benchmark.SLEEP_SECONDS)
    with Segmenter(toy_bundle, Choice(stand_in), 0.5) as loaded:
        yield loaded


class Sleeper:
    """A sink that takes 200 ms a frame."""

    def __enter__(self) -> Sleeper:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        time.sleep(0.2)


def test_time_spent_on_writing_in_the_background_is_reported(segmenter: Segmenter) -> None:
    source = LiveSource(PhantomFeed("fundus", 0, (48, 64), Fraction(4), None), "test://fundus", "fundus")
    background = BackgroundSinks()
    sinks = [background.add("slow.mp4", Sleeper())]
    (told,) = run_pipeline(segmenter, [Job(source, sinks)], limits=Limits(frames=4)).live
    slowest = background.slowest(told.label)
    assert told.latency is not None
    assert slowest is not None
    name, written = slowest
    assert name == "slow.mp4"
    assert written.samples + sinks[0].left_out == told.latency.samples == 4
    assert written.minimum >= told.latency.minimum + 0.2


def test_the_benchmark_measures_all_ways_to_write(segmenter: Segmenter, benchmark: Any, tmp_path: Path) -> None:
    """How long it takes is the long version's, on a quiet machine."""
    for writing in get_args(benchmark.Writing):
        result = benchmark.measure(segmenter, 30, 1.5, tmp_path, writing, warm_up=0)
        assert result["frames"] > 0
        assert result["total_ms"]["minimum"] >= result["segmenter_ms"]["minimum"] >= 5
        assert (result["reported_ms"] is None) == (writing != "in the background")
