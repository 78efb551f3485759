"""What to do with the best model of an experiment: the commands that compare it, train it on or serve it."""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from config.cluster_names import starting_name
from config.yaml_files import read_yaml
from data.sources import FILE_FORMATS
from errors import UserError
from experiment.container_paths import host_path
from experiment.kinds import DPO, SFT
from experiment.results import Experiment, TrialResult, flatten
from experiment.settings import rank_settings, settings_verdict
from experiment.verdicts import Verdict, args_of, beta_of
from storage.checkpoints import local_checkpoint
from storage.cluster_checkpoints import base_of, checkpoint_folder, settled_checkpoint
from storage.files import BUNDLE, is_object, read_json_lines
from storage.hub import looks_like_path
from storage.origins import read_origin

TASK = "inference.yaml"


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
    options = compare_options(experiment, best)
    if experiment.folder is None:
        find = partial(path_on_this_machine, mounts=experiment.config.get("bind_mounts") or [])
        try:
            here = {
                "model": {name: source and find(source) for name, source in options["model"].items()},
                "dataset": [_move_source(source, find) for source in options["dataset"]],
            }
        except FileNotFoundError:
            return _as_task(options, experiment.config)
        options |= here
    models = {name: source for name, source in options.pop("model").items() if source}
    words = [word for name, source in models.items() for word in ("--model", f"{name}={source}")]
    for name, value in options.items():
        for part in value if isinstance(value, list) else [value]:
            if part is not None:
                words += [f"--{name.replace('_', '-')}", part if isinstance(part, str) else json.dumps(part)]
    return "python " + shlex.join(["inference.py", *words, "--output_file", "comparison.html"])


def compare_options(experiment: Experiment, best: TrialResult) -> dict[str, Any]:
    """Return the options of inference.py that compare the best trial with what it came from; None for one unset."""
    hparams, sft = best["hparams"], starting_checkpoint(experiment, best["hparams"])
    prefix = "" if experiment.folder else "ckpt:"  # of a cluster's checkpoint
    return {
        "model": {
            "base": base_model(experiment, hparams, sft),
            "sft": sft,
            "dpo": f"{prefix}{best['checkpoint_uuid']}",
        },
        "reference": "sft" if sft else None,  # DPO's own rewards are measured against it
        "beta": beta_of(hparams),  # and scaled by beta
        "dataset": list(hparams["datasets"]),
        "data_seed": args_of(hparams).get("data_seed"),  # it decides which rows were held out
    }


def starting_checkpoint(experiment: Experiment, hparams: dict[str, Any]) -> str | None:
    """Return the checkpoint that a DPO trial started from, as inference.py takes it; None if it started from none.

    A cluster's name that may mean another one by now is settled as the trial did.
    """
    name = starting_name(hparams)
    if name is None or experiment.folder:
        return name and str(hparams["model_ckpt"])  # here a UUID stays one
    if experiment.number is not None:
        with suppress(UserError):
            return f"ckpt:{settled_checkpoint(name, 'model_ckpt', experiment.number)}"
    return name


def path_on_this_machine(name: str, mounts: list[dict[str, Any]]) -> str:
    """Return where the file or folder that a container calls `name` is on this machine; a hub id as it is.

    `mounts` are an experiment's `bind_mounts`. Raises `FileNotFoundError` if it is not here.
    """
    outside = host_path(name, mounts)
    is_path = outside is not None or looks_like_path(name) or Path(name).suffix in FILE_FORMATS
    seen = outside if outside is not None or Path(name).is_absolute() else name
    if seen is None or (is_path and not os.access(seen, os.R_OK)):
        raise FileNotFoundError(name)
    return seen


def _move_source(source: Any, move: Callable[[str], str]) -> Any:
    """Return a data source, a name or a mapping, with the names of its data sets replaced."""
    if isinstance(source, str):
        return move(source)
    return {key: _move_source(of, move) if key in ("name", "eval_dataset") and of else of for key, of in source.items()}


def _as_task(options: dict[str, Any], config: dict[str, Any]) -> str:
    """Return the command that compares on the cluster, with overrides of what inference.yaml sets otherwise.

    `config` is that of the experiment, from which the containers' image and mounts are taken.
    """
    task = read_yaml(str(BUNDLE / TASK))
    values = {f"model.{name}": source for name, source in options.pop("model").items()} | options
    values = {f"hyperparameters.{name}": value for name, value in values.items()}
    values = {name: value for name, value in values.items() if value is not None or name in dict(flatten(task))}
    defaults = {"read_only": False, "propagation": "rprivate"}  # which a master fills in
    mounts = [
        {key: value for key, value in mount.items() if value is not None and defaults.get(key) != value}
        for mount in config.get("bind_mounts") or []
    ]
    if mounts and mounts != task.get("bind_mounts"):
        values["bind_mounts"] = mounts
    image = (config.get("environment") or {}).get("image")
    images = set(image.values()) if isinstance(image, dict) else {image}  # a master has one for each kind of device
    if len(images) == 1 and not images & {None, task["environment"]["image"]}:
        values["environment.image"] = images.pop()
    texts = [f"{name}={of if isinstance(of, str) else json.dumps(of)}" for name, of in values.items()]
    return shlex.join(["det", "e", "create", TASK, ".", *(word for text in texts for word in ("--config", text))])


def base_model(experiment: Experiment, hparams: dict[str, Any], start: str | None) -> str | None:
    """Return the model at the beginning of SFT, as `start`, the checkpoint that a DPO trial started from, names it.

    None if nobody knows any more, or if it was a path of a container that is not on this machine.
    """
    if start is None:
        return hparams.get("model_name")
    with suppress(UserError):
        if experiment.folder is None:
            return base_of(start, "model_ckpt")
        if origin := read_origin(checkpoint_folder(start, "model_ckpt", verify=False)):
            base = origin.base or ""
            return base if not looks_like_path(base) or Path(base).exists() else None
    return None


def dpo_command(experiment: Experiment) -> str | None:
    """Return the DPO experiment that starts from the best SFT model; None for other experiments."""
    best = experiment.best()
    if best is None or experiment.kind is not SFT:
        return None
    command, started = ["det", "e", "create"], {"config_file": _config_named(experiment.name), "model_def": "."}
    if experiment.folder:
        command = ["python", "local_experiment.py"]
        for row in read_json_lines(experiment.folder / "command.json"):
            started |= row if is_object(row, dict.fromkeys(started, str)) else {}
    # tiny/sft.yaml is followed by tiny/dpo.yaml; otherwise by dpo.yaml, with preference data of the user's choice.
    config = Path(started["config_file"])
    beside = config.with_name(config.name.replace("sft", "dpo"))
    dpo_config = str(beside if beside.exists() and beside != config else "dpo.yaml")
    overrides = [f"hyperparameters.model_ckpt={best['checkpoint_uuid']}"]
    for key in ("lora", "load_in_4bit"):  # whoever has no memory for all weights in SFT has none in DPO
        if value := best["hparams"].get(key):
            overrides.append(f"hyperparameters.{key}={json.dumps(value)}")
    configs = [word for override in overrides for word in ("--config", override)]
    return shlex.join([*command, dpo_config, started["model_def"], *configs])


def _config_named(name: str) -> str:
    """Return which of this project's YAMLs describes the experiment `name`: sft.yaml, unless another has its name."""
    configs = (path for path in sorted(BUNDLE.glob("examples/*/sft.yaml")) if read_yaml(str(path)).get("name") == name)
    return next((str(path.relative_to(BUNDLE)) for path in configs), "sft.yaml")


def registry_name(experiment: Experiment) -> str:
    """Return a name for the model that Determined's registry takes, and `model:NAME` too.

    (The master refuses slashes, two spaces in a row, and a name that is only digits.)
    """
    name = re.sub(r"[^\w.-]+", "-", experiment.name).strip("-")
    return name if re.search(r"\D", name) else f"experiment-{experiment.number}"


def next_steps(experiment: Experiment, best: TrialResult) -> Iterator[tuple[str, str | None]]:
    """Yield what can be done with the best model, each with its command; only why not if the model is gone."""
    uuid, name = best["checkpoint_uuid"] or "", registry_name(experiment)
    if experiment.folder:
        try:
            local_checkpoint(uuid, "checkpoint")
        except UserError as error:
            yield f"The model is gone: {error}", None
            return
    compare, dpo = compare_command(experiment), dpo_command(experiment)
    if compare:
        where = ", on the cluster, where its data are: the log ends with the command that downloads the page"
        title = "Compare its answers with those of the models that it came from"
        yield title + (where if compare.startswith("det ") else ""), compare
    if dpo:
        yield "Go on from it with DPO, on preferred and rejected answers", dpo
    source, served = f"{'' if experiment.folder else 'ckpt:'}{uuid}", shlex.quote(f"local_runs/{name}-served")
    serve = f"pip install 'transformers[serving]'\npython export.py {source} {served}\ntransformers serve {served}"
    yield "Serve it through an OpenAI-compatible API, from a plain folder that answers as it did in training", serve
    if experiment.folder is None and experiment.kind:
        role = "dpo" if experiment.kind is DPO else "sft"
        register = f"det model create {name}\ndet model register-version {name} {uuid}"
        use = f"inference.py --model {role}=model:{name} then takes its latest version"
        yield f"Register it (the first line only once); {use}", register
