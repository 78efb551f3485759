"""Count what autograd keeps of a training's forward pass, with shapes alone.

K, the bytes that it keeps for the backward pass, is counted by running the forward pass on fake tensors, which have a
shape but no memory: bytes of float32, or of bf16 or fp16 under autocast, copies of the weights included. (About
4 N L (10 d + 6 q + 4 f) for N tokens and L layers of hidden size d, query width q = heads x head size and MLP width f;
this formula is used for a model that cannot be run on fake tensors.)

With an adapter, the same adapters are put into the fake model, on frozen weights of the same type. A frozen weight does
not need what it is multiplied with, so that is not kept. But an adapter's first matrix keeps its input, one copy for
each layer with dropout, which keeps its mask as well; TRL's DPO has no dropout.
"""

import copy
import functools
import logging
import math
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from adapters.stack import AdapterStack, lora_layers
from config.lora import OWN
from speed.padding_free import ATTENTION, FlatBatch, Segment, can_remove_padding

logging.getLogger(FakeTensorMode.__module__).disabled = True  # it would report what `formula_bytes` handles

FLOAT32 = 4  # bytes

Shape = tuple[int, int]  # sequences, and tokens of the longest: see `largest_batch`


@functools.lru_cache(maxsize=64)  # the trials of a grid share most of them
def kept_bytes(
    model: PreTrainedModel, dtype: torch.dtype | None, shape: Shape, on_gpu: bool = False, dropout: bool = True
) -> int:
    """Return K: what autograd keeps of a forward pass over a micro-batch of `shape`, without checkpointing."""
    kept = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held, so that no other storage gets its address
        kept[storage._cdata] = storage
        return tensor

    config = model.get_decoder().config
    try:
        fake = shapes_of(model, dtype, on_gpu, dropout)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
            fake.to_empty(device="cpu")
            ids, mask = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
            inputs: dict[str, Any] = {"attention_mask": mask}
            if shape[0] == 1 and can_remove_padding(model):  # attention without a mask: see `remove_padding`
                fake.config._attn_implementation = ATTENTION
                positions = torch.arange(shape[1])[None]
                flat = FlatBatch(positions[0], positions, positions, [Segment(0, shape[1])])
                inputs = {"attention_mask": mask[None, None, :1, :1], "position_ids": positions, "flat_batch": flat}
            autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
            with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), autocast:
                fake(input_ids=ids, use_cache=False, **inputs)
    except RuntimeError:  # it reads a value, or needs a kernel that CPUs lack: mixtures of experts do
        return formula_bytes(config, shape)
    for parameter in fake.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def shapes_of(model: PreTrainedModel, dtype: torch.dtype | None, on_gpu: bool, dropout: bool) -> PreTrainedModel:
    """Return a decoder like the model's to count with, on the meta device, with the same adapters and types.

    What bitsandbytes holds in 4 bits has the type that it computes in: autograd keeps as much, its weights left out.
    """
    with torch.device("meta"):
        whole = type(model)._from_config(copy.deepcopy(model.config), dtype=end_matrix(model).dtype)
        stack: AdapterStack | None = None
        for name, config in adapters_of(model).items():
            if stack is None:
                stack = AdapterStack(whole, copy.deepcopy(config), name)
            else:
                stack.add_adapter(name, copy.deepcopy(config))
    if stack is not None:
        stack.set_adapter(OWN)
    decoder = whole.get_decoder().train()
    for layer in lora_layers(decoder):
        cast(Any, layer).cast_input_dtype_enabled = dtype is None  # as suit_hardware has it
    for module in decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = module.p if dropout else 0
            if on_gpu and module.p:
                cast(Any, module).forward = functools.partial(drop_on_a_gpu, module.p)
    return decoder


def drop_on_a_gpu(p: float, x: torch.Tensor) -> torch.Tensor:
    """Return `x` after dropout that keeps a mask of a byte for each number, as a GPU's does; a CPU's keeps numbers."""
    return torch.native_dropout(x, p, True)[0]


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
    between a norm's input and its output: a float32 number of each element, and with autocast one more. A frozen norm
    has only its input there, which is kept in autocast's type instead of float32. A norm of queries or keys counts as
    nothing here, so the real figure is a little higher for models that have them.
    """
    config, number = model.get_decoder().config, FLOAT32 if dtype is None else 2
    layers = decoder_layers(model)
    norms = [p for name, p in layers.named_parameters() if "norm" in name and len(p) == config.hidden_size]
    trained, frozen = FLOAT32 * (1 if dtype is None else 2), FLOAT32 - number
    of_norms = sum(p.numel() * (trained if p.requires_grad else frozen) for p in norms)
    return tokens * (len(layers) * number * mlp_width(config) + of_norms)


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the transformer layers of a model."""
    return next(m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))


def adapters_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the configs of the adapters in a model's layers, by their names; the names are in their parameters'."""
    return getattr(model, "peft_config", {})


def end_matrix(model: PreTrainedModel, output: bool = False) -> torch.nn.Parameter:
    """Return the embeddings or, with `output`, the output layer's matrix; peft may have wrapped it."""
    end = model.get_output_embeddings() if output else model.get_input_embeddings()
    return max(cast(torch.nn.Module, end).parameters(), key=torch.Tensor.numel)
