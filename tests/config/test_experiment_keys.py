"""The keys of an experiment that only Determined reads: what its master would refuse is refused here, in one line."""

import copy

import pytest

from config.experiment_keys import check_experiment
from errors import UserError

VALID = {
    "name": "x",
    "searcher": {"name": "single", "metric": "eval_loss"},
    "hyperparameters": {},
}


def with_key(path, value):
    config = copy.deepcopy(VALID)
    *levels, last = path.split("/")
    level = config
    for key in levels:
        level = level.setdefault(key, {})
    level[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", None),
        ("entrypoint", ["python3", "train.py"]),
        ("environment", {"image": {"cpu": "a", "cuda": "b"}, "environment_variables": {"cuda": ["A=1"]}}),
        ("environment", {"image": "a", "ports": {"ssh": 22}, "proxy_ports": [{"proxy_port": 8080, "proxy_tcp": True}]}),
        (
            "resources",
            {"slots_per_trial": 0, "shm_size": "1.5 GiB", "max_slots": None, "devices": ["/dev/a:/dev/b:rw"]},
        ),
        (
            "resources",
            {"shm_size": 4096, "devices": [{"host_path": "/a", "container_path": "/b", "mode": None}], "priority": 99},
        ),
        ("log_policies", [{"name": "CUDA OOM"}, {"pattern": "x", "action": "exclude_node"}]),
        ("log_policies", [{"pattern": "x", "action": {"type": "cancel_retries"}}]),
        ("checkpoint_storage", {"save_trial_best": 0, "user": "x"}),
        ("checkpoint_storage", {"type": "shared_fs", "host_path": "/tmp", "storage_path": "x"}),
        ("checkpoint_storage", {"type": "s3", "bucket": "b", "save_trial_latest": 2, "prefix": "a..b/c"}),
        ("checkpoint_storage", {"type": None, "host_path": "/tmp", "bucket": None}),
        ("profiling", {"enabled": True, "begin_on_batch": 5, "end_after_batch": None}),
        ("searcher", {"name": "grid", "metric": "a", "max_concurrent_trials": 4, "max_length": {"batches": 10}}),
        (
            "searcher",
            {"name": "adaptive_asha", "metric": "a", "max_trials": 9, "max_time": 10, "time_metric": "epochs"},
        ),
        (
            "searcher",
            {
                "name": "async_halving",
                "metric": "a",
                "max_trials": 9,
                "num_rungs": 2,
                "max_time": 10,
                "time_metric": "epochs",
            },
        ),
        ("optimizations", {"aggregation_frequency": 2, "mixed_precision": "O1", "gradient_compression": None}),
        ("bind_mounts", [{"host_path": "/tmp", "container_path": "x", "read_only": True}]),
        ("min_validation_period", {"epochs": 1}),
        ("slurm", {"sbatch_args": ["-x"]}),
        ("retention_policy", {"log_retention_days": -1}),
    ],
)
def test_what_determined_accepts(path, value):
    check_experiment(with_key(path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("name", 5, " is 5, which is not text"),
        ("max_restarts", -1, " -1 is not at least 0"),
        ("max_restarts", "2", " is '2', which is not a whole number"),
        ("max_restarts", True, " is True, which is not a whole number"),
        ("debug", "yes", " is 'yes', which is not true or false"),
        ("labels", "a", " is 'a', which is not a list, as in [a, b]"),
        ("entrypoint", [1], "[0] is 1, which is not text"),
        ("resources", 5, " is 5, which is not a mapping"),
        ("resources/slot_per_trial", 2, " is not a key of an experiment (did you mean 'slots_per_trial'?)"),
        ("resources/slots_per_trial", 1.5, " is 1.5, which is not a whole number"),
        ("resources/shm_size", "big", ": 'big' is not a size of memory, as in 2g"),
        ("resources/priority", 100, " 100 is not at most 99"),
        ("environment/imag", "x", " is not a key of an experiment (did you mean 'image'?)"),
        ("environment/image", {"cpuu": "x"}, ".cpuu is not a key of an experiment (did you mean 'cpu'?)"),
        ("environment/environment_variables", ["A=1", 2], "[1] is 2, which is not text"),
        ("bind_mounts", [{"host_path": "/a"}], "[0].container_path is missing"),
        ("bind_mounts", [{"host_path": "a", "container_path": "b"}], "[0].host_path: 'a' is not an absolute path"),
        ("log_policies", [{"patern": "x"}], "[0].patern is not a key of an experiment (did you mean 'pattern'?)"),
        ("log_policies", [{"pattern": "x"}], "[0]: give a name, or a pattern and an action"),
        (
            "log_policies",
            [{"pattern": "x", "action": {"type": "stop"}}],
            "[0].action.type is 'stop', which is not one of cancel_retries, exclude_node",
        ),
        ("searcher/name", "gird", " is 'gird', which is not one of single, grid, random, adaptive_asha, async_halving"),
        ("searcher/name", ["grid"], " is ['grid'], which is not one of single, grid, random, adaptive_asha, async"),
        ("searcher/nmae", "x", " is not a key of searcher with name single (did you mean 'name'?)"),
        ("searcher/smaller_is_better", "no", " is 'no', which is not true or false"),
        ("searcher/max_trials", 2, " is not a key of searcher with name single"),
        ("searcher/max_length", {"batches": 1, "epochs": 1}, ": give one of batches, records and epochs"),
        ("checkpoint_storage/type", "nfs", " is 'nfs', which is not one of shared_fs, directory, s3, gcs, azure"),
        (
            "checkpoint_storage/save_trial_bst",
            1,
            " is not a key of checkpoint_storage (did you mean 'save_trial_best'?)",
        ),
        (
            "checkpoint_storage",
            {"type": "s3", "host_path": "/a"},
            ".host_path is not a key of checkpoint_storage with type s3",
        ),
        ("checkpoint_storage/save_trial_best", -1, " -1 is not at least 0"),
        ("checkpoint_storage", {"type": "s3"}, ".bucket is missing"),
        ("checkpoint_storage", {"type": "gcs", "bucket": ""}, ".bucket is empty"),
        ("checkpoint_storage", {"type": "azure", "container": None}, ".container is null, which is not text"),
        ("checkpoint_storage", {"type": "shared_fs", "storage_path": "x"}, ".host_path is missing"),
        ("checkpoint_storage", {"host_path": "x"}, ".host_path: 'x' is not an absolute path"),
        ("checkpoint_storage/storage_path", "../../etc", ": '../../etc' leads out of the storage"),
        ("checkpoint_storage", {"type": "s3", "bucket": "b", "prefix": "a/../.."}, ".prefix: 'a/../..' leads out of"),
        ("resources/shm_size", -1, " -1 is not at least 0"),
        ("resources/max_slots", -4, " -4 is not at least 0"),
        ("resources/weight", -3, " -3 is not at least 0"),
        ("environment/image", "", " is empty"),
        ("environment/image", {"cpu": ""}, ".cpu is empty"),
        ("profiling", {"begin_on_batch": 5, "end_after_batch": 3}, ": end_after_batch is before begin_on_batch"),
        ("checkpoint_storage", {"type": "s3", "user": "x"}, ".user is not a key of checkpoint_storage with type s3"),
        ("environment/proxy_ports", [{"port": 8080}], "[0].port is not a key"),
        ("environment/registry_auth", {"user": "x"}, ".user is not a key"),
        ("resources/devices", ["nonsense"], "[0]: 'nonsense' is not host_path:container_path[:mode]"),
        (
            "searcher",
            {"name": "adaptive_asha", "max_trials": 9, "max_time": 10, "time_metric": "a", "divisor": 1},
            ".divisor 1 is not greater than 1",
        ),
    ],
)
def test_what_determined_refuses(path, value, message):
    with pytest.raises(UserError) as error:
        check_experiment(with_key(path, value))
    assert str(error.value).startswith(path.replace("/", ".") + message)
