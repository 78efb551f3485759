"""Decide which rows are held out, by their prompts: rows with the same prompt are never on both sides.

A prompt's side is drawn by a hash of the prompt, up to its first answer, and the seed. So it depends on nothing else:
not on the other rows, nor on the share of a source that is used, nor on the order. With the same seed and `eval_ratio`,
a prompt that SFT trains on is not held out by DPO either. (Except where a side would be empty, or where sources share a
prompt and have different ratios or evaluation data of their own.)
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from chat_format import Message
from config.hyperparameters import DataSource
from errors import UserError
from pages.terminal import plural

logger = logging.getLogger(__name__)


class SourceCounts(NamedTuple):
    """How many rows of a source are found, used and left out."""

    source: DataSource
    found: int | None  # None: streamed
    used: int
    repeated: int  # left out, as the source has the same row before
    elsewhere: int  # left out, as an earlier source has the same row


@dataclass
class SourceRows:
    """The converted rows of a source, to be split.

    `eval_ratio` is the share of its prompts to hold out: 0 if it has evaluation data, and None if it is some, which is
    held out as a whole.
    """

    source: DataSource
    found: int | None  # rows of the source; None: streamed
    rows: Dataset  # has `messages`, or `prompt`, `chosen` and `rejected`; and `source` and `row`
    eval_ratio: float | None


def row_prompt(row: dict[str, Any]) -> list[Message]:
    """Return the conversation before a row's (last) answer."""
    return row["prompt"] if "prompt" in row else row["messages"][:-1]


def prompt_key(prompt: list[Message]) -> bytes:
    """Return a key that prompts share if they begin alike, up to the first answer; white space and case aside.

    What comes later does not make another key: SFT learns each answer of a conversation, and so a prompt that another
    row ends with is trained on in every longer conversation that begins with it.
    """
    opening = itertools.takewhile(lambda turn: turn["role"] != "assistant", prompt)
    return _digest([[turn["role"], " ".join(turn["content"].split()).casefold()] for turn in opening])


def split_by_prompt(
    parts: list[SourceRows], seed: int, on_source: Callable[[SourceCounts], None] | None = None
) -> DatasetDict:
    """Split rows into `train` and `test`, each in the order of the sources; rows that repeat exactly count once.

    Of a prompt's rows, all are held out if one is. Rows of evaluation data are all held out: prompts that they share
    with training are only told, in a warning. If chance leaves a side empty, the prompt next to it goes there.
    Raises `UserError` if all rows to split have one prompt.
    """
    rows = concatenate_datasets([part.rows for part in parts])
    part_of = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    own = np.array([part.eval_ratio is None for part in parts])[part_of]  # rows of evaluation data
    keys, first_of = [], np.arange(len(rows))
    first: dict[tuple[bool, bytes], int] = {}  # of the rows that are the same, the index of the first
    for index, row in enumerate(rows):
        keys.append(prompt_key(row_prompt(row)))
        content = [row[name] for name in ("messages", "prompt", "chosen", "rejected") if name in row]
        first_of[index] = first.setdefault((own[index], _digest(content)), index)
    kept = first_of == np.arange(len(rows))
    for number, part in enumerate(parts):
        of_part, of_first = part_of == number, part_of[first_of]
        repeated = int((of_part & ~kept & (of_first == number)).sum())
        elsewhere = int((of_part & ~kept & (of_first != number)).sum())
        if on_source:
            on_source(SourceCounts(part.source, part.found, int((of_part & kept).sum()), repeated, elsewhere))

    draws = {key: _draw(seed, key) for key, is_own in zip(keys, own, strict=True) if not is_own}
    ratios = [part.eval_ratio or 0 for part in parts]
    drawn = {key for key, number in zip(keys, part_of, strict=True) if draws.get(key, 1) < ratios[number]}
    drawn -= {key for key, number in zip(keys, part_of, strict=True) if parts[number].eval_ratio == 0}
    by_draw = sorted(draws, key=draws.__getitem__)
    if not own.any():
        if len(draws) == 1:
            names = ", ".join(dict.fromkeys(str(part.source) for part in parts))
            few = f"all {len(rows)} rows have the same prompt, and" if len(rows) > 1 else "1 row is too few:"
            advice = "it is either trained on or held out; name evaluation data with eval_split or eval_dataset"
            raise UserError(f"data set {names}: {few} {advice}")
        drawn |= set(by_draw[:1])
    if len(drawn) == len(draws):
        drawn -= set(by_draw[-1:])
    held_out = np.array([key in drawn for key in keys]) | own
    trained = {key for key, out in zip(keys, held_out, strict=True) if not out}
    shared = [n for n in np.flatnonzero(own & kept).tolist() if keys[n] in trained]
    if shared:
        place = f"{rows[shared[0]]['source']} row {rows[shared[0]]['row']}"
        text = "share their prompt with training rows, so metrics on them flatter"
        logger.warning("%s of the evaluation data %s (the first: %s)", plural(len(shared), "row"), text, place)
    return DatasetDict(
        train=rows.select(np.flatnonzero(kept & ~held_out)), test=rows.select(np.flatnonzero(kept & held_out))
    )


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()


def _draw(seed: int, key: bytes) -> float:
    """Return a number in [0, 1), uniform over the keys."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, salt=seed.to_bytes(16, "little")).digest()[:6]) / 2**48
