"""From SFT to DPO, and from DPO to DPO: each starts exactly where the one before ended, whichever of them is LoRA."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from adapted import ARGS, LORA, SFT, assert_close, call_at_start, few_pairs, folder_of, losses, own_weights, uuid_of
from transformers import AutoModelForCausalLM, PreTrainedModel

import dpo_finetune
import sft_finetune
from adapters.stack import AdapterStack
from trial.models import load_model_and_tokenizer

ADAPTER = {
    "hyperparameters__lora": LORA | {"target_modules": "all-linear", "lora_dropout": 0.2},  # which DPO leaves out
    f"{ARGS}learning_rate": 3e-3,
}
# What was trained, by what it started from: the checkpoint and the model at the end of the training.
ENDS: dict[str, SimpleNamespace] = {}


@pytest.fixture
def end_of(train, trainers, sft_config, dpo_config, tiny, request):
    """Train once what a name says, such as "dpo lora on sft lora", and all that it stands on."""

    def end_of(name):
        if name == "base":
            return SimpleNamespace(uuid="none", model=AutoModelForCausalLM.from_pretrained(tiny / "base"))
        if name not in ENDS:
            own, _, before = name.partition(" on ")
            changes = ADAPTER if own.endswith("lora") else {}
            if own.startswith("sft"):
                changes = changes | SFT
            else:
                changes = changes | few_pairs(tiny) | {"hyperparameters__model_ckpt": end_of(before or "base").uuid}
            script, config = (sft_finetune, sft_config) if own.startswith("sft") else (dpo_finetune, dpo_config)
            reports = train(script, config, output=name.replace(" ", "-"), **changes)
            ENDS[name] = SimpleNamespace(uuid=uuid_of(reports), folder=folder_of(reports), model=trainers[-1].model)
        return ENDS[name]

    return end_of


def logps(model, batch):
    """The summed log-probs of a batch's answers, by the model's own logits of the padded batch."""
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    of_tokens = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (of_tokens * batch["completion_mask"][:, 1:]).sum(1)


def logits_of(model):
    ids = torch.arange(2, 62).view(3, 20) * 29 % model.config.vocab_size
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def assert_same_logits(one, *others):
    expected = logits_of(one)
    for other in others:
        torch.testing.assert_close(logits_of(other), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("before", "ways"),
    [("base", [True]), ("sft full", [False]), ("sft lora", [True]), ("dpo lora on sft lora", [True, False])],
)
def test_dpo_starts_where_the_model_before_ended_and_that_is_its_reference(
    train, trainers, dpo_config, tiny, monkeypatch, end_of, before, ways
):
    """With the reference's log-probs from a pass before, or from each step: the same training."""
    before, starts = end_of(before), []

    def look(trainer):
        batch = next(iter(trainer.get_eval_dataloader()))
        policy = trainer._run(trainer.model, batch)["log_probs"].sum(1)
        if trainer.precompute_ref_logps:
            reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        else:
            reference = trainer._run_reference(batch)["log_probs"].sum(1)
        starts.append((batch, policy, reference))
        trainer.first_weights = own_weights(trainer.model)

    call_at_start(monkeypatch, look)
    ended = []
    for precompute in ways:
        changes = ADAPTER | few_pairs(tiny) | {"hyperparameters__precompute_ref_log_probs": precompute}
        # AdamW would step as far by a gradient that is nothing but the last bits of others.
        changes |= {"hyperparameters__model_ckpt": before.uuid, f"{ARGS}adam_epsilon": 1e-4}
        reports = train(dpo_finetune, dpo_config, output=f"dpo-{precompute}", **changes)
        assert losses(reports)[0] == pytest.approx(math.log(2), abs=1e-6)
        assert losses(reports)[3] != pytest.approx(math.log(2), abs=1e-3)
        ended.append(reports)
        batch, policy, reference = starts[-1]
        expected = logps(before.model, batch)
        assert expected.abs().min() > 10
        torch.testing.assert_close(policy.float(), expected, rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(reference.float(), expected, rtol=1e-6, atol=1e-4)
    weights = [own_weights(trainer.model) for trainer in trainers[-len(ways) :]]
    moved = {name: (weight - trainers[-1].first_weights[name]).abs().max() for name, weight in weights[0].items()}
    assert min(moved.values()) > 1e-4
    assert losses(ended[0]) == pytest.approx(losses(ended[-1]), abs=2e-6)
    evaluated = [reports["validation"][-1]["metrics"] for reports in ended]
    for name in ("eval_loss", "eval_preference_loss", "eval_rewards/margins"):
        assert evaluated[0][name] == pytest.approx(evaluated[-1][name], abs=1e-5)
    assert_close(weights[-1], weights[0], 1e-6)


CHAINS = {  # what stands below its own adapter, and on what the lowest one does: a folder or a UUID
    "sft lora": (0, "base"),
    "dpo lora": (0, "base"),
    "dpo lora on sft lora": (1, "base"),
    "dpo lora on dpo lora on sft lora": (2, "base"),
    "dpo lora on sft full": (0, "sft full"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_checkpoint_answers_as_the_model_at_the_end_of_its_training(end_of, tiny, name):
    """Whether its adapters are merged or not."""
    end, (below, base) = end_of(name), CHAINS[name]
    merged, _ = load_model_and_tokenizer(str(end.folder))
    unmerged, _ = load_model_and_tokenizer(str(end.folder), merge=False)
    assert not isinstance(merged, AdapterStack)
    assert isinstance(merged, PreTrainedModel)
    assert isinstance(unmerged, AdapterStack)
    assert not any(weight.requires_grad for weight in unmerged.parameters())
    assert_same_logits(end.model, merged, unmerged)
    files = {path.name for path in end.folder.iterdir()}
    assert "model.safetensors" not in files
    assert "config.json" not in files
    adapters = [end.folder / "stands_on" / str(number) for number in range(below)] + [end.folder]
    assert len(list(end.folder.glob("stands_on/*"))) == below
    lowest = json.loads((adapters[0] / "adapter_config.json").read_text())
    expected = str(tiny / "base") if base == "base" else end_of(base).uuid
    assert (lowest["base_model_name_or_path"], lowest["revision"]) == (expected, None)


def test_full_dpo_starts_from_an_sft_adapter_that_is_merged(train, trainers, dpo_config, tiny, end_of, monkeypatch):
    sft, starts = end_of("sft lora"), []
    call_at_start(monkeypatch, lambda trainer: starts.append(logits_of(trainer.model)))
    changes = few_pairs(tiny) | {"hyperparameters__model_ckpt": sft.uuid}
    reports = train(dpo_finetune, dpo_config, **changes)
    torch.testing.assert_close(starts[0], logits_of(sft.model), rtol=1e-5, atol=1e-5)
    assert losses(reports)[0] == pytest.approx(math.log(2), abs=1e-6)
    model = trainers[-1].model
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in model.parameters())
    assert not any("lora" in name for name in model.state_dict())
    assert_same_logits(model, load_model_and_tokenizer(str(folder_of(reports)))[0])


def test_a_chain_can_be_moved_and_outlives_what_it_stands_on(end_of, tmp_path, monkeypatch):
    dpo = end_of("dpo lora on sft lora")
    folder = shutil.copytree(dpo.folder, tmp_path / "elsewhere")
    monkeypatch.setenv("LOCAL_CHECKPOINT_STORAGE", str(tmp_path / "no-checkpoints"))
    monkeypatch.setattr("storage.checkpoints.HF_HOME", str(tmp_path / "no-downloads"))
    for merge in (True, False):
        assert_same_logits(dpo.model, load_model_and_tokenizer(str(folder), merge=merge)[0])


def test_dropout_is_for_what_learns(train, trainers, sft_config, end_of):
    """SFT on an adapter of SFT's: the lower one drops nothing, though it did when it was trained."""
    changes = SFT | {"hyperparameters__lora": LORA | {"lora_dropout": 0.5}, "hyperparameters__chat_tokens": None}
    changes |= {"hyperparameters__model_name": str(end_of("sft lora").folder)}
    reports = train(sft_finetune, sft_config, **changes)
    (layer, *_) = [layer for layer in trainers[-1].model.modules() if len(getattr(layer, "lora_dropout", [])) == 2]
    kept = {name: type(module).__name__ for name, module in layer.lora_dropout.items()}
    assert kept == {"below_0": "Identity", "default": "Dropout"}
    assert_same_logits(trainers[-1].model, load_model_and_tokenizer(str(folder_of(reports)))[0])


def test_trials_that_differ_in_their_own_adapter_share_the_reference(train, dpo_config, tiny, tmp_path, end_of):
    """And it is that of the model they start from: another start has another."""
    other = {"lora": LORA | {"r": 8, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True}}
    other |= {"dpo_beta": 0.5, "training_args__learning_rate": 1e-4, "training_args__seed": 7}
    told = []
    for number, (start, changes) in enumerate([("sft lora", {"lora": LORA}), ("sft lora", other), ("sft full", other)]):
        if number:  # trials of local_experiment.py have this folder in common
            (tmp_path / str(number)).mkdir()
            (tmp_path / str(number) / "cache").symlink_to(tmp_path / "0" / "cache")
        changes = {"model_ckpt": end_of(start).uuid, "training_args__max_steps": 1, **changes}
        changes = few_pairs(tiny) | {f"hyperparameters__{name}": value for name, value in changes.items()}
        reports = train(dpo_finetune, dpo_config, output=str(number), **changes)
        statuses = [report["status"] for report in reports["status"]]
        told += [status.split()[2] for status in statuses if status.startswith("reference log-probs")]
        assert losses(reports)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert told == ["computed", "reused", "computed"]
