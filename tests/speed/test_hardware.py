"""What is chosen for the hardware at hand, what a trial logs about it, and that the training learns the same."""

import pytest
import torch

import dpo_finetune
import sft_finetune
from speed import fitting, hardware

ARGS = "hyperparameters__training_args__"
LEFT_OPEN = {f"{ARGS}activation_checkpointing": None, f"{ARGS}max_steps": 1}


def started_with(reports):
    (status,) = [r["status"] for r in reports["status"] if r["status"].startswith("training with ")]
    return status.removeprefix("training with ").split("; ")


def losses(reports):
    return [report["metrics"]["loss"] for report in reports["training"] if "loss" in report["metrics"]]


@pytest.mark.parametrize(("script", "padding"), [(sft_finetune, ""), (dpo_finetune, ", a pair's prompt once")])
def test_a_trial_logs_what_was_chosen(train, trainers, request, monkeypatch, script, padding):
    config = request.getfixturevalue("sft_config" if script is sft_finetune else "dpo_config")
    torch.backends.cuda.enable_cudnn_sdp(True)
    asked = train(script, config, output="asked", **{f"{ARGS}max_steps": 1, f"{ARGS}bf16": True})
    bf16, padding_choice, checkpointing = started_with(asked)
    assert bf16 == "bf16 autocast over float32 weights"
    assert padding_choice == f"no padding{padding}"
    assert checkpointing == "activation checkpointing off (as set)"
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it would make a plan for every new length

    monkeypatch.setattr(fitting, "free_memory", lambda device_type: 10**12)
    roomy = train(script, config, output="roomy", **LEFT_OPEN)
    assert started_with(roomy)[-1].startswith("activation checkpointing off (about ")
    monkeypatch.setattr(fitting, "free_memory", lambda device_type: 10**6)
    cramped = train(script, config, output="cramped", **LEFT_OPEN)
    assert started_with(cramped)[-1].startswith("activation checkpointing on (about ")
    assert [trainer.model.is_activation_checkpointing for trainer in trainers] == [False, False, True]
    assert losses(roomy) == losses(cramped)


def test_a_padded_model_is_logged_with_the_reason(train, sft_config):
    eager = {f"{ARGS}model_init_kwargs": {"attn_implementation": "eager"}, f"{ARGS}max_steps": 1}
    assert started_with(train(sft_finetune, sft_config, **eager))[1] == "padded batches (gemma, eager attention)"


def test_neftune_keeps_the_padding(train, sft_config):
    """NEFTune scales its noise by the length of a batch's rows, which would be another one."""
    neftune = train(sft_finetune, sft_config, **{f"{ARGS}neftune_noise_alpha": 5.0, f"{ARGS}max_steps": 1})
    assert started_with(neftune)[1] == "padded batches (neftune_noise_alpha)"


def test_a_model_whose_memory_cannot_be_estimated_is_checkpointed(train, sft_config, monkeypatch):
    def estimate(*args, **kwargs):
        raise AttributeError("no such name")

    monkeypatch.setattr(fitting, "estimate_memory", estimate)
    choice = started_with(train(sft_finetune, sft_config, **LEFT_OPEN))[-1]
    assert choice == "activation checkpointing on (gemma's memory cannot be estimated: no such name)"


@pytest.mark.parametrize("script", [sft_finetune, dpo_finetune])
def test_losses_equal_those_of_trls_own_way(train, request, monkeypatch, script):
    """Padded, every position projected, gradients summed by autograd: in float32 every loss agrees to 1e-4, and in the
    end so do the evaluations. bf16 autocast moves losses by up to a hundredth."""
    config = request.getfixturevalue("sft_config" if script is sft_finetune else "dpo_config")
    steps = {f"{ARGS}max_steps": 16, f"{ARGS}gradient_accumulation_steps": 2, f"{ARGS}learning_rate": 5e-4}
    ours = train(script, config, output="ours", **steps)
    bf16 = train(script, config, output="bf16", **steps, **{f"{ARGS}bf16": True})
    monkeypatch.setattr(hardware, "suit_hardware", lambda *args, **kwargs: None)
    request.getfixturevalue("fused_head_as_installed")
    plain = train(script, config, output="plain", **steps)

    assert len(losses(plain)) == 16
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-4)
    assert losses(bf16) == pytest.approx(losses(plain), rel=1e-2)
    names = ("eval_loss",) if script is sft_finetune else ("eval_loss", "eval_rewards/accuracies")
    for name in names:
        end, fast, faster = (reports["validation"][-1]["metrics"][name] for reports in (plain, ours, bf16))
        assert fast == pytest.approx(end, rel=1e-4)
        assert faster == pytest.approx(end, rel=1e-2)
