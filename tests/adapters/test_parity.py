"""LoRA through our entrypoints learns what peft and TRL alone do, on padded batches of the same rows."""

import copy

import pytest
import torch
from adapted import ARGS, LORA, SFT, assert_close, call_at_start, few_pairs, folder_of, own_weights, uuid_of
from conftest import restore_fused_head
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer, SFTTrainer

import dpo_finetune
import sft_finetune
from chat_format import set_chat_format
from speed.padding_free import ATTENTION
from trial.models import load_model_and_tokenizer

ACCUMULATED = {f"{ARGS}per_device_train_batch_size": 2, f"{ARGS}gradient_accumulation_steps": 2}


class PlainDPOTrainer(DPOTrainer):
    """TRL's own, but for rows that are tokenized already."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


@pytest.fixture
def initial(monkeypatch):
    """The adapters as each training begins with them, in order."""
    states = []
    call_at_start(monkeypatch, lambda trainer: states.append(own_weights(trainer.model)))
    return states


def learned(trainer):
    """What was logged of each step, without its speed; and the adapter at the end."""
    names = ("loss", "grad_norm", "mean_token_accuracy", "entropy")
    logs = {
        f"{name} at {log['step']}": value
        for log in trainer.state.log_history
        for name, value in log.items()
        if name in names or name.startswith(("rewards", "logps", "logits"))
    }
    assert len(logs) >= 4 * len(names)
    logs.pop("rewards/accuracies at 1", None)  # a tie, but for the last bit
    return logs, own_weights(trainer.model)


def train_plainly(cls, ours, initial, model, rows, tmp_path):
    args = copy.deepcopy(ours.args)
    args.output_dir, args.precompute_ref_log_probs = str(tmp_path / "plain"), False
    config = copy.deepcopy(ours.model.peft_config["default"])
    config.base_model_name_or_path = None
    tokenizer = ours.processing_class
    plain = cls(model=model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    assert type(plain.model).__name__ == "PeftModelForCausalLM"
    for name, weight in initial.items():
        plain.model.get_parameter(name).data.copy_(weight)
    assert own_weights(plain.model).keys() == initial.keys()
    # TRL (1.16) reads the bias of an output layer, for which peft's wrapper of new tokens (0.21) raises AttributeError.
    plain.model.get_base_model().get_output_embeddings().bias = None
    plain.train()
    assert plain.model.config._attn_implementation == "sdpa"
    return plain


def assert_same_learned(ours, plain):
    assert ours.model.config._attn_implementation == ATTENTION
    for mine, theirs in zip(learned(ours), learned(plain), strict=True):
        assert_close(theirs, mine)


@pytest.mark.parametrize(
    "changes",
    [
        ACCUMULATED,
        {f"{ARGS}activation_checkpointing": True},
        {"hyperparameters__chat_tokens": {"add_chat_tokens": True}},
    ],
    ids=["accumulated", "checkpointed", "chat tokens"],
)
def test_sft_learns_what_trl_and_peft_do(train, trainers, sft_config, tiny, tmp_path, initial, monkeypatch, changes):
    changes = {"hyperparameters__chat_tokens": None, **changes}
    train(sft_finetune, sft_config, hyperparameters__lora=LORA, **SFT, **changes)
    restore_fused_head(monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(tiny / "base", dtype=torch.float32)
    tokens = ["<|im_start|>", "<|im_end|>"] if changes["hyperparameters__chat_tokens"] else None
    set_chat_format(model, AutoTokenizer.from_pretrained(tiny / "base"), tokens)
    plain = train_plainly(SFTTrainer, trainers[0], initial[0], model, trainers[0].train_dataset, tmp_path)
    assert_same_learned(trainers[0], plain)


PAIRS = ["prompt_ids", "chosen_ids", "rejected_ids"]


@pytest.mark.parametrize("precompute", [True, False])
def test_dpo_learns_what_trl_and_peft_do(
    train, trainers, sft_config, dpo_config, tiny, tmp_path, initial, monkeypatch, precompute
):
    """From an SFT adapter; TRL and peft have it merged."""
    sft = train(sft_finetune, sft_config, output="sft", hyperparameters__lora=LORA, **SFT)
    changes = dict(ACCUMULATED) if precompute else {f"{ARGS}activation_checkpointing": True}
    changes |= {"hyperparameters__precompute_ref_log_probs": precompute}
    changes |= {"hyperparameters__lora": LORA | {"r": 2}, "hyperparameters__model_ckpt": uuid_of(sft)}
    train(dpo_finetune, dpo_config, output="dpo", **few_pairs(tiny), **changes)
    restore_fused_head(monkeypatch)
    model, _ = load_model_and_tokenizer(str(folder_of(sft)))
    rows = trainers[1].train_dataset.select_columns(PAIRS)
    plain = train_plainly(PlainDPOTrainer, trainers[1], initial[1], model, rows, tmp_path)
    assert_same_learned(trainers[1], plain)
