"""What may change while a run goes on: the modality, the threshold, the overlay's opacity, and a pause."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any, Protocol

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.segmenter import Segmenter


@dataclass(frozen=True)
class RunSettings:
    """How the next frame is segmented and shown. None leaves what the run started with.

    Attributes:
        segmenter: which modality; whoever sets it keeps it open as long as the run lasts.
        threshold: the probability (between 0 and 1) from which a pixel is foreground.
        opacity: of the overlay's tint, 0 to 1, for those who draw one.
        paused: no frame is segmented; a live source goes on and skips, a file waits. See ``WithoutPause``.
    """

    segmenter: Segmenter | None = None
    threshold: float | None = None
    opacity: float | None = None
    paused: bool = False


class Controls(Protocol):
    """Asked by the pipeline before each group of frames; both methods may be called from any thread."""

    def current(self) -> RunSettings:
        """The settings for the next frames."""

    def wait_for_change(self, seen: RunSettings, seconds: float) -> None:
        """Come back once the settings are not ``seen`` any more, or after ``seconds``."""


class Adjustable:
    """Settings that any thread may change: the default of a run, whose settings stay what they are unless it does.

    Example:
        >>> controls = Adjustable()
        >>> controls.change(threshold=0.3, paused=True).paused
        True
        >>> controls.change(paused=False) == RunSettings(threshold=0.3)
        True
    """

    def __init__(self, settings: RunSettings | None = None) -> None:
        self._settings = settings or RunSettings()
        self._changed = threading.Condition()

    def current(self) -> RunSettings:
        return self._settings

    def change(self, **changes: Any) -> RunSettings:
        """Set some of the fields of ``RunSettings``; the others stay.

        Raises:
            UserError: a threshold not between 0 and 1, or an opacity not from 0 to 1.
        """
        with self._changed:
            settings = replace(self._settings, **changes)
            if settings.threshold is not None and not 0 < settings.threshold < 1:
                raise UserError(f"threshold {settings.threshold} is not between 0 and 1.", "0.5 is usual.")
            if settings.opacity is not None and not 0 <= settings.opacity <= 1:
                raise UserError(f"opacity {settings.opacity} is not from 0 to 1.", "0.35 is usual.")
            self._settings = settings
            self._changed.notify_all()
            return settings

    def wait_for_change(self, seen: RunSettings, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._settings != seen, seconds)


class WithoutPause:
    """Controls of a run that goes on while its viewers hold the picture, because it writes results."""

    def __init__(self, controls: Controls) -> None:
        self._controls = controls

    def current(self) -> RunSettings:
        """See ``Controls.current``; never paused."""
        return replace(self._controls.current(), paused=False)

    def wait_for_change(self, seen: RunSettings, seconds: float) -> None:
        self._controls.wait_for_change(seen, seconds)
