"""Estimate the memory that a training needs on each device from the model's config; no weights are needed.

Let P be the number of trained parameters, p that of the largest one (a language model's embeddings; 0 if these are
frozen) and N the tokens of a micro-batch (of a padded one: sequences x tokens of the longest). A float32 number takes 4
bytes. At its peak a device holds

    weights     4 P + F   F: the frozen weights under an adapter, each in its own type (in NF4 it takes 0.52 bytes). All
                          of it twice with a reference model beside the policy: DPO without precomputed log-probs. With
                          an adapter, TRL's DPO keeps a copy of that alone, 4 P, for the reference
    gradients   4 P       twice under DDP, whose buckets hold a second copy
    optimizer   s P       s = 8 bytes for AdamW: two moments of a parameter; STATE has the others
    process     CPU only: Python, its libraries, the tokenizer and the data: `resident_memory()` of a process that has
                loaded everything except the weights
    activations the largest of what is allocated and freed at these moments:

      in a training step      A + 8 T + R + Q + G + 4 p g on a CPU
          A   what autograd keeps for the backward pass, K: see activations.py. Compiled layers keep less:
              `fused_bytes`. With activation checkpointing of every n-th of L layers, these keep only their input, N d
              numbers each for a width of d, in the embeddings' type; if the last layer is one of them, K / L is added
              while it is recomputed
          T   a tile of logits: TRL's loss takes min(N, 4096) tokens by min(V, 32768) of a vocabulary of V words at a
              time, on a CPU by 512 (output_layer.py). On a CPU the backward pass has 8 results of that size at once,
              in float32; on a GPU one kernel overwrites the only one, which has autocast's type
          g   further gradients of the embeddings: 1 if gradients are accumulated, as the new one is added to the old;
              1 if input and output embeddings are tied and there are several processes, as each end of the model has a
              gradient (output_layer.py avoids the second one in a single process)
          R   only where an adapter trains the rows of new tokens: peft puts them into a copy of the embeddings, of E
              bytes, at each end of the model. TRL's loss computes a float32 gradient of all of the output layer's copy
              and rounds it to the copy's type: 2 E + 4 V d with embeddings in 16 bit, E + 4 V d in float32
          Q   with NF4 only: the weights of the largest layer in autocast's type, as each product unpacks its own
          G   with an adapter only, K / 3: the gaps that glibc leaves between the blocks that it hands out
      on a GPU, beside its gradients, the larger of two:
        when the backward pass begins   A + T + max(M, R) + Q + 4 p g, but of the gradients only 4 p, the output
                                        layer's, unless gradients are accumulated: then all of them are there
        when it ends                    K / L + M + E + Q + 4 p g  (E: as in R)
          M   the gradients of an MLP's three results, 3 N f numbers of autocast's type for an MLP of width f
      in the optimizer's step  one or two temporaries: see `step_temporaries`
      at an evaluation         K / L + 4 T + E of its own micro-batches: no backward pass, nothing kept; on a GPU 1 T,
                               and gradients have been freed

Under FSDP each of D GPUs holds 1 / D of weights, gradients and optimizer. Its training step adds one whole layer and
all parameters outside the layers: their weights (4 bytes) and gradients (4 bytes). (On CPUs accelerate ignores FSDP.)

On a CPU the sum is too high where activations are large: while they are there, not all gradients are. The gaps make up
for that. An adapter's gradients are too small to do so, hence G. Eight trainings of an adapter on Gemma 3 270M took
between 4% less and 12% more than this sum, and without the gaps (MALLOC_MMAP_THRESHOLD_=262144, which is slow) what it
is without G, within 2%. On a GPU it is within 2% of five measured peaks of Gemma-2B in one process under bf16 autocast
(tests/speed/test_memory.py); adapters, NF4, FSDP, DDP, float32, untied embeddings and a reference in memory were not
compared. Loading and saving hold a second copy of the weights, but at those times there are no gradients, so neither
decides unless an adapter is trained on very few tokens. Nor is it counted that TRL hashes the weights before DPO's
reference pass on a CPU: 4 bytes more for each number of the embeddings, and 8 where they are bf16. A GPU's own context,
about half a gigabyte, is not counted.
"""

import math
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from adapters.four_bit import NF4_BYTES
from speed import output_layer
from speed.activations import (
    FLOAT32,
    Shape,
    adapters_of,
    decoder_layers,
    end_matrix,
    fused_bytes,
    kept_bytes,
    mlp_width,
)

TILE_TOKENS, TILE_WORDS = 4096, 32768  # TRL 1.16: TOKEN_CHUNK_SIZE and, on a GPU, _CHUNKED_LOGPROB_CHUNK_SIZE
# Bytes of float32 state per parameter, by the beginning of the optimizer's name. All others count as AdamW.
STATE = {"sgd": 0, "adafactor": 0, "lomo": 0, "adalomo": 0, "adagrad": 4, "rmsprop": 4, "lion": 4, "ademamix": 12}


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
    four_bit: bool = False  # the weights under an adapter are held in NF4
    dropout: bool = True  # False: TRL switches off all dropout, an adapter's too
    copies_adapter: bool = False  # TRL's DPO keeps an adapter as it began, for the reference

    @classmethod
    def from_args(
        cls,
        args: SFTConfig | DPOConfig,
        fused: bool,
        reference: bool,
        devices: int,
        device_type: str,
        four_bit: bool = False,
    ) -> Self:
        """Return the setup that TRL's config describes, without activation checkpointing unless FSDP does it itself."""
        return cls(
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            checkpoint_every=int(bool(cast(dict, args.fsdp_config or {}).get("activation_checkpointing"))),
            fused=fused,
            fsdp=bool(args.fsdp),
            optimizer=args.optim,
            accumulates=args.gradient_accumulation_steps > 1,
            reference=reference,
            devices=devices,
            device_type=device_type,
            four_bit=four_bit,
            dropout=not getattr(args, "disable_dropout", False),
            copies_adapter=isinstance(args, DPOConfig),
        )


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

    `model` may be on the meta device; its vocabulary must be the one it is trained with. For an `AdapterStack` give the
    model in it (`base_model`), and so to the functions below: peft has put the adapters into its layers, and their
    configs into its `peft_config`. The shapes are those of `batch_shape`; `eval_shape` is None if nothing is evaluated.
    `process` is in bytes.
    """
    sharded = setup.fsdp and setup.devices > 1 and setup.device_type == "cuda"
    shards = setup.devices if sharded else 1
    weights, trained = weight_bytes(model, setup.four_bit), model.num_parameters(only_trainable=True)
    gradients = FLOAT32 * trained // shards
    working = step_bytes(model, setup, train_shape, gradients)
    if sharded:
        sizes = [FLOAT32 * sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
        working += 2 * (FLOAT32 * model.num_parameters() - sum(sizes) + max(sizes))
    largest = FLOAT32 * max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
    moments = [working, step_temporaries(setup.optimizer, setup.device_type, gradients, largest // shards)]
    if eval_shape is not None:
        needed = evaluation_bytes(model, setup, eval_shape)
        moments.append(needed - gradients if setup.device_type == "cuda" else needed)
    reference = weights if setup.reference else FLOAT32 * trained if setup.copies_adapter and adapters_of(model) else 0
    return MemoryEstimate(
        weights=(weights + reference) // shards,
        gradients=gradients * (2 if setup.devices > 1 and not sharded else 1),
        optimizer=state_bytes(setup.optimizer) * trained // shards,
        activations=max(moments),
        process=0 if setup.device_type == "cuda" else process,
    )


def step_bytes(model: PreTrainedModel, setup: TrainingSetup, shape: Shape, gradients: int) -> int:
    """Return what a training step allocates and frees beside its gradients, of so many bytes, without FSDP's part."""
    config, on_gpu = model.get_decoder().config, setup.device_type == "cuda"
    layers, tokens, number = config.num_hidden_layers, math.prod(shape), FLOAT32 if setup.dtype is None else 2
    first, last = end_matrix(model), end_matrix(model, output=True)
    kept = kept_bytes(model, setup.dtype, shape, on_gpu, setup.dropout)
    if setup.fused:
        kept -= fused_bytes(model, setup.dtype, tokens)
    layer_kept, gaps = kept // layers, kept // 3 if adapters_of(model) else 0
    if setup.checkpoint_every:
        checkpointed = math.ceil(layers / setup.checkpoint_every)
        # A layer that is recomputed takes the place of one that is done with, unless it is the last one.
        whole = layers - checkpointed + ((layers - 1) % setup.checkpoint_every == 0)
        kept = layer_kept * whole + checkpointed * tokens * config.hidden_size * first.itemsize
    of_last = FLOAT32 * last.numel() if last.requires_grad else 0  # 4 p
    new_rows = merged_bytes(model)  # E
    at_output = new_rows and new_rows + FLOAT32 * last.numel() + (new_rows if last.itemsize < FLOAT32 else 0)  # R
    tile = tile_bytes(model, setup, shape)
    if on_gpu:
        missing = 0 if setup.accumulates else max(0, gradients - of_last)  # of the gradients, as the backward begins
        mlp = 3 * tokens * mlp_width(config) * number
        needed = max(kept + tile + max(mlp, at_output) - missing, layer_kept + mlp + new_rows)
    else:
        needed = kept + gaps + 8 * tile + at_output
    if setup.four_bit:
        needed += number * max(layer.in_features * layer.out_features for layer in base_linears(model))
    return needed + of_last * ((first is last and setup.devices > 1) + setup.accumulates)


def evaluation_bytes(model: PreTrainedModel, setup: TrainingSetup, shape: Shape) -> int:
    """Return what an evaluation of micro-batches of `shape` allocates and frees, in bytes."""
    kept = kept_bytes(model, setup.dtype, shape, setup.device_type == "cuda", dropout=False)
    tiles = (1 if setup.device_type == "cuda" else 4) * tile_bytes(model, setup, shape)
    return kept // model.get_decoder().config.num_hidden_layers + tiles + merged_bytes(model)


def weight_bytes(model: PreTrainedModel, four_bit: bool) -> int:
    """Return the bytes of all parameters, each in its own type; of a base that is or will be in NF4 with `four_bit`."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if four_bit:
        for layer in base_linears(model):
            size += int(NF4_BYTES * layer.in_features * layer.out_features) - layer.weight.nbytes
    return size


def base_linears(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """Return the linear layers of a model's decoder but for those of adapters: the ones that NF4 rounds."""
    modules, adapters = model.get_decoder().named_modules(), adapters_of(model).keys()
    return [
        layer for name, layer in modules if isinstance(layer, torch.nn.Linear) and not adapters & {*name.split(".")}
    ]


def merged_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the copy that peft makes of the embeddings to put the rows of new tokens in; 0 without."""
    trained = any(parameter.requires_grad for parameter in cast(Any, model.get_output_embeddings()).parameters())
    matrix = end_matrix(model, output=True)
    return matrix.nbytes if trained and not matrix.requires_grad else 0


def tile_bytes(model: PreTrainedModel, setup: TrainingSetup, shape: Shape) -> int:
    """Return T: the bytes of a tile of logits."""
    on_cpu = setup.device_type == "cpu"
    width = min(len(end_matrix(model, output=True)), output_layer.TILE_WORDS if on_cpu else TILE_WORDS)
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


def step_temporaries(optim: str, device_type: str, gradients: int, largest: int) -> int:
    """Return the bytes that the optimizer's step allocates and frees; `largest` is that of the gradients' tensors.

    Fused and 8-bit kernels need none. On a GPU torch updates all parameters together and holds the root of AdamW's
    second moments for all of them; elsewhere it updates one parameter at a time, with that root and its quotient.
    """
    if "fused" in optim or "8bit" in optim or optim == "sgd":
        return 0
    return gradients if device_type == "cuda" and "torch" in optim else 2 * largest
