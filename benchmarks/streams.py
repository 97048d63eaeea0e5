"""How many frames a second several live streams get from one segmenter, and how evenly.

    python benchmarks/streams.py [BUNDLE] [--precision P] [--backend B] [--streams 4] [--seconds 4] [--json FILE]

Each stream gives 1080p frames from memory as fast as they are asked for, in a thread of its own, as cameras do; masks,
measures and overlays are made of all, of whole frames. Without BUNDLE: microscopy at 448 x 448 of the weights that came
with the program.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.phantoms import phantom_clip
from espmedsam_edge.runtime.run.jobs import Job, Limits
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sources.live import BackOff, LiveSource
from espmedsam_edge.runtime.sources.source import SourceFrame
from espmedsam_edge.shipped.bundles import shipped_bundle

SIZE = (1080, 1920)
DIFFERENT_FRAMES = 4
PAUSE_S = 0.001  # of a camera with 1000 frames a second: more than any segmenter takes


class Memory:
    """A feed of frames in memory."""

    fps: Fraction | None = None

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._frames = itertools.cycle(frames)

    def open(self) -> None:
        """Nothing to open."""

    def read(self) -> Frame:
        """The next frame."""
        time.sleep(PAUSE_S)
        return next(self._frames)

    def interrupt(self) -> None:
        """It never waits long."""

    def close(self) -> None:
        """Nothing to close."""


class Counted:
    """A sink that counts."""

    def __init__(self) -> None:
        self.frames = 0

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """One more."""
        self.frames += 1


def measure(segmenter: Segmenter, frames: Sequence[Frame], streams: int, seconds: float) -> dict[str, Any]:
    """Frames a second of all streams together and of each."""
    segmenter.segment(frames[0])
    sinks = [Counted() for _ in range(streams)]
    back_off = BackOff(first=0.01, longest=0.01)
    sources = [
        LiveSource(Memory(frames), f"memory://{number}", f"stream {number}", back_off) for number in range(streams)
    ]
    jobs = [Job(source, [sink]) for source, sink in zip(sources, sinks, strict=True)]
    begin = time.perf_counter()
    report = run_pipeline(segmenter, jobs, limits=Limits(seconds=seconds))
    taken = time.perf_counter() - begin
    return {
        "streams": streams,
        "fps": round(sum(sink.frames for sink in sinks) / taken, 2),
        "fps_each": [round(sink.frames / taken, 2) for sink in sinks],
        "failures": [failure.message for failure in report.failures],
    }


def main() -> None:
    """Measure one stream and several, print and, with ``--json``, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--modality")
    parser.add_argument("--precision")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each of the two runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle) if arguments.bundle else shipped_bundle("microscopy")
    graph = bundle.graph(arguments.modality, arguments.precision)
    style = OverlayStyle(color_of(graph.modality))
    frames = [image for image, _ in phantom_clip(graph.modality, 0, DIFFERENT_FRAMES, SIZE)]
    with Segmenter.load(
        bundle, graph.modality, graph.precision, arguments.backend, overlay=style, tile="off"
    ) as segmenter:
        rows = [measure(segmenter, frames, count, arguments.seconds) for count in (1, arguments.streams)]
        taken = segmenter.choice.taken
    for row in rows:
        each = ", ".join(f"{fps:.1f}" for fps in row["fps_each"])
        print(f"{taken}, {row['streams']} stream(s): {row['fps']:.1f} frames a second ({each})")
    if arguments.json:
        result = {"schema": 1, "kind": "streams", "environment": collect_environment(), "backend": taken, "rows": rows}
        atomic_write(arguments.json, json.dumps(result, indent=2) + "\n")
    failures = [line for row in rows for line in row["failures"]]
    if failures:
        raise SystemExit(failures[0])


if __name__ == "__main__":
    main()
