"""Find the model that DPO starts from, and remember what it was for the trial's checkpoints."""

from pathlib import Path

from config.cluster_names import parse_cluster_name
from config.hyperparameters import DPOHyperparameters
from config.validation import is_uuid
from errors import UserError
from storage.checkpoints import cached_checkpoint, download_ckpt, model_folder
from storage.origins import read_origin
from storage.shared_cache import once_per_node
from trial.context import Trial


def fetch_starting_model(trial: Trial[DPOHyperparameters]) -> str:
    """Return the folder or the hub id of the model that DPO starts from, and set `trial.origin`. Call it on every rank.

    On a cluster all trials and all starts of an experiment get the same one: see `settled_checkpoint`. Raises
    `UserError` if there is none.
    """
    hparams = trial.hparams
    trial.status(hparams.start_message)
    if hparams.checkpoint is None:
        trial.remember_origin(base=hparams.model_name)
        return str(hparams.model_name)
    ckpt_uuid = _resolve(trial, hparams.checkpoint)
    if trial.on_cluster or is_uuid(hparams.checkpoint):
        folder = download_ckpt(ckpt_uuid, trial.core_context)
    else:
        from storage.cluster_checkpoints import cluster_checkpoint

        name = f"ckpt:{ckpt_uuid}"
        once_per_node(trial.core_context.distributed, lambda: cluster_checkpoint(name, "model_ckpt"))
        folder = str(model_folder(cached_checkpoint(ckpt_uuid), ckpt_uuid))
    before = read_origin(Path(folder))
    trial.remember_origin(base=before.base if before else None, model_ckpt=ckpt_uuid)
    return folder


def _resolve(trial: Trial[DPOHyperparameters], source: str) -> str:
    """Return the UUID of a checkpoint. The first rank asks the master; all ranks raise its `UserError`."""
    if is_uuid(source):
        return source
    kind, name, _ = parse_cluster_name(source, "model_ckpt")
    if kind == "ckpt":
        return name
    from storage.cluster_checkpoints import settled_checkpoint

    found: str | UserError = ""
    if trial.core_context.distributed.rank == 0:
        try:
            found = settled_checkpoint(source, "model_ckpt", trial.experiment_id)
        except UserError as error:
            found = error
    found = trial.core_context.distributed.broadcast(found)
    if isinstance(found, UserError):
        raise found
    trial.status(f"{source} is checkpoint {found}")
    return found
