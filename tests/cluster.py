"""A stand-in for a Determined cluster: a master that answers over HTTP, and containers for its trials.

Only the master is made up. What talks to it is Determined's own: its CLI and SDK, and in the container its
`prep_container`, launchers and Core API. A container is a namespace with a `/run` of its own, so Linux is needed.
"""

import base64
import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil
from determined.common import util
from processes import free_ports

from config.experiment import expand_trials

# What a container does before the entrypoint, in Determined's order. The hook is sourced under `set -e`, as there.
MOUNTS = """
set -e
mount -t tmpfs tmpfs /run
PRIVATE_FOLDERS
mkdir -p -m 777 /run/determined /run/determined/info /run/determined/train
cd FOLDER
"""
CONTAINER = """
set -e
python3 -m determined.exec.prep_container --proxy --download_context_directory
source startup-hook.sh
python3 -m determined.exec.prep_container --rendezvous --resources
exec python3 -m determined.exec.launch
"""
PORTS = ("C10D_PORT", "INTER_TRAIN_PROCESS_COMM_PORT_1", "INTER_TRAIN_PROCESS_COMM_PORT_2")
PROFILED = ("gpu", "cpu", "memory", "disk", "network")  # the groups of Core API's profiler
NOW = "2026-01-01T00:00:00Z"


def containers_work() -> bool:
    """Whether this machine lets us make namespaces with a mount of their own."""
    if not (sys.platform == "linux" and shutil.which("unshare")):
        return False
    return (
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True).returncode == 0
    )


@dataclass
class Trial:
    """What the master knows of a trial."""

    id: int
    experiment_id: int
    hparams: dict[str, Any]
    reports: list[dict[str, Any]] = field(default_factory=list)  # as trial/events.py writes them off the cluster
    starts: int = 0
    preempt: bool = False
    acknowledged: int = 0
    state: str = "STATE_COMPLETED"
    deleted: set[str] = field(default_factory=set)  # the checkpoints that the cluster has cleaned up

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [report for report in self.reports if report["kind"] == kind]


class Master:
    """The master: `url` is where it listens, `experiments` and `trials` what it was given and told, by id.

    `watch` is called with each report of a trial before it is kept: an exception in it loses the report.
    """

    def __init__(self, storage: Path) -> None:
        self.storage = self.hidden_storage = storage  # the second is where it itself finds the files
        self.experiments: dict[int, dict[str, Any]] = {}
        self.trials: dict[int, Trial] = {}
        self.models: dict[str, list[str]] = {}  # the registry: the checkpoints of a model's versions, by its name
        self.watch: Callable[[Trial, dict[str, Any]], None] = lambda trial, report: None
        self.unknown: list[str] = []  # requests that it has no answer to
        master = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length) or "{}") if length else {}
                parts = urlsplit(self.path)
                status, payload = master.answer(self.command, parts.path, parse_qs(parts.query), body)
                whole = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(whole)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # a container that was killed does not listen
                    self.wfile.write(whole)

            do_GET = do_POST = do_PATCH = do_PUT = answer

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Master":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> tuple[int, Any]:
        for route, handler in ROUTES.items():
            match = re.fullmatch(route, f"{method} {path}")
            if match:
                try:
                    return 200, handler(
                        self, *(int(g) if g.isdigit() else g for g in match.groups()), query=query, body=body
                    )
                except KeyError as missing:
                    return 404, {"error": {"code": 5, "reason": "NotFound", "error": f"{missing} not found"}}
        self.unknown.append(f"{method} {path}")
        return 404, {"error": {"code": 5, "reason": "NotFound", "error": f"no answer to {method} {path}"}}

    # What the CLI does.

    def info(self, query: Any, body: Any) -> dict[str, Any]:
        return {"cluster_id": "stand-in", "master_id": "stand-in", "version": "0.38.1", "telemetry": {"enabled": False}}

    def login(self, query: Any, body: Any) -> dict[str, Any]:
        return {"token": "token", "user": {"active": True, "admin": False, "username": "determined"}}

    def me(self, query: Any, body: Any) -> dict[str, Any]:
        return {"user": self.login(None, None)["user"]}

    def create(self, query: Any, body: dict[str, Any]) -> dict[str, Any]:
        config = util.yaml_safe_load(body["config"])
        config["checkpoint_storage"] = {"type": "directory", "container_path": str(self.storage)}
        files = {item["path"]: base64.b64decode(item.get("content") or "") for item in body["modelDefinition"]}
        experiment_id = len(self.experiments) + 1
        self.experiments[experiment_id] = {
            "config": config,
            "files": files,
            "body": body,
            "raw": body["modelDefinition"],
        }
        for hparams in expand_trials(config):
            trial_id = len(self.trials) + 1
            self.trials[trial_id] = Trial(trial_id, experiment_id, hparams)
        return {"experiment": self._experiment(experiment_id), "config": config, "warnings": []}

    # What a container does.

    def context_directory(self, task_id: str, query: Any, body: Any) -> dict[str, Any]:
        experiment = self.experiments[self._trial(task_id).experiment_id]
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for item in experiment["raw"]:
                entry = tarfile.TarInfo(item["path"])
                entry.type, entry.mode = bytes([item["type"]]), item["mode"]
                content = experiment["files"][item["path"]]
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return {"b64Tgz": base64.b64encode(packed.getvalue()).decode()}

    def rendezvous(self, allocation_id: str, resources_id: str, query: Any, body: Any) -> dict[str, Any]:
        slots = int(resources_id.split("-")[-1])
        return {"rendezvousInfo": {"addresses": ["127.0.0.1"], "rank": 0, "slots": [slots]}}

    def nothing(self, *args: Any, query: Any, body: Any) -> dict[str, Any]:
        return {}

    def preemption(self, allocation_id: str, query: dict[str, list[str]], body: Any) -> dict[str, Any]:
        trial = self._trial(allocation_id)
        deadline = time.monotonic() + float(query["timeout_seconds"][0])
        while not trial.preempt and time.monotonic() < deadline:
            time.sleep(0.005)
        return {"preempt": trial.preempt}

    def acknowledge(self, allocation_id: str, query: Any, body: Any) -> dict[str, Any]:
        self._trial(allocation_id).acknowledged += 1
        return {}

    def metrics(self, trial_id: int, query: Any, body: dict[str, Any]) -> dict[str, Any]:
        metrics = body["metrics"]
        report = {"kind": body["group"], "metrics": metrics["metrics"]["avgMetrics"]}
        if body["group"] in PROFILED:  # by the time of the report
            assert metrics["reportTime"]
        else:
            report["steps_completed"] = metrics["stepsCompleted"]
        return self._report(self.trials[trial_id], report)

    def progress(self, trial_id: int, query: Any, body: Any) -> dict[str, Any]:
        return self._report(self.trials[trial_id], {"kind": "progress", "progress": body["progress"]})

    def status(self, trial_id: int, query: Any, body: dict[str, Any]) -> dict[str, Any]:
        return self._report(self.trials[trial_id], {"kind": "status", "status": body["state"]})

    def checkpoint(self, query: Any, body: dict[str, Any]) -> dict[str, Any]:
        trial = self._trial(body["allocationId"])
        report = {"kind": "checkpoint", "uuid": body["uuid"], **body["metadata"], "resources": body["resources"]}
        return self._report(trial, report)

    def delete_checkpoints(self, query: Any, body: dict[str, Any]) -> dict[str, Any]:
        for patched in body["checkpoints"]:
            (trial,) = [
                t for t in self.trials.values() if any(r["uuid"] == patched["uuid"] for r in t.of_kind("checkpoint"))
            ]
            if not patched["resources"]["resources"]:  # nothing of it is left
                trial.deleted.add(patched["uuid"])
        return {}

    # The model registry.

    def create_model(self, query: Any, body: dict[str, Any]) -> dict[str, Any]:
        self.models[body["name"]] = []
        return self.get_model(body["name"], None, None)

    def register_version(self, name: str, query: Any, body: dict[str, Any]) -> dict[str, Any]:
        self.get_checkpoint(body["checkpointUuid"], None, None)
        self.models[name].append(body["checkpointUuid"])
        return self.model_version(name, len(self.models[name]), None, None) | {"metadata": {}}

    # What the SDK asks for.

    def experiment_trials(self, experiment_id: int, query: Any, body: Any) -> dict[str, Any]:
        self.experiments[experiment_id]
        found = [t.id for t in self.trials.values() if t.experiment_id == experiment_id]
        trials = [self.get_trial(trial_id, None, None)["trial"] for trial_id in found]
        return {"trials": trials, "pagination": {"total": len(found), "startIndex": 0, "endIndex": len(found)}}

    def trial_metrics(self, query: dict[str, list[str]], body: Any) -> bytes:
        """A stream of JSON, one object a line, in which what JSON has no number for is text."""
        (trial_id,), (group,) = map(int, query["trialIds"]), query["group"]
        key = "validation_metrics" if group == "validation" else "avg_metrics"
        lines = [
            {
                **{"archived": False, "endTime": NOW, "group": group, "id": 1, "trialId": trial_id, "trialRunId": 1},
                "totalBatches": report["steps_completed"],
                "metrics": {key: {k: v if math.isfinite(v) else str(v) for k, v in report["metrics"].items()}},
            }
            for report in self.trials[trial_id].of_kind(group)
        ]
        return b"".join(json.dumps({"result": {"metrics": [line]}}).encode() + b"\n" for line in lines)

    def get_experiment(self, experiment_id: int, query: Any, body: Any) -> dict[str, Any]:
        return {"experiment": self._experiment(experiment_id), "config": self.experiments[experiment_id]["config"]}

    def get_trial(self, trial_id: int, query: Any, body: Any) -> dict[str, Any]:
        trial = self.trials[trial_id]
        latest = [{"totalBatches": r["steps_completed"]} for r in trial.of_kind("validation")][-1:]
        validation = {"metrics": {"avgMetrics": {}}, "numInputs": 0, **latest[0]} if latest else None
        return {
            "trial": {
                **{"id": trial_id, "experimentId": trial.experiment_id, "hparams": trial.hparams, "startTime": NOW},
                **{"state": trial.state, "restarts": 0, "totalBatchesProcessed": 0, "bestValidation": None},
                "latestValidation": validation,
            }
        }

    def experiment_checkpoints(self, experiment_id: int, query: Any, body: Any) -> dict[str, Any]:
        self.experiments[experiment_id]
        return self._checkpoints([t for t in self.trials.values() if t.experiment_id == experiment_id])

    def trial_checkpoints(self, trial_id: int, query: Any, body: Any) -> dict[str, Any]:
        found = self._checkpoints([self.trials[trial_id]])
        if query.get("sortByAttr") == ["SORT_BY_BATCH_NUMBER"] and query["orderBy"] == ["ORDER_BY_DESC"]:
            found["checkpoints"].sort(key=lambda c: -c["metadata"]["steps_completed"])
        return found

    def get_checkpoint(self, uuid: str, query: Any, body: Any) -> dict[str, Any]:
        return {"checkpoint": self._all_checkpoints(list(self.trials.values()))[uuid]}

    def get_model(self, name: str, query: Any, body: Any) -> dict[str, Any]:
        return {
            "model": {
                **{"name": name, "numVersions": len(self.models[name]), "archived": False, "id": 1, "metadata": {}},
                **{"creationTime": NOW, "lastUpdatedTime": NOW, "userId": 1, "username": "u", "workspaceId": 1},
            }
        }

    def model_versions(self, name: str, query: dict[str, list[str]], body: Any) -> dict[str, Any]:
        """In no order unless one is asked for."""
        found = [self.model_version(name, 1 + i, None, None)["modelVersion"] for i in range(len(self.models[name]))]
        if query.get("sortBy") == ["SORT_BY_VERSION"] and query["orderBy"] == ["ORDER_BY_DESC"]:
            found.reverse()
        limit = int(query.get("limit", ["0"])[0]) or len(found)
        page = {"total": len(found), "startIndex": 0, "endIndex": len(found)}
        return {"modelVersions": found[:limit], "model": self.get_model(name, None, None)["model"], "pagination": page}

    def model_version(self, name: str, version: int, query: Any, body: Any) -> dict[str, Any]:
        """The n-th version was made at n minutes past `NOW`."""
        if not 0 < version <= len(self.models[name]):
            raise KeyError(f"version {version}")
        made = NOW.replace("00:00Z", f"{version:02}:00Z")
        return {
            "modelVersion": {
                **{"version": version, "id": version, "creationTime": made, "lastUpdatedTime": made, "username": "u"},
                "checkpoint": self.get_checkpoint(self.models[name][version - 1], None, None)["checkpoint"],
                "model": self.get_model(name, None, None)["model"],
            }
        }

    def checkpoint_files(self, uuid: str, query: Any, body: Any) -> bytes:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            tar.add(self.hidden_storage / uuid, arcname=".")
        return packed.getvalue()

    def _checkpoints(self, trials: list[Trial]) -> dict[str, Any]:
        """The best by the searcher's metric first, but for those without one: a database may well put them there."""
        searcher = self.experiments[trials[0].experiment_id]["config"]["searcher"]
        sign = 1 if searcher.get("smaller_is_better", True) else -1
        found = list(self._all_checkpoints(trials).values())
        found.sort(
            key=lambda c: (
                -math.inf if c["training"]["searcherMetric"] is None else sign * c["training"]["searcherMetric"]
            )
        )
        return {"checkpoints": found, "pagination": {"total": len(found), "startIndex": 0, "endIndex": len(found)}}

    def _all_checkpoints(self, trials: list[Trial]) -> dict[str, dict[str, Any]]:
        found = {}
        for trial in trials:
            config = self.experiments[trial.experiment_id]["config"]
            validations = {r["steps_completed"]: r["metrics"] for r in trial.of_kind("validation")}
            for report in trial.of_kind("checkpoint"):
                metrics = validations.get(report["steps_completed"], {})
                found[report["uuid"]] = {
                    **{"uuid": report["uuid"], "resources": report.get("resources", {})},
                    "metadata": {"steps_completed": report["steps_completed"], "trial_id": trial.id},
                    "state": f"STATE_{'DELETED' if report['uuid'] in trial.deleted else 'COMPLETED'}",
                    **{"reportTime": NOW, "taskId": f"{trial.id}.1", "allocationId": "1"},
                    "training": {
                        **{"trialId": trial.id, "experimentId": trial.experiment_id, "experimentConfig": config},
                        **{"hparams": trial.hparams, "validationMetrics": {"avgMetrics": metrics}},
                        "searcherMetric": metrics.get(config["searcher"]["metric"]),
                    },
                }
        return found

    def _experiment(self, experiment_id: int) -> dict[str, Any]:
        experiment = self.experiments[experiment_id]
        return {
            **{"id": experiment_id, "name": experiment["config"].get("name", ""), "config": experiment["config"]},
            **{"archived": False, "jobId": "1", "numTrials": 1, "originalConfig": experiment["body"]["config"]},
            **{"projectId": 1, "projectOwnerId": 1, "searcherType": "single", "username": "u"},
            **{"startTime": NOW, "endTime": NOW, **experiment.get("times", {})},
            "state": experiment.get("state", "STATE_COMPLETED"),
        }

    def _trial(self, name: str) -> Trial:
        """The trial of a task or allocation, which we name `<trial>.<start>`."""
        return self.trials[int(str(name).split(".")[0])]

    def _report(self, trial: Trial, report: dict[str, Any]) -> dict[str, Any]:
        self.watch(trial, report)
        trial.reports.append(report)
        return {}


ROUTES = {
    "GET /info": Master.info,
    "POST /api/v1/auth/login": Master.login,
    "GET /api/v1/me": Master.me,
    "POST /api/v1/experiments": Master.create,
    "POST /api/v1/runs/start": Master.nothing,
    r"GET /api/v1/tasks/([^/]+)/context_directory": Master.context_directory,
    r"GET /api/v1/allocations/([^/]+)/resources/([^/]+)/rendezvous": Master.rendezvous,
    r"POST /api/v1/allocations/([^/]+)/acceleratorData": Master.nothing,
    r"GET /api/v1/allocations/([^/]+)/signals/preemption": Master.preemption,
    r"POST /api/v1/allocations/([^/]+)/signals/ack_preemption": Master.acknowledge,
    r"POST /api/v1/trials/(\d+)/metrics": Master.metrics,
    r"POST /api/v1/trials/(\d+)/progress": Master.progress,
    r"POST /api/v1/trials/(\d+)/runner/metadata": Master.status,
    r"POST /api/v1/checkpoints": Master.checkpoint,
    r"PATCH /api/v1/checkpoints": Master.delete_checkpoints,
    r"POST /api/v1/models": Master.create_model,
    r"POST /api/v1/models/([^/]+)/versions": Master.register_version,
    r"GET /api/v1/experiments/(\d+)": Master.get_experiment,
    r"GET /api/v1/experiments/(\d+)/checkpoints": Master.experiment_checkpoints,
    r"GET /api/v1/experiments/(\d+)/trials": Master.experiment_trials,
    r"GET /api/v1/trials/metrics/trial_metrics": Master.trial_metrics,
    r"GET /api/v1/trials/(\d+)": Master.get_trial,
    r"GET /api/v1/trials/(\d+)/checkpoints": Master.trial_checkpoints,
    r"GET /api/v1/checkpoints/([^/]+)": Master.get_checkpoint,
    r"GET /api/v1/models/([^/]+)": Master.get_model,
    r"GET /api/v1/models/([^/]+)/versions": Master.model_versions,
    r"GET /api/v1/models/([^/]+)/versions/(\d+)": Master.model_version,
    r"GET /checkpoints/([^/]+)": Master.checkpoint_files,
}


class Container:
    """A container of a trial, started anew as a cluster would: nothing in it but what the master and the agent give.

    With a `uid` it runs as that user, as for an account that is linked to an agent user. Only root can start it then.
    """

    def __init__(
        self,
        master: Master,
        trial: Trial,
        slots: int,
        keep: list[Path],
        folder: Path,
        uid: int | None = None,
        **env: str,
    ) -> None:
        trial.starts += 1
        self.trial = trial
        allocation = f"{trial.id}.{trial.starts}"
        config = master.experiments[trial.experiment_id]["config"]
        config["resources"] = config.get("resources", {}) | {"slots_per_trial": slots}
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": "/tmp",
            **{"DET_MASTER": master.url, "DET_CLUSTER_ID": "stand-in", "DET_AGENT_ID": "agent"},
            **{"DET_SLOT_IDS": json.dumps(list(range(slots))), "DET_TASK_ID": f"{trial.id}.task"},
            **{"DET_ALLOCATION_ID": allocation, "DET_SESSION_TOKEN": "token", "DET_TASK_TYPE": "TRIAL"},
            "DET_USER_TOKEN": "token",  # what the SDK logs in with
            **{"DET_USER": "determined", "DET_TRIAL_ID": str(trial.id), "DET_EXPERIMENT_ID": str(trial.experiment_id)},
            **{"DET_TRIAL_SEED": "0", "DET_HPARAMS": json.dumps(trial.hparams)},
            **{"DET_EXPERIMENT_CONFIG": json.dumps(config), "DET_TRIAL_RUN_ID": str(trial.starts)},
            **{"DET_RESOURCES_ID": f"resources-{slots}", "DET_RESOURCES_TYPE": "docker-container"},
            "DET_STEPS_COMPLETED": "0",
            # A cluster's containers have ports of their own; these share the machine's.
            **dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True)),
            **dict(
                variable.split("=", 1) for variable in config.get("environment", {}).get("environment_variables", [])
            ),
            **env,
        }
        saved = trial.of_kind("checkpoint")
        if saved:
            environment["DET_LATEST_CHECKPOINT"] = saved[-1]["uuid"]
            environment["DET_STEPS_COMPLETED"] = str(saved[-1]["steps_completed"])
        folder = folder / allocation
        folder.mkdir(parents=True)
        self.log = folder.with_name(f"{allocation}.log")
        # A /tmp of its own too, in which what the test keeps outside it stays to be seen. The same for folders of root
        # that another user may not enter, if the test or its Python is in them.
        private, user = ["/tmp"], ["unshare", "-rm"]
        inside = ["bash", "-c", CONTAINER]
        if uid is not None:
            keep = [*keep, Path(sys.base_prefix)]
            closed = [[str(p) for p in reversed(path.parents) if not p.stat().st_mode & 1] for path in keep]
            private += {first for first, *_ in filter(None, closed) if not first.startswith("/tmp/")}
            user, inside = ["unshare", "-m"], ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *inside]
            os.chown(folder, uid, uid)
        mounts = [f"mkdir -p /run/kept/{i} && mount --bind {path} /run/kept/{i}" for i, path in enumerate(keep)]
        mounts += [f"mount -t tmpfs -o mode={1777 if path == '/tmp' else 755} tmpfs {path}" for path in private]
        mounts += [f"mkdir -p {path} && mount --bind /run/kept/{i} {path}" for i, path in enumerate(keep)]
        script = MOUNTS.replace("PRIVATE_FOLDERS", "\n".join(mounts)).replace("FOLDER", str(folder))
        with self.log.open("w") as log:
            command = [
                *user,
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "bash",
                "-c",
                f"{script}exec {shlex.join(inside)}",
            ]
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL to everything in it, as when its machine goes away: none of it is left to try again what failed."""
        inside = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        while any(map(_lives, inside)):
            time.sleep(0.02)

    def wait(self) -> int:
        """Its exit status, with a preemption signal that was acknowledged taken back."""
        status = self.process.wait(timeout=600)
        self.trial.preempt = False
        return status


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
