"""What happened: each sentence on an experiment that it applies to, and on one that it does not."""

import math

import numpy as np
import pytest
from made import ACCURACY, LOSS, made, noise, pairs_of

from experiment.what_happened import UNMOVED, what_happened

MOVED = 4 + 2 * noise(0)


def said(experiment, about):
    """The sentences that hold these words."""
    return [line for line in what_happened(experiment) if about in line]


def one(*, metrics=None, trained=(), config=None, h=MOVED, **kept):
    return made([pairs_of(h, **kept)], metrics={1: metrics or {}}, trained=trained, **(config or {}))


@pytest.mark.parametrize(
    ("chosen", "h", "line"),
    [
        (
            -2,
            MOVED,
            "Trial 1 made both kinds of answers less likely than the reference: chosen ones by 2 nats (0.1 a token),"
            " rejected ones by 6 nats (0.6 a token). In DPO that is normal: what counts is that rejected ones fell"
            " further.",
        ),
        (
            -6,
            -MOVED,
            "Trial 1 made both kinds of answers less likely than the reference: chosen ones by 6 nats (0.3 a token),"
            " rejected ones by 2 nats (0.2 a token).",
        ),
        (
            1,
            MOVED,
            "Trial 1 made chosen answers more likely than the reference and rejected ones less: chosen ones by 1 nats"
            " (0.05 a token), rejected ones by 3 nats (0.3 a token).",
        ),
        (
            -1,
            -MOVED,
            "Trial 1 learned the opposite, chosen answers became less likely and rejected ones more: chosen ones by 1"
            " nats (0.05 a token), rejected ones by 3 nats (0.3 a token).",
        ),
        (
            6,
            MOVED,
            "Trial 1 made both kinds of answers more likely than the reference: chosen ones by 6 nats (0.3 a token),"
            " rejected ones by 2 nats (0.2 a token).",
        ),
    ],
)
def test_how_likely_answers_became(chosen, h, line):
    assert what_happened(one(h=h, chosen=chosen, tokens=(20, 10)))[0] == line


def test_how_likely_answers_became_is_known_from_rewards_too_but_not_without():
    rewards = {LOSS: 0.5, "eval_rewards/chosen": -0.2, "eval_rewards/rejected": -0.6}
    (line,) = said(made([None], metrics={1: rewards}), "both kinds")
    assert "chosen ones by 2 nats, rejected ones by 6 nats." in line
    assert what_happened(made([None], metrics={1: {LOSS: 0.5}})) == []
    assert said(one(h=0.01 * noise(1)), "than the reference") == []  # it did not move


def test_how_far_trials_moved():
    experiment = made([pairs_of(np.full(50, size), chosen=0.0) for size in (8, 2, 4)])
    (line,) = said(experiment, "nats an answer from")
    assert line == (
        "Trial 1 moved 4 nats an answer from the reference, up or down (mean absolute log-ratio);"
        " the others moved by 1 (trial 2) to 2 (trial 3)."
    )
    (line,) = said(made([pairs_of(np.full(50, size), chosen=0.0) for size in (8, 2)]), "nats an answer from")
    assert line.endswith("; trial 2 moved by 1.")
    (line,) = said(one(), "nats an answer from")
    assert line.endswith("(mean absolute log-ratio).")
    assert said(made([None], metrics={1: {LOSS: 0.5}}), "nats an answer from") == []


@pytest.mark.parametrize(
    ("training", "line"),
    [
        ([0.5, 0.6, 1.0, 0.98], "0.99 over the last epoch, on held-out pairs 0.75 (0.69 to 0.81): 0.24 less, which is"),
        (
            [0.5, 1.0],
            "1.00 over the last half of its steps, on held-out pairs 0.75 (0.69 to 0.81): 0.25 less, which is",
        ),
        ([0.5, 0.99, 0.8, 0.8], "0.80 over the last epoch, on held-out pairs 0.75 (0.69 to 0.81): no sign of"),
    ],
)
def test_accuracy_in_training_and_held_out(training, line):
    trained = [{"rewards/accuracies": value} for value in training]  # two epochs, the last of steps 30 and 40
    right = np.where(np.arange(200) < 150, 5.0, -1.0)
    (found,) = said(one(h=right, trained=trained), "In training")
    assert line in found
    assert found.endswith("overfitting.")
    assert said(one(h=right), "In training") == []


@pytest.mark.parametrize(
    ("right", "pairs", "means"),
    [
        (6, 8, "0.15 less, which may be chance."),
        (0, 3, "0.90 less, which may be chance."),  # all three are wrong, which gives an interval no width
        (0, 30, "0.90 less, which is overfitting."),
        (2, 2, "no sign of overfitting."),
    ],
)
def test_few_pairs_do_not_prove_overfitting(right, pairs, means):
    h = np.where(np.arange(pairs) < right, 5.0, -1.0)
    (found,) = said(one(h=h, trained=[{"rewards/accuracies": 0.9}]), "In training")
    assert found.endswith(means)


def test_trials_that_hardly_moved():
    experiment = made([pairs_of(MOVED), pairs_of(0.02 * noise(1)), pairs_of(0.05 * noise(2))])
    assert said(experiment, "hardly moved") == [
        "Trials 2 and 3 hardly moved: a chosen answer's lead changed by 0.016 and 0.04 nats (below 0.1 the odds change"
        " by less than a tenth). The learning_rate (0.001 and 0.01) is too small, or the training too short."
    ]
    assert said(one(), "hardly moved") == []
    (line,) = said(made([None], metrics={1: {LOSS: UNMOVED - 5e-4}}), "hardly moved")
    assert "less than 0.1 nats" in line
    assert said(made([None], metrics={1: {LOSS: UNMOVED - 5e-3}}), "hardly moved") == []


def test_trials_that_diverged():
    experiment = made([pairs_of(MOVED), pairs_of(-MOVED)], trained=[{"loss": 0.7}, {"loss": 0.6}])
    assert said(experiment, "diverged") == [
        "Trial 2 ends at a preference loss of 0.918, more than the 0.693 of a model that did not move: it diverged, or"
        " is sure of wrong pairs. Try a smaller learning_rate."
    ]
    assert said(one(trained=[{"loss": 0.7}]), "diverged") == []
    experiment.events[1][1]["metrics"]["loss"] = math.nan
    line = "Trial 1 diverged: its loss is not finite at step 20. Try a smaller learning_rate."
    assert line in what_happened(experiment)
    nothing = made([None], metrics={1: {LOSS: math.nan}})  # no trial is best
    assert what_happened(nothing) == [line.replace("20", "40")]


@pytest.mark.parametrize(("end", "lines"), [(0.55, 1), (0.505, 0), (0.49, 0)])
def test_a_loss_that_rose_at_the_end(end, lines):
    experiment = one()
    experiment.events[1].append({"kind": "validation", "steps_completed": 30, "metrics": {LOSS: 0.5}})
    experiment.events[1].append({"kind": "validation", "steps_completed": 50, "metrics": {LOSS: end}})
    experiment.events[1][0]["metrics"][LOSS] = 0.51  # at step 40
    found = said(experiment, "ended above")
    assert found == ["Trial 1 ended above the lowest preference loss, by 0.05: trained longer than was good."] * lines


LONGER, LIKE = np.array([30] * 140 + [20] * 60), np.array([20] * 130 + [28] * 10 + [30] * 60)


def test_chosen_answers_that_are_longer():
    right = np.where(np.arange(200) < 137, 4.0, -4.0)
    found = what_happened(one(h=right, tokens=(LONGER, LIKE)))
    assert "The chosen answer is the longer one in 70% of 200 pairs (63% to 77%), 1.15 times as long" in found[2]
    assert found[2].endswith("the data prefers length.")
    assert found[3] == "Against learning length, others divide by it: dpo_loss: sigmoid_norm with a dpo_beta near 5."
    assert (
        "On the 10 pairs of like length (in tokens, within 25%) the best trial's accuracy is not surely better"
        in found[4]
    )
    assert found[4].endswith(", against 0.69 on all.")


@pytest.mark.parametrize(("pairs", "lines"), [(3, 0), (5, 0), (6, 1)])
def test_a_few_pairs_whose_longer_answers_are_chosen_show_nothing(pairs, lines):
    h = np.arange(1.0, pairs + 1)
    start = f"The chosen answer is the longer one in all {pairs} pairs, 1.50 times as long on average: the data prefers"
    assert [line[: len(start)] for line in said(one(h=h, tokens=(30, 20)), "the data prefers")] == [start] * lines
    (line,) = said(one(h=np.ones(8), tokens=(20, 30)), "the data prefers")
    assert line.startswith("The chosen answer is the shorter one in all 8 pairs, 0.67 times")


def test_accuracy_that_holds_on_pairs_of_like_length():
    (line,) = said(one(tokens=(LONGER, LIKE)), "of like length")
    assert "the best trial's accuracy holds: " in line
    assert said(one(tokens=(LONGER, np.where(LIKE == 28, 20, LIKE))), "of like length") == []  # there are none


def test_length_is_only_told_where_the_data_prefers_it():
    assert said(one(tokens=(20, 20)), "the data prefers") == []  # no pair differs
    half = np.where(np.arange(200) % 2, 30, 20)
    assert said(one(tokens=(half, 50 - half)), "the data prefers") == []
    (line,) = said(one(tokens=(LIKE, LONGER)), "the data prefers")
    assert "is the shorter one in 70% of 200 pairs (63% to 77%), 0.87 times" in line
    assert said(one(tokens=(LIKE, LONGER)), "sigmoid_norm") == []
    for config in ({"dpo_loss": ["sigmoid_norm"]}, {"training_args": {"loss_type": "sigmoid_norm"}}):
        config = {"hyperparameters": {"training_args": {}} | config}
        assert said(one(tokens=(LONGER, LIKE), config=config), "sigmoid_norm") == []


def test_what_limits_cut():
    line = "train: 3 rows (1.2%) cut: answer longer than max_target_length"
    assert said(one(truncations=[line]), "cut") == [line]
    assert said(one(), "cut") == []


# SFT.


def sft(losses, trained=(), truncations=()):
    """One trial, with a held-out loss at steps 40, 80, ..."""
    kept = pairs_of([])
    kept.truncations, kept.steps = list(truncations), {}
    experiment = made(
        [None], metric="eval_loss", metrics={1: {"eval_loss": losses[0]}}, entrypoint="python sft_finetune.py",
        trained=trained,
    )  # fmt: skip
    experiment.evaluations[1] = kept
    for step, loss in enumerate(losses[1:], start=2):
        event = {"kind": "validation", "steps_completed": 40 * step, "metrics": {"eval_loss": loss}}
        experiment.events[1].append(event)
    return experiment


def test_the_held_out_loss_of_sft():
    first, lowest = what_happened(sft([2.0, 1.5, 1.0]))
    assert first == "The held-out loss went from 2.000 at step 40 to 1.000 at step 120: \N{MINUS SIGN}50.0%."
    assert lowest == "It was lowest at the last evaluation: more steps may lower it further."
    first, lowest = what_happened(sft([2.0, 1.5, 2.5]))
    assert first.endswith(": +25.0%.")
    assert lowest == "It was lowest at step 80, with 1.500: what came later did not help."
    assert what_happened(sft([2.0])) == []  # a single evaluation


@pytest.mark.parametrize(("loss", "means"), [(1.0, "a gap this large is overfitting"), (1.9, "no sign of overfitting")])
def test_the_loss_of_sft_in_training_and_held_out(loss, means):
    trained = [{"loss": 3.0}, {"loss": 2.5}, {"loss": loss}, {"loss": loss}]
    expected = f"In training the loss was {loss:.3f} over the last epoch, on held-out rows 2.000: {means}."
    assert what_happened(sft([2.0], trained=trained)) == [expected]
    (found,) = what_happened(sft([2.0], trained=trained[1:]))
    assert f"{loss:.3f} over the last half of its steps, " in found


def test_what_limits_cut_of_sft_and_nothing_of_dpo():
    line = "train: 3 rows (1.2%) cut: longer than max_seq_length"
    assert what_happened(sft([2.0], truncations=[line])) == [line]
    assert what_happened(sft([2.0])) == []


def test_no_metric_of_another_script_is_taken_for_dpos():
    assert (
        what_happened(made([None], metric=ACCURACY, metrics={1: {ACCURACY: 0.5}}, entrypoint="python other.py")) == []
    )
