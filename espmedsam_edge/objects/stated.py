"""The distance of pixels that picture files state: OME and ImageJ say it; a TIFF's resolution may be a printer's."""

from __future__ import annotations

import re
import struct
from mmap import ACCESS_READ, mmap
from pathlib import Path

from espmedsam_edge.imaging.header_errors import HeaderError
from espmedsam_edge.imaging.tiff_header import TIFF_STARTS, Scale, read_scale
from espmedsam_edge.objects.instance import Spacing
from espmedsam_edge.objects.spacing import MILLIMETRES, plausible

_TIFF_UNITS = {2: 25.4, 3: 10.0}  # millimetres in an inch and in a centimetre
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")  # as ImageJ writes a micro sign


def stated_spacing(path: Path, *, resolution: bool = False) -> Spacing | None:
    """Millimetres between a picture's rows and between its columns, as it lies upright.

    Args:
        path: of any picture; only TIFFs say it.
        resolution: whether TIFF's own resolution counts where no program says more.
    """
    try:
        with path.open("rb") as stream:
            if not stream.read(4).startswith(TIFF_STARTS):
                return None
            with mmap(stream.fileno(), 0, access=ACCESS_READ) as data:
                scale = read_scale(data)
    except (OSError, HeaderError, struct.error, OverflowError, ValueError):
        return None
    return spacing_in(scale, resolution=resolution)


def spacing_in(scale: Scale, *, resolution: bool = False) -> Spacing | None:
    """As ``stated_spacing``, of what a file says."""
    found = _of_program(scale)
    unit = _TIFF_UNITS.get(scale.unit)
    if found is None and resolution and unit is not None and scale.across and scale.down:
        found = unit / scale.down, unit / scale.across
    return found if found is not None and plausible(*found) else None


def _of_program(scale: Scale) -> Spacing | None:
    text = scale.description
    if text.startswith("ImageJ="):
        values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        name = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), values.get("unit", ""))
        millimetres = MILLIMETRES.get(name.strip().lower().removesuffix("s"))
        if millimetres is None or not scale.across or not scale.down:
            return None
        return millimetres / scale.down, millimetres / scale.across
    pixels = re.search(r"<Pixels\b[^>]*>", text)
    if pixels is None or "<OME" not in text:
        return None
    ome = dict(re.findall(r'\b(\w+)="([^"]*)"', pixels[0]))
    across, down = (_length(ome, axis) for axis in ("X", "Y"))
    return None if across is None or down is None else (down, across)


def _length(ome: dict[str, str], axis: str) -> float | None:
    unit = MILLIMETRES.get(ome.get(f"PhysicalSize{axis}Unit", "µm").lower())
    try:
        return None if unit is None else float(ome[f"PhysicalSize{axis}"]) * unit
    except (KeyError, ValueError):
        return None
