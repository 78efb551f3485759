"""What inference.py takes from a cluster: Determined's SDK against a master that alone is made up (see cluster.py)."""

import shutil
import uuid

import pytest
from cluster import Master, Trial

import inference
from errors import TemporaryError, UserError
from storage.cluster_checkpoints import cluster_checkpoint, trial_checkpoints
from storage.manifests import hash_files, write_manifest
from trial.models import load_model_and_tokenizer

CONFIG = {"searcher": {"name": "grid", "metric": "eval_rewards/accuracies", "smaller_is_better": False}}


@pytest.fixture
def master(tmp_path, monkeypatch):
    """An experiment with two trials and three validated checkpoints, and one with a trial that has none."""
    storage = tmp_path / "storage"
    with Master(storage) as master:
        for experiment_id in (1, 2):
            config = CONFIG | {"checkpoint_storage": {"type": "shared_fs", "host_path": str(storage)}}
            master.experiments[experiment_id] = {"config": config, "body": {"config": ""}}
        master.trials = {1: Trial(1, 1, {}), 2: Trial(2, 1, {}), 3: Trial(3, 2, {})}
        monkeypatch.setenv("DET_MASTER", master.url)
        monkeypatch.setenv("DET_USER", "determined")
        monkeypatch.setenv("DET_PASS", "Strong-enough-1")
        monkeypatch.setenv("HOME", str(tmp_path))
        yield master


@pytest.fixture
def save(master, tiny):
    """A checkpoint as a trial leaves it, with the tiny base for its model; returns its UUID."""

    def save(trial_id, steps, accuracy=None):
        name = str(uuid.uuid4())
        folder = master.storage / name / f"checkpoint-{steps}"
        shutil.copytree(tiny / "base", folder)
        (folder / "optimizer.pt").write_bytes(b"x" * 1000)
        resources = {f"checkpoint-{steps}/{file.name}": str(file.stat().st_size) for file in folder.iterdir()}
        report = {"kind": "checkpoint", "uuid": name, "steps_completed": steps, "resources": resources}
        master.trials[trial_id].reports.append(report)
        if accuracy is not None:
            metrics = {"eval_rewards/accuracies": accuracy}
            report = {"kind": "validation", "steps_completed": steps, "metrics": metrics}
            master.trials[trial_id].reports.append(report)
        return name

    return save


@pytest.fixture
def saved(save):
    return {"a": save(1, 2, 0.5), "b": save(1, 4, 0.75), "c": save(2, 4, 0.7), "unvalidated": save(2, 5)}


def files_of(folder):
    return {path.name for path in folder.parent.rglob("*") if path.is_file()}


def test_an_experiment_or_trial_gives_its_best_checkpoint_by_the_searchers_metric(saved):
    for source, expected in {"exp:1": "b", "trial:1": "b", "trial:2": "c", f"ckpt:{saved['a']}": "a"}.items():
        folder = cluster_checkpoint(source, "--model m")
        assert folder.parent.name == saved[expected]
        assert "optimizer.pt" not in files_of(folder)
        load_model_and_tokenizer(str(folder))


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
    ],
)
def test_mistakes_get_one_line(call, master, saved, source, message):
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
