"""How a command ends early: in one line on stderr, whether by a user's mistake, a disk or a signal (see signals.py).

After a mistake the line names it, and the exit status is 2. The `log_policies` of the YAMLs match a line that begins
with `error: `. The cluster then does not restart the trial. A traceback on the terminal is a bug of this project.
`--debug`, on a cluster the experiment's `debug: true`, shows where in the code a user's mistake was found.
"""

import argparse
import errno
import functools
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any, NoReturn

from signals import handle_signals, say_at_end, stopped_by

LONGEST_REASON = 300  # characters of a library's message
LONGEST_LINE = 700  # of ours
# Errors of a disk, and EPIPE: nobody reads stdout any more. DISK_FULL is how the system and torch say it inside the
# errors of other libraries.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EPIPE)
DISK_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
    "enforce fail at inline_container",
)


class UserError(ValueError):
    """A mistake in a config, a file or a command line. The message is one line and names the key, file or row."""


class TemporaryError(UserError):
    """An error that may pass by itself, such as a hub out of reach. It is worth another try."""


def exit_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a `main` so that a mistake, a disk or a signal ends the process with one line, not a stack trace.

    What a script imports above its `main` comes before the signals are handled: keep it short.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        handle_signals()
        try:
            result = main(*args, **kwargs)
            print(end="", flush=True)
            return result
        except BaseException as error:
            status, line = stopped_by(error)
            if not line:
                status, line = 2, _line_of(error)
            if not line:
                raise
            if status == 2 and os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(1)  # most mistakes occur on every rank; rank 0 prints first, its launcher ends the others
            debug: Any = os.environ.get("DET_DEBUG")
            with suppress(ValueError, AttributeError):  # a master gives its containers the experiment's config
                debug = debug or json.loads(os.environ.get("DET_EXPERIMENT_CONFIG", "{}")).get("debug")
            if debug:
                traceback.print_exc()
            say_at_end(line)
            raise SystemExit(status) from None

    return wrapper


def _line_of(error: BaseException) -> str:
    """Return the line for a user's mistake or a disk's error; "" for a mistake of ours."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return f"error (may be temporary): {where}{reason(error.strerror or error)}"
    if isinstance(error, TemporaryError) or any(sign in str(error) for sign in DISK_FULL):
        return f"error (may be temporary): {reason(error, LONGEST_LINE)}"
    return f"error: {reason(error, LONGEST_LINE)}" if isinstance(error, UserError) else ""


class CommandLine(argparse.ArgumentParser):
    """The options of a command. A mistake in them is a `UserError`, which names the nearest option."""

    def __init__(self, description: str | None, **kwargs: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--debug", action="store_true", help="show where in the code an error comes from")

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse `args`, by default those of this process, after looking for options that do not exist."""
        words, known = list(sys.argv[1:] if args is None else args), self._option_string_actions
        for word in words:
            if "\0" in word or any("\ud800" <= character <= "\udfff" for character in word):
                raise UserError(f"argument {word[:80]!r} is not UTF-8 text, or has a null character")
        # argparse would first report what is missing, which is often what the misspelled option should have given.
        for word in itertools.takewhile("--".__ne__, words):
            name = word.partition("=")[0]
            if name.startswith("--") and " " not in name and not any(option.startswith(name) for option in known):
                raise UserError(f"{name}: no such option{nearest(name, known)}")
        options = super().parse_args(words, namespace)
        for action in self._actions:
            if getattr(options, action.dest, None) == "":
                raise UserError(f"{', '.join(action.option_strings) or action.metavar} is empty")
        if options.__dict__.pop("debug", False):
            os.environ["DET_DEBUG"] = "1"  # for the trials of a local experiment, too
        return options

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` where argparse would print the usage and exit."""
        raise UserError(reason(message))


def at_least(minimum: int) -> Callable[[str], int]:
    """Return the type of an option: a whole number that is not less than `minimum`."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if (number := int(text)) >= minimum:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")

    return parse


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn whatever a library raises within, as it reads `what` of the user's, into a `UserError`: its reason, short.

    Keep our own code out of it: a mistake there must stay a traceback.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # A panic in the tokenizers' or safetensors' Rust is no Exception. Memory that runs out is handled further up.
        name, is_exception = type(error).__name__, isinstance(error, Exception)
        if name == "OutOfMemoryError" or not (is_exception or name == "PanicException"):
            raise
        raise UserError(f"{what}: {reason(error)}") from error


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
        raise UserError(f"{name}: {error.strerror or reason(error)}") from error


def reason(error: BaseException | str, longest: int = LONGEST_REASON) -> str:
    """Return what a library says of an error, in one line that is not too long."""
    return shorten(one_line(error) or type(error).__name__, longest)


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
