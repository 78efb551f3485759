"""Searches that draw, on this machine: what is trained, which trials stop at a rung and how, and what a rerun keeps."""

import json
import re
from types import SimpleNamespace

import pytest

import dpo_finetune
import local_experiment
from config.hyperparameters import DPOHyperparameters
from config.search import make_brackets
from errors import UserError
from experiment.early_stopping import EarlyStopping
from experiment.report_page import render
from experiment.results import read_local
from storage.files import append_json_line
from trial.context import open_trial
from trial.events import Decision, read_decisions, read_events

DRAWN = {"type": "log", "base": 10, "minval": -4, "maxval": -3}
ARGS = "hyperparameters__training_args__"
SEARCHER = {"name": "adaptive_asha", "metric": "eval_rewards/accuracies", "smaller_is_better": False}
SEARCHER |= {"max_trials": 3, "mode": "aggressive", "divisor": 4, "max_time": 8, "time_metric": "batches"}
SHORT = {f"{ARGS}max_steps": 8, f"{ARGS}eval_strategy": "steps", f"{ARGS}eval_steps": 1}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_trial(folder, kind):
    files = sorted(folder.glob("trials/*/events.jsonl"))
    return [[e["steps_completed"] for e in read_events(file) if e["kind"] == kind] for file in files]


def test_asha_stops_trials_at_a_rung_and_a_rerun_keeps_that(call, write_config, dpo_config, tmp_path, monkeypatch):
    """Three trials, with a rung at 2 of 8 steps. The answers decide: the first trial goes on, and no later one does."""
    searcher = SEARCHER | {"bracket_rungs": [2]}
    assert [b.rungs for b in make_brackets(searcher)] == [[2, 8]]
    source = {"name": dpo_config["hyperparameters"]["datasets"][0], "number_of_samples": 40}
    changes = {"searcher": searcher, f"{ARGS}learning_rate": DRAWN, "hyperparameters__datasets": [source], **SHORT}
    path, folder = write_config(dpo_config, **changes), tmp_path / "out"
    # Accuracies tie on so few pairs, and of equals the later goes on: have the search see each trial worse.
    tell = EarlyStopping.tell

    def worse(self, trial_id, events):
        metrics = {SEARCHER["metric"]: 1 / trial_id}
        tell(self, trial_id, [e | {"metrics": e["metrics"] | metrics} for e in events if e["kind"] == "validation"])

    monkeypatch.setattr(EarlyStopping, "tell", worse)
    status, out, err = call(local_experiment.main, path, "--output", folder)
    assert status == 0, err
    assert "trial 2 of 3 (learning_rate" in out
    assert "COMPLETED (stopped early, at step 2)" in out
    # A trial stops at the very step that was evaluated, and saves it.
    assert by_trial(folder, "validation") == [[*range(1, 9)], [1, 2], [1, 2]]
    assert by_trial(folder, "checkpoint") == [[8], [2], [2]]
    trials = lines_of(folder / "trials.jsonl")
    assert [(trial["state"], trial["steps_completed"]) for trial in trials] == [("COMPLETED", s) for s in (8, 2, 2)]
    assert all(trial["best_metrics"] for trial in trials)
    assert len({trial["hparams"]["training_args"]["learning_rate"] for trial in trials}) == 3
    decisions = read_decisions(folder / "search.jsonl")
    assert [d["trial_id"] for d in decisions if d["stop"]] == [2, 3]

    # Killed after the second trial had saved, before its line was written: nothing of it is trained again.
    (folder / "trials.jsonl").write_text("".join(json.dumps(trials[i]) + "\n" for i in (0, 2)))
    log = (folder / "trials/2/log.txt").read_text()
    assert call(local_experiment.main, path, "--output", folder)[0] == 0
    assert lines_of(folder / "trials.jsonl") == trials
    assert (folder / "trials/2/log.txt").read_text() == log
    assert read_decisions(folder / "search.jsonl") == decisions

    experiment = read_local(folder)
    assert [experiment.stopped_early(result) for result in experiment.results.values()] == [False, True, True]
    page = render(experiment)
    assert "1 of 3 trials completed, 2 stopped early." in page
    assert "The search stopped 2 of 3 trials early, after 2 of 8 batches on average." in page


def test_a_stop_that_was_not_carried_out_is_carried_out(call, write_config, dpo_config, tmp_path):
    """A trial that was killed between the decision and its checkpoint gets the same answer when it trains again."""
    path, search, folder = write_config(dpo_config, **SHORT), tmp_path / "search.jsonl", tmp_path / "out"
    for step in (1, 2, 3):
        answer = Decision(trial_id=7, steps_completed=step, time=step, metric=0.5, stop=step == 3)
        append_json_line(search, answer)
    options = ("--config", path, "--output", folder, "--trial-id", 7, "--search", search)
    status, _, err = call(dpo_finetune.main, *options)
    assert status == 0, err
    events = read_events(folder / "events.jsonl")
    assert [e["steps_completed"] for e in events if e["kind"] == "validation"] == [1, 2, 3]
    assert [e["steps_completed"] for e in events if e["kind"] == "checkpoint"] == [3]


def test_what_was_decided_is_decided_again(tmp_path):
    searcher, metric = SEARCHER | {"max_trials": 9, "bracket_rungs": [2]}, SEARCHER["metric"]

    def evaluation(step, value):
        return {"kind": "validation", "steps_completed": step, "metrics": {"batches": step, metric: value}}

    first = EarlyStopping(searcher, tmp_path / "search.jsonl")
    first.tell(1, [evaluation(1, 0.2), evaluation(2, 0.9)])
    first.tell(2, [evaluation(2, 0.8)])
    first.end(3, failed=True)
    first.tell(1, [evaluation(2, 0.1)])  # after a resume, which changes nothing
    again = EarlyStopping(searcher, tmp_path / "search.jsonl")
    assert again.stops == first.stops == {2: 2}
    assert again.search.brackets == first.search.brackets
    assert again.search.bracket_of == first.search.bracket_of
    written = [(decision["trial_id"], decision["stop"]) for decision in read_decisions(first.file)]
    assert written == [(1, False), (1, False), (2, True), (3, False)]
    saved = {"kind": "checkpoint", "steps_completed": 1, "uuid": "x"}
    assert not again.is_stopped(2, [saved])  # it trains on to step 2, to save that
    assert again.is_stopped(2, [saved | {"steps_completed": 2}])


def test_decisions_that_a_power_cut_took_are_made_anew(tmp_path):
    searcher = SEARCHER | {"max_trials": 3, "bracket_rungs": [2], "max_concurrent_trials": 1}
    found = {"kind": "validation", "steps_completed": 8, "metrics": {"batches": 8, SEARCHER["metric"]: 0.9}}
    first = EarlyStopping(searcher, tmp_path / "search.jsonl")
    first.end(1, failed=True)
    first.tell(2, [found])
    lines = first.file.read_text().splitlines(keepends=True)
    for left in ("", lines[1]):  # without what made room for trial 2, which has completed
        first.file.write_text(left)
        again = EarlyStopping(searcher, first.file)
        again.tell(2, [found])
        again.end(2, failed=False)
        assert (again.exists(3), again.exists(4)) == (True, False)
        assert again.search.brackets[0].scores[1] == {2: -0.9}
        assert first.file.read_text() == lines[1]


@pytest.mark.parametrize(("strategy", "stop"), [("best", 2), ("best", None), ("epoch", 2), ("steps", 2), ("no", 2)])
def test_the_last_step_is_saved_under_every_save_strategy(call, write_config, dpo_config, tmp_path, strategy, stop):
    """At the end of an epoch whose evaluation is worse than the first."""
    length = {"max_steps": -1, "num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": strategy}
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # it only falls
    source = {"name": dpo_config["hyperparameters"]["datasets"][0], "number_of_samples": 5}
    changes = {"hyperparameters__datasets": [source]} | {f"{ARGS}{key}": v for key, v in (length | best).items()}
    path, search, folder = write_config(dpo_config, **changes), tmp_path / "search.jsonl", tmp_path / "out"
    for step in (1, 2, 3):
        append_json_line(search, Decision(trial_id=7, steps_completed=step, time=step, metric=0.5, stop=step == stop))
    status, _, err = call(dpo_finetune.main, "--config", path, "--output", folder, "--trial-id", 7, "--search", search)
    assert status == 0, err
    events = read_events(folder / "events.jsonl")
    last = stop or 3
    assert [e["steps_completed"] for e in events if e["kind"] == "validation"] == [*range(1, last + 1)]
    saved = [1, last] if strategy in ("best", "epoch") else [last]
    assert [e["steps_completed"] for e in events if e["kind"] == "checkpoint"] == saved


def test_a_search_that_does_not_answer_is_said(call, write_config, dpo_config, tmp_path, monkeypatch):
    monkeypatch.setattr("trial.search_stops.RUNNER_SECONDS", 0)
    source = {"name": dpo_config["hyperparameters"]["datasets"][0], "number_of_samples": 5}
    path, search = write_config(dpo_config, hyperparameters__datasets=[source], **SHORT), tmp_path / "search.jsonl"
    options = ("--config", path, "--output", tmp_path / "out", "--trial-id", 7, "--search", search)
    status, _, err = call(dpo_finetune.main, *options)
    assert status
    assert err.splitlines()[-1].endswith(f"{search}: no answer of the search to the evaluation of step 1 in 0 s")


def test_a_random_search(call, write_config, dpo_config, tmp_path):
    searcher = {"name": "random", "metric": SEARCHER["metric"], "smaller_is_better": False, "max_trials": 2}
    changes = {"searcher": searcher, f"{ARGS}learning_rate": DRAWN, f"{ARGS}max_steps": 1}
    path = write_config(dpo_config, **changes, reproducibility={"experiment_seed": 5})
    status, out, err = call(local_experiment.main, path, "--dry-run", "--examples", 0)
    assert status == 0, err
    assert "Their values are drawn (reproducibility.experiment_seed: 5)." in out
    status, out, err = call(local_experiment.main, path, "--output", tmp_path / "out")
    assert status == 0, err
    trials = lines_of(tmp_path / "out" / "trials.jsonl")
    assert [trial["state"] for trial in trials] == ["COMPLETED", "COMPLETED"]
    assert not (tmp_path / "out" / "search.jsonl").exists()
    status, _, err = call(
        local_experiment.main, path, "--output", tmp_path / "out", "--config", "searcher.max_trials=3"
    )
    assert status == 2
    assert "holds a run with another searcher.max_trials" in err


def test_the_wrong_unit_of_time_is_one_line(call, write_config, dpo_config):
    searcher = SEARCHER | {"time_metric": "epochs"}
    status, _, err = call(local_experiment.main, write_config(dpo_config, searcher=searcher), "--dry-run")
    assert status == 2
    wrong = "searcher.time_metric 'epochs' with max_time 8 does not fit hyperparameters.training_args.max_steps 4"
    assert err.splitlines()[-1].endswith(f"{wrong}, the length of a training: set time_metric: batches and max_time: 4")


def test_the_wrong_unit_of_time_is_one_line_on_a_cluster_too(dpo_config, monkeypatch):
    """Determined's callback would raise ValueError, and the trial would be tried again."""
    searcher = SEARCHER | {"time_metric": "epochs", "max_time": 1}
    trial = SimpleNamespace(hparams=dpo_config["hyperparameters"], _config={"searcher": searcher})
    info = SimpleNamespace(task_type="TRIAL", trial=trial, slot_ids=[], container_addrs=["a"])
    monkeypatch.setattr("trial.context.det.get_cluster_info", lambda: info)
    wrong = "searcher.time_metric 'epochs' with max_time 1 does not fit hyperparameters.training_args.max_steps 4"
    with pytest.raises(UserError, match=re.escape(wrong)), open_trial(DPOHyperparameters, "dpo.yaml", ""):
        pass
