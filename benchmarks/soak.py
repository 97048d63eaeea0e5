"""Whether a live run with its view stays flat: memory, threads, open files and the order of frames over half an hour.

    python benchmarks/soak.py --name soak-MACHINE [--minutes 30] [--fps 30] [--clips 100] [--clock-back] [--outputs]

A run on the live phantom with a backend that sleeps for 5 ms, its server on, and in a process of its own: a viewer that
reads all the time, another that comes and goes every 20 seconds and moves a control, a scrape of the metrics every ten
seconds and an image for the service every ten. With ``--clips`` so many clips of 300 frames are segmented beside the
live source. With
``--clock-back`` what Python code of this process reads as the time of day goes back by an hour in the middle. With
``--outputs`` a toy network on the CPU takes the backend's place, objects are told apart and followed, and every result
of them is on: published by MQTT (Debian's mosquitto, stopped for a while in the third quarter), numbers of objects as
pictures, lines of JSON, tables of areas and objects. Samples once a second; the first minute is warm-up.
Result: see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import struct
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from publish_rate import Broker
from sleeping_backend import SleepingBackend
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle, Graph, Manifest, Weights
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.machine.memory import share_arenas
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.backends.backend import Choice
from espmedsam_edge.runtime.inference import Inference
from espmedsam_edge.runtime.request import InferenceReport, InferenceRequest, ModelOptions, Outputs, ReadingOptions
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.sources.source import SourceFrame

RESULTS = Path(__file__).parent / "results"
BACKEND_SECONDS = 0.005
CLIP_FRAMES = 300
SIDE = 256


def sleeping_segmenter() -> Segmenter:
    """A segmenter on ``SleepingBackend``; its bundle is on no disk."""
    graph = Graph(modality="colonoscopy", precision="fp32", file="none.onnx", sha256="0" * 64, image_size=SIDE)
    weights = Weights(checkpoint_sha256="0" * 64, origin="trained")
    bundle = Bundle(Path("none"), Manifest(preset="none", weights=weights, graphs=[graph]))
    return Segmenter(bundle, Choice(SleepingBackend(graph, BACKEND_SECONDS, disc=True)), 0.5)


@dataclass
class Ordered:
    """A sink that counts frames, and those that came out of order."""

    frames: int = 0
    out_of_order: int = 0
    last: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Ordered:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``."""
        self.out_of_order += frame.index <= self.last.get(frame.source, -1)
        self.last[frame.source] = frame.index
        self.frames += 1


@dataclass
class Watched:
    """What viewers and clients saw."""

    frames: int = 0
    out_of_order: int = 0
    bytes: int = 0
    visits: int = 0
    failed_visits: int = 0
    scrapes: int = 0
    segmented: int = 0
    levels: list[int] = field(default_factory=list)


def watch(url: str, seconds: float, seen: Watched, *, wish: dict[str, Any] | None = None) -> None:
    """Look on for a while as the page does: acknowledge every frame once it is here."""
    last, until = -1, time.monotonic() + seconds
    with connect(url.replace("http", "ws", 1) + "live", max_size=None, open_timeout=120, ping_timeout=120) as socket:
        if wish is not None:
            socket.send(json.dumps({"type": "set", **wish}))
        while time.monotonic() < until:
            try:
                message = socket.recv(timeout=until - time.monotonic() + 0.1)
            except (TimeoutError, ConnectionClosed):
                return
            if isinstance(message, str):
                body = json.loads(message)
                if body["type"] == "state" and wish is None:
                    seen.levels[:] = [body["level"], max(body["level"], *seen.levels, 0)]
                continue
            (length,) = struct.unpack(">I", message[:4])
            header = json.loads(message[4 : 4 + length])
            seen.frames += 1
            seen.bytes += len(message)
            seen.out_of_order += header["number"] <= last
            last = header["number"]
            socket.send(json.dumps({"type": "ack", "frame": last, "width": 1280}))


def visit(url: str, seconds: float, seen: Watched, every: float) -> None:
    """Come and go, read the metrics and have an image segmented, again and again."""
    until, image = time.monotonic() + seconds, encode_image(phantom("colonoscopy", 1, (240, 320))[0], ".png")
    while (left := until - time.monotonic()) > 0:
        begin = time.monotonic()
        wish = {"opacity": 0.2 + 0.1 * (seen.visits % 5), "threshold": 0.4}
        try:
            watch(url, min(left, every / 2), Watched(), wish=wish)
        except TimeoutError:  # a machine so busy that two minutes are not enough to connect
            seen.failed_visits += 1
            continue
        seen.visits += 1
        for _ in range(2):
            with urllib.request.urlopen(url + "metrics", timeout=60) as answer:
                seen.scrapes += b"espmedsam_frames_total" in answer.read()
            request = urllib.request.Request(url + "v1/segment", data=image, headers={"Accept": "image/png"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                seen.segmented += answer.read(4) == b"\x89PNG"
        time.sleep(max(0.0, min(until, begin + every) - time.monotonic()))


def clients(url: str, seconds: float, every: float, pipe: Connection) -> None:
    """The process of the viewers: sends what they saw."""
    seen = Watched()
    reader = threading.Thread(target=watch, args=(url, seconds, seen))
    reader.start()
    visit(url, seconds, seen, every)
    reader.join()
    pipe.send(asdict(seen))


def set_back(seconds: float = 3600) -> None:
    """The time of day, as Python code reads it, goes back; the clock that only grows does not."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() - seconds
    time.time_ns = lambda: now_ns() - round(1e9 * seconds)


def sample() -> dict[str, int]:
    """Resident bytes, threads and open files of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tasks, files = (len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("task", "fd"))
    return {"resident_bytes": pages * 4096, "threads": tasks, "files": files}


def make_clips(folder: Path, count: int) -> list[str]:
    """So many names of one clip of Motion JPEG."""
    first = folder / "clip-0.avi"
    writer = cv2.VideoWriter(str(first), cv2.VideoWriter.fourcc(*"MJPG"), 25, (320, 240))
    for number in range(CLIP_FRAMES):
        writer.write(phantom("colonoscopy", number % 8, (240, 320))[0])
    writer.release()
    for number in range(1, count):
        os.link(first, folder / f"clip-{number}.avi")
    return [str(folder / f"clip-{number}.avi") for number in range(count)]


def all_outputs(folder: Path, broker: Broker) -> tuple[ModelOptions, Outputs]:
    """A toy network whose objects are followed, and all that can be said of them."""
    bundle = save_toy_bundle(folder / "toy.bundle", ("colonoscopy",)).path
    objects = ObjectOptions(instances=True, track=True)
    return ModelOptions(str(bundle), backend="onnxruntime-cpu", threads=1, objects=objects), Outputs(
        jsonl=folder / "lines.jsonl",
        csv=folder / "areas.csv",
        labels=folder / "labels",
        objects=folder / "objects.csv",
        publish=f"mqtt://127.0.0.1:{broker.port}/soak",
    )


def soak(
    seconds: float,
    fps: int,
    *,
    warm_up: float,
    every: float,
    size: str = "640x480",
    clips: Sequence[str] = (),
    clock_back: bool = False,
    outputs: Path | None = None,
) -> dict[str, Any]:
    """Run, and say how it went; ``warm_up`` and ``every`` (between visits) in seconds, ``outputs`` a folder."""
    ordered, samples = Ordered(), list[dict[str, float]]()
    source, reading = f"test://colonoscopy?fps={fps}&size={size}", ReadingOptions(duration=seconds)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    share_arenas()  # as the command does
    with ExitStack() as stack:
        broker: Broker | None = None
        model: ModelOptions | Segmenter
        if outputs is None:
            model, wanted = stack.enter_context(sleeping_segmenter()), None
        else:
            broker = Broker()
            stack.callback(broker.stop)
            broker.start()
            time.sleep(1)
            model, wanted = all_outputs(outputs, broker)
        request = InferenceRequest([source, *clips], model, wanted, reading, ServeOptions("0"))
        inference = stack.enter_context(Inference(request))
        assert inference.server is not None
        reports: list[InferenceReport] = []
        run = threading.Thread(target=lambda: reports.append(inference.run(sinks=[ordered])))
        viewers = context.Process(target=clients, args=(inference.server.url, seconds, every, there))
        begin = time.monotonic()
        run.start()
        viewers.start()
        there.close()
        jumped: float | None = None
        while run.is_alive():
            if clock_back and jumped is None and time.monotonic() - begin > seconds / 2:
                before = time.time()
                set_back()
                jumped = round(time.time() - before)
            if broker is not None:
                broker.keep(running=not 0.6 < (time.monotonic() - begin) / seconds < 0.65)
            time.sleep(1.0)
            samples.append({"at": round(time.monotonic() - begin, 1), **sample()})
        try:
            seen = here.recv()
        except EOFError:
            raise SystemExit("the viewers failed; see above") from None
        viewers.join()
    (report,) = reports
    late = [failure for failure in report.failures if "could not keep up" in failure.message]
    assert len(late) == len(report.failures), report.failures
    latency = report.live[0].latency
    warm = [one for one in samples if warm_up <= one["at"] <= seconds - 1]
    resident = np.array([one["resident_bytes"] for one in warm], float)
    tenth = max(1, len(warm) // 10)
    slope = float(np.polyfit([one["at"] for one in warm], resident, 1)[0]) if len(warm) > 2 else 0.0
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "fps": fps,
        "size": size,
        "backend_ms": 1000 * BACKEND_SECONDS,
        "clips": len(clips),
        "outputs": outputs is not None,
        "clock_changed_by_seconds": jumped,
        "frames": ordered.frames,
        "skipped": report.live[0].skipped,
        "left_out_by_results": [int(failure.message.split()[0]) for failure in late],
        "out_of_order": ordered.out_of_order,
        "capture_to_mask_ms": None if latency is None else latency.milliseconds(),
        "viewers": seen,
        "after_warm_up": {
            "resident_bytes": {
                "first": int(resident[0]),
                "lowest": int(resident.min()),
                "highest": int(resident.max()),
            },
            "last_tenth_over_first_tenth": float(resident[-tenth:].mean() / resident[:tenth].mean() - 1),
            "bytes_an_hour": round(3600 * slope),
            "threads": [int(min(one["threads"] for one in warm)), int(max(one["threads"] for one in warm))],
            "files": [int(min(one["files"] for one in warm)), int(max(one["files"] for one in warm))],
        },
        "samples": samples[:: max(1, len(samples) // 40)],
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--clips", type=int, default=0, help="files beside the live source")
    parser.add_argument("--clock-back", action="store_true", help="by an hour, in the middle")
    parser.add_argument("--outputs", action="store_true", help="all that can be said of objects")
    parser.add_argument("--note", help="what should be known of the circumstances")
    arguments = parser.parse_args()
    environment = collect_environment()
    seconds = 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(Path(folder), arguments.clips) if arguments.clips else []
        timing: dict[str, Any] = {"warm_up": min(60, seconds / 4), "every": 20}
        outputs = Path(folder) if arguments.outputs else None
        result = soak(seconds, arguments.fps, clips=clips, clock_back=arguments.clock_back, outputs=outputs, **timing)
    if arguments.note:
        result = {"note": arguments.note, **result}
    document = {"schema": 1, "kind": "soak", "environment": environment, **result}
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1))


if __name__ == "__main__":
    main()
