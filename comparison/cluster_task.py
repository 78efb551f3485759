"""A script's command line as an experiment of one trial on a cluster, as `inference.yaml` is one.

There the YAML's hyperparameters are the script's options, and the folder that it writes to comes back as a checkpoint.
Off a cluster none of this has an effect.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import determined as det
from determined import core

from errors import UserError
from trial.context import TrialStopped


class Task:
    """What a script is to do, where it writes, and who may tell it to stop."""

    restored = False  # whether an earlier start of the same task has left something

    def __init__(self) -> None:
        self.arguments = sys.argv[1:]

    def path(self, name: str) -> Path:
        """Where a file that the user named is written."""
        return Path(name)

    def save(self, done: int) -> None:
        """Have what is written so far outlive this machine; `done` grows from one call to the next."""

    def stop_if_preempted(self) -> None:
        """Raise `TrialStopped`, after saving, where the cluster wants its slot back."""

    def report(self, done: int, metrics: dict[str, Any]) -> None:
        """Show metrics in the Web UI."""

    def progress(self, share: float) -> None:
        """Show there how far it is."""


class ClusterTask(Task):
    def __init__(self, hparams: dict[str, Any], core_context: core.Context, folder: Path) -> None:
        self.arguments = as_arguments(hparams)
        self.core_context, self.folder, self.saved = core_context, folder, 0
        self.restored = any(folder.iterdir())

    def path(self, name: str) -> Path:
        return self.folder / Path(name).name

    def save(self, done: int) -> None:
        if done > self.saved and any(self.folder.iterdir()):
            self.core_context.checkpoint.upload(str(self.folder), {"steps_completed": done})
            self.saved = done

    def report(self, done: int, metrics: dict[str, Any]) -> None:
        self.core_context.train.report_validation_metrics(done, metrics)

    def progress(self, share: float) -> None:
        self.core_context.train.report_progress(share)

    def stop_if_preempted(self) -> None:
        if self.core_context.preempt.should_preempt():
            raise TrialStopped


@contextmanager
def open_task() -> Iterator[Task]:
    """The command line of this process or, in a trial, of its hyperparameters. A trial goes on from its checkpoint."""
    info = det.get_cluster_info()
    if info is None or info.task_type != "TRIAL":
        yield Task()
        return
    if len(info.slot_ids) * len(info.container_addrs) > 1:
        raise UserError("resources.slots_per_trial: this script uses one slot")
    with (
        core.init(tensorboard_mode=core.TensorboardMode.MANUAL) as core_context,
        tempfile.TemporaryDirectory() as folder,
    ):
        if info.latest_checkpoint:
            core_context.checkpoint.download(info.latest_checkpoint, folder)
        yield ClusterTask(info.trial.hparams, core_context, Path(folder))


def as_arguments(hparams: dict[str, Any]) -> list[str]:
    """`{number_of_samples: 5, model: {sft: "exp:12"}, dataset: [a, {name: b}]}` as a command line:
    `--number-of-samples=5 --model=sft=exp:12 --dataset=a --dataset='{"name": "b"}'`. What is null is left out."""
    words = []
    for key, value in hparams.items():
        option = "--" + key.replace("_", "-")
        if isinstance(value, dict):
            value = [f"{name}={source}" for name, source in value.items()]
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            words.append(f"{option}={json.dumps(item) if isinstance(item, dict) else item}")
    return words
