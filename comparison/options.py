"""The options of a comparison: one pydantic model, filled from a command line or from a YAML's hyperparameters."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, Field

from config.validation import KeyPath, dotted, validate
from config.yaml_files import check_values
from errors import CommandLine, UserError, nearest, reason
from storage.files import check_output

DEFAULT_DATASETS = ("argilla/dpo-mix-7k", "jondurbin/truthy-dpo-v0.1")  # dpo.yaml's: their held-out rows are asked
OUTPUT_SUFFIXES = (".html", ".csv", ".jsonl", ".md", ".json")
MIN_TEMPERATURE = 0.01  # temperature: logits are divided by it, and become infinite near 0
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # as torch and numpy take
RESERVED_NAMES = ("question", "preferred")  # the other columns of a table of answers
SHORTHANDS = {"exp_id": "exp", "trial_id": "trial"}  # `exp_id: 12` is short for `model: {"exp:12": "exp:12"}`
PUBLISHED = ("output_file", *SHORTHANDS)  # options of the published example, which have an underscore there
GROUPS = {
    "models": ("model", "device", "dtype", "batch_size"),
    "questions": ("dataset", "eval_dataset", "number_of_samples", "data_seed", "prompt", "prompts"),
    "answers": ("max_new_tokens", "temperature", "top_p", "seed", "chat"),
    "numbers": ("number_of_pairs", "reference", "beta", "max_length"),
    "files": ("output_file",),
}
METAVARS = {"model": "NAME=SOURCE", "chat": "NAME", "reference": "NAME", "prompts": "FILE", "output_file": "FILE"}


def flag(name: str) -> str:
    """Return a field's option on the command line."""
    return f"--{name}" if name in PUBLISHED else f"--{name.replace('_', '-')}"


def _as_list(value: Any) -> list[Any]:  # a single value may stand where a list is meant
    return value if isinstance(value, list) else [value]


def _read_source(value: Any) -> Any:
    if value in ("", "{}", {}):
        raise UserError("is empty")
    try:  # a command line has the text of a YAML mapping: {name: x, split: y}
        if isinstance(value, str) and value.startswith("{"):
            check_values(value := yaml.safe_load(value))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{value[:80]!r}: {reason(error)}") from error
    return value


def _read_models(value: Any) -> dict[str, Any]:
    """Read a mapping, or a list of mappings and NAME=SOURCE texts."""
    models: dict[str, Any] = {}
    for part in _as_list(value):
        for name, source in part.items() if isinstance(part, dict) else [str(part).partition("=")[::2]]:
            if not (name and source):
                raise UserError(f"{part!r} is not NAME=SOURCE")
            if name in models or name in RESERVED_NAMES:
                raise UserError(f"{part!r}: the name {name!r} is taken")
            models[name] = source
    return models


Source = Annotated[str | dict[str, Any], BeforeValidator(_read_source)]  # see config.hyperparameters.DataSource
Texts = Annotated[list[str], BeforeValidator(_as_list)]


class Sampling(BaseModel):
    """How an answer is generated, for every model alike."""

    model_config = {"frozen": True, "extra": "forbid", "allow_inf_nan": False, "use_attribute_docstrings": True}

    max_new_tokens: int = Field(256, ge=1)
    """limit of an answer, in tokens"""
    temperature: float = Field(0.0, ge=0)
    """0 always takes the likeliest token; above 0, tokens are sampled"""
    top_p: float = Field(1.0, gt=0, le=1)
    """sample from the likeliest tokens that have this probability together"""
    seed: Seed = 0
    """seed of the sampling; the same seed and --batch-size give the same answers on the same hardware"""


class ComparisonOptions(Sampling):
    """Everything that a user can set. The text below a field is its help."""

    model: Annotated[dict[str, str], BeforeValidator(_read_models)] = {}
    """a model and a name for it; repeatable"""
    device: str | None = None
    """cpu, cuda, cuda:1 or mps (default: the best one of this machine)"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """type of the weights: float32, bfloat16 or float16. bfloat16 takes half the memory, but is too coarse to hold the
    small changes that DPO makes to a weight"""
    batch_size: int | None = Field(None, ge=1)
    """questions or pairs at a time; in float32 it changes no greedy answer (default: 8, with CUDA 64)"""

    dataset: Annotated[list[Source], BeforeValidator(_as_list)] = []
    """preference data set whose held-out rows give the questions and the pairs, written exactly as in the YAML of the
    run: a name or '{name: ..., eval_ratio: ..., columns: ...}'; repeatable (default: dpo.yaml's argilla/dpo-mix-7k and
    jondurbin/truthy-dpo-v0.1)"""
    eval_dataset: Annotated[list[Source], BeforeValidator(_as_list)] = []
    """preference data set that no model was trained on: all of its rows are used, or N of '{name: ...,
    number_of_samples: N}'; repeatable"""
    number_of_samples: int | None = Field(None, ge=1)
    """how many questions to ask (default: 10)"""
    data_seed: Seed | None = None
    """training_args.data_seed of the DPO run, if it set one: it decides which rows are held out"""
    prompt: Texts = []
    """your own question instead; repeatable. Pairs are then scored only if you name a --dataset or --eval-dataset"""
    prompts: Source | None = None
    """a file of your own questions: .txt with one a line, or a data set; 'blog' takes the four questions that the
    published post shows, from Intel/orca_dpo_pairs on the hub"""

    chat: str | None = None
    """talk to this model in the terminal instead of comparing"""
    number_of_pairs: int | None = Field(None, ge=0)
    """how many held-out pairs to score; 0 for none (default: all)"""
    reference: str | None = None
    """the model that rewards are measured against; take the SFT model for the rewards that DPO's training reports. A
    model that is prompted differently, such as a base model without a chat template, is scored on other tokens
    (default: base, or the first model)"""
    beta: float | None = Field(None, gt=0)
    """factor of the rewards, as in DPO (default: the one that a DPO model was trained with; 0.1 if there is none)"""
    max_length: int = Field(4096, ge=2)
    """limit of a pair, in tokens; its prompt and its answers get half of it each and are cut to fit"""
    output_file: Texts = []
    """.html for the page to vote on; .csv, .jsonl or .md for a table with a row for each question; .json for a program,
    with everything; repeatable"""

    _spell: Callable[[str], str]

    def key(self, field: str, *names: str) -> str:
        """Return a field as the user spells it, for a message: `--model sft` or `hyperparameters.model.sft`."""
        key = self._spell(field)
        return (" " if key.startswith("-") else ".").join((key, *names))

    @property
    def reference_name(self) -> str:
        """The model that rewards are measured against."""
        return self.reference or ("base" if "base" in self.model else next(iter(self.model)))

    @property
    def data_sets(self) -> list[Source]:
        """The preference data sets that the user names, as in `dataset` or as in `eval_dataset`."""
        return [*self.dataset, *self.eval_dataset]

    def check_together(self) -> None:
        """Raise `UserError` for options that contradict each other, or could only fail later."""
        key, own = self.key, self.prompt or self.prompts
        if not self.model:
            raise UserError(f"which models? Give {key('model')}, {key('exp_id')} or {key('trial_id')}")
        for field in ("chat", "reference"):
            if (name := getattr(self, field)) is not None and name not in self.model:
                models = f"{', '.join(self.model)}{nearest(name, self.model)}"
                raise UserError(f"{key(field)} {name!r} is not one of the models: {models}")
        comparing = (
            "output_file",
            "dataset",
            "eval_dataset",
            "prompt",
            "prompts",
            "number_of_samples",
            "number_of_pairs",
            "reference",
        )
        for field in comparing if self.chat else ():
            if getattr(self, field):
                raise UserError(f"{key(field)} has no effect with {key('chat')}")
        if self.top_p < 1 and self.temperature == 0:
            raise UserError(f"{key('top_p')} {self.top_p:g} has no effect without a {key('temperature')} above 0")
        if not all(map(str.strip, self.prompt)):
            raise UserError(f"{key('prompt')} is empty")
        if own and self.number_of_samples:
            raise UserError(f"{key('number_of_samples')} has no effect on your own questions: all are asked")
        if own and self.number_of_pairs and not self.data_sets:
            raise UserError(
                f"{key('number_of_pairs')} needs a {key('dataset')} or {key('eval_dataset')} beside your own questions"
            )
        for path in map(Path, self.output_file):
            if path.suffix not in OUTPUT_SUFFIXES:
                raise UserError(
                    f"{key('output_file')} {path}: its name must end in one of {', '.join(OUTPUT_SUFFIXES)}"
                )
            check_output(path, key("output_file"))
        if len(set(map(os.path.realpath, self.output_file))) < len(self.output_file):
            raise UserError(f"{key('output_file')}: the same file is named twice")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise UserError(f"{key('temperature')} {self.temperature:g} must be 0, or at least {MIN_TEMPERATURE}")


def _make_options(values: dict[str, Any], strict: bool, spell: Callable[[str], str]) -> ComparisonOptions:
    """Return the options that `values` set. `spell` returns a field's name as the user wrote it."""

    def name_key(path: KeyPath) -> str:
        return dotted(spell(str(path[0])), path[1:] if strict else ())

    options = validate(ComparisonOptions, values, "options", strict=strict, name_key=name_key, noun="an option")
    options._spell = spell
    options.check_together()
    return options


def parse_hyperparameters(values: dict[str, Any]) -> ComparisonOptions:
    """Return the options that a YAML's hyperparameters set; null leaves one at its default. Raises `UserError`.

    A model that is null is left out: an override can remove one of the YAML's in no other way.
    """
    values = {name: value for name, value in values.items() if value is not None}
    if isinstance(models := values.get("model"), dict):
        values["model"] = {name: source for name, source in models.items() if source is not None}
    for name, kind in SHORTHANDS.items():
        ids = [f"{kind}:{number}" for number in _as_list(values.pop(name, []))]
        values["model"] = [*_as_list(values.get("model", [])), *(f"{id_}={id_}" for id_ in ids)]
    return _make_options(values, strict=True, spell="hyperparameters.{}".format)


def parse_command_line(arguments: list[str] | None, description: str | None) -> ComparisonOptions:
    """Return the options of a command line (None: this process's). Raises `UserError`; `--help` prints `description`.

    The parser is made from the fields above. (HfArgumentParser takes 0.9 s to import, and knows no option that can be
    repeated; typer reads no YAML.)
    """
    parser = CommandLine(description, argument_default=argparse.SUPPRESS)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            field = ComparisonOptions.model_fields[name]
            numeric = (*get_args(field.annotation), field.annotation)[0] in (int, float)
            shown = f" (default: {field.default})" if isinstance(field.default, int | float | str) else ""
            group.add_argument(
                *dict.fromkeys((flag(name), f"--{name.replace('_', '-')}")),
                action="append" if get_origin(field.annotation) in (list, dict) else "store",
                metavar=METAVARS.get(name, "N" if numeric else None),
                help=f"{field.description}{shown}".replace("%", "%%"),
            )
        for name, kind in SHORTHANDS.items() if title == "models" else ():
            names = flag(name), f"--{kind}-id"
            text = f"short for --model {kind}:N={kind}:N; repeatable"
            as_model = f"{kind}:{{0}}={kind}:{{0}}".format
            group.add_argument(*names, dest="model", action="append", type=as_model, metavar="N", help=text)
    return _make_options(vars(parser.parse_args(arguments)), strict=False, spell=flag)
