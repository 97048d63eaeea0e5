"""Random frames of every format, pitch and alignment, in guarded memory, for the kernels' checks."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.runtime.kernels.frame_view import BT601, BT709, FrameView, PixelFormat, YuvMatrix

GUARD = 64  # bytes before and after every buffer
NOISE = 0xA7


class Memory(Protocol):
    """Where the kernels find their data."""

    stream: Any

    def put(self, content: NDArray[Any], skew: int = 0) -> int:
        """Copy bytes there; the address is ``skew`` past a multiple of 256."""

    def get(self, address: int, size: int) -> NDArray[np.uint8]:
        """What is there once all that was launched is done."""


class HostMemory:
    """The host's memory, for the kernels' host build."""

    stream = None

    def __init__(self) -> None:
        self._kept: list[NDArray[np.uint8]] = []

    def put(self, content: NDArray[Any], skew: int = 0) -> int:
        raw = np.ascontiguousarray(content).view(np.uint8).reshape(-1)
        buffer = np.full(raw.size + 512, NOISE, np.uint8)
        start = -buffer.ctypes.data % 256 + skew
        buffer[start : start + raw.size] = raw
        self._kept.append(buffer)
        return buffer.ctypes.data + start

    def get(self, address: int, size: int) -> NDArray[np.uint8]:
        return np.array((ctypes.c_uint8 * size).from_address(address))


class Guarded:
    """A buffer of noise that the kernels write to, and the noise around it, which they must leave."""

    def __init__(self, memory: Memory, size: int, *, zero: bool = False) -> None:
        content = np.full(size + 2 * GUARD, NOISE, np.uint8)
        if zero:
            content[GUARD:-GUARD] = 0
        self._memory, self._size = memory, size
        # GUARD bytes in front leave the alignment to 64 bytes as it is
        self.address = memory.put(content) + GUARD

    def read(self, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """The content; fails if the guards were touched."""
        content = self._memory.get(self.address - GUARD, self._size + 2 * GUARD)
        assert (content[:GUARD] == NOISE).all(), "written before the buffer"
        assert (content[-GUARD:] == NOISE).all(), "written past the buffer"
        return content[GUARD:-GUARD].view(dtype).reshape(shape)


@dataclass(frozen=True)
class FrameCase:
    """A frame to be made: its content is random from ``seed``.

    Attributes:
        pixels: format.
        width: in pixels; in NV12 even.
        height: likewise.
        padding: bytes after each row.
        skew: bytes by which the first row is off a multiple of 256.
        seed: of the content.
        window: GRAY16.
        matrix: NV12.
        around: columns left and right, rows above and below, of a larger frame that it is cut out of in place.
    """

    pixels: PixelFormat
    width: int
    height: int
    padding: int = 0
    skew: int = 0
    seed: int = 0
    window: tuple[float, float] = (0.0, 65535.0)
    matrix: YuvMatrix = BT601
    around: tuple[int, int, int, int] = (0, 0, 0, 0)

    def make(self, memory: Memory) -> tuple[FrameView, NDArray[np.uint8]]:
        """The frame in ``memory``, and the (H, W, 3) BGR picture that the CPU backend would see."""
        rng = np.random.default_rng(self.seed)
        left, right, above, below = self.around
        width, height = left + self.width + right, above + self.height + below
        shape = self.pixels.shape(width, height)
        array = rng.integers(0, np.iinfo(self.pixels.dtype).max, shape, self.pixels.dtype, endpoint=True)
        if self.pixels is PixelFormat.GRAY16:  # no sample that float32 and float64 may round to different levels
            array[np.abs(self._levels(array) % 1 - 0.5) < 1e-3] = int(self.window[0])
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(shape[0], -1)
        pitch = raw.shape[1] + self.padding
        padded = np.full((shape[0], pitch), NOISE, np.uint8)
        padded[:, : raw.shape[1]] = raw
        address = memory.put(padded.reshape(-1)[: padded.size - self.padding], self.skew)
        chroma = address + height * pitch if self.pixels is PixelFormat.NV12 else 0
        view = FrameView(
            self.pixels,
            width,
            height,
            address,
            pitch,
            chroma,
            pitch if chroma else 0,
            self.window,
            self.matrix,
        )
        if not any(self.around):
            return view, self._as_bgr(array)
        crop = Crop(left, above, self.width, self.height)
        return view.cropped(crop), np.ascontiguousarray(crop.of(self._as_bgr(array)))

    def _levels(self, samples: NDArray[Any]) -> NDArray[np.float64]:
        black, white = self.window
        return (samples.astype(np.float64) - black) * (255 / (white - black))

    def _as_bgr(self, array: NDArray[Any]) -> NDArray[np.uint8]:
        if self.pixels is PixelFormat.BGR8:
            return array
        if self.pixels is PixelFormat.RGB8:
            return np.ascontiguousarray(array[..., ::-1])
        if self.pixels is PixelFormat.GRAY16:
            array = np.clip(np.rint(self._levels(array)), 0, 255).astype(np.uint8)
        if self.pixels is PixelFormat.NV12:
            if self.matrix == BT601:
                return np.asarray(cv2.cvtColor(array, cv2.COLOR_YUV2BGR_NV12))
            return _yuv_to_bgr(array, self.matrix)
        return np.repeat(array[..., None], 3, axis=2)


def _yuv_to_bgr(array: NDArray[np.uint8], matrix: YuvMatrix) -> NDArray[np.uint8]:
    """NV12 by the matrix in exact arithmetic."""
    height = array.shape[0] * 2 // 3
    luma = np.maximum(array[:height].astype(np.int64) - matrix.luma_offset, 0) * matrix.luma_gain
    chroma = array[height:].reshape(height // 2, -1, 2).astype(np.int64) - 128
    u, v = (np.repeat(np.repeat(chroma[..., i], 2, axis=0), 2, axis=1) for i in (0, 1))
    blue, green, red = matrix.blue_u * u, matrix.green_u * u + matrix.green_v * v, matrix.red_v * v
    levels = np.stack([luma + blue, luma + green, luma + red], axis=2)
    return np.clip(np.floor(levels / (1 << 20) + 0.5), 0, 255).astype(np.uint8)


# Widths around the sixteen pixels of a vector, the tile's 128 and the block's 64, and anything up to a few tiles.
_SIDES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 160]), st.integers(41, 300))


def _around(step: int) -> st.SearchStrategy[tuple[int, int, int, int]]:
    side = st.integers(0, 20).map(lambda n: n * step)
    return st.tuples(side, side, side, side)


@st.composite
def frame_cases(draw: st.DrawFn) -> FrameCase:
    """Frames of any format, size, pitch and alignment."""
    pixels = draw(st.sampled_from(PixelFormat))
    width, height = draw(_SIDES), draw(_SIDES)
    if pixels is PixelFormat.NV12:
        width, height = width + width % 2, height + height % 2
    step = 2 if pixels is PixelFormat.GRAY16 else 1
    # padding that brings rows to whole vectors, and any other
    row = width * pixels.bytes_per_pixel
    padding = draw(st.one_of(st.just(-row % 16), st.integers(0, 40).map(lambda n: n * step)))
    return FrameCase(
        pixels,
        width,
        height,
        padding,
        draw(st.one_of(st.just(0), st.integers(0, 15).map(lambda n: n * step))),
        draw(st.integers(0, 1 << 16)),
        draw(st.sampled_from([(0.0, 65535.0), (0.0, 4095.0), (1000.0, 40000.0)])),
        draw(st.sampled_from([BT601, BT709])),
        draw(st.one_of(st.just((0, 0, 0, 0)), _around(2 if pixels is PixelFormat.NV12 else 1))),
    )
