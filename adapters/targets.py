"""Check that a LoraConfig names layers of the model, all of them such as an adapter can have."""

import re
from collections.abc import Iterable

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import match_target_against_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from config.lora import ALL_LINEAR, KEY
from errors import UserError, nearest


def check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise `UserError` for a name in `config` that no linear layer of `model` has, and for the output layer.

    (peft takes a list of names if one of them fits, and patterns if none does.) The layers may have adapters already.
    """
    names, given = list(_linear_layers(model)), config.target_modules
    targets, excluded = (_as_patterns(each) for each in (given, config.exclude_modules))
    if not (isinstance(given, str) and given.lower() == ALL_LINEAR):
        _refuse_ends(model, targets)
        _require("target_modules", targets, names, is_list=not isinstance(given, str))
    _require("exclude_modules", excluded, names, is_list=not isinstance(config.exclude_modules, str))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = {pattern: rf"(?:.*\.)?(?:{pattern})" for pattern in getattr(config, key) or {}}
        _require(key, patterns, names, is_list=True)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    asked = config.layers_to_transform
    for index in [asked] if isinstance(asked, int) else asked or []:
        if index >= layers:
            raise UserError(f"{KEY}.layers_to_transform: there is no layer {index}; the model has 0 to {layers - 1}")


def _as_patterns(given: str | Iterable[str] | None) -> dict[str, str]:
    """Return regular expressions of whole names by what a user gave: one, or a list of names or ends of them."""
    if given is None or isinstance(given, str):
        return {given: given} if given else {}
    return {name: rf"(?:.*\.)?{re.escape(name)}" for name in sorted(given)}


def _linear_layers(model: nn.Module, prefix: str = "") -> Iterable[str]:
    for name, module in model.named_children():
        if isinstance(module, nn.Linear | Conv1D | LoraLayer):
            yield prefix + name
        else:
            yield from _linear_layers(module, f"{prefix}{name}.")


def _refuse_ends(model: PreTrainedModel, patterns: dict[str, str]) -> None:
    ends = {model.get_output_embeddings(): "the output layer", model.get_input_embeddings(): "the embeddings"}
    for name, module in model.named_modules():
        found = [given for given, pattern in patterns.items() if match_target_against_key(pattern, name)]
        if module in ends and found:
            # Upstream: TRL (1.16) computes the loss with the output layer's weight alone, and refuses this late. peft
            # (0.21) merges an adapter of embeddings into an output layer that shares their weight.
            why = "an adapter there would not be trained, or merged, as it is used"
            raise UserError(f"{KEY}.target_modules: {found[0]!r} names {ends[module]} of the model; {why}")


def _require(key: str, patterns: dict[str, str], names: list[str], *, is_list: bool) -> None:
    for given, pattern in patterns.items():
        if any(match_target_against_key(pattern, name) for name in names):
            continue
        ends = sorted({name.rpartition(".")[2] for name in names if "." in name})  # without the output layer's
        advice = nearest(given, [*ends, ALL_LINEAR])
        if not is_list and given in ends:
            advice = f" (a text is matched with whole names, such as {names[0]}; give a list: [{given}])"
        raise UserError(f"{KEY}.{key}: no layer's name fits {given!r}{advice}; there are {', '.join(ends)}")
