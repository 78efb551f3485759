"""What a LoRA checkpoint stands on: adapters from the bottom up, and below them a whole model.

    checkpoint-40/                    DPO's, from an SFT checkpoint that was an adapter, too
        adapter_model.safetensors     its own adapter
        adapter_config.json           base_model_name_or_path: the SFT checkpoint's UUID
        stands_on/0/                  a copy of the SFT checkpoint's adapter
            adapter_model.safetensors
            adapter_config.json       base_model_name_or_path: google/gemma-2b, revision: its commit
            trial.json
        trial.json, tokenizer.json, chat_template.jinja, ...

The lowest adapter names the whole model: an id on the hub and the commit, a folder, or the UUID of a checkpoint with
all weights. Adapters are small, so each checkpoint has all that it needs of them, wherever it is copied to.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from config.validation import is_uuid
from errors import UserError, reading
from storage.files import is_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BELOW = "stands_on"


class Chain(NamedTuple):
    """Adapters and the whole model under them."""

    base: str  # a folder, a hub id or the UUID of a checkpoint
    revision: str | None  # of the hub id
    adapters: list[Path]  # their folders, the lowest first


def is_adapter(folder: Path) -> bool:
    """Return whether a model's folder holds an adapter instead of a whole model."""
    return (folder / CONFIG).is_file()


def read_chain(folder: Path) -> Chain:
    """Return what an adapter's folder stands on. Raises `UserError` if a file of it is missing or damaged."""
    adapters = [*sorted((folder / BELOW).glob("*"), key=lambda path: int(path.name)), folder]
    for adapter in adapters:
        for name in (CONFIG, WEIGHTS):
            if not (adapter / name).is_file():
                raise UserError(f"{adapter}: {name} is missing")
    with reading(str(adapters[0] / CONFIG)):
        config = json.loads((adapters[0] / CONFIG).read_bytes())
        if not is_object(config, {"base_model_name_or_path": str}):
            raise ValueError("it has no base_model_name_or_path")
    return Chain(config["base_model_name_or_path"], config.get("revision"), adapters)


def find_base(chain: Chain, find: Callable[[str], Path], what: str) -> str:
    """Return the folder or the hub id of the whole model under adapters; `find` returns a checkpoint's folder.

    Raises `UserError` about `what` if it is not there.
    """
    if is_uuid(chain.base):
        return str(find(chain.base))
    if Path(chain.base).is_absolute() and not Path(chain.base).is_dir():
        config = chain.adapters[0] / CONFIG
        remedy = f"put it back, or name its new place in {config} (base_model_name_or_path)"
        raise UserError(f"{what}: it is an adapter on the model in {chain.base}, which is not here; {remedy}")
    return chain.base


def copy_below(adapters: Iterable[Path], folder: Path) -> None:
    """Copy the adapters that another one stands on, the lowest first, into that one's folder."""
    for number, adapter in enumerate(adapters):
        copy = folder / BELOW / str(number)
        copy.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS, "trial.json"):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, copy / name)
