"""Measure how well a model's probabilities agree with people's preferences. This needs no judge and no sampling.

A model reads a prompt and two answers that people have compared, and says how likely each one is. `score_batch`
returns the log-probs that TRL's DPOTrainer computes; the metrics are arithmetic on them, with 95% intervals.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference

from chat_format import answer_spans
from comparison.generation import Answer, batch_by_length
from data.truncation import Truncation
from dataset_utils import tokenize_dpo_dataset
from metrics.evaluations import of_like_length
from metrics.intervals import Estimate, estimate

# With padding. A GPU would gain nothing from more (computed for Gemma-2B on an H100, not measured): launching a forward
# pass takes 25 ms, computing it for 8192 tokens 0.1 s in bf16 and 0.7 s in float32, with 2 GB beside the weights.
BATCH_TOKENS = 8192
NGRAM = 3


class PairScore(NamedTuple):
    """A model's log-probs (natural) of a preference pair, and token counts.

    `chosen` and `rejected` are sums over the whole answer with its stops, as in DPO. `text` is the sum over the chosen
    answer's own tokens, without stops: models that are prompted differently have different stops. `prompt_tokens` shows
    which models are.
    """

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    text: float
    text_tokens: int
    cut: bool = False  # by a length limit
    prompt_tokens: int = 0


def tokenize_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenize `load_dpo_dataset`'s pairs: the prompt and each answer get half of `max_length`, as in dpo.yaml.

    Returns a row for each pair: `prompt_ids`, `chosen_ids`, `rejected_ids`, whether it `fits` at all, or is `cut`.
    """
    half = max_length // 2
    limits = {"max_length": max_length, "max_prompt_length": half, "max_target_length": half}
    tokenized = tokenize_dpo_dataset(DatasetDict(test=pairs), tokenizer, every_row=True, **limits)["test"]
    truncations = [[Truncation(name) for name in names] for names in tokenized["truncations"]]
    tokenized = tokenized.add_column("fits", [not any(t.drops_row for t in of) for of in truncations])
    return tokenized.add_column("cut", [any(t.cuts_row for t in of) for of in truncations])


def batch_pairs(tokenized: Dataset, batch_size: int) -> list[list[int]]:
    """Return the indices of the pairs that fit, in batches of at most `BATCH_TOKENS` tokens, the longest first."""
    fitting = [index for index, fits in enumerate(tokenized["fits"][:]) if fits]
    rows = tokenized.select(fitting)
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    batches = batch_by_length(lengths, batch_size, BATCH_TOKENS / 2)
    return [[fitting[position] for position in batch] for batch in batches]


@torch.inference_mode()
def score_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[dict[str, Any]]
) -> list[PairScore]:
    """Score tokenized pairs in one right-padded batch of twice as many sequences, as in training.

    The model needs TRL's fused head (`add_fused_lm_head`), which returns the labels' log-probs without ever holding a
    whole batch's logits.
    """
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(pairs)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    logps = model(**batch, labels=labels, fused_lm_head=True).log_probs.double()
    sums = logps.sum(dim=1).view(2, -1).T.tolist()  # of each pair: chosen, rejected
    scores = []
    spans = answer_spans(tokenizer, [pair["chosen_ids"] for pair in pairs])
    for pair, (chosen, rejected), row, (begin, end) in zip(pairs, sums, logps.chunk(2)[0], spans, strict=True):
        offset = len(pair["prompt_ids"]) - 1  # position t holds the log-prob of token t + 1
        text = row[offset + begin : offset + end].sum().item()
        lengths = len(pair["chosen_ids"]), len(pair["rejected_ids"])
        prompt_tokens = len(pair["prompt_ids"])
        scores.append(PairScore(chosen, rejected, *lengths, text, end - begin, pair["cut"], prompt_tokens))
    return scores


def agrees(scores: list[PairScore], by_token: bool) -> np.ndarray:
    """Return of each pair whether the chosen answer is the likelier one: by mean log-prob per token, or by the sum."""
    chosen, rejected, chosen_tokens, rejected_tokens = np.array(scores, dtype=float).T[:4]
    return chosen / chosen_tokens > rejected / rejected_tokens if by_token else chosen > rejected


def reward_margins(scores: list[PairScore], reference: list[PairScore], beta: float) -> np.ndarray:
    """Return of each pair the reward of its chosen answer minus that of the rejected one.

    The reward is beta (log p(answer) - log p_reference(answer)): equation 5 of the DPO paper
    (https://arxiv.org/abs/2305.18290) without its partition function, which cancels in a difference. It equals the
    reward that training reports if both models are prompted alike, as SFT and DPO are. A base model without a chat
    template reads the same words without the markers, so each is then scored on its own tokens.
    """
    both = zip(scores, reference, strict=True)
    return beta * np.array([(of.chosen - base.chosen) - (of.rejected - base.rejected) for of, base in both])


def prompted_alike(scores: list[PairScore], others: list[PairScore]) -> bool:
    """Return whether two models read the pairs in the same format. Markers, or their absence, change its length."""
    return all(score.prompt_tokens == other.prompt_tokens for score, other in zip(scores, others, strict=True))


def preference_metrics(
    scores: list[PairScore], reference: list[PairScore] | None, beta: float, characters: np.ndarray
) -> dict[str, Estimate | None]:
    """Return a model's metrics on pairs (see `files.METRICS`), none without pairs. Without a `reference`, its are None.

    `characters`, (pairs, 2), are the lengths of the chosen and the rejected answers.
    """
    if not scores:
        return {}
    margins = np.array([]) if reference is None else reward_margins(scores, reference, beta)  # none: no estimate
    text, text_tokens = np.array([(score.text, score.text_tokens) for score in scores]).T
    by_token, chosen_is_longer = agrees(scores, by_token=True), characters[:, 0] > characters[:, 1]
    return {
        "preference_accuracy_by_token": estimate(by_token),
        "preference_accuracy_like_length": estimate(by_token[of_like_length(characters)]),
        "preference_accuracy": estimate(agrees(scores, by_token=False)),
        "prefers_longer": estimate((by_token == chosen_is_longer)[characters[:, 0] != characters[:, 1]]),
        "reward_accuracy": estimate(margins > 0),
        "reward_margin": estimate(margins),
        "perplexity": estimate(-text, text_tokens, np.exp),
    }


def answer_metrics(answers: list[Answer]) -> dict[str, Estimate | None]:
    """Return metrics of generated answers (see `files.METRICS`). The last one is distinct-n of
    https://arxiv.org/abs/1510.03055, as the mean over the answers; None if all are too short for it."""
    return {
        "answer_tokens": estimate([answer.tokens for answer in answers]),
        "stopped": estimate([answer.stopped for answer in answers]),
        "distinct_ngrams": estimate([s for answer in answers if (s := distinct_ngrams(answer.text)) is not None]),
    }


def distinct_ngrams(text: str, n: int = NGRAM) -> float | None:
    """Return the share of a text's word n-grams that are distinct (1: no repetition); None if it is shorter than n."""
    words = text.split()
    ngrams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None
