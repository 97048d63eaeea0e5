"""The demo's contact sheet: pictures, true masks and what was segmented, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from espmedsam_edge.demo.demo import PICTURES, Demo, Shown
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay
from espmedsam_edge.modalities import target_of

TILE = (180, 240)  # (height, width) in pixels
_COLUMNS = 3 * PICTURES
_MARGIN, _GAP, _CAPTION, _HEAD = 16, 6, 26, 64
_PAPER, _INK, _PALE = (250, 250, 250), (40, 40, 40), (120, 120, 120)
# What was done to a picture before it was segmented: as it comes, hardly a nucleus of it would be found.
_PREPARED = {"ihc": "immunostained tissue, of which the stain of the nuclei alone is segmented"}
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def contact_sheet(demo: Demo) -> Frame:
    """Draw the sheet.

    Returns:
        (H, W, 3) uint8 BGR; H grows with the number of modalities.
    """
    generated = dict.fromkeys(shown.modality for shown in demo.pictures)
    rows = [_pictures(demo, modality) for modality in generated]
    if demo.photographs:
        rows.append(_photographs(demo))
    if demo.clip:
        rows.append(_clip(demo))
    width = 2 * _MARGIN + _COLUMNS * TILE[1] + (_COLUMNS - 1) * _GAP
    head = _paper(_HEAD, width)
    _write(head, f"ESP-MedSAM Edge demo: {demo.manifest.preset}, {_quality(demo)}", 24, 0.65, _INK)
    for column in range(_COLUMNS if generated else 0):
        _write(head, ("picture", "true mask", "segmented")[column % 3], 56, 0.45, _PALE, _left(column))
    sheet: Any = np.vstack([head, *rows, _paper(_MARGIN, width)])
    return np.asarray(sheet, np.uint8)


def _quality(demo: Demo) -> str:
    if demo.shipped:
        return "the weights that came with the program"
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
    """A row of double height for each: picture, mask, overlay."""
    rows = []
    for shown in demo.photographs[:PICTURES]:
        mask = np.repeat(shown.mask[..., None], 3, axis=2)
        name = shown.path.stem.replace("scikit-image-", "")
        caption = f"{shown.modality}: {target_of(shown.modality)} ({name}, from scikit-image; true mask not known)"
        caption += "".join(f", {words}" for words in (_PREPARED.get(name), *_how(shown)) if words)
        rows.append(_row(caption, [_fit(image, 2) for image in (shown.image, mask, shown.drawn)], 2))
    stacked: Any = np.vstack(rows)
    return np.asarray(stacked, np.uint8)


def _how(shown: Shown) -> list[str]:
    """In how many tiles it was segmented, and what was counted."""
    words = [f"in {shown.tiles} tiles"] if shown.tiles > 1 else []
    return words if shown.objects is None else [*words, f"{shown.objects} objects told apart"]


def _clip(demo: Demo) -> Frame:
    tiles = [_fit(shown.drawn) for shown in demo.clip[:_COLUMNS]]
    return _row(f"{demo.clip[0].modality} clip, frames as segmented", tiles)


def _three(shown: Shown) -> list[Frame]:
    style = OverlayStyle(color_of(shown.modality))
    truth = _paper(*TILE) if shown.truth is None else _fit(draw_overlay(shown.image, shown.truth, style))
    return [_fit(shown.image), truth, _fit(shown.drawn)]


def _row(caption: str, tiles: Sequence[Frame], scale: int = 1) -> Frame:
    """Tiles side by side under a line of text; ``scale`` tiles wide and high each."""
    width = 2 * _MARGIN + _COLUMNS * TILE[1] + (_COLUMNS - 1) * _GAP
    tall, wide = _span(scale)
    row = _paper(_CAPTION + tall + _GAP, width)
    _write(row, caption, 18, 0.5, _INK)
    for column, tile in enumerate(tiles):
        left = _left(column * scale)
        row[_CAPTION : _CAPTION + tall, left : left + wide] = tile
    return row


def _span(scale: int) -> tuple[int, int]:
    """(height, width) of ``scale`` x ``scale`` tiles with the gaps between them."""
    return scale * TILE[0] + (scale - 1) * _GAP, scale * TILE[1] + (scale - 1) * _GAP


def _left(column: int) -> int:
    return _MARGIN + column * (TILE[1] + _GAP)


def _paper(height: int, width: int) -> Frame:
    return np.full((height, width, 3), _PAPER, np.uint8)


def _fit(image: Frame, tiles: int = 1) -> Frame:
    """Shrink or enlarge to ``tiles`` x ``tiles`` tiles without distortion, centred on paper."""
    height, width = image.shape[:2]
    tall, wide = _span(tiles)
    scale = min(tall / height, wide / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small: Any = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    tile = _paper(tall, wide)
    top, left = (tall - size[1]) // 2, (wide - size[0]) // 2
    tile[top : top + size[1], left : left + size[0]] = small
    return tile


def _write(
    paper: Frame, text: str, baseline: int, scale: float, ink: tuple[int, int, int], left: int = _MARGIN
) -> None:
    cv2.putText(paper, text, (left, baseline), _FONT, scale, ink, 1, cv2.LINE_AA)
