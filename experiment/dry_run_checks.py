"""What a dry run can check of a training whose data or model only a cluster's containers see."""

import pandas as pd

from adapters.stack import base_model
from data.splitting import SourceCounts
from experiment.container_paths import ContainerPaths
from experiment.dry_run_memory import describe_parameters
from experiment.dry_run_output import Table
from experiment.kinds import Hyperparameters, TrainingKind
from experiment.starting_points import StartingModel


def find_unseen(hparams: Hyperparameters, start: StartingModel, paths: ContainerPaths) -> dict[str, str]:
    """Return which of a trial's paths only its containers see, and why."""
    sources = [*hparams.sources, *filter(None, (source.evaluation for source in hparams.sources))]
    names = {start.source, *(source.name for source in sources)}
    return {name: paths.unseen[name] for name in names if paths.here(name) and name in paths.unseen}


def tabulate_checks(
    kind: TrainingKind, hparams: Hyperparameters, start: StartingModel, unseen: dict[str, str], which: str
) -> Table:
    """Return what could be checked of a training whose data or model is not here. Raises `UserError` for a mistake."""
    lines = [["hyperparameters", "right, as far as they can be checked without the data and the model"]]
    for source in hparams.sources:
        names = [source.name, *([source.evaluation.name] if source.evaluation else [])]
        if missing := [name for name in names if name in unseen]:
            lines.append([str(source), f"not checked: {unseen[missing[0]]}"])
            continue
        counts: list[SourceCounts] = []
        kind.load(**{**hparams.load_options, "sources": [source]}, on_source=counts.append)
        lines.append([str(source), f"{counts[0].used:,} rows are used"])
    if start.source in unseen:
        lines.append([start.shown, f"not checked: {unseen[start.source]}"])
    else:
        model, _ = start.load(hparams)
        parameters = describe_parameters(base_model(model), hparams)
        lines.append([start.shown, f"{parameters}{start.note and '; '}{start.note}"])
    note = "What needs the data and the model together is left out: lengths, examples, steps and memory."
    return Table(f"Checked from here{which}", pd.DataFrame(lines, columns=["", " "]), note, text_columns=[" "])
