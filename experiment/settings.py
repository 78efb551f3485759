"""Settings that were trained with several seeds: their mean over the seeds, how far it scatters, and which is best."""

import math
from collections import defaultdict
from collections.abc import Callable
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import numpy as np

from experiment.results import Experiment, TrialResult, short_name
from experiment.verdicts import listed, pair_values, values_of_common_pairs
from metrics.intervals import LEVEL, Estimate, differences_from, student_quantile
from pages.terminal import plural

SEED = "training_args.seed"  # data_seed is another axis: it changes which pairs are held out
MOST_NAMED_SETTINGS = 3  # in a sentence; of more it says how many they are


class Setting(NamedTuple):
    """The completed trials that differ in their seed alone."""

    values: tuple[str, ...]  # of the axes but the seed
    results: list[TrialResult]

    def scores(self, metric: str) -> list[float]:
        """Return the trials' finite values of a metric."""
        found = [result["best_metrics"].get(metric, math.nan) for result in self.results]
        return [value for value in found if math.isfinite(value)]


Ranking = tuple[list[Setting], list[Setting] | None]


def settings_of(experiment: Experiment) -> list[Setting]:
    """Return the settings of the trials that can be ranked and were not stopped early; none if no seed varies."""
    if SEED not in experiment.varying:
        return []
    groups: dict[tuple[str, ...], list[TrialResult]] = defaultdict(list)
    for result in experiment.rank_trials():
        if experiment.stopped_early(result):
            continue
        values = zip(experiment.varying, experiment.values(result["hparams"]), strict=True)
        groups[tuple(value for name, value in values if name != SEED)].append(result)
    return [Setting(*group) for group in groups.items()]


def format_mean(scores: list[float], show: Callable[[float], str]) -> str:
    """Return a mean with the standard deviation, to its first digit or two: `0.87 ± 0.02`; `show` writes one value."""
    if len(scores) < 2:
        return show(scores[0])
    scatter = stdev(scores)
    decimals = 3
    if scatter:
        place = math.floor(math.log10(scatter))
        decimals = max(0, -place + (scatter < 2 * 10**place))  # a leading 1 is not rounded to one digit
    return f"{fmean(scores):.{decimals}f} ± {scatter:.{decimals}f}"


def compare_settings(experiment: Experiment, settings: list[Setting]) -> list[Estimate] | None:
    """Return how much worse each setting is than the first, which is best, with simultaneous 95% intervals.

    Two things are left to chance: the pairs, and the seeds. The intervals of `differences_from` over the per-pair means
    of a setting's seeds are for other pairs, but for these very models. For other seeds, a difference of two means over
    seeds has the standard error s sqrt(1/n + 1/m), where s² is the settings' pooled variance over seeds and Student's
    quantile has as many degrees of freedom as that; it is corrected for all pairs of settings (Sidak). On each side the
    distances of the two limits are added as squares (Zou and Donner, Construction of confidence limits about effect
    measures, 2008). None if no setting has two seeds, or trials keep no pairs.
    """
    metric = experiment.searcher.metric
    results = [result for setting in settings for result in setting.results]
    degrees = len(results) - len(settings)
    if degrees < 1 or len(settings) < 2 or any(pair_values(experiment, r, metric) is None for r in results):
        return None
    values = values_of_common_pairs(experiment, results)
    if not values.shape[1]:
        return None
    counts = [len(setting.results) for setting in settings]
    parts = np.split(values, np.cumsum(counts)[:-1])
    squares = sum(float(((part.mean(axis=1) - part.mean()) ** 2).sum()) for part in parts)
    comparisons = math.comb(len(settings), 2)
    z = NormalDist().inv_cdf((1 + LEVEL ** (1 / comparisons)) / 2)
    seeds = student_quantile(z, degrees) * math.sqrt(squares / degrees)
    found = []
    for count, pairs in zip(counts, differences_from(0, np.stack([part.mean(axis=0) for part in parts])), strict=True):
        other_seeds = seeds * math.sqrt(1 / count + 1 / counts[0])
        above, below = (math.hypot(end - pairs.value, other_seeds) for end in (pairs.high, pairs.low))
        found.append(Estimate(-pairs.value, -pairs.value - above, -pairs.value + below, pairs.count))
    return found


def rank_settings(experiment: Experiment) -> Ranking:
    """Return the settings by their mean of the searcher's metric, and those that cannot be told apart from the best.

    The second is None if they cannot be compared.
    """
    metric, sign = experiment.searcher.metric, 1 if experiment.searcher.smaller_is_better else -1
    ranked = sorted(settings_of(experiment), key=lambda setting: sign * fmean(setting.scores(metric)))
    gaps = compare_settings(experiment, ranked)
    alike = None if gaps is None else [s for s, gap in zip(ranked[1:], gaps[1:], strict=True) if gap.low <= 0]
    return ranked, alike


def settings_verdict(experiment: Experiment, ranking: Ranking, show: Callable[[float], str]) -> list[str]:
    """Say which setting is best by its mean over seeds, and how many cannot be told apart from it.

    `ranking` is of `rank_settings`; `show` writes a value of the searcher's metric. No sentence if no seed varies.
    """
    ranked, alike = ranking
    if not ranked:
        return []
    scores = ranked[0].scores(experiment.searcher.metric)
    others, mean = len(ranked) - 1, format_mean(scores, show)
    over = f"over {plural(len(scores), 'seed')}" + (", mean ± standard deviation" if scores[1:] else "")
    if not others:
        return [f"The searcher's metric is {mean} ({over})."]
    said = f"The best setting is {describe(experiment, ranked[0])}: {mean} ({over})."
    if alike is None:
        return [said, "Settings are not compared: that takes the pairs of trials with two seeds or more."]
    rest, sure = others - len(alike), "(95%, other seeds too)"
    if not alike:
        return [said, f"The other {'setting is' if others == 1 else f'{others} are'} worse {sure}."]
    if not rest:
        which = "The other setting cannot" if others == 1 else f"None of the other {others} can"
        return [said, f"{which} be told apart from it {sure}."]
    named = listed([f"({describe(experiment, setting)})" for setting in alike])
    which = named if len(alike) < MOST_NAMED_SETTINGS else f"{len(alike)} others"
    worse = "the other is" if rest == 1 else "the others are"
    return [said, f"{which} cannot be told apart from it; {worse} worse {sure}."]


def describe(experiment: Experiment, setting: Setting) -> str:
    """Return `dpo_beta 0.1, learning_rate 5e-07`; nothing if only the seed varies."""
    names = [short_name(name) for name in experiment.varying if name != SEED]
    return ", ".join(f"{name} {value}" for name, value in zip(names, setting.values, strict=True))
