"""Hyperparameters: every key is honoured or refused by name, and precision and loss are what they should be."""

import pytest
import torch
import torch.nn.functional as F
from trl.trainer.dpo_config import DPOConfig

from config import training_args
from config.hyperparameters import DPOHyperparameters, SFTHyperparameters, parse_hyperparameters
from config.training_args import DPO_LOSSES
from errors import UserError

SFT = {"model_name": "m", "dataset": "d"}
DPO = {"model_name": "m", "model_ckpt": "none", "datasets": ["d"]}
UUID = "6b6fbaa7-faa9-4449-867b-2939a147a335"

MISSING = r"hyperparameters\.model_ckpt is missing: give the UUID of an SFT checkpoint, or exp:12, .*; none starts from"


def sft(**values):
    return parse_hyperparameters(SFTHyperparameters, {**SFT, **values})


def dpo(**values):
    return parse_hyperparameters(DPOHyperparameters, {**DPO, **values})


def test_own_keys_reach_trl():
    args = sft(max_seq_length=77, training_args={"learning_rate": 1e-5, "num_train_epochs": 2}).args
    assert (args.max_length, args.learning_rate, args.num_train_epochs) == (77, 1e-5, 2.0)
    hparams = dpo(dpo_beta=0.05, dpo_loss="ipo", max_length=99, precompute_ref_log_probs=True)
    args = hparams.args
    assert (args.beta, args.loss_type, args.max_length, args.precompute_ref_log_probs) == (0.05, ["ipo"], 99, True)


def test_trls_own_names_serve_as_well():
    args = dpo(training_args={"beta": 0.3, "loss_type": "hinge", "max_length": 55}).args
    assert (args.beta, args.loss_type, args.max_length) == (0.3, ["hinge"], 55)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modelname": "m"}, r"hyperparameters.modelname is not a hyperparameter \(did you mean 'model_name'\?\)"),
        ({"model": "m"}, r"hyperparameters.model is not a hyperparameter \(now model_name\)"),
        ({"model_name": 5}, "hyperparameters.model_name is 5, which is not text"),
        ({"max_seq_length": "4k"}, "hyperparameters.max_seq_length is '4k', which is not a whole number"),
        ({"max_seq_length": 0}, "max_seq_length 0 is not greater than 0"),
        (
            {"max_seq_length": 9, "training_args": {"max_length": 9}},
            "max_seq_length and hyperparameters.training_args.max_length",
        ),
        ({"dataset_subsets": [{"subset": "a"}]}, r"dataset_subsets\[0\]: subset 'a'.*this has neither"),
        ({"dataset_subsets": [{"subset": "a", "ratio": 1, "number_of_samples": 1}]}, "this has both"),
        ({"dataset_subsets": [{"subset": "a", "ratio": 1.5}]}, r"dataset_subsets\[0\].ratio 1.5 is not at most 1"),
        ({"dataset_subsets": [{"subset": "a", "ratio": 0}]}, r"dataset_subsets\[0\].ratio 0 is not greater than 0"),
        ({"dataset_subsets": [{"subset": "a", "number_of_samples": 0}]}, "number_of_samples 0 is not at least 1"),
        (
            {"dataset_subsets": [{"subset": "a", "rato": 1}]},
            r"\[0\].rato is not a hyperparameter \(did you mean 'ratio'",
        ),
        ({"dataset_subsets": []}, "dataset_subsets is empty"),
        (
            {"data_collator": {"response_template": "### Answer:"}},
            "response_template '### Answer:' is not what answers",
        ),
        ({"data_collator": {"on_completions_only": "yes"}}, "on_completions_only is 'yes', which is not true or false"),
        ({"chat_tokens": {"special_tokens": "<|im_end|>"}}, "special_tokens is '<|im_end|>', which is not a list"),
        ({"chat_tokens": True}, "chat_tokens is True, which is not a mapping"),
        (
            {"training_args": {"learning_rat": 1}},
            r"learning_rat is not a hyperparameter \(did you mean 'learning_rate'",
        ),
        ({"training_args": {"evaluation_strategy": "no"}}, r"evaluation_strategy .* \(now eval_strategy\)"),
        ({"training_args": {"learning_rate": "1e-5x"}}, "learning_rate is '1e-5x', which is not a number"),
        ({"training_args": {"max_steps": 1.5}}, "max_steps is 1.5, which is not a whole number"),
        ({"training_args": {"seed": True}}, "seed is True, which is not a whole number"),
        (
            {"training_args": {"eval_strategy": "sometimes"}},
            "training_args.eval_strategy is 'sometimes', which is not one of no, steps, epoch",
        ),
        ({"training_args": {"loss_type": "nl"}}, "training_args.loss_type is 'nl', which is not one of nll, dft"),
        ({"training_args": {"do_eval": False}}, "training_args.do_eval has no effect here: set eval_strategy"),
        ({"training_args": {"assistant_only_loss": True}}, "assistant_only_loss has no effect here: set data_collator"),
        ({"training_args": {"model_init_kwargs": {"dtype": "float33"}}}, "dtype 'float33' is not a dtype of torch"),
        ({"training_args": {"model_init_kwargs": {"dtype": "bfloat16"}}}, "'bfloat16': weights stay float32"),
        ({"training_args": {"model_init_kwargs": '{"dtype": "bfloat16"}'}}, "'bfloat16': weights stay float32"),
    ],
)
def test_sft_errors_name_the_key(values, message):
    with pytest.raises(UserError, match=message) as error:
        sft(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_name": None}, r"hyperparameters\.model_ckpt: none needs a model_name"),
        ({"model_ckpt": ""}, MISSING),  # as a YAML template may leave it
        ({"model_ckpt": None}, MISSING),
        ({"model_ckpt": "exp:best"}, r"hyperparameters.model_ckpt 'exp:best': after exp: comes the number of the exp"),
        ({"model_ckpt": "model:m:0"}, "the version '0' is not a number from 1"),
        ({"model_ckpt": "model:"}, "after model: comes a registered model's name"),
        ({"model_ckpt": "experiment:12"}, "is not a checkpoint UUID .*, nor exp:12, trial:34, ckpt:UUID or model:NAME"),
        ({"model_ckpt": "../x"}, "model_ckpt '../x' is not a checkpoint UUID"),
        ({"model_ckpt": UUID + "/.."}, "is not a checkpoint UUID"),
        ({"datasets": "d"}, "datasets is 'd', which is not a list"),
        ({"datasets": [1]}, r"datasets\[0\] is 1, which is not text"),
        ({"datasets": []}, "datasets is empty"),
        ({"dpo_beta": 0}, "dpo_beta 0 is not greater than 0"),
        (
            {"dpo_beta": 0.1, "training_args": {"beta": 0.1}},
            "dpo_beta and hyperparameters.training_args.beta set the same thing",
        ),
        ({"dpo_loss": "sigmod"}, r"dpo_loss 'sigmod' is not one of .* \(did you mean 'sigmoid'\?\)"),
        ({"dpo_loss": "kto_pair"}, "dpo_loss 'kto_pair' is gone: TRL made KTO a trainer of its own"),
        ({"dpo_loss": "cdpo"}, "dpo_loss 'cdpo' needs training_args.label_smoothing"),
        ({"dpo_loss": "exo_pair"}, "dpo_loss 'exo_pair' needs training_args.label_smoothing"),
        (
            {"dpo_loss": "robust", "training_args": {"label_smoothing": 0.5}},
            r"label_smoothing 0.5 is not in \[0, 0.5\)",
        ),
        ({"training_args": {"label_smoothing": "x"}}, "label_smoothing is 'x', which is not a number"),
        ({"training_args": {"loss_type": 5}}, "loss_type is 5, which is not"),
        ({"training_args": {"truncation_mode": "keep_end"}}, "truncation_mode has no effect here: prompts are cut"),
        ({"max_seq_length": 9}, r"max_seq_length is not a hyperparameter \(did you mean 'max_length'"),
        ({"training_args": {"label_smoothing": 0.1}}, "label_smoothing has no effect on dpo_loss 'sigmoid'"),
    ],
)
def test_dpo_errors_name_the_key(values, message):
    with pytest.raises(UserError, match=message):
        dpo(**values)


def test_missing_keys_are_named():
    with pytest.raises(UserError, match=r"hyperparameters\.dataset is missing"):
        parse_hyperparameters(SFTHyperparameters, {"model_name": "m"})


def test_losses_are_trls():
    """TRL keeps no list of its losses, but names them all in the help of the field."""
    documented = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"].split("If multiple")[0]
    for loss in DPO_LOSSES:
        assert f"'{loss}'" in documented
    assert documented.count("`'") == len(DPO_LOSSES)


def test_cdpo_is_composed_of_trls_losses():
    smoothing, beta = 0.2, 0.1
    args = dpo(dpo_loss="cdpo", dpo_beta=beta, training_args={"label_smoothing": smoothing}).args
    assert args.loss_type == ["sigmoid", "robust"]
    delta = torch.linspace(-30, 30, 13)
    clean, flipped = -F.logsigmoid(beta * delta), -F.logsigmoid(-beta * delta)
    robust = ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)
    composed = args.loss_weights[0] * clean + args.loss_weights[1] * robust
    torch.testing.assert_close(composed, (1 - smoothing) * clean + smoothing * flipped)


def test_precision_follows_the_hardware(monkeypatch):
    for has_bf16 in (False, True):
        monkeypatch.setattr("config.training_args.has_bf16", lambda use_cpu, has_bf16=has_bf16: has_bf16)
        assert (sft().args.bf16, sft().args.fp16) == (has_bf16, False)
    monkeypatch.undo()
    assert sft(training_args={"bf16": True}).args.bf16  # on a CPU: autocast over float32 weights all the same


@pytest.mark.parametrize(
    ("gpu", "gpu_bf16", "avx512_bf16", "amx", "expected"),
    [
        (True, True, False, False, True),
        (True, False, True, True, False),  # what the CPU has is of no use to a GPU
        (False, False, True, False, True),
        (False, False, False, True, True),
        (False, False, False, False, False),  # emulated, it would take a hundred times as long as float32
    ],
)
def test_bf16_where_there_are_instructions_for_it(monkeypatch, gpu, gpu_bf16, avx512_bf16, amx, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: gpu_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert training_args.has_bf16(use_cpu=False) == expected
    assert training_args.has_bf16(use_cpu=True) == (avx512_bf16 or amx)


def test_the_split_does_not_follow_the_training_seed():
    assert dpo(training_args={"seed": 1}).split_seed == dpo(training_args={"seed": 2}).split_seed == 42
    assert dpo(training_args={"data_seed": 7}).split_seed == 7


def test_gradient_checkpointings_old_name_serves_without_a_warning(recwarn):
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        args = sft(training_args={name: False}).args
        assert not args.activation_checkpointing
        assert not args.gradient_checkpointing
    assert sft().args.activation_checkpointing  # TRL's default
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_who_decides_on_checkpointing():
    """`suit_hardware`, unless the YAML says it, or has FSDP say it."""
    assert sft().activation_checkpointing is None
    assert sft(training_args={"activation_checkpointing": False}).activation_checkpointing is False
    for prefix in ("", "fsdp_"):
        by_fsdp = sft(training_args={"fsdp": True, "fsdp_config": {f"{prefix}activation_checkpointing": True}})
        # One process has nothing to shard: it is as if nothing was said.
        assert (by_fsdp.activation_checkpointing, by_fsdp.args.activation_checkpointing) == (None, True)
        by_fsdp.args.fsdp = True
        assert by_fsdp.activation_checkpointing is not None


def test_fsdp_is_left_out_where_there_is_one_process():
    fsdp = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["GemmaDecoderLayer"]}}
    assert not sft(training_args=fsdp).args.fsdp


def test_no_is_no_where_yaml_reads_it_as_false():
    hparams = {"model_name": "m", "dataset": "d", "training_args": {"eval_strategy": False}}
    assert parse_hyperparameters(SFTHyperparameters, hparams).args.eval_strategy == "no"


@pytest.mark.parametrize(
    ("training_args", "message"),
    [
        ({"packing": True, "max_length": None}, "training_args.packing needs max_seq_length"),
        ({"packing": True, "packing_strategy": "wrapped", "eval_packing": False}, "'wrapped' splits long rows"),
    ],
)
def test_packing_that_would_cut_in_silence(training_args, message):
    hparams = {"model_name": "m", "dataset": "d", "training_args": training_args}
    with pytest.raises(UserError, match=message):
        parse_hyperparameters(SFTHyperparameters, hparams)


def test_a_batch_of_nothing_is_refused():
    hparams = {"model_name": "m", "dataset": "d", "training_args": {"per_device_train_batch_size": 0}}
    with pytest.raises(UserError, match=r"training_args\.per_device_train_batch_size 0 is not at least 1"):
        parse_hyperparameters(SFTHyperparameters, hparams)
