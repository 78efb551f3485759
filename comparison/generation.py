"""Answers to prompts, in batches: what `inference.py` compares, and what its chat prints as it comes."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from chat_format import Message, encode, generation_stops, read_answer
from data.truncation import cut_prompt
from errors import UserError, one_line


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one (temperature 0), or drawn, for every model alike."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0  # draw from the likeliest tokens that have this probability together
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def arguments(self) -> dict[str, Any]:
        """For `generate`."""
        if self.greedy:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return drawn | {"max_new_tokens": self.max_new_tokens}


class Answer(NamedTuple):
    text: str
    tokens: int  # stops are not counted
    stopped: bool  # by itself, where False is: cut at max_new_tokens


def batches(prompts: list[list[int]], batch_size: int) -> list[list[int]]:
    """The indices of tokenized prompts in batches of like lengths, the longest first: what does not fit in memory does
    not fit at once, and not after an hour."""
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    return [longest_first[start : start + batch_size] for start in range(0, len(longest_first), batch_size)]


def batch_seed(seed: int, number: int) -> int:
    """What a batch is sampled with: a comparison that goes on at this batch draws what it would have drawn."""
    return random.Random(f"{seed} {number}").getrandbits(63)


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens of prompt and answer the model has positions for; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def fitted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[Message], max_new_tokens: int
) -> tuple[list[int], bool]:
    """Token ids of a prompt, and whether it had to lose its beginning for an answer to have room in the context.

    Raises `UserError` where nothing of the prompt's last turn has room.
    """
    ids, context = encode(tokenizer, prompt)[0], context_length(model)
    if context is None or len(ids) + max_new_tokens <= context:
        return ids, False
    shorter = cut_prompt(tokenizer, prompt, context - max_new_tokens)
    if shorter is None:
        raise UserError(f"--max-new-tokens {max_new_tokens} leaves a prompt no room in a context of {context} tokens")
    return encode(tokenizer, shorter)[0], True


def in_halves(run: Callable[[list], list], items: list) -> list:
    """What `run` makes of `items`, in one go or, where that does not fit in memory, one half after the other."""
    try:
        return run(items)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        if len(items) == 1:
            told = "; a lower --max-length or --max-new-tokens, or --dtype bfloat16, takes less"
            raise UserError(f"out of memory, with a batch of one{told} ({one_line(error)})") from error
    half = len(items) // 2  # outside of `except`, whose error holds on to the memory
    return in_halves(run, items[:half]) + in_halves(run, items[half:])


@torch.inference_mode()
def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    on_tokens: Callable[[list[int]], None] = lambda ids: None,
) -> list[Answer]:
    """Answers to tokenized prompts, left-padded to one batch.

    An answer ends at `<|im_end|>`, at EOS, or at `max_new_tokens`. `on_tokens` is given each step's new ids, one for
    each answer that has not ended.
    """
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    stops = generation_stops(model, tokenizer)
    # Nothing but the stops of a model's own config: models are compared under the same rules.
    model.generation_config = GenerationConfig(eos_token_id=stops["eos_token_id"])
    output = model.generate(
        **batch,
        **sampling.arguments(),
        **stops,
        pad_token_id=tokenizer.pad_token_id,
        streamer=_Listener(tokenizer.pad_token_id, on_tokens),
    )
    completions = output[:, batch["input_ids"].shape[1] :].tolist()
    return [Answer(*read_answer(tokenizer, completion, stops["eos_token_id"])) for completion in completions]


class _Listener(BaseStreamer):
    """Hands on what `generate` gives a streamer: first the prompts, then at each step a token for each answer."""

    def __init__(self, pad_token_id: int, on_tokens: Callable[[list[int]], None]) -> None:
        self.pad_token_id, self.on_tokens, self.prompted = pad_token_id, on_tokens, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompted:  # an answer that has ended is padded
            self.on_tokens([token for token in value.flatten().tolist() if token != self.pad_token_id])
        self.prompted = True

    def end(self) -> None:
        pass
