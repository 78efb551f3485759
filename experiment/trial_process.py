"""The processes that trials run in: for this project's own scripts, forked from one that has imported the libraries.

The imports take eight seconds; a forked trial starts in one. (Only on Linux: on macOS the libraries cannot be forked.)
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from signals import end_with_parent
from storage.files import BUNDLE

PROCESSES: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
IMPORTS = ["determined.transformers", "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer"]


def start_importing() -> None:
    """Start the process that trials are forked from, so that it imports while this one looks at the data."""
    # For multiprocessing's own helper: it would warn on the terminal of a lock that a killed trial has left.
    sys.warnoptions.append("ignore:resource_tracker")
    PROCESSES.set_forkserver_preload(["experiment.ends_with_parent", *IMPORTS])
    if PROCESSES.get_start_method() == "forkserver":
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process to handle
        with contextlib.chdir(BUNDLE):  # for it to find a module of ours
            forkserver.ensure_running()
        signal.signal(signal.SIGINT, handler)


def run_script(
    script: str, arguments: list[str], folder: Path, environment: dict[str, str], threads: int | None, log: Path
) -> None:
    """Turn this process, one of `PROCESSES`, into `python SCRIPT ARGUMENTS >>LOG 2>&1` in `folder`.

    `threads` are torch's (None: its own choice).
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    path = folder / script
    if folder != BUNDLE:  # its modules may have the names of ours: a Python of its own
        os.environ.setdefault("PYTHONUNBUFFERED", "1")  # the log shows what is printed, also of a trial that is killed
        if threads is not None:
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        end_with_parent(os.getppid())  # as `_wait_for_parent` ends the others
        os.execv(sys.executable, [sys.executable, str(path), *arguments])
    threading.Thread(target=_wait_for_parent, daemon=True).start()
    multiprocessing.set_start_method(None, force=True)  # data loading workers are forked, as in any script
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    sys.path.insert(0, str(path.parent))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing's processes skip them


def _wait_for_parent() -> None:
    """End this process, as SIGKILL would, once the one that started it has ended in whatever way."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
