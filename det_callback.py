"""Determined's callback for the Trainer, mended where release 0.38.1 and transformers 5 disagree."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import determined.transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trial import Trial

logger = logging.getLogger(__name__)


class DetCallback(determined.transformers.DetCallback):
    """Reports metrics and progress, uploads checkpoints, restores the latest one and heeds preemption.

    It serves off the cluster as well, against the contexts of `trial.py`. After construction
    `args.resume_from_checkpoint` is the folder to resume from, or None: pass it to `trainer.train()`, which does not
    look there itself.
    """

    def __init__(self, trial: Trial, args: TrainingArguments) -> None:
        self.latest_checkpoint = trial.latest_checkpoint
        if trial.on_cluster:
            super().__init__(trial.core_context, args)
            return
        # Upstream's constructor raises RuntimeError off the cluster, though its methods work there: set what it sets.
        TrainerCallback.__init__(self)
        self.core_context = trial.core_context
        self.info = SimpleNamespace(task_type="TRIAL", trial=SimpleNamespace(trial_id=trial.trial_id))
        self.searcher_metric, self.time_metric = trial.searcher_metric, None
        self.filter_metrics = self.user_data = None
        self.last_train_metrics = self.last_eval_metrics = self.last_save = -1
        self.last_progress = 0
        self._force_final_save = self._force_final_evaluate = True
        self.load_last_checkpoint(args)

    def load_last_checkpoint(self, args: TrainingArguments) -> None:
        """Download the latest checkpoint into a folder of its own and point `args.resume_from_checkpoint` at it.

        Upstream reads `args.overwrite_output_dir`, which transformers 5 has removed (AttributeError), and resumes
        from the highest `checkpoint-N` in `output_dir`, which may be an older run's. This can go once it does neither.
        """
        args.resume_from_checkpoint = None
        if self.latest_checkpoint is None:
            return
        folder = Path(args.output_dir) / "resumed_from"
        if self.core_context.distributed.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # whatever an interrupted download left there
        self.core_context.distributed.broadcast_local(None)
        self.core_context.checkpoint.download(self.latest_checkpoint, folder)
        args.resume_from_checkpoint = str(next(folder.glob("checkpoint-*")))
        logger.info("resuming from checkpoint %s, %s", self.latest_checkpoint, Path(args.resume_from_checkpoint).name)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Lend upstream a copy: it removes keys from `logs`, which later callbacks and TrainOutput then miss."""
        super().on_log(args, state, control, logs=dict(logs or {}), **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report each whole percent of progress; upstream does so only where `max_steps` is set, else each epoch."""
        percent = 100 * state.global_step // state.max_steps
        if state.is_world_process_zero and percent > self.last_progress:
            self.last_progress = percent
            self.core_context.train.report_progress(percent / 100)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show upstream the number of steps instead of `args`, by which it tells the end of training just as well.

        Its progress is `epoch / num_train_epochs`, which fractional epochs take above 1, and Core API refuses.
        """
        super().on_epoch_end(SimpleNamespace(max_steps=state.max_steps), state, control, **kwargs)
