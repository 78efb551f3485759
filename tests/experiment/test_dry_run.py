"""The dry run: what it shows is what a training then does, without weights and without writing anything."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import hub_server
import numpy as np
import pytest
import yaml
from conftest import REPO
from datasets import Dataset
from rich.console import Console

import dpo_finetune
import local_experiment
import sft_finetune
from config.experiment import expand_trials, read_experiment_config
from config.hyperparameters import parse_hyperparameters
from data.truncation import Truncation
from experiment import dry_run
from experiment.dry_run_output import Example, Table, Token, print_section
from experiment.kinds import kind_of
from experiment.results import Experiment


@pytest.fixture
def run_dry(write_config):
    """Run a dry run; returns its tables by their titles, and its examples."""

    def run(config, examples=1, **changes):
        config = read_experiment_config(write_config(config, **changes))
        experiment = Experiment("test", config)
        cls = kind_of(experiment.script).hyperparameters
        trials = [parse_hyperparameters(cls, trial) for trial in expand_trials(config)]
        sections = list(dry_run.dry_run(experiment, trials, examples))
        tables = {section.title: section for section in sections if isinstance(section, Table)}
        return tables, [section for section in sections if isinstance(section, Example)]

    return run


def training(tables):
    table = next(table for title, table in tables.items() if title.startswith("Training"))
    return dict(table.rows)


def number(text):
    return int(re.match(r"[\d,]+", text)[0].replace(",", ""))


# By this machine, or by whichever GPU it will be.
LEFT_OPEN = {f"hyperparameters__training_args__{name}": None for name in ("bf16", "activation_checkpointing")}
SETTINGS = {
    "batch of 4": {"per_device_train_batch_size": 4},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_train_epochs": 1.5},
    "last batch dropped": {
        "per_device_train_batch_size": 5,
        "per_device_eval_batch_size": 4,
        "dataloader_drop_last": True,
    },
    "packed": {"per_device_train_batch_size": 2, "packing": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_steps_tokens_and_examples_match_the_training(run_dry, train, trainers, sft_config, settings):
    changes = {f"hyperparameters__training_args__{key}": value for key, value in settings.items()}
    changes |= {"hyperparameters__training_args__max_steps": None, "hyperparameters__training_args__seed": 7}
    changes |= {"hyperparameters__training_args__num_train_epochs": settings.get("num_train_epochs", 1)}
    tables, examples = run_dry(sft_config, examples=999, **changes)
    train(sft_finetune, sft_config, **changes)
    (trainer,) = trainers
    facts = training(tables)
    assert number(facts["steps"]) == trainer.state.max_steps == trainer.state.global_step
    rows = trainer.train_dataset
    ids = [token for row in rows["input_ids"] for token in row]
    labels = [label for row in rows["labels"] for label in row]
    learned = len(labels) - labels.count(-100)
    assert facts["tokens per epoch"].startswith(f"{len(ids):,}, supervised: {learned:,} ")
    if not settings.get("packing"):
        trained = {tuple(row["input_ids"]): tuple(label != -100 for label in row["labels"]) for row in rows}
        shown = {tuple(t.id for t in e.tokens): tuple(t.supervised for t in e.tokens) for e in examples}
        assert shown == trained
        batches = list(trainer.get_train_dataloader())
        real = sum(int(batch["attention_mask"].sum()) for batch in batches)
        share = 1 - real / sum(batch["input_ids"].numel() for batch in batches)
        assert float(facts["padding"].split("%")[0]) / 100 == pytest.approx(share, abs=0.1)
        assert facts["padding"].endswith(" in a padded batch; not computed")
    else:
        assert facts["padding"].startswith("0.0%")
        assert number(facts["packs of rows per step"]) == 2


def test_pairs_match_the_training(run_dry, train, trainers, dpo_config):
    changes = {"hyperparameters__max_prompt_length": 60, "hyperparameters__max_target_length": 40}
    tables, examples = run_dry(dpo_config, examples=999, **changes)
    train(dpo_finetune, dpo_config, **changes)
    (trainer,) = trainers
    trained = {
        (tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"]))
        for row in trainer.train_dataset
        for side in ("chosen", "rejected")
    }
    shown = {
        (tuple(t.id for t in e.tokens if not t.supervised), tuple(t.id for t in e.tokens if t.supervised))
        for e in examples
    }
    assert shown == trained
    assert training(tables)["steps"].startswith(f"{trainer.state.max_steps:,} (")
    rows = trainer.train_dataset
    prompts, whole = (sum(map(len, rows[f"{name}_ids"])) for name in ("prompt", "chosen"))
    whole += 2 * prompts + sum(map(len, rows["rejected_ids"]))
    assert training(tables)["prompts of pairs"] == f"computed once, which saves {prompts / whole:.1%} of the tokens"
    limits = {row[0]: row[-2:] for row in tables["Tokens per row before truncation"].rows}
    assert {name: limit for name, (limit, _) in limits.items()} == {
        **{"prompt": "60", "chosen": "40", "rejected": "40", "total": "384"},
    }
    assert number(limits["chosen"][1]) > 0


def test_rows_are_counted_by_source(run_dry, sft_config):
    subsets = [{"subset": "kitchen", "ratio": 0.5}, {"subset": "home", "number_of_samples": 14}]
    tables, _ = run_dry(sft_config, hyperparameters__dataset_subsets=subsets, hyperparameters__max_seq_length=60)
    table = tables["Rows"]
    assert table.columns == ["source", "requested", "found", "repeated", "used", "dropped", "cut", "train", "held out"]
    kitchen, home, total = table.rows
    assert (kitchen[0].split("/")[-1], *kitchen[1:5]) == ("instructions (subset kitchen)", "50%", "128", "0", "64")
    assert home[1:5] == ["14", "128", "0", "14"]
    assert [number(n) for n in total[3:]] == [
        sum(number(row[column]) for row in (kitchen, home)) for column in range(3, 9)
    ]
    assert number(total[4]) == number(total[5]) + number(total[7]) + number(total[8])
    assert table.note == "78 rows have 78 prompts."
    lost = tables["Truncated rows"]
    (row,) = lost.rows
    assert row[0] == f"cut: {Truncation.SEQUENCE_END.meaning}"
    assert number(row[1]) == number(total[6]) == number(tables["Tokens per row before truncation"].rows[-1][-1])
    assert re.search(r"instructions \(subset \w+\) row \d+: \w+", row[3])
    assert lost.note == f"{float(row[2][:-1]):.0f}% of the rows are cut: raise max_seq_length."


def test_dropped_pairs_name_the_limit_to_raise(run_dry, dpo_config, tmp_path):
    pair = {"chosen": "good", "rejected": "bad"}
    rows = [{"prompt": f"q{n}", **pair} for n in range(18)] + [{"prompt": "\x1b[2J" * n, **pair} for n in (98, 99)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables, _ = run_dry(dpo_config, hyperparameters__datasets=[str(tmp_path / "d.jsonl")])
    ((what, count, share, example),) = tables["Truncated rows"].rows
    assert (what, count, share) == (f"dropped: {Truncation.NO_ROOM.meaning}", "2", "10.0%")
    assert re.fullmatch(rf"{tmp_path}/d.jsonl row 19: (\\x1b\[2J)+.*…", example)
    assert tables["Truncated rows"].note == "10% of the rows are dropped: raise max_length."
    assert tables["Rows"].rows[0][1:] == ["all", "20", "0", "20", "2", "0", *tables["Rows"].rows[0][7:]]
    assert sum(int(n) for n in tables["Rows"].rows[0][7:]) == 18


def test_shared_prompts_and_rows_of_several_sources_are_told(run_dry, dpo_config, tmp_path):
    files = {"a": [*range(20), 0, 0], "b": [*range(18, 30)]}  # prompts; answers to 0 differ
    for name, numbers in files.items():
        rows = [
            {"prompt": f"{n}", "chosen": f"good {i if n == 0 else n}", "rejected": "b"} for i, n in enumerate(numbers)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b = (str(tmp_path / f"{name}.jsonl") for name in files)
    table = run_dry(dpo_config, hyperparameters__datasets=[a, b])[0]["Rows"]
    assert [row[:5] for row in table.rows[:2]] == [[a, "all", "22", "0", "22"], [b, "all", "12", "2", "10"]]
    told = (
        "32 rows have 30 prompts; 3 of them share theirs with another row; each prompt is either trained on or held out"
    )
    assert table.note == f"{told}; 2 rows of different sources are the same, and count once."
    own = {"name": a, "eval_dataset": b}
    table = run_dry(dpo_config, hyperparameters__datasets=[own])[0]["Rows"]
    assert [row[-2:] for row in table.rows] == [["22", "0"], ["0", "12"], ["22", "12"]]
    assert "; 2 prompts of the evaluation data are trained on, too" in table.note


def test_trials_that_use_the_same_data_share_their_sections(run_dry, dpo_config):
    beta = {"type": "categorical", "vals": [0.1, 0.05]}
    grid = {"searcher__name": "grid", "hyperparameters__dpo_beta": beta, **LEFT_OPEN}
    tables, examples = run_dry(dpo_config, **grid)
    assert len(examples) == 4  # two sources, two sides
    assert tables["The 2 trials"].columns == ["trial", "dpo_beta"]
    assert [row[0] for row in tables["Estimated peak memory, in GB"].rows] == [
        *("CPU here", "a GPU, bf16", "a GPU, bf16, activation checkpointing"),
    ]

    batch = {"type": "categorical", "vals": [2, 4]}
    limit = {"type": "categorical", "vals": [128, 384]}
    tables, examples = run_dry(
        dpo_config,
        **grid,
        hyperparameters__max_length=limit,
        hyperparameters__training_args__per_device_train_batch_size=batch,
        hyperparameters__training_args__max_steps=None,
    )
    assert len(examples) == 8
    assert [title for title in tables if title.startswith("Rows")] == [
        "Rows, trials 1, 2, 5, 6",
        "Rows, trials 3, 4, 7, 8",
    ]
    trials = tables["The 8 trials"]
    assert trials.columns[:4] == ["trial", "dpo_beta", "max_length", "per_device_train_batch_size"]
    assert [row[:4] for row in trials.rows[1:4]] == [
        ["2", "0.1", "128", "4"],
        ["3", "0.1", "384", "2"],
        ["4", "0.1", "384", "4"],
    ]
    assert {"steps", "pairs per step", "tokens per epoch"} <= set(trials.columns)
    assert "model" in training(tables)


def test_packing_trials_are_counted_apart_from_others(run_dry, sft_config):
    packing = {"type": "categorical", "vals": [False, True]}
    tables, _ = run_dry(sft_config, searcher__name="grid", hyperparameters__training_args__packing=packing)
    trials = tables["The 2 trials"]
    rows, packs = (dict(zip(trials.columns, row, strict=True)) for row in trials.rows)
    assert (rows["rows per step"], rows["packs of rows per step"]) == ("4", "")
    assert (packs["rows per step"], packs["packs of rows per step"]) == ("", "4")

    split = {"packing": True, "packing_strategy": "wrapped", "max_steps": None, "num_train_epochs": 1}
    length = {"type": "categorical", "vals": [64, 256]}
    tables, _ = run_dry(
        sft_config,
        searcher__name="grid",
        hyperparameters__max_seq_length=length,
        **{f"hyperparameters__training_args__{key}": value for key, value in split.items()},
    )
    short, long = (dict(zip(tables["The 2 trials"].columns, row, strict=True)) for row in tables["The 2 trials"].rows)
    assert number(short["steps"]) >= 3 * number(long["steps"])


def test_slots_share_the_steps_and_the_memory(run_dry, sft_config):
    changes = {"hyperparameters__training_args__max_steps": None, "hyperparameters__training_args__bf16": None}
    alone = training(run_dry(sft_config, **changes)[0])
    tables, _ = run_dry(
        sft_config, resources={"slots_per_trial": 2}, hyperparameters__training_args__fsdp=True, **changes
    )
    shared = training(tables)
    per_epoch = [int(re.search(r"\((\d+) per epoch", facts["steps"])[1]) for facts in (shared, alone)]
    assert per_epoch[0] == math.ceil(per_epoch[1] / 2)
    assert shared["steps with one process, as on this machine"] == alone["steps"].split(" ")[0]
    assert tables["Estimated peak memory, in GB"].rows[1][0] == "each of 2 GPUs, bf16, FSDP"


@pytest.fixture
def estimates(monkeypatch):
    """The estimates of memory that dry runs show, by the way of training and the trial."""
    found, tabulate = {}, dry_run.tabulate_memory

    def keep(lines, *args):
        found.update({(where, trial_id): estimate for where, estimate, trial_id in lines})
        return tabulate(lines, *args)

    monkeypatch.setattr(dry_run, "tabulate_memory", keep)
    return found


def test_a_trial_with_lora_shows_what_is_trained_and_takes_no_second_model(run_dry, dpo_config, estimates):
    changes = LEFT_OPEN | {"hyperparameters__precompute_ref_log_probs": False}
    lora = {"hyperparameters__lora": {"r": 4, "target_modules": "all-linear"}}
    (total, whole), (text, of_lora) = (
        (training(run_dry(dpo_config, **changes, **more)[0])["model"].split(", ", 1)[1], dict(estimates))
        for more in ({}, lora)
    )
    pattern = r"(.*) parameters; LoRA trains (.*) of them \((.*)%\), the others are frozen, on a GPU in bf16"
    shown = re.fullmatch(pattern, text)
    both, trained = map(number, shown.groups()[:2])
    assert both - trained == number(total)
    assert float(shown[3]) == pytest.approx(100 * trained / both, abs=0.01)
    assert {where for where, _ in of_lora} == {"CPU here", "a GPU, bf16", "a GPU, bf16, activation checkpointing"}
    gpu = ("a GPU, bf16", 1)
    assert (whole[gpu].weights, whole[gpu].gradients) == (2 * 4 * number(total), 4 * number(total))
    # bf16, and TRL's copy of the adapter; nothing else stays in memory for the reference
    assert (of_lora[gpu].weights, of_lora[gpu].gradients) == (2 * number(total) + 2 * 4 * trained, 4 * trained)


def test_trials_with_adapters_of_other_sizes_share_their_data_but_not_their_memory(run_dry, sft_config, estimates):
    lora = {"r": {"type": "categorical", "vals": [4, 64]}, "target_modules": "all-linear"}
    tables, _ = run_dry(sft_config, searcher__name="grid", hyperparameters__lora=lora, **LEFT_OPEN)
    assert [title for title in tables if title.startswith("Rows")] == ["Rows"]
    small, large = (dict(zip(tables["The 2 trials"].columns, row, strict=True)) for row in tables["The 2 trials"].rows)
    trained = [number(row["model"].split("LoRA trains ")[1]) for row in (small, large)]
    assert trained[1] > 15 * trained[0]
    assert [estimates["a GPU, bf16", trial_id].gradients for trial_id in (1, 2)] == [4 * count for count in trained]


def test_four_bits_are_estimated_for_a_gpu_alone(call, sft_config, write_config, caplog):
    """A machine without a GPU could not train so: a line says it, and the dry run goes on."""
    lora = {"hyperparameters__lora": {"r": 4}, "hyperparameters__load_in_4bit": True}
    config = write_config(sft_config, **lora, hyperparameters__training_args__bf16=None)
    status, out, _ = call(local_experiment.main, config, "--dry-run")
    assert status == 0
    line = "hyperparameters.load_in_4bit needs a GPU; leave it out to train on a CPU (on this machine)"
    assert line in caplog.messages
    memory = out[out.index("Estimated peak memory") :]
    assert re.findall(r"CPU here|a GPU, bf16, 4 bits", memory) == ["a GPU, bf16, 4 bits"]
    assert "on a GPU in 4 bits (NF4), embeddings in bf16" in " ".join(out.split())


def test_padding_fills_a_batch_up_to_its_longest_sequence():
    assert dry_run.padding_share(np.array([[2], [4]]), batch=2, seed=1, multiple=1) == 0.25
    assert dry_run.padding_share(np.array([[2, 4]]), batch=2, seed=1, multiple=1) == 0.25
    assert dry_run.padding_share(np.array([[2], [4]]), batch=2, seed=1, multiple=8) == 1 - 6 / 16


class Text(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_command_needs_no_weights_and_writes_nothing_but_the_page(
    call, tiny, dpo_config, write_config, tmp_path, monkeypatch
):
    shutil.copytree(tiny / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    pairs = [
        {"prompt": f"<script>alert({n})</script>", "chosen": "a\u200bb <|im_end|>", "rejected": "\n"} for n in range(9)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = write_config(
        dpo_config,
        hyperparameters__model_name=str(tmp_path / "base"),
        hyperparameters__datasets=[str(tmp_path / "d.jsonl")],
    )
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(local_experiment.main, config, "--dry-run")
    assert (status, err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    assert "a·<0xE2>·<0x80>·<0x8B>·b" in out  # what cannot be seen is made visible
    assert "·<·|·im·_·end·|·>·<eos>⟧" in out

    monkeypatch.chdir(tmp_path)
    status, out, err = call(local_experiment.main, config, "--dry-run", "--output", tmp_path / "out")
    assert status == 0, err
    page = Text((tmp_path / "out" / "dry_run.html").read_text())
    assert str(tmp_path / "out" / "dry_run.html") in out
    assert "script" not in [tag for tag, _ in page.tags]
    assert "<script>" in "".join(page.text)
    learned = [
        attributes for tag, attributes in page.tags if tag == "i" and "supervised" in attributes.get("class", "")
    ]
    assert learned
    assert all(attributes["title"].isdigit() for attributes in learned)
    urls = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert urls == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hyperparameters__model_name": "./nowhere"}, "error: model_name './nowhere': no such folder"),
        ({"hyperparameters__datasets": ["./nowhere"]}, "error: data set ./nowhere: no such file or folder"),
        (
            {"hyperparameters__max_length": 3},
            f"error: max_length is too small: no train row is left ({Truncation.NO_ROOM.meaning})",
        ),
        (
            {"entrypoint": "python inference.py"},
            "error: --dry-run knows sft_finetune.py and dpo_finetune.py, not inference.py",
        ),
    ],
)
def test_a_mistake_is_one_line(call, dpo_config, write_config, tmp_path, changes, message):
    page = tmp_path / "page.html"
    status, _, err = call(local_experiment.main, write_config(dpo_config, **changes), "--dry-run", "--output", page)
    assert page.exists() == ("hyperparameters__max_length" in changes)  # the page shows what the limit takes
    assert (status, err) == (2, f"{message}\n")


def test_long_examples_lose_their_middle_and_keep_their_end():
    tokens = [Token(n, f"{n}", n > 10, False) for n in range(1000)]
    console = Console(width=100, file=io.StringIO())
    print_section(Example("title", tokens), console)
    text = console.file.getvalue()
    assert "9·10⟦11·12" in text
    assert " … 780 tokens … " in text.replace("\n", " ")
    assert text.rstrip().endswith("998·999⟧")


RUN_EACH = """
import json, sys
import local_experiment
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["local_experiment.py", *arguments]
    try:
        status = local_experiment.main()
    except SystemExit as stop:
        status = stop.code
    print("status", status, flush=True)
"""


def test_only_the_named_subset_is_streamed_and_only_once(sft_config, write_config, tmp_path):
    for subset in ("web", "stories"):
        for file in range(24):
            rows = [{"prompt": f"{subset} {file}.{row}", "text": "an answer"} for row in range(1000)]
            Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"{subset}" / f"train-{file:05}-of-00024.parquet")
    configs = [
        {"config_name": subset, "data_files": [{"split": "train", "path": f"{subset}/*"}]}
        for subset in ("web", "stories")
    ]
    (tmp_path / "data" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    subsets = [{"subset": "web", "number_of_samples": 40}]
    config = write_config(
        sft_config,
        hyperparameters__dataset="owner/pedia",
        hyperparameters__streaming=True,
        hyperparameters__dataset_subsets=subsets,
    )
    wrong = ["--config", "hyperparameters.dataset_subsets=[{subset: wed, number_of_samples: 5}]"]
    elsewhere = ["--config", "hyperparameters.dataset=owner/nothing"]
    with hub_server.served(tmp_path / "data", "owner/pedia") as (address, sent):
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment

        def run(*options):
            """Dry runs with these options, in a process: its output, and the data files that it read."""
            sent.clear()
            runs = json.dumps([[config, "--dry-run", *more] for more in options])
            command = [sys.executable, "-c", RUN_EACH, runs]
            ran = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200)
            return ran, {file for file, _ in sent}

        ran, read = run([], wrong, elsewhere)
        again, read_again = run([])
    assert re.findall(r"^status (\d+)", ran.stdout, flags=re.MULTILINE) == ["0", "2", "2"], ran.stderr
    streamed = re.search(r"owner/pedia \(subset web\) +40 +streamed +0 +40 .*", ran.stdout)[0]
    assert streamed in again.stdout
    first = "web/train-00000-of-00024.parquet"  # for the names of the columns
    assert len(read - {first}) in (9, 10)
    assert all(file.startswith("web/") for file in read)
    assert read_again <= {first}
    told = "data set owner/pedia (subset wed): unknown subset 'wed' (did you mean 'web'?): it has web, stories"
    assert told in ran.stderr
    assert "error (may be temporary): data set owner/nothing (subset web): no such file or folder" in ran.stderr
