"""Direct Preference Optimization (DPO): make a model prefer the chosen answers to the rejected ones.

`det e create dpo.yaml . --config hyperparameters.model_ckpt=UUID` runs it from the SFT checkpoint of that UUID.
"""

from config.hyperparameters import DPOHyperparameters
from errors import exit_on_user_error
from trial.context import Trial, open_trial


def train(trial: Trial[DPOHyperparameters]) -> None:
    """Train the trial's policy on pairs of a chosen and a rejected answer, against the model that it starts from."""
    # Imported once the command line and the YAML have been read: torch and what is built on it take seconds.
    from chat_format import set_chat_format
    from dataset_utils import load_dpo_dataset, tokenize_dpo_dataset, tokenize_once
    from speed.hardware import suit_hardware
    from speed.tokenized_dpo_trainer import TokenizedDPOTrainer
    from storage.checkpoints import download_ckpt
    from trial.det_callback import train_until_preempted
    from trial.models import load_model_and_tokenizer

    hparams, args = trial.hparams, trial.hparams.args
    rows = load_dpo_dataset(**hparams.loading)

    trial.status(hparams.start)
    source = download_ckpt(hparams.model_ckpt, trial.core_context) if hparams.model_ckpt else str(hparams.model_name)
    model, tokenizer = load_model_and_tokenizer(source, **hparams.model_init_kwargs)
    set_chat_format(model, tokenizer)
    reference = None
    # With precomputed log-probs TRL asks the policy for them before step 1 and loads no second model. (Under FSDP it
    # loads one for that pass and lets it go.)
    if not args.precompute_ref_log_probs:
        reference, _ = load_model_and_tokenizer(source, **hparams.model_init_kwargs)
        reference.eval().requires_grad_(False)

    trial.status("preparing the training" + (", reference log-probs first" if reference is None else ""))
    dataset = tokenize_once(trial, tokenize_dpo_dataset, rows, tokenizer, args.dataset_num_proc, **hparams.tokenizing)
    suit_hardware(trial, model, dataset, pairs=True, reference=reference)
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
    """Run the trial of this process."""
    with open_trial(DPOHyperparameters, "dpo.yaml", __doc__) as trial:
        train(trial)


if __name__ == "__main__":
    main()
