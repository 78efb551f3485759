"""What the compared models were trained with and on, as their checkpoints say (`storage/origins.py`)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from comparison.questions import Questions
from config.hyperparameters import DEFAULT_BETA, DEFAULT_EVAL_RATIO
from data.splitting import prompt_key, row_prompt
from dataset_utils import load_dpo_dataset
from errors import UserError
from pages.terminal import plural
from storage.origins import Origin, read_origin


def read_origins(models: Mapping[str, str]) -> dict[str, Origin]:
    """Return what is known of the models' trainings, by name. `models` are folders or hub ids."""
    found = {name: read_origin(Path(source)) for name, source in models.items()}
    return {name: origin for name, origin in found.items() if origin}


def reward_betas(models: Mapping[str, str], origins: Mapping[str, Origin], given: float | None) -> dict[str, float]:
    """Return the beta of each model's rewards: the one that is `given`, or that of its own training.

    A model without one, such as an SFT model, takes that of the others if they agree: their margins then compare.
    """
    if given is not None:
        return dict.fromkeys(models, given)
    own = {name: origin.beta for name, origin in origins.items() if origin.beta is not None}
    common = next(iter(own.values())) if len(set(own.values())) == 1 else DEFAULT_BETA
    return {name: own.get(name, common) for name in models}


def describe_betas(betas: Mapping[str, float], origins: Mapping[str, Origin], given: float | None) -> str:
    """Return which betas the rewards have, and why, as a phrase."""
    trained = [name for name, origin in origins.items() if origin.beta is not None]
    if len(set(betas.values())) == 1:
        why = f", as {' and '.join(trained)} had in training" if trained and given is None else ""
        return f"rewards with beta {next(iter(betas.values())):g}{why}"
    each = ", ".join(f"{betas[name]:g} for {name}" for name in trained)
    default = f", {DEFAULT_BETA} for others" if len(trained) < len(betas) else ""
    return f"rewards with the beta of each training ({each}{default}), so that their margins do not compare"


def trained_on(questions: Questions, origins: Mapping[str, Origin]) -> Iterator[str]:
    """Yield a line for each DPO model that was trained on prompts of the pairs, or for which that cannot be seen."""
    if questions.pairs is None:
        return
    keys = [prompt_key(row_prompt(row)) for row in questions.pairs]
    for name, origin in origins.items():
        if origin.beta is None or held_out_alike(questions, origin):
            continue
        try:
            trained = load_dpo_dataset(origin.sources, origin.data_seed)["train"]
        except UserError as error:
            yield f"{name}: which pairs it was trained on cannot be checked ({error})"
            continue
        prompts = {prompt_key(row_prompt(row)) for row in trained}
        if known := sum(key in prompts for key in keys):
            of = f"{name} was trained on the prompts of {known} of these {plural(len(keys), 'pair')}"
            yield f"{of}: its own run holds out others (data_seed {origin.data_seed}, or its eval_ratio or data)"


def held_out_alike(questions: Questions, origin: Origin) -> bool:
    """Return whether a training has held out the prompts of all pairs of `questions`, without a look at its rows.

    A prompt's side depends on the prompt, the seed and the ratio alone, not on a data set's name or place.
    """
    if questions.evaluation or questions.seed != origin.data_seed:
        return False
    if all(source in origin.sources for source in questions.sources):
        return True
    if any(source.evaluation for source in (*questions.sources, *origin.sources)):
        return False
    asked, trained = (
        [DEFAULT_EVAL_RATIO if source.eval_ratio is None else source.eval_ratio for source in sources]
        for sources in (questions.sources, origin.sources)
    )
    return max(asked) <= min(trained)
