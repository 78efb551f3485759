"""Stop a trial once the search of its experiment, adaptive_asha or async_halving, has stopped it."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from determined import core

from errors import TemporaryError, UserError
from trial.events import read_decisions

logger = logging.getLogger(__name__)

RUNNER_SECONDS = 60.0  # for local_experiment.py to answer an evaluation
MASTER_SECONDS = 20.0  # for the master to take in an evaluation, which Core API sends from a thread


class SearchPreemptContext(core.DummyPreemptContext):
    """Preempt a trial as Core API does, and also when the search of its experiment has stopped it.

    After each evaluation the first rank asks `is_stopped(step)`, so a trial stops at the same step however fast it is.
    """

    def __init__(self, core_context: core.Context, is_stopped: Callable[[int], bool]) -> None:
        super().__init__(core_context.distributed)
        self.signals, self.is_stopped, self.stopped = core_context.preempt, is_stopped, False
        self.evaluated: int | None = None  # the step of an evaluation that was reported, and whose outcome is not known
        self.report_metrics = core_context.train.report_metrics
        core_context.train.report_metrics = self._report_metrics  # type: ignore[method-assign]

    def _report_metrics(self, group: str, steps_completed: int, metrics: dict[str, Any]) -> None:
        self.report_metrics(group, steps_completed, metrics)
        if group == "validation":
            self.evaluated = steps_completed

    def should_preempt(self, auto_ack: bool = True) -> bool:
        """Return whether the trial is to stop. Call it on every rank, in step with the others."""
        if self.signals.should_preempt(auto_ack):
            return True
        if self._dist.rank == 0 and self.evaluated is not None:
            self.stopped, self.evaluated = self.stopped or self.is_stopped(self.evaluated), None
        return cast(bool, self._dist.broadcast(self.stopped))


def ask_runner(search: Path, trial_id: int, step: int) -> bool:
    """Return whether local_experiment.py stops a trial, as it says in the experiment's `search.jsonl`.

    Raises `TemporaryError` if it does not answer.
    """
    give_up = time.monotonic() + RUNNER_SECONDS
    while time.monotonic() < give_up:
        for decision in read_decisions(search):
            if (decision["trial_id"], decision["steps_completed"]) == (trial_id, step):
                return decision["stop"]
        time.sleep(0.02)
    raise TemporaryError(f"{search}: no answer of the search to the evaluation of step {step} in {RUNNER_SECONDS:g} s")


def ask_master(trial_id: int, step: int) -> bool:
    """Return whether the cluster's search stops a trial. If the master does not say, training goes on, with a warning.

    Determined's master (0.38.1) calls such a trial STOPPING_COMPLETED and starts the next one in its place, but does
    not signal it: the trial would train to its end, beside more trials than the search wants. It stores an evaluation
    once the search has judged it. This can go once it signals such a stop as it does a pause.
    """
    from determined.common.api import bindings
    from determined.experimental import Determined

    from storage.cluster_checkpoints import one_line_cluster_errors

    give_up = time.monotonic() + MASTER_SECONDS
    try:
        while time.monotonic() < give_up:
            with one_line_cluster_errors(f"trial {trial_id}", "trial"):
                trial = bindings.get_GetTrial(Determined()._session, trialId=trial_id).trial
            if trial.state is bindings.trialv1State.STOPPING_COMPLETED:
                logger.info("the search ends this trial with its evaluation at step %d", step)
                return True
            if trial.latestValidation and trial.latestValidation.totalBatches >= step:
                return False
            time.sleep(0.05)
        why: object = "the master has not taken in the evaluation"
    except UserError as error:
        why = error
    logger.warning("step %d: not known whether the search stops the trial: training goes on (%s)", step, why)
    return False
