"""Frames into a video file: H.264 by PyAV, playable up to the last frame wherever it is cut off; else by OpenCV."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.opencv_log import quiet_opencv
from espmedsam_edge.marks import VIDEO_MARK, matroska_mark, mp4_mark
from espmedsam_edge.pipes import open_pipe
from espmedsam_edge.runtime.video.containers import cut_off
from espmedsam_edge.runtime.video.display import SQUARE
from espmedsam_edge.runtime.video.pyav import has_pyav, load_pyav

WRITABLE_SUFFIXES: tuple[str, ...] = (".mp4", ".mov", ".mkv")

DEFAULT_CRF = 23
"""x264's quality of overlays. Without looking ahead, 23 gives the file sizes that 20 gives with it, 0.5 dB below."""

_TICKS_PER_FRAME = 16  # finer than a frame, so that a camera's uneven times survive

# Slices in threads wait for each other, on a busy machine for long; frames up to this size need no second thread.
_ONE_THREAD_PIXELS = 1280 * 720

_MATROSKA = {"cluster_time_limit": "1", "flush_packets": "1"}
_FRAGMENTS = "empty_moov+default_base_moof+frag_every_frame"
_HYBRID_SINCE = (61, 7)  # libavformat of FFmpeg 7.1


class VideoWriter(Protocol):
    """An open video file being written. Frames of an odd size get their last row or column twice: codecs want even."""

    def write(self, frame: Frame, time: float) -> None:
        """Append a frame.

        Args:
            frame: (H, W, 3) uint8 BGR; one of another size than the first is stretched to it.
            time: seconds; frames come in order. Only PyAV keeps it, OpenCV writes a constant rate.
        """

    def finish(self) -> bool:
        """Write what is buffered and the container's index; whether the file is whole.

        Raises:
            OSError: the disk refused.
        """

    def close(self) -> None:
        """Let go of the file, finished or not."""


def open_pipe_writer(
    path: Path, size: tuple[int, int], fps: Fraction, *, crf: int = DEFAULT_CRF, aspect: Fraction = SQUARE
) -> VideoWriter:
    """As ``open_writer``, into a FIFO or another pipe, which cannot seek; without a suffix Matroska.

    Raises:
        UserError: PyAV is missing, or the container is none that can be written.
        OSError: it cannot be opened.
    """
    if path.suffix:
        _check_suffix(path)
    if not has_pyav():
        raise UserError(f"writing video to {path} needs PyAV.", "Install it: pip install 'espmedsam-edge[video]'")
    return _PyAvPipeWriter(path, even_size(size), fps, crf, aspect)


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in WRITABLE_SUFFIXES:
        raise UserError(f"cannot write '{path.suffix}' videos.", f"Use one of {', '.join(WRITABLE_SUFFIXES)}.")


def open_writer(
    path: Path, size: tuple[int, int], fps: Fraction, *, crf: int = DEFAULT_CRF, aspect: Fraction = SQUARE
) -> VideoWriter:
    """Start a video file at ``path`` (its suffix names the container) for frames of ``size`` = (H, W).

    With PyAV the file can be played at any moment while it is written; all but the last frame given are in it.

    Args:
        path: .mp4, .mov or .mkv.
        size: (H, W) in pixels.
        fps: the frames' usual rate.
        crf: x264's quality, from 1 (hardly any loss) to 51 (little is left).
        aspect: width by height of a pixel as it is to be shown. OpenCV cannot say it, so its frames are stretched.

    Raises:
        UserError: a container that cannot be written, or no encoder here.
    """
    _check_suffix(path)
    if has_pyav():
        return PyAvWriter(path, even_size(size), fps, crf, aspect)
    return OpenCvWriter(path, even_size((size[0], round(size[1] * aspect))), fps)


def even_size(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) rounded up to even numbers, as codecs want them."""
    return size[0] + size[0] % 2, size[1] + size[1] % 2


class PyAvEncoder:
    """Encodes H.264 (MPEG-4 part 2 where FFmpeg was built without x264) into a container of FFmpeg's.

    Args:
        container: open for writing.
        size: (H, W), even.
        fps: the frames' usual rate; times are kept to a sixteenth of a frame.
        crf: x264's quality.
        keyframe_seconds: how far apart frames are that one can start to play at.
        aspect: width by height of a pixel as it is to be shown.
    """

    def __init__(
        self,
        container: Any,
        size: tuple[int, int],
        fps: Fraction,
        crf: int,
        keyframe_seconds: float = 2,
        aspect: Fraction = SQUARE,
    ) -> None:
        av = self._av = load_pyav()
        self._container, self._size = container, size
        self._start: float | None = None
        self._last = -1
        self._tick = 1 / (fps * _TICKS_PER_FRAME)
        codec = next((name for name in ("libx264", "mpeg4") if name in av.codecs_available), "mpeg4")
        # zerolatency: no frame waits in the encoder, where a kill would take it along.
        options = (
            {"preset": "veryfast", "crf": str(crf), "tune": "zerolatency"} if codec == "libx264" else {"qscale": "3"}
        )
        options["g"] = str(max(1, round(keyframe_seconds * fps)))
        self._stream = container.add_stream(codec, rate=fps, options=options)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        if size[0] * size[1] <= _ONE_THREAD_PIXELS:
            context.thread_count = 1
        context.time_base = self._tick
        # What FFmpeg's scaler makes of BGR: SMPTE 170M, limited range. Unsaid, players guess another for large frames.
        context.colorspace, context.color_range = 6, 1
        if aspect != SQUARE:
            context.sample_aspect_ratio = aspect.limit_denominator(255)

    def write(self, frame: Frame, time: float) -> None:
        if self._start is None:
            self._start = time
        picture = self._av.VideoFrame.from_ndarray(fitted(frame, self._size), format="bgr24")
        self._last = max(self._last + 1, round((time - self._start) / self._tick))
        picture.pts, picture.time_base = self._last, self._tick
        self._mux(picture)

    def _mux(self, picture: Any) -> None:
        for packet in self._stream.encode(picture):
            self._container.mux(packet)

    def finish(self) -> bool:
        if self._start is not None:
            self._mux(None)
        self._container.close()
        return True

    def close(self) -> None:
        self._container.close()


class PyAvWriter(PyAvEncoder):
    """Writes a file that can be played at any moment while it grows."""

    def __init__(
        self, path: Path, size: tuple[int, int], fps: Fraction, crf: int = DEFAULT_CRF, aspect: Fraction = SQUARE
    ) -> None:
        av = load_pyav()
        self._path = path
        container = av.open(f"file:{path.absolute()}", "w", options=_surviving(av, path))
        container.metadata["comment"] = VIDEO_MARK
        super().__init__(container, size, fps, crf, aspect=aspect)

    def finish(self) -> bool:
        return super().finish() and not cut_off(self._path)


class _PyAvPipeWriter(PyAvEncoder):
    """Writes what a reader of the pipe can play at once."""

    _refused: OSError | None

    def __init__(self, path: Path, size: tuple[int, int], fps: Fraction, crf: int, aspect: Fraction) -> None:
        pipe = open_pipe(path)

        class Sink:  # without a way to seek, which a pipe only seems to have
            write = staticmethod(self._pass_on)

        self._pipe, self._refused = pipe, None
        name = path.suffix.lower()[1:] or "mkv"
        options = _MATROSKA if name == "mkv" else {"movflags": _FRAGMENTS, "flush_packets": "1"}
        container = load_pyav().open(Sink(), "w", format="matroska" if name == "mkv" else name, options=options)
        container.metadata["comment"] = VIDEO_MARK
        super().__init__(container, size, fps, crf, aspect=aspect)

    def _pass_on(self, data: bytes) -> int:
        """Called by FFmpeg, which loses errors: the first is kept, and nothing more is written."""
        if self._refused is None:
            try:
                self._pipe.write(data)
                self._pipe.flush()
            except OSError as error:
                self._refused = error
        return len(data)

    def _check(self) -> None:
        if self._refused is not None:
            raise self._refused

    def write(self, frame: Frame, time: float) -> None:
        super().write(frame, time)
        self._check()

    def finish(self) -> bool:
        super().finish()
        self._check()
        return True

    def close(self) -> None:
        super().close()
        if self._refused is None:
            self._pipe.close()
        else:
            with suppress(OSError):  # what is buffered goes nowhere
                self._pipe.close()


def _surviving(av: Any, path: Path) -> dict[str, str]:
    """FFmpeg's options for a file in which every frame is playable as soon as the next one is written.

    Matroska: a cluster a frame. MP4: a fragment a frame; at the end the fragments get one ordinary index, for players
    that seek poorly in fragments.
    """
    if path.suffix.lower() == ".mkv":
        return dict(_MATROSKA)
    hybrid = av.library_versions["libavformat"][:2] >= _HYBRID_SINCE
    return {"movflags": f"hybrid_fragmented+{_FRAGMENTS}" if hybrid else _FRAGMENTS, "flush_packets": "1"}


class OpenCvWriter:
    """Writes MPEG-4 part 2 with OpenCV's VideoWriter, at a constant rate.

    The index comes last: until ``finish`` the file cannot be played, and a kill costs all of it.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: Fraction) -> None:
        self._path, self._size = path, size
        self._count = 0
        quiet_opencv()
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(path.absolute()), code, float(fps), (size[1], size[0]))
        if not self._writer.isOpened():
            raise UserError(
                f"this OpenCV cannot write MPEG-4 video to {path.suffix}.",
                "Install PyAV: pip install 'espmedsam-edge[video]'",
                exit_code=1,
            )

    def write(self, frame: Frame, time: float) -> None:
        self._writer.write(fitted(frame, self._size))
        self._count += 1

    def finish(self) -> bool:
        self._writer.release()
        mark = matroska_mark() if self._path.suffix.lower() == ".mkv" else mp4_mark()
        with self._path.open("ab") as file:
            file.write(mark)
        capture = cv2.VideoCapture(str(self._path.absolute()))
        written = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        return written >= self._count and not cut_off(self._path)  # OpenCV reports no write error

    def close(self) -> None:
        self._writer.release()


def fitted(frame: Frame, size: tuple[int, int]) -> Frame:
    """A frame at the video's even size: its last row or column repeated, or stretched if it is quite another."""
    height, width = size
    below, right = height - frame.shape[0], width - frame.shape[1]
    if below == right == 0:
        return np.ascontiguousarray(frame)
    if 0 <= below <= 1 and 0 <= right <= 1:
        return np.asarray(cv2.copyMakeBorder(frame, 0, below, 0, right, cv2.BORDER_REPLICATE), np.uint8)
    return np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
