"""95% intervals by the bootstrap: of a mean over rows, and of the difference between means over the same rows.

A bootstrap draws rows with replacement, as many as there are, `RESAMPLES` times. What is compared over the same rows is
drawn together (paired): a pair that is hard for every model then does not widen the interval of their difference.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
NO_ERROR = 1e-12  # a standard error below this is of rows that are all alike


class Estimate(NamedTuple):
    """A mean or a difference with its 95% interval, and the number of rows (`count`) that it is computed from."""

    value: float
    low: float
    high: float
    count: int  # type: ignore[assignment]  # hides a method of tuples that nobody calls


def estimate(
    values: np.ndarray | list, weights: np.ndarray | None = None, transform: Callable = lambda mean: mean
) -> Estimate | None:
    """Return `transform(sum(values) / sum(weights))` with a 95% bootstrap interval; `transform` must be monotonic.

    The interval is between percentiles. It has no width if all rows are equal. Rows of weight 0 are left out. Returns
    None if there are no others.
    """
    values = np.asarray(values, dtype=float)
    weights = np.ones_like(values) if weights is None else weights
    values, weights = values[weights > 0], weights[weights > 0]
    if not len(values):
        return None
    means, resampled = _resample(np.stack([values, weights]))
    low, high = np.percentile(resampled[:, 0] / resampled[:, 1], _percentiles(len(values)))
    value, low, high = (float(transform(mean)) for mean in (means[0] / means[1], low, high))
    return Estimate(value, low, high, len(values))


def paired_difference(values: np.ndarray | list, others: np.ndarray | list) -> Estimate | None:
    """Return `mean(values - others)` with a 95% paired bootstrap interval; None without rows.

    `values` and `others`, of shape (rows,), are of the same rows in the same order.
    """
    return estimate(np.subtract(values, others, dtype=float))


def differences_from(chosen: int, values: np.ndarray) -> list[Estimate]:
    """Return how far the mean of each candidate is from that of the `chosen` one, with simultaneous 95% intervals.

    `values` has the shape (candidates, rows). The candidate that looks best was chosen by looking at all of them, so
    intervals for two given candidates would be too narrow: of nine equal ones, the best often seems to beat the worst.
    These hold for all pairs of candidates at once: over resamples, the largest error of any difference, in units of its
    standard error, is below a bound in 95% (the "max-T" of Westfall and Young, Resampling-Based Multiple Testing, 1993;
    Tukey's range test with the bootstrap's own distribution). A candidate is worse than the chosen one if its interval
    does not contain 0.
    """
    candidates, rows = values.shape
    if rows < 2:  # one row says nothing about the others
        return [Estimate(float(row.mean() - values[chosen].mean()), -math.inf, math.inf, rows) for row in values]
    means, resampled = _resample(values)
    errors = resampled - means
    largest, scale = np.zeros(RESAMPLES), np.zeros(candidates)
    for candidate in range(candidates):  # one at a time: all pairs of a thousand would not fit into memory
        of = errors - errors[:, [candidate]]
        scales = of.std(axis=0) * math.sqrt(rows / (rows - 1))  # a bootstrap's own is that of n instead of n - 1
        known = scales > NO_ERROR
        largest = np.maximum(largest, np.where(known, np.abs(of) / np.where(known, scales, 1), 0).max(axis=1))
        scale = scales if candidate == chosen else scale
    bound = student_quantile(float(np.quantile(largest, LEVEL)), rows - 1)
    found = means - means[chosen]
    half = bound * scale
    return [Estimate(float(d), float(d - h), float(d + h), rows) for d, h in zip(found, half, strict=True)]


def _resample(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of `values`, of shape (series, rows), and those of the resamples: (RESAMPLES, series)."""
    rows = values.shape[1]
    counts = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return values.mean(axis=1), counts @ values.T / rows


def _percentiles(rows: int) -> tuple[float, float]:
    """Return the percentiles between which a 95% interval lies: further out than 2.5 and 97.5 where rows are few.

    Plain percentiles are too narrow, as if a normal quantile stood where Student's belongs, and n where n - 1 does.
    This is the expanded percentile interval of Hesterberg, What Teachers Should Know about the Bootstrap (2015),
    section 4.1.3: of 20 rows 1.6 and 98.4, of 200 rows 2.4 and 97.6.
    """
    if rows < 2:
        return 0, 100
    normal, degrees = NormalDist(), rows - 1
    t = student_quantile(normal.inv_cdf((1 + LEVEL) / 2), degrees)
    outside = 100 * normal.cdf(-math.sqrt(rows / degrees) * t)
    return outside, 100 - outside


def student_quantile(z: float, degrees: int) -> float:
    """Return the quantile of Student's distribution with as much below it as there is below `z` of a normal one.

    By the expansion of Cornish and Fisher (Abramowitz and Stegun, 26.7.5): for 95% and 10 degrees exact to 1e-3.
    """
    first, second = z**3 + z, 5 * z**5 + 16 * z**3 + 3 * z
    third = 3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z
    return z + first / (4 * degrees) + second / (96 * degrees**2) + third / (384 * degrees**3)
