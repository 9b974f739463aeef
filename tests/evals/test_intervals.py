"""Confidence intervals, compared with SciPy's tests."""

import math

import numpy as np
import pytest
from scipy import stats

from ssl_jax.evals.intervals import difference_interval, mean_interval


def test_interval_of_a_difference_is_welchs():
    first, second = [38.6, 39.0, 38.9, 37.2], [35.1, 36.9, 33.4]
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    mean, half = difference_interval(first, second)
    assert mean == pytest.approx(np.mean(first) - np.mean(second))
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))


def test_interval_of_a_mean_is_students():
    values = [0.3, 0.5, 0.1]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half = mean_interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_single_and_equal_values():
    assert mean_interval([0.5])[0] == 0.5 and math.isnan(mean_interval([0.5])[1])
    mean, half = difference_interval([0.5], [0.2, 0.3])
    assert mean == pytest.approx(0.25) and math.isnan(half)
    assert difference_interval([0.5, 0.5], [0.2, 0.2]) == pytest.approx((0.3, 0))
