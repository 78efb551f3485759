"""What inference.py takes from a cluster: Determined's SDK against a master that alone is made up (see cluster.py)."""

import shutil

import pytest
import torch
from adapter_folders import save_adapter

import inference
from errors import TemporaryError, UserError
from storage.checkpoints import cached_checkpoint
from storage.cluster_checkpoints import cluster_checkpoint, settled_checkpoint, trial_checkpoints
from storage.manifests import hash_files, write_manifest
from trial.models import load_model_and_tokenizer


def files_of(folder):
    return {path.name for path in folder.parent.rglob("*") if path.is_file()}


def test_an_experiment_or_trial_gives_its_best_checkpoint_by_the_searchers_metric(saved):
    for source, expected in {"exp:1": "b", "trial:1": "b", "trial:2": "c", f"ckpt:{saved['a']}": "a"}.items():
        folder = cluster_checkpoint(source, "--model m")
        assert folder.parent.name == saved[expected]
        assert "optimizer.pt" not in files_of(folder)
        load_model_and_tokenizer(str(folder))


def test_a_registered_model_gives_its_latest_version_or_the_one_that_is_named(master, saved):
    master.models = {"helper": [saved["b"], saved["a"]]}
    for source, expected in {"model:helper": "a", "model:helper:2": "a", "model:helper:1": "b"}.items():
        assert cluster_checkpoint(source, "--model m").parent.name == saved[expected]
    assert not master.unknown


def test_a_name_stands_for_the_same_checkpoint_in_every_trial(master, saved, save):
    """For what it was when the experiment of the trials was created, or for nothing if that may still change."""
    master.experiments[3] = {**master.experiments[2], "times": {"startTime": "2026-01-01T00:02:30.5Z"}}
    for source, expected in {"exp:1": "b", "trial:2": "c", f"ckpt:{saved['a']}": "a"}.items():
        assert settled_checkpoint(source, "model_ckpt", 3) == saved[expected]
    master.models = {"helper": [saved["a"], saved["b"], saved["c"]]}  # of 00:01, 00:02 and 00:03
    assert settled_checkpoint("model:helper", "model_ckpt", 3) == saved["b"]
    assert settled_checkpoint("model:helper:3", "model_ckpt", 3) == saved["c"]
    with pytest.raises(UserError, match="model:helper: the model had no version when experiment 1 was created"):
        settled_checkpoint("model:helper", "model_ckpt", 1)

    best = save(1, 6, 0.9)
    for ended in (None, "2026-01-01T00:02:31Z"):
        master.experiments[1]["times"] = {"endTime": ended}
        with pytest.raises(UserError, match=f"exp:1: experiment 1 had not ended when .* now is ckpt:{best}"):
            settled_checkpoint("exp:1", "model_ckpt", 3)
    assert not master.unknown


def test_a_cluster_checkpoint_is_downloaded_once(master, saved):
    folder = cluster_checkpoint("exp:1", "--model m")
    shutil.rmtree(master.storage / saved["b"])
    assert cluster_checkpoint("exp:1", "--model m") == folder
    master.server.shutdown()
    assert cluster_checkpoint(f"ckpt:{saved['b']}", "--model m") == folder  # nothing to ask a master for


def test_a_damaged_checkpoint_is_not_taken(master, saved):
    folder = master.storage / saved["b"] / "checkpoint-4"
    write_manifest(folder, hash_files(folder))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)  # as large as before
    with pytest.raises(UserError, match=rf"m {saved['b']}: the checkpoint is damaged: model.safetensors has changed"):
        cluster_checkpoint("exp:1", "--model m")


def test_a_trials_checkpoints_come_by_their_steps(master, saved):
    """Not by their metrics, nor by times, and without those that were deleted."""
    assert trial_checkpoints(1) == [saved["b"], saved["a"]]
    assert trial_checkpoints(2) == [saved["unvalidated"], saved["c"]]
    master.trials[1].deleted.add(saved["b"])
    assert trial_checkpoints(1) == [saved["a"]]
    master.server.shutdown()
    master.server.server_close()
    with pytest.raises(TemporaryError, match=rf"trial 1: no Determined master at {master.url}"):
        trial_checkpoints(1)


def test_a_checkpoint_comes_through_the_master_where_its_storage_cannot_be_reached(master, saved, tmp_path):
    master.hidden_storage = master.storage.rename(tmp_path / "elsewhere")
    folder = cluster_checkpoint("exp:1", "--model m")
    assert "model.safetensors" in files_of(folder)
    assert "optimizer.pt" not in files_of(folder)
    load_model_and_tokenizer(str(folder))


def test_the_published_flags_exp_id_and_trial_id_work(call, saved, tiny):
    status, out, err = call(
        *(inference.main, "--exp_id", 1, "--trial_id", 2, "--dataset", tiny / "questions"),
        *("--number-of-samples", 1, "--max-new-tokens", 2, "--device", "cpu"),
    )
    assert status == 0, err
    assert f"exp:1: trial 1, checkpoint {saved['b']}" in out
    assert f"trial:2: trial 2, checkpoint {saved['c']}" in out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("exp:9", "exp:9: {url} has no such experiment"),
        ("trial:9", "trial:9: {url} has no such trial"),
        ("ckpt:6b6fbaa7-faa9-4449-867b-2939a147a335", "2939a147a335: {url} has no such checkpoint"),
        ("exp:2", "exp:2: the experiment has no checkpoint yet that was validated"),
        ("trial:3", "trial:3: the trial has no checkpoint yet that was validated"),
        ("exp:best", "'exp:best': after exp: comes the number of the experiment"),
        ("ckpt:../x", "'../x' is not a checkpoint UUID"),
        ("model:nobody", "model:nobody: {url} has no such model"),
        ("model:nobody:1", "model:nobody:1: {url} has no such model"),
        ("model:helper:9", "model:helper:9: {url} has no such version of this model"),
        ("model:new", "model:new: the model has no version"),
        ("model:helper:two", "'model:helper:two': the version 'two' is not a number"),
    ],
)
def test_mistakes_get_one_line(call, master, saved, source, message):
    master.models = {"helper": [saved["a"]], "new": []}
    status, _, err = call(inference.main, "--model", f"m={source}")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: --model m")
    assert message.format(url=master.url) in err


def test_a_missing_master_is_named_in_one_line(master):
    master.server.shutdown()
    master.server.server_close()
    with pytest.raises(UserError, match=rf"exp:1: no Determined master at {master.url} \(the environment variable"):
        cluster_checkpoint("exp:1", "--model m")


def test_a_local_uuid_that_is_not_here_may_be_on_a_cluster(call, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_CHECKPOINT_STORAGE", str(tmp_path))
    name = "6b6fbaa7-faa9-4449-867b-2939a147a335"
    status, _, err = call(inference.main, "--model", f"m={name}")
    assert status == 2
    assert err.endswith(f" (LOCAL_CHECKPOINT_STORAGE names another folder); if it is on a cluster, give ckpt:{name}\n")
    (tmp_path / name).mkdir()
    _, _, err = call(inference.main, "--model", f"m={name}")
    assert err == f"error: --model m {name}: the checkpoint holds no model weights (*.safetensors)\n"


@pytest.fixture
def adapted(master, save, saved):
    """A checkpoint of a trial with lora that started from one with all weights; returns its UUID."""
    below = next((master.storage / saved["b"]).iterdir())
    return save(2, 9, make=lambda folder: save_adapter(folder, below, checkpoint=saved["b"]))


def test_what_an_adapter_stands_on_is_downloaded_with_it(master, saved, adapted):
    folder = cluster_checkpoint(f"ckpt:{adapted}", "--model m")
    assert files_of(folder) >= {"adapter_model.safetensors", "adapter_config.json", "trial.json"}
    assert {path.name for path in cached_checkpoint(saved["b"]).glob("*/*")} >= {"model.safetensors", "config.json"}
    model, _ = load_model_and_tokenizer(str(folder))
    master.server.shutdown()
    shutil.rmtree(master.storage)
    assert cluster_checkpoint(f"ckpt:{adapted}", "--model m") == folder
    again, _ = load_model_and_tokenizer(str(folder))
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_an_adapter_whose_base_is_gone_is_one_line(master, saved, adapted):
    master.trials[1].deleted.add(saved["b"])
    message = f"--model m ckpt:{adapted}: its base ckpt:{saved['b']}: the checkpoint is deleted"
    with pytest.raises(UserError, match=message):
        cluster_checkpoint(f"ckpt:{adapted}", "--model m")
    folder = str(next(cached_checkpoint(adapted).glob("checkpoint-*")))
    with pytest.raises(UserError, match=f"it is an adapter on the checkpoint {saved['b']}: no such checkpoint in"):
        load_model_and_tokenizer(folder)
