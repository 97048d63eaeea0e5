"""How far a picture's pixels lie apart: what counts as such a distance, and how users write it."""

from __future__ import annotations

import re

from espmedsam_edge.errors import UserError
from espmedsam_edge.objects.instance import Spacing

SMALLEST, LARGEST = 1e-6, 1e4
"""Millimetres: from a nanometre to ten metres; others are no distance between pixels."""

MILLIMETRES = {"nm": 1e-6, "um": 1e-3, "µm": 1e-3, "μm": 1e-3, "micron": 1e-3, "mm": 1.0, "cm": 10.0}
"""Of each unit that is known."""

RESOLUTION = "tiff"
"""What asks for the resolution that a TIFF states, which is often that of a printer."""

_HOW = f"Write 0.25um, 0.5mm or ROWS,COLUMNS as 0.4,0.3mm; or {RESOLUTION} for the resolution that TIFF files state."


def plausible(rows: float, columns: float) -> bool:
    """Whether both are distances between pixels, in millimetres."""
    return all(SMALLEST <= value <= LARGEST for value in (rows, columns))


def parse_spacing(text: str) -> Spacing | None:
    """A spacing as a user writes it, in millimetres between rows and between columns; None for ``RESOLUTION``.

    Examples:
        >>> from espmedsam_edge.objects.spacing import parse_spacing
        >>> parse_spacing("0.5mm"), parse_spacing("400,300 um")
        ((0.5, 0.5), (0.4, 0.3))

    Raises:
        UserError: no number over 0 and in reason, or no unit.
    """
    if text.strip().lower() == RESOLUTION:
        return None
    match = re.fullmatch(rf"\s*(.*?)\s*({'|'.join(MILLIMETRES)})\s*", text, re.IGNORECASE)
    if match is None:
        raise UserError(f"spacing '{text}' has no unit.", _HOW)
    try:
        values = [float(part) * MILLIMETRES[match[2].lower()] for part in match[1].split(",")]
    except ValueError:
        raise UserError(f"spacing '{text}' is no number.", _HOW) from None
    rows, columns = (values * 2)[:2] if len(values) < 3 else (0.0, 0.0)
    if not plausible(rows, columns):
        raise UserError(f"spacing '{text}' is no distance between pixels.", _HOW)
    return rows, columns
