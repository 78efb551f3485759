"""The log-ratios of held-out pairs that a checkpoint keeps."""

import json
import math

import numpy as np
import pytest

from metrics.evaluations import FILE, Evaluations, LogRatios, preference_losses, read_evaluations

RATIOS = LogRatios(np.array([0.1 + 0.2, -1e-17]), np.array([-2.5, 1 / 3]))
LATER = LogRatios(np.array([math.nan, 3.0]), np.array([-math.inf, 0.0]))  # of a trial that diverged


def an_evaluation(**changes) -> Evaluations:
    evaluations = Evaluations(["test: 1 row (20.0%) cut: …"], ["a.jsonl row 7", "b row 1"], [31, 18], [25, 40])
    evaluations.steps = {50: LATER, 25: RATIOS}
    vars(evaluations).update(changes)
    return evaluations


@pytest.mark.parametrize("within", [".", "checkpoint-50"])
def test_every_digit_is_read_back(tmp_path, within):
    (tmp_path / within).mkdir(exist_ok=True)
    an_evaluation().write(tmp_path / within)
    found = read_evaluations(tmp_path)
    assert (found.truncations, found.rows) == (an_evaluation().truncations, an_evaluation().rows)
    assert (found.chosen_tokens, found.rejected_tokens) == ([31, 18], [25, 40])
    assert list(found.steps) == [25, 50]
    for step, expected in ((25, RATIOS), (50, LATER)):
        np.testing.assert_array_equal(found.steps[step], expected)
        assert found.steps[step].chosen.dtype == np.float64


def test_the_file_has_a_line_for_each_evaluation(tmp_path):
    an_evaluation().write(tmp_path)
    lines = (tmp_path / FILE).read_text().splitlines()
    assert len(lines) == 7
    assert lines[5] == '  "25": {"chosen": [0.30000000000000004, -1e-17], "rejected": [-2.5, 0.3333333333333333]},'


def test_an_sft_trial_has_no_pairs(tmp_path):
    Evaluations(["train: …"]).write(tmp_path)
    assert read_evaluations(tmp_path) == Evaluations(["train: …"])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", b"\0" * 50, b"\xff", "too few", "missing"],
)
def test_a_damaged_file_is_as_none(tmp_path, text):
    an_evaluation().write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    if text == "too few":
        content["steps"]["25"]["chosen"].pop()
        text = json.dumps(content)
    elif text == "missing":
        del content["steps"]["25"]["chosen"]
        text = json.dumps(content)
    (tmp_path / FILE).write_bytes(text.encode() if isinstance(text, str) else text)
    assert read_evaluations(tmp_path) is None


def test_no_file_is_none(tmp_path):
    assert read_evaluations(tmp_path) is None
    assert read_evaluations(tmp_path / "nowhere") is None


def test_the_loss_is_that_of_beta_0_1_whatever_a_trials_own_is():
    np.testing.assert_array_equal(RATIOS.margins, [0.1 + 0.2 + 2.5, -1e-17 - 1 / 3])
    expected = [-math.log(1 / (1 + math.exp(-0.1 * h))) for h in (-30.0, 0.0, 2.8)]
    np.testing.assert_allclose(preference_losses(np.array([-30.0, 0.0, 2.8])), expected, rtol=1e-14)
    assert preference_losses(np.array([-1e5, 1e5])).tolist() == [1e4, 0]  # no overflow
