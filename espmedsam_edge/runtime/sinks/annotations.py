"""Pictures and their masks in a folder that an annotation tool opens, to be corrected there."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import TextIO

import numpy as np

from espmedsam_edge.annotations.formats import FileEach, OneDocument, Picture, writer
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write, write_errors
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.imaging.overlay import color_of
from espmedsam_edge.modalities import target_of
from espmedsam_edge.objects.measures import MOST
from espmedsam_edge.objects.separation import separated
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.growing_file import GrowingFile
from espmedsam_edge.runtime.sinks.places import fitting
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

log = logging.getLogger(__name__)


class AnnotationFolder:
    """Writes each frame as PNG, as it was segmented, and its objects in a format of ``FORMATS``.

    Objects are those that the run tells apart, else the mask's connected parts.

    Of an interrupted run what is written is whole. What the format could not hold is said at the end.

    Args:
        folder: new or empty, or to be replaced file by file.
        form: a name of ``FORMATS``.
        names: of each input file, without an ending.
        videos: those whose frames are numbered.
        failures: takes pictures with too many objects.
    """

    def __init__(
        self, folder: Path, form: str, names: Mapping[Path, str], videos: Collection[Path], failures: list[Failure]
    ) -> None:
        self._folder, self._names, self._videos, self._failures = folder, names, videos, failures
        self._writer = writer(form)
        self._document: GrowingFile | None = None
        self._stream: TextIO | None = None

    def __enter__(self) -> AnnotationFolder:
        if isinstance(self._writer, OneDocument):
            self._document = GrowingFile(self._folder / self._writer.document, keep_interrupted=True)
            self._stream = self._document.begin().open("w", encoding="utf-8", newline="")
            self._grow(self._writer.head())
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        labels = separated(result.mask, split=False) if result.instances is None else result.instances.labels
        count = int(labels.max(initial=0))
        if count > MOST:
            line = f"{frame.source} has {count} objects, more than {MOST}: it is left out of {self._folder}."
            self._failures.append(Failure(str(frame.path), line))
            return
        sums = np.bincount(labels.ravel(), result.probability().ravel(), count + 1)[1:]
        means = sums / np.maximum(np.bincount(labels.ravel(), minlength=count + 1)[1:], 1)
        number = f"-{frame.index:06d}" if frame.path in self._videos else ""
        name = fitting(self._names[frame.path], f"{number}.png")
        height, width = result.size
        picture = Picture(
            name, width, height, target_of(result.modality), color_of(result.modality), labels, tuple(means.tolist())
        )
        write_image(self._folder / self._writer.images / name, frame.image)
        entry = self._writer.entry(picture)
        if isinstance(self._writer, FileEach):
            atomic_write(self._folder / self._writer.place(picture.stem), entry)
        else:
            self._grow(entry)

    def _grow(self, text: str) -> None:
        assert self._document is not None
        assert self._stream is not None
        with write_errors(self._document.path, self._document.remains):
            self._document.check()
            self._stream.write(text)
            self._stream.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed = kind is not None and issubclass(kind, UserError)
        if self._document is not None and self._stream is not None:
            whole = not failed
            try:
                if whole and isinstance(self._writer, OneDocument):
                    self._stream.write(self._writer.tail())
                self._stream.close()
            except OSError:
                whole = False
            self._document.end(kind, whole=whole)
        if not failed:
            for place, text in self._writer.others().items():
                atomic_write(self._folder / place, text)
        if self._writer.lost:
            log.info("%s", self._writer.lost)
