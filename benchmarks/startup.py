"""Measure the seconds from a training command to its first step, part by part.

    python benchmarks/startup.py sft.yaml          # any experiment, with --config as for local_experiment.py
    python benchmarks/startup.py examples/tiny/sft.yaml --rounds 5

A round runs `sft_finetune.py` or `dpo_finetune.py` in its own process with an empty cache and ends after one step. The
table shows medians over the rounds. (The trials of a local grid skip the imports: they are forked from a process that
has done them.)
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from errors import CommandLine, at_least, exit_on_user_error

REPO = Path(__file__).resolve().parent.parent
# What the entrypoints import when they train, by the part that a call counts as.
PARTS = {
    "data": ("dataset_utils.load_sft_dataset", "dataset_utils.load_dpo_dataset"),
    "model": (
        *("trial.models.load_model_and_tokenizer", "chat_format.set_chat_format"),
        "storage.checkpoints.download_ckpt",
    ),
    "tokenizing": ("dataset_utils.tokenize_once",),
    "hardware": ("speed.hardware.suit_hardware",),
    "trainer": ("metrics.exact_evaluation.ExactSFTTrainer", "speed.tokenized_dpo_trainer.TokenizedDPOTrainer"),
}


@exit_on_user_error
def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("experiment", help="YAML of an experiment with a single trial")
    parser.add_argument("--config", action="append", default=[], metavar="KEY=VALUE", help="override a key of the YAML")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="number of rounds (default: %(default)s)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        time_start(Path(args.experiment), *args.worker)
        return
    from config.experiment import read_experiment_config

    config = read_experiment_config(args.experiment, args.config)
    given = config["hyperparameters"].get("training_args") or {}
    if isinstance(given, dict):  # else the script says what is wrong
        config["hyperparameters"]["training_args"] = {**given, "max_steps": 1, "logging_steps": 1}
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "experiment.json")  # which is YAML, too
            path.write_text(json.dumps(config))
            words = ["--worker", str(time.time()), str(Path(folder, "seconds.json"))]
            command = [sys.executable, __file__, str(path), *words]
            done = subprocess.run(command, cwd=REPO, stdout=subprocess.DEVNULL)
            if done.returncode:
                sys.exit(done.returncode)
            rounds.append(json.loads(Path(folder, "seconds.json").read_text()))
    print("| | seconds |\n|---|---|")
    for part in rounds[0]:
        print(f"| {part} | {statistics.median(seconds[part] for seconds in rounds):.2f} |")
    print(f"| together | {statistics.median(sum(seconds.values()) for seconds in rounds):.2f} |")


def split(name: str) -> tuple[str, str, str]:
    return name.rpartition(".")


def time_start(experiment: Path, started: str, output: str) -> None:
    """Run the entrypoint of `experiment` in this process and write the seconds of each part to the JSON file `output`.

    `started` is the Unix time at which the process was started.
    """
    entrypoint = json.loads(experiment.read_text())["entrypoint"]
    name = "dpo_finetune" if "dpo_finetune.py" in entrypoint else "sft_finetune"
    script = importlib.import_module(name)
    homes = {home: importlib.import_module(home) for names in PARTS.values() for home, _, _ in map(split, names)}
    callback = importlib.import_module("trial.det_callback")
    seconds = {"imports": time.time() - float(started), **dict.fromkeys((*PARTS, "first step"), 0.0)}

    def timed(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += time.time() - began

        return call

    for part, names in PARTS.items():
        for home, _, called in map(split, names):
            setattr(homes[home], called, timed(part, getattr(homes[home], called)))

    def train(trainer: Any, trial: Any) -> None:
        began = time.time()
        trainer.train()
        seconds["first step"] = time.time() - began
        known = sum(seconds.values())
        seconds["the rest"] = time.time() - float(started) - known
        Path(output).write_text(json.dumps(seconds))

    callback.train_or_resume = train
    sys.argv = [f"{name}.py", "--config", str(experiment), "--output", str(experiment.parent / "out")]
    script.main()


if __name__ == "__main__":
    main()
