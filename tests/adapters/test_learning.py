"""What LoRA trains, in which types, and that everything else stays as it was."""

import pytest
import torch
from adapted import ARGS, LORA, SFT, call_at_start, few_pairs, folder_of, own_weights, uuid_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import dpo_finetune
import sft_finetune
from trial.models import load_model_and_tokenizer


class Watch(TrainerCallback):
    """Keeps what each step's gradients are, and every weight before the first."""

    def __init__(self, trainer):
        self.trainer, self.gradients = trainer, {}
        self.before = {name: weight.detach().clone() for name, weight in self.weights()}

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.gradients = {n: w.grad.clone() for n, w in self.trainer.model.named_parameters() if w.grad is not None}

    def weights(self):
        return [*self.trainer.model.named_parameters(), *self.trainer.model.named_buffers()]

    def changed(self):
        after = dict(self.weights())
        assert after.keys() == self.before.keys()
        return {name for name, weight in after.items() if not torch.equal(weight, self.before[name])}


@pytest.fixture
def watches(monkeypatch):
    made = []

    def watch(trainer):
        made.append(Watch(trainer))
        trainer.add_callback(made[-1])

    call_at_start(monkeypatch, watch)
    return made


def assert_only_the_adapter_learned(watch, frozen_type):
    trainer = watch.trainer
    own = own_weights(trainer.model)
    learning = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert own.keys() == learning.keys() == watch.gradients.keys() == watch.changed()
    optimized = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    assert {id(weight) for weight in optimized} == {id(weight) for weight in learning.values()}
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    assert {t.dtype for t in (*optimized, *watch.gradients.values(), *states)} == {torch.float32}
    assert len(states) == 2 * len(optimized)
    weights = trainer.model.named_parameters()
    base = [weight for name, weight in weights if not {"default", "ref", "below_0"} & {*name.split(".")}]
    assert {weight.dtype for weight in base} == {frozen_type}


def test_only_the_adapter_learns_in_float32(train, watches, sft_config, dpo_config, tiny):
    """SFT with new tokens, then DPO above it. The bf16 base, SFT's adapter and TRL's copy of DPO's stay as they are."""
    changes = {f"{ARGS}bf16": True, f"{ARGS}max_steps": 2}
    sft = train(sft_finetune, sft_config, output="sft", hyperparameters__lora=LORA, **SFT, **changes)
    changes |= {"hyperparameters__lora": LORA | {"target_modules": "all-linear"}, **few_pairs(tiny)}
    changes |= {"hyperparameters__model_ckpt": uuid_of(sft), "hyperparameters__precompute_ref_log_probs": False}
    train(dpo_finetune, dpo_config, output="dpo", **changes)
    for watch in watches:
        assert_only_the_adapter_learned(watch, torch.bfloat16)
    adapters = {part for name in watches[1].before for part in name.split(".") if part in ("ref", "default", "below_0")}
    assert adapters == {"ref", "default", "below_0"}
    saved = load_file(folder_of(sft) / "adapter_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    for name, weight in watches[1].before.items():  # SFT's adapter is there as it was saved
        if "below_0" in name.split("."):
            assert torch.equal(weight, saved[name.replace(".below_0", "")])
    whole = load_file(tiny / "base" / "model.safetensors")
    for name, weight in watches[0].trainer.model.get_base_model().named_parameters():
        if {"default"} & {*name.split(".")}:
            continue
        name = name.replace(".base_layer", "").replace(".token_adapter", "")
        original = whole[name]
        assert torch.equal(weight[: len(original)], original.to(weight.dtype)), name


FAMILIES = {
    "gemma3_text": {"tie_word_embeddings": True, "layer_types": ["sliding_attention", "full_attention"]},
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
}


@pytest.fixture
def base(tiny, tmp_path):
    """Make a model of another family, with the tiny example's tokenizer; returns its folder."""

    def make(family, **changes):
        tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = AutoConfig.for_model(family, **sizes | ids | FAMILIES[family] | changes)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return make


def logits_of(model):
    ids = torch.arange(20, 60).view(2, 20)
    ids[:, :3] = model.config.vocab_size - 64  # where the new tokens begin, or close to it
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_embeddings_only_the_new_rows_learn(train, trainers, watches, sft_config, base, family):
    """At both ends: the same rows of tied embeddings, and each end's own of others."""
    folder = base(family)
    old = len(AutoTokenizer.from_pretrained(folder))
    changes = SFT | {"hyperparameters__lora": LORA, "hyperparameters__model_name": folder}
    reports = train(sft_finetune, sft_config, **changes)
    trained = trainers[0].model
    model, tokenizer = load_model_and_tokenizer(str(folder_of(reports)))
    whole = load_file(f"{folder}/model.safetensors")
    ends = [model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data]
    tied = FAMILIES[family]["tie_word_embeddings"]
    assert (ends[0].data_ptr() == ends[1].data_ptr()) == tied
    for end, name in zip(ends, ["model.embed_tokens.weight", "lm_head.weight"], strict=True):
        before = whole["model.embed_tokens.weight" if tied else name]
        assert torch.equal(end[:old], before)
        assert torch.equal(end[len(tokenizer) :], before.mean(0).expand(len(end) - len(tokenizer), -1))
        assert (end[old : len(tokenizer)] != before.mean(0)).any(dim=1).all()
    rows = [name for name in watches[0].gradients if name.endswith("trainable_tokens_delta.default")]
    assert len(rows) == (1 if tied else 2)
    assert all(watches[0].gradients[name].any(dim=1).all() for name in rows)
    assert_only_the_adapter_learned(watches[0], torch.float32)
    torch.testing.assert_close(logits_of(model), logits_of(trained), rtol=1e-5, atol=1e-5)
