"""What a trial's evaluations found of each held-out pair: `evaluations.json`, in every checkpoint.

Trials that share held-out pairs can be compared pair by pair with it, which tells more than two means do. Every number
has all its digits. Each evaluation has a line of the file:

    {"truncations": ["train: 3 rows (1.2%) cut: …"],
     "rows": ["pairs.jsonl row 7", "pairs.jsonl row 12"],
     "chosen_tokens": [31, 18],
     "rejected_tokens": [25, 40],
     "steps": {
      "25": {"chosen": [-0.31, 0.12], "rejected": [-2.5, 0.07]},
      "50": {"chosen": [-1.17, 0.48], "rejected": [-6.1, -0.9]}}}
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import PlainValidator, TypeAdapter, ValidationError

FILE = "evaluations.json"  # beside the weights
COMMON_BETA = 0.1  # of `preference_losses`, whatever a trial's own is
LIKE_LENGTH = 0.75  # two answers are of like length if the shorter one has at least this share of the longer one's


# Of a file that is not damaged: numbers.
Numbers = Annotated[np.ndarray, PlainValidator(lambda read: np.array(TypeAdapter(list[float]).validate_python(read)))]


class LogRatios(NamedTuple):
    """How a model's log-probs of each pair's answers differ from the reference's: (pairs,) float64 each, in nats.

    It is log p(answer | prompt) - log p_ref(answer | prompt), each summed over the answer's tokens. (With TRL's
    `ld_alpha`, a token beyond the length of the shorter answer counts only that much of it.)
    """

    chosen: Numbers
    rejected: Numbers

    @property
    def margins(self) -> np.ndarray:
        """The chosen answer's log-ratio minus the rejected one's, (pairs,): above 0 the pair is ordered rightly."""
        return self.chosen - self.rejected


@dataclass
class Evaluations:
    """What a trial's evaluations found so far, and on what. Only a DPO trial has pairs."""

    truncations: list[str]  # a line for each thing that a limit cuts or drops
    rows: list[str] = field(default_factory=list)  # of each held-out pair in order: "SOURCE row N"
    chosen_tokens: list[int] = field(default_factory=list)  # lengths of its answers, as they are trained on
    rejected_tokens: list[int] = field(default_factory=list)
    steps: dict[int, LogRatios] = field(default_factory=dict)  # by the step of the evaluation, in order

    def write(self, folder: Path) -> None:
        """Write `FILE` into a checkpoint's folder."""
        fields = [(name, json.dumps(value)) for name, value in vars(self).items() if name != "steps"]
        lines = [f"{json.dumps(str(step))}: {_dump(self.steps[step])}" for step in sorted(self.steps)]
        fields.append(("steps", "{" + ",".join(f"\n  {line}" for line in lines) + "}"))
        text = ",\n ".join(f'"{name}": {value}' for name, value in fields)
        (folder / FILE).write_text(f"{{{text}}}\n", encoding="utf-8")

    def take_over(self, saved: "Evaluations | None") -> None:
        """Add the evaluations of a checkpoint from which a trial resumes, if they are of the same pairs."""
        if saved is not None and saved.rows == self.rows:
            self.steps = saved.steps | self.steps

    def is_whole(self) -> bool:
        """Return whether every list of pairs has as many as there are."""
        sizes = [len(side) for ratios in self.steps.values() for side in ratios]
        return {len(self.chosen_tokens), len(self.rejected_tokens), *sizes} == {len(self.rows)}


def preference_losses(margins: np.ndarray) -> np.ndarray:
    """Return each pair's -log sigmoid(0.1 h), (pairs,), for h of `LogRatios.margins`, (pairs,), in nats.

    It is DPO's loss (equation 7 of https://arxiv.org/abs/2305.18290) with the same beta for every trial. Their own
    losses are on scales of their own: with a larger beta, the same model has a smaller one. log 2 is that of a model
    that has not moved from its reference.
    """
    return np.logaddexp(0, -COMMON_BETA * np.asarray(margins, dtype=float))


def of_like_length(lengths: np.ndarray) -> np.ndarray:
    """Return of each pair whether its answers, of these `lengths` (pairs, 2) in any unit, are of like length."""
    return lengths.min(axis=1) >= LIKE_LENGTH * lengths.max(axis=1)


def read_evaluations(folder: Path) -> Evaluations | None:
    """Return what is in `FILE` of a checkpoint. None if it has no such file, as of earlier releases, or it is damaged.

    `folder` is the checkpoint's own, or one that holds its `checkpoint-<step>`.
    """
    files = [*folder.glob(FILE), *sorted(folder.glob(f"checkpoint-*/{FILE}"))]
    try:
        found = TypeAdapter(Evaluations).validate_json(files[0].read_bytes()) if files else None
    except (OSError, ValidationError):
        return None
    return found if found and found.is_whole() else None


def _dump(ratios: LogRatios) -> str:
    return json.dumps({side: values.tolist() for side, values in ratios._asdict().items()})
