"""HF_HOME on an agent that several users share: who gets which folder, and what one reads of another's."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hub_server
import pytest
from conftest import REPO
from datasets import Dataset

from storage import hf_home
from storage.hf_home import choose_home, take_readable

FORK = multiprocessing.get_context("fork")
ME, OTHER = 1001, 1002
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two users")


@pytest.fixture
def agent():
    """An agent's disk as its containers see it, which everyone may enter; and `tmp`, a container's own."""
    folder = Path(tempfile.mkdtemp(prefix="agent-"))
    folder.chmod(0o755)
    make(folder / "host_tmp", mode=0o1777)
    make(folder / "tmp", mode=0o1777)
    yield folder
    shutil.rmtree(folder)


def make(folder: Path, uid: int | None = None, mode: int = 0o755) -> Path:
    folder.mkdir()
    folder.chmod(mode)
    if uid is not None:
        os.chown(folder, uid, uid)
    return folder


def link(path: Path, target: Path | str, uid: int = 0) -> None:
    path.symlink_to(target)
    if uid:
        os.lchown(path, uid, uid)


def chosen(agent: Path, uid: int, barrier=None):
    """What a container of this user chooses, with a umask that takes no permission away; at `barrier`, its process."""

    def container(results):
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        os.umask(0)
        tempfile.tempdir = str(agent / "tmp")
        if barrier:
            barrier.wait()
        home, why = choose_home(agent / "host_tmp" / "huggingface", uid)
        results.put((str(home.relative_to(agent)), why, home.stat().st_uid, home.stat().st_mode & 0o022))

    results = FORK.SimpleQueue()
    process = FORK.Process(target=container, args=(results,))
    process.start()
    return (process, results) if barrier else ends((process, results))


def ends(container):
    process, results = container
    process.join()
    assert process.exitcode == 0
    return results.get()


SHARED, BESIDE = "host_tmp/huggingface", f"host_tmp/huggingface-{ME}"
WITHIN, IN_CONTAINER = f"host_tmp/huggingface/user-{ME}", f"tmp/huggingface-{ME}"


@needs_root
@pytest.mark.parametrize(
    ("prepare", "expected", "why"),
    [
        (lambda disk, home: None, SHARED, ""),
        (lambda disk, home: make(home, ME), SHARED, ""),
        (lambda disk, home: make(make(home, ME) / "datasets", ME), SHARED, ""),
        (lambda disk, home: make(home, 0), BESIDE, "Permission denied"),
        (lambda disk, home: make(home, OTHER), BESIDE, "Permission denied"),
        (lambda disk, home: make(home, OTHER, 0o700), BESIDE, "Permission denied"),
        (lambda disk, home: make(home, ME, 0o2775), BESIDE, "others may write to it (chmod go-w)"),
        (lambda disk, home: link(home, make(disk / "a", ME), OTHER), BESIDE, "it belongs to another user"),
        (lambda disk, home: link(home, make(disk / "a", ME)), SHARED, ""),  # root's
        (lambda disk, home: make(home, 0, 0o777), BESIDE, "it belongs to another user"),
        (lambda disk, home: make(make(home, ME) / "datasets", 0), BESIDE, "files of another user are in it"),
        (lambda _, home: make(make(make(home, ME) / "hub", ME) / "x", 0), BESIDE, "files of another user are in it"),
        (lambda disk, home: home.write_text(""), BESIDE, "File exists"),
        (lambda disk, home: (make(home, 0, 0o1777), disk.chmod(0o755)), WITHIN, "it belongs to another user"),
        (lambda disk, home: (make(home, 0), disk.chmod(0o755)), IN_CONTAINER, "Permission denied"),
        (lambda disk, home: disk.chmod(0o755), IN_CONTAINER, "Permission denied"),
        (lambda disk, home: disk.rmdir(), IN_CONTAINER, "Permission denied"),
        (lambda _, home: (make(home, 0), make(Path(f"{home}-{ME}"), OTHER, 0o777)), IN_CONTAINER, "Permission denied"),
    ],
)  # fmt: skip
def test_each_user_writes_to_a_folder_of_their_own(agent, prepare, expected, why):
    prepare(agent / "host_tmp", agent / "host_tmp" / "huggingface")
    assert chosen(agent, ME) == (expected, why, ME, 0)
    assert chosen(agent, ME) == (expected, why, ME, 0)  # a later start


@needs_root
def test_root_leaves_another_users_folder_alone(agent):
    make(agent / SHARED, OTHER)
    assert chosen(agent, 0) == ("host_tmp/huggingface-0", "it belongs to another user", 0, 0)


@needs_root
def test_root_does_not_use_what_another_user_left_in_its_folder(agent):
    make(make(agent / SHARED, 0) / "modules", OTHER)
    assert chosen(agent, 0) == ("host_tmp/huggingface-0", "files of another user are in it", 0, 0)


@needs_root
def test_what_is_kept_stays_in_a_mounted_folder(agent, monkeypatch):
    """`container_path: /data/hf` of a group's folder: /data is the container's own disk."""
    make(agent / SHARED, 0, 0o2775)
    monkeypatch.setattr("os.path.ismount", lambda path: path == agent / SHARED)
    assert chosen(agent, 0) == ("host_tmp/huggingface/user-0", "others may write to it (chmod go-w)", 0, 0)


@needs_root
def test_of_two_users_who_start_at_once_each_gets_one(agent):
    for _ in range(5):
        barrier = FORK.Barrier(4)
        users = (ME, OTHER, ME, OTHER)
        found = [ends(container)[0] for container in [chosen(agent, uid, barrier) for uid in users]]
        assert found[:2] == found[2:]
        assert set(found[:2]) in ({SHARED, f"{SHARED}-{OTHER}"}, {SHARED, BESIDE})
        shutil.rmtree(agent / "host_tmp")
        make(agent / "host_tmp", mode=0o1777)


COMMIT = "abc" + 37 * "0"


def snapshot(hub: Path, files: dict[str, str]) -> Path:
    """A model on the hub's layout, and its folder."""
    model = hub / "models--owner--name"
    for folder in ("blobs", "refs", "snapshots/abc"):
        (model / folder).mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for name, text in files.items():
        (model / "blobs" / f"etag-{name}").write_text(text)
        (model / "snapshots" / "abc" / name).symlink_to(f"../../blobs/etag-{name}")
    return model


def test_links_lead_to_what_is_no_code_and_complete(tmp_path):
    safe = {"config.json": "{}", "model.safetensors": "w", "tokenizer.model": "t"}
    shared, own = tmp_path / "shared", tmp_path / "own"
    model = snapshot(shared / "hub", {**safe, "pytorch_model.bin": "pickle", "modeling.py": "code"})
    (shared / "datasets" / "pairs" / "hash.incomplete").mkdir(parents=True)
    (shared / "datasets" / "pairs" / "hash.incomplete" / "train.arrow").touch()
    (shared / "datasets" / "pairs" / "train.lock").touch()
    (model / "snapshots" / "abc" / "gone.json").symlink_to("../../blobs/nowhere")
    assert take_readable(shared, own) == len(safe)
    linked = own / "hub" / "models--owner--name" / "snapshots" / "abc"
    assert {path.name: path.read_text() for path in linked.iterdir()} == safe
    assert not (own / "datasets").exists()

    ref = own / "hub" / "models--owner--name" / "refs" / "main"
    assert (ref.is_symlink(), ref.read_text()) == (False, COMMIT)
    ref.write_text("def")
    (linked / "config.json").unlink()
    (linked / "config.json").write_text("own")
    (model / "blobs" / "etag-model.safetensors").rename(model / "blobs" / "other")
    (model / "snapshots" / "abc" / "model.safetensors").unlink()
    (model / "snapshots" / "abc" / "model.safetensors").symlink_to("../../blobs/other")
    assert take_readable(shared, own) == len(safe)
    assert (ref.read_text(), (linked / "config.json").read_text()) == ("def", "own")  # what is one's own stays
    assert (linked / "model.safetensors").read_text() == "w"  # a link to what was gone


def test_a_hostile_folder_neither_runs_code_nor_leads_to_secrets(tmp_path, monkeypatch):
    shared, own = tmp_path / "shared", tmp_path / "own"
    code = {
        "config.json": '{"text_config": {"auto_map": {"AutoConfig": "owner/evil--evil.Config"}}}',
        "tokenizer_config.json": '{"auto\\u005fmap": {}}',
        "adapter_config.json": '{"base_model_name_or_path": "owner/evil"}',
        "nested.json": 100_000 * "[",
        "utf16.json": "no JSON",
        "large.txt": 101 * "a",
    }
    model = snapshot(shared / "hub", {**code, "model.safetensors": "w", "chat_template.jinja": "t"})
    monkeypatch.setattr(hf_home, "LARGEST_COPY", 100)
    (secret := tmp_path / "secret").mkdir()
    (secret / "s.jsonl").write_text(COMMIT)
    files = model / "snapshots" / "abc"
    for path in (files / "s.jsonl", files / "s.model", files / "s.safetensors", model / "refs" / "secret"):
        link(path, secret / "s.jsonl")
    link(model / "refs" / "environ", "/proc/self/environ")
    link(files / "environ.jinja", "/proc/self/environ")
    link(files / "long.txt", 300 * "x")
    link(files / "loop.txt", "loop.txt")
    link(files / "folder", secret)
    link(shared / "datasets", secret)
    (model / "refs" / "pr").mkdir()
    (model / "refs" / "pr" / "1").write_text("HF_TOKEN=hf_x")
    os.mkfifo(files / "pipe.txt")

    # A folder and a file that become links once they have been looked at.
    (files / "swapped").mkdir()
    (files / "swapped" / "s.jsonl").write_text("pairs")
    (files / "replaced.txt").write_text("text")
    looked_at = hf_home._readable

    def swap(folder):
        found = list(looked_at(folder))
        shutil.rmtree(files / "swapped")
        link(files / "swapped", secret)
        (files / "replaced.txt").unlink()
        os.mkfifo(files / "replaced.txt")
        return iter(found)

    monkeypatch.setattr(hf_home, "_readable", swap)
    take_readable(shared, own)
    taken = {path.relative_to(own / "hub" / model.name): path for path in own.rglob("*") if not path.is_dir()}
    kept = {Path("refs/main"): COMMIT, Path("snapshots/abc/model.safetensors"): "w"}
    kept |= {Path("snapshots/abc/chat_template.jinja"): "t"}
    assert {place: path.read_text() for place, path in taken.items()} == kept
    assert [place.name for place, path in taken.items() if path.is_symlink()] == ["model.safetensors"]
    assert {path.stat().st_mode & 0o077 for path in taken.values() if not path.is_symlink()} == {0}


LOAD = """
import json, sys
from datasets import load_dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HOME
rows = load_dataset("owner/pedia", split="train").map(lambda row: {"b": row["a"] + 1})
print(json.dumps([HF_HOME, rows["b"][:]]))
"""


@needs_root
def test_data_that_another_user_downloaded_is_not_downloaded_again(agent, tmp_path):
    """Through startup-hook.sh and the real libraries."""
    (tmp_path / "hub" / "data").mkdir(parents=True)
    Dataset.from_dict({"a": [1, 2]}).to_parquet(tmp_path / "hub" / "data" / "train.parquet")
    hook, home = 'set -e; source startup-hook.sh; exec python3 -c "$1"', agent / "host_tmp" / "huggingface"
    with hub_server.served(tmp_path / "hub", "owner/pedia") as (address, sent):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": address,
            "HF_HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

        def load(**more: str):
            command = ["bash", "-c", hook, "bash", LOAD]
            ran = subprocess.run(command, cwd=REPO, env={**environment, **more}, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            return json.loads(ran.stdout), ran.stderr

        assert load()[0] == [str(home), [2, 3]]
        assert len(sent) == 1
        for path in (home, *home.rglob("*")):
            os.chown(path, ME, ME, follow_symlinks=False)
        before = {path: path.lstat().st_mtime_ns for path in home.rglob("*")}
        own = Path(f"{home}-0")
        found, told = load(HF_HUB_OFFLINE="1")  # as `datasets` has prepared it
        assert found == [str(own), [2, 3]]
        (line,) = [line for line in told.splitlines() if "HF_HOME" in line]
        assert line.startswith(f"startup-hook.sh: HF_HOME {home}: it belongs to another user: using {own}, with ")
        assert {path: path.lstat().st_mtime_ns for path in home.rglob("*")} == before
        for prepared in (own, home / "datasets"):
            shutil.rmtree(prepared)
        assert load()[0] == [str(own), [2, 3]]  # as the hub's client has downloaded it
        assert len(sent) == 1
