"""Estimate the memory that a training needs on each device from the model's config; no weights are needed.

Let P be the number of parameters, p that of the largest one (a language model's embeddings) and N the tokens of a
micro-batch (of a padded one: sequences x tokens of the longest). A float32 number takes 4 bytes. At its peak a device
holds

    weights     4 P       twice with a reference model beside the policy: DPO without precomputed log-probs
    gradients   4 P       twice under DDP, whose buckets hold a second copy
    optimizer   s P       s = 8 bytes for AdamW: two moments of a parameter; STATE has the others
    process     CPU only: Python, its libraries, the tokenizer and the data: `resident_memory()` of a process that has
                loaded everything except the weights
    activations the largest of what is allocated and freed at these moments:

      in a training step      A + 8 T + 4 p g on a CPU
          A   what autograd keeps for the backward pass, K. It is counted by running the forward pass on fake tensors,
              which have a shape but no memory: bytes of float32, or of bf16 or fp16 under autocast, copies of the
              weights included. (About 4 N L (10 d + 6 q + 4 f) for L layers of hidden size d, query width q = heads x
              head size and MLP width f; this formula is used for a model that cannot be run on fake tensors.)
              Compiled layers keep less: `fused_bytes`. With activation checkpointing of every n-th layer, these keep
              only their input, 4 N d each; if the last layer is one of them, K / L is added while it is recomputed
          T   a tile of logits: TRL's loss takes min(N, 4096) tokens by min(V, 32768) of a vocabulary of V words at a
              time, on a CPU by 512 (output_layer.py). On a CPU the backward pass has 8 results of that size at once,
              in float32; on a GPU one kernel overwrites the only one, which has autocast's type
          g   further gradients of the embeddings: 1 if gradients are accumulated, as the new one is added to the old;
              1 if input and output embeddings are tied and there are several processes, as each end of the model has a
              gradient (output_layer.py avoids the second one in a single process)
      on a GPU, beside its gradients, the larger of two:
        when the backward pass begins   A + T + M + 4 p g, but of the gradients only 4 p, the output layer's, unless
                                        gradients are accumulated: then all of them are there
        when it ends                    K / L + M + 4 p g
          M   the gradients of an MLP's three results, 3 N f numbers of autocast's type
      in the optimizer's step  one or two temporaries: see `step_temporaries`
      at an evaluation         K / L + 4 T of its own micro-batches: no backward pass, nothing kept; on a GPU 1 T, and
                               gradients have been freed

Under FSDP each of D GPUs holds 1 / D of weights, gradients and optimizer. Its training step adds one whole layer and
all parameters outside the layers: their weights (4 bytes) and gradients (4 bytes). (On CPUs accelerate ignores FSDP.)

On a CPU the sum is too high where activations are large: while they are there, not all gradients are. A CPU process
seldom returns the memory it frees, which makes up for that. On a GPU it is within 2% of five measured peaks of Gemma-2B
in one process under bf16 autocast (tests/speed/test_memory.py); FSDP, DDP, float32, untied embeddings and a reference
in memory were not compared. Loading and saving hold a second copy of the weights, but at those times there are no
gradients, so neither decides. A GPU's own context, about half a gigabyte, is not counted.
"""

import copy
import functools
import logging
import math
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
    checkpoint_every: int  # activation checkpointing of every n-th layer; 0: of none
    fused: bool  # compiled layers
    fsdp: bool
    optimizer: str  # TRL's `optim`
    accumulates: bool  # gradients of several micro-batches before a step
    reference: bool  # a second model, DPO's reference, stays in memory
    devices: int
    device_type: str  # "cpu" or "cuda"; any other counts as a CPU with TRL's own tiles

    @classmethod
    def from_args(
        cls, args: SFTConfig | DPOConfig, fused: bool, reference: bool, devices: int, device_type: str
    ) -> Self:
        """Return the setup that TRL's config describes, without activation checkpointing unless FSDP does it itself."""
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        every = int(bool(cast(dict, args.fsdp_config or {}).get("activation_checkpointing")))
        accumulates = args.gradient_accumulation_steps > 1
        return cls(dtype, every, fused, bool(args.fsdp), args.optim, accumulates, reference, devices, device_type)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak, by what holds them."""

    weights: int  # including a reference model's
    gradients: int
    optimizer: int
    activations: int  # and all else that is allocated and freed within a step, as far as gradients leave no room for it
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
    `batch_shape`; `eval_shape` is None if nothing is evaluated. `process` is in bytes.
    """
    on_gpu = setup.device_type == "cuda"
    sharded = setup.fsdp and setup.devices > 1 and on_gpu
    shards = setup.devices if sharded else 1
    weights = FLOAT32 * model.num_parameters() // shards
    trained = model.num_parameters(only_trainable=True)
    largest = FLOAT32 * max(p.numel() for p in model.parameters())
    config = model.get_decoder().config
    layers, tokens = config.num_hidden_layers, math.prod(train_shape)
    gradients = FLOAT32 * trained // shards
    kept = kept_bytes(model, setup.dtype, train_shape)
    if setup.fused:
        kept -= fused_bytes(model, setup.dtype, tokens)
    layer_kept = kept // layers
    if setup.checkpoint_every:
        checkpointed = math.ceil(layers / setup.checkpoint_every)
        # A layer that is recomputed takes the place of one that is done with, unless it is the last one.
        whole = layers - checkpointed + ((layers - 1) % setup.checkpoint_every == 0)
        kept = layer_kept * whole + checkpointed * FLOAT32 * tokens * config.hidden_size
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    copies = (tied and setup.devices > 1) + setup.accumulates  # g
    if on_gpu:
        missing = 0 if setup.accumulates else max(0, gradients - largest)  # of the gradients, as the backward begins
        working = max(kept + tile_bytes(model, setup, train_shape) - missing, layer_kept)
        working += 3 * tokens * mlp_width(config) * (FLOAT32 if setup.dtype is None else 2)
    else:
        working = kept + 8 * tile_bytes(model, setup, train_shape)
    working += copies * largest
    if sharded:
        sizes = [FLOAT32 * sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
        working += 2 * (FLOAT32 * model.num_parameters() - sum(sizes) + max(sizes))
    moments = [working, step_temporaries(setup.optimizer, setup.device_type, weights, largest // shards)]
    if eval_shape is not None:
        needed = evaluation_bytes(model, setup, eval_shape)
        moments.append(needed - gradients if on_gpu else needed)
    return MemoryEstimate(
        weights=weights * (2 if setup.reference else 1),
        gradients=gradients * (2 if setup.devices > 1 and not sharded else 1),
        optimizer=state_bytes(setup.optimizer) * trained // shards,
        activations=max(moments),
        process=0 if on_gpu else process,
    )


def evaluation_bytes(model: PreTrainedModel, setup: TrainingSetup, shape: Shape) -> int:
    """Return what an evaluation of micro-batches of `shape` allocates and frees, in bytes."""
    layer = kept_bytes(model, setup.dtype, shape) // model.get_decoder().config.num_hidden_layers
    return layer + (1 if setup.device_type == "cuda" else 4) * tile_bytes(model, setup, shape)


def tile_bytes(model: PreTrainedModel, setup: TrainingSetup, shape: Shape) -> int:
    """Return T: the bytes of a tile of logits."""
    on_cpu = setup.device_type == "cpu"
    width = min(model.get_output_embeddings().weight.shape[0], output_layer.TILE_WORDS if on_cpu else TILE_WORDS)
    return (FLOAT32 if on_cpu or setup.dtype is None else 2) * min(math.prod(shape), TILE_TOKENS) * width


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


def batch_shape(
    args: SFTConfig | DPOConfig, rows: Dataset, batch: int, *, packing: bool, pairs: bool, padding_free: bool
) -> Shape:
    """Return `largest_batch` of tokenized rows; with `packing` that of TRL's packs."""
    if packing and args.max_length is not None:
        return batch, args.max_length
    return largest_batch(computed_lengths(rows, pairs, padding_free), batch, padding_free)


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
    heads, d, f = config.num_attention_heads, config.hidden_size, mlp_width(config)
    q = heads * (getattr(config, "head_dim", None) or d // heads)
    return FLOAT32 * math.prod(shape) * config.num_hidden_layers * (10 * d + 6 * q + 4 * f)


def mlp_width(config: PreTrainedConfig) -> int:
    """Return f: the numbers of a token between the matrices of an MLP, or of all the experts that compute it."""
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return width * (getattr(config, "num_experts_per_tok", None) or 1)


def fused_bytes(model: PreTrainedModel, dtype: torch.dtype | None, tokens: int) -> int:
    """Return how much less compiled layers keep of `tokens` tokens, in bytes.

    The backward pass computes again what costs no matrix product: an MLP's activation, in autocast's type, and what is
    between a norm's input and its output: a float32 number of each element, and with autocast one more. A norm of
    queries or keys counts as nothing here, so the real figure is a little higher for models that have them.
    """
    config, number = model.get_decoder().config, FLOAT32 if dtype is None else 2
    layers = decoder_layers(model)
    norms = sum(p.numel() for name, p in layers.named_parameters() if "norm" in name and len(p) == config.hidden_size)
    return tokens * (len(layers) * number * mlp_width(config) + norms * FLOAT32 * (1 if dtype is None else 2))


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the transformer layers of a model."""
    return next(m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
