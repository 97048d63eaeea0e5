"""The device layer: memory, order, time, graphs, modules and errors, on a GPU."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import mask_from_logits, preprocess
from espmedsam_edge.imaging.overlay import OverlayStyle, draw_overlay
from espmedsam_edge.runtime.backends.frame_buffers import FrameInput, FrameOutputs
from espmedsam_edge.runtime.cuda import nvrtc
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.driver import CudaError
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer, PinnedBuffer
from espmedsam_edge.runtime.cuda.module import KernelModule
from espmedsam_edge.runtime.cuda.nvrtc import kernels_folder
from espmedsam_edge.runtime.cuda.stream import CudaGraph, Event, Stream
from espmedsam_edge.runtime.kernels.cu_sources import kernel_source
from espmedsam_edge.runtime.kernels.frame_view import PixelFormat
from espmedsam_edge.runtime.kernels.launch import FrameKernels

pytestmark = pytest.mark.gpu

STYLE = OverlayStyle((255, 200, 0))
SIZE = 64


def test_bytes_go_to_the_gpu_and_back(device: CudaDevice, stream: Stream) -> None:
    content = np.random.default_rng(1).integers(0, 256, 100_003, np.uint8)
    size = content.size
    with PinnedBuffer(device, size) as host, DeviceBuffer(device, size) as first, DeviceBuffer(device, size) as second:
        there = host.array(content.shape, np.uint8)
        there[:] = content
        stream.copy_to_device(first.address, host.address, size)
        stream.copy_on_device(second.address, first.address, size)
        stream.fill(second.address, 7, 10)
        stream.synchronize()
        there[:] = 0
        stream.copy_to_host(host.address, second.address, size)
        stream.synchronize()
        assert (there[:10] == 7).all()
        assert (there[10:] == content[10:]).all()


def test_memory_held_is_counted(device: CudaDevice) -> None:
    before = device.memory()
    with DeviceBuffer(device, 64 << 20) as buffer:
        during = device.memory()
        assert during.held - before.held == buffer.size
        assert during.free < before.free
    assert device.memory().held == before.held


def test_more_than_there_is_gives_one_line(device: CudaDevice) -> None:
    total = device.memory().total
    with pytest.raises(CudaError, match=r"^cuMemAlloc for \d+\.\d MB with \d+\.\d MB free on .+ failed: ") as caught:
        DeviceBuffer(device, total + (1 << 30))
    assert caught.value.out_of_memory
    assert "nvidia-smi" in caught.value.hint
    with DeviceBuffer(device, 1 << 20):
        pass  # the device is as good as before


def test_events_order_streams_and_measure(device: CudaDevice) -> None:
    first, second, written = Stream(device), Stream(device), Event(device)
    begin, end = Event(device, timing=True), Event(device, timing=True)
    host, buffer = PinnedBuffer(device, 8 << 20), DeviceBuffer(device, 8 << 20)
    begin.record(first)
    first.fill(buffer.address, 3, buffer.size)
    end.record(first)
    written.record(first)
    second.wait(written)
    second.copy_to_host(host.address, buffer.address, buffer.size)
    second.synchronize()
    assert (host.array((8 << 20,), np.uint8) == 3).all()
    assert written.passed()
    end.synchronize()
    assert 0 < end.seconds_since(begin) < 1
    for each in (first, second, written, begin, end, host, buffer):
        each.close()


def test_a_closed_resource_is_closed_once(device: CudaDevice) -> None:
    buffer = DeviceBuffer(device, 100)
    held = device.held
    buffer.close()
    buffer.close()
    assert buffer.closed
    assert device.held == held - 100


def test_another_thread_makes_the_context_current(device: CudaDevice) -> None:
    seen: list[BaseException | int] = []

    def work() -> None:
        try:
            device.make_current()
            with Stream(device) as own, DeviceBuffer(device, 16) as buffer:
                own.fill(buffer.address, 1, 16)
                own.synchronize()
                seen.append(buffer.size)
        except UserError as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [16]


class FramePath:
    """The frame's path with a copy in place of the engine: what a backend will capture."""

    def __init__(self, stream: Stream, kernels: FrameKernels, width: int, height: int, *, mapped: bool) -> None:
        device = stream.device
        self.kernels, self.stream = kernels, stream
        self.input = FrameInput(device, PixelFormat.BGR8, width, height, mapped=mapped)
        self.image = DeviceBuffer(device, 3 * SIZE * SIZE * 4)
        self.image_host = PinnedBuffer(device, self.image.size)
        self.logits = DeviceBuffer(device, 16 * 16 * 4)
        self.logits_host = PinnedBuffer(device, self.logits.size)
        self.outputs = FrameOutputs(stream, width, height, mapped=mapped)

    def enqueue(self) -> None:
        self.input.upload(self.stream)
        self.kernels.preprocess(self.stream, [self.input.view], self.image.address, SIZE, Normalization())
        self.stream.copy_to_host(self.image_host.address, self.image.address, self.image.size)
        self.stream.copy_to_device(self.logits.address, self.logits_host.address, self.logits.size)
        canvas = self.outputs.canvas(self.input.view, self.logits.address)
        self.kernels.postprocess(self.stream, [canvas], (16, 16), 0.5, STYLE)
        self.outputs.download(self.stream)

    def write(self, frame: NDArray[np.uint8], logits: NDArray[np.float32]) -> None:
        self.input.write(frame)
        self.logits_host.array((16, 16), np.float32)[:] = logits

    def check(self, frame: NDArray[np.uint8], logits: NDArray[np.float32]) -> None:
        image = self.image_host.array((1, 3, SIZE, SIZE), np.float32)
        level = 1 / (255 * 0.224)  # one level of 8 bits, at the smallest deviation: see kernel_checks
        assert np.abs(image - preprocess(frame, SIZE, Normalization())).max() <= 1.001 * level
        mask = mask_from_logits(logits, frame.shape[:2])
        assert (self.outputs.mask != mask).sum() <= 1e-4 * mask.size
        expected = draw_overlay(frame, np.ascontiguousarray(self.outputs.mask), STYLE)
        assert self.outputs.overlay is not None
        assert np.abs(self.outputs.overlay.astype(int) - expected).max() <= 1
        rows, columns = np.nonzero(self.outputs.mask)
        measured = self.outputs.measured
        assert measured.area == len(rows)
        if len(rows) == 0:
            assert measured.bounding_box is None
            assert measured.centroid is None
            return
        x, y = int(columns.min()), int(rows.min())
        assert measured.bounding_box == (x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1)
        assert measured.centroid == pytest.approx((columns.mean(), rows.mean()))

    def close(self) -> None:
        for part in (self.input, self.image, self.image_host, self.logits, self.logits_host, self.outputs):
            part.close()


def _frame(rng: np.random.Generator, width: int, height: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.normal(size=(16, 16)).astype(np.float32)


@pytest.mark.parametrize("mapped", [False, True], ids=["copied", "mapped"])
@pytest.mark.parametrize(("width", "height"), [(320, 200), (333, 77)])
def test_a_graph_replays_the_frames_path(
    stream: Stream, kernels: FrameKernels, width: int, height: int, mapped: bool
) -> None:
    rng = np.random.default_rng(5)
    path = FramePath(stream, kernels, width, height, mapped=mapped)
    with CudaGraph.capture(stream, path.enqueue) as graph:
        for turn in range(4):
            frame, logits = _frame(rng, width, height)
            if turn == 3:
                logits -= 10  # an empty mask after full ones
            path.write(frame, logits)
            graph.launch(stream)
            stream.synchronize()
            path.check(frame, logits)
    path.close()


def test_two_streams_work_side_by_side(device: CudaDevice, kernels: FrameKernels) -> None:
    rng = np.random.default_rng(6)
    with Stream(device) as one, Stream(device) as two:
        paths = [FramePath(one, kernels, 300, 200, mapped=False), FramePath(two, kernels, 150, 333, mapped=False)]
        graphs = [CudaGraph.capture(path.stream, path.enqueue) for path in paths]
        for _ in range(3):
            frames = [_frame(rng, path.outputs.width, path.outputs.height) for path in paths]
            for path, graph, frame in zip(paths, graphs, frames, strict=True):
                path.write(*frame)
                graph.launch(path.stream)
            for path, frame in zip(paths, frames, strict=True):
                path.stream.synchronize()
                path.check(*frame)
        for each in (*graphs, *paths):
            each.close()


def test_a_capture_that_fails_leaves_the_stream_usable(device: CudaDevice, stream: Stream) -> None:
    with pytest.raises(CudaError, match=r"^cu\w+ .*failed: "):
        CudaGraph.capture(stream, stream.synchronize)  # may not be captured
    with pytest.raises(ZeroDivisionError):
        CudaGraph.capture(stream, lambda: print(1 / 0))
    with DeviceBuffer(device, 16) as buffer:
        stream.fill(buffer.address, 1, 16)
        stream.synchronize()


def test_a_frame_of_another_size_or_type_is_refused(device: CudaDevice) -> None:
    frames = FrameInput(device, PixelFormat.BGR8, 64, 48)
    with pytest.raises(UserError, match=r"a BGR8 frame of uint8 \(48, 64, 3\) was agreed; got uint8 \(48, 65, 3\)"):
        frames.write(np.zeros((48, 65, 3), np.uint8))
    with pytest.raises(UserError, match="got uint16"):
        frames.write(np.zeros((48, 64, 3), np.uint16))  # type: ignore[arg-type]
    frames.close()
    with pytest.raises(UserError, match="NV12 frame of 63x48"):
        FrameInput(device, PixelFormat.NV12, 63, 48)


def test_kernels_are_compiled_once_and_kept(
    device: CudaDevice, kernels: FrameKernels, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = sorted(file.name for file in kernels_folder(cache).iterdir())
    assert [name.split("-")[0] for name in kept] == ["postprocess", "preprocess"]
    assert all(name.endswith(f"-{device.gpu.sm}.bin") for name in kept)

    def no_compiler(*_: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(nvrtc, "compile_kernels", no_compiler)
    FrameKernels.load(device, cache)


def test_a_damaged_file_in_the_cache_is_compiled_anew(device: CudaDevice, kernels: FrameKernels, cache: Path) -> None:
    file = next(kernels_folder(cache).glob("preprocess-*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    KernelModule.load(device, kernel_source("preprocess"), cache).close()
    assert len(file.read_bytes()) == len(whole)


def test_a_kernel_that_is_not_there(device: CudaDevice, kernels: FrameKernels, cache: Path, stream: Stream) -> None:
    from espmedsam_edge.runtime.kernels import parameters

    module = KernelModule.load(device, kernel_source("preprocess"), cache)
    with pytest.raises(CudaError, match="cuModuleGetFunction of nothing failed"):
        module.launch(stream, "nothing", (1, 1, 1), (1, 1, 1), parameters.Preprocess())
    module.close()


def test_memory_while_another_thread_captures_as_other_libraries_do(device: CudaDevice, stream: Stream) -> None:
    """ONNX Runtime and torch capture in the mode in which other threads are refused memory unless they opt out."""
    mode = device.driver.constant("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_GLOBAL")
    begun, allocated, ended = threading.Event(), threading.Event(), []

    def capture() -> None:
        device.driver.call("cuCtxSetCurrent", device._context)  # without what make_current does: as another library
        device.driver.call("cuStreamBeginCapture", stream.handle, mode)
        begun.set()
        allocated.wait(20)
        ended.append(device.driver.attempt("cuStreamEndCapture", stream.handle)[0])

    other = threading.Thread(target=capture)
    other.start()
    assert begun.wait(20)
    device.make_current()
    try:
        DeviceBuffer(device, 1024).close()
    finally:
        allocated.set()
        other.join()
    assert ended == [0]  # nor was that capture broken
