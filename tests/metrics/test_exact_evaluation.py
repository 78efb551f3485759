"""Evaluations give the same figures whatever the batch size, the number of ranks and the last batch."""

import json

import numpy as np
import pytest
import torch
from processes import run_ranks
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_pt_utils import LabelSmoother

import dpo_finetune
import sft_finetune
from metrics.evaluations import preference_losses, read_evaluations
from storage.checkpoints import local_checkpoint
from trial.det_callback import DetCallback
from trial.events import read_events

ARGS = "hyperparameters__training_args__"
# SGD: Adam divides gradients by their size, and would make much of the last bits in which ranks differ.
STEPS = {f"{ARGS}optim": "sgd", f"{ARGS}learning_rate": 0.3, f"{ARGS}max_steps": 3, f"{ARGS}max_grad_norm": 0.1}
TIMES = ("runtime", "per_second")
PRECOMPUTED = "hyperparameters__precompute_ref_log_probs"


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
        sizes = {f"{ARGS}per_device_train_batch_size": 2, f"{ARGS}per_device_eval_batch_size": batch}
        changes = STEPS | sizes | changes
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


def evaluate(trainer, batch, **settings):
    """What a trained trainer reports with batches of another size, and other settings."""
    trainer.remove_callback(DetCallback)
    trainer.args.per_device_eval_batch_size = batch
    for name, value in settings.items():
        setattr(trainer if hasattr(trainer, name) else trainer.args, name, value)
    return {name: value for name, value in trainer.evaluate().items() if not name.endswith(TIMES)}


def assert_same(trainer, batches=(5, 25), within=1e-6, **settings):
    """Returns what each of the evaluations reports."""
    alone = evaluate(trainer, 1, **settings)
    for batch in batches:
        assert evaluate(trainer, batch) == pytest.approx(alone, abs=within, rel=within)
    assert evaluate(trainer, 9, dataloader_drop_last=True) == pytest.approx(alone, abs=within, rel=within)
    trainer.args.dataloader_drop_last = False
    return alone


def test_sft_metrics_are_means_over_supervised_tokens(run, trainers, sft_config):
    events = run(sft_finetune, sft_config, 16)
    (trainer,) = trainers
    assert [len(trainer.eval_dataset) % batch > 0 for batch in (9, 25)] == [True] * 2
    found = assert_same(trainer)
    model = AutoModelForCausalLM.from_pretrained(folder_of(events))
    of_rows = [log_probs(model, row["input_ids"], row["labels"]) for row in trainer.eval_dataset]
    assert found["eval_loss"] == pytest.approx(-torch.cat(of_rows).mean().item(), rel=1e-6)
    assert evaluation(events)["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-6)
    assert assert_same(trainer, loss_type="dft")["eval_loss"] < found["eval_loss"] / 10
    assert assert_same(trainer, loss_type="nll", label_smoother=LabelSmoother(0.5)) != found
    assert read_evaluations(folder_of(events)).steps == {}


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_are_weighted_by_their_supervised_tokens(run, trainers, sft_config, strategy):
    packing = {f"{ARGS}packing": True, f"{ARGS}packing_strategy": strategy, "hyperparameters__max_seq_length": 100}
    run(sft_finetune, sft_config, 16, **packing)
    assert len(trainers[0].eval_dataset) > 2
    assert_same(trainers[0], (2, 3))


@pytest.mark.parametrize("precomputed", [True, False])
def test_dpo_metrics_are_means_over_pairs(run, trainers, dpo_config, precomputed):
    events = run(dpo_finetune, dpo_config, 16, **{PRECOMPUTED: precomputed})
    (trainer,) = trainers
    assert len(trainer.eval_dataset) == 91  # not a multiple of 5, 9 or 25
    found, margins = assert_same(trainer), trainer.evaluations.steps[3].margins
    np.testing.assert_allclose(read_evaluations(folder_of(events)).steps[3].margins, margins, atol=1e-5)
    assert found["eval_preference_loss"] == pytest.approx(preference_losses(margins).mean(), rel=1e-6)
    assert found["eval_rewards/margins"] == pytest.approx(0.1 * margins.mean(), rel=1e-6)
    assert found["eval_rewards/accuracies"] == pytest.approx((margins > 0).mean(), rel=1e-12)
    assert found["eval_loss"] == pytest.approx(found["eval_preference_loss"], rel=1e-6)  # as beta is 0.1
    for losses in (["sigmoid", "sft", "bco_pair"], ["ipo", "sigmoid_norm"], ["aot"], ["exo_pair", "aot_unpaired"]):
        weights = [1.0, 0.5, 0.2][: len(losses)]
        assert_same(trainer, (25,), loss_types=losses, loss_weights=weights, label_smoothing=0.1)
    if not precomputed:
        trainer.ld_alpha = 0.5
    assert_same(trainer, (25,), loss_types=["sigmoid"], loss_weights=[1.0], f_divergence_type="js_divergence")
    # Its log-probs are summed in float32.
    assert_same(trainer, (25,), 1e-4, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5)
    assert isinstance(trainer.ref_model, PreTrainedModel) != precomputed


def test_reference_log_probs_of_other_batches_change_no_figure(run, dpo_config):
    of_1, of_25 = (evaluation(run(dpo_finetune, dpo_config, batch)) for batch in (1, 25))
    assert of_25 == pytest.approx(of_1, abs=1e-6, rel=1e-6)


def test_the_file_holds_each_pairs_log_ratios(run, trainers, dpo_config, tiny):
    """Against the log-probs of one row at a time, by the models' own logits. (beta is not 0.1 here.)"""
    events = run(dpo_finetune, dpo_config, 5, hyperparameters__dpo_beta=0.4)
    found, pairs = read_evaluations(folder_of(events)), trainers[0].eval_dataset
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (folder_of(events), tiny / "base"))
    for side in ("chosen", "rejected"):
        rows = [(pair["prompt_ids"] + pair[f"{side}_ids"], [-100] * len(pair["prompt_ids"])) for pair in pairs]
        rows = [(ids, none + ids[len(none) :]) for ids, none in rows]
        expected = [(log_probs(policy, *row).sum() - log_probs(reference, *row).sum()).item() for row in rows]
        assert getattr(found.steps[3], side) == pytest.approx(expected, rel=1e-5, abs=3e-4)
        assert max(map(abs, expected)) > 0.1
        assert getattr(found, f"{side}_tokens") == [len(pair[f"{side}_ids"]) for pair in pairs]
    assert len(set(found.rows)) == 91
    assert found.rows[0] == f"{pairs[0]['source']} row {pairs[0]['row']}"
    losses = np.log1p(np.exp(-0.1 * found.steps[3].margins))
    assert evaluation(events)["eval_preference_loss"] == pytest.approx(losses.mean(), rel=1e-12)
    assert evaluation(events)["eval_loss"] == pytest.approx(np.log1p(np.exp(-0.4 * found.steps[3].margins)).mean())


RANKS = [(sft_finetune, 40, False), (sft_finetune, 5, True), (dpo_finetune, 45, False), (dpo_finetune, 5, True)]


@pytest.mark.parametrize(("script", "batch", "fsdp"), RANKS)
def test_two_ranks_count_each_row_once(run, run_on_two, request, script, batch, fsdp):
    """The second rank has none of SFT's rows, which are in one batch, and none of the last of 91 pairs."""
    config = request.getfixturevalue("sft_config" if script is sft_finetune else "dpo_config")
    one, two = run(script, config, 16), run_on_two(script, config, batch, fsdp)
    tolerance = 1e-5 if fsdp else 1e-6  # FSDP adds gradients up in another order
    names = evaluation(one).keys() - {"batches", "epochs"}
    assert {n: evaluation(two)[n] for n in names} == pytest.approx(
        {n: evaluation(one)[n] for n in names}, abs=tolerance, rel=tolerance
    )
    if script is dpo_finetune:
        stored = [read_evaluations(folder_of(events)) for events in (one, two)]
        np.testing.assert_allclose(stored[1].steps[3], stored[0].steps[3], rtol=0, atol=1e-4)


def test_the_preference_loss_chooses_the_best_model(run, dpo_config):
    changes = {
        f"{ARGS}eval_strategy": "steps",
        f"{ARGS}eval_steps": 1,
        f"{ARGS}metric_for_best_model": "preference_loss",
    }
    saving = {f"{ARGS}save_strategy": "steps", f"{ARGS}save_steps": 1, "searcher__metric": "eval_preference_loss"}
    events = run(dpo_finetune, dpo_config, 16, **changes, **saving, searcher__smaller_is_better=True)
    saved = [local_checkpoint(event["uuid"], "test") for event in events if event["kind"] == "checkpoint"]
    reported = [e["metrics"]["eval_preference_loss"] for e in events if e["kind"] == "validation"]
    for count, folder in enumerate(saved, start=1):  # each has the evaluation of its own step too
        assert list(read_evaluations(folder).steps) == list(range(1, count + 1))
    state = json.loads((saved[-1] / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(min(reported), rel=1e-12)
