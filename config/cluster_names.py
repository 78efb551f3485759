"""What names a checkpoint: its UUID or, through a cluster's master, `exp:12`, `trial:34`, `ckpt:UUID`, `model:NAME`."""

from typing import Any, NamedTuple

from config.validation import check_uuid, is_uuid
from errors import UserError

# What can stand before the colon, and what the number, UUID or name after it is of.
CLUSTER_SOURCES = {"exp": "experiment", "trial": "trial", "ckpt": "checkpoint", "model": "model"}
FORMS = "exp:12, trial:34, ckpt:UUID or model:NAME"
NO_CHECKPOINT = "none"  # as a `model_ckpt`: DPO is meant to start from `model_name`


class ClusterName(NamedTuple):
    """A name that a cluster's master knows: `name` is a number, a UUID or a registered model's name."""

    kind: str
    name: str
    version: int | None = None  # of a registered model; None: its latest


def is_cluster_name(source: str) -> bool:
    """Return whether `source` begins as a name that a cluster's master knows."""
    return ":" in source and source.partition(":")[0] in CLUSTER_SOURCES


def starting_name(hparams: dict[str, Any]) -> str | None:
    """Return the checkpoint that a cluster's trial started from, by a cluster's name; None: from its model_name."""
    start = hparams.get("model_ckpt") or NO_CHECKPOINT
    if start == NO_CHECKPOINT:
        return None
    return start if is_cluster_name(start) else f"ckpt:{start}"


def parse_cluster_name(source: str, key: str) -> ClusterName:
    """Return the parts of `exp:12`, `model:NAME:VERSION` and so on. Raises `UserError` about `key` if one is wrong."""
    kind, _, name = source.partition(":")
    if kind == "ckpt":
        check_uuid(name, key)
    elif kind == "model":
        name, colon, version = name.partition(":")
        if not name or "/" in name:
            raise UserError(f"{key} {source!r}: after model: comes a registered model's name, without a slash")
        if colon and not (version.isdecimal() and len(version) < 10 and int(version)):
            raise UserError(f"{key} {source!r}: the version {version!r} is not a number from 1")
        return ClusterName(kind, name, int(version) if colon else None)
    elif not name.isdecimal():
        raise UserError(f"{key} {source!r}: after {kind}: comes the number of the {CLUSTER_SOURCES[kind]}")
    return ClusterName(kind, name)


def check_checkpoint_name(source: str, key: str) -> None:
    """Raise `UserError` about `key` unless `source` is a UUID or a well-formed name of a cluster."""
    if is_cluster_name(source):
        parse_cluster_name(source, key)
    elif not is_uuid(source):
        form = "32 hexadecimal digits as 8-4-4-4-12"
        raise UserError(f"{key} {source!r} is not a checkpoint UUID ({form}), nor {FORMS} of a cluster")
