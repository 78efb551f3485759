"""The published YAMLs on a cluster whose master alone is made up (see cluster.py): created, preempted, killed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from cluster import PROFILED, Container, Master, containers_work
from conftest import REPO, metrics_by_step, run_script, scalars
from determined.common import util
from determined.common.api import Session
from determined.core import DummyDistributedContext, ProfilerContext
from determined.core._metrics import _MetricsContext
from processes import run_ranks
from safetensors.torch import load_file

import inference
from comparison.options import parse_command_line, parse_hyperparameters
from storage.manifests import MANIFEST
from storage.origins import read_origin
from trial.events import read_events

needs_containers = pytest.mark.skipif(not containers_work(), reason="this machine lets us make no namespaces")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def master(folder):
    (folder / "storage").mkdir()
    with Master(folder / "storage") as master:
        yield master
        assert master.unknown == []


@pytest.fixture(scope="module")
def det(master, folder):
    """Determined's own CLI, as a user calls it."""

    def det(*words: object, cwd: Path = REPO) -> subprocess.CompletedProcess:
        command = [Path(sys.executable).parent / "det", "-m", master.url, *map(str, words)]
        environment = {**os.environ, "HOME": str(folder), "DET_USER": "determined", "DET_PASS": "Strong-enough-1"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)

    return det


@pytest.fixture(scope="module")
def create(master, det):
    """`det e create CONFIG .`, in the repository, as a user would; returns the trials that the master then has."""

    def create(config: str, bundle: Path = REPO, **overrides):
        words = ["e", "create", config, "."]
        for key, value in overrides.items():
            words += ["--config", f"{key.replace('__', '.')}={yaml.safe_dump(value, default_flow_style=True).strip()}"]
        shown = det(*words, cwd=bundle)
        assert f"Created experiment {len(master.experiments)}" in shown.stdout, shown.stderr
        uploaded = [file for file in master.experiments[len(master.experiments)]["raw"] if "/tiny/" not in file["path"]]
        assert len(json.dumps(uploaded)) < 2**21  # with .venv and all here
        return [trial for trial in master.trials.values() if trial.experiment_id == len(master.experiments)]

    return create


@pytest.fixture(scope="module")
def start(master, folder, tiny):
    def start(trial, slots: int, uid: int | None = None, **env: str) -> Container:
        env = {"HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", **env}
        keep = [folder, tiny, REPO, Path(sys.prefix)]
        return Container(master, trial, slots, keep, folder / "containers", uid, **env)

    return start


@pytest.fixture(scope="module")
def untouched(master, folder):
    """The reports of a trial's hyperparameters off the cluster, and the weights they end with."""

    def untouched(trial, script: str, ranks: int):
        config = master.experiments[trial.experiment_id]["config"]
        config = config | {"hyperparameters": trial.hparams, "searcher": config["searcher"] | {"name": "single"}}
        path, output = folder / f"{script}.yaml", folder / f"untouched-{trial.id}"
        path.write_text(util.yaml_safe_dump(config))
        log = output.with_suffix(".log")
        assert run_ranks(script, "--config", path, "--output", output, log=log, ranks=ranks) == 0, log.read_text()
        reports = read_events(output / "events.jsonl")
        return reports, weights(Path(os.environ["LOCAL_CHECKPOINT_STORAGE"]), reports)

    return untouched


def weights(storage: Path, reports):
    uuid = [report["uuid"] for report in reports if report["kind"] == "checkpoint"][-1]
    (file,) = (storage / uuid).glob("checkpoint-*/*model.safetensors")
    return load_file(file)


def store_here(master, uuid):
    """Off the cluster a checkpoint has to be in the local store."""
    store = Path(os.environ["LOCAL_CHECKPOINT_STORAGE"])
    store.mkdir(exist_ok=True)
    (store / uuid).symlink_to(master.storage / uuid)


def same_as(untouched, trial, master) -> bool:
    reports, before = untouched
    after = weights(master.storage, trial.reports)
    assert metrics_by_step(reports) == metrics_by_step(trial.reports)
    return all(torch.equal(before[name], after[name]) for name in before)


SMALL = {
    "hyperparameters__training_args__max_steps": 4,
    "hyperparameters__training_args__gradient_accumulation_steps": 2,
    "hyperparameters__training_args__logging_steps": 1,
    "hyperparameters__training_args__eval_steps": 2,
    "hyperparameters__training_args__save_steps": 2,
}


@pytest.fixture(scope="module")
def create_sft(create, tiny):
    def create_sft(**overrides):
        (trial,) = create(
            "sft.yaml",
            **SMALL,
            hyperparameters__model_name=str(tiny / "base"),
            hyperparameters__dataset=str(tiny / "instructions"),
            hyperparameters__dataset_subsets=[{"subset": "home", "number_of_samples": 40}],
            hyperparameters__max_seq_length=256,
            resources__slots_per_trial=1,
            **overrides,
        )
        return trial

    return create_sft


@pytest.fixture(scope="module")
def create_dpo(create, tiny):
    def create_dpo(**overrides):
        return create(
            "dpo.yaml",
            **SMALL,
            hyperparameters__datasets=[str(tiny / "questions")],
            hyperparameters__training_args__precompute_ref_batch_size=32,
            hyperparameters__training_args__per_device_eval_batch_size=32,
            hyperparameters__max_length=384,
            hyperparameters__max_prompt_length=192,
            hyperparameters__max_target_length=192,
            **overrides,
        )

    return create_dpo


@pytest.fixture(scope="module")
def sft_trial(create_sft):
    return create_sft(hyperparameters__training_args__report_to=["tensorboard"], profiling__begin_on_batch=2)


@pytest.fixture(scope="module")
def sft_starts(master, start, sft_trial):
    """The containers of an SFT trial that was preempted in its first steps, and their logs."""

    def preempt(trial, report):
        trial.preempt |= report["kind"] == "training" and report["steps_completed"] == 1

    master.watch = preempt
    first = start(sft_trial, slots=1)
    assert first.wait() == 0, first.log.read_text()
    master.watch = lambda trial, report: None
    second = start(sft_trial, slots=1)
    assert second.wait() == 0, second.log.read_text()
    return first, second


@needs_containers
def test_sft_preempted_on_one_slot_ends_like_untouched(master, sft_starts, untouched, sft_trial):
    _, second = sft_starts
    assert sft_trial.acknowledged == 1
    saved = sft_trial.of_kind("checkpoint")[0]
    assert saved["steps_completed"] < 4
    assert f"resuming from checkpoint {saved['uuid']}" in second.log.read_text()
    assert [r["steps_completed"] for r in sft_trial.of_kind("checkpoint")][-1] == 4
    assert sft_trial.of_kind("progress")[-1]["progress"] == 1.0
    assert sft_trial.of_kind("status")[-1]["status"] == "training"
    assert same_as(untouched(sft_trial, "sft_finetune", 1), sft_trial, master)


@needs_containers
def test_a_trial_that_the_search_stops_saves_the_step_where_it_was_compared(master, create_sft, start):
    """The master only calls it STOPPING_COMPLETED, before it stores the evaluation, and sends no signal."""
    trial = create_sft()
    searcher = {"name": "adaptive_asha", "max_trials": 4, "time_metric": "batches", "max_time": 4}
    master.experiments[trial.experiment_id]["config"]["searcher"] |= searcher
    trial.state = "STATE_RUNNING"

    def search(trial, report):
        if report["kind"] == "validation":
            trial.state = "STATE_STOPPING_COMPLETED"

    master.watch = search
    container = start(trial, slots=1)
    assert container.wait() == 0, container.log.read_text()
    master.watch = lambda trial, report: None
    assert "the search ends this trial with its evaluation at step 2" in container.log.read_text()
    for kind in ("training", "validation", "checkpoint"):
        assert trial.of_kind(kind)[-1]["steps_completed"] == 2
    assert trial.acknowledged == 0


@needs_containers
def test_metrics_are_on_the_trials_board_and_a_restart_goes_on(master, sft_starts, sft_trial):
    """TensorBoard's files are in the storage, where the cluster looks for those of a trial; the profiler has run."""
    board = master.storage / "stand-in" / "tensorboard" / "experiment" / "1" / "trial" / str(sft_trial.id)
    shown = scalars(board)
    for kind, prefix in (("training", "Determined/"), ("validation", "Determined/val_")):
        reported = {r["steps_completed"]: r["metrics"] for r in sft_trial.of_kind(kind)}
        for name in {name for metrics in reported.values() for name in metrics}:
            expected = {step: metrics[name] for step, metrics in reported.items() if name in metrics}
            assert shown[prefix + name] == pytest.approx(expected, rel=1e-6), name
    assert list(shown["Determined/loss"]) == [1, 2, 3, 4]
    assert {"Determined/tokens_per_second", "Determined/val_eval_loss"} <= shown.keys()
    assert scalars(board / "trainer")["train/loss"] == shown["Determined/loss"]  # report_to: [tensorboard]
    for container in sft_starts:
        log = container.log.read_text()
        assert log.count("Starting system metrics profiling.") == 1
        assert "profiling.begin_on_batch and end_after_batch have no effect" in log
        assert "TensorFlow" not in log


def test_what_the_profiler_sends(master, sft_trial, caplog):
    """With this environment's packages, in samples of a tenth of a second; and it ends with its context."""
    session = Session(master.url, "determined", "token", None)
    metrics = _MetricsContext(session, sft_trial.id, 1)
    profiler = ProfilerContext("agent", metrics, DummyDistributedContext())
    metrics.start()
    profiler.on(sampling_interval=0.1, samples_per_report=2)
    deadline = time.monotonic() + 20
    while not (sent := sft_trial.of_kind("network")) and time.monotonic() < deadline:
        time.sleep(0.02)
    profiler.off()
    metrics.close()
    sft_trial.reports[:] = [report for report in sft_trial.reports if report["kind"] not in PROFILED]
    assert sent[0]["metrics"]["agent"].keys() == {"net_throughput_sent", "net_throughput_recv"}
    assert "pynvml module not found" not in caplog.text  # else nothing of a GPU would be sent


@needs_containers
def test_a_container_resumes_from_the_checkpoint_before_a_damaged_one(master, start, sft_starts, sft_trial, untouched):
    """It asks the master which one that is."""
    earlier, last = [report["uuid"] for report in sft_trial.of_kind("checkpoint")][-2:]
    (weights_file,) = (master.storage / last).glob("checkpoint-*/model.safetensors")
    weights = weights_file.read_bytes()
    weights_file.write_bytes(weights[:-8] + bytes(8))
    third = start(sft_trial, slots=1)
    assert third.wait() == 0, third.log.read_text()
    weights_file.write_bytes(weights)  # for the tests below
    (told,) = [report["status"] for report in sft_trial.of_kind("status") if "damaged" in report["status"]]
    assert told.startswith(f"checkpoint {last} is damaged (model.safetensors has changed since it was saved")
    assert f": resuming from checkpoint {earlier}, checkpoint-" in told
    assert same_as(untouched(sft_trial, "sft_finetune", 1), sft_trial, master)


@needs_containers
def test_dpo_killed_on_two_slots_ends_like_untouched(
    master, create_dpo, start, untouched, sft_starts, sft_trial, tiny, folder
):
    """From the best checkpoint of the test above, which both ranks get through one download, at both starts."""
    validated = master.experiment_checkpoints(sft_trial.experiment_id, None, None)["checkpoints"]
    best = next(found for found in validated if found["training"]["searcherMetric"] is not None)
    sft_checkpoint, sft_step = best["uuid"], best["metadata"]["steps_completed"]
    trials = create_dpo(hyperparameters__model_ckpt=f"exp:{sft_trial.experiment_id}")
    assert len(trials) == 9
    trial = trials[0]

    def kill(trial, report):
        if report["kind"] == "checkpoint" and report["steps_completed"] == 4:
            container.kill()  # all of it is uploaded, and nobody knows
            raise ConnectionError

    master.watch = kill
    container = start(trial, slots=2)
    assert container.wait() == -signal.SIGKILL, container.log.read_text()
    assert [r["steps_completed"] for r in trial.of_kind("checkpoint")] == [2]
    master.watch = lambda trial, report: None
    second = start(trial, slots=2)
    assert second.wait() == 0, second.log.read_text()
    assert [r["steps_completed"] for r in trial.of_kind("checkpoint")] == [2, 4]
    assert second.log.read_text().count("Starting system metrics profiling.") == 1  # of a machine, not of each slot
    assert "tokens_per_second_per_device" in trial.of_kind("training")[-1]["metrics"]
    told = [report["status"] for report in trial.of_kind("status")]
    passes = [status.split(" in ")[0] for status in told if status.startswith("reference log-probs")]
    assert passes == ["reference log-probs computed", "reference log-probs reused"]
    named = f"exp:{sft_trial.experiment_id} is checkpoint {sft_checkpoint}"
    assert told.count(named) == 2
    downloaded = folder / "huggingface" / "determined" / sft_checkpoint / f"checkpoint-{sft_step}"
    assert read_origin(downloaded).base == str(tiny / "base")
    assert not list(downloaded.glob("optimizer*"))
    saved = read_origin(next((master.storage / trial.of_kind("checkpoint")[-1]["uuid"]).glob("checkpoint-*")))
    assert (saved.base, saved.model_ckpt, saved.beta) == (str(tiny / "base"), sft_checkpoint, trial.hparams["dpo_beta"])
    store_here(master, sft_checkpoint)
    trial.hparams = trial.hparams | {"model_ckpt": sft_checkpoint}
    assert same_as(untouched(trial, "dpo_finetune", 2), trial, master)


@needs_containers
def test_lora_from_sft_through_dpo(master, create_sft, create_dpo, start, untouched, folder):
    """SFT on one slot; and DPO from the best of it on two, killed."""
    lora = {"hyperparameters__lora": {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}}
    single = lora | {"hyperparameters__dpo_beta": 0.1, "hyperparameters__training_args__learning_rate": 1e-3}
    single |= {f"hyperparameters__training_args__{name}": None for name in ("fsdp", "fsdp_config")}
    sft = create_sft(**lora)

    def kill(trial, report):
        if trial.id == dpo.id and report["kind"] == "training" and report["steps_completed"] == 3:
            containers[-1].kill()
            raise ConnectionError

    (dpo,) = create_dpo(**single, hyperparameters__model_ckpt=f"exp:{sft.experiment_id}")
    master.watch, containers = kill, []
    for trial, slots in ((sft, 1), (dpo, 2), (dpo, 2)):
        containers.append(start(trial, slots))
        assert containers[-1].wait() in (0, -signal.SIGKILL), containers[-1].log.read_text()
        master.watch = kill if trial is sft else lambda trial, report: None
    assert [r["steps_completed"] for r in dpo.of_kind("checkpoint")] == [2, 4]
    assert "resuming from checkpoint" in containers[-1].log.read_text()

    needed = {"adapter_model.safetensors", "adapter_config.json", "generation_config.json", MANIFEST}
    needed |= {"tokenizer.json", "chat_template.jinja", "trial.json"}
    for number, trial in enumerate((sft, dpo)):
        (saved,) = (master.storage / trial.of_kind("checkpoint")[-1]["uuid"]).glob("checkpoint-*")
        found = {str(file.relative_to(saved)) for file in saved.rglob("*") if file.is_file()}
        assert needed <= found
        assert not {"model.safetensors", "config.json"} & found
        below = {name for name in found if "/" in name}
        of_each = ("adapter_model.safetensors", "adapter_config.json", "trial.json")
        assert below == {f"stands_on/{n}/{name}" for n in range(number) for name in of_each}
    # Off the cluster the SFT checkpoint has to be in the local store.
    told = [report["status"].split(" is checkpoint ") for report in dpo.of_kind("status")]
    (uuid,) = {words[1] for words in told if len(words) == 2}
    store = Path(os.environ["LOCAL_CHECKPOINT_STORAGE"])
    store.mkdir(exist_ok=True)
    (store / uuid).symlink_to(master.storage / uuid)
    dpo.hparams = dpo.hparams | {"model_ckpt": uuid}
    assert same_as(untouched(dpo, "dpo_finetune", 2), dpo, master)


@needs_containers
def test_a_preempted_comparison_answers_nothing_twice(
    master, create, start, det, sft_starts, sft_trial, tiny, call, tmp_path
):
    """Of the base and the trial above. What was answered before the preemption is not answered again."""
    options = {
        **{"number_of_samples": 4, "number_of_pairs": 4, "max_new_tokens": 4, "batch_size": 2},
        "dataset": [str(tiny / "questions")],
    }
    (trial,) = create(
        "inference.yaml",
        **{f"hyperparameters__{key}": value for key, value in options.items()},
        hyperparameters__model={"base": str(tiny / "base"), "sft": f"trial:{sft_trial.id}", "dpo": str(tiny / "base")},
    )

    def preempt(trial, report):
        trial.preempt |= report["kind"] == "checkpoint"

    master.watch = preempt
    first = start(trial, slots=1)
    assert first.wait() == 0, first.log.read_text()
    assert trial.acknowledged == 1
    master.watch = lambda trial, report: None
    second = start(trial, slots=1)
    assert second.wait() == 0, second.log.read_text()
    assert "base: " not in second.log.read_text()  # nor the dpo model, which is the same one here
    assert "sft: 4 answers" in second.log.read_text()
    assert trial.of_kind("progress")[-1]["progress"] <= 1

    steps = [report["steps_completed"] for report in trial.of_kind("checkpoint")]
    assert steps == sorted(set(steps))
    (validation,) = trial.of_kind("validation")
    assert validation["steps_completed"] == steps[-1]
    assert validation["metrics"]["questions"] == 4
    assert 0 <= validation["metrics"]["sft/preference_accuracy"] <= 1
    page = master.storage / trial.of_kind("checkpoint")[-1]["uuid"]
    assert {path.name for path in page.iterdir()} - {"metadata.json"} == {
        "comparison.html",
        "comparison.json",
        MANIFEST,
    }

    # The page is the only checkpoint that is left, and the log ends with the command that downloads it.
    unfinished = {report["uuid"] for report in trial.of_kind("checkpoint")} - {page.name}
    assert trial.deleted == unfinished != set()
    assert not any((master.storage / uuid).exists() for uuid in unfinished)
    *_, download = second.log.read_text().splitlines()
    assert download == f"det checkpoint download {page.name} -o exp-{trial.experiment_id}-comparison"
    assert "Written to" not in second.log.read_text()  # a path of the container
    downloaded = det(*shlex.split(download)[1:], cwd=tmp_path)
    assert downloaded.returncode == 0, downloaded.stderr
    here = tmp_path / f"exp-{trial.experiment_id}-comparison" / "comparison.html"
    assert here.read_text() == (page / "comparison.html").read_text()

    # As after a power cut before the checkpoints were deleted, and before the master heard of its end.
    trial.deleted.clear()
    third = start(trial, slots=1)
    assert third.wait() == 0, third.log.read_text()
    assert third.log.read_text().splitlines()[-1] == download
    assert trial.deleted == unfinished
    assert len(trial.of_kind("validation")) == 1
    assert [report["steps_completed"] for report in trial.of_kind("checkpoint")] == steps

    # The same options, as a command line on this machine, give the same answers.
    checkpoint = next((master.storage / sft_trial.of_kind("checkpoint")[-1]["uuid"]).glob("checkpoint-*"))
    words = ["--number-of-samples", 4, "--number-of-pairs", 4, "--max-new-tokens", 4, "--batch-size", 2]
    words += ["--dataset", tiny / "questions", "--model", f"base={tiny / 'base'}", "--model", f"sft={checkpoint}"]
    words += ["--model", f"dpo={tiny / 'base'}", "--output_file", tmp_path / "c.json"]  # a cluster sorts its options
    status, _, err = call(inference.main, *words)
    assert status == 0, err
    here, there = (
        json.loads(path.read_text())["questions"] for path in (tmp_path / "c.json", page / "comparison.json")
    )
    assert len(here) == 4
    assert here == there

    (page / "comparison.json").write_text("")
    fourth = start(trial, slots=1)
    assert fourth.wait() == 0, fourth.log.read_text()
    assert f"checkpoint {page.name}: comparison.json has 0 of " in fourth.log.read_text()
    page = master.storage / trial.of_kind("checkpoint")[-1]["uuid"]
    assert json.loads((page / "comparison.json").read_text())["questions"] == here


@needs_containers
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start containers of another user")
def test_the_tiny_example_beside_another_users_cache(create, start, master, folder, tiny, tmp_path):
    """Its model and data are uploaded. HF_HOME belongs to root, and nobody may write beside it."""
    bundle, home = tmp_path / "bundle", folder / "agent" / "huggingface"
    for name in subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, bundle / name)
    shutil.copytree(tiny, bundle / "local_runs" / "tiny")
    (home / "datasets").mkdir(parents=True)
    folder.chmod(0o755)  # pytest's own are for its user alone
    master.storage.chmod(0o777)
    small = {"max_steps": 1, "logging_steps": 1, "num_train_epochs": 1}
    small = {f"hyperparameters__training_args__{key}": value for key, value in small.items()}
    (trial,) = create("examples/tiny/sft.yaml", bundle, **small)
    container = start(trial, slots=1, uid=1001, HF_HOME=str(home))
    assert container.wait() == 0, container.log.read_text()
    (told,) = [line for line in container.log.read_text().splitlines() if "HF_HOME" in line]
    assert told == (
        f"startup-hook.sh: HF_HOME {home}: Permission denied: using /tmp/huggingface-1001,"
        " with no files of models and data that can be read there"
    )
    assert [report["steps_completed"] for report in trial.of_kind("checkpoint")] == [1]
    assert (master.storage / trial.of_kind("checkpoint")[0]["uuid"]).stat().st_uid == 1001
    assert [path.name for path in home.rglob("*")] == ["datasets"]


@needs_containers
def test_a_path_that_a_container_does_not_see_is_told_with_its_bind_mounts(create, start):
    mounts = yaml.safe_load((REPO / "sft.yaml").read_text())["bind_mounts"]
    (trial,) = create("examples/tiny/sft.yaml", hyperparameters__dataset="/tmp/mine.jsonl", bind_mounts=mounts)
    container = start(trial, slots=1)
    assert container.wait() == 2
    told = "error: data set /tmp/mine.jsonl: no such file or folder"
    told += " (in a container: it sees what was uploaded, and its agent's /tmp as /host_tmp)"
    assert told in container.log.read_text().splitlines()


def test_a_yaml_and_a_command_line_give_the_same_options():
    options = {"number_of_pairs": 5, "model": {"a": "exp:1"}, "dataset": ["x", {"name": "y"}], "seed": None}
    options |= {"prompt": ["-1?"], "temperature": 1, "output_file": "a.csv", "trial_id": [2]}
    words = ["--number-of-pairs=5", "--model=a=exp:1", "--trial_id=2", "--dataset=x", '--dataset={"name": "y"}']
    words += ["--prompt=-1?", "--temperature=1", "--output-file=a.csv"]
    from_yaml, from_words = parse_hyperparameters(options), parse_command_line(words, "")
    assert from_yaml.model_dump() == from_words.model_dump()
    assert (from_yaml.number_of_pairs, from_yaml.seed, from_yaml.prompt) == (5, 0, ["-1?"])
    assert from_yaml.model == {"a": "exp:1", "trial:2": "trial:2"}


def test_a_mistake_in_the_comparisons_options_is_not_tried_again():
    (policy,) = yaml.safe_load((REPO / "inference.yaml").read_text())["log_policies"]
    unknown = run_script("inference.py", "--model=a=b", "--number-of-question=3")
    assert re.search(policy["pattern"], unknown.stderr, flags=re.MULTILINE)
    assert re.search(policy["pattern"], "error: --model sft exp:12: no such experiment")
    assert not re.search(policy["pattern"], "error (may be temporary): a hub")


@pytest.mark.parametrize("config", ["sft.yaml", "dpo.yaml"])
def test_a_mistake_is_logged_once_and_not_tried_again(config, write_config, sft_config, tmp_path):
    """The cluster looks for the line of a mistake in the log, where its launcher has put a rank before each line."""
    (policy,) = yaml.safe_load((REPO / config).read_text())["log_policies"]
    assert policy["action"] == {"type": "cancel_retries"}
    path, log = write_config(sft_config, hyperparameters__dataset="/no/such/file.jsonl"), tmp_path / "log"
    assert run_ranks("sft_finetune", "--config", path, "--output", tmp_path / "out", log=log, ranks=2) == 2
    told = [line for line in log.read_text().splitlines() if re.search(policy["pattern"], line)]
    assert told == ["error: data set /no/such/file.jsonl: no such file or folder"]
    assert re.search(policy["pattern"], f"[rank=0] {told[0]}")
    assert not re.search(policy["pattern"], "[rank=0] {'loss': 0.1} the squared error: 0.2")
