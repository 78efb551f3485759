"""Formats: every shape of public data becomes the same conversation or pair, and each malformed row says why."""

import pytest
from rows import SYSTEM, USER, says

from data.formats import preference_row, sft_conversation
from errors import UserError


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": "s", "question": "q", "chosen": "c", "rejected": "r"}, [SYSTEM, USER]),
        ({"system": "s", "prompt": "q", "chosen": "c", "rejected": "r"}, [SYSTEM, USER]),
        ({"system": "", "prompt": "q", "chosen": "c", "rejected": "r"}, [USER]),
        ({"prompt": "q", "chosen": "c", "rejected": "r"}, [USER]),
        ({"prompt": None, "question": "q", "chosen": "c", "rejected": "r"}, [USER]),
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
            "turn 2 is 'user' but must be 'assistant'",
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
        (  # as Arrow reads a row whose neighbours have role and content
            {
                "conversations": [
                    {"role": None, "content": None, "from": "human", "value": "q"},
                    {"role": "assistant", "content": "a", "from": None, "value": None},
                ]
            },
            [USER, says("a")],
        ),
    ],
)
def test_shapes_of_sft_data(row, conversation):
    assert sft_conversation(row) == {"messages": conversation}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            r"its columns \(question, answer\) match no format of SFT data: messages \| ",
        ),
        ({"messages": None}, "column 'messages' is null or missing, not a list of turns"),
        ({"messages": []}, "does not end with an assistant turn"),
        ({"messages": [USER, says("a"), USER]}, "does not end with an assistant turn"),
        ({"messages": [says("a")]}, "the prompt does not end with a user turn"),
        ({"messages": [USER, USER, says("a")]}, "turn 2 is 'user' but must be 'assistant'"),
        ({"conversations": [{"from": "tool", "value": "q"}, says("a")]}, "turn 1 is 'tool' but must be 'user'"),
        ({"messages": [{"role": "user"}, says("a")]}, "column 'messages', turn 1: .* has no role and content"),
        ({"prompt": "q", "text": 3}, "column 'text' is 3, not text"),
        ({"instruction": "do", "input": 3, "output": "a"}, "column 'input' is 3, not text"),
    ],
)
def test_malformed_sft_rows(row, message):
    with pytest.raises(UserError, match=message):
        sft_conversation(row)
