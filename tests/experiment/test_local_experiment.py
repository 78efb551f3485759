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
from rich.console import Console

import inference
import local_experiment
from config.experiment import read_experiment_config
from config.hyperparameters import DPOHyperparameters, SFTHyperparameters
from errors import UserError
from experiment import runner
from experiment.progress import format_minutes, progress_table
from experiment.results import Searcher, summarize
from storage.checkpoints import local_checkpoint, local_checkpoint_storage
from storage.locks import only_writer
from trial.events import append_event, read_events

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
    assert command == f"{dpo} . --config hyperparameters.model_ckpt={uuid}"

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

    repeated, (*words, option, page) = words, command.split()
    assert (option, page) == ("--output_file", "comparison.html")
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


def test_trials_are_as_python_would_run_their_script(call, write_config, sft_config, tmp_path):
    """Another MODEL_DEF with a module of its own that has the name of one of ours; its arguments; atexit; a crash."""
    folder = tmp_path / "project" / "src"
    folder.mkdir(parents=True)
    (folder / "errors.py").write_text("NAME = 'their own errors'\n")
    (folder / "train.py").write_text(
        "import atexit, multiprocessing, os, sys, errors\n"
        "if __name__ == '__main__':\n"
        "    atexit.register(print, 'at exit')\n"
        "    print(errors.NAME, os.getcwd(), sys.argv[:3], multiprocessing.get_start_method())\n"
        "    if sys.argv[sys.argv.index('--trial-id') + 1] == '2':\n"
        "        os.abort()\n"
    )
    grid = {"searcher__name": "grid", f"{ARGS}seed": {"type": "categorical", "vals": [1, 2]}}
    path = write_config(sft_config, entrypoint="python src/train.py --fast", **grid)
    status, out, _ = call(local_experiment.main, path, tmp_path / "project", "--output", tmp_path / "out")
    log = (tmp_path / "out" / "trials" / "1" / "log.txt").read_text().splitlines()
    start_method = "fork" if sys.platform == "linux" else "spawn"
    arguments = [str(folder / "train.py"), "--fast", "--config"]
    assert log == [f"their own errors {tmp_path / 'project'} {arguments} {start_method}", "at exit"]
    assert [trial["state"] for trial in trials_in(tmp_path / "out")] == ["COMPLETED", "ERROR"]
    assert re.search(r"trial 2 of 2 \(seed 2\): ERROR after \d+ s: ended by SIGABRT", out)
    assert status == 1


def test_what_a_kill_kept_from_being_written(call, write_config, sft_config, tmp_path):
    """Killed after its last trial was recorded and before the rest was written: the same command writes it."""
    path = write_config(sft_config, **{f"{ARGS}max_steps": 1, f"{ARGS}dataloader_num_workers": 1})
    # Text that looks like a number stays text in the trial's own config.
    words = (path, "--output", tmp_path / "out", "--config", 'description="1e5"')
    assert call(local_experiment.main, *words)[0] == 0
    best = (tmp_path / "out" / "best_checkpoint").read_text()
    for name in ("best_checkpoint", "report.html"):
        (tmp_path / "out" / name).unlink()
    assert call(local_experiment.main, *words)[0] == 0
    assert (tmp_path / "out" / "best_checkpoint").read_text() == best
    assert "1 of 1 trial completed" in (tmp_path / "out" / "report.html").read_text()


TRAIN = """import sys
from pathlib import Path
from config.experiment import read_experiment_config
from trial.events import append_event
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
hparams = read_experiment_config(options["--config"])["hyperparameters"]
events = Path(options["--output"], "events.jsonl")
append_event(events, kind="hparams", hparams=hparams)
if hparams["max_seq_length"] < 10:
    sys.exit("error: no row is left")
append_event(events, kind="validation", steps_completed=1, metrics={"eval_loss": 0.5})
append_event(events, kind="checkpoint", steps_completed=1, uuid="6b6fbaa7-faa9-4449-867b-2939a147a335")
"""


@pytest.fixture
def quick(call, write_config, sft_config, tmp_path):
    """An experiment of a trial that trains nothing and reports what a trial does; returns its status, out and err."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "train.py").write_text(TRAIN)

    def run(limit):
        changes = {"entrypoint": "python train.py", "hyperparameters__max_seq_length": limit}
        path = write_config(sft_config, **changes)
        return call(local_experiment.main, path, tmp_path / "project", "--output", tmp_path / "out")

    return run


def test_a_run_that_trained_nothing_does_not_block_a_corrected_command(quick, tmp_path):
    out = tmp_path / "out"
    status, told, _ = quick(limit=5)
    assert status == 1
    assert "Trial 1 failed: error: no row is left" in told.splitlines()
    assert trials_in(out)[0]["error"] == "error: no row is left"
    assert "Trial 1 failed: error: no row is left" in (out / "report.html").read_text()
    status, told, err = quick(limit=50)
    assert (status, err) == (0, "")
    assert f"{out}: replaced a run with another hyperparameters.max_seq_length, which had trained nothing\n" in told
    (trial,) = trials_in(out)
    assert (trial["state"], trial["hparams"]["max_seq_length"], "error" in trial) == ("COMPLETED", 50, False)
    assert json.loads((out / "experiment.json").read_text())["hyperparameters"]["max_seq_length"] == 50
    status, _, err = quick(limit=60)  # now there is something to lose
    assert status == 2
    assert "holds a run with another hyperparameters.max_seq_length; remove it" in err


@pytest.mark.parametrize("name", ["experiment.json", "command.json", "trials.jsonl", "best_checkpoint"])
def test_what_a_power_cut_leaves_of_the_runners_files_is_made_again(quick, tmp_path, name):
    assert quick(limit=50)[0] == 0
    file = tmp_path / "out" / name
    whole = file.read_bytes()
    for damaged in (b"", bytes(len(whole)), whole[: len(whole) // 2], b"\xff\xfe", b"[" * 10**5, b'{"trial_id": 1}\n'):
        file.write_bytes(damaged)
        status, out, err = quick(limit=50)
        assert (status, err) == (0, ""), out
        assert file.read_bytes() == whole
        assert (str(file) in out) == (name == "experiment.json" or (name == "trials.jsonl" and damaged != b""))
    file.unlink()
    file.mkdir()
    status, out, err = quick(limit=50)
    assert (status, err) == (2, f"error: {file}: Is a directory\n")


def test_a_damaged_config_does_not_let_another_experiment_in(quick, tmp_path):
    assert quick(limit=50)[0] == 0
    (tmp_path / "out" / "experiment.json").write_bytes(bytes(100))
    status, _, err = quick(limit=60)
    assert status == 2
    assert "holds a run with another config; remove it" in err
    assert (tmp_path / "out" / "experiment.json").read_bytes() == bytes(100)


def test_minutes():
    times = {None: "", 5.2: "0:05", 59.7: "1:00", 754: "12:34", 3723: "1:02:03"}
    assert {seconds: format_minutes(seconds) for seconds in times} == times


def test_a_failed_trial_is_reported_and_the_others_go_on(call, write_config, dpo_config, tmp_path):
    options = {"type": "categorical", "vals": [{"no_such_option": 1}, {}]}  # of which only the model can know
    changes = {"searcher__name": "grid", f"{ARGS}model_init_kwargs": options, f"{ARGS}max_steps": 1}
    path = write_config(dpo_config, **changes)
    status, out, _ = call(local_experiment.main, path, "--output", tmp_path / "out")
    assert status == 1
    failed, completed = trials_in(tmp_path / "out")
    assert (failed["state"], failed["checkpoint_uuid"], failed["metrics"]) == ("ERROR", None, {})
    assert completed["state"] == "COMPLETED"
    error = next(line for line in out.splitlines() if line.startswith("trial 1 of 2") and "ERROR" in line)
    assert re.search(r"ERROR after \d+ s: .*no_such_option.*see .*trials/1/log\.txt", error)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hyperparameters.datasets=[no/such/folder]", "data set no/such/folder: no such file or folder"),
        ("hyperparameters.model_name=./nowhere", "model_name './nowhere': no such folder"),
        ("hyperparameters.dpo_loss=sigmoyd", "dpo_loss 'sigmoyd' is not one of"),
        ("hyperparameters.training_args.learning_rat=1", "learning_rat is not a hyperparameter"),
        ("hyperparameters.model_ckpt=latest", "model_ckpt 'latest' is not a checkpoint UUID"),
        ("hyperparameters.model_ckpt=6b6fbaa7-faa9-4449-867b-2939a147a335", "no such checkpoint in"),
        ("entrypoint=python nowhere.py", "entrypoint script nowhere.py: not in"),
        ("searcher.name=adaptive_asha", "searcher.max_trials is missing"),
        ("searcher.metric=", "searcher.metric is missing"),
        (
            "searcher.metric=eval_reward/accuracies",
            "searcher.metric 'eval_reward/accuracies' is not reported at evaluations, which have",
        ),
        ("hyperparameter.dpo_beta=1", "hyperparameter is not a key of an experiment (did you mean 'hyperparameters'?)"),
        ("searcher=grid", "searcher is 'grid', which is not a mapping"),
        ("searcher", "--config 'searcher' is not key=value"),
        (
            "hyperparameters.training_args.num_train_epochs=-1",
            "config.yaml: hyperparameters.training_args.num_train_ep",
        ),
        ("hyperparameters.training_args.optim=adamw_bnb_8bit", "optim adamw_bnb_8bit: You need to install"),
        ("resources.slots_per_trial=two", "resources.slots_per_trial is 'two', which is not a whole number"),
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
        return Searcher({"searcher": searcher}).best(trials, lambda trial: trial["m"])["id"]

    assert (best(True), best(False)) == (1, 2)


def test_a_trial_is_ranked_by_what_it_saved():
    searcher = Searcher({"searcher": {"metric": "eval_loss"}})
    reports = [
        {"kind": "validation", "steps_completed": 2, "metrics": {"eval_loss": 1.0}},
        {"kind": "checkpoint", "steps_completed": 2, "uuid": "at-2"},
        {"kind": "validation", "steps_completed": 3, "metrics": {"eval_loss": 0.5}},  # nothing saved here
        {"kind": "validation", "steps_completed": 4, "metrics": {"eval_loss": 2.0}},
        {"kind": "checkpoint", "steps_completed": 4, "uuid": "at-4"},
    ]
    line = summarize(1, "COMPLETED", {}, reports, searcher)
    assert line["checkpoint_uuid"] == "at-2"
    assert line["metrics"] == {"eval_loss": 2.0}
    assert line["best_metrics"] == {"eval_loss": 1.0}
    assert line["steps_completed"] == 4


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_experiment_goes_on(write_config, sft_config, tmp_path, how):
    """Ctrl-C as a terminal sends it, to the experiment and its trials; SIGTERM and SIGKILL, to the experiment alone.

    No trial runs on, and the same command again finishes both.
    """
    changes = {f"{ARGS}max_steps": 100, f"{ARGS}save_strategy": "steps", f"{ARGS}save_steps": 10}
    seeds = {"searcher__name": "grid", f"{ARGS}seed": {"type": "categorical", "vals": [1, 2]}}
    config = write_config(sft_config, **changes, **seeds)
    command = [sys.executable, "local_experiment.py", config, "--output", str(tmp_path / "out")]
    command += ["--max-concurrent", "2"]
    first = subprocess.Popen(
        command, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit SIG_IGN
    )  # fmt: skip
    deadline = time.monotonic() + 120
    files = [tmp_path / "out" / "trials" / trial / "events.jsonl" for trial in "12"]
    while not all(any(r["kind"] == "checkpoint" for r in read_events(file)) for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for file in files:
        with pytest.raises(UserError, match="another process is at work there"), only_writer(file.parent):
            pass
    if how == signal.SIGINT:
        os.killpg(first.pid, how)
    else:
        os.kill(first.pid, how)
    _, err = first.communicate(timeout=60)
    said = f"stopped by {how.name}; the same command goes on from what it has saved\n"
    assert (first.returncode, err) == ((-how, "") if how == signal.SIGKILL else (128 + how, said))
    assert trials_in(tmp_path / "out") == []
    for file in files:
        with only_writer(file.parent, patience=30):
            pass
    if how != signal.SIGKILL:
        report = (tmp_path / "out" / "report.html").read_text()
        assert "0 of 2 trials completed, 2 unfinished" in report

    again = run_script(*command[1:])
    assert again.returncode == 0, again.stderr
    assert len(re.findall(r"trial [12] of 2 \(seed [12]\): resumes from step [1-9]0", again.stdout)) == 2
    assert [(trial["state"], trial["steps_completed"]) for trial in trials_in(tmp_path / "out")] == [
        ("COMPLETED", 100)
    ] * 2


def test_a_folder_is_not_written_by_two_experiments(call, write_config, sft_config, tmp_path):
    with only_writer(tmp_path / "out"):
        status, _, err = call(local_experiment.main, write_config(sft_config), "--output", tmp_path / "out")
    assert (status, err) == (2, f"error: {tmp_path / 'out'}: another process is at work there\n")
    assert not (tmp_path / "out").exists()


def test_three_trials_at_once(call, write_config, dpo_config, tmp_path):
    """They end as they would one after another, and one of them makes the reference pass for all."""
    grid = {"searcher__name": "grid", "hyperparameters__dpo_beta": {"type": "categorical", "vals": [0.1, 0.05, 0.01]}}
    config = write_config(dpo_config, **grid, **{f"{ARGS}max_steps": 2})
    status, out, err = call(local_experiment.main, config, "--output", tmp_path / "out", "--max-concurrent", 3)
    assert status == 0, err
    lines = [re.sub(r"trial \d of 3 \(dpo_beta [\d.]+\): (\w+).*", r"\1", line) for line in out.splitlines()]
    assert [line for line in lines if line in ("started", "COMPLETED")] == ["started"] * 3 + ["COMPLETED"] * 3
    reports = [read_events(tmp_path / "out" / "trials" / trial / "events.jsonl") for trial in "123"]
    told = [report["status"].split(" in ")[0] for trial in reports for report in trial if report["kind"] == "status"]
    assert told.count("reference log-probs computed") == 1
    assert told.count("reference log-probs reused") == 2
    assert [trial["hparams"]["dpo_beta"] for trial in trials_in(tmp_path / "out")] == [0.1, 0.05, 0.01]
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "3 of 3" in page
    # Each trial has kept its pairs, by which the terminal and the page compare them.
    (best,) = re.findall(r"^Best: trial (\d), checkpoint \S+$", out, re.MULTILINE)
    (headline,) = re.findall(rf"^(Trial {best} is best[;,].* \(95%\))\.$", out, re.MULTILINE)
    assert f"<h2>{headline}</h2>" in page
    assert "without pairs" not in out + page


def test_what_is_watched_while_trials_run(write_config, dpo_config, tmp_path, monkeypatch):
    """The table of a grid with a finished, a running and a waiting trial, as a terminal shows it."""
    now = 1000.0
    monkeypatch.setattr("experiment.runner.time.monotonic", lambda: now)
    grid = {"searcher__name": "grid", "hyperparameters__dpo_beta": {"type": "categorical", "vals": [0.1, 0.05, 0.01]}}
    path = write_config(dpo_config, **grid)
    config = read_experiment_config(path)
    experiment = runner.LocalExperiment("test", config, tmp_path, tmp_path)
    metrics = {"eval_rewards/accuracies": 0.75}
    experiment.results[1] = {"trial_id": 1, "state": "COMPLETED", "steps_completed": 40, "best_metrics": metrics}
    experiment.durations.append(100.0)
    file = tmp_path / "events.jsonl"
    append_event(file, kind="progress", progress=0.9)  # of an earlier start
    trial = experiment.running[2] = runner.RunningTrial(None, 0, tmp_path)
    append_event(file, kind="status", status="training")
    append_event(file, kind="progress", progress=0.1)
    trial.read()
    now += 10
    with file.open("a") as torn:
        torn.write('{"kind": "progress", ')
    trial.read()
    with file.open("a") as rest:
        rest.write('"progress": 0.3}\n')
    append_event(file, kind="training", steps_completed=12, metrics={"loss": 0.5, "tokens_per_second": 1234.5})
    append_event(file, kind="validation", steps_completed=12, metrics={"eval_rewards/accuracies": 0.625})
    trial.read()
    console = Console(width=120)
    with console.capture() as captured:
        console.print(progress_table(experiment, waiting=[3], room=9, now=now))
    shown = [line.split() for line in captured.get().splitlines() if line.strip()]
    assert shown[0] == ["trial", "dpo_beta", "state", "step", "tokens/s", "accuracies", "left"]
    assert shown[2] == ["1", "0.1", "COMPLETED", "40", "0.75"]
    assert shown[3] == ["2", "0.05", "training", "30%", "12", "1,234", "0.625", "0:35"]  # 20% in 10 s, 70% to go
    assert shown[4] == ["3", "0.01", "waiting"]
    assert " ".join(shown[5]) == "1 of 3 trials done, about 3:10 left"


def test_superseded_checkpoints_are_deleted():
    names = ["first", "best", "middle", "latest"]
    for name in names:
        (local_checkpoint_storage() / name).mkdir(parents=True)
    reports = [{"kind": "checkpoint", "steps_completed": step, "uuid": name} for step, name in enumerate(names)]
    runner.delete_superseded(reports, best="best")
    assert [(local_checkpoint_storage() / name).exists() for name in names] == [False, True, False, True]


def test_first_difference_names_the_key():
    old = {"name": "x", "hyperparameters": {"a": 1, "b": {"c": [1]}}}
    assert runner.first_difference(old, old) is None
    new = {"name": "x", "hyperparameters": {"a": 1, "b": {"c": [1, 2]}}}
    assert runner.first_difference(old, new) == "hyperparameters.b.c"
    assert runner.first_difference(old, {**old, "debug": True}) == "debug"
