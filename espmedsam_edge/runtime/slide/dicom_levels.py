"""Slides in DICOM: whole-slide microscopy, an instance a level, a frame a tile, by pydicom."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.dicom.discretion import discreet, read_dataset
from espmedsam_edge.runtime.dicom.reading import is_dicom

log = logging.getLogger(__name__)

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


class DicomLevels:
    """See ``pyramid.Storage``.

    Args:
        path: one instance, whose folder has the other levels of its series, or such a folder.

    Raises:
        UserError: no such slide is there.
    """

    def __init__(self, path: Path) -> None:
        found: list[tuple[Path, Any]] = []
        files = sorted(file for file in (path if path.is_dir() else path.parent).iterdir() if is_dicom(file))
        for file in files:
            with suppress(Exception):  # each file that is no slide has errors of its own
                header = read_dataset(file)
                if header.SOPClassUID == _WHOLE_SLIDE and list(header.ImageType)[2] == "VOLUME":
                    found.append((file, header))
        with discreet(partial(_not_read, path)) as dicom:
            series = next((header.SeriesInstanceUID for file, header in found if file == path or path.is_dir()), None)
            levels: list[_DicomLevel] = []
            for file, header in found:
                dicom.dataset = header
                if header.SeriesInstanceUID == series:
                    levels.append(_DicomLevel(file, header))
        if not levels:
            raise UserError(
                f"cannot read {path} as a slide: it is no DICOM whole-slide image.",
                "Pictures and cine loops are segmented by: espmedsam-edge infer",
                exit_code=1,
            )
        self.levels = sorted(levels, key=lambda level: -level.size[1])
        self.stated = self.levels[0].spacing

    def close(self) -> None:
        """No file is kept open."""


def _not_read(path: Path, fault: str) -> UserError:
    return UserError(
        f"cannot read {path} as a slide: {fault or 'its header is damaged'}.", "Copy it again.", exit_code=1
    )


class _DicomLevel:
    def __init__(self, file: Path, header: Any) -> None:
        self._file = file
        self.size = (int(header.TotalPixelMatrixRows), int(header.TotalPixelMatrixColumns))
        self.tile = (int(header.Rows), int(header.Columns))
        self.spacing: float | None = None
        with suppress(AttributeError, IndexError, TypeError, ValueError):
            measures = header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
            self.spacing = 1000 * float(measures.PixelSpacing[1])
        self._places = _places(header, self.tile, -(-self.size[1] // self.tile[1]))

    def part(self, index: int) -> Frame | None:
        """See ``StoredLevel.part``."""
        from pydicom.pixels import pixel_array

        frame = index if self._places is None else self._places.get(index)
        if frame is None:
            return None
        pixels = np.asarray(pixel_array(self._file, index=frame))
        if pixels.dtype != np.uint8:
            raise ValueError(f"its samples are {pixels.dtype}")
        if pixels.ndim == 2:
            return np.repeat(pixels[..., None], 3, axis=2)
        return np.ascontiguousarray(pixels[..., ::-1])


def _places(header: Any, tile: tuple[int, int], columns: int) -> dict[int, int] | None:
    """The frame of each tile, where the file lists them; None: they lie in order, and all are there."""
    if header.get("DimensionOrganizationType") == "TILED_FULL":
        return None
    found: dict[int, int] = {}
    for number, groups in enumerate(header.PerFrameFunctionalGroupsSequence):
        position = groups.PlanePositionSlideSequence[0]
        column = (int(position.ColumnPositionInTotalImagePixelMatrix) - 1) // tile[1]
        row = (int(position.RowPositionInTotalImagePixelMatrix) - 1) // tile[0]
        found.setdefault(row * columns + column, number)
    return found
