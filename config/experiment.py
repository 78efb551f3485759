"""Read experiment YAMLs as Determined does: the CLI's loader and overrides, the master's grid, the entrypoint."""

import itertools
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from config.experiment_keys import check_experiment
from config.search import DEFAULT_SEED, DRAWING, Space, check_space, count_trials, draw
from config.validation import KeyPath, dotted
from config.yaml_files import check_values, override, read_yaml
from errors import CommandLine, UserError, about, at_least, reading

MOST_TRIALS = 1000
OUR_SCRIPTS = ("sft_finetune.py", "dpo_finetune.py")


def read_experiment_config(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the YAML at `path` with `--config key=value` overrides, as `det e create` reads them and a master checks.

    Raises `UserError`, which names the file and the key, for a file that is missing or not an experiment.
    """
    with about(path or "''"):
        config = read_yaml(path)
    config = override(config, overrides)
    with about(path):
        check_values(config)
        check_experiment(config)
    return config


def entrypoint_script(config: dict[str, Any]) -> list[str]:
    """Return the script that the config's entrypoint runs, and its arguments, without the launcher before it."""
    entrypoint = config.get("entrypoint", "")
    with reading(f"entrypoint {entrypoint!r}"):
        words = entrypoint if isinstance(entrypoint, list) else shlex.split(str(entrypoint))
        if words and str(words[0]).endswith("sh") and "-c" in words[:-1]:  # a shell's command
            words = shlex.split(words[words.index("-c") + 1])
    for index, word in enumerate(map(str, words)):
        if word.endswith(".py"):
            if Path(word).name in OUR_SCRIPTS:
                with about(f"entrypoint {entrypoint!r}"):
                    _options_of_ours().parse_args([word for word in words[index + 1 :] if word != "--debug"])
            return words[index:]
    raise UserError(f"entrypoint {entrypoint!r} names no Python script")


def _options_of_ours() -> CommandLine:
    """The options of our scripts. (Off the cluster they are the runner's to give, on it there are none.)"""
    parser = CommandLine(None, add_help=False)
    for name in ("--config", "--output", "--cache", "--search"):
        parser.add_argument(name)
    parser.add_argument("--trial-id", type=at_least(1))
    return parser


def expand_trials(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the hyperparameters of each trial of a search, in the master's order; of other searches than the grid,
    what they draw with `reproducibility.experiment_seed`, by default DEFAULT_SEED (see config/search.py).

    In a grid the master (determined/master/pkg/searcher/grid.go) sorts the keys of each level and varies the last one
    fastest. A list is a constant, a mapping with a `type` is a hyperparameter, and one without is a level of its own.
    """
    searcher, hyperparameters = config["searcher"], config["hyperparameters"]
    name = searcher.get("name", "single")
    keys = {path: dotted("hyperparameters", path) for path, _ in _spaces(hyperparameters)}
    spaces = {path: check_space(given, keys[path]) for path, given in _spaces(hyperparameters)}
    if name in DRAWING:
        for path, space in spaces.items():
            _check_ends(space, keys[path])
        if (count := count_trials(searcher)) > MOST_TRIALS:
            raise UserError(f"searcher.max_trials {count} is more than the {MOST_TRIALS} that this machine runs")
        given = (config.get("reproducibility") or {}).get("experiment_seed")
        points = draw(spaces, count, DEFAULT_SEED if given is None else given)
        return [_at_point(hyperparameters, point) for point in points]
    axes: dict[KeyPath, list[Any]] = {}
    for path, space in spaces.items():
        values, key = _axis(space, keys[path]), keys[path]
        if name == "single" and (values is None or len(values) > 1):
            raise UserError(f"{key} is a search space; set searcher.name: grid to try its values")
        if values is None:
            raise UserError(f"{key} needs a count for a grid search")
        axes[path] = values
    if (count := math.prod(map(len, axes.values()))) > MOST_TRIALS:
        raise UserError(f"hyperparameters: their grid has {count} trials, more than {MOST_TRIALS}")
    grid = itertools.product(*axes.values())
    return [_at_point(hyperparameters, dict(zip(axes, point, strict=True))) for point in grid]


def varying_hyperparameters(config: dict[str, Any]) -> list[str]:
    """Return dotted names of the hyperparameters that a search varies, as in `training_args.learning_rate`."""
    spaces = _spaces(config["hyperparameters"])
    return [dotted("", path) for path, space in spaces if space.get("type", "const") != "const" and not _is_one(space)]


def drawn_ranges(config: dict[str, Any]) -> dict[str, str]:
    """Return the type, double or log, of each hyperparameter that is drawn from such a range, by its dotted name."""
    if config["searcher"].get("name") not in DRAWING:
        return {}
    types = {dotted("", path): space.get("type") for path, space in _spaces(config["hyperparameters"])}
    return {name: kind for name, kind in types.items() if kind in ("double", "log")}


def _is_one(space: dict[str, Any]) -> bool:
    return space.get("count") == 1 or len(space.get("vals", "several")) == 1


def _spaces(level: dict[str, Any], above: KeyPath = ()) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """The path and the value of each hyperparameter that has a `type`, or the other keys of one that has."""
    for name in sorted(level):
        value, path = level[name], (*above, name)
        if isinstance(value, dict) and value.keys() & {"type", "vals", "minval", "maxval"}:
            yield path, value
        elif isinstance(value, dict):
            yield from _spaces(value, path)


def _at_point(value: Any, point: dict[KeyPath, Any], path: KeyPath = ()) -> Any:
    """`value`, which is at `path`, with the values at `point` in place of the hyperparameters that have a `type`."""
    if path in point:
        return point[path]
    return {k: _at_point(v, point, (*path, k)) for k, v in value.items()} if isinstance(value, dict) else value


def _check_ends(space: Space, key: str) -> None:
    """Raise `UserError` for a range whose ends, or how far they are apart, are no finite numbers."""
    if space.kind in ("double", "log"):
        _axis(Space(space.kind, space.keys.model_copy(update={"count": 2})), key)


def _axis(space: Space, key: str) -> list[Any] | None:
    """The grid points of one hyperparameter; None for a range without a `count`."""
    kind, keys = space
    if kind in ("const", "categorical"):
        return keys.vals if kind == "categorical" else [keys.val]
    low, high, count = keys.minval, keys.maxval, keys.count
    if count is None:
        return None
    if kind == "int":
        count = min(count, high - low + 1)
    if count > MOST_TRIALS:
        raise UserError(f"{key}.count {count} is more than the {MOST_TRIALS} trials of a grid")
    points = [(low + high) / 2] if count == 1 else [low + i * (high - low) / (count - 1) for i in range(count)]
    if kind == "int":
        return [math.floor(abs(point) + 0.5) * (1 if point >= 0 else -1) for point in points]  # as Go's math.Round
    with suppress(OverflowError):
        points = [keys.base**point for point in points] if kind == "log" else points
        if all(map(math.isfinite, points)) and len(set(points)) == count:
            return points
    raise UserError(f"{key}: its values are not {count} different finite numbers")
