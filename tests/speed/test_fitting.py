"""What is fitted into memory: activation checkpointing, batch sizes; and a start in less once memory has run out."""

from types import SimpleNamespace

import pytest
import torch
from test_memory import GEMMA_2B, HEADS, SIZES, adapted, dpo, on_meta, sft
from transformers import GemmaConfig

import sft_finetune
from errors import TemporaryError, UserError
from speed import fitting
from speed.activations import decoder_layers
from speed.fitting import CannotEstimate, choose_checkpointing, choose_reference_batch, memory_key, merge_batches
from speed.memory import TrainingSetup, evaluation_bytes
from trial.context import Trial

ARGS = "hyperparameters__training_args__"


@pytest.fixture(scope="module")
def layers():
    """A model whose work is in its layers."""
    return on_meta(GemmaConfig(**SIZES | {"vocab_size": 64, "num_hidden_layers": 6}, **HEADS))


def test_as_few_layers_are_checkpointed_as_memory_asks_for(layers):
    # By every n-th of six layers. With every fifth, the last one is one of them, and saves nothing.
    bytes_needed = {0: 84, 6: 80, 4: 70, 3: 70, 2: 60, 1: 30}.__getitem__
    for usable, every in ((84, 0), (83, 6), (70, 4), (69, 2), (59, 1), (1, 1)):
        assert choose_checkpointing(None, layers, bytes_needed, usable).every == every
    assert choose_checkpointing(None, layers, bytes_needed, 83, partial=False).every == 1
    choice = choose_checkpointing(None, layers, {0: 8.4e10, 6: 8e10}.__getitem__, 8.35e10)
    expected = "activation checkpointing of one layer in 6 (about 84.0 GB needed without it, 83.5 usable)"
    assert str(choice) == expected


def test_checkpointing_that_costs_nothing_is_on():
    vocabulary = on_meta(GemmaConfig(**SIZES | {"vocab_size": 20000}, **HEADS))
    assert choose_checkpointing(None, vocabulary, lambda every: 1, 100) == (1, "recomputing adds only 4% to a step")
    for setting in (False, True):  # in the YAML
        assert choose_checkpointing(setting, vocabulary, lambda every: 1, 100) == (setting, "as set")


def test_recomputing_under_an_adapter_adds_more_to_a_smaller_step():
    model = adapted(on_meta(GemmaConfig(**SIZES | {"vocab_size": 6000}, **HEADS)))
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    output, layers = 6000 * 64, sum(p.numel() for p in decoder_layers(model).parameters()) - adapters
    share = 2 * (layers + adapters) / (4 * layers + 6 * adapters + 6 * output)
    assert share > 1 / 8 > 2 * layers / (6 * layers + 8 * output)  # all weights trained: it is on
    assert choose_checkpointing(None, model, lambda every: 1, 100).every == 0
    vocabulary = adapted(on_meta(GemmaConfig(**SIZES | {"vocab_size": 20000}, **HEADS)))
    share = 2 * (layers + adapters) / (4 * layers + 6 * adapters + 6 * 20000 * 64)
    reason = f"recomputing adds only {share:.0%} to a step"
    assert choose_checkpointing(None, vocabulary, lambda every: 1, 100) == (1, reason)


def test_an_adapter_has_its_own_memory_of_what_ran_out(layers):
    setup = TrainingSetup.from_args(sft(), False, False, 1, "cpu")
    models = [layers, *(adapted(on_meta(layers.config), r=r) for r in (4, 8))]
    assert len({memory_key(model, sft(), setup) for model in models}) == 3
    again = adapted(on_meta(layers.config), r=8)
    assert memory_key(again, sft(), setup) == memory_key(models[2], sft(), setup)


def test_a_model_whose_memory_is_unknown_is_checkpointed(layers):
    def needed(every):
        raise CannotEstimate("no such name")

    assert choose_checkpointing(None, layers, needed, 100) == (1, "gemma's memory cannot be estimated: no such name")


SIZES_OF_8 = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}


@pytest.mark.parametrize(
    ("args", "rows", "fitting_rows", "merged"),
    [
        (sft(**SIZES_OF_8), 99, 8, 8),
        (sft(**SIZES_OF_8), 99, 7, 4),
        (sft(**SIZES_OF_8), 99, 0, 1),
        (sft(**SIZES_OF_8, dataloader_drop_last=True), 98, 8, 2),  # with 4 or 8 more rows would be dropped
        (sft(per_device_train_batch_size=2, gradient_accumulation_steps=3), 99, 8, 3),
        (dpo(**SIZES_OF_8), 96, 8, 8),
        (dpo(**SIZES_OF_8), 100, 8, 4),  # with 8, a mean over 4 pairs would weigh as much as one over 8
        (dpo(**SIZES_OF_8), 99, 8, 1),
        (dpo(**SIZES_OF_8, loss_type=["sigmoid", "sft"]), 96, 8, 1),  # a mean over a batch's tokens
    ],
)
def test_micro_batches_are_computed_at_once_if_that_changes_nothing(args, rows, fitting_rows, merged):
    assert merge_batches(args, rows, lambda count: count <= fitting_rows) == merged


def test_ranks_are_given_the_same_rows(monkeypatch):
    """Two ranks with 3 batches of 4 rows between them would be given rows twice."""
    args = sft(**SIZES_OF_8)
    monkeypatch.setattr(type(args), "world_size", 2)
    assert [merge_batches(args, rows, lambda count: True) for rows in (12, 16, 13)] == [2, 8, 1]


def test_a_container_has_less_memory_than_its_machine(monkeypatch):
    mine = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=300, shared=100))
    monkeypatch.setattr(fitting.psutil, "Process", lambda: mine)
    machine = fitting.free_memory("cpu")
    files = {"max": "5000000000", "current": "4999999000", "stat": "active_file 7\ninactive_file 500"}
    monkeypatch.setattr(fitting.Path, "read_text", lambda self: files[self.name.removeprefix("memory.")])
    assert fitting.free_memory("cpu") == 1500 + 200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fitting.free_memory("cpu") == 750 + 200
    monkeypatch.setitem(files, "max", "max")
    assert fitting.free_memory("cpu") > machine / 4


def test_a_reference_pass_takes_what_fits_where_gradients_will_be():
    layers = on_meta(GemmaConfig(**GEMMA_2B))
    setup = TrainingSetup(torch.bfloat16, 0, True, False, "adamw_torch_fused", False, False, 1, "cuda")
    gradients = 4 * layers.num_parameters()
    sizes = {}
    for tokens in (64, 3072, 100_000):
        sizes[tokens] = choose_reference_batch(layers, setup, lambda pairs, tokens=tokens: (1, pairs * tokens), rows=1)
        needed = evaluation_bytes(layers, setup, (1, sizes[tokens] * tokens))
        assert needed <= gradients or sizes[tokens] == 1
    assert 64 == sizes[64] > sizes[3072] > sizes[100_000] == 1


def test_a_reference_pass_of_an_adapter_takes_what_a_step_will(layers):
    """An adapter's gradients leave room for nothing."""
    model = adapted(on_meta(layers.config, torch.bfloat16))
    setup = TrainingSetup.from_args(dpo(bf16=True), True, False, 1, "cuda")
    sizes = [choose_reference_batch(model, setup, lambda pairs: (1, 300 * pairs), rows=rows) for rows in (1, 4, 16)]
    assert all(size >= rows for size, rows in zip(sizes, (1, 4, 16), strict=True))
    assert sizes[0] < sizes[2] < 64


def test_a_trial_starts_again_in_less_memory(train, sft_config, monkeypatch):
    """Memory runs out in the third step of a training whose second was saved; the next trial knows it from the first"""
    monkeypatch.setattr(fitting, "free_memory", lambda device_type: 10**12)
    import trl

    step = trl.SFTTrainer.training_step

    def run_out(self, model, *args, **kwargs):
        if self.state.global_step == 2 and not model.is_activation_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(self, model, *args, **kwargs)

    left_open = {f"{ARGS}activation_checkpointing": None, f"{ARGS}save_strategy": "steps", f"{ARGS}save_steps": 2}
    whole = train(sft_finetune, sft_config, output="whole", **left_open)
    monkeypatch.setattr(trl.SFTTrainer, "training_step", run_out)
    again = train(sft_finetune, sft_config, output="again", **left_open)
    statuses = [report["status"] for report in again["status"]]
    (line,) = [status for status in statuses if status.startswith("out of memory")]
    first = again["checkpoint"][0]["uuid"]
    assert line == f"out of memory; training in less of it, and slower, from checkpoint {first}"
    off, on = (status for status in statuses if status.startswith("training with "))
    assert "activation checkpointing off" in off
    assert "activation checkpointing on (memory ran out before: " in on

    def losses(reports):
        return [report["metrics"]["loss"] for report in reports["training"] if "loss" in report["metrics"]]

    assert losses(again) == losses(whole)
    assert len(losses(whole)) == 4


def test_memory_that_cannot_be_saved_is_one_line(call, write_config, sft_config, tmp_path, monkeypatch):
    import trl

    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(trl.SFTTrainer, "training_step", run_out)
    status, _, err = call(sft_finetune.main, "--config", write_config(sft_config), "--output", tmp_path / "out")
    assert status == 2
    remedy = "set activation_checkpointing: true, or lower the batch sizes or the length limits"
    assert err.splitlines()[-1] == f"error: out of memory: {remedy} (CUDA out of memory. Tried to allocate 2 GiB)"


@pytest.mark.parametrize(("on_cluster", "ranks"), [(True, 1), (False, 2)])
def test_a_cluster_or_several_ranks_need_another_start(on_cluster, ranks, tmp_path):
    def train(trial):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    ran_out = tmp_path / "cache" / "memory-ran-out"
    context = SimpleNamespace(distributed=SimpleNamespace(size=ranks))
    trial = Trial(None, context, 1, None, None, tmp_path, on_cluster, memory_ran_out=ran_out)
    with pytest.raises(TemporaryError, match="out of memory; the next start trains in less of it"):
        trial.run(train)
    assert ran_out.exists()
    with pytest.raises(TemporaryError):  # another rank of this machine, after the first has left the file
        trial.run(train)
    trial.memory_ran_out = None  # the next start has nothing left to choose
    with pytest.raises(UserError, match="out of memory: set activation_checkpointing: true"):
        trial.run(train)
