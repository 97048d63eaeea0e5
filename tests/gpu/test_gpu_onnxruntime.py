"""ONNX Runtime's CUDA provider on the frames' path: with a double in its session's place, and on a GPU for real."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_feeds import EndlessFeed
from test_gpu_backend import bundle, check, frame_of
from test_gpu_limits import Written

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import OverlayStyle, draw_overlay
from espmedsam_edge.runtime.backends import onnxruntime_cuda_backend as cuda_backend
from espmedsam_edge.runtime.backends.backend import BackendUnavailable, load_backend
from espmedsam_edge.runtime.backends.device_backend import DeviceBackend
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.driver import CudaUnavailable, cuda_driver
from espmedsam_edge.runtime.kernels.launch import FrameKernels
from espmedsam_edge.runtime.onnx_session import open_session
from espmedsam_edge.runtime.run.jobs import Job, Limits
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sources.live import BackOff, LiveSource

__all__ = ["bundle"]  # a fixture

pytestmark = pytest.mark.gpu

STYLE = OverlayStyle((0, 200, 255))


class SessionDouble:
    """A session on a GPU: its run copies the start of each image to its logits, on the stream that it was given."""

    def __init__(self, content: bytes, options: Mapping[str, str]) -> None:
        self.options = dict(options)
        self.bound: dict[str, tuple[Any, ...]] = {}
        self.threads: list[int] = []
        self.failing: Callable[[], bool] = lambda: False
        self._true = open_session(content, 1)
        self.get_inputs, self.get_outputs = self._true.get_inputs, self._true.get_outputs
        self.providers = [cuda_backend.CUDA, "CPUExecutionProvider"]

    def get_providers(self) -> list[str]:
        return self.providers

    def io_binding(self) -> SessionDouble:
        return self

    def bind_input(self, name: str, *bound: Any) -> None:
        self.bound[name] = bound

    def bind_output(self, name: str, *bound: Any) -> None:
        self.bound[name] = bound

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self.threads.append(threading.get_ident())
        if self.failing():
            raise RuntimeError("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED\nat conv.cc:12")
        (*_, (batch, *_), source), (*_, shape, target) = self.bound["image"], self.bound["logits"]
        size = 4 * int(np.prod(shape[1:]))
        row = 4 * int(np.prod(self.bound["image"][-2][1:]))
        driver = cuda_driver()
        stream = driver.handle("CUstream", int(self.options["user_compute_stream"]))
        for number in range(batch):
            driver.call("cuMemcpyDtoDAsync", target + number * size, source + number * row, size, stream)


def camera(name: str) -> LiveSource:
    return LiveSource(EndlessFeed(), f"test://{name}", name, BackOff(first=0.001, longest=0.002))


@pytest.fixture
def sessions(machine: Any, cache: Path, kernels: FrameKernels, monkeypatch: pytest.MonkeyPatch) -> list[SessionDouble]:
    """The double in place of ONNX Runtime with CUDA: the sessions that were opened, in order."""
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(cache))
    monkeypatch.setattr(cuda_backend, "available_providers", lambda: [cuda_backend.CUDA])
    opened: list[SessionDouble] = []

    def open_double(content: bytes, threads: int, *, options: Mapping[str, str], **_: Any) -> SessionDouble:
        opened.append(SessionDouble(content, options))
        return opened[-1]

    monkeypatch.setattr(cuda_backend, "open_session", open_double)
    return opened


@pytest.fixture
def segmenter(sessions: list[SessionDouble], bundle: Bundle, device: CudaDevice) -> Iterator[Segmenter]:
    with Segmenter.load(bundle, "fundus", backend="onnxruntime-cuda", overlay=STYLE) as opened:
        yield opened


def test_frames_masks_and_overlays(segmenter: Segmenter, sessions: list[SessionDouble], device: CudaDevice) -> None:
    assert segmenter.choice.taken.startswith(f"onnxruntime-cuda ({device.gpu.name}, ONNX Runtime ")
    assert segmenter.choice.taken.endswith("its CUDA graph)")
    (session,) = sessions
    assert session.options["enable_cuda_graph"] == "1"
    assert session.options["use_tf32"] == "0"
    for seed, size in enumerate([(64, 64), (77, 333), (200, 320)]):
        frame = frame_of(*size, seed)
        result = segmenter.segment(frame)
        check(result, frame)
        assert np.abs(result.overlay(frame, STYLE).astype(int) - draw_overlay(frame, result.mask, STYLE)).max() <= 1


def test_the_layout_of_convolutions_can_be_named(sessions: list[SessionDouble], bundle: Bundle) -> None:
    for name, asked in (("onnxruntime-cuda", None), ("onnxruntime-cuda:nhwc", "1")):
        with Segmenter.load(bundle, "fundus", backend=name) as segmenter:
            assert segmenter.choice.backend.name == name
            assert sessions[-1].options.get("prefer_nhwc") == asked
    with pytest.raises(UserError, match="unknown layout 'nchw'"):
        Segmenter.load(bundle, "fundus", backend="onnxruntime-cuda:nchw")


def test_nothing_goes_through_the_host_and_nothing_is_captured(segmenter: Segmenter, machine: Any) -> None:
    segmenter.segment(frame_of(50, 60))
    machine.forget()
    segmenter.segment(frame_of(50, 60, 1))
    calls = [call for call in machine.calls() if call.startswith(("cuMemcpy", "cuLaunch", "cuGraph", "cuStreamBegin"))]
    results, logits = "cuMemcpyDtoHAsync", "cuMemcpyDtoHAsync"
    assert [call.removesuffix("_v2") for call in calls] == [
        "cuMemcpyHtoDAsync", "cuLaunchKernel", "cuMemcpyDtoDAsync", "cuLaunchKernel", results, logits,
    ]  # fmt: skip


def test_groups_overlap_and_all_its_runs_are_in_one_thread(segmenter: Segmenter, sessions: list[SessionDouble]) -> None:
    frames = [frame_of(60, 80, seed) for seed in range(7)]
    for frame, group in [(frame, segmenter.start([frame])) for frame in frames]:
        check(group.results()[0], frame)
    elsewhere = threading.Thread(target=lambda: check(segmenter.segment(frames[0]), frames[0]))
    elsewhere.start()
    elsewhere.join()
    (session,) = sessions
    assert len(session.threads) > 8
    assert set(session.threads).isdisjoint({threading.get_ident(), elsewhere.ident})
    assert len(set(session.threads)) == 1


def test_a_graph_that_cannot_be_captured_runs_without(
    sessions: list[SessionDouble], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = cuda_backend.open_session

    def refuse_graphs(content: bytes, threads: int, **more: Any) -> Any:
        if "enable_cuda_graph" in more["options"]:
            raise UserError("onnxruntime cannot load it: not all nodes are on the CUDA provider")
        return opening(content, threads, **more)

    monkeypatch.setattr(cuda_backend, "open_session", refuse_graphs)
    with Segmenter.load(bundle, "fundus", backend="onnxruntime-cuda") as segmenter:
        assert "its CUDA graph" not in segmenter.choice.taken
        check(segmenter.segment(frame_of(70, 90)), frame_of(70, 90))
    assert [session.options.get("enable_cuda_graph") for session in sessions] == [None]


def test_a_capture_that_fails_half_way_is_ended_before_the_next_attempt(
    sessions: list[SessionDouble], bundle: Bundle, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime does: it begins a capture on our stream, an allocation breaks it, and nobody ends it."""
    run = SessionDouble.run_with_iobinding

    def broken(self: SessionDouble, binding: Any, options: Any) -> None:
        if "enable_cuda_graph" in self.options:
            driver = cuda_driver()
            stream = driver.handle("CUstream", int(self.options["user_compute_stream"]))
            mode = driver.constant("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_GLOBAL")
            driver.call("cuStreamBeginCapture", stream, mode)
            raise RuntimeError("CUDA failure 2: out of memory")
        run(self, binding, options)

    monkeypatch.setattr(SessionDouble, "run_with_iobinding", broken)
    opened = machine.open()
    with Segmenter.load(bundle, "fundus", backend="onnxruntime-cuda") as segmenter:
        assert "its CUDA graph" not in segmenter.choice.taken
        check(segmenter.segment(frame_of(70, 90)), frame_of(70, 90))
    assert machine.open() == opened


def test_without_what_compiles_the_kernels_the_network_alone_runs_there(
    sessions: list[SessionDouble], bundle: Bundle, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def missing(*_: object) -> None:
        raise CudaUnavailable("NVRTC, which compiles the kernels, is not installed.", "pip install nvidia-cuda-nvrtc")

    opening = cuda_backend.open_session

    def open_any(content: bytes, threads: int, **more: Any) -> Any:
        if "user_compute_stream" in more["options"]:
            return opening(content, threads, **more)
        session = open_session(content, 1)
        session.get_providers = lambda: [cuda_backend.CUDA]
        return session

    monkeypatch.setattr(FrameKernels, "load", missing)
    monkeypatch.setattr(cuda_backend, "open_session", open_any)
    with (
        Segmenter.load(bundle, "fundus", backend="onnxruntime-cuda") as segmenter,
        Segmenter.load(bundle, "fundus", backend="onnxruntime-cpu") as reference,
    ):
        assert segmenter.choice.taken == "onnxruntime-cuda (CUDA)"
        frame = frame_of(70, 90)
        np.testing.assert_array_equal(segmenter.segment(frame).mask, reference.segment(frame).mask)
    assert any("which takes longer: NVRTC, which compiles the kernels, is not installed." in line for line in said)


def test_all_is_freed_with_the_segmenter_and_where_loading_fails(
    sessions: list[SessionDouble], bundle: Bundle, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, threads = machine.open(), threading.active_count()
    segmenter = Segmenter.load(bundle, "fundus", backend="onnxruntime-cuda")
    segmenter.segment(frame_of(40, 40))
    segmenter.close()
    assert (machine.open(), threading.active_count()) == (before, threads)
    monkeypatch.setattr(SessionDouble, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailable, match=r"CUDA provider did not start: .*\.so"):
        load_backend(bundle, bundle.graph("fundus"), "onnxruntime-cuda")
    assert (machine.open(), threading.active_count()) == (before, threads)


@pytest.mark.parametrize("said", ["CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version"])
def test_a_driver_too_old_for_its_libraries(
    sessions: list[SessionDouble], bundle: Bundle, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UserError(f"onnxruntime cannot load it: {said}", "Export the bundle again.")

    monkeypatch.setattr(cuda_backend, "open_session", refuse)
    with pytest.raises(BackendUnavailable, match=r"driver is too old for this ONNX Runtime: update the driver") as told:
        load_backend(bundle, bundle.graph("fundus"), "onnxruntime-cuda")
    assert "\n" not in str(told.value)


def test_a_run_that_fails_is_one_line_and_the_next_one_works(
    segmenter: Segmenter, sessions: list[SessionDouble]
) -> None:
    frame = frame_of(50, 60)
    check(segmenter.segment(frame), frame)
    failing = iter([True, False])
    sessions[0].failing = lambda: next(failing, False)
    with pytest.raises(UserError, match="onnxruntime failed on the fundus fp32 graph: CUDNN failure 5000") as told:
        segmenter.segment(frame)
    assert "\n" not in str(told.value)
    check(segmenter.segment(frame), frame)


def test_an_engine_that_fails_on_one_stream_while_others_run(
    segmenter: Segmenter, sessions: list[SessionDouble]
) -> None:
    """Of two cameras and a broken one between them, that one ends with a line, and the others have all their frames."""
    calls, lock = [0], threading.Lock()

    def third() -> bool:
        with lock:
            calls[0] += 1
            return calls[0] == 4

    sessions[0].failing = third
    sinks = [Written() for _ in range(3)]
    jobs = [Job(camera(name), [sink]) for name, sink in zip("abc", sinks, strict=True)]
    report = run_pipeline(segmenter, jobs, limits=Limits(frames=6))
    (failure,) = report.failures
    assert "CUDNN failure 5000" in failure.message
    assert sorted(len(sink.numbers) == 6 for sink in sinks) == [False, True, True]
    assert sorted(bool(sink.finished) for sink in sinks) == [False, True, True]


def test_an_engine_that_fails_on_and_on_ends_the_run(segmenter: Segmenter, sessions: list[SessionDouble]) -> None:
    sessions[0].failing = lambda: True
    jobs = [Job(camera(name), [Written()]) for name in "abcd"]
    with pytest.raises(UserError, match="CUDNN failure 5000"):
        run_pipeline(segmenter, jobs, limits=Limits(frames=6))


def test_on_a_real_gpu(real_gpu: None, bundle: Bundle) -> None:
    reason = cuda_backend.unavailable("onnxruntime-cuda")
    if reason is not None:
        pytest.skip(reason)
    with (
        Segmenter.load(bundle, "fundus", backend="onnxruntime-cuda") as segmenter,
        Segmenter.load(bundle, "fundus", backend="onnxruntime-cpu") as reference,
    ):
        assert isinstance(segmenter.choice.backend, DeviceBackend)
        frames = [frame_of(120, 160, seed) for seed in range(8)]
        groups = [segmenter.start([frame]) for frame in frames]
        for frame, group in zip(frames, groups, strict=True):
            assert (group.results()[0].mask == reference.segment(frame).mask).mean() > 0.999
