"""Memory that the GPU reads and writes: its own, and pinned memory of the host, mapped for it where asked."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from espmedsam_edge.runtime.cuda.device import CudaDevice, Resource
from espmedsam_edge.runtime.cuda.driver import megabytes

_MAPPED = 2  # CU_MEMHOSTALLOC_DEVICEMAP


class DeviceBuffer(Resource):
    """Bytes in the GPU's memory.

    Attributes:
        address: on the GPU, aligned to 256 bytes.
        size: in bytes.
    """

    def __init__(self, device: CudaDevice, size: int) -> None:
        """Allocate ``size`` bytes, whose content is undefined.

        Raises:
            CudaError: the GPU is full; the message says how much was asked for and how much is free.
        """
        free = device.memory().free
        about = f"for {megabytes(size)} with {megabytes(free)} free on {device.gpu.name}"
        self.address = int(device.driver.call("cuMemAlloc", size, about=about))
        self.size = size
        device.held += size
        super().__init__(device)

    def _free(self) -> None:
        self.device.held -= self.size
        self.device.driver.call("cuMemFree", self.address)


class PinnedBuffer(Resource):
    """Bytes in the host's memory that never move, so that copies to and from the GPU run by themselves.

    Attributes:
        address: on the host.
        device_address: where the GPU sees the same bytes, or None unless mapped.
        size: in bytes.
    """

    def __init__(self, device: CudaDevice, size: int, *, mapped: bool = False) -> None:
        """Allocate ``size`` bytes, set to zero.

        Args:
            device: the GPU to pin them for.
            size: in bytes.
            mapped: let the GPU read and write them in place. On a Jetson, where both share the memory, that saves a
                copy; on a card every access crosses the bus.

        Raises:
            CudaError: no memory that can be pinned is left.
        """
        about = f"for {megabytes(size)} of pinned memory"
        self.address = int(device.driver.call("cuMemHostAlloc", size, _MAPPED if mapped else 0, about=about))
        self.size = size
        super().__init__(device)
        self.device_address: int | None = None
        if mapped:
            self.device_address = int(device.driver.call("cuMemHostGetDevicePointer", self.address, 0))
        ctypes.memset(self.address, 0, size)

    def array(
        self, shape: tuple[int, ...], dtype: DTypeLike, offset: int = 0, strides: tuple[int, ...] | None = None
    ) -> NDArray[Any]:
        """The bytes from ``offset`` as an array that shares them; not to be used after ``close``.

        Args:
            shape: of the array.
            dtype: of its elements.
            offset: in bytes.
            strides: in bytes; None: C order.
        """
        raw: Any = (ctypes.c_ubyte * self.size).from_address(self.address)
        shared: NDArray[Any] = np.ndarray(shape, dtype, raw, offset, strides)
        return shared

    def write(self, content: bytes) -> None:
        """Copy bytes into the first of these.

        Raises:
            ValueError: more than there are.
        """
        if len(content) > self.size:
            raise ValueError(f"{len(content)} bytes for {self.size}")
        ctypes.memmove(self.address, content, len(content))

    def read(self) -> bytes:
        """A copy of them all."""
        return ctypes.string_at(self.address, self.size)

    def _free(self) -> None:
        self.device.driver.call("cuMemFreeHost", self.address)
