"""Uploading an export. The hub's own client is given a stand-in for its API."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

import export
from serving import exporting

NEW = "it is not there, and cannot be created: "


class Api:
    """Records what is asked of the hub, and refuses what `refused` names. `repositories` says which are private."""

    calls, refused, repositories, token = [], {}, {}, {}

    def whoami(self):
        self._answer("whoami")
        return {"name": "me", "orgs": [{"name": "readers", "roleInOrg": "read"}], "auth": {"accessToken": self.token}}

    def model_info(self, name):
        if name not in self.repositories:
            raise RepositoryNotFoundError("404", response=SimpleNamespace(status_code=404, headers={}, request=None))
        return SimpleNamespace(private=self.repositories[name])

    def auth_check(self, name, **kwargs):
        self._answer("auth_check", name, **kwargs)

    def create_repo(self, name, **kwargs):
        self._answer("create_repo", name, **kwargs)

    def upload_folder(self, folder_path, **kwargs):
        self._answer("upload_folder", sorted(path.name for path in folder_path.iterdir()), **kwargs)

    def _answer(self, method, *what, **kwargs):
        self.calls.append((method, *what, kwargs))
        if status := self.refused.get(method):
            response = SimpleNamespace(status_code=status, headers={}, request=None)
            raise HfHubHTTPError(f"{status} no\nright", response=response)


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    for name, value in (("calls", []), ("refused", {}), ("repositories", {}), ("token", {"role": "write"})):
        monkeypatch.setattr(Api, name, value)
    return Api


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*arguments, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(exporting, "load", load)


def test_a_folder_is_uploaded_to_a_private_repository_once_it_is_proven(api, call, tiny, tmp_path):
    words = (tiny / "base", tmp_path / "out", "--device", "cpu", "--push_to_hub", "model")
    status, out, err = call(export.main, *words)
    assert status == 0, err
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    private = {"private": True, "exist_ok": True}
    assert [call[:-1] for call in api.calls] == [("whoami",), ("create_repo", "me/model"), ("upload_folder", files)]
    outdated = ["*.safetensors", "*.safetensors.index.json", "*.bin", "adapter_*"]
    outdated += ["added_tokens.json", "tokenizer.model", "*chat_template*", "Modelfile"]
    how = {"repo_id": "me/model", "commit_message": "Export", "delete_patterns": outdated}
    assert [call[-1] for call in api.calls] == [{}, private, how]
    assert "README.md" in files
    assert out.endswith("Uploaded to https://huggingface.co/me/model\n")
    assert "public" not in out
    assert (tmp_path / "out" / "README.md").read_text().split("---")[2].startswith("\n\n# me/model\n")
    assert "hf_secret" not in out + (tmp_path / "out" / "README.md").read_text()


def test_a_model_that_is_not_proven_creates_no_repository_and_a_public_one_is_told(
    api, call, tiny, tmp_path, monkeypatch
):
    def load(*arguments, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "load", load)
    api.repositories["me/model"] = False
    words = (tiny / "base", tmp_path / "out", "--device", "cpu", "--push_to_hub", "me/model")
    status, out, _ = call(export.main, *words)
    assert status == 130
    assert out.startswith("--push_to_hub me/model: it is public: anyone can read the model\n")
    assert api.calls == [("whoami", {}), ("auth_check", "me/model", {"write": True})]


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("name", "answers", "begins", "why"),
    [
        ("me/model", {"refused": {"whoami": 401}}, "error", "401 no right"),
        ("me/model", {"refused": {"whoami": 502}}, "error (may be temporary)", "502 no right"),
        ("them/it", {"refused": {"auth_check": 403}, "repositories": {"them/it": False}}, "error", "403 no right"),
        ("them/it", {}, "error", NEW + "them is neither me, whose token this is, nor one of its organizations"),
        ("readers/model", {}, "error", NEW + "me, whose token this is, may only read there"),
        ("model", {"token": {"role": "read"}}, "error", NEW + "the token may only read"),
    ],
)
def test_a_refused_name_is_one_line_before_anything_is_loaded(
    api, call, tiny, tmp_path, monkeypatch, name, answers, begins, why
):
    for what, value in answers.items():
        monkeypatch.setattr(api, what, value)
    stopped, out, err = call(export.main, tiny / "base", tmp_path / "out", "--push_to_hub", name)
    assert (stopped, out, err) == (2, "", f"{begins}: --push_to_hub {name}: {why}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_upload_keeps_the_folder(api, call, tiny, tmp_path):
    api.refused["upload_folder"] = 502
    words = (tiny / "base", tmp_path / "out", "--device", "cpu", "--push-to-hub", "model")
    status, out, err = call(export.main, *words)
    assert (status, err.count("\n")) == (2, 1)
    assert "To serve it:" in out
    again = f"`hf upload me/model {tmp_path / 'out'} --private --delete '*.safetensors' --delete "
    assert f"{tmp_path / 'out'} is whole, but not uploaded ({again}" in err
    assert err.endswith(" tries again): 502 no right\n")
    assert (tmp_path / "out" / "model.safetensors").exists()
