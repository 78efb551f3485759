"""Tell local paths from hub ids, and keep the hub's libraries quiet while they look one up."""

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import TemporaryError, UserError, reason

SECONDS_TO_ANSWER = 5


def looks_like_path(name: str) -> bool:
    """Return whether `name` can only be a local path: a hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def no_such(what: str) -> str:
    """Return that there is "no such `what`", a file or folder that a user named; and in a container, what it sees."""
    import determined as det

    info = det.get_cluster_info()
    if info is None or info.task_type != "TRIAL":
        return f"no such {what}"
    mounts = info.trial._config.get("bind_mounts") or []
    seen = [f"its agent's {mount['host_path']} as {mount['container_path']}" for mount in mounts]
    disk = ", ".join(seen) or "nothing of its agent's disk, as there are no bind_mounts"
    return f"no such {what} (in a container: it sees what was uploaded, and {disk})"


def check_hub_id(source: str, what: str) -> None:
    """Raise `UserError` about `what` if `source`, which is no local path, cannot be a hub id either.

    Raises `TemporaryError` if the hub cannot be reached and nothing of this id is cached. (The libraries would try for
    25 seconds.)
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise UserError(f"{what}: {no_such('file or folder')}, and a hub id is name or owner/name") from error
    cached = any(Path(HF_HUB_CACHE).glob(f"*--{source.replace('/', '--')}"))
    if not cached and (problem := _why_out_of_reach()):
        raise TemporaryError(f"{what}: {no_such('file or folder')}, and the hub cannot be reached ({problem})")


def commit_of(source: str, revision: str | None) -> str | None:
    """Return the commit of a hub model that is in this machine's cache, by its id and a branch, tag or commit."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


@functools.cache
def _why_out_of_reach() -> str:
    """Return why the hub does not answer; "" if it does, or is not to be asked."""
    from huggingface_hub.constants import ENDPOINT, is_offline_mode
    from huggingface_hub.utils import get_session

    try:
        if not is_offline_mode():
            get_session().head(ENDPOINT, timeout=SECONDS_TO_ANSWER)
    except Exception as error:  # whatever the HTTP client of this release raises
        return reason(error)
    return ""


@contextmanager
def quiet_lookup() -> Iterator[None]:
    """Keep the libraries' messages from stderr while they look something up or load it: the caller says what failed."""
    loggers = [logging.getLogger(library) for library in ("datasets", "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
