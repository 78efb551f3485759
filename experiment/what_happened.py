"""What happened in an experiment, in short sentences: what a reader of the curves would look for, each with its figure.

Only sentences that apply are there. Log-ratios, the log-prob of an answer minus the reference's, are in nats.
"""

import math
from collections.abc import Iterator
from statistics import fmean

import numpy as np

from experiment.kinds import SFT
from experiment.results import Experiment, TrialResult
from experiment.verdicts import args_of, beta_of, interval, listed, loss_of, pair_values, trials
from metrics.evaluations import LIKE_LENGTH, Evaluations, LogRatios, of_like_length
from metrics.intervals import estimate, paired_difference
from pages.terminal import plural
from trial.events import events_by_step

UNMOVED = math.log(2)  # the preference loss of a model that is its reference
STILL = 0.1  # nats of |h|: below it the odds between two answers changed by less than a tenth
STILL_LOSS = 1e-3  # about ln 2, where there are no pairs: a mean h of 0.02 nats
CLEARLY = 0.01  # of the preference loss: what a mean h of 0.2 nats changes, more than rounding or a batch does
OVERFITTED = 0.1  # accuracy in training minus held out: one pair in ten is known by heart
OVERFITTED_LOSS = 0.2  # held-out SFT loss above training's, as a share; data of two halves alike differ by less
PREFERS = 0.05  # share of pairs beyond one half whose chosen answer is the longer: less would not teach length
LOSSES = ("loss", "eval_loss", "eval_preference_loss")
ENOUGH = 10  # pairs, for an accuracy that says anything
LAST_PART = 0.5  # of a training shorter than two epochs: what is averaged; at its beginning nothing is learned yet
LEARNED = {  # by whether chosen answers, and whether rejected ones, became more likely
    (False, False): "made both kinds of answers less likely than the reference",
    (True, False): "made chosen answers more likely than the reference and rejected ones less",
    (False, True): "learned the opposite, chosen answers became less likely and rejected ones more",
    (True, True): "made both kinds of answers more likely than the reference",
}


def what_happened(experiment: Experiment) -> list[str]:
    """Return the sentences on an experiment."""
    best, said = experiment.best(), [*stopped_early(experiment)]
    if best and experiment.kind is SFT:
        said += [*held_out_loss(experiment, best), *loss_gap(experiment, best)]
    elif best:
        for sentences in (answers, distance, accuracy_gap):
            said += sentences(experiment, best)
    said += [*still(experiment), *diverged(experiment), *rose(experiment)]
    if best and (evaluations := experiment.evaluations.get(best["trial_id"])):
        said += [*lengths(experiment, best, evaluations), *evaluations.truncations]
    return said


def stopped_early(experiment: Experiment) -> Iterator[str]:
    """Say how many trials the search stopped, and how much training that saved."""
    stopped = [result for result in experiment.results.values() if experiment.stopped_early(result)]
    if stopped:
        unit, length = (experiment.config["searcher"][key] for key in ("time_metric", "max_time"))
        done = fmean(result["metrics"].get(unit, 0) for result in stopped)
        who = f"{len(stopped)} of {plural(len(experiment.results), 'trial')}"
        yield f"The search stopped {who} early, after {done:.3g} of {length} {unit} on average."


def answers(experiment: Experiment, best: TrialResult) -> Iterator[str]:
    """Say how the likelihood of chosen and rejected answers changed."""
    ratios, evaluations = experiment.log_ratios(best), experiment.evaluations.get(best["trial_id"])
    changes, rates = mean_log_ratios(best, ratios), ["", ""]
    if changes is None or (ratios and np.abs(ratios.margins).mean() < STILL):
        return
    if ratios and evaluations:
        tokens = sum(evaluations.chosen_tokens), sum(evaluations.rejected_tokens)
        sums = ratios.chosen.sum(), ratios.rejected.sum()
        rates = [f" ({abs(s / max(1, n)):.2g} a token)" for s, n in zip(sums, tokens, strict=True)]
    chosen, rejected = (f"{abs(change):.3g} nats{rate}" for change, rate in zip(changes, rates, strict=True))
    normal = " In DPO that is normal: what counts is that rejected ones fell further."
    yield (
        f"Trial {best['trial_id']} {LEARNED[changes[0] >= 0, changes[1] >= 0]}: chosen ones by {chosen},"
        f" rejected ones by {rejected}.{normal if changes[1] < changes[0] < 0 else ''}"
    )


def mean_log_ratios(result: TrialResult, ratios: LogRatios | None) -> tuple[float, float] | None:
    """Return the mean log-ratio of chosen and of rejected answers, from pairs or else from rewards; None without."""
    if ratios:
        return float(ratios.chosen.mean()), float(ratios.rejected.mean())
    found = [result["best_metrics"].get(f"eval_rewards/{side}", math.nan) for side in ("chosen", "rejected")]
    beta = beta_of(result["hparams"])
    return (found[0] / beta, found[1] / beta) if all(map(math.isfinite, found)) else None


def distance(experiment: Experiment, best: TrialResult) -> Iterator[str]:
    """Say how far the best trial and the others moved from the reference."""
    moved = {}
    for trial_id, result in experiment.results.items():
        whole = trial_id == best["trial_id"] or not experiment.stopped_early(result)
        if whole and (ratios := experiment.log_ratios(result)):
            moved[trial_id] = float(np.abs(np.concatenate(ratios)).mean())
    own = moved.pop(best["trial_id"], None)
    if own is None:
        return
    rest = ""
    if moved:
        low, high = min(moved, key=lambda i: moved[i]), max(moved, key=lambda i: moved[i])
        rest = f"; trial {low} moved by {moved[low]:.3g}"
        if low != high:
            rest = f"; the others moved by {moved[low]:.3g} (trial {low}) to {moved[high]:.3g} (trial {high})"
    away = "nats an answer from the reference, up or down (mean absolute log-ratio)"
    yield f"Trial {best['trial_id']} moved {own:.3g} {away}{rest}."


def accuracy_gap(experiment: Experiment, best: TrialResult) -> Iterator[str]:
    """Say how accuracy in training compares with that on held-out pairs."""
    (known, over), metric = training_mean(experiment, best, "rewards/accuracies"), "eval_rewards/accuracies"
    held_out = best["best_metrics"].get(metric, math.nan)
    if not math.isfinite(known - held_out):
        return
    found, values = interval(experiment, best, metric), pair_values(experiment, best, metric)
    gap = None if values is None else paired_difference(values, np.full(len(values), known))
    figure = f"{held_out:.2f}" + (f" ({found.interval()})" if found else "")
    means = "no sign of overfitting"
    if known - held_out > OVERFITTED:
        means = f"{known - held_out:.2f} less, which {'may be chance' if gap and gap.high >= 0 else 'is overfitting'}"
    yield f"In training its accuracy was {known:.2f} over {over}, on held-out pairs {figure}: {means}."


def training_mean(experiment: Experiment, result: TrialResult, metric: str) -> tuple[float, str]:
    """Return the mean of a metric in training up to the trial's checkpoint, and what it is over; NaN if not logged."""
    end = experiment.step_of(result) or result["steps_completed"]
    events = events_by_step(experiment.events.get(result["trial_id"], []), "training")
    logged = {step: event["metrics"] for step, event in events.items() if step <= end and metric in event["metrics"]}
    if not logged:
        return math.nan, ""
    last = max(logged)
    epoch = last / epochs if (epochs := logged[last].get("epochs")) else math.inf
    half = last * LAST_PART
    size, over = (epoch, "the last epoch") if epoch <= half else (half, "the last half of its steps")
    values = [of[metric] for step, of in logged.items() if step > last - size and math.isfinite(of[metric])]
    return (fmean(values) if values else math.nan), over


def still(experiment: Experiment) -> Iterator[str]:
    """Name the trials that hardly moved from the reference."""
    found: dict[int, str] = {}
    for trial_id, result in sorted(experiment.results.items()):
        loss = result["best_metrics"].get("eval_preference_loss", math.nan)
        if experiment.state(result) != "COMPLETED":
            continue
        if ratios := experiment.log_ratios(result):
            moved = float(np.abs(ratios.margins).mean())
            if moved < STILL:
                found[trial_id] = f"{moved:.2g}"
        elif abs(loss - UNMOVED) < STILL_LOSS:
            found[trial_id] = f"less than {STILL}"
    if found:
        named = (args_of(experiment.results[i]["hparams"]).get("learning_rate") for i in found)
        rates = sorted({rate for rate in named if isinstance(rate, float)})
        which = f" ({listed([f'{rate:g}' for rate in rates])})" if rates else ""
        yield (
            f"{trials([*found]).capitalize()} hardly moved: a chosen answer's lead changed by"
            f" {listed([*found.values()])} nats (below {STILL} the odds change by less than a tenth)."
            f" The learning_rate{which} is too small, or the training too short."
        )


def diverged(experiment: Experiment) -> Iterator[str]:
    """Name the trials whose loss is not finite, or worse than that of a model that has not moved."""
    for trial_id, result in sorted(experiment.results.items()):
        steps = [
            event["steps_completed"]
            for event in experiment.events.get(trial_id, [])
            if event["kind"] in ("training", "validation")
            and not all(math.isfinite(event["metrics"].get(metric, 0)) for metric in LOSSES)
        ]
        loss = result["metrics"].get("eval_preference_loss", math.nan)
        if steps:
            at = f"its loss is not finite at step {min(steps)}"
            yield f"Trial {trial_id} diverged: {at}. Try a smaller learning_rate."
        elif loss > UNMOVED + CLEARLY:
            unmoved = f"more than the {UNMOVED:.3f} of a model that did not move"
            yield (
                f"Trial {trial_id} ends at a preference loss of {loss:.3f}, {unmoved}: it diverged, or is sure of wrong"
                " pairs. Try a smaller learning_rate."
            )


def rose(experiment: Experiment) -> Iterator[str]:
    """Name the trials whose preference loss rose again at the end."""
    found, ends = [], []
    for trial_id, result in sorted(experiment.results.items()):
        by_step = evaluations_of(experiment, result, "eval_preference_loss")
        end = by_step[max(by_step)] if by_step else math.inf
        if end <= UNMOVED + CLEARLY and (rise := end - min(by_step.values())) > CLEARLY:  # else it diverged
            found.append(trial_id)
            ends.append(rise)
    if found:
        by = f"{ends[0]:.2g}" if len(found) == 1 else f"up to {max(ends):.2g}"
        who = trials(found).capitalize()
        yield f"{who} ended above the lowest preference loss, by {by}: trained longer than was good."


def evaluations_of(experiment: Experiment, result: TrialResult, metric: str) -> dict[int, float]:
    """Return a trial's finite values of a metric by the step of the evaluation, in order."""
    events = events_by_step(experiment.events.get(result["trial_id"], []), "validation")
    found = {step: event["metrics"].get(metric, math.nan) for step, event in events.items()}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def lengths(experiment: Experiment, best: TrialResult, evaluations: Evaluations) -> Iterator[str]:
    """Say whether chosen answers are the longer or the shorter ones, and how right the best trial is beside that."""
    chosen, rejected = np.array(evaluations.chosen_tokens), np.array(evaluations.rejected_tokens)
    is_longer = (chosen > rejected)[chosen != rejected]
    beyond = paired_difference(is_longer, np.full(len(is_longer), 0.5))
    if beyond is None or abs(beyond.value) < PREFERS or not beyond.decides:
        return
    longer = beyond.value > 0
    share = estimate(is_longer == longer)
    assert share is not None
    often = f"{share.value:.0%} of {share.count} pairs ({share.low:.0%} to {share.high:.0%})"
    yield (
        f"The chosen answer is the {'longer' if longer else 'shorter'} one in"
        f" {often if share.low < share.high else f'all {share.count} pairs'},"
        f" {chosen.mean() / rejected.mean():.2f} times as long on average: the data prefers"
        f" {'length' if longer else 'brevity'}."
    )
    if longer and "sigmoid_norm" not in loss_of(best["hparams"]):
        yield "Against learning length, others divide by it: dpo_loss: sigmoid_norm with a dpo_beta near 5."
    like = of_like_length(np.stack([chosen, rejected], axis=1))
    ratios = experiment.log_ratios(best)
    if ratios and like.sum() >= ENOUGH:
        here, all_pairs = estimate(ratios.margins[like] > 0), (ratios.margins > 0).mean()
        assert here is not None
        holds = "holds" if here.low > 0.5 else "is not surely better than chance"
        yield (
            f"On the {plural(here.count, 'pair')} of like length (in tokens, within {1 - LIKE_LENGTH:.0%}) the best"
            f" trial's accuracy {holds}: {here.value:.2f} ({here.interval()}), against {all_pairs:.2f} on all."
        )


def held_out_loss(experiment: Experiment, best: TrialResult) -> Iterator[str]:
    """Say how the held-out loss of an SFT trial went."""
    by_step = evaluations_of(experiment, best, "eval_loss")
    if len(by_step) < 2:
        return
    first, *_, last = by_step
    change = by_step[last] / by_step[first] - 1
    change_text = f"{change:+.1%}".replace("-", "\N{MINUS SIGN}")
    went = f"from {by_step[first]:.3f} at step {first} to {by_step[last]:.3f} at step {last}"
    yield f"The held-out loss went {went}: {change_text}."
    lowest = min(by_step, key=lambda step: by_step[step])
    if lowest == last:
        yield "It was lowest at the last evaluation: more steps may lower it further."
    else:
        yield f"It was lowest at step {lowest}, with {by_step[lowest]:.3f}: what came later did not help."


def loss_gap(experiment: Experiment, best: TrialResult) -> Iterator[str]:
    """Say how an SFT trial's loss in training compares with the held-out one."""
    (known, over), held_out = training_mean(experiment, best, "loss"), best["best_metrics"].get("eval_loss", math.nan)
    if not math.isfinite(known - held_out):
        return
    large = held_out > known * (1 + OVERFITTED_LOSS)
    means = "a gap this large is overfitting" if large else "no sign of overfitting"
    yield f"In training the loss was {known:.3f} over {over}, on held-out rows {held_out:.3f}: {means}."
