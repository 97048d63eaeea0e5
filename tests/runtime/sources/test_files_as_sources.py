"""Files, folders and globs to frames."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from video_files import FRAMES, cut, number_of, save_clip

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sources import scales
from espmedsam_edge.runtime.sources.files import ImageFiles, VideoFile
from espmedsam_edge.runtime.sources.live import LiveOptions
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.scales import SharedScales


def save_image(path: Path, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((20, 30, 3), value, np.uint8))
    return path


def named(path: Path, *specifications: str) -> list[str]:
    """The files that specifications, relative to a folder, lead to."""
    sources, failures = open_sources([str(path / specification) for specification in specifications])
    assert failures == []
    return [str(file.relative_to(path)) for source in sources for file in source.files]


def test_a_folder_is_its_images_and_videos_in_natural_order(tmp_path: Path) -> None:
    for name in ("scan10.png", "scan2.png", "Scan1.PNG", ".hidden.png", "deeper/scan3.png"):
        save_image(tmp_path / name)
    (tmp_path / "split.json").write_text("{}")
    save_clip(tmp_path / "clip.mp4")
    assert named(tmp_path, "") == ["Scan1.PNG", "scan2.png", "scan10.png", "clip.mp4"]


def test_globs(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.jpg", "b/c/3.png", "a/4.txt.png"):
        save_image(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("x")
    assert named(tmp_path, "a/*") == ["a/1.png", "a/2.jpg", "a/4.txt.png"]
    assert named(tmp_path, "**/*.png") == ["a/1.png", "a/4.txt.png", "b/c/3.png"]


def test_a_name_with_brackets_is_a_name_first(tmp_path: Path) -> None:
    save_image(tmp_path / "benign [1].png")
    assert named(tmp_path, "benign [1].png") == ["benign [1].png"]


def test_a_file_is_taken_once(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    assert named(tmp_path, "a.png", "*.png", "", "./a.png") == ["a.png"]


def test_what_leads_to_nothing_is_a_failure_and_the_rest_is_found(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    specifications = ["empty", "*.tiff", "n" * 300, "a.png"]
    sources, failures = open_sources([str(tmp_path / text) for text in specifications])
    assert [source.files for source in sources] == [[tmp_path / "a.png"]]
    assert len(failures) == 3
    for failure, words in zip(failures, ["no images, videos or DICOM", "matches", "cannot read"], strict=True):
        assert words in failure.message


@pytest.mark.parametrize("text", ["rtsp://camera/1", "0", "test://fundus"])
def test_cameras_and_streams_are_refused_where_only_files_fit(text: str) -> None:
    with pytest.raises(UserError, match="cannot be used here"):
        open_sources([text])


def test_a_file_goes_before_a_camera_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "0.png").rename("0")
    (source,), _ = open_sources(["0"], LiveOptions())
    assert source.files == [Path("0")]


def test_file_uris(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a b.png")
    (source,), failures = open_sources([path.as_uri()])
    assert (source.files, failures) == ([path], [])


def test_a_missing_file_fails_when_it_is_read(tmp_path: Path) -> None:
    (source,), failures = open_sources([str(tmp_path / "absent.png")])
    assert failures == []
    with source:
        assert list(source) == []
    assert "no file" in source.failures[0].message


def test_content_decides_before_the_suffix(tmp_path: Path) -> None:
    save_clip(tmp_path / "a.mp4").rename(tmp_path / "a.png")
    save_image(tmp_path / "b.png").rename(tmp_path / "b.mp4")
    kinds = [source.kind for source in open_sources([str(tmp_path / "a.png"), str(tmp_path / "b.mp4")])[0]]
    assert sorted(kinds) == ["images", "video"]


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (source,), _ = open_sources([str(tmp_path / "pipe.png")])
    with source:
        assert list(source) == []
    assert "is not a file" in source.failures[0].message


def test_a_bad_image_is_left_out_and_the_rest_follows(tmp_path: Path) -> None:
    good = [save_image(tmp_path / f"{number}.png", 50 * number) for number in range(3)]
    bad = tmp_path / "1b.png"
    bad.write_bytes(good[0].read_bytes()[:40])
    with ImageFiles([good[0], good[1], bad, good[2]]) as source:
        frames = list(source)
    assert [frame.path for frame in frames] == good
    assert [frame.image[0, 0, 0] for frame in frames] == [0, 50, 100]
    assert [(frame.index, frame.time) for frame in frames] == [(0, None)] * 3
    assert [failure.name for failure in source.failures] == [str(bad)]
    assert source.length == 4


def test_a_video_gives_numbered_frames(tmp_path: Path) -> None:
    source = VideoFile(save_clip(tmp_path / "a.mp4"))
    with source:
        assert (source.fps, source.length) == (10, FRAMES)
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(FRAMES))
    assert [number_of(frame.image) for frame in frames] == list(range(FRAMES))
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in range(FRAMES)], abs=1e-3)
    assert source.failures == []


def test_a_cut_video_gives_its_frames_and_a_failure(tmp_path: Path) -> None:
    source = VideoFile(cut(save_clip(tmp_path / "a.avi", 30), 0.6))
    with source:
        frames = list(source)
    assert 0 < len(frames) < 30
    assert f"it is cut off after {len(frames)} frames" in source.failures[0].message


def test_an_unreadable_video_raises_on_entering(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing" * 100)
    with pytest.raises(UserError, match="not a video"), VideoFile(tmp_path / "a.mp4"):
        pass
    with pytest.raises(RuntimeError, match="enter the source"):
        next(iter(VideoFile(tmp_path / "a.mp4")))


def test_masks_beside_their_pictures_are_passed_over_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = cv2.imencode(".png", np.full((16, 16, 3), 90, np.uint8))[1].tobytes()
    for name in ("benign (1).png", "benign (1)_mask.png", "benign (1)_mask_1.png", "x_mask.png", "y.png", "y-GT.png"):
        (tmp_path / name).write_bytes(picture)
    for specification in (tmp_path, tmp_path / "*.png"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            (source,), failures = open_sources([str(specification)])
        assert [file.name for file in source.files] == ["benign (1).png", "x_mask.png", "y.png"]
        assert not failures
        assert [record.getMessage().split(",")[:1] for record in caplog.records] == [["Passed over"]]
        assert "masks beside their pictures: 3" in caplog.text
    (source,), _ = open_sources([str(tmp_path / "y-GT.png")])  # named by itself it is what is wanted
    assert [file.name for file in source.files] == ["y-GT.png"]


def test_what_is_called_a_picture_and_is_no_file_is_said(tmp_path: Path, said: list[str]) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((16, 16, 3), 90, np.uint8))
    (tmp_path / "b.png").symlink_to("gone.png")
    os.mkfifo(tmp_path / "c.mp4")
    (tmp_path / "d.txt").symlink_to("gone.txt")
    (tmp_path / "e.png").mkdir()
    (source,), failures = open_sources([str(tmp_path)])
    assert [file.name for file in source.files] == ["a.png"]
    assert not failures
    (line,) = said
    assert line.startswith("Passed over, broken links and what else is no file: 2, such as ")


def test_nut_files_are_videos(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="needs PyAV (extra video)")
    save_clip(tmp_path / "a.mp4", 5)
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "a.nut"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    (tmp_path / "a.mp4").unlink()
    (video,), failures = open_sources([str(tmp_path)])
    assert not failures
    with video:
        assert [frame.index for frame in video] == list(range(5))


def test_a_long_look_at_a_folder_before_its_first_frame_is_said(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr(scales, "time", SimpleNamespace(monotonic=lambda: next(now)))  # a second a picture
    for number in range(50):
        assert cv2.imwrite(str(tmp_path / f"{number:02}.png"), np.full((40, 40), 1000 + number, np.uint16))
    sources, _ = open_sources([str(tmp_path)])
    (source,) = sources
    with source:
        assert len(list(source)) == 50, source.failures
    looks = [line for line in said if "are looked at" in line]
    assert looks == [
        f"{tmp_path}: {number} of 50 pictures are looked at for the scale that they share." for number in (2, 32)
    ]


def test_many_folders_of_one_picture_each_take_no_longer_than_one_folder(tmp_path: Path) -> None:
    files = [tmp_path / str(number) / "a.png" for number in range(20_000)]
    shared = SharedScales(files)
    began = time.process_time()
    assert [shared.of_picture(file) for file in files] == [None] * len(files)
    assert time.process_time() - began < 2  # it was minutes
