"""The metrics: checked against TRL's own, and against sums done by hand."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl.trainer.utils import add_fused_lm_head

import dpo_finetune
from chat_format import answer_spans, encode, set_chat_format
from comparison.files import METRICS
from comparison.generation import Answer
from comparison.preference_metrics import (
    BATCH_TOKENS,
    PairScore,
    answer_metrics,
    batch_pairs,
    distinct_ngrams,
    preference_metrics,
    prompted_alike,
    score_batch,
    tokenize_pairs,
)
from config.hyperparameters import DataSource
from dataset_utils import load_dpo_dataset
from errors import UserError
from trial.models import load_model_and_tokenizer

PROMPT = [{"role": "user", "content": "How do I boil an egg?"}]


def score(model, tokenizer, pairs, batch_size=8):
    add_fused_lm_head(model)
    tokenized = tokenize_pairs(pairs, tokenizer, 4096)
    scores = {}
    for batch in batch_pairs(tokenized, batch_size):
        found = score_batch(model.eval(), tokenizer, [tokenized[index] for index in batch])
        scores.update(zip(batch, found, strict=True))
    return [scores[index] for index in range(len(pairs))]


def test_log_probs_and_rewards_are_the_trainers(train, trainers, dpo_config, tiny):
    """Every pair's reference log-probs, and after some training the accuracy and margin that the trial reported."""
    changes = {"per_device_eval_batch_size": 99, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps"}
    changes = {f"hyperparameters__training_args__{key}": value for key, value in changes.items()}
    reports = train(
        dpo_finetune,
        dpo_config,
        hyperparameters__max_length=4096,
        hyperparameters__training_args__save_steps=4,
        **changes,
    )
    pairs = load_dpo_dataset([DataSource(source) for source in dpo_config["hyperparameters"]["datasets"]], 42)["test"]
    base, tokenizer = load_model_and_tokenizer(str(tiny / "base"))
    set_chat_format(base, tokenizer)
    reference = score(base, tokenizer, pairs)
    held_out = trainers[0].eval_dataset
    assert len(held_out) == len(pairs) > 20
    for side in ("chosen", "rejected"):
        ours = [getattr(scored, side) for scored in reference]
        assert ours == pytest.approx(held_out[f"ref_{side}_logps"][:], rel=1e-6, abs=1e-4)

    policy = score(trainers[0].model, tokenizer, pairs)
    assert prompted_alike(policy, reference)
    characters = np.array([[len(pair["chosen"]), len(pair["rejected"])] for pair in pairs])
    figures = preference_metrics(policy, reference, 0.1, characters)
    (reported,) = (report["metrics"] for report in reports["validation"])
    assert figures["reward_margin"].value == pytest.approx(reported["eval_rewards/margins"], abs=1e-4)
    assert figures["reward_accuracy"].value == pytest.approx(reported["eval_rewards/accuracies"], abs=1e-6)
    assert abs(figures["reward_margin"].value) > 1e-3  # or this would hold of any two models


@pytest.mark.parametrize("template", [True, False])
def test_log_probs_are_those_of_the_logits(model, tokenizer, tiny, template):
    """With a chat template and, as a base model is asked, without; the batch makes no difference."""
    if not template:
        tokenizer.chat_template = None
    pairs = load_dpo_dataset([DataSource(str(tiny / "questions"))], 42)["test"].select(range(5))
    for pair, scored, alone in zip(
        pairs, score(model, tokenizer, pairs), score(model, tokenizer, pairs, batch_size=1), strict=True
    ):
        prompt, chosen = encode(tokenizer, pair["prompt"], pair["chosen"])
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(chosen)), chosen]
        assert scored.chosen == pytest.approx(expected.sum().item(), abs=1e-3)
        assert scored.chosen_tokens == len(chosen)
        text = len(tokenizer(pair["chosen"], add_special_tokens=False)["input_ids"])
        begin = 0 if template else 1
        assert scored.text_tokens == text < len(chosen)
        assert scored.text == pytest.approx(expected[begin : begin + text].sum().item(), abs=1e-3)
        assert scored == pytest.approx(alone, abs=1e-3)


def test_stops_do_not_count_as_text(model, tokenizer):
    """Perplexity is of the answer's words: how the stops are spelled differs between the models compared."""

    def spoken(answer):
        completion = encode(tokenizer, PROMPT, answer)[1]
        ((begin, end),) = answer_spans(tokenizer, [completion])
        return tokenizer.decode(completion[begin:end]), len(completion) - (end - begin)

    assert spoken("Put it in.")[0] == "Put it in."
    assert spoken("a")[0] == "a"
    assert spoken("")[0] == ""
    assert spoken("Put it in.")[1] > 2  # <|im_end|> is spelled out
    completion = encode(tokenizer, PROMPT, "Put it in.")[1]
    assert answer_spans(tokenizer, [completion[:2]]) == [(0, 2)]  # one that a limit has cut has no stops
    set_chat_format(model, tokenizer, ["<|im_start|>", "<|im_end|>"])
    assert spoken("Put it in.") == ("Put it in.", 2)
    tokenizer.chat_template = None
    prompt, completion = encode(tokenizer, PROMPT, "Put it in.")
    assert tokenizer.decode(prompt + completion) == "<bos>How do I boil an egg?\nPut it in.<eos>"
    assert spoken("Put it in.") == ("Put it in.", 2)  # the line break before it and EOS after it


PICKY = (  # as gemma-2b-it's: no system turn, no answer to begin with, and nothing empty
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if not m['content'] %}{{ raise_exception('empty') }}{% endif %}"
    "<start>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def test_another_models_own_chat_template_works(model, tokenizer):
    tokenizer.chat_template = PICKY
    turns = [{"role": "user", "content": "first " * 60}, {"role": "assistant", "content": "Yes. " * 60}, *PROMPT]
    rows = {"prompt": [turns], "chosen": ["Put it in."], "rejected": ["No."], "source": ["s"], "row": [1]}
    pairs = Dataset.from_dict(rows)
    (found,) = score(model, tokenizer, pairs)
    assert found.text_tokens == len(tokenizer("Put it in.", add_special_tokens=False)["input_ids"])
    short = tokenize_pairs(pairs, tokenizer, 120)[0]  # cut at a user's turn
    assert tokenizer.decode(short["prompt_ids"]).startswith("<bos><start>user\nHow do I boil")
    with pytest.raises(UserError, match=r"the chat template of .*: roles must alternate"):
        encode(tokenizer, turns[1:])


def test_pairs_that_do_not_fit_are_marked(tokenizer, tiny):
    pairs = load_dpo_dataset([DataSource(str(tiny / "conversations"))], 42)["test"]
    everything, narrow, nothing = (tokenize_pairs(pairs, tokenizer, limit)["fits"][:] for limit in (4096, 80, 10))
    assert all(everything)
    assert all(narrow)  # cut, and still there
    assert not any(nothing)
    assert batch_pairs(tokenize_pairs(pairs, tokenizer, 10), 8) == []


def test_batches_of_pairs_are_bounded_in_pairs_and_tokens(tokenizer, tiny):
    pairs = load_dpo_dataset([DataSource(str(tiny / "questions"))], 42)["test"]
    tokenized = tokenize_pairs(pairs, tokenizer, 4096)
    found = batch_pairs(tokenized, 4)
    assert sorted(index for batch in found for index in batch) == list(range(len(pairs)))
    assert {len(batch) for batch in found} <= {4, len(pairs) % 4}
    lengths = tokenized["total_length"][:]
    sizes = [2 * len(batch) * max(lengths[index] for index in batch) for batch in batch_pairs(tokenized, 999)]
    assert max(sizes) <= BATCH_TOKENS
    assert lengths[found[0][0]] == max(lengths)


def test_preference_metrics_equal_sums_by_hand():
    policy = [PairScore(-10, -12, 5, 4, -8, 4), PairScore(-20, -15, 10, 5, -16, 8), PairScore(-7, -7, 7, 7, -6, 6)]
    reference = [PairScore(-11, -12, 5, 4, -8, 4), PairScore(-24, -16, 10, 5, -16, 8), PairScore(-7, -8, 7, 7, -6, 6)]
    characters = np.array([[75, 100], [74, 100], [30, 30]])
    figures = {key: value.value for key, value in preference_metrics(policy, reference, 0.5, characters).items()}
    assert figures == pytest.approx(
        {
            "preference_accuracy": 1 / 3,  # the last is a draw, which agrees with nobody
            "preference_accuracy_by_token": 2 / 3,  # -2 > -3, -2 > -3, -1 = -1
            "preference_accuracy_like_length": 1 / 2,  # the first and the last
            "prefers_longer": 0,  # of the first two
            "reward_accuracy": 2 / 3,
            "reward_margin": 0.5 * (1 + 3 - 1) / 3,
            "perplexity": math.exp(30 / 18),
        }
    )
    alone = preference_metrics(policy, None, 0.5, characters)
    assert alone["reward_accuracy"] is alone["reward_margin"] is None


def test_answer_metrics_equal_sums_by_hand():
    answers = [Answer("a b c a b c a b c", 9, True), Answer("a b", 2, False), Answer("one two three four", 4, True)]
    figures = {key: value.value for key, value in answer_metrics(answers).items()}
    assert figures == pytest.approx({"answer_tokens": 5, "stopped": 2 / 3, "distinct_ngrams": (3 / 7 + 1) / 2})
    assert [distinct_ngrams(text) for text in ("a a a a", "a b", "")] == [0.5, None, None]
    assert answer_metrics([Answer("", 0, True)])["distinct_ngrams"] is None
    one = [PairScore(-1, -2, 1, 1, -1, 1)]
    assert set(figures) | set(preference_metrics(one, None, 1, np.array([[1, 1]]))) == set(METRICS)
