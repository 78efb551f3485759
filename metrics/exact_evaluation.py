"""Evaluate TRL's trainers exactly: each metric is a mean over all held-out pairs (DPO) or supervised tokens (SFT).

Upstream, TRL 1.16 and transformers 5.23: each metric is the mean over batches of a batch's own mean, so its value
depends on the batch size, on the number of ranks and on how full the last batch is. With several ranks accelerate
(1.15) completes the last batches with rows that then count twice, and `dataloader_drop_last` drops held-out rows. Here
batches are completed with rows that do not count. This can go once TRL's means are over rows and tokens.

Training is not changed: all of this is in `prediction_step` and in the data loader of evaluations.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from trl import DPOTrainer, SFTTrainer
from trl.trainer.utils import use_adapter

from config.lora import REFERENCE
from metrics.evaluations import Evaluations, LogRatios, preference_losses

PAIR = "pair"  # a column of held-out pairs and a tensor of their batches: a pair's place among them
NO_PAIR = -1
NOT_OF_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")  # of the tensors of TRL's batches


class Part(NamedTuple):
    """What an evaluation found for a part of the rows: a batch of SFT, a pair of DPO."""

    weight: int  # in the means: its supervised tokens, or 1
    metrics: dict[str, float]  # and the loss
    pair: int = NO_PAIR


class ExactEvaluation:
    """Replace a TRL trainer's means over batches; a base class before the trainer's.

    `evaluations` gets what an evaluation finds of each pair.
    """

    # Of the trainer.
    args: Any
    model: Any
    accelerator: Any
    eval_dataset: Any
    _metrics: Any

    def __init__(self, *, evaluations: Evaluations, **kwargs: Any) -> None:
        self.evaluations = evaluations
        self._parts: list[Part] = []  # of this rank
        super().__init__(**kwargs)
        for weight in self.model.parameters():
            if weight.requires_grad:
                # TRL (1.16) makes adapters on a model of 4 bits bf16, which small steps would not move. This can go
                # once it leaves them float32, as they are without the 4 bits.
                weight.data = weight.data.float()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return batches of all held-out rows. If ranks share them, all batches are full, with rows of no weight."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        args, dropping = self.args, self.args.dataloader_drop_last
        missing = -len(rows) % (args.eval_batch_size * args.world_size) if args.world_size > 1 else 0
        args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(self._complete(rows, missing))  # type: ignore[misc]
        finally:
            args.dataloader_drop_last = dropping

    def _complete(self, rows: Dataset, count: int) -> Dataset:
        """Return `rows` and `count` more that have no weight."""
        raise NotImplementedError

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, and put the exact means where the trainer looks for those of its batches."""
        self._parts = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        means = self._summarize(gather_object(self._parts))
        output.metrics[f"{metric_key_prefix}_loss"] = means.pop("loss")
        self._metrics["eval"].update({name: [mean] for name, mean in means.items()})  # `log` reports and clears them
        return output

    def _summarize(self, parts: list[Part]) -> dict[str, float]:
        """Return the means over the parts of all ranks, whatever their order."""
        parts = [part for part in parts if part.weight]
        total = sum(part.weight for part in parts)
        names = parts[0].metrics if parts else ["loss"]
        sums = {name: sum(part.weight * part.metrics[name] for part in parts) for name in names}
        return {name: value / total if total else math.nan for name, value in sums.items()}

    def _take_part(self, weight: int, loss: torch.Tensor, pair: int = NO_PAIR) -> None:
        """Keep what the trainer has just computed as a part."""
        metrics = {name: values[-1] for name, values in self._metrics["eval"].items()}
        self._metrics["eval"].clear()
        self._parts.append(Part(weight, metrics | {"loss": loss.item()}, pair))


class ExactSFTTrainer(ExactEvaluation, SFTTrainer):
    """TRL's SFTTrainer with evaluations whose metrics are means over supervised tokens. Rows have `labels`."""

    def _complete(self, rows: Dataset, count: int) -> Dataset:
        return append(rows, count, labels=[-100] * len(rows[0]["labels"]))

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute a batch's means over its supervised tokens, as TRL does, but of this rank's batch alone."""
        with ungathered(self.accelerator):
            outcome = super().prediction_step(model, inputs, *args, **kwargs)
        self._take_part(int((inputs["labels"][..., 1:] != -100).sum()), outcome[0])
        return outcome


class ExactDPOTrainer(ExactEvaluation, DPOTrainer):
    """TRL's DPOTrainer with evaluations whose metrics are means over pairs, and `preference_loss` among them.

    The models see a batch once. TRL's `_compute_loss` then gets one pair of it at a time, with what the models have
    returned of it, so that whatever it computes is a pair's own, even a loss that compares the pairs of a batch in
    training (`aot`). Log-probs are summed in float64 (`_run`).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_collator = functools.partial(collate_numbered, self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if PAIR not in columns:
            columns.append(PAIR)

    def _complete(self, rows: Dataset, count: int) -> Dataset:
        return append(rows.add_column(PAIR, np.arange(len(rows))), count, **{PAIR: NO_PAIR})

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute a batch's loss and metrics pair by pair. Returns the mean loss of its pairs, which nothing uses."""
        inputs = self._prepare_inputs(inputs)
        pairs, losses = inputs.pop(PAIR).tolist(), []
        reference: Any = self.ref_model
        with torch.no_grad(), self.compute_loss_context_manager(), ungathered(self.accelerator):
            computed = self._run(model, inputs)
            of_reference = {} if self.precompute_ref_logps else self._run_reference(inputs)
            try:
                for position, pair in enumerate(pairs):
                    if pair != NO_PAIR:
                        of_pair, self.ref_model = (
                            cast(Any, stand_in(select_pair(outputs, position, len(pairs))))
                            for outputs in (computed, of_reference)
                        )
                        losses.append(self.compute_loss(of_pair, select_pair(inputs, position, len(pairs))))
                        self._take_part(1, losses[-1], pair)
            finally:
                self.ref_model = reference
        return torch.tensor(losses, dtype=torch.float32, device=self.args.device).mean(), None, None

    def _run_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.ref_model is not None:
            return self._run(self.ref_model, inputs)
        with use_adapter(self.accelerator.unwrap_model(self.model), REFERENCE):
            return self._run(self.model, inputs)

    def _run(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a model's outputs for a batch, as `_compute_loss` calls it; in float64 if device and loss take it.

        Of alpha_divergence TRL (1.16) looks up the largest exponent by dtype, and has none for float64 (KeyError). This
        can go once it has.
        """
        arguments = {name: value for name, value in inputs.items() if name not in NOT_OF_THE_MODEL}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(**arguments, labels=labels, fused_lm_head=True)
        widen = self.args.device.type != "mps" and self.f_divergence_type != "alpha_divergence"
        return {
            name: value.double() if widen and torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in outputs.items()
        }

    def _summarize(self, parts: list[Part]) -> dict[str, float]:
        parts = sorted(parts, key=lambda part: part.pair)
        rewards = [[part.metrics[f"rewards/{side}"] for part in parts] for side in LogRatios._fields]
        ratios = LogRatios(*(np.array(of_side, dtype=float) / self.beta for of_side in rewards))
        self.evaluations.steps[self.state.global_step] = ratios
        return super()._summarize(parts) | {"preference_loss": float(preference_losses(ratios.margins).mean())}


def append(rows: Dataset, count: int, **changes: Any) -> Dataset:
    """Return `rows` and `count` times the first of them with some columns changed."""
    if not count:
        return rows
    columns = {name: [value] * count for name, value in (rows[0] | changes).items()}
    return concatenate_datasets([rows, Dataset.from_dict(columns, features=rows.features)])


def select_pair(batch: Mapping[str, Any], position: int, pairs: int) -> dict[str, Any]:
    """Return the pair at `position` of a batch of `pairs`.

    Its tensors are of sequences (2 pairs, ...), the chosen ones first, or of pairs (pairs, ...); all else is kept.
    """
    return {
        name: value[position::pairs] if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in batch.items()
    }


def collate_numbered(collate: Callable[[list], dict[str, Any]], rows: list) -> dict[str, Any]:
    """Return the batch that `collate` makes of `rows`, and with their numbers if they have one."""
    batch = collate(rows)
    return batch | {PAIR: torch.tensor([row[PAIR] for row in rows])} if PAIR in rows[0] else batch


def stand_in(outputs: dict[str, Any]) -> Callable[..., SimpleNamespace]:
    """Return what answers as a model that has these `outputs`."""
    return lambda **inputs: SimpleNamespace(**outputs)


@contextmanager
def ungathered(accelerator: Any) -> Iterator[None]:
    """Have each rank keep to its own rows, where TRL would gather those of all ranks."""
    names = ("gather", "gather_for_metrics")
    try:
        for name in names:
            setattr(accelerator, name, lambda values, *args, **kwargs: values)
        yield
    finally:
        for name in names:
            delattr(accelerator, name)
