"""Evaluations give the same figures whatever the batch size, the number of ranks and the last batch."""

import json

import numpy as np
import pytest
import torch
from processes import run_ranks
from transformers import AutoModelForCausalLM

import dpo_finetune
import sft_finetune
from metrics.evaluations import preference_losses, read_evaluations
from storage.checkpoints import local_checkpoint
from trial.events import read_events

ARGS = "hyperparameters__training_args__"
# SGD: Adam divides gradients by their size, and would make much of the last bits in which ranks differ.
STEPS = {f"{ARGS}optim": "sgd", f"{ARGS}learning_rate": 0.3, f"{ARGS}max_steps": 3, f"{ARGS}max_grad_norm": 0.1}
TIMES = ("runtime", "per_second")
PRECOMPUTED = "hyperparameters__precompute_ref_log_probs"
LOSS = "hyperparameters__dpo_loss"


def evaluation(reports):
    (metrics,) = [report["metrics"] for report in reports if report["kind"] == "validation"]
    return {name: value for name, value in metrics.items() if not name.endswith(TIMES)}


def folder_of(reports):
    return local_checkpoint([report["uuid"] for report in reports if report["kind"] == "checkpoint"][-1], "test")


@pytest.fixture
def run(train, tmp_path):
    """The events of a run whose evaluations have batches of a given size."""

    def events(script, config, batch, **changes):
        train(script, config, f"of-{batch}", **STEPS | {f"{ARGS}per_device_eval_batch_size": batch} | changes)
        return read_events(tmp_path / f"of-{batch}" / "events.jsonl")

    return events


@pytest.fixture
def run_on_two(write_config, tmp_path):
    """The same on two ranks, which share the rows of a step."""

    def events(script, config, batch, fsdp=False, **changes):
        changes = STEPS | {f"{ARGS}per_device_train_batch_size": 2, f"{ARGS}per_device_eval_batch_size": batch} | changes
        if fsdp:
            changes |= {f"{ARGS}fsdp": True}
            changes |= {f"{ARGS}fsdp_config": {"transformer_layer_cls_to_wrap": ["GemmaDecoderLayer"]}}
        output, log = tmp_path / f"two-{batch}-{fsdp}", tmp_path / "log"
        arguments = ("--config", write_config(config, **changes), "--output", output)
        assert run_ranks(script.__name__, *arguments, log=log, ranks=2, fsdp=fsdp) == 0, log.read_text()
        return read_events(output / "events.jsonl")

    return events


def log_probs(model, ids, labels):
    """Of the labels (-100: none) of one row, by the model's own logits in float64."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([ids])).logits[0, :-1]
    of_tokens = logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
    return of_tokens[torch.tensor(labels)[1:] != -100]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {f"{ARGS}loss_type": "dft"},
        {f"{ARGS}label_smoothing_factor": 0.1},
        {f"{ARGS}packing": True, f"{ARGS}packing_strategy": "bfd"},
        {f"{ARGS}packing": True, f"{ARGS}eval_packing": False},
        {f"{ARGS}packing": True, f"{ARGS}packing_strategy": "wrapped", "hyperparameters__max_seq_length": 64},
    ],
    ids=lambda changes: " ".join(f"{name.rpartition('__')[2]}={value}" for name, value in changes.items()) or "nll",
)
def test_sft_metrics_are_means_over_supervised_tokens(run, trainers, sft_config, changes):
    runs = [run(sft_finetune, sft_config, batch, **changes) for batch in (1, 5, 25)]
    evaluations = [evaluation(events) for events in runs]
    assert len(trainers[0].eval_dataset) % 5 and len(trainers[0].eval_dataset) > (5 if "packing" in str(changes) else 10)
    for other in evaluations[1:]:
        assert other == pytest.approx(evaluations[0], abs=1e-6, rel=1e-6)
    if not changes:
        model = AutoModelForCausalLM.from_pretrained(folder_of(runs[0]))
        of_rows = [log_probs(model, row["input_ids"], row["labels"]) for row in trainers[0].eval_dataset]
        assert evaluations[0]["eval_loss"] == pytest.approx(-torch.cat(of_rows).mean().item(), rel=1e-6)
    assert read_evaluations(folder_of(runs[0])).steps == {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {PRECOMPUTED: False, LOSS: ["sigmoid", "sft", "bco_pair"], f"{ARGS}loss_weights": [1.0, 0.5, 0.2]},
        {LOSS: ["ipo", "sigmoid_norm"], f"{ARGS}use_weighting": True},
        {PRECOMPUTED: False, LOSS: "aot", f"{ARGS}ld_alpha": 0.5},
        {LOSS: ["exo_pair", "apo_zero", "aot_unpaired", "sppo_hard"], f"{ARGS}label_smoothing": 0.1},
    ],
    ids=lambda changes: str(changes.get(LOSS, "sigmoid")),
)
def test_dpo_metrics_are_means_over_pairs(run, trainers, dpo_config, changes):
    runs = [run(dpo_finetune, dpo_config, batch, **changes) for batch in (1, 5, 25)]
    evaluations, stored = [evaluation(events) for events in runs], [read_evaluations(folder_of(e)) for e in runs]
    assert len(trainers[0].eval_dataset) == 49
    for other, kept in zip(evaluations[1:], stored[1:], strict=True):
        assert other == pytest.approx(evaluations[0], abs=1e-6, rel=1e-6)
        assert kept.rows == stored[0].rows
        np.testing.assert_allclose(kept.steps[3], stored[0].steps[3], rtol=0, atol=1e-4)
    margins = stored[0].steps[3].margins
    assert evaluations[0]["eval_preference_loss"] == pytest.approx(preference_losses(margins).mean(), rel=1e-12)
    assert evaluations[0]["eval_rewards/margins"] == pytest.approx(0.1 * margins.mean(), rel=1e-9)


def test_the_file_holds_each_pairs_log_ratios(run, trainers, dpo_config, tiny):
    """Against the log-probs of one row at a time, by the models' own logits. (beta is not 0.1 here.)"""
    events = run(dpo_finetune, dpo_config, 5, hyperparameters__dpo_beta=0.4)
    found, pairs = read_evaluations(folder_of(events)), trainers[0].eval_dataset
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (folder_of(events), tiny / "base"))
    for side in ("chosen", "rejected"):
        rows = [(pair["prompt_ids"] + pair[f"{side}_ids"], [-100] * len(pair["prompt_ids"])) for pair in pairs]
        rows = [(ids, none + ids[len(none) :]) for ids, none in rows]
        expected = [(log_probs(policy, *row).sum() - log_probs(reference, *row).sum()).item() for row in rows]
        assert getattr(found.steps[3], side) == pytest.approx(expected, abs=1e-4)
        assert max(map(abs, expected)) > 0.1
        assert getattr(found, f"{side}_tokens") == [len(pair[f"{side}_ids"]) for pair in pairs]
    assert len(set(found.rows)) == 49
    assert found.rows[0] == f"{pairs[0]['source']} row {pairs[0]['row']}"
    losses = np.log1p(np.exp(-0.1 * found.steps[3].margins))
    assert evaluation(events)["eval_preference_loss"] == pytest.approx(losses.mean(), rel=1e-12)
    assert evaluation(events)["eval_loss"] == pytest.approx(np.log1p(np.exp(-0.4 * found.steps[3].margins)).mean())


@pytest.mark.parametrize("script", [sft_finetune, dpo_finetune])
@pytest.mark.parametrize(("batch", "fsdp"), [(25, False), (5, True), (40, False)])
def test_two_ranks_count_each_row_once(run, run_on_two, request, script, batch, fsdp):
    """Of 25 the last batch of one rank is short; of 40 the second rank has none but repeated rows, for SFT's 26."""
    config = request.getfixturevalue("sft_config" if script is sft_finetune else "dpo_config")
    one, two = run(script, config, 1), run_on_two(script, config, batch, fsdp)
    tolerance = 1e-5 if fsdp else 1e-6  # FSDP adds gradients up in another order
    names = evaluation(one).keys() - {"batches", "epochs"}
    assert {n: evaluation(two)[n] for n in names} == pytest.approx(
        {n: evaluation(one)[n] for n in names}, abs=tolerance, rel=tolerance
    )
    if script is dpo_finetune:
        stored = [read_evaluations(folder_of(events)) for events in (one, two)]
        np.testing.assert_allclose(stored[1].steps[3], stored[0].steps[3], rtol=0, atol=1e-4)


@pytest.mark.parametrize("script", [sft_finetune, dpo_finetune])
def test_no_row_is_dropped_from_an_evaluation(run, request, script):
    config = request.getfixturevalue("sft_config" if script is sft_finetune else "dpo_config")
    whole, dropping = run(script, config, 1), run(script, config, 500, **{f"{ARGS}dataloader_drop_last": True})
    assert evaluation(dropping) == pytest.approx(evaluation(whole), abs=1e-6, rel=1e-6)


def test_the_preference_loss_chooses_the_best_model(run, dpo_config):
    changes = {f"{ARGS}eval_strategy": "steps", f"{ARGS}eval_steps": 1, f"{ARGS}metric_for_best_model": "preference_loss"}
    saving = {f"{ARGS}save_strategy": "steps", f"{ARGS}save_steps": 1, "searcher__metric": "eval_preference_loss"}
    run_events = [
        event for event in run_all(run, dpo_config, changes | saving | {"searcher__smaller_is_better": True})
    ]
    saved = [local_checkpoint(event["uuid"], "test") for event in run_events if event["kind"] == "checkpoint"]
    reported = [e["metrics"]["eval_preference_loss"] for e in run_events if e["kind"] == "validation"]
    for count, folder in enumerate(saved, start=1):  # each has the evaluation of its own step too
        assert list(read_evaluations(folder).steps) == list(range(1, count + 1))
    state = json.loads((saved[-1] / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(min(reported), rel=1e-12)


def run_all(run, config, changes):
    return run(dpo_finetune, config, 16, **changes)
