"""Seconds from a command to its first step, by what they go into.

    python benchmarks/startup.py sft.yaml          # any experiment, with --config as for local_experiment.py
    python benchmarks/startup.py examples/tiny/sft.yaml --rounds 5

A round is `sft_finetune.py` or `dpo_finetune.py` in a process of its own with an empty cache, ended after one step; the
table has medians over the rounds. (A trial of a local grid is forked from a process that has done the imports.)
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

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

# What the entrypoints call, by what it is for; the trainer's class is the rest of "trainer".
PARTS = {
    "data": ("load_sft_dataset", "load_dpo_dataset"),
    "model": ("load_model_and_tokenizer", "set_chat_format", "download_ckpt"),
    "hardware": ("suit_hardware",),
    "trainer": ("SFTTrainer", "TokenizedDPOTrainer"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="its YAML, without a search")
    parser.add_argument("--config", action="append", default=[], metavar="KEY=VALUE", help="override a key of it")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        time_start(Path(args.experiment), *args.worker)
        return
    from config.experiment import read_experiment_config

    config = read_experiment_config(args.experiment, args.config)
    config["hyperparameters"].setdefault("training_args", {}).update(max_steps=1, logging_steps=1)
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


def time_start(experiment: Path, started: str, output: str) -> None:
    """Be the entrypoint of `experiment`, and write down its seconds since `started`."""
    entrypoint = json.loads(experiment.read_text())["entrypoint"]
    name = "dpo_finetune" if "dpo_finetune.py" in entrypoint else "sft_finetune"
    script, seconds = importlib.import_module(name), {"imports": time.time() - float(started)}
    seconds |= dict.fromkeys(("data", "model", "tokenizing", *list(PARTS)[2:], "first step"), 0.0)

    def timed(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += time.time() - began

        return call

    for part, names in PARTS.items():
        for called in names:
            if hasattr(script, called):
                setattr(script, called, timed(part, getattr(script, called)))
    script.tokenize_once = timed("tokenizing", script.tokenize_once)

    def train(trainer: Any, trial: Any) -> None:
        began = time.time()
        trainer.train()
        seconds["first step"] = time.time() - began
        known = sum(seconds.values())
        seconds["the rest"] = time.time() - float(started) - known
        Path(output).write_text(json.dumps(seconds))

    script.train_until_preempted = train
    sys.argv = [f"{name}.py", "--config", str(experiment), "--output", str(experiment.parent / "out")]
    script.main()


if __name__ == "__main__":
    main()
