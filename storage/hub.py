"""Names that may be a local path or a hub id, and the hub's libraries while they look one up."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from datasets.utils import logging as datasets_logging
from huggingface_hub.utils import logging as hub_logging


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a local path: a hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


@contextmanager
def quiet_lookup() -> Iterator[None]:
    """Keep the libraries' own words on a failure, and on each retry, from stderr: the caller tells it in one line."""
    verbosity, hub_verbosity = datasets_logging.get_verbosity(), hub_logging.get_verbosity()
    datasets_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
