"""A mistake on a command line is one line, which names the option and the nearest one."""

import pytest

from errors import CommandLine, UserError


@pytest.fixture
def command():
    command = CommandLine("Does something.")
    command.add_argument("file", metavar="FILE")
    command.add_argument("--config", action="append")
    command.add_argument("--max-steps", type=int)
    return command


def test_options_are_parsed_as_argparse_does(command):
    options = command.parse_args(["a.yaml", "--max", "3", "--config=x=--y", "--config", "--z with a space"])
    assert (options.file, options.max_steps, options.config) == ("a.yaml", 3, ["x=--y", "--z with a space"])
    assert command.parse_args(["--", "--a.yaml"]).file == "--a.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.yaml", "--max-setps", "3"], "--max-setps: no such option (did you mean '--max-steps'?)"),
        (["--confgi=x"], "--confgi: no such option (did you mean '--config'?)"),  # rather than that FILE is missing
        (["a.yaml", "--zzz"], "--zzz: no such option"),
        (["a.yaml", "--max-steps", "x"], "argument --max-steps: invalid int value: 'x'"),
        (["a.yaml", "b.yaml"], "unrecognized arguments: b.yaml"),
        ([], "the following arguments are required: FILE"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_option(command, arguments, message):
    with pytest.raises(UserError) as error:
        command.parse_args(arguments)
    assert str(error.value) == message
