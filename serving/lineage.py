"""What a model was trained on, step by step: from the base model through SFT to DPO, as `trial.json` files say."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.validation import is_uuid
from storage.adapter_chains import is_adapter, read_chain
from storage.checkpoints import cached_checkpoint, local_checkpoint_storage
from storage.files import read_json
from storage.hub import looks_like_path
from storage.origins import FILE, Origin, read_origin


@dataclass
class Stage:
    """One training in the past of a model."""

    uuid: str | None  # of its checkpoint; None if the folder that holds it does not say
    origin: Origin | None  # None: it is not on this machine
    step: int | None = None  # of the checkpoint, with the metrics of its last evaluation, if it says so
    metrics: dict[str, float] | None = None

    @property
    def method(self) -> str:
        """SFT or DPO."""
        return "DPO" if self.origin and self.origin.beta is not None else "SFT"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those that the checkpoint tells, with local paths cut to their last part; none of earlier releases."""
        return _tidy(self.origin.hyperparameters) if self.origin else {}


@dataclass
class Lineage:
    """All trainings of a model, the first one first, and the model at their beginning, if that is known."""

    base: str | None  # a hub id or a folder
    stages: list[Stage]
    revision: str | None = None  # the base's commit on the hub, if adapters stand on it

    @property
    def base_on_hub(self) -> str | None:
        """The base model, if it is one of the hub's."""
        return self.base if self.base and not _is_local(self.base) else None

    @property
    def base_name(self) -> str:
        """What to call the base model: a hub id, or a folder without the way to it."""
        return public_name(self.base) if self.base else "a base model that its checkpoint does not name"


def read_lineage(source: str) -> Lineage:
    """Return what the folder or hub id of a model tells of its past. A model of others has no stage."""
    folder, stages = Path(source), list[Stage]()
    chain = read_chain(folder) if is_adapter(folder) else None
    copies = chain.adapters[:-1] if chain else []  # of what its adapter stands on, the lowest first
    uuid = _uuid_of(folder)
    while origin := read_origin(folder):
        stages.append(Stage(uuid, origin, *_evaluation(folder)))
        if (uuid := origin.model_ckpt) is None:
            break
        copy = copies.pop() if copies else None
        before = next(_folders_of(uuid), copy)
        if before is None or not read_origin(before):
            stages.append(Stage(uuid, None))
            break
        folder = before
    told = stages[0].origin.base if stages and stages[0].origin else source if chain is None else None
    base = told or (chain.base if chain and not is_uuid(chain.base) else None)
    return Lineage(base, stages[::-1], chain.revision if chain else None)


def _folders_of(ckpt_uuid: str) -> Iterator[Path]:
    """Yield where a checkpoint is on this machine."""
    for root in (local_checkpoint_storage() / ckpt_uuid, cached_checkpoint(ckpt_uuid)):
        yield from (path for path in (root, *sorted(root.glob("*"))) if (path / FILE).is_file())


def _uuid_of(folder: Path) -> str | None:
    return next((part for part in reversed(folder.absolute().parts) if is_uuid(part)), None)


def _evaluation(folder: Path) -> tuple[int | None, dict[str, float] | None]:
    """Return the step and the metrics of the last evaluation before a checkpoint, if a trainer's state is with it."""
    with suppress(OSError):
        state = read_json((folder / "trainer_state.json").read_bytes())
        rows = state.get("log_history") if isinstance(state, dict) else None
        for row in reversed(rows if isinstance(rows, list) else []):
            found = {name: value for name, value in row.items() if name.startswith("eval_") and _is_metric(name, value)}
            if found:
                return row.get("step"), found
    return None, None


def _is_metric(name: str, value: Any) -> bool:
    timing = ("runtime", "per_second", "num_tokens")  # how fast, and how much
    return isinstance(value, int | float) and not name.endswith(timing)


def _is_local(name: str) -> bool:
    with suppress(OSError):
        return looks_like_path(name) or Path(name).exists()
    return True


def public_name(name: str) -> str:
    """Return a hub id as it is, and of a path on this machine, which is no one else's business, the last part."""
    return Path(name).name if _is_local(name) else name


def _tidy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tidy(of) for key, of in value.items()}
    if isinstance(value, list):
        return [_tidy(of) for of in value]
    return public_name(value) if isinstance(value, str) and looks_like_path(value) else value
