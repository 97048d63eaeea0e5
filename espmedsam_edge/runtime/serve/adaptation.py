"""How large and how fine the frames for one viewer are: from how fast it acknowledges them."""

from __future__ import annotations

from dataclasses import dataclass

MAX_WIDTH = 1920
MIN_WIDTH = 160


@dataclass(frozen=True)
class Level:
    """A share of the width that the viewer can show, and the JPEG's quality."""

    scale: float
    quality: int


LEVELS: tuple[Level, ...] = (
    Level(1.0, 88),
    Level(1.0, 76),
    Level(0.8, 72),
    Level(0.65, 66),
    Level(0.5, 58),
    Level(0.4, 48),
    Level(0.3, 38),
)
_SLOW, _FAST = 0.120, 0.055  # seconds from sending to acknowledgement: 8 and 18 frames a second
_MEMORY = 0.25  # weight of the newest
_PATIENCE_DOWN, _PATIENCE_UP = 4, 40  # frames: fast to give way, slow to come back, so that it does not swing


class Adaptation:
    """Goes down a level when frames take long to be acknowledged, up one when they have been quick for a while."""

    def __init__(self) -> None:
        self._level = 0
        self._mean: float | None = None
        self._since = 0
        self._came_up = False
        self._patience_up = _PATIENCE_UP
        self.viewport = 1280

    @property
    def level(self) -> int:
        """Which of ``LEVELS``; 0 is the best."""
        return self._level

    @property
    def width(self) -> int:
        """The most pixels across for the next frame; in steps of 32, so that viewers alike share a picture."""
        wanted = min(self.viewport, MAX_WIDTH) * LEVELS[self._level].scale
        return max(MIN_WIDTH, 32 * round(wanted / 32))

    @property
    def quality(self) -> int:
        """The JPEG quality of the next frame, 1 to 100."""
        return LEVELS[self._level].quality

    def acknowledged(self, seconds: float) -> None:
        """Learn how long a frame took from being sent to being on the viewer's screen."""
        self._mean = seconds if self._mean is None else self._mean + _MEMORY * (seconds - self._mean)
        self._since += 1
        if self._mean > _SLOW and self._since >= _PATIENCE_DOWN and self._level < len(LEVELS) - 1:
            if self._came_up and self._since < 2 * _PATIENCE_UP:  # that step was too much: try again later
                self._patience_up = min(4 * self._patience_up, 1000)
            self._step(+1)
        elif self._mean < _FAST and self._since >= self._patience_up and self._level > 0:
            self._step(-1)

    def _step(self, levels: int) -> None:
        self._level += levels
        self._came_up = levels < 0
        self._since = 0
        self._mean = None
