"""What SIGKILL and a power cut take of a recording: killed at random moments, played, compared with what it was given.

    python benchmarks/recording_kill.py --name recording-kill-MACHINE [--kills 50]

A process records a live source at 30 frames a second as `infer` does: overlay as MP4, masks as Matroska, measurements
as lines of JSON, each sink in its thread. It tells the time of every frame that it hands over, and how large a file was
when it was put onto the disk. Then it is killed. What a file lacks is the time from its last frame that plays to the
last one handed over. A power cut is reckoned: the file is cut where the last completed synchronisation left it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.runtime.sinks.growing_file import SYNC_SECONDS
from espmedsam_edge.runtime.video.reading import open_video

RESULTS = Path(__file__).parent / "results"
FPS = 30
SIZE = (480, 640)
FILES = {"overlay": "overlay.partial.mp4", "masks": "masks.partial.mkv", "lines": "lines.partial.jsonl"}

_RECORD = f"""
import os, sys, time
from fractions import Fraction
from pathlib import Path
import numpy as np
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.phantoms import phantom_clip
from espmedsam_edge.runtime.sinks.background import BackgroundSink
from espmedsam_edge.runtime.sinks.measurements import JsonLines
from espmedsam_edge.runtime.segmentation import Segmentation, Timings
from espmedsam_edge.runtime.sources.files import VideoFile
from espmedsam_edge.runtime.sources.source import SourceFrame
from espmedsam_edge.runtime.sinks.recording import mask_video, overlay_video

def tell(line):
    os.write(1, line.encode() + b"\\n")  # a line a call, so that no kill tears one

sync = os.fdatasync
def told_sync(descriptor):
    size = os.fstat(descriptor).st_size
    sync(descriptor)
    tell("synced " + os.path.basename(os.readlink("/proc/self/fd/" + str(descriptor))) + " " + str(size))
os.fdatasync = told_sync

folder = Path(sys.argv[1])
pictures = [(image, (mask > 0).astype(np.uint8) * 255) for image, mask in phantom_clip("colonoscopy", 0, 5, {SIZE})]
source = VideoFile(Path("camera"))
source.live, source.fps = True, Fraction({FPS})
sinks = [
    overlay_video(folder / "overlay.mp4", source, OverlayStyle((255, 220, 40))),
    mask_video(folder / "masks.mkv", source),
    JsonLines(folder / "lines.jsonl", keep_interrupted=True),
]
failures = []
sinks = [BackgroundSink(sink, "sink", failures) for sink in sinks]
for sink in sinks:
    sink.__enter__()
began = time.monotonic()
number = 0
while not failures:
    time.sleep(max(0, began + number / {FPS} - time.monotonic()))
    at = time.monotonic() - began
    image, mask = pictures[number % 5]
    result = Segmentation(mask, "colonoscopy", np.zeros((1, 1), np.float32), 0.5, Timings(0, 0, 0))
    for sink in sinks:
        sink.write(SourceFrame(image, source.path, number, at), result)
    tell(f"frame {{at:.6f}}")
    number += 1
sys.exit(failures[0].message)
"""


@dataclass(frozen=True)
class Killed:
    """One kill: when, and by file the seconds that it lacks after the kill and would lack after a power cut."""

    after: float
    frames: int
    kill_lacks: dict[str, float]
    power_cut_lacks: dict[str, float]


def record_and_kill(folder: Path, seconds: float) -> Killed:
    """Record into ``folder`` and kill the process ``seconds`` after its first frame.

    Raises:
        RuntimeError: the recording ended by itself.
    """
    command = [sys.executable, "-c", _RECORD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(errors.strip() or "the recording ended by itself")
    lines += rest.splitlines()
    times = [float(line.split()[1]) for line in lines if line.startswith("frame ")]
    synced = dict.fromkeys(FILES.values(), 0)
    for line in lines:
        if line.startswith("synced "):
            _, name, size = line.split()
            synced[name] = int(size)
    kill = {what: lacking(folder / name, times) for what, name in FILES.items()}
    cut = {}
    for what, name in FILES.items():
        shortened = folder / f"cut-{name}"
        shutil.copy(folder / name, shortened)
        with shortened.open("r+b") as stream:
            stream.truncate(synced[name])
        cut[what] = lacking(shortened, times)
    return Killed(round(seconds, 3), len(times), kill, cut)


def lacking(path: Path, times: list[float]) -> float:
    """Seconds from the last frame that can be read to the last one that was handed over."""
    last = times[0]
    if path.suffix == ".jsonl":
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last one may be torn
                last = json.loads(line)["time"]
    elif path.stat().st_size:
        reader = open_video(path)
        last += max((at for _, at in reader), default=0.0)
        reader.close()
    return round(max(0.0, times[-1] - last), 4)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--longest", type=float, default=8, help="seconds of the longest recording")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    environment = collect_environment()
    moments = random.Random(arguments.seed)
    killed = []
    for number in range(arguments.kills):
        with tempfile.TemporaryDirectory() as folder:
            killed.append(record_and_kill(Path(folder), moments.uniform(0.2, arguments.longest)))
        print(f"{number + 1}/{arguments.kills}: {killed[-1]}", flush=True)
    result = {
        "schema": 1,
        "kind": "recording-kill",
        "environment": environment,
        "recording": {"height": SIZE[0], "width": SIZE[1], "fps": FPS, "sync_seconds": SYNC_SECONDS},
        "kills": len(killed),
        "files_that_play": sum(len(one.kill_lacks) for one in killed),
        "most_seconds_lacking_after_kill": {what: max(one.kill_lacks[what] for one in killed) for what in FILES},
        "most_seconds_lacking_after_power_cut": {
            what: max(one.power_cut_lacks[what] for one in killed) for what in FILES
        },
        "samples": [vars(one) for one in killed],
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("environment", "samples")}, indent=1))


if __name__ == "__main__":
    main()
