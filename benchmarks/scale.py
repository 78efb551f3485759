"""Measure how the speed and memory of a training grow with its size, and draw them with their slopes.

    python benchmarks/scale.py --output benchmarks/scale.png      # half an hour on two cores

It measures SFT steps of the `small` model of `throughput.py`, in this project's configuration and in TRL's float32
configuration, each in its own process. Four things vary: the length of the sequences, their number in a batch, the size
of the model, and the number of processes (data parallel: each process has its own batch). The slope of tokens/s is the
exponent b of a fitted x^b: 0 if every token costs the same, -1 if the cost of a sequence grows with the square of its
length. The slope of memory is in bytes per token (or parameter).

    python benchmarks/scale.py --full-run 45      # percent of a card's peak FLOP/s that a training reaches

This measures nothing. It computes what the published run would take on one and two H100 or H200 cards: one epoch of
sft.yaml's 60,000 samples and two epochs of dpo.yaml's pairs for each of its nine trials, with all evaluations and the
reference pass.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import throughput
from throughput import REPO, CommandLine, UserError, at_least, check_output, exit_on_user_error

COLOURS = {"ours": "tab:blue", "trl-fp32": "tab:gray", "trl": "tab:brown"}
# Mean number of tokens in a row. Cosmopedia's card states 25 billion tokens in 30 million texts. The numbers for its
# prompts and for the pairs of dpo-mix-7k and truthy-dpo are means over public samples.
TOKENS = {"sft": {"prompt": 43, "completion": 830}, "dpo": {"prompt": 656, "chosen": 352, "rejected": 355}}
PAIRS = 6750 + 1016
PANELS: dict[str, list[tuple[float, list[str]]]] = {  # x, and the options of throughput.py for it
    "tokens a sequence": [(n, ["--length", str(n), "--batch", "1"]) for n in (256, 512, 1024, 2048, 4096)],
    "sequences a batch": [(n, ["--length", "256", "--batch", str(n)]) for n in (1, 2, 4, 8, 16)],
    "parameters": [
        (0, ["--length", "256", "--batch", "1", "--model", model]) for model in ("tiny", "small", "gemma-270m")
    ],
    "processes": [(n, ["--length", "256", "--batch", "2", "--processes", str(n)]) for n in (1, 2)],
}


@exit_on_user_error
def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", default="scale.png", help="picture; the numbers go to the same path with .json")
    parser.add_argument(
        "--steps", type=at_least(1), default=2, help="measured steps of each run (default: %(default)s)"
    )
    parser.add_argument(
        "--configurations", nargs="+", default=["ours", "trl-fp32"], choices=COLOURS, help="default: ours trl-fp32"
    )
    parser.add_argument("--full-run", type=float, metavar="PERCENT", help="compute what the published run would take")
    args = parser.parse_args()
    if args.full_run is not None:
        if not 1 <= args.full_run <= 100:
            raise UserError(f"--full-run {args.full_run:g} must be a percentage from 1 to 100")
        full_run(args.full_run / 100)
        return
    check_output(Path(args.output), "--output")
    points = [
        {"panel": panel, "x": x, **point}
        for panel, cases in PANELS.items()
        for x, options in cases
        for point in measure([*options, "--steps", str(args.steps), "--configurations", *args.configurations])
    ]
    numbers = {"machine": throughput.machine(), "slopes": fit_slopes(points, args.configurations), "points": points}
    Path(args.output).with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    plot(points, args.configurations, Path(args.output))


def measure(options: list[str]) -> list[dict[str, Any]]:
    """Measure one point for each configuration; `options` are those of throughput.py."""
    args = throughput.parse_arguments(["--kind", "sft", *options])
    (args.length,) = args.length
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = throughput.make_model(args.model, folder, own_tokenizer=False)
        rows = throughput.make_rows("sft", args, folder / "rows.jsonl")
        for name in args.configurations:
            result = throughput.measure(name, "sft", args, model, rows, folder / name)
            points.append(
                {"configuration": name, **{k: result[k] for k in ("tokens_per_second", "peak_gb", "parameters")}}
            )
            print(
                f"{' '.join(options)}: {name} {result['tokens_per_second']:.0f} tokens/s, {result['peak_gb']:.2f} GB",
                flush=True,
            )
    return points


def series(points: list[dict[str, Any]], panel: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, tokens/s and GB of one line of the picture, as arrays of the same length."""
    chosen = [p for p in points if (p["panel"], p["configuration"]) == (panel, name)]
    x = [p["parameters"] if panel == "parameters" else p["x"] for p in chosen]
    return np.array(x), *(np.array([p[key] for p in chosen]) for key in ("tokens_per_second", "peak_gb"))


def fit_slopes(points: list[dict[str, Any]], configurations: list[str]) -> list[dict[str, Any]]:
    """Fit, print and return the slopes of every line in the picture."""
    slopes = []
    print("\n| tokens/s and memory with | | exponent of tokens/s | memory |\n|---|---|---|---|")
    for panel in PANELS:
        for name in configurations:
            x, speed, memory = series(points, panel, name)
            exponent = np.polyfit(np.log(x), np.log(speed), 1)[0]
            tokens = x * {"tokens a sequence": 1, "sequences a batch": 256}.get(panel, 1)
            size = np.polyfit(tokens, 1e9 * memory, 1)[0]
            unit = {"parameters": "bytes a parameter", "processes": "bytes a process"}.get(panel, "bytes a token")
            slopes.append({"panel": panel, "configuration": name, "exponent": exponent, "memory": size, "unit": unit})
            print(f"| {panel} | {name} | {exponent:.2f} | {size:,.0f} {unit} |")
    return slopes


def plot(points: list[dict[str, Any]], configurations: list[str], output: Path) -> None:
    """Write the picture: a column for each panel, tokens/s above memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(PANELS), figsize=(13, 6), layout="constrained")
    for column, panel in zip(axes.T, PANELS, strict=True):
        for name in configurations:
            x, *values = series(points, panel, name)
            for axis, value in zip(column, values, strict=True):
                axis.plot(x, value, marker="o", color=COLOURS[name], label=name)
        for axis in column:
            axis.set_xscale("log")
            axis.set_ylim(bottom=0)
            axis.set_xticks(x, [f"{v / 1e6:.0f} M" if panel == "parameters" else f"{v:.0f}" for v in x], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        column[1].set_xlabel(panel)
    axes[0, 0].set_ylabel("tokens/s")
    axes[1, 0].set_ylabel("peak memory, GB")
    axes[0, 0].legend()
    figure.savefig(output, dpi=110)


def full_run(utilisation: float) -> None:
    """Print the hours of the published run, computed from its floating-point operations.

    Training takes F operations per token and evaluation F / 3 (see `throughput.flops_per_token`). A pair's prompt is
    computed once. `utilisation` is the share of the peak FLOP/s that is reached.
    """
    import transformers

    from config.experiment import expand_trials, read_experiment_config
    from trial.throughput import PEAKS

    peak = PEAKS["H100"]  # the H200 has the same peak
    config = transformers.GemmaConfig(**throughput.GEMMA_2B)
    experiments = {kind: expand_trials(read_experiment_config(str(REPO / f"{kind}.yaml"))) for kind in TOKENS}
    rows = {"sft": sum(share["number_of_samples"] for share in experiments["sft"][0]["dataset_subsets"]), "dpo": PAIRS}
    tokens = {kind: sum(lengths.values()) for kind, lengths in TOKENS.items()}
    learned = {"sft": 1.0, "dpo": 1 - TOKENS["dpo"]["prompt"] / tokens["dpo"]}  # sft.yaml supervises prompts too

    print(f"Computed, not measured: Gemma-2B at {utilisation:.0%} of the {peak / 1e12:.0f} TFLOP/s of an H100 or H200.")
    print("Loading and saving are not counted. Two cards take half as many steps, and so half as many evaluations.\n")
    print("| | cards | rows trained on | rows evaluated | hours | card hours |\n|---|---|---|---|---|---|")
    for cards in (1, 2):
        hours = []
        for kind, trials in experiments.items():
            given = trials[0]["training_args"]
            held_out, epochs = round(0.2 * rows[kind]), given["num_train_epochs"]
            batch = cards * given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
            steps = epochs * math.ceil((rows[kind] - held_out) / batch)
            trained = len(trials) * epochs * (rows[kind] - held_out)
            evaluated = len(trials) * math.ceil(steps / given["eval_steps"]) * held_out
            evaluated += rows[kind] if kind == "dpo" else 0  # the reference pass
            operations = tokens[kind] * throughput.flops_per_token(config, tokens[kind], learned[kind])
            hours.append((trained + evaluated / 3) * operations / (cards * peak * utilisation) / 3600)
            name = "SFT" if kind == "sft" else "DPO, nine trials and the reference pass"
            print(f"| {name} | {cards} | {trained:,} | {evaluated:,} | {hours[-1]:.2f} | {cards * hours[-1]:.2f} |")
        print(f"| together | {cards} | | | {sum(hours):.2f} | {cards * sum(hours):.2f} |")


if __name__ == "__main__":
    main()
