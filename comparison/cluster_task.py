"""A comparison as an experiment of one trial on a cluster, as `inference.yaml` describes it.

There the YAML's hyperparameters are the options, and the folder of output files is uploaded as a checkpoint: unfinished
after each model, and in the end with the page, which is then the only one. Off a cluster none of this has an effect.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import determined as det
from determined import core
from determined.errors import CheckpointNotFound

from errors import TemporaryError, UserError, reason
from storage.cluster_checkpoints import trial_checkpoints
from storage.files import remove
from storage.manifests import check_files, hash_files, write_manifest
from trial.context import TrialStopped, open_core_context


class Task:
    """Where this process writes, and who may stop it: a cluster's trial, or with no `core_context` just a script."""

    def __init__(
        self, core_context: core.Context | None = None, folder: Path = Path(), ckpt_uuid: str | None = None
    ) -> None:
        self.core_context, self.folder = core_context, folder
        self.restored = core_context is not None and any(folder.iterdir())  # an earlier start has left something
        self.ckpt_uuid = ckpt_uuid  # the latest checkpoint
        self.done = self.saved = 0  # results, as the steps of a checkpoint

    def path(self, name: str) -> Path:
        """Return where to write an output file: on a cluster, in the folder that becomes the checkpoint."""
        return self.folder / Path(name).name if self.core_context else Path(name)

    def report_progress(self, done: int, expected: int) -> None:
        """Show in the Web UI how many results there are. Raises `TrialStopped` if the cluster preempts the trial."""
        self.done = done
        if self.core_context:
            self.core_context.train.report_progress(min(1.0, done / expected))
            if self.core_context.preempt.should_preempt():
                raise TrialStopped

    def save(self) -> None:
        """Upload what is written so far, unless it is uploaded already."""
        if self.core_context and self.done > self.saved and any(self.folder.iterdir()):
            remove(self.folder / "metadata.json")  # Core API leaves it there, to be overwritten by the next upload
            write_manifest(self.folder, hash_files(self.folder))
            self.ckpt_uuid = self.core_context.checkpoint.upload(str(self.folder), {"steps_completed": self.done})
            self.saved = self.done

    def finish(self, done: int, metrics: dict[str, Any]) -> None:
        """Report the metrics and upload the output files, after all results are done."""
        self.done = done + 1
        if self.core_context:
            self.core_context.train.report_validation_metrics(self.done, metrics)
        self.save()
        self.leave_only_the_page()

    def leave_only_the_page(self) -> None:
        """Delete the trial's checkpoints but the latest, once that has the page, and print how to download it."""
        info = det.get_cluster_info()
        if not (self.core_context and self.ckpt_uuid and info):
            return
        try:
            for superseded in set(trial_checkpoints(info.trial.trial_id)) - {self.ckpt_uuid}:
                self.core_context.checkpoint.delete(superseded)
        except Exception as error:  # each kind of storage raises its own; the page is there
            print(f"checkpoints of the unfinished comparison are still in the storage: {reason(error)}", flush=True)
        # A folder of its own: where one holds a checkpoint already, `det` downloads nothing, and does not say so.
        folder = f"exp-{info.trial.experiment_id}-comparison"
        print(f"Done. Download the results:\ndet checkpoint download {self.ckpt_uuid} -o {folder}", flush=True)


@contextmanager
def open_task() -> Iterator[Task]:
    """Open the task of this process. A trial starts with the files of its last checkpoint, and saves when preempted."""
    info = det.get_cluster_info()
    if info is None or info.task_type != "TRIAL":
        yield Task()
        return
    if len(info.slot_ids) * len(info.container_addrs) > 1:
        raise UserError("resources.slots_per_trial: a comparison uses one slot")
    with open_core_context(info) as core_context, tempfile.TemporaryDirectory() as folder:
        if info.latest_checkpoint:
            _fetch(info.latest_checkpoint, core_context, Path(folder))
        task = Task(core_context, Path(folder), info.latest_checkpoint)
        try:
            yield task
        except TrialStopped:
            task.save()


def _fetch(ckpt_uuid: str, core_context: core.Context, folder: Path) -> None:
    """Download what an earlier start has saved into `folder`; leave it empty, and say so, if that is damaged."""
    try:
        core_context.checkpoint.download(ckpt_uuid, folder)
        check_files(folder)
    except (CheckpointNotFound, UserError) as error:
        print(f"checkpoint {ckpt_uuid}: {reason(error)}: starting over", flush=True)
        for leftover in folder.iterdir():
            remove(leftover)
    except Exception as error:  # each kind of storage raises its own
        raise TemporaryError(f"checkpoint {ckpt_uuid}: {reason(error)}") from error
