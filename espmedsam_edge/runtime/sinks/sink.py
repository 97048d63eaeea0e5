"""Where results go: what every sink can do, and the sinks that write a picture a frame."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from espmedsam_edge.closing import Closing
from espmedsam_edge.destinations import Destination, check_again
from espmedsam_edge.imaging.encode import write_image, write_labels
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import Styling, style_now
from espmedsam_edge.marks import PICTURE
from espmedsam_edge.runtime.segmentation import Mask, Segmentation
from espmedsam_edge.runtime.sources.source import SourceFrame

_LONGEST_PAUSE = 1.0  # seconds between two frames, whatever their times say


class Sink(Protocol):
    """Takes results in order.

    A file it writes has its name once it is complete. Before that it is absent, or, where it grows frame by frame, has
    a partial name (``growing_file``).
    """

    def __enter__(self) -> Sink:
        """Get ready."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish the files; on an error, what becomes of those that are not finished says ``GrowingFile.end``.

        Raises:
            UserError: a file could not be finished.
        """

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """Take one frame's result.

        Raises:
            UserError: it could not be written.
        """


class Tally(Closing):
    """A sink that only counts what passes: nothing that a run would go on for."""


class Paced(Closing):
    """Writes nothing, and holds a video back to its own speed, for those who look on."""

    def __init__(self) -> None:
        self._last: float | None = None  # in the video
        self._due = 0.0  # on the clock

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``; comes back when it is the frame's turn."""
        now = time.monotonic()
        due = now
        if frame.time is not None and self._last is not None:
            due = max(now, self._due + min(max(0.0, frame.time - self._last), _LONGEST_PAUSE))
        time.sleep(due - now)
        self._last, self._due = frame.time, due


class OverlayImages(Closing):
    """Writes each image with its mask drawn on it.

    Args:
        paths: the file to write (.png, .jpg) for each input file.
        style: how the mask is drawn.
        overwrite: what of that which came there meanwhile is replaced, see ``check_destinations``.
    """

    def __init__(self, paths: Mapping[Path, Path], style: Styling, overwrite: bool | None = None) -> None:
        self._paths, self._style, self._overwrite = paths, style, overwrite

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        overlay = result.overlay(frame.image, style_now(self._style, result.modality))
        _write(self._paths[frame.path], overlay, self._overwrite)


class MaskImages(Closing):
    """Writes masks as 8-bit grey PNGs, 0 and 255, at the frame's size.

    Args:
        paths: for each input file the PNG to write, or for a video the folder for ``000000.png`` and on.
        numbered: whether frames are numbered files in a folder.
        overwrite: see ``OverlayImages``.
    """

    def __init__(self, paths: Mapping[Path, Path], *, numbered: bool = False, overwrite: bool | None = None) -> None:
        self._paths, self._numbered, self._overwrite = paths, numbered, overwrite

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        path = self._paths[frame.path]
        _write(path / f"{frame.index:06d}.png" if self._numbered else path, result.mask, self._overwrite)


class LabelMaps(Closing):
    """Writes the numbers of objects: PNGs of 16 bits, or TIFFs of 32 for frames with numbers over 65,535.

    Args:
        paths, numbered, overwrite: see ``MaskImages``.
    """

    def __init__(self, paths: Mapping[Path, Path], *, numbered: bool = False, overwrite: bool | None = None) -> None:
        self._paths, self._numbered, self._overwrite = paths, numbered, overwrite

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        path, found = self._paths[frame.path], result.instances
        path = path / f"{frame.index:06d}.png" if self._numbered else path
        if found is None:
            raise RuntimeError("objects that were not looked for")
        labels = found.label_map
        path = path if labels.dtype == np.uint16 else path.with_suffix(".tif")
        check_again(Destination(path, PICTURE), self._overwrite)
        write_labels(path, labels)


def _write(path: Path, image: Frame | Mask, overwrite: bool | None) -> None:
    check_again(Destination(path, PICTURE), overwrite)
    write_image(path, image)
