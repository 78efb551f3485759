"""The one table of what differs between an SFT and a DPO experiment."""

from collections.abc import Callable
from dataclasses import dataclass

from datasets import DatasetDict

from config.hyperparameters import DPOHyperparameters, SFTHyperparameters
from dataset_utils import load_dpo_dataset, load_sft_dataset, tokenize_dpo_dataset, tokenize_sft_dataset


@dataclass(frozen=True)
class TrainingKind:
    """A way of training: the entrypoint that does it, and what it reads."""

    script: str  # the entrypoint's file name
    hyperparameters: type[SFTHyperparameters] | type[DPOHyperparameters]
    load: Callable[..., DatasetDict]  # called with **hparams.loading
    tokenize: Callable[..., DatasetDict]  # called with rows, tokenizer, **hparams.tokenizing
    pairs: bool  # a row is two sequences, the chosen and the rejected one


SFT = TrainingKind("sft_finetune.py", SFTHyperparameters, load_sft_dataset, tokenize_sft_dataset, pairs=False)
DPO = TrainingKind("dpo_finetune.py", DPOHyperparameters, load_dpo_dataset, tokenize_dpo_dataset, pairs=True)


def kind_of(script: str) -> TrainingKind | None:
    """Return the kind whose entrypoint is named `script`; None for a script that is not this project's."""
    return next((kind for kind in (SFT, DPO) if kind.script == script), None)
