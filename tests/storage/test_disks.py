"""What the ranks of trials over several machines do together. Each rank is a thread; each machine's disk a folder."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from determined.core import DistributedContext
from processes import free_ports

from errors import UserError
from storage.locks import locked
from storage.manifests import remove_unless_sealed, seal
from storage.shared_cache import give_to_every_node, once_per_node, one_trial_at_a_time


@pytest.fixture
def ranks(tmp_path):
    """Call `work(distributed, disk)` on every rank of some trials at once; returns what the ranks of each return.

    A trial is the names of its machines, one for each of its ranks. Machines of the same name are two containers that
    share a disk.
    """

    def run(work, *trials):
        pool = ThreadPoolExecutor(sum(map(len, trials)))
        started = [
            [
                pool.submit(_be_a_rank, work, rank, len(machines), tmp_path / machine, ports)
                for rank, machine in enumerate(machines)
            ]
            for machines, ports in [(trial, free_ports(2)) for trial in trials]
        ]
        pool.shutdown(wait=False)
        return [[rank.result(timeout=30) for rank in trial] for trial in started]

    return run


def _be_a_rank(work, rank, size, disk, ports):
    disk.mkdir(exist_ok=True)
    places = {"rank": rank, "size": size, "local_rank": 0, "local_size": 1, "cross_rank": rank, "cross_size": size}
    distributed = DistributedContext(**places, chief_ip="127.0.0.1", pub_port=ports[0], pull_port=ports[1])
    try:
        return work(distributed, disk)
    except Exception as error:
        return error
    finally:
        distributed.allgather(None)  # what the first rank has sent is read before its sockets are closed
        distributed.close()


def test_trials_on_overlapping_machines_enter_one_after_another(ranks):
    inside, most, lock = [], [], threading.Lock()

    def work(distributed, disk):
        for _ in range(3):
            with one_trial_at_a_time(disk / "lock", distributed, lambda: None, lambda: None):
                distributed.allgather(None)
                if distributed.rank == 0:
                    with lock:
                        inside.append(disk)
                        most.append(len(inside))
                    time.sleep(0.05)
                    inside.remove(disk)
                distributed.allgather(None)
        return "done"

    # Each has machine b.
    assert ranks(work, "ab", "ba", "b", "cb") == [["done"] * 2, ["done"] * 2, ["done"], ["done"] * 2]
    assert most == [1] * 12


def test_containers_of_a_trial_that_share_a_disk_enter_together(ranks, tmp_path):
    def work(distributed, disk):
        with one_trial_at_a_time(disk / "lock", distributed, lambda: None, lambda: None):
            return distributed.rank

    assert ranks(work, "aba") == [[0, 1, 2]]
    assert not list(tmp_path.glob("*/rank-*"))


def test_a_trial_that_waits_holds_no_machine_and_can_be_stopped(ranks, tmp_path):
    """Another trial has its second machine."""
    waited = []

    def work(distributed, disk):
        def stop():
            if disk.name == "a":
                with locked(disk / "lock", on_wait=lambda: waited.append("a is held")):
                    pass
            raise InterruptedError

        with one_trial_at_a_time(disk / "lock", distributed, lambda: waited.append(disk.name), stop):
            return "entered"

    (tmp_path / "b").mkdir()
    with ExitStack() as held:
        held.enter_context(locked(tmp_path / "b" / "lock", lambda: None))
        (outcome,) = ranks(work, "ab")
    assert [type(error) for error in outcome] == [InterruptedError] * 2
    assert sorted(waited) == ["a", "b"]
    assert ranks(work, "ab") == [["entered"] * 2]


def test_a_file_is_given_to_the_machines_that_lack_it(ranks, tmp_path):
    def work(distributed, disk):
        once_per_node(distributed, lambda: remove_unless_sealed(disk / "file"))
        give_to_every_node(disk / "file", distributed)
        return (disk / "file").read_bytes() if (disk / "file").exists() else None

    assert ranks(work, "abc") == [[None] * 3]
    (tmp_path / "b" / "file").write_bytes(b"\0whole")
    seal(tmp_path / "b" / "file")
    (tmp_path / "c" / "file").write_bytes(b"\0torn")
    assert ranks(work, "aabc") == [[b"\0whole"] * 4]
    (tmp_path / "b" / "file").unlink()
    assert ranks(work, "ba") == [[b"\0whole"] * 2]


def test_a_mistake_on_one_machine_ends_the_trial_on_all(ranks):
    def work(distributed, disk):
        once_per_node(distributed, lambda: (disk / "file").touch() if disk.name == "a" else fail())

    def fail():
        raise UserError("no room")

    (outcome,) = ranks(work, "ab")
    assert [str(error) for error in outcome] == ["no room"] * 2
