"""Whether a live source comes back after every forced disconnect, and how fast.

    python benchmarks/disconnects.py --name disconnects-MACHINE [--times 200] [--note TEXT]

Servers on loopback (``tests/support/stream_servers.py``): Motion JPEG over HTTP whose connections are reset, read by
PyAV; and GStreamer's RTSP server whose clients are removed, read by PyAV and by GStreamer. Each disconnect waits until
frames flow. Reported: how many were recovered, the time from the cut to the next frame, threads and memory before and
after.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from stream_servers import MjpegServer, RtspServer, rtsp_server_missing

from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.runtime.latency import Latency
from espmedsam_edge.runtime.sources.gstreamer import rtsp_feed
from espmedsam_edge.runtime.sources.live import LiveSource
from espmedsam_edge.runtime.sources.network import NetworkFeed
from espmedsam_edge.runtime.sources.uris import Uri, parse_uri
from espmedsam_edge.runtime.video.gstreamer import has_element

RESULTS = Path(__file__).parent / "results"
_PATIENCE = 60.0


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cut_again_and_again(feed: Any, uri: Uri, cut: Callable[[], int], times: int) -> dict[str, Any]:
    """Disconnect ``times`` times, each once frames flow, and wait for the next frame."""
    waits: list[float] = []
    lost = 0
    before: tuple[int, int] | None = None
    with LiveSource(feed, uri.address, uri.label) as source:
        frames = iter(source)
        for count in range(times):
            for _ in range(3):
                next(frames)
            if count == min(10, times - 1):
                before = resident_bytes(), threading.active_count()
            begin, reconnects = time.monotonic(), source.reconnects
            while cut() == 0:  # the server has not yet noticed that it has a client
                time.sleep(0.001)
            while source.reconnects == reconnects and time.monotonic() - begin < _PATIENCE:
                next(frames)
            if source.reconnects == reconnects:
                lost += 1
            else:
                waits.append(time.monotonic() - begin)
        after = resident_bytes(), threading.active_count()
    assert before is not None
    return {
        "disconnects": times,
        "recovered": times - lost,
        "seconds_to_next_frame_ms": Latency.of(waits).milliseconds(),
        "resident_bytes_after_10": before[0],
        "resident_bytes_at_end": after[0],
        "threads_after_10": before[1],
        "threads_at_end": after[1],
    }


def opened(url: str) -> Uri:
    """The URI of a test server."""
    uri = parse_uri(url)
    assert uri is not None
    return uri


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--note", help="what should be known of the circumstances")
    arguments = parser.parse_args()
    environment = collect_environment()
    runs: dict[str, Any] = {}
    picture = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    with MjpegServer(lambda number: picture, fps=60) as server:
        uri = opened(server.url)
        runs["motion-jpeg, PyAV"] = cut_again_and_again(NetworkFeed(uri), uri, server.drop, arguments.times)
        print(json.dumps(runs), flush=True)
    missing = rtsp_server_missing()
    if missing is None:
        with RtspServer(fps=60) as rtsp:
            uri = opened(rtsp.url)
            runs["rtsp, PyAV"] = cut_again_and_again(NetworkFeed(uri), uri, rtsp.drop, arguments.times)
            print(json.dumps(runs), flush=True)
            if has_element("avdec_h264"):
                feed = rtsp_feed(uri, "avdec_h264")
                runs["rtsp, GStreamer"] = cut_again_and_again(feed, uri, rtsp.drop, arguments.times)
                print(json.dumps(runs), flush=True)
    result = {
        "schema": 1,
        "kind": "disconnects",
        "environment": environment,
        "note": arguments.note,
        "not_run": missing and f"rtsp: {missing}",
        "runs": runs,
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
