"""The checkpoint that DPO starts from, for an experiment on this machine, if a cluster has it."""

import functools
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.stack import AdapterStack
from config.cluster_names import NO_CHECKPOINT, is_cluster_name, parse_cluster_name, starting_name
from config.experiment import entrypoint_script
from config.hyperparameters import ChatTokens
from config.validation import is_uuid
from errors import UserError
from experiment.container_paths import ContainerPaths
from experiment.kinds import DPO, Hyperparameters, kind_of
from experiment.results import read_local_config
from storage.adapter_chains import find_base, is_adapter, place_base, read_chain
from storage.checkpoints import cached_checkpoint, find_checkpoint_here, local_checkpoint, model_folder
from storage.cluster_checkpoints import MODEL_CONFIGS, client, download_but_weights, find_checkpoint
from storage.files import is_object, read_json_lines
from storage.shared_cache import is_made
from trial.policy import load_policy

KEY = "model_ckpt"
_temporary: list[tempfile.TemporaryDirectory[str]] = []  # folders until this process ends


def settle_checkpoints(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the config with a `ckpt:UUID` for each `model_ckpt` that a cluster names, and these by their names.

    What is best or latest there may change; a run that continues in `folder` keeps what it began with.
    """
    known, settled = list[Any](), dict[str, str]()
    with suppress(UserError):  # damaged: it is written anew
        rows = read_json_lines(folder / "command.json")
        known += [row["checkpoints"] for row in rows if is_object(row, {"checkpoints": dict})]
    damaged = not known
    with suppress(UserError):
        if damaged:  # the same places of experiment.json have what the names stood for
            began = _texts(read_local_config(folder)["hyperparameters"].get(KEY))
            known = [dict(zip(_texts(config["hyperparameters"].get(KEY)), began, strict=False))]

    def settle(value: Any) -> Any:
        if isinstance(value, dict):  # a search space
            return {name: settle(part) for name, part in value.items()}
        if isinstance(value, list):
            return [settle(part) for part in value]
        if not (isinstance(value, str) and is_cluster_name(value)) or parse_cluster_name(value, KEY).kind == "ckpt":
            return value
        earlier = [found[value] for found in known if str(found.get(value)).startswith("ckpt:")]
        if earlier and damaged:  # by a name that was changed, too: so say it
            print(f"{folder / 'command.json'}: damaged; {value} is {earlier[0]}, as experiment.json has it")
        settled[value] = earlier[0] if earlier else f"ckpt:{find_checkpoint(value, KEY).uuid}"
        return settled[value]

    hyperparameters = {**config["hyperparameters"]}
    if KEY in hyperparameters:
        hyperparameters[KEY] = settle(hyperparameters[KEY])
    return {**config, "hyperparameters": hyperparameters}, settled


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    else:
        yield str(value)


def as_seen_here(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return an experiment's config for a dry run, and a line for each thing in it that a training would not take so.

    Paths of the containers are as they are here, and without a `model_ckpt` DPO starts from its `model_name`.
    """
    paths, remarks = ContainerPaths(config), list[str]()
    hyperparameters = paths.translate(config["hyperparameters"])
    if kind_of(Path(entrypoint_script(config)[0]).name) is DPO and not hyperparameters.get(KEY):
        hyperparameters[KEY] = NO_CHECKPOINT
        remarks.append(f"{KEY} is missing, and a training needs one; this is shown with model_name in its place")
    remarks += [f"{path} of the containers is {here} of this machine" for path, here in paths.found.items()]
    return {**config, "hyperparameters": hyperparameters}, remarks


class StartingModel(NamedTuple):
    """The model that a trial starts from, as far as a dry run needs it: without its weights."""

    source: str  # a folder or a hub id
    shown: str  # to a user
    added_tokens: list[str] | None = None  # before the training begins
    note: str = ""

    def load(self, hparams: Hyperparameters) -> tuple[PreTrainedModel | AdapterStack, PreTrainedTokenizerBase]:
        """Return the model without its weights, and its tokenizer, both with the chat format."""
        return load_policy(hparams, self.source, added_tokens=self.added_tokens, weights=False)


def starting_model(hparams: Hyperparameters, paths: ContainerPaths) -> StartingModel:
    """Return the model that a trial starts from. Of a cluster's checkpoint it downloads only small files.

    Raises `UserError` if there is none.
    """
    if hparams.checkpoint:
        return _model_of(hparams.checkpoint, paths)
    return StartingModel(str(hparams.model_name), str(hparams.model_name), hparams.added_tokens)


@functools.cache
def _model_of(name: str, paths: ContainerPaths) -> StartingModel:
    if is_uuid(name):
        here = str(local_checkpoint(name, KEY, advice=f"; if it is on a cluster, give ckpt:{name}"))
        return StartingModel(here, here)
    checkpoint = find_checkpoint(name, KEY)
    shown = name if name.endswith(checkpoint.uuid) else f"{name}, checkpoint {checkpoint.uuid}"
    if is_made(cached := cached_checkpoint(checkpoint.uuid)):
        return StartingModel(str(model_folder(cached, checkpoint.uuid)), shown)
    if all(Path(path).name not in MODEL_CONFIGS for path in checkpoint.resources or {}):
        raise UserError(f"{KEY} {name}: the checkpoint holds no model (config.json)")
    _temporary.append(tempfile.TemporaryDirectory())
    try:
        folder = download_but_weights(checkpoint, Path(_temporary[-1].name))
        if is_adapter(folder):
            base = read_chain(folder).base
            if (seen := paths.here(base)) != base:
                place_base(folder, seen)
            find_base(read_chain(folder), find_checkpoint_here)
    except UserError as error:
        return _as_trained(checkpoint, shown, paths, str(error))
    return StartingModel(str(folder), shown)


def _as_trained(checkpoint: client.Checkpoint, shown: str, paths: ContainerPaths, why: str) -> StartingModel:
    """Return the model that a checkpoint's trial started from, with the tokens that it added: they are tokenized alike.

    (A master sends a checkpoint as a whole only, with the weights and the optimizer.)
    """
    hparams: dict[str, Any] = (checkpoint.training.hparams if checkpoint.training else None) or {}
    if before := starting_name(hparams):
        found = _model_of(before, paths)
        return found._replace(shown=shown, note=found.note or f"{why}: shown as its trial began")
    tokens, name = ChatTokens(**(hparams.get("chat_tokens") or {})), str(hparams.get("model_name"))
    note = f"{why}: shown with the tokenizer of {name}, from which its trial started, and the tokens that it added"
    return StartingModel(paths.here(name), shown, tokens.special_tokens if tokens.add_chat_tokens else None, note)
