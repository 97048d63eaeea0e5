"""Fixtures of the tests that need a GPU. They also run, in a child of the CPU tests, on a driver made of software."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_memory import GpuMemory

from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.driver import unavailable
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.kernels.launch import FrameKernels


class Machine:
    """The software driver's own questions; see tests/double/cuda_machine.h."""

    def __init__(self, library: Any) -> None:
        self._library = library
        library.machine_calls.restype = ctypes.c_char_p

    def calls(self) -> list[str]:
        """The driver's functions called since ``forget``, in order."""
        return str(self._library.machine_calls().decode()).split()

    def forget(self) -> None:
        """Start the list of calls anew."""
        self._library.machine_forget()

    def open(self) -> int:
        """How many buffers, streams, events, graphs and modules are not freed."""
        return int(self._library.machine_open())


def _machine() -> Machine | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        return Machine(library)
    except (OSError, AttributeError):
        return None


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The software driver; skips on a real one."""
    found = _machine()
    if found is None:
        pytest.skip("needs the software driver of tests/double")
    return found


@pytest.fixture(scope="session")
def real_gpu() -> None:
    """Skips on the software driver, and without one."""
    if (reason := unavailable()) is not None:
        pytest.skip(reason)
    if _machine() is not None:
        pytest.skip("needs a real GPU: other libraries cannot use the software driver")


@pytest.fixture(scope="session")
def device() -> Iterator[CudaDevice]:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    with CudaDevice.open() as opened:
        yield opened


@pytest.fixture
def stream(device: CudaDevice) -> Iterator[Stream]:
    with Stream(device) as made:
        yield made


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for compiled kernels, shared by the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def kernels(device: CudaDevice, cache: Path) -> FrameKernels:
    return FrameKernels.load(device, cache)


@pytest.fixture
def memory(stream: Stream) -> Iterator[GpuMemory]:
    made = GpuMemory(stream)
    yield made
    made.close()
