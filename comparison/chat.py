"""Chat with a model in the terminal. It sees the whole conversation, and each answer is printed as it comes."""

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chat_format import IM_END, Message
from comparison.generation import answer_batch, run_in_halves, shorten_prompt
from comparison.options import Sampling
from pages.terminal import visible

HELP = "Enter sends, an empty line is not sent, /new starts again, /quit or Ctrl-D ends; Ctrl-C stops an answer."


def chat(
    console: Console, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> None:
    """Chat until the user ends it. When the conversation outgrows the model's context, its beginning is left out."""
    console.print(f"You are talking to {name}. {HELP}", markup=False)
    if tokenizer.chat_template is None:
        console.print("It has no chat template: it continues the text of the conversation.")
    messages: list[Message] = []
    while True:
        try:
            text = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/quit":
            return
        if text == "/new":
            messages = []
            console.print("(a new conversation)")
        elif text.startswith("/"):
            console.print(HELP, markup=False)
        elif text:
            messages.append({"role": "user", "content": text})
            ids, cut = shorten_prompt(model, tokenizer, messages, sampling.max_new_tokens)
            if cut:
                console.print("(the beginning of the conversation no longer fits, and is left out)", style="dim")
            console.print(f"{name}: ", end="", style="bold", markup=False)
            answer = _print_answer(console, model, tokenizer, ids, sampling)
            messages.append({"role": "assistant", "content": answer})


def _print_answer(
    console: Console, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], sampling: Sampling
) -> str:
    """Print the answer to `prompt` as it comes, and return it: all of it, or what came before Ctrl-C."""
    ids: list[int] = []
    printed = ""

    def show(new_ids: list[int], last: bool = False) -> None:
        nonlocal printed
        ids.extend(new_ids)
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).split(IM_END)[0].lstrip()
        if not last:  # hold back what may be the beginning of a stop, or of a character
            held = next((n for n in range(len(IM_END) - 1, 0, -1) if text.endswith(IM_END[:n])), 0)
            text = text[: len(text) - held].rstrip("\N{REPLACEMENT CHARACTER}")
        console.print(visible(text[len(printed) :]), end="", markup=False, soft_wrap=True)
        printed = text

    try:
        run_in_halves(lambda batch: answer_batch(model, tokenizer, batch, sampling, show), [prompt])
    except KeyboardInterrupt:
        console.print(" (stopped)", end="", style="dim")
    show([], last=True)
    console.print()
    return printed.strip()
