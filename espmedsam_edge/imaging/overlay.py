"""Drawing a mask onto a frame: tint, outline, notice. The reference for the CUDA overlay kernel."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.imaging.geometry import Frame

Color = tuple[int, int, int]  # B, G, R

# Colours that tissue and greyscale scans do not have, far from the modality's own tones.
_COLORS: dict[str, Color] = {
    "dermoscopy": (255, 200, 0),
    "xray": (80, 220, 60),
    "fundus": (255, 220, 40),
    "colonoscopy": (255, 220, 40),
    "ultrasound": (60, 220, 120),
    "microscopy": (0, 200, 255),
}
_OTHERS: tuple[Color, ...] = ((255, 200, 0), (80, 220, 60), (60, 230, 255), (255, 80, 220), (0, 170, 255))


def color_of(modality: str) -> Color:
    """The overlay colour of a modality, (B, G, R); the same in every run for modalities a user adds."""
    return _COLORS.get(modality) or _OTHERS[zlib.crc32(modality.encode()) % len(_OTHERS)]


@dataclass(frozen=True)
class OverlayStyle:
    """How a mask is drawn.

    Attributes:
        color: (B, G, R).
        opacity: of the tint, 0 (none) to 1 (the colour alone).
        outline: whether the mask's edge is drawn in the full colour.
        notice: a short text burnt into the upper left corner, or "".
    """

    color: Color
    opacity: float = 0.35
    outline: bool = True
    notice: str = ""


Styling = OverlayStyle | Callable[[str], OverlayStyle]
"""A style, or what says at each frame which one its modality has now: viewers may change it."""


def style_now(styling: Styling, modality: str) -> OverlayStyle:
    """The style of the next frame, which was segmented as ``modality``."""
    return styling(modality) if callable(styling) else styling


def draw_overlay(
    frame: Frame, mask: NDArray[np.uint8], style: OverlayStyle, labels: NDArray[np.int32] | None = None
) -> Frame:
    """Draw a mask onto a copy of a frame.

    Inside the mask a pixel becomes ``frame·(1 - opacity) + color·opacity``, rounded. The outline is those mask pixels
    that have a pixel outside the mask within ``outline_width`` rows and columns; the frame's border is no edge. Where
    objects touch, so is a pixel beside another one's, which makes a line of two.

    Args:
        frame: (H, W, 3) uint8 BGR; not changed.
        mask: (H, W) uint8, 0 or 255.
        style: see ``OverlayStyle``.
        labels: (H, W), numbers of the mask's objects; None: they are not told apart.

    Returns:
        (H, W, 3) uint8 BGR, a new array.
    """
    drawn = np.array(frame, order="C")
    x, y, width, height = cv2.boundingRect(mask)
    if width and height:
        part = np.s_[y : y + height, x : x + width]
        inside = mask[part]
        solid = np.empty((height, width, 3), np.uint8)
        cv2.rectangle(solid, (0, 0), (width, height), style.color, cv2.FILLED)  # 50 times as fast as NumPy's fill
        tinted: Any = cv2.addWeighted(drawn[part], 1 - style.opacity, solid, style.opacity, 0)
        _paste(tinted, inside, drawn[part])
        if style.outline:
            _paste(solid, _edge(mask, outline_width(frame.shape[:2]))[part], drawn[part])
            if labels is not None:
                _paste(solid, _seams(labels[part]), drawn[part])
    if style.notice:
        write_notice(drawn, style.notice)
    return drawn


def outline_width(size: tuple[int, int]) -> int:
    """Pixels: 1 for frames up to 600 on the short side, then 1 more for every 600."""
    return 1 + min(size) // 600


def _edge(mask: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    edge: Any = cv2.subtract(mask, cv2.erode(mask, kernel))
    return np.asarray(edge, np.uint8)


def _seams(labels: NDArray[np.int32]) -> NDArray[np.uint8]:
    """255 where an object's pixel lies beside or below another object's, and there."""
    seams = np.zeros(labels.shape, np.uint8)
    for one, other in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        meet = (labels[one] != labels[other]) & (labels[one] > 0) & (labels[other] > 0)
        seams[one][meet] = seams[other][meet] = 255
    return seams


def _paste(source: NDArray[np.uint8], mask: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    """Copy source into target, in place, where the mask is not 0."""
    result: Any = cv2.copyTo(source, mask, target)
    if result is not target:  # OpenCV works in place on a view of rows and columns; this holds if it ever copies
        target[:] = result


def write_notice(frame: Frame, text: str) -> None:
    """White letters on a darkened strip in the upper left corner, in place, never wider than the frame."""
    height, width = frame.shape[:2]
    font, margin = cv2.FONT_HERSHEY_SIMPLEX, 1 + min(height, width) // 100
    (at_one, letters), _ = cv2.getTextSize(text, font, 1, 1)
    scale = min((width - 3 * margin) / at_one, max(0.4, 0.04 * height / letters))
    thickness = max(1, round(2 * scale))
    (across, up), down = cv2.getTextSize(text, font, scale, thickness)
    strip = frame[: up + down + 2 * margin, : across + 2 * margin]
    strip[:] = strip // 4
    cv2.putText(frame, text, (margin, margin + up), font, scale, (255, 255, 255), thickness, cv2.LINE_AA)
