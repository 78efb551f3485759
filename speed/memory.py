"""An estimate of the memory that a training will need on each device, made from the model's config: no weights.

With P parameters, of which p are in the largest one (a language model's embeddings), micro-batches of N tokens (where
batches are padded: sequences x tokens of the longest), and 4 bytes for a float32 number, a device holds at its peak

    weights     4 P       twice with a reference model beside the policy: DPO without precomputed log-probs
    gradients   4 P       twice under DDP, whose buckets hold a second copy
    optimizer   s P       s = 8 bytes for AdamW: two moments of a parameter; STATE has the others
    process     CPU only: what Python, its libraries, the tokenizer and the data occupy: `resident()` of a process that
                has loaded what a training loads, but for the weights
    activations the largest of what comes and goes at these three moments:

      in a training step      A + 8 T + 4 p g
          A   what autograd keeps for the backward pass, K, counted by running the forward pass on tensors that have a
              shape but no memory: bytes of float32, or of bf16 or fp16 under autocast, copies of the weights included.
              (About 4 N L (10 d + 6 q + 4 f) for L layers of hidden size d, query width q = heads x head size and MLP
              width f, which is also what a model counts with that cannot run so.)
              With activation checkpointing only each layer's input, 4 N d, and K / L for the one layer that is being
              computed again
          T   a tile of logits: TRL's loss takes min(N, 4096) tokens by min(V, 32768) of a vocabulary of V words at a
              time, on a CPU by 512 (output_layer.py). There its backward pass has 8 results of that size at once, in
              float32; on a GPU one kernel overwrites the only one, which has autocast's type
          g   further gradients of the embeddings: 1 if gradients are accumulated, as the new one is added to the old;
              1 if they are the output layer too and there are several processes, as a gradient comes from either end
              of the model (output_layer.py spares it in one process)
      in the optimizer's step  one or two temporaries: see `step_temporaries`
      at an evaluation         K / L + 4 T of its own micro-batches: no backward pass, nothing kept; 1 T on a GPU

Under FSDP on D GPUs each holds 1 / D of weights, gradients and optimizer, and of its training step in addition a whole
layer and all that is in no layer, weights (4 bytes) and gradients (4 bytes). (On CPUs accelerate ignores FSDP.)

The sum errs upwards where activations are many: while they are there, not all gradients are. Memory that a CPU process
frees seldom leaves it, which makes up for that. Loading and saving hold a second copy of the weights, when there is no
gradient yet or any more, so neither decides. A GPU's own context, about half a gigabyte, is not counted.
"""

import copy
import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import psutil
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from speed import output_layer
from speed.padding_free import ATTENTION, Row, Run, can_remove_padding

logging.getLogger(FakeTensorMode.__module__).disabled = True  # see `usual_bytes` for what it would report

FLOAT32 = 4  # bytes
TILE_TOKENS, TILE_WORDS = 4096, 32768  # TRL 1.16: TOKEN_CHUNK_SIZE and, on a GPU, _CHUNKED_LOGPROB_CHUNK_SIZE
# Bytes of state a parameter has in an optimizer whose name begins so, in float32. Any other counts as AdamW.
STATE = {"sgd": 0, "adafactor": 0, "lomo": 0, "adalomo": 0, "adagrad": 4, "rmsprop": 4, "lion": 4, "ademamix": 12}

Shape = tuple[int, int]  # sequences and tokens of the longest: see `largest_batch`


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak, by what holds them."""

    weights: int  # a reference model's too
    gradients: int
    optimizer: int
    activations: int  # and whatever else comes and goes with a step
    process: int  # 0 on a GPU

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.process


def estimate_memory(
    model: PreTrainedModel,
    args: SFTConfig | DPOConfig,
    train_shape: Shape,
    eval_shape: Shape | None,
    devices: int,
    device_type: str,  # "cpu" or "cuda"; any other counts as a CPU, with TRL's own tiles
    process: int,
) -> MemoryEstimate:
    """The peak on each of `devices`. The formula is in this module's docstring.

    `model` may be on the meta device; with the vocabulary it will be trained with. The shapes are those of
    `largest_batch`; `eval_shape` is None where nothing is evaluated.
    """
    sharded = bool(args.fsdp) and devices > 1 and device_type == "cuda"
    shards = devices if sharded else 1
    weights = FLOAT32 * model.num_parameters() // shards
    gradients = FLOAT32 * model.num_parameters(only_trainable=True) // shards
    optimizer = state_bytes(args.optim) * model.num_parameters(only_trainable=True) // shards
    largest = FLOAT32 * max(p.numel() for p in model.parameters())

    reference = isinstance(args, DPOConfig) and not args.precompute_ref_log_probs
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    copies = (tied and devices > 1) + (args.gradient_accumulation_steps > 1)
    working = training_bytes(model, args, train_shape, device_type) + copies * largest
    if sharded:
        working += 2 * gathered_bytes(model)
    moments = [working, step_temporaries(args.optim, device_type, weights, largest // shards)]
    if eval_shape is not None:
        moments.append(evaluation_bytes(model, args, eval_shape, device_type))
    return MemoryEstimate(
        weights=weights * (2 if reference else 1),
        gradients=gradients * (2 if devices > 1 and not sharded else 1),
        optimizer=optimizer,
        activations=max(moments),
        process=0 if device_type == "cuda" else process,
    )


def resident() -> int:
    """Bytes that this process occupies."""
    return psutil.Process().memory_info().rss


def computed_lengths(rows: Dataset, pairs: bool, padding_free: bool) -> np.ndarray:
    """Tokens that a model computes of each tokenized row, (rows, sequences of a row) int64: of a pair its two
    sequences, or `padding_free` one that has their prompt once."""
    columns = [("input_ids",)]
    if pairs:
        columns = [("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids")]
        columns = [("prompt_ids", "chosen_ids", "rejected_ids")] if padding_free else columns
    table = rows.select_columns(sorted({name for names in columns for name in names})).with_format("arrow")[:]
    lengths = {name: pc.list_value_length(table[name]).to_numpy() for name in table.column_names}
    return np.stack([sum(lengths[name] for name in names) for names in columns], axis=1)


def largest_batch(lengths: np.ndarray, batch: int, padding_free: bool) -> Shape:
    """The most that a batch of so many rows can be, `lengths` as of `computed_lengths`: its sequences and the tokens of
    the longest, or `padding_free` one sequence with all of their tokens."""
    if padding_free:
        return 1, int(np.sort(lengths.sum(axis=1))[-batch:].sum())
    return batch * lengths.shape[1], int(lengths.max())


def largest_batches(
    args: SFTConfig | DPOConfig, dataset: Mapping[str, Dataset], pairs: bool, padding_free: bool
) -> tuple[Shape, Shape]:
    """`largest_batch` of the tokenized rows of train, and that of test."""
    sizes = {"train": args.per_device_train_batch_size, "test": args.per_device_eval_batch_size}
    if getattr(args, "packing", False):  # by TRL, later
        train, test = ((size, args.max_length) for size in sizes.values())
    else:
        lengths = {part: computed_lengths(dataset[part], pairs, padding_free) for part in sizes}
        train, test = (largest_batch(lengths[part], size, padding_free) for part, size in sizes.items())
    return train, test


def state_bytes(optim: str) -> int:
    """The optimizer's state of one parameter, in bytes. 8-bit state is a quarter of float32's."""
    name = optim.removeprefix("paged_")
    state = next((size for start, size in STATE.items() if name.startswith(start)), 8)
    return state // 4 if "8bit" in name else state


def step_temporaries(optim: str, device_type: str, weights: int, largest: int) -> int:
    """What the optimizer's step needs for the time being, in bytes.

    Fused and 8-bit kernels need nothing. On a GPU torch updates all parameters together, with the root of AdamW's
    second moments beside them; else one by one, with that root and its quotient.
    """
    if "fused" in optim or "8bit" in optim or optim == "sgd":
        return 0
    return weights if device_type == "cuda" and "torch" in optim else 2 * largest


def training_bytes(model: PreTrainedModel, args: SFTConfig | DPOConfig, shape: Shape, device_type: str) -> int:
    """A + 8 T of a training step."""
    config = model.get_decoder().config
    activations = kept_bytes(model, autocast_dtype(args), shape)
    if args.activation_checkpointing or (args.fsdp_config or {}).get("activation_checkpointing"):
        inputs = FLOAT32 * math.prod(shape) * config.hidden_size * config.num_hidden_layers
        activations = inputs + activations // config.num_hidden_layers
    return activations + (1 if device_type == "cuda" else 8) * tile_bytes(model, args, shape, device_type)


def evaluation_bytes(model: PreTrainedModel, args: SFTConfig | DPOConfig, shape: Shape, device_type: str) -> int:
    """K / L + 4 T of an evaluation."""
    layer = kept_bytes(model, autocast_dtype(args), shape) // model.get_decoder().config.num_hidden_layers
    return layer + (1 if device_type == "cuda" else 4) * tile_bytes(model, args, shape, device_type)


def tile_bytes(model: PreTrainedModel, args: SFTConfig | DPOConfig, shape: Shape, device_type: str) -> int:
    """T: logits of as many tokens and words as TRL's loss takes at a time."""
    words = model.get_output_embeddings().weight.shape[0]
    size = FLOAT32 if device_type == "cpu" or autocast_dtype(args) is None else 2
    widest = output_layer.TILE_WORDS if device_type == "cpu" else TILE_WORDS
    return size * min(math.prod(shape), TILE_TOKENS) * min(words, widest)


@functools.lru_cache(maxsize=64)  # the trials of a grid ask for the same
def kept_bytes(model: PreTrainedModel, dtype: torch.dtype | None, shape: Shape) -> int:
    """K: all that autograd keeps of a forward pass over a micro-batch of `shape`, without activation checkpointing."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held here, so that no other one gets its identity
        kept[storage._cdata] = storage
        return tensor

    decoder = model.get_decoder()
    config = copy.deepcopy(decoder.config)
    try:
        with FakeTensorMode(), torch.device("cpu"):
            ids, mask = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
            inputs = {"attention_mask": mask}
            if shape[0] == 1 and can_remove_padding(model):  # attention without a mask, as `remove_padding` has it
                config._attn_implementation = ATTENTION
                positions = torch.arange(shape[1])[None]
                row = Row(positions[0], positions, positions[0], [Run(0, shape[1])])
                inputs = {"attention_mask": mask[None, None, :1, :1], "position_ids": positions, "row": row}
            fake = type(decoder)(config).train()
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", dtype, enabled=dtype is not None),
            ):
                fake(input_ids=ids, use_cache=False, **inputs)
    except RuntimeError:  # it asks for a value, or for a kernel that a CPU does not have: mixtures of experts do
        return usual_bytes(decoder.config, shape)
    for parameter in fake.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def usual_bytes(config: PreTrainedConfig, shape: Shape) -> int:
    """4 N L (10 d + 6 q + 4 f): what a Gemma 3 keeps; a model with fewer norms a little less."""
    heads = config.num_attention_heads
    d, f = config.hidden_size, getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    q = heads * (getattr(config, "head_dim", None) or d // heads)
    f *= getattr(config, "num_experts_per_tok", None) or 1
    return FLOAT32 * math.prod(shape) * config.num_hidden_layers * (10 * d + 6 * q + 4 * f)


def autocast_dtype(args: SFTConfig | DPOConfig) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def gathered_bytes(model: PreTrainedModel) -> int:
    """The weights that FSDP has whole at a time: one decoder layer's, the largest, and those in no layer."""
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    return FLOAT32 * (model.num_parameters() - sum(sizes) + max(sizes))


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    return next(m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
