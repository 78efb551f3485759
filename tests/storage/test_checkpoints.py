"""download_ckpt through Core API's own storage: what it takes, where it puts it, and what it refuses."""

import contextlib
import json
import shutil
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace

import determined as det
import pytest
from adapter_folders import save_adapter
from determined.common.storage import SharedFSStorageManager
from transformers import AutoTokenizer

from chat_format import set_chat_format
from errors import UserError
from storage import manifests
from storage.checkpoints import (
    cached_checkpoint,
    download_ckpt,
    is_model_file,
    local_checkpoint,
    local_checkpoint_storage,
)
from storage.manifests import hash_files, write_manifest
from trial.models import load_model_and_tokenizer


@pytest.fixture
def core_context():
    with det.core.init(checkpoint_storage=str(local_checkpoint_storage())) as context:
        yield context


@pytest.fixture
def checkpoint(tiny, tmp_path, core_context) -> str:
    """A checkpoint as the Trainer and DetCallback leave it, optimizer and pickles included."""
    model, tokenizer = load_model_and_tokenizer(str(tiny / "base"))
    set_chat_format(model, tokenizer)
    folder = tmp_path / "output" / "checkpoint-7"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        (folder / name).write_bytes(b"x")
    return core_context.checkpoint.upload(folder.parent, {"steps_completed": 7}, shard=True)


def test_only_the_model_is_downloaded_and_it_loads_with_its_template(checkpoint, core_context):
    folder = Path(download_ckpt(checkpoint, core_context))
    names = {path.name for path in folder.parent.rglob("*") if path.is_file()}
    assert names == {
        *("manifest.json", "trainer_state.json"),
        *("model.safetensors", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert folder.name == "checkpoint-7"
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(folder).chat_template


def test_a_checkpoint_is_downloaded_and_hashed_once(checkpoint, core_context, monkeypatch):
    saved, hashed = local_checkpoint_storage() / checkpoint / "checkpoint-7", []
    write_manifest(saved, hash_files(saved))
    monkeypatch.setattr("storage.shared_cache.LARGEST_HASHED", 0)  # which weights exceed
    monkeypatch.setattr(manifests, "_hash", lambda files, hash=manifests._hash: hashed.extend(files) or hash(files))
    folder = download_ckpt(checkpoint, core_context)
    assert hashed.count("model.safetensors") == 1
    hashed.clear()
    shutil.rmtree(saved)
    assert download_ckpt(checkpoint, core_context) == folder
    assert hashed == []


def test_an_interrupted_download_is_not_used_as_a_checkpoint(checkpoint, core_context, monkeypatch):
    def interrupted(storage_id, ckpt_dir, **kwargs):
        Path(ckpt_dir, "checkpoint-7").mkdir(parents=True)
        Path(ckpt_dir, "checkpoint-7", "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(core_context.checkpoint, "download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download_ckpt(checkpoint, core_context)
    folder = Path(download_ckpt(checkpoint, core_context))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gemma"
    assert {path.name for path in folder.parent.parent.glob(f"{checkpoint}*")} == {checkpoint, f"{checkpoint}.lock"}


@pytest.mark.parametrize("manifest", [True, False])
def test_a_torn_checkpoint_is_not_started_from(checkpoint, core_context, manifest):
    """Nor is what a power cut has left of a download; that is downloaded again."""
    saved = local_checkpoint_storage() / checkpoint / "checkpoint-7"
    (saved / "optimizer.pt").unlink()  # nobody who starts from the model needs it
    if manifest:
        write_manifest(saved, hash_files(saved))
    downloaded = Path(download_ckpt(checkpoint, core_context), "model.safetensors")
    whole = downloaded.read_bytes()
    downloaded.write_bytes(whole[:-1])
    assert download_ckpt(checkpoint, core_context) == str(downloaded.parent)
    assert downloaded.read_bytes() == whole

    shutil.rmtree(downloaded.parents[1])
    (saved / "model.safetensors").write_bytes(whole[:-1])
    message = f"model_ckpt {checkpoint}: the checkpoint is damaged: model.safetensors"
    with pytest.raises(UserError, match=message + (rf" has {len(whole) - 1} of" if manifest else ": ")):
        download_ckpt(checkpoint, core_context)
    with pytest.raises(UserError, match=message):
        local_checkpoint(checkpoint, "model_ckpt", verify=True)
    assert not downloaded.parents[1].exists()


@pytest.mark.parametrize("known", [True, False])
def test_two_ranks_of_a_node_share_one_download(checkpoint, known):
    """Real DistributedContexts, a thread each: both get the same folder, or both the same error, and none hangs."""
    wanted = checkpoint if known else str(uuid.uuid4())
    downloads, outcomes = [], {}

    def work(rank):
        ranks = {"rank": rank, "local_rank": rank, "cross_rank": 0, "size": 2, "local_size": 2, "cross_size": 1}
        with contextlib.closing(det.core.DistributedContext(**ranks)) as distributed:
            storage = SharedFSStorageManager(str(local_checkpoint_storage()))
            core_checkpoint = det.core.DummyCheckpointContext(distributed, storage)
            original = core_checkpoint.download
            core_checkpoint.download = lambda *args, **kwargs: downloads.append(rank) or original(*args, **kwargs)
            context = SimpleNamespace(distributed=distributed, checkpoint=core_checkpoint)
            try:
                outcomes[rank] = download_ckpt(wanted, context)
            except UserError as error:
                outcomes[rank] = str(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert downloads == [0]
    assert outcomes[0] == outcomes[1]
    gone = "no such checkpoint in the storage (or is it in another checkpoint_storage than this experiment's?)"
    assert outcomes[0].endswith("checkpoint-7" if known else gone)


def test_a_wrong_checkpoint_gives_one_clear_line(core_context, tmp_path):
    unknown = str(uuid.uuid4())
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "config.json").write_text("{}")
    weightless = core_context.checkpoint.upload(tmp_path, shard=True)
    for ckpt_uuid, message in [
        ("", "model_ckpt '' is not a checkpoint UUID"),
        ("../secrets", "model_ckpt '../secrets' is not a checkpoint UUID"),
        (unknown, f"model_ckpt {unknown}: no such checkpoint"),
        (weightless, f"model_ckpt {weightless}: the checkpoint holds no model weights"),
    ]:
        with pytest.raises(UserError, match=message):
            download_ckpt(ckpt_uuid, core_context)
        with pytest.raises(UserError, match=message):
            local_checkpoint(ckpt_uuid, "model_ckpt")


def test_what_an_adapter_stands_on_is_downloaded_too(checkpoint, core_context, tmp_path):
    """The files of its trial that are not needed to load it are not."""
    below = local_checkpoint(checkpoint, "test")
    save_adapter(tmp_path / "adapter" / "checkpoint-2", below, checkpoint=checkpoint)
    (tmp_path / "adapter" / "checkpoint-2" / "optimizer.pt").write_bytes(b"x")
    adapter = core_context.checkpoint.upload(tmp_path / "adapter", {"steps_completed": 2}, shard=True)
    folder = Path(download_ckpt(adapter, core_context))
    assert not (folder / "optimizer.pt").exists()
    load_model_and_tokenizer(str(folder), weights=False)
    shutil.rmtree(local_checkpoint_storage() / checkpoint)
    assert download_ckpt(adapter, core_context) == str(folder)
    load_model_and_tokenizer(str(folder), merge=False)
    shutil.rmtree(cached_checkpoint(checkpoint))
    with pytest.raises(UserError, match=f"model_ckpt {adapter}: its base {checkpoint}: no such checkpoint in the st"):
        download_ckpt(adapter, core_context)


@pytest.mark.parametrize(
    ("path", "taken"),
    [
        ("checkpoint-9/adapter_model.safetensors", True),
        ("checkpoint-9/adapter_config.json", True),
        ("checkpoint-9/stands_on/0/adapter_model.safetensors", True),
        ("checkpoint-9/model-00001-of-00002.safetensors", True),
        ("checkpoint-9/model.safetensors.index.json", True),
        ("checkpoint-9/chat_template.jinja", True),
        ("checkpoint-9/optimizer.pt", False),
        ("checkpoint-9/pytorch_model.bin", False),
        ("checkpoint-9/trainer_state.json", False),
        ("checkpoint-9/", False),
        ("metadata.json", False),
    ],
)
def test_the_selector_takes_model_files_only(path, taken):
    assert is_model_file(path) is taken
