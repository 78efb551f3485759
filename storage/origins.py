"""What a checkpoint says of the training that saved it: `trial.json`, beside the weights.

A comparison and an export read it, wherever the checkpoint has gone. Hyperparameters that could be a token or a path
are not in it.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    rounded_from: str | None = None  # the type of the weights that were rounded to 4 bits under its adapter, if so
    base_weights: str | None = None  # `weights_identity` of the folder under its adapter; None for a hub id or UUID
    hyperparameters: dict[str, Any] = field(default_factory=dict)  # as the YAML has them

    def write(self, folder: Path) -> None:
        """Write `FILE` into a checkpoint's folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def read_origin(folder: Path) -> Origin | None:
    """Return what `FILE` in a model's folder says; None without one, as of earlier releases, or if it is damaged."""
    try:
        return TypeAdapter(Origin).validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None
