"""A trial whose latest checkpoint was damaged ends as an untouched one: from the checkpoint before it, or anew."""

import errno
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import metrics_by_step
from processes import run_ranks
from safetensors.torch import load_file

import sft_finetune
from errors import UserError
from storage.checkpoints import local_checkpoint_storage
from storage.manifests import MANIFEST
from trial.events import LocalCheckpointContext, read_events
from trial.latest_checkpoint import _check

STEPS = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
CHANGES = {f"hyperparameters__training_args__{name}": value for name, value in STEPS.items()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def zero(path: Path) -> None:
    """What a power cut may leave: the size is right, the end was never written."""
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))


def without_manifest(damage=lambda saved: None):
    def apply(saved):
        (saved / MANIFEST).unlink()
        damage(saved)

    return apply


def rename(saved):
    saved.rename(saved.with_name("checkpoint-1"))


def replace_by_a_file(saved):
    shutil.rmtree(saved.parent)
    saved.parent.write_text("")


# What is done to the checkpoint of step 4, and what the trial says.
DAMAGES = {
    "weights": (lambda saved: zero(saved / "model.safetensors"), "model.safetensors has changed since it was saved"),
    "optimizer": (lambda saved: cut(saved / "optimizer.pt"), "optimizer.pt has "),
    "a file less": (lambda saved: (saved / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "empty": (lambda saved: [shutil.rmtree(saved), (saved.parent / "metadata.json").unlink()], "it is empty"),
    "not ours": (lambda saved: saved.rename(saved.with_name("model")), "was not saved by this project"),
    "another's": (rename, "checkpoint-1 has the state of step 4"),
    "missing": (lambda saved: shutil.rmtree(saved.parent), "is not in the storage"),
    "a file": (replace_by_a_file, "is a file"),
    "manifest": (lambda saved: (saved / MANIFEST).write_bytes(bytes(50)), "manifest.json: "),
    "earlier release": (without_manifest(lambda saved: cut(saved / "rng_state.pth")), "rng_state.pth: "),
    "log state": (without_manifest(lambda saved: (saved / "log_state_0.json").write_text("{}")), "is not a log state"),
}


@pytest.fixture
def run(call, write_config, sft_config, tmp_path, monkeypatch):
    """Go on with a trial in `folder`; returns its status and stderr, and its events."""
    path = write_config(sft_config, **CHANGES)

    def run(folder, store):
        monkeypatch.setenv("LOCAL_CHECKPOINT_STORAGE", str(store))
        status, _, err = call(sft_finetune.main, "--config", path, "--output", folder)
        return status, err, read_events(folder / "events.jsonl")

    return run


def saved_in(events, store):
    return [next((store / e["uuid"]).glob("checkpoint-*"), None) for e in events if e["kind"] == "checkpoint"]


def last_status(events):
    return [event["status"] for event in events if event["kind"] == "status" and "checkpoint " in event["status"]]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """Where the first test has the trial run that all damage."""
    return tmp_path_factory.mktemp("untouched")


@pytest.fixture
def ended(run, untouched, tmp_path):
    """A copy of a trial that has ended: its folder, its store, its events and its last weights."""
    if not (untouched / "out").exists():
        status, err, _ = run(untouched / "out", untouched / "store")
        assert status == 0, err
    shutil.copytree(untouched / "out", tmp_path / "out")
    shutil.copytree(untouched / "store", tmp_path / "store")
    events = read_events(tmp_path / "out" / "events.jsonl")
    weights = load_file(saved_in(events, untouched / "store")[-1] / "model.safetensors")
    return tmp_path / "out", tmp_path / "store", events, weights


def assert_same_end(events, weights, again, store):
    assert metrics_by_step(again) == metrics_by_step(events)
    after = load_file(saved_in(again, store)[-1] / "model.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in weights)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_not_the_end(run, ended, name):
    folder, store, events, weights = ended
    damage, message = DAMAGES[name]
    damage(saved_in(events, store)[-1])
    status, err, again = run(folder, store)
    assert (status, err) == (0, "")
    (told,) = last_status(again)
    first, last = (event["uuid"] for event in events if event["kind"] == "checkpoint")
    assert told.startswith(f"checkpoint {last} ")
    assert message in told
    assert told.endswith(f": resuming from checkpoint {first}, checkpoint-2")
    assert [e["steps_completed"] for e in again if e["kind"] == "checkpoint"] == [2, 4, 4]
    assert_same_end(events, weights, again, store)


@pytest.mark.parametrize("damage", [lambda saved: cut(saved / "model.safetensors"), DAMAGES["missing"][0]])
def test_without_a_whole_one_it_starts_over(run, ended, damage):
    folder, store, events, weights = ended
    (store / "another").mkdir()  # the storage is there
    for saved in saved_in(events, store):
        damage(saved)
    status, err, again = run(folder, store)
    assert (status, err) == (0, "")
    (told,) = last_status(again)
    assert told.count("checkpoint ") == 2
    assert told.endswith(": starting over")
    assert [e["steps_completed"] for e in again if e["kind"] == "checkpoint"] == [2, 4, 2, 4]
    assert_same_end(events, weights, again, store)


def test_a_whole_one_of_an_earlier_release_is_resumed_from(run, ended):
    folder, store, events, _ = ended
    without_manifest()(saved_in(events, store)[-1])
    status, err, again = run(folder, store)
    assert (status, err, last_status(again)) == (0, "", [])
    assert [e["steps_completed"] for e in again if e["kind"] == "checkpoint"] == [2, 4]  # nothing was left to train


@pytest.mark.parametrize("mount_point", [False, True])
def test_a_store_without_any_of_them_is_an_error(run, ended, mount_point):
    """It may not be mounted: to start over would be to lose what it holds."""
    folder, store, events, _ = ended
    shutil.rmtree(store)
    if mount_point:
        store.mkdir()
    status, err, again = run(folder, store)
    last = [event["uuid"] for event in events if event["kind"] == "checkpoint"][-1]
    missing = f"the trial's latest checkpoint, {last}, is not in the storage, nor is an earlier one"
    missing += f"; to start over, remove {folder}"
    assert (status, err) == (2, f"error (may be temporary): {missing}\n")
    assert metrics_by_step(again) == metrics_by_step(events)


def test_damaged_events_are_left_out(run, ended):
    """With the last checkpoint's event, the one before it is the last. What is no UUID never becomes a path."""
    folder, store, events, weights = ended
    lines = (folder / "events.jsonl").read_bytes().splitlines()
    lines[0] = bytes(len(lines[0]))
    uuids = [event["uuid"] for event in events if event["kind"] == "checkpoint"]
    lines = [line.replace(uuids[-1].encode(), b"..") for line in lines]
    damaged = [
        b'{"kind": "checkpoint", "steps_completed": 9, "uuid": ""}',
        b"\xff\xfe",
        b"7",
        b'{"kind": [',
        b"[" * 10**5,
    ]
    (folder / "events.jsonl").write_bytes(b"\n".join([*lines, *damaged, lines[-1][:20]]))
    status, err, again = run(folder, store)
    assert (status, err) == (0, "")
    assert [e["steps_completed"] for e in again if e["kind"] == "checkpoint"] == [2, 4]
    assert [e["hparams"] for e in again if e["kind"] == "hparams"] == [events[0]["hparams"]]
    assert_same_end(events, weights, again, store)


def test_a_trial_that_trained_nothing_does_not_block_a_corrected_one(call, write_config, sft_config, tmp_path):
    def run(limit):
        path = write_config(sft_config, hyperparameters__max_seq_length=limit)
        return call(sft_finetune.main, "--config", path, "--output", tmp_path / "out")

    status, _, err = run(3)
    assert (status, err.count("\n")) == (2, 1)
    assert {event["kind"] for event in read_events(tmp_path / "out" / "events.jsonl")} <= {"hparams", "status"}
    status, _, err = run(256)
    assert (status, err) == (0, "")
    status, _, err = run(200)
    assert (status, "holds a trial with other hyperparameters" in err) == (2, True)


@pytest.mark.parametrize("what", ["shutil.copy2", "torch.save", "trial.events.append_event"])
def test_a_full_disk_costs_a_line(run, ended, tmp_path, monkeypatch, what):
    """At some moment after the first checkpoint. The same command goes on from it."""
    _, _, events, weights = ended
    module, name = what.rsplit(".", 1)
    write, store = getattr(importlib.import_module(module), name), tmp_path / "store-2"
    uploaded = []

    def write_to_full_disk(*args, **kwargs):
        if (kwargs.get("kind") == "training" and kwargs["steps_completed"] == 3) or (store.exists() and uploaded):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args, **kwargs)

    upload = LocalCheckpointContext.upload

    def upload_and_fill(self, *args, **kwargs):
        uploaded.extend([] if what == "trial.events.append_event" else [upload(self, *args, **kwargs)])
        return uploaded[-1] if uploaded else upload(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(what, write_to_full_disk)
        patch.setattr(LocalCheckpointContext, "upload", upload_and_fill)
        status, err, _ = run(tmp_path / "full", store)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error")
    assert "no space left on" in err.lower()
    status, err, again = run(tmp_path / "full", store)
    assert (status, err) == (0, "")
    assert [e["steps_completed"] for e in again if e["kind"] == "checkpoint"] == [2, 4]
    assert_same_end(events, weights, again, store)


def test_deepspeed_saves_files_of_its_own(ended):
    """It is not installed here. The Trainer then saves neither optimizer nor scheduler, and not always the weights."""
    _, store, events, _ = ended
    saved = saved_in(events, store)[-1]
    for name in (MANIFEST, "model.safetensors", "optimizer.pt", "scheduler.pt"):
        (saved / name).unlink()
    with pytest.raises(UserError, match=r"global_step\* is missing"):
        _check(saved.parent, with_deepspeed=True)
    (saved / "global_step4").mkdir()
    torch.save({}, saved / "global_step4" / "mp_rank_00_model_states.pt")
    _check(saved.parent, with_deepspeed=True)
    with pytest.raises(UserError, match="is missing"):
        _check(saved.parent, with_deepspeed=False)


def test_each_upload_has_a_manifest_of_its_files(ended):
    _, store, events, _ = ended
    for saved in saved_in(events, store):
        names = {path.name for path in saved.iterdir()}
        assert {"model.safetensors", "optimizer.pt", "log_state_0.json", "rng_state.pth"} <= names
        assert json.loads((saved / MANIFEST).read_text()).keys() == names - {MANIFEST}


def test_all_ranks_take_the_same_checkpoint(write_config, sft_config, tmp_path):
    """The file of the second rank is damaged: the first one verifies it, and both resume from step 2."""
    path, log, out = write_config(sft_config, **CHANGES), tmp_path / "log", tmp_path / "out"
    arguments = ("--config", path, "--output", out)
    assert run_ranks("sft_finetune", *arguments, log=log, ranks=2) == 0, log.read_text()
    events = read_events(out / "events.jsonl")
    saved = saved_in(events, local_checkpoint_storage())[-1]
    weights = load_file(saved / "model.safetensors")
    zero(saved / "rng_state_1.pth")
    assert run_ranks("sft_finetune", *arguments, log=log, ranks=2) == 0, log.read_text()
    again = read_events(out / "events.jsonl")
    (told,) = last_status(again)
    assert "rng_state_1.pth has changed" in told
    assert told.endswith("checkpoint-2")
    assert_same_end(events, weights, again, local_checkpoint_storage())
