"""Find and download checkpoints of a cluster from any machine: `exp:12`, `trial:34` and `ckpt:UUID`."""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path

import determined as det
from determined.common import api, storage
from determined.common.constants import SHARED_FS_CONTAINER_PATH
from determined.experimental import Determined, client
from rich.console import RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from urllib3.exceptions import HTTPError

from config.validation import check_uuid
from errors import TemporaryError, UserError, one_line, shorten
from storage.checkpoints import cached_checkpoint, fetch_once, is_downloaded, model_folder
from storage.shared_cache import is_made

# What can stand before the colon, and what the number or UUID after it names.
CLUSTER_SOURCES = {"exp": "experiment", "trial": "trial", "ckpt": "checkpoint"}


def cluster_checkpoint(source: str, key: str) -> Path:
    """Return the model folder of a checkpoint on the cluster that the environment variable DET_MASTER names.

    `source` is `exp:12` or `trial:34`, for the best checkpoint by the experiment's searcher metric, or `ckpt:UUID`.
    Only the model files are downloaded, once, to where `download_ckpt` keeps them. Raises `UserError` if there is no
    such checkpoint or no master.
    """
    kind, _, name = source.partition(":")
    if kind == "ckpt":
        check_uuid(name, key)
    elif not name.isdecimal():
        raise UserError(f"{key} {source!r}: after {kind}: comes the number of the {CLUSTER_SOURCES[kind]}")
    if kind != "ckpt" or not is_made(cached_checkpoint(name)):
        with one_line_cluster_errors(f"{key} {source}", CLUSTER_SOURCES[kind]):
            checkpoint = _find_checkpoint(kind, name)
            if checkpoint is None:
                raise UserError(f"{key} {source}: the {CLUSTER_SOURCES[kind]} has no checkpoint yet that was validated")
            if checkpoint.state is not client.CheckpointState.COMPLETED:
                state = checkpoint.state.name.lower() if checkpoint.state else "in an unknown state"
                raise UserError(f"{key} {source}: the checkpoint is {state}")
            if checkpoint.training:
                print(f"{source}: trial {checkpoint.training.trial_id}, checkpoint {checkpoint.uuid}")
            fetch_once(checkpoint.uuid, lambda folder: _download(checkpoint, folder, key), key)
            name = checkpoint.uuid
    return model_folder(cached_checkpoint(name), name, key)


def trial_checkpoints(trial_id: int) -> list[str]:
    """Return the UUIDs of the checkpoints that the cluster still has of a trial, that of the most steps first.

    (By steps: times are those of the agents' clocks.) Raises `TemporaryError` if the master does not say.
    """
    try:
        with one_line_cluster_errors(f"trial {trial_id}", "trial"):
            order = client.CheckpointSortBy.BATCH_NUMBER, client.OrderBy.DESC
            found = Determined().get_trial(trial_id).list_checkpoints(*order)
    except UserError as error:
        raise TemporaryError(str(error)) from error
    return [checkpoint.uuid for checkpoint in found if checkpoint.state is client.CheckpointState.COMPLETED]


@contextmanager
def one_line_cluster_errors(what: str, kind: str) -> Iterator[None]:
    """Turn the SDK's errors, such as a missing or refusing master, into a `UserError` about `what`, a `kind`."""
    master = api.get_default_master_url()
    try:
        master = api.canonicalize_master_url(master)
        yield
    except UserError:
        raise
    except api.errors.MasterNotFoundException:
        reason = f"no Determined master at {master} (the environment variable DET_MASTER names it)"
        raise UserError(f"{what}: {reason}") from None
    except api.errors.UnauthenticatedException:
        raise UserError(f"{what}: {master} requires you to log in (det user login)") from None
    except api.errors.NotFoundException:
        raise UserError(f"{what}: {master} has no such {kind}") from None
    except (api.errors.BadRequestException, api.errors.BadResponseException, OSError, ValueError) as error:
        raise UserError(f"{what}: {master}: {one_line(error)}") from error


def _find_checkpoint(kind: str, name: str) -> client.Checkpoint | None:
    """Return the checkpoint that a source names, the best one of an experiment or trial; None if none can be ranked."""
    cluster = Determined()
    if kind == "ckpt":
        return cluster.get_checkpoint(name)
    owner = cluster.get_experiment(int(name)) if kind == "exp" else cluster.get_trial(int(name))
    # Without a sort key the API sorts by the searcher's metric, with the best first.
    return next(filter(_can_be_ranked, owner.list_checkpoints()), None)


def _can_be_ranked(checkpoint: client.Checkpoint) -> bool:
    """Return whether a checkpoint is still there and was validated with a finite value of its searcher's metric."""
    if checkpoint.training is None or checkpoint.state is not client.CheckpointState.COMPLETED:
        return False
    metrics = checkpoint.training.validation_metrics.get("avgMetrics") or {}
    value = metrics.get(checkpoint.training.experiment_config["searcher"]["metric"])
    return isinstance(value, float | int) and isfinite(value)


def _download(checkpoint: client.Checkpoint, folder: Path, key: str) -> None:
    """Download the model files from the storage, or through the master if this machine cannot reach the storage.

    The SDK's own `download` has no selector: it would download the optimizer's state too, twice the model's size.
    """
    sizes = {name: int(size) for name, size in (checkpoint.resources or {}).items() if is_downloaded(name)}
    with _DownloadProgress(f"checkpoint {checkpoint.uuid}", folder, sum(sizes.values())):
        try:
            _download_from_storage(checkpoint, folder, is_downloaded)
        except Exception as from_storage:  # each kind of storage raises its own
            try:
                _download_through_master(checkpoint, folder, set(sizes))
            except (api.errors.BadRequestException, OSError, tarfile.TarError, HTTPError) as error:
                reasons = f"{one_line(error)} (and from its storage: {one_line(from_storage)})"
                raise UserError(f"{key}: checkpoint {checkpoint.uuid} cannot be downloaded: {reasons}") from error


def _download_from_storage(checkpoint: client.Checkpoint, folder: Path, select: Callable[[str], bool]) -> None:
    """Download the files of a checkpoint that `select` takes. Raises what its kind of storage does."""
    if checkpoint.training is None:
        raise LookupError("its experiment is not known")
    # In a container a shared file system is mounted in a place of its own.
    mounted = SHARED_FS_CONTAINER_PATH if det.get_cluster_info() else None
    config = checkpoint.training.experiment_config["checkpoint_storage"]
    storage.build(config, mounted).download(checkpoint.uuid, str(folder), selector=select)


def download_files(checkpoint: client.Checkpoint, name: str, folder: Path) -> None:
    """Download the files of a checkpoint that are called `name`, if it has any, from its storage.

    Not through the master, which would send the whole checkpoint. Raises `UserError` if the storage cannot be reached.
    """
    if all(Path(path).name != name for path in checkpoint.resources or {}):
        return
    try:
        _download_from_storage(checkpoint, folder, lambda path: Path(path).name == name)
    except Exception as error:  # each kind of storage raises its own
        raise UserError(f"the checkpoint storage cannot be reached from here ({shorten(one_line(error))})") from error


def _download_through_master(checkpoint: client.Checkpoint, folder: Path, missing: set[str]) -> None:
    """Extract the `missing` files from the archive that the master makes of the checkpoint; stop after the last one."""
    url, headers = f"/checkpoints/{checkpoint.uuid}", {"Accept": "application/gzip"}
    response = checkpoint._session.get(url, headers=headers, stream=True)
    with response, tarfile.open(fileobj=response.raw, mode="r|*") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if name in missing:
                archive.extract(member, folder, filter="data")
                missing.remove(name)
            if not missing:
                return


class _DownloadProgress(Progress):
    """A progress bar that follows the files in `folder` while they grow to `total` bytes."""

    def __init__(self, description: str, folder: Path, total: int) -> None:
        self.folder = folder
        super().__init__(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self.add_task(description, total=total)

    def get_renderables(self) -> Iterable[RenderableType]:  # rich calls it ten times a second
        """Look at the folder's size each time the bar is drawn."""
        for task in self.task_ids:
            with suppress(OSError):  # a file that gets its final name meanwhile
                sizes = [file.stat().st_size for file in self.folder.rglob("*") if file.is_file()]
                self.update(task, completed=sum(sizes))
        return super().get_renderables()
