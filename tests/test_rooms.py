"""The structure of the project: which room may import which, and how early a command imports what is slow."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

# From top to bottom. A module may import from its own room and from rooms in rows below its own.
FLOORS = [
    {"sft_finetune", "dpo_finetune", "inference", "local_experiment", "report", "export"},
    {"experiment", "comparison", "serving"},
    {"dataset_utils"},
    {"speed", "data"},
    {"trial"},
    {"adapters"},
    {"metrics"},
    {"storage"},
    {"config"},
    {"pages", "chat_format"},
    {"errors"},
    {"signals"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def product_files() -> list[Path]:
    files = [*REPO.glob("*.py"), *(file for room in FLOOR_OF for file in (REPO / room).glob("*.py"))]
    return sorted(file.relative_to(REPO) for file in files)


def imported_modules(file: Path) -> set[str]:
    """The dotted names of all modules that a file imports anywhere, for type checkers only as well."""
    names = set()
    for node in ast.walk(ast.parse((REPO / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("file", product_files(), ids=str)
def test_arrows_between_rooms_only_run_down(file):
    room = file.parts[0].removesuffix(".py")
    others = {name.split(".")[0] for name in imported_modules(file)} & FLOOR_OF.keys() - {room}
    upward = {other for other in others if FLOOR_OF[other] <= FLOOR_OF[room]}
    assert upward == set()


def test_every_module_has_a_room():
    rooms = {file.parts[0].removesuffix(".py") for file in product_files()}
    assert rooms == FLOOR_OF.keys()
    beside = {path.parent.name for path in REPO.glob("*/*.py")} - {"tests", "benchmarks"}
    assert beside <= rooms


@pytest.mark.parametrize("file", product_files(), ids=str)
def test_no_file_is_longer_than_400_lines(file):
    assert len((REPO / file).read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize(
    "script", ["sft_finetune", "dpo_finetune", "inference", "local_experiment", "report", "export"]
)
@pytest.mark.parametrize(("option", "expected"), [("--help", 0), ("--no-such-option", 2)])
def test_a_command_line_is_answered_before_the_slow_imports(script, option, expected):
    """torch takes three seconds of CPU to import, datasets one and a half, transformers one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    called = subprocess.run([sys.executable, "-X", "importtime", f"{script}.py", option], cwd=REPO, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert called.returncode == expected
    imported = {line.rsplit(b"|", 1)[-1].strip() for line in called.stderr.splitlines() if line.startswith(b"import")}
    assert b"argparse" in imported
    assert imported & {b"torch", b"transformers", b"datasets", b"pandas", b"plotly"} == set()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # 0.5 on a quiet machine


@pytest.mark.parametrize("file", product_files(), ids=str)
def test_no_clock_is_read_that_can_be_set_back(file):
    """Durations come from the monotonic clock, and what is newer from the order of events."""
    text = (REPO / file).read_text(encoding="utf-8")
    assert not any(name in text for name in ("time.time(", "st_mtime", "datetime", "getmtime"))
