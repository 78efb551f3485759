"""Core API off the cluster: a trial's events go to a file and its checkpoints to a folder."""

from pathlib import Path
from typing import Any

from determined import core
from determined.common.storage import SharedFSStorageManager

from trial.events import append_event


class LocalTrainContext(core.DummyTrainContext):
    """Write what a trial reports to its `events.jsonl`; Core API's own stand-in drops it.

    The file begins with the first event, so a trial that finds a mistake before that has written nothing.
    """

    def __init__(self, events: Path, hparams: dict[str, Any]) -> None:
        super().__init__()
        self.events, self.hparams = events, hparams

    def report_metrics(self, group: Any, steps_completed: int, metrics: dict[str, Any]) -> None:
        self._append(kind=group, steps_completed=steps_completed, metrics=metrics)

    def report_progress(self, progress: float) -> None:
        self._append(kind="progress", progress=progress)

    def set_status(self, status: str) -> None:
        self._append(kind="status", status=status)

    def _append(self, **event: Any) -> None:
        if not self.events.exists():
            append_event(self.events, kind="hparams", hparams=self.hparams)
        append_event(self.events, **event)


class LocalCheckpointContext(core.DummyCheckpointContext):
    """Keep checkpoints in a folder and write an event for each once its upload is complete."""

    def __init__(self, distributed: core.DistributedContext, storage: Path, events: Path) -> None:
        super().__init__(distributed, SharedFSStorageManager(str(storage)))
        self.events = events

    def upload(self, ckpt_dir: Any, metadata: dict[str, Any] | None = None, **kwargs: Any) -> str:
        uuid = super().upload(ckpt_dir, metadata, **kwargs)
        if self._dist.rank == 0:
            append_event(self.events, kind="checkpoint", uuid=uuid, **(metadata or {}))  # type: ignore[typeddict-item]
        return uuid
