"""Phantom scenes of instruments that make their own picture: X-ray, ultrasound, the microscope; and any other name.

Each takes a stage and gives the image, (H, W, 3) float32 BGR in 0..255, and the target's mask, (H, W) bool.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.phantoms.stage import Field, Stage, bezier, flat, paint, soft

_Picture = tuple[Field, NDArray[np.bool_]]


def xray(stage: Stage) -> _Picture:
    """A chest film: two dark lung fields under ribs and clavicles, heart and spine between; dark air around."""
    x, y = stage.x - np.float32(stage.uniform(-0.03, 0.03)), stage.y - np.float32(stage.uniform(-0.02, 0.05))
    breath = 1 + 0.05 * math.sin(2 * stage.turn)
    wobble = 0.006 * stage.noise(0.15, 2)
    shoulder = np.clip((y + 0.36) / 0.22, 0, 1)
    torso = np.float32(stage.uniform(0.44, 0.5)) * (0.34 + 0.66 * np.sqrt(shoulder)) + 0.06 * y - np.abs(x) + wobble
    tissue = soft(torso, 0.012)
    gray = 14 + tissue * (stage.uniform(135, 165) + 22 * stage.noise(0.5, 2) + 30 * y)

    top, bottom = stage.uniform(-0.37, -0.32), stage.uniform(0.2, 0.28) + 0.02 * (breath - 1) / 0.05
    lungs = np.full_like(x, -1)
    for side in (-1.0, 1.0):
        center, wide = side * stage.uniform(0.185, 0.215), stage.uniform(0.115, 0.145) * breath
        middle, tall = (top + bottom) / 2, (bottom - top) / 2
        height = (y - np.float32(middle)) / np.float32(tall)
        girth = (
            np.float32(wide)
            * np.sqrt(np.clip(1 - (np.minimum(height, 0)) ** 2 * 0.98, 0.0004, 1))
            * (1 + 0.15 * height)
        )
        across = 1 - np.abs(x - np.float32(center) - np.float32(side * 0.025) * height) / girth
        dome = (np.float32(bottom + (0.0 if side > 0 else -0.03)) + 0.9 * (x - np.float32(center)) ** 2 - y) / 0.1
        lungs = np.maximum(lungs, np.minimum(np.minimum(across, dome), (height + 1) * 3))
    lungs += 2 * wobble
    heart = stage.blob((0.055, bottom - 0.1), (stage.uniform(0.11, 0.16), 0.13), 0.5, 0.05)
    spine = soft(np.float32(0.045) - np.abs(x), 0.012)
    lungs = np.minimum(lungs, -heart * 2)

    air = soft(lungs, 0.12)
    vessels = np.abs(stage.noise(0.1, 3)) * soft(np.float32(0.22) - np.abs(np.abs(x) - 0.08), 0.1)
    lung_gray = stage.uniform(48, 82) + 12 * stage.noise(0.25, 2) + 16 * soft(0.25 - vessels, 0.2)
    gray = gray + (lung_gray - gray) * air
    gray += 9 * soft(heart, 0.08) + 34 * spine * tissue
    if stage.rng.random() < 0.4:  # an infiltrate: a bright patch that is still lung
        patch = (stage.uniform(0.13, 0.25) * (1 if stage.rng.random() < 0.5 else -1), stage.uniform(-0.2, 0.12))
        gray += stage.uniform(25, 60) * soft(stage.blob(patch, (0.09, 0.08), 0, 0.2), 0.3) * air

    phase = (y - 0.55 * (np.abs(x) - 0.12) ** 2 * 4 + 0.22 * np.abs(x)) / np.float32(stage.uniform(0.062, 0.074))
    ribs = np.maximum(np.cos(2 * np.pi * phase), 0) ** 2 * soft(np.float32(0.34) - np.abs(x), 0.02)
    gray += 20 * ribs * tissue * soft(np.float32(bottom + 0.1) - y, 0.05)
    clavicles = [
        bezier(np.array([[side * 0.04, top + 0.07], [side * 0.18, top + 0.02], [side * 0.4, top - 0.03]]))
        for side in (-1.0, 1.0)
    ]
    gray += 26 * stage.blur(stage.curves(clavicles, [0.03, 0.03]), 0.004) * tissue
    marker = np.zeros((stage.height, stage.width), np.uint8)
    corner = (round(stage.width / 2 - 0.45 * stage.unit), round(stage.height / 2 - 0.36 * stage.unit))
    cv2.putText(marker, "R", corner, cv2.FONT_HERSHEY_SIMPLEX, stage.unit / 400, (255,), max(1, stage.unit // 200))
    gray = np.maximum(gray, marker.astype(np.float32) * 0.9)
    gray = stage.blur(gray, 0.0015) + stage.white(3.5)
    contrast = stage.uniform(0.8, 1.15)
    return np.repeat(((gray - 100) * contrast + 100)[..., None], 3, axis=2), lungs > 0


def ultrasound(stage: Stage) -> _Picture:
    """A speckled fan with tissue layers, a hypoechoic lesion, its posterior enhancement, and shadows that distract."""
    apex = np.float32(-0.5 - stage.uniform(0.1, 0.35))
    half_angle = stage.uniform(0.45, 0.65)
    distance, angle = np.hypot(stage.x, stage.y - apex), np.arctan2(stage.x, stage.y - apex)
    near, far = float(-0.47 - apex), float(0.47 - apex)
    depth = (distance - np.float32(near)) / np.float32(far - near)
    fan = (np.abs(angle) < half_angle) & (depth > 0) & (depth < 1)

    sway = stage.drift(0.02)
    warp = depth + 0.04 * stage.noise(0.35, 2, sway)
    layers = 0.5 + 0.22 * np.sin(warp * stage.uniform(12, 20) + stage.uniform(0, 6)) + 0.12 * stage.noise(0.16, 3, sway)
    layers += 0.5 * soft(0.05 - depth, 0.02)
    fat = stage.noise(0.2, 2, sway) - stage.uniform(0.8, 1.4)
    layers = np.maximum(layers - 0.16 * soft(fat, 0.25), 0.22)

    center = np.array([stage.uniform(-0.13, 0.13), stage.uniform(-0.15, 0.12)]) + stage.drift(0.05)
    place = (float(center[0]), float(center[1]))
    radius = stage.uniform(0.08, 0.19)
    lesion = stage.blob(place, (radius, radius * stage.uniform(0.55, 0.85)), stage.uniform(-0.4, 0.4), 0.13)
    inner = stage.uniform(0.06, 0.16) * (1 + 0.3 * stage.noise(0.06, 2, place))
    layers = layers + (inner - layers) * soft(lesion, stage.uniform(0.05, 0.13))
    bearing, reach = math.atan2(place[0], place[1] - float(apex)), math.hypot(place[0], place[1] - float(apex))
    behind = soft(distance - np.float32(reach + 0.6 * radius), 0.02) * np.exp(
        -(((angle - bearing) * np.float32(reach) / np.float32(0.7 * radius)) ** 2)
    )
    layers *= 1 + stage.uniform(-0.45, 0.5) * behind * soft(-lesion, 0.05)
    for _ in range(int(stage.rng.integers(0, 3))):
        shadow = np.exp(-(((angle - stage.uniform(-0.5, 0.5)) / stage.uniform(0.02, 0.06)) ** 2))
        layers *= 1 - 0.6 * shadow * soft(depth - stage.uniform(0.1, 0.6), 0.05)

    layers *= np.clip(1.15 - stage.uniform(0.2, 0.7) * depth, 0.2, 1.2)
    signal = np.clip(layers, 0.02, 1.3) * _speckle(stage, angle / half_angle, depth)
    gray = 255 * np.clip(0.62 + 0.3 * np.log10(np.maximum(signal, 1e-3)), 0, 1) * fan
    gray = gray * stage.uniform(0.85, 1.15) + 3 + stage.white(1.0)
    return np.repeat(gray[..., None], 3, axis=2), (lesion > 0) & fan


def _speckle(stage: Stage, across: Field, depth: Field) -> Field:
    """Fully developed speckle: Rayleigh amplitudes that widen with depth, as a convex probe shows them."""
    beams, samples = 220, 420
    real, imaginary = (stage.grain.standard_normal((samples, beams), np.float32) for _ in range(2))
    waves = [np.asarray(cv2.GaussianBlur(p, (0, 0), sigmaX=0.8, sigmaY=1.1), np.float32) for p in (real, imaginary)]
    amplitude = np.hypot(waves[0], waves[1])
    amplitude = amplitude / amplitude.mean()
    column, row = (across + 1) * np.float32((beams - 1) / 2), depth * np.float32(samples - 1)
    return np.asarray(cv2.remap(amplitude, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)


def microscopy(stage: Stage) -> _Picture:
    """Many nuclei: bright on a dark, hazy field, or (a third of the seeds) stained purple in pink tissue."""
    return _nuclei(stage, stained=stage.rng.random() < 1 / 3)


def histopathology(stage: Stage) -> _Picture:
    """Purple nuclei in pink, stained tissue."""
    return _nuclei(stage, stained=True)


def _nuclei(stage: Stage, stained: bool) -> _Picture:
    count = int(stage.rng.integers(12, 46))
    size = stage.uniform(0.032, 0.062) * (0.8 if count > 30 else 1.1)
    haze = 0.5 + 0.25 * stage.noise(0.35, 2) + 0.12 * stage.noise(0.06, 3)
    if stained:
        image = flat(stage, np.array([208, 178, 226]) * stage.uniform(0.88, 1.06))
        image = paint(image, (190, 120, 200), np.clip(0.55 * haze, 0, 0.8))
        image = paint(image, (243, 240, 245), soft(stage.noise(0.14, 2) - 1.3, 0.2))
        fibers = np.abs(stage.noise(0.09, 2))
        image = paint(image, (165, 90, 175), 0.35 * soft(0.12 - fibers, 0.1))
    else:
        image = np.repeat((9 + stage.uniform(10, 75) * np.clip(haze, 0, 1.4))[..., None], 3, axis=2)
    mask = np.zeros((stage.height, stage.width), bool)
    brightness = stage.uniform(70, 190)
    texture = stage.noise(0.012, 2)
    for _ in range(count):
        center = stage.rng.uniform(-0.56, 0.56, 2) + stage.drift(0.03)
        radii = size * stage.rng.uniform(0.65, 1.35) * np.array([1, stage.uniform(0.6, 1)])
        place = (float(center[0]), float(center[1]))
        area, window = stage.near(place, 4 * float(radii.max()))  # beyond, its halo is under one grey level
        nucleus = window.blob(place, (float(radii[0]), float(radii[1])), stage.uniform(0, math.pi), 0.06)
        inside, grains = soft(nucleus, 0.13), texture[area]
        shine = stage.uniform(0.35, 1.15)
        if stained:
            chromatin = np.array([140, 62, 98]) * (0.6 + 0.45 * shine)
            image[area] = paint(image[area], chromatin, inside * np.clip(0.72 + 0.16 * grains, 0, 1))
        else:
            glow = brightness * shine * (0.75 + 0.25 * np.clip(nucleus, 0, 1)) * (1 + 0.13 * grains)
            halo = 0.1 * brightness * shine * np.exp(np.minimum(nucleus, 0) * 1.2)
            image[area] = np.maximum(image[area], image[area] * 0.5 + (glow * inside + halo)[..., None])
        mask[area] |= nucleus > 0
    if not stained and stage.rng.random() < 0.3:  # a coloured channel
        image = image * np.array([1.0, 0.55, 0.35], np.float32)
    image = np.stack([stage.blur(image[..., channel], 0.0012) for channel in range(3)], axis=2)
    return image + stage.white(3.0)[..., None], mask


def other(stage: Stage) -> _Picture:
    """Any other modality: textured tissue in colours that the name decides, with one to three irregular targets."""
    name = stage.name_rng
    tissue, target = name.uniform(70, 190, 3), name.uniform(40, 225, 3)
    if abs(float(target.mean() - tissue.mean())) < 45:
        target = tissue * (0.55 if tissue.mean() > 120 else 1.5)
    grain = float(name.uniform(0.03, 0.12))
    sway = stage.drift(0.02)
    image = flat(stage, tissue) * (1 + 0.12 * stage.noise(0.4, 2, sway) + 0.08 * stage.noise(grain, 3, sway))[..., None]
    image = paint(image, target, 0.35 * soft(stage.noise(0.18, 2, sway) - 1.1, 0.25))
    mask = np.zeros((stage.height, stage.width), bool)
    for _ in range(int(stage.rng.integers(1, 4))):
        center = stage.rng.uniform(-0.3, 0.3, 2) + stage.drift(0.05)
        place, radius = (float(center[0]), float(center[1])), stage.uniform(0.07, 0.17)
        shape = stage.blob(place, (radius, radius * stage.uniform(0.6, 1)), stage.uniform(0, math.pi), 0.13)
        strength = stage.uniform(0.5, 0.85) * (1 + 0.2 * stage.noise(grain, 2, place))
        image = paint(image, target, np.clip(strength, 0, 1) * soft(shape, stage.uniform(0.05, 0.12)))
        mask |= shape > 0
    return image + stage.white(4.0)[..., None], mask
