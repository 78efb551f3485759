"""Supervised fine-tuning (SFT): turn a pre-trained model into one that answers. `det e create sft.yaml .` runs it."""

from typing import TYPE_CHECKING

from errors import exit_on_user_error

if TYPE_CHECKING:
    from config.hyperparameters import SFTHyperparameters
    from trial.context import Trial


def train(trial: "Trial[SFTHyperparameters]") -> None:
    """Fine-tune the trial's model on its conversations."""
    # Imported once the command line and the YAML have been read: torch and what is built on it take seconds.
    from dataset_utils import load_sft_dataset, prepare_evaluations, tokenize_once, tokenize_sft_dataset
    from metrics.exact_evaluation import ExactSFTTrainer
    from speed.hardware import suit_hardware
    from speed.padding_free import flatten_while_loading
    from trial.det_callback import train_or_resume
    from trial.policy import load_policy

    hparams, args = trial.hparams, trial.hparams.args
    rows = load_sft_dataset(**hparams.load_options)

    trial.status(f"loading {hparams.model_name}")
    trial.remember_origin(base=hparams.model_name)
    model, tokenizer = load_policy(hparams, hparams.model_name, added_tokens=hparams.added_tokens)

    trial.status("preparing the training")
    # Token ids, cut to max_seq_length, with labels of -100 where a token is not supervised.
    dataset = tokenize_once(trial, tokenize_sft_dataset, rows, tokenizer)
    suit_hardware(trial, model, dataset, pairs=False)
    trainer = ExactSFTTrainer(
        evaluations=prepare_evaluations(dataset),
        model=model,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
    )
    flatten_while_loading(trainer, pairs=False)
    train_or_resume(trainer, trial)


@exit_on_user_error
def main() -> None:
    """Open this process's trial and train it."""
    from config.hyperparameters import SFTHyperparameters
    from trial.context import open_trial

    with open_trial(SFTHyperparameters, "sft.yaml", __doc__) as trial:
        trial.run(train)


if __name__ == "__main__":
    main()
