"""Generate answers in batches, for `inference.py`'s comparison and its chat."""

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from chat_format import Message, encode, generation_stops, read_answer
from comparison.options import Sampling
from data.truncation import cut_prompt
from errors import UserError, one_line

Item = TypeVar("Item")
Result = TypeVar("Result")


class Answer(NamedTuple):
    """A generated answer. `tokens` leaves out its stops; `stopped` is False if max_new_tokens cut it."""

    text: str
    tokens: int
    stopped: bool


def batch_by_length(lengths: Sequence[int], batch_size: int, max_tokens: float = float("inf")) -> list[list[int]]:
    """Return the indices of sequences in batches of similar lengths; the longest come first, to fail early if at all.

    A batch has at most `batch_size` sequences and, with padding, `max_tokens` tokens, or it is a single sequence.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        batch = batches[-1] if batches else []
        if not batch or len(batch) == batch_size or lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            batches.append(batch := [])
        batch.append(index)
    return batches


def batch_seed(seed: int, first: int) -> int:
    """Return the random seed of a batch by its first question, so that it samples the same answers when it is resumed.

    So does a half of a batch, whenever the memory ran out in the whole one.
    """
    return random.Random(f"{seed} {first}").getrandbits(63)


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens of prompt and answer the model has positions for; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def shorten_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[Message], max_new_tokens: int
) -> tuple[list[int], bool]:
    """Return a prompt's token ids, and whether its beginning was cut to leave an answer room in the context.

    Raises `UserError` if there is no room for any of the prompt's last turn.
    """
    ids, context = encode(tokenizer, prompt)[0], context_length(model)
    if not ids:
        raise UserError(f"the tokenizer or chat template of {tokenizer.name_or_path!r} makes no token of a prompt")
    if context is None or len(ids) + max_new_tokens <= context:
        return ids, False
    shorter = cut_prompt(tokenizer, prompt, context - max_new_tokens)
    if shorter is None:
        raise UserError(f"--max-new-tokens {max_new_tokens} leaves a prompt no room in a context of {context} tokens")
    return encode(tokenizer, shorter)[0], True


def run_in_halves(run: Callable[[list[Item]], list[Result]], items: list[Item]) -> list[Result]:
    """Return `run(items)`; if memory runs out, run one half after the other. Raises `UserError` if one is too large."""
    try:
        return run(items)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        if len(items) == 1:
            advice = "lower --max-length or --max-new-tokens, or take --dtype bfloat16"
            raise UserError(f"out of memory with a batch of one: {advice} ({one_line(error)})") from error
    half = len(items) // 2  # outside of `except`, whose error holds on to the memory
    return run_in_halves(run, items[:half]) + run_in_halves(run, items[half:])


@torch.inference_mode()
def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    on_tokens: Callable[[list[int]], None] = lambda ids: None,
) -> list[Answer]:
    """Answer tokenized prompts in one left-padded batch.

    (The cache grows: a static one pays on a GPU if it is compiled, some 25 s for each model, to save about 20 ms a step
    of a batch: more than the 256 steps of a comparison have. Computed for Gemma-2B, not measured.)

    An answer ends at `<|im_end|>`, at EOS, or at `max_new_tokens`. `on_tokens` gets the new ids of each step: one for
    each answer that has not ended.
    """
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    stops = generation_stops(model, tokenizer)
    # Keep only the stops of a model's own config: all models are compared under the same rules.
    model.generation_config = GenerationConfig(eos_token_id=stops["eos_token_id"])
    rules: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        rules |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    pad = tokenizer.pad_token_id

    def put(value: torch.Tensor) -> None:  # first all the prompts, then at each step a token or padding for each answer
        if value.dim() == 1:
            on_tokens([token for token in value.tolist() if token != pad])

    generate = cast(Any, model.generate)  # mypy takes the model's class for a Tensor attribute
    output = generate(**batch, **rules, **stops, pad_token_id=pad, streamer=SimpleNamespace(put=put, end=lambda: None))
    completions = output[:, batch["input_ids"].shape[1] :].tolist()
    return [Answer(*read_answer(tokenizer, completion, stops["eos_token_id"])) for completion in completions]
