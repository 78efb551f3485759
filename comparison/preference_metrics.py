"""How well a model's probabilities agree with people's preferences, and how sure that is: no judge, no sampling.

A model is asked nothing here: it is shown a prompt and the two answers that people have compared, and says how likely
each is. `score_pairs` gives the log-probs that TRL's DPOTrainer computes; the rest is arithmetic on them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference

from chat_format import answer_spans
from data.truncation import Truncation
from dataset_utils import tokenize_dpo_dataset

RESAMPLES = 2000
BATCH_TOKENS = 8192  # TRL's fused head takes 128 KiB for each on a GPU, while it is at work
NGRAM = 3


class PairScore(NamedTuple):
    """What a model says of a preference pair: log-probs (natural) and token counts.

    `chosen` and `rejected` are of the whole answer, stops included, as DPO sums them. `text` is of the chosen answer's
    own tokens, without the stops, of which models that are prompted differently have different ones.
    """

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    text: float
    text_tokens: int
    cut: bool = False  # by a limit


class Estimate(NamedTuple):
    """A figure and its 95% interval; `count` is of the rows it is from."""

    value: float
    low: float
    high: float
    count: int


def tokenize_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of `load_dpo_dataset`'s pairs, each row's `kept` telling whether it
    has room: a prompt and an answer have half of `max_length` each, as in dpo.yaml."""
    half = max_length // 2
    limits = {"max_length": max_length, "max_prompt_length": half, "max_target_length": half}
    (tokenized,) = tokenize_dpo_dataset(DatasetDict(test=pairs), tokenizer, every_row=True, **limits).values()
    kept = [not any(Truncation(name).drops_row for name in names) for names in tokenized["truncations"][:]]
    return tokenized.add_column("kept", kept)


@torch.inference_mode()
def score_batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[dict]) -> list[PairScore]:
    """The scores of tokenized pairs, in one right-padded batch of twice as many sequences, as in training.

    The model needs TRL's fused head (`add_fused_lm_head`): log-probs of the labels, and never a whole batch's logits.
    """
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(pairs)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    logps = model(**batch, labels=labels, fused_lm_head=True).log_probs.double()
    chosen, rejected = logps.sum(dim=1).chunk(2)
    scores = []
    spans = answer_spans(tokenizer, [pair["chosen_ids"] for pair in pairs])
    for index, (pair, (begin, end)) in enumerate(zip(pairs, spans, strict=True)):
        offset = len(pair["prompt_ids"]) - 1  # the log-prob of a token stands where the one before it does
        text = logps[index, offset + begin : offset + end].sum()
        lengths = len(pair["chosen_ids"]), len(pair["rejected_ids"])
        logp = chosen[index].item(), rejected[index].item()
        cut = any(Truncation(name).cuts_row for name in pair["truncations"])
        scores.append(PairScore(*logp, *lengths, text.item(), end - begin, cut))
    return scores


def preference_metrics(
    scores: list[PairScore], reference: list[PairScore] | None, beta: float
) -> dict[str, Estimate | None]:
    """Figures of a model on pairs; those against the `reference` are None without one (it is the model itself).

    | figure                        | of a pair                                                                        |
    |-------------------------------|----------------------------------------------------------------------------------|
    | preference accuracy           | whether log p(chosen) > log p(rejected)                                          |
    | preference accuracy, by token | the same of the mean log-probs of a token, which favours no length               |
    | reward accuracy               | whether the implicit reward is higher for chosen                                 |
    | reward margin                 | by how much                                                                      |
    | perplexity of chosen          | exp of the mean negative log-prob of the chosen answers' tokens, stops left out  |

    The implicit reward is beta (log p(answer) - log p_reference(answer)), equation 5 of the DPO paper without its
    partition function, which the difference of two rewards does not need (https://arxiv.org/abs/2305.18290). It is
    what training reports where both models are prompted alike, as SFT and DPO are. A base model without a chat template
    reads the same words without their markers: against it, each is measured on its own terms.
    """
    chosen, rejected, chosen_tokens, rejected_tokens, text, text_tokens, _ = np.array(scores, dtype=float).T
    figures: dict[str, Estimate | None] = {
        "preference_accuracy": estimate(chosen > rejected),
        "preference_accuracy_by_token": estimate(chosen / chosen_tokens > rejected / rejected_tokens),
        "reward_accuracy": None,
        "reward_margin": None,
        "perplexity": estimate(-text, text_tokens, np.exp),
    }
    if reference is not None:
        base = np.array(reference, dtype=float)
        margins = beta * ((chosen - base[:, 0]) - (rejected - base[:, 1]))
        figures |= {"reward_accuracy": estimate(margins > 0), "reward_margin": estimate(margins)}
    return figures


def answer_metrics(answers: list) -> dict[str, Estimate | None]:
    """Figures of generated `Answer`s: mean length in tokens, the share that stopped by itself, and the share of an
    answer's word 3-grams that are distinct (after distinct-n, https://arxiv.org/abs/1510.03055; 1: nothing repeats
    itself). None where nothing can be counted."""
    distinct = [share for answer in answers if (share := distinct_ngrams(answer.text)) is not None]
    return {
        "answer_tokens": estimate([answer.tokens for answer in answers]),
        "stopped": estimate([answer.stopped for answer in answers]),
        "distinct_ngrams": estimate(distinct),
    }


def distinct_ngrams(text: str, n: int = NGRAM) -> float | None:
    """The share of a text's n-grams of words that are distinct; None where it is shorter than one."""
    words = text.split()
    ngrams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def estimate(
    values: np.ndarray | list, weights: np.ndarray | None = None, transform: Callable = lambda mean: mean
) -> Estimate | None:
    """`transform` (a rising function) of the weighted mean, sum(values) / sum(weights), with a 95% bootstrap interval.

    That is the percentiles of it over `RESAMPLES` samples of the rows, each as many as there are, drawn with
    replacement. Where all rows agree, so do all samples, and the interval has no width, however few they are. Rows
    without weight are left out; None where there are no others.
    """
    values = np.asarray(values, dtype=float)
    weights = np.ones_like(values) if weights is None else weights
    values, weights = values[weights > 0], weights[weights > 0]
    if not len(values):
        return None
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].sum(axis=1) / weights[draws].sum(axis=1), (2.5, 97.5))
    value, low, high = (float(transform(mean)) for mean in (values.sum() / weights.sum(), low, high))
    return Estimate(value, low, high, len(values))


def pair_batches(tokenized: Dataset, batch_size: int) -> list[list[int]]:
    """The indices of the pairs that are kept, in batches of like lengths, the longest first: each of at most
    `batch_size` pairs and, with padding, `BATCH_TOKENS` tokens (or of one pair)."""
    lengths = np.maximum(*(np.array([len(ids) for ids in tokenized[f"{side}_ids"]]) for side in ("chosen", "rejected")))
    lengths = lengths + np.array([len(ids) for ids in tokenized["prompt_ids"]])
    indices = np.flatnonzero(tokenized["kept"][:])
    found: list[list[int]] = []
    for index in map(int, indices[np.argsort(-lengths[indices], kind="stable")]):
        longest = lengths[found[-1][0]] if found else 0
        if not found or len(found[-1]) == batch_size or 2 * longest * (len(found[-1]) + 1) > BATCH_TOKENS:
            found.append([])
        found[-1].append(index)
    return found
