"""A trial over several machines: each has a disk of its own, and what a trial shares with others is on each."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import metrics_by_step
from datasets import Dataset
from processes import run_ranks

from trial.events import read_events

ARGS = "hyperparameters__training_args__"
FSDP = {f"{ARGS}fsdp": True, f"{ARGS}fsdp_config": {"transformer_layer_cls_to_wrap": ["GemmaDecoderLayer"]}}


@pytest.fixture
def short(dpo_config, tiny, tmp_path):
    """A DPO trial of two steps of four pairs, and its reference pass in batches of four."""
    pairs = (tiny / "questions" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(pairs[:40]))
    config = json.loads(json.dumps(dpo_config))
    config["hyperparameters"]["datasets"] = [str(tmp_path / "pairs.jsonl")]
    steps = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1}
    config["hyperparameters"]["training_args"] |= {"precompute_ref_batch_size": 4, **steps}
    return config


@pytest.fixture
def run(write_config, short, tmp_path):
    """Run the trial with as many ranks as machines, and at least `ranks`; returns the first machine's reports."""
    count = 0

    def run(*machines: str, ranks: int = 1, preempt: int | None = None, **changes):
        nonlocal count
        count += 1
        disks, name, ranks = [tmp_path / machine for machine in machines], f"trial-{count}", max(ranks, len(machines))
        for disk in disks:
            (disk / name).mkdir(parents=True)
        for disk in disks[1:]:  # which checkpoint is the latest is the master's to know
            (disk / name / "events.jsonl").symlink_to(disks[0] / name / "events.jsonl")
        changes = {f"{ARGS}per_device_train_batch_size": 4 // ranks, **changes}
        path, log = write_config(short, f"{name}.yaml", **changes), tmp_path / f"{name}.log"
        words = ["--config", path, "--output", f"DISK/{name}", "--cache", "DISK/cache"]
        start = {"log": log, "ranks": ranks, "machines": disks, "threads": 1, "fsdp": f"{ARGS}fsdp" in changes}
        for stop in filter(None, (preempt, 10**6)):
            assert run_ranks("dpo_finetune", *words, preempt=stop, **start) == 0, log.read_text()
        return read_events(disks[0] / name / "events.jsonl")

    return run


def passes(reports) -> list[str]:
    told = [report["status"] for report in reports if report["kind"] == "status"]
    return [text.split(" in ")[0] for text in told if text.startswith("reference log-probs")]


def reference_files(machine: Path) -> dict[str, bytes]:
    """The reference log-probs on a machine's disk, by split."""
    return {file.parent.name: file.read_bytes() for file in machine.glob("cache/*/*/cache-*.arrow")}


COMPUTED, REUSED = ["reference log-probs computed"], ["reference log-probs reused"]


def log_probs(machine: Path) -> dict[str, np.ndarray]:
    files = machine.glob("cache/*/*/cache-*.arrow")
    return {file.parent.name: np.array(Dataset.from_file(str(file)).to_pandas()) for file in files}


def test_a_trial_over_two_machines_is_that_of_one_process(run, tmp_path):
    """Also where one machine has lost its part of what they share, and the other has another, in another order; and
    when it is preempted, and resumes from a checkpoint that both have uploaded."""
    alone, over_two = run("alone"), run("a", "b")
    assert passes(alone) == passes(over_two) == COMPUTED
    one, two = metrics_by_step(alone), metrics_by_step(over_two)
    assert {key: metrics.keys() for key, metrics in one.items()} == {key: two[key].keys() for key in two}
    for key, metrics in one.items():
        for name in {"loss", "eval_loss", "eval_preference_loss", "eval_rewards/margins", "grad_norm"} & metrics.keys():
            assert two[key][name] == pytest.approx(metrics[name], rel=1e-6, abs=1e-6), (key, name)
    files = reference_files(tmp_path / "a")
    assert sorted(files) == ["test", "train"]
    assert reference_files(tmp_path / "b") == files
    for split, values in log_probs(tmp_path / "alone").items():
        np.testing.assert_allclose(log_probs(tmp_path / "a")[split], values, rtol=1e-6)

    (torn,), (lost,) = (tmp_path.glob(f"{where}/cache-*.arrow") for where in ("a/cache/*/train", "b/cache/*/test"))
    torn.write_bytes(torn.read_bytes()[:-100] + bytes(100))
    lost.unlink()
    again = run("b", "a", preempt=2)
    assert passes(again) == [*REUSED, *REUSED]
    assert [report["steps_completed"] for report in again if report["kind"] == "checkpoint"] == [1, 2]
    assert metrics_by_step(again) == two
    assert reference_files(tmp_path / "a") == reference_files(tmp_path / "b") == files


def test_a_sharded_model_over_two_machines_has_the_same_reference(run, tmp_path):
    assert passes(run("alone")) == passes(run("a", "b", **FSDP)) == COMPUTED
    assert reference_files(tmp_path / "a") == reference_files(tmp_path / "b")
    for split, values in log_probs(tmp_path / "alone").items():
        np.testing.assert_allclose(log_probs(tmp_path / "a")[split], values, rtol=1e-6)
