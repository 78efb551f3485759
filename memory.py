"""How much memory a training will need on a device, found without weights and without training."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

FLOAT32 = 4  # bytes of a number
# Bytes of an optimizer's state, per parameter; another one is taken for AdamW, with its two moments.
OPTIMIZER_STATE = {
    "sgd": 0,
    "adafactor": 0,
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
}
OPTIMIZER_STATE |= {"lion_8bit": 1, "adagrad": 4, "rmsprop": 4}
ADAMW_STATE = 8
TILE = (
    4096,
    32_768,
)  # tokens and entries of the vocabulary that TRL 1.16 projects at once (kernels/chunked_logprob.py)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a device at a training's peak, by what holds them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # and whatever else a step holds for a while
    process: int  # Python, its libraries, the tokenizer and the data; on a GPU these are elsewhere

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.process


def estimate_memory(
    model: PreTrainedModel,
    args: SFTConfig | DPOConfig,
    train_shape: tuple[int, int],
    eval_shape: tuple[int, int],
    devices: int,
    device_type: str,
    process: int,
) -> MemoryEstimate:
    """Bytes that a training of `model` (on the meta device) holds at its peak, on each of `devices`.

    A shape is the number of sequences in the largest batch (two for each of DPO's pairs) and their length in tokens.
    With P parameters, of which E embed the vocabulary, all float32 (`hyperparameters.build_training_args`):

        weights        4 P, and 4 P more for DPO's reference, unless its log-probs are precomputed
        gradients      4 P
        optimizer      8 P for AdamW's two moments
        activations    the largest of what is held, beside those three, at
                       - the start of the backward pass: what autograd has saved, S, and what the loss works on, L, with
                         the gradient of the output layer, but (without accumulation) none of the others yet
                       - its end: where the output layer is the embedding, the gradients of both, until they are summed
                       - AdamW's step on a CPU, unless it is fused: two temporaries of the largest parameter
                       - an evaluation: no gradients, one layer's share of S, and L
        process        on a CPU `process`: for one that has imported and loaded what a training does but weights, that
                       is `resident()`

    S is counted, not calculated: a forward pass of the shape over fake tensors, which have no memory, with a hook on
    what autograd saves. With activation checkpointing that is little, and one layer's S is saved anew at a time. L is
    tiles of at most 4096 tokens by 32,768 entries of the vocabulary: eight of them on a CPU (five in an evaluation),
    one in autocast's precision on a GPU.

    FSDP divides weights, gradients and optimizer by `devices`, and gathers one layer and the embedding at a time.
    """
    text, parameters = model.config.get_text_config(), sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    checkpointing = bool(getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing)
    shards = devices if args.fsdp else 1

    weights = FLOAT32 * parameters
    gradients = FLOAT32 * parameters
    optimizer = OPTIMIZER_STATE.get(args.optim.removesuffix("_torch"), ADAMW_STATE) * parameters
    reference = isinstance(args, DPOConfig) and not args.precompute_ref_log_probs

    def loss(shape: tuple[int, int], tiles: int) -> int:
        size = min(shape[0] * shape[1], TILE[0]) * min(text.vocab_size, TILE[1])
        return tiles * FLOAT32 * size if device_type == "cpu" else size * (autocast or torch.float32).itemsize

    saved = saved_by_autograd(model, train_shape, autocast, False)
    layer = saved // text.num_hidden_layers
    if checkpointing:
        saved = saved_by_autograd(model, train_shape, autocast, True) + layer
    output_layer = FLOAT32 * embedding
    other_gradients = 0 if args.gradient_accumulation_steps == 1 else gradients // shards
    backward_start = saved + loss(train_shape, 8) + output_layer + other_gradients - gradients // shards
    backward_end = output_layer if tied else 0
    unfused = device_type == "cpu" and args.optim == "adamw_torch"
    step = 2 * FLOAT32 * max(parameter.numel() for parameter in model.parameters()) if unfused else 0
    evaluated = layer * eval_shape[0] * eval_shape[1] // (train_shape[0] * train_shape[1])
    evaluation = evaluated + loss(eval_shape, 5) - gradients // shards
    gathered = FLOAT32 * embedding + weights // text.num_hidden_layers if shards > 1 else 0
    return MemoryEstimate(
        weights=weights * (2 if reference else 1) // shards,
        gradients=gradients // shards,
        optimizer=optimizer // shards,
        activations=gathered + max(backward_start, backward_end, step, evaluation, 0),
        process=process if device_type == "cpu" else 0,
    )


@functools.lru_cache(maxsize=64)
def saved_by_autograd(
    model: PreTrainedModel, shape: tuple[int, int], autocast: torch.dtype | None, checkpointing: bool
) -> int:
    """Bytes that autograd keeps of a forward pass of `shape` through the model's layers for the backward pass."""
    sizes: dict[int, int] = {}
    kept = []  # so that no storage is freed and its number given to another one

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(storage)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        fake = type(model)(model.config)
        if checkpointing:
            fake.gradient_checkpointing_enable()
        fake.train()
        batch = {name: torch.ones(shape, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        for parameter in fake.parameters():
            count(parameter)
        sizes = dict.fromkeys(sizes, 0)  # the weights are no activations
        precision = torch.autocast("cpu", dtype=autocast) if autocast else nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), precision:
            fake.base_model(**batch, use_cache=False)
    return sum(sizes.values())


def resident() -> int:
    """Bytes of this process that are in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0
