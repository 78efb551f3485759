"""Draw an experiment as one HTML file: which trial won, by how much, and what to do with it.

    python report.py local_runs/tiny-dpo
    python report.py exp:12 --output grid.html

The first reads the folder of a local experiment, the second asks the Determined master that the environment variable
DET_MASTER names. The file needs no network and no server: open it in a browser, or send it to someone. It holds the
best trial with the commands that compare and serve its model, the grid as heatmaps, every trial's curves, and a table.
An experiment that still runs, or lost some of its trials, is drawn with what there is.
"""

import argparse
import itertools
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from config.experiment import expand_trials
from errors import UserError, exit_on_user_error
from experiment.results import Experiment, short_name, summarize
from pages.render import render_page
from storage.files import write_atomically
from trial.events import TrialEvent, read_events

# checkpoints.py and the SDK are imported where they are needed: that takes seconds.

TITLES = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
ENDED = {"COMPLETED": "completed", "ERROR": "failed", "CANCELED": "canceled"}
REWARDS = ("eval_rewards/accuracies", "eval_rewards/margins")
SCALED = ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected")
SCALED_BY_BETA = "Scaled by beta: comparable between trials of the same beta only."
MISSING = "\N{EN DASH}"
HUES = 6  # --h0 to --h5 in the style: told apart by the colour-blind too
DASHES = ("none", "7 4", "1.5 3.5", "9 3 2 3", "4 2")
MARKERS = (
    "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z",
    "M-3.2,-3.2h6.4v6.4h-6.4z",
    "M0,-4.8l4.8,4.8l-4.8,4.8l-4.8,-4.8z",
    "M0,-4.5l4.5,8h-9z",
    "M0,4.5l-4.5,-8h9z",
)
TOP, RIGHT, BOTTOM = 12, 410, 208  # of the area in a panel's 420 x 236 that curves are drawn in
MAX_POINTS = 150  # of a curve, more than a panel's pixels show


def render(experiment: Experiment) -> str:
    """The page."""
    return render_page(
        Path(__file__).with_name("report.html.jinja"),
        experiment.name,
        experiment=experiment,
        page=Page(experiment),
        metric=experiment.searcher.metric,
        short_name=short_name,
        scaled_by_beta=SCALED_BY_BETA,
        right=RIGHT,
        bottom=BOTTOM,
    )


Result = dict[str, Any]  # of a trial, see experiment_results.py


class Page:
    """What the template says and draws, in the order of the page."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.searcher = experiment, experiment.searcher
        try:
            self.planned = expand_trials(experiment.config)
        except UserError:  # a search that only a cluster runs: what it will try is not known beforehand
            self.planned = [result["hparams"] for result in experiment.results.values()]
        searcher = experiment.config["searcher"]
        self.expected = max(len(self.planned), searcher.get("max_trials") or 0)
        self.axes = {
            name: in_order(experiment.value(point, name) for point in self.planned) for name in experiment.varying
        }
        self.ranked, self.tied = experiment.ranked(), experiment.ties()
        self.best = experiment.best()
        others = [result for _, result in sorted(experiment.results.items()) if result not in self.ranked]
        self.trials = [*self.ranked, *others]
        shown = dict.fromkeys([self.searcher.metric, *REWARDS, "eval_loss"])
        self.metrics = [metric for metric in shown if any(is_finite(v) for v in self.column(metric))]

    # What every section needs.

    def column(self, metric: str) -> list[Any]:
        """The metric of each trial's checkpoint."""
        return [trial["best_metrics"].get(metric) for trial in self.trials]

    def write(self, metric: str, of: Result | float) -> str:
        """A value of the metric, or a trial's: all with as many decimals as give the largest four digits."""
        value = of["best_metrics"].get(metric) if isinstance(of, dict) else of
        sizes = [abs(size) for size in self.column(metric) if is_finite(size) and size]
        decimals = 3 - math.floor(math.log10(max(sizes, default=1)))
        alike = 0 <= decimals <= 6 and min(sizes, default=1) * 10**decimals > 1  # else the smallest would be nought
        return MISSING if value is None else f"{value:.{decimals}f}" if alike else f"{value:.4g}"

    def title(self, metric: str) -> str:
        name = metric.removeprefix("eval_")
        return TITLES.get(name, name)

    def values(self, trial: Result) -> str:
        return ", ".join(self.experiment.value(trial["hparams"], name) for name in self.axes)

    def state(self, trial: Result) -> str:
        return ENDED.get(trial["state"], trial["state"].lower().replace("_", " "))

    def mark(self, trial: Result) -> str:
        return "best" if trial is self.best else "tied" if trial["trial_id"] in self.tied else ""

    @property
    def beta(self) -> str | None:
        """The axis that is DPO's beta."""
        return next((name for name in self.axes if short_name(name) in ("dpo_beta", "beta")), None)

    def scaled_by_beta(self, metric: str) -> bool:
        """Whether trials of different betas cannot be compared by it: DPO's rewards, and so its loss, contain beta."""
        return self.beta is not None and metric.removeprefix("eval_") in SCALED

    # The header.

    def introduction(self) -> str:
        varied = " and ".join(f"{short_name(name)} ({', '.join(values)})" for name, values in self.axes.items())
        trials = f"{count(self.expected, 'trial')} of {self.experiment.script}" + (varied and f" over {varied}")
        better = "smaller" if self.searcher.smaller_is_better else "larger"
        return f"{trials}, judged by {self.searcher.metric} ({better} is better)."

    def progress(self) -> str:
        states = Counter(map(self.state, self.trials))
        completed = f"{states.pop('completed', 0)} of {count(self.expected, 'trial')} completed"
        return ", ".join([completed, *(f"{number} {state}" for state, number in states.items())]) + "."

    # The winner.

    def headline(self) -> str:
        if self.expected == 1:
            return "Its best checkpoint"
        ended = sum(trial["state"] in ENDED for trial in self.trials)
        return f"Trial {self.best['trial_id']} is best" + (" so far" if ended < self.expected else "")

    def verdict(self) -> str:
        """How far the best trial is ahead, and of which."""
        metric, said = self.searcher.metric, []
        if self.tied:
            *others, last = map(str, self.tied)
            as_good = f"Trials {', '.join(others)} and {last} are" if others else f"Trial {last} is"
            said.append(f"{as_good} as good; the first is taken.")
        for behind in self.ranked[1 + len(self.tied) :][:1]:
            gap = abs(self.best["best_metrics"][metric] - behind["best_metrics"][metric])
            which = f"trial {behind['trial_id']} ({self.experiment.varied(behind['hparams'])})"
            said.append(f"Next is {which} with {self.write(metric, behind)}: {gap:.3g} behind.")
        return " ".join(said)

    def step(self) -> int | None:
        """The step at which the best checkpoint was saved."""
        reports, uuid = self.experiment.reports.get(self.best["trial_id"], []), self.best["checkpoint_uuid"]
        return next((r["steps_completed"] for r in reports if r["kind"] == "checkpoint" and r["uuid"] == uuid), None)

    def commands(self) -> Iterator[tuple[str, str | None]]:
        """What to type next, each with what it does; where the model is gone, only that."""
        uuid, serve = self.best["checkpoint_uuid"], "pip install 'transformers[serving]'\n"
        if self.experiment.on_cluster:
            serve += f"det checkpoint download {uuid} --output-dir assistant\n"
            folder = f"assistant/checkpoint-{self.step()}"
        else:
            from storage.checkpoints import local_checkpoint

            try:
                folder = str(local_checkpoint(uuid, "checkpoint"))
            except UserError as error:
                yield f"The model is gone: {error}", None
                return
        compare, dpo = self.experiment.compare_command(), self.experiment.dpo_command()
        if compare:
            yield "Compare its answers with those of the models that it came from", compare
        if dpo:
            yield "Go on from it with DPO, on preferred and rejected answers", dpo
        serve += f"transformers serve {shlex.quote(folder)}"
        yield "Serve it through an OpenAI-compatible API; its chat template is in the checkpoint", serve

    # The grid.

    def mapped(self) -> list[str]:
        """The metrics that have a heatmap; none where there is no grid, as in a random search."""
        if not self.axes or math.prod(map(len, self.axes.values())) != len(self.planned):
            return []
        return [m for m in self.metrics if self.scale(m) and m in (self.searcher.metric, *REWARDS)]

    def scale(self, metric: str, like: Result | None = None) -> tuple[float, float] | None:
        """The values with the weakest and the strongest colour: the worst and the best of the completed trials.

        Where only trials of the same beta compare, of those `like` this one. A share of pairs is coloured over a tenth
        at least: a pair more is no landslide.
        """
        trials = [trial for trial in self.trials if trial["state"] == "COMPLETED"]
        if like is not None and self.scaled_by_beta(metric):
            beta = self.experiment.value(like["hparams"], self.beta)
            trials = [trial for trial in trials if self.experiment.value(trial["hparams"], self.beta) == beta]
        values = list(filter(is_finite, (trial["best_metrics"].get(metric) for trial in trials)))
        if not values:
            return None
        if self.searcher.smaller_is_better and metric == self.searcher.metric:
            return max(values), min(values)
        least = max(values) - 0.1 if metric.endswith("accuracies") else max(values)
        return min(*values, least), max(values)

    def arranged(self) -> tuple[list[str], str, list[str]]:
        """The axes that a heatmap has down, none or one, and across, and those that it is repeated for."""
        names = list(self.axes)
        return (names[:1], names[1], names[2:]) if len(names) > 1 else ([], names[0], [])

    def grids(self) -> Iterator[tuple[str, list[tuple[str, list[Result | None]]]]]:
        """A label and, by rows, the trials, for each combination of the axes that a heatmap is repeated for."""
        down, across, others = self.arranged()
        names = [*down, across, *others]
        trials = {tuple(self.experiment.value(trial["hparams"], n) for n in names): trial for trial in self.trials}
        for rest in itertools.product(*(self.axes[name] for name in others)):
            rows = []
            for row in itertools.product(*(self.axes[name] for name in down)):
                rows.append(("".join(row), [trials.get((*row, value, *rest)) for value in self.axes[across]]))
            yield ", ".join(f"{short_name(n)} {value}" for n, value in zip(others, rest, strict=True)), rows

    def cell(self, metric: str, trial: Result) -> str:
        return self.write(metric, trial) if trial["state"] == "COMPLETED" else self.state(trial)

    def ends(self, metric: str) -> tuple[str, str]:
        """What stands at the ends of the colours' legend."""
        if self.scaled_by_beta(metric):
            return "low", f"high, each {short_name(self.beta)} by itself"
        weak, strong = (self.write(metric, value) for value in self.scale(metric))
        return (
            (f"worst {weak}", f"{strong} best") if metric == self.searcher.metric else (f"low {weak}", f"{strong} high")
        )

    def shade(self, metric: str, trial: Result) -> dict[str, str]:
        """The attributes that colour a cell, from 0% at the worst value to 100% at the best."""
        value, scale = trial["best_metrics"].get(metric), self.scale(metric, like=trial)
        if trial["state"] != "COMPLETED" or not is_finite(value):
            return {"class": "none"}
        worst, best = scale
        share = abs(value - worst) / abs(best - worst) if worst != best else 0.5
        return {"class": self.mark(trial), "style": f"--t: {share:.0%}"}

    # The curves.

    def encoding(self) -> str:
        first, *others = map(short_name, self.axes)
        said = f"Colour is {first}" + (f", dash and marker are {' and '.join(others)}." if others else ".")
        looks = {tuple(self.look(trial).values()) for trial in self.trials}
        said += " Some share a look: point at one to see which it is." if len(looks) < len(self.trials) else ""
        return said + (f" The thick line is trial {self.best['trial_id']}." if self.best else "")

    def look(self, trial: Result) -> dict[str, Any]:
        """How a trial is drawn: its colour tells the value of the first axis, dash and marker those of the others."""
        first, *others = [
            (values.index(self.experiment.value(trial["hparams"], name)), len(values))
            for name, values in self.axes.items()
        ] or [(0, 1)]
        combination = first[0] // HUES  # where colours repeat, dashes help
        for index, length in others:
            combination = combination * length + index
        dash = combination % len(DASHES)
        return {"hue": first[0] % HUES, "dash": DASHES[dash], "marker": MARKERS[dash]}

    def charts(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Of each metric that was reported, the panels."""
        for metric in dict.fromkeys([*TITLES, self.searcher.metric.removeprefix("eval_")]):
            training = self.panel("Training", "training", metric)
            evaluation = self.panel("Evaluation, held out", "validation", f"eval_{metric}")
            if training or evaluation:
                yield metric, [panel for panel in (training, evaluation) if panel]

    def panel(self, title: str, kind: str, metric: str) -> dict[str, Any] | None:
        """A metric's ticks and curves in SVG's coordinates, the best trial last, and so on top; None without any."""
        reports = self.experiment.reports
        found = [(trial, series(reports.get(trial["trial_id"], []), kind, metric)) for trial in self.trials[::-1]]
        values = [value for _, points in found for _, value in points if is_finite(value)]
        if not values:
            return None
        ticks = nice_ticks(min(values), max(values))
        labels = [f"{round(tick, 12):g}" for tick in ticks]
        left, steps = 16 + 7 * max(4, *map(len, labels)), max(1, *(trial["steps_completed"] for trial in self.trials))

        def x(step: float) -> float:
            return round(left + (RIGHT - left) * step / steps, 1)

        def y(value: float) -> float:
            return round(BOTTOM - (BOTTOM - TOP) * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)

        curves = []
        for trial, points in found:
            path, pen = "", "M"
            for step, value in points:  # a value that is not finite leaves a gap
                path += f"{pen}{x(step)},{y(value)}h0" if is_finite(value) else ""
                pen = "L" if is_finite(value) else "M"
            said = f"trial {trial['trial_id']}, step"
            marks = [(x(step), y(v), f"{said} {step}: {v:.4g}") for step, v in points if is_finite(v)]
            curves += [(trial, path, marks)] if marks else []
        whole = [tick for tick in nice_ticks(0, steps) if tick <= steps and tick == int(tick)]
        return {
            **{"title": title, "marked": kind == "validation", "left": left, "curves": curves},
            "y_ticks": [(y(tick), label) for tick, label in zip(ticks, labels, strict=True)],
            "x_ticks": [(x(tick), f"{tick:g}") for tick in whole],
        }

    # The tables.

    def rank(self, trial: Result) -> str:
        if trial not in self.ranked:
            return MISSING
        scores = [ranked["best_metrics"][self.searcher.metric] for ranked in self.ranked]
        return str(scores.index(trial["best_metrics"][self.searcher.metric]) + 1)

    def constants(self) -> Iterator[tuple[str, str]]:
        def leaves(level: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
            for name, value in level.items():
                if isinstance(value, dict) and value:
                    yield from leaves(value, f"{prefix}{name}.")
                elif prefix + name not in self.axes and not name.endswith("token"):  # not for a page that is sent round
                    yield prefix + name, value if isinstance(value, str) else json.dumps(value)

        return leaves(self.planned[0] if self.planned else {})


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def in_order(values: Iterator[str]) -> list[str]:
    """The different values: numbers by size, others as they come."""
    different = list(dict.fromkeys(values))
    with suppress(ValueError):
        return sorted(different, key=float)
    return different


def series(reports: list[TrialEvent], kind: str, metric: str) -> list[tuple[int, float]]:
    """A metric by step, evenly thinned where there are many; of a step done twice, after a resume, the last."""
    found = {
        r["steps_completed"]: r["metrics"][metric] for r in reports if r["kind"] == kind and metric in r["metrics"]
    }
    points = sorted(found.items(), reverse=True)
    return points[:: len(points) // MAX_POINTS + 1][::-1]


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`."""
    alike = high - low <= 1e-6 * abs(high)  # and rounding is not worth a curve
    rough = ((abs(high) or 1) if alike else high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if rough <= power * factor * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def read_local(folder: Path) -> Experiment:
    """The experiment in a folder of `local_experiment.py`, with the trials that it has not finished."""
    config, lines = folder / "experiment.json", folder / "trials.jsonl"
    if not config.is_file():
        raise UserError(f"{folder} holds no experiment: experiment.json is missing (local_experiment.py writes it)")
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
        command = folder / "command.json"
        started_with = json.loads(command.read_text(encoding="utf-8")) if command.exists() else {}
        experiment = Experiment(str(read.get("name", folder.resolve().name)), read, **started_with)
        results = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        experiment.results = {result["trial_id"]: result for result in results}
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
    for path in folder.glob("trials/*/events.jsonl"):
        trial_id, reports = int(path.parent.name), read_events(path)
        hparams = next((report["hparams"] for report in reports if report["kind"] == "hparams"), None)
        if hparams is not None:
            experiment.reports[trial_id] = reports
            unfinished = summarize(trial_id, "UNFINISHED", hparams, reports, experiment.searcher)
            experiment.results.setdefault(trial_id, unfinished)
    return experiment


def read_cluster(source: str) -> Experiment:
    """The experiment that `exp:12` names, on the cluster of DET_MASTER. Raises `UserError` where it cannot be read."""
    from determined.experimental import Determined
    from rich.progress import track

    from storage.cluster_checkpoints import one_line_cluster_errors

    number = source.removeprefix("exp:")
    if not number.isdecimal():
        raise UserError(f"{source!r}: after exp: comes the number of the experiment")
    with one_line_cluster_errors(source, "experiment"):
        found = Determined().get_experiment(int(number))
        experiment = Experiment(found.name or source, found.config)
        experiment.on_cluster = True
        for trial in track(found.list_trials(), f"{source}: reading its trials"):
            reports = list(cluster_reports(trial))
            result = summarize(trial.id, trial.state.name, trial.hparams, reports, experiment.searcher)
            experiment.reports[trial.id], experiment.results[trial.id] = reports, result
    return experiment


def cluster_reports(trial: Any) -> Iterator[TrialEvent]:
    """What a trial told its master, as `trial.py` writes it; of its checkpoints, those that the cluster still has."""
    for kind in ("training", "validation"):
        for report in trial.iter_metrics(kind):
            metrics = {
                name: number for name, value in report.metrics.items() if (number := as_number(value)) is not None
            }
            yield {"kind": kind, "steps_completed": report.steps_completed, "metrics": metrics}
    for checkpoint in trial.list_checkpoints():
        steps = (checkpoint.metadata or {}).get("steps_completed")  # there, if one of this project's trials saved it
        if checkpoint.state is not None and checkpoint.state.name == "COMPLETED" and steps is not None:
            yield {"kind": "checkpoint", "steps_completed": int(steps), "uuid": checkpoint.uuid}


def as_number(value: Any) -> float | None:
    """A metric as a number: the master keeps as text what JSON has no number for, NaN and Infinity."""
    try:
        return value if isinstance(value, int | float) else float(value)
    except (TypeError, ValueError):
        return None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="a local experiment's folder, or a cluster's exp:NUMBER"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="default: report.html in that folder, or exp-NUMBER-report.html in this one"
    )
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    args = parse_arguments()
    source = args.experiment
    if source.startswith("exp:"):
        experiment, output = read_cluster(source), Path(f"{source.replace(':', '-')}-report.html")
    elif Path(source).is_dir():
        experiment, output = read_local(Path(source)), Path(source) / "report.html"
    else:
        raise UserError(f"{source!r} is neither a folder nor exp:NUMBER, an experiment of the cluster")
    output = Path(args.output or output)
    try:
        write_atomically(output, render(experiment))
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from error
    print(f"Report: {output}")
