"""What suits the hardware at hand, wherever a YAML leaves it open: one home for the defaults that make a training fast.

bf16 autocast             on GPUs that have it, and on CPUs with instructions for it (without, bf16 is emulated: a
                          hundred times slower than float32). Weights, gradients and AdamW's state stay float32.
activation checkpointing  only where a training would not fit the memory without it: it computes a third more.
padding, prompts of pairs not computed: padding_free.py
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

from memory import FLOAT32, estimate_memory, largest_batches, resident
from output_layer import add_embedding_gradient_in_place, fit_fused_head_to_cpu
from padding_free import remove_padding

if TYPE_CHECKING:
    from trial import Trial

SPARE = 0.15  # of the free memory, for what no estimate knows of
NEXT_TO_NOTHING = 1 / 8  # of a step's operations


def free_memory() -> int:
    """Bytes that this process may fill on its device, what it holds already included."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # a container may have less than its machine
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        available = min(available, limit - used)
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + resident()


def recomputed_share(model: PreTrainedModel) -> float:
    """What activation checkpointing adds to a training step's operations, as a share of them.

    With P weights in the layers and W in the output layer: a forward pass 2 P over the step's 6 P + 8 W, as TRL's loss
    projects onto the vocabulary twice. (Every token taken for supervised.)
    """
    output = model.get_output_embeddings().weight.numel()
    layers = sum(parameter.numel() for parameter in model.get_decoder().layers.parameters())
    return 2 * layers / (6 * layers + 8 * output)


def wants_checkpointing(model: PreTrainedModel, needed: int, free: int) -> tuple[bool, str]:
    """Whether to train with activation checkpointing, and why: of `free` bytes, `needed` are without it."""
    if (share := recomputed_share(model)) < NEXT_TO_NOTHING:
        return True, f"it adds {share:.0%} to a step"
    return needed > (1 - SPARE) * free, f"up to {needed / 1e9:.1f} GB without it, of {free / 1e9:.1f}"


def suit_hardware(
    trial: "Trial", model: PreTrainedModel, dataset: DatasetDict, reference: PreTrainedModel | None = None
) -> None:
    """Set up the models, and what `trial.hparams.args` leaves open, for the fastest training that fits; and tell it.

    Call it once, before the trainer is built. It changes how a step is computed, not what is learned from it.
    """
    hparams, args = trial.hparams, trial.hparams.args
    pairs, device = hparams.in_pairs, args.device.type
    told = ["bf16 autocast over float32 weights" if args.bf16 else "fp16 autocast" if args.fp16 else "float32"]
    padding_free = remove_padding(model, pairs)
    if reference is not None:
        remove_padding(reference, pairs)
    if padding_free:
        told.append("no padding" + (", a pair's prompt once" if pairs else ""))
    else:
        told.append(f"padded batches ({model.config.model_type}, {model.config._attn_implementation} attention)")
    if device == "cpu" and not fit_fused_head_to_cpu():
        told.append("the vocabulary at every position, as this TRL is not known")
    if args.world_size == 1:
        add_embedding_gradient_in_place(model)
    reason = "as asked"
    if hparams.checkpointing_left_open:
        args.activation_checkpointing = False
        loaded = FLOAT32 * model.num_parameters() * (1 if reference is None else 2)
        shapes = largest_batches(args, dataset, pairs, padding_free)
        estimate = estimate_memory(model, args, *shapes, args.world_size, device, process=max(0, resident() - loaded))
        # All ranks alike: under FSDP they compute again together.
        needed, free = trial.core_context.distributed.broadcast((estimate.total, free_memory()))
        args.activation_checkpointing, reason = wants_checkpointing(model, needed, free)
    told.append(f"activation checkpointing {'on' if args.activation_checkpointing else 'off'} ({reason})")
    args.gradient_checkpointing = args.activation_checkpointing  # TRL 1.16 reads the old name
    trial.status("training with " + "; ".join(told))
