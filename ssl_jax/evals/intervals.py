"""Intervals of means and proportions."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import special


def mean_interval(values: Sequence[float] | Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The mean of a sample and its 95 % confidence interval, by Student's t.

    For a paired comparison give it the differences.

    Args:
      values: at least one number.

    Returns:
      The mean and half the width of the interval, which is nan for a single value.
    """
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    quantile = float(special.stdtrit(n - 1, 0.975))
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


def proportion_interval(fraction: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927; holds at 0 and 1 too).

    Args:
      fraction: the share of successes, in [0, 1].
      count: trials, at least 1.

    Returns:
      The lower and the upper end, in [0, 1].
    """
    z = float(special.ndtri(0.975))
    shrink = 1 + z * z / count
    centre = (fraction + z * z / (2 * count)) / shrink
    half = z * math.sqrt(fraction * (1 - fraction) / count + (z / (2 * count)) ** 2) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)
