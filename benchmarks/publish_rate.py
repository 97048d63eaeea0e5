"""What publishing by MQTT takes from a run's rate: the same frames with and without, the broker stopped twice.

    python benchmarks/publish_rate.py --name publish-rate-MACHINE B.bundle [--frames 10000] [--rounds 3]

Needs Debian's mosquitto. Rounds with and without take turns. In those with, the broker is stopped at 30 % and at 65 %
of the frames, and started again at 45 % and at 80 %.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.phantoms import phantom_clip
from espmedsam_edge.runtime.run.jobs import Job
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.measurements import LineForm
from espmedsam_edge.runtime.sinks.mqtt import open_mqtt
from espmedsam_edge.runtime.sinks.publishing import Publication
from espmedsam_edge.runtime.sources.files import VideoFile
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

RESULTS = Path(__file__).parent / "results"
SIZE = (480, 640)


class Broker:
    """mosquitto on a port of this machine."""

    def __init__(self) -> None:
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if program is None:
            sys.exit("no mosquitto. Debian: apt-get install mosquitto")
        with socket.create_server(("127.0.0.1", 0)) as opened:
            self.port = int(opened.getsockname()[1])
        self._command = [program, "-p", str(self.port)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Come back at once; who connects tries again."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def keep(self, *, running: bool) -> None:
        """Start or stop it, unless it is as wanted."""
        if running != (self._process is not None):
            self.start() if running else self.stop()


class Frames(VideoFile):
    """So many frames of a phantom from memory; at some of them something happens."""

    def __init__(self, count: int, at: dict[int, Callable[[], None]]) -> None:
        super().__init__(Path("clip.mp4"))
        self.fps, self.length = Fraction(25), count
        self._at = at
        self._pictures = [image for image, _ in phantom_clip("colonoscopy", 0, 5, SIZE)]

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __iter__(self) -> Iterator[SourceFrame]:
        for index in range(self.length or 0):
            self._at.get(index, lambda: None)()
            yield SourceFrame(self._pictures[index % 5], self.files[0], index, index / 25)


def measure(segmenter: Segmenter, frames: int, *, publish: bool) -> dict[str, float]:
    """One round: its rate, and what was published and dropped."""
    failures: list[Failure] = []
    with ExitStack() as stack:
        if not publish:
            source, sinks = Frames(frames, {}), []
        else:
            broker = Broker()
            broker.start()
            stack.callback(broker.stop)
            time.sleep(1)
            shares = {0.3: broker.stop, 0.45: broker.start, 0.65: broker.stop, 0.8: broker.start}
            source = Frames(frames, {int(share * frames): act for share, act in shares.items()})
            address = f"mqtt://127.0.0.1:{broker.port}/masks"
            sinks = [stack.enter_context(open_mqtt(Publication(address, LineForm(), failures)))]
        begin = time.perf_counter()
        run_pipeline(segmenter, [Job(source, [])], sinks)
        seconds = time.perf_counter() - begin
    counts = {"published": sinks[0].published, "dropped": sinks[0].dropped} if sinks else {}
    return {"fps": round(frames / seconds, 3), **counts}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds = []
    with Segmenter.load(arguments.bundle) as segmenter:
        measure(segmenter, 50, publish=False)  # warm
        for number in range(arguments.rounds):
            rounds.append({what: measure(segmenter, arguments.frames, publish=what == "with") for what in _WHAT})
            print(f"{number + 1}/{arguments.rounds}: {rounds[-1]}", flush=True)
        backend = segmenter.choice.backend.name
    result = {
        "schema": 1,
        "kind": "publish-rate",
        "environment": collect_environment(),
        "frames": arguments.frames,
        "backend": backend,
        "ratio_of_medians": round(
            statistics.median(one["with"]["fps"] for one in rounds)
            / statistics.median(one["without"]["fps"] for one in rounds),
            4,
        ),
        "rounds": rounds,
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


_WHAT = ("without", "with")


if __name__ == "__main__":
    main()
