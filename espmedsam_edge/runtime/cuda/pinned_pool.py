"""Pinned memory that results are handed out in: used again once nobody holds them, never copied out of."""

from __future__ import annotations

import mmap
import sys

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.runtime.cuda.device import CudaDevice, Resource
from espmedsam_edge.runtime.cuda.driver import CudaError, megabytes

_LIMIT = 256 << 20
"""Bytes of it that a backend keeps at most; results beyond are copied."""


class PinnedArray(Resource):
    """Memory of this process, pinned for a GPU while its device is open. Arrays of it stay valid after that.

    Attributes:
        memory: (size,) uint8; views of it are what is handed out.
        address: of its first byte.
    """

    def __init__(self, device: CudaDevice, size: int) -> None:
        """Allocate and pin ``size`` bytes.

        Raises:
            CudaError: no memory that can be pinned is left, or this system pins none that exists.
        """
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE  # pages of its own: none may be pinned twice
        # Not itself a view of an array: NumPy lets views of views refer to the first one, which is this one then.
        self.memory: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, whole), np.uint8, size)
        self.address = int(self.memory.ctypes.data)
        device.driver.call("cuMemHostRegister", self.address, whole, 0, about=f"for {megabytes(whole)}")
        super().__init__(device)
        self._idle = self._references()

    @property
    def in_use(self) -> bool:
        """Whether somebody still holds a view of the memory."""
        return self._references() > self._idle

    def _references(self) -> int:
        return sys.getrefcount(self.memory)

    def _free(self) -> None:
        self.device.driver.call("cuMemHostUnregister", self.address)


class PinnedPool:
    """Pinned arrays by size, given out again when nobody holds what was made of them."""

    def __init__(self, device: CudaDevice, limit: int = _LIMIT) -> None:
        self._device, self._limit = device, limit
        self._arrays: list[PinnedArray] = []
        self._works = True

    def take(self, size: int) -> NDArray[np.uint8] | None:
        """Memory of ``size`` bytes that nobody else holds as long as any view of it lives.

        Returns:
            (size,) uint8, or None: the limit is reached, or nothing can be pinned.

        Raises:
            CudaError: the GPU is lost.
        """
        idle = [array for array in self._arrays if not array.in_use]
        for array in idle:
            if array.memory.size == size:
                return array.memory[:]
        held = sum(array.memory.size for array in self._arrays)
        for array in idle:
            if held + size > self._limit:
                self._arrays.remove(array)
                held -= array.memory.size
                array.close()
        if not self._works or held + size > self._limit:
            return None
        try:
            made = PinnedArray(self._device, size)
        except CudaError as error:
            if error.lost:
                raise
            self._works = error.out_of_memory  # later, perhaps; a system that cannot is not asked again
            return None
        self._arrays.append(made)
        return made.memory[:]
