"""What the comparison says in words: by hand, of scores made up for it."""

import numpy as np
import pytest

from comparison.preference_metrics import PairScore
from comparison.verdicts import Difference, difference_verdict, judge
from metrics.intervals import Estimate

PAIRS = 100


def scores(right: int, by_sum: int | None = None, prompt_tokens: int = 5) -> list[PairScore]:
    """A model that prefers the chosen answer in the first `right` pairs by token, in the first `by_sum` by the sum.

    The chosen answer has 10 tokens and the rejected one 5.
    """
    by_sum = right if by_sum is None else by_sum
    made = []
    for pair in range(PAIRS):
        chosen = {(True, True): -4.0, (True, False): -9.0, (False, False): -12.0}[pair < right, pair < by_sum]
        made.append(PairScore(chosen, -5.0, 10, 5, -1.0, 1, False, prompt_tokens))
    return made


def said(models: dict[str, list[PairScore]], reference: str = "sft", characters=(40, 20)) -> list[str]:
    return judge(models, reference, np.array([characters] * PAIRS)).lines


def test_the_better_model_is_named_with_the_difference_and_its_interval():
    found = judge({"base": scores(50), "sft": scores(55), "dpo": scores(70)}, "sft", np.array([[40, 20]] * PAIRS))
    assert [(of.model, of.against) for of in found.differences] == [("dpo", "sft"), ("dpo", "base"), ("sft", "base")]
    low, high = (round(100 * bound) for bound in found.differences[0].by_token[1:3])
    assert 5 < low < 10
    assert 20 < high < 25
    start = "dpo prefers what people chose in 70% of 100 pairs, sft in 55%"
    assert found.lines[0] == f"{start}: +15 points ({low} to {high}), dpo is better."
    assert found.lines[2] == (  # five pairs more, and none less, may be chance
        "sft prefers what people chose in 55% of 100 pairs, base in 50%: +5 points (0 to 10), too close to call."
    )
    worse = said({"sft": scores(70), "dpo": scores(55)})[0]
    assert worse == (
        f"sft prefers what people chose in 70% of 100 pairs, dpo in 55%: +15 points ({low} to {high}), sft is better."
    )


def test_the_same_preferences_are_no_difference():
    line = said({"sft": scores(55), "dpo": scores(55)})[0]
    assert line == "dpo prefers what people chose in 55% of 100 pairs, sft in 55%: no difference."


def test_sums_that_contradict_are_told():
    line = said({"sft": scores(60, by_sum=50), "dpo": scores(80, by_sum=20)})[0]
    assert "+20 points" in line
    assert ", dpo is better. But by sums of log-probs, which favour short answers, sft is better: -30 points (" in line
    unclear = said({"sft": scores(60, by_sum=50), "dpo": scores(61, by_sum=20)})[0]
    assert ", too close to call. But by sums of log-probs, which favour short answers, sft is better: " in unclear
    assert "But" not in said({"sft": scores(60, by_sum=20), "dpo": scores(80, by_sum=50)})[0]


@pytest.mark.parametrize(
    ("accuracies", "difference", "shown"),
    [
        ((0.574, 0.556), (0.018, -0.04, 0.08), "57.4% of 190 pairs, sft in 55.6%: +1.8 points (-4.0 to 8.0), too"),
        ((0.57, 0.55), (0.02, 0.004, 0.036), "57.0% of 190 pairs, sft in 55.0%: +2.0 points (0.4 to 3.6), dpo is"),
        ((0.56, 0.55), (0.01, 0.0, 0.02), "56% of 190 pairs, sft in 55%: +1 point (0 to 2), too"),
        ((0.55, 0.55), (0.0, -0.05, 0.05), "55% of 190 pairs, sft in 55%: 0 points (-5 to 5), too"),
    ],
)
def test_figures_add_up_as_shown_and_none_reads_as_0(accuracies, difference, shown):
    of = Difference("dpo", "sft", Estimate(*difference, 190), Estimate(0, 0, 0, 190))
    assert shown in difference_verdict(of, *accuracies)


def test_rewards_are_judged_where_two_models_are_prompted_alike():
    def rewards(right):
        moved = scores(60)
        for pair in range(PAIRS):
            moved[pair] = moved[pair]._replace(chosen=moved[pair].chosen + (1 if pair < right else -1))
        return [
            line for line in said({"base": scores(50, None, 4), "sft": scores(60), "dpo": moved}) if "reward" in line
        ]

    (line,) = rewards(80)  # and none of the base model, whose prompts have another length
    assert line.startswith("dpo's rewards against sft are higher for what people chose in 80% of 100 pairs (7")
    assert line.endswith("%), more often than by chance.")
    assert rewards(55)[0].endswith("%), which may be chance.")
    assert rewards(20)[0].endswith("%), less often than by chance.")
    same = "dpo gives all answers the probability that sft gives them: they are alike."
    assert said({"sft": scores(60), "dpo": scores(60)})[1] == same


def test_length_is_told_beside_it():
    models = {"sft": scores(55), "dpo": scores(70)}
    longer = "Counted in characters, people chose the longer answer in 100% of 100 pairs, more often than by chance."
    assert said(models)[-1] == f"{longer} No two answers are of like length."
    characters = np.array([(20, 40)] * 30 + [(40, 31)] * 50 + [(40, 40)] * 20)  # of like length: the last 70
    line = judge(models, "sft", characters).lines[-1]
    assert line.startswith("Counted in characters, people chose the longer answer in 62% of 80 pairs (5")
    liked = "what they chose is preferred by dpo in 57%, by sft in 36%."
    assert line.endswith(f"%), more often than by chance. Of 70 pairs of like length, {liked}")  # 20 are as long
    assert "longer" not in " ".join(said(models, characters=(40, 40)))
    few = judge({"dpo": scores(70)[:3]}, "dpo", np.array([(40, 20)] * 3)).lines[-1]
    assert "longer answer in 100% of 3 pairs, which may be chance." in few
    assert judge({"dpo": []}, "dpo", np.zeros((0, 2))) == ([], [], None)
