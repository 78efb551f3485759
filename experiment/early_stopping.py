"""The early stopping of an experiment on this machine: what its trials report, in order, and what its search decides.

All of it is in the experiment's `search.jsonl` (see `Decision`). A trial waits for its answer there, and a run that was
interrupted decides on with what was decided before.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config.search import Halving, count_trials
from errors import os_errors_of
from storage.files import append_json_line, flush_to_disk
from trial.events import Decision, TrialEvent, read_decisions


class EarlyStopping:
    """Tells the search what happens, and trials what it decides. `file` is the experiment's `search.jsonl`."""

    def __init__(self, searcher: dict[str, Any], file: Path) -> None:
        self.searcher, self.file, self.search = searcher, file, Halving(searcher)
        self.answered = set[tuple[int, int]]()  # by trial id and step
        self.stops: dict[int, int] = {}  # the step at which each stopped trial stops
        for decision in read_decisions(file):
            if decision["trial_id"] in range(1, count_trials(searcher) + 1):
                self._take(decision)

    def _take(self, decision: Decision) -> None:
        trial_id, step, time = decision["trial_id"], decision["steps_completed"], decision["time"]
        if time is None:
            self.search.end(trial_id, failed=True)
            return
        decision["stop"] = self.search.report(trial_id, time, decision["metric"])
        self.answered.add((trial_id, step))
        if decision["stop"]:
            self.stops.setdefault(trial_id, step)

    def _write(self, decision: Decision) -> None:
        with os_errors_of(self.file):
            append_json_line(self.file, decision)
            flush_to_disk(self.file)
            flush_to_disk(self.file.parent, within=False)

    def exists(self, trial_id: int) -> bool:
        """Return whether the search has created the trial by now."""
        return trial_id <= len(self.search.bracket_of)

    def tell(self, trial_id: int, events: Iterable[TrialEvent]) -> None:
        """Take in a trial's evaluations, those that were taken in before once more, and answer them."""
        metric, unit = self.searcher["metric"], self.searcher["time_metric"]
        for event in events:
            step = event.get("steps_completed", 0)
            if event["kind"] != "validation" or (trial_id, step) in self.answered:
                continue
            found = event["metrics"]
            time, value = found.get(unit, 0), found.get(metric, math.nan)
            decision = Decision(trial_id=trial_id, steps_completed=step, time=time, metric=value, stop=False)
            self._take(decision)
            self._write(decision)

    def end(self, trial_id: int, failed: bool) -> None:
        """Take in that a trial has ended."""
        if failed:
            self._write(Decision(trial_id=trial_id, steps_completed=0, time=None, metric=math.nan, stop=False))
        self.search.end(trial_id, failed)

    def is_stopped(self, trial_id: int, events: Iterable[TrialEvent]) -> bool:
        """Return whether a trial was stopped and has saved the step at which it was."""
        saved = [event["steps_completed"] for event in events if event["kind"] == "checkpoint"]
        return trial_id in self.stops and max(saved, default=-1) >= self.stops[trial_id]
