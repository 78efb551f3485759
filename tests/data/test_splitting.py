"""What is held out: prompts are on one side, rows that repeat count once, and evaluation data is taken whole."""

import logging

import pytest
from datasets import DatasetDict
from rows import load_dpo_dataset, load_sft_dataset, pairs, says, write

import dataset_utils
from config.hyperparameters import (
    DatasetSubset,
    DataSource,
    DPOHyperparameters,
    SFTHyperparameters,
    parse_hyperparameters,
)
from data.splitting import SourceCounts, prompt_key
from errors import UserError


def sizes(dataset: DatasetDict) -> tuple[int, int]:
    return len(dataset["train"]), len(dataset["test"])


def prompts(rows) -> set[bytes]:
    return {prompt_key(row["prompt"]) for row in rows}


def repeated_prompts(count: int, tag: str = "") -> list[dict]:
    """Three pairs for each prompt, which differ in case and white space."""
    spellings = ("What is {}?", " what\nIS  {}? ", "WHAT is {}?")
    return [
        {"prompt": spellings[n % 3].format(f"{tag}{n // 3}"), "chosen": f"good {n}", "rejected": "bad"}
        for n in range(3 * count)
    ]


def test_rows_with_the_same_prompt_are_on_one_side(tmp_path):
    first = write(tmp_path / "a.jsonl", repeated_prompts(100))
    for others in ([], [write(tmp_path / "b.jsonl", repeated_prompts(100)[1::2] + repeated_prompts(50, "x"))]):
        others = [DataSource(other, eval_ratio=0.4) for other in others]  # a prompt of both is held out of both
        for seed in range(5):
            dataset = load_dpo_dataset([first, *others], seed)
            assert not prompts(dataset["train"]) & prompts(dataset["test"])
            assert 0.1 < len(dataset["test"]) / sum(sizes(dataset)) < 0.45


def test_conversations_that_begin_with_the_same_question_are_on_one_side(tmp_path):
    """SFT learns every answer: a prompt that a row ends with is trained on in each conversation that begins with it."""

    def turns(*texts):
        return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}

    rows = [turns(f"q{n}", "a", *["And " + "then?" * (m % 2), f"b{m}"][: 2 * m]) for n in range(40) for m in range(3)]
    dataset = load_sft_dataset(write(tmp_path / "d.jsonl", rows), [DatasetSubset(ratio=1.0)], seed=1)
    asked = {part: {row["messages"][0]["content"] for row in dataset[part]} for part in dataset}
    assert sum(sizes(dataset)) == 120
    assert not asked["train"] & asked["test"]


def test_a_system_turn_makes_another_prompt_and_later_turns_do_not():
    asked = {"role": "user", "content": "Why?"}
    same = [[asked], [{**asked, "content": " WHY?\n"}], [asked, says("x"), {"role": "user", "content": "So?"}]]
    other = [[{"role": "system", "content": "Be brief."}, asked], [{**asked, "content": "Why not?"}]]
    assert len({prompt_key(prompt) for prompt in same}) == 1
    assert len({prompt_key(prompt) for prompt in same + other}) == 3


def test_what_is_held_out_depends_on_nothing_but_prompt_seed_and_ratio(tmp_path):
    path = write(tmp_path / "d.jsonl", pairs(200))

    def rows(part, sources=(), seed=42, **share):
        dataset = load_dpo_dataset([*sources, DataSource(path, **share)], seed)
        return {row["row"] for row in dataset[part] if row["source"] == path}

    held_out, trained = rows("test"), rows("train")
    assert len(held_out) == pytest.approx(40, abs=15)
    assert held_out != rows("test", seed=43)
    for share, size in [({"ratio": 0.5}, 100), ({"number_of_samples": 31}, 31), ({"ratio": 1.0}, 200)]:
        train, test = rows("train", **share), rows("test", **share)
        assert len(train) + len(test) == size
        assert test <= held_out
        assert train <= trained
    assert rows("test", sources=[write(tmp_path / "other.jsonl", pairs(50, "x"))]) == held_out
    assert rows("test", eval_ratio=0.1) < held_out < rows("test", eval_ratio=0.4)
    sft = write(tmp_path / "sft.jsonl", [{"prompt": row["prompt"], "text": "a"} for row in pairs(200)])
    assert {row["row"] for row in load_sft_dataset(sft, [DatasetSubset(ratio=1.0)], 42)["test"]} == held_out


def test_rows_that_repeat_exactly_count_once(tmp_path):
    rows = pairs(30)
    first = write(tmp_path / "a.jsonl", [*rows, *rows[:4], {**rows[0], "rejected": "worse"}])
    second = write(
        tmp_path / "b.jsonl", [*pairs(10, "x"), *rows[10:13], {"prompt": "x0", "chosen": "good", "rejected": "bad"}]
    )
    counts: list[SourceCounts] = []
    sources = [DataSource(first), DataSource(second)]
    dataset = dataset_utils.load_dpo_dataset(sources, 1, counts.append)
    assert [tuple(count) for count in counts] == [(sources[0], 35, 31, 4, 0), (sources[1], 14, 10, 1, 3)]
    assert sum(sizes(dataset)) == 41
    texts = [str((row["prompt"], row["chosen"], row["rejected"])) for part in dataset.values() for row in part]
    assert len(set(texts)) == len(texts)


def test_evaluation_data_is_held_out_whole_and_nothing_is_taken_off_the_training_rows(tmp_path):
    folder = tmp_path / "d"
    train = write(folder / "train.jsonl", pairs(20))
    write(folder / "test_prefs.jsonl", pairs(7, "x"))
    own = write(tmp_path / "own.jsonl", pairs(9, "y"))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: train.jsonl}\n  - {split: test_prefs, path: test_prefs.jsonl}\n---\n"
    )
    assert sizes(load_dpo_dataset([DataSource(str(folder), eval_split="test_prefs")], 1)) == (20, 7)
    assert sizes(load_dpo_dataset([DataSource(str(folder), eval_dataset=own)], 1)) == (20, 9)
    more = write(tmp_path / "more.jsonl", pairs(6, "z"))
    both = [DataSource(str(folder), number_of_samples=5, eval_dataset=own), DataSource(more, eval_dataset=own)]
    assert sizes(load_dpo_dataset(both, 1)) == (11, 9)  # read once
    limited = DataSource(own, number_of_samples=4, columns={"chosen": "rejected", "rejected": "chosen"})
    pair = load_dpo_dataset([DataSource(train, eval_dataset=limited)], 1)["test"][0]
    assert (pair["chosen"], pair["rejected"]) == ("bad", "good")
    assert sizes(load_dpo_dataset([DataSource(train, eval_dataset=limited)], 1)) == (20, 4)
    some = write(tmp_path / "some.jsonl", pairs(20)[::2] + pairs(20, "w"))  # half of it shares prompts with `train`
    others = load_dpo_dataset([DataSource(train, eval_dataset=own), DataSource(some)], 1)
    assert {row["row"] for row in others["train"] if row["source"] == train} == {*range(1, 21)}
    sliced = DataSource(train, split="train[:80%]", eval_split="train[80%:]")
    assert sizes(load_dpo_dataset([sliced], 1)) == (16, 4)
    extra = dataset_utils.load_dpo_dataset([], 1, evaluation=[DataSource(own)])
    assert sizes(extra) == (0, 9)
    sft = write(tmp_path / "sft" / "train.jsonl", [{"prompt": f"q{n}", "text": "a"} for n in range(8)])
    write(tmp_path / "sft" / "test.jsonl", [{"prompt": f"t{n}", "text": "a"} for n in range(3)])
    subsets = [DatasetSubset(number_of_samples=6)]
    assert sizes(load_sft_dataset(str(tmp_path / "sft"), subsets, 1, eval_split="test")) == (6, 3)
    assert sizes(load_sft_dataset(sft, subsets, 1, eval_dataset=str(tmp_path / "sft" / "test.jsonl"))) == (6, 3)


def test_evaluation_data_that_shares_prompts_with_training_is_told(tmp_path, caplog):
    train = write(tmp_path / "train.jsonl", pairs(20))
    own = write(tmp_path / "own.jsonl", [*pairs(5, "x"), {"prompt": " 7", "chosen": "a", "rejected": "b"}, *pairs(2)])
    with caplog.at_level(logging.WARNING):
        assert sizes(load_dpo_dataset([DataSource(train, eval_dataset=own)], 1)) == (20, 8)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("3 rows of the evaluation data share their prompt with training rows")
    assert said.endswith(f"(the first: {own} row 6)")


@pytest.mark.parametrize("seed", range(8))
def test_no_side_is_empty(tmp_path, seed):
    for count in (2, 3):
        dataset = load_dpo_dataset([write(tmp_path / "d.jsonl", pairs(count))], seed)
        assert min(sizes(dataset)) >= 1


def test_mistakes_in_evaluation_data_are_one_line(tmp_path):
    path, other = write(tmp_path / "d.jsonl", pairs(20)), write(tmp_path / "bad.jsonl", [*pairs(3), {"prompt": "q"}])
    one = write(tmp_path / "one.jsonl", [{"prompt": "q", "chosen": f"{n}", "rejected": "b"} for n in range(5)])
    for source, message in [
        (DataSource(path, eval_split="nope"), r"evaluation data: data set .*\(split nope\): Unknown split \"nope\""),
        (DataSource(path, eval_dataset="no.jsonl"), "data set no.jsonl: no such file or folder"),
        (DataSource(path, eval_split="train"), "is trained on and evaluation data as well"),
        (DataSource(path, eval_dataset=path), "is trained on and evaluation data as well"),
        (DataSource(path, eval_split="train[:50%]"), "is trained on and evaluation data as well"),
        (
            DataSource(path, eval_dataset=other),
            "evaluation data: .*bad.jsonl line 4: column 'chosen' is null or missing",
        ),
        (DataSource(one), "all 5 rows have the same prompt, and it is either trained on or held out"),
    ]:
        with pytest.raises(UserError, match=message):
            load_dpo_dataset([source], 1)
    assert sizes(load_dpo_dataset([DataSource(one, eval_dataset=path)], 1)) == (5, 20)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_ratio": 0}, "eval_ratio 0 is not greater than 0"),
        ({"eval_ratio": 1.0}, "eval_ratio 1.0 is not less than 1"),
        ({"eval_ratio": 0.5, "eval_split": "test"}, "give eval_ratio or eval_split, not both"),
        ({"eval_ratio": 0.5, "eval_dataset": "x"}, "give eval_ratio or eval_dataset, not both"),
        ({"eval_split": "test", "eval_dataset": "x"}, "give eval_split or eval_dataset, not both"),
        ({"eval_split": ""}, "eval_split"),
        (
            {"eval_dataset": {"name": "x", "eval_split": "y"}},
            "eval_dataset: eval_split has no effect on evaluation data",
        ),
        ({"eval_dataset": {"name": "x", "nmae": "y"}}, "nmae"),
    ],
)
def test_contradictions_are_one_line(keys, message):
    sft, dpo = {"dataset": "d", **keys}, {"datasets": [{"name": "d", **keys}]}
    for cls, values in ((SFTHyperparameters, sft), (DPOHyperparameters, dpo)):
        with pytest.raises(UserError, match=message) as raised:
            parse_hyperparameters(cls, {"model_name": "m", **values})
        assert "\n" not in str(raised.value)
