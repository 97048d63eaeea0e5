"""One GPU opened for work: its primary context, its memory, and what was allocated on it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from espmedsam_edge.closing import Closing
from espmedsam_edge.runtime.cuda.driver import CudaDriver, CudaUnavailable, cuda_driver
from espmedsam_edge.runtime.cuda.gpu import GpuDevice, find_gpu

_this_thread = threading.local()


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of the GPU's memory; ``held`` is what this package has allocated of it."""

    free: int
    total: int
    held: int


class Resource(Closing):
    """Something of a device that must be freed: freed by ``close``, at the latest when the device closes.

    Nothing is freed by the garbage collector, which knows nothing of work that still runs on the GPU.
    """

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        device._opened[id(self)] = self

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return id(self) not in self.device._opened

    def close(self) -> None:
        """Free it; a second call does nothing. Synchronize the streams that use it first."""
        if self.device._opened.pop(id(self), None) is not None:
            self.device.make_current()
            self._free()

    def _free(self) -> None:
        """What the subclass must do; called once, with the device's context current."""


class CudaDevice(Closing):
    """A GPU with its primary context, the one that TensorRT, CuPy and torch use too.

    A context is current in a thread, so a thread other than the one that opened the device calls ``make_current``
    before anything else. Not for several threads at once.
    """

    def __init__(self, driver: CudaDriver, gpu: GpuDevice, ordinal: int = 0) -> None:
        self.driver = driver
        self.gpu = gpu
        self.ordinal = ordinal
        self.held = 0
        self._opened: dict[int, Resource] = {}
        self._device = driver.call("cuDeviceGet", ordinal)
        self._context: Any = driver.call("cuDevicePrimaryCtxRetain", self._device, about=f"on {gpu.name}")
        self.make_current()

    @classmethod
    def open(cls, ordinal: int = 0) -> CudaDevice:
        """Open the GPU that CUDA numbers ``ordinal`` (CUDA_VISIBLE_DEVICES counts).

        Raises:
            CudaUnavailable: no cuda-python, no driver or no such GPU.
            CudaError: its context cannot be made; no memory, for example.
        """
        driver = cuda_driver()
        gpu = find_gpu(ordinal)
        if gpu is None:
            raise CudaUnavailable(
                f"there is no GPU {ordinal}.", "Check nvidia-smi and CUDA_VISIBLE_DEVICES.", exit_code=1
            )
        return cls(driver, gpu, ordinal)

    def make_current(self) -> None:
        """Make the GPU's context current in the calling thread.

        Captures that other libraries have under way in other threads do not concern this one from then on: else the
        driver refuses it memory while ONNX Runtime or torch captures a graph, and breaks that capture, too.
        """
        self.driver.call("cuCtxSetCurrent", self._context)
        if not getattr(_this_thread, "minds_its_own", False):
            mode = self.driver.constant("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL")
            self.driver.call("cuThreadExchangeStreamCaptureMode", mode)
            _this_thread.minds_its_own = True

    def memory(self) -> GpuMemory:
        """The GPU's memory at this moment."""
        free, total = self.driver.call("cuMemGetInfo")
        return GpuMemory(int(free), int(total), self.held)

    def close(self) -> None:
        """Free all that is still open on it, newest first, and let go of the context; a second call does nothing."""
        if self._context is None:
            return
        for resource in reversed(list(self._opened.values())):
            resource.close()
        self.driver.call("cuDevicePrimaryCtxRelease", self._device)
        self._context = None
