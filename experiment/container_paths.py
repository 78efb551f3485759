"""Paths as an experiment's containers see them, looked for on this machine."""

import os
from pathlib import PurePosixPath
from typing import Any

WORKDIR = PurePosixPath("/run/determined/workdir")  # where a container has the folder that `det e create` uploads
PATHS = ("model_name", "dataset", "datasets", "eval_dataset", "name")  # hyperparameters; the last is of a data set
VALUES = ("val", "vals")  # of a search space


def host_path(name: str, mounts: list[dict[str, Any]]) -> str | None:
    """Return the path on an agent of what its containers call `name`; None if it is in none of the `bind_mounts`."""
    inside, outside = WORKDIR / name, None
    for mount in sorted(mounts, key=lambda mount: len(mount["container_path"])):  # the innermost last
        if inside.is_relative_to(folder := WORKDIR / mount["container_path"]):
            outside = str(PurePosixPath(mount["host_path"]) / inside.relative_to(folder))
    return outside


class ContainerPaths:
    """Where the paths in an experiment's containers are: by `bind_mounts`, each is on an agent's disk.

    This machine may have the same folders. If it does not, only a container can tell whether a path is right.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.mounts = config.get("bind_mounts") or []
        self.found: dict[str, str] = {}  # what was asked for, and where it is here
        self.unseen: dict[str, str] = {}  # what is not here, and why

    def here(self, path: str) -> str:
        """Return where `path` is on this machine; `path` itself if it is here, is not here, or is no container's."""
        on_host = host_path(path, self.mounts)
        if on_host is None:
            return path
        for place in (on_host, path):
            if os.path.exists(place):  # noqa: PTH110 - Path.exists raises for a name that is too long
                self.found[path] = place
                return place
        self.unseen[path] = f"only the containers see {path}, and this machine has no {on_host}"
        return path

    def translate(self, value: Any, is_path: bool = False) -> Any:
        """Return hyperparameters with each path of a model or a data set as `here` returns it."""
        if isinstance(value, dict):
            inner = {name: name in PATHS or (is_path and name in VALUES) for name in value}
            return {name: self.translate(part, inner[name]) for name, part in value.items()}
        if isinstance(value, list):
            return [self.translate(part, is_path) for part in value]
        return self.here(value) if is_path and isinstance(value, str) else value
