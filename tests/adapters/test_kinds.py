"""Each kind of LoRA that a YAML may ask for trains, and loads again as what was trained."""

import pytest
from adapted import ARGS, LORA, SFT, few_pairs, folder_of, own_weights, uuid_of
from test_chains import assert_same_logits

import dpo_finetune
import sft_finetune
from trial.models import load_model_and_tokenizer

LAYERS = {"target_modules": ["q_proj", "v_proj"]}
# What is given, and what of it is in the names of the weights that learn, or not.
KINDS = {
    "rslora": ({"use_rslora": True, "lora_alpha": 32}, "q_proj.lora_A", ""),
    "dora": ({"use_dora": True}, "lora_magnitude_vector", ""),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9.0}}, "q_proj", ""),
    "all-linear": ({"target_modules": None}, "up_proj", "lm_head"),
    "a list": (LAYERS, "v_proj", "k_proj"),
    "a regex": ({"target_modules": r".*\.0\.mlp\.(up|down)_proj"}, "layers.0.mlp.down_proj", "layers.1"),
    "some layers": (LAYERS | {"layers_to_transform": [1]}, "layers.1", "layers.0"),
    "without some": ({"target_modules": "all-linear", "exclude_modules": ["up_proj"]}, "down_proj", "up_proj"),
    "gaussian": ({"init_lora_weights": "gaussian"}, "q_proj", ""),
}  # fmt: skip
FAST = {f"{ARGS}max_steps": 1, f"{ARGS}learning_rate": 3e-3}
FAST_SFT = FAST | SFT


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_learns_and_loads_again(train, trainers, sft_config, kind):
    given, learns, stays = KINDS[kind]
    lora = {name: value for name, value in (LORA | given).items() if value is not None}
    reports = train(sft_finetune, sft_config, hyperparameters__lora=lora, **FAST_SFT)
    model, folder = trainers[0].model, folder_of(reports)
    names = list(own_weights(model))
    assert any(learns in name for name in names)
    assert not stays or not any(stays in name for name in names)
    assert all(weight.any() for name, weight in own_weights(model).items() if "lora_B" in name)
    merged, unmerged = (load_model_and_tokenizer(str(folder), merge=merge)[0] for merge in (True, False))
    assert_same_logits(model, merged, unmerged)


def test_a_pattern_of_ranks_below_another_adapter(train, trainers, sft_config, dpo_config, tiny):
    lora = LORA | KINDS["rslora"][0] | KINDS["rank_pattern"][0]
    sft = train(sft_finetune, sft_config, output="sft", hyperparameters__lora=lora, **FAST_SFT)
    changes = few_pairs(tiny) | FAST | {"hyperparameters__lora": LORA, "hyperparameters__model_ckpt": uuid_of(sft)}
    dpo = folder_of(train(dpo_finetune, dpo_config, output="dpo", **changes))
    merged, unmerged = (load_model_and_tokenizer(str(dpo), merge=merge)[0] for merge in (True, False))
    assert_same_logits(trainers[-1].model, merged, unmerged)


@pytest.mark.parametrize("kinds", [({}, {"use_dora": True}), ({"use_dora": True}, {})], ids=["above", "below"])
def test_dora_beside_another_adapter_is_one_line(
    train, call, write_config, sft_config, dpo_config, tiny, tmp_path, kinds
):
    first, second = kinds
    sft = train(sft_finetune, sft_config, output="sft", hyperparameters__lora=LORA | first, **FAST_SFT)
    changes = {"hyperparameters__lora": LORA | second, "hyperparameters__model_ckpt": uuid_of(sft)}
    path = write_config(dpo_config, **few_pairs(tiny), **changes)
    status, _, err = call(dpo_finetune.main, "--config", path, "--output", tmp_path / "dpo")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: hyperparameters.lora: use_dora does not work above or below another adapter; ")


def test_dpo_with_dora_starts_at_its_reference(train, dpo_config, tiny):
    changes = few_pairs(tiny) | FAST | {"hyperparameters__lora": LORA | {"use_dora": True}}
    (first, *_) = train(dpo_finetune, dpo_config, **changes)["training"]
    assert first["metrics"]["loss"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_an_adapter_at_either_end_is_refused(call, write_config, sft_config, tmp_path, end):
    """One of the output layer would never learn, and one of tied embeddings answer otherwise once it is merged."""
    lora = LORA | {"target_modules": ["q_proj", end]}
    path = write_config(sft_config, hyperparameters__lora=lora, hyperparameters__chat_tokens=None)
    status, _, err = call(sft_finetune.main, "--config", path, "--output", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: hyperparameters.lora.target_modules: {end!r} names the ")
