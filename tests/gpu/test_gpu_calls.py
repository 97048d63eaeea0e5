"""What the device layer asks of the driver, call by call, on the software driver that records it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espmedsam_edge.runtime.backends.frame_buffers import FrameInput, FrameOutputs
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.driver import CudaError, cuda_driver
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer, PinnedBuffer
from espmedsam_edge.runtime.cuda.module import KernelModule
from espmedsam_edge.runtime.cuda.nvrtc import kernels_folder
from espmedsam_edge.runtime.cuda.stream import CudaGraph, Event, Stream
from espmedsam_edge.runtime.kernels.cu_sources import kernel_source
from espmedsam_edge.runtime.kernels.frame_view import PixelFormat
from espmedsam_edge.runtime.kernels.launch import FrameKernels

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("machine")]


def test_closing_a_device_frees_everything(machine: Any, cache: Path) -> None:
    before = machine.open()
    device = CudaDevice.open()
    stream = Stream(device)
    Event(device)
    FrameKernels.load(device, cache)
    FrameInput(device, PixelFormat.NV12, 64, 48)
    outputs = FrameOutputs(stream, 64, 48)
    CudaGraph.capture(stream, lambda: outputs.download(stream))
    assert machine.open() > before
    device.close()
    device.close()
    assert machine.open() == before
    assert device.held == 0
    assert machine.calls()[-1] == "cuDevicePrimaryCtxRelease"
    cuda_driver.cache_clear()


def test_a_replayed_frame_is_one_call(machine: Any, device: CudaDevice, stream: Stream) -> None:
    frames, outputs = FrameInput(device, PixelFormat.GRAY8, 64, 48), FrameOutputs(stream, 64, 48)

    def enqueue() -> None:
        frames.upload(stream)
        outputs.download(stream)

    with CudaGraph.capture(stream, enqueue) as graph:
        machine.forget()
        frames.write(np.ones((48, 64), np.uint8))
        graph.launch(stream)
        stream.synchronize()
        assert machine.calls() == ["cuGraphLaunch", "cuStreamSynchronize"]
    frames.close()
    outputs.close()


def test_mapped_memory_is_never_copied(machine: Any, device: CudaDevice, stream: Stream) -> None:
    frames = FrameInput(device, PixelFormat.BGR8, 64, 48, mapped=True)
    outputs = FrameOutputs(stream, 64, 48, mapped=True)
    machine.forget()
    frames.upload(stream)
    outputs.download(stream)
    assert machine.calls() == []
    frames.close()
    outputs.close()


def test_results_are_read_after_a_synchronization(device: CudaDevice, stream: Stream) -> None:
    """The software driver runs nothing before somebody waits for it, so that tests see a wait that is missing."""
    with DeviceBuffer(device, 16) as buffer, PinnedBuffer(device, 16) as host, Event(device) as event:
        stream.fill(buffer.address, 9, 16)
        stream.copy_to_host(host.address, buffer.address, 16)
        event.record(stream)
        assert not event.passed()
        assert (host.array((16,), np.uint8) == 0).all()
        event.synchronize()
        assert event.passed()
        assert (host.array((16,), np.uint8) == 9).all()


def test_a_gpu_that_stops_is_one_line(device: CudaDevice, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuStreamSynchronize=719")
    with pytest.raises(CudaError) as caught:
        stream.synchronize()
    assert str(caught.value).startswith(
        "cuStreamSynchronize failed: CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure). The GPU gave up"
    )
    assert caught.value.exit_code == 1


def test_an_allocation_ends_a_capture(device: CudaDevice, stream: Stream) -> None:
    with pytest.raises(CudaError, match=r"^cuMemAlloc "):
        CudaGraph.capture(stream, lambda: print(DeviceBuffer(device, 16)))
    with DeviceBuffer(device, 16):
        pass


@pytest.mark.parametrize("code", [200, 209, 218, 222])
def test_kernels_made_for_another_driver_are_made_again(
    device: CudaDevice, kernels: FrameKernels, cache: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    from espmedsam_edge.runtime.cuda import nvrtc

    compiled = []
    original = nvrtc.compile_kernels

    def compiling(*arguments: Any) -> bytes:
        monkeypatch.delenv("CUDA_MACHINE_FAIL")  # what this driver compiles it loads
        compiled.append(arguments[0].name)
        return original(*arguments)

    monkeypatch.setattr(nvrtc, "compile_kernels", compiling)
    monkeypatch.setenv("CUDA_MACHINE_FAIL", f"cuModuleLoadData={code}")
    KernelModule.load(device, kernel_source("preprocess"), cache).close()
    assert compiled == ["preprocess"]
    assert len(list(kernels_folder(cache).glob("preprocess-*"))) == 1


def test_a_module_that_no_memory_is_left_for_stays_in_the_cache(
    device: CudaDevice, kernels: FrameKernels, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuModuleLoadData=2")
    with pytest.raises(CudaError, match="cuModuleLoadData of preprocess for CPU as GPU failed: CUDA_ERROR_OUT_OF"):
        KernelModule.load(device, kernel_source("preprocess"), cache)
    assert list(kernels_folder(cache).glob("preprocess-*"))


def test_a_gpu_that_cannot_make_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuDevicePrimaryCtxRetain=2")
    with pytest.raises(CudaError, match="cuDevicePrimaryCtxRetain on CPU as GPU failed: CUDA_ERROR_OUT_OF_MEMORY"):
        CudaDevice.open()
