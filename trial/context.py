"""Open a trial on a Determined cluster or off it: its hyperparameters, its Core API context and its cache."""

import argparse
import contextlib
import functools
import gc
import json
import logging
import multiprocessing
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, cast

import determined as det
from determined import core

from config.experiment import expand_trials, read_experiment_config
from config.hyperparameters import Hyperparameters, check_searcher_metric, parse_hyperparameters
from config.search import HALVING, check_training_length
from config.validation import is_uuid
from errors import CommandLine, TemporaryError, UserError, about, at_least, one_line, os_errors_of
from storage.checkpoints import agent_cache, check_storage, local_checkpoint_storage
from storage.files import check_output, read_json_lines
from storage.identities import weights_identity
from storage.locks import only_writer
from storage.origins import Origin
from storage.shared_cache import once_per_node
from trial.events import TRAINED, LocalCheckpointContext, LocalTrainContext, is_event, read_events
from trial.search_stops import SearchPreemptContext, ask_master, ask_runner

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
    earlier_checkpoints: Callable[[], list[str]] = list  # returns the UUIDs of all that were saved, the latest first
    boards: Path | None = None  # the folder for TensorBoard's files of training_args.report_to
    memory_ran_out: Path | None = None  # a file to leave for the next start if memory runs out; see speed/fitting.py
    experiment_id: int = 0  # of the cluster
    origin: Origin | None = None  # for its checkpoints, once it is known which model it starts from

    def run(self, train: Callable[["Trial[Hyperparameters]"], None]) -> None:
        """Call `train` with this trial; if memory runs out, once more with the choices that take the least of it.

        A trial on a cluster, or of several ranks, ends instead with a `TemporaryError`, and its next start on the same
        machine makes these choices. (A master refuses metrics of a step that the same start has reported before, and
        ranks cannot know of each other's end.) Raises `UserError` if there is nothing left to choose.
        """
        import torch
        from accelerate.utils.memory import should_reduce_batch_size

        rng_state = torch.get_rng_state()
        try:
            return train(self)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):  # accelerate's name for: memory ran out
                raise
            if self.memory_ran_out is None:
                advice = "set activation_checkpointing: true, or lower the batch sizes or the length limits"
                raise UserError(f"out of memory: {advice} ({one_line(error)})") from error
            with os_errors_of(self.memory_ran_out):
                self.memory_ran_out.parent.mkdir(parents=True, exist_ok=True)
                self.memory_ran_out.touch()
            if self.on_cluster or self.core_context.distributed.size > 1:
                raise TemporaryError("out of memory; the next start trains in less of it, and slower") from error
        start = f"checkpoint {self.latest_checkpoint}" if self.latest_checkpoint else "the beginning"
        self.status(f"out of memory; training in less of it, and slower, from {start}")
        hparams, output_dir = replace(cast(Any, self.hparams)), self.hparams.args.output_dir  # as the YAML has them
        hparams.args.output_dir, self.hparams = output_dir, hparams
        gc.collect()  # outside of `except`, whose error holds on to the memory
        torch.cuda.empty_cache()
        torch.set_rng_state(rng_state)
        self.memory_ran_out = None
        self.run(train)

    def status(self, text: str) -> None:
        """Say what the trial is busy with: in its log, and in the Web UI or its events."""
        if self.core_context.distributed.rank == 0:
            logger.info(text)
            self.core_context.train.set_status(text)

    def remember_origin(self, base: str | None, model_ckpt: str | None = None) -> None:
        """Set what checkpoints will say of the training: see `Origin` for the arguments."""
        hparams = self.hparams
        beta = getattr(hparams.args, "beta", None)
        folder = Path(base or "", hparams.model_init_kwargs.get("subfolder") or "")
        stands_on_it = hparams.lora_config is not None and base and model_ckpt is None and folder.is_dir()
        self.origin = Origin(
            base=base,
            model_ckpt=model_ckpt,
            beta=beta,
            data_seed=hparams.split_seed,
            sources=hparams.sources,
            rounded_from=str(hparams.base_dtype).removeprefix("torch.") if hparams.load_in_4bit else None,
            base_weights=weights_identity(folder) if stands_on_it else None,
            hyperparameters=hparams.shown_values(),
        )

    @property
    def starting_checkpoint(self) -> str | None:
        """UUID of the checkpoint that DPO started from."""
        return self.origin.model_ckpt if self.origin else None

    def should_preempt(self) -> bool:
        """Return whether the cluster needs the trial's slots. Call it on every rank, in step with the others.

        After a True the cluster starts the trial again when there is room, however this process ends.
        """
        return self.core_context.preempt.should_preempt()

    def stop_if_preempted(self) -> None:
        """End the trial here if the cluster needs its slots. Call it where there is nothing to save."""
        if self.should_preempt():
            logger.info("preempted, with nothing new to save")
            raise TrialStopped


class TrialStopped(Exception):
    """Ends a trial early and in good order from within a library's loop. `open_trial` catches it."""


@contextmanager
def open_trial(cls: type[Hyperparameters], default_config: str, description: str) -> Iterator[Trial[Hyperparameters]]:
    """Open the trial of this process: the cluster's, or the one that the command line names by a YAML and a folder."""
    info = det.get_cluster_info()
    on_cluster = info is not None and info.task_type == "TRIAL"
    arguments = None if on_cluster else _parse_arguments(default_config, description)
    logging.basicConfig(level=logging.INFO, format=det.LOG_FORMAT, stream=sys.stdout)
    _hide_noise()
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
        # When Core API closes its sockets, it drops what the first rank has just sent; the others would wait for ever.
        trial.hparams.args.distributed_state.wait_for_everyone()


@contextmanager
def _open_on_cluster(
    cls: type[Hyperparameters], info: Any, distributed: core.DistributedContext | None
) -> Iterator[Trial[Hyperparameters]]:
    from storage.cluster_checkpoints import trial_checkpoints

    hide_progress_bars_in_logs()
    hparams = parse_hyperparameters(cls, info.trial.hparams)
    searcher = info.trial._config["searcher"]
    metric = searcher["metric"]
    check_searcher_metric(cls, metric)
    check_training_length(searcher, hparams.args)
    if distributed is None and (slots := len(info.slot_ids) * len(info.container_addrs)) > 1:
        launcher = "python3 -m determined.launch.torch_distributed"
        raise UserError(f"the trial has {slots} slots and one process: begin the YAML's entrypoint with {launcher}")
    with open_core_context(info, distributed) as core_context:
        # A run of its own on the trial's board: two files that grow at once in one folder would hide each other.
        boards = Path(core_context.train.get_tensorboard_path(), "trainer")
        hparams.args.run_name = hparams.args.run_name or f"{info.trial._config.get('name')}-{info.trial.trial_id}"
        cache = agent_cache() / f"trials-{os.getuid()}"  # another user could read it, but not add to it
        trial_id, latest = info.trial.trial_id, info.latest_checkpoint
        earlier = functools.partial(trial_checkpoints, trial_id)
        number = info.trial.experiment_id
        if searcher["name"] in HALVING:
            core_context.preempt = SearchPreemptContext(core_context, functools.partial(ask_master, trial_id))
        yield Trial(hparams, core_context, trial_id, metric, latest, cache, True, earlier, boards, experiment_id=number)


@contextmanager
def open_core_context(info: Any, distributed: core.DistributedContext | None = None) -> Iterator[core.Context]:
    """Open Core API on a cluster. Metrics go to the Web UI and to TensorBoard, and `profiling.enabled` profiles.

    The first rank writes TensorBoard's files, and a thread of it copies them to the checkpoint storage, at most once a
    second. Others report no metrics: with AUTO they would add empty files. The profiler is a thread on each machine
    that looks at it every second and reports to the master every ten.
    """
    first = distributed is None or distributed.rank == 0
    mode = core.TensorboardMode.AUTO if first else core.TensorboardMode.MANUAL
    # Core API prefers TensorFlow for writing these files, and warns where PyTorch has to.
    logging.getLogger("determined.tensorboard").addFilter(lambda record: "TensorFlow writer" not in str(record.msg))
    with core.init(distributed=distributed, tensorboard_mode=mode) as core_context:
        profiling = info.trial._config.get("profiling") or {}
        if profiling.get("enabled"):
            if first and (profiling.get("begin_on_batch") or profiling.get("end_after_batch") is not None):
                logger.warning(
                    "profiling.begin_on_batch and end_after_batch have no effect: all of the trial is profiled"
                )
            core_context.profiler.on()
        yield core_context


@contextmanager
def _open_locally(
    cls: type[Hyperparameters], arguments: argparse.Namespace, distributed: core.DistributedContext | None
) -> Iterator[Trial[Hyperparameters]]:
    config = read_experiment_config(arguments.config)
    with about(arguments.config):
        values, *others = expand_trials(config)
    if others:
        command = f"python local_experiment.py {arguments.config}"
        raise UserError(f"{arguments.config} is a search of {1 + len(others)} trials; run {command}")
    hide_progress_bars_in_logs()
    check_output(Path(arguments.output), "--output", is_folder=True)
    check_output(Path(arguments.cache or Path(arguments.output, "cache")), "--cache", is_folder=True)
    with about(arguments.config):
        hparams = parse_hyperparameters(cls, values)
        if hparams.checkpoint and not is_uuid(hparams.checkpoint.removeprefix("ckpt:")):
            command = f"python local_experiment.py {arguments.config}"
            raise UserError(f"model_ckpt {hparams.checkpoint} may be another one at the next start; run {command}")
    check_storage(Path(arguments.output), hparams.checkpoint)
    metric, output, storage = config["searcher"].get("metric"), Path(arguments.output), local_checkpoint_storage()
    cache, events = Path(arguments.cache or output / "cache"), output / "events.jsonl"
    hparams.args.output_dir = str(output / "trainer")
    hparams.args.run_name = hparams.args.run_name or f"{config.get('name') or output.name}-{arguments.trial_id}"
    with contextlib.ExitStack() as stack:
        # A trial whose local_experiment.py was killed lives on for some milliseconds; its successor waits for it.
        lock = only_writer(output, patience=30 if multiprocessing.parent_process() else 0)

        def enter() -> None:
            stack.enter_context(lock)
            if Path(hparams.args.output_dir).is_file():
                raise UserError(f"{hparams.args.output_dir}: is a file, where the trainer's folder belongs")
            lines, as_written = read_json_lines(events), json.loads(json.dumps(values))
            earlier = [line for line in lines if is_event(line)]
            if len(lines) > len(earlier):
                logger.info("%s: %d of %d lines are damaged: left out", events, len(lines) - len(earlier), len(lines))
            if any(event["kind"] == "hparams" and event["hparams"] != as_written for event in earlier):
                if any(event["kind"] in TRAINED for event in earlier):
                    what = f"{output} holds a trial with other hyperparameters"
                    raise UserError(f"{what}; remove it, or choose another --output")
                events.unlink()  # a mistake ended it before it had trained a step

        once_per_node(distributed or core.DummyDistributedContext(), enter)

        def saved() -> list[str]:
            return [event["uuid"] for event in reversed(read_events(events)) if event["kind"] == "checkpoint"]

        core_context = stack.enter_context(core.init(distributed=distributed, checkpoint_storage=str(storage)))
        core_context.train = LocalTrainContext(events, values)
        if arguments.search:
            ask = functools.partial(ask_runner, Path(arguments.search), arguments.trial_id)
            core_context.preempt = SearchPreemptContext(core_context, ask)
        core_context.checkpoint = LocalCheckpointContext(core_context.distributed, storage, events)
        latest = next(iter(saved()), None)
        yield Trial(hparams, core_context, arguments.trial_id, metric, latest, cache, False, saved, output)
        if core_context.distributed.local_rank == 0:  # every checkpoint in it is in the storage by now
            shutil.rmtree(hparams.args.output_dir, ignore_errors=True)


def _hide_noise() -> None:
    """Keep two messages out of the log that a user can do nothing about."""
    # accelerate 1.15 says so after an evaluation, though nothing of it is left out. This can go once it says so at
    # debug level.
    no_length = "The used dataset had no length"
    logging.getLogger("accelerate.accelerator").addFilter(lambda record: no_length not in str(record.msg))
    # TRL 1.16 reads an attribute that transformers 5.23 has renamed. This can go once it does not.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def hide_progress_bars_in_logs() -> None:
    """Hide the libraries' progress bars unless stderr is a terminal: bars that redraw themselves would fill a log."""
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        os.environ["TQDM_DISABLE"] = "1"  # TRL's, over the reference pass


def _parse_arguments(default_config: str, description: str) -> argparse.Namespace:
    epilog = """On a cluster there are no options: hyperparameters and checkpoints come from the experiment.
Off the cluster, python local_experiment.py runs a whole experiment through this script."""
    parser = CommandLine(description, epilog=epilog)
    add, output = parser.add_argument, f"local_runs/{Path(sys.argv[0]).stem}"
    add("--config", default=default_config, help="experiment YAML without a search (default: %(default)s)")
    add("--output", default=output, help="the trial's folder, which is also resumed from (default: %(default)s)")
    add("--trial-id", type=at_least(1), default=1, help="number written to its checkpoints (default: 1)")
    add("--cache", help="folder for tokenized data and reference log-probs, to share (default: OUTPUT/cache)")
    add("--search", help="the search.jsonl of a search that stops trials early (default: none does)")
    return parser.parse_args()
