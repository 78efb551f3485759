"""End a command at a signal, in one line, together with the helpers it has forked. Run risky work in a child.

After a signal the exit status is 128 and the signal's number.
"""

import faulthandler
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of Linux's prctl
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)  # as `run_in_child` returns them


class Stopped(SystemExit):
    """A signal asks this process to end. `code` is the exit status: 128 and the signal's number."""


def stopped_by(error: BaseException | None) -> tuple[int, str]:
    """Return the exit status and the line of a process that a signal ends; 0 and "" if none is behind `error`.

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
    return 0, ""


def say_at_end(line: str) -> None:
    """Print the last line to stderr, after what stdout still holds. Either stream may be closed."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{line}\n")):
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:  # what is left in its buffer would raise again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def handle_signals() -> None:
    """From here on SIGTERM and SIGHUP raise `Stopped`, as SIGINT raises KeyboardInterrupt. Ignored ones stay ignored.

    During an import they end the process at once: nothing is to be saved there, and a library that tries whether it can
    import something may take the exception for a no. (So does Python with one in a finalizer: see `_end_if_stopped`.)

    A rank of several keeps what SIGTERM and SIGHUP do by default: its launcher waits for it, but it may itself wait for
    another rank, in C, where no handler of Python's runs.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS if os.environ.get("WORLD_SIZE", "1") == "1" else [signal.SIGINT]:
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
    """Have Linux kill this process when the thread of `parent` that started it ends, in whatever way."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before
            os._exit(1)


def _end_if_stopped(lost: Any) -> None:
    """Report an exception that Python cannot raise, as it does; but end if it is a signal's."""
    if stopped_by(lost.exc_value)[0]:
        _end_now(lost.exc_value)
    sys.__unraisablehook__(lost)


def _end_now(stop: BaseException) -> NoReturn:
    status, line = stopped_by(stop)
    say_at_end(line)
    os._exit(status)


def run_in_child(work: Callable[[], object], seconds: float) -> int:
    """Run in a forked child what may crash Python itself; return the child's exit status, or minus its last signal.

    The status is 0, 1 after an exception, or what `work` exits with. What the child prints is not shown. After
    `seconds` it is killed: a lock that another thread held at the fork stays locked in it. (Only on Linux; elsewhere
    nothing is run, and 0 returned: the libraries cannot be forked on macOS.)
    """
    if sys.platform != "linux":
        return 0
    child, deadline, ended = os.fork(), time.monotonic() + seconds, (0, 0)
    if child:
        while not ended[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
            ended = os.waitpid(child, os.WNOHANG)
        return os.waitstatus_to_exitcode(ended[1])
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
