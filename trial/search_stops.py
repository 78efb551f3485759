"""Stop a trial on a cluster once the search of its experiment has stopped it."""

import logging
import time
from typing import Any, cast

from determined import core
from determined.common.api import bindings
from determined.experimental import Determined

from errors import UserError
from storage.cluster_checkpoints import one_line_cluster_errors

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 20.0  # for the master to take in an evaluation, which Core API sends from a thread


class SearchPreemptContext(core.DummyPreemptContext):
    """Preempt a trial as Core API does, and also when adaptive_asha or async_halving has stopped it.

    Determined's master (0.38.1) calls such a trial STOPPING_COMPLETED and starts the next one in its place, but does
    not signal it: the trial would train to its end, beside more trials than the search wants. So the first rank asks
    for the trial's state after each evaluation. This can go once the master signals such a stop as it does a pause.
    """

    def __init__(self, core_context: core.Context, trial_id: int) -> None:
        super().__init__(core_context.distributed)
        self.signals, self.trial_id, self.stopped = core_context.preempt, trial_id, False
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
            self.stopped, self.evaluated = self.stopped or self._ask(self.evaluated), None
        return cast(bool, self._dist.broadcast(self.stopped))

    def _ask(self, step: int) -> bool:
        """Return whether the search stops the trial. The master stores an evaluation once the search has judged it."""
        give_up = time.monotonic() + ANSWER_SECONDS
        try:
            while time.monotonic() < give_up:
                with one_line_cluster_errors(f"trial {self.trial_id}", "trial"):
                    trial = bindings.get_GetTrial(Determined()._session, trialId=self.trial_id).trial
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
