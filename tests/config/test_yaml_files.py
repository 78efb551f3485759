"""Files and overrides that are no experiment end in one line that names the file and the place, or the option."""

import os
import sys
from pathlib import Path

import pytest
from conftest import REPO

import local_experiment
from config.experiment import read_experiment_config
from errors import UserError
from storage.files import path_component

VALID = "name: x\nsearcher: {name: single, metric: eval_loss}\nhyperparameters: {a: 1}\n"


def billion_laughs() -> str:
    levels = [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefg", "bcdefgh", strict=True)
    ]
    return "\n".join(["data:", *(f"  {level}" for level in ["a: &a [x]", *levels])]) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("- a\n", "not a mapping of keys"),
        ("text", "not a mapping of keys"),
        ("a: [1\n", "line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        (VALID + "name: y\n", 'line 4, column 1: found duplicate key "name" with value "y" (original value: "x")'),
        (VALID + "\tdebug: true\n", "line 4, column 1: found character '\\t' that cannot start any token"),
        ("a: *b\n", "line 1, column 4: found undefined alias 'b'"),
        ("a: !!python/object:os.system x\n", "line 1, column 4: could not determine a constructor for the tag"),
        ("---\na: 1\n---\na: 2\n", "line 3, column 1: but found another document"),
        (b"a: \xe9\n", "not YAML: 'utf-8' codec can't decode byte 0xe9 in position 3"),
        ("a: \0\n", "not YAML: unacceptable character #x0000: special characters are not allowed at position 3"),
        ("[" * 100_000, "not YAML: more than 200 brackets are open"),
        ("- " * 100_000, "not YAML: maximum recursion depth exceeded"),
        ("a: " + "9" * 5000, "not YAML: Exceeds the limit (4300 digits) for integer string conversion"),
        ("a: &b [*b]\n", "a: too many values, or levels (does an alias, *name, repeat itself?)"),
        (VALID + billion_laughs(), "data: too many values, or levels (does an alias, *name, repeat itself?)"),
        (VALID + "#" * 250_000, "larger than 250 kB"),
        (VALID + "1: 2\n", "the key 1 is not text: put it in quotes"),
        (VALID + "data: {null: 2}\n", "data: the key None is not text: put it in quotes"),
        (
            VALID + "description: 2024-01-01\n",
            "description is datetime.date(2024, 1, 1), which is not text: put it in",
        ),
        (VALID + 'description: "a\\0"\n', "description is 'a\\x00', which holds a character that no text can have"),
        (VALID + 'description: "\\ud800"\n', "description is '\\ud800', which holds a character that no text can have"),
        (VALID + "data: {a: [1, .nan]}\n", "data.a[1] is nan, which is not a finite number"),
        (VALID + "data: {a: 1e400}\n", "data.a is inf, which is not a finite number"),
        (VALID + "data: {a: 9223372036854775808}\n", "data.a is a number of more than 64 bits"),
    ],
)
def test_a_file_that_is_no_experiment(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_experiment_config(str(path))
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opened, it would wait for a writer
    for name, message in [
        ("", "not a file"),
        ("pipe", "not a file"),
        ("none", "No such file"),
        ("x" * 300, "name too"),
    ]:
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            read_experiment_config(str(tmp_path / name))


def test_aliases_and_merged_keys_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text(VALID + "data:\n  a: &a {b: 1}\n  c: {<<: *a, d: *a}\n")
    assert read_experiment_config(str(tmp_path / "c.yaml"))["data"]["c"] == {"b": 1, "d": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("", "--config '' is not key=value"),
        ("=5", "--config '=5': '' is not a key, or keys with dots between them"),
        ("a..b=1", "--config 'a..b=1': 'a..b' is not a key, or keys with dots between them"),
        ("a.=1", "--config 'a.=1': 'a.' is not a key, or keys with dots between them"),
        ("name.first=1", "--config 'name.first=1': name is not a mapping, so it has no keys"),
        ("name=[1", "--config 'name=[1': line 1, column 3: expected ',' or ']', but got '<stream end>'"),
        ("name=*a", "--config 'name=*a': line 1, column 1: found undefined alias 'a'"),
        ("name=" + "[" * 100_000, "not YAML: more than 200 brackets are open"),
        ("hyperparameters.a\0=1", "c.yaml: hyperparameters: the key 'a\\x00' holds a character that no text can have"),
        ("hyperparameters.a=.inf", "c.yaml: hyperparameters.a is inf, which is not a finite number"),
        ("searcher=", "c.yaml: searcher is null, which is not a mapping"),
        ("max_restart=1", "c.yaml: max_restart is not a key of an experiment (did you mean 'max_restarts'?)"),
    ],
)
def test_overrides_that_are_wrong(tmp_path, override, message):
    (tmp_path / "c.yaml").write_text(VALID)
    with pytest.raises(UserError) as error:
        read_experiment_config(str(tmp_path / "c.yaml"), [override])
    assert message in str(error.value)
    assert len(str(error.value)) < 500


def test_an_override_may_fill_a_key_that_is_empty(tmp_path):
    (tmp_path / "c.yaml").write_text(VALID + "environment:\n")
    config = read_experiment_config(str(tmp_path / "c.yaml"), ["environment.image=x", "debug=true"])
    assert (config["environment"], config["debug"]) == ({"image": "x"}, True)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *[(name, "experiment") for name in ("..", "...", " ", "")],
        ("./.", "_"),
        ("../../x", "_.._x"),
        ("/etc/passwd", "_etc_passwd"),
        ("a\\b:c\nd\0e\x1b[1m", "a_b_c_d_e__1m"),
        ("  .hidden. ", "hidden"),
        ("x" * 300, "x" * 100),
        ("é" * 300, "é" * 50),
        ("my run 2, lr=1e-5 (a)", "my run 2, lr=1e-5 (a)"),
        ("\ud800", "_"),
    ],
)
def test_a_name_is_one_part_of_a_path(name, folder):
    assert path_component(name) == folder
    assert Path(path_component(name)).name == path_component(name)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("..", "experiment"),
        (None, "config"),
        ("", "config"),
        ("a/../../b", "a_.._.._b"),
        ("Checkpoints", "Checkpoints_experiment"),
    ],
)
def test_an_experiment_stays_in_local_runs(call, write_config, sft_config, tmp_path, monkeypatch, name, folder):
    """Whatever its name: Determined accepts any text."""
    path = write_config({**sft_config, "name": name})
    seen = []
    monkeypatch.setattr(
        "experiment.runner.LocalExperiment.parse_trials",
        lambda self: seen.append((self.name, self.folder)) or sys.exit(0),
    )
    assert call(local_experiment.main, path)[0] == 0
    assert seen == [(name or "config", REPO / "local_runs" / folder)]


def test_checkpoints_are_not_an_output(call, write_config, sft_config, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_CHECKPOINT_STORAGE", str(tmp_path / "store"))
    for output in ("store", "store/inside"):
        status, _, err = call(local_experiment.main, write_config(sft_config), "--output", tmp_path / output)
        assert (status, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: --output {tmp_path / output}: checkpoints are kept in {tmp_path / 'store'}")
    assert not (tmp_path / "store").exists()
