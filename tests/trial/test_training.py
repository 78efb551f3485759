"""Both entrypoints off the cluster, with the real TRL, transformers and Determined: what they train and leave."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import determined as det
import pytest
import torch
from determined.core._context import _dummy_init as dummy_init
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import dpo_finetune
import sft_finetune
from storage.checkpoints import local_checkpoint
from trial.det_callback import DetCallback
from trial.events import append_event, read_events

ARGS = "hyperparameters__training_args__"


def folder_of(report):
    return local_checkpoint(report["uuid"], "test")


def weights_of(report):
    return load_file(folder_of(report) / "model.safetensors")


def losses(reports):
    return [report["metrics"]["loss"] for report in reports["training"] if "loss" in report["metrics"]]


def test_sft_leaves_a_checkpoint_that_chats(train, trainers, sft_config, tmp_path):
    reports = train(sft_finetune, sft_config)
    folder = folder_of(reports["checkpoint"][-1])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [tokenizer.eos_token_id, end]
    assert AutoConfig.from_pretrained(folder).vocab_size % 64 == 0
    assert "<|im_start|>" in tokenizer.chat_template
    assert [report["steps_completed"] for report in reports["checkpoint"]] == [4]
    assert reports["validation"][-1]["metrics"]["eval_loss"] > 0
    assert reports["progress"][-1]["progress"] == 1.0
    assert all(weight.dtype == torch.float32 for weight in weights_of(reports["checkpoint"][-1]).values())
    assert not (tmp_path / "out" / "trainer").exists()

    batch = next(iter(trainers[0].get_train_dataloader()))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        supervised = tokenizer.decode(ids[labels != -100])
        prompt = tokenizer.decode(ids[: (labels != -100).nonzero()[0]])
        assert prompt.endswith("<|im_start|>assistant\n")
        assert supervised.endswith("<|im_end|><eos>")
        assert "<|im_start|>" not in supervised


def test_sft_losses_follow_the_recorded_trajectory(train, sft_config):
    """The losses of a fixed run. If a change moves them, it changes what is learned: say why, and pin the new ones."""
    assert losses(train(sft_finetune, sft_config)) == pytest.approx(SFT_LOSSES, rel=2e-3)


def test_dpo_losses_follow_the_recorded_trajectory(train, dpo_config):
    """As above; the first DPO loss is log 2, as policy and reference are still the same."""
    assert losses(train(dpo_finetune, dpo_config)) == pytest.approx(DPO_LOSSES, rel=2e-3)


SFT_LOSSES = [7.14246, 7.09071, 7.01026, 6.97345]
DPO_LOSSES = [0.693147, 0.577755, 0.613689, 0.383726]


@pytest.mark.parametrize("script", [sft_finetune, dpo_finetune])
def test_a_killed_run_resumes_to_the_same_weights(train, call, write_config, request, monkeypatch, tmp_path, script):
    config = request.getfixturevalue("sft_config" if script is sft_finetune else "dpo_config")
    saving = {f"{ARGS}save_strategy": "steps", f"{ARGS}save_steps": 2}
    untouched = train(script, config, **saving)

    original = DetCallback.on_step_end

    def dies_in_step_3(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(DetCallback, "on_step_end", dies_in_step_3)
        with pytest.raises(RuntimeError, match="killed"):
            call(script.main, "--config", write_config(config, **saving), "--output", tmp_path / "killed")
    stale = tmp_path / "killed" / "trainer" / "checkpoint-99"  # a higher number than any of this run's
    stale.mkdir(parents=True)
    resumed = train(script, config, output="killed", **saving)

    assert [report["steps_completed"] for report in resumed["checkpoint"]] == [2, 4]
    assert losses(resumed) == losses(untouched)  # those of step 3 on from the second process
    before, after = weights_of(untouched["checkpoint"][-1]), weights_of(resumed["checkpoint"][-1])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dpo_starts_from_the_sft_checkpoint(train, trainers, sft_config, dpo_config):
    sft = train(sft_finetune, sft_config, output="sft")["checkpoint"][-1]
    dpo = train(dpo_finetune, dpo_config, output="dpo", hyperparameters__model_ckpt=sft["uuid"])["checkpoint"][-1]
    assert (
        AutoConfig.from_pretrained(folder_of(dpo)).vocab_size == AutoConfig.from_pretrained(folder_of(sft)).vocab_size
    )
    tokenizer = AutoTokenizer.from_pretrained(folder_of(dpo))
    assert len(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]) == 1
    batch = next(iter(trainers[-1].get_train_dataloader()))
    for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True):
        assert tokenizer.decode(ids[: mask.nonzero()[0]]).endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(ids[mask == 1]).endswith("<|im_end|><eos>")


def test_cdpo_runs_through_trl(train, dpo_config):
    """At the first step policy and reference agree, where cDPO is log 2 whatever the smoothing."""
    changes = {"hyperparameters__dpo_loss": "cdpo", f"{ARGS}label_smoothing": 0.2, f"{ARGS}max_steps": 2}
    first, second = losses(train(dpo_finetune, dpo_config, **changes))
    assert first == pytest.approx(math.log(2), rel=1e-5)
    assert second != pytest.approx(DPO_LOSSES[1], rel=1e-2)  # and not plain DPO's afterwards


def test_a_batch_that_there_are_not_enough_rows_for_is_one_line(call, write_config, sft_config, tmp_path):
    changes = {f"{ARGS}dataloader_drop_last": True, f"{ARGS}per_device_train_batch_size": 1000}
    status, _, err = call(sft_finetune.main, "--config", write_config(sft_config, **changes), "--output", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert re.search("dataloader_drop_last leaves nothing: [0-9]+ rows are less than a batch of 1000", err)


def test_dpo_without_a_checkpoint_says_so(train, dpo_config):
    reports = train(dpo_finetune, dpo_config, **{f"{ARGS}max_steps": 1})
    statuses = [report["status"] for report in reports["status"]]
    assert any(status.startswith("no checkpoint: DPO starts from ") for status in statuses)


def test_reference_log_probs_before_or_during_training_give_the_same_losses(train, trainers, dpo_config):
    before = train(dpo_finetune, dpo_config, output="before")
    during = train(dpo_finetune, dpo_config, output="during", hyperparameters__precompute_ref_log_probs=False)
    assert trainers[0].ref_model is None
    assert not trainers[1].ref_model.training
    assert not any(parameter.requires_grad for parameter in trainers[1].ref_model.parameters())
    assert losses(before) == pytest.approx(losses(during), rel=1e-5)
    names = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    for name in names:
        values = [reports["validation"][-1]["metrics"][name] for reports in (before, during)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("learning_rate", [5e-7, 5e-8])
def test_one_step_at_a_dpo_learning_rate_moves_the_weights(train, dpo_config, tiny, learning_rate):
    changes = {f"{ARGS}max_steps": 1, f"{ARGS}learning_rate": learning_rate}
    after = weights_of(train(dpo_finetune, dpo_config, **changes)["checkpoint"][-1])
    before = load_file(tiny / "base" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (before[name] != after[name]).float().mean() > 0.9
    # The reason why the weights are float32: in bf16 nearly all of that step would round away.
    assert (before[name].bfloat16() != after[name].bfloat16()).float().mean() < 0.02


def test_bf16_is_autocast_over_float32_weights(train, trainers, sft_config):
    reports = train(sft_finetune, sft_config, **{f"{ARGS}bf16": True, f"{ARGS}max_steps": 1})
    assert trainers[0].accelerator.mixed_precision == "bf16"
    assert all(weight.dtype == torch.float32 for weight in weights_of(reports["checkpoint"][-1]).values())


def test_a_launcher_with_one_slot_wraps_nothing(train, trainers, sft_config, monkeypatch):
    """DDP would hold the gradients twice, for a process group of one."""
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": 0}
    for name, value in (launched | {"GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    train(sft_finetune, sft_config, **{f"{ARGS}max_steps": 1})
    assert trainers[0].model_wrapped is trainers[0].model


def test_later_callbacks_see_complete_logs(tmp_path):
    logs = {"loss": 1.0, "epoch": 0.5, "eval_runtime": 3.0}
    callback = object.__new__(DetCallback)
    seen = {}
    upstream = DetCallback.__mro__[1]
    original, upstream.on_log = upstream.on_log, lambda self, *args, logs, **kwargs: seen.update(logs) or logs.clear()
    try:
        callback.on_log(None, None, None, logs=logs)
    finally:
        upstream.on_log = original
    assert seen == logs == {"loss": 1.0, "epoch": 0.5, "eval_runtime": 3.0}


def test_a_search_needs_local_experiment(call, write_config, dpo_config, tmp_path):
    grid = {"type": "categorical", "vals": [0.1, 0.2]}
    path = write_config(dpo_config, searcher__name="grid", hyperparameters__dpo_beta=grid)
    status, _, err = call(dpo_finetune.main, "--config", path, "--output", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1)
    assert "is a search of 2 trials; run python local_experiment.py" in err
    assert not Path(tmp_path / "out").exists()


def test_events_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "events.jsonl"
    whole = {"kind": "progress", "progress": 0.5}
    path.write_text(json.dumps(whole) + "\n" + '{"kind": "progr')
    assert read_events(path) == [whole]
    append_event(path, **whole)
    assert read_events(path) == [whole, whole]


@pytest.mark.parametrize("script", [sft_finetune, dpo_finetune])
def test_bad_data_is_reported_before_anything_is_written(call, write_config, request, tmp_path, script):
    config = request.getfixturevalue("sft_config" if script is sft_finetune else "dpo_config")
    key = "dataset" if script is sft_finetune else "datasets"
    value = "/no/such.jsonl" if script is sft_finetune else ["/no/such.jsonl"]
    path = write_config(config, **{f"hyperparameters__{key}": value})
    status, _, err = call(script.main, "--config", path, "--output", tmp_path / "out")
    assert (status, err) == (2, "error: data set /no/such.jsonl: no such file or folder\n")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_not_resumed_with_other_hyperparameters(train, call, write_config, sft_config, tmp_path):
    train(sft_finetune, sft_config, **{f"{ARGS}max_steps": 1})
    path = write_config(sft_config, **{f"{ARGS}max_steps": 2})
    status, _, err = call(sft_finetune.main, "--config", path, "--output", tmp_path / "out")
    assert status == 2
    assert "holds a trial with other hyperparameters" in err


def test_a_fraction_of_an_epoch_ends_with_a_checkpoint(train, sft_config):
    reports = train(sft_finetune, sft_config, **{f"{ARGS}max_steps": None, f"{ARGS}num_train_epochs": 0.3})
    progress = [report["progress"] for report in reports["progress"]]
    assert progress[-1] == max(progress) == 1.0
    assert len(reports["checkpoint"]) == len(reports["validation"]) == 1


def test_in_a_trial_everything_comes_from_the_cluster(call, sft_config, tmp_path, monkeypatch):
    """No arguments, hyperparameters and latest checkpoint from the cluster's info; the contexts are Core API's dummies,
    in the place of those that speak to a master."""
    hparams = json.loads(json.dumps(sft_config["hyperparameters"]))
    hparams["training_args"] |= {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "trainer")}
    searcher = {"name": "adaptive_asha", "metric": "eval_loss", "time_metric": "batches", "max_time": 4}
    trial_info = SimpleNamespace(
        trial_id=7, experiment_id=3, hparams=hparams, _config=sft_config | {"searcher": searcher}
    )
    info = SimpleNamespace(task_type="TRIAL", latest_checkpoint=None, trial=trial_info, slot_ids=[0, 1])
    info.container_addrs = ["127.0.0.1"]
    monkeypatch.setattr(det, "get_cluster_info", lambda: info)
    status, _, err = call(sft_finetune.main)
    assert (status, err.count("\n")) == (2, 1)
    assert "the trial has 2 slots and one process: begin the YAML's entrypoint with python3 -m determined.launch" in err
    info.slot_ids = [0]
    storage, uploaded = tmp_path / "storage", []

    def init(**kwargs):
        assert kwargs == {"distributed": None, "tensorboard_mode": det.core.TensorboardMode.AUTO}
        context = dummy_init(checkpoint_storage=str(storage))
        context.train = det.core.DummyTrainContext(tmp_path / "board")
        original = context.checkpoint.upload
        context.checkpoint.upload = lambda *args, **kwargs: uploaded.append(original(*args, **kwargs))
        return context

    monkeypatch.setattr("trial.context.core.init", init)
    assert call(sft_finetune.main)[0] == 0
    info.latest_checkpoint = uploaded[0]  # as after a restart of the trial: steps 3 and 4 are done again
    assert call(sft_finetune.main)[0] == 0
    at_2, at_4, again_at_4 = (next((storage / ckpt_uuid).glob("checkpoint-*")) for ckpt_uuid in uploaded)
    assert [folder.name for folder in (at_2, at_4, again_at_4)] == ["checkpoint-2", "checkpoint-4", "checkpoint-4"]
    before, after = (load_file(folder / "model.safetensors") for folder in (at_4, again_at_4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((at_4.parent / "metadata.json").read_text()) == {"steps_completed": 4, "trial_id": 7}


def test_a_training_logs_what_the_limits_cut(train, sft_config, caplog):
    train(sft_finetune, sft_config, hyperparameters__max_seq_length=60)
    told = [
        record.message for record in caplog.records if record.name == "dataset_utils" and record.levelname == "WARNING"
    ]
    assert [message.split(":")[0] for message in told] == ["train", "test"]
    assert all(" cut: longer than max_seq_length: " in message for message in told)
    assert all(message.endswith("; raise max_seq_length") for message in told)
