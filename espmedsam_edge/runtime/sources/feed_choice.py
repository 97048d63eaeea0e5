"""Several ways to read the same camera or stream: the first one that opens is kept."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.backends.backend import Say, silent
from espmedsam_edge.runtime.sources.live import Feed


class FirstThatOpens:
    """A feed that tries others in turn until one opens, and stays with that one.

    Args:
        feeds: the best first.
        note: what it means that the last one had to be taken, the beginning of a line.
        say: gets that line.
    """

    def __init__(self, feeds: Sequence[Feed], note: str = "", say: Say = silent) -> None:
        self._feeds, self._note, self._say = list(feeds), note, say

    @property
    def fps(self) -> Fraction | None:
        """See ``Feed.fps``."""
        return self._feeds[0].fps

    def open(self) -> None:
        """See ``Feed.open``; the error, if none opens, is the last one's."""
        refusal: UserError | None = None
        for feed in self._feeds:
            try:
                feed.open()
            except UserError as error:
                feed.close()
                if feed is self._feeds[-1]:
                    raise
                refusal = refusal or error
                continue
            if refusal is not None and feed is self._feeds[-1]:
                self._say(f"{self._note} ({refusal.message.rstrip('.')}).")
            self._feeds = [feed]
            return

    def read(self) -> Frame | None:
        """See ``Feed.read``."""
        return self._feeds[0].read()

    def interrupt(self) -> None:
        """See ``Feed.interrupt``."""
        for feed in list(self._feeds):
            feed.interrupt()

    def close(self) -> None:
        """See ``Feed.close``."""
        for feed in self._feeds:
            feed.close()
