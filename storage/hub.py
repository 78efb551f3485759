"""Tell local paths from hub ids, and keep the hub's libraries quiet while they look one up."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def looks_like_path(name: str) -> bool:
    """Return whether `name` can only be a local path: a hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


@contextmanager
def quiet_lookup() -> Iterator[None]:
    """Keep the libraries' messages on failures and retries from stderr: the caller reports them in one line."""
    from datasets.utils import logging as datasets_logging  # takes seconds
    from huggingface_hub.utils import logging as hub_logging

    verbosity, hub_verbosity = datasets_logging.get_verbosity(), hub_logging.get_verbosity()
    datasets_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
