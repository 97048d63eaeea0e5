"""A frame's way to the GPU and back: pinned and device memory of one frame size, for input and for results."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer, PinnedBuffer
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.kernels import parameters
from espmedsam_edge.runtime.kernels.frame_view import FrameView, PixelFormat, check_size
from espmedsam_edge.runtime.kernels.launch import Canvas
from espmedsam_edge.runtime.segmentation import Measured

_ALIGNED = 256  # bytes: each part of a buffer starts where a row of the GPU's memory does
_ROW = 16  # bytes: rows that the kernels read in whole vectors


class FrameInput:
    """A frame from the host: written to pinned memory, copied to the GPU, or read there in place where mapped."""

    def __init__(
        self,
        device: CudaDevice,
        pixels: PixelFormat,
        width: int,
        height: int,
        *,
        mapped: bool = False,
    ) -> None:
        """Allocate for frames of one format and size.

        Args:
            device: where.
            pixels: the format.
            width: in pixels.
            height: in pixels.
            mapped: let the GPU read the pinned memory itself, once, instead of copying it (Jetson).

        Raises:
            UserError: a size that frames of the format cannot have; no memory.
        """
        check_size(pixels, width, height)
        self._format, self._shape = pixels, pixels.shape(width, height)
        pitch = _rounded_up(width * pixels.bytes_per_pixel, _ROW)
        size = pitch * self._shape[0]
        self._host, self._device = _pair(device, size, mapped=mapped)
        item = np.dtype(pixels.dtype).itemsize
        strides = (pitch, pixels.bytes_per_pixel, item)[: len(self._shape)]
        self._rows: NDArray[Any] = self._host.array(self._shape, pixels.dtype, strides=strides)
        address = self._host.device_address if self._device is None else self._device.address
        assert address is not None
        chroma = address + height * pitch if pixels is PixelFormat.NV12 else 0
        self.view = FrameView(pixels, width, height, address, pitch, chroma, pitch if chroma else 0, owner=self)

    def write(self, frame: NDArray[Any]) -> None:
        """Copy a frame into the pinned memory; what was enqueued to read the one before must be done.

        Args:
            frame: of ``PixelFormat.shape`` and dtype, any strides.

        Raises:
            UserError: of another shape or dtype.
        """
        if frame.shape != self._shape or frame.dtype != self._rows.dtype:
            raise UserError(
                f"a {self._format.name} frame of {self._rows.dtype} {self._shape} was agreed; "
                f"got {frame.dtype} {frame.shape}.",
                "Frames of one stream have one size; open another stream for another one.",
            )
        np.copyto(self._rows, frame)

    def upload(self, stream: Stream) -> None:
        """Enqueue the copy to the GPU of the frame that was written; nothing where mapped."""
        if self._device is not None:
            stream.copy_to_device(self._device.address, self._host.address, self._host.size)

    @property
    def size(self) -> int:
        """Bytes of the frame with its rows padded."""
        return self._host.size

    def close(self) -> None:
        """Free the memory."""
        self._host.close()
        if self._device is not None:
            self._device.close()


class FrameOutputs:
    """A frame's results on the GPU and on the host, in one piece, so that one copy brings them all.

    Rows are padded to whole runs of 16 pixels; the arrays are views without the padding. They share pinned memory:
    valid after ``download`` and a synchronization, until the next frame's and never after ``close``.
    """

    def __init__(
        self,
        stream: Stream,
        width: int,
        height: int,
        *,
        overlay: bool = True,
        mapped: bool = False,
    ) -> None:
        """Allocate for frames of one size, and wait until the memory is set to zero.

        Args:
            stream: of the device; used to clear the memory.
            width: in pixels.
            height: in pixels.
            overlay: whether an overlay is drawn.
            mapped: let the GPU write to the pinned memory itself instead of copying (Jetson).

        Raises:
            CudaError: no memory.
        """
        device = stream.device
        self.width, self.height = width, height
        row = _rounded_up(width, parameters.RUN)
        self._row = row
        self._mask_at = _rounded_up(ctypes.sizeof(parameters.Measures), _ALIGNED)
        self._overlay_at = _rounded_up(self._mask_at + row * height, _ALIGNED)
        size = self._overlay_at + (3 * row * height if overlay else 0)
        self._host, self._device = _pair(device, size, mapped=mapped)
        try:
            self._scratch = DeviceBuffer(device, ctypes.sizeof(parameters.Totals))
        except UserError:
            for buffer in (self._host, self._device):
                if buffer is not None:
                    buffer.close()
            raise
        for buffer in (self._device, self._scratch):
            if buffer is not None:
                stream.fill(buffer.address, 0, buffer.size)
        stream.synchronize()
        self._measures = parameters.Measures.from_address(self._host.address)
        self.mask: NDArray[np.uint8] = self._host.array((height, row), np.uint8, self._mask_at)[:, :width]
        self.overlay: NDArray[np.uint8] | None = None
        if overlay:
            self.overlay = self._host.array((height, row, 3), np.uint8, self._overlay_at)[:, :width]

    def canvas(self, view: FrameView, logits: int) -> Canvas:
        """Where the postprocess kernel puts this frame's results.

        Args:
            view: the frame, of this size.
            logits: address of its (h, w) float32 logits.
        """
        if view.size != (self.height, self.width):
            raise ValueError(f"a frame of {view.size} for results of {(self.height, self.width)}")
        start = self._host.device_address if self._device is None else self._device.address
        assert start is not None
        has_overlay = self.overlay is not None
        return Canvas(
            view,
            logits,
            mask=start + self._mask_at,
            mask_pitch=self._row,
            overlay=start + self._overlay_at if has_overlay else 0,
            overlay_pitch=3 * self._row if has_overlay else 0,
            measures=start,
            totals=self._scratch.address,
        )

    def download(self, stream: Stream, target: int | None = None) -> None:
        """Enqueue the copy to the host; nothing where mapped.

        Args:
            stream: where.
            target: address of other pinned memory of ``size`` bytes, where ``arrays_in`` finds it; None: the own.
        """
        if self._device is not None:
            stream.copy_to_host(target or self._host.address, self._device.address, self._host.size)

    @property
    def size(self) -> int:
        """Bytes of all results in one piece."""
        return self._host.size

    @property
    def unpadded(self) -> bool:
        """Whether results can go to other memory, with rows that have no padding there."""
        return self._device is not None and self._row == self.width

    def arrays_in(self, memory: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None, Measured]:
        """Mask, overlay and measures as views of memory that ``download`` filled."""
        height, width = self.height, self.width
        mask = memory[self._mask_at : self._mask_at + height * width].reshape(height, width)
        overlay = None
        if self.overlay is not None:
            overlay = memory[self._overlay_at : self._overlay_at + 3 * height * width].reshape(height, width, 3)
        head = memory[: ctypes.sizeof(parameters.Measures)].tobytes()
        return mask, overlay, _measured(parameters.Measures.from_buffer_copy(head))

    @property
    def measured(self) -> Measured:
        """Area, box and centroid of the mask."""
        return _measured(self._measures)

    def close(self) -> None:
        """Free the memory."""
        for buffer in (self._host, self._device, self._scratch):
            if buffer is not None:
                buffer.close()


def _measured(found: parameters.Measures) -> Measured:
    area = int(found.area)
    if area == 0:
        return Measured(0, None, None)
    box = (found.left, found.top, found.right - found.left + 1, found.bottom - found.top + 1)
    return Measured(area, box, (found.sum_x / area, found.sum_y / area))


def _pair(device: CudaDevice, size: int, *, mapped: bool) -> tuple[PinnedBuffer, DeviceBuffer | None]:
    """Pinned memory and, unless it is mapped, as much on the GPU; both or none."""
    host = PinnedBuffer(device, size, mapped=mapped)
    try:
        return host, None if mapped else DeviceBuffer(device, size)
    except UserError:
        host.close()
        raise


def _rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step
