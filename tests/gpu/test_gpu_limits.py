"""Frames that the GPU has no room for: the CPU takes them where the choice was ours, else they alone fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pytest
from scripted_feeds import EndlessFeed
from test_gpu_backend import bundle, check, frame_of, load
from test_gpu_overlap import agree, backend_of, load_auto, load_batch

from espmedsam_edge.runtime.run.jobs import Job, Limits
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sources.live import BackOff, LiveSource
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

__all__ = ["bundle", "load", "load_auto", "load_batch"]  # fixtures

pytestmark = pytest.mark.gpu

SMALL, LARGE, LONG = (50, 60), (600, 1200), (3, 32001)


def leave_free(segmenter: Segmenter, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the software driver have so many bytes beside what is used now."""
    use = backend_of(segmenter).device_use()
    monkeypatch.setenv("CUDA_MACHINE_MEMORY", str(use.total - use.free + free))


@pytest.mark.parametrize("overlapping", [False, True], ids=["one by one", "overlapping"])
@pytest.mark.parametrize("size", [LARGE, LONG], ids=["memory", "side"])
def test_the_cpu_takes_what_does_not_fit_and_the_gpu_the_rest(
    load_auto: Callable[..., Segmenter],
    bundle: Any,
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    overlapping: bool,
    said: list[str],
) -> None:
    segmenter = load_auto(which=bundle)
    frames = [frame_of(*side, seed) for seed, side in enumerate([SMALL, size, SMALL, size, SMALL])]
    leave_free(segmenter, 1_000_000, monkeypatch)
    if overlapping:
        results = [group.results()[0] for group in [segmenter.start([frame]) for frame in frames]]
    else:
        results = [segmenter.segment(frame) for frame in frames]
    with Segmenter.load(bundle, "fundus", backend="onnxruntime-cpu") as cpu:
        for frame, result in zip(frames, results, strict=True):
            if frame.shape[:2] == SMALL:
                check(result, frame)  # what the double's engine makes of it, not the network
            else:
                agree(result, frame, cpu)
    assert segmenter.choice.backend.name == "tensorrt"
    (notice,) = (line for line in said if "go to" in line)
    assert f"a frame of {size[1]}x{size[0]} pixels" in notice
    assert "Such frames go to onnxruntime-cpu (CPU" in notice
    segmenter.close()


_IN_A_CAPTURE = ["cuStreamBeginCapture", "cuLaunchKernel", "cuStreamEndCapture", "cuGraphInstantiate"]


@pytest.mark.parametrize("call", ["cuMemHostAlloc", "cuMemAlloc", "cuEventCreate", "cuGraphLaunch", *_IN_A_CAPTURE])
def test_memory_that_lacks_at_the_first_frame(
    load_auto: Callable[..., Segmenter],
    bundle: Any,
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    said: list[str],
) -> None:
    segmenter = load_auto(which=bundle)
    frame = frame_of(*SMALL)
    monkeypatch.setenv("CUDA_MACHINE_FAIL", f"{call}=2")
    with Segmenter.load(bundle, "fundus", backend="onnxruntime-cpu") as cpu:
        for _ in range(2):
            agree(segmenter.start([frame]).results()[0], frame, cpu)
    assert sum("Such frames go to" in line for line in said) == 1
    monkeypatch.delenv("CUDA_MACHINE_FAIL")
    check(segmenter.segment(frame), frame)
    segmenter.close()


@pytest.mark.parametrize("call", [call for call in _IN_A_CAPTURE if call != "cuLaunchKernel"])  # the double has none
def test_memory_that_lacks_while_the_engine_is_captured(
    load: Callable[..., Segmenter], machine: Any, monkeypatch: pytest.MonkeyPatch, call: str, said: list[str]
) -> None:
    monkeypatch.setenv("CUDA_MACHINE_FAIL", f"{call}=2")
    segmenter = load()
    monkeypatch.delenv("CUDA_MACHINE_FAIL")
    (line,) = [line for line in said if "cannot be captured" in line]
    assert f"{call} failed: CUDA_ERROR_OUT_OF_MEMORY" in line
    for seed in range(3):
        frame = frame_of(*SMALL, seed)
        check(segmenter.start([frame]).results()[0], frame)


@pytest.mark.parametrize("call", _IN_A_CAPTURE)
def test_memory_that_lacks_in_a_capture_while_others_are_under_way(
    load_auto: Callable[..., Segmenter],
    bundle: Any,
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    said: list[str],
) -> None:
    """The first frame of a second size, amid groups of the first one: it goes to the CPU, and the others are right."""
    segmenter = load_auto(which=bundle)
    frames = [frame_of(*SMALL, seed) for seed in range(3)]
    started = [segmenter.start([frame]) for frame in frames]
    other = frame_of(70, 90)
    monkeypatch.setenv("CUDA_MACHINE_FAIL", f"{call}=2")
    with Segmenter.load(bundle, "fundus", backend="onnxruntime-cpu") as cpu:
        agree(segmenter.start([other]).results()[0], other, cpu)
    monkeypatch.delenv("CUDA_MACHINE_FAIL")
    for frame, group in zip(frames, started, strict=True):
        check(group.results()[0], frame)
    check(segmenter.segment(other), other)
    assert sum("Such frames go to" in line for line in said) == 1
    segmenter.close()


def test_what_does_not_fit_then_a_gpu_that_is_lost(
    load_auto: Callable[..., Segmenter],
    bundle: Any,
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    segmenter = load_auto(which=bundle)
    frame = frame_of(*SMALL)
    with Segmenter.load(bundle, "fundus", backend="onnxruntime-cpu") as cpu:
        for code in (2, 719):
            monkeypatch.setenv("CUDA_MACHINE_FAIL", f"cuMemcpyHtoDAsync={code}")
            agree(segmenter.segment(frame), frame, cpu)
    assert segmenter.choice.backend.name == "onnxruntime-cpu"
    assert ["Such frames go to" in line or "The GPU is lost" in line for line in said].count(True) == 2
    segmenter.close()


def test_one_frame_of_a_group_that_does_not_fit_leaves_the_others_on_the_gpu(
    load_batch: Callable[[int], Segmenter], machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load_batch(3)
    bundle = found.bundle
    found.close()
    frames = [frame_of(*size, seed) for seed, size in enumerate([SMALL, LARGE, SMALL])]
    with Segmenter.load(bundle) as segmenter, Segmenter.load(bundle, backend="onnxruntime-cpu") as cpu:
        leave_free(segmenter, 1_000_000, monkeypatch)
        first, large, last = segmenter.start(frames).results()
        check(first, frames[0])
        check(last, frames[2])
        agree(large, frames[1], cpu)


class Series:
    """A source of frames of given sizes: images, or a video."""

    live = False
    fps = Fraction(25)

    def __init__(self, kind: Literal["images", "video"], sizes: Sequence[tuple[int, int]]) -> None:
        self.kind: Literal["images", "video"] = kind
        self.name, self.length, self.failures = "series", len(sizes), list[Failure]()
        self.files = [Path(f"{number}.png") for number in range(len(sizes))] if kind == "images" else [Path("clip")]
        self.sizes = sizes

    def __enter__(self) -> Series:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[SourceFrame]:
        for number, size in enumerate(self.sizes):
            yield SourceFrame(frame_of(*size, number), self.files[number if self.kind == "images" else 0], number)


class Written:
    """A sink that checks what it gets, and notes which frames and how it was left."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.finished: bool | None = None

    def __enter__(self) -> Written:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.finished = error is None

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        check(result, frame.image)
        self.numbers.append(frame.index)


@pytest.mark.parametrize("beside_a_camera", [False, True], ids=["files", "live"])
@pytest.mark.parametrize("batch", [1, 2])
def test_with_a_backend_asked_for_an_image_fails_alone_and_a_video_as_a_whole(
    load_batch: Callable[[int], Segmenter],
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    beside_a_camera: bool,
) -> None:
    segmenter = load_batch(batch)
    leave_free(segmenter, 1_000_000, monkeypatch)
    sizes = [SMALL, SMALL, LARGE, LONG, SMALL, SMALL]
    images, video, after = Series("images", sizes), Series("video", sizes), Series("video", [SMALL] * 3)
    sinks = [Written(), Written(), Written()]
    jobs = [Job(source, [sink]) for source, sink in zip((images, video, after), sinks, strict=True)]
    if beside_a_camera:
        camera = LiveSource(EndlessFeed(), "test://a", "a", BackOff(first=0.001, longest=0.002))
        jobs.append(Job(camera, [Written()]))
    report = run_pipeline(segmenter, jobs, limits=Limits(frames=6))
    told = {failure.name: failure.message for failure in report.failures}  # beside a camera jobs take turns
    assert sorted(told) == ["2.png", "3.png", "series"]
    assert len(report.failures) == 3
    assert "a frame of 1200x600 pixels needs" in told["2.png"]
    assert "a frame of 32001x3 pixels is too large" in told["3.png"]
    assert "a frame of 1200x600 pixels needs" in told["series"]
    assert sinks[0].numbers == [0, 1, 4, 5]
    assert sinks[0].finished
    assert sinks[1].numbers == [0, 1]
    assert sinks[1].finished is False
    assert sinks[2].numbers == [0, 1, 2]
