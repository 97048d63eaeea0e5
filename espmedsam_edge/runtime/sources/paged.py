"""Files of several pictures as frames: pages of a TIFF, ImageJ and OME stacks, animated PNG and WebP."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import cv2
import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import decode_image, max_pixels
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.header_errors import HeaderError
from espmedsam_edge.imaging.headers import ImageHeader, image_format, read_header
from espmedsam_edge.imaging.tiff_header import TiffPages
from espmedsam_edge.objects.stated import stated_spacing
from espmedsam_edge.runtime.sources.files import Clip
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

log = logging.getLogger(__name__)

_ANIMATED = ("PNG", "WebP")
_LARGEST = 8 << 30  # bytes of a file that is looked into
_TOLD = 3  # pages of a file that are left out, each in a line
_LOOKED_AT = 1 << 28  # pixels, for the brightest


class Place(NamedTuple):
    """Where a page belongs, as far as the file says so: seconds, and micrometres along the optical axis."""

    time: float | None = None
    z: float | None = None


def is_paged(path: Path) -> bool:
    """Whether a picture's file holds several that are frames."""
    if not path.is_file():  # opening a pipe would wait for its writer
        return False
    with suppress(OSError, HeaderError, UserError, struct.error):
        with path.open("rb") as stream:
            form = image_format(stream.read(64))
        if form in ("TIFF", *_ANIMATED) and path.stat().st_size < _LARGEST:
            data = _contents(path)
            if read_header(cast(bytes, data)).pictures < 2:
                return False
            if form == "TIFF":  # of a slide, the other pages are levels, a thumbnail and the label
                return not TiffPages(data).description.startswith("Aperio")
            return hasattr(cv2, "imdecodeanimation")
    return False


def _contents(path: Path) -> bytearray:
    """A file's bytes, once in memory, as they are changed to show one page or the other."""
    data = bytearray(path.stat().st_size)
    with path.open("rb") as stream:
        del data[stream.readinto(data) :]
    return data


class PagedPicture(Clip):
    """The pages of a TIFF, or the pictures of an animation, in order; those that do not fit the first are left out."""

    def _open(self) -> tuple[Fraction | None, int | None]:
        try:
            self._data = data = _contents(self.path)
            header = read_header(cast(bytes, data))
        except (OSError, HeaderError) as error:
            raise UserError(f"cannot read {self.path}: {error}.", "Copy it again.", exit_code=1) from error
        self._pages = TiffPages(self._data) if header.format == "TIFF" else None
        self._pictures = header.pictures if self._pages is None else len(self._pages)
        if self._pages is None:
            if header.width * header.height * header.pictures > max_pixels():
                raise UserError(
                    f"{self.path} holds {header.pictures} pictures of {header.width}x{header.height} pixels, over the "
                    f"limit of {max_pixels()} in all.",
                    "Convert it to a video.",
                    exit_code=1,
                )
            return None, header.pictures
        self._places = places_of(self._pages.description, self._pictures)
        self._spacing = stated_spacing(self.path)
        return _rate([place.time for place in self._places]), self._pictures

    def _close(self) -> None:
        del self._data, self._pages

    def _frames(self) -> Iterator[SourceFrame]:
        return self._animation() if self._pages is None else self._pages_of(self._pages)

    def _animation(self) -> Iterator[SourceFrame]:
        found, animation = cv2.imdecodeanimation(np.frombuffer(self._data, np.uint8))
        if not found:
            raise UserError(f"cannot read {self.path}: its pictures cannot be decoded.", "Convert it.", exit_code=1)
        time = 0.0
        for index, (picture, milliseconds) in enumerate(zip(animation.frames, animation.durations, strict=False)):
            yield SourceFrame(np.ascontiguousarray(cast(Frame, picture)[..., :3]), self.path, index, time)
            time += max(0, int(milliseconds)) / 1000

    def _pages_of(self, pages: TiffPages) -> Iterator[SourceFrame]:
        first: tuple[int, ...] | None = None
        largest = self._largest_sample(pages)
        left_out, depths, told = 0, list[int](), False
        for number, place in enumerate(self._places):
            try:
                image = decode_image(cast(bytes, pages.show(number)), f"{self.path}, page {number + 1}", largest)
                if first is not None and image.shape != first:
                    was, now = (f"{shape[1]}x{shape[0]}" for shape in (first, image.shape))
                    fault = f"{self.path}, page {number + 1}, is {now} pixels, the first {was}: it is left out."
                    raise UserError(fault, "Save it as a file of its own.", exit_code=1)
            except (UserError, struct.error) as error:
                left_out += 1
                if left_out <= _TOLD:
                    self.failures.append(Failure(self.name, str(error)))
                continue
            first = image.shape
            header = _header_of(pages, number)
            depths += [header.depth] if header is not None and header.depth not in depths else []
            if len(depths) == 2 and not told:
                told = True
                log.warning(
                    "%s, page %d, has %d bits a sample, the first %d: such pages have a brightness of their own.",
                    self.path,
                    number + 1,
                    *depths[::-1],
                )
            yield SourceFrame(image, self.path, number, place.time, spacing=self._spacing, z=place.z)
        if left_out > _TOLD:
            more = f"{self.path}: {left_out - _TOLD} more of its {self._pictures} pages are left out."
            self.failures.append(Failure(self.name, more))

    def _largest_sample(self, pages: TiffPages) -> int:
        """Of pages of more than 8 bits, so that they share one scale; 0 for others.

        Of all, or in a stack of over 268 megapixels of pages that are spread over it: the first frame waits for this.
        One of those between that is brighter has a scale of its own.
        """
        largest = 0
        first = _header_of(pages, 0)
        if first is None or first.depth <= 8 or first.width * first.height > max_pixels():
            return 0
        most = max(2, _LOOKED_AT // (first.width * first.height))
        looked_at = {round(place) for place in np.linspace(0, len(pages) - 1, min(most, len(pages)))}
        if len(looked_at) < len(pages):
            log.info("%s: %d of %d pages are looked at for their brightness.", self.path, len(looked_at), len(pages))
        for number in sorted(looked_at):
            header = _header_of(pages, number)
            if header is None or (header.width, header.height) != (first.width, first.height):  # it is left out
                continue
            with suppress(cv2.error, struct.error):
                samples: Any = cv2.imdecode(np.frombuffer(pages.show(number), np.uint8), cv2.IMREAD_UNCHANGED)
                if samples is not None and samples.dtype == np.uint16:
                    largest = max(largest, int(samples.max()))
        return largest


def _header_of(pages: TiffPages, number: int) -> ImageHeader | None:
    with suppress(HeaderError, struct.error):
        return read_header(cast(bytes, pages.show(number)))
    return None


def _rate(times: list[float | None]) -> Fraction | None:
    stated = [time for time in times if time is not None]
    span = stated[-1] - stated[0] if len(stated) == len(times) > 1 else 0.0
    return Fraction((len(stated) - 1) / span).limit_denominator(1000) if span > 0 else None


def places_of(description: str, pages: int) -> list[Place]:
    """Where each of a file's pages belongs, by what ImageJ or an OME program wrote into its description."""
    if description.startswith("ImageJ="):
        return _imagej(dict(line.split("=", 1) for line in description.splitlines() if "=" in line), pages)
    pixels = re.search(r"<Pixels\b[^>]*>", description)
    if pixels is not None and "<OME" in description:
        return _ome(dict(re.findall(r'\b(\w+)="([^"]*)"', pixels[0])), pages)
    return [Place()] * pages


def _imagej(values: dict[str, str], pages: int) -> list[Place]:
    """Channels follow each other first, then slices, then frames."""
    channels, slices, frames = (_count(values.get(name)) for name in ("channels", "slices", "frames"))
    interval = _positive(values.get("finterval"))
    rate = _positive(values.get("fps"))
    if interval is None and rate is not None:
        interval = 1 / rate
    return _grid(pages, (channels, slices, frames), "CZT", interval, _positive(values.get("spacing")))


def _ome(values: dict[str, str], pages: int) -> list[Place]:
    order = values.get("DimensionOrder", "XYCZT")[2:]
    if sorted(order) != ["C", "T", "Z"]:
        return [Place()] * pages
    counts = tuple(_count(values.get(f"Size{axis}")) for axis in order)
    units = {"s": 1.0, "ms": 1e-3, "min": 60.0, "µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}
    interval, spacing = _positive(values.get("TimeIncrement")), _positive(values.get("PhysicalSizeZ"))
    second, micrometre = (
        units.get(values.get(f"{of}Unit", unit)) for of, unit in (("TimeIncrement", "s"), ("PhysicalSizeZ", "µm"))
    )
    return _grid(
        pages,
        counts,
        order,
        interval * second if interval is not None and second is not None else None,
        spacing * micrometre if spacing is not None and micrometre is not None else None,
    )


def _grid(
    pages: int, counts: tuple[int, ...], order: str, interval: float | None, spacing: float | None
) -> list[Place]:
    """Places of pages whose axes, of so many steps each, follow in an order, the fastest first."""
    if np.prod(counts) != pages:
        return [Place()] * pages
    steps = np.stack(np.unravel_index(np.arange(pages), counts[::-1])[::-1])  # (axis, page)
    time, z = steps[order.index("T")], steps[order.index("Z")]
    depth = counts[order.index("Z")] > 1
    return [
        Place(
            None if interval is None else float(time[page] * interval),
            float(z[page] * spacing) if spacing is not None and depth else None,
        )
        for page in range(pages)
    ]


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdecimal() and 0 < int(text) < 1 << 31 else 1


def _positive(text: str | None) -> float | None:
    """A number over 0; None for what is none, 0, or not finite."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None
