"""What is computed otherwise at a model's two ends gives what TRL's and PyTorch's own way gives."""

import copy

import pytest
import torch
import trl.kernels.chunked_logprob as kernels
import trl.trainer.utils as utils
from test_padding_free import assert_same, batch, logps_and_gradients, make
from trl.trainer.utils import add_fused_lm_head

import output_layer
from output_layer import add_embedding_gradient_in_place, fit_fused_head_to_cpu


@pytest.fixture
def original(monkeypatch):
    """TRL's fused head as it is installed, whatever an earlier test has made of it."""
    monkeypatch.setattr(utils, "_use_triton", kernels._use_triton)
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768)
    monkeypatch.setattr(kernels, "_addmm_fp32", getattr(kernels._addmm_fp32, "__wrapped__", kernels._addmm_fp32))


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
def test_the_fused_head_scores_labels_only_and_gives_the_same(original, scored, monkeypatch, dtype, tolerance):
    model, inputs = make("gemma"), batch()
    add_fused_lm_head(model)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        before = logps_and_gradients(model, inputs)
        monkeypatch.setattr(output_layer, "TILE_WORDS", 64)  # of a vocabulary of 200
        assert fit_fused_head_to_cpu()
        assert fit_fused_head_to_cpu()  # again, as the next trial of a process does
        after = logps_and_gradients(model, inputs)
    assert_same(before, after, tolerance)
    labels = inputs["labels"][:, 1:]
    assert scored == [labels.numel(), (labels != -100).sum().item()]
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_a_batch_without_labels_is_a_loss_of_zero(original):
    """Of some row nothing is left to learn, say; TRL's other way of scoring must bear it too."""
    model, inputs = make("gemma"), batch()
    add_fused_lm_head(model)
    fit_fused_head_to_cpu()
    inputs["labels"][:] = -100
    loss = model(**inputs, fused_lm_head=True).loss
    loss.backward()
    assert loss == 0


def test_another_trl_is_left_alone(original, monkeypatch):
    monkeypatch.setattr(output_layer, "version", lambda name: "1.17.0")
    before = utils._use_triton
    assert not fit_fused_head_to_cpu()
    assert utils._use_triton is before


@pytest.mark.parametrize("family", ["gemma", "gemma3_text"])  # both scale what they look up
def test_the_embeddings_gradient_is_the_same_without_a_second_one(original, family):
    plain, inputs = make(family), batch()
    inputs["input_ids"][0, 5] = plain.get_input_embeddings().padding_idx  # of which PyTorch learns nothing
    model = copy.deepcopy(plain)
    assert add_embedding_gradient_in_place(model)
    for each in (plain, model):
        add_fused_lm_head(each)
        each(**inputs, fused_lm_head=True).loss.backward()  # the first of two batches that are accumulated
        zero_grad, each.zero_grad = each.zero_grad, lambda: None
        each.gradients = logps_and_gradients(each, inputs)
        each.zero_grad = zero_grad
    assert_same(plain.gradients, model.gradients)
    weight = model.get_input_embeddings().weight
    hidden = model.base_model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
    model.zero_grad()
    hidden.sum().backward()  # nothing from the output layer
    assert weight.grad.any()
    with torch.no_grad():
        assert not model.get_input_embeddings()(inputs["input_ids"]).requires_grad


def test_embeddings_that_are_not_the_output_layer_are_left_alone():
    model = make("llama")
    assert not add_embedding_gradient_in_place(model)
