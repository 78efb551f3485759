"""Measure tokens per second and memory of this project's training, and of TRL's own on the same rows.

    python benchmarks/throughput.py --model small                    # SFT and DPO, a quarter of an hour on two cores
    python benchmarks/throughput.py --model gemma-270m --rounds 3
    python benchmarks/throughput.py --model gemma-2b --length 4096 2048 --batch 2     # on a GPU: SFT and DPO
    python benchmarks/throughput.py --model FOLDER --dataset rows.jsonl --kind sft --json out.json

Each measurement runs in its own process, which makes its peak memory its own: one warm-up step, then `--steps` measured
steps. The configurations take turns, round by round. The table shows medians over the rounds.

    ours           sft_finetune.py or dpo_finetune.py with a minimal YAML: everything optional keeps its default. What
                   it chose for the hardware is printed below the table
    trl            SFTTrainer and DPOTrainer with their own defaults: bf16 autocast, activation checkpointing, and for
                   DPO a reference model in memory. On a CPU with `use_cpu: true`, without which they refuse to run
    trl-liger      trl with use_liger_kernel, and for DPO with precompute_ref_log_probs instead of a reference model in
                   memory. It needs a CUDA device and the package liger-kernel
    trl-no-checkpointing    trl without activation checkpointing
    trl-fp32       the same in float32: the fastest of TRL's on a CPU without bf16 instructions
    ours-lora      ours with a `lora` block (LORA, below); ours-qlora also has load_in_4bit, and needs a GPU
    trl-lora       trl with the same adapter, as a peft_config, on a bf16 base where it computes in bf16; trl-lora-fp32
                   is trl-fp32 with it

All of them train on the same token ids in the same batches. The model is either made with random weights in its true
shape or read from a folder; its tokenizer is replaced by one that makes each word a token. The rows consist of random
words. Their lengths follow those of public samples (see `LENGTHS`) or are `--length` tokens. With `--dataset` the rows
come from that file and the folder's own tokenizer is used.

    tokens/s       tokens of the sequences trained on, without padding; a pair counts both of its sequences in full
    supervised/s   tokens whose log-prob is in the loss
    padding        the share of the decoder's positions that hold padding
    waiting        the share of a step's time that is spent waiting for its rows
    MFU            on a GPU: F x tokens/s / peak FLOP/s, with F from `flops_per_token`. Padding, recomputation and the
                   reference are not counted, and a pair's prompt is counted as often as it is computed
    reference pass s    seconds for the reference log-probs of the rows trained on, which tokens/s does not count. (0:
                   there is no such pass, and each step computes its own)
    peak GB        resident memory, or on a GPU the memory that torch has reserved; the sum over all processes
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from errors import CommandLine, UserError, at_least, exit_on_user_error, reading
from storage.files import check_output

REPO = Path(__file__).resolve().parent.parent
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size")
COMMON = {"num_key_value_heads": 1, "max_position_embeddings": 8192}
GEMMA_3 = {"max_position_embeddings": 32768, "sliding_window": 512, "query_pre_attn_scalar": 256}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # config class and changes to its defaults
    name: (cls, COMMON | dict(zip(SIZES, sizes, strict=True)) | more)
    for name, cls, sizes, more in (
        ("tiny", "GemmaConfig", (128, 384, 4, 4, 32, 2048), {}),
        ("small", "GemmaConfig", (512, 2048, 8, 8, 64, 32000), {}),
        ("gemma-270m", "Gemma3TextConfig", (640, 2048, 18, 4, 256, 262144), GEMMA_3),
        ("gemma-2b", "GemmaConfig", (2048, 16384, 18, 8, 256, 256000), {}),
    )
}
GEMMA_2B = MODELS["gemma-2b"][1]
# Log-normal distributions (mean, standard deviation, minimum, maximum) of the number of Gemma tokens in public samples:
# Cosmopedia for SFT, dpo-mix-7k and truthy-dpo for DPO. The longest samples are left out.
LENGTHS = {
    "sft": {"prompt": (3.67, 0.25, 28, 190), "completion": (4.5, 1.15, 8, 570)},
    "dpo": {"prompt": (5.0, 0.6, 60, 1000), "chosen": (4.8, 1.2, 9, 860), "rejected": (5.5, 0.68, 20, 760)},
}
TRL_ARGUMENTS: dict[str, dict[str, Any]] = {  # changes to TRL's defaults
    "trl": {},
    "trl-liger": {"use_liger_kernel": True},
    "trl-no-checkpointing": {"gradient_checkpointing": False},
    "trl-fp32": {"gradient_checkpointing": False, "bf16": False},
}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
TRL_ARGUMENTS |= {"trl-lora": TRL_ARGUMENTS["trl"], "trl-lora-fp32": TRL_ARGUMENTS["trl-fp32"]}
OURS: dict[str, dict[str, Any]] = {  # hyperparameters
    "ours": {},
    "ours-lora": {"lora": LORA},
    "ours-qlora": {"lora": LORA, "load_in_4bit": True},
}
CONFIGURATIONS = (*OURS, *TRL_ARGUMENTS)
WARM_UP = 1  # steps


@exit_on_user_error
def main() -> None:
    args = parse_arguments()
    if args.worker:
        work(json.loads(Path(args.worker).read_text()))
        return
    args.configurations = choose_configurations(args.configurations)
    cases = []
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        model = make_model(args.model, Path(folder), args.dataset is not None, args.model_folder)
        for kind, length in zip(args.kind, args.length or [None] * len(args.kind), strict=True):
            case = argparse.Namespace(**vars(args) | {"length": length})
            rows = Path(args.dataset) if args.dataset else make_rows(kind, case, Path(folder) / f"{kind}.jsonl")
            cases.append((kind, case, model, rows, Path(folder)))
            check(*cases[-1])
        results = [result for case in cases for result in compare(*case)]
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    if {(result["kind"], result["configuration"]) for result in results} < set(product(args.kind, args.configurations)):
        raise UserError("some configurations could not be measured; see above")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add, count = parser.add_argument, at_least(1)
    add("--model", default="small", help=f"{', '.join(MODELS)} or a model's folder (default: small)")
    add("--model-folder", type=Path, help="folder to make the model in, or to find it in (default: a new one)")
    add("--kind", nargs="+", default=["sft", "dpo"], choices=["sft", "dpo"], help="default: both")
    add("--dataset", help="file or folder of rows to train on (default: random words)")
    add(
        "--length",
        type=at_least(32),
        nargs="+",
        help="tokens of every sequence, one number for each kind (default: varied)",
    )
    add("--batch", type=count, default=4, help="rows per batch; for DPO pairs (default: %(default)s)")
    add("--accumulate", type=count, default=1, help="batches per step (default: %(default)s)")
    add("--steps", type=count, default=4, help="measured steps of each run (default: %(default)s)")
    add("--rounds", type=count, default=3, help="runs of each configuration (default: %(default)s)")
    add("--processes", type=count, default=1, help="processes of each training (default: %(default)s)")
    defaults = "a GPU all but trl-fp32, on a CPU with bf16 instructions all but trl-liger, on another ours trl-fp32"
    add("--configurations", nargs="+", choices=CONFIGURATIONS, help=f"default: on {defaults}")
    setting = "set a key of training_args in `ours`, as in activation_checkpointing=true"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=setting)
    add("--peak-tflops", type=float, help="bf16 peak of a GPU that trial/throughput.py does not know")
    add("--json", help="write all measurements to this file")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.peak_tflops is not None and not 0 < args.peak_tflops < math.inf:
        raise UserError(f"--peak-tflops {args.peak_tflops:g} must be above 0")
    for word in args.set:
        name, equals, value = word.partition("=")
        with reading(f"--set {word!r}"):
            yaml.safe_load(value)
        if not (name and equals):
            raise UserError(f"--set {word!r} is not KEY=VALUE")
    if args.json:
        check_output(Path(args.json), "--json")
    if args.length and len(args.length) != len(args.kind):
        raise UserError(f"--length: give one number for each of {', '.join(args.kind)}, as in --length 4096 2048")
    if args.model not in MODELS and not Path(args.model, "config.json").is_file():
        needed = "config.json, weights and, for --dataset, a tokenizer"
        raise UserError(f"--model {args.model}: must be one of {', '.join(MODELS)} or a model's folder (with {needed})")
    if args.model not in MODELS and args.model_folder:
        raise UserError(f"--model-folder: keeps a model that is made, but --model {args.model} is there already")
    if args.model in MODELS and args.dataset:
        raise UserError(f"--dataset: {args.model} has no real tokenizer; set --model to a model's folder")
    if args.dataset and not Path(args.dataset).exists():
        raise UserError(f"--dataset {args.dataset}: no such file or folder")
    return args


def choose_configurations(named: list[str] | None) -> list[str]:
    """Return those that are `named`, else those that a user would choose here. Raises if one cannot run here."""
    import torch

    from config.training_args import has_bf16

    gpu = torch.cuda.is_available()
    likely = [n for n in CONFIGURATIONS if "lora" not in n and n != ("trl-fp32" if gpu else "trl-liger")]
    chosen = named or (likely if gpu or has_bf16(use_cpu=True) else ["ours", "trl-fp32"])
    if "trl-liger" in chosen and not (gpu and importlib.util.find_spec("liger_kernel")):
        missing = "the package liger-kernel (pip install liger-kernel)" if gpu else "a CUDA device"
        raise UserError(f"--configurations: trl-liger needs {missing}; without it, name the others")
    return chosen


def machine() -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        **{library: version(library) for library in ("torch", "transformers", "trl")},
    }


def make_model(name: str, folder: Path, own_tokenizer: bool, kept: Path | None = None) -> Path:
    """Return the folder of the model, with its `own_tokenizer` or with one that makes each word a token.

    A model of `MODELS` is made in `kept`, unless it is there already. Raises if something else is there.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    made = kept or folder / "model"
    recipe = made / "recipe.json"  # written last, so a model without it is not whole
    if name in MODELS:
        if recipe.is_file() and recipe.read_text() == json.dumps(MODELS[name]):
            return made
        if made.is_file() or (made.is_dir() and any(made.iterdir())):
            raise UserError(f"--model-folder {made}: holds something other than a whole {name} that was made here")
        cls, changes = MODELS[name]
        config = getattr(transformers, cls)(**changes)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(made)
    elif own_tokenizer:
        return Path(name)
    else:
        made.mkdir()
        for file in Path(name).iterdir():
            if "token" not in file.name:
                (made / file.name).symlink_to(file.resolve())
    vocabulary = transformers.AutoConfig.from_pretrained(made).vocab_size
    make_tokenizer(min(vocabulary, 30000)).save_pretrained(made)
    if name in MODELS:
        recipe.write_text(json.dumps(MODELS[name]))
    return made


def make_tokenizer(size: int) -> Any:
    """Return a tokenizer in which each of the words w0, w1, ... is one token, as are the turn markers and a newline."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>", "<unk>"]
    words = [*special, "\n", "user", "assistant"]
    words += [f"w{number}" for number in range(size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s]+"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def make_rows(kind: str, args: argparse.Namespace, path: Path) -> Path:
    """Write random rows to `path`: enough for all steps, and for the 20% that the entrypoints hold out."""
    rng = random.Random(0)
    needed = args.batch * args.accumulate * args.processes * (args.steps + WARM_UP)
    with path.open("w") as file:
        for _ in range(math.ceil(needed / 0.8) + 1):
            if args.length:
                # The prompt is an eighth of the sequence in SFT and half of it in DPO, less what the template adds.
                prompt = args.length // (8 if kind == "sft" else 2)
                sizes = {"prompt": prompt - 10}
                sizes |= dict.fromkeys(
                    ("completion",) if kind == "sft" else ("chosen", "rejected"), args.length - prompt - 2
                )
            else:
                sizes = {
                    name: int(min(high, max(low, rng.lognormvariate(mean, deviation))))
                    for name, (mean, deviation, low, high) in LENGTHS[kind].items()
                }
            row = {name: " ".join(f"w{rng.randrange(20000)}" for _ in range(size)) for name, size in sizes.items()}
            file.write(json.dumps(row) + "\n")
    return path


def make_spec(name: str, kind: str, args: argparse.Namespace, model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """Return what a measurement's process needs to know."""
    return {
        "configuration": name, "kind": kind, "folder": str(folder),
        "model": str(model.resolve()), "rows": str(rows.resolve()),  # `work` changes the folder
        "batch": args.batch, "accumulate": args.accumulate, "steps": args.steps, "length": args.length,
        "set": args.set, "peak_flops": args.peak_tflops and args.peak_tflops * 1e12,
    }  # fmt: skip


def check(kind: str, args: argparse.Namespace, *case: Path) -> None:
    """Raise `UserError` for a mistake in `--set` or in the rows of `--dataset`, before anything is measured."""
    from config.hyperparameters import parse_hyperparameters
    from experiment.kinds import kind_of
    from trial.context import hide_progress_bars_in_logs

    hide_progress_bars_in_logs()
    training: Any = kind_of(f"{kind}_finetune.py")
    values = make_experiment(make_spec("ours", kind, args, *case))["hyperparameters"]
    hparams = parse_hyperparameters(training.hyperparameters, values)
    if args.dataset:
        training.load(**hparams.load_options)


def compare(kind: str, args: argparse.Namespace, model: Path, rows: Path, folder: Path) -> list[dict[str, Any]]:
    """Measure the configurations in turns, print the medians and return all measurements.

    A configuration that fails (because it needs too much memory, for example) is printed and left out.
    """
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in args.configurations}
    for number in range(args.rounds):
        for name in list(measured):
            print(f"round {number + 1} of {args.rounds}, {kind} {name}: measuring", file=sys.stderr)
            try:
                result = measure(name, kind, args, model, rows, folder / f"{kind}-{name}-{number}")
            except ChildProcessError as error:
                print(f"{kind} {name} failed: {error}", file=sys.stderr)
                del measured[name]
                continue
            measured[name].append(result)
            print(f"    {result['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0] if key not in ("losses", "choices")}
        for name, runs in measured.items()
    }
    if medians:
        print_table(kind, args, medians)
    for name in OURS:
        for choices in dict.fromkeys(text for run in measured.get(name, []) for text in run["choices"]):
            print(f"\n{name}: {choices}", flush=True)
    common = {"kind": kind, "model": args.model, "length": args.length, "batch": args.batch}
    return [{**common, "configuration": name, **result} for name, results in measured.items() for result in results]


def print_table(kind: str, args: argparse.Namespace, medians: dict[str, dict[str, float]]) -> None:
    """Print the medians as a Markdown table, and the ratio of ours to the fastest of TRL's configurations."""
    columns = {
        "tokens/s": ("tokens_per_second", "{:.0f}"),
        "supervised/s": ("supervised_per_second", "{:.0f}"),
        "padding": ("padding", "{:.0%}"),
        "s per step": ("seconds", "{:.2f}"),
        "waiting": ("waiting", "{:.1%}"),
        "peak GB": ("peak_gb", "{:.2f}"),
        "reference pass s": ("reference_seconds", "{:.1f}"),
        "MFU": ("mfu", "{:.1%}"),
    }
    columns = {title: column for title, column in columns.items() if any(m.get(column[0]) for m in medians.values())}
    length = f", {args.length} tokens" if args.length else ""
    print(f"\n{kind.upper()}, {args.model}, batch {args.batch}{length}, median of {args.rounds}:\n")
    print("| | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for name, median in medians.items():
        print(f"| {name} | " + " | ".join(form.format(median.get(key) or 0) for key, form in columns.values()) + " |")
    for ours in filter(medians.__contains__, OURS):
        alike = [name for name in TRL_ARGUMENTS.keys() & medians.keys() if ("lora" in name) == ("lora" in ours)]
        best = max(alike, key=lambda name: medians[name]["tokens_per_second"], default=None)
        for other in filter(None, (best, "ours" if ours != "ours" and "ours" in medians else None)):
            ratios = [medians[ours][key] / medians[other][key] for key in ("tokens_per_second", "peak_gb")]
            print(f"\n{ours} / {other}: {ratios[0]:.2f} x the tokens/s, {ratios[1]:.2f} x the memory", flush=True)


def measure(name: str, kind: str, args: argparse.Namespace, model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """Run one measurement in its own process, or processes, and return its result.

    Raises `ChildProcessError` with the end of the output if a process fails.
    """
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps(make_spec(name, kind, args, model, rows, folder)))
    command = [sys.executable, __file__, "--worker", str(folder / "spec.json")]
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    environment["LOCAL_CHECKPOINT_STORAGE"] = str(folder / "checkpoints")
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.parent / "inductor"))  # compile in the first round
    if args.processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={args.processes}"]
        command = [*launcher, *command[1:]]
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.processes)))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("result-*.json"))]
    if done.returncode or len(results) != args.processes:
        raise ChildProcessError(f"{done.stdout[-2000:]}{done.stderr[-4000:]}")
    summed = ("tokens_per_second", "supervised_per_second", "peak_gb")
    return results[0] | {key: sum(result[key] for result in results) for key in summed}


# The rest of this file runs in the process of a measurement, or in each of its processes.


def work(spec: dict[str, Any]) -> None:
    """Run the entrypoint with a meter on its trainer. TRL's configurations replace the trainer by TRL's own."""
    os.chdir(REPO)
    config = Path(spec["folder"], "experiment.json")  # JSON is YAML too
    config.write_text(json.dumps(make_experiment(spec)))
    script = importlib.import_module(f"{spec['kind']}_finetune")
    # The entrypoint imports these when it trains.
    replaced = {("trial.det_callback", "train_or_resume"): functools.partial(train, spec)}
    if spec["configuration"] not in OURS:
        trainers = {
            "sft": ("metrics.exact_evaluation", "ExactSFTTrainer"),
            "dpo": ("speed.tokenized_dpo_trainer", "TokenizedDPOTrainer"),
        }
        replaced[trainers[spec["kind"]]] = functools.partial(trl_trainer, spec)
        replaced["speed.hardware", "suit_hardware"] = lambda *args, **kwargs: None
    for (module, name), replacement in replaced.items():
        setattr(importlib.import_module(module), name, replacement)
    sys.argv = [f"{spec['kind']}_finetune.py", "--config", str(config), "--output", spec["folder"] + "/out"]
    script.main()


def make_experiment(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the smallest experiment config that the entrypoint accepts, with the keys of `--set`."""
    overrides = dict(word.split("=", 1) for word in spec["set"])
    training_args = common_training_args(spec) | {key: yaml.safe_load(value) for key, value in overrides.items()}
    hyperparameters = {"model_name": spec["model"], "training_args": training_args}
    hyperparameters |= OURS.get(spec["configuration"], {})
    if spec["kind"] == "sft":
        hyperparameters |= {"dataset": spec["rows"], "max_seq_length": 8192}
    else:
        hyperparameters |= {"model_ckpt": "none", "datasets": [spec["rows"]], "max_length": 8192}
        hyperparameters["precompute_ref_log_probs"] = True
    return {
        "name": "throughput",
        "entrypoint": f"python {spec['kind']}_finetune.py",
        "searcher": {"name": "single", "metric": "eval_loss"},
        "hyperparameters": hyperparameters,
    }


def common_training_args(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the training_args that all configurations have in common."""
    return {
        "max_steps": spec["steps"] + WARM_UP,
        "per_device_train_batch_size": spec["batch"],
        "per_device_eval_batch_size": spec["batch"],
        "gradient_accumulation_steps": spec["accumulate"],
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
    }


def trl_trainer(spec: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Return the trainer that a user of TRL alone would build, except that its rows are already tokenized."""
    import torch
    import trl

    class TokenizedDPOTrainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, name: str, *args: Any) -> Any:
            began = time.perf_counter()
            dataset = super()._precompute_ref_logps(dataset, name, *args)
            self.reference_seconds = {**getattr(self, "reference_seconds", {}), name: time.perf_counter() - began}
            return dataset

    config_class = trl.SFTConfig if spec["kind"] == "sft" else trl.DPOConfig
    changes = dict(TRL_ARGUMENTS[spec["configuration"]])
    if spec["kind"] == "dpo" and spec["configuration"] == "trl-liger":
        changes["precompute_ref_log_probs"] = True
    config = config_class(
        output_dir=spec["folder"], report_to="none", disable_tqdm=True, max_length=8192,
        use_cpu=not torch.cuda.is_available(), **changes, **common_training_args(spec),
    )  # fmt: skip
    if "lora" in spec["configuration"]:
        from config.lora import build_lora_config

        kwargs["peft_config"] = build_lora_config(LORA)
        if config.bf16:
            kwargs["model"].to(torch.bfloat16)
    cls = trl.SFTTrainer if spec["kind"] == "sft" else TokenizedDPOTrainer
    return cls(**{k: v for k, v in kwargs.items() if k not in ("ref_model", "evaluations")} | {"args": config})


def train(spec: dict[str, Any], trainer: Any, trial: Any) -> None:
    """Train like `train_or_resume`, but save and evaluate nothing at the end."""
    from trial.det_callback import DetCallback
    from trial.events import read_events

    callback = DetCallback(trial, trainer)
    callback._force_final_save = callback._force_final_evaluate = False
    trainer.add_callback(callback)
    meter = Meter(trainer, spec)
    trainer.train()
    said = [event.get("status", "") for event in read_events(Path(spec["folder"], "out", "events.jsonl"))]
    meter.write([text for text in said if text.startswith("training with ")])


class Meter:
    """Counts the tokens, positions and seconds of a trainer's steps, and writes the totals after training."""

    def __init__(self, trainer: Any, spec: dict[str, Any]) -> None:
        from transformers import TrainerCallback

        self.trainer, self.spec = trainer, spec
        self.steps: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.now = {"tokens": 0, "supervised": 0, "positions": 0, "waiting": 0.0}
        meter = self

        class Steps(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                meter.began = time.perf_counter()

            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                meter.now["waiting"] = time.perf_counter() - meter.began

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                meter.end_step()

            def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
                if "loss" in logs:
                    meter.losses.append(logs["loss"])

        trainer.add_callback(Steps())
        training_step = trainer.training_step

        def count(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.now["tokens"] += int(inputs["attention_mask"].sum())
            learned = inputs["labels"] != -100 if "labels" in inputs else inputs["completion_mask"].bool()
            self.now["supervised"] += int(learned[:, 1:].sum())
            return training_step(model, inputs, *args, **kwargs)

        trainer.training_step = count
        trainer.model.get_decoder().norm.register_forward_hook(self.count_positions)

    def count_positions(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self.now["positions"] += output.shape[0] * output.shape[1]

    def end_step(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ended = time.perf_counter()
        self.steps.append({"seconds": ended - self.began, **self.now})
        self.began, self.now = ended, dict.fromkeys(self.now, 0)

    def write(self, choices: list[str]) -> None:
        import torch

        from trial.throughput import peak_of

        counted = self.steps[WARM_UP:]
        total = {key: sum(step[key] for step in counted) for key in counted[0]}
        rank = int(os.environ.get("RANK", "0"))
        gpu = torch.cuda.is_available()
        result = {
            "tokens_per_second": total["tokens"] / total["seconds"],
            "supervised_per_second": total["supervised"] / total["seconds"],
            "padding": max(0.0, 1 - total["tokens"] / total["positions"]),
            "positions_per_token": total["positions"] / total["tokens"],
            "seconds": total["seconds"] / len(counted),
            "waiting": total["waiting"] / total["seconds"],
            "peak_gb": (torch.cuda.max_memory_reserved() if gpu else peak_rss()) / 1e9,
            "reference_seconds": getattr(self.trainer, "reference_seconds", {}).get("train", 0.0),
            "parameters": self.trainer.model.num_parameters(),
            "losses": self.losses,
            "choices": choices,
        }
        if gpu:
            peak = self.spec["peak_flops"] or peak_of(torch.device("cuda")) or math.nan
            flops = sum(self.flops(step) for step in counted)
            result["mfu"] = flops / total["seconds"] / peak
        Path(self.spec["folder"], f"result-{rank}.json").write_text(json.dumps(result))

    def flops(self, step: dict[str, float]) -> float:
        length = self.spec["length"] or 0  # without --length, attention (a few percent) is not counted
        share = step["supervised"] / step["tokens"]
        # No padding, and a pair's prompt as often as it is computed.
        computed = min(step["tokens"], step["positions"])
        return computed * flops_per_token(self.trainer.model.config, length, share)


def flops_per_token(config: Any, length: int, supervised: float) -> float:
    """Return the floating-point operations per token of a training step: the forward pass, and twice that backward.

        F = 6 (L (d (2 q + 2 k) + 3 d f) + s d V) + 6 L q n

    The model has L layers with hidden size d, query width q, key width k and gated MLPs of width f. Its vocabulary has
    V entries, and only the share s of supervised tokens needs logits. Causal attention over a sequence of n tokens sees
    n / 2 keys on average; each takes 2 q operations for the score and 2 q for the value, times three.
    """
    d, layers, size = config.hidden_size, config.num_hidden_layers, config.head_dim
    q, k = config.num_attention_heads * size, config.num_key_value_heads * size
    weights = layers * (d * (2 * q + 2 * k) + 3 * d * config.intermediate_size) + supervised * d * config.vocab_size
    return 6 * weights + 6 * layers * q * length


def peak_rss() -> int:
    """Return the peak resident memory of this process in bytes. (macOS reports bytes, Linux KiB.)"""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
