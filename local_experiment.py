"""Run an experiment on this machine as `det e create CONFIG.yaml MODEL_DEF --config key=value` would on a cluster.

    python local_experiment.py sft.yaml
    python local_experiment.py dpo.yaml --config hyperparameters.model_ckpt=UUID

Each trial is a process of its own that runs the YAML's entrypoint script. DIR (default: local_runs/<experiment name>)
receives

    experiment.json      the config with its overrides
    trials.jsonl         a line a trial: trial_id, state, hparams, steps_completed, metrics (of the last validation),
                         best_metrics, checkpoint_uuid
    best_checkpoint      the UUID of the best trial's checkpoint
    trials/<trial_id>/   its config.yaml, log.txt and reports.jsonl

checkpoint_uuid is, of the checkpoints that were validated when they were saved, the best one by searcher.metric, and
best_metrics are its metrics: what ranks a trial is what one gets from it. (The last step is always validated and
saved.) Checkpoints are kept in local_runs/checkpoints (LOCAL_CHECKPOINT_STORAGE moves it), for later runs to start
from by UUID. Started again with the same config and DIR, finished trials are kept and an interrupted one goes on from
its latest checkpoint.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from checkpoints import local_checkpoint, local_checkpoint_storage
from dataset_utils import load_dpo_dataset, load_sft_dataset
from experiment_config import entrypoint_script, expand_trials, read_experiment_config, varying_hyperparameters
from hyperparameters import DPOHyperparameters, SFTHyperparameters, check_searcher_metric, parse_hyperparameters
from models import check_source
from trial import as_json, hide_progress_bars_in_logs, read_reports
from user_error import UserError, exit_on_user_error

POLL_SECONDS = 0.2
SHOWN_METRICS = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")

console = Console(soft_wrap=True, highlight=False)


class Searcher:
    """The part of the searcher's config that ranks trials."""

    def __init__(self, config: dict[str, Any]) -> None:
        searcher = config["searcher"]
        if not searcher.get("metric"):
            raise UserError("searcher.metric is missing: it ranks the trials")
        self.metric: str = searcher["metric"]
        self.smaller_is_better: bool = searcher.get("smaller_is_better", True)  # Determined's default

    def best(self, items: list[Any], metrics_of: Callable[[Any], dict[str, float]]) -> Any | None:
        """The item whose metrics are best, the first of equals; None where none has a finite value of the metric."""
        scored = [item for item in items if math.isfinite(metrics_of(item).get(self.metric, math.nan))]
        sign = 1 if self.smaller_is_better else -1
        return min(scored, key=lambda item: sign * metrics_of(item)[self.metric], default=None)


def check_trials(script: str, trials: list[dict[str, Any]], metric: str) -> None:
    """Find a user's mistakes before anything is written: those of each trial's hyperparameters, data and model.

    It knows this project's two entrypoints; what another script wants is its own business.
    """
    cls = {"sft_finetune.py": SFTHyperparameters, "dpo_finetune.py": DPOHyperparameters}.get(script)
    if cls is None:
        return
    check_searcher_metric(cls, metric)
    parsed = [parse_hyperparameters(cls, hparams) for hparams in trials]
    if cls is SFTHyperparameters:
        loads = {str((h.dataset, h.dataset_subsets, h.split_seed)): h for h in parsed}
        for h in loads.values():
            load_sft_dataset(h.dataset, h.dataset_subsets, h.split_seed)
        for h in parsed:
            check_source(h.model_name, "model_name")
    else:
        for h in parsed:
            if h.model_ckpt:
                local_checkpoint(h.model_ckpt, "model_ckpt")
            else:
                check_source(h.model_name, "model_name")
        for h in {str((h.datasets, h.split_seed)): h for h in parsed}.values():
            load_dpo_dataset(h.datasets, h.split_seed)
        for start in {h.start: None for h in parsed}:
            console.print(start, markup=False)


class Experiment:
    """An experiment's folder and what is known of its trials."""

    def __init__(self, config: dict[str, Any], trials: list[dict[str, Any]], folder: Path) -> None:
        self.config, self.trials, self.folder = config, trials, folder
        self.searcher = Searcher(config)
        self.varying = varying_hyperparameters(config)
        self.results: dict[int, dict[str, Any]] = {}

    def open_folder(self) -> None:
        """Make the folder, or take up a run of the same experiment in it."""
        stored = self.folder / "experiment.json"
        if stored.exists():
            key = first_difference(json.loads(stored.read_text(encoding="utf-8")), as_json(self.config))
            if key is not None:
                raise UserError(f"{self.folder} holds a run with another {key}; remove it, or choose another --output")
            for result in self._read_results():
                if result["state"] == "COMPLETED":
                    self.results[result["trial_id"]] = result
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(stored, json.dumps(self.config, indent=2) + "\n")

    def _read_results(self) -> list[dict[str, Any]]:
        file = self.folder / "trials.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def run(self, model_def: Path) -> int:
        """Run the trials that are not completed yet, one after another; returns how many failed."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        failed = 0
        with Progress(
            *columns, TimeElapsedColumn(), TextColumn("{task.fields[status]}"), console=console, transient=True
        ) as progress:
            for trial_id in range(1, len(self.trials) + 1):
                if trial_id in self.results:
                    console.print(f"{self.describe(trial_id)}: completed before, kept")
                    continue
                started = time.monotonic()
                if not console.is_terminal:  # where there is no bar to show that it is at work
                    console.print(f"{self.describe(trial_id)}: started, log in {self.log_of(trial_id)}", markup=False)
                result = self.run_trial(trial_id, model_def, progress)
                self.keep(result)
                outcome = f"{self.describe(trial_id)}: {result['state']} after {time.monotonic() - started:.0f} s"
                if result["state"] == "ERROR":
                    failed += 1
                    outcome += f": {result['error']} (see {self.log_of(trial_id)})"
                elif self.searcher.metric in result["best_metrics"]:
                    outcome += f", {self.searcher.metric} {result['best_metrics'][self.searcher.metric]:.4g}"
                console.print(outcome, markup=False)
        return failed

    def run_trial(self, trial_id: int, model_def: Path, progress: Progress) -> dict[str, Any]:
        """Run one trial to its end and return its line of `trials.jsonl`, with the `error` of a failed one."""
        hparams = self.trials[trial_id - 1]
        folder = self.folder / "trials" / str(trial_id)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config, "hyperparameters": hparams, "searcher": {**self.config["searcher"], "name": "single"}}
        write_whole(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        command = [
            *(sys.executable, *entrypoint_script(self.config)),
            *("--config", str(folder / "config.yaml"), "--output", str(folder), "--trial-id", str(trial_id)),
        ]
        environment = {
            **os.environ,
            "LOCAL_CHECKPOINT_STORAGE": str(local_checkpoint_storage()),
            "PYTHONUNBUFFERED": "1",
        }
        bar = progress.add_task(self.describe(trial_id), total=1.0, status="starting")
        saved = [r for r in read_reports(folder / "reports.jsonl") if r["kind"] == "checkpoint"]
        if saved:
            console.print(f"{self.describe(trial_id)}: resumes from step {saved[-1]['steps_completed']}", markup=False)
        with self.log_of(trial_id).open("a", encoding="utf-8") as log:
            process = subprocess.Popen(command, cwd=model_def, env=environment, stdout=log, stderr=log)
            try:
                while process.poll() is None:
                    time.sleep(POLL_SECONDS)
                    self._show(read_reports(folder / "reports.jsonl"), progress, bar)
            except BaseException:  # Ctrl-C among them: the trial must not run on unwatched
                process.terminate()
                process.wait()
                raise
        progress.remove_task(bar)
        reports = read_reports(folder / "reports.jsonl")
        if process.returncode != 0:
            result = summarize(trial_id, "ERROR", hparams, reports, self.searcher)
            return {**result, "error": last_line(self.log_of(trial_id))}
        result = summarize(trial_id, "COMPLETED", hparams, reports, self.searcher)
        delete_superseded(reports, best=result["checkpoint_uuid"])
        return result

    def log_of(self, trial_id: int) -> Path:
        return self.folder / "trials" / str(trial_id) / "log.txt"

    def _show(self, reports: list[dict[str, Any]], progress: Progress, bar: Any) -> None:
        last = {report["kind"]: report for report in reports}
        status = last.get("status", {}).get("status", "starting")
        metrics = last.get("validation", {}).get("metrics", {})
        if self.searcher.metric in metrics:
            status = f"{self.searcher.metric} {metrics[self.searcher.metric]:.4g}"
        progress.update(bar, completed=last.get("progress", {}).get("progress", 0.0), status=status)

    def describe(self, trial_id: int) -> str:
        """`trial 2 of 9 (dpo_beta 0.1, learning_rate 5e-07)`."""
        values = [f"{name.split('.')[-1]} {self.value(trial_id, name)}" for name in self.varying]
        return f"trial {trial_id} of {len(self.trials)}" + (f" ({', '.join(values)})" if values else "")

    def value(self, trial_id: int, name: str) -> str:
        value: Any = self.trials[trial_id - 1]
        for key in name.split("."):
            value = value[key]
        return f"{value:g}" if isinstance(value, float) else str(value)

    def keep(self, result: dict[str, Any]) -> None:
        """Write `trials.jsonl` anew with `result` in it, and the best checkpoint so far."""
        line = {name: result[name] for name in result if name != "error"}
        self.results[result["trial_id"]] = line
        lines = [json.dumps(self.results[trial_id]) + "\n" for trial_id in sorted(self.results)]
        write_whole(self.folder / "trials.jsonl", "".join(lines))
        best = self.best()
        if best:
            write_whole(self.folder / "best_checkpoint", best["checkpoint_uuid"] + "\n")

    def best(self) -> dict[str, Any] | None:
        completed = [result for result in self.results.values() if result["state"] == "COMPLETED"]
        return self.searcher.best(sorted(completed, key=lambda r: r["trial_id"]), lambda r: r["best_metrics"])

    def winner(self) -> str | None:
        """`Best: trial 1 (as good: 3, 6; the first is taken), checkpoint ...`; None where no trial has the metric."""
        best = self.best()
        if best is None:
            return None
        metric = self.searcher.metric
        equals = [
            str(trial_id)
            for trial_id, result in sorted(self.results.items())
            if trial_id != best["trial_id"] and result["best_metrics"].get(metric) == best["best_metrics"][metric]
        ]
        tie = f" (as good: {', '.join(equals)}; the first is taken)" if equals else ""
        return f"Best: trial {best['trial_id']}{tie}, checkpoint {best['checkpoint_uuid']}"

    def table(self) -> Table:
        metrics = list(dict.fromkeys([self.searcher.metric, *SHOWN_METRICS]))
        metrics = [m for m in metrics if any(m in result["best_metrics"] for result in self.results.values())]
        best = self.best()
        title = f"{self.config.get('name', self.folder.name)}: validations best by {self.searcher.metric}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
        states = {result["state"] for result in self.results.values()}
        shown = ["trial", *self.varying, *(["state"] if states != {"COMPLETED"} else []), "steps", *metrics]
        for name in shown:
            heading = name.removeprefix("training_args.").split("/")[-1]
            table.add_column(heading, justify="right", no_wrap=name == "state", overflow="fold")
        for trial_id, result in sorted(self.results.items()):
            cells = {"trial": str(trial_id), "state": result["state"], "steps": str(result["steps_completed"])}
            cells |= {name: self.value(trial_id, name) for name in self.varying}
            cells |= {m: f"{result['best_metrics'][m]:.4g}" if m in result["best_metrics"] else "-" for m in metrics}
            style = "bold green" if best and trial_id == best["trial_id"] else None
            table.add_row(*(cells[name] for name in shown), style=style)
        return table


def summarize(
    trial_id: int, state: str, hparams: dict[str, Any], reports: list[dict[str, Any]], searcher: Searcher
) -> dict[str, Any]:
    """A trial's line of `trials.jsonl`, from what it reported."""
    # By step: after a resume the steps since the checkpoint are reported once more.
    validations = {r["steps_completed"]: r["metrics"] for r in reports if r["kind"] == "validation"}
    checkpoints = {r["steps_completed"]: r["uuid"] for r in reports if r["kind"] == "checkpoint"}
    best_step = searcher.best([step for step in validations if step in checkpoints], lambda step: validations[step])
    return {
        "trial_id": trial_id,
        "state": state,
        "hparams": hparams,
        "steps_completed": max((r["steps_completed"] for r in reports if "steps_completed" in r), default=0),
        "metrics": validations[max(validations)] if validations else {},
        "best_metrics": validations.get(best_step, {}),
        "checkpoint_uuid": checkpoints.get(best_step, checkpoints[max(checkpoints)] if checkpoints else None),
    }


def delete_superseded(reports: list[dict[str, Any]], best: str | None) -> None:
    """Of a completed trial's checkpoints keep the best and the latest, as a cluster does unless it is told otherwise.

    (Determined's checkpoint_storage has save_trial_best: 1 and save_trial_latest: 1 by default.)
    """
    saved = [report["uuid"] for report in reports if report["kind"] == "checkpoint"]
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


def next_command(experiment: Experiment, config_path: str, model_def: str) -> str | None:
    """The command that a user would type next, or None for an entrypoint that is not this project's."""
    best, script = experiment.best(), Path(entrypoint_script(experiment.config)[0]).name
    if best is None:
        return None
    checkpoint, hparams = best["checkpoint_uuid"], best["hparams"]
    if script == "sft_finetune.py":
        dpo_config = Path(config_path).with_name(Path(config_path).name.replace("sft", "dpo"))
        if not dpo_config.exists() or dpo_config == Path(config_path):
            dpo_config = Path("dpo.yaml")  # with preference data of the user's choice
        # The base model goes along, for the comparison at the end to set against the tuned ones.
        overrides = {"model_ckpt": checkpoint, "model_name": hparams["model_name"]}
        words = [word for key, value in overrides.items() for word in ("--config", f"hyperparameters.{key}={value}")]
        return "python " + shlex.join(["local_experiment.py", str(dpo_config), model_def, *words])
    if script == "dpo_finetune.py":
        models = {"base": hparams.get("model_name"), "sft": hparams.get("model_ckpt"), "dpo": checkpoint}
        words = [word for name, source in models.items() if source for word in ("--model", f"{name}={source}")]
        words += ["--dataset", hparams["datasets"][0]]
        data_seed = hparams.get("training_args", {}).get("data_seed")
        if data_seed is not None:  # it decides which rows were held out
            words += ["--data-seed", str(data_seed)]
        return "python " + shlex.join(["inference.py", *words])
    return None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a restart after a kill, finds the old text or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def last_line(log: Path) -> str:
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
    parser.add_argument("--output", metavar="DIR", help="default: local_runs/<experiment name>")
    return parser.parse_args()


@exit_on_user_error
def main() -> int:
    args = parse_arguments()
    config = read_experiment_config(args.config_file, args.config)
    trials = expand_trials(config)
    model_def = Path(args.model_def).resolve()
    script = entrypoint_script(config)[0]
    if not (model_def / script).is_file():
        raise UserError(f"entrypoint script {script}: not in MODEL_DEF, {model_def}")
    name = str(config.get("name", Path(args.config_file).stem)).replace("/", "_")
    folder = Path(args.output or Path("local_runs") / name).resolve()
    experiment = Experiment(config, trials, folder)

    hide_progress_bars_in_logs()
    started_in = Path.cwd()
    os.chdir(model_def)  # relative paths in the YAML are the script's
    check_trials(Path(script).name, trials, experiment.searcher.metric)
    experiment.open_folder()

    failed = experiment.run(model_def)

    os.chdir(started_in)
    console.print(experiment.table())
    winner = experiment.winner()
    if winner:
        console.print(winner)
    command = next_command(experiment, args.config_file, args.model_def)
    if command:
        console.print(f"Next: {command}", markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: the same command again goes on from here", file=sys.stderr)
        sys.exit(130)
