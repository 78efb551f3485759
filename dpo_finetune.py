"""Direct Preference Optimization (DPO): from a model that answers to one whose answers are preferred.

`det e create dpo.yaml . --config hyperparameters.model_ckpt=UUID` runs it from the SFT checkpoint of that UUID.
"""

from typing import Any

from datasets import Dataset
from trl import DPOTrainer

from chat_format import set_chat_format
from checkpoints import download_ckpt
from dataset_utils import load_dpo_dataset, tokenize_dpo_dataset
from det_callback import train_until_preempted
from hyperparameters import DPOHyperparameters
from models import load_model_and_tokenizer
from trial import Trial, open_trial
from user_error import exit_on_user_error


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer on rows that are tokenized already.

    TRL 1.16 tokenizes every preference row itself and no longer cuts prompts and answers apart (`max_prompt_length`
    and `max_target_length` are gone). SFTTrainer accepts tokenized rows; this can go once DPOTrainer does too.
    """

    def __init__(self, trial: Trial, **kwargs: Any) -> None:
        self.trial = trial
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """TRL calls this for each batch of the pass before training. It can go once callbacks see that pass too."""
        self.trial.stop_if_preempted()
        return super().compute_ref_log_probs(*args, **kwargs)


def train(trial: Trial[DPOHyperparameters]) -> None:
    hparams, args = trial.hparams, trial.hparams.args

    rows = load_dpo_dataset(hparams.datasets, hparams.split_seed)

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
    dataset = trial.shared_dataset(
        lambda: tokenize_dpo_dataset(
            rows,
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=hparams.max_prompt_length,
            max_target_length=hparams.max_target_length,
            num_proc=args.dataset_num_proc,
        )
    )
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
