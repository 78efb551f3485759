"""Errors that are a user's mistake: one line on stderr that names the mistake, and exit status 2.

The `log_policies` of the YAMLs match a line that begins with `error: `. The cluster then does not restart the trial.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any


class UserError(ValueError):
    """A mistake in a config, a file or a command line. The message is one line and names the key, file or row."""


class PassingError(UserError):
    """An error that may pass by itself, such as a hub out of reach. It is worth another try."""


def exit_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a `main` so that a `UserError` ends the process with one line and exit status 2, not a stack trace."""

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(1)  # most mistakes occur on every rank; rank 0 prints first, its launcher ends the others
            temporary = " (may be temporary)" if isinstance(error, PassingError) else ""
            print(f"error{temporary}: {one_line(error)}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapper


def one_line(error: object) -> str:
    """Return the message of `error` with every run of white space, including line breaks, replaced by one space."""
    return " ".join(str(error).split())


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` with the known name closest to `name`, or "" if none is close."""
    match = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
