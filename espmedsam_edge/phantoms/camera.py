"""Phantom scenes seen by a colour camera: skin under a dermatoscope, the eye's fundus, the colon.

Each takes a stage and gives the image, (H, W, 3) float32 BGR in 0..255, and the target's mask, (H, W) bool.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.phantoms.stage import Field, Stage, bezier, flat, paint, soft

_Picture = tuple[Field, NDArray[np.bool_]]


def dermoscopy(stage: Stage) -> _Picture:
    """Skin with a brown, irregular lesion, freckles, hairs, gel reflections and, at times, a dark frame."""
    skin = np.array([150, 175, 222]) * stage.uniform(0.72, 1.05) * stage.rng.uniform(0.94, 1.06, 3)
    shade = 1 + 0.07 * stage.noise(0.6, 2) + 0.025 * stage.noise(0.03, 2) + stage.uniform(-0.2, 0.2) * stage.x
    image = flat(stage, skin) * shade[..., None]
    image = paint(image, skin * [0.72, 0.74, 0.97], 0.5 * soft(stage.noise(0.35, 2) - 1.0, 0.5))

    center, drift = stage.rng.uniform(-0.16, 0.16, 2), stage.drift(0.06)
    place = (center[0] + drift[0], center[1] + drift[1])
    radius = stage.uniform(0.13, 0.3)
    lesion = stage.blob(place, (radius, radius * stage.uniform(0.6, 1)), stage.uniform(0, math.pi), 0.16)
    lesion += 0.05 * stage.noise(0.07, 2, place)
    pigment = np.clip(stage.uniform(0.4, 0.75) + 0.16 * stage.noise(0.09, 3, place), 0.15, 0.95)
    amount = soft(lesion, stage.uniform(0.05, 0.22)) * pigment
    image = paint(image, skin * [0.18, 0.24, 0.38] * stage.rng.uniform(0.8, 1.25, 3), amount)
    if stage.rng.random() < 0.4:  # a blue-white veil
        image = paint(image, (150, 125, 120), 0.5 * soft(lesion - 0.45, 0.2) * soft(stage.noise(0.1, 2, place), 0.6))

    for _ in range(int(stage.rng.integers(2, 9))):
        spot = stage.blob(tuple(stage.rng.uniform(-0.6, 0.6, 2)), (stage.uniform(0.008, 0.03),) * 2, 0, 0.1)
        image = paint(image, skin * [0.5, 0.55, 0.7], soft(spot, 0.4) * stage.uniform(0.4, 0.9))

    count = int(stage.rng.integers(0, 14))
    starts, angles = stage.rng.uniform(-0.6, 0.6, (count, 2)), stage.rng.normal(stage.uniform(0, math.pi), 0.5, count)
    lengths, bends = stage.rng.uniform(0.3, 1.0, count), stage.rng.normal(0, 0.12, (count, 2))
    hairs = [
        bezier(np.array([start, start + 0.5 * length * _direction(angle) + bend, start + length * _direction(angle)]))
        for start, angle, length, bend in zip(starts, angles, lengths, bends, strict=True)
    ]
    image = paint(image, skin * 0.22, 0.85 * stage.curves(hairs, list(stage.rng.uniform(0.003, 0.007, count))))
    glints = stage.noise(0.02, 1, stage.drift(0.02)) - 3.2
    image = paint(image, (250, 250, 250), 0.6 * soft(glints, 0.2))
    if stage.rng.random() < 0.4:
        frame = np.hypot(stage.x, stage.y) - np.float32(stage.uniform(0.56, 0.66))
        image = paint(image, (12, 10, 10), soft(frame, 0.015))
    return image + stage.white(2.5)[..., None], lesion > 0


def fundus(stage: Stage) -> _Picture:
    """An orange disc on black with optic disc, macula and branching vessels; haemorrhages and exudates distract."""
    base = np.array([38, 82, 190]) * stage.uniform(0.75, 1.15) * stage.rng.uniform(0.9, 1.1, 3)
    drift = stage.drift(0.035)
    edge = soft(np.float32(0.47) - np.hypot(stage.x, stage.y), 0.004)
    image = flat(stage, base) * (1 + 0.09 * stage.noise(0.3, 3, drift) - 0.9 * (stage.x**2 + stage.y**2))[..., None]

    side = 1.0 if stage.rng.random() < 0.5 else -1.0
    disc = np.array([side * stage.uniform(0.15, 0.24), stage.uniform(-0.06, 0.06)])
    head = (disc[0] + drift[0], disc[1] + drift[1])
    macula = stage.blob((head[0] - side * 0.3, head[1] + 0.03), (0.11, 0.1), 0, 0.05)
    image = paint(image, base * [0.55, 0.5, 0.62], 0.75 * soft(macula - 0.35, 0.35))
    for color, kind in (((105, 190, 225), 1.9), (base * [0.5, 0.35, 0.6], 2.1)):  # exudates, haemorrhages
        spots = (
            stage.noise(0.035, 1, drift)
            + 0.7 * stage.noise(0.25, 1, drift)
            - np.float32(kind + stage.uniform(0.4, 1.8))
        )
        image = paint(image, color, 0.7 * soft(spots, 0.2))
    optic = stage.blob(head, (0.062, 0.07), 0, 0.03)
    image = paint(image, (120, 205, 250), 0.85 * soft(optic, 0.12))
    image = paint(image, (170, 235, 255), 0.8 * soft(optic - 0.45, 0.15))

    lines, widths = _vessel_tree(stage.rng, disc, side)
    moved = [line + drift for line in lines]
    vessels = stage.curves(moved, widths)
    strength = stage.blur(vessels, 0.0016) * stage.uniform(0.45, 0.8) * (1 + 0.15 * stage.noise(0.2, 1))
    image = paint(image, base * [0.42, 0.28, 0.55], np.clip(strength, 0, 1))
    image = paint(image, base * [0.9, 1.1, 1.15], 0.35 * stage.curves(moved, [width * 0.25 for width in widths]))
    image = image * edge[..., None] + 6
    return image + stage.white(3.0)[..., None], (vessels >= 0.5) & (edge > 0.5)


def _vessel_tree(
    rng: np.random.Generator, disc: NDArray[np.float64], side: float
) -> tuple[list[NDArray[np.float64]], list[float]]:
    """Four arcades from the optic disc and their branches: polylines and widths, in units."""
    lines: list[NDArray[np.float64]] = []
    widths: list[float] = []
    pending: list[tuple[NDArray[np.float64], float, float, float, int]] = []
    for vertical in (-1.0, 1.0):
        for spread in (0.9, 1.9):
            angle = math.atan2(vertical, -side * 0.8 * (1.4 - spread)) + rng.normal(0, 0.15)
            # The temporal arcades bend round the macula, the nasal ones leave straight.
            bend = vertical * side * (0.085 if spread < 1.4 else 0.01)
            pending.append((disc, angle, rng.uniform(0.013, 0.018), bend, 0))
    while pending:
        point, angle, width, bend, depth = pending.pop()
        path = [point]
        steps = int(rng.integers(10, 20)) if depth else 34
        for step in range(steps):
            angle += bend + rng.normal(0, 0.11)
            bend *= 0.93
            path.append(path[-1] + 0.021 * _direction(angle))
            if np.hypot(*path[-1]) > 0.6:
                break
            if (
                depth < 3
                and step > 1
                and len(pending) + len(lines) < 90
                and rng.random() < (0.2 if depth == 0 else 0.1)
            ):
                turn = rng.uniform(0.45, 0.95) * (1 if rng.random() < 0.5 else -1)
                pending.append((path[-1], angle + turn, width * rng.uniform(0.5, 0.72), 0.0, depth + 1))
            if len(path) > 6:
                lines.append(np.array(path))
                widths.append(max(width, 0.003))
                path, width = [path[-1]], width * 0.87
        if len(path) > 1:
            lines.append(np.array(path))
            widths.append(max(width, 0.003))
    return lines, widths


def colonoscopy(stage: Stage) -> _Picture:
    """Pink, folded mucosa with a dark lumen, a polyp of nearly its colour, specular light, black corners."""
    base = np.array([82, 100, 195]) * stage.uniform(0.8, 1.1) * stage.rng.uniform(0.9, 1.1, 3)
    sway = stage.drift(0.03)
    lumen = stage.rng.uniform(-0.28, 0.28, 2) + sway
    dx, dy = stage.x - np.float32(lumen[0]), stage.y - np.float32(lumen[1])
    depth = np.hypot(dx, dy) * (1 + 0.12 * stage.noise(0.5, 2, sway)) + 0.02 * stage.noise(0.15, 2, sway)
    depth = np.maximum(depth, 0)
    rings = np.sin(np.float32(stage.uniform(5, 8)) * np.log(depth + 0.12) * 2.2 + 0.5 * stage.noise(0.5, 1, sway))
    light = np.clip(0.28 + 1.25 * np.sqrt(depth), 0, 1.15) * (1 + 0.13 * rings - 0.12 * np.maximum(rings, 0) ** 6)
    image = flat(stage, base) * (light * (1 + 0.05 * stage.noise(0.05, 3, sway)))[..., None]
    veins = np.abs(stage.noise(0.16, 3, sway))
    image = paint(image, base * [0.6, 0.55, 0.85], 0.4 * soft(0.07 - veins, 0.05))

    place = stage.rng.uniform(-0.2, 0.2, 2) + stage.drift(0.07)
    radius = stage.uniform(0.07, 0.2)
    spot = (float(place[0]), float(place[1]))
    polyp = stage.blob(spot, (radius, radius * stage.uniform(0.65, 1)), stage.uniform(0, math.pi), 0.1)
    tilt = stage.uniform(0, 2 * math.pi)
    slope = ((stage.x - spot[0]) * math.cos(tilt) + (stage.y - spot[1]) * math.sin(tilt)) / np.float32(radius)
    relief = np.sqrt(np.clip(polyp, 0, 1))
    color = base * stage.rng.uniform(0.92, 1.12, 3) * stage.uniform(0.95, 1.12)
    local = stage.uniform(0.72, 0.95) * (0.72 + 0.42 * relief + 0.16 * slope) * (1 + 0.07 * stage.noise(0.03, 2, spot))
    shadow = stage.blob(
        (spot[0] - 0.025 * math.cos(tilt), spot[1] - 0.025 * math.sin(tilt)), (radius * 1.12,) * 2, 0, 0.05
    )
    image = paint(image, base * 0.3, 0.42 * soft(shadow, 0.12) * soft(-polyp, 0.03))
    image = paint(image, flat(stage, color) * local[..., None], soft(polyp, 0.035))

    wet = stage.noise(0.022, 1, sway) + 0.8 * stage.noise(0.3, 1, sway) - 2.9 - 1.2 * soft(0.25 - depth, 0.1)
    image = paint(image, (250, 250, 255), 0.9 * soft(wet, 0.25))
    for _ in range(3):
        shift = stage.rng.uniform(-0.45, 0.45, 2) * radius
        glint = stage.blob(
            (spot[0] + shift[0], spot[1] + shift[1]), (radius * stage.uniform(0.05, 0.16), radius * 0.06), tilt, 0.1
        )
        image = paint(image, (252, 252, 255), 0.95 * soft(glint, 0.25))
    half_width, half_height = stage.width / stage.unit / 2, stage.height / stage.unit / 2
    cut = np.float32(half_width + half_height - stage.uniform(0.14, 0.26)) - np.abs(stage.x) - np.abs(stage.y)
    inside = soft(np.minimum(cut, np.float32(half_width - 0.015) - np.abs(stage.x)), 0.004)
    image = image * inside[..., None] + 4
    return image + stage.white(2.5)[..., None], (polyp > 0) & (inside > 0.5)


def _direction(angle: float) -> NDArray[np.float64]:
    return np.array([math.cos(angle), math.sin(angle)])
