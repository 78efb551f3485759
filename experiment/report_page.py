"""The report page: what an experiment tried, which trial won and by how much, what to do with it, and its numbers."""

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from experiment.charts import TrialView, choose_look, is_finite, plot_curves, plot_heatmap
from experiment.next_steps import next_steps
from experiment.results import Experiment, TrialResult, flatten, short_name
from pages.render import render_page
from pages.terminal import plural

TITLES = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
ENDED = {"COMPLETED": "completed", "ERROR": "failed", "CANCELED": "canceled"}
REWARDS = ("eval_rewards/accuracies", "eval_rewards/margins")
SCALED = ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected")
MISSING = "\N{EN DASH}"


def render(experiment: Experiment) -> str:
    """Return the page as HTML."""
    context = {"experiment": experiment, "page": Page(experiment), "metric": experiment.searcher.metric}
    context |= {"short_name": short_name, "next_steps": next_steps, "plotly": Markup(get_plotlyjs())}
    return render_page(Path(__file__).with_name("report.html.jinja"), experiment.name, **context)


class Page:
    """What the template says and shows, in the order of the page."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.searcher = experiment, experiment.searcher
        self.planned, self.axes = experiment.plan_trials(), experiment.axes()
        self.expected = max(len(self.planned), experiment.config["searcher"].get("max_trials") or 0)
        self.count = plural(self.expected, "trial")
        self.beta = next((name for name in self.axes if short_name(name) in ("dpo_beta", "beta")), "")
        ranked = experiment.rank_trials()
        self.results = [*ranked, *(r for _, r in sorted(experiment.results.items()) if r not in ranked)]
        shown = dict.fromkeys([self.searcher.metric, *REWARDS, "eval_loss"])
        self.metrics = [metric for metric in shown if self.values(metric)]
        self.trials = [self.view(result, ranked) for result in self.results]
        self.ranked = self.trials[: len(ranked)]
        self.best = next(iter(self.ranked), None)
        has_grid = bool(self.axes) and math.prod(map(len, self.axes.values())) == len(self.planned)
        mapped = [self.searcher.metric, *REWARDS] if has_grid else []  # a random search has no grid
        self.mapped = [metric for metric in self.metrics if metric in mapped and self.shades(metric)[0]]

    def view(self, result: TrialResult, ranked: list[TrialResult]) -> TrialView:
        """Return a trial as the page shows it."""
        values = self.experiment.values(result["hparams"])
        places = [(axis.index(value), len(axis)) for value, axis in zip(values, self.axes.values(), strict=True)]
        scores = [other["best_metrics"][self.searcher.metric] for other in ranked]
        rank = scores.index(result["best_metrics"][self.searcher.metric]) + 1 if result in ranked else None
        mark = "best" if result in ranked[:1] else "tied" if rank == 1 else ""
        state = ENDED.get(result["state"], result["state"].lower().replace("_", " "))
        varied = [f"{short_name(name)} {value}" for name, value in zip(self.axes, values, strict=True)]
        title = "<br>".join([f"<b>trial {result['trial_id']}</b>", *(escape(line, quote=False) for line in varied)])
        metrics = [f"{escape(self.title(m), quote=False)} {self.format(m, result)}" for m in self.metrics]
        details = "<br>".join([title, *metrics, state])
        look, place = choose_look(places), str(rank or MISSING)
        return TrialView(result["trial_id"], result, tuple(values), state, place, mark, look, title, details)

    def title(self, metric: str) -> str:
        """Return what the page calls a metric."""
        return TITLES.get(name := metric.removeprefix("eval_"), name)

    def values(self, metric: str) -> list[float]:
        """Return the trials' finite values of a metric."""
        return [value for result in self.results if is_finite(value := result["best_metrics"].get(metric))]

    def format(self, metric: str, of: TrialResult | float) -> str:
        """Return a value of a metric, or a trial's, with as many decimals as give the largest value four digits."""
        value = of["best_metrics"].get(metric) if isinstance(of, dict) else of
        sizes = [abs(size) for size in self.values(metric) if size]
        decimals = 3 - math.floor(math.log10(max(sizes, default=1)))
        alike = 0 <= decimals <= 6 and min(sizes, default=1) * 10**decimals > 1  # else the smallest would be 0
        return MISSING if value is None else f"{value:.{decimals}f}" if alike else f"{value:.4g}"

    def introduction(self) -> str:
        """Say what was tried and how it is judged."""
        varied = " and ".join(f"{short_name(name)} ({', '.join(values)})" for name, values in self.axes.items())
        trials = f"{self.count} of {self.experiment.script}" + (varied and f" over {varied}")
        better = "smaller" if self.searcher.smaller_is_better else "larger"
        return f"{trials}, judged by {self.searcher.metric} ({better} is better)."

    def progress(self) -> str:
        """Say how many trials are in each state."""
        states = Counter(trial.state for trial in self.trials)
        completed = f"{states.pop('completed', 0)} of {self.count} completed"
        return ", ".join([completed, *(f"{number} {state}" for state, number in states.items())]) + "."

    def headline(self) -> str:
        """Say which trial is best."""
        if self.expected == 1:
            return "Its best checkpoint"
        ended = sum(result["state"] in ENDED for result in self.results)
        return f"Trial {self.results[0]['trial_id']} is best" + (" so far" if ended < self.expected else "")

    def verdict(self) -> str:
        """Say how far the best trial is ahead, and of which."""
        ids, said = [str(trial.id) for trial in self.trials if trial.mark == "tied"], []
        if ids:
            as_good = f"Trials {', '.join(ids[:-1])} and {ids[-1]} are" if ids[1:] else f"Trial {ids[0]} is"
            said.append(f"{as_good} as good; the first is taken.")
        for behind in [trial.result for trial in self.ranked if not trial.mark][:1]:
            best, next_best = (r["best_metrics"][self.searcher.metric] for r in (self.results[0], behind))
            which = f"trial {behind['trial_id']} ({self.experiment.describe_values(behind['hparams'])})"
            value, gap = self.format(self.searcher.metric, behind), abs(best - next_best)
            said.append(f"Next is {which} with {value}: {gap:.3g} behind.")
        return " ".join(said)

    def scaled_by_beta(self, metric: str) -> bool:
        """Return whether DPO's beta is a factor of the metric, so that only trials of the same beta compare by it."""
        return bool(self.beta) and metric.removeprefix("eval_") in SCALED

    def shades(self, metric: str) -> tuple[dict[int, float], str, str]:
        """Return how strong the colour of each completed trial is, from 0 to 1, and the legend for 0 and for 1.

        If beta scales the metric, the trials of each beta have a scale of their own. Accuracies are coloured over at
        least a tenth: one more pair must not look like a landslide.
        """
        groups: dict[str, dict[int, float]] = defaultdict(dict)
        scaled = self.scaled_by_beta(metric)
        for result in self.results:
            value = result["best_metrics"].get(metric)
            if result["state"] == "COMPLETED" and is_finite(value):
                beta = self.experiment.value(result["hparams"], self.beta) if scaled else ""
                groups[beta][result["trial_id"]] = value
        shades: dict[int, float] = {}
        worst = best = math.nan
        low, high = ("worst", "best") if metric == self.searcher.metric else ("low", "high")
        for group in groups.values():
            worst, best = min(group.values()), max(group.values())
            if metric == self.searcher.metric and self.searcher.smaller_is_better:
                worst, best = best, worst
            elif metric.endswith("accuracies") and worst > best - 0.1:
                worst, low = best - 0.1, ""  # no trial has this value
            shades |= {i: (v - worst) / (best - worst) if worst != best else 0.5 for i, v in group.items()}
        if scaled:
            return shades, low, f"{high}, each {short_name(self.beta)} by itself"
        return shades, f"{low} {self.format(metric, worst)}".strip(), f"{self.format(metric, best)} {high}"

    def heatmaps(self, metric: str) -> Iterator[tuple[str, go.Figure]]:
        """Yield a metric's heatmap for each combination of values of the third and further axes, with that as label.

        The first axis goes down, the second across; a single one goes across.
        """
        names, trials = list(self.axes), {trial.values: trial for trial in self.trials}
        down, across, *others = names if len(names) > 1 else ["", *names]
        rows, columns = self.axes.get(down, [self.title(metric)]), self.axes[across]
        shades, *_ = self.shades(metric)
        texts = {r["trial_id"]: self.format(metric, r) for r in self.results if r["state"] == "COMPLETED"}
        for rest in itertools.product(*(self.axes[name] for name in others)):
            grid = [[trials.get((row, column, *rest)[-len(names) :]) for column in columns] for row in rows]
            label = ", ".join(f"{short_name(name)} {value}" for name, value in zip(others, rest, strict=True))
            yield label, plot_heatmap(grid, shades, texts, (short_name(down), rows), (short_name(across), columns))

    def encoding(self) -> str:
        """Say what a curve's colour, dash, marker and thickness mean."""
        first, *others = map(short_name, self.axes)
        said = f"Colour is {first}" + (f", dash and marker are {' and '.join(others)}" if others else "") + "."
        if len({trial.look for trial in self.trials}) < len(self.trials):
            said += " Some share a look: point at one to see which it is."
        return said + (f" The thick line is trial {self.best.id}." if self.best else "")

    def charts(self) -> Iterator[tuple[str, list[tuple[str, go.Figure]]]]:
        """Yield each metric that was reported, with its curves in training and evaluation and their titles."""
        kinds = {"Training": ("training", ""), "Evaluation, held out": ("validation", "eval_")}
        for metric in dict.fromkeys([*TITLES, self.searcher.metric.removeprefix("eval_")]):
            panels = []
            for title, (kind, prefix) in kinds.items():
                figure = plot_curves(self.trials, self.experiment.events, kind, prefix + metric, self.title(metric))
                panels += [(title, figure)] if figure else []
            if panels:
                yield metric, panels

    def constants(self) -> Iterator[tuple[str, str]]:
        """Yield the dotted name and the value of each hyperparameter that does not vary."""
        for name, value in flatten(self.planned[0] if self.planned else {}):
            if name not in self.axes and not name.endswith("token"):  # pages are sent to others
                yield name, value if isinstance(value, str) else json.dumps(value)
