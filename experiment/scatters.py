"""The scatters of a search that is no grid: a metric of each trial against each hyperparameter that varies."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from experiment.charts import Point, is_finite, plot_scatter
from experiment.results import short_name

if TYPE_CHECKING:
    from experiment.report_page import Page


class Scatters:
    """What the page shows of its search. `metrics` are those with scatters: none if the trials are a grid."""

    def __init__(self, page: "Page", metrics: list[str]) -> None:
        self.page = page
        self.metrics = (
            [metric for metric in metrics if self.points(metric)] if page.experiment.draws and page.axes else []
        )

    def caption(self) -> str:
        """Say what a point is, and what its look means."""
        page = self.page
        said = f"A point is a trial at its best checkpoint by {page.searcher.metric}."
        if any(trial.state == "stopped early" for trial in page.trials):
            said += " Hollow: stopped early, so it is of a shorter training."
        return said + (f" Outlined: the best, trial {page.best.id}." if page.best else "")

    def points(self, metric: str) -> dict[int, tuple[Point, dict]]:
        """Return each trial's point without its place across, and its hyperparameters, by trial id.

        A trial without a validated checkpoint is shown by its last validation.
        """
        found = {}
        for trial in self.page.trials:
            value = trial.result["best_metrics"].get(metric, trial.result["metrics"].get(metric))
            if is_finite(value):
                look = "best" if trial.mark == "best" else "early" if trial.state == "stopped early" else ""
                found[trial.id] = Point(str(trial.id), None, value, trial.details, look), trial.result["hparams"]
        return found

    def figures(self, metric: str) -> Iterator[tuple[str, go.Figure]]:
        """Yield the name of each hyperparameter that varies, with the metric over it."""
        experiment = self.page.experiment
        for name, values in self.page.axes.items():
            points = [p._replace(x=experiment.get(hparams, name)) for p, hparams in self.points(metric).values()]
            numbers = all(isinstance(p.x, int | float) and not isinstance(p.x, bool) for p in points)
            kind = ("log" if experiment.ranges.get(name) == "log" else "linear") if numbers else "category"
            if not numbers:
                points = [p._replace(x=str(p.x)) for p in points]
            yield short_name(name), plot_scatter(points, kind, [] if numbers else values, self.page.title(metric))
