"""The local experiment, end to end: trials in processes of their own, what it writes, and how it fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import REPO, run_script

import inference
import local_experiment
from checkpoints import local_checkpoint, local_checkpoint_storage
from hyperparameters import DPOHyperparameters, SFTHyperparameters
from trial import read_reports

GRID = {
    "searcher__name": "grid",
    "hyperparameters__dpo_beta": {"type": "categorical", "vals": [0.1, 0.05]},
}
ARGS = "hyperparameters__training_args__"


def trials_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_from_base_to_comparison(call, write_config, sft_config, dpo_config, tiny, tmp_path):
    """SFT, a grid of two DPO trials from its checkpoint, and the comparison, as `make demo` runs them."""
    sft, dpo = write_config(sft_config, "sft.yaml"), write_config(dpo_config, "dpo.yaml", **GRID)
    sft_folder, dpo_folder = tmp_path / "sft", tmp_path / "dpo"

    status, out, err = call(local_experiment.main, sft, "--output", sft_folder)
    assert status == 0, err
    (trial,) = trials_in(sft_folder)
    assert list(trial) == [
        *("trial_id", "state", "hparams", "steps_completed", "metrics", "best_metrics", "checkpoint_uuid")
    ]
    assert (trial["trial_id"], trial["state"], trial["steps_completed"]) == (1, "COMPLETED", 4)
    assert trial["hparams"] == sft_config["hyperparameters"]
    assert trial["metrics"]["eval_loss"] == trial["best_metrics"]["eval_loss"] > 0
    assert set(SFTHyperparameters.eval_metrics) <= set(trial["metrics"])
    uuid = trial["checkpoint_uuid"]
    assert local_checkpoint(uuid, "test").name == "checkpoint-4"
    assert (sft_folder / "best_checkpoint").read_text().strip() == uuid
    (command,) = re.findall(r"^Next: python local_experiment.py (.*)$", out, flags=re.MULTILINE)
    overrides = f"--config hyperparameters.model_ckpt={uuid} --config hyperparameters.model_name={tiny / 'base'}"
    assert command == f"{dpo} . {overrides}"

    words = [*command.split(), "--config", "hyperparameters.training_args.data_seed=7", "--output", dpo_folder]
    status, out, err = call(local_experiment.main, *words)
    assert status == 0, err
    trials = trials_in(dpo_folder)
    assert [trial["hparams"]["dpo_beta"] for trial in trials] == [0.1, 0.05]
    assert all(trial["hparams"]["model_ckpt"] == uuid for trial in trials)
    assert len({trial["checkpoint_uuid"] for trial in trials}) == 2
    assert set(DPOHyperparameters.eval_metrics) <= set(trials[0]["metrics"])
    assert 0 <= trials[0]["best_metrics"]["eval_rewards/accuracies"] <= 1
    best = (dpo_folder / "best_checkpoint").read_text().strip()
    (command,) = re.findall(r"^Next: python inference.py (.*)$", out, flags=re.MULTILINE)
    assert f"DPO starts from checkpoint {uuid}" in out

    repeated, words = words, command.split()
    table = tmp_path / "comparison.csv"
    more = ("--number-of-samples", 3, "--max-new-tokens", 8, "--output_file", table)
    status, out, err = call(inference.main, *words, *more)
    assert status == 0, err
    assert words[-2:] == ["--data-seed", "7"]
    assert words[:6] == ["--model", f"base={tiny / 'base'}", "--model", f"sft={uuid}", "--model", f"dpo={best}"]
    assert list(pd.read_csv(table).columns) == ["question", "base", "sft", "dpo", "preferred"]

    # The same command again: nothing is run anew. Another config: the folder's trials are not touched.
    assert call(local_experiment.main, *repeated)[0] == 0
    assert trials_in(dpo_folder) == trials
    status, _, err = call(local_experiment.main, sft, "--output", dpo_folder)
    assert status == 2
    assert "holds a run with another entrypoint; remove it" in err


def test_a_failed_trial_is_reported_and_the_others_go_on(call, write_config, dpo_config, tmp_path):
    schedulers = {"type": "categorical", "vals": ["cosine_with_min_lr", "linear"]}
    path = write_config(
        dpo_config, searcher__name="grid", **{f"{ARGS}lr_scheduler_type": schedulers, f"{ARGS}max_steps": 1}
    )
    status, out, _ = call(local_experiment.main, path, "--output", tmp_path / "out")
    assert status == 1
    failed, completed = trials_in(tmp_path / "out")
    assert (failed["state"], failed["checkpoint_uuid"], failed["metrics"]) == ("ERROR", None, {})
    assert completed["state"] == "COMPLETED"
    error = next(line for line in out.splitlines() if line.startswith("trial 1 of 2") and "ERROR" in line)
    assert re.search(r"ERROR after \d+ s: ValueError: .*min_lr.*see .*trials/1/log\.txt", error)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hyperparameters.datasets=[no/such/folder]", "data set no/such/folder: no such file or folder"),
        ("hyperparameters.model_name=./nowhere", "model_name './nowhere': no such folder"),
        ("hyperparameters.dpo_loss=sigmoyd", "dpo_loss 'sigmoyd' is none of"),
        ("hyperparameters.training_args.learning_rat=1", "learning_rat is not a hyperparameter"),
        ("hyperparameters.model_ckpt=latest", "model_ckpt 'latest' is no checkpoint UUID"),
        ("hyperparameters.model_ckpt=6b6fbaa7-faa9-4449-867b-2939a147a335", "no such checkpoint in"),
        ("entrypoint=python nowhere.py", "entrypoint script nowhere.py: not in"),
        ("searcher.name=adaptive_asha", "searcher.name 'adaptive_asha'"),
        ("searcher.metric=", "searcher.metric is missing"),
        (
            "searcher.metric=eval_reward/accuracies",
            "searcher.metric 'eval_reward/accuracies' is not reported at evaluations, which have",
        ),
        ("hyperparameter.dpo_beta=1", "hyperparameter is no key of an experiment (did you mean 'hyperparameters'?)"),
        ("searcher=grid", "searcher is missing or no mapping"),
        ("searcher", "--config 'searcher' is not key=value"),
    ],
)
def test_mistakes_cost_nothing(call, write_config, dpo_config, tmp_path, override, message):
    """One line on stderr, exit status 2, and nothing written."""
    path = write_config(dpo_config)
    status, out, err = call(local_experiment.main, path, "--config", override, "--output", tmp_path / "out")
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_stderr_is_one_line_in_a_process_of_its_own(write_config, dpo_config, tmp_path):
    """No library's warning keeps the error company, as it could in a test's own process without being seen."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "q", "chosen": "c", "rejected": "r"}\n{"prompt": "q", "chosen"\n')
    changes = {f"{ARGS}activation_checkpointing": None, "hyperparameters__datasets": [str(data)]}
    failed = run_script("local_experiment.py", write_config(dpo_config, **changes), "--output", tmp_path / "out")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == f"error: {data} line 2: not JSON (Expecting ':' delimiter at column 25)\n"


def test_the_best_trial_is_the_searchers():
    trials = [
        {"id": 0, "m": {"acc": float("nan")}},
        {"id": 1, "m": {"acc": 0.5}},
        {"id": 2, "m": {"acc": 0.9}},
        {"id": 3, "m": {"acc": 0.9}},
        {"id": 4, "m": {}},
    ]

    def best(smaller_is_better):
        searcher = {"metric": "acc", "smaller_is_better": smaller_is_better}
        return local_experiment.Searcher({"searcher": searcher}).best(trials, lambda trial: trial["m"])["id"]

    assert (best(True), best(False)) == (1, 2)


def test_a_trial_is_ranked_by_what_it_saved():
    searcher = local_experiment.Searcher({"searcher": {"metric": "eval_loss"}})
    reports = [
        {"kind": "validation", "steps_completed": 2, "metrics": {"eval_loss": 1.0}},
        {"kind": "checkpoint", "steps_completed": 2, "uuid": "at-2"},
        {"kind": "validation", "steps_completed": 3, "metrics": {"eval_loss": 0.5}},  # nothing saved here
        {"kind": "validation", "steps_completed": 4, "metrics": {"eval_loss": 2.0}},
        {"kind": "checkpoint", "steps_completed": 4, "uuid": "at-4"},
    ]
    line = local_experiment.summarize(1, "COMPLETED", {}, reports, searcher)
    assert line["checkpoint_uuid"] == "at-2"
    assert line["metrics"] == {"eval_loss": 2.0}
    assert line["best_metrics"] == {"eval_loss": 1.0}
    assert line["steps_completed"] == 4


def test_an_interrupted_experiment_goes_on(write_config, sft_config, tmp_path):
    """Ctrl-C, as a terminal sends it: to the experiment and its trial. The same command again then finishes."""
    changes = {f"{ARGS}max_steps": 100, f"{ARGS}save_strategy": "steps", f"{ARGS}save_steps": 10}
    config = write_config(sft_config, **changes)
    command = [sys.executable, "local_experiment.py", config, "--output", str(tmp_path / "out")]
    first = subprocess.Popen(
        command, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit SIG_IGN
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any(r["kind"] == "checkpoint" for r in read_reports(tmp_path / "out" / "trials" / "1" / "reports.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert (first.returncode, err) == (130, "interrupted: the same command again goes on from here\n")
    assert not (tmp_path / "out" / "trials.jsonl").exists()

    again = run_script(*command[1:])
    assert again.returncode == 0, again.stderr
    assert re.search(r"trial 1 of 1: resumes from step [1-9]0", again.stdout)
    (trial,) = trials_in(tmp_path / "out")
    assert (trial["state"], trial["steps_completed"]) == ("COMPLETED", 100)


def test_superseded_checkpoints_are_deleted():
    names = ["first", "best", "middle", "latest"]
    for name in names:
        (local_checkpoint_storage() / name).mkdir(parents=True)
    reports = [{"kind": "checkpoint", "steps_completed": step, "uuid": name} for step, name in enumerate(names)]
    local_experiment.delete_superseded(reports, best="best")
    assert [(local_checkpoint_storage() / name).exists() for name in names] == [False, True, False, True]


def test_first_difference_names_the_key():
    old = {"name": "x", "hyperparameters": {"a": 1, "b": {"c": [1]}}}
    assert local_experiment.first_difference(old, old) is None
    new = {"name": "x", "hyperparameters": {"a": 1, "b": {"c": [1, 2]}}}
    assert local_experiment.first_difference(old, new) == "hyperparameters.b.c"
    assert local_experiment.first_difference(old, {**old, "debug": True}) == "debug"
