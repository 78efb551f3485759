"""A model exported as a plain folder: what is in it, what is proven of it, and that nothing unproven is left."""

import json
import re
import shutil
from pathlib import Path
from uuid import uuid4

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_finetune
import export
import sft_finetune
from chat_format import CHAT_ML_TEMPLATE, encode, set_chat_format
from config.hyperparameters import DataSource
from dataset_utils import load_sft_dataset
from errors import UserError
from serving import exporting, folder, held_out
from serving.lineage import Lineage, Stage, read_lineage
from serving.model_card import render_card
from storage.checkpoints import local_checkpoint, local_checkpoint_storage
from storage.origins import Origin
from trial.models import load_model_and_tokenizer

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How do I boil an egg?"}]


@pytest.fixture
def chat_model(tiny, tmp_path):
    """The tiny base, with the chat format and its markers as tokens, as a folder of nobody's training."""
    model, tokenizer = load_model_and_tokenizer(str(tiny / "base"))
    set_chat_format(model, tokenizer, ["<|im_start|>", "<|im_end|>"])
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.fixture
def run(call, tmp_path):
    """`export.py SOURCE` into a new folder on the CPU; returns the folder and what was said."""

    def run_export(source, *arguments, expect=0):
        status, out, err = call(export.main, source, tmp_path / "out" / "My Model", "--device", "cpu", *arguments)
        assert status == expect, err
        assert sorted(path.name for path in (tmp_path / "out").glob("*")) == (["My Model"] if expect == 0 else [])
        return tmp_path / "out" / "My Model", (out if expect == 0 else err)

    return run_export


def test_sft_and_dpo_become_one_plain_folder(chat_model, run, tmp_path, tiny):
    """Of checkpoints as trials leave them, with all weights."""
    sft, dpo, base = str(uuid4()), str(uuid4()), str(tiny / "base")
    kitchen = DataSource(str(tiny / "instructions"), "kitchen", ratio=0.5)
    home = DataSource(str(tiny / "instructions"), "home", number_of_samples=14)
    preferences = [DataSource(str(tiny / name)) for name in ("questions", "conversations")]
    for uuid, origin in [
        (sft, Origin(base, None, None, 42, [kitchen, home])),
        (dpo, Origin(base, sft, 0.1, 42, preferences)),
    ]:
        saved = Path(shutil.copytree(chat_model, local_checkpoint_storage() / uuid / "checkpoint-4"))
        origin.write(saved)
    logged = [{"step": 2, "loss": 0.5}, {"step": 4, "eval_rewards/accuracies": 0.75, "eval_runtime": 1.5}, {"step": 4}]
    (saved / "trainer_state.json").write_text(json.dumps({"log_history": logged}))
    exported, out = run(dpo, "--dtype", "float32")

    assert {path.name for path in exported.iterdir()} == {
        *("README.md", "Modelfile", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o644}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    trained, before = load_model_and_tokenizer(str(local_checkpoint(dpo, "checkpoint")))
    assert all(torch.equal(weight, trained.state_dict()[name]) for name, weight in model.state_dict().items())
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    assert ids == encode(before, QUESTION)[0]
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert sorted(model.generation_config.eos_token_id) == sorted(model.config.eos_token_id) == sorted(stops)
    assert model.config.use_cache

    assert re.search(
        r"\nThe folder's tokenizer, on (\d+) held-out prompts of questions, conversations: the same token ids as in "
        r"training for \1 of \1\n",
        out,
    )
    told = (
        "folder, loaded afresh by plain transformers, in float32: 10 of 10 greedy answers are the same to the last of "
    )
    assert f"The {told}32 tokens" in out
    assert f"ollama create my-model -f '{exported}/Modelfile' && ollama run my-model\n" in out
    assert f"vllm serve '{exported}' --dtype float32\n" in out
    assert f"transformers serve '{exported}'\n" in out

    card = ModelCard.load(exported / "README.md")
    assert card.data.to_dict() == {
        **{"library_name": "transformers", "pipeline_tag": "text-generation"},
        "tags": ["sft", "dpo", "trl"],
    }
    assert str(tmp_path) not in card.text
    assert str(tiny) not in card.text
    lineage = card.text.split("## Lineage")[1].split("##")[0]
    assert re.findall(r"1\. (\w+)(?:, checkpoint `(.*)`)?", lineage) == [("base", ""), ("SFT", sft), ("DPO", dpo)]
    assert "| SFT | instructions | kitchen |  | 50% |\n| SFT | instructions | home |  | 14 |\n" in card.text
    assert "| DPO | questions |  |  | all |\n| DPO | conversations |  |  | all |\n" in card.text
    assert "held out, at step 4:" in card.text
    assert "| eval_rewards/accuracies | 0.75 |" in card.text
    assert "runtime" not in card.text
    assert f"- the {told}32 tokens" in card.text
    assert "vllm serve 'My Model' --dtype float32\n" in card.text


def test_half_the_size_by_default_and_the_share_that_agrees_is_told(chat_model, run):
    exported, out = run(chat_model)
    assert AutoModelForCausalLM.from_pretrained(exported, dtype="auto").dtype == torch.bfloat16
    assert re.search(r"transformers, in bfloat16: \d+ of 10 greedy answers are the same to the last of 32 tokens", out)
    assert "It is tried on 10 built-in questions: the model does not tell its training" in out
    assert json.loads((exported / "tokenizer_config.json").read_text())["add_bos_token"] is True
    assert "none" not in ModelCard.load(exported / "README.md").text.lower()


def test_held_out_rows_of_sft_are_found_again_and_missing_data_is_one_line(chat_model, run, tmp_path, tiny):
    data = Path(shutil.copytree(tiny / "instructions", tmp_path / "instructions"))
    sources = [DataSource(str(data), "kitchen", ratio=0.5), DataSource(str(data), "home", number_of_samples=14)]
    Origin("google/gemma-2b", None, None, 7, sources).write(chat_model)
    rows = load_sft_dataset(sources, 7)["test"]
    found = held_out.load_held_out(read_lineage(str(chat_model)).stages[-1])
    assert sorted(map(str, found.prompts)) == sorted(str(messages[:-1]) for messages in rows["messages"])
    assert len(found.questions()) == 10
    shutil.rmtree(data)
    exported, out = run(chat_model)
    line = f"It is tried on 10 built-in questions: data set {data}: no such file or folder"
    assert [line] == [said for said in out.splitlines() if "It is tried" in said]
    card = ModelCard.load(exported / "README.md")
    assert card.data.to_dict() == {
        **{"base_model": "google/gemma-2b", "base_model_relation": "finetune", "library_name": "transformers"},
        **{"pipeline_tag": "text-generation", "tags": ["sft", "trl"]},
    }
    assert "[google/gemma-2b](https://huggingface.co/google/gemma-2b), trained with SFT; its licence" in card.text


def test_the_card_names_data_sets_of_the_hub_and_tells_no_path_or_hyperparameter_with_one(chat_model, tmp_path):
    sources = [DataSource("Intel/orca_dpo_pairs", number_of_samples=1500), DataSource(str(tmp_path / "mine.jsonl"))]
    lineage = Lineage("google/gemma-2b", [Stage(None, Origin("google/gemma-2b", None, 0.1, 42, sources), 5, {})])
    hyperparameters = {"lora": {"r": 16}, "datasets": [{"name": "/home/me/mine.jsonl"}], "dpo_beta": 0.1}
    lineage.stages[0].origin.hyperparameters = hyperparameters
    card = ModelCard(render_card("me/model", lineage, "bfloat16", True, ["proven"], [], []))
    assert card.data.datasets == ["Intel/orca_dpo_pairs"]
    assert card.data.tags == ["dpo", "lora", "trl"]
    orca = "[Intel/orca_dpo_pairs](https://huggingface.co/datasets/Intel/orca_dpo_pairs)"
    assert f"| DPO | {orca} |  |  | 1,500 |\n| DPO | mine.jsonl |  |  | all |\n" in card.text
    assert "Adapters (LoRA) are merged into its weights." in card.text
    told = card.text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(told) == {**hyperparameters, "datasets": [{"name": "mine.jsonl"}]}
    assert str(tmp_path) not in card.content


def broken_weights(model, *arguments, write=folder.write_model):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    write(model, *arguments)


def another_template(model, tokenizer, *arguments, write=folder.write_model):
    tokenizer.chat_template = CHAT_ML_TEMPLATE.replace("bos_token if bos_token", "''")
    write(model, tokenizer, *arguments)
    tokenizer.chat_template = CHAT_ML_TEMPLATE


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (broken_weights, r"its folder answers differently: \d of 10 greedy answers are the same"),
        (another_template, r"the folder's prompt of '.*' has other token ids than in training, from token 0 on"),
    ],
)
def test_what_is_not_proven_leaves_no_folder(chat_model, run, monkeypatch, broken, message):
    monkeypatch.setattr(exporting, "write_model", broken)
    _, err = run(chat_model, "--dtype", "float32", expect=2)
    assert re.search(f"^error: .*{message}.*\n$", err)


def test_an_interrupted_export_leaves_no_folder(chat_model, run, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "render_card", interrupt)
        run(chat_model, expect=130)
    (tmp_path / "out" / "My Model").mkdir()  # empty
    run(chat_model)


def test_two_exports_to_one_folder_do_not_harm_each_other(tmp_path):
    out = tmp_path / ("o" * 255)  # the longest name
    with folder.finished_at_end(out) as first:
        (first / "config.json").write_text("of the first")
        with pytest.raises(FileNotFoundError), folder.finished_at_end(out) as second:
            (second / "nowhere" / "config.json").write_text("of the second")
    assert (out / "config.json").read_text() == "of the first"
    with pytest.raises(UserError, match="Directory not empty"), folder.finished_at_end(out) as second:
        (second / "config.json").write_text("of the second")
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["of the first"]


def test_a_folder_within_an_export_can_be_opened(tmp_path):
    with folder.finished_at_end(tmp_path / "out") as scratch:
        (scratch / "additional_chat_templates").mkdir()
        file = scratch / "additional_chat_templates" / "tools.jinja"
        file.touch(0o600)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {"additional_chat_templates": 0o755, "tools.jinja": 0o644}


def test_a_type_that_cannot_hold_the_model_is_found(chat_model, run):
    weights = load_file(chat_model / "model.safetensors")
    weights["model.norm.weight"].fill_(1e6)  # float16 ends at 65,504
    save_file(weights, chat_model / "model.safetensors", metadata={"format": "pt"})
    _, err = run(chat_model, "--dtype", "float16", expect=2)
    assert err == f"error: SOURCE {chat_model}: float16 cannot hold this model's numbers; try another --dtype\n"
    run(chat_model, "--dtype", "float32")


LORA = {"hyperparameters__lora": {"r": 4}, "hyperparameters__training_args__learning_rate": 3e-2}


def test_adapters_of_sft_and_dpo_are_merged_and_answer_as_they_did_apart(
    train, run, sft_config, dpo_config, tmp_path, monkeypatch
):
    sft = train(sft_finetune, sft_config, "sft", **LORA)["checkpoint"][-1]["uuid"]
    started = LORA | {"hyperparameters__model_ckpt": sft}
    dpo = train(dpo_finetune, dpo_config, "dpo", **started)["checkpoint"][-1]["uuid"]
    before, source = (local_checkpoint(uuid, "checkpoint") for uuid in (sft, dpo))
    assert not (source / "config.json").exists()
    exported, out = run(dpo, "--dtype", "float32")
    same = "10 of 10 greedy answers are the same to the last of 32 tokens, and the log-probs of their tokens to"
    assert re.search(
        f"\\nThe merged model, in float32: {same} [^ ]+, compared with adapters that are not merged\\n", out
    )
    assert f"transformers, in float32: {same}" in out
    assert "held-out prompts of questions, conversations: the same token ids as in training for " in out
    assert not (exported / "adapter_config.json").exists()

    apart, tokenizer = load_model_and_tokenizer(str(source), merge=False)
    model, base = AutoModelForCausalLM.from_pretrained(exported), apart.get_base_model()
    assert type(model) is type(base)
    ids = torch.tensor([encode(tokenizer, QUESTION)[0]])
    assert torch.allclose(model(ids).logits, apart(ids).logits, atol=1e-4)
    with apart.disable_adapter():
        assert not torch.allclose(model(ids).logits, apart(ids).logits, atol=1e-1)
    assert sorted(model.generation_config.eos_token_id) == [1, 1501]

    card = ModelCard.load(exported / "README.md")
    tried = card.text.split("Before the folder was finished this was tried:\n\n")[1].split("\n\n")[0]
    on = ["the merged model, in", "the folder's tokenizer, on", "the folder, loaded afresh by plain transformers, in"]
    assert all(line.startswith(f"- {what} ") for line, what in zip(tried.splitlines(), on, strict=True))
    assert card.data.tags == ["sft", "dpo", "lora", "trl"]
    assert f"1. SFT, checkpoint `{sft}`\n1. DPO, checkpoint `{dpo}`\n" in card.text
    assert "Adapters (LoRA) are merged into its weights." in card.text
    told = [yaml.safe_load(block.split("```")[0]) for block in card.text.split("```yaml\n")[1:]]
    assert [(each["lora"], each["learning_rate"]) for each in told] == [({"r": 4}, 3e-2)] * 2

    # Elsewhere, without the SFT checkpoint beside it, its past is in the copies that it holds.
    monkeypatch.setenv("LOCAL_CHECKPOINT_STORAGE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("storage.checkpoints.HF_HOME", str(tmp_path / "elsewhere"))
    moved = read_lineage(shutil.copytree(source, tmp_path / "moved"))
    assert [(stage.uuid, stage.method) for stage in moved.stages] == [(sft, "SFT"), (None, "DPO")]

    # A merge that loses an adapter is found, though this model's answers may be the same without it.
    load = exporting.load
    monkeypatch.setattr(exporting, "load", lambda given, merge: load(str(before) if merge else given, merge))
    shutil.rmtree(exported)
    _, err = run(source, expect=2)
    assert re.search(r"^error: SOURCE .*: merged it answers differently: \d+ of 10 greedy answers", err)


def test_a_base_model_stays_one(tiny, run):
    exported, out = run(tiny / "base")
    assert AutoTokenizer.from_pretrained(exported).chat_template is None
    assert "It has no chat template, as a base model: a server refuses /v1/chat/completions" in out
    assert 'TEMPLATE """{{ .Prompt }}"""' in (exported / "Modelfile").read_text()


def test_a_model_with_a_template_of_its_own_gets_no_modelfile(chat_model, run):
    """This one refuses a system turn, as gemma-2b-it's does."""
    own = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    (chat_model / "chat_template.jinja").write_text(own)
    exported, out = run(chat_model)
    assert not (exported / "Modelfile").exists()
    assert "There is no Modelfile for Ollama: the chat template is the model's own" in out
    assert "ollama create" not in out


def test_sampling_settings_of_the_model_are_kept_but_for_those_that_break(chat_model, run):
    settings = json.loads((chat_model / "generation_config.json").read_text())
    settings |= {"do_sample": False, "temperature": 0.5, "repetition_penalty": 1.1, "eos_token_id": 7}
    (chat_model / "generation_config.json").write_text(json.dumps(settings))
    exported, _ = run(chat_model)
    saved = json.loads((exported / "generation_config.json").read_text())
    assert (saved.get("temperature"), saved["repetition_penalty"]) == (None, 1.1)
    assert saved["eos_token_id"] == [1, 7, 1501]


@pytest.mark.parametrize("owner", ["the source", "its base"])
def test_ollama_gets_a_sentence_piece_tokenizer_and_the_tokens_that_were_added(chat_model, tmp_path, owner):
    base = tmp_path / "base"
    base.mkdir()
    exported = Path(shutil.copytree(chat_model, tmp_path / "exported"))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert not folder.add_files_for_ollama(exported, tokenizer, str(chat_model), str(base))
    ((chat_model if owner == "the source" else base) / "tokenizer.model").write_bytes(b"pieces")
    assert folder.add_files_for_ollama(exported, tokenizer, str(chat_model), str(base))
    assert (exported / "tokenizer.model").read_bytes() == b"pieces"
    added = json.loads((exported / "added_tokens.json").read_text())
    assert added == {"<|im_start|>": 1500, "<|im_end|>": 1501}
    again = AutoTokenizer.from_pretrained(exported)  # from tokenizer.json, as ever
    assert again("Tea?<|im_end|>")["input_ids"] == tokenizer("Tea?<|im_end|>")["input_ids"]


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*arguments, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{base}", "{tmp}/full"], "FOLDER {tmp}/full: it is there, and not empty; choose another, or remove it"),
        (["{base}", "{tmp}/full/file"], "FOLDER {tmp}/full/file: it is not a folder"),
        (["{base}", "{tmp}/link"], "FOLDER {tmp}/link: it is a link; choose another, or remove it"),
        (["{base}", "/proc/new"], "FOLDER /proc/new: No such file or directory"),
        (["{tmp}/full", "{tmp}/new"], "SOURCE '{tmp}/full': a folder without a config.json is no model"),
        (["exp:x", "{tmp}/new"], "SOURCE 'exp:x': after exp: comes the number of the experiment"),
        (["{base}", "{tmp}/new", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8' (choose from "),
        (["{base}", "{tmp}/new", "--device", "tpu"], "--device 'tpu': not on this machine"),
        (["{base}", "{tmp}/new", "--push_to_hub", "a/b/c"], "--push_to_hub 'a/b/c': not a name on the hub"),
        (["{base}", "{tmp}/new", "--push_to_hub", "me/model"], "--push_to_hub me/model: there is no token of the hub;"),
        (["{base}"], "the following arguments are required: FOLDER"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(call, tiny, tmp_path, monkeypatch, words, message):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    names = {"tmp": tmp_path, "base": tiny / "base"}
    status, out, err = call(export.main, *(word.format(**names) for word in words))
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message.format(**names)}")
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "link"]
