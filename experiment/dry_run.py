"""What an experiment will learn from, for how long and in how much memory: told before anything is trained.

    python local_experiment.py sft.yaml --dry-run
    python local_experiment.py dpo.yaml --dry-run --output dpo.html

It goes the way of a training through the same functions, up to the trainer, with a model that has shapes and no
weights: of a model on the hub it downloads the config and the tokenizer. Trials of a grid that prepare their data alike
are told together.
"""

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from rich import box
from rich.console import Console
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import pack_dataset

from chat_format import IM_END, IM_START, Message, encode, set_chat_format
from config.experiment import expand_trials
from config.hyperparameters import DataSource, DPOHyperparameters, SFTHyperparameters
from data.truncation import SHARE_TO_WARN, Truncation, rows_by_truncation
from dataset_utils import load_dpo_dataset, load_sft_dataset, tokenize_dpo_dataset, tokenize_sft_dataset
from errors import UserError
from experiment.results import Experiment, short_name
from pages.render import render_page
from pages.terminal import visible
from speed.hardware import cheap_to_recompute, free_memory, wants_checkpointing
from speed.memory import MemoryEstimate, computed_lengths, estimate_memory, largest_batches, resident
from speed.padding_free import why_padded
from storage.checkpoints import local_checkpoint
from storage.files import write_atomically
from trial.models import load_model_and_tokenizer

PERCENTILES = (5, 50, 95, 99, 100)
TERMINAL_TOKENS = (160, 60)  # of an example: so many of its first tokens, and of its last
PAGE_TOKENS = (1200, 300)
LEGEND = (
    "As it is trained on. What is coloured (in a terminal also: in ⟦brackets⟧) is learned: its log-prob is in the loss."
)
CHECKED_PROMPTS = 200  # this many are rendered once more, the way a server does
GIGABYTE = 1e9
CHECKPOINTED = ", activation checkpointing"


class Table(NamedTuple):
    title: str
    columns: list[str]  # the first holds text, the others numbers; one that ends with a space holds text, too
    rows: list[list[str]]
    note: str = ""


class Token(NamedTuple):
    id: int
    text: str  # with what cannot be seen made visible
    learned: bool  # supervised: its log-prob is in the loss
    special: bool


class Example(NamedTuple):
    """A row as it is trained on, or a side of a pair."""

    title: str
    tokens: list[Token]

    def ends(self, first: int, last: int) -> tuple[list[Token], int, list[Token]]:
        """Its first and its last tokens, and how many are left out between them."""
        left_out = max(0, len(self.tokens) - first - last)
        return (self.tokens[:first], left_out, self.tokens[-last:]) if left_out else (self.tokens, 0, [])


Section = Table | Example


@dataclass
class Preparation:
    """The data as some trials are trained on it, and the model without its weights."""

    trial_ids: list[int]
    hparams: SFTHyperparameters | DPOHyperparameters  # of the first of these trials
    found: list[tuple[DataSource, int | None, int]]  # of each source: its rows (None: streamed), and those taken
    rows: DatasetDict  # the conversations
    tokenized: DatasetDict  # each row of `rows`, dropped ones too
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def in_pairs(self) -> bool:
        return isinstance(self.hparams, DPOHyperparameters)

    @functools.cached_property
    def all(self) -> Dataset:
        return concatenate_datasets(list(self.tokenized.values()))

    @functools.cached_property
    def kept(self) -> DatasetDict:
        """The rows that are trained on and held out."""
        parts = {}
        for part, rows in self.tokenized.items():
            found = rows["truncations"][:]
            parts[part] = rows.select(
                [n for n, names in enumerate(found) if not any(Truncation(name).drops_row for name in names)]
            )
        return DatasetDict(parts)

    @functools.cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of each kept row's sequences, by part: (rows, 1) for SFT, (rows, 2) for DPO. Packed, of each pack."""
        lengths = {}
        for part, rows in self.kept.items():
            args = self.hparams.args
            if not self.in_pairs and args.packing and (part == "train" or args.eval_packing is not False):
                rows = pack_dataset(
                    rows.select_columns(["input_ids", "labels"]), args.max_length, args.packing_strategy
                )
            lengths[part] = computed_lengths(rows, self.in_pairs, padding_free=False)
        return lengths

    @property
    def padding_free(self) -> bool:
        return why_padded(self.model, self.hparams.args) is None

    @functools.cached_property
    def marker_facts(self) -> dict[str, str]:
        """How turns begin and end, and whether a server will prompt the model as it was trained."""
        tokenizer, rows = self.tokenizer, self.rows["train"]
        sizes = {marker: len(tokenizer(marker, add_special_tokens=False)["input_ids"]) for marker in (IM_START, IM_END)}
        spelled = [f"{marker} is {counted(size, 'token')}" for marker, size in sizes.items()]
        prompts = [prompt_of(rows[n], self.in_pairs) for n in range(min(len(rows), CHECKED_PROMPTS))]
        alike = sum(
            encode(tokenizer, prompt)[0]
            == tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
            for prompt in prompts
        )
        return {
            "turn markers": ", ".join([*spelled, f"EOS is {tokenizer.eos_token}"]),
            "prompts that a server renders alike": f"{alike} of {len(prompts)} tried",
        }


def dry_run(
    experiment: Experiment, trials: list[SFTHyperparameters] | list[DPOHyperparameters], examples: int
) -> Iterator[Section]:
    """All there is to tell of an experiment, in order. Raises `UserError` where its training would."""
    preparations, process = [], 0
    for preparation in prepare(trials):
        preparations.append(preparation)
        process = process or resident()  # with the data of one trial
        which = "" if len(preparation.trial_ids) == len(trials) else f", trials {listed(preparation.trial_ids)}"
        yield sources_table(preparation, which)
        yield losses_table(preparation, which)
        yield lengths_table(preparation, which)
        if examples:
            yield Table(f"Token by token{which}", [], [], LEGEND)
            yield from first_examples(preparation, examples)
        for part, rows in preparation.kept.items():
            if not len(rows):
                what = next(what for what in rows_by_truncation(preparation.tokenized[part]) if what.drops_row)
                raise UserError(f"{what.limit} is too small: no {part} row is left ({what.meaning})")
    yield from training_tables(experiment, preparations, trials)
    yield memory_table(experiment, preparations, trials, process)


def prepare(trials: list[SFTHyperparameters] | list[DPOHyperparameters]) -> Iterator[Preparation]:
    """Load and tokenize what the trials ask for, once for those that ask for the same."""
    alike: dict[str, list[int]] = {}
    for trial_id, hparams in enumerate(trials, start=1):
        data = (hparams.sources, hparams.split_seed, getattr(hparams, "streaming", False), hparams.tokenizing)
        model = (start_of(hparams), hparams.model_init_kwargs, hparams.added_tokens)
        names = ("packing", "packing_strategy", "eval_packing", "max_length")
        packing = [getattr(hparams.args, name, None) for name in names]
        alike.setdefault(str((data, model, packing)), []).append(trial_id)
    for trial_ids in alike.values():
        hparams = trials[trial_ids[0] - 1]
        found: list[tuple[DataSource, int | None, int]] = []

        def on_source(*told: Any, found: list = found) -> None:
            found.append(told)

        if isinstance(hparams, SFTHyperparameters):
            rows = load_sft_dataset(hparams.sources, hparams.split_seed, hparams.streaming, on_source)
            tokenize: Callable[..., DatasetDict] = tokenize_sft_dataset
        else:
            rows = load_dpo_dataset(hparams.sources, hparams.split_seed, on_source)
            tokenize = tokenize_dpo_dataset
        model, tokenizer = load_model_and_tokenizer(start_of(hparams), weights=False, **hparams.model_init_kwargs)
        set_chat_format(model, tokenizer, hparams.added_tokens)
        options = {"num_proc": hparams.args.dataset_num_proc, "every_row": True, **hparams.tokenizing}
        tokenized = tokenize(rows, tokenizer, **options)
        yield Preparation(trial_ids, hparams, found, rows, tokenized, model, tokenizer)


def start_of(hparams: SFTHyperparameters | DPOHyperparameters) -> str:
    """The folder or the hub id of the model that is trained."""
    checkpoint = getattr(hparams, "model_ckpt", None)
    return str(local_checkpoint(checkpoint, "model_ckpt")) if checkpoint else hparams.model_name


def sources_table(preparation: Preparation, which: str) -> Table:
    parts = {part: Counter(rows["source"][:]) for part, rows in preparation.kept.items()}
    dropped: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    for source, names in zip(preparation.all["source"][:], preparation.all["truncations"][:], strict=True):
        reasons = [Truncation(name) for name in names]
        drops = any(what.drops_row for what in reasons)
        dropped[source] += drops
        cut[source] += not drops and any(what.cuts_row for what in reasons)
    rows = []
    for source, found, taken in preparation.found:
        asked = f"{100 * source.ratio:g}%" if source.ratio is not None else "all"
        asked = f"{source.number_of_samples:,}" if source.number_of_samples else asked
        counts = [
            taken,
            dropped[str(source)],
            cut[str(source)],
            *(parts[part][str(source)] for part in ("train", "test")),
        ]
        rows.append([str(source), asked, "streamed" if found is None else f"{found:,}", *(f"{n:,}" for n in counts)])
    if len(rows) > 1:
        totals = [sum(int(row[column].replace(",", "")) for row in rows) for column in range(3, 8)]
        rows.append(["together", "", "", *(f"{total:,}" for total in totals)])
    columns = ["source", "asked", "found", "taken", "dropped", "cut", "train", "held out"]
    return Table(f"Rows{which}", columns, rows)


def losses_table(preparation: Preparation, which: str) -> Table:
    """What rows lose, with the first of them."""
    rows = concatenate_datasets(list(preparation.rows.values()))
    losers = rows_by_truncation(preparation.all)
    told, raised = [], []
    for what in sorted(losers, key=lambda what: (not what.drops_row, -len(losers[what]))):
        first, share = rows[losers[what][0]], len(losers[what]) / len(rows)
        turns = prompt_of(first, preparation.in_pairs)
        fate = "dropped: " if what.drops_row else "cut: " if what.cuts_row else ""
        example = f"{first['source']} row {first['row']}: {shortened(turns[-1]['content'], 60)}"
        told.append([fate + what.meaning, f"{len(losers[what]):,}", f"{share:.1%}", example])
        if what.limit and share > SHARE_TO_WARN:
            raised.append(f"{share:.0%} of the rows are {fate.removesuffix(': ')}: raise {what.limit}.")
    note = " ".join(raised) if told else "No row is cut or dropped, and every answer says something."
    return Table(f"What rows lose{which}", ["", "rows", "share", "the first of them "], told, note)


def lengths_table(preparation: Preparation, which: str) -> Table:
    limits = preparation.hparams.tokenizing
    if preparation.in_pairs:
        answer = limits["max_target_length"]
        bounds = {"prompt": limits["max_prompt_length"], "chosen": answer, "rejected": answer}
    else:
        bounds = {"prompt": None, "completion": None}
    bounds["total"] = limits["max_length"]
    rows = []
    for name, limit in bounds.items():
        lengths = np.array(preparation.all[f"{name}_length"][:])
        over = "" if limit is None else f"{(lengths > limit).sum():,} ({(lengths > limit).mean():.1%})"
        percentiles = [f"{np.percentile(lengths, p, method='nearest'):,}" for p in PERCENTILES]
        rows.append([name, *percentiles, "" if limit is None else f"{limit:,}", over])
    titles = [f"p{p}" if p < 100 else "longest" for p in PERCENTILES]
    sft = "A prompt is all that is not the assistant's."
    note = "A pair's total is its prompt and the longer answer." if preparation.in_pairs else sft
    note += " p95: 95 rows of a hundred are no longer."
    return Table(f"Tokens a row, before any is cut{which}", ["", *titles, "limit", "over it"], rows, note)


def first_examples(preparation: Preparation, count: int) -> Iterator[Example]:
    """The first rows of each source that are trained on, the pairs as two."""
    rows = preparation.kept["train"]
    places = sorted(zip(rows["source"][:], rows["row"][:], range(len(rows)), strict=True))
    order = {str(source): position for position, (source, _, _) in enumerate(preparation.found)}
    shown: Counter[str] = Counter()
    for source, number, index in sorted(places, key=lambda place: order[place[0]]):
        shown[source] += 1
        if shown[source] > count:
            continue
        row, title = rows[index], f"{source} row {number}"
        if preparation.in_pairs:
            for side in ("chosen", "rejected"):
                ids = row["prompt_ids"] + row[f"{side}_ids"]
                learned = [False] * len(row["prompt_ids"]) + [True] * len(row[f"{side}_ids"])
                yield Example(f"{title}, {side}", show_tokens(preparation.tokenizer, ids, learned))
        else:
            learned = [label != -100 for label in row["labels"]]
            yield Example(title, show_tokens(preparation.tokenizer, row["input_ids"], learned))


def show_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], learned: list[bool]) -> list[Token]:
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    tokens = []
    for token_id, raw, is_learned in zip(ids, tokenizer.convert_ids_to_tokens(ids), learned, strict=True):
        text = tokenizer.decode([token_id])
        if not text or "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character
            text = raw
        elif raw[0] in "▁Ġ" and text[0] != " ":  # some decoders strip what they think opens the text
            text = " " + text
        tokens.append(Token(token_id, visible(text), is_learned, token_id in special))
    return tokens


def training_tables(
    experiment: Experiment, preparations: list[Preparation], trials: list[SFTHyperparameters] | list[DPOHyperparameters]
) -> list[Table]:
    """What a trial goes through: what all have in common in one table, where they differ in another."""
    facts: dict[int, dict[str, str]] = {}
    for preparation in preparations:
        for trial_id in preparation.trial_ids:
            facts[trial_id] = trial_facts(experiment, preparation, trials[trial_id - 1])
    names = list(dict.fromkeys(name for fact in facts.values() for name in fact))
    common = [name for name in names if len({fact.get(name) for fact in facts.values()}) == 1]
    tables = []
    if len(facts) > 1:
        searched = [short_name(name) for name in experiment.varying]
        differing = [name for name in names if name not in common]
        planned = expand_trials(experiment.config)
        rows = [
            [
                str(n),
                *(experiment.value(planned[n - 1], name) for name in experiment.varying),
                *(fact.get(name, "") for name in differing),
            ]
            for n, fact in sorted(facts.items())
        ]
        tables.append(Table(f"The {len(facts)} trials", ["trial", *searched, *differing], rows))
    title = "Training" if len(facts) == 1 else "Training, every trial"
    return [*tables, Table(title, ["", " "], [[name, facts[1][name]] for name in common])]


def trial_facts(
    experiment: Experiment, preparation: Preparation, hparams: SFTHyperparameters | DPOHyperparameters
) -> dict[str, str]:
    args, slots, lengths = hparams.args, slots_of(experiment), preparation.lengths["train"]
    batch, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    unit = "pairs" if preparation.in_pairs else "packs of rows" if args.packing else "rows"
    times = f"{batch} a batch, {accumulated} batches" + (f", {slots} slots" if slots > 1 else "")
    epoch, total = steps(args, len(lengths), slots)
    told = {"model": f"{start_of(hparams)}, {count_parameters(preparation.model):,} parameters"}
    if isinstance(hparams, DPOHyperparameters) and not hparams.model_ckpt:
        told["with a model_ckpt"] = "the SFT model's tokens take the place of this one's: lengths and cuts may differ"
    told |= preparation.marker_facts
    told[f"{unit} a step"] = f"{batch * accumulated * slots:,}" + (f" ({times})" if accumulated * slots > 1 else "")
    told["steps"] = f"{total:,} ({epoch:,} an epoch)"
    if slots > 1:
        told["steps with the one process of this machine"] = f"{steps(args, len(lengths), 1)[1]:,}"
    tokens, learned = int(lengths.sum()), sum(preparation.kept["train"]["learned"][:])
    told["tokens an epoch"] = f"{tokens:,}, of which learned {learned:,} ({learned / tokens:.1%})"
    told["padding"] = f"{padding(lengths, args):.1%} of the positions in a batch"
    if preparation.padding_free and not getattr(args, "packing", False):
        told["padding"] += " as padded; not computed"
        if preparation.in_pairs:
            computed = computed_lengths(preparation.kept["train"], pairs=True, padding_free=True)
            told["prompts of pairs"] = f"computed once: {1 - computed.sum() / tokens:.1%} of the tokens spared"
    return told


def prompt_of(row: dict[str, Any], in_pairs: bool) -> list[Message]:
    return row["prompt"] if in_pairs else row["messages"][:-1]


def slots_of(experiment: Experiment) -> int:
    return max(1, (experiment.config.get("resources") or {}).get("slots_per_trial", 1))


def steps(args: Any, sequences: int, devices: int) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the training: as transformers' Trainer counts them."""
    whole = math.floor if args.dataloader_drop_last else math.ceil
    batches = whole(sequences / (args.per_device_train_batch_size * devices))
    epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)


def padding(lengths: np.ndarray, args: Any) -> float:
    """The share of padding in batches of rows in random order; `lengths` (rows, sequences of a row), in tokens."""
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        return 0.0
    order, batch = np.random.default_rng(args.seed).permutation(len(lengths)), args.per_device_train_batch_size
    multiple = args.pad_to_multiple_of or 1
    positions = 0
    for start in range(0, len(order), batch):
        rows = lengths[order[start : start + batch]]
        positions += rows.size * math.ceil(rows.max() / multiple) * multiple
    return 1 - lengths.sum() / positions


def memory_table(
    experiment: Experiment,
    preparations: list[Preparation],
    trials: list[SFTHyperparameters] | list[DPOHyperparameters],
    process: int,
) -> Table:
    """A row for each way of training that the trials take, on this machine and on a slot with a GPU."""
    held = ("weights", "gradients", "optimizer", "activations", "process", "total")
    rows: dict[tuple[str, ...], list[int]] = {}
    for preparation in preparations:
        for trial_id in preparation.trial_ids:
            for where, estimate in estimates(experiment, preparation, trials[trial_id - 1], process):
                told = (where, *(in_gigabytes(getattr(estimate, name)) for name in held))
                rows.setdefault(told, []).append(trial_id)
    named = [
        [where if len(ids) == len(trials) else f"{where}: trial {listed(ids)}", *sizes]
        for (where, *sizes), ids in rows.items()
    ]
    note = "With a batch of the longest rows; on a GPU, CUDA's own half a gigabyte comes on top. How: memory.py."
    return Table("Memory at its peak, estimated, in GB", ["", *held], named, note)


def estimates(
    experiment: Experiment,
    preparation: Preparation,
    hparams: SFTHyperparameters | DPOHyperparameters,
    process: int,
) -> Iterator[tuple[str, MemoryEstimate]]:
    """For the one process of this machine, and for the experiment's slots as GPUs."""
    args, slots, given = copy.copy(hparams.args), slots_of(experiment), hparams.training_args
    model, left_open = preparation.model, hparams.checkpointing is None
    shapes = largest_batches(args, preparation.kept, preparation.in_pairs, preparation.padding_free)
    estimate = functools.partial(estimate_memory, model, args, *shapes, process=process)

    here = "cuda" if torch.cuda.is_available() else "cpu"
    told = f"{here.upper()} here"
    if left_open:
        args.activation_checkpointing = False
        needed = estimate(devices=1, device_type=here).total
        args.activation_checkpointing, _ = wants_checkpointing(model, needed, free_memory(here))
        told += CHECKPOINTED if args.activation_checkpointing else ""
    yield told, estimate(devices=1, device_type=here)

    # `args` are of this machine: on a GPU there would be bf16, and on several FSDP.
    args.bf16 = given.get("bf16", not args.fp16)
    args.fsdp = given.get("fsdp") if slots > 1 else None
    where = f"each of {slots} GPUs" if slots > 1 else "a GPU"
    where += f", {'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'}{', FSDP' if args.fsdp else ''}"
    if not left_open:
        yield where, estimate(devices=slots, device_type="cuda")
        return
    # Its memory decides, unless the model does.
    for checkpointed in [True] if cheap_to_recompute(model) else [False, True]:
        args.activation_checkpointing = checkpointed
        yield where + (CHECKPOINTED if checkpointed else ""), estimate(devices=slots, device_type="cuda")


def in_gigabytes(size: int) -> str:
    return f"{size / GIGABYTE:.2f}" if size else ""


def count_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def listed(trial_ids: list[int]) -> str:
    return ", ".join(map(str, trial_ids))


def counted(count: int, unit: str) -> str:
    return f"{count:,} {unit}" + ("" if count == 1 else "s")


def shortened(text: str, length: int) -> str:
    text = " ".join(visible(text).split())
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def show(section: Section, console: Console) -> None:
    """Print it: a table, or an example with a dot between two tokens and what is learned in brackets."""
    console.print()
    if isinstance(section, Example):
        console.print(Rule(Text(section.title), align="left", style="dim"))
        console.print(tokens_text(section))
        return
    console.print(Text(section.title, style="bold"))
    if section.rows:
        table = RichTable(box=box.SIMPLE_HEAD, show_header=any(column.strip() for column in section.columns))
        for number, column in enumerate(section.columns):
            text = number == 0 or column.endswith(" ")
            table.add_column(column.strip(), justify="left" if text else "right", overflow="fold", no_wrap=not text)
        for row in section.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    if section.note:
        console.print(Text(section.note, style="dim"))


def tokens_text(example: Example) -> Text:
    first, left_out, last = example.ends(*TERMINAL_TOKENS)
    text, learns = Text(), False
    for number, token in enumerate([*first, None, *last] if left_out else first):
        if token is None:
            text.append(f" … {left_out:,} tokens … ", "italic")
            continue
        if token.learned != learns:
            text.append("⟦" if token.learned else "⟧")
            learns = token.learned
        elif number and not text.plain.endswith("\n"):
            text.append("·", "dim")
        style = ("green" if token.learned else "") + (" reverse" if token.special else "")
        text.append(token.text.replace("\n", "⏎\n"), style.strip())
    text.append("⟧" if learns else "")
    return text


def write(sections: list[Section], name: str, output: Path) -> Path:
    """The same as a page; a folder gets it as `dry_run.html`."""
    page = output if output.suffix == ".html" else output / "dry_run.html"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            page,
            render_page(Path(__file__).with_name("dry_run.html.jinja"), name, sections=sections, shown=PAGE_TOKENS),
        )
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from error
    return page
