"""What can be a hub id, and a hub that cannot be reached."""

import socket
import time
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from errors import TemporaryError, UserError
from storage import hub


@pytest.mark.parametrize("name", ["a b/c", " ", "-", "none/such@main", "C:\\model", "a\nb", "a/b/c"])
def test_what_is_no_hub_id_is_refused_unasked(name):
    with pytest.raises(UserError, match=r"^model_name: no such file or folder, and a hub id is name or owner/name$"):
        hub.check_hub_id(name, "model_name")


def test_a_container_says_what_it_sees(monkeypatch):
    assert hub.no_such("folder") == "no such folder"
    config = {
        "bind_mounts": [{"host_path": "/data", "container_path": "/d"}, {"host_path": "/t", "container_path": "/u"}]
    }
    info = SimpleNamespace(task_type="TRIAL", trial=SimpleNamespace(_config=config))
    monkeypatch.setattr("determined.get_cluster_info", lambda: info)
    both = "it sees what was uploaded, and its agent's /data as /d, its agent's /t as /u"
    assert hub.no_such("folder") == f"no such folder (in a container: {both})"
    del config["bind_mounts"]
    assert hub.no_such("folder").endswith("and nothing of its agent's disk, as there are no bind_mounts)")


@pytest.fixture
def unreachable(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        hub._why_out_of_reach.cache_clear()
        yield
    hub._why_out_of_reach.cache_clear()


def test_a_hub_out_of_reach_is_found_at_once(unreachable, monkeypatch, tmp_path):
    """The libraries would try again for 25 seconds. What they have in their cache needs no hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(TemporaryError, match=r"^model_name: .*the hub cannot be reached \(.*refused\)$"):
        hub.check_hub_id("google/gemma-2b", "model_name")
    assert time.monotonic() < started + 5
    (tmp_path / "models--google--gemma-2b").mkdir()
    hub.check_hub_id("google/gemma-2b", "model_name")
