"""Turn conversations into token ids. The chat template and its special tokens are defined here and nowhere else.

`encode` and `encode_conversation` render every conversation: for SFT, for DPO and for inference. With ChatML a row is

    <bos><|im_start|>system            \\
    Be brief.<|im_end|>                 | the prompt: exactly the tokens that inference feeds the model
    <|im_start|>user                    |
    What is tea?<|im_end|>              |
    <|im_start|>assistant              /
    A drink made from leaves.<|im_end|><eos>     the completion: what the model learns to say, with both stop tokens

Each later turn begins with a newline, rather than ending with one, so nothing follows the final `<eos>`. A marker in a
turn's content gets a space after its first character, so no content can end its turn or open another one.
"""

from __future__ import annotations

import itertools
import re
import resource
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import psutil
from jinja2 import TemplateError

from errors import UserError, reading
from signals import CRASHES, run_in_child

if TYPE_CHECKING:  # slow to import, and a command needs only the constants to read a YAML
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
RESPONSE_TEMPLATE = f"{IM_START}assistant\n"  # every prompt ends with it
# What a model's own template may take for a few short conversations: CPU seconds, memory, characters of text.
TEMPLATE_SECONDS, TEMPLATE_BYTES, TEMPLATE_CHARACTERS = 2, 2**30, 10**6
TRIED_ROLES = [
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user"],
    ["system", *["user", "assistant"] * 3, "user"],
]
CHILD_SECONDS = 60  # for a child to try it out

# Saved with the tokenizer, so that a server that does not know this project prompts the model in the same way.
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

# The same in the syntax of Go, for Ollama's Modelfile, with {bos} and {eos} to be filled in. (Nothing in it could give
# a marker in a content its space.)
OLLAMA_TEMPLATE = (
    "{bos}"
    "{{- range $i, $_ := .Messages }}"
    "{{ if $i }}\n{{ end }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>"
    '{{ if eq .Role "assistant" }}{eos}{{ end }}'
    "{{ end }}"
    "\n<|im_start|>assistant\n"
)

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


def encode(tokenizer: Tokenizer, prompt: list[Message], answer: str | None = None) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt and of the answer to it (empty without an answer).

    The answer is tokenized separately from the prompt, and so are earlier answers with our template. So no merge across
    the boundary can make the prompt of training differ from the prompt of inference. BOS, EOS and the turn markers come
    from `tokenizer.chat_template`. Without a template, as with a base model's tokenizer, the prompt is its plain text
    and the answer is the next line. Raises `UserError` if the template renders an answered prompt differently.
    """
    if tokenizer.chat_template is None:
        ids, stop = _tokenize(tokenizer, plain_text(prompt), add_special_tokens=True), [tokenizer.eos_token_id]
        return ids, ([] if answer is None else _tokenize(tokenizer, "\n") + _tokenize(tokenizer, answer) + stop)
    if answer is None:
        return [token for ids, _ in _segments(tokenizer, prompt, add_generation_prompt=True) for token in ids], []
    *before, (completion, is_answer) = _segments(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    if not is_answer:
        raise UserError("the tokenizer's chat template renders a prompt differently once it is answered")
    if answer and not completion:
        raise UserError("the tokenizer's chat template leaves the answer out")
    return [token for ids, _ in before for token in ids], completion


def encode_conversation(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Return the token ids of a whole conversation and a mask of the same length: True for the answers' tokens.

    An answer includes its stop tokens. The ids of an answer and of the prompt before it are those of `encode`.
    """
    ids, answer_mask = [], []
    for segment, is_answer in _segments(tokenizer, messages):
        ids += segment
        answer_mask += [is_answer] * len(segment)
    return ids, answer_mask


def _segments(tokenizer: Tokenizer, messages: list[Message], **kwargs: Any) -> Iterator[tuple[list[int], bool]]:
    """Yield the token ids of each part of a rendered conversation, and whether the part is an answer.

    With a template other than ours, only the last answer is a part of its own.
    """
    text, position = _render(tokenizer, messages, **kwargs), 0
    if tokenizer.chat_template == CHAT_ML_TEMPLATE:
        # The template leaves no marker intact in a content, so the matches are exactly the answers.
        answer = f"{re.escape(RESPONSE_TEMPLATE)}(.*?{re.escape(IM_END + tokenizer.eos_token)})"
        spans = [match.span(1) for match in re.finditer(answer, text, flags=re.DOTALL)]
    else:
        answered = len(messages) > 1 and messages[-1]["role"] == "assistant"
        before = _render(tokenizer, messages[:-1], add_generation_prompt=True) if answered else ""
        spans = [(len(before), len(text))] if answered and text.startswith(before) else []
    for start, end in spans:
        yield _tokenize(tokenizer, text[position:start]), False
        yield _tokenize(tokenizer, text[start:end]), True
        position = end
    if position < len(text):
        yield _tokenize(tokenizer, text[position:]), False


def _tokenize(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    with reading(f"the tokenizer of {tokenizer.name_or_path!r}"):
        return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]


def _render(tokenizer: Tokenizer, messages: list[Message], **kwargs: Any) -> str:
    with reading(f"the chat template of {tokenizer.name_or_path!r}"):
        try:
            return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
        except TemplateError:
            # Templates of some models, such as gemma-2b-it, refuse a system turn. Its text then opens the user turn.
            if messages[0]["role"] != "system":
                raise
    system, user, *rest = messages
    merged = {"role": "user", "content": f"{system['content']}\n{user['content']}"}
    return _render(tokenizer, [merged, *rest], **kwargs)


def check_template(tokenizer: Tokenizer) -> None:
    """Raise `UserError` if the tokenizer's chat template takes too much time or memory, or crashes Python.

    A child process renders short conversations: nothing in jinja2's sandbox limits what a template takes.
    """

    def render() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS + 1))
        memory = psutil.Process().memory_info().vms + TEMPLATE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        for roles, content in itertools.product(TRIED_ROLES, ("Tea?", "Tea? " * 1000)):
            turns = [{"role": role, "content": content} for role in roles]
            try:
                text = cast(str, tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            except MemoryError:
                sys.exit(3)
            except Exception:  # is reported where it is used
                continue
            if len(text) > TEMPLATE_CHARACTERS:
                sys.exit(2)

    if tokenizer.chat_template in (None, CHAT_ML_TEMPLATE):
        return
    ends = {2: f"writes more than {TEMPLATE_CHARACTERS:,} characters", 3: "runs out of memory"}
    ends[-signal.SIGXCPU] = f"takes more than {TEMPLATE_SECONDS} seconds"
    ends |= dict.fromkeys(CRASHES, "crashes Python")
    if what := ends.get(run_in_child(render, CHILD_SECONDS)):
        raise UserError(f"the chat template of {tokenizer.name_or_path!r} {what} for a short conversation")


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer begins a text with BOS by itself, where it is asked for special tokens."""
    return _tokenize(tokenizer, "Tea?", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]


def ollama_template(tokenizer: Tokenizer) -> str:
    """Return what `CHAT_ML_TEMPLATE` is in an Ollama Modelfile. Its prompts begin with one BOS, if any.

    Ollama adds BOS to a prompt where `add_bos_token` in tokenizer_config.json says so. Else the template has to.
    """
    bos = "" if adds_bos(tokenizer) else tokenizer.bos_token or ""
    return OLLAMA_TEMPLATE.replace("{bos}", bos).replace("{eos}", cast(str, tokenizer.eos_token))


def plain_text(prompt: list[Message]) -> str:
    """Return a prompt for a model without a chat template: each turn's content on a line, without markers."""
    return "\n".join(message["content"] for message in prompt)


def add_chat_tokens(model: PreTrainedModel, tokenizer: Tokenizer, special_tokens: list[str]) -> int:
    """Give each of `special_tokens` an id and an embedding; return how many of them are new.

    The embedding matrix grows to a multiple of 64 rows, which suits tensor cores. The input and output rows of new ids
    start as the mean of the old rows: a random row can give its token a logit above that of every trained token.
    """
    old_size = len(tokenizer)
    added: dict[str, Any] = {"additional_special_tokens": special_tokens}
    new = tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
    if new:
        start_new_rows(model, old_size, len(tokenizer))
    return new


def start_new_rows(model: PreTrainedModel, old_size: int, new_size: int) -> None:
    """Make the rows of the embeddings from `old_size` on the mean of those before, of which `new_size` are needed."""
    import torch

    old_size = min(old_size, cast(int, model.get_input_embeddings().num_embeddings))  # a tokenizer may have more tokens
    if new_size > cast(int, model.get_input_embeddings().num_embeddings):
        # mean_resizing would draw the rows from a normal distribution around the mean; we want the mean itself.
        model.resize_token_embeddings(new_size, pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = cast("torch.Tensor", layer.weight)
            weight[old_size:] = weight[:old_size].mean(dim=0)


def set_chat_format(model: PreTrainedModel, tokenizer: Tokenizer, special_tokens: list[str] | None = None) -> None:
    """Set the tokenizer's template to ChatML and the model's stop tokens to EOS and, if it is one token, `<|im_end|>`.

    `special_tokens`, if given, first get ids and embeddings. Raises `UserError` if the tokenizer has no EOS token,
    without which a model cannot learn to stop, or makes no token of the markers.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token, so answers would never end")
    if not _tokenize(tokenizer, RESPONSE_TEMPLATE):
        raise UserError(f"the tokenizer of {tokenizer.name_or_path!r} makes no token of a text")
    if special_tokens:
        add_chat_tokens(model, tokenizer, special_tokens)
    tokenizer.chat_template = CHAT_ML_TEMPLATE
    model.generation_config.eos_token_id = stop_token_ids(tokenizer)


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the id of EOS and, if it is a single token, the id of `<|im_end|>`."""
    end = _tokenize(tokenizer, IM_END)
    return [tokenizer.eos_token_id, *(end if len(end) == 1 else [])]


def generation_stops(model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return arguments that make `generate` stop at EOS, at the model's own stop tokens and at any `<|im_end|>`."""
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else own or []
    ours = stop_token_ids(tokenizer)
    stops: dict[str, Any] = {"eos_token_id": sorted({*own, *ours})}
    if tokenizer.chat_template is not None and len(ours) == 1:
        stops |= {"stop_strings": [IM_END], "tokenizer": tokenizer}
    return stops


def read_answer(tokenizer: Tokenizer, completion_ids: list[int], stops: list[int]) -> tuple[str, int, bool]:
    """Return a generated completion's text, its number of tokens, and whether it ended by itself.

    Stop tokens and padding are left out. `stops` are the ids of stop tokens; an `<|im_end|>` of several tokens ends the
    answer too.
    """
    end = next((n for n, token in enumerate(completion_ids) if token in (*stops, tokenizer.pad_token_id)), None)
    ids = completion_ids[:end]
    text, marker, _ = cast(str, tokenizer.decode(ids, skip_special_tokens=True)).partition(IM_END)
    tokens = len(ids) - (len(_tokenize(tokenizer, IM_END)) if marker else 0)
    return text.strip(), max(tokens, 0), end is not None or bool(marker)


def answer_spans(tokenizer: Tokenizer, completions: list[list[int]]) -> list[tuple[int, int]]:
    """Return where (start, end) the answer's own tokens are in each completion that `encode` returned.

    They exclude the stop tokens and, without a template, the line break before the answer. (A token that holds both the
    end of an answer and the beginning of a stop counts as the answer's.)
    """
    # Two different answers have only their stop tokens in common, counted from the end.
    one, other = (encode(tokenizer, [{"role": "user", "content": "?"}], text)[1][::-1] for text in ("a", "b"))
    stops = one[: _common_prefix_length(one, other)]
    start = len(_tokenize(tokenizer, "\n")) if tokenizer.chat_template is None else 0
    return [(start, max(start, len(ids) - _common_prefix_length(ids[::-1], stops))) for ids in completions]


def _common_prefix_length(one: list[int], other: list[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
