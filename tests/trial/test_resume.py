"""A trial that is stopped, anywhere and however often, ends bit for bit as one that was never touched.

The same through the cluster's own machinery, and with SIGKILL, is in test_cluster.py.
"""

import signal

import pytest
import torch
from conftest import metrics_by_step
from processes import run_ranks
from safetensors.torch import load_file

import dpo_finetune
import sft_finetune
from metrics.evaluations import FILE, read_evaluations
from storage.checkpoints import local_checkpoint
from trial.context import Trial
from trial.events import read_events

ARGS = "hyperparameters__training_args__"
# Logs, evaluations and checkpoints out of step with each other.
STEPS = {
    f"{ARGS}max_steps": 5,
    f"{ARGS}gradient_accumulation_steps": 2,
    f"{ARGS}per_device_eval_batch_size": 64,  # an evaluation is one batch
    f"{ARGS}logging_steps": 3,
    f"{ARGS}eval_strategy": "steps",
    f"{ARGS}eval_steps": 2,
    f"{ARGS}save_strategy": "steps",
    f"{ARGS}save_steps": 4,
}
EPOCHS = {f"{ARGS}{name}_strategy": "epoch" for name in ("logging", "eval")}
EPOCHS |= {f"{ARGS}max_steps": None, f"{ARGS}num_train_epochs": 2, f"{ARGS}gradient_accumulation_steps": 2}
CASES = {
    # NEFTune's noise is drawn from the random numbers, as dropout would be: they must resume as well.
    "sft": (sft_finetune, STEPS | {f"{ARGS}neftune_noise_alpha": 5.0}),
    "sft-epochs": (sft_finetune, EPOCHS | {f"{ARGS}save_strategy": "epoch"}),
    # A save on an epoch's last step comes before the log and the evaluation of the epoch, in the Trainer's order.
    "sft-mixed": (sft_finetune, EPOCHS | {f"{ARGS}save_strategy": "steps", f"{ARGS}save_steps": 3}),
    # Dropout in the adapter, and rows of new tokens in it.
    "sft-lora": (sft_finetune, STEPS | {"hyperparameters__lora": {"r": 4, "lora_dropout": 0.3}}),
    "dpo": (dpo_finetune, STEPS | {f"{ARGS}precompute_ref_batch_size": 32}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture
def small(tiny, request, case):
    """The experiment, of three steps an epoch for SFT."""
    script, changes = CASES[case]
    config = request.getfixturevalue("sft_config" if script is sft_finetune else "dpo_config")
    if script is sft_finetune:
        changes = changes | {"hyperparameters__dataset_subsets": [{"subset": "home", "number_of_samples": 30}]}
    return script, config, changes


@pytest.fixture
def run_trial(small, call, write_config, tmp_path):
    script, config, changes = small

    def run(output):
        status, _, err = call(script.main, "--config", write_config(config, **changes), "--output", tmp_path / output)
        assert status == 0, err
        return read_events(tmp_path / output / "events.jsonl")

    return run


def steps_saved(reports):
    return [report["steps_completed"] for report in reports if report["kind"] == "checkpoint"]


def last_checkpoint(reports):
    return local_checkpoint([report["uuid"] for report in reports if report["kind"] == "checkpoint"][-1], "test")


def assert_same_end(untouched, other):
    assert metrics_by_step(untouched) == metrics_by_step(other)
    folders = [last_checkpoint(reports) for reports in (untouched, other)]
    before, after = (load_file(next(folder.glob("*model.safetensors"))) for folder in folders)
    assert all(torch.equal(before[name], after[name]) for name in before)
    stored = [(folder / FILE).read_text() for folder in folders]  # of every evaluation, also before a stop
    assert stored[0] == stored[1]
    if read_evaluations(folders[0]).rows:
        evaluated = [step for kind, step in metrics_by_step(untouched) if kind == "validation"]
        assert list(read_evaluations(folders[0]).steps) == evaluated


def test_a_trial_stopped_anywhere_ends_like_an_untouched_one(run_trial, monkeypatch, case):
    untouched = run_trial("untouched")
    # How often each start is let go on when it asks; an evaluation asks once.
    for patience in (4,) if case in ("dpo", "sft-lora") else (3, 4):
        polls = starts = 0

        def should_preempt(self, patience=patience):
            nonlocal polls
            polls += self.training
            return polls >= patience

        def status(self, text):
            self.training = text == "training"

        with monkeypatch.context() as patch:
            patch.setattr(Trial, "should_preempt", should_preempt)
            patch.setattr(Trial, "status", status)
            while starts == 0 or polls >= patience:
                polls, starts = 0, starts + 1
                reports = run_trial(f"stopped-{patience}")
                assert starts <= 12, steps_saved(reports)
        assert starts > 2
        assert_same_end(untouched, reports)


def test_a_trial_stopped_during_the_reference_pass_saves_nothing(call, write_config, dpo_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Trial, "should_preempt", lambda self: True)
    path = write_config(dpo_config)
    assert call(dpo_finetune.main, "--config", path, "--output", tmp_path / "out")[0] == 0
    kinds = {report["kind"] for report in read_events(tmp_path / "out" / "events.jsonl")}
    assert kinds == {"hparams", "status"}  # no step, no checkpoint, and the next start begins anew


def test_a_trial_that_had_reached_its_end_trains_no_further(call, write_config, sft_config, tmp_path):
    """As when it is killed after its last checkpoint and before its end."""
    for _ in range(2):
        status, _, err = call(sft_finetune.main, "--config", write_config(sft_config), "--output", tmp_path / "out")
        assert status == 0, err
        reports = read_events(tmp_path / "out" / "events.jsonl")
        assert steps_saved(reports) == [4]
        assert len(metrics_by_step(reports)) == 5


# Where a trial of four steps, saved every second, is killed at each of its starts, and the steps that are saved by
# then; the last start is let live.
DEATHS = [
    (("torch.save", 2), []),  # saving step 2: the optimizer's state is there, the rest not yet
    (("shutil.copy2", 4), []),  # uploading step 2
    (("trial.events.append_event", 10), [2]),  # in step 3
    (("shutil.copy2", 5), [2]),  # downloading step 2
    (("shutil.copy2", 17), [2]),  # uploading step 4
    (None, [2, 4]),
]
RANKS = [("sft_finetune", 1, False), ("dpo_finetune", 2, False), ("sft_finetune", 2, True), ("dpo_finetune", 2, True)]


@pytest.fixture
def run_on_ranks(write_config, request, tmp_path):
    def prepare(script, ranks, fsdp, **changes):
        config = request.getfixturevalue("sft_config" if script == "sft_finetune" else "dpo_config")
        if script == "dpo_finetune":
            changes |= {f"{ARGS}precompute_ref_batch_size": 32}
        if fsdp:
            changes |= {f"{ARGS}fsdp": True}
            changes |= {f"{ARGS}fsdp_config": {"transformer_layer_cls_to_wrap": ["GemmaDecoderLayer"]}}
        path = write_config(config, **changes)

        def run(output, expected=0, **interference):
            log, folder = tmp_path / f"{output}.log", tmp_path / output
            arguments = ("--config", path, "--output", folder)
            status = run_ranks(script, *arguments, log=log, ranks=ranks, fsdp=fsdp, **interference)
            assert status == expected, log.read_text()
            return read_events(folder / "events.jsonl")

        return run

    return prepare


@pytest.mark.parametrize(("script", "ranks", "fsdp"), RANKS)
def test_a_trial_killed_at_any_moment_ends_like_an_untouched_one(run_on_ranks, script, ranks, fsdp):
    changes = {f"{ARGS}save_strategy": "steps", f"{ARGS}save_steps": 2, f"{ARGS}logging_steps": 3}
    run = run_on_ranks(script, ranks, fsdp, **changes)
    untouched = run("untouched")
    for die, saved in DEATHS if ranks == 1 else [*DEATHS[1:3], DEATHS[-1]]:
        killed = run("killed", -signal.SIGKILL if die else 0, die=die)
        assert steps_saved(killed) == saved
    assert steps_saved(untouched) == [2, 4]
    for report in killed:
        if report["kind"] == "checkpoint":  # what accelerate saves only of a model that it has sharded
            assert (local_checkpoint(report["uuid"], "test") / "pytorch_model_fsdp.bin").exists() == fsdp
    assert_same_end(untouched, killed)


@pytest.mark.parametrize(("script", "ranks", "fsdp"), [RANKS[1], RANKS[2]])
def test_two_ranks_stopped_anywhere_end_like_untouched_ones(run_on_ranks, script, ranks, fsdp):
    """In the evaluation of step 2, then after step 3: each rank stops where the others do."""
    evaluating = {f"{ARGS}eval_strategy": "steps", f"{ARGS}eval_steps": 2, f"{ARGS}per_device_eval_batch_size": 64}
    run = run_on_ranks(script, ranks, fsdp, **evaluating)
    untouched = run("untouched")
    evaluations = 1  # batches of an evaluation; those of DPO's data are all in one of 64 on each rank
    first_start = 1 + 2 + evaluations  # before step 1, after steps 1 and 2, in the evaluation of step 2
    assert steps_saved(run("stopped", preempt=first_start)) == [2]
    # The evaluation that was broken off, before step 3, after step 3.
    stopped = run("stopped", preempt=evaluations + 2)
    assert steps_saved(stopped) == [2, 3]
    stored = list(read_evaluations(last_checkpoint(stopped)).steps)
    assert stored == ([2] if script == "dpo_finetune" else [])  # made up for too late for step 2's own checkpoint
    stopped = run("stopped")
    assert steps_saved(stopped) == [2, 3, 4]
    assert_same_end(untouched, stopped)


def test_a_trial_resumes_on_more_ranks(run_on_ranks):
    """Not exactly, but it goes on: with an evaluation due, all ranks must go into it."""
    evaluating = {f"{ARGS}eval_strategy": "steps", f"{ARGS}eval_steps": 2, f"{ARGS}per_device_eval_batch_size": 32}
    assert steps_saved(run_on_ranks("sft_finetune", 1, False, **evaluating)("out", preempt=4)) == [2]
    reports = run_on_ranks("sft_finetune", 2, False, **evaluating)("out")
    assert steps_saved(reports) == [2, 4]
    assert ("validation", 2) in metrics_by_step(reports)
