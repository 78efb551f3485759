"""What trials make once and share: found when it is the same and only then, made by one of those that run at once."""

import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import metrics_by_step
from datasets import Dataset
from determined.core import DummyDistributedContext
from processes import run_ranks

import chat_format
import dpo_finetune
import sft_finetune
from errors import UserError
from storage.fingerprints import hash_rows, hash_tokenizer
from storage.locks import locked, only_writer
from storage.shared_cache import make_once, one_trial_at_a_time
from trial.context import Trial, TrialStopped
from trial.events import read_events

FORK = multiprocessing.get_context("fork")


def statuses(folder: Path, about: str) -> list[str]:
    return [r["status"] for r in read_events(folder / "events.jsonl") if r["kind"] == "status" and about in r["status"]]


@pytest.fixture
def short(dpo_config, tiny, tmp_path):
    """A DPO trial of one step on forty pairs."""
    pairs = (tiny / "questions" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(pairs[:40]))
    (tmp_path / "fewer.jsonl").write_text("".join(pairs[:39]))
    config = json.loads(json.dumps(dpo_config))
    config["hyperparameters"]["datasets"] = [str(tmp_path / "pairs.jsonl")]
    config["hyperparameters"]["training_args"]["max_steps"] = 1
    return config


@pytest.fixture
def run(call, write_config, tmp_path):
    """Run a trial on the cache folder of this test; returns what it says of tokenizing and of the reference pass."""
    count = 0

    def run(config, script=dpo_finetune, **changes):
        nonlocal count
        count += 1
        output = tmp_path / f"trial-{count}"
        path = write_config(config, **{f"hyperparameters__{key}": value for key, value in changes.items()})
        status, _, err = call(script.main, "--config", path, "--output", output, "--cache", tmp_path / "cache")
        assert status == 0, err
        told = [*statuses(output, "tokenized"), *statuses(output, "reference log-probs")]
        return ["reused" if "reused" in status else status.split(" in ")[0] for status in told]

    return run


COMPUTED = ["preparing the training, reference log-probs first", "reference log-probs computed"]
REUSED = ["preparing the training, reference log-probs first", "reused"]


def test_reference_log_probs_are_reused_where_their_inputs_are_the_same(run, short):
    assert run(short) == ["data tokenized", *COMPUTED]
    assert run(short) == ["reused", *REUSED]
    other = {"learning_rate": 5e-5, "seed": 7, "num_train_epochs": 3, "warmup_steps": 1}
    changes = {f"training_args__{key}": value for key, value in other.items()}
    assert run(short, dpo_beta=0.01, dpo_loss="ipo", **changes) == ["reused", *REUSED]


def test_reference_log_probs_are_computed_again_where_their_inputs_change(run, short, model, tokenizer, tmp_path):
    run(short)
    assert run(short, training_args__bf16=True) == ["reused", *COMPUTED]
    assert run(short, training_args__precompute_ref_batch_size=8) == ["reused", *COMPUTED]
    assert run(short, training_args__ld_alpha=0.5) == ["reused", *COMPUTED]
    eager = {"attn_implementation": "eager"}
    assert run(short, training_args__model_init_kwargs=eager) == ["reused", *COMPUTED]
    assert run(short, max_length=128) == ["data tokenized", *COMPUTED]
    assert run(short, max_target_length=9) == ["data tokenized", *COMPUTED]
    assert run(short, training_args__data_seed=7) == ["data tokenized", *COMPUTED]
    assert run(short, datasets=[str(tmp_path / "fewer.jsonl")]) == ["data tokenized", *COMPUTED]
    model.model.norm.weight.data += 0.1
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "other")
    assert run(short, model_name=str(tmp_path / "other")) == ["reused", *COMPUTED]
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
    assert run(short, model_name=str(tmp_path / "other")) == ["reused", *COMPUTED]  # the same weights, used otherwise
    assert run(short) == ["reused", *REUSED]  # and what was there first is there still


def test_another_template_has_the_data_tokenized_again(tokenizer, run, short, monkeypatch):
    before = hash_tokenizer(tokenizer)
    tokenizer.chat_template += " "
    assert hash_tokenizer(tokenizer) != before
    run(short)
    monkeypatch.setattr(chat_format, "CHAT_ML_TEMPLATE", "{{- bos_token }}" + chat_format.CHAT_ML_TEMPLATE)
    assert run(short)[0] == "data tokenized"


def test_sft_trials_share_tokenized_data_and_leave_nothing_else_behind(run, sft_config, tmp_path):
    short = {"training_args__max_steps": 1}
    assert run(sft_config, sft_finetune, **short) == ["data tokenized"]
    files = sorted(path for path in (tmp_path / "cache").rglob("*"))
    assert run(sft_config, sft_finetune, training_args__learning_rate=1e-5, **short) == ["reused"]
    assert sorted(path for path in (tmp_path / "cache").rglob("*")) == files
    assert run(sft_config, sft_finetune, max_seq_length=64, **short) == ["data tokenized"]


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [Path.unlink, zero], ids=["cleaned", "zeroed"])
def test_tokenized_data_that_was_damaged_is_made_again(run, short, tmp_path, damage):
    run(short)
    (file,) = (tmp_path / "cache").glob("*/train/data-*.arrow")
    damage(file)
    assert run(short) == ["data tokenized", *COMPUTED]


def half_zeroed(file: Path) -> None:
    """As a disk leaves it: TRL would read log-probs of 0 from it."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


@pytest.mark.parametrize("damage", [half_zeroed, lambda file: file.write_bytes(b"")], ids=["half zeroed", "empty"])
def test_reference_log_probs_that_were_damaged_are_computed_again(run, short, tmp_path, damage):
    run(short)
    (file,) = (tmp_path / "cache").glob("*/train/cache-*.arrow")
    content = file.read_bytes()
    damage(file)
    assert run(short) == ["reused", *COMPUTED]
    assert file.read_bytes() == content
    assert run(short) == ["reused", *REUSED]


def test_one_of_three_concurrent_trials_makes_the_reference_pass(write_config, short, tmp_path):
    """The first is killed in the middle of it. Another then makes it, and both survivors train on exactly what they
    would have alone."""
    outputs = [tmp_path / str(number) for number in range(3)]
    paths = [
        write_config(
            short,
            f"{number}.yaml",
            hyperparameters__dpo_beta=0.1 * (number + 1),
            hyperparameters__training_args__max_steps=2,
            hyperparameters__training_args__precompute_ref_batch_size=1,
        )
        for number in range(3)
    ]

    def start(number, cache=tmp_path / "cache", output=None, **interference):
        arguments = ("--config", paths[number], "--output", output or outputs[number], "--cache", cache)
        return run_ranks("dpo_finetune", *arguments, log=tmp_path / f"{number}.log", threads=1, **interference)

    with ThreadPoolExecutor() as pool:
        die, die_once = ("trl.trainer.dpo_trainer.disable_gradient_checkpointing", 20), tmp_path / "another trial waits"
        killed = pool.submit(start, 0, die=die, die_once=die_once)
        deadline = time.monotonic() + 180
        while not statuses(outputs[0], "data"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        survivors = [pool.submit(start, number) for number in (1, 2)]
        while not any(statuses(output, "waiting for another trial's reference log-probs") for output in outputs):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        die_once.touch()
        assert killed.result() == -signal.SIGKILL
        assert [trial.result() for trial in survivors] == [0, 0]
    told = [statuses(outputs[number], "reference log-probs ")[-1] for number in (1, 2)]
    assert sorted(text.split(" in ")[0] for text in told) == [
        "reference log-probs computed",
        "reference log-probs reused",
    ]
    assert not statuses(outputs[0], "reference log-probs computed")
    for number in (1, 2):
        assert start(number, cache=tmp_path / f"own-{number}", output=tmp_path / f"alone-{number}") == 0
        shared, alone = (read_events(tmp_path / f / "events.jsonl") for f in (str(number), f"alone-{number}"))
        assert metrics_by_step(shared) == metrics_by_step(alone)


def test_a_trial_that_waits_can_be_preempted(tmp_path):
    told = []
    train, preempt = SimpleNamespace(set_status=told.append), SimpleNamespace(should_preempt=lambda: len(told) > 0)
    core_context = SimpleNamespace(distributed=DummyDistributedContext(), train=train, preempt=preempt)
    trial = Trial(None, core_context, 1, None, None, tmp_path, on_cluster=True)

    def enter():
        lock_file, on_wait = tmp_path / "key.lock", lambda: trial.status("waiting for another trial")
        return one_trial_at_a_time(lock_file, core_context.distributed, on_wait, trial.stop_if_preempted)

    with locked(tmp_path / "key.lock", on_wait=never), pytest.raises(TrialStopped), enter():
        never()
    assert told == ["waiting for another trial"]
    with enter():
        assert len(told) == 1


def test_the_hash_of_rows_depends_on_their_contents_only():
    rows = Dataset.from_dict({"a": [1, 2, 3], "b": ["x", "y", "z"]})
    assert hash_rows(rows) == hash_rows(rows.filter(lambda row: True)) == hash_rows(rows.select_columns(["b", "a"]))
    assert hash_rows(rows.select([0, 1, 2])) == hash_rows(rows)
    others = [rows.select([0, 2, 1]), rows.select([0, 1]), rows.rename_column("a", "c"), rows.remove_columns("a")]
    assert len({hash_rows(dataset) for dataset in (rows, *others)}) == 5


def never() -> None:
    raise AssertionError


def make(scratch: Path) -> None:
    scratch.mkdir()
    (scratch / "file").write_text("made")
    time.sleep(0.5)


def test_one_of_many_processes_makes_a_folder(tmp_path):
    def work(results):
        results.put(make_once(tmp_path / "cache" / "folder", make, on_wait=lambda: None))

    results = FORK.Queue()
    processes = [FORK.Process(target=work, args=(results,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(results.get() for _ in processes) == [False, False, False, True]


def test_another_takes_over_from_one_that_died(tmp_path):
    making, another_waits = FORK.Event(), FORK.Event()

    def die(scratch: Path) -> None:
        make(scratch)
        making.set()
        another_waits.wait(60)
        os.kill(os.getpid(), signal.SIGKILL)

    folder = tmp_path / "folder"
    FORK.Process(target=make_once, args=(folder, die, lambda: None)).start()
    assert making.wait(60)
    assert make_once(folder, make, on_wait=another_waits.set)
    assert another_waits.is_set()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["folder", "folder.lock"]


def test_a_failed_make_leaves_nothing_behind(tmp_path):
    def fail(scratch: Path) -> None:
        make(scratch)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        make_once(tmp_path / "folder", fail, on_wait=lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.lock"]


def test_locks_are_released(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "lock", on_wait=never):
            pass
    for _ in range(2):
        with only_writer(tmp_path / "folder"):
            pass
    assert not (tmp_path / "folder").exists()


def test_a_folder_has_one_writer(tmp_path):
    def hold(ready):
        with only_writer(tmp_path / "folder"):
            ready.set()
            time.sleep(60)

    ready = FORK.Event()
    holder = FORK.Process(target=hold, args=(ready,))
    holder.start()
    ready.wait()
    with pytest.raises(UserError, match="folder: another process is at work there"), only_writer(tmp_path / "folder"):
        pass
    holder.kill()
    with only_writer(tmp_path / "folder", patience=10):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file/lock: .*, and a lock is needed there"),
        locked(tmp_path / "file" / "lock", print),
    ):
        pass
