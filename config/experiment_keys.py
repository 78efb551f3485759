"""The keys of an experiment beside its hyperparameters, with their types: what Determined's master accepts.

The master checks them when an experiment is created (its schemas/expconf/v0). Neither the CLI nor the Python package
knows them. Keys that the master ignores (`data`) or that few clusters use (`slurm`) may hold any mapping.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, create_model

from config.validation import FORBID_UNKNOWN, Count, Natural, NotEmpty, validate
from errors import UserError, nearest

Texts = list[str]


def _keys(title: str, required: str = "", /, **types: Any) -> Any:
    """A model of a mapping: a key may be missing or null unless it is `required`."""
    fields: Any = {key: (type_ if key in required.split() else (type_ | None, None)) for key, type_ in types.items()}
    return create_model(title, __config__=FORBID_UNKNOWN, **fields)


def _checked(type_: Any, is_right: Callable[[Any], object], wrong: str) -> Any:
    """A `type_` whose values must satisfy `is_right`; `wrong` is the error's text."""

    def check(value: Any) -> Any:
        if not is_right(value):
            raise ValueError(f"{value!r} {wrong}" if isinstance(value, str) else wrong)
        return value

    return Annotated[type_, AfterValidator(check)]


ABSOLUTE_PATH = _checked(str, lambda path: path.startswith("/"), "is not an absolute path")
PATH_WITHIN = _checked(str, lambda path: ".." not in path.split("/"), "leads out of the storage")
MEMORY_SIZE = re.compile(r"([0-9]*[.])?[0-9]+ ?(([kmgtp](i?b)?)|b)?", re.IGNORECASE)
BY_DEVICE = ("cpu", "cuda", "rocm", "gpu")
LENGTH = _checked(
    _keys("Length", batches=Natural, records=Natural, epochs=Natural),
    lambda length: len(length.model_fields_set) == 1,
    "give one of batches, records and epochs",
)
BIND_MOUNT = _keys(
    "BindMount", "host_path container_path",
    host_path=ABSOLUTE_PATH, container_path=str, read_only=bool, propagation=str,
)  # fmt: skip
PROXY_PORT = _keys(
    "ProxyPort", "proxy_port", proxy_port=float, proxy_tcp=bool, unauthenticated=bool, default_service_id=bool
)
CREDENTIALS = "username password auth email serveraddress identitytoken registrytoken"
REGISTRY_AUTH = _keys("RegistryAuth", **dict.fromkeys(CREDENTIALS.split(), str))
DEVICE = _checked(str, re.compile(r"[^:]+:[^:]+(:[^:]+)?").fullmatch, "is not host_path:container_path[:mode]") | _keys(
    "Device", "host_path container_path", host_path=str, container_path=str, mode=str
)
ENVIRONMENT = _keys(
    "Environment",
    image=NotEmpty | _keys("Images", **dict.fromkeys(BY_DEVICE, NotEmpty)),
    environment_variables=Texts | _keys("Variables", **dict.fromkeys(BY_DEVICE, Texts)),
    proxy_ports=list[PROXY_PORT], ports=dict[str, int], force_pull_image=bool, registry_auth=REGISTRY_AUTH,  # type: ignore[valid-type]
    add_capabilities=Texts, drop_capabilities=Texts, pod_spec=dict,
)  # fmt: skip
RESOURCES = _keys(
    "Resources",
    agent_label=str, devices=list[DEVICE], is_single_node=bool, max_slots=Natural,  # type: ignore[valid-type]
    native_parallel=bool, priority=Annotated[int, Field(ge=1, le=99)], resource_pool=str, slots=int,
    slots_per_trial=Natural, weight=Annotated[float, Field(ge=0)],
    shm_size=Natural | _checked(str, MEMORY_SIZE.fullmatch, "is not a size of memory, as in 2g"),
)  # fmt: skip
ACTION = Literal["cancel_retries", "exclude_node"]
LOG_POLICY = _checked(
    _keys("LogPolicy", name=str, pattern=str, action=ACTION | _keys("LogAction", "type", type=ACTION)),
    lambda policy: policy.name or policy.model_fields_set >= {"pattern", "action"},
    "give a name, or a pattern and an action",
)
PROFILING = _checked(
    _keys("Profiling", enabled=bool, begin_on_batch=Natural, end_after_batch=Natural, sync_timings=bool),
    lambda given: given.end_after_batch is None or (given.begin_on_batch or 0) <= given.end_after_batch,
    "end_after_batch is before begin_on_batch",
)
EXPERIMENT: type[BaseModel] = _keys(
    "Experiment", "hyperparameters searcher",
    hyperparameters=dict, searcher=dict, checkpoint_storage=dict, name=str, entrypoint=str | Texts, description=str,
    bind_mounts=list[BIND_MOUNT], environment=ENVIRONMENT, resources=RESOURCES, log_policies=list[LOG_POLICY],  # type: ignore[valid-type]
    max_restarts=Natural, checkpoint_policy=Literal["best", "all", "none"], labels=Texts, workspace=str, project=str,
    min_checkpoint_period=LENGTH, min_validation_period=LENGTH, scheduling_unit=Count, records_per_epoch=int,
    perform_initial_validation=bool, preemption_timeout=int, debug=bool, profiling=PROFILING,
    reproducibility=_keys("Reproducibility", experiment_seed=Annotated[int, Field(ge=0, lt=2**32)]),
    retention_policy=_keys("Retention", log_retention_days=Annotated[int, Field(ge=-1, le=32767)]),
    **dict.fromkeys(("data", "data_layer", "integrations", "internal", "pbs", "security", "slurm"), dict),
    tensorboard_storage=dict, optimizations=dict,
)  # fmt: skip

RUNGS = Annotated[int, Field(ge=1, le=30)]  # beyond, a power of the divisor may be no number
CONCURRENT = {"max_concurrent_trials": Natural}
SEVERAL = {**CONCURRENT, "max_trials": Count}
HALVING = SEVERAL | {
    "divisor": Annotated[float, Field(gt=1, le=1e6)], "max_time": Count, "stop_once": bool, "time_metric": NotEmpty,
}  # fmt: skip
SEARCHERS: dict[str, dict[str, Any]] = {
    "single": {},
    "grid": CONCURRENT,
    "random": SEVERAL,
    "adaptive_asha": HALVING
    | {"bracket_rungs": list[RUNGS], "max_rungs": RUNGS, "mode": Literal["aggressive", "standard", "conservative"]},
    "async_halving": HALVING | {"num_rungs": RUNGS},
}
KEYS_OF_STORAGE = {  # the first one is required; their values are text
    "shared_fs": "host_path storage_path propagation container_path checkpoint_path tensorboard_path",
    "directory": "container_path",
    "s3": "bucket access_key secret_key endpoint_url prefix",
    "gcs": "bucket prefix",
    "azure": "container connection_string account_url credential",
}
TEXT_OF_STORAGE = {key: str for keys in KEYS_OF_STORAGE.values() for key in keys.split()} | {
    "host_path": ABSOLUTE_PATH, "storage_path": PATH_WITHIN, "prefix": PATH_WITHIN,
    "bucket": NotEmpty, "container": NotEmpty,
}  # fmt: skip
REQUIRED = {kind: keys.partition(" ")[0] for kind, keys in KEYS_OF_STORAGE.items()} | {
    "random": "max_trials",
    "adaptive_asha": "max_trials max_time time_metric",
    "async_halving": "num_rungs max_trials max_time time_metric",
}
# For a section with variants: the key that says which one is meant, the keys that all have, and those of each. Without
# that key the cluster's default decides, so the keys of all variants are allowed. None: of a variant that is gone.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[Any, dict[str, Any]]]] = {
    "searcher": (
        "name",
        {"metric": str, "smaller_is_better": bool, "max_length": Natural | LENGTH, "source_trial_id": int,
         "source_checkpoint_uuid": str},
        SEARCHERS,
    ),
    "checkpoint_storage": (
        "type",
        dict.fromkeys(("save_experiment_best", "save_trial_best", "save_trial_latest"), Natural),
        {None: {"user": Any}}
        | {kind: {key: TEXT_OF_STORAGE[key] for key in keys.split()} for kind, keys in KEYS_OF_STORAGE.items()},
    ),
}  # fmt: skip


def check_experiment(config: dict[str, Any]) -> None:
    """Raise `UserError`, which names the key, for what Determined would not accept in `config`."""
    validate(EXPERIMENT, config, "", noun="a key of an experiment")
    for section, (tag, common, variants) in VARIANTS.items():
        given = config.get(section) or {}
        kind = given.get(tag)
        kinds = list(filter(None, variants))
        if kind is not None and kind not in kinds:
            known = f"{', '.join(kinds)}{nearest(kind, kinds)}"
            raise UserError(f"{section}.{tag} is {kind!r}, which is not one of {known}")
        own = variants[kind] if kind else {key: type_ for keys in variants.values() for key, type_ in keys.items()}
        noun = f"a key of {section}{f' with {tag} {kind}' if kind else ''}"
        required = REQUIRED.get(str(kind), "")
        validate(_keys(section, required, **{tag: str}, **common, **own), given, section, noun=noun)
