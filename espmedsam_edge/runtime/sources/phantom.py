"""``test://``: a moving phantom with known masks and a clock in the picture, for trying and measuring live runs."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.closing import Closing
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.imaging.decode import max_pixels
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.phantoms import SMALLEST, phantom
from espmedsam_edge.runtime.sources.live import LiveOptions, LiveSource
from espmedsam_edge.runtime.sources.source import Failure, Source, SourceFrame
from espmedsam_edge.runtime.sources.uris import Uri

MODALITIES = (*PAPER_MODALITIES, "histopathology")
_DRAWN = 8  # different frames, shown forth and back: drawing each anew would take longer than a frame lasts
_COLUMNS, _ROWS = 16, 4  # the clock: 64 squares, black for 0 and white for 1
_SYNC = 0b10100110
_LONGEST_LATE = 1.0


class Phantom:
    """The frames of a scene that moves forth and back, drawn once, each with its true mask."""

    def __init__(self, modality: str, seed: int, size: tuple[int, int]) -> None:
        drawn = [phantom(modality, seed, size, frame) for frame in range(_DRAWN)]
        self._frames: list[tuple[Frame, NDArray[np.uint8]]] = [*drawn, *drawn[-2:0:-1]]

    def image(self, index: int) -> Frame:
        """The picture of frame ``index``, to be copied before it is drawn on, (H, W, 3) uint8 BGR."""
        return self._frames[index % len(self._frames)][0]

    def truth(self, index: int) -> NDArray[np.uint8]:
        """The true mask of frame ``index``, (H, W) uint8, 0 or 255."""
        return self._frames[index % len(self._frames)][1]


class PhantomFeed:
    """A phantom at a steady rate: frame n is due n / fps seconds after the first, and shows when it was drawn."""

    def __init__(self, modality: str, seed: int, size: tuple[int, int], fps: Fraction, frames: int | None) -> None:
        self.fps: Fraction | None = fps
        self._scene = (modality, seed, size)
        self._interval = float(1 / fps)
        self._frames = frames
        self._interrupted = threading.Event()
        self._phantom: Phantom | None = None
        self._index = 0
        self._start = 0.0

    def open(self) -> None:
        self._phantom = self._phantom or Phantom(*self._scene)
        self._start = time.monotonic() - self._index * self._interval

    def read(self) -> Frame | None:
        if self._index == self._frames or self._phantom is None:
            return None
        late = time.monotonic() - (self._start + self._index * self._interval)
        if late < 0 and self._interrupted.wait(-late):
            return None
        if late > _LONGEST_LATE:
            self._start += late
        image: Frame = self._phantom.image(self._index).copy()
        self._index += 1
        write_clock(image, time.monotonic())
        return image

    def truth(self, index: int) -> NDArray[np.uint8]:
        """The true mask of frame ``index``, (H, W) uint8, 0 or 255, once the feed was opened."""
        if self._phantom is None:
            raise RuntimeError("open the feed first")
        mask: NDArray[np.uint8] = self._phantom.truth(index)
        return mask

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        """See ``Feed.close``."""


class PhantomClip(Closing):
    """The same phantom as a recording: every frame, as fast as it is taken."""

    kind: Literal["images", "video"] = "video"
    live = False

    def __init__(self, uri: Uri, modality: str, seed: int, size: tuple[int, int], fps: Fraction, frames: int) -> None:
        self.name = uri.address
        self.files = [Path(uri.label)]
        self.fps: Fraction | None = fps
        self.length: int | None = frames
        self.failures: list[Failure] = []
        self._scene = (modality, seed, size)

    def __iter__(self) -> Iterator[SourceFrame]:
        drawn = Phantom(*self._scene)
        for index in range(self.length or 0):
            time = float(index / (self.fps or 1))
            yield SourceFrame(drawn.image(index).copy(), self.files[0], index, time, address=self.name)


def scene_named(specification: str, modality: str) -> str:
    """A source as the user wrote it; ``test://`` and ``test://?fps=60``, which name no scene, get the modality's.

    Example:
        >>> scene_named("test://?fps=60", "xray")
        'test://xray?fps=60'
    """
    return re.sub(r"^test://(?=\?|$)", f"test://{modality}", specification, flags=re.IGNORECASE)


def open_phantom(uri: Uri, live: LiveOptions) -> Source:
    """The source of ``test://MODALITY?fps=30&size=640x480&frames=300&seed=0&live=yes``.

    Raises:
        UserError: no such modality or option, or a value out of range.
    """
    uri.allow("fps", "size", "frames", "seed", "live")
    modality = uri.place.strip("/")
    if modality not in MODALITIES:
        raise UserError(f"no phantom of '{modality}'.", nearest(modality, MODALITIES))
    size = uri.size() or (480, 640)
    if min(size) < SMALLEST or size[0] * size[1] > max_pixels():
        raise UserError(f"size={size[1]}x{size[0]} is too small or too large.", f"Use at least {SMALLEST}x{SMALLEST}.")
    fps = Fraction(uri.number("fps", 0.1, 1000) or 30).limit_denominator(1001)
    frames = uri.whole("frames", 1, 10**9)
    seed = uri.whole("seed", 0, 10**9) or 0
    goes_on = uri.options.get("live", "yes")
    if goes_on not in ("yes", "no"):
        raise UserError(f"live={goes_on} in {uri.address} is neither yes nor no.")
    if goes_on == "no":
        return PhantomClip(uri, modality, seed, size, fps, frames or 100)
    return LiveSource(PhantomFeed(modality, seed, size, fps, frames), uri.address, uri.label)


def _square(height: int, width: int) -> int:
    """The side of the clock's squares in pixels: as large as fits a quarter of the picture's width, 8 at most."""
    return max(1, min(8, width // _COLUMNS, height // (2 * _ROWS)))


def write_clock(image: Frame, seconds: float) -> None:
    """Draw a time into a picture's upper left corner, to the microsecond: 4 rows of 16 black and white squares.

    They hold, most significant bit first, 8 bits to know it by, 48 bits of microseconds, and 8 bits that check those.

    Args:
        image: (H, W, 3) uint8, at least 32 x 32; drawn on.
        seconds: 0 or more, for example ``time.monotonic()``.
    """
    microseconds = round(seconds * 1e6) & ((1 << 48) - 1)
    word = (_SYNC << 56) | (microseconds << 8) | _check(microseconds)
    bits = np.array([(word >> place) & 1 for place in range(63, -1, -1)], np.uint8).reshape(_ROWS, _COLUMNS)
    side = _square(*image.shape[:2])
    squares = np.repeat(np.repeat(bits * np.uint8(255), side, axis=0), side, axis=1)
    image[: squares.shape[0], : squares.shape[1]] = squares[..., None]


def read_clock(image: Frame) -> float | None:
    """The time that ``write_clock`` drew, in seconds, from a picture that may have been compressed; None: no clock."""
    side = _square(*image.shape[:2])
    corner = image[: side * _ROWS, : side * _COLUMNS].mean(axis=2)
    bits = corner.reshape(_ROWS, side, _COLUMNS, side).mean(axis=(1, 3)) > 127
    word = int("".join("1" if bit else "0" for bit in bits.ravel()), 2)
    microseconds = (word >> 8) & ((1 << 48) - 1)
    if word >> 56 != _SYNC or word & 0xFF != _check(microseconds):
        return None
    return microseconds / 1e6


def _check(value: int) -> int:
    total = 0x5A
    for byte in value.to_bytes(6, "big"):
        total = (total * 31 + byte) & 0xFF
    return total
