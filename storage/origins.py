"""What a checkpoint says of the training that saved it: `trial.json`, beside the weights.

A comparison reads it, wherever the checkpoint has gone. Other hyperparameters are not in it: one could be a token.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from config.hyperparameters import DataSource
from config.validation import Beta

FILE = "trial.json"


@dataclass
class Origin:
    """The training of a checkpoint."""

    base: str | None  # the pre-trained model at the beginning of SFT, a hub id or a folder; None if it is not known
    model_ckpt: str | None  # UUID of the checkpoint that DPO started from; None: it started from `base`, as SFT does
    beta: Beta | None  # of DPO; None for SFT
    data_seed: int  # draws the samples and what is held out
    sources: list[DataSource]  # the rows that were trained on or held out

    def write(self, folder: Path) -> None:
        """Write `FILE` into a checkpoint's folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def read_origin(folder: Path) -> Origin | None:
    """Return what `FILE` in a model's folder says; None without one, as of earlier releases, or if it is damaged."""
    try:
        return TypeAdapter(Origin).validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None
