"""A kernel's code on a GPU: loaded from what NVRTC made, and launched."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from espmedsam_edge.runtime.cuda.device import CudaDevice, Resource
from espmedsam_edge.runtime.cuda.driver import CudaError
from espmedsam_edge.runtime.cuda.nvrtc import KernelSource, cache_file, kernel_image
from espmedsam_edge.runtime.cuda.stream import Stream

_UNREADABLE = (200, 209, 218, 222)  # images a driver refuses: invalid, no binary, invalid PTX, unsupported PTX


class KernelModule(Resource):
    """The kernels of one source, loaded on a device."""

    def __init__(self, device: CudaDevice, image: bytes, name: str = "kernels") -> None:
        """Load a cubin or PTX.

        Raises:
            CudaError: the driver refuses it.
        """
        about = f"of {name} for {device.gpu.name}"
        self._module: Any = device.driver.call("cuModuleLoadData", image, about=about)
        self._functions: dict[str, Any] = {}
        super().__init__(device)

    @classmethod
    def load(cls, device: CudaDevice, source: KernelSource, cache: str | Path | None = None) -> KernelModule:
        """Load a source's kernels, compiling them where the cache has nothing that this driver takes.

        Raises:
            UserError: no NVRTC, or the driver refuses what it made.
        """
        sm = device.gpu.sm
        try:
            return cls(device, kernel_image(source, sm, cache), source.name)
        except CudaError as error:
            file = cache_file(source, sm, cache)
            if error.code not in _UNREADABLE or not file.exists():
                raise
            file.unlink()  # compiled for another driver: this one gets its own
            return cls(device, kernel_image(source, sm, cache), source.name)

    def launch(
        self,
        stream: Stream,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: ctypes.Structure,
    ) -> None:
        """Enqueue a kernel that takes one structure by value; ``parameters`` may be changed right after."""
        driver = self.device.driver
        if kernel not in self._functions:
            self._functions[kernel] = driver.call(
                "cuModuleGetFunction", self._module, kernel.encode(), about=f"of {kernel}"
            )
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        driver.call(
            "cuLaunchKernel",
            self._functions[kernel],
            *grid,
            *block,
            0,
            stream.handle,
            ctypes.addressof(pointers),
            0,
            about=f"of {kernel}",
        )

    def _free(self) -> None:
        self.device.driver.call("cuModuleUnload", self._module)
