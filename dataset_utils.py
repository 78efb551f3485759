"""All data loading: public SFT and preference data sets to conversations, checked row by row, and on to token ids.

A data set is a hub id, a local folder (anything `load_dataset` opens) or a local .jsonl, .json, .csv or .parquet file;
a folder holds files of one of these formats. Of it the `split` that is named is used, else `train`, else its only one.
The columns that are read are in the tables of `sft_conversation` and `preference_row`; `columns` in the YAML maps them
to what a data set calls them (`columns: {completion: answer}`), and others are left aside. A mistake in the data is a
`UserError` that names the file and the row.

What `tokenize_*_dataset` cuts or drops, and why, it counts in the `info.description` of each part, which stays with it
on disk; `losses` reads it and `told_losses` puts it into words.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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

from chat_format import Message, encode, encode_conversation
from config.hyperparameters import DataSource
from errors import PassingError, UserError, nearest, one_line
from storage.hub import looks_like_path, quiet_lookup
from storage.shared_cache import fingerprint

EVAL_SHARE = 0.2
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SFT_SHAPES = (
    ("messages",), ("conversations",), ("prompt", "completion"), ("prompt", "text"), ("instruction", "output"),
)  # fmt: skip
SFT_COLUMNS = ("system", "messages", "conversations", "prompt", "completion", "text", "instruction", "input", "output")
PREFERENCE_COLUMNS = ("system", "prompt", "question", "conversations", "chosen", "rejected")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
MANY = 0.05  # the share of rows cut or dropped from which on a limit is likely a mistake

# What a row can lose to a limit: the part of it, and whether the whole row goes.
LOST_END = "longer than max_seq_length: loses its end, and the EOS that teaches the model to stop"
NO_ANSWER = "no answer begins within max_seq_length"
LOST_START = "prompt longer than max_prompt_length: loses its beginning"
LOST_TARGET = "answer longer than max_target_length: loses its end and EOS"
LOST_TAIL = "prompt and answer longer than max_length: the answer loses its end and EOS"
NO_PROMPT = "max_prompt_length leaves the last turn no room beside its header"
NO_ROOM = "the prompt alone fills max_length"
EMPTY = "an answer without text: all that is learned from it is to stop"
CUT = {LOST_END, LOST_START, LOST_TARGET, LOST_TAIL}
DROPPED = {NO_ANSWER, NO_PROMPT, NO_ROOM}
LIMITS = {  # to raise
    **dict.fromkeys((LOST_END, NO_ANSWER), "max_seq_length"),
    **dict.fromkeys((LOST_START, NO_PROMPT), "max_prompt_length"),
    **dict.fromkeys((LOST_TARGET,), "max_target_length"),
    **dict.fromkeys((LOST_TAIL, NO_ROOM), "max_length"),
}

Where = Callable[..., str]  # says in words where a row of a data set stands, or without a row which data set it is
OnSource = Callable[[DataSource, int | None, int], None]  # told of each: rows found (None: streamed), and rows taken


def load_sft_dataset(
    sources: list[DataSource], seed: int, streaming: bool = False, on_source: OnSource | None = None
) -> DatasetDict:
    """`train` and `test` (20%) rows of `messages`, with the `source` and `row` they are from, for fine-tuning.

    Each source gives its share, drawn without replacement; the shares are concatenated, then split. `seed` fixes both,
    so every rank and every resume sees the same rows. With `streaming`, `number_of_samples` of each are downloaded, the
    first of ten or more files in random order, and kept in the data sets' cache. Raises `UserError` for what is
    missing, malformed or too few.
    """
    parts = []
    _check_apart(sources)
    for source in sources:
        rows, where = _stream(source, seed) if streaming else _load(source)
        picked = np.random.default_rng(seed).permutation(len(rows))[: _share(source, len(rows), where)]
        if on_source:
            on_source(source, None if streaming else len(rows), len(picked))
        parts.append(_convert(rows, picked, where, source, sft_conversation, SFT_COLUMNS))
    return _split(concatenate_datasets(parts), seed, sources[0].name)


def load_dpo_dataset(sources: list[DataSource], seed: int, on_source: OnSource | None = None) -> DatasetDict:
    """`train` and `test` (20%) pairs: `prompt` (list of messages), `chosen` and `rejected` (text of the answers), with
    the `source` and `row` they are from.

    Each source is split on its own and gives its share of both parts. So the evaluation split holds every source in
    proportion, and what is held out of a source is held out whatever its share, and whatever stands beside it. Raises
    `UserError` for what is missing or malformed.
    """
    parts: dict[str, list[Dataset]] = {"train": [], "test": []}
    _check_apart(sources)
    for source in sources:
        rows, where = _load(source)
        count = _share(source, len(rows), where)
        split = _split(Dataset.from_dict({"index": range(len(rows))}), seed, source.name)
        if count < 2:
            raise UserError(f"{where()}: {count} row is too few to train on and hold {EVAL_SHARE:.0%} out")
        held_out = math.ceil(EVAL_SHARE * count)
        counts = {"train": count - held_out, "test": held_out}
        if on_source:
            on_source(source, len(rows), count)
        picked = {part: np.array(split[part]["index"][: counts[part]]) for part in parts}
        pairs = _convert(rows, np.concatenate(list(picked.values())), where, source, preference_row, PREFERENCE_COLUMNS)
        for part, indices in picked.items():
            parts[part].append(pairs.select(np.searchsorted(pairs["row"][:], indices + 1)))
    return DatasetDict({part: concatenate_datasets(parts[part]) for part in parts})


def load_prompts(source: DataSource) -> Dataset:
    """Questions to ask: `prompt` (list of messages, the user's last) and `preferred` (the answer that is known to be
    good, or None), with the `source` and `row` they are from.

    A .txt file holds one a line. Any other data set has rows as in `preference_row` or `sft_conversation`, whose
    answers may be missing. Raises `UserError` for what is missing or malformed.
    """
    if source.name.endswith(".txt"):
        try:
            lines = Path(source.name).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{source.name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{source.name}: not UTF-8 text ({error.reason})") from error
        asked = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
        rows = [
            {"prompt": [_message("user", text)], "preferred": None, "source": source.name, "row": number}
            for number, text in asked
        ]
        if not rows:
            raise UserError(f"{source.name}: it holds no question")
        return Dataset.from_list(rows)
    if Path(source.name).is_file() and Path(source.name).suffix not in FILE_FORMATS:
        raise UserError(f"{source.name}: a file of questions ends in one of .txt, {', '.join(FILE_FORMATS)}")
    rows, where = _load(source)
    return _convert(rows, np.arange(len(rows)), where, source, _prompt_row, (*SFT_COLUMNS, *PREFERENCE_COLUMNS))


def sft_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an SFT data set as `messages`, a conversation in which every assistant turn is to be learned.

    | columns                    | conversation                                       | as in                        |
    |----------------------------|----------------------------------------------------|------------------------------|
    | messages                   | turns: `role` (user, assistant, system), `content` | HuggingFaceH4/ultrachat_200k |
    | conversations              | turns: `from` (human, gpt, system), `value`        | teknium/OpenHermes-2.5       |
    | prompt, completion         | user, assistant; or turns, and what follows them   | TRL's prompt-completion      |
    | prompt, text               | user, assistant                                    | HuggingFaceTB/cosmopedia     |
    | instruction, input, output | user (the first two), assistant                    | tatsu-lab/alpaca             |

    The first shape whose columns are there is taken. A `system` column opens the conversation; an empty one, or an
    empty `input`, is left out. After a system turn, user and assistant alternate, and the assistant has the last word.
    """
    shape = next((shape for shape in SFT_SHAPES if all(column in row for column in shape)), None)
    if shape is None:
        shapes = " | ".join(", ".join(shape) for shape in SFT_SHAPES)
        raise _MissingColumn(
            f"its columns ({', '.join(row)}) have no shape of SFT data: {shapes}; columns renames them"
        )
    if len(shape) == 1:
        messages = _turns(row, *shape)
    else:
        prompt = _instruction(row) if shape[0] == "instruction" else _prompt_turns(row, ("prompt",))
        messages = [*prompt, *_answer_turns(row, shape[1])]
    messages = _with_system(row, messages)
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("the conversation does not end with an assistant turn")
    _check_alternation(messages[:-1])
    return {"messages": messages}


def preference_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a preference data set as `prompt`, `chosen` and `rejected`.

    | columns                            | prompt                          | as in                       |
    |------------------------------------|---------------------------------|-----------------------------|
    | system, question, chosen, rejected | system turn, user turn          | Intel/orca_dpo_pairs        |
    | system, prompt, chosen, rejected   | system turn, user turn          | jondurbin/truthy-dpo-v0.1   |
    | prompt, chosen, rejected           | user turn, or a list of turns   | many                        |
    | conversations, chosen, rejected    | its turns                       | ShareGPT's                  |
    | chosen, rejected                   | what the two have in common     | argilla/dpo-mix-7k          |

    An empty system text is no turn. `chosen` and `rejected` are texts, single turns or whole conversations; turns are
    mappings of `role` and `content`, or of `from` (human, gpt, system) and `value`. Conversations must agree in all
    turns but the last, alternate user and assistant, and end with the assistant.
    """
    _require(row, "chosen", "rejected")
    sides = {side: [row[side]] if isinstance(row[side], dict) else row[side] for side in ("chosen", "rejected")}
    for side, value in sides.items():
        if not isinstance(value, (str, list)):
            raise UserError(f"column {side!r} is {_short(value)}, neither text nor a list of turns")
    if isinstance(sides["chosen"], str) != isinstance(sides["rejected"], str):
        raise UserError("one of chosen and rejected is text, the other a list of turns")
    if isinstance(sides["chosen"], str):
        prompt, answers = _prompt_turns(row), sides
    else:
        conversations = {side: _turns(sides, side) for side in sides}
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
    num_proc: int | None = None,
    *,
    on_completions_only: bool,
    max_length: int | None,
    every_row: bool = False,
) -> DatasetDict:
    """`load_sft_dataset`'s rows as SFTTrainer takes them: `input_ids` and `labels`, -100 where unsupervised.

    A row is cut from its end to `max_length` tokens, and dropped if nothing supervised is left. With `every_row` none
    is dropped, and further columns tell where a row is from, how long it was, how much of it is learned (tokens) and
    what it has lost.
    """

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        ids, said = encode_conversation(tokenizer, row["messages"])
        labels = [
            token if learned or not on_completions_only else -100 for token, learned in zip(ids, said, strict=True)
        ]
        lost = [EMPTY] if any(not m["content"].strip() for m in row["messages"] if m["role"] == "assistant") else []
        if max_length is not None and len(ids) > max_length:
            lost.append(LOST_END if any(label != -100 for label in labels[:max_length]) else NO_ANSWER)
        lengths = {"prompt": len(ids) - sum(said), "completion": sum(said), "total": len(ids)}
        learned = sum(label != -100 for label in labels[:max_length])
        return {"input_ids": ids[:max_length], "labels": labels[:max_length], **_fate(row, lengths, learned, lost)}

    return _tokenized(dataset, tokenize, num_proc, every_row)


def tokenize_dpo_dataset(
    dataset: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None = None,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    max_target_length: int | None = None,
    every_row: bool = False,
) -> DatasetDict:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of `load_dpo_dataset`'s pairs, within the limits (in tokens).

    A prompt is cut from its left (see `cut_prompt`), an answer from its right; `max_length` then bounds the two
    together, again at the answer's end. A pair without room for its answers is dropped. `every_row` as for SFT.
    """

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        prompt, chosen = encode(tokenizer, row["prompt"], row["chosen"])
        _, rejected = encode(tokenizer, row["prompt"], row["rejected"])
        longest = max(len(chosen), len(rejected))
        lengths = {"prompt": len(prompt), "chosen": len(chosen), "rejected": len(rejected)}
        lengths["total"] = len(prompt) + longest
        lost = [] if row["chosen"].strip() and row["rejected"].strip() else [EMPTY]
        if max_prompt_length is not None and len(prompt) > max_prompt_length:
            shorter = cut_prompt(tokenizer, row["prompt"], max_prompt_length)
            prompt = encode(tokenizer, shorter)[0] if shorter else []
            lost.append(LOST_START if shorter else NO_PROMPT)
        if max_target_length is not None and longest > max_target_length:
            longest = max_target_length
            lost.append(LOST_TARGET)
        if max_length is not None and len(prompt) + longest > max_length:
            longest = max(0, max_length - len(prompt))
            lost.append(LOST_TAIL if longest else NO_ROOM)
        answers = {"chosen_ids": chosen[:longest], "rejected_ids": rejected[:longest]}
        return {"prompt_ids": prompt, **answers, **_fate(row, lengths, sum(map(len, answers.values())), lost)}

    return _tokenized(dataset, tokenize, num_proc, every_row)


def cut_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], max_prompt_length: int
) -> list[Message] | None:
    """The end of a prompt, as a conversation of at most `max_prompt_length` tokens with BOS and every header.

    Turns go from the left; of the first that is left, the content loses its beginning and the header stays. None where
    nothing of the last turn's content has room.
    """

    def fits(messages: list[Message]) -> bool:
        try:
            return len(encode(tokenizer, messages)[0]) <= max_prompt_length
        except UserError:  # some models' own templates refuse to begin with an answer
            return False

    for number, turn in enumerate(prompt):
        later = prompt[number + 1 :]
        if later and not fits(later):
            continue
        low, high = 0, len(turn["content"]) + 1  # characters kept: `low` fit (or nothing does), `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits([_last(turn, middle), *later]) else (low, middle)
        if low:
            return [_last(turn, low), *later]
        return later or None
    return None


def _last(turn: Message, characters: int) -> Message:
    return {**turn, "content": turn["content"][len(turn["content"]) - characters :]}


class Loss(NamedTuple):
    """What rows of a part lost, to a limit or otherwise: one of the sentences above."""

    what: str
    rows: int
    share: float  # of the part's rows
    example: str  # where the first of them is


def losses(part: Dataset) -> list[Loss]:
    """What the rows of a tokenized part have lost, what lost most first."""
    found = [Loss(*loss) for loss in json.loads(part.info.description or "[]")]
    return sorted(found, key=lambda loss: (loss.what not in DROPPED, loss.what == EMPTY, -loss.rows))


def told_losses(name: str, part: Dataset) -> Iterator[str]:
    """A line for each, for a log; what is much is told with the limit to raise."""
    for what, rows, share, example in losses(part):
        fate = " dropped" if what in DROPPED else " cut" if what in CUT else ""
        advice = f"; raise {LIMITS[what]}" if what in LIMITS and share > MANY else ""
        counted = f"{rows} {'row' if rows == 1 else 'rows'} ({share:.1%})"
        yield f"{name}: {counted}{fate}: {what} (the first: {example}){advice}"


def rows_that_lost(rows: Dataset) -> dict[str, list[int]]:
    """The indices of those of `every_row` that lost something, by what it was, in the order of their sources."""
    losers: dict[str, list[int]] = {}
    for index, lost in enumerate(rows["lost"][:]):
        for what in lost.splitlines():
            losers.setdefault(what, []).append(index)
    places = list(zip(rows["source"][:], rows["row"][:], strict=True))
    return {what: sorted(indices, key=places.__getitem__) for what, indices in losers.items()}


def _fate(row: dict[str, Any], lengths: dict[str, int], learned: int, lost: list[str]) -> dict[str, Any]:
    return {
        **{"source": row["source"], "row": row["row"], "lost": "\n".join(lost), "learned": learned},
        **{f"{name}_length": length for name, length in lengths.items()},
    }


def _tokenized(
    dataset: DatasetDict, tokenize: Callable[[dict], dict], num_proc: int | None, every_row: bool
) -> DatasetDict:
    columns = next(iter(dataset.values())).column_names
    tokenized = dataset.map(tokenize, remove_columns=columns, num_proc=num_proc, desc="Tokenizing")
    for name, rows in tokenized.items():
        losers, found = rows_that_lost(rows), []
        for what, indices in losers.items():
            first = rows[indices[0]]
            found.append(Loss(what, len(indices), len(indices) / len(rows), f"{first['source']} row {first['row']}"))
        if not every_row:
            dropped = {index for what in losers if what in DROPPED for index in losers[what]}
            kept = [index for index in range(len(rows)) if index not in dropped]
            if not kept:
                what = next(what for what in losers if what in DROPPED)
                raise UserError(f"{LIMITS[what]} is too small: no {name} row is left ({what})")
            ids = [column for column in rows.column_names if column.endswith("ids") or column == "labels"]
            tokenized[name] = (rows.select(kept) if dropped else rows).select_columns(ids)
        tokenized[name].info.description = json.dumps(found)
    return tokenized


def _split_of(source: DataSource) -> str:
    """The split that the source names, or most likely means, without a slice."""
    return (source.split or "train").split("[")[0]


def _check_apart(sources: list[DataSource]) -> None:
    """Refuse one that is named twice: some of its rows would be trained on and held out at once, or count twice."""
    seen = set()
    for source in sources:
        rows = (source.name, source.subset or "default", _split_of(source))
        if rows in seen:
            raise UserError(f"data set {source} is named more than once")
        seen.add(rows)


def _share(source: DataSource, found: int, where: Where) -> int:
    """How many of the rows found to take."""
    count = source.number_of_samples or max(1, round(found * (1.0 if source.ratio is None else source.ratio)))
    if count > found:
        raise UserError(f"{where()}: number_of_samples asks for {count} rows of {found}")
    return count


def _load(source: DataSource) -> tuple[Dataset, Where]:
    args, kwargs = _arguments(source)
    with _told(source, args, kwargs):
        splits = load_dataset(*args, split=source.split, **kwargs)
    split, rows = _chosen_split(source, splits)
    if len(rows) == 0:
        raise UserError(f"data set {source}: it has no rows")

    def where(row: int | None = None) -> str:
        if row is None:
            return f"data set {source}"
        for file in _local_files(args, kwargs, split):
            lines = _json_lines(file)
            if lines is None:  # not one row a line: the row's number must do
                break
            if row < len(lines):
                return f"{file} line {lines[row][0]}"
            row -= len(lines)
        return f"data set {source} row {row + 1}"

    return rows, where


def _stream(source: DataSource, seed: int) -> tuple[Dataset, Where]:
    """`number_of_samples` rows drawn from a source that is read only as far as it takes, kept in datasets' cache.

    `source.number_of_samples` must be set.
    """
    args, kwargs = _arguments(source)
    with _told(source, args, kwargs):
        builder = load_dataset_builder(*args, **kwargs)
        split, rows = _chosen_split(source, load_dataset(*args, split=source.split, streaming=True, **kwargs))
        # Shuffling draws from a buffer of 1000 rows, filled from ten files at a time, which it takes in random order
        # and each from its beginning: no uniform sample, which would need all of them.
        drawn = rows.shuffle(seed=seed).take(source.number_of_samples)
        rows = Dataset.from_generator(
            lambda: iter(drawn),
            features=drawn.features,
            # Its own key would be of the lambda. The builder's hash is the commit on the hub, or the files' state.
            fingerprint=fingerprint(*(args, builder.hash, builder.config_id, split, source.number_of_samples, seed)),
        )
    if len(rows) < source.number_of_samples:
        raise UserError(f"data set {source}: number_of_samples asks for {source.number_of_samples} rows of {len(rows)}")
    return rows, lambda row=None: f"data set {source}" + ("" if row is None else f" row {row + 1} of those streamed")


def _arguments(source: DataSource) -> tuple[list[str | None], dict[str, Any]]:
    """What `load_dataset` is to be called with for a source."""
    path = Path(source.name)
    if not path.exists() and (path.suffix in FILE_FORMATS or looks_like_path(source.name)):
        raise UserError(f"data set {source.name}: no such file or folder")
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise UserError(f"data set {source.name}: a file must end in one of {', '.join(FILE_FORMATS)}")
        if source.subset is not None:
            raise UserError(
                f"data set {source.name}: a single file has no subset {source.subset!r}: for all of its rows leave it"
                " out (for SFT, set dataset_subsets to [{ratio: 1.0}])"
            )
        return [FILE_FORMATS[path.suffix]], {"data_files": {"train": source.name}}
    if path.is_dir() and not (path / "README.md").exists():  # where a README may say which files are a subset's
        formats = {FILE_FORMATS[file.suffix]: file.name for file in path.iterdir() if file.suffix in FILE_FORMATS}
        if len(formats) > 1:
            raise UserError(
                f"data set {source.name}: it holds files of several formats ({', '.join(formats.values())}), of which"
                " only one would be read; make a folder of each"
            )
    return [source.name, source.subset], {}


@contextmanager
def _told(source: DataSource, args: list[str | None], kwargs: dict[str, Any]) -> Iterator[None]:
    """What the library says to a source that it cannot load, in one line."""
    try:
        with quiet_lookup():
            yield
    except UserError:
        raise
    except StopIteration:  # datasets 5.2 lets it out of a builder that met nothing but empty files
        raise UserError(f"data set {source}: it has no rows") from None
    except DatasetGenerationError as error:
        reason = error.__cause__ or error
        told = _malformed(args, kwargs, _split_of(source)) or f"data set {source}: {one_line(reason)}"
        raise (PassingError if _may_pass(source, reason) else UserError)(told) from error
    except Exception as error:  # a hub's client raises what its HTTP library does
        if not isinstance(error, (OSError, ValueError)) and Path(source.name).exists():
            raise
        if "corresponds to no data" in str(error):
            raise UserError(f"data set {source}: it has no rows") from None
        told = f"data set {source}: {_not_loaded(source, error)}"
        raise (PassingError if _may_pass(source, error) else UserError)(told) from error


def _may_pass(source: DataSource, error: BaseException) -> bool:
    """Whether it may be the hub's or the network's: these raise errors of many kinds, but what is wrong is a value."""
    return not Path(source.name).exists() and not isinstance(error, ValueError)


def _chosen_split(source: DataSource, loaded: Any) -> tuple[str, Any]:
    """The name of the split that is used, and its rows; `loaded` is what `load_dataset` has given."""
    if source.split is not None:
        return source.split, loaded
    if "train" not in loaded and len(loaded) > 1:
        raise UserError(f"data set {source}: no train split among {', '.join(loaded)}; choose one with split")
    split = "train" if "train" in loaded else next(iter(loaded))
    return split, loaded[split]


def _not_loaded(source: DataSource, error: Exception) -> str:
    name, subset = source.name, source.subset
    if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
        known = get_dataset_config_names(name)
        given = f"unknown subset {subset!r}{nearest(subset, known)}" if subset else "dataset_subsets must name a subset"
        return f"{given}: it has {', '.join(known)}"
    if Path(name).exists() or "split" in str(error):
        return one_line(error)
    return f"no such file or folder, and not to be had from the hub ({one_line(error)})"


def _malformed(args: list[str], kwargs: dict[str, Any], split: str) -> str | None:
    """What `load_dataset` could not read: the file and the line, where they are local and hold a row a line."""
    for file in _local_files(args, kwargs, split):
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
    where: Where,
    source: DataSource,
    convert_row: Callable[[dict], dict],
    known: tuple[str, ...],
) -> Dataset:
    """The picked rows, in the source's order, through `convert_row`; `known` are the columns that it reads.

    Its `UserError` is told with the row's place in its file: that of the first row with a mistake.
    """
    for column, theirs in source.columns.items():
        if column not in known:
            raise UserError(f"columns.{column}: no column of that name is read{nearest(column, known)}")
        if theirs not in rows.column_names:
            has = f"it has {', '.join(rows.column_names)}"
            raise UserError(
                f"columns.{column}: {where()} has no column {theirs!r}{nearest(theirs, rows.column_names)}; {has}"
            )
    converted: dict[str, list] = {}
    for index in map(int, np.sort(picked)):
        try:
            row = rows[index]
            renamed = {column: row[theirs] for column, theirs in source.columns.items()}
            others = {column: value for column, value in row.items() if column not in source.columns.values()}
            new_row = convert_row(readable := _Reading({**others, **renamed}))
            for column in renamed.keys() - readable.read:
                raise UserError(f"columns.{column} is not read: the row has the columns of another shape as well")
        except UnicodeDecodeError as error:
            raise UserError(f"{where(index)}: not UTF-8 text ({error.reason})") from error
        except _MissingColumn as error:
            raise UserError(f"{where()}: {error}") from error
        except UserError as error:
            raise UserError(f"{where(index)}: {error}") from error
        for column, value in {**new_row, "source": str(source), "row": index + 1}.items():
            converted.setdefault(column, []).append(value)
    return Dataset.from_dict(converted)


def _split(rows: Dataset, seed: int, name: str) -> DatasetDict:
    if len(rows) < 2:
        raise UserError(f"data set {name}: {len(rows)} row is too few to train on and hold {EVAL_SHARE:.0%} out")
    return rows.train_test_split(test_size=EVAL_SHARE, seed=seed)


class _Reading(dict):
    """A row that remembers which of its columns were read."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.read.add(column)
        return super().get(column, default)


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
    if not isinstance(row[column], list):
        raise UserError(f"column {column!r} is {_short(row[column])}, not a list of turns")
    turns = []
    for number, turn in enumerate(row[column], start=1):
        for keys in (("role", "content"), ("from", "value")):
            if isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in keys):
                role, content = (turn[key] for key in keys)
                turns.append(_message(ROLES.get(role, role), content))
                break
        else:
            raise UserError(f"column {column!r}, turn {number}: {_short(turn)} has no role and content as text")
    return turns


def _prompt_turns(
    row: dict[str, Any], columns: tuple[str, ...] = ("prompt", "question", "conversations")
) -> list[Message]:
    column = next((column for column in columns if column in row), columns[0])
    _require(row, column)
    turns = _turns(row, column) if isinstance(row[column], list) else [_message("user", _text(row, column))]
    return _with_system(row, turns)


def _answer_turns(row: dict[str, Any], column: str) -> list[Message]:
    return _turns(row, column) if isinstance(row[column], list) else [_message("assistant", _text(row, column))]


def _instruction(row: dict[str, Any]) -> list[Message]:
    given = _text(row, "input") if row.get("input") else ""
    return [_message("user", _text(row, "instruction") + (f"\n\n{given}" if given else ""))]


def _prompt_row(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("chosen") is not None and row.get("rejected") is not None:
        pair = preference_row(row)
        turns, preferred = pair["prompt"], pair["chosen"]
    else:
        columns = ("prompt", "question", "messages", "conversations")
        asked = [column for column in columns if row.get(column) is not None]
        instructed = row.get("instruction") is not None
        if not asked and not instructed:
            known = ", ".join((*columns, "instruction"))
            raise UserError(f"no column of it asks ({', '.join(row)}): one of {known} does, and columns renames others")
        turns = _instruction(row) if instructed else _prompt_turns(row, tuple(asked))
        preferred = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
        answers = [column for column in ("chosen", "completion", "text", "output") if row.get(column)]
        if preferred is None and answers:
            preferred = _answer_turns(row, answers[0])[-1]["content"]
        turns = _with_system(row, turns)
    _check_alternation(turns)
    if not turns[-1]["content"].strip():
        raise UserError("the question is empty")
    return {"prompt": turns, "preferred": preferred}


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
