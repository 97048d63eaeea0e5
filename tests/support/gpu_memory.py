"""A GPU's memory as ``kernel_checks`` wants it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.runtime.cuda.memory import DeviceBuffer, PinnedBuffer
from espmedsam_edge.runtime.cuda.stream import Stream


class GpuMemory:
    """A GPU's memory for ``kernel_checks``."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._kept: list[DeviceBuffer] = []

    def put(self, content: NDArray[Any], skew: int = 0) -> int:
        raw = np.ascontiguousarray(content).view(np.uint8).reshape(-1)
        buffer = DeviceBuffer(self.stream.device, raw.size + skew)
        self._kept.append(buffer)
        with PinnedBuffer(self.stream.device, raw.size) as host:
            host.array(raw.shape, np.uint8)[:] = raw
            self.stream.copy_to_device(buffer.address + skew, host.address, raw.size)
            self.stream.synchronize()
        return buffer.address + skew

    def get(self, address: int, size: int) -> NDArray[np.uint8]:
        with PinnedBuffer(self.stream.device, size) as host:
            self.stream.copy_to_host(host.address, address, size)
            self.stream.synchronize()
            return np.array(host.array((size,), np.uint8))

    def close(self) -> None:
        """Free all."""
        for buffer in self._kept:
            buffer.close()
