"""A conversation with a model in the terminal, with its history, each answer printed as it comes."""

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chat_format import IM_END, Message
from comparison.generation import Sampling, answer_batch, fitted, in_halves
from pages.terminal import visible

HELP = "Enter sends, an empty line is not sent, /new begins anew, /quit or Ctrl-D ends; Ctrl-C stops an answer."


def chat(
    console: Console,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> None:
    """Talk to `model` until the user has enough. What no longer fits its context goes from the conversation's start."""
    console.print(f"You are talking to {name}. {HELP}", markup=False)
    if tokenizer.chat_template is None:
        console.print("It has no chat template: it goes on with the text of the conversation.")
    messages: list[Message] = []
    while True:
        try:
            said = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if said == "/quit":
            return
        if said == "/new":
            messages = []
            console.print("(a new conversation)")
        elif said.startswith("/"):
            console.print(HELP, markup=False)
        elif said:
            messages.append({"role": "user", "content": said})
            ids, forgot = fitted(model, tokenizer, messages, sampling.max_new_tokens)
            if forgot:
                console.print("(the beginning of the conversation no longer fits, and is left out)", style="dim")
            console.print(f"{name}: ", end="", style="bold", markup=False)
            answer = _answer(console, model, tokenizer, ids, sampling)
            messages.append({"role": "assistant", "content": answer})


def _answer(
    console: Console,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    sampling: Sampling,
) -> str:
    """The answer to `prompt`, printed as it comes: all of it, or what there was when Ctrl-C stopped it."""
    ids: list[int] = []
    printed = ""

    def show(new: list[int], last: bool = False) -> None:
        nonlocal printed
        ids.extend(new)
        text = tokenizer.decode(ids, skip_special_tokens=True).split(IM_END)[0].lstrip()
        if not last:  # what may be the beginning of a stop, or of a character, is held back
            held = next((n for n in range(len(IM_END) - 1, 0, -1) if text.endswith(IM_END[:n])), 0)
            text = text[: len(text) - held].rstrip("�")
        console.print(visible(text[len(printed) :]), end="", markup=False, soft_wrap=True)
        printed = text

    try:
        in_halves(lambda batch: answer_batch(model, tokenizer, batch, sampling, show), [prompt])
    except KeyboardInterrupt:
        console.print(" (stopped)", end="", style="dim")
    show([], last=True)
    console.print()
    return printed.strip()
