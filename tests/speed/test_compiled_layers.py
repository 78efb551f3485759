"""Compiled decoder layers: the same losses and gradients as eager ones, from code that is compiled once."""

import copy
import functools
import os
import shutil

import pytest
import torch
import transformers
from conftest import run_script
from processes import REPO
from test_memory import adapted
from test_padding_free import CONFIGS, FAMILIES, SIZES, assert_same, batch, logps_and_gradients, make
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

import dpo_finetune
import sft_finetune
from adapters.stack import lora_layers
from speed import compiled_layers, fitting, hardware, padding_free
from speed.activations import decoder_layers, fused_bytes, kept_bytes
from speed.compiled_layers import compile_layers
from speed.padding_free import remove_padding

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None and "CI" not in os.environ, reason="needs a C++ compiler"
)
ARGS = "hyperparameters__training_args__"
BATCHES = [{}, {"lengths": (9, 40, 25, 11), "prompts": (3, 8)}, {"lengths": (16, 16), "prompts": (2,)}]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """Code compiled in an earlier test is forgotten, and what this one changes for the process is undone."""
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, padding_free.ATTENTION, None)
    transformers.AttentionInterface.register(padding_free.ATTENTION, padding_free.attend_by_sequence)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch.compiler.reset()


def eager_and_compiled(model, cache, pairs=True):
    models = [model, copy.deepcopy(model)]
    for each in models:
        assert remove_padding(each, pairs)
        add_fused_lm_head(each)
    compile_layers(models[1], cache)
    return models


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_eager_ones_and_nothing_is_compiled_twice(family, compiler, cache):
    eager, compiled = eager_and_compiled(make(family), cache)
    graphs = {}
    for every in (0, 1, 2):  # activation checkpointing: of no layer, all, every second one
        for model in (eager, compiled):
            model.activation_checkpointing_disable()
            if every:
                model.activation_checkpointing_enable(every_n_layers=every)
        for number, case in enumerate(BATCHES):
            expected, found = (logps_and_gradients(model, batch(**case)) for model in (eager, compiled))
            assert_same(expected, found)
            graphs[every, number] = compiler["stats"]["unique_graphs"]
    # Of a layer: before and after its attention, and what calls them; of Qwen 2, whose layers differ, one more.
    # Not for each layer, length or checkpoint.
    assert 2 <= graphs[0, 0] <= 5
    assert set(graphs.values()) == {graphs[0, 0]}

    for model in (eager, compiled):
        model.eval()
    for number, case in enumerate(BATCHES):
        with torch.no_grad():
            one, other = (model(**batch(**case), fused_lm_head=True).log_probs for model in (eager, compiled))
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
        graphs["evaluation", number] = compiler["stats"]["unique_graphs"]
    assert graphs["evaluation", 0] == graphs["evaluation", 2] <= 3 * graphs[0, 0]


@pytest.mark.parametrize(
    ("family", "dtype", "lora"),
    [
        *(("gemma", torch.bfloat16, False), ("gemma", None, False)),
        *(("gemma3_text", torch.bfloat16, False), ("qwen3", None, False)),
        ("gemma", torch.bfloat16, True),
    ],
)
def test_compiled_layers_keep_as_little_as_estimated(family, dtype, lora, monkeypatch, tmp_path):
    """Counted in the second half of a batch, which leaves out what does not grow with it.

    The graphs are divided into forward and backward passes as inductor does it, but not compiled.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    name, changes = CONFIGS[family]
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 512, "head_dim": 16, "max_position_embeddings": 4096}
    changes = {key: value for key, value in changes.items() if key != "layer_types"} | {"sliding_window": 4096}
    base = dtype if lora and dtype else torch.float32
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes | changes), dtype=base)
    if lora:
        model = adapted(model)
        for layer in lora_layers(model):
            layer.cast_input_dtype_enabled = dtype is None
    _, compiled = eager_and_compiled(model.train(), tmp_path, pairs=False)

    def measured(tokens):
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        ids = torch.zeros(1, tokens, dtype=torch.long)
        autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            compiled.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())

    def estimated(tokens):
        return kept_bytes(compiled, dtype, (1, tokens), on_gpu=True) - fused_bytes(compiled, dtype, tokens)

    found, expected = (kept(1024) - kept(512) for kept in (measured, estimated))
    # Nothing below an adapter's first layer needs a gradient, so that one keeps another part of its norm.
    assert found <= (1.02 if lora else 1.001) * expected
    has_own_norms = "norm" in str(decoder_layers(model)[0].self_attn)  # of queries and keys, which count as nothing
    assert expected <= (1.06 if has_own_norms else 1.001) * found


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """This machine's CPU counts as a GPU that can compile."""
    for module in (hardware, fitting):
        monkeypatch.setattr(module, "GPU_TYPES", ("cpu",))
    monkeypatch.setattr(compiled_layers, "has_triton", lambda: True)


@pytest.mark.parametrize(
    ("script", "lora"), [(sft_finetune, None), (dpo_finetune, None), (dpo_finetune, {"r": 4, "lora_alpha": 32})]
)
def test_a_gpu_trains_as_without_compiling_and_shares_what_it_compiled(
    train, request, script, lora, tmp_path, compiler, monkeypatch
):
    """Larger batches of the same steps, compiled layers: in float32 to 1e-5."""
    config = request.getfixturevalue("sft_config" if script is sft_finetune else "dpo_config")
    if script is dpo_finetune:  # rows to train on: a multiple of 4, or batches of another size would be left
        datasets = [{"name": config["hyperparameters"]["datasets"][0], "number_of_samples": 20}]
        config = config | {"hyperparameters": config["hyperparameters"] | {"datasets": datasets}}
    steps = {f"{ARGS}gradient_accumulation_steps": 2, f"{ARGS}per_device_train_batch_size": 2, f"{ARGS}max_steps": 3}
    steps |= {f"{ARGS}eval_strategy": "steps", f"{ARGS}eval_steps": 3, "hyperparameters__lora": lora}
    plain = train(script, config, output="plain", **steps)
    request.getfixturevalue("as_on_a_gpu")
    monkeypatch.setattr("sys.argv", ["script.py"])
    fast = train(script, config, output="fast", **steps)
    (choices,) = [r["status"] for r in fast["status"] if r["status"].startswith("training with ")]
    assert "; compiled decoder layers; " in choices
    assert "; 4 rows a batch, 1 batch a step" in choices
    for kind in ("training", "validation"):
        one, other = ([report["metrics"]["loss" if kind == "training" else "eval_loss"] for report in run[kind]
                       if {"loss", "eval_loss"} & report["metrics"].keys()] for run in (plain, fast))  # fmt: skip
        assert one == pytest.approx(other, rel=1e-5)
        assert len(one) >= 1
    cache = tmp_path / "fast" / "cache"
    assert any((cache / "inductor").iterdir())

    torch.compiler.reset()
    before = compiler["inductor"]["fxgraph_cache_hit"]
    train(script, config, output="again", **steps)  # another trial, with the same environment as the first
    assert compiler["inductor"]["fxgraph_cache_hit"] > before


def test_a_users_torch_compile_stays_theirs(train, sft_config, as_on_a_gpu):
    run = train(sft_finetune, sft_config, **{f"{ARGS}torch_compile": False, f"{ARGS}max_steps": 1})
    assert "compiled" not in run["stdout"]


def test_two_ranks_train_as_without_compiling(cache):
    """Replicated or sharded, as sft.yaml is, with checkpointing or without; the layers are compiled once there, too."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    run = run_script(*launcher, REPO / "tests/speed/sharded.py", cache)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["ddp 4", "fsdp1 4", "fsdp2 4"]
