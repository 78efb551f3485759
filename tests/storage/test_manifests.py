"""Which damage to a checkpoint's files is found: with a manifest all, without one what cannot be read."""

import io
import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from errors import UserError
from storage.manifests import MANIFEST, check_files, hash_files, write_manifest

NEEDED = [("*.safetensors", "pytorch_model*"), ("optimizer*",)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint-2"
    (folder / "optimizer_0").mkdir(parents=True)
    for number in (1, 2):
        save_file({f"w{number}": torch.arange(1000.0)}, folder / f"model-{number}.safetensors")
    shards = {"weight_map": {f"w{number}": f"model-{number}.safetensors" for number in (1, 2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    torch.save({"state": torch.arange(1000)}, folder / "optimizer_0" / "state.pt")
    return folder


def rewrite(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


HALF, EMPTY, NULS = (lambda data: data[: len(data) // 2]), (lambda data: b""), (lambda data: bytes(len(data)))
HOLE = lambda data: data[:600] + bytes(400) + data[1000:]  # noqa: E731
DAMAGES = {
    "weights cut": (rewrite("model-1.safetensors", HALF), "model-1.safetensors"),
    "weights empty": (rewrite("model-2.safetensors", EMPTY), "model-2.safetensors"),
    "weights zeroed": (rewrite("model-2.safetensors", NULS), "model-2.safetensors"),
    "weights missing": (lambda folder: (folder / "model-2.safetensors").unlink(), "model-2.safetensors is missing"),
    "all weights missing": (lambda folder: [f.unlink() for f in folder.glob("model*")], "missing"),
    "optimizer cut": (rewrite("optimizer_0/state.pt", HALF), "optimizer_0/state.pt"),
    "optimizer with a hole": (rewrite("optimizer_0/state.pt", HOLE), "optimizer_0/state.pt"),
    "index zeroed": (rewrite("model.safetensors.index.json", NULS), "model.safetensors.index.json"),
}


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(folder, name, manifest):
    damage, message = DAMAGES[name]
    if manifest:
        write_manifest(folder, hash_files(folder))
    check_files(folder, NEEDED)
    damage(folder)
    with pytest.raises(UserError, match=message):
        check_files(folder, NEEDED)


def test_a_manifest_finds_what_can_be_read_but_was_not_saved(folder):
    write_manifest(folder, hash_files(folder))
    rewrite("model-1.safetensors", lambda data: data[:-4] + bytes(4))(folder)
    check_files(folder, NEEDED, select=lambda name: name != "model-1.safetensors")
    with pytest.raises(UserError, match=r"model-1\.safetensors has changed since it was saved"):
        check_files(folder, NEEDED)


def test_of_large_files_the_size_alone_is_compared(folder):
    write_manifest(folder, hash_files(folder, largest=1000))
    rewrite("model-1.safetensors", NULS)(folder)
    check_files(folder, NEEDED)
    rewrite("model-1.safetensors", HALF)(folder)
    with pytest.raises(UserError, match=r"model-1\.safetensors has "):
        check_files(folder, NEEDED)
    rewrite("model-1.safetensors", lambda data: data + data)(folder)
    rewrite("model.safetensors.index.json", NULS)(folder)
    with pytest.raises(UserError, match=r"index\.json has changed"):
        check_files(folder, NEEDED)


def test_an_error_or_a_signal_does_not_wait_for_the_hashing(folder, monkeypatch):
    """The first file cannot be read, and the reading of the others ends only after ten seconds."""
    end = time.monotonic() + 10

    class Long(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            time.sleep(0.01)
            return int(time.monotonic() < end)

    def open_it(path, mode):
        if path.name == "model-1.safetensors":
            raise PermissionError("no")
        return Long()

    monkeypatch.setattr(Path, "open", open_it)
    with pytest.raises(UserError, match=r"model-1\.safetensors: no"):
        hash_files(folder)
    assert time.monotonic() < end


@pytest.mark.parametrize(
    "text", ["", "\0\0\0", "[]", '{"a": 1}', '{"../x": [1]}', '{"model-1.safetensors": [1, "a"', "{}"]
)
def test_a_damaged_manifest_is_damage(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json|missing"):
        check_files(folder, NEEDED)
