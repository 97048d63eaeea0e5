"""The sink that writes measurements of DICOM files as structured reports, one for each file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from espmedsam_edge.destinations import Destination, check_again
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_path, write_errors
from espmedsam_edge.marks import REPORT
from espmedsam_edge.runtime.dicom.discretion import read_dataset
from espmedsam_edge.runtime.dicom.report import MOST_OBJECTS, MeasuredFrame, outlines_of, write_report
from espmedsam_edge.runtime.dicom.segmentation import Algorithm, frames_of, size_of
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.dicom_seg import check_inputs, read_header
from espmedsam_edge.runtime.sources.source import SourceFrame


class DicomReports:
    """Writes one DICOM-SR a DICOM file, when its last frame has come; each is complete or absent.

    It belongs to the source's study, and holds the same patient data. Stands behind ``DicomSegmentations``, whose
    files it refers to.

    Args:
        paths: the file to write for each DICOM input.
        algorithm: what made the masks.
        segmentations: the DICOM-SEG of each; None: there are none.
        overwrite: what of that which came there meanwhile is replaced, see ``check_destinations``.

    Raises:
        UserError: highdicom is missing, or an input is not DICOM.
    """

    def __init__(
        self,
        paths: Mapping[Path, Path],
        algorithm: Algorithm,
        segmentations: Mapping[Path, Path] | None = None,
        overwrite: bool | None = None,
    ) -> None:
        check_inputs(paths, "--dicom-sr", "--objects")
        self._paths, self._algorithm, self._segmentations = paths, algorithm, segmentations
        self._overwrite = overwrite
        self._current: _Unfinished | None = None
        self._incomplete: list[str] = []

    def __enter__(self) -> DicomReports:
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``; frames of a file come together and in order."""
        current = self._current
        if current is None or current.path != frame.path:
            self._give_up_current()
            current = self._current = _Unfinished(
                frame.path, frame.source, read_header(frame, "structured report"), result.modality
            )
        if frame.index != len(current.frames) or result.modality != current.modality:
            return
        if result.size != size_of(current.header):
            return
        current.frames.append(_measured(frame, result, current.objects))
        if len(current.frames) == frames_of(current.header):
            self._current = None
            place = self._paths[frame.path]
            with write_errors(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(place) as temporary:
                    self._report(temporary, current)
                    check_again(Destination(place, REPORT), self._overwrite)

    def _report(self, path: Path, done: _Unfinished) -> None:
        masks = None if self._segmentations is None else read_dataset(self._segmentations[done.path])
        write_report(path, done.header, done.frames, done.modality, self._algorithm, masks, done.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_up_current()
        if kind is None and self._incomplete:
            more = f" and {len(self._incomplete) - 1} more" if len(self._incomplete) > 1 else ""
            raise UserError(
                f"no structured report of {self._incomplete[0]}{more}: not all of it was segmented, at its own size "
                "and with one modality.",
                "Segment the whole file without changing the modality.",
                exit_code=1,
            )

    def _give_up_current(self) -> None:
        if self._current is not None:
            self._incomplete.append(self._current.name)
            self._current = None


@dataclass
class _Unfinished:
    path: Path
    name: str
    header: Any
    modality: str
    frames: list[MeasuredFrame] = field(default_factory=list)

    @property
    def objects(self) -> int:
        return sum(len(frame.objects) for frame in self.frames)


def _measured(frame: SourceFrame, result: Segmentation, before: int) -> MeasuredFrame:
    found = result.instances
    if found is None:
        raise RuntimeError("objects that were not looked for")
    if before + found.count > MOST_OBJECTS:
        raise UserError(
            f"no structured report of {frame.source}: its {before + found.count} objects and more are over the limit "
            f"of {MOST_OBJECTS}.",
            "Leave specks out with --min-area, or use --objects for it.",
            exit_code=1,
        )
    return MeasuredFrame(frame.index, result.area, outlines_of(found), found.spacing)
