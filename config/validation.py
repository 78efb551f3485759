"""Check values that come from a YAML, from JSON or from a command line, with pydantic and one-line messages."""

import functools
import json
import uuid
from collections.abc import Callable
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from errors import UserError, nearest

Path = tuple[str | int, ...]  # keys and list indices that lead from a whole value to a part of it

FORBID_UNKNOWN = ConfigDict(extra="forbid")  # for pydantic's dataclasses and models

# Former names of keys, from the published example or older releases, where the nearest name would mislead.
RENAMED = {
    "hyperparameters.model": "model_name",
    "training_args.evaluation_strategy": "eval_strategy",
    "training_args.warmup_ratio": "warmup_steps, where a number below 1 is a ratio",
    "training_args.group_by_length": "train_sampling_strategy: group_by_length",
}

# pydantic's error types: unknown keys, values of another kind (and what was expected), values out of bounds.
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
BOUNDS = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "share": "in (0, 1]",
}


def check_share(value: float) -> float:
    """Return `value`, a share of a whole; raise pydantic's error unless it is in (0, 1]."""
    if not 0 < value <= 1:
        raise PydanticCustomError("share", "Input should be in (0, 1]")
    return value


Share = Annotated[float, AfterValidator(check_share)]
Count = Annotated[int, Field(ge=1)]


def check_uuid(value: str, key: str) -> None:
    """Raise `UserError` unless `value` is a UUID.

    Determined's storage would take `""` for the whole store, and `../x` for a folder outside of it.
    """
    try:
        valid = str(uuid.UUID(value)) == value.lower()
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{key} {value!r} is not a checkpoint UUID (32 hexadecimal digits as 8-4-4-4-12)")


def validate(
    type_: Any,
    value: Any,
    key: str,
    *,
    strict: bool = True,
    name_key: Callable[[Path], str] | None = None,
    noun: str = "a hyperparameter",
) -> Any:
    """Return `value`, as YAML or JSON gives it, as a `type_`: a pydantic model, a dataclass or any other type hint.

    Args:
        key: The name of `value`; a part of it is named as in `key.part[0]`.
        strict: Whether a value must have the right type already (a whole number is a number, and the value of an enum
            stands for its member). If not, text is converted, as a command line needs it.
        name_key: Names the part at a path in `value`, if dotted names below `key` will not do.
        noun: What an unknown key is said not to be.

    Raises:
        UserError: The first thing that is wrong, in one line that names its key.
    """
    adapter = _adapter(type_)
    try:
        try:
            text = json.dumps(value)
        except TypeError:  # it holds something that JSON cannot express, such as a date: no field accepts one
            return adapter.validate_python(value)
        return adapter.validate_json(text, strict=strict)
    except ValidationError as error:
        name_key = name_key or functools.partial(dotted_key, key)
        raise UserError(_message(type_, value, error.errors(), name_key, noun)) from error


_adapter = functools.cache(TypeAdapter)


def dotted_key(key: str, path: Path) -> str:
    """Return the name of the part at `path` of what `key` names, as in `hyperparameters.datasets[0].ratio`."""
    return key + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)


def _message(type_: Any, value: Any, errors: list[ErrorDetails], name_key: Callable[[Path], str], noun: str) -> str:
    located = [(_path(value, error), error) for error in errors]
    # A misspelled key comes first: it is also why another one is missing.
    first, _ = min(located, key=lambda item: item[1]["type"] not in UNKNOWN)
    # A union has errors for each of its members. The member that the value was meant for was checked most deeply.
    path, error = max(
        (item for item in located if item[0][: len(first)] == first),
        key=lambda item: (len(item[0]), item[1]["type"] not in KINDS),
    )
    name, kind, given, context = name_key(path), error["type"], error["input"], error.get("ctx", {})
    if kind in UNKNOWN:
        hint = f" (now {RENAMED[name]})" if name in RENAMED else nearest(str(path[-1]), _field_names(type_, path))
        return f"{name} is not {noun}{hint}"
    if kind in KINDS:
        expected = dict.fromkeys(_expectation(e) for p, e in located if p == path and e["type"] in KINDS)
        return f"{name} is {given!r}, which is not {' or '.join(expected)}"
    if kind in BOUNDS:
        return f"{name} {given} is not {BOUNDS[kind].format(**context)}"
    if kind in ("missing", "too_short"):
        return f"{name} is {'missing' if kind == 'missing' else 'empty'}"
    text = str(context.get("error", error["msg"]))  # a validator's own
    return text if text.startswith(name) else f"{name}: {text}"


def _expectation(error: ErrorDetails) -> str:
    options = error.get("ctx", {}).get("expected", "")  # such as "'no', 'steps' or 'epoch'"
    return KINDS[error["type"]].format(expected=options.replace("'", "").replace(" or ", ", "))


def _path(value: Any, error: ErrorDetails) -> Path:
    """The path in `value` to what is wrong: pydantic's, without the names of union members in it."""
    path: list[str | int] = []
    for step in error["loc"]:
        if isinstance(value, list) if isinstance(step, int) else isinstance(value, dict) and step in value:
            value = value[step]  # type: ignore[index]
            path.append(step)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    return tuple(path)


def _field_names(hint: Any, path: Path) -> list[str]:
    """The names that could stand at the end of `path`, in a value of the type `hint`."""
    fields = getattr(hint, "__pydantic_fields__", None)
    names = [step for step in path if isinstance(step, str)]
    if fields is None:  # a union or a list, perhaps, of something that has them
        return [name for option in get_args(hint) for name in _field_names(option, path)]
    if len(names) == 1:
        return list(fields)
    return _field_names(fields[names[0]].annotation, tuple(names[1:])) if names[0] in fields else []
