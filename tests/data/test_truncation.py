"""Truncation: what limits cut and drop, how it is counted and described, and how a prompt is cut."""

import re

import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets
from rows import load_dpo_dataset, pairs, says, write

import dataset_utils
from chat_format import IM_END, IM_START, add_chat_tokens, encode
from config.hyperparameters import DataSource
from data.truncation import Truncation, count_truncations, cut_prompt, describe_truncations, rows_by_truncation
from dataset_utils import tokenize_dpo_dataset
from errors import UserError


def test_sft_rows_that_lose_something_are_counted(tmp_path, tokenizer):
    long, fine = "a word " * 60, "word"
    rows = [{"prompt": f"{n}", "text": fine} for n in range(30)]
    rows[3] = {"prompt": "q", "text": long}
    rows[5] = {"prompt": long, "text": fine}
    rows[7] = {"prompt": "q", "text": " "}
    source = DataSource(write(tmp_path / "d.jsonl", rows))
    dataset = DatasetDict(train=dataset_utils.load_sft_dataset([source], seed=1)["train"])
    dataset["train"] = concatenate_datasets(list(dataset_utils.load_sft_dataset([source], seed=1).values()))

    def tokenize(**options):
        return dataset_utils.tokenize_sft_dataset(dataset, tokenizer, max_length=100, **options)["train"]

    masked = tokenize(on_completions_only=True)
    assert len(masked) == 29
    assert max(map(len, masked["input_ids"])) == 100
    assert [(c.truncation, c.rows, c.example.split(" row ")[1]) for c in count_truncations(masked)] == [
        (Truncation.NO_ANSWER, 1, "6"),
        (Truncation.SEQUENCE_END, 1, "4"),
        (Truncation.EMPTY_ANSWER, 1, "8"),
    ]
    assert [re.sub(r"\S+d.jsonl", "d", line) for line in describe_truncations("train", masked)] == [
        "train: 1 row (3.3%) dropped: no answer begins within max_seq_length (the first: d row 6)",
        f"train: 1 row (3.3%) cut: {Truncation.SEQUENCE_END.meaning} (the first: d row 4)",
        "train: 1 row (3.3%): answer without text: the model learns from it only to stop (the first: d row 8)",
    ]
    whole = tokenize(on_completions_only=False)
    assert len(whole) == 30
    assert [c[:2] for c in count_truncations(whole)] == [(Truncation.SEQUENCE_END, 2), (Truncation.EMPTY_ANSWER, 1)]
    every = tokenize(on_completions_only=True, every_row=True)
    assert len(every) == 30
    assert count_truncations(every) == count_truncations(masked)
    found = rows_by_truncation(every)
    assert {what: [every[index]["row"] for index in indices] for what, indices in found.items()} == {
        Truncation.SEQUENCE_END: [4],
        Truncation.NO_ANSWER: [6],
        Truncation.EMPTY_ANSWER: [8],
    }
    unlimited = dataset_utils.tokenize_sft_dataset(dataset, tokenizer, on_completions_only=True, max_length=None)
    assert [count.truncation for count in count_truncations(unlimited["train"])] == [Truncation.EMPTY_ANSWER]


def test_the_first_truncation_may_be_far_down(tokenizer):
    """`datasets` writes a thousand rows at a time, and fixes the columns' types with the first of them."""
    messages = [{"role": "user", "content": "q"}, says("a")]
    rows = [{"messages": messages, "source": "s", "row": number} for number in range(1, 1102)]
    rows[1050]["messages"] = [messages[0], says("")]
    dataset = DatasetDict(train=Dataset.from_list(rows))
    tokenized = dataset_utils.tokenize_sft_dataset(dataset, tokenizer, on_completions_only=True, max_length=64)
    assert [(count.rows, count.example) for count in count_truncations(tokenized["train"])] == [(1, "s row 1051")]


def test_limits_of_a_pair_cut_prompt_and_answers(tmp_path, tokenizer):
    answers = {"chosen": "one two three four five six seven", "rejected": "no"}
    row = {"prompt": "a question of some words", **answers}
    dataset = load_dpo_dataset([write(tmp_path / "d.jsonl", [row, {**row, "prompt": "held out"}])], seed=4)
    prompt, chosen = encode(tokenizer, [{"role": "user", "content": row["prompt"]}], row["chosen"])
    _, rejected = encode(tokenizer, [{"role": "user", "content": row["prompt"]}], row["rejected"])

    def tokenize(**limits):
        return tokenize_dpo_dataset(dataset, tokenizer, **{"max_length": None, **limits})["train"]

    def first(**limits):
        row = tokenize(**limits)[0]
        return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]

    def truncations(**limits):
        return [count.truncation for count in count_truncations(tokenize(**limits))]

    assert (first(), truncations()) == ((prompt, chosen, rejected), [])
    short = encode(tokenizer, cut_prompt(tokenizer, dataset["train"][0]["prompt"], len(prompt) - 2))[0]
    assert first(max_prompt_length=len(prompt) - 2) == (short, chosen, rejected)
    assert truncations(max_prompt_length=len(prompt) - 2) == [Truncation.PROMPT_START]
    assert first(max_target_length=4) == (prompt, chosen[:4], rejected[:4])
    assert truncations(max_target_length=4) == [Truncation.ANSWER_END]
    assert first(max_length=len(prompt) + 3) == (prompt, chosen[:3], rejected[:3])
    assert truncations(max_length=len(prompt) + 3) == [Truncation.PAIR_END]
    assert truncations(max_length=len(prompt) + len(chosen), max_target_length=len(chosen)) == []
    with pytest.raises(UserError, match="max_length is too small: no train row is left"):
        first(max_length=len(prompt))
    with pytest.raises(UserError, match="max_prompt_length is too small: no train row is left"):
        first(max_prompt_length=5)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_empty_answer_of_a_pair_is_counted(tmp_path, tokenizer, side):
    dataset = load_dpo_dataset([write(tmp_path / "d.jsonl", [{**pair, side: " "} for pair in pairs(5)])], seed=1)
    tokenized = tokenize_dpo_dataset(dataset, tokenizer, max_length=None)["train"]
    assert [count.truncation for count in count_truncations(tokenized)] == [Truncation.EMPTY_ANSWER]


@pytest.mark.parametrize(("rejected", "limit"), [("good answer", None), ("good enough", 1)])
def test_pairs_whose_answers_are_the_same_are_counted(tmp_path, tokenizer, rejected, limit):
    rows = [{"prompt": f"{n}", "chosen": "good answer", "rejected": rejected} for n in range(5)]
    dataset = load_dpo_dataset([write(tmp_path / "d.jsonl", rows)], seed=1)
    tokenized = tokenize_dpo_dataset(dataset, tokenizer, max_length=None, max_target_length=limit)["train"]
    assert count_truncations(tokenized)[-1][:2] == (Truncation.SAME_ANSWERS, len(dataset["train"]))


def test_pairs_without_room_are_dropped_and_the_limit_to_raise_is_named(tmp_path, tokenizer):
    rows = [*pairs(8), *({**row, "prompt": f"far too long {n} " * 9} for n, row in enumerate(pairs(8)))]
    dataset = load_dpo_dataset([write(tmp_path / "d.jsonl", rows)], seed=1)
    limit = len(encode(tokenizer, [{"role": "user", "content": "0"}])[0]) + 4
    tokenized = tokenize_dpo_dataset(dataset, tokenizer, max_length=limit)
    assert len(tokenized["train"]) + len(tokenized["test"]) == 8
    counts = [count for part in tokenized.values() for count in count_truncations(part)]
    assert sum(count.rows for count in counts if count.truncation is Truncation.NO_ROOM) == 8
    assert next(describe_truncations("train", tokenized["train"])).endswith("; raise max_length")


@pytest.mark.parametrize("added", [False, True])
def test_a_cut_prompt_is_a_conversation_that_fits(model, tokenizer, added):
    if added:
        add_chat_tokens(model, tokenizer, [IM_START, IM_END])
    system = {"role": "system", "content": "Be brief and kind."}
    asked = {"role": "user", "content": "How do I boil an egg so that its yolk stays soft?"}
    prompt = [system, {**asked, "content": "Hello, and good morning!"}, says("Good morning to you."), asked]

    def size(messages):
        return len(encode(tokenizer, messages)[0])

    least = size([{**asked, "content": asked["content"][-1]}])
    for limit in range(size(prompt), 0, -1):
        kept = cut_prompt(tokenizer, prompt, limit)
        if limit < least:
            assert kept is None
            continue
        assert size(kept) <= limit
        first, later = kept[0], kept[1:]
        assert later == prompt[len(prompt) - len(later) :]  # turns go from the left
        turn = prompt[len(prompt) - len(kept)]
        assert first["role"] == turn["role"]
        assert turn["content"].endswith(first["content"])  # and of the first that is left, the content's beginning
        if first != turn:
            more = {**turn, "content": turn["content"][-len(first["content"]) - 1 :] if first["content"] else "?"}
            assert size([more, *later]) > limit
    assert cut_prompt(tokenizer, prompt, size(prompt)) == prompt
