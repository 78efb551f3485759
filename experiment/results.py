"""What came out of an experiment, on this machine or on a cluster: its trials' reports, and the best of them."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config.experiment import entrypoint_script, varying_hyperparameters
from errors import UserError
from trial.events import TrialEvent, events_by_step


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
        return next(iter(self.ranked(items, metrics_of)), None)

    def ranked(self, items: list[Any], metrics_of: Callable[[Any], dict[str, float]]) -> list[Any]:
        """The items with a finite value of the metric, the best first, equals in the order given."""
        sign = 1 if self.smaller_is_better else -1
        scored = [item for item in items if math.isfinite(metrics_of(item).get(self.metric, math.nan))]
        return sorted(scored, key=lambda item: sign * metrics_of(item)[self.metric])


class Experiment:
    """An experiment's config and, by trial id, what is known of its trials.

    `results` holds lines of `trials.jsonl` (see `summarize`), `reports` what each trial reported, in order.
    `config_file` and `model_def` are what it was started with on this machine.
    """

    on_cluster = False

    def __init__(self, name: str, config: dict[str, Any], config_file: str = "sft.yaml", model_def: str = ".") -> None:
        self.name, self.config, self.config_file, self.model_def = name, config, config_file, model_def
        self.searcher = Searcher(config)
        self.varying = varying_hyperparameters(config)
        self.results: dict[int, dict[str, Any]] = {}
        self.reports: dict[int, list[TrialEvent]] = {}

    @property
    def script(self) -> str:
        """The file name of its entrypoint."""
        return Path(entrypoint_script(self.config)[0]).name

    def ranked(self) -> list[dict[str, Any]]:
        """The results of the completed trials that have the searcher's metric, the best first."""
        completed = [self.results[trial_id] for trial_id in sorted(self.results)]
        completed = [result for result in completed if result["state"] == "COMPLETED"]
        return self.searcher.ranked(completed, lambda result: result["best_metrics"])

    def best(self) -> dict[str, Any] | None:
        return next(iter(self.ranked()), None)

    def ties(self) -> list[int]:
        """The trials that are as good as the best one."""
        ranked, metric = self.ranked(), self.searcher.metric
        return [r["trial_id"] for r in ranked[1:] if r["best_metrics"][metric] == ranked[0]["best_metrics"][metric]]

    def value(self, hparams: dict[str, Any], name: str) -> str:
        """A hyperparameter by its dotted name, as a user would write it."""
        value: Any = hparams
        for key in name.split("."):
            value = value[key]
        return f"{value:g}" if isinstance(value, float) else str(value)

    def varied(self, hparams: dict[str, Any]) -> str:
        """What tells a trial from the others: `dpo_beta 0.1, learning_rate 5e-07`."""
        return ", ".join(f"{short_name(name)} {self.value(hparams, name)}" for name in self.varying)

    def source(self, ckpt_uuid: str) -> str:
        """A checkpoint as `inference.py --model` takes it."""
        return f"ckpt:{ckpt_uuid}" if self.on_cluster else ckpt_uuid

    def compare_command(self) -> str | None:
        """The comparison of the best DPO model with what it came from; None for other experiments."""
        best = self.best()
        if best is None or self.script != "dpo_finetune.py":
            return None
        hparams = best["hparams"]
        sft = hparams.get("model_ckpt")
        models = {"base": hparams.get("model_name"), "sft": sft and self.source(sft)}
        models["dpo"] = self.source(best["checkpoint_uuid"])
        words = [word for name, source in models.items() if source for word in ("--model", f"{name}={source}")]
        if models["sft"]:  # what DPO's own rewards are measured against
            words += ["--reference", "sft"]
        if hparams.get("dpo_beta") is not None:  # and scaled by
            words += ["--beta", str(hparams["dpo_beta"])]
        for source in hparams["datasets"]:
            words += ["--dataset", source if isinstance(source, str) else json.dumps(source)]
        data_seed = hparams.get("training_args", {}).get("data_seed")
        if data_seed is not None:  # it decides which rows were held out
            words += ["--data-seed", str(data_seed)]
        return "python " + shlex.join(["inference.py", *words, "--output_file", "comparison.html"])

    def dpo_command(self) -> str | None:
        """The DPO experiment that starts from the best SFT model; None for other experiments."""
        best = self.best()
        if best is None or self.script != "sft_finetune.py":
            return None
        # On tiny/sft.yaml follows tiny/dpo.yaml, else dpo.yaml with preference data of the user's choice.
        file = Path(self.config_file)
        beside = file.with_name(file.name.replace("sft", "dpo"))
        dpo_config = str(beside if beside.exists() and beside != file else "dpo.yaml")
        # The base model goes along, for the comparison at the end to set against the tuned ones.
        overrides = {"model_ckpt": best["checkpoint_uuid"], "model_name": best["hparams"]["model_name"]}
        command = ["det", "e", "create"] if self.on_cluster else ["python", "local_experiment.py"]
        words = [word for key, value in overrides.items() for word in ("--config", f"hyperparameters.{key}={value}")]
        return shlex.join([*command, dpo_config, self.model_def, *words])


def short_name(name: str) -> str:
    """The last part of a dotted hyperparameter or a metric's: `learning_rate`, `accuracies`."""
    return name.split(".")[-1].split("/")[-1]


def summarize(
    trial_id: int, state: str, hparams: dict[str, Any], reports: list[TrialEvent], searcher: Searcher
) -> dict[str, Any]:
    """A trial's line of `trials.jsonl`, from what it reported."""
    validations = {step: report["metrics"] for step, report in events_by_step(reports, "validation").items()}
    checkpoints = {step: report["uuid"] for step, report in events_by_step(reports, "checkpoint").items()}
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
