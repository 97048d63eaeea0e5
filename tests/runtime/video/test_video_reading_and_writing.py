"""Video in and out, by PyAV and by OpenCV, each read back by the other."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from video_files import FRAMES, clip_frame, cut, number_of, save_clip

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.video import pyav, writing
from espmedsam_edge.runtime.video.containers import cut_off, looks_like_video
from espmedsam_edge.runtime.video.pyav import has_pyav
from espmedsam_edge.runtime.video.reading import OpenCvReader, PyAvReader, VideoReader, open_video
from espmedsam_edge.runtime.video.writing import OpenCvWriter, PyAvWriter, VideoWriter, open_writer

needs_pyav = pytest.mark.skipif(not has_pyav(), reason="needs PyAV (extra video)")
READERS = [pytest.param(PyAvReader, marks=needs_pyav), OpenCvReader]
WRITERS = [pytest.param(PyAvWriter, marks=needs_pyav), OpenCvWriter]


def write(writer: VideoWriter, size: tuple[int, int], times: list[float]) -> bool:
    for number, time in enumerate(times):
        writer.write(clip_frame(number, size), time)
    whole = writer.finish()
    writer.close()
    return whole


def constant_times(fps: Fraction, start: float = 0, frames: int = FRAMES) -> list[float]:
    return [start + float(number / fps) for number in range(frames)]


@pytest.mark.parametrize("reader_type", READERS)
@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_every_frame_is_read_in_order_with_its_time(
    tmp_path: Path, reader_type: type[VideoReader], suffix: str
) -> None:
    reader = reader_type(save_clip(tmp_path / f"a{suffix}"))  # type: ignore[call-arg]
    assert reader.fps == 10
    assert reader.length == FRAMES
    frames = list(reader)
    reader.close()
    assert [number_of(frame) for frame, _ in frames] == list(range(FRAMES))
    assert [time for _, time in frames] == pytest.approx(constant_times(Fraction(10)), abs=1e-3)
    assert reader.damage is None
    # Lossy codecs at high quality; chroma is halved, so the square's edges are left out.
    assert np.abs(frames[3][0][18:30, 16:24].astype(int) - (40, 40, 220)).max() <= 24


@pytest.mark.parametrize("reader_type", READERS)
@pytest.mark.parametrize("writer_type", WRITERS)
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_what_is_written_is_read_back(
    tmp_path: Path, writer_type: type[PyAvWriter], reader_type: type[PyAvReader], suffix: str, size: tuple[int, int]
) -> None:
    fps = Fraction(30_000, 1001)
    file = tmp_path / f"a{suffix}"
    assert write(writer_type(file, (48, 64), fps), size, constant_times(fps, start=5))
    reader = reader_type(file)
    frames = list(reader)
    reader.close()
    assert float(reader.fps) == pytest.approx(float(fps), rel=1e-4)
    assert [number_of(frame) for frame, _ in frames] == list(range(FRAMES))
    assert all(frame.shape == (48, 64, 3) for frame, _ in frames)
    # Matroska rounds times to milliseconds.
    assert [time for _, time in frames] == pytest.approx(constant_times(fps), abs=1e-3)


@needs_pyav
def test_uneven_times_survive(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.15, 0.4, 0.5, 0.50001, 0.9]
    assert write(PyAvWriter(tmp_path / "a.mp4", (48, 64), Fraction(10)), (48, 64), times)
    read = [time for _, time in PyAvReader(tmp_path / "a.mp4")]
    assert read == pytest.approx(times, abs=0.1 / 16)
    assert read == sorted(set(read))


@needs_pyav
def test_pyav_writes_h264_that_says_its_colours(tmp_path: Path) -> None:
    import av

    if "libx264" not in av.codecs_available:
        pytest.skip("this FFmpeg has no x264")
    write(PyAvWriter(tmp_path / "a.mp4", (48, 64), Fraction(10)), (48, 64), [0.0, 0.1])
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace, context.color_range) == ("h264", "yuv420p", 6, 1)


def test_a_frame_of_another_size_is_fitted(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "a.mp4", (48, 64), Fraction(10))
    for number in range(4):
        size = (48, 64) if number % 2 else (96, 128)
        writer.write(np.full((*size, 3), 50 * number, np.uint8), number / 10)
    assert writer.finish()
    writer.close()
    frames = [frame for frame, _ in open_video(tmp_path / "a.mp4")]
    assert [round(float(frame.mean()), -1) for frame in frames] == [0, 50, 100, 150]


def test_other_containers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write '\.gif' videos"):
        open_writer(tmp_path / "a.gif", (48, 64), Fraction(10))


@pytest.mark.parametrize("reader_type", READERS)
@pytest.mark.parametrize("kept", [0.9, 0.6])
def test_a_video_that_ends_mid_frame_gives_the_frames_there_are(
    tmp_path: Path, reader_type: type[PyAvReader], kept: float
) -> None:
    reader = reader_type(cut(save_clip(tmp_path / "a.avi", 30), kept))
    frames = [frame for frame, _ in reader]
    reader.close()
    assert 5 <= len(frames) < 30 * kept + 2
    # Motion JPEG decoders fill a half frame with grey: none of those may come through.
    assert [number_of(frame) for frame in frames] == [number % 12 for number in range(len(frames))]
    assert all(np.abs(frame[-8:].astype(int) - 90).max() < 30 for frame in frames)
    assert reader.damage == f"it is cut off after {len(frames)} frames"


@pytest.mark.parametrize("reader_type", READERS)
def test_a_video_without_its_index_cannot_be_read(tmp_path: Path, reader_type: type[PyAvReader]) -> None:
    with pytest.raises(UserError, match="it is cut off, and what is there cannot be decoded") as caught:
        reader_type(cut(save_clip(tmp_path / "a.mp4"), 0.5))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("reader_type", READERS)
def test_what_is_no_video_is_one_line(tmp_path: Path, reader_type: type[PyAvReader]) -> None:
    (tmp_path / "a.mp4").write_bytes(b"this is a text" * 50)
    with pytest.raises(UserError, match="not a video that can be decoded"):
        reader_type(tmp_path / "a.mp4")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UserError, match="it is empty"):
        open_video(tmp_path / "empty.mp4")
    with pytest.raises(UserError, match="no file"):
        open_video(tmp_path / "absent.mp4")


@pytest.mark.parametrize("reader_type", READERS)
def test_frames_over_the_limit_are_refused(
    tmp_path: Path, reader_type: type[PyAvReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save_clip(tmp_path / "a.mp4")
    monkeypatch.setenv("ESPMEDSAM_MAX_PIXELS", "1000")
    with pytest.raises(UserError, match="frames of 64x48 pixels, over the limit of 1000"):
        reader_type(file)


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
@pytest.mark.parametrize("reader", ["PyAV", "OpenCV"])
def test_a_list_of_files_in_disguise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, suffix: str
) -> None:
    """A stranger's file once showed the clip beside it as its own."""
    monkeypatch.setattr("espmedsam_edge.runtime.video.reading.has_pyav", lambda: reader == "PyAV" and has_pyav())
    save_clip(tmp_path / "secret.mp4")
    path = tmp_path / f"a{suffix}"
    for text in ("ffconcat version 1.0\nfile secret.mp4\n", f"ffconcat version 1.0\nfile {path.name}\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="it is a text, not a video"):
            open_video(path)


@needs_pyav
def test_a_playlist_cannot_open_other_files(tmp_path: Path) -> None:
    secret = save_clip(tmp_path / "secret.mp4")
    (tmp_path / "c.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(UserError):
        list(PyAvReader(tmp_path / "c.mp4"))
    (tmp_path / "a.mp4").write_text(f"ffconcat version 1.0\nfile {secret}\n")
    with pytest.raises(UserError):
        list(PyAvReader(tmp_path / "a.mp4"))
    (tmp_path / "b.mp4").write_text(f"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/{secret.name}\n#EXT-X-ENDLIST\n")
    with pytest.raises(UserError):
        list(PyAvReader(tmp_path / "b.mp4"))


QUARTER_TURNS = {
    90: (0, 1 << 16, 0, -(1 << 16), 0, 0),
    180: (-(1 << 16), 0, 0, 0, -(1 << 16), 0),
    270: (0, -(1 << 16), 0, 1 << 16, 0, 0),
}


@needs_pyav
@pytest.mark.parametrize("clockwise", QUARTER_TURNS)
def test_a_phones_rotation_is_applied_the_same_by_both(tmp_path: Path, clockwise: int) -> None:
    file = save_clip(tmp_path / "a.mp4")
    content = bytearray(file.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    struct.pack_into(">6i", content, matrix, *QUARTER_TURNS[clockwise])
    file.write_bytes(content)
    (by_pyav, _), *_ = PyAvReader(file)
    (by_opencv, _), *_ = OpenCvReader(file)
    assert by_pyav.shape == by_opencv.shape
    assert np.abs(by_pyav.astype(int) - by_opencv).mean() < 3  # two decoders' colour conversion
    upright = np.rot90(clip_frame(0), -clockwise // 90)
    assert np.abs(by_pyav.astype(int) - upright).mean() < 6  # lossy


def test_opencv_takes_over_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyav, "find_spec", lambda _: None)
    assert isinstance(open_video(save_clip(tmp_path / "a.mp4")), OpenCvReader)
    monkeypatch.setattr(writing, "has_pyav", lambda: False)
    writer = open_writer(tmp_path / "b.mp4", (47, 63), Fraction(10))
    assert isinstance(writer, OpenCvWriter)
    assert write(writer, (47, 63), constant_times(Fraction(10)))


def _segment_end(content: bytes) -> int:
    """Where the last part of the container ends: a Matroska segment of stated size, or the file."""
    at = content.find(b"\x18\x53\x80\x67")
    if not content.startswith(b"\x1a\x45\xdf\xa3") or at < 0 or content[at + 4] != 0x01:
        return len(content)
    size = int.from_bytes(content[at + 5 : at + 12], "big")
    return len(content) if size == (1 << 56) - 1 else at + 12 + size


@pytest.mark.parametrize("writer_type", WRITERS)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_whole_and_cut_files_are_told_apart(tmp_path: Path, writer_type: type[PyAvWriter], suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    write(writer_type(file, (48, 64), Fraction(10)), (48, 64), constant_times(Fraction(10)))
    content = file.read_bytes()
    assert looks_like_video(content[:16])
    assert not cut_off(file)
    trailer = len(content) - _segment_end(content)  # the maker's mark, which is no part of the video
    for missing in (trailer + 1, trailer + 7, len(content) // 2):
        file.write_bytes(content[:-missing])
        assert cut_off(file)


def test_whole_and_cut_avis_are_told_apart(tmp_path: Path) -> None:
    file = save_clip(tmp_path / "a.avi")
    content = file.read_bytes()
    assert looks_like_video(content[:16])
    assert not cut_off(file)
    file.write_bytes(content + bytes(9))
    assert not cut_off(file)
    file.write_bytes(content[:-4])
    assert cut_off(file)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b"RIFF", b"\x1a\x45\xdf\xa3", b"\0\0\0\x20ftyp", b"\0\0\0\x01ftyp", b""]), st.binary(max_size=200)
)
def test_containers_of_noise_end_in_an_answer(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, rest: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "noise"
    file.write_bytes(start + rest)
    assert cut_off(file) in (True, False)
