"""The hyperparameters of SFT and DPO experiments, checked before anything is loaded or written."""

import logging
import os
from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from chat_format import IM_END, IM_START, RESPONSE_TEMPLATE
from config.cluster_names import FORMS, NO_CHECKPOINT, check_checkpoint_name
from config.validation import FORBID_UNKNOWN, Beta, Count, NotEmpty, PartialShare, Share, validate
from errors import UserError, about

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.sft_config import SFTConfig

logger = logging.getLogger(__name__)
DEFAULT_SPLIT_SEED = 42
DEFAULT_EVAL_RATIO = 0.2
DEFAULT_BETA = 0.1  # TRL's
SHOWN = ("max_seq_length", "dpo_beta", "dpo_loss", "max_length", "max_prompt_length", "max_target_length", "lora")
EVALUATION_KEYS = ("eval_ratio", "eval_split", "eval_dataset")  # of a source of rows; one of them says what is held out


@dataclass(config=FORBID_UNKNOWN)
class DatasetSubset:
    """One subset of the SFT data set, and how many of its rows to take: either a `ratio` or a `number_of_samples`."""

    subset: str | None = None  # a configuration of the data set; None: its default one
    ratio: Share | None = None  # share of the rows, in (0, 1]
    number_of_samples: Count | None = None  # rows

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.number_of_samples is None):
            given = "neither" if self.ratio is None else "both"
            raise UserError(f"subset {self.subset!r}: give either ratio or number_of_samples; this has {given}")


@dataclass(config=FORBID_UNKNOWN)
class DataSource:
    """Rows to train on, and how many of them: all, a `ratio` or a `number_of_samples`. See `dataset_utils`."""

    name: NotEmpty  # a hub id, a folder or a file
    subset: str | None = None  # a configuration of the data set; None: its default one
    split: NotEmpty | None = None  # None: train, or the only one
    ratio: Share | None = None  # share of the rows, in (0, 1]
    number_of_samples: Count | None = None  # rows
    columns: dict[str, str] = field(default_factory=dict)  # the name that is read: the data set's name for it
    eval_ratio: PartialShare | None = None  # share of the prompts to hold out; None: 0.2, none with evaluation data
    eval_split: NotEmpty | None = None  # evaluation data, not trained on: this split of the data set
    eval_dataset: "NotEmpty | DataSource | None" = None  # evaluation data from a data set of its own

    def __post_init__(self) -> None:
        if self.ratio is not None and self.number_of_samples is not None:
            raise UserError(f"{self.name}: give ratio or number_of_samples, not both")
        with about(self.name):
            check_evaluation_keys(self)

    @property
    def evaluation(self) -> "DataSource | None":
        """The evaluation data that the source names, as a source of its own; None if its own rows are held out."""
        if self.eval_split is not None:
            return DataSource(self.name, self.subset, self.eval_split, columns=self.columns)
        return DataSource(self.eval_dataset) if isinstance(self.eval_dataset, str) else self.eval_dataset

    def __str__(self) -> str:
        parts = [f"{key} {value}" for key, value in (("subset", self.subset), ("split", self.split)) if value]
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


def check_evaluation_keys(of: Any, *, is_evaluation: bool = False) -> None:
    """Raise `UserError` if more than one of EVALUATION_KEYS is given `of` rows, or one of evaluation data itself."""
    given = [key for key in EVALUATION_KEYS if getattr(of, key) is not None]
    if is_evaluation and given:
        raise UserError(f"{given[0]} has no effect on evaluation data, which is held out as a whole")
    if len(given) > 1:
        raise UserError(f"give {given[0]} or {given[1]}, not both")
    if isinstance(of.eval_dataset, DataSource):
        with about("eval_dataset"):
            check_evaluation_keys(of.eval_dataset, is_evaluation=True)


@dataclass(config=FORBID_UNKNOWN)
class DataCollator:
    """Which tokens of a row are supervised."""

    on_completions_only: bool = True  # only the answer with its stops; False: the prompt as well
    response_template: str = RESPONSE_TEMPLATE  # the text before each answer; ChatML's is the only choice

    def __post_init__(self) -> None:
        if (given := self.response_template) != RESPONSE_TEMPLATE:
            raise UserError(f".response_template {given!r} is not what answers follow in ChatML: {RESPONSE_TEMPLATE!r}")


@dataclass(config=FORBID_UNKNOWN)
class ChatTokens:
    """Whether the turn markers get token ids of their own, or remain text that the tokenizer splits."""

    add_chat_tokens: bool = False  # add special_tokens to the vocabulary, with new embeddings
    special_tokens: list[NotEmpty] = field(default_factory=lambda: [IM_START, IM_END])


TrlConfig = TypeVar("TrlConfig", "SFTConfig", "DPOConfig")


class TrainingHyperparameters(Generic[TrlConfig]):
    """Hyperparameters that SFT and DPO experiments have in common."""

    args: TrlConfig  # TRL's config of the run
    training_args: dict[str, Any]  # as the YAML has them
    lora: dict[str, Any] | None  # as the YAML has it
    load_in_4bit: bool
    lora_config: "LoraConfig | None" = None  # peft's; None: all weights are trained
    added_tokens: list[str] | None = None  # to add to the model's own
    packing: bool = False  # whether TRL packs several rows into one sequence
    checkpoint: str | None = None  # where DPO starts, as `model_ckpt` names it; None: at `model_name`, as SFT does
    start_message: str = ""  # a line for the log on what DPO starts from; empty for SFT
    # An evaluation reports these, so searcher.metric can be one of them.
    eval_metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy")

    def check_metric(self) -> None:
        """Raise `UserError` unless evaluations report what `training_args` choose the best model by."""
        metric = self.args.metric_for_best_model
        if metric and f"eval_{metric.removeprefix('eval_')}" not in self.eval_metrics:
            known = ", ".join(self.eval_metrics)
            raise UserError(f".training_args.metric_for_best_model {metric!r} is not one that is reported: {known}")

    def set_lora(self) -> None:
        """Build peft's config from `lora`, once `args` are known. Raises `UserError` for what is wrong in it."""
        from config.lora import build_lora_config, check_4bit

        given: Any = self.args.model_init_kwargs or {}  # TRL has made a mapping of JSON text
        for name in {"quantization_config", "load_in_4bit", "load_in_8bit"} & given.keys():
            raise UserError(f".training_args.model_init_kwargs.{name}: set lora and load_in_4bit: true in its place")
        if self.load_in_4bit:
            check_4bit(self.args, has_lora=self.lora is not None)
        if self.lora is None:
            return
        self.lora_config = build_lora_config(self.lora)
        self.check_sharding(int(os.environ.get("WORLD_SIZE", "1")))

    def check_sharding(self, processes: int) -> None:
        """Raise `UserError` if so many processes would shard a frozen base. (With one, FSDP is left out.)"""
        for name, remedy in (("fsdp", "set it to false, and fsdp_config to null"), ("deepspeed", "leave it out")):
            if self.lora is not None and self.training_args.get(name) and (processes > 1 or name == "deepspeed"):
                why = "each GPU holds all of a frozen base, and little more"
                raise UserError(f"hyperparameters.training_args.{name} has no use with lora: {why}; {remedy}")

    @property
    def sources(self) -> list[DataSource]:
        """The data, each part as a source of rows."""
        raise NotImplementedError

    @property
    def split_seed(self) -> int:
        """Seed for the samples and the held-out rows. It is not `seed`, so trials that differ in `seed` share rows."""
        return DEFAULT_SPLIT_SEED if self.args.data_seed is None else self.args.data_seed

    @property
    def activation_checkpointing(self) -> bool | None:
        """What the YAML says about activation checkpointing, or about FSDP's own; None if it says nothing."""
        from config.training_args import sets_fsdp_checkpointing

        names = ("activation_checkpointing", "gradient_checkpointing")
        said = any(self.training_args.get(name) is not None for name in names)
        said_for_fsdp = self.args.fsdp and sets_fsdp_checkpointing(self.training_args)
        return self.args.activation_checkpointing if said or said_for_fsdp else None

    @property
    def model_init_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`. TRL ignores them here, as the model is built before the trainer.

        Under an adapter the weights have autocast's type: as they never change, no step is lost to its rounding.
        """
        given: Any = self.args.model_init_kwargs or {}  # TRL has made a mapping of JSON text
        kwargs = {**given, "trust_remote_code": self.args.trust_remote_code}
        if self.lora_config is not None:
            kwargs.pop("torch_dtype", None)  # another name for dtype
            kwargs["dtype"] = self.base_dtype
        if self.load_in_4bit:
            from config.lora import build_quantization

            kwargs["quantization_config"] = build_quantization(self.computed_dtype)
        return kwargs

    @property
    def base_dtype(self) -> "torch.dtype":
        """The type of the weights under an adapter."""
        return self.base_dtype_where(self.computed_dtype)

    def base_dtype_where(self, computed: "torch.dtype") -> "torch.dtype":
        """Return `base_dtype` where products are `computed` in a type: that one, or float32 if `model_init_kwargs` say.

        (They can say nothing else.)
        """
        import torch

        given: Any = self.args.model_init_kwargs or {}
        return torch.float32 if given.keys() & {"dtype", "torch_dtype"} else computed

    @property
    def loads_reference(self) -> bool:
        """Whether DPO's reference is a second model: not if precomputed, nor under an adapter, where it is the base."""
        return self.lora_config is None and not getattr(self.args, "precompute_ref_log_probs", True)

    def shown_values(self) -> dict[str, Any]:
        """Return what anyone may see of the hyperparameters: numbers, switches and names of choices, no text."""
        choices = ("optim", "lr_scheduler_type", "loss_type", "packing_strategy")
        given = {name: getattr(self, name, None) for name in SHOWN}
        given |= {k: v for k, v in self.training_args.items() if isinstance(v, int | float) or k in choices}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def computed_dtype(self) -> "torch.dtype":
        """The type of matrix products: autocast's, or float32 without it."""
        import torch

        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32


@dataclass(config=FORBID_UNKNOWN)
class SFTHyperparameters(TrainingHyperparameters["SFTConfig"]):
    """`hyperparameters` of an SFT experiment. `args` is the SFTConfig that they describe."""

    model_name: NotEmpty  # a hub id or a folder
    dataset: NotEmpty  # a hub id, a folder or a file
    dataset_subsets: list[DatasetSubset] = field(default_factory=lambda: [DatasetSubset(ratio=1.0)])
    split: NotEmpty | None = None  # of the data set; None: train, or the only one
    eval_ratio: PartialShare | None = None  # as in DataSource, and so are the next two
    eval_split: NotEmpty | None = None
    eval_dataset: NotEmpty | DataSource | None = None
    columns: dict[str, str] = field(default_factory=dict)  # the name that is read: the data set's name for it
    streaming: bool = False  # take number_of_samples of each subset without downloading the rest
    max_seq_length: PositiveInt | None = None  # tokens of a row, prompt and answer; None: TRL's default, 1024
    data_collator: DataCollator = field(default_factory=DataCollator)  # which tokens are supervised
    chat_tokens: ChatTokens = field(default_factory=ChatTokens)  # whether turn markers become tokens
    lora: dict[str, Any] | None = None  # keys of peft's LoraConfig: train an adapter; None: train all weights
    load_in_4bit: bool = False  # QLoRA: hold the weights under the adapter in 4 bits
    training_args: dict[str, Any] = field(default_factory=dict)  # keys of TRL's SFTConfig

    def __post_init__(self) -> None:
        if not self.dataset_subsets:
            raise UserError(".dataset_subsets is empty; for all rows of the data set write [{ratio: 1.0}]")
        if self.streaming and any(share.number_of_samples is None for share in self.dataset_subsets):
            example = "[{number_of_samples: 1000}]; a ratio needs all rows downloaded (streaming: false)"
            raise UserError(f".streaming: true needs a number_of_samples for each of dataset_subsets, as in {example}")
        check_evaluation_keys(self)
        from config.training_args import build_sft_config  # torch and TRL: only once everything else is right

        self.args = build_sft_config(self.training_args, {"max_length": ("max_seq_length", self.max_seq_length)})
        self.check_metric()
        self.set_lora()
        self.packing = self.args.packing
        self.added_tokens = self.chat_tokens.special_tokens if self.chat_tokens.add_chat_tokens else None

    @property
    def sources(self) -> list[DataSource]:
        """The data set's subsets, each as a source of rows."""
        common = {key: getattr(self, key) for key in ("split", "columns", *EVALUATION_KEYS)}
        return [DataSource(self.dataset, **vars(share), **common) for share in self.dataset_subsets]

    @property
    def load_options(self) -> dict[str, Any]:
        """Keyword arguments for `load_sft_dataset`."""
        return {"sources": self.sources, "seed": self.split_seed, "streaming": self.streaming}

    @property
    def tokenize_options(self) -> dict[str, Any]:
        """Keyword arguments for `tokenize_sft_dataset`."""
        splits_rows = self.args.packing and self.args.packing_strategy != "bfd"  # a long row fills several packs
        return {
            "on_completions_only": self.data_collator.on_completions_only,
            "max_length": None if splits_rows else self.args.max_length,
        }


@dataclass(config=FORBID_UNKNOWN)
class DPOHyperparameters(TrainingHyperparameters["DPOConfig"]):
    """`hyperparameters` of a DPO experiment. `args` is the DPOConfig that they describe."""

    eval_metrics: ClassVar[tuple[str, ...]] = (
        *TrainingHyperparameters.eval_metrics,
        "eval_preference_loss",
        *(f"eval_rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected")),
        *(f"eval_{name}/{side}" for name in ("logps", "logits") for side in ("chosen", "rejected")),
    )

    datasets: list[NotEmpty | DataSource]  # preference data sets: a hub id, a folder, a file, or one with its details
    model_name: str | None = None  # a hub id or a folder, for use with `model_ckpt: none`
    model_ckpt: str | None = None  # an SFT checkpoint: see config/cluster_names.py. "none": start from model_name
    dpo_beta: Beta | None = None  # penalty for leaving the reference; None: TRL's default, 0.1
    dpo_loss: str | list[str] | None = None  # name of a TRL loss, or cdpo; None: TRL's default, sigmoid
    max_length: PositiveInt | None = None  # tokens of prompt and answer; None: 1024. See Truncation
    max_prompt_length: PositiveInt | None = None  # tokens of a prompt; None: never cut, see max_length
    max_target_length: PositiveInt | None = None  # tokens of an answer; None: no limit of its own
    precompute_ref_log_probs: bool | None = None  # the reference's log-probs in one pass before training
    lora: dict[str, Any] | None = None  # as in SFT, and so is the next
    load_in_4bit: bool = False
    training_args: dict[str, Any] = field(default_factory=dict)  # keys of TRL's DPOConfig

    def __post_init__(self) -> None:
        if not self.datasets:
            raise UserError(".datasets is empty")
        if not self.model_ckpt:
            forms = f"the UUID of an SFT checkpoint, or {FORMS} of a cluster"
            raise UserError(
                f".model_ckpt is missing: give {forms}; {NO_CHECKPOINT} starts from model_name, without SFT"
            )
        if self.model_ckpt == NO_CHECKPOINT:
            if not self.model_name:
                raise UserError(f".model_ckpt: {NO_CHECKPOINT} needs a model_name to start from")
            self.start_message = (
                f"no checkpoint: DPO starts from {self.model_name}, as model_ckpt: {NO_CHECKPOINT} says"
            )
        else:
            check_checkpoint_name(self.model_ckpt, ".model_ckpt")
            self.checkpoint = self.model_ckpt
            self.start_message = f"DPO starts from checkpoint {self.model_ckpt}"
        if self.lora is not None and self.training_args.get("sync_ref_model"):  # which TRL refuses late
            raise UserError(".training_args.sync_ref_model: with lora the reference is the model under the adapter")
        from config.training_args import build_dpo_config  # torch and TRL: only once everything else is right

        own = {name: (name, getattr(self, name)) for name in ("max_length", "precompute_ref_log_probs")}
        own |= {"beta": ("dpo_beta", self.dpo_beta), "loss_type": ("dpo_loss", self.dpo_loss)}
        self.args = build_dpo_config(self.training_args, own)
        self.check_metric()
        self.set_lora()
        if self.lora_config is not None and self.lora_config.lora_dropout and self.args.disable_dropout:
            remedy = "for it set training_args.disable_dropout: false"
            logger.warning("lora.lora_dropout has no effect: DPO switches dropout off; %s", remedy)

    @property
    def sources(self) -> list[DataSource]:
        """The data sets, each as a source of rows."""
        return [DataSource(given) if isinstance(given, str) else given for given in self.datasets]

    @property
    def load_options(self) -> dict[str, Any]:
        """Keyword arguments for `load_dpo_dataset`."""
        return {"sources": self.sources, "seed": self.split_seed}

    @property
    def tokenize_options(self) -> dict[str, Any]:
        """Keyword arguments for `tokenize_dpo_dataset`."""
        limits = {"max_prompt_length": self.max_prompt_length, "max_target_length": self.max_target_length}
        return {"max_length": self.args.max_length, **limits}


Hyperparameters = TypeVar("Hyperparameters", bound="TrainingHyperparameters[Any]")


def parse_hyperparameters(cls: type[Hyperparameters], values: dict[str, Any]) -> Hyperparameters:
    """Return the `hyperparameters` of a trial as a `cls`.

    A key whose value is null (in a YAML also one with nothing after it) is as if it were not there. Raises `UserError`,
    which names the key, for an unknown one, a value of the wrong type and a contradiction.
    """
    return validate(cls, {key: value for key, value in values.items() if value is not None}, "hyperparameters")


def check_searcher_metric(cls: type[Hyperparameters], metric: str) -> None:
    """Raise `UserError` unless evaluations of a `cls` experiment report `metric`."""
    if metric not in cls.eval_metrics:
        known = ", ".join(cls.eval_metrics)
        raise UserError(f"searcher.metric {metric!r} is not reported at evaluations, which have {known}")
