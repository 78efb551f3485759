"""What the libraries would refuse once a training begins, and what they would accept that makes no sense."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.sft_config import SFTConfig

from config.hyperparameters import DPOHyperparameters, SFTHyperparameters, parse_hyperparameters
from config.training_args import build_training_args
from config.trying_out import training_elsewhere
from errors import UserError

SFT = {"model_name": "m", "dataset": "d"}
DPO = {"model_name": "m", "model_ckpt": "none", "datasets": ["d"]}


def parse(training_args, cls=SFTHyperparameters, **others):
    values = (SFT if cls is SFTHyperparameters else DPO) | others
    return parse_hyperparameters(cls, {**values, "training_args": {"use_cpu": True, "bf16": False, **training_args}})


@pytest.mark.parametrize(
    ("training_args", "message"),
    [
        ({"learning_rate": 0}, "learning_rate 0 is not greater than 0"),
        ({"learning_rate": float("inf")}, "learning_rate inf is not a finite number"),
        ({"num_train_epochs": -1}, "num_train_epochs -1 is not greater than 0"),
        ({"max_steps": 0}, "max_steps: 0 is not a number of steps: 1 or more, or -1 for num_train_epochs"),
        ({"max_steps": -2}, "max_steps: -2 is not a number of steps: 1 or more, or -1 for num_train_epochs"),
        ({"weight_decay": -0.1}, "weight_decay -0.1 is not at least 0"),
        ({"adam_beta1": 1}, "adam_beta1 1 is not less than 1"),
        ({"max_grad_norm": -1}, "max_grad_norm -1 is not at least 0"),
        ({"seed": 2**32}, "seed 4294967296 is not less than 4294967296"),
        ({"logging_steps": 0}, "logging_steps 0 is not greater than 0"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps 0 is not greater than 0, which eval_"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of 0 is not at least 1"),
        ({"log_level": "loud"}, "log_level is 'loud', which is not one of detail, debug, info, warning, error, crit"),
        ({"train_sampling_strategy": "x"}, "train_sampling_strategy is 'x', which is not one of random, sequential"),
        ({"optim": "adamw_bnb_8bit"}, "optim adamw_bnb_8bit: You need to install `bitsandbytes`"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args: not enough values to unpack"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type cosine_with_min_lr: One of min_lr or min",
        ),
        ({"lr_scheduler_kwargs": {"x": 1}}, "lr_scheduler_kwargs: get_linear_schedule_with_warmup() got an unexpected"),
        ({"lr_scheduler_kwargs": "{x"}, "lr_scheduler_kwargs '{x': Expecting property name"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}, "warmup_steps": 5},
            "lr_scheduler_kwargs: could not convert string to float: 'x'",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1.0}},
            "lr_scheduler_kwargs: lr_end -1 is not a finite number of at least 0",
        ),
        ({"report_to": "no_such_tracker"}, "report_to: no_such_tracker is not supported, only"),
        ({"report_to": "mlflow"}, "report_to 'mlflow': its package is not installed"),
        (
            {"deepspeed": {"train_batch_size": 1}},
            "deepspeed: No package metadata was found",
        ),
        ({"fsdp": True, "fsdp_config": {"auto_wrap_policy": "X"}}, "fsdp_config: `auto_wrap_policy` must be one of"),
        ({"fsdp": True, "fsdp_config": {"state_dict_type": "X"}}, "fsdp_config: 'X'"),
        (
            {"accelerator_config": {"x": 1}},
            "accelerator_config.x is not a hyperparameter",
        ),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"x": 1}}},
            "accelerator_config.gradient_accumulation_kwargs.x is not a hyperparameter",
        ),
        ({"accelerator_config": {"even_batches": "x"}}, "accelerator_config.even_batches is 'x', which is not true or"),
        (
            {"torch_compile": True, "torch_compile_mode": "x"},
            "torch_compile_mode: Unrecognized mode=x",
        ),
        ({"activation_checkpointing_kwargs": {"x": 1}}, "activation_checkpointing_kwargs (formerly gradient_ch"),
        ({"model_init_kwargs": "x"}, "model_init_kwargs 'x': not a mapping"),
        ({"model_init_kwargs": {"attn_implementation": "x"}}, 'attn_implementation: Specified `attn_implementation="x'),
        ({"torch_compile_backend": "x"}, "torch_compile_backend: Invalid backend: 'x'"),
        ({"gradient_checkpointing_kwargs": "x"}, "gradient_checkpointing_kwargs 'x': not a mapping"),
        ({"logging_steps": 1.5}, "logging_steps: --logging_steps must be an integer if bigger than 1: 1.5"),
        ({"use_liger_kernel": True}, "use_liger_kernel: the package liger-kernel is not installed"),
        ({"push_to_hub": True}, "push_to_hub needs a token of the hub"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers needs dataloader_num_workers above 0"),
        (
            {"metric_for_best_model": "x"},
            "metric_for_best_model 'x' is not one that is reported: eval_loss, eval_",
        ),
        ({"optim": "adamw_troch"}, "… (did you mean 'adamw_torch'?)"),
        ({"padding_free": True}, "padding_free needs packing"),
        ({"learning_rate": 1e300}, "training_args: with learning_rate 1e+300, weight_decay 0 the weights would not"),
        ({"optim": "sgd", "optim_args": "momentum=nan"}, "optim_args 'momentum=nan' the weights would not stay finite"),
        ({"optim": "sgd", "optim_args": "momentum=0,x=1"}, "optim_args: x is not an argument of optim sgd"),
        ({"optim_target_modules": ["x"]}, "optim_target_modules has no effect on optim adamw"),
        ({"save_strategy": "best"}, "save_strategy needs metric_for_best_model, to know the best"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"x": 1}},
            "lr_scheduler_kwargs needs another lr_sch",
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": NaN}'}, "lr_scheduler_kwargs"),
        ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config needs use_liger_kernel: true"),
        ({"parallelism_config": {}}, "parallelism_config needs several processes"),
        ({"fsdp_config": {"fsdp_x": 1}}, "fsdp_config.fsdp_x is not a key that transformers reads"),
        ({"deepspeed": {}}, "deepspeed is empty"),
        ({"include_for_metrics": ["x"]}, "include_for_metrics[0] is 'x', which is not one of inputs, loss"),
        ({"gradient_accumulation_steps": 2**62}, "gradient_accumulation_steps 4611686018427387904 is not less than"),
        ({"max_steps": 2**31}, "max_steps 2147483648 is not less than 2147483648"),
        ({"fp16": True, "bf16": True}, "training_args: At most one of fp16 and bf16 can be True, but not both"),
    ],
)
def test_training_args_that_no_training_takes(training_args, message, monkeypatch, tmp_path, recwarn):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError) as error:
        parse(training_args)
    assert str(error.value).startswith("hyperparameters.training_args")
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]  # a second line on stderr
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kwargs",
    [{name: "x"} for name in ("patience", "threshold", "eps", "cooldown", "min_lr", "factor")]
    + [{"factor": -0.5}, {"patience": -1}],
)
@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_arguments_that_a_scheduler_reads_late(kind, kwargs):
    with pytest.raises(UserError, match=r"^hyperparameters\.training_args\.lr_scheduler_kwargs: "):
        parse({"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, "eval_strategy": "epoch"})


@pytest.mark.parametrize(
    ("training_args", "others", "message"),
    [
        ({"beta": float("inf")}, {}, "hyperparameters.training_args.beta inf is not a finite number"),
        ({}, {"dpo_beta": float("nan")}, "hyperparameters.dpo_beta nan is not a finite number"),
        ({}, {"dpo_beta": 1e308}, "hyperparameters.dpo_beta 1e+308 is not at most 1000000"),
        ({"loss_weights": [-1]}, {}, "hyperparameters.training_args.loss_weights: none is greater than 0"),
        ({"loss_weights": [1e308]}, {}, "training_args.loss_weights[0] 1e+308 is not at most 1000000"),
        ({"f_alpha_divergence_coef": -1e30}, {}, "f_alpha_divergence_coef -1e+30 is not at least -10"),
        ({}, {"dpo_loss": []}, "hyperparameters.dpo_loss is empty"),
        ({"loss_type": "sigmod"}, {}, "hyperparameters.training_args.loss_type 'sigmod' is not one of sigmoid,"),
        ({"ld_alpha": 2}, {}, "hyperparameters.training_args.ld_alpha 2 is not at most 1"),
        (
            {"loss_weights": [1, 2]},
            {},
            "training_args.loss_weights: `loss_weights` must have the same",
        ),
        (
            {"f_divergence_type": "js_divergence"},
            {"dpo_loss": "apo_zero"},
            "hyperparameters.training_args.f_divergence_type 'js_divergence' needs a dpo_loss among discopop,",
        ),
        (
            {"use_weighting": True},
            {"dpo_loss": "aot"},
            "training_args.use_weighting: the dpo_loss 'aot'",
        ),
        (
            {"sync_ref_model": True},
            {"precompute_ref_log_probs": True},
            "hyperparameters.training_args.sync_ref_model: with precompute_ref_log_probs the reference cannot move",
        ),
    ],
)
def test_dpos_own(training_args, others, message):
    with pytest.raises(UserError) as error:
        parse(training_args, DPOHyperparameters, **others)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "training_args",
    [
        {"max_steps": -1, "warmup_steps": 500},
        {"max_steps": 1, "warmup_steps": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=False"},
        {"optim": "rmsprop", "optim_args": "alpha=0.99,centered=True", "learning_rate": 1},
        {"optim": "adafactor", "lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-7}'},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 100}},
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "eval_strategy": "epoch",
            "lr_scheduler_kwargs": {"patience": 99},
        },
        {"lr_scheduler_type": "greedy", "eval_strategy": "epoch"},
        {"fsdp": True, "fsdp_config": {"version": 1, "transformer_layer_cls_to_wrap": ["GemmaDecoderLayer"]}},
        {"model_init_kwargs": {"attn_implementation": "eager"}},
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"metric_for_best_model": "loss", "save_strategy": "best", "eval_strategy": "epoch"},
        {"max_length": None, "pad_to_multiple_of": "auto", "max_grad_norm": 0},
        {"logging_strategy": "no", "logging_steps": 0, "eval_steps": 0, "save_total_limit": -1},
        {"save_strategy": "epoch", "save_steps": 0},
    ],
)
def test_training_args_that_do(training_args):
    parse(training_args)


@pytest.mark.parametrize(
    ("training_args", "name"),
    [
        ({"optim": "adamw_bnb_8bit"}, "optim adamw_bnb_8bit"),
        ({"report_to": "wandb"}, "report_to 'wandb'"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"activation_offloading": True}, "activation_offloading"),
    ],
)
def test_what_a_machine_lacks_is_a_warning_in_a_dry_run(training_args, name, caplog, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for package in ("bitsandbytes", "wandb", "liger_kernel"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"^hyperparameters.training_args.{name}.*(install|needs a GPU)"):
        parse(training_args)
    with training_elsewhere():
        parse(training_args)
    assert [record.message.count(name) for record in caplog.records] == [1]
    with training_elsewhere(), pytest.raises(UserError, match="optim is 'adamw_tourch'"):
        parse({"optim": "adamw_tourch"})


def test_a_short_training_may_keep_a_long_warm_up(caplog):
    """`--config hyperparameters.training_args.max_steps=10` is how a config is tried out."""
    parse({"max_steps": 10, "warmup_steps": 11})
    assert "warmup_steps 11 is more than the 10 steps of the training" in caplog.text


def test_target_modules_are_those_of_the_real_model(monkeypatch):
    """The optimizers that have them need packages that are not here."""
    names = ("GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor")
    monkeypatch.setitem(sys.modules, "galore_torch", SimpleNamespace(**dict.fromkeys(names, torch.optim.AdamW)))
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)
    with pytest.raises(UserError, match="optim galore_adamw: You need to define `optim_target_modules`"):
        parse({"optim": "galore_adamw"})
    assert parse({"optim": "galore_adamw", "optim_target_modules": ["attn"]}).args.optim_target_modules == ["attn"]


def test_of_several_processes_none_tries_the_values_one_by_one(monkeypatch):
    """Each try could start the process group that the others are not in."""
    built = []

    class Refusing(SFTConfig):
        def __init__(self, **values):
            built.append(values)
            raise ValueError("no")

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^hyperparameters\.training_args: no$"):
        build_training_args(Refusing, {"seed": 1})
    assert len(built) == 1


def test_trying_out_leaves_nothing_behind(tmp_path, monkeypatch):
    """Neither files, nor drawn random numbers, nor what FSDP tells its processes, nor accelerate's state."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    before, drawn = dict(os.environ), torch.random.get_rng_state()
    AcceleratorState._reset_state()
    parse({"fsdp": True, "output_dir": "out", "model_init_kwargs": {"attn_implementation": "sdpa"}})
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == before
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert AcceleratorState._shared_state == {}


def test_null_is_as_if_the_key_were_not_there():
    hparams = parse({}, columns=None, max_seq_length=None, dataset_subsets=None)
    assert (hparams.columns, hparams.args.max_length, hparams.dataset_subsets[0].ratio) == ({}, 1024, 1.0)
    with pytest.raises(UserError, match=r"^hyperparameters\.dataset is missing$"):
        parse({}, dataset=None)
    nulls = dict.fromkeys(("max_steps", "learning_rate", "report_to", "bf16", "do_train", "gradient_checkpointing"))
    hparams = parse(nulls | {"max_length": None})
    assert (hparams.args.max_steps, hparams.activation_checkpointing) == (-1, None)
    assert hparams.args.max_length is None  # it has a meaning: no limit
