"""What length limits take from rows, how that is counted and described, and how a prompt is cut."""

import json
from bisect import bisect_left
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from chat_format import Message, encode
from errors import UserError

SHARE_TO_WARN = 0.05  # if a limit cuts or drops a larger share of the rows, it is probably set by mistake


class Truncation(StrEnum):
    """What a row loses, and to which limit. The last two are no truncations, but are counted and shown with them."""

    limit: str | None  # the YAML key to raise
    meaning: str  # the sentence for people

    def __new__(cls, value: str, limit: str | None = None, meaning: str = "") -> "Truncation":
        member = str.__new__(cls, value)
        member._value_, member.limit, member.meaning = value, limit, meaning
        return member

    SEQUENCE_END = (
        "sequence_end",
        "max_seq_length",
        "longer than max_seq_length: loses its end and EOS, which teaches to stop",
    )
    NO_ANSWER = "no_answer", "max_seq_length", "no answer begins within max_seq_length"
    PROMPT_START = "prompt_start", "max_prompt_length", "prompt longer than max_prompt_length: loses its beginning"
    NO_PROMPT = "no_prompt", "max_prompt_length", "max_prompt_length leaves no room for the last turn's text"
    ANSWER_END = "answer_end", "max_target_length", "answer longer than max_target_length: loses its end and EOS"
    PAIR_END = "pair_end", "max_length", "prompt and answer longer than max_length: the answer loses its end and EOS"
    NO_ROOM = "no_room", "max_length", "the prompt alone fills max_length"
    EMPTY_ANSWER = "empty_answer", None, "answer without text: the model learns from it only to stop"
    SAME_ANSWERS = "same_answers", None, "chosen and rejected are the same: the pair teaches nothing"

    @property
    def drops_row(self) -> bool:
        """Whether nothing to learn from is left of the row."""
        return self in (Truncation.NO_ANSWER, Truncation.NO_PROMPT, Truncation.NO_ROOM)

    @property
    def cuts_row(self) -> bool:
        """Whether the row is kept without what is over the limit."""
        return self.limit is not None and not self.drops_row

    @property
    def effect(self) -> str:
        """What happens to the row, in a word; empty if it is kept whole."""
        return "dropped" if self.drops_row else "cut" if self.cuts_row else ""

    def no_row_left(self, part: str) -> UserError:
        """Return the error for a part of the data of which it drops every row."""
        return UserError(f"{self.limit} is too small: no {part} row is left ({self.meaning})")


class TruncationCount(NamedTuple):
    """How many rows of a part of the data lose something."""

    truncation: Truncation
    rows: int
    share: float  # of the part's rows
    example: str  # source and row of the first of them


def rows_by_truncation(rows: Dataset) -> dict[Truncation, list[int]]:
    """Return the indices of the rows that lose something, by what they lose, ordered by their source and row there.

    `rows` are tokenized with `every_row=True`.
    """
    table = rows.select_columns(["source", "row", "truncations"]).to_pandas().explode("truncations")
    groups = table.groupby("truncations", sort=False)  # leaves out the rows that lose nothing
    return {Truncation(name): group.sort_values(["source", "row"]).index.tolist() for name, group in groups}


def store_truncation_counts(part: Dataset, rows: Dataset, found: dict[Truncation, list[int]]) -> None:
    """Store what `rows` lose, `found` by `rows_by_truncation`, as JSON in the `info.description` of `part`.

    `part` is `rows` without the dropped ones.
    """
    counts = []
    for truncation, indices in found.items():
        first = rows[indices[0]]
        example = f"{first['source']} row {first['row']}"
        counts.append(TruncationCount(truncation, len(indices), len(indices) / len(rows), example))
    part.info.description = json.dumps(counts)


def count_truncations(part: Dataset) -> list[TruncationCount]:
    """Return the counts stored in a tokenized part: what drops rows first, then what cuts them, the most rows first."""
    counts = [TruncationCount(Truncation(name), *rest) for name, *rest in json.loads(part.info.description or "[]")]
    return sorted(counts, key=lambda count: (not count.truncation.drops_row, not count.truncation.limit, -count.rows))


def describe_truncations(name: str, part: Dataset) -> Iterator[str]:
    """Yield a log line for each truncation in the part called `name`; if many rows lose it, with the limit to raise."""
    for truncation, rows, share, example in count_truncations(part):
        advice = f"; raise {truncation.limit}" if truncation.limit and share > SHARE_TO_WARN else ""
        count = f"{rows} {'row' if rows == 1 else 'rows'} ({share:.1%})"
        yield f"{name}: {f'{count} {truncation.effect}'.rstrip()}: {truncation.meaning} (the first: {example}){advice}"


def cut_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], max_prompt_length: int
) -> list[Message] | None:
    """Return the end of a prompt, as a conversation of at most `max_prompt_length` tokens with BOS and every header.

    Whole turns are removed from the left. The first turn that stays keeps its header and loses the beginning of its
    content. Returns None if nothing of the last turn's content fits.
    """

    def fits(messages: list[Message]) -> bool:
        try:
            return len(encode(tokenizer, messages)[0]) <= max_prompt_length
        except UserError:  # some models' own templates refuse to begin with an answer
            return False

    # Turns before this one are removed: those after it fit, and perhaps a part of it.
    first = next(n for n in range(len(prompt)) if n == len(prompt) - 1 or fits(prompt[n + 1 :]))
    turn, later = prompt[first], prompt[first + 1 :]

    def without(characters: int) -> list[Message]:
        return [{**turn, "content": turn["content"][characters:]}, *later]

    size = len(turn["content"])
    removed = bisect_left(range(size), True, key=lambda characters: fits(without(characters)))
    return without(removed) if removed < size else later or None  # of a turn without content, no header stays
