"""The one table of what differs between an SFT and a DPO experiment."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from config.hyperparameters import DPOHyperparameters, SFTHyperparameters

if TYPE_CHECKING:
    from datasets import DatasetDict

Hyperparameters = SFTHyperparameters | DPOHyperparameters


@dataclass(frozen=True)
class TrainingKind:
    """A way of training: the entrypoint that does it, and what it reads."""

    script: str  # the entrypoint's file name
    hyperparameters: type[Hyperparameters]
    loader: str  # in dataset_utils, which takes seconds to import: so by name
    tokenize_function: str  # there, too
    pairs: bool  # a row is two sequences, the chosen and the rejected one

    def load(self, **options: Any) -> "DatasetDict":
        """Load the data set: `options` are the hyperparameters' `load_options`, and perhaps `on_source`."""
        import dataset_utils

        return getattr(dataset_utils, self.loader)(**options)

    def tokenize(self, *args: Any, **options: Any) -> "DatasetDict":
        """Tokenize rows: `args` are the rows and a tokenizer, `options` are the hyperparameters' `tokenize_options`."""
        import dataset_utils

        return getattr(dataset_utils, self.tokenize_function)(*args, **options)


SFT = TrainingKind("sft_finetune.py", SFTHyperparameters, "load_sft_dataset", "tokenize_sft_dataset", pairs=False)
DPO = TrainingKind("dpo_finetune.py", DPOHyperparameters, "load_dpo_dataset", "tokenize_dpo_dataset", pairs=True)


def kind_of(script: str) -> TrainingKind | None:
    """Return the kind whose entrypoint is named `script`; None for a script that is not this project's."""
    return next((kind for kind in (SFT, DPO) if kind.script == script), None)
