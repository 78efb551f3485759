"""What DPO starts from if a cluster has it, on this machine: trained, shown in a dry run, compared."""

import json
import re
import shutil

import pytest
from adapter_folders import save_adapter
from conftest import REPO

import inference
import local_experiment
from comparison.own_training import describe_betas, held_out_alike, reward_betas
from comparison.questions import Questions
from config.experiment import read_experiment_config
from config.hyperparameters import DataSource
from experiment.container_paths import ContainerPaths
from experiment.next_steps import base_model
from experiment.results import Experiment
from storage.checkpoints import local_checkpoint
from storage.origins import Origin, read_origin

MODEL_CKPT = "hyperparameters.model_ckpt"


def test_a_run_keeps_the_checkpoint_that_a_name_stood_for(
    call, write_config, dpo_config, master, save, saved, tiny, tmp_path
):
    """It trains from it, its checkpoint says so, and a comparison takes beta, base and the held-out pairs from that."""
    for uuid in saved.values():
        folder = next((master.storage / uuid).iterdir())
        Origin("their-base", None, None, 42, []).write(folder)
        for report in master.trials[1].of_kind("checkpoint"):
            report["resources"].setdefault(f"{folder.name}/trial.json", "1")
    changes = {"training_args__max_steps": 1, "training_args__data_seed": 7, "dpo_beta": 0.02}
    changes |= {"datasets": [str(tiny / "conversations")]}
    config = write_config(dpo_config, **{f"hyperparameters__{key}": value for key, value in changes.items()})
    words = (local_experiment.main, config, "--config", f"{MODEL_CKPT}=exp:1", "--output", tmp_path / "out")
    status, out, err = call(*words)
    assert status == 0, err
    assert f"DPO starts from checkpoint ckpt:{saved['b']}" in out
    (trial,) = map(json.loads, (tmp_path / "out" / "trials.jsonl").read_text().splitlines())
    assert trial["hparams"]["model_ckpt"] == f"ckpt:{saved['b']}"
    dpo = trial["checkpoint_uuid"]
    origin = read_origin(local_checkpoint(dpo, "test"))
    assert (origin.base, origin.model_ckpt, origin.beta, origin.data_seed) == ("their-base", saved["b"], 0.02, 7)
    assert f"Next: python inference.py --model base=their-base --model sft=ckpt:{saved['b']} --model dpo={dpo}" in out

    save(1, 6, 0.9)  # a better one
    status, out, err = call(*words)
    assert status == 0, err
    assert "completed before, kept" in out
    (tmp_path / "out" / "command.json").write_bytes(bytes(100))
    status, out, err = call(*words)
    assert status == 0, err
    assert f"damaged; exp:1 is ckpt:{saved['b']}, as experiment.json has it" in out
    assert "completed before, kept" in out
    assert json.loads((tmp_path / "out" / "command.json").read_text())["checkpoints"] == {"exp:1": f"ckpt:{saved['b']}"}

    models = ("--model", f"sft=ckpt:{saved['b']}", "--model", f"dpo={dpo}", "--reference", "sft", "--device", "cpu")
    words = (inference.main, *models, "--dataset", tiny / "conversations", "--max-new-tokens", 1)
    words += ("--number-of-samples", 1, "--number-of-pairs", 40)
    status, _, err = call(*words, "--data-seed", 7, "--output_file", tmp_path / "own.json")
    assert status == 0, err
    status, out, err = call(*words, "--data-seed", 8, "--beta", 0.04, "--output_file", tmp_path / "other.json")
    assert status == 0, err
    own, other = (json.loads((tmp_path / name).read_text()) for name in ("own.json", "other.json"))
    assert "rewards with beta 0.02, as dpo had in training" in own["settings"]
    assert "rewards with beta 0.04." in other["settings"]
    known = re.search(r"dpo was trained on the prompts of (\d+) of these \d+ pairs: .*data_seed 7", other["settings"])
    assert int(known[1]) > 20
    assert known[0] in out
    assert "was trained on" not in own["settings"]


def test_rewards_take_the_beta_of_the_training():
    models = dict.fromkeys(("base", "sft", "dpo", "other"), "")
    origins = {"sft": Origin("b", None, None, 42, []), "dpo": Origin("b", "u", 0.01, 42, [])}
    betas = reward_betas(models, origins, None)
    assert set(betas.values()) == {0.01}  # one for all, so that the margins compare
    assert describe_betas(betas, origins, None) == "rewards with beta 0.01, as dpo had in training"
    origins["other"] = Origin("b", "u", 0.5, 42, [])
    betas = reward_betas(models, origins, None)
    assert betas == {"base": 0.1, "sft": 0.1, "dpo": 0.01, "other": 0.5}
    assert "(0.01 for dpo, 0.5 for other, 0.1 for others)" in describe_betas(betas, origins, None)
    assert describe_betas(reward_betas(models, origins, 0.3), origins, 0.3) == "rewards with beta 0.3"
    assert reward_betas(models, {}, None)["dpo"] == 0.1


def test_without_a_checkpoint_dpo_is_not_run_but_shown(call, write_config, dpo_config, tmp_path):
    config = write_config(dpo_config, hyperparameters__model_ckpt=None)
    status, _, err = call(local_experiment.main, config, "--output", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1)
    assert re.search(
        r"^error: .*hyperparameters.model_ckpt is missing: give the UUID of an SFT checkpoint, or exp:12", err
    )
    assert not (tmp_path / "out").exists()
    status, out, err = call(local_experiment.main, config, "--dry-run")
    assert status == 0, err
    assert "model_ckpt is missing, and a training needs one" in out
    assert "Token by token" in out


@pytest.mark.parametrize("reached", [True, False])
def test_a_dry_run_from_a_clusters_checkpoint(
    call, write_config, dpo_config, sft_config, master, saved, tiny, tmp_path, reached
):
    """With the tokenizer in its storage or, where that is out of reach, with one that its trial says how to make."""
    master.trials[1].hparams = sft_config["hyperparameters"]
    if not reached:
        master.hidden_storage = master.storage.rename(tmp_path / "elsewhere")
    config = write_config(dpo_config, hyperparameters__model_ckpt="exp:1")
    status, out, err = call(local_experiment.main, config, "--dry-run")
    assert status == 0, err
    assert f"exp:1, checkpoint {saved['b']}" in re.sub(r"\s+", " ", out)
    assert ("shown with the tokenizer of" in re.sub(r"\s+", " ", out)) == (not reached)
    assert ("<|im_end|> is 1 token" in re.sub(r"\s+", " ", out)) == (not reached)  # the saved one is a bare base
    status, _, err = call(local_experiment.main, config, "--dry-run", "--config", f"{MODEL_CKPT}=exp:2")
    assert (status, err.count("\n")) == (2, 1)
    assert "exp:2: the experiment has no checkpoint yet that was validated" in err


def test_a_dry_run_from_a_clusters_adapter(call, write_config, dpo_config, master, save, saved, tiny, tmp_path):
    """It is small, so it is downloaded; of the checkpoint below it only what is small. A base may be a container's."""
    below = next((master.storage / saved["b"]).iterdir())
    tokens = {"chat_tokens": {"add_chat_tokens": True}}
    on_checkpoint = save(2, 9, make=lambda folder: save_adapter(folder, below, checkpoint=saved["b"], **tokens))
    on_folder = save(2, 10, make=lambda folder: save_adapter(folder, tiny / "base", **tokens))
    file = master.storage / on_folder / "checkpoint-10" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(tiny), "/inside"))
    (below / "model.safetensors").write_bytes(b"not to be read")
    for uuid, lora in [(on_checkpoint, {"r": 2}), (on_checkpoint, None), (on_folder, {"r": 2})]:
        mounts = [{"host_path": str(tiny), "container_path": "/inside"}]
        changes = {"hyperparameters__model_ckpt": f"ckpt:{uuid}", "hyperparameters__lora": lora, "bind_mounts": mounts}
        status, out, err = call(local_experiment.main, write_config(dpo_config, **changes), "--dry-run")
        assert status == 0, err
        shown = " ".join(out.split())
        assert "<|im_end|> is 1 token" in shown
        assert "shown with the tokenizer of" not in shown
        assert "Estimated peak memory" in shown

    # Where nobody has the base: as the trial began.
    master.trials[2].hparams = {"model_name": str(tiny / "base"), **tokens}
    config = write_config(dpo_config, hyperparameters__model_ckpt=f"ckpt:{on_folder}")
    status, out, err = call(local_experiment.main, config, "--dry-run")
    assert status == 0, err
    assert "it is an adapter on /inside/base, which is not here" in " ".join(out.split())
    assert "<|im_end|> is 1 token" in " ".join(out.split())


def test_a_dry_run_says_what_only_containers_see(call, write_config, dpo_config, tiny, tmp_path):
    shutil.copytree(tiny / "questions", tmp_path / "disk" / "questions")
    mounts = [{"host_path": str(tmp_path / "disk"), "container_path": "/inside"}]
    config = write_config(dpo_config, bind_mounts=mounts, hyperparameters__datasets=["/inside/questions"])
    status, out, err = call(local_experiment.main, config, "--dry-run", "--examples", 0)
    assert status == 0, err
    assert f"/inside/questions of the containers is {tmp_path}/disk/questions of this machine" in " ".join(out.split())
    assert "Estimated peak memory" in out
    both = ["--config", "hyperparameters.datasets=[/inside/questions, /inside/other]"]
    status, out, err = call(local_experiment.main, config, "--dry-run", *both)
    assert status == 0, err
    shown = " ".join(out.split())
    assert "not checked: only the containers see /inside/" in shown
    assert "rows are used" in shown
    assert "Estimated peak memory" not in shown
    wrong = ["--config", "hyperparameters.datasets=[/inside/other, ./nowhere]"]
    status, _, err = call(local_experiment.main, config, "--dry-run", *wrong)
    assert (status, err) == (2, "error: data set ./nowhere: no such file or folder\n")
    status, _, err = call(local_experiment.main, config, "--dry-run", "--config", "hyperparameters.dpo_beta=0", *both)
    assert status == 2
    assert "dpo_beta 0 is not greater than 0" in err


def test_what_a_training_held_out_depends_on_seed_and_ratio_not_on_names():
    there = Origin("base", None, 0.1, 42, [DataSource("/host_tmp/a"), DataSource("b", eval_ratio=0.3)])
    split = Origin("base", None, 0.1, 42, [DataSource("a", eval_split="test")])

    def alike(origin, *sources, evaluation=(), seed=42):
        return held_out_alike(Questions([], [], None, sources, evaluation, seed), origin)

    assert alike(there, DataSource("/tmp/a"), DataSource("c", eval_ratio=0.1))
    assert not alike(there, DataSource("/tmp/a"), seed=7)
    assert not alike(there, DataSource("b", eval_ratio=0.25))  # of a, a fifth was held out
    assert not alike(there, DataSource("/tmp/a"), evaluation=(DataSource("/host_tmp/a"),))  # with what was trained on
    assert alike(split, DataSource("a", eval_split="test"))
    assert not alike(split, DataSource("a"))


def test_the_innermost_mount_decides_where_a_path_is(tmp_path):
    (tmp_path / "a").mkdir()
    mounts = [("/dat", "/no/such"), ("/data/in", str(tmp_path)), ("/data", "/no/such")]
    paths = ContainerPaths({"bind_mounts": [{"container_path": c, "host_path": h} for c, h in mounts]})
    values = {"datasets": ["/data/in/a", {"name": "/data/inner"}], "training_args": {"output_dir": "/data/in/a"}}
    values |= {"model_name": {"type": "categorical", "vals": ["owner/m", "/data/in/a"]}}
    here = paths.translate(values)
    assert here["datasets"] == [str(tmp_path / "a"), {"name": "/data/inner"}]
    assert here["training_args"] == values["training_args"]
    assert here["model_name"]["vals"] == ["owner/m", str(tmp_path / "a")]
    assert list(paths.unseen) == ["/data/inner"]


def test_the_base_of_a_comparison_is_what_sft_began_with(master, saved):
    """Not dpo.yaml's model_name, which had no part in it."""
    experiment = Experiment("dpo", read_experiment_config(str(REPO / "dpo.yaml")))
    master.trials[1].hparams = {"model_name": "their-base"}
    for name in ("exp:1", f"ckpt:{saved['b']}"):
        assert base_model(experiment, {"model_name": "unused"}, name) == "their-base"
    master.trials[2].hparams = {"model_name": "unused", "model_ckpt": saved["b"]}  # DPO after DPO
    assert base_model(experiment, {"model_name": "unused"}, "trial:2") == "their-base"
    assert base_model(experiment, {"model_name": "used"}, None) == "used"
