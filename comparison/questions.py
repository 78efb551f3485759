"""Load the questions that all models are asked, and the preference pairs that they score."""

from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from rich.console import Console

from chat_format import Message
from comparison.options import DEFAULT_DATASETS, ComparisonOptions
from config.hyperparameters import DEFAULT_SPLIT_SEED, DataSource
from config.validation import validate
from dataset_utils import load_dpo_dataset, load_prompts
from storage.files import refuse_special_files

# The first four rows that the published inference.py asks (it takes ten, and begins with the second row).
BLOG = DataSource("Intel/orca_dpo_pairs", split="train[1:5]")


class Questions(NamedTuple):
    """What a comparison asks. `pairs` is None if there are none to score."""

    prompts: list[list[Message]]
    preferred: list[str | None]  # the answer to each question that people preferred, if it is known
    pairs: Dataset | None
    sources: str = ""  # the preference data sets, in words


def load_questions(options: ComparisonOptions, console: Console) -> Questions:
    """Load the user's own questions, or held-out rows of the preference data sets. Raises `UserError`."""
    own: list[list[Message]] = [[{"role": "user", "content": text}] for text in options.prompt]
    preferred: list[str | None] = [None] * len(own)
    if options.prompts:
        rows = load_prompts(BLOG if options.prompts == "blog" else _source(options.prompts, options.key("prompts")))
        own += rows["prompt"][:]
        preferred += rows["preferred"][:]
    if own and not options.data_sets:
        return Questions(own, preferred, None)
    named = options.dataset or ([] if options.eval_dataset else DEFAULT_DATASETS)
    sources = [_source(given, options.key("dataset")) for given in named]
    evaluation = [_source(given, options.key("eval_dataset")) for given in options.eval_dataset]
    seed = DEFAULT_SPLIT_SEED if options.data_seed is None else options.data_seed
    held_out = load_dpo_dataset(sources, seed, evaluation=evaluation)["test"]
    held_out = held_out.shuffle(seed=seed)  # so that the first rows are of all sources

    def first(field: str, default: int) -> Dataset:
        count = getattr(options, field)
        if (count or 0) > len(held_out):
            console.print(f"{options.key(field)} {count}: only {len(held_out)} rows are held out")
        return held_out.select(range(min(default if count is None else count, len(held_out))))

    pairs = first("number_of_pairs", default=len(held_out))
    if not own:
        rows = first("number_of_samples", default=10)
        own, preferred = rows["prompt"][:], rows["chosen"][:]
    return Questions(own, preferred, pairs if len(pairs) else None, ", ".join(map(str, sources + evaluation)))


def _source(given: str | dict[str, Any], key: str) -> DataSource:
    source = DataSource(given) if isinstance(given, str) else validate(DataSource, given, key)
    refuse_special_files(Path(source.name), f"{key} {source.name}")
    return source
