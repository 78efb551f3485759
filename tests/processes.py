"""Entrypoints in processes of their own, one for each rank, forked from a server that has done the slow imports."""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sft_finetune", "dpo_finetune"])


def run_ranks(
    script: str, *arguments: object, log: Path, ranks: int = 1, die: tuple[str, int] | None = None, fsdp: bool = False
) -> int:
    """Run an entrypoint on `ranks` processes to its end, and return the first rank's exit status.

    `die`: the dotted name of a function, and at which of its calls the first rank gets SIGKILL. As a launcher does, the
    other ranks are killed when one has died. `fsdp`: let accelerate shard on CPUs (see `fsdp_on_cpu`).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
            environment |= {"LOCAL_WORLD_SIZE": str(ranks), "GROUP_WORLD_SIZE": "1"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        call = (script, [str(a) for a in arguments], environment, str(log), die if rank == 0 else None, fsdp)
        processes.append(CONTEXT.Process(target=_run, args=call))
        processes[-1].start()
    processes[0].join(timeout=200)
    if processes[0].exitcode != 0:
        for process in processes:
            process.kill()
    for process in processes:
        process.join(timeout=30)
    return processes[0].exitcode


def _run(
    script: str, arguments: list[str], environment: dict[str, str], log: str, die: tuple[str, int] | None, fsdp: bool
) -> None:
    os.environ.update(environment)
    os.chdir(REPO)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = [f"{script}.py", *arguments]
    if die is not None:
        _die_at(*die)
    if fsdp:
        fsdp_on_cpu()
    if "RANK" in environment:
        torch.set_num_threads(1)  # ranks that share the cores by threads wait for each other most of the time
    importlib.import_module(script).main()


def _die_at(name: str, calls: int) -> None:
    module, _, attribute = name.rpartition(".")
    original, left = getattr(importlib.import_module(module), attribute), calls

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
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
