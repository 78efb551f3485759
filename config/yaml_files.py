"""Read a YAML file as Determined's CLI does, and refuse in one line what its master could not keep."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from determined.cli.ntsc import parse_config_overrides
from determined.common.util import yaml_safe_load

from config.validation import KeyPath, dotted
from errors import UserError, one_line, shorten

LARGEST_FILE = 250_000  # bytes, which take two seconds to read
MOST_VALUES = 50_000  # with what aliases (*name) repeat
DEEPEST = 50  # levels
MOST_BRACKETS = 200  # open ones; the reader takes minutes for ten thousand


def read_yaml(path: str) -> dict[str, Any]:
    """Return the mapping at `path`, read by the function that `det e create` calls.

    It reads YAML 1.2: `1e-7` is a float, where PyYAML would see text. Raises `UserError` for a file that holds no
    mapping, and for a value that JSON does not have.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # a folder; a pipe or a device, which may never end
            raise UserError("not a file")
        with Path(path).open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(str(error.strerror or error)) from error
    if len(content) > LARGEST_FILE:
        raise UserError(f"larger than {LARGEST_FILE // 1000} kB")
    with _yaml_errors():
        text = content.decode()
        _refuse_many_brackets(text)
        config = yaml_safe_load(text)
    if not isinstance(config, dict):
        raise UserError("empty" if config is None else "not a mapping of keys")
    check_values(config)
    return config


def override(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `config` with `key=value` overrides. Raises `UserError`, which names the override that is wrong."""
    for text in overrides:
        option, (key, equals, _) = f"--config {shorten(repr(text), 100)}", text.partition("=")
        if not equals:
            raise UserError(f"{option} is not key=value")
        *levels, last = key.split(".")
        if not (last and all(levels)):
            raise UserError(f"{option}: {key!r} is not a key, or keys with dots between them")
        above: Any = config
        for number, level in enumerate(levels, start=1):
            above = above.get(level) or {}  # null has no keys yet
            if not isinstance(above, dict):
                raise UserError(f"{option}: {'.'.join(levels[:number])} is not a mapping, so it has no keys")
        try:
            with _yaml_errors(f"{option}: "):
                _refuse_many_brackets(text)
                config = parse_config_overrides(config, [text])
        except UserError as error:
            if isinstance(error.__cause__, TypeError):
                raise UserError(f"{option}: a mapping cannot replace the value of {key}") from error
            raise
    return config


def _refuse_many_brackets(text: str) -> None:
    open_brackets = itertools.accumulate((character in "[{") - (character in "]}") for character in text)
    if max(open_brackets, default=0) > MOST_BRACKETS:
        raise ValueError(f"more than {MOST_BRACKETS} brackets are open")


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


def check_values(config: dict[str, Any]) -> None:
    """Raise `UserError` for a value that JSON does not have, as a master keeps a config as JSON, and for too many."""
    _check_value(config, (), iter(range(MOST_VALUES)))


def _check_value(value: Any, path: KeyPath, left: Iterator[int]) -> None:
    name = dotted("", path).removeprefix(".")
    if len(path) > DEEPEST or next(left, None) is None:
        raise UserError(f"{path[0]}: too many values, or levels (does an alias, *name, repeat itself?)")
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict):
                _check_text(key, f"{name}: the key {key!r}")
            _check_value(part, (*path, key), left)
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
