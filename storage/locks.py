"""Locks between processes of one machine. A lock ends with the process that holds it, however that ends.

(On the rare file system without locks filelock puts a file in their place, which a killed process leaves behind.)
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from errors import UserError


def open_lock(path: Path) -> FileLock:
    """The lock whose file is `path`, not yet taken. Raises `UserError` where no file can be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, and a lock is needed there") from error
    return FileLock(path)


def taken(lock: FileLock) -> bool:
    """Take the lock if nobody holds it; whether it is ours now."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock `path`; `on_wait` is called once if another process must let go of it first."""
    lock = open_lock(path)
    if not taken(lock):
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def only_writer(folder: Path, patience: float = 0) -> Iterator[None]:
    """Be the only process of this user and machine that writes to `folder`.

    The lock is not in it: a run that finds a mistake should leave nothing there, not even the folder. Raises
    `UserError` if another still writes there after `patience` seconds.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    lock = open_lock(Path(tempfile.gettempdir()) / f"determined-locks-{os.getuid()}" / name)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(f"{folder}: another process is at work there") from None
    try:
        yield
    finally:
        lock.release()
