"""How to serve an exported folder: the commands, and the `Modelfile` that Ollama reads."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from chat_format import CHAT_ML_TEMPLATE, IM_END, ollama_template, stop_token_ids

MODELFILE = "Modelfile"


def modelfile(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return Ollama's Modelfile for a folder; None for a chat template that is not ours, which it could not follow.

    A base model without a template gets the prompt as it is.
    """
    if tokenizer.chat_template not in (None, CHAT_ML_TEMPLATE):
        return None
    is_base = tokenizer.chat_template is None
    template = "{{ .Prompt }}" if is_base else ollama_template(tokenizer)
    stops = [tokenizer.eos_token] if is_base else [IM_END, tokenizer.eos_token]
    return "\n".join(["FROM .", f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops), ""])


def serving_commands(folder: Path, dtype: str, for_ollama: bool) -> Iterator[tuple[str, str]]:
    """Yield the commands that serve a folder, each with its server's name."""
    path = shlex.quote(str(folder))
    yield "transformers", f"pip install 'transformers[serving]' && transformers serve {path}"
    # For weights in float32 vLLM would choose a 16-bit type.
    yield "vLLM", f"vllm serve {path}" + (" --dtype float32" if dtype == "float32" else "")
    if for_ollama:
        name = re.sub(r"[^a-z0-9._-]+", "-", folder.absolute().name.lower()).strip("-._") or "model"
        yield "Ollama", f"ollama create {name} -f {shlex.quote(str(folder / MODELFILE))} && ollama run {name}"


def remarks(tokenizer: PreTrainedTokenizerBase, has_sentence_piece: bool) -> Iterator[str]:
    """Yield what to know before serving a folder with this tokenizer, a line each."""
    if tokenizer.chat_template is None:
        yield (
            "It has no chat template, as a base model: a server refuses /v1/chat/completions; /v1/completions continues"
            " the text that it is given."
        )
    elif len(stop_token_ids(tokenizer)) == 1 and tokenizer.chat_template == CHAT_ML_TEMPLATE:
        yield (
            f"{IM_END} is several tokens here, and a stop of several tokens fits into no generation config: answers end"
            f' with its text unless a request says "stop": ["{IM_END}"]. (Ollama\'s Modelfile does.)'
        )
    if tokenizer.chat_template not in (None, CHAT_ML_TEMPLATE):
        yield f"There is no {MODELFILE} for Ollama: the chat template is the model's own, which it could not follow."
    elif not has_sentence_piece:
        yield (
            "Ollama and llama.cpp read a tokenizer like this one from tokenizer.model, which neither the source nor its"
            " base has: put it into the folder before `ollama create`, or answers are garbage."
        )
