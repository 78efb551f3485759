"""The prompts that an exported model is tried on: those of the rows that its own training held out."""

from dataclasses import replace
from typing import NamedTuple

from chat_format import Message
from data.splitting import row_prompt
from dataset_utils import load_dpo_dataset, load_sft_dataset
from errors import UserError
from serving.lineage import Stage, public_name

MOST_PROMPTS = 300
MOST_ROWS = 2000  # to draw of a source: enough to hold out some hundreds
LONGEST_QUESTION = 1000  # characters of a prompt that is answered
NUMBER_OF_QUESTIONS = 10
# In place of held-out rows, where there are none.
QUESTIONS = (
    "What is tea?",
    "How do I boil an egg?",
    "Name three rivers of Europe.",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "What is the difference between a virus and a bacterium?",
    "Explain what a hash table is to a child.",
    "Translate 'good morning' into French and Spanish.",
    "A train leaves at 9:40 and arrives at 11:15. How long does it take?",
    "Give me a plan for learning to play the guitar.",
)


class HeldOut(NamedTuple):
    """Prompts, in words what they are, and for the user alone why they are not of the training's own data."""

    prompts: list[list[Message]]
    about: str
    why: str = ""

    def questions(self) -> list[list[Message]]:
        """Return ten short prompts, made up if there are not enough."""
        short = [prompt for prompt in self.prompts if sum(len(turn["content"]) for turn in prompt) <= LONGEST_QUESTION]
        return (short + built_in_questions())[:NUMBER_OF_QUESTIONS]


def built_in_questions() -> list[list[Message]]:
    """Return the ten `QUESTIONS` as prompts."""
    return [[{"role": "user", "content": text}] for text in QUESTIONS]


def load_held_out(stage: Stage | None) -> HeldOut:
    """Load prompts that a training held out, at most `MOST_PROMPTS`; the built-in ones if its data cannot be loaded."""
    if stage is None or stage.origin is None:
        return _built_in("the model does not tell its training")
    origin = stage.origin
    # A prompt's side depends on the prompt, the seed and the ratio alone: a smaller draw holds out the same prompts.
    sources = [
        replace(source, number_of_samples=min(source.number_of_samples, MOST_ROWS))
        if source.number_of_samples
        else source
        for source in origin.sources
    ]
    try:
        if origin.beta is None:
            streaming = all(source.number_of_samples for source in sources)  # else all of a hub's data set is fetched
            rows = load_sft_dataset(sources, origin.data_seed, streaming)["test"]
        else:
            rows = load_dpo_dataset(sources, origin.data_seed)["test"]
    except UserError as error:
        return _built_in(str(error))
    rows = rows.shuffle(seed=origin.data_seed)  # so that the first are of all sources
    prompts = [row_prompt(row) for row in rows.select(range(min(MOST_PROMPTS, len(rows))))]
    names = ", ".join(dict.fromkeys(public_name(source.name) for source in sources))
    return HeldOut(prompts, f"{len(prompts)} held-out prompts of {names}")


def _built_in(why: str) -> HeldOut:
    return HeldOut(built_in_questions(), f"{len(QUESTIONS)} built-in questions", why)
