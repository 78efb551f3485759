"""How speed and memory of a training grow with its size: a picture, and the slopes in it.

    python benchmarks/scale.py --output benchmarks/scale.png      # half an hour on two cores

SFT steps of `throughput.py`'s `small` model, in this project's configuration and in TRL's in float32, each a process of
its own: with the length of the sequences, with their number in a batch, with the model's size, and on one and two
processes (data parallel: each has a batch of its own). The slope of tokens/s is the exponent b of a fitted x^b: 0 where
each token costs the same, -1 where a sequence costs as much as all of its pairs of tokens. That of memory is in bytes a
token (or a parameter).

    python benchmarks/scale.py --full-run 45      # percent of a card's peak that a training keeps busy

tells instead, and measures nothing, what the published run would take on one and two H100 or H200 cards: sft.yaml's
60,000 samples once, dpo.yaml's nine trials twice over its pairs, evaluations and the reference pass as well.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import throughput
from throughput import REPO

COLOURS = {"ours": "tab:blue", "trl-fp32": "tab:gray", "trl": "tab:brown"}
PEAK = throughput.PEAK_FLOPS["H100"]  # the H200's, too
# Mean tokens of a row. Cosmopedia's card counts 25 billion tokens in 30 million texts; its prompts, and the pairs of
# dpo-mix-7k and truthy-dpo, are means of public samples.
TOKENS = {"sft": {"prompt": 43, "completion": 830}, "dpo": {"prompt": 656, "chosen": 352, "rejected": 355}}
PAIRS = 6750 + 1016
PANELS: dict[str, list[tuple[float, list[str]]]] = {  # x, and throughput.py's options for it
    "tokens a sequence": [(n, ["--length", str(n), "--batch", "1"]) for n in (256, 512, 1024, 2048, 4096)],
    "sequences a batch": [(n, ["--length", "256", "--batch", str(n)]) for n in (1, 2, 4, 8, 16)],
    "parameters": [
        (0, ["--length", "256", "--batch", "1", "--model", model]) for model in ("tiny", "small", "gemma-270m")
    ],
    "processes": [(n, ["--length", "256", "--batch", "2", "--processes", str(n)]) for n in (1, 2)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="scale.png", help="picture; the numbers go beside it as .json")
    parser.add_argument("--steps", type=int, default=2, help="counted in a measurement (default: %(default)s)")
    parser.add_argument(
        "--configurations", nargs="+", default=["ours", "trl-fp32"], choices=COLOURS, help="default: ours trl-fp32"
    )
    parser.add_argument("--full-run", type=float, metavar="PERCENT", help="tell what the published run would take")
    args = parser.parse_args()
    if args.full_run is not None:
        if not 1 <= args.full_run <= 100:
            sys.exit(f"error: --full-run {args.full_run:g} is not in [1, 100] percent")
        full_run(args.full_run / 100)
        return
    points = [
        {"panel": panel, "x": x, **point}
        for panel, cases in PANELS.items()
        for x, options in cases
        for point in measure([*options, "--steps", str(args.steps), "--configurations", *args.configurations])
    ]
    told = {"machine": throughput.machine(), "slopes": slopes(points, args.configurations), "points": points}
    Path(args.output).with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    draw(points, args.configurations, Path(args.output))


def measure(options: list[str]) -> list[dict[str, Any]]:
    """A point for each configuration."""
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
    """x, tokens/s and GB."""
    chosen = [p for p in points if (p["panel"], p["configuration"]) == (panel, name)]
    x = [p["parameters"] if panel == "parameters" else p["x"] for p in chosen]
    return np.array(x), *(np.array([p[key] for p in chosen]) for key in ("tokens_per_second", "peak_gb"))


def slopes(points: list[dict[str, Any]], configurations: list[str]) -> list[dict[str, Any]]:
    told = []
    print("\n| tokens/s and memory with | | exponent of tokens/s | memory |\n|---|---|---|---|")
    for panel in PANELS:
        for name in configurations:
            x, speed, memory = series(points, panel, name)
            exponent = np.polyfit(np.log(x), np.log(speed), 1)[0]
            tokens = x * {"tokens a sequence": 1, "sequences a batch": 256}.get(panel, 1)
            size = np.polyfit(tokens, 1e9 * memory, 1)[0]
            unit = {"parameters": "bytes a parameter", "processes": "bytes a process"}.get(panel, "bytes a token")
            told.append({"panel": panel, "configuration": name, "exponent": exponent, "memory": size, "unit": unit})
            print(f"| {panel} | {name} | {exponent:.2f} | {size:,.0f} {unit} |")
    return told


def draw(points: list[dict[str, Any]], configurations: list[str], output: Path) -> None:
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
    """Print hours of the published run, from operations alone: a training takes F a token, an evaluation F / 3 (see
    `throughput.flops_per_token`), and a pair's prompt is computed once."""
    import transformers

    from config.experiment import expand_trials, read_experiment_config

    config = transformers.GemmaConfig(**throughput.GEMMA_2B)
    experiments = {kind: expand_trials(read_experiment_config(str(REPO / f"{kind}.yaml"))) for kind in TOKENS}
    rows = {"sft": sum(share["number_of_samples"] for share in experiments["sft"][0]["dataset_subsets"]), "dpo": PAIRS}
    tokens = {kind: sum(lengths.values()) for kind, lengths in TOKENS.items()}
    learned = {"sft": 1.0, "dpo": 1 - TOKENS["dpo"]["prompt"] / tokens["dpo"]}  # sft.yaml learns the prompts, too

    print(f"Computed, not measured: Gemma-2B at {utilisation:.0%} of the {PEAK / 1e12:.0f} TFLOP/s of an H100 or H200.")
    print("Loading and saving are left out; on two cards there are half as many steps, and evaluations.\n")
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
            hours.append((trained + evaluated / 3) * operations / (cards * PEAK * utilisation) / 3600)
            name = "SFT" if kind == "sft" else "DPO, nine trials and the reference pass"
            print(f"| {name} | {cards} | {trained:,} | {evaluated:,} | {hours[-1]:.2f} | {cards * hours[-1]:.2f} |")
        print(f"| together | {cards} | | | {sum(hours):.2f} | {cards * sum(hours):.2f} |")


if __name__ == "__main__":
    main()
