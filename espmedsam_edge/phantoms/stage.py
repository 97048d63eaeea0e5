"""What phantom scenes are drawn with: coordinates, smooth noise, irregular outlines, curves and motion.

Lengths are in units of the image's shorter side, positions from its centre, so a scene does not depend on the size in
pixels. Everything random is drawn in amounts that do not depend on it either.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]  # (H, W)

FRAMES_A_TURN = 96  # frames until a drifting target is back where it started, roughly
_REACH = 2.0  # noise covers positions from -2 to 2 units and is mirrored beyond
_SUBPIXEL_BITS = 4


class Stage:
    """The canvas and the two random streams of one frame: ``rng`` repeats in every frame, ``grain`` does not."""

    def __init__(self, modality: str, seed: int, size: tuple[int, int], frame: int) -> None:
        self.height, self.width = size
        self.unit = min(size)
        scene = zlib.crc32(modality.encode())
        self.name_rng = np.random.default_rng([scene])
        self.rng = np.random.default_rng([scene, seed])
        self.grain = np.random.default_rng([scene, seed, frame + 1])
        self.turn = 2 * math.pi * frame / FRAMES_A_TURN
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32)
        self.x: Field = (x - (self.width - 1) / 2) / self.unit
        self.y: Field = (y - (self.height - 1) / 2) / self.unit

    def uniform(self, low: float, high: float) -> float:
        """One number of the scene's stream."""
        return float(self.rng.uniform(low, high))

    def drift(self, amplitude: float) -> tuple[float, float]:
        """How far something has moved in this frame, (dx, dy); (0, 0) in the first."""
        phases = self.rng.uniform(0, 2 * math.pi, 2)
        speeds = self.rng.uniform(0.7, 1.3, 2)
        move = amplitude * (np.sin(speeds * self.turn + phases) - np.sin(phases))
        return float(move[0]), float(move[1])

    def noise(self, scale: float, octaves: int = 1, offset: tuple[float, float] = (0.0, 0.0)) -> Field:
        """Smooth noise, mean 0 and deviation about 1, with features ``scale`` units wide; ``offset`` moves it."""
        total = np.zeros((self.height, self.width), np.float32)
        power = 0.0
        for octave in range(octaves):
            cell, weight = scale / 2**octave, 0.55**octave
            count = math.ceil(2 * _REACH / cell) + 3
            grid = self.rng.standard_normal((count, count)).astype(np.float32)
            column = (self.x - np.float32(offset[0]) + np.float32(_REACH)) / np.float32(cell) + 1
            row = (self.y - np.float32(offset[1]) + np.float32(_REACH)) / np.float32(cell) + 1
            total += np.float32(weight) * _f32(
                cv2.remap(grid, column, row, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
            )
            power += weight**2 * 0.6  # cubic interpolation averages away some of the variance
        return _f32(total / np.float32(math.sqrt(power)))

    def white(self, deviation: float) -> Field:
        """Noise of a deviation, independent in every pixel and every frame."""
        return _f32(self.grain.standard_normal((self.height, self.width), np.float32) * np.float32(deviation))

    def blob(
        self, center: tuple[float, float], radii: tuple[float, float], angle: float = 0.0, roughness: float = 0.1
    ) -> Field:
        """An irregular ellipse: 1 at the centre, 0 on the outline, negative outside.

        Args:
            center: (x, y).
            radii: (along, across) in units.
            angle: radians.
            roughness: how far the outline strays, relative to the radius.
        """
        dx, dy = self.x - np.float32(center[0]), self.y - np.float32(center[1])
        along = (dx * math.cos(angle) + dy * math.sin(angle)) / np.float32(radii[0])
        across = (dy * math.cos(angle) - dx * math.sin(angle)) / np.float32(radii[1])
        theta = np.arctan2(across, along)
        outline = np.ones_like(theta)
        for order in range(2, 9):
            strength, phase = self.rng.normal(0, roughness / order**0.7), self.rng.uniform(0, 2 * math.pi)
            outline += np.float32(strength) * np.cos(order * theta + np.float32(phase))
        return _f32(1 - np.hypot(along, across) / np.maximum(outline, 0.3))

    def near(self, center: tuple[float, float], reach: float) -> tuple[tuple[slice, slice], Stage]:
        """The square of ``reach`` around a point, as slices of the canvas, and this stage cut down to it."""
        spans = []
        for position, extent in ((center[1], self.height), (center[0], self.width)):
            middle, half = position * self.unit + (extent - 1) / 2, reach * self.unit + 1
            spans.append(slice(min(max(int(middle - half), 0), extent), min(max(int(middle + half) + 1, 0), extent)))
        area = (spans[0], spans[1])
        view = copy.copy(self)
        view.x, view.y = self.x[area], self.y[area]
        view.height, view.width = view.x.shape
        return area, view

    def curves(self, lines: Sequence[NDArray[np.float64]], widths: Sequence[float]) -> Field:
        """Curves through points (n, 2) of (x, y), ``widths`` units thick (at least a pixel): coverage 0..1."""
        canvas = np.zeros((self.height, self.width), np.uint8)
        for line, width in zip(lines, widths, strict=True):
            points = line * self.unit + [(self.width - 1) / 2, (self.height - 1) / 2]
            fixed = np.rint(points * 2**_SUBPIXEL_BITS).astype(np.int32).reshape(-1, 1, 2)
            thickness = max(1, round(width * self.unit))
            cv2.polylines(canvas, [fixed], False, (255,), thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
        return _f32(_f32(canvas) / np.float32(255))

    def blur(self, field: Field, radius: float) -> Field:
        """Gaussian blur with a deviation of ``radius`` units."""
        return _f32(cv2.GaussianBlur(field, (0, 0), max(radius * self.unit, 0.3)))


def soft(field: NDArray[Any], width: float) -> Field:
    """0..1 across the field's zero line, over about ``width`` to either side."""
    return _f32(0.5 + 0.5 * np.tanh(field / np.float32(width)))


def paint(image: Field, color: Sequence[float] | NDArray[Any], amount: Field) -> Field:
    """Mix a BGR colour (0..255; three numbers, or an (H, W, 3) picture) into an (H, W, 3) image."""
    return _f32(image + (_f32(color) - image) * amount[..., None])


def flat(stage: Stage, color: Sequence[float] | NDArray[Any]) -> Field:
    """An (H, W, 3) image of one BGR colour."""
    return np.array(np.broadcast_to(_f32(color), (stage.height, stage.width, 3)))


def bezier(points: NDArray[np.float64], count: int = 24) -> NDArray[np.float64]:
    """``count`` points (x, y) on the quadratic Bézier curve of three control points (3, 2)."""
    t = np.linspace(0, 1, count)[:, None]
    return np.asarray((1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2], np.float64)


def _f32(array: Any) -> NDArray[np.float32]:
    return np.asarray(array, np.float32)
