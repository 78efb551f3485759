"""Plotly figures of an experiment's metrics: a heatmap over a grid's axes, a scatter of other trials, curves by step.

Colours are the page's CSS variables, such as `var(--ink)`. The page's script fills in what they are in light, dark and
print. Texts are Plotly's HTML, so values are escaped.
"""

import math
from html import escape
from typing import Any, NamedTuple, TypeGuard

import plotly.graph_objects as go

from experiment.results import TrialResult
from trial.events import TrialEvent, events_by_step

HUES = 6  # --h0 to --h5 in the style: distinct to colour-blind readers too
LINES = (  # dash, Plotly's symbol, and the same symbol as an SVG path
    ("solid", "circle", "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z"),
    ("7px,4px", "square", "M-3.2,-3.2h6.4v6.4h-6.4z"),
    ("1.5px,3.5px", "diamond", "M0,-4.8l4.8,4.8l-4.8,4.8l-4.8,-4.8z"),
    ("9px,3px,2px,3px", "triangle-up", "M0,-4.5l4.5,8h-9z"),
    ("4px,2px", "triangle-down", "M0,4.5l-4.5,-8h9z"),
)
MAX_POINTS = 150  # of a curve, more than a panel's pixels show
CLEAR = "rgba(0,0,0,0)"
FONT = {"family": "inherit", "size": 12, "color": "var(--soft)"}
AXIS: dict[str, Any] = {"showgrid": False, "gridcolor": "var(--line)", "zeroline": False, "exponentformat": "e"}
AXIS |= {"fixedrange": True, "automargin": True, "ticks": "outside", "ticklen": 6, "tickcolor": CLEAR}
AXIS["title"] = {"standoff": 10}
LAYOUT: dict[str, Any] = {"font": FONT, "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "xaxis": AXIS, "yaxis": AXIS}
LAYOUT |= {"dragmode": False, "showlegend": False, "hoverdistance": -1, "margin": {"l": 4, "r": 16, "t": 8, "b": 4}}
LAYOUT["hoverlabel"] = {"align": "left", "bgcolor": "var(--paper)", "bordercolor": "var(--soft)"}
LAYOUT["hoverlabel"]["font"] = FONT | {"size": 13, "color": "var(--ink)"}


Axis = tuple[str, list[str]]  # its title and its values


class Look(NamedTuple):
    """How a trial's curve is drawn."""

    hue: int
    dash: str
    symbol: str
    path: str


class TrialView(NamedTuple):
    """A trial as the page shows it."""

    id: int
    result: TrialResult
    values: tuple[str, ...]  # of the axes
    state: str
    rank: str
    mark: str  # `best`, `tied` (cannot be told apart from it) or nothing
    look: Look
    title: str  # its number and values, as Plotly's HTML
    details: str  # the title, its metrics and its state


def choose_look(places: list[tuple[int, int]]) -> Look:
    """Return the look of a trial: its colour tells the value of the first axis, dash and marker those of the others.

    `places` has the index of the trial's value on each axis, and the number of values.
    """
    (hue, _), *others = places or [(0, 1)]
    combination = hue // HUES  # where colours repeat, dashes help
    for index, length in others:
        combination = combination * length + index
    return Look(hue % HUES, *LINES[combination % len(LINES)])


class Cell(NamedTuple):
    """A cell of a heatmap: a trial, or the trials that differ in their seed alone."""

    trials: str  # their numbers, with spaces between
    text: str  # its value, or why it has none
    note: str  # what stands below it
    details: str  # shown when pointed at, as Plotly's HTML
    mark: str  # as a TrialView's
    shade: float | None  # the strength of its colour, from 0 to 1; None: no colour


def plot_heatmap(grid: list[list[Cell | None]], down: Axis, across: Axis) -> go.Figure:
    """Return the heatmap of a grid of cells; None stands for trials that have not started."""
    figure = go.Figure(layout={"template": {"layout": LAYOUT}, "height": 60 * len(grid) + 68})
    figure.add_heatmap(
        z=[[cell and cell.shade for cell in row] for row in grid],
        customdata=[[cell and cell.trials for cell in row] for row in grid],
        hovertext=[[cell.details if cell else "not started" for cell in row] for row in grid],
        hovertemplate="%{hovertext}<extra></extra>",
        colorscale=[[0, "var(--weak)"], [1, "var(--strong)"]],
        **{"zmin": 0, "zmax": 1, "xgap": 3, "ygap": 3, "showscale": False, "hoverongaps": True},
    )
    shapes = []
    for x, y, cell in ((x, y, cell) for y, row in enumerate(grid) for x, cell in enumerate(row)):
        line, text, colour = {"width": 1, "dash": "dot", "color": "var(--line)"}, "not started", "soft"
        if cell:
            text = f"<b>{cell.text}</b>" if cell.mark == "best" else cell.text
            size = 12 if cell.shade is None else 15
            text = f"<span style='font-size: {size}px'>{text}</span><br>{cell.note}"
            if cell.shade is not None:
                line = {"width": {"best": 3, "tied": 1}.get(cell.mark, 0), "color": "var(--ink)"}
                colour = "ink"
        label = {"text": text, "font": {"color": f"var(--{colour})"}}
        box = {"x0": x - 0.48, "x1": x + 0.48, "y0": y - 0.47, "y1": y + 0.47}
        shapes.append({**box, "line": line, "label": label, "name": cell and cell.trials})
    axes: dict[str, dict[str, Any]] = {}
    for axis, (title, values) in {"xaxis": across, "yaxis": down}.items():
        ticks = {"tickvals": list(range(len(values))), "ticktext": [escape(value, quote=False) for value in values]}
        axes[axis] = {"title": {"text": escape(title, quote=False)}, "range": [-0.5, len(values) - 0.5], **ticks}
    axes["xaxis"]["side"] = "top"
    axes["yaxis"]["range"].reverse()  # the first row on top
    return figure.update_layout(shapes=shapes, **axes)


class Point(NamedTuple):
    """A trial in a scatter."""

    trial: str  # its number
    x: Any  # a number, or the text of a category
    y: float
    details: str  # shown when pointed at, as Plotly's HTML
    look: str  # `best`, `early` (stopped before its end) or nothing


def plot_scatter(points: list[Point], kind: str, categories: list[str], title: str) -> go.Figure:
    """Return the scatter of some trials. `kind` is of the x axis: linear, log or category; `title` is the y axis'."""
    figure = go.Figure()
    for point in sorted(points, key=lambda point: point.look == "best"):  # the best on top
        marker: dict[str, Any] = {"size": 9, "color": "var(--h0)", "line": {"width": 1, "color": "var(--paper)"}}
        if point.look == "best":
            marker |= {"size": 13, "line": {"width": 3, "color": "var(--ink)"}}
        elif point.look == "early":
            marker |= {"symbol": "circle-open", "color": "var(--h1)", "line": {"width": 2}}
        figure.add_scatter(
            x=[point.x],
            y=[point.y],
            marker=marker,
            name=point.trial,
            hovertext=point.details,
            hovertemplate="%{hovertext}<extra></extra>",
            **{"mode": "markers", "cliponaxis": False},
        )
    xaxis: dict[str, Any] = {"type": kind, "nticks": 6}
    if kind == "category":
        xaxis |= {"categoryorder": "array", "categoryarray": categories}
    yaxis = {"range": range_around([p.y for p in points]), "nticks": 6, "showgrid": True, "title": {"text": title}}
    layout: dict[str, Any] = {**LAYOUT, "hovermode": "closest", "hoverdistance": 12}
    return figure.update_layout(template={"layout": layout}, height=236, xaxis=xaxis, yaxis=yaxis)


def plot_curves(
    trials: list[TrialView], events: dict[int, list[TrialEvent]], kind: str, metric: str, title: str
) -> go.Figure | None:
    """Return a metric's curves by step, or None if there are none.

    The first trial's curve is on top, and thick if it is the best. A value that is not finite leaves a gap.
    """
    figure, shown = go.Figure(), []
    for trial in reversed(trials):
        points = series(events.get(trial.id, []), kind, metric)
        finite = [value for _, value in points if is_finite(value)]
        if not finite:
            continue
        shown += finite
        width, colour = 2.8 if trial.mark == "best" else 1.3, f"var(--h{trial.look.hue})"
        marker = {"size": width, "color": colour}  # shows a point between gaps, which has no line
        if kind == "validation":
            marker |= {"size": 8, "symbol": trial.look.symbol, "line": {"width": 1, "color": "var(--paper)"}}
        figure.add_scatter(
            x=[step for step, _ in points],
            y=[value if is_finite(value) else None for _, value in points],
            line={"color": colour, "width": width, "dash": trial.look.dash},
            marker=marker,
            name=str(trial.id),
            meta=f"{trial.title}<br>{escape(title, quote=False)}",
            hovertemplate="%{meta} %{y:.4g}<br>step %{x}<extra></extra>",
            **{"mode": "lines+markers", "cliponaxis": False},
        )
    if not shown:
        return None
    steps = max(trial.result["steps_completed"] for trial in trials) or 1
    xaxis = {"range": [0, steps], "nticks": 6, "title": {"text": "step"}, "dtick": 1 if steps < 6 else None}
    yaxis = {"range": range_around(shown), "nticks": 6, "showgrid": True}
    return figure.update_layout(template={"layout": LAYOUT}, height=236, xaxis=xaxis, yaxis=yaxis)


def is_finite(value: Any) -> TypeGuard[float]:
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
