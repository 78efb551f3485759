"""What searches draw, and the rules by which trials are stopped early: those of Determined's master, release 0.38.1."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO

from config.experiment import expand_trials, read_experiment_config
from config.experiment_keys import check_experiment
from config.search import Halving, check_training_length, count_trials, describe_search, make_brackets
from errors import UserError

RATE = {"type": "log", "base": 10, "minval": -4, "maxval": -2}


def random_search(trials=3, seed=None, **hyperparameters):
    given = {} if seed is None else {"reproducibility": {"experiment_seed": seed}}
    return {"searcher": {"name": "random", "max_trials": trials}, "hyperparameters": hyperparameters, **given}


def asha(**keys):
    given = {"name": "adaptive_asha", "metric": "loss", "max_trials": 16, "time_metric": "batches", "max_time": 64}
    return given | keys


def test_draws_are_those_of_the_master():
    """Its generator gives words of 32 bits: two for a number, and five for a trial's request id and seed."""
    words = np.random.RandomState(7).randint(0, 2**32, 18, np.uint32).astype(int)
    numbers = [((words[i] >> 5) * 2**26 + (words[i + 1] >> 6)) / 2**53 for i in (0, 2, 9, 11)]
    config = random_search(
        2, 7, b={"type": "double", "minval": -1, "maxval": 3}, args={"z": "const", "lr": RATE}, c=[1]
    )
    trials = expand_trials(config)
    assert [trial["args"]["lr"] for trial in trials] == [10 ** (-4 + 2 * numbers[i]) for i in (0, 2)]
    assert [trial["b"] for trial in trials] == [-1 + 4 * numbers[i] for i in (1, 3)]
    assert all((trial["args"]["z"], trial["c"]) == ("const", [1]) for trial in trials)


def test_draws_fill_their_ranges_evenly():
    axes = {
        "i": {"type": "int", "minval": 3, "maxval": 6},
        "c": {"type": "categorical", "vals": ["x", "y"]},
        "lr": RATE,
    }
    trials = expand_trials(random_search(1000, 0, **axes, k={"type": "const", "val": 5}))
    assert {trial["i"] for trial in trials} == {3, 4, 5, 6}
    assert all(type(trial["i"]) is int and trial["k"] == 5 for trial in trials)
    assert 450 < sum(trial["c"] == "x" for trial in trials) < 550
    assert 450 < sum(trial["lr"] < 1e-3 for trial in trials) < 550
    assert all(1e-4 <= trial["lr"] < 1e-2 for trial in trials)


def test_draws_are_repeatable_and_go_on_alike():
    three, five = (expand_trials(random_search(count, lr=RATE)) for count in (3, 5))
    assert five[:3] == three == expand_trials(random_search(3, 0, lr=RATE))
    assert expand_trials(random_search(3, 1, lr=RATE)) != three


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (random_search(a=RATE | {"maxval": -4}), "hyperparameters.a.minval -4 is not less than maxval -4"),
        (random_search(a=RATE | {"maxval": 999}), "hyperparameters.a: its values are not 2 different finite numbers"),
        (
            random_search(a={"type": "double", "minval": -1e308, "maxval": 1e308}),
            "hyperparameters.a: its values are not 2 different",
        ),
        (
            random_search(a={"type": "int", "minval": 0, "maxval": 2**62}),
            "a.maxval 4611686018427387904 is not less than",
        ),
        (random_search(1001), "searcher.max_trials 1001 is more than the 1000 that this machine runs"),
    ],
)
def test_what_cannot_be_drawn(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        expand_trials(config)


@pytest.mark.parametrize(
    ("searcher", "message"),
    [
        ({"name": "random"}, "searcher.max_trials is missing"),
        (asha(max_time=None), "searcher.max_time is null"),
        ({"name": "adaptive_asha", "max_trials": 4, "max_time": 9}, "searcher.time_metric is missing"),
        (asha(name="async_halving"), "searcher.num_rungs is missing"),
        (asha(max_time=0), "searcher.max_time 0 is not at least 1"),
        (asha(bracket_rungs=[0]), "searcher.bracket_rungs[0] 0 is not at least 1"),  # a master would crash
    ],
)
def test_what_a_search_needs(searcher, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_experiment({"hyperparameters": {}, "searcher": searcher})


# The brackets of adaptive_asha: (rungs, trials, initial trials) each.


@pytest.mark.parametrize(
    ("keys", "brackets"),
    [
        # As many rungs as log(divisor) of the trials and of the time allow; trials for about the same training in each.
        ({}, [([4, 16, 64], 12, 8), ([16, 64], 4, 4)]),
        ({"max_trials": 10, "max_time": 100, "max_concurrent_trials": 2}, [([25, 100], 7, 1), ([100], 3, 1)]),
        (
            {"mode": "conservative", "max_time": 1000, "divisor": 3.0, "max_concurrent_trials": 5, "max_trials": 10},
            [([111, 333, 1000], 7, 2), ([333, 1000], 2, 2), ([1000], 1, 1)],
        ),
        ({"mode": "aggressive"}, [([4, 16, 64], 16, 16)]),
        ({"mode": "aggressive", "max_rungs": 2}, [([16, 64], 16, 16)]),
        ({"bracket_rungs": [1, 3], "max_concurrent_trials": 3}, [([4, 16, 64], 14, 2), ([64], 2, 1)]),
        ({"max_concurrent_trials": 0, "max_trials": 50}, [([4, 16, 64], 37, 13), ([16, 64], 13, 13)]),
        ({"time_metric": "epochs", "max_time": 2, "divisor": 2, "mode": "aggressive"}, [([1, 2], 16, 16)]),
        ({"time_metric": "epochs", "max_time": 2}, [([2], 16, 16)]),  # of two epochs no quarter is whole
        ({"name": "async_halving", "num_rungs": 4, "max_time": 10, "divisor": 2.0}, [([1, 2, 5, 10], 16, 16)]),
        ({"name": "async_halving", "num_rungs": 3, "max_concurrent_trials": 0, "divisor": 3}, [([7, 21, 64], 16, 9)]),
    ],
)
def test_brackets(keys, brackets):
    assert [(b.rungs, b.trials, b.initial) for b in make_brackets(asha(**keys))] == brackets
    assert count_trials(asha(**keys)) == sum(trials for _, trials, _ in brackets)


# Who is stopped. Rungs are at 16 and 64; the best 1/4 go on.


def halving(**keys):
    return Halving(asha(**{"mode": "aggressive", "max_rungs": 2} | keys))


def test_the_first_at_a_rung_goes_on_and_then_the_best_quarter():
    search = halving()
    losses = [0.5, 0.6, 0.4, 0.7, 0.45, 0.9, 0.8, 0.44, 0.3]
    stopped = [search.report(trial_id, 16, loss) for trial_id, loss in enumerate(losses, start=1)]
    # Of eight trials two may go on: the eighth is second. Who went on before is not called back.
    assert stopped == [False, True, False, True, True, True, True, False, False]


def test_larger_is_better():
    search = halving(smaller_is_better=False)
    assert [search.report(i, 16, value) for i, value in enumerate((0.5, 0.6, 0.4), start=1)] == [False, False, True]


def test_of_equals_the_later_one_is_better():
    search = halving()
    assert not any(search.report(trial_id, 16, 0.5) for trial_id in (1, 2, 3))


def test_only_an_evaluation_at_a_rung_or_beyond_counts():
    search = halving(time_metric="epochs", max_time=2, divisor=2, max_rungs=5)
    assert not search.report(1, 0.99, 0.1)
    assert not search.report(1, 1.2, 0.5)  # the rung of one epoch
    assert not search.report(1, 1.5, 9.0)  # after it, and not yet at the next
    assert search.brackets[0].scores == [{1: 0.5}, {}]
    assert not search.report(2, 2.0, 0.4)  # two rungs at once
    assert search.brackets[0].scores == [{1: 0.5, 2: 0.4}, {2: 0.4}]
    assert search.report(3, 2.0, 0.6)
    assert search.brackets[0].scores[1] == {2: 0.4}


def test_a_metric_that_is_no_number_does_not_go_on():
    search = halving()
    assert search.report(1, 16, math.nan)
    assert not search.report(2, 16, 5.0)


def test_a_trial_that_failed_counts_as_the_worst_at_its_rung():
    search = halving()
    search.report(1, 16, 0.1)
    for trial_id in (2, 3, 4, 5, 6, 7):
        search.end(trial_id, failed=True)
    assert not search.report(8, 16, 0.2)  # second of eight
    assert search.report(2, 16, 0.3)  # it was tried again, and is third
    assert search.brackets[0].scores[0][2] == 0.3


def test_what_a_stopped_trial_reports_does_not_count():
    search = halving()
    search.report(1, 16, 0.1)
    assert search.report(2, 16, 0.2)
    assert search.report(2, 64, 0.0)
    assert search.brackets[0].scores == [{1: 0.1, 2: 0.2}, {}]


def test_each_trial_that_ends_makes_room_for_one_more():
    search = halving(max_concurrent_trials=2, max_trials=4)
    assert len(search.bracket_of) == 2
    search.report(1, 16, 0.1)
    assert len(search.bracket_of) == 2
    search.report(2, 16, 0.2)  # stopped
    assert len(search.bracket_of) == 3
    search.end(2)  # as it was known
    search.report(1, 64, 0.1)  # the last rung: it ends by itself
    assert len(search.bracket_of) == 4
    search.end(3, failed=True)  # there are no more than max_trials
    assert len(search.bracket_of) == 4


# The unit in which a search measures a training.


@pytest.mark.parametrize(
    ("time_metric", "max_time", "steps", "epochs", "message"),
    [
        ("epochs", 2, -1, 2.0, None),
        ("batches", 64, 64, 3.0, None),  # max_steps decides, as in the Trainer
        (
            "batches",
            64,
            -1,
            2.0,
            "num_train_epochs 2, the length of a training: set time_metric: epochs and max_time: 2",
        ),
        ("epochs", 3, 64, 3.0, "max_steps 64, the length of a training: set time_metric: batches and max_time: 64"),
        ("epochs", 1, -1, 2.0, "set max_time: 2, or num_train_epochs: 1"),
        ("eval_loss", 2, -1, 2.0, "searcher.time_metric 'eval_loss' with max_time 2 does not fit hyperparameters.tra"),
        ("epochs", 1, -1, 1.5, "set max_steps, with time_metric: batches and max_time the same"),
    ],
)
def test_the_right_pair_of_time_metric_and_training_length(time_metric, max_time, steps, epochs, message):
    args = SimpleNamespace(max_steps=steps, num_train_epochs=epochs)
    searcher = asha(time_metric=time_metric, max_time=max_time)
    if message is None:
        check_training_length(searcher, args)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            check_training_length(searcher, args)
    check_training_length(
        {"name": "grid", "max_length": {"epochs": 2}}, SimpleNamespace(max_steps=-1, num_train_epochs=2)
    )
    with pytest.raises(UserError, match="max_length is deprecated"):
        check_training_length({"name": "grid", "max_length": 100}, args)


def test_a_search_is_described():
    assert describe_search({"searcher": {"name": "grid"}}) == []
    drawn = "Their values are drawn (reproducibility.experiment_seed: 3)."
    assert describe_search(random_search(3, 3)) == [drawn]
    said = describe_search({"searcher": asha(bracket_rungs=[3, 1])})
    assert "12 of them" not in said[1]
    assert said[1:] == [
        "14 of them are stopped at their first evaluation from 4 or 16 of 64 batches on, unless they are among the best"
        " 1/4 there.",
        "2 of them all train to the end, 64 batches.",
    ]


# The searches that dpo.yaml has as comments.


def uncommented(name):
    """dpo.yaml with one of its searches and the ranges in place of the grid."""
    text = (REPO / "dpo.yaml").read_text()
    assert text.count("# name: ") == 2
    grid = r"\n +name: grid[^\n]*|\n +type: categorical|\n +vals: [^\n]*"
    text = re.sub(grid, "", text)
    text = re.sub(r"(\n +)# ((type|base|minval|maxval): )", r"\1\2", text)
    lines, chosen = [], False
    for line in text.split("\n"):
        if line.startswith("  # name: "):
            chosen = line.startswith(f"  # name: {name}")
        chosen &= line.startswith("  # ")
        lines.append("  " + line.removeprefix("  # ") if chosen else line)
    return "\n".join(lines)


@pytest.mark.parametrize(("name", "trials"), [("random", 12), ("adaptive_asha", 16)])
def test_the_searches_of_dpo_yaml(tmp_path, name, trials):
    (tmp_path / "dpo.yaml").write_text(uncommented(name))
    config = read_experiment_config(str(tmp_path / "dpo.yaml"))
    assert config["searcher"]["name"] == name
    found = expand_trials(config)
    assert len({trial["dpo_beta"] for trial in found}) == trials
    assert all(0.01 <= trial["dpo_beta"] <= 0.32 for trial in found)
    assert all(3e-8 < trial["training_args"]["learning_rate"] <= 1e-6 for trial in found)
    if name == "adaptive_asha":
        check_training_length(
            config["searcher"],
            SimpleNamespace(max_steps=-1, num_train_epochs=found[0]["training_args"]["num_train_epochs"]),
        )
        assert [bracket.rungs for bracket in make_brackets(config["searcher"])] == [[1, 2]]
