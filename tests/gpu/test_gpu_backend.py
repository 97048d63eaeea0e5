"""The TensorRT backend on a GPU, with a double in TensorRT's place: frames in, masks out; calls, limits, failures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_surface
from engine_double import SIZE, expected_logits, give_it_work
from gpu_memory import GpuMemory
from numpy.typing import NDArray
from test_gpu_arrays import DlpackArray, InterfaceArray
from toy_bundles import save_toy_bundle
from trt_fixtures import DOUBLE

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import mask_from_logits
from espmedsam_edge.imaging.overlay import OverlayStyle, draw_overlay
from espmedsam_edge.runtime.backends.backend import BackendUnavailable
from espmedsam_edge.runtime.backends.device_backend import DeviceBackend
from espmedsam_edge.runtime.backends.frame_graph import STAGES
from espmedsam_edge.runtime.backends.frame_graph_pool import KEPT_SHARE, KEPT_SIZES
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.driver import CudaDriver, CudaError
from espmedsam_edge.runtime.engines import cache as engine_cache
from espmedsam_edge.runtime.kernels.frame_view import FrameView, PixelFormat
from espmedsam_edge.runtime.kernels.launch import FrameKernels
from espmedsam_edge.runtime.segmentation import DeviceLost, Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter

pytestmark = pytest.mark.gpu

STYLE = OverlayStyle((255, 200, 0), notice="untrained")
LOST = [214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999]  # CUresult: nothing works after these
LEVEL = 1.001 / (255 * 0.224)  # the kernel may round a pixel the other way: see kernel_checks
Load = Callable[..., Segmenter]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return save_toy_bundle(tmp_path_factory.mktemp("bundles") / "toy.bundle", ("fundus", "colonoscopy"))


@pytest.fixture
def load(
    device: CudaDevice,
    kernels: FrameKernels,
    cache: Path,
    bundle: Bundle,
    double: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Load]:
    """Loads a segmenter on the double; closes it after the test."""
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(cache))
    monkeypatch.syspath_prepend(DOUBLE)
    opened: list[Segmenter] = []

    def make(release: str = "10.16.1.11", which: Bundle = bundle, **options: Any) -> Segmenter:
        give_it_work(monkeypatch, double(release=release).module, which.graph("fundus").batch)
        opened.append(Segmenter.load(which, options.pop("modality", "fundus"), backend="tensorrt", **options))
        return opened[-1]

    yield make
    for segmenter in opened:
        segmenter.close()


def frame_of(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def check(result: Segmentation, frame: NDArray[np.uint8]) -> None:
    np.testing.assert_allclose(result.logits, expected_logits(frame), atol=LEVEL, rtol=0)
    assert result.mask.shape == frame.shape[:2]
    assert (result.mask != mask_from_logits(result.logits, frame.shape[:2])).sum() <= 1e-4 * result.mask.size
    again = Segmentation(result.mask, result.modality, result.logits, result.threshold, result.timings)
    assert (result.area, result.bounding_box) == (again.area, again.bounding_box)
    assert result.centroid == pytest.approx(again.centroid)


@pytest.mark.parametrize("release", tensorrt_surface.RELEASES)
@pytest.mark.parametrize("size", [(64, 64), (1, 1), (77, 333), (200, 320)])
def test_a_frame_in_and_a_mask_out(
    load: Load,
    release: str,
    size: tuple[int, int],
    said: list[str],
) -> None:
    segmenter = load(release)
    for seed in range(3):
        frame = frame_of(*size, seed)
        check(segmenter.segment(frame), frame)
    assert segmenter.choice.backend.name == "tensorrt"
    assert segmenter.choice.backend.device.endswith(f", TensorRT {release}")
    for line in said:
        assert re.match(
            "Building the TensorRT engine of fundus fp32|fundus fp32: the engine in the cache is not used", line
        )


def test_running_an_engine_takes_no_more_than_the_lean_runtime_has(
    load: Load, double: Callable[..., Any], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The names in NVIDIA's tensorrt_lean_cu13_bindings, found as tools/tensorrt_surface.py finds others.
    lean = json.loads((Path(tensorrt_surface.__file__).parent / "tensorrt_lean.json").read_text())
    ((release, classes),) = lean.items()
    load(release).close()  # builds it into the cache
    module = double(release=release).module
    give_it_work(monkeypatch, module)
    for name, members in classes.items():
        monkeypatch.setitem(module.SURFACE["classes"], name, dict.fromkeys(members))
    for name in ("Builder", "OnnxParser", "INetworkDefinition", "EngineInspector"):
        monkeypatch.delattr(module, name)
    frame = frame_of(77, 333)
    with Segmenter.load(bundle, "fundus", backend="tensorrt") as segmenter:
        check(segmenter.segment(frame), frame)


def test_the_overlay_is_drawn_on_the_way_and_its_notice_after(load: Load) -> None:
    segmenter = load(overlay=STYLE)
    frame = frame_of(120, 160)
    result = segmenter.segment(frame)
    assert result.drawn is not None
    overlay = result.overlay(frame, STYLE)
    expected = draw_overlay(frame, result.mask, STYLE)
    assert np.abs(overlay.astype(int) - expected).max() <= 1
    assert (result.drawn.image != overlay).any()  # the notice went to a copy
    other = OverlayStyle((1, 2, 3))
    np.testing.assert_array_equal(result.overlay(frame, other), draw_overlay(frame, result.mask, other))


def test_results_own_their_memory(load: Load) -> None:
    segmenter = load(overlay=STYLE)
    first = segmenter.segment(frame_of(48, 50))
    assert first.drawn is not None
    kept = first.mask.copy(), first.logits.copy(), first.drawn.image.copy()
    segmenter.segment(frame_of(48, 50, seed=1))
    segmenter.close()
    for now, then in zip((first.mask, first.logits, first.drawn.image), kept, strict=True):
        np.testing.assert_array_equal(now, then)


def test_views_of_arrays_are_taken(load: Load) -> None:
    segmenter = load()
    frame = frame_of(90, 130)
    for view in (frame[:, ::-1], frame[::2, 10:74], frame[..., ::-1]):
        check(segmenter.segment(view), np.ascontiguousarray(view))


def test_a_batch_of_mixed_sizes_and_a_group_that_is_not_full(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "batch.plan"
    plan.write_bytes(b"plan")
    monkeypatch.setattr(
        engine_cache, "find_or_build", lambda *_, **__: SimpleNamespace(path=plan, read=plan.read_bytes)
    )
    segmenter = load(which=save_toy_bundle(tmp_path / "b", batch=3))
    frames = [frame_of(40 + 3 * index, 60 - index, index) for index in range(5)]
    results = segmenter.segment_batch(frames)
    assert len(results) == 5
    for frame, result in zip(frames, results, strict=True):
        check(result, frame)


def test_tensors_run_as_on_other_backends(load: Load) -> None:
    backend = load().choice.backend
    image = np.random.default_rng(1).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
    logits = backend.run(image)
    np.testing.assert_array_equal(logits[0, 0].ravel(), image[0, 0].ravel()[:256])
    backend.run(image + 1)
    np.testing.assert_array_equal(logits[0, 0].ravel(), image[0, 0].ravel()[:256])
    with pytest.raises(ValueError, match="run wants C-contiguous float32"):
        backend.run(image.astype(np.float64))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("integrated", "chosen", "mapped"),
    [("0", "", False), ("1", "", True), ("1", "copied", False), ("0", "mapped", True)],
)
def test_a_gpu_that_shares_the_memory_works_there_in_place(
    load: Load, machine: Any, monkeypatch: pytest.MonkeyPatch, integrated: str, chosen: str, mapped: bool
) -> None:
    monkeypatch.setenv("CUDA_MACHINE_INTEGRATED", integrated)
    monkeypatch.setenv("ESPMEDSAM_FRAME_MEMORY", chosen)
    segmenter = load(overlay=STYLE)
    assert segmenter.choice.backend.device.endswith("mapped frames") == mapped
    frames = [frame_of(90, 160, seed) for seed in range(5)]
    kept = segmenter.segment(frames[0])
    machine.forget()
    results = [kept, *(group.results()[0] for group in [segmenter.start([frame]) for frame in frames[1:]])]
    assert ("cuMemcpyHtoDAsync" not in machine.calls()) == mapped
    for frame, result in zip(frames, results, strict=True):  # each in memory of its own
        check(result, frame)
        assert np.abs(result.overlay(frame, STYLE).astype(int) - draw_overlay(frame, result.mask, STYLE)).max() <= 1
    assert segmenter.frame_backend is not None
    assert segmenter.frame_backend.stage_seconds([frames[0]], segmenter.frame_options)


def test_a_word_that_is_no_way_to_hold_frames(load: Load, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    load().close()
    monkeypatch.setenv("ESPMEDSAM_FRAME_MEMORY", "shared")
    with pytest.raises(UserError, match=r"ESPMEDSAM_FRAME_MEMORY is 'shared'\. Set it to mapped or copied"):
        Segmenter.load(bundle, "fundus")


def test_a_frame_that_another_library_holds_is_read_in_place(load: Load, memory: GpuMemory, machine: Any) -> None:
    segmenter = load(overlay=STYLE)
    for seed in range(3):
        frame = frame_of(72, 96, seed)
        address = memory.put(frame)  # another one each time
        for array in (InterfaceArray(address, frame.shape), DlpackArray(address, frame.shape)):
            machine.forget()
            result = segmenter.segment(array)
            check(result, frame)
            assert np.abs(result.overlay(frame, STYLE).astype(int) - draw_overlay(frame, result.mask, STYLE)).max() <= 1
            if seed:
                assert "cuMemcpyHtoDAsync" not in machine.calls()
                assert "cuMemAlloc" not in machine.calls()
                assert machine.calls().count("cuGraphLaunch") == 1  # the engine


def test_an_nv12_view_of_a_decoder(load: Load, memory: GpuMemory) -> None:
    import cv2

    frame = cv2.GaussianBlur(frame_of(48, 64), (0, 0), 3)
    yuv = cv2.cvtColor(frame, cv2.COLOR_BGR2YUV_I420)
    nv12 = np.vstack([yuv[:48], yuv[48:].reshape(2, -1).T.reshape(24, 64)])
    address = memory.put(nv12)
    result = load().segment(FrameView(PixelFormat.NV12, 64, 48, address, 64, address + 64 * 48, 64))
    check(result, cv2.cvtColor(nv12, cv2.COLOR_YUV2BGR_NV12))


def test_a_frame_of_a_known_size_is_one_graph_between_copies(load: Load, machine: Any) -> None:
    segmenter = load(overlay=STYLE)
    machine.forget()
    segmenter.segment(frame_of(50, 60))
    path = ["cuLaunchKernel", "cuMemcpyDtoDAsync", "cuLaunchKernel"]  # the double's engine is a copy
    calls = [call for call in machine.calls() if call != "cuModuleGetFunction"]
    frame = ["cuMemcpyHtoDAsync", "cuGraphLaunch", "cuMemcpyDtoHAsync", "cuMemcpyDtoHAsync", "cuStreamSynchronize"]
    assert calls[calls.index("cuLaunchKernel") :] == [
        *path, "cuStreamSynchronize",  # warm-up
        "cuStreamBeginCapture", *path, "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy",
        *frame,  # the frame; results and logits
    ]  # fmt: skip
    machine.forget()
    segmenter.segment(frame_of(50, 60, seed=1))
    assert machine.calls() == ["cuCtxSetCurrent", *frame]


@pytest.fixture
def pins(machine: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the software driver pin memory that exists (which needs nothing of it); lists these calls."""
    calls: list[str] = []
    original = CudaDriver.call

    def call(self: CudaDriver, name: str, *arguments: Any, about: str = "") -> Any:
        if name in ("cuMemHostRegister", "cuMemHostUnregister"):
            calls.append(name)
            return None
        return original(self, name, *arguments, about=about)

    monkeypatch.setattr(CudaDriver, "call", call)
    return calls


def test_results_are_handed_out_in_the_memory_they_were_copied_to(load: Load, pins: list[str]) -> None:
    segmenter = load(overlay=STYLE)
    frames = [frame_of(90, 160, seed) for seed in range(4)]
    kept = [segmenter.segment(frame) for frame in frames]
    for frame, result in zip(frames, kept, strict=True):
        check(result, frame)
        assert np.abs(result.overlay(frame, STYLE).astype(int) - draw_overlay(frame, result.mask, STYLE)).max() <= 1
    assert pins == ["cuMemHostRegister"] * 4
    part = kept[0].mask[10:20, ::2]  # a view holds it as well as the mask does
    before = part.copy()
    del kept, result
    for seed in range(6):
        check(segmenter.segment(frame_of(90, 160, 9 + seed)), frame_of(90, 160, 9 + seed))
    assert len(pins) == 4  # three were free again
    np.testing.assert_array_equal(part, before)
    segmenter.close()
    np.testing.assert_array_equal(part, before)
    assert pins.count("cuMemHostUnregister") == 4


def test_more_than_the_limit_is_copied(load: Load, pins: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = load()
    backend = segmenter.choice.backend
    assert isinstance(backend, DeviceBackend)
    monkeypatch.setattr(backend._machine.pool, "_limit", 85_000)
    frames = [frame_of(160, 160, seed) for seed in range(5)]
    results = [segmenter.segment(frame) for frame in frames]
    for frame, result in zip(frames, results, strict=True):
        check(result, frame)
    assert len(pins) == 3
    del results, result
    segmenter.segment(frame_of(160, 176))  # another size: idle memory makes room
    assert pins[3:] == ["cuMemHostUnregister", "cuMemHostRegister"]


def test_sizes_are_kept_by_their_last_use(load: Load, machine: Any) -> None:
    segmenter = load()
    sizes = [(40 + index, 60) for index in range(KEPT_SIZES)]

    def captures(size: tuple[int, int]) -> int:
        machine.forget()
        frame = frame_of(*size)
        check(segmenter.segment(frame), frame)
        return int(machine.calls().count("cuStreamBeginCapture"))

    assert [captures(size) for size in sizes] == [1] * KEPT_SIZES
    opened = machine.open()
    assert captures(sizes[0]) == 0  # now the latest; sizes[1] is the oldest
    assert captures((99, 60)) == 1
    assert machine.open() == opened  # what one size takes was freed for the other
    assert captures(sizes[0]) == 0
    assert captures(sizes[1]) == 1


def test_sizes_are_kept_within_a_share_of_the_memory(load: Load, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probing = load(overlay=STYLE)
    graphs = probing.choice.backend._graphs  # type: ignore[attr-defined]
    probing.segment(frame_of(200, 320))
    each = next(iter(graphs._sized.values())).size
    assert each >= 7 * 200 * 320
    use = probing.choice.backend.device_use()  # type: ignore[attr-defined]
    probing.close()
    monkeypatch.setenv("CUDA_MACHINE_MEMORY", str(use.total - use.free + int(2.5 * KEPT_SHARE * each)))
    segmenter = load(overlay=STYLE)
    kept = segmenter.choice.backend._graphs._sized  # type: ignore[attr-defined]
    heights = []
    for height in (200, 198, 196, 198, 200, 400):  # the last alone takes nearly all
        frame = frame_of(height, 320)
        check(segmenter.segment(frame), frame)
        heights.append([key.sizes[0][1] for key in kept])
    assert heights == [[200], [200, 198], [198, 196], [196, 198], [198, 200], [400]]
    large = frame_of(700, 320)  # more than the share: kept while it is used
    for group in [segmenter.start([large]) for _ in range(2)]:
        check(group.results()[0], large)
    assert [key.sizes[0][1] for key in kept] == [700]
    assert sum(sized.size for sized in kept.values()) > 2.5 * each


def test_infer_ends_with_what_the_gpus_memory_was_used_for(
    load: Load, bundle: Bundle, device: CudaDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import cv2

    load().close()  # the double is in TensorRT's place
    picture = tmp_path / "a.png"
    cv2.imwrite(str(picture), frame_of(50, 60))
    arguments = [bundle.path, picture, "--modality", "fundus", "--backend", "tensorrt", "--masks", tmp_path / "masks"]
    with pytest.raises(SystemExit) as ended:
        main(["infer", *(str(argument) for argument in arguments)])
    written = capsys.readouterr()
    assert ended.value.code in (0, None), written.err
    total = f"{device.memory().total / 1e9:.1f}"
    line = rf"^GPU memory: \d+ MB for the engine, \d+ MB for frames; \d+\.\d of {re.escape(total)} GB free$"
    assert re.search(line, written.out, re.M)


def test_stages_are_measured_by_events(load: Load) -> None:
    segmenter = load(overlay=STYLE)
    backend = segmenter.frame_backend
    assert backend is not None
    seconds = backend.stage_seconds([frame_of(50, 60)], segmenter.frame_options)
    assert tuple(seconds) == STAGES
    assert all(value >= 0 for value in seconds.values())


def test_modalities_share_a_gpu_each_on_its_stream(load: Load) -> None:
    first, second = load(), load(modality="colonoscopy")
    for seed in range(3):
        for segmenter in (first, second):
            frame = frame_of(50, 70 + seed, seed)
            check(segmenter.segment(frame), frame)
    first.close()
    frame = frame_of(50, 60)
    check(second.segment(frame), frame)


def test_closing_frees_everything(load: Load, machine: Any, device: CudaDevice) -> None:
    before = machine.open()
    segmenter = load(overlay=STYLE)
    backend = segmenter.choice.backend
    assert isinstance(backend, DeviceBackend)
    segmenter.segment(frame_of(50, 60))
    use = backend.device_use()
    assert 0 < use.buffers <= use.total
    assert "for the engine" in str(use)
    assert machine.open() > before
    segmenter.close()
    backend.close()
    assert machine.open() == before


def test_a_frame_too_large_for_the_memory_says_what_fits(
    load: Load, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = load(overlay=STYLE)
    backend = segmenter.choice.backend
    assert isinstance(backend, DeviceBackend)
    small = frame_of(50, 60)
    check(segmenter.segment(small), small)
    used = backend.device_use()
    monkeypatch.setenv("CUDA_MACHINE_MEMORY", str(used.total - used.free + 1_000_000))
    with pytest.raises(UserError, match=r"a frame of 1200x600 pixels needs 5\.0 MB .* 1\.\d MB are free on ") as caught:
        segmenter.segment(frame_of(600, 1200))
    fits = caught.value.hint
    assert fits.startswith("Frames up to about 5")
    assert "--backend onnxruntime" in fits
    opened = machine.open()
    check(segmenter.segment(small), small)  # given up for the large one, and made again
    assert machine.open() > opened


def test_other_sizes_make_room(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = load()
    backend = segmenter.choice.backend
    assert isinstance(backend, DeviceBackend)
    segmenter.segment(frame_of(300, 400))
    used = backend.device_use()
    monkeypatch.setenv("CUDA_MACHINE_MEMORY", str(used.total - used.free + 100_000))
    frame = frame_of(310, 390)
    check(segmenter.segment(frame), frame)


@pytest.mark.parametrize("code", LOST)
def test_a_gpu_that_is_lost_stays_lost(load: Load, machine: Any, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    segmenter = load()
    segmenter.segment(frame_of(50, 60))
    monkeypatch.setenv("CUDA_MACHINE_FAIL", f"cuStreamSynchronize={code}")
    with pytest.raises(DeviceLost, match=r"cuStreamSynchronize failed: .* Start it again"):
        segmenter.segment(frame_of(50, 60))
    machine.forget()
    with pytest.raises(DeviceLost, match=r"cuStreamSynchronize failed: .* Start it again"):
        segmenter.segment(frame_of(50, 60))
    assert machine.calls() == []
    monkeypatch.setenv("CUDA_MACHINE_FAIL", f"cuMemFree={code}")
    segmenter.close()
    monkeypatch.delenv("CUDA_MACHINE_FAIL")


def test_tensorrt_that_does_not_run_says_why(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from espmedsam_edge.runtime.engines import tensorrt_api

    segmenter = load()
    context = tensorrt_api.load("tensorrt").module.IExecutionContext
    monkeypatch.setattr(context, "execute_async_v3", lambda self, stream_handle: False)
    with pytest.raises(UserError, match=r"TensorRT 10\.16\.1\.11 did not run .*\.plan: it gave no reason"):
        segmenter.segment(frame_of(50, 60))


@pytest.mark.parametrize("code", LOST)
def test_a_gpu_that_tensorrt_finds_lost_is_lost(
    load: Load, machine: Any, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    from espmedsam_edge.runtime.engines import tensorrt_api

    monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuStreamBeginCapture=900")
    segmenter = load()
    segmenter.segment(frame_of(50, 60))
    context = tensorrt_api.load("tensorrt").module.IExecutionContext
    monkeypatch.setattr(context, "execute_async_v3", lambda self, stream_handle: False)
    monkeypatch.setenv("CUDA_MACHINE_FAIL", f"cuStreamQuery={code}")
    with pytest.raises(DeviceLost, match=r"cuStreamQuery failed: .* Start it again") as caught:
        segmenter.segment(frame_of(50, 60))
    assert isinstance(caught.value.__cause__, CudaError)
    assert caught.value.__cause__.code == code
    machine.forget()
    with pytest.raises(DeviceLost, match="Start it again"):
        segmenter.segment(frame_of(50, 60))
    assert machine.calls() == []


def test_without_capture_it_runs_all_the_same(
    load: Load,
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuStreamBeginCapture=900")
    segmenter = load()
    assert any("cannot be captured into a CUDA graph (cuStreamBeginCapture failed" in line for line in said)
    for seed in range(2):
        frame = frame_of(50, 60, seed)
        check(segmenter.segment(frame), frame)
    assert "cuGraphLaunch" not in machine.calls()[-20:]


def _refused(monkeypatch: pytest.MonkeyPatch, module: Any, message: str) -> None:
    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> None:
            self.logger.log(module.ILogger.Severity.ERROR, message)

    monkeypatch.setattr(module, "Runtime", Runtime)


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("[checkMacros.cpp] CUDA initialization failure with error: 35", "driver is too old for this TensorRT"),
        ("Cuda Runtime (out of memory)", "are free on"),
        ("Serialization assertion failed", "build --force"),
    ],
)
def test_an_engine_that_does_not_load(
    load: Load, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, said: str, hint: str, machine: Any
) -> None:
    from espmedsam_edge.runtime.engines import tensorrt_api

    load().close()  # the engine is in the cache now
    before = machine.open()
    _refused(monkeypatch, tensorrt_api.load("tensorrt").module, said)
    with pytest.raises(BackendUnavailable, match=r"cannot load .*plan") as caught:
        Segmenter.load(bundle, "fundus", backend="tensorrt")
    assert hint in caught.value.hint
    assert machine.open() == before
    with Segmenter.load(bundle, "fundus") as segmenter:
        assert segmenter.choice.backend.name == "onnxruntime"
        assert "not tensorrt: TensorRT 10.16.1.11 cannot load" in str(segmenter.choice)
        frame = frame_of(50, 60)
        with pytest.raises(UserError, match="takes frames in the host's memory alone"):
            segmenter.segment(InterfaceArray(4096, frame.shape))
