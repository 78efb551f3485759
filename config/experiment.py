"""Read experiment YAMLs as Determined does: the CLI's loader and overrides, the master's grid, the entrypoint."""

import itertools
import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from determined.cli.ntsc import parse_config_overrides
from determined.common.util import yaml_safe_load
from pydantic import Field, create_model

from config.validation import FORBID_UNKNOWN, Count, KeyPath, dotted, validate
from errors import UserError, one_line

# Determined's schema of an experiment (schemas/expconf/v0/experiment.json): its master checks it, the CLI has no copy.
EXPERIMENT_KEYS = (
    "bind_mounts", "checkpoint_policy", "checkpoint_storage", "data", "data_layer", "debug", "description",
    "entrypoint", "environment", "hyperparameters", "integrations", "internal", "labels", "log_policies",
    "max_restarts", "min_checkpoint_period", "min_validation_period", "name", "optimizations", "pbs",
    "perform_initial_validation", "preemption_timeout", "profiling", "project", "records_per_epoch",
    "reproducibility", "resources", "retention_policy", "scheduling_unit", "searcher", "security", "slurm",
    "tensorboard_storage", "workspace",
)  # fmt: skip
FIELDS: Any = dict.fromkeys(EXPERIMENT_KEYS, (Any, None)) | {"hyperparameters": dict, "searcher": dict}
EXPERIMENT = create_model("Experiment", __config__=FORBID_UNKNOWN, **FIELDS)
# The keys of each type of hyperparameter that a search varies, beside `type`.
RANGE = create_model("Range", __config__=FORBID_UNKNOWN, minval=float, maxval=float, count=(Count | None, None))
SPACES = {
    "const": create_model("Const", __config__=FORBID_UNKNOWN, val=Any),
    "categorical": create_model("Categorical", __config__=FORBID_UNKNOWN, vals=Annotated[list, Field(min_length=1)]),
    "int": create_model("Int", __base__=RANGE, minval=int, maxval=int),
    "double": RANGE,
    "log": create_model("Log", __base__=RANGE, base=float),
}


def read_experiment_config(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the YAML at `path` with `--config key=value` overrides, read by the functions that `det e create` calls.

    They read YAML 1.2: `1e-7` is a float, where PyYAML would see text. Raises `UserError` for a file that is missing
    or not an experiment, and for an override that is not `key=value`.
    """
    try:
        config = yaml_safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from error
    except Exception as error:  # ruamel's errors have no base class but Exception
        raise UserError(f"config {path}: not YAML: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"config {path}: not a mapping of keys")
    if wrong := [override for override in overrides if "=" not in override]:
        raise UserError(f"--config {wrong[0]!r} is not key=value")
    try:
        config = parse_config_overrides(config, overrides)
    except Exception as error:
        raise UserError(f"--config: {one_line(error)}") from error
    validate(EXPERIMENT, config, "", name_key=lambda keys: f"config {path}: {keys[0]}", noun="a key of an experiment")
    return config


def entrypoint_script(config: dict[str, Any]) -> list[str]:
    """Return the script that the config's entrypoint runs, and its arguments, without the launcher before it."""
    entrypoint = config.get("entrypoint", "")
    words = entrypoint if isinstance(entrypoint, list) else shlex.split(str(entrypoint))
    for index, word in enumerate(map(str, words)):
        if word.endswith(".py"):
            return words[index:]
    raise UserError(f"entrypoint {entrypoint!r} names no Python script")


def expand_trials(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the hyperparameters of each trial of a `single` or `grid` search, in the master's order.

    The master (determined/master/pkg/searcher/grid.go) sorts the keys of each level and varies the last one fastest. A
    list is a constant, a mapping with a `type` is a hyperparameter, and one without is a level of its own.
    """
    searcher = config["searcher"].get("name", "single")
    if searcher not in ("single", "grid"):
        raise UserError(f"searcher.name {searcher!r}: this machine runs single and grid; the others need a cluster")
    axes: dict[KeyPath, list[Any]] = {}
    for path, values in _axes(config["hyperparameters"]):
        key = dotted("hyperparameters", path)
        if searcher == "single" and (values is None or len(values) > 1):
            raise UserError(f"{key} is a search space; set searcher.name: grid to try its values")
        if values is None:
            raise UserError(f"{key} needs a count for a grid search")
        axes[path] = values
    points = (dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values()))
    return [_at_point(config["hyperparameters"], point) for point in points]


def varying_hyperparameters(config: dict[str, Any]) -> list[str]:
    """Return dotted names of the hyperparameters that a search varies, as in `training_args.learning_rate`."""
    axes = _axes(config["hyperparameters"])
    return [dotted("", path)[1:] for path, values in axes if values is None or len(values) > 1]


def _axes(level: dict[str, Any], above: KeyPath = ()) -> Iterator[tuple[KeyPath, list[Any] | None]]:
    """The path of each hyperparameter that has a `type`, and its grid points (see `_axis`)."""
    for name in sorted(level):
        value, path = level[name], (*above, name)
        if isinstance(value, dict) and "type" in value:
            yield path, _axis(value, dotted("hyperparameters", path))
        elif isinstance(value, dict):
            yield from _axes(value, path)


def _at_point(value: Any, point: dict[KeyPath, Any], path: KeyPath = ()) -> Any:
    """`value`, which is at `path`, with the values at `point` in place of the hyperparameters that have a `type`."""
    if path in point:
        return point[path]
    return {k: _at_point(v, point, (*path, k)) for k, v in value.items()} if isinstance(value, dict) else value


def _axis(space: dict[str, Any], key: str) -> list[Any] | None:
    """The grid points of one hyperparameter; None for a range without a `count`."""
    kind = str(space["type"])
    if kind not in SPACES:
        raise UserError(f"{key}.type {kind!r} is not one of {', '.join(SPACES)}")
    given = {name: value for name, value in space.items() if name != "type"}
    checked = validate(SPACES[kind], given, key, noun=f"a key of a {kind} hyperparameter")
    if kind in ("const", "categorical"):
        return checked.vals if kind == "categorical" else [checked.val]
    low, high, count = checked.minval, checked.maxval, checked.count
    if count is None:
        return None
    if kind == "int":
        count = min(count, high - low + 1)
    points = [(low + high) / 2] if count == 1 else [low + i * (high - low) / (count - 1) for i in range(count)]
    if kind == "int":
        return [math.floor(abs(point) + 0.5) * (1 if point >= 0 else -1) for point in points]  # as Go's math.Round
    return [checked.base**point for point in points] if kind == "log" else points
