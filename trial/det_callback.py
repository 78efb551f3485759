"""Determined's callback for the Trainer, corrected where release 0.38.1 does not work with transformers 5.

A trial resumes exactly. Whether it is stopped at a step, in the middle of an evaluation, or killed at any moment, it
ends with the weights and the logged metrics (but for its speed) of an undisturbed one, bit for bit on deterministic
hardware.

What a start restores, and who does it:

| what                                                  | from                                 | by                   |
|-------------------------------------------------------|--------------------------------------|----------------------|
| the UUID of the latest checkpoint                     | the master, or a local events.jsonl  | trial/context.py     |
| its files, or those of the latest one that is whole   | the checkpoint storage               | latest_checkpoint.py |
| weights, optimizer, scheduler, random state, place in | model.safetensors, optimizer.pt, ... | the Trainer          |
| the data                                              |                                      |                      |
| sums for the next logged means, a pending evaluation  | log_state_<rank>.json                | on_train_begin       |
| what earlier evaluations found of each pair           | evaluations.json                     | on_train_begin       |

Not exactly: on another number of ranks, or with the settings in `training_args.INEXACT`, each with a line in the log.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import determined.transformers
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import SaveStrategy

from errors import DISK_FULL, TemporaryError, UserError
from metrics.evaluations import read_evaluations
from storage.manifests import hash_files, write_manifest
from trial.context import Trial, TrialStopped
from trial.latest_checkpoint import fetch_latest_checkpoint, log_state_file, read_log_state
from trial.throughput import METRICS, Throughput

logger = logging.getLogger(__name__)


def train_or_resume(trainer: Trainer, trial: Trial) -> None:
    """Train from the latest checkpoint, if there is one, to the end; if the cluster needs the slots, save and stop."""
    callback = DetCallback(trial, trainer)
    _check_batches(trainer)
    trainer.add_callback(callback)
    for tracker in trainer.callback_handler.callbacks:  # of training_args.report_to
        if isinstance(tracker, TensorBoardCallback):
            # Upstream's default is a folder within output_dir, which goes when the trial ends.
            tracker.logging_dir = tracker.logging_dir or str(trial.boards)
    trial.status("training")
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except TrialStopped:
        callback.save_after_broken_evaluation()
    except Exception as error:
        if not any(text in str(error) for text in DISK_FULL):
            raise
        folders = f"{trainer.args.output_dir}, the checkpoint storage or the cache"
        raise TemporaryError(f"no space left on the disk of {folders}") from error


def _check_batches(trainer: Any) -> None:
    """Raise `UserError` if `dataloader_drop_last` leaves no batch: a training would end at once, and teach nothing."""
    args = trainer.args
    rows, needed = len(trainer.train_dataset), args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < needed:  # evaluations drop no row
        few = f"{rows} rows are less than a batch of {needed}"
        raise UserError(f"hyperparameters.training_args.dataloader_drop_last leaves nothing: {few}")


@dataclass
class Pending:
    """What is still to be done at the current step."""

    save: bool = False  # once the epoch's end has been logged and evaluated
    evaluation: bool = False  # by the trial's next start, from the checkpoint of this step
    rng_state: torch.Tensor | None = None  # to be restored after an evaluation


class DetCallback(determined.transformers.DetCallback):
    """Report metrics and progress, upload checkpoints, restore the latest one and stop when preempted.

    It works off the cluster too, with the contexts of `trial/events.py`. Construction sets
    `args.resume_from_checkpoint` to the folder to resume from, or None: pass it to `trainer.train()`, which does not
    look there itself.

    | at                                | not preempted                        | preempted                           |
    |-----------------------------------|--------------------------------------|-------------------------------------|
    | a step within an epoch            | log, evaluate, save: whatever is due | save; a due evaluation is pending   |
    | the last step of an epoch, or of  | save once the epoch's end is logged  | save once it is logged; a due       |
    | the training                      | and evaluated                        | evaluation is pending               |
    | a batch of an evaluation          | go on; restore the random state      | break off; save the step unless it  |
    |                                   | after the last one                   | was saved; evaluation is pending    |
    | the end of an evaluation          | go on                                | save the step                       |
    | a start from a checkpoint         | evaluate if that is pending, then    | end, with nothing new to save       |
    |                                   | train on, if steps are left          |                                     |

    A pending evaluation is written into the checkpoint (`log_state_<rank>.json`), and the next start makes it up. What
    it finds of each pair is in the next checkpoint. After the last step there is none: that step is saved once more.
    """

    def __init__(self, trial: Trial, trainer: Any) -> None:
        # `trainer` is an ExactSFTTrainer or ExactDPOTrainer: others have no `evaluations`.
        self.trial, self.trainer = trial, trainer
        self.preempted = self.epoch_ended = False
        self.pending = Pending()
        self.throughput = Throughput(trainer)
        # Upstream appends to this for adaptive_asha, but does not create it. This can go once it does.
        self.required_metrics: list[str] = []
        if trial.on_cluster:
            super().__init__(trial.core_context, trainer.args)
        else:
            # Upstream's constructor raises RuntimeError off the cluster, though its methods work: set what it sets.
            # This can go once it does not.
            TrainerCallback.__init__(self)
            self.info: Any = SimpleNamespace(task_type="TRIAL", trial=SimpleNamespace(trial_id=trial.trial_id))
            self.searcher_metric, self.time_metric = trial.searcher_metric, None
            self.filter_metrics = self.user_data = None
            self.last_train_metrics = self.last_eval_metrics = self.last_save = -1
            self.last_progress = 0
            self._force_final_save = self._force_final_evaluate = True
            self.load_last_checkpoint(trainer.args)
        # Upstream polls for preemption only where something is logged. That may be late, and it may then stop without
        # a checkpoint. This context answers what `on_step_end` last saw. This can go once it polls at every step and
        # saves.
        preempt = SimpleNamespace(should_preempt=lambda: self.preempted)
        self.core_context: Any = SimpleNamespace(train=trial.core_context.train, preempt=preempt)

    def load_last_checkpoint(self, args: TrainingArguments) -> None:
        """Download the latest checkpoint into a folder of its own and point `args.resume_from_checkpoint` at it.

        If it is damaged, that is the latest one before it that is whole, if any.

        Upstream reads `args.overwrite_output_dir`, which transformers 5 has removed (AttributeError), and resumes
        from the highest `checkpoint-N` in `output_dir`, which may be an older run's. This can go once it does neither.
        Raises `UserError` where the storage has none of the trial's checkpoints.
        """
        saved = fetch_latest_checkpoint(self.trial, _resumed_from(args), bool(args.deepspeed))
        args.resume_from_checkpoint = str(saved) if saved else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Make up for what was pending at the step of the checkpoint."""
        if args.resume_from_checkpoint is not None:
            self.last_save = state.global_step
            args.eval_on_start = False  # the trial has started before
            self._load_log_state(Path(args.resume_from_checkpoint), args)
            self.trainer.evaluations.take_over(read_evaluations(Path(args.resume_from_checkpoint)))
            if self.pending.evaluation:
                # The Trainer does both where an evaluation is due, but has no public method for them.
                self.trainer._determine_best_metric(self.trainer._evaluate(None, None), None)
                self.pending.evaluation = False
                if state.global_step >= state.max_steps:
                    self._save_outside_of_steps()
        self.trial.stop_if_preempted()
        if state.global_step >= state.max_steps:
            # It was killed between its last checkpoint and its end. The Trainer (5.23) would train a step more. This
            # can go once it does not.
            logger.info("the checkpoint is that of the last step; nothing is left to train")
            raise TrialStopped

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Let the clock of the throughput run."""
        self.throughput.begin_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report progress, poll for preemption, and postpone a checkpoint that would be saved too early.

        Upstream reports each whole percent only where `max_steps` is set, else each epoch. The Trainer logs the last
        step only if it is a multiple of `logging_steps`. These parts can go once both do better.
        """
        percent = 100 * state.global_step // state.max_steps
        if state.is_world_process_zero and percent > self.last_progress:
            self.last_progress = percent
            self.core_context.train.report_progress(percent / 100)
        last = state.global_step >= state.max_steps
        control.should_log |= last
        self.preempted, self.epoch_ended = self.trial.should_preempt(), False
        if self.preempted:
            logger.info("preempted at step %d: saving", state.global_step)
            self.pending.evaluation = control.should_evaluate
            control.should_evaluate = False
            control.should_training_stop = True
        if control.should_save and (last or self.preempted or float(state.epoch or 0).is_integer()):
            # on_epoch_end comes next, and its log and evaluation belong in this checkpoint: if it were saved now, a
            # trial killed in between would never make up for them.
            control.should_save, self.pending.save = False, True
        self.throughput.end_step(control)
        self._remember_rng_state(control)
        if args.resume_from_checkpoint is not None:  # all of it is loaded by now
            args.resume_from_checkpoint = None
            if self.trial.core_context.distributed.local_rank == 0:
                shutil.rmtree(_resumed_from(args), ignore_errors=True)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save what is pending, and leave evaluations to the trial's next start when preempted.

        Upstream gets the number of steps instead of `args`, which also tells it when training ends. From `args` it
        would report `epoch / num_train_epochs`: fractional epochs take that above 1, which Core API refuses. This can
        go once they do not.
        """
        control.should_save |= self.pending.save
        self.pending.save = False
        if self.preempted:
            last = state.global_step >= state.max_steps
            if not (last or float(state.epoch or 0).is_integer()):  # the epoch was cut short: its end is not due yet
                control.should_log = control.should_evaluate = False
            self.pending.evaluation |= control.should_evaluate or (last and self.last_eval_metrics < state.global_step)
            control.should_evaluate = False
        steps: Any = SimpleNamespace(max_steps=state.max_steps)
        super().on_epoch_end(steps, state, control, **kwargs)
        self.throughput.end_step(control)
        self.epoch_ended = True
        self._remember_rng_state(control)

    def _remember_rng_state(self, control: TrainerControl) -> None:
        if control.should_evaluate:
            self.pending.rng_state = torch.get_rng_state()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Break off an evaluation when preempted. The checkpoint then says that it is pending."""
        if self.trial.should_preempt():
            logger.info("preempted during an evaluation")
            raise TrialStopped

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restore the random state, and stop at this very step if a search stops the trial for what it has found."""
        self._restore_rng_state()
        made_up = self.pending.evaluation  # on_train_begin asks next
        if state.global_step and not made_up and self.trial.should_preempt():
            logger.info("preempted after the evaluation of step %d: saving", state.global_step)
            self.preempted = control.should_training_stop = True
            control.should_save |= self.epoch_ended  # else on_epoch_end comes next, and sees to it
        if control.should_save and args.save_strategy == SaveStrategy.BEST:
            # The training ends here. The Trainer (5.23) would save this step only if the evaluation is the best so far.
            # This can go once it keeps to `should_save`.
            args.save_strategy = SaveStrategy.STEPS

    def _restore_rng_state(self) -> None:
        """Have training go on the same if an evaluation is made up for later.

        (A DataLoader draws a seed from the CPU's generator, whether it shuffles or not.)
        """
        if self.pending.rng_state is not None:
            torch.set_rng_state(self.pending.rng_state)
            self.pending.rng_state = None

    def save_after_broken_evaluation(self) -> None:
        """Save the step at whose end an evaluation was broken off, unless it was saved before."""
        if self.trainer.state.global_step <= max(self.last_save, 0):
            return
        self.pending.evaluation = True
        self._restore_rng_state()
        self._save_outside_of_steps()

    def _save_outside_of_steps(self) -> None:
        self.trainer._save_checkpoint(self.trainer.model_wrapped, trial=None)
        self.on_save(self.trainer.args, self.trainer.state, self.trainer.control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Upload the checkpoint with every rank's part of the log state and a manifest, and keep no copy.

        Upstream has every rank of a node offer every file, and Core API then hashes all of them on each rank to find
        that they are the same: 30 or 40 GB for a 2-billion-parameter model. Here a node's first rank offers them all.
        This can go once upstream does so.

        Training waits for the hashing, about a second for a GB of a file, as it does for the upload.
        """
        core_context, name = self.trial.core_context, f"checkpoint-{state.global_step}"
        folder = Path(args.output_dir or ".") / name
        self._save_log_state(folder, args)
        if state.is_world_process_zero:
            self.trainer.evaluations.write(folder)
            if self.trial.origin:
                self.trial.origin.write(folder)
        core_context.distributed.allgather(None)  # the other ranks of this node have written their files too
        files = core_context.distributed.gather(hash_files(folder) if core_context.distributed.local_rank == 0 else {})
        if files:  # on the first rank; `upload` has the others wait for it
            write_manifest(folder, {file: known for part in files for file, known in part.items()})
        self.last_save = state.global_step
        self.trial.latest_checkpoint = core_context.checkpoint.upload(
            args.output_dir,
            metadata={"steps_completed": state.global_step, "trial_id": self.info.trial.trial_id},
            shard=True,
            selector=lambda path: core_context.distributed.local_rank == 0 and path.startswith(f"{name}/"),
        )
        if core_context.distributed.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)

    def _save_log_state(self, checkpoint: Path, args: TrainingArguments) -> None:
        # The sums since the last log, for the next logged means: the Trainer's checkpoints lack them.
        trainer = self.trainer
        log_state = {
            "ranks": args.world_size,
            "evaluation_due": self.pending.evaluation,
            "globalstep_last_logged": trainer._globalstep_last_logged,
            "tr_loss": trainer._tr_loss.item(),
            "metrics": dict(trainer._metrics["train"]),
            "total_train_tokens": trainer._total_train_tokens,
        }
        log_state_file(checkpoint, args.process_index).write_text(json.dumps(log_state))

    def _load_log_state(self, checkpoint: Path, args: TrainingArguments) -> None:
        log_state = read_log_state(checkpoint, 0)  # what all ranks must agree on is the first one's
        self.pending.evaluation = log_state["evaluation_due"]
        if log_state["ranks"] != args.world_size:
            logger.info("saved by %d ranks: resuming on %d is not exact", log_state["ranks"], args.world_size)
            return
        log_state, trainer = read_log_state(checkpoint, args.process_index), self.trainer
        trainer._globalstep_last_logged = log_state["globalstep_last_logged"]
        trainer._tr_loss = torch.tensor(log_state["tr_loss"], device=args.device)
        trainer._metrics["train"].update(log_state["metrics"])
        trainer._total_train_tokens = log_state["total_train_tokens"]

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """Report a copy of `logs`: upstream removes keys from it, which later callbacks and TrainOutput would miss.

        The closing summary is not reported: it covers this process, which may have resumed, and not the whole trial.
        """
        if "train_loss" not in (logs or {}):
            super().on_log(args, state, control, logs=dict(logs or {}), **kwargs)

    def _get_metrics(self, logs: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Keep the throughput: upstream drops whatever ends in `_per_second`, as the Trainer's own figures do."""
        throughput = {name: logs[name] for name in METRICS if name in logs}
        metrics, kind = super()._get_metrics(logs)
        return metrics | throughput, kind


def _resumed_from(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".") / "resumed_from"
