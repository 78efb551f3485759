"""Batches without their padding: the same log-probs and the same gradients, from the same rows."""

import copy
import itertools
import json
import sys

import pytest
import torch
import transformers
from accelerate.utils import send_to_device
from torch._subclasses import FakeTensorMode
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

import dpo_finetune
import sft_finetune
from speed import padding_free
from speed.padding_free import (
    FAMILIES,
    FlatBatch,
    Segment,
    attend_at_once,
    attend_by_sequence,
    collate_flat,
    flatten_batch,
    remove_padding,
)
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


def attend_with(monkeypatch, attend):
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, padding_free.ATTENTION, attend)


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
    assert row.row_index.tolist() == [[0, 1, 2, 2], [3, 4, 5, 6]]
    assert row.segments == [Segment(0, 3), Segment(3, 7)]
    row = flatten_batch(
        torch.tensor([[p, q, a, 0], [p, q, b, c]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), pairs=True
    )
    assert row.batch_index.tolist() == [0, 1, 2, 6, 7]
    assert row.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert row.row_index.tolist() == [[0, 1, 2, 2], [0, 1, 3, 4]]
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

    attend_with(monkeypatch, attend)
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


UNEVEN = {  # lengths and shared prompts: short ones, and sequences that are all padding
    "usual": ((30, 12, 21, 30, 17, 22), (8, 4, 12)),
    "a single token": ((1, 40, 3, 2, 33, 1), (1, 20, 0)),
    "all padding": ((0, 21, 30, 5, 33, 0), (0, 9, 0)),
}


@pytest.mark.parametrize("lengths", UNEVEN)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_at_once_equals_that_by_segment(monkeypatch, family, pairs, lengths):
    """In float64, where they differ by 1e-15; and the padding has no gradient at all."""
    model, inputs = make(family).double(), batch(*UNEVEN[lengths])
    remove_padding(model, pairs)
    add_fused_lm_head(model)
    by_segment = logps_and_gradients(model, inputs)
    projected, sdpa = [], padding_free.sdpa_attention_forward

    def attend(module, *rows, **kwargs):
        projected.extend(rows[:3])
        for row in rows[:3]:
            row.retain_grad()
        assert rows[0].shape[::2] == inputs["input_ids"].shape
        return sdpa(module, *rows, **kwargs)

    monkeypatch.setattr(padding_free, "sdpa_attention_forward", attend)
    attend_with(monkeypatch, attend_at_once)
    assert_same(by_segment, logps_and_gradients(model, inputs), tolerance=1e-12)
    assert len(projected) == 3 * model.config.num_hidden_layers
    padding = inputs["attention_mask"] == 0
    assert all((row.grad.transpose(1, 2)[padding] == 0).all() for row in projected)


def flat(lengths, prompts=(), pairs=False):
    inputs = batch(lengths, prompts)
    return flatten_batch(inputs["input_ids"], inputs["attention_mask"], pairs)


def test_a_gpu_attends_at_once_where_that_is_computed_to_be_quicker():
    gemma_2b = 8 * 256
    assert flat([100] * 3).at_once_width > 1e6  # no padding: nothing to lose
    assert flat([300, 350, 400, 512] * 2).at_once_width > gemma_2b
    assert flat([3000, 3500, 4000, 4096] * 2).at_once_width < gemma_2b
    assert flat([100, 90]).at_once_width == 0  # two launches are as quick
    assert flat([512] + [20] * 15).at_once_width == 0  # mostly padding
    assert flat([300] * 8, [200] * 4, pairs=True).at_once_width < flat([300] * 8).at_once_width


@pytest.mark.parametrize(
    ("device", "window", "width", "calls"),
    [
        ("cpu", None, 1e9, 4),
        ("cuda", None, 2048, 1),
        ("cuda", None, 2047, 4),
        ("cuda", 90, 2048, 1),
        ("cuda", 89, 8191, 4),
    ],
)
def test_only_a_gpu_attends_at_once(monkeypatch, device, window, width, calls):
    """On a GPU of shapes only, with 8 heads of 256. What the padding adds weighs four times as much with a mask."""
    called, sdpa = [], padding_free.sdpa_attention_forward
    monkeypatch.setattr(
        padding_free, "sdpa_attention_forward", lambda *args, **kw: called.append(1) or sdpa(*args, **kw)
    )
    row = flat([90, 30] * 2)
    with FakeTensorMode():
        tensors = [
            torch.empty(t.shape, dtype=t.dtype, device=device) for t in (row.batch_index, row.positions, row.row_index)
        ]
        row = FlatBatch(*tensors, row.segments)
        row.at_once_width = width
        query = torch.empty(1, 8, 240, 256, device=device)
        attended, _ = attend_by_sequence(torch.nn.Module(), query, query, query, None, row, window)
    assert attended.shape == (1, 240, 8, 256)
    assert len(called) == calls


@pytest.mark.parametrize("attend", [attend_by_sequence, attend_at_once])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_reads_nothing_from_the_device_if_the_loader_flattened(monkeypatch, family, attend):
    """The meta device has no values: whatever would wait for a GPU's cannot be computed there."""
    model = make(family).to("meta")
    remove_padding(model, pairs=True)
    attend_with(monkeypatch, attend)
    inputs = collate_flat(lambda rows: batch(), True, [])
    del inputs["labels"]
    inputs = send_to_device(inputs, "meta", non_blocking=True)
    model.base_model(**inputs, use_cache=False).last_hidden_state.sum().backward()
    del inputs["flat_batch"]
    with pytest.raises(NotImplementedError, match="meta"):
        model.base_model(**inputs, use_cache=False)


def test_a_flat_batch_is_pinned_and_sent_to_the_device_with_its_batch(monkeypatch):
    loaded = collate_flat(lambda rows: batch(), True, [])
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    sent = send_to_device(pin_memory(loaded), "meta", non_blocking=True)["flat_batch"]
    assert len(pinned) == 3 + 3
    assert {t.device.type for t in (sent.batch_index, sent.positions, sent.row_index)} == {"meta"}
    assert sent.segments == loaded["flat_batch"].segments


@pytest.mark.parametrize("mask", [None, batch()["attention_mask"].flip(1)], ids=["packed rows", "left padding"])
def test_a_batch_that_stays_padded_gets_no_flat_batch(mask):
    loaded = {"input_ids": batch()["input_ids"]} | ({} if mask is None else {"attention_mask": mask})
    assert collate_flat(lambda rows: dict(loaded), False, []).keys() == loaded.keys()


@pytest.mark.parametrize(
    ("script", "changes", "where"),
    [
        (sft_finetune, {}, ["collate_flat"]),
        (sft_finetune, {"training_args__dataloader_num_workers": 1}, []),  # in the worker
        (dpo_finetune, {}, ["forward", "collate_flat"]),  # the reference pass, which is before the training
        (dpo_finetune, {"precompute_ref_log_probs": False}, ["collate_flat"]),
    ],
)
def test_batches_of_training_and_evaluation_are_flattened_as_they_are_loaded(
    train, trainers, request, monkeypatch, script, changes, where
):
    config = request.getfixturevalue("sft_config" if script is sft_finetune else "dpo_config")
    callers = []

    def flatten(*args):
        callers.append(sys._getframe(1).f_code.co_name)
        return flatten_batch(*args)

    monkeypatch.setattr(padding_free, "flatten_batch", flatten)
    assert train(script, config, **{f"hyperparameters__{name}": value for name, value in changes.items()})["validation"]
    assert [caller for caller, _ in itertools.groupby(callers)] == where
    (trainer,) = trainers
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        for loaded in loader:
            expected = flatten_batch(loaded["input_ids"], loaded["attention_mask"], script is dpo_finetune)
            assert loaded["flat_batch"].segments == expected.segments
            assert torch.equal(loaded["flat_batch"].row_index, expected.row_index)


@pytest.mark.parametrize(
    "changes",
    [{"model_init_kwargs": {"attn_implementation": "eager"}}, {"accelerator_config": {"dispatch_batches": True}}],
)
def test_a_trainer_that_cannot_use_them_gets_no_flat_batches(train, trainers, sft_config, changes):
    train(
        sft_finetune,
        sft_config,
        **{f"hyperparameters__training_args__{name}": value for name, value in changes.items()},
    )
    assert "flat_batch" not in next(iter(trainers[0].get_train_dataloader()))
