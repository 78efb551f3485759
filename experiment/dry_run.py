"""Show what an experiment will train on, for how long and in how much memory, before anything is trained.

    python local_experiment.py sft.yaml --dry-run
    python local_experiment.py dpo.yaml --dry-run --output dpo.html

A dry run calls the functions that a training calls, up to the trainer, with a model that has shapes and no weights. It
downloads only the config and the tokenizer of a model on the hub. Trials of a grid that use the same data share their
sections. dry_run_output.py shows them.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from datasets import concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import pack_dataset

from adapters.stack import base_model
from chat_format import IM_END, IM_START, encode
from config.search import describe_search
from data.splitting import SourceCounts, prompt_key, row_prompt
from data.truncation import SHARE_TO_WARN, Truncation, rows_by_truncation
from errors import one_line
from experiment.container_paths import ContainerPaths
from experiment.dry_run_checks import find_unseen, tabulate_checks
from experiment.dry_run_memory import describe_parameters, estimate_trial, model_in, name_trials, tabulate_memory
from experiment.dry_run_output import Example, Section, Table, Token
from experiment.kinds import Hyperparameters, TrainingKind
from experiment.results import Experiment, short_name
from experiment.starting_points import StartingModel, starting_model
from pages.terminal import plural, visible
from speed.fitting import resident_memory
from speed.memory import computed_lengths
from speed.padding_free import why_padded

PERCENTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "longest": 1.0}
LENGTH_LIMITS = {  # the YAML's key for each length of a row
    **{"prompt": "max_prompt_length", "completion": ""},
    **{"chosen": "max_target_length", "rejected": "max_target_length", "total": "max_length"},
}
LEGEND = "Coloured tokens (on a terminal also in ⟦brackets⟧) are supervised: their log-probs are in the loss."
CHECKED_PROMPTS = 200  # the first ones of the training data are rendered a second time, as a server does


class TrainingData:
    """The data that some trials are trained on, and their model without its weights.

    `hparams` are those of the first of these trials; `sources` say how many rows of each were found, used and left out.
    `conversations` are the rows to train on, then those held out, and `tokenized` are the same, dropped rows included.
    `rows` has a line for each: its part, source, lengths and truncations, and whether these drop it or only cut it.
    `remaining_rows` has the tokenized rows of each part that are not dropped.
    """

    def __init__(self, kind: TrainingKind, hparams: Hyperparameters, start: StartingModel) -> None:
        self.kind, self.hparams, self.start = kind, hparams, start
        self.sources: list[SourceCounts] = []
        parts = kind.load(**hparams.load_options, on_source=self.sources.append)
        model, self.tokenizer = start.load(hparams)
        self.model = base_model(model)
        self._models: dict[Any, PreTrainedModel] = {(str(hparams.lora), None): self.model}
        num_proc = hparams.args.dataset_num_proc
        tokenized = kind.tokenize(parts, self.tokenizer, num_proc, every_row=True, **hparams.tokenize_options)
        self.conversations, self.tokenized = (concatenate_datasets(list(each.values())) for each in (parts, tokenized))
        ids = [name for name in self.tokenized.column_names if name.endswith("ids") or name == "labels"]
        self.rows = rows = self.tokenized.remove_columns(ids).to_pandas()
        rows["part"] = np.repeat(list(parts), [len(each) for each in parts.values()])
        rows["truncations"] = [[Truncation(name) for name in names] for names in rows["truncations"]]
        rows["dropped"] = [any(truncation.drops_row for truncation in found) for found in rows["truncations"]]
        rows["cut"] = [any(truncation.cuts_row for truncation in found) for found in rows["truncations"]]
        rows["cut"] &= ~rows["dropped"]
        kept = {part: (rows["part"] == part) & ~rows["dropped"] for part in ("train", "test")}
        self.remaining_rows = {part: self.tokenized.select(np.flatnonzero(mask)) for part, mask in kept.items()}

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of the sequences to train on: (rows, 1) for SFT, (packs, 1) if packed, (rows, 2) for DPO."""
        rows, args = self.remaining_rows["train"], cast(Any, self.hparams.args)
        if self.hparams.packing:
            rows = pack_dataset(rows.select_columns(["input_ids", "labels"]), args.max_length, args.packing_strategy)
        return computed_lengths(rows, self.kind.pairs, padding_free=False)

    def model_of(self, hparams: Hyperparameters, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Return the model with a trial's adapter in its layers, its frozen weights in `dtype` instead of their own."""
        key = (str(hparams.lora), dtype)
        if key not in self._models:
            of_trial = self.model_of(hparams) if dtype else base_model(self.start.load(hparams)[0])
            self._models[key] = model_in(of_trial, dtype) if dtype else of_trial
        return self._models[key]

    @property
    def padding_free(self) -> bool:
        """Whether a training computes no padding."""
        return why_padded(self.model, self.hparams.args) is None

    @functools.cached_property
    def chat_facts(self) -> dict[str, str]:
        """How turns begin and end, and whether a server will prompt the model as it was trained."""
        tokenizer = self.tokenizer
        sizes = {marker: len(tokenizer(marker, add_special_tokens=False)["input_ids"]) for marker in (IM_START, IM_END)}
        spelled = [f"{marker} is {plural(size, 'token')}" for marker, size in sizes.items()]
        train = np.flatnonzero(self.rows["part"] == "train")[:CHECKED_PROMPTS]
        prompts = [row_prompt(row) for row in self.conversations.select(train)]
        same = sum(
            encode(tokenizer, prompt)[0]
            == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            for prompt in prompts
        )
        return {
            "turn markers": ", ".join([*spelled, f"EOS is {tokenizer.eos_token}"]),
            "prompts that the chat template alone renders the same": f"{same} of {len(prompts)} checked",
        }


def dry_run(
    experiment: Experiment, trials: Sequence[Hyperparameters], examples: int, remarks: Sequence[str] = ()
) -> Iterator[Section]:
    """Yield the sections in order, with `examples` rows of each source, after `remarks` on what they are of.

    Raises `UserError` where a training would. Of data or a model that only containers see, it checks what it can.
    """
    assert experiment.kind, "the caller has parsed the trials by their kind"
    slots = max(1, (experiment.config.get("resources") or {}).get("slots_per_trial", 1))
    for hparams in trials:
        hparams.check_sharding(slots)
    process, facts, memory, paths = 0, {}, [], ContainerPaths(experiment.config)
    if remarks:
        yield Table("On this machine", pd.DataFrame({" ": remarks}))
    for trial_ids in group_trials(trials, paths):
        hparams = trials[trial_ids[0] - 1]
        start = starting_model(hparams, paths)
        which = "" if len(trial_ids) == len(trials) else f", {name_trials(trial_ids)}"
        if unseen := find_unseen(hparams, start, paths):
            yield tabulate_checks(experiment.kind, hparams, start, unseen, which)
            continue
        data = TrainingData(experiment.kind, hparams, start)
        process = process or resident_memory()  # with the data of one trial
        yield tabulate_sources(data, which)
        yield tabulate_truncations(data, which)
        yield tabulate_lengths(data, which)
        if examples:
            yield Table(f"Token by token{which}", pd.DataFrame(), LEGEND)
            yield from show_examples(data, examples)
        for part, rows in data.remaining_rows.items():
            if not len(rows):
                found = data.rows["truncations"][data.rows["part"] == part]
                raise next(each for truncations in found for each in truncations if each.drops_row).no_row_left(part)
        for trial_id in trial_ids:
            facts[trial_id] = collect_facts(data, trials[trial_id - 1], slots)
            memory += [(*line, trial_id) for line in estimate_trial(data, trials[trial_id - 1], slots, process)]
    if facts:
        yield from tabulate_training(experiment, facts)
        yield tabulate_memory(memory, len(trials))


def group_trials(trials: Sequence[Hyperparameters], paths: ContainerPaths) -> list[list[int]]:
    """Return the ids of the trials, those together that use the same data and the same model."""
    groups: dict[str, list[int]] = {}
    for trial_id, hparams in enumerate(trials, start=1):
        args = cast(Any, hparams.args)
        packing = (args.packing_strategy, args.max_length) if hparams.packing else None
        model = (starting_model(hparams, paths), hparams.model_init_kwargs)
        groups.setdefault(str((hparams.load_options, hparams.tokenize_options, packing, model)), []).append(trial_id)
    return list(groups.values())


def tabulate_sources(data: TrainingData, which: str) -> Table:
    """Return how many rows of each source are found, used, dropped, cut, trained on and held out."""
    rows, kept = data.rows, ~data.rows["dropped"]
    parts = {"train": kept & (rows["part"] == "train"), "held out": kept & (rows["part"] == "test")}
    counts = rows[["dropped", "cut"]].assign(**parts).groupby(rows["source"]).sum()
    lines = []
    for source, found, used, repeated, elsewhere in data.sources:
        share = "all" if source.ratio is None else f"{100 * source.ratio:g}%"
        requested = f"{source.number_of_samples:,}" if source.number_of_samples else share
        shown = "streamed" if found is None else f"{found:,}"
        lines.append([str(source), requested, shown, repeated + elsewhere, used])
    table = pd.DataFrame(lines, columns=["source", "requested", "found", "repeated", "used"]).join(counts, on="source")
    table = table.fillna(0).astype(dict.fromkeys(counts, int))  # of a source of which no row is used
    if len(table) > 1:
        total = {"source": "total", "requested": "", "found": "", **table.loc[:, "repeated":].sum()}
        table = pd.concat([table, pd.DataFrame([total])])
    return Table(f"Rows{which}", table, describe_prompts(data))


def describe_prompts(data: TrainingData) -> str:
    """Say how many rows share a prompt, and how many rows of different sources are the same."""
    keys = [prompt_key(row_prompt(row)) for row in data.conversations]
    rows_of, parts_of = Counter(keys), defaultdict(set)
    for key, part in zip(keys, data.rows["part"], strict=True):
        parts_of[key].add(part)
    said = [f"{len(keys):,} rows have {plural(len(rows_of), 'prompt')}"]
    if sharing := sum(count for count in rows_of.values() if count > 1):
        said.append(f"{sharing:,} of them share theirs with another row")
    if both := sum(len(parts) > 1 for parts in parts_of.values()):
        said.append(f"{plural(both, 'prompt')} of the evaluation data {'is' if both == 1 else 'are'} trained on, too")
    elif sharing:
        said.append("each prompt is either trained on or held out")
    if elsewhere := sum(source.elsewhere for source in data.sources):
        said.append(f"{plural(elsewhere, 'row')} of different sources are the same, and count once")
    return "; ".join(said) + "."


def tabulate_truncations(data: TrainingData, which: str) -> Table:
    """Return what the length limits take from how many rows, with the first of them."""
    found = rows_by_truncation(data.tokenized)
    lines, advice = [], []
    for truncation in sorted(found, key=lambda truncation: (not truncation.drops_row, -len(found[truncation]))):
        first, share = data.conversations[found[truncation][0]], len(found[truncation]) / len(data.rows)
        text = one_line(visible(row_prompt(first)[-1]["content"]))
        text = text if len(text) <= 60 else text[:59] + "\N{HORIZONTAL ELLIPSIS}"
        example = f"{first['source']} row {first['row']}: {text}"
        meaning = f"{truncation.effect}: {truncation.meaning}" if truncation.effect else truncation.meaning
        lines.append([meaning, len(found[truncation]), f"{share:.1%}", example])
        if truncation.limit and share > SHARE_TO_WARN:
            advice.append(f"{share:.0%} of the rows are {truncation.effect}: raise {truncation.limit}.")
    note = " ".join(advice) if lines else "No row is cut or dropped, and every answer has text."
    table = pd.DataFrame(lines, columns=["", "rows", "share", "first example"])
    return Table(f"Truncated rows{which}", table, note, text_columns=["first example"])


def tabulate_lengths(data: TrainingData, which: str) -> Table:
    """Return percentiles of the rows' lengths, and how many are over the limits."""
    limits, columns = data.hparams.tokenize_options, data.rows.columns
    bounds = {name: limits.get(limit) for name, limit in LENGTH_LIMITS.items() if f"{name}_length" in columns}
    lengths = pd.DataFrame({name: data.rows[f"{name}_length"] for name in bounds})
    table = lengths.quantile(list(PERCENTILES.values()), interpolation="nearest").T.set_axis(list(PERCENTILES), axis=1)
    table["limit"] = ["" if limit is None else f"{limit:,}" for limit in bounds.values()]
    over = {name: lengths[name] > limit for name, limit in bounds.items() if limit is not None}
    table["over limit"] = pd.Series({name: f"{long.sum():,} ({long.mean():.1%})" for name, long in over.items()})
    sft = "The prompt is everything that is not the assistant's."
    note = "A pair's total is its prompt and the longer answer." if data.kind.pairs else sft
    note += " p95: 95% of the rows are no longer than this."
    table = table.fillna("").rename_axis("").reset_index()
    return Table(f"Tokens per row before truncation{which}", table, note)


def show_examples(data: TrainingData, count: int) -> Iterator[Example]:
    """Yield the first rows of each source that are trained on; a pair as two examples."""
    rows = data.remaining_rows["train"]
    order = [str(counts.source) for counts in data.sources]
    places = pd.DataFrame({"source": pd.Categorical(rows["source"][:], order), "row": rows["row"][:]})
    first = places.sort_values(["source", "row"], kind="stable").groupby("source", observed=True).head(count)
    for index in first.index:
        row = rows[int(index)]
        title = f"{row['source']} row {row['row']}"
        if data.kind.pairs:
            for side in ("chosen", "rejected"):
                prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
                supervised = [False] * len(prompt) + [True] * len(answer)
                yield Example(f"{title}, {side}", make_tokens(data.tokenizer, prompt + answer, supervised))
        else:
            supervised = [label != -100 for label in row["labels"]]
            yield Example(title, make_tokens(data.tokenizer, row["input_ids"], supervised))


def make_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], supervised: list[bool]) -> list[Token]:
    """Return the tokens with their texts, as they are shown."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    tokens = []
    for token_id, raw, in_loss in zip(ids, tokenizer.convert_ids_to_tokens(ids), supervised, strict=True):
        text = cast(str, tokenizer.decode([token_id]))
        if not text or "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character
            text = raw
        elif raw[0] in "▁Ġ" and text[0] != " ":  # some decoders strip the space from what they take for a beginning
            text = " " + text
        tokens.append(Token(token_id, visible(text), in_loss, token_id in special))
    return tokens


def tabulate_training(experiment: Experiment, facts_of: dict[int, dict[str, str]]) -> Iterator[Table]:
    """Yield the facts by trial id: in one table what differs between the trials, in another what they share."""
    facts = pd.DataFrame.from_dict(facts_of, orient="index").fillna("").sort_index()
    common = facts.columns[facts.nunique() == 1]
    if len(facts) > 1:
        points = [experiment.values(hparams) for hparams in experiment.plan_trials()]
        searched = pd.DataFrame(points, facts.index, [short_name(name) for name in experiment.varying])
        table = pd.concat([searched, facts.drop(columns=common)], axis=1).rename_axis("trial").reset_index()
        yield Table(f"The {len(facts)} trials", table, " ".join(describe_search(experiment.config)))
    shared = facts.loc[1, common].rename(" ").rename_axis("").reset_index()
    yield Table("Training" if len(facts) == 1 else "Training, all trials", shared, text_columns=[" "])


def collect_facts(data: TrainingData, hparams: Hyperparameters, slots: int) -> dict[str, str]:
    """Return what a trial's training consists of, by name, as it is shown."""
    args, lengths = hparams.args, data.lengths
    batch, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    unit = "pairs" if data.kind.pairs else "packs of rows" if hparams.packing else "rows"
    per_step = f"{batch * accumulated * slots:,}"
    if accumulated * slots > 1:
        per_step += f" ({batch} per batch, {accumulated} batches" + (f", {slots} slots)" if slots > 1 else ")")
    epoch, total = count_steps(args, len(lengths), slots)
    facts = {"model": f"{data.start.shown}, {describe_parameters(data.model_of(hparams), hparams)}"}
    if data.start.note:
        facts["its tokenizer"] = data.start.note
    if data.kind.pairs and not hparams.checkpoint:
        facts["with a model_ckpt"] = "the SFT model's tokenizer is used instead: lengths and cuts may differ"
    facts |= data.chat_facts
    facts[f"{unit} per step"] = per_step
    facts["steps"] = f"{total:,} ({epoch:,} per epoch)"
    if slots > 1:
        facts["steps with one process, as on this machine"] = f"{count_steps(args, len(lengths), 1)[1]:,}"
    tokens = int(lengths.sum())
    supervised = sum(data.remaining_rows["train"]["learned"][:])
    facts["tokens per epoch"] = f"{tokens:,}, supervised: {supervised:,} ({supervised / tokens:.1%})"
    packed = hparams.packing or args.padding_free
    padding = 0.0 if packed else padding_share(lengths, batch, args.seed, int(args.pad_to_multiple_of or 1))
    facts["padding"] = f"{padding:.1%} of the positions in a batch"
    if data.padding_free and not hparams.packing:
        facts["padding"] = f"{padding:.1%} of the positions in a padded batch; not computed"
        if data.kind.pairs:
            computed = computed_lengths(data.remaining_rows["train"], pairs=True, padding_free=True)
            facts["prompts of pairs"] = f"computed once, which saves {1 - computed.sum() / tokens:.1%} of the tokens"
    return facts


def count_steps(args: Any, sequences: int, devices: int) -> tuple[int, int]:
    """Return the optimizer steps of an epoch and of the training, counted as transformers' Trainer does."""
    whole = math.floor if args.dataloader_drop_last else math.ceil
    batches = whole(sequences / (args.per_device_train_batch_size * devices))
    epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)


def padding_share(lengths: np.ndarray, batch: int, seed: int, multiple: int) -> float:
    """Return the share of padding in batches of `batch` rows in random order, padded to a multiple of `multiple`.

    `lengths` (rows, sequences of a row) are in tokens.
    """
    order, positions = np.random.default_rng(seed).permutation(len(lengths)), 0
    for start in range(0, len(order), batch):
        rows = lengths[order[start : start + batch]]
        positions += rows.size * math.ceil(rows.max() / multiple) * multiple
    return 1 - lengths.sum() / positions
