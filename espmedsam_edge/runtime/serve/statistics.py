"""What the view and the metrics say of a run: frames a second, latency, skipped frames, the mask's area over time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from prometheus_client import Counter, Histogram

from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sources.source import SourceFrame

BOUNDS: tuple[float, ...] = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds in seconds of the histograms' buckets."""

_STAGES = ("preprocess", "inference", "postprocess")
_RECENT = 300
_FPS_SECONDS = 2.0
_CURVE_POINTS = 1800


@dataclass(frozen=True)
class Point:
    """The mask's area in one frame: ``number`` counts up, ``at`` is in seconds since the start, ``fraction`` 0 to 1."""

    number: int
    at: float
    fraction: float


@dataclass(frozen=True)
class RunSummary:
    """How the run does now.

    Attributes:
        frames: segmented so far.
        skipped: passed over so far by live sources.
        fps: frames a second over the last two seconds; 0 when none came.
        latency: seconds at the 50th, 90th and 99th percentile of the last 300 frames; None before the first.
        latency_of: "capture" where a live source's clock gives the time from capture to mask, else "segment": the time
            from frame to mask.
        area: foreground pixels of the last frame.
        fraction: of the last frame's pixels, 0 to 1.
        square_millimetres: the area where the source knows its spacing; else None.
    """

    frames: int = 0
    skipped: int = 0
    fps: float = 0.0
    latency: tuple[float, float, float] | None = None
    latency_of: Literal["capture", "segment"] = "segment"
    area: int = 0
    fraction: float = 0.0
    square_millimetres: float | None = None


class Statistics:
    """Gathers frames as they come; any thread may ask. ``clock`` is ``time.monotonic`` outside of tests.

    Attributes:
        latency: seconds of all frames since the start, for metrics.
        stage_seconds: sums since the start of each of a frame's stages, for metrics.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._start = clock, clock()
        self._lock = threading.Lock()
        self._frames = 0
        self._skipped: dict[str, int] = {}
        self._times: deque[float] = deque(maxlen=_RECENT)
        self._latencies: deque[float] = deque(maxlen=_RECENT)
        self._latency_of: Literal["capture", "segment"] = "segment"
        self._curve: deque[Point] = deque(maxlen=_CURVE_POINTS)
        self._area: tuple[int, float, float | None] = (0, 0.0, None)
        self.latency = Histogram(
            "espmedsam_frame_latency_seconds",
            "From capture (live) or frame (files) to mask.",
            buckets=BOUNDS,
            registry=None,
        )
        self.stage_seconds = Counter(
            "espmedsam_stage_seconds", "Time spent on frames, by stage.", ["stage"], registry=None
        )
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in _STAGES}

    def add(self, frame: SourceFrame, result: Segmentation) -> None:
        """Count one frame."""
        now = self._clock()
        height, width = result.size
        area = result.area
        fraction = area / (height * width)
        latency = result.timings.total if frame.captured is None else max(0.0, time.monotonic() - frame.captured)
        with self._lock:
            self._frames += 1
            if frame.skipped:  # files never skip: they would only make this grow
                self._skipped[frame.source] = frame.skipped
            self._times.append(now)
            self._latencies.append(latency)
            self._latency_of = "segment" if frame.captured is None else "capture"
            self._curve.append(Point(self._frames, now - self._start, fraction))
            self._area = (area, fraction, area * frame.spacing[0] * frame.spacing[1] if frame.spacing else None)
        self.latency.observe(latency)
        for stage, seconds in self._stages.items():
            seconds.inc(getattr(result.timings, stage))

    @property
    def waited(self) -> float:
        """Seconds since the last frame; before the first, since the start."""
        with self._lock:
            return self._clock() - (self._times[-1] if self._times else self._start)

    def summary(self) -> RunSummary:
        """How the run does now."""
        now = self._clock()
        with self._lock:
            if not self._frames:
                return RunSummary()
            recent = [at for at in self._times if now - at <= _FPS_SECONDS]
            fps = (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 and recent[-1] > recent[0] else 0.0
            if fps == 0.0 and recent:
                fps = len(recent) / _FPS_SECONDS
            p50, p90, p99 = (float(value) for value in np.percentile(self._latencies, (50, 90, 99)))
            area, fraction, square = self._area
            return RunSummary(
                self._frames,
                sum(self._skipped.values()),
                fps,
                (p50, p90, p99),
                self._latency_of,
                area,
                fraction,
                square,
            )

    def curve(self, after: int, most: int) -> list[Point]:
        """Points of the area's curve with a number above ``after``, thinned out evenly to at most ``most``."""
        with self._lock:
            points = [point for point in self._curve if point.number > after]
        step = -(-len(points) // most)
        return points[::-1][:: max(1, step)][::-1]  # the newest stays
