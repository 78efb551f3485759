"""Direct Preference Optimization (DPO): from a model that answers to one whose answers are preferred.

`det e create dpo.yaml . --config hyperparameters.model_ckpt=UUID` runs it from the SFT checkpoint of that UUID.
"""

import time
from typing import Any

from datasets import Dataset
from trl import DPOTrainer

from chat_format import set_chat_format
from config.hyperparameters import DPOHyperparameters
from dataset_utils import load_dpo_dataset, tokenize_dpo_dataset, tokenize_once
from errors import exit_on_user_error
from speed.hardware import suit_hardware
from speed.padding_free import remove_padding
from storage.checkpoints import download_ckpt
from storage.shared_cache import reference_key
from trial.context import Trial, open_trial
from trial.det_callback import train_until_preempted
from trial.models import load_model_and_tokenizer


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer on rows that are tokenized already, with one reference pass for all trials that share a cache folder.

    TRL 1.16 tokenizes every preference row itself and no longer cuts prompts and answers apart (`max_prompt_length`
    and `max_target_length` are gone). SFTTrainer accepts tokenized rows; that part can go once DPOTrainer does too.
    """

    def __init__(self, trial: Trial, **kwargs: Any) -> None:
        self.trial = trial
        self.reference_seconds: dict[str, float] = {}  # by split, of those that were not found
        super().__init__(**kwargs)
        if self.precompute_ref_logps:
            computed = " and ".join(self.reference_seconds)
            seconds = sum(self.reference_seconds.values())
            told = f"computed in {seconds:.1f} s ({computed})" if computed else "reused"
            trial.status(f"reference log-probs {told}")

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Have TRL (1.16) find an earlier pass when it is the same, and only then.

        TRL looks for it under the data set's fingerprint and a hash of the weights. That is as good as never the same,
        and would not tell fp32 from bf16. This can go once TRL's key holds what `reference_key` does.
        """
        if self.ref_model is not None:  # FSDP's, see below
            remove_padding(self.accelerator.unwrap_model(self.ref_model), pairs=True)
        dataset._fingerprint = reference_key(self, dataset, batch_size)
        lock = f"{dataset._fingerprint}-{self._precompute_model_hash[:16]}"
        with self.trial.one_at_a_time(lock, "reference log-probs"):
            started, self.reference_batches = time.monotonic(), 0
            dataset = super()._precompute_ref_logps(dataset, name, batch_size)
            if self.reference_batches:
                self.reference_seconds[name] = time.monotonic() - started
        return dataset

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """TRL calls this for each batch of the pass before training. It can go once callbacks see that pass too."""
        self.reference_batches += 1
        self.trial.stop_if_preempted()
        return super().compute_ref_log_probs(*args, **kwargs)


def train(trial: Trial[DPOHyperparameters]) -> None:
    hparams, args = trial.hparams, trial.hparams.args

    rows = load_dpo_dataset(hparams.sources, hparams.split_seed)

    trial.status(hparams.start)
    source = download_ckpt(hparams.model_ckpt, trial.core_context) if hparams.model_ckpt else hparams.model_name
    model, tokenizer = load_model_and_tokenizer(source, **hparams.model_init_kwargs)
    set_chat_format(model, tokenizer)
    reference = None
    # With precomputed log-probs TRL asks the policy for them before step 1, and no second model is loaded (but for
    # FSDP, where it loads one for the pass and lets it go).
    if not args.precompute_ref_log_probs:
        reference, _ = load_model_and_tokenizer(source, **hparams.model_init_kwargs)
        reference.eval().requires_grad_(False)

    trial.status("preparing the training" + (", reference log-probs first" if reference is None else ""))
    dataset = tokenize_once(trial, tokenize_dpo_dataset, rows, tokenizer, args.dataset_num_proc, **hparams.tokenizing)
    suit_hardware(trial, model, dataset, reference)
    trainer = TokenizedDPOTrainer(
        trial,
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
    )

    train_until_preempted(trainer, trial)


@exit_on_user_error
def main() -> None:
    with open_trial(DPOHyperparameters, "dpo.yaml", __doc__) as trial:
        train(trial)


if __name__ == "__main__":
    main()
