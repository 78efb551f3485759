"""Files that survive a kill: written whole or not at all, or appended to a line at a time."""

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from errors import UserError, os_errors_of

BUNDLE = Path(__file__).resolve().parent.parent  # the project's own folder, wherever it was copied to


def refuse_special_files(path: Path, what: str, pattern: str = "*") -> None:
    """Raise `UserError` about `what` if it is neither file nor folder, nor is what matches `pattern` in the folder.

    Reading a pipe or a device could wait or go on for ever.
    """
    with os_errors_of(what):
        for found in (path, *(path.glob(pattern) if path.is_dir() else ())):
            if found.exists() and not (found.is_file() or found.is_dir()):
                raise UserError(f"{what}: {found} is neither a file nor a folder")


def check_output(path: Path, key: str, *, is_folder: bool = False) -> None:
    """Raise `UserError` about `key`, which names `path`, unless a file can be written there, or into a folder there.

    It leaves nothing behind.
    """
    with os_errors_of(f"{key} {path}"):
        if path.exists() and path.is_dir() != is_folder:
            raise UserError(f"{key} {path}: it is {'not ' if is_folder else ''}a folder")
        with suppress(FileNotFoundError):
            os.lstat(path if is_folder else f"{path}.unfinished.partial")  # the longest name that will be used there
        folder = path if is_folder else path.parent
        existing = next(folder for folder in (folder, *folder.absolute().parents) if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x" * 2**12)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, even after a kill, finds either the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say what it was full for
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
