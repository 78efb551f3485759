"""Load SFT and preference data sets as checked conversations, and tokenize them.

A data set is a hub id, a local folder (anything that `load_dataset` opens) or a local .jsonl, .json, .csv or .parquet
file. A folder holds files of one of these formats. The rows come from the `split` that the YAML names, else from
`train`, else from the only split. `data/formats.py` lists the columns that are read; `columns` in the YAML maps them to
the data set's own names (`columns: {completion: answer}`), and all other columns are ignored. All `load_*` functions
raise a `UserError` that names the file and the row for data that is missing, malformed or too little.

`tokenize_*_dataset` counts the rows that it cuts or drops: see `data/truncation.py`.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

import chat_format
from chat_format import encode, encode_conversation
from config.hyperparameters import DEFAULT_EVAL_RATIO, DataSource
from data import formats, truncation
from data.sources import FILE_FORMATS, convert_rows, load_source, refuse_overlaps
from data.splitting import SourceCounts, SourceRows, split_by_prompt
from data.truncation import Truncation
from errors import UserError, about
from metrics.evaluations import Evaluations
from storage.fingerprints import fingerprint, hash_rows, hash_tokenizer
from storage.shared_cache import make_once, once_per_node

if TYPE_CHECKING:
    from trial.context import Trial

logger = logging.getLogger(__name__)

OnSource = Callable[[SourceCounts], None]


def load_sft_dataset(
    sources: list[DataSource], seed: int, streaming: bool = False, on_source: OnSource | None = None
) -> DatasetDict:
    """Load `train` and `test` rows for fine-tuning: `messages`, and the `source` and `row` they are from.

    The requested rows of each source are drawn without replacement. What is held out is evaluation data that a source
    names, or an `eval_ratio` of the prompts: see `split_by_prompt`. `seed` fixes the draw and the split, so every rank
    and every resume sees the same rows. With `streaming`, a source is read only as far as its `number_of_samples` rows
    need, which shuffles within about ten files at a time; `datasets` keeps them in its cache. (Evaluation data is not
    streamed: all of it is read.)
    """
    return _load(sources, seed, streaming, on_source, formats.sft_conversation, formats.SFT_COLUMNS)


def load_dpo_dataset(
    sources: list[DataSource], seed: int, on_source: OnSource | None = None, evaluation: Collection[DataSource] = ()
) -> DatasetDict:
    """Load `train` and `test` pairs: `prompt` (list of messages), `chosen` and `rejected` (texts of the answers), and
    the `source` and `row` they are from.

    They are drawn and held out as by `load_sft_dataset`. The rows of `evaluation` are in `test` as well. (`train` is
    read though some only want `test`: evaluation data that shares prompts with it is told.)
    """
    return _load(sources, seed, False, on_source, formats.preference_row, formats.PREFERENCE_COLUMNS, evaluation)


def _load(
    sources: list[DataSource],
    seed: int,
    streaming: bool,
    on_source: OnSource | None,
    convert: Callable[[Mapping[str, Any]], dict[str, Any]],
    columns: Collection[str],
    evaluation: Collection[DataSource] = (),
) -> DatasetDict:
    def draw(source: DataSource, eval_ratio: float | None, streamed: bool = False) -> SourceRows:
        loaded = load_source(source, stream_seed=seed if streamed else None)
        indices = np.random.default_rng(seed).permutation(len(loaded.rows))[: loaded.sample_size()]
        rows = convert_rows(loaded, indices, convert, columns)
        return SourceRows(source, None if streamed else len(loaded.rows), rows, eval_ratio)

    evaluation, parts = refuse_overlaps(sources, evaluation), []
    for source in sources:
        ratio = 0.0 if source.evaluation else source.eval_ratio or DEFAULT_EVAL_RATIO
        parts.append(draw(source, ratio, streaming))
    for source in evaluation:
        with about("evaluation data"):
            parts.append(draw(source, eval_ratio=None))
    return split_by_prompt(parts, seed, on_source)


def load_prompts(source: DataSource) -> Dataset:
    """Load questions: `prompt` (list of messages, the user's last), `preferred` (an answer known to be good, or None),
    and the `source` and `row` they are from.

    A .txt file holds one question on each line. Any other data set has the columns of `preference_row` or of
    `sft_conversation`, and its answers may be missing.
    """
    if source.name.endswith(".txt"):
        try:
            lines = Path(source.name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source.name}: {getattr(error, 'strerror', 'not UTF-8 text')}") from error
        texts = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
        if not texts:
            raise UserError(f"{source.name}: it holds no question")
        common = {"preferred": None, "source": source.name}
        return Dataset.from_list(
            [{"prompt": [{"role": "user", "content": text}], **common, "row": number} for number, text in texts]
        )
    if Path(source.name).is_file() and Path(source.name).suffix not in FILE_FORMATS:
        raise UserError(f"{source.name}: a file of questions ends in one of .txt, {', '.join(FILE_FORMATS)}")
    loaded = load_source(source)
    columns = (*formats.SFT_COLUMNS, *formats.PREFERENCE_COLUMNS)
    return convert_rows(loaded, np.arange(len(loaded.rows)), formats.prompt_row, columns)


def tokenize_sft_dataset(
    dataset: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None = None,
    *,
    on_completions_only: bool,
    max_length: int | None,
    every_row: bool = False,
) -> DatasetDict:
    """Tokenize rows of `load_sft_dataset` to what SFTTrainer takes: `input_ids`, and `labels` with -100 where a token
    is not learned.

    A row is cut from its end to `max_length` tokens, and dropped if nothing that is learned is left. With `every_row`,
    no row is dropped, and further columns say where a row is from (`source`, `row`), what it loses (`truncations`), how
    many of its tokens are learned (`learned`), and how many it had (`prompt_length`, `completion_length`,
    `total_length`).
    """

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        ids, is_answer = encode_conversation(tokenizer, row["messages"])
        labels = np.where(is_answer, ids, -100).tolist() if on_completions_only else ids
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        truncations = [] if all(answer.strip() for answer in answers) else [Truncation.EMPTY_ANSWER]
        learned = sum(label != -100 for label in labels[:max_length])
        if max_length is not None and len(ids) > max_length:
            truncations.append(Truncation.SEQUENCE_END if learned else Truncation.NO_ANSWER)
        lengths = {"prompt_length": len(ids) - sum(is_answer), "completion_length": sum(is_answer)}
        return {
            **{"input_ids": ids[:max_length], "labels": labels[:max_length]},
            **{"truncations": truncations, "learned": learned, **lengths, "total_length": len(ids)},
        }

    columns = {"input_ids": "int32", "labels": "int64"}
    return _tokenize(dataset, tokenize, num_proc, every_row, columns, ("prompt", "completion", "total"))


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
    """Tokenize pairs of `load_dpo_dataset` to `prompt_ids`, `chosen_ids` and `rejected_ids` within the limits (tokens).

    A prompt is cut from its left (see `cut_prompt`), an answer from its right. `max_length` then limits prompt and
    answer together, again at the answer's end. A pair without room for its answers is dropped. `every_row` adds the
    same columns as for SFT; the lengths are `prompt_length`, `chosen_length`, `rejected_length` and `total_length` (the
    prompt and the longer answer). A pair keeps its `source` and `row`, by which `evaluations.json` names it.
    """

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        prompt, chosen = encode(tokenizer, row["prompt"], row["chosen"])
        _, rejected = encode(tokenizer, row["prompt"], row["rejected"])
        limit = max(len(chosen), len(rejected))  # of both answers' tokens
        lengths = {"prompt_length": len(prompt), "chosen_length": len(chosen), "rejected_length": len(rejected)}
        lengths["total_length"] = len(prompt) + limit
        truncations = [] if row["chosen"].strip() and row["rejected"].strip() else [Truncation.EMPTY_ANSWER]
        if max_prompt_length is not None and len(prompt) > max_prompt_length:
            end = truncation.cut_prompt(tokenizer, row["prompt"], max_prompt_length)
            prompt = encode(tokenizer, end)[0] if end else []
            truncations.append(Truncation.PROMPT_START if end else Truncation.NO_PROMPT)
        if max_target_length is not None and limit > max_target_length:
            limit = max_target_length
            truncations.append(Truncation.ANSWER_END)
        if max_length is not None and len(prompt) + limit > max_length:
            limit = max(0, max_length - len(prompt))
            truncations.append(Truncation.PAIR_END if limit else Truncation.NO_ROOM)
        chosen, rejected = chosen[:limit], rejected[:limit]
        if chosen and chosen == rejected:
            truncations.append(Truncation.SAME_ANSWERS)
        return {
            **{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected},
            **{"truncations": truncations, "learned": len(chosen) + len(rejected), **lengths},
        }

    columns = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), "int64")
    lengths = ("prompt", "chosen", "rejected", "total")
    return _tokenize(dataset, tokenize, num_proc, every_row, columns, lengths, ["source", "row"])


def tokenize_once(
    trial: "Trial", tokenize: Callable[..., DatasetDict], rows: DatasetDict, tokenizer: PreTrainedTokenizerBase
) -> DatasetDict:
    """Tokenize with the trial's `tokenize_options`, once for all trials and starts that share a cache folder.

    Every rank reads it from the disk. TRL caches the reference log-probs in the same folder. A `UserError` of
    `tokenize` is raised on all ranks.
    """
    distributed, options = trial.core_context.distributed, trial.hparams.tokenize_options
    num_proc = trial.hparams.args.dataset_num_proc
    key = None
    if distributed.local_rank == 0:
        # The formats need not be in the key: what they make of the data is in the rows.
        code = [inspect.getsource(module) for module in (chat_format, truncation, sys.modules[__name__])]
        hashes = [hash_rows(rows[part]) for part in sorted(rows)]
        key = fingerprint(tokenize.__name__, code, hashes, hash_tokenizer(tokenizer), options)
    key, *others = dict.fromkeys(filter(None, distributed.allgather(key)))
    if others:  # each node loads its own; the ranks' batches would be of different rows
        what = "its nodes have loaded different rows, or different tokenizers"
        raise UserError(f"the trial runs on {distributed.cross_size} nodes: {what}; give them the same files")
    folder = trial.cache / key

    def work() -> None:
        made = make_once(
            folder,
            make=lambda scratch: tokenize(rows, tokenizer, num_proc=num_proc, **options).save_to_disk(scratch),
            on_wait=lambda: trial.status("waiting for another trial that tokenizes the data"),
        )
        trial.status("data tokenized" if made else "tokenized data reused")

    once_per_node(distributed, work)
    dataset = DatasetDict.load_from_disk(folder)
    for part in dataset:
        # TRL and datasets key their caches by this fingerprint. Their own would be random.
        dataset[part]._fingerprint = fingerprint(key, part)
        if distributed.rank == 0:
            for line in truncation.describe_truncations(part, dataset[part]):
                logger.warning(line)
    return dataset


def prepare_evaluations(dataset: DatasetDict) -> Evaluations:
    """Return what a trial on a tokenized data set stores of its evaluations, before the first."""
    truncations = [line for part in dataset for line in truncation.describe_truncations(part, dataset[part])]
    pairs = dataset["test"]
    if "chosen_ids" not in pairs.column_names:
        return Evaluations(truncations)
    names = [f"{source} row {row}" for source, row in zip(pairs["source"][:], pairs["row"][:], strict=True)]
    chosen, rejected = ([len(ids) for ids in pairs[side][:]] for side in ("chosen_ids", "rejected_ids"))
    return Evaluations(truncations, names, chosen, rejected)


def _tokenize(
    dataset: DatasetDict,
    tokenize: Callable[[dict[str, Any]], dict[str, Any]],
    num_proc: int | None,
    every_row: bool,
    columns: dict[str, str],
    lengths: tuple[str, ...],
    kept: Sequence[str] = (),
) -> DatasetDict:
    """Tokenize, count truncations, drop rows with nothing left to learn.

    `columns` are the trainer's, with types. Others are dropped but for those `kept`, unless `every_row`.
    """
    features = Features({name: List(Value(dtype)) for name, dtype in columns.items()})
    features |= {"source": Value("string"), "row": Value("int64"), "truncations": List(Value("string"))}
    features |= dict.fromkeys(["learned", *(f"{name}_length" for name in lengths)], Value("int64"))
    remove = sorted(set(next(iter(dataset.values())).column_names) - {"source", "row"})
    tokenized = dataset.map(tokenize, remove_columns=remove, num_proc=num_proc, features=features, desc="Tokenizing")
    for name, rows in tokenized.items():
        found = truncation.rows_by_truncation(rows)
        if not every_row:
            dropped = {index: what for what, indices in found.items() if what.drops_row for index in indices}
            if len(dropped) == len(rows):
                raise next(iter(dropped.values())).no_row_left(name)
            remaining = rows.select([n for n in range(len(rows)) if n not in dropped]) if dropped else rows
            tokenized[name] = remaining.select_columns([*columns, *kept])
        truncation.store_truncation_counts(tokenized[name], rows, found)
    return tokenized
