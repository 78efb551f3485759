"""What the tests of adapters share: a small adapter, and what a model with adapters has."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from storage.checkpoints import local_checkpoint

ARGS = "hyperparameters__training_args__"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}

SFT = {"hyperparameters__dataset_subsets": [{"subset": "home", "number_of_samples": 24}]}  # few rows


def few_pairs(tiny: Path) -> dict[str, Any]:
    """Changes of a DPO config: few pairs, which take no time, of short answers, whose log-probs float32 holds well."""
    return {
        "hyperparameters__datasets": [{"name": str(tiny / "questions"), "number_of_samples": 40}],
        "hyperparameters__max_target_length": 16,
    }


def uuid_of(reports: dict[str, Any]) -> str:
    return reports["checkpoint"][-1]["uuid"]


def folder_of(reports: dict[str, Any]) -> Path:
    return local_checkpoint(uuid_of(reports), "test")


def losses(reports: dict[str, Any]) -> list[float]:
    return [report["metrics"]["loss"] for report in reports["training"] if "loss" in report["metrics"]]


def own_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the adapter that is trained."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "default" in name.split(".")}


def frozen_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All others."""
    return {
        name: weight.detach().clone() for name, weight in model.named_parameters() if "default" not in name.split(".")
    }


def call_at_start(monkeypatch: Any, look: Any) -> None:
    """Have `look` called with each trainer whose training begins."""
    train = Trainer.train

    def look_and_train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        look(self)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", look_and_train)


def assert_close(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, expected in one.items():
        torch.testing.assert_close(other[name], expected, rtol=tolerance, atol=tolerance, msg=name)
