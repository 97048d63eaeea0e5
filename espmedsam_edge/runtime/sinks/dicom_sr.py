"""The sink that writes measurements of DICOM files as structured reports, one for each file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.marks import REPORT
from espmedsam_edge.runtime.dicom.discretion import read_dataset
from espmedsam_edge.runtime.dicom.report import MOST_OBJECTS, MeasuredFrame, outlines_of, write_report
from espmedsam_edge.runtime.dicom.segmentation import Algorithm
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.dicom_seg import Begun, DicomResults, check_inputs
from espmedsam_edge.runtime.sources.source import SourceFrame


@dataclass
class _Frames(Begun):
    frames: list[MeasuredFrame] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.frames)


class DicomReports(DicomResults[_Frames]):
    """Writes one DICOM-SR a DICOM file. Stands behind ``DicomSegmentations``, whose files it refers to.

    Args:
        paths, overwrite: see ``DicomResults``.
        algorithm: what made the masks.
        segmentations: the DICOM-SEG of each; None: there are none.

    Raises:
        UserError: highdicom is missing, or an input is not DICOM.
    """

    kind, mark = "structured report", REPORT

    def __init__(
        self,
        paths: Mapping[Path, Path],
        algorithm: Algorithm,
        segmentations: Mapping[Path, Path] | None = None,
        overwrite: bool | None = None,
    ) -> None:
        super().__init__(paths, overwrite)
        check_inputs(paths, "--dicom-sr", "--objects")
        self._algorithm, self._segmentations = algorithm, segmentations

    def _begin(self, frame: SourceFrame, header: Any, modality: str) -> _Frames:
        return _Frames(frame.path, frame.source, header, modality)

    def _add(self, begun: _Frames, frame: SourceFrame, result: Segmentation) -> None:
        before = sum(len(earlier.objects) for earlier in begun.frames)
        begun.frames.append(_measured(frame, result, before))

    def _finish(self, place: Path, begun: _Frames) -> None:
        masks = None if self._segmentations is None else read_dataset(self._segmentations[begun.path])
        write_report(place, begun.header, begun.frames, begun.modality, self._algorithm, masks, begun.name)


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
