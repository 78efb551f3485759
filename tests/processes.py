"""Entrypoints in processes of their own, one for each rank, forked from a server that has done the slow imports."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from determined.core import DistributedContext

REPO = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["config.hyperparameters", "trial.det_callback", "trial.models", "speed.tokenized_dpo_trainer"]
)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def run_ranks(
    script: str, *arguments: object, log: Path, ranks: int = 1, machines: Sequence[Path] = (), **interference: Any
) -> int:
    """Run an entrypoint on `ranks` processes to its end; returns the first rank's exit status, or another's failure.

    As a launcher does, it kills the other ranks when one has failed. `interference`: see `_run`. `machines`: folders
    that stand for the disks of as many machines, which have the ranks in equal parts. "DISK" in an argument is a rank's
    own.
    """
    ports, local = free_ports(3), ranks // max(1, len(machines))
    processes = []
    for rank in range(ranks):
        # The server's own is that of the test which has started it.
        environment = {name: os.environ[name] for name in ("LOCAL_CHECKPOINT_STORAGE",) if name in os.environ}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "WORLD_SIZE": str(ranks)}
            environment |= {"GROUP_RANK": str(rank // local), "GROUP_WORLD_SIZE": str(ranks // local)}
            environment |= {"LOCAL_WORLD_SIZE": str(local), "DET_CHIEF_IP": "127.0.0.1"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[2])}
        disk = machines[rank // local] if machines else None
        words = [str(a).replace("DISK", str(disk)) for a in arguments]
        call = (script, words, environment, ports, str(log), rank, disk)
        processes.append(CONTEXT.Process(target=_run, args=call, kwargs=interference))
        processes[-1].start()
    deadline = time.monotonic() + 300
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            time.sleep(0.2)  # about what a launcher takes to notice
            break
        time.sleep(0.02)
    hung = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
    failures = [process.exitcode for rank, process in enumerate(processes) if rank not in hung and process.exitcode]
    if hung and not failures:
        raise TimeoutError(f"ranks {hung} of {script} hang; see {log}")
    return failures[0] if failures else 0


def _run(
    script: str,
    arguments: list[str],
    environment: dict[str, str],
    ports: list[int],
    log: str,
    rank: int,
    disk: Path | None,
    die: tuple[str, int] | None = None,
    die_once: Path | None = None,
    preempt: int | None = None,
    fsdp: bool = False,
    threads: int | None = None,
) -> None:
    """Be a rank. `die`: the dotted name of a function, and at which of its calls the first rank gets SIGKILL.

    `die_once`: a file that this call waits for before.
    `preempt`: the poll for preemption, counted from the start of training, that is answered with yes, as all after it.
    `fsdp`: let accelerate shard on CPUs (see `fsdp_on_cpu`). `threads`: of torch.
    """
    os.environ.update(environment)
    os.chdir(REPO)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = [f"{script}.py", *arguments]
    DistributedContext.__init__.__kwdefaults__ |= {"pub_port": ports[0], "pull_port": ports[1]}
    if disk is not None:
        _use_disk(disk)
    if die is not None and rank == 0:
        _die_at(*die, die_once)
    if preempt is not None:
        _preempt_at(preempt)
    if fsdp:
        fsdp_on_cpu()
    if "RANK" in environment or threads:
        # Ranks that share the cores by threads wait for each other most of the time.
        torch.set_num_threads(threads or 1)
    importlib.import_module(script).main()


def _use_disk(disk: Path) -> None:
    import datasets

    import storage.checkpoints

    storage.checkpoints.HF_HOME, datasets.config.HF_DATASETS_CACHE = str(disk / "huggingface"), disk / "datasets"
    tempfile.tempdir = str(disk)


def _preempt_at(poll: int) -> None:
    """Have the first rank decide, and tell the others, as Core API's own preemption does."""
    from determined.core import DummyPreemptContext

    from trial.context import Trial

    left, training = poll, False

    def should_preempt(self: DummyPreemptContext, auto_ack: bool = True) -> bool:
        nonlocal left
        left -= training
        return self._dist.broadcast(left <= 0 if self._dist.rank == 0 else None)

    original = Trial.status

    def status(self: Trial, text: str) -> None:
        nonlocal training
        training = text == "training"
        original(self, text)

    DummyPreemptContext.should_preempt, Trial.status = should_preempt, status


def _die_at(name: str, calls: int, once: Path | None) -> None:
    module, _, attribute = name.rpartition(".")
    original, left = getattr(importlib.import_module(module), attribute), calls

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            deadline = time.monotonic() + 120
            while once and not once.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(importlib.import_module(module), attribute, counted)


def fsdp_on_cpu() -> None:
    """Have accelerate (1.15) shard where there are only CPUs, which torch can and accelerate ignores without a word."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
