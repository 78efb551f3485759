"""Which trial is best and which cannot be told apart from it, on experiments made by hand."""

import numpy as np
import pytest
from made import ACCURACY, CONFIG, LOSS, made, noise, pairs_of

from experiment.next_steps import compare_command, winner
from experiment.report_page import Page
from experiment.settings import compare_settings, format_mean, rank_settings, settings_of, settings_verdict
from experiment.verdicts import Verdict, interval, loss_of
from metrics.evaluations import preference_losses
from metrics.intervals import paired_difference

SHARED = 4 * noise(0)  # what makes a pair hard for every trial


def h(mean, seed=1, own=0.3):
    return mean + SHARED + own * noise(seed)


GOOD, AS_GOOD, BAD, WORST = h(4, 1), h(3.99, 2), h(2, 3), h(0, 4)
TOLD_APART = "(95%)"


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ([GOOD, BAD], "Trial 1 is best; trial 2 is worse (95%)"),
        ([GOOD, AS_GOOD], "Trial 1 is best, but trial 2 cannot be told apart from it (95%)"),
        ([BAD, GOOD, WORST], "Trial 2 is best; the others are worse (95%)"),
        ([AS_GOOD, GOOD, h(3.98, 5)], "Trial 2 is best, but none of the others can be told apart from it (95%)"),
        ([GOOD, BAD, AS_GOOD], "Trial 1 is best; trial 3 cannot be told apart from it; trial 2 is worse (95%)"),
        (
            [GOOD, BAD, AS_GOOD, WORST, h(3.98, 5)],
            "Trial 1 is best; 3 and 5 cannot be told apart from it; the others are worse (95%)",
        ),
        (
            [GOOD, WORST, *(h(4 - 0.002 * i, i) for i in range(2, 9))],
            "Trial 1 is best; 7 others cannot be told apart from it; trial 2 is worse (95%)",
        ),
        ([GOOD], "Trial 1 is best"),
    ],
)
def test_the_headline(trials, said):
    experiment = made([pairs_of(of) for of in trials])
    verdict = Verdict(experiment)
    assert verdict.headline(so_far=False) == said
    assert verdict.headline(so_far=True) == said.replace("is best", "is best so far")
    assert verdict.remarks() == []
    assert verdict.pairs == (200 if len(trials) > 1 else 0)


def test_the_same_pairs_tell_apart_what_intervals_of_their_own_do_not():
    experiment = made([pairs_of(h(4, 1, own=0.1)), pairs_of(h(3.6, 2, own=0.1))])
    one, other = (interval(experiment, result, LOSS) for result in experiment.results.values())
    assert one.high > other.low
    assert Verdict(experiment).worse == [2]


def test_trials_that_are_alike_are_rarely_called_worse():
    """Of nine, some look far behind the one that looks best: one comparison at a time would often call them worse."""
    alarms = naive = 0
    for draw in range(40):
        own = 1 + np.random.default_rng(1000 + draw).normal(size=(9, 60))
        experiment = made([pairs_of(of) for of in own])
        alarms += bool(Verdict(experiment).worse)
        losses = sorted(map(preference_losses, own), key=np.mean)
        naive += any(paired_difference(of, losses[0]).low > 0 for of in losses[1:])
    assert alarms <= 4  # 2 are expected
    assert naive >= 12


@pytest.mark.parametrize(("metric", "best"), [(LOSS, 1), (ACCURACY, 2), ("eval_rewards/margins", 1)])
def test_each_metric_has_its_pairs_and_its_direction(metric, best):
    far, right = np.where(np.arange(200) < 150, 20.0, -0.1), np.full(200, 0.5)
    verdict = Verdict(made([pairs_of(far), pairs_of(right)], metric=metric))
    assert verdict.headline(so_far=False) == f"Trial {best} is best; trial {3 - best} is worse {TOLD_APART}"
    gap = verdict.behind[3 - best]
    assert 0 < gap.low < gap.value < gap.high
    means = [result["best_metrics"][metric] for result in verdict.ranked]
    assert gap.value == pytest.approx(abs(means[0] - means[1]))


def test_an_interval_is_of_the_pairs_of_the_best_checkpoint():
    experiment = made([pairs_of(GOOD)])
    kept = experiment.evaluations[1]
    kept.steps[20] = pairs_of(WORST).steps[40]
    found = interval(experiment, experiment.results[1], LOSS)
    assert found.value == pytest.approx(preference_losses(GOOD).mean())
    assert found.low < found.value < found.high
    assert interval(experiment, experiment.results[1], "eval_loss") is None
    del kept.steps[40]
    assert interval(experiment, experiment.results[1], LOSS) is None


def test_pairs_are_matched_by_their_names():
    """A limit has dropped the first half of the second trial's rows, and they stand in another order."""
    rows = [f"pairs row {i}" for i in range(200)]
    some = [*range(199, 99, -1)]
    experiment = made([pairs_of(GOOD, rows=rows), pairs_of(GOOD[some], rows=[rows[i] for i in some])])
    verdict = Verdict(experiment)
    assert verdict.pairs == 100
    (gap,) = verdict.behind.values()
    assert (gap.value, gap.low, gap.high) == pytest.approx((0, 0, 0))  # the same on each pair
    assert len(verdict.alike) == 1


def test_a_trial_that_is_better_on_the_common_pairs_is_told():
    """The best trial's own pairs were easier."""
    rows = [f"pairs row {i}" for i in range(200)]
    easy = pairs_of([2.0] * 100 + [50.0] * 100, rows=rows)
    experiment = made([easy, pairs_of(h(9)[:100], rows=rows[:100])])
    verdict = Verdict(experiment)
    assert (verdict.best["trial_id"], verdict.better) == (1, [2])
    assert verdict.headline(so_far=False) == "Trial 1 is best"
    assert verdict.remarks() == ["On the 100 pairs that all trials hold out, trial 2 is better than it."]


def test_without_pairs_nothing_is_claimed():
    metrics = {1: {LOSS: 0.5}, 2: {LOSS: 0.6}, 3: {LOSS: 0.5}}
    verdict = Verdict(made([None] * 3, metrics=metrics))
    assert verdict.headline(so_far=False) == "Trial 1 is best"
    assert (verdict.alike, verdict.worse) == ([3], [])  # an exact tie
    assert verdict.tied() == ["Trial 3 is as good; the first is taken."]
    chance = "Small differences may be chance."
    assert verdict.remarks() == [f"Trials are compared without pairs: the checkpoints keep none. {chance}"]
    verdict.experiment.unreachable = "the checkpoint storage cannot be reached from here (no)"
    said = f"Trials are compared without pairs: {verdict.experiment.unreachable}. {chance}"
    assert Verdict(verdict.experiment).remarks() == [said]


def test_some_trials_without_pairs_are_named():
    experiment = made([pairs_of(GOOD), None, pairs_of(BAD), pairs_of(WORST)], metrics={2: {LOSS: 0.6}})
    verdict = Verdict(experiment)
    assert verdict.headline(so_far=False) == "Trial 1 is best; 3 and 4 are worse (95%)"
    assert verdict.remarks() == ["Not compared over the same pairs: 2 (the checkpoints keep none)."]


def test_other_pairs_of_each_trial_cannot_be_compared():
    experiment = made([pairs_of(GOOD), pairs_of(BAD, rows=[f"others row {i}" for i in range(200)])])
    assert Verdict(experiment).remarks() == [
        "Trials are compared without pairs: there is none that all of them hold out. Small differences may be chance."
    ]


def test_another_metric_has_no_interval_and_that_is_said():
    metrics = {1: {"eval_loss": 0.5}, 2: {"eval_loss": 0.6}}
    verdict = Verdict(made([pairs_of(GOOD), pairs_of(BAD)], metric="eval_loss", metrics=metrics))
    assert verdict.headline(so_far=False) == "Trial 1 is best"
    (said,) = verdict.remarks()
    assert said.startswith("eval_loss is not a mean over pairs")
    assert Verdict(made([pairs_of(GOOD)], metric="eval_loss", metrics=metrics)).remarks() == []


def hyperparameters(**training_args):
    return {"hyperparameters": {**CONFIG["hyperparameters"], "dpo_beta": None, "training_args": training_args}}


@pytest.mark.parametrize(
    ("change", "axis", "how"),
    [
        ({}, {"model_ckpt": ["a", "b"]}, "model_ckpt"),
        ({}, {"model_name": ["a", "b"], "training_args.ld_alpha": [0.5]}, "model_name"),
        ({}, {"model_name": ["a"], "training_args.ld_alpha": [0.5, 1.0]}, "ld_alpha"),
        (hyperparameters(sync_ref_model=True), {"training_args.seed": [1, 2]}, "sync_ref_model"),
        (hyperparameters(sync_ref_model=True), {"model_ckpt": ["a", "b"]}, "model_ckpt and sync_ref_model"),
    ],
)
def test_log_ratios_that_are_measured_differently_do_not_compare(change, axis, how):
    said = f"Trials measure log-ratios differently ({how}): metrics made of them do not compare."
    assert Verdict(made([pairs_of(GOOD), pairs_of(BAD)], axis=axis, **change)).remarks() == [said]
    metrics = {i: {"eval_loss": 0.5} for i in (1, 2)}
    other = made([pairs_of(GOOD), pairs_of(BAD)], axis=axis, metric="eval_loss", metrics=metrics, **change)
    assert said not in Verdict(other).remarks()


def test_beta_and_loss_have_two_names_each():
    experiment = made([pairs_of(GOOD)], metric="eval_rewards/margins", **hyperparameters(beta=0.5))
    found = interval(experiment, experiment.results[1], "eval_rewards/margins")
    assert (found.value, found.count) == (pytest.approx(0.5 * GOOD.mean()), 200)
    assert " --beta 0.5 " in compare_command(experiment)
    assert " --beta 0.1 " in compare_command(made([pairs_of(GOOD)], **hyperparameters()))
    assert loss_of({"dpo_loss": "ipo", "training_args": None}) == ["ipo"]
    assert loss_of({"dpo_loss": ["sft", "ipo"]}) == ["sft", "ipo"]
    assert loss_of({"training_args": {"loss_type": "ipo"}}) == ["ipo"]
    assert loss_of({}) == ["sigmoid"]


def test_the_next_trial_is_behind_by_what_its_interval_is_of():
    """The best trial's own pairs are harder than those that both hold out."""
    rows = [f"pairs row {i}" for i in range(200)]
    best = pairs_of([8.0] * 100 + [4.0] * 100, rows=rows)
    experiment = made([best, pairs_of(np.full(100, 5.0), rows=rows[:100])], metric="eval_rewards/margins")
    (said, *_) = Page(experiment).sureness()
    assert "with 0.5000: 0.3 behind (all 100 alike, over the same 100 held-out pairs)." in said


def test_the_terminal_says_it_too():
    lines = list(winner(Verdict(made([pairs_of(GOOD), pairs_of(BAD)]))))
    assert lines[0] == "Trial 1 is best; trial 2 is worse (95%)."
    assert lines[-1] == "Best: trial 1, checkpoint 00000000-0000-0000-0000-000000000001"
    assert len(list(winner(Verdict(made([pairs_of(GOOD)]))))) == 1
    assert list(winner(Verdict(made([None], metrics={1: {LOSS: float("nan")}})))) == []


# Seeds.


def seeds(means, scatter, count=3):
    """Settings of these mean h, each trained with `count` seeds whose h scatter."""
    offsets = scatter * np.linspace(-1, 1, count)
    trials = [pairs_of(h(mean + offset, 7 * i + j)) for i, mean in enumerate(means) for j, offset in enumerate(offsets)]
    betas = [0.1 / 2**i for i in range(len(means))]
    return made(trials, axis={"dpo_beta": betas, "training_args.seed": list(range(count))})


def said_of(experiment):
    return settings_verdict(experiment, rank_settings(experiment), "{:.4g}".format)


def test_settings_are_compared_by_their_mean_over_seeds():
    best, rest = said_of(seeds([4, 2, 0], scatter=0.05))
    assert best.startswith("The best setting is dpo_beta 0.1: 0.5")
    assert best.endswith(" (over 3 seeds, mean ± standard deviation).")
    assert rest == "The other 2 are worse (95%, other seeds too)."


def test_seeds_that_scatter_leave_settings_alike_that_their_models_alone_would_tell_apart():
    experiment = seeds([4, 3], scatter=3)
    assert said_of(experiment)[1] == "The other setting cannot be told apart from it (95%, other seeds too)."
    gaps = compare_settings(experiment, settings_of(experiment))
    assert gaps[1].low < 0 < gaps[1].high
    assert said_of(seeds([4, 3], scatter=0.01))[1] == "The other setting is worse (95%, other seeds too)."


@pytest.mark.parametrize("pairs", [3, 5])
def test_pairs_too_few_for_trials_are_too_few_for_settings(pairs):
    """All differ alike, and the seeds hardly scatter; but so few pairs may be chance."""
    trials = [pairs_of(np.full(pairs, mean) + 0.01 * np.arange(pairs)) for mean in (4, 4.01, 2, 2.01)]
    experiment = made(trials, axis={"dpo_beta": [0.1, 0.05], "training_args.seed": [1, 2]})
    assert Verdict(experiment).worse == []
    gaps = compare_settings(experiment, settings_of(experiment))
    assert gaps[1].low <= 0 < gaps[1].value < gaps[1].high
    assert said_of(experiment)[1] == "The other setting cannot be told apart from it (95%, other seeds too)."


def test_settings_that_are_alike_are_rarely_called_worse():
    """Their seeds scatter: the pairs alone would often tell their models apart."""
    rng = np.random.default_rng(0)
    alarms = naive = 0
    for _ in range(40):
        trials = [pairs_of(1 + end + rng.normal(size=60)) for end in rng.normal(size=6)]
        experiment = made(trials, axis={"dpo_beta": [0.1, 0.05, 0.01], "training_args.seed": [1, 2]})
        alarms += len(rank_settings(experiment)[1]) < 2
        naive += bool(Verdict(experiment).worse)
    assert alarms <= 4  # 2 are expected
    assert naive >= 25


def test_some_settings_alike():
    experiment = seeds([4, 3.95, 0], scatter=0.05)
    ranked, alike = rank_settings(experiment)
    assert [setting.values for setting in ranked] == [("0.1",), ("0.05",), ("0.025",)]
    assert [setting.values for setting in alike] == [("0.05",)]
    expected = "(dpo_beta 0.05) cannot be told apart from it; the other is worse (95%, other seeds too)."
    assert said_of(experiment)[1] == expected


def test_one_setting_or_one_seed_has_nothing_to_compare():
    (only,) = said_of(made([pairs_of(GOOD), pairs_of(BAD)], axis="training_args.seed", values=[1, 2]))
    assert only.startswith("The searcher's metric is 0.5")
    experiment = seeds([4, 2], scatter=0.05)
    for trial_id in (2, 3, 5, 6):  # still running
        experiment.results[trial_id]["state"] = "UNFINISHED"
    assert said_of(experiment)[1].startswith("Settings are not compared")
    assert said_of(made([pairs_of(GOOD), pairs_of(BAD)])) == []  # no seed varies
    assert said_of(made([pairs_of(GOOD), pairs_of(BAD)], axis="training_args.data_seed", values=[1, 2])) == []


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ([0.85, 0.9, 0.875], "0.88 ± 0.03"),
        ([0.8, 0.9, 1.0], "0.90 ± 0.10"),
        ([0.5, 0.5], "0.500 ± 0.000"),
        ([10, 40, 70], "40 ± 30"),
    ],
)
def test_a_mean_has_the_digits_that_its_spread_leaves(scores, text):
    assert format_mean(scores, str) == text


def test_trials_that_were_stopped_early_are_not_compared():
    """Their figures are of shorter trainings: that they are lower says nothing of their settings."""
    searcher = {"name": "adaptive_asha", "max_trials": 4, "time_metric": "epochs", "max_time": 2}
    experiment = made([pairs_of(of) for of in (GOOD, BAD, WORST, h(1, 5))], searcher=searcher)
    for trial_id, epochs in ((1, 2), (2, 2), (3, 0.5), (4, 1.99)):
        experiment.results[trial_id]["metrics"]["epochs"] = epochs
    verdict = Verdict(experiment)
    assert verdict.headline(so_far=False) == "Trial 1 is best; trial 2 is worse (95%)"
    assert (verdict.stopped, verdict.uncompared, list(verdict.behind)) == ([4, 3], [], [2])
    assert verdict.remarks() == ["Not compared: trials 4 and 3, stopped early by the search after less training."]
    assert Page(experiment).against_best(experiment.results[3]) == ("stopped early", "")
    experiment.results[1]["metrics"]["epochs"] = 1.0
    verdict = Verdict(experiment)
    assert verdict.best is experiment.results[1]  # as a cluster chooses the checkpoint of exp:N
    assert (
        "The best one was itself stopped early: trained to the end, it could be better or worse." in verdict.remarks()
    )
