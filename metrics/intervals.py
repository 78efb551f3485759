"""95% intervals by the bootstrap: of a mean over rows, and of the difference between means over the same rows.

A bootstrap draws rows with replacement, as many as there are, `RESAMPLES` times. What is compared over the same rows is
drawn together (paired): a pair that is hard for every model then does not widen the interval of their difference.

By plain percentiles nearly 6% of equal models seem to differ (simulated, 50 rows). So percentiles are corrected for few
rows, and for being drawn; and a difference counts only if it is larger than 95% of those that chance makes, which may
as well have swapped the two models in any row.
"""

import math
from collections.abc import Callable
from functools import lru_cache
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

    @property
    def decides(self) -> bool:
        """Whether a difference is surely one: its interval does not contain 0."""
        return not self.low <= 0 <= self.high

    def interval(self, write: Callable[[float], str] | None = None) -> str:
        """Return `0.82 to 0.94`, each end as `write` has it; by default, with two digits of the interval's width.

        If all rows are equal, the interval has no width: `all 40 alike`, or `of one`.
        """
        if self.low == self.high:
            return f"all {self.count} alike" if self.count > 1 else "of one"
        width = self.high - self.low
        decimals = max(0, 1 - math.floor(math.log10(width))) if math.isfinite(width) else 2
        write = write or f"{{:.{decimals}f}}".format
        return f"{write(self.low)} to {write(self.high)}".replace("-", "\N{MINUS SIGN}")


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

    `values` and `others`, of shape (rows,), are of the same rows in the same order, and of two models that were chosen
    before looking at them. The interval contains 0 if the difference may be chance (`_may_be_chance`).
    """
    differences = np.subtract(values, others, dtype=float)
    found = estimate(differences)
    return found and _with_chance(found, differences)


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
    errors = (resampled - means).T  # (candidates, RESAMPLES)
    largest, half = np.zeros(RESAMPLES), np.zeros(candidates)
    for candidate in range(candidates):  # one at a time: all pairs of a thousand would not fit into memory
        of = errors - errors[candidate]
        scale = of.std(axis=1) * math.sqrt(rows / (rows - 1))  # a bootstrap's own is that of n instead of n - 1
        known = scale > NO_ERROR
        largest = np.maximum(largest, np.max(np.abs(of[known]) / scale[known, None], axis=0, initial=0))
        half = scale if candidate == chosen else half
    half = half * student_quantile(float(np.quantile(largest, LEVEL + _drawing_error(1 - LEVEL))), rows - 1)
    return [
        _with_chance(Estimate(float(d.mean()), float(d.mean() - h), float(d.mean() + h), rows), d)
        for d, h in zip(values - values[chosen], half, strict=True)
    ]


def _resample(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of `values`, of shape (series, rows), and those of the resamples: (RESAMPLES, series)."""
    rows = values.shape[1]
    return values.mean(axis=1), _draw(rows) @ values.T / rows


@lru_cache(maxsize=1)  # a comparison and a report take many intervals over the same number of rows
def _draw(rows: int) -> np.ndarray:
    """Return how often each resample has each row: (RESAMPLES, rows)."""
    return np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(float)


def _with_chance(found: Estimate, differences: np.ndarray) -> Estimate:
    """Return `found`, with an interval that contains 0 if the `differences` that it is the mean of may be chance."""
    if not found.decides or not _may_be_chance(differences):
        return found
    return found._replace(low=min(found.low, 0.0), high=max(found.high, 0.0))


def _may_be_chance(differences: np.ndarray) -> bool:
    """Return whether a mean as far from 0 as that of `differences`, (rows,), is to be expected of equal models.

    The models of a row could then be swapped, which changes its sign: in more than 5% of `RESAMPLES` draws of signs the
    mean is as far from 0. This is Fisher's randomisation test, exact for any number of rows (Phipson and Smyth,
    Permutation P-values Should Never Be Zero, 2010, for the 1 that is added). Of accuracies it is McNemar's exact test.
    A bootstrap cannot tell that five rows which differ, all the same way, are too few.
    """
    signs = np.random.default_rng(1).integers(0, 2, (RESAMPLES, len(differences))) * 2.0 - 1
    as_far = np.abs(signs @ differences) >= abs(differences.sum()) * (1 - NO_ERROR) - NO_ERROR
    return bool((as_far.sum() + 1) / (RESAMPLES + 1) > 1 - LEVEL)


def _percentiles(rows: int) -> tuple[float, float]:
    """Return the percentiles between which a 95% interval lies: further out than 2.5 and 97.5 where rows are few.

    Plain percentiles are too narrow, as if a normal quantile stood where Student's belongs, and n where n - 1 does.
    This is the expanded percentile interval of Hesterberg, What Teachers Should Know about the Bootstrap (2015),
    section 4.1.3, of 2.5 less the error of drawing it: of 20 rows 1.0 and 99.0, of 200 rows 1.7 and 98.3.
    """
    if rows < 2:
        return 0, 100
    normal, degrees, tail = NormalDist(), rows - 1, (1 - LEVEL) / 2
    t = student_quantile(-normal.inv_cdf(tail - _drawing_error(tail)), degrees)
    outside = 100 * normal.cdf(-math.sqrt(rows / degrees) * t)
    return outside, 100 - outside


def _drawing_error(tail: float) -> float:
    """Return two standard errors of the share of resamples beyond a quantile that has the share `tail` beyond it.

    A quantile of `RESAMPLES` draws is itself a draw: taken so much further out, it is not too near in 97.5% of them.
    """
    return 2 * math.sqrt(tail * (1 - tail) / RESAMPLES)


def student_quantile(z: float, degrees: int) -> float:
    """Return the quantile of Student's distribution with as much below it as there is below `z` of a normal one.

    Of 1 and 2 degrees it is exact; of more it is the expansion of Cornish and Fisher (Abramowitz and Stegun, 26.7.5):
    for 95% and 10 degrees exact to 1e-3, for 3 by 1% too small, and by 10% far out in the tail.
    """
    beyond = NormalDist().cdf(-z)
    if degrees == 1:
        return 1 / math.tan(math.pi * beyond)
    if degrees == 2:
        return (1 - 2 * beyond) / math.sqrt(2 * beyond * (1 - beyond))
    first, second = z**3 + z, 5 * z**5 + 16 * z**3 + 3 * z
    third = 3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z
    return z + first / (4 * degrees) + second / (96 * degrees**2) + third / (384 * degrees**3)
