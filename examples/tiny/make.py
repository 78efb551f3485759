"""Make the tiny example: a small pre-trained Gemma and the data to align it. Needs no network and about a minute.

    python examples/tiny/make.py [FOLDER]

It writes to FOLDER (default: local_runs/tiny)

    base/            a Gemma of 1.4 million parameters with its own tokenizer, trained on plain text: it continues
                     stories and articles, and it has never seen a chat
    instructions/    an SFT data set: subsets kitchen, home and outdoors with Cosmopedia's columns (prompt, text), and
                     chats with ultrachat_200k's (messages), conversations of two questions. The quality of the answers
                     is mixed, as in scraped data: helpful, curt or rambling
    questions/       preference pairs with the columns of orca_dpo_pairs (system, question, chosen, rejected)
    conversations/   preference pairs with the columns of dpo-mix-7k (chosen, rejected): whole conversations, some of
                     them multi-turn

All of it is generated from `how_to.yaml`, which describes 48 everyday tasks. Each wording of a question about a task is
used once in all of these data sets, so held-out rows ask about known tasks in new words. The chosen answer of a pair is
always the structured, helpful one.
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from transformers import GemmaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from errors import CommandLine, exit_on_user_error, os_errors_of
from storage.files import check_output

HOW_TO = Path(__file__).parent / "how_to.yaml"
SEED = 7
BLOCK = 128  # tokens in a row of the pre-training data

QUESTIONS = [
    "How do I {task}?",
    "How can I {task}?",
    "What is the best way to {task}?",
    "Please tell me how to {task}.",
    "Can you explain how to {task}?",
    "I want to {task}. What should I do?",
    "Show me how to {task}.",
    "What do I need to do to {task}?",
    "I have never tried to {task}. Where do I start?",
    "I would like to {task}. Can you help me?",
    "My friend asked me how to {task}. What should I say?",
    "Is there an easy way to {task}?",
    "How should I {task}?",
    "What are the steps to {task}?",
    "Do you know how to {task}?",
    "Could you teach me how to {task}?",
    "I need to {task} today. How is it done?",
    "Help me to {task}, please.",
    "What must I know to {task}?",
    "My sister wants to {task}. How does she do it?",
    "Tell me the right way to {task}.",
    "I forgot how to {task}. What comes first?",
    "What is a good way to {task}?",
    "How do most people {task}?",
]
TEACHER = "You are a patient teacher."
SYSTEMS = ["", "", "", "", "", TEACHER]
STYLES = ["rambling"] * 4 + ["curt"] + ["structured"] * 3  # of the SFT answers about a task
CHATS = 2  # SFT conversations that end with a task; one of them begins with a system turn
# The kind of the rejected answer in each of a task's pairs. The last four are conversations, half of them multi-turn.
REJECTED = ["rambling", "curt", "rambling", "off the point", "rambling", "rambling"]
REJECTED += ["curt", "rambling", "off the point", "rambling"]
CONVERSATIONS = 4
NAMES = ["Anna", "Tom", "Maria", "Ben", "Lucy", "Sam"]
ARTICLES = [
    "To {task}, you need only a little time. {why} {steps} {tip}",
    "Many people like to {task}. {why} {steps} {tip}",
    "{why} Here is what most people do. {steps} {tip}",
    "It is not hard to {task}. {steps} {why} {tip}",
]
STORIES = [
    '"{question}" asked {a}. "{why}" said {b}. "{steps}" It did not take long, and they were both happy with it.',
    '"{question}" {a} asked one day. {b} had done it many times before. "{steps} {tip}" {a} wrote it all down.',
    '"{question}" said {a}, and looked at {b}. "Let me think," said {b}. "{why} {steps}" Then they tried it together.',
]


def structured_answer(entry: dict[str, Any]) -> str:
    """Return the helpful answer: the task, the reason, numbered steps and a tip."""
    first, second, third = entry["steps"]
    return f"Here is how to {entry['task']}. {entry['why']}\n1. {first}\n2. {second}\n3. {third}\nTip: {entry['tip']}"


def rambling_answer(entry: dict[str, Any]) -> str:
    """Return an answer of many words that says nothing."""
    return (
        f"Well, there are many ways to {entry['task']}. Some people do it one way and some do it another way."
        " I have heard a lot about it over the years. It is hard to say which way is best, and it may not matter much."
        " In the end it is up to you, and you will find out in your own time."
    )


def write_texts(tasks: list[dict[str, Any]], rng: random.Random) -> list[str]:
    """Return the pre-training texts: four articles and twelve short stories about every task."""
    texts = []
    for entry in tasks:
        words = {**entry, "steps": " ".join(entry["steps"])}
        texts += [article.format(**words) for article in ARTICLES]
        for number, question in enumerate(rng.sample(QUESTIONS, 12)):
            a, b = rng.sample(NAMES, 2)
            texts.append(STORIES[number % 3].format(question=question.format(**entry), a=a, b=b, **words))
    rng.shuffle(texts)
    return texts


def write_datasets(tasks: list[dict[str, Any]], rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each JSON Lines file. The keys are the files' names without the suffix."""
    files: dict[str, list] = {f"instructions/{subset}": [] for subset in ("kitchen", "home", "outdoors", "chats")}
    files |= {"questions/train": [], "conversations/train": []}
    wordings = {entry["task"]: iter(rng.sample(QUESTIONS, len(QUESTIONS))) for entry in tasks}
    circle = rng.sample(tasks, len(tasks))  # a conversation asks about two that are close, so each is asked as often

    def ask(entry: dict[str, Any]) -> str:
        return next(wordings[entry["task"]]).format(**entry)

    def answer(entry: dict[str, Any], style: str) -> str:
        other = rng.choice([task for task in tasks if task is not entry])
        return {
            "curt": entry["curt"],
            "rambling": rambling_answer(entry),
            "off the point": structured_answer(other),
            "structured": structured_answer(entry),
        }[style]

    def exchange(entry: dict[str, Any], style: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": ask(entry)}, {"role": "assistant", "content": answer(entry, style)}]

    for number, entry in enumerate(circle):
        for style in STYLES:
            files[f"instructions/{entry['subset']}"].append({"prompt": ask(entry), "text": answer(entry, style)})
        for distance in range(1, CHATS + 1):
            chat = [(circle[number - distance], rng.choice(STYLES)), (entry, rng.choice(STYLES))]
            messages = [{"role": "system", "content": TEACHER}] if distance == 1 else []
            messages += [turn for part in chat for turn in exchange(*part)]
            files["instructions/chats"].append({"messages": messages})
        for style in REJECTED[:-CONVERSATIONS]:
            sides = {"chosen": answer(entry, "structured"), "rejected": answer(entry, style)}
            files["questions/train"].append({"system": rng.choice(SYSTEMS), "question": ask(entry), **sides})
        for place, style in enumerate(REJECTED[-CONVERSATIONS:]):
            # An earlier exchange with a helpful answer makes the last ones multi-turn.
            turns = exchange(circle[number - place + 1], "structured") if place > 1 else []
            turns.append({"role": "user", "content": ask(entry)})
            sides = {"chosen": answer(entry, "structured"), "rejected": answer(entry, style)}
            row = {side: [*turns, {"role": "assistant", "content": text}] for side, text in sides.items()}
            files["conversations/train"].append(row)
    for rows in files.values():
        rng.shuffle(rows)
    return files


def train_tokenizer(texts: list[str], vocab_size: int = 1500) -> "PreTrainedTokenizerFast":
    """Train a BPE tokenizer like Gemma's: spaces are part of the words, and unknown characters fall back to bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁?\w+|▁?[^\w\s▁]|▁"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special + bytes_, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Decoding would skip the bytes if they stayed special tokens, so only the first four tokens remain special.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][: len(special)]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=1024, **names)


def pre_train(
    texts: list[str], tokenizer: "PreTrainedTokenizerFast", epochs: float, hidden_size: int
) -> "GemmaForCausalLM":
    """Train a small Gemma with the architecture of google/gemma-2b from scratch on `texts`."""
    import torch
    from datasets import Dataset
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import (
        DataCollatorForLanguageModeling,
        GemmaConfig,
        GemmaForCausalLM,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainerState,
        TrainingArguments,
        set_seed,
    )

    set_seed(SEED)
    model = GemmaForCausalLM(
        GemmaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=hidden_size // 4,
            max_position_embeddings=1024,
            initializer_range=0.05,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = [ids[start : start + BLOCK] for start in range(0, len(ids) - BLOCK, BLOCK)]
    args = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # required, though nothing is saved
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=Dataset.from_dict({"input_ids": blocks}))
    trainer.remove_callback(PrinterCallback)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("steps,"), TimeRemainingColumn(), TextColumn("left")
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=2) as progress:
        bar = progress.add_task("", total=None)

        class ShowProgress(TrainerCallback):
            """A bar on a terminal; in a log, a line when half of it is done."""

            def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
                progress.update(bar, completed=state.global_step, total=state.max_steps)
                if not console.is_terminal and state.global_step == state.max_steps // 2:
                    print(f"half of {state.max_steps} steps done after {progress.tasks[0].elapsed:.0f} s", flush=True)

        trainer.add_callback(ShowProgress())
        trainer.train()
    return model


def make(folder: Path, epochs: float = 8, hidden_size: int = 160) -> None:
    """Write the example to `folder`, unless the folder is already complete."""
    with os_errors_of(f"FOLDER {folder}"):
        if (folder / "base" / "config.json").exists():
            print(f"{folder} already exists")
            return
    by_subset = yaml.safe_load(HOW_TO.read_text(encoding="utf-8"))
    tasks = [{**entry, "subset": subset} for subset, entries in by_subset.items() for entry in entries]
    rng = random.Random(SEED)
    texts, files = write_texts(tasks, rng), write_datasets(tasks, rng)
    for name in ("instructions/README.md", *(f"{name}.jsonl" for name in files)):
        check_output(folder / name, "FOLDER")
    for name in ("base", "base.partial"):
        check_output(folder / name, "FOLDER", is_folder=True)
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    subsets = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.jsonl\n"
        for name in (*by_subset, "chats")
    )
    (folder / "instructions" / "README.md").write_text(f"---\nconfigs:\n{subsets}---\n", encoding="utf-8")

    print("pre-training a tiny Gemma on plain text takes about a minute if the machine is idle", flush=True)
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of writing the file
    # The tokenizer must know every character of a chat, as a real one does.
    tokenizer = train_tokenizer(
        [*texts, *(structured_answer(task) for task in tasks), *SYSTEMS, "<|im_start|>assistant\n"]
    )
    model = pre_train(texts, tokenizer, epochs, hidden_size)
    partial = folder / "base.partial"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder / "base", ignore_errors=True)
    partial.rename(folder / "base")  # last, so that an interrupted run does not look complete
    print(
        f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, "
        + ", ".join(f"{len(rows)} rows of {name}" for name, rows in files.items())
    )


@exit_on_user_error
def main() -> None:
    parser = CommandLine(__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", metavar="FOLDER", default="local_runs/tiny", help="default: %(default)s")
    make(Path(parser.parse_args().folder))


if __name__ == "__main__":
    main()
