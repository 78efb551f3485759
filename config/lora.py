"""Check the `lora` block of a YAML, and build peft's LoraConfig and the 4-bit quantization from it."""

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import torch
from peft import LoraConfig, TaskType
from pydantic import AfterValidator, ConfigDict, Field, create_model

from config.trying_out import warn_elsewhere
from config.validation import FORBID_UNKNOWN, Natural, NotEmpty, validate
from errors import UserError, reading

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def _compile(pattern: str) -> str:
    """Return a regular expression. Raises `ValueError` if it is none."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
    return pattern


def _check_start(value: bool | str) -> bool | str:
    """Return how an adapter's first weights are drawn. Raises `ValueError` if they would change the model's answers."""
    if value is not True and value != "gaussian":
        raise ValueError(f"{value!r} is neither true nor gaussian; others change the answers or the base")
    return value


KEY = "hyperparameters.lora"
ALL_LINEAR = "all-linear"
OWN = "default"  # peft's name of the adapter that is trained, which it saves at the top of a checkpoint
REFERENCE = "ref"  # TRL's name of a copy of it from before DPO's training, which adds nothing to the model
OUR_OWN = "it is set for you"
CHANGES_BASE = "it changes the base's own weights, which a checkpoint does not hold"
NOT_MERGED = "no export or comparison could merge such an adapter"
# Keys of LoraConfig that a training here cannot take, and why.
REFUSED = {
    **dict.fromkeys(("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"), OUR_OWN),
    **dict.fromkeys(("base_model_name_or_path", "revision"), "an adapter stands on the model that is trained"),
    "fan_in_fan_out": "the layers say it themselves",
    "trainable_token_indices": "chat_tokens.add_chat_tokens trains the rows of its tokens",
    "modules_to_save": "whole modules are trained without lora",
    "ensure_weight_tying": "it is about modules_to_save",
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), CHANGES_BASE),
    "layer_replication": "it changes the base's layers",
    "bias": "the base's own biases stay as they are",
    "lora_bias": "few layers have a bias to merge it into",
    **dict.fromkeys(("megatron_config", "megatron_core", "runtime_config", "use_bdlora"), "models are not split so"),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "target_parameters"), NOT_MERGED),
    **dict.fromkeys(("use_qalora", "qalora_group_size"), "it needs a GPTQ model"),
    **dict.fromkeys(("velora_config", "monteclora_config", "kasa_config"), "it was never tried with TRL's losses"),
}
Rank = Annotated[int, Field(ge=1, le=2**14)]  # more is more than the widest layers have
Alpha = Annotated[float, Field(gt=0, le=1e6)]  # a product with weights must stay finite
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_compile)]
Names = Annotated[list[NotEmpty], Field(min_length=1)]
# The others, and their values.
TAKEN: dict[str, Any] = {
    "r": Rank,
    "lora_alpha": Alpha,
    "lora_dropout": Annotated[float, Field(ge=0, lt=1)],
    "target_modules": Pattern | Names,
    "exclude_modules": Pattern | Names,
    "layers_to_transform": Natural | Annotated[list[Natural], Field(min_length=1)],
    "layers_pattern": Pattern | Annotated[list[Pattern], Field(min_length=1)],
    "rank_pattern": dict[Pattern, Rank],
    "alpha_pattern": dict[Pattern, Alpha],
    "use_rslora": bool,
    "use_dora": bool,
    "init_lora_weights": Annotated[bool | str, AfterValidator(_check_start)],
}


def build_lora_config(values: dict[str, Any]) -> LoraConfig:
    """Return the LoraConfig of a `lora` block; without target_modules, of all linear layers but the output layer.

    A key with nothing after it, or with what peft takes without it, is as if it were not there. Raises `UserError` for
    a key that is unknown or has no place here, and for a wrong value.
    """
    default = LoraConfig(task_type=TaskType.CAUSAL_LM)
    values = {name: value for name, value in values.items() if value is not None}
    for name, why in REFUSED.items():
        if name in values and values.pop(name) != getattr(default, name):
            raise UserError(f"{KEY}.{name} cannot be used here: {why}")
    fields: Any = {name: (type_, None) for name, type_ in TAKEN.items()}
    model = create_model("Lora", __config__=ConfigDict(**FORBID_UNKNOWN), **fields)
    checked = validate(model, values, KEY, noun="a key of peft's LoraConfig").model_dump(exclude_unset=True)
    if "layers_to_transform" in checked and not isinstance(checked.get("target_modules"), list):
        raise UserError(f"{KEY}.layers_to_transform needs target_modules as a list, as in [q_proj, v_proj]")
    if "layers_pattern" in checked and "layers_to_transform" not in checked:
        raise UserError(f"{KEY}.layers_pattern has no effect without layers_to_transform")
    with reading(KEY):
        return LoraConfig(**{"target_modules": ALL_LINEAR} | checked, task_type=TaskType.CAUSAL_LM)


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
