"""Run an experiment on this machine as `det e create CONFIG.yaml MODEL_DEF --config key=value` would on a cluster.

    python local_experiment.py sft.yaml --dry-run
    python local_experiment.py sft.yaml
    python local_experiment.py dpo.yaml --config hyperparameters.model_ckpt=UUID

UUID is a checkpoint of an earlier run. exp:12, trial:34, ckpt:UUID or model:NAME is one of the cluster that DET_MASTER
names: what it stands for is found at the first start, and downloaded.

--dry-run trains nothing: it shows what would be learned and what that takes. Of paths that only the cluster's
containers see (under a container_path of bind_mounts) it checks what it can.

Each trial is a process of its own that runs the YAML's entrypoint script. DIR (default: local_runs/<experiment name>)
receives

    experiment.json      the config with its overrides; command.json has the command's CONFIG.yaml and MODEL_DEF, and
                         what names of a cluster stand for
    trials.jsonl         a line for each trial: trial_id, state, hparams, steps_completed, metrics (of the last
                         validation), best_metrics, checkpoint_uuid, error (why it failed)
    best_checkpoint      the UUID of the best trial's checkpoint
    report.html          all of it as a page, to open in a browser
    search.jsonl         of adaptive_asha and async_halving: each evaluation, and whether the trial is stopped for it
    trials/<trial_id>/   its config.yaml, log.txt and events.jsonl
    cache/               what the trials share: tokenized data and reference log-probs. Delete it once they are done

checkpoint_uuid is the best by searcher.metric of the checkpoints that were validated when they were saved, and
best_metrics are the metrics of that checkpoint: they rank the trial. (The last step is always validated and saved.)
Checkpoints are kept in local_runs/checkpoints (LOCAL_CHECKPOINT_STORAGE moves it), for later runs to start from.

The searches random, adaptive_asha and async_halving try the same values each time, unless
reproducibility.experiment_seed changes: those that a cluster tries with that seed. (config/search.py says when not.)

After an interruption of any kind (Ctrl-C, a kill, a power cut) the same command continues: it keeps the finished
trials and resumes the others from their latest checkpoints.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from errors import CommandLine, UserError, about, at_least, exit_on_user_error, os_errors_of

CHECKPOINTS = "checkpoints"  # the folder beside those of the experiments; see storage/checkpoints.py

if TYPE_CHECKING:
    from experiment.kinds import Hyperparameters
    from experiment.results import Experiment


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("config_file", metavar="CONFIG.yaml", help="the experiment, as for det e create")
    add("model_def", metavar="MODEL_DEF", nargs="?", default=".", help="folder the entrypoint runs in (default: .)")
    add(
        "--config",
        metavar="key=value",
        action="append",
        default=[],
        help="override a key of the YAML, e.g. --config hyperparameters.training_args.max_steps=10; repeatable",
    )
    add(
        "--output",
        metavar="DIR",
        help="default: local_runs/<experiment name>; with --dry-run, the page to write: FILE.html, or"
        " a folder for its dry_run.html (default: none)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="train nothing, and need no weights: show what would be learned, token by token, what the length limits"
        " cut, and what the training would cost in steps and memory",
    )
    add(
        "--examples",
        metavar="N",
        type=at_least(0),
        default=1,
        help="rows of each source that --dry-run shows (default: 1)",
    )
    add(
        "--max-concurrent",
        metavar="N",
        type=at_least(1),
        default=1,
        help="trials at a time (default: 1): each needs memory of its own, and they share cores and GPUs",
    )
    return parser.parse_args()


def show_dry_run(
    experiment: "Experiment", trials: list["Hyperparameters"], examples: int, page: Path | None, remarks: list[str]
) -> None:
    """Print the sections of a dry run as they come, and write them to `page`, even if a mistake ends it early."""
    from experiment.dry_run import dry_run
    from experiment.dry_run_output import print_section, write_page
    from experiment.runner import console

    if not console.is_terminal:
        console.width = max(console.width, 120)  # of a log file
    sections = []
    try:
        for section in dry_run(experiment, trials, examples, remarks):
            print_section(section, console)
            sections.append(section)
    finally:
        if page and sections:
            console.print(f"Written to {write_page(sections, experiment.name, page)}", markup=False)


@exit_on_user_error
def main() -> int:
    """Run the experiment of the command line. Returns 1 if a trial failed."""
    args = parse_arguments()
    from config.experiment import entrypoint_script, expand_trials, read_experiment_config
    from storage.files import BUNDLE, check_output, path_component

    config = read_experiment_config(args.config_file, args.config)
    model_def = Path(os.path.realpath(args.model_def))
    with about(args.config_file):
        script = entrypoint_script(config)[0]
        with os_errors_of(f"entrypoint script {script}"):  # a name that is too long, for example
            is_there = (model_def / script).is_file()
        if not is_there:
            raise UserError(f"entrypoint script {script}: not in MODEL_DEF, {model_def}")
        expand_trials(config)  # a mistake in the grid needs no torch to be found
    name = config.get("name") or Path(args.config_file).stem
    component = path_component(name)
    if component.casefold() == CHECKPOINTS:
        component += "_experiment"
    folder = Path(args.output or Path("local_runs") / component)
    folder = Path(os.path.realpath(folder))  # `resolve` would raise for a symlink that leads to itself
    if args.output or not args.dry_run:
        check_output(folder, "--output", is_folder=not (args.dry_run and folder.suffix == ".html"))

    # Imported once the command line and the YAML have been read: torch and what is built on it take seconds.
    from experiment.trial_process import start_importing

    if not args.dry_run and model_def == BUNDLE:
        start_importing()
    import transformers

    from config.trying_out import training_elsewhere
    from experiment.next_steps import compare_command, dpo_command, winner
    from experiment.progress import results_table
    from experiment.runner import LocalExperiment, check_sources, console
    from experiment.starting_points import as_seen_here, settle_checkpoints
    from storage.checkpoints import check_storage
    from storage.locks import only_writer
    from trial.context import hide_progress_bars_in_logs

    transformers.utils.logging.set_verbosity_error()  # what it warns of is in the log of each trial
    hide_progress_bars_in_logs()
    with contextlib.chdir(model_def):  # relative paths in the YAML are the script's
        with about(args.config_file):
            if args.dry_run:
                config, remarks = as_seen_here(config)
            else:
                config, settled = settle_checkpoints(config, folder)
            experiment = LocalExperiment(name, config, folder, model_def)
            with training_elsewhere() if args.dry_run else contextlib.nullcontext():
                trials = experiment.parse_trials()
        if args.dry_run:
            if experiment.kind is None:
                raise UserError(f"--dry-run knows sft_finetune.py and dpo_finetune.py, not {script}")
            show_dry_run(experiment, trials, args.examples, folder if args.output else None, remarks)
            return 0
        check_storage(folder, next((hparams.checkpoint for hparams in trials if hparams.checkpoint), None))
        if experiment.kind:
            check_sources(experiment.kind, trials)
        with only_writer(folder):
            with os_errors_of(folder):
                experiment.open_folder(
                    {"config_file": args.config_file, "model_def": args.model_def, "checkpoints": settled}
                )
            failed = experiment.run(args.max_concurrent)

    verdict = experiment.verdict()
    console.print(results_table(experiment, verdict))
    for failure in experiment.failures():
        console.print(failure, markup=False)
    for line in winner(verdict):
        console.print(line, markup=False)
    console.print(f"Report: {experiment.report_file}", markup=False)
    if command := dpo_command(experiment) or compare_command(experiment):
        console.print(f"Next: {command}", markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
