"""Build TRL's config of a run from the `training_args` of a YAML, whose keys and types are checked."""

import copy
import dataclasses
import functools
import inspect
import json
import logging
import os
import sys
import typing
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, cast

import torch
from accelerate.utils import GradientAccumulationPlugin
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from config.trying_out import check_fsdp, try_out
from config.validation import FORBID_UNKNOWN, Beta, Count, Natural, NotEmpty, validate
from errors import UserError, nearest, reading

logger = logging.getLogger(__name__)
KEY = "hyperparameters.training_args"

# The names `DPOTrainer` dispatches on. It refuses other names only at the first loss, after the reference pass.
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# The losses whose formula contains `label_smoothing`. The others would ignore it without a warning.
SMOOTHED_LOSSES = {"robust", "exo_pair", "aot", "aot_unpaired"}

F_DIVERGENCE_LOSSES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}

# Keys of SFTConfig and DPOConfig that would have no effect here, and what does their job.
REFUSED = {
    "do_train": "a trial always trains",
    "do_eval": "set eval_strategy",
    "do_predict": "a trial predicts nothing",
    "load_best_model_at_end": "the best checkpoint is found by searcher.metric, and kept",
    "pad_token": "the tokenizer's own padding token is used",
    "resume_from_checkpoint": "a trial resumes from its own latest checkpoint",
    "save_only_model": "a trial resumes from its checkpoints, and needs the optimizer's state for it",
}
RENDERED = "every row is rendered as ChatML by chat_format.py"
REFUSED_BY_SFT = REFUSED | {
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), "set data_collator.on_completions_only"),
    **dict.fromkeys(("chat_template_path", "dataset_kwargs", "dataset_text_field"), RENDERED),
    "eos_token": "every answer ends with <|im_end|> and the tokenizer's own EOS",
    "truncation_mode": "a row that is too long is cut at its end",
}
REFUSED_BY_DPO = REFUSED | {
    "label_smoothing_factor": "DPO's losses have label_smoothing",
    "truncation_mode": "prompts are cut at their beginning and answers at their end",
}
# Settings whose state is not saved in a checkpoint: rows in a newly drawn order, a reference that moves.
INEXACT = {"train_sampling_strategy": "group_by_length", "ignore_data_skip": True, "sync_ref_model": True}


def _check_max_steps(steps: int) -> int:
    if steps < 1 and steps != -1:
        raise ValueError(f"{steps} is not a number of steps: 1 or more, or -1 for num_train_epochs")
    return steps


def _check_weights(weights: list[float]) -> list[float]:
    if weights and max(weights) <= 0:
        raise ValueError("none is greater than 0")
    return weights


def _check_fsdp_keys(config: dict[str, Any]) -> dict[str, Any]:
    source = inspect.getsource(cast(Any, SFTConfig)._process_fsdp_args)  # it reads the keys that it names
    for name in config:
        if f'"{name.removeprefix("fsdp_")}"' not in source:
            raise ValueError(f".{name} is not a key that transformers reads")
    return config


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
# The library accepts any number for these keys. Beyond these limits it fails late, learns nothing, or learns NaN.
LIMITS: dict[Any, str] = {
    Count: "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps"
    " dataloader_prefetch_factor dataset_num_proc ddp_timeout ddp_bucket_cap_mb max_length"
    " precompute_ref_batch_size ref_model_sync_steps num_steps",
    Natural: "dataloader_num_workers",
    Positive: "learning_rate num_train_epochs adam_epsilon discopop_tau",
    Beta: "beta",
    NotNegative: "warmup_steps weight_decay max_grad_norm eval_delay router_aux_loss_coef neftune_noise_alpha"
    " logging_steps eval_steps save_steps",
    BelowOne: "adam_beta1 adam_beta2 label_smoothing_factor label_smoothing",
    Annotated[float, Field(ge=0, le=1)]: "ld_alpha ref_model_mixup_alpha",
    Annotated[float, Field(ge=-10, le=10)]: "f_alpha_divergence_coef",
    Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], AfterValidator(_check_weights)]: "loss_weights",
    Annotated[int, Field(ge=0, lt=2**32)]: "seed data_seed",
    Annotated[int, Field(lt=2**31), AfterValidator(_check_max_steps)]: "max_steps",
    Count | Literal["auto"]: "pad_to_multiple_of",
    bool | Literal["all", "non_padding", "no"]: "include_num_input_tokens_seen",
    NotEmpty: "output_dir",
    Annotated[dict, Field(min_length=1)] | NotEmpty: "deepspeed",
    Annotated[dict, AfterValidator(_check_fsdp_keys)] | str: "fsdp_config",
    list[Literal["inputs", "loss"]]: "include_for_metrics",
    Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]: "f_divergence_type",
}
# Mappings whose keys are the fields of a class. (As text, they name a file.)
MAPPINGS = {"accelerator_config": AcceleratorConfig, "gradient_accumulation_kwargs": GradientAccumulationPlugin}
LIMIT_OF = {name: limit for limit, names in LIMITS.items() for name in names.split()}

Config = TypeVar("Config", SFTConfig, DPOConfig)
OwnKeys = dict[str, tuple[str, Any]]  # TRL's name: the key of ours that sets it, and its value (None: not set)


def build_sft_config(training_args: dict[str, Any], own: OwnKeys) -> SFTConfig:
    """Return the SFTConfig of `training_args` and of our own keys. Raises `UserError` for what is wrong in them."""
    args = build_training_args(SFTConfig, check_training_args(SFTConfig, training_args, own, REFUSED_BY_SFT))
    if args.packing and args.max_length is None:
        raise UserError(f"{KEY}.packing needs max_seq_length, the length of a pack")
    if args.packing and args.packing_strategy != "bfd" and args.eval_packing is False:
        # TRL would cut the evaluation's rows itself, without a warning.
        reason = "splits long rows, which eval_packing: false would have to cut"
        remedy = "leave eval_packing out, or use packing_strategy: bfd"
        raise UserError(f"{KEY}.packing_strategy {args.packing_strategy!r} {reason}; {remedy}")
    if args.padding_free and not args.packing and args.max_length is not None:  # refused by TRL once a model is loaded
        raise UserError(f"{KEY}.padding_free needs packing; nothing computes padding without it either")
    _warn_if_inexact(args)
    return args


def build_dpo_config(training_args: dict[str, Any], own: OwnKeys) -> DPOConfig:
    """Return the DPOConfig of `training_args` and of our own keys. Raises `UserError` for what is wrong in them."""
    values = check_training_args(DPOConfig, training_args, own, REFUSED_BY_DPO)
    loss_key = f"{KEY}.loss_type" if "loss_type" in training_args else "hyperparameters.dpo_loss"
    args = build_training_args(DPOConfig, resolve_dpo_loss(values, loss_key))
    # What TRL refuses once the model is loaded.
    if args.f_divergence_type != "reverse_kl" and not set(args.loss_type) <= F_DIVERGENCE_LOSSES:
        known = ", ".join(sorted(F_DIVERGENCE_LOSSES))
        raise UserError(f"{KEY}.f_divergence_type {args.f_divergence_type!r} needs a dpo_loss among {known}")
    if args.use_weighting and {"aot", "aot_unpaired"} & set(args.loss_type):
        raise UserError(f"{KEY}.use_weighting: the dpo_loss 'aot' and 'aot_unpaired' have no weights of pairs")
    if args.sync_ref_model and args.precompute_ref_log_probs:
        raise UserError(f"{KEY}.sync_ref_model: with precompute_ref_log_probs the reference cannot move")
    _warn_if_inexact(args)
    return args


def _warn_if_inexact(args: SFTConfig | DPOConfig) -> None:
    for name, value in INEXACT.items():
        if getattr(args, name, None) == value:
            logger.warning("training_args.%s: %s: a trial with it does not resume exactly", name, value)


def check_training_args(
    cls: type[Config], training_args: dict[str, Any], own: OwnKeys, refused: dict[str, str]
) -> dict[str, Any]:
    """Return `training_args`, checked against the fields of `cls`, and our own keys under TRL's names."""
    model = _model_of(cls)  # type: ignore[arg-type]  # mypy takes a dataclass's own hash for its class's
    # Null is as if the key were not there, but where it has a meaning: an optional field with another default.
    training_args = {k: v for k, v in training_args.items() if v is not None or _means_null(cls, k)}
    for name in training_args:
        if name in refused:
            raise UserError(f"{KEY}.{name} has no effect here: {refused[name]}")
    checked = validate(model, training_args, KEY)
    values = {name: getattr(checked, name) for name in training_args}
    values |= {
        name: value.model_dump(exclude_unset=True) for name, value in values.items() if isinstance(value, BaseModel)
    }
    for name, (key, value) in own.items():
        if name in training_args and value is not None:
            raise UserError(f"hyperparameters.{key} and {KEY}.{name} set the same thing; keep one of them")
        values |= {} if value is None else {name: value}
    return values


@functools.cache
def _model_of(cls: Any) -> type[BaseModel]:
    """The fields of `cls` as a pydantic model, with some types narrower or wider than upstream's hints."""
    hints = typing.get_type_hints(cls) | {"fsdp": bool | str | None}
    for field in dataclasses.fields(cls):
        if field.name in MAPPINGS:
            hints[field.name] = _model_of(MAPPINGS[field.name]) | str | None
        limit = LIMIT_OF.get(field.name) or Literal[tuple(field.metadata.get("choices", ()))]
        if limit != Literal[()]:
            hints[field.name] = limit | None if type(None) in typing.get_args(hints[field.name]) else limit
    # TRL refuses another loss for SFT too, but only once the model is loaded.
    hints["loss_type"] = Literal["nll", "dft"] if cls is SFTConfig else str | list[str]
    fields: dict[str, Any] = {f.name: (_narrow(hints[f.name]), None) for f in dataclasses.fields(cls) if f.init}
    # `arbitrary_types_allowed` is for classes of the library's that a later release may add.
    config = ConfigDict(**FORBID_UNKNOWN, protected_namespaces=(), arbitrary_types_allowed=True)
    return create_model(cls.__name__, __config__=config, **fields)


def _means_null(cls: Any, name: str) -> bool:
    """Whether null is a value of the field `name` of `cls` other than its default, or there is no such field."""
    field = cls.__dataclass_fields__.get(name)
    return not field or (field.default is not None and type(None) in typing.get_args(typing.get_type_hints(cls)[name]))


def _narrow(hint: Any) -> Any:
    """An enum alone in place of `enum | str`, where any text would do."""
    for option in typing.get_args(hint):
        if isinstance(option, type) and issubclass(option, Enum):
            if "no" not in [member.value for member in option]:
                return option
            # `eval_strategy: no` is false in YAML 1.1, which is what a cluster's master reads.
            return Annotated[option, BeforeValidator(lambda value: "no" if value is False else value)]
    return hint


def resolve_dpo_loss(training_args: dict[str, Any], loss_key: str) -> dict[str, Any]:
    """Return `training_args` with a `loss_type` for TRL. Raises `UserError` for a loss that it cannot compute.

    `loss_key` is the user's key of the loss.

    Two published names are no longer TRL's. `cdpo` (Mitchell 2023, "A note on DPO with noisy preferences") is
    (1 - e) A + e B with A = -logsigmoid(beta h), B = -logsigmoid(-beta h) and e the label smoothing. TRL's `robust`
    is R = ((1 - e) A - e B) / (1 - 2e) and its `sigmoid` is A, so cDPO is exactly 2 (1 - e) A - (1 - 2e) R.
    `kto_pair` was not a pairwise loss, and has become a trainer of its own.
    """
    losses = training_args.get("loss_type", ["sigmoid"])
    losses = [losses] if isinstance(losses, str) else losses
    smoothing = training_args.get("label_smoothing", 0.0)
    resolved = dict(training_args)
    if losses == ["cdpo"]:
        if "loss_weights" in training_args or not 0 < smoothing < 0.5:
            raise UserError(f"{loss_key} 'cdpo' needs training_args.label_smoothing in (0, 0.5), and no loss_weights")
        losses = ["sigmoid", "robust"]
        resolved["loss_weights"] = [2 * (1 - smoothing), -(1 - 2 * smoothing)]
    if not losses:
        raise UserError(f"{loss_key} is empty")
    for loss in losses:
        if loss == "kto_pair":
            instead = "TRL made KTO a trainer of its own; 'apo_zero' is the nearest"
            raise UserError(f"{loss_key} 'kto_pair' is gone: {instead}")
        if loss not in DPO_LOSSES:
            known = f"{', '.join(DPO_LOSSES)}, cdpo{nearest(loss, DPO_LOSSES)}"
            raise UserError(f"{loss_key} {loss!r} is not one of {known}")
    if "robust" in losses and not 0 <= smoothing < 0.5:
        raise UserError(f"{KEY}.label_smoothing {smoothing:g} is not in [0, 0.5); dpo_loss 'robust' needs that")
    if smoothing and not SMOOTHED_LOSSES & set(losses):
        smoothed = f"cdpo and {', '.join(sorted(SMOOTHED_LOSSES))}"
        raise UserError(f"{KEY}.label_smoothing has no effect on dpo_loss {losses[0]!r}, only on {smoothed}")
    if "exo_pair" in losses and not smoothing:
        raise UserError(f"{loss_key} 'exo_pair' needs training_args.label_smoothing above 0 (its paper uses 1e-3)")
    return resolved | {"loss_type": losses}


def build_training_args(cls: type[Config], values: dict[str, Any]) -> Config:
    """Return TRL's config of a run, of checked `values` and of defaults that suit the hardware.

    Precision: weights, gradients and AdamW's state are always float32. At the learning rates of DPO a step is smaller
    than the spacing of bf16 numbers (1e-4 near 0.02), so plain bf16 weights would never move. Where the hardware has
    bf16, the forward and backward passes run under bf16 autocast. speed/hardware.py chooses everything else.
    """
    values = dict(values)
    for name in ("logging", "eval", "save"):
        strategy = values.get(f"{name}_strategy", getattr(cls, f"{name}_strategy"))
        if strategy == "steps" and values.get(f"{name}_steps") == 0:
            raise UserError(f"{KEY}.{name}_steps 0 is not greater than 0, which {name}_strategy steps needs")
    values["report_to"] = values.get("report_to") or "none"  # the library's default is every tracker that is installed
    values.setdefault("disable_tqdm", not sys.stderr.isatty())  # progress bars would fill a log file
    for name in (*cast(Any, cls)._VALID_DICT_FIELDS, "gradient_checkpointing_kwargs"):  # text may be JSON
        if isinstance(text := values.get(name), str) and (text.startswith("{") or name.endswith("_kwargs")):
            with reading(f"{KEY}.{name} {text!r}"):
                if not text.startswith("{"):
                    raise ValueError("not a mapping")
                json.loads(text, parse_constant=int)  # which refuses NaN
    # transformers 5.23 warns of the old names, TRL's own default among them. This can go with transformers 6.
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if old in values:
            values.setdefault(old.replace("gradient", "activation"), values.pop(old))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if values.get("fsdp") and processes == 1:
        check_fsdp(cls, values, KEY)
        logger.info("training_args.fsdp: there is one process, so nothing to shard; left out")
        values = {name: value for name, value in values.items() if name not in ("fsdp", "fsdp_config")}
    elif values.get("fsdp") and not torch.accelerator.is_available():
        logger.info("training_args.fsdp: accelerate ignores it on CPUs, where every process keeps a whole model")
    # TRL's default under its new name, which the library refuses beside FSDP's own. speed/hardware.py decides.
    values.setdefault("activation_checkpointing", not sets_fsdp_checkpointing(values))
    if not values.get("fp16"):
        values.setdefault("bf16", has_bf16(bool(values.get("use_cpu"))))
    if not torch.cuda.is_available():
        # Otherwise the library refuses bf16 on a machine without a GPU, though its CPU may have it.
        values.setdefault("use_cpu", not torch.backends.mps.is_available())
    try:
        args = cls(**values)
    except Exception as error:
        # With several processes, each trial of a value could start their process group.
        with reading(_key_at_fault(cls, values, error) if processes == 1 else KEY):
            raise
    model_init_kwargs: Any = args.model_init_kwargs or {}  # TRL has made a mapping of JSON text
    for name in {"dtype", "torch_dtype"} & model_init_kwargs.keys():
        dtype, key = model_init_kwargs[name], f"{KEY}.model_init_kwargs.{name}"
        if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise UserError(f"{key} {dtype!r} is not a dtype of torch")
        if dtype != "float32":
            remedy = "for autocast set training_args.bf16 or .fp16"
            raise UserError(f"{key} {dtype!r}: weights stay float32, or small steps would not move them; {remedy}")
    try_out(args, KEY)
    return args


def _key_at_fault(cls: type[Config], values: dict[str, Any], error: Exception) -> str:
    """The key of the value that has `cls` raise the same error alone; that of all if it takes several."""
    others = {"bf16": False, "use_cpu": True, "activation_checkpointing": False}
    for name, value in values.items():
        try:
            cls(**others | {name: copy.deepcopy(value)})
        except Exception as other:
            if str(other) == str(error):
                return f"{KEY}.{name}"
    return KEY


def sets_fsdp_checkpointing(training_args: dict[str, Any]) -> bool:
    """Return whether `fsdp_config` says anything about activation checkpointing."""
    config = training_args.get("fsdp_config")
    return isinstance(config, dict) and any(name.removeprefix("fsdp_") == "activation_checkpointing" for name in config)


def has_bf16(use_cpu: bool) -> bool:
    """Return whether the device to train on computes in bf16.

    A CPU without instructions for it emulates it, a hundred times slower than float32. Only x86's are looked for.
    """
    if not use_cpu and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return is_torch_bf16_gpu_available()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
