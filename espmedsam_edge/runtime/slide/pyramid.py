"""A slide's file as levels of a pyramid, of which any part can be read: TIFF, OME-TIFF, SVS, NDPI by tifffile."""

from __future__ import annotations

import logging
import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import full_scale
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.machine.installation import install_command

log = logging.getLogger(__name__)

GLASS = 255
"""What stands for what is not there: outside the slide, and tiles that scanners leave out."""

_CACHED = 128 << 20  # bytes of decoded tiles
_LARGEST_PART = 1 << 28  # bytes of one tile or strip
_MICROMETRES = {2: 25_400.0, 3: 10_000.0}  # of a TIFF's units of resolution, inch and centimetre
_LEAST_MPP, _MOST_MPP = 0.01, 100.0


@dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Attributes:
        width, height: pixels.
        downsample: pixels of the largest level that one of this spans.
    """

    width: int
    height: int
    downsample: float


class Slide:
    """An open slide. Used by one thread at a time.

    Example:
        >>> with Slide("tissue.svs") as slide:  # doctest: +SKIP
        ...     part = slide.read(0, 10_000, 8_000, 512, 512)

    Attributes:
        levels: the largest first.
        mpp: micrometres a pixel of the largest level; None: the file does not say.
        damaged: how many tiles could not be read so far; glass stands for them.

    Raises:
        UserError: not such a file, or one that can only be read whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.damaged: set[tuple[int, int]] = set()
        self._cache: OrderedDict[tuple[int, int], NDArray[Any] | None] = OrderedDict()
        self._cached = 0
        self._file = _opened(self.path)
        try:
            self._pages = _level_pages(self._file)
            for page in self._pages:
                _check_page(self.path, page)
            main = self._pages[0]
            self.levels = [
                Level(page.imagewidth, page.imagelength, main.imagewidth / page.imagewidth) for page in self._pages
            ]
            self.mpp = _resolution(self.path, self._file, main)
            self._scale = self._brightness()
        except UserError:
            self.close()
            raise

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Frame:
        """A part of a level, (height, width, 3) uint8 BGR; what lies outside is glass."""
        page = self._pages[level]
        found = np.full((height, width, 3), GLASS, np.uint8)
        down, across = page.chunks[:2]
        right, bottom = min(x + width, page.imagewidth), min(y + height, page.imagelength)
        for row in range(max(0, y) // down, -(-bottom // down)):
            for column in range(max(0, x) // across, -(-right // across)):
                part = self._part(level, row, column)
                if part is None:
                    continue
                top, left = max(y, row * down), max(x, column * across)
                low, end = min(bottom, (row + 1) * down), min(right, (column + 1) * across)
                inside = part[top - row * down : low - row * down, left - column * across : end - column * across]
                found[top - y : top - y + len(inside), left - x : left - x + inside.shape[1]] = inside
        return found

    def overview(self, longest: int = 2048) -> Frame:
        """The whole slide, shrunk to about ``longest`` pixels, (h, w, 3) uint8 BGR; read in parts."""
        index = max(n for n, level in enumerate(self.levels) if n == 0 or max(level.width, level.height) >= longest)
        level = self.levels[index]
        factor = max(1, round(max(level.width, level.height) / longest))
        found = np.full((-(-level.height // factor), -(-level.width // factor), 3), GLASS, np.uint8)
        step = factor * max(1, 2048 // factor)
        for y in range(0, level.height, step):
            for x in range(0, level.width, step):
                part = self.read(index, x, y, min(step, level.width - x), min(step, level.height - y))
                size = (-(-part.shape[1] // factor), -(-part.shape[0] // factor))
                small = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
                found[y // factor : y // factor + size[1], x // factor : x // factor + size[0]] = small
        return found

    def _part(self, level: int, row: int, column: int) -> NDArray[Any] | None:
        """One stored tile or strip, (h, w, 3) uint8 BGR; None: it is left out, or damaged."""
        page = self._pages[level]
        index = row * (-(-page.imagewidth // page.chunks[1])) + column
        key = (level, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        try:
            part = self._decoded(page, index)
        except Exception as error:  # noqa: BLE001 (each codec has errors of its own)
            log.debug("level %d, tile %d: %s", level, index, error)
            self.damaged.add(key)
            part = None
        self._cache[key] = part
        self._cached += 0 if part is None else part.nbytes
        while self._cached > _CACHED and len(self._cache) > 1:
            old = self._cache.popitem(last=False)[1]
            self._cached -= 0 if old is None else old.nbytes
        return part

    def _decoded(self, page: Any, index: int) -> NDArray[Any] | None:
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:
            return None
        handle = self._file.filehandle
        if offset + count > handle.size:
            raise ValueError("it is cut off")
        options: dict[str, Any] = {"_fullsize": page.is_tiled}
        if page.compression in (6, 7, 34892, 33007):  # JPEG, whose tables are read when they are first asked for
            options |= {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        decode = page.decode  # reads in the file, too, when it is first asked for
        handle.seek(offset)
        stored = decode(handle.read(count), index, **options)[0]
        if stored is None:
            return None
        pixels = stored[0]
        if pixels.dtype == np.uint16:
            pixels = cv2.convertScaleAbs(pixels, alpha=self._scale)
        if page.photometric == 0:
            pixels = GLASS - pixels
        grey = pixels.ndim == 2 or pixels.shape[2] < 3
        if grey:
            return np.asarray(cv2.cvtColor(pixels.reshape(*pixels.shape[:2], -1)[..., 0], cv2.COLOR_GRAY2BGR), np.uint8)
        return np.ascontiguousarray(pixels[..., 2::-1])

    def _brightness(self) -> float:
        """The scale of 16-bit samples to 8, by the largest of the smallest level."""
        page = self._pages[-1]
        if page.dtype != np.uint16:
            return 1.0
        if page.imagewidth * page.imagelength > 1 << 26:
            return 255 / 65535
        return 255 / full_scale(int(page.asarray().max()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _opened(path: Path) -> Any:
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise UserError("slides need the package tifffile.", f"Install it: {install_command('slide')}") from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is damaged is said once, by name
    if not path.is_file():
        raise UserError(f"no file {path}.", "Check the name.", exit_code=1)
    try:
        return tifffile.TiffFile(path)
    except (tifffile.TiffFileError, OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"cannot read {path} as a slide: it is no TIFF, SVS or NDPI file, or is damaged.", _CONVERT, exit_code=1
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
    except Exception as error:
        raise UserError(
            f"cannot read {file.filename}: its pages are damaged.", "Copy it again.", exit_code=1
        ) from error
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
    elif math.prod(page.chunks) * page.dtype.itemsize > _LARGEST_PART:
        fault = "it is not stored in tiles, so it can only be read whole"
    if fault:
        raise UserError(f"cannot read {path}: {fault}.", _CONVERT, exit_code=1)


_CONVERT = "Convert it to a tiled TIFF: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --bigtiff"


def _resolution(path: Path, file: Any, page: Any) -> float | None:
    """Micrometres a pixel as the file states them; None where it does not, or what it states cannot be."""
    stated = next((value for value in _stated(file, page)), None)
    if stated is None:
        return None
    if not _LEAST_MPP <= stated <= _MOST_MPP:  # nor is NaN
        log.warning(
            "%s states %g micrometres a pixel, which cannot be: nothing is given in micrometres. Say it: --pixel-size",
            path,
            stated,
        )
        return None
    return stated


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
