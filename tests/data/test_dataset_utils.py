"""Loading: shares, splits and streams, columns, and each mistake in the data with its file and row. Also the labels."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from rows import SYSTEM, USER, WHOLE, load_dpo_dataset, load_sft_dataset, pairs, says, write

import dataset_utils
from chat_format import encode_conversation
from config.hyperparameters import DatasetSubset, DataSource
from errors import UserError


def count_rows(sources):
    return sum(map(len, load_dpo_dataset(sources, seed=1).values()))


def test_sft_shares_are_taken_and_split(tiny):
    shares = [DatasetSubset("kitchen", ratio=0.25), DatasetSubset("home", number_of_samples=12)]
    dataset = load_sft_dataset(str(tiny / "instructions"), shares, seed=1)
    assert sum(map(len, dataset.values())) == 44
    again = load_sft_dataset(str(tiny / "instructions"), shares, seed=1)
    other = load_sft_dataset(str(tiny / "instructions"), shares, seed=2)
    assert dataset["test"].to_list() == again["test"].to_list()
    assert dataset["test"].to_list() != other["test"].to_list()


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
        ({"prompt": "ask", "completion": "ask"}, "columns: prompt, completion must be different columns of data set"),
    ]:
        with pytest.raises(UserError, match=message):
            load_sft_dataset(path, WHOLE, 1, columns=columns)
    (pair,) = load_dpo_dataset(
        [
            DataSource(
                write(tmp_path / "p.jsonl", [{"q": q, "good": "c", "bad": "r"} for q in "qp"]),
                columns={"prompt": "q", "chosen": "good", "rejected": "bad"},
            )
        ],
        1,
    )["train"]
    assert (pair["prompt"][0]["content"] in "qp", pair["chosen"], pair["rejected"]) == (True, "c", "r")


def test_sources_that_overlap_are_refused(tmp_path):
    path = write(tmp_path / "d" / "train.jsonl", pairs(20))
    (tmp_path / "link").symlink_to("d")
    for first, second in [
        *((path, DataSource(path, **share)) for share in ({}, {"ratio": 0.5}, {"split": "train[:50%]"})),
        *((f"{tmp_path}/d", f"{tmp_path}/{name}") for name in ("d/", "d/.", "d/../d", "link", "d/train.jsonl")),
        (f"{tmp_path}/link/train.jsonl", f"{tmp_path}/d"),
    ]:
        with pytest.raises(UserError, match="is named more than once"):
            load_dpo_dataset([first, second], 1)
    other = write(tmp_path / "d" / "validation.jsonl", pairs(20, "other"))  # no rows of the folder's train split
    assert count_rows([f"{tmp_path}/d", other]) == 40


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
        return dataset_utils.load_sft_dataset([source], seed, True, found.append)

    def prompts(dataset):
        return {row["messages"][0]["content"] for part in dataset.values() for row in part}

    dataset = stream()
    assert sum(map(len, dataset.values())) == 50
    assert found == [(source, None, 50, 0, 0)]
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
    with pytest.raises(UserError, match="number_of_samples is 601, but it has only 600 rows"):
        dataset_utils.load_sft_dataset([few], 1, streaming=True)


def test_folders_and_files_of_every_format(tmp_path):
    rows = pairs(10)
    write(tmp_path / "folder" / "train.jsonl", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    (tmp_path / "table.csv").write_text("prompt,chosen,rejected\n" + "".join(f"{n},good,bad\n" for n in range(10)))
    for number in (1, 2):
        (tmp_path / "several").mkdir(exist_ok=True)
        Dataset.from_list(rows[number - 1 :: 2]).to_parquet(tmp_path / "several" / f"{number}.parquet")
    lengths = set()
    for name in ("folder", "folder/train.jsonl", "array.json", "table.csv", "several"):
        lengths.add(count_rows([str(tmp_path / name)]))
    assert lengths == {10}
    with pytest.raises(UserError, match=r"files of several formats .* but only one format would be read"):
        load_dpo_dataset([str(tmp_path)], seed=1)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_were_changed_are_read_anew(tmp_path, listed, streaming):
    """A folder with a README too, which `datasets` would find in its cache, with the rows that it had."""
    if listed:
        write(tmp_path / "README.md", [])
        files = "- config_name: default\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    for number, text in enumerate(("one", "two", "two")):
        write(tmp_path / "train.jsonl", [{"prompt": f"{n}", "text": text} for n in range(9)])
        os.utime(tmp_path / "train.jsonl", (number, number))
        source = DataSource(str(tmp_path), number_of_samples=5)
        rows = dataset_utils.load_sft_dataset([source], 1, streaming)["train"]
        assert {row["messages"][1]["content"] for row in rows} == {text}


def test_a_folder_that_is_no_data_set_is_not_searched(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.MOST_OTHER_FILES", 3)
    for number in range(5):
        write(tmp_path / f"{number}.jsonl", pairs(1, f"{number}"))
        write(tmp_path / ".git" / f"{number}", [])
    for number in range(4):
        assert count_rows([str(tmp_path)]) == 5
        write(tmp_path / "below" / f"{number}.log", [])
    with pytest.raises(UserError, match="more than 3 files of other formats; is it a data set"):
        load_dpo_dataset([str(tmp_path)], 1)


def test_names_that_look_like_a_pattern(tmp_path):
    for name in ("a[1].jsonl", "a*.jsonl", "a?.jsonl"):
        write(tmp_path / name, pairs(5, name))
    assert count_rows([str(path) for path in sorted(tmp_path.iterdir())]) == 15
    for name in ("d[1]", "d::1", "a::1.jsonl"):
        write(tmp_path / name / "train.jsonl" if name[0] == "d" else tmp_path / name, pairs(5))
        with pytest.raises(UserError, match="rename it"):
            load_dpo_dataset([str(tmp_path / name)], 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["d.csv", "folder/d.csv"])
def test_the_cells_of_a_csv_are_text(tmp_path, where, streaming):
    source = DataSource(str(tmp_path / where.split("/")[0]), number_of_samples=5)
    rows = "1,None,\n2,NA,\n3,null,\n4,007,\n5,1e5,\n"
    write(tmp_path / where, [f"prompt,text,system\n{rows}"])
    dataset = dataset_utils.load_sft_dataset([source], 1, streaming)
    said = {tuple(turn["content"] for turn in row["messages"]) for part in dataset.values() for row in part}
    assert said == {("1", "None"), ("2", "NA"), ("3", "null"), ("4", "007"), ("5", "1e5")}
    write(tmp_path / where, ["prompt,text\n" + "1,2\n" * 4 + "1,"])
    with pytest.raises(UserError, match="column 'text' is null or missing"):
        dataset_utils.load_sft_dataset([source], 1, streaming)


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
def test_errors_in_files_name_the_row(tmp_path, rows, message):
    path = write(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError, match=message) as error:
        load_dpo_dataset([path], seed=1)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_subset_file_and_share(tiny, tmp_path):
    instructions = str(tiny / "instructions")
    for name, shares, message in [
        (instructions, [DatasetSubset("kitchn", ratio=1.0)], r"unknown subset 'kitchn' \(did you mean 'kitchen'\?\)"),
        (instructions, WHOLE, "dataset_subsets must name a subset: it has kitchen, home, outdoors, chats"),
        (
            instructions,
            [DatasetSubset("home", number_of_samples=999)],
            "number_of_samples is 999, but it has only 128 rows",
        ),
        (instructions, [DatasetSubset("home", ratio=0.5)] * 2, r"\(subset home\) is named more than once"),
        (str(tmp_path / "no.jsonl"), WHOLE, "no.jsonl: no such file or folder"),
        (str(tiny / "base" / "config.toml"), WHOLE, "no such file or folder"),
        ("nobody/nothing", WHOLE, "the hub does not provide it"),
        ("a b/c d", WHOLE, "a hub id is name or owner/name"),
        (str(tmp_path), WHOLE, "doesn't contain any data files"),
        (str(tiny / "questions"), WHOLE, "match no format of SFT data"),
    ]:
        with pytest.raises(UserError, match=message):
            load_sft_dataset(name, shares, seed=1)


def test_undecodable_text_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"prompt": "q", "text": "a"}\n' * 3 + b'{"prompt": "q", "text": "\xff"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl line 4: column 'text': 'utf-8' codec can't decode byte 0xff"):
        load_sft_dataset(str(path), WHOLE, seed=1)


DEEP = '{"prompt": ' + "[" * 50000 + "]" * 50000 + ', "chosen": "c", "rejected": "r"}'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("d.jsonl", 3 * f"{DEEP}\n", "its reader crashes (SIGSEGV): is it nested too deeply"),
        ("d.json", "null", "its reader crashes (SIGSEGV)"),
        ("d.json", "[1, 2", "d.json: "),
        ("d.jsonl", '{"prompt": "\\ud800", "chosen": "c", "rejected": "r"}\n', "surrogate pair in string is invalid"),
        ("d.csv", "", "No columns to parse from file"),
        ("d.csv", 'prompt,chosen,rejected\n"a,b,c\n', "EOF inside string"),
        ("d.csv", b"\xff\xfe\x00", "can't decode byte 0xff"),
        ("d.parquet", b"PAR1", "d.parquet: "),
        ("d.jsonl", None, "neither a file nor a folder"),
        ("folder/d.jsonl", None, "neither a file nor a folder"),
        ("folder/README.md", "---\nconfigs: [\n---\n", "folder: while parsing a flow node"),
        ("folder/folder.py", "raise SystemExit\n", "Dataset scripts are no longer supported"),
        ("folder/d.h5", "", "folder: "),
    ],
)
def test_whatever_a_reader_meets_is_one_line(tmp_path, name, data, message):
    """None: a pipe that nobody writes to, where a reader would wait for ever."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if data is None:
        os.mkfifo(path)
    else:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError) as error:
        load_dpo_dataset([str(tmp_path / name.split("/")[0])], seed=1)
    assert message in str(error.value)
    assert str(error.value).startswith((f"data set {tmp_path}", str(tmp_path)))


@pytest.mark.parametrize("where", ["command", "trial of a local experiment", "rank", "cluster"])
def test_only_a_command_reads_json_in_a_child_first(tmp_path, monkeypatch, where):
    """A trial may have threads, a process group or CUDA, which do not survive a fork."""
    read = []
    monkeypatch.setattr("data.sources.run_in_child", lambda work, seconds: read.append(work) or 0)
    if where == "rank":
        monkeypatch.setenv("RANK", "0")
    elif where != "command":
        monkeypatch.setattr(
            "determined.get_cluster_info" if where == "cluster" else "multiprocessing.parent_process", lambda: "one"
        )
    load_dpo_dataset([write(tmp_path / "d.jsonl", pairs(5))], seed=1)
    assert len(read) == (where == "command")
    pq.write_table(pa.Table.from_pylist(pairs(5)), tmp_path / "d.parquet")
    load_dpo_dataset([str(tmp_path / "d.parquet")], seed=1)
    assert len(read) == (where == "command")


def test_values_that_cannot_be_read_name_their_row_and_column(tmp_path):
    good = pa.array(list("abcde"))
    for dates, message in [
        (pa.array([2**62] * 5, pa.timestamp("us")), "row 1: column 'prompt': date value out of range"),
        (pa.array([1] * 5, pa.timestamp("us", tz="Nowhere/X")), "row 1: column 'prompt': 'Nowhere/X'"),
    ]:
        table = pa.table({"prompt": dates, "chosen": good, "rejected": good})
        pq.write_table(table, tmp_path / "d.parquet")
        with pytest.raises(UserError, match=message):
            load_dpo_dataset([str(tmp_path / "d.parquet")], seed=1)
    # A column that is not used may hold anything.
    pq.write_table(
        table.rename_columns(["when", "chosen", "rejected"]).append_column("prompt", good), tmp_path / "d.parquet"
    )
    assert count_rows([str(tmp_path / "d.parquet")]) == 5


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "datasets"))
    with pytest.raises(UserError, match=f"^HF_HOME, or HF_DATASETS_CACHE: {tmp_path}/file/datasets: Not a directory$"):
        load_dpo_dataset([write(tmp_path / "d.jsonl", pairs(5))], seed=1)


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
