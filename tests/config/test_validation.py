"""The one formatter: a value is accepted as its type says, or a line names the key and what is wrong with it."""

import copy
import datetime
import enum
import pickle
import subprocess
import sys

import pytest
from conftest import REPO
from pydantic import BaseModel

from config.hyperparameters import DataSource, DPOHyperparameters, parse_hyperparameters
from config.validation import Count, Share, validate
from errors import UserError


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Options(BaseModel, extra="forbid"):
    batch_size: Count = 8
    top_p: Share = 1.0
    dtype: Color = Color.RED


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, 1, 1.0),
        (int | None, None, None),
        (str | list[str], ["a"], ["a"]),
        (Color, "blue", Color.BLUE),
        (str | DataSource, {"name": "d", "ratio": 1}, DataSource("d", ratio=1.0)),
        (dict[str, float], {"a": float("inf")}, {"a": float("inf")}),
        (dict, {"day": datetime.date(2024, 1, 1)}, {"day": datetime.date(2024, 1, 1)}),
    ],
)
def test_a_value_of_the_right_type_is_accepted(hint, value, expected):
    assert validate(hint, value, "key") == expected


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (int, "8", "key is '8', which is not a whole number"),
        (int, True, "key is True, which is not a whole number"),
        (float, True, "key is True, which is not a number"),
        (bool, 1, "key is 1, which is not true or false"),
        (str, datetime.date(2024, 1, 1), "key is datetime.date(2024, 1, 1), which is not text"),
        (Color, "green", "key is 'green', which is not one of red, blue (did you mean 'red'?)"),
        (str | list[str] | None, 5, "key is 5, which is not text or a list, as in [a, b]"),
        (list[str | DataSource], [5], "key[0] is 5, which is not text or a mapping"),
        (list[str | DataSource], ["a", {"rato": 1}], "key[1].rato is not a hyperparameter (did you mean 'ratio'?)"),
        (list[str | DataSource], [{"ratio": 1}], "key[0].name is missing"),
        (dict[str, DataSource], {"a": {"name": "d", "columns": {"b": 1}}}, "key.a.columns.b is 1, which is not text"),
        (
            DataSource,
            {"name": "d", "ratio": 1, "number_of_samples": 1},
            "key: d: give ratio or number_of_samples, not both",
        ),
        (Options, {"batch_size": 0}, "key.batch_size 0 is not at least 1"),
        (Options, {"top_p": 1.5}, "key.top_p 1.5 is not at most 1"),
    ],
)
def test_a_mistake_is_told_in_a_line_that_names_its_key(hint, value, message):
    with pytest.raises(UserError) as error:
        validate(hint, value, "key")
    assert str(error.value) == message


def test_text_of_a_command_line_is_converted_and_its_options_are_named():
    def check(**given):
        names = {"name_key": lambda path: f"--{path[0]}".replace("_", "-"), "noun": "an option"}
        return validate(Options, given, "", strict=False, **names)

    assert check(batch_size="4", top_p="0.5", dtype="blue") == Options(batch_size=4, top_p=0.5, dtype=Color.BLUE)
    for given, message in [
        ({"batch_size": "x"}, "--batch-size is 'x', which is not a whole number"),
        ({"batch_size": "0"}, "--batch-size 0 is not at least 1"),
        ({"batch_sise": "4"}, r"--batch-sise is not an option \(did you mean 'batch_size'\?\)"),
    ]:
        with pytest.raises(UserError, match=message):
            check(**given)


def test_parsed_hyperparameters_can_be_copied_and_pickled():
    hparams = parse_hyperparameters(
        DPOHyperparameters, {"model_name": "m", "model_ckpt": "none", "datasets": ["d", {"name": "e"}]}
    )
    for same in (copy.deepcopy(hparams), pickle.loads(pickle.dumps(hparams))):
        assert same == hparams
        assert same.args.beta == hparams.args.beta


def test_a_misspelled_key_is_told_before_torch_is_imported():
    code = (
        "import sys; from config.hyperparameters import *\n"
        "try: parse_hyperparameters(SFTHyperparameters, {'modelname': 'm'})\n"
        "except ValueError as error: print(error)\n"
        "print({'torch', 'transformers', 'trl'} & sys.modules.keys())"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "hyperparameters.modelname is not a hyperparameter (did you mean 'model_name'?)",
        "set()",
    ]
