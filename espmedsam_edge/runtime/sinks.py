"""Where results go: overlay pictures and video, mask PNGs, a line of JSON a frame; each a context manager."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_path, write_errors
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sources import Source, SourceFrame
from espmedsam_edge.runtime.video_writing import VideoWriter, open_writer

_DEFAULT_FPS = Fraction(25)


class Sink(Protocol):
    """Takes results in order. A file it writes is complete when the block ends well, and absent otherwise."""

    def __enter__(self) -> Sink:
        """Get ready."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish the files, or on an error remove those that are not finished.

        Raises:
            UserError: a file could not be finished.
        """

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """Take one frame's result.

        Raises:
            UserError: it could not be written.
        """


class _FileByFile:
    """A sink whose every write is a file of its own: nothing to open or to finish."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


class OverlayImages(_FileByFile):
    """Writes each image with its mask drawn on it.

    Args:
        paths: the file to write (.png, .jpg) for each input file.
        style: how the mask is drawn.
    """

    def __init__(self, paths: Mapping[Path, Path], style: OverlayStyle) -> None:
        self._paths, self._style = paths, style

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``."""
        write_image(self._paths[frame.path], result.overlay(frame.image, self._style))


class MaskImages(_FileByFile):
    """Writes masks as 8-bit grey PNGs, 0 and 255, at the frame's size.

    Args:
        paths: for each input file the PNG to write, or for a video the folder for ``000000.png`` and on.
        numbered: whether frames are numbered files in a folder.
    """

    def __init__(self, paths: Mapping[Path, Path], *, numbered: bool = False) -> None:
        self._paths, self._numbered = paths, numbered

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``."""
        path = self._paths[frame.path]
        write_image(path / f"{frame.index:06d}.png" if self._numbered else path, result.mask)


class OverlayVideo:
    """Writes a video of the frames with their masks drawn on them; the file takes its name when it is whole.

    Args:
        path: .mp4, .mov or .mkv.
        source: where the frames come from; gives the frame rate once it is open.
        style: how the mask is drawn.
    """

    def __init__(self, path: Path, source: Source, style: OverlayStyle) -> None:
        self._path, self._source, self._style = path, source, style
        self._files = ExitStack()
        self._writer: VideoWriter | None = None

    def __enter__(self) -> OverlayVideo:
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``."""
        drawn = result.overlay(frame.image, self._style)
        fps = self._source.fps or _DEFAULT_FPS
        with write_errors(self._path):
            if self._writer is None:
                temporary = self._files.enter_context(atomic_path(self._path))
                self._writer = open_writer(temporary, result.size, fps)
                self._files.callback(self._writer.close)
            self._writer.write(drawn, float(frame.index / fps) if frame.time is None else frame.time)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._files.__exit__(kind, error, traceback)
            return
        with self._files:
            if self._writer is not None and not self._writer.finish():
                raise UserError(
                    f"{self._path} came out incomplete.", "Is the disk full? Nothing was left behind.", exit_code=1
                )


class JsonLines:
    """Writes one JSON object a frame, each on its line: source, frame, time, and ``Segmentation.to_dict``.

    Args:
        path: the file, which takes its name when it is whole; None for standard output, line by line.
        constants: what every line shall say besides.
    """

    def __init__(self, path: Path | None, constants: Mapping[str, Any] | None = None) -> None:
        self._path, self._constants = path, dict(constants or {})
        self._files = ExitStack()
        self._stream: TextIO = sys.stdout

    def __enter__(self) -> JsonLines:
        if self._path is not None:
            temporary = self._files.enter_context(atomic_path(self._path))
            self._stream = self._files.enter_context(temporary.open("w", encoding="utf-8"))
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``."""
        line = {"source": frame.source, "frame": frame.index, "time": frame.time}
        text = json.dumps({**line, **self._constants, **result.to_dict()}, allow_nan=False)
        with write_errors(self._path or Path("standard output")):
            self._stream.write(text + "\n")
            if self._path is None:
                self._stream.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, traceback)
