"""What to do with the best model of an experiment: the commands that compare it, train it on or serve it."""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from config.cluster_names import NO_CHECKPOINT, is_cluster_name
from config.yaml_files import read_yaml
from errors import UserError
from experiment.kinds import DPO, SFT
from experiment.results import Experiment, TrialResult, flatten
from experiment.settings import rank_settings, settings_verdict
from experiment.verdicts import Verdict, args_of, beta_of
from storage.checkpoints import local_checkpoint
from storage.cluster_checkpoints import base_of, checkpoint_folder
from storage.files import BUNDLE, is_object, read_json_lines
from storage.hub import looks_like_path
from storage.origins import read_origin

TASK = "inference.yaml"
WORKDIR = PurePosixPath("/run/determined/workdir")  # where a container has the folder that `det e create` uploads


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
    """Return the command that compares the best DPO model with the models it came from; None for other experiments.

    It runs here, if the models and data that it names are on this machine or a hub: of a cluster's experiment, where
    its `bind_mounts` say. Else the cluster runs it as a task, whose containers see the paths that the trials saw.
    """
    best = experiment.best()
    if best is None or experiment.kind is not DPO:
        return None
    options, mounts = compare_options(experiment, best), experiment.config.get("bind_mounts") or []
    if experiment.folder is None:
        try:
            find = partial(path_on_this_machine, mounts=mounts)
            options["model"] = {name: source and find(source) for name, source in options["model"].items()}
            options["dataset"] = [_move_source(source, find) for source in options["dataset"]]
        except FileNotFoundError:
            return _as_task(options, mounts)
    models = {name: source for name, source in options.pop("model").items() if source}
    words = [word for name, source in models.items() for word in ("--model", f"{name}={source}")]
    for name, value in options.items():
        for part in value if isinstance(value, list) else [value]:
            if part is not None:
                words += [f"--{name.replace('_', '-')}", part if isinstance(part, str) else json.dumps(part)]
    return "python " + shlex.join(["inference.py", *words, "--output_file", "comparison.html"])


def compare_options(experiment: Experiment, best: TrialResult) -> dict[str, Any]:
    """Return the options of inference.py that compare the best trial with what it came from; None for one unset."""
    hparams = best["hparams"]
    prefix = "" if experiment.folder else "ckpt:"  # of a cluster's checkpoint
    sft = hparams.get("model_ckpt")
    sft = None if sft in (None, NO_CHECKPOINT) else sft if is_cluster_name(sft) else f"{prefix}{sft}"
    return {
        "model": {"base": base_model(experiment, hparams), "sft": sft, "dpo": f"{prefix}{best['checkpoint_uuid']}"},
        "reference": "sft" if sft else None,  # DPO's own rewards are measured against it
        "beta": beta_of(hparams),  # and scaled by beta
        "dataset": list(hparams["datasets"]),
        "data_seed": args_of(hparams).get("data_seed"),  # it decides which rows were held out
    }


def path_on_this_machine(name: str, mounts: list[dict[str, Any]]) -> str:
    """Return where the file or folder that a container calls `name` is on this machine; a hub id as it is.

    `mounts` are an experiment's `bind_mounts`. Raises `FileNotFoundError` if it is not here.
    """
    inside, outside = WORKDIR / name, None if name.startswith("/") else name
    for mount in sorted(mounts, key=lambda mount: len(mount["container_path"])):  # the innermost last
        if inside.is_relative_to(folder := WORKDIR / mount["container_path"]):
            outside = str(Path(mount["host_path"]) / inside.relative_to(folder))
    if outside is None or ((outside != name or looks_like_path(name)) and not os.access(outside, os.R_OK)):
        raise FileNotFoundError(name)
    return outside


def _move_source(source: Any, move: Callable[[str], str]) -> Any:
    """Return a data source, a name or a mapping, with the names of its data sets replaced."""
    if isinstance(source, str):
        return move(source)
    return {key: _move_source(of, move) if key in ("name", "eval_dataset") and of else of for key, of in source.items()}


def _as_task(options: dict[str, Any], mounts: list[dict[str, Any]]) -> str:
    """Return the command that compares on the cluster, with overrides of what inference.yaml sets otherwise."""
    task = read_yaml(str(BUNDLE / TASK))
    values = {f"model.{name}": source for name, source in options.pop("model").items()} | options
    values = {f"hyperparameters.{name}": value for name, value in values.items()}
    values = {name: value for name, value in values.items() if value is not None or name in dict(flatten(task))}
    mounts = [{key: mount[key] for key in ("host_path", "container_path")} for mount in mounts]
    if mounts and mounts != task.get("bind_mounts"):
        values["bind_mounts"] = mounts
    texts = [f"{name}={of if isinstance(of, str) else json.dumps(of)}" for name, of in values.items()]
    return shlex.join(["det", "e", "create", TASK, ".", *(word for text in texts for word in ("--config", text))])


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


def registry_name(experiment: Experiment) -> str:
    """Return a name for the model that Determined's registry takes, and `model:NAME` too.

    (The master refuses slashes, two spaces in a row, and a name that is only digits.)
    """
    name = re.sub(r"[^\w.-]+", "-", experiment.name).strip("-")
    return name if re.search(r"\D", name) else f"experiment-{experiment.number}"


def next_steps(experiment: Experiment, best: TrialResult) -> Iterator[tuple[str, str | None]]:
    """Yield what can be done with the best model, each with its command; only why not if the model is gone."""
    uuid, download = best["checkpoint_uuid"] or "", ""
    if experiment.folder:
        try:
            model = str(local_checkpoint(uuid, "checkpoint"))
        except UserError as error:
            yield f"The model is gone: {error}", None
            return
    else:  # into the folder that `det` chooses: into one that holds another checkpoint it would download nothing
        model = f"checkpoints/{uuid}/checkpoint-{experiment.step_of(best)}"
        download = f"det checkpoint download {uuid}\n"
    compare, dpo = compare_command(experiment), dpo_command(experiment)
    if compare:
        where = ", on the cluster, where its data are: the log ends with the command that downloads the page"
        title = "Compare its answers with those of the models that it came from"
        yield title + (where if compare.startswith("det ") else ""), compare
    if dpo:
        yield "Go on from it with DPO, on preferred and rejected answers", dpo
    serve = f"pip install 'transformers[serving]'\n{download}transformers serve {shlex.quote(model)}"
    yield "Serve it through an OpenAI-compatible API; its chat template is in the checkpoint", serve
    if experiment.folder is None and experiment.kind:
        name = registry_name(experiment)
        role = "dpo" if experiment.kind is DPO else "sft"
        register = f"det model create {name}\ndet model register-version {name} {uuid}"
        use = f"inference.py --model {role}=model:{name} then takes its latest version"
        yield f"Register it (the first line only once); {use}", register
