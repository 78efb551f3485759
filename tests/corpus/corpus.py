"""All cases by area, and the bench that runs them: a server, the valid configs and the prepared runs."""

import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import config_cases
import input_cases
import lora_cases
import option_cases
import state_cases
import trainer_cases
from harness import REPO, Case, Outcome, Server, complaints, run_case, snapshot
from states import ENDS, difference_at_end, make_states

AREAS: dict[str, list[Case]] = {
    "config": [*config_cases.CASES, *trainer_cases.CASES],
    "lora": lora_cases.CASES,
    "input": input_cases.CASES,
    "ckpt": state_cases.CASES,
    "options": option_cases.CASES,
}
ALL = {case.id: case for cases in AREAS.values() for case in cases}
TRAINING_ARGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "activation_checkpointing": False,
    "bf16": False,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "learning_rate": 1e-3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sft": {
        "name": "corpus",
        "entrypoint": "python sft_finetune.py",
        "searcher": {"name": "single", "metric": "eval_loss", "smaller_is_better": True},
        "hyperparameters": {
            "model_name": "{tiny}/base",
            "dataset": "{tiny}/instructions",
            "dataset_subsets": [{"subset": "kitchen", "ratio": 0.5}],
            "max_seq_length": 256,
            "training_args": TRAINING_ARGS,
        },
    },
    "dpo": {
        "name": "corpus",
        "entrypoint": "python dpo_finetune.py",
        "searcher": {"name": "single", "metric": "eval_rewards/accuracies", "smaller_is_better": False},
        "hyperparameters": {
            "model_name": "{tiny}/base",
            "model_ckpt": "none",
            "datasets": [{"name": "{tiny}/questions", "number_of_samples": 20}],
            "dpo_beta": 0.1,
            "max_length": 384,
            "precompute_ref_log_probs": True,
            "training_args": TRAINING_ARGS,
        },
    },
}


def make_tiny(folder: Path) -> None:
    """Make the tiny example as the tests have it, unless it is there."""
    if not (folder / "base" / "config.json").exists():
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported, which reads it once
        sys.path.insert(0, str(REPO / "examples" / "tiny"))
        import make

        make.make(folder, epochs=0.3, hidden_size=32)


class Bench:
    """What cases run on."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        make_tiny(tiny)
        input_cases.TINY[:] = [tiny]
        self.folder, self.states = folder, None
        self.before = {place: snapshot(place) for place in (REPO, tiny)}
        self.server, self.lock = Server(folder, tiny), threading.Lock()

    def judge(self, case: Case) -> tuple[Outcome, list[str]]:
        """Run a case. Returns what came of it, and what is wrong with that."""
        with self.lock:
            if case.state and self.states is None:
                self.states, self.ends = make_states(self.server, CONFIGS)
        outcome = run_case(self.server, case, CONFIGS, self.states or {})
        compare = case.state in ENDS and case.expect != "error" and case.command != "report"
        untouched = (lambda outcome: difference_at_end(str(case.state), self.ends, outcome)) if compare else None
        wrong = complaints(case, outcome, untouched)
        shutil.rmtree(outcome.scratch, ignore_errors=True)
        return outcome, wrong

    def strays(self) -> list[str]:
        """Files that are new since the start outside of the scratch folders: in the project, or in the tiny example."""
        return sorted(
            path for folder, before in self.before.items() for path in snapshot(folder).keys() - before.keys()
        )

    def close(self) -> None:
        self.server.close()


def describe(case: Case, outcome: Outcome, wrong: list[str]) -> str:
    """A case that fails, for a reader who has to mend it."""
    change = case.text if case.text is not None else case.change
    lines = [f"## {case.id}", f"- wrong: {'; '.join(wrong)}"]
    lines += [f"- input: `{str(change)[:300]!s}`"] if change else []
    lines += [f"- files: {', '.join(case.files)}"] if case.files else []
    lines += [f"- words: {' '.join(map(str, case.words))}"] if case.words is not None else []
    lines += [f"- expected: {case.expect}, saying {case.says!r}"]
    lines += [f"- exit status {outcome.status}, {outcome.seconds} s"]
    tail = [line[:240] for line in outcome.err.splitlines()[-4:]] or [
        f"(stdout) {line[:240]}" for line in outcome.out.splitlines()[-3:]
    ]
    lines += ["```", *tail, "```"] if tail else []
    return "\n".join(lines) + "\n"
