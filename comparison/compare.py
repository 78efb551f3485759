"""Compare models: each one in turn answers the questions and scores the pairs.

Results are appended to a file as they are computed. A comparison that was interrupted continues from it, also if its
models or questions have changed.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from chat_format import Message, check_template
from comparison import generation, preference_metrics, verdicts
from comparison.cluster_task import Task
from comparison.files import Comparison
from comparison.generation import Answer, batch_by_length, batch_seed, context_length, run_in_halves, shorten_prompt
from comparison.options import ComparisonOptions, Sampling
from comparison.own_training import describe_betas, read_origins, reward_betas, trained_on
from comparison.preference_metrics import PairScore, batch_pairs, prompted_alike, tokenize_pairs
from comparison.questions import Questions
from errors import UserError, os_errors_of
from metrics.intervals import RESAMPLES, Estimate
from pages.terminal import plural
from speed.hardware import attend_without_plans
from speed.output_layer import adapt_fused_head_to_cpu
from speed.padding_free import remove_padding
from storage.checkpoints import model_identity
from storage.files import append_json_line, is_object, read_json_lines
from storage.fingerprints import fingerprint
from storage.locks import only_writer
from trial.models import load_model_and_tokenizer


def load_model(
    name: str, source: str, options: ComparisonOptions, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model that is ready to answer, and its tokenizer. Raises `UserError` if there is none or it cannot."""
    key = options.key("model", name)
    model, tokenizer = load_model_and_tokenizer(source, key, dtype=getattr(torch, options.dtype))
    check_template(tokenizer)
    attend_without_plans()
    torch.nn.Module.to(model, device)
    return model.eval(), tokenizer


class StoredResult(TypedDict):
    """A line of a file of results: the fields of an `Answer` or a `PairScore`, or that a pair does not fit."""

    key: str  # what it is of, and a hash of everything it depends on
    value: list[Any] | str


DOES_NOT_FIT = "does not fit"
FIELDS: dict[str, list[Any]] = {"answer": [str, int, bool], "pair": [float | int] * len(PairScore._fields)}


class ResultStore(dict[str, Any]):
    """Results by key, appended to a file as they come. Without a file they are only held in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = read_json_lines(path) if path else []
        whole = [line for line in lines if is_object(line, {"key": str}) and _is_result(line["key"], line.get("value"))]
        self.update({line["key"]: None if line["value"] == DOES_NOT_FIT else line["value"] for line in whole})
        if damaged := len(lines) - len(whole):
            print(f"{path}: {plural(damaged, 'line')} damaged: what they held is computed again", flush=True)

    def add(self, key: str, value: Any) -> None:
        """Add a result. Raises `UserError` if it cannot be written."""
        self[key] = value
        if self.path:
            with os_errors_of(self.path):
                append_json_line(self.path, StoredResult(key=key, value=DOES_NOT_FIT if value is None else value))


def _is_result(key: str, value: Any) -> bool:
    kind = key.partition(" ")[0]
    if not isinstance(value, list):
        return kind == "pair" and value == DOES_NOT_FIT
    types = FIELDS.get(kind, [])
    return len(value) == len(types) and all(map(isinstance, value, types))


@contextmanager
def open_results(path: Path | None) -> Iterator[ResultStore]:
    """Open the results of an unfinished comparison for this process alone, and delete them once it is finished."""
    with only_writer(path) if path else nullcontext():
        yield ResultStore(path)
        if path:
            path.unlink(missing_ok=True)


@dataclass
class ComparedModel:
    """A model and its part of the comparison. It is loaded once a result is missing from the store."""

    name: str
    source: str  # a folder or hub id
    options: ComparisonOptions
    device: torch.device
    store: ResultStore
    progress: Progress
    task: Task
    expected: int  # results of all models together

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_model(self.name, self.source, self.options, self.device)
        remove_padding(model, pairs=True)
        add_fused_lm_head(model)
        if self.device.type == "cpu":
            adapt_fused_head_to_cpu()
        return model, tokenizer

    def answer(self, questions: list[list[Message]]) -> list[Answer]:
        """Return the model's answer to each question."""
        options = self.options
        sampling = options.model_dump(include=set(Sampling.model_fields))
        keys = [self._key("answer", sampling, question) for question in questions]
        if options.temperature > 0:  # a sampled answer depends on its batch, and its place there
            keys = [self._key("answer", key, place, self._batch_size, questions) for place, key in enumerate(keys)]
        if not self.store.keys() >= set(keys):
            model, tokenizer = self._loaded
            fitted = [shorten_prompt(model, tokenizer, question, options.max_new_tokens) for question in questions]
            if cut := sum(was_cut for _, was_cut in fitted):
                text = f"{plural(cut, 'question')} cut at the beginning, to fit with an answer into the model's context"
                self.progress.console.print(f"{escape(self.name)}: {text}")

            def run(batch: list[int], count: Callable[[int], None]) -> list[Answer]:
                prompts = [fitted[index][0] for index in batch]
                return generation.answer_batch(model, tokenizer, prompts, options, lambda ids: count(len(ids)))

            batches = batch_by_length([len(ids) for ids, _ in fitted], self._batch_size)
            self._run_batches("answers", keys, batches, run)
        return [Answer(*self.store[key]) for key in keys]

    def score(self, pairs: Dataset) -> list[PairScore | None]:
        """Return the score of each of `load_dpo_dataset`'s pairs; None for a pair that does not fit."""
        max_length = self.options.max_length
        keys = [self._key("pair", max_length, row["prompt"], row["chosen"], row["rejected"]) for row in pairs]
        if not self.store.keys() >= set(keys):
            model, tokenizer = self._loaded
            limit = min(max_length, context_length(model) or max_length)
            tokenized = tokenize_pairs(pairs, tokenizer, limit)
            if limit == max_length and not any(tokenized["fits"]):
                none = f"none of the {len(pairs)} pairs fits, in the format of {self.name}; raise it"
                raise UserError(f"{self.options.key('max_length')} {max_length}: {none}")
            for key, fits in zip(keys, tokenized["fits"][:], strict=True):
                if not fits:
                    self.store.add(key, None)

            def run(batch: list[int], count: Callable[[int], None]) -> list[PairScore]:
                scores = preference_metrics.score_batch(model, tokenizer, [tokenized[index] for index in batch])
                count(sum(score.chosen_tokens + score.rejected_tokens for score in scores))
                return scores

            self._run_batches("pairs", keys, batch_pairs(tokenized, self._batch_size), run)
        return [score and PairScore(*score) for score in (self.store[key] for key in keys)]

    @property
    def _batch_size(self) -> int:
        # By the kind of device, not its memory: a comparison that another GPU resumes has the same batches there.
        return self.options.batch_size or (64 if self.device.type == "cuda" else 8)

    @cached_property
    def _identity(self) -> list[Any]:
        # In other types than float32, the rest of a batch changes a result.
        batch_size = None if self.options.dtype == "float32" else self._batch_size
        return [model_identity(self.source), self.options.dtype, self.device.type, batch_size]

    def _key(self, kind: str, *parts: Any) -> str:  # of a result that depends on `parts`, the model and how it is run
        return f"{kind} {fingerprint(json.dumps([self._identity, parts]))}"

    def _run_batches(
        self, noun: str, keys: list[str], batches: list[list[int]], run: Callable[[list[int], Callable], list]
    ) -> None:
        """Store the results of `run`, batch by batch; skip batches whose results are stored already.

        A batch is a list of indices of `keys`. `run` gets it, and a function to count the tokens as they come.
        """
        total = sum(map(len, batches))
        if not self.progress.console.is_terminal:  # a bar would only be printed at its end
            self.progress.console.print(f"{escape(self.name)}: {total} {noun}")
        bar = self.progress.add_task(f"{escape(self.name)}: {noun}", total=total, speed="")
        started, tokens = time.monotonic(), 0

        def count(new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            self.progress.update(bar, speed=f"{tokens / (time.monotonic() - started):,.0f} tokens/s")

        def run_seeded(part: list[int]) -> list:
            torch.manual_seed(batch_seed(self.options.seed, part[0]))
            return run(part, count)

        for batch in batches:
            if not all(keys[index] in self.store for index in batch):
                for index, result in zip(batch, run_in_halves(run_seeded, batch), strict=True):
                    self.store.add(keys[index], result)
                self.task.report_progress(len(self.store), self.expected)
            self.progress.advance(bar, len(batch))


def compare(
    models: dict[str, str],
    questions: Questions,
    options: ComparisonOptions,
    device: torch.device,
    store: ResultStore,
    task: Task,
    console: Console,
) -> Comparison:
    """Let each of `models`, folders or hub ids by name, answer the questions and score the pairs."""
    prompts, preferred, pairs, held_out, whole, _ = questions
    sources = (*held_out, *whole)
    origins = read_origins(models)
    betas = reward_betas(models, origins, options.beta)
    warnings = list(trained_on(questions, origins))
    for warning in warnings:  # before the models are run, which takes its time
        console.print(warning, markup=False, soft_wrap=True)
    answers: dict[str, list[Answer]] = {}
    scores: dict[str, list[PairScore | None]] = {}
    expected = len(models) * (len(prompts) + len(pairs or []))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[speed]}"), console=console) as progress:
        for name, source in models.items():
            model = ComparedModel(name, source, options, device, store, progress, task, expected)
            scores[name] = model.score(pairs) if pairs else []  # first, as that finds a limit that leaves nothing
            answers[name] = model.answer(prompts)
            del model  # makes room in memory for the next one
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where CUDA is not used
            task.save()

    # Metrics compare only over the same pairs: a pair that does not fit one model is left out for all.
    scored = [row for row in zip(*scores.values(), pairs or [], strict=True) if all(row)]
    common = {name: [row[index] for row in scored] for index, name in enumerate(models)}
    characters = np.array([[len(pair["chosen"]), len(pair["rejected"])] for *_, pair in scored]).reshape(-1, 2)
    reference = options.reference_name
    metrics: dict[str, dict[str, Estimate | None]] = {}
    for name, of in common.items():
        against = common[reference] if name != reference else None
        metrics[name] = preference_metrics.preference_metrics(of, against, betas[name], characters)
        metrics[name] |= preference_metrics.answer_metrics(answers[name])
    found = verdicts.judge(common, reference, characters)

    sampled = f"temperature {options.temperature:g}, top-p {options.top_p:g}, seed {options.seed}"
    settings = [
        f"{plural(len(prompts), 'answer')} of each model, at most {options.max_new_tokens} tokens long, "
        f"{sampled if options.temperature > 0 else 'greedy'}; {options.dtype} on {device}"
    ]
    if pairs:
        limit = f"{options.key('max_length')} {options.max_length}"
        settings.append(f"{len(scored)} held-out pairs of {', '.join(map(str, sources))}")
        settings[-1] += f"; {describe_betas(betas, origins, options.beta)}"
        settings += warnings
        if left_out := len(pairs) - len(scored):
            settings.append(f"{left_out} pairs are left out: {limit} leaves them no room")
        if cut := sum(any(score.cut for score in row) for row in zip(*common.values(), strict=True)):
            settings.append(f"{cut} of them cut to {limit} or a model's context")
    if other := [name for name, of in common.items() if not prompted_alike(of, common[reference])]:
        settings.append(
            f"{reference} is prompted differently from {', '.join(other)}: such rewards are of other tokens"
        )
    settings.append(f"Intervals: 95%, from {RESAMPLES:,} bootstrap samples.")
    about = ". ".join(settings)
    return Comparison(options.model, prompts, preferred, answers, metrics, reference, about, found)
