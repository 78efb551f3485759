"""Bad inputs for the real commands: one server imports everything once, and forks a child for each case.

A case has a scratch folder of its own: `work` (the child's current folder, which holds its files), `store` (checkpoints),
`home` (HF_HOME) and `tmp` (TMPDIR). The child calls the command's `main` as the interpreter would, and has ten seconds.
The server forks and never trains, so it has no threads that a fork could leave in the middle of something.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]
LIMIT = 10  # seconds
TRAINING_LIMIT = 60  # seconds of a case that may train to its end
ACCEPTED = 99  # exit status of a case that starts a trial, though its mistake should have been found before
MEMORY = 12 * 2**30  # bytes of address space: a case that asks for more ends in a MemoryError, not in a dead machine
IMPORTS = (
    *("local_experiment", "sft_finetune", "dpo_finetune", "inference", "report", "export"),
    *("trl", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "determined.transformers", "dataset_utils"),
    *("speed.hardware", "speed.padding_free", "speed.tokenized_dpo_trainer", "trial.det_callback", "trial.models"),
    *("experiment.runner", "experiment.dry_run", "experiment.dry_run_output", "experiment.next_steps"),
    *("comparison.compare", "comparison.chat", "comparison.questions", "comparison.files", "comparison.cluster_task"),
    *("benchmarks.throughput", "serving.exporting", "serving.hub"),
)
# Folders that no case writes to.
OTHERS = {".git", ".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache", "__pycache__"}
FOLDERS = ("store", "home", "tmp")
DROP = object()  # as a value of `change`: without this key


@dataclasses.dataclass
class Case:
    """A command with a mistake, and what must come of it.

    `expect`: "error": exit status 2, one line `error...` on stderr with `says` in it, nothing written.
    "ends": a resumed run ends as an untouched one, with `says` on stdout or stderr; "either": one of these.
    "inside": the error, or a run that writes only into a folder of its own in `local_runs`.
    """

    id: str
    says: str | tuple[str, ...]
    command: str = "local_experiment"
    config: str = "sft"  # the valid config that is changed; or "dpo"
    change: dict[str, Any] = dataclasses.field(default_factory=dict)  # its dotted keys and their values
    text: str | bytes | None = None  # the whole config in its place
    files: dict[str, Any] = dataclasses.field(default_factory=dict)  # in `work`; see `write_file`
    damage: Callable[[Path], object] | None = None  # called with `work`, last
    words: tuple[Any, ...] | None = None  # of the command line, with {work}, {tiny}, {uuid} ... ; None: usual ones
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    state: str | None = None  # a prepared run, copied into the scratch folder first
    expect: str = "error"
    strict: bool = True  # nothing may be written at all, not even caches and locks

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.says,) if isinstance(self.says, str) else self.says


@dataclasses.dataclass
class Outcome:
    """What came of a case."""

    status: int | None  # None: it had to be killed
    seconds: float
    out: str
    err: str
    written: list[str]  # paths that are new, changed or gone
    scratch: Path


class Server:
    """The process that cases are forked from."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.folder, self.tiny, self.socket = folder, tiny, str(folder / "socket")
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        environment |= {"PYTHONPATH": str(REPO), "HF_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
        for name in ("DET_MASTER", "HF_DATASETS_CACHE", "LOCAL_CHECKPOINT_STORAGE"):
            environment.pop(name, None)
        with (folder / "server.log").open("w") as log:
            command = [sys.executable, __file__, self.socket]
            self.process = subprocess.Popen(command, cwd=REPO, env=environment, stdin=subprocess.PIPE, stderr=log)
        deadline = time.monotonic() + 120
        while not Path(self.socket).exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "server.log").read_text())
            time.sleep(0.05)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)

    def run(self, scratch: Path, command: str, words: list[str], env: dict[str, str], **options: Any) -> Outcome:
        """Run a command in a scratch folder that is prepared. `options`: `limit` in seconds; whether it `trains`."""
        before, running = snapshot(scratch), self.start(scratch, command, words, env, **options)
        status, seconds = running.wait()
        out, err = (running.read(name) for name in ("out", "err"))
        return Outcome(status, seconds, out, err, difference(before, snapshot(scratch)), scratch)

    def start(self, scratch: Path, command: str, words: list[str], env: dict[str, str], **options: Any) -> "Running":
        """Start a command. It is ended after `limit` seconds, and then, or if it ends before, all that it has started.

        `leave`: not what it has started, if it ends before.
        """
        request = {"scratch": str(scratch), "command": command, "words": words, "env": env}
        request |= {"limit": LIMIT, "leave": False, **options}
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.socket)
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Running(scratch, connection)


class Running:
    """A command that was started."""

    def __init__(self, scratch: Path, connection: socket.socket) -> None:
        self.scratch, self.connection, self.replies = scratch, connection, connection.makefile()
        self.pid: int = json.loads(self.replies.readline())["pid"]  # and the id of its process group

    def wait(self) -> tuple[int | None, float]:
        """Return its exit status (None: it had to be ended) and how long it took, in seconds."""
        reply = json.loads(self.replies.readline())
        self.connection.close()
        return reply["status"], reply["seconds"]

    def read(self, name: str) -> str:
        """Return what is in its stdout ("out") or stderr ("err")."""
        path = self.scratch.with_name(f"{self.scratch.name}.{name}")
        return path.read_text(errors="replace") if path.exists() else ""


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder, with its size and time of change."""
    found: dict[str, tuple[int, int]] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in OTHERS]
        for name in (*folders, *files):
            path = os.path.join(parent, name)  # noqa: PTH118 - thousands of times a case
            stat = os.lstat(path)
            found[path] = (0, 0) if name in folders else (stat.st_size, stat.st_mtime_ns)
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def write_file(path: Path, content: Any) -> None:
    """Write text, bytes, or a list of rows as JSON Lines (a row that is text stays as it is); None: make a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    elif callable(content):
        content(path)
    elif isinstance(content, list):
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content))
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def changed(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config with some dotted keys replaced."""
    config = json.loads(json.dumps(config))
    for dotted, value in change.items():
        *parents, key = dotted.split(".")
        level = config
        for parent in parents:
            level = level.setdefault(parent, {})
        if value is DROP:
            level.pop(key, None)
        else:
            level[key] = value
    return config


def usual_words(case: Case) -> tuple[str, ...]:
    if case.command == "local_experiment":
        return ("{work}/config.yaml", str(REPO))
    if case.command in ("sft_finetune", "dpo_finetune"):
        return ("--config", "{work}/config.yaml", "--output", "{work}/out")
    raise ValueError(f"{case.id}: no words")


def run_case(server: Server, case: Case, configs: dict[str, Any], states: dict[str, Path]) -> Outcome:
    """Prepare a case's scratch folder and run it. Placeholders in its words and config are filled in."""
    scratch = server.folder / "cases" / f"{zlib.crc32(case.id.encode()):08x}"
    shutil.rmtree(scratch, ignore_errors=True)
    places = {"work": scratch / "work", "tiny": server.tiny, "store": scratch / "store", "repo": REPO}
    if case.state:
        shutil.copytree(states[case.state], scratch, symlinks=True)
        places |= json.loads((scratch / "places.json").read_text())
    for name in ("work", *FOLDERS):
        (scratch / name).mkdir(parents=True, exist_ok=True)

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            for name, place in places.items():
                value = value.replace(f"{{{name}}}", str(place))
            return value
        if isinstance(value, dict):
            return {fill(key): fill(part) for key, part in value.items()}
        return [fill(part) for part in value] if isinstance(value, list | tuple) else value

    if case.text is not None:
        write_file(scratch / "work" / "config.yaml", fill(case.text))
    elif case.change or not case.state:
        text = yaml.safe_dump(changed(fill(configs[case.config]), fill(case.change)), sort_keys=False)
        write_file(scratch / "work" / "config.yaml", text)
    for name, content in case.files.items():
        write_file(scratch / "work" / name, content if callable(content) else fill(content))
    if case.damage:
        case.damage(scratch / "work")
    words = [fill(str(word)) for word in (usual_words(case) if case.words is None else case.words)]
    env = {name: fill(value) for name, value in case.env.items()}
    trains = case.expect in ("ends", "either")
    return server.run(scratch, case.command, words, env, limit=TRAINING_LIMIT if trains else LIMIT, trains=trains)


def complaints(case: Case, outcome: Outcome, as_untouched: Callable[[Outcome], str | None] | None = None) -> list[str]:
    """What is wrong with the end of a case; [] if all is as it must be."""
    places = outcome.scratch / "places.json"
    texts = case.texts
    if places.exists():
        read = json.loads(places.read_text())
        texts = tuple(read.get(text.strip("{}"), text) for text in texts)
    if outcome.status is None:
        return [f"did not end within {LIMIT} s"]
    if case.expect == "ends" or (case.expect == "either" and outcome.status == 0):
        wrong = [] if outcome.status == 0 else [f"exit status {outcome.status}, not 0"]
        wrong += ["a traceback"] if "Traceback (most" in outcome.out + outcome.err else []
        wrong += [f"nothing says {text!r}" for text in texts if text not in outcome.out + outcome.err]
        if not wrong and as_untouched and (other := as_untouched(outcome)):
            wrong.append(other)
        return wrong
    work = f"{outcome.scratch}/work/"
    if case.expect == "inside" and outcome.status == ACCEPTED:
        inside = [path.removeprefix(work) for path in outcome.written if path.startswith(work)]
        strays = [path for path in inside if path != "local_runs" and not path.startswith("local_runs/")]
        tops = {path.split("/")[1] for path in inside if path.startswith("local_runs/")} - {"checkpoints"}
        strays += [f"several folders: {tops}"] if len(tops) != 1 else []
        if "/checkpoints/" in "".join(case.env.values()) + "/":
            strays += [path for path in inside if path.endswith("checkpoints/experiment.json")]
        return [f"written outside of one folder: {strays[:3]}"] if strays else []
    if outcome.status == ACCEPTED:
        return ["accepted: a trial, or a measurement, was started"]
    wrong = [] if outcome.status == 2 else [f"exit status {outcome.status}, not 2"]
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("error")]
    if len(lines) != 1 or len(errors) != 1:
        wrong.append(f"{len(lines)} lines on stderr, {len(errors)} of them 'error...'")
    wrong += ["a traceback"] if "Traceback (most" in outcome.out + outcome.err else []
    wrong += [f"the line does not say {text!r}" for text in texts if text not in " ".join(errors)]
    wrong += ["a line of more than 800 characters"] if any(len(line) > 800 for line in errors) else []
    wrong += ["control characters in the line"] if any(not line.isprintable() for line in errors) else []
    if case.expect == "either":  # the run may have got some way before
        return wrong
    caches = () if case.strict else tuple(f"{outcome.scratch}/{name}" for name in ("home", "tmp"))
    written = [path for path in outcome.written if not path.startswith(caches)] if caches else outcome.written
    if case.command in ("sft_finetune", "dpo_finetune") and not case.strict:  # what a trial said before it found it
        written = [path for path in written if not path.startswith((f"{work}out", f"{work}dpo"))]
    names = ", ".join(path.removeprefix(f"{outcome.scratch}/") for path in written[:3])
    return wrong + ([f"written: {names}"] if written else [])


def serve(path: str) -> None:
    """Be the server: a supervisor process for each connection, until stdin ends."""
    import select

    sys.path.insert(0, str(REPO))
    for name in IMPORTS:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while True:
            ready, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                try:
                    supervise(connection)
                except BaseException:
                    traceback.print_exc()
                os._exit(0)
            connection.close()


def supervise(connection: socket.socket) -> None:
    """Fork the child of one request, end it and all that it has started, and reply."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(connection.makefile().readline())
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        connection.close()
        be_the_case(**{name: value for name, value in request.items() if name not in ("limit", "leave")})
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # as the child does: whoever hears of it finds its group
    connection.sendall(json.dumps({"pid": child}).encode() + b"\n")
    status = None
    while time.monotonic() < started + request["limit"]:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(code)
            break
        time.sleep(0.005)
    seconds = time.monotonic() - started
    if status is None or not request["leave"]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    connection.sendall(json.dumps({"status": status, "seconds": round(seconds, 2)}).encode() + b"\n")


def be_the_case(scratch: str, command: str, words: list[str], env: dict[str, str], trains: bool, die: str = "") -> None:
    """Become `python COMMAND.py WORDS` in the scratch folder, as far as a fork can. `die`: at a call of this function."""
    os.setpgid(0, 0)
    for stream, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
        target = "/dev/null" if name == "in" else f"{scratch}.{name}"
        os.dup2(os.open(target, flags | (os.O_CREAT | os.O_TRUNC if stream else 0)), stream)
    sys.stdin = open(0)  # noqa: SIM115 - the server's has its end in it
    os.chdir(f"{scratch}/work")
    os.environ |= {"HF_HOME": f"{scratch}/home", "TMPDIR": f"{scratch}/tmp"}
    os.environ |= {"LOCAL_CHECKPOINT_STORAGE": f"{scratch}/store", **env}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    status = 1
    try:
        use_home(Path(os.environ["HF_HOME"]))
        fork_trials(trains)
        if die:
            module, _, name = die.rpartition(".")
            setattr(importlib.import_module(module), name, lambda *_, **__: os._exit(77))
        sys.argv = [str(REPO / f"{command.replace('.', '/')}.py"), *words]
        status = importlib.import_module(command).main() or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def use_home(home: Path) -> None:
    """What the libraries have read from the environment when they were imported."""
    import tempfile

    import datasets
    import huggingface_hub.constants

    import storage.checkpoints

    tempfile.tempdir = None
    datasets.config.HF_DATASETS_CACHE = home / "datasets"
    datasets.config.HF_MODULES_CACHE = str(home / "modules")
    huggingface_hub.constants.HF_HOME = storage.checkpoints.HF_HOME = str(home)
    huggingface_hub.constants.HF_HUB_CACHE = str(home / "hub")


def fork_trials(trains: bool) -> None:
    """Trials are forked from the case itself: another server would import everything again. Or they end the case."""
    import multiprocessing

    import experiment.runner
    import experiment.trial_process

    experiment.runner.PROCESSES = experiment.trial_process.PROCESSES = multiprocessing.get_context("fork")
    experiment.trial_process.start_importing = lambda: None
    if not trains:
        experiment.runner.LocalExperiment.start = lambda *_: os._exit(ACCEPTED)
        importlib.import_module("benchmarks.throughput").compare = lambda *_: os._exit(ACCEPTED)


if __name__ == "__main__":
    serve(sys.argv[1])
