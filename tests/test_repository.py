"""What a stranger meets: the published YAMLs, the README's commands, the folder that is uploaded, the startup hook."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, run_script
from determined.common import context

import inference
import local_experiment
from experiment_config import expand_trials, read_experiment_config
from hyperparameters import DPOHyperparameters, SFTHyperparameters, parse_hyperparameters

README = (REPO / "README.md").read_text(encoding="utf-8")


def test_sft_yaml_is_the_published_experiment():
    (trial,) = expand_trials(read_experiment_config(str(REPO / "sft.yaml")))
    hparams = parse_hyperparameters(SFTHyperparameters, trial)
    assert (hparams.model_name, hparams.dataset) == ("google/gemma-2b", "HuggingFaceTB/cosmopedia")
    assert {share.subset: share.number_of_samples for share in hparams.dataset_subsets} == {
        **{"web_samples_v2": 15000, "stanford": 5000, "stories": 10000, "wikihow": 5000},
        **{"openstax": 7500, "khanacademy": 7500, "auto_math_text": 10000},
    }
    assert hparams.args.learning_rate == 1e-5


def test_dpo_yaml_is_the_published_grid():
    trials = expand_trials(read_experiment_config(str(REPO / "dpo.yaml")))
    parsed = [parse_hyperparameters(DPOHyperparameters, trial) for trial in trials]
    assert [(h.dpo_beta, h.args.learning_rate) for h in parsed] == [
        (beta, rate) for beta in (0.1, 0.05, 0.01) for rate in (1e-7, 5e-7, 5e-8)
    ]
    assert parsed[0].datasets == ["argilla/dpo-mix-7k", "jondurbin/truthy-dpo-v0.1"]
    assert parsed[0].args.precompute_ref_log_probs


@pytest.mark.parametrize("name", ["sft.yaml", "dpo.yaml", "examples/tiny/sft.yaml", "examples/tiny/dpo.yaml"])
def test_yamls_open_with_the_command_that_runs_them(name):
    opening = (REPO / name).read_text().split("\nname:")[0]
    assert f"python local_experiment.py {name}" in opening


@pytest.mark.parametrize(
    "script", ["sft_finetune", "dpo_finetune", "local_experiment", "inference", "examples/tiny/make"]
)
def test_help_teaches(script):
    shown = run_script(f"{script}.py", "--help")
    assert shown.returncode == 0
    assert "default:" in shown.stdout


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_real(command, monkeypatch):
    """make's targets run in CI; the scripts' command lines parse, and the files they name exist."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert set(words[1:]) <= {"demo", "test"}
        assert f"make {words[1]}" in (REPO / ".ci" / "run").read_text()
        return
    if words[0] in ("source", "det"):
        return
    assert words[0] == "python"
    assert (REPO / words[1]).exists()
    for word in words[2:]:
        assert not word.endswith(".yaml") or (REPO / word).exists()
    parsers = {"local_experiment.py": local_experiment, "inference.py": inference}
    if words[1] in parsers:
        monkeypatch.setattr(sys, "argv", words[1:])
        parsers[words[1]].parse_arguments()


def test_readme_shows_result_and_commands_early():
    opening = "\n".join(README.splitlines()[:40])
    assert "make demo" in opening
    assert "make test" in opening
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", opening)
    assert (REPO / picture).exists()


def test_what_det_uploads(tmp_path):
    """The context directory as the CLI packs it, from a checkout with an environment, runs and caches in it."""
    copied = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    generated = [".venv/lib/big.so", "local_runs/checkpoints/x/model.safetensors", "__pycache__/a.pyc", ".git/HEAD"]
    for name in (*copied, *generated):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((REPO / name).read_bytes() if name in copied else b"x")
    uploaded = {item.path for item in context.read_v1_context(tmp_path, [])}
    assert {"sft_finetune.py", "dpo_finetune.py", "chat_format.py", "startup-hook.sh", "requirements.txt"} <= uploaded
    assert not uploaded & set(generated)
    assert not any(name.startswith("tests/") for name in uploaded)


def run_hook(folder):
    """Source the hook as Determined does, under `set -e`, with no package index to be reached."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-ec", f"source {REPO}/startup-hook.sh; echo done"]
    environment = {**os.environ, "PATH": path, "PIP_NO_INDEX": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_startup_hook_has_nothing_to_do_where_all_is_installed():
    hook = run_hook(REPO)
    assert hook.stdout.strip() == "done", hook.stderr


def test_startup_hook_says_what_failed(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch>=2.6\nno-such-package-anywhere==1\n")
    hook = run_hook(tmp_path)
    assert hook.returncode == 1
    assert "done" not in hook.stdout
    assert hook.stderr.splitlines()[-1].startswith("startup-hook.sh: the packages of requirements.txt could not be")
