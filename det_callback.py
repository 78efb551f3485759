"""Determined's callback for the Trainer, mended where release 0.38.1 and transformers 5 disagree.

A trial resumes exactly: stopped at any step, in the middle of an evaluation too, or killed at any moment, it ends with
the weights and the logged metrics of one that was never touched (bit for bit where the hardware computes so).
"""

import json
import logging
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import determined.transformers
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trial import Trial, TrialStopped

logger = logging.getLogger(__name__)


def run(trainer: Trainer, trial: Trial) -> None:
    """Train to the end, or until the cluster wants its slots back: then save, and leave the rest to the next start."""
    callback = DetCallback(trial, trainer)
    trainer.add_callback(callback)
    trial.status("training")
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except TrialStopped:
        callback.save_after_broken_evaluation()


class DetCallback(determined.transformers.DetCallback):
    """Reports metrics and progress, uploads checkpoints, restores the latest one and heeds preemption.

    It serves off the cluster as well, against the contexts of `trial.py`. After construction
    `args.resume_from_checkpoint` is the folder to resume from, or None: pass it to `trainer.train()`, which does not
    look there itself.
    """

    def __init__(self, trial: Trial, trainer: Trainer) -> None:
        self.trial, self.trainer = trial, trainer
        self.preempted = False
        self.evaluation_due = False  # at the step of the checkpoint, and left to whoever resumes from it
        self.rng_state: torch.Tensor | None = None  # from before the evaluation at this step
        self.required_metrics: list[str] = []  # upstream appends to it for adaptive_asha, and has forgotten to make it
        if trial.on_cluster:
            super().__init__(trial.core_context, trainer.args)
        else:
            # Upstream's constructor raises RuntimeError off the cluster, though its methods work: set what it sets.
            TrainerCallback.__init__(self)
            self.info = SimpleNamespace(task_type="TRIAL", trial=SimpleNamespace(trial_id=trial.trial_id))
            self.searcher_metric, self.time_metric = trial.searcher_metric, None
            self.filter_metrics = self.user_data = None
            self.last_train_metrics = self.last_eval_metrics = self.last_save = -1
            self.last_progress = 0
            self._force_final_save = self._force_final_evaluate = True
            self.load_last_checkpoint(trainer.args)
        # Upstream looks for the signal only where something is logged, which may be late, and then stops, which may be
        # without a checkpoint. It is shown what on_step_end saw, so that it keeps to that. This can go once it polls
        # at every step and saves.
        self.core_context = SimpleNamespace(
            train=trial.core_context.train, preempt=SimpleNamespace(should_preempt=lambda: self.preempted)
        )

    def load_last_checkpoint(self, args: TrainingArguments) -> None:
        """Download the latest checkpoint into a folder of its own and point `args.resume_from_checkpoint` at it.

        Upstream reads `args.overwrite_output_dir`, which transformers 5 has removed (AttributeError), and resumes
        from the highest `checkpoint-N` in `output_dir`, which may be an older run's. This can go once it does neither.
        """
        args.resume_from_checkpoint = None
        if self.trial.latest_checkpoint is None:
            return
        core_context, folder = self.trial.core_context, self.trial.checkpoint_folder
        if core_context.distributed.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # whatever an interrupted download left there
        core_context.distributed.broadcast_local(None)
        core_context.checkpoint.download(self.trial.latest_checkpoint, folder)
        args.resume_from_checkpoint = str(next(folder.glob("checkpoint-*")))
        name = Path(args.resume_from_checkpoint).name
        logger.info("resuming from checkpoint %s, %s", self.trial.latest_checkpoint, name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what was left to do at the step of the checkpoint."""
        last = state.global_step >= state.max_steps
        if args.resume_from_checkpoint is not None:
            self.last_save = state.global_step
            args.eval_on_start = False  # this is no start
            self._load_log_state(Path(args.resume_from_checkpoint), args)
            if last or state.epoch.is_integer():
                # Killed after saving, maybe before the Trainer did what it does at the end of an epoch or of training.
                evaluated = any("eval_loss" in e and e["step"] == state.global_step for e in state.log_history)
                self.evaluation_due |= not evaluated and (last or args.eval_strategy == "epoch")
                control.should_log = args.logging_strategy == "epoch"
            control.should_evaluate, self.evaluation_due = self.evaluation_due, False
            self.trainer._maybe_log_save_evaluate(
                self.trainer._tr_loss, None, self.trainer.model_wrapped, None, state.epoch, None, time.time()
            )
        self.trial.stop_if_preempted()
        if last:
            logger.info("the checkpoint is that of the last step; nothing is left to train")
            raise TrialStopped  # the Trainer (5.23) would train a step more

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report progress, and look for the signal to stop.

        Upstream reports each whole percent only where `max_steps` is set, else each epoch; and the Trainer logs the
        last steps only if their number divides by `logging_steps`.
        """
        percent = 100 * state.global_step // state.max_steps
        if state.is_world_process_zero and percent > self.last_progress:
            self.last_progress = percent
            self.core_context.train.report_progress(percent / 100)
        if state.global_step >= state.max_steps:
            control.should_log = True
        self.preempted = self.trial.should_preempt()
        if self.preempted:
            logger.info("preempted at step %d: saving", state.global_step)
            self.evaluation_due = control.should_evaluate
            control.should_evaluate = control.should_save = False  # on_epoch_end, which comes next, sees to the saving
            control.should_training_stop = True
        self._before_evaluation(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave evaluations to the trial's next start when preempted, and have upstream see to the last save.

        Upstream is shown the number of steps instead of `args`, by which it tells the end of training just as well:
        its progress is `epoch / num_train_epochs`, which fractional epochs take above 1, and Core API refuses.
        """
        if self.preempted:
            last = state.global_step >= state.max_steps
            if not (last or state.epoch.is_integer()):  # the epoch was cut short: what is due at its end is not yet
                control.should_log = control.should_evaluate = False
            self.evaluation_due |= control.should_evaluate or (last and self.last_eval_metrics < state.global_step)
            control.should_evaluate = False
        super().on_epoch_end(SimpleNamespace(max_steps=state.max_steps), state, control, **kwargs)
        self._before_evaluation(control)

    def _before_evaluation(self, control: TrainerControl) -> None:
        if control.should_evaluate:
            self.rng_state = torch.get_rng_state()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Break an evaluation off when preempted; the checkpoint then says that it is still due."""
        if self.trial.should_preempt():
            logger.info("preempted during an evaluation")
            raise TrialStopped

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Let an evaluation leave no trace in the random numbers: training goes on the same if it is made up for later.

        (A DataLoader draws a seed from the CPU's generator whether it shuffles or not.)
        """
        if self.rng_state is not None:
            torch.set_rng_state(self.rng_state)
            self.rng_state = None

    def save_after_broken_evaluation(self) -> None:
        """Save the step at whose end an evaluation was broken off, unless it was saved before."""
        args, state, control = self.trainer.args, self.trainer.state, self.trainer.control
        if state.global_step <= max(self.last_save, 0):
            return
        self.evaluation_due = True
        self.on_evaluate()
        self.trainer._save_checkpoint(self.trainer.model_wrapped, trial=None)
        self.on_save(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Upload the checkpoint, once every rank has put its part of the logs' state beside it.

        Upstream has every rank of a node offer every file, and Core API then hashes all of them on each to find them
        the same: 30 GB for a 2-billion-parameter model. Here a node's first rank offers them all.
        """
        name = f"checkpoint-{state.global_step}"
        self._save_log_state(Path(args.output_dir) / name, args)
        self.last_save = state.global_step
        first = self.trial.core_context.distributed.local_rank == 0
        self.trial.core_context.checkpoint.upload(
            args.output_dir,
            metadata={"steps_completed": state.global_step, "trial_id": self.info.trial.trial_id},
            shard=True,
            selector=lambda path: first and path.startswith(f"{name}/"),
        )

    def _save_log_state(self, checkpoint: Path, args: TrainingArguments) -> None:
        """What the next logged means are made of: the sums since the last log, which the Trainer's checkpoints lack."""
        trainer = self.trainer
        log_state = {
            "tr_loss": trainer._tr_loss.item(),
            "globalstep_last_logged": trainer._globalstep_last_logged,
            "metrics": dict(trainer._metrics["train"]),
            "total_train_tokens": trainer._total_train_tokens,
            "evaluation_due": self.evaluation_due,
        }
        _log_state_file(checkpoint, args).write_text(json.dumps(log_state))

    def _load_log_state(self, checkpoint: Path, args: TrainingArguments) -> None:
        file = _log_state_file(checkpoint, args)
        if not file.exists():  # saved by more or fewer ranks: the first means logged are of the steps from here on
            return
        log_state, trainer = json.loads(file.read_text()), self.trainer
        trainer._tr_loss = torch.tensor(log_state["tr_loss"], device=args.device)
        trainer._globalstep_last_logged = log_state["globalstep_last_logged"]
        trainer._metrics["train"].update(log_state["metrics"])
        trainer._total_train_tokens = log_state["total_train_tokens"]
        self.evaluation_due = log_state["evaluation_due"]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Lend upstream a copy: it removes keys from `logs`, which later callbacks and TrainOutput then miss.

        The closing summary is not reported: it is of this process, which may have resumed, not of the trial.
        """
        if "train_runtime" not in (logs or {}):
            super().on_log(args, state, control, logs=dict(logs or {}), **kwargs)


def _log_state_file(checkpoint: Path, args: TrainingArguments) -> Path:
    return checkpoint / f"log_state_{args.process_index}.json"
