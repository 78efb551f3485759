"""Tell local paths from hub ids, and keep the hub's libraries quiet while they look one up."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from errors import UserError


def looks_like_path(name: str) -> bool:
    """Return whether `name` can only be a local path: a hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def check_hub_id(source: str, what: str) -> None:
    """Raise `UserError` about `what` if `source`, which is no local path, cannot be a hub id either."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise UserError(f"{what}: no such file or folder, and a hub id is name or owner/name") from error


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
