"""Two ranks learn what one does from the same batches."""

import pytest
from adapted import ARGS, LORA, SFT, few_pairs
from processes import run_ranks

from trial.events import read_events


@pytest.mark.parametrize("script", ["sft_finetune", "dpo_finetune"])
def test_two_ranks_learn_what_one_does(write_config, sft_config, dpo_config, tiny, tmp_path, script):
    """SFT with new tokens; DPO whose reference is computed with each step; both with activation checkpointing."""
    config = sft_config if script == "sft_finetune" else dpo_config
    changes = {"hyperparameters__lora": LORA, f"{ARGS}activation_checkpointing": True}
    if script == "sft_finetune":
        changes |= SFT
    else:
        changes |= few_pairs(tiny) | {"hyperparameters__precompute_ref_log_probs": False}
    found = []
    for ranks in (1, 2):
        changes[f"{ARGS}per_device_train_batch_size"] = 4 // ranks
        log, output = tmp_path / f"{ranks}.log", tmp_path / str(ranks)
        path = write_config(config, **changes)
        status = run_ranks(script, "--config", path, "--output", output, log=log, ranks=ranks)
        assert status == 0, log.read_text()
        events = read_events(output / "events.jsonl")
        metrics = [event["metrics"] for event in events if event["kind"] in ("training", "validation")]
        names = ("loss", "grad_norm", "eval_loss", "eval_rewards/margins")
        found.append([[m[name] for name in names if name in m] for m in metrics])
    assert len(found[0]) == 5
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
