"""YAML, overrides and grids as Determined sees them."""

import pytest

from config.experiment import entrypoint_script, expand_trials, read_experiment_config, varying_hyperparameters
from errors import UserError


def grid(**hyperparameters):
    return {"searcher": {"name": "grid"}, "hyperparameters": hyperparameters}


def test_numbers_are_yaml_1_2(tmp_path):
    """PyYAML would read `1e-7` as text and `no` as false; Determined's loader does not."""
    path = tmp_path / "c.yaml"
    path.write_text("searcher: {name: single}\nhyperparameters: {learning_rate: 1e-7, eval_strategy: no}\n")
    assert read_experiment_config(str(path))["hyperparameters"] == {"learning_rate": 1e-7, "eval_strategy": "no"}


def test_overrides_reach_nested_keys_and_lists(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("searcher: {}\nhyperparameters:\n  a: {b: 1, c: 2}\n  subsets: [{subset: x, ratio: 1}]\n")
    overrides = ["hyperparameters.a.b=5e-7", "hyperparameters.subsets=[{subset: y, number_of_samples: 3}]", "name=new"]
    config = read_experiment_config(str(path), overrides)
    assert config["hyperparameters"]["a"] == {"b": 5e-7, "c": 2}
    assert config["hyperparameters"]["subsets"] == [{"subset": "y", "number_of_samples": 3}]
    assert config["name"] == "new"


def test_grid_walks_sorted_keys_the_last_fastest():
    config = grid(
        b={"type": "categorical", "vals": [1, 2]},
        a={"z": {"type": "categorical", "vals": ["x", "y"]}, "fixed": [1, 2]},
        c="constant",
    )
    trials = expand_trials(config)
    assert [(t["a"]["z"], t["b"]) for t in trials] == [("x", 1), ("x", 2), ("y", 1), ("y", 2)]
    assert all(t["c"] == "constant" and t["a"]["fixed"] == [1, 2] for t in trials)
    assert varying_hyperparameters(config) == ["a.z", "b"]
    ranges = grid(a={"type": "double", "minval": 0, "maxval": 1}, b=2)  # of a random search, without a count
    assert varying_hyperparameters(ranges) == ["a"]


@pytest.mark.parametrize(
    ("space", "values"),
    [
        ({"type": "const", "val": 3}, [3]),
        ({"type": "int", "minval": 1, "maxval": 3, "count": 9}, [1, 2, 3]),
        ({"type": "int", "minval": 0, "maxval": 5, "count": 3}, [0, 3, 5]),
        ({"type": "int", "minval": 1, "maxval": 4, "count": 1}, [3]),
        ({"type": "double", "minval": 0.0, "maxval": 1.0, "count": 3}, [0.0, 0.5, 1.0]),
        ({"type": "log", "base": 10, "minval": -3, "maxval": -1, "count": 3}, [1e-3, 1e-2, 1e-1]),
    ],
)
def test_axes(space, values):
    assert [trial["h"] for trial in expand_trials(grid(h=space))] == pytest.approx(values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (grid(h={"type": "double", "minval": 0, "maxval": 1}), "hyperparameters.h needs a count"),
        (grid(h={"type": "categorical"}), "hyperparameters.h.vals is missing"),
        (grid(h={"type": "categorical", "vals": []}), "hyperparameters.h.vals is empty"),
        (
            grid(h={"type": "int", "minval": 1, "maxval": 2, "count": "3"}),
            "hyperparameters.h.count is '3', which is not a whole number",
        ),
        (grid(h={"type": "int", "minval": 1, "maxval": 2, "count": 0}), "hyperparameters.h.count 0 is not at least 1"),
        (grid(h={"type": "gaussian"}), "hyperparameters.h.type 'gaussian' is not one of const, categorical"),
        (grid(h={"type": "categorical", "vals": [1], "val": 2}), r"h.val is not a key of a categorical .*mean 'vals'"),
        (
            grid(h={"type": "log", "base": 1, "minval": 1, "maxval": 2, "count": 2}),
            "hyperparameters.h: its values are not 2 different finite numbers",
        ),
        (
            {**grid(h={"type": "categorical", "vals": [1, 2]}), "searcher": {"name": "single"}},
            "hyperparameters.h is a search space",
        ),
    ],
)
def test_search_errors(config, message):
    with pytest.raises(UserError, match=message):
        expand_trials(config)


def test_entrypoint_script_is_found_behind_a_launcher():
    launched = "python -m determined.launch.torch_distributed python own.py --flag"
    assert entrypoint_script({"entrypoint": launched}) == ["own.py", "--flag"]
    assert entrypoint_script({"entrypoint": launched.replace("python ", "python3 ")}) == ["own.py", "--flag"]
    for words in ('bash -c "python sft_finetune.py --debug"', ["/bin/sh", "-c", "python sft_finetune.py --debug"]):
        assert entrypoint_script({"entrypoint": words}) == ["sft_finetune.py", "--debug"]
    assert entrypoint_script({"entrypoint": ["python3", "train.py"]}) == ["train.py"]
    with pytest.raises(UserError, match="names no Python script"):
        entrypoint_script({"entrypoint": "bash run.sh"})
    with pytest.raises(UserError, match="entrypoint 5 names no Python script"):
        entrypoint_script({"entrypoint": 5})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--bogus 1", "--bogus: no such option"),
        ("--trial-id zero", "argument --trial-id: 'zero' is not a whole number of at least 1"),
        ("extra", "unrecognized arguments: extra"),
        ("-h", "unrecognized arguments: -h"),
    ],
)
def test_our_scripts_know_their_arguments(arguments, message):
    entrypoint = f"python sft_finetune.py {arguments}"
    with pytest.raises(UserError, match=message):
        entrypoint_script({"entrypoint": entrypoint})


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [1", [], "c.yaml: line 1, column 6: expected .,. or .\]., but got"),
        ("- a\n", [], "not a mapping"),
        ("name: x\n", [], "hyperparameters is missing"),
        ("hyperparameters: {}\nsearcher: grid\n", [], "searcher is 'grid', which is not a mapping"),
        (
            "hyperparameters: {}\nsearcher: {}\n",
            ["hyperparameter.a=1"],
            r"hyperparameter is not a key of an experiment .*'hyperparameters'",
        ),
        ("hyperparameters: {}\n", ["a.b"], "'a.b' is not key=value"),
    ],
)
def test_config_errors(tmp_path, text, overrides, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_experiment_config(str(tmp_path / "c.yaml"), overrides)


def test_missing_config_is_named():
    with pytest.raises(UserError, match="nope: No such file"):
        read_experiment_config("nope")
