"""What a crash, a power cut or a hand leaves of checkpoints, of a trial's and the runner's files, of a comparison.

A case damages a copy of a prepared run (see `states.py`) and gives its command again. Either the run goes on and ends as
an untouched one ("ends", saying so), or a line says what is wrong; "either" allows both.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Case

Damage = Callable[[Path], Any]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def half_zeroed(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def a_bit_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes(data)


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def a_folder(path: Path) -> None:
    gone(path)
    path.mkdir()


def a_file(path: Path) -> None:
    gone(path)
    path.write_text("x")


def a_pipe(path: Path) -> None:
    gone(path)
    os.mkfifo(path)


def an_endless_file(path: Path) -> None:
    gone(path)
    path.symlink_to("/dev/zero")


def a_link_to_itself(path: Path) -> None:
    gone(path)
    path.symlink_to(path.name)


def a_link_to_nowhere(path: Path) -> None:
    gone(path)
    path.symlink_to("/nowhere/at/all")


def renamed(path: Path) -> None:
    path.rename(path.with_name("something"))


def holds(content: str | bytes) -> Damage:
    def damage(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    damage.__name__ = f"holds {content[:60]!r}"
    return damage


def and_then(content: str | bytes) -> Damage:
    """A file with something after its end."""

    def damage(path: Path) -> None:
        path.write_bytes(path.read_bytes() + (content.encode() if isinstance(content, str) else content))

    damage.__name__ = f"goes on {content[:60]!r}"
    return damage


def with_line(number: int, content: str | bytes) -> Damage:
    def damage(path: Path) -> None:
        lines = path.read_bytes().splitlines()
        lines[number] = content.encode() if isinstance(content, str) else content
        path.write_bytes(b"\n".join(lines) + b"\n")

    damage.__name__ = f"line {number} is {content[:60]!r}"
    return damage


def with_keys(number: int, **changes: Any) -> Damage:
    """A line of JSON with other values; ...: without the key."""

    def damage(path: Path) -> None:
        lines = path.read_text().splitlines()
        row = json.loads(lines[number]) | changes
        lines[number] = json.dumps({key: value for key, value in row.items() if value is not ...})
        path.write_text("\n".join(lines) + "\n")

    text = ", ".join(f"{key} {'absent' if value is ... else json.dumps(value)}" for key, value in changes.items())
    damage.__name__ = f"line {number} has {text}"
    return damage


def swapped(path: Path) -> None:
    """The values of the first line and the last, which are a pair's and an answer's."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["value"], rows[-1]["value"] = rows[-1]["value"], rows[0]["value"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


SPECIAL = (a_pipe, an_endless_file, a_link_to_itself)
HUGE = 10**400  # no float can hold it
DAMAGED = (empty, zeroed, cut_short, half_zeroed, a_bit_flipped, gone)
# Of the latest checkpoint, at step 4: what is damaged, and how. The trial has another one, at step 2.
CHECKPOINT: list[tuple[str, tuple[Damage, ...]]] = [
    ("checkpoint-4/model.safetensors", DAMAGED),
    ("checkpoint-4/optimizer.pt", DAMAGED),
    ("checkpoint-4/scheduler.pt", (zeroed, cut_short, gone)),
    ("checkpoint-4/rng_state.pth", (empty, zeroed, cut_short, gone)),
    ("checkpoint-4/trainer_state.json", (empty, zeroed, cut_short, gone, holds("[]"), holds("{}"), holds('{"global_step": 3}'))),
    ("checkpoint-4/log_state_0.json", (empty, zeroed, gone, holds("[]"), holds("{}"))),
    ("checkpoint-4/config.json", (zeroed, gone)),
    ("checkpoint-4/tokenizer.json", (zeroed, cut_short, gone)),
    ("checkpoint-4/training_args.bin", (zeroed, gone)),
    ("checkpoint-4", (gone, a_folder, a_file, renamed)),
    ("", (gone, a_folder, a_file, a_link_to_nowhere)),
]  # fmt: skip
BOTH = (
    ("checkpoint-{step}/model.safetensors", cut_short),
    ("checkpoint-{step}/optimizer.pt", zeroed),
    ("", gone),
    ("", a_folder),
)
CHECKPOINT_EVENT = '{"kind": "checkpoint", "steps_completed": 4, "uuid": %s}\n'
NO_UUID = "6b6fbaa7-faa9-4449-867b-2939a147a335"
# Of a trial's folder.
TRIAL: list[tuple[str, tuple[Damage, ...]]] = [
    ("out/events.jsonl", (
        *(empty, zeroed, half_zeroed, gone, a_folder, cut_short),
        *(and_then(tail) for tail in ('{"kind": "checkpo', b"\0" * 300, b"\xff\xfe\x80", "[1]\n", "3\n", "null\n", '"x"\n', "{}\n", '{"kind": 3}\n', '{"kind": "checkpoint"}\n')),
        *(and_then(CHECKPOINT_EVENT % json.dumps(uuid)) for uuid in ("", "../../x", "/etc", NO_UUID, 3, None, "x" * 5000, "a\0b")),
        *(and_then(json.dumps(event) + "\n") for event in (
            {"kind": "training", "steps_completed": "x", "metrics": 3},
            {"kind": "hparams"},
            {"kind": "hparams", "hparams": None},
            {"kind": "hparams", "hparams": {"model_name": "other"}},
            {"kind": "progress", "progress": "x"},
        )),
        *(with_line(0, line) for line in ("", b"\0" * 50, "[]", "{}")),
    )),
    ("out/trainer", (holds("x"),)),
    ("out/trainer/resumed_from", (holds("x"),)),
    ("out/trainer/checkpoint-9/trainer_state.json", (holds("{}"),)),
    ("out/cache", (gone, a_file, a_folder)),
]  # fmt: skip
# Files of the tokenized data that is shared.
CACHE: list[tuple[str, tuple[Damage, ...]]] = [
    ("dataset_dict.json", (empty, zeroed, gone, holds("[]"))),
    ("train/state.json", (empty, zeroed, gone, holds("{}"))),
    ("train/dataset_info.json", (zeroed, gone, holds("[]"))),
    ("train/data-00000-of-00001.arrow", (empty, zeroed, cut_short, half_zeroed, gone)),
]
# Of a grid of two trials, of which one is done.
RUNNER: list[tuple[str, tuple[Damage, ...]]] = [
    ("experiment.json", (empty, zeroed, cut_short, gone, a_folder, *map(holds, ("[]", "null", "3", "{}", '{"name": 3}', "<html>")))),
    ("command.json", (empty, zeroed, cut_short, gone, a_folder, *map(holds, ("[]", "null", "{}", '{"config_file": 3}')))),
    ("trials.jsonl", (
        *(empty, zeroed, cut_short, half_zeroed, gone, a_folder, *SPECIAL),
        *map(holds, ("[1]\n", "null\n", "3\n", "{}\n", '{"trial_id": 1}\n', '"x"\n')),
        *(and_then(tail) for tail in (b"\0" * 99, '{"trial_id": 2, "sta', "[]\n")),
        with_keys(0, trial_id="x"), with_keys(0, trial_id=99), with_keys(0, trial_id=None), with_keys(0, trial_id=[1]),
        with_keys(0, state=3), with_keys(0, state=...), with_keys(0, hparams=...), with_keys(0, hparams=3),
        with_keys(0, metrics=None), with_keys(0, best_metrics=None), with_keys(0, best_metrics={"eval_loss": "x"}),
        with_keys(0, best_metrics=...), with_keys(0, checkpoint_uuid=...), with_keys(0, checkpoint_uuid="../../x"),
        with_keys(0, steps_completed="x"), with_keys(0, steps_completed=HUGE), with_keys(0, best_metrics={"eval_loss": HUGE}),
        with_keys(0, state="ERROR", error="\ud800"), with_keys(0, metrics={"\ud800": 1}),
    )),
    ("best_checkpoint", (empty, zeroed, gone, a_folder, holds("../../x"))),
    ("report.html", (a_folder, gone)),
    ("trials", (gone, a_file)),
    ("trials/1", (gone, a_file)),
    ("trials/1/events.jsonl", (empty, zeroed, gone, a_folder, *SPECIAL, and_then("[1]\n"), and_then('{"kind": 3}\n'), and_then('{"kind": "validation"}\n'), and_then('{"kind": "validation", "steps_completed": "x", "metrics": 3}\n'))),
    ("trials/1/config.yaml", (empty, gone, a_folder)),
    ("trials/1/reports.jsonl", (holds("\0" * 9),)),
    ("trials/abc/events.jsonl", (holds('{"kind": "hparams", "hparams": {}}\n'),)),
    ("trials/99/events.jsonl", (holds('{"kind": "hparams", "hparams": {}}\n'),)),
    ("trials/2", (holds("x"),)),
    ("trials/2/log.txt", (holds("x"),)),
    ("trials/2/events.jsonl", (holds("\0" * 99), holds("{}\n"), holds('{"kind": "hparams", "hparams": {}}\n'))),
    ("cache", (gone,)),
]  # fmt: skip
# Of an unfinished comparison.
UNFINISHED: tuple[Damage, ...] = (
    *(empty, zeroed, cut_short, half_zeroed, gone, a_folder, *SPECIAL, swapped),
    *(and_then(tail) for tail in ('{"key": "x", "val', b"\0" * 99, "[1]\n", '{"key": [1], "value": 3}\n', '{"key": {}, "value": 3}\n', '{"key": null, "value": null}\n')),
    *(with_keys(number, value=value) for number in (0, -1) for value in (None, 3, [], ["x"], "abc", {"a": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9], ["x", "y", "z"], [HUGE] * 7, ["x", HUGE, True], ["\ud800", 1, True])),
)  # fmt: skip
STORE = "{work}/../store"
# Checkpoints for DPO to start from: of the store, what is damaged, and what the line says.
START: list[tuple[str, Damage]] = [
    *((f"checkpoint-4/{name}", damage) for name in ("model.safetensors", "config.json", "tokenizer.json") for damage in (empty, zeroed, cut_short, gone)),
    ("checkpoint-4/tokenizer_config.json", zeroed),
    ("checkpoint-4/model.safetensors", half_zeroed),
    ("checkpoint-4/model.safetensors", a_bit_flipped),
    *(("checkpoint-4", damage) for damage in (gone, a_folder, a_file)),
    *(("", damage) for damage in (gone, a_folder, a_file, a_link_to_nowhere)),
]  # fmt: skip


def places(work: Path) -> dict[str, str]:
    return json.loads((work.parent / "places.json").read_text())


def _id(area: str, where: str, how: Damage) -> str:
    name = f"{where or 'all'} {how.__name__.replace('_', ' ')}"
    return f"{area}/" + "".join(c if c.isprintable() and c != "/" else "_" for c in name)[:100]


def _checkpoint(where: str, how: Damage) -> Case:
    damage = lambda work: how(work.parent / "store" / places(work)["latest"] / where)  # noqa: E731
    return Case(_id("resume", where, how), "{latest}", "sft_finetune", state="trial", damage=damage, expect="ends")


def _both(where: str, how: Damage) -> Case:
    def damage(work: Path) -> None:
        for step, name in ((2, "earlier"), (4, "latest")):
            how(work.parent / "store" / places(work)[name] / where.format(step=step))

    name = _id("resume", f"both {where}", how)
    if how is gone:  # an empty storage may be one that is not mounted
        return Case(name, ("{latest}", "to start over"), "sft_finetune", state="trial", damage=damage, strict=False)
    return Case(name, "{earlier}", "sft_finetune", state="trial", damage=damage, expect="ends")


def _trial(where: str, how: Damage) -> Case:
    return Case(
        _id("trial", where, how),
        (),
        "sft_finetune",
        state="trial",
        damage=lambda work: how(work / where),
        expect="either",
    )


def _cache(where: str, how: Damage) -> Case:
    damage = lambda work: how(next(p for p in (work / "out/cache").iterdir() if p.is_dir()) / where)  # noqa: E731
    return Case(_id("cache", where, how), (), "sft_finetune", state="trial", damage=damage, expect="either")


GRID_WORDS = ("{work}/config.yaml", "{repo}", "--output", "{work}/run")


def _runner(where: str, how: Damage) -> Case:
    damage = lambda work: how(work / "run" / where)  # noqa: E731
    return Case(_id("runner", where, how), (), words=GRID_WORDS, state="grid", damage=damage, expect="either")


def _report(where: str, how: Damage) -> Case:
    damage = lambda work: how(work / "run" / where)  # noqa: E731
    return Case(
        _id("report of", where, how), (), "report", words=("{work}/run",), state="grid", damage=damage, expect="either"
    )


def _unfinished(how: Damage) -> Case:
    from states import COMPARE

    damage = lambda work: how(work / "page.html.unfinished")  # noqa: E731
    return Case(
        _id("comparison", "unfinished", how),
        (),
        "inference",
        words=COMPARE,
        state="comparison",
        damage=damage,
        expect="either",
    )


def _start(where: str, how: Damage, command: str, expect: str = "error") -> Case:
    damage = lambda work: how(work.parent / "store" / places(work)["latest"] / where)  # noqa: E731
    change = {"hyperparameters.model_ckpt": "{latest}"}
    words: tuple[str, ...] | None = None
    if command == "inference":
        words = ("--model", "m={latest}", "--prompt", "q", "--max-new-tokens", "2")
    elif command == "dpo_finetune":
        words = ("--config", "{work}/config.yaml", "--output", "{work}/dpo")
    says = "--model m" if command == "inference" else "model_ckpt"
    name = _id(f"start {command}", where, how)
    return Case(
        name, says, command, "dpo", change, state="trial", damage=damage, words=words, strict=False, expect=expect
    )


SMALL = ("config.json", "tokenizer.json", "generation_config", "tokenizer_config")
CASES = [
    *(_checkpoint(where, how) for where, hows in CHECKPOINT for how in hows),
    *(_both(*case) for case in BOTH),
    *(_trial(where, how) for where, hows in TRIAL for how in hows),
    *(_cache(where, how) for where, hows in CACHE for how in hows),
    *(_runner(where, how) for where, hows in RUNNER for how in hows),
    *(_report("experiment.json", holds(f'{{"searcher": {{"metric": {metric}}}, "hyperparameters": {{}}}}')) for metric in (5, '["a"]', "null")),
    *(_report(where, how) for where, hows in RUNNER for how in hows if not where.startswith(("cache", "trials/2"))),
    *(_unfinished(how) for how in UNFINISHED),
    # What a look at small files shows is found by the runner, the rest by the trial.
    *(_start(where, how, "dpo_finetune") for where, how in START),
    *(_start(where, how, "local_experiment") for where, how in START if "safetensors" not in where or how in (empty, gone)),
    *(_start(where, how, "inference") for where, how in START if "model.safetensors" in where or where == ""),
]  # fmt: skip
