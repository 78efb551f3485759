"""The lora block: each key of peft's LoraConfig is checked or refused, and its layers are those of the model."""

import dataclasses
from types import SimpleNamespace

import pytest
from peft import LoraConfig

import local_experiment
from adapters.stack import add_adapter
from config.experiment import expand_trials, read_experiment_config, varying_hyperparameters
from config.hyperparameters import DPOHyperparameters, SFTHyperparameters, parse_hyperparameters
from config.lora import OWN, REFUSED, TAKEN, build_lora_config, check_4bit
from config.trying_out import training_elsewhere
from errors import UserError
from trial.models import load_model_and_tokenizer

SFT = {"model_name": "m", "dataset": "d"}
DPO = {"model_name": "m", "model_ckpt": "none", "datasets": ["d"]}
FIELDS = [field.name for field in dataclasses.fields(LoraConfig)]
WRONG = {  # of each key that is taken, and what the line says of it
    "r": (0, " 0 is not at least 1"),
    "lora_alpha": ("16", " is '16', which is not a number"),
    "lora_dropout": (1, " 1 is not less than 1"),
    "target_modules": (["q_proj", ["v_proj"]], r"\[1\] is \['v_proj'\], which is not text"),
    "exclude_modules": ("(", r": '\(' is no regular expression \(missing \)"),
    "layers_to_transform": ([0, -1], r"\[1\] -1 is not at least 0"),
    "layers_pattern": ([], " is empty"),
    "rank_pattern": ({"q_proj": 1.5}, ".q_proj is 1.5, which is not a whole number"),
    "alpha_pattern": ([8], r" is \[8\], which is not a mapping"),
    "use_rslora": ("yes", " is 'yes', which is not true or false"),
    "use_dora": (1, " is 1, which is not true or false"),
    "init_lora_weights": ("pissa", ": 'pissa' is neither true nor gaussian"),
}


def sft(**values):
    return parse_hyperparameters(SFTHyperparameters, {**SFT, **values})


def test_each_key_of_peft_is_taken_or_refused():
    """A key that a new release of peft brings has to be put on one side."""
    assert sorted(FIELDS) == sorted({**TAKEN, **REFUSED})
    assert sorted(WRONG) == sorted(TAKEN)


@pytest.mark.parametrize("name", FIELDS)
def test_each_key_of_peft_is_checked(name):
    if name in REFUSED:
        value, message = "something", " cannot be used here: "
        standard = getattr(LoraConfig(task_type="CAUSAL_LM"), name)
        assert build_lora_config({name: standard})  # which changes nothing
    else:
        value, message = WRONG[name]
    with pytest.raises(UserError, match=rf"^hyperparameters\.lora\.{name}{message}"):
        sft(lora={name: value})
    assert build_lora_config({name: None}) == build_lora_config({})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (16, "hyperparameters.lora is 16, which is not a mapping"),
        ({"alpha": 16}, r"hyperparameters.lora.alpha is not a key of peft's LoraConfig \(did you mean 'lora_alpha'"),
        ({"rank": 16}, r"hyperparameters.lora.rank is not a key of peft's LoraConfig \(now r\)"),
        ({"layers_to_transform": [0]}, r"lora.layers_to_transform needs target_modules as a list, as in \[q_proj"),
        ({"layers_pattern": "layers"}, "lora.layers_pattern has no effect without layers_to_transform"),
        ({"r": 10**9}, "lora.r 1000000000 is not at most 16384"),
    ],
)
def test_a_wrong_block_is_one_line(lora, message):
    with pytest.raises(UserError, match=message):
        sft(lora=lora)


def test_an_empty_block_is_pefts_defaults_and_none_is_full_training():
    config = sft(lora={}).lora_config
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 8, "all-linear")
    assert sft(lora=None).lora_config is None
    assert sft(lora={"lora_alpha": 0.5}).lora_config.lora_alpha == 0.5


def test_a_grid_over_keys_of_the_block_expands(sft_config, write_config):
    axis = {"type": "categorical"}
    rates = axis | {"vals": [1e-4, 1e-3]}
    grid = {"searcher__name": "grid", "hyperparameters__training_args__learning_rate": rates}
    path = write_config(sft_config, **grid, hyperparameters__lora={"r": axis | {"vals": [4, 8]}})
    config = read_experiment_config(path)
    trials = [parse_hyperparameters(SFTHyperparameters, values) for values in expand_trials(config)]
    assert [(each.lora_config.r, each.args.learning_rate) for each in trials] == [
        *((4, 1e-4), (4, 1e-3), (8, 1e-4), (8, 1e-3)),
    ]
    assert varying_hyperparameters(config) == ["lora.r", "training_args.learning_rate"]

    path = write_config(sft_config, **grid, hyperparameters__lora=axis | {"vals": [None, {}, {"use_dora": True}]})
    trials = [
        parse_hyperparameters(SFTHyperparameters, values) for values in expand_trials(read_experiment_config(path))
    ]
    assert [each.lora_config and each.lora_config.use_dora for each in trials[::2]] == [None, False, True]


def test_overrides_reach_into_the_block(sft_config, write_config):
    path = write_config(sft_config)
    for override, lora in [("lora={r: 16}", {"r": 16}), ("lora.r=16", {"r": 16}), ("lora={}", {}), ("lora=null", None)]:
        (values,) = expand_trials(read_experiment_config(path, [f"hyperparameters.{override}"]))
        assert values["lora"] == lora


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"load_in_4bit": True}, r"hyperparameters.load_in_4bit needs lora: weights of 4 bits cannot be trained"),
        (
            {"load_in_4bit": True, "lora": {}},
            r"hyperparameters.load_in_4bit needs a GPU; leave it out to train on a CPU",
        ),
        ({"load_in_4bit": 1, "lora": {}}, r"hyperparameters.load_in_4bit is 1, which is not true or false"),
        (
            {"training_args": {"model_init_kwargs": {"load_in_4bit": True}}},
            r"training_args.model_init_kwargs.load_in_4bit: set lora and load_in_4bit: true in its place",
        ),
    ],
)
def test_what_does_not_go_with_lora_is_one_line(values, message):
    with pytest.raises(UserError, match=message):
        sft(**values)
    if "model_init_kwargs" in message:
        return
    with pytest.raises(UserError, match=message):
        parse_hyperparameters(DPOHyperparameters, {**DPO, **values})


def test_fsdp_is_refused_where_there_is_something_to_shard(call, write_config, sft_config):
    """A dry run says so for the slots of the cluster's trials."""
    values = {"lora": {}, "training_args": {"fsdp": True}}
    hparams = sft(**values)  # one process, which leaves it out
    with pytest.raises(UserError, match=r"^hyperparameters.training_args.fsdp has no use with lora"):
        hparams.check_sharding(2)
    changes = {"hyperparameters__lora": {}, "hyperparameters__training_args__fsdp": True}
    path = write_config(sft_config, **changes, resources={"slots_per_trial": 2})
    status, _, err = call(local_experiment.main, path, "--dry-run")
    assert (status, err.count("\n")) == (2, 1)
    assert "hyperparameters.training_args.fsdp has no use with lora" in err


def test_deepspeed_is_refused_also_where_it_is_installed(monkeypatch):
    from config import training_args

    build = training_args.build_training_args
    without = lambda cls, values: build(cls, {k: v for k, v in values.items() if k != "deepspeed"})  # noqa: E731
    monkeypatch.setattr(training_args, "build_training_args", without)
    with pytest.raises(UserError, match=r"hyperparameters.training_args.deepspeed has no use with lora"):
        sft(lora={}, training_args={"deepspeed": {"zero_optimization": {"stage": 2}}})


def test_a_moving_reference_is_refused():
    values = {"lora": {}, "training_args": {"sync_ref_model": True}}
    with pytest.raises(UserError, match=r"training_args.sync_ref_model: with lora the reference is the model under"):
        parse_hyperparameters(DPOHyperparameters, {**DPO, **values})


def test_a_dry_run_only_warns_of_a_gpu_that_is_not_here(monkeypatch, caplog):
    """And a GPU without the package is one line."""
    with training_elsewhere():
        assert sft(lora={}, load_in_4bit=True).lora_config
    assert "load_in_4bit needs a GPU; leave it out to train on a CPU (on this machine)" in caplog.text
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("config.lora.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"load_in_4bit needs a package: pip install 'bitsandbytes"):
        check_4bit(SimpleNamespace(use_cpu=False), has_lora=True)


NO_LAYER = "no layer's name fits "


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, f"target_modules: {NO_LAYER}'v_prj' (did you mean 'v_proj'?)"),
        ({"target_modules": "q_proj"}, "a text is matched with whole names, such as model.layers.0.self_attn.q_proj"),
        ({"target_modules": ["norm"]}, "there are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        ({"target_modules": ["lm_head"]}, "target_modules: 'lm_head' names the output layer of the model"),
        ({"target_modules": "(model.)?[^.]*"}, "target_modules: '(model.)?[^.]*' names the embeddings of the model"),
        ({"exclude_modules": ["qproj"]}, f"exclude_modules: {NO_LAYER}'qproj'"),
        ({"exclude_modules": ".*"}, "hyperparameters.lora: All modules were excluded"),
        ({"rank_pattern": {"qproj": 4}}, f"rank_pattern: {NO_LAYER}'qproj'"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 9]}, "there is no layer 9; the model has 0 to 3"),
    ],
)
def test_layers_that_the_model_does_not_have_are_one_line(tiny, lora, message):
    model, _ = load_model_and_tokenizer(str(tiny / "base"), weights=False)
    with pytest.raises(UserError) as error:
        add_adapter(model, build_lora_config(lora), "base", 1)
    assert message in str(error.value)
    assert str(error.value).startswith("hyperparameters.lora")


@pytest.mark.parametrize(
    ("lora", "layers"),
    [
        ({}, 28),
        ({"target_modules": "All-Linear", "exclude_modules": ["lm_head"]}, 28),
        ({"target_modules": ["q_proj", "self_attn.v_proj"], "layers_to_transform": 1}, 2),
        ({"target_modules": r".*\.(q|v)_proj", "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 3}}, 8),
        ({"use_dora": True, "exclude_modules": ".*mlp.*"}, 16),
    ],
)
def test_layers_that_the_model_has_get_the_adapter(tiny, lora, layers):
    model, _ = load_model_and_tokenizer(str(tiny / "base"), weights=False)
    stack = add_adapter(model, build_lora_config(lora), "base", 1)
    weights = {name: weight for name, weight in stack.named_parameters() if f"lora_A.{OWN}" in name}
    assert len(weights) == layers
    assert not any("lm_head" in name or "embed" in name for name in weights)
    if "rank_pattern" in lora:
        assert sorted({weight.shape[0] for weight in weights.values()}) == [3, 8]
