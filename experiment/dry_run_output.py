"""Show a dry run's sections, on a terminal and as an HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from rich import box
from rich.console import Console
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from errors import os_errors_of
from pages.render import render_page
from storage.files import write_atomically

TERMINAL_TOKENS = (160, 60)  # of an example: how many of its first tokens are shown, and how many of its last
PAGE_TOKENS = (1200, 300)


class Table(NamedTuple):
    """A titled table. Its first column and `text_columns` are aligned to the left, the others to the right."""

    title: str
    frame: pd.DataFrame
    note: str = ""
    text_columns: Sequence[str] = ()

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.frame.columns)

    @property
    def rows(self) -> list[list[str]]:
        """The cells as they are shown."""
        return self.frame.map(lambda cell: cell if isinstance(cell, str) else f"{cell:,}").to_numpy().tolist()

    def holds_text(self, column: str) -> bool:
        """Whether a column is aligned to the left."""
        return column == self.frame.columns[0] or column in self.text_columns


class Token(NamedTuple):
    """A token of an example."""

    id: int
    text: str  # with invisible characters escaped
    supervised: bool  # its log-prob is in the loss
    special: bool


class Example(NamedTuple):
    """A row as it is trained on, or one side of a pair."""

    title: str
    tokens: list[Token]

    def split(self, first: int, last: int) -> tuple[list[Token], int, list[Token]]:
        """Return the first and the last tokens, and between them the number of tokens that are left out."""
        left_out = max(0, len(self.tokens) - first - last)
        return (self.tokens[:first], left_out, self.tokens[-last:]) if left_out else (self.tokens, 0, [])


Section = Table | Example


def print_section(section: Section, console: Console) -> None:
    """Print a table, or an example with a dot between two tokens and its supervised tokens in brackets."""
    console.print()
    if isinstance(section, Example):
        console.print(Rule(Text(section.title), align="left", style="dim"))
        console.print(_mark_tokens(section))
        return
    console.print(Text(section.title, style="bold"))
    if section.rows:
        table = RichTable(box=box.SIMPLE_HEAD, show_header=any(column.strip() for column in section.columns))
        for column in section.columns:
            text = section.holds_text(column)
            table.add_column(column.strip(), justify="left" if text else "right", overflow="fold", no_wrap=not text)
        for row in section.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    if section.note:
        console.print(Text(section.note, style="dim"))


def _mark_tokens(example: Example) -> Text:
    first, left_out, last = example.split(*TERMINAL_TOKENS)
    text, in_brackets = Text(), False
    for number, token in enumerate([*first, None, *last] if left_out else first):
        if token is None:
            text.append(f" … {left_out:,} tokens … ", "italic")
            continue
        if token.supervised != in_brackets:
            text.append("⟦" if token.supervised else "⟧")
            in_brackets = token.supervised
        elif number and not text.plain.endswith("\n"):
            text.append("·", "dim")
        style = ("green" if token.supervised else "") + (" reverse" if token.special else "")
        text.append(token.text.replace("\n", "⏎\n"), style.strip())
    text.append("⟧" if in_brackets else "")
    return text


def write_page(sections: list[Section], name: str, output: Path) -> Path:
    """Write the sections as a page, to `output` or, if that is a folder, to its `dry_run.html`; return the page's path.

    Raises `UserError` if it cannot be written.
    """
    page = output if output.suffix == ".html" else output / "dry_run.html"
    html = render_page(Path(__file__).with_name("dry_run.html.jinja"), name, sections=sections, shown=PAGE_TOKENS)
    with os_errors_of(f"--output {output}"):
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, html)
    return page
