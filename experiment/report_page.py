"""The report page: what an experiment tried, which trial won and by how much, what to do with it, and all the numbers."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from experiment.charts import ENDED, MISSING, TITLES, Charts
from experiment.next_steps import next_steps
from experiment.results import Experiment, TrialResult, short_name
from pages.render import render_page

SCALED_BY_BETA = "Scaled by beta: comparable between trials of the same beta only."
# The SVG paths of Plotly's symbols, for the keys.
MARKERS = {
    "circle": "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z",
    "square": "M-3.2,-3.2h6.4v6.4h-6.4z",
    "diamond": "M0,-4.8l4.8,4.8l-4.8,4.8l-4.8,-4.8z",
    "triangle-up": "M0,-4.5l4.5,8h-9z",
    "triangle-down": "M0,4.5l-4.5,-8h9z",
}


def render(experiment: Experiment) -> str:
    """Return the page as HTML."""
    return render_page(
        Path(__file__).with_name("report.html.jinja"),
        experiment.name,
        experiment=experiment,
        page=Page(experiment),
        metric=experiment.searcher.metric,
        short_name=short_name,
        scaled_by_beta=SCALED_BY_BETA,
        markers=MARKERS,
        plotly=Markup(get_plotlyjs()),
    )


class Page(Charts):
    """What the template says, beside the charts, in the order of the page."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self.planned = experiment.planned()
        self.expected = max(len(self.planned), experiment.config["searcher"].get("max_trials") or 0)

    def introduction(self) -> str:
        """Say what was tried and how it is judged."""
        varied = " and ".join(f"{short_name(name)} ({', '.join(values)})" for name, values in self.axes.items())
        trials = f"{count(self.expected, 'trial')} of {self.experiment.script}" + (varied and f" over {varied}")
        better = "smaller" if self.searcher.smaller_is_better else "larger"
        return f"{trials}, judged by {self.searcher.metric} ({better} is better)."

    def progress(self) -> str:
        """Say how many trials are in each state."""
        states = Counter(map(self.state, self.trials))
        completed = f"{states.pop('completed', 0)} of {count(self.expected, 'trial')} completed"
        return ", ".join([completed, *(f"{number} {state}" for state, number in states.items())]) + "."

    def headline(self) -> str:
        """Say which trial is best."""
        if self.expected == 1:
            return "Its best checkpoint"
        ended = sum(trial["state"] in ENDED for trial in self.trials)
        return f"Trial {self.best['trial_id']} is best" + (" so far" if ended < self.expected else "")

    def verdict(self) -> str:
        """Say how far the best trial is ahead, and of which."""
        metric, said = self.searcher.metric, []
        if self.ties:
            *others, last = map(str, self.ties)
            as_good = f"Trials {', '.join(others)} and {last} are" if others else f"Trial {last} is"
            said.append(f"{as_good} as good; the first is taken.")
        for behind in self.ranked[1 + len(self.ties) :][:1]:
            gap = abs(self.best["best_metrics"][metric] - behind["best_metrics"][metric])
            which = f"trial {behind['trial_id']} ({self.experiment.varied(behind['hparams'])})"
            said.append(f"Next is {which} with {self.format_of(behind, metric)}: {gap:.3g} behind.")
        return " ".join(said)

    def step(self) -> int | None:
        """Return the step at which the best checkpoint was saved."""
        return self.experiment.step_of(self.best)

    def next_steps(self) -> Iterator[tuple[str, str | None]]:
        """Yield what can be done with the best model, each with its command."""
        return next_steps(self.experiment)

    def ends(self, metric: str) -> tuple[str, str]:
        """Return what stands at the two ends of a heatmap's colours."""
        if self.scaled_by_beta(metric):
            return "low", f"high, each {short_name(self.beta)} by itself"
        weak, strong = (self.format(metric, value) for value in self.scale(metric))
        return (f"worst {weak}", f"{strong} best") if metric == self.searcher.metric else (f"low {weak}", f"{strong} high")

    def encoding(self) -> str:
        """Say what a curve's colour, dash, marker and thickness mean."""
        first, *others = map(short_name, self.axes)
        said = f"Colour is {first}" + (f", dash and marker are {' and '.join(others)}." if others else ".")
        if len({self.look(trial) for trial in self.trials}) < len(self.trials):
            said += " Some share a look: point at one to see which it is."
        return said + (f" The thick line is trial {self.best['trial_id']}." if self.best else "")

    def charts(self) -> Iterator[tuple[str, list[tuple[str, go.Figure]]]]:
        """Yield each metric that was reported, with its curves, and their titles, in training and evaluation."""
        for metric in dict.fromkeys([*TITLES, self.searcher.metric.removeprefix("eval_")]):
            training, evaluation = self.curves("training", metric), self.curves("validation", f"eval_{metric}")
            panels = [("Training", training), ("Evaluation, held out", evaluation)]
            if training or evaluation:
                yield metric, [(title, figure) for title, figure in panels if figure]

    def rank(self, trial: TrialResult) -> str:
        """Return a trial's rank, which trials that are equally good share."""
        if trial not in self.ranked:
            return MISSING
        scores = [ranked["best_metrics"][self.searcher.metric] for ranked in self.ranked]
        return str(scores.index(trial["best_metrics"][self.searcher.metric]) + 1)

    def constants(self) -> Iterator[tuple[str, str]]:
        """Yield the dotted name and the value of each hyperparameter that does not vary, but for tokens."""

        def leaves(level: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
            for name, value in level.items():
                if isinstance(value, dict) and value:
                    yield from leaves(value, f"{prefix}{name}.")
                elif prefix + name not in self.axes and not name.endswith("token"):  # pages are sent to others
                    yield prefix + name, value if isinstance(value, str) else json.dumps(value)

        return leaves(self.planned[0] if self.planned else {})


def count(number: int, noun: str) -> str:
    """Return `1 trial` or `2 trials`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
