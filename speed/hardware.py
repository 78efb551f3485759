"""What suits the hardware at hand, wherever a YAML leaves it open: one home for the defaults that make a training fast.

bf16 autocast             on GPUs that have it, and on CPUs with instructions for it: `build_training_args`
activation checkpointing  where a training would not fit the memory without it, as it computes the layers' forward
                          pass twice; and where that is next to nothing beside the vocabulary's share of a step
padding, prompts of pairs the one is not computed, the others once: padding_free.py
output layer, embeddings  computed where there is a label, and one gradient for both: output_layer.py
attention, optimizer      PyTorch's SDPA and fused AdamW, which transformers takes by itself
"""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from datasets import DatasetDict
from transformers import PreTrainedModel

from speed.memory import FLOAT32, decoder_layers, estimate_memory, largest_batches, resident
from speed.output_layer import add_embedding_gradient_in_place, fit_fused_head_to_cpu
from speed.padding_free import remove_padding, why_padded

if TYPE_CHECKING:
    from trial.context import Trial

SPARE = 0.15  # of the free memory, for what no estimate knows of
NEXT_TO_NOTHING = 1 / 8  # of a step's operations


def free_memory(device_type: str) -> int:
    """Bytes that this process may fill on its device, what it holds already included."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # a container may have less than its machine
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(statistics["inactive_file"]))  # files' pages make room
    mine = psutil.Process().memory_info()
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + mine.rss - getattr(mine, "shared", 0)


def recomputed_share(model: PreTrainedModel) -> float:
    """What activation checkpointing adds to a training step's operations, as a share of them.

    With P weights in the layers and W in the output layer: a forward pass 2 P over the step's 6 P + 8 W, as TRL's loss
    projects onto the vocabulary twice. (Every token taken for supervised.)
    """
    output = model.get_output_embeddings().weight.numel()
    layers = sum(parameter.numel() for parameter in decoder_layers(model).parameters())
    return 2 * layers / (6 * layers + 8 * output)


def cheap_to_recompute(model: PreTrainedModel) -> bool:
    """Whether a model is trained with activation checkpointing however much memory there is."""
    return recomputed_share(model) < NEXT_TO_NOTHING


def wants_checkpointing(model: PreTrainedModel, needed: int, free: int) -> tuple[bool, str]:
    """Whether to train with activation checkpointing, and why: of `free` bytes, `needed` are without it."""
    if cheap_to_recompute(model):
        return True, f"recomputing adds only {recomputed_share(model):.0%} to a step"
    return needed > (1 - SPARE) * free, f"at most {needed / 1e9:.1f} GB needed without it, {free / 1e9:.1f} free"


def suit_hardware(
    trial: "Trial", model: PreTrainedModel, dataset: DatasetDict, reference: PreTrainedModel | None = None
) -> None:
    """Set up the models, and what `trial.hparams.args` leaves open, for the fastest training that fits; and tell it.

    Call it once, before the trainer is built. It changes how a step is computed, not what is learned from it.
    """
    hparams, args = trial.hparams, trial.hparams.args
    told = ["bf16 autocast over float32 weights" if args.bf16 else "fp16 autocast" if args.fp16 else "float32"]

    why = why_padded(model, args)
    if why is None:
        remove_padding(model, hparams.in_pairs)
        if reference is not None:
            remove_padding(reference, hparams.in_pairs)
    told.append(
        f"padded batches ({why})" if why else "no padding" + (", a pair's prompt once" if hparams.in_pairs else "")
    )

    if args.device.type == "cpu" and not fit_fused_head_to_cpu():
        told.append("the vocabulary at every position, as this TRL is not known")
    if args.world_size == 1 and not (args.torch_compile or args.deepspeed):
        add_embedding_gradient_in_place(model)

    reason = "as set"
    if hparams.checkpointing is None:
        reason = choose_checkpointing(trial, model, dataset, why is None, models=1 if reference is None else 2)
    args.gradient_checkpointing = args.activation_checkpointing  # TRL 1.16 reads the old name
    told.append(f"activation checkpointing {'on' if args.activation_checkpointing else 'off'} ({reason})")
    if why is None and args.ddp_find_unused_parameters is None:
        # These families have none; without checkpointing the Trainer would have DDP look for them in every step.
        args.ddp_find_unused_parameters = False
    trial.status("training with " + "; ".join(told))


def choose_checkpointing(
    trial: "Trial", model: PreTrainedModel, dataset: DatasetDict, padding_free: bool, models: int
) -> str:
    """Set `args.activation_checkpointing`, with `models` in memory by now; returns why."""
    args, distributed = trial.hparams.args, trial.core_context.distributed
    needed = free = 0
    if not cheap_to_recompute(model):
        process = max(0, resident() - models * FLOAT32 * model.num_parameters())
        args.activation_checkpointing = False
        try:
            shapes = largest_batches(args, dataset, trial.hparams.in_pairs, padding_free)
            estimate = estimate_memory(model, args, *shapes, args.world_size, args.device.type, process)
        except (AttributeError, RuntimeError) as error:  # a config without the usual names
            args.activation_checkpointing = True
            return f"{model.config.model_type}'s memory cannot be estimated: {error}"
        # All ranks alike: under FSDP they compute again together.
        ranks = distributed.allgather((estimate.total, free_memory(args.device.type)))
        needed, free = max(rank[0] for rank in ranks), min(rank[1] for rank in ranks)
    args.activation_checkpointing, reason = wants_checkpointing(model, needed, free)
    return reason
