"""Several frames under way at once: order, overlap, limits and failures, on the TensorRT backend with its double."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from gpu_memory import GpuMemory
from numpy.typing import NDArray
from scripted_feeds import EndlessFeed
from test_gpu_arrays import InterfaceArray
from test_gpu_backend import LOST, STYLE, Load, bundle, check, frame_of, load, pins
from toy_bundles import save_toy_bundle

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import draw_overlay
from espmedsam_edge.runtime.backends.backend import BackendUnavailable
from espmedsam_edge.runtime.backends.device_backend import DeviceBackend
from espmedsam_edge.runtime.backends.frame_graph_pool import IN_FLIGHT, KEPT_SIZES
from espmedsam_edge.runtime.engines import cache as engine_cache
from espmedsam_edge.runtime.engines import tensorrt_api
from espmedsam_edge.runtime.run.jobs import Job, Limits
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmentation import DeviceLost, Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sources.live import BackOff, LiveSource
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

__all__ = ["bundle", "load", "pins"]  # fixtures

pytestmark = pytest.mark.gpu

WAITS = {"cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize"}
ALLOCATES = {"cuMemAlloc", "cuMemHostAlloc", "cuMemFree", "cuMemFreeHost", "cuStreamCreate", "cuEventCreate"}


def warmed_up(segmenter: Segmenter, *sizes: tuple[int, int]) -> Segmenter:
    """All graphs of these sizes are made."""
    for size in sizes:
        for group in [segmenter.start([frame_of(*size)]) for _ in range(IN_FLIGHT)]:
            group.results()
    return segmenter


def backend_of(segmenter: Segmenter) -> DeviceBackend:
    backend = segmenter.choice.backend
    assert isinstance(backend, DeviceBackend)
    return backend


def test_results_belong_to_their_frames_in_any_order_of_asking(load: Load) -> None:
    segmenter = load(overlay=STYLE)
    assert segmenter.in_flight == IN_FLIGHT >= 2
    frames = [frame_of(90, 160, seed) for seed in range(3 * IN_FLIGHT)]
    groups = [segmenter.start([frame]) for frame in frames]  # more than overlap: the oldest are waited for
    for index in (4, 0, 8, 8, 1, 7, 2, 3, 6, 5):
        (result,) = groups[index].results()
        check(result, frames[index])
        expected = draw_overlay(frames[index], result.mask, STYLE)
        assert np.abs(result.overlay(frames[index], STYLE).astype(int) - expected).max() <= 1


def test_starting_a_frame_waits_for_nothing(load: Load, machine: Any) -> None:
    segmenter = warmed_up(load(overlay=STYLE), (50, 60))
    machine.forget()
    groups = [segmenter.start([frame_of(50, 60, seed)]) for seed in range(IN_FLIGHT)]
    started = machine.calls()
    assert not (WAITS | ALLOCATES) & set(started)
    assert started.count("cuGraphLaunch") == IN_FLIGHT  # each frame's computing is one call
    assert "cuLaunchKernel" not in started
    for group in groups:
        machine.forget()
        group.results()
        assert [call for call in machine.calls() if call in WAITS] == ["cuEventSynchronize"]
        assert "cuGraphLaunch" not in machine.calls()
    machine.forget()
    for group in groups:
        group.results()
    assert machine.calls() == []


def test_waiting_for_a_frame_leaves_the_next_ones_under_way(load: Load, machine: Any) -> None:
    segmenter = warmed_up(load(), (50, 60))
    frames = [frame_of(50, 60, seed) for seed in range(IN_FLIGHT)]
    groups = [segmenter.start([frame]) for frame in frames]
    (sized,) = backend_of(segmenter)._graphs._sized.values()
    lanes = [graph._lane for graph in sized.graphs]
    check(groups[0].results()[0], frames[0])
    done = [lane.downloaded.passed() for lane in lanes if lane is not None]
    assert done == [True] + [False] * (IN_FLIGHT - 1)  # the software driver runs what somebody waits for, no more
    check(groups[2].results()[0], frames[2])
    check(groups[1].results()[0], frames[1])


def test_times_of_overlapping_frames_do_not_count_twice(load: Load) -> None:
    import time

    segmenter = warmed_up(load(), (200, 300))
    began = time.perf_counter()
    groups = [segmenter.start([frame_of(200, 300, seed)]) for seed in range(IN_FLIGHT)]
    timings = [group.results()[0].timings for group in groups]
    assert sum(each.total for each in timings) <= time.perf_counter() - began
    assert all(each.inference > 0 for each in timings)


def test_frame_sizes_change_under_way(load: Load) -> None:
    segmenter = load()
    sizes = [(40 + 7 * (index % (KEPT_SIZES + 2)), 60 + index % 3) for index in range(24)]
    frames = [frame_of(*size, seed) for seed, size in enumerate(sizes)]
    for frame, group in [(frame, segmenter.start([frame])) for frame in frames]:
        check(group.results()[0], frame)


def test_waiting_ones_and_overlapping_ones_mix(load: Load) -> None:
    segmenter = load()
    frames = [frame_of(60, 80, seed) for seed in range(5)]
    first = segmenter.start([frames[0]]), segmenter.start([frames[1]])
    check(segmenter.segment(frames[2]), frames[2])
    image = np.random.default_rng(1).standard_normal((1, 3, 64, 64)).astype(np.float32)
    later = segmenter.start([frames[3]])
    np.testing.assert_array_equal(segmenter.choice.backend.run(image)[0, 0].ravel(), image[0, 0].ravel()[:256])
    assert segmenter.stage_seconds([frames[4]])
    for frame, group in zip([*frames[:2], frames[3]], [*first, later], strict=True):
        check(group.results()[0], frame)


def test_closing_keeps_what_was_started(load: Load, machine: Any) -> None:
    before = machine.open()
    segmenter = load()
    frames = [frame_of(60, 80, seed) for seed in range(2)]
    groups = [segmenter.start([frame]) for frame in frames]
    segmenter.close()
    assert machine.open() == before
    for frame, group in zip(frames, groups, strict=True):
        check(group.results()[0], frame)
    with pytest.raises(RuntimeError, match="closed"):
        segmenter.start([frames[0]])


def test_frames_on_the_gpu_overlap_too(load: Load, memory: GpuMemory) -> None:
    segmenter = load()
    frames = [frame_of(72, 96, seed) for seed in range(4)]
    groups = [segmenter.start([InterfaceArray(memory.put(frame), frame.shape)]) for frame in frames]
    for frame, group in zip(frames, groups, strict=True):
        check(group.results()[0], frame)


@pytest.fixture
def load_batch(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Segmenter]:
    """Loads a segmenter whose graph takes several frames."""
    plan = tmp_path / "batch.plan"
    plan.write_bytes(b"plan")
    monkeypatch.setattr(
        engine_cache, "find_or_build", lambda *_, **__: SimpleNamespace(path=plan, read=plan.read_bytes)
    )
    return lambda batch: load(which=save_toy_bundle(tmp_path / f"b{batch}", batch=batch))


def test_a_batch_of_several_cameras_needs_one_graph_in_any_order(
    load_batch: Callable[[int], Segmenter], machine: Any
) -> None:
    segmenter = load_batch(3)
    sizes = [(40, 60), (72, 64), (33, 90)]
    machine.forget()
    for seed in range(4):
        frames = [frame_of(*sizes[(row + seed) % 3], 3 * seed + row) for row in range(3)]
        results = segmenter.segment_batch(frames) if seed % 2 else segmenter.start(frames).results()
        for frame, result in zip(frames, results, strict=True):
            check(result, frame)
    assert machine.calls().count("cuStreamBeginCapture") == 1
    assert machine.calls().count("cuGraphLaunch") == 4
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"{wrong} frames for a graph with batch 3"):
            segmenter.start([frame_of(8, 8)] * wrong)


def test_groups_that_are_not_full_are_captured_once(load_batch: Callable[[int], Segmenter], machine: Any) -> None:
    segmenter = load_batch(5)
    machine.forget()
    for seed, count in enumerate([5, 3, 1, 4, 2, 5, 1, 2, 3, 4]):
        frames = [frame_of(40, 60, 10 * seed + row) for row in range(count)]
        for frame, result in zip(frames, segmenter.start(frames).results(), strict=True):
            check(result, frame)
    assert machine.calls().count("cuStreamBeginCapture") == 5


def test_without_memory_for_more_they_take_turns(load: Load, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = load()
    frames = [frame_of(300, 400, seed) for seed in range(5)]
    check(segmenter.start([frames[0]]).results()[0], frames[0])
    use = backend_of(segmenter).device_use()
    monkeypatch.setenv("CUDA_MACHINE_MEMORY", str(use.total - use.free + 100_000))
    for frame, group in [(frame, segmenter.start([frame])) for frame in frames]:
        check(group.results()[0], frame)
    (sized,) = backend_of(segmenter)._graphs._sized.values()
    assert len(sized.graphs) == 1


@pytest.mark.parametrize("code", LOST)
def test_a_gpu_that_is_lost_under_way(load: Load, machine: Any, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    segmenter = warmed_up(load(), (50, 60))
    kept = segmenter.start([frame_of(50, 60)])
    kept.results()
    groups = [segmenter.start([frame_of(50, 60, seed)]) for seed in range(IN_FLIGHT)]
    monkeypatch.setenv("CUDA_MACHINE_FAIL", f"cuEventSynchronize={code}")
    for group in groups:
        with pytest.raises(DeviceLost, match=r"cuEventSynchronize failed: .* Start it again"):
            group.results()
    machine.forget()
    with pytest.raises(DeviceLost, match=r"cuEventSynchronize failed: .* Start it again"):
        segmenter.start([frame_of(50, 60)])
    assert machine.calls() == []
    assert kept.results()[0].mask.shape == (50, 60)
    monkeypatch.setenv("CUDA_MACHINE_FAIL", f"cuMemFree={code}")
    segmenter.close()


def test_a_start_that_fails_leaves_the_others_alone(load: Load, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuStreamBeginCapture=900")
    segmenter = load()
    monkeypatch.delenv("CUDA_MACHINE_FAIL")
    context = tensorrt_api.load("tensorrt").module.IExecutionContext
    works = context.execute_async_v3
    frames = [frame_of(50, 60, seed) for seed in range(4)]
    first = segmenter.start([frames[0]])
    monkeypatch.setattr(context, "execute_async_v3", lambda self, stream_handle: False)
    for _ in range(2 * IN_FLIGHT):
        with pytest.raises(UserError, match="did not run"):
            segmenter.start([frames[1]])
    monkeypatch.setattr(context, "execute_async_v3", works)
    later = [segmenter.start([frame]) for frame in frames[2:]]
    for frame, group in zip([frames[0], *frames[2:]], [first, *later], strict=True):
        check(group.results()[0], frame)


class Clip:
    """A source of a few frames, of two sizes in turn after the fifth."""

    kind: Literal["images", "video"] = "video"

    def __init__(self, count: int) -> None:
        self.name, self.files, self.fps = "clip", [Path("clip")], Fraction(25)
        self.length: int | None = count
        self.live = False
        self.failures: list[Failure] = []

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def frame(self, index: int) -> NDArray[np.uint8]:
        return frame_of(*((50, 60) if index < 5 or index % 2 else (70, 40)), index)

    def __iter__(self) -> Iterator[SourceFrame]:
        for index in range(self.length or 0):
            yield SourceFrame(self.frame(index), Path("clip"), index, index / 25)


class Kept:
    """A sink that checks and counts."""

    def __init__(self, clip: Clip) -> None:
        self.clip, self.order = clip, list[int]()

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        check(result, self.clip.frame(frame.index))
        self.order.append(frame.index)


def test_the_pipeline_keeps_several_frames_under_way_and_their_order(
    load: Load, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espmedsam_edge.runtime.run import scheduler

    monkeypatch.setattr(scheduler, "NEXT_FRAME_SECONDS", 1.0)  # whatever the test's machine is busy with
    segmenter = warmed_up(load(), (50, 60), (70, 40))
    clip = Clip(20)
    sink = Kept(clip)
    machine.forget()
    report = run_pipeline(segmenter, [Job(clip, [sink])])
    assert (report.frames, report.failures) == (20, [])
    assert sink.order == list(range(20))
    started = waited = ahead = 0
    for call in machine.calls():
        started += call == "cuGraphLaunch"
        waited += call == "cuEventSynchronize"
        ahead = max(ahead, started - waited)
    assert (started, waited, ahead) == (20, 20, IN_FLIGHT)


def test_live_sources_and_a_file_share_the_gpu(load: Load, machine: Any) -> None:
    segmenter = warmed_up(load(), (16, 20), (50, 60), (70, 40))
    clip = Clip(12)
    kept = Kept(clip)
    seen: dict[str, list[int]] = {"a": [], "b": []}

    class Checked(Kept):
        def __init__(self, name: str) -> None:
            super().__init__(clip)
            self.name = name

        def write(self, frame: SourceFrame, result: Segmentation) -> None:
            check(result, frame.image)  # a result of another source's frame would differ
            seen[self.name].append(frame.index)

    quick = BackOff(first=0.001, longest=0.002)
    jobs = [Job(LiveSource(EndlessFeed(), f"test://{name}", name, quick), [Checked(name)]) for name in seen]
    machine.forget()
    report = run_pipeline(segmenter, [*jobs, Job(clip, [kept])], limits=Limits(frames=12))
    assert report.failures == []
    assert kept.order == list(range(12))
    for numbers in seen.values():
        assert len(numbers) == 12
        assert numbers == sorted(set(numbers))
    started = waited = ahead = 0
    for call in machine.calls():
        started += call == "cuGraphLaunch"
        waited += call == "cuEventSynchronize"
        ahead = max(ahead, started - waited)
    assert started == waited == 36
    assert 2 <= ahead <= IN_FLIGHT


def test_the_pipeline_ends_when_the_gpu_is_lost(load: Load, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = warmed_up(load(), (50, 60))
    monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuEventSynchronize=719")
    clip = Clip(200)
    with pytest.raises(DeviceLost, match="Start it again"):
        run_pipeline(segmenter, [Job(clip, [Kept(clip)])])
    monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuMemFree=719")
    segmenter.close()


@pytest.fixture
def load_auto(load: Load) -> Callable[..., Segmenter]:
    """As ``load``, with the backend chosen by itself."""

    def make(**options: Any) -> Segmenter:
        load().close()  # the engine is in the cache now
        return Segmenter.load(options.pop("which"), "fundus", **options)

    return make


def agree(result: Segmentation, frame: NDArray[np.uint8], expected: Segmenter) -> None:
    assert (result.mask == expected.segment(frame).mask).all()


@pytest.mark.parametrize("where", ["cuStreamSynchronize", "cuEventSynchronize", "cuMemcpyHtoDAsync"])
def test_a_gpu_lost_under_way_is_replaced_by_the_cpu_where_the_choice_was_ours(
    load_auto: Callable[..., Segmenter],
    bundle: Any,
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    said: list[str],
) -> None:
    segmenter = warmed_up(load_auto(which=bundle, overlay=STYLE), (50, 60))
    with Segmenter.load(bundle, "fundus", backend="onnxruntime-cpu") as cpu:
        assert segmenter.choice.backend.name == "tensorrt"
        frames = [frame_of(50, 60, seed) for seed in range(IN_FLIGHT + 2)]
        groups = [segmenter.start([frame]) for frame in frames[:2]]
        monkeypatch.setenv("CUDA_MACHINE_FAIL", f"{where}=719")
        if where == "cuStreamSynchronize":
            agree(segmenter.segment(frames[2]), frames[2], cpu)
            monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuEventSynchronize=719")
        else:
            groups += [segmenter.start([frame]) for frame in frames[2:]]
        for frame, group in zip(frames, groups, strict=False):
            result = group.results()[0]
            if result.drawn is None:  # those that the GPU had done keep what they are
                agree(result, frame, cpu)
        assert segmenter.choice.backend.name == "onnxruntime-cpu"
        assert segmenter.in_flight == 1
        assert "not tensorrt: " in str(segmenter.choice)
        (notice,) = (line for line in said if "The GPU is lost" in line)
        assert "719" in notice or "LAUNCH_FAILED" in notice
        assert "Going on with onnxruntime-cpu (CPU" in notice
        agree(segmenter.segment(frames[0]), frames[0], cpu)
        segmenter.close()


def test_the_cpu_goes_on_too_where_tensorrt_notices_first(
    load_auto: Callable[..., Segmenter],
    bundle: Any,
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuStreamBeginCapture=900")
    segmenter = load_auto(which=bundle)
    segmenter.segment(frame_of(50, 60))
    context = tensorrt_api.load("tensorrt").module.IExecutionContext
    monkeypatch.setattr(context, "execute_async_v3", lambda self, stream_handle: False)
    monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuStreamQuery=719")
    with Segmenter.load(bundle, "fundus", backend="onnxruntime-cpu") as cpu:
        agree(segmenter.start([frame_of(50, 60)]).results()[0], frame_of(50, 60), cpu)
    assert sum("The GPU is lost" in line for line in said) == 1
    segmenter.close()


def test_frames_that_lay_on_the_lost_gpu_are_lost_with_it(
    load_auto: Callable[..., Segmenter], bundle: Any, machine: Any, memory: GpuMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = load_auto(which=bundle)
    frame = frame_of(72, 96)
    group = segmenter.start([InterfaceArray(memory.put(frame), frame.shape)])
    monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuEventSynchronize=719")
    with pytest.raises(DeviceLost, match="Start it again"):
        group.results()
    monkeypatch.delenv("CUDA_MACHINE_FAIL")
    segmenter.close()


def test_the_pipeline_goes_on_when_the_gpu_is_lost(
    load_auto: Callable[..., Segmenter],
    bundle: Any,
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    segmenter = warmed_up(load_auto(which=bundle), (50, 60), (70, 40))
    clip = Clip(30)
    order: list[int] = []

    class Losing(Kept):
        def write(self, frame: SourceFrame, result: Segmentation) -> None:
            order.append(frame.index)
            if frame.index == 9:
                monkeypatch.setenv("CUDA_MACHINE_FAIL", "cuEventSynchronize=719")

    report = run_pipeline(segmenter, [Job(clip, [Losing(clip)])])
    assert (report.frames, order) == (30, list(range(30)))
    assert sum("The GPU is lost" in line for line in said) == 1
    segmenter.close()


@pytest.mark.parametrize(
    "failing", ["cuDevicePrimaryCtxRetain=2", "cuMemAlloc=2", "cuMemHostAlloc=2", "cuStreamCreate=46"]
)
def test_a_gpu_that_others_hold_is_left_to_them(
    load: Load, bundle: Any, machine: Any, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    segmenter = load()
    segmenter.segment(frame_of(50, 60))
    segmenter.close()
    opened = machine.open()
    monkeypatch.setenv("CUDA_MACHINE_FAIL", failing)
    if failing.startswith("cuMemHostAlloc"):  # pinned memory is asked for by the first frame
        later = load()
        with pytest.raises(UserError, match=r"pixels needs .* on the GPU and in pinned memory"):
            later.segment(frame_of(50, 60))
        return
    with pytest.raises(BackendUnavailable, match="CUDA_ERROR") as caught:
        Segmenter.load(bundle, "fundus", backend="tensorrt")
    assert caught.value.exit_code == 1
    assert "Stop them" in caught.value.hint or "stop that program" in caught.value.hint
    assert machine.open() == opened
    with Segmenter.load(bundle, "fundus") as segmenter:
        assert segmenter.choice.backend.name == "onnxruntime"
        assert caught.value.message in str(segmenter.choice)
