"""What a trial is given: its hyperparameters and its Core API context, on a Determined cluster and off it."""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import determined as det
from determined import core

from config.experiment import expand_trials, read_experiment_config
from config.hyperparameters import Hyperparameters, check_searcher_metric, parse_hyperparameters
from errors import UserError
from storage.checkpoints import agent_cache, local_checkpoint_storage
from storage.locks import only_writer
from storage.shared_cache import once_per_node
from trial.events import read_events
from trial.local import LocalCheckpointContext, LocalTrainContext

logger = logging.getLogger(__name__)


@dataclass
class Trial(Generic[Hyperparameters]):
    """One run of an entrypoint."""

    hparams: Hyperparameters
    core_context: core.Context
    trial_id: int
    searcher_metric: str | None
    latest_checkpoint: str | None  # UUID of the checkpoint to resume from
    cache: Path  # what this trial and others make once and share; see storage/shared_cache.py
    on_cluster: bool

    def status(self, text: str) -> None:
        """Say what the trial is busy with: in its log, and in the Web UI or its events."""
        if self.core_context.distributed.rank == 0:
            logger.info(text)
            self.core_context.train.set_status(text)

    def should_preempt(self) -> bool:
        """Return whether the cluster wants its slots back. Every rank asks, in step with the others.

        Once the answer was yes, the cluster starts the trial again when there is room, however this process ends.
        """
        return self.core_context.preempt.should_preempt()

    def stop_if_preempted(self) -> None:
        """End the trial here if the cluster wants its slots back. For where there is nothing to save."""
        if self.should_preempt():
            logger.info("preempted, with nothing new to save")
            raise TrialStopped


class TrialStopped(Exception):
    """Ends a trial early, in good order, from within the libraries' loops. `open_trial` catches it."""


@contextmanager
def open_trial(cls: type[Hyperparameters], default_config: str, description: str) -> Iterator[Trial[Hyperparameters]]:
    """Open the trial that this process runs: the cluster's, or that of the YAML and folder on the command line."""
    info = det.get_cluster_info()
    on_cluster = info is not None and info.task_type == "TRIAL"
    arguments = None if on_cluster else _parse_arguments(default_config, description)
    logging.basicConfig(level=logging.INFO, format=det.LOG_FORMAT, stream=sys.stdout)
    if os.environ.get("WORLD_SIZE") == "1":
        # With the launcher's process group of one, accelerate would wrap the model in DDP, which holds the gradients
        # twice. This can go once accelerate does not.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    # torchrun and determined.launch.torch_distributed set RANK.
    distributed = core.DistributedContext.from_torch_distributed() if "RANK" in os.environ else None
    opened = _open_locally(cls, arguments, distributed) if arguments else _open_on_cluster(cls, info, distributed)
    with opened as trial:
        with contextlib.suppress(TrialStopped):
            yield trial
        # Core API's sockets drop, once closed, what the first rank has just sent. The others would wait for ever.
        trial.hparams.args.distributed_state.wait_for_everyone()


@contextmanager
def _open_on_cluster(
    cls: type[Hyperparameters], info: Any, distributed: core.DistributedContext | None
) -> Iterator[Trial[Hyperparameters]]:
    hide_progress_bars_in_logs()
    hparams = parse_hyperparameters(cls, info.trial.hparams)
    metric = info.trial._config["searcher"]["metric"]
    check_searcher_metric(cls, metric)
    slots = len(info.slot_ids) * len(info.container_addrs)
    if distributed is None and slots > 1:
        launcher = "python -m determined.launch.torch_distributed"
        raise UserError(f"the trial has {slots} slots and one process: begin the YAML's entrypoint with {launcher}")
    # Metrics go to the Web UI. AUTO would import tensorboard, which nothing here needs.
    with core.init(distributed=distributed, tensorboard_mode=core.TensorboardMode.MANUAL) as core_context:
        cache = agent_cache() / f"trials-{os.getuid()}"  # another user could read it, but not add to it
        yield Trial(hparams, core_context, info.trial.trial_id, metric, info.latest_checkpoint, cache, on_cluster=True)


@contextmanager
def _open_locally(
    cls: type[Hyperparameters], arguments: argparse.Namespace, distributed: core.DistributedContext | None
) -> Iterator[Trial[Hyperparameters]]:
    config = read_experiment_config(arguments.config)
    trials = expand_trials(config)
    if len(trials) > 1:
        command = f"python local_experiment.py {arguments.config}"
        raise UserError(f"{arguments.config} is a search of {len(trials)} trials; run {command}")
    hide_progress_bars_in_logs()
    hparams = parse_hyperparameters(cls, trials[0])
    output, storage = Path(arguments.output), local_checkpoint_storage()
    events = output / "events.jsonl"
    hparams.args.output_dir = str(output / "trainer")
    with contextlib.ExitStack() as stack:
        # A trial whose local_experiment.py was killed lives on for some milliseconds. The one started again waits.
        lock = only_writer(output, patience=30 if multiprocessing.parent_process() else 0)
        once_per_node(distributed or core.DummyDistributedContext(), lambda: stack.enter_context(lock))
        earlier = read_events(events)
        as_written = json.loads(json.dumps(trials[0]))
        if any(event["kind"] == "hparams" and event["hparams"] != as_written for event in earlier):
            raise UserError(f"{output} holds a trial with other hyperparameters; remove it, or choose another --output")
        checkpoints = [event["uuid"] for event in earlier if event["kind"] == "checkpoint"]
        core_context = stack.enter_context(core.init(distributed=distributed, checkpoint_storage=str(storage)))
        core_context.train = LocalTrainContext(events, trials[0])
        core_context.checkpoint = LocalCheckpointContext(core_context.distributed, storage, events)
        yield Trial(
            hparams,
            core_context,
            arguments.trial_id,
            searcher_metric=config["searcher"].get("metric"),
            latest_checkpoint=checkpoints[-1] if checkpoints else None,
            cache=Path(arguments.cache or output / "cache"),
            on_cluster=False,
        )
        if core_context.distributed.local_rank == 0:  # every checkpoint in it is in the storage by now
            shutil.rmtree(hparams.args.output_dir, ignore_errors=True)


def hide_progress_bars_in_logs() -> None:
    """Have the libraries show progress bars on a terminal only: bars that redraw themselves would fill a log file."""
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        os.environ["TQDM_DISABLE"] = "1"  # TRL's, over the reference pass


def _parse_arguments(default_config: str, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description,
        epilog="A Determined trial takes no options: hyperparameters and checkpoints come from the cluster. Off the"
        " cluster, python local_experiment.py runs a whole experiment through this script.",
    )
    output = f"local_runs/{Path(sys.argv[0]).stem}"
    add = parser.add_argument
    add("--config", default=default_config, help="experiment YAML without a search (default: %(default)s)")
    add(
        "--output",
        default=output,
        help="the trial's folder; run again with the same one, it resumes (default: %(default)s)",
    )
    add("--trial-id", type=int, default=1, help="number written to its checkpoints (default: 1)")
    add("--cache", help="folder for tokenized data and reference log-probs, to share (default: OUTPUT/cache)")
    return parser.parse_args()
