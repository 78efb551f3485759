"""Check the `lora` block of a YAML, and build peft's LoraConfig and the 4-bit quantization from it."""

import dataclasses
import typing
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from peft import LoraConfig, TaskType
from pydantic import ConfigDict, Field, create_model

from config.trying_out import warn_elsewhere
from config.validation import FORBID_UNKNOWN, Count, validate
from errors import UserError, reading

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

KEY = "hyperparameters.lora"
OUR_OWN = "it is set for you"
CHANGES_BASE = "it changes the base's own weights, which a checkpoint does not hold"
NOT_MERGED = "no export or comparison could merge such an adapter"
# Keys of LoraConfig that a training here cannot take, and why.
REFUSED = {
    **dict.fromkeys(("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"), OUR_OWN),
    **dict.fromkeys(("base_model_name_or_path", "revision"), "an adapter stands on the model that is trained"),
    "trainable_token_indices": "chat_tokens.add_chat_tokens trains the rows of its tokens",
    "modules_to_save": "whole modules are trained without lora",
    "ensure_weight_tying": "it is about modules_to_save",
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), CHANGES_BASE),
    "layer_replication": "it changes the base's layers",
    "lora_bias": "few layers have a bias to merge it into",
    **dict.fromkeys(("megatron_config", "megatron_core", "runtime_config", "use_bdlora"), "models are not split so"),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "target_parameters"), NOT_MERGED),
    **dict.fromkeys(("use_qalora", "qalora_group_size"), "it needs a GPTQ model"),
    **dict.fromkeys(("velora_config", "monteclora_config", "kasa_config"), "it was never tried with TRL's losses"),
}
LIMITS: dict[str, Any] = {
    "r": Count,
    "lora_alpha": Annotated[float, Field(gt=0)],
    "lora_dropout": Annotated[float, Field(ge=0, lt=1)],
    "rank_pattern": dict[str, Count],
    "alpha_pattern": dict[str, Annotated[float, Field(gt=0)]],
    # With others a fresh adapter would change the model's answers, or the base under it.
    "init_lora_weights": Literal[True, "gaussian"],
    "bias": Literal["none"],
}


def build_lora_config(values: dict[str, Any]) -> LoraConfig:
    """Return the LoraConfig of a `lora` block; without target_modules, of all linear layers but the output layer.

    Raises `UserError` for a key that is unknown or has no place here, and for a wrong value.
    """
    values = {name: value for name, value in values.items() if value is not None}
    for name, why in REFUSED.items():
        if name in values:
            raise UserError(f"{KEY}.{name} cannot be used here: {why}")
    hints = typing.get_type_hints(LoraConfig) | LIMITS
    fields: Any = {f.name: (hints[f.name], None) for f in dataclasses.fields(LoraConfig) if f.name not in REFUSED}
    model = create_model("Lora", __config__=ConfigDict(**FORBID_UNKNOWN), **fields)
    checked = validate(model, values, KEY).model_dump(exclude_unset=True)
    with reading(KEY):
        return LoraConfig(**{"target_modules": "all-linear"} | checked, task_type=TaskType.CAUSAL_LM)


def build_quantization(dtype: torch.dtype) -> "BitsAndBytesConfig":
    """Return QLoRA's 4-bit quantization (Dettmers et al. 2023): NF4, its scales quantized too, computed in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def check_4bit(args: Any, has_lora: bool) -> None:
    """Raise `UserError` unless a training with `args` can hold its base in 4 bits."""
    key = "hyperparameters.load_in_4bit"
    if not has_lora:
        raise UserError(f"{key} needs lora: weights of 4 bits cannot be trained themselves")
    if args.use_cpu or not torch.cuda.is_available():
        warn_elsewhere(f"{key} needs a GPU; leave it out to train on a CPU")
    if find_spec("bitsandbytes") is None:
        warn_elsewhere(f"{key} needs a package: pip install 'bitsandbytes>=0.46' (install it beside requirements.txt)")
