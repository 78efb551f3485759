"""Trainings on a base of 4 bits, for `test_four_bit.py`. They use bitsandbytes' kernels for CPUs."""

import math

import pytest
import torch
from adapted import ARGS, LORA, call_at_start, few_pairs, folder_of, losses, own_weights, uuid_of
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import dpo_finetune
import sft_finetune
from adapters.four_bit import count_weights
from config.lora import build_quantization
from speed.memory import base_linears, weight_bytes
from trial.models import load_model_and_tokenizer

# The CPU's kernels take widths that are multiples of 64.
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 512},
}
QLORA = {
    "hyperparameters__load_in_4bit": True,
    "hyperparameters__lora": LORA | {"target_modules": "all-linear"},
    f"{ARGS}bf16": True,
    f"{ARGS}learning_rate": 1e-2,
}


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch):
    monkeypatch.setattr("config.lora.check_4bit", lambda *args, **kwargs: None)
    # On CPUs with AVX512_BF16 an evaluation would pack the weights (0.50) for a kernel that has no backward pass.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def base(tiny, tmp_path):
    """Weights in bf16's numbers, as on the hub."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma", vocab_size=len(tokenizer), **SIZES, **ids, initializer_range=0.1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


class Gradients(TrainerCallback):
    types: set[torch.dtype] = set()  # noqa: RUF012

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.types |= {weight.grad.dtype for weight in model.parameters() if weight.grad is not None}


def logits_of(model):
    ids = torch.arange(2, 62).view(3, 20) * 29 % model.config.vocab_size
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        return model.eval()(input_ids=ids).logits.float()


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


def test_sft_and_dpo(train, trainers, sft_config, dpo_config, tiny, base, monkeypatch):
    at_start = []

    def look(trainer):
        trainer.add_callback(Gradients())
        quantized = {n: m.weight.clone() for n, m in trainer.model.named_modules() if type(m) is Linear4bit}
        at_start.append((quantized, own_weights(trainer.model)))

    call_at_start(monkeypatch, look)
    sft = train(sft_finetune, sft_config, output="sft", hyperparameters__model_name=base, **QLORA)
    assert losses(sft)[-1] < losses(sft)[0] - 0.1
    changes = few_pairs(tiny) | QLORA | {"hyperparameters__model_ckpt": uuid_of(sft)}
    ended = [(trainers[-1].model, sft)]
    for precompute in (True, False):
        changes["hyperparameters__precompute_ref_log_probs"] = precompute
        dpo = train(dpo_finetune, dpo_config, output=f"dpo-{precompute}", **changes)
        # A pass over other batches sums bf16 numbers in another order.
        assert losses(dpo)[0] == pytest.approx(math.log(2), abs=0.02 if precompute else 1e-6)
        ended.append((trainers[-1].model, dpo))

    for (model, reports), (quantized, own) in zip(ended, at_start, strict=True):
        assert len(quantized) == 2 * 7
        for name, weight in quantized.items():
            assert weight.dtype == torch.uint8
            assert torch.equal(model.get_submodule(name).weight, weight)
        assert {weight.dtype for weight in own.values()} == {torch.float32}
        assert {weight.dtype for weight in own_weights(model).values()} == {torch.float32}
        assert any(not torch.equal(weight, own[name]) for name, weight in own_weights(model).items())
        expected = logits_of(model)
        merged, _ = load_model_and_tokenizer(str(folder_of(reports)))
        assert merged.dtype == torch.float32
        assert distance(logits_of(merged), expected) < 0.02
        with monkeypatch.context() as patch:
            patch.setattr("adapters.four_bit.round_to_4bit", lambda model: None)
            unrounded, _ = load_model_and_tokenizer(str(folder_of(reports)))
        assert distance(logits_of(unrounded), expected) > 0.05
    assert Gradients.types == {torch.float32}


def test_what_stands_on_an_adapter_stands_on_its_4_bits(train, trainers, sft_config, dpo_config, tiny, base):
    """Though it is not trained on 4 bits itself."""
    sft = train(sft_finetune, sft_config, output="sft", hyperparameters__model_name=base, **QLORA)
    changes = few_pairs(tiny) | {"hyperparameters__lora": LORA, "hyperparameters__model_ckpt": uuid_of(sft)}
    dpo = train(dpo_finetune, dpo_config, output="dpo", **changes)
    assert losses(dpo)[0] == pytest.approx(math.log(2), abs=1e-6)
    expected = logits_of(trainers[-1].model)
    for merge in (True, False):
        model, _ = load_model_and_tokenizer(str(folder_of(dpo)), merge=merge)
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_the_estimate_counts_four_bits_as_bitsandbytes_holds_them(base):
    """As much for a model without values, in a dry run, as for a real one, but for the tables that layers share."""
    quantization = build_quantization(torch.bfloat16)
    model, _ = load_model_and_tokenizer(base, dtype=torch.bfloat16, quantization_config=quantization)
    shapes, _ = load_model_and_tokenizer(base, weights=False, dtype=torch.bfloat16)
    held = sum(weight.nbytes for weight in model.parameters())
    for layer in base_linears(model):
        held += layer.weight.quant_state.absmax.nbytes + layer.weight.quant_state.state2.absmax.nbytes
    assert len(base_linears(model)) == 2 * 7
    assert weight_bytes(model, four_bit=True) == weight_bytes(shapes, four_bit=True) == pytest.approx(held, rel=1e-3)
    assert sum(map(count_weights, model.parameters())) == shapes.num_parameters()
