"""Folders of adapters, as a training of ours or plain peft leaves them, without the training: the weights are drawn."""

from pathlib import Path
from typing import Any

import torch
from conftest import TRAINING_ARGS

from config.hyperparameters import SFTHyperparameters, parse_hyperparameters
from storage.identities import weights_identity
from storage.origins import Origin
from trial.policy import load_policy


def draw(model: torch.nn.Module, size: float = 0.1) -> None:
    """Give what an adapter trains other values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(0, size, generator=generator)


def save_adapter(folder: Path, source: Path | str, checkpoint: str | None = None, **values: Any) -> Any:
    """Save an adapter on a model, as a training does, and return it as it was trained: not merged."""
    given = {"model_name": str(source), "dataset": "d", "lora": {"r": 4}, "training_args": TRAINING_ARGS, **values}
    hparams = parse_hyperparameters(SFTHyperparameters, given)
    model, tokenizer = load_policy(hparams, str(source), added_tokens=hparams.added_tokens, checkpoint=checkpoint)
    draw(model)
    for saved in (model, tokenizer):
        saved.save_pretrained(folder)
    under = weights_identity(Path(source)) if Path(source).is_dir() and not checkpoint else None
    Origin(str(source), checkpoint, None, 42, hparams.sources, base_weights=under).write(folder)
    return model.eval()
