"""Prove that an exported folder answers as the model in training: the same token ids, then the same greedy answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils.memory import should_reduce_batch_size
from jinja2 import TemplateError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from chat_format import Message, encode, generation_stops, plain_text
from errors import UserError, one_line

ANSWER_TOKENS = 32  # of each greedy answer
CLOSE = 1e-3  # difference of two log-probs that rounding in float32 explains
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
        text = f"the same token ids as in training for {self.checked - self.in_history} of {self.checked}"
        if self.in_history:
            joined = "training tokenizes an earlier answer apart from the markers around it, a server does not"
            text += f", the same text in other tokens for {self.in_history} with a history ({joined})"
        if not self.checked:
            text = "none could be compared"
        return text + (f"; {self.refused} are refused by the chat template" if self.refused else "")


def compare_ids(
    trained: PreTrainedTokenizerBase, served: PreTrainedTokenizerBase, prompts: Sequence[list[Message]]
) -> SameIds:
    """Compare the token ids of prompts: those of training, and those of a server. Raises `UserError` if they differ.

    In a conversation of several turns, an earlier answer that begins with a line break may make one token with the
    marker before it once it is served. Such prompts are only counted, if their text is the same.
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
            has_history = any(turn["role"] == "assistant" for turn in prompt)
            if not has_history or _text(served, ids) != _text(trained, expected):
                place = next((n for n, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), None)
                where = f"from token {min(len(ids), len(expected)) if place is None else place} on"
                start = one_line(prompt[-1]["content"])[:60]
                raise UserError(f"the folder's prompt of {start!r} has other token ids than in training, {where}")
            found.in_history += 1
    return found


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of token ids, markers included, without spaces: some tokenizers begin each part with one."""
    return cast(str, tokenizer.decode(ids, clean_up_tokenization_spaces=False)).replace(" ", "")


class Answer(NamedTuple):
    """A greedy answer: its token ids, the stop included, and the log-prob of each of them."""

    ids: list[int]
    logprobs: list[float]


@torch.inference_mode()
def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    device: torch.device,
    console: Console,
    title: str,
) -> list[Answer]:
    """Return greedy answers of at most `ANSWER_TOKENS` to tokenized prompts.

    The model may be a PEFT model. On a terminal a bar with a `title` shows the tokens.
    """
    torch.nn.Module.to(model, device)
    model.eval()
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
    stops = generation_stops(model, tokenizer)["eos_token_id"]
    # Of the model's own config nothing counts here: with a penalty for repetition an answer would not be greedy.
    own, model.generation_config = model.generation_config, GenerationConfig(eos_token_id=stops)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    steps: list[torch.Tensor] = []  # the log-probs of each step's tokens
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(title, total=ANSWER_TOKENS)

        def record(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            steps.append(scores.float().log_softmax(-1).max(-1).values)
            bars.advance(bar)
            return scores

        rules: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "eos_token_id": stops}
        try:
            output = model.generate(
                **batch, **rules, pad_token_id=tokenizer.pad_token_id, logits_processor=LogitsProcessorList([record])
            )
        except RuntimeError as error:
            if not should_reduce_batch_size(error):  # accelerate's name for: memory ran out
                raise
            raise UserError(f"out of memory: take --device cpu ({one_line(error)})") from error
        finally:
            model.generation_config = own
    completions = output[:, batch["input_ids"].shape[1] :].tolist()
    ends = [next((n for n, token in enumerate(ids, start=1) if token in stops), len(ids)) for ids in completions]
    logprobs = torch.stack(steps, dim=1).tolist()
    return [Answer(ids[:end], of[:end]) for ids, of, end in zip(completions, logprobs, ends, strict=True)]


@dataclass
class SameAnswers:
    """How far the answers of two models agree."""

    answers: int
    same: int  # answers that are the same to the last token
    tokens: int  # of the first model's answers
    before: int  # of these, before the first difference
    apart: float  # the largest difference of two log-probs, of a token before the first difference
    broken: bool = False  # whether the second model's log-probs are no numbers

    @property
    def exact(self) -> bool:
        """Whether the models are the same, as far as float32 computes it. (Two may answer alike by chance.)"""
        return self.same == self.answers and self.apart <= CLOSE and not self.broken

    def __str__(self) -> str:
        text = f"{self.same} of {self.answers} greedy answers are the same to the last of {ANSWER_TOKENS} tokens"
        if self.same < self.answers:
            text += f" ({self.before / self.tokens:.0%} of the tokens come before a difference)"
        return f"{text}, and the log-probs of their tokens to {self.apart:.1g}"


def compare_answers(before: list[Answer], after: list[Answer]) -> SameAnswers:
    """Return how far two models' answers to the same questions agree, token by token."""
    found = SameAnswers(len(before), 0, 0, 0, 0.0)
    for one, other in zip(before, after, strict=True):
        pairs = list(zip(one.ids, other.ids, strict=False))
        alike = next((n for n, pair in enumerate(pairs) if pair[0] != pair[1]), len(pairs))
        found.tokens += len(one.ids)
        found.same += one.ids == other.ids
        found.before += alike
        both = zip(one.logprobs[:alike], other.logprobs[:alike], strict=True)
        found.apart = max([found.apart, *(abs(a - b) for a, b in both)])
        found.broken |= not all(map(math.isfinite, other.logprobs))
    return found
