"""Frames out of a video file: with PyAV where it is installed, else with OpenCV."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import max_pixels
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.opencv_log import quiet_opencv
from espmedsam_edge.runtime.video.bounded import Bounded, Incoming
from espmedsam_edge.runtime.video.containers import START_BYTES, cut_off, has_container, last_video_pids
from espmedsam_edge.runtime.video.display import Display
from espmedsam_edge.runtime.video.gif import completed_gif
from espmedsam_edge.runtime.video.pyav import has_pyav, load_pyav, self_contained_formats
from espmedsam_edge.runtime.video.skipping import Skipper, can_skip

log = logging.getLogger(__name__)

_DEFAULT_FPS = Fraction(25)
_SLOWEST, _FASTEST = Fraction(1, 1000), 10_000  # frames a second that mean something


class VideoReader(Protocol):
    """An open video file."""

    start: float
    """Seconds from the first frame; set before iterating, earlier ones may be left out."""
    skipped: int
    """How many were left out so, once the first frame is there."""

    @property
    def fps(self) -> Fraction:
        """Frames a second, on average."""

    @property
    def length(self) -> int | None:
        """How many frames the container announces; None where it does not say. An estimate, for progress."""

    @property
    def aspect(self) -> Fraction:
        """Width by height of a pixel; known once the first frame is there."""

    @property
    def damage(self) -> str | None:
        """After iterating: what could not be read, as the end of a sentence; None if all was."""

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        """The frames in order, (H, W, 3) uint8 BGR, turned and mirrored as they play; can be done once.

        Each comes with its time in seconds, which counts from the first frame and never goes back.
        """

    def close(self) -> None:
        """Close the file; a second call does nothing."""


def open_video(path: Path) -> VideoReader:
    """Open a video file.

    Raises:
        UserError: not there, not a video, cut off before its first frame, or its frames are over the pixel limit.
    """
    if not path.is_file():
        raise UserError(f"no file {path}.", "Check the name.", exit_code=1)
    if path.stat().st_size == 0:
        raise UserError(f"cannot read {path}: it is empty.", "Copy it again.", exit_code=1)
    if _is_text(path):
        raise UserError(
            f"cannot read {path}: it is a text, not a video.",
            "Lists of videos are not followed: name them.",
            exit_code=1,
        )
    return PyAvReader(path) if has_pyav() else OpenCvReader(path)


def _is_text(path: Path) -> bool:
    """Whether a file begins as a text, such as a list of other files, which decoders would follow."""
    with path.open("rb") as stream:
        start = stream.read(512)
    return not start.startswith(b"YUV4MPEG2 ") and not start.translate(None, _TEXT)


def _has_container(path: Path) -> bool:
    with path.open("rb") as stream:
        return has_container(stream.read(START_BYTES))


_TEXT = bytes([*b"\t\n\r", *range(32, 127)])


class PyAvReader:
    """Reads with PyAV. Frames that the decoder marks as damaged are left out and counted.

    Args:
        path: the file; or what messages call it.
        incoming: is read instead of the file.
    """

    def __init__(self, path: Path, incoming: Incoming | None = None) -> None:
        av = self._av = load_pyav()
        self._path = path
        self._comes = incoming is not None
        self.damage: str | None = None
        self.start, self.skipped = 0.0, 0
        self._broken, self._last_end = False, 0  # whether reading ended in an error; where the last packet ended
        try:
            self._bytes = Bounded(incoming) if incoming is not None else Bounded.file(path)
        except OSError as error:
            raise _unreadable(path) from error
        try:
            # The lists keep a playlist in disguise from opening other files or addresses.
            # A title in another encoding than UTF-8 is no reason to refuse a video.
            self._container: Any = av.open(
                (None if self._comes else self._completed(path)) or self._bytes,
                options={"protocol_whitelist": "none", "format_whitelist": self_contained_formats()},
                metadata_errors="replace",
            )
        except (av.error.FFmpegError, OSError) as error:
            self._bytes.close()
            raise _undecodable(path) if self._comes else _unreadable(path) from error
        stream = self._main_stream()
        if stream is None:
            self.close()
            if cut_off(path):
                raise _unreadable(path)
            raise UserError(f"{path} has no video in it.", "Name an image or a video file.", exit_code=1)
        self._stream = stream
        self._display = Display(self._stream.sample_aspect_ratio)
        if self._stream.codec_context is None:  # a codec that FFmpeg does not know
            self.close()
            raise _undecodable(path) if self._comes else _unreadable(path)
        # Threads for frames would hold back as many of them, which a sender may wait for.
        self._stream.thread_type = "SLICE" if self._comes else "AUTO"
        self.fps = plain_rate(self._stream.average_rate or self._stream.guessed_rate)
        self.length: int | None = self._stream.frames or self._estimated_length()
        try:
            _check_size(path, self._stream.codec_context.width, self._stream.codec_context.height)
        except UserError:
            self.close()
            raise

    @property
    def aspect(self) -> Fraction:
        return self._display.aspect

    @staticmethod
    def _completed(path: Path) -> BytesIO | None:
        data = completed_gif(path)
        return None if data is None else BytesIO(data)

    def _main_stream(self) -> Any:
        """The largest video stream that is no cover picture, or None; says so where there are several."""
        covers = self._av.stream.Disposition.attached_pic | self._av.stream.Disposition.timed_thumbnails
        streams = [stream for stream in self._container.streams.video if not stream.disposition & covers]
        if not streams:
            return None
        # Beside what moves, a single picture shows what it is about, as in animated AVIF.
        streams = [stream for stream in streams if stream.frames != 1] or streams

        def area(stream: Any) -> int:
            context = stream.codec_context
            return 0 if context is None else int(context.width * context.height)

        main = max(streams, key=area)  # the first of equals
        if len(streams) > 1:
            context = main.codec_context
            log.warning(
                "%s holds %d video streams; number %d, of %dx%d, is read.",
                *(self._path, len(streams), streams.index(main) + 1),
                *((context.width, context.height) if context is not None else (0, 0)),
            )
        return main

    def _estimated_length(self) -> int | None:
        if self._stream.duration:
            return round(float(self._stream.duration * self._stream.time_base * self.fps))
        duration = self._container.duration
        return round(float(duration / 1_000_000 * self.fps)) if duration else None

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        count, damaged = 0, 0
        partial: set[int | None] = set()  # times of the packets that the file's end cut; some codecs decode them
        clock = _Clock(self.fps)
        # An AVI numbers what it stores, not what is shown: with B-frames the numbers come in another order.
        stored: deque[float] | None = deque() if self._container.format.name == "avi" else None
        packets, skipper = self._packets(), None
        if self.start and not self._comes and can_skip(self._container, self._stream):
            skipper = Skipper(self.start, self._packets_again)
            packets = skipper.packets(packets)
        for packet in packets:
            if packet.is_corrupt:
                partial.add(packet.pts)
            if stored is not None and packet.size and packet.dts is not None:
                stored.append(float(packet.dts * packet.time_base))
            try:
                frames = packet.decode()
            except self._av.error.FFmpegError:
                damaged += 1
                continue
            if frames:
                self._bytes.picture()
            for frame in frames:
                stated = frame.time if not stored else stored.popleft()
                if skipper is not None:
                    if skipper.is_before(stated):
                        continue
                    count = self.skipped = skipper.index(frame.pts)
                    clock.time(skipper.first)
                    skipper = None
                if frame.is_corrupt or frame.pts in partial:
                    damaged += 1
                    continue
                yield self._display.shown(frame), clock.time(stated)
                count += 1
        self.damage = _left_out(count, damaged) if self._comes else _damage(self._path, count, damaged)
        if self.damage is None and self._broken:
            self.damage = f"it is damaged after {count} frames"
        elif self.damage is None and self._container.format.name == "yuv4mpegpipe" and self._is_cut():
            self.damage = f"it is cut off after {count} frames"
        if self._bytes.ended:
            self.damage = f"after {count} frames it goes on and holds no more"
        if self._container.format.name == "mpegts" and not self._comes and self.damage is None:
            last = last_video_pids(self._path)
            if last and self._stream.id not in last:
                self.damage = f"its pictures go on in another stream after {count} frames"

    def _is_cut(self) -> bool:
        """Whether bytes came behind the last packet, where FFmpeg says nothing of a picture that is not whole."""
        return self._last_end < self._bytes.position

    def _packets_again(self) -> Iterator[Any]:
        self._container.seek(0)
        return self._packets()

    def _packets(self) -> Iterator[Any]:
        """Packets of the stream, then the one that flushes the decoder, even when demuxing ends in an error."""
        ended = False
        self._bytes.begin()
        try:
            for packet in self._container.demux():
                if self._bytes.ended:
                    break
                self._bytes.packet()
                if packet.stream is self._stream:
                    if packet.size:
                        self._last_end = (packet.pos or 0) + packet.size
                    yield packet
                    ended = not packet.size
        except self._av.error.FFmpegError:
            self._broken = True
        if not ended:
            flush = self._av.Packet()
            flush.stream = self._stream
            yield flush

    def close(self) -> None:
        self._container.close()
        self._bytes.close()


class OpenCvReader:
    """Reads with OpenCV's VideoCapture, which decodes through FFmpeg or GStreamer as it was built."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.damage: str | None = None
        self.start, self.skipped = 0.0, 0
        quiet_opencv()
        if path.stat().st_size > Bounded.MOST and not _has_container(path):
            raise UserError(
                f"{path} is over {Bounded.MOST >> 20} MiB and has no container.",
                "PyAV reads it: pip install 'espmedsam-edge[video]'",
                exit_code=1,
            )
        self._capture = cv2.VideoCapture(str(path.absolute()))
        if not self._capture.isOpened():
            raise _unreadable(path)
        fps, count = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = plain_rate(fps)
        across, down = (int(self._capture.get(key)) for key in (cv2.CAP_PROP_SAR_NUM, cv2.CAP_PROP_SAR_DEN))
        self.aspect = Display(Fraction(across, down) if across > 0 and down > 0 else None).aspect
        self.length: int | None = int(count) if 0 < count < 1e9 else None
        try:
            width, height = (self._capture.get(key) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            _check_size(path, int(width), int(height))
        except UserError:
            self.close()
            raise

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        count = 0
        held_back: tuple[Frame, float] | None = None
        for frame in self._frames():
            if held_back is not None:
                yield held_back
                count += 1
            held_back = frame
        if held_back is not None and not cut_off(self._path):  # else the last one may be half a picture
            yield held_back
            count += 1
        # OpenCV tells no error from the end; announced lengths are estimates, so only a large gap counts.
        missing = (self.length or 0) - count
        self.damage = _damage(self._path, count, missing if missing > 0.1 * (self.length or 0) else 0)

    def _frames(self) -> Iterator[tuple[Frame, float]]:
        clock = _Clock(self.fps)
        while True:
            done, frame = self._capture.read()
            if not done:
                return
            milliseconds = self._capture.get(cv2.CAP_PROP_POS_MSEC)
            yield np.asarray(frame, np.uint8), clock.time(milliseconds / 1000)

    def close(self) -> None:
        self._capture.release()


def _damage(path: Path, count: int, damaged: int) -> str | None:
    if cut_off(path):
        return f"it is cut off after {count} frames"
    return _left_out(count, damaged)


def _left_out(count: int, damaged: int) -> str | None:
    if damaged:
        return f"{damaged} damaged frames were left out, {count} were read"
    return None if count else "it holds no frames"


def _unreadable(path: Path) -> UserError:
    reason = "it is not a video that can be decoded here"
    if cut_off(path):
        reason = "it is cut off, and what is there cannot be decoded"
    return UserError(f"cannot read {path}: {reason}.", "Copy it again, or convert it to H.264 in MP4.", exit_code=1)


def _undecodable(name: Path) -> UserError:
    return UserError(
        f"what comes on {name} is no picture or video that can be read from a pipe.",
        "Send Matroska: ffmpeg ... -f matroska -",
        exit_code=1,
    )


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > max_pixels():
        raise UserError(
            f"{path} has frames of {width}x{height} pixels, over the limit of {max_pixels()}.",
            "Shrink it, or raise ESPMEDSAM_MAX_PIXELS if memory allows.",
            exit_code=1,
        )


class _Clock:
    """Times that count from the first frame and grow with every one, from times that a container states or does not."""

    def __init__(self, fps: Fraction) -> None:
        self._step = float(1 / fps)
        self._first: float | None = None
        self._last = -self._step

    def time(self, stated: float | None) -> float:
        """Seconds; where the container states none, or one that is not after the last, a frame's length after it."""
        if stated is not None and self._first is None:
            self._first = stated
        since = None if stated is None or self._first is None else stated - self._first
        self._last = since if since is not None and since > self._last else self._last + self._step
        return self._last


def plain_rate(stated: Fraction | float | None) -> Fraction:
    """A frame rate that every container can hold: 30000/1001 stays as it is, a phone's average becomes one like it."""
    if not stated or not 0 < stated < math.inf:
        return _DEFAULT_FPS
    return Fraction(stated).limit_denominator(1001) if _SLOWEST <= stated <= _FASTEST else _DEFAULT_FPS
