"""Answers: greedy and sampled, alone and in batches, and where they end."""

import pytest
import torch

from chat_format import encode, read_answer, set_chat_format
from comparison.generation import (
    Answer,
    answer_batch,
    batch_by_length,
    batch_seed,
    context_length,
    run_in_halves,
    shorten_prompt,
)
from comparison.options import Sampling
from config.hyperparameters import DataSource
from dataset_utils import load_dpo_dataset
from errors import UserError

GREEDY = Sampling(max_new_tokens=12)
SAMPLED = Sampling(max_new_tokens=12, temperature=1.5, top_p=0.9)


@pytest.fixture
def prompts(tiny, tokenizer):
    rows = load_dpo_dataset([DataSource(str(tiny / "conversations"))], 42)["test"]["prompt"][:6]
    return [encode(tokenizer, prompt)[0] for prompt in rows]


def test_greedy_answers_do_not_depend_on_the_batch(model, tokenizer, prompts):
    assert len({len(prompt) for prompt in prompts}) > 1  # or nothing would be padded
    together = answer_batch(model, tokenizer, prompts, GREEDY)
    assert together == [answer for prompt in prompts for answer in answer_batch(model, tokenizer, [prompt], GREEDY)]
    alone = model.generate(torch.tensor([prompts[0]]), max_new_tokens=12, do_sample=False)[0][len(prompts[0]) :]
    assert together[0].text == tokenizer.decode(alone, skip_special_tokens=True).strip()


def test_a_models_own_generation_config_has_no_effect(model, tokenizer, prompts):
    """Or models would be compared under different rules."""
    expected = answer_batch(model, tokenizer, prompts, GREEDY)
    torch.manual_seed(0)
    sampled = answer_batch(model, tokenizer, prompts, SAMPLED)
    model.generation_config.update(do_sample=True, temperature=9.0, top_k=2, top_p=0.1, repetition_penalty=5.0)
    model.generation_config.update(no_repeat_ngram_size=1, num_beams=4, max_time=1e-6, min_new_tokens=9, min_p=0.5)
    assert answer_batch(model, tokenizer, prompts, GREEDY) == expected
    torch.manual_seed(0)
    assert answer_batch(model, tokenizer, prompts, SAMPLED) == sampled


def test_sampling_repeats_with_the_same_seed(model, tokenizer, prompts):
    def sample(seed):
        torch.manual_seed(batch_seed(seed, 0))
        return answer_batch(model, tokenizer, prompts, SAMPLED)

    assert sample(0) == sample(0) != sample(1)
    assert sample(0) != answer_batch(model, tokenizer, prompts, GREEDY)
    assert all(answer.tokens == 12 for answer in sample(0) if not answer.stopped)
    assert len({batch_seed(seed, number) for seed in range(3) for number in range(3)}) == 9


def test_an_answer_ends_at_a_stop_or_at_the_limit(model, tokenizer, prompts):
    def sample():
        ids = []
        torch.manual_seed(0)
        (answer,) = answer_batch(model, tokenizer, prompts[:1], SAMPLED, ids.extend)
        return answer, ids

    cut, ids = sample()
    assert not cut.stopped
    assert len(ids) == 12
    later = next(n for n in range(3, 12) if ids[n] not in ids[:n])
    model.generation_config.eos_token_id = ids[later]  # one of the model's own, beside the tokenizer's
    short, fewer = sample()
    assert short.stopped
    assert fewer == ids[: later + 1]
    assert short.tokens == later  # the stop is none of the answer, and not in its text
    assert short.text == tokenizer.decode(ids[:later], skip_special_tokens=True).strip()


@pytest.mark.parametrize("added", [True, False])
def test_stops_and_limits_are_distinguished_however_stops_are_tokenized(model, tokenizer, added):
    set_chat_format(model, tokenizer, ["<|im_start|>", "<|im_end|>"] if added else None)
    _, completion = encode(tokenizer, [{"role": "user", "content": "Hi"}], "Hello there.")
    text = len(tokenizer("Hello there.", add_special_tokens=False)["input_ids"])
    assert (len(completion) == text + 2) == added
    stops = [tokenizer.eos_token_id, *([completion[-2]] if added else [])]
    assert read_answer(tokenizer, completion, stops) == ("Hello there.", text, True)
    # `generate` stops at the spelled out marker, before EOS.
    assert read_answer(tokenizer, completion[:-1], stops) == ("Hello there.", text, True)
    assert not read_answer(tokenizer, completion[:-2], stops)[2]


def test_a_prompt_too_long_for_the_context_loses_its_beginning(model, tokenizer):
    long = [{"role": "user", "content": "first " * 900}, {"role": "assistant", "content": "Yes."}]
    long += [{"role": "user", "content": "second " * 90}]
    whole = encode(tokenizer, long)[0]
    assert context_length(model) == 1024 < len(whole) + 100
    ids, cut = shorten_prompt(model, tokenizer, long, 100)
    assert cut
    assert len(ids) <= 924
    assert tokenizer.decode(ids).endswith(tokenizer.decode(whole[-300:]))
    assert shorten_prompt(model, tokenizer, long[2:], 100) == (encode(tokenizer, long[2:])[0], False)
    with pytest.raises(UserError, match="--max-new-tokens 1024 leaves a prompt no room in a context of 1024 tokens"):
        shorten_prompt(model, tokenizer, long, 1024)
    answer_batch(model, tokenizer, [ids], GREEDY)


def test_each_step_reports_its_new_tokens(model, tokenizer, prompts):
    steps = []
    answer_batch(model, tokenizer, prompts, GREEDY, steps.append)
    assert [len(step) for step in steps] == [len(prompts)] * 12


def test_batches_begin_with_the_longest():
    found = batch_by_length((3, 9, 1, 9, 5), 2)
    assert found == [[1, 3], [4, 0], [2]]


def test_a_batch_that_does_not_fit_in_memory_is_halved():
    tried = []

    def run(items):
        tried.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return [Answer(str(item), 1, True) for item in items]

    assert [answer.text for answer in run_in_halves(run, [1, 2, 3, 4, 5])] == ["1", "2", "3", "4", "5"]
    assert tried == [5, 2, 3, 1, 2]


def test_only_running_out_of_memory_alone_is_a_user_error():
    def fail(items):
        raise RuntimeError(message)

    message = "CUDA out of memory.\nTried to allocate 2 GiB"
    with pytest.raises(UserError, match="out of memory with a batch of one: lower --max-length or"):
        run_in_halves(fail, [1, 2])
    message = "sizes do not match"
    with pytest.raises(RuntimeError, match="sizes do not match"):
        run_in_halves(fail, [1, 2])
