"""A model, a tokenizer or a chat template that is broken, of another kind or hostile is one line that names it."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chat_format import check_template, encode
from errors import UserError
from storage.files import append_json_line
from trial.models import check_source, load_model_and_tokenizer


def change(folder: Path, file: str, **values: object) -> None:
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))


def change_weights(folder: Path, make) -> None:
    weights = {name: make(name, weight) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file({name: w for name, w in weights.items() if w is not None}, folder / "model.safetensors", {"format": "pt"})


def one_nan(name, weight):
    if name.endswith("gate_proj.weight"):
        weight.view(-1)[0] = float("nan")
    return weight


def masked_model(folder: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=1500, **sizes)).save_pretrained(folder)


def add_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"new{n}": 1500 + n for n in range(9)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


CASES = {
    "config of another type": (lambda f: (f / "config.json").write_text("[]"), "must be a mapping, not list"),
    "config nested deeply": (lambda f: (f / "config.json").write_text("[" * 10**5), "maximum recursion depth exceeded"),
    "config that is a device": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("/dev/zero")),
        "config.json is neither a file nor a folder",
    ),
    "tokenizer that is a pipe": (
        lambda f: ((f / "tokenizer.json").unlink(), os.mkfifo(f / "tokenizer.json")),
        "tokenizer.json is neither a file nor a folder",
    ),
    "unknown model": (lambda f: change(f, "config.json", model_type="nope"), "does not recognize this architecture"),
    "other shapes": (
        lambda f: change(f, "config.json", hidden_size=48),
        "its weights have other shapes than",
    ),
    "more layers": (
        lambda f: change(f, "config.json", num_hidden_layers=9),
        "of the model's weights, such as",
    ),
    "torn weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-99]),
        "file not fully covered",
    ),
    "weights of zeros": (lambda f: (f / "model.safetensors").write_bytes(bytes(999)), "invalid JSON in header"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "a weight that is missing": (
        lambda f: change_weights(f, lambda n, w: w if "norm" in n else None),
        "its files lack",
    ),
    "no layer": (lambda f: change(f, "config.json", num_hidden_layers=-1), "says that it has no layer"),
    "size 0": (lambda f: change(f, "config.json", hidden_size=0), "its weights have other shapes than"),
    "pad token": (lambda f: change(f, "config.json", pad_token_id=10**6), "Padding_idx must be within num_embeddings"),
    "window": (lambda f: change(f, "config.json", sliding_window="x"), "says sliding_window 'x', which is no number"),
    "NaN": (lambda f: change_weights(f, one_nan), "gate_proj.weight has NaN or infinite values"),
    "BERT": (masked_model, "it is a BertForMaskedLM, not a causal language model"),
    "tokenizer of another type": (lambda f: (f / "tokenizer.json").write_text("null"), "has no attribute 'pop'"),
    "larger tokenizer": (add_tokens, "the model has 1500 embeddings, but its tokenizer's ids go up to 1508"),
    "template not UTF-8": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "can't decode byte 0xff"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_model_is_one_line(tiny, tmp_path, case, caplog, recwarn, monkeypatch):
    """And no library says anything beside it."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")
    broken, message = CASES[case]
    folder = Path(shutil.copytree(tiny / "base", tmp_path / "model"))
    broken(folder)
    with pytest.raises(UserError) as error:
        load_model_and_tokenizer(str(folder), "--model a")
    assert message in str(error.value)
    assert str(error.value).startswith(f"--model a '{folder}': ")
    assert (caplog.messages, list(recwarn)) == ([], [])


def test_weights_that_stay_on_the_disk_are_not_looked_at(tiny, tmp_path):
    model, _ = load_model_and_tokenizer(str(tiny / "base"), device_map={"": "disk"}, offload_folder=str(tmp_path))
    assert any(weight.is_meta for weight in model.parameters())


def test_a_tokenizer_may_have_tokens_for_another_model(tiny, tmp_path):
    """Gemma 3's has one for pictures, which the models without eyes have no embedding for."""
    folder = Path(shutil.copytree(tiny / "base", tmp_path / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_model_and_tokenizer(str(folder))
    assert len(tokenizer) > model.get_input_embeddings().num_embeddings
    assert model.dtype == torch.float32


def test_a_generation_config_that_could_not_be_saved_is_mended(tiny, tmp_path):
    """The hub has many that name a temperature for greedy decoding."""
    folder = Path(shutil.copytree(tiny / "base", tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.5, "top_p": 0.9}')
    model, _ = load_model_and_tokenizer(str(folder))
    model.save_pretrained(tmp_path / "saved")
    assert not {"temperature", "top_p"} & json.loads((tmp_path / "saved/generation_config.json").read_text()).keys()


def test_a_model_may_be_in_a_subfolder(tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "model" / "sub")
    model, _ = load_model_and_tokenizer(str(tmp_path / "model"), weights=False, subfolder="sub", num_hidden_layers=2)
    assert model.config.num_hidden_layers == 2
    with pytest.raises(UserError, match=r"model/nowhere': no such folder"):
        load_model_and_tokenizer(str(tmp_path / "model"), subfolder="nowhere")


def test_a_folder_that_only_leads_to_a_model_says_what_to_give(tiny, tmp_path):
    uuid = "0c5ad3f7-4bd1-47c4-8a6a-7a9c4b5f9d10"
    checkpoint, trial, experiment = tmp_path / uuid, tmp_path / "trial", tmp_path / "experiment"
    shutil.copytree(tiny / "base", checkpoint / "checkpoint-4")
    append_json_line(trial / "events.jsonl", {"kind": "checkpoint", "steps_completed": 4, "uuid": uuid})
    experiment.mkdir()
    (experiment / "best_checkpoint").write_text(f"{uuid}\n")
    for folder, said in [
        (checkpoint, f"; {checkpoint / 'checkpoint-4'} is one"),
        (trial, f"; the latest checkpoint of the trial in it is {uuid}"),
        (experiment, f"; the best checkpoint of the experiment in it is {uuid}"),
        (tiny / "questions", ""),
    ]:
        with pytest.raises(UserError) as error:
            check_source(str(folder), "--model a")
        assert str(error.value) == f"--model a '{folder}': a folder without a config.json is no model{said}"
    with pytest.raises(UserError, match=r"config\.json': not a folder"):
        check_source(str(tiny / "base" / "config.json"), "--model a")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 2 seconds"),
        ("{{ 'a' * 10**10 }}", "runs out of memory"),
        ("{{ 'a' * 2000000 }}", "writes more than 1,000,000 characters"),
        ("{% for %}", "Expected an expression"),
        ("{{ shout() }}", "'shout' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{" + 5000 * "(" + "1" + 5000 * ")" + "}}", "maximum recursion depth exceeded"),
        ("{{ messages[9].content }}", "has no element 9"),
    ],
)
def test_a_template_that_is_broken_or_hostile_is_one_line(tokenizer, template, message):
    tokenizer.chat_template = template

    def use():
        check_template(tokenizer)
        encode(tokenizer, [{"role": "user", "content": "Tea?"}])

    with pytest.raises(UserError, match=r"^the chat template of .*") as error:
        use()
    assert message in str(error.value)
