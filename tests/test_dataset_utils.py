"""Data loading: every shape of public data, the split, the labels, and each mistake told with its file and row."""

import json
import re
from collections import Counter

import pytest

from chat_format import encode
from dataset_utils import (
    cut_prompt,
    load_dpo_dataset,
    load_sft_dataset,
    preference_row,
    sft_row,
    tokenize_dpo_dataset,
    tokenize_sft_dataset,
)
from hyperparameters import DatasetSubset
from user_error import UserError

WHOLE = [DatasetSubset(ratio=1.0)]
USER = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}


def says(content):
    return {"role": "assistant", "content": content}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def pairs(count, tag=""):
    return [{"prompt": f"{tag}{n}", "chosen": "good", "rejected": "bad"} for n in range(count)]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": "s", "question": "q", "chosen": "c", "rejected": "r"}, [SYSTEM, USER]),
        ({"system": "s", "prompt": "q", "chosen": "c", "rejected": "r"}, [SYSTEM, USER]),
        ({"system": "", "prompt": "q", "chosen": "c", "rejected": "r"}, [USER]),
        ({"prompt": "q", "chosen": "c", "rejected": "r"}, [USER]),
        ({"prompt": [SYSTEM, USER], "chosen": "c", "rejected": "r"}, [SYSTEM, USER]),
        ({"chosen": [USER, says("c")], "rejected": [USER, says("r")]}, [USER]),
        ({"prompt": "q", "chosen": [USER, says("c")], "rejected": [USER, says("r")]}, [USER]),
        ({"prompt": "q", "chosen": [says("c")], "rejected": [says("r")]}, [USER]),
        ({"system": "s", "chosen": [USER, says("c")], "rejected": [USER, says("r")]}, [SYSTEM, USER]),
        (
            {
                "chosen": [SYSTEM, USER, says("a"), USER, says("c")],
                "rejected": [SYSTEM, USER, says("a"), USER, says("r")],
            },
            [SYSTEM, USER, says("a"), USER],
        ),
    ],
)
def test_shapes_of_preference_data(row, prompt):
    assert preference_row(row) == {"prompt": prompt, "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "c"}, "column 'rejected' is missing; it has prompt, chosen"),
        ({"chosen": "c", "rejected": "r"}, "column 'prompt' is missing"),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, "column 'prompt' is null or missing, not text"),
        (
            {"prompt": "q", "chosen": "c", "rejected": None},
            "column 'rejected' is null or missing, neither text nor a list of turns",
        ),
        (
            {"prompt": "q", "chosen": "c", "rejected": [USER, says("r")]},
            "one of chosen and rejected is text, the other",
        ),
        ({"chosen": [USER, says("c")], "rejected": [SYSTEM, USER, says("r")]}, "prompts of chosen and rejected differ"),
        ({"chosen": [USER], "rejected": [USER]}, "chosen does not end with an assistant turn"),
        (
            {"chosen": [USER, USER, says("c")], "rejected": [USER, USER, says("r")]},
            "turn 2 is 'user' where 'assistant'",
        ),
        ({"prompt": [USER, says("a")], "chosen": "c", "rejected": "r"}, "does not end with a user turn"),
        ({"chosen": [{"role": "user"}], "rejected": [USER]}, "column 'chosen', turn 1"),
    ],
)
def test_malformed_preference_rows(row, message):
    with pytest.raises(UserError, match=message):
        preference_row(row)


def test_sft_rows_are_cosmopedias():
    row = {"prompt": "q", "text": "a", "token_length": 1}
    assert sft_row(row) == {"prompt": [USER], "completion": "a"}


def test_sft_shares_are_taken_and_split(tiny):
    shares = [DatasetSubset("kitchen", ratio=0.25), DatasetSubset("home", number_of_samples=12)]
    dataset = load_sft_dataset(str(tiny / "instructions"), shares, seed=1)
    assert {part: len(rows) for part, rows in dataset.items()} == {"train": 32, "test": 8}
    again = load_sft_dataset(str(tiny / "instructions"), shares, seed=1)
    other = load_sft_dataset(str(tiny / "instructions"), shares, seed=2)
    assert dataset["test"].to_list() == again["test"].to_list()
    assert dataset["test"].to_list() != other["test"].to_list()


def test_evaluation_split_holds_every_source_in_proportion(tmp_path):
    large, small = write(tmp_path / "large.jsonl", pairs(100, "L")), write(tmp_path / "small.jsonl", pairs(10, "S"))
    dataset = load_dpo_dataset([large, small], seed=42)
    held_out = Counter(row["prompt"][0]["content"][0] for row in dataset["test"])
    assert held_out == {"L": 20, "S": 2}
    alone = load_dpo_dataset([small], seed=42)
    assert alone["test"].to_list() == dataset["test"].to_list()[-2:]


def test_folders_and_files_of_every_format(tmp_path):
    rows = pairs(10)
    write(tmp_path / "folder" / "train.jsonl", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    (tmp_path / "table.csv").write_text("prompt,chosen,rejected\n" + "".join(f"{n},good,bad\n" for n in range(10)))
    lengths = set()
    for name in ("folder", "folder/train.jsonl", "array.json"):
        lengths.add(len(load_dpo_dataset([str(tmp_path / name)], seed=1)["train"]))
    assert lengths == {8}
    with pytest.raises(UserError, match="column 'prompt' is 0, not text"):  # a CSV's numbers are numbers
        load_dpo_dataset([str(tmp_path / "table.csv")], seed=1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train.jsonl: it has no rows"),
        (["{}x"], r"train.jsonl line 1: not JSON \(Extra data at column 3\)"),
        ([pairs(1)[0], "", '{"prompt": "q", '], "train.jsonl line 3: not JSON"),
        ([pairs(1)[0], "[1]"], "train.jsonl line 2"),
        (
            [*pairs(3), {"prompt": None, "chosen": "c", "rejected": "r"}],
            "train.jsonl line 4: column 'prompt' is null or missing",
        ),
        ([{"prompt": "q", "chosen": "c"}] * 3, "column 'rejected' is missing; it has prompt, chosen"),
        (pairs(1), "1 row is too few"),
    ],
)
def test_malformed_files_are_told_with_their_row(tmp_path, rows, message):
    path = write(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError, match=message) as error:
        load_dpo_dataset([path], seed=1)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_subset_file_and_share(tiny, tmp_path):
    instructions = str(tiny / "instructions")
    for name, shares, message in [
        (instructions, [DatasetSubset("kitchn", ratio=1.0)], r"unknown subset 'kitchn' \(did you mean 'kitchen'\?\)"),
        (instructions, WHOLE, "dataset_subsets must name a subset: it has kitchen, home, outdoors"),
        (instructions, [DatasetSubset("home", number_of_samples=999)], "asks for 999 rows of 112"),
        (instructions, [DatasetSubset("home", ratio=0.5)] * 2, "names subset 'home' more than once"),
        (str(tmp_path / "no.jsonl"), WHOLE, "no.jsonl: no such file or folder"),
        (str(tiny / "base" / "config.toml"), WHOLE, "no such file or folder"),
        ("nobody/nothing", WHOLE, "not to be had from the hub"),
        (str(tmp_path), WHOLE, "doesn't contain any data files"),
        (str(tiny / "questions"), WHOLE, "column 'prompt' is missing; it has system, question"),
    ]:
        with pytest.raises(UserError, match=message):
            load_sft_dataset(name, shares, seed=1)


@pytest.mark.parametrize("on_completions_only", [True, False])
def test_labels_mask_everything_but_the_answer(tiny, tokenizer, on_completions_only):
    dataset = load_sft_dataset(str(tiny / "instructions"), [DatasetSubset("home", number_of_samples=10)], seed=1)
    tokenized = tokenize_sft_dataset(dataset, tokenizer, on_completions_only, max_length=256)
    for row, source in zip(tokenized["train"], dataset["train"], strict=True):
        prompt, completion = encode(tokenizer, source["prompt"], source["completion"])
        assert row["input_ids"] == prompt + completion
        assert row["labels"] == ([-100] * len(prompt) if on_completions_only else prompt) + completion


def test_rows_that_will_lose_their_end_are_counted(tiny, tokenizer):
    dataset = load_sft_dataset(str(tiny / "instructions"), [DatasetSubset("home", number_of_samples=10)], seed=1)
    tokenized = tokenize_sft_dataset(dataset, tokenizer, True, max_length=60)
    longer = sum(len(ids) > 60 for ids in tokenized["train"]["input_ids"])
    assert tokenized["train"].info.description == (
        f"train rows: {longer} of 8 are longer than max_seq_length (60 tokens) and lose their end, EOS included"
    )


def test_undecodable_text_is_told_with_its_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"prompt": "q", "text": "a"}\n' * 3 + b'{"prompt": "q", "text": "\xff"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl line 4: not UTF-8 text"):
        load_sft_dataset(str(path), WHOLE, seed=1)


def test_length_limits(tmp_path, tokenizer):
    answers = {"chosen": "one two three four five six seven", "rejected": "no"}
    row = {"prompt": "a question of some words that is much too long to keep", **answers}
    dataset = load_dpo_dataset([write(tmp_path / "d.jsonl", [row] * 5)], seed=1)
    prompt, chosen = encode(tokenizer, [{"role": "user", "content": row["prompt"]}], row["chosen"])
    _, rejected = encode(tokenizer, [{"role": "user", "content": row["prompt"]}], row["rejected"])

    def first(**limits):
        row = tokenize_dpo_dataset(dataset, tokenizer, **{"max_length": None, **limits})["train"][0]
        return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]

    assert first() == (prompt, chosen, rejected)
    assert first(max_prompt_length=20) == ([prompt[0], *prompt[-19:]], chosen, rejected)
    assert first(max_target_length=4) == (prompt, chosen[:4], rejected[:4])
    assert first(max_length=len(prompt) + 3) == (prompt, chosen[:3], rejected[:3])
    with pytest.raises(UserError, match="leaves no train pair room"):
        first(max_length=len(prompt))


def test_pairs_without_room_are_dropped_and_counted(tmp_path, tokenizer):
    rows = [*pairs(8), *({**row, "prompt": "far too long " * 9} for row in pairs(8))]
    dataset = load_dpo_dataset([write(tmp_path / "d.jsonl", rows)], seed=1)
    limit = len(encode(tokenizer, [{"role": "user", "content": "0"}])[0]) + 4
    tokenized = tokenize_dpo_dataset(dataset, tokenizer, max_length=limit)
    assert len(tokenized["train"]) + len(tokenized["test"]) == 8
    told = [tokenized[part].info.description for part in ("train", "test")]
    dropped = [int(re.search(r"(\d+) dropped because the prompt alone fills max_length", text)[1]) for text in told]
    assert sum(dropped) == 8


def test_cut_prompt_keeps_bos_and_the_end():
    assert cut_prompt([2, 5, 6, 7, 8], 3, bos_token_id=2) == [2, 7, 8]
    assert cut_prompt([5, 6, 7, 8], 3, bos_token_id=2) == [6, 7, 8]
    assert cut_prompt([2, 5], 3, bos_token_id=2) == [2, 5]
