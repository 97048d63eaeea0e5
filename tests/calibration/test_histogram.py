"""Clipping thresholds against NumPy's exact values and ONNX Runtime's calibrator."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espmedsam_edge.calibration.histogram import METHODS, PERCENTILE, MagnitudeHistogram


def filled(*parts: np.ndarray) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    for part in parts:
        histogram.add(part.astype(np.float32))
    return histogram


def test_percentile_agrees_with_numpy() -> None:
    values = np.random.default_rng(0).standard_normal(400_000).astype(np.float32)
    threshold = filled(values[:1000], values[1000:]).threshold("percentile", float(np.abs(values).max()))
    assert threshold == pytest.approx(np.percentile(np.abs(values), PERCENTILE), rel=1 / 128)  # a bin's width


def test_max_is_exact() -> None:
    values = np.array([0.1, -3.7, 2.0], np.float32)
    assert filled(values).threshold("max", 3.7) == 3.7


def test_entropy_agrees_with_onnxruntime() -> None:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    rng = np.random.default_rng(1)
    for values in (
        rng.laplace(size=300_000),
        rng.standard_normal(300_000) * np.where(rng.random(300_000) < 1e-4, 9, 1),
    ):
        largest = float(np.abs(values).max())
        ours = filled(values).threshold("entropy", largest)
        counts, edges = np.histogram(values, bins=2049, range=(-largest, largest))
        collector = calibrate.HistogramCollector("entropy", True, 2049, 128, 99.99, None)
        low, high = collector.get_entropy_threshold((counts, edges, -largest, largest), 128)[:2]
        theirs = max(abs(float(np.ravel(low)[0])), abs(float(np.ravel(high)[0])))
        # Theirs folds both signs and smooths differently; both must clip the tail, neither the body.
        assert ours == pytest.approx(theirs, rel=0.35)
        assert np.mean(np.abs(values) > ours) < 0.02


def test_a_large_tensor_is_sampled_evenly() -> None:
    values = np.random.default_rng(2).standard_normal(9_000_000).astype(np.float32)
    histogram = filled(values)
    assert histogram.counts.sum() == 3_000_000
    assert histogram.threshold("percentile", 10.0) == pytest.approx(np.percentile(np.abs(values), PERCENTILE), rel=0.03)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50), st.sampled_from(METHODS))
def test_any_values_give_a_usable_threshold(values: list[float], method: str) -> None:
    array = np.array(values, np.float32)
    largest = float(np.abs(array).max())
    threshold = filled(array).threshold(method, largest)  # type: ignore[arg-type]
    assert threshold > 0
    assert threshold <= largest or largest == 0
