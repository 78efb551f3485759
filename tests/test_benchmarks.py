"""The benchmarks run and print what they promise. What they measure depends on the machine and is not tested."""

import json

import pytest
from conftest import run_script


def test_throughput_compares_ours_with_trl_on_the_same_tokens(tmp_path):
    """The real entrypoint and TRL's own trainer have the same losses on the same tokens."""
    output = tmp_path / "measured.json"
    options = ["--model", "tiny", "--kind", "dpo", "--rounds", "1", "--steps", "1", "--batch", "2"]
    # Without bf16=false, a CPU with bf16 instructions would train ours under bf16 autocast, but TRL in float32.
    options += ["--configurations", "ours", "trl-fp32", "--set", "bf16=false"]
    run = run_script("benchmarks/throughput.py", *options, "--json", output)
    assert run.returncode == 0, run.stderr
    ours, theirs = json.loads(output.read_text())["results"]
    assert (ours["configuration"], theirs["configuration"]) == ("ours", "trl-fp32")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert (ours["padding"], theirs["padding"] > 0) == (0, True)
    assert "ours / trl-fp32: " in run.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "error: --model nowhere: must be one of tiny, small, gemma-270m, gemma-2b or a"),
        (["--length", "128"], "error: --length: give one number for each of sft, dpo, as in --length 4096 2048"),
        (["--dataset", "rows.jsonl"], "error: --dataset: small has no real tokenizer; set --model to a"),
    ],
)
def test_throughput_reports_a_mistake_in_one_line(options, message):
    run = run_script("benchmarks/throughput.py", *options)
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert run.stderr.startswith(message)


def test_scale_computes_the_published_run():
    run = run_script("benchmarks/scale.py", "--full-run", "45")
    assert run.returncode == 0, run.stderr
    assert "| SFT | 1 | 48,000 | 144,000 | " in run.stdout
