"""The benchmarks run and print what they promise. What they measure depends on the machine and is not tested."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
from conftest import REPO, run_script

from benchmarks import throughput
from errors import UserError


@pytest.fixture
def made(tmp_path):
    """The folder of the tiny model with random weights."""
    return throughput.make_model("tiny", tmp_path, False, tmp_path / "made")


def test_throughput_compares_ours_with_trl_on_the_same_tokens(tmp_path):
    """The real entrypoint and TRL's own trainer have the same losses on the same tokens."""
    output = tmp_path / "measured.json"
    options = ["--model", "tiny", "--kind", "dpo", "--rounds", "1", "--steps", "1", "--batch", "2"]
    # Without bf16=false, a CPU with bf16 instructions would train ours under bf16 autocast, but TRL in float32.
    options += ["--configurations", "ours", "trl-fp32", "--set", "bf16=false"]
    options += ["--model-folder", tmp_path / "kept", "--json", output]
    run = run_script("benchmarks/throughput.py", *options)
    assert run.returncode == 0, run.stderr
    ours, theirs = json.loads(output.read_text())["results"]
    assert (ours["configuration"], theirs["configuration"]) == ("ours", "trl-fp32")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert (ours["padding"], theirs["padding"] > 0) == (0, True)
    assert "ours / trl-fp32: " in run.stdout
    assert "\nours: training with float32; no padding" in run.stdout
    assert theirs["choices"] == []
    assert throughput.make_model("tiny", tmp_path, False, tmp_path / "kept") == tmp_path / "kept"


def test_a_made_model_is_kept_and_nothing_else_is_taken_for_it(made, tmp_path):
    (made / "model.safetensors").write_text("kept")
    assert throughput.make_model("tiny", tmp_path, False, made) == made
    assert (made / "model.safetensors").read_text() == "kept"

    with pytest.raises(UserError, match=r"^--model-folder .*made: holds something other than a whole small "):
        throughput.make_model("small", tmp_path, False, made)
    (made / "recipe.json").unlink()  # as after an interruption
    with pytest.raises(UserError, match="holds something other than a whole tiny "):
        throughput.make_model("tiny", tmp_path, False, made)
    assert (made / "model.safetensors").read_text() == "kept"
    with pytest.raises(UserError, match=r"^--model-folder: keeps a model that is made, but --model .* there al"):
        throughput.parse_arguments(["--model", str(made), "--model-folder", "elsewhere"])


def test_model_and_dataset_may_be_relative_paths(made, tmp_path):
    rows = [{"prompt": f"w{number} w2", "completion": "w3 w4 w5"} for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = ["--model", "made", "--dataset", "rows.jsonl", "--kind", "sft", "--configurations", "ours"]
    options += ["--rounds", "1", "--steps", "1", "--batch", "1", "--set", "bf16=false", "--json", "measured.json"]
    run = run_script(REPO / "benchmarks/throughput.py", *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (ours,) = json.loads((tmp_path / "measured.json").read_text())["results"]
    assert len(ours["losses"]) == 2

    with pytest.raises(UserError, match=r"^--dataset missing.jsonl: no such file or folder$"):
        throughput.parse_arguments(["--model", str(made), "--dataset", "missing.jsonl"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--set", "learning_rte=1"],
            "training_args.learning_rte is not a hyperparameter (did you mean 'learning_rate'?)",
        ),
        (["--set", "learning_rate=-1"], "training_args.learning_rate"),
        (["--dataset", "rows.jsonl"], "rows.jsonl line 2: "),
    ],
)
def test_a_mistake_is_found_before_anything_is_measured(made, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1", "completion": "w2"}\n{}\n')
    args = throughput.parse_arguments(["--model", str(made), *options])
    with pytest.raises(UserError) as error:
        throughput.check("sft", args, made, tmp_path / "rows.jsonl", tmp_path)
    assert message in str(error.value)


def test_a_configuration_that_runs_out_of_memory_is_left_out(made, tmp_path, monkeypatch, capsys):
    said = "error: out of memory: set activation_checkpointing: true"
    worker = SimpleNamespace(returncode=2, stdout="", stderr=f"{said}\n")
    monkeypatch.setattr(throughput.subprocess, "run", lambda *args, **kwargs: worker)
    args = throughput.parse_arguments(["--model", str(made), "--rounds", "1", "--configurations", "ours"])
    assert throughput.compare("sft", args, made, tmp_path / "rows.jsonl", tmp_path) == []
    assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("name", "checkpointing", "bf16", "liger"),
    [
        ("trl", True, True, False),
        ("trl-liger", True, True, True),
        ("trl-no-checkpointing", False, True, False),
        ("trl-fp32", False, False, False),
    ],
)
def test_each_configuration_is_what_trl_understands_by_it(made, tmp_path, kind, name, checkpointing, bf16, liger):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    columns = ("input_ids", "labels") if kind == "sft" else ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = Dataset.from_dict({column: [[7, 8, 9], [9, 8, 7]] for column in columns})
    spec = {"configuration": name, "kind": kind, "folder": str(tmp_path), "steps": 1, "batch": 2, "accumulate": 1}
    trainer = throughput.trl_trainer(
        *(spec, "the trial"), model=AutoModelForCausalLM.from_pretrained(made), ref_model=None, args=None,
        train_dataset=rows, eval_dataset=None, processing_class=AutoTokenizer.from_pretrained(made),
    )  # fmt: skip
    args = trainer.args
    assert (args.gradient_checkpointing, args.activation_checkpointing) == (checkpointing, checkpointing)
    assert (args.bf16, args.use_liger_kernel) == (bf16, liger)
    if kind == "dpo":
        assert (trainer.ref_model is None) == liger
        assert ("ref_chosen_logps" in trainer.train_dataset.column_names) == liger
        assert set(getattr(trainer, "reference_seconds", {})) == ({"train"} if liger else set())


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be on a machine with or without a GPU, bf16 instructions and liger-kernel."""

    def pretend(gpu, bf16, liger):
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
        monkeypatch.setattr("config.training_args.has_bf16", lambda use_cpu: bf16)
        package = SimpleNamespace(__spec__=ModuleSpec("liger_kernel", None)) if liger else None
        monkeypatch.setitem(sys.modules, "liger_kernel", package)

    return pretend


@pytest.mark.parametrize(
    ("gpu", "bf16", "liger", "named", "chosen"),
    [
        (True, True, True, None, ["ours", "trl", "trl-liger", "trl-no-checkpointing"]),
        (True, True, False, ["ours", "trl"], ["ours", "trl"]),
        (False, True, True, None, ["ours", "trl", "trl-no-checkpointing", "trl-fp32"]),
        (False, False, True, None, ["ours", "trl-fp32"]),
    ],
)
def test_the_configurations_suit_the_machine(machine, gpu, bf16, liger, named, chosen):
    machine(gpu, bf16, liger)
    assert throughput.choose_configurations(named) == chosen


@pytest.mark.parametrize(
    ("gpu", "liger", "named", "missing"),
    [
        (True, False, None, "the package liger-kernel (pip install liger-kernel)"),
        (False, True, ["ours", "trl-liger"], "a CUDA device"),
    ],
)
def test_what_liger_lacks_is_said_in_one_line(machine, gpu, liger, named, missing):
    machine(gpu, True, liger)
    with pytest.raises(UserError) as stop:
        throughput.choose_configurations(named)
    assert str(stop.value) == f"--configurations: trl-liger needs {missing}; without it, name the others"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model", "nowhere"],
            "error: --model nowhere: must be one of tiny, small, gemma-270m, gemma-2b or a model's folder (with config",
        ),
        (["--model-folder", "tests"], "error: --model-folder tests: holds something other than a whole small that was"),
        (["--length", "128"], "error: --length: give one number for each of sft, dpo, as in --length 4096 2048"),
        (["--dataset", "rows.jsonl"], "error: --dataset: small has no real tokenizer; set --model to a"),
    ],
)
def test_throughput_reports_a_mistake_in_one_line(options, message):
    run = run_script("benchmarks/throughput.py", *options)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert run.stderr.startswith(message)


def test_scale_computes_the_published_run():
    run = run_script("benchmarks/scale.py", "--full-run", "45")
    assert run.returncode == 0, run.stderr
    assert "| SFT | 1 | 48,000 | 144,000 | " in run.stdout
