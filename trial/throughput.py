"""Measure how fast a training computes: `tokens_per_second`, and on a known GPU `mfu`, in its logs beside the loss.

| metric                         | over the steps since the last log                                                   |
|--------------------------------|-------------------------------------------------------------------------------------|
| `tokens_per_second`            | tokens that were trained on, by all ranks, without padding (TRL's `num_tokens`)     |
| `tokens_per_second_per_device` | the same, by the number of ranks; only if there are several                         |
| `mfu`                          | "model FLOPs utilization": the share of the GPU's peak in 16 bit that the products  |
|                                | with the model's weights take, forward and backward, on the first rank              |

The time is that of training steps and of waiting for their data. It is not that of the start, of a start's first step
(which compiles), of logs, evaluations and checkpoints.

DPO's tokens are those of both sequences of a pair, each with its prompt. `mfu` counts what is needed: a prompt that is
computed once counts once, the output layer counts where there is a label, and a checkpointed layer's second forward
pass does not count, nor does a reference's. Under an adapter, frozen weights need no gradients, so they count for less
(`step_operations`). The products within attention are left out, which makes it a little too low for long rows.

Upstream: `include_num_input_tokens_seen` (transformers 5.23) divides by all the time since the start, evaluations and
checkpoints too, and makes the ranks wait for each other in every step. This can go once it does neither.
"""

import re
import time
from collections.abc import Iterable
from typing import Any

import torch

from adapters.four_bit import count_weights
from adapters.stack import REFERENCE

METRICS = ("tokens_per_second", "tokens_per_second_per_device", "mfu")
# Dense operations a second in bf16 or fp16 with float32 sums, from the makers' data sheets. The first name that a
# device's name contains counts.
PEAKS = {
    "B200": 2.25e15, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "A40": 150e12, "A30": 165e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12, "A6000": 155e12, "V100": 125e12,
    "T4": 65e12, "MI300X": 1307e12,
}  # fmt: skip


class Throughput:
    """Stop the time of a trainer's steps, and put the figures where TRL's `log` takes its metrics from.

    Nothing waits for it: it only reads a GPU's counters where a log, an evaluation or a checkpoint waits for the GPU.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.device = trainer, trainer.args.device
        self.begun: tuple[float, int] | None = None  # since when, and the tokens that had been trained on by then
        self.first = True
        self.seconds, self.tokens = 0.0, 0
        self.in_decoder: Any = 0  # tokens of this rank that went through it, and through the output layer
        self.in_output: Any = 0
        self.peak = peak_of(self.device) if trainer.args.bf16 or trainer.args.fp16 else None
        if self.peak is not None:
            self._count_weights(trainer.model)
            trainer.model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)

    def begin_step(self) -> None:
        """Start the clock, unless it runs since an earlier step."""
        if self.begun is None:
            self.begun = time.monotonic(), self.trainer._total_train_tokens

    def end_step(self, control: Any) -> None:
        """Stop the clock if something other than training comes next; before a log, add the figures to it."""
        if not (self.first or control.should_log or control.should_evaluate or control.should_save):
            return
        if self.begun is not None:
            if self.device.type == "cuda":  # whose last step has been queued, but not done
                torch.cuda.synchronize(self.device)
            if not self.first:
                self.seconds += time.monotonic() - self.begun[0]
                self.tokens += self.trainer._total_train_tokens - self.begun[1]
            self.begun = None
        if self.first:
            self.first, self.in_decoder, self.in_output = False, 0, 0
        elif control.should_log and self.seconds:
            self.trainer._metrics["train"].update({name: [value] for name, value in self._figures().items()})
            self.seconds, self.tokens, self.in_decoder, self.in_output = 0.0, 0, 0, 0

    def _figures(self) -> dict[str, float]:
        ranks, figures = self.trainer.args.world_size, {"tokens_per_second": self.tokens / self.seconds}
        if ranks > 1:
            figures["tokens_per_second_per_device"] = figures["tokens_per_second"] / ranks
        if self.peak is not None:
            operations = float(self.in_decoder * self.of_decoder + self.in_output * self.of_output)
            figures["mfu"] = operations / self.seconds / self.peak
        return figures

    def _count_weights(self, model: Any) -> None:
        # Before it is sharded. An embedding is looked up, not multiplied with, nor are rows of new tokens.
        ends = [list(end.parameters()) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
        self.of_output = step_operations([max(ends[1], key=torch.Tensor.numel)])
        at_ends = {id(weight) for end in ends for weight in end}
        # TRL's DPO computes with its copy of an adapter for the reference alone.
        policy = [weight for name, weight in model.named_parameters() if REFERENCE not in name.split(".")]
        self.of_decoder = step_operations(weight for weight in policy if id(weight) not in at_ends)

    def _count_tokens(self, model: Any, args: tuple, inputs: dict[str, Any]) -> None:
        # Sums on the device: to read one here would wait for it. With an adapter, the reference comes here, too.
        if model.training and torch.is_grad_enabled():
            flat, mask, labels = (inputs.get(name) for name in ("flat_batch", "attention_mask", "labels"))
            row = inputs["input_ids"] if flat is None else flat.positions
            self.in_decoder = self.in_decoder + (row.numel() if flat is not None or mask is None else mask.sum())
            self.in_output = self.in_output + (row.numel() if labels is None else (labels != -100).sum())


def step_operations(weights: Iterable[torch.Tensor]) -> int:
    """Return how many operations the products with `weights` take in a training step for each token.

    A weight takes 2 forward and 2 backward, for the gradient of what it is multiplied with. If it is trained, its own
    gradient takes 2 more.
    """
    return sum((6 if weight.requires_grad else 4) * count_weights(weight) for weight in weights)


def peak_of(device: torch.device) -> float | None:
    """Return the peak of a GPU in operations a second; None for a part of one, for one that is not known and a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return None if "MIG" in name else next((PEAKS[text] for text in PEAKS if re.search(rf"\b{text}\b", name)), None)
