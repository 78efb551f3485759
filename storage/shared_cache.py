"""Make once what trials share: tokenized data, reference log-probs, the checkpoint they start from.

Trials may run beside each other on one disk. So a result appears whole or not at all, one process makes it while the
others wait, and it is found again by a fingerprint of all that it depends on. If the process that makes it dies, its
lock goes with it and the next process makes it.
"""

import functools
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from determined import core
from filelock import FileLock

from errors import UserError, os_errors_of
from storage.files import flush_to_disk, remove, write_atomically
from storage.locks import locked, open_lock, try_to_lock
from storage.manifests import MANIFEST, check_files, hash_files, seal, write_manifest

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
    """Run `work` on the first rank of each node while all others wait. All ranks of all nodes raise its `UserError`.

    They wait here for the slowest node: torch's own collectives give up after some minutes.
    """
    mistake = None
    if distributed.local_rank == 0:
        try:
            work()
        except UserError as error:
            mistake = error
    if mistake := next(filter(None, distributed.allgather(mistake)), None):
        raise mistake


@contextmanager
def one_trial_at_a_time(
    lock_file: Path, distributed: core.DistributedContext, on_wait: Action, while_waiting: Action
) -> Iterator[None]:
    """Let one trial in while the others that use `lock_file` wait. All its ranks enter together.

    The lock is held on the disk of each of the trial's nodes. A trial that has to wait for one of them holds none, as
    the other may be waiting for it. It calls `on_wait` once, and `while_waiting` again and again: it may raise to end
    the wait.
    """
    locks: list[FileLock] = []
    once_per_node(distributed, lambda: locks.append(open_lock(lock_file)))
    if not _first_on_its_disk(lock_file.parent, distributed):
        locks.clear()
    waiting = False
    try:
        while not all(distributed.allgather(all(map(try_to_lock, locks)))):
            for lock in locks:
                lock.release()
            if not waiting:
                on_wait()
            waiting = True
            while_waiting()
            # Two trials that have tried at the same time must not do so for ever. (The run's own random numbers are
            # left alone.)
            time.sleep(random.SystemRandom().uniform(0.1, 0.3))
        yield
    finally:
        for lock in locks:
            lock.release()


def give_to_every_node(file: Path, distributed: core.DistributedContext) -> None:
    """Copy a small sealed file to the nodes that lack it from one that has it, if there is one. Call it on every rank.

    Raises `UserError` on all ranks if it cannot be written somewhere.
    """
    held = distributed.allgather(file.is_file())
    if all(held) or not any(held):
        return
    source = held.index(True)
    contents = distributed.gather(file.read_bytes() if distributed.rank == source else None)
    content: bytes = distributed.broadcast(contents[source] if contents else None)

    def write(node: int) -> None:
        if distributed.cross_rank == node and not file.is_file():
            with os_errors_of(file):
                write_atomically(file, content)
                seal(file)

    for node in range(distributed.cross_size):  # one after another: they may share a disk
        once_per_node(distributed, functools.partial(write, node))


def _first_on_its_disk(folder: Path, distributed: core.DistributedContext) -> bool:
    """Return whether this rank is the first of those that see its `folder`: some nodes of a cluster share a disk."""
    if distributed.cross_size == 1:
        return distributed.local_rank == 0
    mark = folder / f"rank-{uuid4().hex}"
    once_per_node(distributed, mark.touch)
    first = next(name for name in distributed.allgather(mark.name) if (folder / name).exists())
    distributed.allgather(None)  # every rank has looked
    mark.unlink(missing_ok=True)
    return mark.name == first
