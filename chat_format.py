"""How a conversation becomes token ids: the one home of the chat template and its special tokens.

`encode` and `encode_conversation` render every conversation of this project, for SFT, for DPO and for inference. With
ChatML a row is

    <bos><|im_start|>system            \\
    Be brief.<|im_end|>                 | the prompt: what inference feeds the model, to the last token
    <|im_start|>user                    |
    What is tea?<|im_end|>              |
    <|im_start|>assistant              /
    A drink made from leaves.<|im_end|><eos>     the completion: what the model learns to say, stops included

The newline stands *before* each later turn, not after it, so that nothing follows the final `<eos>`. A marker within a
turn's content is written with a space after its first character, so that no content can end its turn, begin another
one, or end the answer.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
# What the prompt ends with, and so what an answer follows.
RESPONSE_TEMPLATE = f"{IM_START}assistant\n"

# Saved with the tokenizer, so that a server which knows nothing of this project prompts the model in the same way.
CHAT_ML_TEMPLATE = (
    "{{- bos_token if bos_token }}"
    "{%- for message in messages %}"
    "{%- set said = namespace(text=message['content']) %}"
    "{%- for marker in ['<|im_start|>', '<|im_end|>', bos_token, eos_token] if marker %}"
    "{%- set said.text = said.text | replace(marker, marker[0] ~ ' ' ~ marker[1:]) %}"
    "{%- endfor %}"
    "{{- '' if loop.first else '\\n' }}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + said.text + '<|im_end|>' }}"
    "{{- eos_token if message['role'] == 'assistant' }}"
    "{%- endfor %}"
    "{{- '\\n<|im_start|>assistant\\n' if add_generation_prompt }}"
)

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


def encode(
    tokenizer: "PreTrainedTokenizerBase", prompt: list[Message], answer: str | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the answer to it; without an answer the second list is empty.

    An answer, with our template earlier ones in the prompt too, is tokenized apart from what it follows, so no merge
    across their boundary can ever make the prompt of training differ from the prompt of inference. BOS, EOS and the
    turn markers all come from the template (`tokenizer.chat_template`). Without one, as with a base model's tokenizer,
    a prompt is its plain text, and the answer to it the next line.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer(plain_text(prompt))["input_ids"]
        if answer is None:
            return ids, []
        return ids, [*_ids(tokenizer, "\n"), *_ids(tokenizer, answer), tokenizer.eos_token_id]
    if answer is None:
        return [token for ids, _ in _segments(tokenizer, prompt, add_generation_prompt=True) for token in ids], []
    *before, (completion, is_answer) = _segments(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    if not is_answer:
        raise UserError("the tokenizer's chat template renders a prompt differently once it is answered")
    return [token for ids, _ in before for token in ids], completion


def encode_conversation(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and for each whether an assistant's turn says it, the turn's stops included.

    Every answer in it is what `encode` makes of that answer, and follows what `encode` makes of the prompt before it.
    """
    ids, said = [], []
    for segment, is_answer in _segments(tokenizer, messages):
        ids += segment
        said += [is_answer] * len(segment)
    return ids, said


def _segments(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], **kwargs: Any
) -> Iterator[tuple[list[int], bool]]:
    """The ids of what stands before, in (True) and after each answer of a conversation, tokenized apart.

    Another template than ours is only asked where the last answer begins.
    """
    text, done = _render(tokenizer, messages, **kwargs), 0
    if tokenizer.chat_template == CHAT_ML_TEMPLATE:
        # No content has a marker in it, so these are the answers.
        answer = f"{re.escape(RESPONSE_TEMPLATE)}(.*?{re.escape(IM_END + tokenizer.eos_token)})"
        spans = [match.span(1) for match in re.finditer(answer, text, flags=re.DOTALL)]
    else:
        answered = len(messages) > 1 and messages[-1]["role"] == "assistant"
        before = _render(tokenizer, messages[:-1], add_generation_prompt=True) if answered else ""
        spans = [(len(before), len(text))] if answered and text.startswith(before) else []
    for start, end in spans:
        yield _ids(tokenizer, text[done:start]), False
        yield _ids(tokenizer, text[start:end]), True
        done = end
    if done < len(text):
        yield _ids(tokenizer, text[done:]), False


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _render(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], **kwargs: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except TemplateError as error:
        # Some models' own templates (gemma-2b-it's) refuse a system turn: it then opens the user's.
        if messages[0]["role"] == "system":
            system, user, *rest = messages
            merged = {"role": "user", "content": f"{system['content']}\n{user['content']}"}
            return _render(tokenizer, [merged, *rest], **kwargs)
        raise UserError(f"the chat template of {tokenizer.name_or_path!r} refuses a conversation: {error}") from error


def plain_text(prompt: list[Message]) -> str:
    """A prompt for a model without a chat template: the turns' contents, a line each, and no markers."""
    return "\n".join(message["content"] for message in prompt)


def add_chat_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", special_tokens: list[str]) -> int:
    """Give `special_tokens` an id and an embedding each; returns how many are new.

    The embedding matrix grows to a multiple of 64 rows (tensor cores like that); input and output rows of new ids
    start as the mean of the old ones, so that no new token begins as an outlier (a random row can have a logit above
    every trained one).
    """
    known = len(tokenizer)
    added = tokenizer.add_special_tokens(
        {"additional_special_tokens": special_tokens}, replace_extra_special_tokens=False
    )
    if added == 0:
        return 0
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        # mean_resizing would draw the rows from a normal distribution around the mean; we want the mean itself.
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    import torch  # it takes seconds, and a misspelled option is to be told before

    with torch.no_grad():
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            embeddings.weight[known:] = embeddings.weight[:known].mean(dim=0)
    return added


def set_chat_format(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", special_tokens: list[str] | None = None
) -> None:
    """Make ChatML the tokenizer's template, and both stops part of the model's generation config.

    With `special_tokens` these get ids and embeddings first. Raises `UserError` where the tokenizer has no EOS token: a
    model trained without one cannot learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token, so answers would never end")
    if special_tokens:
        add_chat_tokens(model, tokenizer, special_tokens)
    tokenizer.chat_template = CHAT_ML_TEMPLATE
    model.generation_config.eos_token_id = stop_token_ids(tokenizer)


def stop_token_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """EOS and, where it is a single token, `<|im_end|>`."""
    end = tokenizer(IM_END, add_special_tokens=False)["input_ids"]
    return [tokenizer.eos_token_id, *(end if len(end) == 1 else [])]


def generation_stops(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Keyword arguments for `generate` that end an answer at `<|im_end|>`, however it is tokenized, at EOS, or at a
    stop of the model's own."""
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else own or []
    ours = stop_token_ids(tokenizer)
    stops: dict[str, Any] = {"eos_token_id": sorted({*own, *ours})}
    if tokenizer.chat_template is not None and len(ours) == 1:
        stops |= {"stop_strings": [IM_END], "tokenizer": tokenizer}
    return stops


def read_answer(
    tokenizer: "PreTrainedTokenizerBase", completion_ids: list[int], stops: list[int]
) -> tuple[str, int, bool]:
    """A generated completion, without its stops and what a batch padded after them: its text, how many tokens that is,
    and whether it ended by itself. `stops` are token ids; `<|im_end|>` may be spelled out as well."""
    end = next((n for n, token in enumerate(completion_ids) if token in (*stops, tokenizer.pad_token_id)), None)
    ids = completion_ids[:end]
    text, spelled, _ = tokenizer.decode(ids, skip_special_tokens=True).partition(IM_END)
    tokens = len(ids) - (len(_ids(tokenizer, IM_END)) if spelled else 0)
    return text.strip(), max(tokens, 0), end is not None or bool(spelled)


def answer_spans(tokenizer: "PreTrainedTokenizerBase", completions: list[list[int]]) -> list[tuple[int, int]]:
    """Where in completions of `encode`'s the answers' own tokens are: before their stops and, without a template, after
    their line break. (A token that holds an answer's end and a stop's beginning counts as the answer's.)"""
    one, other = (encode(tokenizer, [{"role": "user", "content": "?"}], text)[1][::-1] for text in ("a", "b"))
    stops = one[: _shared(one, other)]
    begin = len(_ids(tokenizer, "\n")) if tokenizer.chat_template is None else 0
    return [(begin, max(begin, len(ids) - _shared(ids[::-1], stops))) for ids in completions]


def _shared(one: list[int], other: list[int]) -> int:
    """How many ids two lists begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
