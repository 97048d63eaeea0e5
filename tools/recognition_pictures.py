"""Changed copies of pictures, as other scanners, screens and files would show them, for fitting the recognition.

Everything takes and gives (H, W, 3) uint8 BGR and draws its chances from the generator it is given.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.recognition import OTHER

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .:/")
_GREY = 3.0  # the mean range of the channels from which a picture counts as coloured
Color = tuple[int, int, int]


def changed(image: Frame, modality: str, rng: Generator) -> Frame:
    """A copy as it may come from elsewhere: first what happens to such pictures, then what happens to any."""
    image = _as_its_kind(image.copy(), modality, rng)
    if rng.random() < 0.5:
        image = _part(image, *rng.uniform(0.6, 1, 2), rng)
    if rng.random() < 0.4:
        image = image[:, ::-1]
    if rng.random() < 0.6:
        image = _stretched(image, rng)
    if rng.random() < 0.7:
        image = _developed(image, rng)
    coloured = is_coloured(image)
    if coloured and rng.random() < 0.4:
        image = _clipped(image * np.exp(rng.uniform(-0.12, 0.12, 3)))
    if rng.random() < 0.25:
        sigma = rng.uniform(0.4, 2) * min(image.shape[:2]) / 300 + 0.1
        image = _frame(cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), sigma))
    if rng.random() < 0.3:
        image = _clipped(image + rng.normal(0, rng.uniform(1, 8), (*image.shape[:2], 3 if coloured else 1)))
    if rng.random() < 0.35:
        image = _bordered(image, 0.18, 0 if rng.random() < 0.85 else int(rng.integers(0, 256)), 0.6, rng)
    if rng.random() < 0.3:
        image = _lettered(image, int(rng.integers(1, 7)), rng)
    if rng.random() < 0.4:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 90))]
        image = _frame(cv2.imdecode(cv2.imencode(".jpg", np.ascontiguousarray(image), quality)[1], cv2.IMREAD_COLOR))
    return np.ascontiguousarray(image)


def is_coloured(image: Frame) -> bool:
    """Whether the channels differ."""
    return bool(np.ptp(image.astype(np.int16), axis=2).mean() > _GREY)


def to_grey(image: Frame) -> Frame:
    """With three equal channels."""
    return _frame(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR))


def drawn(rng: Generator) -> Frame:
    """What is no photograph and no scan: an even colour, noise, a slope, clouds, a page of text or a drawing."""
    height, width = (int(side) for side in rng.integers(100, 500, 2))
    kind = int(rng.integers(0, 6))
    if kind == 0:
        color = rng.integers(0, 256, 3) if rng.random() < 0.5 else rng.choice([0, 8, 128, 250, 255])
        return np.full((height, width, 3), color, np.uint8)
    if kind == 1:
        noise = rng.integers(0, 256, (height, width, 3), np.uint8)
        return noise if rng.random() < 0.5 else to_grey(noise)
    if kind == 2:
        rows, columns = np.mgrid[:height, :width]
        slope = rows / height * rng.uniform(-1, 1) + columns / width * rng.uniform(-1, 1)
        ends = rng.integers(0, 256, (2, 3))
        return _clipped(ends[0] + (ends[1] - ends[0]) * ((slope - slope.min()) / (np.ptp(slope) + 1e-6))[..., None])
    if kind == 3:
        coarse = rng.integers(0, 256, (*rng.integers(3, 20, 2), 3), np.uint8)
        clouds = _frame(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
        return clouds if rng.random() < 0.5 else to_grey(clouds)
    return _page(np.full((height, width, 3), int(rng.choice([255, 245, 230, 20, 0])), np.uint8), kind == 4, rng)


def _page(page: Frame, text: bool, rng: Generator) -> Frame:
    height, width = page.shape[:2]
    ink: Color = (0, 0, 0) if page[0, 0, 0] > 99 else (230, 230, 230)
    for _ in range(rng.integers(5, 40)):
        start, end = ((int(rng.integers(0, width)), int(rng.integers(0, height))) for _ in range(2))
        if text:
            words = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz  "), rng.integers(3, 40)))
            at = (int(width * 0.03), start[1])
            cv2.putText(page, words, at, _FONT, rng.uniform(0.3, 0.6), ink, 1, cv2.LINE_AA)
        elif rng.random() < 0.5:
            cv2.rectangle(page, start, end, _color(rng), -1 if rng.random() < 0.4 else 2)
        else:
            cv2.circle(page, start, int(rng.integers(3, 60)), _color(rng), -1 if rng.random() < 0.5 else 2)
    return page


def _as_its_kind(image: Frame, modality: str, rng: Generator) -> Frame:
    """What is done to pictures of that modality alone."""
    if modality == "ultrasound":
        image = _doppler(image, rng) if rng.random() < 0.1 else image
        image = _sector(image, rng) if rng.random() < 0.55 else image
        return _on_a_screen(image, 0.45, rng) if rng.random() < 0.55 else image
    if modality == "colonoscopy":
        image = _through_a_hole(image, rng) if rng.random() < 0.5 else image
        image = _on_a_screen(image, 0.3, rng) if rng.random() < 0.4 else image
        if rng.random() < 0.25:  # the picture of how the endoscope lies
            height, width = image.shape[:2]
            corner = image[int(height * 0.68) :, : int(width * rng.uniform(0.2, 0.36))]
            corner[:] = rng.integers((0, 60, 0), (60, 160, 120))
        return image
    if modality == "dermoscopy":
        return _through_a_hole(image, rng) if rng.random() < 0.3 else image
    if modality == "fundus":
        return _on_a_screen(image, 0.25, rng) if rng.random() < 0.3 else image
    if modality == "xray":
        image = _turned(image, rng) if rng.random() < 0.35 else image
        return _on_a_screen(image, 0.2, rng) if rng.random() < 0.3 else image
    if modality == "microscopy":
        return _stained(image, rng) if rng.random() < 0.35 else image
    if modality == OTHER:
        image = _through_a_hole(image, rng) if rng.random() < 0.2 else image
        image = _on_a_screen(image, 0.3, rng) if rng.random() < 0.15 else image
        image = _sector(image, rng) if rng.random() < 0.06 else image
        return _part(image, *rng.uniform(0.25, 0.6, 2), rng) if rng.random() < 0.2 else image
    raise ValueError(f"nothing is known of {modality}")


def _part(image: Frame, high: float, wide: float, rng: Generator) -> Frame:
    height, width = image.shape[:2]
    rows, columns = max(8, int(height * high)), max(8, int(width * wide))
    top, left = int(rng.integers(0, max(1, height - rows + 1))), int(rng.integers(0, max(1, width - columns + 1)))
    return image[top : top + rows, left : left + columns]


def _stretched(image: Frame, rng: Generator) -> Frame:
    scale, aspect = np.exp(rng.uniform(np.log(0.35), np.log(1.6))), np.exp(rng.uniform(-0.2, 0.2))
    height, width = image.shape[:2]
    size = (max(16, int(width * scale * aspect)), max(16, int(height * scale / aspect)))
    return _frame(cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR))


def _developed(image: Frame, rng: Generator) -> Frame:
    """Another gamma, contrast and brightness; black stays near black."""
    levels = np.arange(256) / 255
    curve = (levels ** np.exp(rng.uniform(-0.5, 0.5)) * 255 - 110) * rng.uniform(0.7, 1.3) + 110
    return _frame(cv2.LUT(np.ascontiguousarray(image), _clipped(curve + rng.uniform(-20, 20) * levels)))


def _bordered(image: Frame, most: float, value: int, chance: float, rng: Generator) -> Frame:
    height, width = image.shape[:2]
    widths = rng.uniform(0, most, 4) * (height, height, width, width) * (rng.random(4) < chance)
    top, bottom, left, right = (int(side) for side in widths)
    return _frame(cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(value,) * 3))


def _lettered(image: Frame, lines: int, rng: Generator) -> Frame:
    """Letters burnt in, most of them near a border."""
    image = np.ascontiguousarray(image)
    height, width = image.shape[:2]
    for _ in range(lines):
        text = "".join(rng.choice(_LETTERS, rng.integers(2, 16)))
        row = rng.uniform(0.03, 1) if rng.random() < 0.5 else rng.choice([0.06, 0.12, 0.95])
        column = rng.uniform(0, 0.06) if rng.random() < 0.5 else rng.uniform(0.4, 0.85)
        color = (220, 220, 220) if rng.random() < 0.6 else _color(rng)
        size = rng.uniform(0.5, 1.4) * min(height, width) / 500
        at = (int(column * width), int(row * height))
        cv2.putText(image, text, at, _FONT, size, color, 1 + int(min(height, width) > 500), cv2.LINE_AA)
    return image


def _on_a_screen(image: Frame, most: float, rng: Generator) -> Frame:
    """The picture on a larger, dark screen with letters and often a scale of greys."""
    image = _bordered(image, most, int(rng.choice([0, 0, 0, 8, 20, 40])), 0.7, rng)
    image = _lettered(image, int(rng.integers(0, 9)), rng)
    if rng.random() < 0.4:
        height, width = image.shape[:2]
        left = int(width * (rng.uniform(0.9, 0.97) if rng.random() < 0.5 else rng.uniform(0.01, 0.05)))
        top = int(height * rng.uniform(0.05, 0.3))
        scale = image[top : top + int(height * rng.uniform(0.2, 0.6)), left : left + max(2, width // 60)]
        scale[:] = np.linspace(255, 0, len(scale))[:, None, None]
    return image


def _through_a_hole(image: Frame, rng: Generator) -> Frame:
    """Black outside a circle, an octagon or an ellipse, as endoscopes and dermatoscopes show it."""
    height, width = image.shape[:2]
    hole = np.zeros((height, width), np.uint8)
    kind, short = int(rng.integers(0, 3)), min(height, width)
    middle = tuple(int(side * (0.5 + rng.uniform(-0.05, 0.05))) for side in (width, height))
    if kind == 0:
        cv2.circle(hole, middle, int(short * rng.uniform(0.45, 0.62)), 255, -1)
    elif kind == 1:
        cut = rng.uniform(0.05, 0.3) * short
        right, bottom = width - cut, height - cut
        corners = [(cut, 0), (right, 0), (width, cut), (width, bottom)]
        corners += [(right, height), (cut, height), (0, bottom), (0, cut)]
        cv2.fillPoly(hole, [np.array(corners, np.int32)], 255)
    else:
        axes = tuple(int(side * rng.uniform(0.42, 0.6)) for side in (width, height))
        cv2.ellipse(hole, middle, axes, 0, 0, 360, 255, -1)
    return _frame(np.where(hole[..., None] > 0, image, np.uint8(rng.integers(0, 12))))


def _sector(image: Frame, rng: Generator) -> Frame:
    """A linear probe's picture as a convex or a phased one would show it: rows become arcs around the probe."""
    height, width = image.shape[:2]
    columns = int(rng.integers(200, 400))
    rows, half_angle = int(columns * rng.uniform(0.75, 1.1)), rng.uniform(0.35, 0.85)
    depth, inner = rows * rng.uniform(0.9, 1.02), rng.uniform(0.02, 0.5)
    skin = inner * depth / (1 - inner)  # the probe's own radius
    down, across = np.mgrid[:rows, :columns].astype(np.float32)
    across -= columns / 2
    down += np.float32(skin)
    angle, away = np.arctan2(across, down), np.hypot(across, down) - skin
    to_column = ((angle / half_angle + 1) / 2 * (width - 1)).astype(np.float32)
    to_row = (away / depth * (height - 1)).astype(np.float32)
    turned = _frame(cv2.remap(image, to_column, to_row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT))
    turned[(np.abs(angle) > half_angle) | (to_row < 0) | (to_row > height - 1)] = 0
    return turned


def _doppler(image: Frame, rng: Generator) -> Frame:
    """A box of coloured flow."""
    height, width = image.shape[:2]
    top, left = int(height * rng.uniform(0.2, 0.5)), int(width * rng.uniform(0.2, 0.5))
    box = image[top : top + int(height * rng.uniform(0.2, 0.4)), left : left + int(width * rng.uniform(0.2, 0.4))]
    coarse = rng.random((8, 8)).astype(np.float32)
    flows = np.asarray(cv2.resize(coarse, (box.shape[1], box.shape[0]), interpolation=cv2.INTER_CUBIC)) > 0.62
    color = np.array([(0, 60, 220), (220, 80, 0), (0, 160, 240)])[rng.integers(0, 3)]
    box[flows] = _clipped(color * rng.uniform(0.6, 1, (int(flows.sum()), 1)))
    cv2.rectangle(image, (left, top), (left + box.shape[1], top + box.shape[0]), (0, 200, 255), 1)
    return image


def _turned(image: Frame, rng: Generator) -> Frame:
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-9, 9), rng.uniform(0.85, 1.1))
    return _frame(cv2.warpAffine(image, turn, (width, height), borderValue=(0, 0, 0)))


def _stained(image: Frame, rng: Generator) -> Frame:
    """Fluorescence in another dye's colour; a stain of another hue and strength."""
    if not is_coloured(image):
        dyes = ((1, 0.2, 0.1), (0.1, 1, 0.1), (0.1, 0.1, 1), (0.9, 0.6, 0.1))
        return _clipped(image * np.array(dyes[rng.integers(0, 4)]))
    planes = cv2.cvtColor(image, cv2.COLOR_BGR2HSV).astype(np.int16)
    planes[..., 0] = (planes[..., 0] + rng.integers(-14, 15)) % 180
    planes[..., 1] = np.clip(planes[..., 1] * rng.uniform(0.6, 1.4), 0, 255)
    return _frame(cv2.cvtColor(planes.astype(np.uint8), cv2.COLOR_HSV2BGR))


def _color(rng: Generator) -> Color:
    blue, green, red = (int(value) for value in rng.integers(0, 256, 3))
    return blue, green, red


def _clipped(values: Any) -> NDArray[np.uint8]:
    return np.clip(values, 0, 255).astype(np.uint8)


def _frame(image: Any) -> Frame:
    return np.asarray(image, np.uint8)
