"""Fit a training into the memory at hand: which activations it keeps, and how many rows it computes at once."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from datasets import DatasetDict
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from adapters.four_bit import count_weights
from speed.activations import FLOAT32, Shape, decoder_layers, end_matrix, kept_bytes
from speed.memory import TrainingSetup, batch_shape, estimate_memory, evaluation_bytes, step_bytes
from storage.fingerprints import fingerprint
from trial.throughput import step_operations

if TYPE_CHECKING:
    from trial.context import Trial

GPU_TYPES = ("cuda",)
# Of the free memory, for what the estimate does not cover. A CPU's is rough, and other processes share its memory.
MEMORY_MARGIN = {"cpu": 0.15, "gpu": 0.05}
CHEAP_SHARE = 1 / 8  # of a step's operations: recomputing less than this is always worth the memory
REFERENCE_ROWS = (64, 32, 16, 8, 4, 2, 1)  # pairs of a batch of the reference pass, to choose from
# DPO losses that are no mean over a batch's pairs: they depend on which pairs are computed together.
BATCH_LOSSES = {"aot", "aot_unpaired", "sft"}


class CannotEstimate(Exception):
    """A model whose memory `speed/memory.py` cannot estimate."""


class CheckpointingChoice(NamedTuple):
    """Of which layers to checkpoint the activations, and why: of every n-th, or of none if `every` is 0."""

    every: int
    reason: str

    def __str__(self) -> str:
        of = "off" if not self.every else "on" if self.every == 1 else f"of one layer in {self.every}"
        return f"activation checkpointing {of} ({self.reason})"


def free_memory(device_type: str) -> int:
    """Return the bytes that this process may fill on its device, including what it already holds."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # a container may have less than its machine
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(statistics["inactive_file"]))  # the page cache makes room
    mine = psutil.Process().memory_info()
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + mine.rss - getattr(mine, "shared", 0)


def usable_memory(free: float, device_type: str) -> float:
    """Return the bytes that an estimate may fill of the `free` ones."""
    return (1 - MEMORY_MARGIN["gpu" if device_type in GPU_TYPES else "cpu"]) * free


def resident_memory() -> int:
    """Return the bytes that this process occupies."""
    return psutil.Process().memory_info().rss


def choose_checkpointing(
    setting: bool | None, model: PreTrainedModel, needed: Callable[[int], float], usable: float, partial: bool = True
) -> CheckpointingChoice:
    """Decide which layers are trained with activation checkpointing. Nothing else does; `suit_hardware` applies it.

    `setting` is what the YAML says (None: nothing). `needed` returns the bytes that a training needs which checkpoints
    every n-th layer (0: none), of `usable` ones; it is called only if they decide, and raises `CannotEstimate` where it
    cannot tell. Without `partial` it is all layers or none.

    It is all layers, too, if recomputing costs next to nothing. For each token a forward pass takes 2 P operations with
    the P weights of the layers, and a step 6 P: as many for the gradients of what goes in, and of the weights. The W
    weights of the output layer take 8 W, as TRL's loss projects onto the vocabulary twice. Frozen weights need no
    gradients of their own: with an adapter of A weights in the layers, 2 (P + A) are added to 4 P + 6 A + 6 W (8 W if
    it trains rows of new tokens). This assumes that every token is supervised.
    """
    if setting is not None:
        return CheckpointingChoice(int(setting), "as set")
    layers, output = list(decoder_layers(model).parameters()), list(model.get_output_embeddings().parameters())
    of_output = 2 * count_weights(end_matrix(model, output=True))
    step = step_operations(layers) + of_output * (4 if any(weight.requires_grad for weight in output) else 3)
    share = 2 * sum(map(count_weights, layers)) / step
    if share < CHEAP_SHARE:
        return CheckpointingChoice(1, f"recomputing adds only {share:.0%} to a step")
    count = len(decoder_layers(model))
    # If the last layer is one of them, it is recomputed while all others still keep theirs: nothing is saved by it.
    fewest_first = [n for n in range(count, 1, -1) if (count - 1) % n] if partial else []
    try:
        reason = f"about {needed(0) / 1e9:.1f} GB needed without it, {usable / 1e9:.1f} usable"
        return CheckpointingChoice(next((n for n in (0, *fewest_first) if needed(n) <= usable), 1), reason)
    except CannotEstimate as error:
        return CheckpointingChoice(1, f"{model.config.model_type}'s memory cannot be estimated: {error}")


def merge_batches(args: SFTConfig | DPOConfig, rows: int, fits: Callable[[int], bool]) -> int:
    """Return how many of a step's micro-batches to compute at once: as many as fit and leave its gradient the same.

    A step's rows are the same, as they are taken in the same order. SFT's loss is a mean over the step's tokens. DPO's
    is a mean over micro-batches, which must therefore be of one size; so must those of several ranks, or accelerate
    would repeat other rows to complete the last ones. `rows` are those of an epoch.
    """
    pairs = isinstance(args, DPOConfig)
    if pairs and BATCH_LOSSES & {*args.loss_type}:
        return 1
    any_size = not pairs and args.world_size == 1 and not args.dataloader_drop_last
    for merged in range(args.gradient_accumulation_steps, 1, -1):
        whole = any_size or rows % (merged * args.per_device_train_batch_size * args.world_size) == 0
        if args.gradient_accumulation_steps % merged == 0 and whole and fits(merged):
            return merged
    return 1


def fit_memory(
    trial: Trial, model: PreTrainedModel, dataset: DatasetDict, setup: TrainingSetup, process: int, padding_free: bool
) -> list[str]:
    """Choose activation checkpointing and, on a GPU, the sizes of batches, and return what was chosen.

    `setup` is the training's without activation checkpointing, `process` the bytes of this process without its models.
    If memory runs out all the same, `trial.memory_ran_out` is the file to leave: another start then chooses the least.
    """
    hparams, args, on_gpu = trial.hparams, trial.hparams.args, setup.device_type in GPU_TYPES
    pairs, given = isinstance(args, DPOConfig), hparams.activation_checkpointing

    @functools.cache
    def shape(part: str, rows: int) -> Shape:
        return batch_shape(args, dataset[part], rows, packing=hparams.packing, pairs=pairs, padding_free=padding_free)

    ran_out_file = trial.cache / f"memory-ran-out-{memory_key(model, args, setup)}"
    # All ranks must choose alike: under FSDP they recompute together.
    mine = (process, free_memory(setup.device_type), ran_out_file.exists())
    processes, free, exists = zip(*trial.core_context.distributed.allgather(mine), strict=True)
    usable, ran_out = usable_memory(min(free), setup.device_type), any(exists)

    def needed(checkpoint_every: int, merged: int = 1) -> int:
        changed = replace(
            setup,
            checkpoint_every=setup.checkpoint_every or checkpoint_every,
            accumulates=args.gradient_accumulation_steps > merged,
        )
        try:
            train = shape("train", merged * args.per_device_train_batch_size)
            evaluation = shape("test", args.per_device_eval_batch_size)
            return estimate_memory(model, changed, train, evaluation, max(processes)).total
        except (AttributeError, RuntimeError) as error:  # a config without the usual names, on every rank
            raise CannotEstimate(error) from error

    # DPOTrainer (TRL 1.16) checkpoints all layers again after each pass of a reference that stays in memory.
    partial = not setup.reference and isinstance(decoder_layers(model)[0], GradientCheckpointingLayer)
    checkpointing = choose_checkpointing(given, model, needed, usable, partial)
    if ran_out and given is None:
        checkpointing = CheckpointingChoice(1, f"memory ran out before: {ran_out_file}")
    args.activation_checkpointing = args.gradient_checkpointing = checkpointing.every > 0  # TRL 1.16 reads the latter
    if checkpointing.every > 1:
        kwargs: Any = args.activation_checkpointing_kwargs or {}
        args.activation_checkpointing_kwargs = {**kwargs, "every_n_layers": checkpointing.every}
    choices, merged = [str(checkpointing)], 1
    if on_gpu and padding_free and not hparams.packing and not ran_out:
        with contextlib.suppress(CannotEstimate):
            merged = merge_batches(args, len(dataset["train"]), lambda n: needed(checkpointing.every, n) <= usable)
            if isinstance(args, DPOConfig) and args.precompute_ref_log_probs and args.precompute_ref_batch_size is None:
                of_pairs, rows = functools.partial(shape, "train"), args.per_device_train_batch_size
                args.precompute_ref_batch_size = choose_reference_batch(model, setup, of_pairs, rows)
    if merged > 1:
        memory = f"about {needed(checkpointing.every, merged) / 1e9:.1f} GB"
        args.per_device_train_batch_size *= merged
        args.gradient_accumulation_steps //= merged
        rows, batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
        choices.append(f"{rows} rows a batch, {batches} {'batch' if batches == 1 else 'batches'} a step ({memory})")
    if merged > 1 or (checkpointing.every != 1 and given is None):
        trial.memory_ran_out = ran_out_file
    kept_bytes.cache_clear()  # its keys hold on to the model
    return choices


def choose_reference_batch(
    model: PreTrainedModel, setup: TrainingSetup, shape: Callable[[int], Shape], rows: int
) -> int:
    """Return how many pairs DPO's reference pass computes at once; `shape` is that of the largest batch of so many.

    Its log-probs do not depend on it (but for their last bits), so it takes more than training does: as many as fit
    where the gradients will be or, as those of an adapter are small, what a training step of `rows` pairs needs at
    least. That is the same for all trials of a grid over other things, whatever else is in memory.
    """
    gradients = FLOAT32 * model.num_parameters(only_trainable=True) // (setup.devices if setup.fsdp else 1)
    try:
        room = max(gradients, step_bytes(model, replace(setup, checkpoint_every=1), shape(rows), gradients))
        return next((n for n in REFERENCE_ROWS if evaluation_bytes(model, setup, shape(n)) <= room), 1)
    except (AttributeError, RuntimeError) as error:
        raise CannotEstimate(error) from error


def memory_key(model: PreTrainedModel, args: SFTConfig | DPOConfig, setup: TrainingSetup) -> str:
    """Return a key for what the memory of a training depends on, as far as it is known before the data."""
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    sizes = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.per_device_eval_batch_size)
    of_model = (model.config.to_json_string(), str(model))  # with its adapters
    return fingerprint(*of_model, device, str(setup), *sizes, args.max_length, type(args).__name__)
