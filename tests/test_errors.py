"""A mistake of a user's, or a disk's error, is one short line; one of ours is a traceback."""

import errno

import pytest

from errors import CommandLine, TemporaryError, UserError, at_least, exit_on_user_error, reading


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


def test_whatever_a_library_raises_is_one_short_line():
    class PanicException(BaseException):
        """As Rust's, in tokenizers and safetensors."""

    for error, said in [
        (RecursionError("too\n deep"), "file x: too deep"),
        (KeyError(), "file x: KeyError"),
        (PanicException("no entry"), "file x: no entry"),
        (ValueError("long " * 100), "file x: " + "long " * 59 + "long\N{HORIZONTAL ELLIPSIS}"),
    ]:
        with pytest.raises(UserError) as caught, reading("file x"):
            raise error
        assert str(caught.value) == said
    with pytest.raises(KeyboardInterrupt), reading("file x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "argument --count: '0' is not a whole number of at least 1"),
        (["--count", "1e3"], "argument --count: '1e3' is not a whole number of at least 1"),
        (["--count", "9" * 5000], "argument --count: '9999"),
        (["--name", ""], "--name is empty"),
        (["--name", "a\0"], "argument 'a\\x00' is not UTF-8 text, or has a null character"),
        (["--name", "\udcff"], "argument '\\udcff' is not UTF-8 text, or has a null character"),
    ],
)
def test_values_that_no_option_takes(words, message):
    command = CommandLine("Does something.")
    command.add_argument("--count", type=at_least(1))
    command.add_argument("--name")
    with pytest.raises(UserError) as error:
        command.parse_args(words)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) <= 300


def end(error, capsys):
    """What a command prints that ends with `error`."""

    @exit_on_user_error
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("key: wrong"), "error: key: wrong\n"),
        (TemporaryError("no hub"), "error (may be temporary): no hub\n"),
        (OSError(errno.EROFS, "Read-only", "file"), "error (may be temporary): file: Read-only\n"),
        (RuntimeError("disk: No space left on device"), "error (may be temporary): disk: No space left on device\n"),
    ],
    ids=str,
)
def test_a_mistake_or_a_disk_is_one_line(error, line, capsys):
    assert end(error, capsys) == line


@pytest.mark.parametrize("error", [KeyError("ours"), FileNotFoundError(errno.ENOENT, "ours")], ids=repr)
def test_a_mistake_of_ours_is_a_traceback(error, capsys):
    with pytest.raises(type(error), match="ours"):
        end(error, capsys)


def test_where_a_mistake_comes_from_is_shown_if_wanted(command, capsys, monkeypatch):
    def is_shown():
        *traceback, line = end(UserError("key: wrong"), capsys).splitlines()
        assert line == "error: key: wrong"
        return "Traceback (most recent call last):" in traceback

    monkeypatch.setenv("DET_DEBUG", "")
    assert not is_shown()
    command.parse_args(["a.yaml", "--debug"])
    assert is_shown()
    monkeypatch.setenv("DET_DEBUG", "")
    for config, shown in (("junk", False), ("[1]", False), ('{"debug": true}', True)):
        monkeypatch.setenv("DET_EXPERIMENT_CONFIG", config)
        assert is_shown() == shown


def test_a_line_is_not_longer_than_a_reader_likes(capsys):
    assert len(end(UserError("x" * 10**6), capsys)) < 720
