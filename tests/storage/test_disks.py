"""What the ranks of trials over several machines do together. A folder is a machine's disk; a rank is a process."""

import multiprocessing
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from determined.core import DistributedContext
from processes import free_ports

from dataset_utils import tokenize_once
from errors import UserError
from storage.locks import locked
from storage.manifests import remove_unless_sealed, seal
from storage.shared_cache import give_to_every_node, once_per_node, one_trial_at_a_time

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def ranks(tmp_path):
    """Call `work(distributed, disk)` on every rank of some trials at once; returns what each rank returns, by trial.

    A trial is the names of its machines, one for each of its ranks. Machines of the same name are two containers that
    share a disk.
    """

    def run(work, *trials):
        started = []
        for trial, ports in [(trial, free_ports(2)) for trial in trials]:
            for rank, machine in enumerate(trial):
                receiver, sender = FORK.Pipe(duplex=False)
                call = (work, rank, len(trial), tmp_path / machine, ports, sender)
                started.append((FORK.Process(target=_be_a_rank, args=call), receiver))
                started[-1][0].start()
        deadline = time.monotonic() + 60
        while any(process.is_alive() for process, _ in started) and time.monotonic() < deadline:
            time.sleep(0.01)
        for process, _ in started:
            process.kill()
            process.join()
        found = iter([receiver.recv() if receiver.poll() else "hangs" for _, receiver in started])
        return [[next(found) for _ in trial] for trial in trials]

    return run


def _be_a_rank(work, rank, size, disk, ports, sender):
    disk.mkdir(exist_ok=True)
    places = {"rank": rank, "size": size, "local_rank": 0, "local_size": 1, "cross_rank": rank, "cross_size": size}
    distributed = DistributedContext(**places, chief_ip="127.0.0.1", pub_port=ports[0], pull_port=ports[1])
    try:
        sender.send(work(distributed, disk))
    except Exception as error:
        sender.send(repr(error))
    distributed.allgather(None)  # what the first rank has sent is read before its sockets are closed
    distributed.close()


def nothing():
    pass


def test_trials_on_overlapping_machines_enter_one_after_another(ranks, tmp_path):
    def work(distributed, disk):
        for _ in range(3):
            with one_trial_at_a_time(disk / "lock", distributed, nothing, nothing):
                if distributed.rank == 0:
                    (tmp_path / "inside").touch(exist_ok=False)
                    time.sleep(0.05)
                    (tmp_path / "inside").unlink()
                distributed.allgather(None)

    # Each has machine b.
    assert ranks(work, "ab", "ba", "b", "cb") == [[None] * 2, [None] * 2, [None], [None] * 2]


def test_containers_of_a_trial_that_share_a_disk_enter_together(ranks, tmp_path):
    def work(distributed, disk):
        with one_trial_at_a_time(disk / "lock", distributed, nothing, nothing):
            return distributed.rank

    assert ranks(work, "aba") == [[0, 1, 2]]
    assert not list(tmp_path.glob("*/rank-*"))


def test_a_trial_that_waits_holds_no_machine_and_can_be_stopped(ranks, tmp_path):
    """Another trial has its second machine."""

    def work(distributed, disk):
        told = []

        def stop():
            if disk.name == "a":
                with locked(disk / "lock", on_wait=lambda: told.append("held")):
                    pass
            raise InterruptedError

        with (
            suppress(InterruptedError),
            one_trial_at_a_time(disk / "lock", distributed, lambda: told.append("w"), stop),
        ):
            told.append("entered")
        return told

    (tmp_path / "b").mkdir()
    with locked(tmp_path / "b" / "lock", nothing):
        assert ranks(work, "ab") == [[["w"], ["w"]]]
    assert ranks(work, "ab") == [[["entered"], ["entered"]]]


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
        once_per_node(distributed, nothing if disk.name == "a" else fail)

    def fail():
        raise UserError("no room")

    assert ranks(work, "ab") == [["UserError('no room')"] * 2]


def test_machines_that_have_loaded_different_rows_do_not_train(ranks):
    """As when a file with the data was changed on one of them alone."""
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)

    def work(distributed, disk):
        hparams = SimpleNamespace(tokenize_options={}, args=SimpleNamespace(dataset_num_proc=None))
        trial = SimpleNamespace(
            core_context=SimpleNamespace(distributed=distributed), hparams=hparams, cache=disk, status=lambda text: None
        )
        rows = DatasetDict(train=Dataset.from_dict({"truncations": [[]], "row": [ord(disk.name)]}))
        return tokenize_once(trial, lambda rows, *_, **__: rows, rows, tokenizer)["train"]._fingerprint

    ((one, other),) = ranks(work, "aa")
    assert one == other != "hangs"
    (outcomes,) = ranks(work, "ab")
    assert all(
        "UserError('the trial runs on 2 nodes: its nodes have loaded different rows" in told for told in outcomes
    )
