"""The changed computations at both ends of a model give the same results as TRL's and PyTorch's own."""

import copy

import pytest
import torch
import trl.kernels.chunked_logprob as kernels
import trl.trainer.utils as utils
from test_padding_free import assert_same, batch, logps_and_gradients, make
from trl.trainer.utils import add_fused_lm_head

from speed import output_layer
from speed.output_layer import EmbeddingLookup, adapt_fused_head_to_cpu, add_embedding_gradient_in_place

pytestmark = pytest.mark.usefixtures("fused_head_as_installed")


@pytest.fixture
def scored(monkeypatch):
    """How many positions each call of the fused head projects onto the vocabulary."""
    counts = []

    class Counted:
        @staticmethod
        def apply(hidden, *args):
            counts.append(len(hidden))
            return kernels.ChunkedLogProbFunction.apply(hidden, *args)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counted)
    return counts


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 2**-8)])
def test_the_fused_head_scores_labels_only_and_gives_the_same(scored, monkeypatch, dtype, tolerance):
    model, inputs = make("gemma"), batch()
    add_fused_lm_head(model)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        before = logps_and_gradients(model, inputs)
        monkeypatch.setattr(output_layer, "TILE_WORDS", 64)  # of a vocabulary of 200
        assert adapt_fused_head_to_cpu()
        assert adapt_fused_head_to_cpu()  # again, as the next trial of a process does
        after = logps_and_gradients(model, inputs)
    assert_same(before, after, tolerance)
    labels = inputs["labels"][:, 1:]
    assert scored == [labels.numel(), (labels != -100).sum().item()]
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


def test_a_batch_without_labels_has_a_loss_of_zero():
    """For example if truncation leaves no supervised token; TRL's other way of scoring must accept it too."""
    model, inputs = make("gemma"), batch()
    add_fused_lm_head(model)
    adapt_fused_head_to_cpu()
    inputs["labels"][:] = -100
    loss = model(**inputs, fused_lm_head=True).loss
    loss.backward()
    assert loss == 0


def test_another_trl_is_left_alone(monkeypatch):
    monkeypatch.setattr(output_layer, "version", lambda name: "1.17.0")
    before = utils._use_triton
    assert not adapt_fused_head_to_cpu()
    assert utils._use_triton is before


@pytest.mark.parametrize("family", ["gemma", "gemma3_text"])  # both scale what they look up
def test_the_embeddings_gradient_is_the_same_without_a_second_one(family):
    plain, inputs = make(family), batch()
    inputs["input_ids"][0, 5] = plain.get_input_embeddings().padding_idx  # PyTorch gives it no gradient
    model = copy.deepcopy(plain)
    assert add_embedding_gradient_in_place(model)
    for each in (plain, model):
        add_fused_lm_head(each)
        each(**inputs, fused_lm_head=True).loss.backward()  # the first of two batches that are accumulated
        zero_grad, each.zero_grad = each.zero_grad, lambda: None
        each.gradients = logps_and_gradients(each, inputs)
        each.zero_grad = zero_grad
    assert_same(plain.gradients, model.gradients)
    weight, ids = model.get_input_embeddings().weight, inputs["input_ids"]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.autograd.grad(hidden.sum(), weight, allow_unused=True) == (None,)  # autograd makes none
    model.zero_grad()
    model.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    assert weight.grad.any()  # though nothing comes from the output layer
    with torch.no_grad():
        assert not model.get_input_embeddings()(ids).requires_grad


def test_the_embeddings_gradient_is_the_same_from_run_to_run():
    """With enough numbers for threads to share, and many of them for the same few tokens."""
    embedding, gradients = torch.nn.Embedding(50, 256), []
    ids = torch.randint(0, 20, (2000,), generator=torch.Generator().manual_seed(0))
    grad = torch.randn(2000, 256, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        embedding.weight.grad = None
        EmbeddingLookup.apply(torch.zeros((), requires_grad=True), embedding, ids).backward(grad)
        gradients.append(embedding.weight.grad)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)
    embedding.weight.grad = None
    embedding(ids).backward(grad)
    torch.testing.assert_close(gradients[0], embedding.weight.grad)


def test_a_hook_on_the_gradient_sees_all_of_it():
    """Some optimizers step in the backward pass, from such hooks, and let the gradient go."""
    model, seen = make("gemma"), []
    add_embedding_gradient_in_place(model)
    weight = model.get_input_embeddings().weight
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    model.base_model(input_ids=batch()["input_ids"], use_cache=False).last_hidden_state.sum().backward()
    assert torch.equal(seen[0], weight.grad)


def test_a_copy_of_the_model_learns_for_itself():
    model = make("gemma")
    add_embedding_gradient_in_place(model)
    other = copy.deepcopy(model)
    other.base_model(input_ids=batch()["input_ids"], use_cache=False).last_hidden_state.sum().backward()
    assert other.get_input_embeddings().weight.grad.any()
    assert model.get_input_embeddings().weight.grad is None


def test_embeddings_that_are_not_the_output_layer_are_left_alone():
    model = make("llama")
    assert not add_embedding_gradient_in_place(model)
