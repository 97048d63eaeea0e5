"""Recordings: whole under their name, playable under their partial one, exact where they must be."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from sink_material import blob, result_of, source_of
from video_files import clip_frame, number_of

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import OverlayStyle, draw_overlay
from espmedsam_edge.runtime.sinks.recording import Recording, mask_video, overlay_video
from espmedsam_edge.runtime.sources.source import SourceFrame
from espmedsam_edge.runtime.video.pyav import has_pyav
from espmedsam_edge.runtime.video.reading import open_video
from espmedsam_edge.runtime.video.writing import PyAvWriter, open_writer

STYLE = OverlayStyle((0, 255, 255))
needs_pyav = pytest.mark.skipif(not has_pyav(), reason="needs PyAV (extra video)")


def write_clip(sink: Recording, frames: int = 6, start: int = 0) -> None:
    for number in range(start, start + frames):
        sink.write(SourceFrame(clip_frame(number), Path("c"), number, number / 10), result_of(blob((48, 64))))


def frames_of(path: Path) -> list[np.ndarray]:
    reader = open_video(path)
    frames = [frame for frame, _ in reader]
    reader.close()
    return frames


def test_an_overlay_video_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "out" / "o.mp4"
    with overlay_video(file, source_of(), STYLE) as sink:
        write_clip(sink)
        assert os.listdir(file.parent) == ["o.partial.mp4"]
    frames = frames_of(file)
    assert open_video(file).fps == 10
    assert [number_of(frame) for frame in frames] == list(range(6))
    expected = draw_overlay(clip_frame(0), blob((48, 64)), STYLE)
    assert np.abs(frames[0].astype(int) - expected).mean() < 8  # a lossy codec with halved chroma
    assert os.listdir(file.parent) == ["o.mp4"]


@needs_pyav
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_recording_can_be_played_at_any_moment(tmp_path: Path, suffix: str) -> None:
    """All frames but the one that was given last are in the file: what SIGKILL leaves is what can be read now."""
    file = tmp_path / f"o{suffix}"
    with overlay_video(file, source_of(live=True), STYLE) as sink:
        for number in range(30):
            write_clip(sink, 1, number)
            if number in (3, 10, 29):
                copy = shutil.copy(tmp_path / f"o.partial{suffix}", tmp_path / f"copy{suffix}")
                assert [number_of(frame) for frame in frames_of(copy)] == [n % 12 for n in range(number)]
    reader = open_video(file)
    assert [time for _, time in reader] == pytest.approx([number / 10 for number in range(30)], abs=2e-3)
    assert reader.damage is None


@needs_pyav
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_recording_cut_at_any_byte_plays_up_to_there(tmp_path: Path, suffix: str) -> None:
    """As a power cut leaves it: a prefix of the file, of any length."""
    sink = overlay_video(tmp_path / f"o{suffix}", source_of(live=True), STYLE)
    sink.__enter__()
    write_clip(sink, 24)
    content = (tmp_path / f"o.partial{suffix}").read_bytes()
    sink.__exit__(None, None, None)
    random = np.random.default_rng(0)
    before = 0
    for length in sorted(random.integers(0, len(content), 40).tolist()):
        (tmp_path / f"cut{suffix}").write_bytes(content[:length])
        try:
            found = [number_of(frame) for frame in frames_of(tmp_path / f"cut{suffix}")]
        except UserError:  # before the first frame is whole there is nothing to play
            found = []
        assert found == [number % 12 for number in range(len(found))]
        assert len(found) >= before
        before = len(found)
    assert before >= 20  # the longest cut is 2 % short of all


@needs_pyav
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("kind", ["blobs", "threads", "noise"])
def test_masks_come_back_exactly(tmp_path: Path, suffix: str, kind: str) -> None:
    random = np.random.default_rng(1)
    size = (97, 131)  # odd on purpose
    rows, columns = np.mgrid[: size[0], : size[1]]
    masks = []
    for number in range(8):
        phase = random.random() * 9
        value = {
            "blobs": np.sin(rows / 9 + phase) + np.cos(columns / 11 + number) > 0.6,
            "threads": np.abs(np.sin(rows / 7 + columns / 13 + phase)) < 0.08,
            "noise": random.random(size) < 0.5,
        }[kind]
        masks.append(value)
    file = tmp_path / f"m{suffix}"
    with mask_video(file, source_of()) as sink:
        for number, mask in enumerate(masks):
            sink.write(SourceFrame(np.zeros((*size, 3), np.uint8), Path("c"), number, number / 10), result_of(mask))
    for mask, frame in zip(masks, frames_of(file), strict=True):
        np.testing.assert_array_equal(frame[: size[0], : size[1], 0] >= 128, mask)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("live", [False, True])
def test_an_interrupted_run_keeps_what_will_not_come_again(
    tmp_path: Path, error: type[BaseException], live: bool
) -> None:
    file = tmp_path / "out" / "o.mp4"

    def interrupted() -> None:
        with overlay_video(file, source_of(live=live), STYLE) as sink:
            write_clip(sink)
            raise error

    with pytest.raises(error):
        interrupted()
    assert os.listdir(file.parent) == (["o.mp4"] if live else [])
    if live:
        assert len(frames_of(file)) == 6


def test_a_video_of_no_frames_is_no_file(tmp_path: Path) -> None:
    with overlay_video(tmp_path / "o.mp4", source_of(), STYLE):
        pass
    assert os.listdir(tmp_path) == []


def test_a_video_that_came_out_incomplete_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = overlay_video(tmp_path / "out" / "o.mp4", source_of(), STYLE)
    sink.__enter__()
    write_clip(sink)
    monkeypatch.setattr(sink._writer, "finish", lambda: False)
    with pytest.raises(UserError, match=r"o\.mp4 came out incomplete"):
        sink.__exit__(None, None, None)
    assert os.listdir(tmp_path / "out") == ["o.partial.mp4"]


@needs_pyav
def test_a_full_disk_is_one_error_and_earlier_frames_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill() -> None:
        with overlay_video(tmp_path / "out" / "o.mp4", source_of(), STYLE) as sink:
            write_clip(sink)

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(sink._writer, "write", full)
            write_clip(sink)

    with pytest.raises(UserError, match=r"no space left to write .*what was written is in .*o\.partial\.mp4"):
        fill()
    assert os.listdir(tmp_path / "out") == ["o.partial.mp4"]
    assert len(frames_of(tmp_path / "out" / "o.partial.mp4")) == 6


@needs_pyav
def test_without_x264_a_recording_survives_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    writer = open_writer(tmp_path / "a.mp4", (48, 64), source_of().fps)  # type: ignore[arg-type]
    assert isinstance(writer, PyAvWriter)
    for number in range(9):
        writer.write(clip_frame(number), number / 10)
    assert [number_of(frame) for frame in frames_of(tmp_path / "a.mp4")] == list(range(8))
    assert writer.finish()
    writer.close()


@needs_pyav
def test_an_older_ffmpeg_writes_plain_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    monkeypatch.setitem(av.library_versions, "libavformat", (61, 1, 100))
    with overlay_video(tmp_path / "o.mp4", source_of(), STYLE) as sink:
        write_clip(sink)
    assert len(frames_of(tmp_path / "o.mp4")) == 6
    assert (tmp_path / "o.mp4").read_bytes().count(b"moof") >= 6
