"""How a command ends early: in one line on stderr, whether by a user's mistake, a disk or a signal.

After a mistake the line names it, and the exit status is 2. After a signal it is 128 and the signal's number. The
`log_policies` of the YAMLs match a line that begins with `error: `. The cluster then does not restart the trial.
The traceback of a mistake goes to the log at debug level, which a command's `--debug` shows. One that is on a terminal
without it is a mistake of ours.
"""

import argparse
import faulthandler
import functools
import itertools
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from types import FrameType
from typing import Any, NoReturn

logger = logging.getLogger(__name__)
LONGEST_REASON = 300  # characters of a library's message
LONGEST_LINE = 700  # of ours
# What safetensors' and torch's own errors say.
DISK_FULL = ("No space left on device", "PytorchStreamWriter failed writing file")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class UserError(ValueError):
    """A mistake in a config, a file or a command line. The message is one line and names the key, file or row."""


class TemporaryError(UserError):
    """An error that may pass by itself, such as a hub out of reach. It is worth another try."""


class Stopped(SystemExit):
    """A signal asks this process to end. `code` is the exit status: 128 and the signal's number."""


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
            status, line = _ending(error)
            if not line:
                raise
            if status == 2 and os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(1)  # most mistakes occur on every rank; rank 0 prints first, its launcher ends the others
            logger.debug("where the error below comes from", exc_info=True)
            _say(line)
            raise SystemExit(status) from None

    return wrapper


def _ending(error: BaseException | None) -> tuple[int, str]:
    """Return the exit status and the line for what ends a command; no line for a mistake of ours.

    A signal that arrives in the middle of something may show as an error of what it has interrupted.
    """
    causes = [error] if error else []
    while causes and (before := causes[-1].__cause__ or causes[-1].__context__) and before not in causes:
        causes.append(before)
    for cause in causes:
        if isinstance(cause, Stopped | KeyboardInterrupt):
            status = int(cause.code or 0) if isinstance(cause, Stopped) else 128 + signal.SIGINT
            name = signal.Signals(status - 128).name
            return status, f"stopped by {name}; the same command goes on from what it has saved"
    if isinstance(error, OSError):  # of a disk that is full, for example, or a reader of stdout that has gone
        where = f"{error.filename}: " if error.filename else ""
        return 2, f"error (may be temporary): {where}{reason(error.strerror or error)}"
    if error and any(sign in str(error) for sign in DISK_FULL):
        return 2, f"error (may be temporary): {reason(error, LONGEST_LINE)}"
    if isinstance(error, UserError):
        temporary = " (may be temporary)" if isinstance(error, TemporaryError) else ""
        return 2, f"error{temporary}: {reason(error, LONGEST_LINE)}"
    return 0, ""


def _say(line: str) -> None:
    """Print the last line to stderr, after what stdout still holds. Neither needs to take it."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{line}\n")):
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:  # what is left in its buffer would raise again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def handle_signals() -> None:
    """From here on SIGTERM and SIGHUP raise `Stopped`, as SIGINT raises KeyboardInterrupt. Ignored ones stay ignored.

    During an import they end the process at once: nothing is to be saved there, and a library that tries whether it can
    import something may take the exception for a no. (So does Python with one in a finalizer: see `_end_if_stopped`.)
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _end_if_stopped
        os.register_at_fork(before=lambda: _forking.update(parent=os.getpid()), after_in_child=_end_with_parent)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    stop = KeyboardInterrupt() if number == signal.SIGINT else Stopped(128 + number)
    while frame and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    if frame:
        _end_now(stop)
    raise stop


_forking: dict[str, int] = {}  # the id of the process that forks


def _end_with_parent() -> None:
    """Have a forked helper, such as one that loads data, end without a word at a signal, and when its parent ends."""
    for number in SIGNALS:
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_DFL)
    end_with_parent(_forking["parent"])


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which started it, ends in whatever way. (Only on Linux.)"""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before
            os._exit(1)


def _end_if_stopped(lost: Any) -> None:
    """Report an exception that Python cannot raise, as it does; but end if it is a signal's."""
    if _ending(lost.exc_value)[0] > 128:
        _end_now(lost.exc_value)
    sys.__unraisablehook__(lost)


def _end_now(stop: BaseException) -> NoReturn:
    status, line = _ending(stop)
    _say(line)
    os._exit(status)


def run_in_child(work: Callable[[], object]) -> int:
    """Run in a forked child what may crash Python itself; return the child's exit status, or minus its last signal.

    The status is 0, 1 after an exception, or what `work` exits with. What the child prints is not shown.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        faulthandler.disable()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work()
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(1)


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
            logger.addHandler(logging.StreamHandler())
            logger.setLevel(logging.DEBUG)
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
        # A panic in the tokenizers' or safetensors' Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
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
        raise UserError(f"{name}: {error.strerror}") from error


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
