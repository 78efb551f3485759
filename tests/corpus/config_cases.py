"""YAMLs with a mistake: their structure, names, the experiment's keys, grid spaces, hyperparameters, trainer arguments."""

import json
import math
from datetime import date
from typing import Any

from harness import DROP, Case

INF, NAN = math.inf, math.nan
VALID = "name: t\nentrypoint: python sft_finetune.py\nsearcher: {name: single, metric: eval_loss}\n"
HPARAMS = (
    'hyperparameters: {model_name: "{tiny}/base", dataset: "{tiny}/instructions", '
    "dataset_subsets: [{subset: kitchen, ratio: 0.5}]}\n"
)
LAUGHS = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 12))

# Whole files, and what the line must say. All name the file, too.
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "config.yaml"),
    "only a comment": ("# nothing\n", "config.yaml"),
    "a list": ("- name: x\n- entrypoint: y\n", "config.yaml"),
    "a word": ("sft\n", "config.yaml"),
    "a number": ("42\n", "config.yaml"),
    "tab": ("name: t\nsearcher:\n\tname: single\n", "config.yaml"),
    "open bracket": (VALID + "hyperparameters: {model_name: [x\n", "config.yaml"),
    "open quote": (VALID + 'hyperparameters: {model_name: "x}\n', "config.yaml"),
    "bad escape": (VALID + 'hyperparameters: {model_name: "\\q"}\n', "config.yaml"),
    "bad indent": ("name: t\n  entrypoint: x\n searcher: y\n", "config.yaml"),
    "key twice": (VALID + "name: u\n" + HPARAMS, "name"),
    "hyperparameter twice": (
        VALID + "hyperparameters:\n  model_name: a\n  dataset: b\n  model_name: c\n",
        "model_name",
    ),
    "NUL": (VALID + "description: 'a\0b'\n" + HPARAMS, "config.yaml"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "config.yaml"),
    "UTF-16": ((VALID + HPARAMS).encode("utf-16"), "config.yaml"),
    "Latin-1": ("name: caf\xe9\n".encode("latin-1"), "config.yaml"),
    "no such anchor": (VALID + "hyperparameters: *nowhere\n", "config.yaml"),
    "holds itself": (VALID + "hyperparameters: &h {model_name: x, dataset: *h}\n", ""),
    "list holds itself": (VALID + "labels: &l [a, *l]\n" + HPARAMS, ""),
    "billion laughs": ("x0: &x0 [lol]\n" + LAUGHS + VALID + "hyperparameters: {model_name: *x11, dataset: d}\n", ""),
    "laughs in a value": (f"{VALID}hyperparameters:\n  a: &x0 [lol]\n" + LAUGHS.replace("x", "  x", 1), ""),
    "Python object": (VALID + "hyperparameters: {model_name: !!python/object/apply:os.mkdir [x]}\n", "config.yaml"),
    "own tag": (VALID + "hyperparameters: !include other.yaml\n", "config.yaml"),
    "two documents": (f"---\n{VALID}{HPARAMS}---\n{VALID}", "config.yaml"),
    "deep lists": (VALID + HPARAMS + "labels: " + "[" * 5000 + "]" * 5000 + "\n", ""),
    "deep mappings": (VALID + "hyperparameters: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n", ""),
    "number as key": (VALID + HPARAMS + "1: 2\n", "1"),
    "null as key": (VALID + HPARAMS + "~: 2\n", ""),
    "list as key": (VALID + HPARAMS + "? [a, b]\n: 2\n", ""),
    "number as hyperparameter": (VALID + "hyperparameters: {1: 2, model_name: x, dataset: y}\n", "1"),
    "number and date as trainer argument": (
        VALID + HPARAMS.replace("}]}\n", "}], training_args: {2020-01-01: 2, seed: 1}}\n"),
        "training_args",
    ),
    "merge of a number": (VALID + "hyperparameters:\n  <<: 3\n  model_name: x\n", "config.yaml"),
    "binary value": (
        VALID + 'hyperparameters: {model_name: !!binary aGk=, dataset: "{tiny}/questions"}\n',
        "model_name",
    ),
    "a set": (VALID + HPARAMS + "labels: !!set {a, b}\n", "labels"),
    "surrogate": (VALID + 'hyperparameters: {model_name: "\\ud800", dataset: "{tiny}/instructions"}\n', "model_name"),
    "JSON cut short": ('{"name": "t", "entrypoint": "python sft_fin', "config.yaml"),
    "HTML": ("<!DOCTYPE html>\n<html><body>404: not found</body></html>\n", "config.yaml"),
    "no hyperparameters": (VALID, "hyperparameters"),
    "null hyperparameters": (VALID + "hyperparameters:\n", "hyperparameters"),
    "no searcher": ("name: t\nentrypoint: python sft_finetune.py\n" + HPARAMS, "searcher"),
    "no entrypoint": ("name: t\nsearcher: {name: single, metric: eval_loss}\n" + HPARAMS, "entrypoint"),
}

NAMES = [
    "..",
    ".",
    "",
    "   ",
    "a/b",
    "../../x",
    "/",
    "/abs",
    "a\0b",
    "n" * 300,
    "\N{SNOWMAN}" * 100,
    "a\nb",
    "\ud800",
    "-x",
    "~",
    "a\x1b[2Jb",
]
NAMES += ["../local_runs/..", "a/../..", "CON:*?", "...", "x" * 255, "\u202eabc"]
WRONG_NAMES = [12, 1.5, True, ["a"], {"a": 1}, date(2020, 1, 1)]

# Determined's own keys: a dotted key, a wrong value, and what the line must say (None: the key's last part).
KEYS: list[tuple[str, Any, str | None]] = [
    ("nam", "x", "nam"),
    ("hyperparameter", {"a": 1}, None),
    ("entrypoint", 3, None),
    ("entrypoint", "", None),
    ("entrypoint", [], None),
    ("entrypoint", ["python", 3], None),
    ("entrypoint", {"a": "b"}, None),
    ("entrypoint", "python nowhere.py", "nowhere.py"),
    ("entrypoint", "bash run.sh", None),
    ("entrypoint", 'python "sft_finetune.py', None),
    ("entrypoint", "python ../../sft_finetune.py", None),
    ("entrypoint", "python errors.py.py", "errors.py.py"),
    ("entrypoint", "python sft_finetun.py", "sft_finetun.py"),
    ("entrypoint", "python sft_finetune.py --bogus 1", "--bogus"),
    ("entrypoint", "python sft_finetune.py --trial-id zero", "--trial-id"),
    ("entrypoint", "python sft_finetune.py extra", "extra"),
    ("description", ["a"], None),
    ("labels", "a, b", None),
    ("labels", [1, 2], None),
    ("labels", {"a": "b"}, None),
    ("workspace", 3, None),
    ("project", ["x"], None),
    ("max_restarts", -1, None),
    ("max_restarts", "two", None),
    ("max_restarts", 1.5, None),
    ("max_restarts", True, None),
    ("debug", "true", None),
    ("perform_initial_validation", "no", None),
    ("records_per_epoch", "x", None),
    ("scheduling_unit", 0, None),
    ("preemption_timeout", "1h", None),
    ("checkpoint_policy", "bets", None),
    ("min_validation_period", {"epoch": 1}, "min_validation_period"),
    ("min_checkpoint_period", 3, None),
    ("data", ["x"], None),
    ("reproducibility", {"experiment_seed": -1}, "experiment_seed"),
    ("reproducibility", {"seed": 1}, "seed"),
    ("retention_policy", {"log_retention_days": "x"}, "log_retention_days"),
    ("optimizations", 3, "optimizations"),
    ("profiling", True, None),
    ("profiling", {"enabled": "yes"}, "enabled"),
    ("profiling", {"enable": True}, "enable"),
    ("profiling", {"enabled": True, "begin_on_batch": 50, "end_after_batch": 3}, "end_after_batch"),
    ("resources", [1], None),
    ("resources", "2", None),
    ("resources.slots_per_trial", "2", None),
    ("resources.slots_per_trial", -1, None),
    ("resources.slots_per_trial", 1.5, None),
    ("resources.slots_per_trial", True, None),
    ("resources.slots_per_trail", 2, None),
    ("resources.max_slots", "8", None),
    ("resources.priority", 200, None),
    ("resources.priority", 0, None),
    ("resources.shm_size", "4 gallons", None),
    ("resources.resource_pool", 1, None),
    ("resources.weight", "heavy", None),
    ("resources.weight", -3, None),
    ("resources.max_slots", -4, None),
    ("resources.shm_size", -1, None),
    ("environment", "pytorch", None),
    ("environment.image", 3, None),
    ("environment.image", "", None),
    ("environment.image", {"gpus": "x"}, "image"),
    ("environment.imge", "x", None),
    ("environment.environment_variables", "A=b", None),
    ("environment.environment_variables", [1], None),
    ("environment.environment_variables", {"A": "b"}, None),
    ("environment.force_pull_image", "yes", None),
    ("bind_mounts", {"host_path": "/tmp", "container_path": "/x"}, None),
    ("bind_mounts", [{"host_path": "/tmp"}], "container_path"),
    ("bind_mounts", [{"host_path": "tmp", "container_path": "/x"}], "host_path"),
    ("bind_mounts", [{"host_path": "/tmp", "container_pth": "/x"}], "container_pth"),
    ("bind_mounts", [{"host_path": "/tmp", "container_path": "/x", "read_only": "yes"}], "read_only"),
    ("log_policies", {"pattern": "x"}, None),
    ("log_policies", [{"pattern": 3, "action": {"type": "cancel_retries"}}], "pattern"),
    ("log_policies", [{"patern": "x", "action": {"type": "cancel_retries"}}], "patern"),
    ("log_policies", [{"pattern": "x", "action": {"type": "cancel_retry"}}], "action"),
    ("log_policies", [{"pattern": "x", "action": {"typ": "cancel_retries"}}], "action"),
    ("checkpoint_storage", "/tmp", None),
    ("checkpoint_storage.save_trial_best", -1, None),
    ("checkpoint_storage.save_trial_best", "one", None),
    ("checkpoint_storage.save_trial_bst", 1, None),
    ("checkpoint_storage.save_trial_latest", 0.5, None),
    ("checkpoint_storage", {"type": "shared_fs", "host_path": 3}, "host_path"),
    ("checkpoint_storage", {"type": "share_fs"}, "type"),
    ("checkpoint_storage", {"type": "shared_fs"}, "host_path"),
    ("checkpoint_storage", {"type": "shared_fs", "host_path": "ckpts"}, "host_path"),
    ("checkpoint_storage", {"type": "shared_fs", "host_path": "/c", "storage_path": "../../etc"}, "storage_path"),
    ("checkpoint_storage", {"type": "s3"}, "bucket"),
    ("checkpoint_storage", {"type": "s3", "bucket": "b", "prefix": "../x"}, "prefix"),
    ("checkpoint_storage", {"type": "azure"}, "container"),
    ("searcher", [{"name": "single"}], None),
    ("searcher", "single", None),
    ("searcher.name", "gird", None),
    ("searcher.name", 3, None),
    ("searcher.name", ["grid"], None),
    ("searcher.name", {"a": 1}, None),
    ("searcher.name", "adaptive_asha", "max_trials"),
    ("searcher.nme", "grid", None),
    ("searcher.metric", DROP, None),
    ("searcher.metric", 3, None),
    ("searcher.metric", ["eval_loss"], None),
    ("searcher.metric", {"a": 1}, None),
    ("searcher.metric", "loss", None),
    ("searcher.metric", "", None),
    ("searcher.smaller_is_better", "yes", None),
    ("searcher.smaller_is_better", "false", None),
    ("searcher.smaller_is_better", 1, None),
    ("searcher.smaller_is_beter", False, None),
    ("searcher.max_trials", 3, None),  # not a key of a single search
    ("searcher.source_trial_id", "x", None),
]

CATEGORICAL = {"type": "categorical"}
# Spaces for dpo_beta in a grid, and what the line must say.
SPACES: list[tuple[Any, str]] = [
    ({"type": "gird", "vals": [0.1]}, "dpo_beta.type"),
    ({"type": None, "vals": [0.1]}, "dpo_beta.type"),
    ({"type": 3}, "dpo_beta.type"),
    ({"type": ["categorical"], "vals": [0.1]}, "dpo_beta.type"),
    ({"type": {"type": "categorical"}}, "dpo_beta.type"),
    (CATEGORICAL, "dpo_beta.vals"),
    (CATEGORICAL | {"vals": []}, "dpo_beta.vals"),
    (CATEGORICAL | {"vals": 0.1}, "dpo_beta.vals"),
    (CATEGORICAL | {"vals": "0.1, 0.2"}, "dpo_beta.vals"),
    (CATEGORICAL | {"vals": {"a": 0.1}}, "dpo_beta.vals"),
    (CATEGORICAL | {"vals": None}, "dpo_beta.vals"),
    (CATEGORICAL | {"values": [0.1]}, "dpo_beta.values"),
    (CATEGORICAL | {"vals": [0.1], "count": 2}, "dpo_beta.count"),
    (CATEGORICAL | {"vals": [0.1, "a"]}, "dpo_beta"),
    (CATEGORICAL | {"vals": [0.1, -1]}, "dpo_beta"),
    (CATEGORICAL | {"vals": [0.1, None, []]}, "dpo_beta"),
    (CATEGORICAL | {"vals": [0.1, {"type": "const", "val": 0.2}]}, "dpo_beta"),
    (CATEGORICAL | {"vals": [0.1, INF]}, "dpo_beta"),
    (CATEGORICAL | {"vals": [0.1, NAN]}, "dpo_beta"),
    (CATEGORICAL | {"vals": [n / 1e4 for n in range(1, 5001)]}, "trials"),
    ({"type": "const"}, "dpo_beta.val"),
    ({"type": "const", "vals": [0.1]}, "dpo_beta.vals"),
    ({"type": "const", "val": "x"}, "dpo_beta"),
    ({"type": "int", "minval": "a", "maxval": 3, "count": 2}, "dpo_beta.minval"),
    ({"type": "int", "minval": 1.5, "maxval": 3, "count": 2}, "dpo_beta.minval"),
    ({"type": "int", "minval": 5, "maxval": 1, "count": 2}, "dpo_beta"),
    ({"type": "int", "minval": True, "maxval": 3, "count": 2}, "dpo_beta.minval"),
    ({"type": "int", "minval": 1, "count": 2}, "dpo_beta.maxval"),
    ({"type": "int", "minval": 1, "maxval": 10**12, "count": 10**9}, "dpo_beta"),
    ({"type": "int", "minval": 1, "maxval": 10**400, "count": 3}, "dpo_beta"),
    ({"type": "double", "minval": 0.1, "maxval": 1, "count": 0}, "dpo_beta.count"),
    ({"type": "double", "minval": 0.1, "maxval": 1, "count": -3}, "dpo_beta.count"),
    ({"type": "double", "minval": 0.1, "maxval": 1, "count": 1.5}, "dpo_beta.count"),
    ({"type": "double", "minval": 0.1, "maxval": 1, "count": "3"}, "dpo_beta.count"),
    ({"type": "double", "minval": 0.1, "maxval": 1, "count": INF}, "dpo_beta.count"),
    ({"type": "double", "minval": 0.1, "maxval": 1}, "dpo_beta"),
    ({"type": "double", "minval": 1, "maxval": 0.1, "count": 3}, "dpo_beta"),
    ({"type": "double", "minval": -INF, "maxval": 1, "count": 3}, "dpo_beta"),
    ({"type": "double", "minval": 0.1, "maxval": INF, "count": 3}, "dpo_beta"),
    ({"type": "double", "minval": NAN, "maxval": 1, "count": 3}, "dpo_beta"),
    ({"type": "double", "minval": -1e308, "maxval": 1.7e308, "count": 3}, "dpo_beta"),
    ({"type": "double", "minval": 0.1, "maxval": 1, "count": 10**12}, "dpo_beta"),
    ({"type": "double", "minval": 0.1, "maxval": 1, "count": 3, "base": 10}, "dpo_beta.base"),
    ({"type": "double", "min": 0.1, "max": 1, "count": 3}, "dpo_beta"),
    ({"type": "log", "minval": -3, "maxval": -1, "count": 3}, "dpo_beta.base"),
    ({"type": "log", "minval": -3, "maxval": -1, "count": 4, "base": 0}, "dpo_beta"),
    ({"type": "log", "minval": -3, "maxval": -1, "count": 4, "base": -10}, "dpo_beta"),
    ({"type": "log", "minval": -3, "maxval": -1, "count": 4, "base": 1}, "dpo_beta"),
    ({"type": "log", "minval": -3, "maxval": -1, "count": 3, "base": "e"}, "dpo_beta.base"),
    ({"type": "log", "minval": -3, "maxval": 400, "count": 3, "base": 10}, "dpo_beta"),
    ({"type": "log", "minval": -3, "maxval": -1, "count": 3, "base": INF}, "dpo_beta"),
    ({"type": "log", "minval": -3, "maxval": -1, "count": 3, "base": NAN}, "dpo_beta"),
    ({"type": "log", "minval": -400, "maxval": -390, "count": 3, "base": 10}, "dpo_beta"),  # underflows to 0
]
GRID = {"searcher.name": "grid", "searcher.metric": "eval_rewards/accuracies"}
HUNDRED = CATEGORICAL | {"vals": [n / 1000 for n in range(1, 101)]}
GRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "a million trials": (
        {"hyperparameters.dpo_beta": HUNDRED, "hyperparameters.max_length": {"type": "int", "minval": 1, "maxval": 10000, "count": 10000}},
        "trials",
    ),
    "a trillion trials": (
        {f"hyperparameters.training_args.{name}": HUNDRED for name in ("learning_rate", "weight_decay", "warmup_steps", "adam_beta1", "adam_beta2", "label_smoothing")},
        "trials",
    ),
    "a space in a single search": ({"hyperparameters.dpo_beta": CATEGORICAL | {"vals": [1, 2]}, "searcher.name": "single"}, "dpo_beta"),
    "a space for no key": ({"hyperparameters.dpo_bta": CATEGORICAL | {"vals": [0.1, 0.2]}}, "dpo_bta"),
    "one bad rate": ({"hyperparameters.training_args.learning_rate": CATEGORICAL | {"vals": [1e-5, -1.0]}}, "learning_rate"),
    "an infinite rate": ({"hyperparameters.training_args.learning_rate": CATEGORICAL | {"vals": [1e-5, INF]}}, "learning_rate"),
    "rates beyond floats": ({"hyperparameters.training_args.learning_rate": {"type": "log", "minval": 300, "maxval": 309, "base": 10, "count": 2}}, "learning_rate"),
    "one bad loss": ({"hyperparameters.dpo_loss": CATEGORICAL | {"vals": ["sigmoid", "sigmoyd"]}}, "dpo_loss"),
    "one missing data set": ({"hyperparameters.datasets": CATEGORICAL | {"vals": [["{tiny}/questions"], ["./nowhere"]]}}, "nowhere"),
    "one missing model": ({"hyperparameters.model_name": CATEGORICAL | {"vals": ["{tiny}/base", "./nowhere"]}}, "nowhere"),
    "all arguments as a space": ({"hyperparameters.training_args": CATEGORICAL | {"vals": [1, 2]}}, "training_args"),
    "hyperparameters as a space": ({"hyperparameters.type": "categorical", "hyperparameters.vals": [1]}, "hyperparameters"),
    "max_concurrent_trials": ({"searcher.max_concurrent_trials": "x", "hyperparameters.dpo_beta": CATEGORICAL | {"vals": [1, 2]}}, "max_concurrent_trials"),
}  # fmt: skip

NO_SUBSETS = "hyperparameters.dataset_subsets"
# Hyperparameters of SFT and of DPO: key, wrong value, and what the line must say if it is not the key's last part.
SFT: list[tuple[Any, ...]] = [
    *(("model_name", value) for value in (DROP, None, 3, ["a"], {"a": 1}, "")),
    *(("dataset", value) for value in (DROP, None, 3, ["a"], "", {"name": "x"})),
    *(("dataset_subsets", value) for value in (None, [], {}, "kitchen", [3], [{}], 7)),
    ("dataset_subsets", [{"subset": "kitchen", "ratio": 0}], "ratio"),
    *(("dataset_subsets", [{"subset": "kitchen", "ratio": value}], "ratio") for value in (1.1, -0.5, NAN, INF, "half", True, [1])),
    *(("dataset_subsets", [{"subset": "kitchen", "number_of_samples": n}], "number_of_samples") for n in (0, -3, 1.5, "10", 10**12, True)),
    ("dataset_subsets", [{"subset": "kitchen", "ratio": 0.5, "number_of_samples": 3}], "ratio"),
    ("dataset_subsets", [{"subset": "kitchen"}], "ratio"),
    ("dataset_subsets", [{"subset": 3, "ratio": 1.0}], "subset"),
    ("dataset_subsets", [{"subset": "kitchn", "ratio": 1.0}], "kitchn"),
    ("dataset_subsets", [{"subset": "../kitchen", "ratio": 1.0}], "../kitchen"),
    ("dataset_subsets", [{"subset": "a\0b", "ratio": 1.0}], "subset"),
    ("dataset_subsets", [{"subset": "k" * 300, "ratio": 1.0}], "subset"),
    ("dataset_subsets", [{"subst": "kitchen", "ratio": 1.0}], "subst"),
    ("dataset_subsets", [{"subset": "kitchen", "ratio": 0.5}, {"subset": "kitchen", "ratio": 0.5}], "kitchen"),
    *(("max_seq_length", value) for value in (0, -1, 1.5, "256", INF, True, [256])),
    *(("data_collator", value) for value in ([], "x", {"on_completion_only": True})),
    ("data_collator", {"on_completions_only": "yes"}, "on_completions_only"),
    ("data_collator", {"response_template": "### Answer:"}, "response_template"),
    *(("chat_tokens", value) for value in (True, [], {"add_tokens": True})),
    ("chat_tokens", {"add_chat_tokens": "true"}, "add_chat_tokens"),
    *(("chat_tokens", {"add_chat_tokens": True, "special_tokens": value}, "special_tokens") for value in ("x", [1], [""], None, [[]])),
    *(("split", value) for value in (3, "trian", "train[:0]", "train[abc]", "", "train[200:300%]")),
    *(("columns", value) for value in ("x", ["prompt"], {"prmpt": "prompt"}, {"prompt": "nope"}, {"prompt": 3}, {"prompt": "text", "text": "text"})),
    *(("streaming", value) for value in ("yes", True, 1)),
    *((key, value) for key, value in (("model", "x"), ("learning_rate", 1e-4), ("max_length", 256), ("model_ckpt", "x"), ("", 1))),
    *(("training_args", value) for value in ([], "x", 3)),
]  # fmt: skip
DPO: list[tuple[Any, ...]] = [
    *(("datasets", value) for value in (DROP, None, [], {}, "x", [3], [{}], [[]])),
    ("datasets", [{"name": 3}], "name"),
    ("datasets", [{"name": "{tiny}/questions", "ratio": 2}], "ratio"),
    ("datasets", [{"name": "{tiny}/questions", "rato": 0.5}], "rato"),
    ("datasets", [{"name": "{tiny}/questions", "ratio": 0.5, "number_of_samples": 5}], "questions"),
    ("datasets", [{"name": "{tiny}/questions", "number_of_samples": 99999}], "questions"),
    ("datasets", [{"name": "{tiny}/questions", "number_of_samples": 1}], "questions"),
    ("datasets", [{"name": "{tiny}/questions", "split": "test"}], "test"),
    ("datasets", [{"name": "{tiny}/questions", "columns": {"prompt": "ask"}}], "columns"),
    ("datasets", ["{tiny}/questions", "{tiny}/questions"], "questions"),
    ("datasets", ["{tiny}/questions", {"name": "{tiny}/questions", "ratio": 0.5}], "questions"),
    ("datasets", ["{tiny}/questions", ""], "data"),
    ("datasets", ["./nowhere"], "nowhere"),
    ("datasets", ["no/such/set"], "no/such/set"),
    ("datasets", ["a\0b"], "data"),
    ("datasets", ["d" * 5000], "data"),
    ("model_name", DROP, "model_name"),
    *(("model_name", value) for value in ("./nowhere", "/", "{tiny}", "{tiny}/questions", "a\0b", "m" * 5000, "{tiny}/base/config.json")),
    *(("model_ckpt", value) for value in (3, "latest", "../../x", "6b6fbaa7-faa9-4449-867b-2939a147a335", "6b6fbaa7-faa9-4449-867b-2939a147a335\n", ["x"], "6b6fbaa7/faa9-4449-867b-2939a147a335", DROP, None, "", "exp:", "exp:x", "model:", "model:a/b", "model:a:0", "model:a:" + "9" * 5000, "ckpt:x")),
    *(("dpo_beta", value) for value in (0, -1, NAN, INF, "a", True, [0.1])),
    *(("dpo_loss", value) for value in ("sigmoyd", [], ["sigmoid", "x"], 3, "kto_pair", "cdpo", "", {"a": 1}, "exo_pair")),
    *(("max_length", value) for value in (0, -5, "x", 1.5, NAN)),
    *(("max_prompt_length", value) for value in (0, -1, "x")),
    *(("max_target_length", value) for value in (0, -1, 1e400)),
    *(("precompute_ref_log_probs", value) for value in ("yes", 1, [True])),
    *((key, value) for key, value in (("beta", 0.1), ("loss_type", "ipo"), ("dataset", "x"), ("max_seq_length", 256))),
]  # fmt: skip


def _id(*parts: Any) -> str:
    text = " ".join("(absent)" if part is DROP else part if isinstance(part, str) else str(part) for part in parts)
    return "".join(c if c.isascii() and c.isprintable() and c != "/" else "_" for c in text)[:70]


def unique(cases: list[Case]) -> list[Case]:
    """Cases whose ids differ, by a number where they would not."""
    seen: dict[str, int] = {}
    for case in cases:
        seen[case.id] = seen.get(case.id, 0) + 1
        if seen[case.id] > 1:
            case.id += f" #{seen[case.id]}"
    return cases


def _names() -> list[Case]:
    cases = [Case(f"name/{_id(json.dumps(name))}", "name", change={"name": name}, expect="inside") for name in NAMES]
    store = {"LOCAL_CHECKPOINT_STORAGE": "{work}/local_runs/checkpoints"}
    cases.append(Case("name/of the store", "checkpoints", change={"name": "checkpoints"}, expect="inside", env=store))
    return cases + [Case(f"name/{_id(name)}", "name", change={"name": name}) for name in WRONG_NAMES]


def _of_key(area: str, config: str, key: str, value: Any, says: str | None = None) -> Case:
    change = {f"hyperparameters.{key}": value} if area in ("sft", "dpo") else {key: value}
    # A data set has to be looked at before it is known to be wrong.
    strict = key not in ("dataset", "datasets", "dataset_subsets", "split", "columns", "model_name")
    says = key.split(".")[-1] if says is None else says
    return Case(f"{area}/{_id(key, value)}", says, config=config, change=change, strict=strict)


CASES = unique(
    [
        *(Case(f"yaml/{name}", ("config.yaml",) if says == "" else says, text=text) for name, (text, says) in TEXTS.items()),
        *_names(),
        *(_of_key("key", "sft", key, value, says) for key, value, says in KEYS),
        *(
            Case(f"grid/{_id(json.dumps(space))}", says, config="dpo", change={**GRID, "hyperparameters.dpo_beta": space})
            for space, says in SPACES
        ),
        *(
            Case(f"grid/{name}", says, config="dpo", change={**GRID, **change}, strict="missing" not in name)
            for name, (change, says) in GRIDS.items()
        ),
        *(_of_key("sft", "sft", *case) for case in SFT),
        *(_of_key("dpo", "dpo", *case) for case in DPO),
    ]
)  # fmt: skip
