"""What a terminal shows of a local experiment: its trials while they run, and their results."""

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from experiment.results import short_name

if TYPE_CHECKING:
    from experiment.runner import LocalExperiment
    from experiment.verdicts import Verdict

SHOWN_METRICS = ("eval_preference_loss", "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")


def progress_table(experiment: "LocalExperiment", waiting: list[int], room: int, now: float) -> Table:
    """Return a table of each trial's state and, once one has completed, of about how long the others will take.

    If there are more than `room` trials, it shows those that run, wait or ended last. `waiting` are the trials that
    have not started; `now` is a time of `time.monotonic`.
    """
    metric, running = experiment.searcher.metric, experiment.running
    done = f"{len(experiment.results)} of {len(experiment.trials)} trials done"
    if experiment.durations and (waiting or running):
        each = sum(experiment.durations) / len(experiment.durations)
        left = len(waiting) * each + sum(max(0.0, each - (now - trial.started)) for trial in running.values())
        done += f", about {format_minutes(left / max(1, len(running)))} left"
    table = Table(box=box.SIMPLE, pad_edge=False, caption=done, caption_justify="left")
    for name in ("trial", *map(short_name, experiment.varying)):
        table.add_column(name, justify="right")
    table.add_column("state", no_wrap=True, max_width=34, overflow="ellipsis")
    for name in ("step", "tokens/s", short_name(metric), "left"):
        table.add_column(name, justify="right")
    order = [*running, *waiting, *sorted(experiment.results, reverse=True)]
    for trial_id in sorted(order[: max(room, len(running))]):
        state, step, speed, metrics, remaining = "waiting", "", "", {}, ""
        if trial_id in running:
            trial = running[trial_id]
            share = trial.progress[-1][1] if trial.progress else 0.0
            state = trial.status + (f" {share:.0%}" if share else "")
            logged = trial.last_event("training")
            step = str(logged.get("steps_completed", ""))
            if tokens := logged.get("metrics", {}).get("tokens_per_second"):
                speed = f"{tokens:,.0f}"
            metrics = trial.last_event("validation").get("metrics", {})
            remaining = format_minutes(trial.seconds_left(now))
        elif trial_id in experiment.results:
            result = experiment.results[trial_id]
            state, step, metrics = experiment.state(result), str(result["steps_completed"]), result["best_metrics"]
        values = experiment.values(experiment.trials[trial_id - 1])
        figure = f"{metrics[metric]:.4g}" if metric in metrics else ""
        style = "bold" if trial_id in running else "dim" if state == "waiting" else None
        table.add_row(str(trial_id), *values, state, step, speed, figure, remaining, style=style)
    return table


def results_table(experiment: "LocalExperiment", verdict: "Verdict") -> Table:
    """Return a table of the metrics of each trial's best checkpoint.

    The best trial is bold and green, those that cannot be told apart from it are green.
    """
    results = [result for _, result in sorted(experiment.results.items())]
    shown = dict.fromkeys([experiment.searcher.metric, *SHOWN_METRICS])
    metrics = [metric for metric in shown if any(metric in result["best_metrics"] for result in results)]
    title = f"{experiment.name}: validations best by {experiment.searcher.metric}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    state = ["state"] if {experiment.state(result) for result in results} != {"COMPLETED"} else []
    for name in ("trial", *experiment.varying, *state, "steps", *metrics):
        table.add_column(short_name(name), justify="right", no_wrap=name == "state", overflow="fold")
    styles = dict.fromkeys(verdict.alike, "green")
    if verdict.best:
        styles[verdict.best["trial_id"]] = "bold green"
    for result in results:
        figures = [f"{result['best_metrics'][m]:.4g}" if m in result["best_metrics"] else "-" for m in metrics]
        cells = [
            str(result["trial_id"]),
            *experiment.values(result["hparams"]),
            *([experiment.state(result)] if state else []),
        ]
        table.add_row(*cells, str(result["steps_completed"]), *figures, style=styles.get(result["trial_id"]))
    return table


def format_minutes(seconds: float | None) -> str:
    """Return `0:05`, `12:34` or `1:02:03`; an empty text for None."""
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
