"""Data files of each format, model folders, tokenizers and chat templates with a mistake."""

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Case

NO_GZIP_TIME = gzip.compress(b'{"prompt": "q", "completion": "a"}\n' * 20, mtime=0)
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
# A valid row of each format of SFT data, and of preferences.
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "completion": {"prompt": "q", "completion": "a"},
    "text": {"prompt": "q", "text": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "turns": {"prompt": [USER], "completion": [ANSWER]},
    "pair": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "orca": {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
    "talks": {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
}  # fmt: skip
PREFERENCES = ("pair", "orca", "talks", "sharegpt")
# What the third row has in place of a valid value (... : the column is missing in all rows), and what the line says.
WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "messages": [
        ({"messages": None}, "line 3"),
        ({"messages": []}, "line 3"),
        ({"messages": [USER]}, "line 3"),
        ({"messages": [ANSWER]}, "line 3"),
        ({"messages": [USER, USER, ANSWER]}, "line 3"),
        ({"messages": [USER, ANSWER, ANSWER]}, "line 3"),
        ({"messages": [{"role": "customer", "content": "q"}, ANSWER]}, "line 3"),
        ({"messages": [{"role": "user"}, ANSWER]}, "line 3"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "line 3"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "line 3"),
        ({"messages": [USER, ANSWER, {"role": "system", "content": "x"}]}, "line 3"),
        ({"messages": [USER, None]}, "line 3"),
        ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "data.jsonl"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "data.jsonl"),
        ({"messages": "q"}, "data.jsonl"),
        ({"messages": {"role": "user", "content": "q"}}, "data.jsonl"),
    ],
    "conversations": [
        ({"conversations": [{"from": "human", "value": "q"}]}, "line 3"),
        ({"conversations": [{"from": "bot", "value": "q"}, {"from": "gpt", "value": "a"}]}, "line 3"),
        ({"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "a"}]}, "line 3"),
        ({"conversations": ...}, "data.jsonl"),
    ],
    "completion": [
        ({"completion": None}, "line 3"),
        ({"prompt": None}, "line 3"),
        ({"completion": 3}, "data.jsonl"),
        ({"completion": ["a"]}, "data.jsonl"),
        ({"completion": {"a": "b"}}, "data.jsonl"),
        ({"completion": "\udcff"}, "data.jsonl"),
        ({"prompt": "q" * 5 + "\ud83d"}, "data.jsonl"),
        ({"completion": ...}, "columns"),
        ({"prompt": ...}, "columns"),
        ({"system": 3}, "line 3"),
    ],
    "text": [({"text": None}, "line 3"), ({"text": ...}, "columns"), ({"prompt": True}, "data.jsonl")],
    "alpaca": [
        ({"output": None}, "line 3"),
        ({"instruction": None}, "line 3"),
        ({"input": 3}, "data.jsonl"),
        ({"output": ...}, "columns"),
    ],
    "turns": [
        ({"prompt": []}, "line 3"),
        ({"completion": []}, "line 3"),
        ({"prompt": [ANSWER]}, "line 3"),
        ({"completion": [USER]}, "line 3"),
    ],
    "pair": [
        ({"chosen": None}, "line 3"),
        ({"rejected": None}, "line 3"),
        ({"prompt": None}, "line 3"),
        ({"chosen": ...}, "chosen"),
        ({"rejected": ...}, "rejected"),
        ({"prompt": ...}, "prompt"),
        ({"chosen": 3}, "data.jsonl"),
        ({"rejected": "\ud800"}, "data.jsonl"),
        ({"chosen": [USER, ANSWER]}, "data.jsonl"),
    ],
    "orca": [({"question": None}, "line 3"), ({"system": 3}, "data.jsonl"), ({"question": ...}, "missing")],
    "talks": [
        ({"chosen": []}, "line 3"),
        ({"rejected": [USER]}, "line 3"),
        ({"rejected": [{"role": "user", "content": "other"}, ANSWER]}, "line 3"),
        ({"chosen": [ANSWER], "rejected": [ANSWER]}, "prompt"),
        ({"chosen": [USER, USER, ANSWER], "rejected": [USER, USER, ANSWER]}, "line 3"),
        ({"chosen": [USER, {"role": "assistant"}]}, "line 3"),
        ({"chosen": None}, "line 3"),
    ],
    "sharegpt": [
        ({"conversations": []}, "line 3"),
        ({"conversations": [{"from": "gpt", "value": "q"}]}, "line 3"),
        ({"chosen": {"from": "human", "value": "a"}}, "line 3"),
        ({"chosen": {"from": "gpt", "value": None}}, "line 3"),
    ],
}
LINE = json.dumps(ROWS["completion"])
# The file's name, its content, and what the line says.
FILES: dict[str, tuple[str, Any, str]] = {
    "empty": ("data.jsonl", "", "data.jsonl"),
    "blank lines": ("data.jsonl", "\n\n \n", "data.jsonl"),
    "one row": ("data.jsonl", [LINE], "data.jsonl"),
    "cut short": ("data.jsonl", [*[LINE] * 9, LINE[:15]], "line 10"),
    "a line of text": ("data.jsonl", [LINE, "hello", LINE, LINE], "line 2"),
    "a list": ("data.jsonl", [LINE, "[1, 2]", LINE], "line 2"),
    "a number": ("data.jsonl", [LINE, "3", LINE], "line 2"),
    "quotes of Python": ("data.jsonl", [LINE, "{'prompt': 'q', 'completion': 'a'}"], "line 2"),
    "comma at the end": ("data.jsonl", [LINE + ",", LINE + ",", LINE], "line 1"),
    "a deep row": ("data.jsonl", [LINE, '{"prompt": ' + "[" * 5000 + "]" * 5000 + ', "completion": "a"}'], "data.jsonl"),
    "NUL bytes": ("data.jsonl", b"\0" * 4096, "data.jsonl"),
    "zeros at the end": ("data.jsonl", (LINE + "\n").encode() * 5 + b"\0" * 512, "data.jsonl"),
    "PNG": ("data.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, "data.jsonl"),
    "UTF-16": ("data.jsonl", ((LINE + "\n") * 9).encode("utf-16"), "data.jsonl"),
    "Latin-1": ("data.jsonl", '{"prompt": "caf\xe9", "completion": "a"}\n'.encode("latin-1") * 9, "data.jsonl"),
    "gzip": ("data.jsonl", NO_GZIP_TIME[:-20], "data.jsonl"),
    "text": ("data.txt", "q\ta\n" * 9, "data.txt"),
    "no suffix": ("data", [LINE] * 9, "data"),
    "a pickle": ("data.pkl", b"\x80\x04\x95.", "data.pkl"),
    "JSON of numbers": ("data.json", "[1, 2, 3]", "data.json"),
    "JSON cut short": ("data.json", json.dumps([ROWS["completion"]] * 9)[:-20], "data.json"),
    "JSON, a text": ("data.json", '"hello"', "data.json"),
    "JSON, empty list": ("data.json", "[]", "data.json"),
    "JSON, empty mapping": ("data.json", "{}", "data.json"),
    "JSON, null": ("data.json", "null", "data.json"),
    "CSV, empty": ("data.csv", "", "data.csv"),
    "CSV, header only": ("data.csv", "prompt,completion\n", "data.csv"),
    "CSV, other columns": ("data.csv", "a,b\n1,2\n3,4\n5,6\n", "data.csv"),
    "CSV, too many cells": ("data.csv", "prompt,completion\nq,a\nq,a,x,y\nq,a\n", "data.csv"),
    "CSV, a cell is missing": ("data.csv", "prompt,completion\nq,a\nq\nq,a\n", "data.csv"),
    "CSV, open quote": ("data.csv", 'prompt,completion\nq,a\n"q,a\nq,a\nq,a\n', "data.csv"),
    "CSV, semicolons": ("data.csv", "prompt;completion\nq;a\nq;a\nq;a\n", "data.csv"),
    "CSV, Latin-1": ("data.csv", b"prompt,completion\n" + "caf\xe9,a\n".encode("latin-1") * 9, "data.csv"),
    "CSV, binary": ("data.csv", bytes(range(256)) * 9, "data.csv"),
    "CSV, an empty header": ("data.csv", "prompt,prompt\nq,a\nq,a\nq,a\n", "data.csv"),
    "Parquet, empty": ("data.parquet", b"", "data.parquet"),
    "Parquet, text": ("data.parquet", [LINE] * 9, "data.parquet"),
    "Parquet, cut short": ("data.parquet", b"PAR1" + bytes(200), "data.parquet"),
    "Parquet, damaged": ("data.parquet", b"PAR1" + bytes(200) + b"\xff\xff\xff\x7fPAR1", "data.parquet"),
    "folder, empty": ("data", None, "data"),
    "folder of two formats": ("data/a.jsonl", [LINE] * 9, "data"),
    "folder, only a README": ("data/README.md", "# nothing\n", "data"),
    "folder, README of broken YAML": ("data/README.md", "---\nconfigs: [\n---\n", "data"),
    "folder, README of another shape": ("data/README.md", "---\nconfigs: 3\n---\n", "data"),
    "folder, README names no file": (
        "data/README.md", "---\nconfigs:\n- config_name: default\n  data_files: nowhere.jsonl\n---\n", "data",
    ),
    "folder of empty files": ("data/train.jsonl", "", "data"),
    "folder with a script": ("data/data.py", "raise SystemExit(0)\n", "data"),
    "folder of images": ("data/a.png", b"\x89PNG\r\n\x1a\n" + bytes(64), "data"),
    "a folder with a file's name": ("data.jsonl", None, "data.jsonl"),
}  # fmt: skip
BESIDE = {
    "folder of two formats": {"data/b.csv": "prompt,completion\nq,a\n"},
    "folder, README names no file": {"data/x.jsonl": [LINE] * 9},
    "folder, README of broken YAML": {"data/x.jsonl": [LINE] * 9},
    "folder, README of another shape": {"data/x.jsonl": [LINE] * 9},
}


def _data(name: str, path: str, files: dict[str, Any], says: str, preferences: bool = False) -> Case:
    name = f"data/{name}"
    if preferences:
        change = {"hyperparameters.datasets": [f"{{work}}/{path}"]}
        return Case(name, says, config="dpo", change=change, files=files, strict=False)
    change = {"hyperparameters.dataset": f"{{work}}/{path}", "hyperparameters.dataset_subsets": [{"ratio": 1.0}]}
    return Case(name, says, change=change, files=files, strict=False)


def _wrong_rows() -> list[Case]:
    cases = []
    for shape, wrongs in WRONG.items():
        for number, (wrong, says) in enumerate(wrongs, 1):
            rows = [dict(ROWS[shape]) for _ in range(10)]
            for column, value in wrong.items():
                for row in rows if value is ... else ():
                    del row[column]
                if value is not ...:
                    rows[2][column] = value
            if "system" in wrong and shape == "completion":
                rows = [row | {"system": wrong["system"]} if n == 2 else row for n, row in enumerate(rows)]
            column = ", ".join(f"{column} {'absent' if value is ... else ''}" for column, value in wrong.items())
            cases.append(
                _data(
                    f"{shape} #{number} {column.strip()}",
                    "data.jsonl",
                    {"data.jsonl": rows},
                    says,
                    shape in PREFERENCES,
                )
            )
    return cases


# Models: what is done to a copy of the tiny base in `work/model`, and what the line says. Each is a copy of files.
def remove(*names: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return damage


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content.encode() if isinstance(content, str) else content) and None


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file; ...: without the key."""

    def damage(model: Path) -> None:
        read = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps({key: value for key, value in read.items() if value is not ...}))

    return damage


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:size]) and None


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = model / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return damage


WEIGHTS = "model.safetensors"
# Found by reading small files: before anything is written.
MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (remove("config.json"), "model"),
    "config empty": (put("config.json", ""), "model"),
    "config zeroed": (put("config.json", bytes(600)), "model"),
    "config cut short": (cut("config.json", 100), "model"),
    "config a list": (put("config.json", "[]"), "model"),
    "config of nothing": (put("config.json", "{}"), "model"),
    "config HTML": (put("config.json", "<html>404</html>"), "model"),
    "unknown model type": (edit("config.json", model_type="gemma99"), "gemma99"),
    "model type a number": (edit("config.json", model_type=3), "model"),
    "no model type": (edit("config.json", model_type=...), "model"),
    "an encoder": (put("config.json", '{"model_type": "vit", "hidden_size": 8}'), "model"),
    "vocabulary as text": (edit("config.json", vocab_size="many"), "model"),
    "vocabulary below 0": (edit("config.json", vocab_size=-5), "model"),
    "layers as text": (edit("config.json", num_hidden_layers="four"), "model"),
    "heads of 0": (edit("config.json", num_attention_heads=0), "model"),
    "activation unknown": (edit("config.json", hidden_act="gelou", hidden_activation="gelou"), "model"),
    "dtype unknown": (edit("config.json", torch_dtype="flot16", dtype="flot16"), "model"),
    "quantized by nobody": (edit("config.json", quantization_config={"quant_method": "nobody"}), "model"),
    "remote code": (edit("config.json", auto_map={"AutoConfig": "evil.Config"}, model_type="evil"), "model"),
    "rope unknown": (edit("config.json", rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "model"),
    "pad token beyond the vocabulary": (edit("config.json", pad_token_id=10**6), "model"),
    "no weights": (remove(WEIGHTS), "model"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "model"),
    "tokenizer empty": (put("tokenizer.json", ""), "model"),
    "tokenizer zeroed": (put("tokenizer.json", bytes(999)), "model"),
    "tokenizer cut short": (cut("tokenizer.json", 5000), "model"),
    "tokenizer a list": (put("tokenizer.json", "[]"), "model"),
    "tokenizer of nothing": (put("tokenizer.json", "{}"), "model"),
    "tokenizer of an unknown kind": (edit("tokenizer.json", model={"type": "Magic"}), "model"),
    "tokenizer config empty": (put("tokenizer_config.json", ""), "model"),
    "tokenizer config a list": (put("tokenizer_config.json", "[]"), "model"),
    "tokenizer config cut short": (cut("tokenizer_config.json", 20), "model"),
    "a million layers": (edit("config.json", num_hidden_layers=10**6), "layers"),
    "no EOS": (edit("tokenizer_config.json", eos_token=None), "EOS"),
    "EOS a number": (edit("tokenizer_config.json", eos_token=3), "model"),
}  # fmt: skip
# Found by reading the weights, which only the trial does.
TORN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "vocabulary of 0": (edit("config.json", vocab_size=0), "model"),
    "tokens of nothing": (edit("tokenizer.json", post_processor={"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}), "tokenizer"),
    "no layers": (edit("config.json", num_hidden_layers=-1), "model"),
    "heads that do not divide": (edit("config.json", num_key_value_heads=3), "model"),
    "hidden size of 0": (edit("config.json", hidden_size=0), "model"),
    "hidden size beyond memory": (edit("config.json", hidden_size=10**9), "model"),
    "weights empty": (put(WEIGHTS, b""), "model"),
    "weights zeroed": (put(WEIGHTS, bytes(100000)), "model"),
    "weights cut short": (cut(WEIGHTS, 50000), "model"),
    "weights cut in the header": (cut(WEIGHTS, 100), "model"),
    "weights of 7 bytes": (cut(WEIGHTS, 7), "model"),
    "header of a petabyte": (put(WEIGHTS, struct.pack("<Q", 2**50) + b"{}"), "model"),
    "header not JSON": (put(WEIGHTS, struct.pack("<Q", 16) + b"not JSON at all!"), "model"),
    "weights an LFS pointer": (put(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "model"),
    "weights HTML": (put(WEIGHTS, "<html>403</html>"), "model"),
    "weights of other names": (tensors(lambda t: {f"x.{k}": v for k, v in t.items()}), "model"),
    "half of the weights": (tensors(lambda t: dict(sorted(t.items())[: len(t) // 2])), "model"),
    "a layer is missing": (tensors(lambda t: {k: v for k, v in t.items() if ".layers.2." not in k}), "model"),
    "weights of another shape": (tensors(lambda t: {k: v[..., :-1].contiguous() for k, v in t.items()}), "model"),
    "weights of another config": (edit("config.json", hidden_size=64), "model"),
    "more layers than weights": (edit("config.json", num_hidden_layers=6), "model"),
    "index of missing shards": (
        lambda model: (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
        and (model / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}})
        ),
        "model",
    ),
    "index not JSON": (lambda model: (model / WEIGHTS).unlink() or (model / "model.safetensors.index.json").write_text("{"), "model"),
    "only a pickle": (lambda model: (model / WEIGHTS).unlink() or (model / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01."), "model"),
    "a tokenizer of more tokens than embeddings": (
        lambda model: tensors(lambda t: {k: v[:100].contiguous() if v.shape[0] > 1000 else v for k, v in t.items()})(model)
        or edit("config.json", vocab_size=100)(model),
        "model",
    ),
}  # fmt: skip
LONG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# Chat templates of a model that is compared (a training replaces them), and what the line says.
TEMPLATES: dict[str, str | bytes] = {
    "open block": "{% for message in messages %}",
    "open expression": "{{ messages[0]['content'",
    "unknown filter": "{{ messages | sparkle }}",
    "unknown function": "{{ shout(messages) }}",
    "refuses": "{{ raise_exception('no') }}",
    "nothing": "",
    "renders nothing": "{% if false %}x{% endif %}",
    "no attribute": "{{ messages[0].content.nothing.more }}",
    "index beyond": "{{ messages[99]['content'] }}",
    "division by zero": "{{ 1 / 0 }}",
    "number plus text": "{{ 1 + 'a' }}",
    "for ever": LONG,
    "for ever for one turn": "{% if messages|length == 1 %}" + LONG + "{% endif %}x",
    "for ever for a system turn": "{% if messages[0]['role'] == 'system' %}" + LONG + "{% endif %}x",
    "for ever for a long text": "{% if messages[0]['content']|length > 500 %}" + LONG + "{% endif %}x",
    "a gigabyte": "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    "a gigabyte at once": "{{ 'x' * 4000000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "binary": bytes(range(128, 256)),
    "ignores the answer": "{{ messages[0]['content'] }}",
}
COMPARE = ("--prompt", "What is tea?", "--max-new-tokens", "2", "--device", "cpu")
PAIRS = ("--dataset", "{tiny}/questions", "--number-of-pairs", "2", "--number-of-samples", "1", "--max-new-tokens", "2")


def _copy_of_base(damage: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        shutil.copytree(TINY[0] / "base", path)
        damage(path)

    return make


TINY: list[Path] = []  # the bench puts the folder here


def _model(name: str, damage: Callable[[Path], Any], says: str, command: str, strict: bool) -> Case:
    change = {"hyperparameters.model_name": "{work}/model"}
    return Case(f"model/{name}", says, command, change=change, files={"model": _copy_of_base(damage)}, strict=strict)


def _compared(name: str, damage: Callable[[Path], Any], says: str, words: tuple[str, ...] = COMPARE) -> Case:
    words = ("--model", "m={work}/model", *words)
    return Case(name, says, "inference", words=words, files={"model": _copy_of_base(damage)}, strict=False)


def _loaded(kwargs: dict[str, Any]) -> Case:
    change = {"hyperparameters.training_args.model_init_kwargs": kwargs}
    says = str(kwargs.get("subfolder", "model_init_kwargs"))
    return Case(f"model/loaded with {kwargs}", says, "sft_finetune", change=change, strict=False)


# What only the model's loading shows.
LOADED: list[dict[str, Any]] = [
    {"foo": 1}, {"device_map": "everywhere"}, {"subfolder": "nowhere"},
    {"quantization_config": {"load_in_4bit": True}},
]  # fmt: skip
CASES = [
    *map(_loaded, LOADED),
    *(_data(name, path.split("/")[0], {path: content, **BESIDE.get(name, {})}, says) for name, (path, content, says) in FILES.items()),
    *_wrong_rows(),
    # The caches of the data, which is read first, are no harm.
    *(_model(name, damage, says, "local_experiment", strict=False) for name, (damage, says) in MODELS.items()),
    *(_model(name, damage, says, "sft_finetune", strict=False) for name, (damage, says) in TORN.items()),
    *(_compared(f"compared/{name}", damage, "model") for name, (damage, _) in (TORN | {k: MODELS[k] for k in ("config cut short", "unknown model type", "tokenizer cut short", "no EOS", "no tokenizer")}).items()),
    *(_compared(f"template/{name}", put("chat_template.jinja", text), "model" if name == "binary" else "template") for name, text in TEMPLATES.items() if name not in ("ignores the answer", "nothing")),
    _compared("template/ignores the answer", put("chat_template.jinja", TEMPLATES["ignores the answer"]), "template", PAIRS),
    _compared("template/a number", edit("tokenizer_config.json", chat_template=3), "model"),
    _compared("template/a list of no default", edit("tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}]), "template"),
    Case("model/limit leaves nothing", "max_seq_length", "sft_finetune", change={"hyperparameters.max_seq_length": 2}, strict=False),
    Case("model/limit leaves nothing, DPO", "max_", "dpo_finetune", "dpo", change={"hyperparameters.max_length": 2}, strict=False),
    Case("dry run/limit leaves nothing", "max_seq_length", change={"hyperparameters.max_seq_length": 2}, strict=False, words=("{work}/config.yaml", "{repo}", "--dry-run")),
]  # fmt: skip
