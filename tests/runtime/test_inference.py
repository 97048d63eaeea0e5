"""A run from Python: what ``infer`` writes and reports, frames one by one, and how a loop that is left ends it."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from video_files import FRAMES, save_clip

import espmedsam_edge
from espmedsam_edge import (
    Inference,
    InferenceRequest,
    ModelOptions,
    Outputs,
    ReadingOptions,
    Segmenter,
    UserError,
    infer,
    infer_frames,
)
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.cli.infer import _print, command
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.backends.backend import Choice, DeviceUse
from espmedsam_edge.runtime.request import InferenceReport
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sources.source import SourceFrame
from espmedsam_edge.runtime.video import reading, writing
from espmedsam_edge.runtime.video.reading import open_video

LIVE = "test://fundus?size=64x48&fps=100"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def save_photo(path: Path, seed: int = 0, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    photo = np.asarray(cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), photo)
    return photo


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def threads_of_runs() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("espmedsam-")]


class CountingBackend:
    """Stands for a network: counts its runs; a foreground that depends on nothing."""

    name, device, precision = "counting", "nowhere", "fp32"

    def __init__(self, graph: Any) -> None:
        self.graph, self.runs, self.closed = graph, 0, False

    def run(self, image: np.ndarray) -> np.ndarray:
        self.runs += 1
        return np.ones(self.graph.output_shape, np.float32)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def counting(toy_bundle: Bundle) -> Iterator[Segmenter]:
    with Segmenter(toy_bundle, Choice(CountingBackend(toy_bundle.graph(None, None))), 0.5) as segmenter:
        yield segmenter


def backend_of(segmenter: Segmenter) -> CountingBackend:
    backend = segmenter.choice.backend
    assert isinstance(backend, CountingBackend)
    return backend


def test_one_call_writes_what_the_command_writes(toy_bundle: Bundle) -> None:
    save_photo(Path("in/a.png"))
    save_photo(Path("in/b.jpg"), 1)
    save_clip(Path("in/c.avi"))
    Path("in/d.png").write_text("no picture")
    options = ["--out", "command/o", "--masks", "command/m", "--csv", "command/a.csv"]
    with pytest.raises(SystemExit) as ended:
        main(["infer", str(toy_bundle.path), "in", *options])
    assert ended.value.code == 1
    report = infer("in", toy_bundle.path, Outputs(out="python/o", masks=Path("python/m"), csv="python/a.csv"))
    assert tree(Path("python")) == tree(Path("command"))
    assert len(tree(Path("python"))) == 3 + (2 + FRAMES) + 1
    assert [(failure.name, "not a JPEG" in failure.message) for failure in report.failures] == [("in/d.png", True)]
    assert report.results == {"overlays": Path("python/o"), "masks": Path("python/m"), "areas": Path("python/a.csv")}
    assert (report.bundle, report.modality, report.precision) == (toy_bundle.path, "fundus", "fp32")
    assert report.backend.startswith("onnxruntime (CPU")
    assert (report.frames, report.trained, report.interrupted, report.live) == (2 + FRAMES, True, False, [])
    assert set(report.stage_seconds) == {"decode", "preprocess", "inference", "postprocess", "write"}


def test_without_outputs_overlays_are_written_beside_where_one_is(toy_bundle: Bundle) -> None:
    save_photo(Path("a.png"))
    assert infer("a.png", toy_bundle).results == {"overlays": Path("a-overlay.png")}
    assert sorted(tree(Path())) == ["a-overlay.png", "a.png"]


def test_frames_come_in_order_with_their_results_and_nothing_is_written(toy_bundle: Bundle) -> None:
    photo = save_photo(Path("a.png"))
    save_clip(Path("c.avi"))
    before = tree(Path())
    got = list(infer_frames(["a.png", Path("c.avi")], ModelOptions(toy_bundle.path, threshold=0.4)))
    assert [(frame.source, frame.index) for frame, _ in got] == [("a.png", 0), *(("c.avi", n) for n in range(FRAMES))]
    np.testing.assert_array_equal(got[0][0].image, photo)
    with Segmenter.load(toy_bundle, threshold=0.4) as segmenter:
        for frame, result in got:
            np.testing.assert_array_equal(result.mask, segmenter.segment(frame.image).mask)
    assert tree(Path()) == before
    assert threads_of_runs() == []


def test_what_is_written_beside_the_frames_is_there_when_they_come(toy_bundle: Bundle) -> None:
    for name in "abc":
        save_photo(Path(f"{name}.png"))
    for frame, result in infer_frames(["a.png", "b.png", "c.png"], toy_bundle, Outputs(masks="m")):
        mask = cv2.imread(f"m/{frame.path.stem}.png", cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(mask, result.mask)


@pytest.mark.parametrize("way", ["break", "error", "close"])
def test_a_loop_that_is_left_ends_the_run_as_ctrl_c_does(counting: Segmenter, way: str) -> None:
    save_photo(Path("a.png"))
    save_clip(Path("c.avi"), 5000)
    outputs = Outputs(out="o", jsonl="r.jsonl")

    def look() -> None:
        frames = infer_frames(["a.png", "c.avi"], counting, outputs)
        for frame, _ in frames:
            if frame.index == 3:
                if way == "error":
                    raise ZeroDivisionError
                if way == "break":
                    break
                frames.close()  # type: ignore[attr-defined]

    if way == "error":
        with pytest.raises(ZeroDivisionError):
            look()
    else:
        look()
    assert sorted(tree(Path())) == ["a.png", "c.avi", "o/a.png"]
    assert threads_of_runs() == []
    assert not backend_of(counting).closed
    assert backend_of(counting).runs < 4000


def test_ctrl_c_ends_a_loop_that_waits_for_its_frame(counting: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    save_clip(Path("c.avi"), 5000)
    run, waiting = backend_of(counting).run, threading.Event()

    def held(image: np.ndarray) -> np.ndarray:
        if backend_of(counting).runs == 5:
            waiting.set()
            time.sleep(1)
        return run(image)

    monkeypatch.setattr(backend_of(counting), "run", held)

    def press() -> None:
        assert waiting.wait(30)
        time.sleep(0.2)  # the loop has taken what there was
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(frame.index for frame, _ in infer_frames("c.avi", counting, Outputs(masks="m", mask_video="v.mp4")))
    presser.join()
    assert threads_of_runs() == []
    assert not Path("v.mp4").exists()
    assert backend_of(counting).runs < 4000


def test_frames_are_read_ahead_of_the_loop_by_few(counting: Segmenter) -> None:
    """Of 2,000 frames, those that wait between the stages alone are held."""
    save_clip(Path("c.avi"), 2000)
    backend, frames = backend_of(counting), infer_frames("c.avi", counting)
    taken = 0
    for _ in frames:
        taken += 1
        if taken in (1, 100):
            before = -1
            while backend.runs != before:  # until it waits for this loop
                before = backend.runs
                time.sleep(0.3)
            assert taken <= backend.runs <= taken + 12
    assert taken == backend.runs == 2000


def test_what_a_live_source_gave_is_kept_when_the_loop_is_left(toy_bundle: Bundle) -> None:
    got: list[SourceFrame] = []
    for frame, _ in infer_frames(LIVE, toy_bundle, Outputs(out="rec.mp4")):
        got.append(frame)
        if len(got) == 5:
            break
    assert [path.name for path in Path().iterdir()] == ["rec.mp4"]
    assert len(list(open_video(Path("rec.mp4")))) >= 5
    assert [frame.index for frame in got] == sorted({frame.index for frame in got})
    assert threads_of_runs() == []


def test_of_files_and_live_sources_the_loop_keeps_what_ctrl_c_does(toy_bundle: Bundle) -> None:
    save_clip(Path("c.avi"), 5000)
    seen: set[str] = set()
    for frame, _ in infer_frames([LIVE, "c.avi"], toy_bundle, Outputs(out="o")):
        seen.add(frame.source)
        if len(seen) == 2:
            break
    assert list(tree(Path("o"))) == ["test-fundus.mp4"]
    assert len(list(open_video(Path("o/test-fundus.mp4")))) >= 1
    assert threads_of_runs() == []


def test_a_live_source_that_gives_nothing_is_left_too(counting: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """No frame comes while the loop waits; another thread ends it."""
    save_photo(Path("a.png"))
    frames = infer_frames(["a.png", "test://fundus?size=64x48&fps=0.1"], counting)
    seen = [next(frames)[0].source, next(frames)[0].source]
    assert sorted(seen) == ["a.png", "test://fundus"]
    begin = time.monotonic()
    frames.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 5  # the next frame would come in ten seconds
    assert threads_of_runs() == []


def test_limits_end_the_frames(toy_bundle: Bundle) -> None:
    save_clip(Path("c.avi"))
    both = infer_frames(["c.avi", LIVE], toy_bundle, reading=ReadingOptions(frames=4))
    assert sorted(frame.source for frame, _ in both) == ["c.avi"] * 4 + ["test://fundus"] * 4


def test_what_fails_is_told_and_the_rest_is_done(toy_bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    cv2.imwrite("a.png", phantom("fundus", 1, (96, 128))[0])
    Path("b.png").touch()
    got: list[str] = []
    frames = infer_frames(["b.png", "a.png", "c.png"], toy_bundle)
    with caplog.at_level(logging.WARNING, "espmedsam_edge"), pytest.raises(UserError, match="1 more failed"):
        got.extend(frame.source for frame, _ in frames)
    assert got == ["a.png"]
    told = [record.getMessage() for record in caplog.records]
    assert [line.startswith("failed: ") for line in told] == [True, True]
    assert {"b.png" in line and "empty" in line for line in told} == {True, False}


def test_nothing_that_can_be_opened_is_a_report_of_failures(toy_bundle: Bundle) -> None:
    report = infer("*.tiff", toy_bundle)
    assert (report.bundle, report.frames, [failure.name for failure in report.failures]) == (None, 0, ["*.tiff"])
    with pytest.raises(UserError, match=r"no image or video matches \*\.tiff"):
        next(infer_frames("*.tiff", toy_bundle))


def test_an_error_of_the_run_comes_out_of_the_loop(toy_bundle: Bundle, counting: Segmenter) -> None:
    save_photo(Path("a.png"))
    Path("file").touch()
    with pytest.raises(UserError, match="file"):
        list(infer_frames("a.png", toy_bundle, Outputs(jsonl="file/r.jsonl")))
    with pytest.raises(UserError, match="no bundle at"):
        next(iter(infer_frames("a.png", "none.bundle")))

    def broken(image: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    backend_of(counting).run = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        list(infer_frames("a.png", counting))
    assert threads_of_runs() == []


def test_a_loaded_segmenter_stays_the_callers(counting: Segmenter) -> None:
    save_photo(Path("a.png"))
    for _ in range(2):
        assert infer("a.png", counting, Outputs(masks="m")).frames == 1
    assert backend_of(counting).runs == 2
    assert not backend_of(counting).closed


def test_further_sinks_get_every_frame(toy_bundle: Bundle) -> None:
    class Areas:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def __enter__(self) -> Areas:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, frame: SourceFrame, result: Segmentation) -> None:
            self.seen.append(result.area)

    save_clip(Path("c.avi"))
    areas = Areas()
    with Inference(InferenceRequest(["c.avi"], ModelOptions(toy_bundle), None)) as run:
        report = run.run(sinks=[areas])
        assert run.report is report
        with pytest.raises(RuntimeError, match="once"):
            run.run()
    assert len(areas.seen) == report.frames == FRAMES
    with pytest.raises(RuntimeError, match="enter"):
        Inference(run.request).run()


def test_a_live_sources_report_says_what_was_written_last(toy_bundle: Bundle) -> None:
    report = infer(LIVE, toy_bundle, Outputs(jsonl="r.jsonl"), ReadingOptions(frames=5))
    (live,) = report.live
    assert live.latency is not None
    assert live.written is not None
    assert live.written[0] == "r.jsonl"
    assert live.written[1].maximum >= live.latency.minimum
    reading = ReadingOptions(max_latency=0, duration=0.2)  # every frame is older than that
    (live,) = infer(LIVE, toy_bundle, Outputs(jsonl="s.jsonl"), reading).live
    assert (live.frames, live.refused >= 1) == (0, True)


def test_numbers_stand_for_names_in_failures_too(toy_bundle: Bundle) -> None:
    save_photo(Path("DOE.png"))
    Path("ROE.png").touch()
    reading = ReadingOptions(anonymous_names=True)
    report = infer(["DOE.png", "ROE.png"], toy_bundle, Outputs(masks="m"), reading)
    assert list(tree(Path("m"))) == ["source-1.png"]
    assert len(report.failures) == 1
    assert "ROE" not in str(report.failures)
    with pytest.raises(UserError, match="source-1 is not DICOM") as refused:
        infer("DOE.png", toy_bundle, Outputs(dicom_seg="s"), reading)
    assert "DOE" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Outputs(opacity=1.5), "opacity 1.5 is not from 0 to 1"),
        (lambda: Outputs(contours="polygon"), "no contours 'polygon'. Did you mean 'polygons'?"),
        (lambda: Outputs(uids="plane"), "no uids 'plane'. Did you mean 'plain'?"),
        (lambda: ReadingOptions(frames=0), "frames 0 is less than 1"),
        (lambda: ReadingOptions(duration=float("nan")), "duration nan is less than 0"),
        (lambda: ReadingOptions(max_latency=-1), "max_latency -1 is less than 0"),
        (lambda: ReadingOptions(decoder="hard"), "no decoder 'hard'"),
        (lambda: ModelOptions(threads=0), "threads 0 is less than 1"),
    ],
)
def test_values_out_of_range_are_refused_at_once(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError) as refused:
        make()
    assert words in str(refused.value)


def test_nothing_to_segment_is_said(toy_bundle: Bundle, counting: Segmenter) -> None:
    for model in (toy_bundle, counting):
        with pytest.raises(UserError, match="nothing to segment"):
            infer([], model)


def test_the_memory_of_a_gpu_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    use = DeviceUse(loaded=1 << 30, activations=1 << 28, buffers=1 << 20, free=1 << 33, total=1 << 34)
    report = InferenceReport([], Path("b"), "fundus", "fp16", "TensorRT", frames=2, seconds=1.0, gpu_memory=use)
    _print(report, to_stderr=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("GPU memory: ")] == [f"GPU memory: {use}"]


def test_the_command_has_the_options_of_a_request_with_the_same_defaults() -> None:
    given = {
        name: getattr(parameter.default, "default", parameter.default)
        for name, parameter in inspect.signature(command).parameters.items()
    }
    for name in ("arguments", "serve", "token", "allow_host", "trust_proxy", "config"):
        given.pop(name)
    wanted = {
        field.name: field.default
        for options in (ModelOptions, ReadingOptions, Outputs, ObjectOptions)  # the first holds the last
        for field in fields(options)
    }
    assert wanted.pop("bundle") is None  # the command's first argument
    assert given == wanted


def test_the_front_loads_when_it_is_used() -> None:
    code = "import sys, espmedsam_edge; print([name for name in sys.modules if 'espmedsam_edge.runtime' in name])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    for name in espmedsam_edge.__all__:
        assert getattr(espmedsam_edge, name) is not None


@pytest.mark.parametrize("pyav", [True, False])
def test_a_run_of_many_clips_holds_the_codecs_of_one(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, pyav: bool
) -> None:
    """Each finished clip once left its decoder (0.3 MB) and encoder (3 MB) until the end of the run."""
    if pyav:
        pytest.importorskip("av")
    else:
        for module in ("reading", "writing"):
            monkeypatch.setattr(f"espmedsam_edge.runtime.video.{module}.has_pyav", lambda: False)
    folder = Path("clips")
    folder.mkdir()
    for number in range(9):
        save_clip(folder / f"{number}.avi", frames=3)
    kinds = (reading.PyAvReader, reading.OpenCvReader, writing.PyAvWriter, writing.OpenCvWriter)
    most = 0

    class Watching:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def write(self, frame: SourceFrame, result: Segmentation) -> None:
            nonlocal most
            if frame.index == 0:
                most = max(most, sum(issubclass(type(thing), kinds) for thing in gc.get_objects()))

    with (
        Segmenter.load(toy_bundle, backend="onnxruntime") as segmenter,
        Inference(InferenceRequest(folder, segmenter, Outputs(out="out", mask_video="masks"))) as run,
    ):
        report = run.run(sinks=[Watching()])
    assert (report.frames, report.failures) == (27, [])
    assert len(tree(Path("out"))) == len(tree(Path("masks"))) == 9
    assert 3 <= most <= 6  # a clip's own three, and readers of the two clips that are read ahead of it
