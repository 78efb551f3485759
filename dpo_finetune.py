"""Direct Preference Optimization (DPO): make a model prefer the chosen answers to the rejected ones.

`det e create dpo.yaml . --config hyperparameters.model_ckpt=exp:12` runs it from the best of SFT experiment 12.
"""

from typing import TYPE_CHECKING

from errors import exit_on_user_error

if TYPE_CHECKING:
    from config.hyperparameters import DPOHyperparameters
    from trial.context import Trial


def train(trial: "Trial[DPOHyperparameters]") -> None:
    """Train the trial's policy on pairs of a chosen and a rejected answer, against the model that it starts from."""
    # Imported once the command line and the YAML have been read: torch and what is built on it take seconds.
    from dataset_utils import load_dpo_dataset, prepare_evaluations, tokenize_dpo_dataset, tokenize_once
    from speed.hardware import suit_hardware
    from speed.padding_free import flatten_while_loading
    from speed.tokenized_dpo_trainer import TokenizedDPOTrainer
    from trial.det_callback import train_or_resume
    from trial.models import load_model_and_tokenizer
    from trial.policy import load_policy
    from trial.starting_model import fetch_starting_model

    hparams, args = trial.hparams, trial.hparams.args
    rows = load_dpo_dataset(**hparams.load_options)

    model_path = fetch_starting_model(trial)
    # Tokens that SFT added come with its tokenizer.
    model, tokenizer = load_policy(hparams, model_path, checkpoint=trial.starting_checkpoint)
    reference = None
    # With precompute_ref_log_probs TRL computes the reference log-probs with the policy before it is trained, and with
    # lora the policy without its adapter is the reference, so no second model is loaded (except under FSDP, for that
    # pass only).
    if hparams.loads_reference:
        reference, _ = load_model_and_tokenizer(model_path, **hparams.model_init_kwargs)
        reference.eval().requires_grad_(False)

    trial.status("preparing the training" + (", reference log-probs first" if args.precompute_ref_log_probs else ""))
    # Token ids within max_prompt_length, max_target_length and max_length.
    dataset = tokenize_once(trial, tokenize_dpo_dataset, rows, tokenizer)
    suit_hardware(trial, model, dataset, pairs=True, reference=reference)
    trainer = TokenizedDPOTrainer(
        trial,
        evaluations=prepare_evaluations(dataset),
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
    )
    flatten_while_loading(trainer, pairs=True)

    train_or_resume(trainer, trial)


@exit_on_user_error
def main() -> None:
    """Open this process's trial and train it."""
    from config.hyperparameters import DPOHyperparameters
    from trial.context import open_trial

    with open_trial(DPOHyperparameters, "dpo.yaml", __doc__) as trial:
        trial.run(train)


if __name__ == "__main__":
    main()
