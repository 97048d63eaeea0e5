"""Pipes: what comes on standard input is segmented as it comes, and the overlay goes out on standard output."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from video_files import clip_frame, number_of

from espmedsam_edge import Outputs, ReadingOptions, Segmenter, infer
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sources.piped import Pipe, PipedPicture, PipedVideo, source_of
from espmedsam_edge.runtime.sources.source import Source, SourceFrame

av = pytest.importorskip("av", reason="needs PyAV (extra video)")

FRAMES = 12


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def encoded(form: str, codec: str, pixels: str, frames: int = FRAMES, **options: str) -> bytes:
    """What FFmpeg's ``-f FORM -`` would send of the clip of ``video_files``, 10 frames a second."""
    content = io.BytesIO()
    with av.open(content, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(clip_frame(number), format="bgr24").reformat(format=pixels)
            picture.pts, picture.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return content.getvalue()


VIDEOS = {
    "matroska": ("matroska", "libx264", "yuv420p"),
    "mpegts": ("mpegts", "libx264", "yuv420p"),
    "avi": ("avi", "mpeg4", "yuv420p"),
    "mjpeg": ("mjpeg", "mjpeg", "yuvj420p"),
    "pngs": ("image2pipe", "png", "rgb24"),
    "h264": ("h264", "libx264", "yuv420p"),
}


def picture_file(suffix: str) -> bytes:
    return cv2.imencode(suffix, clip_frame(3))[1].tobytes()


def dribbled(data: bytes, seed: int = 0) -> tuple[Pipe, threading.Thread]:
    """A pipe that gives the bytes in pieces of any size."""
    out, into = os.pipe()

    def send() -> None:
        sizes, at = random.Random(seed), 0
        with open(into, "wb", buffering=0) as stream:
            while at < len(data):
                size = sizes.choice((1, 3, 1000, 70000))
                try:
                    stream.write(data[at : at + size])
                except BrokenPipeError:
                    return
                at += size

    thread = threading.Thread(target=send)
    thread.start()
    return Pipe(out), thread


def read(data: bytes, seed: int = 0) -> tuple[Source, list[SourceFrame]]:
    pipe, thread = dribbled(data, seed)
    source = source_of(pipe)
    with source:
        frames = list(source)
    thread.join()
    return source, frames


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_is_read_as_it_comes(name: str) -> None:
    source, frames = read(encoded(*VIDEOS[name]), seed=len(name))
    assert isinstance(source, PipedVideo)
    assert source.failures == []
    assert [number_of(frame.image) for frame in frames] == list(range(FRAMES))
    assert [frame.index for frame in frames] == list(range(FRAMES))
    if name in ("matroska", "mpegts", "avi"):
        assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in range(FRAMES)], abs=1e-3)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".bmp", ".webp"])
def test_a_picture_is_one(suffix: str) -> None:
    for trailing in (b"", bytes(5000)):
        source, frames = read(picture_file(suffix) + trailing)
        assert isinstance(source, PipedPicture)
        expected = cv2.imdecode(np.frombuffer(picture_file(suffix), np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(frames[0].image, expected)
        assert len(frames) == 1


def test_of_several_pictures_the_first_is_taken_and_that_is_said(said: list[str]) -> None:
    stack = io.BytesIO()
    first, *others = (Image.fromarray(clip_frame(number)[..., ::-1]) for number in range(3))
    first.save(stack, "TIFF", save_all=True, append_images=others)
    _, frames = read(stack.getvalue())
    np.testing.assert_array_equal(frames[0].image, clip_frame(0))
    assert len(frames) == 1
    assert said == ["standard input holds 3 pictures, of which the first is taken. Give all as a file."]


def test_a_progressive_jpeg_with_a_preview_is_one_picture() -> None:
    preview = picture_file(".jpg")
    whole = cv2.imencode(".jpg", clip_frame(3), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    inside = b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview
    source, frames = read(whole[:2] + inside + whole[2:])
    assert isinstance(source, PipedPicture)
    assert len(frames) == 1
    phone = b"\xff\xe2" + (16).to_bytes(2, "big") + b"MPF\0" + bytes(10)
    source, _ = read(whole[:2] + phone + whole[2:] + preview)
    assert isinstance(source, PipedPicture)


def test_frames_come_before_the_sender_has_ended() -> None:
    """Of a camera's pipe nobody knows the end."""
    data = encoded("matroska", "libx264", "yuv420p", 200, cluster_time_limit="100")
    out, into = os.pipe()
    os.write(into, data[: len(data) * 3 // 4])  # less than a pipe holds
    source = source_of(Pipe(out))
    with source:
        frames = iter(source)
        assert [next(frames).index for _ in range(20)] == list(range(20))
        assert isinstance(source, PipedVideo)
        source.interrupt()
        assert all(frame.index >= 20 for frame in frames)  # and it ends
    os.close(into)


def test_what_is_nothing_is_one_line() -> None:
    playlist = b"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nsecret.ts\n#EXT-X-ENDLIST\n"
    Path("secret.ts").write_bytes(encoded("mpegts", "libx264", "yuv420p"))
    Path("list").write_bytes(f"ffconcat version 1.0\nfile {Path('secret.ts').absolute()}\n".encode())
    for data, words in (
        (b"", "nothing came"),
        (b"hello\n", "no picture or video"),
        (bytes(5000), "no picture or video"),
        (bytes(128) + b"DICM" + bytes(100), "DICOM"),
        (playlist, "no picture or video"),
        (Path("list").read_bytes(), "no picture or video"),
        (encoded("mp4", "libx264", "yuv420p")[:40], "no picture or video"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            read(data)
        assert "\n" not in str(caught.value)
    source, frames = read(picture_file(".png")[:100])
    assert frames == []
    assert len(source.failures) == 1


def command(bundle: Bundle, *options: str) -> list[str]:
    return [sys.executable, "-m", "espmedsam_edge", "infer", str(bundle.path), *options]


def piped(bundle: Bundle, data: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(bundle, *options), input=data, capture_output=True, timeout=60)


def test_a_video_comes_in_and_goes_out(toy_bundle: Bundle) -> None:
    """The whole way by processes; FFmpeg's library reads what came out, and only that came."""
    data = encoded("matroska", "libx264", "yuv420p")
    done = piped(toy_bundle, data, "-", "--out", "-", "--csv", "areas.csv")
    assert done.returncode == 0, done.stderr
    assert b"12 frames in" in done.stderr
    with av.open(io.BytesIO(done.stdout)) as container:
        assert container.format.name == "matroska,webm"
        came = [(frame.time, frame.to_ndarray(format="bgr24")) for frame in container.decode(video=0)]
    assert [time for time, _ in came] == pytest.approx([number / 10 for number in range(FRAMES)], abs=0.01)
    Path("same.mkv").write_bytes(data)
    infer("same.mkv", toy_bundle, Outputs(out="overlay.mkv", csv="same.csv"))
    with av.open("overlay.mkv") as container:
        expected = [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]
    for (_, picture), wanted in zip(came, expected, strict=True):
        assert cv2.PSNR(picture, wanted) > 35
    areas = [line.split(",", 1)[1] for line in Path("areas.csv").read_text().splitlines()]
    assert areas == [line.split(",", 1)[1] for line in Path("same.csv").read_text().splitlines()]


def test_two_of_them_one_behind_the_other(toy_bundle: Bundle) -> None:
    first = subprocess.Popen(
        command(toy_bundle, "test://fundus?size=64x48&live=no", "--frames", "5", "--out", "-"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    second = subprocess.run(
        command(toy_bundle, "-", "--csv", "areas.csv"), stdin=first.stdout, capture_output=True, timeout=60, check=True
    )
    first.communicate()
    assert first.returncode == 0
    assert b"5 frames in" in second.stderr + second.stdout
    assert len(Path("areas.csv").read_text().splitlines()) == 6


def test_a_picture_comes_in_and_goes_out(toy_bundle: Bundle) -> None:
    done = piped(toy_bundle, picture_file(".png"), "-", "--out", "-", "--masks", "m")
    assert done.returncode == 0, done.stderr
    overlay = cv2.imdecode(np.frombuffer(done.stdout, np.uint8), cv2.IMREAD_UNCHANGED)
    assert overlay.shape == (48, 64, 3)
    with Segmenter.load(toy_bundle) as segmenter:
        expected = segmenter.segment(clip_frame(3)).mask
    np.testing.assert_array_equal(cv2.imread("m/stdin.png", cv2.IMREAD_UNCHANGED), expected)


def test_a_redirected_file_may_have_its_index_at_the_end(toy_bundle: Bundle) -> None:
    Path("c.mp4").write_bytes(encoded("mp4", "libx264", "yuv420p"))
    with open("c.mp4", "rb") as file:
        subprocess.run(
            command(toy_bundle, "-", "--csv", "a.csv"), stdin=file, capture_output=True, timeout=60, check=True
        )
    assert len(Path("a.csv").read_text().splitlines()) == FRAMES + 1


@pytest.mark.parametrize("data", [b"", b"hello"])
def test_errors_are_one_line(toy_bundle: Bundle, data: bytes) -> None:
    done = piped(toy_bundle, data, "-", "--csv", "a.csv", "--quiet")
    assert done.returncode == 1
    failed = [line for line in done.stderr.decode().splitlines() if line.startswith("failed:")]
    assert len(failed) == 1
    assert "standard input" in failed[0]
    assert b"Traceback" not in done.stderr


def test_without_a_modality_it_is_asked_for() -> None:
    with pytest.raises(UserError, match="cannot be told"):
        infer("-")


@pytest.mark.parametrize("source", ["test://fundus?size=640x480&live=no", "test://fundus?size=640x480&fps=200"])
def test_a_reader_that_goes_ends_the_run_with_one_line(toy_bundle: Bundle, source: str) -> None:
    with subprocess.Popen(
        command(toy_bundle, source, "--out", "-"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.read(2000)
        run.stdout.close()
        told = run.stderr.read().decode()
        assert run.wait(60) == 1
    assert [line for line in told.splitlines() if "standard output" in line and "gone" in line] != []
    assert told.count("has gone") == 1
    assert "Traceback" not in told
    assert "Exception" not in told


def _started(bundle: Bundle, *options: str) -> Any:
    return subprocess.Popen(
        command(bundle, "-", *options), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_ctrl_c_keeps_what_came_by_a_pipe_that_goes_on(toy_bundle: Bundle) -> None:
    """A camera's pipe cannot be read again, so it ends as a live source does; nothing hangs though it stays open."""
    data = encoded("matroska", "libx264", "yuv420p", 200, cluster_time_limit="100")
    with _started(toy_bundle, "--out", "o.mkv", "--csv", "a.csv") as run:
        run.stdin.write(data[: len(data) * 3 // 4])
        run.stdin.flush()
        until = time.monotonic() + 60
        while not list(Path().glob("o.partial*")) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        assert run.wait(30) == 0, run.stderr.read()
    with av.open("o.mkv") as container:
        assert sum(1 for _ in container.decode(video=0)) >= 20


def test_ctrl_c_while_nothing_comes(toy_bundle: Bundle) -> None:
    with _started(toy_bundle, "--out", "o.mkv") as run:
        time.sleep(2)
        run.send_signal(signal.SIGINT)
        assert run.wait(30) != 0
        told = run.stderr.read()
    assert b"Traceback" not in told
    assert not Path("o.mkv").exists()


def test_options_of_reading_apply(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, thread = dribbled(encoded("matroska", "libx264", "yuv420p"))
    with open(pipe._descriptor, "rb", closefd=False) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        report = infer("-", toy_bundle, Outputs(jsonl="l.jsonl"), ReadingOptions(every=3, crop="0,0,32,48"))
    thread.join()
    assert (report.frames, report.failures) == (4, [])


def test_a_terminal_is_not_written_to(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    with pytest.raises(UserError, match="terminal"):
        infer("test://fundus?frames=2&live=no", toy_bundle, Outputs(out="-"))


def test_one_result_alone_goes_to_standard_output(toy_bundle: Bundle) -> None:
    for others in ({"jsonl": "-"}, {"csv": "/dev/stdout"}):
        with pytest.raises(UserError, match="two results"):
            infer("test://fundus?frames=2&live=no", toy_bundle, Outputs(out="-", **others))  # type: ignore[arg-type]
    cv2.imwrite("a.png", clip_frame(0))
    cv2.imwrite("b.png", clip_frame(1))
    with pytest.raises(UserError, match="2 inputs"):
        infer(["a.png", "b.png"], toy_bundle, Outputs(out="-"))


def test_names_are_hidden_and_the_hint_stays(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, thread = dribbled(b"hello")
    with open(pipe._descriptor, "rb") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        report = infer("-", toy_bundle, Outputs(csv="a.csv"), ReadingOptions(anonymous_names=True))
    thread.join()
    assert ["-f matroska -" in failure.message for failure in report.failures] == [True]
