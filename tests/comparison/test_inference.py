"""The comparison of models: its questions, its files, and how it continues after an interruption."""

import json
import shutil
import weakref
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import REPO, run_script
from pydantic import ValidationError
from rich.console import Console

import inference
from chat_format import encode, set_chat_format
from comparison import compare as comparison
from comparison import generation, preference_metrics
from comparison.files import METRICS, WRITERS, Comparison, print_comparison, question_text
from comparison.generation import Answer
from comparison.options import DEFAULT_DATASETS, OUTPUT_SUFFIXES, ComparisonOptions, parse_hyperparameters
from comparison.questions import BLOG, BLOG_QUESTIONS
from comparison.verdicts import Verdicts
from config.hyperparameters import DataSource
from dataset_utils import load_dpo_dataset
from errors import UserError
from storage.checkpoints import model_identity
from trial.models import load_model_and_tokenizer

USER = {"role": "user", "content": "How do I boil an egg?"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def compare(call, tiny):
    """`inference.py` on the tiny base, twice under two names, with few and short answers; returns status, out, err."""

    def run(*arguments, models=("one", "two"), data=True, own=None):
        words = [word for name in models for word in ("--model", f"{name}={tiny / 'base'}")]
        words += ["--dataset", tiny / "conversations"] if data else []
        words += ["--number-of-pairs", 4] if data else []
        words += ["--number-of-samples", 3] if own is None else []
        return call(inference.main, *words, "--max-new-tokens", 3, "--device", "cpu", *(own or ()), *arguments)

    return run


@pytest.fixture
def held_out(tiny):
    return load_dpo_dataset([DataSource(str(tiny / "conversations"))], 42)["test"].shuffle(seed=42)


def test_a_base_model_gets_plain_text_and_a_tuned_model_its_template(tokenizer):
    tuned = encode(tokenizer, [SYSTEM, USER])[0]
    assert tokenizer.decode(tuned).startswith("<bos><|im_start|>system\nBe brief.")
    tokenizer.chat_template = None
    prompt, completion = encode(tokenizer, [SYSTEM, USER], "Gently.")
    assert prompt == encode(tokenizer, [SYSTEM, USER])[0]
    assert tokenizer.decode(prompt) == "<bos>Be brief.\nHow do I boil an egg?"
    assert tokenizer.decode(completion) == "\nGently.<eos>"


def test_files_hold_the_held_out_questions_and_the_preferred_answers(compare, held_out, tmp_path, tiny):
    names = [str(tmp_path / "new" / f"table.{ending}") for ending in ("csv", "jsonl", "md", "html", "json")]
    outputs = [word for name in names for word in ("--output_file", name)]
    status, out, err = compare(*("--number-of-samples", 999, "--max-new-tokens", 16, *outputs), models=("[one]", "two"))
    assert status == 0, err
    assert set(WRITERS) == set(OUTPUT_SUFFIXES)
    csv, jsonl, md, _, whole = map(Path, names)
    table = pd.read_csv(csv, keep_default_na=False)
    assert list(table.columns) == ["question", "[one]", "two", "preferred"]
    assert table["question"].tolist() == [question_text(prompt) for prompt in held_out["prompt"][:]]
    assert table["preferred"].tolist() == held_out["chosen"][:]
    assert table["[one]"].tolist() == table["two"].tolist()
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert [list(row) for row in rows] == [list(table.columns)] * len(held_out)
    assert rows == table.to_dict("records")
    lines = md.read_text().splitlines()
    verdicts = [line for line in lines if line.startswith("- ")][:3]
    assert lines[:4] == [*verdicts, ""]  # of two models: their difference, the rewards of one, and length
    assert lines[4] == "| question | \\[one\\] | two | preferred |"
    assert lines[6 + len(held_out)] == ""
    assert lines[6 + len(held_out) + 3].startswith("| preference accuracy, by token \N{UPWARDS ARROW} | ")
    everything = json.loads(whole.read_text())
    assert everything["questions"] == rows
    assert set(everything["figures"]["two"]) == set(METRICS)
    assert everything["verdicts"][0].startswith("two prefers what people chose in ")
    assert everything["verdicts"][0].endswith("no difference.")  # the same model twice
    assert everything["verdicts"][1].startswith("two gives all answers the probability that [one] gives them")
    assert everything["verdicts"][2].startswith("Counted in characters, people chose the longer answer in ")
    assert [" ".join(line[2:].replace("\\", "").split()) for line in verdicts] == everything["verdicts"]
    assert " ".join(out.split()).startswith(f"--number-of-samples 999: only {len(held_out)} rows are held out")
    assert everything["verdicts"][0] in " ".join(out.split()).split(" 1. ")[0]  # before the first question
    (difference,) = everything["differences"]
    assert (difference["model"], difference["against"]) == ("two", "[one]")
    assert difference["preference_accuracy_by_token"] == {"value": 0, "low": 0, "high": 0, "count": 4}
    assert everything["chosen_is_longer"]["count"] <= 4
    assert set(everything["figures"]["two"]["perplexity"]) == {"value", "low", "high", "count"}
    assert everything["models"] == {name: str(tiny / "base") for name in ("[one]", "two")}
    assert f"--number-of-samples 999: only {len(held_out)} rows are held out" in out
    assert "[one]" in out  # rich's markup is not for what users and models write
    assert "4 held-out pairs of" in " ".join(out.split())
    assert "open it in a browser to vote" in out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(name.split("/")[-1] for name in names)


def test_own_questions_come_from_options_and_files(compare, tmp_path, monkeypatch, tiny):
    def questions(*arguments, data=False):
        output = tmp_path / "out.jsonl"
        status, out, err = compare("--output_file", output, models=("one",), data=data, own=arguments)
        assert status == 0, err
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        return [(row["question"], row.get("preferred")) for row in rows], out

    text = tmp_path / "mine.txt"
    text.write_text("What is tea?\n\n  Why? \n")
    found, out = questions("--prompt", "Who?", "--prompt", "Where?", "--prompts", text)
    assert found == [("Who?", None), ("Where?", None), ("What is tea?", None), ("Why?", None)]
    assert "preference accuracy" not in out  # there are no pairs
    assert "stopped by itself" in out

    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"system": "Be brief.", "prompt": "What is tea?", "chosen": "A drink."}\n')
    assert questions("--prompts", rows)[0] == [("system: Be brief.\nuser: What is tea?", "A drink.")]
    rows.write_text('{"messages": [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]}\n')
    assert questions("--prompts", rows)[0] == [("Tea?", "Yes.")]
    rows.write_text('{"instruction": "Translate.", "input": "Tee"}\n')
    assert questions("--prompts", rows)[0] == [("Translate.\n\nTee", None)]
    rows.write_text('{"prompt": "One?", "completion": [{"role": "assistant", "content": "1"}]}\n{"question": "Two?"}\n')
    assert questions("--prompts", rows)[0] == [("One?", "1"), ("Two?", "")]

    # With a data set beside them, its pairs are scored.
    assert "preference accuracy" in questions("--prompt", "Who?", data=True)[1]


def test_the_posts_questions_are_found_by_what_they_ask(compare, tmp_path, monkeypatch, tiny):
    """Wherever they are, among rows that have some of their words; in the post's order; what is missing is named."""
    assert (BLOG.name, BLOG.split) == ("Intel/orca_dpo_pairs", "train")
    questions = [
        "What animal is on LIVERPOOL\N{RIGHT SINGLE QUOTATION MARK}s crest?",
        "Read this: A local paper of Liverpool, in order to watch stars, " + "wrote of a blizzard and a crest. " * 9,
        "A locality is no blizzard.",
        "Two people walk in a local blizzard. What do they need?",
        "John was a terrible writer. To practise, what should he do?",
        "John was a good writer.",
        "What is the best order to watch the Star Wars series?",
    ]
    shown = [questions[index] for index in (6, 4, 3, 0)]
    rows = [{"system": "Be kind.", "question": text, "chosen": f"{text}!", "rejected": ""} for text in questions]

    def ask(rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr("comparison.questions.BLOG", DataSource(str(tmp_path / "rows.jsonl")))
        status, out, err = compare("--output_file", tmp_path / "o.jsonl", models=("one",), data=False, own=own)
        return status, out, err, [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]

    own = ("--prompts", "blog")
    status, out, err, found = ask(rows)
    assert status == 0, err
    assert [row["question"] for row in found] == [f"system: Be kind.\nuser: {text}" for text in shown]
    assert [row["preferred"] for row in found] == [f"{text}!" for text in shown]
    assert "not in" not in out
    status, out, _, found = ask(rows[4:])
    assert (status, len(found)) == (0, 2)
    missing = list(BLOG_QUESTIONS)[2:]
    assert f"--prompts blog: not in {tmp_path / 'rows.jsonl'}: {'; '.join(missing)}\n" in out
    status, _, err, _ = ask(rows[5:6])
    missing = list(BLOG_QUESTIONS)
    assert (status, err) == (2, f"error: --prompts blog: not in {tmp_path / 'rows.jsonl'}: {'; '.join(missing)}\n")


def test_the_reference_has_no_rewards_and_equal_models_have_no_margin(compare, tmp_path):
    output = tmp_path / "t.md"
    assert compare("--reference", "two", "--output_file", output)[0] == 0
    assert "| reward accuracy against two \N{UPWARDS ARROW} | 0.0% (all 4 alike) | - |" in output.read_text()
    assert "| reward margin against two \N{UPWARDS ARROW} | 0.00 (all 4 alike) | - |" in output.read_text()


def test_pairs_that_do_not_fit_one_model_are_left_out_for_all(call, tiny, tmp_path, monkeypatch):
    """A template's markers take room that plain text does not need."""
    model, tokenizer = load_model_and_tokenizer(str(tiny / "base"))
    set_chat_format(model, tokenizer)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "tuned")
    words = ["--number-of-samples", 1, "--number-of-pairs", 4, "--max-new-tokens", 2, "--device", "cpu"]
    words += ["--dataset", tiny / "questions", "--max-length", 20, "--model", f"base={tiny / 'base'}"]
    alone = " ".join(call(inference.main, *words)[1].split())
    assert "4 held-out pairs of" in alone
    assert "4 of them cut to --max-length 20" in alone
    words += ["--model", f"tuned={tmp_path / 'tuned'}"]
    status, out, err = call(inference.main, *words)
    assert (status, "preference accuracy" in out) == (2, False)
    assert err == "error: --max-length 20: none of the 4 pairs fits, in the format of tuned; raise it\n"

    def tokenize(pairs, tokenizer, max_length, tokenize=comparison.tokenize_pairs):
        rows = tokenize(pairs, tokenizer, 60)
        fits = [index > 0 or tokenizer.chat_template is None for index in range(len(rows))]
        return rows.remove_columns("fits").add_column("fits", fits)

    monkeypatch.setattr(comparison, "tokenize_pairs", tokenize)
    status, out, err = call(inference.main, *words)
    assert status == 0, err
    assert "3 held-out pairs of" in " ".join(out.split())
    assert "1 pairs are left out: --max-length 20 leaves them no room" in " ".join(out.split())


@pytest.mark.parametrize(
    "sampled", [(), ("--temperature", 1.2, "--top-p", 0.9, "--seed", 3)], ids=["greedy", "sampled"]
)
def test_an_interrupted_comparison_continues_to_the_same_result(compare, tmp_path, monkeypatch, sampled):
    """Interrupted after each of its batches in turn, with a line of the file torn: in the end nothing is different."""
    arguments = ("--batch-size", 2, *sampled, "--output_file")
    untouched, output = tmp_path / "untouched.json", tmp_path / "out.json"  # answers and numbers
    assert compare(*arguments, untouched)[0] == 0
    unfinished = tmp_path / "out.json.unfinished"
    run, scored = generation.answer_batch, preference_metrics.score_batch
    counted = {"batches": 0, "until": 1}

    def once(original):
        def batch(*args):
            counted["batches"] += 1
            if counted["batches"] > counted["until"]:
                raise KeyboardInterrupt
            return original(*args)

        return batch

    monkeypatch.setattr(generation, "answer_batch", once(run))
    monkeypatch.setattr(preference_metrics, "score_batch", once(scored))
    lines = 0
    while True:
        counted["batches"] = 0
        status, _, err = compare(*arguments, output)
        if status != 130:
            break
        assert err == "stopped by SIGINT; the same command goes on from what it has saved\n"
        assert not output.exists()
        assert len(unfinished.read_text().splitlines()) > lines
        lines = len(unfinished.read_text().splitlines())
        with unfinished.open("a") as file:
            file.write('{"key": 1}\n[]\n{"key": "torn')
    assert status == 0, err
    assert lines >= 3
    assert output.read_text() == untouched.read_text()
    assert not unfinished.exists()


def test_halves_of_a_batch_sample_the_same_wherever_memory_ran_out(compare, tmp_path, monkeypatch):
    run, drawn, found = generation.answer_batch, iter((0, 99)), []

    def batch(model, tokenizer, prompts, *args):
        if len(prompts) > 2:
            torch.rand(next(drawn))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(model, tokenizer, prompts, *args)

    monkeypatch.setattr(generation, "answer_batch", batch)
    for _ in range(2):
        status, _, err = compare("--temperature", 1, "--output_file", tmp_path / "o.json", models=("one",))
        assert status == 0, err
        found.append((tmp_path / "o.json").read_text())
    assert found[0] == found[1]


def test_a_gpu_answers_all_questions_in_one_batch(compare, held_out, monkeypatch):
    """With a CPU that takes itself for a GPU. A batch size that is given holds there too."""
    batches = []

    def batch(model, tokenizer, prompts, *args):
        batches.append(len(prompts))
        return [Answer("Yes.", 1, True) for _ in prompts]

    monkeypatch.setattr(generation, "answer_batch", batch)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr("trial.models.choose_device", lambda name, key: torch.device(kind))

    def asked(*arguments):
        batches.clear()
        status, _, err = compare("--number-of-samples", 99, "--number-of-pairs", 0, *arguments, models=("one",))
        assert status == 0, err
        return batches

    count = len(held_out)
    assert count > 9
    kind = "cuda"
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert asked() == [count]
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it would make a plan for every new length
    assert asked("--batch-size", 9)[0] == 9
    kind = "cpu"
    assert asked()[0] == 8


def test_stored_results_are_reused_for_the_same_model_and_options_only(compare, tmp_path, monkeypatch, tiny):
    """What a result depends on is in its key: another option, or another model under the old name, is done anew."""
    monkeypatch.setattr(Path, "unlink", lambda self, **kwargs: None)  # a finished comparison keeps its results
    asked = []
    monkeypatch.setattr(generation, "answer_batch", lambda *a, run=generation.answer_batch: asked.append(1) or run(*a))

    def batches(*arguments, models=("one",)):
        asked.clear()
        status, _, err = compare("--number-of-pairs", 0, "--output_file", tmp_path / "o.csv", *arguments, models=models)
        assert status == 0, err
        return len(asked)

    assert batches() == 1
    assert batches() == 0
    assert batches(models=("other", "one")) == 0  # the same folder, under other names
    assert batches("--batch-size", 3) == 0  # greedy answers do not depend on it
    assert batches("--max-new-tokens", 4) == 1
    assert batches("--temperature", 1) == 1
    assert batches("--temperature", 1) == 0
    assert batches("--temperature", 1, "--seed", 1) == 1
    assert batches("--temperature", 1, "--batch-size", 7) == 1
    assert batches("--dtype", "bfloat16") == 1
    assert batches("--dtype", "bfloat16", "--batch-size", 7) == 1  # there padding moves an answer


def test_a_models_identity_is_its_content_and_not_its_place(model, tokenizer, tmp_path):
    """A checkpoint that was fetched again is the same; one that was trained is another."""
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").touch()
    assert model_identity(str(tmp_path / "a")) == model_identity(str(tmp_path / "b"))
    with torch.no_grad():
        model.model.norm.weight.add_(1e-3)
    model.save_pretrained(tmp_path / "b")
    assert model_identity(str(tmp_path / "a")) != model_identity(str(tmp_path / "b"))
    assert model_identity("google/gemma-2b") == ["google/gemma-2b"]


def test_one_model_at_a_time_each_loaded_once(call, tiny, tmp_path, monkeypatch):
    models = []

    def load(*args, **kwargs):
        assert all(model() is None for model in models)
        loaded = load_model_and_tokenizer(*args, **kwargs)
        models.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(comparison, "load_model_and_tokenizer", load)
    words = ["--number-of-samples", 3, "--number-of-pairs", 3, "--max-new-tokens", 2, "--device", "cpu"]
    for name in "abc":
        shutil.copytree(tiny / "base", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"called": name}))  # or they would be one
        words += ["--model", f"{name}={tmp_path / name}"]
    status, _, err = call(inference.main, *words, "--dataset", tiny / "conversations")
    assert status == 0, err
    assert len(models) == 3


@pytest.fixture
def talk(call, tiny, monkeypatch):
    """A conversation with the tiny base, which answers what it is told to; returns the output and what it was fed."""

    def run(lines, answers, *arguments):
        said, fed = iter(lines), []
        monkeypatch.setattr("builtins.input", lambda prompt: next(said))

        def answer(model, tokenizer, prompts, sampling, on_tokens):
            fed.append(tokenizer.decode(prompts[0], skip_special_tokens=True))
            for token in tokenizer(answers[len(fed) - 1], add_special_tokens=False)["input_ids"]:
                on_tokens([token])
            if answers[len(fed) - 1].endswith("STOP"):
                raise KeyboardInterrupt

        monkeypatch.setattr("comparison.chat.answer_batch", answer)
        status, out, err = call(inference.main, "--model", f"m={tiny / 'base'}", "--chat", "m", *arguments)
        assert status == 0, err
        return out, fed

    return run


def test_chat_has_a_history(talk):
    lines = ["Hello", "  ", "And?", "/new", "Again", "/quit"]
    out, fed = talk(lines, ["Hi there.<|im_end|>", "No.<|im_e", "Yes."])
    assert fed == ["Hello", "Hello\nHi there.\nAnd?", "Again"]
    assert "m: Hi there.\n" in out
    assert "m: No.<|im_e\n" in out  # no stop after all
    assert "It has no chat template" in out


def test_chat_answers_can_be_stopped_and_input_can_end(talk):
    out, fed = talk(["Hello", "On", "/quit"], ["I begin and STOP", "Fine."])
    assert fed[1] == "Hello\nI begin and STOP\nOn"
    assert "(stopped)" in out


def test_chat_forgets_what_does_not_fit(talk):
    lines = ["first " * 90, "second " * 90, "/quit"]
    _, everything = talk(lines, ["Good.", "Fine."])
    assert everything[1].startswith("first")
    out, fed = talk(lines, ["Good.", "Fine."], "--max-new-tokens", 900)  # of the 1024 that its positions allow
    assert "no longer fits, and is left out" in " ".join(out.split())
    assert everything[1].endswith(fed[1])
    assert not fed[1].startswith("first first first first")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "base"], "--model: 'base' is not NAME=SOURCE"),
        (["--model", "preferred=x"], "the name 'preferred' is taken"),
        (["--model", "a=./nowhere"], "--model a './nowhere': no such folder"),
        (["--model", "a={tiny}/base", "--model", "b=./nowhere"], "--model b './nowhere': no such folder"),
        (["--model", "a={tiny}"], "a folder without a config.json is no model"),
        (["--model", "a=nobody/nothing"], "--model a 'nobody/nothing'"),
        (
            ["--model", "a=6b6fbaa7-faa9-4449-867b-2939a147a335"],
            "--model a 6b6fbaa7-faa9-4449-867b-2939a147a335: no such",
        ),
        (["--model", "a={tiny}/base", "--dataset", "no.jsonl"], "data set no.jsonl: no such file"),
        (["--model", "a={tiny}/base", "--dataset", "{{name: 1"], "--dataset: '{name: 1': "),
        (["--model", "a={tiny}/base", "--prompts", "no.jsonl"], "data set no.jsonl: no such file"),
        (["--model", "a={tiny}/base", "--prompts", "no.txt"], "no.txt: "),
        (["--model", "a={tiny}/base", "--device", "gpu"], "--device 'gpu': not on this machine"),
        (
            ["--model", "a={tiny}/base", "--dtype", "float33"],
            "--dtype is 'float33', which is not one of float32",
        ),
        (["--model", "a={tiny}/base", "--number-of-samples", "0"], "--number-of-samples 0 is not at least 1"),
        (["--model", "a={tiny}/base", "--number-of-pairs", "-1"], "--number-of-pairs -1 is not at least 0"),
        (["--model", "a={tiny}/base", "--temperature", "-1"], "--temperature -1 is not at least 0"),
        (["--model", "a={tiny}/base", "--temperature", "nan"], "--temperature nan is not a finite number"),
        (["--model", "a={tiny}/base", "--prompt", " "], "--prompt is empty"),
        (["--model", "a={tiny}/base", "--prompts", "{tiny}/empty.jsonl"], "empty.jsonl line 1: the question is empty"),
        (
            ["--model", "a={tiny}/base", "--prompt", "x", "--number-of-samples", "3"],
            "--number-of-samples has no effect",
        ),
        (
            ["--model", "a={tiny}/base", "--chat", "a", "--output_file", "a.csv"],
            "output_file has no effect with --chat",
        ),
        (["--model", "a={tiny}/base", "--nubmer-of-pairs", "3"], "no such option (did you mean '--number-of-pairs'?)"),
        (["--model", "a={tiny}/base", "--seed", "x"], "--seed is 'x', which is not a whole number"),
        (["--prompt", "x"], "which models? Give --model, --exp_id or --trial_id"),
        (
            ["--model", "a={tiny}/base", "--prompts", "{tiny}/how.md"],
            "how.md: a file of questions ends in one of .txt",
        ),
        (
            ["--model", "a={tiny}/base", "--prompts", "{tiny}/other.jsonl"],
            "none of its columns (body) holds a question: it needs one of prompt",
        ),
        (["--model", "a={tiny}/base", "--prompts", "{tiny}/utf16.txt"], "utf16.txt: not UTF-8 text"),
        (["--model", "a={tiny}/base", "--output_file", "{tiny}/how.txt/a.csv"], "how.txt/a.csv: Not a directory"),
        (["--model", "a={tiny}/base", "--max-new-tokens", "2000"], "--max-new-tokens 2000 leaves a prompt no room"),
        (["--model", "a={tiny}/base", "--top-p", "0.9"], "--top-p 0.9 has no effect without a --temperature above 0"),
        (["--model", "a={tiny}/base", "--top-p", "2", "--temperature", "1"], "--top-p 2 is not at most 1"),
        (["--model", "a={tiny}/base", "--beta", "0"], "--beta 0 is not greater than 0"),
        (
            ["--model", "dpo={tiny}/base", "--reference", "dop"],
            "not one of the models: dpo (did you mean 'dpo'?)",
        ),
        (["--model", "dpo={tiny}/base", "--chat", "sft"], "--chat 'sft' is not one of the models: dpo"),
        (["--model", "a={tiny}/base", "--output_file", "a.xlsx"], "its name must end in one of .html, .csv"),
        (["--model", "a={tiny}/base", "--output_file", "{tiny}/base.html"], "base.html: it is a folder"),
    ],
)
def test_mistakes_get_one_line(call, tiny, arguments, message):
    (tiny / "base.html").mkdir(exist_ok=True)
    (tiny / "how.txt").touch()
    (tiny / "how.md").touch()
    (tiny / "other.jsonl").write_text('{"body": "x"}\n')
    (tiny / "utf16.txt").write_text("What is tea?", encoding="utf-16")
    (tiny / "empty.jsonl").write_text('{"prompt": ""}\n')
    arguments = [argument.format(tiny=tiny) for argument in arguments]
    if "--dataset" not in arguments and "--chat" not in arguments:
        arguments += ["--dataset", str(tiny / "questions")]
    status, _, err = call(inference.main, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({}, "which models? Give hyperparameters.model, hyperparameters.exp_id or hyperparameters.trial_id"),
        (
            {"number_of_question": 3},
            "hyperparameters.number_of_question is not an option (did you mean 'number_of_samples'?)",
        ),
        ({"seed": "5"}, "hyperparameters.seed is '5', which is not a whole number"),
        ({"batch_size": True}, "hyperparameters.batch_size is True, which is not a whole number"),
        ({"temperature": -1}, "hyperparameters.temperature -1 is not at least 0"),
        ({"top_p": 0.5}, "hyperparameters.top_p 0.5 has no effect without a hyperparameters.temperature above 0"),
        ({"model": {"preferred": "x"}}, "hyperparameters.model: {'preferred': 'x'}: the name 'preferred' is taken"),
        ({"dataset": [3]}, "hyperparameters.dataset[0] is 3, which is not text or a mapping"),
        ({"reference": "dpo"}, "hyperparameters.reference 'dpo' is not one of the models: a"),
    ],
)
def test_mistakes_in_a_yaml_name_its_key(hparams, message):
    with pytest.raises(UserError) as error:
        parse_hyperparameters({"model": {"a": "b"}, **hparams} if hparams else {})
    assert message in str(error.value)


def test_options_cannot_be_changed():
    options = parse_hyperparameters({"model": {"a": "b"}})
    with pytest.raises(ValidationError):
        options.seed = 1


def test_options_are_read_before_heavy_libraries_are_imported():
    code = "import sys, inference; inference.parse_arguments(); print(*sys.modules)"
    run = run_script("-c", code, "--model", "a=b")
    assert run.returncode == 0, run.stderr
    assert {"torch", "transformers", "datasets", "pandas", "pyarrow"}.isdisjoint(run.stdout.split())


def test_pairs_beside_questions_of_ones_own_need_a_data_set(call, tiny):
    status, _, err = call(inference.main, "--model", f"a={tiny / 'base'}", "--prompt", "x", "--number-of-pairs", 3)
    assert (status, err) == (
        2,
        "error: --number-of-pairs needs a --dataset or --eval-dataset beside your own questions\n",
    )


def test_control_characters_and_markup_do_not_reach_the_terminal(capsys):
    of = Comparison(
        sources={"a": "x"},
        questions=[[{"role": "user", "content": "Why? :fire:"}]],
        preferred=[None],
        answers={"a": [Answer("red \x1b[31m :warning: [bold]", 3, True)]},
        figures={"a": {}},
        reference="a",
        settings="",
        verdicts=Verdicts(["[red]a is better[/red]"], [], None),
    )
    print_comparison(Console(highlight=False, emoji=False), of)
    out = capsys.readouterr().out
    assert out.startswith("[red]a is better[/red]\n")
    assert "Why? :fire:" in out
    assert "red \\x1b[31m :warning: [bold]" in out
    assert "\x1b[31m" not in out


def test_the_default_questions_are_from_the_data_of_dpo_yaml():
    from config.experiment import read_experiment_config

    assert list(DEFAULT_DATASETS) == read_experiment_config(str(REPO / "dpo.yaml"))["hyperparameters"]["datasets"]
    assert all(name in ComparisonOptions.model_fields["dataset"].description for name in DEFAULT_DATASETS)
