"""Make both ends of a language model with a large vocabulary cheaper to train: the embeddings and the output layer.

Most of a small model's work is its vocabulary: Gemma's has 256,000 tokens, each a row of the embeddings, which are the
output layer too. Both functions change how something is computed, not what: tests/speed/test_output_layer.py compares
them with the original.
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

TRL = "1.16"  # the release whose internals `adapt_fused_head_to_cpu` changes
TILE_WORDS = 512  # of the vocabulary at a time: the logits of TRL's 4096 tokens then fit into a core's cache


def adapt_fused_head_to_cpu() -> bool:
    """Adapt TRL's fused head to CPUs, for this process. Returns whether this release of TRL is known here.

    Without Triton kernels (they are for CUDA and XPU) TRL 1.16 does three things that do not suit a CPU:

    - It projects every position onto the vocabulary, prompts and padding too, to keep shapes constant for compilers. A
      CPU in eager mode gains nothing from that: here only the positions with a label are projected.
    - It takes 32,768 words at a time, which suits a GPU. A CPU moves eight results of 4096 x 32,768 through its memory.
    - It multiplies bf16 numbers as float32 to sum them in float32. The CPU's bf16 instructions sum in float32 anyway.

    This can go once TRL asks for Triton where it needs Triton and has a tile size for CPUs.
    """
    if not version("trl").startswith(f"{TRL}."):
        return False
    kernels, utils = trl.kernels.chunked_logprob, trl.trainer.utils
    if utils._use_triton.__module__ == __name__:  # adapted already
        return True
    has_triton, add_float32 = utils._use_triton, kernels._addmm_fp32

    def scores_labels_only(device: torch.device) -> bool:
        return device.type == "cpu" or has_triton(device)

    @functools.wraps(add_float32)
    def add_bf16(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        products: Any = getattr(torch.backends.mkldnn, "matmul", None)
        if not hasattr(products, "fp32_precision") or (a.device.type, a.dtype) != ("cpu", torch.bfloat16):
            return add_float32(total, a, b)
        before, products.fp32_precision = products.fp32_precision, "bf16"  # the sums stay float32; since torch 2.9
        try:
            add_float32(total, a, b)
        finally:
            products.fp32_precision = before

    # The kernels have a `_use_triton` of their own. It chooses the kernel and stays.
    utils._use_triton = scores_labels_only
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = TILE_WORDS
    kernels._addmm_fp32 = add_bf16  # type: ignore[assignment]
    return True


class EmbeddingLookup(torch.autograd.Function):
    """Look up rows of an embedding matrix (V, H); the backward pass adds to the matrix's `.grad` itself."""

    @staticmethod
    def forward(ctx: Any, graph: torch.Tensor, embedding: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows (..., H) of `ids` (...) int64.

        `graph` is any tensor that requires a gradient, so that there is a backward pass. The matrix must not be an
        input, or autograd would hold back the output layer's gradient for this one.
        """
        ctx.embedding = embedding
        ctx.save_for_backward(ids)
        return functional.embedding(ids, embedding.weight.detach())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        """Add `grad` (..., H) to the matrix's gradient; the inputs get none."""
        (ids,), weight, padding_idx = ctx.saved_tensors, ctx.embedding.weight, ctx.embedding.padding_idx
        if padding_idx is not None:
            grad = grad.masked_fill((ids == padding_idx)[..., None], 0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        grad = grad.reshape(-1, grad.shape[-1])
        if grad.is_cuda:  # sorts them there, and sums in that order; `unique` would have the host wait for its count
            weight.grad.index_put_((ids.flatten(),), grad.to(weight.dtype), accumulate=True)
            return None, None, None
        # First sum each token's rows as autograd does, which gives the same from run to run; then add them at once.
        tokens, inverse = ids.flatten().unique(return_inverse=True)
        summed = torch.ops.aten.embedding_dense_backward(grad, inverse, len(tokens), -1, False)
        weight.grad.index_put_((tokens,), summed.to(weight.dtype), accumulate=True)
        return None, None, None


class EmbeddingLookupMode(TorchFunctionMode):
    """Make `functional.embedding` an `EmbeddingLookup` while active: a model may scale what its lookup returns."""

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.graph = torch.zeros((), requires_grad=True)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is functional.embedding:
            return EmbeddingLookup.apply(self.graph, self.embedding, args[0])
        return func(*args, **kwargs or {})


def add_embedding_gradient_in_place(model: PreTrainedModel) -> bool:
    """Avoid a second gradient of the embeddings if they are the output layer too. Returns whether they are.

    Autograd computes a gradient of the whole matrix at each end and adds the two. For Gemma-2B each is 2.1 GB, though
    the input's has values only for the batch's own tokens. Here these rows are added to the other end's gradient.
    Not for several processes: DDP treats a gradient as complete as soon as autograd has it.
    """
    embedding = model.get_input_embeddings()
    if embedding.weight is not model.get_output_embeddings().weight or not isinstance(embedding, torch.nn.Embedding):
        return False
    if embedding.sparse or embedding.max_norm or embedding.scale_grad_by_freq:
        return False
    look_up, in_place = type(embedding).forward, EmbeddingLookupMode(embedding)

    def forward(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        # A hook on the gradient, such as an optimizer's that steps in the backward pass, must see all of it.
        hooks = self.weight._backward_hooks or self.weight._post_accumulate_grad_hooks
        if self is not in_place.embedding or hooks or not torch.is_grad_enabled() or not self.weight.requires_grad:
            return look_up(self, ids)
        with in_place:
            return look_up(self, ids)

    embedding.forward = types.MethodType(forward, embedding)  # type: ignore[method-assign]
    return True
