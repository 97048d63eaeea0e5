"""What a run is made of and what it tells: jobs, limits, progress, reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from espmedsam_edge.runtime.latency import Latency
from espmedsam_edge.runtime.run.finding import ObjectFinder
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.sink import Sink
from espmedsam_edge.runtime.sources.source import Failure, Source, SourceFrame

STAGES: tuple[str, ...] = ("decode", "preprocess", "inference", "postprocess", "write")


@dataclass
class Job:
    """A source, and the sinks that take its frames and are finished with it."""

    source: Source
    sinks: Sequence[Sink]
    find: ObjectFinder | None = None  # what is done with a result before the sinks take it
    cancelled: bool = False  # set when a sink failed and the rest of the source is of no use
    failed: bool = False  # set when not all of the source could be done

    def taken(self, frame: SourceFrame, result: Segmentation) -> Segmentation:
        """Have the sinks take a result, in the frames' order; comes back as it is for those that all jobs share."""
        result = result if self.find is None else self.find.of_frame(frame, result)
        for sink in self.sinks:
            sink.write(frame, result)
        return result


@dataclass(frozen=True)
class RunProgress:
    """How far a run is: the job's number from 0, frames of it that are done or failed, and how many it may have."""

    job: int
    name: str
    done: int
    expected: int | None
    live: bool = False


@dataclass(frozen=True)
class LiveReport:
    """What became of a live source.

    Attributes:
        name: its address.
        label: what its results are called by, ``SourceFrame.path``.
        frames: how many were segmented and written.
        skipped: how many newer ones took the place of before they could be segmented.
        refused: how many were older than ``Limits.max_latency``.
        reconnects: how often it dropped out and came back.
        latency: seconds from a frame's capture to its mask, of the last frames; None without any.
        written: which sink in the background wrote its frames last, and their age then; None without such sinks, or
            where ``BackgroundSinks`` was not asked yet.
        failed: how many were left out since the network's output for them was not finite.
    """

    name: str
    label: Path
    frames: int
    skipped: int
    refused: int
    reconnects: int
    latency: Latency | None
    written: tuple[str, Latency] | None = None
    failed: int = 0


@dataclass(frozen=True)
class Limits:
    """When a run ends by itself, and what it refuses. None: no limit.

    Attributes:
        frames: how many frames of each source to segment.
        seconds: how long to read, from when the first source is open.
        max_latency: seconds; a live frame that is older before it is segmented, or whose result is before it goes to
            the sinks, is refused. Sinks in the background have such a limit of their own.
        min_confidence: 0 to 1; results of a lower confidence are empty, see ``Segmentation.judged``.
    """

    frames: int | None = None
    seconds: float | None = None
    max_latency: float | None = None
    min_confidence: float | None = None


@dataclass(frozen=True)
class RunReport:
    """What a run did.

    Attributes:
        frames: how many were segmented and written.
        failures: inputs and outputs that failed, in order.
        seconds: wall time.
        stage_seconds: time spent in each of ``STAGES``; decode and write overlap with the others.
        live: what became of each live source, in the jobs' order.
        interrupted: Ctrl-C ended a run of live sources or pipes; what they gave is finished.
        unfinished: files were under way then, whose results were removed.
    """

    frames: int
    failures: list[Failure]
    seconds: float
    stage_seconds: dict[str, float]
    live: list[LiveReport] = field(default_factory=list)
    interrupted: bool = False
    unfinished: bool = False
