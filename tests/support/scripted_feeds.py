"""A feed whose every step a test decides: frames, drop-outs, refusals, errors, the end."""

from __future__ import annotations

import queue
from fractions import Fraction
from typing import Any

import numpy as np

from espmedsam_edge.imaging.geometry import Frame

END = object()


class ScriptedFeed:
    """Gives what was put: an int becomes a frame of that value, an exception is raised, END ends it.

    ``opening`` holds what ``open`` raises, in turn, None for nothing.
    """

    def __init__(self, *steps: Any, opening: tuple[Exception | None, ...] = ()) -> None:
        self.fps: Fraction | None = Fraction(30)
        self.steps: queue.Queue[Any] = queue.Queue()
        self.opening = list(opening)
        self.opened = self.closed = 0
        self._delivering = False
        self.put(*steps)

    def put(self, *steps: Any) -> None:
        for step in steps:
            self.steps.put(step)

    def open(self) -> None:
        self.opened += 1
        error = self.opening.pop(0) if self.opening else None
        if error is not None:
            raise error

    def read(self) -> Frame | None:
        if self._delivering:
            self.steps.task_done()
        step = self.steps.get(timeout=30)
        self._delivering = True
        if step is END:
            return None
        if isinstance(step, BaseException):
            raise step
        return np.full((16, 20, 3), step % 256, np.uint8)

    def drained(self) -> None:
        """Wait until everything that was put was delivered: the thread came back for more."""
        self.steps.join()

    def interrupt(self) -> None:
        self.steps.put(END)

    def close(self) -> None:
        self.closed += 1


class EndlessFeed:
    """Frames as fast as they are read."""

    def __init__(self, on_read: Any = None) -> None:
        self.fps: Fraction | None = Fraction(30)
        self.count = 0
        self.stopped = False
        self.on_read = on_read

    def open(self) -> None:
        pass

    def read(self) -> Frame | None:
        if self.stopped:
            return None
        if self.on_read is not None:
            self.on_read(self.count)
        self.count += 1
        return np.full((16, 20, 3), self.count % 256, np.uint8)

    def interrupt(self) -> None:
        self.stopped = True

    def close(self) -> None:
        pass
