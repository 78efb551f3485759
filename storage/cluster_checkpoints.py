"""Find and download checkpoints of a cluster from any machine: `exp:12`, `trial:34`, `ckpt:UUID` and `model:NAME`."""

import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any

import determined as det
from determined.common import api, storage
from determined.common.api import bindings
from determined.common.constants import SHARED_FS_CONTAINER_PATH
from determined.common.util import parse_protobuf_timestamp
from determined.experimental import Determined, client
from rich.console import RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from urllib3.exceptions import HTTPError

from config.cluster_names import CLUSTER_SOURCES, is_cluster_name, parse_cluster_name, starting_name
from errors import TemporaryError, UserError, one_line, shorten
from storage.adapter_chains import CONFIG as ADAPTER_CONFIG
from storage.adapter_chains import WEIGHTS as ADAPTER_WEIGHTS
from storage.adapter_chains import place_base
from storage.checkpoints import (
    cached_checkpoint,
    checkpoint_below,
    fetch_once,
    is_downloaded,
    is_model_file,
    local_checkpoint,
    model_folder,
)
from storage.shared_cache import is_made

MODEL_CONFIGS = ("config.json", ADAPTER_CONFIG)  # one of them is in each model's folder


def checkpoint_folder(source: str, key: str, verify: bool = True) -> Path:
    """Return the model folder of a local run's checkpoint, by its UUID, or of a cluster's, which is downloaded.

    Raises `UserError` if there is none or, with `verify`, if a file of its model is damaged.
    """
    if is_cluster_name(source):
        return cluster_checkpoint(source, key)
    advice = f" (LOCAL_CHECKPOINT_STORAGE names another folder); if it is on a cluster, give ckpt:{source}"
    return local_checkpoint(source, key, verify, advice)


def cluster_checkpoint(source: str, key: str) -> Path:
    """Return the model folder of a checkpoint on the cluster that the environment variable DET_MASTER names.

    `source` is a name of `config/cluster_names.py`. Only the model files are downloaded, once, to where `download_ckpt`
    keeps them. Raises `UserError` if there is no such checkpoint or no master.
    """
    kind, name, _ = parse_cluster_name(source, key)
    if kind != "ckpt" or not is_made(cached_checkpoint(name)):
        checkpoint = find_checkpoint(source, key)
        name = checkpoint.uuid
        if checkpoint.training:
            print(f"{source}: trial {checkpoint.training.trial_id}, checkpoint {name}")
        fetch_once(name, lambda folder: _download(checkpoint, folder, key), key)
    folder = model_folder(cached_checkpoint(name), name, key)
    if base := checkpoint_below(folder):
        cluster_checkpoint(f"ckpt:{base}", f"{key} {source}: its base")
    return folder


def find_checkpoint(source: str, key: str) -> client.Checkpoint:
    """Return the checkpoint that a name of a cluster stands for now. Raises `UserError` unless it is there.

    Of an experiment or a trial it is the best by the experiment's searcher metric, of a model the latest version.
    """
    kind, name, version = parse_cluster_name(source, key)
    checkpoint: client.Checkpoint | None
    with one_line_cluster_errors(f"{key} {source}", CLUSTER_SOURCES[kind]):
        if kind == "ckpt":
            checkpoint = Determined().get_checkpoint(name)
        elif kind == "model":
            checkpoint = _registered(name, version, f"{key} {source}")
        else:
            checkpoint = _best_checkpoint(kind, int(name))
        if checkpoint is None:
            what = "version" if kind == "model" else "checkpoint yet that was validated"
            raise UserError(f"{key} {source}: the {CLUSTER_SOURCES[kind]} has no {what}")
        if checkpoint.state is not client.CheckpointState.COMPLETED:
            state = checkpoint.state.name.lower() if checkpoint.state else "in an unknown state"
            raise UserError(f"{key} {source}: the checkpoint is {state}")
    return checkpoint


def base_of(source: str, key: str) -> str | None:
    """Return the model that the first training before a checkpoint started from, as a cluster's master knows it."""
    training = find_checkpoint(source, key).training
    hparams: dict[str, Any] = (training.hparams if training else None) or {}
    before = starting_name(hparams)
    return base_of(before, key) if before else hparams.get("model_name")


def settled_checkpoint(source: str, key: str, experiment_id: int) -> str:
    """Return the UUID that `source` stands for in all trials and starts of an experiment, which begin at many times.

    It depends only on what was there when the experiment was created, by the master's clock: the latest version then of
    a model, and the best checkpoint of an experiment that had ended then. Raises `UserError` if that one had not: its
    best checkpoint could change between two trials.
    """
    kind, name, version = parse_cluster_name(source, key)
    if kind == "ckpt":
        return name
    with one_line_cluster_errors(f"{key} {source}", CLUSTER_SOURCES[kind]):
        session = Determined()._session
        created = _experiment(session, experiment_id).startTime
        if kind == "model" and version is None:
            Determined().get_model(name)
            found = bindings.get_GetModelVersions(
                session,
                modelName=name,
                sortBy=bindings.v1GetModelVersionsRequestSortBy.VERSION,
                orderBy=bindings.v1OrderBy.DESC,
            ).modelVersions
            version = next((each.version for each in found if not _later(each.creationTime, created)), None)
            if version is None:
                raise UserError(f"{key} {source}: the model had no version when experiment {experiment_id} was created")
            source = f"{source}:{version}"
    checkpoint = find_checkpoint(source, key)
    if kind != "model" and checkpoint.training:
        owner = checkpoint.training.experiment_id
        with one_line_cluster_errors(f"{key} {source}", CLUSTER_SOURCES[kind]):
            ended = _experiment(session, owner).endTime
        if not ended or _later(ended, created):
            why = f"experiment {owner} had not ended when this one was created, so its best checkpoint may still change"
            raise UserError(f"{key} {source}: {why}; the best one now is ckpt:{checkpoint.uuid}")
    return checkpoint.uuid


def _experiment(session: api.Session, experiment_id: int) -> bindings.v1Experiment:
    # The SDK's own Experiment has no times.
    return bindings.get_GetExperiment(session, experimentId=experiment_id).experiment


def _later(time: str, than: str) -> bool:
    return parse_protobuf_timestamp(time) > parse_protobuf_timestamp(than)


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
    """Turn the SDK's errors, such as a missing or refusing master, into a `UserError` about `what`, a `kind`.

    In a container a master that does not answer is worth another try.
    """
    master = api.get_default_master_url()
    out_of_reach = TemporaryError if det.get_cluster_info() else UserError
    try:
        master = api.canonicalize_master_url(master)
        yield
    except UserError:
        raise
    except api.errors.MasterNotFoundException:
        named = "names it" if os.environ.get("DET_MASTER") else "is not set"
        reason = f"no Determined master at {master} (the environment variable DET_MASTER {named})"
        raise out_of_reach(f"{what}: {reason}") from None
    except api.errors.UnauthenticatedException:
        raise UserError(f"{what}: {master} requires you to log in (det user login)") from None
    except api.errors.NotFoundException:
        raise UserError(f"{what}: {master} has no such {kind}") from None
    except (api.errors.BadRequestException, api.errors.BadResponseException, OSError, ValueError) as error:
        raise out_of_reach(f"{what}: {master}: {one_line(error)}") from error


def _best_checkpoint(kind: str, number: int) -> client.Checkpoint | None:
    """Return the best checkpoint of an experiment or trial; None if none can be ranked."""
    cluster = Determined()
    owner = cluster.get_experiment(number) if kind == "exp" else cluster.get_trial(number)
    # Without a sort key the API sorts by the searcher's metric, with the best first.
    return next(filter(_can_be_ranked, owner.list_checkpoints()), None)


def _registered(name: str, version: int | None, what: str) -> client.Checkpoint | None:
    """Return the checkpoint of a registered model's version, by default the latest; None if it has no version."""
    model = Determined().get_model(name)
    with one_line_cluster_errors(what, "version of this model"):
        found = model.get_version(-1 if version is None else version)
    return found.checkpoint if found else None


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
    if any(Path(path).name == name for path in checkpoint.resources or {}):
        _download_only_from_storage(checkpoint, folder, lambda path: Path(path).name == name)


def download_but_weights(checkpoint: client.Checkpoint, folder: Path) -> Path:
    """Download a model without its weights, as `download_files` does, from a checkpoint that has one.

    Returns the model's own folder. That of an adapter, which is small, is whole, and stands on a checkpoint without its
    weights.
    """

    def select(path: str) -> bool:
        return is_model_file(path) and (not path.endswith(".safetensors") or Path(path).name == ADAPTER_WEIGHTS)

    _download_only_from_storage(checkpoint, folder / "model", select)
    model = min(file for name in MODEL_CONFIGS for file in (folder / "model").rglob(name)).parent
    if base := checkpoint_below(model):
        below = find_checkpoint(f"ckpt:{base}", "its base")
        place_base(model, str(download_but_weights(below, folder / "base")))
    return model


def _download_only_from_storage(checkpoint: client.Checkpoint, folder: Path, select: Callable[[str], bool]) -> None:
    try:
        _download_from_storage(checkpoint, folder, select)
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
