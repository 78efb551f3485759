"""Experiments made by hand: their trials, what these reported, and what they keep of their held-out pairs."""

import json
import uuid

import numpy as np

from config.experiment import expand_trials
from experiment.results import Experiment, summarize
from experiment.verdicts import PAIR_METRICS, beta_of
from metrics.evaluations import Evaluations, LogRatios

ACCURACY, LOSS = "eval_rewards/accuracies", "eval_preference_loss"
CONFIG = {
    "name": "made",
    "entrypoint": "python dpo_finetune.py",
    "searcher": {"name": "grid", "metric": LOSS},
    "hyperparameters": {"model_name": "base", "datasets": ["pairs"], "dpo_beta": 0.1, "training_args": {}},
}
PAIRS = 200


def noise(seed, size=PAIRS):
    """Noise of mean 0 and standard deviation 1 exactly."""
    values = np.random.default_rng(seed).normal(size=size)
    return (values - values.mean()) / values.std()


def pairs_of(h, chosen=-1.0, rows=None, tokens=(20, 20), truncations=(), step=40):
    """What a trial keeps whose log-ratio differences are `h`; the log-ratios of chosen answers are `chosen`."""
    h = np.asarray(h, dtype=float)
    ratios = LogRatios(np.full(len(h), chosen), chosen - h)
    lengths = [np.broadcast_to(of, len(h)).tolist() for of in tokens]
    rows = [f"pairs row {i}" for i in range(len(h))] if rows is None else rows
    return Evaluations(list(truncations), rows, *lengths, {step: ratios})


def made(evaluations, metric=LOSS, axis="training_args.learning_rate", values=None, trained=(), metrics=None, **keys):
    """A grid over one axis, or two: a trial for each of `evaluations`, None for one that keeps none.

    `trained` are the metrics of training at steps 10, 20, ...; `metrics` are added to the evaluation of each trial.
    """
    config = json.loads(json.dumps(CONFIG | keys))
    config["searcher"] |= {"metric": metric, "smaller_is_better": metric.endswith("loss")}
    axes = axis if isinstance(axis, dict) else {axis: values or [10.0**-i for i in range(1, len(evaluations) + 1)]}
    for name, of in axes.items():
        *parents, last = name.split(".")
        level = config["hyperparameters"]
        for parent in parents:
            level = level[parent]
        level[last] = {"type": "categorical", "vals": of}
    experiment = Experiment("made", config)
    for trial_id, (hparams, kept) in enumerate(zip(expand_trials(config), evaluations, strict=True), start=1):
        found = dict((metrics or {}).get(trial_id, {}))
        if kept:
            (ratios,) = kept.steps.values()
            for name, of in PAIR_METRICS.items():
                found.setdefault(name, float(of(ratios.margins, beta_of(hparams)).mean()))
            experiment.evaluations[trial_id] = kept
        events = [
            {"kind": "training", "steps_completed": 10 * i, "metrics": {"epochs": i / 2, **of}}
            for i, of in enumerate(trained, start=1)
        ]
        saved = str(uuid.UUID(int=trial_id))
        events.append({"kind": "validation", "steps_completed": 40, "metrics": found})
        events.append({"kind": "checkpoint", "steps_completed": 40, "uuid": saved})
        experiment.events[trial_id] = events
        experiment.results[trial_id] = summarize(trial_id, "COMPLETED", hparams, events, experiment.searcher)
    return experiment
