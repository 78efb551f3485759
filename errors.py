"""How this bundle reports a user's mistake: one line on stderr that names it, and exit status 2.

The YAMLs' log_policies know the line `error: ...`, after which a cluster need not start the trial again.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any


class UserError(ValueError):
    """A mistake in a config, a file or a command line. Its message names the key, file or row, in one line."""


class PassingError(UserError):
    """One that may go by itself, and is worth another try: a hub or a storage without what was asked of it."""


def exit_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a `main` so that a `UserError` ends the process as a user expects, not with a stack trace."""

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(1)  # most mistakes are every rank's: the first tells it, and its launcher ends the others
            passing = " (or out of reach for now)" if isinstance(error, PassingError) else ""
            print(f"error{passing}: {one_line(error)}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapper


def one_line(error: object) -> str:
    """`error`'s message with every run of white space, line breaks too, folded into a space."""
    return " ".join(str(error).split())


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, else the empty string."""
    match = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
