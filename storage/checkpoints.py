"""Checkpoints by UUID: fetched from Determined's storage, or from the store that stands in for it on this machine."""

import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from math import isfinite
from pathlib import Path

import determined as det
from determined.common import api, storage
from determined.common.constants import SHARED_FS_CONTAINER_PATH
from determined.errors import CheckpointNotFound
from determined.experimental import Determined, client
from huggingface_hub.constants import HF_HOME
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from urllib3.exceptions import HTTPError

from config.validation import check_uuid
from errors import PassingError, UserError, one_line
from storage.files import BUNDLE
from storage.ranks import once_per_node
from storage.shared_cache import make_once

# What a model folder needs to load: weights, configuration, tokenizer and chat template. All else of a checkpoint
# (optimizer.pt, rng_state.pth, training_args.bin) is large, or a pickle that could run code, or both.
MODEL_FILES = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip
# What `inference.py` can be told to take from a cluster, and what the number or UUID after it is of.
CLUSTER_SOURCES = {"exp": "experiment", "trial": "trial", "ckpt": "checkpoint"}


def local_checkpoint_storage() -> Path:
    """Where local runs keep their checkpoints, as `<uuid>/checkpoint-<step>/`: one place, as a cluster has one.

    The environment variable LOCAL_CHECKPOINT_STORAGE moves it, to a larger disk for instance.
    """
    default = BUNDLE / "local_runs" / "checkpoints"
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

    def fetch(folder: Path) -> None:
        try:
            core_context.checkpoint.download(
                ckpt_uuid, folder, download_mode=det.core.DownloadMode.NoSharedDownload, selector=is_model_file
            )
        except CheckpointNotFound:
            raise PassingError(f"model_ckpt {ckpt_uuid}: no such checkpoint in the storage") from None

    once_per_node(core_context.distributed, lambda: _fetch_once(ckpt_uuid, fetch, "model_ckpt"))
    return str(model_folder(_cached(ckpt_uuid), ckpt_uuid))


def agent_cache() -> Path:
    """Where a machine keeps what trials need not fetch or make again: beside the hub's downloads."""
    return Path(HF_HOME) / "determined"


def _cached(ckpt_uuid: str) -> Path:
    return agent_cache() / ckpt_uuid


def _fetch_once(ckpt_uuid: str, fetch: Callable[[Path], None], key: str) -> None:
    """Have `fetch` fill the checkpoint's folder, unless it is there or another process is at it already.

    Raises `UserError` where it holds no weights, besides what `fetch` raises.
    """

    def make(scratch: Path) -> None:
        fetch(scratch)
        model_folder(scratch, ckpt_uuid, key)

    make_once(
        _cached(ckpt_uuid), make, _has_weights, on_wait=lambda: print(f"checkpoint {ckpt_uuid}: on its way already")
    )


def local_checkpoint(ckpt_uuid: str, key: str) -> Path:
    """The model folder of a local run's checkpoint, where it is. Raises `UserError` as `download_ckpt` does."""
    check_uuid(ckpt_uuid, key)
    store = local_checkpoint_storage()
    if not (store / ckpt_uuid).is_dir():
        raise UserError(f"{key} {ckpt_uuid}: no such checkpoint in {store}")
    return model_folder(store / ckpt_uuid, ckpt_uuid, key)


def cluster_checkpoint(source: str, key: str) -> Path:
    """The model folder of a checkpoint on the cluster that the environment variable DET_MASTER names.

    `source` is `exp:12` or `trial:34`, for the best checkpoint by the experiment's searcher metric, or `ckpt:UUID`.
    The model files alone are fetched, once, to where `download_ckpt` keeps them. Raises `UserError` where there is no
    such checkpoint, or no master to ask.
    """
    kind, _, name = source.partition(":")
    if kind == "ckpt":
        check_uuid(name, key)
    elif not name.isdecimal():
        raise UserError(f"{key} {source!r}: after {kind}: comes the number of the {CLUSTER_SOURCES[kind]}")
    if kind != "ckpt" or not _has_weights(_cached(name)):
        with cluster_errors_told(f"{key} {source}", CLUSTER_SOURCES[kind]):
            checkpoint = _find_on_cluster(kind, name)
            if checkpoint is None:
                raise UserError(
                    f"{key} {source}: the {CLUSTER_SOURCES[kind]} has no checkpoint yet that was validated as well"
                )
            if checkpoint.state is not client.CheckpointState.COMPLETED:
                raise UserError(f"{key} {source}: the checkpoint is {checkpoint.state.name.lower()}")
            print(f"{source}: trial {checkpoint.training.trial_id}, checkpoint {checkpoint.uuid}")
            _fetch_once(checkpoint.uuid, lambda folder: _fetch_from_cluster(checkpoint, folder, key), key)
            name = checkpoint.uuid
    return model_folder(_cached(name), name, key)


@contextmanager
def cluster_errors_told(what: str, kind: str) -> Iterator[None]:
    """Turn what the SDK raises where a master is missing, or says no, into a `UserError` about `what`, of a `kind`."""
    master = api.get_default_master_url()
    try:
        master = api.canonicalize_master_url(master)
        yield
    except UserError:
        raise
    except api.errors.MasterNotFoundException:
        told = f"no Determined master at {master} (the environment variable DET_MASTER names it)"
        raise UserError(f"{what}: {told}") from None
    except api.errors.UnauthenticatedException:
        raise UserError(f"{what}: {master} wants you to log in (det user login)") from None
    except api.errors.NotFoundException:
        raise UserError(f"{what}: {master} has no such {kind}") from None
    except (api.errors.BadRequestException, api.errors.BadResponseException, OSError, ValueError) as error:
        raise UserError(f"{what}: {master}: {one_line(error)}") from error


def _find_on_cluster(kind: str, name: str) -> client.Checkpoint | None:
    """The checkpoint that a source names; None where an experiment or a trial has none that ranks.

    Raises what the SDK raises: see `cluster_errors_told`.
    """
    cluster = Determined()
    if kind == "ckpt":
        return cluster.get_checkpoint(name)
    owner = cluster.get_experiment(int(name)) if kind == "exp" else cluster.get_trial(int(name))
    # Without a sort key the API sorts by the searcher's metric, the best first.
    return next(filter(_ranks, owner.list_checkpoints()), None)


def _ranks(checkpoint: client.Checkpoint) -> bool:
    """Whether it is still there, and was validated with a finite value of its searcher's metric."""
    metrics = checkpoint.training.validation_metrics.get("avgMetrics") or {}
    value = metrics.get(checkpoint.training.experiment_config["searcher"]["metric"])
    return checkpoint.state is client.CheckpointState.COMPLETED and isinstance(value, float | int) and isfinite(value)


def _fetch_from_cluster(checkpoint: client.Checkpoint, folder: Path, key: str) -> None:
    """Download the model files, from the storage where this machine can reach it, else through the master.

    The SDK's own `download` knows no selector: it would fetch the optimizer's state too, twice the model's size.
    Raises `UserError` where neither works.
    """
    wanted = {name: int(size) for name, size in (checkpoint.resources or {}).items() if is_model_file(name)}
    with _shows_download(f"checkpoint {checkpoint.uuid}", folder, sum(wanted.values())):
        try:
            # In a container a shared file system is mounted in a place of its own.
            mounted = SHARED_FS_CONTAINER_PATH if det.get_cluster_info() else None
            config = checkpoint.training.experiment_config["checkpoint_storage"]
            manager = storage.build(config, container_path=mounted)
            manager.download(checkpoint.uuid, str(folder), selector=is_model_file)
        except Exception as direct:  # each kind of storage has its own
            try:
                _fetch_through_master(checkpoint, folder, set(wanted))
            except (api.errors.BadRequestException, OSError, tarfile.TarError, HTTPError) as error:
                told = f"{one_line(error)} (and from its storage: {one_line(direct)})"
                raise UserError(f"{key}: checkpoint {checkpoint.uuid} cannot be downloaded: {told}") from error


def _fetch_through_master(checkpoint: client.Checkpoint, folder: Path, wanted: set[str]) -> None:
    """Read the archive that the master makes of the checkpoint, up to the last of the files that are wanted."""
    response = checkpoint._session.get(
        f"/checkpoints/{checkpoint.uuid}", headers={"Accept": "application/gzip"}, stream=True
    )
    with response, tarfile.open(fileobj=response.raw, mode="r|*") as packed:
        for member in packed:
            name = member.name.removeprefix("./")
            if name in wanted:
                packed.extract(member, folder, filter="data")
                wanted.remove(name)
            if not wanted:
                return


@contextmanager
def _shows_download(description: str, folder: Path, total: int) -> Iterator[None]:
    """A progress bar while the files in `folder` grow to `total` bytes."""
    done = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(description, total=total)

        def watch() -> None:
            while not done.wait(timeout=0.2):
                with suppress(OSError):  # a file that gets its final name
                    progress.update(task, completed=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
        progress.update(task, completed=total)


def _has_weights(folder: Path) -> bool:
    return next(folder.rglob("*.safetensors"), None) is not None


def model_folder(checkpoint: Path, ckpt_uuid: str, key: str = "model_ckpt") -> Path:
    """The folder within a checkpoint that holds its model. Raises `UserError` where none does."""
    weights = sorted(checkpoint.rglob("*.safetensors"))
    if not weights:
        raise UserError(f"{key} {ckpt_uuid}: the checkpoint holds no model weights (*.safetensors)")
    return weights[0].parent
