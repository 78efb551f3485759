"""An experiment's metrics as Plotly figures: a heatmap over the grid's axes, and curves by step.

Colours are the page's CSS variables, `var(--ink)`. The page's script fills in what they are in light, dark and print.
"""

import itertools
import math
from collections.abc import Iterator
from html import escape
from typing import Any, NamedTuple

import plotly.graph_objects as go

from experiment.results import Experiment, TrialResult, short_name
from trial.events import TrialEvent, events_by_step

TITLES = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
ENDED = {"COMPLETED": "completed", "ERROR": "failed", "CANCELED": "canceled"}
REWARDS = ("eval_rewards/accuracies", "eval_rewards/margins")
SCALED = ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected")
MISSING = "\N{EN DASH}"
HUES = 6  # --h0 to --h5 in the style: distinct to colour-blind readers too
DASHES = ("solid", "7px,4px", "1.5px,3.5px", "9px,3px,2px,3px", "4px,2px")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down")
MAX_POINTS = 150  # of a curve, more than a panel's pixels show
ROW = 60  # height of a heatmap's row, in px
QUIET = {"showgrid": False, "zeroline": False, "fixedrange": True, "automargin": True, "title_standoff": 10}
QUIET |= {"ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0,0,0,0)"}  # only to keep the labels at a distance
LAYOUT = {
    "template": None,
    "autosize": True,
    "dragmode": False,
    "showlegend": False,
    "hoverdistance": 30,
    "margin": {"l": 4, "r": 16, "t": 8, "b": 4},
    "font": {"family": "inherit", "size": 12, "color": "var(--soft)"},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "hoverlabel": {"bgcolor": "var(--paper)", "bordercolor": "var(--soft)", "align": "left"}
    | {"font": {"family": "inherit", "size": 13, "color": "var(--ink)"}},
}


class Look(NamedTuple):
    """How a trial's curve is drawn: the number of its colour, and its dash and marker."""

    hue: int
    dash: str
    symbol: str


class Charts:
    """An experiment's trials in the order of the page, their metrics as text, and the figures that show them."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.searcher, self.axes = experiment, experiment.searcher, experiment.axes()
        self.best, self.ranked, self.ties = experiment.best(), experiment.ranked(), experiment.ties()
        others = [result for _, result in sorted(experiment.results.items()) if result not in self.ranked]
        self.trials = [*self.ranked, *others]
        self.beta = next((name for name in self.axes if short_name(name) in ("dpo_beta", "beta")), None)
        shown = dict.fromkeys([self.searcher.metric, *REWARDS, "eval_loss"])
        self.metrics = [metric for metric in shown if self.finite(metric)]
        has_grid = bool(self.axes) and math.prod(map(len, self.axes.values())) == len(experiment.planned())
        mapped = [self.searcher.metric, *REWARDS] if has_grid else []  # a random search has no grid
        self.mapped = [metric for metric in self.metrics if metric in mapped and self.scale(metric)]

    # Text.

    def finite(self, metric: str, trials: list[TrialResult] | None = None) -> list[float]:
        """Return the finite values of a metric, by default all trials'."""
        trials = self.trials if trials is None else trials
        return [value for trial in trials if is_finite(value := trial["best_metrics"].get(metric))]

    def title(self, metric: str) -> str:
        """Return what the page calls a metric."""
        name = metric.removeprefix("eval_")
        return TITLES.get(name, name)

    def format(self, metric: str, value: float | None) -> str:
        """Return a value of a metric with as many decimals as give the metric's largest value four digits."""
        sizes = [abs(size) for size in self.finite(metric) if size]
        decimals = 3 - math.floor(math.log10(max(sizes, default=1)))
        alike = 0 <= decimals <= 6 and min(sizes, default=1) * 10**decimals > 1  # else the smallest would be 0
        return MISSING if value is None else f"{value:.{decimals}f}" if alike else f"{value:.4g}"

    def format_of(self, trial: TrialResult, metric: str) -> str:
        """Return a trial's value of a metric as text."""
        return self.format(metric, trial["best_metrics"].get(metric))

    def state(self, trial: TrialResult) -> str:
        """Return a trial's state in words."""
        return ENDED.get(trial["state"], trial["state"].lower().replace("_", " "))

    def mark(self, trial: TrialResult) -> str:
        """Return `best`, `tied` (as good as the best) or the empty string."""
        return "best" if trial is self.best else "tied" if trial["trial_id"] in self.ties else ""

    def point(self, trial: TrialResult) -> tuple[str, ...]:
        """Return a trial's values of the hyperparameters that vary."""
        return tuple(self.experiment.value(trial["hparams"], name) for name in self.axes)

    def hover(self, trial: TrialResult) -> str:
        """Return what pointing at a trial shows, as Plotly's HTML."""
        values = zip(map(short_name, self.axes), self.point(trial), strict=True)
        lines = [f"<b>trial {trial['trial_id']}</b>", *(escape(" ".join(pair), quote=False) for pair in values)]
        return "<br>".join(lines)

    def look(self, trial: TrialResult) -> Look:
        """Return a trial's look: its colour tells the value of the first axis, dash and marker those of the others."""
        places = [(values.index(v), len(values)) for v, values in zip(self.point(trial), self.axes.values(), strict=True)]
        (hue, _), *others = places or [(0, 1)]
        combination = hue // HUES  # where colours repeat, dashes help
        for index, length in others:
            combination = combination * length + index
        return Look(hue % HUES, DASHES[combination % len(DASHES)], SYMBOLS[combination % len(SYMBOLS)])

    # The grid.

    def scaled_by_beta(self, metric: str) -> bool:
        """Return whether DPO's beta is a factor of the metric, so that only trials of the same beta compare by it."""
        return self.beta is not None and metric.removeprefix("eval_") in SCALED

    def scale(self, metric: str, like: TrialResult | None = None) -> tuple[float, float] | None:
        """Return the values with the weakest and the strongest colour: the worst and the best of completed trials.

        If only trials of the same beta compare, those count that have the beta of `like`. Accuracies are coloured over
        at least a tenth: one more pair must not look like a landslide.
        """
        trials = [trial for trial in self.trials if trial["state"] == "COMPLETED"]
        if like is not None and self.beta is not None and self.scaled_by_beta(metric):
            place = list(self.axes).index(self.beta)
            trials = [trial for trial in trials if self.point(trial)[place] == self.point(like)[place]]
        values = self.finite(metric, trials)
        if not values:
            return None
        if self.searcher.smaller_is_better and metric == self.searcher.metric:
            return max(values), min(values)
        least = max(values) - 0.1 if metric.endswith("accuracies") else max(values)
        return min(*values, least), max(values)

    def shade(self, metric: str, trial: TrialResult) -> float | None:
        """Return the strength of a cell's colour, from 0 at the worst value to 1 at the best; None for no colour."""
        value, scale = trial["best_metrics"].get(metric), self.scale(metric, like=trial)
        if trial["state"] != "COMPLETED" or not is_finite(value) or scale is None:
            return None
        worst, best = scale
        return abs(value - worst) / abs(best - worst) if worst != best else 0.5

    def heatmaps(self, metric: str) -> Iterator[tuple[str, go.Figure]]:
        """Yield a metric's heatmap for each combination of values of the third and further axes, with that as label.

        The first axis goes down, the second across; a single one goes across.
        """
        names = list(self.axes)
        down, across, *others = names if len(names) > 1 else ["", *names]
        rows, columns = self.axes.get(down, [self.title(metric)]), self.axes[across]
        trials = {self.point(trial): trial for trial in self.trials}
        for rest in itertools.product(*(self.axes[name] for name in others)):
            grid = [[trials.get((row, column, *rest)[-len(names) :]) for column in columns] for row in rows]
            label = ", ".join(f"{short_name(name)} {value}" for name, value in zip(others, rest, strict=True))
            yield label, self.heatmap(metric, grid, (short_name(down), rows), (short_name(across), columns))

    def heatmap(
        self,
        metric: str,
        grid: list[list[TrialResult | None]],
        down: tuple[str, list[str]],
        across: tuple[str, list[str]],
    ) -> go.Figure:
        """Return the heatmap of a grid of trials, None where one has not started; each axis is a title and values."""
        figure = go.Figure(layout={**LAYOUT, "height": ROW * len(grid) + 56})
        cells = [(x, y, trial) for y, row in enumerate(grid) for x, trial in enumerate(row)]
        figure.add_heatmap(
            z=[[trial and self.shade(metric, trial) for trial in row] for row in grid],
            hovertext=[[self.cell_hover(trial) for trial in row] for row in grid],
            customdata=[[trial and trial["trial_id"] for trial in row] for row in grid],
            **{"zmin": 0, "zmax": 1, "xgap": 3, "ygap": 3, "showscale": False, "hoverongaps": True},
            colorscale=[[0, "var(--weak)"], [1, "var(--strong)"]],
            hovertemplate="%{hovertext}<extra></extra>",
        )
        for x, y, trial in cells:
            shade, mark = trial and self.shade(metric, trial), trial and self.mark(trial)
            line = {"color": "var(--line)", "width": 1, "dash": "dot"} if shade is None else {"width": 0}
            line = {"color": "var(--ink)", "width": 3 if mark == "best" else 1} if mark else line
            figure.add_shape(
                **{"x0": x - 0.48, "x1": x + 0.48, "y0": y - 0.47, "y1": y + 0.47, "line": line},
                name=str(trial["trial_id"]) if trial else None,
                label={"text": self.cell(metric, trial), "font": {"color": f"var(--{'soft' if shade is None else 'ink'})"}},
            )
        for update, (title, values) in ((figure.update_xaxes, across), (figure.update_yaxes, down)):
            ticks = {"tickvals": list(range(len(values))), "ticktext": [escape(v, quote=False) for v in values]}
            update(**QUIET, **ticks, range=[-0.5, len(values) - 0.5], title_text=escape(title, quote=False))
        figure.update_xaxes(side="top").update_yaxes(autorange="reversed")
        return figure

    def cell(self, metric: str, trial: TrialResult | None) -> str:
        """Return what stands in a cell."""
        if trial is None:
            return "not started"
        text = self.format_of(trial, metric) if trial["state"] == "COMPLETED" else self.state(trial)
        text = f"<b>{text}</b>" if self.mark(trial) == "best" else text
        return f"<span style='font-size: 15px'>{text}</span><br>trial {trial['trial_id']}"

    def cell_hover(self, trial: TrialResult | None) -> str:
        """Return what pointing at a cell shows."""
        if trial is None:
            return "not started"
        metrics = (f"{self.title(metric)} {self.format_of(trial, metric)}" for metric in self.metrics)
        return "<br>".join([self.hover(trial), *metrics, self.state(trial)])

    # The curves.

    def curves(self, kind: str, metric: str) -> go.Figure | None:
        """Return a metric's curves, the best trial's thick and on top; None if no event of the kind has the metric.

        A value that is not finite leaves a gap.
        """
        figure = go.Figure(layout={**LAYOUT, "height": 236})
        steps = max((trial["steps_completed"] for trial in self.trials), default=0) or 1
        shown = []
        for trial in reversed(self.trials):
            points = series(self.experiment.events.get(trial["trial_id"], []), kind, metric)
            finite = [value for _, value in points if is_finite(value)]
            if not finite:
                continue
            shown += finite
            look, width = self.look(trial), 2.8 if trial is self.best else 1.3
            colour = f"var(--h{look.hue})"
            # Of a training curve's points only one between gaps would be missed: it has no line.
            marker = {"size": width, "color": colour}
            if kind == "validation":
                marker |= {"size": 8, "symbol": look.symbol, "line": {"width": 1, "color": "var(--paper)"}}
            figure.add_scatter(
                x=[step for step, _ in points],
                y=[value if is_finite(value) else None for _, value in points],
                **{"mode": "lines+markers", "cliponaxis": False, "name": str(trial["trial_id"])},
                line={"color": colour, "width": width, "dash": look.dash},
                marker=marker,
                meta=self.hover(trial),
                hovertemplate=f"%{{meta}}<br>step %{{x}}<br>{escape(self.title(metric), quote=False)} %{{y:.4g}}<extra></extra>",
            )
        if not shown:
            return None
        step = 1 if steps < 6 else None  # whole numbers only
        figure.update_xaxes(**QUIET, range=[0, steps], nticks=6, dtick=step, title_text="step")
        figure.update_yaxes(**QUIET, range=range_around(shown), nticks=6, exponentformat="e")
        figure.update_yaxes(showgrid=True, gridcolor="var(--line)")
        return figure


def is_finite(value: Any) -> bool:
    """Return whether a metric is a finite number; None and NaN are not."""
    return isinstance(value, int | float) and math.isfinite(value)


def series(events: list[TrialEvent], kind: str, metric: str) -> list[tuple[int, float]]:
    """Return a metric by step, evenly thinned to MAX_POINTS; a step done twice, after a resume, counts once."""
    having = [event for event in events if metric in event.get("metrics", {})]
    points = [(step, event["metrics"][metric]) for step, event in reversed(events_by_step(having, kind).items())]
    return points[:: len(points) // MAX_POINTS + 1][::-1]


def range_around(values: list[float]) -> list[float] | None:
    """Return a y axis for values that are equal but for rounding, which Plotly would magnify; None for others."""
    low, high = min(values), max(values)
    pad = abs(high) / 2 or 0.5
    return [low - pad, high + pad] if high - low <= 1e-6 * abs(high) else None
