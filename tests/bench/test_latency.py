"""Bench statistics against NumPy, the standard library and values worked out by hand."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espmedsam_edge.bench.ratios import drift, ratio_of_medians
from espmedsam_edge.runtime.latency import Latency

seconds = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=60)


def test_ten_times_worked_out_by_hand() -> None:
    found = Latency.of([0.010, 0.020, 0.030, 0.040, 0.050, 0.060, 0.070, 0.080, 0.090, 0.100])
    # Rank of percentile p among 10 sorted samples, counted from 0, is 9p/100; between ranks one interpolates.
    assert found.p50 == pytest.approx(0.055)
    assert found.p90 == pytest.approx(0.091)
    assert found.p99 == pytest.approx(0.0991)
    assert found.mean == pytest.approx(0.055)
    assert (found.samples, found.minimum, found.maximum) == (10, 0.010, 0.100)
    assert found.cov == pytest.approx((825e-4 / 90) ** 0.5 / 0.055)  # sum of squared deviations 0.00825, over 9


@given(seconds)
def test_mean_median_and_spread_are_those_of_the_standard_library(values: list[float]) -> None:
    found = Latency.of(values)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.p50 == pytest.approx(statistics.median(values))
    # rel 1e-6: the standard library sums squares exactly, NumPy in float64
    assert found.cov * found.mean == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-12)
    order = [found.minimum, found.p50, found.p90, found.p99, found.maximum]
    assert all(low <= high * (1 + 1e-12) for low, high in itertools.pairwise(order))


def test_a_single_time_has_no_spread_and_none_is_refused() -> None:
    assert Latency.of([0.5]).cov == 0.0
    with pytest.raises(ValueError, match="no sample"):
        Latency.of([])


def test_milliseconds_keep_counts_and_fractions() -> None:
    found = Latency.of([0.0011234567, 0.0011234567]).milliseconds()
    assert found["p50"] == 1.123
    assert found["samples"] == 2
    assert found["cov"] == 0.0


def test_a_constant_factor_is_found_exactly_however_noisy_the_rounds() -> None:
    rng = np.random.default_rng(7)
    slow = rng.lognormal(0, 0.5, 40)
    ratio = ratio_of_medians(list(0.25 * slow), list(slow))
    # A disturbance that hits both samples of a round cancels only if rounds are resampled as pairs.
    assert ratio.value == pytest.approx(0.25)
    assert ratio.low == pytest.approx(0.25)
    assert ratio.high == pytest.approx(0.25)


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(200):
        a, b = 0.4 * rng.lognormal(0, 0.1, 25), rng.lognormal(0, 0.1, 25)
        ratio = ratio_of_medians(list(a), list(b), seed=trial)
        covered += ratio.low <= 0.4 <= ratio.high
    # 95 % of 200 is 190; the bootstrap of a median of 25 is known to be off by a few per cent, and the binomial
    # standard deviation is 3, so 176 (88 %) to 200 accepts a right implementation and refuses one of half the width.
    assert 176 <= covered <= 200


def test_the_interval_narrows_with_more_rounds_and_is_reproducible() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.lognormal(0, 0.2, 400), rng.lognormal(0, 0.2, 400)
    few, many = ratio_of_medians(list(a[:20]), list(b[:20])), ratio_of_medians(list(a), list(b))
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert ratio_of_medians(list(a), list(b)) == many


def test_series_of_unlike_length_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        ratio_of_medians([1.0, 2.0], [1.0])


def test_drift_is_the_last_third_over_the_first() -> None:
    assert drift([1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 1.2, 1.2, 1.2]) == pytest.approx(0.2)
    assert drift([1.0] * 30) == 0.0
    assert drift([1.0, 2.0, 3.0, 4.0, 5.0]) == 0.0
