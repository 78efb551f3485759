"""Files that a kill or a power cut at any moment leaves whole."""

import os
from pathlib import Path

import pytest

from errors import UserError
from storage.files import append_json_line, read_json_lines, write_atomically
from storage.shared_cache import make_once


@pytest.fixture
def calls(monkeypatch):
    """What is flushed and renamed, in order: the names of the files and folders."""
    made = []
    flush, rename, replace = os.fsync, Path.rename, Path.replace
    name_of = lambda descriptor: Path(f"/proc/self/fd/{descriptor}").readlink().name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: made.append(f"flush {name_of(fd)}") or flush(fd))
    monkeypatch.setattr(Path, "rename", lambda path, to: made.append(f"to {to.name}") or rename(path, to))
    monkeypatch.setattr(Path, "replace", lambda path, to: made.append(f"to {to.name}") or replace(path, to))
    return made


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of descriptors are read from /proc")
def test_what_gets_its_name_is_on_the_disk_before(calls, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_atomically(folder / "file", "text")
    assert calls == ["flush file.partial", "to file", "flush folder"]
    calls.clear()

    def make(scratch):
        scratch.mkdir()
        (scratch / "a").write_text("x")

    make_once(folder / "made", make, lambda: None)
    named = calls.index("to made")
    assert {"flush a", "flush manifest.json", "flush made.partial"} <= set(calls[:named])
    assert calls[named + 1 :] == ["flush folder"]


def test_what_is_made_once_is_made_again_if_it_was_damaged(tmp_path):
    def make(scratch):
        scratch.mkdir()
        (scratch / "a").write_text("whole")

    def run():
        return make_once(tmp_path / "made", make, lambda: None)

    assert (run(), run()) == (True, False)
    for damage in (lambda file: file.write_text("wh"), lambda file: file.write_text("WHOLE"), Path.unlink):
        damage(tmp_path / "made" / "a")
        assert (run(), run()) == (True, False)
        assert (tmp_path / "made" / "a").read_text() == "whole"


def test_lines_that_are_damaged_are_none(tmp_path):
    file = tmp_path / "lines"
    append_json_line(file, {"a": 1})
    huge = b"9" * 400  # no float can hold it
    file.write_bytes(file.read_bytes() + b"\0\0\0\n\xff\n" + b"[" * 10**5 + b'\n"\\ud800"\n%b\n{"a": ' % huge)
    append_json_line(file, {"a": 2})
    assert read_json_lines(file) == [{"a": 1}, *[None] * 6, {"a": 2}]
    with pytest.raises(UserError, match="Is a directory"):
        read_json_lines(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in (("pipe", "neither a file"), ("endless", "neither a file"), ("loop", "Too many levels of")):
        with pytest.raises(UserError, match=said):
            read_json_lines(tmp_path / name)
    assert read_json_lines(tmp_path / "none") == read_json_lines(file / "none") == []
