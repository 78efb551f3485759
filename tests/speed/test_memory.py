"""The estimate of a training's memory: its accounting, and its total against what a training really takes."""

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig
from processes import CONTEXT, REPO
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GemmaConfig, MixtralConfig
from trl import DPOConfig, SFTConfig

from adapters.stack import add_adapter, base_model, lora_layers
from benchmarks.throughput import GEMMA_2B
from config.hyperparameters import DPOHyperparameters, SFTHyperparameters, parse_hyperparameters
from speed.activations import kept_bytes
from speed.fitting import resident_memory
from speed.memory import TrainingSetup, estimate_memory, largest_batch, state_bytes
from speed.padding_free import remove_padding
from trial.policy import load_policy

SHAPE = (2, 64)
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 1000}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
ARGS = "hyperparameters__training_args__"
LORA = {"r": 8, "lora_dropout": 0.1}


def on_meta(config, dtype=torch.float32):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def adapted(model, **changes):
    """The model with a new adapter in its layers."""
    config = LoraConfig(**LORA | {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)
    return base_model(add_adapter(model, config, "a base", seed=0))


@pytest.fixture(scope="module")
def meta_model():
    return on_meta(GemmaConfig(**SIZES, **HEADS))


def sft(**changes):
    return SFTConfig(**({"use_cpu": True, "bf16": False, "activation_checkpointing": False} | changes))


def dpo(**changes):
    return DPOConfig(**({"use_cpu": True, "bf16": False, "activation_checkpointing": False} | changes))


def setup_of(args, devices=1, device_type="cpu"):
    reference = isinstance(args, DPOConfig) and not args.precompute_ref_log_probs
    setup = TrainingSetup.from_args(args, False, reference, devices, device_type)
    return dataclasses.replace(setup, checkpoint_every=int(args.activation_checkpointing))


def estimate(model, args, devices=1, device_type="cpu", train=SHAPE, evaluation=None):
    return estimate_memory(model, setup_of(args, devices, device_type), train, evaluation, process=0)


def test_weights_gradients_and_optimizer_are_counted_in_float32(meta_model):
    """Tied embeddings once, as a model that has weights counts them."""
    real = AutoModelForCausalLM.from_config(meta_model.config)
    size = sum(p.numel() * 4 for p in real.parameters())
    result = estimate(meta_model, sft())
    assert (result.weights, result.gradients, result.optimizer) == (size, size, 2 * size)
    assert result.total == sum(dataclasses.astuple(result))


@pytest.mark.parametrize("config", [GemmaConfig, Gemma3TextConfig])
@pytest.mark.parametrize(
    ("base", "dropout"), [(None, 0), (torch.float32, 0.1), (torch.bfloat16, 0.1), (torch.bfloat16, 0)]
)
def test_activations_are_what_autograd_keeps(config, base, dropout):
    """The same forward pass with real tensors, padded so that it needs its mask, keeps as many bytes.

    With all weights trained, or with an adapter on a frozen base of that type, as bf16 autocast has it.
    """
    model = on_meta(config(**SIZES, **HEADS), base or torch.float32)
    real, kept = AutoModelForCausalLM.from_config(model.config, dtype=base or torch.float32), {}
    if base:
        model, real = adapted(model), adapted(real, lora_dropout=dropout)
    dtype = base if base is torch.bfloat16 else None
    for layer in lora_layers(real):
        layer.cast_input_dtype_enabled = dtype is None
    ids, mask = torch.zeros(SHAPE, dtype=torch.long), torch.ones(SHAPE, dtype=torch.long)
    mask[1, -8:] = 0

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        real.train().model(input_ids=ids, attention_mask=mask, use_cache=False)
    for parameter in real.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    estimated = kept_bytes(model, dtype, SHAPE, dropout=dropout > 0)
    assert estimated == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.02)


def test_a_gpus_dropout_keeps_smaller_masks():
    """Of each number that goes into an adapter and needs a gradient: not of the first layer's queries, keys, values."""
    model = adapted(on_meta(GemmaConfig(**SIZES, **HEADS)))
    numbers = 4 * (5 * 64 + 4 * 16 + 256) - 3 * 64
    masks = [kept_bytes(model, None, SHAPE, on_gpu=on_gpu) for on_gpu in (False, True)]
    assert masks[0] - masks[1] == 2 * 64 * numbers * (4 - 1)


def test_attention_without_padding_keeps_no_mask(meta_model):
    """Of N tokens in one sequence, or in several without their padding, bytes are a multiple of N; masks are of N^2."""
    once, twice = (kept_bytes(meta_model, None, (1, tokens)) for tokens in (512, 1024))
    assert twice == pytest.approx(2 * once, rel=0.01)


def test_a_batch_is_its_largest_rows():
    lengths = np.array([[3, 9], [4, 4], [8, 1]])
    assert largest_batch(lengths, 2, padding_free=False) == (4, 9)
    assert largest_batch(lengths, 2, padding_free=True) == (1, 12 + 9)
    assert largest_batch(lengths, 9, padding_free=True) == (1, 29)


def test_a_model_that_cannot_be_traced_counts_with_its_config():
    model = on_meta(MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2))
    assert kept_bytes(model, None, SHAPE) == 4 * 2 * 64 * 4 * (10 * 64 + 6 * 64 + 4 * 2 * 256)


def test_checkpointing_keeps_less_and_longer_batches_more(meta_model):
    whole, long, batch = (estimate(meta_model, sft(), train=shape) for shape in (SHAPE, (2, 128), (4, 64)))
    checkpointed = estimate(meta_model, sft(activation_checkpointing=True))
    assert checkpointed.activations < whole.activations < min(long.activations, batch.activations)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_checkpointing_some_layers_keeps_something_in_between(meta_model, device_type):
    args = sft()
    setup = setup_of(args, device_type=device_type)
    totals = [
        estimate_memory(meta_model, dataclasses.replace(setup, checkpoint_every=every), (8, 512), None, 0).total
        for every in (0, 4, 2, 1)  # of no layer, of one, two and all four
    ]
    assert totals == sorted(totals, reverse=True)
    assert len({*totals}) == 4


# Peaks that torch reserved on an H100, in GB; see benchmarks/README.md.
H100 = {
    "SFT, 2 x 4096": ({"checkpoint_every": 0}, 2 * 4096, 66.7),
    "activation checkpointing": ({"checkpoint_every": 1}, 2 * 4096, 43.3),
    "accumulating": ({"accumulates": True}, 4096, 61.7),
    "compiled layers": ({"fused": True}, 2 * 4096, 56.8),
    "DPO, 2 x 2048 with prompts of half the length": ({}, 2 * 3 * 1024, 59.7),
}


@pytest.mark.parametrize("case", H100)
def test_estimates_for_a_gpu_are_within_two_percent_of_what_was_measured(case):
    """Gemma-2B under bf16 autocast, in one process."""
    changes, tokens, measured = H100[case]
    model = on_meta(GemmaConfig(**GEMMA_2B))
    remove_padding(model, pairs=False)
    setup = TrainingSetup(torch.bfloat16, 0, False, False, "adamw_torch_fused", False, False, 1, "cuda")
    estimated = estimate_memory(model, dataclasses.replace(setup, **changes), (1, tokens), (1, 4096), process=0)
    assert estimated.total / 1e9 == pytest.approx(measured, rel=0.02)


def test_autocast_halves_some_activations():
    model = on_meta(GemmaConfig(**SIZES, **HEADS))
    assert kept_bytes(model, torch.bfloat16, (8, 64)) < kept_bytes(model, None, (8, 64))


def test_dpo_holds_a_reference_model_unless_its_log_probs_are_computed_before(meta_model):
    with_reference = estimate(meta_model, dpo(precompute_ref_log_probs=False))
    without = estimate(meta_model, dpo(precompute_ref_log_probs=True))
    assert with_reference.weights == 2 * without.weights
    assert with_reference.gradients == without.gradients


def test_an_adapter_is_trained_in_float32_on_frozen_weights_in_their_own_type():
    base, rank = on_meta(GemmaConfig(**SIZES, **HEADS), torch.bfloat16), 8
    whole = base.num_parameters()
    model = adapted(base)
    # Of a layer: queries and what attention returns, keys and values, three matrices of the MLP.
    trained = 4 * rank * (2 * (64 + 64) + 2 * (64 + 16) + 3 * (64 + 256))
    result = estimate(model, sft())
    assert (result.weights, result.gradients, result.optimizer) == (2 * whole + 4 * trained, 4 * trained, 8 * trained)
    pairs = estimate(model, dpo(precompute_ref_log_probs=True))
    assert pairs.weights == result.weights + 4 * trained  # the adapter as it began, for the reference
    assert pairs.gradients == result.gradients
    assert pairs.activations < result.activations  # TRL switches DPO's dropout off


@pytest.mark.parametrize(("four_bit", "card"), [(False, 24e9), (True, 16e9)])
def test_gemma_2b_with_an_adapter_fits_a_common_card(four_bit, card):
    """One row of 4096 tokens without activation checkpointing, compiled, with bf16 autocast; CUDA takes 0.5 GB more."""
    model = adapted(on_meta(GemmaConfig(**GEMMA_2B), torch.bfloat16), r=16, lora_dropout=0.05)
    remove_padding(model, pairs=False)
    setup = TrainingSetup.from_args(sft(bf16=True), True, False, 1, "cuda", four_bit)
    estimated = estimate_memory(model, setup, (1, 4096), (1, 4096), process=0)
    assert 0.5 * card < estimated.total < card - 0.3e9


def test_rows_of_new_tokens_take_a_copy_of_the_embeddings_and_its_gradient():
    config = GemmaConfig(**SIZES | {"vocab_size": 20000}, **HEADS)
    models = [on_meta(config, dtype) for dtype in (torch.bfloat16, torch.float32)]
    numbers = 20000 * 64
    for model, of_copy in zip(models, (2 + 4 + 2, 4 + 4), strict=True):
        plain = estimate(adapted(model), sft())
        model = on_meta(config, model.dtype)
        rows = estimate(adapted(model, trainable_token_indices={"embed_tokens": [19998, 19999]}), sft())
        assert rows.activations - plain.activations == pytest.approx(of_copy * numbers, rel=0.03)
        assert rows.weights - plain.weights == 4 * 2 * 64


def test_an_adapter_on_another_is_counted_with_it():
    config = LoraConfig(target_modules=["q_proj"])
    alone, both = (add_adapter(on_meta(GemmaConfig(**SIZES, **HEADS)), config, "a base", seed=0) for _ in range(2))
    both.add_adapter("below_0", LoraConfig(r=16, target_modules="all-linear"))
    one, two = (estimate(base_model(stack), sft()) for stack in (alone, both))
    assert two.gradients == one.gradients
    assert two.weights - one.weights == 4 * 4 * 16 * (2 * (64 + 64) + 2 * (64 + 16) + 3 * (64 + 256))


def test_fsdp_divides_what_ddp_repeats(meta_model):
    one = estimate(meta_model, sft(), device_type="cuda")
    sharded = estimate(meta_model, sft(fsdp=True), devices=4, device_type="cuda")
    repeated = estimate(meta_model, sft(), devices=4, device_type="cuda")
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(sharded, name) == getattr(one, name) // 4
    assert sharded.activations > one.activations  # a layer at a time is whole
    assert (repeated.weights, repeated.gradients) == (one.weights, 2 * one.gradients)
    assert one.process == 0


def test_optimizers_differ_in_their_state(meta_model):
    bytes_of = {name: state_bytes(name) for name in ("adamw_torch_fused", "paged_adamw_8bit", "sgd", "lion_32bit")}
    assert bytes_of == {"adamw_torch_fused": 8, "paged_adamw_8bit": 2, "sgd": 0, "lion_32bit": 4}
    assert state_bytes("one of tomorrow") == 8
    # Its step takes two temporaries of the embeddings' size; for a micro-batch this small they decide.
    embeddings = 4 * 1000 * 64
    assert estimate(meta_model, sft(optim="adamw_torch"), train=(1, 1)).activations == 2 * embeddings


def test_a_large_evaluation_decides(meta_model):
    training, both = (estimate(meta_model, sft(), evaluation=shape) for shape in (None, (64, 64)))
    assert both.activations > training.activations


def train_and_compare(script, hparams_class, path, folder):
    """In a process of its own: write the estimate, train, write the peak of this process."""
    os.chdir(REPO)
    config = yaml.safe_load(Path(path).read_text())["hyperparameters"]
    hparams = parse_hyperparameters(hparams_class, config)
    args, model = hparams.args, base_model(load_policy(hparams, config["model_name"], weights=False)[0])
    sequences = args.per_device_train_batch_size * (2 if script == "dpo_finetune" else 1)
    shape = (sequences, args.max_length)  # every row is as long or longer
    estimated = estimate_memory(model, setup_of(args), shape, shape, process=resident_memory()).total
    torch.set_num_threads(1)  # tests may run beside each other
    sys.argv = [f"{script}.py", "--config", path, "--output", f"{folder}/out"]
    importlib.import_module(script).main()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    measured = int(status["VmHWM"].split()[0]) * 1024
    Path(folder, "compared.json").write_text(json.dumps([estimated, measured]))


@pytest.fixture(scope="module")
def larger(tiny, tmp_path_factory):
    """A random Gemma of 43 million parameters: large enough that it needs more memory than Python does."""
    folder = tmp_path_factory.mktemp("larger")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 7, "vocab_size": 32000}
    model = AutoModelForCausalLM.from_config(GemmaConfig(**sizes, **HEADS | {"head_dim": 64}))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny / "base").save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, to read a process's peak")
@pytest.mark.parametrize(("kind", "lora"), [("sft", None), ("dpo", None), ("sft", LORA), ("dpo", LORA)])
def test_a_training_peaks_within_a_quarter_of_the_estimate(
    kind, lora, sft_config, dpo_config, tiny, larger, write_config, tmp_path
):
    changes = {
        "hyperparameters__model_name": str(larger),
        "hyperparameters__lora": lora,
        f"{ARGS}max_steps": 2,
        f"{ARGS}per_device_train_batch_size": 2,
        f"{ARGS}per_device_eval_batch_size": 2,
    }
    if kind == "sft":
        changes["hyperparameters__dataset_subsets"] = [{"subset": "home", "number_of_samples": 10}]
        path = write_config(sft_config, **changes, hyperparameters__max_seq_length=64)
    else:
        changes["hyperparameters__datasets"] = [{"name": str(tiny / "questions"), "number_of_samples": 40}]
        changes["hyperparameters__precompute_ref_log_probs"] = False  # a second model; with lora, none
        path = write_config(dpo_config, **changes, hyperparameters__max_length=64)
    hparams_class = {"sft": SFTHyperparameters, "dpo": DPOHyperparameters}[kind]
    process = CONTEXT.Process(target=train_and_compare, args=(f"{kind}_finetune", hparams_class, path, str(tmp_path)))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    estimated, measured = json.loads((tmp_path / "compared.json").read_text())
    assert estimated == pytest.approx(measured, rel=0.25)
