"""Rows of public data sets as conversations, preference pairs and prompts.

Each function takes one row, a mapping from column to value, and raises `UserError` if the row is malformed. To add a
format, add a line to its function's table, its columns to the tuples below, and the case to the function.
"""

from collections.abc import Mapping
from typing import Any

from chat_format import Message
from errors import UserError

SFT_SHAPES = (
    ("messages",), ("conversations",), ("prompt", "completion"), ("prompt", "text"), ("instruction", "output"),
)  # fmt: skip
SFT_COLUMNS = ("system", "messages", "conversations", "prompt", "completion", "text", "instruction", "input", "output")
PROMPT_COLUMNS = ("prompt", "question", "conversations")  # of a preference pair: the first that is not null is read
PREFERENCE_COLUMNS = ("system", *PROMPT_COLUMNS, "chosen", "rejected")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

Row = Mapping[str, Any]


class MissingColumnError(UserError):
    """A column that every row of the data set lacks, so the message need not name a row."""


def sft_conversation(row: Row) -> dict[str, Any]:
    """Convert a row of an SFT data set to `messages`, a conversation in which every assistant turn is learned.

    | columns                    | conversation                                       | as in                        |
    |----------------------------|----------------------------------------------------|------------------------------|
    | messages                   | turns: `role` (user, assistant, system), `content` | HuggingFaceH4/ultrachat_200k |
    | conversations              | turns: `from` (human, gpt, system), `value`        | teknium/OpenHermes-2.5       |
    | prompt, completion         | user, assistant; or turns, and what follows them   | TRL's prompt-completion      |
    | prompt, text               | user, assistant                                    | HuggingFaceTB/cosmopedia     |
    | instruction, input, output | user (the first two), assistant                    | tatsu-lab/alpaca             |

    The first line of the table whose columns all exist applies; `input` is optional. A `system` column opens the
    conversation. An empty `system` or `input` is left out. After a system turn, user and assistant must alternate, and
    the last turn must be the assistant's.
    """
    shape = next((shape for shape in SFT_SHAPES if all(column in row for column in shape)), None)
    if shape is None:
        shapes = " | ".join(", ".join(shape) for shape in SFT_SHAPES)
        names = f"its columns ({', '.join(row)})"
        raise MissingColumnError(f"{names} match no format of SFT data: {shapes}; rename them with columns")
    if len(shape) == 1:
        messages = _add_system_turn(row, _turns(row, *shape))
    else:
        prompt = _instruction(row) if shape[0] == "instruction" else _text_or_turns(row, "prompt", "user")
        messages = [*_add_system_turn(row, prompt), *_text_or_turns(row, shape[1], "assistant")]
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("the conversation does not end with an assistant turn")
    _check_prompt(messages[:-1])
    return {"messages": messages}


def preference_row(row: Row) -> dict[str, Any]:
    """Convert a row of a preference data set to `prompt` (list of messages), `chosen` and `rejected` (texts).

    | columns                            | prompt                          | as in                       |
    |------------------------------------|---------------------------------|-----------------------------|
    | system, question, chosen, rejected | system turn, user turn          | Intel/orca_dpo_pairs        |
    | system, prompt, chosen, rejected   | system turn, user turn          | jondurbin/truthy-dpo-v0.1   |
    | prompt, chosen, rejected           | user turn, or a list of turns   | many                        |
    | conversations, chosen, rejected    | its turns                       | ShareGPT's                  |
    | chosen, rejected                   | the turns that both begin with  | argilla/dpo-mix-7k          |

    An empty `system` adds no turn. `chosen` and `rejected` are texts, single turns or whole conversations; a turn is a
    mapping of `role` and `content`, or of `from` (human, gpt, system) and `value`. The two conversations must have the
    same turns up to the last, alternate user and assistant, and end with the assistant.
    """
    sides = {side: _value(row, side) for side in ("chosen", "rejected")}
    sides = {side: [value] if isinstance(value, dict) else value for side, value in sides.items()}
    for side, value in sides.items():
        if not isinstance(value, (str, list)):
            raise UserError(f"column {side!r} is {_abbreviate(value)}, neither text nor a list of turns")
    if isinstance(sides["chosen"], str) != isinstance(sides["rejected"], str):
        raise UserError("one of chosen and rejected is text, the other is a list of turns")
    conversations = {side: _text_or_turns(sides, side, "assistant") for side in sides}
    for side, turns in conversations.items():
        if not turns or turns[-1]["role"] != "assistant":
            raise UserError(f"{side} does not end with an assistant turn")
    *prompt, chosen = conversations["chosen"]
    *rejected_prompt, rejected = conversations["rejected"]
    if prompt != rejected_prompt:
        raise UserError("the prompts of chosen and rejected differ")
    if not prompt:
        present = [column for column in PROMPT_COLUMNS if column in row]
        column = next((column for column in present if row.get(column) is not None), [*present, PROMPT_COLUMNS[0]][0])
        prompt = _text_or_turns(row, column, "user")
    prompt = _add_system_turn(row, prompt)
    _check_prompt(prompt)
    return {"prompt": prompt, "chosen": chosen["content"], "rejected": rejected["content"]}


def prompt_row(row: Row) -> dict[str, Any]:
    """Convert a row to a `prompt` (list of messages, the user's last) and the `preferred` answer to it, or None.

    The row has the columns of `preference_row` or of `sft_conversation`; its answer may be missing.
    """
    if row.get("chosen") is not None and row.get("rejected") is not None:
        pair = preference_row(row)
        prompt, preferred = pair["prompt"], pair["chosen"]
    else:
        # Every column is read, though one is enough: `convert_rows` refuses a mapped column that is not.
        columns = ("prompt", "question", "messages", "conversations", "instruction")
        present = [column for column in columns if row.get(column) is not None]
        if not present:
            names, needed = f"none of its columns ({', '.join(row)})", ", ".join(columns)
            raise UserError(f"{names} holds a question: it needs one of {needed}; rename others with columns")
        prompt = _instruction(row) if "instruction" in present else _text_or_turns(row, present[0], "user")
        preferred = prompt.pop()["content"] if prompt and prompt[-1]["role"] == "assistant" else None
        answers = [column for column in ("chosen", "completion", "text", "output") if row.get(column)]
        if preferred is None and answers:
            preferred = _text_or_turns(row, answers[0], "assistant")[-1]["content"]
        prompt = _add_system_turn(row, prompt)
    _check_prompt(prompt)
    if not prompt[-1]["content"].strip():
        raise UserError("the question is empty")
    return {"prompt": prompt, "preferred": preferred}


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise MissingColumnError(f"column {column!r} is missing; it has {', '.join(row)}; columns renames them")
    return row[column]


def _text(row: Row, column: str) -> str:
    if not isinstance(text := _value(row, column), str):
        raise UserError(f"column {column!r} is {_abbreviate(text)}, not text")
    return text


def _turns(row: Row, column: str) -> list[Message]:
    """Return a column's list of turns as messages, with ShareGPT's keys and roles renamed.

    (TRL's `maybe_convert_to_chatml` would set `role` to None if some rows have `role` and others have `from`, because
    Arrow then gives every turn both keys. It also leaves the roles human and gpt as they are.)
    """
    if not isinstance(row[column], list):
        raise UserError(f"column {column!r} is {_abbreviate(row[column])}, not a list of turns")
    turns = []
    for number, turn in enumerate(row[column], start=1):
        for keys in (("role", "content"), ("from", "value")):
            if isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in keys):
                role, content = (turn[key] for key in keys)
                turns.append({"role": SHAREGPT_ROLES.get(role, role), "content": content})
                break
        else:
            raise UserError(f"column {column!r}, turn {number}: {_abbreviate(turn)} has no role and content as text")
    return turns


def _text_or_turns(row: Row, column: str, role: str) -> list[Message]:
    is_list = column in row and isinstance(row[column], list)
    return _turns(row, column) if is_list else [{"role": role, "content": _text(row, column)}]


def _instruction(row: Row) -> list[Message]:
    text = _text(row, "instruction") + (f"\n\n{_text(row, 'input')}" if row.get("input") else "")
    return [{"role": "user", "content": text}]


def _add_system_turn(row: Row, turns: list[Message]) -> list[Message]:
    if not row.get("system") or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": _text(row, "system")}, *turns]


def _check_prompt(prompt: list[Message]) -> None:
    """Check that user and assistant alternate after the system turn, if there is one, and that the user is the last."""
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    for number, turn in enumerate(turns, start=1):
        role = "user" if number % 2 else "assistant"
        if turn["role"] != role:
            raise UserError(f"turn {number} is {turn['role']!r} but must be {role!r}: roles must alternate")
    if len(turns) % 2 == 0:
        raise UserError("the prompt does not end with a user turn")


def _abbreviate(value: Any) -> str:
    text = "null or missing" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
