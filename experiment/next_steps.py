"""What to do with the best model of an experiment: the commands that compare it, train it on or serve it."""

import json
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from config.cluster_names import NO_CHECKPOINT, is_cluster_name
from errors import UserError
from experiment.kinds import DPO, SFT
from experiment.results import Experiment, TrialResult
from experiment.settings import rank_settings, settings_verdict
from experiment.verdicts import Verdict, args_of, beta_of
from storage.checkpoints import local_checkpoint
from storage.cluster_checkpoints import base_of, checkpoint_folder
from storage.files import is_object, read_json_lines
from storage.origins import read_origin


def winner(verdict: Verdict) -> Iterator[str]:
    """Yield which trial is best and how sure that is, a line each, with its checkpoint in the last; nothing without."""
    if verdict.best is None:
        return
    if len(verdict.ranked) > 1:
        yield f"{verdict.headline(so_far=False)}."
        yield from (*verdict.tied(), *verdict.remarks())
        yield from settings_verdict(verdict.experiment, rank_settings(verdict.experiment), "{:.4g}".format)
    yield f"Best: trial {verdict.best['trial_id']}, checkpoint {verdict.best['checkpoint_uuid']}"


def compare_command(experiment: Experiment) -> str | None:
    """Return the command that compares the best DPO model with the models it came from; None for other experiments."""
    best = experiment.best()
    if best is None or experiment.kind is not DPO:
        return None
    hparams, prefix = best["hparams"], "" if experiment.folder else "ckpt:"  # as inference.py --model takes it
    sft = hparams.get("model_ckpt") if hparams.get("model_ckpt") != NO_CHECKPOINT else None
    models = {"base": base_model(experiment, hparams), "sft": sft and (sft if is_cluster_name(sft) else prefix + sft)}
    models["dpo"] = f"{prefix}{best['checkpoint_uuid']}"
    words = [word for name, source in models.items() if source for word in ("--model", f"{name}={source}")]
    if sft:  # DPO's own rewards are measured against it
        words += ["--reference", "sft"]
    words += ["--beta", str(beta_of(hparams))]  # and scaled by beta
    for source in hparams["datasets"]:
        words += ["--dataset", source if isinstance(source, str) else json.dumps(source)]
    data_seed = args_of(hparams).get("data_seed")
    if data_seed is not None:  # it decides which rows were held out
        words += ["--data-seed", str(data_seed)]
    return "python " + shlex.join(["inference.py", *words, "--output_file", "comparison.html"])


def base_model(experiment: Experiment, hparams: dict[str, Any]) -> str | None:
    """Return the model at the beginning of SFT, which the checkpoint that a DPO trial started from names.

    If nobody knows any more, it is the trial's own `model_name`, which `dpo_command` has set to it.
    """
    start, base = hparams.get("model_ckpt") or NO_CHECKPOINT, None
    if start != NO_CHECKPOINT:
        with suppress(UserError):
            if experiment.folder is None:
                base = base_of(start if is_cluster_name(start) else f"ckpt:{start}", "model_ckpt")
            elif origin := read_origin(checkpoint_folder(start, "model_ckpt", verify=False)):
                base = origin.base
    return base or hparams.get("model_name")


def dpo_command(experiment: Experiment) -> str | None:
    """Return the DPO experiment that starts from the best SFT model; None for other experiments."""
    best = experiment.best()
    if best is None or experiment.kind is not SFT:
        return None
    command, started = ["det", "e", "create"], {"config_file": "sft.yaml", "model_def": "."}
    if experiment.folder:
        command = ["python", "local_experiment.py"]
        for row in read_json_lines(experiment.folder / "command.json"):
            started |= row if is_object(row, dict.fromkeys(started, str)) else {}
    # tiny/sft.yaml is followed by tiny/dpo.yaml; otherwise by dpo.yaml, with preference data of the user's choice.
    config = Path(started["config_file"])
    beside = config.with_name(config.name.replace("sft", "dpo"))
    dpo_config = str(beside if beside.exists() and beside != config else "dpo.yaml")
    # The base model goes along so that the comparison at the end can include it.
    overrides = {"model_ckpt": best["checkpoint_uuid"], "model_name": best["hparams"]["model_name"]}
    words = [word for key, value in overrides.items() for word in ("--config", f"hyperparameters.{key}={value}")]
    return shlex.join([*command, dpo_config, started["model_def"], *words])


def next_steps(experiment: Experiment, best: TrialResult) -> Iterator[tuple[str, str | None]]:
    """Yield what can be done with the best model, each with its command; only why not if the model is gone."""
    uuid, download = best["checkpoint_uuid"] or "", ""
    if experiment.folder:
        try:
            model = str(local_checkpoint(uuid, "checkpoint"))
        except UserError as error:
            yield f"The model is gone: {error}", None
            return
    else:
        model = f"assistant/checkpoint-{experiment.step_of(best)}"
        download = f"det checkpoint download {uuid} --output-dir assistant\n"
    compare, dpo = compare_command(experiment), dpo_command(experiment)
    if compare:
        yield "Compare its answers with those of the models that it came from", compare
    if dpo:
        yield "Go on from it with DPO, on preferred and rejected answers", dpo
    serve = f"pip install 'transformers[serving]'\n{download}transformers serve {shlex.quote(model)}"
    yield "Serve it through an OpenAI-compatible API; its chat template is in the checkpoint", serve
