"""Models side by side: their answers to the same questions, what the numbers say of them, and the files that hold both.

F.html                  a page on which to vote blind, and then to read who was who (`vote.html.jinja`)
F.csv, F.jsonl, F.md    a row a question, a column a model, the preferred answer last
F.json                  all of it, the numbers too, for a program
"""

import html
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chat_format import Message
from comparison.generation import Answer
from comparison.preference_metrics import NGRAM, Estimate
from errors import UserError
from pages.render import render_page
from pages.terminal import visible
from storage.files import write_atomically
from storage.fingerprints import fingerprint

RESERVED = ("question", "preferred")  # columns that no model can be called


class Metric(NamedTuple):
    """How a figure of `preference_metrics` is told."""

    title: str
    write: Callable[[float], str]
    meaning: str


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def number(value: float) -> str:
    """Three significant digits, and no more than two after the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


METRICS = {
    "preference_accuracy": Metric(
        "preference accuracy ↑",
        percent,
        "how often the answer that people chose is likelier than the one they rejected",
    ),
    "preference_accuracy_by_token": Metric(
        "preference accuracy, by token ↑",
        percent,
        "the same of the mean log-prob of a token: a sum favours short answers",
    ),
    "reward_accuracy": Metric(
        "reward accuracy against {reference} ↑",
        percent,
        "how often DPO's reward, by what the model finds an answer likelier than {reference} does, is higher for the"
        " chosen one",
    ),
    "reward_margin": Metric(
        "reward margin against {reference} ↑",
        number,
        "by how much it is higher, times beta; tells something of models that were trained from {reference}",
    ),
    "perplexity": Metric(
        "perplexity of the chosen answers ↓",
        number,
        "how many tokens it wavers between, as it were, at each token of a chosen answer",
    ),
    "answer_tokens": Metric("length of an answer", number, "in tokens, of its own answers"),
    "stopped": Metric("stopped by itself ↑", percent, "the share of its answers that ended before the limit"),
    "distinct_ngrams": Metric(
        f"distinct {NGRAM}-grams ↑",
        percent,
        f"the share of an answer's sequences of {NGRAM} words that are no repetition",
    ),
}


@dataclass
class Comparison:
    """What was asked and answered. `answers` and `figures` are by model; `preferred` is known of some questions."""

    sources: dict[str, str]  # model: where it is from, as the user named it
    questions: list[list[Message]]
    preferred: list[str | None]
    answers: dict[str, list[Answer]]
    figures: dict[str, dict[str, Estimate | None]]
    reference: str
    settings: str  # in words: how the answers were made, what the figures are of

    def table(self) -> pd.DataFrame:
        """A row a question, a column a model, the preferred answer last (where one is known)."""
        table = pd.DataFrame({"question": [asked(question) for question in self.questions]})
        for name, answers in self.answers.items():
            table[name] = [answer.text for answer in answers]
        if any(text is not None for text in self.preferred):
            table["preferred"] = [text or "" for text in self.preferred]
        return table

    def numbers(self) -> list[tuple[str, str, list[tuple[str, str]]]]:
        """For each figure its title, what it means and, for each model, it and its 95% interval in words."""
        rows = []
        for key, metric in METRICS.items():
            found = [self.figures[name].get(key) for name in self.sources]
            if any(found):
                cells = [told(value, metric.write) if value else ("-", "") for value in found]
                title, meaning = (text.format(reference=self.reference) for text in (metric.title, metric.meaning))
                rows.append((title, meaning, cells))
        return rows

    def metrics(self) -> dict[str, float]:
        """All figures by `model/figure`, and the number of questions."""
        figures = {
            f"{name}/{key}": value.value
            for name, of in self.figures.items()
            for key, value in of.items()
            if value is not None
        }
        return {"questions": len(self.questions)} | figures


def told(value: Estimate, write: Callable[[float], str]) -> tuple[str, str]:
    """A figure and its interval in words. Where all rows agree a bootstrap knows no doubt, however few they are."""
    sure = f"all {value.count} alike" if value.count > 1 else "of one"
    return write(value.value), sure if value.low == value.high else f"{write(value.low)} to {write(value.high)}"


def asked(question: list[Message]) -> str:
    """A question as text; one of several turns with who says what."""
    if len(question) == 1:
        return question[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in question)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Each question with the answers in columns below it, then the numbers."""
    for position, row in enumerate(comparison.table().to_dict("records"), start=1):
        console.print(f"\n[bold]{position}. {escape(visible(row.pop('question')))}[/bold]")
        answers = Table(box=box.SIMPLE, expand=True)
        for name in row:
            answers.add_column(escape(name), ratio=1, style="dim" if name == "preferred" else None)
        answers.add_row(*(escape(visible(text)) for text in row.values()))
        console.print(answers)
    numbers = Table(box=box.SIMPLE, caption=escape(comparison.settings), caption_justify="left")
    numbers.add_column("")
    for name in comparison.sources:
        numbers.add_column(escape(name), justify="right")
    for title, _, cells in comparison.numbers():
        numbers.add_row(escape(title), *(f"{value}\n[dim]{interval}[/dim]" for value, interval in cells))
    console.print(numbers)


def write_csv(comparison: Comparison) -> str:
    return comparison.table().to_csv(index=False)


def write_jsonl(comparison: Comparison) -> str:
    rows = comparison.table().to_dict("records")
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(comparison: Comparison) -> str:
    """All of it for a program: figures with their intervals, too."""
    figures = {
        name: {key: value and value._asdict() for key, value in of.items()} for name, of in comparison.figures.items()
    }
    rows = comparison.table().to_dict("records")
    whole = {"models": comparison.sources, "settings": comparison.settings, "figures": figures, "questions": rows}
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"


def write_markdown(comparison: Comparison) -> str:
    """The table of answers, then the numbers and what they mean."""
    table, numbers = comparison.table(), comparison.numbers()
    figures = [[title, *(f"{value} ({range_})" if range_ else value for value, range_ in cells)]
               for title, _, cells in numbers]  # fmt: skip
    answers = markdown_table(list(table.columns), table.values.tolist())
    meanings = "".join(f"- {markdown_cell(title)}: {markdown_cell(meaning)}\n" for title, meaning, _ in numbers)
    figures = markdown_table(["", *comparison.sources], figures)
    return f"{answers}\n{figures}\n{meanings}\n{markdown_cell(comparison.settings)}\n"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(markdown_cell, line))} |\n" for line in lines)


def markdown_cell(text: str) -> str:
    """`text` as a cell shows it: nothing in it is markup, and a line break is one."""
    for marker in "\\`*_[]~#|":
        text = text.replace(marker, f"\\{marker}")
    return "<br>".join(html.escape(text, quote=False).splitlines())


def write_html(comparison: Comparison) -> str:
    table = comparison.table()
    return render_page(
        Path(__file__).with_name("vote.html.jinja"),
        "Which answer is best?",
        comparison=comparison,
        numbers=comparison.numbers(),
        about={
            "id": fingerprint(table.to_csv(), list(comparison.sources)),  # its votes are another page's no more
            "models": list(comparison.sources.items()),  # a list: tojson sorts the keys of a mapping
            "settings": comparison.settings,
            "questions": table["question"].tolist(),
        },
    )


WRITERS = {".html": write_html, ".csv": write_csv, ".jsonl": write_jsonl, ".md": write_markdown, ".json": write_json}


def check_output(path: str) -> None:
    if Path(path).suffix not in WRITERS:
        raise UserError(f"--output_file {path}: its name must end in one of {', '.join(WRITERS)}")
    if Path(path).is_dir():
        raise UserError(f"--output_file {path}: it is a folder")
    there = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--output_file {path}: {there} is no folder to write to")


def write_comparison(comparison: Comparison, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, WRITERS[path.suffix](comparison))
    except OSError as error:
        raise UserError(f"--output_file {path}: {error.strerror}") from error
