"""Locks between processes of one machine. A lock ends with the process that holds it, however that process ends.

(On the rare file system without locks, filelock uses a file in their place. A killed process leaves that file behind.)
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from errors import UserError


def open_lock(path: Path) -> FileLock:
    """Return the lock whose file is `path`, not yet held. Raises `UserError` if the file cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}, and a lock is needed there") from error
    return FileLock(path)


def try_to_lock(lock: FileLock) -> bool:
    """Take the lock if no other process holds it. Returns whether this process holds it now."""
    with suppress(Timeout):
        lock.acquire(blocking=False)
    return lock.is_locked


@contextmanager
def locked(path: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Hold the lock `path`. `on_wait` is called once if another process has to release it first."""
    lock = open_lock(path)
    try:
        acquired = lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        acquired = lock.acquire()
    with acquired:
        yield


@contextmanager
def only_writer(folder: Path, patience: float = 0) -> Iterator[None]:
    """Be the only process of this user and machine that writes to `folder`.

    The lock's file is elsewhere, so that a run that finds a mistake leaves nothing in `folder`, nor the folder itself.
    Raises `UserError` if another process still writes there after `patience` seconds.
    """
    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()
    lock = open_lock(Path(tempfile.gettempdir()) / f"determined-locks-{os.getuid()}" / name)
    try:
        acquired = lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(f"{folder}: another process is at work there") from None
    with acquired:
        yield
