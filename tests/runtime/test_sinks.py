"""Results written are complete under their name or absent."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from video_files import clip_frame, number_of, save_clip

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import OverlayStyle, draw_overlay
from espmedsam_edge.runtime.segmentation import Segmentation, Timings
from espmedsam_edge.runtime.sinks import JsonLines, MaskImages, OverlayImages, OverlayVideo
from espmedsam_edge.runtime.sources import SourceFrame, VideoFile
from espmedsam_edge.runtime.video_reading import open_video

STYLE = OverlayStyle((0, 255, 255))


def result_for(image: np.ndarray) -> Segmentation:
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[5:15, 10:30] = 255
    return Segmentation(mask, "fundus", np.zeros((16, 16), np.float32), 0.5, Timings(0.001, 0.002, 0.003))


def clip_source(path: Path) -> VideoFile:
    source = VideoFile(save_clip(path))
    with source:
        pass
    return source


def write_clip(sink: OverlayVideo, path: Path, frames: int = 6) -> None:
    for number in range(frames):
        image = clip_frame(number)
        sink.write(SourceFrame(image, path, number, number / 10), result_for(image))


def test_overlay_images_show_the_mask(tmp_path: Path) -> None:
    image = clip_frame(2)
    with OverlayImages({Path("a.jpg"): tmp_path / "o" / "a.png"}, STYLE) as sink:
        sink.write(SourceFrame(image, Path("a.jpg")), result_for(image))
    written = cv2.imread(str(tmp_path / "o" / "a.png"))
    np.testing.assert_array_equal(written, draw_overlay(image, result_for(image).mask, STYLE))


def test_masks_are_grey_pngs(tmp_path: Path) -> None:
    image = clip_frame(0)
    with MaskImages({Path("a.jpg"): tmp_path / "a.png"}) as sink:
        sink.write(SourceFrame(image, Path("a.jpg")), result_for(image))
    with MaskImages({Path("c.mp4"): tmp_path / "c"}, numbered=True) as sink:
        for number in (0, 1, 12):
            sink.write(SourceFrame(image, Path("c.mp4"), number, 0.0), result_for(image))
    for file in (tmp_path / "a.png", tmp_path / "c" / "000012.png"):
        np.testing.assert_array_equal(cv2.imread(str(file), cv2.IMREAD_UNCHANGED), result_for(image).mask)
    assert sorted(os.listdir(tmp_path / "c")) == ["000000.png", "000001.png", "000012.png"]


def test_an_overlay_video_appears_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "out" / "o.mp4"
    source = clip_source(tmp_path / "c.mp4")
    with OverlayVideo(file, source, STYLE) as sink:
        write_clip(sink, source.path)
        assert not file.exists()
    reader = open_video(file)
    frames = [frame for frame, _ in reader]
    assert reader.fps == 10
    assert [number_of(frame) for frame in frames] == list(range(6))
    expected = draw_overlay(clip_frame(0), result_for(clip_frame(0)).mask, STYLE)
    assert np.abs(frames[0].astype(int) - expected).mean() < 6  # a lossy codec with halved chroma
    assert os.listdir(file.parent) == ["o.mp4"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_video_is_removed(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "out" / "o.mp4"
    source = clip_source(tmp_path / "c.mp4")

    def interrupted() -> None:
        with OverlayVideo(file, source, STYLE) as sink:
            write_clip(sink, source.path)
            raise error

    with pytest.raises(error):
        interrupted()
    assert os.listdir(file.parent) == []


def test_a_video_of_no_frames_is_no_file(tmp_path: Path) -> None:
    with OverlayVideo(tmp_path / "o.mp4", clip_source(tmp_path / "c.mp4"), STYLE):
        pass
    assert os.listdir(tmp_path) == ["c.mp4"]


def test_a_video_that_came_out_incomplete_is_removed_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = clip_source(tmp_path / "c.mp4")
    sink = OverlayVideo(tmp_path / "out" / "o.mp4", source, STYLE)
    sink.__enter__()
    write_clip(sink, source.path)
    assert sink._writer is not None
    monkeypatch.setattr(sink._writer, "finish", lambda: False)
    with pytest.raises(UserError, match=r"o\.mp4 came out incomplete"):
        sink.__exit__(None, None, None)
    assert os.listdir(tmp_path / "out") == []


def test_lines_are_json_and_appear_together(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    image = clip_frame(0)
    with JsonLines(file, {"weights": "random"}) as sink:
        sink.write(SourceFrame(image, Path("c.mp4"), 0, 0.0), result_for(image))
        sink.write(SourceFrame(image, Path("c.mp4"), 1, 0.1), result_for(image))
        assert not file.exists()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["source"], line["frame"], line["time"]) for line in lines] == [("c.mp4", 0, 0.0), ("c.mp4", 1, 0.1)]
    assert lines[0]["weights"] == "random"
    assert lines[0]["area"] == 200
    assert lines[0]["bounding_box"] == [10, 5, 20, 10]


def test_lines_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    image = clip_frame(0)
    with JsonLines(None) as sink:
        sink.write(SourceFrame(image, Path("a.png")), result_for(image))
    assert json.loads(capsys.readouterr().out)["time"] is None


def test_lines_on_a_full_disk_are_one_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    image = clip_frame(0)

    def fill() -> None:
        with JsonLines(tmp_path / "a.jsonl") as sink:
            sink._stream = Path("/dev/full").open("w")  # noqa: SIM115 (closed by the garbage collector)
            while True:
                sink.write(SourceFrame(image, Path("a.png")), result_for(image))

    with pytest.raises(UserError, match="no space left"):
        fill()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_under_a_video_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = clip_source(tmp_path / "c.mp4")

    def fill() -> None:
        with OverlayVideo(tmp_path / "out" / "o.mp4", source, STYLE) as sink:
            write_clip(sink, source.path)

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(sink._writer, "write", full)
            write_clip(sink, source.path)

    with pytest.raises(UserError, match="no space left to write"):
        fill()
    assert os.listdir(tmp_path / "out") == []
