"""Searches beside the grid: what `random` draws, and which trials `adaptive_asha` and `async_halving` stop early.

They follow the master of Determined 0.38.1 (determined/master/pkg/searcher: hyperparameters.go, random.go,
adaptive_asha.go, asha_stopping.go, tournament.go). The early stopping is ASHA's (Li et al., A System for Massively
Parallel Hyperparameter Tuning, arXiv:1810.05934), but a trial that is not among the best is stopped at a rung, where
the paper would keep it waiting for promotion.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from pydantic import Field, PositiveFloat, create_model

from config.validation import FORBID_UNKNOWN, Count, KeyPath, validate
from errors import UserError, nearest

HALVING = ("adaptive_asha", "async_halving")
DRAWING = ("random", *HALVING)
DIVISOR = 4  # the master's default
DEFAULT_SEED = 0  # of the draws, where there is no reproducibility.experiment_seed; the master would take the time
# The keys of each type of hyperparameter that a search varies, beside `type`.
WHOLE = Annotated[int, Field(ge=-(2**62), lt=2**62)]  # so that a range has less than 2**63 of them
RANGE = create_model("Range", __config__=FORBID_UNKNOWN, minval=float, maxval=float, count=(Count | None, None))
SPACES = {
    "const": create_model("Const", __config__=FORBID_UNKNOWN, val=Any),
    "categorical": create_model("Categorical", __config__=FORBID_UNKNOWN, vals=Annotated[list, Field(min_length=1)]),
    "int": create_model("Int", __base__=RANGE, minval=WHOLE, maxval=WHOLE),
    "double": RANGE,
    "log": create_model("Log", __base__=RANGE, base=PositiveFloat),
}


class Space(NamedTuple):
    """A hyperparameter that has a `type`, and its other keys, checked."""

    kind: str
    keys: Any


def check_space(given: dict[str, Any], key: str) -> Space:
    """Return the hyperparameter `given` under `key`. Raises `UserError` for what the master refuses or fails on."""
    if "type" not in given:
        raise UserError(f"{key}.type is missing: it is one of {', '.join(SPACES)}")
    kind = str(given["type"])
    if kind not in SPACES:
        raise UserError(f"{key}.type {kind!r} is not one of {', '.join(SPACES)}{nearest(kind, SPACES)}")
    others = {name: value for name, value in given.items() if name != "type"}
    keys: Any = validate(SPACES[kind], others, key, noun=f"a key of a {kind} hyperparameter")
    if kind not in ("const", "categorical") and keys.minval >= keys.maxval:
        raise UserError(f"{key}.minval {keys.minval:g} is not less than maxval {keys.maxval:g}")
    return Space(kind, keys)


def draw(spaces: Mapping[KeyPath, Space], count: int, seed: int) -> Iterator[dict[KeyPath, Any]]:
    """Yield the values of `count` trials, drawn independently: those that a master draws with the same seed.

    Go's math.Pow may differ in a last digit. And where two hyperparameters of one nested level are drawn, the master
    takes them in an order that is chance, so with the same seed it may draw others.
    """
    import numpy as np  # a tenth of a second: only for a search

    random = np.random.RandomState(seed)  # the master's generator is NumPy's old one, seeded alike
    for _ in range(count):
        yield {path: _draw_one(space, random) for path, space in spaces.items()}
        random.randint(0, 2**32, 5, np.uint32)  # of which the master makes the trial's request id and seed


def _draw_one(space: Space, random: Any) -> Any:
    kind, keys = space
    if kind == "const":
        return keys.val
    if kind == "categorical":
        return keys.vals[random.randint(len(keys.vals))]
    if kind == "int":
        return int(keys.minval + random.randint(keys.maxval - keys.minval + 1))
    value = float(keys.minval + (keys.maxval - keys.minval) * random.random_sample())
    return keys.base**value if kind == "log" else value


def check_training_length(searcher: dict[str, Any], args: Any) -> None:
    """Raise `UserError` unless the searcher measures a training with the arguments `args` as the training does.

    Determined's callback for the Trainer compares them, and raises ValueError in each trial.
    """
    by_steps = args.max_steps > -1
    unit, length = ("batches", args.max_steps) if by_steps else ("epochs", args.num_train_epochs)
    key = f"hyperparameters.training_args.{'max_steps' if by_steps else 'num_train_epochs'}"
    if (given := searcher.get("max_length")) is not None and given != {unit: length}:
        raise UserError(f"searcher.max_length is deprecated: leave it out; {key} says how long a trial trains")
    if searcher.get("name") not in HALVING:
        return
    time_metric, max_time = searcher["time_metric"], searcher["max_time"]
    if (time_metric, max_time) != (unit, length):
        right = f"time_metric: {unit} and max_time: {length:g}"
        if time_metric == unit:
            right = f"max_time: {length:g}, or {key.rpartition('.')[2]}: {max_time}"
        if not float(length).is_integer():
            right = "max_steps, with time_metric: batches and max_time the same, as max_time is a whole number"
        given = f"searcher.time_metric {time_metric!r} with max_time {max_time}"
        raise UserError(f"{given} does not fit {key} {length:g}, the length of a training: set {right}")


@dataclass
class Bracket:
    """Trials that are compared with each other, at the same rungs."""

    rungs: list[int]  # in units of time_metric: where a trial is compared, the last at its end
    trials: int  # in all
    initial: int  # of them at the start; each one that ends makes room for another
    scores: list[dict[int, float]] = field(init=False)  # at each rung, by trial id; smaller is better

    def __post_init__(self) -> None:
        self.scores = [{} for _ in self.rungs]


def make_brackets(searcher: dict[str, Any]) -> list[Bracket]:
    """Return the brackets of a search, those that stop more trials first."""
    given: dict[str, Any] = {"divisor": DIVISOR, "max_rungs": 5, "max_concurrent_trials": 16}  # the master's defaults
    given |= {key: value for key, value in searcher.items() if value is not None}
    divisor, trials, most = given["divisor"], given["max_trials"], given["max_concurrent_trials"]
    if given["name"] == "async_halving":
        counts, shares = [given["num_rungs"]], [trials]
        initial = [most or max(1, int(divisor ** (counts[0] - 1)))]
    else:
        counts = sorted(given.get("bracket_rungs") or _count_rungs(given), reverse=True)
        shares = _share_trials(trials, divisor, counts)
        each, rest = divmod(max(most, len(counts)), len(counts))
        initial = [each + (number < rest) for number in range(len(counts))]
        if not most:
            initial = [max(shares[-1], int(divisor))] * len(counts)
    brackets = []
    for count, share, at_first in zip(counts, shares, initial, strict=True):
        rungs = [max(1, int(given["max_time"] / divisor ** (count - 1 - rung))) for rung in range(count)]
        brackets.append(Bracket(rungs, share, min(at_first, share)))
    return brackets


def _count_rungs(given: dict[str, Any]) -> list[int]:
    """How many rungs each bracket has: as many as leave a trial for the last one, and fewer, as `mode` says."""
    reachable = (
        int(math.log(size) / math.log(given["divisor"])) + 1 for size in (given["max_time"], given["max_trials"])
    )
    most = min(given["max_rungs"], *reachable)
    fewest = {"aggressive": most, "standard": (most - 1) // 2 + 1, "conservative": 1}[given.get("mode", "standard")]
    return list(range(fewest, most + 1))


def _share_trials(trials: int, divisor: float, counts: list[int]) -> list[int]:
    """How many trials each bracket gets, for about the same training in each; what is left over goes to the first."""
    weights = [divisor ** (count - 1) / count for count in counts]
    shares = [max(1, int(weight / sum(weights) * trials)) for weight in weights]
    shares[0] += max(0, trials - sum(shares))
    return shares


class Halving:
    """Which trials of an `adaptive_asha` or `async_halving` search exist by now, and which of them are stopped.

    It depends only on what it was told, in that order. Trials have numbers from 1, in the order of their creation.
    """

    def __init__(self, searcher: dict[str, Any]) -> None:
        self.divisor: float = searcher.get("divisor") or DIVISOR
        self.sign = -1 if searcher.get("smaller_is_better") is False else 1
        self.brackets = make_brackets(searcher)
        self.bracket_of = [bracket for bracket in self.brackets for _ in range(bracket.initial)]  # by trial id - 1
        self.stopped, self.ended = set[int](), set[int]()
        self.passed: dict[int, int] = {}  # how many rungs, by trial id

    def report(self, trial_id: int, time: float, metric: float) -> bool:
        """Take in an evaluation: the metric of a trial after `time`, in units of time_metric. Return if it is stopped.

        At each rung that it has reached since its last evaluation, a trial goes on if it is among the best
        1/divisor of those that got there so far, itself included: at least one, so the first always does. Of equals
        the later one is taken for better. A metric that is not a number is never among them. (A master ends the whole
        experiment then.) What a stopped trial reports does not count.
        """
        bracket = self._bracket(trial_id)
        while trial_id not in self.stopped and (rung := self.passed.get(trial_id, 0)) < len(bracket.rungs):
            if int(time) < bracket.rungs[rung]:
                break
            score = math.inf if math.isnan(metric) else self.sign * metric
            scores = bracket.scores[rung]
            scores[trial_id] = score
            better = sum(other < score for other in scores.values())
            self.passed[trial_id] = rung + 1
            if rung == len(bracket.rungs) - 1:
                self.end(trial_id)  # by itself
            elif better >= max(1, int(len(scores) / self.divisor)) or math.isnan(metric):
                self.stopped.add(trial_id)
                self.end(trial_id)
        return trial_id in self.stopped

    def end(self, trial_id: int, failed: bool = False) -> None:
        """Take in that a trial has ended, which makes room for another. One that failed was the worst at its rung."""
        bracket = self._bracket(trial_id)
        if failed and (rung := self.passed.get(trial_id, 0)) < len(bracket.rungs):
            bracket.scores[rung][trial_id] = math.inf  # until it reports there, if it is tried again
        if trial_id not in self.ended and self._has_room(bracket):
            self.bracket_of.append(bracket)
        self.ended.add(trial_id)

    def _bracket(self, trial_id: int) -> Bracket:
        while len(self.bracket_of) < trial_id:  # a power cut has taken what made room for it
            self.bracket_of.append(next(filter(self._has_room, self.brackets)))
        return self.bracket_of[trial_id - 1]

    def _has_room(self, bracket: Bracket) -> bool:
        return sum(of is bracket for of in self.bracket_of) < bracket.trials


def count_trials(searcher: dict[str, Any]) -> int:
    """Return how many trials a drawing search has, at most. (A bracket has at least one.)"""
    if searcher["name"] in HALVING:
        return sum(bracket.trials for bracket in make_brackets(searcher))
    return searcher["max_trials"]


def describe_search(config: dict[str, Any]) -> list[str]:
    """Return sentences on where the values of a drawing search come from and which trials it stops; none for others."""
    searcher = config["searcher"]
    if searcher.get("name") not in DRAWING:
        return []
    seed = (config.get("reproducibility") or {}).get("experiment_seed")
    which = f"{DEFAULT_SEED}, the default here" if seed is None else str(seed)
    said = [f"Their values are drawn (reproducibility.experiment_seed: {which})."]
    if searcher["name"] in HALVING:
        brackets, best = make_brackets(searcher), f"the best 1/{searcher.get('divisor') or DIVISOR:g} there"
        for bracket in brackets:
            *rungs, last = (str(rung) for rung in bracket.rungs)
            many = f"{bracket.trials} of them" if len(brackets) > 1 else "They"
            end, at = f"{last} {searcher['time_metric']}", " or ".join(rungs)
            where = f"are stopped at their first evaluation from {at} of {end} on, unless they are among {best}"
            said.append(f"{many} {where if rungs else f'all train to the end, {end}'}.")
    return said
