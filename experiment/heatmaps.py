"""The heatmaps of a grid's metrics: a cell for each trial, or for each setting where trials differ in their seeds."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from experiment.charts import Cell, TrialView, plot_heatmap
from experiment.results import short_name
from experiment.settings import SEED, format_mean

if TYPE_CHECKING:
    from experiment.report_page import Page

NARROW, WIDE = (64, 88), (120, 136)  # a cell's least and usual width in pixels: of a value, and of a mean ± spread

Values = tuple[str, ...]  # of the axes of the heatmaps, all but the seed


class Heatmaps:
    """What the page shows of its grid. `metrics` are those with a heatmap: none if the trials are no grid."""

    def __init__(self, page: "Page", metrics: list[str]) -> None:
        self.page, (ranked, alike) = page, page.settings
        self.axes = {name: values for name, values in page.axes.items() if name != SEED}
        is_grid = (
            bool(self.axes)
            and not page.experiment.draws
            and math.prod(map(len, page.axes.values())) == len(page.planned)
        )
        self.seeds = SEED in page.axes
        self.narrow, self.wide = WIDE if self.seeds else NARROW
        self.views: dict[Values, list[TrialView]] = defaultdict(list)
        for trial in sorted(page.trials, key=lambda trial: trial.id):
            named = zip(page.axes, trial.values, strict=True)
            self.views[tuple(value for name, value in named if name != SEED)].append(trial)
        self.marks = {setting.values: "tied" for setting in alike or []}
        self.marks |= {setting.values: "best" for setting in ranked[:1]}
        self.metrics = [metric for metric in metrics if self.shades(metric)[0]] if is_grid else []

    def caption(self) -> str:
        """Say what a cell is, and what an outline means."""
        page, metric = self.page, self.page.searcher.metric
        said = f"Each trial at its best checkpoint by {metric}."
        if self.seeds:
            said += " A cell is the mean over n seeds ± their standard deviation."
        if page.best is None:
            return said
        tied = "tied" in self.marks.values() if self.seeds else bool(page.verdict.alike)
        apart = self.seeds or page.verdict.behind
        which = "those that cannot be told apart from it" if apart else "those tied with it"
        return f"{said} Outlined: the best" + (f"; thinly, {which}." if tied else ".")

    def scores(self, values: Values, metric: str) -> list[float]:
        """Return the finite values of a metric of the completed trials of a cell."""
        completed = [view.result for view in self.views[values] if view.result["state"] == "COMPLETED"]
        found = [result["best_metrics"].get(metric, math.nan) for result in completed]
        return [value for value in found if math.isfinite(value)]

    def shades(self, metric: str) -> tuple[dict[Values, float], str, str]:
        """Return how strong the colour of each cell is, from 0 to 1, and the legend for 0 and for 1.

        If beta scales the metric, the trials of each beta have a scale of their own. Accuracies are coloured over at
        least a tenth: one more pair must not look like a landslide.
        """
        page = self.page
        groups: dict[str, dict[Values, float]] = defaultdict(dict)
        scaled = page.scaled_by_beta(metric)
        for values in self.views:
            if scores := self.scores(values, metric):
                beta = dict(zip(self.axes, values, strict=True))[page.beta] if scaled else ""
                groups[beta][values] = fmean(scores)
        shades: dict[Values, float] = {}
        worst = best = math.nan
        low, high = ("worst", "best") if metric == page.searcher.metric else ("low", "high")
        for group in groups.values():
            worst, best = min(group.values()), max(group.values())
            if metric == page.searcher.metric and page.searcher.smaller_is_better:
                worst, best = best, worst
            elif metric.endswith("accuracies") and worst > best - 0.1:
                worst, low = best - 0.1, ""  # no trial has this value
            shades |= {i: (v - worst) / (best - worst) if worst != best else 0.5 for i, v in group.items()}
        if scaled:
            return shades, low, f"{high}, each {short_name(page.beta)} by itself"
        return shades, f"{low} {page.format(metric, worst)}".strip(), f"{page.format(metric, best)} {high}"

    def figures(self, metric: str) -> Iterator[tuple[str, go.Figure]]:
        """Yield a metric's heatmap for each combination of values of the third and further axes, with that as label.

        The first axis goes down, the second across; a single one goes across.
        """
        names, shades = list(self.axes), self.shades(metric)[0]
        down, across, *others = names if len(names) > 1 else ["", *names]
        rows, columns = self.axes.get(down, [self.page.title(metric)]), self.axes[across]
        for rest in itertools.product(*(self.axes[name] for name in others)):
            grid = [
                [self.cell((row, column, *rest)[-len(names) :], metric, shades) for column in columns] for row in rows
            ]
            label = ", ".join(f"{short_name(name)} {value}" for name, value in zip(others, rest, strict=True))
            yield label, plot_heatmap(grid, (short_name(down), rows), (short_name(across), columns))

    def cell(self, values: Values, metric: str, shades: dict[Values, float]) -> Cell | None:
        """Return what the cell at these values shows; None if none of its trials has started."""
        views, shade = self.views.get(values, []), shades.get(values)
        if not views:
            return None
        first, ids = views[0], " ".join(str(view.id) for view in views)
        if not self.seeds:
            completed = first.result["state"] == "COMPLETED"
            text = self.page.format(metric, first.result) if completed else first.state
            return Cell(ids, text, f"trial {first.id}", first.details, first.mark, shade)
        scores = self.scores(values, metric)
        text, count = self.mean(metric, scores) if scores else first.state, f"n {len(scores)}"
        named = [f"{short_name(name)} {value}" for name, value in zip(self.axes, values, strict=True)]
        told = [f"{self.page.title(m)} {self.mean(m, self.scores(values, m))}" for m in self.page.metrics]
        heads = [f"<b>trials {', '.join(ids.split())}</b>"]
        details = "<br>".join([*heads, *(escape(line, quote=False) for line in (*named, *told))])
        return Cell(ids, text, count, details, self.marks.get(values, ""), shade)

    def mean(self, metric: str, scores: list[float]) -> str:
        """Return a mean over seeds with the standard deviation; of a single seed, its value."""
        return (
            format_mean(scores, lambda value: self.page.format(metric, value))
            if scores
            else self.page.format(metric, None)
        )
