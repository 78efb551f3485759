"""Read a YAML file as Determined's CLI does, and refuse in one line what its master could not keep."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from determined.cli.ntsc import parse_config_overrides
from determined.common.util import yaml_safe_load

from config.validation import KeyPath, dotted
from errors import UserError, one_line, os_errors_of, shorten

LARGEST_FILE = 250_000  # bytes, which take two seconds to read
MOST_VALUES = 50_000  # with what aliases (*name) repeat
DEEPEST = 50  # levels


def read_yaml(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping at `path` with `key=value` overrides, read by the functions that `det e create` calls.

    They read YAML 1.2: `1e-7` is a float, where PyYAML would see text. Raises `UserError` for a file that holds no
    mapping, for a value that JSON does not have and for an override that is not `key=value`.
    """
    with os_errors_of(path or "''"):
        if Path(path).exists() and not Path(path).is_file():  # a folder; a pipe or a device, which may never end
            raise UserError("is not a file")
        with Path(path).open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
    if len(text) > LARGEST_FILE:
        raise UserError(f"is larger than {LARGEST_FILE // 1000} kB")
    with _yaml_errors():
        config = yaml_safe_load(text.decode())
    if not isinstance(config, dict):
        raise UserError("is empty" if config is None else "is not a mapping of keys")
    _check_values(config, (), iter(range(MOST_VALUES)))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise UserError(f"--config {override!r} is not key=value")
        if not all(key.split(".")):
            raise UserError(f"--config {override!r}: {key!r} is not a key, or keys with dots between them")
        with _yaml_errors(f"--config {override!r}: "):
            config = parse_config_overrides(config, [override])
    _check_values(config, (), iter(range(MOST_VALUES)))
    return config


@contextmanager
def _yaml_errors(prefix: str = "") -> Iterator[None]:
    """Turn what the YAML reader raises into a `UserError` with the line and the column. (Its errors have no base.)"""
    try:
        yield
    except Exception as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else "not YAML: "
        problem = one_line(problem).replace('in "<unicode string>", ', "at ")
        raise UserError(f"{prefix}{place}{shorten(problem)}") from error


def _check_values(value: Any, path: KeyPath, left: Iterator[int]) -> None:
    """Raise `UserError` unless JSON has `value`, which is at `path`: a master keeps it as JSON."""
    name = dotted("", path).removeprefix(".")
    if len(path) > DEEPEST or next(left, None) is None:
        raise UserError(f"{shorten(name, 60)}: too many values, or levels (does an alias, *name, repeat itself?)")
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict):
                _check_text(key, f"{name}: the key {key!r}")
            _check_values(part, (*path, key), left)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}, which is not a finite number")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{name} is a number of more than 64 bits")
    elif value is not None and not isinstance(value, int | float):
        _check_text(value, f"{name} is {value!r}, which")


def _check_text(value: Any, what: str) -> None:
    what = shorten(what.removeprefix(": "), 100)
    if not isinstance(value, str):
        raise UserError(f"{what} is not text: put it in quotes")
    if "\0" in value or (not value.isascii() and any(0xD800 <= ord(character) < 0xE000 for character in value)):
        raise UserError(f"{what} holds a character that no text can have")
