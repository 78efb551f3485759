"""Runs that are made once, for cases to damage: a trial stopped at step 4 of 6, a grid with one of two trials done, and
a comparison that is all but written. Each is a scratch folder with a `places.json`; beside it is how it ends untouched.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from harness import REPO, Outcome, Server, changed

from trial.throughput import METRICS

ARGS = "hyperparameters.training_args"
SIX = {f"{ARGS}.max_steps": 6, f"{ARGS}.save_strategy": "steps", f"{ARGS}.save_steps": 2}
SEEDS = {"searcher.name": "grid", f"{ARGS}.seed": {"type": "categorical", "vals": [1, 2]}}
COMPARE = (
    *("--model", "one={tiny}/base", "--model", "two={tiny}/base", "--dataset", "{tiny}/questions"),
    *("--number-of-samples", "2", "--number-of-pairs", "2", "--max-new-tokens", "3", "--device", "cpu"),
    *("--output_file", "page.html", "--output_file", "all.json"),
)


def read_lines(path: Path) -> list[Any]:
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def weights_of(store: Path, uuid: str) -> str:
    files = sorted((store / uuid).rglob("model.safetensors")) if isinstance(uuid, str) else []
    return hashlib.sha256(files[0].read_bytes()).hexdigest() if files else f"no weights of {uuid!r}"


def end_of_trial(scratch: Path) -> dict[str, Any]:
    """The last weights and, by step, the last reported metrics of the trial in `work/out`."""
    events = read_lines(scratch / "work" / "out" / "events.jsonl")
    saved = [event["uuid"] for event in events if event.get("kind") == "checkpoint" and "uuid" in event]
    metrics = {}
    for event in events:
        if event.get("kind") in ("training", "validation") and isinstance(event.get("metrics"), dict):
            # But for the speed, which no two runs have in common.
            kept = {name: value for name, value in event["metrics"].items() if name not in METRICS}
            metrics[f"{event['kind']} {event['steps_completed']}"] = kept
    return {"weights": weights_of(scratch / "store", saved[-1] if saved else None), "metrics": metrics}


def end_of_grid(scratch: Path) -> dict[str, Any]:
    """Each trial's line of trials.jsonl, with its weights in place of the UUID."""
    lines = read_lines(scratch / "work" / "run" / "trials.jsonl")
    best = scratch / "work" / "run" / "best_checkpoint"
    rows = [row | {"checkpoint_uuid": weights_of(scratch / "store", row.get("checkpoint_uuid"))} for row in lines]
    return {"trials": rows, "best": weights_of(scratch / "store", best.read_text().strip() if best.is_file() else None)}


def end_of_comparison(scratch: Path) -> dict[str, Any]:
    work, left = scratch / "work", (scratch / "work" / "page.html.unfinished").exists()
    read = {name: (work / name).read_text() for name in ("page.html", "all.json") if (work / name).is_file()}
    return read | {"unfinished": left}


ENDS = {"trial": end_of_trial, "grid": end_of_grid, "comparison": end_of_comparison}


def _run(server: Server, name: str, command: str, words: tuple[str, ...], config: Any = None, **options: Any) -> Path:
    scratch = server.folder / "states" / name
    for folder in ("work", "store", "home", "tmp"):
        (scratch / folder).mkdir(parents=True)
    if config:
        (scratch / "work" / "config.yaml").write_text(yaml.safe_dump(config))
    filled = [w.replace("{work}", str(scratch / "work")).replace("{tiny}", str(server.tiny)) for w in words]
    outcome: Outcome = server.run(scratch, command, filled, {}, limit=60, trains=True, **options)
    if outcome.status != (77 if options else 0):
        raise RuntimeError(f"{name}: status {outcome.status}\n{outcome.out[-2000:]}\n{outcome.err[-2000:]}")
    return scratch


def make_states(server: Server, configs: dict[str, Any]) -> tuple[dict[str, Path], dict[str, Any]]:
    """Return the prepared folders, and the untouched end of each."""
    sft = json.loads(json.dumps(configs["sft"]).replace("{tiny}", str(server.tiny)))
    ends = {}

    trial = _run(
        server, "trial", "sft_finetune", ("--config", "{work}/config.yaml", "--output", "{work}/out"), changed(sft, SIX)
    )
    ends["trial"] = end_of_trial(trial)
    events = read_lines(trial / "work" / "out" / "events.jsonl")
    two, four, six = [number for number, event in enumerate(events) if event["kind"] == "checkpoint"]
    kept = "".join(json.dumps(event) + "\n" for event in events[: four + 1])
    (trial / "work" / "out" / "events.jsonl").write_text(kept)
    shutil.rmtree(trial / "store" / events[six]["uuid"])
    places = {"latest": events[four]["uuid"], "earlier": events[two]["uuid"]}
    (trial / "places.json").write_text(json.dumps(places))

    words = ("{work}/config.yaml", str(REPO), "--output", "{work}/run")
    grid = _run(server, "grid", "local_experiment", words, changed(sft, SEEDS))
    ends["grid"] = end_of_grid(grid)
    run = grid / "work" / "run"
    first, second = read_lines(run / "trials.jsonl")
    (run / "trials.jsonl").write_text(json.dumps(first) + "\n")
    (run / "best_checkpoint").write_text(first["checkpoint_uuid"] + "\n")
    shutil.rmtree(run / "trials" / "2")
    shutil.rmtree(grid / "store" / second["checkpoint_uuid"])
    (grid / "places.json").write_text("{}")

    whole = _run(server, "whole comparison", "inference", COMPARE)
    ends["comparison"] = end_of_comparison(whole)
    comparison = _run(server, "comparison", "inference", COMPARE, die="comparison.files.write_comparison")
    (comparison / "places.json").write_text("{}")
    return {"trial": trial, "grid": grid, "comparison": comparison}, ends


def difference_at_end(state: str, ends: dict[str, Any], outcome: Outcome) -> str | None:
    """Say how a resumed run differs from the untouched one; None if it does not."""
    before, after = ends[state], ENDS[state](outcome.scratch)
    if state == "trial":  # metrics that were lost with the events cannot come back, but none may differ
        before = before | {"metrics": {step: before["metrics"].get(step) for step in after["metrics"]}}
    wrong = [
        f"{key}: {str(after.get(key))[:150]} instead of {str(value)[:150]}"
        for key, value in before.items()
        if after.get(key) != value
    ]
    return f"ends unlike an untouched run: {'; '.join(wrong)}" if wrong else None
