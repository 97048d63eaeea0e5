"""The service's numbers as Prometheus reads them (text format 0.0.4). No source, file or person is named."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from espmedsam_edge.runtime.serve.gate import Access
from espmedsam_edge.runtime.serve.panel import Panel
from espmedsam_edge.runtime.serve.statistics import BOUNDS
from espmedsam_edge.version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_KNOWN_PATHS = frozenset({"/", "/login", "/logout", "/healthz", "/metrics", "/live", "/v1/segment"})


class ServiceMetrics:
    """What one service counts, in a registry of its own; any thread may count.

    Args:
        panel: the run's controls and view, which are asked when the metrics are.
        access: counts the wrong tokens.
    """

    def __init__(self, panel: Panel, access: Access) -> None:
        registry = self._registry = CollectorRegistry()
        self.viewers = 0  # the event loop counts them
        self.segmented = Histogram(
            "espmedsam_segment_request_seconds",
            "/v1/segment: from the whole image to the answer.",
            buckets=BOUNDS,
            registry=registry,
        )
        self.viewers_refused = Counter(
            "espmedsam_viewers_refused", "Browsers turned away because there were enough.", registry=registry
        )
        self.frames_sent = Counter("espmedsam_view_frames", "Pictures sent to viewers.", registry=registry)
        self.bytes_sent = Counter("espmedsam_view_bytes", "Bytes of pictures sent to viewers.", registry=registry)
        self._answers = Counter(
            "espmedsam_http_answers", "Answers by path and status.", ["path", "code"], registry=registry
        )
        Gauge("espmedsam_viewers", "Browsers that look.", registry=registry).set_function(lambda: self.viewers)
        Gauge("espmedsam_threads", "Threads of Python.", registry=registry).set_function(threading.active_count)
        registry.register(panel.view.statistics.latency)
        registry.register(panel.view.statistics.stage_seconds)
        registry.register(_RunCollector(panel, access))
        ProcessCollector(registry=registry)

    def answered(self, path: str, status: int) -> None:
        """Count an answer; the page's files and unknown paths count together, so that nobody can grow the list."""
        name = path if path in _KNOWN_PATHS else "/page" if path.startswith("/page/") else "other"
        self._answers.labels(name, str(status)).inc()

    def text(self) -> bytes:
        """All metrics, for an answer of the type ``CONTENT_TYPE``."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """What the registry has but for the times at which its counters were made, which would double the text."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _RunCollector:
    """Metrics of what others keep anyway: the run's statistics and controls, the gate."""

    def __init__(self, panel: Panel, access: Access) -> None:
        self._panel, self._access = panel, access

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now."""
        panel, segmenter = self._panel, self._panel.segmenter
        summary = panel.view.statistics.summary()
        info = GaugeMetricFamily("espmedsam_info", "What runs; always 1.")
        labels = {"version": __version__}
        if segmenter is not None:
            labels |= {
                "modality": segmenter.modality,
                "precision": segmenter.precision,
                "backend": segmenter.choice.backend.name,
            }
        info.add_sample("espmedsam_info", labels, 1)
        yield info
        for name, text, count in (
            ("frames", "Frames segmented.", summary.frames),
            ("frames_skipped", "Frames that live sources passed over.", summary.skipped),
            ("wrong_tokens", "Tokens that were not the right one.", self._access.refused),
        ):
            yield CounterMetricFamily(f"espmedsam_{name}", text, count)
        for name, text, value in (
            ("frames_per_second", "Over the last two seconds.", 0 if panel.view.ended else summary.fps),
            ("mask_area_pixels", "Foreground of the last frame.", summary.area),
            ("mask_area_ratio", "Foreground of the last frame, 0 to 1.", summary.fraction),
            ("paused", "1 while the run is paused.", int(panel.controls.current().paused)),
        ):
            yield GaugeMetricFamily(f"espmedsam_{name}", text, value)
