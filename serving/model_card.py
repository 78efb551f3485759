"""The model card of an exported folder: what the model is, what it learned from, and what was proven of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers
import trl
import yaml
from huggingface_hub import ModelCardData

from config.hyperparameters import DataSource
from pages.render import render_text
from pages.terminal import visible
from serving.lineage import Lineage, Stage, public_name

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def render_card(
    name: str,
    lineage: Lineage,
    dtype: str,
    merged: bool,
    proof: Sequence[str],
    commands: Sequence[tuple[str, str]],
    remarks: Sequence[str],
) -> str:
    """Return the README.md of a model called `name`. Local paths are in it only by their last part."""
    stages, last = lineage.stages, lineage.stages[-1] if lineage.stages else None
    return render_text(
        TEMPLATE,
        name=name,
        metadata=card_metadata(lineage, merged).to_yaml().strip(),
        summary=_summary(lineage),
        base=_link(lineage.base_name, lineage.base_on_hub is not None)
        + (f", commit `{lineage.revision}`" if lineage.revision else ""),
        stages=stages,
        merged=merged,
        data=[_row(stage, source) for stage in stages if stage.origin for source in stage.origin.sources],
        yaml=lambda values: yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip(),
        metrics=dict(sorted((last.metrics or {}).items())) if last else {},
        step=last.step if last else None,
        proof=proof,
        commands=commands,
        remarks=remarks,
        dtype=dtype,
        versions=f"transformers {transformers.__version__} and TRL {trl.__version__}",
    )


def card_metadata(lineage: Lineage, merged: bool) -> ModelCardData:
    """Return what the hub reads of a card. Data sets and models that are not the hub's are left out."""
    methods = [stage.method.lower() for stage in lineage.stages]
    origins = [stage.origin for stage in lineage.stages if stage.origin]
    names = [source.name for origin in origins for source in origin.sources]
    data_sets = list(dict.fromkeys(name for name in names if _on_hub(name)))
    base: dict[str, Any] = {"base_model": lineage.base_on_hub} if lineage.base_on_hub else {}
    if base and lineage.stages:
        base["base_model_relation"] = "finetune"
    return ModelCardData(
        **base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys(methods), *(["lora"] if merged else []), *(["trl"] if methods else [])] or None,
        datasets=data_sets or None,
    )


def _summary(lineage: Lineage) -> str:
    base = _link(lineage.base_name, lineage.base_on_hub is not None)
    if not lineage.stages:
        return f"{base}, as it is: its folder tells of no training."
    methods = " and then ".join(dict.fromkeys(stage.method for stage in lineage.stages))
    licence = "; its licence applies here, too" if lineage.base_on_hub else ""
    return f"{base}, trained with {methods}{licence}."


def _row(stage: Stage, source: DataSource) -> Iterator[str]:
    rows = f"{source.number_of_samples:,}" if source.number_of_samples else ""
    rows = f"{source.ratio:.0%}" if source.ratio and source.ratio < 1 else rows or "all"
    name = _link(public_name(source.name), _on_hub(source.name), "datasets/")
    for text in (stage.method, name, source.subset or "", source.split or "", rows):
        yield visible(text).replace("\n", " ").replace("|", "\\|")


def _on_hub(name: str) -> bool:
    return "/" in name and public_name(name) == name


def _link(name: str, is_on_hub: bool, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if is_on_hub else name
