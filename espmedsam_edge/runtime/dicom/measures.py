"""Frame times, pixel spacings and the size of the pixels as DICOM headers state them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from espmedsam_edge.objects.spacing import plausible

_DEFAULT_FPS = Fraction(25)


_FRAME_SECONDS = (0.001, 100.0)  # a time between frames outside of these is no time between frames


_CENTIMETRES, _TWO_DIMENSIONAL = 3, 1  # PhysicalUnitsXDirection, RegionSpatialFormat (PS3.3 C.8.5.5)


def frame_times(dataset: Any, frames: int) -> tuple[Fraction, tuple[float, ...]]:
    """Frames a second and each frame's time (PS3.3 C.7.6.5): a vector of increments, one increment, or a rate."""
    vector = [float(step) / 1000 for step in _several(dataset.get("FrameTimeVector"))]
    mean = sum(vector[1:]) / (frames - 1)
    if len(vector) == frames and all(step >= 0 for step in vector) and _plausible(mean):
        times = tuple(float(time) for time in np.cumsum([0.0, *vector[1:]]))
        return Fraction((frames - 1) / times[-1]).limit_denominator(1001), times
    seconds = float(dataset.get("FrameTime") or 0) / 1000
    if _plausible(seconds):
        fps = Fraction(1 / seconds).limit_denominator(1001)
    else:
        rate = float(dataset.get("CineRate") or dataset.get("RecommendedDisplayFrameRate") or 0)
        fps = Fraction(rate).limit_denominator(1001) if rate > 0 and _plausible(1 / rate) else _DEFAULT_FPS
        seconds = float(1 / fps)
    return fps, tuple(index * seconds for index in range(frames))


def _plausible(seconds: float) -> bool:
    return _FRAME_SECONDS[0] <= seconds <= _FRAME_SECONDS[1]


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str | float | int) else list(value)


def pixel_spacing(dataset: Any) -> tuple[float, float] | None:
    """Millimetres between rows and columns in the patient: not a detector's, which lies behind and sees more."""
    for holder in (dataset, *_measures(dataset)):
        values = [float(value) for value in _several(holder.get("PixelSpacing"))]
        if len(values) == 2 and plausible(*values):
            return values[0], values[1]
    return _region_spacing(dataset)


def _measures(dataset: Any) -> Iterator[Any]:
    for group in dataset.get("SharedFunctionalGroupsSequence") or ():
        yield from group.get("PixelMeasuresSequence") or ()


def _region_spacing(dataset: Any) -> tuple[float, float] | None:
    """An ultrasound picture's calibration, where all of its two-dimensional regions agree (PS3.3 C.8.5.5)."""
    found = set()
    for region in dataset.get("SequenceOfUltrasoundRegions") or ():
        if region.get("RegionSpatialFormat") != _TWO_DIMENSIONAL:
            continue
        units = region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection")
        if units != (_CENTIMETRES, _CENTIMETRES):
            return None
        deltas = [abs(float(region.get(name) or 0)) for name in ("PhysicalDeltaY", "PhysicalDeltaX")]
        found.add((round(10 * deltas[0], 9), round(10 * deltas[1], 9)))
    if len(found) != 1:
        return None
    rows, columns = found.pop()
    return (rows, columns) if plausible(rows, columns) else None


def pixel_bytes(dataset: Any) -> int | None:
    """Bytes of all frames without compression, as the header states them; None where it does not."""
    sizes = [dataset.get(name) for name in ("Rows", "Columns", "BitsAllocated")]
    if any(not size for size in sizes):
        return None
    samples, frames = int(dataset.get("SamplesPerPixel") or 1), int(dataset.get("NumberOfFrames") or 1)
    return math.prod(int(size) for size in sizes) // 8 * samples * frames
