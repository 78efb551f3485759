"""All data loading: public SFT and preference data sets to conversations, checked row by row, and on to token ids.

A data set is a hub id, a local folder (anything `load_dataset` opens) or a local .jsonl, .json, .csv or .parquet file.
Its `train` split is used, or its only one. Columns beyond those in the tables of `sft_row` and `preference_row` are
left aside. A mistake in the data is a `UserError` that names the file and the row.
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    concatenate_datasets,
    get_dataset_config_names,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from chat_format import Message, encode
from hub import looks_like_path, quiet_lookup
from hyperparameters import DatasetSubset
from user_error import PassingError, UserError, nearest, one_line

EVAL_SHARE = 0.2
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_sft_dataset(dataset: str, dataset_subsets: list[DatasetSubset], seed: int) -> DatasetDict:
    """`train` and `test` (20%) rows of `prompt` (list of messages) and `completion` (text), for supervised fine-tuning.

    Each subset gives its share, drawn without replacement; the shares are concatenated, then split. `seed` fixes both,
    so every rank and every resume sees the same rows. Raises `UserError` for what is missing, malformed or too few.
    """
    parts = []
    names = [share.subset for share in dataset_subsets]
    for share in dataset_subsets:
        if names.count(share.subset) > 1:  # its rows would be trained on and held out at once
            raise UserError(f"dataset_subsets names subset {share.subset!r} more than once")
        rows, where = _load(dataset, share.subset)
        count = share.number_of_samples or max(1, round(len(rows) * share.ratio))
        if count > len(rows):
            raise UserError(f"{where()}: number_of_samples asks for {count} rows of {len(rows)}")
        picked = np.random.default_rng(seed).permutation(len(rows))[:count]
        parts.append(_convert(rows, picked, where, sft_row, ("prompt", "completion")))
    return _split(concatenate_datasets(parts), seed, dataset)


def load_dpo_dataset(datasets: list[str], seed: int) -> DatasetDict:
    """`train` and `test` (20%) pairs: `prompt` (list of messages), `chosen` and `rejected` (text of the answers).

    Each source is split on its own, so the evaluation split holds every source in proportion, and the held-out rows of
    a source are the same whatever stands beside it. Raises `UserError` for what is missing or malformed.
    """
    splits = []
    for name in datasets:
        rows, where = _load(name)
        pairs = _convert(rows, np.arange(len(rows)), where, preference_row, ("prompt", "chosen", "rejected"))
        splits.append(_split(pairs, seed, name))
    return DatasetDict({part: concatenate_datasets([split[part] for split in splits]) for part in ("train", "test")})


def sft_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an SFT data set as `prompt` and `completion`.

    | columns        | prompt      | completion | as in                    |
    |----------------|-------------|------------|--------------------------|
    | prompt, text   | a user turn | text       | HuggingFaceTB/cosmopedia |
    """
    return {"prompt": [_message("user", _text(row, "prompt"))], "completion": _text(row, "text")}


def preference_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a preference data set as `prompt`, `chosen` and `rejected`.

    | columns                            | prompt                          | as in                       |
    |------------------------------------|---------------------------------|-----------------------------|
    | system, question, chosen, rejected | system turn, user turn          | Intel/orca_dpo_pairs        |
    | system, prompt, chosen, rejected   | system turn, user turn          | jondurbin/truthy-dpo-v0.1   |
    | prompt, chosen, rejected           | user turn, or a list of turns   | many                        |
    | chosen, rejected                   | what the two have in common     | argilla/dpo-mix-7k          |

    An empty system text is no turn. `chosen` and `rejected` are texts or whole conversations, single- or multi-turn;
    conversations must agree in all turns but the last, alternate user and assistant, and end with the assistant.
    """
    _require(row, "chosen", "rejected")
    sides = {side: row[side] for side in ("chosen", "rejected")}
    for side, value in sides.items():
        if not isinstance(value, (str, list)):
            raise UserError(f"column {side!r} is {_short(value)}, neither text nor a list of turns")
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise UserError("one of chosen and rejected is text, the other a list of turns")
    if isinstance(row["chosen"], str):
        prompt, answers = _prompt_turns(row), sides
    else:
        conversations = {side: _turns(row, side) for side in sides}
        for side, turns in conversations.items():
            if not turns or turns[-1]["role"] != "assistant":
                raise UserError(f"{side} does not end with an assistant turn")
        prompt = conversations["chosen"][:-1]
        if prompt != conversations["rejected"][:-1]:
            raise UserError("the prompts of chosen and rejected differ")
        prompt = _with_system(row, prompt or _prompt_turns(row))
        answers = {side: turns[-1]["content"] for side, turns in conversations.items()}
    _check_alternation(prompt)
    return {"prompt": prompt, **answers}


def tokenize_sft_dataset(
    dataset: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    on_completions_only: bool,
    max_length: int | None,
    num_proc: int | None = None,
) -> DatasetDict:
    """`load_sft_dataset`'s rows as SFTTrainer takes them: `input_ids` and `labels`, -100 where unsupervised.

    SFTTrainer itself cuts rows to `max_length` tokens (or packs them); here those that will be cut are counted, in the
    `info.description` of a part, which stays with it on disk.
    """

    def tokenize(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, completion = encode(tokenizer, row["prompt"], row["completion"])
        masked = [-100] * len(prompt) if on_completions_only else prompt
        return {"input_ids": prompt + completion, "labels": masked + completion}

    tokenized = _map(dataset, tokenize, num_proc)
    for part in tokenized:
        longer = sum(len(ids) > (max_length or math.inf) for ids in tokenized[part]["input_ids"])
        if longer:
            tokenized[part].info.description = (
                f"{part} rows: {longer} of {len(tokenized[part])} are longer than max_seq_length ({max_length} tokens)"
                " and lose their end, EOS included"
            )
    return tokenized


def tokenize_dpo_dataset(
    dataset: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    max_prompt_length: int | None = None,
    max_target_length: int | None = None,
    num_proc: int | None = None,
) -> DatasetDict:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of `load_dpo_dataset`'s pairs, within the limits (in tokens).

    A prompt is cut from its left (its BOS stays), an answer from its right; `max_length` then bounds the two together,
    again at the answer's end. A pair whose prompt leaves no room for an answer is dropped. Both are counted in the
    `info.description` of a part, which stays with it on disk.
    """

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        prompt, chosen = encode(tokenizer, row["prompt"], row["chosen"])
        _, rejected = encode(tokenizer, row["prompt"], row["rejected"])
        kept = cut_prompt(prompt, max_prompt_length, tokenizer.bos_token_id)
        room = None if max_length is None else max(0, max_length - len(kept))
        limit = min((n for n in (max_target_length, room) if n is not None), default=None)
        answers = {"chosen_ids": chosen[:limit], "rejected_ids": rejected[:limit]}
        cut = len(kept) < len(prompt) or [chosen, rejected] != list(answers.values())
        return {"prompt_ids": kept, **answers, "cut": cut}

    tokenized = _map(dataset, tokenize, num_proc)
    fits = tokenized.filter(lambda row: len(row["chosen_ids"]) > 0, desc="Dropping pairs without room for an answer")
    for part in fits:
        dropped, cut = len(tokenized[part]) - len(fits[part]), sum(fits[part]["cut"])
        if not len(fits[part]):
            raise UserError(f"max_length {max_length} leaves no {part} pair room for an answer")
        fits[part] = fits[part].remove_columns("cut")
        if dropped or cut:
            fits[part].info.description = (
                f"{part} pairs: {cut} of {len(tokenized[part])} cut to the length limits, {dropped} dropped because the"
                " prompt alone fills max_length"
            )
    return fits


def cut_prompt(prompt_ids: list[int], max_prompt_length: int | None, bos_token_id: int | None) -> list[int]:
    """The last `max_prompt_length` ids of a prompt, where a BOS that it starts with takes the place of the first."""
    if max_prompt_length is None or len(prompt_ids) <= max_prompt_length:
        return prompt_ids
    tail = prompt_ids[-max_prompt_length:]
    return [bos_token_id, *tail[1:]] if prompt_ids[0] == bos_token_id else tail


def _map(dataset: DatasetDict, tokenize: Callable[[dict], dict], num_proc: int | None) -> DatasetDict:
    columns = dataset["train"].column_names
    return dataset.map(tokenize, remove_columns=columns, num_proc=num_proc, desc="Tokenizing")


def _load(name: str, subset: str | None = None) -> tuple[Dataset, Callable[..., str]]:
    """The rows of a data set, and a function that says in words where a row of it stands."""
    path = Path(name)
    described = name if subset is None else f"{name} (subset {subset})"
    if not path.exists() and (path.suffix in FILE_FORMATS or looks_like_path(name)):
        raise UserError(f"data set {name}: no such file or folder")
    args = [name, subset]
    kwargs: dict[str, Any] = {}
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise UserError(f"data set {name}: a file must end in one of {', '.join(FILE_FORMATS)}")
        if subset is not None:
            raise UserError(
                f"dataset_subsets names subset {subset!r}, which the single file {name} does not have: for all of its"
                " rows leave dataset_subsets out, for some set it to [{ratio: 0.5}]"
            )
        args, kwargs = [FILE_FORMATS[path.suffix]], {"data_files": {"train": name}}
    try:
        with quiet_lookup():
            splits = load_dataset(*args, **kwargs)
    except StopIteration:  # datasets 5.2 lets it out of a builder that met nothing but empty files
        raise UserError(f"data set {described}: it has no rows") from None
    except DatasetGenerationError as error:
        told = _malformed(args, kwargs) or f"data set {described}: {one_line(error.__cause__ or error)}"
        raise UserError(told) from error
    except (OSError, ValueError) as error:
        kind = PassingError if isinstance(error, OSError) and not path.exists() else UserError
        raise kind(f"data set {described}: {_not_loaded(name, subset, error)}") from error
    if "train" not in splits and len(splits) > 1:
        raise UserError(f"data set {described}: no train split among {', '.join(splits)}")
    split = "train" if "train" in splits else next(iter(splits))
    rows = splits[split]
    if len(rows) == 0:
        raise UserError(f"data set {described}: it has no rows")

    def where(row: int | None = None) -> str:
        if row is None:
            return f"data set {described}"
        for file in _local_files(args, kwargs, split):
            lines = _json_lines(file)
            if lines is None:  # not one row a line: the row's number must do
                break
            if row < len(lines):
                return f"{file} line {lines[row][0]}"
            row -= len(lines)
        return f"data set {described} row {row + 1}"

    return rows, where


def _not_loaded(name: str, subset: str | None, error: Exception) -> str:
    if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
        known = get_dataset_config_names(name)
        given = f"unknown subset {subset!r}{nearest(subset, known)}" if subset else "dataset_subsets must name a subset"
        return f"{given}: it has {', '.join(known)}"
    if Path(name).exists():
        return one_line(error)
    return f"no such file or folder, and not to be had from the hub ({one_line(error)})"


def _malformed(args: list[str], kwargs: dict[str, Any]) -> str | None:
    """What `load_dataset` could not read: the file and the line, where they are local and hold a row a line."""
    for file in _local_files(args, kwargs):
        for number, line in _json_lines(file) or []:
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as reason:
                problem = f"{reason.msg.removesuffix(' at')} at column {reason.colno}"
                return f"{file} line {number}: not JSON ({problem})"
            if not isinstance(row, dict):
                return f"{file} line {number}: not a JSON object"
    return None


def _local_files(args: list[str], kwargs: dict[str, Any], split: str = "train") -> list[str]:
    data_files = load_dataset_builder(*args, **kwargs).config.data_files or {}
    return [file for file in data_files.get(split, []) if Path(file).is_file()]


def _json_lines(file: str) -> list[tuple[int, str]] | None:
    """The numbered lines of a JSON Lines file that hold a row; None for any other file."""
    if Path(file).suffix not in (".jsonl", ".json"):
        return None
    with Path(file).open(encoding="utf-8", errors="replace") as lines:
        rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return None if rows and rows[0][1].lstrip().startswith("[") else rows


def _convert(
    rows: Dataset,
    picked: np.ndarray,
    where: Callable[..., str],
    convert_row: Callable[[dict], dict],
    columns: tuple[str, ...],
) -> Dataset:
    """The picked rows through `convert_row`, whose `UserError` is told with the row's place in its file."""
    converted: dict[str, list] = {column: [] for column in columns}
    picked = np.sort(picked)  # so that the first bad row in the file is the one told; the split shuffles anyway
    for index in picked:
        try:
            new_row = convert_row(rows[int(index)])
        except UnicodeDecodeError as error:
            raise UserError(f"{where(int(index))}: not UTF-8 text ({error.reason})") from error
        except _MissingColumn as error:
            raise UserError(f"{where()}: {error}") from error
        except UserError as error:
            raise UserError(f"{where(int(index))}: {error}") from error
        for column in columns:
            converted[column].append(new_row[column])
    return Dataset.from_dict(converted)


def _split(rows: Dataset, seed: int, name: str) -> DatasetDict:
    if len(rows) < 2:
        raise UserError(f"data set {name}: {len(rows)} row is too few to train on and hold {EVAL_SHARE:.0%} out")
    return rows.train_test_split(test_size=EVAL_SHARE, seed=seed)


class _MissingColumn(UserError):
    """Every row of the data set lacks it, so no row is to be named."""


def _require(row: dict[str, Any], *columns: str) -> None:
    for column in columns:
        if column not in row:
            raise _MissingColumn(f"column {column!r} is missing; it has {', '.join(row)}")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(row: dict[str, Any], column: str) -> str:
    _require(row, column)
    if not isinstance(row[column], str):
        raise UserError(f"column {column!r} is {_short(row[column])}, not text")
    return row[column]


def _turns(row: dict[str, Any], column: str) -> list[Message]:
    turns = row[column]
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise UserError(f"column {column!r}, turn {number}: {_short(turn)} has no role and content")
    return [_message(turn["role"], turn["content"]) for turn in turns]


def _prompt_turns(row: dict[str, Any]) -> list[Message]:
    column = "question" if "question" in row and "prompt" not in row else "prompt"
    _require(row, column)
    turns = _turns(row, column) if isinstance(row[column], list) else [_message("user", _text(row, column))]
    return _with_system(row, turns)


def _with_system(row: dict[str, Any], turns: list[Message]) -> list[Message]:
    if not row.get("system") or (turns and turns[0]["role"] == "system"):
        return turns
    return [_message("system", _text(row, "system")), *turns]


def _check_alternation(prompt: list[Message]) -> None:
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    for number, (turn, role) in enumerate(zip(turns, itertools.cycle(("user", "assistant")), strict=False), start=1):
        if turn["role"] != role:
            raise UserError(f"turn {number} is {turn['role']!r} where {role!r} is due: roles must alternate")
    if len(turns) % 2 == 0:
        raise UserError("the prompt does not end with a user turn")


def _short(value: Any) -> str:
    text = "null or missing" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
