"""What suits the hardware at hand, wherever a YAML leaves it open: one home for the defaults that make a training fast.

bf16 autocast             on GPUs that have it, and on CPUs with instructions for it (without, bf16 is emulated: a
                          hundred times slower than float32). Weights, gradients and AdamW's state stay float32.
activation checkpointing  only where a training would not fit the memory without it: it computes a third more.
padding, prompts of pairs not computed: padding_free.py
output layer, embeddings  computed where there is a label, and one gradient for both: output_layer.py
attention, optimizer      PyTorch's SDPA and fused AdamW, which transformers takes by itself
"""

import os
from typing import TYPE_CHECKING, Any

import psutil
import torch
from datasets import DatasetDict
from transformers import PreTrainedModel
from transformers.utils import is_torch_bf16_gpu_available

from memory import FLOAT32, computed_lengths, estimate_memory, largest_batch, resident
from output_layer import add_embedding_gradient_in_place, fit_fused_head_to_cpu
from padding_free import remove_padding

if TYPE_CHECKING:
    from trial import Trial

SPARE = 0.15  # of the free memory, for what no estimate knows of


def has_bf16() -> bool:
    """Whether the device that is trained on computes in bf16, rather than emulate it."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return is_torch_bf16_gpu_available()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def free_memory() -> int:
    """Bytes that this process may fill on its device, what it holds already included."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    available = psutil.virtual_memory().available
    try:  # a container may have less than its machine
        limit, used = (int(open(f"/sys/fs/cgroup/memory.{name}").read()) for name in ("max", "current"))
        available = min(available, limit - used)
    except (OSError, ValueError):
        pass
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + resident()


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
    if hparams.checkpointing_left_open:
        args.activation_checkpointing = False
        batches = {"train": args.per_device_train_batch_size, "test": args.per_device_eval_batch_size}
        if getattr(args, "packing", False):  # by TRL, later
            shapes = [(size, args.max_length) for size in batches.values()]
        else:
            shapes = [
                largest_batch(computed_lengths(dataset[part], pairs, padding_free), size, padding_free)
                for part, size in batches.items()
            ]
        loaded = FLOAT32 * model.num_parameters() * (1 if reference is None else 2)
        process = max(0, resident() - loaded)
        estimate = estimate_memory(model, args, *shapes, args.world_size, device, process)
        # All ranks alike: under FSDP they compute together what is computed again.
        fits, needed, free = trial.core_context.distributed.broadcast(
            (estimate.total < (1 - SPARE) * (free := free_memory()), estimate.total, free)
        )
        args.activation_checkpointing = not fits
        told.append(
            f"activation checkpointing {'off' if fits else 'on'}: without it {needed / 1e9:.1f} GB at the most, of"
            f" {free / 1e9:.1f}"
        )
    else:
        told.append(f"activation checkpointing {'on' if args.activation_checkpointing else 'off'}")
    args.gradient_checkpointing = args.activation_checkpointing  # TRL 1.16 reads the old name
    trial.status("training with " + "; ".join(told))
