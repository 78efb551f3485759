"""The two ends of a language model with a large vocabulary, made cheaper to train.

Of a small model most of the work is its vocabulary: Gemma's has 256,000 tokens, each a row of the embeddings, which are
the output layer too. Both functions change how something is computed, not what: tests/test_output_layer.py holds them
to the original's results.
"""

import functools
import types
from importlib.metadata import version
from typing import Any

import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

TRL = "1.16"  # whose internals `fit_fused_head_to_cpu` knows
TILE_WORDS = 512  # of the vocabulary at a time: TRL's 4096 tokens by this many are logits that a core's cache holds


def fit_fused_head_to_cpu() -> bool:
    """Have TRL's fused head do on a CPU what it does on a GPU, for this process; whether this release is known here.

    TRL 1.16, where it has no Triton kernels (a CPU; they are for CUDA and XPU):

    - projects every position onto the vocabulary, prompts and padding too, to keep shapes constant for compilers. A
      CPU in eager mode has nothing from that: here, too, only the positions with a label are projected.
    - takes 32,768 words at a time, which suits a GPU: on a CPU eight results of 4096 x 32,768 go through main memory.
    - multiplies bf16 numbers as float32 to sum them in float32. The CPU's bf16 instructions sum in float32 anyway.

    This can go once TRL asks for Triton where it needs Triton and has a tile size for CPUs.
    """
    if not version("trl").startswith(f"{TRL}."):
        return False
    kernels, utils = trl.kernels.chunked_logprob, trl.trainer.utils
    if getattr(utils._use_triton, "fitted", False):
        return True
    has_triton, add_float32 = utils._use_triton, kernels._addmm_fp32

    def scores_labels_only(device: torch.device) -> bool:
        return device.type == "cpu" or has_triton(device)

    @functools.wraps(add_float32)
    def add_bf16(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        products = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
        before = getattr(products, "fp32_precision", None)
        if before is not None and a.device.type == "cpu" and a.dtype == torch.bfloat16:
            products.fp32_precision = "bf16"  # they are summed in float32 all the same
        try:
            add_float32(total, a, b)
        finally:
            if before is not None:
                products.fp32_precision = before

    scores_labels_only.fitted = True
    # Not the kernels' own `_use_triton`, which chooses the kernel.
    utils._use_triton = scores_labels_only
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = TILE_WORDS
    kernels._addmm_fp32 = add_bf16
    return True


class AddedInPlace(torch.autograd.Function):
    """Rows of an embedding matrix (V, H), whose backward pass adds to the matrix's `.grad` itself."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, graph: torch.Tensor, embedding: torch.nn.Embedding, ids: torch.Tensor
    ) -> torch.Tensor:
        """`ids` (...) int64; returns (..., H). `graph` is any tensor that requires a gradient, to have a backward pass:
        the matrix must not be an input, or autograd would hold back the output layer's gradient for this one."""
        ctx.embedding = embedding
        ctx.save_for_backward(ids)
        return functional.embedding(ids, embedding.weight.detach())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[None, None, None]:
        (ids,), weight, padding_idx = ctx.saved_tensors, ctx.embedding.weight, ctx.embedding.padding_idx
        if padding_idx is not None:
            grad = grad.masked_fill((ids == padding_idx)[..., None], 0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        # A token's rows are summed as autograd does it, the same from run to run, and then added at once.
        rows, places = ids.flatten().unique(return_inverse=True)
        grad = grad.reshape(-1, grad.shape[-1])
        summed = torch.ops.aten.embedding_dense_backward(grad, places, len(rows), -1, False)
        weight.grad.index_put_((rows,), summed.to(weight.dtype), accumulate=True)
        return None, None, None


class LookUpInPlace(TorchFunctionMode):
    """While it is entered, `functional.embedding` is `AddedInPlace`: a model may scale what its lookup gives."""

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.graph = torch.zeros((), requires_grad=True)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is functional.embedding:
            return AddedInPlace.apply(self.graph, self.embedding, args[0])
        return func(*args, **kwargs or {})


def add_embedding_gradient_in_place(model: PreTrainedModel) -> bool:
    """Spare a second gradient of the embeddings, where they are the output layer too; whether they are.

    Autograd computes a gradient of the whole matrix at either end and adds the two: for Gemma-2B's 2.1 GB each, of
    which the input's end has rows for the batch's own tokens only. Here these rows are added to the other's gradient.
    Not for several processes: DDP takes a gradient for complete as soon as autograd has it.
    """
    embedding = model.get_input_embeddings()
    tied = embedding.weight is model.get_output_embeddings().weight
    plain = isinstance(embedding, torch.nn.Embedding) and not (
        embedding.sparse or embedding.max_norm or embedding.scale_grad_by_freq
    )
    if not tied or not plain:
        return False
    look_up, in_place = type(embedding).forward, LookUpInPlace(embedding)

    def forward(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        # Hooks on the gradient (an optimizer's that steps in the backward pass) must see all of it.
        hooks = self.weight._backward_hooks or self.weight._post_accumulate_grad_hooks
        if self is not in_place.embedding or hooks or not torch.is_grad_enabled() or not self.weight.requires_grad:
            return look_up(self, ids)
        with in_place:
            return look_up(self, ids)

    embedding.forward = types.MethodType(forward, embedding)
    return True
