"""The service's numbers as Prometheus reads them (text format 0.0.4). No source, file or person is named."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from espmedsam_edge import __version__
from espmedsam_edge.runtime.serve.gate import Access
from espmedsam_edge.runtime.serve.panel import Panel
from espmedsam_edge.runtime.serve.statistics import BOUNDS, Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_KNOWN_PATHS = frozenset({"/", "/login", "/logout", "/healthz", "/metrics", "/live", "/v1/segment"})


Series = dict[tuple[tuple[str, str], ...], float]
"""Values by their labels."""


class Counters:
    """What the server counts about itself; the event loop writes, worker threads too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, int]] = Counter()
        self.segmented = Histogram()
        self.viewers = 0
        self.viewers_refused = 0
        self.frames_sent = 0
        self.bytes_sent = 0

    def answered(self, path: str, status: int) -> None:
        """Count an answer; the page's files and unknown paths count together, so that nobody can grow the list."""
        name = path if path in _KNOWN_PATHS else "/page" if path.startswith("/page/") else "other"
        with self._lock:
            self._answers[name, status] += 1

    def segmented_one(self, seconds: float) -> None:
        """Count an image that ``/v1/segment`` has answered."""
        with self._lock:
            self.segmented.add(seconds)

    def answers(self) -> dict[tuple[str, int], int]:
        """A copy of the answers by path and status."""
        with self._lock:
            return dict(self._answers)


def metrics_text(panel: Panel, counters: Counters, access: Access) -> str:
    """All metrics."""
    lines: list[str] = []
    summary, totals = panel.view.statistics.summary(), panel.view.statistics.totals()
    segmenter = panel.segmenter

    def metric(name: str, kind: str, text: str, values: float | Series) -> None:
        lines.extend((f"# HELP espmedsam_{name} {text}", f"# TYPE espmedsam_{name} {kind}"))
        for labels, value in values.items() if isinstance(values, dict) else [((), values)]:
            lines.append(f"espmedsam_{name}{_labels(labels)} {_number(value)}")

    info = {"version": __version__}
    if segmenter is not None:
        info |= {
            "modality": segmenter.modality,
            "precision": segmenter.precision,
            "backend": segmenter.choice.backend.name,
        }
    metric("info", "gauge", "What runs; always 1.", {tuple(info.items()): 1})
    metric("frames_total", "counter", "Frames segmented.", summary.frames)
    metric("frames_skipped_total", "counter", "Frames that live sources passed over.", summary.skipped)
    metric("frames_per_second", "gauge", "Over the last two seconds.", 0 if panel.view.ended else summary.fps)
    stages: Series = {(("stage", stage),): seconds for stage, seconds in totals.stage_seconds.items()}
    metric("stage_seconds_total", "counter", "Time spent on frames, by stage.", stages)
    _histogram(lines, "frame_latency_seconds", "From capture (live) or frame (files) to mask.", totals.latency)
    metric("mask_area_pixels", "gauge", "Foreground of the last frame.", summary.area)
    metric("mask_area_ratio", "gauge", "Foreground of the last frame, 0 to 1.", summary.fraction)
    metric("paused", "gauge", "1 while the run is paused.", int(panel.controls.current().paused))
    metric("viewers", "gauge", "Browsers that look.", counters.viewers)
    metric(
        "viewers_refused_total", "counter", "Browsers turned away because there were enough.", counters.viewers_refused
    )
    metric("view_frames_total", "counter", "Pictures sent to viewers.", counters.frames_sent)
    metric("view_bytes_total", "counter", "Bytes of pictures sent to viewers.", counters.bytes_sent)
    answers: Series = {(("path", p), ("code", str(s))): n for (p, s), n in sorted(counters.answers().items())}
    metric("http_answers_total", "counter", "Answers by path and status.", answers)
    _histogram(lines, "segment_request_seconds", "/v1/segment: from the whole image to the answer.", counters.segmented)
    metric("wrong_tokens_total", "counter", "Tokens that were not the right one.", access.refused)
    if (resident := _resident_bytes()) is not None:
        lines += ["# HELP process_resident_memory_bytes Resident size.", "# TYPE process_resident_memory_bytes gauge"]
        lines.append(f"process_resident_memory_bytes {resident}")
    metric("threads", "gauge", "Threads of Python.", threading.active_count())
    return "\n".join(lines) + "\n"


def _histogram(lines: list[str], name: str, text: str, histogram: Histogram) -> None:
    lines += [f"# HELP espmedsam_{name} {text}", f"# TYPE espmedsam_{name} histogram"]
    below = 0
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), histogram.counts, strict=True):
        below += count
        lines.append(f'espmedsam_{name}_bucket{{le="{bound}"}} {below}')
    lines += [f"espmedsam_{name}_sum {_number(histogram.sum)}", f"espmedsam_{name}_count {below}"]


def _labels(labels: Iterable[tuple[str, str]]) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    text = ",".join(f'{name}="{escaped(value)}"' for name, value in labels)
    return f"{{{text}}}" if text else ""


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def _resident_bytes() -> int | None:
    """The process's resident size; None where /proc is not."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
