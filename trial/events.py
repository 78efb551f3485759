"""Core API off the cluster: checkpoints go to a folder, and events to the trial's `events.jsonl`, an object a line.

{"kind": "hparams", "hparams": {...}}
{"kind": "training" | "validation", "steps_completed": 10, "metrics": {...}}
{"kind": "checkpoint", "steps_completed": 10, "uuid": "..."}
{"kind": "progress", "progress": 0.25}
{"kind": "status", "status": "loading the model"}
"""

from pathlib import Path
from typing import Any, Literal, Required, TypedDict, Unpack

from determined import core
from determined.common.storage import SharedFSStorageManager

from config.validation import is_uuid
from errors import os_errors_of
from storage.files import append_json_line, flush_to_disk, is_object, read_json_lines


class TrialEvent(TypedDict, total=False):
    """One line of `events.jsonl`. Which keys are there depends on its kind: see the table above."""

    kind: Required[Literal["hparams", "training", "validation", "checkpoint", "progress", "status"]]
    hparams: dict[str, Any]
    steps_completed: int
    metrics: dict[str, float]
    uuid: str
    trial_id: int
    progress: float
    status: str


class Decision(TypedDict):
    """One line of an experiment's `search.jsonl`: what its search made of an evaluation, or of a trial's failure."""

    trial_id: int
    steps_completed: int
    time: float | None  # of searcher.time_metric; None: the trial failed
    metric: float  # searcher.metric
    stop: bool


DECISION = {"trial_id": int, "steps_completed": int, "time": float | int | None, "metric": float | int, "stop": bool}
STEP = {"steps_completed": int}
FIELDS: dict[str, dict[str, Any]] = {
    "hparams": {"hparams": dict},
    "training": STEP | {"metrics": dict},
    "validation": STEP | {"metrics": dict},
    "checkpoint": STEP | {"uuid": str},
    "progress": {"progress": float | int},
    "status": {"status": str},
}
TRAINED = ("training", "validation", "checkpoint")  # events after which there is something to lose


def append_event(path: Path, **event: Unpack[TrialEvent]) -> None:
    """Append an event to a trial's `events.jsonl`."""
    append_json_line(path, event)


def is_event(row: Any) -> bool:
    """Return whether a line of an `events.jsonl` says what an event of its kind does."""
    fields = FIELDS.get(row["kind"], {}) if is_object(row, {"kind": str}) else {}
    if not fields or not is_object(row, fields):
        return False
    return ("uuid" not in fields or is_uuid(row["uuid"])) and ("metrics" not in fields or is_metrics(row["metrics"]))


def is_metrics(value: Any) -> bool:
    """Return whether `value` has a number for each of its names."""
    return isinstance(value, dict) and all(isinstance(number, float | int) for number in value.values())


def read_events(path: Path) -> list[TrialEvent]:
    """Read a trial's events in the order in which they were reported, without lines that are damaged."""
    return [row for row in read_json_lines(path) if is_event(row)]


def events_by_step(events: list[TrialEvent], kind: str) -> dict[int, TrialEvent]:
    """Return the events of a kind by step, in order. A step that was done twice, after a resume, has the later one."""
    return dict(sorted({event["steps_completed"]: event for event in events if event["kind"] == kind}.items()))


class LocalTrainContext(core.DummyTrainContext):
    """Write what a trial reports to its `events.jsonl`.

    The file begins with the first event, so a trial that finds a mistake before that has written nothing.
    """

    def __init__(self, events: Path, hparams: dict[str, Any]) -> None:
        super().__init__()
        self.events, self.hparams = events, hparams
        self.begun = any(event["kind"] == "hparams" for event in read_events(events))

    def report_metrics(self, group: Any, steps_completed: int, metrics: dict[str, Any]) -> None:
        """Write an event of the kind `group`: training or validation."""
        self._append(kind=group, steps_completed=steps_completed, metrics=metrics)

    def report_progress(self, progress: float) -> None:
        """Write how far the trial is, from 0 to 1."""
        self._append(kind="progress", progress=progress)

    def set_status(self, status: str) -> None:
        """Write what the trial is busy with."""
        self._append(kind="status", status=status)

    def _append(self, **event: Any) -> None:
        with os_errors_of(self.events):
            if not self.begun:
                append_event(self.events, kind="hparams", hparams=self.hparams)
                self.begun = True
            append_event(self.events, **event)


def read_decisions(path: Path) -> list[Decision]:
    """Read an experiment's `search.jsonl`, without lines that are damaged."""
    return [row for row in read_json_lines(path) if is_object(row, DECISION)]


class LocalCheckpointContext(core.DummyCheckpointContext):
    """Keep checkpoints in a folder and write an event for each once its upload is complete."""

    def __init__(self, distributed: core.DistributedContext, storage: Path, events: Path) -> None:
        super().__init__(distributed, SharedFSStorageManager(str(storage)))
        self.storage, self.events = storage, events

    def upload(self, ckpt_dir: Any, metadata: Any = None, **kwargs: Any) -> str:
        """Upload a checkpoint and return its UUID. After a power cut either all of it is there or no event names it."""
        uuid = super().upload(ckpt_dir, metadata, **kwargs)
        if self._dist.rank == 0:
            flush_to_disk(self.storage / uuid)
            flush_to_disk(self.storage, within=False)
            append_event(self.events, kind="checkpoint", uuid=uuid, **(metadata or {}))
            flush_to_disk(self.events)
            flush_to_disk(self.events.parent, within=False)
        return uuid
