"""Estimate and show the memory of a dry run's trials, on this machine and on GPUs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from experiment.dry_run_output import Table
from experiment.kinds import Hyperparameters
from speed.activations import adapters_of
from speed.fitting import choose_checkpointing, free_memory, usable_memory
from speed.memory import MemoryEstimate, TrainingSetup, batch_shape, estimate_memory

if TYPE_CHECKING:
    from experiment.dry_run import TrainingData

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", None: "fp32"}


def gpu_dtype(hparams: Hyperparameters) -> torch.dtype | None:
    """Return the type of autocast on a GPU, which would use bf16; None: float32. `args` are made for this machine."""
    bf16 = hparams.training_args.get("bf16", not hparams.args.fp16)
    return torch.bfloat16 if bf16 else torch.float16 if hparams.args.fp16 else None


def model_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model without values as it is where the frozen weights under its adapters have the type `dtype`."""
    model, adapters = copy.deepcopy(model), adapters_of(model).keys()
    for name, weight in model.named_parameters():
        if adapters and not adapters & {*name.split(".")}:
            weight.data = weight.data.to(dtype)
    return model


def describe_parameters(model: PreTrainedModel, hparams: Hyperparameters) -> str:
    """Return how many parameters a model has and, with an adapter, how many are trained and what holds the others."""
    total = f"{model.num_parameters():,} parameters"
    if hparams.lora_config is None:
        return total
    trained = model.num_parameters(only_trainable=True)
    dtype = PRECISIONS[hparams.base_dtype_where(gpu_dtype(hparams) or torch.float32)]
    held = f"4 bits (NF4), embeddings in {dtype}" if hparams.load_in_4bit else dtype
    share = f"LoRA trains {trained:,} of them ({trained / model.num_parameters():.2%})"
    return f"{total}; {share}, the others are frozen, on a GPU in {held}"


def tabulate_memory(lines: list[tuple[Any, ...]], trials: int) -> Table:
    """Return the memory of each way of training, with the trials that use it. `lines` end with a trial id."""
    held = ["weights", "gradients", "optimizer", "activations", "process", "total"]
    trials_of: dict[tuple[str, ...], list[int]] = {}
    for where, estimate, trial_id in lines:
        sizes = [getattr(estimate, name) / 1e9 for name in held]
        trials_of.setdefault((where, *(f"{size:.2f}" if size else "" for size in sizes)), []).append(trial_id)
    which = ["" if len(ids) == trials else f": {name_trials(ids)}" for ids in trials_of.values()]
    cells = [(where + ids, *sizes) for (where, *sizes), ids in zip(trials_of, which, strict=True)]
    note = "For a batch of the longest rows. On a GPU, CUDA takes another 0.5 GB. The formula is in speed/memory.py."
    return Table("Estimated peak memory, in GB", pd.DataFrame(cells, columns=["", *held]), note)


def estimate_trial(
    data: TrainingData, hparams: Hyperparameters, slots: int, process: int
) -> Iterator[tuple[str, MemoryEstimate]]:
    """Yield the way of training and its memory: for one process on this machine, then for the slots as GPUs."""
    args, given = hparams.args, hparams.training_args
    sizes = {"train": args.per_device_train_batch_size, "test": args.per_device_eval_batch_size}
    options = {"packing": hparams.packing, "pairs": data.kind.pairs, "padding_free": data.padding_free}
    shapes = [batch_shape(args, data.remaining_rows[part], size, **options) for part, size in sizes.items()]
    on_gpu, four_bit = torch.cuda.is_available(), hparams.load_in_4bit
    fused = data.padding_free and given.get("torch_compile") is None  # on a GPU
    here = TrainingSetup.from_args(
        args, fused and on_gpu, hparams.loads_reference, 1, "cuda" if on_gpu else "cpu", four_bit
    )

    def estimate(setup: TrainingSetup, every: int) -> MemoryEstimate:
        setup = replace(setup, checkpoint_every=setup.checkpoint_every or every)
        model = data.model_of(hparams, hparams.base_dtype_where(setup.dtype or torch.float32))
        return estimate_memory(model, setup, shapes[0], shapes[1], process)

    def choose(needed: Callable[[int], float], usable: float) -> int:
        model = data.model_of(hparams)
        return choose_checkpointing(hparams.activation_checkpointing, model, needed, usable, partial=False).every

    label = ", activation checkpointing" if hparams.activation_checkpointing is None else ""
    held = ", 4 bits" if four_bit else ""
    if on_gpu or not four_bit:
        usable = usable_memory(free_memory(here.device_type), here.device_type)
        every = choose(lambda every: estimate(here, every).total, usable)
        yield f"{here.device_type.upper()} here" + held + label * bool(every), estimate(here, every)

    dtype = gpu_dtype(hparams)
    fsdp = slots > 1 and bool(given.get("fsdp"))
    gpu = replace(here, dtype=dtype, fused=fused, fsdp=fsdp, devices=slots, device_type="cuda")
    where = f"each of {slots} GPUs" if slots > 1 else "a GPU"
    where += f", {PRECISIONS[dtype]}{held}" + (", FSDP" if gpu.fsdp else "")
    # The GPU's memory is not known: if it decides, show both choices.
    for every in sorted({choose(lambda every: 0, 1), choose(lambda every: 1, 0)}):
        yield where + label * bool(every), estimate(gpu, every)


def name_trials(trial_ids: list[int]) -> str:
    """Return the trials as a phrase: `trial 1`, `trials 1, 3`."""
    return ("trial " if len(trial_ids) == 1 else "trials ") + ", ".join(map(str, trial_ids))
