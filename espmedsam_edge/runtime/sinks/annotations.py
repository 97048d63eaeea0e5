"""Pictures and their masks in a folder that an annotation tool opens, to be corrected there."""

from __future__ import annotations

import base64
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import cv2
import numpy as np

from espmedsam_edge.annotations.formats import FileEach, OneDocument, Picture, writer
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write, write_errors
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.imaging.overlay import color_of
from espmedsam_edge.modalities import target_of
from espmedsam_edge.objects.measures import MOST
from espmedsam_edge.objects.separation import Labels, separated
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.growing_file import GrowingFile
from espmedsam_edge.runtime.sinks.places import fitting
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

log = logging.getLogger(__name__)

_MOST_HOLES = 100_000
_MOST_PIXELS = 1 << 32  # of the objects' boxes: half a minute


def _too_much(labels: Labels) -> str:
    """What of a picture would take minutes to outline; "" where that is nothing."""
    from scipy.ndimage import find_objects

    boxes = [box for box in find_objects(labels) if box is not None]
    if len(boxes) > MOST:
        return f"{len(boxes)} objects, more than {MOST}"
    holes = cv2.connectedComponents(np.asarray(labels == 0, np.uint8), connectivity=4)[0]
    if holes > _MOST_HOLES:
        return f"objects with over {_MOST_HOLES} holes"
    if sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in boxes) > _MOST_PIXELS:
        return "objects that reach too far beside each other"
    return ""


class AnnotationFolder:
    """Writes each frame as PNG, as it was segmented, and its objects in a format of ``FORMATS``.

    Objects are those that the run tells apart, else the mask's connected parts.

    Of an interrupted run what is written is whole. What the format could not hold is said at the end. In a run that can
    be gone on with it is a ``resumed.Table``: pictures are written as they come, their objects when all is done.

    Args:
        folder: new or empty, or to be replaced file by file.
        form: a name of ``FORMATS``.
        names: of each input file, without an ending.
        videos: those whose frames are numbered.
        failures: takes pictures with too many objects.
        resumed: the run can be gone on with, so that a document that is not whole is no result.
        keep: leave annotations that stand as they are, with their pictures: they may be corrections.
    """

    def __init__(
        self,
        folder: Path,
        form: str,
        names: Mapping[Path, str],
        videos: Collection[Path],
        failures: list[Failure],
        *,
        resumed: bool = False,
        keep: bool = False,
    ) -> None:
        self._folder, self._names, self._videos, self._failures = folder, names, videos, failures
        self._writer, self._resumed, self._keep = writer(form), resumed, keep
        self._document: GrowingFile | None = None
        self._stream: TextIO | None = None
        self._added = not keep

    def __enter__(self) -> AnnotationFolder:
        if isinstance(self._writer, OneDocument) and not (
            self._keep and (self._folder / self._writer.document).exists()
        ):
            self._document = GrowingFile(self._folder / self._writer.document, keep_interrupted=not self._resumed)
            self._stream = self._document.begin().open("w", encoding="utf-8", newline="")
            self._grow(self._writer.head())
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        self._add(self._drawn(frame, result))

    def entry(self, frame: SourceFrame, result: Segmentation) -> dict[str, Any]:
        """See ``resumed.Table``; the picture is written."""
        drawn = self._drawn(frame, result)
        if isinstance(drawn, Failure):
            return {"failed": vars(drawn)}
        packed = cv2.imencode(".png", drawn.labels.astype(np.uint16))[1]
        return {**vars(drawn), "labels": base64.b64encode(packed.tobytes()).decode()}

    def take(self, entry: dict[str, Any]) -> None:
        """See ``resumed.Table``."""
        if "failed" in entry:
            self._add(Failure(*(str(entry["failed"][name]) for name in ("name", "message"))))
            return
        packed = np.frombuffer(base64.b64decode(entry["labels"]), np.uint8)
        labels: Any = cv2.imdecode(packed, cv2.IMREAD_UNCHANGED) if packed.size else None
        drawn = Picture(**{**entry, "labels": labels.astype(np.int32)})
        if Path(drawn.name).name != drawn.name or labels.shape != (drawn.height, drawn.width):
            raise ValueError("no picture of this folder")
        self._add(drawn)

    def _drawn(self, frame: SourceFrame, result: Segmentation) -> Picture | Failure:
        """A frame with its objects, once its picture is written; or why it is left out."""
        labels = separated(result.mask, split=False) if result.instances is None else result.instances.labels
        count = int(labels.max(initial=0))
        if fault := _too_much(labels):
            return Failure(frame.source, f"{frame.source} has {fault}: it is left out of {self._folder}.")
        if count > MOST:  # numbers of objects that are followed grow without end
            numbers = np.zeros(count + 1, np.int32)
            present = np.flatnonzero(np.bincount(labels.ravel(), minlength=count + 1)[1:]) + 1
            numbers[present] = np.arange(1, len(present) + 1)
            labels, count = numbers[labels], len(present)
        sums = np.bincount(labels.ravel(), result.probability().ravel(), count + 1)[1:]
        means = sums / np.maximum(np.bincount(labels.ravel(), minlength=count + 1)[1:], 1)
        number = f"-{frame.index:06d}" if frame.path in self._videos else ""
        name = fitting(self._names[frame.path], f"{number}.png")
        height, width = result.size
        picture = Picture(
            name, width, height, target_of(result.modality), color_of(result.modality), labels, tuple(means.tolist())
        )
        image = self._folder / self._writer.images / name
        if self._stands(picture) and image.exists():
            log.warning("%s stays as it is, with its picture: it may be a correction.", self._place(picture))
        else:
            write_image(image, frame.image)
        return picture

    def _place(self, picture: Picture) -> Path:
        return self._folder / self._writer.place(picture.stem)

    def _stands(self, picture: Picture) -> bool:
        return self._keep and self._place(picture).exists()

    def _add(self, drawn: Picture | Failure) -> None:
        if isinstance(drawn, Failure):
            self._failures.append(drawn)
            return
        entry = self._writer.entry(drawn)
        if self._document is not None:
            self._grow(entry)
        elif isinstance(self._writer, FileEach) and not self._stands(drawn):
            atomic_write(self._place(drawn), entry)
            self._added = True

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
            for name, text in self._writer.others().items():
                if self._added or not (self._folder / name).exists():
                    atomic_write(self._folder / name, text)
        if self._writer.lost:
            log.info("%s", self._writer.lost)
