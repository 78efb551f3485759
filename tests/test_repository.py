"""The repository as a new user finds it: published YAMLs, README commands, the uploaded folder, the startup hook."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import make
import pytest
import yaml
from conftest import REPO
from determined.cli import cli
from determined.cli._declarative_argparse import add_args
from determined.common import context

import dpo_finetune
import export
import inference
import local_experiment
import report
import sft_finetune
from config.experiment import expand_trials, read_experiment_config
from config.hyperparameters import DPOHyperparameters, SFTHyperparameters, parse_hyperparameters
from errors import UserError

README = (REPO / "README.md").read_text(encoding="utf-8")


def test_sft_yaml_is_the_published_experiment():
    (trial,) = expand_trials(read_experiment_config(str(REPO / "sft.yaml")))
    hparams = parse_hyperparameters(SFTHyperparameters, trial)
    assert (hparams.model_name, hparams.dataset) == ("google/gemma-2b", "HuggingFaceTB/cosmopedia")
    assert {share.subset: share.number_of_samples for share in hparams.dataset_subsets} == {
        **{"web_samples_v2": 15000, "stanford": 5000, "stories": 10000, "wikihow": 5000},
        **{"openstax": 7500, "khanacademy": 7500, "auto_math_text": 10000},
    }
    assert hparams.args.learning_rate == 1e-5


def test_dpo_yaml_is_the_published_grid():
    trials = expand_trials(read_experiment_config(str(REPO / "dpo.yaml")))
    with pytest.raises(UserError, match="model_ckpt is missing"):  # nobody means to train nine models without SFT
        parse_hyperparameters(DPOHyperparameters, trials[0])
    parsed = [parse_hyperparameters(DPOHyperparameters, trial | {"model_ckpt": "exp:12"}) for trial in trials]
    assert [(h.dpo_beta, h.args.learning_rate) for h in parsed] == [
        (beta, rate) for beta in (0.1, 0.05, 0.01) for rate in (1e-7, 5e-7, 5e-8)
    ]
    assert parsed[0].datasets == ["argilla/dpo-mix-7k", "jondurbin/truthy-dpo-v0.1"]
    assert parsed[0].args.precompute_ref_log_probs


@pytest.mark.parametrize(("name", "cls"), [("sft.yaml", SFTHyperparameters), ("dpo.yaml", DPOHyperparameters)])
def test_the_yamls_lora_lines_are_all_it_takes_for_one_card(tmp_path, name, cls):
    text = (REPO / name).read_text(encoding="utf-8").replace("\n  # lora: ", "\n  lora: ")
    (tmp_path / "lora.yaml").write_text(text.replace("slots_per_trial: 2", "slots_per_trial: 1"))
    trial, *_ = expand_trials(read_experiment_config(str(tmp_path / "lora.yaml")))
    hparams = parse_hyperparameters(cls, trial | ({"model_ckpt": "exp:12"} if name == "dpo.yaml" else {}))
    assert hparams.lora_config.r == 16


@pytest.mark.parametrize("name", ["sft.yaml", "dpo.yaml", "examples/tiny/sft.yaml", "examples/tiny/dpo.yaml"])
def test_yamls_open_with_the_command_that_runs_them(name):
    opening = (REPO / name).read_text().split("\nname:")[0]
    assert f"python local_experiment.py {name}" in opening


@pytest.mark.parametrize("script", [sft_finetune, dpo_finetune, local_experiment, report, inference, export, make])
def test_help_teaches(call, script):
    status, out, _ = call(script.main, "--help")
    assert status == 0
    assert "default:" in out


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_real(command, monkeypatch):
    """make's targets run in CI; the scripts' command lines parse, and the files they name exist."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert set(words[1:]) <= {"demo", "test"}
        assert f"make {words[1]}" in (REPO / ".ci" / "run").read_text()
        return
    if words[0] in ("source", "export"):
        return
    if words[0] == "det":
        monkeypatch.chdir(REPO)
        parser = cli.make_parser()
        add_args(parser, cli.all_args_description)
        parser.parse_args(words[1:])
        return
    assert words[0] == "python"
    assert (REPO / words[1]).exists()
    for word in words[2:]:
        assert not word.endswith(".yaml") or (REPO / word).exists()
    parsers = {"local_experiment.py": local_experiment, "report.py": report, "inference.py": inference}
    parsers["export.py"] = export
    if words[1] in parsers:
        monkeypatch.setattr(sys, "argv", words[1:])
        parsers[words[1]].parse_arguments()


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not link.startswith("https:") and not (REPO / link).exists()] == []


def test_readme_shows_result_and_commands_early():
    opening = "\n".join(README.splitlines()[:40])
    assert "make demo" in opening
    assert "make test" in opening
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", opening)
    assert len(pictures) == 2
    assert all((REPO / picture).exists() for picture in pictures)


def test_what_det_uploads(tmp_path):
    """The context directory as the CLI packs it, of a checkout in which commands and tools have left something."""
    copied = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    generated = [".venv/lib/big.so", "local_runs/checkpoints/x/model.safetensors", "__pycache__/a.pyc", ".git/HEAD"]
    generated += [f".{tool}_cache/x" for tool in ("pytest", "ruff", "mypy")]
    written = ["exp-13-report.html", "exp-14-comparison/comparison.json", "exp-14-comparison/metadata.json", "dry.html"]
    written += ["comparison.html", "comparison.csv", "comparison.html.unfinished", "comparison/comparison.json"]
    written += [
        "checkpoints/x/checkpoint-40/tokenizer.json",
        "checkpoints/x/metadata.json",
        "a/checkpoint-4/scheduler.pt",
    ]
    written += ["sft/model.safetensors", "wandb/run-1/x", "mlruns/0/x"]
    own = ["mine.jsonl", "data/mine.csv", "mine/train.parquet", "my_model/tokenizer.json", "questions.txt"]
    made = ["local_runs/tiny/base/model.safetensors", "local_runs/tiny/questions/train.jsonl"]
    for name in (*copied, *generated, *written, *own, *made):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((REPO / name).read_bytes() if name in copied else b"x")
    uploaded = {item.path for item in context.read_v1_context(tmp_path, [])}
    rooms = ("config", "storage", "metrics", "adapters", "trial", "speed", "data", "experiment")
    rooms += ("comparison", "serving", "pages")
    needed = {name for name in copied if ("/" not in name and name.endswith(".py")) or name.startswith(rooms)}
    assert needed | {"startup-hook.sh", "requirements.txt", "inference.yaml", *own, *made} <= uploaded
    assert not uploaded & {*generated, *written}
    assert not any(name.startswith("tests/") for name in uploaded)
    ignored = ["git", "check-ignore", "--no-index", *written, *own, *copied]
    assert subprocess.run(ignored, cwd=REPO, capture_output=True, text=True).stdout.split() == written


def run_hook(folder, **environment):
    """Source the hook as Determined does, under `set -e`, with no package index to be reached."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-ec", f"source {REPO}/startup-hook.sh; echo done"]
    environment = {**os.environ, "PATH": path, "PIP_NO_INDEX": "1", **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def installed(folder, name, version):
    """Make `name` look installed in `version`, to whoever has `folder` on its PYTHONPATH."""
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def wheel(folder, name, version, *requirements):
    """An empty package, as pip installs one."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    required = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as packed:
        packed.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}")
        packed.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        packed.writestr(f"{info}/RECORD", "")


def test_startup_hook_does_not_even_start_pip_where_all_is_installed(tmp_path):
    (tmp_path / "pip.py").write_text("raise SystemExit('pip was started')")
    hook = run_hook(REPO, PYTHONPATH=str(tmp_path))
    assert (hook.stdout.strip(), hook.stderr) == ("done", "")


def test_startup_hook_installs_what_is_missing_and_keeps_torch(tmp_path):
    target = tmp_path / "target"
    settings = {"PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_TARGET": str(target)}
    wheel(tmp_path / "wheels", "something_missing", "1.5")
    (tmp_path / "requirements.txt").write_text("torch>=2.6,<3  # the image's\nrich\nsomething-missing>=1\n")
    hook = run_hook(tmp_path, **settings)
    assert hook.stdout.strip() == "done", hook.stderr
    assert [path.name for path in target.iterdir()] == ["something_missing-1.5.dist-info"]

    # A package that needs another torch cannot be installed: then nothing is, and the hook says so.
    shutil.rmtree(target)
    wheel(tmp_path / "wheels", "torch", "99.0")
    wheel(tmp_path / "wheels", "wants_another", "1.0", "torch>=99")
    (tmp_path / "requirements.txt").write_text("torch>=2.6\nsomething-missing>=1\nwants-another\n")
    hook = run_hook(tmp_path, **settings)
    assert hook.returncode == 1
    assert hook.stderr.splitlines()[-1].startswith(
        "startup-hook.sh: could not install something-missing>=1 wants-another (pip says why, above)"
    )
    assert not target.exists()


def test_startup_hook_installs_bitsandbytes_for_4_bits_alone(tmp_path):
    """And not again if it is there, such as in an image that has it."""
    (tmp_path / "requirements.txt").write_text("torch>=2.6\n")
    wheel(tmp_path / "wheels", "bitsandbytes", "0.50.2")
    target = tmp_path / "target"
    settings = {"PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_TARGET": str(target)}
    settings["PYTHONPATH"] = f"{target}:{REPO}"
    for hparams in ({}, {"load_in_4bit": False, "lora": {"r": 8}}, {"load_in_4bit": None}):
        hook = run_hook(tmp_path, DET_HPARAMS=json.dumps(hparams), **settings)
        assert (hook.stdout.strip(), target.exists()) == ("done", False), hook.stderr
    hook = run_hook(tmp_path, DET_HPARAMS='{"load_in_4bit": true, "lora": {}}', **settings)
    assert hook.stdout.strip() == "done", hook.stderr
    assert "bitsandbytes-0.50.2.dist-info" in {path.name for path in target.iterdir()}
    (target / "pip.py").write_text("raise SystemExit('pip was started')")
    hook = run_hook(tmp_path, DET_HPARAMS='{"load_in_4bit": true}', **settings)
    assert (hook.stdout.strip(), hook.stderr) == ("done", "")


def test_startup_hook_refuses_an_image_with_an_old_torch(tmp_path):
    installed(tmp_path / "image", "torch", "2.3.1")
    hook = run_hook(REPO, PYTHONPATH=str(tmp_path / "image"))
    assert (hook.returncode, hook.stdout) == (1, "")
    assert hook.stderr == (
        "startup-hook.sh: the image has torch 2.3.1, but torch>=2.6,<3 is needed; choose another environment.image\n"
    )


def test_startup_hook_says_what_failed(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch>=2.6\nno-such-package-anywhere==1\n")
    hook = run_hook(tmp_path)
    assert hook.returncode == 1
    assert "done" not in hook.stdout
    assert hook.stderr.splitlines()[-1].startswith("startup-hook.sh: could not install no-such-package-anywhere==1 ")


def dockerfile(instruction: str) -> list[str]:
    text = re.sub(r"^#.*\n", "", (REPO / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.removeprefix(instruction).strip() for line in text.splitlines() if line.startswith(f"{instruction} ")]


def test_the_dockerfile_builds_on_the_image_of_the_yamls():
    (argument,), (base,) = dockerfile("ARG"), dockerfile("FROM")
    assert base == "${BASE}"
    yamls = [REPO / f"{name}.yaml" for name in ("sft", "dpo", "inference", "examples/tiny/sft", "examples/tiny/dpo")]
    assert {f"BASE={yaml.safe_load(path.read_text())['environment']['image']}" for path in yamls} == {argument}


def test_the_dockerfile_leaves_nothing_to_the_hook(tmp_path):
    """Its RUN line, in an image that lacks one package, and Determined as a base image does."""
    for name in dockerfile("COPY")[0].split()[:-1]:
        shutil.copy(REPO / name, tmp_path)
    with (tmp_path / "requirements.txt").open("a") as requirements:
        requirements.write("something-missing>=1\n")
    wheel(tmp_path / "wheels", "something_missing", "1.5")
    wheel(tmp_path / "wheels", "determined", "0.38.1")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    target = tmp_path / "target"
    image = {"PATH": path, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_TARGET": str(target)}
    image["HF_HOME"] = "/data"  # as in images of Hugging Face
    (run,) = dockerfile("RUN")
    built = subprocess.run(["sh", "-c", run], cwd=tmp_path, env=image, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    found = {path.name for path in target.iterdir()}
    assert found == {"something_missing-1.5.dist-info", "determined-0.38.1.dist-info"}

    (target / "pip.py").write_text("raise SystemExit('pip was started')")
    hook = run_hook(tmp_path, PYTHONPATH=f"{target}:{REPO}")
    assert (hook.stdout.strip(), hook.stderr) == ("done", "")


def test_entrypoints_run_where_there_is_only_python3():
    for path in (*REPO.glob("*.yaml"), *(REPO / "examples" / "tiny").glob("*t.yaml"), REPO / "examples/tiny/dpo.yaml"):
        words = shlex.split(yaml.safe_load(path.read_text())["entrypoint"])
        assert words[0] == "python3"
        assert "python" not in words


def test_the_readme_shows_the_files_that_there_are():
    tree = re.search(r"## What is here\n\n```\n(.*?)```", README, flags=re.DOTALL)[1]
    folder, shown = "", set()
    for line in tree.splitlines():
        names = re.split(r"(?<!,) ", line.strip())[0].split(", ")
        folder = "" if not line.startswith(" ") else folder
        shown |= {folder + name for name in names}
        folder = names[0] if names[0].endswith("/") else folder
    assert [name for name in shown if not (REPO / name).exists()] == []
    listed = {name.split("/")[0] for name in shown if "/" in name.rstrip("/")}
    files = [*REPO.glob("*.py"), *(file for room in listed - {"examples"} for file in (REPO / room).glob("*.py"))]
    files = {str(file.relative_to(REPO)) for file in files if file.name != "__init__.py"}
    assert files - shown == set()
