"""Estimate the memory that a training needs on each device from the model's config; no weights are needed.

Let P be the number of parameters, p that of the largest one (a language model's embeddings) and N the tokens of a
micro-batch (of a padded one: sequences x tokens of the longest). A float32 number takes 4 bytes. At its peak a device
holds

    weights     4 P       twice with a reference model beside the policy: DPO without precomputed log-probs
    gradients   4 P       twice under DDP, whose buckets hold a second copy
    optimizer   s P       s = 8 bytes for AdamW: two moments of a parameter; STATE has the others
    process     CPU only: Python, its libraries, the tokenizer and the data: `resident_memory()` of a process that has
                loaded everything except the weights
    activations the largest of what is allocated and freed at these three moments:

      in a training step      A + 8 T + 4 p g
          A   what autograd keeps for the backward pass, K. It is counted by running the forward pass on fake tensors,
              which have a shape but no memory: bytes of float32, or of bf16 or fp16 under autocast, copies of the
              weights included. (About 4 N L (10 d + 6 q + 4 f) for L layers of hidden size d, query width q = heads x
              head size and MLP width f; this formula is used for a model that cannot be run on fake tensors.)
              With activation checkpointing only each layer's input, 4 N d, and K / L for the one layer that is being
              recomputed
          T   a tile of logits: TRL's loss takes min(N, 4096) tokens by min(V, 32768) of a vocabulary of V words at a
              time, on a CPU by 512 (output_layer.py). On a CPU the backward pass has 8 results of that size at once,
              in float32; on a GPU one kernel overwrites the only one, which has autocast's type
          g   further gradients of the embeddings: 1 if gradients are accumulated, as the new one is added to the old;
              1 if input and output embeddings are tied and there are several processes, as each end of the model has a
              gradient (output_layer.py avoids the second one in a single process)
      in the optimizer's step  one or two temporaries: see `step_temporaries`
      at an evaluation         K / L + 4 T of its own micro-batches: no backward pass, nothing kept; 1 T on a GPU

Under FSDP each of D GPUs holds 1 / D of weights, gradients and optimizer. Its training step adds one whole layer and
all parameters outside the layers: their weights (4 bytes) and gradients (4 bytes). (On CPUs accelerate ignores FSDP.)

The sum is too high where activations are large: while they are there, not all gradients are. A CPU process seldom
returns the memory it frees, which makes up for that. Loading and saving hold a second copy of the weights, but at those
times there are no gradients, so neither decides. A GPU's own context, about half a gigabyte, is not counted.
"""

import copy
import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from speed import output_layer
from speed.padding_free import ATTENTION, FlatBatch, Segment, can_remove_padding

logging.getLogger(FakeTensorMode.__module__).disabled = True  # it would report what `formula_bytes` handles

FLOAT32 = 4  # bytes
TILE_TOKENS, TILE_WORDS = 4096, 32768  # TRL 1.16: TOKEN_CHUNK_SIZE and, on a GPU, _CHUNKED_LOGPROB_CHUNK_SIZE
# Bytes of float32 state per parameter, by the beginning of the optimizer's name. All others count as AdamW.
STATE = {"sgd": 0, "adafactor": 0, "lomo": 0, "adalomo": 0, "adagrad": 4, "rmsprop": 4, "lion": 4, "ademamix": 12}

Shape = tuple[int, int]  # sequences, and tokens of the longest: see `largest_batch`


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as memory depends on it."""

    dtype: torch.dtype | None  # autocast's; None: float32 throughout
    checkpointing: bool
    fsdp: bool
    optimizer: str  # TRL's `optim`
    accumulates: bool  # gradients of several micro-batches before a step
    reference: bool  # a second model, DPO's reference, stays in memory
    devices: int
    device_type: str  # "cpu" or "cuda"; any other counts as a CPU with TRL's own tiles

    @classmethod
    def from_args(cls, args: SFTConfig | DPOConfig, reference: bool, devices: int, device_type: str) -> Self:
        """Return the setup that TRL's config describes, without activation checkpointing unless FSDP does it itself."""
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        checkpointing = bool(cast(dict, args.fsdp_config or {}).get("activation_checkpointing"))
        accumulates = args.gradient_accumulation_steps > 1
        return cls(dtype, checkpointing, bool(args.fsdp), args.optim, accumulates, reference, devices, device_type)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak, by what holds them."""

    weights: int  # including a reference model's
    gradients: int
    optimizer: int
    activations: int  # and everything else that is allocated and freed within a step
    process: int  # 0 on a GPU

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.process


def estimate_memory(
    model: PreTrainedModel, setup: TrainingSetup, train_shape: Shape, eval_shape: Shape | None, process: int
) -> MemoryEstimate:
    """Return the peak on each device, by the formula in this module's docstring.

    `model` may be on the meta device; its vocabulary must be the one it is trained with. The shapes are those of
    `largest_batches`; `eval_shape` is None if nothing is evaluated. `process` is in bytes.
    """
    on_gpu, on_cpu = setup.device_type == "cuda", setup.device_type == "cpu"
    sharded = setup.fsdp and setup.devices > 1 and on_gpu
    shards = setup.devices if sharded else 1
    weights = FLOAT32 * model.num_parameters() // shards
    trained = model.num_parameters(only_trainable=True)
    largest = FLOAT32 * max(p.numel() for p in model.parameters())
    config, vocabulary = model.get_decoder().config, model.get_output_embeddings().weight.shape[0]

    def tile_bytes(shape: Shape) -> int:  # T
        width = min(vocabulary, output_layer.TILE_WORDS if on_cpu else TILE_WORDS)
        return (FLOAT32 if on_cpu or setup.dtype is None else 2) * min(math.prod(shape), TILE_TOKENS) * width

    kept = kept_bytes(model, setup.dtype, train_shape)
    if setup.checkpointing:
        inputs = FLOAT32 * math.prod(train_shape) * config.hidden_size * config.num_hidden_layers
        kept = inputs + kept // config.num_hidden_layers
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    copies = (tied and setup.devices > 1) + setup.accumulates  # g
    working = kept + (1 if on_gpu else 8) * tile_bytes(train_shape) + copies * largest
    if sharded:
        layers = [FLOAT32 * sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
        working += 2 * (FLOAT32 * model.num_parameters() - sum(layers) + max(layers))
    moments = [working, step_temporaries(setup.optimizer, setup.device_type, weights, largest // shards)]
    if eval_shape is not None:
        layer = kept_bytes(model, setup.dtype, eval_shape) // config.num_hidden_layers
        moments.append(layer + (1 if on_gpu else 4) * tile_bytes(eval_shape))
    return MemoryEstimate(
        weights=weights * (2 if setup.reference else 1),
        gradients=FLOAT32 * trained // shards * (2 if setup.devices > 1 and not sharded else 1),
        optimizer=state_bytes(setup.optimizer) * trained // shards,
        activations=max(moments),
        process=0 if on_gpu else process,
    )


def computed_lengths(rows: Dataset, pairs: bool, padding_free: bool) -> np.ndarray:
    """Count the tokens that a model computes for each tokenized row.

    Returns integers (rows, sequences of a row). A pair has two sequences; `padding_free`, one with the prompt once.
    """
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"] if pairs else ["input_ids"]
    table = rows.select_columns(columns).with_format("arrow")[:]
    lengths = np.stack([pc.list_value_length(table[name]).to_numpy() for name in columns], axis=1)
    if not pairs or padding_free:
        return lengths.sum(axis=1, keepdims=True)
    return lengths[:, :1] + lengths[:, 1:]


def largest_batch(lengths: np.ndarray, batch: int, padding_free: bool) -> Shape:
    """Return the largest shape that `batch` rows can have: their number of sequences and the tokens of the longest.

    `lengths` are those of `computed_lengths`. A `padding_free` batch is one sequence with all tokens of its rows.
    """
    if padding_free:
        return 1, int(np.sort(lengths.sum(axis=1))[-batch:].sum())
    return batch * lengths.shape[1], int(lengths.max())


def largest_batches(
    args: SFTConfig | DPOConfig, dataset: Mapping[str, Dataset], *, packing: bool, pairs: bool, padding_free: bool
) -> tuple[Shape, Shape]:
    """Return `largest_batch` of the tokenized rows of train, and that of test; with `packing` that of TRL's packs."""
    sizes = {"train": args.per_device_train_batch_size, "test": args.per_device_eval_batch_size}
    if packing and args.max_length is not None:
        return (sizes["train"], args.max_length), (sizes["test"], args.max_length)
    lengths = {part: computed_lengths(dataset[part], pairs, padding_free) for part in sizes}
    train, test = (largest_batch(lengths[part], size, padding_free) for part, size in sizes.items())
    return train, test


def state_bytes(optim: str) -> int:
    """Return the optimizer's state per parameter, in bytes. 8-bit state is a quarter of float32's."""
    name = optim.removeprefix("paged_")
    state = next((size for start, size in STATE.items() if name.startswith(start)), 8)
    return state // 4 if "8bit" in name else state


def step_temporaries(optim: str, device_type: str, weights: int, largest: int) -> int:
    """Return the bytes that the optimizer's step allocates and frees.

    Fused and 8-bit kernels need none. On a GPU torch updates all parameters together and holds the root of AdamW's
    second moments for all of them; elsewhere it updates one parameter at a time, with that root and its quotient.
    """
    if "fused" in optim or "8bit" in optim or optim == "sgd":
        return 0
    return weights if device_type == "cuda" and "torch" in optim else 2 * largest


@functools.lru_cache(maxsize=64)  # the trials of a grid share most of them
def kept_bytes(model: PreTrainedModel, dtype: torch.dtype | None, shape: Shape) -> int:
    """Return K: what autograd keeps of a forward pass over a micro-batch of `shape`, without checkpointing."""
    kept = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held, so that no other storage gets its address
        kept[storage._cdata] = storage
        return tensor

    decoder = model.get_decoder()
    config = copy.deepcopy(decoder.config)
    try:
        with FakeTensorMode(), torch.device("cpu"):
            ids, mask = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
            inputs: dict[str, Any] = {"attention_mask": mask}
            if shape[0] == 1 and can_remove_padding(model):  # attention without a mask: see `remove_padding`
                config._attn_implementation = ATTENTION
                positions = torch.arange(shape[1])[None]
                flat = FlatBatch(positions[0], positions, positions, [Segment(0, shape[1])])
                inputs = {"attention_mask": mask[None, None, :1, :1], "position_ids": positions, "flat_batch": flat}
            fake = type(decoder)(config).train()
            autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
            with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), autocast:
                fake(input_ids=ids, use_cache=False, **inputs)
    except RuntimeError:  # it reads a value, or needs a kernel that CPUs lack: mixtures of experts do
        return formula_bytes(decoder.config, shape)
    for parameter in fake.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def formula_bytes(config: PreTrainedConfig, shape: Shape) -> int:
    """Return 4 N L (10 d + 6 q + 4 f): what a Gemma 3 keeps. A model with fewer norms keeps a little less."""
    heads = config.num_attention_heads
    d, f = config.hidden_size, getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    q = heads * (getattr(config, "head_dim", None) or d // heads)
    f *= getattr(config, "num_experts_per_tok", None) or 1
    return FLOAT32 * math.prod(shape) * config.num_hidden_layers * (10 * d + 6 * q + 4 * f)


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the transformer layers of a model."""
    return next(m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
