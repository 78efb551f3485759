"""Show a comparison in the terminal, and write it to the files that the user asks for.

F.html                  a page to vote on without seeing names, and then to see who was who (`vote.html.jinja`)
F.csv, F.jsonl, F.md    a row for each question, a column for each model, the preferred answer last
F.json                  everything with the metrics, for a program
"""

import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chat_format import Message
from comparison.generation import Answer
from comparison.preference_metrics import NGRAM
from comparison.verdicts import Verdicts
from errors import os_errors_of
from metrics.evaluations import LIKE_LENGTH
from metrics.intervals import Estimate
from pages.render import render_page
from pages.terminal import visible
from storage.files import write_atomically
from storage.fingerprints import fingerprint

_percent = "{:.1%}".format


def _number(value: float) -> str:  # three significant digits, at most two decimals
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


# By metric of `preference_metrics`: its title, format and meaning. {reference} stands for the reference model's name,
# {count} for the number of rows.
METRICS: dict[str, tuple[str, Callable[[float], str], str]] = {
    "preference_accuracy_by_token": (
        "preference accuracy, by token ↑",
        _percent,
        "how often the answer that people chose has the higher mean log-prob per token",
    ),
    "preference_accuracy_like_length": (
        "the same in {count} pairs of like length ↑",
        _percent,
        f"only where the shorter answer has at least {LIKE_LENGTH:.0%} of the longer one's characters",
    ),
    "preference_accuracy": (
        "preference accuracy, by sum ↑",
        _percent,
        "how often the chosen answer is the likelier one: its sum of log-probs is higher, which favours short answers",
    ),
    "prefers_longer": (
        "prefers the longer answer",
        _percent,
        "how often the longer answer has the higher mean log-prob per token, whichever people chose",
    ),
    "reward_accuracy": (
        "reward accuracy against {reference} ↑",
        _percent,
        "how often the chosen answer has the higher DPO reward: its log-prob minus its log-prob under {reference}",
    ),
    "reward_margin": (
        "reward margin against {reference} ↑",
        _number,
        "mean difference of the two rewards, times beta; informative for models trained from {reference}",
    ),
    "perplexity": (
        "perplexity of the chosen answers ↓",
        _number,
        "exp of the mean negative log-prob per token; lower is better",
    ),
    "answer_tokens": ("length of an answer", _number, "mean number of tokens of the model's own answers"),
    "stopped": ("stopped by itself ↑", _percent, "share of the model's answers that ended before the limit"),
    "distinct_ngrams": (
        f"distinct {NGRAM}-grams ↑",
        _percent,
        f"share of distinct sequences of {NGRAM} words; 100%: no repetition",
    ),
}


@dataclass
class Comparison:
    """The questions, and every model's answers and metrics."""

    sources: dict[str, str]  # by model: where it is from, as the user wrote it
    questions: list[list[Message]]
    preferred: list[str | None]  # the answer to each question that people preferred, if known
    answers: dict[str, list[Answer]]  # by model
    figures: dict[str, dict[str, Estimate | None]]  # by model: its metrics
    reference: str
    settings: str  # in sentences: how the answers and metrics were made
    verdicts: Verdicts

    def table(self) -> pd.DataFrame:
        """Return a row for each question, a column for each model, the preferred answer last if any is known."""
        table = pd.DataFrame({"question": [question_text(question) for question in self.questions]})
        for name, answers in self.answers.items():
            table[name] = [answer.text for answer in answers]
        if any(text is not None for text in self.preferred):
            table["preferred"] = [text or "" for text in self.preferred]
        return table

    def numbers(self) -> list[tuple[str, str, list[tuple[str, str]]]]:
        """Return, for each metric, its title, its meaning, and each model's value and 95% interval as text."""
        rows = []
        for key, (title, write, meaning) in METRICS.items():
            estimates = [self.figures[name].get(key) for name in self.sources]
            if any(estimates):
                cells = [(write(of.value), of.interval(write)) if of else ("-", "") for of in estimates]
                names = {"reference": self.reference, "count": next(of.count for of in estimates if of)}
                rows.append((title.format(**names), meaning.format(**names), cells))
        return rows

    def metrics(self) -> dict[str, float]:
        """Return the number of questions, and all metrics as `model/metric`."""
        values = [(f"{name}/{key}", value) for name, of in self.figures.items() for key, value in of.items()]
        return {"questions": len(self.questions), **{name: value.value for name, value in values if value}}


def question_text(question: list[Message]) -> str:
    """Return a question as text; if it has several turns, with their roles."""
    if len(question) == 1:
        return question[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in question)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the verdicts, each question with the answers in columns below it, then the metrics."""
    for verdict in comparison.verdicts.lines:
        console.print(f"[bold]{escape(verdict)}[/bold]")
    for position, row in enumerate(comparison.table().to_dict("records"), start=1):
        console.print(f"\n[bold]{position}. {escape(visible(row.pop('question')))}[/bold]")
        answers = Table(box=box.SIMPLE, expand=True)
        for name in row:
            answers.add_column(escape(str(name)), ratio=1, style="dim" if name == "preferred" else None)
        answers.add_row(*(escape(visible(text)) for text in row.values()))
        console.print(answers)
    numbers = Table("", box=box.SIMPLE, caption=escape(comparison.settings), caption_justify="left")
    for name in comparison.sources:
        numbers.add_column(escape(name), justify="right")
    for title, _, cells in comparison.numbers():
        numbers.add_row(escape(title), *(f"{value}\n[dim]{interval}[/dim]" for value, interval in cells))
    console.print(numbers)


def _json(comparison: Comparison) -> str:
    figures = {
        name: {key: value and value._asdict() for key, value in of.items()} for name, of in comparison.figures.items()
    }
    rows = comparison.table().to_dict("records")
    differences = [
        {
            "model": of.model,
            "against": of.against,
            "preference_accuracy_by_token": of.by_token._asdict(),
            "preference_accuracy": of.by_sum._asdict(),
        }
        for of in comparison.verdicts.differences
    ]
    longer = comparison.verdicts.chosen_is_longer
    everything = {
        "verdicts": comparison.verdicts.lines,
        "differences": differences,
        "chosen_is_longer": longer and longer._asdict(),
        "models": comparison.sources,
        "settings": comparison.settings,
        "figures": figures,
        "questions": rows,
    }
    return json.dumps(everything, ensure_ascii=False, indent=2) + "\n"


def _jsonl(comparison: Comparison) -> str:  # not by pandas, which escapes every slash
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in comparison.table().to_dict("records"))


def _markdown(comparison: Comparison) -> str:
    """Verdicts, two tables, then what the metrics mean. (pandas' own Markdown needs `tabulate` and escapes nothing.)"""
    table, numbers = comparison.table(), comparison.numbers()
    cells = [[title, *(f"{v} ({interval})" if interval else v for v, interval in row)] for title, _, row in numbers]
    tables = [
        _markdown_table([*table.columns], table.values.tolist()),
        _markdown_table(["", *comparison.sources], cells),
    ]
    meanings = "".join(f"- {_escape_markdown(f'{title}: {meaning}')}\n" for title, meaning, _ in numbers)
    verdicts = "".join(f"- {_escape_markdown(verdict)}\n" for verdict in comparison.verdicts.lines)
    return "\n".join((*filter(None, [verdicts]), *tables, meanings, _escape_markdown(comparison.settings) + "\n"))


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(map(_escape_markdown, row)) for row in (header, *rows)]
    lines.insert(1, " | ".join(["---"] * len(header)))
    return "".join(f"| {line} |\n" for line in lines)


def _escape_markdown(text: str) -> str:
    for marker in "\\`*_[]~#|":
        text = text.replace(marker, f"\\{marker}")
    return "<br>".join(html.escape(text, quote=False).splitlines())


def _html(comparison: Comparison) -> str:
    table = comparison.table()
    about = {
        "id": fingerprint(table.to_csv(), list(comparison.sources)),  # the page's votes are stored under it
        "models": list(comparison.sources.items()),  # a list: tojson sorts the keys of a mapping
        "settings": comparison.settings,
        "questions": table["question"].tolist(),
    }
    context = {"comparison": comparison, "numbers": comparison.numbers(), "about": about}
    return render_page(Path(__file__).with_name("vote.html.jinja"), "Which answer is best?", **context)


WRITERS: dict[str, Callable[[Comparison], str]] = {
    ".html": _html,
    ".csv": lambda comparison: comparison.table().to_csv(index=False),
    ".jsonl": _jsonl,
    ".md": _markdown,
    ".json": _json,
}


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write a comparison in the format that the file's name ends in. Raises `UserError` if it cannot be written."""
    with os_errors_of(f"--output_file {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, WRITERS[path.suffix](comparison))
