"""What was measured, frame by frame, as lines of JSON and as tables of areas over time and of objects."""

from __future__ import annotations

import csv
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO, get_args

from espmedsam_edge.annotations.outlines import three_points
from espmedsam_edge.annotations.rle import encode_rle
from espmedsam_edge.errors import spreadsheet_safe
from espmedsam_edge.files import write_errors
from espmedsam_edge.marks import AREA_COLUMNS, OBJECT_COLUMNS
from espmedsam_edge.objects.instance import Unit, significant
from espmedsam_edge.pipes import STANDARD_OUTPUT, is_pipe, open_pipe
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.growing_file import GrowingFile
from espmedsam_edge.runtime.sources.source import SourceFrame

Form = Literal["none", "polygons", "rle", "both"]

_NOTHING_KEPT = "it keeps nothing"

Identifiers = Callable[[Path], Mapping[str, str]]
"""What lines say besides about the file a frame was read from."""


def contour_fields(result: Segmentation, form: Form) -> dict[str, Any]:
    """What a line of JSON says of a mask's shape: ``polygons``, ``rle``, both or neither.

    * ``polygons``: one list ``[x1, y1, x2, y2, ...]`` a part, in pixels, through the centres of its outermost pixels;
      holes are left out. Filling them (``cv2.fillPoly``) gives the parts back. A part of one or two points
      repeats them: COCO's readers refuse fewer than three, and take two for a box.
    * ``rle``: ``{"size": [H, W], "counts": "..."}``, the whole mask, exactly, as pycocotools reads it.
    """
    fields: dict[str, Any] = {}
    if form in ("polygons", "both"):
        fields["polygons"] = [three_points(contour).ravel().tolist() for contour in result.contours()]
    if form in ("rle", "both"):
        fields["rle"] = encode_rle(result.mask)
    return fields


def area_in_mm2(area: int, spacing: tuple[float, float] | None) -> float | None:
    """Pixels to mm², for ``spacing`` in millimetres between rows and between columns; None where it is unknown."""
    return None if spacing is None else area * spacing[0] * spacing[1]


def _told(area: float) -> float:
    """With four digits behind the point, and more where the area is small as in microscopes."""
    return round(area, 4) if area >= 1 else significant(area)


class _GrowingText(ABC):
    """A sink of lines: each is in the file, under its partial name, as soon as it is written; or in the pipe."""

    def __init__(self, path: Path | None, *, keep_interrupted: bool) -> None:
        self._place = Path("standard output") if path is None else path
        grows = path is not None and not is_pipe(path)
        self._file = GrowingFile(self._place, keep_interrupted=keep_interrupted) if grows else None
        self._own = path is not None
        self._stream: TextIO = sys.stdout

    def __enter__(self) -> Any:
        if self._file is not None:
            partial = self._file.begin()
            with write_errors(self._file.path, self._file.remains):
                self._stream = partial.open("w", encoding="utf-8", newline="")
        elif self._own:
            with write_errors(self._place, _NOTHING_KEPT):
                self._stream = TextIOWrapper(open_pipe(self._place), encoding="utf-8", newline="")
        else:
            with write_errors(STANDARD_OUTPUT):
                os.write(1, b"")  # it may be closed
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``."""
        self.take(self.entry(frame, result))

    @abstractmethod
    def entry(self, frame: SourceFrame, result: Segmentation) -> str:
        """A frame's part of the text, without its end."""

    def take(self, entry: str) -> None:
        """See ``resumed.Table``."""
        self._line(entry)

    def _line(self, text: str) -> None:
        """Write a line; what its encoding lacks, as the bytes of a name that are not UTF-8, becomes an escape."""
        remains = _NOTHING_KEPT if self._file is None else self._file.remains
        encoding = self._stream.encoding or "utf-8"
        with write_errors(self._place, remains):
            if self._file is not None:
                self._file.check()
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            self._stream.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._own:
            return
        try:
            self._stream.close()
        except OSError:  # a line that did not fit, of which the error has been told
            whole = False
        else:
            whole = True
        if self._file is not None:
            self._file.end(kind, whole=whole)


@dataclass(frozen=True)
class LineForm:
    """How a frame's result is a line of JSON.

    A line holds source, frame, time and, for a live source, the frames skipped so far; of a stack ``z_um``;
    ``Segmentation.to_dict``;
    ``area_mm2`` and ``spacing_mm`` (between rows, between columns) where the spacing is known; and the contours.

    Attributes:
        constants: what every line shall say besides.
        contours: how the mask's shape is written.
        identifiers: says more about the file that a frame was read from; None: nothing.
    """

    constants: Mapping[str, Any] = field(default_factory=dict)
    contours: Form = "none"
    identifiers: Identifiers | None = None

    def line(self, frame: SourceFrame, result: Segmentation) -> str:
        """The line, without its end; only ASCII."""
        time = None if frame.time is None else round(frame.time, 6)  # no video's clock is finer
        line: dict[str, Any] = {"source": frame.source, "frame": frame.index, "time": time}
        if frame.captured is not None:
            line["skipped"] = frame.skipped
        if frame.z is not None:
            line["z_um"] = round(frame.z, 4)
        if self.identifiers is not None:
            line |= self.identifiers(frame.path)
        line |= {**self.constants, **result.to_dict()}
        area = area_in_mm2(result.area, frame.spacing)
        if frame.spacing is not None and area is not None:
            line |= {"area_mm2": _told(area), "spacing_mm": [significant(side) for side in frame.spacing]}
        line |= contour_fields(result, self.contours)
        return json.dumps(line, allow_nan=False, separators=(",", ":"))


class JsonLines(_GrowingText):
    """Writes one JSON object a frame, each on its line.

    Args:
        path: the file, which takes its name when it is whole; None for standard output.
        form: of the lines.
        keep_interrupted: see ``GrowingFile``.
    """

    def __init__(self, path: Path | None, form: LineForm | None = None, *, keep_interrupted: bool = False) -> None:
        super().__init__(path, keep_interrupted=keep_interrupted)
        self._form = form or LineForm()

    def entry(self, frame: SourceFrame, result: Segmentation) -> str:
        """A frame's line."""
        return self._form.line(frame, result)


class _Table(_GrowingText):
    """A CSV of ``columns``; what is not known is left empty.

    What a spreadsheet would take for a formula has an apostrophe before it.

    Args:
        path: the file, which takes its name when it is whole; None for standard output.
        keep_interrupted: see ``GrowingFile``.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, path: Path | None, *, keep_interrupted: bool = False) -> None:
        super().__init__(path, keep_interrupted=keep_interrupted)

    def __enter__(self) -> Any:
        super().__enter__()
        self._line(",".join(self.columns))
        return self


class ObjectTable(_Table):
    """Writes a row for each object of each frame: ``OBJECT_COLUMNS``."""

    columns = OBJECT_COLUMNS

    def entry(self, frame: SourceFrame, result: Segmentation) -> str:
        """The rows of a frame's objects; "" without any."""
        found = result.instances
        if found is None:
            raise RuntimeError("objects that were not looked for")
        place = [
            spreadsheet_safe(frame.source),
            frame.index,
            "" if frame.time is None else f"{frame.time:.4f}",
            spreadsheet_safe(result.modality),
        ]
        rows = []
        for one in found.measured:
            fields = one.to_dict(found.spacing)
            unit = next((unit for unit in get_args(Unit) if unit in fields), "")
            row = [*place, one.id, one.gap, *fields["centroid"], *one.box, fields["eccentricity"]]
            row += [fields.get(name, "") for name in ("probability", *_SIZES)]
            rows.append(_csv_row([*row, unit, *(fields.get(unit, {}).get(name, "") for name in _SIZES)]))
        return "\n".join(rows)

    def take(self, entry: str) -> None:
        """See ``resumed.Table``."""
        if entry:
            super().take(entry)


_SIZES = ("area", "equivalent_diameter", "longest", "shortest", "perimeter")


class AreaTable(_Table):
    """Writes a row for each frame, with its mask's area and number of objects: ``AREA_COLUMNS``."""

    columns = AREA_COLUMNS

    def entry(self, frame: SourceFrame, result: Segmentation) -> str:
        """A frame's row."""
        height, width = result.size
        area = area_in_mm2(result.area, frame.spacing)
        row = [
            spreadsheet_safe(frame.source),
            frame.index,
            "" if frame.time is None else f"{frame.time:.4f}",
            result.area,
            f"{result.area / (height * width):.6f}",
            "" if area is None else f"{area:.4f}" if area >= 1 or not area else f"{area:.7g}",
            spreadsheet_safe(result.modality),
            "" if result.instances is None else result.instances.count,
            "" if result.confidence is None else f"{result.confidence:.4f}",
        ]
        return _csv_row(row)


class _OneRow:
    text = ""

    def write(self, text: str) -> None:
        self.text = text


def _csv_row(values: list[Any]) -> str:
    row = _OneRow()
    csv.writer(row, lineterminator="").writerow(values)
    return row.text
