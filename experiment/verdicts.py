"""Which trial is best, and which cannot be told apart from it: by the same held-out pairs, with 95% intervals."""

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from experiment.results import Experiment, TrialResult
from metrics.evaluations import preference_losses
from metrics.intervals import Estimate, differences_from, estimate
from pages.terminal import plural

TRL_BETA = 0.1  # of an experiment without dpo_beta
# The metrics that are a mean over pairs: each pair's value from its h, the difference of its log-ratios, and beta.
PAIR_METRICS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "eval_preference_loss": lambda h, beta: preference_losses(h),
    "eval_rewards/accuracies": lambda h, beta: (h > 0).astype(float),
    "eval_rewards/margins": lambda h, beta: beta * h,
}
MOST_NAMED = 6  # trials in a sentence; of more it says how many they are


def pair_values(experiment: Experiment, result: TrialResult, metric: str) -> np.ndarray | None:
    """Return a metric of each held-out pair, (pairs,), at a trial's checkpoint; None without, or for another metric."""
    log_ratios = experiment.log_ratios(result)
    if log_ratios is None or metric not in PAIR_METRICS:
        return None
    return PAIR_METRICS[metric](log_ratios.margins, result["hparams"].get("dpo_beta") or TRL_BETA)


def interval(experiment: Experiment, result: TrialResult, metric: str) -> Estimate | None:
    """Return a metric of a trial's checkpoint with its 95% interval over the held-out pairs; None without pairs."""
    values = pair_values(experiment, result, metric)
    return None if values is None else estimate(values)


def values_of_common_pairs(experiment: Experiment, results: Sequence[TrialResult]) -> np.ndarray:
    """Return the searcher's metric, larger is better, of the pairs that all `results` hold out: (results, pairs).

    Pairs are matched by their names: limits may have dropped other rows for another trial. All `results` have pairs.
    """
    sign = -1 if experiment.searcher.smaller_is_better else 1
    found = []
    for result in results:
        values = pair_values(experiment, result, experiment.searcher.metric)
        assert values is not None
        rows = experiment.evaluations[result["trial_id"]].rows
        found.append(dict(zip(rows, sign * values, strict=True)))
    names = sorted(reduce(lambda common, of: common & of.keys(), found[1:], set(found[0])))
    return np.array([[of[name] for name in names] for of in found])


class Verdict:
    """How the completed trials stand against the best one by the searcher's metric.

    `behind` says how much worse each of the others is, by trial id, with simultaneous 95% intervals (see
    `differences_from`): positive for a worse one. It is empty without pairs; then `alike` are only the exact ties.
    `alike` cannot be told apart from the best; `worse` are worse; `better` are better on the pairs that all hold out,
    though not on the best trial's own; `uncompared` keep no pairs. `pairs` is how many the `compared` share.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, metric = experiment, experiment.searcher.metric
        self.ranked = experiment.rank_trials()
        self.best = next(iter(self.ranked), None)
        self.behind: dict[int, Estimate] = {}
        self.pairs, self.compared = 0, False
        with_pairs = [r for r in self.ranked if pair_values(experiment, r, metric) is not None]
        if self.best in with_pairs and len(with_pairs) > 1:
            values, self.compared = values_of_common_pairs(experiment, with_pairs), True
            self.pairs = values.shape[1]
            if self.pairs:
                differences = zip(with_pairs[1:], differences_from(0, values)[1:], strict=True)
                self.behind = {r["trial_id"]: Estimate(-d.value, -d.high, -d.low, d.count) for r, d in differences}
        self.uncompared = [r["trial_id"] for r in self.ranked[1:] if r["trial_id"] not in self.behind]
        self.worse = [trial_id for trial_id, gap in self.behind.items() if gap.low > 0]
        self.better = [trial_id for trial_id, gap in self.behind.items() if gap.high < 0]
        self.ties = experiment.ties()
        apart = {*self.worse, *self.better}
        self.alike = sorted(i for i in self.behind if i not in apart) if self.behind else self.ties

    def headline(self, so_far: bool) -> str:
        """Say which trial is best, and which of the others cannot be told apart from it."""
        if self.best is None:
            return "No best trial yet"
        said = f"Trial {self.best['trial_id']} is best{' so far' if so_far else ''}"
        if not self.behind or len(self.better) == len(self.behind):
            return said
        all_compared = not (self.better or self.uncompared)
        return said + compare_in_words(sorted(self.alike), sorted(self.worse), all_compared)

    def tied(self) -> list[str]:
        """Return a sentence on exact ties, if there are any."""
        noun, verb = ("Trials", "are") if self.ties[1:] else ("Trial", "is")
        return [f"{noun} {listed(self.ties)} {verb} as good; the first is taken."] if self.ties else []

    def remarks(self) -> list[str]:
        """Return what a reader should know of the comparison: what could not be compared, and why."""
        said = []
        if self.better:
            noun, verb = ("trials", "are") if self.better[1:] else ("trial", "is")
            which = plural(self.pairs, "pair")
            said.append(f"On the {which} that all trials hold out, {noun} {listed(self.better)} {verb} better than it.")
        return said + [line for line in [self.doubt()] if line]

    def doubt(self) -> str:
        """Say why trials were compared without pairs; nothing if all were compared by them, or there are no others."""
        experiment, metric = self.experiment, self.experiment.searcher.metric
        if not self.uncompared:
            return ""
        if metric not in PAIR_METRICS:
            why = "not a mean over pairs that a trial keeps, so it has no interval"
            return f"{metric} is {why}: small differences may be chance."
        why = experiment.unreachable or "the checkpoints keep none"
        if self.behind:
            return f"Not compared over the same pairs: {listed(self.uncompared)} ({why})."
        if self.compared and not self.pairs:
            why = "there is none that all of them hold out"
        return f"Trials are compared without pairs: {why}. Small differences may be chance."


def compare_in_words(alike: Sequence[int], worse: Sequence[int], all_compared: bool) -> str:
    """Return the end of the sentence `Trial 1 is best`: what the trials `alike` and `worse` are against it."""

    def name(trials: Sequence[int]) -> str:
        many = f"{len(trials)} others" if len(trials) > MOST_NAMED else listed(trials)
        return many if trials[1:] else f"trial {trials[0]}"

    if not alike:
        which = "the others" if worse[1:] and all_compared else name(worse)
        return f"; {which} {'are' if worse[1:] else 'is'} worse (95%)"
    if not worse:
        which = "none of the others can" if alike[1:] and all_compared else f"{name(alike)} cannot"
        return f", but {which} be told apart from it (95%)"
    which = "the others" if worse[1:] and all_compared else name(worse)
    rest = f"{which} {'are' if worse[1:] else 'is'} worse"
    return f"; {name(alike)} cannot be told apart from it; {rest} (95%)"


def listed(items: Sequence[object]) -> str:
    """Return `4`, `4 and 7` or `2, 4 and 7`."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
