"""QLoRA: runs `four_bit.py` in a process of its own, which alone has bitsandbytes on its path."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPO


def folder_of_bitsandbytes() -> Path | None:
    """Where it is, if it is here: the Makefile puts it beside the environment's own packages."""
    if (folder := Path(sys.prefix, "bitsandbytes")).is_dir():
        return folder
    found = find_spec("bitsandbytes")
    return Path(found.origin).parents[1] if found and found.origin else None


def test_an_adapter_learns_on_a_base_of_4_bits():
    folder = folder_of_bitsandbytes()
    if folder is None:
        reason = "bitsandbytes is not here: run `make .venv/bitsandbytes`"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)  # CI has it, or has lost it
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/adapters/four_bit.py"]
    environment = os.environ | {"PYTHONPATH": f"{REPO}:{folder}"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
