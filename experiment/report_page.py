"""The report page: what an experiment tried, which trial won and by how much, what to do with it, and its numbers."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from config.search import describe_search
from experiment.charts import TrialView, choose_look, is_finite, plot_curves
from experiment.heatmaps import Heatmaps
from experiment.next_steps import next_steps
from experiment.results import Experiment, TrialResult, flatten, short_name
from experiment.scatters import Scatters
from experiment.settings import rank_settings, settings_verdict
from experiment.verdicts import Verdict, interval
from experiment.what_happened import what_happened
from pages.render import render_page
from pages.terminal import plural

TITLES = {"loss": "loss", "preference_loss": "preference loss"}
TITLES |= {"rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
ENDED = {"COMPLETED": "completed", "ERROR": "failed", "CANCELED": "canceled"}
REWARDS = ("eval_preference_loss", "eval_rewards/accuracies", "eval_rewards/margins")
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
        self.verdict, self.settings = Verdict(experiment), rank_settings(experiment)
        ranked = self.verdict.ranked
        self.results = [*ranked, *(r for _, r in sorted(experiment.results.items()) if r not in ranked)]
        shown = dict.fromkeys([self.searcher.metric, *REWARDS, "eval_loss"])
        self.metrics = [metric for metric in shown if self.values(metric)]
        self.trials = [self.view(result, ranked) for result in self.results]
        self.ranked = self.trials[: len(ranked)]
        self.best = next(iter(self.ranked), None)
        drawn = [m for m in self.metrics if m in (self.searcher.metric, *REWARDS)]
        self.heatmaps, self.scatters = Heatmaps(self, drawn), Scatters(self, drawn)

    def view(self, result: TrialResult, ranked: list[TrialResult]) -> TrialView:
        """Return a trial as the page shows it."""
        values = self.experiment.values(result["hparams"])
        if self.experiment.draws:
            places = [(sorted(self.experiment.results).index(result["trial_id"]), len(self.results))]
        else:
            places = [(axis.index(value), len(axis)) for value, axis in zip(values, self.axes.values(), strict=True)]
        scores = [other["best_metrics"][self.searcher.metric] for other in ranked]
        rank = scores.index(result["best_metrics"][self.searcher.metric]) + 1 if result in ranked else None
        mark = "best" if result in ranked[:1] else "tied" if result["trial_id"] in self.verdict.alike else ""
        state = self.experiment.state(result)
        state = ENDED.get(state, state.lower().replace("_", " "))
        varied = [f"{short_name(name)} {value}" for name, value in zip(self.axes, values, strict=True)]
        title = "<br>".join([f"<b>trial {result['trial_id']}</b>", *(escape(line, quote=False) for line in varied)])
        metrics = [f"{escape(self.title(m), quote=False)} {self.format(m, result)}" for m in self.metrics]
        stands = [", ".join(self.against_best(result))] if result["trial_id"] in self.verdict.behind else []
        details = "<br>".join([title, *metrics, *stands, state])
        look, place = choose_look(places), str(rank or MISSING)
        return TrialView(result["trial_id"], result, tuple(values), state, place, mark, look, title, details)

    def title(self, metric: str) -> str:
        """Return what the page calls a metric."""
        return TITLES.get(name := metric.removeprefix("eval_"), name)

    def values(self, metric: str) -> list[float]:
        """Return the trials' finite values of a metric."""
        return [value for result in self.results if is_finite(value := result["best_metrics"].get(metric))]

    def format(self, metric: str, of: TrialResult | float | None) -> str:
        """Return a value of a metric, or a trial's, with as many decimals as give the largest value four digits."""
        value = of["best_metrics"].get(metric) if isinstance(of, dict) else of
        sizes = [abs(size) for size in self.values(metric) if size]
        decimals = 3 - math.floor(math.log10(max(sizes, default=1)))
        alike = 0 <= decimals <= 6 and min(sizes, default=1) * 10**decimals > 1  # else the smallest would be 0
        return MISSING if value is None else f"{value:.{decimals}f}" if alike else f"{value:.4g}"

    def introduction(self) -> str:
        """Say what was tried and how it is judged."""
        ranges, said = self.experiment.ranges, {name: values for name, values in self.axes.items() if values}
        said = {name: [f"{v[0]} to {v[-1]}"] if name in ranges else v for name, v in said.items()}
        varied = " and ".join(f"{short_name(name)} ({', '.join(values)})" for name, values in said.items())
        trials = f"{self.count} of {self.experiment.script}" + (varied and f" over {varied}")
        better = "smaller" if self.searcher.smaller_is_better else "larger"
        judged = f"{trials}, judged by {self.searcher.metric} ({better} is better)."
        return " ".join([judged, *describe_search(self.experiment.config)])

    def progress(self) -> str:
        """Say how many trials are in each state."""
        states = Counter(trial.state for trial in self.trials)
        completed = f"{states.pop('completed', 0)} of {self.count} completed"
        said = ", ".join([completed, *(f"{number} {state}" for state, number in states.items())]) + "."
        return said + (f" To go on: det e activate {self.experiment.number}" if self.experiment.paused else "")

    def interval(self, metric: str, result: TrialResult) -> str:
        """Return the 95% interval of a trial's metric; nothing without pairs."""
        found = interval(self.experiment, result, metric)
        return found.interval() if found else ""

    def pairs(self) -> str:
        """Return what the best trial's intervals are over: `190 held-out pairs`."""
        best = self.verdict.best
        return plural(len(self.experiment.evaluations[best["trial_id"]].rows), "held-out pair") if best else ""

    def headline(self) -> str:
        """Say which trial is best, and which cannot be told apart from it."""
        if self.expected == 1:
            return "Its best checkpoint"
        ended = sum(result["state"] in ENDED for result in self.results)
        return self.verdict.headline(so_far=ended < self.expected)

    def sureness(self) -> Iterator[str]:
        """Say how far the best trial is ahead, what an interval is over, and how settings compare over seeds."""
        metric, best = self.searcher.metric, self.verdict.best
        if not best:
            return
        said = self.verdict.tied()
        apart = [*self.verdict.ties, *self.verdict.stopped]
        for behind in [result for result in self.verdict.ranked[1:] if result["trial_id"] not in apart][:1]:
            gap = self.verdict.behind.get(behind["trial_id"])
            size = gap.value if gap else abs(best["best_metrics"][metric] - behind["best_metrics"][metric])
            which = f"trial {behind['trial_id']} ({self.experiment.describe_values(behind['hparams'])})"
            over = f" ({gap.interval()}, over the same {plural(gap.count, 'held-out pair')})" if gap else ""
            said.append(f"Next is {which} with {self.format(metric, behind)}: {size:.3g} behind{over}.")
        yield from filter(None, [" ".join(said)])
        yield from self.verdict.remarks()
        yield from settings_verdict(self.experiment, self.settings, lambda value: self.format(metric, value))

    def against_best(self, result: TrialResult) -> tuple[str, str]:
        """Return how a trial stands against the best one, and the interval of the difference; nothing without pairs."""
        trial_id = result["trial_id"]
        gap = self.verdict.behind.get(trial_id)
        if trial_id in self.verdict.stopped:
            return "stopped early", ""
        if gap is None:
            return "best" if result is self.verdict.best else "", ""
        words = "cannot be told apart" if trial_id in self.verdict.alike else "worse"
        words = "better on common pairs" if trial_id in self.verdict.better else words
        return words, f"{gap.interval()} behind"

    def scaled_by_beta(self, metric: str) -> bool:
        """Return whether DPO's beta is a factor of the metric, so that only trials of the same beta compare by it."""
        return bool(self.beta) and metric.removeprefix("eval_") in SCALED

    def encoding(self) -> str:
        """Say what a curve's colour, dash, marker and thickness mean."""
        first, *others = map(short_name, self.axes)
        said = f"Colour is {first}" + (f", dash and marker are {' and '.join(others)}" if others else "") + "."
        if self.experiment.draws:
            said = "Each trial has a colour, dash and marker."
        if len({trial.look for trial in self.trials}) < len(self.trials):
            said += " Some share a look: point at one to see which it is."
        return said + (f" The thick line is trial {self.best.id}." if self.best else "")

    def happened(self) -> list[str]:
        """Return what happened, in sentences."""
        return what_happened(self.experiment)

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
