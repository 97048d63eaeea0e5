"""The GPU of this machine, asked of NVIDIA's driver through ctypes: what must work before cuda-python is installed.

That is to find a GPU, and to know how much of its memory a build may take. All else goes through ``cuda.driver``.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.environment import memory
from espmedsam_edge.runtime.cuda.driver import cuda_error

_LIBRARY = "libcuda.so.1"
# CUdevice_attribute
_SM_COUNT = 16
_INTEGRATED = 18
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class GpuDevice:
    """One GPU.

    ``sm`` is its generation as TensorRT names it (``sm86`` for compute capability 8.6); ``pci`` its place on the bus,
    which nvidia-smi knows it by whatever CUDA_VISIBLE_DEVICES says (``0000:41:00.0``), or "".
    """

    name: str
    sm: str
    sm_count: int
    total_bytes: int
    integrated: bool
    cuda: str
    pci: str = ""

    def __str__(self) -> str:
        return f"{self.name} (SM {self.sm[2:-1]}.{self.sm[-1]}, {self.sm_count} SMs)"


def driver_installed() -> bool:
    """Whether NVIDIA's driver is there at all, with or without a GPU."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return False
    return True


def find_gpu(ordinal: int = 0) -> GpuDevice | None:
    """The GPU that CUDA numbers ``ordinal`` (CUDA_VISIBLE_DEVICES counts), or None without a driver or a GPU."""
    cuda = _driver()
    if cuda is None:
        return None
    device = c_int()
    if cuda.cuDeviceGet(byref(device), ordinal) != 0:
        return None
    name = ctypes.create_string_buffer(256)
    total = c_size_t()
    if cuda.cuDeviceGetName(name, 256, device) != 0 or cuda.cuDeviceTotalMem_v2(byref(total), device) != 0:
        return None

    def attribute(which: int) -> int:
        value = c_int()
        return value.value if cuda.cuDeviceGetAttribute(byref(value), which, device) == 0 else 0

    pci = ctypes.create_string_buffer(32)
    if cuda.cuDeviceGetPCIBusId(pci, 32, device) != 0:
        pci.value = b""
    version = c_int()
    cuda.cuDriverGetVersion(byref(version))
    return GpuDevice(
        name=_text(name),
        sm=f"sm{attribute(_CAPABILITY_MAJOR)}{attribute(_CAPABILITY_MINOR)}",
        sm_count=attribute(_SM_COUNT),
        total_bytes=total.value,
        integrated=bool(attribute(_INTEGRATED)),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        pci=_text(pci),
    )


def free_bytes(gpu: GpuDevice) -> int:
    """Memory a build may count on: free GPU memory; on a board that shares it with the CPU, the system's available one.

    Makes the GPU's primary context, so call it where a context is wanted anyway (the build's own process).

    Raises:
        UserError: not even a context fits, or the GPU does not answer.
    """
    if gpu.integrated:  # the driver counts reclaimable page cache as used; the kernel's own figure does not
        available = memory().available
        if available is not None:
            return available
    cuda = _driver()
    if cuda is None:
        raise UserError(f"{gpu.name} does not answer any more.", "Check its driver.", exit_code=1)
    device, context, free, total = c_int(), c_void_p(), c_size_t(), c_size_t()
    for name, *arguments in (
        ("cuDeviceGet", byref(device), 0),
        ("cuDevicePrimaryCtxRetain", byref(context), device),
        ("cuCtxSetCurrent", context),
        ("cuMemGetInfo_v2", byref(free), byref(total)),
    ):
        code = getattr(cuda, name)(*arguments)
        if code != 0:
            raise cuda_error(f"{name.removesuffix('_v2')} on {gpu.name}", code)
    return free.value


def _driver() -> Any | None:
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    return cuda if cuda.cuInit(0) == 0 else None


def _text(buffer: ctypes.Array[c_char]) -> str:
    return bytes(buffer.value).decode("utf-8", "replace")
