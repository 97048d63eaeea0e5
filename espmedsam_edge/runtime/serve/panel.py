"""What viewers may change of a run, checked, and what they are told of it."""

from __future__ import annotations

import threading
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import color_of
from espmedsam_edge.modalities import target_of
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.runtime.run.controls import Adjustable
from espmedsam_edge.runtime.run.finding import ObjectFinder
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.segmenter_pool import SegmenterPool
from espmedsam_edge.runtime.serve.live_view import LiveView

Status = Literal["waiting", "running", "paused", "ended", "service"]


class Change(BaseModel, extra="forbid", frozen=True, strict=True):
    """A viewer's wish; what is left out stays."""

    type: Literal["set"] = "set"
    modality: Annotated[str, Field(max_length=40)] | None = None
    threshold: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    opacity: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    paused: bool | None = None
    source: Annotated[int, Field(ge=0, le=255)] | None = None


class Panel:
    """The controls of one run as the viewers see them. Any thread may ask; a change of modality may take long.

    Args:
        controls: the run's.
        pool: where segmenters come from.
        view: what is shown.
        segmenter: the run's first; None where there is no run and the bundle's modalities are asked for by name.
        service: whether there is no run, only the service.
        recognises: whether images sent without a modality are segmented as they look, not by the run's first.
        objects: which of a mask's objects count in answers.
    """

    def __init__(
        self,
        controls: Adjustable,
        pool: SegmenterPool,
        view: LiveView,
        segmenter: Segmenter | None,
        *,
        service: bool = False,
        recognises: bool = False,
        objects: ObjectOptions = ObjectOptions(),
    ) -> None:
        self.finder = ObjectFinder(objects)
        self.controls, self.pool, self.view, self.service = controls, pool, view, service
        self.recognises = recognises or segmenter is None
        self.first = segmenter
        self._loading = threading.Lock()
        self.loading: str | None = None
        self.needs_token = False  # set by ``build_app``; the page then offers to sign out

    @property
    def segmenter(self) -> Segmenter | None:
        """That of the next frames; None where there is none yet."""
        return self.controls.current().segmenter or self.first

    @property
    def status(self) -> Status:
        """What the run does."""
        if self.service:
            return "service"
        if self.view.ended:
            return "ended"
        if self.controls.current().paused:
            return "paused"
        return "running" if self.view.number else "waiting"

    def apply(self, change: Change) -> None:
        """Do what a viewer wishes.

        Raises:
            UserError: there is no run, or the modality cannot be loaded, or another one is being loaded.
        """
        if self.service:
            raise UserError("nothing runs here that could be changed.", "Start with a SOURCE.")
        wishes = {name: getattr(change, name) for name in ("threshold", "opacity", "paused")}
        wishes = {name: value for name, value in wishes.items() if value is not None}
        if wishes:
            self.controls.change(**wishes)
            self.view.touch()
        if change.source is not None:
            self.view.select(change.source)
        if change.modality is not None:
            self._switch(change.modality)

    def _switch(self, modality: str) -> None:
        if not self._loading.acquire(blocking=False):
            raise UserError("another modality is being loaded.", "Wait until it is there.")
        try:
            self.loading = modality
            segmenter = self.pool.get(modality)
            self.controls.change(segmenter=segmenter)
        finally:
            self.loading = None
            self._loading.release()
            self.view.touch()

    def greeting(self) -> dict[str, Any]:
        """What does not change: the modalities, each with its target in words and its overlay's colour."""
        modalities = [
            {"name": name, "target": target_of(name), "color": _hexadecimal(name)} for name in self.pool.modalities
        ]
        untrained = self.pool.bundle.manifest.weights.origin == "random"
        return {
            "type": "hello",
            "modalities": modalities,
            "untrained": untrained,
            "service": self.service,
            "token": self.needs_token,
        }

    def state(self) -> dict[str, Any]:
        """What the page shows beside the picture: times in milliseconds, areas in pixels, fractions from 0 to 1."""
        settings, segmenter = self.controls.current(), self.segmenter
        summary = self.view.shown_statistics.summary()
        threshold = settings.threshold
        if threshold is None:
            threshold = self.pool.bundle.manifest.threshold if segmenter is None else segmenter.threshold
        latency = None
        if summary.latency is not None:
            milliseconds = [round(1000 * value, 2) for value in summary.latency]
            latency = dict(zip(("p50", "p90", "p99"), milliseconds, strict=True))
        return {
            "type": "state",
            "status": self.status,
            "modality": None if segmenter is None else segmenter.modality,
            "precision": None if segmenter is None else segmenter.precision,
            "backend": None if segmenter is None else segmenter.choice.backend.name,
            "threshold": threshold,
            "opacity": self.view.opacity,
            "paused": settings.paused,
            "loading": self.loading,
            "frames": summary.frames,
            "skipped": summary.skipped,
            "fps": round(summary.fps, 2) if self.status == "running" else 0.0,
            "latency": latency,
            "latency_of": summary.latency_of,
            "sources": self.view.sources,
            "source": self.view.source,
            "square_millimetres": summary.square_millimetres,
        }


def _hexadecimal(modality: str) -> str:
    blue, green, red = color_of(modality)
    return f"#{red:02x}{green:02x}{blue:02x}"
