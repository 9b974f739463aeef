"""Confidence intervals of means and proportions."""

import math
from collections.abc import Sequence

import lazy_loader
import numpy as np
from jaxtyping import Float

scipy = lazy_loader.load("scipy")


def mean_interval(values: Sequence[float] | Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Computes a sample's mean and its 95 % confidence interval by Student's t.

    For a paired comparison, pass the differences.

    Args:
      values: at least one number.

    Returns:
      The mean and half the width of the interval, NaN for a single value.
    """
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    quantile = float(scipy.stats.t.ppf(0.975, n - 1))
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


def proportion_interval(fraction: float, count: int) -> tuple[float, float]:
    """Computes Wilson's 95 % confidence interval of a proportion (Wilson, 1927).

    Args:
      fraction: share of successes, in [0, 1]; `fraction * count` is rounded to a whole number.
      count: trials, at least 1.

    Returns:
      The lower and the upper end, in [0, 1].
    """
    interval = scipy.stats.binomtest(round(fraction * count), count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
