"""Checkpoints by UUID: fetched from Determined's storage, or from the store that stands in for it on this machine."""

import os
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import determined as det
from determined.errors import CheckpointNotFound
from huggingface_hub.constants import HF_HOME

from hyperparameters import check_uuid
from ranks import once_per_node
from user_error import UserError

# What a model folder needs to load: weights, configuration, tokenizer and chat template. All else of a checkpoint
# (optimizer.pt, rng_state.pth, training_args.bin) is large, or a pickle that could run code, or both.
MODEL_FILES = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip


def local_checkpoint_storage() -> Path:
    """Where local runs keep their checkpoints, as `<uuid>/checkpoint-<step>/`: one place, as a cluster has one.

    The environment variable LOCAL_CHECKPOINT_STORAGE moves it, to a larger disk for instance.
    """
    default = Path(__file__).resolve().parent / "local_runs" / "checkpoints"
    return Path(os.environ.get("LOCAL_CHECKPOINT_STORAGE", default)).resolve()


def is_model_file(path: str) -> bool:
    """Whether `path` within a checkpoint belongs to the model: the selector of every download that is to be loaded."""
    return any(fnmatch(Path(path).name, pattern) for pattern in MODEL_FILES)


def download_ckpt(ckpt_uuid: str, core_context: det.core.Context) -> str:
    """Fetch the model files of a checkpoint and return the folder that `from_pretrained` loads.

    They are kept under $HF_HOME/determined/<uuid>, where the hub's downloads are kept too, so the trials of a grid
    that share that folder fetch them once. Every rank may call this; one rank a node downloads. Raises `UserError`
    for an id that is no UUID, an unknown one and a checkpoint without weights.
    """
    check_uuid(ckpt_uuid, "model_ckpt")
    folder = Path(HF_HOME) / "determined" / ckpt_uuid

    def download() -> None:
        if not folder.exists():
            _download_whole(ckpt_uuid, folder, core_context)

    once_per_node(core_context.distributed, download)
    return str(model_folder(folder, ckpt_uuid))


def _download_whole(ckpt_uuid: str, folder: Path, core_context: det.core.Context) -> None:
    """Download into a scratch folder and rename it to `folder`, which is so there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{ckpt_uuid}.", dir=folder.parent) as scratch:
        partial = Path(scratch) / ckpt_uuid
        try:
            core_context.checkpoint.download(
                ckpt_uuid, partial, download_mode=det.core.DownloadMode.NoSharedDownload, selector=is_model_file
            )
        except CheckpointNotFound:
            raise UserError(f"model_ckpt {ckpt_uuid}: no such checkpoint") from None
        model_folder(partial, ckpt_uuid)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another trial on this machine was quicker, with the same files
                raise


def local_checkpoint(ckpt_uuid: str, key: str) -> Path:
    """The model folder of a local run's checkpoint, where it is. Raises `UserError` as `download_ckpt` does."""
    check_uuid(ckpt_uuid, key)
    storage = local_checkpoint_storage()
    if not (storage / ckpt_uuid).is_dir():
        raise UserError(f"{key} {ckpt_uuid}: no such checkpoint in {storage}")
    return model_folder(storage / ckpt_uuid, ckpt_uuid, key)


def model_folder(checkpoint: Path, ckpt_uuid: str, key: str = "model_ckpt") -> Path:
    """The folder within a checkpoint that holds its model. Raises `UserError` where none does."""
    weights = sorted(checkpoint.rglob("*.safetensors"))
    if not weights:
        raise UserError(f"{key} {ckpt_uuid}: the checkpoint holds no model weights (*.safetensors)")
    return weights[0].parent
