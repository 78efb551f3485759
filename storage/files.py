"""Files that survive a kill and a power cut: written whole or not at all, or appended to a line at a time."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from errors import UserError, os_errors_of

BUNDLE = Path(__file__).resolve().parent.parent  # the project's own folder, wherever it was copied to


def path_component(name: str) -> str:
    """Return `name` as one that a file or folder can have: one part of a path, not hidden, at most 100 bytes long."""
    safe = re.sub(r"[^\w .+=@,()-]", "_", name).strip(". ").encode()[:100].decode(errors="ignore").rstrip(". ")
    return safe or "experiment"


def refuse_special_files(path: Path, what: str, pattern: str = "*") -> None:
    """Raise `UserError` about `what` if it is neither file nor folder, nor is what matches `pattern` in the folder.

    Reading a pipe or a device could wait or go on for ever.
    """
    with os_errors_of(what):
        for found in (path, *(path.glob(pattern) if path.is_dir() else ())):
            if found.exists() and not (found.is_file() or found.is_dir()):
                which = "it" if found == path else found
                raise UserError(f"{what}: {which} is neither a file nor a folder")


def check_output(path: Path, key: str, *, is_folder: bool = False) -> None:
    """Raise `UserError` about `key`, which names `path`, unless a file can be written there, or into a folder there.

    It leaves nothing behind.
    """
    with os_errors_of(f"{key} {path}"):
        for used in (path,) if is_folder else (path, Path(f"{path}.partial")):
            if used.exists() and not (used.is_dir() if is_folder else used.is_file()):
                wrong = "not a folder" if is_folder else "a folder" if used.is_dir() else "not a file"
                raise UserError(f"{key} {used}: it is {wrong}")
        with suppress(FileNotFoundError):
            os.lstat(path if is_folder else f"{path}.unfinished.partial")  # the longest name that will be used there
        folder = path if is_folder else path.parent
        existing = next(folder for folder in (folder, *folder.absolute().parents) if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x" * 2**12)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, even after a power cut, finds either the old content or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        flush_to_disk(partial)
        partial.replace(path)
        flush_to_disk(path.parent, within=False)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say what it was full for
        partial.unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path, within: bool = True) -> None:
    """Wait until a file, or a folder and what is `within` it, is on the disk."""
    for item in (*path.rglob("*"), path) if within else (path,):
        folder, descriptor = item.is_dir(), os.open(item, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not folder:  # some file systems of networks refuse it for folders
                raise
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append `row` to a JSON Lines file, on a line of its own even if a kill cut the last one short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def read_json(text: bytes) -> Any:
    """Return the value of a JSON text; None if it is none, as after a kill or a power cut, which leaves NUL bytes.

    Nor is one with a whole number that no float can hold, or half of a character, which no file can: nothing of this
    project writes them.
    """
    try:
        value = json.loads(text, parse_int=_whole_number)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError, OverflowError):
        return None


def _whole_number(digits: str) -> int:
    number = int(digits)
    float(number)  # may raise OverflowError
    return number


def read_json_lines(path: Path) -> list[Any]:
    """Return the value of each line of a JSON Lines file, None for a line that is not JSON; [] if there is no file."""
    refuse_special_files(path, str(path))
    with os_errors_of(path), suppress(FileNotFoundError, NotADirectoryError):
        return [read_json(line) for line in path.read_bytes().splitlines()]
    return []


def is_object(value: Any, fields: Mapping[str, Any]) -> bool:
    """Return whether a value read from JSON is an object with these fields, each of the type given."""
    return isinstance(value, dict) and all(isinstance(value.get(name), of) for name, of in fields.items())
