"""Adapters in a comparison and a chat: by folder, UUID and cluster name, told apart by what they stand on."""

import json
import os
import shutil
from pathlib import Path

import pytest
from adapter_folders import save_adapter
from safetensors.torch import load_file, save_file

import inference
from comparison import generation
from storage.adapter_chains import CONFIG, ORIGIN
from storage.checkpoints import local_checkpoint_storage

UUID = "0c5ad3f7-4bd1-47c4-8a6a-7a9c4b5f9d10"
TOKENS = {"chat_tokens": {"add_chat_tokens": True}}


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """An adapter with chat tokens, in the store of local runs, where this returns its folder."""
    folder = local_checkpoint_storage() / UUID / "checkpoint-4"
    save_adapter(folder, tiny / "base", **TOKENS)
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture
def compare(call, tiny, tmp_path, monkeypatch):
    """`inference.py`, which keeps its results; returns how many batches of questions it asked, and its file."""
    monkeypatch.setattr(Path, "unlink", lambda self, **kwargs: None)
    asked = []
    monkeypatch.setattr(generation, "answer_batch", lambda *a, run=generation.answer_batch: asked.append(1) or run(*a))
    options = ("--max-new-tokens", 3, "--number-of-samples", 2, "--number-of-pairs", 3, "--device", "cpu")

    def run(source, *arguments):
        asked.clear()
        words = ("--model", f"m={source}", "--dataset", tiny / "conversations", *options, *arguments)
        status, _, err = call(inference.main, *words, "--output_file", tmp_path / "o.json")
        assert status == 0, err
        written = json.loads((tmp_path / "o.json").read_text())
        return len(asked), {name: value for name, value in written.items() if name != "models"}

    return run


def test_an_adapters_results_are_its_own_and_its_bases(adapter, compare, tiny, tmp_path, call):
    """By UUID and by folder it is the same; on another base, or with another adapter below it, it is another."""
    asked, results = compare(UUID)
    assert asked == 1
    assert compare(adapter) == (0, results)
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    assert compare(copy) == (0, results)
    assert compare(copy, "--dtype", "bfloat16")[0] == 1

    base = Path(shutil.copytree(tiny / "base", tmp_path / "base"))
    os.remove(copy / ORIGIN)  # noqa: PTH107  (without a word of the base in its training; `unlink` does nothing here)
    (copy / CONFIG).write_text((copy / CONFIG).read_text().replace(str(tiny / "base"), str(base)))
    assert compare(copy)[0] == 1  # the config is another; so a base in its place is what counts from here on
    assert compare(copy)[0] == 0
    file = base / "model.safetensors"
    save_file({name: weight * 1.5 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    asked, other = compare(copy)
    assert (asked, other == results) == (1, False)

    upper = tmp_path / "upper"
    save_adapter(upper, adapter, checkpoint=UUID)
    assert compare(upper)[0] == 1
    assert compare(upper)[0] == 0
    below = upper / "stands_on" / "0" / "adapter_model.safetensors"
    save_file({name: weight * 2 for name, weight in load_file(below).items()}, below)
    assert compare(upper)[0] == 1


def test_an_adapter_talks_and_stops(adapter, call, monkeypatch, tiny):
    """At `<|im_end|>`, which is one of its tokens, and at EOS, as a whole model does."""
    lines, seen = iter(["Hello", "/quit"]), []
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))

    def answer(model, tokenizer, prompts, sampling, show):
        stops = generation.generation_stops(model, tokenizer)["eos_token_id"]
        seen.append((stops, tokenizer.decode(prompts[0])))
        return generation.answer_batch(model, tokenizer, prompts, sampling, show)

    monkeypatch.setattr("comparison.chat.answer_batch", answer)
    words = ("--model", f"dpo={UUID}", "--chat", "dpo", "--max-new-tokens", 3, "--device", "cpu")
    status, out, err = call(inference.main, *words)
    assert status == 0, err
    assert seen == [([1, 1501], "<bos><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")]
    assert "dpo: " in out


def test_a_mistake_in_an_adapter_is_one_line(adapter, call, tmp_path):
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    (copy / CONFIG).write_text((copy / CONFIG).read_text().replace('"LORA"', '"VERA"'))
    status, _, err = call(inference.main, "--model", f"m={copy}", "--device", "cpu")
    assert (status, err) == (
        2,
        f"error: --model m '{copy}': {copy}: it is an adapter of the type VERA; only LORA can be merged here\n",
    )
