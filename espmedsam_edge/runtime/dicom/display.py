"""A DICOM frame's stored values to what a viewer shows first: palette, rescale, window, inversion, 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.imaging.decode import full_scale
from espmedsam_edge.imaging.geometry import Frame


class Scale(NamedTuple):
    """The values that become 0 and 255 where a file names no window."""

    low: float
    high: float


def displayed(pixels: NDArray[Any], dataset: Any, frame: int = 0, scale: Scale | None = None) -> Frame:
    """(H, W) or (H, W, 3) stored values, RGB where coloured, to (H, W, 3) uint8 BGR.

    Args:
        pixels: one frame as ``pydicom.pixels.iter_pixels`` gives it.
        dataset: the file's header.
        frame: its number in the file, from 0.
        scale: for grey values of more than 8 bits without a window: of all frames and files that belong together;
            None: this frame's own.

    Raises:
        ValueError: samples that are neither grey nor RGB.
    """
    interpretation = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if interpretation == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        pixels = apply_color_lut(pixels, dataset)
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        return np.ascontiguousarray(_eight_bits(pixels)[..., ::-1])
    if pixels.ndim != 2:
        raise ValueError(f"samples of shape {pixels.shape}")
    stored = _aligned(pixels, dataset)
    padding = _padding(stored, dataset)
    grey = _windowed(stored, padding, dataset, frame, scale)
    inverted = interpretation == "MONOCHROME1"
    if inverted or str(dataset.get("PresentationLUTShape", "")) == "INVERSE":
        grey = np.asarray(255 - grey, np.uint8)
    if padding is not None:  # what lies around the picture is black, whichever way its values count
        grey = np.where(padding, np.uint8(0), grey)
    return np.repeat(grey[..., None], 3, axis=2)


def own_scale(pixels: NDArray[Any], dataset: Any, frame: int = 0) -> Scale | None:
    """The smallest and the largest value of a frame, as its scale is made of them; None where it needs none."""
    if not needs_scale(dataset, frame):
        return None
    stored = _aligned(pixels, dataset)
    padding = _padding(stored, dataset)
    return _extremes(_transformed(stored, _holder(dataset, frame, "PixelValueTransformationSequence")), padding)


def needs_scale(dataset: Any, frame: int = 0) -> bool:
    """Whether a frame's grey values depend on the range that it uses: over 8 bits, no window, no table, no depth."""
    window = _holder(dataset, frame, "FrameVOILUTSequence")
    return (
        int(dataset.get("SamplesPerPixel") or 1) == 1
        and str(dataset.get("PhotometricInterpretation")) != "PALETTE COLOR"
        and int(dataset.get("BitsAllocated") or 8) > 8
        and not window.get("VOILUTSequence")
        and _window_of(window) is None
        and _stated_scale(dataset, frame) is None
    )


def common_scale(scales: Iterable[Scale | None]) -> Scale | None:
    """One scale for several frames or files; None if none of them needs any."""
    known = [scale for scale in scales if scale is not None]
    return Scale(min(s.low for s in known), max(s.high for s in known)) if known else None


def _aligned(pixels: NDArray[Any], dataset: Any) -> NDArray[Any]:
    """Stored values from the low bits on: a few scanners put theirs at the upper end (HighBit)."""
    stored, high = int(dataset.get("BitsStored") or 0), dataset.get("HighBit")
    if not stored or high is None or int(high) + 1 <= stored or pixels.dtype.kind not in "iu":
        return pixels
    return np.asarray(pixels >> (int(high) + 1 - stored))


def _padding(stored: NDArray[Any], dataset: Any) -> NDArray[np.bool_] | None:
    """Where a frame holds its padding value (PS3.3 C.7.5.1.1.2), up to the limit of its range if there is one."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if value is None or value == "" or stored.dtype.kind not in "iu":
        return None
    # The header may write a signed value unsigned, or the other way round.
    bounds = [_as_stored(int(bound), stored.dtype) for bound in (value, value if limit in (None, "") else limit)]
    found = (stored >= min(bounds)) & (stored <= max(bounds))
    return found if found.any() and not found.all() else None


def _as_stored(value: int, kind: np.dtype[Any]) -> int:
    span, lowest = 1 << 8 * kind.itemsize, int(np.iinfo(kind).min)
    return (value - lowest) % span + lowest


def _stated_scale(dataset: Any, frame: int) -> Scale | None:
    """By the number of bits, where they are fewer than the file has room for, unsigned and meant as they are."""
    bits = int(dataset.get("BitsStored") or 0)
    transform = _holder(dataset, frame, "PixelValueTransformationSequence")
    plain = not transform.get("ModalityLUTSequence") and _rescale(transform) is None
    if 8 < bits < 16 and not int(dataset.get("PixelRepresentation") or 0) and plain:
        return Scale(0.0, float((1 << bits) - 1))
    return None


def _holder(dataset: Any, frame: int, macro: str) -> Any:
    """What holds a frame's values: its own functional group, that of all frames, or the header (PS3.3 C.7.6.16)."""
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    own = (frames[frame],) if frame < len(frames) else ()
    for group in (*own, *(dataset.get("SharedFunctionalGroupsSequence") or ())):
        for item in group.get(macro) or ():
            return item
    return dataset


def _windowed(
    stored: NDArray[Any], padding: NDArray[np.bool_] | None, dataset: Any, frame: int, scale: Scale | None
) -> NDArray[np.uint8]:
    """Modality transform, then the first table or window (PS3.3 C.11.2) or the scale, to 0..255."""
    window = _holder(dataset, frame, "FrameVOILUTSequence")
    values = _transformed(stored, _holder(dataset, frame, "PixelValueTransformationSequence"))
    tables = window.get("VOILUTSequence")
    if tables:
        return _through_table(_whole(values), tables[0])
    chosen = _window_of(window)
    if chosen is not None:
        return through_window(values, *chosen, str(window.get("VOILUTFunction") or "LINEAR"))
    if values.dtype == np.uint8:
        bits = int(dataset.get("BitsStored") or 8)
        return values if bits >= 8 else _scaled(values, 0.0, float((1 << bits) - 1))
    found = scale or _stated_scale(dataset, frame) or _extremes(values, padding)
    parts = values.dtype.kind == "f" and found.high <= 1  # of one, or a quantity in a large unit: no whole numbers
    return _scaled(values, *(found if parts or stored.dtype.kind == "f" else _rounded(found)))


def _transformed(stored: NDArray[Any], transform: Any) -> NDArray[Any]:
    """Modality table or rescale (PS3.3 C.11.1)."""
    if transform.get("ModalityLUTSequence"):
        from pydicom.pixels import apply_modality_lut

        return np.asarray(apply_modality_lut(stored, transform))
    rescale = _rescale(transform)
    return stored if rescale is None else np.asarray(stored * rescale[0] + rescale[1])


def _rescale(transform: Any) -> tuple[float, float] | None:
    """Slope and intercept; None where there are none, or empty ones, or they change nothing or leave nothing."""
    slope, intercept = (_numbers(transform.get(name))[0] for name in ("RescaleSlope", "RescaleIntercept"))
    found = (1.0 if slope is None else slope, 0.0 if intercept is None else intercept)
    return None if found == (1.0, 0.0) or not found[0] else found


def _window_of(holder: Any) -> tuple[float, float] | None:
    """The first window that is one: of both numbers, and not empty."""
    for center, width in zip(*(_numbers(holder.get(name)) for name in ("WindowCenter", "WindowWidth")), strict=False):
        if center is not None and width is not None and width > 0:
            return center, width
    return None


def _through_table(values: NDArray[Any], table: Any) -> NDArray[np.uint8]:
    """A VOI LUT (PS3.3 C.11.2.1.1): entries, first value mapped, bits; its data are bytes, words or numbers."""
    entries, first, bits = (int(number) for number in table.LUTDescriptor)
    entries = entries or 1 << 16
    if first > np.iinfo(np.int16).max and values.dtype.kind == "i":
        first -= 1 << 16
    data = table.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * entries else "<u2")
    shown = np.asarray(data, np.float64)[:entries]
    if not shown.size:
        raise ValueError("a table without entries")
    return _scaled(shown[np.clip(values.astype(np.int64) - first, 0, shown.size - 1)], 0.0, float((1 << bits) - 1))


def through_window(values: NDArray[Any], center: float, width: float, function: str = "LINEAR") -> NDArray[np.uint8]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3: values to 0..255 by a window.

    Args:
        values: any shape, after the modality transform.
        center, width: in the values' units; width over 0, LINEAR takes one under 1 for 1.
        function: LINEAR, LINEAR_EXACT or SIGMOID.
    """
    x = np.asarray(values, np.float64)
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return np.rint(255 / (1 + np.exp(-4 * (x - center) / width))).astype(np.uint8)
    if function == "LINEAR_EXACT":
        return _scaled(x, center - width / 2, center + width / 2)
    width = max(width, 1.0)
    if width == 1:  # a step
        return np.asarray(255 * (x > center - 0.5), np.uint8)
    return _scaled(x, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)


def _eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Colour: 8 bits as they are, more by the smallest of 8, 10, 12, 14, 16 bits that holds the largest."""
    return values if values.dtype == np.uint8 else _scaled(values, *_rounded(_extremes(values, None)))


def _extremes(values: NDArray[Any], padding: NDArray[np.bool_] | None) -> Scale:
    seen = values if padding is None else values[~padding]
    return Scale(float(seen.min()), float(seen.max()))


def _rounded(found: Scale) -> Scale:
    """From 0 to the largest value of the smallest depth that holds them all; as they are where some are negative."""
    return found if found.low < 0 else Scale(0.0, full_scale(found.high))


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    x = np.asarray(values, np.float64)
    return np.rint(np.clip((x - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)


def _whole(values: NDArray[Any]) -> NDArray[Any]:
    """A table is indexed by whole numbers."""
    return values if values.dtype.kind in "iu" else np.rint(values).astype(np.int64)


def _numbers(value: Any) -> list[float | None]:
    """An attribute's values, at least one; None for those that are empty or no numbers to reckon with."""
    single = value is None or isinstance(value, str | float | int)
    numbers = [None if item in (None, "") else float(item) for item in ([value] if single else value)]
    return [number if number is not None and np.isfinite(number) else None for number in numbers] or [None]
