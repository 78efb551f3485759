"""The comparison of models."""

import pandas as pd
import pytest
import torch
from rich.progress import Progress

import inference
from chat_format import encode
from dataset_utils import load_dpo_dataset
from hyperparameters import DataSource
from models import load_model_and_tokenizer

USER = {"role": "user", "content": "How do I boil an egg?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_base_model_gets_plain_text_and_a_tuned_one_its_template(tokenizer):
    assert inference.prompt_ids(tokenizer, [SYSTEM, USER]) == encode(tokenizer, [SYSTEM, USER])[0]
    tokenizer.chat_template = None
    assert tokenizer.decode(inference.prompt_ids(tokenizer, [SYSTEM, USER])) == (
        "<bos>Be brief.\nHow do I boil an egg?"
    )


def test_answers_do_not_depend_on_the_batch(tiny):
    model, tokenizer = load_model_and_tokenizer(str(tiny / "base"))
    prompts = load_dpo_dataset([DataSource(str(tiny / "conversations"))], 42)["test"]["prompt"][:6]
    with Progress(disable=True) as progress:
        answers = {size: inference.answer(model, tokenizer, prompts, 12, size, progress, "m") for size in (1, 4)}
    assert answers[1] == answers[4]
    ids = torch.tensor([inference.prompt_ids(tokenizer, prompts[0])])
    alone = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert answers[4][0] == tokenizer.decode(alone[0][ids.shape[1] :], skip_special_tokens=True).strip()


def test_table_holds_the_held_out_questions_and_the_preferred_answers(call, tiny, tmp_path):
    output = tmp_path / "new" / "table.csv"
    status, out, err = call(
        *(inference.main, "--model", f"[one]={tiny / 'base'}", "--dataset", tiny / "conversations"),
        *("--number-of-samples", 999, "--max-new-tokens", 2, "--device", "cpu", "--output_file", output),
    )
    assert status == 0, err
    held_out = load_dpo_dataset([DataSource(str(tiny / "conversations"))], 42)["test"]
    table = pd.read_csv(output, keep_default_na=False)
    assert list(table.columns) == ["question", "[one]", "preferred"]
    assert table["preferred"].tolist() == held_out["chosen"][:]
    assert f"holds {len(held_out)} rows out" in out
    assert "[one]" in out  # rich's markup is not for what users and models write


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "base"], "--model 'base' is not NAME=SOURCE"),
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
        (["--model", "a={tiny}/base", "--device", "gpu"], "--device 'gpu': not on this machine"),
        (["--model", "a={tiny}/base", "--dtype", "float33"], "--dtype 'float33' is none of float32"),
        (["--model", "a={tiny}/base", "--number-of-samples", "0"], "--number-of-samples 0 is not at least 1"),
        (["--model", "a={tiny}/base", "--output_file", "a.xlsx"], "its name must end in .csv"),
    ],
)
def test_mistakes_get_one_line(call, tiny, arguments, message):
    arguments = [argument.format(tiny=tiny) for argument in arguments]
    if "--dataset" not in arguments:
        arguments += ["--dataset", str(tiny / "questions")]
    status, _, err = call(inference.main, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
