"""The beginning of a video left out without decoding it, frames counted all the same.

What follows is what decoding from the first frame gives: frames, numbers and times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

from espmedsam_edge.runtime.video.pyav import load_pyav

_A_PACKET_A_PICTURE = frozenset({
    "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "av1", "vp9", "prores", "dnxhd", "ffv1",
    "rawvideo", "dvvideo",
})  # fmt: skip

_TIMED = frozenset({"mov", "matroska", "flv", "mpegts"})  # not AVI, which numbers what it stores
_MOST_HELD = 256 << 20  # bytes of packets: without keyframes all is decoded


def can_skip(container: Any, stream: Any) -> bool:
    """Whether each packet of PyAV's stream is a picture with its own time, as a rule."""
    timed = set(container.format.name.split(",")) & _TIMED
    return bool(timed) and stream.codec_context.name in _A_PACKET_A_PICTURE


class Skipper:
    """Packets from the keyframe before the last one before a time: what is shown from then on depends on no others.

    Args:
        start: seconds from the first frame.
        again: gives the packets from the first one on, once more.

    Attributes:
        first: time of the first frame as the container states it, once packets came; None: it states none.
    """

    def __init__(self, start: float, again: Callable[[], Iterator[Any]]) -> None:
        self._start, self._again = start, again
        self._dropped = 0
        self._before: int | None = None  # frames before the start, where all were decoded
        self._held: list[Any] = []  # from the keyframe before the last one on
        self._keys: list[int] = []  # where keyframes are in them
        self._bytes = 0
        self._given = False
        self.first: float | None = None

    def packets(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Those of ``packets`` that are to be decoded; all, if some state no time.

        The first frame is decoded here, too, since all times count from it.
        """
        begun: list[Any] = []
        for packet in packets:
            begun.append(packet)
            with suppress(load_pyav().error.FFmpegError):  # it comes again
                frames = packet.decode() if packet.size else []
                if frames:
                    self.first = frames[0].time
                    break
        if begun:
            begun[0].stream.codec_context.flush_buffers()
        rest = chain(begun, packets)
        for packet in rest:
            self._hold(packet)
            if self.first is None or (packet.pts is None and packet.size):
                self._before = 0
                packet.stream.codec_context.flush_buffers()
                yield from self._again()
                return
            if self._bytes > _MOST_HELD or not packet.size:
                break
            if float(packet.pts * packet.time_base) - self.first >= self._start:
                break
        yield from list(self._held)
        for packet in rest:
            if not self._given:
                self._held.append(packet)
            yield packet

    def is_before(self, time: float | None) -> bool:
        """Whether a frame, by its time as the container states it, is none of those that are wanted."""
        before = self.first is not None and time is not None and time - self.first < self._start
        if self._before is not None:
            self._before += before
        return before

    def index(self, pts: int) -> int:
        """The number, from 0, of the first frame that is wanted, once ``packets`` has given what it depends on."""
        if self._before is not None:
            return self._before
        before = sum(1 for packet in self._held if packet.size and packet.pts is not None and packet.pts < pts)
        self._held, self._given = [], True
        return self._dropped + before

    def _hold(self, packet: Any) -> None:
        if packet.is_keyframe:
            if len(self._keys) == 2:
                left_out = self._held[: self._keys[1]]
                self._dropped += sum(1 for old in left_out if old.size and not old.is_corrupt)
                self._bytes -= sum(old.size for old in left_out)
                del self._held[: self._keys[1]]
                self._keys = [0]
            self._keys.append(len(self._held))
        self._held.append(packet)
        self._bytes += packet.size
