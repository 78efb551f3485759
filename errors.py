"""A user's mistakes, on the command line too: one line on stderr that names the mistake, and exit status 2.

The `log_policies` of the YAMLs match a line that begins with `error: `. The cluster then does not restart the trial.
The traceback of a mistake goes to the log at debug level, which a command's `--debug` shows. One that is on a terminal
without it is a mistake of ours.
"""

import argparse
import functools
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NoReturn

logger = logging.getLogger(__name__)
LONGEST_REASON = 300  # characters of a library's message


class UserError(ValueError):
    """A mistake in a config, a file or a command line. The message is one line and names the key, file or row."""


class TemporaryError(UserError):
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
            temporary = " (may be temporary)" if isinstance(error, TemporaryError) else ""
            logger.debug("where the error below comes from", exc_info=True)
            print(f"error{temporary}: {one_line(error)}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapper


class CommandLine(argparse.ArgumentParser):
    """The options of a command. A mistake in them is a `UserError`, which names the nearest option."""

    def __init__(self, description: str | None, **kwargs: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--debug", action="store_true", help="show where in the code an error comes from")

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse `args`, by default those of this process, after looking for options that do not exist."""
        words, known = list(sys.argv[1:] if args is None else args), self._option_string_actions
        # argparse would first report what is missing, which is often what the misspelled option should have given.
        for word in itertools.takewhile("--".__ne__, words):
            name = word.partition("=")[0]
            if name.startswith("--") and " " not in name and not any(option.startswith(name) for option in known):
                raise UserError(f"{name}: no such option{nearest(name, known)}")
        options = super().parse_args(words, namespace)
        if options.__dict__.pop("debug", False):
            logger.addHandler(logging.StreamHandler())
            logger.setLevel(logging.DEBUG)
        return options

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` where argparse would print the usage and exit."""
        raise UserError(message)


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn whatever a library raises within, as it reads `what` of the user's, into a `UserError`: its reason, short.

    Keep our own code out of it: a mistake there must stay a traceback.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {shorten(one_line(error)) or type(error).__name__}") from error


@contextmanager
def about(what: object) -> Iterator[None]:
    """Begin the message of a `UserError` within with `what` it is about, such as the file."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{what}: {error}") from error


@contextmanager
def os_errors_of(name: object) -> Iterator[None]:
    """Turn an `OSError` within into a `UserError` about `name`, the file or option that is at fault."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from error


def one_line(error: object) -> str:
    """Return the message of `error` with every run of white space, including line breaks, replaced by one space."""
    return " ".join(str(error).split())


def shorten(text: str, longest: int = LONGEST_REASON) -> str:
    """Return `text`, or its beginning and an ellipsis if it has more than `longest` characters."""
    return text if len(text) <= longest else f"{text[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` with the known name closest to `name`, or "" if none is close."""
    match = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
