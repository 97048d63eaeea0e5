"""COCO's run lengths: the lengths of the runs down the columns, background first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]  # (H, W), 0 or not


def encode_rle(mask: Mask, place: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None) -> dict[str, Any]:
    """COCO's compressed run-length encoding.

    Args:
        mask: (h, w) uint8, foreground not 0.
        place: (x, y) of it in the picture.
        size: (H, W) of the picture; None: the mask's.

    Returns:
        ``{"size": [H, W], "counts": TEXT}``: the lengths of the runs down the columns, background first.
    """
    height, width = size or mask.shape
    x, y = place
    columns = np.zeros((height, mask.shape[1]), np.uint8)
    columns[y : y + len(mask)] = mask
    lengths = run_lengths(columns.T)
    lengths[0] += x * height
    after = (width - x - mask.shape[1]) * height
    if len(lengths) % 2:  # the last run is of background, too
        lengths[-1] += after
    elif after:
        lengths = np.append(lengths, after)
    return {"size": [height, width], "counts": _compressed(lengths)}


def draw_rle(counts: str | Sequence[int], canvas: Mask) -> int:
    """Compressed or plain run lengths into a mask of their size, of 0 and 255.

    Returns:
        How many pixels it took, see ``reading.Draw``.

    Raises:
        ValueError: they are damaged, or not of this size.
    """
    lengths = _expanded(counts) if isinstance(counts, str) else np.asarray(counts, np.int64)
    height, width = canvas.shape
    within = lengths.ndim == 1 and ((lengths >= 0) & (lengths <= height * width)).all()  # else their sum may wrap round
    if not within or int(lengths.sum()) != height * width:
        raise ValueError(f"its run lengths are not those of {width}x{height} pixels")
    ends = np.cumsum(lengths)
    starts = ends - lengths
    runs = np.flatnonzero(lengths[1::2]) * 2 + 1
    if not runs.size:
        return lengths.size
    # Only the columns where it is: a large picture may have thousands.
    left, right = int(starts[runs[0]]) // height, -(-int(ends[runs[-1]]) // height)
    within_them = np.clip(ends, left * height, right * height) - np.clip(starts, left * height, right * height)
    values = (np.arange(len(lengths)) % 2 * 255).astype(np.uint8)
    canvas[:, left:right] |= np.repeat(values, within_them).reshape(right - left, height).T
    cost: int = lengths.size + (right - left) * height
    return cost


def run_lengths(mask: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Lengths of the runs in row order; the first is of background and may be 0."""
    along = np.ascontiguousarray(mask).reshape(-1) != 0
    changes = np.flatnonzero(along[1:] != along[:-1]) + 1
    first = [0] if along.size and along[0] else []
    ends = np.concatenate([[0], first, changes, [along.size]]).astype(np.int64)
    return ends[1:] - ends[:-1]


def _compressed(lengths: NDArray[np.int64]) -> str:
    """As COCO's ``rleToString``: from the fourth on the difference to the length two before, then five bits a letter.

    The lowest bits come first; 32 marks that more follow, and the highest bit of the last five is the sign.
    """
    left = lengths.copy()
    left[3:] -= lengths[1:-2]
    letters, used = [], []
    going = np.ones(len(left), bool)
    while going.any():
        bits = left & 31
        left = left >> 5
        more = np.where(bits & 16, left != -1, left != 0) & going
        letters.append(bits + 32 * more + 48)
        used.append(going)
        going = more
    order = np.stack(used, axis=1)
    text: bytes = np.stack(letters, axis=1)[order].astype(np.uint8).tobytes()
    return text.decode("ascii")


def _expanded(text: str) -> NDArray[np.int64]:
    """What ``_compressed`` made."""
    letters = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    if not letters.size:
        return np.zeros(0, np.int64)
    if letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        raise ValueError("its run lengths are damaged")
    last = np.flatnonzero((letters & 32) == 0)  # of each number
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(letters.size) - np.repeat(first, last - first + 1)
    if place.max() > 6:
        raise ValueError("its run lengths are damaged")
    parts = (letters & 31) << (5 * place)
    values = np.add.reduceat(parts, first)
    values -= ((letters[last] & 16) != 0).astype(np.int64) << (5 * (last - first + 1))
    for index in (1, 2):  # from the fourth on each is the difference to the one two before
        values[index::2] = np.cumsum(values[index::2])
    return np.asarray(values, np.int64)
