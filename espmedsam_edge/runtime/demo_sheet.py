"""The demo's contact sheet: pictures, true masks and what was segmented, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay
from espmedsam_edge.modalities import target_of
from espmedsam_edge.runtime.demo import PICTURES, Demo, Shown

TILE = (180, 240)  # (height, width) in pixels
_COLUMNS = 3 * PICTURES
_MARGIN, _GAP, _CAPTION, _HEAD = 16, 6, 26, 64
_PAPER, _INK, _PALE = (250, 250, 250), (40, 40, 40), (120, 120, 120)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def contact_sheet(demo: Demo) -> Frame:
    """Draw the sheet.

    Returns:
        (H, W, 3) uint8 BGR; H grows with the number of modalities.
    """
    rows = [_pictures(demo, modality) for modality in demo.bundle.manifest.modalities]
    if demo.photographs:
        rows.append(_photographs(demo))
    if demo.clip:
        rows.append(_clip(demo))
    width = 2 * _MARGIN + _COLUMNS * TILE[1] + (_COLUMNS - 1) * _GAP
    head = _paper(_HEAD, width)
    _write(head, f"ESP-MedSAM Edge demo: {demo.bundle.manifest.preset}, {_quality(demo)}", 24, 0.65, _INK)
    for column in range(_COLUMNS):
        _write(head, ("picture", "true mask", "segmented")[column % 3], 56, 0.45, _PALE, _left(column))
    sheet: Any = np.vstack([head, *rows, _paper(_MARGIN, width)])
    return np.asarray(sheet, np.uint8)


def _quality(demo: Demo) -> str:
    if demo.trained:
        return "phantoms drawn by the program"
    return "UNTRAINED weights: the masks mean nothing"


def _pictures(demo: Demo, modality: str) -> Frame:
    pictures = [shown for shown in demo.pictures if shown.modality == modality]
    tiles = [tile for shown in pictures for tile in _three(shown)]
    scores = [f"{shown.dice:.3f}" for shown in pictures if demo.trained and shown.dice is not None]
    score = f"   Dice {', '.join(scores)}" if scores else ""
    return _row(f"{modality}: {target_of(modality)}{score}", tiles)


def _photographs(demo: Demo) -> Frame:
    tiles = [tile for shown in demo.photographs[:PICTURES] for tile in _three(shown)]
    names = " and ".join(f"{shown.path.stem} ({shown.modality})" for shown in demo.photographs[:PICTURES])
    return _row(f"photographs: {names}; their true masks are not known", tiles)


def _clip(demo: Demo) -> Frame:
    tiles = [_segmented(shown) for shown in demo.clip[:_COLUMNS]]
    return _row(f"{demo.clip[0].modality} clip, frames as segmented", tiles)


def _three(shown: Shown) -> list[Frame]:
    style = OverlayStyle(color_of(shown.modality))
    truth = _paper(*TILE) if shown.truth is None else _fit(draw_overlay(shown.image, shown.truth, style))
    return [_fit(shown.image), truth, _segmented(shown)]


def _segmented(shown: Shown) -> Frame:
    return _fit(draw_overlay(shown.image, shown.mask, OverlayStyle(color_of(shown.modality))))


def _row(caption: str, tiles: Sequence[Frame]) -> Frame:
    width = 2 * _MARGIN + _COLUMNS * TILE[1] + (_COLUMNS - 1) * _GAP
    row = _paper(_CAPTION + TILE[0] + _GAP, width)
    _write(row, caption, 18, 0.5, _INK)
    for column, tile in enumerate(tiles):
        row[_CAPTION : _CAPTION + TILE[0], _left(column) : _left(column) + TILE[1]] = tile
    return row


def _left(column: int) -> int:
    return _MARGIN + column * (TILE[1] + _GAP)


def _paper(height: int, width: int) -> Frame:
    return np.full((height, width, 3), _PAPER, np.uint8)


def _fit(image: Frame) -> Frame:
    """Shrink or enlarge to a tile without distortion, centred on paper."""
    height, width = image.shape[:2]
    scale = min(TILE[0] / height, TILE[1] / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small: Any = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    tile = _paper(*TILE)
    top, left = (TILE[0] - size[1]) // 2, (TILE[1] - size[0]) // 2
    tile[top : top + size[1], left : left + size[0]] = small
    return tile


def _write(
    paper: Frame, text: str, baseline: int, scale: float, ink: tuple[int, int, int], left: int = _MARGIN
) -> None:
    cv2.putText(paper, text, (left, baseline), _FONT, scale, ink, 1, cv2.LINE_AA)
