"""Compile a model's decoder layers, so that a GPU runs the element-wise work between matrix products in a few kernels.

On an H100, with the shapes of Gemma-2B, layers compiled by hand gave 18% more tokens a second and took 10 GB less
(benchmarks/README.md). Layers are compiled one by one: they share their code, so one compilation serves all, and
lengths are dynamic, so it serves every batch. There is another one for evaluations, and for layers of another kind.
Attention, which loops over a batch's sequences, stays outside of the graphs.
"""

import functools
import os
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils._triton import has_triton
from transformers import AttentionInterface, PreTrainedModel, TrainingArguments

from speed.activations import decoder_layers
from speed.padding_free import ATTENTION, attend_by_sequence


def can_compile(args: TrainingArguments, torch_compile: bool | None) -> bool:
    """Tell whether a GPU's training compiles its layers. `torch_compile` is what the YAML says about it: None, nothing.

    (A CPU would gain 5 to 8% after tens of seconds of compiling, for which it needs a C++ compiler.)
    """
    return torch_compile is None and not args.deepspeed and has_triton()


def compile_layers(model: PreTrainedModel, cache: Path) -> None:
    """Compile the decoder layers of `model`, which computes no padding. Call it before the model is wrapped.

    The code is made when a layer is first called, and kept in `cache` for other processes.

    Upstream: `layer.compile()` has no effect on a layer with activation checkpointing, as transformers 5.23 decides in
    the layer's `forward` whether to checkpoint, and torch (2.13) runs a graph that breaks within a checkpoint eagerly.
    Here the checkpoint is outside and what it computes is compiled. This can go once either has changed.
    """
    for variable, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(cache / folder))
    dynamo = torch._dynamo.config
    dynamo.optimize_ddp = False  # it would divide a layer at DDP's buckets, of 25 MB; layers are small enough
    dynamo.recompile_limit = 32  # policy and reference, training and evaluation, two kinds of layers: 8 may not do
    dynamo.suppress_errors = True  # without a working compiler, layers are computed as they are, with a warning
    AttentionInterface.register(ATTENTION, torch.compiler.disable(attend_by_sequence))
    layers = decoder_layers(model)
    compute: Any = torch.compile(type(layers[0]).forward.__wrapped__, dynamic=True)  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(functools.partial(compute, self, **kwargs), *args)
        return compute(self, *args, **kwargs)

    for layer in layers:
        layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign]
