"""Two series of times measured in turn: the ratio of their medians, and the drift of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000


_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """Median of one series over the median of another, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> Ratio:
    """The ratio of two series whose i-th samples were taken one after the other.

    The bootstrap resamples rounds, not samples: what disturbed a round disturbed both of its samples, and the interval
    does not count that twice. Percentile interval (Efron), 2000 resamples, reproducible by ``seed``.

    Raises:
        ValueError: series that are empty or of different length.
    """
    a, b = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"series of {a.size} and {b.size} samples cannot be paired")
    rounds = np.random.default_rng(seed).integers(0, len(a), (_RESAMPLES, len(a)))
    ratios = _medians(a, rounds) / _medians(b, rounds)
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(ratios, (tail, 100 - tail))
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


def _medians(values: NDArray[np.float64], rounds: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(np.median(values[rounds], axis=1))


def drift(seconds: Sequence[float]) -> float:
    """How much slower the last third was than the first, as a fraction of the first's median; 0 below 6 samples."""
    third = len(seconds) // 3
    if third < 2:
        return 0.0
    first, last = float(np.median(seconds[:third])), float(np.median(seconds[-third:]))
    return last / first - 1 if first > 0 else 0.0
