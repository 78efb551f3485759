"""Choose the fastest way to train on the hardware at hand, wherever the YAML leaves it open.

bf16 autocast             on GPUs that have it, and on CPUs with instructions for it: `build_training_args`
decoder layers            compiled on a GPU: compiled_layers.py
activation checkpointing  of as many layers as a training needs to fit the memory, as it computes their forward pass
                          twice; of all, if that costs next to nothing compared with the output layer: fitting.py
batches                   on a GPU, rows whose gradients are accumulated are computed in larger batches if these fit;
                          they are copied to it from pinned memory while the host goes on
padding, prompts of pairs Padding is never computed; a pair's shared prompt is computed once: padding_free.py
output layer, embeddings  computed only where there is a label; both ends share one gradient: output_layer.py
attention, optimizer      PyTorch's SDPA, without cuDNN's kernels, and fused AdamW, which transformers chooses by itself
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import DatasetDict
from transformers import PreTrainedModel

from adapters.stack import AdapterStack, base_model, lora_layers
from speed.compiled_layers import can_compile, compile_layers
from speed.fitting import GPU_TYPES, fit_memory, resident_memory
from speed.memory import TrainingSetup
from speed.output_layer import adapt_fused_head_to_cpu, add_embedding_gradient_in_place
from speed.padding_free import remove_padding, why_padded

if TYPE_CHECKING:
    from trial.context import Trial


def attend_without_plans() -> None:
    """Have a GPU attend with kernels that serve every length: FlashAttention's, as a rule.

    On recent GPUs torch (2.11) takes cuDNN's first, which builds a plan for each new length and stride: a second or
    more each time (https://github.com/modelscope/FunASR/issues/3704; here a step on an H100 took 5.2 s instead of 1.1
    because its last batch had another shape). Real rows nearly all differ in length. This can go once torch serves all
    lengths with one plan (it has TORCH_CUDNN_SDPA_AVOID_RECOMPILE, as an experiment).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def describe_precision(hparams: Any, model: PreTrainedModel) -> list[str]:
    """Return in which types a training computes and, if it trains an adapter, what that is, as phrases."""
    autocast = "bf16" if hparams.args.bf16 else "fp16" if hparams.args.fp16 else None
    if hparams.lora_config is None:
        return [f"{autocast} autocast" + " over float32 weights" * (autocast == "bf16") if autocast else "float32"]
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    base = "4 bits (NF4)" if hparams.load_in_4bit else str(hparams.base_dtype).removeprefix("torch.")
    return [f"LoRA: {trained:,} float32 parameters on a frozen base in {base}"]


def suit_hardware(
    trial: Trial,
    model: PreTrainedModel | AdapterStack,
    dataset: DatasetDict,
    *,
    pairs: bool,
    reference: PreTrainedModel | None = None,
) -> None:
    """Set up the models and what `trial.hparams.args` leaves open for the fastest training that fits, and log it.

    Call it once, before the trainer is built. It changes how a step is computed, not what is learned from it. `pairs`
    says whether a row of the tokenized `dataset` is two sequences; `reference` is DPO's, if it stays in memory.
    """
    args, given = trial.hparams.args, trial.hparams.training_args
    model, adapters = base_model(model), lora_layers(model)
    why, on_gpu = why_padded(model, args), args.device.type in GPU_TYPES
    fused = on_gpu and why is None and can_compile(args, given.get("torch_compile"))
    models = [model] if reference is None else [model, reference]
    for each in models:
        if why is None:
            remove_padding(each, pairs)
        if fused:
            compile_layers(each, trial.cache)
    for layer in adapters:  # autocast casts what goes into an adapter; peft would cast it to float32 before
        layer.cast_input_dtype_enabled = not (args.bf16 or args.fp16)
    attend_without_plans()
    if on_gpu and "accelerator_config" not in given:
        cast(Any, args.accelerator_config).non_blocking = args.dataloader_pin_memory
    choices = [
        *describe_precision(trial.hparams, model),
        f"padded batches ({why})" if why else "no padding" + (", a pair's prompt once" if pairs else ""),
    ]
    if fused:
        choices.append("compiled decoder layers")
    if args.device.type == "cpu" and not adapt_fused_head_to_cpu():
        choices.append("logits at every position, as this release of TRL is not known here")
    if args.world_size == 1 and not (args.torch_compile or args.deepspeed):
        add_embedding_gradient_in_place(model)
    if why is None and args.ddp_find_unused_parameters is None:
        # These families have none; without checkpointing the Trainer would have DDP look for them in every step.
        args.ddp_find_unused_parameters = False
    devices, four_bit = (args.world_size, args.device.type), trial.hparams.load_in_4bit
    setup = TrainingSetup.from_args(args, fused, reference is not None, *devices, four_bit)
    held = sum(weight.nbytes for each in models for weight in each.parameters())
    process = max(0, resident_memory() - held)
    choices += fit_memory(trial, model, dataset, setup, process, padding_free=why is None)
    trial.status("training with " + "; ".join(choices))
