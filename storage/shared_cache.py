"""Make once what trials share: tokenized data, reference log-probs, the checkpoint they start from.

Trials may run beside each other on one disk. So a result appears whole or not at all, one process makes it while the
others wait, and it is found again by a fingerprint of all that it depends on. If the process that makes it dies, its
lock goes with it and the next process makes it.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from determined import core
from filelock import FileLock

from errors import UserError
from storage.files import flush_to_disk, remove
from storage.locks import locked, open_lock, try_to_lock
from storage.manifests import MANIFEST, check_files, hash_files, write_manifest

Action = Callable[[], object]  # its result is not used
LARGEST_HASHED = 2**28  # bytes; of larger files, such as weights, the size alone is checked at each start


def make_once(folder: Path, make: Callable[[Path], object], on_wait: Action) -> bool:
    """Have `make` fill `folder` unless it is whole already, or another process is making it just now.

    `on_wait` is called before a wait for that process. Returns whether this process made it. Raises `UserError` if the
    folder cannot be made.
    """
    if is_made(folder):
        return False
    scratch = folder.with_name(f"{folder.name}.partial")
    with locked(folder.with_name(f"{folder.name}.lock"), on_wait):
        if is_made(folder):
            return False
        for leftover in (scratch, folder):  # left by a process that was killed, or by a cleaner of old files
            remove(leftover)
        try:
            make(scratch)
            write_manifest(scratch, hash_files(scratch, LARGEST_HASHED))
            flush_to_disk(scratch)
            scratch.rename(folder)
            flush_to_disk(folder.parent, within=False)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return True


def is_made(folder: Path) -> bool:
    """Return whether `folder` holds what `make_once` left in it."""
    with suppress(UserError):
        check_files(folder)
        return (folder / MANIFEST).is_file()
    return False


def once_per_node(distributed: core.DistributedContext, work: Action) -> None:
    """Run `work` on the first rank of each node while the others wait. All ranks raise its `UserError`."""
    mistake = None
    if distributed.local_rank == 0:
        try:
            work()
        except UserError as error:
            mistake = error
    if mistake := distributed.broadcast_local(mistake):
        raise mistake


@contextmanager
def one_trial_at_a_time(
    lock_file: Path, distributed: core.DistributedContext, on_wait: Action, while_waiting: Action
) -> Iterator[None]:
    """Let one trial in while the others that use `lock_file` wait. All ranks of a trial on one machine enter together.

    A trial that has to wait calls `on_wait` once, and `while_waiting` again and again: it may raise to end the wait.
    """
    locks: list[FileLock] = []
    once_per_node(distributed, lambda: locks.append(open_lock(lock_file)))
    waiting = False
    while not distributed.broadcast(try_to_lock(locks[0]) if distributed.rank == 0 else None):
        if not waiting:
            on_wait()
        waiting = True
        while_waiting()
        time.sleep(0.2)
    try:
        yield
    finally:
        if distributed.rank == 0:
            locks[0].release()
