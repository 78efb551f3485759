"""The comparison itself: each model in turn answers the questions and scores the pairs.

What is computed is kept as it comes in a file, so that an interrupted comparison goes on where it stopped, also with
other models or questions.
"""

import gc
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from chat_format import Message
from comparison.generation import Answer, Sampling, answer_batch, batch_seed, batches, context_length, fitted, in_halves
from comparison.preference_metrics import PairScore, pair_batches, score_batch, tokenize_pairs
from errors import UserError
from speed.output_layer import fit_fused_head_to_cpu
from speed.padding_free import remove_padding
from storage.checkpoints import is_model_file
from storage.files import append_json_line, read_json_lines
from storage.fingerprints import fingerprint
from trial.models import load_model_and_tokenizer


@dataclass(frozen=True)
class Conditions:
    """What holds for every model of a comparison."""

    device: torch.device
    dtype: torch.dtype
    sampling: Sampling
    batch_size: int  # prompts or pairs at a time
    max_length: int  # tokens of a pair's prompt and answer


def load(name: str, source: str, conditions: Conditions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that is ready to answer. Raises `UserError` for one that cannot."""
    model, tokenizer = load_model_and_tokenizer(source, f"--model {name}", dtype=conditions.dtype)
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name} {source!r}: its tokenizer has no EOS token, so answers would never end")
    return model.to(conditions.device).eval(), tokenizer


class Kept:
    """Results by what they depend on, appended to a file as they come. Without a file they are only remembered."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = read_json_lines(path) if path else []
        ours = [line for line in lines if isinstance(line, dict) and line.keys() == {"key", "value"}]
        self.results = {line["key"]: line["value"] for line in ours}

    def add(self, key: str, value: Any) -> None:
        self.results[key] = value
        if self.path:
            try:
                append_json_line(self.path, {"key": key, "value": value})
            except OSError as error:
                raise UserError(f"{self.path}: {error.strerror}") from error

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
        if conditions.dtype is not torch.float32:  # in others, what else is in a batch moves the result
            self.depends_on += (conditions.batch_size,)
        self.loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self.loaded is None:
            self.loaded = load(self.name, self.source, self.conditions)
            remove_padding(self.loaded[0], pairs=True)
            add_fused_lm_head(self.loaded[0])
            if self.conditions.device.type == "cpu":
                fit_fused_head_to_cpu()
        return self.loaded

    def unload(self) -> None:
        """Let go of the model: the next one gets its memory."""
        self.loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answers(self, questions: list[list[Message]]) -> list[Answer]:
        sampling, batch_size = self.conditions.sampling, self.conditions.batch_size
        keys = [self.key(repr(sampling), question) for question in questions]
        if not sampling.greedy:  # what is drawn depends on the batch, and the place in it
            keys = [self.key(key, place, batch_size, questions) for place, key in enumerate(keys)]
        if not self.kept.results.keys() >= set(keys):
            model, tokenizer = self.load()
            fits = [fitted(model, tokenizer, question, sampling.max_new_tokens) for question in questions]
            prompts = [ids for ids, _ in fits]
            if cut := sum(was_cut for _, was_cut in fits):
                told = f"{cut} of the questions and an answer are longer than its context: they lose their beginning"
                self.progress.console.print(f"{escape(self.name)}: {told}")
            bar = self.bar("answers", len(questions))

            def ask(batch: list[int]) -> list[Answer]:
                asked = [prompts[index] for index in batch]
                return answer_batch(model, tokenizer, asked, sampling, lambda ids: bar.count(len(ids)))

            self.work(keys, batches(prompts, batch_size), ask, bar)
        return [Answer(*self.kept.results[key]) for key in keys]

    def scores(self, pairs: Dataset) -> list[PairScore | None]:
        """The scores of `load_dpo_dataset`'s pairs; None for one that has no room for its answers."""
        rows = zip(pairs["prompt"][:], pairs["chosen"][:], pairs["rejected"][:], strict=True)
        max_length = self.conditions.max_length
        keys = [self.key(max_length, *row) for row in rows]
        if not self.kept.results.keys() >= set(keys):
            model, tokenizer = self.load()
            tokenized = tokenize_pairs(pairs, tokenizer, min(max_length, context_length(model) or max_length))
            for key, fits in zip(keys, tokenized["kept"][:], strict=True):
                if not fits:
                    self.kept.add(key, None)
            todo = pair_batches(tokenized, self.conditions.batch_size)
            bar = self.bar("pairs", sum(map(len, todo)))

            def score(batch: list[int]) -> list[PairScore]:
                found = score_batch(model, tokenizer, [tokenized[index] for index in batch])
                bar.count(sum(of.chosen_tokens + of.rejected_tokens for of in found))
                return found

            self.work(keys, todo, score, bar)
        return [score and PairScore(*score) for score in (self.kept.results[key] for key in keys)]

    def key(self, *parts: Any) -> str:
        """The name of a result of this model that depends on `parts`."""
        return fingerprint(json.dumps([self.depends_on, parts]))

    def work(self, keys: list[str], todo: list[list[int]], run: Callable[[list[int]], list], bar: "Bar") -> None:
        """Have `run` make the results `keys`, a batch of their indices after the other, and keep them as they come."""
        for number, batch in enumerate(todo):
            if not all(keys[index] in self.kept.results for index in batch):
                torch.manual_seed(batch_seed(self.conditions.sampling.seed, number))
                for index, result in zip(batch, in_halves(run, batch), strict=True):
                    self.kept.add(keys[index], result)
                self.after_batch()
            bar.advance(len(batch))

    def bar(self, what: str, total: int) -> "Bar":
        if not self.progress.console.is_terminal:  # there a bar is only seen when all is done
            self.progress.console.print(f"{escape(self.name)}: {total} {what}")
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
    """What tells a model from another, wherever it lies: of its files the sizes and some of their bytes. A hub id is
    taken to stay what it is."""
    files = sorted(file for file in Path(source).glob("*") if is_model_file(file.name) or file.suffix == ".bin")
    return [(file.name, *_sample(file)) for file in files] or [source]


def _sample(file: Path, length: int = 2**20) -> tuple[int, str]:
    """A file's size and a hash of its beginning, middle and end, which is all of a small one: training changes every
    weight, and to read all gigabytes of a model would take longer than to load it."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as opened:
        for start in (0, (size - length) // 2, size - length):
            opened.seek(max(0, start))
            digest.update(opened.read(length))
    return size, digest.hexdigest()
