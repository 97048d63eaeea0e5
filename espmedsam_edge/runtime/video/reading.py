"""Frames out of a video file: with PyAV where it is installed, else with OpenCV."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import max_pixels
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.opencv_log import quiet_opencv
from espmedsam_edge.runtime.video.containers import cut_off
from espmedsam_edge.runtime.video.pyav import has_pyav, load_pyav

_DEFAULT_FPS = Fraction(25)


class VideoReader(Protocol):
    """An open video file."""

    @property
    def fps(self) -> Fraction:
        """Frames a second, on average."""

    @property
    def length(self) -> int | None:
        """How many frames the container announces; None where it does not say. An estimate, for progress."""

    @property
    def damage(self) -> str | None:
        """After iterating: what could not be read, as the end of a sentence; None if all was."""

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        """The frames in order, (H, W, 3) uint8 BGR, upright, each with its time in seconds; can be done once."""

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
    return PyAvReader(path) if has_pyav() else OpenCvReader(path)


class PyAvReader:
    """Reads with PyAV. Frames that the decoder marks as damaged are left out and counted."""

    def __init__(self, path: Path) -> None:
        av = self._av = load_pyav()
        self._path = path
        self.damage: str | None = None
        try:
            # "file:" and the list keep a playlist in disguise from opening other files or addresses.
            # A title in another encoding than UTF-8 is no reason to refuse a video.
            self._container: Any = av.open(
                f"file:{path.absolute()}", options={"protocol_whitelist": "file"}, metadata_errors="replace"
            )
        except (av.error.FFmpegError, OSError) as error:
            raise _unreadable(path) from error
        if not self._container.streams.video:
            self.close()
            raise UserError(f"{path} has no video in it.", "Name an image or a video file.", exit_code=1)
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:  # a codec that FFmpeg does not know
            self.close()
            raise _unreadable(path)
        self._stream.thread_type = "AUTO"
        self.fps = Fraction(self._stream.average_rate or self._stream.guessed_rate or _DEFAULT_FPS)
        self.length: int | None = self._stream.frames or self._estimated_length()
        try:
            _check_size(path, self._stream.codec_context.width, self._stream.codec_context.height)
        except UserError:
            self.close()
            raise

    def _estimated_length(self) -> int | None:
        if self._stream.duration:
            return round(float(self._stream.duration * self._stream.time_base * self.fps))
        duration = self._container.duration
        return round(float(duration / 1_000_000 * self.fps)) if duration else None

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        count, damaged = 0, 0
        partial: set[int | None] = set()  # times of the packets that the file's end cut; some codecs decode them
        for packet in self._packets():
            if packet.is_corrupt:
                partial.add(packet.pts)
            try:
                frames = packet.decode()
            except self._av.error.FFmpegError:
                damaged += 1
                continue
            for frame in frames:
                if frame.is_corrupt or frame.pts in partial:
                    damaged += 1
                    continue
                time = float(count / self.fps) if frame.time is None else frame.time
                yield turned(frame.to_ndarray(format="bgr24"), frame.rotation), time
                count += 1
        self.damage = _damage(self._path, count, damaged)

    def _packets(self) -> Iterator[Any]:
        """Packets of the stream, then the one that flushes the decoder, even when demuxing ends in an error."""
        try:
            yield from self._container.demux(self._stream)
        except self._av.error.FFmpegError:
            flush = self._av.Packet()
            flush.stream = self._stream
            yield flush

    def close(self) -> None:
        """See ``VideoReader.close``."""
        self._container.close()


class OpenCvReader:
    """Reads with OpenCV's VideoCapture, which decodes through FFmpeg or GStreamer as it was built."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.damage: str | None = None
        quiet_opencv()
        self._capture = cv2.VideoCapture(str(path.absolute()))
        if not self._capture.isOpened():
            raise _unreadable(path)
        fps, count = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = Fraction(fps).limit_denominator(100_000) if 0 < fps < 100_000 else _DEFAULT_FPS
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
        count = 0
        while True:
            done, frame = self._capture.read()
            if not done:
                return
            milliseconds = self._capture.get(cv2.CAP_PROP_POS_MSEC)
            yield np.asarray(frame, np.uint8), milliseconds / 1000 if milliseconds > 0 else float(count / self.fps)
            count += 1

    def close(self) -> None:
        """See ``VideoReader.close``."""
        self._capture.release()


def _damage(path: Path, count: int, damaged: int) -> str | None:
    if cut_off(path):
        return f"it is cut off after {count} frames"
    if damaged:
        return f"{damaged} damaged frames were left out, {count} were read"
    return None if count else "it holds no frames"


def _unreadable(path: Path) -> UserError:
    reason = "it is not a video that can be decoded here"
    if cut_off(path):
        reason = "it is cut off, and what is there cannot be decoded"
    return UserError(f"cannot read {path}: {reason}.", "Copy it again, or convert it to H.264 in MP4.", exit_code=1)


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > max_pixels():
        raise UserError(
            f"{path} has frames of {width}x{height} pixels, over the limit of {max_pixels()}.",
            "Shrink it, or raise ESPMEDSAM_MAX_PIXELS if memory allows.",
            exit_code=1,
        )


def turned(frame: Frame, degrees: float) -> Frame:
    """Apply a display rotation (degrees counter-clockwise, as FFmpeg's display matrix counts)."""
    quarters = round(degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(frame, quarters)) if quarters else frame
