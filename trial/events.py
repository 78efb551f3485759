"""What a trial off the cluster reports, in `events.jsonl` of its folder instead of to a master: a JSON object a line.

{"kind": "hparams", "hparams": {...}}
{"kind": "training" | "validation", "steps_completed": 10, "metrics": {...}}
{"kind": "checkpoint", "steps_completed": 10, "uuid": "..."}
{"kind": "progress", "progress": 0.25}
{"kind": "status", "status": "loading the model"}
"""

from pathlib import Path
from typing import Any, Literal, Required, TypedDict, Unpack

from storage.files import append_json_line, read_json_lines


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


def append_event(path: Path, **event: Unpack[TrialEvent]) -> None:
    """Append an event to a trial's `events.jsonl`."""
    append_json_line(path, event)


def read_events(path: Path) -> list[TrialEvent]:
    """Read a trial's events in the order in which they were reported."""
    return read_json_lines(path)


def events_by_step(events: list[TrialEvent], kind: str) -> dict[int, TrialEvent]:
    """Return the events of a kind in order of steps; of a step that was done twice, after a resume, the later one."""
    found = {event["steps_completed"]: event for event in events if event["kind"] == kind}
    return dict(sorted(found.items()))
