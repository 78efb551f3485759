"""The hyperparameters of both entrypoints: what a YAML may say, checked before anything is loaded or written.

`parse_hyperparameters` turns the `hyperparameters` of a trial into one of the dataclasses below. A key that nothing
reads, a value of the wrong type or two keys that contradict each other is a `UserError` naming the key.
"""

import dataclasses
import enum
import logging
import os
import sys
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from chat_format import IM_END, IM_START, RESPONSE_TEMPLATE
from errors import UserError, nearest, one_line
from storage.checkpoints import check_uuid

logger = logging.getLogger(__name__)

DEFAULT_SPLIT_SEED = 42

SFT_LOSSES = ("nll", "dft")
# The names `DPOTrainer` dispatches on. It refuses another one only at the first loss, after the reference pass.
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# The losses whose formula has `label_smoothing` in it; every other one would ignore it without a word.
SMOOTHED_LOSSES = {"robust", "exo_pair", "aot", "aot_unpaired"}

# Keys of SFTConfig and DPOConfig that could only be ignored here, and what does their job.
REFUSED = {
    "do_train": "a trial always trains",
    "do_eval": "set eval_strategy",
    "do_predict": "a trial predicts nothing",
    "load_best_model_at_end": "the best checkpoint is found by searcher.metric, and kept",
    "pad_token": "the tokenizer's own padding token is used",
    "resume_from_checkpoint": "a trial resumes from its own latest checkpoint",
    "save_only_model": "a trial resumes from its checkpoints, and needs the optimizer's state for it",
}
REFUSED_BY_SFT = REFUSED | {
    "assistant_only_loss": "set data_collator.on_completions_only",
    "completion_only_loss": "set data_collator.on_completions_only",
    "chat_template_path": "every row is rendered as ChatML by chat_format.py",
    "dataset_kwargs": "every row is rendered as ChatML by chat_format.py",
    "dataset_text_field": "every row is rendered as ChatML by chat_format.py",
    "eos_token": "every answer ends with <|im_end|> and the tokenizer's own EOS",
    "truncation_mode": "a row that is too long is cut from its end",
}
REFUSED_BY_DPO = REFUSED | {
    "label_smoothing_factor": "DPO's losses have label_smoothing",
    "truncation_mode": "prompts are cut from their left and answers from their right",
}
# Settings whose state is in no checkpoint, or left out on purpose: an order of rows drawn anew, a moving reference.
INEXACT = {"train_sampling_strategy": "group_by_length", "ignore_data_skip": True, "sync_ref_model": True}
# Names that the published example or older releases used, where the nearest name would mislead.
RENAMED = {
    "hyperparameters": {"model": "model_name"},
    "training_args": {
        "evaluation_strategy": "eval_strategy",
        "warmup_ratio": "warmup_steps, where a number below 1 is a ratio",
        "group_by_length": "train_sampling_strategy: group_by_length",
    },
}


@dataclass
class DatasetSubset:
    """One subset of the SFT data set, and the share of its rows to take: exactly one of the last two."""

    subset: str | None = None  # a configuration of the data set; None: its default one
    ratio: float | None = None  # in (0, 1]
    number_of_samples: int | None = None

    def __post_init__(self) -> None:
        name = f"subset {self.subset!r}"
        if (self.ratio is None) == (self.number_of_samples is None):
            given = "neither" if self.ratio is None else "both"
            raise UserError(f"{name}: give ratio or number_of_samples, one of the two; this has {given}")
        check_share(self, name)


@dataclass
class DataSource:
    """Rows to train on, and how many of them: all, a `ratio` or a `number_of_samples`. See `dataset_utils`."""

    name: str  # a hub id, a folder or a file
    subset: str | None = None
    split: str | None = None  # None: train, or the only one
    ratio: float | None = None  # in (0, 1]
    number_of_samples: int | None = None
    columns: dict[str, str] = field(default_factory=dict)  # the name that is read: what the data set calls it

    def __post_init__(self) -> None:
        if self.ratio is not None and self.number_of_samples is not None:
            raise UserError(f"{self.name}: give ratio or number_of_samples, not both")
        check_share(self, self.name)
        for column, theirs in self.columns.items():
            if not isinstance(theirs, str):
                raise UserError(f"columns.{column} is {theirs!r}, which is not the name of a column")

    def __str__(self) -> str:
        parts = [f"{key} {value}" for key, value in (("subset", self.subset), ("split", self.split)) if value]
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


def check_share(share: DatasetSubset | DataSource, name: str) -> None:
    if share.ratio is not None and not 0 < share.ratio <= 1:
        raise UserError(f"{name}: ratio {share.ratio:g} is not in (0, 1]")
    if share.number_of_samples is not None and share.number_of_samples < 1:
        raise UserError(f"{name}: number_of_samples {share.number_of_samples} is not at least 1")


@dataclass
class DataCollator:
    """Which tokens of a row are supervised."""

    on_completions_only: bool = True  # the answer with its stops; False: the prompt as well
    response_template: str = RESPONSE_TEMPLATE  # what the answers follow

    def __post_init__(self) -> None:
        if self.response_template != RESPONSE_TEMPLATE:
            raise UserError(
                f"response_template {self.response_template!r} is not what answers follow in ChatML:"
                f" {RESPONSE_TEMPLATE!r}"
            )


@dataclass
class ChatTokens:
    """Whether the turn markers get token ids of their own, or stay the text that the tokenizer splits."""

    add_chat_tokens: bool = False
    special_tokens: list[str] = field(default_factory=lambda: [IM_START, IM_END])


class TrainerArgs:
    """What both kinds of experiment derive from `args`, TRL's config of the run."""

    args: SFTConfig | DPOConfig
    model_ckpt: str | None = None  # only DPO starts from a checkpoint
    training_args: dict[str, Any]
    # What TRL reports at an evaluation, and so what searcher.metric can be.
    eval_metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy")

    @property
    def split_seed(self) -> int:
        """Draws the samples and the held-out 20%. Not `seed`, so trials that differ in it share their rows."""
        return DEFAULT_SPLIT_SEED if self.args.data_seed is None else self.args.data_seed

    @property
    def added_tokens(self) -> list[str]:
        """Tokens to add to the model's own."""
        return []

    @property
    def packing(self) -> bool:
        """Whether TRL packs several rows into one sequence."""
        return False

    @property
    def checkpointing(self) -> bool | None:
        """What the YAML says of activation checkpointing, or of FSDP's own; None where it leaves the choice open."""
        names = ("activation_checkpointing", "gradient_checkpointing")
        by_fsdp = self.args.fsdp and _fsdp_checkpointing(self.training_args)
        if by_fsdp or any(name in self.training_args for name in names):
            return self.args.activation_checkpointing
        return None

    @property
    def model_init_kwargs(self) -> dict[str, Any]:
        """For `from_pretrained`: TRL would ignore them where, as here, the model is built before the trainer."""
        return {**(self.args.model_init_kwargs or {}), "trust_remote_code": self.args.trust_remote_code}


@dataclass
class SFTHyperparameters(TrainerArgs):
    """`hyperparameters` of an SFT experiment. `args` is the SFTConfig they amount to."""

    model_name: str
    dataset: str
    dataset_subsets: list[DatasetSubset] = field(default_factory=lambda: [DatasetSubset(ratio=1.0)])
    split: str | None = None  # of the data set; None: train, or the only one
    columns: dict[str, str] = field(default_factory=dict)  # the name that is read: what the data set calls it
    streaming: bool = False  # take number_of_samples of each subset without downloading the rest
    max_seq_length: int | None = None  # tokens of a row, prompt and answer; None: TRL's default, 1024
    data_collator: DataCollator = field(default_factory=DataCollator)
    chat_tokens: ChatTokens = field(default_factory=ChatTokens)
    training_args: dict[str, Any] = field(default_factory=dict)
    args: SFTConfig = field(init=False)

    def __post_init__(self) -> None:
        check_positive(self, "max_seq_length")
        if not self.dataset_subsets:
            raise UserError("dataset_subsets is empty: for all rows of the data set it is [{ratio: 1.0}]")
        for share in self.dataset_subsets:
            if self.streaming and share.number_of_samples is None:
                raise UserError(
                    "streaming: true needs a number_of_samples for each of dataset_subsets, as in [{number_of_samples:"
                    " 1000}]: how many rows a ratio is, is not known before all are downloaded (streaming: false)"
                )
        own = {"max_length": ("max_seq_length", self.max_seq_length)}
        training_args = check_training_args(SFTConfig, self.training_args, own, REFUSED_BY_SFT)
        loss = training_args.get("loss_type", "nll")
        if loss not in SFT_LOSSES:  # TRL refuses it too, but only once the model is loaded
            raise UserError(f"training_args.loss_type {loss!r} is none of {', '.join(SFT_LOSSES)}")
        self.args = build_training_args(SFTConfig, training_args)
        if self.args.packing and self.args.max_length is None:
            raise UserError("training_args.packing needs max_seq_length, the length of a pack")
        if self.args.packing and self.args.packing_strategy != "bfd" and self.args.eval_packing is False:
            # TRL would cut the evaluation's rows itself, and say nothing.
            raise UserError(
                f"training_args.packing_strategy {self.args.packing_strategy!r} splits long rows, which eval_packing:"
                " false would have to cut; leave eval_packing out, or take packing_strategy: bfd"
            )

    @property
    def added_tokens(self) -> list[str]:
        return self.chat_tokens.special_tokens if self.chat_tokens.add_chat_tokens else []

    @property
    def sources(self) -> list[DataSource]:
        return [
            DataSource(self.dataset, share.subset, self.split, share.ratio, share.number_of_samples, self.columns)
            for share in self.dataset_subsets
        ]

    @property
    def packing(self) -> bool:
        return self.args.packing

    @property
    def loading(self) -> dict[str, Any]:
        """Keyword arguments for `load_sft_dataset`."""
        return {"sources": self.sources, "seed": self.split_seed, "streaming": self.streaming}

    @property
    def tokenizing(self) -> dict[str, Any]:
        """Keyword arguments for `tokenize_sft_dataset`."""
        splits_rows = self.args.packing and self.args.packing_strategy != "bfd"  # over as many sequences as they fill
        return {
            "on_completions_only": self.data_collator.on_completions_only,
            "max_length": None if splits_rows else self.args.max_length,
        }


@dataclass
class DPOHyperparameters(TrainerArgs):
    """`hyperparameters` of a DPO experiment. `args` is the DPOConfig they amount to."""

    eval_metrics: ClassVar[tuple[str, ...]] = (
        *TrainerArgs.eval_metrics,
        *(f"eval_rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected")),
        *(f"eval_{name}/{side}" for name in ("logps", "logits") for side in ("chosen", "rejected")),
    )

    datasets: list[str | DataSource]
    model_name: str | None = None
    model_ckpt: str | None = None  # UUID of a Determined checkpoint, an SFT run's
    dpo_beta: float | None = None
    dpo_loss: str | list[str] | None = None
    max_length: int | None = None  # tokens of prompt and answer together; None: TRL's default, 1024
    max_prompt_length: int | None = None
    max_target_length: int | None = None  # tokens of an answer
    precompute_ref_log_probs: bool | None = None
    training_args: dict[str, Any] = field(default_factory=dict)
    args: DPOConfig = field(init=False)

    def __post_init__(self) -> None:
        check_positive(self, "dpo_beta", "max_length", "max_prompt_length", "max_target_length")
        if not self.datasets:
            raise UserError("datasets is empty")
        if not (self.model_ckpt or self.model_name):
            raise UserError("give model_ckpt (the UUID of an SFT checkpoint) or model_name")
        if self.model_ckpt:
            check_uuid(self.model_ckpt, "model_ckpt")
        own = {
            "beta": ("dpo_beta", self.dpo_beta),
            "loss_type": ("dpo_loss", self.dpo_loss),
            "max_length": ("max_length", self.max_length),
            "precompute_ref_log_probs": ("precompute_ref_log_probs", self.precompute_ref_log_probs),
        }
        training_args = check_training_args(DPOConfig, self.training_args, own, REFUSED_BY_DPO)
        self.args = build_training_args(DPOConfig, resolve_dpo_loss(training_args))
        machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        if self.args.precompute_ref_log_probs and machines > 1:
            # TRL 1.16 writes them beside the dataset's file on the first machine, and reads them there on all. This can
            # go once it gathers them.
            raise UserError(f"precompute_ref_log_probs: true needs a trial on one machine; this one runs on {machines}")

    @property
    def sources(self) -> list[DataSource]:
        return [DataSource(given) if isinstance(given, str) else given for given in self.datasets]

    @property
    def loading(self) -> dict[str, Any]:
        """Keyword arguments for `load_dpo_dataset`."""
        return {"sources": self.sources, "seed": self.split_seed}

    @property
    def tokenizing(self) -> dict[str, Any]:
        """Keyword arguments for `tokenize_dpo_dataset`."""
        return {
            "max_length": self.args.max_length,
            "max_prompt_length": self.max_prompt_length,
            "max_target_length": self.max_target_length,
        }

    @property
    def start(self) -> str:
        """What DPO starts from, in a line for the log."""
        if self.model_ckpt:
            return f"DPO starts from checkpoint {self.model_ckpt}"
        return f"no model_ckpt: DPO starts from {self.model_name}, which has seen no SFT of this project"


Hyperparameters = TypeVar("Hyperparameters", SFTHyperparameters, DPOHyperparameters)


def parse_hyperparameters(cls: type[Hyperparameters], values: dict[str, Any]) -> Hyperparameters:
    """The `hyperparameters` of a trial as a `cls`. Raises `UserError` naming the key that is wrong."""
    return convert(values, cls, "hyperparameters")


def check_searcher_metric(cls: type[Hyperparameters], metric: str) -> None:
    if metric not in cls.eval_metrics:
        known = ", ".join(cls.eval_metrics)
        raise UserError(f"searcher.metric {metric!r} is not reported at evaluations, which have {known}")


def check_positive(hparams: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(hparams, key)
        if value is not None and value <= 0:
            raise UserError(f"{key} {value:g} is not greater than 0")


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value`, as YAML or JSON gave it, checked against the type `hint` and converted to it.

    Dataclasses are built from mappings, so nested keys are checked as well; a hint of a kind not known here (a class
    of the library's) lets anything through.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        # `IntervalStrategy | str`: the text must be a name of the enumeration all the same.
        options = [o for o in options if _is_enum(o)] or options
        if isinstance(value, dict):  # so that what is wrong inside of it is told
            options = [o for o in options if dataclasses.is_dataclass(o)] or options
        errors = {}
        for option in options:
            try:
                return convert(value, option, key)
            except UserError as error:
                errors[option] = error
        errors.pop(types.NoneType, None)  # `int | None` wants a whole number
        raise errors.popitem()[1] if len(errors) == 1 else _wrong_type(value, hint, key)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key)
    if origin is list:
        if not isinstance(value, list):
            raise _wrong_type(value, hint, key)
        return [convert(item, options[0], f"{key}[{index}]") for index, item in enumerate(value)]
    if _is_enum(hint):
        if value is False and "no" in [member.value for member in hint]:
            return "no"  # `eval_strategy: no`, which YAML 1.1 (a cluster's master reads that) takes for false
        if value not in [member.value for member in hint]:
            raise _wrong_type(value, hint, key)
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise _wrong_type(value, hint, key)
    plain = origin or hint
    if plain in (str, float, bool, dict, types.NoneType) and not isinstance(value, plain):
        raise _wrong_type(value, hint, key)
    return value


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _wrong_type(value: Any, hint: Any, key: str) -> UserError:
    names = {str: "text", float: "a number", int: "a whole number", bool: "true or false", dict: "a mapping"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [dict if dataclasses.is_dataclass(o) else o for o in typing.get_args(hint)]
        wanted = " or ".join(names[o] for o in options) if all(o in names for o in options) else None
    else:
        wanted = names.get(typing.get_origin(hint) or hint)
    if _is_enum(hint):
        wanted = "one of " + ", ".join(member.value for member in hint)
    elif typing.get_origin(hint) is list:
        wanted = "a list, as in [a, b]"
    elif wanted is None:
        wanted = str(hint).replace("typing.", "").replace("transformers.trainer_utils.", "")
    return UserError(f"{key} is {value!r}, which is not {wanted}")


def _build(cls: type, values: Any, key: str) -> Any:
    if not isinstance(values, dict):
        raise _wrong_type(values, dict, key)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    refuse_unknown(values, fields, key)
    hints = typing.get_type_hints(cls)
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{key}.{missing[0]} is missing")
    converted = {name: convert(value, hints[name], f"{key}.{name}") for name, value in values.items()}
    try:
        return cls(**converted)
    except UserError as error:
        raise UserError(f"{key}: {error}" if not str(error).startswith(key) else str(error)) from error


def refuse_unknown(values: dict[str, Any], known: typing.Collection[str], key: str) -> None:
    for name in values:
        if name not in known:
            renamed = RENAMED.get(key, {}).get(name)
            hint = f" (now {renamed})" if renamed else nearest(name, known)
            raise UserError(f"{key}.{name} is not a hyperparameter{hint}")


def resolve_dpo_loss(training_args: dict[str, Any]) -> dict[str, Any]:
    """`training_args` with a `loss_type` that TRL computes as asked, or a `UserError` with the reason.

    The published names that TRL has dropped: `cdpo` (Mitchell 2023, "A note on DPO with noisy preferences") is
    (1 - e) A + e B with A = -logsigmoid(beta h), B = -logsigmoid(-beta h) and e the label smoothing. TRL's `robust`
    is R = ((1 - e) A - e B) / (1 - 2e) and its `sigmoid` is A, so cDPO is exactly 2 (1 - e) A - (1 - 2e) R.
    `kto_pair` was no pairwise loss and has become a trainer of its own.
    """
    losses = training_args.get("loss_type", ["sigmoid"])
    losses = [losses] if isinstance(losses, str) else losses
    smoothing = training_args.get("label_smoothing", 0.0)
    resolved = dict(training_args)
    if losses == ["cdpo"]:
        if "loss_weights" in training_args or not 0 < smoothing < 0.5:
            raise UserError("dpo_loss 'cdpo' needs training_args.label_smoothing in (0, 0.5), and no loss_weights")
        losses = ["sigmoid", "robust"]
        resolved["loss_weights"] = [2 * (1 - smoothing), -(1 - 2 * smoothing)]
    for loss in losses:
        if loss == "kto_pair":
            raise UserError("dpo_loss 'kto_pair' is gone: TRL made KTO a trainer of its own; 'apo_zero' is the nearest")
        if loss not in DPO_LOSSES:
            raise UserError(f"dpo_loss {loss!r} is none of {', '.join(DPO_LOSSES)}, cdpo{nearest(loss, DPO_LOSSES)}")
    if "robust" in losses and not 0 <= smoothing < 0.5:
        raise UserError(
            f"training_args.label_smoothing {smoothing:g} is not in [0, 0.5), as dpo_loss 'robust' needs it"
        )
    if smoothing and not SMOOTHED_LOSSES & set(losses):
        raise UserError(
            f"training_args.label_smoothing has no effect on dpo_loss {losses[0]!r}, only on cdpo and"
            f" {', '.join(sorted(SMOOTHED_LOSSES))}"
        )
    if "exo_pair" in losses and not smoothing:
        raise UserError("dpo_loss 'exo_pair' needs training_args.label_smoothing above 0 (its paper takes 1e-3)")
    return resolved | {"loss_type": losses}


def check_training_args(
    cls: type[TrainingArguments],
    training_args: dict[str, Any],
    own: dict[str, tuple[str, Any]],
    refused: dict[str, str],
) -> dict[str, Any]:
    """`training_args` for `cls`: every key known, of the right type and without a rival, and our own keys beside them.

    `own` maps a name of TRL's to the key of ours that sets it and its value; None leaves TRL's name in charge.
    """
    for name, instead in refused.items():
        if name in training_args:
            raise UserError(f"training_args.{name} has no effect here: {instead}")
    refuse_unknown(training_args, {f.name for f in dataclasses.fields(cls) if f.init}, "training_args")
    # Two hints of upstream's are narrower than what it takes.
    hints = typing.get_type_hints(cls) | {"fsdp": bool | str | None, "loss_type": str | list[str]}
    values = {name: convert(value, hints[name], f"training_args.{name}") for name, value in training_args.items()}
    for name, (key, value) in own.items():
        if value is None:
            continue
        if name in values:
            raise UserError(f"{key} and training_args.{name} set the same thing; keep one of them")
        values[name] = value
    return values


def _fsdp_checkpointing(training_args: dict[str, Any]) -> bool:
    """Whether `fsdp_config` says anything on activation checkpointing."""
    config = training_args.get("fsdp_config")
    return isinstance(config, dict) and any(name.removeprefix("fsdp_") == "activation_checkpointing" for name in config)


def has_bf16(use_cpu: bool) -> bool:
    """Whether the device that is trained on computes in bf16. Without instructions for it a CPU emulates it, a hundred
    times slower than float32; only x86's are looked for."""
    if not use_cpu and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return is_torch_bf16_gpu_available()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def build_training_args(cls: type[TrainingArguments], training_args: dict[str, Any]) -> Any:
    """TRL's config of a run, with defaults fit for the hardware at hand.

    Precision: weights, gradients and AdamW's state are float32 always. At the learning rates of DPO a step is smaller
    than the spacing of bf16 numbers (1e-4 near 0.02), so bare bf16 weights would never move. Where the hardware has
    bf16 the forward and backward pass run under bf16 autocast. What else depends on it is in hardware.py.
    """
    values = dict(training_args)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if values.get(name, 1) < 1:
            raise UserError(f"training_args.{name} {values[name]} is not at least 1")
    values.setdefault("report_to", "none")  # the library's default is every tracker it finds installed
    values.setdefault("disable_tqdm", not sys.stderr.isatty())  # its bars, redrawn, would fill a log file
    # transformers 5.23 warns of the old names, TRL's own default among them. This can go with transformers 6.
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if old in values:
            values.setdefault(old.replace("gradient", "activation"), values.pop(old))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if values.get("fsdp") and processes > 1 and not torch.accelerator.is_available():
        logger.info("training_args.fsdp: accelerate ignores it on CPUs, where every process keeps a whole model")
    if values.get("fsdp") and processes == 1:
        logger.info("training_args.fsdp: there is one process, so nothing to shard; left out")
        values = {name: value for name, value in values.items() if name not in ("fsdp", "fsdp_config")}
    # FSDP may do it itself; else it is on until `suit_hardware` knows that it need not be.
    values.setdefault("activation_checkpointing", not _fsdp_checkpointing(values))
    if not values.get("fp16"):
        values.setdefault("bf16", has_bf16(bool(values.get("use_cpu"))))
    if not torch.cuda.is_available():
        # Without it the library refuses bf16 on a machine that has no GPU at all, though its CPU may have it.
        values.setdefault("use_cpu", not torch.backends.mps.is_available())
    try:
        args = cls(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training_args: {one_line(error)}") from error
    for name, value in INEXACT.items():
        if getattr(args, name, None) == value:
            logger.warning(
                "training_args.%s: %s: a trial that is restarted will not end exactly as one that is not", name, value
            )
    for name in ("dtype", "torch_dtype"):
        check_dtype((args.model_init_kwargs or {}).get(name, "float32"), f"training_args.model_init_kwargs.{name}")
    return args


def check_dtype(dtype: Any, key: str) -> None:
    if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise UserError(f"{key} {dtype!r} is no dtype of torch")
    if dtype != "float32":
        raise UserError(
            f"{key} {dtype!r}: weights stay float32, or small learning rates would not move them; for bf16 or fp16"
            " autocast set training_args.bf16 or .fp16"
        )
