"""LoRA: mistakes in the `lora` block, and folders of adapters that are broken."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import input_cases
import numpy as np
from config_cases import CATEGORICAL, GRID, _id, unique
from harness import Case
from safetensors.numpy import load_file, save_file

INF, NAN = math.inf, math.nan
# Keys of the block and their wrong values; the line must say the key.
VALUES: dict[str, tuple[Any, ...]] = {
    "r": (0, -1, 1.5, "8", True, [8], 2**31, 10**9, NAN),
    "rank": (8,),
    "lora_alpha": (0, -1, "16", INF, NAN, True, [16], 1e300),
    "lora_dropout": (1, -0.1, 1.5, "x", NAN, True),
    "target_modules": (3, [], "", [3], [""], [["q_proj"]], "(", {"q_proj": 1}, True),
    "exclude_modules": (3, [], "", "*", [None]),
    "layers_to_transform": (-1, [-1], 1.5, "0", [], [0.5], True, [0]),
    "layers_pattern": (3, "", "(", "layers"),
    "rank_pattern": ({"q_proj": 0}, {"q_proj": "x"}, {"(": 4}, {"": 4}, [4], 4),
    "alpha_pattern": ({"q_proj": 0}, {"q_proj": INF}, {"[": 4}, "x"),
    "use_rslora": ("yes", 1, [True]),
    "use_dora": ("yes", 1),
    "init_lora_weights": (False, "pissa", "olora", "eva", "loftq", "gausian", 3, []),
    "bias": ("all", "lora_only", 3),
    "fan_in_fan_out": (True, "x"),
    "modules_to_save": (["lm_head"], "lm_head", [3]),
    "trainable_token_indices": ([1], {"embed_tokens": [1]}),
    "task_type": ("SEQ_CLS", 3),
    "peft_type": ("IA3",),
    "inference_mode": (True,),
    "base_model_name_or_path": ("google/gemma-2b",),
    "layer_replication": ([[0, 2]],),
    "loftq_config": ({"loftq_bits": 4},),
    "eva_config": ({},),
    "target_parameters": (["mlp.experts"],),
    "alora_invocation_tokens": ([1],),
    "quantization_config": ({},),
    "learning_rate": (1e-4,),
    "": (1,),
}
# Others: what is changed, and what the line must say.
TOGETHER: dict[str, tuple[str, dict[str, Any], str]] = {
    **{f"lora is {value!r}": ("sft", {"lora": value}, "lora") for value in (16, True, "r=16", [16], [[]], "")},
    "4 bits of nothing": ("sft", {"load_in_4bit": True}, "load_in_4bit"),
    "4 bits on a CPU": ("sft", {"lora": {}, "load_in_4bit": True}, "GPU"),
    "4 bits on a CPU, DPO": ("dpo", {"lora": {"r": 8}, "load_in_4bit": True}, "GPU"),
    **{f"4 bits: {value}": ("dpo", {"lora": {}, "load_in_4bit": value}, "load_in_4bit") for value in (1, "yes", 4)},
    "8 bits": ("sft", {"lora": {}, "load_in_8bit": True}, "load_in_8bit"),
    "4 bits of the model's own": (
        "sft",
        {"lora": {}, "training_args.model_init_kwargs": {"load_in_4bit": True}},
        "load_in_4bit",
    ),
    "DeepSpeed": ("sft", {"lora": {}, "training_args.deepspeed": {"train_batch_size": 1}}, "deepspeed"),
    "a moving reference": (
        "dpo",
        {"lora": {}, "training_args.sync_ref_model": True, "precompute_ref_log_probs": None},
        "sync_ref_model",
    ),
    "layers without a pattern": ("sft", {"lora": {"layers_pattern": "layers"}}, "layers_to_transform"),
    "peft_config": ("sft", {"peft_config": {"r": 8}}, "peft_config"),
    "use_peft": ("sft", {"training_args.use_peft": True}, "use_peft"),
}
# Names that no layer of the model has, which is seen once it is loaded without its weights.
LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelled layer": ({"target_modules": ["q_prj"]}, "q_proj"),
    "one of two": ({"target_modules": ["q_proj", "attn"]}, "attn"),
    "a name as a text": ({"target_modules": "q_proj"}, "[q_proj]"),
    "the output layer": ({"target_modules": ["lm_head"]}, "output layer"),
    "the embeddings": ({"target_modules": ["embed_tokens"]}, "embeddings"),
    "norms": ({"target_modules": ["input_layernorm"]}, "input_layernorm"),
    "everything": ({"target_modules": ".*"}, "target_modules"),
    "nothing left": ({"exclude_modules": ".*"}, "lora"),
    "excluded nothing": ({"exclude_modules": ["qproj"]}, "qproj"),
    "a rank for nothing": ({"rank_pattern": {"qproj": 4}}, "qproj"),
    "a layer beyond": ({"target_modules": ["q_proj"], "layers_to_transform": [99]}, "99"),
}


def _adapter(damage: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        base = input_cases.TINY[0] / "base"
        config = json.loads((base / "config.json").read_text())
        path.mkdir()
        for file in base.glob("tokenizer*"):
            shutil.copy(file, path)
        values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
        (path / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": str(base)}))
        width, out = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
        weights = {}
        for layer in range(config["num_hidden_layers"]):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            weights[f"{name}.lora_A.weight"] = np.full((2, width), 0.01, np.float32)
            weights[f"{name}.lora_B.weight"] = np.full((out, 2), 0.01, np.float32)
        save_file(weights, path / "adapter_model.safetensors")
        damage(path)

    return make


def _config(**values: Any) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def _weights(make: Callable[[str, np.ndarray], np.ndarray | None]) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        weights = {name: make(name, weight) for name, weight in load_file(file).items()}
        save_file({name: weight for name, weight in weights.items() if weight is not None}, file)

    return change


def _write(name: str, content: str | bytes) -> Callable[[Path], Any]:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: (path / name).write_bytes(data)


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda path: (path / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json"),
    "config cut short": (_write("adapter_config.json", '{"r": 2'), "adapter_config.json"),
    "config nested deeply": (_write("adapter_config.json", "[" * 10**5), "adapter_config.json"),
    "config that is a list": (_write("adapter_config.json", "[]"), "adapter_config.json"),
    "config of bytes": (_write("adapter_config.json", bytes(range(256))), "adapter_config.json"),
    "weights of zeros": (_write("adapter_model.safetensors", bytes(999)), "adapter_model.safetensors"),
    "weights of nothing": (_write("adapter_model.safetensors", b""), "adapter_model.safetensors"),
    "no base": (_config(base_model_name_or_path=None), "base_model_name_or_path"),
    "base of another type": (_config(base_model_name_or_path=["x"]), "base_model_name_or_path"),
    "base with a NUL": (_config(base_model_name_or_path="a\0b"), "model"),
    "base with a long name": (_config(base_model_name_or_path="m" * 5000), "model"),
    "base gone": (_config(base_model_name_or_path="/nowhere/gemma"), "/nowhere/gemma"),
    "base not cached": (_config(base_model_name_or_path="no/such", revision="abc"), "no/such"),
    "base elsewhere": (_config(base_model_name_or_path="6b6fbaa7-faa9-4449-867b-2939a147a335"), "6b6fbaa7"),
    "base that is a file": (_config(base_model_name_or_path="/etc/passwd"), "/etc/passwd"),
    "base that is a device": (_config(base_model_name_or_path="/dev/zero"), "/dev/zero"),
    "revision of another type": (_config(base_model_name_or_path="no/such", revision=[3]), "no/such"),
    "IA3": (_config(peft_type="IA3"), "IA3"),
    "no type": (_config(peft_type=None), "adapter_config.json"),
    "a classifier": (_config(task_type="SEQ_CLS"), "SEQ_CLS"),
    "rank of text": (_config(r="x"), "model"),
    "rank of 0": (_config(r=0), "model"),
    "another rank": (_config(r=3), "shapes"),
    "another layer": (_config(target_modules=["nothing"]), "nothing"),
    "more layers": (_config(target_modules=["q_proj", "k_proj"]), "of another model"),
    "layers twice": (_config(layer_replication=[[0, 2]]), "layer_replication"),
    "tokens of text": (_config(trainable_token_indices="x"), "model"),
    "tokens of nowhere": (_config(trainable_token_indices=[10**12]), "tokens"),
    "tokens below 0": (_config(trainable_token_indices=[-5]), "tokens"),
    "tokens without rows": (_config(trainable_token_indices=[5]), "tokens"),
    "NaN": (_weights(lambda name, weight: weight * NAN), "NaN"),
    "other shapes": (_weights(lambda name, weight: weight[:, :1].copy()), "shapes"),
    "half of the layers": (_weights(lambda name, weight: weight if ".0." in name else None), "of another model"),
    "stands on nothing": (lambda path: (path / "stands_on" / "0").mkdir(parents=True), "stands_on"),
}  # fmt: skip


def _block(key: str, value: Any) -> Case:
    block = {key: value, "target_modules": None} if key == "layers_to_transform" else {key: value}
    return Case(f"lora/{_id(key, value)}", key, change={"hyperparameters.lora": block})


def _together(name: str, config: str, values: dict[str, Any], says: str) -> Case:
    change = {f"hyperparameters.{key}": value for key, value in values.items()}
    return Case(f"lora/{name}", says, config=config, change=change)


def _folder(name: str, damage: Callable[[Path], Any], says: str, command: str) -> Case:
    files = {"model": _adapter(damage)}
    if command == "inference":
        words = ("--model", "m={work}/model", *input_cases.COMPARE)
        return Case(f"adapter/{name}, compared", says, command, words=words, files=files, strict=False)
    change = {"hyperparameters.model_name": "{work}/model", "hyperparameters.lora": {"r": 2}}
    return Case(f"adapter/{name}", says, command, change=change, files=files, strict=False)


DRY = ("{work}/config.yaml", "{repo}", "--dry-run")
CASES = unique(
    [
        *(_block(key, value) for key, values in VALUES.items() for value in values),
        *(_together(name, *case) for name, case in TOGETHER.items()),
        Case("lora/a grid with a bad rank", "lora.r", config="dpo", change=GRID | {"hyperparameters.lora": {"r": CATEGORICAL | {"vals": [4, 0]}}}),
        Case("lora/a grid of nothing", "vals", config="dpo", change=GRID | {"hyperparameters.lora": {"r": CATEGORICAL}}),
        *(Case(f"lora/{name}", says, "sft_finetune", change={"hyperparameters.lora": block}, strict=False) for name, (block, says) in LAYERS.items()),
        *(Case(f"lora/{name}, dry run", says, change={"hyperparameters.lora": block}, strict=False, words=DRY) for name, (block, says) in LAYERS.items()),
        *(_folder(name, damage, says, command) for name, (damage, says) in FOLDERS.items() for command in ("inference", "sft_finetune")),
    ]
)  # fmt: skip
