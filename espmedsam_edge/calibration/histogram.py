"""A histogram of magnitudes that grows over images without knowing their range, and clipping thresholds from it.

Bins are the upper half of a float32 without its sign: 128 to an octave, so one pass over the images is enough and any
two histograms add up exactly. Thresholds are for symmetric INT8: values in ±threshold map to ±127.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["entropy", "percentile", "max"]
METHODS: tuple[Method, ...] = ("percentile", "max", "entropy")
"""In the order in which they are tried. Entropy clips hardest, which costs a transformer's rare large values most."""

PERCENTILE = 99.99
"""Per cent of the values that "percentile" does not clip."""

_BINS = 1 << 15
_BLOCK = 1 << 18  # values a step: stays in the cache
_MOST = 1 << 22  # values of one tensor of one image that are counted; a prime stride picks them
_PRIMES = (1, 3, 7, 11, 13, 17, 23, 29, 37, 47, 61, 79, 97, 127)

_LEVELS = 128  # of |INT8|
_LINEAR = 2048  # bins that the entropy method searches over, as TensorRT's calibrator
_STEP = 8  # bins between the thresholds that it tries: 0.4 % of the largest magnitude


class MagnitudeHistogram:
    """Counts of |value| over all that ``add`` was given."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(_BINS, np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count finite float32 values; of a large tensor an evenly spaced part."""
        flat = np.ascontiguousarray(values).reshape(-1)
        stride = next((prime for prime in _PRIMES if flat.size <= prime * _MOST), _PRIMES[-1])
        upper = flat[::stride].copy().view(np.uint16)[_UPPER_HALF::2]
        for start in range(0, upper.size, _BLOCK):
            self.counts += np.bincount(upper[start : start + _BLOCK] & 0x7FFF, minlength=_BINS)

    def threshold(self, method: Method, largest: float) -> float:
        """Where to clip.

        Args:
            method: "max" does not clip; "percentile" clips all but ``PERCENTILE`` of the values; "entropy" keeps the
                distribution most alike (Kullback-Leibler divergence), as TensorRT's entropy calibrator does.
            largest: the largest magnitude seen, exact, as subsampling may miss it.

        Returns:
            Above 0, at most ``largest`` (1 where every value is 0).
        """
        if largest <= 0 or not self.counts.any():
            return 1.0
        if method == "max":
            return largest
        if method == "percentile":
            cumulative = np.cumsum(self.counts)
            index = int(np.searchsorted(cumulative, cumulative[-1] * PERCENTILE / 100))
            return float(min(_edges()[index + 1], largest))
        return self._entropy_threshold(largest)

    def _entropy_threshold(self, largest: float) -> float:
        edges = np.linspace(0, largest, _LINEAR + 1)
        cumulative = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.float64)
        linear = np.diff(np.interp(edges, _edges(), cumulative))
        return float(edges[best_clip(linear)])


def best_clip(counts: NDArray[np.float64]) -> int:
    """The number of leading bins of a histogram of magnitudes whose 128-level quantisation loses least information.

    NVIDIA, "8-bit inference with TensorRT" (2017): what lies beyond is added to the last bin kept, the kept bins are
    merged into 128 levels and spread again over the bins that held something, and the two are compared.
    """
    total = np.cumsum(counts)
    best, best_divergence = len(counts), np.inf
    for kept in range(_LEVELS, len(counts) + 1, _STEP):
        reference = counts[:kept].copy()
        filled = reference > 0
        starts = (np.arange(_LEVELS) * kept) // _LEVELS
        sums = np.add.reduceat(reference, starts)
        occupied = np.add.reduceat(filled.astype(np.float64), starts)
        level = np.divide(sums, occupied, out=np.zeros_like(sums), where=occupied > 0)
        candidate = np.repeat(level, np.diff(np.append(starts, kept))) * filled
        reference[-1] += total[-1] - total[kept - 1]
        if candidate.sum() == 0:
            continue
        p = reference / reference.sum()
        q = candidate / candidate.sum()
        both = (p > 0) & (q > 0)
        # What fell outside and met an empty last bin has no counterpart; it counts as if met by next to nothing.
        divergence = float(np.sum(p[both] * np.log(p[both] / q[both])))
        lost = p[(p > 0) & (q == 0)]
        divergence += float(np.sum(lost * np.log(lost / 1e-10))) if lost.size else 0.0
        if divergence < best_divergence:
            best, best_divergence = kept, divergence
    return best


def _edges() -> NDArray[np.float64]:
    """The lower edges of the bins, and the upper edge of the last finite one repeated."""
    bits = (np.arange(_BINS + 1, dtype=np.uint32) << np.uint32(16)).astype(np.uint32)
    with np.errstate(invalid="ignore"):
        edges = (bits & np.uint32(0x7FFFFFFF)).view(np.float32).astype(np.float64)
    edges[-1] = np.inf
    largest = float(np.finfo(np.float32).max)
    return np.where(np.isfinite(edges), edges, largest)


_UPPER_HALF = 1 if np.little_endian else 0
