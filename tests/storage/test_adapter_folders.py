"""Folders of adapters: they load as they were trained, of ours and of plain peft, or end in one line."""

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from adapter_folders import draw, save_adapter
from conftest import TRAINING_ARGS
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.stack import AdapterStack, add_adapter
from config.lora import build_lora_config
from errors import UserError
from storage import adapter_chains
from storage.adapter_chains import BELOW, CONFIG, ORIGIN, WEIGHTS, name_base, read_chain
from storage.checkpoints import local_checkpoint_storage, model_folder, model_identity
from trial.models import check_model, load_model_and_tokenizer

IDS = torch.tensor([[2, 5, 9, 100, 101, 102, 103, 1499]])
NEW_IDS = torch.tensor([[2, 5, 9, 100, 1500, 1501]])
TOKENS = {"chat_tokens": {"add_chat_tokens": True}}


def answers(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture(scope="module")
def ours(tiny, tmp_path_factory):
    """An adapter of ours with new tokens, and what it answers unmerged."""
    folder = tmp_path_factory.mktemp("ours") / "checkpoint-1"
    return folder, answers(save_adapter(folder, tiny / "base", **TOKENS), NEW_IDS)


@pytest.fixture
def folder(ours, tmp_path) -> Path:
    return Path(shutil.copytree(ours[0], tmp_path / "adapter"))


def change(folder: Path, file: str = CONFIG, **values: object) -> None:
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))


def change_weights(make):
    def damage(folder):
        weights = {name: make(name, weight) for name, weight in load_file(folder / WEIGHTS).items()}
        save_file({name: weight for name, weight in weights.items() if weight is not None}, folder / WEIGHTS)

    return damage


def stand_on(**values):
    """Have the adapter stand on a base of another shape, without a word of the one in training."""

    def damage(folder):
        base = AutoModelForCausalLM.from_pretrained(
            json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
        )
        for name, value in values.items():
            setattr(base.config, name, value)
        type(base)(base.config).save_pretrained(folder / "base")
        (folder / ORIGIN).unlink()
        change(folder, base_model_name_or_path=str(folder / "base"))

    return damage


UNKNOWN = "6b6fbaa7-faa9-4449-867b-2939a147a335"
# What is wrong with a folder, and what the line says; the second group shows only once the weights are loaded.
SEEN = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "pickled weights": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "is a pickle, which could run code"),
    "torn weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "file not fully covered"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG} is missing"),
    "torn config": (lambda f: (f / CONFIG).write_text('{"r": 4'), f"{CONFIG} is damaged, or no config of peft's"),
    "config that is a list": (lambda f: (f / CONFIG).write_text("[]"), f"{CONFIG} is damaged, or no config of peft's"),
    "no base": (lambda f: change(f, base_model_name_or_path=None), "names no base_model_name_or_path"),
    "prefix tuning": (lambda f: change(f, peft_type="PREFIX_TUNING"), "of the type PREFIX_TUNING; only LORA"),
    "a classifier": (lambda f: change(f, task_type="SEQ_CLS"), "an adapter for SEQ_CLS, not for a causal"),
    "base gone": (
        lambda f: change(f, base_model_name_or_path="/nowhere/gemma"),
        "an adapter on /nowhere/gemma, which is not here (no such folder)",
    ),
    "base of the project gone": (lambda f: change(f, base_model_name_or_path="./no/gemma"), "which is not here"),
    "base that is no model": (
        lambda f: ((f / ORIGIN).unlink(), change(f, base_model_name_or_path=str(f.parent))),
        "a folder without a config.json is no model",
    ),
    "base on no hub": (
        lambda f: change(f, base_model_name_or_path="google/gemma-2b", revision="abc"),
        "its base 'google/gemma-2b': no such folder, and the hub does not give it",
    ),
    "base not on this machine": (
        lambda f: change(f, base_model_name_or_path=UNKNOWN),
        f"it is an adapter on the checkpoint {UNKNOWN}: no such checkpoint in",
    ),
    "base that is an adapter": (
        lambda f: ((f / ORIGIN).unlink(), change(f, base_model_name_or_path=str(f))),
        "which is itself an adapter; a copy of it belongs into",
    ),
    "base trained since": (
        lambda f: change(f, ORIGIN, base_weights="another"),
        "base, which has other weights now than in its training",
    ),
}
LOADED = {
    "base of another width": (stand_on(hidden_size=48), "its weights are of another model: model.embed_tokens"),
    "base of more layers": (stand_on(num_hidden_layers=6), "its weights are of another model"),
    "base of fewer layers": (stand_on(num_hidden_layers=2), "its weights are of another model"),
    "base of fewer tokens": (stand_on(vocab_size=700), "its tokens 1500 to 1501 do not follow the 700 of its base"),
    "another rank": (lambda f: change(f, r=8), "its weights have other shapes than its base and its config say"),
    "rank that is no number": (lambda f: change(f, r="x"), "not supported between instances of 'str' and 'int'"),
    "a weight that is missing": (
        change_weights(lambda name, w: None if "q_proj" in name else w),
        "its weights are of another model",
    ),
    "NaN": (
        change_weights(lambda name, w: w * float("nan") if "layers.0.mlp.up" in name else w),
        "lora_A.weight has NaN or infinite values",
    ),
    "no rows": (change_weights(lambda name, w: None if "token" in name else w), "lack the rows of its new tokens"),
    "too few rows": (
        change_weights(lambda name, w: w[:1].clone() if "token" in name else w),
        "its weights are of another model: model.embed_tokens",
    ),
    "tokens of nowhere": (
        lambda f: change(f, trainable_token_indices={"embed_tokens": [10**12]}),
        "its tokens 1000000000000 to 1000000000000 do not follow the 1500 of its base",
    ),
    "layers twice": (lambda f: change(f, layer_replication=[[0, 2]]), "an adapter with layer_replication cannot"),
    "torn tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer: "),
    "torn stops": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json: "),
}


@pytest.mark.parametrize("case", [*SEEN, *LOADED])
def test_a_broken_adapter_is_one_line(folder, case):
    damage, message = (SEEN | LOADED)[case]
    damage(folder)
    not_merged = functools.partial(load_model_and_tokenizer, merge=False)
    for load in (load_model_and_tokenizer, not_merged, *([check_model] if case in SEEN else [])):
        with pytest.raises(UserError) as error:
            load(str(folder), "--model a")
        assert str(error.value).startswith(f"--model a '{folder}': ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert str(error.value).count(f"{folder}': ") == 1


def test_an_adapter_of_ours_loads_as_it_was_trained(ours):
    """Merged in float32; in bfloat16 it is that, rounded. Its stops are both, and all of its weights can be trained."""
    folder, expected = ours
    check_model(str(folder), "--model a")
    model, tokenizer = load_model_and_tokenizer(str(folder))
    assert answers(model, NEW_IDS) == pytest.approx(expected, abs=1e-5)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 1501]
    assert "<|im_start|>" in tokenizer.chat_template
    assert all(weight.requires_grad for weight in model.parameters())
    rounded, _ = load_model_and_tokenizer(str(folder), dtype=torch.bfloat16)
    assert torch.equal(answers(model.bfloat16(), NEW_IDS), answers(rounded, NEW_IDS))

    stack, _ = load_model_and_tokenizer(str(folder), merge=False)
    assert torch.equal(answers(stack, NEW_IDS), expected)
    assert not any(weight.requires_grad for weight in stack.parameters())
    for merge in (True, False):
        shapes, _ = load_model_and_tokenizer(str(folder), weights=False, merge=merge)
        assert all(weight.is_meta for weight in shapes.parameters())
    assert not isinstance(load_model_and_tokenizer(str(folder), weights=False)[0], AdapterStack)


# Of plain peft: keys of LoraConfig, and whether two tokens were added and the tokenizer saved.
ELSEWHERE = {
    "as it comes": ({}, False),
    "DoRA": ({"use_dora": True, "target_modules": ["q_proj", "up_proj"]}, False),
    "ranks": ({"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, False),
    "known tokens": ({"trainable_token_indices": [5, 100]}, False),
    "new tokens": ({"trainable_token_indices": [1500, 1501]}, True),
    "new embeddings": ({}, True),
    "new embeddings, trained": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
}


def save_elsewhere(base: Path, folder: Path, with_tokens: bool = False, **values):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if with_tokens:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(folder)
    values = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 4, **values}
    model = get_peft_model(model, LoraConfig(**values))
    draw(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", ELSEWHERE)
def test_an_adapter_of_plain_peft_loads(tiny, tmp_path, case):
    """Without a tokenizer it has its base's; then a training of ours may stand on it."""
    values, with_tokens = ELSEWHERE[case]
    ids = NEW_IDS if with_tokens else IDS
    expected = answers(save_elsewhere(tiny / "base", tmp_path / "adapter", with_tokens, **values), ids)
    check_model(str(tmp_path / "adapter"), "--model a")
    model, tokenizer = load_model_and_tokenizer(str(tmp_path / "adapter"))
    assert answers(model, ids)[..., : expected.shape[-1]] == pytest.approx(expected, abs=1e-5)
    assert len(tokenizer) == (1502 if with_tokens else 1500)

    stack, _ = load_model_and_tokenizer(str(tmp_path / "adapter"), merge=False)
    if values.keys() & {"use_dora", "modules_to_save"}:
        with pytest.raises(UserError, match=r"hyperparameters.lora: .*export that model"):
            add_adapter(stack, build_lora_config({}), "x", 1)
        return
    above = add_adapter(stack, build_lora_config({}), "x", 1)
    assert torch.equal(answers(above, ids)[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_of_the_ends_is_refused(tiny, tmp_path, name):
    save_elsewhere(tiny / "base", tmp_path / "adapter", target_modules=["q_proj", name])
    with pytest.raises(UserError, match="an adapter of the embeddings or the output layer cannot be used"):
        load_model_and_tokenizer(str(tmp_path / "adapter"))


def test_an_adapter_that_is_no_lora_is_refused(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny / "base")
    get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="of the type IA3; only LORA can be merged here"):
        load_model_and_tokenizer(str(tmp_path / "adapter"))


def test_a_base_in_the_project_is_found_in_each_copy_of_it(folder, tiny, tmp_path, monkeypatch):
    """A container has the project in another place than a laptop. A base that was moved may be linked to."""
    assert name_base(tiny / "base") == str(tiny / "base")
    monkeypatch.setattr(adapter_chains, "BUNDLE", tiny.resolve())
    assert name_base(tiny / "base") == "./base"
    change(folder, base_model_name_or_path="./base")
    load_model_and_tokenizer(str(folder), weights=False)
    monkeypatch.setattr(adapter_chains, "BUNDLE", tmp_path / "copy")
    with pytest.raises(UserError, match=r"an adapter on \./base, which is not here"):
        check_model(str(folder), "--model a")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "base").symlink_to(tiny / "base")
    check_model(str(folder), "--model a")


def test_a_base_that_was_trained_on_is_noticed(ours, tiny, tmp_path):
    base = Path(shutil.copytree(tiny / "base", tmp_path / "base"))
    save_adapter(tmp_path / "adapter", base)
    check_model(str(tmp_path / "adapter"), "--model a")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="has other weights now than in its training"):
        check_model(str(tmp_path / "adapter"), "--model a")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Put a folder into the hub's cache, as a repository at a commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder, name, commit):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)

    return put


def test_an_adapter_keeps_its_base_of_the_hub_at_its_commit(tiny, tmp_path, cache):
    """Whatever the hub has by then under the name."""
    (old, new), folder = ("a" * 40, "b" * 40), tmp_path / "adapter"
    cache(tiny / "base", "owner/gemma", old)
    expected = answers(save_adapter(folder, "owner/gemma", **TOKENS), NEW_IDS)
    assert read_chain(folder)[:2] == ("owner/gemma", old)
    other = Path(shutil.copytree(tiny / "base", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    cache(other, "owner/gemma", new)
    check_model(str(folder), "--model a")
    assert answers(load_model_and_tokenizer(str(folder))[0], NEW_IDS) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_cannot_stand_on_a_subfolder_of_the_hub(tiny, tmp_path, cache):
    """On one of this machine it can."""
    shutil.copytree(tiny / "base", tmp_path / "model" / "sub")
    cache(tmp_path / "model", "owner/gemma", "e" * 40)
    values = {"training_args": {**TRAINING_ARGS, "model_init_kwargs": {"subfolder": "sub"}}}
    with pytest.raises(UserError, match=r"model_init_kwargs.subfolder: an adapter cannot stand on a part of a hub's"):
        save_adapter(tmp_path / "adapter", "owner/gemma", **values)
    save_adapter(tmp_path / "adapter", tmp_path / "model", **values)
    (tmp_path / "adapter" / ORIGIN).unlink()
    assert read_chain(tmp_path / "adapter").base == str(tmp_path / "model" / "sub")
    check_model(str(tmp_path / "adapter"), "--model a")


def test_an_adapter_on_the_hub_is_to_be_downloaded(tiny, tmp_path, cache):
    """Also one beside a config.json, which transformers would load with its adapter not merged."""
    save_elsewhere(tiny / "base", tmp_path / "adapter", with_tokens=True)
    cache(tmp_path / "adapter", "owner/adapter", "c" * 40)
    save_elsewhere(tiny / "base", tmp_path / "both")
    for file in (tiny / "base").glob("*[!s]"):
        shutil.copy(file, tmp_path / "both")
    cache(tmp_path / "both", "owner/both", "d" * 40)
    for name, load in [
        ("owner/adapter", load_model_and_tokenizer),
        ("owner/adapter", check_model),
        ("owner/both", load_model_and_tokenizer),
    ]:
        with pytest.raises(UserError, match=rf"'{name}': it is an adapter, .* hf download {name} --local-dir FOLDER"):
            load(name, "--model a")


@pytest.fixture
def chain(folder, tmp_path):
    """An adapter on another, which it has a copy of; and what it answers unmerged."""
    store = local_checkpoint_storage() / UNKNOWN.replace("6", "7")
    shutil.copytree(folder, store / "checkpoint-1", dirs_exist_ok=True)
    upper = save_adapter(tmp_path / "upper" / "checkpoint-2", folder, checkpoint=store.name, lora={"r": 2})
    return tmp_path / "upper", answers(upper, NEW_IDS)


def test_an_adapter_on_another_has_all_that_it_needs(chain):
    checkpoint, expected = chain
    shutil.rmtree(local_checkpoint_storage(), ignore_errors=True)  # nobody has the lower one any more
    folder = checkpoint / "checkpoint-2"
    assert (folder / BELOW / "0" / WEIGHTS).is_file()
    check_model(str(folder), "--model a")
    model, _ = load_model_and_tokenizer(str(folder))
    assert answers(model, NEW_IDS) == pytest.approx(expected, abs=1e-5)

    (folder / BELOW / "0" / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(UserError, match=rf"{BELOW}/0: {WEIGHTS}: "):
        check_model(str(folder), "--model a")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="the checkpoint holds no model weights"):  # not the lower one's
        model_folder(checkpoint, UNKNOWN)


def test_the_identity_of_an_adapter_is_also_what_it_stands_on(folder, tiny, tmp_path):
    base = Path(shutil.copytree(tiny / "base", tmp_path / "base"))
    (folder / ORIGIN).unlink()
    before = model_identity(str(folder))
    change(folder, base_model_name_or_path=str(base))
    moved = model_identity(str(folder))
    assert [each for each in before if each not in moved] == [each for each in before if each[0] == CONFIG]
    change(base, "config.json", rms_norm_eps=1e-3)
    assert model_identity(str(folder)) != moved


def test_an_adapter_that_is_missing_in_a_chain_is_noticed(tiny, tmp_path):
    folder = tmp_path / "checkpoint-3"
    save_adapter(folder, tiny / "base")
    for number in (0, 2):
        save_adapter(folder / BELOW / str(number), tiny / "base")
    with pytest.raises(UserError, match=r"stands_on: an adapter is missing; it has 0, 2"):
        load_model_and_tokenizer(str(folder))


def test_a_merged_model_takes_the_dtype_that_a_yaml_names(ours):
    model, _ = load_model_and_tokenizer(str(ours[0]), dtype="float32")
    assert torch.allclose(answers(model, NEW_IDS), ours[1], atol=1e-4)


def test_an_adapter_trained_on_4_bits_is_not_read_on_other_weights(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-1"
    save_adapter(folder, tiny / "base")
    (folder / ORIGIN).write_text(
        (folder / ORIGIN).read_text().replace('"rounded_from": null', '"rounded_from": "bfloat16"')
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match=r"trained on weights of 4 bits, which needs a package: pip install 'bitsandb"):
        load_model_and_tokenizer(str(folder))
    (folder / ORIGIN).write_text("{")
    with pytest.raises(UserError, match=r"trial.json is damaged"):
        load_model_and_tokenizer(str(folder))
