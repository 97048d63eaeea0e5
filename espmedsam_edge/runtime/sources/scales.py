"""One brightness for pictures that belong together: the slices of a DICOM series, the 16-bit files of a folder.

Scaled one by one, a hot pixel in one picture of a time series would darken that picture alone.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import full_scale, largest_sample
from espmedsam_edge.runtime.dicom.display import Scale, common_scale
from espmedsam_edge.runtime.dicom.reading import dicom_scale, is_dicom, read_dicom_header

log = logging.getLogger(__name__)

_SILENT_SECONDS, _AGAIN_SECONDS = 3.0, 30.0


class SharedScales:
    """Looks at the others of a group when the first of it is read; files that cannot be read are left out.

    Args:
        files: all that one run reads as single pictures.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._beside: defaultdict[Path, list[Path]] = defaultdict(list)
        for file in self._files:
            self._beside[file.parent].append(file)
        self._largest: dict[Path, int | None] = {}
        self._series: dict[str, Scale | None] = {}
        self._headers: dict[str, list[Path]] | None = None

    def of_picture(self, path: Path) -> int | None:
        """The largest sample among a folder's pictures of more than 8 bits, if this is one of several; else None."""
        folder = path.parent
        if folder not in self._largest:
            self._largest[folder] = None  # for the time being, and where none of them is
            if self._alone(path):
                return None
            found = [value for file in _told(self._beside[folder]) if (value := _largest(file)) is not None]
            if len(found) > 1:
                self._largest[folder] = max(found)
                log.info(
                    "The pictures of more than 8 bits in %s are shown on one scale, 0 to %d.",
                    folder,
                    full_scale(max(found)),
                )
        return self._largest[folder]

    def of_slice(self, path: Path, series: str) -> Scale | None:
        """The scale of a DICOM series, if its files name none and there are several; else None."""
        if series not in self._series:
            self._series[series] = None
            if series and not self._alone(path) and dicom_scale(path) is not None:
                self._series[series] = common_scale(_own_scales(self._of_series(series)))
        return self._series[series]

    def _alone(self, path: Path) -> bool:
        return not any(file != path for file in self._beside[path.parent])

    def _of_series(self, series: str) -> list[Path]:
        if self._headers is None:
            self._headers = {}
            for file in _told(self._files):
                with suppress(UserError):
                    if is_dicom(file):
                        self._headers.setdefault(read_dicom_header(file).order[0], []).append(file)
        return self._headers.get(series, [])


def _told(files: Sequence[Path]) -> Iterator[Path]:
    """The files, one after the other; what takes long says so, as the first frame waits for it."""
    due = time.monotonic() + _SILENT_SECONDS
    for number, file in enumerate(files):
        if time.monotonic() >= due:
            log.info(
                "%s: %d of %d pictures are looked at for the scale that they share.", file.parent, number, len(files)
            )
            due = time.monotonic() + _AGAIN_SECONDS
        yield file


def _own_scales(files: Sequence[Path]) -> list[Scale | None]:
    scales = []
    for file in _told(files):
        with suppress(UserError):
            scales.append(dicom_scale(file))
    return scales


def _largest(file: Path) -> int | None:
    with suppress(UserError):
        return None if is_dicom(file) else largest_sample(file)
    return None
