"""What a trial is given: its hyperparameters and its Core API context, on a Determined cluster and off it."""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import datasets
import determined as det
import transformers
from determined import core
from determined.common.storage import SharedFSStorageManager
from filelock import FileLock

from config.experiment import expand_trials, read_experiment_config
from config.hyperparameters import Hyperparameters, check_searcher_metric, parse_hyperparameters
from errors import UserError
from storage.checkpoints import agent_cache, local_checkpoint_storage
from storage.locks import only_writer, open_lock, taken
from storage.ranks import once_per_node
from trial.events import append_event, read_events

logger = logging.getLogger(__name__)


@dataclass
class Trial(Generic[Hyperparameters]):
    """One run of an entrypoint."""

    hparams: Hyperparameters
    core_context: core.Context
    trial_id: int
    searcher_metric: str | None
    latest_checkpoint: str | None  # UUID of the checkpoint to resume from
    cache: Path  # what this and later trials need not make again; see shared_cache.py
    on_cluster: bool

    def status(self, text: str) -> None:
        """Say what the trial is busy with: in its log, and in the Web UI or to whoever follows its reports."""
        if self.core_context.distributed.rank == 0:
            logger.info(text)
            self.core_context.train.set_status(text)

    def should_preempt(self) -> bool:
        """Whether the cluster wants its slots back: paused, or outranked. Every rank asks, in step with the others.

        Once it is told, the cluster starts the trial again when there is room, however this process ends.
        """
        return self.core_context.preempt.should_preempt()

    def stop_if_preempted(self) -> None:
        """End the trial here if the cluster wants its slots back; for where there is nothing to save."""
        if self.should_preempt():
            logger.info("preempted, with nothing new to save")
            raise TrialStopped

    @contextmanager
    def one_at_a_time(self, key: str, what: str) -> Iterator[None]:
        """Be the only trial in here among those with the same cache folder and `key`; the others wait for its `what`.

        All ranks enter together, on one machine. A trial that waits can be preempted.
        """
        distributed = self.core_context.distributed
        first = distributed.rank == 0
        locks: list[FileLock] = []
        once_per_node(distributed, lambda: locks.append(open_lock(self.cache / f"{key}.lock")))
        waits = False
        while not distributed.broadcast(taken(locks[0]) if first else None):
            if not waits:
                self.status(f"waiting for another trial's {what}")
                waits = True
            self.stop_if_preempted()
            time.sleep(0.2)
        try:
            yield
        finally:
            if first:
                locks[0].release()


class TrialStopped(Exception):
    """Ends a trial early, in good order, from within the libraries' loops; `open_trial` catches it."""


@contextmanager
def open_trial(cls: type[Hyperparameters], default_config: str, description: str) -> Iterator[Trial[Hyperparameters]]:
    """The trial that this process runs: the cluster's, or the one of the YAML and folder named on the command line."""
    logging.basicConfig(level=logging.INFO, format=det.LOG_FORMAT, stream=sys.stdout)
    hide_progress_bars_in_logs()
    if os.environ.get("WORLD_SIZE") == "1":
        # The launcher's process group of one would have accelerate wrap the model in DDP, which holds the gradients
        # twice. This can go once it does not.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    # torchrun and determined.launch.torch_distributed set RANK.
    distributed = core.DistributedContext.from_torch_distributed() if "RANK" in os.environ else None
    info = det.get_cluster_info()
    if info is not None and info.task_type == "TRIAL":
        opened = _open_on_cluster(cls, info, distributed)
    else:
        opened = _open_on_this_machine(cls, _parse_arguments(default_config, description), distributed)
    with opened as trial:
        with contextlib.suppress(TrialStopped):
            yield trial
        # Core API's sockets, once closed, drop what the first rank has just told the others, who would wait for ever.
        trial.hparams.args.distributed_state.wait_for_everyone()


@contextmanager
def _open_on_cluster(
    cls: type[Hyperparameters], info: det.ClusterInfo, distributed: core.DistributedContext | None
) -> Iterator[Trial[Hyperparameters]]:
    hparams = parse_hyperparameters(cls, info.trial.hparams)
    metric = info.trial._config["searcher"]["metric"]
    check_searcher_metric(cls, metric)
    slots = len(info.slot_ids) * len(info.container_addrs)
    if distributed is None and slots > 1:
        launcher = "python -m determined.launch.torch_distributed"
        raise UserError(f"the trial has {slots} slots and one process: begin the YAML's entrypoint with {launcher}")
    # Metrics go to the Web UI; AUTO would import tensorboard, which nothing here needs.
    with core.init(distributed=distributed, tensorboard_mode=core.TensorboardMode.MANUAL) as core_context:
        cache = agent_cache() / f"trials-{os.getuid()}"  # another user could read it, but not add to it
        yield Trial(hparams, core_context, info.trial.trial_id, metric, info.latest_checkpoint, cache, on_cluster=True)


@contextmanager
def _open_on_this_machine(
    cls: type[Hyperparameters], args: argparse.Namespace, distributed: core.DistributedContext | None
) -> Iterator[Trial[Hyperparameters]]:
    config = read_experiment_config(args.config)
    trials = expand_trials(config)
    if len(trials) > 1:
        raise UserError(
            f"{args.config} is a search of {len(trials)} trials; run python local_experiment.py {args.config}"
        )
    hparams = parse_hyperparameters(cls, trials[0])
    output = Path(args.output)
    reports = output / "events.jsonl"
    metric = config["searcher"].get("metric")
    storage = local_checkpoint_storage()
    cache = Path(args.cache or output / "cache")
    hparams.args.output_dir = str(output / "trainer")
    with contextlib.ExitStack() as stack:
        # One whose local_experiment.py was killed has some milliseconds to live; the one started again is in no hurry.
        lock = only_writer(output, patience=30 if multiprocessing.parent_process() else 0)
        once_per_node(distributed or core.DummyDistributedContext(), lambda: stack.enter_context(lock))
        earlier = read_events(reports)
        if any(report["kind"] == "hparams" and report["hparams"] != as_json(trials[0]) for report in earlier):
            raise UserError(f"{output} holds a trial with other hyperparameters; remove it, or choose another --output")
        checkpoints = [report["uuid"] for report in earlier if report["kind"] == "checkpoint"]
        latest = checkpoints[-1] if checkpoints else None
        core_context = stack.enter_context(core.init(distributed=distributed, checkpoint_storage=str(storage)))
        core_context.train = LocalTrainContext(reports, trials[0])
        core_context.checkpoint = LocalCheckpointContext(core_context.distributed, storage, reports)
        yield Trial(hparams, core_context, args.trial_id, metric, latest, cache, on_cluster=False)
        if core_context.distributed.local_rank == 0:  # every checkpoint in it is in the storage by now
            shutil.rmtree(hparams.args.output_dir, ignore_errors=True)


def hide_progress_bars_in_logs() -> None:
    """Bars that redraw themselves would fill a log file: the libraries show theirs on a terminal only."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        os.environ["TQDM_DISABLE"] = "1"  # TRL's, over the reference pass


def _parse_arguments(default_config: str, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description,
        epilog="In a Determined trial there is nothing to pass: hyperparameters and checkpoints come from the cluster."
        " Off it, python local_experiment.py runs a whole experiment through this script.",
    )
    script = Path(sys.argv[0]).stem
    parser.add_argument(
        "--config", default=default_config, help="experiment YAML without a search (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        default=f"local_runs/{script}",
        help="the trial's folder: run again with the same one, it resumes (default: %(default)s)",
    )
    parser.add_argument("--trial-id", type=int, default=1, help="number written to its checkpoints (default: 1)")
    parser.add_argument(
        "--cache", help="folder for tokenized data and reference log-probs, to share (default: OUTPUT/cache)"
    )
    return parser.parse_args()


class LocalTrainContext(core.DummyTrainContext):
    """Core API's stand-in for a master, which drops what a trial reports, made to keep it in a file.

    The file is begun with the first report, so that a trial which finds a mistake before that has written nothing.
    """

    def __init__(self, reports: Path, hparams: dict[str, Any]) -> None:
        super().__init__()
        self.reports, self.hparams = reports, hparams

    def report_metrics(self, group: str, steps_completed: int, metrics: dict[str, Any]) -> None:
        self._report(kind=group, steps_completed=steps_completed, metrics=metrics)

    def report_progress(self, progress: float) -> None:
        self._report(kind="progress", progress=progress)

    def set_status(self, status: str) -> None:
        self._report(kind="status", status=status)

    def _report(self, **report: Any) -> None:
        if not self.reports.exists():
            append_event(self.reports, kind="hparams", hparams=self.hparams)
        append_event(self.reports, **report)


class LocalCheckpointContext(core.DummyCheckpointContext):
    """Core API's checkpoints in a folder, each reported once its upload is complete."""

    def __init__(self, distributed: core.DistributedContext, storage: Path, reports: Path) -> None:
        super().__init__(distributed, SharedFSStorageManager(str(storage)))
        self.reports = reports

    def upload(self, ckpt_dir: Any, metadata: dict[str, Any] | None = None, **kwargs: Any) -> str:
        uuid = super().upload(ckpt_dir, metadata, **kwargs)
        if self._dist.rank == 0:
            append_event(self.reports, kind="checkpoint", uuid=uuid, **(metadata or {}))
        return uuid


def as_json(value: Any) -> Any:
    """`value` as JSON gives it back, for comparing it with what was written earlier."""
    return json.loads(json.dumps(value))
