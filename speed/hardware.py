"""Choose the fastest way to train on the hardware at hand, wherever the YAML leaves it open.

bf16 autocast             on GPUs that have it, and on CPUs with instructions for it: `build_training_args`
activation checkpointing  if a training would not fit the memory without it, as it computes the layers' forward pass
                          twice; and if that costs next to nothing compared with the output layer
padding, prompts of pairs Padding is never computed; a pair's shared prompt is computed once: padding_free.py
batches                   copied to a GPU while the host goes on, from pinned memory
output layer, embeddings  computed only where there is a label; both ends share one gradient: output_layer.py
attention, optimizer      PyTorch's SDPA and fused AdamW, which transformers chooses by itself
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import psutil
import torch
from datasets import DatasetDict
from transformers import PreTrainedModel

from speed.memory import FLOAT32, TrainingSetup, decoder_layers, estimate_memory, largest_batches
from speed.output_layer import adapt_fused_head_to_cpu, add_embedding_gradient_in_place
from speed.padding_free import remove_padding, why_padded

if TYPE_CHECKING:
    from trial.context import Trial

MEMORY_MARGIN = 0.15  # of the free memory, for what the estimate does not cover
CHEAP_SHARE = 1 / 8  # of a step's operations: recomputing less than this is always worth the memory


class CannotEstimate(Exception):
    """A model whose memory `speed/memory.py` cannot estimate."""


class CheckpointingChoice(NamedTuple):
    """Whether to train with activation checkpointing, and why."""

    on: bool
    reason: str


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


def resident_memory() -> int:
    """Return the bytes that this process occupies."""
    return psutil.Process().memory_info().rss


def choose_checkpointing(
    setting: bool | None, model: PreTrainedModel, measure: Callable[[], tuple[int, int]]
) -> CheckpointingChoice:
    """Decide whether to train with activation checkpointing. Nothing else does; `suit_hardware` applies it.

    `setting` is what the YAML says (None: nothing). `measure` returns the bytes needed without checkpointing and the
    bytes that are free; it is called only if they decide. It raises `CannotEstimate` where it cannot tell.
    """
    if setting is not None:
        return CheckpointingChoice(setting, "as set")
    # With P weights in the layers and W in the output layer, a forward pass of 2 P operations is added to a step of
    # 6 P + 8 W, as TRL's loss projects onto the vocabulary twice. (This assumes that every token is supervised.)
    layers = sum(parameter.numel() for parameter in decoder_layers(model).parameters())
    share = 2 * layers / (6 * layers + 8 * model.get_output_embeddings().weight.numel())
    if share < CHEAP_SHARE:
        return CheckpointingChoice(True, f"recomputing adds only {share:.0%} to a step")
    try:
        needed, free = measure()
    except CannotEstimate as error:
        return CheckpointingChoice(True, f"{model.config.model_type}'s memory cannot be estimated: {error}")
    reason = f"at most {needed / 1e9:.1f} GB needed without it, {free / 1e9:.1f} free"
    return CheckpointingChoice(needed > (1 - MEMORY_MARGIN) * free, reason)


def suit_hardware(
    trial: Trial, model: PreTrainedModel, dataset: DatasetDict, *, pairs: bool, reference: PreTrainedModel | None = None
) -> None:
    """Set up the models and what `trial.hparams.args` leaves open for the fastest training that fits, and log it.

    Call it once, before the trainer is built. It changes how a step is computed, not what is learned from it. `pairs`
    says whether a row of the tokenized `dataset` is two sequences; `reference` is DPO's, if it stays in memory.
    """
    hparams, args = trial.hparams, trial.hparams.args
    why = why_padded(model, args)
    models = [model] if reference is None else [model, reference]
    if why is None:
        for each in models:
            remove_padding(each, pairs)
    if args.device.type == "cuda":
        cast(Any, args.accelerator_config).non_blocking = args.dataloader_pin_memory
    choices = [
        "bf16 autocast over float32 weights" if args.bf16 else "fp16 autocast" if args.fp16 else "float32",
        f"padded batches ({why})" if why else "no padding" + (", a pair's prompt once" if pairs else ""),
    ]
    if args.device.type == "cpu" and not adapt_fused_head_to_cpu():
        choices.append("logits at every position, as this release of TRL is not known here")
    if args.world_size == 1 and not (args.torch_compile or args.deepspeed):
        add_embedding_gradient_in_place(model)

    def measure() -> tuple[int, int]:
        process = max(0, resident_memory() - len(models) * FLOAT32 * model.num_parameters())
        setup = TrainingSetup.from_args(args, reference is not None, args.world_size, args.device.type)
        try:
            shapes = largest_batches(args, dataset, packing=hparams.packing, pairs=pairs, padding_free=why is None)
            needed = estimate_memory(model, setup, *shapes, process).total
        except (AttributeError, RuntimeError) as error:  # a config without the usual names, on every rank
            raise CannotEstimate(error) from error
        # All ranks must choose alike: under FSDP they recompute together.
        ranks = trial.core_context.distributed.allgather((needed, free_memory(args.device.type)))
        return max(needed for needed, _ in ranks), min(free for _, free in ranks)

    checkpointing = choose_checkpointing(hparams.activation_checkpointing, model, measure)
    args.activation_checkpointing = args.gradient_checkpointing = checkpointing.on  # TRL 1.16 reads the latter
    choices.append(f"activation checkpointing {'on' if checkpointing.on else 'off'} ({checkpointing.reason})")
    if why is None and args.ddp_find_unused_parameters is None:
        # These families have none; without checkpointing the Trainer would have DDP look for them in every step.
        args.ddp_find_unused_parameters = False
    trial.status("training with " + "; ".join(choices))
