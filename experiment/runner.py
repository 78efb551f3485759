"""Run the trials of an experiment on this machine, a process each, in a folder that an interrupted run continues in."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from determined.common.util import yaml_safe_dump
from rich.console import Console
from rich.live import Live

from config.experiment import entrypoint_script, expand_trials
from config.hyperparameters import check_searcher_metric, parse_hyperparameters
from config.search import HALVING, check_training_length
from errors import UserError, os_errors_of
from experiment.early_stopping import EarlyStopping
from experiment.kinds import Hyperparameters, TrainingKind
from experiment.progress import progress_table
from experiment.report_page import render
from experiment.results import Experiment, TrialResult, flatten, read_local, read_local_config, read_results, summarize
from experiment.trial_process import PROCESSES, run_script
from experiment.verdicts import Verdict
from pages.terminal import plural
from storage.checkpoints import local_checkpoint_storage
from storage.cluster_checkpoints import checkpoint_folder
from storage.files import is_object, read_json, read_json_lines, write_atomically
from trial.events import TRAINED, TrialEvent, is_event, read_events
from trial.models import check_model
from trial.policy import load_policy

POLL_SECONDS = 0.2
STOP_SECONDS = 10  # for a trial to end by itself

console = Console(soft_wrap=True, highlight=False)


def check_sources(kind: TrainingKind, trials: list[Hyperparameters]) -> None:
    """Find mistakes in each trial's data and model before anything is written."""
    checkpoints = set[str]()
    for hparams in {str((h.checkpoint, h.model_name, h.model_init_kwargs, h.lora)): h for h in trials}.values():
        if hparams.checkpoint:
            checkpoints.add(hparams.checkpoint)
        elif hparams.model_name:
            if os.path.isdir(hparams.model_name):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
                load_policy(hparams, hparams.model_name, weights=False)
            check_model(hparams.model_name, "model_name", **hparams.model_init_kwargs)
    for name in checkpoints:
        folder = str(checkpoint_folder(name, "model_ckpt"))
        for hparams in {str(h.lora): h for h in trials if h.lora is not None and h.checkpoint == name}.values():
            load_policy(hparams, folder, weights=False)  # finds layers that are not there
    for options in {str(hparams.load_options): hparams.load_options for hparams in trials}.values():
        kind.load(**options)
    for start in filter(None, dict.fromkeys(hparams.start_message for hparams in trials)):
        console.print(start, markup=False)


class RunningTrial:
    """A trial's process and the events that it has written so far."""

    def __init__(self, process: BaseProcess, slot: int, folder: Path) -> None:
        self.process, self.slot, self.started = process, slot, time.monotonic()
        self.log, self.file, self.offset = folder / "log.txt", folder / "events.jsonl", 0
        self.log_start = self.log.stat().st_size if self.log.exists() else 0  # after what earlier starts have printed
        self.events: list[TrialEvent] = []
        self.status = "starting"
        self.progress: list[tuple[float, float]] = []  # time in seconds, share that is done
        self.read()
        self.status, self.progress = "starting", []  # what is in the file by now is an earlier start's

    def read(self) -> None:
        """Take in the lines that were completed since the last time."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self.offset)
            *lines, rest = file.read().split(b"\n")
            self.offset = file.tell() - len(rest)
        for event in filter(is_event, map(read_json, lines)):
            self.events.append(event)
            self.status = event.get("status", self.status)
            if event["kind"] == "progress":
                self.progress.append((time.monotonic(), event["progress"]))

    def last_event(self, kind: str) -> dict[str, Any]:
        """Return the last event of a kind; an empty dict if there is none."""
        return next((dict(event) for event in reversed(self.events) if event["kind"] == kind), {})

    def seconds_left(self, now: float) -> float | None:
        """Return how long the training will take at its pace so far; None while there is none."""
        if len(self.progress) < 2:
            return None
        (first_time, first), (last_time, last) = self.progress[0], self.progress[-1]
        pace = (last_time - first_time) / (last - first) if last > first else 0.0
        return max(0.0, pace * (1 - last) - (now - last_time))


class LocalExperiment(Experiment):
    """An experiment in a folder of this machine. Its trials' entrypoint runs in `model_def`."""

    folder: Path

    def __init__(self, name: str, config: dict[str, Any], folder: Path, model_def: Path) -> None:
        super().__init__(name, config, folder)
        self.trials, self.model_def = expand_trials(config), model_def
        self.report_file, self.search_file = folder / "report.html", folder / "search.jsonl"
        self.reported: Experiment = self  # as the report has it: with what the trials and their checkpoints hold
        self.stopping: EarlyStopping | None = None  # of a search that stops trials early, once it runs
        self.running: dict[int, RunningTrial] = {}
        self.durations: list[float] = []  # in seconds, of the trials that this process has seen complete

    def parse_trials(self) -> list[Hyperparameters]:
        """Return each trial's hyperparameters, checked; [] for a script that is not this project's."""
        if self.kind is None:
            return []
        check_searcher_metric(self.kind.hyperparameters, self.searcher.metric)
        trials = [parse_hyperparameters(self.kind.hyperparameters, hparams) for hparams in self.trials]
        for hparams in trials:
            check_training_length(self.config["searcher"], hparams.args)
        return trials

    def open_folder(self, command: dict[str, Any]) -> None:
        """Make the folder and keep `command` in it, or take up the run of the same experiment that is in it.

        The run of another one may be replaced while it has trained nothing: its config had a mistake. Files that were
        damaged are written anew from the command and the trials. Raises `UserError` for a run that would be lost.
        """
        for old_name in self.folder.glob("trials/*/reports.jsonl"):  # as earlier releases called it
            if not (new_name := old_name.with_name("events.jsonl")).exists():
                old_name.rename(new_name)
        lines, files = self.folder / "trials.jsonl", list(self.folder.glob("trials/*/events.jsonl"))
        events = [event for file in files for event in read_events(file)]
        completed = [row for row in read_json_lines(lines) if is_object(row, {}) and row.get("state") == "COMPLETED"]
        config, trials = json.loads(json.dumps([self.config, self.trials]))
        stored, key, write = self.folder / "experiment.json", None, True
        if stored.exists() or events or completed:
            try:
                key = first_difference(read_local_config(self.folder), config)
                write = key is not None
            except UserError as error:
                if any(event["kind"] == "hparams" and event["hparams"] not in trials for event in events):
                    key = "config"
                console.print(f"{error}: written anew", markup=False)
        if key and (completed or any(event["kind"] in TRAINED for event in events)):
            raise UserError(f"{self.folder} holds a run with another {key}; remove it, or choose another --output")
        if key:
            console.print(f"{self.folder}: replaced a run with another {key}, which had trained nothing", markup=False)
            for file in (*files, lines, self.search_file):
                file.unlink(missing_ok=True)
        results, damaged = read_results(self.folder, self.trials)
        self.results = {trial_id: result for trial_id, result in results.items() if result["state"] == "COMPLETED"}
        if damaged:
            told = f"{plural(damaged, 'line')} damaged: a trial without a line goes on from its last checkpoint"
            console.print(f"{lines}: {told}", markup=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("command.json", json.dumps(command) + "\n")
        if write:
            self._write("experiment.json", json.dumps(config, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        with os_errors_of(self.folder / name):
            write_atomically(self.folder / name, text)

    def run(self, max_concurrent: int) -> int:
        """Run the trials that are not completed yet, `max_concurrent` at a time. Returns how many failed."""
        waiting = [trial_id for trial_id in range(1, len(self.trials) + 1) if trial_id not in self.results]
        for trial_id in self.results:
            console.print(f"{self.describe(trial_id)}: completed before, kept")
        if self.config["searcher"].get("name") in HALVING:
            self.stopping = EarlyStopping(self.config["searcher"], self.search_file)
            for trial_id in self.results:
                self.stopping.tell(trial_id, read_events(self.folder / "trials" / str(trial_id) / "events.jsonl"))
                self.stopping.end(trial_id, failed=False)
        self.write_results()  # a kill may have kept it from being written
        failed = 0
        with ExitStack() as stack:
            live = Live(console=console, transient=True, auto_refresh=False)
            if console.is_terminal:
                stack.enter_context(live)
            stack.callback(self.stop)  # at Ctrl-C too: no trial runs on unwatched
            while waiting or self.running:
                while waiting and len(self.running) < max_concurrent and self.exists(waiting[0]):
                    self.start(waiting.pop(0), max_concurrent)
                live.update(progress_table(self, waiting, console.height - 8, time.monotonic()), refresh=True)
                time.sleep(POLL_SECONDS)
                for trial_id, trial in list(self.running.items()):
                    ended = not trial.process.is_alive()
                    trial.read()
                    if self.stopping:
                        self.stopping.tell(trial_id, trial.events)
                    if ended:
                        failed += self.finish(trial_id)["state"] == "ERROR"
        return failed

    def exists(self, trial_id: int) -> bool:
        """Return whether a trial can start: a search that stops trials early creates them as it goes."""
        return self.stopping is None or self.stopping.exists(trial_id)

    def start(self, trial_id: int, max_concurrent: int) -> None:
        """Start a trial's process: it resumes if it was started before."""
        folder = self.folder / "trials" / str(trial_id)
        kept = {key: value for key, value in self.config["searcher"].items() if key in ("metric", "smaller_is_better")}
        searcher = {"name": "single", **kept}
        config = {**self.config, "hyperparameters": self.trials[trial_id - 1], "searcher": searcher}
        with os_errors_of(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.yaml", yaml_safe_dump(config, default_flow_style=False))
        script, *arguments = entrypoint_script(self.config)
        arguments += ["--config", str(folder / "config.yaml"), "--output", str(folder), "--trial-id", str(trial_id)]
        arguments += ["--cache", str(self.folder / "cache")]
        if self.stopping:
            arguments += ["--search", str(self.search_file)]
        environment = {**os.environ, "LOCAL_CHECKPOINT_STORAGE": str(local_checkpoint_storage())}
        slot = min(set(range(max_concurrent)) - {trial.slot for trial in self.running.values()})
        threads = None
        if max_concurrent > 1:
            # Trials that share the cores by threads would wait for each other most of the time.
            threads = max(1, torch.get_num_threads() // max_concurrent)
            if gpus := torch.cuda.device_count():
                devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
                environment["CUDA_VISIBLE_DEVICES"] = devices.split(",")[slot % gpus]
        command = (script, arguments, self.model_def, environment, threads, folder / "log.txt")
        process = PROCESSES.Process(target=run_script, args=command)
        trial = self.running[trial_id] = RunningTrial(process, slot, folder)
        if self.stopping:
            self.stopping.tell(trial_id, trial.events)  # what an interrupted run has not
            if self.stopping.is_stopped(trial_id, trial.events):
                return  # a process that has not started counts as one that has ended well
        process.start()
        if saved := trial.last_event("checkpoint"):
            console.print(f"{self.describe(trial_id)}: resumes from step {saved['steps_completed']}", markup=False)
        elif not console.is_terminal:  # without a table that shows it
            console.print(f"{self.describe(trial_id)}: started, log in {trial.log}", markup=False)

    def finish(self, trial_id: int) -> TrialResult:
        """Write down what a trial whose process has ended leaves behind. Returns its line of `trials.jsonl`."""
        trial = self.running.pop(trial_id)
        state = "ERROR" if trial.process.exitcode else "COMPLETED"
        result = summarize(trial_id, state, self.trials[trial_id - 1], trial.events, self.searcher)
        if trial.process.exitcode:
            result["error"] = read_failure(trial.process.exitcode, trial.log, trial.log_start)
        if state == "COMPLETED":
            delete_superseded(trial.events, best=result["checkpoint_uuid"])
        if self.stopping:
            self.stopping.end(trial_id, failed=state == "ERROR")
        self.results[trial_id] = result
        self.write_results()
        seconds = time.monotonic() - trial.started
        early = f" (stopped early, at step {result['steps_completed']})" if self.stopped_early(result) else ""
        outcome = f"{self.describe(trial_id)}: {state}{early} after {seconds:.0f} s"
        if "error" in result:
            outcome += f": {result['error']} (see {trial.log})"
        else:
            self.durations.append(seconds)
            if self.searcher.metric in result["best_metrics"]:
                outcome += f", {self.searcher.metric} {result['best_metrics'][self.searcher.metric]:.4g}"
        console.print(outcome, markup=False)
        return result

    def stop(self) -> None:
        """End the trials that still run; each resumes from its latest checkpoint."""
        for process in (children := multiprocessing.active_children()):
            process.terminate()
        for process in children:
            process.join(STOP_SECONDS)
            process.kill()
            process.join()
        if self.running:
            self.write_report()

    def write_results(self) -> None:
        """Write `trials.jsonl`, the best checkpoint so far and the report."""
        lines = [json.dumps(self.results[trial_id]) + "\n" for trial_id in sorted(self.results)]
        self._write("trials.jsonl", "".join(lines))
        if best := self.best():
            self._write("best_checkpoint", f"{best['checkpoint_uuid']}\n")
        self.write_report()

    def write_report(self) -> None:
        """Write the report, with what the running trials have written so far."""
        try:
            self.reported = read_local(self.folder)
            write_atomically(self.report_file, render(self.reported))
        except Exception as error:  # nothing that it shows would be lost: the trials must go on
            console.print(f"{self.report_file} cannot be written: {type(error).__name__}: {error}", markup=False)

    def describe(self, trial_id: int) -> str:
        """Return `trial 2 of 9 (dpo_beta 0.1, learning_rate 5e-07)`."""
        varied = self.describe_values(self.trials[trial_id - 1])
        return f"trial {trial_id} of {len(self.trials)}" + (f" ({varied})" if varied else "")

    def verdict(self) -> Verdict:
        """Return how the trials compare, as the report has it."""
        return Verdict(self.reported)


def delete_superseded(events: list[TrialEvent], best: str | None) -> None:
    """Delete a completed trial's checkpoints but the best and the latest, as a cluster does by default.

    (Determined's checkpoint_storage has save_trial_best: 1 and save_trial_latest: 1 by default.)
    """
    saved = [event["uuid"] for event in events if event["kind"] == "checkpoint"]
    for superseded in set(saved) - {best, *saved[-1:]}:
        shutil.rmtree(local_checkpoint_storage() / superseded, ignore_errors=True)


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Return the dotted name of the first key in which two configs differ; None if they are the same."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return next((key for key in {**before, **after} if before.get(key) != after.get(key)), None)


def read_failure(exitcode: int, log: Path, start: int) -> str:
    """Return why a trial's process failed: the signal that ended it, or the last `error: ` or other line of its log.

    The log of its earlier starts ends at the byte `start`.
    """
    if exitcode < 0:
        return f"ended by {signal.Signals(-exitcode).name}"
    lines = [line.strip() for line in log.read_bytes()[start:].decode(errors="replace").split("\n") if line.strip()]
    errors = [line for line in lines if re.match(r"error( \([^)]*\))?: ", line)]
    return next(reversed(errors or lines), "it printed nothing")
