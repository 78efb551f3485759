"""What a training logs of its speed, and where its logs go: events, Core API, the boards of trackers."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import scalars
from processes import run_ranks
from trl import DPOTrainer

import dpo_finetune
import sft_finetune
from metrics.exact_evaluation import ExactSFTTrainer
from trial import throughput
from trial.det_callback import DetCallback
from trial.events import read_events
from trial.throughput import METRICS, peak_of

ARGS = "hyperparameters__training_args__"


@pytest.fixture
def clock(monkeypatch):
    """A clock that only training, evaluating and saving put forward: by 2, 100 and 1000 seconds."""
    now = SimpleNamespace(seconds=0.0)

    def takes(cls, name, seconds):
        original = getattr(cls, name)

        def timed(self, *args, **kwargs):
            now.seconds += seconds
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, timed)

    takes(ExactSFTTrainer, "training_step", 2)
    takes(ExactSFTTrainer, "evaluate", 100)
    takes(ExactSFTTrainer, "_save_checkpoint", 1000)
    takes(DetCallback, "on_log", 10)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_tokens_per_second_are_those_of_training_alone(train, sft_config, clock):
    """A step is of two batches, 4 seconds. Evaluations, checkpoints and the start's first step do not count."""
    changes = {f"{ARGS}max_steps": 7, f"{ARGS}gradient_accumulation_steps": 2, f"{ARGS}logging_steps": 3}
    changes |= {f"{ARGS}{name}_strategy": "steps" for name in ("eval", "save")}
    changes |= {f"{ARGS}eval_steps": 2, f"{ARGS}save_steps": 5}
    logged = {r["steps_completed"]: r["metrics"] for r in train(sft_finetune, sft_config, **changes)["training"]}
    assert list(logged) == [3, 6, 7]
    for begin, end in ((3, 6), (6, 7)):
        tokens = logged[end]["num_tokens"] - logged[begin]["num_tokens"]
        assert logged[end]["tokens_per_second"] == pytest.approx(tokens / (4 * (end - begin)))
    assert 0 < logged[3]["tokens_per_second"] < logged[3]["num_tokens"] / 8  # two of the three steps
    assert not {"mfu", "tokens_per_second_per_device"} & logged[3].keys()  # of one CPU


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_padding_is_no_token(train, trainers, sft_config, clock, strategy):
    changes = {f"{ARGS}max_steps": None, f"{ARGS}num_train_epochs": 2, f"{ARGS}logging_strategy": strategy}
    logged = train(sft_finetune, sft_config, **changes)["training"]
    batches = list(trainers[0].get_train_dataloader())
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert sum(batch["attention_mask"].numel() for batch in batches) > real
    if strategy == "epoch":
        assert logged[-1]["metrics"]["tokens_per_second"] == pytest.approx(real / (2 * len(batches)))
    else:
        counted = sum(report["metrics"].get("tokens_per_second", 0) * 2 for report in logged)
        assert counted == pytest.approx(2 * real - logged[0]["metrics"]["num_tokens"])


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}])
def test_the_share_of_a_gpus_peak_counts_what_is_needed(train, trainers, dpo_config, monkeypatch, lora):
    """A pair's prompt once, the output layer where there is a label; with a peak in place of a GPU's.

    Frozen weights need no gradients of their own; neither the reference, which is the same model without its adapter,
    nor TRL's copy of the adapter counts.
    """
    now, seen = SimpleNamespace(seconds=0.0), []

    def spy(self, model, inputs, *args, original=DPOTrainer.training_step):
        now.seconds += 2
        seen.append((inputs["flat_batch"].positions.numel(), int(inputs["completion_mask"].sum())))
        return original(self, model, inputs, *args)

    monkeypatch.setattr(DPOTrainer, "training_step", spy)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    monkeypatch.setattr(throughput, "peak_of", lambda device: 1e9)
    changes = {f"{ARGS}bf16": True, f"{ARGS}max_steps": 2, "hyperparameters__lora": lora}
    changes["hyperparameters__precompute_ref_log_probs"] = lora is None
    _, second = train(dpo_finetune, dpo_config, **changes)["training"]
    model, (tokens, labelled) = trainers[0].model, seen[1]
    output = model.get_output_embeddings().weight.numel()  # and its embedding is the same weight
    adapters = {name: weight.numel() for name, weight in model.named_parameters() if ".lora_" in name}
    own = sum(count for name, count in adapters.items() if ".default." in name)
    decoder = sum(weight.numel() for weight in model.parameters()) - output - sum(adapters.values())
    assert (own > 0, sum(adapters.values())) == (lora is not None, 2 * own)
    operations = (6 if lora is None else 4) * (decoder * tokens + output * labelled) + 6 * own * tokens
    assert second["metrics"]["mfu"] == pytest.approx(operations / 2 / 1e9)
    assert tokens < second["metrics"]["tokens_per_second"] * 2  # which has each prompt twice


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", None), ("NVIDIA L40", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("a toaster", None),
    ],
)  # fmt: skip
def test_only_a_known_gpu_has_a_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(torch.device("cuda")) == peak
    assert peak_of(torch.device("cpu")) is None


def test_ranks_have_a_speed_each(write_config, sft_config, tmp_path):
    path, log = write_config(sft_config, **{f"{ARGS}report_to": "tensorboard"}), tmp_path / "log"
    assert run_ranks("sft_finetune", "--config", path, "--output", tmp_path / "out", log=log, ranks=2) == 0
    logged = [r["metrics"] for r in read_events(tmp_path / "out" / "events.jsonl") if r["kind"] == "training"]
    assert METRICS[1] not in logged[0]  # a start's first step is not counted
    assert all(each[METRICS[1]] == each[METRICS[0]] / 2 > 0 for each in logged[1:])
    assert len(list((tmp_path / "out").glob("events.out.tfevents.*"))) == 1  # the first rank's


def test_a_local_trials_board_is_in_its_folder_and_goes_on_after_a_stop(
    train, call, write_config, sft_config, tmp_path, monkeypatch
):
    changes = {f"{ARGS}report_to": ["tensorboard"], f"{ARGS}save_strategy": "steps", f"{ARGS}save_steps": 2}
    original = DetCallback.on_step_end

    def dies_in_step_3(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
        patch.setattr(DetCallback, "on_step_end", dies_in_step_3)
        call(sft_finetune.main, "--config", write_config(sft_config, **changes), "--output", tmp_path / "out")
    reports = train(sft_finetune, sft_config, **changes)
    shown = scalars(tmp_path / "out")
    for name in ("loss", "num_tokens"):
        expected = {r["steps_completed"]: r["metrics"][name] for r in reports["training"]}
        assert list(expected) == [1, 2, 3, 4]
        assert shown[f"train/{name}"] == pytest.approx(expected)
    assert shown["train/tokens_per_second"].keys() == {2, 4}  # without each start's first step
    assert list(shown["eval/loss"]) == [4]
    assert not (tmp_path / "out" / "trainer").exists()
