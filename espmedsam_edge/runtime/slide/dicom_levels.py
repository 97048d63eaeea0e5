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
from espmedsam_edge.runtime.dicom.decoding import FrameDecoder
from espmedsam_edge.runtime.dicom.discretion import discreet, read_dataset
from espmedsam_edge.runtime.dicom.reading import is_dicom
from espmedsam_edge.runtime.dicom.stored import frame_table, frames_there
from espmedsam_edge.runtime.slide.limits import check_level, most_stored

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
                    levels.append(_DicomLevel(path, file, header))
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
    """See ``pyramid.StoredLevel``. ``there``: for each tile whether there is a frame of it."""

    def __init__(self, path: Path, file: Path, header: Any) -> None:
        self._file = file
        self.size = (int(header.TotalPixelMatrixRows), int(header.TotalPixelMatrixColumns))
        self.tile = (int(header.Rows), int(header.Columns))
        check_level(path, self.size, self.tile, file.stat().st_size)
        self.spacing: float | None = None
        with suppress(AttributeError, IndexError, TypeError, ValueError):
            measures = header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
            self.spacing = 1000 * float(measures.PixelSpacing[1])
        frames = int(header.NumberOfFrames)
        rows, columns = (-(-side // part) for side, part in zip(self.size, self.tile, strict=True))
        self._places = _places(header, self.tile, columns)
        self.there = np.ones(rows * columns, bool)
        if self._places is not None:
            there = [place for place, frame in self._places.items() if 0 <= place < rows * columns and frame < frames]
            self.there[:] = False
            self.there[there] = True
        elif frames < rows * columns:
            raise UserError(
                f"cannot read {path} as a slide: NumberOfFrames does not fit TotalPixelMatrixRows and -Columns.",
                "Copy it again.",
                exit_code=1,
            )
        plain = not header.file_meta.TransferSyntaxUID.is_compressed
        if plain and 2 * frames_there(file, header) < frames:
            raise UserError(
                f"cannot read {path} as a slide: {file.name} is cut off, or NumberOfFrames is wrong.",
                "Copy it again.",
                exit_code=1,
            )
        self._decoder: FrameDecoder | None = None
        if not plain:
            self._decoder = FrameDecoder(file, header, self.tile, apart=False)
            self._table = frame_table(file, header, frames)

    def part(self, index: int) -> Frame:
        """A tile that is stored."""
        frame = index if self._places is None else self._places[index]
        pixels = self._plain(frame) if self._decoder is None else self._decoder.decode(self._codestream(frame))
        if pixels.dtype != np.uint8:
            raise ValueError(f"its samples are {pixels.dtype}")
        if pixels.ndim == 2:
            return np.repeat(pixels[..., None], 3, axis=2)
        return np.ascontiguousarray(pixels[..., ::-1])

    def _plain(self, frame: int) -> Any:
        from pydicom.pixels import pixel_array

        return np.asarray(pixel_array(self._file, index=frame))

    def _codestream(self, frame: int) -> bytes:
        from pydicom.encaps import generate_fragments

        start, length = self._table[frame]
        with self._file.open("rb") as stream:
            stream.seek(start)
            return b"".join(generate_fragments(stream.read(min(length, most_stored(self.tile)))))


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
