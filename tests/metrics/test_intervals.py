"""Intervals: against scipy, against the normal ones, and how often they see a difference where there is none."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from metrics import intervals
from metrics.intervals import RESAMPLES, differences_from, estimate, paired_difference


def test_bootstrap_intervals_are_close_to_the_normal_ones():
    """Of a share the bootstrap's interval is close to the normal one; of a ratio it is of the ratio."""
    share = estimate([1] * 60 + [0] * 40)
    assert share.value == 0.6
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (share.low, share.high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.015)
    assert share == estimate([1] * 60 + [0] * 40)
    ratio = estimate(np.array([10.0, 1.0]), np.array([100.0, 1.0]), np.exp)
    assert ratio.value == pytest.approx(math.exp(11 / 101))
    assert ratio.low == pytest.approx(math.exp(0.1))
    assert ratio.high == pytest.approx(math.exp(1.0))
    assert estimate([True, True]) == (1, 1, 1, 2)
    empty = estimate(np.array([3.0, 0.0]), np.array([2.0, 0.0]), np.exp)  # an answer without text weighs nothing
    assert empty == pytest.approx((math.exp(1.5),) * 3 + (1,))
    assert estimate([]) is None


@pytest.fixture
def many(monkeypatch):
    """As many resamples as it takes for two independent draws of them to agree to a fortieth of a standard error."""
    monkeypatch.setattr(intervals, "RESAMPLES", 200_000)
    intervals._draw.cache_clear()
    yield
    intervals._draw.cache_clear()


def scipys(samples: tuple[np.ndarray, ...], statistic, rows: int) -> tuple[float, float]:
    """scipy's percentile interval of `rows` rows that are drawn together, at the level of ours."""
    low, _ = intervals._percentiles(rows)
    arguments = {"paired": True, "method": "percentile", "confidence_level": 1 - low / 50, "n_resamples": 200_000}
    found = stats.bootstrap(samples, statistic, batch=10_000, rng=np.random.default_rng(7), **arguments)
    return tuple(found.confidence_interval)


def test_a_paired_difference_is_scipys(many):
    rng = np.random.default_rng(3)
    common = rng.normal(size=60)
    better, worse = (1.0 * (common + skill + rng.normal(size=60) / 2 > 0) for skill in (1, 0))
    found = paired_difference(better, worse)
    assert found.low > 0
    difference = lambda a, b, axis: a.mean(axis) - b.mean(axis)  # noqa: E731
    assert found[1:3] == pytest.approx(scipys((better, worse), difference, 60), abs=1e-3)
    assert paired_difference(better, worse) == paired_difference(better.tolist(), worse.tolist())


def test_an_estimate_of_a_weighted_mean_is_scipys(many):
    rng = np.random.default_rng(4)
    weights = rng.integers(1, 9, size=50)
    values = weights * rng.integers(0, 2, size=50)
    ratio = lambda a, b, axis: a.sum(axis) / b.sum(axis)  # noqa: E731
    assert estimate(values, weights)[1:3] == pytest.approx(scipys((values, weights), ratio, 50), abs=2e-3)


@pytest.mark.parametrize("degrees", [1, 2])
def test_quantiles_of_student_with_hardly_any_rows_are_exact(degrees):
    for share in (0.05, 0.5, 0.975, 0.9825, 0.99929):  # the last: one of 36 comparisons at 95% together
        ours = intervals.student_quantile(NormalDist().inv_cdf(share), degrees)
        assert ours == pytest.approx(stats.t.ppf(share, degrees), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("degrees", "within"), [(10, 1e-3), (19, 1e-4), (49, 1e-5), (189, 1e-6)])
def test_quantiles_of_student_are_scipys(degrees, within):
    for share in (0.95, 0.975, 0.9825):
        ours = intervals.student_quantile(NormalDist().inv_cdf(share), degrees)
        assert ours == pytest.approx(stats.t.ppf(share, degrees), abs=within)


def test_percentiles_are_those_of_student_and_of_the_error_of_drawing():
    tail = 0.025 - 2 * math.sqrt(0.025 * 0.975 / RESAMPLES)
    for rows in (20, 50, 190):
        outside = 100 * stats.norm.cdf(stats.t.ppf(tail, rows - 1) * math.sqrt(rows / (rows - 1)))
        assert intervals._percentiles(rows) == pytest.approx((outside, 100 - outside), abs=1e-2)
    assert intervals._percentiles(1) == (0, 100)


def test_what_may_be_chance_is_mcnemars_exact_test():
    """Of accuracies it counts the rows that differ: six that agree are enough, five are not, 9 of 10 are, 8 are not."""
    for won, lost in [(5, 0), (6, 0), (9, 1), (8, 2), (20, 8), (20, 10)]:
        differences = np.array([1.0] * won + [-1.0] * lost + [0.0] * 60)
        exact = stats.binomtest(won, won + lost).pvalue
        assert abs(exact - 0.05) > 0.01  # or a draw would decide
        assert intervals._may_be_chance(differences) == (exact > 0.05), (won, lost)


def test_a_few_rows_that_all_differ_alike_show_nothing():
    """The bootstrap alone would: each of its resamples has the same mean."""
    ones = np.ones(5)
    assert paired_difference(ones, 0 * ones) == (1, 0, 1, 5)
    assert [found.low for found in differences_from(0, np.stack([ones, 0 * ones]))] == [0, -1]
    assert paired_difference(np.ones(6), np.zeros(6)) == (1, 1, 1, 6)
    assert paired_difference([], []) is None
    assert paired_difference([1, 0], [1, 0]) == (0, 0, 0, 2)
    assert [found[1:3] for found in differences_from(1, np.ones((3, 1)))] == [(-math.inf, math.inf)] * 3


DRAWS = 1000


def models(kind: str, skills: list[float], rows: int, alike: float, draws: int = DRAWS) -> np.ndarray:
    """What `draws` evaluations find of models: (draws, models, rows). Rows are hard for all (correlation `alike`)."""
    rng = np.random.default_rng(rows)
    own = rng.normal(size=(draws, len(skills), rows)) + np.array(skills)[:, None] / math.sqrt(1 - alike)
    margins = math.sqrt(alike) * rng.normal(size=(draws, 1, rows)) + math.sqrt(1 - alike) * own
    return (margins > -0.3).astype(float) if kind == "accuracy" else np.logaddexp(0, -3 * margins)


def tell_apart(drawn: np.ndarray) -> float:
    """The share of evaluations in which a model is worse than the best one."""
    found = 0
    for values in drawn:
        best = int(values.mean(axis=1).argmax())
        found += any(not one.low <= 0 <= one.high for one in differences_from(best, values))
    return found / len(drawn)


@pytest.mark.parametrize("rows", [50, 190])
@pytest.mark.parametrize("kind", ["accuracy", "loss"])
@pytest.mark.parametrize("alike", [0.5, 0.95])
def test_two_equal_models_seldom_seem_to_differ(kind, rows, alike):
    found = [paired_difference(*values) for values in models(kind, [0, 0], rows, alike)]
    assert np.mean([not one.low <= 0 <= one.high for one in found]) <= 0.05


@pytest.mark.parametrize("rows", [50, 190])
@pytest.mark.parametrize("kind", ["accuracy", "loss"])
@pytest.mark.parametrize("candidates", [2, 4, 9])
def test_of_equal_candidates_none_is_often_worse_than_the_best(kind, candidates, rows):
    assert tell_apart(models(kind, [0] * candidates, rows, alike=0.7)) <= 0.05


@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_a_real_difference_is_found(kind):
    """Over 190 rows, of two models and of nine: an accuracy of 62% against 79%, or a loss as much lower."""
    found = [paired_difference(*values) for values in models(kind, [0.5, 0], 190, 0.7, draws=100)]
    assert np.mean([not one.low <= 0 <= one.high for one in found]) > 0.95
    sure = tell_apart(models(kind, [0.5] + [0] * 8, 190, 0.7, draws=100))
    assert sure > 0.9
