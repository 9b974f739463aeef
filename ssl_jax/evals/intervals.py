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


def difference_interval(
    first: Sequence[float] | Float[np.ndarray, " n"],
    second: Sequence[float] | Float[np.ndarray, " m"],
) -> tuple[float, float]:
    """Computes the difference of two independent samples' means, with Welch's 95 % interval.

    Args:
      first: at least one number.
      second: at least one number.

    Returns:
      The mean of `first` minus that of `second`, and half the width of the interval: NaN if a
      sample is a single value.
    """
    mean = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return mean, math.nan
    # Squared standard errors of the means, and Welch-Satterthwaite's degrees of freedom.
    errors = [float(np.var(each, ddof=1)) / len(each) for each in (first, second)]
    total = sum(errors)
    if not total:
        return mean, 0.0
    parts = zip(errors, (first, second), strict=True)
    freedom = total**2 / sum(error**2 / (len(each) - 1) for error, each in parts)
    return mean, float(scipy.stats.t.ppf(0.975, freedom)) * math.sqrt(total)


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
