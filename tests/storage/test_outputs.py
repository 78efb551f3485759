"""A place that cannot be written to, and a disk that is full, cost a line; afterwards the same command goes on."""

import os
import subprocess
import uuid
from pathlib import Path

import pytest
from conftest import run_script

import dpo_finetune
import inference
import local_experiment
import report
import sft_finetune
from errors import UserError
from storage.files import check_output, write_atomically

ARGS = "hyperparameters__training_args__"


def mount(folder: Path, options: str) -> bool:
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    return subprocess.run(words, capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A disk of 600 KB."""
    folder = tmp_path / "disk"
    if not mount(folder, "size=600k"):
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_an_output_is_tried_out_and_nothing_is_left(tmp_path):
    check_output(tmp_path / "new" / "page.html", "--output")
    check_output(tmp_path / "new" / "folder", "--output", is_folder=True)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for path, is_folder, said in [
        (tmp_path, False, "it is a folder"),
        (tmp_path / "pipe", False, "it is not a file"),  # nor a device: its place would be taken
        (tmp_path / "file", True, "it is not a folder"),
        (tmp_path / "file" / "page.html", False, "Not a directory"),
        (tmp_path / "loop" / "page.html", False, "Too many levels of symbolic links"),
        (tmp_path / ("n" * 250), False, "File name too long"),  # with what is appended to it
        (tmp_path / ("n" * 300), True, "File name too long"),
        (Path("/proc/nowhere/page.html"), False, "No such file or directory"),
    ]:
        with pytest.raises(UserError) as error:
            check_output(path, "--output", is_folder=is_folder)
        assert str(error.value) == f"--output {path}: {said}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop", "pipe"]
    (tmp_path / "page.html.partial").mkdir()
    with pytest.raises(UserError, match=r"page.html.partial: it is a folder"):
        check_output(tmp_path / "page.html", "--output")


@pytest.mark.parametrize("variable", ["LOCAL_CHECKPOINT_STORAGE", "HF_HOME"])
def test_a_store_that_is_a_file_is_found_first(call, write_config, dpo_config, tmp_path, monkeypatch, variable):
    (tmp_path / "file").touch()
    if variable == "HF_HOME":
        monkeypatch.setattr("storage.checkpoints.HF_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setenv(variable, str(tmp_path / "file"))
    path = write_config(dpo_config, hyperparameters__model_name=None, hyperparameters__model_ckpt=str(uuid.uuid4()))
    for main, words in [(local_experiment.main, [path]), (dpo_finetune.main, ["--config", path])]:
        status, _, err = call(main, *words, "--output", tmp_path / "out")
        assert (status, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: {variable} {tmp_path}/file")
    assert not (tmp_path / "out").exists()


def test_every_command_names_the_option_that_leads_nowhere(call, write_config, sft_config, dpo_config, tmp_path, tiny):
    (tmp_path / "file").touch()
    sft, below = write_config(sft_config), tmp_path / "file" / "below"
    for main, words, option in [
        (local_experiment.main, [sft, "--output", below], "--output"),
        (sft_finetune.main, ["--config", sft, "--output", below], "--output"),
        (sft_finetune.main, ["--config", sft, "--output", tmp_path / "out", "--cache", below], "--cache"),
        (report.main, [tmp_path, "--output", f"{below}.html"], "--output"),
        (inference.main, ["--model", f"a={tiny / 'base'}", "--output_file", f"{below}.html"], "--output_file"),
    ]:
        status, _, err = call(main, *words)
        assert (status, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: {option} {below}")
        assert err.endswith("Not a directory\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "file"]


def test_a_read_only_disk_is_found_first(disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match=r"Read-only file system$"):
        check_output(disk / "page.html", "--output")


def test_a_full_disk_keeps_the_old_file(disk):
    write_atomically(disk / "page.html", "old")
    with pytest.raises(OSError, match="No space left on device") as error:
        write_atomically(disk / "page.html", "x" * 10**6)
    assert error.value.filename == str(disk / "page.html")
    assert [path.name for path in disk.iterdir()] == ["page.html"]
    assert (disk / "page.html").read_text() == "old"


def test_a_comparison_goes_on_once_there_is_room(disk, tiny, tmp_path):
    words = ["inference.py", "--model", f"a={tiny / 'base'}", "--dataset", tiny / "conversations", "--device", "cpu"]
    words += ["--number-of-samples", 4, "--max-new-tokens", 4, "--batch-size", 1, "--output_file"]
    # Room to be tried out in and for the results, but not for the page.
    (disk / "other").write_bytes(bytes(600 * 1024 - 5 * os.sysconf("SC_PAGE_SIZE")))
    run = run_script(*words, disk / "page.html")
    said = f"error (may be temporary): --output_file {disk}/page.html: No space left on device\n"
    assert (run.returncode, run.stderr) == (2, said)
    assert (disk / "page.html.unfinished").stat().st_size > 0
    (disk / "other").unlink()
    run = run_script(*words, disk / "page.html")
    assert run.returncode == 0, run.stderr
    assert [path.name for path in disk.iterdir()] == ["page.html"]


def test_a_training_goes_on_once_there_is_room(disk, write_config, sft_config, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_CHECKPOINT_STORAGE", str(disk / "checkpoints"))
    path = write_config(sft_config, **{f"{ARGS}save_strategy": "steps", f"{ARGS}save_steps": 1})
    run = run_script("sft_finetune.py", "--config", path, "--output", tmp_path / "out")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert run.stderr.startswith("error (may be temporary): no space left on the disk of ")
    subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
    run = run_script("sft_finetune.py", "--config", path, "--output", tmp_path / "out")
    assert run.returncode == 0, run.stderr
