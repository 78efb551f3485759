"""A storm of SIGKILLs over an SFT, a grid of DPO trials and a comparison of the tiny example.

    python tests/storm.py --kills 100 --seed 1          # about ten minutes on two cores
    python tests/storm.py --kills 20 --processes        # each start is a real process, which takes eight seconds longer

A command runs until a random moment: some seconds after its start, or some milliseconds after something has changed in
its folder. Then its whole process group gets SIGKILL, or one process of it. The same command is started again, and so
on. After some kills it is let live. Then the weights of the checkpoints that are kept, the logged metrics and the
comparison's files must be those of an untouched run, bit for bit, and no process may be left.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS / "corpus"), str(TESTS.parent)]

from corpus import CONFIGS, make_tiny  # noqa: E402
from harness import REPO, Running, Server, changed  # noqa: E402
from states import ARGS, COMPARE, SEEDS, end_of_comparison, end_of_grid, read_lines, weights_of  # noqa: E402

PATIENCE = 120  # seconds for a command that is let live, or one of whose processes was killed
STEPS = {f"{ARGS}.max_steps": 6, f"{ARGS}.save_strategy": "steps", f"{ARGS}.save_steps": 2, f"{ARGS}.logging_steps": 3}
STEPS |= {f"{ARGS}.eval_strategy": "steps", f"{ARGS}.eval_steps": 2}


@dataclasses.dataclass
class Job:
    """A command, and how long it takes untouched."""

    name: str
    command: str
    words: tuple[str, ...]
    config: dict[str, Any] | None = None
    seconds: float = 0.0
    end: Any = None  # of an untouched run


class Process(Running):
    """A command in a process of its own."""

    def __init__(self, scratch: Path, command: str, words: list[str], env: dict[str, str]) -> None:
        self.scratch, self.started = scratch, time.monotonic()
        files = [scratch.with_name(f"{scratch.name}.{name}").open("w") for name in ("out", "err")]
        self.process = subprocess.Popen(
            [sys.executable, str(REPO / f"{command}.py"), *words],
            cwd=scratch / "work", env=os.environ | env, stdin=subprocess.DEVNULL, stdout=files[0], stderr=files[1],
            start_new_session=True,
        )  # fmt: skip
        self.pid = self.process.pid

    def wait(self) -> tuple[int | None, float]:
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
            status = None
        return status, time.monotonic() - self.started


class Storm:
    """The jobs, where they run, and what has gone wrong so far."""

    def __init__(self, folder: Path, tiny: Path, seed: int, processes: bool = False) -> None:
        self.folder, self.tiny, self.random = folder, tiny, random.Random(seed)
        self.server = None if processes else Server(folder / "server", tiny)
        self.wrong: list[str] = []
        self.rounds = 0

    def start(self, scratch: Path, job: Job) -> Running:
        places = {"{work}": str(scratch / "work"), "{tiny}": str(self.tiny), "{repo}": str(REPO)}
        words = [place_all(word, places) for word in job.words]
        env = {"HF_HOME": f"{scratch}/home", "TMPDIR": f"{scratch}/tmp", "OMP_NUM_THREADS": "1"}
        env |= {
            "LOCAL_CHECKPOINT_STORAGE": f"{scratch}/store",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.server is None:
            return Process(scratch, job.command, words, env)
        return self.server.start(scratch, job.command, words, {}, limit=PATIENCE, trains=True, leave=True)

    def prepare(self, job: Job) -> Path:
        """A folder for a round of a job, with its config, and the checkpoint that DPO starts from."""
        self.rounds += 1
        scratch = self.folder / f"{job.name}-{self.rounds}"
        for name in ("work", "store", "home", "tmp"):
            (scratch / name).mkdir(parents=True)
        if job.config:
            (scratch / "work" / "config.yaml").write_text(yaml.safe_dump(job.config))
            if uuid := job.config["hyperparameters"].get("model_ckpt"):
                shutil.copytree(self.start_from / uuid, scratch / "store" / uuid)
        return scratch

    def untouched(self, job: Job) -> Path:
        """Run a job in peace, and remember its end."""
        scratch = self.prepare(job)
        running = self.start(scratch, job)
        status, job.seconds = running.wait()
        if status != 0:
            raise RuntimeError(f"{job.name}, untouched: exit status {status}\n{running.read('err')[-2000:]}")
        job.end = end_of(job, scratch)
        print(f"{job.name}, untouched: {job.seconds:.1f} s", flush=True)
        return scratch

    def make_jobs(self) -> list[Job]:
        """Run the three jobs untouched: DPO starts from what SFT has made, and both are compared."""
        configs = {name: fill(config, self.tiny) for name, config in CONFIGS.items()}
        words = ("{work}/config.yaml", "{repo}", "--output", "{work}/run")
        sft = Job("SFT", "local_experiment", words, changed(configs["sft"], STEPS))
        self.start_from = self.untouched(sft) / "store"
        uuid = (self.start_from.parent / "work" / "run" / "best_checkpoint").read_text().strip()
        from_sft = {"hyperparameters.model_ckpt": uuid, f"{ARGS}.max_steps": 4, **dict(list(SEEDS.items())[:1])}
        betas = {"hyperparameters.dpo_beta": {"type": "categorical", "vals": [0.1, 0.05]}}
        config = changed(configs["dpo"], STEPS | from_sft | betas)
        grid = Job("grid", "local_experiment", (*words, "--max-concurrent", "2"), config)
        self.untouched(grid)
        tuned = next((self.start_from / uuid).glob("checkpoint-*"))
        more = ("--model", f"tuned={tuned}", "--number-of-samples", "9", "--batch-size", "2", "--number-of-pairs", "9")
        comparison = Job("comparison", "inference", (*COMPARE, *more))
        self.untouched(comparison)
        return [sft, grid, comparison]

    def strike(self, job: Job, kills: int) -> int:
        """A round of a job: kill it up to `kills` times, then let it live. Returns how often it was killed."""
        scratch, killed = self.prepare(job), 0
        while True:
            last = killed == kills
            running = self.start(scratch, job)
            what = None if last else self.kill_at_random(running, scratch, job)
            status, seconds = running.wait()
            self.look_for_orphans(running, f"{job.name} {what or 'let live'}")
            if what is None:
                if status != 0:
                    text = (running.read("err").strip() or running.read("out"))[-500:]
                    self.fail(f"{job.name}, let live after {killed} kills: exit status {status}: {text}")
                elif (end := end_of(job, scratch)) != job.end:
                    where = first_difference(job.end, end)
                    self.fail(f"{job.name}, killed {killed} times, ends unlike an untouched run: {where}")
                else:
                    print(f"{job.name}: killed {killed} times, ends like an untouched run", flush=True)
                    shutil.rmtree(scratch)
                return killed
            killed += 1
            print(f"{job.name}: {what}, ended with {status} after {seconds:.1f} s", flush=True)
            if status is None:
                self.fail(f"{job.name}: hangs after {what}")

    def kill_at_random(self, running: Running, scratch: Path, job: Job) -> str | None:
        """Kill the group, or one process of it, at a random moment. Returns what was done; None: it ended before."""
        begun, deadline = time.monotonic(), time.monotonic() + PATIENCE / 2
        if self.random.random() < 0.4:
            moment = self.random.uniform(0, job.seconds)
            while time.monotonic() - begun < moment and processes_of(running.pid):
                time.sleep(0.005)
        else:
            changes, state = self.random.randint(1, 25), state_of(scratch)
            while changes > 0 and processes_of(running.pid) and time.monotonic() < deadline:
                if (now := state_of(scratch)) != state:
                    state, changes = now, changes - 1
                time.sleep(0.002)
            time.sleep(self.random.uniform(0, 0.02))
        members = processes_of(running.pid)
        if not members:
            return None
        after = f"after {time.monotonic() - begun:.2f} s"
        if self.random.random() < 0.5 or len(members) == 1:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            return f"SIGKILL to the group of {len(members)} {after}"
        victim = self.random.choice(members)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        return f"SIGKILL to {'the runner' if victim == running.pid else 'one process'} of {len(members)} {after}"

    def look_for_orphans(self, running: Running, when: str) -> None:
        deadline = time.monotonic() + 10
        while left := processes_of(running.pid):
            if time.monotonic() > deadline:
                self.fail(f"{when}: processes {left} are left")
                os.killpg(running.pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    def fail(self, text: str) -> None:
        print(f"FAILED {text}", flush=True)
        self.wrong.append(text)


def place_all(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text


def fill(value: Any, tiny: Path) -> Any:
    if isinstance(value, dict):
        return {key: fill(part, tiny) for key, part in value.items()}
    if isinstance(value, list):
        return [fill(part, tiny) for part in value]
    return value.replace("{tiny}", str(tiny)) if isinstance(value, str) else value


def processes_of(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state, _, pgid = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(pgid) == group and state != "Z":
                    found.append(int(entry.name))
    return sorted(found)


def state_of(scratch: Path) -> tuple[int, int]:
    """How many files there are, and how large they are together."""
    sizes = list(sizes_below(scratch))
    return len(sizes), sum(sizes)


def sizes_below(folder: Path) -> Iterator[int]:
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                yield os.lstat(f"{parent}/{name}").st_size


def end_of(job: Job, scratch: Path) -> dict[str, Any]:
    """All that must be equal: results, weights of the checkpoints that are kept, metrics; a comparison's files."""
    if job.command == "inference":
        return end_of_comparison(scratch)
    end = end_of_grid(scratch)
    for events_file in sorted((scratch / "work" / "run" / "trials").glob("*/events.jsonl")):
        for event in read_lines(events_file):
            name = f"trial {events_file.parent.name} step {event.get('steps_completed')}"
            if event["kind"] in ("training", "validation"):
                metrics = event["metrics"].items()  # but for how fast it was
                end[f"{name} {event['kind']}"] = {
                    key: value for key, value in metrics if not key.startswith("tokens_per_second")
                }
            elif event["kind"] == "checkpoint":
                end[f"{name} weights"] = weights_of(scratch / "store", event["uuid"]).split(" of ")[0]
    return end


def first_difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    key = next(key for key in before | after if before.get(key) != after.get(key))
    return f"{key}: {str(after.get(key))[:200]} instead of {str(before.get(key))[:200]}"


def storm(
    folder: Path, tiny: Path, kills: int, seed: int, names: list[str] | None = None, processes: bool = False
) -> list[str]:
    """Let a storm of `kills` rage in `folder`. Returns what has gone wrong."""
    raging = Storm(folder, tiny, seed, processes)
    jobs = [job for job in raging.make_jobs() if names is None or job.name in names]
    left = {
        job.name: kills * (2 if job.name == "grid" else 1) // (len(jobs) + ("grid" in [j.name for j in jobs]))
        for job in jobs
    }
    left[jobs[0].name] += kills - sum(left.values())
    total = rounds = 0
    while any(left.values()):
        for job in jobs:
            if left[job.name]:
                struck = raging.strike(job, min(left[job.name], raging.random.randint(2, 8)))
                left[job.name], total, rounds = left[job.name] - struck, total + struck, rounds + 1
    if raging.server:
        raging.server.close()
    print(f"{total} kills in {rounds} rounds, seed {seed}: {len(raging.wrong)} failures", flush=True)
    return raging.wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", action="store_true", help="start real processes, not forks")
    parser.add_argument("--job", action="append", choices=["SFT", "grid", "comparison"])
    parser.add_argument("--folder", type=Path, help="default: a temporary one; keeps the folders of rounds that failed")
    parser.add_argument("--tiny", type=Path, default=Path(tempfile.gettempdir()) / "corpus-tiny")
    args = parser.parse_args()
    make_tiny(args.tiny)
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        wrong = storm(args.folder or Path(folder), args.tiny, args.kills, args.seed, args.job, args.processes)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
