"""How long a live frame takes from the camera to its written result, beyond the segmenter's own time.

    python benchmarks/live_latency.py --name live-latency-MACHINE [--seconds 15] [--note TEXT]

The test source draws the time into each picture; it is read back from the frame after the overlay video and the line
of JSON of that frame were written: by sinks that the run waits for ("in line"), and by those of ``infer``, which have
threads of their own ("in the background"). What is left after the segmenter's own time (preprocess, inference,
postprocess) is what capture, queues and writing add; it shall be at most one frame interval in 99 of 100 frames. Two
segmenters: the tiny preset (random weights: time does not depend on them) on the CPU, and a stand-in that sleeps 5 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
from sleeping_backend import SleepingBackend

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.runtime.backends.backend import Choice
from espmedsam_edge.runtime.inference import Inference
from espmedsam_edge.runtime.latency import Latency
from espmedsam_edge.runtime.request import InferenceRequest, ReadingOptions
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.measurements import JsonLines
from espmedsam_edge.runtime.sinks.recording import overlay_video
from espmedsam_edge.runtime.sinks.sink import Sink
from espmedsam_edge.runtime.sources.phantom import read_clock
from espmedsam_edge.runtime.sources.source import SourceFrame

RESULTS = Path(__file__).parent / "results"
SIZE = (480, 640)
SLEEP_SECONDS = 0.005
TINY = "espmedsam-tiny"
WARM_UP = 30  # frames

Writing = Literal["nothing", "in line", "in the background"]


class Probe:
    """For each frame: the age of its picture once a sink, if any, has written it, and the segmenter's own time."""

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink
        self.total: dict[int, float] = {}
        self.own: dict[int, float] = {}

    def __enter__(self) -> Probe:
        if self._sink is not None:
            self._sink.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._sink is not None:
            self._sink.__exit__(kind, error, traceback)

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        if self._sink is not None:
            self._sink.write(frame, result)
        now, drawn = time.monotonic(), read_clock(frame.image)
        assert drawn is not None
        self.total[frame.index] = now - drawn
        self.own[frame.index] = result.timings.total


def measure(
    segmenter: Segmenter, fps: int, seconds: float, folder: Path, writing: Writing, warm_up: int = WARM_UP
) -> dict[str, Any]:
    """One run; the first frames count as warm-up."""
    source = f"test://{segmenter.modality}?fps={fps}&size={SIZE[1]}x{SIZE[0]}"
    probes = [Probe()]
    with Inference(InferenceRequest([source], segmenter, None, ReadingOptions(duration=seconds))) as run:
        if writing != "nothing":
            video = overlay_video(folder / f"{fps}.mkv", run.sources[0], OverlayStyle((0, 255, 255)))
            probes = [Probe(video), Probe(JsonLines(folder / f"{fps}.jsonl"))]
        behind = writing == "in the background"
        report = run.run(sinks=[run.background.add("sink", probe) if behind else probe for probe in probes])
    assert not report.failures, report.failures
    written = sorted(set.intersection(*(set(probe.total) for probe in probes)))[warm_up:]
    total = [max(probe.total[index] for probe in probes) for index in written]
    own = [probes[0].own[index] for index in written]
    added = [whole - part for whole, part in zip(total, own, strict=True)]
    (live,), interval = report.live, 1 / fps
    return {
        "fps": fps,
        "interval_ms": round(1000 * interval, 3),
        "writes": "nothing" if writing == "nothing" else f"overlay video (H.264, Matroska) and JSON lines, {writing}",
        "frames": len(total),
        "skipped": live.skipped,
        "total_ms": Latency.of(total).milliseconds(),
        "segmenter_ms": Latency.of(own).milliseconds(),
        "added_ms": Latency.of(added).milliseconds(),
        "reported_ms": None if live.written is None else live.written[1].milliseconds(),
        "added_p99_within_one_interval": bool(np.percentile(added, 99) <= interval),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def tiny_bundle(folder: Path, modality: str) -> Bundle:
    """A bundle of the tiny preset."""
    from espmedsam_edge.export.exporter import export_bundle
    from espmedsam_edge.model.checkpoint import CheckpointInfo, save_checkpoint
    from espmedsam_edge.model.config import model_config
    from espmedsam_edge.model.esp_medsam import EspMedSam

    model = EspMedSam(model_config(TINY), [modality])
    save_checkpoint(folder / "w.safetensors", model, CheckpointInfo(config=model.config, origin="random"))
    return export_bundle(folder / "w.safetensors", folder / "tiny.bundle")[0]


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--modality", default="colonoscopy")
    parser.add_argument("--note", help="what should be known of the circumstances")
    arguments = parser.parse_args()
    environment = collect_environment()
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        bundle = tiny_bundle(Path(temporary), arguments.modality)
        for kind in (TINY, "stand-in of 5 ms"):
            if kind == TINY:
                segmenter = Segmenter.load(bundle, arguments.modality, backend="onnxruntime-cpu", threads=1)
            else:
                stand_in = SleepingBackend(bundle.graph(arguments.modality, None), SLEEP_SECONDS)
                segmenter = Segmenter(bundle, Choice(stand_in), 0.5)  # type: ignore[arg-type]
            with segmenter:
                for fps in (30, 60):
                    for writing in get_args(Writing):
                        run = measure(segmenter, fps, arguments.seconds, Path(temporary), writing)
                        runs.append({"segmenter": kind, **run})
                        print(json.dumps(runs[-1]), flush=True)
    result = {
        "schema": 1,
        "kind": "live-latency",
        "environment": environment,
        "note": arguments.note,
        "picture": {"height": SIZE[0], "width": SIZE[1]},
        "seconds_a_run": arguments.seconds,
        "runs": runs,
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
