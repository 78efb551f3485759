"""Measure what a grid costs: the tiny example's nine trials, compared with nine separate runs of one trial.

    make demo                       # once: makes the base model and the SFT checkpoint that the trials start from
    python benchmarks/grid.py       # three rounds, a quarter of an hour on two cores

A round runs one trial alone, then the grid with one trial at a time, then the grid with three at a time. Each is a
whole command in its own folder with an empty cache. The table shows medians over the rounds. It also counts the
reference passes: a trial's events say whether the reference model computed log-probs for it.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from errors import CommandLine, UserError, at_least, exit_on_user_error

REPO = Path(__file__).resolve().parent.parent
SFT = REPO / "local_runs" / "tiny-sft" / "best_checkpoint"
ALONE = ["searcher.name=single", "hyperparameters.dpo_beta=0.05", "hyperparameters.training_args.learning_rate=5e-5"]


def measure(name: str, overrides: list[str], max_concurrent: int, sft: str) -> tuple[float, int, int]:
    """Run the grid and return its seconds, the number of completed trials and the number of reference passes."""
    with tempfile.TemporaryDirectory() as scratch:
        storage, output = Path(scratch) / "checkpoints", Path(scratch) / "out"
        storage.mkdir()
        (storage / sft).symlink_to(REPO / "local_runs" / "checkpoints" / sft)
        overrides = [f"hyperparameters.model_ckpt={sft}", *overrides]
        command = [sys.executable, "local_experiment.py", "examples/tiny/dpo.yaml", "."]
        command += [word for override in overrides for word in ("--config", override)]
        command += ["--max-concurrent", str(max_concurrent), "--output", str(output)]
        environment = {**os.environ, "LOCAL_CHECKPOINT_STORAGE": str(storage)}
        started = time.monotonic()
        subprocess.run(command, cwd=REPO, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        trials = (output / "trials.jsonl").read_text().count('"state": "COMPLETED"')
        events = [json.loads(line) for file in output.glob("trials/*/events.jsonl") for line in file.open()]
    passes = sum(event.get("status", "").startswith("reference log-probs computed") for event in events)
    print(f"{name}: {seconds:.1f} s, {trials} trials, {passes} reference passes", flush=True)
    return seconds, trials, passes


@exit_on_user_error
def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="number of rounds (default: %(default)s)")
    rounds = parser.parse_args().rounds
    if not SFT.exists():
        raise UserError(f"{SFT} is missing; make demo writes it")
    sft = SFT.read_text().strip()
    cases = {"one trial alone": (ALONE, 1), "grid, one at a time": ([], 1), "grid, three at a time": ([], 3)}
    runs = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (overrides, max_concurrent) in cases.items():
            runs[name].append(measure(name, overrides, max_concurrent, sft))
    alone = statistics.median(seconds for seconds, _, _ in runs["one trial alone"])
    print("\n| | trials | median s | of nine alone | reference passes |\n|---|---|---|---|---|")
    for name, measured in runs.items():
        seconds = statistics.median(seconds for seconds, _, _ in measured)
        trials, passes = (sorted({run[index] for run in measured}) for index in (1, 2))
        share = "" if name == "one trial alone" else f"{seconds / (9 * alone):.2f}"
        counts = [", ".join(map(str, values)) for values in (trials, passes)]
        print(f"| {name} | {counts[0]} | {seconds:.1f} | {share} | {counts[1]} |")


if __name__ == "__main__":
    main()
