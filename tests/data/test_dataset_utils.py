"""Data loading: every shape of public data, the split, the labels, and each mistake told with its file and row."""

import json
import re
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets

import dataset_utils
from chat_format import IM_END, IM_START, add_chat_tokens, encode, encode_conversation
from config.hyperparameters import DatasetSubset, DataSource
from dataset_utils import (
    EMPTY,
    LOST_END,
    NO_ANSWER,
    NO_ROOM,
    cut_prompt,
    losses,
    preference_row,
    sft_conversation,
    tokenize_dpo_dataset,
    told_losses,
)
from errors import UserError

WHOLE = [DatasetSubset(ratio=1.0)]
USER = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}


def load_sft_dataset(name, shares, seed, **source):
    sources = [
        DataSource(name, s.subset, ratio=s.ratio, number_of_samples=s.number_of_samples, **source) for s in shares
    ]
    return dataset_utils.load_sft_dataset(sources, seed)


def load_dpo_dataset(sources, seed):
    sources = [DataSource(source) if isinstance(source, str) else source for source in sources]
    return dataset_utils.load_dpo_dataset(sources, seed)


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
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "c"},
                "rejected": {"from": "gpt", "value": "r"},
            },
            [USER],
        ),
        ({"prompt": [USER], "chosen": "c", "rejected": "r", "conversations": None}, [USER]),
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


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        ({"prompt": "q", "text": "a", "token_length": 1}, [USER, says("a")]),
        ({"prompt": "q", "completion": "a"}, [USER, says("a")]),
        ({"prompt": [SYSTEM, USER], "completion": [says("a")]}, [SYSTEM, USER, says("a")]),
        ({"system": "s", "prompt": "q", "completion": "a"}, [SYSTEM, USER, says("a")]),
        ({"instruction": "do", "input": "", "output": "a"}, [{**USER, "content": "do"}, says("a")]),
        ({"instruction": "do", "input": None, "output": "a"}, [{**USER, "content": "do"}, says("a")]),
        ({"instruction": "do", "input": "this", "output": "a"}, [{**USER, "content": "do\n\nthis"}, says("a")]),
        ({"prompt": "an id", "messages": [USER, says("a"), USER, says("b")]}, [USER, says("a"), USER, says("b")]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q", "weight": None},
                    {"from": "gpt", "value": "a"},
                ]
            },
            [SYSTEM, USER, says("a")],
        ),
        ({"system": "s", "messages": [USER, says("a")]}, [SYSTEM, USER, says("a")]),
    ],
)
def test_shapes_of_sft_data(row, conversation):
    assert sft_conversation(row) == {"messages": conversation}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, r"its columns \(question, answer\) have no shape of SFT data: messages \| "),
        ({"messages": None}, "column 'messages' is null or missing, not a list of turns"),
        ({"messages": []}, "does not end with an assistant turn"),
        ({"messages": [USER, says("a"), USER]}, "does not end with an assistant turn"),
        ({"messages": [says("a")]}, "the prompt does not end with a user turn"),
        ({"messages": [USER, USER, says("a")]}, "turn 2 is 'user' where 'assistant' is due"),
        ({"conversations": [{"from": "tool", "value": "q"}, says("a")]}, "turn 1 is 'tool' where 'user' is due"),
        ({"messages": [{"role": "user"}, says("a")]}, "column 'messages', turn 1: .* has no role and content"),
        ({"prompt": "q", "text": 3}, "column 'text' is 3, not text"),
        ({"instruction": "do", "input": 3, "output": "a"}, "column 'input' is 3, not text"),
    ],
)
def test_malformed_sft_rows(row, message):
    with pytest.raises(UserError, match=message):
        sft_conversation(row)


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


def test_what_is_held_out_of_a_source_is_held_out_whatever_its_share(tmp_path):
    path = write(tmp_path / "d.jsonl", pairs(50))

    def rows(part, **share):
        return load_dpo_dataset([DataSource(path, **share)], seed=42)[part]["row"][:]

    assert len(rows("test")) == 10
    for share, sizes in [({"ratio": 0.5}, (20, 5)), ({"number_of_samples": 11}, (8, 3)), ({"ratio": 1.0}, (40, 10))]:
        train, test = rows("train", **share), rows("test", **share)
        assert (len(train), len(test)) == sizes
        assert set(test) <= set(rows("test"))
        assert set(train) <= set(rows("train"))
    for share, message in [
        ({"number_of_samples": 51}, "asks for 51 rows of 50"),
        ({"ratio": 0.01}, "1 row is too few"),
    ]:
        with pytest.raises(UserError, match=message):
            rows("train", **share)


def test_columns_are_renamed(tmp_path):
    rows = [{"ask": f"{n}", "reply": "a", "text": 5, "prompt": None} for n in range(5)]
    path = write(tmp_path / "d.jsonl", rows)
    dataset = load_sft_dataset(path, WHOLE, 1, columns={"prompt": "ask", "completion": "reply"})
    assert sorted(row["messages"][0]["content"] for part in dataset.values() for row in part) == list("01234")
    for columns, message in [
        ({"promt": "ask"}, r"columns.promt: no column of that name is read \(did you mean 'prompt'\?\)"),
        ({"prompt": "aks"}, r"d.jsonl has no column 'aks' \(did you mean 'ask'\?\); it has ask, reply"),
        ({"prompt": "ask"}, "line 1: column 'text' is 5, not text"),
        ({"prompt": "ask", "completion": "reply", "output": "text"}, "line 1: columns.output is not read"),
    ]:
        with pytest.raises(UserError, match=message):
            load_sft_dataset(path, WHOLE, 1, columns=columns)
    (pair,) = load_dpo_dataset(
        [
            DataSource(
                write(tmp_path / "p.jsonl", [{"q": "q", "good": "c", "bad": "r"}] * 2),
                columns={"prompt": "q", "chosen": "good", "rejected": "bad"},
            )
        ],
        1,
    )["train"]
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([USER], "c", "r")


def test_sources_that_overlap_are_refused(tmp_path):
    path = write(tmp_path / "d.jsonl", pairs(20))
    for second in (DataSource(path), DataSource(path, ratio=0.5), DataSource(path, split="train[:50%]")):
        with pytest.raises(UserError, match="is named more than once"):
            load_dpo_dataset([path, second], 1)


def test_the_split_is_chosen(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / "both" / f"{split}.jsonl", pairs(5, split))
    write(tmp_path / "other" / "test.jsonl", pairs(5))
    write(tmp_path / "other" / "validation.jsonl", pairs(5))

    def first(name="both", **source):
        return load_dpo_dataset([DataSource(str(tmp_path / name), **source)], 1)["train"][0]["prompt"][0]["content"]

    assert first().startswith("train")
    assert first(split="validation").startswith("validation")
    assert first(split="validation[2:4]") in ("validation2", "validation3")
    with pytest.raises(
        UserError, match=r"\(split valid\): Unknown split \"valid\". Should be one of \['train', 'valid"
    ):
        first(split="valid")
    write(tmp_path / "broken" / "train.jsonl", pairs(5))
    write(tmp_path / "broken" / "validation.jsonl", ["{"])
    with pytest.raises(UserError, match=r"validation.jsonl line 1: not JSON"):
        first("broken", split="validation")
    with pytest.raises(UserError, match="no train split among validation, test; choose one with split"):
        first("other")


def test_a_streamed_source_is_read_only_as_far_as_it_takes(tmp_path):
    """Of twenty files most are no JSON at all, and nobody notices."""
    for number in range(20):
        rows = [{"prompt": f"{number}.{n}", "text": "a"} for n in range(600)]
        write(tmp_path / f"{number:02}.jsonl", rows)
    source = DataSource(str(tmp_path), number_of_samples=50)
    found = []

    def stream(seed=1):
        found.clear()
        return dataset_utils.load_sft_dataset([source], seed, True, lambda *told: found.append(told))

    def prompts(dataset):
        return {row["messages"][0]["content"] for part in dataset.values() for row in part}

    dataset = stream()
    assert {part: len(rows) for part, rows in dataset.items()} == {"train": 40, "test": 10}
    assert found == [(source, None, 50)]
    read = {prompt.split(".")[0] for prompt in prompts(dataset)}
    assert 2 <= len(read) <= 10  # files, in random order
    assert len(prompts(dataset) & prompts(stream(seed=2))) < 10
    source.number_of_samples = 60
    assert len(prompts(stream())) == 60
    source.number_of_samples = 50
    assert [rows.to_list() for rows in stream().values()] == [rows.to_list() for rows in dataset.values()]
    for number in range(20):
        text = (tmp_path / f"{number:02}.jsonl").read_text().replace('{"prompt": "', '{"prompt": "new ')
        (tmp_path / f"{number:02}.jsonl").write_text(text if str(number) in read else "no JSON\n" * 3)
    assert all(prompt.startswith("new ") for prompt in prompts(stream()))  # not what was kept of the files as they were
    source.number_of_samples = 9999
    with pytest.raises(UserError, match=r"jsonl line 1: not JSON"):
        stream()
    few = DataSource(write(tmp_path / "few" / "d.jsonl", rows), number_of_samples=601)
    with pytest.raises(UserError, match="number_of_samples asks for 601 rows of 600"):
        dataset_utils.load_sft_dataset([few], 1, streaming=True)


def test_folders_and_files_of_every_format(tmp_path):
    rows = pairs(10)
    write(tmp_path / "folder" / "train.jsonl", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    (tmp_path / "table.csv").write_text("prompt,chosen,rejected\n" + "".join(f"{n},good,bad\n" for n in range(10)))
    for number in (1, 2):
        (tmp_path / "several").mkdir(exist_ok=True)
        Dataset.from_list(rows[number - 1 :: 2]).to_parquet(tmp_path / "several" / f"{number}.parquet")
    (tmp_path / "words.csv").write_text("prompt,chosen,rejected\n" + "".join(f"q{n},good,bad\n" for n in range(10)))
    lengths = set()
    for name in ("folder", "folder/train.jsonl", "array.json", "words.csv", "several"):
        lengths.add(len(load_dpo_dataset([str(tmp_path / name)], seed=1)["train"]))
    assert lengths == {8}
    with pytest.raises(UserError, match="column 'prompt' is 0, not text"):  # a CSV's numbers are numbers
        load_dpo_dataset([str(tmp_path / "table.csv")], seed=1)
    with pytest.raises(UserError, match=r"files of several formats .* of which only one would be read"):
        load_dpo_dataset([str(tmp_path)], seed=1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train.jsonl: it has no rows"),
        ([""], "train.jsonl: it has no rows"),
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
        (instructions, [DatasetSubset("home", ratio=0.5)] * 2, r"\(subset home\) is named more than once"),
        (str(tmp_path / "no.jsonl"), WHOLE, "no.jsonl: no such file or folder"),
        (str(tiny / "base" / "config.toml"), WHOLE, "no such file or folder"),
        ("nobody/nothing", WHOLE, "not to be had from the hub"),
        (str(tmp_path), WHOLE, "doesn't contain any data files"),
        (str(tiny / "questions"), WHOLE, "have no shape of SFT data"),
    ]:
        with pytest.raises(UserError, match=message):
            load_sft_dataset(name, shares, seed=1)


@pytest.mark.parametrize("on_completions_only", [True, False])
def test_labels_mask_everything_but_the_answers(tmp_path, tokenizer, on_completions_only):
    conversation = [SYSTEM, USER, says("one"), USER, says("two")]
    rows = [{"messages": [USER, says("a")]}, *({"messages": conversation} for _ in range(4))]
    dataset = load_sft_dataset(write(tmp_path / "d.jsonl", rows), WHOLE, seed=1)
    tokenized = dataset_utils.tokenize_sft_dataset(
        dataset, tokenizer, on_completions_only=on_completions_only, max_length=256
    )
    assert tokenized["train"].column_names == ["input_ids", "labels"]
    for row, source in zip(tokenized["train"], dataset["train"], strict=True):
        ids, said = encode_conversation(tokenizer, source["messages"])
        assert row["input_ids"] == ids
        assert row["labels"] == [
            i if learned or not on_completions_only else -100 for i, learned in zip(ids, said, strict=True)
        ]
        if on_completions_only:
            spoken = tokenizer.decode([label for label in row["labels"] if label != -100])
            assert spoken == "".join(
                m["content"] + "<|im_end|><eos>" for m in source["messages"] if m["role"] == "assistant"
            )


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
    assert [(loss.what, loss.rows, loss.example.split(" row ")[1]) for loss in losses(masked)] == [
        (NO_ANSWER, 1, "6"),
        (LOST_END, 1, "4"),
        (EMPTY, 1, "8"),
    ]
    assert [re.sub(r"\S+d.jsonl", "d", line) for line in told_losses("train", masked)] == [
        "train: 1 row (3.3%) dropped: no answer begins within max_seq_length (the first: d row 6)",
        f"train: 1 row (3.3%) cut: {LOST_END} (the first: d row 4)",
        "train: 1 row (3.3%): an answer without text: all that is learned from it is to stop (the first: d row 8)",
    ]
    whole = tokenize(on_completions_only=False)
    assert len(whole) == 30
    assert [(loss.what, loss.rows) for loss in losses(whole)] == [(LOST_END, 2), (EMPTY, 1)]
    every = tokenize(on_completions_only=True, every_row=True)
    assert len(every) == 30
    assert losses(every) == losses(masked)
    unlimited = dataset_utils.tokenize_sft_dataset(dataset, tokenizer, on_completions_only=True, max_length=None)
    assert [loss.what for loss in losses(unlimited["train"])] == [EMPTY]


def test_undecodable_text_is_told_with_its_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"prompt": "q", "text": "a"}\n' * 3 + b'{"prompt": "q", "text": "\xff"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl line 4: not UTF-8 text"):
        load_sft_dataset(str(path), WHOLE, seed=1)


def test_length_limits(tmp_path, tokenizer):
    answers = {"chosen": "one two three four five six seven", "rejected": "no"}
    row = {"prompt": "a question of some words", **answers}
    dataset = load_dpo_dataset([write(tmp_path / "d.jsonl", [row] * 5)], seed=1)
    prompt, chosen = encode(tokenizer, [{"role": "user", "content": row["prompt"]}], row["chosen"])
    _, rejected = encode(tokenizer, [{"role": "user", "content": row["prompt"]}], row["rejected"])

    def tokenize(**limits):
        return tokenize_dpo_dataset(dataset, tokenizer, **{"max_length": None, **limits})["train"]

    def first(**limits):
        row = tokenize(**limits)[0]
        return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]

    def lost(**limits):
        return [loss.what for loss in losses(tokenize(**limits))]

    assert (first(), lost()) == ((prompt, chosen, rejected), [])
    short = encode(tokenizer, cut_prompt(tokenizer, dataset["train"][0]["prompt"], len(prompt) - 2))[0]
    assert first(max_prompt_length=len(prompt) - 2) == (short, chosen, rejected)
    assert lost(max_prompt_length=len(prompt) - 2) == [dataset_utils.LOST_START]
    assert first(max_target_length=4) == (prompt, chosen[:4], rejected[:4])
    assert lost(max_target_length=4) == [dataset_utils.LOST_TARGET]
    assert first(max_length=len(prompt) + 3) == (prompt, chosen[:3], rejected[:3])
    assert lost(max_length=len(prompt) + 3) == [dataset_utils.LOST_TAIL]
    assert lost(max_length=len(prompt) + len(chosen), max_target_length=len(chosen)) == []
    with pytest.raises(UserError, match="max_length is too small: no train row is left"):
        first(max_length=len(prompt))
    with pytest.raises(UserError, match="max_prompt_length is too small: no train row is left"):
        first(max_prompt_length=5)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_empty_answers_of_a_pair_are_told(tmp_path, tokenizer, side):
    dataset = load_dpo_dataset([write(tmp_path / "d.jsonl", [{**pair, side: " "} for pair in pairs(5)])], seed=1)
    assert [loss.what for loss in losses(tokenize_dpo_dataset(dataset, tokenizer, max_length=None)["train"])] == [EMPTY]


def test_pairs_without_room_are_dropped_and_told_with_the_limit_to_raise(tmp_path, tokenizer):
    rows = [*pairs(8), *({**row, "prompt": "far too long " * 9} for row in pairs(8))]
    dataset = load_dpo_dataset([write(tmp_path / "d.jsonl", rows)], seed=1)
    limit = len(encode(tokenizer, [{"role": "user", "content": "0"}])[0]) + 4
    tokenized = tokenize_dpo_dataset(dataset, tokenizer, max_length=limit)
    assert len(tokenized["train"]) + len(tokenized["test"]) == 8
    dropped = [loss for part in tokenized.values() for loss in losses(part) if loss.what == NO_ROOM]
    assert sum(loss.rows for loss in dropped) == 8
    assert next(told_losses("train", tokenized["train"])).endswith("; raise max_length")


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
