"""The newest frame of a run, ready to be looked at: a sink that never waits for its viewers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import cv2
import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay
from espmedsam_edge.runtime.run.controls import Controls, RunSettings
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.serve.statistics import Statistics
from espmedsam_edge.runtime.sources.source import SourceFrame

DEFAULT_OPACITY = 0.35
STALLED_SECONDS = 30.0
"""How long a run with live sources may be without a frame before it counts as stalled."""

_KEPT_PICTURES = 8


@dataclass(frozen=True)
class Picture:
    """One overlay as it goes to a viewer.

    Attributes:
        number: counts up with each change of what is shown.
        frame: the frame's number in its source, from 0.
        time: its time in seconds; None for single images.
        jpeg: the file's bytes.
        width, height: of the picture in pixels.
        modality: what was segmented.
        area: foreground pixels of the whole frame.
        fraction: of the frame's pixels, 0 to 1.
        confidence: see ``Segmentation``.
    """

    number: int
    frame: int
    time: float | None
    jpeg: bytes
    width: int
    height: int
    modality: str
    area: int
    fraction: float
    confidence: float | None = None


@dataclass
class _Feed:
    """A live source, or all files together: what is held of it."""

    statistics: Statistics = field(default_factory=Statistics)
    shown: tuple[SourceFrame, Segmentation] | None = None


class LiveView:
    """Takes results as a sink does and keeps the newest; viewers ask for it as a JPEG of the size that suits them.

    While nothing new comes (a pause, or after the end) the frame that is held is segmented anew when the modality
    changes and its mask made anew when the threshold does, so that the controls always show their effect. Of several
    live sources one is shown, which viewers choose.

    Args:
        controls: the run's.
        opacity: of the tint, 0 to 1, unless the controls say otherwise.
        notice: a text to burn into the overlay, or "".
        holds: whether a pause holds the picture alone: the run goes on, see ``WithoutPause``.
        live: whether cameras or streams are among the sources, so that frames are to come all the time.
    """

    def __init__(
        self,
        controls: Controls,
        *,
        opacity: float = DEFAULT_OPACITY,
        notice: str = "",
        holds: bool = False,
        live: bool = False,
    ) -> None:
        self.statistics = Statistics()
        self._controls, self._opacity, self._notice, self._holds = controls, opacity, notice, holds
        self._live = live
        self._lock = threading.Lock()  # of what is shown
        self._drawing = threading.Lock()  # one picture at a time: they share the cache, and the CPU is the run's
        self._number = 0
        self._feeds: dict[str, _Feed] = {}
        self._selected: _Feed | None = None
        self._listeners: list[Callable[[], None]] = []
        self._pictures: dict[tuple[int, int, int], Picture] = {}
        self._ended = threading.Event()

    def __enter__(self) -> LiveView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        self.statistics.add(frame, result)
        key = "" if frame.captured is None else frame.source
        with self._lock:
            feed = self._feeds.setdefault(key, _Feed())
            self._selected = self._selected or feed
            held = self._holds and feed.shown is not None and self._controls.current().paused
            if not held:
                feed.shown = (frame, result)
            seen = feed is self._selected and not held
        feed.statistics.add(frame, result)
        if seen:
            self.touch()

    def touch(self) -> None:
        """Tell the viewers to look again: what is shown changed."""
        with self._lock:
            self._number += 1
            listeners = list(self._listeners)
        for listener in listeners:
            with suppress(RuntimeError):  # its event loop has just closed
                listener()

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have ``listener`` called, from any thread, whenever there is something new; returns what ends that."""
        with self._lock:
            self._listeners.append(listener)

        def stop() -> None:
            with self._lock:
                self._listeners.remove(listener)

        return stop

    def end(self) -> None:
        """No frame will follow; the last one stays."""
        self._ended.set()
        self.touch()

    @property
    def ended(self) -> bool:
        """Whether no frame will follow."""
        return self._ended.is_set()

    @property
    def stalled(self) -> float | None:
        """Seconds for which no frame of a live run came, if they are many and no pause is the reason; else None."""
        paused = self._controls.current().paused and not self._holds
        waited = self.statistics.waited
        return waited if self._live and not paused and waited > STALLED_SECONDS else None

    @property
    def number(self) -> int:
        """Of what is shown now; 0 before the first frame."""
        return self._number if self._selected is not None else 0

    @property
    def sources(self) -> int:
        """How many there are to choose from: each live source is one, all files together are one."""
        return len(self._feeds)

    @property
    def source(self) -> int:
        """Which one is shown, from 0."""
        with self._lock:
            return next((number for number, feed in enumerate(self._feeds.values()) if feed is self._selected), 0)

    @property
    def shown_statistics(self) -> Statistics:
        """Those of the source that is shown; ``statistics`` are those of all."""
        selected = self._selected
        return self.statistics if selected is None else selected.statistics

    def select(self, source: int) -> None:
        """Show another source.

        Raises:
            UserError: there is none of that number.
        """
        with self._lock:
            feeds = list(self._feeds.values())
            if not 0 <= source < len(feeds):
                raise UserError(f"there is no source {source + 1}.", f"There are {len(feeds)}.")
            self._selected = feeds[source]
        self.touch()

    @property
    def opacity(self) -> float:
        """Of the tint now, 0 to 1."""
        opacity = self._controls.current().opacity
        return self._opacity if opacity is None else opacity

    def picture(self, width: int, quality: int) -> Picture | None:
        """The newest overlay as a JPEG; None before the first frame.

        Args:
            width: the most pixels across; a smaller frame stays as it is.
            quality: of the JPEG, 1 to 100.

        Raises:
            UserError: the held frame had to be segmented anew, and the backend failed.
        """
        with self._drawing:
            with self._lock:
                number, feed = self._number, self._selected
                shown = None if feed is None else feed.shown
            if feed is None or shown is None:
                return None
            if (known := self._pictures.get((number, width, quality))) is not None:
                return known
            frame, result = shown
            settings = self._controls.current()
            if settings.paused or self.ended:
                result = self._renewed(feed, frame, result, settings)
            picture = self._draw(number, frame, result, width, quality)
            self._pictures[number, width, quality] = picture
            while len(self._pictures) > _KEPT_PICTURES:
                del self._pictures[next(iter(self._pictures))]
            return picture

    def _renewed(self, feed: _Feed, frame: SourceFrame, result: Segmentation, settings: RunSettings) -> Segmentation:
        """The held frame's result under the settings of now."""
        wanted = settings.segmenter
        if wanted is not None and wanted.modality != result.modality:
            renewed = wanted.segment_batch([frame.segmented], settings.threshold)[0]
            renewed = renewed if frame.crop is None else renewed.placed(frame.crop, frame.size)
            renewed = renewed.judged(frame.likeness, result.least)
            renewed = renewed if result.finish is None else result.finish(renewed)
        elif settings.threshold is not None and settings.threshold != result.threshold:
            renewed = result.at(settings.threshold)
        else:
            return result
        with self._lock:
            if feed.shown is not None and feed.shown[0] is frame:
                feed.shown = (frame, renewed)
        return renewed

    def _draw(self, number: int, frame: SourceFrame, result: Segmentation, width: int, quality: int) -> Picture:
        style = OverlayStyle(color_of(result.modality), self.opacity, notice=self._notice)
        height = result.size[0]
        if width >= result.size[1]:
            overlay: Any = result.overlay(frame.image, style)
        else:  # drawn at the size it is looked at: less work, and an outline that can still be seen
            height = max(1, round(height * width / result.size[1]))
            small: Any = cv2.resize(frame.image, (width, height), interpolation=cv2.INTER_AREA)
            mask: Any = cv2.resize(result.mask, (width, height), interpolation=cv2.INTER_AREA)
            overlay = draw_overlay(small, np.where(mask > 127, np.uint8(255), np.uint8(0)), result.counted(style))
        try:
            done, data = cv2.imencode(".jpg", overlay, [cv2.IMWRITE_JPEG_QUALITY, quality])
        except cv2.error:
            done = False
        if not done:
            raise UserError("a frame is too large for a JPEG.", "Give smaller frames.", exit_code=1)
        rows, columns = overlay.shape[:2]
        size = result.size[0] * result.size[1]
        return Picture(
            number,
            frame.index,
            frame.time,
            data.tobytes(),
            columns,
            rows,
            result.modality,
            result.area,
            result.area / size,
            result.confidence,
        )
