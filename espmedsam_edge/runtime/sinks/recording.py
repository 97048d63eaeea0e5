"""Recordings: the overlay and the mask as video files that survive a kill."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Protocol

import cv2
import numpy as np

from espmedsam_edge.files import write_errors
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import Styling, style_now
from espmedsam_edge.pipes import is_pipe
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.growing_file import GrowingFile
from espmedsam_edge.runtime.sources.source import Source, SourceFrame
from espmedsam_edge.runtime.video.pyav import has_pyav, load_pyav
from espmedsam_edge.runtime.video.writing import DEFAULT_CRF, VideoWriter, open_pipe_writer, open_writer

DEFAULT_FPS = Fraction(25)
"""The rate that is assumed where a source does not say its own."""

_MASK_CRF = 4  # an error of a few levels of 255: far from half, so that the mask comes back exactly


class Picture(Protocol):
    """What a recording shows of a frame."""

    def __call__(self, frame: SourceFrame, result: Segmentation) -> Frame:
        """(H, W, 3) uint8 BGR."""


class Recording:
    """Writes one video of a source's frames.

    It grows under its partial name and can be played at any moment; it takes its name when it is whole. An interrupted
    run keeps it for a live source, whose pictures will not come again, and removes it for a file.

    Args:
        path: .mp4, .mov or .mkv.
        source: where the frames come from; gives the frame rate once it is open.
        picture: what is shown of each frame.
        crf: see ``open_writer``.
    """

    def __init__(self, path: Path, source: Source, picture: Picture, crf: int = DEFAULT_CRF) -> None:
        self._source, self._picture, self._crf = source, picture, crf
        self._file = GrowingFile(path, keep_interrupted=source.live)
        self._writer: VideoWriter | None = None
        if has_pyav():
            load_pyav()  # now, so that the first frames need not wait for it

    def __enter__(self) -> Recording:
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        picture = self._picture(frame, result)
        fps = self._source.fps or DEFAULT_FPS
        if self._writer is None:
            pipe = is_pipe(self._file.path)
            path = self._file.path if pipe else self._file.begin()
            open_one = open_pipe_writer if pipe else open_writer
            with write_errors(self._file.path, self._file.remains):
                self._writer = open_one(path, result.size, fps, crf=self._crf, aspect=frame.aspect)
        with write_errors(self._file.path, self._file.remains):
            self._file.check()
            self._writer.write(picture, float(frame.index / fps) if frame.time is None else frame.time)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        whole = self._finished()
        self._file.end(kind, whole=whole)

    def _finished(self) -> bool:
        writer, self._writer = (
            self._writer,
            None,
        )  # a run keeps its sinks to the end, and an encoder takes 3 MB and more
        if writer is None:
            return False
        try:
            return writer.finish()
        except OSError:  # the disk is full: what is there stays as it is, and playable
            return False
        finally:
            with suppress(BrokenPipeError):  # its reader has gone, as was told
                writer.close()


def overlay_video(path: Path, source: Source, style: Styling) -> Recording:
    """A recording of the frames with their masks drawn on them."""
    return Recording(path, source, lambda frame, result: result.overlay(frame.image, style_now(style, result.modality)))


def mask_video(path: Path, source: Source) -> Recording:
    """A recording of the masks, white on black; a decoded pixel of 128 or more is foreground, exactly."""

    def white_on_black(frame: SourceFrame, result: Segmentation) -> Frame:
        return np.asarray(cv2.cvtColor(result.mask, cv2.COLOR_GRAY2BGR), np.uint8)

    return Recording(path, source, white_on_black, _MASK_CRF)
