"""Compare models on the same questions and preference pairs, with a page for a blind vote; or chat with one of them.

    python inference.py --model base=local_runs/tiny/base --model sft=UUID --model dpo=UUID \\
        --dataset local_runs/tiny/questions --output_file comparison.html

SOURCE, in --model NAME=SOURCE, is one of

    google/gemma-2b       a model on the hub, or a folder
    UUID                  a checkpoint of a local run
    exp:12, trial:34      on the cluster that DET_MASTER names: the best checkpoint of an experiment or a trial, by the
                          searcher's metric; --exp_id 12 and --trial_id 34 are short for it
    ckpt:UUID             a checkpoint of that cluster
    model:NAME            the latest version of a model in that cluster's registry; model:NAME:2 is its version 2

The questions and the preference pairs are rows that DPO held out. Models are loaded one at a time, and downloaded once.
A model whose tokenizer has no chat template, such as a base model, gets the question as plain text; other models are
prompted as in training. An interrupted comparison with an --output_file continues if you give the same command again.

    python inference.py --model dpo=UUID --chat dpo

is a conversation with one model.
"""

from typing import TYPE_CHECKING

from errors import exit_on_user_error

if TYPE_CHECKING:
    from comparison.options import ComparisonOptions


def parse_arguments() -> "ComparisonOptions":
    """Return the options: a cluster task has them in its YAML's hyperparameters, a script on its command line."""
    import determined as det

    from comparison.options import parse_command_line, parse_hyperparameters

    info = det.get_cluster_info()
    if info and info.task_type == "TRIAL":
        return parse_hyperparameters(info.trial.hparams)
    return parse_command_line(None, __doc__)


@exit_on_user_error
def main() -> None:
    """Compare the models, or chat with one of them."""
    options = parse_arguments()
    # Here and not above: they take seconds to import, and --help or a mistake in an option should not wait for them.
    import torch
    import transformers
    from rich.console import Console

    from comparison.chat import chat
    from comparison.cluster_task import open_task
    from comparison.compare import compare, load_model, open_results
    from comparison.files import print_comparison, write_comparison
    from comparison.questions import load_questions
    from trial.context import hide_progress_bars_in_logs
    from trial.models import choose_device, find_model

    console = Console(highlight=False, emoji=False)
    hide_progress_bars_in_logs()
    transformers.utils.logging.set_verbosity_error()  # a model's own sampling defaults do not matter here
    device = choose_device(options.device, options.key("device"))
    names = [options.chat] if options.chat else options.model
    models = {name: find_model(options.model[name], options.key("model", name)) for name in names}
    if options.chat:
        torch.manual_seed(options.seed)
        chat(console, options.chat, *load_model(options.chat, models[options.chat], options, device), options)
        return
    with open_task() as task:
        outputs = [task.path(name) for name in options.output_file]
        unfinished = outputs[0].with_name(f"{outputs[0].name}.unfinished") if outputs else None
        if task.restored and unfinished and not unfinished.exists() and all(path.exists() for path in outputs):
            task.leave_only_the_page()  # which was done and saved before the restart
            return
        with open_results(unfinished) as store:
            questions = load_questions(options, console)
            comparison = compare(models, questions, options, device, store, task, console)
            print_comparison(console, comparison)
            for path in outputs:
                write_comparison(comparison, path)
                if not task.core_context:  # else it is in the container, which is gone soon
                    hint = ": open it in a browser to vote" if path.suffix == ".html" else ""
                    console.print(f"Written to {path}{hint}", soft_wrap=True)
        task.finish(len(store), comparison.metrics())


if __name__ == "__main__":
    main()
