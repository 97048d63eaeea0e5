"""Slides in TIFF files: tiled and pyramidal TIFF, OME-TIFF, SVS, NDPI, by tifffile."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import full_scale
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.machine.installation import install_command
from espmedsam_edge.runtime.slide.limits import CONVERT, check_level, check_stored, most_stored

log = logging.getLogger(__name__)

_PLAIN = (1, 5, 8, 32773, 32946, 34925, 34926, 50000, 50013)  # unpacked to the size that is asked for, and no more
_MICROMETRES = {2: 25_400.0, 3: 10_000.0}  # of a TIFF's units of resolution, inch and centimetre


class TiffLevels:
    """See ``pyramid.Storage``.

    Raises:
        UserError: not such a file, or one that can only be read whole.
    """

    def __init__(self, path: Path) -> None:
        self._file = _opened(path)
        try:
            pages = _level_pages(self._file)
            _check_page(path, pages[0])
            self.levels = [_TiffLevel(page) for page in pages]
            scale = self.levels[-1].brightness()
            for level in self.levels:
                level.scale = scale
            self.stated = next(_stated(self._file, pages[0]), None)
        except UserError:
            self.close()
            raise
        except Exception as error:  # each codec and damaged tag has errors of its own
            self.close()
            raise UserError(
                f"cannot read {path} as a slide: its tags or its smallest level are damaged.", CONVERT, exit_code=1
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _TiffLevel:
    """See ``pyramid.StoredLevel``.

    Attributes:
        scale: of its samples to 8 bits, if they have 16.
        there: for each tile whether it is stored.
    """

    def __init__(self, page: Any) -> None:
        self._page, self.scale = page, 1.0
        self.size: tuple[int, int] = (page.imagelength, page.imagewidth)
        self.tile: tuple[int, int] = page.chunks[:2]
        self.there = np.array(page.databytecounts, np.uint64) > 0

    def _stored(self, index: int) -> Any:
        page = self._page
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        handle = page.parent.filehandle
        if offset + count > handle.size:
            raise ValueError("it is cut off")
        if count > most_stored(self.tile, page.dtype.itemsize):
            raise ValueError("more bytes than any tile of its size")
        options: dict[str, Any] = {"_fullsize": page.is_tiled}
        if page.compression in (6, 7, 34892, 33007):  # JPEG, whose tables are read when they are first asked for
            options |= {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        decode = page.decode  # reads in the file, too, when it is first asked for
        handle.seek(offset)
        data = handle.read(count)
        if page.compression not in _PLAIN:
            check_stored(data, self.tile)
        return decode(data, index, **options)[0][0]

    def part(self, index: int) -> Frame:
        """A tile that is stored."""
        page, pixels = self._page, self._stored(index)
        if pixels.dtype == np.uint16:
            pixels = cv2.convertScaleAbs(pixels, alpha=self.scale)
        if page.photometric == 0:
            pixels = 255 - pixels
        grey = pixels.ndim == 2 or pixels.shape[2] < 3
        if grey:
            return np.asarray(cv2.cvtColor(pixels.reshape(*pixels.shape[:2], -1)[..., 0], cv2.COLOR_GRAY2BGR), np.uint8)
        return np.ascontiguousarray(pixels[..., 2::-1])

    def brightness(self) -> float:
        """The scale of 16-bit samples to 8, by the largest of this level."""
        if self._page.dtype != np.uint16:
            return 1.0
        if self.size[0] * self.size[1] > 1 << 26:
            return 255 / 65535
        return 255 / full_scale(
            max((int(self._stored(int(index)).max()) for index in np.flatnonzero(self.there)), default=0)
        )


def _opened(path: Path) -> Any:
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise UserError("slides need the package tifffile.", f"Install it: {install_command('slide')}") from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is damaged is said once, by name
    if not path.is_file():
        raise UserError(f"no file {path}.", "Check the name.", exit_code=1)
    try:
        return tifffile.TiffFile(path, _multifile=False)  # else it opens the files that this one names
    except Exception as error:
        raise UserError(
            f"cannot read {path} as a slide: it is no TIFF, SVS or NDPI file, or is damaged.", CONVERT, exit_code=1
        ) from error


def _level_pages(file: Any) -> list[Any]:
    """The first picture and its smaller copies, the largest first.

    Some programs mark levels as such; of others, later pages of the same shape that are smaller are taken.
    """
    try:
        series = file.series[0]
        pages = [level.keyframe for level in series.levels]
        if len(pages) == 1:
            pages += [other.keyframe for other in file.series[1:] if _is_level(other.keyframe, pages[0])]
        lacking = len(pages[0].subifds or ()) + 1 - len(pages)
    except Exception as error:
        raise UserError(
            f"cannot read {file.filename}: its pages are damaged.", "Copy it again.", exit_code=1
        ) from error
    if lacking > 0:
        log.warning("Of the smaller pictures in %s, passed over as missing or no levels: %d.", file.filename, lacking)
    main = pages[0]
    kept = [main]
    for page in sorted(pages[1:], key=lambda page: -int(page.imagewidth)):
        try:
            _check_page(Path(file.filename), page)
        except UserError as error:
            log.warning("A level of %s is passed over: %s", file.filename, error.message)
        else:
            kept.append(page)
    return kept


def _is_level(page: Any, main: Any) -> bool:
    across, down = page.imagewidth / main.imagewidth, page.imagelength / main.imagelength
    return bool(page.is_tiled and page.dtype == main.dtype and 0 < across < 0.75 and abs(down / across - 1) < 0.01)


def _check_page(path: Path, page: Any) -> None:
    fault = ""
    if page.dtype not in (np.uint8, np.uint16):
        fault = f"its samples are {page.dtype}"
    elif page.planarconfig == 2 and page.samplesperpixel > 1:
        fault = "its colours lie in separate planes"
    elif page.photometric not in (0, 1, 2, 6):
        fault = f"its colours are {getattr(page.photometric, 'name', page.photometric)}"
    elif min(page.imagewidth, page.imagelength) < 1 or not page.dataoffsets:
        fault = "it holds no picture"
    elif len(page.dataoffsets) != len(page.databytecounts) or len(page.dataoffsets) < math.prod(page.chunked[:2]):
        fault = "it lists fewer tiles than it has"
    if fault:
        raise UserError(f"cannot read {path}: {fault}.", CONVERT, exit_code=1)
    check_level(path, (page.imagelength, page.imagewidth), page.chunks[:2], page.parent.filehandle.size)


def _stated(file: Any, page: Any) -> Iterator[float]:
    description = str(page.description or "")
    if (match := re.search(r"\bMPP\s*=\s*([^|\s]+)", description)) is not None:
        yield _number(match[1])
    if file.is_ome:
        values = dict(re.findall(r'\b(PhysicalSizeX(?:Unit)?)="([^"]*)"', file.ome_metadata or ""))
        unit = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}.get(values.get("PhysicalSizeXUnit", "µm"))
        if "PhysicalSizeX" in values and unit is not None:
            yield _number(values["PhysicalSizeX"]) * unit
    unit = _MICROMETRES.get(int(page.tags.valueof(296, default=1)))
    resolution = page.tags.valueof(282)
    if unit is not None and resolution is not None:
        above, below = resolution if isinstance(resolution, tuple) else (resolution, 1)
        yield unit * below / above if above else math.inf


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
