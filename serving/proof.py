"""Prove that an exported folder answers as the model in training: the same token ids, then the same greedy answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate.utils.memory import should_reduce_batch_size
from jinja2 import TemplateError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from chat_format import Message, encode, generation_stops, plain_text
from errors import UserError, one_line

ANSWER_TOKENS = 32  # of each greedy answer
SIMILAR = 0.5  # share of tokens below which a 16-bit model may well be broken


def served_ids(tokenizer: PreTrainedTokenizerBase, prompt: list[Message]) -> list[int]:
    """Return the token ids that a server makes of a prompt, with nothing but the folder's tokenizer."""
    if tokenizer.chat_template is None:
        return tokenizer(plain_text(prompt))["input_ids"]
    return cast(Any, tokenizer.apply_chat_template(prompt, add_generation_prompt=True))["input_ids"]


@dataclass
class SameIds:
    """How many prompts have the same token ids in training and when served."""

    checked: int
    in_history: int  # prompts that differ, where an earlier answer begins or ends
    refused: int  # by the chat template, which is not ours: a system turn, as a rule

    def __str__(self) -> str:
        text = "the same token ids as in training"
        if self.in_history:
            joined = "training tokenizes an earlier answer apart from the markers around it, a server does not"
            text += f", but for {self.in_history} with another history ({joined})"
        return text + (f"; {self.refused} are refused by the chat template" if self.refused else "")


def compare_ids(
    trained: PreTrainedTokenizerBase, served: PreTrainedTokenizerBase, prompts: Sequence[list[Message]]
) -> SameIds:
    """Compare the token ids of prompts: those of training, and those of a server. Raises `UserError` if they differ.

    In a conversation of several turns, an earlier answer that begins with a line break may make one token with the
    marker before it once it is served. Such prompts are only counted.
    """
    found = SameIds(0, 0, 0)
    for prompt in prompts:
        try:
            ids = served_ids(served, prompt)
        except TemplateError:
            found.refused += 1
            continue
        found.checked += 1
        if ids != (expected := encode(trained, prompt)[0]):
            if not any(turn["role"] == "assistant" for turn in prompt):
                place = next((n for n, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), None)
                where = f"from token {min(len(ids), len(expected)) if place is None else place} on"
                start = one_line(prompt[-1]["content"])[:60]
                raise UserError(f"the folder's prompt of {start!r} has other token ids than in training, {where}")
            found.in_history += 1
    return found


@torch.inference_mode()
def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    device: torch.device,
    console: Console,
    title: str,
) -> list[list[int]]:
    """Return the token ids of each greedy answer, at most `ANSWER_TOKENS`, its stop included.

    The model may be a PEFT model. On a terminal a bar with a `title` shows the tokens.
    """
    torch.nn.Module.to(model, device)
    model.eval()
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
    stops = generation_stops(model, tokenizer)["eos_token_id"]
    # Of the model's own config nothing counts here: with a penalty for repetition an answer would not be greedy.
    own, model.generation_config = model.generation_config, GenerationConfig(eos_token_id=stops)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(title, total=ANSWER_TOKENS)
        streamer = SimpleNamespace(put=lambda value: bars.advance(bar, value.dim() == 1), end=lambda: None)
        rules = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        try:
            output = model.generate(**batch, **rules, eos_token_id=stops, streamer=streamer)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):  # accelerate's name for: memory ran out
                raise
            raise UserError(f"out of memory: take --device cpu ({one_line(error)})") from error
        finally:
            model.generation_config = own
    completions = output[:, batch["input_ids"].shape[1] :].tolist()
    ends = [next((n for n, token in enumerate(ids, start=1) if token in stops), len(ids)) for ids in completions]
    return [ids[:end] for ids, end in zip(completions, ends, strict=True)]


@dataclass
class SameAnswers:
    """How far the answers of two models agree."""

    answers: int
    same: int  # answers that are the same to the last token
    tokens: int  # of the first model's answers
    before: int  # of these, before the first difference

    def __str__(self) -> str:
        share = f"{self.before / self.tokens:.0%}"
        text = f"{self.same} of {self.answers} greedy answers are the same to the last of {ANSWER_TOKENS} tokens"
        return text if self.same == self.answers else f"{text}; {share} of the tokens come before a difference"


def compare_answers(before: list[list[int]], after: list[list[int]]) -> SameAnswers:
    """Return how far two models' answers to the same questions agree, token by token."""
    found = SameAnswers(len(before), 0, 0, 0)
    for one, other in zip(before, after, strict=True):
        found.tokens += len(one)
        found.same += one == other
        alike = (n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
        found.before += next(alike, min(len(one), len(other)))
    return found
