"""The results of an experiment, on this machine or on a cluster: what each trial reported, and which one is best."""

import functools
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NotRequired, TypedDict, TypeVar, cast

import numpy as np
from determined.experimental import Determined
from determined.experimental.client import ExperimentState
from rich.progress import track

from config.experiment import drawn_ranges, entrypoint_script, expand_trials, varying_hyperparameters
from config.search import DRAWING, HALVING
from config.validation import is_uuid
from errors import UserError, reading
from experiment.kinds import kind_of
from metrics.evaluations import FILE as EVALUATIONS
from metrics.evaluations import Evaluations, LogRatios, read_evaluations
from storage.checkpoints import local_checkpoint_storage
from storage.cluster_checkpoints import download_files, one_line_cluster_errors
from storage.files import is_object, read_json_lines
from trial.events import TrialEvent, events_by_step, is_metrics, read_events

T = TypeVar("T")


class TrialResult(TypedDict):
    """One line of `trials.jsonl`."""

    trial_id: int
    state: str  # Determined's: COMPLETED, ERROR, CANCELED ...; UNFINISHED off the cluster
    hparams: dict[str, Any]
    steps_completed: int
    metrics: dict[str, float]  # of the last validation
    best_metrics: dict[str, float]  # of the best checkpoint's validation
    checkpoint_uuid: str | None  # the best checkpoint that was validated when it was saved, else the last one
    error: NotRequired[str]  # of a trial in the state ERROR: why it failed


FIELDS = {
    "trial_id": int,
    "state": str,
    "steps_completed": int,
    "checkpoint_uuid": str | None,
    "error": str | None,
}  # of a TrialResult


class Searcher:
    """The part of the searcher's config that ranks trials."""

    def __init__(self, config: dict[str, Any]) -> None:
        searcher = config["searcher"]
        if not searcher.get("metric"):
            raise UserError("searcher.metric is missing: it ranks the trials")
        self.metric: str = searcher["metric"]
        self.smaller_is_better: bool = searcher.get("smaller_is_better", True)  # Determined's default

    def best(self, items: Iterable[T], metrics_of: Callable[[T], dict[str, float]]) -> T | None:
        """Return the item whose metrics are best, the first of equals; None if no item has a finite value."""
        return next(iter(self.rank(items, metrics_of)), None)

    def rank(self, items: Iterable[T], metrics_of: Callable[[T], dict[str, float]]) -> list[T]:
        """Return the items that have a finite value of the metric, best first, equals in the order given."""
        sign = 1 if self.smaller_is_better else -1
        scored = [item for item in items if math.isfinite(metrics_of(item).get(self.metric, math.nan))]
        return sorted(scored, key=lambda item: sign * metrics_of(item)[self.metric])


class Experiment:
    """An experiment's config and, by trial id, the result of each trial and its events in order.

    `folder` is where `local_experiment.py` keeps the experiment, `number` is what a cluster calls it: one of them is
    None.
    """

    def __init__(
        self, name: str, config: dict[str, Any], folder: Path | None = None, number: int | None = None
    ) -> None:
        self.name, self.config, self.folder, self.number = name, config, folder, number
        self.paused = False
        self.searcher, self.varying = Searcher(config), varying_hyperparameters(config)
        self.draws = config["searcher"].get("name") in DRAWING  # values, so its trials are no grid
        self.ranges = drawn_ranges(config)
        self.script = Path(entrypoint_script(config)[0]).name  # the file name of the entrypoint
        self.kind = kind_of(self.script)  # None for a script that is not this project's
        self.results: dict[int, TrialResult] = {}
        self.events: dict[int, list[TrialEvent]] = {}
        self.damaged = 0  # lines of trials.jsonl
        self.evaluations: dict[int, Evaluations] = {}  # by trial id
        self.unreachable = ""  # why they could not be read

    def plan_trials(self) -> list[dict[str, Any]]:
        """Return the hyperparameters of every trial, started or not; of a cluster's draws, only of those that started.

        (What a master draws may depend on chance: see config/search.py.)
        """
        if not (self.draws and self.folder is None):
            with suppress(UserError):  # of what only a cluster runs, such as a grid of thousands of trials
                return expand_trials(self.config)
        return [result["hparams"] for result in self.results.values()]

    def stopped_early(self, result: TrialResult) -> bool:
        """Return whether the search stopped a trial before it had trained as long as it could have."""
        searcher = self.config["searcher"]
        if searcher.get("name") not in HALVING or result["state"] != "COMPLETED":
            return False
        return result["metrics"].get(str(searcher.get("time_metric")), 0) < (searcher.get("max_time") or 0)

    def state(self, result: TrialResult) -> str:
        """Return Determined's name of a trial's state, or that it was stopped early: COMPLETED covers both."""
        return "STOPPED_EARLY" if self.stopped_early(result) else result["state"]

    def axes(self) -> dict[str, list[str]]:
        """Return the different values of each hyperparameter that varies: numbers by size, others as they come."""
        axes = {name: list(dict.fromkeys(self.value(h, name) for h in self.plan_trials())) for name in self.varying}
        for values in axes.values():
            with suppress(ValueError):
                values.sort(key=float)
        return axes

    def rank_trials(self) -> list[TrialResult]:
        """Return the results of the completed trials that have the searcher's metric, best first."""
        completed = [result for _, result in sorted(self.results.items()) if result["state"] == "COMPLETED"]
        return self.searcher.rank(completed, lambda result: result["best_metrics"])

    def best(self) -> TrialResult | None:
        """Return the best completed trial, the first of equals."""
        return next(iter(self.rank_trials()), None)

    def failures(self) -> list[str]:
        """Return a line for each trial that failed, with the reason if it is known."""
        failed = [result for _, result in sorted(self.results.items()) if result.get("error")]
        return [f"Trial {result['trial_id']} failed: {result['error']}" for result in failed]

    def keep_evaluations(self, trial_id: int, read: Callable[[str], Evaluations | None]) -> None:
        """Remember what a trial's checkpoints keep of its evaluations, as `read` finds it by the UUID of one.

        The latest has all of them. The best lacks its own where the trial was preempted in it, and made up for it
        later; it is read only if the latest is gone.
        """
        saved = events_by_step(self.events.get(trial_id, []), "checkpoint").values()
        uuids = [*[event["uuid"] for event in saved][-1:], self.results[trial_id]["checkpoint_uuid"]]
        if found := next(filter(None, map(read, filter(None, dict.fromkeys(uuids)))), None):
            self.evaluations[trial_id] = found

    def log_ratios(self, result: TrialResult) -> LogRatios | None:
        """Return the log-ratios of a trial's checkpoint on its held-out pairs; None if it keeps none."""
        evaluations, step = self.evaluations.get(result["trial_id"]), self.step_of(result)
        found = evaluations.steps.get(step) if evaluations and evaluations.rows and step else None
        return found if found and np.isfinite(found.margins).all() else None

    def step_of(self, result: TrialResult) -> int | None:
        """Return the step at which a trial's checkpoint was saved; None if it is not known."""
        saved = events_by_step(self.events.get(result["trial_id"], []), "checkpoint")
        return next((step for step, event in saved.items() if event["uuid"] == result["checkpoint_uuid"]), None)

    def get(self, hparams: dict[str, Any], name: str) -> Any:
        """Return the hyperparameter with this dotted name."""
        return functools.reduce(operator.getitem, name.split("."), hparams)

    def value(self, hparams: dict[str, Any], name: str) -> str:
        """Return the hyperparameter with this dotted name as a user would write it."""
        value = self.get(hparams, name)
        digits = ".3g" if name in self.ranges else "g"
        return f"{value:{digits}}" if isinstance(value, float) else str(value)

    def values(self, hparams: dict[str, Any]) -> list[str]:
        """Return the hyperparameters that vary, each as a user would write it."""
        return [self.value(hparams, name) for name in self.varying]

    def describe_values(self, hparams: dict[str, Any]) -> str:
        """Return what tells a trial from the others: `dpo_beta 0.1, learning_rate 5e-07`."""
        return ", ".join(f"{short_name(name)} {self.value(hparams, name)}" for name in self.varying)


def short_name(name: str) -> str:
    """Return the last part of a hyperparameter's or metric's name: `learning_rate`, `accuracies`."""
    return name.split(".")[-1].split("/")[-1]


def flatten(level: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of nested dicts with its dotted name."""
    for name, value in level.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def summarize(
    trial_id: int, state: str, hparams: dict[str, Any], events: list[TrialEvent], searcher: Searcher
) -> TrialResult:
    """Return a trial's line of `trials.jsonl`, from its events."""
    validations = {step: event["metrics"] for step, event in events_by_step(events, "validation").items()}
    checkpoints = {step: event["uuid"] for step, event in events_by_step(events, "checkpoint").items()}
    best_step = searcher.best([step for step in validations if step in checkpoints], lambda step: validations[step])
    saved_step = max(checkpoints, default=-1) if best_step is None else best_step
    return {
        "trial_id": trial_id,
        "state": state,
        "hparams": hparams,
        "steps_completed": max((e["steps_completed"] for e in events if "steps_completed" in e), default=0),
        "metrics": validations[max(validations)] if validations else {},
        "best_metrics": {} if best_step is None else validations[best_step],
        "checkpoint_uuid": checkpoints.get(saved_step),
    }


def read_results(folder: Path, trials: list[dict[str, Any]]) -> tuple[dict[int, TrialResult], int]:
    """Return the results in an experiment's `trials.jsonl`, and how many of its lines are damaged.

    `trials` are the hyperparameters of the experiment's trials.
    """
    results: dict[int, TrialResult] = {}
    lines = read_json_lines(folder / "trials.jsonl")
    for line in lines:
        whole = is_object(line, FIELDS) and is_metrics(line.get("metrics")) and is_metrics(line.get("best_metrics"))
        saved = whole and (
            is_uuid(line.get("checkpoint_uuid")) or not (line.get("checkpoint_uuid") or line["best_metrics"])
        )
        if saved and line["trial_id"] in range(1, len(trials) + 1):
            results[line["trial_id"]] = cast(TrialResult, {**line, "hparams": trials[line["trial_id"] - 1]})
    return results, len(lines) - len(results)


def read_local_config(folder: Path) -> dict[str, Any]:
    """Read an experiment's `experiment.json`. Raises `UserError` if it is missing, damaged or something else."""
    path = folder / "experiment.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no experiment: experiment.json is missing (local_experiment.py writes it)")
    with reading(path):
        config = json.loads(path.read_bytes())
        whole = is_object(config, {"hyperparameters": dict, "searcher": dict})
        if not (whole and is_object(config["searcher"], {"metric": str})):
            raise UserError(f"{path}: not an experiment's config")
    return config


def read_local(folder: Path) -> Experiment:
    """Read an experiment from its folder, unfinished trials too. Raises `UserError` if it cannot be read."""
    config = read_local_config(folder)
    with reading(folder / "experiment.json"):
        experiment = Experiment(str(config.get("name") or folder.resolve().name), config, folder)
        trials = expand_trials(config)
    experiment.results, experiment.damaged = read_results(folder, trials)
    for trial_id, hparams in enumerate(trials, start=1):
        if events := read_events(folder / "trials" / str(trial_id) / "events.jsonl"):
            experiment.events[trial_id] = events
            unfinished = summarize(trial_id, "UNFINISHED", hparams, events, experiment.searcher)
            experiment.results.setdefault(trial_id, unfinished)
    for trial_id in experiment.results:
        experiment.keep_evaluations(trial_id, lambda uuid: read_evaluations(local_checkpoint_storage() / uuid))
    return experiment


def read_cluster(source: str) -> Experiment:
    """Read the experiment `exp:NUMBER` from the cluster of DET_MASTER. Raises `UserError` if it cannot be read."""
    number = source.removeprefix("exp:")
    if not number.isdecimal():
        raise UserError(f"{source!r}: exp: must be followed by the number of the experiment")
    with one_line_cluster_errors(source, "experiment"):
        found = Determined().get_experiment(int(number))
        experiment = Experiment(found.name or source, found.config or {}, number=found.id)
        experiment.paused = found.state is ExperimentState.PAUSED
        for trial in track(found.list_trials(), f"{source}: reading its trials"):
            checkpoints = trial.list_checkpoints()
            events = experiment.events[trial.id] = list(_cluster_events(trial, checkpoints))
            state, hparams = trial.state.name if trial.state else "UNKNOWN", trial.hparams or {}
            if experiment.paused and state in ("ACTIVE", "QUEUED"):  # as a master calls a trial without a container
                state = "PAUSED"
            experiment.results[trial.id] = summarize(trial.id, state, hparams, events, experiment.searcher)
            saved = {checkpoint.uuid: checkpoint for checkpoint in checkpoints}
            experiment.keep_evaluations(trial.id, functools.partial(_download_evaluations, experiment, saved))
    return experiment


def _download_evaluations(experiment: Experiment, saved: dict[str, Any], uuid: str) -> Evaluations | None:
    """Return what a checkpoint keeps of its trial's evaluations: one small file of it."""
    with TemporaryDirectory() as folder:
        try:
            if not experiment.unreachable:  # what cannot be reached once is not tried again for each trial
                download_files(saved[uuid], EVALUATIONS, Path(folder))
        except UserError as error:
            experiment.unreachable = str(error)
        return read_evaluations(Path(folder))


def _cluster_events(trial: Any, checkpoints: list[Any]) -> Iterator[TrialEvent]:
    """Yield what a trial reported to its master, and those of its checkpoints that the cluster still has."""
    for kind in ("training", "validation"):
        for reported in trial.iter_metrics(kind):
            metrics = {}
            for name, value in reported.metrics.items():
                with suppress(TypeError, ValueError):  # NaN and Infinity come as text; any other text is not a metric
                    metrics[name] = float(value)
            yield {"kind": kind, "steps_completed": reported.steps_completed, "metrics": metrics}
    for checkpoint in checkpoints:
        steps = (checkpoint.metadata or {}).get("steps_completed")  # there if one of this project's trials saved it
        if checkpoint.state is not None and checkpoint.state.name == "COMPLETED" and steps is not None:
            yield {"kind": "checkpoint", "steps_completed": int(steps), "uuid": checkpoint.uuid}
