"""Turn any model into one plain folder, and prove it, step by step. One model is in memory at a time."""

import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from chat_format import check_template, encode
from errors import UserError, os_errors_of, reading
from serving.folder import add_files_for_ollama, finished_at_end, write_model
from serving.held_out import load_held_out
from serving.lineage import read_lineage
from serving.model_card import render_card
from serving.proof import SIMILAR, compare_answers, compare_ids, greedy_answers
from serving.servers import MODELFILE, modelfile, remarks, serving_commands
from speed.hardware import attend_without_plans
from storage.files import write_atomically
from storage.hub import quiet_lookup
from trial.models import load_model_and_tokenizer

KEY = "SOURCE"


@dataclass
class Export:
    """What to export, and how."""

    given: str  # SOURCE, as the user names it
    source: str  # the folder or hub id that it stands for
    folder: Path
    dtype: str
    device: torch.device
    name: str  # for the model card
    console: Console

    def say(self, line: str) -> str:
        """Tell the user a line, which begins with a capital there; return it."""
        self.console.print(line[0].upper() + line[1:], markup=False, soft_wrap=True)
        return line


def export(what: Export) -> list[tuple[str, str]]:
    """Write the folder and prove it; return the commands that serve it. Raises `UserError`, and leaves no folder then.

    It is done in this order: the answers of the source, whose adapters, if it has any, are apart from its weights; the
    merged model, with the same answers in float32; the folder in its own type; the folder loaded afresh, with the same
    token ids and answers.
    """
    lineage, proof = read_lineage(what.source), list[str]()
    held_out = load_held_out(lineage.stages[-1] if lineage.stages else None)
    if held_out.why:
        what.say(f"it is tried on {held_out.about}: {held_out.why}")
    attend_without_plans()

    what.say(f"loading {what.given} in float32")
    model, tokenizer = load(what.source, merge=False)
    check_template(tokenizer)
    questions = [encode(tokenizer, question)[0] for question in held_out.questions()]
    answer = partial(greedy_answers, prompts=questions, device=what.device, console=what.console)
    answers = answer(model, tokenizer, title="answers of the source")
    if has_adapters := not isinstance(model, PreTrainedModel):
        del model
        free_memory()
        what.say("merging the adapters")
        model, tokenizer = load(what.source, merge=True)
        same = compare_answers(answers, answer(model, tokenizer, title="answers of the merged model"))
        proof.append(what.say(f"the merged model, in float32: {same}, compared with adapters that are not merged"))
        if not same.exact:
            raise UserError(f"{KEY} {what.given}: merged it answers differently: {same}")

    with finished_at_end(what.folder) as folder:
        what.say(f"writing {what.folder} in {what.dtype}")
        with os_errors_of(what.folder):
            write_model(model, tokenizer, folder, getattr(torch, what.dtype))
            del model
            free_memory()
            complete = add_files_for_ollama(folder, tokenizer, what.source, lineage.base)
            if text := modelfile(tokenizer):
                write_atomically(folder / MODELFILE, text)

        what.say("loading the folder afresh, with plain transformers")
        served_tokenizer, served = load_plain(folder)
        same_ids = compare_ids(tokenizer, served_tokenizer, held_out.prompts)
        proof.append(what.say(f"the folder's tokenizer, on {held_out.about}: {same_ids}"))
        same = compare_answers(answers, answer(served, served_tokenizer, title="answers of the folder"))
        del served
        free_memory()
        if same.broken:
            raise UserError(f"{KEY} {what.given}: {what.dtype} cannot hold this model's numbers; try another --dtype")
        said = f"the folder, loaded afresh by plain transformers, in {what.dtype}: {same}"
        proof.append(what.say(f"{said}, compared with the source in float32"))
        if what.dtype == "float32" and not same.exact:
            raise UserError(f"{KEY} {what.given}: its folder answers differently: {same}")
        if same.before < SIMILAR * same.tokens:
            what.say(f"that is little: {what.dtype} may be too coarse for this model; try another --dtype")

        commands, public = (
            list(serving_commands(path, what.dtype, for_ollama=bool(text)))
            for path in (what.folder, Path(what.folder.absolute().name))
        )
        notes = list(remarks(tokenizer, complete))
        card = render_card(what.name, lineage, what.dtype, has_adapters, proof, public, notes)
        with os_errors_of(what.folder):
            write_atomically(folder / "README.md", card)
    for note in notes:
        what.say(note)
    return commands


def load(source: str, merge: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in float32; without `merge`, adapters stay apart from the weights, in a PEFT model."""
    return load_model_and_tokenizer(source, KEY, merge=merge)


def load_plain(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load a folder as anyone would, who knows nothing of this project."""
    with reading(f"the written folder {folder}"), quiet_lookup():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def free_memory() -> None:
    """Give back the memory of a model that is no longer referred to."""
    gc.collect()
    torch.cuda.empty_cache()
