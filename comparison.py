"""The comparison itself: each model in turn answers the questions and scores the pairs.

What is computed is kept as it comes in a file, so that an interrupted comparison goes on where it stopped, and one of
more models or questions computes only what is new.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from chat_format import Message, encode
from checkpoints import is_model_file
from experiment_results import read_reports
from generation import Answer, Sampling, answer_batch, batch_seed, batches, in_halves
from models import load_model_and_tokenizer
from preference_metrics import PairScore, pair_batches, score_batch, tokenize_pairs
from shared_cache import fingerprint
from trial import append_report


@dataclass(frozen=True)
class Conditions:
    """What holds for every model of a comparison."""

    device: torch.device
    dtype: torch.dtype
    sampling: Sampling
    batch_size: int  # prompts or pairs at a time
    max_length: int  # tokens of a pair's prompt and answer


def load(name: str, source: str, conditions: Conditions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_model_and_tokenizer(source, f"--model {name}", dtype=conditions.dtype)
    return model.to(conditions.device).eval(), tokenizer


class Kept:
    """Results by what they depend on, appended to a file as they come. Without a file they are only remembered."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.results = {line["key"]: line["value"] for line in read_reports(path)} if path else {}

    def add(self, key: str, value: Any) -> None:
        self.results[key] = value
        if self.path:
            append_report(self.path, key=key, value=value)

    def remove(self) -> None:
        if self.path:
            self.path.unlink(missing_ok=True)


class Contestant:
    """A model and its part of the comparison. It is loaded once something has to be done that is not kept already."""

    def __init__(
        self,
        name: str,
        source: str,
        conditions: Conditions,
        kept: Kept,
        progress: Progress,
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.source, self.conditions, self.kept = name, source, conditions, kept
        self.progress, self.after_batch = progress, after_batch
        self.depends_on = (model_identity(source), str(conditions.dtype), conditions.device.type)
        self.loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self.loaded is None:
            self.loaded = load(self.name, self.source, self.conditions)
            add_fused_lm_head(self.loaded[0])
        return self.loaded

    def unload(self) -> None:
        """Let go of the model: the next one gets its memory."""
        self.loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answers(self, questions: list[list[Message]]) -> list[Answer]:
        sampling, batch_size = self.conditions.sampling, self.conditions.batch_size
        # What is drawn for an answer depends on the batch that it is in.
        drawn_with = None if sampling.greedy else (batch_size, questions)
        keys = [self.key(repr(sampling), drawn_with, question) for question in questions]
        if not self.kept.results.keys() >= set(keys):
            model, tokenizer = self.load()
            prompts = [encode(tokenizer, question)[0] for question in questions]
            bar = self.bar("answers", len(questions))

            def ask(part: list[list[int]]) -> list[Answer]:
                return answer_batch(model, tokenizer, part, sampling, lambda ids: bar.count(len(ids)))

            for number, batch in enumerate(batches(prompts, batch_size)):
                if not all(keys[index] in self.kept.results for index in batch):
                    torch.manual_seed(batch_seed(sampling.seed, number))
                    found = in_halves(ask, [prompts[index] for index in batch])
                    self.keep([keys[index] for index in batch], found)
                bar.advance(len(batch))
        return [Answer(*self.kept.results[key]) for key in keys]

    def scores(self, pairs: Dataset) -> list[PairScore | None]:
        """The scores of `load_dpo_dataset`'s pairs; None for one that has no room for its answers."""
        rows = zip(pairs["prompt"][:], pairs["chosen"][:], pairs["rejected"][:], strict=True)
        keys = [self.key(self.conditions.max_length, *row) for row in rows]
        if not self.kept.results.keys() >= set(keys):
            model, tokenizer = self.load()
            tokenized = tokenize_pairs(pairs, tokenizer, self.conditions.max_length)
            for key, fits in zip(keys, tokenized["kept"][:], strict=True):
                if not fits:
                    self.kept.add(key, None)
            todo = pair_batches(tokenized, self.conditions.batch_size)
            bar = self.bar("pairs", sum(map(len, todo)))
            for batch in todo:
                if not all(keys[index] in self.kept.results for index in batch):
                    found = in_halves(partial(score_batch, model, tokenizer), [tokenized[index] for index in batch])
                    self.keep([keys[index] for index in batch], found)
                    bar.count(sum(score.chosen_tokens + score.rejected_tokens for score in found))
                bar.advance(len(batch))
        return [score and PairScore(*score) for score in (self.kept.results[key] for key in keys)]

    def key(self, *parts: Any) -> str:
        """The name of a result of this model that depends on `parts`."""
        return fingerprint(json.dumps([self.depends_on, parts]))

    def keep(self, keys: list[str], results: list[Answer] | list[PairScore]) -> None:
        for key, result in zip(keys, results, strict=True):
            self.kept.add(key, result)
        self.after_batch()

    def bar(self, what: str, total: int) -> "Bar":
        return Bar(self.progress, f"{escape(self.name)}: {what}", total)


class Bar:
    """A progress bar with tokens a second."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self.progress, self.tokens, self.started = progress, 0, time.monotonic()
        self.task = progress.add_task(description, total=total, speed="")

    def count(self, tokens: int) -> None:
        self.tokens += tokens
        speed = self.tokens / (time.monotonic() - self.started)
        self.progress.update(self.task, speed=f"{speed:,.0f} tokens/s")

    def advance(self, done: int) -> None:
        self.progress.update(self.task, advance=done)


def show_progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[speed]}"), console=console)


def model_identity(source: str) -> list[Any]:
    """What tells a model from another: a folder's model files with their sizes and times, else the hub id."""
    files = sorted(file for file in Path(source).glob("*") if is_model_file(file.name))
    return [source, *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]
