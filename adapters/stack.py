"""Stack adapters on a frozen model: those that it stands on, frozen too, and above them the one that is trained.

    policy     = base + below_0 + below_1 + ... + default     (all active; only `default` has gradients)
    reference  = base + below_0 + below_1 + ... + ref         (`ref`: `default` before the training, which adds nothing)

SFT's adapter stays as it was saved while DPO trains its own above it: no merge into bf16 or 4-bit weights rounds it, so
DPO starts exactly where SFT ended.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.utils import set_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel

from adapters.saved import read_adapter
from adapters.targets import check_targets
from config.lora import OWN, REFERENCE
from errors import UserError, reading
from storage.adapter_chains import copy_below


class AdapterStack(PeftModelForCausalLM):
    """A frozen causal language model with adapters, of which only `OWN` is trained."""

    adapters_below: tuple[Path, ...] = ()  # the folders of those that it stands on, the lowest first

    @property
    def active_adapters(self) -> list[str]:
        """The adapter that the Trainer loads when it resumes. (It takes the first of all that are active.)"""
        return [self.active_adapter]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Activate an adapter on top of those below it.

        Upstream: peft (0.21) activates one alone and trains whatever is active. This can go once a PeftModel can have
        frozen adapters under a trained one.
        """
        self.active_adapter = adapter_name
        below = [name for name in self.peft_config if name not in (OWN, REFERENCE, adapter_name)]
        cast(Any, self.base_model).set_adapter([adapter_name, *below])
        self._train_own_adapter()

    def add_adapter(self, adapter_name: str, peft_config: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Add an adapter; TRL's DPOTrainer (1.16) adds `REFERENCE`, a frozen copy of the new one, by itself."""
        super().add_adapter(adapter_name, peft_config, **kwargs)
        self.set_adapter(self.active_adapter)

    def _train_own_adapter(self) -> None:
        for name, weight in self.named_parameters():
            weight.requires_grad = OWN in name.split(".")

    def frozen_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that are not trained, and how those of adapters are scaled, by names of the base alone.

        (An adapter in a layer would change the name of the layer's weight.)
        """
        weights = self.state_dict()
        layers = ((name, layer) for name, layer in self.named_modules() if isinstance(layer, LoraLayer))
        for name, layer in layers:
            weights |= {f"{name}.scaling.{adapter}": torch.tensor(by) for adapter, by in layer.scaling.items()}
        named = ((name.replace(".base_layer", ""), weight) for name, weight in weights.items())
        return {name: weight for name, weight in named if not {OWN, REFERENCE} & {*name.split(".")}}

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write none: a checkpoint has its `trial.json`, and an exported model a card of its own."""

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save the trained adapter with all that `storage/adapter_chains.py` needs to find what it stands on."""
        # Upstream looks on the hub for the base's vocabulary and, if this one is larger, saves all of its embeddings.
        kwargs |= {"selected_adapters": [OWN], "save_embedding_layers": False, "is_main_process": is_main_process}
        super().save_pretrained(save_directory, **kwargs)
        if is_main_process:
            copy_below(self.adapters_below, Path(save_directory))
            self.generation_config.save_pretrained(save_directory)


def add_adapter(model: PreTrainedModel | AdapterStack, config: LoraConfig, stands_on: str, seed: int) -> AdapterStack:
    """Return a model with a new adapter on it, which changes nothing yet; everything else is frozen.

    `stands_on` is the model's UUID, folder or hub id, for the adapter's checkpoints. `seed` draws its first weights,
    which are float32. Raises `UserError` if its target modules are not in the model, or at an end of it.
    """
    config.base_model_name_or_path = stands_on
    config.revision = getattr(model.config, "_commit_hash", None) if not isinstance(model, AdapterStack) else None
    _check_alone(model, config)
    check_targets(base_model(model), config)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with _reading("hyperparameters.lora"), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        if not isinstance(model, AdapterStack):
            model = AdapterStack(model, config, OWN)
        else:
            model.add_adapter(OWN, config)
        model.set_adapter(OWN)
    output: Any = base_model(model).get_output_embeddings()
    if isinstance(output, TrainableTokensWrapper):
        # TRL (1.16) reads the bias, which peft's wrapper (0.21) does not pass on. This can go once it does.
        output.bias = output.original_module.bias
    return model


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn what peft raises into a `UserError` about `what`; what it warns of is for authors, not users."""
    with reading(what), warnings.catch_warnings(action="ignore"):
        yield


def _check_alone(model: PreTrainedModel | AdapterStack, config: LoraConfig) -> None:
    """Raise `UserError` for DoRA beside another adapter: peft would take that one for a part of the base weights."""
    if not isinstance(model, AdapterStack):
        return
    remedy = "export that model (python export.py) and start from its folder"
    configs: list[Any] = [config, *model.peft_config.values()]
    if any(each.use_dora for each in configs):
        raise UserError(f"hyperparameters.lora: use_dora does not work above or below another adapter; {remedy}")
    if any(each.modules_to_save or each.bias != "none" for each in configs):
        raise UserError(f"hyperparameters.lora: the adapter below has trained more than adapters; {remedy}")


def stack_adapters(model: PreTrainedModel, adapters: list[Path]) -> AdapterStack:
    """Return `model` with saved adapters on it, the lowest first, frozen and not merged. Raises `UserError`."""
    stack: AdapterStack | None = None
    for number, folder in enumerate(adapters):
        name = f"below_{number}"
        with _reading(str(folder)):
            config, weights = read_adapter(model, folder)
            if stack is None:
                stack = AdapterStack(model, config, name)
            else:
                _check_alone(stack, config)
                stack.add_adapter(name, config)
            if weights is not None:
                try:
                    found: Any = set_peft_model_state_dict(stack, weights, adapter_name=name)
                except RuntimeError as error:
                    raise ValueError("its weights have other shapes than its base and its config say") from error
                if unfit := [*(key for key in found.missing_keys if f".{name}." in key), *found.unexpected_keys]:
                    raise ValueError(f"its weights are of another model: {unfit[0]}")
            ends = (model.get_input_embeddings(), model.get_output_embeddings())
            if any(isinstance(layer, LoraLayer) for layer in ends):  # see adapters/targets.py
                raise ValueError("an adapter of the embeddings or the output layer cannot be used")
        stack.set_adapter(name)
    assert stack is not None
    stack.adapters_below = tuple(adapters)
    return stack


def merge_adapters(model: PreTrainedModel, adapters: list[Path]) -> PreTrainedModel:
    """Return `model` with saved adapters merged into its weights, one after another. Raises `UserError`."""
    for folder in adapters:
        with _reading(str(folder)):
            model = stack_adapters(model, [folder]).merge_and_unload()
    return model


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model in an `AdapterStack`, with adapters in its layers; any other model as it is."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, AdapterStack) else model)


def lora_layers(model: torch.nn.Module) -> list[LoraLayer]:
    """Return the layers of `model` that have adapters."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
