"""How much of a video's time its slowest stage takes: reading, segmenting and writing alone, then all at once.

    python benchmarks/video_overlap.py [BUNDLE] [--precision P] [--backend B] [--json FILE]

Writes a 1080p clip and measures in turn: reading it, segmenting its frames from memory, drawing and writing overlays of
them, and the run from file to file that `infer` does. Stages overlap there, so that a frame should take hardly longer
than in the slowest of them alone: 95 % of it or more. On a CPU, where the stages share the cores, it takes longer.
Without BUNDLE: microscopy at 448 x 448 of the weights that came with the program.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any, Literal

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.phantoms import phantom_clip
from espmedsam_edge.runtime.inference import infer
from espmedsam_edge.runtime.request import Outputs
from espmedsam_edge.runtime.run.jobs import Job
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.recording import overlay_video
from espmedsam_edge.runtime.sources.files import VideoFile
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame
from espmedsam_edge.runtime.video.writing import open_writer
from espmedsam_edge.shipped.bundles import shipped_bundle

TARGET = 0.95
SIZE = (1080, 1920)
FPS = Fraction(25)
DIFFERENT_FRAMES = 8  # each takes half a second to draw


class Held:
    """Frames in memory as a source, over and over: reading it takes no time."""

    kind: Literal["images", "video"] = "video"

    def __init__(self, frames: Sequence[Frame], count: int) -> None:
        self._frames = frames
        self.name, self.files, self.fps = "memory", [Path("memory")], FPS
        self.length: int | None = count
        self.live = False
        self.failures: list[Failure] = []

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[SourceFrame]:
        for index, frame in enumerate(itertools.islice(itertools.cycle(self._frames), self.length)):
            yield SourceFrame(frame, Path("memory"), index, float(index / FPS))


def write_clip(path: Path, frames: Sequence[Frame], count: int) -> None:
    """A video of a few frames played over and over."""
    with closing(open_writer(path, frames[0].shape[:2], FPS)) as writer:
        for each in Held(frames, count):
            writer.write(each.image, float(each.index / FPS))
        writer.finish()


def reading(clip: Path) -> float:
    """Seconds to decode a video."""
    begin = time.perf_counter()
    with VideoFile(clip) as source:
        for _ in source:
            pass
    return time.perf_counter() - begin


def segmenting(segmenter: Segmenter, frames: Sequence[Frame], count: int) -> float:
    """Seconds to segment frames from memory as a run does it, several under way where the backend overlaps them."""
    return run_pipeline(segmenter, [Job(Held(frames, count), [])]).seconds


def writing(segmenter: Segmenter, frames: Sequence[Frame], count: int, style: OverlayStyle, out: Path) -> float:
    """Seconds to write a video of overlays, drawn before where the segmenter draws them."""
    source = Held(frames, count)
    results = itertools.cycle([segmenter.segment(frame) for frame in frames])
    begin = time.perf_counter()
    with overlay_video(out, source, style) as sink:
        for frame, result in zip(source, results, strict=False):
            sink.write(frame, result)
    return time.perf_counter() - begin


def whole(segmenter: Segmenter, clip: Path, out: Path) -> float:
    """Seconds from file to file."""
    report = infer(clip, segmenter, Outputs(out=out))
    if report.failures:
        raise SystemExit(report.failures[0].message)
    return report.seconds


def measure(
    segmenter: Segmenter, frames: Sequence[Frame], count: int, rounds: int, style: OverlayStyle
) -> dict[str, Any]:
    """Medians over rounds, in milliseconds a frame, and the slowest stage's over the whole run's."""
    taken: dict[str, list[float]] = {"decode": [], "segment": [], "encode": [], "whole": []}
    with tempfile.TemporaryDirectory(prefix="espmedsam-") as folder:
        clip, out = Path(folder) / "clip.mp4", Path(folder) / "overlay.mp4"
        write_clip(clip, frames, count)
        segmenter.segment(frames[0])
        for _ in range(rounds):
            taken["decode"].append(reading(clip))
            taken["segment"].append(segmenting(segmenter, frames, count))
            taken["encode"].append(writing(segmenter, frames, count, style, out))
            taken["whole"].append(whole(segmenter, clip, out))
    return judged({name: median(seconds) / count for name, seconds in taken.items()})


def judged(seconds: dict[str, float]) -> dict[str, Any]:
    """Of seconds a frame, by stage and "whole": which stage is the slowest, and its part of the whole."""
    alone = {name: value for name, value in seconds.items() if name != "whole"}
    slowest = max(alone, key=lambda name: alone[name])
    return {
        "ms_a_frame": {name: round(1000 * value, 3) for name, value in seconds.items()},
        "slowest": slowest,
        "of_slowest": round(alone[slowest] / seconds["whole"], 4),
        "target": TARGET,
    }


def main() -> None:
    """Measure, print and, with ``--json``, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--modality")
    parser.add_argument("--precision")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--frames", type=int, default=100, help="of the clip")
    parser.add_argument("--tile", default="auto", help="as infer takes it; off: whole frames")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("espmedsam_edge").setLevel(logging.INFO)
    environment = collect_environment()
    bundle = Bundle.open(arguments.bundle) if arguments.bundle else shipped_bundle("microscopy")
    graph = bundle.graph(arguments.modality, arguments.precision)
    style = OverlayStyle(color_of(graph.modality))
    frames = [image for image, _ in phantom_clip(graph.modality, 0, DIFFERENT_FRAMES, SIZE)]
    backend, tile = arguments.backend, arguments.tile
    with Segmenter.load(bundle, graph.modality, graph.precision, backend, overlay=style, tile=tile) as segmenter:
        measured = measure(segmenter, frames, arguments.frames, arguments.rounds, style)
        backend, device = segmenter.choice.backend.name, segmenter.choice.backend.device
    times = ", ".join(f"{name} {value:.2f}" for name, value in measured["ms_a_frame"].items())
    print(f"{backend} ({device}), milliseconds a frame: {times}")
    verdict = "reached" if measured["of_slowest"] >= TARGET else "MISSED"
    print(f"the whole runs at {measured['of_slowest']:.1%} of its slowest stage, {measured['slowest']}: {verdict}")
    if arguments.json:
        result = {
            "schema": 1,
            "kind": "video-overlap",
            "environment": environment,
            "modality": graph.modality,
            "precision": graph.precision,
            "image_size": graph.image_size,
            "backend": backend,
            "device": device,
            "video": {"frames": arguments.frames, "height": SIZE[0], "width": SIZE[1]},
            "rounds": arguments.rounds,
            **measured,
        }
        atomic_write(arguments.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
