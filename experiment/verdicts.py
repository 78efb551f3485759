"""Which trial is best, and which cannot be told apart from it: by the same held-out pairs, with 95% intervals."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from config.hyperparameters import DEFAULT_BETA
from experiment.results import Experiment, TrialResult, short_name
from metrics.evaluations import preference_losses
from metrics.intervals import Estimate, differences_from, estimate
from pages.terminal import plural

# The metrics that are a mean over pairs: each pair's value from its h, the difference of its log-ratios, and beta.
PAIR_METRICS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "eval_preference_loss": lambda h, beta: preference_losses(h),
    "eval_rewards/accuracies": lambda h, beta: (h > 0).astype(float),
    "eval_rewards/margins": lambda h, beta: beta * h,
}
# The hyperparameters that decide which reference log-ratios are against, and how they weight an answer's tokens.
MEASURES = {"model_ckpt", "model_name", "ld_alpha"}
MOST_NAMED = 6  # trials in a sentence; of more it says how many they are


def args_of(hparams: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's `training_args`."""
    return hparams.get("training_args") or {}


def beta_of(hparams: dict[str, Any]) -> float:
    """Return a DPO trial's beta, under either of its names, or else TRL's default."""
    return hparams.get("dpo_beta") or args_of(hparams).get("beta") or DEFAULT_BETA


def loss_of(hparams: dict[str, Any]) -> list[str]:
    """Return the names of a DPO trial's losses, under either of their names, or else TRL's default."""
    found = hparams.get("dpo_loss") or args_of(hparams).get("loss_type") or "sigmoid"
    return [found] if isinstance(found, str) else found


def pair_values(experiment: Experiment, result: TrialResult, metric: str) -> np.ndarray | None:
    """Return a metric of each held-out pair, (pairs,), at a trial's checkpoint; None without, or for another metric."""
    log_ratios = experiment.log_ratios(result)
    if log_ratios is None or metric not in PAIR_METRICS:
        return None
    return PAIR_METRICS[metric](log_ratios.margins, beta_of(result["hparams"]))


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
    though not on the best trial's own; `uncompared` are not, for the reason `why`. `pairs` is how many all share.
    `stopped` are those that the search stopped early: their figures are of shorter trainings, so they are in none of
    the others.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, metric = experiment, experiment.searcher.metric
        self.ranked = experiment.rank_trials()
        self.best = next(iter(self.ranked), None)
        self.behind: dict[int, Estimate] = {}
        self.pairs, self.why = 0, experiment.unreachable or "the checkpoints keep none"
        self.stopped = [r["trial_id"] for r in self.ranked[1:] if experiment.stopped_early(r)]
        full = [r for r in self.ranked if r["trial_id"] not in self.stopped]
        with_pairs = [r for r in full if pair_values(experiment, r, metric) is not None]
        if self.best in with_pairs and len(with_pairs) > 1:
            values = values_of_common_pairs(experiment, with_pairs)
            self.pairs = values.shape[1]
            if self.pairs:
                differences = zip(with_pairs[1:], differences_from(0, values)[1:], strict=True)
                self.behind = {r["trial_id"]: Estimate(-d.value, -d.high, -d.low, d.count) for r, d in differences}
            else:
                self.why = "there is none that all of them hold out"
        self.uncompared = [r["trial_id"] for r in full[1:] if r["trial_id"] not in self.behind]
        self.worse = [trial_id for trial_id, gap in self.behind.items() if gap.low > 0]
        self.better = [trial_id for trial_id, gap in self.behind.items() if gap.high < 0]
        scores = {result["trial_id"]: result["best_metrics"][metric] for result in full}
        self.ties = [trial_id for trial_id in list(scores)[1:] if scores[trial_id] == next(iter(scores.values()))]
        apart = {*self.worse, *self.better}
        self.alike = sorted(i for i in self.behind if i not in apart) if self.behind else self.ties

    def headline(self, so_far: bool) -> str:
        """Say which trial is best, and which of the others cannot be told apart from it."""
        if self.best is None:
            return "No best trial yet"
        said = f"Trial {self.best['trial_id']} is best{' so far' if so_far else ''}"
        if not self.behind or len(self.better) == len(self.behind):
            return said
        all_compared = not (self.better or self.uncompared or self.stopped)
        return said + compare_in_words(sorted(self.alike), sorted(self.worse), all_compared)

    def tied(self) -> list[str]:
        """Return a sentence on exact ties, if there are any."""
        return [f"{trials(self.ties, verb=True).capitalize()} as good; the first is taken."] if self.ties else []

    def remarks(self) -> list[str]:
        """Return what a reader should know of the comparison: what could not be compared, and why."""
        metric, said = self.experiment.searcher.metric, list[str]()
        if self.best and self.experiment.stopped_early(self.best):
            said.append("The best one was itself stopped early: trained to the end, it could be better or worse.")
        if self.stopped:
            which = trials(self.stopped) if len(self.stopped) <= MOST_NAMED else f"{len(self.stopped)} trials"
            said.append(f"Not compared: {which}, stopped early by the search after less training.")
        if self.better:
            better = f"{trials(self.better, verb=True)} better than it"
            said.append(f"On the {plural(self.pairs, 'pair')} that all trials hold out, {better}.")
        if self.uncompared and metric not in PAIR_METRICS:
            why = "not a mean over pairs that a trial keeps, so it has no interval"
            said.append(f"{metric} is {why}: small differences may be chance.")
        elif self.uncompared and self.behind:
            said.append(f"Not compared over the same pairs: {listed(self.uncompared)} ({self.why}).")
        elif self.uncompared:
            said.append(f"Trials are compared without pairs: {self.why}. Small differences may be chance.")
        measures = MEASURES & set(map(short_name, self.experiment.varying))
        measures |= {"sync_ref_model" for r in self.ranked if args_of(r["hparams"]).get("sync_ref_model")}
        if measures and self.ranked[1:] and metric in PAIR_METRICS:
            how = listed(sorted(measures))
            said.append(f"Trials measure log-ratios differently ({how}): metrics made of them do not compare.")
        return said


def compare_in_words(alike: Sequence[int], worse: Sequence[int], all_compared: bool) -> str:
    """Return the end of the sentence `Trial 1 is best`: what the trials `alike` and `worse` are against it."""

    def name(ids: Sequence[int]) -> str:
        return f"{len(ids)} others" if len(ids) > MOST_NAMED else trials(ids).removeprefix("trials ")

    if not worse:
        which = "none of the others can" if alike[1:] and all_compared else f"{name(alike)} cannot"
        return f", but {which} be told apart from it (95%)"
    which = f"{'the others' if all_compared else name(worse)} are" if worse[1:] else trials(worse, verb=True)
    return (f"; {name(alike)} cannot be told apart from it" if alike else "") + f"; {which} worse (95%)"


def trials(ids: Sequence[int], verb: bool = False) -> str:
    """Return `trial 4` or `trials 4 and 7`, with a verb `trial 4 is` or `trials 4 and 7 are`."""
    noun, be = ("trials", " are") if ids[1:] else ("trial", " is")
    return f"{noun} {listed(ids)}{be if verb else ''}"


def listed(items: Sequence[object]) -> str:
    """Return `4`, `4 and 7` or `2, 4 and 7`."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
