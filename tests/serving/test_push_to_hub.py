"""Uploading an export. The hub's own client is given a stand-in for its API."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

import export


class Api:
    """Records what is asked of the hub, and refuses what `refused` names."""

    calls, refused = [], {}

    def create_repo(self, name, **kwargs):
        self._answer("create_repo", name, **kwargs)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name.rpartition('/')[2]}")

    def upload_folder(self, **kwargs):
        self._answer("upload_folder", sorted(path.name for path in kwargs["folder_path"].iterdir()), kwargs["repo_id"])

    def _answer(self, method, *what, **kwargs):
        self.calls.append((method, *what, kwargs))
        if status := self.refused.get(method):
            response = SimpleNamespace(status_code=status, headers={}, request=None)
            raise HfHubHTTPError(f"{status} no\nright", response=response)


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    monkeypatch.setattr(Api, "refused", {})
    return Api


def test_a_folder_is_uploaded_to_a_private_repository_once_it_is_proven(api, call, tiny, tmp_path):
    words = (tiny / "base", tmp_path / "out", "--device", "cpu", "--push_to_hub", "model")
    status, out, err = call(export.main, *words)
    assert status == 0, err
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    private = {"private": True, "exist_ok": True}
    assert api.calls == [("create_repo", "model", private), ("upload_folder", files, "me/model", {})]
    assert "README.md" in files
    assert out.endswith("Uploaded to https://huggingface.co/me/model\n")
    assert (tmp_path / "out" / "README.md").read_text().split("---")[2].startswith("\n\n# me/model\n")
    assert "hf_secret" not in out + (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("status", "begins"), [(403, "error: "), (502, "error (may be temporary): ")])
def test_a_refused_name_is_one_line_before_anything_is_loaded(api, call, tiny, tmp_path, status, begins):
    api.refused["create_repo"] = status
    stopped, out, err = call(export.main, tiny / "base", tmp_path / "out", "--push_to_hub", "them/model")
    assert (stopped, out, err) == (2, "", f"{begins}--push_to_hub them/model: {status} no right\n")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_upload_keeps_the_folder(api, call, tiny, tmp_path):
    api.refused["upload_folder"] = 502
    words = (tiny / "base", tmp_path / "out", "--device", "cpu", "--push-to-hub", "model")
    status, out, err = call(export.main, *words)
    assert (status, err.count("\n")) == (2, 1)
    assert "To serve it:" in out
    assert f"{tmp_path / 'out'} is whole, but not uploaded (`hf upload me/model {tmp_path / 'out'}` tries again)" in err
    assert (tmp_path / "out" / "model.safetensors").exists()
