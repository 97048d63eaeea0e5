"""Statistics of repeated times: percentiles and spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Seconds. Percentiles interpolate linearly between samples; ``cov`` is standard deviation (n - 1) over mean."""

    samples: int
    mean: float
    p50: float
    p90: float
    p99: float
    minimum: float
    maximum: float
    cov: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Summarise at least one sample; a single one has a coefficient of variation of 0.

        Raises:
            ValueError: no sample.
        """
        if not len(seconds):
            raise ValueError("no sample to summarise")
        values = np.asarray(seconds, np.float64)
        mean = float(values.mean())
        spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
        return cls(
            samples=len(values),
            mean=mean,
            p50=p50,
            p90=p90,
            p99=p99,
            minimum=float(values.min()),
            maximum=float(values.max()),
            cov=spread / mean if mean > 0 else 0.0,
        )

    def milliseconds(self) -> dict[str, float | int]:
        """For reports: times in milliseconds to the microsecond, ``cov`` as a fraction."""
        return {
            name: value if name == "samples" else round(value, 4) if name == "cov" else round(1000 * value, 3)
            for name, value in asdict(self).items()
        }
