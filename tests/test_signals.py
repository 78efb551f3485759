"""A signal ends every command in one line, from its first imports on, and nothing of it runs on."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import REPO

from signals import run_in_child

COMMANDS = ["sft_finetune.py", "dpo_finetune.py", "inference.py", "local_experiment.py", "report.py", "export.py"]
SAID = "stopped by {}; the same command goes on from what it has saved\n"
# Runs a script and sends this process a signal when it imports a module for the first time.
AT_IMPORT = """
import os, runpy, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == MODULE:
            sys.meta_path.remove(Finder)
            os.kill(os.getpid(), SIGNAL)
sys.meta_path.insert(0, Finder)
sys.argv = SCRIPT.split()
sys.path.insert(0, ".")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except BaseException as error:  # as libraries do that try whether they can import something
    if not isinstance(error, SystemExit):
        raise
    sys.exit(error.code)
"""


def heed_signals() -> None:
    """Heed what the tests' own process may ignore: SIGINT in a shell's background job, SIGHUP under nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*words: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, **environment},
        preexec_fn=heed_signals,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("sft_finetune.py --config sft.yaml", "determined"),
        ("inference.py --model a=b", "pydantic"),
        ("local_experiment.py sft.yaml --dry-run", "ruamel.yaml"),
        ("report.py nowhere", "rich"),
        ("export.py nowhere folder", "transformers"),
    ],
)
def test_a_signal_during_the_imports_is_one_line(command, module, number):
    code = AT_IMPORT.replace("MODULE", repr(module)).replace("SIGNAL", str(int(number)))
    process = start("-c", code.replace("SCRIPT", repr(command)))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", SAID.format(number.name))


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_slow_is_imported_before_signals_are_handled(command):
    """What a command imports above its `main` has none of the slow libraries."""
    code = f"import sys; before = set(sys.modules); import {command.removesuffix('.py')}; print(*sys.modules)"
    out, _ = start("-c", code).communicate(timeout=60)
    assert set(out.split()) & {"determined", "pydantic", "rich", "yaml", "ruamel", "numpy"} == set()


def test_the_tiny_examples_maker_imports_torch_late():
    code = "import sys; sys.path.insert(0, 'examples/tiny'); import make; print(*sys.modules)"
    out, _ = start("-c", code).communicate(timeout=60)
    assert set(out.split()) & {"torch", "transformers", "datasets", "make"} == {"make"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_helpers_end_with_a_command_that_is_killed(tmp_path):
    """A forked helper of a command, such as a worker that tokenizes, does not outlive it."""
    code = """
import os, time
from errors import exit_on_user_error
@exit_on_user_error
def main():
    if not (child := os.fork()):
        time.sleep(600)
    print(child, flush=True)
    time.sleep(600)
main()
"""
    process = start("-c", code)
    child = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    with suppress(FileNotFoundError):  # it is gone
        while "zombie" not in Path(f"/proc/{child}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_signal_in_a_finalizer_is_not_lost():
    code = """
import os, signal
from errors import exit_on_user_error
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
@exit_on_user_error
def main():
    Finalized()
    print("went on")
main()
"""
    process = start("-c", code)
    assert process.communicate(timeout=60) == ("", SAID.format("SIGTERM"))
    assert process.returncode == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_rank_of_several_keeps_what_its_launcher_relies_on(number):
    """It ends at once, also where it waits in C for another rank: a handler of Python's would run after that."""
    code = """
import os
from errors import exit_on_user_error
@exit_on_user_error
def main(): os.kill(os.getpid(), NUMBER)
main()
"""
    process = start("-c", code.replace("NUMBER", str(int(number))), WORLD_SIZE="2")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -number


def test_a_full_or_closed_stdout_is_one_line():
    code = "from errors import exit_on_user_error\n@exit_on_user_error\ndef main(): print('x' * 10**6)\nmain()"
    with Path("/dev/full").open("w") as full:
        run = subprocess.run([sys.executable, "-c", code], cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (2, "error (may be temporary): No space left on device\n")
    process = start("-c", code)
    process.stdout.close()
    assert process.stderr.read() == "error (may be temporary): Broken pipe\n"
    assert process.wait(timeout=60) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is run in a child")
def test_what_crashes_python_is_told_apart():
    assert run_in_child(lambda: None, 60) == 0
    assert run_in_child(lambda: 1 / 0, 60) == 1
    assert run_in_child(lambda: sys.exit(7), 60) == 7
    assert run_in_child(os.abort, 60) == -signal.SIGABRT
    assert run_in_child(lambda: time.sleep(600), 0.1) == -signal.SIGKILL
