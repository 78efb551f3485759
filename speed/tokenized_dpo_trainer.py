"""TRL's DPOTrainer on rows that are already tokenized, with one reference pass that all trials of a grid share."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel
from trl import DPOConfig
from trl.trainer.utils import hash_module

from adapters.stack import AdapterStack
from metrics.exact_evaluation import ExactDPOTrainer
from speed.padding_free import remove_padding
from storage.fingerprints import fingerprint
from storage.manifests import remove_unless_sealed, seal
from storage.shared_cache import give_to_every_node, once_per_node, one_trial_at_a_time

if TYPE_CHECKING:
    import torch

    from trial.context import Trial


class TokenizedDPOTrainer(ExactDPOTrainer):
    """Train with DPO on tokenized rows; trials that share a cache folder compute the reference log-probs once.

    TRL 1.16 tokenizes every preference row itself and no longer truncates prompts and answers separately
    (`max_prompt_length` and `max_target_length` are gone). SFTTrainer accepts tokenized rows; `_prepare_dataset` can go
    once DPOTrainer does too.

    To change the loss beyond TRL's `loss_type`, override `_compute_loss(model, inputs, return_outputs)`, which has no
    smaller part to override. A batch is the chosen sequences followed by the rejected ones; the model returns
    `log_probs` (sequences, length - 1) of the labels instead of logits. In an evaluation a batch is one pair, and the
    means are over all of them (`ExactDPOTrainer`). A new metric in `self._metrics` is logged and resumes by itself;
    name it in `DPOHyperparameters.eval_metrics` to use it as `searcher.metric`. Keep `rewards/chosen` and
    `rewards/rejected`: what an evaluation stores of each pair comes from them.
    """

    def __init__(self, trial: "Trial", **kwargs: Any) -> None:
        self.trial = trial
        self.reference_seconds: dict[str, float] = {}  # by split; a pass that was found in the cache is not in it
        with patch("trl.trainer.dpo_trainer.hash_module", hash_reference):
            super().__init__(**kwargs)
        if self.precompute_ref_logps:
            splits = " and ".join(self.reference_seconds)
            seconds = sum(self.reference_seconds.values())
            trial.status(f"reference log-probs {f'computed in {seconds:.1f} s ({splits})' if splits else 'reused'}")

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Compute a split's reference log-probs, or have TRL (1.16) read those of an earlier trial.

        TRL looks it up by the data set's fingerprint and a hash of the weights. That key is hardly ever the same twice,
        and does not tell fp32 from bf16. This can go once TRL's key holds what `reference_key` does.
        """
        if self.ref_model is not None:  # only under FSDP: TRL loads a second model for this pass
            remove_padding(self.accelerator.unwrap_model(self.ref_model), pairs=True)
        trial, distributed = self.trial, self.trial.core_context.distributed
        # TRL has all ranks use the first one's key, and reads whatever it finds under it.
        key = (reference_key(self, dataset, batch_size), self._precompute_model_hash)
        dataset._fingerprint, weights = key = distributed.broadcast(key)
        file = Path(dataset._get_cache_file_path(Hasher.hash(key)))
        with one_trial_at_a_time(
            trial.cache / f"{dataset._fingerprint}-{str(weights)[:16]}.lock",
            distributed,
            on_wait=lambda: trial.status("waiting for another trial's reference log-probs"),
            while_waiting=trial.stop_if_preempted,
        ):
            once_per_node(distributed, lambda: remove_unless_sealed(file))
            give_to_every_node(file, distributed)  # all nodes have it now, or none
            started, self.reference_batches = time.monotonic(), 0
            with self._given_to_every_node(file):
                dataset = super()._precompute_ref_logps(dataset, name, batch_size)
            if self.reference_batches:
                self.reference_seconds[name] = time.monotonic() - started
        return dataset

    @contextmanager
    def _given_to_every_node(self, file: Path) -> Iterator[None]:
        """Have the `file` that the first rank writes on every node before all ranks read it.

        TRL (1.16) writes it on the first rank's disk alone, waits for all ranks, and reads it on each. This can go once
        it writes it on every node.
        """
        accelerator, distributed = self.accelerator, self.trial.core_context.distributed

        def wait_for_everyone() -> None:
            once_per_node(distributed, lambda: seal(file) if distributed.rank == 0 else None)
            give_to_every_node(file, distributed)

        accelerator.wait_for_everyone = wait_for_everyone  # type: ignore[method-assign]
        try:
            yield
        finally:
            del accelerator.wait_for_everyone

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """Compute a batch's reference log-probs, unless the trial is preempted.

        TRL calls this for each batch of the pass before training, which callbacks do not see. This can go once they do.
        """
        self.reference_batches += 1
        self.trial.stop_if_preempted()
        return super().compute_ref_log_probs(*args, **kwargs)


def hash_reference(model: "torch.nn.Module") -> str:
    """Return a hash of the weights of a reference: those of `model`, but without the adapter that is trained on it.

    TRL (1.16) hashes that adapter as well, whose weights differ with its rank and with the seed. This can go
    once it does not.
    """
    if isinstance(model, AdapterStack):
        model = cast(Any, SimpleNamespace(state_dict=model.frozen_weights))
    return hash_module(model)


def reference_key(trainer: TokenizedDPOTrainer, dataset: Dataset, batch_size: int) -> str:
    """Return a key for everything the reference log-probs of `dataset` depend on except the weights, which TRL adds.

    The data set's own fingerprint covers the token ids and their lengths (see `dataset_utils.tokenize_once`). Batch
    size and number of ranks only move the last bits, but a resumed trial must end exactly as an uninterrupted one.
    Left out on purpose: beta, learning rate, seed, whatever else only training depends on, and the processor model.
    """
    args, accelerator = cast(DPOConfig, trainer.args), trainer.accelerator
    config = cast(PreTrainedModel, trainer.model).config
    return fingerprint(
        dataset._fingerprint,
        *(config.to_json_string(), config._name_or_path, config._attn_implementation, args.model_init_kwargs),
        *(args.ld_alpha, args.pad_to_multiple_of, batch_size, accelerator.num_processes),
        *(accelerator.mixed_precision, accelerator.device.type, str(accelerator.distributed_type)),
        *(args.tf32, args.use_liger_kernel, str(args.fsdp_config), str(args.accelerator_config)),
        trainer.trial.hparams.training_args.get("torch_compile"),  # None: decoder layers are compiled on a GPU
    )
