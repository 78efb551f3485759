"""Checkpoints by UUID: in Determined's storage on a cluster, and in a folder instead of it on this machine."""

import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from determined import core
from determined.errors import CheckpointNotFound
from huggingface_hub.constants import HF_HOME

from config.validation import check_uuid, is_uuid
from errors import TemporaryError, UserError, reason
from storage.adapter_chains import BELOW as ADAPTERS_BELOW
from storage.adapter_chains import CONFIG as ADAPTER_CONFIG
from storage.adapter_chains import find_base, is_adapter, read_chain
from storage.files import BUNDLE, check_output
from storage.identities import sampled_hash
from storage.manifests import MANIFEST, check_files
from storage.origins import FILE as ORIGIN
from storage.shared_cache import make_once, once_per_node

# The files from which a model loads: weights, configuration, tokenizer and chat template. The rest of a checkpoint
# (optimizer.pt, rng_state.pth, training_args.bin) is large, or a pickle that could run code, or both.
MODEL_FILES = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", ADAPTER_CONFIG,
)  # fmt: skip


def local_checkpoint_storage() -> Path:
    """Return the folder in which local runs keep their checkpoints, as `<uuid>/checkpoint-<step>/`.

    All experiments share it, as on a cluster. The environment variable LOCAL_CHECKPOINT_STORAGE moves it.
    """
    return Path(os.path.realpath(os.environ.get("LOCAL_CHECKPOINT_STORAGE") or BUNDLE / "local_runs" / "checkpoints"))


def check_storage(output: Path, starts_from: str | None) -> None:
    """Raise `UserError` unless a local run that writes to `output` can keep its checkpoints where they belong.

    If it `starts_from` a checkpoint, it needs room for a copy of that, too.
    """
    if (store := local_checkpoint_storage()) in (folder := Path(os.path.realpath(output)), *folder.parents):
        raise UserError(f"--output {output}: checkpoints are kept in {store}; choose another folder")
    check_output(store, "LOCAL_CHECKPOINT_STORAGE", is_folder=True)
    if starts_from:
        check_output(agent_cache(), "HF_HOME", is_folder=True)


def is_model_file(path: str) -> bool:
    """Return whether `path` within a checkpoint belongs to the model."""
    return any(fnmatch(Path(path).name, pattern) for pattern in MODEL_FILES)


def is_downloaded(path: str) -> bool:
    """Return whether to download `path`: a file of the model, the manifest, or what says how it was trained."""
    return is_model_file(path) or Path(path).name in (MANIFEST, ORIGIN, "trainer_state.json")


def download_ckpt(ckpt_uuid: str, core_context: core.Context, key: str = "model_ckpt") -> str:
    """Download the model files of a checkpoint and return the folder that `from_pretrained` loads.

    They are kept under $HF_HOME/determined/<uuid>, so the trials of a grid that share that folder download them once;
    so are those of the checkpoint that an adapter stands on. Call it on every rank; one rank of each node downloads.
    Raises `UserError` for an id that is not a UUID, an unknown one, and a checkpoint without weights or with a damaged
    file.
    """
    check_uuid(ckpt_uuid, key)

    def download(folder: Path) -> None:
        try:
            mode = core.DownloadMode.NoSharedDownload
            core_context.checkpoint.download(ckpt_uuid, folder, download_mode=mode, selector=is_downloaded)
        except CheckpointNotFound:
            gone = "no such checkpoint in the storage (or is it in another checkpoint_storage than this experiment's?)"
            raise TemporaryError(f"{key} {ckpt_uuid}: {gone}") from None
        except Exception as error:  # each kind of storage raises its own
            raise TemporaryError(f"{key} {ckpt_uuid}: {reason(error)}") from error

    once_per_node(core_context.distributed, lambda: fetch_once(ckpt_uuid, download, key))
    folder = model_folder(cached_checkpoint(ckpt_uuid), ckpt_uuid)
    if base := checkpoint_below(folder):
        download_ckpt(base, core_context, f"{key} {ckpt_uuid}: its base")
    return str(folder)


def agent_cache() -> Path:
    """Return the folder for what trials of this machine share, beside the hub's downloads."""
    return Path(HF_HOME) / "determined"


def cached_checkpoint(ckpt_uuid: str) -> Path:
    """Return the folder into which `fetch_once` puts a checkpoint's model files."""
    return agent_cache() / ckpt_uuid


def fetch_once(ckpt_uuid: str, fetch: Callable[[Path], None], key: str) -> None:
    """Have `fetch` fill the checkpoint's folder, unless it is there or another process is fetching it just now.

    Raises `UserError` if the checkpoint holds no weights, or a damaged file.
    """

    def make(scratch: Path) -> None:
        fetch(scratch)
        model_folder(scratch, ckpt_uuid, key, verify=True)

    folder = cached_checkpoint(ckpt_uuid)
    make_once(folder, make, lambda: print(f"checkpoint {ckpt_uuid}: another process is fetching it"))


def checkpoint_below(folder: Path) -> str | None:
    """Return the UUID of the checkpoint with all weights that an adapter stands on; None if it is no checkpoint."""
    if is_adapter(folder) and is_uuid(base := read_chain(folder).base):
        return base
    return None


def find_checkpoint_here(ckpt_uuid: str) -> Path:
    """Return the model folder of a checkpoint that is on this machine: a local run's, or one that was downloaded."""
    if (cached := cached_checkpoint(ckpt_uuid)).is_dir():
        return model_folder(cached, ckpt_uuid)
    advice = "; if it is on a cluster, `--model NAME=ckpt:UUID` of inference.py downloads it"
    return local_checkpoint(ckpt_uuid, "it is an adapter on the checkpoint", advice=advice)


def local_checkpoint(ckpt_uuid: str, key: str, verify: bool = False, advice: str = "") -> Path:
    """Return the model folder of a local run's checkpoint. Raises `UserError` as `download_ckpt` does.

    Only with `verify` are the model's files read, to find damage. `advice` says what to do if there is none.
    """
    check_uuid(ckpt_uuid, key)
    store = local_checkpoint_storage()
    if not (store / ckpt_uuid).is_dir():
        raise UserError(f"{key} {ckpt_uuid}: no such checkpoint in {store}{advice}")
    return model_folder(store / ckpt_uuid, ckpt_uuid, key, verify)


def model_folder(checkpoint: Path, ckpt_uuid: str, key: str = "model_ckpt", verify: bool = False) -> Path:
    """Return the folder within a checkpoint that holds its model. Raises `UserError` if none does, or if damaged."""
    files = checkpoint.rglob("*.safetensors")
    weights = min((file for file in files if ADAPTERS_BELOW not in file.parts), default=None)
    if weights is None:
        raise UserError(f"{key} {ckpt_uuid}: the checkpoint holds no model weights (*.safetensors)")
    if verify:
        try:
            check_files(weights.parent, select=is_model_file)
        except UserError as error:
            raise UserError(f"{key} {ckpt_uuid}: the checkpoint is damaged: {error}") from error
    return weights.parent


def model_identity(source: str) -> list[Any]:
    """Return what identifies a model wherever its folder is: the name, size and hash of each file it is loaded from.

    An adapter's has that of what it stands on, too. A hub id is assumed never to change.
    """
    folder, identity = Path(source), list[Any]()
    for file in sorted([*folder.glob("*"), *(folder / ADAPTERS_BELOW).rglob("*")]):
        if is_model_file(file.name) or file.suffix == ".bin":
            identity.append((str(file.relative_to(folder)), *sampled_hash(file)))
    if is_adapter(folder):
        chain = read_chain(folder)
        base = find_base(chain, find_checkpoint_here)
        identity += [chain.base] if is_uuid(chain.base) else model_identity(base)
    return identity or [source]
