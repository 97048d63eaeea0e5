"""Results handed from a run to a loop in another thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from espmedsam_edge.closing import Closing
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sources.source import SourceFrame


class Handover(Closing):
    """A sink whose frames another thread takes, one by one; the run waits for it, one frame ahead."""

    def __init__(self) -> None:
        self._next: tuple[SourceFrame, Segmentation] | None = None
        self._ended = self._left = False
        self._changed = threading.Condition()

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``; does nothing once ``leave`` was called."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._next is None)
            self._next = (frame, result)
            self._changed.notify_all()

    def end(self) -> None:
        """No more will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def leave(self) -> None:
        """No more will be taken."""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def take(self) -> Iterator[tuple[SourceFrame, Segmentation]]:
        """What was written, until ``end``."""
        while True:
            with self._changed:
                while self._next is None and not self._ended:
                    self._changed.wait(0.2)  # a wait without an end would not always let Ctrl-C through
                item, self._next = self._next, None
                self._changed.notify_all()
            if item is None:
                return
            yield item
