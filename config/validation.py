"""Check values from a YAML, from JSON or from a command line with pydantic, and report a mistake in one line."""

import functools
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from errors import UserError, nearest, shorten

KeyPath = tuple[str | int, ...]  # the keys and list indices that lead from a value to a part of it

FORBID_UNKNOWN = ConfigDict(extra="forbid", allow_inf_nan=False)  # for pydantic's dataclasses and models
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]  # of whatever is counted: beyond, libraries fail
NotEmpty = Annotated[str, Field(min_length=1)]
Beta = Annotated[float, Field(gt=0, le=1e6)]  # of DPO: a product with log-probs must stay finite
Share = Annotated[float, Field(gt=0, le=1)]
PartialShare = Annotated[float, Field(gt=0, lt=1)]

# Former names of keys, from the published example or older releases, where the nearest name would mislead.
RENAMED = {
    "hyperparameters.model": "model_name",
    "hyperparameters.lora.rank": "r",
    "hyperparameters.training_args.evaluation_strategy": "eval_strategy",
    "hyperparameters.training_args.warmup_ratio": "warmup_steps, where a number below 1 is a ratio",
    "hyperparameters.training_args.group_by_length": "train_sampling_strategy: group_by_length",
}
# pydantic's types of errors: a key that no field has; a value of the wrong kind, and which one was expected.
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
KINDS = {
    "string_type": "text",
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("dict_type", "model_type", "dataclass_type"), "a mapping"),
    "list_type": "a list, as in [a, b]",
    **dict.fromkeys(("enum", "literal_error"), "one of {expected}"),
}

_adapter = functools.cache(TypeAdapter)


def is_uuid(value: Any) -> bool:
    """Return whether `value` is the text of a UUID: to Determined's storage, `""` would mean the whole store."""
    pattern = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    return isinstance(value, str) and bool(re.fullmatch(pattern, value, re.IGNORECASE))


def check_uuid(value: str, key: str) -> None:
    """Raise `UserError` unless `value` is a UUID."""
    if not is_uuid(value):
        raise UserError(f"{key} {value!r} is not a checkpoint UUID (32 hexadecimal digits as 8-4-4-4-12)")


def validate(
    type_: Any,
    value: Any,
    key: str,
    *,
    strict: bool = True,
    name_key: Callable[[KeyPath], str] | None = None,
    noun: str = "a hyperparameter",
) -> Any:
    """Return `value` as a `type_`: a pydantic model, a dataclass or any other type hint.

    Args:
        key: The name of `value`. A part of it is named as in `key.part[0]`, or as `name_key` names its path.
        strict: Accept values of the right type only, as YAML and JSON have them: a whole number is also a number, and
            an enum's value stands for its member. Otherwise text is converted, as for a command line.
        noun: What an unknown key fails to be, as in "x is not a hyperparameter".

    Raises `UserError` for the first mistake, in one line that names its key.
    """
    adapter = _adapter(type_)
    try:
        try:
            text = json.dumps(value)
        except TypeError:  # it holds something that JSON cannot express, such as a date
            return adapter.validate_python(value)
        return adapter.validate_json(text, strict=strict)
    except ValidationError as error:
        raise UserError(_message(type_, value, error, name_key or functools.partial(dotted, key), noun)) from error


def dotted(key: str, path: KeyPath) -> str:
    """Return the name of the part of `key` that `path` leads to, as in `hyperparameters.datasets[0].ratio`."""
    parts = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return key + parts if key else parts.removeprefix(".")


def _message(type_: Any, value: Any, invalid: ValidationError, name_key: Callable[[KeyPath], str], noun: str) -> str:
    errors = [(_path(value, error), error) for error in invalid.errors()]
    # A misspelled key comes first, as it is also why another one is missing.
    first, _ = min(errors, key=lambda item: item[1]["type"] not in UNKNOWN)
    # Each member of a union has errors of its own. The member that was meant is the one that was checked most deeply.
    inside = [item for item in errors if item[0][: len(first)] == first]
    path, error = max(inside, key=lambda item: (len(item[0]), item[1]["type"] not in KINDS))
    name, kind, context = name_key(path), error["type"], error.get("ctx", {})
    if kind in UNKNOWN:
        hint = f" (now {RENAMED[name]})" if name in RENAMED else nearest(str(path[-1]), _fields_at(type_, path))
        return f"{name} is not {noun}{hint}"
    if kind in KINDS:
        kinds = dict.fromkeys(_kind(error) for other, error in inside if other == path)
        given = "null" if error["input"] is None else shorten(repr(error["input"]), 100)
        choices = ", ".join(error.get("ctx", {}).get("expected", "") for _, error in inside)
        hint = nearest(given.strip("'"), re.findall("'([^']+)'", choices))
        return f"{name} is {given}, which is not {' or '.join(kinds)}{hint}"
    if kind in ("missing", "too_short", "string_too_short"):
        return f"{name} is {'missing' if kind == 'missing' else 'empty'}"
    if "error" in context:  # raised by a check of ours
        # It begins with the whole key, with the rest of it (`.part`), or with neither.
        text = str(context["error"])
        return text if text.startswith(name) else f"{name}{'' if text.startswith('.') else ': '}{text}"
    bound = error["msg"].removeprefix("Input should be ").replace("greater than or equal to", "at least")
    return f"{name} {error['input']} is not {bound.replace('less than or equal to', 'at most')}"


def _kind(error: ErrorDetails) -> str:
    expected = error.get("ctx", {}).get("expected", "")  # such as "'no', 'steps' or 'epoch'"
    return KINDS[error["type"]].format(expected=shorten(expected.replace("'", "").replace(" or ", ", "), 150))


def _path(value: Any, error: ErrorDetails) -> KeyPath:
    """The path to what is wrong in `value`: pydantic's, without the names of union members that it contains."""
    path: list[str | int] = []
    for step in error["loc"]:
        known = step in value if isinstance(value, dict) else isinstance(value, list) and isinstance(step, int)
        if known:
            value = value[step]
            path.append(step)
    return (*path, error["loc"][-1]) if error["type"] == "missing" else tuple(path)


def _fields_at(hint: Any, path: KeyPath) -> list[str]:
    """The names that a value of the type `hint` knows where `path` ends in an unknown one."""
    fields = getattr(hint, "__pydantic_fields__", None) or getattr(hint, "__dataclass_fields__", None)
    if fields is None:  # perhaps a union or a list of something that has them
        return [name for option in get_args(hint) for name in _fields_at(option, path)]
    name, *rest = [step for step in path if isinstance(step, str)]
    if rest:
        return _fields_at(getattr(fields.get(name), "annotation", None), tuple(rest))
    return list(fields)
