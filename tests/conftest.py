"""Fixtures: the tiny example, made small and in seconds, and ways to call the real entrypoints on it.

Nothing here reaches a network, a hub or a cluster: HF_HUB_OFFLINE is set, and every folder is a temporary one.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "examples" / "tiny")]
os.environ["PYTHONPATH"] = str(REPO)  # for the server of processes.py
os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of the hub's client, which reads it once

TRAINING_ARGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "activation_checkpointing": False,
    "bf16": False,  # the same numbers on every machine
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory):
    """Caches and checkpoints of the tests stay out of the user's."""
    patch = pytest.MonkeyPatch()
    home = tmp_path_factory.mktemp("home")
    patch.setenv("HF_HOME", str(home / "huggingface"))
    patch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
    patch.setenv("LOCAL_CHECKPOINT_STORAGE", str(home / "checkpoints"))
    patch.setattr("datasets.config.HF_DATASETS_CACHE", str(home / "datasets"))
    patch.setattr("storage.checkpoints.HF_HOME", str(home / "huggingface"))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The tiny example's folder, with a base model too small and too briefly trained to say anything sensible."""
    import make

    folder = tmp_path_factory.mktemp("tiny")
    make.make(folder, epochs=0.3, hidden_size=32)
    return folder


@pytest.fixture
def tokenizer(tiny):
    """The tiny base's tokenizer, with the chat format but no tokens added for it."""
    from transformers import AutoTokenizer

    from chat_format import CHAT_ML_TEMPLATE

    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    tokenizer.chat_template = CHAT_ML_TEMPLATE
    return tokenizer


@pytest.fixture
def model(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny / "base")


@pytest.fixture(scope="session")
def sft_config(tiny) -> dict[str, Any]:
    """An SFT experiment of four steps."""
    return {
        "name": "test-sft",
        "entrypoint": "python -m determined.launch.torch_distributed python sft_finetune.py",
        "searcher": {"name": "single", "metric": "eval_loss", "smaller_is_better": True},
        "hyperparameters": {
            "model_name": str(tiny / "base"),
            "dataset": str(tiny / "instructions"),
            "dataset_subsets": [{"subset": "kitchen", "ratio": 0.5}, {"subset": "home", "number_of_samples": 14}],
            "max_seq_length": 256,
            "chat_tokens": {"add_chat_tokens": True},
            "training_args": dict(TRAINING_ARGS),
        },
    }


@pytest.fixture(scope="session")
def dpo_config(tiny) -> dict[str, Any]:
    """A DPO experiment of four steps from the base model."""
    return {
        "name": "test-dpo",
        "entrypoint": "python dpo_finetune.py",
        "searcher": {"name": "single", "metric": "eval_rewards/accuracies", "smaller_is_better": False},
        "hyperparameters": {
            "model_name": str(tiny / "base"),
            "model_ckpt": "none",
            "datasets": [str(tiny / "questions"), str(tiny / "conversations")],
            "dpo_beta": 0.1,
            "max_length": 384,
            "precompute_ref_log_probs": True,
            "training_args": dict(TRAINING_ARGS),
        },
    }


@pytest.fixture
def write_config(tmp_path) -> Callable[..., str]:
    """Write a config with some keys replaced, given as `hyperparameters__training_args__seed=1`; returns its path."""

    def write(config: dict[str, Any], name: str = "config.yaml", **changes: Any) -> str:
        config = json.loads(json.dumps(config))
        for path, value in changes.items():
            *parents, key = path.split("__")
            level = config
            for parent in parents:
                level = level.setdefault(parent, {})
            if value is None:
                level.pop(key, None)
            else:
                level[key] = value
        (tmp_path / name).write_text(yaml.safe_dump(config))
        return str(tmp_path / name)

    return write


def run_script(*words: object, cwd: Path = REPO) -> subprocess.CompletedProcess:
    """One of the project's scripts in a process of its own, in the repository (or `cwd`), as a user would run it."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def metrics_by_step(reports):
    """What was reported last for each step: a step that is done again after a resume is reported again.

    Without how fast it was, which no two runs of the same training have in common.
    """
    from trial.throughput import METRICS

    kinds = ("training", "validation")
    return {
        (r["kind"], r["steps_completed"]): {name: value for name, value in r["metrics"].items() if name not in METRICS}
        for r in reports
        if r["kind"] in kinds
    }


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a folder: the values of each name by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    return {name: {e.step: e.value for e in board.Scalars(name)} for name in board.Tags()["scalars"]}


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """A script's `main` in this process: its exit status, stdout and stderr. Quick, for what fails before training."""

    def call_main(main: Callable[[], Any], *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.chdir(REPO)
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        try:
            status = main() or 0
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return call_main


@pytest.fixture
def train(call, write_config, tmp_path):
    """Run an entrypoint to its end; returns its reports by kind."""

    def run(script, config, output="out", **changes):
        path = write_config(config, **changes)
        status, out, err = call(script.main, "--config", path, "--output", tmp_path / output)
        assert status == 0, err
        from trial.events import read_events

        reports = {"stdout": out, "training": [], "validation": [], "checkpoint": [], "progress": []}
        for report in read_events(tmp_path / output / "events.jsonl"):
            reports.setdefault(report["kind"], []).append(report)
        return reports

    return run


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that the entrypoints build, in order."""
    from metrics import exact_evaluation
    from speed import tokenized_dpo_trainer

    built = []
    for home, name in ((exact_evaluation, "ExactSFTTrainer"), (tokenized_dpo_trainer, "TokenizedDPOTrainer")):
        original = getattr(home, name)

        def build(*args, original=original, **kwargs):
            built.append(original(*args, **kwargs))
            return built[-1]

        monkeypatch.setattr(home, name, build)  # the entrypoints import it from there when they train
    return built


def restore_fused_head(monkeypatch):
    """TRL's fused head, whatever an earlier training has made of it, as long as `monkeypatch` lasts."""
    import trl.kernels.chunked_logprob as kernels
    import trl.trainer.utils as utils

    monkeypatch.setattr(utils, "_use_triton", kernels._use_triton)
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768)
    monkeypatch.setattr(kernels, "_addmm_fp32", getattr(kernels._addmm_fp32, "__wrapped__", kernels._addmm_fp32))


@pytest.fixture
def fused_head_as_installed(monkeypatch):
    """TRL's fused head, whatever an earlier test has made of it; and what this one makes of it is undone."""
    restore_fused_head(monkeypatch)


def browser_path() -> str | None:
    """None: the one that `playwright install chromium` has fetched."""
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")))
    mac = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    return next(found, str(mac) if mac.exists() else None)


@pytest.fixture(scope="module")
def browser():
    """Chromium or Chrome, where the machine has one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = browser_path()
        if path is None and not Path(playwright.chromium.executable_path).exists():
            reason = "no Chromium or Chrome here: install one, or run `playwright install chromium`"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)  # CI has one, or has lost it
        flags = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to be root in one
        with playwright.chromium.launch(executable_path=path, args=[*flags, *sandbox]) as browser:
            yield browser


@pytest.fixture
def master(tmp_path, monkeypatch):
    """An experiment with two trials and three validated checkpoints, and one with a trial that has none."""
    from cluster import Master, Trial

    searcher = {"name": "grid", "metric": "eval_rewards/accuracies", "smaller_is_better": False}
    storage = tmp_path / "storage"
    with Master(storage) as master:
        for experiment_id in (1, 2):
            config = {"searcher": searcher, "checkpoint_storage": {"type": "shared_fs", "host_path": str(storage)}}
            master.experiments[experiment_id] = {"config": config, "body": {"config": ""}}
        master.trials = {1: Trial(1, 1, {}), 2: Trial(2, 1, {}), 3: Trial(3, 2, {})}
        monkeypatch.setenv("DET_MASTER", master.url)
        monkeypatch.setenv("DET_USER", "determined")
        monkeypatch.setenv("DET_PASS", "Strong-enough-1")
        monkeypatch.setenv("HOME", str(tmp_path))
        yield master


@pytest.fixture
def save(master, tiny):
    """A checkpoint as a trial leaves it, with the tiny base or what `make` writes for its model; returns its UUID."""

    def save(trial_id, steps, accuracy=None, make=lambda folder: shutil.copytree(tiny / "base", folder)):
        name = str(uuid.uuid4())
        folder = master.storage / name / f"checkpoint-{steps}"
        make(folder)
        (folder / "optimizer.pt").write_bytes(b"x" * 1000)
        files = [file for file in folder.rglob("*") if file.is_file()]
        resources = {str(file.relative_to(folder.parent)): str(file.stat().st_size) for file in files}
        report = {"kind": "checkpoint", "uuid": name, "steps_completed": steps, "resources": resources}
        master.trials[trial_id].reports.append(report)
        if accuracy is not None:
            metrics = {"eval_rewards/accuracies": accuracy}
            report = {"kind": "validation", "steps_completed": steps, "metrics": metrics}
            master.trials[trial_id].reports.append(report)
        return name

    return save


@pytest.fixture
def saved(save):
    return {"a": save(1, 2, 0.5), "b": save(1, 4, 0.75), "c": save(2, 4, 0.7), "unvalidated": save(2, 5)}
