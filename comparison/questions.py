"""Load the questions that all models are asked, and the preference pairs that they score."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from rich.console import Console

from chat_format import Message
from comparison.options import DEFAULT_DATASETS, ComparisonOptions
from config.hyperparameters import DEFAULT_SPLIT_SEED, DataSource, check_evaluation_keys
from config.validation import validate
from dataset_utils import load_dpo_dataset, load_prompts
from errors import UserError, about
from storage.files import refuse_special_files

# Where the questions that the published post shows are from; and, in its order, what each of them asks, with words that
# all occur in it.
BLOG = DataSource("Intel/orca_dpo_pairs", split="train")
BLOG_QUESTIONS = {
    "the best order to watch the Star Wars series": {"star", "wars", "order"},
    "John, a terrible writer": {"john", "terrible", "writer"},
    "two people in a local blizzard": {"local", "blizzard"},
    "the animal on Liverpool's crest": {"liverpool", "crest"},
}


class Questions(NamedTuple):
    """What a comparison asks. `pairs` is None if there are none to score."""

    prompts: list[list[Message]]
    preferred: list[str | None]  # the answer to each question that people preferred, if it is known
    pairs: Dataset | None
    sources: tuple[DataSource, ...] = ()  # the preference data sets whose held-out rows they are
    evaluation: tuple[DataSource, ...] = ()  # and those that are used as a whole
    seed: int = DEFAULT_SPLIT_SEED  # that held the pairs out


def load_questions(options: ComparisonOptions, console: Console) -> Questions:
    """Load the user's own questions, or held-out rows of the preference data sets. Raises `UserError`."""
    own: list[list[Message]] = [[{"role": "user", "content": text}] for text in options.prompt]
    preferred: list[str | None] = [None] * len(own)
    if options.prompts:
        if options.prompts == "blog":
            rows = find_blog_questions(f"{options.key('prompts')} blog", console)
        else:
            rows = load_prompts(_source(options.prompts, options.key("prompts")))
        own += rows["prompt"][:]
        preferred += rows["preferred"][:]
    if own and not options.data_sets:
        return Questions(own, preferred, None)
    named = options.dataset or ([] if options.eval_dataset else DEFAULT_DATASETS)
    sources = [_source(given, options.key("dataset")) for given in named]
    evaluation = [_source(given, options.key("eval_dataset")) for given in options.eval_dataset]
    for source in evaluation:
        with about(options.key("eval_dataset")):
            check_evaluation_keys(source, is_evaluation=True)
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
    return Questions(own, preferred, pairs if len(pairs) else None, tuple(sources), tuple(evaluation), seed)


def find_blog_questions(key: str, console: Console) -> Dataset:
    """Load the published post's questions as `load_prompts` does; name those that are missing. All: `UserError`.

    They are found by their words, wherever they are. If several rows have them, the shortest one is taken: the post's
    questions are short, and a long text may have any words.
    """
    rows = load_prompts(BLOG)
    texts = [prompt[-1]["content"] for prompt in rows["prompt"]]
    words = [set(re.findall(r"\w+", text.casefold())) for text in texts]
    found, missing = [], []
    for title, needed in BLOG_QUESTIONS.items():
        places = [place for place, of in enumerate(words) if needed <= of]
        if places:
            found.append(min(places, key=lambda place: len(texts[place])))
        else:
            missing.append(title)
    if missing:
        text = f"{key}: not in {BLOG}: {'; '.join(missing)}"
        if not found:
            raise UserError(text)
        console.print(text, soft_wrap=True)
    return rows.select(found)


def _source(given: str | dict[str, Any], key: str) -> DataSource:
    source = DataSource(given) if isinstance(given, str) else validate(DataSource, given, key)
    refuse_special_files(Path(source.name), f"{key} {source.name}")
    return source
