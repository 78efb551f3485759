"""Compare models: the same questions answered by each, side by side, with the preferred answer beside them.

    python inference.py --model base=local_runs/tiny/base --model sft=UUID --model dpo=UUID \\
        --dataset local_runs/tiny/questions --output_file comparison.csv

A SOURCE is one of

    google/gemma-2b       a hub id, or a folder
    UUID                  a checkpoint of a local run
    exp:12, trial:34      on the cluster that DET_MASTER names: the experiment's or trial's best checkpoint by the
                          searcher's metric; --exp_id 12 and --trial_id 34 are short for it
    ckpt:UUID             a checkpoint of that cluster

A model whose tokenizer has no chat template, as a base model's, is given the plain text of the question; the others are
prompted as they were trained. What comes from a cluster or a hub is kept, and downloaded once.
"""

import argparse
import gc
import time
from pathlib import Path

import pandas as pd
import torch
import transformers
import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chat_format import Message, decode_answer, encode, generation_stops, plain_text
from checkpoints import CLUSTER_SOURCES, cluster_checkpoint, local_checkpoint
from dataset_utils import load_dpo_dataset
from hyperparameters import DEFAULT_SPLIT_SEED, DataSource, convert
from models import check_source, load_model_and_tokenizer
from trial import hide_progress_bars_in_logs
from user_error import UserError, exit_on_user_error, one_line

console = Console(highlight=False)
DTYPES = ("float32", "bfloat16", "float16")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: list[Message]) -> list[int]:
    """What a model is fed for `prompt`: through the chat template it was trained with, or as plain text."""
    if tokenizer.chat_template is None:
        return tokenizer(plain_text(prompt))["input_ids"]
    return encode(tokenizer, prompt)[0]


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress,
    name: str,
) -> list[str]:
    """Greedy answers to `prompts`, in their order. Batches are left-padded and hold prompts of like lengths."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    longest_first = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    answers = [""] * len(prompts)
    tokens, started = 0, time.monotonic()
    task = progress.add_task(name, total=len(prompts), speed="")
    for start in range(0, len(ids), batch_size):
        indices = longest_first[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [ids[index] for index in indices]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        output = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            **generation_stops(model, tokenizer),
        )
        completions = output[:, batch["input_ids"].shape[1] :]
        for index, completion in zip(indices, completions.tolist(), strict=True):
            answers[index] = decode_answer(tokenizer, completion)
        tokens += int((completions != tokenizer.pad_token_id).sum())
        speed = f"{tokens / (time.monotonic() - started):.0f} tokens/s"
        progress.update(task, advance=len(indices), speed=speed)
    return answers


def print_comparison(table: pd.DataFrame) -> None:
    """Each question, and below it the answers in columns."""
    for number, row in enumerate(table.to_dict("records"), start=1):
        console.print(f"\n[bold]{number}. {escape(row.pop('question'))}[/bold]")
        answers = Table(box=box.SIMPLE, expand=True)
        for name in row:
            answers.add_column(escape(name), ratio=1, style="dim" if name == "preferred" else None)
        answers.add_row(*(escape(text) for text in row.values()))
        console.print(answers)


def parse_models(arguments: list[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for argument in arguments:
        name, separator, source = argument.partition("=")
        if not (separator and name and source):
            raise UserError(f"--model {argument!r} is not NAME=SOURCE")
        if name in models or name in ("question", "preferred"):
            raise UserError(f"--model {argument!r}: the name {name!r} is taken")
        models[name] = resolve_source(source, f"--model {name}")
    return models


def resolve_source(source: str, key: str) -> str:
    """A folder or hub id as it is; a checkpoint, of a local run or of a cluster, as the folder that holds its model."""
    if not Path(source).exists():
        if source.partition(":")[0] in CLUSTER_SOURCES and ":" in source:
            return str(cluster_checkpoint(source, key))
        if len(source) == 36 and source.count("-") == 4:  # looks like a UUID
            try:
                return str(local_checkpoint(source, key))
            except UserError as error:
                raise UserError(f"{error}; if it is on a cluster, give ckpt:{source}") from None
    check_source(source, key)
    return source


def parse_dataset(text: str) -> DataSource:
    if not text.startswith("{"):
        return DataSource(text)
    try:
        return convert(yaml.safe_load(text), DataSource, "--dataset")
    except yaml.YAMLError as error:
        raise UserError(f"--dataset {text!r}: {one_line(error)}") from error


def parse_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name!r}: not on this machine ({str(error).splitlines()[0][:80]})") from error
    return device


def parse_dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is None:
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if name not in DTYPES:
        raise UserError(f"--dtype {name!r} is none of {', '.join(DTYPES)}")
    return getattr(torch, name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME=SOURCE", action="append", help="repeatable")
    for kind in ("exp", "trial"):
        parser.add_argument(
            *(f"--{kind}_id", f"--{kind}-id"),
            metavar="N",
            dest="model",
            action="append",
            type=f"{kind}:{{0}}={kind}:{{0}}".format,
            help=f"the same as --model {kind}:N={kind}:N",
        )
    parser.add_argument(
        "--dataset",
        default="Intel/orca_dpo_pairs",
        help="preference data set whose held-out 20%% gives the questions, as dpo.yaml would name it: also"
        " '{name: ..., split: ..., columns: ...}' (default: %(default)s)",
    )
    parser.add_argument("--number-of-samples", type=int, default=10, help="how many questions (default: %(default)s)")
    parser.add_argument(
        "--data-seed",
        type=int,
        default=DEFAULT_SPLIT_SEED,
        help="training_args.data_seed of the DPO run, where it set one: it decides which rows are held out",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best at hand)")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)} (default: bfloat16 where CUDA has it, else float32)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="questions at a time (default: %(default)s)")
    parser.add_argument("--output_file", "--output-file", metavar="F.csv", help="also write the table there")
    args = parser.parse_args()
    if not args.model:
        parser.error("which models? Give --model NAME=SOURCE, --exp_id or --trial_id")
    return args


@exit_on_user_error
def main() -> None:
    args = parse_arguments()
    hide_progress_bars_in_logs()
    transformers.utils.logging.set_verbosity_error()  # a base model's sampling defaults do not matter to greedy answers
    for option in ("number_of_samples", "max_new_tokens", "batch_size"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)} is not at least 1")
    if args.output_file and not args.output_file.endswith(".csv"):
        raise UserError(f"--output_file {args.output_file}: its name must end in .csv")
    models, device = parse_models(args.model), parse_device(args.device)
    dtype = parse_dtype(args.dtype, device)
    held_out = load_dpo_dataset([parse_dataset(args.dataset)], args.data_seed)["test"]
    if args.number_of_samples > len(held_out):
        console.print(
            f"{args.dataset} holds {len(held_out)} rows out: fewer than the {args.number_of_samples} asked for"
        )
    rows = held_out.select(range(min(args.number_of_samples, len(held_out))))

    table = pd.DataFrame({"question": [plain_text(prompt) for prompt in rows["prompt"]]})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[speed]}"), console=console) as progress:
        for name, source in models.items():
            model, tokenizer = load_model_and_tokenizer(source, f"--model {name}", dtype=dtype)
            model.to(device).eval()
            table[name] = answer(model, tokenizer, rows["prompt"], args.max_new_tokens, args.batch_size, progress, name)
            del model  # one model in memory at a time
            gc.collect()
    table["preferred"] = rows["chosen"]

    print_comparison(table)
    if args.output_file:
        Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(args.output_file, index=False)
        console.print(f"Written to {args.output_file}")


if __name__ == "__main__":
    main()
