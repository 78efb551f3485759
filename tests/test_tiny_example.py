"""The data of the tiny example: what its YAMLs train on and hold out, and that the chosen answer is the helpful one."""

import json
import re
from collections import Counter

import make
import pytest
import yaml
from conftest import REPO

from config.hyperparameters import DataSource
from dataset_utils import load_dpo_dataset, load_sft_dataset

STRUCTURED = re.compile(r"Here is how to [^\n]+\n1\. [^\n]+\n2\. [^\n]+\n3\. [^\n]+\nTip: [^\n]+")
SEED = 42


@pytest.fixture(scope="module")
def hparams():
    """The hyperparameters of the example's YAMLs."""
    return {
        name: yaml.safe_load((REPO / "examples" / "tiny" / f"{name}.yaml").read_text())["hyperparameters"]
        for name in ("sft", "dpo")
    }


@pytest.fixture(scope="module")
def sft(tiny, hparams):
    folder = str(tiny / "instructions")
    return load_sft_dataset([DataSource(folder, **share) for share in hparams["sft"]["dataset_subsets"]], SEED)


@pytest.fixture(scope="module")
def dpo(tiny, hparams):
    folders = [name.removeprefix("local_runs/tiny/") for name in hparams["dpo"]["datasets"]]
    return load_dpo_dataset([DataSource(str(tiny / folder)) for folder in folders], SEED)


@pytest.fixture(scope="module")
def whys() -> dict[str, str]:
    """The reason in the helpful answer to each task."""
    tasks = yaml.safe_load((REPO / "examples" / "tiny" / "how_to.yaml").read_text())
    return {entry["task"]: entry["why"] for entries in tasks.values() for entry in entries}


def test_sft_trains_on_conversations_of_several_turns(sft):
    for part, least in (("train", 60), ("test", 10)):
        turns = Counter(sum(turn["role"] == "assistant" for turn in row["messages"]) for row in sft[part])
        assert set(turns) == {1, 2}
        assert turns[2] >= least


def test_no_question_is_asked_twice(sft, dpo):
    """Not within a data set nor across its split, nor in SFT and DPO. Case and white space do not make it another."""
    asked = [row["messages"] for part in sft.values() for row in part]
    asked += [row["prompt"] for part in dpo.values() for row in part]
    texts = [turn["content"] for turns in asked for turn in turns if turn["role"] == "user"]
    counts = Counter(" ".join(text.split()).casefold() for text in texts)
    assert counts.most_common(1)[0][1] == 1


def test_what_is_chosen_is_the_helpful_answer(dpo, whys):
    """The task that was asked about last, the reason, numbered steps and a tip. What is rejected is something else."""
    for part in dpo.values():
        for row in part:
            task = max((task for task in whys if task in row["prompt"][-1]["content"]), key=len)
            assert STRUCTURED.fullmatch(row["chosen"])
            assert row["chosen"].startswith(f"Here is how to {task}. {whys[task]}\n")
            assert task not in row["rejected"] or not STRUCTURED.fullmatch(row["rejected"])
    multi_turn = sum(len(row["prompt"]) > 2 for row in dpo["test"])
    assert multi_turn >= 10


def test_enough_pairs_are_held_out_for_a_verdict(dpo):
    assert len(dpo["test"]) >= 90


def test_questions_and_conversations_are_rows_of_their_own_kind(tiny):
    rows = {
        path.relative_to(tiny).as_posix(): [json.loads(line) for line in path.read_text().splitlines()]
        for path in tiny.glob("*/*.jsonl")
    }
    columns = {name: sorted(set().union(*lines)) for name, lines in rows.items()}
    assert columns == {
        **{f"instructions/{subset}.jsonl": ["prompt", "text"] for subset in ("kitchen", "home", "outdoors")},
        "instructions/chats.jsonl": ["messages"],
        "questions/train.jsonl": ["chosen", "question", "rejected", "system"],
        "conversations/train.jsonl": ["chosen", "rejected"],
    }


@pytest.mark.parametrize("terminal", [True, False])
def test_pre_training_shows_how_far_it_is(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))  # as rich is told
    make.make(tmp_path / "tiny", epochs=0.05, hidden_size=32)
    out = capsys.readouterr().out
    assert ("3/3 steps" in re.sub(r"\x1b\[[\d;?]*\w", "", out)) == terminal
    assert ("half of 3 steps done after " in out) != terminal
    assert len(out.splitlines()) == 3 or terminal
