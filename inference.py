"""Which model wins? The same questions answered by each, numbers that need no judge, and a page to vote on blind.

    python inference.py --model base=local_runs/tiny/base --model sft=UUID --model dpo=UUID \\
        --dataset local_runs/tiny/questions --output_file comparison.html

A SOURCE is one of

    google/gemma-2b       a hub id, or a folder
    UUID                  a checkpoint of a local run
    exp:12, trial:34      on the cluster that DET_MASTER names: the experiment's or trial's best checkpoint by the
                          searcher's metric; --exp_id 12 and --trial_id 34 are short for it
    ckpt:UUID             a checkpoint of that cluster

Questions and preference pairs are rows that DPO held out. Models are loaded one at a time, and what comes from a
cluster or a hub is kept, and downloaded once. A model whose tokenizer has no chat template, as a base model's, is given
the plain text of the question; the others are prompted as they were trained. Interrupted, a comparison with an
--output_file goes on where it stopped when the same command is given again.

    python inference.py --model dpo=UUID --chat dpo

is a conversation with one of them.
"""

import argparse
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import torch
import transformers
import yaml
from datasets import Dataset
from rich.console import Console

from chat_format import Message
from comparison.chat import chat
from comparison.cluster_task import Task, open_task
from comparison.compared_model import Conditions, Contestant, Kept, load, show_progress
from comparison.files import RESERVED, Comparison, check_output, print_comparison, write_comparison
from comparison.generation import Sampling
from comparison.preference_metrics import RESAMPLES, PairScore, answer_metrics, preference_metrics
from config.hyperparameters import DEFAULT_SPLIT_SEED, DataSource
from config.validation import validate
from dataset_utils import load_dpo_dataset, load_prompts
from errors import UserError, exit_on_user_error, nearest, one_line
from storage.checkpoints import local_checkpoint
from storage.cluster_checkpoints import CLUSTER_SOURCES, cluster_checkpoint
from storage.locks import only_writer
from trial.context import TrialStopped, hide_progress_bars_in_logs
from trial.models import check_source

console = Console(highlight=False, emoji=False)
DTYPES = ("float32", "bfloat16", "float16")
# What dpo.yaml trains on, so that what it held out are the questions.
DATASETS = ("argilla/dpo-mix-7k", "jondurbin/truthy-dpo-v0.1")
# The first four rows that the published inference.py asks (it takes ten, and begins with the second row).
BLOG = DataSource("Intel/orca_dpo_pairs", split="train[1:5]")


def compare(
    args: argparse.Namespace, task: Task, models: dict[str, str], conditions: Conditions, kept: Kept
) -> Comparison:
    """Have every model answer the questions and score the pairs, one after the other, and set them side by side."""
    questions, preferred, pairs = read_questions(args)
    answers, scores, expected = {}, {}, len(models) * (len(questions) + len(pairs or []))

    def after_batch() -> None:
        task.progress(min(1.0, len(kept.results) / expected))
        task.stop_if_preempted()

    with show_progress(console) as progress:
        for name, source in models.items():
            known = len(kept.results)
            contestant = Contestant(name, source, conditions, kept, progress, after_batch)
            answers[name] = contestant.answers(questions)
            scores[name] = contestant.scores(pairs) if pairs is not None else []
            contestant.unload()
            if len(kept.results) > known:
                task.save(len(kept.results))

    # A pair that one model has no room for is left out for all: figures compare only over the same pairs.
    fair = [index for index in range(len(pairs or [])) if all(of[index] for of in scores.values())]
    scores = {name: [of[index] for index in fair] for name, of in scores.items()}
    figures = {}
    for name in models:
        reference = scores[args.reference] if name != args.reference else None
        figures[name] = preference_metrics(scores[name], reference, args.beta) if fair else {}
        figures[name] |= answer_metrics(answers[name])
    return Comparison(
        sources=args.model,
        questions=questions,
        preferred=preferred,
        answers=answers,
        figures=figures,
        reference=args.reference,
        settings=settings(args, conditions, len(questions), len(pairs or []), scores),
    )


def settings(
    args: argparse.Namespace, conditions: Conditions, questions: int, pairs: int, scores: dict[str, list[PairScore]]
) -> str:
    """How a comparison was made, for whoever reads it later."""
    sampling, (scored, *_) = conditions.sampling, map(len, scores.values())
    drawn = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, seed {sampling.seed}"
    told = [
        f"{questions} answer{'s' * (questions > 1)} of each model, at most {sampling.max_new_tokens} tokens long, "
        f"{'greedy' if sampling.greedy else drawn}; {args.dtype} on {conditions.device}"
    ]
    if pairs:
        sources = ", ".join(args.dataset or DATASETS)
        told.append(f"{scored} held-out pairs of {sources}; rewards with beta {args.beta:g}")
        if scored < pairs:
            told.append(f"{pairs - scored} pairs are left out: --max-length {args.max_length} leaves them no room")
        if cut := sum(any(score.cut for score in of) for of in zip(*scores.values(), strict=True)):
            told.append(f"{cut} of them cut to --max-length {args.max_length} or a model's context")
    told.append(f"Intervals: 95%, from {RESAMPLES:,} bootstrap samples")
    return ". ".join(told) + "."


def read_questions(args: argparse.Namespace) -> tuple[list[list[Message]], list[str | None], Dataset | None]:
    """The questions, their preferred answers where these are known, and the preference pairs to score, if any."""
    questions: list[list[Message]] = [[{"role": "user", "content": text}] for text in args.prompt]
    preferred: list[str | None] = [None] * len(questions)
    if args.prompts:
        rows = load_prompts(BLOG if args.prompts == "blog" else parse_source(args.prompts, "--prompts"))
        questions += rows["prompt"][:]
        preferred += rows["preferred"][:]
    if questions and not args.dataset:
        if args.number_of_pairs:
            raise UserError("--number-of-pairs: of which --dataset? With questions of your own there is no default")
        return questions, preferred, None
    sources = [parse_source(text, "--dataset") for text in args.dataset or DATASETS]
    # Shuffled, so that the first ones are of all sources.
    held_out = load_dpo_dataset(sources, args.data_seed)["test"].shuffle(seed=args.data_seed)

    def first(option: str, count: int | None, default: int) -> Dataset:
        if (count or 0) > len(held_out):
            console.print(f"{option} {count}: only {len(held_out)} rows are held out")
        return held_out.select(range(min(default if count is None else count, len(held_out))))

    pairs = first("--number-of-pairs", args.number_of_pairs, 100)
    if not questions:
        rows = first("--number-of-samples", args.number_of_samples, 10)
        questions, preferred = rows["prompt"][:], rows["chosen"][:]
    return questions, preferred, pairs if len(pairs) else None


def parse_models(arguments: list[str]) -> dict[str, str]:
    """The sources by name, as the user gave them."""
    models: dict[str, str] = {}
    for argument in arguments:
        name, separator, source = argument.partition("=")
        if not (separator and name and source):
            raise UserError(f"--model {argument!r} is not NAME=SOURCE")
        if name in models or name in RESERVED:
            raise UserError(f"--model {argument!r}: the name {name!r} is taken")
        models[name] = source
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


def parse_source(text: str, option: str) -> DataSource:
    if not text.startswith("{"):
        return DataSource(text)
    try:
        return validate(DataSource, yaml.safe_load(text), option)
    except yaml.YAMLError as error:
        raise UserError(f"{option} {text!r}: {one_line(error)}") from error


def parse_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name!r}: not on this machine ({str(error).splitlines()[0][:80]})") from error
    return device


def parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"--dtype {name!r} is none of {', '.join(DTYPES)}")
    return getattr(torch, name)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("models").add_argument
    add("--model", metavar="NAME=SOURCE", action="append", help="repeatable")
    for kind in ("exp", "trial"):
        add(
            *(f"--{kind}_id", f"--{kind}-id"),
            metavar="N",
            dest="model",
            action="append",
            type=f"{kind}:{{0}}={kind}:{{0}}".format,
            help=f"the same as --model {kind}:N={kind}:N",
        )
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best at hand)")
    add(
        "--dtype",
        default="float32",
        help=f"of the weights: {', '.join(DTYPES)} (default: %(default)s). DPO's changes to a weight are finer than"
        " bfloat16 can tell, which takes half the memory",
    )
    add(
        "--batch-size",
        type=int,
        default=8,
        help="questions or pairs at a time (default: %(default)s); in float32 no greedy answer depends on it",
    )

    add = parser.add_argument_group("questions").add_argument
    add(
        "--dataset",
        action="append",
        help="preference data set whose held-out 20%% gives the questions and the pairs, as dpo.yaml would name it:"
        f" also '{{name: ..., split: ..., columns: ...}}'; repeatable (default: dpo.yaml's, {' and '.join(DATASETS)})",
    )
    add("--number-of-samples", type=int, metavar="N", help="how many questions (default: 10)")
    add(
        "--data-seed",
        type=int,
        default=DEFAULT_SPLIT_SEED,
        help="training_args.data_seed of the DPO run, where it set one: it decides which rows are held out",
    )
    add(
        "--prompt",
        action="append",
        default=[],
        help="a question of your own, instead; repeatable. Pairs are then scored only of a --dataset that is named",
    )
    add(
        "--prompts",
        metavar="FILE",
        help="a file of them: .txt, one a line, or rows as of a data set; or 'blog', the first four that the published"
        " example asks (from the hub)",
    )

    add = parser.add_argument_group("answers").add_argument
    add("--max-new-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token (default: %(default)s)")
    add(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens with this share (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="of what is drawn; with the same --batch-size, the same (default: 0)")
    add("--chat", metavar="NAME", help="talk to this model in the terminal instead of comparing")

    add = parser.add_argument_group("numbers").add_argument
    add("--number-of-pairs", type=int, metavar="N", help="how many held-out pairs to score (default: 100; 0: none)")
    add(
        "--reference",
        metavar="NAME",
        help="the model that rewards are measured against: sft, for what DPO's training reports. One that is prompted"
        " in another way, as a base without a chat template, compares other tokens (default: base, or the first model)",
    )
    add("--beta", type=float, default=0.1, help="of the rewards: scales their margin (default: %(default)s)")
    add(
        "--max-length",
        type=int,
        default=4096,
        help="tokens of a pair; its prompt and its answers get half each, and are cut (default: %(default)s)",
    )

    parser.add_argument(
        *("--output_file", "--output-file"),
        metavar="FILE",
        action="append",
        default=[],
        help=".html: the page to vote on; .csv, .jsonl, .md: a row a question; .json: all, for a program; repeatable",
    )
    parser.error = _refuse
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        option = unknown[0].partition("=")[0]
        raise UserError(f"{option}: no such option{nearest(option, parser._option_string_actions)}")
    if not args.model:
        raise UserError("which models? Give --model NAME=SOURCE, --exp_id or --trial_id")
    return args


def _refuse(message: str) -> NoReturn:
    raise UserError(message)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what argparse lets through, before anything is loaded; `args.model` is sources by name from here on."""
    for option in ("number_of_samples", "max_new_tokens", "batch_size", "number_of_pairs", "max_length"):
        value, least = getattr(args, option), {"number_of_pairs": 0, "max_length": 2}.get(option, 1)
        if value is not None and value < least:
            raise UserError(f"--{option.replace('_', '-')} {value} is not at least {least}")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature:g} is no number from 0 on")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p:g} is not in (0, 1]")
    if args.top_p < 1 and not args.temperature:
        raise UserError(f"--top-p {args.top_p:g} has no effect without a --temperature above 0")
    if not 0 < args.beta < math.inf:
        raise UserError(f"--beta {args.beta:g} is no number above 0")
    args.model = parse_models(args.model)
    names = list(args.model)
    for option in ("chat", "reference"):
        name = getattr(args, option)
        if name is not None and name not in names:
            raise UserError(f"--{option} {name!r} is none of the models: {', '.join(names)}{nearest(name, names)}")
    ignored = ["--output_file", "--dataset", "--prompt", "--prompts", "--reference"]
    for option in [*ignored, "--number-of-samples", "--number-of-pairs"] if args.chat else []:
        if getattr(args, option[2:].replace("-", "_")):
            raise UserError(f"{option} has no effect with --chat")
    if args.reference is None:
        args.reference = "base" if "base" in names else names[0]
    for path in args.output_file:
        check_output(path)
    if "" in map(str.strip, args.prompt):
        raise UserError("--prompt is empty")
    if args.number_of_samples and (args.prompt or args.prompts):
        raise UserError("--number-of-samples has no effect on questions of your own: all are asked")


def run(args: argparse.Namespace, task: Task, conditions: Conditions, models: dict[str, str]) -> None:
    """Compare, and write what came out; what is done is kept meanwhile, beside the first file that is asked for."""
    outputs = [task.path(name) for name in args.output_file]
    unfinished = outputs[0].with_name(f"{outputs[0].name}.unfinished") if outputs else None
    if task.restored and unfinished and not unfinished.exists() and all(path.exists() for path in outputs):
        return  # all was done and saved before the restart
    with only_writer(unfinished) if unfinished else nullcontext():
        kept = Kept(unfinished)
        try:
            comparison = compare(args, task, models, conditions, kept)
        except TrialStopped:
            task.save(len(kept.results))
            return
        except KeyboardInterrupt:
            if unfinished and unfinished.exists():
                console.print(f"\n{unfinished} holds what was done: the same command goes on from it", soft_wrap=True)
            raise
        print_comparison(console, comparison)
        for path in outputs:
            write_comparison(comparison, path)
            opened = ": open it in a browser to vote" if path.suffix == ".html" else ""
            console.print(f"Written to {path}{opened}", soft_wrap=True)
        kept.remove()
        task.report(len(kept.results) + 1, comparison.metrics())
        task.save(len(kept.results) + 1)


@exit_on_user_error
def main() -> None:
    hide_progress_bars_in_logs()
    transformers.utils.logging.set_verbosity_error()  # a model's own sampling defaults do not matter here
    try:
        with open_task() as task:
            args = parse_arguments(task.arguments)
            check_arguments(args)
            sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
            device, dtype = parse_device(args.device), parse_dtype(args.dtype)
            conditions = Conditions(device, dtype, sampling, args.batch_size, args.max_length)
            if args.chat:
                source = resolve_source(args.model[args.chat], f"--model {args.chat}")
                torch.manual_seed(args.seed)
                chat(console, args.chat, *load(args.chat, source, conditions), sampling)
            else:
                models = {name: resolve_source(source, f"--model {name}") for name, source in args.model.items()}
                run(args, task, conditions, models)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
