"""Say in words which model agrees better with people, and what length has to do with it.

A sentence rests on a 95% interval over the pairs that all models score, and says so if that decides nothing.
"""

from typing import NamedTuple

import numpy as np

from comparison.preference_metrics import PairScore, agrees, prompted_alike, reward_margins
from metrics.evaluations import of_like_length
from metrics.intervals import Estimate, estimate, paired_difference
from pages.terminal import plural


class Difference(NamedTuple):
    """How much more often `model` prefers what people chose than `against` does: a difference of two shares."""

    model: str
    against: str
    by_token: Estimate  # preferred by the mean log-prob per token
    by_sum: Estimate


class Verdicts(NamedTuple):
    """What the pairs say: sentences to read first of all, and the figures that they are made from."""

    lines: list[str]
    differences: list[Difference]
    chosen_is_longer: Estimate | None  # of the pairs whose answers differ in length


def judge(scores: dict[str, list[PairScore]], reference: str, characters: np.ndarray) -> Verdicts:
    """Compare models by their scores of the same pairs; the better one by token is named first, or the later of equals.

    `characters`, of shape (pairs, 2), are the lengths of the chosen and the rejected answers: the same for all models.
    """
    if not len(characters):
        return Verdicts([], [], None)
    accuracies = {name: float(agrees(scores[name], by_token=True).mean()) for name in scores}
    names = sorted(reversed(scores), key=lambda name: -accuracies[name])
    lines, differences = [], []
    for position, name in enumerate(names):
        for other in names[position + 1 :]:
            differences.append(_difference(name, other, scores))
            lines.append(difference_verdict(differences[-1], accuracies[name], accuracies[other]))
    for name in names:
        if name != reference and prompted_alike(scores[name], scores[reference]):
            lines.append(reward_verdict(name, reference, reward_margins(scores[name], scores[reference], beta=1)))
    chosen, rejected = characters.T
    longer = (chosen > rejected)[chosen != rejected]
    if len(longer):
        alike = of_like_length(characters)
        right = {name: agrees(scores[name], by_token=True)[alike] for name in names}
        lines.append(length_verdict(longer, right))
    return Verdicts(lines, differences, estimate(longer))


def _difference(name: str, other: str, scores: dict[str, list[PairScore]]) -> Difference:
    by_token, by_sum = (
        paired_difference(agrees(scores[name], by_token), agrees(scores[other], by_token)) for by_token in (True, False)
    )
    assert by_token is not None  # there are pairs
    assert by_sum is not None
    return Difference(name, other, by_token, by_sum)


def difference_verdict(of: Difference, accuracy: float, other: float) -> str:
    """Return a difference as a sentence, with the `accuracy` by token of its model and that of the `other`.

    Accuracy by token decides. Every token makes an answer less likely, so by sums the shorter answer is nearly always
    preferred, whatever it says: where people chose the longer one in two pairs of three, a model that knows nothing is
    right in one of three. The mean per token has no such slope. It favours long answers a little, as later tokens are
    easier to predict; the last sentence of `judge` shows pairs of like length, where neither matters. (DPO's loss is of
    sums, but relative to a reference, which takes most of the length out: see `reward_verdict`.) If sums decide and do
    not say the same, the sentence adds it. A base model without a chat template can be judged too: each model only
    orders two answers, in its own format.
    """
    first, second, *difference = _percent(accuracy, other, *of.by_token[:3])
    text = f"{of.model} prefers what people chose in {first}% of {plural(of.by_token.count, 'pair')}, {of.against} in"
    outcome = _winner(of, of.by_token)
    text += f" {second}%: {_points(*difference)}, {outcome}." if any(of.by_token[:3]) else f" {second}%: no difference."
    if of.by_sum.decides and _winner(of, of.by_sum) != outcome:
        points = _points(*_percent(*of.by_sum[:3]))
        text += f" But by sums of log-probs, which favour short answers, {_winner(of, of.by_sum)}: {points}."
    return text


def reward_verdict(name: str, reference: str, margins: np.ndarray) -> str:
    """Return in words whether a model's rewards agree with people more often than chance, which does in 50% of pairs.

    `margins`, (pairs,), are of two models that are prompted alike. If they are not, as SFT and a base model without a
    chat template, then a reward compares the log-probs of other tokens, and shows nothing.
    """
    if not margins.any():
        return f"{name} gives all answers the probability that {reference} gives them: they are alike."
    what = f"{name}'s rewards against {reference} are higher for what people chose"
    return f"{what} {_against_chance(margins > 0)}."


def length_verdict(longer: np.ndarray, right: dict[str, np.ndarray]) -> str:
    """Return in words whether people chose the longer answer, and how often models are `right` at like length.

    `longer`, (pairs,), is of the pairs whose answers differ in length.
    """
    text = f"Counted in characters, people chose the longer answer {_against_chance(longer)}."
    count = len(next(iter(right.values())))
    if not count:
        return f"{text} No two answers are of like length."
    shares = ", ".join(f"by {name} in {_percent(float(pairs.mean()))[0]}%" for name, pairs in right.items())
    return f"{text} Of {plural(count, 'pair')} of like length, what they chose is preferred {shares}."


def _against_chance(found: np.ndarray) -> str:
    """Return in how many pairs something was `found`, (pairs,), and whether that is more often than by chance."""
    share, above = estimate(found), paired_difference(found, np.full(len(found), 0.5))
    assert share is not None  # there are pairs
    assert above is not None
    value, low, high = _percent(*share[:3])
    pairs = plural(share.count, "pair")
    text = f"in {value}% of {pairs} ({low} to {high}%)" if share.low < share.high else f"in {value}% of {pairs}"
    more = "more" if above.value > 0 else "less"
    return f"{text}, {more} often than by chance" if above.decides else f"{text}, which may be chance"


def _winner(of: Difference, by: Estimate) -> str:
    return f"{of.model if by.value > 0 else of.against} is better" if by.decides else "too close to call"


def _percent(*shares: float) -> list[str]:
    """Return shares in percent, whole ones if no share that is not 0 then reads as 0, else with a decimal.

    Five are two shares, their difference and its interval: the decimal also comes if whole ones would not add up.
    """
    for digits in (0, 1):
        shown = [round(100 * share, digits) + 0.0 for share in shares]  # + 0.0: not -0
        adds_up = len(shares) < 5 or abs(shown[0] - shown[1] - shown[2]) < 0.01
        if adds_up and all(map(bool, (at for at, share in zip(shown, shares, strict=True) if share))):
            break
    return [f"{at:.{digits}f}" for at in shown]


def _points(value: str, low: str, high: str) -> str:
    sign = "+" if float(value) > 0 else ""
    return f"{sign}{value} {'point' if value in ('1', '-1') else 'points'} ({low} to {high})"
