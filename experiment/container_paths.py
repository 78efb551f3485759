"""Paths as an experiment's containers see them, looked for on this machine."""

import os
from typing import Any

PATHS = ("model_name", "dataset", "datasets", "eval_dataset", "name")  # hyperparameters; the last is of a data set
VALUES = ("val", "vals")  # of a search space


class ContainerPaths:
    """Where the paths in an experiment's containers are: by `bind_mounts`, each is on an agent's disk.

    This machine may have the same folders. If it does not, only a container can tell whether a path is right.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.mounts = [(m["container_path"].rstrip("/"), m["host_path"]) for m in config.get("bind_mounts") or []]
        self.found: dict[str, str] = {}  # what was asked for, and where it is here
        self.unseen: dict[str, str] = {}  # what is not here, and why

    def here(self, path: str) -> str:
        """Return where `path` is on this machine; `path` itself if it is here, is not here, or is no container's."""
        mounts = [mount for mount in self.mounts if path == mount[0] or path.startswith(f"{mount[0]}/")]
        if not mounts or os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a name that is too long
            return path
        container, host = max(mounts)  # the innermost
        on_host = host.rstrip("/") + path.removeprefix(container)
        if os.path.exists(on_host):  # noqa: PTH110
            self.found[path] = on_host
            return on_host
        self.unseen[path] = f"only the containers see {container}, and this machine has no {on_host}"
        return path

    def translate(self, value: Any, is_path: bool = False) -> Any:
        """Return hyperparameters with each path of a model or a data set as `here` returns it."""
        if isinstance(value, dict):
            inner = {name: name in PATHS or (is_path and name in VALUES) for name in value}
            return {name: self.translate(part, inner[name]) for name, part in value.items()}
        if isinstance(value, list):
            return [self.translate(part, is_path) for part in value]
        return self.here(value) if is_path and isinstance(value, str) else value
