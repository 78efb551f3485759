"""A LoRA trial goes on from its latest whole checkpoint, and ends bit for bit as an undisturbed one.

Preempted at any step, it is tested in trial/test_resume.py; killed, on a cluster, in trial/test_cluster.py.
"""

import pytest
import torch
from adapted import ARGS, LORA, SFT, few_pairs, folder_of, own_weights, uuid_of
from conftest import metrics_by_step
from safetensors.torch import load_file

import dpo_finetune
import sft_finetune
from trial.events import read_events

WEIGHTS = "adapter_model.safetensors"
STEPS = {f"{ARGS}save_strategy": "steps", f"{ARGS}save_steps": 2, f"{ARGS}logging_steps": 3}


def zero_the_end(path):
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))


@pytest.mark.parametrize("damaged", [WEIGHTS, f"stands_on/0/{WEIGHTS}"])
def test_a_damaged_adapter_costs_the_steps_since_the_one_before(
    train, trainers, sft_config, dpo_config, tiny, tmp_path, damaged
):
    """Of SFT with dropout and new tokens; and of DPO, where the copy of SFT's adapter is checked as well."""
    script, config, output = sft_finetune, sft_config, "sft"
    changes = SFT | {"hyperparameters__lora": LORA | {"lora_dropout": 0.3}}
    below = train(script, config, output=output, **changes, **STEPS)
    if damaged != WEIGHTS:
        script, config, output = dpo_finetune, dpo_config, "dpo"
        changes = few_pairs(tiny) | {"hyperparameters__lora": LORA, "hyperparameters__model_ckpt": uuid_of(below)}
        train(script, config, output=output, **changes, **STEPS)
    untouched = read_events(tmp_path / output / "events.jsonl")
    first, last = [event["uuid"] for event in untouched if event["kind"] == "checkpoint"]
    ended = trainers[-1].model
    saved = folder_of({"checkpoint": [{"uuid": last}]})
    before = {name: weight.clone() for name, weight in load_file(saved / WEIGHTS).items()}  # they were the file's own
    zero_the_end(saved / damaged)
    again = train(script, config, output=output, **changes, **STEPS)
    assert uuid_of(again) not in (first, last)
    told = [event["status"] for event in again["status"] if "damaged" in event["status"]]
    assert told == [
        f"checkpoint {last} is damaged ({damaged} has changed since it was saved (SHA-256)): "
        f"resuming from checkpoint {first}, checkpoint-2"
    ]
    assert metrics_by_step(read_events(tmp_path / output / "events.jsonl")) == metrics_by_step(untouched)
    after = load_file(folder_of(again) / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    resumed = trainers[-1].model
    assert resumed is not ended
    for name, weight in ended.named_parameters():  # those of the base and of SFT's adapter as well
        assert torch.equal(weight, resumed.get_parameter(name)), name
    assert all(own.requires_grad for name, own in resumed.named_parameters() if name in own_weights(resumed))
