"""Videos as phones, recorders, broadcasts and converters leave them; FFmpeg's own decoding is the reference."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from video_files import clip_frame, number_of

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sources.files import VIDEO_SUFFIXES, VideoFile
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.piped import Pipe, source_of
from espmedsam_edge.runtime.video.bounded import Bounded
from espmedsam_edge.runtime.video.containers import START_BYTES, cut_off, looks_like_video
from espmedsam_edge.runtime.video.display import Display, upright
from espmedsam_edge.runtime.video.gstreamer import has_gstreamer
from espmedsam_edge.runtime.video.reading import OpenCvReader, PyAvReader, open_video, plain_rate
from espmedsam_edge.runtime.video.writing import open_writer

av = pytest.importorskip("av", reason="needs PyAV (extra video)")
SIZE = (96, 128)


def encode(
    path: Path,
    codec: str = "libx264",
    *,
    form: str | None = None,
    pixels: str = "yuv420p",
    times: Sequence[int] = range(12),
    base: Fraction = Fraction(1, 25),
    options: dict[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
    pictures: Callable[[int], np.ndarray] = lambda number: clip_frame(number, SIZE),
) -> Path:
    """A clip of FFmpeg's whose pictures stand at ``times``, in units of ``base``."""
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg is built without {codec}")
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = SIZE[0], SIZE[1], pixels
        stream.codec_context.time_base = base
        prepare(stream)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(pictures(number), format="bgr24").reformat(format=pixels)
            frame.pts, frame.time_base = time, base
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def read(path: Path) -> tuple[list[np.ndarray], list[float]]:
    reader = open_video(path)
    try:
        frames = list(reader)
    finally:
        reader.close()
    assert reader.damage is None, reader.damage
    return [frame for frame, _ in frames], [time for _, time in frames]


def test_a_phone_s_uneven_rate_is_read_and_written(tmp_path: Path) -> None:
    steps = 3000 + np.random.default_rng(4).integers(-7, 8, 40)
    ticks = [0, *np.cumsum(steps).tolist()]
    path = encode(tmp_path / "phone.mp4", times=ticks, base=Fraction(1, 90000), options={"bf": "0"})
    reader = open_video(path)
    assert reader.fps.numerator < 1 << 24  # FFmpeg takes no rate of larger numbers
    assert float(reader.fps) == pytest.approx(30, rel=1e-2)  # FFmpeg's own average over 41 frames
    frames = list(reader)
    reader.close()
    assert [time for _, time in frames] == pytest.approx([tick / 90000 for tick in ticks], abs=1e-4)
    writer = open_writer(tmp_path / "again.mp4", SIZE, reader.fps)
    for frame, time in frames:
        writer.write(frame, time)
    assert writer.finish()
    again = read(tmp_path / "again.mp4")[1]
    assert again == pytest.approx([time for _, time in frames], abs=1 / 30 / 16)


@pytest.mark.parametrize(
    ("stated", "plain"),
    [(Fraction(30000, 1001), Fraction(30000, 1001)), (None, 25), (0, 25), (float("nan"), 25), (Fraction(10**9), 25),
     (Fraction(148_500_000, 4_954_957), None), (29.97002997, Fraction(30000, 1001))],
)  # fmt: skip
def test_rates_become_numbers_that_containers_hold(stated: Any, plain: Any) -> None:
    rate = plain_rate(stated)
    assert rate.denominator <= 1001
    assert rate == plain if plain is not None else float(rate) == pytest.approx(float(stated), rel=1e-5)


def test_a_broadcast_s_clock_counts_from_its_first_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "late.ts", form="mpegts", times=range(15_000, 15_012), options={"bf": "0"})
    assert read(path)[1] == pytest.approx([number / 25 for number in range(12)], abs=1e-3)


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv"])
def test_b_frames_come_in_order_with_growing_times(tmp_path: Path, suffix: str) -> None:
    path = encode(tmp_path / f"b{suffix}", "mpeg4", options={"bf": "2", "b_strategy": "0", "q": "2"})
    frames, times = read(path)
    assert [number_of(frame) for frame in frames] == list(range(12))
    assert times == pytest.approx([number / 25 for number in range(12)], abs=2e-3)


@pytest.mark.parametrize("trailer", [bytes(512), b"\x01\x02maker-data" * 40, b"\0\0\0", b"SEFT" + bytes(9)])
def test_bytes_behind_the_last_box_do_not_matter(tmp_path: Path, trailer: bytes) -> None:
    path = encode(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes() + trailer)
    assert not cut_off(path)
    assert len(read(path)[0]) == 12
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert cut_off(path)


@pytest.mark.parametrize(("name", "codec"), [("a.flv", "flv1"), ("a.mxf", "mpeg2video")])
@pytest.mark.parametrize("part", [0.4, 0.8])
def test_recordings_that_are_cut_off_say_so_and_bytes_behind_them_do_not_matter(
    tmp_path: Path, name: str, codec: str, part: float
) -> None:
    path = encode(tmp_path / name, codec, times=range(40), options={"g": "10"})
    data = path.read_bytes()
    for trailer in (b"", bytes(700), b"a maker's notes " * 9):
        path.write_bytes(data + trailer)
        assert len(read(path)[0]) == 40
    path.write_bytes(data[: int(len(data) * part)])
    reader = open_video(path)
    count = len(list(reader))
    reader.close()
    assert 0 < count < 40
    assert reader.damage == f"it is cut off after {count} frames"


@pytest.mark.parametrize("piped", [False, True])
def test_uncompressed_pictures_behind_a_broken_header_or_an_early_end_are_missed(tmp_path: Path, piped: bool) -> None:
    start, size = b"YUV4MPEG2 W64 H48 F25:1 Ip A1:1 C420\n", 64 * 48 * 3 // 2
    random = np.random.default_rng(0)
    heads = [b"FRAME\n", b"FRAME Ip XNOTE\n"] * 5
    frames = [head + random.bytes(size) for head in heads]
    whole, fifth = start + b"".join(frames), len(start) + sum(map(len, frames[:5]))
    broken = whole[:fifth] + b"GRAME" + whole[fifth + 5 :]
    cut = "it is cut off after 5 frames"
    for data, count, damage in (
        (whole, 10, None),
        (whole[:fifth], 5, None),
        (broken, 5, "it is damaged after 5 frames"),
        *((whole[: fifth + more], 5, cut) for more in (1, 5, len(heads[5]), size // 2, len(frames[5]) - 1)),
    ):
        path = tmp_path / "clip.y4m"
        path.write_bytes(data)
        reader = PyAvReader(path, io.BytesIO(data) if piped else None)
        assert (sum(1 for _ in reader), reader.damage) == (count, damage)
        reader.close()


def test_a_video_cut_off_before_its_tracks_is_said_to_be(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mov", times=range(40))
    data = path.read_bytes()
    for end in range(data.index(b"moov") + 8, len(data), 29):
        path.write_bytes(data[:end])
        said = ""
        try:
            reader = open_video(path)
        except UserError as error:
            said = str(error)
        else:
            list(reader)
            reader.close()
            said = str(reader.damage)
        assert "it is cut off" in said


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("control", ["none", "first", "last", "all"])
def test_a_gif_gives_all_pictures_though_none_states_its_time(tmp_path: Path, count: int, control: str) -> None:
    Image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(count)
    pictures, pieces = [], []
    for number in range(count):
        noise = Image.fromarray(random.integers(0, 256, (*SIZE, 3), np.uint8))
        noise.quantize(16).save(tmp_path / "one.gif", optimize=False)
        pictures.append(np.asarray(Image.open(tmp_path / "one.gif").convert("RGB")))
        data = (tmp_path / "one.gif").read_bytes()
        at = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
        table = data[13 : 13 + 3 * 2 ** ((data[10] & 7) + 1)]
        own = bytes([0x80 | data[at + 9] & 0x40 | data[10] & 7]) + table  # its own colours; interlaced or not
        has = {"none": False, "all": True, "first": number == 0, "last": number == count - 1}[control]
        pieces.append((b"\x21\xf9\x04\0\x0a\0\0\0" if has else b"") + data[at : at + 9] + own + data[at + 10 : -1])
    screen = b"GIF89a" + struct.pack("<HHBBB", SIZE[1], SIZE[0], 0, 0, 0)
    path = tmp_path / "a.gif"
    path.write_bytes(screen + b"".join(pieces) + b"\x3b")
    frames, times = read(path)
    assert all(later > earlier for earlier, later in pairwise(times))
    for frame, picture in zip(frames, pictures, strict=True):
        assert np.array_equal(frame, picture[..., ::-1])


def test_digital_video_tape_is_read_by_name_and_by_content(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "tape.avi"), "w") as container:
        stream = container.add_stream("dvvideo", rate=25)
        stream.height, stream.width, stream.pix_fmt = 576, 720, "yuv420p"
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(clip_frame(number, (576, 720)), format="bgr24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "tape.avi")) as container:
        tape = b"".join(bytes(packet) for packet in container.demux(video=0))
    (tmp_path / "tape.avi").unlink()
    (tmp_path / "tape.dv").write_bytes(tape)
    (source,), failures = open_sources([str(tmp_path)])
    assert (source.kind, failures) == ("video", [])
    assert [number_of(frame) for frame in read(tmp_path / "tape.dv")[0]] == list(range(4))
    assert looks_like_video(tape[:START_BYTES])


def with_cover(path: Path) -> None:
    """Put a cover picture before the track, as drones and apps do; FFmpeg makes it stream 0."""
    import cv2

    def box(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(body), kind) + body

    cover = cv2.imencode(".jpg", np.full((90, 160, 3), 200, np.uint8))[1].tobytes()
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    item = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + cover))
    extra = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", item)))
    data = path.read_bytes()
    at = data.index(b"moov") - 4  # stands last, so nothing that it points to moves
    size = struct.unpack_from(">I", data, at)[0]
    header = at + 8 + struct.unpack_from(">I", data, at + 8)[0]
    path.write_bytes(data[:at] + struct.pack(">I", size + len(extra)) + data[at + 4 : header] + extra + data[header:])


def test_a_cover_picture_is_not_the_video(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = encode(tmp_path / "cover.mp4")
    with_cover(path)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mjpeg"
    frames, _ = read(path)
    assert [number_of(frame) for frame in frames] == list(range(12))
    assert not caplog.records


def test_of_several_videos_the_largest_is_read_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "preview.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for height, width in ((48, 64), SIZE):
            stream = container.add_stream("mpeg4", rate=25, options={"q": "2"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            streams.append(stream)
        for number in range(12):
            for stream in streams:
                picture = clip_frame(number, (stream.height, stream.width))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
        for stream in streams:
            container.mux(stream.encode(None))
    assert {frame.shape for frame in read(path)[0]} == {(*SIZE, 3)}
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} holds 2 video streams; number 2, of 128x96, is read."
    ]


def corners(number: int) -> np.ndarray:
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[: SIZE[0] // 2, : SIZE[1] // 2] = (40, 40, 220)
    picture[: SIZE[0] // 2, SIZE[1] // 2 :] = (40, 220, 40)
    picture[SIZE[0] // 2 :, : SIZE[1] // 2] = (220, 40, 40)
    return picture


# Of the MP4 track header's matrix: x' = ax + cy, y' = bx + dy.
MATRICES = {
    (1, 0, 0, 1): lambda p: p, (-1, 0, 0, 1): lambda p: p[:, ::-1], (1, 0, 0, -1): lambda p: p[::-1],
    (-1, 0, 0, -1): lambda p: p[::-1, ::-1], (0, 1, -1, 0): lambda p: np.rot90(p, -1), (0, -1, 1, 0): np.rot90,
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2), (0, -1, -1, 0): lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
}  # fmt: skip


@pytest.mark.parametrize("matrix", MATRICES)
def test_pictures_are_turned_and_mirrored_as_they_play(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = encode(tmp_path / "a.mp4", pictures=corners, options={"crf": "5"})
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    expected = MATRICES[matrix](corners(0))
    assert np.array_equal(upright(corners(0), matrix), expected)
    frame = read(path)[0][0]
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 6  # lossy, chroma halved


def test_a_reader_leaves_nothing_to_the_garbage_collector(tmp_path: Path) -> None:
    """150 clips beside a camera once held 80 MB of decoders that waited for it."""
    path = encode(tmp_path / "a.mp4")
    read(path)
    gc.collect()
    gc.disable()
    try:
        read(path)
        assert not [found for found in gc.get_objects() if type(found) is av.VideoFrame and found.width > 16]
    finally:
        gc.enable()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_recording_plays_in_the_shape_of_its_source(tmp_path: Path, suffix: str) -> None:
    def pal(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(16, 15)

    path = encode(tmp_path / "pal.mp4", prepare=pal)
    with VideoFile(path) as source:
        frames = list(source)
    assert {frame.aspect for frame in frames} == {Fraction(16, 15)}
    writer = open_writer(tmp_path / f"out{suffix}", SIZE, Fraction(25), aspect=frames[0].aspect)
    for frame in frames:
        writer.write(frame.image, frame.time or 0.0)
    assert writer.finish()
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        (stream,) = container.streams.video
        assert stream.sample_aspect_ratio == Fraction(16, 15)
        assert (stream.height, stream.width) == SIZE
    assert {Display(stated).aspect for stated in (Fraction(0), None, Fraction(900))} == {1}


RECORDERS = {
    "00001.MTS": ("mpegts", "libx264", "yuv420p"), "VTS_01_1.VOB": ("vob", "mpeg2video", "yuv420p"),
    "capture.h264": ("h264", "libx264", "yuv420p"), "capture.265": ("hevc", "libx265", "yuv420p"),
    "clip.asf": ("asf", "mpeg4", "yuv420p"), "clip.ogv": ("ogg", "libtheora", "yuv420p"),
    "loop.gif": ("gif", "gif", "rgb8"), "clip.mxf": ("mxf", "mpeg2video", "yuv420p"),
    "clip.mjpeg": ("mjpeg", "mjpeg", "yuvj420p"), "clip.y4m": ("yuv4mpegpipe", "wrapped_avframe", "yuv420p"),
    "clip.flv": ("flv", "flv1", "yuv420p"), "clip.webm": ("webm", "libvpx", "yuv420p"),
    "clip.m2v": ("mpeg2video", "mpeg2video", "yuv420p"), "clip.mpg": ("mpeg", "mpeg1video", "yuv420p"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDERS)
def test_what_recorders_leave_is_read_by_name_in_a_folder_and_by_content(tmp_path: Path, name: str) -> None:
    form, codec, pixels = RECORDERS[name]
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = encode(tmp_path / name, codec, form=form, pixels=pixels, options=quiet)
    assert path.suffix.lower() in VIDEO_SUFFIXES or name.endswith(".gif")
    if not name.endswith((".gif", ".mjpeg")):  # these start as pictures do
        assert looks_like_video(path.read_bytes()[:START_BYTES])
        path.with_suffix("").write_bytes(path.read_bytes())
        (unnamed,), failures = open_sources([str(path.with_suffix(""))])
        assert (unnamed.kind, failures) == ("video", [])
        path.with_suffix("").unlink()
    (source,), failures = open_sources([str(tmp_path)])
    assert (source.kind, failures) == ("video", [])
    with source, av.open(str(path)) as container:
        frames = list(source)
        assert len(frames) == sum(1 for _ in container.decode(video=0))
    times = [frame.time or 0.0 for frame in frames]
    assert times[0] == 0
    assert all(later > earlier for earlier, later in pairwise(times))


def test_a_file_that_vanishes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4")
    opened = Bounded.file

    def gone(file: Path) -> Bounded:
        path.unlink()
        return opened(file)

    monkeypatch.setattr(Bounded, "file", gone)
    with pytest.raises(UserError, match="it is not a video that can be decoded here"):
        open_video(path)


def test_texts_and_pictures_do_not_look_like_video() -> None:
    random = np.random.default_rng(0)
    for start in (b"", b"GGGG", b"hello, this is text", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBPVP8 ", bytes(1024)):
        assert not looks_like_video(start)
    assert not any(looks_like_video(b"\x80" + random.bytes(1023)) for _ in range(200))


def test_numbered_pictures_are_named_as_in_ffmpeg(tmp_path: Path) -> None:
    import cv2

    for name in ("f_0002.png", "f_0010.png", "f_0001.png", "f_12345.png", "f_x.png", "g_0001.png", "f_1.png"):
        cv2.imwrite(str(tmp_path / name), corners(0))
    (source,), _ = open_sources([str(tmp_path / "f_%04d.png")])
    assert [file.name for file in source.files] == ["f_0001.png", "f_0002.png", "f_0010.png"]
    (source,), _ = open_sources([str(tmp_path / "f_%d.png")])
    assert [file.name for file in source.files][-1] == "f_12345.png"
    (tmp_path / "h_%04d.png").write_bytes((tmp_path / "f_1.png").read_bytes())  # a file of that name goes first
    (source,), _ = open_sources([str(tmp_path / "h_%04d.png")])
    assert [file.name for file in source.files] == ["h_%04d.png"]


@pytest.mark.skipif(not has_gstreamer(), reason="needs GStreamer for Python (make test-packages)")
def test_libraries_that_throw_work_after_gstreamer() -> None:
    """Its libunwind took the place of libgcc's: the next C++ exception, as in importing Matplotlib, was the end."""
    script = (
        "from espmedsam_edge.runtime.video.gstreamer import has_element\n"
        "has_element('nvv4l2decoder')\n"
        "import matplotlib.pyplot\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


OTHER_STREAM = {"mpegts_start_pid": "0x200", "mpegts_pmt_start_pid": "0x1100"}


def transport(path: Path, first: int, options: dict[str, str] | None = None) -> bytes:
    """20 frames of a transport stream from number ``first`` on, without B-frames."""
    with av.open(str(path), "w", format="mpegts", options=options or {}) as container:
        stream = container.add_stream("mpeg2video", rate=25, options={"q": "2", "g": "5"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for number in range(first, first + 20):
            frame = av.VideoFrame.from_ndarray(clip_frame(number, SIZE), format="bgr24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize("packet", [188, 192, 204])
def test_a_recording_that_goes_on_in_another_stream_is_said_to(tmp_path: Path, packet: int) -> None:
    path = tmp_path / "recording.ts"
    first, second = (transport(path, start, options) for start, options in ((0, None), (20, OTHER_STREAM)))

    def packed(data: bytes) -> bytes:
        before, after = {188: (b"", b""), 192: (b"TIME", b""), 204: (b"", bytes(16))}[packet]
        return b"".join(before + data[at : at + 188] + after for at in range(0, len(data), 188))

    for data in (first, second):
        path.write_bytes(packed(data))
        assert len(read(path)[0]) == 20
    path.write_bytes(packed(first) + packed(second))
    reader = open_video(path)
    assert len(list(reader)) == 20
    reader.close()
    assert reader.damage == "its pictures go on in another stream after 20 frames"


def test_two_programmes_beside_each_other_are_no_change_of_stream(tmp_path: Path) -> None:
    """As in the largest of several: packets of both come in turn until the end."""
    with av.open(str(tmp_path / "two.ts"), "w", format="mpegts") as container:
        streams = []
        for side in (1, 2):
            stream = container.add_stream("mpeg2video", rate=25, options={"q": "2", "g": "5"})
            stream.height, stream.width, stream.pix_fmt = SIZE[0] * side, SIZE[1] * side, "yuv420p"
            streams.append(stream)
        for number in range(30):
            for stream in streams:
                picture = clip_frame(number, (stream.height, stream.width))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
        for stream in streams:
            container.mux(stream.encode(None))
    assert {frame.shape[:2] for frame in read(tmp_path / "two.ts")[0]} == {(2 * SIZE[0], 2 * SIZE[1])}


def test_pictures_that_change_their_size_midway_are_all_read(tmp_path: Path) -> None:
    parts = []
    for side in (1, 2):
        size = (SIZE[0] * side, SIZE[1] * side)

        def prepare(stream: Any, size: tuple[int, int] = size) -> None:
            stream.height, stream.width = size

        def picture(number: int, size: tuple[int, int] = size) -> np.ndarray:
            return clip_frame(number, size)

        parts.append(encode(tmp_path / "part.h264", prepare=prepare, pictures=picture).read_bytes())
    (tmp_path / "both.h264").write_bytes(b"".join(parts))
    frames, times = read(tmp_path / "both.h264")
    assert [frame.shape[:2] for frame in frames] == [SIZE] * 12 + [(2 * SIZE[0], 2 * SIZE[1])] * 12
    assert times == pytest.approx([number / 25 for number in range(24)], abs=1e-6)


@pytest.mark.parametrize(("suffix", "kind"), [(".mkv", "ass"), (".mp4", "data"), (".ts", "data")])
def test_tracks_of_text_and_data_beside_the_pictures_do_not_matter(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"with{suffix}"
    with av.open(str(path), "w") as container:
        other = container.add_stream("ass") if kind == "ass" else container.add_data_stream("bin_data")
        video = container.add_stream("mpeg4", rate=25, options={"q": "2"})
        video.height, video.width, video.pix_fmt = *SIZE, "yuv420p"
        for number in range(12):
            container.mux(video.encode(av.VideoFrame.from_ndarray(clip_frame(number, SIZE), format="bgr24")))
            packet = av.Packet(b"a note")
            packet.stream, packet.time_base = other, Fraction(1, 1000)
            packet.pts = packet.dts = 40 * number
            packet.duration = 40
            container.mux(packet)
        container.mux(video.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams) == 2
    frames, times = read(path)
    assert [number_of(frame) for frame in frames] == list(range(12))
    assert times == pytest.approx([number / 25 for number in range(12)], abs=2e-3)


def test_an_avi_of_several_gigabyte_parts_is_cut_off_where_its_last_part_is(tmp_path: Path) -> None:
    """OpenDML: parts of 1 GB each, behind the first marked AVIX; here without their pictures, as holes."""
    path, part = tmp_path / "long.avi", 1 << 30
    with path.open("wb") as stream:
        for number, kind in enumerate((b"AVI ", b"AVIX", b"AVIX")):
            stream.seek(number * part)
            stream.write(b"RIFF" + struct.pack("<I", part - 8) + kind)
        stream.truncate(3 * part)
    assert path.stat().st_blocks < 1000
    assert not cut_off(path)
    with path.open("r+b") as stream:
        stream.truncate(3 * part - 1)
    assert cut_off(path)


CLIPS: dict[str, dict[str, Any]] = {
    "open.mp4": {"codec": "libx264", "options": {"g": "8", "bf": "3", "x264-params": "open-gop=1"}},
    "uneven.mp4": {"codec": "libx264", "options": {"g": "7"}, "times": np.cumsum(np.arange(60) % 5 + 1).tolist()},
    "late.ts": {"codec": "libx264", "options": {"g": "9"}, "form": "mpegts", "times": range(15_000, 15_060)},
    "open.mkv": {"codec": "libx265", "options": {"x265-params": "keyint=8:min-keyint=8:open-gop=1:log-level=none"}},
    "refreshed.mp4": {"codec": "libx264", "options": {"g": "10", "x264-params": "intra-refresh=1"}},
    "b.mpg": {"codec": "mpeg2video", "options": {"g": "6", "bf": "2"}},
    "one.mp4": {"codec": "libx264", "options": {"g": "1000"}},
    "b.avi": {"codec": "mpeg4", "options": {"g": "6", "bf": "2", "b_strategy": "0"}},
    "stills.mov": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "a.h264": {"codec": "libx264", "options": {"g": "7"}},
    "a.webm": {"codec": "libvpx-vp9", "options": {"g": "6", "auto-alt-ref": "1", "lag-in-frames": "10"}},
}


@pytest.mark.parametrize("name", CLIPS)
def test_what_comes_after_the_start_is_what_decoding_from_the_first_frame_gives(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (60, *SIZE, 3), np.uint8)

    def picture(number: int) -> np.ndarray:
        return np.asarray(clip_frame(number, SIZE) // 2 + noise[number] // 6, np.uint8)

    path = encode(tmp_path / name, **{"times": range(60), "pictures": picture, **CLIPS[name]})
    reader = open_video(path)
    whole = [(index, frame.tobytes(), time) for index, (frame, time) in enumerate(reader)]
    reader.close()
    last = whole[-1][2]
    assert len(whole) == 60
    for start in (0.01, whole[5][2], *np.linspace(0, last, 9)[1:].tolist(), last + 1):
        reader = open_video(path)
        reader.start = start
        got = [(reader.skipped + number, frame.tobytes(), time) for number, (frame, time) in enumerate(reader)]
        reader.close()
        wanted = [one for one in whole if one[2] >= start]
        assert [one for one in got if one[2] >= start] == wanted
        if name not in ("b.avi", "b.mpg", "a.h264"):
            assert got == wanted


class Packets:
    """A reader's packets, counted as they are decoded; of those of some numbers no time is known."""

    def __init__(self, reader: Any, timeless: Sequence[int] = ()) -> None:
        self.decoded = 0
        packets = reader._packets
        reader._packets = lambda: (self._counted(packet, number in timeless) for number, packet in enumerate(packets()))

    def _counted(self, packet: Any, timeless: bool) -> Any:
        packets = self

        class Counted:
            def __getattr__(self, name: str) -> Any:
                return None if timeless and name == "pts" else getattr(packet, name)

            def decode(self) -> Any:
                packets.decoded += 1
                return packet.decode()

        return Counted()


def test_the_start_is_reached_without_decoding_what_lies_before(tmp_path: Path) -> None:
    reader: Any = open_video(encode(tmp_path / "long.mp4", times=range(400), options={"g": "10", "bf": "0"}))
    packets = Packets(reader)
    reader.start = 15.0
    assert len(list(reader)) == 400 - 15 * 25
    assert reader.skipped == 375
    assert packets.decoded < 100  # of 400; the decoder's threads each take one before the first frame comes
    reader.close()


@pytest.mark.parametrize("name", ["a.mp4", "late.ts"])
@pytest.mark.parametrize("timeless", [3, 20, 45])
def test_where_a_time_is_missing_all_is_decoded(tmp_path: Path, name: str, timeless: int) -> None:
    times = range(15_000, 15_060) if name == "late.ts" else range(60)
    path = encode(tmp_path / name, times=times, options={"g": "6", "bf": "0"})
    frames, stated = read(path)
    reader: Any = open_video(path)
    Packets(reader, [timeless])
    reader.start = 2.0
    got = list(reader)
    reader.close()
    assert reader.skipped == 50
    assert [time for _, time in got] == stated[50:]
    assert all(np.array_equal(frame, expected) for (frame, _), expected in zip(got, frames[50:], strict=True))


@pytest.mark.parametrize("name", [name for name in CLIPS if name not in ("a.h264", "b.mpg", "open.mkv")])
def test_times_and_pictures_are_those_of_opencvs_own_ffmpeg(tmp_path: Path, name: str) -> None:
    """Another build of FFmpeg, and another's way of asking it; its times count from a container's clock."""
    path = encode(tmp_path / name, **{"times": range(60), **CLIPS[name]})
    frames, times = read(path)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        pytest.skip("OpenCV's FFmpeg does not read this codec")
    theirs, stated = [], []
    while True:
        done, picture = capture.read()
        if not done:
            break
        theirs.append(picture)
        stated.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    capture.release()
    assert len(frames) == len(theirs) == 60
    if name != "b.avi":  # of which OpenCV gives the order of storing
        assert times == pytest.approx([time - stated[0] for time in stated], abs=2e-3)
    for ours, other in zip(frames, theirs, strict=True):
        assert ours.shape == other.shape
        assert np.abs(ours.astype(int) - other).mean() < 3  # two decoders' colour conversion


def avi_with_one_chunk(path: Path, codec: bytes, begin: bytes, size: int) -> Path:
    """An AVI whose only packet is so large, zeros behind its beginning: a few kilobytes in an archive."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content

    main = struct.pack("<14I", 40000, 0, 0, 16, 1, 0, 1, 0, 128, 96, 0, 0, 0, 0)
    stream = b"vids" + codec + struct.pack("<I2H8I4H", 0, 0, 0, 0, 1, 25, 0, 1, 0, 2**32 - 1, 0, 0, 0, 128, 96)
    pictures = struct.pack("<Iii2H4sIiiII", 40, 128, 96, 1, 24, codec, 128 * 96 * 3, 0, 0, 0, 0)
    list_of = chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", pictures))
    header = chunk(b"LIST", b"hdrl" + chunk(b"avih", main) + list_of)
    movie = b"LIST" + struct.pack("<I", 12 + size) + b"movi00dc" + struct.pack("<I", size)
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(header) + 20 + size) + b"AVI " + header + movie + begin)
    os.truncate(path, path.stat().st_size - len(begin) + size)
    return path


def endless(name: str, start: int, folder: Path) -> Path:
    """A file of 128 MiB whose last picture never ends."""
    if name == "a.avi":
        codec, begin = ((b"H264", b"\0\0\0\1\x67"), (b"MJPG", b"\xff\xd8"))[start]
        return avi_with_one_chunk(folder / name, codec, begin, 1 << 27)
    options = {"codec": "mjpeg", "pixels": "yuvj420p"} if name == "a.mjpeg" else {}
    file = encode(folder / name, **options)  # type: ignore[arg-type]
    if not start:
        file.write_bytes(b"")
    os.truncate(file, 1 << 27)  # of zeros, to the end
    return file


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc to count what is read")
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("name", ["a.h264", "a.mjpeg", "a.avi", "a.mkv"])
def test_a_file_in_which_no_picture_ends_is_not_read_to_its_end(
    name: str, start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bounded, "MOST", 8 << 20)
    file = endless(name, start, tmp_path)

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before, told = read_so_far(), ""
    try:
        video = open_video(file)
        for _ in video:
            pass
        told = video.damage or ""
        video.close()
    except UserError as error:
        told = error.message
    assert told
    assert read_so_far() - before < 1 << 26


@pytest.mark.parametrize("name", ["a.h264", "a.mjpeg", "a.avi", "a.mkv"])
def test_a_pipe_in_which_no_picture_ends_is_not_read_to_its_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bounded, "MOST", 8 << 20)
    file, sent = endless(name, 1, tmp_path), 0
    receiver, sender = os.pipe()

    def send() -> None:
        nonlocal sent
        with contextlib.suppress(BrokenPipeError), file.open("rb") as content, open(sender, "wb", 0) as pipe:
            while data := content.read(1 << 16):
                pipe.write(data)
                sent += len(data)

    sending = threading.Thread(target=send)
    sending.start()
    with source_of(Pipe(receiver)) as source:
        frames = list(source)
        assert source.failures
        assert len(frames) >= (0 if name == "a.avi" else 10)
    os.close(receiver)
    sending.join()
    assert sent < 1 << 26


def test_opencv_is_not_asked_for_what_it_would_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bounded, "MOST", 8 << 20)
    with pytest.raises(UserError, match="PyAV reads it"):
        OpenCvReader(endless("a.h264", 1, tmp_path))
    whole = encode(tmp_path / "b.h264")
    assert len(list(OpenCvReader(whole))) >= 10
    movie = encode(tmp_path / "c.mkv")
    os.truncate(movie, 1 << 27)  # behind the segment's end
    assert len(list(OpenCvReader(movie))) == 12
