"""Experiment YAMLs read as Determined reads them: the CLI's loader and overrides, the master's grid, the entrypoint."""

import itertools
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from determined.cli.ntsc import parse_config_overrides
from determined.common.util import yaml_safe_load
from pydantic import Field, create_model

from config.validation import FORBID_UNKNOWN, Count, validate
from errors import UserError, nearest, one_line

# Determined's schema of an experiment (schemas/expconf/v0/experiment.json), which its master checks.
EXPERIMENT_KEYS = (
    "bind_mounts", "checkpoint_policy", "checkpoint_storage", "data", "data_layer", "debug", "description",
    "entrypoint", "environment", "hyperparameters", "integrations", "internal", "labels", "log_policies",
    "max_restarts", "min_checkpoint_period", "min_validation_period", "name", "optimizations", "pbs",
    "perform_initial_validation", "preemption_timeout", "profiling", "project", "records_per_epoch",
    "reproducibility", "resources", "retention_policy", "scheduling_unit", "searcher", "security", "slurm",
    "tensorboard_storage", "workspace",
)  # fmt: skip
# The keys of each type of hyperparameter that a search varies, beside `type`.
RANGE = create_model("Range", __config__=FORBID_UNKNOWN, minval=float, maxval=float, count=(Count | None, None))
SPACES = {
    "const": create_model("Const", __config__=FORBID_UNKNOWN, val=Any),
    "categorical": create_model("Categorical", __config__=FORBID_UNKNOWN, vals=Annotated[list, Field(min_length=1)]),
    "int": create_model("Int", __base__=RANGE, minval=int, maxval=int),
    "double": RANGE,
    "log": create_model("Log", __base__=RANGE, base=float),
}


def read_experiment_config(path: str, overrides: list[str] = ()) -> dict[str, Any]:
    """The YAML at `path` with `--config key=value` overrides, through the very functions `det e create` calls.

    (They read YAML 1.2: `1e-7` is a float, where PyYAML would see text.) Raises `UserError` for a file that is
    missing or no mapping, and for an override without `=`.
    """
    try:
        config = yaml_safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from error
    except Exception as error:  # ruamel's errors share no base class but Exception
        raise UserError(f"config {path}: not YAML: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"config {path}: not a mapping of keys")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"--config {override!r} is not key=value")
    try:
        config = parse_config_overrides(config, overrides)
    except Exception as error:
        raise UserError(f"--config: {one_line(error)}") from error
    for key in config:
        if key not in EXPERIMENT_KEYS:
            raise UserError(f"config {path}: {key} is no key of an experiment{nearest(key, EXPERIMENT_KEYS)}")
    for key in ("hyperparameters", "searcher"):
        if not isinstance(config.get(key), dict):
            raise UserError(f"config {path}: {key} is missing or no mapping")
    return config


def entrypoint_script(config: dict[str, Any]) -> list[str]:
    """The script that the config's entrypoint runs, and its arguments, without the launcher before it."""
    entrypoint = config.get("entrypoint", "")
    words = entrypoint if isinstance(entrypoint, list) else shlex.split(str(entrypoint))
    for index, word in enumerate(map(str, words)):
        if word.endswith(".py"):
            return words[index:]
    raise UserError(f"entrypoint {entrypoint!r} names no Python script")


def expand_trials(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The hyperparameters of each trial of a `single` or `grid` search, in the master's order.

    The master (determined/master/pkg/searcher/grid.go) walks the keys of each level in sorted order, the last one
    fastest. A list is a constant, a mapping with a `type` is a hyperparameter, and one without is a level of its own.
    """
    searcher = config["searcher"].get("name", "single")
    if searcher not in ("single", "grid"):
        raise UserError(f"searcher.name {searcher!r}: this machine runs single and grid; the others need a cluster")
    axes = list(_axes(config["hyperparameters"], "hyperparameters"))
    if searcher == "single":
        for key, values in axes:
            if values is None or len(values) > 1:
                raise UserError(f"{key} is a search space; set searcher.name: grid to try its values")
    for key, values in axes:
        if values is None:
            raise UserError(f"{key} needs a count for a grid search")
    return [
        _assemble(config["hyperparameters"], iter(point))
        for point in itertools.product(*(values for _, values in axes))
    ]


def varying_hyperparameters(config: dict[str, Any]) -> list[str]:
    """Dotted names of the hyperparameters that a search varies, as in `training_args.learning_rate`."""
    axes = _axes(config["hyperparameters"], "hyperparameters")
    return [key.removeprefix("hyperparameters.") for key, values in axes if values is None or len(values) > 1]


def _axes(level: dict[str, Any], path: str) -> Iterator[tuple[str, list[Any] | None]]:
    for name in sorted(level):
        value, key = level[name], f"{path}.{name}"
        if not isinstance(value, dict):
            continue
        if "type" in value:
            yield key, _axis(value, key)
        else:
            yield from _axes(value, key)


def _assemble(level: dict[str, Any], point: Iterator[Any]) -> dict[str, Any]:
    values = {}
    for name in sorted(level):
        value = level[name]
        if isinstance(value, dict):
            value = next(point) if "type" in value else _assemble(value, point)
        values[name] = value
    return {name: values[name] for name in level}


def _axis(space: dict[str, Any], key: str) -> list[Any] | None:
    """The grid points of one hyperparameter; None for a range without a `count`."""
    kind = str(space["type"])
    if kind not in SPACES:
        raise UserError(f"{key}.type {kind!r} is not one of {', '.join(SPACES)}")
    given = {name: value for name, value in space.items() if name != "type"}
    space = validate(SPACES[kind], given, key, noun=f"a key of a {kind} hyperparameter")
    if kind in ("const", "categorical"):
        return space.vals if kind == "categorical" else [space.val]
    low, high, count = space.minval, space.maxval, space.count
    if count is None:
        return None
    if kind == "int":
        count = min(count, high - low + 1)
    points = [(low + high) / 2] if count == 1 else [low + i * (high - low) / (count - 1) for i in range(count)]
    if kind == "int":
        return [math.floor(abs(point) + 0.5) * (1 if point >= 0 else -1) for point in points]  # as Go's math.Round
    return [space.base**point for point in points] if kind == "log" else points
