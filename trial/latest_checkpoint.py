"""Find the checkpoint that a trial resumes from: the latest that is whole. All ranks take the same one."""

import json
import logging
from pathlib import Path
from typing import Any

from determined.core import DownloadMode
from determined.errors import CheckpointNotFound

from errors import TemporaryError, UserError, reading, reason
from storage.checkpoints import local_checkpoint_storage
from storage.files import is_object, remove
from storage.manifests import check_files
from trial.context import Trial

logger = logging.getLogger(__name__)

MISSING = "is not in the storage"
# What a trial resumes from, as patterns of which one must match. DeepSpeed has a folder of its own for the middle part.
RESUME_FILES = [("trainer_state.json",), ("log_state_0.json",), ("rng_state*",)]
TRAINERS_FILES = [("*.safetensors", "pytorch_model*"), ("optimizer*",), ("scheduler.pt",)]
DEEPSPEEDS_FILES = [("global_step*",)]
LOG_STATE = {
    "ranks": int,
    "evaluation_due": bool,  # checkpoints keep its first name
    "globalstep_last_logged": int,
    "tr_loss": float | int,
    "metrics": dict,
    "total_train_tokens": float | int,
}


def fetch_latest_checkpoint(trial: Trial, folder: Path, with_deepspeed: bool) -> Path | None:
    """Download the trial's latest whole checkpoint into `folder`; make it `trial.latest_checkpoint`.

    Returns its `checkpoint-<step>` in `folder`; None if the trial has to start from the beginning. Raises `UserError`
    if the storage may be out of reach.
    """
    latest, problems = trial.latest_checkpoint, dict[str, str]()
    candidates = [latest] if latest else []
    saved, start = None, "starting over"
    while candidates:
        uuid = candidates.pop(0)
        if problem := _fetch(trial, uuid, folder, with_deepspeed):
            problems[uuid] = problem
            if uuid == latest:
                candidates += _earlier_checkpoints(trial, latest, problem)
        else:
            saved = next(folder.glob("checkpoint-*"))
            trial.latest_checkpoint, start = uuid, f"resuming from checkpoint {uuid}, {saved.name}"
            break
    if problems:
        # A storage that is not mounted has none of them either. To start over would be to lose what it holds.
        reachable = not trial.on_cluster and any(local_checkpoint_storage().glob("*"))
        if saved is None and set(problems.values()) == {MISSING} and not reachable:
            advice = "" if trial.on_cluster else f"; to start over, remove {folder.parent.parent}"
            raise TemporaryError(f"the trial's latest checkpoint, {latest}, {MISSING}, nor is an earlier one{advice}")
        if saved is None:
            trial.latest_checkpoint = None
        trial.status("; ".join(f"checkpoint {uuid} {why}" for uuid, why in problems.items()) + f": {start}")
    elif saved:
        logger.info(start)
    return saved


def _fetch(trial: Trial, uuid: str, folder: Path, with_deepspeed: bool) -> str | None:
    """Download a checkpoint and verify it, on the first rank of each node. Returns what is wrong with it, if anything.

    Raises `TemporaryError` for an error of the storage.
    """
    outcome: str | UserError | None = None
    if trial.core_context.distributed.local_rank == 0:
        remove(folder)  # an interrupted download may have left files there
        try:
            trial.core_context.checkpoint.download(uuid, folder, download_mode=DownloadMode.NoSharedDownload)
        except CheckpointNotFound:
            outcome = MISSING
        except NotADirectoryError:
            outcome = "is a file"
        except Exception as error:  # each kind of storage raises its own
            outcome = TemporaryError(f"checkpoint {uuid}: {reason(error)}")
        else:
            try:
                _check(folder, with_deepspeed)
            except UserError as error:
                outcome = f"is damaged ({error})"
    outcomes = list(filter(None, trial.core_context.distributed.allgather(outcome)))
    for outcome in outcomes:
        if isinstance(outcome, UserError):
            raise outcome
    return next(iter(outcomes), None)


def _earlier_checkpoints(trial: Trial, latest: str, problem: str) -> list[str]:
    """Return the UUIDs of the trial's other checkpoints, the latest first. Only the first rank asks for them."""
    found: list[str] | UserError = []
    if trial.core_context.distributed.rank == 0:
        try:
            found = trial.earlier_checkpoints()
        except UserError as error:
            found = error
    found = trial.core_context.distributed.broadcast(found)
    if isinstance(found, UserError):
        raise found
    if latest not in found:  # another trial's, from which the experiment was made to start
        raise UserError(f"checkpoint {latest}, where the trial is to start, {problem}")
    return [uuid for uuid in found if uuid != latest]


def _check(folder: Path, with_deepspeed: bool) -> None:
    """Raise `UserError` unless `folder` holds all of a checkpoint that a trial has saved to resume from."""
    found = list(folder.glob("checkpoint-*"))
    if len(found) != 1:
        raise UserError("it was not saved by this project" if folder.exists() else "it is empty")
    check_files(found[0], RESUME_FILES + (DEEPSPEEDS_FILES if with_deepspeed else TRAINERS_FILES))
    with reading("trainer_state.json"):
        step = json.loads((found[0] / "trainer_state.json").read_bytes())["global_step"]
    if found[0].name != f"checkpoint-{step}":
        raise UserError(f"{found[0].name} has the state of step {step}")
    for rank in range(read_log_state(found[0], 0)["ranks"]):
        read_log_state(found[0], rank)


def log_state_file(checkpoint: Path, rank: int) -> Path:
    """Return where a checkpoint keeps a rank's log state."""
    return checkpoint / f"log_state_{rank}.json"


def read_log_state(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Return a rank's log state. Raises `UserError` if it is none."""
    file = log_state_file(checkpoint, rank)
    with reading(file.name):
        log_state = json.loads(file.read_bytes())
    if not is_object(log_state, LOG_STATE):
        raise UserError(f"{file.name} is not a log state")
    return log_state
