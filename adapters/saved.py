"""Read a saved adapter, and give its base what the adapter's training had: rows for new tokens, whole embeddings."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import load_peft_weights
from safetensors import safe_open
from transformers import PreTrainedModel

from chat_format import start_new_rows
from storage.adapter_chains import CONFIG, ORIGIN, WEIGHTS

PREFIX = "base_model.model."  # how peft's names of weights begin
ROWS = ".token_adapter.trainable_tokens_delta"  # how those of new tokens' rows end
TWICE = (".original_module.weight", ".modules_to_save.weight")  # of embeddings that are there whole as well
# Whole embeddings, which plain peft saves if their number has changed; the first if new rows are saved as well.
WHOLE = (".token_adapter.base_layer.weight", ".base_layer.weight", ".weight")
# Keys of LoraConfig with which the model would not be the base plus what an adapter adds.
OTHER_MODELS = (
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "megatron_config", "use_bdlora", "use_qalora"),
    *("velora_config", "monteclora_config", "kasa_config"),
)


def read_adapter(model: PreTrainedModel, folder: Path) -> tuple[LoraConfig, dict[str, torch.Tensor] | None]:
    """Return an adapter's config and weights, but for embeddings and rows of them, which are put into the model.

    (A forward pass gets new rows there in the type of the embeddings, as in training.) The weights are None if the
    model's own have no values. Raises `ValueError`, or what peft does, if the adapter is of another model.
    """
    values = json.loads((folder / CONFIG).read_bytes())
    if given := [name for name in OTHER_MODELS if values.get(name)]:
        raise ValueError(f"an adapter with {given[0]} cannot be used")
    indices = values.pop("trainable_token_indices", None) or {}
    for name in ("auto_mapping", "inference_mode"):
        values.pop(name, None)
    config: Any = LoraConfig.from_peft_type(**values | {"lora_dropout": 0.0})  # what does not learn drops nothing
    ends = {
        name: module
        for name, module in model.named_modules()
        if module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    if isinstance(indices, list):  # of the embeddings, as peft takes it
        indices = {next(iter(ends)).rpartition(".")[2]: indices}
    whole = {PREFIX + name + end: name for name in ends for end in WHOLE}
    with safe_open(folder / WEIGHTS, "pt") as file:
        sizes = {file.get_slice(key).get_shape()[0] for key in file.keys() if key in whole}  # noqa: SIM118
    for size in sizes:
        model.resize_token_embeddings(size, mean_resizing=False)
    if indices and not sizes:
        _make_room(model, indices, is_ours=(folder / ORIGIN).is_file())
    if model.device.type == "meta":
        return config, None
    weights = load_peft_weights(str(folder), device="cpu")
    for name, weight in weights.items():
        if not torch.isfinite(weight.sum(dtype=torch.float32)):
            raise ValueError(f"its weight {name} has NaN or infinite values")
    for key in [key for key in weights if key.endswith(TWICE)]:
        del weights[key]
    for key in weights.keys() & whole.keys():
        if whole[key].rpartition(".")[2] not in (config.modules_to_save or ()):  # which peft loads
            _put(model, whole[key], slice(None), weights.pop(key))
    rows = {key.removeprefix(PREFIX).removesuffix(ROWS): key for key in weights if key.endswith(ROWS)}
    if not {name.rpartition(".")[2] for name in rows} >= indices.keys():
        raise ValueError("its weights lack the rows of its new tokens")
    for name, key in rows.items():
        ids = indices.get(name.rpartition(".")[2]) or next(iter(indices.values()))  # an output layer may share them
        _put(model, name, ids, weights.pop(key))
    return config, weights


def _put(model: PreTrainedModel, name: str, rows: slice | list[int], values: torch.Tensor) -> None:
    """Set rows of the embeddings or the output layer `name`."""
    weight: Any = model.get_submodule(name).weight.data
    if weight[rows].shape != values.shape:
        raise ValueError(f"its weights are of another model: {name}")
    weight[rows] = values.to(weight)


def _make_room(model: PreTrainedModel, indices: dict[str, list[int]], is_ours: bool) -> None:
    """Give the embeddings the rows with these indices, and those between as a training of ours, or peft's, began."""
    rows: Any = model.get_input_embeddings().num_embeddings
    first, last = min(map(min, indices.values())), max(map(max, indices.values()))
    new = [index for each in indices.values() for index in each if index >= rows]
    if first < 0 or (new and min(new) > rows + 64):  # a vocabulary may be padded, or a little larger than its model
        raise ValueError(f"its tokens {first} to {last} do not follow the {rows} of its base")
    if is_ours or new:
        start_new_rows(model, first if is_ours else rows, 1 + last)
