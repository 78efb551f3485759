"""Batches without their padding: the same log-probs and the same gradients, from the same rows."""

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

import sft_finetune
from speed import padding_free
from speed.padding_free import FAMILIES, Segment, attend_by_sequence, flatten_batch, remove_padding
from storage.checkpoints import local_checkpoint

SIZES = {
    **{"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128},
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
CONFIGS = {  # of each family, with sliding windows shorter than the sequences where it has them
    "gemma": ("GemmaConfig", {}),
    "gemma3_text": ("Gemma3TextConfig", {"sliding_window": 9, "layer_types": ALTERNATING}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {}),
}  # fmt: skip


def make(family):
    name, changes = CONFIGS[family]
    if "layer_types" in changes:
        changes = changes | {"num_hidden_layers": len(changes["layer_types"])}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**SIZES | changes), dtype=torch.float32).train()


def batch(lengths=(30, 12, 21, 30, 17, 22), prompts=(8, 4, 12)):
    """Rows whose second half begins as the first does, as pairs do."""
    size, length = len(lengths), max(lengths)
    ids = torch.randint(3, 200, (size, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    for row, prompt in enumerate(prompts):
        ids[size // 2 + row, :prompt] = ids[row, :prompt]
    ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logps_and_gradients(model, inputs):
    """Of a loss in which no two tokens weigh the same."""
    model.zero_grad()
    logps = model(**inputs, fused_lm_head=True).log_probs
    (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
    return {"logps": logps.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_same(one, other, tolerance=1e-5):
    for name, expected in one.items():
        atol = tolerance * expected.abs().max().item()
        torch.testing.assert_close(other[name], expected, rtol=tolerance, atol=atol, msg=name)


def test_every_family_is_tested():
    assert tuple(CONFIGS) == FAMILIES


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_equal_the_padded_batchs(family, pairs, checkpointing):
    padded = make(family)
    model = copy.deepcopy(padded)
    assert remove_padding(model, pairs)
    for each in (padded, model):
        add_fused_lm_head(each)
    if checkpointing:
        model.gradient_checkpointing_enable()
    seen = []
    model.base_model.norm.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    inputs = batch()
    assert_same(logps_and_gradients(padded, inputs), logps_and_gradients(model, inputs))
    tokens = inputs["attention_mask"].sum().item()
    assert seen == [(1, tokens - (8 + 4 + 12 if pairs else 0))]  # padding is not computed, and prompts are once


def test_a_batch_becomes_the_row_in_the_docstring():
    a, b, c, d, e, f, g, p, q = range(1, 10)
    row = flatten_batch(
        torch.tensor([[a, b, c, 0], [d, e, f, g]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), pairs=False
    )
    assert row.batch_index.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert row.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert row.row_index.tolist() == [0, 1, 2, 0, 3, 4, 5, 6]
    assert row.segments == [Segment(0, 3), Segment(3, 7)]
    row = flatten_batch(
        torch.tensor([[p, q, a, 0], [p, q, b, c]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), pairs=True
    )
    assert row.batch_index.tolist() == [0, 1, 2, 6, 7]
    assert row.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert row.row_index.tolist() == [0, 1, 2, 0, 0, 1, 3, 4]
    assert row.segments == [Segment(0, 3), Segment(3, 5, 0, 2)]
    assert row.mask(row.segments[1], window=None)[0, 0].tolist() == [[True, True, True, False], [True] * 4]
    assert row.mask(row.segments[1], window=2)[0, 0].tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]


@pytest.mark.parametrize(
    ("lengths", "prompts"),
    [((9, 9), (9,)), ((4, 9), (4,)), ((9, 4), (4,)), ((9, 9), (0,)), ((9, 1), (0,)), ((9, 9), (8,))],
    ids=["alike", "one begins the other", "the other way", "nothing shared", "a single token", "the last token"],
)
def test_pairs_at_the_limits_equal_the_padded_batch(lengths, prompts):
    padded = make("gemma3_text")
    model = copy.deepcopy(padded)
    remove_padding(model, pairs=True)
    for each in (padded, model):
        add_fused_lm_head(each)
    inputs = batch(lengths, prompts)
    assert_same(logps_and_gradients(padded, inputs), logps_and_gradients(model, inputs))


def test_no_sequence_sees_another():
    model = make("gemma")
    remove_padding(model, pairs=False)
    inputs = batch()
    del inputs["labels"]
    before = model.base_model(**inputs, use_cache=False).last_hidden_state
    inputs["input_ids"][1:] = 7
    after = model.base_model(**inputs, use_cache=False).last_hidden_state
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=0)
    assert not torch.allclose(before[1], after[1])


def test_batches_without_right_padding_are_computed_as_before(monkeypatch):
    """Generation, with its cache; padding before a sequence; sequences that TRL has packed, with their positions."""
    padded = make("gemma")
    model = copy.deepcopy(padded)
    remove_padding(model, pairs=False)
    rows = []

    def attend(*args, flat_batch=None, **kwargs):
        rows.append(flat_batch)
        return attend_by_sequence(*args, flat_batch=flat_batch, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, padding_free.ATTENTION, attend)
    ids, mask = batch()["input_ids"], batch()["attention_mask"].flip(1)
    for inputs in (
        {"input_ids": ids, "attention_mask": mask, "use_cache": False},
        {"input_ids": ids[:1], "position_ids": torch.arange(30)[None], "use_cache": False},
        {"input_ids": ids[:1], "attention_mask": torch.ones(1, 30), "use_cache": True},
    ):
        expected = padded.base_model(**inputs).last_hidden_state
        torch.testing.assert_close(model.base_model(**inputs).last_hidden_state, expected)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = [each.eval().generate(ids, attention_mask=mask, **settings) for each in (padded, model)]
    assert torch.equal(*generated)
    assert rows
    assert set(rows) == {None}


def test_other_models_stay_padded():
    eager = make("gemma")
    eager.set_attn_implementation("eager")
    both_ways = make("gemma3_text")
    both_ways.config.use_bidirectional_attention = True
    other = AutoModelForCausalLM.from_config(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=200))
    for model in (eager, both_ways, other):
        before = model.base_model.forward
        assert not remove_padding(model, pairs=False)
        assert model.base_model.forward == before


def test_a_checkpoint_keeps_the_usual_attention(train, sft_config):
    (report,) = train(sft_finetune, sft_config, hyperparameters__training_args__max_steps=1)["checkpoint"]
    config = json.loads((local_checkpoint(report["uuid"], "test") / "config.json").read_text())
    assert padding_free.ATTENTION not in json.dumps(config)
