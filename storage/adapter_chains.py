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
from typing import Any, NamedTuple

from config.validation import is_uuid
from errors import UserError, about, os_errors_of
from storage.files import BUNDLE, is_object, read_json
from storage.hub import looks_like_path, no_such
from storage.identities import weights_identity
from storage.manifests import check_files
from storage.origins import FILE as ORIGIN
from storage.origins import read_origin

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
BELOW = "stands_on"


class Chain(NamedTuple):
    """Adapters and the whole model under them."""

    base: str  # a folder, a hub id or the UUID of a checkpoint
    revision: str | None  # of the hub id
    adapters: list[Path]  # their folders, the lowest first


def is_adapter(folder: Path) -> bool:
    """Return whether a model's folder holds an adapter instead of a whole model. It may lack a file."""
    return (folder / CONFIG).is_file() or ((folder / WEIGHTS).is_file() and not (folder / "config.json").is_file())


def read_chain(folder: Path) -> Chain:
    """Return what an adapter's folder stands on. Raises `UserError` if a file is missing or damaged, or of no LoRA."""
    below = [path for path in (folder / BELOW).glob("*") if path.name.isdecimal()]
    if {int(path.name) for path in below} != {*range(len(below))}:
        raise UserError(f"{folder / BELOW}: an adapter is missing; it has {', '.join(sorted(p.name for p in below))}")
    adapters = [*sorted(below, key=lambda path: int(path.name)), folder]
    configs = [_read_config(adapter) for adapter in adapters]
    base = configs[0].get("base_model_name_or_path")
    if not (isinstance(base, str) and base):
        raise UserError(f"{adapters[0] / CONFIG} names no base_model_name_or_path, the model that it is an adapter of")
    return Chain(base, configs[0].get("revision"), adapters)


def _read_config(adapter: Path) -> dict[str, Any]:
    """Return the config of an adapter. Raises `UserError` unless it is LoRA of a causal model, with whole weights."""
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            pickled = (adapter / PICKLE).is_file() and name == WEIGHTS
            hint = f" ({PICKLE} is a pickle, which could run code: save it as safetensors)" if pickled else ""
            raise UserError(f"{adapter / name} is missing{hint}")
    config = read_json((adapter / CONFIG).read_bytes())
    if not is_object(config, {"peft_type": str}):
        raise UserError(f"{adapter / CONFIG} is damaged, or no config of peft's")
    if config["peft_type"] != "LORA":
        raise UserError(f"{adapter}: it is an adapter of the type {config['peft_type']}; only LORA can be merged here")
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise UserError(f"{adapter}: it is an adapter for {task}, not for a causal language model")
    with about(adapter):
        check_files(adapter, [(WEIGHTS,)], lambda name: name in (CONFIG, WEIGHTS))
    return config


def find_base(chain: Chain, find: Callable[[str], Path]) -> str:
    """Return the folder or the hub id of the whole model under adapters; `find` returns a checkpoint's folder.

    Raises `UserError` if it is not there, or its weights are not those that were under the adapters in training.
    """
    what = f"it is an adapter on {chain.base}, which"
    if is_uuid(chain.base):
        folder = find(chain.base)
    elif _is_folder(folder := BUNDLE / chain.base):
        origin = read_origin(chain.adapters[0])
        if origin and origin.base_weights and origin.base_weights != weights_identity(folder):
            raise UserError(f"{what} has other weights now than in its training")
    elif looks_like_path(chain.base):
        raise UserError(f"{what} is not here ({no_such('folder')}); put it, or a link to it, where it was")
    else:
        return chain.base
    if is_adapter(folder):
        raise UserError(f"{what} is itself an adapter; a copy of it belongs into {chain.adapters[0] / BELOW / '0'}")
    return str(folder)


def _is_folder(path: Path) -> bool:
    with os_errors_of("the name of its base"):  # which may be too long
        return path.is_dir()


def name_base(folder: Path) -> str:
    """Return what an adapter's config calls a folder: one of the project's has the same place in each copy of it."""
    path = folder.resolve()
    return f"./{path.relative_to(BUNDLE)}" if path.is_relative_to(BUNDLE) else str(path)


def place_base(folder: Path, base: str) -> None:
    """Have the adapter in `folder`, a copy for this machine, stand on the folder `base` of this machine."""
    file = read_chain(folder).adapters[0] / CONFIG
    file.write_text(json.dumps(read_json(file.read_bytes()) | {"base_model_name_or_path": base}))


def copy_below(adapters: Iterable[Path], folder: Path) -> None:
    """Copy the adapters that another one stands on, the lowest first, into that one's folder."""
    for number, adapter in enumerate(adapters):
        copy = folder / BELOW / str(number)
        copy.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS, ORIGIN):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, copy / name)
