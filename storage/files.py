"""Files that survive a kill: written whole or not at all, or appended to a line at a time."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

BUNDLE = Path(__file__).resolve().parent.parent  # the project's own folder, wherever it was copied to


def path_component(name: str) -> str:
    """Return `name` as one that a file or folder can have: one part of a path, not hidden, at most 100 bytes long."""
    safe = re.sub(r"[^\w .+=@,()-]", "_", name).strip(". ").encode()[:100].decode(errors="ignore").rstrip(". ")
    return safe or "experiment"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, even after a kill, finds either the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append `row` to a JSON Lines file, on a line of its own even if a kill cut the last one short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def read_json_lines(path: Path) -> list[Any]:
    """Return the rows of a JSON Lines file without a line that a kill cut short; [] if there is no file."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows
