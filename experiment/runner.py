"""Run an experiment on this machine as `det e create CONFIG.yaml MODEL_DEF --config key=value` would on a cluster.

    python local_experiment.py sft.yaml --dry-run
    python local_experiment.py sft.yaml
    python local_experiment.py dpo.yaml --config hyperparameters.model_ckpt=UUID

The first trains nothing: it shows what would be learned and what that takes, see dry_run.py.

Each trial is a process of its own that runs the YAML's entrypoint script. DIR (default: local_runs/<experiment name>)
receives

    experiment.json      the config with its overrides; command.json has the command's CONFIG.yaml and MODEL_DEF
    trials.jsonl         a line a trial: trial_id, state, hparams, steps_completed, metrics (of the last validation),
                         best_metrics, checkpoint_uuid
    best_checkpoint      the UUID of the best trial's checkpoint
    report.html          all of it as a picture, to open in a browser
    trials/<trial_id>/   its config.yaml, log.txt and events.jsonl
    cache/               what the trials share: tokenized data and reference log-probs. When they are done it may go

checkpoint_uuid is, of the checkpoints that were validated when they were saved, the best one by searcher.metric, and
best_metrics are its metrics: what ranks a trial is what one gets from it. (The last step is always validated and
saved.) Checkpoints are kept in local_runs/checkpoints (LOCAL_CHECKPOINT_STORAGE moves it), for later runs to start
from by UUID.

Interrupted in whatever way (Ctrl-C, a kill, a power cut) and started again with the same config and DIR, it keeps the
finished trials and goes on with the others from their latest checkpoints.
"""

import argparse
import atexit
import copy
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from contextlib import ExitStack, suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from config.experiment import entrypoint_script, expand_trials, read_experiment_config
from config.hyperparameters import DPOHyperparameters, SFTHyperparameters, check_searcher_metric, parse_hyperparameters
from dataset_utils import load_dpo_dataset, load_sft_dataset
from errors import UserError, exit_on_user_error
from experiment.next_steps import next_command
from experiment.report_page import render
from experiment.results import Experiment, TrialResult, short_name, summarize
from storage.checkpoints import local_checkpoint, local_checkpoint_storage
from storage.files import write_atomically
from storage.locks import only_writer
from trial.context import as_json, hide_progress_bars_in_logs
from trial.events import TrialEvent, read_events
from trial.models import check_source

POLL_SECONDS = 0.2
SHOWN_METRICS = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
# Trials are forked from a process that has done the imports, eight seconds of them, where libraries stand that (on
# macOS they do not).
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
IMPORTS = ["determined.transformers", "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer"]

console = Console(soft_wrap=True, highlight=False)


def parse_trials(
    script: str, trials: list[dict[str, Any]], metric: str
) -> list[SFTHyperparameters] | list[DPOHyperparameters]:
    """Each trial's hyperparameters, checked; none for a script that is not this project's."""
    cls = {"sft_finetune.py": SFTHyperparameters, "dpo_finetune.py": DPOHyperparameters}.get(script)
    if cls is None:
        return []
    check_searcher_metric(cls, metric)
    return [parse_hyperparameters(cls, hparams) for hparams in trials]


def check_sources(trials: list[SFTHyperparameters] | list[DPOHyperparameters]) -> None:
    """Find a user's mistakes in each trial's data and model before anything is written."""
    for h in trials:
        if isinstance(h, DPOHyperparameters) and h.model_ckpt:
            local_checkpoint(h.model_ckpt, "model_ckpt")
        else:
            check_source(h.model_name, "model_name")
    loads = {str((h.sources, h.split_seed, getattr(h, "streaming", None))): h for h in trials}
    for h in loads.values():
        if isinstance(h, SFTHyperparameters):
            load_sft_dataset(h.sources, h.split_seed, h.streaming)
        else:
            load_dpo_dataset(h.sources, h.split_seed)
    for start in {h.start: None for h in trials if isinstance(h, DPOHyperparameters)}:
        console.print(start, markup=False)


class RunningTrial:
    """A trial's process and what it has reported so far."""

    def __init__(self, process: BaseProcess, slot: int, folder: Path) -> None:
        self.process, self.slot, self.started = process, slot, time.monotonic()
        self.file, self.offset = folder / "events.jsonl", 0
        self.events: list[TrialEvent] = []
        self.status = "starting"
        self.progress: list[tuple[float, float]] = []  # when, and how far
        self.read()
        self.status, self.progress = "starting", []  # what it read of them is an earlier start's

    def read(self) -> None:
        """Take in the lines that were completed since the last time."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self.offset)
            *lines, rest = file.read().split(b"\n")
            self.offset = file.tell() - len(rest)
        for line in lines:
            with suppress(ValueError):  # one that a kill cut short
                event = json.loads(line)
                self.events.append(event)
                if event["kind"] == "progress":
                    self.progress.append((time.monotonic(), event["progress"]))
                self.status = event.get("status", self.status)

    def last(self, kind: str) -> TrialEvent | dict:
        return next((event for event in reversed(self.events) if event["kind"] == kind), {})

    def seconds_left(self) -> float | None:
        """Of training, at its pace so far; None as long as there is none."""
        if len(self.progress) < 2:
            return None
        (first_time, first), (last_time, last) = self.progress[0], self.progress[-1]
        pace = (last_time - first_time) / (last - first) if last > first else 0.0
        return max(0.0, pace * (1 - last) - (time.monotonic() - last_time))


class LocalExperiment(Experiment):
    """An experiment in a folder of this machine."""

    def __init__(self, name: str, config: dict[str, Any], folder: Path, config_file: str, model_def: str) -> None:
        super().__init__(name, config, folder)
        self.folder: Path = folder
        self.command = {"config_file": config_file, "model_def": model_def}
        self.trials, self.model_def_folder = expand_trials(config), Path(model_def).resolve()
        self.running: dict[int, RunningTrial] = {}
        self.durations: list[float] = []  # in seconds, of the trials that this process has seen complete

    def open_folder(self) -> None:
        """Make the folder, or take up a run of the same experiment in it."""
        stored = self.folder / "experiment.json"
        if stored.exists():
            key = first_difference(json.loads(stored.read_text(encoding="utf-8")), as_json(self.config))
            if key is not None:
                raise UserError(f"{self.folder} holds a run with another {key}; remove it, or choose another --output")
            for result in self._read_results():
                if result["state"] == "COMPLETED":
                    trial_id = result["trial_id"]
                    self.results[trial_id] = result
                    self.events[trial_id] = read_events(self.trial_folder(trial_id) / "events.jsonl")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "command.json", json.dumps(self.command) + "\n")
        if not stored.exists():
            write_atomically(stored, json.dumps(self.config, indent=2) + "\n")

    def _read_results(self) -> list[TrialResult]:
        file = self.folder / "trials.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def run(self, max_concurrent: int) -> int:
        """Run the trials that are not completed yet, `max_concurrent` at a time; returns how many failed."""
        waiting = [trial_id for trial_id in range(1, len(self.trials) + 1) if trial_id not in self.results]
        for trial_id in self.results:
            console.print(f"{self.describe(trial_id)}: completed before, kept")
        self.keep()  # what a kill may have kept from being written
        failed = 0
        with ExitStack() as stack:
            live = Live(console=console, transient=True, auto_refresh=False)
            if console.is_terminal:
                stack.enter_context(live)
            stack.callback(self.stop)  # at Ctrl-C, for one: no trial runs on unwatched
            live.update(self.progress_table(waiting), refresh=True)
            while waiting or self.running:
                while waiting and len(self.running) < max_concurrent:
                    self.start(waiting.pop(0), max_concurrent)
                time.sleep(POLL_SECONDS)
                for trial_id, trial in list(self.running.items()):
                    ended = not trial.process.is_alive()
                    trial.read()
                    if ended:
                        failed += self.finish(trial_id)["state"] == "ERROR"
                live.update(self.progress_table(waiting), refresh=True)
        return failed

    def start(self, trial_id: int, max_concurrent: int) -> None:
        folder = self.trial_folder(trial_id)
        folder.mkdir(parents=True, exist_ok=True)
        searcher = {**self.config["searcher"], "name": "single"}
        config = {**self.config, "hyperparameters": self.trials[trial_id - 1], "searcher": searcher}
        write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        script, *arguments = entrypoint_script(self.config)
        arguments += ["--config", str(folder / "config.yaml"), "--output", str(folder), "--trial-id", str(trial_id)]
        arguments += ["--cache", str(self.folder / "cache")]
        environment = {**os.environ, "LOCAL_CHECKPOINT_STORAGE": str(local_checkpoint_storage())}
        slot = min(set(range(max_concurrent)) - {trial.slot for trial in self.running.values()})
        threads = None
        if max_concurrent > 1:
            # Trials that share the cores by threads would wait for each other most of the time.
            threads = max(1, torch.get_num_threads() // max_concurrent)
            if torch.cuda.device_count() > 1:
                devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
                environment["CUDA_VISIBLE_DEVICES"] = devices.split(",")[slot % torch.cuda.device_count()]
        process = PROCESSES.Process(
            target=be_trial,
            args=(script, arguments, str(self.model_def_folder), environment, threads, str(self.log_of(trial_id))),
        )
        process.start()
        trial = self.running[trial_id] = RunningTrial(process, slot, folder)
        saved = trial.last("checkpoint")
        if saved:
            console.print(f"{self.describe(trial_id)}: resumes from step {saved['steps_completed']}", markup=False)
        elif not console.is_terminal:  # where there is no table to show that it is at work
            console.print(f"{self.describe(trial_id)}: started, log in {self.log_of(trial_id)}", markup=False)

    def finish(self, trial_id: int) -> TrialResult:
        """Keep what a trial whose process has ended leaves behind, and return its line of `trials.jsonl`."""
        trial = self.running.pop(trial_id)
        state = "ERROR" if trial.process.exitcode else "COMPLETED"
        result = summarize(trial_id, state, self.trials[trial_id - 1], trial.events, self.searcher)
        if state == "COMPLETED":
            delete_superseded(trial.events, best=result["checkpoint_uuid"])
        self.results[trial_id], self.events[trial_id] = result, trial.events
        self.keep()
        seconds = time.monotonic() - trial.started
        outcome = f"{self.describe(trial_id)}: {state} after {seconds:.0f} s"
        if state == "ERROR":
            outcome += f": {reason(trial.process.exitcode, self.log_of(trial_id))} (see {self.log_of(trial_id)})"
        else:
            self.durations.append(seconds)
            if self.searcher.metric in result["best_metrics"]:
                outcome += f", {self.searcher.metric} {result['best_metrics'][self.searcher.metric]:.4g}"
        console.print(outcome, markup=False)
        return result

    def stop(self) -> None:
        """End the trials that still run; each resumes from its latest checkpoint."""
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
        if self.running:
            self.draw()

    def keep(self) -> None:
        """Write `trials.jsonl`, the best checkpoint so far and the report anew."""
        lines = [json.dumps(self.results[trial_id]) + "\n" for trial_id in sorted(self.results)]
        write_atomically(self.folder / "trials.jsonl", "".join(lines))
        best = self.best()
        if best:
            write_atomically(self.folder / "best_checkpoint", best["checkpoint_uuid"] + "\n")
        self.draw()

    def draw(self) -> None:
        """Write the report, with what the running trials have reported so far."""
        drawn = copy.copy(self)
        drawn.results, drawn.events = dict(self.results), dict(self.events)
        for trial_id, trial in self.running.items():
            drawn.events[trial_id] = trial.events
            hparams = self.trials[trial_id - 1]
            drawn.results[trial_id] = summarize(trial_id, "UNFINISHED", hparams, trial.events, self.searcher)
        try:
            write_atomically(self.report_file, render(drawn))
        except Exception as error:  # nothing that it shows would be lost: the trials must go on
            console.print(f"{self.report_file} cannot be written: {type(error).__name__}: {error}", markup=False)

    @property
    def report_file(self) -> Path:
        return self.folder / "report.html"

    def trial_folder(self, trial_id: int) -> Path:
        return self.folder / "trials" / str(trial_id)

    def log_of(self, trial_id: int) -> Path:
        return self.trial_folder(trial_id) / "log.txt"

    def describe(self, trial_id: int) -> str:
        """`trial 2 of 9 (dpo_beta 0.1, learning_rate 5e-07)`."""
        varied = self.varied(self.trials[trial_id - 1])
        return f"trial {trial_id} of {len(self.trials)}" + (f" ({varied})" if varied else "")

    def winner(self) -> str | None:
        """`Best: trial 1 (as good: 3, 6; the first is taken), checkpoint ...`; None where no trial has the metric."""
        best = self.best()
        if best is None:
            return None
        tie = f" (as good: {', '.join(map(str, self.ties()))}; the first is taken)" if self.ties() else ""
        return f"Best: trial {best['trial_id']}{tie}, checkpoint {best['checkpoint_uuid']}"

    def progress_table(self, waiting: list[int]) -> Table:
        """What all trials are at, to be watched."""
        metric = self.searcher.metric
        table = Table(box=box.SIMPLE, pad_edge=False, caption=self.outlook(waiting), caption_justify="left")
        for name in ("trial", *map(short_name, self.varying)):
            table.add_column(name, justify="right")
        table.add_column("state", no_wrap=True, max_width=34, overflow="ellipsis")
        for name in ("step", short_name(metric), "left"):
            table.add_column(name, justify="right")
        for trial_id in self.watched(console.height - 8):
            hparams, state, step, metrics, left = self.trials[trial_id - 1], "waiting", "", {}, ""
            if trial_id in self.running:
                trial = self.running[trial_id]
                done = trial.progress[-1][1] if trial.progress else 0.0
                state = trial.status + (f" {done:.0%}" if done else "")
                step = str(trial.last("training").get("steps_completed", ""))
                metrics, left = trial.last("validation").get("metrics", {}), in_minutes(trial.seconds_left())
            elif trial_id in self.results:
                result = self.results[trial_id]
                state, step, metrics = result["state"], str(result["steps_completed"]), result["best_metrics"]
            cells = [str(trial_id), *(self.value(hparams, name) for name in self.varying), state, step]
            style = "bold" if trial_id in self.running else "dim" if state == "waiting" else None
            table.add_row(*cells, f"{metrics[metric]:.4g}" if metric in metrics else "", left, style=style)
        return table

    def watched(self, room: int) -> list[int]:
        """The trials that the table has room for: those that run, those that wait, and the last ones that are done."""
        trial_ids = range(1, len(self.trials) + 1)
        waiting = [i for i in trial_ids if i not in self.running and i not in self.results]
        order = [*self.running, *waiting, *sorted(self.results, reverse=True)]
        return sorted(order[: max(room, len(self.running))])

    def outlook(self, waiting: list[int]) -> str:
        """How many trials are done, and about how long the rest will take, once one has shown it."""
        done = f"{len(self.results)} of {len(self.trials)} trials done"
        if not self.durations or not (waiting or self.running):
            return done
        each = sum(self.durations) / len(self.durations)
        now = time.monotonic()
        left = len(waiting) * each + sum(max(0.0, each - (now - trial.started)) for trial in self.running.values())
        return f"{done}, about {in_minutes(left / max(1, len(self.running)))} left"

    def table(self) -> Table:
        metrics = list(dict.fromkeys([self.searcher.metric, *SHOWN_METRICS]))
        metrics = [m for m in metrics if any(m in result["best_metrics"] for result in self.results.values())]
        best = self.best()
        title = f"{self.name}: validations best by {self.searcher.metric}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
        states = {result["state"] for result in self.results.values()}
        shown = ["trial", *self.varying, *(["state"] if states != {"COMPLETED"} else []), "steps", *metrics]
        for name in shown:
            heading = short_name(name)
            table.add_column(heading, justify="right", no_wrap=name == "state", overflow="fold")
        for trial_id, result in sorted(self.results.items()):
            cells = {"trial": str(trial_id), "state": result["state"], "steps": str(result["steps_completed"])}
            cells |= {name: self.value(result["hparams"], name) for name in self.varying}
            cells |= {m: f"{result['best_metrics'][m]:.4g}" if m in result["best_metrics"] else "-" for m in metrics}
            style = "bold green" if best and trial_id == best["trial_id"] else None
            table.add_row(*(cells[name] for name in shown), style=style)
        return table


def start_importing() -> None:
    """Start the process that trials are forked from, so that it imports while this one looks at the data."""
    # For multiprocessing's own helper, which else warns on the terminal of a lock that a killed trial has left.
    sys.warnoptions.append("ignore:resource_tracker")
    PROCESSES.set_forkserver_preload(IMPORTS)
    if PROCESSES.get_start_method() == "forkserver":
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process to tell
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, handler)


def be_trial(
    script: str, arguments: list[str], model_def: str, environment: dict[str, str], threads: int | None, log: str
) -> None:
    """What a trial's process does: as `python SCRIPT ARGUMENTS >>LOG 2>&1` in `model_def`, but for the imports."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # data loading workers are forked, as ever
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    if threads is not None:
        torch.set_num_threads(threads)
    here = Path(__file__).resolve().parent.parent
    for name, module in list(sys.modules.items()):  # model_def may have others of these names
        file = Path(getattr(module, "__file__", None) or "/")
        if not name.startswith("__") and here in file.parents and ".venv" not in file.parts:
            del sys.modules[name]
    path = Path(model_def, script)
    sys.path[:] = [str(path.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]
    sys.argv = [script, *arguments]
    os.chdir(model_def)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing's processes end without


def end_with_parent() -> None:
    """End this process, as SIGKILL would, once the one that started it has ended in whatever way."""
    multiprocessing.parent_process().join()
    os._exit(1)


def in_minutes(seconds: float | None) -> str:
    """`0:05`, `12:34` or `1:02:03`."""
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def delete_superseded(events: list[TrialEvent], best: str | None) -> None:
    """Of a completed trial's checkpoints keep the best and the latest, as a cluster does unless it is told otherwise.

    (Determined's checkpoint_storage has save_trial_best: 1 and save_trial_latest: 1 by default.)
    """
    saved = [event["uuid"] for event in events if event["kind"] == "checkpoint"]
    for superseded in set(saved) - {best, *saved[-1:]}:
        shutil.rmtree(local_checkpoint_storage() / superseded, ignore_errors=True)


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """The dotted name of the first key in which two configs differ; None where they are the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if old == new else key


def reason(exitcode: int, log: Path) -> str:
    """Why a trial's process failed: the signal that ended it, or the last thing it said."""
    if exitcode < 0:
        return f"ended by {signal.Signals(-exitcode).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config_file", metavar="CONFIG.yaml", help="the experiment, as for det e create")
    parser.add_argument(
        "model_def", metavar="MODEL_DEF", nargs="?", default=".", help="folder the entrypoint runs in (default: .)"
    )
    parser.add_argument(
        "--config",
        metavar="key=value",
        action="append",
        default=[],
        help="override a key of the YAML, e.g. --config hyperparameters.training_args.max_steps=10; repeatable",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="default: local_runs/<experiment name>; with --dry-run, the page to write: FILE.html, or"
        " a folder for its dry_run.html (default: none)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing, and need no weights: show what would be learned, token by token, what the length limits"
        " take away, and what the training would cost in steps and memory",
    )
    parser.add_argument(
        "--examples", metavar="N", type=int, default=1, help="rows of each source that --dry-run shows (default: 1)"
    )
    parser.add_argument(
        "--max-concurrent",
        metavar="N",
        type=int,
        default=1,
        help="trials at a time (default: 1): each needs memory of its own, and they share cores and GPUs",
    )
    return parser.parse_args()


@exit_on_user_error
def main() -> int:
    args = parse_arguments()
    config = read_experiment_config(args.config_file, args.config)
    model_def = Path(args.model_def).resolve()
    script = entrypoint_script(config)[0]
    if not (model_def / script).is_file():
        raise UserError(f"entrypoint script {script}: not in MODEL_DEF, {model_def}")
    if args.examples < 0:
        raise UserError(f"--examples {args.examples} is not at least 0")
    if args.max_concurrent < 1:
        raise UserError(f"--max-concurrent {args.max_concurrent} is not at least 1")
    if not args.dry_run:
        start_importing()
    name = str(config.get("name", Path(args.config_file).stem))
    folder = Path(args.output or Path("local_runs") / name.replace("/", "_")).resolve()
    experiment = LocalExperiment(name, config, folder, args.config_file, args.model_def)

    hide_progress_bars_in_logs()
    started_in = Path.cwd()
    os.chdir(model_def)  # relative paths in the YAML are the script's
    trials = parse_trials(Path(script).name, experiment.trials, experiment.searcher.metric)
    if args.dry_run:
        if not trials:
            raise UserError(f"--dry-run knows sft_finetune.py and dpo_finetune.py, not {script}")
        from experiment.dry_run import dry_run, show, write  # it takes seconds

        if not console.is_terminal:
            console.width = max(console.width, 120)  # of a log file
        sections = []
        try:
            for section in dry_run(experiment, trials, args.examples):
                show(section, console)
                sections.append(section)
        finally:
            if args.output and sections:  # of one that finds a mistake, too
                console.print(f"Written to {write(sections, name, started_in / args.output)}", markup=False)
        return 0
    check_sources(trials)
    with only_writer(folder):
        experiment.open_folder()
        failed = experiment.run(args.max_concurrent)

    os.chdir(started_in)
    console.print(experiment.table())
    winner = experiment.winner()
    if winner:
        console.print(winner)
    console.print(f"Report: {experiment.report_file}", markup=False)
    command = next_command(experiment)
    if command:
        console.print(f"Next: {command}", markup=False)
    return 1 if failed else 0
